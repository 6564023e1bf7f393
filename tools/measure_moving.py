"""Measures what exchanging hot and cold neurons while running could gain: prints the tables of docs/placement.md.

``python tools/measure_moving.py models/tiny-relu2.gguf --profile PROFILE.txt TEXT...``. Which neurons fire (in a
mixture: which experts are used) is recorded for the profile's text and for each other text. The hot set is chosen over
the whole model, by four rules: from the profile alone; from the first half of the text; from the part that is measured,
which no set that stays can beat; and by a count that decays, with an exchange every few tokens. All are measured on the
second half of the text.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import numpy as np
from numpy.typing import NDArray

from pinfer.artefacts import paths
from pinfer.artefacts.profile import SamplesFile
from pinfer.model import open_model
from pinfer.profile import ProfileOptions, profile

HOT_SHARES = (0.05, 0.1, 0.2, 0.4)
HALF_LIVES = (64, 256, 1024)
"""of the decayed count, in tokens"""
EVERY = 16
"""tokens between two exchanges"""
CPU = 30.0
"""GB/s at which cold rows are read"""
LINKS = {"RTX 4090, PCIe 4 x16": 25.0, "RTX 3060, PCIe 4 x8": 12.5, "laptop, PCIe 3 x8": 6.5}
"""GB/s to the card"""

Activity = NDArray[np.bool_]


@dataclass(frozen=True)
class Moving:
    """A decayed count on one text."""

    on_hot: float
    """share of the activations that fell on the hot set"""
    moved: float
    """units exchanged per token"""


def record(model_path: Path, text: Path, n_tokens: int) -> Activity:
    """Which units were used, ``[n_tokens, n_units]``: neurons of dense FFNs, or the experts of stacks."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(shutil.copy(model_path, folder))
        profile(path, ProfileOptions(dataset=str(text), n_tokens=n_tokens, n_samples=n_tokens, n_ctx=256))
        model = open_model(path)
        artefacts = paths.artefact_dir(path, model.fingerprint, for_writing=False)
        samples = SamplesFile.read(artefacts / paths.SAMPLES, model)
        stacks = [ffn for ffn in model.ffns if ffn.is_stack]
        if not stacks:
            return np.concatenate([samples.active(ffn) for ffn in model.ffns], axis=1)
        used = []
        for ffn in stacks:
            routed = np.zeros((samples.n_samples, ffn.n_experts), dtype=bool)
            np.put_along_axis(routed, samples.experts(ffn), True, axis=1)
            used.append(routed)
        return np.concatenate(used, axis=1)


def hottest(count: NDArray[np.floating] | NDArray[np.integer], n: int) -> NDArray[np.bool_]:
    """The n units of the largest counts."""
    hot = np.zeros(len(count), dtype=bool)
    hot[np.argsort(-count, kind="stable")[:n]] = True
    return hot


def share(activity: Activity, hot: NDArray[np.bool_]) -> float:
    return float(activity[:, hot].sum() / activity.sum())


def move(prior: NDArray[np.float64], activity: Activity, measured_from: int, n_hot: int, half_life: int) -> Moving:
    """The prior, a frequency for each unit, weighs as much as an infinite past with that frequency would."""
    decay = 0.5 ** (EVERY / half_life)
    count = prior * EVERY / (1.0 - decay)
    hot = hottest(count, n_hot)
    caught = total = moved = 0
    for begin in range(0, len(activity), EVERY):
        piece = activity[begin : begin + EVERY].sum(axis=0)
        if begin >= measured_from:
            caught += int(piece[hot].sum())
            total += int(piece.sum())
        count = count * decay + piece
        after = hottest(count, n_hot)
        if begin >= measured_from:
            moved += int((after & ~hot).sum())
        hot = after
    return Moving(caught / total, moved / (len(activity) - measured_from))


def measure(name: str, before: Activity, texts: Sequence[Activity]) -> None:
    """Prints a row for each hot share: means over the texts."""
    prior = before.mean(axis=0)
    for hot_share in HOT_SHARES:
        n_hot = round(hot_share * before.shape[1])
        static, early, hindsight, moving = [], [], [], []
        for activity in texts:
            half = len(activity) // 2 // EVERY * EVERY
            rest = activity[half:]
            static.append(share(rest, hottest(prior, n_hot)))
            early.append(share(rest, hottest(activity[:half].sum(axis=0) + prior, n_hot)))
            hindsight.append(share(rest, hottest(rest.sum(axis=0) + prior, n_hot)))
            tried = [move(prior, activity, half, n_hot, half_life) for half_life in HALF_LIVES]
            moving.append(max(tried, key=lambda one: one.on_hot))
        used = mean(float(activity.sum(axis=1).mean()) for activity in texts)
        saved = (mean(one.on_hot for one in moving) - mean(static)) * used
        moved = mean(one.moved for one in moving)
        cold = (1 - mean(static)) / (1 - mean(one.on_hot for one in moving))
        pays = ", ".join(link.split(",")[0] for link, speed in LINKS.items() if saved * speed > moved * CPU)
        print(
            f"| {name} | {100 * hot_share:.0f} % | {100 * mean(static):.1f} % | {100 * mean(early):.1f} % "
            f"| {100 * mean(hindsight):.1f} % | {100 * mean(one.on_hot for one in moving):.1f} % | {cold:.2f} "
            f"| {moved:.1f} | {saved:.2f} | {pays or 'none'} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", type=Path, nargs=1)
    parser.add_argument("texts", type=Path, nargs="+", help="each of another kind than the profile's")
    parser.add_argument("--profile", type=Path, required=True, help="the text that the static choice is made from")
    parser.add_argument("--tokens", type=int, default=4096, help="per text")
    arguments = parser.parse_args()
    (model,) = arguments.model
    before, *texts = (record(model, text, arguments.tokens) for text in (arguments.profile, *arguments.texts))
    if min(len(text) for text in texts) < 2 * EVERY:
        sys.exit("a text is too short")
    print(
        "| model | hot | static | first half | hindsight | moving | cold work, static ÷ moving | moved a token "
        "| saved a token | pays on |\n|---|---:|---:|---:|---:|---:|---:|---:|---:|---|"
    )
    measure(model.stem, before, texts)


if __name__ == "__main__":
    main()
