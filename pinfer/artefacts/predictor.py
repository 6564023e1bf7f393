"""predictor.gguf: per FFN the factors and thresholds that select the candidates (docs/formats.md)."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Self

import numpy as np
from numpy.typing import NDArray

from pinfer.artefacts.artefact import Artefact, ArtefactWriter, open_artefact
from pinfer.gguf_io.reader import row_bytes, type_number
from pinfer.llama import ggml

if TYPE_CHECKING:
    from pinfer.model import Ffn, Model

# Types of A and B by the name that --type has for them.
FACTOR_TYPES = {"f16": ("f16", "f16"), "q8_0": ("q8_0", "q8_0"), "q4_0": ("q4_0", "q4_0")}

# Bits of a weight in the kinds that copy the matrix.
FEW_BITS = {"one_bit": 1, "two_bit": 2}
KINDS = ("low_rank", "mlp", *FEW_BITS, "none")
# The matrices of experts are close to full rank, so only copies pay.
STACK_KINDS = (*FEW_BITS, "none")


@dataclass(frozen=True)
class LayerPredictor:
    """One FFN: neuron i is a candidate if ``(B (A x + c))_i > t_i``; with rank 0 every neuron is one."""

    rank: int
    recall: float
    """measured share of the activation mass that the candidates keep"""
    candidates: float
    """measured share of neurons that are candidates"""
    a: NDArray[np.float32] | None = None
    """``[rank, n_embd]``; None where B is multiplied by x itself"""
    b: NDArray[Any] | None = None
    """``[n_neurons, rank]`` float32, or for few bits also as they are packed, uint8"""
    t: NDArray[np.float32] | None = None
    """``[n_neurons]``"""
    kind: str = "low_rank"
    """its name in the file; ``none`` if the rank is 0"""
    types: tuple[str, str] | None = None
    """of A and B, if they differ from the other layers'"""
    c: NDArray[np.float32] | None = None
    """``[rank]``; None: 0"""


@dataclass(frozen=True)
class PredictorFile:
    """predictor.gguf, opened and checked; ``layer`` dequantises the factors. All lists are by FFN."""

    artefact: Artefact
    names: tuple[str, ...]
    kind: tuple[str, ...]
    rank: tuple[int, ...]
    recall: tuple[float, ...]
    candidates: tuple[float, ...]

    @staticmethod
    def read(path: Path, model: Model) -> PredictorFile:
        """Raises PinferError when the file is missing, damaged or of another model."""
        artefact = open_artefact(path, "predictor", model)
        n = len(model.ffns)
        kind = tuple(str(k) for k in artefact.get_list("pinfer.predictor.kind", n))
        rank = tuple(int(r) for r in artefact.get_list("pinfer.predictor.rank", n))
        for f, k, r in zip(model.ffns, kind, rank, strict=True):
            if k not in (STACK_KINDS if f.is_stack else KINDS) or (k == "none") != (r == 0):
                raise artefact.damaged(f"{f.title} has a predictor of kind {k!r} and rank {r}")
            if r:
                for name, shape in _shapes(k, r, f, constant=artefact.has(f"{f.name}.pred_c")).items():
                    found = artefact.tensor(f"{f.name}.pred_{name}").shape
                    if found != shape:
                        raise artefact.damaged(f"{f.name}.pred_{name} has shape {list(found)} instead of {list(shape)}")
        return PredictorFile(
            artefact,
            tuple(f.name for f in model.ffns),
            kind,
            rank,
            _shares(artefact, "pinfer.predictor.recall", n),
            _shares(artefact, "pinfer.predictor.candidates", n),
        )

    def n_bytes(self, i: int) -> int:
        """Bytes of the tensors of FFN ``i``; 0 without a predictor."""
        names = (f"{self.names[i]}.pred_{part}" for part in "abct")
        return sum(self.artefact.tensor(name).n_bytes for name in names if self.artefact.has(name))

    def layer(self, i: int) -> LayerPredictor:
        """FFN ``i`` with its factors as float32."""
        from pinfer.llama import ggml

        if not self.rank[i]:
            return LayerPredictor(0, self.recall[i], self.candidates[i], kind="none")
        kind, rank, name = self.kind[i], self.rank[i], self.names[i]
        t = self.artefact.array(f"{name}.pred_t", type_name="F32")
        if kind in FEW_BITS:
            codes = self.artefact.array(f"{name}.pred_b", type_name="I8")
            levels = unpacked(codes, FEW_BITS[kind])
            return LayerPredictor(rank, self.recall[i], self.candidates[i], None, levels, t, kind)

        def factor(which: str) -> NDArray[np.float32]:
            tensor = self.artefact.tensor(f"{name}.pred_{which}")
            return ggml.dequantise(self.artefact.raw(tensor.name), tensor.type, tensor.row_length)

        has_c = self.artefact.has(f"{name}.pred_c")
        c = self.artefact.array(f"{name}.pred_c", type_name="F32") if has_c else None
        return LayerPredictor(rank, self.recall[i], self.candidates[i], factor("a"), factor("b"), t, kind, c=c)


def _shares(artefact: Artefact, key: str, n: int) -> tuple[float, ...]:
    values = artefact.get_list(key, n)
    if not all(isinstance(value, float) and 0 <= value <= 1 for value in values):
        raise artefact.damaged(f"its {key} has values outside 0..1")
    return tuple(values)


def _shapes(kind: str, rank: int, ffn: Ffn, *, constant: bool) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of an FFN, by the end of their names."""
    n = ffn.n_neurons
    if kind in FEW_BITS:
        return {"b": (ffn.n_embd * FEW_BITS[kind] // 8, n), "t": (n,)}
    return {"a": (ffn.n_embd, rank), "b": (rank, n), **({"c": (rank,)} if constant else {}), "t": (n,)}


class PredictorWriter:
    """Writes predictor.gguf. Its header needs the ranks of all layers, so factors wait in an unnamed temporary file.

    Use it as a context manager. Raises PinferError or OSError when the disk is full or cannot be written.
    """

    def __init__(self, path: Path, model: Model, factor_type: str) -> None:
        self._path = path
        self._model = model
        self._file_types = FACTOR_TYPES[factor_type]
        self._layers: list[LayerPredictor] = []  # without their factors, but for c
        self._pieces: list[tuple[str, int]] = []  # tensor name, bytes, in the spool's order
        self._spool: IO[bytes] = tempfile.TemporaryFile(dir=path.parent)  # noqa: SIM115 (closed by __exit__)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # Closing flushes, which fails on a full disk; the data is not needed any more.
        with suppress(OSError):
            self._spool.close()

    def add(self, layer: LayerPredictor) -> None:
        """The next FFN. Its factors hold values that the factor type can represent (see ``quantised``)."""
        ffn = self._model.ffns[len(self._layers)]
        kind = layer.kind if layer.rank else "none"
        types = self._types(layer)
        self._layers.append(
            LayerPredictor(layer.rank, layer.recall, layer.candidates, kind=kind, types=types, c=layer.c)
        )
        if not layer.rank:
            return
        if layer.b is None or layer.t is None or (layer.a is None) != (layer.kind in FEW_BITS):
            raise ValueError("a predictor without its factors")
        data_of: dict[str, NDArray[Any]]
        if layer.a is None:
            codes = layer.b if layer.b.dtype == np.uint8 else packed(layer.b, FEW_BITS[layer.kind])
            data_of = {"b": codes, "t": layer.t}
        else:
            constant = {} if layer.c is None else {"c": layer.c}
            data_of = {"a": quantise(layer.a, types[0]), "b": quantise(layer.b, types[1]), **constant, "t": layer.t}
        for name, data in data_of.items():
            self._pieces.append((f"{ffn.name}.pred_{name}", data.nbytes))
            self._spool.write(data.tobytes())

    def _types(self, layer: LayerPredictor) -> tuple[str, str]:
        """Names of ggml types."""
        a, b = layer.types or self._file_types
        return a.upper(), b.upper()

    def finish(self, settings: Mapping[str, object]) -> int:
        """Writes the complete file or none; returns the bytes of its tensors."""
        with ArtefactWriter(self._path, "predictor", self._model, settings) as out:
            out.add_str_array("pinfer.predictor.kind", [layer.kind for layer in self._layers])
            out.add_u32_array("pinfer.predictor.rank", [layer.rank for layer in self._layers])
            out.add_f32_array("pinfer.predictor.recall", [layer.recall for layer in self._layers])
            out.add_f32_array("pinfer.predictor.candidates", [layer.candidates for layer in self._layers])
            for ffn, layer in zip(self._model.ffns, self._layers, strict=True):
                few = layer.kind in FEW_BITS
                a, b = self._types(layer)
                types = {"a": a, "b": "I8" if few else b, "c": "F32", "t": "F32"}
                shapes = _shapes(layer.kind, layer.rank, ffn, constant=layer.c is not None) if layer.rank else {}
                for name, shape in shapes.items():
                    out.declare(f"{ffn.name}.pred_{name}", shape, types[name])
            self._spool.seek(0)
            for name, n_bytes in self._pieces:
                out.write(name, self._spool.read(n_bytes))
            return out.n_bytes


def quantise(rows: NDArray[np.float32], factor_type: str) -> NDArray[Any]:
    """Rows in a factor type, as bytes or half floats."""
    if factor_type.upper() == "F16":
        return rows.astype(np.float16)
    return ggml.quantise(rows, type_number(factor_type), row_bytes(factor_type, rows.shape[1]))


def quantised(rows: NDArray[np.float32], factor_type: str) -> NDArray[np.float32]:
    """``rows`` after a round trip through a factor type; another round trip changes nothing."""
    data = quantise(rows, factor_type)
    if factor_type.upper() == "F16":
        return data.astype(np.float32)
    return ggml.dequantise(data, type_number(factor_type), rows.shape[1])


def packed(levels: NDArray[np.float32], bits: int) -> NDArray[np.uint8]:
    """Odd levels ``[n, length]`` as codes, the first value of a byte in its lowest bits: ``[n, length * bits / 8]``."""
    if bits == 1:
        return np.packbits(levels > 0, axis=1, bitorder="little")
    codes = ((levels + (2**bits - 1)) / 2).astype(np.uint8)
    each = 8 // bits
    result: NDArray[np.uint8] = codes[:, ::each].copy()
    for at in range(1, each):
        result |= codes[:, at::each] << np.uint8(at * bits)
    return result


def unpacked(codes: NDArray[Any], bits: int) -> NDArray[np.float32]:
    """Inverse of ``packed``."""
    shifts = np.arange(8 // bits, dtype=np.uint8) * bits
    each = codes.view(np.uint8)[:, :, None] >> shifts & (2**bits - 1)
    levels: NDArray[np.float32] = 2 * each.reshape(len(codes), -1).astype(np.float32) - np.float32(2**bits - 1)
    return levels
