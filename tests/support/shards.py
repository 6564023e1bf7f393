"""Shards with a given share of hot neurons, without a profile; and the measure of how far logits lie apart."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pinfer.artefacts import paths
from pinfer.artefacts.placement import PlacementFile, group, new_placement_id
from pinfer.model import Ffn, open_model
from pinfer.split import SplitOptions, SplitReport, split


def nmse(got: NDArray[np.floating], want: NDArray[np.floating]) -> float:
    return float(((got - want) ** 2).sum() / (want.astype(np.float64) ** 2).sum())


def write_shards(path: Path, hot_share: float, n_devices: int = 1, activation: str | None = None) -> SplitReport:
    """Split with a random but fixed choice of hot units in every FFN: neurons, a multiple of 64 or all, or experts.

    Of two devices each has about half of them.
    """
    model = open_model(path, activation)
    rng = np.random.default_rng(1)
    order = tuple(rng.permutation(ffn.n_units).astype(np.int32) for ffn in model.ffns)
    hot = [_whole_groups(ffn, hot_share * ffn.n_units) for ffn in model.ffns]
    first = [n if n_devices == 1 else _whole_groups(ffn, n / 2) for ffn, n in zip(model.ffns, hot, strict=True)]
    second = [n - m for n, m in zip(hot, first, strict=True)]
    counts = (*first, *(second if n_devices == 2 else ()))
    devices = ",".join(("CPU",) * n_devices)
    folder = paths.artefact_dir(path, model.fingerprint, for_writing=True)
    placement = PlacementFile(new_placement_id(), counts, devices, 1 << 30, 0, 512, {}, order)
    placement.write(folder / paths.PLACEMENT, model, {})
    return split(path, SplitOptions(verify=True, activation=activation))


def _whole_groups(ffn: Ffn, n: float) -> int:
    return ffn.n_units if n == ffn.n_units else int(n) // group(ffn) * group(ffn)
