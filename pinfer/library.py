"""The models that have artefacts (`pinfer list`), and the removal of their artefacts (`pinfer rm`)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pinfer.artefacts import paths
from pinfer.errors import PinferError
from pinfer.gguf_io.reader import GgufError, read_gguf
from pinfer.model import open_model
from pinfer.show import ABSENT, FITS, artefact_states

FRESH, STALE, ORPHANED = "fresh", "stale", "orphaned"

_OWN = re.compile(r"(profile|predictor|placement|cold|hot(-\d+)?|samples/samples)\.gguf")
"""artefacts by their path in the folder; nothing else is ever removed"""


@dataclass(frozen=True)
class PreparedModel:
    """A folder of artefacts and the model it belongs to."""

    name: str
    model: Path | None
    """None if the model was not found"""
    folder: Path
    n_bytes: int
    """of the artefacts"""
    kinds: tuple[str, ...]
    state: str
    """``fresh``, ``stale`` (something has to be made again) or ``orphaned`` (the model was not found)"""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        model = str(self.model) if self.model else None
        return {**asdict(self), "model": model, "folder": str(self.folder)}


def prepared_models(here: Path) -> list[PreparedModel]:
    """Artefacts of models in ``here``, of the last model used in each folder, and all under ``$PINFER_HOME``."""
    folders: dict[Path, Path | None] = {}
    for path in dict.fromkeys(_known_models(here)):
        with suppress(PinferError):
            folders.setdefault(_folder(path), path)
    for folder in (*sorted(here.glob("*.gguf.pinfer")), *sorted(paths.pinfer_home().glob("*-*"))):
        folders.setdefault(folder.resolve(), None)
    return [_describe(folder, model) for folder, model in folders.items() if artefact_files(folder)]


def artefacts_of(model_path: Path) -> tuple[Path, ...]:
    """The artefacts of a model. Raises PinferError if there are none."""
    files = artefact_files(_folder(model_path))
    if not files:
        raise PinferError(f"{model_path.name} has no artefacts", "see which models have: pinfer list")
    return files


def remove_artefacts(model_path: Path) -> None:
    """Delete the artefacts of a model, never the model. Raises PinferError if there are none."""
    for file in artefacts_of(model_path):
        file.unlink()
    folder = _folder(model_path)
    for empty in (folder / "samples", folder):
        with suppress(OSError):  # not there, or it holds something else
            empty.rmdir()


def artefact_files(folder: Path) -> tuple[Path, ...]:
    """The artefacts in a folder."""
    found = folder.rglob("*.gguf") if folder.is_dir() else ()
    return tuple(sorted(file for file in found if _OWN.fullmatch(file.relative_to(folder).as_posix())))


def _folder(path: Path) -> Path:
    model = open_model(path)
    return paths.artefact_dir(model.path, model.fingerprint, for_writing=False).resolve()


def _known_models(here: Path) -> Iterator[Path]:
    """GGUFs in ``here``, and the last model of every folder that pinfer was used in."""
    yield from sorted(path.absolute() for path in here.glob("*.gguf"))
    for note in sorted((paths.pinfer_home() / "last-model").glob("*")):
        with suppress(OSError, ValueError):
            path = Path(note.read_text(encoding="utf-8").rstrip("\n"))
            if path.is_file():
                yield path


def _describe(folder: Path, path: Path | None) -> PreparedModel:
    files = artefact_files(folder)
    n_bytes = sum(file.stat().st_size for file in files)
    kinds = tuple(file.stem for file in files)
    if path is None:
        return PreparedModel(_made_from(files[0]) or folder.name, None, folder, n_bytes, kinds, ORPHANED)
    states = artefact_states(open_model(path), folder)
    fits = all(state.state in (FITS, ABSENT) for state in states)
    return PreparedModel(path.name, path, folder, n_bytes, kinds, FRESH if fits else STALE)


def _made_from(file: Path) -> str | None:
    try:
        name = read_gguf(file).get("pinfer.model.name")
    except (GgufError, OSError):
        return None
    return name if isinstance(name, str) else None
