"""The tensors of a PyTorch ``.bin`` file, without PyTorch and without running anything.

Such a file is a zip archive. ``data.pkl`` in it is the pickle of a state dict, and each ``data/N`` is a storage. A
pickle is a program, so the unpickler knows only the few names that a state dict needs and refuses all others, as
PyTorch's weights-only loading does. A pickle cannot change what it has built here, and everything is checked once the
whole pickle has been read. Storages are not compressed; they are mapped when a tensor is read.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import IO, Any, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from pinfer.conversion.hints import DOWNLOAD_AGAIN
from pinfer.errors import PinferError

_MAX_PICKLE = 1 << 28
"""bytes; a state dict takes about 100 bytes a tensor"""
_MAX_DIMS = 8
_STORAGES = {
    "DoubleStorage": ("F64", np.dtype("<f8")),
    "FloatStorage": ("F32", np.dtype("<f4")),
    "HalfStorage": ("F16", np.dtype("<f2")),
    "BFloat16Storage": ("BF16", np.dtype(ml_dtypes.bfloat16)),
    "LongStorage": ("I64", np.dtype("<i8")),
    "IntStorage": ("I32", np.dtype("<i4")),
    "ShortStorage": ("I16", np.dtype("<i2")),
    "CharStorage": ("I8", np.dtype("i1")),
    "ByteStorage": ("U8", np.dtype("u1")),
    "BoolStorage": ("BOOL", np.dtype("u1")),
}
"""by PyTorch's class: the type as safetensors spells it, and numpy's"""
_TENSOR_CLASSES = (("torch", "Tensor"), ("torch.nn.parameter", "Parameter"))
_LOCAL_HEADER = 30
"""bytes of a zip's local file header before the name"""


# What a pickle builds. Named tuples, because BUILD and its relatives can rewrite a dataclass, even a frozen one.
class _Storage(NamedTuple):
    """A run of numbers in the archive, still on disk, as the pickle describes it: nothing is checked yet."""

    kind: Any
    key: Any


class _View(NamedTuple):
    """A strided view of a storage, as the pickle describes it: nothing is checked yet."""

    storage: Any
    offset: Any
    shape: Any
    strides: Any


class _Rebuild(NamedTuple):
    """One of PyTorch's functions that make a tensor."""

    name: str

    def __call__(self, *args: Any) -> Any:
        match self.name, args:
            case "_rebuild_parameter", (data, *_):
                return data
            case "_rebuild_from_type_v2", (_Rebuild() as rebuild, _, tuple(inner), *_):
                return rebuild(*inner)
            case "_rebuild_tensor" | "_rebuild_tensor_v2", (storage, offset, shape, strides, *_):
                return _View(storage, offset, shape, strides)
        raise _Damaged(f"{self.name} gets arguments it cannot use")


class _StateDict(dict[Any, Any]):
    """Stands for OrderedDict. PyTorch gives a state dict attributes (``_metadata``), which are dropped."""

    __slots__ = ()

    def __setstate__(self, state: Any) -> None:
        pass


class _Refused(Exception):
    """The pickle asks for something that no state dict is made of."""


class _Damaged(Exception):
    """The pickle describes something impossible."""


@dataclass(frozen=True)
class TorchTensor:
    """One tensor of the state dict, known to lie whole in the file."""

    dtype: str
    """as safetensors spells it"""
    numpy_dtype: np.dtype[Any]
    begin: int
    """byte of the file at which element ``[0, ...]`` lies"""
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    """elements, none negative"""

    @property
    def n_span(self) -> int:
        """Elements from the first to the last in the file."""
        return 1 + sum((n - 1) * step for n, step in zip(self.shape, self.strides, strict=True))


@dataclass(frozen=True)
class TorchFile:
    """A ``.bin`` file whose pickle has been read and whose tensors are known to lie whole in it."""

    path: Path
    tensors: Mapping[str, TorchTensor]

    def read(self, name: str) -> NDArray[Any]:
        """The tensor in its own type, mapped from the file, read-only."""
        tensor = self.tensors[name]
        if 0 in tensor.shape:
            return np.empty(tensor.shape, tensor.numpy_dtype)
        flat = np.memmap(self.path, tensor.numpy_dtype, "r", tensor.begin, (tensor.n_span,))
        strides = tuple(step * tensor.numpy_dtype.itemsize for step in tensor.strides)
        return np.lib.stride_tricks.as_strided(flat, tensor.shape, strides, writeable=False)


class _Unpickler(pickle.Unpickler):
    """Knows dicts and tensors, and nothing that could be called to do harm."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__(file, encoding="utf-8")

    def find_class(self, module: str, name: str) -> Any:
        match module, name:
            case "collections", "OrderedDict":
                return _StateDict
            case ("torch._utils", "_rebuild_tensor" | "_rebuild_tensor_v2" | "_rebuild_parameter") | (
                "torch._tensor",
                "_rebuild_from_type_v2",
            ):
                return _Rebuild(name)
            case ("torch", "Tensor") | ("torch.nn.parameter", "Parameter"):
                return name  # a string stands for the class: it cannot be called
            case "torch", _ if name in _STORAGES:
                return name
        raise _Refused(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> _Storage:
        match pid:
            case ("storage", kind, key, *_):
                return _Storage(kind, key)
        raise _Refused(f"the reference {str(pid)[:60]}")


def open_torch_file(path: Path) -> TorchFile:
    """Reads the table of tensors. Raises PinferError for a damaged file and for a pickle that is more than weights."""
    try:
        with zipfile.ZipFile(path) as archive, path.open("rb") as raw:
            members = {info.filename: info for info in archive.infolist()}
            index = next((name for name in members if name.endswith("/data.pkl") or name == "data.pkl"), None)
            if index is None:
                raise PinferError(f"{path} is not a PyTorch checkpoint: it has no data.pkl", DOWNLOAD_AGAIN)
            if members[index].file_size > _MAX_PICKLE:
                raise _Damaged("its data.pkl is too large for a state dict")
            state = _unpickle(archive.read(index))
            prefix = index.removesuffix("data.pkl") + "data/"
            places = {
                name.removeprefix(prefix): (_data_offset(raw, info), info.file_size)
                for name, info in members.items()
                if name.startswith(prefix) and info.compress_type == zipfile.ZIP_STORED
            }
        if isinstance(state, dict) and isinstance(state.get("state_dict"), dict):
            state = state["state_dict"]
        if not isinstance(state, dict):
            raise PinferError(f"{path} has no state dict", DOWNLOAD_AGAIN)
        size = path.stat().st_size
        views = {str(name): value for name, value in state.items() if isinstance(value, _View)}
        return TorchFile(path, {name: _checked(name, view, places, size) for name, view in views.items()})
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
        raise PinferError(f"{path} cannot be read: {error.strerror or error}", DOWNLOAD_AGAIN) from None
    except Exception as error:  # whatever a damaged pickle makes the unpickler raise
        cause = " ".join(str(error).split())[:120] or type(error).__name__
        raise PinferError(f"{path} is damaged: {cause}", DOWNLOAD_AGAIN) from None


def _unpickle(data: bytes) -> Any:
    for code, argument, _ in pickletools.genops(data):
        # The unpickler makes a table as long as the largest number, before anything is in it.
        if code.name in ("PUT", "BINPUT", "LONG_BINPUT") and not 0 <= int(argument or 0) <= len(data):
            raise _Damaged(f"its pickle memoises as number {argument}")
    return _Unpickler(io.BytesIO(data)).load()


def _checked(name: str, view: _View, places: Mapping[str, tuple[int, int]], file_size: int) -> TorchTensor:
    """The tensor that ``view`` describes. Raises _Damaged unless all of it lies in its storage."""
    storage, offset, shape, strides = view
    if not isinstance(storage, _Storage) or not isinstance(storage.kind, str) or storage.kind not in _STORAGES:
        raise _Damaged(f"{name} has no storage")
    if not isinstance(shape, tuple) or not isinstance(strides, tuple) or not len(shape) == len(strides) <= _MAX_DIMS:
        raise _Damaged(f"{name} has shape {str(shape)[:40]} and strides {str(strides)[:40]}")
    numbers = (offset, *shape, *strides)
    if not all(type(n) is int and 0 <= n < 1 << 48 for n in numbers):
        raise _Damaged(f"{name} has an offset, a size or a stride that is negative, too large or not a number")
    dtype, numpy_dtype = _STORAGES[storage.kind]
    start, size = places.get(str(storage.key), (0, -1))
    tensor = TorchTensor(dtype, numpy_dtype, start + offset * numpy_dtype.itemsize, shape, strides)
    n_stored = size // numpy_dtype.itemsize
    if size < 0 or start + size > file_size or offset + tensor.n_span > n_stored or prod(shape) > n_stored:
        raise _Damaged(f"{name} does not lie in it whole")
    return tensor


def _not_a_zip(path: Path) -> tuple[str, str]:
    with path.open("rb") as file:
        head = file.read(64)
    if head.startswith(b"version https://git-lfs"):
        return f"{path} is a git-lfs pointer, not the weights", "run: git lfs pull"
    if head[:1] == b"\x80":
        return (
            f"{path} is a PyTorch file of the old format or cut off",
            "get the model's safetensors, or save it again with PyTorch 1.6 or newer",
        )
    return f"{path} is damaged: it is not a PyTorch archive", DOWNLOAD_AGAIN


def _data_offset(file: IO[bytes], info: zipfile.ZipInfo) -> int:
    """Where a member's bytes begin: after its local header, whose length the central directory does not give."""
    file.seek(info.header_offset)
    header = file.read(_LOCAL_HEADER)
    return (
        info.header_offset
        + _LOCAL_HEADER
        + int.from_bytes(header[26:28], "little")
        + int.from_bytes(header[28:30], "little")
    )
