"""`pinfer solve`: chooses the neurons for the devices within a memory budget (PowerInfer, section 6).

The first device takes the output and as many dense layers as fit, with their KV cache and compute buffers. The integer
program then fills all devices with hot neurons. Predictors stay on the CPU, with the cold neurons they select.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pinfer.artefacts import paths
from pinfer.artefacts.placement import GROUP, PlacementFile, group, new_placement_id
from pinfer.artefacts.predictor import PredictorFile
from pinfer.artefacts.profile import ProfileFile
from pinfer.artefacts.shards import DownTypes, cold_neuron_bytes, down_types, hot_unit_bytes
from pinfer.llama.cache_types import CacheTypes, cache_type_bytes
from pinfer.model import Ffn, FfnKind, Model, open_model
from pinfer.placement.budget import Budget, SolveOptions, make_budget
from pinfer.placement.cost_model import LayerCost, PredictorCost, Use, dense_seconds, ffn_cost
from pinfer.placement.integer_program import Counts, Layer, Placed, place, place_greedily
from pinfer.placement.machine import Machine
from pinfer.placement.model_bytes import kv_bytes, layer_bytes, output_bytes, widest
from pinfer.progress import NULL_PROGRESS, Progress

__all__ = ["SolveOptions", "SolveReport", "solve"]

# Speedup from which another use of the memory is worth mentioning.
_WORTH_SAYING = 1.05


@dataclass(frozen=True)
class DeviceReport:
    """What is placed on one device."""

    name: str
    vram: int
    n_bytes: Mapping[str, int]
    """by part"""
    n_hot: tuple[int, ...]
    """units (neurons, or the experts of a stack) per FFN"""


@dataclass(frozen=True)
class FfnReport:
    """What was placed of an FFN."""

    layer: int
    kind: FfnKind
    n_units: int
    """neurons, or the experts of a stack"""
    n_hot: int
    """units on all devices"""
    n_neurons: int
    """of a unit"""


@dataclass(frozen=True)
class SolveReport:
    """The placement, its quality and the predicted speeds."""

    placement: Path
    device: str
    """names, separated by commas; ``none`` without one"""
    vram: int
    n_ctx: int
    n_gpu_layers: int
    ffns: tuple[FfnReport, ...]
    n_hot: tuple[int, ...]
    """units per FFN, on all devices"""
    devices: tuple[DeviceReport, ...]
    hot_activations: float
    """share of all activations that fall on hot neurons; of the bytes that are used, where whole experts are placed"""
    n_bytes: Mapping[str, int]
    """memory of all devices by part"""
    objective: float
    """activations per token on the devices; bytes where whole experts are placed"""
    bound: float
    gap: float
    greedy: float
    status: str
    solver_seconds: float
    tokens_per_s: float
    """predicted for this placement"""
    tokens_per_s_cold: float
    """predicted with every neuron cold"""
    tokens_per_s_dense: float
    """predicted for dense FFNs with the same device memory"""
    tokens_per_s_hot_first: float
    """predicted with hot neurons, placed greedily, instead of dense layers on the devices"""
    cache_types: CacheTypes
    machine: Machine
    whole_experts: bool
    """nothing is zero in the experts, so no neuron is placed by itself"""

    @property
    def hot_share(self) -> float:
        """Share of all neurons that are hot."""
        hot = sum(f.n_hot * f.n_neurons for f in self.ffns)
        return hot / sum(f.n_units * f.n_neurons for f in self.ffns)

    def to_json(self) -> dict[str, Any]:
        return {
            **asdict(self),
            "placement": str(self.placement),
            "hot_share": self.hot_share,
            "cache_types": list(self.cache_types),
        }


@dataclass(frozen=True)
class _Problem:
    """The neurons to place, and the memory for them."""

    model: Model
    budget: Budget
    layers: tuple[Layer, ...]
    costs: tuple[LayerCost, ...]

    def seconds(self, counts: Counts) -> float:
        """Seconds per token."""
        ffn = sum(cost.seconds(n) for cost, n in zip(self.costs, counts, strict=True))
        return _dense_seconds(self.model, self.budget) + ffn


def solve(model_path: Path, options: SolveOptions, progress: Progress = NULL_PROGRESS) -> SolveReport:
    """Writes placement.gguf. Raises PinferError for invalid devices or options and if the solver fails."""
    model = open_model(model_path, options.activation)
    model.require_placeable()
    for cache_type in options.cache_types:
        cache_type_bytes(cache_type)
    with paths.writing_to(model, progress) as folder:
        return _solve(model, folder, options, progress)


def _solve(model: Model, folder: Path, options: SolveOptions, progress: Progress) -> SolveReport:
    types = tuple(down_types(ffn, None) for ffn in model.ffns)
    budget = make_budget(model, cold_neuron_bytes(model.ffns[0], types[0]), options, progress)
    order, use = _ranked(model, folder, budget.vram, progress)
    problem = _problem(model, types, use, _predictors(model, folder), budget)
    placed = place(problem.layers, budget.rooms(model, GROUP), options.time_limit)
    report = _report(problem, folder / paths.PLACEMENT, placed)
    _say_what_else(problem, report, progress)
    PlacementFile(
        id=new_placement_id(),
        n_hot=tuple(n for device in report.devices for n in device.n_hot) or (0,) * len(model.ffns),
        device=report.device,
        vram=budget.vram,
        n_gpu_layers=budget.n_gpu_layers,
        n_ctx=budget.n_ctx,
        report=report.to_json(),
        order=order,
        vram_device=tuple(device.vram for device in report.devices) or (0,),
        vram_needed=tuple(sum(device.n_bytes.values()) for device in report.devices) or (0,),
    ).write(report.placement, model, _settings(options))
    return report


def _settings(options: SolveOptions) -> dict[str, object]:
    return {**asdict(options), "machine": str(options.machine or ""), "vram": options.vram_list or None}


def _say_what_else(problem: _Problem, report: SolveReport, progress: Progress) -> None:
    """Suggests better uses of the budget."""
    if report.vram and not any(report.n_bytes.values()):
        progress.note("nothing fits into this budget or would be faster there: everything stays on the CPU")
    if report.tokens_per_s_hot_first > report.tokens_per_s * _WORTH_SAYING:
        progress.note(
            f"dense layers are placed first; hot neurons alone would give {report.tokens_per_s_hot_first:.1f} tokens/s "
            f"instead of {report.tokens_per_s:.1f}, as predicted"
        )
    if report.tokens_per_s_dense > report.tokens_per_s * _WORTH_SAYING and _fits_whole(problem):
        progress.note(
            f"the whole model fits on {report.devices[0].name}, where dense FFNs would give an expected "
            f"{report.tokens_per_s_dense:.1f} tokens/s instead of {report.tokens_per_s:.1f}: "
            f"pinfer run {problem.model.path} --dense -ngl all"
        )


def _ranked(
    model: Model, folder: Path, vram: int, progress: Progress
) -> tuple[tuple[NDArray[np.int32], ...], tuple[Use, ...]]:
    """Units by falling impact, and how much each is used per token, in that order."""
    path = folder / paths.PROFILE
    if not path.exists() and vram == 0:
        units = "experts" if model.places_experts else "neurons"
        progress.note(f"no profile (run pinfer profile to make one): {units} keep the order of the model")
        order = tuple(np.arange(f.n_units, dtype=np.int32) for f in model.ffns)
        return order, tuple(_nothing_known(model, f) for f in model.ffns)
    profile = ProfileFile.read(path, model)
    order = profile.order()
    return order, tuple(_use(model, profile, i, units) for i, units in enumerate(order))


def _nothing_known(model: Model, ffn: Ffn) -> Use:
    routed = np.full(ffn.n_units, model.n_expert_used / ffn.n_experts) if ffn.is_stack else None
    return Use(np.zeros(ffn.n_units), routed, model.places_experts)


def _use(model: Model, profile: ProfileFile, i: int, units: NDArray[np.int32]) -> Use:
    count, routed = profile.count[i], profile.routed[i]
    if model.places_experts and routed is not None:
        used = routed[units] / profile.tokens
        return Use(used * model.ffns[i].n_bytes / model.ffns[i].n_experts, used, True)
    active = count if routed is None else count.reshape(len(routed), -1).sum(axis=1)
    return Use(active[units] / profile.tokens, None if routed is None else routed[units] / profile.tokens)


def _predictors(model: Model, folder: Path) -> list[PredictorCost | None]:
    """Size and candidates of each FFN's predictor, None without one."""
    path = folder / paths.PREDICTOR
    if model.places_experts or not path.exists():
        return [None] * len(model.ffns)
    file = PredictorFile.read(path, model)
    return [
        None if kind == "none" else PredictorCost(file.n_bytes(i), file.candidates[i])
        for i, kind in enumerate(file.kind)
    ]


def _problem(
    model: Model,
    types: Sequence[DownTypes],
    use: Sequence[Use],
    predictors: Sequence[PredictorCost | None],
    budget: Budget,
) -> _Problem:
    all_of = list(zip(model.ffns, types, use, strict=True))
    costs = tuple(
        ffn_cost(f, t, u, predictor, budget.machine) for (f, t, u), predictor in zip(all_of, predictors, strict=True)
    )
    layers = tuple(
        _program_layer(f, t, u.active, cost, budget.machine) for (f, t, u), cost in zip(all_of, costs, strict=True)
    )
    return _Problem(model, budget, layers, costs)


def _program_layer(ffn: Ffn, types: DownTypes, active: NDArray[np.float64], cost: LayerCost, machine: Machine) -> Layer:
    impact = np.add.reduceat(active, np.arange(0, ffn.n_units, group(ffn)))
    least, most, alone = [], [], []
    for index, (device, n) in enumerate(zip(machine.devices, cost.most_groups(), strict=True)):
        if ffn.norm is not None:  # all neurons of a token are needed in one place
            least.append(len(impact) + 1)
            most.append(0)
            alone.append(0)
        elif device.own_memory:
            # If no count pays, a least count beyond all groups keeps the layer off the device.
            least.append(cost.least_groups(index) or len(impact) + 1)
            most.append(max(least[-1], n))
            alone.append(max(least[-1], cost.most_alone(index)))
        else:
            # A CPU device shares memory and cores with the cold side, so only the budget limits it.
            least.append(1)
            most.append(len(impact))
            alone.append(len(impact))
    return Layer(impact, hot_unit_bytes(ffn, types) * group(ffn), tuple(least), tuple(most), tuple(alone))


def _units(problem: _Problem, counts: Counts, device: int) -> tuple[int, ...]:
    """Hot units per FFN of one device; the last group of neurons may be short."""

    def first(ffn: Ffn, n_groups: Sequence[int]) -> int:
        return min(sum(n_groups) * group(ffn), ffn.n_units)

    ffns = problem.model.ffns
    return tuple(first(f, n[: device + 1]) - first(f, n[:device]) for f, n in zip(ffns, counts, strict=True))


def _device_reports(problem: _Problem, counts: Counts) -> tuple[DeviceReport, ...]:
    reports = []
    for index, device in enumerate(problem.budget.devices):
        n_hot = _units(problem, counts, index)
        hot_bytes = sum(n[index] * layer.group_bytes for n, layer in zip(counts, problem.layers, strict=True))
        n_bytes = device.parts(problem.model, widest(problem.model, n_hot), hot_bytes)
        if sum(n_bytes.values()) > device.vram:
            raise AssertionError(f"{n_bytes} exceed the budget of {device.vram} bytes")
        reports.append(DeviceReport(device.device.name, device.vram, n_bytes, n_hot))
    return tuple(reports)


def _report(problem: _Problem, path: Path, placed: Placed) -> SolveReport:
    model, budget = problem.model, problem.budget
    devices = _device_reports(problem, placed.n_groups)
    parts = devices[0].n_bytes if devices else {}
    all_activations = sum(float(layer.impact.sum()) for layer in problem.layers)
    nothing = tuple((0,) * len(devices) for _ in problem.layers)
    n_hot = tuple(map(sum, zip(*(device.n_hot for device in devices), strict=True))) or (0,) * len(model.ffns)
    return SolveReport(
        placement=path,
        device=",".join(device.name for device in devices) or "none",
        vram=budget.vram,
        n_ctx=budget.n_ctx,
        n_gpu_layers=budget.n_gpu_layers,
        ffns=tuple(FfnReport(f.layer, f.kind, f.n_units, n, f.unit) for f, n in zip(model.ffns, n_hot, strict=True)),
        n_hot=n_hot,
        devices=devices,
        hot_activations=placed.objective / all_activations if all_activations else 0.0,
        n_bytes={part: sum(device.n_bytes[part] for device in devices) for part in parts},
        objective=placed.objective,
        bound=placed.bound,
        gap=placed.gap,
        greedy=placed.greedy,
        status=placed.status,
        solver_seconds=placed.seconds,
        tokens_per_s=1 / problem.seconds(placed.n_groups),
        tokens_per_s_cold=1 / problem.seconds(nothing),
        tokens_per_s_dense=1 / (_dense_seconds(model, budget) + _dense_ffn_seconds(model, budget)),
        tokens_per_s_hot_first=_hot_first(problem),
        cache_types=budget.cache_types,
        machine=budget.machine,
        whole_experts=model.places_experts,
    )


def _hot_first(problem: _Problem) -> float:
    """Predicted tokens per second without dense layers on a device."""
    bare = replace(problem, budget=problem.budget.without_dense())
    return 1 / bare.seconds(place_greedily(bare.layers, bare.budget.rooms(bare.model, GROUP)))


def _dense_seconds(model: Model, budget: Budget) -> float:
    """Seconds per token without the FFNs, in a half-full context."""
    first_on_device = model.n_layer + 1 - budget.n_gpu_layers
    seconds = dense_seconds(output_bytes(model), budget.n_gpu_layers > 0, budget.machine)
    for layer in range(model.n_layer):
        n_bytes = layer_bytes(model, layer) + kv_bytes(model, layer, budget.n_ctx, budget.cache_types) / 2
        seconds += dense_seconds(n_bytes, layer >= first_on_device, budget.machine)
    return seconds


def _ffn_bytes(model: Model) -> int:
    return sum(f.n_bytes for f in model.ffns)


def _fits_whole(problem: _Problem) -> bool:
    """Whether the first device has room for all FFNs and stock libllama computes this model correctly."""
    model, devices = problem.model, problem.budget.devices
    if not model.stock_computes_it:
        return False
    all_layers = problem.budget.n_gpu_layers == model.n_layer + 1
    return bool(devices) and all_layers and devices[0].room >= _ffn_bytes(model)


def _dense_ffn_seconds(model: Model, budget: Budget) -> float:
    """Seconds per token for dense FFNs, as many as fit on the devices, one side after the other."""
    rest = _ffn_bytes(model)
    read = sum(f.n_bytes * (model.n_expert_used / f.n_experts if f.is_stack else 1) for f in model.ffns) / max(1, rest)
    seconds = 0.0
    for device in budget.devices:
        if device.device.own_memory:
            there = min(rest, device.room)
            seconds += there * read / device.device.bandwidth
            rest -= there
    return seconds + rest * read / budget.machine.cpu_bandwidth
