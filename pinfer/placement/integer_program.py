"""The integer program of placement (PowerInfer, section 6.3), a pure function of arrays.

Neurons enter a device in groups of 64 of similar impact, most important first, so a layer's share of a device is one
number, and what a layer brings depends on the sum of them alone. What is maximised is the impact on the devices,
subject to the memory of each, and per layer and device either nothing or at least C_l,d groups: fewer do not pay for
the synchronisation. Because impact falls within a layer, its first groups are one yes-or-no block, and the rest follows
a concave curve; that keeps the program small. Long layers are cut into at most 128 bins.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from pinfer.errors import PinferError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from scipy.optimize import LinearConstraint
    from scipy.sparse import csr_array

MAX_BINS = 128
_EXACT = 2048
"""up to this many variables, the groups themselves are integers; above, one group may be lost to rounding"""

Counts = tuple[tuple[int, ...], ...]
"""groups per layer and device"""


@dataclass(frozen=True)
class Layer:
    """What the program knows about one layer."""

    impact: NDArray[np.float64]
    """``[n_groups]``, falling"""
    group_bytes: int
    least: tuple[int, ...]
    """C_l,d per device: this many groups or none, at least 1"""
    most: tuple[int, ...]
    """per device: more groups than this would make it the slower side"""


@dataclass(frozen=True)
class Placed:
    """The solution and what is known about its quality."""

    n_groups: Counts
    objective: float
    bound: float
    """no placement within the budgets can have more impact than this"""
    greedy: float
    """impact of the baseline: groups by impact per byte, layers below their least count dropped afterwards"""
    status: str
    seconds: float

    @property
    def gap(self) -> float:
        """How far below the bound the objective may be, as a share of the bound."""
        return max(0.0, (self.bound - self.objective) / self.bound) if self.bound > 0 else 0.0


def place(layers: Sequence[Layer], budgets: Sequence[int], time_limit: float = 60.0) -> Placed:
    """Chooses the number of groups of each layer on each device.

    ``budgets`` are bytes per device. Raises PinferError when the solver comes back with nothing.
    """
    start = time.monotonic()
    state = _State(layers, budgets)
    status = "optimal"
    solved = state.nothing()
    if state.pairs:
        solved, status = _solve(state, time_limit)
    baseline = state.greedy()
    # Which layers are on is the hard part; bins and rounding can cost a few groups, which the refilled one gets back.
    refilled = state.refilled(solved)
    for candidate in (solved, refilled):
        state.fill(candidate)
    best = max((solved, refilled, baseline), key=state.impact)
    objective = state.impact(best)
    return Placed(
        n_groups=_frozen(best),
        objective=objective,
        bound=max(objective, state.bound()),
        greedy=state.impact(baseline),
        status=status,
        seconds=time.monotonic() - start,
    )


def place_greedily(layers: Sequence[Layer], budgets: Sequence[int]) -> Counts:
    """A placement in no time, some per cent below the best one: to compare budgets with each other."""
    state = _State(layers, budgets)
    counts = state.greedy()
    state.fill(counts)
    return _frozen(counts)


def top_up(placed: Placed, layers: Sequence[Layer], budgets: Sequence[int]) -> Placed:
    """What more fits when budgets have grown since; ``layers`` may allow fewer groups than before, not fewer than
    there are."""
    state = _State(layers, budgets)
    counts = [list(n) for n in placed.n_groups]
    state.fill(counts)
    objective = state.impact(counts)
    bound = max(objective, placed.bound, state.bound())
    return replace(placed, n_groups=_frozen(counts), objective=objective, bound=bound)


def _frozen(counts: _Counts) -> Counts:
    return tuple(tuple(n) for n in counts)


_Counts = list[list[int]]


@dataclass(frozen=True)
class _Step:
    """Groups that may be added to a layer on a device at once."""

    layer: int
    device: int
    n_groups: int
    price: int
    gain: float


class _State:
    """Layers and budgets, and what can be asked of groups per layer and device."""

    def __init__(self, layers: Sequence[Layer], budgets: Sequence[int]) -> None:
        import numpy as np

        self.layers = layers
        self.budgets = list(budgets)
        # Impact of the first n groups of each layer, from n = 0 on.
        self.prefix = [np.concatenate([[0.0], np.cumsum(layer.impact)]) for layer in layers]
        self.pairs = [(i, d) for i in range(len(layers)) for d in range(len(budgets)) if self._can_enter(i, d)]
        self._usable = set(self.pairs)

    def _can_enter(self, i: int, d: int) -> bool:
        layer = self.layers[i]
        least = layer.least[d]
        return 1 <= least <= min(layer.most[d], len(layer.impact)) and least * layer.group_bytes <= self.budgets[d]

    def nothing(self) -> _Counts:
        return [[0] * len(self.budgets) for _ in self.layers]

    def impact(self, counts: _Counts) -> float:
        return float(sum(prefix[sum(n)] for prefix, n in zip(self.prefix, counts, strict=True)))

    def left(self, counts: _Counts) -> list[int]:
        """Bytes that each device has left; negative where its budget is exceeded."""
        taken = [
            sum(layer.group_bytes * n[d] for layer, n in zip(self.layers, counts, strict=True))
            for d in range(len(self.budgets))
        ]
        return [budget - used for budget, used in zip(self.budgets, taken, strict=True)]

    def shrink(self, counts: _Counts) -> None:
        """Takes groups away until every limit is kept to the byte: the solver keeps them within its tolerance only."""
        for i, layer in enumerate(self.layers):
            for d in reversed(range(len(self.budgets))):
                excess = sum(counts[i]) - len(layer.impact)
                if excess > 0:
                    counts[i][d] = n if (n := counts[i][d] - excess) >= layer.least[d] else 0
        for d, left in enumerate(self.left(counts)):
            while left < 0:
                left += self._drop(counts, d)

    def _drop(self, counts: _Counts, d: int) -> int:
        """Takes the least important group from a device, or a layer where none has more than its least; the bytes."""
        steps = []
        for i, layer in enumerate(self.layers):
            n, total = counts[i][d], sum(counts[i])
            away = 1 if n > layer.least[d] else n
            if n:
                loss = float(self.prefix[i][total] - self.prefix[i][total - away])
                steps.append((away > 1 or n <= layer.least[d], loss, i, away))
        _, _, i, away = min(steps)
        counts[i][d] -= away
        return away * self.layers[i].group_bytes

    def refilled(self, on: _Counts) -> _Counts:
        """The least counts where ``on`` has any, then other groups there by impact per byte."""
        counts = self.nothing()
        for i, layer in enumerate(self.layers):
            for d, n in enumerate(on[i]):
                if n and sum(counts[i]) + layer.least[d] <= len(layer.impact):
                    counts[i][d] = layer.least[d]
        most = [
            [m if n else 0 for m, n in zip(layer.most, some, strict=True)]
            for layer, some in zip(self.layers, counts, strict=True)
        ]
        self._by_density(counts, most)
        return counts

    def greedy(self) -> _Counts:
        """The baseline: groups by impact per byte while they fit, then without the layers that got too few."""
        counts = self.nothing()
        most = [
            [m if (i, d) in self._usable else 0 for d, m in enumerate(layer.most)]
            for i, layer in enumerate(self.layers)
        ]
        self._by_density(counts, most)
        return [
            [n if n >= least else 0 for n, least in zip(some, layer.least, strict=True)]
            for some, layer in zip(counts, self.layers, strict=True)
        ]

    def _by_density(self, counts: _Counts, most: _Counts) -> None:
        """Adds groups in the order of their impact per byte, each to the first device that has room for it."""
        import numpy as np

        left = self.left(counts)
        rest = [layer.impact[sum(n) :] for layer, n in zip(self.layers, counts, strict=True)]
        density = np.concatenate([groups / layer.group_bytes for layer, groups in zip(self.layers, rest, strict=True)])
        owner = np.repeat(np.arange(len(rest)), [len(groups) for groups in rest])
        smallest = min(layer.group_bytes for layer in self.layers)
        for i in owner[np.argsort(-density, kind="stable")].tolist():
            size = self.layers[i].group_bytes
            for d, room in enumerate(left):
                if counts[i][d] < most[i][d] and size <= room:
                    counts[i][d] += 1
                    left[d] -= size
                    break
            else:
                if max(left, default=0) < smallest:
                    return

    def fill(self, counts: _Counts) -> None:
        """Uses what rounding left of the budgets, the most important group or layer first."""
        left = self.left(counts)
        while steps := [step for i, d in self.pairs if (step := self._step(counts, i, d, left[d])) is not None]:
            best = max(steps, key=lambda step: step.gain)
            counts[best.layer][best.device] += best.n_groups
            left[best.device] -= best.price

    def _step(self, counts: _Counts, i: int, d: int, room: int) -> _Step | None:
        """The smallest step up of a layer on a device, None where it cannot be taken or brings nothing."""
        layer, n, total = self.layers[i], counts[i][d], sum(counts[i])
        more = 1 if n else layer.least[d]
        price = more * layer.group_bytes
        if n + more > layer.most[d] or total + more > len(layer.impact) or price > room:
            return None
        gain = float(self.prefix[i][total + more] - self.prefix[i][total])
        return _Step(i, d, more, price, gain) if gain > 0 else None

    def bound(self) -> float:
        """The Lagrangian bound of all devices taken as one: for any price p per byte, p times the budget + the best
        each layer can do at that price."""
        import numpy as np

        budget = sum(self.budgets)
        curves = []
        for i, layer in enumerate(self.layers):
            devices = [d for d in range(len(self.budgets)) if (i, d) in self._usable]
            if devices:
                most = min(len(layer.impact), sum(layer.most[d] for d in devices))
                n = np.arange(min(layer.least[d] for d in devices), most + 1)
                curves.append((self.prefix[i][n], n * float(layer.group_bytes)))
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


class _Program:
    """The program in HiGHS's terms.

    Variables, in this order: per pair of layer and device whether it is on (0 or 1), and its groups beyond its least
    count; per layer whether any device has it (0 or 1), and the groups taken from each bin.
    """

    def __init__(self, state: _State) -> None:
        import numpy as np

        self.state = state
        self.layers = sorted({i for i, _ in state.pairs})
        row_of = {i: row for row, i in enumerate(self.layers)}
        self.pair_layer = np.array([row_of[i] for i, _ in state.pairs])
        self.pair_device = np.array([d for _, d in state.pairs])
        self.least = np.array([state.layers[i].least[d] for i, d in state.pairs], dtype=float)
        most = [min(state.layers[i].most[d], len(state.layers[i].impact)) for i, d in state.pairs]
        self.extra = np.array(most, dtype=float) - self.least
        # The groups that a layer has wherever it is on: one block.
        self.block = np.full(len(self.layers), np.inf)
        np.minimum.at(self.block, self.pair_layer, self.least)
        bins = [_bins(state.layers[i].impact[int(n) :]) for i, n in zip(self.layers, self.block, strict=True)]
        self.bin_layer = np.repeat(np.arange(len(bins)), [len(sizes) for sizes, _ in bins])
        self.bin_size = np.concatenate([sizes for sizes, _ in bins])
        self.bin_impact = np.concatenate([impact for _, impact in bins])
        self.ends = np.cumsum([0, len(self.least), len(self.least), len(self.layers), len(self.bin_size)])

    @property
    def n_variables(self) -> int:
        return int(self.ends[-1])

    def value(self) -> NDArray[np.float64]:
        """Impact that one unit of each variable brings."""
        import numpy as np

        blocks = [self.state.prefix[i][int(n)] for i, n in zip(self.layers, self.block, strict=True)]
        return np.concatenate([np.zeros(self.ends[2]), blocks, self.bin_impact])

    def upper(self) -> NDArray[np.float64]:
        import numpy as np

        return np.concatenate([np.ones(len(self.least)), self.extra, np.ones(len(self.layers)), self.bin_size])

    def integrality(self, exact: bool) -> NDArray[np.int64]:
        import numpy as np

        kinds = np.array([1, int(exact), 1, int(exact)])
        return np.repeat(kinds, np.diff(self.ends))

    def constraints(self) -> list[LinearConstraint]:
        """Rows of the program as scipy's LinearConstraint."""
        import numpy as np
        from scipy.optimize import LinearConstraint

        on, extra, layer, taken = (self._unit(part) for part in range(4))
        at_layer = self._sum_by(self.pair_layer, len(self.layers))
        group_bytes = np.array(
            [self.state.layers[self.layers[row]].group_bytes for row in self.pair_layer], dtype=float
        )
        # Bytes in units of the budget keep the numbers in the range that the solver's tolerances are made for.
        share = group_bytes / np.maximum(1.0, np.array(self.state.budgets, dtype=float))[self.pair_device]
        groups = _scaled(on, self.least) + extra
        memory = self._sum_by(self.pair_device, len(self.state.budgets)) @ _scaled(groups, share)
        from_bins = self._sum_by(self.bin_layer, len(self.layers)) @ taken
        rules = [
            (memory, -np.inf, 1.0),
            # Groups on the devices are those of the layer's block and bins.
            (at_layer @ groups - _scaled(layer, self.block) - from_bins, 0.0, 0.0),
            # Nothing without its switch: groups beyond the least of a pair, pairs and bins of a layer.
            (extra - _scaled(on, self.extra), -np.inf, 0.0),
            (on - layer[self.pair_layer], -np.inf, 0.0),
            (layer - at_layer @ on, -np.inf, 0.0),
            (taken - _scaled(layer[self.bin_layer], self.bin_size), -np.inf, 0.0),
        ]
        return [LinearConstraint(rows, low, high) for rows, low, high in rules if rows.shape[0]]

    def _unit(self, part: int) -> csr_array:
        """The variables of one part as rows over all variables."""
        import numpy as np
        from scipy.sparse import csr_array

        columns = np.arange(self.ends[part], self.ends[part + 1])
        shape = (len(columns), self.n_variables)
        return csr_array((np.ones(len(columns)), (np.arange(len(columns)), columns)), shape=shape)

    @staticmethod
    def _sum_by(owner: NDArray[np.int64], n: int) -> csr_array:
        """Sums what belongs to each of ``n`` owners."""
        import numpy as np
        from scipy.sparse import csr_array

        return csr_array((np.ones(len(owner)), (owner, np.arange(len(owner)))), shape=(n, len(owner)))


def _scaled(rows: csr_array, factors: NDArray[np.float64]) -> csr_array:
    """Each row times its factor."""
    from scipy.sparse import diags_array

    scaled: csr_array = (diags_array(factors.astype(float)) @ rows).tocsr()
    return scaled


def _bins(rest: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """The groups of a layer beyond its block, cut into bins: how many are in each, and the impact of one on average."""
    import numpy as np

    edges = np.unique(np.linspace(0, len(rest), min(len(rest), MAX_BINS) + 1).astype(np.int64))
    sizes = np.diff(edges)
    return sizes, np.add.reduceat(rest, edges[:-1]) / sizes if len(rest) else np.empty(0)


def _solve(state: _State, time_limit: float) -> tuple[_Counts, str]:
    """Runs HiGHS."""
    import numpy as np
    from scipy.optimize import Bounds, milp

    program = _Program(state)
    exact = program.n_variables <= _EXACT
    value = program.value()
    result = milp(
        -value / max(float(value @ program.upper()), 1e-300),
        constraints=program.constraints(),
        bounds=Bounds(np.zeros(program.n_variables), program.upper()),
        integrality=program.integrality(exact),
        options={"time_limit": time_limit, "mip_rel_gap": 1e-9 if exact else 1e-4},
    )
    if result.x is None or result.status not in (0, 1):
        hint = "give it more time: --time-limit SECONDS" if result.status == 1 else "try another --vram"
        raise PinferError(f"the solver found no placement: {' '.join(str(result.message).split())}", hint)
    n_pairs = len(state.pairs)
    counts = state.nothing()
    for p, (i, d) in enumerate(state.pairs):
        if result.x[p] > 0.5:
            # The solver's own tolerance must not turn 3 into 2.
            extra = min(int(result.x[n_pairs + p] + 1e-6), int(program.extra[p]))
            counts[i][d] = int(program.least[p]) + extra
    state.shrink(counts)
    return counts, "optimal" if result.status == 0 else "time limit"
