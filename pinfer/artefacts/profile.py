"""profile.gguf and samples.gguf: how often each neuron fires, and FFN inputs to learn from (docs/formats.md)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pinfer.artefacts.artefact import Artefact, ArtefactWriter, open_artefact

if TYPE_CHECKING:
    from pinfer.model import Model


@dataclass(frozen=True)
class ProfileFile:
    """Activation statistics of every neuron, by layer."""

    tokens: int
    corpus: str
    corpus_sha256: str
    count: tuple[NDArray[np.int64], ...]
    """per layer ``[n_ff]``: tokens in which the neuron fired"""
    mass: tuple[NDArray[np.float64], ...]
    """per layer ``[n_ff]``: sum of its output over the tokens"""

    @staticmethod
    def read(path: Path, model: Model) -> ProfileFile:
        """Raises PinferError when the file is missing, damaged or of another model."""
        artefact = open_artefact(path, "profile", model)
        tokens = artefact.get_int("pinfer.profile.tokens")
        layers = range(model.n_layer)
        count = tuple(artefact.array(f"blk.{i}.count", (model.n_ff,), "I64") for i in layers)
        mass = tuple(artefact.array(f"blk.{i}.mass", (model.n_ff,), "F64") for i in layers)
        for i, c in enumerate(count):
            if tokens <= 0 or c.min() < 0 or c.max() > tokens:
                raise artefact.damaged(f"layer {i} has counts outside 0..{tokens}")
        return ProfileFile(
            tokens,
            artefact.get_str("pinfer.profile.corpus"),
            artefact.get_str("pinfer.profile.corpus_sha256"),
            count,
            mass,
        )

    def writer(self, path: Path, model: Model, settings: Mapping[str, object]) -> ArtefactWriter:
        """A writer that holds the whole file and has not begun to write it."""
        out = ArtefactWriter(path, "profile", model, settings)
        out.add_u64("pinfer.profile.tokens", self.tokens)
        out.add_str("pinfer.profile.corpus", self.corpus)
        out.add_str("pinfer.profile.corpus_sha256", self.corpus_sha256)
        for i, (count, mass) in enumerate(zip(self.count, self.mass, strict=True)):
            out.add_array(f"blk.{i}.count", count)
            out.add_array(f"blk.{i}.mass", mass)
        return out

    def write(self, path: Path, model: Model, settings: Mapping[str, object]) -> None:
        """Raises PinferError when the disk is full or cannot be written; the old file is whole then."""
        with self.writer(path, model, settings):
            pass


@dataclass(frozen=True)
class SamplesFile:
    """FFN inputs of sampled tokens, mapped: a layer is read when it is asked for."""

    artefact: Artefact
    n_samples: int
    """the same in all layers"""

    @staticmethod
    def read(path: Path, model: Model) -> SamplesFile:
        """Raises PinferError when the file is missing, damaged or of another model."""
        artefact = open_artefact(path, "samples", model)
        n_samples = artefact.tensor("blk.0.x").n_rows
        for i in range(model.n_layer):
            artefact.array(f"blk.{i}.x", (model.n_embd, n_samples), "F16")
            artefact.array(f"blk.{i}.active", (-(-model.n_ff // 8), n_samples), "I8")
        return SamplesFile(artefact, n_samples)

    def x(self, layer: int) -> NDArray[np.float16]:
        """FFN inputs, ``[n_samples, n_embd]``."""
        x: NDArray[np.float16] = self.artefact.array(f"blk.{layer}.x")
        return x

    def active(self, layer: int, n_ff: int) -> NDArray[np.bool_]:
        """Which neurons fired, ``[n_samples, n_ff]``."""
        bits = self.artefact.array(f"blk.{layer}.active").view(np.uint8)
        return np.unpackbits(bits, axis=1, count=n_ff, bitorder="little").astype(bool)


def samples_writer(
    path: Path,
    model: Model,
    settings: Mapping[str, object],
    layers: Sequence[tuple[NDArray[np.float16], NDArray[np.uint8]]],
) -> ArtefactWriter:
    """A writer of samples.gguf, written and not yet in place.

    ``layers`` holds x ``[n_samples, n_embd]`` and activity bits ``[n_samples, ceil(n_ff/8)]`` of each, not copied.
    """
    out = ArtefactWriter(path, "samples", model, settings)
    tensors: list[tuple[str, NDArray[Any]]] = []
    for i, (x, active) in enumerate(layers):
        out.declare(f"blk.{i}.x", x.shape[::-1], "F16")
        out.declare(f"blk.{i}.active", active.shape[::-1], "I8")
        tensors += [(f"blk.{i}.x", x), (f"blk.{i}.active", active)]
    try:
        for name, data in tensors:
            out.write(name, data)
    except BaseException:
        out.discard()
        raise
    return out
