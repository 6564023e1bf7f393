"""Converts the predictors of a PowerInfer file into the predictor.gguf of the model converted from it.

PowerInfer scores the neurons of a layer by fc2·relu(fc1·x), where x is the input of the layer's norm. The plugin only
sees the norm's output y. Since relu(c v) = c relu(v) for every c > 0, a positive factor per token does not change the
sign of a score. So it is enough to express fc1·x in terms of y up to such a factor:

- RMS norm, y = w x / rms(x): fc1·x is rms(x) times fc1·diag(1/w)·y. This is exact.
- Layer norm, y = w (x - mean) / deviation + b: fc1·x is the deviation times
  (fc1·diag(1/w)·(y - b) + (mean / deviation) fc1·1). Everything in it except y and mean / deviation is constant. That
  ratio cannot be recovered from y, so one value per layer is fitted.

Both matrices are then rounded to the types, and cut to the rank, that cost least per token; thresholds are found on
samples of the converted model, as in `pinfer train`. If a layer's predictor costs more than it saves at the requested
recall, the layer gets the predictor that `pinfer train` would make.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pinfer.artefacts import paths
from pinfer.artefacts.predictor import LayerPredictor, PredictorWriter, quantised
from pinfer.artefacts.profile import SamplesFile
from pinfer.conversion.powerinfer_file import PowerInferFile, open_powerinfer
from pinfer.errors import PinferError
from pinfer.interrupt import interruptible
from pinfer.model import Model, dequantize
from pinfer.predictors.data import HeldBack, LayerData, parts
from pinfer.predictors.fitting import (
    BLOCK,
    LayerReport,
    TrainOptions,
    TrainReport,
    cheapest,
    factor_bytes,
    fit_layer,
    scores,
    summary,
    tested,
)
from pinfer.predictors.thresholds import one_threshold
from pinfer.progress import NULL_PROGRESS, Progress

if TYPE_CHECKING:
    from pinfer.predictors.data import Matrix
    from pinfer.predictors.fitting import Source

# Number of samples for finding thresholds, and of samples and neurons for comparing candidates in _MEANS.
_CALIBRATION_SAMPLES = 2048
_SEARCH_SAMPLES = 256
_SEARCH_NEURONS = 2048

# With fewer tokens a measured recall is unreliable: a single token changes it by 0.2 % or more.
_ENOUGH_TOKENS = 500

# Candidates for mean / deviation of a layer norm's input.
_MEANS = (0.0, 0.02, -0.02, 0.05, -0.05, 0.1, -0.1, 0.2, -0.2, 0.4, -0.4)

# Types of A and B to choose from.
_TYPES = (("f16", "f16"), ("q8_0", "q8_0"), ("q8_0", "q4_0"), ("q4_0", "q4_0"))


@dataclass(frozen=True)
class ImportOptions:
    """Requested recall, and the text for finding thresholds."""

    dataset: str | None = None
    """None: that of the samples from `pinfer profile`, else wikitext"""
    n_tokens: int = 8192
    recall: float = 0.995
    n_threads: int | None = None
    keep: bool = False  # keep the file's predictor whole, even if it costs more than it saves


@dataclass(frozen=True)
class ImportedLayer(LayerReport):
    """Quality of one layer's predictor, and whether it was imported. Recalls are shares."""

    imported: bool
    """False if `pinfer train` made the predictor, because the file has none or its own costs more than it saves"""
    recall_active: float
    """recall of the active neurons; ``recall`` is that of the activation mass"""
    sign_recall: float | None
    """``recall`` at threshold 0, PowerInfer's own rule; None if the file has no predictor for this layer"""
    sign_recall_active: float | None
    sign_candidates: float | None


@dataclass(frozen=True)
class ImportReport(TrainReport):
    """What was imported, how well it predicts, and where it was written. Shares are means over the layers."""

    layers: tuple[ImportedLayer, ...]
    source: Path
    corpus: str
    """the text that recall was measured on"""
    n_test: int
    """number of tokens on which recall and candidates were measured; disjoint from those of the thresholds"""
    n_imported: int
    """number of layers that kept the file's predictor"""
    sparse_threshold: float
    """PowerInfer computes a neuron if its score exceeds this"""
    recall_active: float
    sign_recall: float | None
    sign_recall_active: float | None
    sign_candidates: float | None

    def to_json(self) -> dict[str, object]:
        """The report as plain JSON values."""
        return {**super().to_json(), "source": str(self.source)}

    def notes(self) -> list[str]:
        """Two lines: how many layers were imported, and on how much text recall was measured."""
        n, n_none = len(self.layers), sum(layer.sign_recall is None for layer in self.layers)
        imported = f"predictors of {self.n_imported} of {n} layers were imported"
        if n_new := n - self.n_imported:
            causes = [f"{n_none} had none in the file"] if n_none else []
            causes += [f"{n_new - n_none} would cost more than they save"] if n_new > n_none else []
            imported += f", {n_new} were replaced with new ones ({', '.join(causes)})"
        measured = f"recall was measured on {self.n_test} tokens of {self.corpus}"
        if self.n_test < _ENOUGH_TOKENS:
            measured += ", too few to rely on; use a longer text: --predictor-only --dataset c4|wikitext|FILE"
        return [imported, measured]


def has_predictor(source: Path) -> bool:
    """Whether the PowerInfer file ``source`` holds a predictor for any layer."""
    file = open_powerinfer(source)
    return any(file.predictor_rank(layer) for layer in range(file.n_layer))


def check_import(file: PowerInferFile, model: Model, options: ImportOptions) -> None:
    """Raises PinferError if the recall is invalid, the file has no predictor, or the model was not made from it."""
    if not 0 < options.recall <= 1:
        raise PinferError(f"{options.recall} is not a valid recall", "use --recall 0.995, at most 1")
    _check(file, model)


def import_layers(
    file: PowerInferFile,
    model: Model,
    samples: SamplesFile,
    corpus: str,
    options: ImportOptions,
    progress: Progress = NULL_PROGRESS,
) -> ImportReport:
    """Writes predictor.gguf of a model converted from ``file``, and reports how well it predicts ``samples``."""
    train = TrainOptions(recall=options.recall, type="f16" if model.n_embd % BLOCK else "q4_0")
    layers: list[ImportedLayer] = []
    with (
        paths.writing_to(model, progress) as folder,
        PredictorWriter(folder / paths.PREDICTOR, model, train.type) as writer,
        progress.task("predictor", model.n_layer, "layers") as advance,
    ):
        for layer in range(model.n_layer):
            work = partial(_import_layer, file, model, layer, samples, train, options.keep)
            predictor, report = interruptible(work)
            writer.add(predictor)
            layers.append(report)
            advance(1)
        made_with = {"dataset": options.dataset or corpus, "source": file.path.name, "n_samples": samples.n_samples}
        settings = {**asdict(options), "command": "convert", **made_with}
        n_bytes = writer.finish(settings)
    return _report(folder / paths.PREDICTOR, file, corpus, samples.n_samples, n_bytes, layers)


def _check(file: PowerInferFile, model: Model) -> None:
    model.require_sparse()
    same_shape = (file.n_layer, file.n_embd, file.n_ff) == (model.n_layer, model.n_embd, model.n_ff)
    if not same_shape or not _same_norms(file, model):
        raise PinferError(
            f"{model.path} was not made from {file.path}", f"convert it again: pinfer convert {file.path}"
        )
    if not any(file.predictor_rank(layer) for layer in range(file.n_layer)):
        raise PinferError(
            f"{file.path} has no predictor", f"make one: pinfer profile {model.path}; pinfer train {model.path}"
        )


def _same_norms(file: PowerInferFile, model: Model) -> bool:
    """Whether the norms, which conversion copies, are equal: cheap to compare, and different in other models."""
    names = [name for name in file.gguf.tensors if name.endswith("norm.weight") and name in model.gguf.tensors]
    return all(np.array_equal(file.values(name), dequantize(model, model.gguf.tensors[name])) for name in names)


def _import_layer(
    file: PowerInferFile, model: Model, layer: int, samples: SamplesFile, options: TrainOptions, keep: bool
) -> tuple[LayerPredictor, ImportedLayer]:
    ffn = model.ffns[layer]
    data = LayerData.read(model, ffn, samples)
    _, calibration, test = parts(len(data.x))
    factors = fitted = None
    if file.predictor_rank(layer):
        # Nothing is learnt but thresholds and order, so samples of the fit can be used for them as well.
        held = HeldBack.of(data, slice(max(0, calibration.stop - _CALIBRATION_SAMPLES), calibration.stop))
        factors = ImportedFactors.of(file, model, layer).calibrated(data, held, options.recall)
        fitted = cheapest(data, factors.sources(data, held, whole=keep), held, options, keep=keep)
        del held  # wide layers do not fit into memory twice
    held = HeldBack.of(data, test)
    predictor, report = tested(data, ffn, fitted, held) if fitted else fit_layer(data, ffn, options)
    by_sign = factors.scores(held.x) > 0 if factors else None
    return predictor, ImportedLayer(
        **vars(report),
        imported=fitted is not None,
        recall_active=_recall_active(held, _named(predictor, held)),
        sign_recall=None if by_sign is None else held.recall(by_sign),
        sign_recall_active=None if by_sign is None else _recall_active(held, by_sign),
        sign_candidates=None if by_sign is None else float(by_sign.mean()),
    )


def _named(predictor: LayerPredictor, held: HeldBack) -> NDArray[np.bool_]:
    """The candidates ``[n, n_ff]``; all neurons if the layer has no predictor."""
    if predictor.b is None or predictor.t is None:
        return np.ones(held.mass.shape, dtype=bool)
    return scores(predictor.a, predictor.b, held.x, predictor.kind, predictor.c) > predictor.t


def _recall_active(held: HeldBack, named: NDArray[np.bool_]) -> float:
    """Share of the active neurons that are among the candidates ``named``."""
    fired = held.mass > 0
    n = int(np.count_nonzero(fired))
    return int(np.count_nonzero(fired & named)) / n if n else 1.0


def _report(
    path: Path, file: PowerInferFile, corpus: str, n_samples: int, n_bytes: int, layers: list[ImportedLayer]
) -> ImportReport:
    def mean(name: str) -> float:
        known = [value for layer in layers if (value := getattr(layer, name)) is not None]
        return math.fsum(known) / len(known)

    return ImportReport(
        **vars(summary(path, n_samples, n_bytes, list(layers))),
        source=file.path,
        corpus=corpus,
        n_test=len(range(*parts(n_samples)[2].indices(n_samples))),
        n_imported=sum(layer.imported for layer in layers),
        sparse_threshold=file.sparse_threshold,
        recall_active=mean("recall_active"),
        sign_recall=mean("sign_recall"),
        sign_recall_active=mean("sign_recall_active"),
        sign_candidates=mean("sign_candidates"),
    )


def without_scale(fc1: Matrix, weight: Matrix) -> Matrix:
    """fc1·diag(1/w) ``[rank, n_embd]``, which undoes the multiplication by a norm's ``weight`` ``[n_embd]``.

    Inputs that the norm multiplies by 0 cannot be recovered; their columns are zero.
    """
    kept = weight != 0
    return np.where(kept, fc1 / np.where(kept, weight, np.float32(1)), np.float32(0)).astype(np.float32)


@dataclass(frozen=True)
class ImportedFactors:
    """Factors of a layer's predictor, re-expressed for the norm's output y: scores are B·relu(A·y + c)."""

    a: Matrix
    """fc1·diag(1/w) ``[rank, n_embd]``"""
    b: Matrix
    """fc2 ``[n_ff, rank]``"""
    c: Matrix | None
    """``[rank]``; None for an RMS norm"""
    ones: Matrix | None
    """``[rank]``, to be added to c once per unit of mean / deviation"""

    @staticmethod
    def of(file: PowerInferFile, model: Model, layer: int) -> ImportedFactors:
        """Re-expresses the file's predictor, using the norm in front of the model's FFN."""
        fc1, fc2 = file.predictor(layer)
        name = f"blk.{layer}.attn_norm" if model.arch == "falcon" else f"blk.{layer}.ffn_norm"
        tensors = model.gguf.tensors
        a = without_scale(fc1, dequantize(model, tensors[f"{name}.weight"]).reshape(-1))
        if f"{name}.bias" not in tensors:
            return ImportedFactors(a, fc2, None, None)
        bias = dequantize(model, tensors[f"{name}.bias"]).reshape(-1)
        return ImportedFactors(a, fc2, -(a @ bias), fc1.sum(axis=1))

    def scores(self, x: Matrix, neurons: slice = slice(None)) -> Matrix:
        """Scores ``[n, neurons]`` of the norm's outputs ``x`` ``[n, n_embd]``, without rounding."""
        return scores(self.a, self.b[neurons], x, "mlp", self.c)

    def at(self, mean: float) -> ImportedFactors:
        """The factors for this mean / deviation."""
        if self.c is None or self.ones is None:
            return self
        return replace(self, c=self.c + np.float32(mean) * self.ones, ones=None)

    def calibrated(self, data: LayerData, held: HeldBack, recall: float) -> ImportedFactors:
        """The factors for the mean / deviation with the fewest candidates at ``recall``."""
        if self.ones is None:
            return self
        neurons = slice(None, None, -(-len(data.weight) // _SEARCH_NEURONS))
        some = held.some(-(-len(held.x) // _SEARCH_SAMPLES), neurons)

        def n_candidates(mean: float) -> int:
            found = self.at(mean).scores(some.x, neurons)
            return int(np.count_nonzero(found > one_threshold(found, some, recall)))

        return self.at(min(_MEANS, key=n_candidates))

    def sources(self, data: LayerData, held: HeldBack, *, whole: bool) -> list[Source]:
        """The factors in all types that suit the width; of lower ranks too, unless they are to stay ``whole``.

        relu(v z) = v relu(z) for every v > 0. So hidden values can be scaled to have the same size; then the columns of
        B show how much each one matters. Sorted by that, neighbouring ones suit a block with one scale, and lower ranks
        are prefixes that leave out what matters least.
        """
        z = held.x @ self.a.T
        if self.c is not None:
            z += self.c
        # Values that hardly ever show are the last; their rows of A stay within the range of half floats.
        least = np.maximum(1e-4 * np.abs(self.a).max(axis=1), 1e-30)
        size = np.maximum(np.sqrt(np.mean(np.maximum(z, 0) ** 2, axis=0)), least).astype(np.float32)
        b = self.b * size
        b /= max(float(np.abs(b).max()), 1e-30)  # likewise
        order = np.argsort(-np.einsum("ij,ij->j", b, b), kind="stable")
        spare = (0, -len(order) % BLOCK)
        a = np.pad((self.a / size[:, None])[order], (spare, (0, 0)))
        c = None if self.c is None else np.pad((self.c / size)[order], spare)
        ordered = ImportedFactors(a, np.pad(b[:, order], ((0, 0), spare)), c, None)
        fits = data.weight.shape[1] % BLOCK == 0
        return [_Imported(data, ordered, types, whole=whole) for types in _TYPES if fits or types[0] == "f16"]


class _Imported:
    """Imported factors in one pair of types, of any rank."""

    kind = "mlp"

    def __init__(self, data: LayerData, factors: ImportedFactors, types: tuple[str, str], *, whole: bool) -> None:
        rank = len(factors.a)
        self.types: tuple[str, str] | None = types
        self._types = types
        self.ranks = range(rank if whole else BLOCK, rank + 1, BLOCK)
        self.ready = len(self.ranks) - 1
        self._data = data
        self._c = factors.c
        self._a = quantised(factors.a, types[0])
        self._b = quantised(factors.b, types[1])

    def parts(self, rank: int, neurons: slice) -> tuple[Matrix, Matrix, Matrix | None]:
        """Prefixes of the factors, which works because quantised blocks of B run along the rank."""
        return self._a[:rank], self._b[neurons, :rank], None if self._c is None else self._c[:rank]

    def n_bytes(self, rank: int) -> int:
        """Bytes of both factors, the constants and the thresholds."""
        constants = 0 if self._c is None else self._c[:rank].nbytes
        return factor_bytes(self._data, self._types, rank) + constants
