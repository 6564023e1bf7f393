"""The upper limit of decoding speed: memory bandwidth over the bytes that each token has to read.

Decoding one sequence reads every weight it uses once per token, and the KV cache up to the current position. The number
of neuron rows read is the plugin's count; their size is the mean over the layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from pinfer.artefacts.artefact import open_artefact
from pinfer.artefacts.shards import ShardFile
from pinfer.gguf_io.reader import row_bytes
from pinfer.llama.cache_types import DEFAULT_CACHE, CacheTypes, cache_type_bytes
from pinfer.llama.plugin import Stats
from pinfer.model import Model, Tensor


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
    """Bytes that one neuron's rows take, as a mean over the layers."""

    first: float
    """the row whose product decides whether the neuron fires"""
    rest: float
    """the rows that are read if it fires"""
    down_matrix: float
    """the layer's whole down matrix, if there are no down rows to read singly"""
    ffn: float
    """all FFN matrices of a layer"""


def can_count(model: Model) -> bool:
    """Whether every layer is a plain FFN. For a mixture of experts the experts that were read are unknown."""
    return all(f.up is not None and f.down is not None for f in model.ffn)


def dense_bytes(model: Model, n_tokens: int, cache: CacheTypes = DEFAULT_CACHE) -> TokenBytes:
    """Stock libllama: every matrix, and the average size of the cache while ``n_tokens`` are decoded."""
    ffn = sum(t.n_bytes for t in _ffn_matrices(model).values())
    return TokenBytes(_dense_weights(model), ffn, 0.0, _kv_bytes(model, n_tokens, cache))


def sparse_bytes(
    model: Model,
    n_tokens: int,
    stats: Stats,
    cold: Path | None,
    predictor: Path | None,
    cache: CacheTypes = DEFAULT_CACHE,
) -> TokenBytes:
    """What the plugin read, from its ``stats`` over ``n_tokens`` decoded one at a time."""
    neuron = neuron_bytes(model, cold)
    # Layers of tokens that no counter includes were computed by ggml's CPU backend.
    n_dense = max(0, model.n_layer * n_tokens - stats.n_tokens)
    ffn = (
        stats.n_candidates * neuron.first
        + stats.n_active * neuron.rest
        + stats.n_tokens * neuron.down_matrix
        + n_dense * neuron.ffn
    )
    named = _predictor_bytes(predictor, model) if predictor is not None and stats.n_tokens else 0
    return TokenBytes(_dense_weights(model), ffn / n_tokens, named, _kv_bytes(model, n_tokens, cache))


def neuron_bytes(model: Model, cold: Path | None) -> NeuronBytes:
    """With the down rows of the cold shard, or else the model's down matrix, which is read whole."""
    gate = _mean([f.gate.row_bytes for f in model.ffn if f.gate is not None])
    up = _mean([f.up.row_bytes for f in model.ffn if f.up is not None])
    down = 0.0
    if cold is not None:
        shard = ShardFile.read(cold, "cold", model)
        held = zip(shard.down_type, shard.neurons, strict=True)
        down = _mean([row_bytes(kind, model.n_embd) for kind, ids in held if len(ids)])
    return NeuronBytes(
        first=gate if model.gated else up,
        rest=(up if model.gated else 0.0) + down,
        down_matrix=0.0 if cold is not None else _mean([f.down.n_bytes for f in model.ffn if f.down is not None]),
        ffn=sum(t.n_bytes for t in _ffn_matrices(model).values()) / model.n_layer,
    )


def _ffn_matrices(model: Model) -> dict[str, Tensor]:
    return {t.name: t for f in model.ffn for t in (f.gate, f.up, f.down) if t is not None}


def _dense_weights(model: Model) -> float:
    tensors = model.gguf.tensors
    ffn = _ffn_matrices(model)
    looked_up = {"position_embd.weight"} | ({"token_embd.weight"} if "output.weight" in tensors else set())
    return float(sum(t.row_bytes if name in looked_up else t.n_bytes for name, t in tensors.items() if name not in ffn))


def _kv_bytes(model: Model, n_tokens: int, cache: CacheTypes) -> float:
    k_bytes, v_bytes = map(cache_type_bytes, cache)
    per_token = sum(model.kv_bytes_per_token(layer, k_bytes, v_bytes) for layer in range(model.n_layer))
    return per_token * (n_tokens + 1) / 2


def _predictor_bytes(path: Path, model: Model) -> int:
    return sum(t.n_bytes for t in open_artefact(path, "predictor", model).gguf.tensors.values())


def _mean(values: list[int]) -> float:
    return fmean(values) if values else 0.0
