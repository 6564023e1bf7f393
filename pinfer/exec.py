"""``pinfer exec``: starts a program of llama.cpp with the plugin preloaded."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from shutil import which
from typing import NoReturn

from pinfer.errors import PinferError
from pinfer.llama.plugin import plugin_path


def guest_environment(
    *,
    model: Path | None = None,
    artefacts: Path | None = None,
    activation: str | None = None,
    device: str | None = None,
    environment: Mapping[str, str] = os.environ,
) -> dict[str, str]:
    """``environment`` with the plugin preloaded and the settings that were given; the plugin itself checks them."""
    before = environment.get("LD_PRELOAD")
    settings = {
        "LD_PRELOAD": f"{plugin_path()}:{before}" if before else str(plugin_path()),
        "PINFER_MODEL": None if model is None else str(model),
        "PINFER_ARTEFACTS": None if artefacts is None else str(artefacts),
        "PINFER_ACTIVATION": activation,
        "PINFER_DEVICE": device,
    }
    return {**environment, **{name: value for name, value in settings.items() if value is not None}}


def execute(command: Sequence[str], environment: Mapping[str, str]) -> NoReturn:
    """Becomes ``command``. Raises PinferError where it cannot be started."""
    program = which(command[0], path=environment.get("PATH"))
    if program is None:
        raise PinferError(f"there is no program {command[0]}", "name one of llama.cpp, like llama-server, or its path")
    try:
        os.execve(program, list(command), dict(environment))
    except OSError as error:
        raise PinferError(f"cannot start {program}: {error.strerror or error}") from error
