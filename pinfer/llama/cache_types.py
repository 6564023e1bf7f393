"""Types of the KV cache: those that llama.cpp has, and their sizes."""

from __future__ import annotations

from pinfer.errors import PinferError
from pinfer.gguf_io.reader import type_number, type_size

CacheTypes = tuple[str, str]
"""of the keys and of the values, by ggml's names"""

DEFAULT_CACHE: CacheTypes = ("f16", "f16")
_KNOWN = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")


def cache_type_bytes(cache_type: str) -> float:
    """Bytes per value of a KV cache type. Raises PinferError for one that llama.cpp does not have."""
    if cache_type.lower() not in _KNOWN:
        raise PinferError(f"there is no cache type {cache_type!r}", f"use one of: {', '.join(_KNOWN)}")
    block, size = type_size(type_number(cache_type))
    return size / block


def cache_type_number(cache_type: str) -> int:
    """ggml's number of a cache type, which llama_cpp has no constant for in every case (BF16)."""
    cache_type_bytes(cache_type)
    return int(type_number(cache_type))
