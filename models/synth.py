"""Writes synthetic models with the shape of real ones and planted power-law FFN activity, at any size.

How the activity is planted: every token embedding has a common component along a unit vector u, so every FFN input has
one too. Row i of the first FFN matrix is random noise minus c_i * u, and c_i fixes how often neuron i fires. The noise
is low-rank plus a small remainder, as a predictor can learn nothing from rows without structure. Attention and FFN
outputs are small and have no mean, so the activity stays as planted through the depth.

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
TYPES = ("F32", "F16", "Q8_0", "Q4_0", "Q4_K")
ARCHITECTURES = {"llama": "reglu", "arcee": "relu2", "falcon": "relu", "gpt2": "relu"}


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
    def biased(self) -> bool:
        """Whether linear layers have biases (OPT)."""
        return self.arch == "gpt2"

    @property
    def layer_norm(self) -> bool:
        """LayerNorm with bias instead of RMSNorm."""
        return self.arch in ("gpt2", "falcon")

    def check(self) -> None:
        """Raises ValueError if no model can have these options."""
        if self.arch not in ARCHITECTURES:
            raise ValueError(f"unknown architecture {self.arch}: one of {', '.join(ARCHITECTURES)}")
        if self.ffn_activation not in ("relu", "relu2", "reglu", "drelu"):
            raise ValueError(f"unknown activation {self.ffn_activation}: relu, relu2, reglu or drelu")
        if self.gated != (self.arch == "llama"):
            raise ValueError(
                f"{self.arch} has {'a' if self.arch == 'llama' else 'no'} gate, {self.ffn_activation} differs"
            )
        if self.type not in TYPES:
            raise ValueError(f"unknown type {self.type}: one of {', '.join(TYPES)}")
        if self.n_embd % self.n_head or self.n_head % self.n_head_kv or (self.n_embd // self.n_head) % 2:
            raise ValueError(
                f"{self.n_head} heads and {self.n_head_kv} key/value heads do not divide n_embd {self.n_embd}"
            )
        if self.n_vocab < 257:
            raise ValueError(f"the vocabulary needs at least 257 tokens, not {self.n_vocab}")
        if not 0 < self.active < 0.5 or not 0 < self.hot_share < 0.8:
            raise ValueError("active must be between 0 and 0.5, hot share between 0 and 0.8")


def _preset(arch: str, shape: tuple[int, ...], tied: bool = False) -> SynthOptions:
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
    )


PRESETS = {
    "afm-4.5b": _preset("arcee", (2560, 18432, 36, 20, 4, 128004, 65536)),
    "llama-7b": _preset("llama", (4096, 11008, 32, 32, 32, 32000, 4096)),
    "falcon-7b": _preset("falcon", (4544, 18176, 32, 71, 1, 65024, 2048)),
    "opt-6.7b": _preset("gpt2", (4096, 16384, 32, 32, 32, 50272, 2048), tied=True),
    "opt-30b": _preset("gpt2", (7168, 28672, 48, 56, 56, 50272, 2048), tied=True),
    "falcon-40b": _preset("falcon", (8192, 32768, 60, 128, 8, 65024, 2048)),
    "llama-70b": _preset("llama", (8192, 28672, 80, 64, 8, 32000, 4096)),
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
    """The planted activity: frequencies by rank, values derived from them, and each neuron's rank in each layer."""

    options: SynthOptions
    frequency: NDArray[np.float64]  # [n_ff] descending
    threshold: NDArray[np.float64]  # [n_ff] in standard deviations of the first product
    mean: NDArray[np.float64]  # [n_ff] E f
    power: float  # sum over neurons of E f^2

    @staticmethod
    def plan(options: SynthOptions) -> Activity:
        """Solves for the thresholds and integrates the moments of the neurons' outputs."""
        from scipy.special import ndtri

        p = frequency_profile(options.n_ff, options.active, options.hot_share)
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

    def order(self, layer: int) -> NDArray[np.int64]:
        """The rank of each neuron in a layer: neuron i has frequency[order[i]]."""
        return _rng(self.options.seed, 1_000_000 + layer).permutation(self.options.n_ff)


def common_share(options: SynthOptions, layer: int) -> float:
    """Share of the FFN input's norm along u. It falls as the outputs of earlier layers are added to the stream."""
    added = layer if options.arch == "falcon" else layer + 0.5
    positions = POSITION**2 if options.arch == "gpt2" else 0.0
    return COMMON / float(np.sqrt(1 + positions + added * options.output**2))


def planted_frequencies(path: Path) -> list[Array]:
    """The planted firing frequencies [n_ff] of each layer, read from a file written by this script."""
    import gguf

    reader = gguf.GGUFReader(str(path))
    layers: list[Array] = []
    while (field := reader.fields.get(f"pinfer.synth.frequency.{len(layers)}")) is not None:
        layers.append(np.frombuffer(base64.b64decode(field.contents()), "<f4"))
    return layers


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


class Model:
    """All tensors of a synthetic model as plans; nothing is generated before it is written."""

    def __init__(self, options: SynthOptions) -> None:
        self.options = options
        # Values of one layer are computed with its first rows and kept for a few layers only.
        self._ranks = functools.lru_cache(maxsize=4)(lambda layer: self.activity.order(layer))
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
    def activity(self) -> Activity:
        """The planted activity."""
        return Activity.plan(self.options)

    def plans(self) -> list[Plan]:
        """The tensors in file order."""
        o = self.options
        n = o.n_embd
        plans = [Plan("token_embd.weight", o.n_vocab, n, matrix_type(o.type, n), self._embedding)]
        if o.arch == "gpt2":
            plans.append(Plan("position_embd.weight", o.n_ctx, n, "F32", self._scaled_noise(POSITION, n)))
        for layer in range(o.n_layer):
            plans += self._attention(layer) + self._ffn(layer)
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
        n, n_kv = o.n_embd, o.n_embd // o.n_head * o.n_head_kv
        blk = f"blk.{layer}"
        kind = matrix_type(o.type, n)
        plans = self._norm(f"{blk}.attn_norm")
        if o.arch == "falcon" and o.n_head_kv > 1:
            plans += self._norm(f"{blk}.attn_norm_2")
        unit = self._row_of_norm(1.0)
        if o.arch in ("llama", "arcee"):
            for name, rows in (("q", n), ("k", n_kv), ("v", n_kv)):
                plans.append(Plan(f"{blk}.attn_{name}.weight", rows, n, kind, unit))
        else:
            plans.append(Plan(f"{blk}.attn_qkv.weight", n + 2 * n_kv, n, kind, unit))
            if o.biased:
                plans.append(self._bias(f"{blk}.attn_qkv.bias", n + 2 * n_kv, 0.02))
        plans.append(Plan(f"{blk}.attn_output.weight", n, n, kind, self._scaled_noise(o.output / np.sqrt(n), n)))
        if o.biased:
            plans.append(self._bias(f"{blk}.attn_output.bias", n, 0.001))
        if o.arch != "falcon":
            plans += self._norm(f"{blk}.ffn_norm")
        return plans

    def _ffn(self, layer: int) -> list[Plan]:
        o = self.options
        blk = f"blk.{layer}"
        first = self._first_matrix(layer, 0)
        kind = matrix_type(o.type, o.n_embd)
        plans = []
        if o.gated:
            plans.append(Plan(f"{blk}.ffn_gate.weight", o.n_ff, o.n_embd, kind, first))
            both = o.ffn_activation == "drelu"
            up = (
                self._first_matrix(layer, 1)
                if both
                else self._row_of_norm(1 / np.sqrt(1 - common_share(o, layer) ** 2))
            )
            plans.append(Plan(f"{blk}.ffn_up.weight", o.n_ff, o.n_embd, kind, up))
        else:
            plans.append(Plan(f"{blk}.ffn_up.weight", o.n_ff, o.n_embd, kind, first))
        if o.biased:
            plans.append(Plan(f"{blk}.ffn_up.bias", 0, o.n_ff, "F32", self._threshold_bias(layer)))
        plans.append(Plan(f"{blk}.ffn_down.weight", o.n_embd, o.n_ff, matrix_type(o.type, o.n_ff), self._down(layer)))
        if o.biased:
            plans.append(self._bias(f"{blk}.ffn_down.bias", o.n_embd, 0.001))
        return plans

    def _first_matrix(self, layer: int, which: int) -> RowMaker:
        """Low-rank rows plus a remainder minus c_i * u: the first product has unit variance and mean -threshold_i."""
        o = self.options
        rank = max(1, round(o.rank * o.n_embd))
        common = common_share(o, layer)

        def make(rng: np.random.Generator, first: int, count: int) -> Array:
            x = _noise(rng, count, rank) @ self._basis(layer, which)
            x *= np.float32(np.sqrt((1 - o.remainder) / rank))
            x += _noise(rng, count, o.n_embd) * np.float32(np.sqrt(o.remainder / o.n_embd))
            x = _unit_rows(x, self.u) / np.float32(np.sqrt(1 - common**2))
            along = self._thresholds(layer)[first : first + count] / np.float32(common * np.sqrt(o.n_embd))
            return x - np.outer(along, self.u)

        return make

    def _make_basis(self, layer: int, which: int) -> Array:
        rank = max(1, round(self.options.rank * self.options.n_embd))
        rng = _rng(self.options.seed, 2_000_000 + 2 * layer + which)
        return _unit_rows(_noise(rng, rank, self.options.n_embd), self.u)

    def _thresholds(self, layer: int) -> Array:
        """Of each neuron [n_ff], in standard deviations; where there is a bias, it does one half and u the other."""
        threshold = self.activity.threshold[self._ranks(layer)].astype(np.float32)
        return threshold / np.float32(2) if self.options.biased else threshold

    def _threshold_bias(self, layer: int) -> RowMaker:
        def make(rng: np.random.Generator, first: int, count: int) -> Array:
            return -self._thresholds(layer)[None, :]

        return make

    def _down(self, layer: int) -> RowMaker:
        """Noise of the wanted output size. Its mean output is zero, since a mean would shift the layers above."""
        o = self.options

        def make(rng: np.random.Generator, first: int, count: int) -> Array:
            x = _noise(rng, count, o.n_ff)
            mean = self.activity.mean[self._ranks(layer)].astype(np.float32)
            norm = mean @ mean
            if norm > 0:
                x -= np.outer(x @ mean / norm, mean)
            return np.asarray(x * (o.output / self.activity.power**0.5), np.float32)

        return make


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


def _metadata(writer: Any, options: SynthOptions, activity: Activity, name: str) -> None:
    import gguf

    o = options
    writer.add_name(name)
    writer.add_file_type(
        gguf.LlamaFileType[{"F32": "ALL_F32", "Q4_K": "MOSTLY_Q4_K_S"}.get(o.type, f"MOSTLY_{o.type}")]
    )
    writer.add_vocab_size(o.n_vocab)
    writer.add_context_length(o.n_ctx)
    writer.add_embedding_length(o.n_embd)
    writer.add_block_count(o.n_layer)
    writer.add_feed_forward_length(o.n_ff)
    writer.add_head_count(o.n_head)
    writer.add_head_count_kv(o.n_head_kv)
    if o.layer_norm:
        writer.add_layer_norm_eps(1e-5)
    else:
        writer.add_layer_norm_rms_eps(1e-5)
    if o.arch != "gpt2":
        writer.add_rope_dimension_count(o.n_embd // o.n_head)
        writer.add_rope_freq_base(10000.0)
    writer.add_string("pinfer.ffn.activation", o.ffn_activation)
    writer.add_uint64("pinfer.synth.seed", o.seed)
    for key in ("active", "hot_share", "rank", "remainder", "output"):
        writer.add_float32(f"pinfer.synth.{key}", getattr(o, key))
    for layer in range(o.n_layer):
        # A string, not an array: Python readers decode arrays number by number, which is slow.
        frequency = activity.frequency[activity.order(layer)].astype("<f4")
        writer.add_string(f"pinfer.synth.frequency.{layer}", base64.b64encode(frequency.tobytes()).decode())
    tokens, types, merges = vocabulary(o.n_vocab)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(True)


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
        _metadata(writer, options, model.activity, path.stem)
        for plan in plans:
            kind = gguf.GGMLQuantizationType[plan.type]
            shape: tuple[int, ...] = (plan.rows, plan.columns) if plan.rows else (plan.columns,)
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
    active: Annotated[float, typer.Option(help="mean active fraction of the neurons")] = 0.10,
    hot_share: Annotated[float, typer.Option(help="share of the neurons that make 80 % of the activations")] = 0.22,
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
        "active": active,
        "hot_share": hot_share,
        "rank": rank,
        "remainder": remainder,
        "output": output,
        "seed": seed,
        "n_threads": n_threads,
    }
    if preset and preset not in PRESETS:
        raise typer.BadParameter(f"unknown preset {preset}: one of {', '.join(PRESETS)}")
    if preset:
        options = dataclasses.replace(PRESETS[preset], **planted)
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
