"""Writes PowerInfer files as its own converter does, from plain matrices."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

from pinfer.gguf_io.reader import TypedValue, read_gguf, type_size
from pinfer.llama import ggml

Matrix = NDArray[np.float32]

# Of these the second word of the key is the architecture's.
TOKENIZER = "tokenizer."


@dataclass(frozen=True)
class Weights:
    """A model as libllama has it: names of GGUF tensors, values ``[rows, row length]`` or ``[row length]``."""

    arch: str
    keys: Mapping[str, TypedValue]
    tensors: Mapping[str, Matrix]
    predictors: Mapping[int, tuple[Matrix, Matrix]] = field(default_factory=dict)
    """by layer: fc1 ``[rank, n_embd]`` and fc2 ``[n_ff, rank]``"""

    def with_predictors(self, predictors: Mapping[int, tuple[Matrix, Matrix]]) -> Weights:
        """The same model with other predictors."""
        return replace(self, predictors=predictors)


def value(item: str | int | float | bool) -> TypedValue:
    """A metadata value with its usual GGUF type."""
    kinds = {bool: gguf.GGUFValueType.BOOL, int: gguf.GGUFValueType.UINT32, float: gguf.GGUFValueType.FLOAT32}
    return TypedValue(kinds.get(type(item), gguf.GGUFValueType.STRING), None, item)


def read_weights(path: Path) -> Weights:
    """A model from its GGUF."""
    file = read_gguf(path)
    tensors = {}
    for tensor in file.tensors.values():
        rows = ggml.dequantise(file.raw(tensor), tensor.type, tensor.row_length)
        tensors[tensor.name] = rows if len(tensor.shape) > 1 else rows.reshape(-1)
    left_out = ("general.architecture", "general.file_type", "pinfer.ffn.activation")
    keys = {key: file.typed(key) for key in file.keys() if key not in left_out}  # noqa: SIM118
    return Weights(file.get("general.architecture"), keys, tensors)


def write_model(path: Path, weights: Weights, kind: str, activation: str, down_kind: str | None = None) -> Path:
    """The GGUF that libllama opens, with matrices of type ``kind``."""
    out = _writer(path, weights)
    out.add_string("pinfer.ffn.activation", activation)
    for name, values in weights.tensors.items():
        _add(out, name, values, down_kind or kind if "ffn_down.weight" in name else kind)
    return _finish(out, path)


def write_powerinfer(path: Path, weights: Weights, kind: str, threshold: float | None = None) -> Path:
    """The PowerInfer file: the predictors, down matrices transposed, and another magic."""
    out = _writer(path, weights)
    if threshold is not None:
        out.add_float32("powerinfer.sparse_threshold", threshold)
    for layer, (fc1, fc2) in weights.predictors.items():
        _add(out, f"blk.{layer}.fc1.weight", fc1, kind)
        _add(out, f"blk.{layer}.fc2.weight", fc2, kind)
    for name, values in weights.tensors.items():
        # PowerInfer's converter renames whatever is of the down projection, and transposes it.
        _add(out, name.replace("ffn_down", "ffn_down_t"), values.T if "ffn_down" in name else values, kind)
    _finish(out, path)
    with open(path, "r+b") as file:
        file.write(b"PWRI")
    return path


def _writer(path: Path, weights: Weights) -> gguf.GGUFWriter:
    out = gguf.GGUFWriter(path, weights.arch)
    for key, typed in weights.keys.items():
        item = gguf.GGUFValueType(typed.item_type) if typed.item_type is not None else None
        out.add_key_value(key, typed.value, gguf.GGUFValueType(typed.type), item)
    return out


def _add(out: gguf.GGUFWriter, name: str, values: Matrix, kind_name: str) -> None:
    """Vectors stay F32; rows that do not divide into blocks become F16."""
    kind = gguf.GGMLQuantizationType["F32" if values.ndim == 1 else kind_name]
    block, size = type_size(kind)
    if values.shape[-1] % block:
        kind = gguf.GGMLQuantizationType.F16
        block, size = type_size(kind)
    rows = ggml.quantise(np.atleast_2d(np.ascontiguousarray(values)), kind, values.shape[-1] // block * size)
    out.add_tensor(name, rows if values.ndim > 1 else rows.reshape(-1), raw_dtype=kind)


def _finish(out: gguf.GGUFWriter, path: Path) -> Path:
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path
