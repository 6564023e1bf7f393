"""Reports results: a check of the build, the summary of a case, and the table of all results.

python kit/report.py check | table OUT
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cases import Case

HERE = Path(__file__).resolve().parent
WAYS = {"layers": "-ngl N", "ffn": "attention on GPU"}


def check() -> dict[str, Any]:
    """Loads the build as pinfer does and describes it. Raises PinferError or ImportError if it does not load."""
    import llama_cpp
    import numpy
    import scipy

    from pinfer.llama.devices import list_devices
    from pinfer.llama.plugin import load_plugin, runner_path

    isa = load_plugin().isa()
    runner_path()
    devices = list_devices()
    wanted = os.environ["KIT_DEVICE"]
    if wanted not in {device.name for device in devices} and not os.environ.get("CUDA_ARCH"):
        raise RuntimeError(f"the build finds no {wanted}, only {', '.join(device.name for device in devices)}")
    # The command line imports more packages than the modules above.
    subprocess.run(
        [sys.executable, "-m", "pinfer", "show", str(HERE.parent / "models" / "tiny-relu2.gguf")], check=True
    )
    return {
        "devices": [{"name": d.name, "description": d.description, "memory": d.memory_total} for d in devices],
        "kernels": isa,
        "llama_cpp_python": llama_cpp.__version__,
        "numpy": numpy.__version__,
        "scipy": scipy.__version__,
        "python": platform.python_version(),
    }


def machine() -> dict[str, Any]:
    """Describes this machine and the kit."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    return {
        "gpu": _first_line(query),
        "cpu": _cpu(),
        "n_cpus": len(os.sched_getaffinity(0)),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "nvcc": _first_line(["nvcc", "--version"], "release"),
        "kit": _text(HERE.parents[1] / "COMMIT"),
    }


def _cpu() -> str:
    found = re.search(r"^model name\s*:\s*(.*)$", _text(Path("/proc/cpuinfo")), re.MULTILINE)
    return found[1] if found else platform.machine()


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""


def _first_line(command: list[str], word: str = "") -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return next((line.strip() for line in done.stdout.splitlines() if done.returncode == 0 and word in line), "")


# -- a case ------------------------------------------------------------------------------------------------------------


def summary(data: dict[str, Any], case: Case) -> dict[str, Any]:
    """Medians and spread over the rounds of a case, by batch size, and the device memory that each side took."""
    rounds = [data["rounds"][n] for n in sorted(data["rounds"], key=int)]
    taken = {side: _most(r[side]["device_bytes"] for r in rounds if side in r) for side in ("pinfer", *WAYS)}
    cap = data["cap"]
    rows = []
    for batch, aim in zip(case.batches, case.aims, strict=True):
        speeds = {
            side: [r[side]["tokens_per_s"][str(batch)] for r in rounds if side in r] for side in ("pinfer", *WAYS)
        }
        medians = {side: median(values) for side, values in speeds.items() if values}
        ways = [side for side in WAYS if side in medians and not (cap and taken[side] and taken[side] > cap)]
        if not ways:
            raise ValueError(f"{case.name}: llama.cpp kept within the budget in neither way")
        best = max(ways, key=lambda side: medians[side])
        pairs = [a / b for a, b in zip(speeds["pinfer"], speeds[best], strict=True)]
        rows.append(
            {
                "batch": batch,
                "tokens_per_s": medians,
                "spread": {side: [min(values), max(values)] for side, values in speeds.items() if values},
                "best": best,
                "ratio": median(pairs),
                "ratio_low": min(pairs),
                "ratio_high": max(pairs),
                "aim": aim,
            }
        )
    kept = None if cap is None or taken["pinfer"] is None else taken["pinfer"] <= cap
    return {"rows": rows, "device_bytes": taken, "budget_kept": kept}


def _most(values: Any) -> int | None:
    known = [value for value in values if value is not None]
    return max(known, default=None)


def _gib(n: int | None) -> str:
    if n is None:
        return "–"
    return f"{n / 2**30:.1f} GiB" if n >= 2**30 else f"{n / 2**20:.0f} MiB"


def case_rows(data: dict[str, Any]) -> list[str]:
    """The case's rows of the table in docs/benchmarks.md."""
    whole = data["n_layer"] == data["n_layer_full"]
    layers = f"{data['n_layer']}" if whole else f"{data['n_layer']} of {data['n_layer_full']}"
    cap = "none" if data["cap"] is None else _gib(data["cap"]) + ("" if whole else f" (for {_gib(data['cap_full'])})")
    taken = data["summary"]["device_bytes"]
    rows = []
    for row in data["summary"]["rows"]:
        speeds = row["tokens_per_s"]
        ways = " | ".join(f"{speeds[side]:.2f}" if side in speeds else "does not fit" for side in WAYS)
        ratio = f"**{row['ratio']:.2f}** ({row['ratio_low']:.2f}-{row['ratio_high']:.2f})"
        memory = ", ".join(_gib(taken[side]) for side in ("pinfer", row["best"]))
        aim = f"{row['aim']:g}" if row["aim"] else "–"
        cells = [data["case"], layers, cap, str(row["batch"]), f"{speeds['pinfer']:.2f}", ways, ratio, aim, memory]
        rows.append("| " + " | ".join(cells) + " |")
    return rows


HEAD = (
    "| case | layers | device memory | batch | pinfer t/s | llama.cpp -ngl N t/s | attention on GPU t/s "
    "| pinfer ÷ the better | aim | measured: pinfer, the better |\n|---|---|---|---:|---:|---:|---:|---:|---:|---|"
)


# -- everything --------------------------------------------------------------------------------------------------------


def tests_of(path: Path) -> dict[str, Any]:
    """Counts of tests in a JUnit file."""
    suites = list(ElementTree.parse(path).getroot().iter("testsuite"))
    count = {name: sum(int(s.get(name, 0)) for s in suites) for name in ("tests", "failures", "errors", "skipped")}
    return {**count, "seconds": sum(float(s.get("time", 0)) for s in suites)}


def table(out: Path) -> dict[str, Any]:
    """Everything that is finished: steps under ``out``, and the results."""
    results = Path(os.environ["KIT_RESULTS"])
    stamps = sorted((out / "stamps").iterdir(), key=lambda stamp: stamp.stat().st_mtime)
    cases = {}
    for file in sorted(results.glob("*.json")):
        data = json.loads(file.read_text(encoding="utf-8"))
        if "summary" in data:
            cases[data["case"]] = data
    return {
        "mode": os.environ["KIT_MODE"],
        "machine": machine(),
        "built": json.loads(_text(results / "check" / "built.json") or "null"),
        "steps": {stamp.name: int(_text(stamp) or 0) for stamp in stamps},
        "tests": {file.stem: tests_of(file) for file in sorted(results.glob("*.xml"))},
        "sanitizer": json.loads(_text(results / "check" / "sanitizer.json") or "null"),
        "cases": cases,
    }


def printed(found: dict[str, Any]) -> str:
    """The results as text for the terminal."""
    machine = found["machine"]
    place = ", ".join(part for part in (machine["gpu"], machine["cpu"], f"{machine['n_cpus']} CPUs") if part)
    lines = [f"{found['mode']}: {place}; kit {machine['kit']}"]
    if found["built"]:
        devices = ", ".join(device["name"] for device in found["built"]["devices"])
        lines.append(f"built: devices {devices}; kernels {found['built']['kernels']}; scipy {found['built']['scipy']}")
    steps = {name: seconds for name, seconds in found["steps"].items() if not name.startswith("bench-")}
    lines.append("steps (seconds): " + ", ".join(f"{name} {seconds}" for name, seconds in steps.items()))
    for name, count in found["tests"].items():
        bad = count["failures"] + count["errors"]
        lines.append(f"{name}: {count['tests']} tests, {bad} failed, {count['skipped']} skipped")
    if found["sanitizer"]:
        lines.append(f"compute-sanitizer: {found['sanitizer']['result']}")
    if found["cases"]:
        lines += ["", HEAD, *(row for data in found["cases"].values() for row in case_rows(data))]
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    results = Path(os.environ["KIT_RESULTS"])
    match arguments:
        case ["check"]:
            (results / "check").mkdir(exist_ok=True)
            text = json.dumps(check(), indent=1)
            (results / "check" / "built.json").write_text(text, encoding="utf-8")
            print(text)
        case ["table", out]:
            found = table(Path(out))
            text = printed(found)
            (results / "check").mkdir(exist_ok=True)
            (results.parent / f"{found['mode']}.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
            (results.parent / f"{found['mode']}.md").write_text(text + "\n", encoding="utf-8")
            print(text)
        case _:
            print(__doc__, file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
