"""Rotary position embeddings: what config.json says of them, as the keys and tensors that libllama reads.

config.json has ``rope_theta`` and ``rope_scaling``, or both in ``rope_parameters`` as transformers 5 writes it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pinfer.conversion.checkpoint import Checkpoint
from pinfer.conversion.plan import PlannedTensor
from pinfer.errors import PinferError

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFWriter
    from numpy.typing import NDArray

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
        raise PinferError(f"config.json of {checkpoint.folder} has rope_scaling = {given!r}")
    kind = given.get("rope_type", given.get("type", "default"))
    return {"rope_theta": config.get("rope_theta"), **given, "rope_type": str(kind).lower()}


def rope_theta(checkpoint: Checkpoint) -> float:
    """Base of the frequencies; 10000 where config.json does not say."""
    return float(_parameters(checkpoint).get("rope_theta") or 10000.0)


def partial_rotary_factor(checkpoint: Checkpoint, default: float) -> float:
    """Share of a head's dimensions that are rotated."""
    places = (
        (_parameters(checkpoint), "partial_rotary_factor"),
        (checkpoint.config, "partial_rotary_factor"),
        (checkpoint.config, "rope_percent"),
    )
    return next((float(found[key]) for found, key in places if found.get(key) is not None), default)


def add_rope(checkpoint: Checkpoint, header: GGUFWriter, n_dims: int) -> None:
    """Keys of the rotation of ``n_dims`` dimensions of a head. Raises PinferError for a scaling libllama lacks."""
    from gguf import RopeScalingType

    rope = _parameters(checkpoint)
    header.add_rope_dimension_count(n_dims)
    header.add_rope_freq_base(rope_theta(checkpoint))
    match rope["rope_type"]:
        case "default" | "dynamic" | "llama3":
            # dynamic scaling begins beyond the trained context; llama3's is a tensor
            pass
        case "linear":
            header.add_rope_scaling_type(RopeScalingType.LINEAR)
            header.add_rope_scaling_factor(float(rope["factor"]))
        case "yarn":
            header.add_rope_scaling_type(RopeScalingType.YARN)
            header.add_rope_scaling_factor(float(rope["factor"]))
            header.add_rope_scaling_orig_ctx_len(_original_context(checkpoint, rope))
            for key, add in _YARN_KEYS.items():
                if rope.get(key) is not None:
                    getattr(header, add)(float(rope[key]))
        case "longrope" | "su":
            header.add_rope_scaling_type(RopeScalingType.LONGROPE)
            header.add_rope_scaling_orig_ctx_len(_original_context(checkpoint, rope))
        case other:
            raise PinferError(f"{checkpoint.folder} scales its positions by {other!r}, which libllama does not know")


def _original_context(checkpoint: Checkpoint, rope: Mapping[str, Any]) -> int:
    given = rope.get("original_max_position_embeddings") or checkpoint.config.get("original_max_position_embeddings")
    return int(given or checkpoint.integer("max_position_embeddings"))


def rope_tensors(checkpoint: Checkpoint, n_dims: int) -> list[PlannedTensor]:
    """Tensors that stretch single frequencies: of Llama 3's scaling, or both of longrope's."""
    import numpy as np

    rope = _parameters(checkpoint)
    if rope["rope_type"] == "llama3":
        return [_planned("rope_freqs.weight", _llama3_factors(rope, rope_theta(checkpoint), n_dims))]
    factors = {"rope_factors_long.weight": "long_factor", "rope_factors_short.weight": "short_factor"}
    if rope["rope_type"] not in ("longrope", "su"):
        return []
    planned = []
    for name, key in factors.items():
        values = np.asarray(rope.get(key, ()), dtype=np.float32)
        if values.shape != (n_dims // 2,):
            raise PinferError(f"config.json of {checkpoint.folder} has no {key} of {n_dims // 2} numbers")
        planned.append(_planned(name, values))
    return planned


def _planned(name: str, values: NDArray[np.float32]) -> PlannedTensor:
    return PlannedTensor(name, values.shape, 0, load=lambda: values, type_name="F32")


def _llama3_factors(rope: Mapping[str, Any], theta: float, n_dims: int) -> NDArray[np.float32]:
    """By what each frequency is divided: nothing for short waves, ``factor`` for long ones, a ramp between them."""
    import numpy as np

    factor, low, high = (
        float(rope.get(k, d)) for k, d in (("factor", 8.0), ("low_freq_factor", 1.0), ("high_freq_factor", 4.0))
    )
    turns = float(rope.get("original_max_position_embeddings", 8192)) / (
        2 * math.pi * theta ** (np.arange(0, n_dims, 2, dtype=np.float64) / n_dims)
    )
    ramp = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1.0 / ((1.0 - ramp) / factor + ramp)).astype(np.float32)
