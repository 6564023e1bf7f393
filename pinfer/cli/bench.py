"""``pinfer bench``: flags and report."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from pinfer.cli import ui
from pinfer.cli.formats import format_bytes, percent
from pinfer.cli.options import (
    ActivationOpt,
    ArtefactsOpt,
    CacheTypeKOpt,
    CacheTypeVOpt,
    Choice,
    DenseOpt,
    DeviceOpt,
    ExactOpt,
    LayersOpt,
    NoArtefactsOpt,
    RpcOpt,
    ThreadsOpt,
    UbatchOpt,
    parse_list,
    settings,
    with_model,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pinfer.benchmark.history import Change
    from pinfer.benchmark.report import BenchReport, Result, Steps


@with_model
def bench(
    choice: Choice,
    compare: Annotated[
        str,
        typer.Option(
            "--compare",
            metavar="dense|none|FILE",
            help="Compare with stock libllama (dense), or measure pinfer alone (none); "
            "FILE, with records of -o jsonl: also say what got slower since.",
        ),
    ] = "dense",
    n_prompt: Annotated[
        str, typer.Option("-p", "--n-prompt", metavar="N[,N]", help="Prompt lengths to test; 0 skips them.")
    ] = "512",
    n_gen: Annotated[
        str, typer.Option("-n", "--n-gen", metavar="N[,N]", help="Numbers of tokens to decode; 0 skips them.")
    ] = "128",
    n_seq: Annotated[
        str, typer.Option("-np", "--parallel", metavar="N[,N]", help="Numbers of sequences to decode in parallel.")
    ] = "1,4,16",
    n_depth: Annotated[
        str, typer.Option("-d", "--n-depth", metavar="N[,N]", help="Tokens in the context before each test starts.")
    ] = "0",
    repetitions: Annotated[
        int, typer.Option("-r", "--repetitions", min=1, metavar="N", help="Repetitions of each test.")
    ] = 5,
    n_threads: ThreadsOpt = None,
    n_ctx: Annotated[
        int,
        typer.Option("-c", "--ctx-size", min=0, metavar="N", help="Context per sequence; 0 uses what the test needs."),
    ] = 0,
    n_batch: Annotated[
        int, typer.Option("-b", "--batch-size", min=1, metavar="N", help="Logical batch: tokens submitted together.")
    ] = 2048,
    n_ubatch: UbatchOpt = 512,
    n_gpu_layers: LayersOpt = None,
    text: Annotated[
        Path | None, typer.Option("--text", metavar="FILE", help="Text to take the tokens from. [default: built-in]")
    ] = None,
    cache_type_k: CacheTypeKOpt = None,
    cache_type_v: CacheTypeVOpt = None,
    steps: Annotated[
        bool, typer.Option("--steps", help="Also show where the time of a decoded token goes, on the sparse side.")
    ] = False,
    exact: ExactOpt = False,
    dense: DenseOpt = False,
    artefacts: ArtefactsOpt = None,
    no_artefacts: NoArtefactsOpt = False,
    device: DeviceOpt = None,
    rpc: RpcOpt = None,
    activation: ActivationOpt = None,
    output: Annotated[
        Literal["md", "csv", "json", "jsonl"], typer.Option("-o", "--output", help="Format of the report.")
    ] = "md",
    as_json: Annotated[bool, typer.Option("--json", help="Same as -o json.")] = False,
) -> None:
    """Compare the speed with stock libllama. Both sides run alternately, on the same tokens."""
    from pinfer import bench as stage
    from pinfer.benchmark.history import changes, read_records

    records = None if compare in ("dense", "none") else read_records(Path(compare))
    compare = "dense" if records is not None else compare
    if rpc is not None and compare == "dense" and not dense:
        raise typer.BadParameter(
            "an RPC server serves one process at a time; measure one side: --compare none, or --dense",
            param_hint="--rpc",
        )
    lists = {
        "n_prompt": parse_list(n_prompt, "-p"),
        "n_gen": parse_list(n_gen, "-n"),
        "n_seq": parse_list(n_seq, "-np"),
        "n_depth": parse_list(n_depth, "-d"),
    }
    options = settings(stage.BenchOptions, {**locals(), **lists})
    report = stage.bench(choice.path(), options, ui.stderr_progress())
    print_bench(report, "json" if as_json else output)
    if records is not None:
        _print_changes(changes(report, records))


def _print_changes(found: Sequence[Change]) -> None:
    """One line per test on stderr, since stdout has the report."""
    for change in found:
        ui.say(f"{change.test}: {change.verdict}, {change.before} at {change.commit}, {change.now} now")
    if not found:
        ui.say("note: the file has no record of this model and these tests, by this machine with as many threads")


def print_bench(report: BenchReport, output: str) -> None:
    """Print the results as ``md``, ``csv``, ``json`` or ``jsonl``. Notes go to stderr, or into the JSON."""
    if output == "json":
        ui.print_json(report.to_json())
        return
    for note in report.notes:
        ui.say(f"note: {note}")
    if output == "jsonl":
        for record in report.records():
            print(json.dumps(record, ensure_ascii=False, allow_nan=False))
    elif output == "csv":
        rows = [{k: json.dumps(v) if isinstance(v, list) else v for k, v in r.items()} for r in report.records()]
        writer = csv.DictWriter(sys.stdout, rows[0].keys(), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    else:
        _print_bench_markdown(report)


def _print_bench_markdown(report: BenchReport) -> None:
    columns = ("test", "side", "t/s", "median", "sparse ÷ dense", "computed", "active", "limit t/s", "of limit")
    print("| " + " | ".join(columns) + " |")
    print("|---|---|" + "---:|" * (len(columns) - 2))
    for result in report.results:
        print("| " + " | ".join(_bench_row(report, result)) + " |")
    print()
    for steps in report.steps:
        _print_steps(steps)
    for fact in _bench_facts(report):
        print(f"- {fact}")


def _print_steps(steps: Steps) -> None:
    rows = [*steps.ffn.items(), ("all else: ggml's nodes, scheduler", steps.rest)]
    print(f"| {steps.test.name}: step | ms per token | share |")
    print("|---|---:|---:|")
    for name, milliseconds in rows:
        print(f"| {name} | {milliseconds:.3f} | {percent(milliseconds / steps.token)} |")
    print(f"| token | {steps.token:.3f} | |")
    for name, milliseconds in steps.by_node.items():
        print(f"| {name}, node by node | {milliseconds:.3f} | |")
    print(f"| page faults | {steps.faults:.1f} | |")
    print()


def _bench_row(report: BenchReport, result: Result) -> list[str]:
    ratio = report.ratio(result.test) if result.side == "sparse" else None
    limit = report.limit(result)
    return [
        result.test.name,
        report.mode if result.side == "sparse" else result.side,
        f"{result.mean:.2f} ± {result.sd:.2f}",
        f"{result.median:.2f}",
        f"{ratio.median:.2f}× ({min(ratio.pairs):.2f}-{max(ratio.pairs):.2f})" if ratio else "",
        percent(result.computed) if result.computed is not None else "",
        percent(result.active) if result.active is not None else "",
        f"{limit:.2f}" if limit is not None else "",
        f"{100 * result.median / limit:.0f} %" if limit is not None else "",
    ]


def _bench_facts(report: BenchReport) -> list[str]:
    e, m = report.environment, report.model
    peaks = ", ".join(f"{side} {format_bytes(n)}" for side, n in report.peak.items())
    if report.memory_ratio is not None:
        peaks += f" (sparse ÷ dense {report.memory_ratio:.2f})"
    build = f"pinfer {e.pinfer_version}" + (f" ({e.commit})" if e.commit else "")
    facts = [
        f"model: {m.filename}, {m.type}, {m.activation}, {format_bytes(m.size)}, {m.n_params / 1e6:,.0f} M parameters",
        f"peak memory: {peaks}",
        f"memory bandwidth: {report.bandwidth / 1e9:.1f} GB/s; tokens: {report.tokens_from}",
        f"build: {build}, llama-cpp-python {e.llama_cpp_python}, ggml {e.ggml}" + (f", {e.isa}" if e.isa else ""),
        f"machine: {e.cpu}, {e.n_threads} threads on {e.n_cpus} CPUs, {format_bytes(e.memory)}",
        f"{e.time}, load average {e.load_average:.2f}"
        + (f", others used {report.others:.2f} CPUs" if report.others is not None else ""),
    ]
    hidden = {r.test.name: r.hidden for r in report.results if r.hidden is not None}
    if hidden:
        facts.insert(1, "overlap of device and CPU: " + ", ".join(f"{percent(h)} of {n}" for n, h in hidden.items()))
    if report.recall is not None and report.candidates is not None:
        named = f"names {percent(report.candidates)} of the neurons"
        facts.insert(1, f"predictor, as trained: recall {percent(report.recall)}, {named}")
    return facts
