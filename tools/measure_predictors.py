"""Compares the kinds of predictors at equal size: prints the tables of docs/predictors.md.

``python tools/measure_predictors.py models/tiny-relu2.gguf models/tiny-reglu.gguf`` takes several minutes. Profile the
models first (``pinfer profile MODEL --dataset tests/data/profile.txt``). Trained kinds are slow on wide layers; limit
them with, for example, ``--layers 1,7,14 --budgets 1 --epochs 8``.
"""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pinfer.artefacts import paths
from pinfer.artefacts.predictor import quantised
from pinfer.artefacts.profile import SamplesFile
from pinfer.gguf_io.reader import row_bytes
from pinfer.model import open_model
from pinfer.predictors.data import HeldBack, LayerData, parts
from pinfer.predictors.few_bits import compensation, few_bits
from pinfer.predictors.fitting import SCATTERED_COST
from pinfer.predictors.low_rank import Spectrum, covariance
from pinfer.predictors.thresholds import calibrate

Matrix = NDArray[np.float32]

RECALLS = (0.99, 0.995)

# Types of A and B that the closed form is measured with. Trained kinds only use the types that suit it best.
FACTORS = (("f16", "f16"), ("q8_0", "q8_0"), ("q8_0", "q4_0"), ("q4_0", "q4_0"))
TRAINED_FACTORS = ("q4_0", "q4_0")
BLOCK = 32

_BATCH = 256


@dataclass(frozen=True)
class Layer:
    """A layer and its samples, split for the fit, the thresholds and the measurement."""

    data: LayerData
    fit: Matrix
    held: HeldBack
    tested: HeldBack

    @property
    def shape(self) -> tuple[int, int]:
        """n_ff and n_embd."""
        n_ff, n_embd = self.data.weight.shape
        return n_ff, n_embd


@dataclass(frozen=True)
class Kind:
    """A predictor that computes scores but has no thresholds yet."""

    name: str
    rank: int
    """0 for kinds without factors"""
    n_bytes: int
    """bytes read per token, including the thresholds"""
    score: Callable[[Matrix], Matrix]
    offset: Matrix | None = None
    """``[n_ff]``, for kinds whose scores are logits: a neuron fires with probability sigmoid(score + offset)"""


@dataclass(frozen=True)
class Found:
    """Result of a kind at one recall. ``candidates`` is a share of the neurons, ``cost`` is relative to exact mode."""

    recall: float
    candidates: float
    cost: float


def judge(layer: Layer, kind: Kind, recall: float, judged: HeldBack | None = None) -> Found:
    """Calibrates ``kind`` on ``layer.held`` and measures it on ``judged``, by default ``layer.tested``."""
    data, judged = layer.data, judged or layer.tested
    scores = kind.score(layer.held.x)
    t = calibrate(scores, layer.held, data, recall)
    if kind.offset is not None:
        by_odds = calibrate_odds(scores, layer.held, kind.offset, recall)
        t = min(t, by_odds, key=lambda each: int(np.count_nonzero(scores > each)))
    named = kind.score(judged.x) > t
    n_fired = np.count_nonzero(judged.mass) / len(named)
    n_found = np.count_nonzero(named & (judged.mass > 0)) / len(named)
    rows = np.count_nonzero(named) / len(named) * data.first_bytes + n_found * data.rest_bytes
    exact = len(data.weight) * data.first_bytes + SCATTERED_COST * n_fired * data.rest_bytes
    return Found(judged.recall(named), float(named.mean()), (kind.n_bytes + SCATTERED_COST * rows) / exact)


def calibrate_odds(scores: Matrix, held: HeldBack, offset: Matrix, recall: float) -> Matrix:
    """Thresholds for logits: a neuron is a candidate if its firing probability times its mean mass exceeds a price.

    The mean mass is that of the samples on which the neuron fires. The price is the highest that keeps ``recall``.
    """
    fired = held.mass > 0
    mean = (held.mass.sum(axis=0, dtype=np.float64) + 1e-30) / np.maximum(fired.sum(axis=0), 1)
    value = -np.log1p(np.exp(-np.clip(scores + offset, -80, 80))) + np.log(mean)
    order = np.argsort(-value[fired])
    kept = np.cumsum(held.mass[fired][order], dtype=np.float64)
    price = np.exp(value[fired][order][min(int(np.searchsorted(kept, recall * kept[-1])), len(kept) - 1)])
    share = price / mean
    t = np.where(share < 1, np.log(share / np.maximum(1 - share, 1e-30)), 80) - offset
    return np.nextafter(t.astype(np.float32), np.float32(-np.inf))


# -- the closed form ---------------------------------------------------------------------------------------------------


def factor_bytes(layer: Layer, rank: int, types: tuple[str, str]) -> int:
    """Bytes of both factors and the thresholds."""
    n_ff, n_embd = layer.shape
    return rank * row_bytes(types[0], n_embd) + n_ff * (row_bytes(types[1], rank) + 4)


def of_factors(layer: Layer, name: str, a: Matrix, b: Matrix, types: tuple[str, str], *, relu: bool = False) -> Kind:
    """Scores B A x, or B relu(A x), with the factors rounded as they would be stored."""
    a, b = quantised(np.ascontiguousarray(a), types[0]), quantised(np.ascontiguousarray(b), types[1])

    def score(x: Matrix) -> Matrix:
        hidden: Matrix = x @ a.T
        return (np.maximum(hidden, 0, out=hidden) if relu else hidden) @ b.T

    return Kind(f"{name} {'/'.join(types).upper()}", len(a), factor_bytes(layer, len(a), types), score)


# -- trained -----------------------------------------------------------------------------------------------------------


def train(
    layer: Layer, a: Matrix, b: Matrix, c: Matrix, *, relu: bool, epochs: int, rate: float
) -> tuple[Matrix, Matrix, Matrix]:
    """Trains A, B and c with Adam on the cross-entropy of which neurons fire, with logits B_i·(A x) + c_i.

    With ``relu`` the logits are B_i·relu(A x) + c_i.
    """
    parameters = [np.array(p, dtype=np.float32) for p in (a, b, c)]
    moments = [(np.zeros_like(p), np.zeros_like(p)) for p in parameters]
    rng = np.random.default_rng(0)
    n, step = len(layer.fit), 0
    fired_at = np.concatenate([x @ layer.data.weight.T + layer.data.bias > 0 for x in np.array_split(layer.fit, 8)])
    n_steps = epochs * -(-n // _BATCH)
    for _ in range(epochs):
        order = rng.permutation(n)
        for begin in range(0, n, _BATCH):
            batch = order[begin : begin + _BATCH]
            step += 1
            gradients = _gradients(parameters, layer.fit[batch], fired_at[batch], relu=relu)
            # The learning rate rises for a tenth of the steps, then falls almost to 0.
            at = step / n_steps
            now = rate * min(at / 0.1, (1 - at) / 0.9 + 1e-3)
            for p, g, (first, second) in zip(parameters, gradients, moments, strict=True):
                first += 0.1 * (g - first)
                second += 0.01 * (g * g - second)
                p -= now * (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.99**step)) + 1e-8)
    return parameters[0], parameters[1], parameters[2]


def _gradients(parameters: list[Matrix], x: Matrix, fired: NDArray[np.bool_], *, relu: bool) -> list[Matrix]:
    a, b, c = parameters
    hidden = x @ a.T
    passed = np.maximum(hidden, 0) if relu else hidden
    error = 1 / (1 + np.exp(np.clip(-(passed @ b.T + c), -60, 60))) - fired
    error = (error / len(x)).astype(np.float32)
    back = error @ b
    if relu:
        back *= hidden > 0
    return [back.T @ x, error.T @ passed, error.sum(axis=0)]


def trained_kinds(layer: Layer, a: Matrix, b: Matrix, rank: int, epochs: int) -> Iterator[Kind]:
    """The paper's two-layer MLP, from random weights and from the closed form, and the closed form trained further."""
    if not epochs:
        return
    n_ff, n_embd = layer.shape
    x_scale = float(np.sqrt((layer.fit**2).mean(dtype=np.float64)))

    rng = np.random.default_rng(1)
    chance_a = rng.normal(size=(rank, n_embd)) / (x_scale * np.sqrt(n_embd))
    chance_b = rng.normal(size=(n_ff, rank)) / np.sqrt(rank)
    rare = np.log(1 / 9) * np.ones(n_ff)

    def trained(name: str, start: tuple[Matrix, Matrix, Matrix], rate: float, *, relu: bool) -> Kind:
        a, b, c = train(layer, *start, relu=relu, epochs=epochs, rate=rate)
        return dataclasses.replace(of_factors(layer, name, a, b, TRAINED_FACTORS, relu=relu), offset=c)

    yield trained("MLP", (chance_a, chance_b, rare), 2e-3, relu=True)

    # The probit model's logits are about 1.7 times the score over the residual deviation. A is scaled so that hidden
    # values have deviation 1.
    def closed_form(r: int) -> tuple[Matrix, Matrix, Matrix]:
        hidden = layer.fit @ a[:r].T
        scale = hidden.std(axis=0)
        z = layer.fit[:2048] @ layer.data.weight.T + layer.data.bias
        rest = z - hidden[:2048] @ b[:, :r].T
        gain = 1.7 / np.maximum(rest.std(axis=0), 1e-3 * z.std(axis=0) + 1e-20)
        return a[:r] / scale[:, None], b[:, :r] * scale * gain[:, None], rest.mean(axis=0) * gain

    half_a, half_b, c = closed_form(rank // 2)
    pair = (np.concatenate([half_a, -half_a]), np.concatenate([half_b, -half_b], axis=1))
    yield trained("MLP from closed form", (*pair, c), 1e-3, relu=True)
    yield trained("closed form, trained further", closed_form(rank), 1e-3, relu=False)


# -- copies of the matrix in few bits ----------------------------------------------------------------------------------


def copies(layer: Layer) -> Iterator[Kind]:
    """Copies with one or two bits per weight. If a row has a single scale, it is folded into the threshold."""
    n_ff, n_embd = layer.shape
    weight = layer.data.weight
    signs = np.where(weight < 0, -1, 1).astype(np.float32)
    one_bit, two_bits = (n_ff * (bits * n_embd // 8 + 4) for bits in (1, 2))
    yield Kind("sign(W)·sign(x)", 0, one_bit, lambda x: np.where(x < 0, -1, 1).astype(np.float32) @ signs.T)
    yield Kind("sign(W)·x", 0, one_bit, lambda x: x @ signs.T)
    by_row, by_block = two_bit_copy(weight, n_embd), two_bit_copy(weight, BLOCK)
    yield Kind("2 bits, scale per row", 0, two_bits, lambda x: x @ by_row.T)
    yield Kind("2 bits, scale per 32", 0, two_bits + 2 * n_ff * n_embd // BLOCK, lambda x: x @ by_block.T)
    how = compensation(covariance(layer.fit))
    one, two = few_bits(weight, how, 1), few_bits(weight, how, 2)
    yield Kind("one_bit: 1 bit, errors compensated", 0, one_bit, lambda x: x @ one.T)
    yield Kind("two_bit: 2 bits, errors compensated", 0, two_bits, lambda x: x @ two.T)


def two_bit_copy(weight: Matrix, block: int) -> Matrix:
    """Rounds the weights to ±1/2 and ±3/2 of a step per ``block`` weights of a row, near-optimal for normal values."""
    w = weight.reshape(len(weight), -1, block)
    step = np.sqrt((w * w).mean(axis=2, keepdims=True)) + 1e-20
    levels: Matrix = (np.clip(np.floor(w / step), -2, 1) + 0.5) * step
    return levels.reshape(weight.shape).astype(np.float32)


# -- the tables --------------------------------------------------------------------------------------------------------


def kinds_of(layer: Layer, budgets: list[float], epochs: int) -> Iterator[Kind]:
    """Every kind. Kinds with a rank come at each budget of bits per weight, the closed form also at its cheapest."""
    yield from copies(layer)
    n_embd = layer.shape[1]
    a, b = Spectrum.of(layer.data.weight, covariance(layer.fit)).factors(n_embd)
    for types in FACTORS:
        for budget in budgets:
            rank = rank_of(layer, types, budget)
            kind = of_factors(layer, "closed form", a[:rank], b[:, :rank], types)
            yield dataclasses.replace(kind, name=f"{kind.name}, {budget:g} bit")
        kind = cheapest(layer, a, b, types)
        yield dataclasses.replace(kind, name=f"{kind.name}, cheapest")
    for budget in budgets:
        for kind in trained_kinds(layer, a, b, rank_of(layer, TRAINED_FACTORS, budget), epochs):
            yield dataclasses.replace(kind, name=f"{kind.name}, {budget:g} bit")


def cheapest(layer: Layer, a: Matrix, b: Matrix, types: tuple[str, str]) -> Kind:
    """The closed form at the rank with the lowest cost per token, measured on the samples used for the thresholds."""
    found: list[tuple[float, Kind]] = []
    for rank in range(BLOCK, len(a) + 1, BLOCK):
        kind = of_factors(layer, "closed form", a[:rank], b[:, :rank], types)
        found.append((judge(layer, kind, RECALLS[-1], layer.held).cost, kind))
        if len(found) > 3 and found[-1][0] > found[-2][0] > found[-3][0]:
            break
    return min(found, key=lambda each: each[0])[1]


def rank_of(layer: Layer, types: tuple[str, str], bits: float) -> int:
    """The rank at which the factors come closest to ``bits`` bits per weight of the matrix."""
    n_ff, n_embd = layer.shape
    wanted = n_ff * (bits * n_embd / 8 + 4)
    return min(range(BLOCK, n_embd + 1, BLOCK), key=lambda rank: abs(factor_bytes(layer, rank, types) - wanted))


def read_layer(path: Path, i: int, row_type: str | None) -> Layer:
    """Reads layer ``i`` of a profiled model. With ``row_type``, row sizes are counted as if the rows had that type."""
    model = open_model(path)
    samples = SamplesFile.read(
        paths.artefact_dir(model.path, model.fingerprint, for_writing=False) / paths.SAMPLES, model
    )
    data = LayerData.read(model, model.ffns[i], samples)
    if row_type:
        one = row_bytes(row_type, model.n_embd)
        data = dataclasses.replace(data, first_bytes=one, rest_bytes=one * (2 if model.gated else 1))
    fit, held, tested = parts(len(data.x))
    return Layer(data, data.x[fit].astype(np.float32), HeldBack.of(data, held), HeldBack.of(data, tested))


def measure(path: Path, layers: list[int] | None, row_type: str | None, budgets: list[float], epochs: int) -> None:
    """Prints one table row per kind, with means over the layers."""
    model = open_model(path)
    layers = list(range(model.n_layer)) if layers is None else layers
    found: dict[str, list[list[float]]] = {}
    for i in layers:
        layer = read_layer(path, i, row_type)
        n_ff, n_embd = layer.shape
        for kind in kinds_of(layer, budgets, epochs):
            values = [8 * (kind.n_bytes / n_ff - 4) / n_embd, kind.n_bytes / 1024]
            for recall in RECALLS:
                judged = judge(layer, kind, recall)
                values += [100 * judged.recall, 100 * judged.candidates, judged.cost]
            found.setdefault(kind.name, []).append(values)
    rows = f", rows counted as {row_type.upper()}" if row_type else ""
    which = ", ".join(str(i) for i in layers)
    print(f"\n{model.name}: n_embd {model.n_embd}, n_ff {model.n_ff}, layers {which}{rows}\n")
    print("| kind | bits per weight | KiB a layer | recall | candidates | cost | recall | candidates | cost |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|---:|")
    for name, of_layers in found.items():
        bits, n_kib, *means = (float(mean) for mean in np.mean(of_layers, axis=0))
        cells = [f"{bits:.2f}", f"{n_kib:.0f}"]
        for recall, candidates, cost in (means[:3], means[3:]):
            cells += [f"{recall:.2f} %", f"{candidates:.1f} %", f"{cost:.3f}"]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("models", type=Path, nargs="+", metavar="MODEL")
    parser.add_argument("--layers", type=lambda text: [int(part) for part in text.split(",")])
    parser.add_argument("--row-type", help="count the bytes of the model's rows as if they had this type")
    parser.add_argument("--budgets", type=lambda text: [float(part) for part in text.split(",")], default=[1.0, 2.0])
    parser.add_argument("--epochs", type=int, default=15, help="epochs for the trained kinds; 0 skips them")
    arguments = parser.parse_args()
    for model_path in arguments.models:
        measure(model_path, arguments.layers, arguments.row_type, arguments.budgets, arguments.epochs)
