"""`pinfer solve`: which neurons go to the device, within a budget of its memory (PowerInfer, section 6).

The budget is filled in this order: dense layers with their KV cache and compute buffers, then hot neurons by the
integer program. Predictors stay beside the cold neurons they choose from, on the CPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pinfer import paths
from pinfer.artefact import open_artefact
from pinfer.budget import DensePart, cache_type_bytes, fit_dense, hot_overhead, kv_bytes, layer_bytes, output_bytes
from pinfer.errors import PinferError
from pinfer.integer_program import Layer, Placed, place
from pinfer.machine import HotDevice, Machine, choose_device, probe, read_machine
from pinfer.model import Model, open_model
from pinfer.placement_file import GROUP, PlacementFile, new_placement_id
from pinfer.progress import NULL_PROGRESS, Progress
from pinfer.shard_file import DownTypes, cold_neuron_bytes, down_types, hot_neuron_bytes
from pinfer.speed import LayerCost, PredictorCost, dense_seconds, layer_cost

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_DEFAULT_CTX = 4096
# Left free where no --vram is given: what drivers and other programs take between now and the run.
_MARGIN_BYTES = 256 << 20
_MARGIN_SHARE = 0.04
# A card assumed where --vram is given on a machine without one; only a prediction hangs on it.
_ASSUMED_BANDWIDTH = 5e11
_ASSUMED_SYNC = 5e-5


@dataclass(frozen=True)
class SolveOptions:
    """What the command line can set."""

    vram: int | None = None
    """bytes; None: what is free on the device, 0 without one"""
    n_ctx: int | None = None
    n_batch: int = 512
    device: str | None = None
    machine: Path | None = None
    time_limit: float = 60.0
    activation: str | None = None
    cache_type: str = "f16"


@dataclass(frozen=True)
class SolveReport:
    """What goes where, how good that is, and what it is expected to bring."""

    placement: Path
    device: str
    vram: int
    n_ctx: int
    n_layer: int
    n_ff: int
    n_gpu_layers: int
    n_hot: tuple[int, ...]
    """neurons per layer"""
    hot_activations: float
    """share of all activations that fall on hot neurons"""
    n_bytes: Mapping[str, int]
    """device memory by part"""
    objective: float
    """activations per token on the device"""
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
    machine: Machine

    @property
    def hot_share(self) -> float:
        """Share of all neurons that are hot."""
        return sum(self.n_hot) / (self.n_layer * self.n_ff)

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "placement": str(self.placement), "hot_share": self.hot_share}


@dataclass(frozen=True)
class _Budget:
    """The device memory and what the dense part takes of it."""

    machine: Machine
    vram: int
    n_ctx: int
    cache_type: str
    dense: DensePart
    overhead: int

    @property
    def own_memory(self) -> bool:
        """False for a CPU device: what it would hold lies in the same memory already."""
        return self.machine.device is not None and self.machine.device.kind != "cpu"

    @property
    def left(self) -> int:
        """Bytes for hot neurons."""
        return max(0, self.vram - self.dense.total - self.overhead)


def solve(model_path: Path, options: SolveOptions, progress: Progress = NULL_PROGRESS) -> SolveReport:
    """Writes placement.gguf. Raises PinferError when the budget is too small or the solver fails."""
    model = open_model(model_path, options.activation)
    model.require_sparse()
    cache_type_bytes(options.cache_type)
    folder = paths.artefact_dir(model.path, model.fingerprint, for_writing=True)
    types = tuple(down_types(model, layer, None) for layer in range(model.n_layer))
    budget = _budget(model, types, options, progress)
    order, frequency = _ranked(model, folder, budget.vram, progress)
    predictors = _predictors(model, folder)
    costs = [
        layer_cost(model, layer, types[layer], frequency[layer], predictors[layer], budget.machine, GROUP)
        for layer in range(model.n_layer)
    ]
    layers = [
        _program_layer(model, layer, types[layer], frequency[layer], costs[layer], budget.own_memory)
        for layer in range(model.n_layer)
    ]
    placed = place(layers, budget.left, options.time_limit)
    report = _report(model, folder / paths.PLACEMENT, budget, layers, placed, costs)
    PlacementFile(
        id=new_placement_id(),
        n_hot=report.n_hot,
        device=report.device,
        vram=budget.vram,
        n_gpu_layers=budget.dense.n_gpu_layers,
        n_ctx=budget.n_ctx,
        report=report.to_json(),
        order=order,
    ).write(report.placement, model, {**asdict(options), "machine": str(options.machine or "")})
    return report


def _budget(model: Model, types: Sequence[DownTypes], options: SolveOptions, progress: Progress) -> _Budget:
    machine, vram = _machine_and_budget(model, types, options, progress)
    n_ctx = options.n_ctx or min(model.n_ctx_train or _DEFAULT_CTX, _DEFAULT_CTX)
    nothing = _Budget(machine, vram, n_ctx, options.cache_type, DensePart(0, 0, 0, 0), hot_overhead(model))
    if vram == 0:
        return replace(nothing, overhead=0)
    if not nothing.own_memory:
        return nothing
    try:
        return replace(nothing, dense=fit_dense(model, vram, n_ctx, options.n_batch, options.cache_type))
    except PinferError as error:
        if options.vram is not None:
            raise
        progress.note(f"the device stays unused: {error.message}")
        return replace(nothing, vram=0, overhead=0)


def _machine_and_budget(
    model: Model, types: Sequence[DownTypes], options: SolveOptions, progress: Progress
) -> tuple[Machine, int]:
    """The machine to solve for and the bytes of device memory to use."""
    if options.machine is not None:
        machine = read_machine(options.machine)
        if options.device is not None and (machine.device is None or machine.device.name != options.device):
            raise PinferError(f"{options.machine} does not describe device {options.device}", "leave out --device")
        if machine.device is None and options.vram:
            raise PinferError(f"{options.machine} describes a machine without a device", "leave out --vram")
    else:
        row = cold_neuron_bytes(model, 0, types[0])
        if options.vram == 0:
            return replace(probe(None, model.n_embd, row), device=None), 0
        machine = _probe_with_device(options, model.n_embd, row, progress)
    device = machine.device
    if device is None:
        progress.note("no GPU here: every neuron stays on the CPU")
        return machine, 0
    if options.vram is None:
        margin = max(_MARGIN_BYTES, int(device.memory_free * _MARGIN_SHARE))
        return machine, max(0, device.memory_free - margin)
    if device.kind != "cpu" and device.memory_total and options.vram > device.memory_total:
        raise PinferError(
            f"--vram asks for {options.vram / 2**30:.1f} GiB, {device.name} has {device.memory_total / 2**30:.1f} GiB",
            "give it less, or leave --vram out",
        )
    return machine, options.vram


def _probe_with_device(options: SolveOptions, n_embd: int, row: int, progress: Progress) -> Machine:
    """This machine; with a budget given and no GPU in it, as if it had one."""
    has_gpu = choose_device(None) is not None
    try:
        device = choose_device(options.device)
    except PinferError:
        if has_gpu or options.vram is None:
            raise
        device = None
    if device is not None or options.vram is None:
        return probe(options.device, n_embd, row)
    name = options.device or "none"
    progress.note(
        f"no GPU here: speeds are those of a card with {_ASSUMED_BANDWIDTH / 1e9:.0f} GB/s (--machine FILE describes "
        "another), and running this placement needs one"
    )
    assumed = HotDevice(name, "assumed", "gpu", 0, options.vram, _ASSUMED_BANDWIDTH, _ASSUMED_SYNC)
    return replace(probe(None, n_embd, row), device=assumed)


def _ranked(
    model: Model, folder: Path, vram: int, progress: Progress
) -> tuple[tuple[NDArray[np.int32], ...], tuple[NDArray[np.float64], ...]]:
    """Neurons by falling impact, and how often each fires per token, in that order."""
    import numpy as np

    from pinfer.profile_file import ProfileFile

    path = folder / paths.PROFILE
    if not path.exists() and vram == 0:
        progress.note("no profile (pinfer profile makes one): neurons stay in the order of the model")
        order = tuple(np.arange(model.n_ff, dtype=np.int32) for _ in range(model.n_layer))
        return order, tuple(np.zeros(model.n_ff) for _ in range(model.n_layer))
    profile = ProfileFile.read(path, model)
    # Equally frequent neurons: the one that gives more comes first.
    order = tuple(
        np.lexsort((-mass, -count)).astype(np.int32) for count, mass in zip(profile.count, profile.mass, strict=True)
    )
    return order, tuple(count[o] / profile.tokens for count, o in zip(profile.count, order, strict=True))


def _predictors(model: Model, folder: Path) -> list[PredictorCost | None]:
    """What the predictor of each layer costs, where there is one."""
    path = folder / paths.PREDICTOR
    if not path.exists():
        return [None] * model.n_layer
    file = open_artefact(path, "predictor", model)
    kinds = file.get_list("pinfer.predictor.kind", model.n_layer)
    candidates = file.get_list("pinfer.predictor.candidates", model.n_layer)
    costs: list[PredictorCost | None] = []
    for layer, kind in enumerate(kinds):
        names = [f"blk.{layer}.pred_{part}" for part in "abt"]
        n_bytes = sum(file.tensor(name).n_bytes for name in names if file.has(name))
        costs.append(None if kind == "none" else PredictorCost(n_bytes, float(candidates[layer])))
    return costs


def _program_layer(
    model: Model, layer: int, types: DownTypes, frequency: NDArray[np.float64], cost: LayerCost, own_memory: bool
) -> Layer:
    import numpy as np

    impact = np.add.reduceat(frequency, np.arange(0, model.n_ff, GROUP))
    group_bytes = hot_neuron_bytes(model, layer, types) * GROUP
    if not own_memory:
        # A CPU device shares the memory and the cores of the cold side: there is no speed to weigh, only the budget.
        return Layer(impact, group_bytes, least=1, most=len(impact))
    # No count pays: a least count beyond all groups keeps the layer off the device.
    least = cost.least_groups() or len(impact) + 1
    return Layer(impact, group_bytes, least=least, most=max(least, cost.most_groups()))


def _report(
    model: Model, path: Path, budget: _Budget, layers: Sequence[Layer], placed: Placed, costs: Sequence[LayerCost]
) -> SolveReport:
    hot_bytes = sum(n * layer.group_bytes for n, layer in zip(placed.n_groups, layers, strict=True))
    dense = budget.dense
    n_bytes = {
        "dense_weights": dense.dense_weights,
        "kv_cache": dense.kv_cache,
        "compute_buffers": dense.compute_buffers + (budget.overhead if hot_bytes else 0),
        "predictors": 0,
        "hot_neurons": hot_bytes,
    }
    if sum(n_bytes.values()) > budget.vram:
        raise AssertionError(f"{n_bytes} exceed the budget of {budget.vram} bytes")
    all_activations = sum(float(layer.impact.sum()) for layer in layers)
    ffn = [cost.seconds(n) for cost, n in zip(costs, placed.n_groups, strict=True)]
    cold = [cost.seconds(0) for cost in costs]
    return SolveReport(
        placement=path,
        device=budget.machine.device.name if budget.machine.device is not None else "none",
        vram=budget.vram,
        n_ctx=budget.n_ctx,
        n_layer=model.n_layer,
        n_ff=model.n_ff,
        n_gpu_layers=dense.n_gpu_layers,
        n_hot=tuple(min(n * GROUP, model.n_ff) for n in placed.n_groups),
        hot_activations=placed.objective / all_activations if all_activations else 0.0,
        n_bytes=n_bytes,
        objective=placed.objective,
        bound=placed.bound,
        gap=placed.gap,
        greedy=placed.greedy,
        status=placed.status,
        solver_seconds=placed.seconds,
        tokens_per_s=1 / (_dense_seconds(model, budget) + sum(ffn)),
        tokens_per_s_cold=1 / (_dense_seconds(model, budget) + sum(cold)),
        tokens_per_s_dense=1 / (_dense_seconds(model, budget) + _dense_ffn_seconds(model, budget)),
        machine=budget.machine,
    )


def _dense_seconds(model: Model, budget: _Budget) -> float:
    """Seconds per token for all but the FFNs, in a context that is half full."""
    first_on_device = model.n_layer + 1 - budget.dense.n_gpu_layers
    seconds = dense_seconds(output_bytes(model), budget.dense.n_gpu_layers > 0, budget.machine)
    for layer in range(model.n_layer):
        n_bytes = layer_bytes(model, layer) + kv_bytes(model, layer, budget.n_ctx, budget.cache_type) / 2
        seconds += dense_seconds(n_bytes, layer >= first_on_device, budget.machine)
    return seconds


def _dense_ffn_seconds(model: Model, budget: _Budget) -> float:
    """Seconds per token for the FFNs read whole, as many as fit on the device."""
    n_bytes = sum(t.n_bytes for f in model.ffn for t in (f.gate, f.up, f.down) if t is not None)
    on_device = min(n_bytes, budget.left) if budget.own_memory else 0
    seconds = (n_bytes - on_device) / budget.machine.cpu_bandwidth
    return seconds + (on_device / budget.machine.device.bandwidth if on_device and budget.machine.device else 0.0)
