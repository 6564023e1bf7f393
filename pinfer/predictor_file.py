"""predictor.gguf: per layer the low-rank factors and thresholds that name the candidates (docs/formats.md)."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Self

from pinfer.artefact import Artefact, ArtefactWriter, open_artefact

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from pinfer.model import Model

# Types of A and B by the name that --type has for them.
FACTOR_TYPES = {"f16": ("f16", "f16"), "q8_0": ("q8_0", "q8_0"), "q4_0": ("q8_0", "q4_0")}
KINDS = ("low_rank", "mlp", "none")


@dataclass(frozen=True)
class LayerPredictor:
    """One layer: neuron i is a candidate when ``(B (A x))_i > t_i``; rank 0 makes every neuron one."""

    rank: int
    recall: float
    """measured share of the activation mass that the candidates keep"""
    candidates: float
    """measured share of neurons that are candidates"""
    a: NDArray[np.float32] | None = None
    """``[rank, n_embd]``"""
    b: NDArray[np.float32] | None = None
    """``[n_ff, rank]``"""
    t: NDArray[np.float32] | None = None
    """``[n_ff]``"""


@dataclass(frozen=True)
class PredictorFile:
    """predictor.gguf, opened and checked; factors are dequantised when a layer is asked for."""

    artefact: Artefact
    kind: tuple[str, ...]
    rank: tuple[int, ...]
    recall: tuple[float, ...]
    candidates: tuple[float, ...]

    @staticmethod
    def read(path: Path, model: Model) -> PredictorFile:
        """Raises PinferError when the file is missing, damaged or of another model."""
        artefact = open_artefact(path, "predictor", model)
        kind = tuple(str(k) for k in artefact.get_list("pinfer.predictor.kind", model.n_layer))
        rank = tuple(int(r) for r in artefact.get_list("pinfer.predictor.rank", model.n_layer))
        for i, (k, r) in enumerate(zip(kind, rank, strict=True)):
            if k not in KINDS or (k == "none") != (r == 0):
                raise artefact.damaged(f"layer {i} has a predictor of kind {k!r} and rank {r}")
            if r:
                for name, shape in (("a", (model.n_embd, r)), ("b", (r, model.n_ff)), ("t", (model.n_ff,))):
                    found = artefact.tensor(f"blk.{i}.pred_{name}").shape
                    if found != shape:
                        raise artefact.damaged(f"blk.{i}.pred_{name} has shape {list(found)} instead of {list(shape)}")
        return PredictorFile(
            artefact,
            kind,
            rank,
            tuple(float(v) for v in artefact.get_list("pinfer.predictor.recall", model.n_layer)),
            tuple(float(v) for v in artefact.get_list("pinfer.predictor.candidates", model.n_layer)),
        )

    def layer(self, i: int) -> LayerPredictor:
        """Layer ``i`` with its factors as float32."""
        from pinfer import ggml

        if not self.rank[i]:
            return LayerPredictor(0, self.recall[i], self.candidates[i])

        def factor(name: str) -> NDArray[np.float32]:
            tensor = self.artefact.tensor(f"blk.{i}.pred_{name}")
            return ggml.dequantise(self.artefact.raw(tensor.name), tensor.type, tensor.row_length)

        t = self.artefact.array(f"blk.{i}.pred_t", type_name="F32")
        return LayerPredictor(self.rank[i], self.recall[i], self.candidates[i], factor("a"), factor("b"), t)


class PredictorWriter:
    """Writes predictor.gguf. Ranks stand in its header and are known last: factors wait in a nameless temporary file.

    Use it as a context manager. Raises PinferError or OSError when the disk is full or cannot be written.
    """

    def __init__(self, path: Path, factor_type: str) -> None:
        self._path = path
        self._a_type, self._b_type = (name.upper() for name in FACTOR_TYPES[factor_type])
        self._layers: list[LayerPredictor] = []
        self._pieces: list[tuple[str, int]] = []  # tensor name, bytes, in the spool's order
        self._spool: IO[bytes] = tempfile.TemporaryFile(dir=path.parent)  # noqa: SIM115 (closed by __exit__)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # Closing flushes; what is left to flush after a full disk is not wanted.
        with suppress(OSError):
            self._spool.close()

    def add(self, layer: LayerPredictor) -> None:
        """The next layer. Its factors hold values that the factor type can represent (see ``quantised``)."""
        i = len(self._layers)
        self._layers.append(LayerPredictor(layer.rank, layer.recall, layer.candidates))
        if not layer.rank:
            return
        if layer.a is None or layer.b is None or layer.t is None:
            raise ValueError("a predictor without its factors")
        factors = (("a", quantise(layer.a, self._a_type)), ("b", quantise(layer.b, self._b_type)), ("t", layer.t))
        for name, data in factors:
            self._pieces.append((f"blk.{i}.pred_{name}", data.nbytes))
            self._spool.write(data.tobytes())

    def finish(self, model: Model, settings: Mapping[str, object]) -> int:
        """Write the file, whole or not at all; returns the bytes of its tensors."""
        with ArtefactWriter(self._path, "predictor", model, settings) as out:
            out.add_str_array("pinfer.predictor.kind", ["low_rank" if layer.rank else "none" for layer in self._layers])
            out.add_u32_array("pinfer.predictor.rank", [layer.rank for layer in self._layers])
            out.add_f32_array("pinfer.predictor.recall", [layer.recall for layer in self._layers])
            out.add_f32_array("pinfer.predictor.candidates", [layer.candidates for layer in self._layers])
            for i, layer in enumerate(self._layers):
                if layer.rank:
                    out.declare(f"blk.{i}.pred_a", (model.n_embd, layer.rank), self._a_type)
                    out.declare(f"blk.{i}.pred_b", (layer.rank, model.n_ff), self._b_type)
                    out.declare(f"blk.{i}.pred_t", (model.n_ff,), "F32")
            self._spool.seek(0)
            for name, n_bytes in self._pieces:
                out.write(name, self._spool.read(n_bytes))
            return out.n_bytes


def row_bytes(length: int, factor_type: str) -> int:
    """Bytes of one row of a factor."""
    from gguf import GGMLQuantizationType

    from pinfer.gguf_file import type_size

    block, size = type_size(GGMLQuantizationType[factor_type.upper()])
    return length // block * size


def quantise(rows: NDArray[np.float32], factor_type: str) -> NDArray[Any]:
    """Rows in a factor type, as bytes or half floats."""
    import numpy as np
    from gguf import GGMLQuantizationType

    from pinfer import ggml

    if factor_type.upper() == "F16":
        return rows.astype(np.float16)
    kind = GGMLQuantizationType[factor_type.upper()]
    return ggml.quantise(rows, kind, row_bytes(rows.shape[1], factor_type.lower()))


def quantised(rows: NDArray[np.float32], factor_type: str) -> NDArray[np.float32]:
    """The values that ``rows`` have once they are stored in a factor type; storing those again changes nothing."""
    import numpy as np
    from gguf import GGMLQuantizationType

    from pinfer import ggml

    data = quantise(rows, factor_type)
    if factor_type.upper() == "F16":
        return data.astype(np.float32)
    return ggml.dequantise(data, GGMLQuantizationType[factor_type.upper()], rows.shape[1])
