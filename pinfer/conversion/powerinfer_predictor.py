"""Converts the predictors of a PowerInfer file into the predictor.gguf of the model converted from it.

PowerInfer scores the neurons of a layer by fc2·relu(fc1·x), where x is the input of the layer's norm. The plugin only
sees the norm's output y. Since relu(c v) = c relu(v) for every c > 0, a positive factor per token does not change the
sign of a score. So it is enough to express fc1·x in terms of y up to such a factor:

- RMS norm, y = w x / rms(x): fc1·x is rms(x) times fc1·diag(1/w)·y. This is exact.
- Layer norm, y = w (x - mean) / deviation + b: fc1·x is the deviation times
  (fc1·diag(1/w)·(y - b) + (mean / deviation) fc1·1). Everything in it except y and mean / deviation is constant. That
  ratio cannot be recovered from y, so one value per layer is fitted. Constants need no separate bias: (y - b) / w sums
  to 0, so the sum of y / w is the same for every token, and constants are expressed through it.

Thresholds are then found on samples of the converted model, as in `pinfer train`. If a layer's predictor costs more
than it saves at the requested recall, the layer gets the predictor that `pinfer train` would make.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
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
from pinfer.gguf_io.reader import row_bytes
from pinfer.interrupt import interruptible
from pinfer.model import Model, dequantize
from pinfer.predictors.data import HeldBack, LayerData, parts
from pinfer.predictors.fitting import (
    Fitted,
    LayerReport,
    TrainOptions,
    TrainReport,
    exact_cost,
    fit_layer,
    scores,
    summary,
    tested,
)
from pinfer.predictors.thresholds import calibrate, one_threshold
from pinfer.progress import NULL_PROGRESS, Progress

if TYPE_CHECKING:
    from pinfer.predictors.data import Matrix

# Values in a block of quantised factors; ranks are padded to multiples of it.
_BLOCK = 32

# Number of samples for finding thresholds, and of samples and neurons for comparing candidates in _MEANS.
_CALIBRATION_SAMPLES = 2048
_SEARCH_SAMPLES = 256
_SEARCH_NEURONS = 2048

# With fewer tokens a measured recall is unreliable: a single token changes it by 0.2 % or more.
_ENOUGH_TOKENS = 500

# Candidates for mean / deviation of a layer norm's input.
_MEANS = (0.0, 0.02, -0.02, 0.05, -0.05, 0.1, -0.1, 0.2, -0.2, 0.4, -0.4)

# Relative rounding error of the types A is stored in. It limits how accurately a constant can be expressed through y.
_ROUNDING = {"f16": 2.0**-12, "q8_0": 2.0**-8}

# One float32 per neuron.
_THRESHOLD_BYTES = 4


@dataclass(frozen=True)
class ImportOptions:
    """Requested recall, and the text for finding thresholds."""

    dataset: str | None = None
    """None: that of the samples from `pinfer profile`, else wikitext"""
    n_tokens: int = 8192
    recall: float = 0.995
    n_threads: int | None = None
    keep: bool = False  # keep the file's predictor even if it costs more than it saves


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
    train = TrainOptions(recall=options.recall, type="f16" if model.n_embd % _BLOCK else "q4_0")
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
    fitted = None
    pays = False
    if file.predictor_rank(layer):
        # Only the thresholds are fitted, so samples of the fit can be used for them as well.
        held = HeldBack.of(data, slice(max(0, calibration.stop - _CALIBRATION_SAMPLES), calibration.stop))
        fitted = _fit(ImportedFactors.of(file, model, layer), data, held, options.recall)
        pays = keep or fitted.cost(data, held) < exact_cost(data, held)
        del held  # wide layers do not fit into memory twice
    held = HeldBack.of(data, test)
    predictor, report = tested(data, ffn, fitted, held) if fitted and pays else fit_layer(data, ffn, options)
    by_sign = scores(fitted.a, fitted.b, held.x, "mlp") > 0 if fitted else None
    return predictor, ImportedLayer(
        **vars(report),
        imported=pays,
        recall_active=_recall_active(held, _named(predictor, held)),
        sign_recall=None if by_sign is None else held.recall(by_sign),
        sign_recall_active=None if by_sign is None else _recall_active(held, by_sign),
        sign_candidates=None if by_sign is None else float(by_sign.mean()),
    )


def _named(predictor: LayerPredictor, held: HeldBack) -> NDArray[np.bool_]:
    """The candidates ``[n, n_ff]``; all neurons if the layer has no predictor."""
    if predictor.b is None or predictor.t is None:
        return np.ones(held.mass.shape, dtype=bool)
    return scores(predictor.a, predictor.b, held.x, predictor.kind) > predictor.t


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


def constant(weight: Matrix, bias: Matrix, rounding: float) -> Matrix:
    """v ``[n_embd]`` with v·y = 1 for every output y of the layer norm with ``weight`` and ``bias`` ``[n_embd]``.

    v is a multiple of 1/w, because the sum of y / w always equals that of b / w. If that sum is small compared with the
    error from rounding v, v is shrunk, and if it is zero, so is v.
    """
    kept = weight != 0
    inverse = np.where(kept, 1 / np.where(kept, weight, np.float32(1)), np.float32(0)).astype(np.float64)
    offset = bias * inverse
    total = float(offset.sum())
    noise = rounding**2 * float((kept + offset**2).sum())
    if total == 0:
        return np.zeros_like(weight)
    return (inverse * (total / (total**2 + noise))).astype(np.float32)


@dataclass(frozen=True)
class ImportedFactors:
    """Factors of a layer's predictor, re-expressed for the norm's output y as a function of mean / deviation."""

    a: Matrix
    """fc1·diag(1/w) ``[rank, n_embd]``"""
    b: Matrix
    """fc2 ``[n_ff, rank]``, rounded as it is stored"""
    types: tuple[str, str]
    """types of A and B"""
    fixed: Matrix | None
    """``[rank]``, to be added to A·y; None for an RMS norm"""
    ones: Matrix
    """``[rank]``, to be added to A·y once per unit of mean / deviation"""
    constant: Matrix
    """``[n_embd]``, the vector whose product with y is 1"""

    @staticmethod
    def of(file: PowerInferFile, model: Model, layer: int) -> ImportedFactors:
        """Re-expresses the file's predictor, using the norm in front of the model's FFN."""
        fc1, fc2 = file.predictor(layer)
        name = f"blk.{layer}.attn_norm" if model.arch == "falcon" else f"blk.{layer}.ffn_norm"
        tensors = model.gguf.tensors
        weight = dequantize(model, tensors[f"{name}.weight"]).reshape(-1)
        is_quantised = file.gguf.tensors[f"blk.{layer}.fc1.weight"].type_name not in ("F32", "F16")
        has_bias = f"{name}.bias" in tensors
        # The constant is a difference of large sums, so 8 bits are too coarse for it.
        a_type = "q8_0" if is_quantised and not has_bias and model.n_embd % _BLOCK == 0 else "f16"
        types = a_type, "q4_0" if is_quantised else "f16"
        spare = -len(fc1) % _BLOCK
        a = np.pad(without_scale(fc1, weight), ((0, spare), (0, 0)))
        b = quantised(np.pad(fc2, ((0, 0), (0, spare))), types[1])
        if not has_bias:
            nothing = np.zeros(len(a), np.float32)
            return ImportedFactors(a, b, types, None, nothing, np.zeros_like(weight))
        bias = dequantize(model, tensors[f"{name}.bias"]).reshape(-1)
        v = constant(weight, bias, _ROUNDING[a_type])
        return ImportedFactors(a, b, types, -(a @ bias), np.pad(fc1.sum(axis=1), (0, spare)), v)

    def first(self, mean: float) -> Matrix:
        """A ``[rank, n_embd]`` for this mean / deviation, rounded as it is stored.

        It is scaled into the range of half floats, which does not change the sign of a score.
        """
        a = self.a
        if self.fixed is not None:
            a = a + np.outer(self.fixed + np.float32(mean) * self.ones, self.constant)
        return quantised(a / max(float(np.abs(a).max()), 1e-30), self.types[0])


def _fit(factors: ImportedFactors, data: LayerData, held: HeldBack, recall: float) -> Fitted:
    """The predictor with the thresholds that keep ``recall`` on ``held``, and with the best mean / deviation."""
    n_ff, n_embd = data.weight.shape
    rank = len(factors.a)
    n_bytes = rank * row_bytes(factors.types[0], n_embd)
    n_bytes += n_ff * (row_bytes(factors.types[1], rank) + _THRESHOLD_BYTES)

    def fit(mean: float, b: Matrix, part: LayerData, on: HeldBack) -> Fitted:
        a = factors.first(mean)
        t = _thresholds(scores(a, b, on.x, "mlp"), on, part, recall)
        return Fitted("mlp", a, b, t, n_bytes, factors.types)

    mean = 0.0
    if factors.constant.any():
        neurons = slice(None, None, -(-n_ff // _SEARCH_NEURONS))
        some, part = held.some(-(-len(held.x) // _SEARCH_SAMPLES), neurons), data.some(neurons)
        mean = min(_MEANS, key=lambda m: int(fit(m, factors.b[neurons], part, some).named(some).sum()))
    return fit(mean, factors.b, data, held)


def _thresholds(found: Matrix, held: HeldBack, data: LayerData, recall: float) -> Matrix:
    """Calibrated thresholds per neuron, or a single one for all neurons, whichever gives fewer candidates."""
    single = np.full(found.shape[1], one_threshold(found, held, recall), np.float32)
    return min((calibrate(found, held, data, recall), single), key=lambda t: int(np.count_nonzero(found > t)))
