"""Finds the artefacts of a model: ``MODEL.pinfer/`` beside it, or a folder under ``$PINFER_HOME``.

native/plugin/automatic.cpp looks for them by the same rules.
"""

from __future__ import annotations

import fcntl
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import platformdirs

from pinfer.errors import PinferError
from pinfer.gguf_io.part_names import part_name
from pinfer.progress import NULL_PROGRESS, Progress

if TYPE_CHECKING:
    from pinfer.model import Model  # numpy, which `pinfer --help` does not wait for

PROFILE = "profile.gguf"
SAMPLES = "samples/samples.gguf"
PREDICTOR = "predictor.gguf"
PLACEMENT = "placement.gguf"
HOT = "hot.gguf"
COLD = "cold.gguf"
_LOCK = ".lock"

# In the hub's shared cache a model is a link to a file named by its hash.
_HUB_BLOB = re.compile(r"[0-9a-f]{40,}")


def pinfer_home() -> Path:
    """``$PINFER_HOME``, else the user's data folder (``$XDG_DATA_HOME/pinfer``, ``~/.local/share/pinfer``)."""
    home = os.environ.get("PINFER_HOME")
    return Path(home).expanduser() if home else platformdirs.user_data_path("pinfer")


def _candidates(model_path: Path, fingerprint: str) -> tuple[Path, ...]:
    """Folders that may hold the artefacts; the first is preferred for writing.

    For a model in several files MODEL is its name without the number of a part.
    Users empty the hub's cache, so artefacts that took hours to make are kept elsewhere.
    """
    model_path = model_path.resolve()
    digits = fingerprint[:12]
    if _HUB_BLOB.fullmatch(model_path.name):
        return (pinfer_home() / f"hub-{digits}",)
    part = part_name(model_path.name)
    name = part.whole if part else model_path.name
    return model_path.with_name(f"{name}.pinfer"), pinfer_home() / f"{name}-{digits}"


def _is_writable(folder: Path) -> bool:
    """Whether ``folder`` looks writable; nothing is created to find out."""
    if folder.is_dir():
        return os.access(folder, os.W_OK | os.X_OK)
    return not folder.exists() and folder.parent.is_dir() and os.access(folder.parent, os.W_OK | os.X_OK)


def _try_to_write(folder: Path) -> str:
    """Creates the folder and a file in it, since permissions do not tell all; returns the cause of a failure."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return ""
    except OSError as error:
        return error.strerror or str(error)


def artefact_dir(model_path: Path, fingerprint: str, *, for_writing: bool) -> Path:
    """The folder of a model's artefacts; created if ``for_writing``.

    Reading prefers the folder that writing would use, where the newest artefacts are, and uses the other one if only
    that exists. Raises PinferError if neither can be written.
    """
    places = _candidates(model_path, fingerprint)
    if not for_writing:
        ordered = places if _is_writable(places[0]) else places[::-1]
        return next((place for place in ordered if place.is_dir()), ordered[0])
    causes = []
    for place in places:
        cause = _try_to_write(place)
        if not cause:
            return place
        causes.append(f"{place} ({cause})")
    raise PinferError(f"cannot write to {' nor to '.join(causes)}", "name a writable folder: export PINFER_HOME=FOLDER")


@contextmanager
def writing_to(model: Model, progress: Progress = NULL_PROGRESS) -> Iterator[Path]:
    """The folder of a model's artefacts, which no other command writes to within the block.

    The lock goes with its process, however that ends. Raises PinferError while another command holds it.
    """
    folder = artefact_dir(model.path, model.fingerprint, for_writing=True)
    if model.path.is_symlink() and folder.parent == model.path.resolve().parent != model.path.absolute().parent:
        progress.note(f"{model.path} is a link: writing to {folder}, beside the file it names")
    hint = "name another folder: export PINFER_HOME=FOLDER"
    try:
        file = open(folder / _LOCK, "w")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise PinferError(f"cannot write to {folder}: {error.strerror or error}", hint) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PinferError(
                f"another pinfer command is writing to {folder}", "wait until it has finished, then run this again"
            ) from None
        except OSError as error:
            raise PinferError(f"cannot lock {folder}: {error.strerror or error}", hint) from None
        yield folder
