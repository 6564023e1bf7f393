"""ggml's own conversions, called through ctypes: any type to float32 and back, exactly as llama.cpp computes them."""

from __future__ import annotations

import ctypes
import importlib.util
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from pinfer.errors import PinferError
from pinfer.gguf_io.reader import type_size

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_F32 = 0
_TO_FLOAT = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)


class _TypeTraits(ctypes.Structure):
    """Mirrors ``struct ggml_type_traits`` of ggml.h."""

    _fields_ = [
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.c_void_p),
        ("from_float_ref", ctypes.c_void_p),
    ]


def library_folder() -> Path:
    """The folder of libllama and libggml inside the installed llama-cpp-python, found without importing it."""
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        raise PinferError("llama-cpp-python is not installed", "run: pip install pinfer")
    return Path(spec.origin).parent / "lib"


def load_library(name: str) -> ctypes.CDLL:
    """``libNAME.so.0`` of that folder: the very file libllama links, so that there is one ggml in the process."""
    path = library_folder() / f"lib{name}.so.0"
    try:
        return ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise PinferError(f"cannot load {path}: {error}", "build llama-cpp-python again: make build") from None


@cache
def _base() -> ctypes.CDLL:
    library = load_library("ggml-base")
    library.ggml_get_type_traits.restype = ctypes.POINTER(_TypeTraits)
    library.ggml_get_type_traits.argtypes = [ctypes.c_int]
    library.ggml_quantize_requires_imatrix.restype = ctypes.c_bool
    library.ggml_quantize_requires_imatrix.argtypes = [ctypes.c_int]
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_void_p,
    ]
    return library


def can_dequantise(ggml_type: int) -> bool:
    """Whether rows of this type can be turned into floats."""
    return ggml_type == _F32 or bool(_base().ggml_get_type_traits(ggml_type).contents.to_float)


def can_quantise(ggml_type: int) -> bool:
    """Whether floats can be turned into this type without an importance matrix."""
    traits = _base().ggml_get_type_traits(ggml_type).contents
    known = ggml_type == _F32 or bool(traits.from_float_ref)
    return known and not _base().ggml_quantize_requires_imatrix(ggml_type)


def dequantise(raw: NDArray[np.uint8], ggml_type: int, row_length: int) -> NDArray[np.float32]:
    """Rows of any type, ``[n_rows, row_bytes]``, as float32 ``[n_rows, row_length]``; threads may call it at once."""
    import numpy as np

    raw = np.ascontiguousarray(raw)
    if ggml_type == _F32:
        return raw.view(np.float32).reshape(len(raw), row_length)
    out = np.empty((len(raw), row_length), dtype=np.float32)
    to_float = _TO_FLOAT(_base().ggml_get_type_traits(ggml_type).contents.to_float)
    to_float(raw.ctypes.data, out.ctypes.data, out.size)
    return out


def quantise(rows: NDArray[np.float32], ggml_type: int, row_bytes: int) -> NDArray[np.uint8]:
    """float32 ``[n_rows, row_length]`` in a ggml type, ``[n_rows, row_bytes]``; threads may call it at once."""
    import numpy as np

    rows = np.ascontiguousarray(rows, dtype=np.float32)
    if ggml_type == _F32:
        return rows.view(np.uint8)
    n_rows, row_length = rows.shape
    block, size = type_size(ggml_type)
    if row_length % block or row_length // block * size != row_bytes:
        raise ValueError(f"rows of {row_length} values do not fill {row_bytes} bytes in blocks of {block}")
    out = np.empty((n_rows, row_bytes), dtype=np.uint8)
    written = _base().ggml_quantize_chunk(ggml_type, rows.ctypes.data, out.ctypes.data, 0, n_rows, row_length, None)
    if written != out.nbytes:
        raise AssertionError(f"ggml wrote {written} bytes where {out.nbytes} were expected")
    return out
