"""``pinfer list`` and ``pinfer rm``: flags and reports."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from pinfer.cli import ui
from pinfer.cli.formats import format_bytes
from pinfer.cli.options import Choice, JsonOpt, with_model


def list_models(as_json: JsonOpt = False) -> None:
    """List the models that have artefacts: where, how large, fresh or stale."""
    from pinfer.library import prepared_models

    found = prepared_models(Path.cwd())
    if as_json:
        ui.print_json({"models": [model.to_json() for model in found]})
        return
    rows = [(m.name, m.state, format_bytes(m.n_bytes), ", ".join(m.kinds), str(m.folder)) for m in found]
    if rows:
        ui.print_table("", ("model", "state", "size", "artefacts", "folder"), rows, left=(0, 1, 3, 4))
    else:
        ui.say("no model has artefacts yet; make them with: pinfer prepare MODEL")


@with_model
def remove(
    choice: Choice,
    yes: Annotated[bool, typer.Option("-y", "--yes", help="Do not ask.")] = False,
) -> None:
    """Delete the artefacts of a model, never the model itself."""
    from pinfer.library import artefacts_of, remove_artefacts

    path = choice.path()
    files = artefacts_of(path)
    size = format_bytes(sum(file.stat().st_size for file in files))
    if not yes:
        if not sys.stdin.isatty():
            raise typer.BadParameter("there is no terminal to ask on; pass --yes", param_hint="--yes")
        typer.confirm(f"delete {len(files)} artefacts ({size}) in {files[0].parent}?", abort=True, err=True)
    remove_artefacts(path)
    ui.say(f"deleted {len(files)} artefacts of {path.name} ({size})")
