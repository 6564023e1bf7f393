"""Decides which mode, artefacts, devices, layers, context and threads a run, an eval, a bench or `show` uses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import count, takewhile
from pathlib import Path
from typing import Literal

from pinfer.artefacts import paths
from pinfer.artefacts.placement import PlacementFile
from pinfer.artefacts.predictor import PredictorFile
from pinfer.artefacts.shards import ShardFile, hot_name
from pinfer.errors import PinferError
from pinfer.llama.cache_types import DEFAULT_CACHE, CacheTypes, cache_type_bytes
from pinfer.llama.devices import physical_cores
from pinfer.llama.engine import PluginConfig
from pinfer.model import ACTIVATIONS, Model

MAX_DEFAULT_CONTEXT = 4096
"""Context in tokens if neither the user nor the placement sets one and the model's is not smaller."""

NO_DEVICE = "none"


@dataclass(frozen=True, kw_only=True)
class ExecutionOptions:
    """What the user asked for. Every default leaves the choice to `decide`."""

    activation: str | None = None
    exact: bool = False
    """without the predictor"""
    dense: bool = False
    """stock libllama"""
    artefacts: Path | None = None
    """their folder; None: where pinfer writes them"""
    no_artefacts: bool = False
    device: str | None = None
    """ggml devices of the hot neurons, comma-separated, or ``none``; None: those of the placement"""
    n_gpu_layers: int | None = None
    n_ctx: int | None = None
    """0: the model's"""
    n_threads: int | None = None
    """None: physical cores"""
    cache_type_k: str | None = None
    cache_type_v: str | None = None
    """types of the KV cache; None: as solved, else F16"""


@dataclass(frozen=True)
class Execution:
    """How a model will be run."""

    model: Model
    plugin: PluginConfig | None
    """None: stock libllama computes everything"""
    folder: Path | None
    """the artefacts' folder; None: no artefact is used"""
    n_gpu_layers: int
    """layers whose attention is on the first device"""
    n_ctx: int
    n_threads: int
    cache_types: CacheTypes
    vram: int
    """the placement's budget in bytes, 0 without a placement"""
    vram_needed: tuple[int, ...]
    """bytes that must be free on each of ``devices``; empty if unknown"""
    devices: tuple[str, ...]
    """ggml devices named by the user or the placement, for hot neurons and dense layers; empty: libllama chooses"""
    notes: tuple[str, ...]
    """what the user should know, one line each"""

    @property
    def mode(self) -> Literal["dense", "exact", "predicted"]:
        if self.plugin is None:
            return "dense"
        return "predicted" if self.plugin.predictor else "exact"


def decide(model: Model, options: ExecutionOptions) -> Execution:
    """Decide, without loading the model or querying a device. The caller checks free memory when it loads the model.

    Raises PinferError, with the command that fixes it, if an artefact to be used is damaged, was made from another
    model, or lacks its other half.
    """
    notes: list[str] = []
    plugin, found = None, _Found()
    if options.dense or not (model.is_sparse or model.places_experts):
        notes += _why_dense(model, options)
    elif model.places_experts:
        found = _find(model, options, notes)
        if found.hot and found.placement:
            plugin = replace(PluginConfig.of(model), hot=found.hot, device=options.device or found.placement.device)
        else:
            found = _Found()
            notes += _why_dense(model, options)
    else:
        found = _find(model, options, notes)
        placed_on = found.placement.device if found.placement else None
        plugin = replace(
            PluginConfig.of(model),
            predictor=found.predictor,
            hot=found.hot or None,
            cold=found.cold,
            device=(options.device or placed_on) if found.hot else None,
        )
    placement = found.placement
    n_gpu_layers = placement.n_gpu_layers if placement and options.device != NO_DEVICE else 0
    trained = model.n_ctx_train or MAX_DEFAULT_CONTEXT
    n_ctx = placement.n_ctx if placement else min(trained, MAX_DEFAULT_CONTEXT)
    return Execution(
        model=model,
        plugin=plugin,
        folder=found.folder,
        n_gpu_layers=n_gpu_layers if options.n_gpu_layers is None else options.n_gpu_layers,
        n_ctx=n_ctx if options.n_ctx is None else options.n_ctx or trained,
        n_threads=options.n_threads or physical_cores(),
        cache_types=_cache_types(options, placement),
        vram=placement.vram if placement else 0,
        vram_needed=placement.vram_needed if placement and options.device is None else (),
        devices=_devices(options, placement, bool(found.hot)),
        notes=tuple(notes),
    )


def _cache_types(options: ExecutionOptions, placement: PlacementFile | None) -> CacheTypes:
    solved = placement.report.get("cache_types") if placement else None
    solved_k, solved_v = solved if isinstance(solved, list) and len(solved) == 2 else DEFAULT_CACHE
    types = options.cache_type_k or str(solved_k), options.cache_type_v or str(solved_v)
    for cache_type in types:
        cache_type_bytes(cache_type)  # raises for an unknown one
    return types


def _devices(options: ExecutionOptions, placement: PlacementFile | None, is_hot: bool) -> tuple[str, ...]:
    if options.device is not None:
        names = options.device
    else:
        names = placement.device if placement and (is_hot or placement.n_gpu_layers) else ""
    return () if names == NO_DEVICE else tuple(name for name in names.split(",") if name)


def _why_dense(model: Model, options: ExecutionOptions) -> list[str]:
    """Why no neuron is skipped, and a warning if stock libllama computes another activation."""
    if options.dense:
        why = []
    elif model.places_experts:
        why = [
            f"running dense: the experts of {model.arch} models have no exact zeros, and none is placed on a device "
            f"(with a GPU: pinfer prepare {model.path})"
        ]
    elif model.activation not in ACTIVATIONS and not (model.n_expert_used and model.obstacle):
        why = [f"running dense: {model.arch} models have no exact zeros (if this one uses ReLU, pass its --activation)"]
    else:
        why = [f"running dense: the model has {model.obstacle}"]
    if model.activation in ACTIVATIONS and not model.stock_computes_it:
        hint = "; run it without --dense" if options.dense and model.is_sparse else ""
        why.append(f"stock libllama does not compute {model.activation} for this model: the output is wrong{hint}")
    return why


@dataclass(frozen=True)
class _Found:
    """The artefacts of one folder that a run uses."""

    folder: Path | None = None
    predictor: Path | None = None
    cold: Path | None = None
    hot: tuple[Path, ...] = ()
    placement: PlacementFile | None = None


def _find(model: Model, options: ExecutionOptions, notes: list[str]) -> _Found:
    """The artefacts in the folder, each checked against the model."""
    if options.no_artefacts:
        return _Found()
    if options.artefacts is not None and not options.artefacts.is_dir():
        raise PinferError(
            f"{options.artefacts} is not a folder", f"leave out --artefacts, or run: pinfer profile {model.path}"
        )
    folder = options.artefacts or paths.artefact_dir(model.path, model.fingerprint, for_writing=False)
    predictor = _existing(folder / paths.PREDICTOR)
    if options.exact or model.places_experts:
        predictor = None
    if predictor is not None:
        PredictorFile.read(predictor, model)
    placement_path = _existing(folder / paths.PLACEMENT)
    placement = PlacementFile.read(placement_path, model) if placement_path else None
    cold, hot, placement_id = _shards(folder, model)
    if placement is not None and any(placement.n_hot) and placement.id != placement_id:
        notes.append(f"the placement has not been split yet; run: pinfer split {model.path}")
    if options.device == NO_DEVICE and hot:
        # The cold shard lacks the hot neurons, so without a device all neurons are read from the model itself.
        cold, hot = None, ()
    return _Found(folder, predictor, cold, hot, placement)


def _existing(path: Path) -> Path | None:
    return path if path.is_file() else None


def _shards(folder: Path, model: Model) -> tuple[Path | None, tuple[Path, ...], str]:
    """The cold shard if the model has one, the hot shards unless all are empty, and the id of their placement."""
    cold = _existing(folder / paths.COLD)
    hot = tuple(takewhile(Path.is_file, (folder / hot_name(i) for i in count())))
    again = f"make them again: pinfer split {model.path}"
    if model.places_experts:
        shards = [ShardFile.read(path, "hot", model) for path in hot]
        ids = {shard.placement_id for shard in shards}
        if len(ids) > 1:
            raise PinferError(f"{hot[0]} and {hot[1]} were split by different placements", again)
        return None, _unless_empty(hot, shards), "".join(ids)
    if cold is None:
        if hot:
            raise PinferError(f"{hot[0]} exists without {paths.COLD}", again)
        return None, (), ""
    placement_id = ShardFile.read(cold, "cold", model).placement_id
    shards = [ShardFile.read(path, "hot", model) for path in hot]
    if any(shard.placement_id != placement_id for shard in shards):
        raise PinferError(f"{hot[0]} and {paths.COLD} were split by different placements", again)
    return cold, _unless_empty(hot, shards), placement_id


def _unless_empty(hot: tuple[Path, ...], shards: Sequence[ShardFile]) -> tuple[Path, ...]:
    """The hot shards, unless they were made for a machine without a device."""
    return hot if any(len(ids) for shard in shards for ids in shard.units) else ()
