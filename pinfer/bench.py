"""Measures how fast a model runs sparsely and with stock libllama: alternately, in one run, on the same tokens."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from pinfer.artefacts.predictor import PredictorFile
from pinfer.benchmark import limit, machine, steps
from pinfer.benchmark.limit import TokenBytes
from pinfer.benchmark.process import WAIT_VARIABLES, WorkerProcess, worker_environment
from pinfer.benchmark.report import DENSE, SPARSE, BenchReport, Case, ModelFacts, Ratio, Result, Steps
from pinfer.benchmark.text import TEXT
from pinfer.errors import PinferError
from pinfer.execution import Execution, ExecutionOptions, decide
from pinfer.llama.plugin import Stats
from pinfer.model import Model, open_model
from pinfer.progress import NULL_PROGRESS, Progress

# After a run, the threads of that side spin for some milliseconds before they sleep.
_SETTLE_SECONDS = 0.05
# From this many CPUs used by other processes, the report calls the machine busy.
_BUSY_CPUS = 0.1
_TEXT_BYTES = 16  # bytes of text to read per token; few tokens are longer


@dataclass(frozen=True, kw_only=True)
class BenchOptions(ExecutionOptions):
    """Settings of ``pinfer bench``; every default is the command line's."""

    n_prompt: tuple[int, ...] = (512,)
    n_gen: tuple[int, ...] = (128,)
    n_seq: tuple[int, ...] = (1, 4, 16)
    """sequences decoded in parallel"""
    n_depth: tuple[int, ...] = (0,)
    """tokens in each sequence before the test starts"""
    repetitions: int = 5
    n_ctx: int = 0
    """context per sequence; 0: as much as the test needs"""
    n_batch: int = 2048
    """tokens of a prompt that are submitted together"""
    n_ubatch: int = 512
    """tokens that are computed together"""
    compare: Literal["dense", "none"] = "dense"
    steps: bool = False
    """also measure where the time of decoding on the sparse side goes"""
    text: Path | None = None
    n_stream_bytes: int = 1 << 30
    """bytes to read when measuring the bandwidth, more than any cache holds"""
    rpc: str | None = None
    """host:port[,host:port] of RPC servers; a server serves one process, so only one side can be measured with them"""


def bench(model_path: Path, options: BenchOptions, progress: Progress = NULL_PROGRESS) -> BenchReport:
    """Measure. Raises PinferError if there is nothing to test, artefacts do not match, or a worker dies."""
    started, load_average = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"), os.getloadavg()[0]
    model = open_model(model_path, options.activation)
    setup = _Setup.of(model, options)
    tests = _tests(model, options)
    notes = list(setup.notes)
    bandwidth = _bandwidth(setup.execution.n_threads, options.n_stream_bytes)
    with ExitStack() as stack:
        workers = {side: stack.enter_context(WorkerProcess(side)) for side in setup.sides}
        facts = {side: worker.ask("load", **setup.load(side)) for side, worker in workers.items()}
        first = facts[setup.sides[0]]
        n_text = max(_n_text(test, 1 + options.repetitions) for test in tests)
        source = _TokenSource.of(workers[setup.sides[0]], first, options.text, n_text)
        own = _cpu_used(workers)
        before = machine.cpu_time()
        results = _measure(workers, tests, source, setup, options, progress)
        after = machine.cpu_time()
        own = _cpu_used(workers) - own
        attributed = _attribute(workers[SPARSE], tests, source, options) if options.steps and SPARSE in workers else ()
        peak = {side: int(worker.ask("usage")["peak"]) for side, worker in workers.items()}
    # Of the measurements before and after, the better one is closer to what the memory can do.
    bandwidth = max(bandwidth, _bandwidth(setup.execution.n_threads, options.n_stream_bytes))
    others = machine.used_by_others(before, after, own)
    if others is not None and others >= _BUSY_CPUS:
        notes.append(f"busy: other processes used {others:.1f} CPUs during the bench, so the numbers are not reliable")
    limits = [(r.median, bandwidth / r.token_bytes.total) for r in results if r.token_bytes is not None]
    if any(speed > ceiling for speed, ceiling in limits):
        notes.append("faster than the limit: the model fits in the CPU's caches, or the bandwidth was measured too low")
    if SPARSE in setup.sides and all(r.computed is None for r in results if r.side == SPARSE):
        notes.append("nothing was computed sparsely: the plugin computed every FFN densely")
    if plain := [r.test.name for r in results if r.no_flash]:
        notes.append(
            f"stock libllama is faster without flash attention in {', '.join(plain)}, and ran without it there"
        )
    trained = _trained(model, setup)
    return BenchReport(
        environment=machine.describe(
            setup.execution.n_threads, first["ggml"], first["isa"], load_average, started, _wait_policy()
        ),
        model=ModelFacts(
            model.path.name, _name(model), first["type"], first["size"], first["n_params"], model.activation
        ),
        mode=setup.execution.mode,
        tokens_from=source.name,
        results=tuple(results),
        ratios=_ratios(tests, results) if len(setup.sides) == 2 else (),
        peak=peak,
        recall=trained[0],
        candidates=trained[1],
        bandwidth=bandwidth,
        others=others,
        notes=tuple(notes),
        steps=attributed,
    )


@dataclass(frozen=True)
class _Setup:
    """The sides to measure and their settings."""

    execution: Execution
    sides: tuple[str, ...]
    rpc: str | None
    notes: tuple[str, ...]

    @staticmethod
    def of(model: Model, options: BenchOptions) -> _Setup:
        execution = decide(model, options)
        sparse = execution.plugin is not None
        sides = (SPARSE, DENSE) if sparse and options.compare == "dense" else (SPARSE,) if sparse else (DENSE,)
        notes = list(execution.notes)
        n_cpus = len(os.sched_getaffinity(0))
        if execution.n_threads > n_cpus:
            notes.append(f"{execution.n_threads} threads share {n_cpus} CPUs, which slows both sides down")
        if len(sides) == 2 and not model.stock_computes_it:
            notes.append(
                f"stock libllama computes another activation than this model's {model.activation}: "
                "its speed is comparable, its output is wrong"
            )
        if policy := _wait_policy():
            notes.append(f"both sides use your OpenMP wait policy ({policy})")
        return _Setup(execution, sides, options.rpc, tuple(notes))

    def load(self, side: str) -> dict[str, object]:
        """Arguments of a worker's ``load`` command."""
        config = self.execution.plugin if side == SPARSE else None
        return {
            "model": self.execution.model.path.absolute(),
            "plugin": None if config is None else asdict(config) | {"hot": config.hot_paths},
            "n_threads": self.execution.n_threads,
            "n_gpu_layers": self.execution.n_gpu_layers,
            "cache_types": self.execution.cache_types,
            "rpc": self.rpc,
        }


def _wait_policy() -> str:
    environment = worker_environment()
    return ", ".join(f"{name}={environment[name]}" for name in WAIT_VARIABLES if name in environment)


def _name(model: Model) -> str:
    name = model.gguf.get("general.name")
    return name if isinstance(name, str) else model.name


def _tests(model: Model, options: BenchOptions) -> list[Case]:
    tests = []
    for depth in options.n_depth:
        tests += [Case(n, 0, 1, depth) for n in options.n_prompt if n > 0]
        tests += [Case(0, n, b, depth) for n in options.n_gen if n > 0 for b in options.n_seq]
    if not tests or options.repetitions < 1 or any(b < 1 for b in options.n_seq):
        raise PinferError("there is nothing to measure", "use -p or -n above 0, and -np and -r of at least 1")
    longest = max(t.n_depth + t.n_prompt + t.n_gen for t in tests)
    if options.n_ctx and options.n_ctx < longest:
        raise PinferError(
            f"a context of {options.n_ctx} tokens is too small for a test of {longest}",
            f"use -c {longest}, or a smaller -p, -n and -d",
        )
    learned_positions = model.gguf.tensors.get("position_embd.weight")
    if learned_positions is not None and longest > learned_positions.n_rows:
        raise PinferError(
            f"{model.name} has no positions beyond {learned_positions.n_rows}", "use a smaller -p, -n and -d"
        )
    return tests


def _bandwidth(n_threads: int, n_bytes: int) -> float:
    """Measured in a process of its own, so that its memory is not part of a side's peak."""
    with WorkerProcess("bandwidth") as worker:
        return float(worker.ask("bandwidth", n_threads=n_threads, n_bytes=n_bytes))


def _cpu_used(workers: dict[str, WorkerProcess]) -> float:
    return time.process_time() + sum(float(worker.ask("usage")["cpu"]) for worker in workers.values())


@dataclass(frozen=True)
class _TokenSource:
    """The tokens to compute: real text if the model has a vocabulary, since the text decides which neurons fire."""

    name: str
    tokens: tuple[int, ...]
    bos: int | None

    @staticmethod
    def of(worker: WorkerProcess, facts: dict[str, Any], path: Path | None, n_wanted: int) -> _TokenSource:
        if not facts["has_vocabulary"]:
            draw = random.Random(1)
            return _TokenSource("random", tuple(draw.randrange(facts["n_vocab"]) for _ in range(n_wanted)), None)
        if path is not None:
            with path.open("rb") as file:
                text, name = file.read(_TEXT_BYTES * n_wanted).decode("utf-8", errors="ignore"), path.name
        else:
            text, name = TEXT, "built-in text"
        tokens = [t for t in worker.ask("tokenize", text=text) if t != facts["bos"]]
        if not tokens:
            raise PinferError(f"{path} has no text", "pass another --text")
        return _TokenSource(name + (", repeated" if len(tokens) < n_wanted else ""), tuple(tokens), facts["bos"])

    def texts(self, test: Case) -> list[list[int]]:
        """What the test's sequences hold before it starts."""
        return [self._piece(s * test.n_depth, test.n_depth, at_start=True) for s in range(test.n_seq)]

    def streams(self, test: Case, run: int) -> list[list[int]]:
        """The test's sequences in a run: text that no earlier run has computed, unless a short text repeats."""
        n, n_seq = test.n_prompt or test.n_gen, test.n_seq
        first = test.n_depth * n_seq + run * n_seq * n
        return [self._piece(first + s * n, n, at_start=not test.n_depth) for s in range(n_seq)]

    def _piece(self, begin: int, n: int, *, at_start: bool) -> list[int]:
        head = [self.bos] if self.bos is not None and at_start else []
        return [*head, *(self.tokens[(begin + i) % len(self.tokens)] for i in range(n))][:n]


def _n_text(test: Case, n_runs: int) -> int:
    """Tokens of text that all runs of a test need."""
    return test.n_seq * (test.n_depth + n_runs * (test.n_prompt + test.n_gen))


def _measure(
    workers: dict[str, WorkerProcess],
    tests: Sequence[Case],
    source: _TokenSource,
    setup: _Setup,
    options: BenchOptions,
    progress: Progress,
) -> list[Result]:
    """For each test, open a context and warm up with one run on each side, then run the sides alternately.

    Every run has a text of its own: what is timed must not find its neurons in the caches because it ran before.
    """
    results: list[Result] = []
    n_done = 0
    total = (options.repetitions + 1) * len(workers) * len(tests)
    with progress.task("bench", total, "runs") as advance:
        for test in tests:
            kind, texts = "pp" if test.n_prompt else "tg", source.texts(test)
            no_flash = {side: _warm_up(worker, side, test, source, setup, options) for side, worker in workers.items()}
            advance(len(workers))
            runs: dict[str, list[tuple[int, dict[str, Any]]]] = {side: [] for side in workers}
            for run in range(1, options.repetitions + 1):
                streams = source.streams(test, run)
                for side, worker in workers.items():
                    time.sleep(_SETTLE_SECONDS)
                    runs[side].append((n_done, worker.ask("time", kind=kind, streams=streams, texts=texts)))
                    n_done += 1
                    advance(1)
            results += [replace(_result(test, side, runs[side], setup), no_flash=no_flash[side]) for side in workers]
    return results


def _size(test: Case, options: BenchOptions) -> dict[str, Any]:
    """Arguments of a worker's ``open`` command."""
    n_ctx = max(options.n_ctx, test.n_depth + test.n_prompt + test.n_gen)
    return {"n_ctx": n_ctx, "n_seq": test.n_seq, "n_batch": options.n_batch, "n_ubatch": options.n_ubatch}


def _attribute(
    worker: WorkerProcess, tests: Sequence[Case], source: _TokenSource, options: BenchOptions
) -> tuple[Steps, ...]:
    return tuple(
        steps.measure(
            worker, test, _size(test, options), [source.streams(test, run) for run in (0, 1)], source.texts(test)
        )
        for test in tests
        if test.n_gen
    )


def _warm_up(
    worker: WorkerProcess, side: str, test: Case, source: _TokenSource, setup: _Setup, options: BenchOptions
) -> bool:
    """Open a context and run the test once. Returns whether flash attention is off.

    At depth, llama.cpp's flash attention can be slower on the CPU than the plain products. Stock libllama is measured
    with the faster of the two; pinfer as it runs by default.
    """
    size = _size(test, options)
    work = {"kind": "pp" if test.n_prompt else "tg", "streams": source.streams(test, 0), "texts": source.texts(test)}

    def seconds(flash: bool, n_runs: int) -> float:
        worker.ask("open", **size, flash_attention=flash)
        return min(float(worker.ask("time", **work)["seconds"]) for _ in range(n_runs))

    # A quantised V needs flash attention.
    has_choice = setup.execution.cache_types[1] in ("f32", "f16", "bf16")
    if side != DENSE or not test.n_depth or not test.n_gen or not has_choice:
        seconds(True, 1)
        return False
    if seconds(True, 2) > seconds(False, 2):
        return True
    seconds(True, 1)
    return False


def _result(test: Case, side: str, runs: Sequence[tuple[int, dict[str, Any]]], setup: _Setup) -> Result:
    last = runs[-1][1]
    stats = Stats(**last["stats"]) if last["stats"] is not None else None
    # A prompt runs densely except for the last layer's token with logits, so its shares mean nothing.
    mostly_sparse = stats is not None and stats.n_tokens > stats.n_tokens_dense
    on_cpu = stats.n_neurons - stats.n_hot if stats is not None and mostly_sparse else 0
    return Result(
        test=test,
        side=side,
        tokens_per_s=tuple(test.n_tokens / run["seconds"] for _, run in runs),
        order=tuple(order for order, _ in runs),
        tokens_sha256=last["tokens_sha256"],
        computed=stats.n_candidates / on_cpu if stats is not None and on_cpu else None,
        active=stats.n_active / on_cpu if stats is not None and on_cpu and setup.execution.model.is_sparse else None,
        token_bytes=_token_bytes(test, stats, setup),
        hidden=stats.hidden if stats is not None else None,
    )


def _token_bytes(test: Case, stats: Stats | None, setup: _Setup) -> TokenBytes | None:
    model, plugin = setup.execution.model, setup.execution.plugin
    if test.n_prompt or test.n_seq > 1 or setup.execution.n_gpu_layers or not limit.can_count(model):
        return None
    cache = setup.execution.cache_types
    if stats is None:
        return limit.dense_bytes(model, test.n_gen, cache, test.n_depth)
    if plugin is None or plugin.hot is not None:
        return None
    return limit.sparse_bytes(model, test.n_gen, stats, plugin.cold, plugin.predictor, cache, test.n_depth)


def _ratios(tests: Sequence[Case], results: Sequence[Result]) -> tuple[Ratio, ...]:
    speeds = {(r.test, r.side): r.tokens_per_s for r in results}
    return tuple(
        Ratio(t, tuple(a / b for a, b in zip(speeds[t, SPARSE], speeds[t, DENSE], strict=True))) for t in tests
    )


def _trained(model: Model, setup: _Setup) -> tuple[float | None, float | None]:
    """Recall and share of candidates of the predictor, as measured in training."""
    if setup.execution.plugin is None or setup.execution.plugin.predictor is None:
        return None, None
    predictor = PredictorFile.read(setup.execution.plugin.predictor, model)
    return fmean(predictor.recall), fmean(predictor.candidates)
