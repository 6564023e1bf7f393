"""How fast a model runs sparsely, next to stock libllama: both sides in turn, in one run, on the same tokens."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from pinfer.benchmark import limit as bench_limit
from pinfer.benchmark import machine
from pinfer.benchmark.limit import TokenBytes
from pinfer.benchmark.process import WAIT_VARIABLES, WorkerProcess, worker_environment
from pinfer.benchmark.report import DENSE, SPARSE, BenchReport, Case, ModelFacts, Ratio, Result
from pinfer.errors import PinferError
from pinfer.llama.devices import physical_cores
from pinfer.llama.engine import PluginConfig
from pinfer.llama.plugin import Stats
from pinfer.model import Model, open_model
from pinfer.progress import NULL_PROGRESS, Progress

# After a run the threads of that side spin for some milliseconds before they sleep.
_SETTLE_SECONDS = 0.05
# Others' use of the CPU, in CPUs, from which a run is called busy.
_BUSY_CPUS = 0.1
_TEXT_BYTES = 16  # of text that are read for each token wanted; a token is seldom longer


@dataclass(frozen=True)
class BenchOptions:
    """Settings of ``pinfer bench``; every default is the command line's."""

    n_prompt: tuple[int, ...] = (512,)
    n_gen: tuple[int, ...] = (128,)
    n_seq: tuple[int, ...] = (1, 4, 16)
    """sequences decoded side by side"""
    repetitions: int = 5
    n_threads: int | None = None
    n_ctx: int = 0
    """of each sequence; 0: what the test needs"""
    n_gpu_layers: int | None = None
    """of both sides; None: as solved"""
    compare: Literal["dense", "none"] = "dense"
    dense: bool = False
    """stock libllama alone"""
    exact: bool = False
    no_artefacts: bool = False
    device: str | None = None
    activation: str | None = None
    text: Path | None = None
    n_stream_bytes: int = 1 << 30
    """read to measure the bandwidth: more than any cache holds"""
    rpc: str | None = None
    """host:port[,host:port] of RPC servers; a server serves one process, so one side alone can be measured with them"""


def bench(model_path: Path, options: BenchOptions, progress: Progress = NULL_PROGRESS) -> BenchReport:
    """Measure. Raises PinferError for options that make no test, artefacts that do not fit, a worker that dies."""
    started, load_average = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"), os.getloadavg()[0]
    model = open_model(model_path, options.activation)
    setup = _Setup.of(model, options)
    tests = _tests(model, options)
    notes = list(setup.notes)
    bandwidth = _bandwidth(setup.n_threads, options.n_stream_bytes)
    with ExitStack() as stack:
        workers = {side: stack.enter_context(WorkerProcess(side)) for side in setup.sides}
        facts = {side: worker.ask("load", **setup.load(side)) for side, worker in workers.items()}
        first = facts[setup.sides[0]]
        source = _TokenSource.of(workers[setup.sides[0]], first, options.text, max(t.n_tokens for t in tests))
        own = _cpu_used(workers)
        before = machine.cpu_time()
        results = _measure(workers, tests, source, setup, options, progress)
        after = machine.cpu_time()
        own = _cpu_used(workers) - own
        peak = {side: int(worker.ask("usage")["peak"]) for side, worker in workers.items()}
    # Two measurements, before and after: the better one is nearer to what the memory can do.
    bandwidth = max(bandwidth, _bandwidth(setup.n_threads, options.n_stream_bytes))
    others = machine.used_by_others(before, after, own)
    if others is not None and others >= _BUSY_CPUS:
        notes.append(f"busy: other processes used {others:.1f} CPUs meanwhile, so these numbers are not for the record")
    limits = [(r.median, bandwidth / r.token_bytes.total) for r in results if r.token_bytes is not None]
    if any(speed > limit for speed, limit in limits):
        notes.append("faster than the limit: the model lies in the CPU's caches, or the bandwidth was measured too low")
    if SPARSE in setup.sides and all(r.computed is None for r in results if r.side == SPARSE):
        notes.append("nothing was computed sparsely: every FFN was left to the way libllama computes it")
    trained = _trained(model, setup)
    return BenchReport(
        environment=machine.describe(
            setup.n_threads, first["ggml"], first["isa"] or "", load_average, started, _wait_policy()
        ),
        model=ModelFacts(
            model.path.name, _name(model), first["type"], first["size"], first["n_params"], model.activation
        ),
        mode=setup.mode,
        tokens_from=source.name,
        results=tuple(results),
        ratios=_ratios(tests, results) if len(setup.sides) == 2 else (),
        peak=peak,
        recall=trained[0],
        candidates=trained[1],
        bandwidth=bandwidth,
        others=others,
        notes=tuple(notes),
    )


@dataclass(frozen=True)
class _Setup:
    """Who runs, and how."""

    model: Model
    plugin: PluginConfig | None
    sides: tuple[str, ...]
    n_threads: int
    n_gpu_layers: int
    rpc: str | None
    notes: tuple[str, ...]

    @staticmethod
    def of(model: Model, options: BenchOptions) -> _Setup:
        notes: list[str] = []
        sparse = model.is_sparse and not options.dense
        if not options.dense and not model.is_sparse:
            notes.append("this model has nothing to leave out, so pinfer runs it by stock libllama: measured alone")
        plugin, solved_layers = _plugin(model, options) if sparse else (None, 0)
        sides = (SPARSE, DENSE) if sparse and options.compare == "dense" else (SPARSE,) if sparse else (DENSE,)
        n_threads = options.n_threads or physical_cores()
        if n_threads > len(os.sched_getaffinity(0)):
            notes.append(f"{n_threads} threads on {len(os.sched_getaffinity(0))} CPUs wait for each other")
        if len(sides) == 2 and not model.stock_computes_it:
            notes.append(
                f"stock libllama computes another activation than this model's {model.activation}: "
                "its work is the same and so is its speed, its text is not the model's"
            )
        if policy := _wait_policy():
            notes.append(f"idle threads wait as you set it ({policy}), on both sides")
        layers = options.n_gpu_layers if options.n_gpu_layers is not None else solved_layers
        return _Setup(model, plugin, sides, n_threads, layers, options.rpc, tuple(notes))

    @property
    def mode(self) -> str:
        if self.plugin is None:
            return DENSE
        return "predicted" if self.plugin.predictor else "exact"

    def load(self, side: str) -> dict[str, object]:
        """Arguments of a worker's command to load the model."""
        plugin: dict[str, object] | None = None
        if side == SPARSE and self.plugin is not None:
            files = {name: getattr(self.plugin, name) for name in ("predictor", "cold")}
            plugin = {name: str(path) for name, path in files.items() if path is not None}
            plugin["hot"] = [str(path) for path in self.plugin.hot_paths]
            plugin |= {name: getattr(self.plugin, name) for name in ("activation", "activation_threshold", "device")}
        path, threads, layers = str(self.model.path.resolve()), self.n_threads, self.n_gpu_layers
        return {"model": path, "plugin": plugin, "n_threads": threads, "n_gpu_layers": layers, "rpc": self.rpc}


def _plugin(model: Model, options: BenchOptions) -> tuple[PluginConfig, int]:
    """What `pinfer run` would use, and the dense layers that were placed on the device."""
    from pinfer.artefacts import paths
    from pinfer.artefacts.shards import find_hot_shards

    config = PluginConfig.of(model)
    if options.no_artefacts:
        return config, 0
    folder = paths.artefact_dir(model.path, model.fingerprint, for_writing=False)
    predictor, cold = folder / paths.PREDICTOR, folder / paths.COLD
    n_gpu_layers = 0
    if predictor.is_file() and not options.exact:
        config = replace(config, predictor=predictor)
    if cold.is_file():
        config = replace(config, cold=cold)
        if (hot := find_hot_shards(folder, model, options.device)) is not None:
            config = replace(config, hot=hot.paths, device=hot.device)
            n_gpu_layers = hot.n_gpu_layers
    return config, n_gpu_layers


def _wait_policy() -> str:
    environment = worker_environment()
    return ", ".join(f"{name}={environment[name]}" for name in WAIT_VARIABLES if name in environment)


def _name(model: Model) -> str:
    name = model.gguf.get("general.name")
    return name if isinstance(name, str) else model.name


def _tests(model: Model, options: BenchOptions) -> list[Case]:
    tests = [Case(n, 0, 1) for n in options.n_prompt if n > 0]
    tests += [Case(0, n, b) for n in options.n_gen if n > 0 for b in options.n_seq]
    if not tests or options.repetitions < 1 or any(b < 1 for b in options.n_seq):
        raise PinferError("there is nothing to measure", "use -p or -n above 0, and -b and -r of at least 1")
    longest = max(t.n_prompt + t.n_gen for t in tests)
    if options.n_ctx and options.n_ctx < longest:
        raise PinferError(
            f"a context of {options.n_ctx} tokens holds no {longest}", f"use -c {longest}, or a smaller -p and -n"
        )
    learned_positions = model.gguf.tensors.get("position_embd.weight")
    if learned_positions is not None and longest > learned_positions.n_rows:
        raise PinferError(f"{model.name} has no positions beyond {learned_positions.n_rows}", "use a smaller -p and -n")
    return tests


def _bandwidth(n_threads: int, n_bytes: int) -> float:
    """In a process of its own: the memory it takes is nobody's peak."""
    with WorkerProcess("bandwidth") as worker:
        return float(worker.ask("bandwidth", n_threads=n_threads, n_bytes=n_bytes))


def _cpu_used(workers: dict[str, WorkerProcess]) -> float:
    return time.process_time() + sum(float(worker.ask("usage")["cpu"]) for worker in workers.values())


@dataclass(frozen=True)
class _TokenSource:
    """Real tokens where there are any: which neurons fire, and how alike they are from token to token, is theirs."""

    name: str
    tokens: tuple[int, ...]
    bos: int | None

    @staticmethod
    def of(worker: WorkerProcess, facts: dict[str, Any], path: Path | None, n_wanted: int) -> _TokenSource:
        if not facts["has_vocabulary"]:
            import random

            draw = random.Random(1)
            return _TokenSource("random", tuple(draw.randrange(facts["n_vocab"]) for _ in range(n_wanted)), None)
        if path is not None:
            with path.open("rb") as file:
                text, name = file.read(_TEXT_BYTES * n_wanted).decode("utf-8", errors="ignore"), path.name
        else:
            from pinfer.benchmark.text import TEXT

            text, name = TEXT, "built-in text"
        tokens = [t for t in worker.ask("tokenize", text=text) if t != facts["bos"]]
        if not tokens:
            raise PinferError(f"{path} holds no text", "name another --text")
        return _TokenSource(name, tuple(tokens), facts["bos"])

    def streams(self, test: Case) -> list[list[int]]:
        """The test's sequences, from places far apart; a text that is too short begins anew."""
        n = test.n_prompt or test.n_gen
        step = max(1, len(self.tokens) // test.n_seq)
        head = [self.bos] if self.bos is not None else []
        return [
            [*head, *(self.tokens[(s * step + i) % len(self.tokens)] for i in range(n))][:n] for s in range(test.n_seq)
        ]


def _measure(
    workers: dict[str, WorkerProcess],
    tests: Sequence[Case],
    source: _TokenSource,
    setup: _Setup,
    options: BenchOptions,
    progress: Progress,
) -> list[Result]:
    """Test by test: a context on each side, a whole run to warm up, then the sides in turn."""
    results: list[Result] = []
    n_done = 0
    total = (options.repetitions + 1) * len(workers) * len(tests)
    with progress.task("bench", total, "runs") as advance:
        for test in tests:
            streams = source.streams(test)
            kind = "pp" if test.n_prompt else "tg"
            n_ctx = max(options.n_ctx, test.n_prompt + test.n_gen)
            for worker in workers.values():
                worker.ask("open", n_ctx=n_ctx, n_seq=test.n_seq)
                worker.ask("time", kind=kind, streams=streams)
                advance(1)
            runs: dict[str, list[tuple[int, dict[str, Any]]]] = {side: [] for side in workers}
            for _ in range(options.repetitions):
                for side, worker in workers.items():
                    time.sleep(_SETTLE_SECONDS)
                    runs[side].append((n_done, worker.ask("time", kind=kind, streams=streams)))
                    n_done += 1
                    advance(1)
            results += [_result(test, side, runs[side], setup) for side in workers]
    return results


def _result(test: Case, side: str, runs: Sequence[tuple[int, dict[str, Any]]], setup: _Setup) -> Result:
    last = runs[-1][1]
    stats = Stats(**last["stats"]) if last["stats"] is not None else None
    # A prompt is computed densely but for the last layer's one token with logits: no share worth a word.
    mostly_sparse = stats is not None and stats.n_tokens > stats.n_tokens_dense
    on_cpu = stats.n_neurons - stats.n_hot if stats is not None and mostly_sparse else 0
    return Result(
        test=test,
        side=side,
        tokens_per_s=tuple(test.n_tokens / run["seconds"] for _, run in runs),
        order=tuple(order for order, _ in runs),
        tokens_sha256=last["tokens_sha256"],
        computed=stats.n_candidates / on_cpu if stats is not None and on_cpu else None,
        active=stats.n_active / on_cpu if stats is not None and on_cpu else None,
        token_bytes=_token_bytes(test, stats, setup),
        hidden=stats.hidden if stats is not None else None,
    )


def _token_bytes(test: Case, stats: Stats | None, setup: _Setup) -> TokenBytes | None:
    model, plugin = setup.model, setup.plugin
    if test.n_prompt or test.n_seq > 1 or setup.n_gpu_layers or not bench_limit.can_count(model):
        return None
    if stats is None:
        return bench_limit.dense_bytes(model, test.n_gen)
    if plugin is None or plugin.hot is not None:
        return None
    return bench_limit.sparse_bytes(model, test.n_gen, stats, plugin.cold, plugin.predictor)


def _ratios(tests: Sequence[Case], results: Sequence[Result]) -> tuple[Ratio, ...]:
    speeds = {(r.test, r.side): r.tokens_per_s for r in results}
    return tuple(
        Ratio(t, tuple(a / b for a, b in zip(speeds[t, SPARSE], speeds[t, DENSE], strict=True))) for t in tests
    )


def _trained(model: Model, setup: _Setup) -> tuple[float | None, float | None]:
    """Recall and candidates of the predictor in use, as its training measured them."""
    from pinfer.artefacts.predictor import PredictorFile

    if setup.plugin is None or setup.plugin.predictor is None:
        return None, None
    predictor = PredictorFile.read(setup.plugin.predictor, model)
    return fmean(predictor.recall), fmean(predictor.candidates)
