"""Reads the header of a GGUF file: metadata and tensor table, with every length checked against the file.

The `gguf` package's reader makes numpy objects for each token of the vocabulary, which takes seconds for large ones,
and raises arbitrary exceptions for damaged files. This one walks the header once with `struct`, decodes arrays only
when asked, and raises only `GgufError`, whose text completes the sentence "the file cannot be used: ...".
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

MAGIC = b"GGUF"
MAX_DIMS = 4

_SCALARS: Mapping[int, str] = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING = 8
_ARRAY = 9
_MAX_STRINGS = 1 << 26
"""in one array; walking more takes minutes"""


class GgufError(Exception):
    """Why a file cannot be read as GGUF. The caller adds which file it is and what to do."""


@dataclass(frozen=True)
class Tensor:
    """One entry of the tensor table. ``shape`` is GGUF's: ``shape[0]`` is the contiguous axis."""

    name: str
    type: int
    """ggml type number"""
    type_name: str
    """``F16``, ``Q4_0``, ``IQ2_XXS``, ... as the gguf package spells it"""
    shape: tuple[int, ...]
    offset: int
    """bytes from the start of its file"""
    n_bytes: int
    part: int = 0
    """file that it is in, for a model in several (see ``parts``)"""

    @property
    def row_length(self) -> int:
        """Elements of one row."""
        return self.shape[0]

    @property
    def n_rows(self) -> int:
        """Rows of ``row_length`` elements in all."""
        return prod(self.shape[1:])

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.n_bytes // self.n_rows


@dataclass(frozen=True)
class TypedValue:
    """A metadata value as stored in the file, to be copied: strings are bytes and may not be valid text."""

    type: int
    """GGUF's number of its type"""
    item_type: int | None
    """of an array's items; None: not an array"""
    value: Any


@dataclass(frozen=True)
class _Array:
    """An array that has not been decoded yet."""

    type: int
    count: int
    offset: int


def type_size(ggml_type: int) -> tuple[int, int]:
    """Elements and bytes of one block of a ggml type. Raises GgufError for a type that ggml does not have."""
    try:
        return GGML_QUANT_SIZES[GGMLQuantizationType(ggml_type)]
    except (KeyError, ValueError):
        raise GgufError(f"tensor type {ggml_type} is unknown") from None


def type_number(name: str) -> int:
    """Number of a ggml type, from the gguf package's name for it in any case."""
    return int(GGMLQuantizationType[name.upper()])


def row_bytes(ggml_type: int | str, length: int) -> int:
    """Bytes of a row of a ggml type, given by number or name. Raises GgufError if its blocks do not divide the row."""
    block, size = type_size(type_number(ggml_type) if isinstance(ggml_type, str) else ggml_type)
    if length % block:
        raise GgufError(f"rows of {length} elements are not a multiple of {block}")
    return length // block * size


def type_name(ggml_type: int) -> str:
    """Name of a ggml type number, as the gguf package spells it."""
    return GGMLQuantizationType(ggml_type).name


@dataclass(frozen=True)
class GgufFile:
    """A GGUF file whose header has been read and checked. The data is mapped on first use."""

    path: Path
    version: int
    size: int
    alignment: int
    data_offset: int
    tensors: Mapping[str, Tensor]
    _values: Mapping[str, Any] = field(repr=False)
    _places: Mapping[str, tuple[int, int]] = field(repr=False)
    """type and offset of each value"""
    others: tuple[GgufFile, ...] = field(default=(), repr=False)
    """the further parts of a model in several files; ``tensors`` and ``size`` include theirs"""

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def keys(self) -> list[str]:
        """Names of the metadata keys, in the file's order."""
        return list(self._values)

    def get(self, key: str) -> Any:
        """Value of a metadata key, an array as a list; ``None`` if there is no such key."""
        value = self._values.get(key)
        return _decode_array(self._map, value) if isinstance(value, _Array) else value

    def typed(self, key: str) -> TypedValue:
        """A metadata value with its type, byte for byte. Raises KeyError if there is no such key."""
        kind, offset = self._places[key]
        value = self._values[key]
        if isinstance(value, _Array):
            items = _string_items(self._map, value) if value.type == _STRING else _decode_array(self._map, value)
            return TypedValue(kind, value.type, items)
        if kind == _STRING:
            value = _string_items(self._map, _Array(_STRING, 1, offset))[0]
        return TypedValue(kind, None, value)

    def count(self, key: str) -> int:
        """Length of an array without decoding it; 0 if the key is missing or not an array."""
        value = self._values.get(key)
        return value.count if isinstance(value, _Array) else 0

    def array_offset(self, key: str) -> int:
        """Bytes from the start of the file to the first item of an array."""
        return int(self._values[key].offset)

    @cached_property
    def _map(self) -> mmap.mmap:
        with open(self.path, "rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    @cached_property
    def _bytes(self) -> NDArray[np.uint8]:
        return np.frombuffer(self._map, dtype=np.uint8)

    def _data(self, tensor: Tensor) -> NDArray[np.uint8]:
        file = self.others[tensor.part - 1] if tensor.part else self
        return file._bytes[tensor.offset : tensor.offset + tensor.n_bytes]

    def raw(self, tensor: Tensor) -> NDArray[np.uint8]:
        """The tensor's bytes ``[n_rows, row_bytes]``, mapped from the file, read-only."""
        return self._data(tensor).reshape(tensor.n_rows, tensor.row_bytes)

    def array(self, tensor: Tensor) -> NDArray[Any]:
        """A tensor of plain numbers in numpy's axis order (the reverse of GGUF's), mapped from the file, read-only."""
        plain = {"F32": "<f4", "F16": "<f2", "F64": "<f8", "I8": "i1", "I16": "<i2", "I32": "<i4", "I64": "<i8"}
        if tensor.type_name not in plain:
            raise GgufError(f"tensor {tensor.name} is of type {tensor.type_name}, not plain numbers")
        return self._data(tensor).view(np.dtype(plain[tensor.type_name])).reshape(tensor.shape[::-1])

    def release(self) -> None:
        """Releases the pages that reads have mapped, so that they do not count as this process's memory."""
        for file in (self, *self.others):
            file._map.madvise(mmap.MADV_DONTNEED)


class _Cursor:
    """Walks the header; each step checks that it stays inside the file."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.size = len(data)
        self.at = 0

    def skip(self, n: int) -> int:
        start = self.at
        if n < 0 or start + n > self.size:
            raise GgufError("the header ends too early")
        self.at = start + n
        return start

    def scalar(self, code: str) -> Any:
        start = self.skip(struct.calcsize("<" + code))
        return struct.unpack_from("<" + code, self.data, start)[0]

    def string(self) -> str:
        n = self.scalar("Q")
        start = self.skip(n)
        try:
            return self.data[start : start + n].decode("utf-8")
        except UnicodeDecodeError:
            raise GgufError("a name in the header is not text") from None

    def skip_strings(self, count: int) -> None:
        at, size, unpack = self.at, self.size, struct.Struct("<Q").unpack_from
        data = self.data
        for _ in range(count):
            if at + 8 > size:
                raise GgufError("the header ends too early")
            at += 8 + unpack(data, at)[0]
        self.at = at
        self.skip(0)

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.scalar(_SCALARS[kind])
        if kind == _STRING:
            # Some models have names that are not UTF-8; values are shown to people, not looked up.
            n = self.scalar("Q")
            start = self.skip(n)
            return self.data[start : start + n].decode("utf-8", errors="replace")
        if kind == _ARRAY:
            item, count = self.scalar("I"), self.scalar("Q")
            array = _Array(item, count, self.at)
            if item == _STRING and count <= _MAX_STRINGS:
                self.skip_strings(count)
            elif item in _SCALARS:
                self.skip(count * struct.calcsize("<" + _SCALARS[item]))
            else:
                raise GgufError(f"the header has an array of {count} values of type {item}")
            return array
        raise GgufError(f"the header has a value of unknown type {kind}")


def _decode_array(data: mmap.mmap, array: _Array) -> list[Any]:
    if array.type != _STRING:
        return list(struct.unpack_from(f"<{array.count}{_SCALARS[array.type]}", data, array.offset))
    return [text.decode("utf-8", errors="replace") for text in _string_items(data, array)]


def _string_items(data: mmap.mmap, array: _Array) -> list[bytes]:
    """The strings of an array that has been walked before, which has checked its bounds."""
    at, items = array.offset, []
    for _ in range(array.count):
        n = struct.unpack_from("<Q", data, at)[0]
        items.append(data[at + 8 : at + 8 + n])
        at += 8 + n
    return items


def _read_tensor(cursor: _Cursor) -> Tensor:
    name = cursor.string()
    n_dims = cursor.scalar("I")
    if not 1 <= n_dims <= MAX_DIMS:
        raise GgufError(f"tensor {name!r} has {n_dims} dimensions")
    shape = tuple(cursor.scalar("Q") for _ in range(n_dims))
    kind, offset = cursor.scalar("I"), cursor.scalar("Q")
    try:
        n_bytes = row_bytes(kind, shape[0]) * prod(shape[1:])
    except GgufError as error:
        raise GgufError(f"tensor {name!r}: {error}") from None
    if n_bytes == 0:
        raise GgufError(f"tensor {name!r} is empty")
    return Tensor(name, kind, type_name(kind), shape, offset, n_bytes)


def _read(path: Path, data: mmap.mmap) -> GgufFile:
    cursor = _Cursor(data)
    cursor.skip(len(MAGIC))  # of any format this reads, four bytes
    version = cursor.scalar("I")
    if version & 0xFFFF == 0:
        raise GgufError("it was made for a big-endian machine")
    if version not in (2, 3):
        raise GgufError(f"GGUF version {version} is not supported (2 and 3 are)")
    n_tensors, n_values = cursor.scalar("Q"), cursor.scalar("Q")

    values: dict[str, Any] = {}
    places: dict[str, tuple[int, int]] = {}
    for _ in range(n_values):
        key, kind = cursor.string(), cursor.scalar("I")
        if key in places:
            raise GgufError(f"key {key!r} occurs twice")
        places[key] = kind, cursor.at
        values[key] = cursor.value(kind)
    table = [_read_tensor(cursor) for _ in range(n_tensors)]

    alignment = values.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
        raise GgufError(f"general.alignment is {alignment}")
    data_offset = -(-cursor.at // alignment) * alignment

    tensors: dict[str, Tensor] = {}
    for t in table:
        placed = Tensor(t.name, t.type, t.type_name, t.shape, data_offset + t.offset, t.n_bytes)
        if t.name in tensors:
            raise GgufError(f"tensor {t.name!r} occurs twice")
        if t.offset % alignment:
            raise GgufError(f"tensor {t.name!r} is not aligned")
        if placed.offset + placed.n_bytes > len(data):
            raise GgufError(f"it is cut off: tensor {t.name!r} ends at byte {placed.offset + t.n_bytes} of {len(data)}")
        tensors[t.name] = placed
    return GgufFile(path, version, len(data), alignment, data_offset, tensors, values, places)


def read_gguf(path: Path, magic: bytes = MAGIC) -> GgufFile:
    """Reads and checks the header. Raises GgufError (damaged, not a GGUF) or OSError (missing, not readable).

    ``magic`` is the file's first four bytes; some formats are GGUF except for these.
    """
    with open(path, "rb") as file:
        if file.read(len(magic)) != magic:
            raise GgufError("it is not a GGUF file")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _read(path, data)
