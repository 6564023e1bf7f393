"""`pinfer train`: fits predictors of the neurons that fire, layer by layer and in closed form."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

from pinfer.artefacts import paths
from pinfer.artefacts.predictor import FACTOR_TYPES, PredictorWriter
from pinfer.artefacts.profile import SamplesFile
from pinfer.errors import PinferError
from pinfer.model import open_model
from pinfer.predictors.data import LayerData
from pinfer.predictors.fitting import BLOCK, MIN_SAMPLES, TrainOptions, TrainReport, fit_layer, summary
from pinfer.predictors.stacks import fit_stack
from pinfer.progress import NULL_PROGRESS, Progress

__all__ = ["TrainOptions", "TrainReport", "train"]


def train(model_path: Path, options: TrainOptions, progress: Progress = NULL_PROGRESS) -> TrainReport:
    """Fit the predictor from the samples of ``pinfer profile`` and write predictor.gguf.

    Raises PinferError when there are no samples, too few of them, or the model has nothing to predict.
    """
    _check(options)
    model = open_model(model_path, options.activation)
    model.require_sparse()
    if options.type != "f16" and model.n_embd % BLOCK:
        progress.note(f"{model.n_embd} values do not fill blocks of {options.type}: the factors are kept as f16")
        options = replace(options, type="f16")
    samples = SamplesFile.read(
        paths.artefact_dir(model.path, model.fingerprint, for_writing=False) / paths.SAMPLES, model
    )
    if samples.n_samples < MIN_SAMPLES:
        raise PinferError(
            f"{samples.artefact.path} holds {samples.n_samples} samples, too few to learn from",
            f"profile more text: pinfer profile {model.path} --tokens 131072",
        )
    reports = []
    with (
        paths.writing_to(model, progress) as folder,
        PredictorWriter(folder / paths.PREDICTOR, model, options.type) as writer,
        progress.task("train", sum(f.n_experts for f in model.ffns), "FFNs") as advance,
    ):
        for ffn in model.ffns:
            if ffn.is_stack:
                predictor, report = fit_stack(model, ffn, samples, options, advance)
            else:
                predictor, report = fit_layer(LayerData.read(model, ffn, samples), ffn, options)
                advance(1)
            writer.add(predictor)
            reports.append(report)
            model.gguf.release()
            samples.artefact.gguf.release()
        settings = {**asdict(options), "command": "train", "n_samples": samples.n_samples}
        n_bytes = writer.finish(settings)
    return summary(folder / paths.PREDICTOR, samples.n_samples, n_bytes, reports)


def _check(options: TrainOptions) -> None:
    if not 0 < options.recall <= 1:
        raise PinferError(f"a recall of {options.recall} is not possible", "use --recall 0.995, at most 1")
    if options.max_rank is not None and options.max_rank < 0:
        raise PinferError("the rank cannot be negative", "use --max-rank 0 or more")
    if options.type not in FACTOR_TYPES:
        raise PinferError(f"unknown type {options.type!r}", f"use --type {'|'.join(FACTOR_TYPES)}")
