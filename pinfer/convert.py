"""``pinfer convert``: a checkpoint folder or a PowerInfer file becomes a GGUF that stock llama.cpp opens.

Tensors stream from the source into the file one after the other. Types below F16 are made by libllama's own quantiser
from a file of the source's precision, which is removed again.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pinfer.checkpoint import Checkpoint, is_checkpoint, open_checkpoint
from pinfer.convert_plan import ConvertPlan, PlannedTensor
from pinfer.engine import require_loadable
from pinfer.errors import PinferError
from pinfer.gguf_writer import GgufFileWriter
from pinfer.model import ACTIVATION_KEY, ACTIVATIONS, THRESHOLD_KEY, open_model
from pinfer.progress import Progress
from pinfer.quantise import estimated_bytes, quantise

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from numpy.typing import NDArray

    from pinfer.convert_tokenizer import TokenizerReport

PLAIN = {"f32": ("F32", 0), "f16": ("F16", 1), "bf16": ("BF16", 32)}
"""type: ggml's name for it, and GGUF's number of a file of that type"""
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
    activation: str | None = None
    """wins over what the source says"""
    force: bool = False
    """replace a file that is there"""
    n_threads: int | None = None
    name: str | None = None
    """of the model; None: the source's"""


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
    notes: tuple[str, ...] = field(default=())

    def to_json(self) -> dict[str, object]:
        """For ``--json``."""
        return {
            "model": str(self.path),
            "source": str(self.source),
            "architecture": self.arch,
            "activation": self.activation,
            "activation_threshold": self.activation_threshold,
            "type": self.type,
            "n_tensors": self.n_tensors,
            "n_weights": self.n_weights,
            "n_bytes": self.n_bytes,
            "seconds": self.seconds,
            "tokenizer": asdict(self.tokenizer) if self.tokenizer else None,
            "notes": list(self.notes),
        }


@dataclass(frozen=True)
class _Source:
    """A source that has been read so far that nothing but its weights is left to read."""

    plan: ConvertPlan
    precision: str
    """the plain type that holds every weight exactly"""
    add_tokenizer: Callable[[GGUFWriter], TokenizerReport | None]


def convert(source: Path, options: ConvertOptions, progress: Progress) -> ConvertReport:
    """Writes the GGUF. Raises PinferError before anything is written where the source cannot be converted."""
    started = time.monotonic()
    opened = _open(source, options.activation)
    type_ = options.type or ("f16" if is_checkpoint(source) else opened.precision)
    name = options.name or _stem(source)
    out = options.out or Path(f"{name}-{type_.upper()}.gguf")
    _require_free_name(out, source, options.force)
    plan = opened.plan
    plain = type_ if type_ in PLAIN else opened.precision
    n_weights = sum(_n_values(tensor) for tensor in plan.tensors)
    with GgufFileWriter(out, plan.arch, elsewhere="write to another disk: -o FILE") as writer:
        tokenizer = opened.add_tokenizer(writer.header)
        plan.add_metadata(writer.header)
        _add_own_keys(plan, plain, name, writer.header)
        for tensor in plan.tensors:
            writer.declare(tensor.name, tensor.shape, _file_type(tensor, plain))
        writer.begin(also=0 if type_ in PLAIN else estimated_bytes(n_weights, type_))
        writer.reserve()
        _require_loadable(writer.temporary, source)
        _write(plan, plain, writer, progress)
        if type_ not in PLAIN:
            writer.finish()
            _quantise_in_place(writer, type_, n_weights, options.n_threads, progress)
    model = open_model(out)
    return ConvertReport(
        path=out,
        source=source,
        arch=plan.arch,
        activation=model.activation,
        activation_threshold=model.activation_threshold,
        type=type_,
        n_tensors=len(plan.tensors),
        n_weights=n_weights,
        n_bytes=out.stat().st_size,
        seconds=time.monotonic() - started,
        tokenizer=tokenizer,
        notes=(*plan.notes, *(tokenizer.notes if tokenizer else ())),
    )


def _require_loadable(written: Path, source: Path) -> None:
    """libllama reads the header, so that nothing of a model's weights is written in vain."""
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
        raise PinferError(f"{source} does not exist", "name a checkpoint folder, or one of the hub: -hf USER/REPO")
    raise PinferError(
        f"{source} is neither a checkpoint folder nor a PowerInfer file",
        f"a GGUF needs no conversion: pinfer show {source}",
    )


def _open_checkpoint(checkpoint: Checkpoint, activation: str | None) -> _Source:
    from pinfer.convert_tokenizer import add_tokenizer
    from pinfer.families import plan_checkpoint

    plan = plan_checkpoint(checkpoint, activation)
    dtypes = {tensor.dtype for tensor in checkpoint.tensors.values()}
    precision = {"F16": "f16", "BF16": "bf16"}.get(dtypes.pop(), "f32") if len(dtypes) == 1 else "f32"
    n_vocab = next((tensor.shape[1] for tensor in plan.tensors if tensor.name == "token_embd.weight"), 0)
    if not n_vocab:
        raise PinferError(f"{checkpoint.folder} has no embedding of tokens", "download the checkpoint again")

    def tokenizer(header: GGUFWriter) -> TokenizerReport:
        return add_tokenizer(checkpoint.folder, checkpoint.config, n_vocab, header)

    return _Source(plan, precision, tokenizer)


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
    header.add_file_type(PLAIN[type_][1])
    header.add_quantization_version(2)
    if plan.names_activation:
        header.add_string(ACTIVATION_KEY, plan.activation)
    if plan.activation_threshold:
        header.add_float32(THRESHOLD_KEY, plan.activation_threshold)


def _n_values(tensor: PlannedTensor) -> int:
    n = 1
    for extent in tensor.shape:
        n *= extent
    return n


def _file_type(tensor: PlannedTensor, plain: str) -> str:
    """As llama.cpp has it: vectors in F32, matrices in the type asked for."""
    if tensor.type_name is not None:
        return tensor.type_name
    return PLAIN[plain][0] if len(tensor.shape) > 1 else "F32"


def _write(plan: ConvertPlan, plain: str, writer: GgufFileWriter, progress: Progress) -> None:
    total = sum(tensor.n_source_bytes for tensor in plan.tensors)
    with progress.task("converting", total, "bytes") as advance:
        for tensor in plan.tensors:
            if tensor.raw is not None:
                writer.write(tensor.name, tensor.raw())
            else:
                _write_values(tensor, _file_type(tensor, plain), writer)
            advance(tensor.n_source_bytes)


def _write_values(tensor: PlannedTensor, type_name: str, writer: GgufFileWriter) -> None:
    """Values of one tensor, converted piece by piece."""
    assert tensor.load is not None
    values = tensor.load()
    if values.shape != tensor.shape[::-1]:
        raise AssertionError(f"{tensor.name} has shape {values.shape} instead of {tensor.shape[::-1]}")
    rows = max(1, _CHUNK // tensor.shape[0]) if values.ndim > 1 else len(values)
    for start in range(0, len(values), rows):
        writer.write(tensor.name, _encode(tensor.name, values[start : start + rows], type_name))


def _encode(name: str, values: NDArray[Any], type_name: str) -> NDArray[Any]:
    import numpy as np

    plain = values.astype(np.float32)
    largest = float(np.abs(plain).max(initial=0.0))  # NaN if there is one
    if not np.isfinite(largest):
        raise PinferError(f"{name} holds NaN or infinity", "download the checkpoint again")
    if type_name == "F16" and largest > _F16_MAX:
        raise PinferError(f"{name} holds {largest:g}, which F16 cannot", "convert to another type: --type bf16")
    if type_name == "F32":
        return plain
    if type_name == "F16":
        return plain.astype(np.float16)
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    return quantize(plain, GGMLQuantizationType[type_name])


def _quantise_in_place(
    writer: GgufFileWriter, type_: str, n_weights: int, n_threads: int | None, progress: Progress
) -> None:
    """Replaces the finished temporary file of ``writer`` by its quantised form."""
    from pinfer.engine import physical_cores

    smaller = writer.temporary.with_name(f".{writer.path.name}.{type_}.{os.getpid()}.tmp")
    try:
        quantise(writer.temporary, smaller, type_, n_weights, n_threads or physical_cores(), progress)
        os.replace(smaller, writer.temporary)
    finally:
        smaller.unlink(missing_ok=True)
