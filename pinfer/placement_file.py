"""placement.gguf: which neurons go to the device, and what the solver expected of it (docs/formats.md)."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pinfer.artefact import ArtefactWriter, open_artefact
from pinfer.model import Model

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

GROUP = 64
"""Neurons enter the device in groups of this many, so that hot matrices can be cut into blocks."""


def new_placement_id() -> str:
    """16 random hex digits, which the shards of one placement share."""
    return secrets.token_hex(8)


@dataclass(frozen=True)
class PlacementFile:
    """What placement.gguf holds."""

    id: str
    n_hot: tuple[int, ...]
    """per layer: a multiple of 64, or all of the layer's neurons"""
    device: str
    vram: int
    """budget in bytes"""
    n_gpu_layers: int
    n_ctx: int
    report: Mapping[str, Any]
    order: tuple[NDArray[np.int32], ...]
    """per layer ``[n_ff]``: neurons by falling impact; the first ``n_hot`` are hot"""

    @classmethod
    def read(cls, path: Path, model: Model) -> Self:
        """Opens and checks placement.gguf. Raises PinferError when it is missing, damaged or of another model."""
        import numpy as np

        file = open_artefact(path, "placement", model)
        n_hot = tuple(int(n) for n in file.get_list("pinfer.placement.n_hot", model.n_layer))
        order = []
        for layer, n in enumerate(n_hot):
            if n > model.n_ff or (n % GROUP and n != model.n_ff):
                raise file.damaged(f"layer {layer} has {n} hot neurons of {model.n_ff}")
            neurons = file.array(f"blk.{layer}.order", (model.n_ff,), "I32").copy()
            if not np.array_equal(np.sort(neurons), np.arange(model.n_ff, dtype=np.int32)):
                raise file.damaged(f"the order of layer {layer} does not name each neuron once")
            order.append(neurons)
        try:
            report = json.loads(file.get_str("pinfer.placement.report") or "{}")
        except ValueError:
            raise file.damaged("its report cannot be read") from None
        return cls(
            id=file.get_str("pinfer.placement.id"),
            n_hot=n_hot,
            device=file.get_str("pinfer.placement.device"),
            vram=file.get_int("pinfer.placement.vram"),
            n_gpu_layers=file.get_int("pinfer.placement.n_gpu_layers"),
            n_ctx=file.get_int("pinfer.placement.n_ctx"),
            report=report,
            order=tuple(order),
        )

    def write(self, path: Path, model: Model, settings: Mapping[str, object]) -> None:
        """Writes placement.gguf, replacing an older one."""
        import numpy as np

        with ArtefactWriter(path, "placement", model, settings) as out:
            out.add_str("pinfer.placement.id", self.id)
            out.add_u32_array("pinfer.placement.n_hot", self.n_hot)
            out.add_str("pinfer.placement.device", self.device)
            out.add_u64("pinfer.placement.vram", self.vram)
            out.add_u32("pinfer.placement.n_gpu_layers", self.n_gpu_layers)
            out.add_u32("pinfer.placement.n_ctx", self.n_ctx)
            out.add_str("pinfer.placement.report", json.dumps(dict(self.report)))
            for layer, order in enumerate(self.order):
                out.add_array(f"blk.{layer}.order", np.asarray(order, dtype=np.int32))
