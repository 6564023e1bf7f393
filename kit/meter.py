"""Measures device memory with nvidia-smi, in the same way for every program that is compared."""

from __future__ import annotations

import ctypes
import os
import subprocess
import threading
import time
from types import TracebackType
from typing import Self

MIB = 2**20
_INTERVAL = 0.1
_CONTEXT_SECONDS = 2.0


def memory_used() -> int | None:
    """Bytes of GPU memory in use by all processes; None without a GPU."""
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0]
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", f"--id={gpu}"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
        return int(done.stdout.split()[0]) * MIB
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None


class Meter:
    """Watches device memory while its block runs; ``peak`` is the largest increase since the start, in bytes."""

    def __init__(self, wanted: bool = True) -> None:
        self.peak: int | None = None
        self._before = memory_used() if wanted else None
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        assert self._before is not None
        while not self._done.wait(_INTERVAL):
            now = memory_used()
            if now is not None:
                self.peak = max(self.peak or 0, now - self._before)

    def __enter__(self) -> Self:
        if self._before is not None:
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._before is not None:
            self._done.set()
            self._thread.join()


def hold_context() -> None:
    """Opens a CUDA context for a moment, so that a Meter can measure it. Every CUDA program takes this memory before
    its first allocation; neither side's budget counts it. Raises OSError without a driver."""
    driver = ctypes.CDLL("libcuda.so.1")
    context = ctypes.c_void_p()
    calls = (
        ("cuInit", (0,)),
        ("cuDevicePrimaryCtxRetain", (ctypes.byref(context), 0)),
        ("cuCtxSetCurrent", (context,)),
    )
    for name, arguments in calls:
        if status := getattr(driver, name)(*arguments):
            raise OSError(f"the CUDA driver does not work: {name} returned {status}")
    time.sleep(_CONTEXT_SECONDS)


if __name__ == "__main__":
    hold_context()
