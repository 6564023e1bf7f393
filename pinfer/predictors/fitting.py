"""Fits the predictor of one layer: picks the kind and rank by cost per token, finds thresholds, and reports quality.

The predicted matrix is approximated by two thin factors (low_rank.py) or by a copy in few bits (few_bits.py).
Thresholds on the resulting scores keep the requested share of the activation mass (thresholds.py). Each layer gets the
kind and rank with the lowest cost per token. docs/predictors.md has the measurements behind these kinds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from pinfer.artefacts.predictor import FACTOR_TYPES, FEW_BITS, LayerPredictor, quantised
from pinfer.gguf_io.reader import row_bytes
from pinfer.predictors.data import HeldBack, LayerData, parts
from pinfer.predictors.few_bits import Compensation, compensation, few_bits
from pinfer.predictors.low_rank import Spectrum, covariance
from pinfer.predictors.thresholds import calibrate, one_threshold

if TYPE_CHECKING:
    from pinfer.model import Ffn, FfnKind
    from pinfer.predictors.data import Matrix

MIN_SAMPLES = 64

# Cost of a byte in a scattered row, relative to a streamed byte (predictors, whole matrices). Measured with 2 threads:
# 46 GB/s streamed, 26 to 31 GB/s for the rows of candidates (docs/predictors.md).
SCATTERED_COST = 1.6

# One float32 per neuron.
_THRESHOLD_BYTES = 4

# Values in a block of quantised factors: ranks and widths must be multiples of it.
BLOCK = 32

# Kinds that training chooses from.
KINDS = ("low_rank", "one_bit", "two_bit")

# Kinds and ranks are compared on this many neurons and held-back samples. The choice is then calibrated on all of them.
_SEARCH_SAMPLES = 512
_SEARCH_NEURONS = 4096

# Up to a width of _FIRST_RANK, factors are computed for all ranks at once. Wider layers start with 1 / _FIRST_SHARE of
# the width and go further if needed.
_FIRST_RANK = 1024
_FIRST_SHARE = 6


@dataclass(frozen=True)
class TrainOptions:
    """Settings of ``pinfer train``, with the same defaults as the command line."""

    recall: float = 0.995
    max_rank: int | None = None
    type: str = "q4_0"
    activation: str | None = None


@dataclass(frozen=True)
class LayerReport:
    """Quality of one layer's predictor. Shares are of its neurons, bytes are per token."""

    layer: int
    ffn: FfnKind
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
    """Quality of the whole predictor, and the path it was written to."""

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


def summary(path: Path, n_samples: int, n_bytes: int, layers: list[LayerReport]) -> TrainReport:
    """Combines the layers' reports: shares are averaged, bytes are added up."""

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


def fit_layer(
    data: LayerData, ffn: Ffn, options: TrainOptions, kinds: tuple[str, ...] = KINDS
) -> tuple[LayerPredictor, LayerReport]:
    """The predictor of one layer with the lowest cost per token, or kind ``none`` if exact mode costs no more."""
    fit, calibration, test = parts(len(data.x))
    inputs = covariance(data.x[fit].astype("float32"))
    held = HeldBack.of(data, calibration)
    # Few bits share it, and need it only where they are tried.
    how = cache(lambda: compensation(inputs))
    sources: list[Source] = [_FewBits(data, how, kind) for kind in kinds if kind in FEW_BITS]
    if "low_rank" in kinds:
        sources.append(_LowRank(data, inputs, options))
    fitted = cheapest(data, sources, held, options)
    del held  # wide layers do not fit into memory twice
    return tested(data, ffn, fitted, HeldBack.of(data, test))


def tested(data: LayerData, ffn: Ffn, fitted: Fitted | None, held: HeldBack) -> tuple[LayerPredictor, LayerReport]:
    """An FFN's predictor and its quality on ``held``, samples that neither the fit nor the thresholds have seen.

    ``fitted`` is None for a layer without a predictor.
    """
    active = float((held.mass > 0).mean())
    exact_bytes = len(data.weight) * (data.first_bytes + active * data.rest_bytes)
    if fitted is None:
        none = LayerPredictor(0, 1.0, 1.0, kind="none")
        return none, LayerReport(ffn.layer, ffn.kind, "none", 0, 1.0, 1.0, active, 0, exact_bytes, exact_bytes)
    named = fitted.named(held)
    recall, candidates = held.recall(named), float(named.mean())
    rank = fitted.b.shape[1]
    result = LayerPredictor(rank, recall, candidates, fitted.a, fitted.b, fitted.t, fitted.kind, fitted.types, fitted.c)
    expected = fitted.n_bytes + fitted.row_bytes(data, held, named)
    report = LayerReport(
        ffn.layer, ffn.kind, fitted.kind, rank, recall, candidates, active, fitted.n_bytes, expected, exact_bytes
    )
    return result, report


class Source(Protocol):
    """Makes predictors of one kind for one layer."""

    kind: str
    types: tuple[str, str] | None
    """of A and B, if they differ from the predictor file's"""
    ranks: range
    """ranks to choose from; few-bit kinds have only one, the width"""

    @property
    def ready(self) -> int:
        """Index of the highest of ``ranks`` that is already computed."""
        ...

    def parts(self, rank: int, neurons: slice) -> tuple[Matrix | None, Matrix, Matrix | None]:
        """A ``[rank, n_embd]``, B ``[neurons, rank]`` and c ``[rank]``, rounded as they are stored.

        Kinds without factors have no A; most have no c.
        """
        ...

    def n_bytes(self, rank: int) -> int:
        """Bytes of the predictor for all neurons."""
        ...


class _LowRank:
    """Low-rank factors, computed up to the highest rank requested so far."""

    kind = "low_rank"
    types: tuple[str, str] | None = None

    def __init__(self, data: LayerData, inputs: NDArray[np.float64], options: TrainOptions) -> None:
        n_ff, n_embd = data.weight.shape
        limit = min(n_embd, n_ff, n_embd if options.max_rank is None else options.max_rank)
        self.ranks = range(BLOCK, limit + 1, BLOCK)
        self._data = data
        self._inputs = inputs
        self._types = FACTOR_TYPES[options.type]
        self._spectrum: Spectrum | None = None
        self._a: Matrix | None = None
        self._b: Matrix | None = None

    @property
    def ready(self) -> int:
        """Index of the highest computed rank; higher ones need more eigenvectors."""
        return 0 if self._a is None else len(self._a) // BLOCK - 1

    def parts(self, rank: int, neurons: slice) -> tuple[Matrix, Matrix, None]:
        """A and B as prefixes of the computed factors, which works because quantised blocks of B run along the rank."""
        if self._a is None or self._b is None or rank > len(self._a):
            self._spectrum = self._spectrum or Spectrum.of(self._data.weight, self._inputs)
            n_embd = self._data.weight.shape[1]
            first = _FIRST_RANK if n_embd <= _FIRST_RANK else n_embd // _FIRST_SHARE
            wanted = max(rank, first if self._a is None else 2 * len(self._a))
            a, b = self._spectrum.factors(min(wanted, self.ranks[-1]) // BLOCK * BLOCK)
            self._a, self._b = quantised(a, self._types[0]), quantised(b, self._types[1])
        return self._a[:rank], self._b[neurons, :rank], None

    def n_bytes(self, rank: int) -> int:
        """Bytes of both factors and the thresholds."""
        return factor_bytes(self._data, self._types, rank)


def factor_bytes(data: LayerData, types: tuple[str, str], rank: int) -> int:
    """Bytes of A and B of these types, and of the thresholds."""
    n_embd: int = data.weight.shape[1]
    return rank * row_bytes(types[0], n_embd) + len(data.weight) * (row_bytes(types[1], rank) + _THRESHOLD_BYTES)


class _FewBits:
    """A copy of the matrix with one or two bits per weight."""

    types: tuple[str, str] | None = None

    def __init__(self, data: LayerData, how: Callable[[], Compensation], kind: str) -> None:
        n_embd = data.weight.shape[1]
        self.kind = kind
        self.ready = 0
        # The plugin's kernels process 32 weights at a time.
        self.ranks = range(n_embd, n_embd + 1) if n_embd % BLOCK == 0 else range(0)
        self._data = data
        self._how = how

    def parts(self, rank: int, neurons: slice) -> tuple[None, Matrix, None]:
        """B holds the levels; there is no A. Neurons are rounded independently, so a subset is cheap."""
        return None, few_bits(self._data.weight[neurons], self._how(), FEW_BITS[self.kind]), None

    def n_bytes(self, rank: int) -> int:
        """Bytes of the codes and the thresholds."""
        return len(self._data.weight) * (rank * FEW_BITS[self.kind] // 8 + _THRESHOLD_BYTES)


@dataclass(frozen=True)
class Fitted:
    """A calibrated predictor. The thresholds ``t`` include bias and mean; A and B are rounded as they are stored."""

    kind: str
    a: Matrix | None
    b: Matrix
    t: Matrix
    n_bytes: int
    types: tuple[str, str] | None = None
    """types of A and B, if they differ from the predictor file's"""
    c: Matrix | None = None

    @staticmethod
    def of(
        data: LayerData, source: Source, rank: int, held: HeldBack, options: TrainOptions, neurons: slice = slice(None)
    ) -> Fitted:
        """Calibrates a predictor of ``source`` on ``held``; ``data`` and ``held`` contain only ``neurons``."""
        a, b, c = source.parts(rank, neurons)
        found = scores(a, b, held.x, source.kind, c)
        t = calibrate(found, held, data, options.recall)
        if source.kind == "mlp":
            # It was trained to tell by one threshold, which fits some layers better than the regression does.
            single = np.full_like(t, one_threshold(found, held, options.recall))
            t = min(t, single, key=lambda each: int(np.count_nonzero(found > each)))
        return Fitted(source.kind, a, b, t, source.n_bytes(rank), source.types, c)

    def named(self, held: HeldBack) -> NDArray[np.bool_]:
        """Which neurons are candidates for each sample, ``[n, n_ff]``."""
        return scores(self.a, self.b, held.x, self.kind, self.c) > self.t

    def row_bytes(self, data: LayerData, held: HeldBack, named: NDArray[np.bool_]) -> float:
        """Bytes of rows per token: the first row of each candidate, and the other rows of those that fire."""
        n_active = int(np.count_nonzero(named & (held.mass > 0)))
        return (int(np.count_nonzero(named)) * data.first_bytes + n_active * data.rest_bytes) / len(held.x)

    def cost(self, data: LayerData, held: HeldBack, times: float = 1.0) -> float:
        """Cost of a token in streamed bytes, where each neuron of ``data`` represents ``times`` neurons."""
        return self.n_bytes + times * SCATTERED_COST * self.row_bytes(data, held, self.named(held))


def scores(a: Matrix | None, b: Matrix, x: Matrix, kind: str = "low_rank", c: Matrix | None = None) -> Matrix:
    """Scores ``[n, n_ff]`` of a predictor of this kind for the inputs ``x`` ``[n, n_embd]``."""
    hidden: Matrix = x if a is None else x @ a.T
    if c is not None:
        hidden = hidden + c
    return (np.maximum(hidden, 0) if kind == "mlp" else hidden) @ b.T


def exact_cost(data: LayerData, held: HeldBack) -> float:
    """Cost of a token in exact mode, in streamed bytes: the whole predicted matrix is streamed."""
    n_active = int(np.count_nonzero(held.mass)) / len(held.x)
    return len(data.weight) * data.first_bytes + SCATTERED_COST * n_active * data.rest_bytes


def cheapest(
    data: LayerData, sources: Sequence[Source], held: HeldBack, options: TrainOptions, *, keep: bool = False
) -> Fitted | None:
    """The predictor with the lowest cost, calibrated on ``held``; None if none pays off, unless ``keep`` is set."""
    chosen = _search(data, sources, held, options, keep=keep)
    if chosen is None:
        return None
    fitted = Fitted.of(data, chosen[0], chosen[1], held, options)
    return fitted if keep or fitted.cost(data, held) < exact_cost(data, held) else None


def _search(
    data: LayerData, sources: Sequence[Source], held: HeldBack, options: TrainOptions, *, keep: bool
) -> tuple[Source, int] | None:
    """Kind and rank with the lowest cost on a subset of neurons and samples."""
    neurons = slice(None, None, -(-len(data.weight) // _SEARCH_NEURONS))
    some = held.some(-(-len(held.x) // _SEARCH_SAMPLES), neurons)
    part = data.some(neurons)
    times = len(data.weight) / len(part.weight)
    lowest, best = math.inf if keep else times * exact_cost(part, some), None
    for source in sources:

        def cost(rank: int, source: Source = source) -> float:
            return Fitted.of(part, source, rank, some, options, neurons).cost(part, some, times)

        found = _lowest(cost, source, lowest)
        if found and found[0] < lowest:
            lowest, best = found[0], (source, found[1])
    return best


def _lowest(cost: Callable[[int], float], source: Source, bound: float) -> tuple[float, int] | None:
    """Lowest cost and its rank; None if no rank has a predictor that by itself costs less than ``bound``.

    Each additional rank costs the same but saves fewer candidates than the one before, so the cost falls and then
    rises. The search takes growing steps until the cost rises, then bisects around the best rank.
    """
    costs: dict[int, float] = {}

    def best() -> int:
        return min(costs, key=lambda known: (costs[known], known))

    at, falling = 0, True
    while at < len(source.ranks) and falling and source.n_bytes(source.ranks[at]) < min([bound, *costs.values()]):
        costs[at] = cost(source.ranks[at])
        falling = best() == at
        after = at + max(1, (at + 1) // 2)
        at = source.ready if at < source.ready < after else after
    while costs:
        known = sorted(costs)
        beside = known[max(known.index(best()) - 1, 0) : known.index(best()) + 2]
        between = {(best() + other) // 2 for other in beside}
        new = [at for at in sorted(between - set(costs)) if abs(at - best()) >= (best() + 1) // 12]
        if not new:
            return costs[best()], source.ranks[best()]
        costs |= {at: cost(source.ranks[at]) for at in new}
    return None
