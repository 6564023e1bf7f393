"""Rotary position embeddings: from config.json to the keys and tensors that libllama reads.

config.json has ``rope_theta`` and ``rope_scaling``, or both in ``rope_parameters`` as transformers 5 writes it.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping
from typing import Any

import numpy as np
from gguf import GGUFWriter, RopeScalingType
from numpy.typing import NDArray

from pinfer.conversion.checkpoint import Checkpoint
from pinfer.conversion.hints import ANOTHER_MODEL, DOWNLOAD_AGAIN
from pinfer.conversion.plan import PlannedTensor
from pinfer.errors import PinferError

_YARN_KEYS = {
    "extrapolation_factor": "add_rope_scaling_yarn_ext_factor",
    "attention_factor": "add_rope_scaling_yarn_attn_factor",
    "beta_fast": "add_rope_scaling_yarn_beta_fast",
    "beta_slow": "add_rope_scaling_yarn_beta_slow",
}


def _parameters(checkpoint: Checkpoint) -> Mapping[str, Any]:
    config = checkpoint.config
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(given, dict):
        raise PinferError(f"config.json of {checkpoint.folder} has rope_scaling = {str(given)[:40]}", DOWNLOAD_AGAIN)
    kind = given.get("rope_type", given.get("type", "default"))
    return {"rope_theta": config.get("rope_theta"), **given, "rope_type": str(kind).lower()}


def rope_theta(checkpoint: Checkpoint) -> float:
    """Base of the frequencies; 10000 where config.json has none."""
    return checkpoint.number("rope_theta", default=10000.0, among=_parameters(checkpoint))


def rotated_dims(checkpoint: Checkpoint, head_dim: int, default_share: float, *, allows_part: bool = False) -> int:
    """Dimensions of a head that are rotated: an even number.

    Raises PinferError for a share that is not in (0, 1], and for one below 1 unless ``allows_part``.
    """
    keys = ("partial_rotary_factor", "rope_percent")
    share = checkpoint.number(*keys, default=default_share, among={**checkpoint.config, **_parameters(checkpoint)})
    n_dims = int(head_dim * share)
    if share > 1 or n_dims < 2 or n_dims % 2:
        raise PinferError(
            f"config.json of {checkpoint.folder} rotates {share:g} of the {head_dim} dimensions of each head, "
            "which is not possible",
            DOWNLOAD_AGAIN,
        )
    if n_dims != head_dim and not allows_part:
        raise PinferError(
            f"{checkpoint.folder} rotates {n_dims} of {head_dim} dimensions of each head, libllama's graph rotates all",
            ANOTHER_MODEL,
        )
    return n_dims


def add_rope(checkpoint: Checkpoint, header: GGUFWriter, n_dims: int) -> None:
    """Keys for rotating ``n_dims`` dimensions of a head. Raises PinferError for a scaling that libllama lacks."""
    rope = _parameters(checkpoint)
    header.add_rope_dimension_count(n_dims)
    header.add_rope_freq_base(rope_theta(checkpoint))
    match rope["rope_type"]:
        case "default" | "dynamic" | "llama3":
            # dynamic scaling only applies beyond the trained context; llama3's is a tensor
            pass
        case "linear":
            header.add_rope_scaling_type(RopeScalingType.LINEAR)
            header.add_rope_scaling_factor(checkpoint.number("factor", among=rope))
        case "yarn":
            header.add_rope_scaling_type(RopeScalingType.YARN)
            header.add_rope_scaling_factor(checkpoint.number("factor", among=rope))
            header.add_rope_scaling_orig_ctx_len(_original_context(checkpoint, rope))
            for key, add in _YARN_KEYS.items():
                if rope.get(key) is not None:
                    getattr(header, add)(checkpoint.number(key, among=rope, zero=True))
        case "longrope" | "su":
            header.add_rope_scaling_type(RopeScalingType.LONGROPE)
            header.add_rope_scaling_orig_ctx_len(_original_context(checkpoint, rope))
        case other:
            raise _unsupported(checkpoint, other)


def _unsupported(checkpoint: Checkpoint, kind: str) -> PinferError:
    return PinferError(
        f"{checkpoint.folder} scales its positions by {kind[:40]!r}, which libllama's graph does not support",
        ANOTHER_MODEL,
    )


def _original_context(checkpoint: Checkpoint, rope: Mapping[str, Any]) -> int:
    keys = ("original_max_position_embeddings", "max_position_embeddings")
    return checkpoint.integer(*keys, among={**checkpoint.config, **rope})


def rope_tensors(checkpoint: Checkpoint, known: Container[str], n_dims: int) -> list[PlannedTensor]:
    """Tensors ``[n_dims / 2]`` of factors for single frequencies: Llama 3's one, or longrope's two, or none.

    Raises PinferError for a scaling by such factors that is not among the ``known`` ones of libllama's graph.
    """
    rope = _parameters(checkpoint)
    kind = rope["rope_type"]
    if kind not in ("llama3", "longrope", "su"):
        return []
    if kind not in known:
        raise _unsupported(checkpoint, kind)
    if kind == "llama3":
        return [_planned(checkpoint, "rope_freqs.weight", _llama3_factors(checkpoint, rope, n_dims))]
    planned = []
    for name, key in {"rope_factors_long.weight": "long_factor", "rope_factors_short.weight": "short_factor"}.items():
        try:
            values = np.asarray(rope.get(key, ()), dtype=np.float32)
        except (TypeError, ValueError):
            values = np.empty(0, np.float32)
        if values.shape != (n_dims // 2,):
            raise PinferError(
                f"config.json of {checkpoint.folder} has no {key} with {n_dims // 2} numbers", DOWNLOAD_AGAIN
            )
        planned.append(_planned(checkpoint, name, values))
    return planned


def _planned(checkpoint: Checkpoint, name: str, values: NDArray[np.float32]) -> PlannedTensor:
    if not (np.isfinite(values).all() and (values > 0).all()):
        raise PinferError(f"rope_scaling in config.json of {checkpoint.folder} is not valid", DOWNLOAD_AGAIN)
    return PlannedTensor(name, values.shape, 0, load=lambda: values, type_name="F32")


def _llama3_factors(checkpoint: Checkpoint, rope: Mapping[str, Any], n_dims: int) -> NDArray[np.float32]:
    """What each frequency is divided by: 1 for short waves, ``factor`` for long ones, a ramp between them."""
    keys = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    factor, low, high, context = (checkpoint.number(k, default=d, among=rope) for k, d in keys.items())
    if low >= high:
        raise PinferError(
            f"config.json of {checkpoint.folder} has low_freq_factor {low:g} and high_freq_factor {high:g}",
            DOWNLOAD_AGAIN,
        )
    waves = 2 * math.pi * rope_theta(checkpoint) ** (np.arange(0, n_dims, 2, dtype=np.float64) / n_dims)
    ramp = np.clip((context / waves - low) / (high - low), 0.0, 1.0)
    return (1.0 / ((1.0 - ramp) / factor + ramp)).astype(np.float32)
