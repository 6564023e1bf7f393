"""ggml through ctypes: its shared libraries with the signatures used here, and its own conversions to and from float32.

The conversions give exactly the values that llama.cpp computes with.
"""

from __future__ import annotations

import ctypes
import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pinfer.errors import PinferError
from pinfer.gguf_io.reader import type_size

F32, F16 = 0, 1  # enum ggml_type
_TO_FLOAT = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)


class InitParams(ctypes.Structure):
    """Mirrors ``struct ggml_init_params`` of ggml.h."""

    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


class _TypeTraits(ctypes.Structure):
    """Mirrors ``struct ggml_type_traits`` of ggml.h."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.c_void_p),
        ("from_float_ref", ctypes.c_void_p),
    )


_int, _int64, _size, _bool = ctypes.c_int, ctypes.c_int64, ctypes.c_size_t, ctypes.c_bool
_pointer, _string, _sizes = ctypes.c_void_p, ctypes.c_char_p, ctypes.POINTER(ctypes.c_size_t)

_SIGNATURES: dict[str, dict[str, tuple[Any, tuple[Any, ...]]]] = {
    "ggml": {
        "ggml_backend_dev_count": (_size, ()),
        "ggml_backend_dev_get": (_pointer, (_size,)),
        "ggml_backend_dev_by_name": (_pointer, (_string,)),
        "ggml_backend_load": (_pointer, (_string,)),
    },
    "ggml-base": {
        "ggml_version": (_string, ()),
        "ggml_get_type_traits": (ctypes.POINTER(_TypeTraits), (_int,)),
        "ggml_quantize_requires_imatrix": (_bool, (_int,)),
        "ggml_quantize_chunk": (_size, (_int, _pointer, _pointer, _int64, _int64, _int64, _pointer)),
        "ggml_init": (_pointer, (InitParams,)),
        "ggml_free": (None, (_pointer,)),
        "ggml_tensor_overhead": (_size, ()),
        "ggml_graph_overhead": (_size, ()),
        "ggml_new_tensor_2d": (_pointer, (_pointer, _int, _int64, _int64)),
        "ggml_mul_mat": (_pointer, (_pointer, _pointer, _pointer)),
        "ggml_get_name": (_string, (_pointer,)),
        "ggml_nbytes": (_size, (_pointer,)),
        "ggml_new_graph": (_pointer, (_pointer,)),
        "ggml_build_forward_expand": (None, (_pointer, _pointer)),
        "ggml_backend_alloc_ctx_tensors": (_pointer, (_pointer, _pointer)),
        "ggml_backend_buffer_clear": (None, (_pointer, ctypes.c_uint8)),
        "ggml_backend_buffer_free": (None, (_pointer,)),
        "ggml_backend_tensor_set": (None, (_pointer, _pointer, _size, _size)),
        "ggml_backend_tensor_get": (None, (_pointer, _pointer, _size, _size)),
        "ggml_backend_graph_compute": (_int, (_pointer, _pointer)),
        "ggml_backend_free": (None, (_pointer,)),
        "ggml_backend_buft_name": (_string, (_pointer,)),
        "ggml_backend_dev_init": (_pointer, (_pointer, _string)),
        "ggml_backend_dev_name": (_string, (_pointer,)),
        "ggml_backend_dev_description": (_string, (_pointer,)),
        "ggml_backend_dev_type": (_int, (_pointer,)),
        "ggml_backend_dev_memory": (None, (_pointer, _sizes, _sizes)),
        "ggml_backend_dev_buffer_type": (_pointer, (_pointer,)),
        "ggml_backend_dev_backend_reg": (_pointer, (_pointer,)),
        "ggml_backend_reg_get_proc_address": (_pointer, (_pointer, _string)),
    },
}


def library_folder() -> Path:
    """The folder of libllama and libggml inside the installed llama-cpp-python, found without importing it."""
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        raise PinferError("llama-cpp-python is not installed", "run: pip install pinfer")
    return Path(spec.origin).parent / "lib"


@cache
def load_library(name: str) -> ctypes.CDLL:
    """``libNAME.so.0`` (``ggml`` or ``ggml-base``): the same file that libllama links, so the process has one ggml."""
    path = library_folder() / f"lib{name}.so.0"
    try:
        library = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise PinferError(f"cannot load {path}: {error}", "build llama-cpp-python again: make build") from None
    for symbol, (result, arguments) in _SIGNATURES[name].items():
        function = getattr(library, symbol)
        function.restype, function.argtypes = result, arguments
    return library


def can_dequantise(ggml_type: int) -> bool:
    """Whether rows of this type can be turned into floats."""
    return ggml_type == F32 or bool(_traits(ggml_type).to_float)


def can_quantise(ggml_type: int) -> bool:
    """Whether floats can be turned into this type without an importance matrix."""
    known = ggml_type == F32 or bool(_traits(ggml_type).from_float_ref)
    return known and not load_library("ggml-base").ggml_quantize_requires_imatrix(ggml_type)


def _traits(ggml_type: int) -> Any:
    return load_library("ggml-base").ggml_get_type_traits(ggml_type).contents


def dequantise(raw: NDArray[np.uint8], ggml_type: int, row_length: int) -> NDArray[np.float32]:
    """Rows of any type, ``[n_rows, row_bytes]``, as float32 ``[n_rows, row_length]``. Thread-safe."""
    raw = np.ascontiguousarray(raw)
    if ggml_type == F32:
        return raw.view(np.float32).reshape(len(raw), row_length)
    out = np.empty((len(raw), row_length), dtype=np.float32)
    _TO_FLOAT(_traits(ggml_type).to_float)(raw.ctypes.data, out.ctypes.data, out.size)
    return out


def quantise(rows: NDArray[np.float32], ggml_type: int, row_bytes: int) -> NDArray[np.uint8]:
    """float32 ``[n_rows, row_length]`` in a ggml type, ``[n_rows, row_bytes]``. Thread-safe."""
    rows = np.ascontiguousarray(rows, dtype=np.float32)
    if ggml_type == F32:
        return rows.view(np.uint8)
    n_rows, row_length = rows.shape
    block, size = type_size(ggml_type)
    if row_length % block or row_length // block * size != row_bytes:
        raise ValueError(f"rows of {row_length} values do not fill {row_bytes} bytes in blocks of {block}")
    out = np.empty((n_rows, row_bytes), dtype=np.uint8)
    base = load_library("ggml-base")
    written = base.ggml_quantize_chunk(ggml_type, rows.ctypes.data, out.ctypes.data, 0, n_rows, row_length, None)
    if written != out.nbytes:
        raise AssertionError(f"ggml wrote {written} bytes where {out.nbytes} were expected")
    return out
