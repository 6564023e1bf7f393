"""`pinfer profile`: counts which neurons fire on a text and keeps FFN inputs to train the predictor on.

Of experts without exact zeros it counts how often tokens are routed to them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pinfer.artefacts import paths
from pinfer.artefacts.profile import ProfileFile, samples_writer
from pinfer.errors import PinferError
from pinfer.gguf_io.writer import replace_together
from pinfer.hub.corpus import Corpus, open_corpus
from pinfer.interrupt import HeldInterrupt, hold_interrupt
from pinfer.llama import activation_check
from pinfer.llama.devices import free_memory
from pinfer.llama.engine import Engine, PluginConfig
from pinfer.llama.plugin import PluginLibrary, load_plugin
from pinfer.llama.routing import RoutingCounter
from pinfer.model import FfnKind, Model, open_model
from pinfer.progress import NULL_PROGRESS, Progress

MAX_CONTEXT = 2048
BATCH = 512
MAX_SAMPLES = 8192
SAMPLE_BYTES = 1 << 30

# The share of a layer's activations by which its skewness is told (paper, section 2).
MOST = 0.8


@dataclass(frozen=True)
class ProfileOptions:
    """Settings of ``pinfer profile``; every default is the command line's."""

    dataset: str = "wikitext"
    n_tokens: int = 131072
    n_ctx: int = 0  # 0: the model's own, at most MAX_CONTEXT
    n_threads: int | None = None
    n_samples: int | None = None  # None: MAX_SAMPLES, fewer where they would take more than SAMPLE_BYTES
    activation: str | None = None
    n_gpu_layers: int = 0
    force: bool = False  # even where the model does not look like what it claims


@dataclass(frozen=True)
class LayerProfile:
    """What the counts of an FFN say."""

    layer: int
    kind: FfnKind
    active: float
    """share of its neurons that fire for a token, on average; of a stack, of the experts the token was routed to"""
    most: float
    """share of its neurons that make 80 % of its activations"""
    never: float
    """share of its neurons that never fired; of experts that are counted as a whole, all three are about experts"""
    routed: RoutingReport | None
    """of a stack of experts"""


@dataclass(frozen=True)
class RoutingReport:
    """How evenly tokens are routed to the experts of a layer."""

    n_experts: int
    most: float
    """share of the experts that get 80 % of the routed tokens"""
    busiest: float
    """how often a token is routed to the busiest expert, as a multiple of the mean"""
    never: int
    """experts that no token was routed to"""


@dataclass(frozen=True)
class ProfileReport:
    """What was counted, and where it was written."""

    path: Path
    samples_path: Path | None
    corpus: str
    tokens: int
    tokens_wanted: int
    n_samples: int
    seconds: float
    interrupted: bool
    active: float
    most: float
    never: float
    layers: tuple[LayerProfile, ...]
    whole_experts: bool
    """nothing is zero in the experts: how often they are used was counted, and no neurons"""

    def to_json(self) -> dict[str, object]:
        """The report as plain JSON values."""
        report = asdict(self)
        report["path"] = str(self.path)
        report["samples_path"] = str(self.samples_path) if self.samples_path else None
        report["tokens_per_second"] = self.tokens / self.seconds if self.seconds > 0 else 0.0
        return report


def share_of_most(count: NDArray[np.int64], share: float = MOST) -> float:
    """Smallest share of neurons whose counts make ``share`` of the sum of ``count`` ``[n]``; 0 when nothing fired."""
    total = int(count.sum())
    if total == 0:
        return 0.0
    sums = np.cumsum(np.sort(count)[::-1])
    return float(np.searchsorted(sums, share * total) + 1) / count.size


def profile(model_path: Path, options: ProfileOptions, progress: Progress = NULL_PROGRESS) -> ProfileReport:
    """Run ``options.n_tokens`` tokens of text through the model and count what fires; write profile and samples.

    After Ctrl-C the counts so far are written, and the report says ``interrupted``. Raises PinferError for a model that
    has no exact zeros or another activation than it claims, for an unavailable data set and for a read-only folder.
    """
    _check(options)
    model = open_model(model_path, options.activation)
    model.require_placeable()
    with paths.writing_to(model, progress) as folder:
        if model.places_experts:
            return _profile_routing(model, folder, options, progress)
        return _profile(model, folder, options, progress)


def _profile(model: Model, folder: Path, options: ProfileOptions, progress: Progress) -> ProfileReport:
    corpus = open_corpus(options.dataset, progress)
    n_ctx = options.n_ctx or min(model.n_ctx_train or MAX_CONTEXT, MAX_CONTEXT)
    sure = options.force or model.stock_computes_it or options.n_tokens <= activation_check.LEAST_TOKENS
    check = None if sure else _ActivationCheck(model, progress)
    windows: list[list[int]] = []
    if check:
        # On the CPU, so that stock llama.cpp does not fill the GPU with the FFN.
        with Engine(model.path, n_ctx=n_ctx, n_batch=BATCH, n_threads=options.n_threads, repack=False) as engine:
            windows = _collect(engine, corpus, options.n_tokens, n_ctx, progress)
            check.read_by_stock(engine, windows)
    with Engine(
        model.path,
        plugin=PluginConfig.of(model),
        n_ctx=n_ctx,
        n_batch=BATCH,
        n_threads=options.n_threads,
        n_gpu_layers=options.n_gpu_layers,
    ) as engine:
        if check:
            check.settle(engine)
        else:
            windows = _collect(engine, corpus, options.n_tokens, n_ctx, progress)
        n_tokens = sum(map(len, windows))
        plugin = load_plugin()
        n_samples = _n_samples(options, model, n_tokens)
        with hold_interrupt() as held:
            plugin.observer_start(model.path, n_samples=n_samples, stride=_stride(n_tokens, n_samples, n_ctx))
            seconds = _count(engine, windows, n_tokens, held, progress)
            plugin.observer_stop(model.path)
            report = _write(plugin, model, folder, corpus, options, seconds, held.seen, progress)
        return replace(report, interrupted=held.seen)


def _profile_routing(model: Model, folder: Path, options: ProfileOptions, progress: Progress) -> ProfileReport:
    """Of a model whose experts are placed as a whole; stock libllama computes it."""
    corpus = open_corpus(options.dataset, progress)
    counter = RoutingCounter({f.layer: f.n_experts for f in model.ffns})
    n_ctx = options.n_ctx or min(model.n_ctx_train or MAX_CONTEXT, MAX_CONTEXT)
    with Engine(
        model.path,
        n_ctx=n_ctx,
        n_batch=BATCH,
        n_threads=options.n_threads,
        n_gpu_layers=options.n_gpu_layers,
        on_node=counter.callback,
    ) as engine:
        windows = _collect(engine, corpus, options.n_tokens, n_ctx, progress)
        with hold_interrupt() as held:
            seconds = _count(engine, windows, sum(map(len, windows)), held, progress)
            interrupted = held.seen
    tokens = min(counter.tokens.values())
    if tokens == 0 and interrupted:
        raise KeyboardInterrupt
    if tokens == 0:
        raise PinferError(f"libllama's graph of {model.name} does not show where tokens are routed to", "run it dense")
    if interrupted:
        progress.note(f"interrupted: keeping the {tokens:,} tokens that were counted")
    routed = tuple(counter.routed[f.layer] for f in model.ffns)
    result = ProfileFile.of_routing(tokens, corpus.name, corpus.sha256, routed)
    result.write(folder / paths.PROFILE, model, _settings(options, interrupted))
    (folder / paths.SAMPLES).unlink(missing_ok=True)
    report = _report(model, result, folder, options, 0, seconds, interrupted)
    _say_unseen(report, progress)
    return report


def _settings(options: ProfileOptions, interrupted: bool) -> dict[str, object]:
    return {**asdict(options), "command": "profile", "interrupted": interrupted}


def _say_unseen(report: ProfileReport, progress: Progress) -> None:
    unseen = sum(layer.routed.never for layer in report.layers if layer.routed)
    if unseen:
        progress.note(f"{unseen:,} experts were never routed to; they are placed last. More text tells more: --tokens")


def _check(options: ProfileOptions) -> None:
    if options.n_tokens <= 0:
        raise PinferError(f"cannot profile {options.n_tokens} tokens", "use --tokens 1 or more")
    if options.n_ctx != 0 and not 2 <= options.n_ctx < 1 << 31:
        raise PinferError(
            f"a context of {options.n_ctx} tokens is not possible", "use at least 2, or 0 for the model's own"
        )
    if options.n_samples is not None and options.n_samples < 0:
        raise PinferError("the number of samples cannot be negative")


def sample_bytes(model: Model) -> int:
    """Bytes of one sample: the input of every FFN in F16, and one bit a neuron, or the experts it was routed to."""
    return sum(2 * f.n_embd + (4 * model.n_expert_used if f.is_stack else -(-f.n_ff // 8)) for f in model.ffns)


def sample_count(model: Model) -> int:
    """Samples that are kept unless the user names another number."""
    return min(MAX_SAMPLES, SAMPLE_BYTES // sample_bytes(model))


def _n_samples(options: ProfileOptions, model: Model, n_tokens: int) -> int:
    """Samples to keep of ``n_tokens`` tokens. Raises PinferError for more than memory has room for."""
    if options.n_samples is None:
        return min(n_tokens, sample_count(model))
    n_samples, room = min(n_tokens, options.n_samples), free_memory() // sample_bytes(model)
    if n_samples > room:
        raise PinferError(f"memory has room for {room:,} samples, not {n_samples:,}", f"use --samples {room} or fewer")
    return n_samples


def _stride(n_tokens: int, n_samples: int, n_ctx: int) -> int:
    """One token in this many is kept; coprime to the context, so that no position in it is favoured."""
    stride = max(1, n_tokens // max(1, n_samples))
    while math.gcd(stride, n_ctx) != 1:
        stride -= 1
    return stride


def windows_of(engine: Engine, documents: Iterator[str], n_ctx: int) -> Iterator[list[int]]:
    """Documents cut into sequences of at most ``n_ctx`` tokens, with the BOS token if the vocabulary wants one."""
    head = [engine.bos] if engine.bos is not None else []
    for document in documents:
        tokens = engine.tokenize(document, bos=False)
        step = n_ctx - len(head)
        for begin in range(0, len(tokens), step):
            yield head + tokens[begin : begin + step]


def _collect(engine: Engine, corpus: Corpus, n_tokens: int, n_ctx: int, progress: Progress) -> list[list[int]]:
    """Sequences with ``n_tokens`` tokens in all, fewer if the text is shorter. Raises PinferError if it is empty."""
    windows: list[list[int]] = []
    left = n_tokens
    for window in windows_of(engine, corpus.documents(), n_ctx):
        windows.append(window[:left])
        left -= len(windows[-1])
        if left == 0:
            break
    found = n_tokens - left
    if found == 0:
        raise PinferError(f"{corpus.name} holds no text", "use another text: --dataset c4|wikitext|FILE")
    if found < n_tokens:
        progress.note(f"{corpus.name} has {found:,} tokens, fewer than the {n_tokens:,} asked for")
    return windows


class _ActivationCheck:
    """Checks that a model computes what it claims: some tokens in stock llama.cpp, then the same in the plugin."""

    def __init__(self, model: Model, progress: Progress) -> None:
        self._model = model
        self._progress = progress
        self._windows: list[list[int]] = []
        self._stock: NDArray[np.float64] | None = None

    def read_by_stock(self, engine: Engine, windows: Sequence[list[int]]) -> None:
        """Reads the beginning of ``windows``."""
        self._windows = activation_check.first_tokens(windows)
        self._stock = self._read(engine, "check, dense")

    def settle(self, engine: Engine) -> None:
        """Reads it again, by the plugin. Raises PinferError where that is clearly the worse reading."""
        assert self._stock is not None
        claimed = self._read(engine, f"check, {self._model.activation}")
        said = activation_check.judge(self._model, activation_check.Readings(claimed, self._stock, engine.n_vocab))
        if said:
            self._progress.note(said)

    def _read(self, engine: Engine, label: str) -> NDArray[np.float64]:
        with self._progress.task(label, sum(len(w) - 1 for w in self._windows), "tokens") as advance:
            return activation_check.losses(engine, self._windows, advance)


def _count(
    engine: Engine, windows: Sequence[Sequence[int]], n_tokens: int, held: HeldInterrupt, progress: Progress
) -> float:
    """Runs the windows through the observed model until the end or Ctrl-C; returns the seconds taken."""
    begin = time.monotonic()
    with progress.task("profile", n_tokens, "tokens") as advance:
        for window in windows:
            engine.clear()
            for at in range(0, len(window), engine.n_batch):
                if held.seen:
                    return time.monotonic() - begin
                piece = window[at : at + engine.n_batch]
                engine.feed(piece)
                advance(len(piece))
    return time.monotonic() - begin


def _write(
    plugin: PluginLibrary,
    model: Model,
    folder: Path,
    corpus: Corpus,
    options: ProfileOptions,
    seconds: float,
    interrupted: bool,
    progress: Progress,
) -> ProfileReport:
    observed = [plugin.observer_ffn(model.path, f.name) for f in model.ffns]
    seen = [ffn for ffn in observed if ffn is not None]
    tokens = min((ffn.n_tokens for ffn in seen), default=0)
    if tokens == 0 and interrupted:
        raise KeyboardInterrupt
    if tokens == 0 or len(seen) < len(model.ffns):
        raise PinferError(
            f"the plugin saw {len(seen)} of the {len(model.ffns)} FFNs of {model.name}: "
            "its graph is not one that pinfer knows",
            "run it with --dense",
        )
    if interrupted:
        progress.note(f"interrupted: keeping the {tokens:,} tokens that were counted")
    settings = _settings(options, interrupted)
    result = ProfileFile(
        tokens=tokens,
        corpus=corpus.name,
        corpus_sha256=corpus.sha256,
        count=tuple(ffn.count.astype("i8") for ffn in seen),
        mass=tuple(ffn.mass for ffn in seen),
        routed=tuple(None if ffn.routed is None else ffn.routed.astype("i8") for ffn in seen),
    )
    n_samples = min(len(ffn.x) for ffn in seen)
    writers = [result.writer(folder / paths.PROFILE, model, settings)]
    try:
        if n_samples:
            samples = [
                (ffn.x[:n_samples], (ffn.active if ffn.experts is None else ffn.experts)[:n_samples]) for ffn in seen
            ]
            writers.append(samples_writer(folder / paths.SAMPLES, model, settings, samples))
        replace_together(writers)
    finally:
        for writer in writers:
            writer.discard()
    report = _report(model, result, folder, options, n_samples, seconds, interrupted)
    _say_unseen(report, progress)
    return report


def _report(
    model: Model,
    result: ProfileFile,
    folder: Path,
    options: ProfileOptions,
    n_samples: int,
    seconds: float,
    interrupted: bool,
) -> ProfileReport:
    everything = np.concatenate(result.count)
    return ProfileReport(
        path=folder / paths.PROFILE,
        samples_path=folder / paths.SAMPLES if n_samples else None,
        corpus=result.corpus,
        tokens=result.tokens,
        tokens_wanted=options.n_tokens,
        n_samples=n_samples,
        seconds=seconds,
        interrupted=interrupted,
        active=result.mean_active(),
        most=share_of_most(everything),
        never=float((everything == 0).mean()),
        layers=tuple(
            LayerProfile(f.layer, f.kind, result.active(i), share_of_most(c), float((c == 0).mean()), _routing(r))
            for i, (f, c, r) in enumerate(zip(model.ffns, result.count, result.routed, strict=True))
        ),
        whole_experts=model.places_experts,
    )


def _routing(routed: NDArray[np.int64] | None) -> RoutingReport | None:
    if routed is None:
        return None
    busiest = float(routed.max()) / max(float(routed.mean()), 1e-12)
    return RoutingReport(len(routed), share_of_most(routed), busiest, int((routed == 0).sum()))
