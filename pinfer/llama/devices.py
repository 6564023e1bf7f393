"""The ggml devices of this machine and two measurements on any of them, through the ggml that libllama uses.

A measurement is a ggml graph run on the device's own backend: a matrix-vector product over more weights than a cache
holds gives the bandwidth that decoding gets; a tiny one, with its input sent and its output fetched, gives the cost of
a synchronisation.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import psutil

from pinfer.errors import PinferError
from pinfer.llama.ggml import load_library

_F32, _F16 = 0, 1
_KINDS = {0: "cpu", 1: "gpu", 2: "igpu"}
"""ggml_backend_dev_type; the others (accelerators beside the CPU, combined devices) hold no weights of their own"""

# Devices of one card with a driver that reports the memory of that card.
_OWN_DRIVERS = ("CUDA", "ROCm", "MUSA")
# Their allocations come in pieces of 2 MiB; libllama makes three, the hot part two.
_ROUNDING = 5 * 2 << 20

_pointer = ctypes.c_void_p
_int64 = ctypes.c_int64
_size = ctypes.c_size_t


class _InitParams(ctypes.Structure):
    """Mirrors ``struct ggml_init_params`` of ggml.h."""

    _fields_ = (("mem_size", _size), ("mem_buffer", _pointer), ("no_alloc", ctypes.c_bool))


_SIGNATURES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "ggml_init": (_pointer, (_InitParams,)),
    "ggml_free": (None, (_pointer,)),
    "ggml_tensor_overhead": (_size, ()),
    "ggml_graph_overhead": (_size, ()),
    "ggml_new_tensor_2d": (_pointer, (_pointer, ctypes.c_int, _int64, _int64)),
    "ggml_mul_mat": (_pointer, (_pointer, _pointer, _pointer)),
    "ggml_new_graph": (_pointer, (_pointer,)),
    "ggml_build_forward_expand": (None, (_pointer, _pointer)),
    "ggml_backend_alloc_ctx_tensors": (_pointer, (_pointer, _pointer)),
    "ggml_backend_buffer_clear": (None, (_pointer, ctypes.c_uint8)),
    "ggml_backend_buffer_free": (None, (_pointer,)),
    "ggml_backend_tensor_set": (None, (_pointer, _pointer, _size, _size)),
    "ggml_backend_tensor_get": (None, (_pointer, _pointer, _size, _size)),
    "ggml_backend_graph_compute": (ctypes.c_int, (_pointer, _pointer)),
    "ggml_backend_free": (None, (_pointer,)),
    "ggml_backend_dev_init": (_pointer, (_pointer, ctypes.c_char_p)),
    "ggml_backend_dev_name": (ctypes.c_char_p, (_pointer,)),
    "ggml_backend_dev_description": (ctypes.c_char_p, (_pointer,)),
    "ggml_backend_dev_type": (ctypes.c_int, (_pointer,)),
    "ggml_backend_dev_memory": (None, (_pointer, ctypes.POINTER(_size), ctypes.POINTER(_size))),
    "ggml_backend_dev_backend_reg": (_pointer, (_pointer,)),
    "ggml_backend_reg_get_proc_address": (_pointer, (_pointer, ctypes.c_char_p)),
}


@dataclass(frozen=True)
class Device:
    """A ggml device that can hold weights. ``kind`` is ``gpu``, ``igpu`` or ``cpu``; memory in bytes."""

    name: str
    description: str
    kind: str
    memory_free: int
    memory_total: int


@cache
def _base() -> ctypes.CDLL:
    library = load_library("ggml-base")
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype = result
        function.argtypes = arguments
    return library


@cache
def _registry() -> ctypes.CDLL:
    library = load_library("ggml")
    library.ggml_backend_dev_count.restype = _size
    library.ggml_backend_dev_count.argtypes = ()
    library.ggml_backend_dev_get.restype = _pointer
    library.ggml_backend_dev_get.argtypes = (_size,)
    return library


def physical_cores() -> int:
    """Cores this process may use: hyper-threads count once, affinity and a container's CPU quota are respected."""
    allowed = psutil.Process().cpu_affinity()
    siblings = {_text(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list") for cpu in allowed}
    cores = len(siblings) if "" not in siblings else min(len(allowed), psutil.cpu_count(logical=False) or len(allowed))
    quotas = [*_cgroup_values("cpu", "cpu.max"), *_cgroup_values("cpu", "cpu.cfs_quota_us", "cpu.cfs_period_us")]
    return max(1, min([cores, *(quota // period for quota, period in quotas)]))


def free_memory() -> int:
    """Bytes of main memory this process may still take, within its container's limit."""
    limits = [*_cgroup_values("memory", "memory.max"), *_cgroup_values("memory", "memory.limit_in_bytes")]
    return min([psutil.virtual_memory().available, *(limit for (limit,) in limits)])


def _cgroup_values(controller: str, *files: str) -> Iterator[list[int]]:
    """The numbers in these files of this process's cgroup and of those above it, where there is a limit (v1 and v2)."""
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
    ggml, registry = _base(), _registry()
    handles = (registry.ggml_backend_dev_get(i) for i in range(registry.ggml_backend_dev_count()))
    return {ggml.ggml_backend_dev_name(h).decode(): h for h in handles if ggml.ggml_backend_dev_type(h) in _KINDS}


def list_devices() -> tuple[Device, ...]:
    """The devices that can hold weights, GPUs and the CPU, in ggml's order."""
    ggml = _base()
    found = []
    for name, handle in _handles().items():
        free, total = _size(), _size()
        ggml.ggml_backend_dev_memory(handle, ctypes.byref(free), ctypes.byref(total))
        description = ggml.ggml_backend_dev_description(handle).decode()
        kind = _KINDS[ggml.ggml_backend_dev_type(handle)]
        available = min(free.value, free_memory()) if kind == "cpu" else free.value
        found.append(Device(name, description, kind, available, total.value))
    return tuple(found)


class _Product:
    """A product on a device, ``[n_rows, n_columns]`` F16 times F32 of some tokens, allocated and ready to run."""

    def __init__(self, device: str, n_threads: int, n_columns: int, n_rows: int, n_tokens: int = 1) -> None:
        ggml = self._ggml = _base()
        handle = _handles()[device]
        self._context = self._buffer = None
        self._backend = ggml.ggml_backend_dev_init(handle, None)
        if not self._backend:
            raise PinferError(f"device {device} cannot be used", "choose another one with --device")
        _set_n_threads(handle, self._backend, n_threads)
        room = 8 * ggml.ggml_tensor_overhead() + ggml.ggml_graph_overhead()
        self._context = ggml.ggml_init(_InitParams(room, None, True))
        weights = ggml.ggml_new_tensor_2d(self._context, _F16, n_columns, n_rows)
        self._x = ggml.ggml_new_tensor_2d(self._context, _F32, n_columns, n_tokens)
        self._y = ggml.ggml_mul_mat(self._context, weights, self._x)
        self._graph = ggml.ggml_new_graph(self._context)
        ggml.ggml_build_forward_expand(self._graph, self._y)
        self._input = ctypes.create_string_buffer(4 * n_columns * n_tokens)
        self._output = ctypes.create_string_buffer(4 * n_rows * n_tokens)
        self._buffer = ggml.ggml_backend_alloc_ctx_tensors(self._context, self._backend)
        if not self._buffer:
            self.close()
            raise PinferError(f"device {device} has no room for a measurement", "free some of its memory")
        # Untouched pages would all be the one page of zeros, which every cache holds.
        ggml.ggml_backend_buffer_clear(self._buffer, 0)

    def run(self) -> float:
        """Sends the input, multiplies, fetches the output; returns the seconds it took."""
        ggml = self._ggml
        start = time.perf_counter()
        ggml.ggml_backend_tensor_set(self._x, self._input, 0, len(self._input))
        status = ggml.ggml_backend_graph_compute(self._backend, self._graph)
        ggml.ggml_backend_tensor_get(self._y, self._output, 0, len(self._output))
        if status != 0:
            raise PinferError(f"a measurement failed with ggml status {status}", "choose another --device")
        return time.perf_counter() - start

    def free_buffer(self) -> None:
        """Gives back all that was asked for, and nothing of what the backend took for itself."""
        if self._buffer:
            self._ggml.ggml_backend_buffer_free(self._buffer)
            self._buffer = None

    def close(self) -> None:
        self.free_buffer()
        if self._context:
            self._ggml.ggml_free(self._context)
        self._ggml.ggml_backend_free(self._backend)


def _set_n_threads(handle: Any, backend: Any, n_threads: int) -> None:
    ggml = _base()
    registry = ggml.ggml_backend_dev_backend_reg(handle)
    address = ggml.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_set_n_threads")
    if address:
        ctypes.CFUNCTYPE(None, _pointer, ctypes.c_int)(address)(backend, n_threads)


@contextmanager
def _product(device: str, n_threads: int, n_columns: int, n_rows: int, n_tokens: int = 1) -> Iterator[_Product]:
    product = _Product(device, n_threads, n_columns, n_rows, n_tokens)
    try:
        yield product
    finally:
        product.close()


def measure_overhead(device: Device, n_threads: int, n_embd: int) -> int:
    """Device memory that computing takes beside the buffers asked for: code, workspaces, rounding of allocations.

    Once per process it is what a driver loads and keeps, so this comes before any other measurement. Devices whose
    free memory is that of a whole machine, where others work too, are taken to need nothing.
    """
    if not device.name.startswith(_OWN_DRIVERS):
        return 0
    before = _free_memory(device.name)
    with _product(device.name, n_threads, n_embd, 4096) as one:
        one.run()
        with _product(device.name, n_threads, n_embd, 4096, 512) as many:
            many.run()
            one.free_buffer()
            many.free_buffer()
            taken = before - _free_memory(device.name)
    return max(0, taken) + _ROUNDING


def _free_memory(device: str) -> int:
    free, total = _size(), _size()
    _base().ggml_backend_dev_memory(_handles()[device], ctypes.byref(free), ctypes.byref(total))
    return free.value


def measure_sync(device: str, n_threads: int, n_embd: int) -> float:
    """Seconds to send an FFN input, start a graph, wait for it and fetch the output, next to no work in between."""
    with _product(device, n_threads, n_embd, 32) as product:
        for _ in range(10):
            product.run()
        # The median: a pause of the machine is no cost of the device.
        return sorted(product.run() for _ in range(51))[25]


def measure_bandwidth(device: str, n_threads: int, n_bytes: int, sync_seconds: float) -> float:
    """Bytes of weights that a matrix-vector product reads per second, by the best of a few runs."""
    n_columns = 4096
    n_rows = max(1, n_bytes // (2 * n_columns))
    with _product(device, n_threads, n_columns, n_rows) as product:
        best = first = product.run()
        # A busy machine is slow by chance, so the best counts; a slow one is not kept busy for long.
        for _ in range(5 if first < 0.1 else 2):
            best = min(best, product.run())
    return 2 * n_columns * n_rows / max(best - sync_seconds, best / 2)
