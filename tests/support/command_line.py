"""Runs the `pinfer` command as a user would, in its own process and folder, with stdout and stderr separate."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MODELS = ROOT / "models"


@dataclass(frozen=True)
class Outcome:
    """The result of a command: its exit code and both streams."""

    code: int
    out: str
    err: str

    @property
    def err_lines(self) -> list[str]:
        return self.err.splitlines()


@dataclass(frozen=True)
class CommandLine:
    """The command in a working folder, without the user's own settings in the environment."""

    folder: Path
    home: Path
    preexec_fn: Callable[[], object] | None = None

    def environment(self, env: Mapping[str, str] | None = None) -> dict[str, str]:
        foreign = ("PINFER_", "HF_", "HUGGING")
        clean = {name: value for name, value in os.environ.items() if not name.startswith(foreign)}
        if native := os.environ.get("PINFER_NATIVE_DIR"):
            clean["PINFER_NATIVE_DIR"] = native
        # This tree's package comes first; the rest of the path may hold its dependencies.
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        clean |= {"PINFER_HOME": str(self.home), "PYTHONPATH": path, "COLUMNS": "100", "HF_HUB_OFFLINE": "1"}
        return clean | dict(env or {})

    def __call__(
        self,
        *args: str | Path,
        stdin: str = "",
        env: Mapping[str, str] | None = None,
        folder: Path | None = None,
        timeout: float = 240,
        preexec_fn: Callable[[], object] | None = None,
    ) -> Outcome:
        done = subprocess.run(
            [sys.executable, "-m", "pinfer", *map(str, args)],
            cwd=folder or self.folder,
            env=self.environment(env),
            input=stdin.encode(),
            capture_output=True,
            timeout=timeout,
            check=False,
            preexec_fn=preexec_fn or self.preexec_fn,
        )
        return Outcome(done.returncode, done.stdout.decode("utf-8", "replace"), done.stderr.decode("utf-8", "replace"))
