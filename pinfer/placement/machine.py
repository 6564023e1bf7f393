"""Describes a machine to the solver: measured here or read from a file.

The file of ``--machine`` is JSON; sizes in bytes, speeds in bytes per second, times in seconds::

    {"name": "desktop",
     "n_threads": 16,
     "cpu_bandwidth": 6.0e10,       weights that a matrix-vector product on the CPU reads per second
     "scattered": 0.45,             share of it reached when reading scattered rows of single neurons
     "devices": [{"name": "CUDA0", "description": "RTX 4090", "kind": "gpu",
                  "memory_total": 25757220864, "memory_free": 25000000000,
                  "bandwidth": 9.0e11, "sync_seconds": 3.0e-5, "overhead": 120000000}]}

``devices`` is empty for a machine without one. ``kind`` is ``gpu``, ``igpu`` or ``cpu`` (a second CPU device), and
``overhead`` (default 0) is the memory that a driver takes for itself. ``device`` with one object or null also works.
``pinfer solve --json`` prints such an object under ``machine``.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pinfer.errors import PinferError
from pinfer.llama.devices import Device, list_devices, measure_bandwidth, measure_overhead, measure_sync, physical_cores

_CPU_BYTES = 256 << 20
_DEVICE_BYTES = 512 << 20
_KINDS = ("gpu", "igpu", "cpu")


@dataclass(frozen=True)
class HotDevice:
    """A device for hot neurons."""

    name: str
    description: str
    kind: str
    memory_total: int
    memory_free: int
    bandwidth: float
    sync_seconds: float
    overhead: int = 0
    """bytes used besides the allocated buffers: code, workspaces, rounding"""

    @property
    def own_memory(self) -> bool:
        """False for a CPU device, which shares the main memory."""
        return self.kind != "cpu"


@dataclass(frozen=True)
class Machine:
    """The numbers that decide a placement."""

    name: str
    n_threads: int
    cpu_bandwidth: float
    scattered: float
    devices: tuple[HotDevice, ...]
    """in the order they are filled; dense layers go to the first"""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def choose_devices(wanted: Sequence[str]) -> tuple[Device, ...]:
    """The devices of these names (in any case); without names the first GPU, if any.

    Raises PinferError for a name that is unknown or given twice.
    """
    devices = list_devices()
    if not wanted:
        return tuple(d for d in devices if d.kind != "cpu")[:1]
    by_name = {device.name.lower(): device for device in devices}
    chosen = []
    for name in wanted:
        if name.lower() not in by_name:
            known = ", ".join(d.name for d in devices)
            hint = f"choose one of: {known}; or describe one with --machine FILE"
            raise PinferError(f"there is no device {name!r} here", hint)
        chosen.append(by_name[name.lower()])
        if chosen.count(chosen[-1]) > 1:
            raise PinferError(f"--device names {chosen[-1].name} twice", "name each device once")
    return tuple(chosen)


def probe(chosen: Sequence[Device], n_embd: int, row_bytes: int) -> Machine:
    """Measures this machine's memory and, with ggml graphs, each chosen device; takes about a second.

    ``row_bytes`` is the size of one neuron in memory.
    """
    n_threads = physical_cores()
    cpu = next(d for d in list_devices() if d.kind == "cpu")
    n_bytes = min(_CPU_BYTES, max(cpu.memory_free // 8, 8 << 20))
    bandwidth = measure_bandwidth(cpu.name, n_threads, n_bytes, 0.0)
    return Machine(
        name=os.uname().nodename,
        n_threads=n_threads,
        cpu_bandwidth=bandwidth,
        scattered=_measure_scattered(row_bytes, n_bytes),
        devices=tuple(_probe_device(device, n_threads, n_embd) for device in chosen),
    )


def _probe_device(device: Device, n_threads: int, n_embd: int) -> HotDevice:
    # Measured first: a driver takes its memory once, on first use.
    overhead = measure_overhead(device, n_threads, n_embd)
    sync = measure_sync(device.name, n_threads, n_embd)
    limit = _CPU_BYTES if device.kind == "cpu" else _DEVICE_BYTES
    n_bytes = min(limit, max(device.memory_free // 8, 8 << 20))
    return HotDevice(
        name=device.name,
        description=device.description,
        kind=device.kind,
        memory_total=device.memory_total,
        memory_free=device.memory_free,
        bandwidth=measure_bandwidth(device.name, n_threads, n_bytes, sync),
        sync_seconds=sync,
        overhead=overhead,
    )


def _measure_scattered(row_bytes: int, n_bytes: int) -> float:
    """Speed of reading every tenth row at random, relative to the same number of consecutive rows."""
    n_rows = max(n_bytes // row_bytes, 64)
    memory = np.ones((n_rows, row_bytes), dtype=np.uint8)
    n_picked = max(n_rows // 10, 4)
    rng = np.random.default_rng(0)
    out = np.empty((n_picked, row_bytes), dtype=np.uint8)
    scattered, streamed = [], []
    for attempt in range(5):
        picked = np.sort(rng.choice(n_rows, n_picked, replace=False))
        start = time.perf_counter()
        np.take(memory, picked, axis=0, out=out, mode="clip")
        scattered.append(time.perf_counter() - start)
        first = (attempt * n_picked) % (n_rows - n_picked)
        start = time.perf_counter()
        np.copyto(out, memory[first : first + n_picked])
        streamed.append(time.perf_counter() - start)
    return float(min(1.0, max(0.05, min(streamed) / min(scattered))))


def read_machine(path: Path) -> Machine:
    """Reads the file of ``--machine``. Raises PinferError that names the wrong entry."""
    hint = "take the object under `machine` that `pinfer solve --json` prints on that machine"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PinferError(f"{path} cannot be read: {error.strerror or error}", hint) from None
    except (ValueError, RecursionError) as error:
        raise PinferError(f"{path} is not JSON: {error}", hint) from None
    if isinstance(found, dict) and isinstance(found.get("machine"), dict):
        found = found["machine"]
    try:
        return _machine(found)
    except (KeyError, ValueError) as error:
        cause = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise PinferError(f"{path} does not describe a machine: {cause}", hint) from None


def _machine(found: Any) -> Machine:
    if not isinstance(found, Mapping):
        raise ValueError("it is not an object")
    devices = _hot_devices(found)
    return Machine(
        name=str(found.get("name", "")),
        n_threads=int(_number(found, "n_threads", 1)),
        cpu_bandwidth=_number(found, "cpu_bandwidth"),
        scattered=_number(found, "scattered", most=1),
        devices=devices,
    )


def _hot_devices(found: Mapping[str, Any]) -> tuple[HotDevice, ...]:
    alone = None if "devices" in found else found["device"]
    devices = found.get("devices", [alone] if alone is not None else [])
    if not isinstance(devices, list) or not all(isinstance(device, Mapping) for device in devices):
        raise ValueError("devices is not a list of objects")
    hot = tuple(_hot_device(device) for device in devices)
    names = [device.name for device in hot]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise ValueError(f"device {twice} occurs twice")
    return hot


def _hot_device(found: Mapping[str, Any]) -> HotDevice:
    if found["kind"] not in _KINDS:
        raise ValueError(f"kind is not one of {', '.join(_KINDS)}")
    total = int(_number(found, "memory_total"))
    name = found["name"]
    if not isinstance(name, str) or not name or "," in name:
        raise ValueError("the name of a device is not a word")
    return HotDevice(
        name=name,
        description=str(found.get("description", "")),
        kind=found["kind"],
        memory_total=total,
        memory_free=int(_number(found, "memory_free", total)),
        bandwidth=_number(found, "bandwidth"),
        sync_seconds=_number(found, "sync_seconds"),
        overhead=int(_number(found, "overhead", 0)),
    )


def _number(found: Mapping[str, Any], key: str, default: float | None = None, most: float = 2.0**60) -> float:
    """A positive number; with a default, 0 is one as well."""
    value = found[key] if default is None else found.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:
        raise ValueError(f"{key} is not a number between 0 and {most:g}")
    if value == 0 and default is None:
        raise ValueError(f"{key} is 0")
    return float(value)
