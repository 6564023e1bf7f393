"""Runs a shipped model with hot neurons on the GPU under compute-sanitizer, and writes sanitizer.json.

Some virtual machines do not allow the debugging interface that compute-sanitizer needs. A program that only opens a
CUDA context tells whether they do; if not, this is reported. Errors in pinfer's own run fail the step.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
FOUND = 9  # compute-sanitizer's exit code when it finds errors
OPTIONS = ("--tool", "memcheck", "--target-processes", "all", "--error-exitcode", str(FOUND))
PREPARE = (
    (
        "profile",
        "--dataset",
        str(HERE.parent / "tests" / "data" / "profile.txt"),
        "--tokens",
        "1024",
        "--samples",
        "512",
    ),
    ("train",),
    ("solve", "--vram", "64M", "-c", "256", "--device", os.environ["KIT_DEVICE"]),
    ("split",),
)


def sanitize(model: Path) -> str:
    """Returns the result as one line. Raises RuntimeError if memory errors were found."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return "not installed"
    probe = subprocess.run([tool, *OPTIONS, sys.executable, str(HERE / "meter.py")], capture_output=True, text=True)
    if probe.returncode or "Device not supported" in probe.stdout + probe.stderr:
        print(probe.stdout, probe.stderr)
        return "does not run on this machine: " + _last_line(probe.stdout + probe.stderr)
    pinfer = [sys.executable, "-m", "pinfer"]
    for command, *options in PREPARE:
        subprocess.run([*pinfer, command, str(model), *options], check=True)
    run = [*pinfer, "run", str(model), "-p", "Once upon a time", "-n", "8", "--temp", "0", "-no-cnv", "--ignore-eos"]
    done = subprocess.run([tool, *OPTIONS, *run], capture_output=True, text=True)
    print(done.stdout, done.stderr)
    if done.returncode:
        raise RuntimeError(f"compute-sanitizer failed with exit code {done.returncode} ({FOUND}: it found errors)")
    return "memcheck: no errors in 8 tokens"


def _last_line(text: str) -> str:
    lines = [line.strip(" =") for line in text.splitlines() if line.strip(" =")]
    return lines[-1] if lines else "no reason given"


def main() -> None:
    results, home = Path(os.environ["KIT_RESULTS"], "check"), Path(os.environ["PINFER_HOME"], "sanitize")
    results.mkdir(exist_ok=True)
    home.mkdir(parents=True, exist_ok=True)
    model = Path(shutil.copy(HERE.parent / "models" / "tiny-relu2.gguf", home))
    result = sanitize(model)
    (results / "sanitizer.json").write_text(json.dumps({"result": result}), encoding="utf-8")
    print(result)


if __name__ == "__main__":
    main()
