"""`pinfer prepare`: profile, train, solve and split in one go, without repeating a stage whose result is fresh."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, replace
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
from pinfer.llama.ggml import F16, F32
from pinfer.model import Model, open_model
from pinfer.profile import MAX_SAMPLES, ProfileOptions, profile, sample_bytes, sample_count
from pinfer.progress import NULL_PROGRESS, Progress
from pinfer.solve import SolveOptions, solve
from pinfer.split import SplitOptions, split
from pinfer.train import TrainOptions, train

# A predictor takes up to about this share of the FFN.
_PREDICTOR_SHARE = 0.15
# Measured with 2 threads on a quiet machine, on models of five architectures: shares of the speed of a product of F16
# matrices. Experts are multiplied token by token. Types that llama.cpp rearranges for its best kernels, and FFNs in
# pinfer's own, are quick. Training is of products in float32.
_EXPERTS_SHARE = 0.16
_QUICK_SHARE = 1.2
_QUICK_TYPES = ("Q4_0", "Q4_K", "Q2_K", "IQ4_NL")
_TRAIN_SHARE = 0.26
# Of the speed of a product of their own type, for all other matrices and what is computed between them.
_OTHERS_SHARE = 0.5
# Products of the size of a covariance that fitting a predictor takes, in all.
_COVARIANCES = 8
# Copying and requantising the FFN, in bytes per second.
_SPLIT_SPEED = 200e6
# Profiling by default takes no longer than these seconds, unless the samples need more tokens.
_PROFILE_SECONDS = 1500
# Memory of a process without its model: libraries, compute buffers, logits.
_OWN_MEMORY = 600 << 20
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
    memory: int
    """bytes of memory, besides the model's file"""
    mapped: int
    """bytes of the model's file; what does not fit into memory is read again"""
    n_tokens: int
    """tokens to profile"""

    def __str__(self) -> str:
        return f"about {max(1, round(self.seconds / 60))} min and up to {_size(self.disk)} of disk"

    @property
    def needs(self) -> str:
        """The same with the memory."""
        return f"{self}, {_size(self.memory)} of memory besides the model's {_size(self.mapped)}"


def _size(n: int) -> str:
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
        expected = estimate(model, options, open_stages)
        _announce(model, expected, open_stages, folder, progress)
        for number, (name, stage) in enumerate(open_stages.items(), start=1):
            progress.note(f"[{number}/{len(open_stages)}] {name}")
            stage(expected.n_tokens, progress)
    return _report(model, folder, tuple(open_stages), time.monotonic() - begin)


def _stages(model: Model, folder: Path, options: PrepareOptions) -> dict[str, Callable[[int, Progress], object]]:
    """The stages that have to run, in order: the first that is not fresh and all after it.

    They take the number of tokens to profile.
    """
    given = {name: value for name, value in asdict(options).items() if value is not None and name != "force"}

    def settings(kind: type[_Options], *names: str) -> _Options:
        return kind(**{name: given[name] for name in ("activation", *names) if name in given})

    profiled = settings(ProfileOptions, "dataset", "n_threads")
    trained = settings(TrainOptions)
    solved = settings(SolveOptions, "vram", "n_ctx", "device")
    cut = settings(SplitOptions)
    counted, predictor = folder / paths.PROFILE, folder / paths.PREDICTOR
    placement = folder / paths.PLACEMENT
    asked: dict[str, Any] = {name: given[name] for name in ("dataset", "n_tokens") if name in given}
    placed: dict[str, Any] = {name: given[name] for name in ("vram", "n_ctx", "device") if name in given}
    stages: tuple[tuple[str, bool, Callable[[int, Progress], object]], ...] = (
        (
            "profile",
            _is_fresh(counted, "profile", model, asked),
            lambda n, p: profile(model.path, replace(profiled, n_tokens=n), p),
        ),
        ("train", _is_fresh(predictor, "predictor", model, {}, counted), lambda _, p: train(model.path, trained, p)),
        ("solve", _is_fresh(placement, "placement", model, placed, counted), lambda _, p: solve(model.path, solved, p)),
        ("split", _is_split(folder, model), lambda _, p: split(model.path, cut, p)),
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


def estimate(
    model: Model, options: PrepareOptions, stages: Collection[str] = ("profile", "train", "split")
) -> Estimate:
    """Time of these stages from measured products, disk and memory from the shapes. Takes a second.

    Without a number of tokens in ``options``, as many as 25 minutes allow.
    """
    n_threads = options.n_threads or physical_cores()
    flops = measure_throughput("CPU", n_threads)
    token = _token_seconds(model, n_threads, flops)
    n_tokens = options.n_tokens or default_tokens(token)
    ffn = _ffn_bytes(model)
    if model.places_experts:  # no predictor, and no shard but those of the devices
        given = (options.vram,) if isinstance(options.vram, int) else options.vram or (ffn,)
        shards, samples, products, fitting, predictor = min(ffn, sum(given)), 0, 0, 0, 0
    else:
        shards = sum(cold_bytes(f, down_types(f, None)) for f in model.ffns)
        samples = min(n_tokens, sample_count(model)) * sample_bytes(model)
        products = sum(2 * f.n_embd**2 * (f.n_neurons + _COVARIANCES * f.n_embd) for f in model.ffns)
        fitting = max(16 * (f.n_ff * f.n_embd + 2 * f.n_embd**2) + f.n_neurons * f.n_embd // 8 for f in model.ffns)
        predictor = int(ffn * _PREDICTOR_SHARE)
    seconds = {
        "profile": token * n_tokens,
        "train": products / (2 * _TRAIN_SHARE * flops),
        "split": (ffn + shards) / _SPLIT_SPEED,
    }
    return Estimate(
        seconds=sum(seconds.get(name, 0) for name in stages),
        disk=shards + samples + predictor,
        memory=_OWN_MEMORY + max(samples, fitting),
        mapped=sum(t.n_bytes for t in model.tensors),
        n_tokens=n_tokens,
    )


def _token_seconds(model: Model, n_threads: int, flops: float) -> float:
    """Seconds to profile a token, given the speed of products of F16 matrices; other slow types are measured."""
    own = {t.name for f in model.ffns if not f.is_stack for t in f.matrices}
    stacks = {t.name: model.n_expert_used / f.n_experts for f in model.ffns if f.is_stack for t in f.matrices}
    speeds = {F16: flops}
    seconds = 0.0
    for t in model.tensors:
        work = 2 * math.prod(t.shape)
        if t.name in stacks:
            seconds += work * stacks[t.name] / (flops * _EXPERTS_SHARE)
        elif not t.name.startswith("blk.") or len(t.shape) < 2:
            continue  # looked up, or too small to matter
        elif t.type_name in _QUICK_TYPES or (t.name in own and t.type not in (F32, F16)):
            seconds += work / (flops * _QUICK_SHARE)
        else:
            if t.type not in speeds:
                speeds[t.type] = measure_throughput("CPU", n_threads, t.type)
            seconds += work / (speeds[t.type] * _OTHERS_SHARE)
    return seconds


def default_tokens(token_seconds: float) -> int:
    """Tokens to profile where nobody names a number, given the time of one."""
    n_tokens = int(_PROFILE_SECONDS / token_seconds) // 1024 * 1024
    return min(max(n_tokens, MAX_SAMPLES), ProfileOptions().n_tokens)


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


def _announce(model: Model, expected: Estimate, stages: Collection[str], folder: Path, progress: Progress) -> None:
    """One line before the work starts. Raises PinferError if the disk is too small."""
    tokens = f" ({expected.n_tokens:,} tokens)" if "profile" in stages else ""
    names = ", ".join(name + (tokens if name == "profile" else "") for name in stages)
    progress.note(f"preparing {model.name}: {names}; {expected.needs}; in {folder}")
    existing = sum(file.stat().st_size for file in folder.rglob("*.gguf"))
    free = shutil.disk_usage(folder).free
    if expected.disk > free + existing:
        raise PinferError(
            f"{folder} has {free / (1 << 30):.1f} GiB free, preparing takes up to {_size(expected.disk)}",
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
