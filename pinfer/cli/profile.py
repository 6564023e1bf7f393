"""``pinfer profile``: flags and report."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from pinfer.cli import ui
from pinfer.cli.formats import ffn_label, percent
from pinfer.cli.options import (
    ActivationOpt,
    Choice,
    DatasetOpt,
    JsonOpt,
    ThreadsOpt,
    WindowOpt,
    layers_option,
    parse_count,
    settings,
    with_model,
)

if TYPE_CHECKING:
    from pinfer.profile import ProfileReport


@with_model
def profile(
    choice: Choice,
    dataset: DatasetOpt = "wikitext",
    n_tokens: Annotated[
        int,
        typer.Option(
            "--tokens", parser=parse_count, metavar="N", help="Tokens to count. [default: 128k]", show_default=False
        ),
    ] = 131072,
    n_ctx: WindowOpt = 0,
    n_samples: Annotated[
        int | None,
        typer.Option("--samples", min=0, metavar="N", help="FFN inputs to keep per layer. [default: up to 1 GiB]"),
    ] = None,
    n_threads: ThreadsOpt = None,
    n_gpu_layers: Annotated[int, layers_option("Layers on the GPU. [default: 0]")] = 0,
    activation: ActivationOpt = None,
    force: Annotated[
        bool, typer.Option("--force", help="Profile even if the perplexity contradicts the activation.")
    ] = False,
    as_json: JsonOpt = False,
) -> None:
    """Count which neurons fire on a text, or which experts are used, and keep samples for `train`. Ctrl-C keeps what
    has been counted."""
    from pinfer import profile as stage

    path = choice.path()
    report = stage.profile(path, settings(stage.ProfileOptions, locals()), ui.stderr_progress())
    ui.print_json(report.to_json()) if as_json else print_profile(report)
    choice.say_next("solve" if report.whole_experts else "train")
    if report.interrupted:
        raise typer.Exit(130)


def print_profile(report: ProfileReport) -> None:
    """Print the share of active neurons per layer, and of those that make most activations."""
    rows = [
        (ffn_label(layer.layer, layer.kind), percent(layer.active), percent(layer.most), percent(layer.never))
        for layer in report.layers
    ]
    rows.append(("whole model", percent(report.active), percent(report.most), percent(report.never)))
    title = f"{report.tokens:,} tokens of {report.corpus}"
    if report.interrupted:
        title += f", stopped before {report.tokens_wanted:,}"
    if not report.whole_experts:
        ui.print_table(title, ("layer", "active", "make 80 %", "never active"), rows)
    routed = [(layer.layer, layer.routed) for layer in report.layers if layer.routed]
    if routed:
        table = [
            (str(layer), f"{r.n_experts:,}", percent(r.most), f"{r.busiest:.1f}x", f"{r.never:,}")
            for layer, r in routed
        ]
        ui.print_table(
            title if report.whole_experts else "routing",
            ("layer", "experts", "take 80 %", "busiest", "never routed"),
            table,
        )
    ui.print_paths(report.path, report.samples_path)
