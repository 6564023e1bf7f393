"""What a record of `pinfer bench` says about the build and the machine, and how busy others kept it meanwhile."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pinfer import __version__

_PACKAGE = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Environment:
    """Build and machine."""

    pinfer_version: str
    commit: str
    """of the source tree, ``-dirty`` where it was changed since; empty outside one"""
    llama_cpp_python: str
    ggml: str
    isa: str
    """the plugin's kernels; empty where the plugin was not used"""
    cpu: str
    n_cpus: int
    """this process may run on"""
    n_threads: int
    memory: int
    """bytes"""
    load_average: float
    """of the last minute, at the start"""
    time: str
    """of the start, UTC"""
    wait_policy: str
    """OpenMP's, where the user set one"""


def describe(n_threads: int, ggml: str, isa: str, load_average: float, started: str, wait_policy: str) -> Environment:
    """The rest is read from the machine."""
    return Environment(
        pinfer_version=__version__,
        commit=_commit(),
        llama_cpp_python=_version_of("llama-cpp-python"),
        ggml=ggml,
        isa=isa,
        cpu=_cpu(),
        n_cpus=len(os.sched_getaffinity(0)),
        n_threads=n_threads,
        memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        load_average=load_average,
        time=started,
        wait_policy=wait_policy,
    )


def _version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _commit() -> str:
    """Only of a source tree of pinfer's own, not of whatever repository a wheel was installed into."""
    if not (_PACKAGE.parent / ".git").exists():
        return ""
    command = ["git", "-C", str(_PACKAGE.parent), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _cpu() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


@dataclass(frozen=True)
class CpuTime:
    """Seconds at one moment, of the CPUs this process may use."""

    at: float
    busy: float
    """everybody's, time stolen by a hypervisor included"""


def cpu_time() -> CpuTime | None:
    """None where the kernel does not tell."""
    allowed = {f"cpu{n}" for n in os.sched_getaffinity(0)}
    ticks = 0
    try:
        for line in Path("/proc/stat").read_text().splitlines():
            name, *values = line.split()
            if name in allowed:
                # user nice system idle iowait irq softirq steal; guest time is in user already
                numbers = [int(v) for v in values[:8]]
                ticks += sum(numbers) - numbers[3] - numbers[4]
    except (OSError, ValueError, IndexError):
        return None
    return CpuTime(time.monotonic(), ticks / os.sysconf("SC_CLK_TCK")) if ticks else None


def used_by_others(begin: CpuTime | None, end: CpuTime | None, own: float) -> float | None:
    """Mean number of CPUs that others kept busy; ``own`` is the CPU time of pinfer's processes in seconds."""
    if begin is None or end is None or end.at <= begin.at:
        return None
    return max(0.0, (end.busy - begin.busy - own) / (end.at - begin.at))
