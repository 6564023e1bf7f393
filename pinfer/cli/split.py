"""``pinfer split``: flags and report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pinfer.cli import ui
from pinfer.cli.formats import format_bytes
from pinfer.cli.options import ActivationOpt, Choice, JsonOpt, parse_count, settings, with_model

if TYPE_CHECKING:
    from pinfer.split import SplitReport


@with_model
def split(
    choice: Choice,
    down_type: Annotated[
        str | None,
        typer.Option("--down-type", metavar="TYPE", help="Type of the transposed down rows. [default: by the model]"),
    ] = None,
    down_kl: Annotated[
        str | None,
        typer.Option(
            "--down-kl",
            metavar="KL|auto",
            help="Choose a type for each layer's down rows, as small as the model's divergence from dense allows: up "
            "to so many nats, or twice what Q8_0 costs. Needs --text.",
        ),
    ] = None,
    text: Annotated[
        Path | None, typer.Option("--text", metavar="FILE", help="Text to measure the divergence on.")
    ] = None,
    n_tokens: Annotated[
        int,
        typer.Option(
            "--tokens", parser=parse_count, metavar="N", help="Tokens of the text. [default: 2k]", show_default=False
        ),
    ] = 2048,
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
    choice = report.down_choice
    facts = [
        ("hot neurons", f"{report.n_hot:,} ({format_bytes(report.hot_bytes)})"),
        ("cold neurons", f"{report.n_cold:,} ({format_bytes(report.cold_bytes)}{in_place})"),
        ("ordered by", report.order),
        ("down rows", ", ".join(types)),
        ("speed", f"{format_bytes((report.hot_bytes + report.cold_bytes) / max(report.seconds, 1e-9))}/s"),
        ("verified", proven if report.verified else "no (use --verify)"),
    ]
    if choice:
        facts[4:4] = [
            (
                "divergence",
                f"{choice.divergence:.1e} of {choice.bound:.1e} allowed, {choice.divergence_q8:.1e} with Q8_0",
            ),
            ("a token reads", f"{choice.row_bytes / choice.row_bytes_q8:.0%} of the down rows' bytes with Q8_0"),
        ]
    ui.print_facts(facts)
    ui.print_paths(report.hot, None if report.in_place else report.cold)
