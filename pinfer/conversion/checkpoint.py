"""A Hugging Face checkpoint folder: config.json and the weights, which load one tensor at a time.

Weights are safetensors files or PyTorch's ``.bin`` files, whole or in shards with an index. Nothing in a checkpoint is
ever executed: no remote code, and from a pickle only the tensors are read (torch_file.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from math import prod
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy)
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from pinfer.conversion.hints import DOWNLOAD_AGAIN
from pinfer.conversion.torch_file import open_torch_file
from pinfer.errors import PinferError

FLOAT_TYPES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""bytes of one value"""
_WEIGHTS = {"model.safetensors": "*.safetensors", "pytorch_model.bin": "*.bin"}
"""file of whole weights, and the pattern of its shards; the index is the first with .index.json"""


def read_object(path: Path) -> dict[str, Any] | None:
    """A JSON file that holds an object; None where there is no file. Raises PinferError if it is damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise PinferError(f"{path} cannot be read: {error.strerror or error}", "check its permissions") from None
    except (ValueError, RecursionError):
        raise PinferError(f"{path} is damaged: it is not valid JSON", DOWNLOAD_AGAIN) from None
    if not isinstance(found, dict):
        raise PinferError(f"{path} is damaged: it holds {_JSON_KINDS[type(found)]}, not an object", DOWNLOAD_AGAIN)
    return found


_JSON_KINDS = {
    list: "a list",
    str: "a string",
    int: "a number",
    float: "a number",
    bool: "a boolean",
    type(None): "null",
}


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
        return FLOAT_TYPES.get(self.dtype, 0) * prod(self.shape)

    def load(self) -> NDArray[Any]:
        """The values in their own floating-point type. Raises PinferError for any other type."""
        if self.dtype not in FLOAT_TYPES:
            raise PinferError(
                f"{self.name} in {self.file.name} is stored as {self.dtype}, which is not plain floating point",
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
        """``model_type`` of config.json; where it is missing (MiniCPM-S), from the name of the model's class."""
        named = self.config.get("model_type")
        return named if isinstance(named, str) else self.architecture.removesuffix("ForCausalLM").lower()

    @property
    def architecture(self) -> str:
        """Name of the model's class; ``""`` where config.json has none."""
        named = self.config.get("architectures")
        return str(named[0]) if isinstance(named, list) and named else ""

    @cached_property
    def tensors(self) -> Mapping[str, CheckpointTensor]:
        """Every tensor by its name in the checkpoint, each known to lie whole in its file.

        Raises PinferError for weights that are missing, damaged or would have to be executed.
        """
        return _open_weights(self.folder)

    def integer(self, *keys: str, default: int | None = None, among: Mapping[str, Any] | None = None) -> int:
        """A positive integer below 2³¹ of config.json, under the first of ``keys`` that is there.

        ``among`` is an object inside config.json to look in instead. Raises PinferError for anything else, and where
        there is neither a value nor a default.
        """
        value = self._value(keys, default, among)
        if isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 31:
            return value
        raise self._invalid(keys[0], value)

    def number(
        self,
        *keys: str,
        default: float | None = None,
        among: Mapping[str, Any] | None = None,
        zero: bool = False,
    ) -> float:
        """Like ``integer``, for a finite number above 0, or from 0 on with ``zero``."""
        value = self._value(keys, default, among)
        if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < 1e30 and (zero or value):
            return float(value)
        raise self._invalid(keys[0], value)

    def flag(self, key: str, default: bool) -> bool:
        """A boolean of config.json."""
        value = self._value((key,), default, None)
        if isinstance(value, bool):
            return value
        raise self._invalid(key, value)

    def _value(self, keys: tuple[str, ...], default: object, among: Mapping[str, Any] | None) -> Any:
        given = self.config if among is None else among
        value = next((given[key] for key in keys if given.get(key) is not None), default)
        if value is None:
            raise PinferError(f"config.json of {self.folder} has no {keys[0]}", DOWNLOAD_AGAIN)
        return value

    def _invalid(self, key: str, value: object) -> PinferError:
        return PinferError(
            f"config.json of {self.folder} has {key} = {str(value)[:40]}, which is not valid", DOWNLOAD_AGAIN
        )


def is_checkpoint(path: Path) -> bool:
    """Whether this is a folder with a config.json."""
    return path.is_dir() and (path / "config.json").exists()


def open_checkpoint(folder: Path) -> Checkpoint:
    """Reads config.json. Raises PinferError if it is missing or damaged, or if the weights are already quantised."""
    config = read_object(folder / "config.json")
    if config is None:
        raise PinferError(f"{folder} has no config.json", "name the folder of a Hugging Face checkpoint")
    method = config.get("quantization_config") or config.get("compression_config")
    if method:
        kind = method.get("quant_method", "unknown method") if isinstance(method, dict) else method
        raise PinferError(
            f"{folder} is already quantised ({kind})", "get the F32, F16 or BF16 checkpoint; convert quantises itself"
        )
    checkpoint = Checkpoint(folder, config)
    if not checkpoint.model_type:
        raise PinferError(f"{folder / 'config.json'} has no model_type", DOWNLOAD_AGAIN)
    return checkpoint


def _open_weights(folder: Path) -> dict[str, CheckpointTensor]:
    """The tensors of safetensors files if there are any, else of .bin files."""
    for whole, pattern in _WEIGHTS.items():
        index = folder / f"{whole}.index.json"
        if index.exists():
            return _open_indexed(folder, index)
        if (folder / whole).exists():
            return _open_file(folder / whole)
        files = sorted(folder.glob(pattern))
        if len(files) == 1 and files[0].suffix == ".safetensors":
            return _open_file(files[0])
        if any("-of-" in path.name for path in files):
            raise PinferError(f"{folder} has shards of weights but no {index.name}", DOWNLOAD_AGAIN)
    raise PinferError(f"{folder} has no weights ({' or '.join(_WEIGHTS)})", DOWNLOAD_AGAIN)


def _open_indexed(folder: Path, index: Path) -> dict[str, CheckpointTensor]:
    weight_map = (read_object(index) or {}).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise PinferError(f"{index} has no weight_map", DOWNLOAD_AGAIN)
    files = sorted(set(weight_map.values()))
    missing = [name for name in files if Path(name).name != name or not (folder / name).is_file()]
    if missing:
        raise PinferError(
            f"{folder} lacks {len(missing)} of {len(files)} shards: {', '.join(missing[:3])}"
            f"{', …' if len(missing) > 3 else ''}",
            DOWNLOAD_AGAIN,
        )
    found = {name: _open_file(folder / name) for name in files}
    for tensor, file in weight_map.items():
        if tensor not in found[file]:
            raise PinferError(f"{folder / file} does not hold {tensor}, as {index.name} says", DOWNLOAD_AGAIN)
    return {tensor: found[file][tensor] for tensor, file in weight_map.items()}


def _open_file(path: Path) -> dict[str, CheckpointTensor]:
    return _open_safetensors(path) if path.suffix == ".safetensors" else _open_bin(path)


def _open_safetensors(path: Path) -> dict[str, CheckpointTensor]:
    def read(name: str) -> NDArray[Any]:
        with safe_open(path, "numpy") as file:  # opened again each time, so that no mapping outlives its tensor
            return file.get_tensor(name)  # type: ignore[no-any-return]

    try:
        with safe_open(path, "numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return {
                name: CheckpointTensor(name, tuple(part.get_shape()), part.get_dtype(), path, partial(read, name))
                for name, part in slices.items()
            }
    except SafetensorError as error:
        cause = "it is cut off" if "not fully covered" in str(error) else str(error).rpartition(": ")[2]
        raise PinferError(f"{path} is damaged: {cause}", DOWNLOAD_AGAIN) from None
    except OSError as error:
        raise PinferError(f"{path} cannot be read: {error.strerror or error}", DOWNLOAD_AGAIN) from None


def _open_bin(path: Path) -> dict[str, CheckpointTensor]:
    file = open_torch_file(path)
    return {
        name: CheckpointTensor(name, entry.shape, entry.dtype, path, partial(file.read, name))
        for name, entry in file.tensors.items()
    }
