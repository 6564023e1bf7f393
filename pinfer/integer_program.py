"""The integer program of placement (PowerInfer, section 6.3), a pure function of arrays.

Neurons enter the device in groups of 64 of similar impact, most important first, so a layer's share is one number n_l.
What is maximised is the impact on the device, subject to its memory, and per layer either nothing or at least C_l
groups: fewer do not pay for the synchronisation. Because impact falls within a layer, the first C_l groups are one
yes-or-no block, and the rest follows a concave curve; that keeps the program small. Long layers are cut into at most
128 bins.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pinfer.errors import PinferError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

MAX_BINS = 128
_EXACT = 2048
"""up to this many variables, the groups themselves are integers; above, one group may be lost to rounding"""


@dataclass(frozen=True)
class Layer:
    """What the program knows about one layer."""

    impact: NDArray[np.float64]
    """``[n_groups]``, falling"""
    group_bytes: int
    least: int
    """C_l: this many groups or none, at least 1"""
    most: int
    """more groups than this would make the device the slower side"""


@dataclass(frozen=True)
class Placed:
    """The solution and what is known about its quality."""

    n_groups: tuple[int, ...]
    """per layer"""
    objective: float
    bound: float
    """no placement within the budget can have more impact than this"""
    greedy: float
    """impact of the baseline: groups by impact per byte, layers below their least count dropped afterwards"""
    status: str
    seconds: float

    @property
    def gap(self) -> float:
        """How far below the bound the objective may be, as a share of the bound."""
        return max(0.0, (self.bound - self.objective) / self.bound) if self.bound > 0 else 0.0


def place(layers: Sequence[Layer], budget: int, time_limit: float = 60.0) -> Placed:
    """Chooses the number of groups of each layer. Raises PinferError when the solver comes back with nothing."""
    start = time.monotonic()
    usable = [i for i, layer in enumerate(layers) if _can_enter(layer, budget)]
    status = "optimal"
    n_groups = [0] * len(layers)
    if usable:
        found, status = _solve([layers[i] for i in usable], budget, time_limit)
        for i, n in zip(usable, found, strict=True):
            n_groups[i] = n
    greedy = _greedy(layers, budget)
    # Which layers are on is the hard part; bins and rounding can cost a few groups, which the refilled one gets back.
    refilled = _refill(layers, [n > 0 for n in n_groups], budget)
    for candidate in (n_groups, refilled):
        _fill(layers, candidate, budget)
    n_groups = max((n_groups, refilled, greedy), key=lambda n: _impact(layers, n))
    objective = _impact(layers, n_groups)
    return Placed(
        n_groups=tuple(n_groups),
        objective=objective,
        bound=max(objective, _bound(layers, budget)),
        greedy=_impact(layers, greedy),
        status=status,
        seconds=time.monotonic() - start,
    )


def _can_enter(layer: Layer, budget: int) -> bool:
    return 1 <= layer.least <= min(layer.most, len(layer.impact)) and layer.least * layer.group_bytes <= budget


def _impact(layers: Sequence[Layer], n_groups: Sequence[int]) -> float:
    return float(sum(layer.impact[:n].sum() for layer, n in zip(layers, n_groups, strict=True)))


def _bytes(layers: Sequence[Layer], n_groups: Sequence[int]) -> int:
    return sum(layer.group_bytes * n for layer, n in zip(layers, n_groups, strict=True))


@dataclass(frozen=True)
class _Bins:
    """The groups of a layer beyond its least count, cut into bins of similar impact."""

    sizes: NDArray[np.int64]
    impact: NDArray[np.float64]
    """of one group, on average over the bin"""


def _bins(layer: Layer) -> _Bins:
    import numpy as np

    rest = layer.impact[layer.least : layer.most]
    edges = np.unique(np.linspace(0, len(rest), min(len(rest), MAX_BINS) + 1).astype(np.int64))
    sizes = np.diff(edges)
    return _Bins(sizes, np.add.reduceat(rest, edges[:-1]) / sizes if len(rest) else np.empty(0))


def _solve(layers: Sequence[Layer], budget: int, time_limit: float) -> tuple[list[int], str]:
    """Runs HiGHS. Variables: per layer one yes-or-no for the least count, then the groups taken from each bin."""
    import numpy as np
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    bins = [_bins(layer) for layer in layers]
    n_bins = [len(b.sizes) for b in bins]
    n_layers, n_variables = len(layers), len(layers) + sum(n_bins)
    owner = np.repeat(np.arange(n_layers), n_bins)
    sizes = np.concatenate([b.sizes for b in bins])
    value = np.concatenate([[layer.impact[: layer.least].sum() for layer in layers], *[b.impact for b in bins]])
    weight = np.concatenate(
        [
            [layer.least * layer.group_bytes for layer in layers],
            np.array([layer.group_bytes for layer in layers])[owner],
        ]
    )
    # A bin opens only when its layer is on: x_b - size_b * y_l <= 0.
    rows = np.arange(len(sizes))
    opened = csr_array(
        (
            np.concatenate([np.ones(len(sizes)), -sizes.astype(float)]),
            (np.concatenate([rows, rows]), np.concatenate([n_layers + rows, owner])),
        ),
        shape=(len(sizes), n_variables),
    )
    # Bytes in units of the budget keep the numbers in the range that the solver's tolerances are made for.
    memory = csr_array((weight / budget)[np.newaxis, :])
    exact = n_variables <= _EXACT
    integrality = np.concatenate([np.ones(n_layers), np.full(len(sizes), float(exact))])
    scale = max(float(value.sum()), 1e-300)
    result = milp(
        -value / scale,
        constraints=[LinearConstraint(memory, -np.inf, 1.0), LinearConstraint(opened, -np.inf, 0.0)],
        bounds=Bounds(np.zeros(n_variables), np.concatenate([np.ones(n_layers), sizes])),
        integrality=integrality,
        options={"time_limit": time_limit, "mip_rel_gap": 1e-9 if exact else 1e-4},
    )
    if result.x is None or result.status not in (0, 1):
        hint = "give it more time: --time-limit SECONDS" if result.status == 1 else "try another --vram"
        raise PinferError(f"the solver found no placement: {' '.join(str(result.message).split())}", hint)
    taken = np.bincount(owner, weights=result.x[n_layers:], minlength=n_layers)
    on = result.x[:n_layers] > 0.5
    # The solver's own tolerance must not turn 3 into 2.
    n_groups = [layer.least + int(n + 1e-6) if y else 0 for layer, n, y in zip(layers, taken, on, strict=True)]
    _shrink(layers, n_groups, budget)
    return n_groups, "optimal" if result.status == 0 else "time limit"


def _shrink(layers: Sequence[Layer], n_groups: list[int], budget: int) -> None:
    """Takes groups away until the budget is kept to the byte: the solver keeps it within its tolerance only."""
    excess = _bytes(layers, n_groups) - budget
    while excess > 0:
        can = [i for i, n in enumerate(n_groups) if n > layers[i].least]
        if not can:
            can = [i for i, n in enumerate(n_groups) if n]
            i = min(can, key=lambda i: layers[i].impact[: n_groups[i]].sum())
            excess -= layers[i].group_bytes * n_groups[i]
            n_groups[i] = 0
            continue
        i = min(can, key=lambda i: layers[i].impact[n_groups[i] - 1])
        n_groups[i] -= 1
        excess -= layers[i].group_bytes


def _refill(layers: Sequence[Layer], on: Sequence[bool], budget: int) -> list[int]:
    """The least counts of the layers that are on, then their other groups by impact per byte."""
    n_groups = [layer.least if y else 0 for layer, y in zip(layers, on, strict=True)]
    rest = [
        layer.impact[layer.least : layer.most] if y else layer.impact[:0] for layer, y in zip(layers, on, strict=True)
    ]
    more = _by_density(layers, rest, budget - _bytes(layers, n_groups))
    return [n + m for n, m in zip(n_groups, more, strict=True)]


def _by_density(layers: Sequence[Layer], impact: Sequence[NDArray[np.float64]], budget: int) -> list[int]:
    """How many of each layer's groups (those of ``impact``) fit, taken by impact per byte."""
    import numpy as np

    density = np.concatenate([groups / layer.group_bytes for layer, groups in zip(layers, impact, strict=True)])
    owner = np.repeat(np.arange(len(layers)), [len(groups) for groups in impact])
    order = np.argsort(-density, kind="stable")
    prices = np.array([layer.group_bytes for layer in layers], dtype=np.int64)[owner[order]]
    fits = int(np.searchsorted(np.cumsum(prices), budget, side="right"))
    return [int(n) for n in np.bincount(owner[order[:fits]], minlength=len(layers))]


def _fill(layers: Sequence[Layer], n_groups: list[int], budget: int) -> None:
    """Uses what rounding left of the budget, the most important group or layer first."""
    left = budget - _bytes(layers, n_groups)
    while True:
        best, gain, cost, count = -1, 0.0, 0, 0
        for i, layer in enumerate(layers):
            to = n_groups[i] + 1 if n_groups[i] else layer.least
            price = (to - n_groups[i]) * layer.group_bytes
            if to > min(layer.most, len(layer.impact)) or price > left or not _can_enter(layer, budget):
                continue
            value = float(layer.impact[n_groups[i] : to].sum())
            if value > gain:
                best, gain, cost, count = i, value, price, to
        if best < 0:
            return
        n_groups[best] = count
        left -= cost


def _greedy(layers: Sequence[Layer], budget: int) -> list[int]:
    """The baseline: groups by impact per byte while they fit, then without the layers that got too few."""
    counts = _by_density(layers, [layer.impact[: layer.most] for layer in layers], budget)
    return [n if n >= layer.least else 0 for layer, n in zip(layers, counts, strict=True)]


def _bound(layers: Sequence[Layer], budget: int) -> float:
    """The Lagrangian bound: for any price p per byte, p * budget + the best each layer can do at that price."""
    import numpy as np

    curves = []
    for layer in layers:
        if not _can_enter(layer, budget):
            continue
        n = np.arange(layer.least, min(layer.most, len(layer.impact)) + 1)
        curves.append((np.cumsum(layer.impact)[n - 1], n * float(layer.group_bytes)))
    if not curves:
        return 0.0

    def at(price: float) -> float:
        return price * budget + sum(max(0.0, float((value - price * size).max())) for value, size in curves)

    low, high = 0.0, max(float((value / size).max()) for value, size in curves)
    for _ in range(60):
        third = (high - low) / 3
        if at(low + third) <= at(high - third):
            high -= third
        else:
            low += third
    return min(at(low), at(high), at((low + high) / 2))
