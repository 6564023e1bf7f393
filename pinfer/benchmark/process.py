"""Starts the worker processes of `pinfer bench`, sends them commands and always ends them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from pinfer.errors import PinferError

# How long idle OpenMP threads spin. Both sides use libgomp's default unless the user sets one of these.
WAIT_VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
# These load or configure the plugin; in a worker only its parent's commands may do that.
_FOREIGN = ("GGML_BACKEND_PATH", "PINFER_MODEL", "PINFER_ARTEFACTS", "PINFER_ACTIVATION")
COMMAND = (sys.executable, "-P", "-m", "pinfer.benchmark.worker")


def worker_environment() -> dict[str, str]:
    """This process's environment without variables that treat the sides differently or make the idle one spin."""
    environment = {name: value for name, value in os.environ.items() if name not in _FOREIGN}
    if environment.get("OMP_WAIT_POLICY", "").lower() == "active":
        del environment["OMP_WAIT_POLICY"]
    if environment.get("GOMP_SPINCOUNT", "").lower() in ("infinity", "infinite"):
        del environment["GOMP_SPINCOUNT"]
    paths = [str(Path(__file__).resolve().parents[2]), environment.get("PYTHONPATH", "")]
    return environment | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "GGML_NO_BACKTRACE": "1"}


class WorkerProcess:
    """A worker process; a context manager that ends it, also after Ctrl-C."""

    def __init__(self, name: str, command: Sequence[str] = COMMAND) -> None:
        self.name = name
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed by __exit__)
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
                encoding="utf-8",
                env=worker_environment(),
            )
        except BaseException:
            self._errors.close()
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, do: str, **arguments: object) -> Any:
        """Send a command and wait for its answer. Raises PinferError if the command fails or the worker has died."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}, default=os.fspath) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line.endswith("\n"):
            raise self._ended()
        reply = json.loads(line)
        if "error" in reply:
            raise PinferError(f"{self.name}: {reply['error']}", reply["hint"])
        return reply["ok"]

    def _ended(self) -> PinferError:
        code = self._process.wait()
        cause = _signal_name(-code) if code < 0 else f"exit code {code}"
        said = self._last_words()
        hint = "close other programs, or use a smaller model or batch" if code == -signal.SIGKILL else ""
        likely = ", probably because memory ran out" if code == -signal.SIGKILL else f": {said}" if said else ""
        return PinferError(f"the process that measures {self.name} ended by {cause}{likely}", hint)

    def _last_words(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read().decode("utf-8", errors="replace").split("\n")
        return next((" ".join(line.split()) for line in reversed(lines) if line.strip()), "")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        # The worker has nothing to save, and would not handle SIGTERM before its current batch ends.
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                with suppress(BrokenPipeError):
                    stream.close()
        self._errors.close()


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
