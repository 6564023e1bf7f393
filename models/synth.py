"""Writes synthetic models with the shape of real ones and planted power-law FFN activity, at any size.

How the activity is planted: every token embedding has a common component along a unit vector u, so every FFN input has
one too. Row i of the first FFN matrix is random noise minus c_i * u, and c_i fixes how often neuron i fires. The noise
is low-rank plus a small remainder, as a predictor can learn nothing from rows without structure. Attention and FFN
outputs are small and have no mean, so the activity stays as planted through the depth.

Mixtures have planted routing as well: the router's rows are random noise plus an amount of u that fixes how often each
expert is chosen. The first matrices of experts have full rank, as measured in real mixtures.

Example: ``python models/synth.py llama-7b.gguf --preset llama-7b --type Q4_0``. Needs gguf, numpy, scipy, typer, rich
and llama-cpp-python (for ggml's own quantisation).
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import functools
import os
import shutil
import sys
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

Array = NDArray[np.float32]

POSITION = 0.7  # size of learned position embeddings relative to token embeddings (gpt2)
COMMON = 0.5  # share of an embedding's norm along u: large enough to control which neurons fire
MAX_FREQUENCY = 0.95
LOGIT_SCALE = 4.0  # standard deviation of the logits
CHUNK_ELEMENTS = 1 << 22
TYPES = ("F32", "F16", "Q8_0", "Q5_0", "Q4_0", "Q4_K")
ARCHITECTURES = {
    "llama": "reglu",
    "arcee": "relu2",
    "falcon": "relu",
    "gpt2": "relu",
    "nemotron_h": "relu2",
    "nemotron_h_moe": "relu2",
    "smallthinker": "reglu",
    "rwkv7": "relu2",
}
GATED = ("llama", "smallthinker")
NEMOTRON = ("nemotron_h", "nemotron_h_moe")
SHIFT = 0.25  # share of the previous token in RWKV's inputs
DRAWS = 1 << 15  # of the router's noise, from which the planted routing is counted


@dataclass(frozen=True)
class Mixture:
    """The routed experts of a layer, and its shared one."""

    n_expert: int
    n_expert_used: int
    n_ff_shared: int = 0  # 0: no shared expert
    weights_scale: float = 1.0  # factor on the normalised weights of the chosen experts
    hot_share: float = 0.55  # share of the experts that are chosen in 80 % of the cases


@dataclass(frozen=True)
class Mamba:
    """Sizes of a Mamba-2 layer."""

    n_inner: int
    n_head: int
    n_state: int = 128
    n_group: int = 8
    n_conv: int = 4

    @property
    def n_mixed(self) -> int:
        """Channels that pass through the convolution."""
        return self.n_inner + 2 * self.n_group * self.n_state


@dataclass(frozen=True)
class Rwkv:
    """Sizes of an RWKV-7 layer: of a head, and the ranks of its low-rank matrices."""

    n_head_dim: int = 64
    decay: int = 64
    rate: int = 64
    value: int = 32
    gate: int = 128


@dataclass(frozen=True)
class SynthOptions:
    """Shape, type and planted activity of a synthetic model."""

    arch: str = "llama"
    activation: str = ""  # empty: the usual one of the architecture
    n_embd: int = 256
    n_ff: int = 768
    n_layer: int = 2
    n_head: int = 4
    n_head_kv: int = 2
    n_vocab: int = 1024
    n_ctx: int = 512
    n_head_dim: int = 0  # 0: n_embd / n_head
    pattern: str = "M*-"  # Nemotron-H: M Mamba-2, * attention, E experts, - dense FFN; repeated up to n_layer
    mixture: Mixture | None = None  # n_ff is the size of one expert
    mamba: Mamba | None = None
    rwkv: Rwkv | None = None
    tied: bool = False  # the embedding is also the output matrix
    type: str = "F16"
    active: float = 0.10  # mean active fraction
    hot_share: float = 0.22  # share of the neurons that make 80 % of the activations
    rank: float = 0.125  # rank of the first FFN matrix as a share of n_embd
    remainder: float = 0.04  # share of its variance that is not low-rank
    output: float = 0.03  # size of attention and FFN outputs relative to the stream they are added to
    seed: int = 1
    n_threads: int = 0  # 0: all cores; the file does not depend on it

    @property
    def ffn_activation(self) -> str:
        """The activation of the FFN."""
        return self.activation or ARCHITECTURES[self.arch]

    @property
    def gated(self) -> bool:
        """Whether there is a gate matrix."""
        return self.ffn_activation in ("reglu", "drelu")

    @property
    def kinds(self) -> str:
        """A letter for each layer: those of ``pattern``, R in RWKV, else B for attention and FFN."""
        if self.arch in NEMOTRON:
            repeated = self.pattern * (self.n_layer // len(self.pattern) + 1)
            windows = [repeated[first : first + self.n_layer] for first in range(len(self.pattern))]
            # A few layers of a long pattern: the first ones that have every kind.
            return next((window for window in windows if set(window) == set(self.pattern)), windows[0])
        return ("R" if self.arch == "rwkv7" else "B") * self.n_layer

    @property
    def head_dim(self) -> int:
        """Size of an attention head."""
        return self.n_head_dim or self.n_embd // self.n_head

    @property
    def biased(self) -> bool:
        """Whether linear layers have biases (OPT)."""
        return self.arch == "gpt2"

    @property
    def layer_norm(self) -> bool:
        """LayerNorm with bias instead of RMSNorm."""
        return self.arch in ("gpt2", "falcon", "rwkv7")

    def check(self) -> None:
        """Raises ValueError if no model can have these options."""
        if self.arch not in ARCHITECTURES:
            raise ValueError(f"unknown architecture {self.arch}: one of {', '.join(ARCHITECTURES)}")
        if self.ffn_activation not in ("relu", "relu2", "reglu", "drelu"):
            raise ValueError(f"unknown activation {self.ffn_activation}: relu, relu2, reglu or drelu")
        if self.gated != (self.arch in GATED):
            raise ValueError(
                f"{self.arch} has {'a' if self.arch in GATED else 'no'} gate, {self.ffn_activation} differs"
            )
        if self.type not in TYPES:
            raise ValueError(f"unknown type {self.type}: one of {', '.join(TYPES)}")
        if (self.n_embd % self.n_head and not self.n_head_dim) or self.n_head % self.n_head_kv or self.head_dim % 2:
            raise ValueError(
                f"{self.n_head} heads and {self.n_head_kv} key/value heads do not divide n_embd {self.n_embd}"
            )
        if self.arch != "llama" and (self.mixture is not None) != (self.arch in ("nemotron_h_moe", "smallthinker")):
            raise ValueError(f"{self.arch} has {'no' if self.mixture else 'a'} mixture of experts")
        if self.mixture is not None and not 0 < 2 * self.mixture.n_expert_used <= self.mixture.n_expert:
            raise ValueError(
                f"{self.mixture.n_expert_used} experts of {self.mixture.n_expert}: at most half can be used"
            )
        if (self.arch in NEMOTRON) != (self.mamba is not None) or (self.arch == "rwkv7") != (self.rwkv is not None):
            raise ValueError(f"{self.arch} with the sizes of another architecture")
        ffn = {"nemotron_h": "-", "nemotron_h_moe": "E"}.get(self.arch)
        if ffn and set(self.kinds) != set(f"M*{ffn}"):  # libllama aborts if one of its two memories is empty
            raise ValueError(f"layers {self.kinds}: {self.arch} needs at least one each of M, * and {ffn}")
        if self.n_vocab < 257:
            raise ValueError(f"the vocabulary needs at least 257 tokens, not {self.n_vocab}")
        if not 0 < self.active < 0.5 or not 0 < self.hot_share < 0.8:
            raise ValueError("active must be between 0 and 0.5, hot share between 0 and 0.8")


def _preset(arch: str, shape: tuple[int, ...], tied: bool = False, **more: Any) -> SynthOptions:
    n_embd, n_ff, n_layer, n_head, n_head_kv, n_vocab, n_ctx = shape
    return SynthOptions(
        arch=arch,
        n_embd=n_embd,
        n_ff=n_ff,
        n_layer=n_layer,
        n_head=n_head,
        n_head_kv=n_head_kv,
        n_vocab=n_vocab,
        n_ctx=n_ctx,
        tied=tied,
        **more,
    )


PRESETS = {
    "afm-4.5b": _preset("arcee", (2560, 18432, 36, 20, 4, 128004, 65536)),
    "llama-7b": _preset("llama", (4096, 11008, 32, 32, 32, 32000, 4096)),
    "falcon-7b": _preset("falcon", (4544, 18176, 32, 71, 1, 65024, 2048)),
    "opt-6.7b": _preset("gpt2", (4096, 16384, 32, 32, 32, 50272, 2048), tied=True),
    "opt-30b": _preset("gpt2", (7168, 28672, 48, 56, 56, 50272, 2048), tied=True),
    "falcon-40b": _preset("falcon", (8192, 32768, 60, 128, 8, 65024, 2048)),
    "llama-70b": _preset("llama", (8192, 28672, 80, 64, 8, 32000, 4096)),
    "nemotron-3-nano": _preset(
        "nemotron_h_moe",
        (2688, 1856, 52, 32, 2, 131072, 262144),
        n_head_dim=128,
        pattern="MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
        mixture=Mixture(128, 6, n_ff_shared=3712, weights_scale=2.5),
        mamba=Mamba(n_inner=4096, n_head=64),
    ),
    "nemotron-h-9b": _preset(
        "nemotron_h",
        (4480, 15680, 56, 40, 8, 131072, 131072),
        n_head_dim=128,
        pattern="M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-",
        mamba=Mamba(n_inner=10240, n_head=128),
    ),
    "smallthinker-21b": _preset(
        "smallthinker",
        (2560, 768, 52, 28, 4, 151936, 16384),
        n_head_dim=128,
        mixture=Mixture(64, 6),
        active=0.40,
        hot_share=0.55,
    ),
    "turbosparse-mixtral": _preset(
        "llama",
        (4096, 14336, 32, 32, 8, 32000, 32768),
        activation="drelu",
        mixture=Mixture(8, 2, hot_share=0.7),
    ),
    "rwkv7-7.2b": _preset(
        "rwkv7",
        (4096, 16384, 32, 64, 64, 65536, 1048576),
        rwkv=Rwkv(decay=128, rate=128, value=96, gate=480),
        active=0.12,
    ),
}


# -- activity ----------------------------------------------------------------------------------------------------------


def frequency_profile(n_ff: int, active: float, hot_share: float) -> NDArray[np.float64]:
    """Descending frequencies [n_ff] with mean ``active``; the first ``hot_share`` of them make 80 % of the activations.

    The law is p(t) = min(0.95, scale * (t + 0.01) ** -slope) over the relative rank t.
    """
    t = (np.arange(n_ff) + 0.5) / n_ff

    def profile(slope: float) -> NDArray[np.float64]:
        shape = (t + 0.01) ** -slope
        low, high = 0.0, 1e6
        for _ in range(200):
            scale = (low + high) / 2
            low, high = (low, scale) if np.minimum(MAX_FREQUENCY, scale * shape).mean() > active else (scale, high)
        return np.minimum(MAX_FREQUENCY, scale * shape)

    low, high = 0.0, 12.0
    n_hot = max(1, round(hot_share * n_ff))
    for _ in range(60):
        slope = (low + high) / 2
        p = profile(slope)
        low, high = (low, slope) if p[:n_hot].sum() > 0.8 * p.sum() else (slope, high)
    return np.clip(profile(slope), 1e-6, MAX_FREQUENCY)


@dataclass(frozen=True)
class Activity:
    """The planted activity of FFNs of one size: frequencies by rank, and values derived from them."""

    options: SynthOptions
    frequency: NDArray[np.float64]  # [n_ff] descending
    threshold: NDArray[np.float64]  # [n_ff] in standard deviations of the first product
    mean: NDArray[np.float64]  # [n_ff] E f
    power: float  # sum over neurons of E f^2

    @staticmethod
    def plan(options: SynthOptions, n_ff: int = 0) -> Activity:
        """Solves for the thresholds and integrates the moments of the neurons' outputs; 0: the options' own n_ff."""
        from scipy.special import ndtri

        p = frequency_profile(n_ff or options.n_ff, options.active, options.hot_share)
        # In drelu gate and up must both be positive. They are independent, so each fires with the square root.
        threshold = -ndtri(np.sqrt(p) if options.ffn_activation == "drelu" else p)
        grid = ndtri((np.arange(512) + 0.5) / 512)
        mean, square = np.empty(len(p)), np.empty(len(p))
        for low in range(0, len(p), 256):
            z = np.maximum(0.0, grid[None, :] - threshold[low : low + 256, None])
            f = z**2 if options.ffn_activation == "relu2" else z
            mean[low : low + 256], square[low : low + 256] = f.mean(1), (f**2).mean(1)
        if options.ffn_activation == "reglu":
            mean[:] = 0.0  # times up, which is symmetric
        if options.ffn_activation == "drelu":
            mean, square = mean**2, square**2
        return Activity(options, p, threshold, mean, float(square.sum()))

    def order(self, layer: int, *expert: int) -> NDArray[np.int64]:
        """The rank of each neuron in a layer, or in one of its routed experts: neuron i has frequency[order[i]]."""
        return _rng(self.options.seed, 1_000_000 + layer, *expert).permutation(len(self.frequency))


@dataclass(frozen=True)
class Routing:
    """The planted routing: by rank, how often each expert is chosen, and what the router adds to its noise for that."""

    options: SynthOptions
    frequency: NDArray[np.float64]  # [n_expert], its sum is n_expert_used
    favour: NDArray[np.float64]  # [n_expert] in standard deviations of the router's noise

    @staticmethod
    def plan(options: SynthOptions) -> Routing:
        """Wanted frequencies from the power law; those that result are counted in random draws."""
        from scipy.special import ndtri

        m = options.mixture
        assert m is not None
        favour = ndtri(frequency_profile(m.n_expert, m.n_expert_used / m.n_expert, m.hot_share))
        scores = _rng(options.seed, 997).standard_normal((DRAWS, m.n_expert)) + favour
        chosen = np.argpartition(-scores, m.n_expert_used - 1, axis=1)[:, : m.n_expert_used]
        return Routing(options, np.bincount(chosen.ravel(), minlength=m.n_expert) / DRAWS, favour)

    def order(self, layer: int) -> NDArray[np.int64]:
        """The rank of each expert in a layer."""
        return _rng(self.options.seed, 3_000_000 + layer).permutation(len(self.frequency))


def common_share(options: SynthOptions, layer: int) -> float:
    """Share of the FFN input's norm along u. It falls as the outputs of earlier layers are added to the stream."""
    added = layer if options.arch in ("falcon", *NEMOTRON) else layer + 0.5
    positions = POSITION**2 if options.arch == "gpt2" else 0.0
    return COMMON / float(np.sqrt(1 + positions + added * options.output**2))


def planted_frequencies(path: Path) -> list[Array]:
    """The planted firing frequencies [n_ff] of each dense FFN or shared expert, of a file written by this script."""
    return list(_planted(path, "frequency").values())


def planted_routing(path: Path) -> dict[int, Array]:
    """For each layer with experts, how often a token chooses each, [n_expert]."""
    return _planted(path, "routing")


def planted_expert_frequencies(path: Path) -> dict[int, Array]:
    """For each layer with experts, how often their neurons fire when the expert is chosen, [n_expert, n_ff]."""
    n_expert = {layer: len(routing) for layer, routing in planted_routing(path).items()}
    return {layer: p.reshape(n_expert[layer], -1) for layer, p in _planted(path, "expert_frequency").items()}


def _planted(path: Path, what: str) -> dict[int, Array]:
    import gguf

    prefix = f"pinfer.synth.{what}."
    fields = gguf.GGUFReader(str(path)).fields
    return {
        int(key.removeprefix(prefix)): np.frombuffer(base64.b64decode(field.contents()), "<f4")
        for key, field in fields.items()
        if key.startswith(prefix)
    }


# -- tensors -----------------------------------------------------------------------------------------------------------


def _rng(seed: int, *key: int) -> np.random.Generator:
    return np.random.Generator(np.random.SFC64(np.random.SeedSequence((seed, *key))))


def _noise(rng: np.random.Generator, rows: int, columns: int) -> Array:
    return rng.standard_normal((rows, columns), dtype=np.float32)


def _unit_rows(x: Array, u: Array) -> Array:
    """Rows of norm 1 without a component along u."""
    x -= np.outer(x @ u, u)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    return x


RowMaker = Callable[[np.random.Generator, int, int], Array]  # (rng, first row, number of rows) -> rows


@dataclass(frozen=True)
class Plan:
    """One tensor of the file: name, shape (rows, columns), GGUF type name, and how its rows are made."""

    name: str
    rows: int  # 0: a vector
    columns: int
    type: str
    make: RowMaker
    shape: tuple[int, ...] = ()  # rows first, where it is not (rows, columns)


class Model:
    """All tensors of a synthetic model as plans; nothing is generated before it is written."""

    def __init__(self, options: SynthOptions) -> None:
        self.options = options
        # Values of one layer are computed with its first rows and kept for a few layers only.
        self._ranks = functools.lru_cache(maxsize=16)(
            lambda n_ff, layer, *expert: self.activity(n_ff).order(layer, *expert)
        )
        self.activity = functools.lru_cache(maxsize=2)(lambda n_ff: Activity.plan(options, n_ff))
        self._basis = functools.lru_cache(maxsize=4)(self._make_basis)
        u = _rng(options.seed, 999).standard_normal(options.n_embd)
        u -= u.mean()  # LayerNorm would remove a mean
        self.u: Array = (u / np.linalg.norm(u)).astype(np.float32)
        # Signs of a tied head. Without them the model repeats its last token for ever. They turn u into another
        # direction, in which embeddings must not have a component, or a few tokens would always win.
        self.signs: Array = _rng(options.seed, 998).choice(np.array([-1, 1], np.float32), options.n_embd)
        turned = self.signs * self.u
        turned -= (turned @ self.u) * self.u
        self.turned: Array = turned / np.linalg.norm(turned)

    @functools.cached_property
    def routing(self) -> Routing:
        """The planted routing."""
        return Routing.plan(self.options)

    def plans(self) -> list[Plan]:
        """The tensors in file order."""
        o = self.options
        n = o.n_embd
        plans = [Plan("token_embd.weight", o.n_vocab, n, matrix_type(o.type, n), self._embedding)]
        if o.arch == "gpt2":
            plans.append(Plan("position_embd.weight", o.n_ctx, n, "F32", self._scaled_noise(POSITION, n)))
        if o.arch == "rwkv7":
            plans += self._norm("token_embd_norm")
        for layer, kind in enumerate(o.kinds):
            if kind == "R":
                plans += self._rwkv(layer)
                continue
            plans += self._norm(f"blk.{layer}.attn_norm")
            if kind == "M":
                plans += self._mamba(layer)
            if kind in "*B":
                plans += self._attention(layer)
            if kind == "B" and o.arch != "falcon":
                plans += self._norm(f"blk.{layer}.ffn_norm")
            if kind in "EB" and o.mixture is not None:
                plans += self._experts(layer, o.mixture)
            elif kind in "-B":
                plans += self._ffn(layer)
        plans += self._norm("output_norm", flip=o.tied)
        if not o.tied:
            plans.append(Plan("output.weight", o.n_vocab, n, matrix_type(o.type, n), self._row_of_norm(LOGIT_SCALE)))
        return plans

    def _embedding(self, rng: np.random.Generator, first: int, count: int) -> Array:
        x = _noise(rng, count, self.options.n_embd)
        x -= np.outer(x @ self.turned, self.turned)
        x = _unit_rows(x, self.u) * np.float32(np.sqrt(1 - COMMON**2))
        return (x + np.float32(COMMON) * self.u) * np.float32(np.sqrt(self.options.n_embd))

    def _row_of_norm(self, norm: float) -> RowMaker:
        """Rows without component along u, of the given norm, the spread of their product with a normed input."""

        def make(rng: np.random.Generator, first: int, count: int) -> Array:
            return _unit_rows(_noise(rng, count, self.options.n_embd), self.u) * np.float32(norm)

        return make

    def _scaled_noise(self, scale: float, columns: int) -> RowMaker:
        def make(rng: np.random.Generator, first: int, count: int) -> Array:
            return _noise(rng, count, columns) * np.float32(scale)

        return make

    def _norm(self, name: str, flip: bool = False) -> list[Plan]:
        """A norm of ones, or of the signs of a tied head."""
        n = self.options.n_embd

        def ones(rng: np.random.Generator, first: int, count: int) -> Array:
            if not flip:
                return np.ones((1, n), np.float32)
            return self.signs[None, :] * np.float32(LOGIT_SCALE / np.sqrt(n))

        plans = [Plan(f"{name}.weight", 0, n, "F32", ones)]
        if self.options.layer_norm:
            plans.append(self._bias(f"{name}.bias", n, 0.0))
        return plans

    def _bias(self, name: str, n: int, scale: float) -> Plan:
        return Plan(name, 0, n, "F32", self._scaled_noise(scale, n))

    def _attention(self, layer: int) -> list[Plan]:
        o = self.options
        n, n_q, n_kv = o.n_embd, o.head_dim * o.n_head, o.head_dim * o.n_head_kv
        blk = f"blk.{layer}"
        kind = matrix_type(o.type, n)
        plans = self._norm(f"{blk}.attn_norm_2") if o.arch == "falcon" and o.n_head_kv > 1 else []
        unit = self._row_of_norm(1.0)
        if o.arch not in ("gpt2", "falcon"):
            for name, rows in (("q", n_q), ("k", n_kv), ("v", n_kv)):
                plans.append(Plan(f"{blk}.attn_{name}.weight", rows, n, kind, unit))
        else:
            plans.append(Plan(f"{blk}.attn_qkv.weight", n + 2 * n_kv, n, kind, unit))
            if o.biased:
                plans.append(self._bias(f"{blk}.attn_qkv.bias", n + 2 * n_kv, 0.02))
        out = self._scaled_noise(o.output / np.sqrt(n_q), n_q)
        plans.append(Plan(f"{blk}.attn_output.weight", n, n_q, matrix_type(o.type, n_q), out))
        if o.biased:
            plans.append(self._bias(f"{blk}.attn_output.bias", n, 0.001))
        return plans

    def _ffn(self, layer: int) -> list[Plan]:
        o = self.options
        blk = f"blk.{layer}"
        first = self._first_matrix(layer, 0, o.n_ff)
        kind = matrix_type(o.type, o.n_embd)
        plans = []
        if o.gated:
            plans.append(Plan(f"{blk}.ffn_gate.weight", o.n_ff, o.n_embd, kind, first))
            both = o.ffn_activation == "drelu"
            up = (
                self._first_matrix(layer, 1, o.n_ff)
                if both
                else self._row_of_norm(1 / np.sqrt(1 - common_share(o, layer) ** 2))
            )
            plans.append(Plan(f"{blk}.ffn_up.weight", o.n_ff, o.n_embd, kind, up))
        else:
            plans.append(Plan(f"{blk}.ffn_up.weight", o.n_ff, o.n_embd, kind, first))
        if o.biased:
            plans.append(Plan(f"{blk}.ffn_up.bias", 0, o.n_ff, "F32", self._threshold_bias(layer)))
        plans.append(
            Plan(f"{blk}.ffn_down.weight", o.n_embd, o.n_ff, matrix_type(o.type, o.n_ff), self._down(layer, o.n_ff))
        )
        if o.biased:
            plans.append(self._bias(f"{blk}.ffn_down.bias", o.n_embd, 0.001))
        return plans

    def _experts(self, layer: int, m: Mixture) -> list[Plan]:
        o = self.options
        n, n_ff = o.n_embd, o.n_ff
        blk = f"blk.{layer}"
        kind, down = matrix_type(o.type, n), matrix_type(o.type, n_ff)
        plans = [Plan(f"{blk}.ffn_gate_inp.weight", m.n_expert, n, "F32", self._router(layer))]
        if o.arch == "nemotron_h_moe":
            plans.append(Plan(f"{blk}.exp_probs_b.bias", 0, m.n_expert, "F32", self._scaled_noise(0.0, m.n_expert)))
        stack, first = (m.n_expert, n_ff, n), self._expert_rows(layer, n_ff, self._expert_first)
        if o.gated:
            plans.append(Plan(f"{blk}.ffn_gate_exps.weight", m.n_expert * n_ff, n, kind, first, stack))
        if o.gated and o.ffn_activation != "drelu":
            first = self._row_of_norm(1 / np.sqrt(1 - common_share(o, layer) ** 2))
        plans.append(Plan(f"{blk}.ffn_up_exps.weight", m.n_expert * n_ff, n, kind, first, stack))
        second, stack = self._expert_rows(layer, n, self._expert_down), (m.n_expert, n, n_ff)
        plans.append(Plan(f"{blk}.ffn_down_exps.weight", m.n_expert * n, n_ff, down, second, stack))
        if m.n_ff_shared:
            n_shared = m.n_ff_shared
            first = self._first_matrix(layer, 0, n_shared)
            plans.append(Plan(f"{blk}.ffn_up_shexp.weight", n_shared, n, kind, first))
            second = self._down(layer, n_shared, 2**-0.5)
            plans.append(Plan(f"{blk}.ffn_down_shexp.weight", n, n_shared, matrix_type(o.type, n_shared), second))
        return plans

    def _router(self, layer: int) -> RowMaker:
        """Rows whose products have unit variance and the expert's favour as mean."""
        o = self.options
        # SmallThinker's router sees the stream itself, before the attention.
        common = COMMON if o.arch == "smallthinker" else common_share(o, layer)

        def make(rng: np.random.Generator, first: int, count: int) -> Array:
            x = _unit_rows(_noise(rng, count, o.n_embd), self.u) / np.float32(np.sqrt(1 - common**2))
            favour = self.routing.favour[self.routing.order(layer)][first : first + count]
            return np.asarray(x + np.outer(favour / (common * np.sqrt(o.n_embd)), self.u), np.float32)

        return make

    def _expert_rows(
        self, layer: int, n_rows: int, make_one: Callable[[int, int, np.random.Generator, int, int], Array]
    ) -> RowMaker:
        """Rows of a stack of matrices of ``n_rows`` each; ``make_one(layer, expert, ...)`` makes those of one."""

        def make(rng: np.random.Generator, first: int, count: int) -> Array:
            parts = []
            while count:
                expert, low = divmod(first, n_rows)
                n = min(count, n_rows - low)
                parts.append(make_one(layer, expert, rng, low, n))
                first, count = first + n, count - n
            return np.concatenate(parts)

        return make

    def _expert_first(self, layer: int, expert: int, rng: np.random.Generator, first: int, count: int) -> Array:
        """Rows of an expert's first matrix, of full rank."""
        o = self.options
        common = common_share(o, layer)
        x = _unit_rows(_noise(rng, count, o.n_embd), self.u) / np.float32(np.sqrt(1 - common**2))
        threshold = self.activity(o.n_ff).threshold[self._ranks(o.n_ff, layer, expert)][first : first + count]
        return np.asarray(x - np.outer(threshold / (common * np.sqrt(o.n_embd)), self.u), np.float32)

    def _expert_down(self, layer: int, expert: int, rng: np.random.Generator, first: int, count: int) -> Array:
        """Rows of an expert's down matrix. The sum over the chosen experts has the wanted size."""
        o = self.options
        m = o.mixture
        assert m is not None
        share = m.n_expert_used**0.5 / m.weights_scale * (2**-0.5 if m.n_ff_shared else 1.0)
        return self._down_rows(self._ranks(o.n_ff, layer, expert), o.n_ff, share, rng, count)

    def _mamba(self, layer: int) -> list[Plan]:
        o, m = self.options, self.options.mamba
        assert m is not None
        blk = f"blk.{layer}"
        n, kind = o.n_embd, matrix_type(o.type, o.n_embd)
        # Time steps from 0.001 to 0.1, decays from 1 to 16, as in Mamba-2.
        step = np.logspace(-3, -1, m.n_head)
        out = self._scaled_noise(o.output / np.sqrt(m.n_inner), m.n_inner)
        grouped = (m.n_group, m.n_inner // m.n_group)
        return [
            Plan(f"{blk}.ssm_in.weight", m.n_inner + m.n_mixed + m.n_head, n, kind, self._row_of_norm(1.0)),
            Plan(f"{blk}.ssm_conv1d.weight", m.n_mixed, m.n_conv, "F32", self._scaled_noise(0.5, m.n_conv)),
            self._bias(f"{blk}.ssm_conv1d.bias", m.n_mixed, 0.0),
            self._values(f"{blk}.ssm_dt.bias", np.log(np.expm1(step))),
            self._values(f"{blk}.ssm_a", -np.linspace(1, 16, m.n_head), (m.n_head, 1)),
            self._values(f"{blk}.ssm_d", np.ones(m.n_head), (m.n_head, 1)),
            self._values(f"{blk}.ssm_norm.weight", np.ones(m.n_inner), grouped),
            Plan(f"{blk}.ssm_out.weight", n, m.n_inner, matrix_type(o.type, m.n_inner), out),
        ]

    def _rwkv(self, layer: int) -> list[Plan]:
        """RWKV-7: time mixing of unit size before its output matrix, then the FFN."""
        o, r = self.options, self.options.rwkv
        assert r is not None
        blk = f"blk.{layer}"
        n, n_ff, kind = o.n_embd, o.n_ff, matrix_type(o.type, o.n_embd)
        mix = f"{blk}.time_mix"
        unit = self._row_of_norm(1.0)
        plans = self._norm(f"{blk}.attn_norm") + self._norm(f"{blk}.attn_norm_2") + self._norm(f"{mix}_ln")
        for name in ("receptance", "key", "value"):
            plans.append(Plan(f"{mix}_{name}.weight", n, n, kind, unit))
        plans.append(Plan(f"{mix}_output.weight", n, n, kind, self._scaled_noise(o.output / np.sqrt(n), n)))
        small = "F32" if o.type == "F32" else "F16"  # llama.cpp's quantiser leaves these alone
        # libllama gives the first layer's value matrices, which it does not use, the rank of the rate's.
        for name, rank in (("w", r.decay), ("a", r.rate), ("v", r.value if layer else r.rate), ("g", r.gate)):
            plans.append(Plan(f"{mix}_{name}1.weight", rank, n, small, unit))
            second = self._scaled_noise(1.8 / np.sqrt(rank), rank)  # what comes out of g has unit size
            plans.append(Plan(f"{mix}_{name}2.weight", n, rank, small, second))
            if name != "g":
                plans.append(self._bias(f"{mix}_{name}0.weight", n, 0.5))
        shift = np.full((6, n), SHIFT)
        plans += [
            self._values(f"{mix}_lerp_fused.weight", shift, (6, 1, 1, n)),
            self._values(f"{mix}_k_k.weight", np.ones(n)),
            self._values(f"{mix}_k_a.weight", np.ones(n)),
            self._values(f"{mix}_r_k.weight", np.zeros(n)),
            self._values(f"{blk}.channel_mix_lerp_k.weight", shift[0], (1, 1, n)),
        ]
        spread = float(np.hypot(1 - SHIFT, SHIFT))  # of a mean of two independent tokens
        first, second = self._first_matrix(layer, 0, n_ff, spread), self._down(layer, n_ff, spread**-2)
        plans.append(Plan(f"{blk}.channel_mix_key.weight", n_ff, n, kind, first))
        plans.append(Plan(f"{blk}.channel_mix_value.weight", n, n_ff, matrix_type(o.type, n_ff), second))
        return plans

    def _values(self, name: str, values: NDArray[Any], shape: tuple[int, ...] = ()) -> Plan:
        """A small tensor of given values, in F32."""
        flat = values.reshape(1, -1).astype(np.float32)
        return Plan(name, 0, flat.size, "F32", lambda rng, first, count: flat, shape)

    def _first_matrix(self, layer: int, which: int, n_ff: int, spread: float = 1.0) -> RowMaker:
        """Low-rank rows plus a remainder minus c_i * u: the first product has unit variance and mean -threshold_i.

        ``spread`` is the deviation of an input without u relative to a normed token's: the product has it too.
        """
        o = self.options
        rank = max(1, round(o.rank * o.n_embd))
        common = common_share(o, layer)

        def make(rng: np.random.Generator, first: int, count: int) -> Array:
            x = _noise(rng, count, rank) @ self._basis(layer, which)
            x *= np.float32(np.sqrt((1 - o.remainder) / rank))
            x += _noise(rng, count, o.n_embd) * np.float32(np.sqrt(o.remainder / o.n_embd))
            x = _unit_rows(x, self.u) / np.float32(np.sqrt(1 - common**2))
            threshold = self._thresholds(layer, n_ff)[first : first + count] * np.float32(spread)
            along = threshold / np.float32(common * np.sqrt(o.n_embd))
            return x - np.outer(along, self.u)

        return make

    def _make_basis(self, layer: int, which: int) -> Array:
        rank = max(1, round(self.options.rank * self.options.n_embd))
        rng = _rng(self.options.seed, 2_000_000 + 2 * layer + which)
        return _unit_rows(_noise(rng, rank, self.options.n_embd), self.u)

    def _thresholds(self, layer: int, n_ff: int) -> Array:
        """Of each neuron [n_ff], in standard deviations; where there is a bias, it does one half and u the other."""
        threshold = self.activity(n_ff).threshold[self._ranks(n_ff, layer)].astype(np.float32)
        return threshold / np.float32(2) if self.options.biased else threshold

    def _threshold_bias(self, layer: int) -> RowMaker:
        def make(rng: np.random.Generator, first: int, count: int) -> Array:
            return -self._thresholds(layer, self.options.n_ff)[None, :]

        return make

    def _down(self, layer: int, n_ff: int, share: float = 1.0) -> RowMaker:
        """Noise of ``share`` of the wanted output size."""

        def make(rng: np.random.Generator, first: int, count: int) -> Array:
            return self._down_rows(self._ranks(n_ff, layer), n_ff, share, rng, count)

        return make

    def _down_rows(
        self, ranks: NDArray[np.int64], n_ff: int, share: float, rng: np.random.Generator, count: int
    ) -> Array:
        """Rows whose mean output is zero, since a mean would shift the layers above."""
        activity = self.activity(n_ff)
        x = _noise(rng, count, n_ff)
        mean = activity.mean[ranks].astype(np.float32)
        norm = mean @ mean
        if norm > 0:
            x -= np.outer(x @ mean / norm, mean)
        return np.asarray(x * (self.options.output * share / activity.power**0.5), np.float32)


# -- types -------------------------------------------------------------------------------------------------------------

_BLOCK = {"F32": (1, 4), "F16": (1, 2), "Q8_0": (32, 34), "Q4_0": (32, 18), "Q5_0": (32, 22), "Q4_K": (256, 144)}


def matrix_type(wanted: str, columns: int) -> str:
    """The wanted type, or llama.cpp's fallback if a row does not divide into blocks."""
    for name in (wanted, "Q5_0" if wanted == "Q4_K" else "F16"):
        if columns % _BLOCK[name][0] == 0:
            return name
    return "F16"


def n_bytes(plan: Plan) -> int:
    """Size of a tensor's data in the file."""
    block, size = _BLOCK[plan.type]
    return max(1, plan.rows) * plan.columns // block * size


def encode(rows: Array, kind: str) -> bytes:
    """Rows encoded as a GGUF type."""
    if kind == "F32":
        return np.ascontiguousarray(rows, np.float32).tobytes()
    if kind == "F16":
        return rows.astype(np.float16).tobytes()
    import gguf

    from pinfer.llama import ggml

    block, size = _BLOCK[kind]
    return ggml.quantise(rows, int(gguf.GGMLQuantizationType[kind]), rows.shape[1] // block * size).tobytes()


# -- file --------------------------------------------------------------------------------------------------------------


def _byte_alphabet() -> list[str]:
    """GPT-2's printable characters for the 256 bytes, in byte order."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    other = iter(range(256, 512))
    return [chr(b) if b in plain else chr(next(other)) for b in range(256)]


def vocabulary(n_vocab: int) -> tuple[list[str], list[int], list[str]]:
    """Tokens, token types and merges: bytes, then pairs and triples of letters, then unused ones.

    The merges matter: with bytes alone a text would be a few dozen different tokens, too few to see frequencies in.
    """
    letters = "abcdefghijklmnopqrstuvwxyz"
    tokens = ["<|endoftext|>", *_byte_alphabet()]
    pairs = [f"Ġ {a}" for a in letters] + [f"{a} {b}" for a in letters for b in letters]
    triples = [f"{a}{b} {c}" for a in letters for b in letters for c in letters]
    merges = (pairs + triples)[: max(0, n_vocab - len(tokens))]
    tokens += [merge.replace(" ", "") for merge in merges]
    control, normal, unused = 3, 1, 5
    types = [control] + [normal] * (len(tokens) - 1)
    padding = [f"<unused{n}>" for n in range(n_vocab - len(tokens))]
    return tokens + padding, types + [unused] * len(padding), merges


def write_vocabulary(writer: Any, n_vocab: int) -> None:
    """The vocabulary and the keys of its tokenizer."""
    tokens, types, merges = vocabulary(n_vocab)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(True)


def _metadata(writer: Any, model: Model, name: str) -> None:
    import gguf

    o = model.options
    writer.add_name(name)
    writer.add_file_type(
        gguf.LlamaFileType[{"F32": "ALL_F32", "Q4_K": "MOSTLY_Q4_K_S"}.get(o.type, f"MOSTLY_{o.type}")]
    )
    writer.add_vocab_size(o.n_vocab)
    writer.add_context_length(o.n_ctx)
    writer.add_embedding_length(o.n_embd)
    writer.add_block_count(o.n_layer)
    if o.arch in NEMOTRON:
        # By these two llama.cpp tells a layer's kind.
        writer.add_feed_forward_length([o.n_ff if kind in "E-" else 0 for kind in o.kinds])
        writer.add_head_count_kv([o.n_head_kv if kind == "*" else 0 for kind in o.kinds])
    else:
        writer.add_feed_forward_length(o.n_ff)
    if o.arch == "rwkv7":
        writer.add_head_count(0)
    else:
        writer.add_head_count(o.n_head)
        if o.arch not in NEMOTRON:
            writer.add_head_count_kv(o.n_head_kv)
    if o.layer_norm or o.arch in NEMOTRON:
        writer.add_layer_norm_eps(1e-5)
    if not o.layer_norm:
        writer.add_layer_norm_rms_eps(1e-5)
    if o.arch not in ("gpt2", "rwkv7"):
        writer.add_rope_dimension_count(o.head_dim)
        writer.add_rope_freq_base(10000.0)
    if o.n_head_dim:
        writer.add_key_length(o.head_dim)
        writer.add_value_length(o.head_dim)
    _metadata_of_parts(writer, o)
    writer.add_string("pinfer.ffn.activation", o.ffn_activation)
    writer.add_uint64("pinfer.synth.seed", o.seed)
    for key in ("active", "hot_share", "rank", "remainder", "output"):
        writer.add_float32(f"pinfer.synth.{key}", getattr(o, key))

    def plant(what: str, layer: int, values: NDArray[np.float64]) -> None:
        # A string, not an array: Python readers decode arrays number by number, which is slow.
        writer.add_string(f"pinfer.synth.{what}.{layer}", base64.b64encode(values.astype("<f4").tobytes()).decode())

    for layer, kind in enumerate(o.kinds):
        if kind in "EB" and o.mixture is not None:
            one = model.activity(o.n_ff)
            orders = [one.order(layer, expert) for expert in range(o.mixture.n_expert)]
            plant("routing", layer, model.routing.frequency[model.routing.order(layer)])
            plant("expert_frequency", layer, one.frequency[np.stack(orders)])
        n_ff = 0 if kind in "M*" else o.n_ff if o.mixture is None else o.mixture.n_ff_shared
        if n_ff:
            activity = model.activity(n_ff)
            plant("frequency", layer, activity.frequency[activity.order(layer)])
    write_vocabulary(writer, o.n_vocab)


def _metadata_of_parts(writer: Any, o: SynthOptions) -> None:
    """Sizes of experts and recurrent layers."""
    import gguf

    if o.mixture is not None:
        writer.add_expert_count(o.mixture.n_expert)
        writer.add_expert_used_count(o.mixture.n_expert_used)
        if o.arch != "llama":
            writer.add_expert_feed_forward_length(o.n_ff)
        if o.arch == "smallthinker":
            writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
        if o.arch == "nemotron_h_moe":
            writer.add_expert_shared_count(1)
            writer.add_expert_shared_feed_forward_length(o.mixture.n_ff_shared)
            writer.add_expert_weights_norm(True)
            writer.add_expert_weights_scale(o.mixture.weights_scale)
    if o.mamba is not None:
        writer.add_ssm_conv_kernel(o.mamba.n_conv)
        writer.add_ssm_inner_size(o.mamba.n_inner)
        writer.add_ssm_state_size(o.mamba.n_state)
        writer.add_ssm_time_step_rank(o.mamba.n_head)
        writer.add_ssm_group_count(o.mamba.n_group)
    if o.rwkv is not None:
        writer.add_wkv_head_size(o.rwkv.n_head_dim)
        writer.add_token_shift_count(2)
        writer.add_decay_lora_rank(o.rwkv.decay)
        writer.add_iclr_lora_rank(o.rwkv.rate)
        writer.add_value_residual_mix_lora_rank(o.rwkv.value)
        writer.add_gate_lora_rank(o.rwkv.gate)


def _pieces(plans: list[Plan], seed: int, n_threads: int) -> Iterator[tuple[bytes, bool]]:
    """Pieces of the tensors in file order, with a flag for the last piece of a tensor. A few threads work ahead."""

    def make(number: int, plan: Plan, first: int, count: int) -> bytes:
        # Each piece has its own generator, so the file does not depend on which thread makes it.
        return encode(plan.make(_rng(seed, number, first), first, count), plan.type)

    def jobs() -> Iterator[tuple[int, Plan, int, int]]:
        for number, plan in enumerate(plans):
            rows = max(1, plan.rows)
            step = max(1, CHUNK_ELEMENTS // plan.columns)
            for first in range(0, rows, step):
                yield number, plan, first, min(step, rows - first)

    n_threads = n_threads or os.cpu_count() or 1
    with ThreadPoolExecutor(n_threads) as pool:
        waiting: deque[tuple[Future[bytes], bool]] = deque()
        for job in jobs():
            _, plan, first, count = job
            waiting.append((pool.submit(make, *job), first + count == max(1, plan.rows)))
            if len(waiting) > 2 * n_threads:
                future, last = waiting.popleft()
                yield future.result(), last
        while waiting:
            future, last = waiting.popleft()
            yield future.result(), last


def write_model(path: Path, options: SynthOptions, advance: Callable[[int], None] = lambda n: None) -> None:
    """Writes the model to a temporary name beside ``path`` and renames it; ``advance`` is told the bytes written.

    Raises ValueError for impossible shapes and OSError when the disk has too little room.
    """
    import gguf

    options.check()
    model = Model(options)
    plans = model.plans()
    needed = sum(n_bytes(plan) for plan in plans)
    free = shutil.disk_usage(path.absolute().parent).free
    if free < needed + (64 << 20):
        raise OSError(f"{path} needs {needed / 2**30:.1f} GiB, the disk has {free / 2**30:.1f} GiB free")
    temporary = path.with_name(path.name + ".tmp")
    writer = gguf.GGUFWriter(str(temporary), options.arch)
    try:
        _metadata(writer, model, path.stem)
        for plan in plans:
            kind = gguf.GGMLQuantizationType[plan.type]
            shape = plan.shape or ((plan.rows, plan.columns) if plan.rows else (plan.columns,))
            if plan.type not in ("F32", "F16"):
                shape = gguf.quant_shape_to_byte_shape(shape, kind)
            dtype = np.dtype({"F32": "f4", "F16": "f2"}.get(plan.type, "u1"))
            writer.add_tensor_info(plan.name, shape, dtype, n_bytes(plan), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        assert writer.fout is not None
        file = writer.fout[0]
        file.write(bytes(-file.tell() % writer.data_alignment))
        for data, last in _pieces(plans, options.seed, options.n_threads):
            file.write(data)
            if last:
                file.write(bytes(-file.tell() % writer.data_alignment))
            advance(len(data))
        file.flush()
        os.fsync(file.fileno())
        writer.close()
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(Exception):
            writer.close()
        temporary.unlink(missing_ok=True)
        raise


def size_of(options: SynthOptions) -> int:
    """Bytes of all tensors."""
    return sum(n_bytes(plan) for plan in Model(options).plans())


def _parts(
    arch: str, n_embd: int, n_head: int, n_expert: int, n_expert_used: int, n_ff_shared: int, pattern: str
) -> dict[str, Any]:
    """The options of a custom shape that only some architectures have."""
    parts: dict[str, Any] = {}
    if n_expert:
        shared = n_ff_shared if arch == "nemotron_h_moe" else 0
        parts["mixture"] = Mixture(n_expert, n_expert_used, shared)
    if arch in NEMOTRON:
        parts["mamba"] = Mamba(n_embd, n_head, n_state=64, n_group=1)
        parts["pattern"] = pattern or ("M*E" if arch == "nemotron_h_moe" else "M*-")
    if arch == "rwkv7":
        parts["rwkv"] = Rwkv()
    return parts


def main(
    out: Annotated[Path, typer.Argument(help="GGUF to write")],
    preset: Annotated[str, typer.Option(help=f"one of {', '.join(PRESETS)}; default: a custom shape")] = "",
    type: Annotated[str, typer.Option(help=f"one of {', '.join(TYPES)}")] = "F16",
    arch: Annotated[str, typer.Option(help=f"one of {', '.join(ARCHITECTURES)}")] = "llama",
    activation: Annotated[
        str, typer.Option(help="relu, relu2, reglu or drelu; default: the usual one of the architecture")
    ] = "",
    n_embd: int = 256,
    n_ff: int = 768,
    n_layer: Annotated[int, typer.Option(help="layers; 0: as in the preset, or 2")] = 0,
    n_head: int = 4,
    n_head_kv: int = 2,
    n_vocab: int = 1024,
    n_ctx: int = 512,
    tied: Annotated[bool, typer.Option(help="use the embedding as the output matrix")] = False,
    n_expert: Annotated[int, typer.Option(help="experts; --n-ff is the size of one; 0: no mixture")] = 0,
    n_expert_used: int = 2,
    n_ff_shared: Annotated[int, typer.Option(help="size of the shared expert of nemotron_h_moe")] = 768,
    pattern: Annotated[str, typer.Option(help="layers of Nemotron-H: M Mamba-2, * attention, E experts, - FFN")] = "",
    active: Annotated[
        float, typer.Option(help="mean active fraction of the neurons; 0: as in the preset, or 0.1")
    ] = 0.0,
    hot_share: Annotated[
        float, typer.Option(help="share of the neurons that make 80 % of the activations; 0: as in the preset, or 0.22")
    ] = 0.0,
    rank: Annotated[float, typer.Option(help="rank of the first FFN matrix as a share of n_embd")] = 0.125,
    remainder: Annotated[float, typer.Option(help="share of its variance that is not low-rank")] = 0.04,
    output: Annotated[float, typer.Option(help="size of attention and FFN outputs")] = 0.03,
    seed: int = 1,
    n_threads: Annotated[int, typer.Option(help="0: all cores")] = 0,
) -> None:
    """Write a synthetic model with planted activity."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    planted: dict[str, Any] = {
        "type": type.upper(),
        "rank": rank,
        "remainder": remainder,
        "output": output,
        "seed": seed,
        "n_threads": n_threads,
    }
    planted |= {name: value for name, value in (("active", active), ("hot_share", hot_share)) if value}
    if preset and preset not in PRESETS:
        raise typer.BadParameter(f"unknown preset {preset}: one of {', '.join(PRESETS)}")
    if preset:
        options = dataclasses.replace(PRESETS[preset], **planted)
        if pattern:
            options = dataclasses.replace(options, pattern=pattern, n_layer=len(pattern))
        options = dataclasses.replace(options, n_layer=n_layer or options.n_layer, tied=tied or options.tied)
    else:
        options = SynthOptions(
            arch=arch,
            activation=activation,
            n_embd=n_embd,
            n_ff=n_ff,
            n_layer=n_layer or 2,
            n_head=n_head,
            n_head_kv=n_head_kv,
            n_vocab=n_vocab,
            n_ctx=n_ctx,
            tied=tied,
            **_parts(arch, n_embd, n_head, n_expert, n_expert_used, n_ff_shared, pattern),
            **planted,
        )
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    try:
        options.check()
        with Progress(*columns, console=Console(stderr=True)) as progress:
            task = progress.add_task(out.name, total=size_of(options))
            write_model(out, options, lambda n: progress.advance(task, n))
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(1) from None


if __name__ == "__main__":
    typer.run(main)
