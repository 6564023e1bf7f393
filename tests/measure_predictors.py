"""What each kind of predictor names at equal bytes: prints the tables of docs/predictors.md.

``python tests/measure_predictors.py models/tiny-relu2.gguf models/tiny-reglu.gguf`` takes some minutes; profile the
models first (``pinfer profile MODEL --dataset tests/data/profile.txt``). Kinds that are trained want hours at large
widths: ``--layers 0,7,15 --epochs 10`` bounds them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pinfer import paths
from pinfer.low_rank import Spectrum
from pinfer.model import open_model
from pinfer.predictor_file import quantised, row_bytes
from pinfer.profile_file import SamplesFile
from pinfer.thresholds import calibrate
from pinfer.train import SCATTERED_COST
from pinfer.train_data import HeldBack, LayerData, parts

Matrix = NDArray[np.float32]

RECALLS = (0.99, 0.995)
BITS_PER_WEIGHT = (0.5, 1.0, 2.0)

# A and B of the closed form; of trained kinds only the types that it does best with.
FACTORS = (("f16", "f16"), ("q8_0", "q8_0"), ("q8_0", "q4_0"), ("q4_0", "q4_0"))
TRAINED_FACTORS = ("q8_0", "q4_0")
BLOCK = 32

_BATCH = 256


@dataclass(frozen=True)
class Layer:
    """A layer with its samples divided."""

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
    """A predictor, ready to score; thresholds are not in it yet."""

    name: str
    rank: int
    """0 where there is none"""
    n_bytes: int
    """read per token, thresholds included"""
    score: Callable[[Matrix], Matrix]


@dataclass(frozen=True)
class Found:
    """How a kind does at one recall; shares are of the layer's neurons, the cost is in streamed bytes per token."""

    recall: float
    candidates: float
    cost: float


def judge(layer: Layer, kind: Kind, recall: float) -> Found:
    """Calibrates on one part of the samples and measures on another."""
    data, tested = layer.data, layer.tested
    t = calibrate(kind.score(layer.held.x), layer.held, data, recall)
    named = kind.score(tested.x) > t
    n_active = np.count_nonzero(named & (tested.mass > 0)) / len(named)
    rows = np.count_nonzero(named) / len(named) * data.first_bytes + n_active * data.rest_bytes
    return Found(tested.recall(named), float(named.mean()), kind.n_bytes + SCATTERED_COST * rows)


# -- the closed form ---------------------------------------------------------------------------------------------------


def factor_bytes(layer: Layer, rank: int, types: tuple[str, str]) -> int:
    """Bytes of two factors and the thresholds."""
    n_ff, n_embd = layer.shape
    return rank * row_bytes(n_embd, types[0]) + n_ff * (row_bytes(rank, types[1]) + 4)


def of_factors(layer: Layer, name: str, a: Matrix, b: Matrix, types: tuple[str, str], *, relu: bool = False) -> Kind:
    """score = B A x, or B relu(A x), with factors as they would be stored."""
    a, b = quantised(np.ascontiguousarray(a), types[0]), quantised(np.ascontiguousarray(b), types[1])

    def score(x: Matrix) -> Matrix:
        hidden: Matrix = x @ a.T
        return (np.maximum(hidden, 0, out=hidden) if relu else hidden) @ b.T

    return Kind(f"{name} {'/'.join(types).upper()}", len(a), factor_bytes(layer, len(a), types), score)


# -- trained -----------------------------------------------------------------------------------------------------------


def train(
    layer: Layer, a: Matrix, b: Matrix, c: Matrix, *, relu: bool, epochs: int, rate: float
) -> tuple[Matrix, Matrix]:
    """A and B after Adam on the cross-entropy of who fires; the logit of a neuron is B_i·(A x) + c_i."""
    parameters = [np.array(p, dtype=np.float32) for p in (a, b, c)]
    moments = [(np.zeros_like(p), np.zeros_like(p)) for p in parameters]
    rng = np.random.default_rng(0)
    n, step = len(layer.fit), 0
    n_steps = epochs * -(-n // _BATCH)
    for _ in range(epochs):
        order = rng.permutation(n)
        for begin in range(0, n, _BATCH):
            x = layer.fit[order[begin : begin + _BATCH]]
            fired = (x @ layer.data.weight.T + layer.data.bias) > 0
            step += 1
            gradients = _gradients(parameters, x, fired, relu=relu)
            # One cycle: up for a tenth of the steps, then down to nothing.
            at = step / n_steps
            now = rate * min(at / 0.1, (1 - at) / 0.9 + 1e-3)
            for p, g, (first, second) in zip(parameters, gradients, moments, strict=True):
                first += 0.1 * (g - first)
                second += 0.01 * (g * g - second)
                p -= now * (first / (1 - 0.9**step)) / (np.sqrt(second / (1 - 0.99**step)) + 1e-8)
    return parameters[0], parameters[1]


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
    """The paper's two-layer MLP from chance and from the closed form, and the closed form itself trained further."""
    if not epochs:
        return
    n_ff, n_embd = layer.shape
    types = TRAINED_FACTORS
    x_scale = float(np.sqrt((layer.fit**2).mean(dtype=np.float64)))

    rng = np.random.default_rng(1)
    chance_a = rng.normal(size=(rank, n_embd)) / (x_scale * np.sqrt(n_embd))
    chance_b = rng.normal(size=(n_ff, rank)) / np.sqrt(rank)
    rare = np.log(1 / 9) * np.ones(n_ff)
    found = train(layer, chance_a, chance_b, rare, relu=True, epochs=epochs, rate=2e-3)
    yield of_factors(layer, "MLP", *found, types, relu=True)

    # Logits of a probit: the score, standardised by what it leaves unexplained, times 1.7. Hidden values of about 1.
    def start(r: int) -> tuple[Matrix, Matrix, Matrix]:
        hidden = layer.fit @ a[:r].T
        scale = hidden.std(axis=0)
        z = layer.fit[:2048] @ layer.data.weight.T + layer.data.bias
        rest = z - hidden[:2048] @ b[:, :r].T
        gain = 1.7 / np.maximum(rest.std(axis=0), 1e-3 * z.std(axis=0) + 1e-20)
        return a[:r] / scale[:, None], b[:, :r] * scale * gain[:, None], rest.mean(axis=0) * gain

    half_a, half_b, c = start(rank // 2)
    pair = (np.concatenate([half_a, -half_a]), np.concatenate([half_b, -half_b], axis=1))
    found = train(layer, *pair, c, relu=True, epochs=epochs, rate=1e-3)
    yield of_factors(layer, "MLP from closed form", *found, types, relu=True)

    found = train(layer, *start(rank), relu=False, epochs=epochs, rate=1e-3)
    yield of_factors(layer, "closed form, trained further", *found, types)


# -- copies of the matrix in few bits ----------------------------------------------------------------------------------


def sign_kinds(layer: Layer) -> Iterator[Kind]:
    """One bit per weight; the scale of a row is folded into its threshold, so the sign kinds carry only that."""
    n_ff, n_embd = layer.shape
    signs = np.where(layer.data.weight < 0, -1, 1).astype(np.float32)
    n_bytes = n_ff * (-(-n_embd // 8) + 4)
    yield Kind("sign(W)·x", 0, n_bytes, lambda x: x @ signs.T)
    yield Kind("sign(W)·sign(x)", 0, n_bytes, lambda x: np.where(x < 0, -1, 1).astype(np.float32) @ signs.T)


def two_bit_kinds(layer: Layer) -> Iterator[Kind]:
    """Weights as ±1/2 and ±3/2 of a step; the step that is best for normal values, of a row or of 32 values."""
    n_ff, n_embd = layer.shape

    def copy(block: int) -> Matrix:
        w = layer.data.weight.reshape(n_ff, -1, block)
        step = np.sqrt((w * w).mean(axis=2, keepdims=True)) + 1e-20
        levels: Matrix = (np.clip(np.floor(w / step), -2, 1) + 0.5) * step
        return levels.reshape(n_ff, n_embd).astype(np.float32)

    by_row, by_block = copy(n_embd), copy(BLOCK)
    yield Kind("2 bits, scale per row", 0, n_ff * (-(-n_embd // 4) + 4), lambda x: x @ by_row.T)
    n_bytes = n_ff * (-(-n_embd // 4) + 2 * n_embd // BLOCK + 4)
    yield Kind("2 bits, scale per 32", 0, n_bytes, lambda x: x @ by_block.T)


# -- the tables --------------------------------------------------------------------------------------------------------


def kinds_of(layer: Layer, epochs: int) -> Iterator[Kind]:
    """Every kind: sized ones at each of the byte budgets, the closed form at further ranks for its cheapest."""
    n_embd = layer.shape[1]
    a, b = Spectrum.of(layer.data.weight, layer.fit).factors(n_embd)
    yield from sign_kinds(layer)
    yield from two_bit_kinds(layer)
    for types in FACTORS:
        for rank in sorted({*budget_ranks(layer, types), *range(BLOCK, n_embd // 2 + 1, max(BLOCK, n_embd // 32))}):
            yield of_factors(layer, "closed form", a[:rank], b[:, :rank], types)
    for rank in budget_ranks(layer, TRAINED_FACTORS):
        yield from trained_kinds(layer, a, b, rank, epochs)


def budget_ranks(layer: Layer, types: tuple[str, str]) -> list[int]:
    """For each budget the rank that comes nearest to it."""
    n_ff, n_embd = layer.shape
    ranks = range(BLOCK, n_embd + 1, BLOCK)
    budgets = [bits * n_ff * n_embd / 8 + 4 * n_ff for bits in BITS_PER_WEIGHT]
    return [min(ranks, key=lambda r: abs(factor_bytes(layer, r, types) - budget)) for budget in budgets]


def measure(path: Path, wanted: list[int] | None, epochs: int) -> None:
    """One line per layer and kind; the sized ones at every budget and, without a budget, at their cheapest rank."""
    model = open_model(path)
    samples = SamplesFile.read(paths.artefact_dir(path, model.fingerprint, for_writing=False) / paths.SAMPLES, model)
    print(f"\n{model.name}: n_embd {model.n_embd}, n_ff {model.n_ff}, {model.activation}, {samples.n_samples} samples")
    for i in range(model.n_layer) if wanted is None else wanted:
        data = LayerData.read(model, i, samples)
        fit, held, tested = parts(len(data.x))
        layer = Layer(data, data.x[fit].astype(np.float32), HeldBack.of(data, held), HeldBack.of(data, tested))
        n_ff, n_embd = layer.shape
        active = float((layer.tested.mass > 0).mean())
        exact = n_ff * (data.first_bytes + SCATTERED_COST * active * data.rest_bytes)
        print(f"\nLayer {i}: {100 * active:.1f} % active, exact mode costs {exact / 1024:.0f} KiB a token\n")
        print("| kind | rank | bits per weight | KiB | recall | candidates | cost | recall | candidates | cost |")
        print("|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|")
        for kind in kinds_of(layer, epochs):
            cells = [kind.name, str(kind.rank or ""), f"{8 * (kind.n_bytes - 4 * n_ff) / (n_ff * n_embd):.2f}"]
            cells.append(f"{kind.n_bytes / 1024:.0f}")
            for recall in RECALLS:
                found = judge(layer, kind, recall)
                cells += [f"{100 * found.recall:.2f} %", f"{100 * found.candidates:.1f} %", f"{found.cost / exact:.3f}"]
            print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("models", type=Path, nargs="+", metavar="MODEL")
    parser.add_argument("--layers", type=lambda text: [int(part) for part in text.split(",")])
    parser.add_argument("--epochs", type=int, default=15, help="of the trained kinds, 0 to leave them out")
    arguments = parser.parse_args()
    for model_path in arguments.models:
        measure(model_path, arguments.layers, arguments.epochs)
