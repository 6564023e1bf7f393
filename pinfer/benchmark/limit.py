"""The upper limit of decoding speed: memory bandwidth over the bytes that each token has to read.

Decoding one sequence reads every weight it uses once per token, and the KV cache up to the current position. The number
of neuron rows read is the plugin's count; their size is the mean over the layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from pinfer.artefacts.artefact import open_artefact
from pinfer.artefacts.shards import ShardFile
from pinfer.gguf_io.reader import row_bytes
from pinfer.llama.cache_types import DEFAULT_CACHE, CacheTypes, cache_type_bytes
from pinfer.llama.plugin import Stats
from pinfer.model import Ffn, Model


@dataclass(frozen=True)
class TokenBytes:
    """Bytes that decoding one token reads, on average."""

    dense_weights: float
    """all weights except FFN matrices; of the token embedding one row, unless it is the output matrix as well"""
    ffn: float
    """rows of candidates and active neurons; whole matrices in layers that ran densely"""
    predictor: float
    kv_cache: float

    @property
    def total(self) -> float:
        return self.dense_weights + self.ffn + self.predictor + self.kv_cache


@dataclass(frozen=True)
class NeuronBytes:
    """Bytes that one neuron's rows take, as a mean over the FFNs."""

    first: float
    """the row whose product decides whether the neuron fires"""
    rest: float
    """the rows that are read if it fires"""
    down_matrix: float
    """an FFN's whole down matrix, if there are no down rows to read singly"""
    ffn: float
    """all matrices of an FFN that a token reads"""


def can_count(model: Model) -> bool:
    """Whether pinfer knows every FFN of the model."""
    return bool(model.ffns) and not model.obstacle


def dense_bytes(model: Model, n_tokens: int, cache: CacheTypes = DEFAULT_CACHE, n_depth: int = 0) -> TokenBytes:
    """Stock libllama: every matrix, of experts those a token is routed to, and the average size of the cache while
    ``n_tokens`` are decoded after ``n_depth``."""
    ffn = sum(_used(model, f) * f.n_bytes for f in model.ffns)
    return TokenBytes(_dense_weights(model), ffn, 0.0, _kv_bytes(model, n_tokens, cache, n_depth))


def sparse_bytes(
    model: Model,
    n_tokens: int,
    stats: Stats,
    cold: Path | None,
    predictor: Path | None,
    cache: CacheTypes = DEFAULT_CACHE,
    n_depth: int = 0,
) -> TokenBytes:
    """What the plugin read, from its ``stats`` over ``n_tokens`` decoded one at a time after ``n_depth``."""
    neuron = neuron_bytes(model, cold)
    # FFNs of tokens that no counter includes were computed by ggml's CPU backend.
    n_dense = max(0, len(model.ffns) * n_tokens - stats.n_tokens)
    ffn = (
        stats.n_candidates * neuron.first
        + stats.n_active * neuron.rest
        + stats.n_tokens * neuron.down_matrix
        + n_dense * neuron.ffn
    )
    named = _predictor_bytes(predictor, model) if predictor is not None and stats.n_tokens else 0
    return TokenBytes(_dense_weights(model), ffn / n_tokens, named, _kv_bytes(model, n_tokens, cache, n_depth))


def neuron_bytes(model: Model, cold: Path | None) -> NeuronBytes:
    """With the down rows of the cold shard, or else the model's down matrix, which is read whole."""
    used = [_used(model, f) * f.n_neurons for f in model.ffns]
    gate = _mean([f.gate.row_bytes if f.gate else 0 for f in model.ffns], used)
    up = _mean([f.up.row_bytes for f in model.ffns], used)
    down = 0.0
    if cold is not None:
        kinds = ShardFile.read(cold, "cold", model).down_type
        down = _mean([row_bytes(kind, f.n_embd) for kind, f in zip(kinds, model.ffns, strict=True)], used)
    return NeuronBytes(
        first=gate if model.gated else up,
        rest=(up if model.gated else 0.0) + down,
        down_matrix=0.0 if cold is not None else _mean([_used(model, f) * f.down.n_bytes for f in model.ffns]),
        ffn=_mean([_used(model, f) * f.n_bytes for f in model.ffns]),
    )


def _used(model: Model, ffn: Ffn) -> float:
    """Share of an FFN's matrices that a token needs."""
    return min(1.0, model.n_expert_used / ffn.n_experts) if ffn.is_stack else 1.0


def _dense_weights(model: Model) -> float:
    tensors = model.gguf.tensors
    ffn = {t.name for f in model.ffns for t in f.matrices}
    looked_up = {"position_embd.weight"} | ({"token_embd.weight"} if "output.weight" in tensors else set())
    return float(sum(t.row_bytes if name in looked_up else t.n_bytes for name, t in tensors.items() if name not in ffn))


def _kv_bytes(model: Model, n_tokens: int, cache: CacheTypes, n_depth: int) -> float:
    k_bytes, v_bytes = map(cache_type_bytes, cache)
    per_token = sum(model.kv_bytes_per_token(layer, k_bytes, v_bytes) for layer in range(model.n_layer))
    return per_token * (n_depth + (n_tokens + 1) / 2)


def _predictor_bytes(path: Path, model: Model) -> int:
    tensors = open_artefact(path, "predictor", model).gguf.tensors
    of = {f"{f.name}.pred_{part}": _used(model, f) for f in model.ffns for part in "abt"}
    return round(sum(t.n_bytes * of.get(name, 1) for name, t in tensors.items()))


def _mean(values: Sequence[float], weights: Sequence[float] | None = None) -> float:
    return fmean(values, weights) if values else 0.0
