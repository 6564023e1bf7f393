"""Converts a GGUF model to another type with libllama's quantiser, in a child process.

libllama's quantiser cannot be interrupted, reports no progress and aborts the process on some errors. A child process
can be killed, its progress shows in the size of its output, and an abort does not end the caller. The child is
``python -m pinfer.llama.quantise IN OUT TYPE THREADS``.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import time
from pathlib import Path

from pinfer.errors import PinferError
from pinfer.llama import log
from pinfer.progress import Progress

TYPES = {
    "q8_0": ("LLAMA_FTYPE_MOSTLY_Q8_0", 8.5),
    "q4_0": ("LLAMA_FTYPE_MOSTLY_Q4_0", 4.6),
    "q4_k_m": ("LLAMA_FTYPE_MOSTLY_Q4_K_M", 4.9),
}
"""type: libllama's constant and the approximate bits per weight"""
_POLL_SECONDS = 0.1


def estimated_bytes(n_weights: int, type_: str) -> int:
    """Approximate size of a model with ``n_weights`` weights."""
    return int(n_weights * TYPES[type_][1] / 8)


def quantise(source: Path, out: Path, type_: str, n_weights: int, n_threads: int, progress: Progress) -> None:
    """Write ``out`` and flush it to disk. Raises PinferError with libllama's last log line on failure.

    Ctrl-C ends the child. The caller removes what it wrote.
    """
    command = [sys.executable, "-m", "pinfer.llama.quantise", str(source.resolve()), str(out.resolve())]
    command += [type_, str(n_threads)]
    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
        text=True,
        errors="replace",
    )
    total = estimated_bytes(n_weights, type_)
    try:
        with progress.task(f"quantising to {type_}", total, "bytes") as advance:
            done = 0
            while child.poll() is None:
                time.sleep(_POLL_SECONDS)
                size = min(out.stat().st_size if out.exists() else 0, total)
                advance(size - done)
                done = size
            advance(total - done)
        _, said = child.communicate()
    finally:
        if child.poll() is None:
            child.kill()
            child.wait()
    if child.returncode != 0:
        lines = [line.strip() for line in said.splitlines() if line.strip()]
        raise PinferError(f"libllama could not quantise to {type_}: {lines[-1] if lines else 'it gave no reason'}")
    with out.open("rb") as file:
        os.fsync(file.fileno())


def _child(source: str, out: str, type_: str, n_threads: str) -> int:
    import llama_cpp

    log.capture()
    params = llama_cpp.llama_model_quantize_default_params()
    params.nthread = int(n_threads)
    params.ftype = getattr(llama_cpp, TYPES[type_][0])
    failed = llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(out), ctypes.byref(params))
    if failed:
        print(log.last_words(1), file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(_child(*sys.argv[1:]))
