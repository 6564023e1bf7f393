"""``pinfer plot``: flags, and where the picture goes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pinfer.cli import ui
from pinfer.cli.options import ActivationOpt, Choice, PictureJsonOpt, PictureOpt, with_model

if TYPE_CHECKING:
    from pinfer.plotting.picture import Picture

plot = typer.Typer(
    name="plot",
    help="Draw what was measured and decided: in the terminal, or as PNG or SVG.",
    no_args_is_help=True,
    rich_markup_mode=None,
)


@plot.command()
@with_model
def profile(
    choice: Choice, activation: ActivationOpt = None, output: PictureOpt = None, as_json: PictureJsonOpt = False
) -> None:
    """Activations by share of neurons (the power law), activity by layer, and a mixture's routing."""
    from pinfer import plot as stage

    _show(stage.plot_profile(choice.path(), activation), output, as_json)


@plot.command()
@with_model
def placement(
    choice: Choice, activation: ActivationOpt = None, output: PictureOpt = None, as_json: PictureJsonOpt = False
) -> None:
    """What lies where, by layer and device, and each device's budget by part."""
    from pinfer import plot as stage

    _show(stage.plot_placement(choice.path(), activation), output, as_json)


@plot.command()
@with_model
def predictor(
    choice: Choice, activation: ActivationOpt = None, output: PictureOpt = None, as_json: PictureJsonOpt = False
) -> None:
    """Recall of the predictor against its bytes, by layer and kind."""
    from pinfer import plot as stage

    _show(stage.plot_predictor(choice.path(), activation), output, as_json)


@plot.command()
def bench(
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Records of `pinfer bench -o jsonl`.")],
    output: PictureOpt = None,
    as_json: PictureJsonOpt = False,
) -> None:
    """Speed relative to stock libllama with its spread, against the memory limit, and over commits."""
    from pinfer import plot as stage

    _show(stage.plot_bench(files), output, as_json)


@plot.command()
def trace(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Trace that PINFER_TRACE=FILE made a run write.")],
    output: PictureOpt = None,
    as_json: PictureJsonOpt = False,
) -> None:
    """Where the time of a token goes: hot, cold, copy and wait."""
    from pinfer import plot as stage

    _show(stage.plot_trace(file), output, as_json)


def _show(picture: Picture, output: Path | None, as_json: bool) -> None:
    """Write the file if one is named. Print the data, or draw on stdout if there is no file."""
    from pinfer.plotting import draw

    if output is not None:
        draw.draw_file(picture, output)
        ui.print_paths(output)
    if as_json:
        ui.print_json(picture.to_json())
    elif output is None:
        print(draw.draw_text(picture))
