"""Chooses the devices, the memory to use of each, and what the dense layers leave for hot neurons."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from pinfer.errors import PinferError
from pinfer.llama.cache_types import CacheTypes
from pinfer.llama.devices import list_devices
from pinfer.model import Model
from pinfer.placement.compute_buffers import Layout, count_compute_bytes
from pinfer.placement.integer_program import Room
from pinfer.placement.machine import HotDevice, Machine, choose_devices, probe, read_machine
from pinfer.placement.model_bytes import DensePart, compute_bytes, fit_dense, hot_buffers, widest
from pinfer.progress import NULL_PROGRESS, Progress

_DEFAULT_CTX = 4096
# Kept free unless --vram is given: drivers and other programs may take it before the run.
_MARGIN_BYTES = 256 << 20
_MARGIN_SHARE = 0.04
_MOST_BYTES = 1 << 60
# The card assumed when --vram is given on a machine without one; it affects the predicted speeds only.
_ASSUMED_BANDWIDTH = 5e11
_ASSUMED_SYNC = 5e-5


@dataclass(frozen=True)
class SolveOptions:
    """Options of ``pinfer solve``."""

    vram: int | Sequence[int] | None = None
    """bytes for all devices together or for each; None: the free memory of the devices"""
    n_ctx: int | None = None
    n_ubatch: int = 512
    device: str | None = None
    """names separated by commas; dense layers go to the first"""
    machine: Path | None = None
    time_limit: float = 10.0
    activation: str | None = None
    cache_type_k: str = "f16"
    cache_type_v: str = "f16"

    @property
    def cache_types(self) -> CacheTypes:
        return self.cache_type_k, self.cache_type_v

    @property
    def device_names(self) -> tuple[str, ...]:
        names = (name.strip() for name in (self.device or "").split(","))
        return tuple(name for name in names if name)

    @property
    def vram_list(self) -> tuple[int, ...]:
        """Empty if not given."""
        if self.vram is None:
            return ()
        return (self.vram,) if isinstance(self.vram, int) else tuple(self.vram)


@dataclass(frozen=True)
class DeviceBudget:
    """The memory to use of one device, and the part of the model that runs densely there."""

    device: HotDevice
    vram: int
    dense: DensePart

    @property
    def room(self) -> int:
        """Bytes for hot neurons and their buffers."""
        overheads = self.device.overhead * (2 if self.dense.n_gpu_layers else 1)
        return max(0, self.vram - self.dense.total - overheads)

    def parts(self, model: Model, n_hot: int, hot_bytes: int) -> dict[str, int]:
        """Bytes by purpose, for ``hot_bytes`` of neurons and at most ``n_hot`` of them in one layer."""
        users = (self.dense.n_gpu_layers > 0) + (n_hot > 0)
        return {
            "dense_weights": self.dense.dense_weights,
            "kv_cache": self.dense.kv_cache,
            "compute_buffers": self.dense.compute_buffers,
            "predictors": 0,
            "hot_neurons": hot_bytes,
            "hot_buffers": hot_buffers(model, n_hot),
            "driver": self.device.overhead * users,
        }


@dataclass(frozen=True)
class Budget:
    """The machine, and the memory of each of its devices."""

    machine: Machine
    n_ctx: int
    cache_types: CacheTypes
    devices: tuple[DeviceBudget, ...]

    @property
    def vram(self) -> int:
        return sum(d.vram for d in self.devices)

    @property
    def n_gpu_layers(self) -> int:
        return self.devices[0].dense.n_gpu_layers if self.devices else 0

    def rooms(self, model: Model, group: int) -> tuple[Room, ...]:
        """The memory of each device for hot neurons, placed in groups of ``group``, and for hot experts."""
        per_group = hot_buffers(model, 2 * group) - hot_buffers(model, group)
        fixed = (
            hot_buffers(model, group + widest(model, [f.n_units if f.is_stack else 0 for f in model.ffns])) - per_group
        )
        return tuple(Room(device.room, fixed, per_group) for device in self.devices)

    def without_dense(self) -> Budget:
        """The same memory, used for hot neurons only."""
        bare = tuple(replace(d, dense=DensePart(0, 0, 0, 0)) for d in self.devices)
        return replace(self, devices=bare)


def make_budget(model: Model, row_bytes: int, options: SolveOptions, progress: Progress = NULL_PROGRESS) -> Budget:
    """Finds the devices and fills the first with dense layers. ``row_bytes`` is the size of a cold neuron.

    Raises PinferError for devices that do not exist and for budgets that do not match them.
    """
    machine, vram, is_here = _machine_and_vram(model, row_bytes, options, progress)
    n_ctx = options.n_ctx or min(model.n_ctx_train or _DEFAULT_CTX, _DEFAULT_CTX)
    nothing = DensePart(0, 0, 0, 0)
    devices = [DeviceBudget(d, n, nothing) for d, n in zip(machine.devices, vram, strict=True)]
    if devices and devices[0].device.own_memory:
        first = devices[0]

        def compute(n_gpu_layers: int) -> int:
            if not is_here:
                return compute_bytes(model, n_ctx, options.n_ubatch)
            layout = Layout(n_gpu_layers, n_ctx, options.n_ubatch, options.cache_types)
            return count_compute_bytes(model, first.device.name, layout)

        room = first.vram - first.device.overhead
        devices[0] = replace(first, dense=fit_dense(model, room, n_ctx, options.cache_types, compute))
    return Budget(machine, n_ctx, options.cache_types, tuple(devices))


def _machine_and_vram(
    model: Model, row_bytes: int, options: SolveOptions, progress: Progress
) -> tuple[Machine, tuple[int, ...], bool]:
    """The machine, the bytes to use of each of its devices, and whether it is this machine."""
    if options.machine is not None:
        machine, is_here = _described(options.machine, options), False
    elif options.vram_list and not any(options.vram_list):
        return probe((), model.n_embd, row_bytes), (), False
    else:
        machine, is_here = _found(model.n_embd, row_bytes, options, progress)
    if not machine.devices:
        progress.note("no GPU found: every neuron stays on the CPU")
        return machine, (), False
    vram = _shares(machine.devices, options.vram_list)
    if max(vram) >= _MOST_BYTES:
        raise PinferError(f"--vram asks for {max(vram) / 2**30:.3g} GiB", "give the size in bytes, or like 24G")
    for device, asked in zip(machine.devices, vram, strict=True):
        if device.own_memory and device.memory_total and asked > device.memory_total:
            has = f"{device.name} has {device.memory_total / 2**30:.1f} GiB"
            raise PinferError(f"--vram asks for {asked / 2**30:.1f} GiB, {has}", "give it less, or leave --vram out")
    return machine, vram, is_here


def _described(path: Path, options: SolveOptions) -> Machine:
    """The machine of a file, with the devices that --device names or --vram has sizes for."""
    machine = read_machine(path)
    by_name = {device.name.lower(): device for device in machine.devices}
    for name in options.device_names:
        if name.lower() not in by_name:
            raise PinferError(f"{path} does not describe device {name}", "leave out --device")
    if not machine.devices and any(options.vram_list):
        raise PinferError(f"{path} describes a machine without a device", "leave out --vram")
    if options.device_names:
        return replace(machine, devices=tuple(by_name[name.lower()] for name in options.device_names))
    if len(options.vram_list) > 1:
        return replace(machine, devices=machine.devices[: len(options.vram_list)])
    return machine


def _found(n_embd: int, row_bytes: int, options: SolveOptions, progress: Progress) -> tuple[Machine, bool]:
    """This machine; if it has no GPU but a budget is given, with an assumed one."""
    gpus = [device for device in list_devices() if device.kind != "cpu"]
    try:
        if not options.device_names and len(options.vram_list) > 1 and gpus:
            chosen = tuple(gpus[: len(options.vram_list)])
        else:
            chosen = choose_devices(options.device_names)
    except PinferError:
        if gpus or not options.vram_list:
            raise
        chosen = ()
    if chosen or not options.vram_list:
        return probe(chosen, n_embd, row_bytes), True
    progress.note(
        f"no GPU found: assuming a card with {_ASSUMED_BANDWIDTH / 1e9:.0f} GB/s (use --machine FILE for "
        "another); running this placement needs one"
    )
    names = options.device_names or tuple(f"none{i or ''}" for i in range(len(options.vram_list)))
    assumed = tuple(
        HotDevice(name, "assumed", "gpu", 0, sum(options.vram_list), _ASSUMED_BANDWIDTH, _ASSUMED_SYNC)
        for name in names
    )
    return replace(probe((), n_embd, row_bytes), devices=assumed), False


def _shares(devices: Sequence[HotDevice], wanted: Sequence[int]) -> tuple[int, ...]:
    """Bytes to use of each device: as given, or one size divided by their free memory, or their free memory."""
    free = [max(0, d.memory_free - max(_MARGIN_BYTES, int(d.memory_free * _MARGIN_SHARE))) for d in devices]
    if not wanted:
        return tuple(free)
    if len(wanted) == len(devices):
        return tuple(wanted)
    if len(wanted) > 1:
        names = ", ".join(d.name for d in devices)
        raise PinferError(
            f"--vram has {len(wanted)} sizes for {len(devices)} devices ({names})", "give one for each, or one for all"
        )
    total, whole = wanted[0], sum(d.memory_free for d in devices) or 1
    shares = [total * d.memory_free // whole for d in devices]
    shares[0] += total - sum(shares)
    return tuple(shares)
