"""Where the artefacts of a model lie: ``MODEL.pinfer/`` beside it, or under ``$PINFER_HOME``."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from pinfer.errors import PinferError

PROFILE = "profile.gguf"
SAMPLES = "samples/samples.gguf"
PREDICTOR = "predictor.gguf"
PLACEMENT = "placement.gguf"
HOT = "hot.gguf"
COLD = "cold.gguf"


def pinfer_home() -> Path:
    """``$PINFER_HOME``, else the user's data folder (``$XDG_DATA_HOME/pinfer``, ``~/.local/share/pinfer``)."""
    if home := os.environ.get("PINFER_HOME"):
        return Path(home).expanduser()
    data = os.environ.get("XDG_DATA_HOME")
    return (Path(data) if data else Path.home() / ".local" / "share") / "pinfer"


def _candidates(model_path: Path, fingerprint: str) -> tuple[Path, Path]:
    model_path = model_path.resolve()
    beside = model_path.with_name(model_path.name + ".pinfer")
    return beside, pinfer_home() / f"{model_path.name}-{fingerprint[:12]}"


def _is_writable(folder: Path) -> bool:
    """Whether files could be made in ``folder``, as far as can be told without making one."""
    if folder.is_dir():
        return os.access(folder, os.W_OK | os.X_OK)
    return not folder.exists() and folder.parent.is_dir() and os.access(folder.parent, os.W_OK | os.X_OK)


def _try_to_write(folder: Path) -> str:
    """Makes the folder and a file in it, for permissions alone do not tell; returns the cause where that fails."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return ""
    except OSError as error:
        return error.strerror or str(error)


def artefact_dir(model_path: Path, fingerprint: str, *, for_writing: bool) -> Path:
    """The folder of a model's artefacts; made if ``for_writing``.

    For reading, the folder that a writer would take comes first, so that what was written last is found; the other one
    is taken when only it exists. Raises PinferError when neither place can be written.
    """
    beside, home = _candidates(model_path, fingerprint)
    if not for_writing:
        first, second = (beside, home) if _is_writable(beside) else (home, beside)
        return second if second.is_dir() and not first.is_dir() else first
    cause = _try_to_write(beside)
    if not cause:
        return beside
    home_cause = _try_to_write(home)
    if not home_cause:
        return home
    raise PinferError(
        f"cannot write to {beside} ({cause}) nor to {home} ({home_cause})",
        "name a folder that can be written: export PINFER_HOME=FOLDER",
    )
