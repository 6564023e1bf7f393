"""What the user sees: progress on stderr, tables and JSON on stdout.

Rich is imported where it is drawn with, so that ``pinfer --help`` does not wait for it.
"""

from __future__ import annotations

import json
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pinfer.progress import Progress

if TYPE_CHECKING:
    from pathlib import Path

    from rich.progress import Progress as RichProgress
    from rich.progress import Task
    from rich.table import Table

    from pinfer.benchmark.report import BenchReport, Result
    from pinfer.convert import ConvertReport
    from pinfer.eval import EvalReport
    from pinfer.profile import ProfileReport
    from pinfer.show import ShowReport
    from pinfer.solve import SolveReport
    from pinfer.split import SplitReport
    from pinfer.train import LayerReport, TrainReport

# Without a terminal a line is printed each time this share of the work and at least this much time have passed, and
# when nothing was said for long.
_LINE_SHARE = 0.1
_LINE_SECONDS = 2.0
_SILENT_SECONDS = 30.0
# A table that is piped somewhere is not folded to a terminal's width.
_PIPE_WIDTH = 200

_UNITS = ("", "Ki", "Mi", "Gi", "Ti", "Pi")


def format_bytes(n: float) -> str:
    """``1536`` -> ``1.5 KiB``; plain bytes below 1024."""
    power = 0
    while abs(n) >= 1024 and power < len(_UNITS) - 1:
        n /= 1024
        power += 1
    return f"{n:.0f} B" if power == 0 else f"{n:.1f} {_UNITS[power]}B"


def format_amount(n: float, unit: str) -> str:
    """An amount of work: bytes in binary units, everything else as a grouped number."""
    return format_bytes(n) if unit == "bytes" else f"{n:,.0f} {unit}"


def format_done(done: float, total: float, unit: str) -> str:
    """Work done of all there is; ``512 of 2,048 tokens``. A total of 0 is unknown and left out."""
    if total <= 0:
        return format_amount(done, unit)
    return f"{format_bytes(done) if unit == 'bytes' else f'{done:,.0f}'} of {format_amount(total, unit)}"


def format_rate(rate: float, unit: str) -> str:
    """Work per second, e.g. ``4,812 tokens/s`` or ``1.2 GiB/s``; slow rates keep a decimal."""
    if unit == "bytes":
        return f"{format_bytes(rate)}/s"
    return f"{rate:,.0f} {unit}/s" if rate >= 10 else f"{rate:.1f} {unit}/s"


def format_seconds(seconds: float) -> str:
    """``75`` -> ``1:15``, ``3675`` -> ``1:01:15``."""
    whole = max(0, round(seconds))
    hours, minutes, rest = whole // 3600, whole // 60 % 60, whole % 60
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def percent(share: float) -> str:
    """A share of one as a percentage with a decimal."""
    return f"{100 * share:.1f} %"


def say(text: str) -> None:
    """One line of talk on stderr."""
    print(text, file=sys.stderr, flush=True)


def stderr_progress() -> Progress:
    """The progress to hand to a stage: a bar where stderr is a terminal, plain lines where it is not."""
    return _BarProgress() if sys.stderr.isatty() else _LineProgress()


class _LineProgress:
    """Progress as plain lines, for logs and pipes."""

    @contextmanager
    def task(self, label: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
        begin = last = time.monotonic()
        done = shown = 0

        def advance(n: int) -> None:
            nonlocal done, shown, last
            done += n
            now = time.monotonic()
            due = _LINE_SECONDS if done - shown >= _LINE_SHARE * total else _SILENT_SECONDS
            if now - last < due:
                return
            shown, last = done, now
            rate = done / (now - begin)
            share = f" ({100 * done / total:.0f} %)" if total > 0 else ""
            eta = f", ETA {format_seconds((total - done) / rate)}" if total > done and rate > 0 else ""
            say(f"{label}: {format_done(done, total, unit)}{share}, {format_rate(rate, unit)}{eta}")

        yield advance
        seconds = time.monotonic() - begin
        say(f"{label}: {format_amount(done, unit)} in {seconds:.1f} s ({format_rate(done / max(seconds, 1e-9), unit)})")

    def note(self, text: str) -> None:
        say(text)


class _BarProgress:
    """Progress as Rich bars on the terminal; tasks may nest."""

    def __init__(self) -> None:
        self._live: RichProgress | None = None

    @contextmanager
    def task(self, label: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
        if self._live is not None:
            with self._row(self._live, label, total, unit) as advance:
                yield advance
            return
        self._live = _rich_progress()
        try:
            with self._live, self._row(self._live, label, total, unit) as advance:
                yield advance
        finally:
            self._live = None

    @contextmanager
    def _row(self, live: RichProgress, label: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
        row = live.add_task(label, total=total if total > 0 else None, unit=unit)
        yield lambda n: live.advance(row, n)
        live.update(row, total=live.tasks[live.task_ids.index(row)].completed)

    def note(self, text: str) -> None:
        if self._live is not None:
            self._live.console.print(text, markup=False, highlight=False)
        else:
            say(text)


def _rich_progress() -> RichProgress:
    from rich.console import Console
    from rich.progress import BarColumn, ProgressColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress
    from rich.text import Text

    class Amount(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(format_done(task.completed, task.total or 0, str(task.fields["unit"])))

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            speed = task.finished_speed or task.speed
            return Text(format_rate(speed, str(task.fields["unit"])) if speed else "")

    return RichProgress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        Amount(),
        Rate(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        speed_estimate_period=20,
    )


def print_json(value: Mapping[str, object]) -> None:
    """One JSON object on stdout."""
    print(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> None:
    """A table on stdout; columns hang to the right but for those in ``left``."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i in left else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    if title:
        print(title)
    _show(table)


def print_facts(facts: Sequence[tuple[str, str]]) -> None:
    """Names and values on stdout, one pair per line."""
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column()
    for name, value in facts:
        table.add_row(name, value)
    _show(table)


def _show(table: Table) -> None:
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH, highlight=False, markup=False, emoji=False)
    with console.capture() as captured:
        console.print(table)
    # Rich draws a margin and fills lines up to the table's width; what is piped or copied should not carry that.
    lines = [line.rstrip() for line in captured.get().splitlines()]
    print(textwrap.dedent("\n".join(line for line in lines if line)))


def print_convert(report: ConvertReport) -> None:
    """What `pinfer convert` wrote."""
    threshold = f" above {report.activation_threshold:g}" if report.activation_threshold else ""
    facts = [
        ("architecture", report.arch),
        ("activation", report.activation + threshold),
        ("weights", f"{report.n_weights:,} in {report.n_tensors} tensors, {report.type}"),
        ("size", format_bytes(report.n_bytes)),
        ("tokenizer", _tokenizer(report)),
        ("took", format_seconds(report.seconds)),
    ]
    if (predictor := report.predictor) is not None:
        facts.append(("predictor", f"{format_bytes(predictor.predictor_bytes)}, measured on {predictor.corpus}"))
        facts.append(
            ("recall", f"{percent(predictor.recall)} of the activation mass, {percent(predictor.candidates)} computed")
        )
        if predictor.sign_recall is not None and predictor.sign_candidates is not None:
            facts.append(
                (
                    "as PowerInfer used it",
                    f"{percent(predictor.sign_recall)}, {percent(predictor.sign_candidates)} computed",
                )
            )
    print_facts(facts)
    for note in report.notes:
        say(f"note: {note}")
    print_paths(report.path)


def _tokenizer(report: ConvertReport) -> str:
    if report.tokenizer is None:
        return "as in the source"
    found = report.tokenizer
    kind = found.model if found.pre == "default" else found.pre
    return f"{kind}, {found.n_tokens:,} tokens; ids of {found.n_strings} texts are those of {found.verified_with}"


def print_profile(report: ProfileReport) -> None:
    """What `pinfer profile` counted: active neurons, and how few of them do most of the work."""
    rows = [
        (str(layer.layer), percent(layer.active), percent(layer.most), percent(layer.never)) for layer in report.layers
    ]
    rows.append(("whole model", percent(report.active), percent(report.most), percent(report.never)))
    title = f"{report.tokens:,} tokens of {report.corpus}"
    if report.interrupted:
        title += f", stopped before {report.tokens_wanted:,}"
    print_table(title, ("layer", "active", "make 80 %", "never active"), rows)
    print_paths(report.path, report.samples_path)


def print_train(report: TrainReport) -> None:
    """What the predictor of each layer names, keeps and costs."""

    def kind(layer: LayerReport) -> str:
        return {"one_bit": "1 bit", "two_bit": "2 bits"}.get(layer.kind, f"rank {layer.rank}" if layer.rank else "none")

    def row(label: str, kind: str, part: LayerReport | TrainReport) -> tuple[str, ...]:
        ratio = f"{part.candidates / part.active:.2f}" if part.active > 0 else ""
        saved = f"{format_bytes(part.expected_bytes)} of {format_bytes(part.exact_bytes)}"
        shares = (percent(part.recall), percent(part.candidates), percent(part.active))
        return (label, kind, *shares, ratio, format_bytes(part.predictor_bytes), saved)

    rows = [row(str(layer.layer), kind(layer), layer) for layer in report.layers]
    rows.append(row("whole model", "", report))
    columns = ("layer", "kind", "recall", "candidates", "active", "cand./active", "predictor", "read per token")
    print_table(f"learnt from {report.n_samples:,} tokens", columns, rows)
    print_paths(report.path)


def print_solve(report: SolveReport) -> None:
    """What goes where, how good that is, and the speed expected of it."""
    rows = [(str(layer), f"{n:,}", percent(n / report.n_ff)) for layer, n in enumerate(report.n_hot)]
    rows.append(("whole model", f"{sum(report.n_hot):,}", percent(report.hot_share)))
    print_table("", ("layer", "hot neurons", "share"), rows)
    if report.devices:
        _print_memory(report)
    used = sum(report.n_bytes.values())
    first = report.devices[0].name if report.devices else "a device"
    quality = f"objective {report.objective:.4g}, bound {report.bound:.4g} (gap {percent(report.gap)}), greedy "
    facts = [
        ("device", f"{report.device}, {format_bytes(used)} of {format_bytes(report.vram)} taken"),
        ("dense layers", f"{report.n_gpu_layers} on {first}, context {report.n_ctx:,}"),
        ("activations", f"{percent(report.hot_activations)} fall on hot neurons"),
        ("solver", f"{report.status} in {report.solver_seconds:.2f} s: {quality}{report.greedy:.4g}"),
        (
            "expected",
            f"{report.tokens_per_s:.1f} tokens/s; every neuron cold {report.tokens_per_s_cold:.1f}, "
            f"dense {report.tokens_per_s_dense:.1f}",
        ),
    ]
    print_facts(facts)
    print_paths(report.placement)


def _print_memory(report: SolveReport) -> None:
    """Device memory by what it is for."""
    devices = report.devices
    rows = [(part.replace("_", " "), *(format_bytes(d.n_bytes[part]) for d in devices)) for part in report.n_bytes]
    rows.append(("together", *(format_bytes(sum(d.n_bytes.values())) for d in devices)))
    rows.append(("budget", *(format_bytes(d.vram) for d in devices)))
    print_table("", ("memory", *(d.name for d in devices)), rows)


def print_split(report: SplitReport) -> None:
    """What `pinfer split` wrote."""
    types = dict.fromkeys((*report.hot_down_types, *report.cold_down_types))
    facts = [
        ("hot neurons", f"{report.n_hot:,} ({format_bytes(report.hot_bytes)})"),
        ("cold neurons", f"{report.n_cold:,} ({format_bytes(report.cold_bytes)})"),
        ("ordered by", report.order),
        ("down rows", ", ".join(types)),
        ("speed", f"{format_bytes((report.hot_bytes + report.cold_bytes) / max(report.seconds, 1e-9))}/s"),
        ("verified", "hot and cold together are the model" if report.verified else "no (--verify proves it)"),
    ]
    print_facts(facts)
    print_paths(report.hot, report.cold)


def print_eval(report: EvalReport) -> None:
    """What computing sparsely costs in quality."""
    against = "stock llama.cpp" if report.reference == "libllama" else "pinfer's own dense computation"
    facts = [
        ("mode", f"{report.mode}, {report.tokens:,} tokens, against {against}"),
        ("perplexity", f"{report.perplexity_sparse:.4f} (dense {report.perplexity_dense:.4f})"),
        ("KL divergence", f"{report.kl_mean:.6f} mean, {report.kl_p99:.6f} at the 99th percentile"),
        ("top-1 agreement", percent(report.top1_agreement)),
        ("computed", f"{percent(report.computed)} of the neurons; {percent(report.active)} of the CPU's were active"),
    ]
    print_facts(facts)


def print_show(report: ShowReport) -> None:
    """What a model is, what there is for it, and what will be done with it."""
    from pinfer.cli import show_report

    print_facts(show_report.facts(report))
    print()
    print_table("", ("part", "size", "share", "types"), show_report.parts(report), left=(0, 3))
    print()
    if rows := show_report.artefacts(report):
        print_table(f"artefacts in {report.artefact_folder}", ("artefact", "size", "state", ""), rows, left=(0, 2, 3))
    else:
        print("no artefacts yet")
    print()
    print(f"{report.plan[0].upper()}{report.plan[1:]}.")
    for artefact in report.artefacts:
        if artefact.problem:
            say(f"{artefact.problem}; make it again: {artefact.mend}")


def print_bench(report: BenchReport, output: str) -> None:
    """What `pinfer bench` measured, as ``md``, ``csv``, ``json`` or ``jsonl``; its notes on stderr but for JSON."""
    if output == "json":
        print_json(report.to_json())
        return
    for note in report.notes:
        say(f"note: {note}")
    if output == "jsonl":
        for record in report.records():
            print(json.dumps(record, ensure_ascii=False, allow_nan=False))
    elif output == "csv":
        import csv

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
    for fact in _bench_facts(report):
        print(f"- {fact}")


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
        facts.insert(1, "of the shorter side hidden: " + ", ".join(f"{percent(h)} of {n}" for n, h in hidden.items()))
    if report.recall is not None and report.candidates is not None:
        named = f"{percent(report.candidates)} of the neurons named"
        facts.insert(1, f"predictor, as trained: recall {percent(report.recall)}, {named}")
    return facts


def print_paths(*paths: Path | None) -> None:
    """The files that were written, on stderr."""
    for path in paths:
        if path is not None:
            say(f"wrote {path} ({format_bytes(path.stat().st_size)})")
