"""The integer program: as good as brute force, better than greedy, quick at OPT-175B, on several devices too."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pinfer.artefacts.placement import GROUP
from pinfer.errors import PinferError
from pinfer.placement.integer_program import Layer, Placed, Room, place, place_greedily


def _fits(layers: Sequence[Layer], rooms: Sequence[Room], counts: Sequence[tuple[int, ...]]) -> bool:
    def taken(d: int, room: Room) -> int:
        largest = max(n[d] for n in counts)
        buffers = room.fixed + room.per_group * largest if largest else 0
        return buffers + sum(n[d] * x.group_bytes for n, x in zip(counts, layers, strict=True))

    return all(taken(d, room) <= room.budget for d, room in enumerate(rooms))


def _gain(layers: Sequence[Layer], counts: Sequence[tuple[int, ...]]) -> float:
    return float(sum(x.impact[: sum(n)].sum() for n, x in zip(counts, layers, strict=True)))


def _brute_force(layers: list[Layer], rooms: list[Room]) -> float:
    def choices(x: Layer) -> list[tuple[int, ...]]:
        each = [[0, *range(least, most + 1)] for least, most in zip(x.least, x.most, strict=True)]
        return [n for n in itertools.product(*each) if sum(n) <= len(x.impact)]

    return max(
        _gain(layers, chosen)
        for chosen in itertools.product(*(choices(x) for x in layers))
        if _fits(layers, rooms, chosen)
    )


def _check(layers: list[Layer], rooms: list[Room], placed: Placed) -> None:
    assert _fits(layers, rooms, placed.n_groups)
    for n, x in zip(placed.n_groups, layers, strict=True):
        assert sum(n) <= len(x.impact)
        assert all(k == 0 or low <= k <= high for k, low, high in zip(n, x.least, x.most, strict=True))
    objective = _gain(layers, placed.n_groups)
    assert placed.objective == pytest.approx(objective)
    assert placed.greedy <= placed.objective <= placed.bound
    assert 0 <= placed.gap <= 1


@st.composite
def _instances(draw: st.DrawFn, buffers: int = 0) -> tuple[list[Layer], list[Room]]:
    n_devices = draw(st.integers(1, 3))
    layers = []
    for _ in range(draw(st.integers(1, 4 if n_devices == 1 else 2))):
        impact = sorted(draw(st.lists(st.floats(0, 100), min_size=1, max_size=6)), reverse=True)
        layers.append(
            Layer(
                np.array(impact),
                draw(st.integers(1, 60)),
                least=tuple(draw(st.integers(1, 5)) for _ in range(n_devices)),
                most=tuple(draw(st.integers(1, len(impact))) for _ in range(n_devices)),
            )
        )
    total = sum(x.group_bytes * len(x.impact) for x in layers)
    needs = [draw(st.integers(0, buffers)) for _ in range(2)]
    return layers, [Room(draw(st.integers(0, total + 5)), *needs) for _ in range(n_devices)]


@settings(max_examples=120, deadline=None)
@given(_instances())
def test_small_instances_equal_brute_force(instance: tuple[list[Layer], list[Room]]) -> None:
    layers, rooms = instance
    placed = place(layers, rooms)
    _check(layers, rooms, placed)
    best = _brute_force(layers, rooms)
    assert placed.objective == pytest.approx(best, rel=1e-7, abs=1e-9)
    assert placed.bound >= best - 1e-9 * max(best, 1)


@settings(max_examples=80, deadline=None)
@given(_instances(buffers=40))
def test_buffers_are_kept_free_and_the_bound_holds(instance: tuple[list[Layer], list[Room]]) -> None:
    layers, rooms = instance
    placed = place(layers, rooms)
    _check(layers, rooms, placed)
    assert placed.bound >= _brute_force(layers, rooms) * (1 - 1e-9) - 1e-9
    assert _fits(layers, rooms, place_greedily(layers, rooms))


def _large(
    n_layers: int, n_groups: int, least: int, share: float, seed: int = 0, n_devices: int = 1
) -> tuple[list[Layer], list[Room]]:
    """The first of several devices has half of the memory, the others the rest."""
    rng = np.random.default_rng(seed)
    layers = [
        Layer(
            np.sort(rng.pareto(1 + rng.random() / 2, n_groups))[::-1] * rng.random(),
            64 * 40_000,
            (least,) * n_devices,
            (n_groups,) * n_devices,
        )
        for _ in range(n_layers)
    ]
    budget = int(share * sum(x.group_bytes * len(x.impact) for x in layers))
    others = n_devices - 1
    parts = [budget - others * (budget // 2 // max(1, others)), *(budget // 2 // others for _ in range(others))]
    return layers, [Room(part, 5_000_000, 64 * 3584) for part in parts]


@pytest.mark.parametrize(("share", "least"), [(0.02, 20), (0.1, 150), (0.3, 8), (0.7, 300)])
def test_opt_175b_in_seconds_and_no_worse_than_greedy(share: float, least: int) -> None:
    """96 layers of 49152 neurons."""
    layers, rooms = _large(96, 49152 // GROUP, least, share)
    placed = place(layers, rooms)
    _check(layers, rooms, placed)
    assert placed.seconds < 10
    assert placed.status == "optimal"
    assert placed.gap < 0.05
    if share == 0.1:
        # Greedy spreads the budget over so many layers that most stay under their least count.
        assert placed.objective > 5 * placed.greedy


def test_many_instances_between_the_extremes_keep_the_budgets_and_the_gap() -> None:
    for seed in range(6):
        layers, rooms = _large(24, 200, 1 + 7 * seed, 0.06 * (seed + 1), seed, n_devices=1 + seed % 3)
        placed = place(layers, rooms, time_limit=3)
        _check(layers, rooms, placed)
        assert placed.gap < 0.003, (seed, placed)
        assert placed.seconds < 10


def test_nothing_fits_or_nothing_pays() -> None:
    layers = [Layer(np.array([3.0, 2.0]), 100, (1,), (2,))]
    assert place(layers, [Room(99)]).n_groups == ((0,),)
    assert place(layers, [Room(100)]).n_groups == ((1,),)
    assert place(layers, [Room(10_000)]).n_groups == ((2,),)
    assert place([Layer(np.array([3.0, 2.0]), 100, (3,), (2,))], [Room(10_000)]).n_groups == ((0,),)
    assert place([Layer(np.array([3.0, 2.0]), 100, (), ())], []).n_groups == ((),)


def test_devices_share_layers_only_where_each_has_enough_of_them() -> None:
    """Two devices with room for 3 groups each; two layers of 4 groups, one of them worth more."""
    impact = np.array([4.0, 3.0, 2.0, 1.0])

    def placed(least: int) -> tuple[tuple[int, ...], ...]:
        layers = [Layer(impact, 1, (least,) * 2, (4,) * 2), Layer(impact / 2.5, 1, (least,) * 2, (4,) * 2)]
        return place(layers, [Room(3), Room(3)]).n_groups

    assert [sum(n) for n in placed(1)] == [4, 2]
    # The fourth group of the first layer would be alone on its device.
    for least in (2, 3):
        assert sorted(n for layer in placed(least) for n in layer) == [0, 0, 3, 3]


def test_the_largest_layer_is_weighed_against_its_buffers() -> None:
    """Room for 6 groups, or for 4 where one layer has 3 of them."""
    flat = Layer(np.array([3.0, 3.0, 3.0]), 10, (1,), (3,))
    steep = Layer(np.array([2.0, 1.0, 1.0]), 10, (1,), (3,))
    assert place([flat, steep, steep], [Room(60, per_group=10)]).n_groups == ((2,), (1,), (1,))
    assert place([flat, steep], [Room(60, per_group=10)]).n_groups == ((3,), (0,))
    assert place([flat, steep], [Room(60, fixed=41, per_group=10)]).n_groups == ((0,), (0,))


def test_a_device_does_more_than_its_share_where_the_others_are_full() -> None:
    layer = Layer(np.array([4.0, 3.0, 2.0, 1.0]), 10, (1, 1), (2, 2), (3, 3))
    assert place([layer], [Room(100), Room(100)]).n_groups == ((2, 2),)
    assert place([layer], [Room(100), Room(5)]).n_groups == ((3, 0),)


class _Result:
    def __init__(self, status: int, x: Any) -> None:
        self.status, self.x, self.fun, self.message = status, x, 0.0, "words of\nthe solver"


@pytest.mark.parametrize(("status", "hint"), [(1, "--time-limit"), (2, "--vram"), (3, "--vram"), (4, "--vram")])
def test_every_status_of_the_solver_is_checked(monkeypatch: pytest.MonkeyPatch, status: int, hint: str) -> None:
    monkeypatch.setattr("scipy.optimize.milp", lambda *_, **__: _Result(status, None))
    layers, rooms = _large(4, 10, 2, 0.5)
    with pytest.raises(PinferError, match="found no placement: words of the solver") as error:
        place(layers, rooms)
    assert hint in error.value.hint


def test_what_was_found_within_the_time_limit_is_used_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    layers, rooms = _large(4, 10, 2, 0.5)
    monkeypatch.setattr("scipy.optimize.milp", lambda value, **_: _Result(1, np.zeros(len(value))))
    placed = place(layers, rooms)
    assert placed.status == "time limit"
    _check(layers, rooms, placed)


def test_a_solution_that_breaks_a_limit_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scipy.optimize.milp", lambda value, **_: _Result(0, np.full(len(value), 9.0)))
    for n_devices in (1, 2):
        layers, rooms = _large(4, 10, 2, 0.5, n_devices=n_devices)
        placed = place(layers, rooms)
        _check(layers, rooms, placed)
        assert placed.status == "not usable"


def test_the_solver_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    """HiGHS prints a line on some instances, this one among them, past its own switch."""
    layers, rooms = _large(80, 448, 3, 0.1, n_devices=3)
    place(layers, rooms)
    assert capfd.readouterr().out == ""
