"""The shards hot.gguf (one per device) and cold.gguf: types, sizes and tensors (docs/formats.md)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import gcd
from pathlib import Path
from typing import Self

import numpy as np
from numpy.typing import NDArray

from pinfer.artefacts import paths
from pinfer.artefacts.artefact import Artefact, ArtefactWriter, open_artefact
from pinfer.artefacts.placement import GROUP, PlacementFile
from pinfer.errors import PinferError
from pinfer.gguf_io.reader import row_bytes, type_name, type_number, type_size
from pinfer.model import FfnTensors, Model, Tensor

COLD_ALIGNMENT = 4096
PIECE_BYTES = 16 << 20
"""bytes of rows that are read, copied or compared at once"""
_FURTHER_HOT = re.compile(r"hot-[1-9][0-9]*\.gguf")
_DEFAULT_QUANTISED = "Q8_0"


def pieces(n: int, bytes_each: int) -> Iterator[slice]:
    """Cuts ``n`` rows into slices of about ``PIECE_BYTES``."""
    step = max(1, PIECE_BYTES // bytes_each)
    return (slice(start, min(start + step, n)) for start in range(0, n, step))


def hot_name(device: int) -> str:
    """File name of the shard of a placement's n-th device: hot.gguf, hot-1.gguf, …"""
    return f"hot-{device}.gguf" if device else paths.HOT


@dataclass(frozen=True)
class HotShards:
    """The hot part of a model that has been split."""

    paths: tuple[Path, ...]
    """by device"""
    device: str
    """names of the devices, separated by commas"""
    n_gpu_layers: int
    """dense layers on the first of them"""


def find_hot_shards(folder: Path, model: Model, device: str | None) -> HotShards | None:
    """The hot shards in ``folder`` for the devices of the placement, or for ``device``; None where nothing is hot."""
    if not (folder / paths.PLACEMENT).is_file():
        return None
    placement = PlacementFile.read(folder / paths.PLACEMENT, model)
    found = tuple(folder / hot_name(i) for i in range(placement.n_devices))
    if not any(placement.n_hot) or not all(path.is_file() for path in found):
        return None
    return HotShards(found, device or placement.device, placement.n_gpu_layers)


def stale_hot_shards(folder: Path, n_devices: int) -> list[Path]:
    """Shards in ``folder`` of devices that the placement no longer has."""
    wanted = {hot_name(device) for device in range(n_devices)}
    return sorted(path for path in folder.iterdir() if _FURTHER_HOT.fullmatch(path.name) and path.name not in wanted)


@dataclass(frozen=True)
class QuantisationError:
    """Largest change of a value by conversion: ``relative`` to the largest value of its block, plus ``absolute``.

    The absolute part covers very small values, whose block scale is a subnormal half.
    """

    relative: float
    absolute: float


DOWN_TYPES: Mapping[str, QuantisationError] = {
    "F32": QuantisationError(0.0, 0.0),
    "F16": QuantisationError(2.0**-11, 2.0**-25),
    "BF16": QuantisationError(2.0**-8, 0.0),
    "Q8_0": QuantisationError(0.006, 1e-5),
    "Q6_K": QuantisationError(0.035, 2e-4),
    "Q5_K": QuantisationError(0.09, 2e-4),
    "Q5_1": QuantisationError(0.042, 1e-5),
    "Q5_0": QuantisationError(0.068, 1e-5),
    "Q4_K": QuantisationError(0.16, 2e-4),
    "Q4_1": QuantisationError(0.075, 1e-5),
    "Q4_0": QuantisationError(0.13, 1e-5),
    "IQ4_NL": QuantisationError(0.16, 1e-5),
    "IQ4_XS": QuantisationError(0.18, 2e-4),
    "Q3_K": QuantisationError(0.35, 2e-4),
    "Q2_K": QuantisationError(0.75, 2e-4),
}
"""What ``--down-type`` may be. Types that need an importance matrix, or that are coarser, would spoil the model."""

_PLAIN = ("F32", "F16", "BF16")


def _first_that_fits(names: Sequence[str], divisor: int) -> int:
    """The first type whose blocks divide rows of ``divisor`` elements; F16 fits everything."""
    for name in names:
        number = type_number(name)
        if divisor % type_size(number)[0] == 0:
            return number
    return type_number("F16")


@dataclass(frozen=True)
class DownTypes:
    """ggml types of the requantised down rows of one layer."""

    hot: int
    cold: int


def down_types(model: Model, layer: int, wanted: str | None) -> DownTypes:
    """The types that the down rows of a layer get: ``wanted``, else by what the model has (see docs/shards.md).

    Rows of the hot matrix are cut at multiples of 64 neurons, so K-quants (blocks of 256) give way to Q8_0 there; a
    width that no block divides gets F16. Raises PinferError for a type that is not offered.
    """
    if wanted is not None:
        if wanted.upper() not in DOWN_TYPES:
            raise PinferError(f"down rows cannot be of type {wanted!r}", f"use one of: {', '.join(DOWN_TYPES)}")
        names = [wanted.upper(), _DEFAULT_QUANTISED]
    else:
        down = _down(model, layer)
        names = [down.type_name if down.type_name in _PLAIN else _DEFAULT_QUANTISED]
    return DownTypes(hot=_first_that_fits(names, gcd(GROUP, model.n_ff)), cold=_first_that_fits(names, model.n_embd))


def _down(model: Model, layer: int) -> Tensor:
    down = model.ffn[layer].down
    assert down is not None, "callers have asked model.require_sparse()"
    return down


def cold_neuron_bytes(model: Model, layer: int, types: DownTypes) -> int:
    """Bytes of the rows of one cold neuron: gate (in gated models), up and down."""
    f = model.ffn[layer]
    rows = sum(t.row_bytes for t in (f.gate, f.up) if t is not None)
    return rows + row_bytes(types.cold, model.n_embd)


def _n_biases(f: FfnTensors) -> int:
    return sum(b is not None for b in (f.gate_bias, f.up_bias))


def hot_neuron_bytes(model: Model, layer: int, types: DownTypes) -> int:
    """Bytes of one hot neuron of this layer on the device (matrices and biases)."""
    f = model.ffn[layer]
    assert f.up is not None
    gate = f.gate.row_bytes if f.gate is not None else 0
    block, size = type_size(types.hot)
    # A group's down columns fill whole blocks, so the share of one neuron is the same for any count of groups.
    down = model.n_embd * size / block
    return int(-(-(gate + f.up.row_bytes + down + 4 * _n_biases(f)) // 1))


@dataclass(frozen=True)
class ShardPlan:
    """The neurons and types of all shards, by layer."""

    placement_id: str
    hot: tuple[tuple[NDArray[np.int32], ...], ...]
    """per device and layer"""
    cold: tuple[NDArray[np.int32], ...]
    types: tuple[DownTypes, ...]

    def hot_type(self, device: int, layer: int) -> int:
        """Type of a hot down matrix; a layer that is wholly hot may have a width that no block divides."""
        kind = self.types[layer].hot
        return kind if len(self.hot[device][layer]) % type_size(kind)[0] == 0 else type_number("F16")


def hot_writer(
    path: Path, model: Model, plan: ShardPlan, device: int, settings: Mapping[str, object]
) -> ArtefactWriter:
    """A writer of a device's hot shard with everything declared; gate, up and down of each layer are still to be
    written."""
    out = ArtefactWriter(path, "hot", model, settings)
    out.add_str("pinfer.placement.id", plan.placement_id)
    for layer, neurons in enumerate(plan.hot[device]):
        if n := len(neurons):
            _declare_rows(out, model, layer, neurons)
            out.declare(down_name("hot", layer), (n, model.n_embd), plan.hot_type(device, layer))
    return out


def cold_writer(path: Path, model: Model, plan: ShardPlan, settings: Mapping[str, object]) -> ArtefactWriter:
    """A writer of cold.gguf with everything declared; gate, up and down of each layer are still to be written."""
    out = ArtefactWriter(path, "cold", model, settings, alignment=COLD_ALIGNMENT)
    out.add_str("pinfer.placement.id", plan.placement_id)
    for layer, neurons in enumerate(plan.cold):
        if n := len(neurons):
            _declare_rows(out, model, layer, neurons)
            out.declare(down_name("cold", layer), (model.n_embd, n), plan.types[layer].cold)
    return out


def down_name(kind: str, layer: int) -> str:
    """Name of the down matrix in a shard: ``hot`` has it as the model has, ``cold`` transposed, a row a neuron."""
    return f"blk.{layer}.ffn_down{'_t' if kind == 'cold' else ''}.weight"


def _declare_rows(out: ArtefactWriter, model: Model, layer: int, neurons: NDArray[np.int32]) -> None:
    """The numbers of the neurons and their biases, which are small enough to keep, and their gate and up rows."""
    f = model.ffn[layer]
    out.add_array(f"blk.{layer}.neurons", neurons)
    for kind, bias in (("gate", f.gate_bias), ("up", f.up_bias)):
        if bias is not None:
            out.add_array(f"blk.{layer}.ffn_{kind}.bias", model.gguf.array(bias)[neurons])
    for kind, tensor in (("gate", f.gate), ("up", f.up)):
        if tensor is not None:
            out.declare(f"blk.{layer}.ffn_{kind}.weight", (model.n_embd, len(neurons)), tensor.type)


def _shapes(kind: str, model: Model, layer: int, n: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of a layer with ``n`` neurons in a shard."""
    f = model.ffn[layer]
    parts = {"gate": (f.gate, f.gate_bias), "up": (f.up, f.up_bias)}
    weights = {f"blk.{layer}.ffn_{part}.weight": (model.n_embd, n) for part, (weight, _) in parts.items() if weight}
    biases = {f"blk.{layer}.ffn_{part}.bias": (n,) for part, (_, bias) in parts.items() if bias}
    return {**weights, **biases, down_name(kind, layer): (n, model.n_embd) if kind == "hot" else (model.n_embd, n)}


@dataclass(frozen=True)
class ShardFile:
    """A hot shard or cold.gguf, opened and checked against the model."""

    artefact: Artefact
    placement_id: str
    neurons: tuple[NDArray[np.int32], ...]
    """per layer; empty for a layer without neurons in this shard"""
    down_type: tuple[int, ...]
    """per layer; not used for a layer without neurons in this shard"""

    @classmethod
    def read(cls, path: Path, kind: str, model: Model) -> Self:
        """Opens shard ``hot`` or ``cold``. Raises PinferError when it is missing, damaged or of another model."""
        file = open_artefact(path, kind, model)
        neurons = []
        for layer in range(model.n_layer):
            name = f"blk.{layer}.neurons"
            ids = file.array(name, type_name="I32").reshape(-1) if file.has(name) else np.empty(0, np.int32)
            if len(ids) and not 0 <= ids.min() <= ids.max() < model.n_ff:
                raise file.damaged(f"layer {layer} names neurons that the model does not have")
            neurons.append(ids)
            for name, shape in _shapes(kind, model, layer, len(ids)).items() if len(ids) else ():
                if file.tensor(name).shape != shape:
                    raise file.damaged(f"{name} has another shape than its {len(ids)} neurons")
        names = [down_name(kind, layer) for layer in range(model.n_layer)]
        types = tuple(file.tensor(name).type if len(ids) else 0 for name, ids in zip(names, neurons, strict=True))
        return cls(file, file.get_str("pinfer.placement.id"), tuple(neurons), types)

    def describe_types(self) -> str:
        """The down types in use, as text."""
        used = {t for t, n in zip(self.down_type, self.neurons, strict=True) if len(n)}
        return ", ".join(sorted(type_name(t) for t in used)) or "none"
