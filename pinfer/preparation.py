"""`pinfer prepare`: profile, train, solve and split in one go, without repeating a stage whose result is fresh."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

from pinfer.artefacts import paths
from pinfer.artefacts.artefact import open_artefact
from pinfer.artefacts.placement import PlacementFile
from pinfer.artefacts.predictor import PredictorFile
from pinfer.artefacts.profile import ProfileFile
from pinfer.artefacts.shards import ShardFile, cold_bytes, down_types
from pinfer.errors import PinferError
from pinfer.execution import Execution, ExecutionOptions, decide
from pinfer.llama.devices import measure_throughput, physical_cores
from pinfer.model import Model, open_model
from pinfer.profile import ProfileOptions, profile, sample_bytes, sample_count
from pinfer.progress import NULL_PROGRESS, Progress
from pinfer.solve import SolveOptions, solve
from pinfer.split import SplitOptions, split
from pinfer.train import TrainOptions, train

# A predictor takes up to about this share of the FFN.
_PREDICTOR_SHARE = 0.15
# Rough, from the README's times for AFM-4.5B: profiling runs at this share of the speed of a plain product,
# and training a layer costs as much as this many products of its first matrix with one token.
_PROFILE_SHARE = 0.5
_TRAIN_PRODUCTS = 60_000
# Rough speed of copying and requantising the FFN, in bytes per second.
_SPLIT_SPEED = 150e6
# Smaller FFNs are decoded in a time that fixed costs decide; a predictor gains nothing there (docs/benchmarks.md).
_SMALLEST_FFN = 64 << 20

_Options = TypeVar("_Options")


@dataclass(frozen=True, kw_only=True)
class PrepareOptions:
    """Settings of ``pinfer prepare``. None: any artefact will do, and a new one is made with the default."""

    dataset: str | None = None
    n_tokens: int | None = None
    vram: tuple[int, ...] | None = None
    """bytes, in all or of each device"""
    n_ctx: int | None = None
    """context to reserve memory for"""
    device: str | None = None
    activation: str | None = None
    n_threads: int | None = None
    force: bool = False
    """make everything again"""


_DEFAULTS = PrepareOptions()


@dataclass(frozen=True)
class Estimate:
    """What preparing will take, before it starts."""

    seconds: float
    disk: int
    """bytes of the artefacts together"""

    def __str__(self) -> str:
        return f"about {max(1, round(self.seconds / 60))} min and up to {_disk(self.disk)}"


def _disk(n: int) -> str:
    return f"{n / (1 << 30):.1f} GiB" if n >= 1 << 30 else f"{max(1, n >> 20)} MiB"


@dataclass(frozen=True)
class PrepareReport:
    """What was prepared."""

    model: Path
    folder: Path
    done: tuple[str, ...]
    """stages that ran; the others were fresh"""
    active: float
    """share of neurons that fire for a token, on average"""
    recall: float | None
    """share of the activation mass that the predictor keeps; None without one, where whole experts are placed"""
    candidates: float | None
    """share of neurons that it names"""
    hot_share: float
    """share of neurons on devices"""
    device: str
    vram: int
    n_bytes: int
    """of the artefacts on disk"""
    mode: str
    """how ``pinfer run`` computes the model now"""
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return {**asdict(self), "model": str(self.model), "folder": str(self.folder)}


def prepare(
    model_path: str | Path, options: PrepareOptions = _DEFAULTS, progress: Progress = NULL_PROGRESS
) -> PrepareReport:
    """Make every artefact of a model that is missing, damaged, or made with other settings than these.

    What an interrupted run finished is kept and skipped the next time. Raises PinferError as the stages do, and for a
    model with nothing to skip or to place, or a disk that is too small.
    """
    begin = time.monotonic()
    model = open_model(Path(model_path), options.activation)
    model.require_placeable()
    folder = paths.artefact_dir(model.path, model.fingerprint, for_writing=True)
    open_stages = _stages(model, folder, options)
    if open_stages:
        _announce(model, estimate(model, options), open_stages, folder, progress)
    for number, (name, stage) in enumerate(open_stages.items(), start=1):
        progress.note(f"[{number}/{len(open_stages)}] {name}")
        stage(progress)
    return _report(model, folder, tuple(open_stages), time.monotonic() - begin)


def _stages(model: Model, folder: Path, options: PrepareOptions) -> dict[str, Callable[[Progress], object]]:
    """The stages that have to run, in order: the first that is not fresh and all after it."""
    given = {name: value for name, value in asdict(options).items() if value is not None and name != "force"}

    def settings(kind: type[_Options], *names: str) -> _Options:
        return kind(**{name: given[name] for name in ("activation", *names) if name in given})

    profiled = settings(ProfileOptions, "dataset", "n_tokens", "n_threads")
    trained = settings(TrainOptions)
    solved = settings(SolveOptions, "vram", "n_ctx", "device")
    cut = settings(SplitOptions)
    counted, predictor = folder / paths.PROFILE, folder / paths.PREDICTOR
    placement = folder / paths.PLACEMENT
    asked: dict[str, Any] = {name: given[name] for name in ("dataset", "n_tokens") if name in given}
    placed: dict[str, Any] = {name: given[name] for name in ("vram", "n_ctx", "device") if name in given}
    stages: tuple[tuple[str, bool, Callable[[Progress], object]], ...] = (
        ("profile", _is_fresh(counted, "profile", model, asked), lambda p: profile(model.path, profiled, p)),
        ("train", _is_fresh(predictor, "predictor", model, {}, counted), lambda p: train(model.path, trained, p)),
        ("solve", _is_fresh(placement, "placement", model, placed, counted), lambda p: solve(model.path, solved, p)),
        ("split", _is_split(folder, model), lambda p: split(model.path, cut, p)),
    )
    if model.places_experts:
        stages = tuple(stage for stage in stages if stage[0] != "train")
    first = next((i for i, (_, fresh, _) in enumerate(stages) if options.force or not fresh), len(stages))
    return {name: work for name, _, work in stages[first:]}


def _is_fresh(path: Path, kind: str, model: Model, wanted: Mapping[str, Any], source: Path | None = None) -> bool:
    """Whether the artefact is whole, not older than its source, and was made with the wanted settings."""
    try:
        made = open_artefact(path, kind, model).settings
        is_newer = source is None or source.stat().st_mtime <= path.stat().st_mtime
    except (PinferError, OSError):
        return False
    same = all(made.get(name) == json.loads(json.dumps(value)) for name, value in wanted.items())
    return is_newer and same and not made.get("interrupted")


def _is_split(folder: Path, model: Model) -> bool:
    name, kind = (paths.HOT, "hot") if model.places_experts else (paths.COLD, "cold")
    try:
        shard = ShardFile.read(folder / name, kind, model)
        return shard.placement_id == PlacementFile.read(folder / paths.PLACEMENT, model).id
    except PinferError:
        return False


def estimate(model: Model, options: PrepareOptions) -> Estimate:
    """Time from a measured product, disk from the shapes. Takes a second."""
    n_tokens = options.n_tokens or ProfileOptions().n_tokens
    ffn = _ffn_bytes(model)
    if model.places_experts:
        given = (options.vram,) if isinstance(options.vram, int) else options.vram or (ffn,)
        shards, samples = min(ffn, sum(given)), 0
    else:
        shards = sum(cold_bytes(f, down_types(f, None)) for f in model.ffns)
        samples = min(n_tokens, sample_count(model)) * sample_bytes(model)
    flops = measure_throughput("CPU", options.n_threads or physical_cores())
    used = {t.name: model.n_expert_used / f.n_experts for f in model.ffns if f.is_stack for t in f.matrices}
    n_weights = sum(math.prod(t.shape) * used.get(t.name, 1) for t in model.tensors)
    profiling = 2 * n_weights * n_tokens / (flops * _PROFILE_SHARE)
    if model.places_experts:
        return Estimate(seconds=profiling + shards / _SPLIT_SPEED, disk=shards)
    training = 2 * sum(f.n_embd * f.n_neurons for f in model.ffns) * _TRAIN_PRODUCTS / flops
    return Estimate(
        seconds=profiling + training + (ffn + shards) / _SPLIT_SPEED,
        disk=int(shards + samples + ffn * _PREDICTOR_SHARE),
    )


def _ffn_bytes(model: Model) -> int:
    return sum(f.n_bytes for f in model.ffns)


def worth_preparing(execution: Execution, options: ExecutionOptions) -> Estimate | None:
    """What preparing would take, if it would make this execution faster; None if not, or if the user chose its mode."""
    chosen = options.exact or options.no_artefacts or options.artefacts is not None
    if chosen or execution.mode != "exact" or _ffn_bytes(execution.model) < _SMALLEST_FFN:
        return None
    try:
        return estimate(execution.model, PrepareOptions(n_threads=execution.n_threads))
    except PinferError:  # too little memory to measure: the run itself is not affected
        return None


def _announce(model: Model, expected: Estimate, stages: Iterable[str], folder: Path, progress: Progress) -> None:
    """One line before the work starts. Raises PinferError if the disk is too small."""
    progress.note(f"preparing {model.name}: {', '.join(stages)}; {expected} in {folder}")
    existing = sum(file.stat().st_size for file in folder.rglob("*.gguf"))
    free = shutil.disk_usage(folder).free
    if expected.disk > free + existing:
        raise PinferError(
            f"{folder} has {free / (1 << 30):.1f} GiB free, preparing takes up to {_disk(expected.disk)}",
            "free some space, or name another folder: export PINFER_HOME=FOLDER",
        )


def _report(model: Model, folder: Path, done: tuple[str, ...], seconds: float) -> PrepareReport:
    counted = ProfileFile.read(folder / paths.PROFILE, model)
    predictor = None if model.places_experts else PredictorFile.read(folder / paths.PREDICTOR, model)
    placement = PlacementFile.read(folder / paths.PLACEMENT, model)
    return PrepareReport(
        model=model.path,
        folder=folder,
        done=done,
        active=counted.mean_active(),
        recall=fmean(predictor.recall) if predictor else None,
        candidates=fmean(predictor.candidates) if predictor else None,
        hot_share=placement.hot_share(model),
        device=placement.device,
        vram=placement.vram,
        n_bytes=sum(file.stat().st_size for file in folder.rglob("*.gguf")),
        mode=decide(model, ExecutionOptions()).mode,
        seconds=seconds,
    )
