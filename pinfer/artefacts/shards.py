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
from pinfer.model import Ffn, Model, Tensor

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
    """ggml types of the down rows of one FFN in the shards."""

    hot: int
    cold: int
    is_whole: bool = False
    """hot units are experts, whose matrices stay as they are"""


def down_types(ffn: Ffn, wanted: str | None) -> DownTypes:
    """The types that the down rows of an FFN get: ``wanted``, else by what the model has (see docs/shards.md).

    Rows of the hot matrix are cut at multiples of 64 neurons, so K-quants (blocks of 256) give way to Q8_0 there; a
    width that no block divides gets F16. Hot experts are whole and stay as they are. Raises PinferError for a type that
    is not offered.
    """
    if wanted is not None:
        if wanted.upper() not in DOWN_TYPES:
            raise PinferError(f"down rows cannot be of type {wanted!r}", f"use one of: {', '.join(DOWN_TYPES)}")
        names = [wanted.upper(), _DEFAULT_QUANTISED]
    else:
        names = [ffn.down.type_name if ffn.down.type_name in _PLAIN else _DEFAULT_QUANTISED]
    hot = ffn.down.type if ffn.is_stack else _first_that_fits(names, gcd(GROUP, ffn.n_ff))
    return DownTypes(hot=hot, cold=_first_that_fits(names, ffn.n_embd), is_whole=ffn.is_stack)


def _first_bytes(ffn: Ffn) -> int:
    return sum(t.row_bytes for t in (ffn.gate, ffn.up) if t is not None)


def cold_neuron_bytes(ffn: Ffn, types: DownTypes) -> int:
    """Bytes of the rows of one cold neuron: gate (in gated models), up and down."""
    return _first_bytes(ffn) + row_bytes(types.cold, ffn.n_embd)


def cold_bytes(ffn: Ffn, types: DownTypes) -> int:
    """Bytes that all neurons of an FFN take in cold.gguf. Gate and up rows of experts stay in the model."""
    copied = 0 if ffn.is_stack else _first_bytes(ffn)
    return ffn.n_neurons * (copied + row_bytes(types.cold, ffn.n_embd))


def hot_unit_bytes(ffn: Ffn, types: DownTypes) -> int:
    """Bytes of one hot neuron (matrices and biases), or of one expert, on the device."""
    if ffn.is_stack:
        return (ffn.n_bytes + sum(bias.n_bytes for bias in ffn.biases.values())) // ffn.n_experts
    block, size = type_size(types.hot)
    # A group's down columns fill whole blocks, so the share of one neuron is the same for any count of groups.
    down = ffn.n_embd * size / block
    n_biases = sum(b is not None for b in (ffn.gate_bias, ffn.up_bias))
    return int(-(-(_first_bytes(ffn) + down + 4 * n_biases) // 1))


@dataclass(frozen=True)
class ShardPlan:
    """The units (neurons, or experts of a stack) and types of all shards, by FFN."""

    placement_id: str
    hot: tuple[tuple[NDArray[np.int32], ...], ...]
    """per device and FFN"""
    cold: tuple[NDArray[np.int32], ...]
    types: tuple[DownTypes, ...]

    def hot_type(self, device: int, i: int) -> int:
        """Type of a hot down matrix; an FFN that is wholly hot may have a width that no block divides."""
        kind = self.types[i].hot
        fits = self.types[i].is_whole or len(self.hot[device][i]) % type_size(kind)[0] == 0
        return kind if fits else type_number("F16")


def hot_writer(
    path: Path, model: Model, plan: ShardPlan, device: int, settings: Mapping[str, object]
) -> ArtefactWriter:
    """A writer of a device's hot shard with everything declared; gate, up and down of each FFN are still to be
    written."""
    out = ArtefactWriter(path, "hot", model, settings)
    out.add_str("pinfer.placement.id", plan.placement_id)
    for i, (ffn, units) in enumerate(zip(model.ffns, plan.hot[device], strict=True)):
        if not len(units):
            continue
        _declare(out, model, ffn, units)
        if not ffn.is_stack:
            _declare_rows(out, ffn, units)
            out.declare(down_name("hot", ffn), (len(units), ffn.n_embd), plan.hot_type(device, i))
            continue
        for part, tensor in parts(ffn).items():
            out.declare(weight_name(ffn, part), (*tensor.shape[:2], len(units)), tensor.type)
    return out


def cold_writer(path: Path, model: Model, plan: ShardPlan, settings: Mapping[str, object]) -> ArtefactWriter:
    """A writer of cold.gguf with everything declared; gate, up and down of each FFN are still to be written."""
    out = ArtefactWriter(path, "cold", model, settings, alignment=COLD_ALIGNMENT)
    out.add_str("pinfer.placement.id", plan.placement_id)
    for ffn, units, types in zip(model.ffns, plan.cold, plan.types, strict=True):
        if len(units):
            _declare(out, model, ffn, units)
            if not ffn.is_stack:
                _declare_rows(out, ffn, units)
            out.declare(down_name("cold", ffn), (ffn.n_embd, len(units) * ffn.unit), types.cold)
    return out


def parts(ffn: Ffn) -> dict[str, Tensor]:
    """The matrices of an FFN by the part they are."""
    found = {"gate": ffn.gate, "up": ffn.up, "down": ffn.down}
    return {part: tensor for part, tensor in found.items() if tensor is not None}


def weight_name(ffn: Ffn, part: str) -> str:
    """Name of a matrix in a shard."""
    return f"{ffn.name}.ffn_{part}.weight"


def bias_name(ffn: Ffn, part: str) -> str:
    """Name of the biases of a matrix in a shard."""
    return f"{ffn.name}.ffn_{part}.bias"


def units_name(ffn: Ffn) -> str:
    """Name of the list of an FFN's units in a shard."""
    return f"{ffn.name}.{ffn.units}"


def down_name(kind: str, ffn: Ffn) -> str:
    """Name of the down matrix in a shard: ``hot`` has it as the model has, ``cold`` transposed, a row a neuron."""
    return weight_name(ffn, "down_t" if kind == "cold" else "down")


def _declare(out: ArtefactWriter, model: Model, ffn: Ffn, units: NDArray[np.int32]) -> None:
    """The numbers of the units and their biases, which are small enough to keep."""
    out.add_array(units_name(ffn), units)
    for part, bias in ffn.biases.items():
        if ffn.is_stack or part != "down":
            out.add_array(bias_name(ffn, part), model.gguf.array(bias)[units])


def _declare_rows(out: ArtefactWriter, ffn: Ffn, neurons: NDArray[np.int32]) -> None:
    """Gate and up rows."""
    for part, tensor in parts(ffn).items():
        if part != "down":
            out.declare(weight_name(ffn, part), (ffn.n_embd, len(neurons)), tensor.type)


def _shapes(kind: str, ffn: Ffn, n: int) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of an FFN with ``n`` units in a shard."""
    if ffn.is_stack and kind == "hot":
        stacks = {weight_name(ffn, part): (*tensor.shape[:2], n) for part, tensor in parts(ffn).items()}
        return stacks | {bias_name(ffn, part): (bias.shape[0], n) for part, bias in ffn.biases.items()}
    if ffn.is_stack:
        return {down_name(kind, ffn): (ffn.n_embd, n * ffn.n_ff)}
    weights = {weight_name(ffn, part): (ffn.n_embd, n) for part in parts(ffn) if part != "down"}
    named = {bias_name(ffn, part): (n,) for part in ffn.biases if part != "down"}
    return {**weights, **named, down_name(kind, ffn): (n, ffn.n_embd) if kind == "hot" else (ffn.n_embd, n)}


@dataclass(frozen=True)
class ShardFile:
    """A hot shard or cold.gguf, opened and checked against the model."""

    artefact: Artefact
    placement_id: str
    units: tuple[NDArray[np.int32], ...]
    """per FFN, neurons or experts; empty for an FFN without any in this shard"""
    down_type: tuple[int, ...]
    """per FFN; not used for an FFN without units in this shard"""

    @classmethod
    def read(cls, path: Path, kind: str, model: Model) -> Self:
        """Opens shard ``hot`` or ``cold``. Raises PinferError when it is missing, damaged or of another model."""
        file = open_artefact(path, kind, model)
        units, types = [], []
        for ffn in model.ffns:
            name = units_name(ffn)
            ids = file.array(name, type_name="I32").reshape(-1) if file.has(name) else np.empty(0, np.int32)
            if len(ids) and not 0 <= ids.min() <= ids.max() < ffn.n_units:
                raise file.damaged(f"{ffn.title} names {ffn.units} that the model does not have")
            units.append(ids)
            for name, shape in _shapes(kind, ffn, len(ids)).items() if len(ids) else ():
                if file.tensor(name).shape != shape:
                    raise file.damaged(f"{name} has another shape than its {len(ids)} {ffn.units}")
            types.append(file.tensor(down_name(kind, ffn)).type if len(ids) else 0)
        return cls(file, file.get_str("pinfer.placement.id"), tuple(units), tuple(types))

    def n_neurons(self, model: Model) -> int:
        """Neurons in this shard."""
        return sum(f.unit * len(ids) for f, ids in zip(model.ffns, self.units, strict=True))

    def describe_types(self) -> str:
        """The down types in use, as text."""
        used = {t for t, n in zip(self.down_type, self.units, strict=True) if len(n)}
        return ", ".join(sorted(type_name(t) for t in used)) or "none"
