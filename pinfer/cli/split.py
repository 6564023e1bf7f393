"""``pinfer split``: flags and report."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from pinfer.cli import ui
from pinfer.cli.formats import format_bytes
from pinfer.cli.options import ActivationOpt, Choice, JsonOpt, settings, with_model

if TYPE_CHECKING:
    from pinfer.split import SplitReport


@with_model
def split(
    choice: Choice,
    down_type: Annotated[
        str | None,
        typer.Option("--down-type", metavar="TYPE", help="Type of the transposed down rows. [default: by the model]"),
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Check that hot and cold together hold the whole model.")
    ] = False,
    activation: ActivationOpt = None,
    as_json: JsonOpt = False,
) -> None:
    """Write the hot and cold shards of the placement that `solve` made."""
    from pinfer import split as stage

    path = choice.path()
    report = stage.split(path, settings(stage.SplitOptions, locals()), ui.stderr_progress())
    ui.print_json(report.to_json()) if as_json else print_split(report)
    choice.say_next("run", "-p 'Once upon a time'")


def print_split(report: SplitReport) -> None:
    """Print the contents of the shards."""
    types = dict.fromkeys((*report.hot_down_types, *report.cold_down_types))
    in_place = ", of experts in the model itself" if report.in_place else ""
    proven = "the hot experts equal the model's" if report.in_place else "hot and cold together equal the model"
    facts = [
        ("hot neurons", f"{report.n_hot:,} ({format_bytes(report.hot_bytes)})"),
        ("cold neurons", f"{report.n_cold:,} ({format_bytes(report.cold_bytes)}{in_place})"),
        ("ordered by", report.order),
        ("down rows", ", ".join(types)),
        ("speed", f"{format_bytes((report.hot_bytes + report.cold_bytes) / max(report.seconds, 1e-9))}/s"),
        ("verified", proven if report.verified else "no (use --verify)"),
    ]
    ui.print_facts(facts)
    ui.print_paths(report.hot, None if report.in_place else report.cold)
