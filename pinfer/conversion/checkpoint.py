"""A Hugging Face checkpoint folder: config.json and the weights, which load one tensor at a time.

Weights lie in safetensors files or in PyTorch's ``.bin`` files, whole or in shards with an index. Nothing of a
checkpoint is ever executed: no remote code, and of a pickle only the tensors (pinfer/torch_file.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pinfer.errors import PinferError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pinfer.conversion.torch_file import TorchFile

FLOAT_TYPES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_WHOLE = ("model.safetensors", "pytorch_model.bin")
_INDEXED = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_AGAIN = "download the checkpoint again"


@dataclass(frozen=True)
class CheckpointTensor:
    """One tensor of a checkpoint; ``shape`` is the checkpoint's: the last axis is contiguous."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    """``F32``, ``F16``, ``BF16``, ... as safetensors spells it"""
    file: Path
    _read: Callable[[], NDArray[Any]] = field(repr=False)

    @property
    def n_bytes(self) -> int:
        """Bytes it takes in the checkpoint."""
        n = FLOAT_TYPES.get(self.dtype, 0)
        for extent in self.shape:
            n *= extent
        return n

    def load(self) -> NDArray[Any]:
        """The values in their own floating-point type, in memory. Raises PinferError for any other type."""
        if self.dtype not in FLOAT_TYPES:
            raise PinferError(
                f"{self.name} in {self.file.name} is stored as {self.dtype}, which is no plain floating point",
                "get the F32, F16 or BF16 checkpoint of the model",
            )
        return self._read()


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose config has been read; no weights are in memory."""

    folder: Path
    config: Mapping[str, Any]

    @property
    def model_type(self) -> str:
        """config.json's, or by the name of its class where it has none (MiniCPM-S)."""
        named = self.config.get("model_type")
        return named if isinstance(named, str) else self.architecture.removesuffix("ForCausalLM").lower()

    @property
    def architecture(self) -> str:
        """Name of the original's class, ``""`` where config.json does not say."""
        named = self.config.get("architectures")
        return str(named[0]) if isinstance(named, list) and named else ""

    @cached_property
    def tensors(self) -> Mapping[str, CheckpointTensor]:
        """Every tensor by its name in the checkpoint, each known to lie whole in its file.

        Raises PinferError for weights that are missing, damaged or would have to be executed.
        """
        return _open_weights(self.folder)

    def integer(self, *keys: str, default: int | None = None) -> int:
        """A positive number of config.json under the first of these keys that is there."""
        for key in keys:
            value = self.config.get(key)
            if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 31:
                return value
            if value is not None:
                raise PinferError(f"config.json of {self.folder} has {key} = {value!r}", _AGAIN)
        if default is None:
            raise PinferError(f"config.json of {self.folder} has no {keys[0]}", _AGAIN)
        return default

    def number(self, *keys: str, default: float | None = None) -> float:
        """A finite number of config.json under the first of these keys that is there."""
        for key in keys:
            value = self.config.get(key)
            if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e30:
                return float(value)
            if value is not None:
                raise PinferError(f"config.json of {self.folder} has {key} = {value!r}", _AGAIN)
        if default is None:
            raise PinferError(f"config.json of {self.folder} has no {keys[0]}", _AGAIN)
        return default

    def flag(self, key: str, default: bool) -> bool:
        value = self.config.get(key)
        return default if value is None else bool(value)


def is_checkpoint(path: Path) -> bool:
    """Whether this is a folder with a config.json."""
    return path.is_dir() and (path / "config.json").exists()


def open_checkpoint(folder: Path) -> Checkpoint:
    """Reads config.json. Raises PinferError where it is damaged, or says that the weights are quantised."""
    config = _read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise PinferError(f"{folder / 'config.json'} is no description of a model", _AGAIN)
    method = config.get("quantization_config") or config.get("compression_config")
    if method:
        kind = method.get("quant_method", "some method") if isinstance(method, dict) else method
        raise PinferError(
            f"{folder} is already quantised ({kind})", "get the F32, F16 or BF16 checkpoint; convert quantises itself"
        )
    checkpoint = Checkpoint(folder, config)
    if not checkpoint.model_type:
        raise PinferError(f"{folder / 'config.json'} names no model_type", _AGAIN)
    return checkpoint


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PinferError(f"{path} does not exist", "name the folder of a checkpoint, with its config.json") from None
    except (OSError, ValueError) as error:
        cause = error.strerror if isinstance(error, OSError) else "it is no JSON"
        raise PinferError(f"{path} cannot be read: {cause}", _AGAIN) from None


def _open_weights(folder: Path) -> dict[str, CheckpointTensor]:
    """The tensors of safetensors where there are any, else of .bin files."""
    for whole, index in zip(_WHOLE, _INDEXED, strict=True):
        if (folder / index).exists():
            return _open_indexed(folder, folder / index)
        if (folder / whole).exists():
            return _open_file(folder / whole)
        single = sorted(folder.glob("*" + Path(whole).suffix))
        if len(single) == 1 and single[0].suffix == ".safetensors":
            return _open_file(single[0])
        if any("-of-" in path.name for path in single):
            raise PinferError(f"{folder} has shards of weights but no {index}", _AGAIN)
    raise PinferError(f"{folder} has no weights ({' or '.join(_WHOLE)})", _AGAIN)


def _open_indexed(folder: Path, index: Path) -> dict[str, CheckpointTensor]:
    content = _read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise PinferError(f"{index} has no weight_map", _AGAIN)
    files = sorted(set(weight_map.values()))
    missing = [name for name in files if Path(name).name != name or not (folder / name).is_file()]
    if missing:
        raise PinferError(
            f"{folder} lacks {len(missing)} of {len(files)} shards: {', '.join(missing[:3])}"
            f"{', …' if len(missing) > 3 else ''}",
            _AGAIN,
        )
    found = {name: _open_file(folder / name) for name in files}
    for tensor, file in weight_map.items():
        if tensor not in found[file]:
            raise PinferError(f"{folder / file} does not hold {tensor}, as {index.name} says", _AGAIN)
    return {tensor: found[file][tensor] for tensor, file in weight_map.items()}


def _open_file(path: Path) -> dict[str, CheckpointTensor]:
    return _open_safetensors(path) if path.suffix == ".safetensors" else _open_bin(path)


def _open_safetensors(path: Path) -> dict[str, CheckpointTensor]:
    import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy)
    from safetensors import SafetensorError, safe_open

    def reader(name: str) -> Callable[[], NDArray[Any]]:
        def read() -> NDArray[Any]:
            with safe_open(path, "numpy") as file:  # opened anew, so that no mapping outlives its tensor
                return file.get_tensor(name)  # type: ignore[no-any-return]

        return read

    try:
        with safe_open(path, "numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {
                name: CheckpointTensor(name, tuple(part.get_shape()), part.get_dtype(), path, reader(name))
                for name, part in slices.items()
            }
    except SafetensorError as error:
        cause = "it is cut off" if "not fully covered" in str(error) else str(error).rpartition(": ")[2]
        raise PinferError(f"{path} is damaged: {cause}", _AGAIN) from None
    except OSError as error:
        raise PinferError(f"{path} cannot be read: {error.strerror or error}", _AGAIN) from None


def _open_bin(path: Path) -> dict[str, CheckpointTensor]:
    from pinfer.conversion.torch_file import open_torch_file

    file = open_torch_file(path)

    def reader(file: TorchFile, name: str) -> Callable[[], NDArray[Any]]:
        return lambda: file.read(name)

    return {
        name: CheckpointTensor(name, entry.shape, entry.dtype, path, reader(file, name))
        for name, entry in file.tensors.items()
    }
