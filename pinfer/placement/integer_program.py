"""The integer program of placement (PowerInfer, section 6.3), a pure function of arrays.

Neurons are placed in groups of 64 of similar impact, the most important first, so a layer's share of a device is one
number, and what a layer brings depends only on the sum of them over the devices. The program maximises the impact on
the devices within the memory of each; a layer has either no groups on a device or at least C_l,d: fewer do not pay for
the synchronisation. Impact falls within a layer, so its sum is concave and is described by tangents.

The buffers of a device grow with its largest layer. The linear relaxation weighs that too: it says how large the
largest layer should be and bounds every placement. The integer program then runs with that size fixed, which takes it
seconds instead of minutes (docs/budget.md).
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pinfer.errors import PinferError

if TYPE_CHECKING:
    from scipy.optimize import OptimizeResult

MAX_TANGENTS = 64
_EXACT_GROUPS = 512
"""up to this many groups in all layers the optimum itself is found; above, one within ``_GAP`` of it"""
_GAP = 1e-3
_TOLERANCE = 4e-6
"""share of a budget that the solver may overstep and still call it kept"""

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
    """per device: with more groups than this it would be the slower side"""
    most_alone: tuple[int, ...] = ()
    """the same where the other devices have no memory left for this layer; ``most`` if empty"""


@dataclass(frozen=True)
class Room:
    """The memory of one device for hot neurons and their buffers, in bytes."""

    budget: int
    fixed: int = 0
    """buffers that any hot neuron needs"""
    per_group: int = 0
    """buffers for each group of the largest layer"""


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


def place(layers: Sequence[Layer], rooms: Sequence[Room], time_limit: float = 10.0) -> Placed:
    """Chooses the number of groups of each layer on each device.

    Raises PinferError when the solver comes back with nothing.
    """
    start = time.monotonic()
    instance = _Instance(layers, rooms)
    bound, largest = _relaxed(instance, time_limit)
    most = np.minimum(instance.most, largest)
    counts, status = _solved(instance, most, largest, time_limit)
    baseline = instance.greedy(most, largest)
    # The largest layer may come out smaller than allowed, and a device may do more where the others are full.
    for limit in (instance.most, instance.most_alone):
        instance.fill(counts, limit)
    best = max((counts, baseline), key=instance.impact)
    objective = instance.impact(best)
    return Placed(
        n_groups=_as_counts(best),
        objective=objective,
        bound=max(objective, bound),
        greedy=instance.impact(baseline),
        status=status,
        seconds=time.monotonic() - start,
    )


def place_greedily(layers: Sequence[Layer], rooms: Sequence[Room]) -> Counts:
    """A placement in no time, a little below the best one."""
    instance = _Instance(layers, rooms)
    counts = instance.greedy(instance.most, instance.n_groups.max() * np.ones(len(rooms), np.int64))
    instance.fill(counts, instance.most)
    return _as_counts(counts)


_Groups = NDArray[np.int64]
"""``[n_layers, n_devices]``, or one number per layer or device"""


def _as_counts(groups: _Groups) -> Counts:
    return tuple(tuple(row) for row in groups.tolist())


class _Instance:
    """Layers and devices as arrays, and what can be asked of groups per layer and device."""

    def __init__(self, layers: Sequence[Layer], rooms: Sequence[Room]) -> None:
        shape = len(layers), len(rooms)
        self.n_groups = np.array([len(layer.impact) for layer in layers])
        self.impacts = np.zeros((len(layers), int(self.n_groups.max())))
        for row, layer in zip(self.impacts, layers, strict=True):
            row[: len(layer.impact)] = layer.impact
        # Impact of the first n groups of each layer, from n = 0 on.
        self.prefix = np.pad(self.impacts.cumsum(axis=1), ((0, 0), (1, 0)))
        self.group_bytes = np.array([layer.group_bytes for layer in layers])
        self.budget = np.array([room.budget for room in rooms], dtype=np.int64)
        self.fixed = np.array([room.fixed for room in rooms], dtype=np.int64)
        self.per_group = np.array([room.per_group for room in rooms], dtype=np.int64)
        self.least = np.array([layer.least for layer in layers], dtype=np.int64).reshape(shape)
        most = np.array([layer.most for layer in layers], dtype=np.int64).reshape(shape)
        alone = np.array([layer.most_alone or layer.most for layer in layers], dtype=np.int64).reshape(shape)
        needed = self.fixed + self.least * (self.group_bytes[:, None] + self.per_group)
        fits = (self.least <= most) & (self.least <= self.n_groups[:, None]) & (needed <= self.budget)
        self.most = np.where(fits, np.minimum(most, self.n_groups[:, None]), 0)
        self.most_alone = np.where(fits, np.minimum(np.maximum(most, alone), self.n_groups[:, None]), 0)

    def impact(self, counts: _Groups) -> float:
        return float(np.take_along_axis(self.prefix, counts.sum(axis=1, keepdims=True), axis=1).sum())

    def left(self, counts: _Groups) -> _Groups:
        """Bytes that each device has left; negative where its budget is exceeded."""
        largest = counts.max(axis=0)
        buffers: _Groups = np.where(largest > 0, self.fixed + self.per_group * largest, 0)
        left: _Groups = self.budget - buffers - (self.group_bytes[:, None] * counts).sum(axis=0)
        return left

    def allows(self, counts: _Groups) -> bool:
        """Whether every limit is kept."""
        in_range = (counts == 0) | (counts >= self.least) & (counts <= self.most)
        return bool(in_range.all() and (counts.sum(axis=1) <= self.n_groups).all() and (self.left(counts) >= 0).all())

    def greedy(self, most: _Groups, largest: _Groups) -> _Groups:
        """The baseline: groups by impact per byte, each on the first device with room, while they fit; then without
        the layers that got too few. Buffers are kept free for a largest layer of this size."""
        counts = np.zeros_like(most)
        left = (self.budget - self.fixed - self.per_group * largest).tolist()
        density = self.impacts / self.group_bytes[:, None]
        smallest = self.group_bytes.min()
        for i in np.argsort(-density, axis=None, kind="stable") // density.shape[1]:
            for d, room in enumerate(left):
                if counts[i, d] < most[i, d] and self.group_bytes[i] <= room:
                    counts[i, d] += 1
                    left[d] -= self.group_bytes[i]
                    break
            else:
                if max(left, default=0) < smallest:
                    break
        return np.where(counts < self.least, 0, counts)

    def fill(self, counts: _Groups, most: _Groups) -> None:
        """Uses what is left of the budgets, by impact per byte: one group more, or the least of a layer."""
        while counts.size:
            total, largest = counts.sum(axis=1, keepdims=True), counts.max(axis=0)
            more = np.where(counts > 0, 1, self.least)
            buffers = self.per_group * np.maximum(0, counts + more - largest) + np.where(largest > 0, 0, self.fixed)
            price = more * self.group_bytes[:, None] + buffers
            allowed = (counts + more <= most) & (total + more <= self.n_groups[:, None]) & (price <= self.left(counts))
            after = np.minimum(total + more, self.prefix.shape[1] - 1)
            gain = np.take_along_axis(self.prefix, after, axis=1) - np.take_along_axis(self.prefix, total, axis=1)
            worth = np.where(allowed, gain / price, 0.0)
            best = np.unravel_index(int(worth.argmax()), worth.shape)
            if not worth[best] > 0:
                return
            counts[best] += more[best]


def _relaxed(instance: _Instance, time_limit: float) -> tuple[float, _Groups]:
    """An upper bound of the impact, and per device the groups that its largest layer should have at most."""
    no_limit = np.full(len(instance.budget), instance.n_groups.max())
    if not instance.most_alone.any():
        return 0.0, no_limit
    program = _Program(instance, instance.most_alone, None)
    result = program.run(False, time_limit)
    largest = np.ceil(result.x[program.largest] - _TOLERANCE).astype(np.int64)
    # A device whose layers all need more groups than that would stay empty.
    least = np.where(instance.most > 0, instance.least, no_limit).min(axis=0)
    largest = np.where(instance.per_group > 0, np.clip(largest, least, no_limit), no_limit)
    return float(-result.fun) * program.unit, largest


def _solved(instance: _Instance, most: _Groups, largest: _Groups, time_limit: float) -> tuple[_Groups, str]:
    """The integer program's counts when no layer may have more than ``most`` groups, and whether they are optimal."""
    counts = np.zeros_like(most)
    if not (most >= instance.least).any():
        return counts, "optimal"
    program = _Program(instance, np.where(most >= instance.least, most, 0), largest)
    gap = 1e-9 if instance.n_groups.sum() <= _EXACT_GROUPS else _GAP
    result = program.run(True, time_limit, gap)
    groups = np.where(result.x[program.on] > 0.5, np.rint(result.x[program.groups]), 0)
    counts[program.pair_layer, program.pair_device] = groups.astype(np.int64)
    if not instance.allows(counts):
        return np.zeros_like(most), "not usable"
    return counts, "optimal" if result.status == 0 else "time limit"


class _Program:
    """The program in HiGHS's terms.

    Variables: per pair of layer and device whether the layer is on it (0 or 1) and its groups there; per layer whether
    it is on any device, its groups and its impact in units of ``unit``; per device the groups of its largest layer,
    which are given (``largest``) or to be found.
    """

    def __init__(self, instance: _Instance, most: _Groups, largest: _Groups | None) -> None:
        self.pair_layer, self.pair_device = np.nonzero(most)
        n_pairs, (n_layers, n_devices) = len(self.pair_layer), most.shape
        ends = np.cumsum([0, n_pairs, n_pairs, n_layers, n_layers, n_layers, n_devices])
        columns = np.split(np.arange(ends[-1]), ends[1:-1])
        self.on, self.groups, anywhere, total, self.value, self.largest = columns
        self.unit = max(float(instance.impacts.sum()), 1e-300)
        pair, layer, device = np.arange(n_pairs), np.arange(n_layers), np.arange(n_devices)
        most_here = most[self.pair_layer, self.pair_device]
        top = np.minimum(most.sum(axis=1), instance.n_groups)
        known = np.zeros(n_devices, np.int64) if largest is None else largest
        bytes_left = np.maximum(0, instance.budget - instance.fixed - instance.per_group * known)
        # In units of the budget the numbers are in the range that the solver's tolerances are made for.
        unit = np.maximum(1.0, bytes_left)
        share = instance.group_bytes[self.pair_layer] / unit[self.pair_device]
        owner, slope, start = _tangents(instance, most, top, self.unit)
        tangent = np.arange(len(owner))
        self._upper = np.concatenate(
            [np.ones(n_pairs), most_here, top > 0, top, instance.prefix[layer, top] / self.unit, most.max(axis=0)]
        )
        self._entries: list[tuple[Any, ...]] = []
        self._limits: list[tuple[NDArray[np.float64], NDArray[np.float64]]] = []
        least_here = instance.least[self.pair_layer, self.pair_device]
        at_most = np.full(n_pairs, -np.inf), np.zeros(n_pairs)
        self._add(*at_most, (pair, self.on, least_here), (pair, self.groups, -1))
        self._add(*at_most, (pair, self.groups, 1), (pair, self.on, -most_here))
        none = np.zeros(n_layers)
        self._add(none - np.inf, none, (layer, anywhere, 1), (self.pair_layer, self.on, -1))
        self._add(none, none, (layer, total, 1), (self.pair_layer, self.groups, -1))
        self._add(
            np.full(len(owner), -np.inf),
            np.zeros(len(owner)),
            (tangent, self.value[owner], 1),
            (tangent, total[owner], -slope),
            (tangent, anywhere[owner], -start),
        )
        memory: list[tuple[Any, ...]] = [(self.pair_device, self.groups, share)]
        if largest is None:
            self._add(*at_most, (pair, self.groups, 1), (pair, self.largest[self.pair_device], -1))
            memory.append((device, self.largest, instance.per_group / unit))
        # Half a byte more for small budgets, less for large ones: what the solver takes for kept has to be kept.
        slack = 0.0 if largest is None else 0.5 - bytes_left * _TOLERANCE
        room = (bytes_left + slack) / unit
        self._add(room - np.inf, room, *memory)

    def _add(self, low: NDArray[np.float64], high: NDArray[np.float64], *terms: tuple[Any, ...]) -> None:
        """Rows ``low <= sum of factor x variable <= high``; a term gives row, column and factor of its entries."""
        n_before = sum(len(part) for part, _ in self._limits)
        for row, column, factor in terms:
            self._entries.append((np.broadcast_to(factor, np.shape(row)).astype(float), row + n_before, column))
        self._limits.append((low, high))

    def run(self, integers: bool, time_limit: float, gap: float = 0.0) -> OptimizeResult:
        """Runs HiGHS until it is within ``gap`` of the optimum. Raises PinferError for every status without a
        solution."""
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import csr_array

        low, high = (np.concatenate(parts) for parts in zip(*self._limits, strict=True))
        values, rows, columns = (np.concatenate(parts) for parts in zip(*self._entries, strict=True))
        matrix = csr_array((values, (rows, columns)), shape=(len(low), len(self._upper)))
        costs, integrality = np.zeros(len(self._upper)), np.zeros(len(self._upper), dtype=np.int64)
        costs[self.value] = -1
        integrality[: 2 * len(self.pair_layer)] = integers
        with _quiet_stdout():
            result = milp(
                costs,
                constraints=[LinearConstraint(matrix, low, high)],
                bounds=Bounds(np.zeros(len(costs)), self._upper),
                integrality=integrality,
                options={"time_limit": time_limit, "mip_rel_gap": gap},
            )
        if result.x is None or result.status not in (0, 1):
            hint = "give it more time: --time-limit SECONDS" if result.status == 1 else "try another --vram"
            raise PinferError(f"the solver found no placement: {' '.join(str(result.message).split())}", hint)
        return result


def _tangents(
    instance: _Instance, most: _Groups, top: _Groups, unit: float
) -> tuple[NDArray[np.int64], NDArray[np.float64], NDArray[np.float64]]:
    """Lines that are nowhere below the impact of a layer's first n groups: layer, slope, and height at n = 0.

    They touch it at every n that the layer can have, or at ``MAX_TANGENTS`` of them, denser where it bends more.
    """
    owners, slopes, starts = [], [], []
    for i in np.flatnonzero(top):
        least = int(instance.least[i][most[i] > 0].min())
        at = np.arange(least, top[i])
        if len(at) > MAX_TANGENTS:
            at = np.unique(np.geomspace(least, top[i] - 1, MAX_TANGENTS).astype(np.int64))
        slope = np.append(instance.impacts[i, at], 0.0) / unit
        owners.append(np.full(len(slope), i))
        slopes.append(slope)
        starts.append(instance.prefix[i, np.append(at, top[i])] / unit - slope * np.append(at, 0))
    return np.concatenate(owners), np.concatenate(slopes), np.concatenate(starts)


@contextmanager
def _quiet_stdout() -> Iterator[None]:
    """HiGHS prints some lines of its own to stdout, where the results of a command go."""
    flush = ctypes.CDLL(None).fflush
    flush(None)
    saved, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        yield
    finally:
        flush(None)
        os.dup2(saved, 1)
        os.close(saved)
        os.close(nowhere)
