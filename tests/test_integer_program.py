"""The integer program: as good as brute force, better than greedy, quick at OPT-175B, on several devices too."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pinfer.artefacts.placement import GROUP
from pinfer.errors import PinferError
from pinfer.placement import integer_program as program
from pinfer.placement.integer_program import Layer, Placed, place, top_up


def _fits(layers: Sequence[Layer], budgets: Sequence[int], counts: Sequence[tuple[int, ...]]) -> bool:
    return all(
        sum(n[d] * x.group_bytes for n, x in zip(counts, layers, strict=True)) <= budget
        for d, budget in enumerate(budgets)
    )


def _gain(layers: Sequence[Layer], counts: Sequence[tuple[int, ...]]) -> float:
    return float(sum(x.impact[: sum(n)].sum() for n, x in zip(counts, layers, strict=True)))


def _brute_force(layers: list[Layer], budgets: list[int]) -> float:
    def choices(x: Layer) -> list[tuple[int, ...]]:
        each = [[0, *range(least, most + 1)] for least, most in zip(x.least, x.most, strict=True)]
        return [n for n in itertools.product(*each) if sum(n) <= len(x.impact)]

    return max(
        _gain(layers, chosen)
        for chosen in itertools.product(*(choices(x) for x in layers))
        if _fits(layers, budgets, chosen)
    )


def _check(layers: list[Layer], budgets: list[int], placed: Placed) -> None:
    assert _fits(layers, budgets, placed.n_groups)
    for n, x in zip(placed.n_groups, layers, strict=True):
        assert sum(n) <= len(x.impact)
        assert all(k == 0 or low <= k <= high for k, low, high in zip(n, x.least, x.most, strict=True))
    objective = _gain(layers, placed.n_groups)
    assert placed.objective == pytest.approx(objective)
    assert placed.greedy <= placed.objective <= placed.bound
    assert 0 <= placed.gap <= 1


@st.composite
def _instances(draw: st.DrawFn) -> tuple[list[Layer], list[int]]:
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
    return layers, [draw(st.integers(0, total + 5)) for _ in range(n_devices)]


@settings(max_examples=120, deadline=None)
@given(_instances())
def test_small_instances_equal_brute_force(instance: tuple[list[Layer], list[int]]) -> None:
    layers, budgets = instance
    placed = place(layers, budgets)
    _check(layers, budgets, placed)
    best = _brute_force(layers, budgets)
    assert placed.objective == pytest.approx(best, rel=1e-7, abs=1e-9)
    assert placed.bound >= best - 1e-9 * max(best, 1)


def _large(
    n_layers: int, n_groups: int, least: int, share: float, seed: int = 0, n_devices: int = 1
) -> tuple[list[Layer], list[int]]:
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
    return layers, [budget - others * (budget // 2 // max(1, others)), *(budget // 2 // others for _ in range(others))]


@pytest.mark.parametrize(("share", "least"), [(0.02, 20), (0.1, 150), (0.3, 8), (0.7, 300)])
def test_opt_175b_in_seconds_and_no_worse_than_greedy(share: float, least: int) -> None:
    """96 layers of 49152 neurons."""
    layers, budgets = _large(96, 49152 // GROUP, least, share)
    placed = place(layers, budgets)
    _check(layers, budgets, placed)
    assert placed.seconds < 10
    assert placed.status == "optimal"
    assert placed.gap < 0.05
    if share == 0.1:
        # Greedy spreads the budget over so many layers that most stay under their least count.
        assert placed.objective > 5 * placed.greedy


def test_many_instances_between_the_extremes_keep_the_budgets_and_the_gap() -> None:
    for seed in range(6):
        layers, budgets = _large(24, 200, 1 + 7 * seed, 0.06 * (seed + 1), seed, n_devices=1 + seed % 3)
        placed = place(layers, budgets)
        _check(layers, budgets, placed)
        assert placed.gap < 0.03, (seed, placed)


def test_nothing_fits_or_nothing_pays() -> None:
    layers = [Layer(np.array([3.0, 2.0]), 100, (1,), (2,))]
    assert place(layers, [99]).n_groups == ((0,),)
    assert place(layers, [100]).n_groups == ((1,),)
    assert place(layers, [10_000]).n_groups == ((2,),)
    assert place([Layer(np.array([3.0, 2.0]), 100, (3,), (2,))], [10_000]).n_groups == ((0,),)
    assert place([Layer(np.array([3.0, 2.0]), 100, (), ())], []).n_groups == ((),)


def test_devices_share_layers_only_where_each_has_enough_of_them() -> None:
    """Two devices with room for 3 groups each; two layers of 4 groups, one of them worth more."""
    impact = np.array([4.0, 3.0, 2.0, 1.0])

    def placed(least: int) -> tuple[tuple[int, ...], ...]:
        layers = [Layer(impact, 1, (least,) * 2, (4,) * 2), Layer(impact / 2.5, 1, (least,) * 2, (4,) * 2)]
        return place(layers, [3, 3]).n_groups

    assert [sum(n) for n in placed(1)] == [4, 2]
    # The fourth group of the first layer would be alone on its device.
    for least in (2, 3):
        assert sorted(n for layer in placed(least) for n in layer) == [0, 0, 3, 3]


def test_room_that_is_found_later_is_used() -> None:
    layers = [Layer(np.array([3.0, 2.0, 1.0]), 100, (1,), (3,))]
    placed = place(layers, [250])
    more = top_up(placed, layers, [300])
    assert (placed.n_groups, more.n_groups, more.objective) == (((2,),), ((3,),), 6.0)
    assert top_up(placed, [replace(layers[0], most=(2,))], [300]).n_groups == ((2,),)


class _Result:
    def __init__(self, status: int, x: Any) -> None:
        self.status, self.x, self.message = status, x, "words of\nthe solver"


@pytest.mark.parametrize(("status", "hint"), [(1, "--time-limit"), (2, "--vram"), (3, "--vram"), (4, "--vram")])
def test_every_status_of_the_solver_is_checked(monkeypatch: pytest.MonkeyPatch, status: int, hint: str) -> None:
    monkeypatch.setattr("scipy.optimize.milp", lambda *_, **__: _Result(status, None))
    layers, budgets = _large(4, 10, 2, 0.5)
    with pytest.raises(PinferError, match="found no placement: words of the solver") as error:
        place(layers, budgets)
    assert hint in error.value.hint


def test_what_was_found_within_the_time_limit_is_used_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    layers, budgets = _large(4, 10, 2, 0.5)
    monkeypatch.setattr("scipy.optimize.milp", lambda value, **_: _Result(1, np.zeros(len(value))))
    placed = place(layers, budgets)
    assert placed.status == "time limit"
    _check(layers, budgets, placed)


def test_a_solver_that_oversteps_its_tolerance_is_corrected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scipy.optimize.milp", lambda value, **_: _Result(0, np.full(len(value), 9.0)))
    for n_devices in (1, 2):
        layers, budgets = _large(4, 10, 2, 0.5, n_devices=n_devices)
        _check(layers, budgets, place(layers, budgets))
    layers, _ = _large(4, 10, 2, 0.5)
    counts = [[10] for _ in layers]
    program._State(layers, [0]).shrink(counts)
    assert counts == [[0]] * 4
