"""The command line: parses, calls one stage, prints its report. Everything heavy is imported inside the command."""

from __future__ import annotations

import errno
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Annotated, Literal, NoReturn

import typer

from pinfer import __version__
from pinfer.cli.exits import describe_os_error, fail, mute, wrong_usage
from pinfer.cli.options import (
    ActivationOpt,
    Choice,
    DeviceOpt,
    HubOpt,
    JsonOpt,
    ModelArg,
    ModelOpt,
    OfflineOpt,
    RpcOpt,
    ThreadsOpt,
    parse_count,
    parse_layers,
    parse_list,
    parse_sizes,
    use_servers,
)
from pinfer.cli.run import run
from pinfer.errors import PinferError

app = typer.Typer(
    name="pinfer",
    help="Run ReLU language models by their active neurons, on today's llama.cpp.",
    epilog="The way through: pinfer profile, train, solve, split, run. Data goes to stdout, talk to stderr.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"pinfer {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    pass


@app.command()
def convert(
    source: Annotated[
        Path | None,
        typer.Argument(
            metavar="SOURCE", help="Checkpoint folder (config.json, weights, tokenizer) or PowerInfer GGUF."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", "--outfile", metavar="FILE", help="GGUF to write. [default: NAME-TYPE.gguf here]"
        ),
    ] = None,
    type_: Annotated[
        Literal["f32", "f16", "bf16", "q8_0", "q4_0", "q4_k_m"] | None,
        typer.Option("--type", "--outtype", help="Type of the matrices. [default: f16; a PowerInfer file's own]"),
    ] = None,
    activation: Annotated[
        Literal["relu", "relu2", "reglu", "drelu"] | None,
        typer.Option("--activation", help="What the FFN computes, where config.json is wrong about it."),
    ] = None,
    dataset: Annotated[
        str,
        typer.Option(
            "--dataset", metavar="c4|wikitext|FILE|-", help="Text to measure a PowerInfer file's predictor on."
        ),
    ] = "wikitext",
    force: Annotated[bool, typer.Option("--force", help="Replace the file if it is there.")] = False,
    threads: ThreadsOpt = None,
    repo: Annotated[
        str | None,
        typer.Option("-hf", "-hfr", "--hf-repo", metavar="USER/REPO", help="Fetch the checkpoint from the hub, once."),
    ] = None,
    offline: OfflineOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Make a GGUF of a Hugging Face checkpoint or of a PowerInfer file."""
    from pinfer import convert as stage
    from pinfer.cli import ui

    if (source is None) == (repo is None):
        raise typer.BadParameter("name one checkpoint: a folder, or -hf USER/REPO", param_hint="SOURCE")
    Choice(source, repo=repo, offline=offline).check()
    progress = ui.stderr_progress()
    name = None
    if repo is not None:
        from pinfer.hub.models import fetch_checkpoint

        source, name = fetch_checkpoint(repo, progress, offline=offline), repo.rpartition("/")[2]
    assert source is not None
    options = stage.ConvertOptions(
        out=out,
        type=type_,
        dataset=dataset,
        activation=activation,
        force=force,
        n_threads=threads,
        name=name,
    )
    report = stage.convert(source, options, progress)
    ui.print_json(report.to_json()) if as_json else ui.print_convert(report)
    ui.say(f"next: {report.next_command}")


@app.command()
def profile(
    model: ModelArg = None,
    dataset: Annotated[
        str, typer.Option("--dataset", metavar="c4|wikitext|FILE|-", help="The text to count on; - is stdin.")
    ] = "wikitext",
    tokens: Annotated[
        int,
        typer.Option(
            "--tokens", parser=parse_count, metavar="N", help="Tokens to count. [default: 128k]", show_default=False
        ),
    ] = 131072,
    ctx: Annotated[
        int,
        typer.Option("-c", "--ctx-size", min=0, metavar="N", help="Context in tokens; 0: the model's, at most 2048."),
    ] = 0,
    samples: Annotated[
        int | None,
        typer.Option("--samples", min=0, metavar="N", help="FFN inputs to keep per layer. [default: as 1 GiB holds]"),
    ] = None,
    threads: ThreadsOpt = None,
    n_gpu_layers: Annotated[
        int, typer.Option("-ngl", "--n-gpu-layers", "--gpu-layers", min=0, metavar="N", help="Layers on the GPU.")
    ] = 0,
    activation: ActivationOpt = None,
    force: Annotated[
        bool, typer.Option("--force", help="Count even where the model reads worse with this activation.")
    ] = False,
    as_json: JsonOpt = False,
    model_flag: ModelOpt = None,
    repo: HubOpt = None,
    offline: OfflineOpt = False,
) -> None:
    """Count which neurons fire on a text; keeps samples for `train`. Ctrl-C keeps what was counted."""
    from pinfer import profile as stage
    from pinfer.cli import ui

    choice = Choice(model, model_flag, repo, offline)
    path = choice.path()
    options = stage.ProfileOptions(
        dataset=dataset,
        n_tokens=tokens,
        n_ctx=ctx,
        n_threads=threads,
        n_samples=samples,
        activation=activation,
        n_gpu_layers=n_gpu_layers,
        force=force,
    )
    report = stage.profile(path, options, ui.stderr_progress())
    ui.print_json(report.to_json()) if as_json else ui.print_profile(report)
    choice.say_next("train")
    if report.interrupted:
        raise typer.Exit(130)


@app.command()
def train(
    model: ModelArg = None,
    recall: Annotated[
        float, typer.Option("--recall", min=0.5, max=1.0, metavar="R", help="Share of activation mass to keep.")
    ] = 0.995,
    max_rank: Annotated[
        int | None, typer.Option("--max-rank", min=1, metavar="N", help="Largest rank tried. [default: by the model]")
    ] = None,
    type_: Annotated[Literal["q4_0", "q8_0", "f16"], typer.Option("--type", help="Type of the factors.")] = "q4_0",
    activation: ActivationOpt = None,
    as_json: JsonOpt = False,
    model_flag: ModelOpt = None,
    repo: HubOpt = None,
    offline: OfflineOpt = False,
) -> None:
    """Make the predictor that names the neurons worth computing, from the samples of `profile`."""
    from pinfer import train as stage
    from pinfer.cli import ui

    choice = Choice(model, model_flag, repo, offline)
    path = choice.path()
    options = stage.TrainOptions(recall=recall, max_rank=max_rank, type=type_, activation=activation)
    report = stage.train(path, options, ui.stderr_progress())
    ui.print_json(report.to_json()) if as_json else ui.print_train(report)
    choice.say_next("solve")


@app.command()
def solve(
    model: ModelArg = None,
    vram: Annotated[
        str | None,
        typer.Option(
            "--vram",
            metavar="SIZE[,SIZE]",
            help="Device memory to use, like 24G; of several devices together or, like 8G,4G, of each. "
            "[default: what is free]",
        ),
    ] = None,
    ctx: Annotated[
        int | None, typer.Option("-c", "--ctx-size", "--ctx", min=1, metavar="N", help="Context to leave room for.")
    ] = None,
    batch: Annotated[
        int, typer.Option("-b", "--batch-size", min=1, metavar="N", help="Batch to leave room for.")
    ] = 512,
    device: Annotated[
        str | None,
        typer.Option(
            "--device",
            "-dev",
            metavar="NAME[,NAME]",
            help="ggml devices; dense layers go to the first. [default: the first GPU]",
        ),
    ] = None,
    rpc: RpcOpt = None,
    machine: Annotated[
        Path | None, typer.Option("--machine", metavar="FILE", help="Solve for the machine described in this file.")
    ] = None,
    time_limit: Annotated[
        float, typer.Option("--time-limit", min=0.1, metavar="SECONDS", help="Longest time for the solver.")
    ] = 60.0,
    cache_type: Annotated[str, typer.Option("--cache-type", metavar="TYPE", help="Type of the KV cache.")] = "f16",
    activation: ActivationOpt = None,
    as_json: JsonOpt = False,
    model_flag: ModelOpt = None,
    repo: HubOpt = None,
    offline: OfflineOpt = False,
) -> None:
    """Decide which neurons go to the GPU, from the profile and the memory there is."""
    from pinfer import solve as stage
    from pinfer.cli import ui

    sizes = parse_sizes(vram, "--vram") if vram is not None else None
    choice = Choice(model, model_flag, repo, offline)
    path = choice.path()
    use_servers(rpc)
    options = stage.SolveOptions(
        vram=sizes,
        n_ctx=ctx,
        n_batch=batch,
        device=device,
        machine=machine,
        time_limit=time_limit,
        activation=activation,
        cache_type=cache_type,
    )
    report = stage.solve(path, options, ui.stderr_progress())
    ui.print_json(report.to_json()) if as_json else ui.print_solve(report)
    choice.say_next("split")


@app.command()
def split(
    model: ModelArg = None,
    down_type: Annotated[
        str | None,
        typer.Option("--down-type", metavar="TYPE", help="Type of the transposed down rows. [default: by the model]"),
    ] = None,
    verify: Annotated[bool, typer.Option("--verify", help="Prove that hot and cold together are the model.")] = False,
    activation: ActivationOpt = None,
    as_json: JsonOpt = False,
    model_flag: ModelOpt = None,
    repo: HubOpt = None,
    offline: OfflineOpt = False,
) -> None:
    """Write the hot and the cold neurons as `solve` placed them."""
    from pinfer import split as stage
    from pinfer.cli import ui

    choice = Choice(model, model_flag, repo, offline)
    path = choice.path()
    options = stage.SplitOptions(down_type=down_type, verify=verify, activation=activation)
    report = stage.split(path, options, ui.stderr_progress())
    ui.print_json(report.to_json()) if as_json else ui.print_split(report)
    choice.say_next("run", "-p 'Once upon a time'")


app.command()(run)


@app.command("eval")
def evaluate(
    text: Annotated[Path, typer.Option("--text", metavar="FILE", help="Text to measure on.")],
    model: ModelArg = None,
    tokens: Annotated[
        int,
        typer.Option(
            "--tokens", parser=parse_count, metavar="N", help="Tokens to measure. [default: 4k]", show_default=False
        ),
    ] = 4096,
    ctx: Annotated[
        int,
        typer.Option("-c", "--ctx-size", min=0, metavar="N", help="Context in tokens; 0: the model's, at most 2048."),
    ] = 0,
    exact: Annotated[bool, typer.Option("--exact", help="Without the predictor.")] = False,
    threads: ThreadsOpt = None,
    device: DeviceOpt = None,
    rpc: RpcOpt = None,
    activation: ActivationOpt = None,
    as_json: JsonOpt = False,
    model_flag: ModelOpt = None,
    repo: HubOpt = None,
    offline: OfflineOpt = False,
) -> None:
    """Measure what the predictor costs: KL divergence to the dense model, agreement, perplexity."""
    from pinfer import eval as stage
    from pinfer.cli import ui

    choice = Choice(model, model_flag, repo, offline)
    path = choice.path()
    use_servers(rpc)
    options = stage.EvalOptions(
        text=text, n_tokens=tokens, n_ctx=ctx, exact=exact, activation=activation, n_threads=threads, device=device
    )
    report = stage.evaluate(path, options, ui.stderr_progress())
    ui.print_json(report.to_json()) if as_json else ui.print_eval(report)
    choice.say_next("run", "-p 'Once upon a time'")


@app.command()
def bench(
    model: ModelArg = None,
    compare: Annotated[
        Literal["dense", "none"], typer.Option("--compare", help="Measure stock libllama as well, in turn, or not.")
    ] = "dense",
    prompt: Annotated[
        str, typer.Option("-p", "--n-prompt", metavar="N[,N]", help="Prompts of so many tokens; 0: none.")
    ] = "512",
    gen: Annotated[
        str, typer.Option("-n", "--n-gen", metavar="N[,N]", help="Decode so many tokens one by one; 0: none.")
    ] = "128",
    sequences: Annotated[
        str, typer.Option("-b", "--parallel", metavar="N[,N]", help="Decode so many sequences side by side.")
    ] = "1,4,16",
    repetitions: Annotated[
        int, typer.Option("-r", "--repetitions", min=1, metavar="N", help="Repetitions of each test.")
    ] = 5,
    threads: ThreadsOpt = None,
    ctx: Annotated[
        int, typer.Option("-c", "--ctx-size", min=0, metavar="N", help="Context of a sequence; 0: what its test needs.")
    ] = 0,
    n_gpu_layers: Annotated[
        int | None,
        typer.Option(
            "-ngl",
            "--n-gpu-layers",
            "--gpu-layers",
            parser=parse_layers,
            metavar="N|all",
            help="Layers on the GPU, on both sides. [default: as solved]",
        ),
    ] = None,
    text: Annotated[
        Path | None, typer.Option("--text", metavar="FILE", help="Text to take the tokens from. [default: built in]")
    ] = None,
    exact: Annotated[bool, typer.Option("--exact", help="Without the predictor.")] = False,
    dense: Annotated[bool, typer.Option("--dense", help="Stock libllama alone.")] = False,
    no_artefacts: Annotated[bool, typer.Option("--no-artefacts", help="Use the model alone.")] = False,
    device: DeviceOpt = None,
    rpc: RpcOpt = None,
    activation: ActivationOpt = None,
    output: Annotated[
        Literal["md", "csv", "json", "jsonl"], typer.Option("-o", "--output", help="Format of the report.")
    ] = "md",
    as_json: Annotated[bool, typer.Option("--json", help="The same as -o json.")] = False,
    model_flag: ModelOpt = None,
    repo: HubOpt = None,
    offline: OfflineOpt = False,
) -> None:
    """Measure the speed against stock libllama: both in turn, in one run, on the same tokens."""
    from pinfer import bench as stage
    from pinfer.cli import ui

    if rpc is not None and compare == "dense" and not dense:
        raise typer.BadParameter(
            "a server serves one process at a time; measure one side: --compare none, or --dense", param_hint="--rpc"
        )
    n_prompt, n_gen, n_seq = parse_list(prompt, "-p"), parse_list(gen, "-n"), parse_list(sequences, "-b")
    choice = Choice(model, model_flag, repo, offline)
    path = choice.path()
    options = stage.BenchOptions(
        n_prompt=n_prompt,
        n_gen=n_gen,
        n_seq=n_seq,
        repetitions=repetitions,
        n_threads=threads,
        n_ctx=ctx,
        n_gpu_layers=n_gpu_layers,
        compare=compare,
        dense=dense,
        exact=exact,
        no_artefacts=no_artefacts,
        device=device,
        rpc=rpc,
        activation=activation,
        text=text,
    )
    ui.print_bench(stage.bench(path, options, ui.stderr_progress()), "json" if as_json else output)


@app.command()
def show(
    model: ModelArg = None,
    activation: ActivationOpt = None,
    as_json: JsonOpt = False,
    model_flag: ModelOpt = None,
    repo: HubOpt = None,
    offline: OfflineOpt = False,
) -> None:
    """Tell what a model is, what was prepared for it, and what pinfer will do with it."""
    from pinfer import show as stage
    from pinfer.cli import ui

    choice = Choice(model, model_flag, repo, offline)
    report = stage.show(choice.path(), stage.ShowOptions(activation=activation))
    ui.print_json(report.to_json()) if as_json else ui.print_show(report)
    choice.say_next(report.next)


def run_cli(args: list[str]) -> int:
    """Run one command line and return its exit code: 0, 1 for an error, 2 for wrong usage, 130 for Ctrl-C."""
    try:
        code = app(_with_flash_attn(args), prog_name="pinfer", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except typer.TyperException as error:
        return wrong_usage(error)
    except typer.Abort:
        return fail("input ended")
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return mute()
    except PinferError as error:
        return fail(str(error))
    except MemoryError:
        return fail("out of memory; close other programs, or use a smaller model, context or batch")
    except ImportError as error:
        return fail(f"a Python package is missing or broken ({error}); install pinfer again: pip install .")
    except OSError as error:
        return mute() if error.errno == errno.EPIPE else fail(describe_os_error(error))
    except Exception as error:  # the last resort: a user gets a line, a developer the traceback
        return fail(f"internal error: {type(error).__name__}: {error}; rerun with PINFER_DEBUG=1 for the traceback")


def _with_flash_attn(args: list[str]) -> list[str]:
    """llama.cpp takes a bare ``-fa`` as ``-fa on``; Typer knows no option whose value may be left out."""
    full: list[str] = []
    for i, word in enumerate(args):
        full.append(word)
        if word in ("-fa", "--flash-attn") and args[i + 1 : i + 2] not in (["on"], ["off"], ["auto"]):
            full.append("on")
    return full


def main() -> NoReturn:
    """Entry point of the ``pinfer`` command."""
    # A polite kill unwinds like an exception, so that temporary files go away; the default would leave them.
    for signum in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, _leave)
    sys.exit(run_cli(sys.argv[1:]))


def _leave(signum: int, _frame: FrameType | None) -> NoReturn:
    sys.exit(128 + signum)
