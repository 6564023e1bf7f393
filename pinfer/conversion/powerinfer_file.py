"""PowerInfer's model files (``*.powerinfer.gguf``): what is in them, and the GGUF that libllama opens.

Such a file is GGUF except for its first four bytes, with the keys llama.cpp wrote in 2023. Its down matrices are
transposed, so that a neuron is a row of every FFN matrix, and each layer has the two matrices of a predictor
(powerinfer_predictor.py). All other tensors are copied byte for byte.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter
from numpy.typing import NDArray

from pinfer.conversion.plan import ConvertPlan, PlannedTensor
from pinfer.errors import PinferError
from pinfer.gguf_io.reader import GgufError, GgufFile, Tensor, read_gguf, type_size
from pinfer.llama import ggml

MAGIC = b"PWRI"
SPARSE_THRESHOLD_KEY = "powerinfer.sparse_threshold"

# Values of a block of Q4_0 and Q8_0.
_BLOCK = 32

# Columns of a transposed down matrix that are float32 at a time, a multiple of _BLOCK.
_CHUNK_COLUMNS = 256

# OPT's files have no epsilon for the layer norms; this is the one in OPT's code.
_OPT_NORM_EPSILON = 1e-5
# OPT counts positions from 2 on: the first rows of its table are not used.
_OPT_OFFSET = 2
_OPT_BOS = "</s>"

_LAYER = re.compile(r"blk\.(\d+)\.(.+)")
_LEFT_OUT = re.compile(r"rope_freqs\.weight|blk\.\d+\.(attn_rot_embd|fc1|fc2)\.weight")
"""frequencies, which follow from the metadata, and the predictor"""


@dataclass(frozen=True)
class _Architecture:
    """What one of PowerInfer's architectures becomes, and its tensors by their new names."""

    becomes: str
    activation: str
    pre_tokenizer: str
    """of BPE vocabularies; files from before 2024 do not name theirs"""
    outside: frozenset[str]
    """needed tensors outside the layers; ``output.weight`` is optional"""
    needed: frozenset[str]
    """needed tensors of a layer"""
    optional: frozenset[str] = frozenset()


def _names(*parts: str) -> frozenset[str]:
    """``a`` is ``a.weight``, ``a+b`` is that and ``a.bias``."""
    return frozenset(f"{part.removesuffix('+b')}.weight" for part in parts) | frozenset(
        f"{part.removesuffix('+b')}.bias" for part in parts if part.endswith("+b")
    )


_LLAMA_LAYER = _names(
    "attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_up", "ffn_down"
)
_LLAMA_BIASES = frozenset(f"attn_{part}.bias" for part in ("q", "k", "v", "output"))
_LLAMA_OUTSIDE = _names("token_embd", "output_norm")
_ARCHITECTURES = {
    "llama": _Architecture("llama", "reglu", "default", _LLAMA_OUTSIDE, _LLAMA_LAYER, _LLAMA_BIASES),
    "bamboo": _Architecture("llama", "drelu", "default", _LLAMA_OUTSIDE, _LLAMA_LAYER, _LLAMA_BIASES),
    "falcon": _Architecture(
        "falcon",
        "relu",
        "falcon",
        _names("token_embd", "output_norm+b"),
        _names("attn_norm+b", "attn_qkv", "attn_output", "ffn_up", "ffn_down"),
        _names("attn_norm_2+b"),
    ),
    "opt": _Architecture(
        "gpt2",
        "relu",
        "gpt-2",
        _names("token_embd", "position_embd", "output_norm+b"),
        _names("attn_norm+b", "attn_qkv+b", "attn_output+b", "ffn_norm+b", "ffn_up+b", "ffn_down+b"),
    ),
}


def is_powerinfer(path: Path) -> bool:
    """Whether ``path`` is a file with PowerInfer's first four bytes."""
    try:
        with open(path, "rb") as file:
            return file.read(len(MAGIC)) == MAGIC
    except OSError:
        return False


@dataclass(frozen=True)
class PowerInferFile:
    """A PowerInfer file whose header has been read and checked."""

    path: Path
    gguf: GgufFile
    arch: str
    """``llama``, ``falcon``, ``bamboo`` or ``opt``"""
    n_layer: int
    n_embd: int
    n_ff: int

    @property
    def sparse_threshold(self) -> float:
        """PowerInfer computes a neuron if its score exceeds this."""
        value = self.gguf.get(SPARSE_THRESHOLD_KEY)
        return float(value) if isinstance(value, int | float) else 0.0

    def predictor_rank(self, layer: int) -> int:
        """Hidden neurons of a layer's predictor; 0 if it has none."""
        fc1 = self.gguf.tensors.get(f"blk.{layer}.fc1.weight")
        return fc1.n_rows if fc1 else 0

    def predictor(self, layer: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """A layer's predictor: fc1 ``[rank, n_embd]`` and fc2 ``[n_ff, rank]``; the score is fc2·relu(fc1·x)."""
        fc1, fc2 = (self.values(f"blk.{layer}.{name}.weight") for name in ("fc1", "fc2"))
        return fc1, fc2

    def values(self, name: str) -> NDArray[np.float32]:
        """A tensor as float32, ``[n_rows, row_length]``."""
        tensor = self.gguf.tensors[name]
        return ggml.dequantise(self.gguf.raw(tensor), tensor.type, tensor.row_length)


def open_powerinfer(path: Path) -> PowerInferFile:
    """Reads and checks the header of a PowerInfer file. Raises PinferError for other and for damaged files."""
    try:
        gguf = read_gguf(path, MAGIC)
        file = _describe(path, gguf)
        _check_predictor(file)
        return file
    except GgufError as error:
        raise PinferError(f"{path} cannot be converted: {error}", "get the PowerInfer file again") from None
    except OSError as error:
        raise PinferError(f"{path} cannot be read: {error.strerror or error}", "check the path") from None


def _describe(path: Path, gguf: GgufFile) -> PowerInferFile:
    arch = gguf.get("general.architecture")
    if arch not in _ARCHITECTURES:
        raise GgufError(f"its architecture is {arch!r} ({', '.join(_ARCHITECTURES)} are known)")
    n_layer, n_embd = (_count(gguf, f"{arch}.{key}") for key in ("block_count", "embedding_length"))
    if n_layer > len(gguf.tensors):
        raise GgufError(f"it has {len(gguf.tensors)} tensors for {n_layer} layers")
    up = gguf.tensors.get("blk.0.ffn_up.weight")
    if up is None:
        raise GgufError("it has no tensor blk.0.ffn_up.weight")
    return PowerInferFile(path, gguf, arch, n_layer, n_embd, up.n_rows)


def _count(gguf: GgufFile, key: str) -> int:
    value = gguf.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 1 << 24:
        raise GgufError(f"its {key} is {'missing' if value is None else 'not valid'}")
    return value


def _check_predictor(file: PowerInferFile) -> None:
    """Each layer has both matrices or none, in the right shapes."""
    for layer in range(file.n_layer):
        rank = file.predictor_rank(layer)
        for name, shape in (("fc1", (file.n_embd, rank)), ("fc2", (rank, file.n_ff))):
            found = file.gguf.tensors.get(f"blk.{layer}.{name}.weight")
            if found is None and rank:
                raise GgufError(f"it has no tensor blk.{layer}.{name}.weight")
            if found is not None and found.shape != shape:
                raise GgufError(f"tensor {found.name} has shape {list(found.shape)}, not {list(shape)}")


def plan_powerinfer(path: Path) -> ConvertPlan:
    """How the PowerInfer file ``path`` becomes a model for libllama. Raises PinferError for what cannot be one."""
    file = open_powerinfer(path)
    architecture = _ARCHITECTURES[file.arch]
    try:
        tensors = _plan_tensors(file, architecture)
        values = _values(file, architecture, {t.name: t for t in tensors})
    except GgufError as error:
        raise PinferError(f"{path} cannot be converted: {error}", "get the PowerInfer file again") from None
    ranks = [file.predictor_rank(layer) for layer in range(file.n_layer)]
    return ConvertPlan(
        arch=architecture.becomes,
        activation=architecture.activation,
        add_metadata=lambda out: _add_metadata(file, architecture.becomes, values, out),
        tensors=tensors,
        notes=() if any(ranks) else (f"{path.name} has no predictor",),
        settings={
            "source_format": "powerinfer",
            "source_architecture": file.arch,
            "source_type": file.gguf.tensors["blk.0.ffn_up.weight"].type_name.lower(),
            "predictor_rank": max(ranks),
        },
    )


def _plan_tensors(file: PowerInferFile, architecture: _Architecture) -> list[PlannedTensor]:
    """In the file's order, so that it is read from beginning to end."""
    planned: list[PlannedTensor] = []
    for tensor in file.gguf.tensors.values():
        if _LEFT_OUT.fullmatch(tensor.name):
            continue
        if file.arch == "opt":
            planned += _plan_opt(file, tensor)
        else:
            planned.append(_plan_one(file, tensor))
    if file.arch == "opt":
        planned += _missing_biases(file, architecture, {t.name for t in planned})
    _check_names(file, architecture, [t.name for t in planned])
    return planned


def _check_names(file: PowerInferFile, architecture: _Architecture, names: list[str]) -> None:
    known = architecture.outside | {"output.weight"}
    for name in names:
        match = _LAYER.fullmatch(name)
        if match and int(match[1]) < file.n_layer:
            fits = match[2] in architecture.needed | architecture.optional
        else:
            fits = name in known
        if not fits:
            raise GgufError(f"it has a tensor {name}, which {file.arch} models do not have")
    layers = (f"blk.{layer}.{name}" for layer in range(file.n_layer) for name in sorted(architecture.needed))
    present = set(names)
    for name in (*sorted(architecture.outside), *layers):
        if name not in present:
            raise GgufError(f"it has no tensor {name}")
    if len(present) < len(names):
        raise GgufError("it has a matrix both as it is and transposed")


def _plan_one(file: PowerInferFile, tensor: Tensor) -> PlannedTensor:
    """A tensor as it is, or a transposed down matrix turned back."""
    _check_shape(file, tensor)
    if not tensor.name.endswith("ffn_down_t.weight"):
        # In OPT's files the down bias is named after the transposed matrix.
        return _as_it_is(tensor.name.replace("ffn_down_t", "ffn_down"), tensor, partial(_raw, file, tensor))
    type_name = _down_type(tensor)
    return PlannedTensor(
        name=tensor.name.replace("ffn_down_t", "ffn_down"),
        shape=tensor.shape[::-1],
        n_source_bytes=tensor.n_bytes,
        raw=partial(_transposed, file, tensor, type_name),
        type_name=type_name,
    )


def _as_it_is(name: str, tensor: Tensor, raw: Callable[[], NDArray[np.uint8]]) -> PlannedTensor:
    return PlannedTensor(name, tensor.shape, tensor.n_bytes, raw=raw, type_name=tensor.type_name)


def _check_shape(file: PowerInferFile, tensor: Tensor) -> None:
    """Checks FFN matrices, which pinfer computes; libllama checks all others against its graph."""
    shapes = {
        "ffn_gate.weight": (file.n_embd, file.n_ff),
        "ffn_up.weight": (file.n_embd, file.n_ff),
        "ffn_down_t.weight": (file.n_embd, file.n_ff),
        "ffn_down.weight": (file.n_ff, file.n_embd),
    }
    match = _LAYER.fullmatch(tensor.name)
    wanted = shapes.get(match[2]) if match else None
    if wanted is not None and tensor.shape != wanted:
        raise GgufError(f"tensor {tensor.name} has shape {list(tensor.shape)}, not {list(wanted)}")


def _raw(file: PowerInferFile, tensor: Tensor) -> NDArray[np.uint8]:
    file.gguf.release()  # the pages of the tensor before
    return file.gguf.raw(tensor)


def _down_type(tensor: Tensor) -> str:
    """The type of a down matrix that is turned back: plain numbers keep theirs, blocks have to be quantised again.

    Q8_0 is used because, for models/tiny-reglu.gguf in Q4_0 with a KL divergence of 0.04 from its original, it adds
    0.0003, most of it from rounding FFN activations (F16 adds 0.0002). Q4_0 would add 0.003 and change the most likely
    token at one position in twenty.
    """
    if tensor.type_name in ("F32", "F16"):
        return tensor.type_name
    if not ggml.can_dequantise(tensor.type):
        raise GgufError(f"tensor {tensor.name} is of type {tensor.type_name}, which cannot be read as numbers")
    return "Q8_0" if tensor.n_rows % _BLOCK == 0 else "F16"


def _transposed(file: PowerInferFile, tensor: Tensor, type_name: str) -> NDArray[np.uint8]:
    """The bytes of the transpose of a matrix, computed some columns at a time."""
    source = _raw(file, tensor)
    if type_name == tensor.type_name:
        return np.ascontiguousarray(file.gguf.array(tensor).T).view(np.uint8)
    block, size = type_size(tensor.type)
    kind = GGMLQuantizationType[type_name]
    out_block, out_size = type_size(kind)
    row_bytes = tensor.n_rows // out_block * out_size
    out = np.empty((tensor.row_length, row_bytes), dtype=np.uint8)
    for begin in range(0, tensor.row_length, _CHUNK_COLUMNS):
        end = min(begin + _CHUNK_COLUMNS, tensor.row_length)
        columns = source[:, begin // block * size : end // block * size]
        values = ggml.dequantise(columns, tensor.type, end - begin).T
        out[begin:end] = ggml.quantise(values, kind, row_bytes)
    return out


def _plan_opt(file: PowerInferFile, tensor: Tensor) -> Iterator[PlannedTensor]:
    """The gpt2 graph needs one matrix for query, key and value, and positions from the first row on."""
    match = re.fullmatch(r"(blk\.\d+\.)attn_([qkv])(\.weight|\.bias)", tensor.name)
    if tensor.name == "position_embd.weight":
        skipped = _offset_rows(tensor)
        yield PlannedTensor(
            name=tensor.name,
            shape=(tensor.row_length, tensor.n_rows - skipped),
            n_source_bytes=tensor.n_bytes,
            raw=lambda: _raw(file, tensor)[skipped:],
            type_name=tensor.type_name,
        )
    elif match is None:
        yield _plan_one(file, tensor)
    elif match[2] == "q":
        names = [f"{match[1]}attn_{part}{match[3]}" for part in "qkv"]
        yield _fused(file, f"{match[1]}attn_qkv{match[3]}", [_needed(file.gguf, name) for name in names])


def _offset_rows(positions: Tensor) -> int:
    """Unused rows of the position table: those it has beyond a power of two, which the context is."""
    n = positions.n_rows
    return 0 if n <= _OPT_OFFSET or n & (n - 1) == 0 else _OPT_OFFSET


def _needed(gguf: GgufFile, name: str) -> Tensor:
    if name not in gguf.tensors:
        raise GgufError(f"it has no tensor {name}")
    return gguf.tensors[name]


def _fused(file: PowerInferFile, name: str, parts: list[Tensor]) -> PlannedTensor:
    """Matrices or biases concatenated along their rows."""
    first = parts[0]
    if any((t.type, t.shape) != (first.type, first.shape) for t in parts):
        raise GgufError(f"its {', '.join(t.name for t in parts)} differ in shape or type")

    def raw() -> NDArray[np.uint8]:
        file.gguf.release()
        return np.concatenate([file.gguf.raw(t) for t in parts], axis=1 if len(first.shape) == 1 else 0)

    return PlannedTensor(
        name=name,
        shape=(*first.shape[:-1], first.shape[-1] * len(parts)),
        n_source_bytes=sum(t.n_bytes for t in parts),
        raw=raw,
        type_name=first.type_name,
    )


def _missing_biases(file: PowerInferFile, architecture: _Architecture, names: set[str]) -> Iterator[PlannedTensor]:
    """Zeros for biases that the graph adds and the model lacks."""
    lengths = {"attn_qkv.bias": 3 * file.n_embd, "ffn_up.bias": file.n_ff}
    wanted = [f"blk.{i}.{name}" for i in range(file.n_layer) for name in sorted(architecture.needed)]
    for name in (*wanted, "output_norm.bias"):
        # If the matrix is missing as well, that is the error to report.
        if not name.endswith(".bias") or name in names or name.replace(".bias", ".weight") not in names:
            continue
        yield PlannedTensor.constant(name, lengths.get(name.split(".", 2)[-1], file.n_embd), 0.0)


def _values(
    file: PowerInferFile, architecture: _Architecture, tensors: dict[str, PlannedTensor]
) -> dict[str, str | int | float | bool]:
    """Metadata that libllama needs today and that the file lacks or has differently."""
    gguf, to = file.gguf, architecture.becomes
    model = gguf.get("tokenizer.ggml.model")
    if not isinstance(model, str) or not gguf.count("tokenizer.ggml.tokens"):
        raise GgufError("it has no tokenizer")
    _count(gguf, f"{file.arch}.attention.head_count")
    values: dict[str, str | int | float | bool] = {}
    if f"{file.arch}.feed_forward_length" not in gguf:
        values[f"{to}.feed_forward_length"] = file.n_ff
    if model == "gpt2":
        if not gguf.count("tokenizer.ggml.merges"):
            raise GgufError("its tokenizer has no merges")
        if "tokenizer.ggml.pre" not in gguf:
            values["tokenizer.ggml.pre"] = architecture.pre_tokenizer
    if file.arch == "opt":
        values["gpt2.context_length"] = tensors["position_embd.weight"].shape[1]
        if "opt.attention.layer_norm_epsilon" not in gguf:
            values["gpt2.attention.layer_norm_epsilon"] = _OPT_NORM_EPSILON
        values |= _opt_beginning(gguf)
    return values


def _opt_beginning(gguf: GgufFile) -> dict[str, int | bool]:
    """OPT's texts begin with ``</s>``; without these keys libllama puts nothing before them."""
    values: dict[str, int | bool] = {}
    if "tokenizer.ggml.bos_token_id" not in gguf:
        tokens = gguf.get("tokenizer.ggml.tokens")
        if _OPT_BOS not in tokens:
            return values
        values["tokenizer.ggml.bos_token_id"] = tokens.index(_OPT_BOS)
    if "tokenizer.ggml.add_bos_token" not in gguf:
        values["tokenizer.ggml.add_bos_token"] = True
    return values


_NOT_COPIED = (
    "general.architecture",
    "general.file_type",
    "general.alignment",
    "general.name",
    "general.quantization_version",
)


def _add_metadata(file: PowerInferFile, to: str, values: dict[str, str | int | float | bool], out: GGUFWriter) -> None:
    """The file's keys, those of its architecture renamed, and ``values``, which override them."""
    keys = file.gguf.keys()
    for key in keys:
        prefix, _, rest = key.partition(".")
        name = f"{to}.{rest}" if prefix == file.arch else key
        if key in _NOT_COPIED or prefix in ("powerinfer", "split", "pinfer") or name in values:
            continue
        found = file.gguf.typed(key)
        if found.item_type is None:
            out.add_key_value(name, found.value, GGUFValueType(found.type))
        elif found.value:  # the writer has no empty arrays
            out.add_key_value(name, found.value, GGUFValueType(found.type), GGUFValueType(found.item_type))
    kinds = {bool: "BOOL", int: "UINT32", float: "FLOAT32", str: "STRING"}
    for name, value in values.items():
        out.add_key_value(name, value, GGUFValueType[kinds[type(value)]])
