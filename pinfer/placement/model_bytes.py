"""Device memory besides the hot neurons: dense weights, KV cache and buffers.

llama.cpp's ``n_gpu_layers`` counts from the output: 1 is the output matrix, 2 adds the last layer, and so on. An
offloaded layer goes to the device except for the matrices of its FFN, which belong to pinfer; where nothing in the FFN
is exactly zero, except for its experts.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from pinfer.llama.cache_types import CacheTypes, cache_type_bytes
from pinfer.model import Model

# Buffers start at multiples of this on all of ggml's devices; CUDA pads rows of some types to it.
_ALIGNMENT = 512
# llama.cpp rounds the size of its cache up to a multiple of this many tokens.
_CACHE_STEP = 256
# Tokens that a hot device computes at once (PINFER_HOT_TOKENS of the plugin).
_HOT_TOKENS = 256
# Head sizes with flash attention in ggml's GPU backends, which needs no matrix of scores.
_FLASH_WIDTHS = (64, 80, 96, 112, 128, 256)
# Alignment of tensors and fragmentation.
_SLACK = 1.05
_FFN_MATRIX = re.compile(r"blk\.\d+\.(ffn_(up|gate|down)(_exps|_shexp)?|channel_mix_(key|value))\.(weight|bias)")
_EXPERT_MATRIX = re.compile(r"blk\.\d+\.ffn_(up|gate|down)_exps\.(weight|bias)")


@dataclass(frozen=True)
class DensePart:
    """The dense part of a model on the device, in bytes."""

    n_gpu_layers: int
    dense_weights: int
    kv_cache: int
    compute_buffers: int

    @property
    def total(self) -> int:
        return self.dense_weights + self.kv_cache + self.compute_buffers


def _aligned(n: float) -> int:
    return int(-(-n // _ALIGNMENT)) * _ALIGNMENT


def output_bytes(model: Model) -> int:
    """The output matrix and norm; the token embedding is copied where a model has no output matrix of its own."""
    tensors = model.gguf.tensors
    matrix = tensors.get("output.weight") or tensors.get("token_embd.weight")
    others = [t for name, t in tensors.items() if name.startswith("output") and t is not matrix]
    return sum(_aligned(t.n_bytes) for t in [*others, *([matrix] if matrix else [])])


def layer_bytes(model: Model, layer: int) -> int:
    """A layer without the matrices that pinfer places: of its FFN, or of its experts alone."""
    prefix = f"blk.{layer}."
    placed = _EXPERT_MATRIX if model.places_experts else _FFN_MATRIX
    return sum(_aligned(t.n_bytes) for t in model.tensors if t.name.startswith(prefix) and not placed.fullmatch(t.name))


def kv_bytes(model: Model, layer: int, n_ctx: int, cache_types: CacheTypes) -> int:
    """The KV cache of a layer for a whole context."""
    n_tokens = -(-n_ctx // _CACHE_STEP) * _CACHE_STEP
    return _aligned(model.kv_bytes_per_token(layer, *map(cache_type_bytes, cache_types)) * n_tokens)


def compute_bytes(model: Model, n_ctx: int, n_ubatch: int) -> int:
    """An upper bound of llama.cpp's compute buffers on a device that is not in this machine."""
    n_head = max(model.n_head, default=1)
    n_head_kv = max(model.n_head_kv, default=1)
    heads = n_head * model.head_dim_k + n_head_kv * (model.head_dim_k + model.head_dim_v) + n_head * model.head_dim_v
    n_ctx = -(-n_ctx // _CACHE_STEP) * _CACHE_STEP
    # Values of 4 bytes per token: residual stream, normalised copy, heads, and the mask in 16 bits. The logits of one
    # token follow at the end, when the layers' buffers are free again.
    layer = 2 * model.n_embd + heads + n_ctx // 2
    if not {model.head_dim_k, model.head_dim_v} <= set(_FLASH_WIDTHS):
        layer += 2 * n_head * n_ctx
    values = max(layer * n_ubatch, model.n_vocab + 2 * model.n_embd)
    return _aligned(_SLACK * 4 * values) + (256 << 10)


def hot_buffers(model: Model, n_hot: int) -> int:
    """Device memory of the hot part besides its neurons, with at most ``n_hot`` of them in a layer.

    Activations of one batch of tokens (``pinfer_hot_compute_bytes`` of the plugin), operands converted to 16 bits, and
    the padding of buffers and of quantised rows.
    """
    if n_hot == 0:
        return 0
    widths = (2 * model.n_embd + 3 * n_hot, 3 * model.n_embd + n_hot + model.n_expert_used * model.n_embd)
    activations = 4 * _HOT_TOKENS * max(widths[: 1 + model.places_experts]) + 16 * _ALIGNMENT
    converted = 2 * _HOT_TOKENS * (model.n_embd + n_hot)
    ends = len(model.ffns) * (6 * _ALIGNMENT + 4 * model.n_embd)
    return _aligned(activations + converted + ends)


def widest(model: Model, n_hot: Sequence[int]) -> int:
    """The most hot neurons that a device computes at once for a token, given its hot units per FFN."""
    used = ((min(n, model.n_expert_used) * f.n_ff if f.is_stack else n) for f, n in zip(model.ffns, n_hot, strict=True))
    return max(used, default=0)


def fit_dense(model: Model, room: int, n_ctx: int, cache_types: CacheTypes, compute: Callable[[int], int]) -> DensePart:
    """The most dense layers that fit into ``room`` bytes with their KV cache and compute buffers; possibly none.

    ``compute`` gives the bytes of the compute buffers for a number of layers (``n_gpu_layers``).
    """
    parts = [DensePart(0, 0, 0, 0), DensePart(1, output_bytes(model), 0, 0)]
    for layer in reversed(range(model.n_layer)):
        last = parts[-1]
        weights = last.dense_weights + layer_bytes(model, layer)
        cache = last.kv_cache + kv_bytes(model, layer, n_ctx, cache_types)
        parts.append(DensePart(last.n_gpu_layers + 1, weights, cache, 0))
    fitting = [part for part in parts if part.total <= room]
    # The buffers hardly depend on the number of layers, so the last size is a good guess for the next.
    buffers = 0
    while fitting:
        part = fitting[-1]
        if part.n_gpu_layers == 0:
            return part
        if part.total + buffers <= room:
            buffers = compute(part.n_gpu_layers)
        if part.total + buffers <= room:
            return replace(part, compute_buffers=buffers)
        fitting.pop()
    return parts[0]
