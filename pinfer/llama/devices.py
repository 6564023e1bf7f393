"""The ggml devices of this machine, the cores and memory a process may use, and measurements on a device.

A measurement runs a ggml graph on the device's own backend. A matrix-vector product over more weights than a cache
holds gives the bandwidth of decoding; a tiny one, with its input sent and its output fetched, the cost of a
synchronisation.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from pinfer.errors import PinferError
from pinfer.llama.ggml import F16, F32, InitParams, load_library

_KINDS = {0: "cpu", 1: "gpu", 2: "igpu"}
"""ggml_backend_dev_type; the others (accelerators beside the CPU, combined devices) hold no weights of their own"""

# Backends that report the memory of their own card.
_OWN_DRIVERS = ("CUDA", "ROCm", "MUSA")
# Their drivers allocate in pieces of 2 MiB; libllama makes three allocations, the hot part two.
_ROUNDING = 5 * 2 << 20


@dataclass(frozen=True)
class Device:
    """A ggml device that can hold weights. ``kind`` is ``gpu``, ``igpu`` or ``cpu``; memory in bytes."""

    name: str
    description: str
    kind: str
    memory_free: int
    memory_total: int


def physical_cores() -> int:
    """Cores this process may use, within its CPU affinity and its container's quota. Hyper-threads count once."""
    allowed = psutil.Process().cpu_affinity()
    siblings = {_text(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") for cpu in allowed}
    cores = len(siblings) if "" not in siblings else min(len(allowed), psutil.cpu_count(logical=False) or len(allowed))
    quotas = [*_cgroup_values("cpu", "cpu.max"), *_cgroup_values("cpu", "cpu.cfs_quota_us", "cpu.cfs_period_us")]
    return max(1, min([cores, *(quota // period for quota, period in quotas)]))


def free_memory() -> int:
    """Bytes of main memory that this process can still allocate, within its container's limit."""
    limits = [*_cgroup_values("memory", "memory.max"), *_cgroup_values("memory", "memory.limit_in_bytes")]
    return min([psutil.virtual_memory().available, *(limit for (limit,) in limits)])


def _cgroup_values(controller: str, *files: str) -> Iterator[list[int]]:
    """The limits in these files for this process's cgroup and every cgroup above it (v1 and v2)."""
    for line in _text("/proc/self/cgroup").splitlines():
        _, controllers, group = line.split(":", 2)
        root = Path("/sys/fs/cgroup", controllers)
        if controllers and controller not in controllers.split(","):
            continue
        for folder in (path := root / group.lstrip("/"), *path.parents):
            words = " ".join(_text(folder / file) for file in files).split()
            if words and all(word.isdecimal() for word in words):
                yield [int(word) for word in words]
            if folder == root:
                break


def _text(path: str | Path) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _handles() -> dict[str, Any]:
    base, registry = load_library("ggml-base"), load_library("ggml")
    handles = (registry.ggml_backend_dev_get(i) for i in range(registry.ggml_backend_dev_count()))
    return {base.ggml_backend_dev_name(h).decode(): h for h in handles if base.ggml_backend_dev_type(h) in _KINDS}


def _memory(handle: Any) -> tuple[int, int]:
    """Free and total bytes of a device."""
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    load_library("ggml-base").ggml_backend_dev_memory(handle, ctypes.byref(free), ctypes.byref(total))
    return free.value, total.value


def list_devices() -> tuple[Device, ...]:
    """The devices that can hold weights, GPUs and the CPU, in ggml's order."""
    base = load_library("ggml-base")
    found = []
    for name, handle in _handles().items():
        free, total = _memory(handle)
        description = base.ggml_backend_dev_description(handle).decode()
        kind = _KINDS[base.ggml_backend_dev_type(handle)]
        found.append(Device(name, description, kind, min(free, free_memory()) if kind == "cpu" else free, total))
    return tuple(found)


class _Product:
    """A matrix ``[n_rows, n_columns]`` times F32 tokens on a device, allocated and ready to run."""

    def __init__(
        self, device: str, n_threads: int, n_columns: int, n_rows: int, n_tokens: int = 1, ggml_type: int = F16
    ) -> None:
        ggml = self._ggml = load_library("ggml-base")
        handle = _handles()[device]
        self._context = self._buffer = None
        self._backend = ggml.ggml_backend_dev_init(handle, None)
        if not self._backend:
            raise PinferError(f"cannot use device {device}", "choose another one with --device")
        _set_n_threads(handle, self._backend, n_threads)
        room = 8 * ggml.ggml_tensor_overhead() + ggml.ggml_graph_overhead()
        self._context = ggml.ggml_init(InitParams(room, None, True))
        weights = ggml.ggml_new_tensor_2d(self._context, ggml_type, n_columns, n_rows)
        self._x = ggml.ggml_new_tensor_2d(self._context, F32, n_columns, n_tokens)
        self._y = ggml.ggml_mul_mat(self._context, weights, self._x)
        self._graph = ggml.ggml_new_graph(self._context)
        ggml.ggml_build_forward_expand(self._graph, self._y)
        self._input = ctypes.create_string_buffer(4 * n_columns * n_tokens)
        self._output = ctypes.create_string_buffer(4 * n_rows * n_tokens)
        self._buffer = ggml.ggml_backend_alloc_ctx_tensors(self._context, self._backend)
        if not self._buffer:
            self.close()
            raise PinferError(f"device {device} has too little free memory to measure it", "free some of its memory")
        # Untouched pages would all map to the kernel's one page of zeros, which fits into every cache.
        ggml.ggml_backend_buffer_clear(self._buffer, 0)

    def run(self) -> float:
        """Send the input, multiply, fetch the output. Returns the seconds this took."""
        ggml = self._ggml
        start = time.perf_counter()
        ggml.ggml_backend_tensor_set(self._x, self._input, 0, len(self._input))
        status = ggml.ggml_backend_graph_compute(self._backend, self._graph)
        ggml.ggml_backend_tensor_get(self._y, self._output, 0, len(self._output))
        if status != 0:
            raise PinferError(f"a measurement failed with ggml status {status}", "choose another --device")
        return time.perf_counter() - start

    def free_buffer(self) -> None:
        """Free the tensors; what the backend allocated for itself stays."""
        if self._buffer:
            self._ggml.ggml_backend_buffer_free(self._buffer)
            self._buffer = None

    def close(self) -> None:
        """Free everything."""
        self.free_buffer()
        if self._context:
            self._ggml.ggml_free(self._context)
        self._ggml.ggml_backend_free(self._backend)


def _set_n_threads(handle: Any, backend: Any, n_threads: int) -> None:
    ggml = load_library("ggml-base")
    registry = ggml.ggml_backend_dev_backend_reg(handle)
    address = ggml.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_set_n_threads")
    if address:
        ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int)(address)(backend, n_threads)


def measure_overhead(device: Device, n_threads: int, n_embd: int) -> int:
    """Device memory that computing needs beyond the buffers it asks for: code, workspaces, rounded allocations.

    A driver loads most of it once per process and keeps it, so call this before any other measurement. Returns 0 for
    devices that share their memory with the rest of the machine, where others allocate meanwhile.
    """
    if not device.name.startswith(_OWN_DRIVERS):
        return 0
    before = _free_memory(device.name)
    with closing(_Product(device.name, n_threads, n_embd, 4096)) as one:
        one.run()
        with closing(_Product(device.name, n_threads, n_embd, 4096, 512)) as many:
            many.run()
            one.free_buffer()
            many.free_buffer()
            taken = before - _free_memory(device.name)
    return max(0, taken) + _ROUNDING


def _free_memory(device: str) -> int:
    return _memory(_handles()[device])[0]


def measure_sync(device: str, n_threads: int, n_embd: int) -> float:
    """Seconds to send an FFN input, run a graph that computes next to nothing, and fetch its output."""
    with closing(_Product(device, n_threads, n_embd, 32)) as product:
        for _ in range(10):
            product.run()
        # The median, since other programs interrupt some runs.
        return sorted(product.run() for _ in range(51))[25]


def measure_bandwidth(device: str, n_threads: int, n_bytes: int, sync_seconds: float) -> float:
    """Bytes of weights per second that a matrix-vector product reads, from the best of a few runs."""
    n_columns = 4096
    n_rows = max(1, n_bytes // (2 * n_columns))
    with closing(_Product(device, n_threads, n_columns, n_rows)) as product:
        best = first = product.run()
        # Take the best, since other programs slow down some runs. A slow device gets fewer runs.
        for _ in range(5 if first < 0.1 else 2):
            best = min(best, product.run())
    return 2 * n_columns * n_rows / max(best - sync_seconds, best / 2)


def measure_throughput(device: str, n_threads: int, ggml_type: int = F16) -> float:
    """Floating-point operations per second of a product with a whole batch, as prompts and profiling do them."""
    n, n_tokens = 4096, 256
    with closing(_Product(device, n_threads, n, n, n_tokens, ggml_type)) as product:
        best = min(product.run() for _ in range(3))
    return 2.0 * n * n * n_tokens / best
