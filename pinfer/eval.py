"""Measures the quality loss of sparse computation: perplexity, KL divergence from dense, top-1 agreement."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pinfer.errors import PinferError
from pinfer.execution import ExecutionOptions, decide
from pinfer.hub.corpus import open_corpus
from pinfer.llama.engine import ALWAYS_DENSE, NEVER_DENSE, Engine, PluginConfig
from pinfer.llama.plugin import load_plugin
from pinfer.model import Model, open_model
from pinfer.profile import MAX_CONTEXT, windows_of
from pinfer.progress import NULL_PROGRESS, Progress

# Memory for log-probabilities of the dense side. When it is full, the sparse side catches up.
_KEPT_BYTES = 1 << 30
_BLOCK_ROWS = 32


@dataclass(frozen=True, kw_only=True)
class EvalOptions(ExecutionOptions):
    """Settings of ``pinfer eval``; every default is the command line's."""

    text: Path
    n_tokens: int = 4096
    n_ctx: int = 0
    """0: the model's, at most MAX_CONTEXT"""


@dataclass(frozen=True)
class EvalReport:
    """Sparse compared with dense on the same tokens, each predicted from the preceding ones in its window."""

    mode: str
    """``predicted`` or ``exact``"""
    reference: str
    """the dense side: ``libllama``, or ``pinfer`` if stock libllama computes another activation"""
    tokens: int
    """predicted"""
    tokens_wanted: int
    perplexity_dense: float
    perplexity_sparse: float
    kl_mean: float
    """KL(dense‖sparse) in nats"""
    kl_p99: float
    top1_agreement: float
    computed: float
    """share of neurons whose first product was computed, including the hot ones on a device"""
    active: float
    """share of the CPU's neurons that fired; devices do not report theirs"""

    def to_json(self) -> dict[str, object]:
        """The report as plain JSON values."""
        return asdict(self)


def evaluate(model_path: Path, options: EvalOptions, progress: Progress = NULL_PROGRESS) -> EvalReport:
    """Compare the model as ``pinfer run`` computes it, token by token, with dense.

    Uses the predictor (unless ``exact``) and the shards if they exist. Raises PinferError for a model without exact
    zeros, a text without tokens, or artefacts that do not match.
    """
    model = open_model(model_path, options.activation)
    model.require_sparse()
    if options.n_tokens < 1 or options.n_ctx < 0 or options.n_ctx == 1:
        raise PinferError("nothing to predict", "use --tokens 1 or more and a context of 2 or more")
    execution = decide(model, replace(options, dense=False))  # the reference is dense anyway
    assert execution.plugin is not None, "the model is sparse"
    for note in execution.notes:
        progress.note(note)
    sparse = replace(execution.plugin, n_batch_dense=NEVER_DENSE)
    dense, reference = _dense_config(model)
    n_ctx = options.n_ctx or min(model.n_ctx_train or MAX_CONTEXT, MAX_CONTEXT)

    def open_engine(config: PluginConfig | None, n_gpu_layers: int = 0) -> Engine:
        return Engine(
            model.path,
            plugin=config,
            n_ctx=n_ctx,
            n_threads=execution.n_threads,
            n_gpu_layers=n_gpu_layers,
            cache_types=execution.cache_types,
        )

    with open_engine(dense) as engine:
        windows = _windows(engine, options.text, options.n_tokens, n_ctx)
        row_bytes = 4 * engine.n_vocab
    n_targets = sum(len(window) - 1 for window in windows)
    if n_targets < options.n_tokens:
        progress.note(f"{options.text.name} has only {n_targets:,} of the {options.n_tokens:,} tokens asked for")
    totals = _Totals()
    with progress.task("eval", 2 * n_targets, "tokens") as advance:
        for chunk in _chunks(windows, row_bytes):
            with open_engine(dense) as engine:
                expected = [_log_probabilities(_whole(engine, window, advance)) for window in chunk]
            with open_engine(sparse, execution.n_gpu_layers) as engine:
                for window, wanted in zip(chunk, expected, strict=True):
                    totals.add(wanted, _log_probabilities(_stepwise(engine, window, advance)), window[1:])
                totals.add_stats(model.path)
    return totals.report(execution.mode, reference, options.n_tokens)


class DenseReference:
    """What dense computation says about a text, to measure how far other ways to compute the model are from it."""

    def __init__(self, model: Model, text: Path, n_tokens: int) -> None:
        self._path = model.path
        self._n_ctx = min(model.n_ctx_train or MAX_CONTEXT, MAX_CONTEXT)
        with Engine(model.path, plugin=_dense_config(model)[0], n_ctx=self._n_ctx) as engine:
            self._windows = _windows(engine, text, n_tokens, self._n_ctx)
            self._expected = [self._of(engine, window) for window in self._windows]

    @staticmethod
    def _of(engine: Engine, window: list[int]) -> NDArray[np.float32]:
        return _log_probabilities(_whole(engine, window, lambda _: None))

    def divergence(self, config: PluginConfig) -> float:
        """Mean KL(dense‖other) in nats, computed in batches: use it for what gives a token the same in any batch."""
        with Engine(self._path, plugin=config, n_ctx=self._n_ctx) as engine:
            found = (self._of(engine, window) for window in self._windows)
            each = [_divergence(wanted, other) for wanted, other in zip(self._expected, found, strict=True)]
        return float(np.concatenate(each).mean())


def _dense_config(model: Model) -> tuple[PluginConfig | None, str]:
    if model.stock_computes_it:
        return None, "libllama"
    return replace(PluginConfig.of(model), n_batch_dense=ALWAYS_DENSE), "pinfer"


def _windows(engine: Engine, text: Path, n_tokens: int, n_ctx: int) -> list[list[int]]:
    """Windows with ``n_tokens`` tokens to predict, or fewer if the text is short."""
    corpus = open_corpus(str(text))
    windows: list[list[int]] = []
    left = n_tokens
    for window in windows_of(engine, corpus.documents(), n_ctx):
        if len(window) > 1:
            windows.append(window[: left + 1])
            left -= len(windows[-1]) - 1
        if left == 0:
            break
    if not windows:
        raise PinferError(f"{text} has no text to predict", "use a longer text")
    return windows


def _chunks(windows: Sequence[list[int]], row_bytes: int) -> Iterator[list[list[int]]]:
    """Groups of windows whose log-probabilities fit into _KEPT_BYTES, with at least one window each."""
    chunk: list[list[int]] = []
    n_bytes = 0
    for window in windows:
        if chunk and n_bytes + len(window) * row_bytes > _KEPT_BYTES:
            yield chunk
            chunk, n_bytes = [], 0
        chunk.append(window)
        n_bytes += len(window) * row_bytes
    yield chunk


def _whole(engine: Engine, window: list[int], advance: Callable[[int], None]) -> NDArray[np.float32]:
    """Logits ``[len(window) - 1, n_vocab]``, computed in batches."""
    engine.clear()
    logits = engine.decode(window[:-1], logits=True)
    advance(len(window) - 1)
    return logits


def _stepwise(engine: Engine, window: list[int], advance: Callable[[int], None]) -> NDArray[np.float32]:
    """The same token by token, as in generation: tokens in one batch would share their candidates."""
    engine.clear()
    logits = np.empty((len(window) - 1, engine.n_vocab), dtype=np.float32)
    for i, token in enumerate(window[:-1]):
        logits[i] = engine.decode([token])[0]
        advance(1)
    return logits


def _log_probabilities(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """log softmax of each row, in place."""
    for rows in _blocks(logits):
        rows -= rows.max(axis=1, keepdims=True)
        rows -= np.log(np.exp(rows).sum(axis=1, keepdims=True))
    return logits


def _blocks(rows: NDArray[np.float32]) -> Iterator[NDArray[np.float32]]:
    """Views of a few rows at a time, so that temporary copies stay small for any vocabulary."""
    for begin in range(0, len(rows), _BLOCK_ROWS):
        yield rows[begin : begin + _BLOCK_ROWS]


def _divergence(dense: NDArray[np.float32], sparse: NDArray[np.float32]) -> NDArray[np.float64]:
    """KL(dense‖sparse) of each row of log-probabilities, in nats."""
    kl: list[NDArray[np.float64]] = []
    for p, q in zip(_blocks(dense), _blocks(sparse), strict=True):
        kl.append(np.einsum("ij,ij->i", np.exp(p, dtype=np.float64), (p - q).astype(np.float64)))
    return np.concatenate(kl).clip(min=0)  # only rounding makes it negative


@dataclass
class _Totals:
    """Sums over the windows."""

    loss_dense: float = 0.0
    loss_sparse: float = 0.0
    n_agree: int = 0
    divergence: list[NDArray[np.float64]] = field(default_factory=list)
    n_neurons: int = 0
    n_candidates: int = 0
    n_active: int = 0
    n_hot: int = 0

    def add(self, dense: NDArray[np.float32], sparse: NDArray[np.float32], targets: Sequence[int]) -> None:
        """Add a window: log-probabilities ``[n, n_vocab]`` of both sides and the ``n`` tokens to predict."""
        rows = np.arange(len(targets))
        self.loss_dense -= float(dense[rows, targets].sum(dtype=np.float64))
        self.loss_sparse -= float(sparse[rows, targets].sum(dtype=np.float64))
        self.n_agree += int((dense.argmax(axis=1) == sparse.argmax(axis=1)).sum())
        self.divergence.append(_divergence(dense, sparse))

    def add_stats(self, path: Path) -> None:
        """Add the plugin's counters since this engine was configured."""
        stats = load_plugin().stats(path)
        self.n_neurons += stats.n_neurons
        self.n_candidates += stats.n_candidates
        self.n_active += stats.n_active
        self.n_hot += stats.n_hot

    def report(self, mode: str, reference: str, tokens_wanted: int) -> EvalReport:
        """The means."""
        kl = np.concatenate(self.divergence)
        if not self.n_neurons:
            raise PinferError("the plugin computed no FFN sparsely: it does not recognise the model's graph")
        return EvalReport(
            mode=mode,
            reference=reference,
            tokens=len(kl),
            tokens_wanted=tokens_wanted,
            perplexity_dense=math.exp(self.loss_dense / len(kl)),
            perplexity_sparse=math.exp(self.loss_sparse / len(kl)),
            kl_mean=float(kl.mean()),
            kl_p99=float(np.quantile(kl, 0.99)),
            top1_agreement=self.n_agree / len(kl),
            computed=(self.n_candidates + self.n_hot) / self.n_neurons,
            active=self.n_active / max(1, self.n_neurons - self.n_hot),
        )
