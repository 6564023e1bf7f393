"""Looks for predictors cheaper than one_bit and two_bit at equal recall: prints the second table of docs/predictors.md.

``python tools/measure_cheaper_predictors.py models/tiny-relu2.gguf models/tiny-reglu.gguf``. Profile the models first,
every token of the text (``pinfer profile MODEL --dataset tests/data/profile.txt --tokens 8192 --samples 8192``), since
some kinds use the previous token.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pinfer.artefacts import paths
from pinfer.artefacts.profile import SamplesFile
from pinfer.gguf_io.reader import row_bytes
from pinfer.model import Ffn, Model, open_model
from pinfer.predictors.data import HeldBack, LayerData, parts
from pinfer.predictors.few_bits import Compensation, compensation, few_bits
from pinfer.predictors.fitting import SCATTERED_COST
from pinfer.predictors.low_rank import Spectrum, covariance
from pinfer.predictors.thresholds import calibrate

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools.measure_predictors import Kind, Layer, Matrix, factor_bytes, of_factors

RECALL = 0.995

# Values of ±1 and 0 have five to a byte; the zero zone and the level are optimal for normally distributed weights.
TERNARY_BITS = 1.6
_TERNARY_LEVEL, _TERNARY_EDGE = 1.224, 0.612

# The stage of a cascade before the last loses this share of what the whole may lose.
_FIRST_LOSS = 0.2

# How much of the past a running mean of firings keeps from token to token.
_MEMORY = 0.7


@dataclass(frozen=True)
class Case:
    """A layer, and for each of its parts what the tokens before tell."""

    layer: Layer
    past: tuple[Matrix, Matrix, Matrix] | None
    """running mean of each neuron's firings before the token, for the fit, the thresholds and the measurement; None for
    experts, whose samples are not consecutive"""
    earlier: tuple[Matrix, Matrix] | None
    """FFN inputs of the layer before, for the thresholds and the measurement"""


@dataclass(frozen=True)
class Measured:
    """``bits`` per weight read as predictor, shares of neurons, and costs relative to exact mode."""

    bits: float
    recall: float
    candidates: float
    cost: float
    cost_q4: float


def measured(case: Case, n_bytes: float, named: NDArray[np.bool_]) -> Measured:
    """What candidates ``named`` on the layer's last samples cost with rows of the model's type, and of Q4_0."""
    data, tested = case.layer.data, case.layer.tested
    n_ff, n_embd = data.weight.shape
    n_named = np.count_nonzero(named) / len(named)
    n_fired = np.count_nonzero(tested.mass) / len(named)
    n_found = np.count_nonzero(named & (tested.mass > 0)) / len(named)
    q4 = row_bytes("q4_0", n_embd)
    costs = []
    for first, rest in ((data.first_bytes, data.rest_bytes), (q4, q4 * data.rest_bytes / data.first_bytes)):
        exact = n_ff * first + SCATTERED_COST * n_fired * rest
        costs.append((n_bytes + SCATTERED_COST * (n_named * first + n_found * rest)) / exact)
    return Measured(8 * (n_bytes / n_ff - 4) / n_embd, tested.recall(named), float(named.mean()), *costs)


def plain(case: Case, kind: Kind) -> Measured:
    """A kind by itself."""
    t = calibrate(kind.score(case.layer.held.x), case.layer.held, case.layer.data, RECALL)
    return measured(case, kind.n_bytes, kind.score(case.layer.tested.x) > t)


# -- copies ------------------------------------------------------------------------------------------------------------


def ternary(weight: Matrix, how: Compensation) -> Matrix:
    """Rounds ``weight`` to 0 and ±1, each error compensated in the weights that are rounded later."""
    order, share = how.order, how.share
    deviation = np.sqrt(np.einsum("ij,ij->i", weight, weight) / weight.shape[1]) + np.float32(1e-20)
    rest = weight.T[order]
    levels = np.empty_like(rest)
    for i in range(len(rest)):
        level = np.where(np.abs(rest[i]) > _TERNARY_EDGE * deviation, np.sign(rest[i]), 0)
        levels[order[i]] = level
        error = (rest[i] - level * _TERNARY_LEVEL * deviation) / share[i, i]
        rest[i + 1 :] -= share[i, i + 1 :, None] * error
    return np.ascontiguousarray(levels.T)


def hadamard(n: int) -> Matrix:
    """The orthogonal matrix of ±1/sqrt(n), for n a power of two times the size of a small one; the identity else."""
    h = np.ones((1, 1), np.float32)
    while len(h) < n and n % (2 * len(h)) == 0:
        h = np.block([[h, h], [h, -h]])
    turn: Matrix = np.kron(np.eye(n // len(h), dtype=np.float32), h) / np.float32(np.sqrt(len(h)))
    return turn


def with_signs(n: int) -> Matrix:
    """Random signs, then the Hadamard transform: no weight stays large."""
    signs = np.random.default_rng(0).choice(np.array([-1, 1], np.float32), n)
    turn: Matrix = hadamard(n) * signs
    return turn


def of_levels(name: str, n_bytes: int, levels: Matrix) -> Kind:
    """Scores levels·x."""
    return Kind(name, 0, n_bytes, lambda x: x @ levels.T)


def of_sum(layer: Layer, rank: int, a: Matrix, b: Matrix, how: Compensation) -> Kind:
    """Factors in Q4_0 and a copy of what they leave in one bit; 4 bytes a row are for its scale."""
    n_ff, n_embd = layer.shape
    types = ("q4_0", "q4_0")
    low = of_factors(layer, "", a, b, types)
    rest = layer.data.weight - b @ a
    levels = few_bits(rest, how, 1)
    scale = (rest * levels).sum(axis=1) / n_embd

    def score(x: Matrix) -> Matrix:
        total: Matrix = low.score(x) + (x @ levels.T) * scale
        return total

    n_bytes = factor_bytes(layer, rank, types) + n_ff * (n_embd // 8 + 4)
    return Kind(f"rank {rank} Q4_0 + one_bit of the rest", rank, n_bytes, score)


def copies(layer: Layer) -> Iterator[Kind]:
    """Copies of the matrix in few bits."""
    n_ff, n_embd = layer.shape
    weight, inputs = layer.data.weight, covariance(layer.fit)
    how = compensation(inputs)

    def bits_bytes(bits: float) -> int:
        return int(n_ff * (bits * n_embd / 8 + 4))

    for bits, name in ((1, "one_bit"), (2, "two_bit")):
        yield of_levels(name, bits_bytes(bits), few_bits(weight, how, bits))
    yield of_levels("1.6 bits (-1, 0, 1)", bits_bytes(TERNARY_BITS), ternary(weight, how))
    turn = with_signs(n_embd)
    turned = compensation(turn @ inputs @ turn.T)
    for bits, name in ((1, "one_bit, rotated"), (2, "two_bit, rotated")):
        levels = few_bits(np.ascontiguousarray(weight @ turn.T), turned, bits) @ turn
        yield of_levels(name, bits_bytes(bits), levels)
    a, b = Spectrum.of(weight, inputs).factors(64)
    for rank in (32, 64):
        yield of_sum(layer, rank, a[:rank], b[:, :rank], how)


# -- the tokens and the layer before -----------------------------------------------------------------------------------


def with_past(case: Case, kind: Kind) -> Measured:
    """The kind's score and the neuron's firings before, weighted for each neuron to fit its pre-activation."""
    assert case.past is not None
    fit, held, tested = case.past
    layer = case.layer
    some = slice(max(0, len(layer.fit) - 3000), None)
    x, past = layer.fit[some], fit[some]
    z = x @ layer.data.weight.T + layer.data.bias
    score = kind.score(x)
    s, p, z = score - score.mean(axis=0), past - past.mean(axis=0), z - z.mean(axis=0)
    ss, pp, sp, sz, pz = ((u * v).sum(axis=0) for u, v in ((s, s), (p, p), (s, p), (s, z), (p, z)))
    pp = pp + 1e-3 * len(x)  # neurons that hardly fire
    beta = (ss * pz - sp * sz) / (sz * pp - sp * pz)  # relative to the weight of the score
    held_scores = kind.score(layer.held.x) + beta * held
    t = calibrate(held_scores, layer.held, layer.data, RECALL)
    return measured(case, kind.n_bytes, kind.score(layer.tested.x) + beta * tested > t)


def of_earlier(case: Case) -> Measured:
    """The whole first matrix times the input of the layer before: the most that layer could tell."""
    assert case.earlier is not None
    held, tested = (x @ case.layer.data.weight.T for x in case.earlier)
    t = calibrate(held, case.layer.held, case.layer.data, RECALL)
    return measured(case, len(t) * (case.layer.data.first_bytes + 4), tested > t)


# -- early exit --------------------------------------------------------------------------------------------------------


def cascade(case: Case, first: Kind, second: Kind, more_bytes: float) -> Measured:
    """Neurons that ``first`` rules out cost nothing more; the others cost ``more_bytes`` a neuron, row by row."""
    layer = case.layer
    t1 = calibrate(first.score(layer.held.x), layer.held, layer.data, 1 - _FIRST_LOSS * (1 - RECALL))
    t2 = calibrate(second.score(layer.held.x), layer.held, layer.data, 1 - (1 - _FIRST_LOSS) * (1 - RECALL))
    left = first.score(layer.tested.x) > t1
    n_bytes = first.n_bytes + SCATTERED_COST * (more_bytes + 4) * np.count_nonzero(left) / len(left)
    return measured(case, n_bytes, left & (second.score(layer.tested.x) > t2))


def cascades(case: Case, one: Kind, two: Kind) -> Iterator[tuple[str, Measured]]:
    """The second bit, or the other columns, only for neurons that the first ones do not rule out."""
    layer = case.layer
    n_ff, n_embd = layer.shape
    yield "one_bit, then the second bit", cascade(case, one, two, n_embd / 8)
    levels = two.score(np.eye(n_embd, dtype=np.float32)).T
    by_variance = np.argsort(-layer.fit.var(axis=0))
    for share in (4, 2):
        kept = np.zeros(n_embd, np.float32)
        kept[by_variance[: n_embd // share]] = 1
        part = of_levels("", round(n_ff * (n_embd / share / 4 + 4)), levels * kept)
        name = f"two_bit, 1/{share} of the columns, then the rest"
        yield name, cascade(case, part, two, n_embd / 4 * (1 - 1 / share))


# -- the tables --------------------------------------------------------------------------------------------------------


def past_of(data: LayerData) -> NDArray[np.float32]:
    """Running mean of each neuron's firings before each sample ``[n_samples, n_ff]``."""
    fired = np.concatenate([x.astype(np.float32) @ data.weight.T + data.bias > 0 for x in np.array_split(data.x, 8)])
    past = np.zeros(fired.shape, np.float32)
    for t in range(1, len(fired)):
        past[t] = _MEMORY * past[t - 1] + (1 - _MEMORY) * fired[t - 1]
    return past


def read_case(model: Model, ffn: Ffn, samples: SamplesFile, before: Ffn | None) -> Case:
    """An FFN; of a stack the busiest expert."""
    expert = int(np.bincount(samples.experts(ffn).reshape(-1)).argmax()) if ffn.is_stack else 0
    data = LayerData.read(model, ffn, samples, expert)
    fit, held, tested = parts(len(data.x))
    layer = Layer(data, data.x[fit].astype(np.float32), HeldBack.of(data, held), HeldBack.of(data, tested))
    if ffn.is_stack:
        return Case(layer, None, None)
    past = past_of(data)
    earlier = None
    if before is not None:
        x = samples.x(before).astype(np.float32)
        earlier = x[held], x[tested]
    return Case(layer, (past[fit], past[held], past[tested]), earlier)


def stay(data: LayerData) -> tuple[float, float]:
    """Share of the neurons that fire, and of those that fired for the token before."""
    fired = data.x[:4096].astype(np.float32) @ data.weight.T + data.bias > 0
    n, n_again = int(np.count_nonzero(fired[1:])), int(np.count_nonzero(fired[1:] & fired[:-1]))
    return float(fired.mean()), n_again / max(1, n)


def results(case: Case) -> Iterator[tuple[str, Measured]]:
    """Every kind's name and cost."""
    kinds = {kind.name: kind for kind in copies(case.layer)}
    for name, kind in kinds.items():
        yield name, plain(case, kind)
    if case.past is not None:
        for name in ("one_bit", "two_bit"):
            yield f"{name} + firings of the tokens before", with_past(case, kinds[name])
    if case.earlier is not None:
        yield "W · input of the layer before", of_earlier(case)
    yield from cascades(case, kinds["one_bit"], kinds["two_bit"])


def measure(path: Path, *, experts: bool) -> None:
    """Prints a table with means over the FFNs, and how often neurons stay active."""
    model = open_model(path)
    folder = paths.artefact_dir(model.path, model.fingerprint, for_writing=False)
    samples = SamplesFile.read(folder / paths.SAMPLES, model)
    ffns = [ffn for ffn in model.ffns if ffn.is_stack == experts]
    found: dict[str, list[tuple[float, ...]]] = {}
    active = []
    for i, ffn in enumerate(ffns):
        case = read_case(model, ffn, samples, ffns[i - 1] if i else None)
        if not experts:
            active.append(stay(case.layer.data))
        for name, each in results(case):
            found.setdefault(name, []).append(dataclasses.astuple(each))
    print(f"\n{model.name}{', the busiest experts' if experts else ''}: {len(ffns)} FFNs")
    if active:
        base, again = np.mean(active, axis=0)
        print(f"{base:.1%} of the neurons fire, {again:.1%} of them also for the token before")
    print("\n| kind | bits | recall | candidates | cost | cost, Q4_0 rows |\n|---|---:|---:|---:|---:|---:|")
    for name, of_layers in found.items():
        bits, recall, candidates, cost, cost_q4 = (float(mean) for mean in np.mean(of_layers, axis=0))
        print(f"| {name} | {bits:.2f} | {recall:.2%} | {candidates:.1%} | {cost:.3f} | {cost_q4:.3f} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("models", type=Path, nargs="+", metavar="MODEL")
    parser.add_argument("--experts", action="store_true", help="measure the busiest expert of each stack instead")
    arguments = parser.parse_args()
    for model_path in arguments.models:
        measure(model_path, experts=arguments.experts)
