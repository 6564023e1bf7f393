"""``pinfer convert``: a checkpoint folder or a PowerInfer file becomes a GGUF that stock llama.cpp opens.

Tensors are streamed from the source into the file one by one. Types below F16 are made by libllama's own quantiser
from a temporary file in the source's precision.
"""

from __future__ import annotations

import os
import re
import shlex
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import quantize
from numpy.typing import NDArray

from pinfer.artefacts import paths
from pinfer.artefacts.profile import SamplesFile
from pinfer.conversion.checkpoint import Checkpoint, is_checkpoint, open_checkpoint
from pinfer.conversion.families import plan_checkpoint
from pinfer.conversion.plan import ConvertPlan, PlannedTensor
from pinfer.conversion.powerinfer_file import is_powerinfer, open_powerinfer, plan_powerinfer
from pinfer.conversion.powerinfer_predictor import (
    ImportOptions,
    ImportReport,
    check_import,
    has_predictor,
    import_layers,
)
from pinfer.conversion.tokenizer import TokenizerReport, add_tokenizer
from pinfer.errors import PinferError
from pinfer.gguf_io.writer import GgufFileWriter, temporary_file
from pinfer.hub.corpus import HUB_SOURCES, open_corpus
from pinfer.llama.devices import physical_cores
from pinfer.llama.engine import require_loadable
from pinfer.llama.quantise import estimated_bytes, quantise
from pinfer.model import ACTIVATION_KEY, ACTIVATIONS, THRESHOLD_KEY, Model, open_model
from pinfer.predictors.fitting import MIN_SAMPLES
from pinfer.profile import ProfileOptions, profile
from pinfer.progress import NULL_PROGRESS, Progress

PLAIN = ("f32", "f16", "bf16")
_FILE_TYPES = {"f32": 0, "f16": 1, "bf16": 32, "q4_0": 2}
"""``general.file_type`` by the type of the matrices"""
_CHUNK = 1 << 24
"""values converted at a time"""
_F16_MAX = 65504.0


@dataclass(frozen=True)
class ConvertOptions:
    """Settings of ``pinfer convert``."""

    out: Path | None = None
    """None: the source's name and the type, in the current folder"""
    type: str | None = None
    """None: f16, or the source's own for a PowerInfer file"""
    dataset: str | None = None
    """text on which a PowerInfer file's predictor is calibrated and its recall measured; None: that of the model's
    samples, else wikitext"""
    activation: str | None = None
    """overrides the source's"""
    force: bool = False
    """replace an existing file"""
    n_threads: int | None = None
    name: str | None = None
    """the model's name; None: the source's"""


@dataclass(frozen=True)
class ConvertReport:
    """What was written."""

    path: Path
    source: Path
    arch: str
    activation: str
    activation_threshold: float
    type: str
    n_tensors: int
    n_weights: int
    n_bytes: int
    seconds: float
    tokenizer: TokenizerReport | None
    predictor: ImportReport | None
    """of a PowerInfer file"""
    notes: tuple[str, ...] = field(default=())

    @property
    def next_command(self) -> str:
        """What to type next: an imported predictor comes with a profile, so only the placement is missing."""
        return f"pinfer {'solve' if self.predictor else 'profile'} {shlex.quote(str(self.path))}"

    def to_json(self) -> dict[str, object]:
        """The report as plain JSON values."""
        values = asdict(self) | {"source": str(self.source), "predictor": self.predictor and self.predictor.to_json()}
        return {"model": str(values.pop("path")), "architecture": values.pop("arch"), **values}


@dataclass(frozen=True)
class _Source:
    """A source of which everything but the weights has been read."""

    plan: ConvertPlan
    precision: str
    """the type that holds every weight exactly"""
    default_type: str
    add_tokenizer: Callable[[GGUFWriter], TokenizerReport | None]


def convert(source: Path, options: ConvertOptions, progress: Progress) -> ConvertReport:
    """Writes the GGUF, and predictor.gguf where a PowerInfer file has one.

    Raises PinferError before anything is written if the source cannot be converted or the text does not exist.
    """
    started = time.monotonic()
    opened = _open(source, options.activation)
    type_ = options.type or opened.default_type
    name = options.name or _stem(source)
    out = _output(source, opened, options)
    _require_free_name(out, source, options.force)
    missing_text = _missing_text(source, options, progress)
    n_weights = sum(prod(tensor.shape) for tensor in opened.plan.tensors)
    tokenizer = _write_file(source, opened, out, name, type_, n_weights, options.n_threads, progress)
    predictor, notes = _import_predictor(source, out, options, missing_text, progress)
    model = open_model(out)
    return ConvertReport(
        path=out,
        source=source,
        arch=model.arch,
        activation=model.activation,
        activation_threshold=model.activation_threshold,
        type=type_,
        n_tensors=len(opened.plan.tensors),
        n_weights=n_weights,
        n_bytes=out.stat().st_size,
        seconds=time.monotonic() - started,
        tokenizer=tokenizer,
        predictor=predictor,
        notes=(*opened.plan.notes, *(tokenizer.notes if tokenizer else ()), *notes),
    )


def convert_predictor(source: Path, options: ConvertOptions, progress: Progress) -> ImportReport:
    """Writes only predictor.gguf, for the GGUF that `convert` with the same options made from ``source``.

    Raises PinferError if the source has no predictor, or if that GGUF is missing or was not made from it.
    """
    out = _output(source, _open(source, options.activation), options)
    if not _brings_predictor(source):
        model = shlex.quote(str(out))
        raise PinferError(f"{source} has no predictor", f"make one: pinfer profile {model}; pinfer train {model}")
    if not out.exists():
        command = f"pinfer convert {shlex.quote(str(source))}"
        raise PinferError(f"{out} does not exist", f"name the model with -o, or convert it as well: {command}")
    return import_predictor(source, out, ImportOptions(options.dataset, n_threads=options.n_threads), progress)


def _output(source: Path, opened: _Source, options: ConvertOptions) -> Path:
    name, type_ = options.name or _stem(source), options.type or opened.default_type
    return options.out or Path(f"{name}-{type_.upper()}.gguf")


def _write_file(
    source: Path,
    opened: _Source,
    out: Path,
    name: str,
    type_: str,
    n_weights: int,
    n_threads: int | None,
    progress: Progress,
) -> TokenizerReport | None:
    """Writes the GGUF as stored or in a plain type, then quantises it if that was asked for."""
    plan = opened.plan
    written = type_ if type_ in PLAIN and opened.default_type in PLAIN else opened.precision
    quantises = type_ != written
    if quantises and written not in PLAIN:
        raise PinferError(f"{source} is stored as {written}, which cannot become {type_}", "leave out --type")
    with GgufFileWriter(out, plan.arch, elsewhere="write to another disk: -o FILE") as writer:
        tokenizer = opened.add_tokenizer(writer.header)
        plan.add_metadata(writer.header)
        _add_own_keys(plan, written, name, writer.header)
        for tensor in plan.tensors:
            writer.declare(tensor.name, tensor.shape, _type_in_file(tensor, written))
        quantised = estimated_bytes(n_weights, type_) if quantises else 0
        progress.note(
            f"writing {out}: {_gigabytes(quantised or writer.n_bytes)}"
            + (f", and {_gigabytes(writer.n_bytes)} for a temporary file" if quantises else "")
        )
        writer.begin(also=quantised)
        writer.reserve()
        _require_loadable(writer.temporary, source)
        _write_tensors(plan, written, writer, progress)
        if quantises:
            writer.finish()
            _quantise_in_place(writer, type_, n_weights, n_threads, progress)
    return tokenizer


def _gigabytes(n: int) -> str:
    return f"{n / 1e9:.2f} GB" if n >= 5e6 else f"{n / 1e6:.2f} MB"


def _brings_predictor(source: Path) -> bool:
    return is_powerinfer(source) and has_predictor(source)


def _missing_text(source: Path, options: ConvertOptions, progress: Progress) -> PinferError | None:
    """Makes sure, before hours of work, that there is a text to measure the predictor on.

    Raises PinferError for a file that cannot be read. Returns it for a hub that cannot be reached: the model can be
    converted without its predictor.
    """
    dataset = options.dataset or ProfileOptions().dataset
    if not _brings_predictor(source) or dataset == "-":
        return None
    try:
        corpus = open_corpus(dataset, progress)
    except PinferError as error:
        if dataset not in HUB_SOURCES:
            raise
        progress.note(f"the model will be converted without its predictor: {error}")
        return error
    if next(corpus.documents(), None) is None:
        raise PinferError(f"{dataset} has no text", "use another one: --dataset c4|wikitext|FILE")
    return None


def import_predictor(
    source: Path, model_path: Path, options: ImportOptions, progress: Progress = NULL_PROGRESS
) -> ImportReport:
    """Writes predictor.gguf of ``model_path``, which was converted from ``source``, and reports how well it predicts.

    Uses the samples of `pinfer profile`; if there are none, or none of the text asked for, the model is profiled here.
    Raises PinferError if the file has no predictor, if the model was not made from it, or if the text cannot be read.
    """
    file, model = open_powerinfer(source), open_model(model_path)
    check_import(file, model, options)
    samples, corpus = _samples(model, options, progress)
    return import_layers(file, model, samples, corpus, options, progress)


def _samples(model: Model, options: ImportOptions, progress: Progress) -> tuple[SamplesFile, str]:
    """The samples of the model and the name of their text. Profiles the model if there are too few of this text."""
    path = paths.artefact_dir(model.path, model.fingerprint, for_writing=False) / paths.SAMPLES
    if path.exists():
        samples = SamplesFile.read(path, model)
        dataset = str(samples.artefact.settings.get("dataset", ""))
        if samples.n_samples >= MIN_SAMPLES and options.dataset in (None, dataset):
            return samples, dataset
    # PowerInfer computes only ReLU, so the activation of its models need not be checked.
    dataset = options.dataset or ProfileOptions().dataset
    settings = ProfileOptions(dataset, options.n_tokens, n_threads=options.n_threads, force=True)
    profiled = profile(model.path, settings, progress)
    if profiled.interrupted:  # alone it keeps what was counted; here Ctrl-C is meant for the whole command
        raise KeyboardInterrupt
    if profiled.n_samples < MIN_SAMPLES or profiled.samples_path is None:
        raise PinferError(
            f"{profiled.corpus} gave {profiled.n_samples} samples, too few to measure a predictor on",
            "use a longer text: --dataset c4|wikitext|FILE",
        )
    return SamplesFile.read(profiled.samples_path, model), profiled.corpus


def _import_predictor(
    source: Path, out: Path, options: ConvertOptions, missing_text: PinferError | None, progress: Progress
) -> tuple[ImportReport | None, list[str]]:
    """The predictor of a PowerInfer file beside the model, or why there is none: the model is whole without it."""
    if not _brings_predictor(source):
        return None, []
    again = f"pinfer convert {shlex.quote(str(source))} -o {shlex.quote(str(out))} --predictor-only"
    try:
        if missing_text is not None:
            raise missing_text
        report = import_predictor(source, out, ImportOptions(options.dataset, n_threads=options.n_threads), progress)
    except KeyboardInterrupt:
        progress.note(f"{out} is complete; its predictor was not imported; to import it: {again}")
        raise
    except PinferError as error:
        return None, [f"its predictor was left out: {error}", f"to import it: {again}"]
    return report, report.notes()


def _require_loadable(written: Path, source: Path) -> None:
    """libllama reads the header before any weights are written."""
    try:
        require_loadable(written)
    except PinferError as error:
        said = error.message.replace(str(written), "the GGUF")
        raise PinferError(f"{source} is incomplete or contradicts itself: {said}", "check the checkpoint") from None


def _open(source: Path, activation: str | None) -> _Source:
    if activation is not None and activation not in ACTIVATIONS:
        raise PinferError(f"unknown activation {activation!r}", f"use one of: {', '.join(ACTIVATIONS)}")
    if is_checkpoint(source):
        return _open_checkpoint(open_checkpoint(source), activation)
    if source.is_dir():
        raise PinferError(f"{source} has no config.json", "name the folder of a Hugging Face checkpoint")
    if not source.exists():
        raise PinferError(f"{source} does not exist", "name a checkpoint folder, or one on the hub: -hf USER/REPO")
    if is_powerinfer(source):
        return _open_powerinfer(source, activation)
    raise PinferError(
        f"{source} is neither a checkpoint folder nor a PowerInfer file",
        f"a GGUF needs no conversion: pinfer show {source}",
    )


def _open_checkpoint(checkpoint: Checkpoint, activation: str | None) -> _Source:
    plan = plan_checkpoint(checkpoint, activation)
    dtypes = {tensor.dtype for tensor in checkpoint.tensors.values()}
    precision = {"F16": "f16", "BF16": "bf16"}.get(dtypes.pop(), "f32") if len(dtypes) == 1 else "f32"
    n_vocab = next((tensor.shape[1] for tensor in plan.tensors if tensor.name == "token_embd.weight"), 0)
    if not n_vocab:
        raise PinferError(f"{checkpoint.folder} has no token embedding", "download the checkpoint again")

    def tokenizer(header: GGUFWriter) -> TokenizerReport:
        return add_tokenizer(checkpoint.folder, checkpoint.config, n_vocab, header)

    return _Source(plan, precision, "f16", tokenizer)


def _open_powerinfer(source: Path, activation: str | None) -> _Source:
    """Its tensors go into the GGUF as they are stored; its tokenizer is part of the plan's metadata."""
    plan = plan_powerinfer(source)
    if activation is not None:
        plan = replace(plan, activation=activation)
    stored = str(plan.settings["source_type"])
    return _Source(plan, stored, stored, lambda header: None)


def _stem(source: Path) -> str:
    """A name for the model, from the folder of the checkpoint or the file."""
    resolved = source.resolve()
    return re.sub(r"(\.powerinfer)?\.gguf$", "", resolved.name) or "model"


def _require_free_name(out: Path, source: Path, force: bool) -> None:
    if out.is_dir():
        raise PinferError(f"{out} is a folder", f"name the file to write: -o {out / 'model.gguf'}")
    if not out.exists():
        return
    if source.exists() and out.samefile(source):
        raise PinferError(f"{out} is the source itself", "name another file: -o OUT.gguf")
    if not force:
        raise PinferError(f"{out} exists", "name another file with -o, or replace it with --force")


def _add_own_keys(plan: ConvertPlan, type_: str, name: str, header: GGUFWriter) -> None:
    header.add_type("model")
    header.add_name(name)
    header.add_file_type(_FILE_TYPES[type_])
    header.add_quantization_version(2)
    if plan.names_activation:
        header.add_string(ACTIVATION_KEY, plan.activation)
    if plan.activation_threshold:
        header.add_float32(THRESHOLD_KEY, plan.activation_threshold)


def _type_in_file(tensor: PlannedTensor, plain: str) -> str:
    """As in llama.cpp: vectors in F32, matrices in the type asked for."""
    if tensor.type_name is not None:
        return tensor.type_name
    return plain.upper() if len(tensor.shape) > 1 else "F32"


def _write_tensors(plan: ConvertPlan, plain: str, writer: GgufFileWriter, progress: Progress) -> None:
    total = sum(tensor.n_source_bytes for tensor in plan.tensors)
    with progress.task("converting", total, "bytes") as advance:
        for tensor in plan.tensors:
            if tensor.raw is not None:
                writer.write(tensor.name, tensor.raw())
            else:
                _write_values(tensor, _type_in_file(tensor, plain), writer)
            advance(tensor.n_source_bytes)


def _write_values(tensor: PlannedTensor, type_name: str, writer: GgufFileWriter) -> None:
    """One tensor, converted piece by piece."""
    assert tensor.load is not None
    values = tensor.load()
    if values.shape != tensor.shape[::-1]:
        raise AssertionError(f"{tensor.name} has shape {values.shape} instead of {tensor.shape[::-1]}")
    if values.ndim > 1:  # a stack of experts, too, is written row by row
        values = values.reshape(-1, tensor.shape[0])
    rows = max(1, _CHUNK // tensor.shape[0]) if values.ndim > 1 else len(values)
    for start in range(0, len(values), rows):
        writer.write(tensor.name, _encode(tensor.name, values[start : start + rows], type_name))


def _encode(name: str, values: NDArray[Any], type_name: str) -> NDArray[Any]:
    plain = values.astype(np.float32)
    largest = float(np.abs(plain).max(initial=0.0))  # NaN if there is one
    if not np.isfinite(largest):
        raise PinferError(f"{name} contains NaN or infinity", "download the checkpoint again")
    if type_name == "F16" and largest > _F16_MAX:
        raise PinferError(f"{name} contains {largest:g}, too large for F16", "convert to another type: --type bf16")
    if type_name == "F32":
        return plain
    if type_name == "F16":
        return plain.astype(np.float16)
    return quantize(plain, GGMLQuantizationType[type_name])


def _quantise_in_place(
    writer: GgufFileWriter, type_: str, n_weights: int, n_threads: int | None, progress: Progress
) -> None:
    """Replaces the finished temporary file of ``writer`` with a quantised one."""
    with temporary_file(writer.path, f"{type_}.") as smaller:
        quantise(writer.temporary, smaller, type_, n_weights, n_threads or physical_cores(), progress)
        os.replace(smaller, writer.temporary)
