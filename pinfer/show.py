"""Describes a model, its artefacts and how pinfer will run it. Reads headers, and tensors only to verify artefacts."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import count, takewhile
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np

from pinfer.artefacts import paths
from pinfer.artefacts.artefact import made_by, verify_artefact
from pinfer.artefacts.placement import PlacementFile
from pinfer.artefacts.predictor import PredictorFile
from pinfer.artefacts.profile import ProfileFile, SamplesFile
from pinfer.artefacts.shards import ShardFile, hot_name
from pinfer.errors import PinferError
from pinfer.execution import ExecutionOptions, decide
from pinfer.gguf_io.reader import GgufError
from pinfer.model import ACTIVATION_KEY, ACTIVATIONS, Model, Tensor, open_model
from pinfer.profile import share_of_most
from pinfer.progress import NULL_PROGRESS, Progress

_FFN = re.compile(
    r"blk\.\d+\.(ffn_(up|gate|down|gate_up)(_exps|_shexp|_chexps)?|channel_mix_(key|value))\.(weight|bias|scale)"
)
_UP = re.compile(r"blk\.\d+\.(?:ffn_(up|gate_up)(_exps|_shexp|_chexps)?|channel_mix_key)\.weight")
_EMBEDDINGS = re.compile(r"(token_embd|output|position_embd|token_types|per_layer_token_embd)\b.*")

# Bytes of a value in llama.cpp's default KV cache, F16.
_KV_BYTES = 2
KV_TOKENS = 1024

FITS, ABSENT, STALE, UNUSABLE = "fits", "absent", "stale", "unusable"
_USED = ("predictor", "placement", "hot", "cold")
"""artefacts that a run reads"""


@dataclass(frozen=True, kw_only=True)
class ShowOptions(ExecutionOptions):
    """Settings of ``pinfer show``: those of a run, and its own."""

    verify: bool = False
    """compare all artefacts with their checksums"""


@dataclass(frozen=True)
class Part:
    """Tensors with one purpose."""

    bytes: int
    types: Mapping[str, int]
    """bytes by type, largest first"""


@dataclass(frozen=True)
class ArtefactState:
    """One artefact: whether it exists, whether it can be used, and what was measured when it was made."""

    kind: str
    path: Path
    state: str
    """``fits``, ``absent``, ``stale`` (works, but the placement is newer) or ``unusable``"""
    bytes: int = 0
    problem: str = ""
    mend: str = ""
    """the command that makes it (again)"""
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ShowReport:
    """Everything ``pinfer show`` reports."""

    model: Path
    arch: str
    size: int
    n_params: int
    activation: str
    activation_source: str
    """``--activation``, the key, or ``architecture``"""
    activation_threshold: float
    is_sparse: bool
    gated: bool
    n_layer: int
    n_embd: int
    n_ff: int
    n_neurons: int
    n_expert: int
    n_head: tuple[int, ...]
    """per layer"""
    n_head_kv: tuple[int, ...]
    """per layer"""
    head_dim_k: int
    head_dim_v: int
    n_ctx_train: int
    n_vocab: int
    parts: Mapping[str, Part]
    """``ffn``, ``dense`` and ``embeddings``"""
    kv_bytes_per_1k: int
    """of 1,024 tokens in F16"""
    artefact_folder: Path
    artefacts: tuple[ArtefactState, ...]
    verified: bool
    """whether the artefacts were compared with their checksums"""
    mode: str
    """``dense``, ``exact``, ``predicted``, or ``refused`` if `run` would refuse an artefact"""
    plan: str
    """how pinfer will run the model, one sentence"""
    next: str
    """the command to run next"""

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        return {
            **asdict(self),
            "model": str(self.model),
            "artefact_folder": str(self.artefact_folder),
            "artefacts": [{**asdict(a), "path": str(a.path)} for a in self.artefacts],
        }


def show(model_path: Path, options: ShowOptions, progress: Progress = NULL_PROGRESS) -> ShowReport:
    """Describe a model and its artefacts. Raises PinferError if it is not a model; bad artefacts are reported."""
    model = open_model(model_path, options.activation)
    folder = paths.artefact_dir(model.path, model.fingerprint, for_writing=False)
    artefacts = artefact_states(model, folder)
    if options.verify:
        artefacts = tuple(_verified(model, artefact, progress) for artefact in artefacts)
    mode, plan = _plan(model, artefacts, options)
    return ShowReport(
        model=model.path,
        arch=model.arch,
        size=model.gguf.size,
        n_params=sum(_count(t) for t in model.tensors),
        activation=model.activation,
        activation_source=_activation_source(model, options.activation),
        activation_threshold=model.activation_threshold,
        is_sparse=model.is_sparse,
        gated=model.gated,
        n_layer=model.n_layer,
        n_embd=model.n_embd,
        n_ff=model.n_ff,
        n_neurons=_n_neurons(model),
        n_expert=_expert_count(model),
        n_head=model.n_head,
        n_head_kv=model.n_head_kv,
        head_dim_k=model.head_dim_k,
        head_dim_v=model.head_dim_v,
        n_ctx_train=model.n_ctx_train,
        n_vocab=model.n_vocab,
        parts=_parts(model.tensors),
        kv_bytes_per_1k=round(
            sum(model.kv_bytes_per_token(layer, _KV_BYTES, _KV_BYTES) for layer in range(model.n_layer)) * KV_TOKENS
        ),
        artefact_folder=folder,
        artefacts=artefacts,
        verified=options.verify,
        mode=mode,
        plan=plan,
        next=_next(model, artefacts),
    )


def _count(tensor: Tensor) -> int:
    return tensor.row_length * tensor.n_rows


def _activation_source(model: Model, given: str | None) -> str:
    if given is not None:
        return "--activation"
    return ACTIVATION_KEY if ACTIVATION_KEY in model.gguf else "architecture"


def _expert_count(model: Model) -> int:
    value = model.gguf.get(f"{model.arch}.expert_count")
    return value if isinstance(value, int) else 0


def _n_neurons(model: Model) -> int:
    """All neurons in the file, including those of experts. A fused gate-and-up matrix has two rows a neuron."""
    total = 0
    for tensor in model.tensors:
        if match := _UP.fullmatch(tensor.name):
            fused = match[1] == "gate_up" or (not match[2] and tensor.n_rows == 2 * model.n_ff)
            total += tensor.n_rows // 2 if fused else tensor.n_rows
    return total


def _parts(tensors: Sequence[Tensor]) -> dict[str, Part]:
    """Sizes and types of the FFN, of embeddings and output, and of the rest: attention, norms, routers."""
    sizes: dict[str, dict[str, int]] = {"ffn": {}, "dense": {}, "embeddings": {}}
    for tensor in tensors:
        name = "ffn" if _FFN.fullmatch(tensor.name) else "embeddings" if _EMBEDDINGS.fullmatch(tensor.name) else "dense"
        sizes[name][tensor.type_name] = sizes[name].get(tensor.type_name, 0) + tensor.n_bytes
    return {
        name: Part(sum(types.values()), dict(sorted(types.items(), key=lambda item: -item[1])))
        for name, types in sizes.items()
    }


# --- artefacts --------------------------------------------------------------------------------------------------------


def artefact_states(model: Model, folder: Path) -> tuple[ArtefactState, ...]:
    """Every kind of artefact in ``folder``: whether it exists, fits the model and belongs to the others."""
    readers: list[tuple[str, str, Callable[[Path, Model], Mapping[str, Any]]]] = [
        ("profile", paths.PROFILE, _profile_facts),
        ("samples", paths.SAMPLES, _samples_facts),
        ("predictor", paths.PREDICTOR, _predictor_facts),
        ("placement", paths.PLACEMENT, _placement_facts),
        ("hot", paths.HOT, lambda path, model: _shard_facts(path, "hot", model)),
        ("cold", paths.COLD, lambda path, model: _shard_facts(path, "cold", model)),
    ]
    if model.places_experts:
        readers = [reader for reader in readers if reader[0] in ("profile", "placement", "hot")]
    return _checked_together({kind: _state(model, kind, folder / name, read) for kind, name, read in readers})


def _checked_together(found: dict[str, ArtefactState]) -> tuple[ArtefactState, ...]:
    """The shards must belong together, and to the placement."""
    placement, hot, cold = found["placement"], found["hot"], found.get("cold")
    if cold and hot.state == FITS and cold.state == ABSENT:
        found["hot"] = replace(hot, state=UNUSABLE, problem=f"{hot.path} exists without {cold.path.name}")
    halves = [shard for shard in (hot, cold) if shard and shard.state == FITS]
    ids = {shard.facts["placement_id"] for shard in halves}
    for shard in halves:
        if cold and len(ids) > 1:
            problem = f"{hot.path.name} and {cold.path.name} were split by different placements"
            found[shard.kind] = replace(shard, state=UNUSABLE, problem=problem)
        elif placement.state == FITS and placement.facts["id"] not in ids and found[shard.kind].state == FITS:
            found[shard.kind] = replace(shard, state=STALE, problem=f"{shard.path.name} is older than the placement")
    return tuple(found.values())


def _state(model: Model, kind: str, path: Path, read: Callable[[Path, Model], Mapping[str, Any]]) -> ArtefactState:
    mend = made_by(kind, model)
    try:
        size = path.stat().st_size
    except OSError:
        return ArtefactState(kind, path, ABSENT, mend=mend)
    try:
        return ArtefactState(kind, path, FITS, size, mend=mend, facts=read(path, model))
    except PinferError as error:
        return ArtefactState(kind, path, UNUSABLE, size, error.message, mend)
    except GgufError as error:
        return ArtefactState(kind, path, UNUSABLE, size, f"{path} is damaged: {error}", mend)


def _verified(model: Model, artefact: ArtefactState, progress: Progress) -> ArtefactState:
    """The artefact, unusable if a tensor of it does not have its checksum."""
    if artefact.state in (ABSENT, UNUSABLE):
        return artefact
    files = [artefact.path]
    if artefact.kind == "hot":
        files = list(takewhile(Path.is_file, (artefact.path.with_name(hot_name(i)) for i in count())))
    try:
        for file in files:
            verify_artefact(file, artefact.kind, model, progress)
    except PinferError as error:
        return replace(artefact, state=UNUSABLE, problem=error.message)
    return artefact


def _profile_facts(path: Path, model: Model) -> dict[str, Any]:
    file = ProfileFile.read(path, model)
    count = np.concatenate(file.count)
    routed = [r for r in file.routed if r is not None]
    neurons = {"active": file.mean_active(), "most": share_of_most(count), "never": float((count == 0).mean())}
    return {
        "tokens": file.tokens,
        "corpus": file.corpus,
        **({} if model.places_experts else neurons),
        **({"experts_most": fmean(share_of_most(r) for r in routed)} if routed else {}),
    }


def _samples_facts(path: Path, model: Model) -> dict[str, Any]:
    return {"n_samples": SamplesFile.read(path, model).n_samples}


def _predictor_facts(path: Path, model: Model) -> dict[str, Any]:
    file = PredictorFile.read(path, model)
    kinds = dict.fromkeys(file.kind)
    return {
        "recall": fmean(file.recall),
        "recall_of_worst_layer": min(file.recall),
        "candidates": fmean(file.candidates),
        "kinds": {kind: file.kind.count(kind) for kind in kinds},
    }


def _placement_facts(path: Path, model: Model) -> dict[str, Any]:
    file = PlacementFile.read(path, model)
    return {
        "id": file.id,
        "hot_share": file.hot_share(model),
        "hot_activations": file.report.get("hot_activations"),
        "device": file.device,
        "vram": file.vram,
        "n_gpu_layers": file.n_gpu_layers,
        "n_ctx": file.n_ctx,
        "tokens_per_s": file.report.get("tokens_per_s"),
    }


def _shard_facts(path: Path, kind: str, model: Model) -> dict[str, Any]:
    file = ShardFile.read(path, kind, model)
    return {
        "placement_id": file.placement_id,
        "n_neurons": file.n_neurons(model),
        "down_types": file.describe_types(),
    }


# --- how it will run ------------------------------------------------------------------------------------------------


def _plan(model: Model, artefacts: Sequence[ArtefactState], options: ShowOptions) -> tuple[str, str]:
    """Mode and a sentence on what ``pinfer run`` does with the model and these artefacts."""
    bad = dict.fromkeys(a.mend for a in artefacts if a.kind in _USED and a.state == UNUSABLE)
    error = ""
    try:
        mode = decide(model, options).mode
    except PinferError as refused:
        error = str(refused)
    if error or (options.verify and bad):
        again = " and ".join(bad) or error
        return "refused", f"run cannot use these artefacts: make them again ({again}), or pass --no-artefacts"
    if model.places_experts:
        return mode, _experts(model, {a.kind: a for a in artefacts}, mode)
    if mode == "dense" and model.activation not in ACTIVATIONS and not (model.n_expert_used and model.obstacle):
        return mode, f"no exact zeros (SiLU, GELU or similar in {model.arch}): runs dense on stock libllama"
    if mode == "dense":
        return mode, f"{model.obstacle}: runs dense on stock libllama"
    by_kind = {a.kind: a for a in artefacts}
    hot, cold = by_kind["hot"], by_kind["cold"]
    on_device = hot.facts.get("n_neurons", 0)
    is_split = cold.state in (FITS, STALE)
    where = ""
    if on_device and is_split:
        device = by_kind["placement"].facts.get("device") or "the device"
        where = f"; {100 * on_device / model.n_neurons:.1f} % of the neurons are hot, on {device}"
    if mode == "predicted":
        return mode, _predicted(model, by_kind["predictor"].facts["candidates"], is_split) + where
    return mode, _exact(model, by_kind["profile"].facts.get("active"), is_split) + where


def _experts(model: Model, by_kind: Mapping[str, ArtefactState], mode: str) -> str:
    what = f"experts without exact zeros (SiLU, GELU or similar in {model.arch})"
    if mode == "dense":
        return f"{what}: runs on stock libllama until `pinfer solve` and `pinfer split` place some on a device"
    share = by_kind["hot"].facts.get("n_neurons", 0) / model.n_neurons
    device = by_kind["placement"].facts.get("device") or "the device"
    return f"{what}: {100 * share:.1f} % of them are on {device}, the CPU computes the others at the same time"


def _predicted(model: Model, candidates: float, is_split: bool) -> str:
    rest = "" if is_split else "; the whole down projection is computed until you run `pinfer split`"
    return f"predicted mode: computes the {100 * candidates:.1f} % of neurons that the predictor names{rest}"


def _exact(model: Model, active: float | None, is_split: bool) -> str:
    inactive = "inactive neurons" + (f" ({100 * (1 - active):.1f} %)" if active is not None else "")
    saved = "up and down projections" if model.gated else "down projection"
    if is_split:
        return f"exact mode: skips the {saved} of {inactive}"
    if model.gated:
        return f"exact mode: skips the up projection of {inactive}, and the down projection after `pinfer split`"
    return f"exact mode: skips the down projection of {inactive} only after `pinfer split`"


def _next(model: Model, artefacts: Sequence[ArtefactState]) -> str:
    """The first stage whose result is missing or unusable; `run` if there is none."""
    if not model.is_sparse and not model.places_experts:
        return "run"
    # Samples are only needed for training and may be deleted afterwards.
    trained = any(a.kind == "predictor" and a.state == FITS for a in artefacts)
    open_ones = [a for a in artefacts if a.state != FITS and not (a.kind == "samples" and trained)]
    return open_ones[0].mend.split()[1] if open_ones else "run"
