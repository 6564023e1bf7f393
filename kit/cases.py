"""The benchmark's cases: their models, their device memory budgets, and how much of a model fits a machine."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from models.synth import PRESETS, Model, SynthOptions, n_bytes

GIB = 2**30
# Left free on the disk; and the share of memory that files may take, the rest being for buffers and processes.
DISK_MARGIN = 2 * GIB
MEMORY_SHARE = 0.85
# Size of predictors and profile samples, as a share of the FFN.
TRAINED_SHARE = 0.12


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    name: str
    model: SynthOptions
    cap: int | None
    """Budget of device memory for each side, in bytes; None for no limit."""
    batches: tuple[int, ...]
    aims: tuple[float, ...]
    """The speedup over llama.cpp to aim for, by batch size."""
    n_gen: int = 64
    rounds: int = 5
    n_profile: int = 2048
    """Tokens to profile."""


def _model(preset: str, type: str, active: float) -> SynthOptions:
    return replace(PRESETS[preset], type=type, active=active)


_SMOKE = SynthOptions(arch="arcee", n_embd=512, n_ff=4096, n_layer=4, n_head=8, n_head_kv=4, n_vocab=2048, n_ctx=2048)
_FALCON = _model("falcon-40b", "F16", 0.05)

CASES = {
    case.name: case
    for case in (
        Case("smoke", _SMOKE, 24 << 20, (1, 4), (0.0, 0.0), n_gen=16, rounds=2, n_profile=1024),
        Case("fits", _model("llama-7b", "F16", 0.10), None, (1,), (1.0,)),
        Case("llama-7b-f16", _model("llama-7b", "F16", 0.10), 8 * GIB, (1,), (4.0,)),
        Case("falcon-40b-q4_0", _model("falcon-40b", "Q4_0", 0.05), 11 * GIB, (1,), (5.0,)),
        Case("falcon-40b-f16", _FALCON, 24 * GIB, (1,), (11.7,), n_gen=32),
        Case(
            "falcon-40b-f16-batches",
            _FALCON,
            24 * GIB,
            (1, 4, 8, 16, 32),
            (11.7, 5.7, 4.9, 4.7, 4.4),
            n_gen=16,
            rounds=3,
        ),
        Case("opt-30b-f16", _model("opt-30b", "F16", 0.05), 24 * GIB, (1,), (10.9,), n_gen=32),
        Case("llama-70b-q4_0", _model("llama-70b", "Q4_0", 0.10), 24 * GIB, (1,), (3.0,), n_gen=32),
    )
}


@dataclass(frozen=True)
class Sizes:
    """Sizes in a model's file, in bytes: everything outside the layers, one layer, and that layer's FFN matrices."""

    once: int
    layer: int
    ffn: int

    @staticmethod
    def of(options: SynthOptions) -> Sizes:
        """The sizes of a synthetic model, whose layers all have the same size."""
        plans = Model(replace(options, n_layer=1)).plans()
        layer = [plan for plan in plans if plan.name.startswith("blk.")]
        ffn = [plan for plan in layer if ".ffn_" in plan.name and plan.name.endswith("weight") and plan.rows]
        whole, of_layer = sum(map(n_bytes, plans)), sum(map(n_bytes, layer))
        return Sizes(whole - of_layer, of_layer, sum(map(n_bytes, ffn)))

    def model(self, n_layer: int) -> int:
        return self.once + n_layer * self.layer

    def files(self, n_layer: int, type: str) -> int:
        """Bytes of the model, its shards (whose down rows have more bits), predictors and samples."""
        shards = 1.6 if type.startswith("Q4") else 1.05
        return self.model(n_layer) + int(n_layer * self.ffn * (shards + TRAINED_SHARE))


@dataclass(frozen=True)
class Fitted:
    """A case reduced to fit a machine: fewer layers, and a budget smaller by the same factor."""

    case: Case
    n_layer: int
    cap: int | None
    """Bytes; None for no limit."""
    model_bytes: int
    sizes: Sizes

    @property
    def whole(self) -> bool:
        return self.n_layer == self.case.model.n_layer


def room(work: Path) -> int:
    """Bytes that files may take: they must fit the disk of the work folder, and memory, since they are read often."""
    used = sum(file.stat().st_size for file in work.rglob("*") if file.is_file())
    free = shutil.disk_usage(work).free + used - DISK_MARGIN
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(0, min(free, int(MEMORY_SHARE * memory)))


def fit(case: Case, bytes_free: int) -> Fitted:
    """Reduces the case to as many layers as fit. The budget shrinks with the model, so that the same share of the model
    fits the device. Raises ValueError if not even two layers fit."""
    sizes = Sizes.of(case.model)
    full = sizes.model(case.model.n_layer)
    for n_layer in range(case.model.n_layer, 1, -1):
        if sizes.files(n_layer, case.model.type) <= bytes_free:
            size = sizes.model(n_layer)
            return Fitted(case, n_layer, None if case.cap is None else case.cap * size // full, size, sizes)
    raise ValueError(f"{case.name}: {bytes_free / GIB:.1f} GiB of disk and memory are not enough for two of its layers")
