"""One case of the benchmark, step by step: make a synthetic model, prepare it, and measure it against llama.cpp.

    python kit/bench.py cases | steps CASE | step CASE STEP

gpu.sh runs the steps and remembers which are finished; their results are in results/MODE/CASE.json. Both sides get the
same budget of device memory, and their use of it is measured in the same way. llama.cpp's two ways of offloading are
tuned first: whole layers on the device (-ngl N), or all attention on the device with as much of the FFN as fits.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cases import CASES, GIB, Case, Sizes, fit, room
from meter import Meter

HERE = Path(__file__).resolve().parent
DATA = HERE.parent / "tests" / "data"
SIDES = ("pinfer", "layers", "ffn")
PROMPT = 8  # tokens; llama-batched-bench needs a prompt before it decodes
TUNE_GEN = 12
_ALL = 999


class Store:
    """The results of a case, in a file to which every step adds."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def put(self, **values: Any) -> None:
        self.data |= values
        temporary = self.path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.data, indent=1), encoding="utf-8")
        temporary.replace(self.path)


@dataclass(frozen=True)
class Measured:
    """One run of one side."""

    tokens_per_s: dict[int, float]
    """By batch size; all sequences together."""
    device_bytes: int | None
    """Device memory without that of a bare CUDA context; None if it was not measured."""


class Bench:
    """The steps of one case; the step NAME is the method do_NAME."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.device = os.environ["KIT_DEVICE"]
        self.on_gpu = self.device != "CPU"
        self.work = Path(os.environ["KIT_WORK"])
        self.store = Store(Path(os.environ["KIT_RESULTS"], f"{case.name}.json"))
        self.model = self.work / f"{case.name}.gguf"

    # -- preparation ---------------------------------------------------------------------------------------------------

    def do_model(self) -> None:
        """Writes the model, with as many layers as there is room for. Deletes the models of other cases first."""
        from models.synth import write_model

        for other in self.work.iterdir():
            if other.name.startswith(tuple(f"{name}.gguf" for name in CASES)):
                shutil.rmtree(other) if other.is_dir() else other.unlink()
        fitted = fit(self.case, room(self.work))
        self.store.put(
            case=self.case.name,
            n_layer=fitted.n_layer,
            n_layer_full=self.case.model.n_layer,
            cap=fitted.cap,
            cap_full=self.case.cap,
            model_bytes=fitted.model_bytes,
            active=self.case.model.active,
            type=self.case.model.type,
            device=self.device,
            rounds={},
        )
        write_model(self.model, replace(self.case.model, n_layer=fitted.n_layer))

    def do_profile(self) -> None:
        n = str(self.case.n_profile)
        text = str(DATA / "profile.txt")
        # --force: the model is random, so its perplexity cannot tell whether the activation is right.
        self._pinfer("profile", "--force", "--dataset", text, "--tokens", n, "--samples", n, "-c", "512")

    def do_train(self) -> None:
        from train_layers import train_layers

        report = train_layers(self.model)
        self.store.put(recall=report["recall"], candidates=report["candidates"])

    def do_solve(self) -> None:
        budget = [] if self._cap is None else ["--vram", str(self._cap)]
        options = ["-c", str(self._n_ctx), "--device", self.device, *budget]
        report = json.loads(self._pinfer("solve", *options, "--json"))
        self.store.put(solve={name: report.get(name) for name in ("n_bytes", "hot_activations", "status", "gap")})

    def do_split(self) -> None:
        self._pinfer("split")

    # -- tuning --------------------------------------------------------------------------------------------------------

    def do_context(self) -> None:
        """Measures the memory of a bare CUDA context."""
        with Meter(self.on_gpu) as meter:
            if self.on_gpu:
                subprocess.run([sys.executable, str(HERE / "meter.py")], check=True)
        self.store.put(context_bytes=meter.peak)

    def do_pinfer(self) -> None:
        """Finds the best number of threads for pinfer."""
        self._tune("pinfer", lambda threads: self._run_pinfer(threads, TUNE_GEN))

    def do_layers(self) -> None:
        """Tunes llama.cpp with whole layers on the device, as many as the budget allows."""
        self._tune_way("layers", self.store.data["n_layer"] + 1, self._sizes.layer)

    def do_ffn(self) -> None:
        """Tunes llama.cpp with all attention on the device, and the FFN of as many layers as the budget allows."""
        self._tune_way("ffn", self.store.data["n_layer"], self._sizes.ffn)

    def _tune_way(self, way: str, most: int, unit: int) -> None:
        def probe(n: int) -> int | None:
            measured = self._run_llama(self._placed(way, n), None, TUNE_GEN)
            return None if measured is None else measured.device_bytes

        if not self.on_gpu:
            n = 0
        elif self._cap is None:
            n = most
        else:
            n = largest_fitting(most, unit, self._cap, probe)
        if n < 0:
            self.store.put(**{way: None})
            return
        placed = self._placed(way, n)
        threads = self._tune(way, lambda threads: self._run_llama(placed, threads, TUNE_GEN))
        if max(self.case.batches) >= 32:
            # For batches of 32 tokens or more llama.cpp copies weights to the device, unless --no-op-offload is given.
            flags = ["--no-op-offload"]
            with_it, without = (self._run_llama(placed + f, threads, TUNE_GEN) for f in (flags, []))
            if with_it and without and sum(with_it.tokens_per_s.values()) > sum(without.tokens_per_s.values()):
                placed += flags
        self.store.put(**{way: {"n": n, "arguments": placed, "threads": threads}})

    def _placed(self, way: str, n: int) -> list[str]:
        """llama.cpp's arguments that put ``n`` layers, or the FFN of ``n`` layers, on the device."""
        if way == "layers" or not self.on_gpu:
            return ["-ngl", str(n)]
        on_cpu = range(self.store.data["n_layer"] - n)
        pattern = rf"blk\.({'|'.join(map(str, on_cpu))})\.ffn_(up|gate|down)\.=CPU"
        return ["-ngl", str(_ALL), *(["-ot", pattern] if on_cpu else [])]

    def _tune(self, side: str, run: Callable[[int], Measured | None]) -> int:
        """Finds the number of threads that is fastest at the smallest batch."""
        cores = physical_cores()
        speed: dict[int, float] = {}
        for threads in sorted({cores, max(1, cores * 3 // 4), max(1, cores // 2)}):
            measured = run(threads)
            speed[threads] = measured.tokens_per_s[self.case.batches[0]] if measured else 0.0
        best = max(speed, key=lambda threads: speed[threads])
        self.store.put(**{f"threads_{side}": {"best": best, "tokens_per_s": speed}})
        return best

    # -- measurement ---------------------------------------------------------------------------------------------------

    def do_round(self, number: int) -> None:
        """Measures every side once, each in its own process. The order changes from round to round."""
        turn = number % len(SIDES)
        record: dict[str, Any] = {}
        for side in SIDES[turn:] + SIDES[:turn]:
            measured: Measured | None
            if side == "pinfer":
                measured = self._run_pinfer(self.store.data["threads_pinfer"]["best"], self.case.n_gen)
            elif (tuned := self.store.data[side]) is not None:
                measured = self._run_llama(tuned["arguments"], tuned["threads"], self.case.n_gen)
            else:
                continue
            if measured is None:
                raise RuntimeError(f"{side} failed in round {number}: see the log above")
            speeds = {str(batch): speed for batch, speed in measured.tokens_per_s.items()}
            record[side] = {"tokens_per_s": speeds, "device_bytes": measured.device_bytes}
        self.store.put(rounds=self.store.data["rounds"] | {str(number): record})

    def _run_pinfer(self, threads: int, n_gen: int) -> Measured:
        batches = ",".join(map(str, self.case.batches))
        options = ["--compare", "none", "-r", "1", "-p", "0", "-n", str(n_gen), "-np", batches, "-t", str(threads)]
        with Meter(self.on_gpu) as meter:
            found = self._pinfer("bench", *options, "--text", str(DATA / "heldout.txt"), "--json")
        report = json.loads(found)
        results = [r for r in report["results"] if r["side"] == "sparse"]
        shares = {str(r["n_seq"]): {"computed": r["computed"], "active": r["active"]} for r in results}
        self.store.put(notes=report["notes"], shares=shares)
        return Measured({r["n_seq"]: r["median_ts"] for r in results}, self._without_context(meter.peak))

    def _run_llama(self, placed: Sequence[str], threads: int | None, n_gen: int) -> Measured | None:
        """None if llama.cpp fails, for example because the device is full."""
        command = [
            *(str(Path(os.environ["KIT_BIN"], "llama-batched-bench")), "-m", str(self.model), "-c", str(self._n_ctx)),
            *("-b", "2048", "-ub", "512", "-npp", str(PROMPT), "-ntg", str(n_gen)),
            *("-npl", ",".join(map(str, self.case.batches)), "--fit", "off", "--output-format", "jsonl"),
            *("-t", str(threads or physical_cores()), *placed),
        ]
        print(*command, flush=True)
        with Meter(self.on_gpu) as meter:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        if done.returncode or len(lines) != len(self.case.batches):
            print(done.stdout[-2000:], done.stderr[-2000:], flush=True)
            return None
        return Measured({r["pl"]: r["speed_tg"] for r in lines}, self._without_context(meter.peak))

    # -- the result ----------------------------------------------------------------------------------------------------

    def do_report(self) -> None:
        from report import summary

        self.store.put(summary=summary(self.store.data, self.case))
        print(json.dumps(self.store.data["summary"], indent=1))

    # -- helpers -------------------------------------------------------------------------------------------------------

    @property
    def _cap(self) -> int | None:
        cap: int | None = self.store.data["cap"]
        return cap

    @property
    def _sizes(self) -> Sizes:
        return Sizes.of(self.case.model)

    @property
    def _n_ctx(self) -> int:
        return max(512, max(self.case.batches) * (self.case.n_gen + PROMPT))

    def _without_context(self, peak: int | None) -> int | None:
        return None if peak is None else max(0, peak - (self.store.data["context_bytes"] or 0))

    def _pinfer(self, command: str, *options: str) -> str:
        """Runs a pinfer command and returns its stdout; stderr goes to the step's log."""
        full = [sys.executable, "-m", "pinfer", command, str(self.model), *options]
        print(*full, flush=True)
        return subprocess.run(full, stdout=subprocess.PIPE, text=True, check=True).stdout


def largest_fitting(most: int, unit: int, cap: int, probe: Callable[[int], int | None]) -> int:
    """The largest n from 0 to ``most`` that takes at most ``cap`` bytes; -1 if even 0 takes more.

    ``probe(n)`` measures the bytes for n, and returns None if n does not run. ``unit`` is roughly the number of bytes
    that each step of n adds.
    """
    fits, fails = -1, most + 1
    n = min(most, max(0, int(0.9 * cap / unit)))
    while fails - fits > 1:
        taken = probe(n)
        if taken is not None and taken <= cap:
            fits = n
        else:
            fails = n
        step = (cap - taken) // unit if taken is not None else -1
        n = min(fails - 1, max(fits + 1, n + step))
    return fits


def physical_cores() -> int:
    from pinfer.llama.devices import physical_cores as count

    return count()


def steps_of(case: Case) -> list[str]:
    """The steps of a case, in order."""
    rounds = [f"round{n}" for n in range(1, case.rounds + 1)]
    return ["model", "profile", "train", "solve", "split", "context", "pinfer", "layers", "ffn", *rounds, "report"]


def main(arguments: Sequence[str]) -> int:
    match arguments:
        case ["cases"]:
            for case in CASES.values():
                cap = f"{case.cap / GIB:.3g} GiB" if case.cap is not None else "no cap"
                print(f"{case.name:<24} {cap:<12} batches {','.join(map(str, case.batches))}")
        case ["steps", name] if name in CASES:
            print(*steps_of(CASES[name]))
        case ["step", name, step] if name in CASES and step in steps_of(CASES[name]):
            bench = Bench(CASES[name])
            if step.startswith("round"):
                bench.do_round(int(step.removeprefix("round")))
            else:
                getattr(bench, f"do_{step}")()
        case _:
            print(__doc__, file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
