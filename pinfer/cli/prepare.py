"""``pinfer prepare``: flags and report."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from pinfer.cli import ui
from pinfer.cli.formats import format_bytes, format_seconds, percent
from pinfer.cli.options import (
    ActivationOpt,
    Choice,
    JsonOpt,
    PlacedOnOpt,
    ReservedOpt,
    RpcOpt,
    ThreadsOpt,
    VramOpt,
    parse_count,
    parse_sizes,
    settings,
    use_servers,
    with_model,
)

if TYPE_CHECKING:
    from pinfer.preparation import PrepareReport


@with_model
def prepare(
    choice: Choice,
    vram: VramOpt = None,
    dataset: Annotated[
        str | None,
        typer.Option(
            "--dataset", metavar="c4|wikitext|FILE|-", help="Text to count activations on. [default: wikitext]"
        ),
    ] = None,
    n_tokens: Annotated[
        int | None,
        typer.Option(
            "--tokens",
            parser=parse_count,
            metavar="N",
            help="Tokens to count. [default: 128k, or as many as 25 minutes allow]",
        ),
    ] = None,
    n_ctx: ReservedOpt = None,
    device: PlacedOnOpt = None,
    rpc: RpcOpt = None,
    n_threads: ThreadsOpt = None,
    activation: ActivationOpt = None,
    force: Annotated[bool, typer.Option("--force", help="Make everything again.")] = False,
    as_json: JsonOpt = False,
) -> None:
    """Profile, train (where neurons can be skipped), solve and split in one go. Fresh artefacts are kept; Ctrl-C and
    start again to resume."""
    from pinfer import preparation as stage

    sizes = parse_sizes(vram, "--vram") if vram is not None else None
    path = choice.path()
    use_servers(rpc)
    options = settings(stage.PrepareOptions, {**locals(), "vram": sizes})
    report = stage.prepare(path, options, ui.stderr_progress())
    ui.print_json(report.to_json()) if as_json else print_prepare(report)
    choice.say_next("run", "-p 'Once upon a time'")


def print_prepare(report: PrepareReport) -> None:
    """What was prepared, in four lines."""
    on = f"{percent(report.hot_share)} of them on {report.device}, the rest on the CPU" if report.hot_share else "CPU"
    stages = f"{', '.join(report.done)} in {format_seconds(report.seconds)}" if report.done else "everything was fresh"
    if report.recall is None or report.candidates is None:
        what = [("experts", on)]
    else:
        named = f"names {percent(report.candidates)}, keeps {percent(report.recall)} of the activation mass"
        what = [("neurons", f"{percent(report.active)} active; {on}"), ("predictor", named)]
    ui.print_facts(
        [
            *what,
            ("artefacts", f"{format_bytes(report.n_bytes)} in {report.folder}"),
            ("done", f"{stages}; pinfer run is {report.mode}"),
        ]
    )
