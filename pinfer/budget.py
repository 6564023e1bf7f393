"""What takes device memory before the first hot neuron does: dense weights, KV cache and compute buffers.

llama.cpp's ``n_gpu_layers`` counts from the output: 1 is the output matrix, 2 adds the last layer, and so on. Of an
offloaded layer everything goes to the device but the matrices of its FFN, which pinfer owns.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from pinfer.errors import PinferError
from pinfer.gguf_file import type_size
from pinfer.model import Model

# Buffers start at multiples of this on every device ggml knows; rows of some CUDA types are padded to as much.
_ALIGNMENT = 512
# llama.cpp cuts its cache in steps of this many tokens.
_CACHE_STEP = 256
# A hot device computes this many tokens at a time (PINFER_HOT_TOKENS of the plugin).
_HOT_TOKENS = 256
# Widths of attention heads for which ggml's GPU backends have a flash attention, which needs no matrix of scores.
_FLASH_WIDTHS = (64, 80, 96, 112, 128, 256)
_CACHE_TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")
_FFN_MATRIX = re.compile(r"blk\.\d+\.ffn_(up|gate|down)\.(weight|bias)")


@dataclass(frozen=True)
class DensePart:
    """The part of a model that runs densely, by where it lies; bytes."""

    n_gpu_layers: int
    dense_weights: int
    kv_cache: int
    compute_buffers: int

    @property
    def total(self) -> int:
        return self.dense_weights + self.kv_cache + self.compute_buffers


def cache_type_bytes(cache_type: str) -> float:
    """Bytes per value of a KV cache type. Raises PinferError for one that llama.cpp does not have."""
    from gguf import GGMLQuantizationType

    if cache_type.lower() not in _CACHE_TYPES:
        raise PinferError(f"there is no cache type {cache_type!r}", f"use one of: {', '.join(_CACHE_TYPES)}")
    block, size = type_size(GGMLQuantizationType[cache_type.upper()])
    return size / block


def _aligned(n: float) -> int:
    return int(-(-n // _ALIGNMENT)) * _ALIGNMENT


def output_bytes(model: Model) -> int:
    """The output matrix and norm; the token embedding is copied where a model has no output matrix of its own."""
    tensors = model.gguf.tensors
    matrix = tensors.get("output.weight") or tensors.get("token_embd.weight")
    others = [t for name, t in tensors.items() if name.startswith("output") and t is not matrix]
    return sum(_aligned(t.n_bytes) for t in [*others, *([matrix] if matrix else [])])


def layer_bytes(model: Model, layer: int) -> int:
    """Everything of a layer but the matrices of its FFN."""
    prefix = f"blk.{layer}."
    return sum(
        _aligned(t.n_bytes) for t in model.tensors if t.name.startswith(prefix) and not _FFN_MATRIX.fullmatch(t.name)
    )


def kv_bytes(model: Model, layer: int, n_ctx: int, cache_type: str) -> int:
    """The KV cache of a layer for a whole context."""
    n_tokens = -(-n_ctx // _CACHE_STEP) * _CACHE_STEP
    return _aligned(model.kv_bytes_per_token(layer, cache_type_bytes(cache_type)) * n_tokens)


def compute_bytes(model: Model, n_ctx: int, n_batch: int) -> int:
    """An upper estimate of llama.cpp's compute buffers on a device that has the output and at least one layer."""
    n_head = max(model.n_head, default=1)
    n_head_kv = max(model.n_head_kv, default=1)
    heads = n_head * model.head_dim_k + n_head_kv * (model.head_dim_k + model.head_dim_v) + n_head * model.head_dim_v
    n_ctx = -(-n_ctx // _CACHE_STEP) * _CACHE_STEP
    # Per token: the residual stream and its norms, the heads, the logits, the mask, FFN inputs and outputs in transit.
    values = 6 * model.n_embd + 2 * heads + model.n_vocab + 2 * n_ctx
    if not {model.head_dim_k, model.head_dim_v} <= set(_FLASH_WIDTHS):
        values += 2 * n_head * n_ctx
    return _aligned(4 * values * n_batch) + (1 << 20)


def hot_overhead(model: Model) -> int:
    """Device memory that the hot part takes beside its neurons: activations of a batch, ends of buffers."""
    per_layer = 5 * _ALIGNMENT + model.n_embd * 4
    return _aligned(4 * _HOT_TOKENS * (2 * model.n_embd + 3 * model.n_ff)) + model.n_layer * per_layer


def fit_dense(model: Model, vram: int, n_ctx: int, n_batch: int, cache_type: str) -> DensePart:
    """As many dense layers as fit, their KV cache and compute buffers included; none at all for a budget of 0.

    Raises PinferError when there is a budget that not even the output and one layer fit into.
    """
    if vram <= 0:
        return DensePart(0, 0, 0, 0)
    weights, cache = output_bytes(model), 0
    buffers = compute_bytes(model, n_ctx, n_batch)
    fitting: DensePart | None = None
    for n, layer in enumerate(reversed(range(model.n_layer)), start=2):
        weights += layer_bytes(model, layer)
        cache += kv_bytes(model, layer, n_ctx, cache_type)
        part = DensePart(n, weights, cache, buffers)
        if part.total > vram:
            break
        fitting = part
    if fitting is not None:
        return fitting
    needed = output_bytes(model) + layer_bytes(model, model.n_layer - 1)
    cache = kv_bytes(model, model.n_layer - 1, n_ctx, cache_type)
    raise PinferError(
        f"{vram / 2**20:.0f} MiB of VRAM are too little for {model.name}: output and one layer take "
        f"{needed / 2**20:.0f} MiB, their KV cache {cache / 2**20:.0f} MiB, compute buffers {buffers / 2**20:.0f} MiB",
        f"give at least --vram {-(-(needed + cache + buffers) // 2**20)}M, a smaller --ctx-size, or --vram 0",
    )
