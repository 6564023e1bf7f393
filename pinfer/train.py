"""Learns, layer by layer and in closed form, to name the neurons that will fire.

The predicted matrix W is the one whose sign decides: gate where the FFN has one, else up. On FFN inputs x with mean m
and covariance C = L Lᵀ, the rank-r matrix B A that minimises E‖W (x - m) - B A (x - m)‖² comes from the singular
vectors of W L. What is left, W m - B A m and the bias, is constant and goes into the thresholds.

A threshold says how much loss is worth a neuron's bytes. Given a score s, the true pre-activation is taken as normal
around s with the neuron's own residual deviation; so its expected share of the output, in units of |f_i(x)| ‖d_i‖, is
known, and a neuron is a candidate when that exceeds a price. The price is one number per layer, found on held-back
samples as the highest that keeps the recall asked for.

Mass is |f_i(x)| ‖d_i‖, the length of what a neuron adds to the layer's output. Measured on a small relu² model at a
recall of 99 %, |f_i(x)| alone takes 8 % more candidates for a KL divergence 6 % higher; the square of the length, at
the same number of candidates, gives three times the divergence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from pinfer.errors import PinferError
from pinfer.model import Model, Tensor, dequantize, open_model
from pinfer.predictor_file import FACTOR_TYPES, LayerPredictor, PredictorWriter, quantised, row_bytes
from pinfer.profile_file import SamplesFile
from pinfer.progress import NULL_PROGRESS, Progress

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Matrix: TypeAlias = NDArray[np.float32]

MIN_SAMPLES = 64

# Held back from the fit: for finding thresholds, and for the recall that is reported.
_CALIBRATION_SHARE = 0.2
_TEST_SHARE = 0.1
_MAX_CALIBRATION = 2048

# Added to the covariance in units of its mean eigenvalue, times n_embd / samples: few samples, less trust in them.
_SHRINKAGE = 0.1

# Values in a block of Q8_0: ranks and widths must be multiples of it.
_BLOCK = 32

# Rows of a weight matrix that are float32 at a time, besides the matrix itself.
_CHUNK_ROWS = 4096


@dataclass(frozen=True)
class TrainOptions:
    """Settings of ``pinfer train``; every default is the command line's."""

    recall: float = 0.995
    max_rank: int | None = None
    type: str = "q8_0"
    activation: str | None = None


@dataclass(frozen=True)
class LayerReport:
    """How well one layer is predicted; shares are of its neurons, bytes are read per token."""

    layer: int
    kind: str
    rank: int
    recall: float
    candidates: float
    active: float
    predictor_bytes: int
    expected_bytes: float
    exact_bytes: float


@dataclass(frozen=True)
class TrainReport:
    """What was learnt, and where it was written."""

    path: Path
    n_samples: int
    predictor_bytes: int
    recall: float
    candidates: float
    active: float
    expected_bytes: float
    exact_bytes: float
    layers: tuple[LayerReport, ...]

    def to_json(self) -> dict[str, object]:
        """The report as plain JSON values."""
        return {**asdict(self), "path": str(self.path)}


def train(model_path: Path, options: TrainOptions, progress: Progress = NULL_PROGRESS) -> TrainReport:
    """Fit the predictor from the samples of ``pinfer profile`` and write predictor.gguf.

    Raises PinferError when there are no samples, too few of them, or the model has nothing to predict.
    """
    from pinfer import paths

    _check(options)
    model = open_model(model_path, options.activation)
    model.require_sparse()
    if options.type != "f16" and model.n_embd % _BLOCK:
        progress.note(f"{model.n_embd} values do not fill blocks of {options.type}: the factors are kept as f16")
        options = replace(options, type="f16")
    samples = SamplesFile.read(
        paths.artefact_dir(model.path, model.fingerprint, for_writing=False) / paths.SAMPLES, model
    )
    if samples.n_samples < MIN_SAMPLES:
        raise PinferError(
            f"{samples.artefact.path} holds {samples.n_samples} samples, too few to learn from",
            f"profile more text: pinfer profile {model.path} --tokens 131072",
        )
    path = paths.artefact_dir(model.path, model.fingerprint, for_writing=True) / paths.PREDICTOR
    reports = []
    with PredictorWriter(path, options.type) as writer, progress.task("train", model.n_layer, "layers") as advance:
        for layer in range(model.n_layer):
            data = LayerData.read(model, layer, samples)
            predictor, report = fit_layer(data, layer, options)
            writer.add(predictor)
            reports.append(report)
            advance(1)
        settings = {**asdict(options), "command": "train", "n_samples": samples.n_samples}
        n_bytes = writer.finish(model, settings)
    return _report(path, samples.n_samples, n_bytes, reports)


def _check(options: TrainOptions) -> None:
    if not 0 < options.recall <= 1:
        raise PinferError(f"a recall of {options.recall} makes no sense", "use --recall 0.995, at most 1")
    if options.max_rank is not None and options.max_rank < 0:
        raise PinferError("the rank cannot be negative", "use --max-rank 0 or more")
    if options.type not in FACTOR_TYPES:
        raise PinferError(f"unknown type {options.type!r}", f"use --type {'|'.join(FACTOR_TYPES)}")


def _report(path: Path, n_samples: int, n_bytes: int, layers: list[LayerReport]) -> TrainReport:
    def mean(values: Iterator[float]) -> float:
        return math.fsum(values) / len(layers)

    return TrainReport(
        path=path,
        n_samples=n_samples,
        predictor_bytes=n_bytes,
        recall=mean(layer.recall for layer in layers),
        candidates=mean(layer.candidates for layer in layers),
        active=mean(layer.active for layer in layers),
        expected_bytes=math.fsum(layer.expected_bytes for layer in layers),
        exact_bytes=math.fsum(layer.exact_bytes for layer in layers),
        layers=tuple(layers),
    )


@dataclass(frozen=True)
class LayerData:
    """One layer as the fit sees it."""

    x: NDArray[np.float16]
    """FFN inputs ``[n_samples, n_embd]``"""
    weight: Matrix
    """the predicted matrix ``[n_ff, n_embd]``"""
    bias: Matrix
    """its bias ``[n_ff]``, zero where the model has none"""
    partner: Callable[[Matrix], Matrix] | None
    """up·x of gated FFNs, ``[n, n_embd]`` to ``[n, n_ff]``"""
    down_norm: Matrix
    """length of each neuron's down column ``[n_ff]``"""
    activation: str
    first_bytes: int
    """of the row whose product decides"""
    rest_bytes: int
    """of the other rows of a neuron"""

    @staticmethod
    def read(model: Model, layer: int, samples: SamplesFile) -> LayerData:
        """Layer ``layer`` of ``model``; of its matrices only the predicted one is held as float32."""
        import numpy as np

        ffn = model.ffn[layer]
        first = ffn.gate if model.gated else ffn.up
        if first is None or ffn.up is None or ffn.down is None:
            raise PinferError(f"layer {layer} of {model.name} has no plain FFN", "run it with --dense")
        bias = ffn.gate_bias if model.gated else ffn.up_bias
        up, up_bias = ffn.up, ffn.up_bias

        def partner(x: Matrix) -> Matrix:
            out = np.empty((len(x), model.n_ff), dtype=np.float32)
            for begin in range(0, model.n_ff, _CHUNK_ROWS):
                rows = slice(begin, min(begin + _CHUNK_ROWS, model.n_ff))
                out[:, rows] = x @ dequantize(model, up, rows).T
            return out if up_bias is None else out + dequantize(model, up_bias).reshape(-1)

        neuron_bytes = sum(t.n_bytes for t in (ffn.gate, ffn.up, ffn.down) if t is not None) // model.n_ff
        return LayerData(
            x=samples.x(layer),
            weight=dequantize(model, first),
            bias=np.zeros(model.n_ff, np.float32) if bias is None else dequantize(model, bias).reshape(-1),
            partner=partner if model.gated else None,
            down_norm=_column_norms(model, ffn.down),
            activation=model.activation,
            first_bytes=first.row_bytes,
            rest_bytes=neuron_bytes - first.row_bytes,
        )


def _column_norms(model: Model, down: Tensor) -> Matrix:
    """Length of each column of the down matrix ``[n_embd, n_ff]``."""
    import numpy as np

    squares = np.zeros(model.n_ff, dtype=np.float64)
    for begin in range(0, down.n_rows, _CHUNK_ROWS):
        rows = dequantize(model, down, slice(begin, min(begin + _CHUNK_ROWS, down.n_rows)))
        squares += np.einsum("ij,ij->j", rows, rows)
    return np.sqrt(squares).astype(np.float32)


@dataclass(frozen=True)
class _Held:
    """Held-back samples: what is, and what it is worth."""

    x: Matrix
    """``[n, n_embd]``"""
    z: Matrix
    """true pre-activations of the predicted matrix ``[n, n_ff]``"""
    mass: Matrix
    """|f_i(x)| ‖d_i‖, ``[n, n_ff]``"""


def fit_layer(data: LayerData, layer: int, options: TrainOptions) -> tuple[LayerPredictor, LayerReport]:
    """The predictor of one layer whose expected bytes per token are least, or none where it does not pay."""
    import numpy as np

    fit, calibration, test = _parts(len(data.x))
    held = _hold(data, calibration)
    tested = _hold(data, test)
    active = float((tested.mass > 0).mean())
    n_ff = len(data.weight)
    exact_bytes = n_ff * (data.first_bytes + active * data.rest_bytes)

    best_bytes, best = exact_bytes, None
    ranks = list(_ranks(data, options))
    factors = _Factors.of(data, data.x[fit].astype(np.float32), max(ranks, default=1))
    worse = 0
    for rank in ranks:
        trial = _calibrate(data, factors, rank, held, options)
        expected = _expected_bytes(trial, data, rank, held, options)
        if expected < best_bytes:
            best_bytes, best, worse = expected, trial, 0
        else:
            worse += 1
        if worse == 3 or _factor_bytes(data, rank, options) >= best_bytes:
            break  # ranks cost more and more, candidates shrink less and less
    if best is None:
        none = LayerPredictor(0, 1.0, 1.0)
        return none, LayerReport(layer, "none", 0, 1.0, 1.0, active, 0, exact_bytes, exact_bytes)
    named = _scores(best, tested.x) > best.t
    total = float(tested.mass.sum(dtype=np.float64))
    recall = float(tested.mass[named].sum(dtype=np.float64)) / total if total else 1.0
    result = LayerPredictor(best.rank, recall, float(named.mean()), best.a, best.b, best.t)
    n_bytes = _factor_bytes(data, best.rank, options)
    return result, LayerReport(
        layer, "low_rank", best.rank, recall, result.candidates, active, n_bytes, best_bytes, exact_bytes
    )


def _parts(n: int) -> tuple[slice, slice, slice]:
    """Samples for the fit, for the thresholds and for the report. Whole stretches of text, so that none is in two."""
    n_test = max(1, int(n * _TEST_SHARE))
    n_calibration = max(1, int(n * _CALIBRATION_SHARE))
    n_fit = n - n_test - n_calibration
    return slice(0, n_fit), slice(n_fit, min(n_fit + n_calibration, n_fit + _MAX_CALIBRATION)), slice(n - n_test, n)


def _hold(data: LayerData, part: slice) -> _Held:
    import numpy as np

    x = data.x[part].astype(np.float32)
    z = x @ data.weight.T + data.bias
    positive = np.maximum(z, 0)
    if data.partner is not None:
        other = data.partner(x)
        mass = positive * (np.maximum(other, 0) if data.activation == "drelu" else np.abs(other))
    else:
        mass = positive * positive if data.activation == "relu2" else positive.copy()
    mass *= data.down_norm
    return _Held(x, z, mass)


@dataclass(frozen=True)
class _Factors:
    """Factors of the highest rank R that may pay; lower ranks are their beginnings."""

    mean: Matrix
    """``[n_embd]``"""
    a: Matrix
    """``[R, n_embd]``, rows by falling importance"""
    b: Matrix
    """``[n_ff, R]``"""

    @staticmethod
    def of(data: LayerData, x: Matrix, max_rank: int | None = None) -> _Factors:
        """Activation-aware factors of ``data.weight`` from FFN inputs ``x`` ``[n, n_embd]``."""
        import numpy as np
        from scipy.linalg import cholesky, eigh, solve_triangular

        n, n_embd = x.shape
        mean = x.mean(axis=0, dtype=np.float64)
        centred = x - mean.astype(np.float32)
        c = (centred.T @ centred).astype(np.float64) / n
        scale = max(float(np.trace(c)) / n_embd, 1e-12)
        c[np.diag_indices(n_embd)] += scale * (_SHRINKAGE * n_embd / n + 1e-6)
        root = cholesky(c, lower=True)
        # The right singular vectors of W L are the eigenvectors of Lᵀ WᵀW L, which is small whatever n_ff is.
        gram = (data.weight.T @ data.weight).astype(np.float64)
        lowest = max(0, n_embd - (max_rank or n_embd))
        vectors = eigh(root.T @ gram @ root, subset_by_index=(lowest, n_embd - 1))[1][:, ::-1]
        a = solve_triangular(root, vectors, lower=True, trans="T").T
        # A x has variance 1 in each direction, so B holds the weights by importance and a block of it one scale. A
        # common factor keeps A well inside the range of half floats.
        factor = float(np.abs(a).max())
        b = data.weight @ (root @ vectors * factor).astype(np.float32)
        return _Factors(mean.astype(np.float32), (a / factor).astype(np.float32), b)


@dataclass(frozen=True)
class _Trial:
    """One rank, calibrated. ``t`` holds bias and mean; factors are as they will be stored."""

    rank: int
    a: Matrix
    b: Matrix
    t: Matrix


def _scores(trial: _Trial, x: Matrix) -> Matrix:
    """What the predictor computes for ``x`` ``[n, n_embd]``: ``[n, n_ff]``."""
    hidden: Matrix = x @ trial.a.T
    return hidden @ trial.b.T


def _ranks(data: LayerData, options: TrainOptions) -> Iterator[int]:
    """Ranks to try: 16 up in growing steps, as far as they can pay at all."""
    n_ff, n_embd = data.weight.shape
    step = 16 if options.type == "f16" else _BLOCK
    limit = min(n_embd, n_ff, options.max_rank if options.max_rank is not None else n_embd)
    rank = step
    while rank <= limit and _factor_bytes(data, rank, options) < n_ff * data.first_bytes:
        yield rank
        rank += max(step, rank // 4 // step * step)


def _factor_bytes(data: LayerData, rank: int, options: TrainOptions) -> int:
    n_ff, n_embd = len(data.weight), data.weight[0].size
    return rank * row_bytes(n_embd, options.type) + n_ff * row_bytes(rank, options.type) + 4 * n_ff


def _calibrate(data: LayerData, factors: _Factors, rank: int, held: _Held, options: TrainOptions) -> _Trial:
    """Factors of ``rank`` as they will be stored, and the thresholds that keep the recall at the least candidates."""
    import numpy as np

    a, b = quantised(factors.a[:rank], options.type), quantised(np.ascontiguousarray(factors.b[:, :rank]), options.type)
    raw = _scores(_Trial(rank, a, b, data.bias), held.x)
    # The part that does not depend on x, with what the shrinkage leaves of the mean: measured where it is used.
    constant = (held.z - raw).mean(axis=0)
    deviation: Matrix = np.maximum((held.z - raw).std(axis=0), 1e-6 * np.maximum(held.z.std(axis=0), 1e-20))
    power = 2 if data.activation == "relu2" else 1
    worth = _worth(data, held) * deviation**power  # of a neuron whose score equals its deviation's unit
    standard = (raw + constant) / deviation

    def standard_threshold(price: float) -> Matrix:
        with np.errstate(divide="ignore"):
            return _inverse_gain(price / worth, power)

    price = _highest_price(standard, worth, held.mass, options.recall, power)
    with np.errstate(divide="ignore"):
        t = _inverse_gain(price / worth, power) * deviation - constant
    return _Trial(rank, a, b, np.nan_to_num(t, nan=3e38, posinf=3e38, neginf=-3e38).astype(np.float32))


def _worth(data: LayerData, held: _Held) -> Matrix:
    """What one unit of the predicted factor of f_i adds to the output: ‖d_i‖, times the other factor when gated."""
    import numpy as np

    if data.partner is None:
        return data.down_norm
    # mass = relu(z) |u| ‖d‖, so its ratio to relu(z) is the mean of the other factor where the neuron fires. Neurons
    # that hardly fire get the layer's mean: their own would be guesswork.
    positive = np.maximum(held.z, 0).sum(axis=0, dtype=np.float64)
    mass = held.mass.sum(axis=0, dtype=np.float64)
    layer_mean = mass.sum() / max(float((positive * data.down_norm).sum()), 1e-30)
    prior = positive.mean()
    other = (mass / np.maximum(data.down_norm, 1e-20) + prior * layer_mean) / (positive + prior + 1e-30)
    worth: Matrix = (other * data.down_norm).astype(np.float32)
    return worth


def _highest_price(standard: Matrix, worth: Matrix, mass: Matrix, recall: float, power: int) -> float:
    """The highest price at which the candidates keep ``recall`` of the mass; 0 where every neuron is needed.

    A neuron of worth w and standardised score s is a candidate while the price is below w gain(s), so the mass is
    summed by that value, from the dearest down; the price is rounded down by less than one percent.
    """
    import numpy as np

    token, neuron = np.nonzero(mass)
    if not len(token):
        return math.inf
    value = np.log(np.maximum(worth[neuron], 1e-30)) + _log_gain(standard[token, neuron], power)
    weight = mass[token, neuron].astype(np.float64)
    top, step = float(value.max()), 0.004
    bins = np.minimum((top - value) / step, 20000).astype(np.int64)
    lost = weight.sum() - np.cumsum(np.bincount(bins, weight))
    enough = int(np.searchsorted(-lost, -(1 - recall) * weight.sum()))
    return math.exp(top - (enough + 1) * step) if enough < 20000 else 0.0


def _gain(u: NDArray[np.float64], power: int) -> NDArray[np.float64]:
    """E[max(0, u + e)^power] for standard normal e: u Φ(u) + φ(u), or (1 + u²) Φ(u) + u φ(u)."""
    import numpy as np
    from scipy.special import ndtr

    phi, density = ndtr(u), np.exp(-u * u / 2) / math.sqrt(2 * math.pi)
    return u * phi + density if power == 1 else (1 + u * u) * phi + u * density


_GAIN_LIMIT = 6.0


def _gain_table(power: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """u between -_GAIN_LIMIT and _GAIN_LIMIT, and log(gain(u))."""
    import numpy as np

    u = np.linspace(-_GAIN_LIMIT, _GAIN_LIMIT, 2401)
    return u, np.log(_gain(u, power))


def _log_gain(u: Matrix, power: int) -> Matrix:
    """log(gain(u)) from the table; above it the normal part no longer matters, below it the neuron does not."""
    import numpy as np

    at, table = _gain_table(power)
    inside = np.interp(u, at, table)
    return np.where(u > _GAIN_LIMIT, power * np.log(np.maximum(u, 1.0)), inside).astype(np.float32)


def _inverse_gain(gain: Matrix, power: int) -> Matrix:
    """u with ``_gain(u) = gain``; -inf, always a candidate, where the gain is too small for the table."""
    import numpy as np

    at, table = _gain_table(power)
    with np.errstate(divide="ignore"):
        log_gain = np.log(np.asarray(gain, dtype=np.float64))
    inside = np.interp(log_gain, table, at)
    beyond = np.exp(np.minimum(log_gain, 80.0) / power)
    result = np.where(log_gain > table[-1], beyond, np.where(log_gain < table[0], -np.inf, inside))
    return result.astype(np.float32)


def _expected_bytes(trial: _Trial, data: LayerData, rank: int, held: _Held, options: TrainOptions) -> float:
    """Bytes read per token: the predictor, the first row of each candidate, the other rows of those that fire."""
    named = _scores(trial, held.x) > trial.t
    n_candidates = float(named.sum(axis=1).mean())
    n_active = float((named & (held.mass > 0)).sum(axis=1).mean())
    return _factor_bytes(data, rank, options) + n_candidates * data.first_bytes + n_active * data.rest_bytes
