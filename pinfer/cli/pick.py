"""Chooses the model of a command if MODEL is left out.

In this order: MODEL as typed, ``$PINFER_MODEL``, the model of the last command in this folder, the only GGUF here.
The last model of a folder is recorded under ``pinfer_home()``, so no file is added to the user's folder.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from pinfer.artefacts.paths import pinfer_home
from pinfer.errors import PinferError
from pinfer.gguf_io.part_names import part_name

NAME_IT = "pass one: pinfer COMMAND model.gguf (or set PINFER_MODEL)"
_GGUF_MAGIC = b"GGUF"


@dataclass(frozen=True)
class Pick:
    """The model of a command. ``why`` tells how it was found; empty if the user typed it."""

    path: Path
    why: str = ""


def pick_model(given: Path | None, folder: Path | None = None) -> Pick:
    """The model for a command started in ``folder`` (default: the current one).

    Raises PinferError if nothing was given and the choice is not clear, or if ``$PINFER_MODEL`` does not exist.
    A path the user typed is returned unchecked: opening it gives the better error.
    """
    here = (folder or Path.cwd()).resolve()
    if given is not None:
        return Pick(given)
    if named := os.environ.get("PINFER_MODEL"):
        variable = Path(named).expanduser()
        if not variable.exists():
            raise PinferError(f"PINFER_MODEL names {named}, which does not exist", "set it to a GGUF or pass MODEL")
        return Pick(variable, "$PINFER_MODEL")
    if (last := recall(here)) is not None:
        path = last.relative_to(here) if last.is_relative_to(here) else last
        return Pick(path, "the last one used in this folder")
    found = _models_in(here)
    if len(found) == 1:
        return Pick(Path(found[0].name), "the only GGUF in this folder")
    if found:
        names = ", ".join(path.name for path in found[:4]) + (", …" if len(found) > 4 else "")
        raise PinferError(f"{len(found)} GGUF models in this folder ({names})", NAME_IT)
    raise PinferError("no GGUF model in this folder", NAME_IT)


def remember(model: Path, folder: Path | None = None) -> None:
    """Keep ``model`` as the last one of ``folder``. A convenience: if it cannot be written, nothing is kept."""
    try:
        here = (folder or Path.cwd()).resolve()
        note = _note_of(here)
        # The name of a link, not of its target: in the hub's cache the target is named by a hash.
        text = f"{model.parent.resolve() / model.name}\n"
        if note.exists() and note.read_text(encoding="utf-8") == text:
            return
        note.parent.mkdir(parents=True, exist_ok=True)
        part = note.with_name(f"{note.name}.{os.getpid()}")
        try:
            part.write_text(text, encoding="utf-8")
            part.replace(note)
        finally:
            part.unlink(missing_ok=True)
    except (OSError, RuntimeError, ValueError):
        return


def recall(folder: Path) -> Path | None:
    """The model of the last command in ``folder``; None if there is none or it is gone."""
    try:
        path = Path(_note_of(folder).read_text(encoding="utf-8").rstrip("\n"))
        return path if path.is_absolute() and path.is_file() else None
    except (OSError, RuntimeError, ValueError):
        return None


def is_gguf(path: Path) -> bool:
    """Whether the file begins like a GGUF."""
    try:
        with path.open("rb") as file:
            return file.read(len(_GGUF_MAGIC)) == _GGUF_MAGIC
    except (OSError, ValueError):
        return False


def _note_of(folder: Path) -> Path:
    return pinfer_home() / "last-model" / hashlib.sha256(os.fsencode(folder)).hexdigest()[:24]


def _models_in(folder: Path) -> list[Path]:
    """GGUF models directly in ``folder``, by their first parts, without artefacts and projectors of vision models."""
    if folder.suffix == ".pinfer":
        return []
    try:
        candidates = sorted(folder.glob("*.gguf"))
    except OSError:
        return []
    return [path for path in candidates if path.is_file() and _is_model_name(path.name)]


def _is_model_name(name: str) -> bool:
    part = part_name(name)
    return not name.startswith("mmproj") and (part is None or part.number == 1)
