"""The build and machine that a record of `pinfer bench` names, and how busy other processes kept the CPUs."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

from pinfer import __version__

_PACKAGE = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Environment:
    """Build and machine."""

    pinfer_version: str
    commit: str
    """of the source tree, with ``-dirty`` if it has uncommitted changes; empty for an installed package"""
    llama_cpp_python: str
    ggml: str
    isa: str
    """the plugin's kernels; empty if the plugin was not used"""
    cpu: str
    n_cpus: int
    """that this process may use"""
    n_threads: int
    memory: int
    """bytes"""
    load_average: float
    """of the last minute, at the start"""
    time: str
    """of the start, UTC"""
    wait_policy: str
    """OpenMP's, if the user set one"""


def describe(n_threads: int, ggml: str, isa: str, load_average: float, started: str, wait_policy: str) -> Environment:
    """The environment: what is passed in, and what the machine reports."""
    return Environment(
        pinfer_version=__version__,
        commit=_commit(),
        llama_cpp_python=_version_of("llama-cpp-python"),
        ggml=ggml,
        isa=isa,
        cpu=cpu_name(),
        n_cpus=len(os.sched_getaffinity(0)),
        n_threads=n_threads,
        memory=psutil.virtual_memory().total,
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
    """The commit of pinfer's own source tree; a wheel may be installed inside another repository."""
    if not (_PACKAGE.parent / ".git").exists():
        return ""
    command = ["git", "-C", str(_PACKAGE.parent), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def cpu_name() -> str:
    """The processor's name, as the kernel reports it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


@dataclass(frozen=True)
class CpuTime:
    """CPU time used by all processes, on the CPUs this process may use."""

    at: float
    """seconds of a monotonic clock"""
    busy: float
    """seconds, including time stolen by a hypervisor"""


def cpu_time() -> CpuTime | None:
    """CPU time used so far; None if the kernel does not report it."""
    times = psutil.cpu_times(percpu=True)
    used = (times[n] for n in os.sched_getaffinity(0) if n < len(times))
    # Guest time is part of user and nice.
    busy = sum(t.user + t.nice + t.system + t.irq + t.softirq + t.steal for t in used)
    return CpuTime(time.monotonic(), busy) if busy else None


def used_by_others(begin: CpuTime | None, end: CpuTime | None, own: float) -> float | None:
    """Mean number of CPUs that other processes kept busy. ``own`` is the CPU time of pinfer's processes in seconds."""
    if begin is None or end is None or end.at <= begin.at:
        return None
    return max(0.0, (end.busy - begin.busy - own) / (end.at - begin.at))
