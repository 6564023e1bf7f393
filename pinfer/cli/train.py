"""``pinfer train``: flags and report."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from pinfer.cli import ui
from pinfer.cli.formats import ffn_label, format_bytes, percent
from pinfer.cli.options import ActivationOpt, Choice, JsonOpt, settings, with_model

if TYPE_CHECKING:
    from pinfer.predictors.fitting import LayerReport, TrainReport


@with_model
def train(
    choice: Choice,
    recall: Annotated[
        float, typer.Option("--recall", min=0.5, max=1.0, metavar="R", help="Share of the activation mass to keep.")
    ] = 0.995,
    max_rank: Annotated[
        int | None,
        typer.Option("--max-rank", min=1, metavar="N", help="Largest rank to try. [default: from the model's shape]"),
    ] = None,
    type: Annotated[Literal["q4_0", "q8_0", "f16"], typer.Option("--type", help="Type of the factors.")] = "q4_0",
    activation: ActivationOpt = None,
    as_json: JsonOpt = False,
) -> None:
    """Train the predictor of active neurons on the samples that `profile` kept."""
    from pinfer import train as stage

    path = choice.path()
    report = stage.train(path, settings(stage.TrainOptions, locals()), ui.stderr_progress())
    ui.print_json(report.to_json()) if as_json else print_train(report)
    choice.say_next("solve")


def print_train(report: TrainReport) -> None:
    """Print the recall and cost of each layer's predictor."""

    def kind(layer: LayerReport) -> str:
        return {"one_bit": "1 bit", "two_bit": "2 bits"}.get(layer.kind, f"rank {layer.rank}" if layer.rank else "none")

    def row(label: str, kind: str, part: LayerReport | TrainReport) -> tuple[str, ...]:
        ratio = f"{part.candidates / part.active:.2f}" if part.active > 0 else ""
        saved = f"{format_bytes(part.expected_bytes)} of {format_bytes(part.exact_bytes)}"
        shares = (percent(part.recall), percent(part.candidates), percent(part.active))
        return (label, kind, *shares, ratio, format_bytes(part.predictor_bytes), saved)

    rows = [row(ffn_label(layer.layer, layer.ffn), kind(layer), layer) for layer in report.layers]
    rows.append(row("whole model", "", report))
    columns = ("layer", "kind", "recall", "candidates", "active", "cand./active", "predictor", "read per token")
    ui.print_table(f"trained on {report.n_samples:,} tokens", columns, rows)
    ui.print_paths(report.path)
