"""The worker processes of `pinfer bench` seen from outside: started, asked line by line, and ended whatever happens."""

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
from types import TracebackType
from typing import Any, Self

from pinfer.errors import PinferError

# What decides how long idle OpenMP threads spin; both sides get libgomp's own habit unless the user says otherwise.
WAIT_VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
# These configure the plugin, and one loads it; a worker is told by its parent alone.
_FOREIGN = ("GGML_BACKEND_PATH", "PINFER_MODEL", "PINFER_ARTEFACTS", "PINFER_ACTIVATION")
COMMAND = (sys.executable, "-P", "-m", "pinfer.benchmark.worker")


def worker_environment() -> dict[str, str]:
    """This process's environment without what would make the sides unequal or the idle one spin."""
    environment = {name: value for name, value in os.environ.items() if name not in _FOREIGN}
    if environment.get("OMP_WAIT_POLICY", "").lower() == "active":
        del environment["OMP_WAIT_POLICY"]
    if environment.get("GOMP_SPINCOUNT", "").lower() in ("infinity", "infinite"):
        del environment["GOMP_SPINCOUNT"]
    paths = [str(Path(__file__).resolve().parents[2]), environment.get("PYTHONPATH", "")]
    return environment | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "GGML_NO_BACKTRACE": "1"}


class WorkerProcess:
    """A worker. Use it as a context manager: it ends the process, also after Ctrl-C."""

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
        """Send a command and wait for its answer. Raises PinferError where the worker says so or is no more."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
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
        likely = ", probably for want of memory" if code == -signal.SIGKILL else f": {said}" if said else ""
        return PinferError(f"the process that measures {self.name} ended by {cause}{likely}", hint)

    def _last_words(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read().decode("utf-8", errors="replace").split("\n")
        return next((" ".join(line.split()) for line in reversed(lines) if line.strip()), "")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # It has nothing to save, and in the middle of a batch it would not listen to anything milder for a while.
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
