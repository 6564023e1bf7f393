"""Learns, layer by layer and in closed form, to name the neurons that will fire.

The matrix whose sign decides is approximated by two thin factors (low_rank.py); thresholds on their product keep the
share of the output that was asked for (thresholds.py). How wide the factors are is settled per layer by what a token
then costs. docs/predictors.md has the measurements that this kind of predictor was chosen by.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pinfer.errors import PinferError
from pinfer.low_rank import Spectrum
from pinfer.model import open_model
from pinfer.predictor_file import FACTOR_TYPES, LayerPredictor, PredictorWriter, quantised, row_bytes
from pinfer.profile_file import SamplesFile
from pinfer.progress import NULL_PROGRESS, Progress
from pinfer.thresholds import calibrate
from pinfer.train_data import HeldBack, LayerData, parts

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from pinfer.train_data import Matrix

MIN_SAMPLES = 64

# What a byte of a scattered row costs against a byte that is streamed, as predictors and whole matrices are. Measured
# on 2 threads: 46 GB/s in a stream, 26 to 31 GB/s for the rows of candidates (docs/predictors.md).
SCATTERED_COST = 1.6

# Values in a block of quantised factors: ranks and widths must be multiples of it.
_BLOCK = 32

# Samples on which ranks are compared; the one chosen is calibrated on all that were held back.
_SEARCH_SAMPLES = 512

# Factors are computed at first up to this rank, or this share of the width, and further when that proves too little.
_FIRST_RANK = 1024
_FIRST_SHARE = 8


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


def fit_layer(data: LayerData, layer: int, options: TrainOptions) -> tuple[LayerPredictor, LayerReport]:
    """The predictor of one layer at which a token costs least, or none where it does not pay."""
    fit, calibration, test = parts(len(data.x))
    held, tested = HeldBack.of(data, calibration), HeldBack.of(data, test)
    factors = _StoredFactors(data, fit, options)
    rank = _cheapest_rank(data, factors, held, options)
    fitted = _Fitted.of(data, factors, rank, held, options) if rank else None
    active = float((tested.mass > 0).mean())
    exact_bytes = len(data.weight) * (data.first_bytes + active * data.rest_bytes)
    if fitted is None or fitted.cost(data, held) >= _exact_cost(data, held):
        none = LayerPredictor(0, 1.0, 1.0)
        return none, LayerReport(layer, "none", 0, 1.0, 1.0, active, 0, exact_bytes, exact_bytes)
    named = fitted.named(tested)
    result = LayerPredictor(rank, tested.recall(named), float(named.mean()), fitted.a, fitted.b, fitted.t)
    rows = fitted.row_bytes(data, tested, named)
    return result, LayerReport(
        layer,
        "low_rank",
        rank,
        result.recall,
        result.candidates,
        active,
        fitted.n_bytes,
        fitted.n_bytes + rows,
        exact_bytes,
    )


class _StoredFactors:
    """Factors of a layer as the file will hold them, computed as far as they are asked for."""

    def __init__(self, data: LayerData, fit: slice, options: TrainOptions) -> None:
        self._data = data
        self._types = FACTOR_TYPES[options.type]
        n_ff, n_embd = data.weight.shape
        self.limit = min(n_embd, n_ff, n_embd if options.max_rank is None else options.max_rank)
        self._spectrum = Spectrum.of(data.weight, data.x[fit].astype("float32"))
        self._a: Matrix | None = None
        self._b: Matrix | None = None

    def of_rank(self, rank: int) -> tuple[Matrix, Matrix]:
        """A ``[rank, n_embd]`` and B ``[n_ff, rank]``: blocks run along the rank, so lower ranks are beginnings."""
        if self._a is None or self._b is None or rank > len(self._a):
            known = 0 if self._a is None else len(self._a)
            n_embd = self._data.weight.shape[1]
            wanted = max(rank, 2 * known, _FIRST_RANK if n_embd <= _FIRST_RANK else n_embd // _FIRST_SHARE)
            a, b = self._spectrum.factors(min(wanted, self.limit) // _BLOCK * _BLOCK)
            self._a, self._b = quantised(a, self._types[0]), quantised(b, self._types[1])
        return self._a[:rank], self._b[:, :rank]


@dataclass(frozen=True)
class _Fitted:
    """A predictor of one rank, calibrated. ``t`` holds bias and mean; factors are as they will be stored."""

    a: Matrix
    b: Matrix
    t: Matrix
    n_bytes: int
    """of the predictor"""

    @staticmethod
    def of(data: LayerData, factors: _StoredFactors, rank: int, held: HeldBack, options: TrainOptions) -> _Fitted:
        """Factors of ``rank`` and the thresholds that keep the recall on ``held``."""
        a, b = factors.of_rank(rank)
        t = calibrate(scores(a, b, held.x), held, data, options.recall)
        return _Fitted(a, b, t, predictor_bytes(data, rank, options.type))

    def named(self, held: HeldBack) -> NDArray[np.bool_]:
        """Which neurons are candidates, ``[n, n_ff]``."""
        return scores(self.a, self.b, held.x) > self.t

    def row_bytes(self, data: LayerData, held: HeldBack, named: NDArray[np.bool_]) -> float:
        """Bytes of a token's rows: the first one of each candidate, the others of those that fire."""
        import numpy as np

        n_active = np.count_nonzero(named & (held.mass > 0))
        return (np.count_nonzero(named) * data.first_bytes + n_active * data.rest_bytes) / len(held.x)

    def cost(self, data: LayerData, held: HeldBack) -> float:
        """What a token costs, in streamed bytes."""
        return self.n_bytes + SCATTERED_COST * self.row_bytes(data, held, self.named(held))


def scores(a: Matrix, b: Matrix, x: Matrix) -> Matrix:
    """What the predictor computes for ``x`` ``[n, n_embd]``: ``[n, n_ff]``."""
    hidden: Matrix = x @ a.T
    return hidden @ b.T


def predictor_bytes(data: LayerData, rank: int, factor_type: str) -> int:
    """Bytes of both factors and the thresholds."""
    n_ff, n_embd = len(data.weight), data.x.shape[1]
    a_type, b_type = FACTOR_TYPES[factor_type]
    return rank * row_bytes(n_embd, a_type) + n_ff * row_bytes(rank, b_type) + 4 * n_ff


def _exact_cost(data: LayerData, held: HeldBack) -> float:
    """What a token costs without a predictor: the first matrix is streamed."""
    import numpy as np

    n_active = np.count_nonzero(held.mass) / len(held.x)
    return len(data.weight) * data.first_bytes + SCATTERED_COST * n_active * data.rest_bytes


def _cheapest_rank(data: LayerData, factors: _StoredFactors, held: HeldBack, options: TrainOptions) -> int:
    """The rank at which a token costs least, 0 where none pays: in growing steps first, then around the best of them.

    More rank costs more predictor and saves ever fewer candidates, so the cost falls and then rises.
    """
    some = held.every(-(-len(held.x) // _SEARCH_SAMPLES))
    step = _BLOCK
    costs = {0: _exact_cost(data, some)}

    def best() -> int:
        return min(costs, key=lambda known: (costs[known], known))

    def measure(rank: int) -> None:
        costs[rank] = _Fitted.of(data, factors, rank, some, options).cost(data, some)

    rank, worse = step, 0
    while rank <= factors.limit and worse < 2 and predictor_bytes(data, rank, options.type) < costs[best()]:
        measure(rank)
        worse = worse + 1 if costs[rank] > costs[best()] else 0
        rank = max(rank + step, rank * 3 // 2 // step * step)
    while best():
        known, at = sorted(costs), sorted(costs).index(best())
        between = {(best() + other) // 2 // step * step for other in known[max(at - 1, 0) : at + 2]}
        new = [r for r in sorted(between - set(costs)) if abs(r - best()) >= best() // 12]
        if not new:
            break
        for rank in new:
            measure(rank)
    return best()
