"""A checkpoint of tests/checkpoints with other settings or tensors."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file

CHECKPOINTS = Path(__file__).parents[1] / "checkpoints"


def changed_checkpoint(
    case: str, folder: Path, config: dict[str, object], change: Callable[[dict[str, NDArray[Any]]], None]
) -> Path:
    """A copy of a checkpoint in F32 with other settings and tensors."""
    copy = Path(shutil.copytree(CHECKPOINTS / case, folder / case))
    path = copy / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    tensors: dict[str, NDArray[Any]] = {}
    for file in copy.glob("*.safetensors"):
        tensors |= {name: values.astype(np.float32) for name, values in load_file(file).items()}
        file.unlink()
    (copy / "model.safetensors.index.json").unlink(missing_ok=True)
    change(tensors)
    save_file(tensors, copy / "model.safetensors")
    return copy
