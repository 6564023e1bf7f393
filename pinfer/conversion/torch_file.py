"""The tensors of a PyTorch ``.bin`` file, without PyTorch and without executing anything.

Such a file is a zip archive whose ``data.pkl`` is a pickle of a state dict and whose ``data/N`` are the storages. A
pickle is a program; the unpickler here knows the few names that a state dict is made of and refuses every other, as
PyTorch's own weights-only loading does. The storages lie uncompressed in the archive and are mapped when a tensor is
read.
"""

from __future__ import annotations

import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from pinfer.errors import PinferError

if TYPE_CHECKING:
    from numpy.typing import NDArray

_AGAIN = "download the checkpoint again"
_STORAGES = {
    "DoubleStorage": ("F64", "<f8", 8),
    "FloatStorage": ("F32", "<f4", 4),
    "HalfStorage": ("F16", "<f2", 2),
    "BFloat16Storage": ("BF16", "bfloat16", 2),
    "LongStorage": ("I64", "<i8", 8),
    "IntStorage": ("I32", "<i4", 4),
    "ShortStorage": ("I16", "<i2", 2),
    "CharStorage": ("I8", "i1", 1),
    "ByteStorage": ("U8", "u1", 1),
    "BoolStorage": ("BOOL", "u1", 1),
}
_TENSOR_CLASSES = (("torch", "Tensor"), ("torch.nn.parameter", "Parameter"))
_LOCAL_HEADER = 30
"""bytes of a zip's local file header before the name"""


@dataclass(frozen=True)
class _Storage:
    """A run of numbers in the archive, still on disk."""

    kind: str
    key: str
    n_elements: int


@dataclass(frozen=True)
class TorchTensor:
    """One tensor of the state dict: a strided view of a storage."""

    storage: _Storage
    offset: int
    """elements"""
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    """elements"""

    @property
    def dtype(self) -> str:
        """As safetensors spells it."""
        return _STORAGES[self.storage.kind][0]


@dataclass(frozen=True)
class TorchFile:
    """A ``.bin`` file whose pickle has been read and whose tensors are known to lie whole in it."""

    path: Path
    tensors: Mapping[str, TorchTensor]
    _places: Mapping[str, tuple[int, int]]
    """offset and size in bytes of each storage"""

    def read(self, name: str) -> NDArray[Any]:
        """The tensor, of its own type, mapped from the file."""
        import ml_dtypes
        import numpy as np

        tensor = self.tensors[name]
        _, code, item = _STORAGES[tensor.storage.kind]
        dtype = np.dtype(ml_dtypes.bfloat16) if code == "bfloat16" else np.dtype(code)
        start, size = self._places[tensor.storage.key]
        flat = np.memmap(self.path, dtype, "r", start, (size // item,))
        strides = tuple(step * item for step in tensor.strides)
        return np.lib.stride_tricks.as_strided(flat[tensor.offset :], tensor.shape, strides, writeable=False)


class _Refused(Exception):
    """The pickle asks for something that no state dict is made of."""


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> TorchTensor:
    numbers = (offset, *shape, *strides)
    if not isinstance(storage, _Storage) or len(shape) != len(strides):
        raise _Refused("a tensor without a storage")
    if not all(isinstance(n, int) and n >= 0 for n in numbers):
        raise _Refused("a tensor of a shape that makes no sense")
    return TorchTensor(storage, offset, tuple(shape), tuple(strides))


def _rebuild_parameter(data: Any, *_: Any) -> Any:
    return data


def _rebuild_from_type(rebuild: Any, _type: Any, args: Any, _state: Any) -> Any:
    if rebuild not in (_rebuild_tensor, _rebuild_parameter):
        raise _Refused(f"{rebuild}")
    return rebuild(*args)


class _Unpickler(pickle.Unpickler):
    """Knows dicts and tensors, and nothing that could be called to do harm."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file, encoding="utf-8")

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch._utils" and name in ("_rebuild_tensor_v2", "_rebuild_tensor"):
            return _rebuild_tensor
        if (module, name) == ("torch._utils", "_rebuild_parameter"):
            return _rebuild_parameter
        if (module, name) == ("torch._tensor", "_rebuild_from_type_v2"):
            return _rebuild_from_type
        if (module == "torch" and name in _STORAGES) or (module, name) in _TENSOR_CLASSES:
            return name  # a string stands for the class: it cannot be called
        raise _Refused(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> _Storage:
        if not isinstance(pid, Sequence) or len(pid) != 5 or pid[0] != "storage" or pid[1] not in _STORAGES:
            raise _Refused(f"the reference {str(pid)[:60]}")
        return _Storage(str(pid[1]), str(pid[2]), int(pid[4]))


def open_torch_file(path: Path) -> TorchFile:
    """Reads the table of tensors. Raises PinferError for a damaged file and for a pickle that is more than weights."""
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as raw:
            members = {info.filename: info for info in archive.infolist()}
            index = next((name for name in members if name.endswith("/data.pkl") or name == "data.pkl"), None)
            if index is None:
                raise PinferError(f"{path} is no PyTorch checkpoint: it holds no data.pkl", _AGAIN)
            with archive.open(index) as pickled:
                state = _Unpickler(pickled).load()
            prefix = index.removesuffix("data.pkl") + "data/"
            places = {
                name.removeprefix(prefix): (_data_offset(raw, info), info.file_size)
                for name, info in members.items()
                if name.startswith(prefix) and info.compress_type == zipfile.ZIP_STORED
            }
    except PinferError:
        raise
    except _Refused as refused:
        raise PinferError(
            f"{path} wants to run {refused} when it is loaded; nothing of it was run",
            "get the model's safetensors, which cannot hold code",
        ) from None
    except zipfile.BadZipFile:
        raise PinferError(*_not_a_zip(path)) from None
    except OSError as error:
        raise PinferError(f"{path} cannot be read: {error.strerror or error}", _AGAIN) from None
    except Exception as error:  # whatever a damaged pickle makes the unpickler raise
        raise PinferError(f"{path} is damaged: {str(error)[:80] or type(error).__name__}", _AGAIN) from None
    if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
        state = state["state_dict"]
    if not isinstance(state, dict):
        raise PinferError(f"{path} holds no state dict", _AGAIN)
    tensors = {str(name): value for name, value in state.items() if isinstance(value, TorchTensor)}
    for name, tensor in tensors.items():
        _check_inside(path, name, tensor, places)
    return TorchFile(path, tensors, places)


def _not_a_zip(path: Path) -> tuple[str, str]:
    with path.open("rb") as file:
        head = file.read(64)
    if head.startswith(b"version https://git-lfs"):
        return f"{path} is a pointer of git-lfs, not the weights", "run: git lfs pull"
    if head[:1] == b"\x80":
        return (
            f"{path} is a PyTorch file of the old format or cut off",
            "get the model's safetensors, or save it again with PyTorch 1.6 or newer",
        )
    return f"{path} is damaged: it is no PyTorch archive", _AGAIN


def _data_offset(file: IO[bytes], info: zipfile.ZipInfo) -> int:
    """Where a member's bytes begin: behind its local header, whose extra field the directory does not tell."""
    file.seek(info.header_offset)
    header = file.read(_LOCAL_HEADER)
    return (
        info.header_offset
        + _LOCAL_HEADER
        + int.from_bytes(header[26:28], "little")
        + int.from_bytes(header[28:30], "little")
    )


def _check_inside(path: Path, name: str, tensor: TorchTensor, places: Mapping[str, tuple[int, int]]) -> None:
    item = _STORAGES[tensor.storage.kind][2]
    start, size = places.get(tensor.storage.key, (0, -1))
    last = tensor.offset + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.strides, strict=True))
    is_empty = 0 in tensor.shape
    if size < 0 or start + size > path.stat().st_size or (not is_empty and (last + 1) * item > size):
        raise PinferError(f"{path} is damaged: {name} does not lie in it whole", _AGAIN)
