"""Shards with a given share of hot neurons, without a profile; and the measure of how far logits lie apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pinfer.artefacts import paths
from pinfer.artefacts.placement import PlacementFile, new_placement_id
from pinfer.model import open_model
from pinfer.split import SplitOptions, SplitReport, split


def nmse(got: NDArray[np.floating], want: NDArray[np.floating]) -> float:
    return float(((got - want) ** 2).sum() / (want.astype(np.float64) ** 2).sum())


def write_shards(path: Path, hot_share: float, n_devices: int = 1) -> SplitReport:
    """Split with a random but fixed choice of hot neurons: a multiple of 64 a layer, or all; of two devices each has
    about half of them.
    """
    model = open_model(path)
    rng = np.random.default_rng(1)
    n_hot = model.n_ff if hot_share == 1 else int(model.n_ff * hot_share) // 64 * 64
    order = tuple(rng.permutation(model.n_ff).astype(np.int32) for _ in range(model.n_layer))
    folder = paths.artefact_dir(path, model.fingerprint, for_writing=True)
    first = n_hot if n_devices == 1 else n_hot // 128 * 64
    counts = (first,) * model.n_layer + (n_hot - first,) * (model.n_layer if n_devices == 2 else 0)
    devices = ",".join(("CPU",) * n_devices)
    placement = PlacementFile(new_placement_id(), counts, devices, 1 << 30, 0, 512, {}, order)
    placement.write(folder / paths.PLACEMENT, model, {})
    return split(path, SplitOptions())
