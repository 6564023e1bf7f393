"""placement.gguf: the neurons and experts of each device, and the predictions of the solver (docs/formats.md)."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from pinfer.artefacts.artefact import Artefact, ArtefactWriter, open_artefact
from pinfer.model import Ffn, Model

GROUP = 64
"""Neurons are placed in groups of this many, so that the blocks of quantised types divide hot matrices."""


def group(ffn: Ffn) -> int:
    """Units of an FFN that are placed together: groups of neurons, single experts."""
    return 1 if ffn.is_stack else GROUP


def new_placement_id() -> str:
    """16 random hex digits, which the shards of one placement share."""
    return secrets.token_hex(8)


def _n_devices(device: str) -> int:
    return device.count(",") + 1


def _ends(n_hot: Sequence[int], n_ffns: int) -> list[tuple[int, ...]]:
    """Ends of each device's units in the order of their FFN, per FFN; zeros before the first device."""
    ends = [(0,) * n_ffns]
    for start in range(0, len(n_hot), n_ffns):
        more = n_hot[start : start + n_ffns]
        ends.append(tuple(end + n for end, n in zip(ends[-1], more, strict=True)))
    return ends


_NEEDED = "pinfer.placement.vram_needed"


def _vram_device(file: Artefact, vram: int, n_devices: int) -> tuple[int, ...]:
    if n_devices == 1 or "pinfer.placement.vram_device" not in file.gguf:
        return (vram,) if n_devices == 1 else ()
    return tuple(int(n) for n in file.get_list("pinfer.placement.vram_device", n_devices))


@dataclass(frozen=True)
class PlacementFile:
    """The content of placement.gguf."""

    id: str
    n_hot: tuple[int, ...]
    """units (neurons, or the experts of a stack) of all FFNs on the first device, then on the second, …: neurons in
    multiples of 64, but for the last of an FFN"""
    device: str
    """names of the devices, separated by commas"""
    vram: int
    """budget of all devices in bytes"""
    n_gpu_layers: int
    n_ctx: int
    report: Mapping[str, Any]
    order: tuple[NDArray[np.int32], ...]
    """per FFN ``[n_units]``: units by falling impact; the first are the first device's, the next the second's, …"""
    vram_device: tuple[int, ...] = ()
    """budget of each device; ``vram`` for a single one; empty if not known"""
    vram_needed: tuple[int, ...] = ()
    """bytes used of each device, which must be free when the model runs; empty if not known"""

    @property
    def n_devices(self) -> int:
        return _n_devices(self.device)

    def hot(self, device: int) -> tuple[NDArray[np.int32], ...]:
        """The units of a device, per FFN."""
        ends = _ends(self.n_hot, len(self.order))
        return tuple(order[ends[device][i] : ends[device + 1][i]] for i, order in enumerate(self.order))

    def cold(self) -> tuple[NDArray[np.int32], ...]:
        """The units of no device, per FFN."""
        last = _ends(self.n_hot, len(self.order))[-1]
        return tuple(order[n:] for order, n in zip(self.order, last, strict=True))

    def hot_share(self, model: Model) -> float:
        """Share of the model's neurons that are hot."""
        per_ffn = zip(model.ffns, self.order, self.cold(), strict=True)
        return sum(f.unit * (len(order) - len(cold)) for f, order, cold in per_ffn) / model.n_neurons

    @classmethod
    def read(cls, path: Path, model: Model) -> Self:
        """Opens and checks placement.gguf. Raises PinferError when it is missing, damaged or of another model."""
        file = open_artefact(path, "placement", model)
        device, vram = file.get_str("pinfer.placement.device"), file.get_int("pinfer.placement.vram")
        n_devices = _n_devices(device)
        n_hot = tuple(int(n) for n in file.get_list("pinfer.placement.n_hot", n_devices * len(model.ffns)))
        order = []
        for f, *ends in zip(model.ffns, *_ends(n_hot, len(model.ffns)), strict=True):
            if any(n > f.n_units or (n % group(f) and n != f.n_units) for n in ends):
                raise file.damaged(f"{f.title} has {ends[-1]} hot {f.units} of {f.n_units}")
            units = file.array(f"{f.name}.order", (f.n_units,), "I32").copy()
            if not np.array_equal(np.sort(units), np.arange(f.n_units, dtype=np.int32)):
                raise file.damaged(f"the order of {f.title} does not contain each {f.units[:-1]} once")
            order.append(units)
        try:
            report = json.loads(file.get_str("pinfer.placement.report") or "{}")
        except ValueError:
            report = None
        if not isinstance(report, dict):
            raise file.damaged("its report cannot be read")
        return cls(
            id=file.get_str("pinfer.placement.id"),
            n_hot=n_hot,
            device=device,
            vram=vram,
            n_gpu_layers=file.get_int("pinfer.placement.n_gpu_layers"),
            n_ctx=file.get_int("pinfer.placement.n_ctx"),
            report=report,
            order=tuple(order),
            vram_device=_vram_device(file, vram, n_devices),
            vram_needed=tuple(file.get_list(_NEEDED, n_devices)) if _NEEDED in file.gguf else (),
        )

    def write(self, path: Path, model: Model, settings: Mapping[str, object]) -> None:
        """Writes placement.gguf, replacing an older one."""
        with ArtefactWriter(path, "placement", model, settings) as out:
            out.add_str("pinfer.placement.id", self.id)
            out.add_u32_array("pinfer.placement.n_hot", self.n_hot)
            out.add_str("pinfer.placement.device", self.device)
            out.add_u64("pinfer.placement.vram", self.vram)
            if self.n_devices > 1 and self.vram_device:
                out.add_u64_array("pinfer.placement.vram_device", self.vram_device)
            if self.vram_needed:
                out.add_u64_array(_NEEDED, self.vram_needed)
            out.add_u32("pinfer.placement.n_gpu_layers", self.n_gpu_layers)
            out.add_u32("pinfer.placement.n_ctx", self.n_ctx)
            out.add_str("pinfer.placement.report", json.dumps(dict(self.report)))
            for f, order in zip(model.ffns, self.order, strict=True):
                out.add_array(f"{f.name}.order", np.asarray(order, dtype=np.int32))
