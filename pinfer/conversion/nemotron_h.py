"""Nemotron-H (arXiv 2504.03624) and Nemotron 3: layers of Mamba-2, attention, dense FFNs or mixtures of experts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from gguf import GGUFWriter
from numpy.typing import NDArray

from pinfer.conversion.checkpoint import Checkpoint
from pinfer.conversion.hints import ANOTHER_MODEL, DOWNLOAD_AGAIN
from pinfer.conversion.plan import PlannedTensor
from pinfer.errors import PinferError

MAMBA, ATTENTION, FFN, EXPERTS = "M*-E"
_NAMES = {
    "mamba": MAMBA,
    "linear_attention": MAMBA,
    "attention": ATTENTION,
    "full_attention": ATTENTION,
    "mlp": FFN,
    "moe": EXPERTS,
}
"""layers in the spelling of transformers"""

# In the shapes that libllama expects; its quantiser and ours leave them in F32.
_SHAPES: dict[str, Callable[[Checkpoint, tuple[int, ...]], tuple[int, ...]]] = {
    "ssm_a": lambda checkpoint, shape: (1, *shape),
    "ssm_d": lambda checkpoint, shape: (1, *shape),
    "ssm_conv1d.weight": lambda checkpoint, shape: (shape[0], *shape[2:]),
    "ssm_norm.weight": lambda checkpoint, shape: (shape[0] // _n_group(checkpoint), _n_group(checkpoint)),
    "ffn_gate_inp.weight": lambda checkpoint, shape: shape,
}


def layer_kinds(checkpoint: Checkpoint) -> str:
    """One letter for each layer, as in ``hybrid_override_pattern``. Raises PinferError for an invalid pattern."""
    given = checkpoint.config.get("hybrid_override_pattern") or checkpoint.config.get("layers_block_type")
    if isinstance(given, list) and all(isinstance(name, str) for name in given):
        given = "".join(_NAMES.get(name, "?") for name in given)
    if not isinstance(given, str) or not given or set(given) - set(_NAMES.values()):
        raise PinferError(
            f"config.json of {checkpoint.folder} has no valid pattern of layers: {str(given)[:40]}", DOWNLOAD_AGAIN
        )
    return given


def is_mixture(checkpoint: Checkpoint) -> bool:
    """Whether the FFNs are mixtures of experts."""
    return EXPERTS in layer_kinds(checkpoint)


def require_expressible_nemotron_h(checkpoint: Checkpoint) -> None:
    """Raises PinferError for members of the family that libllama's graph does not compute."""
    kinds = layer_kinds(checkpoint)
    config = checkpoint.config
    limit = config.get("time_step_limit")
    found = {
        "no Mamba layer": MAMBA not in kinds,
        "no attention layer": ATTENTION not in kinds,
        "dense FFNs beside experts": FFN in kinds and EXPERTS in kinds,
        "a convolution without biases": not checkpoint.flag("use_conv_bias", True),
        "biases in its Mamba layers": checkpoint.flag("mamba_proj_bias", False) or checkpoint.flag("use_bias", False),
        "a sliding window": config.get("sliding_window") is not None,
        "limited time steps": isinstance(limit, list) and bool(limit) and limit[0] not in (0, None),
        "groups of experts": EXPERTS in kinds and checkpoint.integer("n_group", default=1) != 1,
        "another activation than ReLU²": config.get("mlp_hidden_act", "relu2") != "relu2",
        "a draft head (MTP)": any(name.startswith("mtp.") for name in checkpoint.tensors),
    }
    if wrong := [what for what, is_so in found.items() if is_so]:
        raise PinferError(
            f"{checkpoint.folder} is a Nemotron-H with {' and '.join(wrong)}, which pinfer does not convert",
            ANOTHER_MODEL,
        )


def add_nemotron_h_metadata(checkpoint: Checkpoint, header: GGUFWriter) -> None:
    """Keys of nemotron_h and nemotron_h_moe."""
    kinds = layer_kinds(checkpoint)
    n_embd, n_head = checkpoint.integer("hidden_size"), checkpoint.integer("num_attention_heads")
    n_head_kv = checkpoint.integer("num_key_value_heads", default=n_head)
    head_dim = checkpoint.integer("head_dim", "attention_head_dim", default=n_embd // n_head)
    n_ff = checkpoint.integer("moe_intermediate_size" if EXPERTS in kinds else "intermediate_size")
    eps = checkpoint.number("layer_norm_epsilon", "rms_norm_eps", default=1e-5, zero=True)
    header.add_context_length(checkpoint.integer("max_position_embeddings", default=4096))
    header.add_embedding_length(n_embd)
    header.add_block_count(len(kinds))
    header.add_vocab_size(checkpoint.integer("vocab_size"))
    # By these two libllama tells a layer's kind: attention has key-value heads, an FFN has a length.
    header.add_head_count_kv([n_head_kv if kind == ATTENTION else 0 for kind in kinds])
    header.add_feed_forward_length([n_ff if kind in (FFN, EXPERTS) else 0 for kind in kinds])
    header.add_head_count(n_head)
    header.add_key_length(head_dim)
    header.add_value_length(head_dim)
    header.add_layer_norm_eps(eps)  # of a draft head; libllama wants it in every model
    header.add_layer_norm_rms_eps(eps)
    header.add_rope_dimension_count(head_dim)  # nothing is rotated
    n_ssm_head = checkpoint.integer("mamba_num_heads")
    header.add_ssm_conv_kernel(checkpoint.integer("conv_kernel", default=4))
    header.add_ssm_inner_size(n_ssm_head * checkpoint.integer("mamba_head_dim"))
    header.add_ssm_state_size(checkpoint.integer("ssm_state_size"))
    header.add_ssm_time_step_rank(n_ssm_head)
    header.add_ssm_group_count(_n_group(checkpoint))
    if EXPERTS in kinds:
        header.add_expert_count(checkpoint.integer("n_routed_experts"))
        header.add_expert_used_count(checkpoint.integer("num_experts_per_tok"))
        header.add_expert_shared_count(checkpoint.integer("n_shared_experts", default=1))
        header.add_expert_feed_forward_length(n_ff)
        header.add_expert_shared_feed_forward_length(checkpoint.integer("moe_shared_expert_intermediate_size"))
        header.add_expert_weights_norm(checkpoint.flag("norm_topk_prob", True))
        header.add_expert_weights_scale(checkpoint.number("routed_scaling_factor", default=1.0))
        if checkpoint.config.get("moe_latent_size") is not None:
            header.add_moe_latent_size(checkpoint.integer("moe_latent_size"))


def _n_group(checkpoint: Checkpoint) -> int:
    return checkpoint.integer("n_groups", "mamba_n_groups", default=8)


def change_nemotron_h(checkpoint: Checkpoint, name: str, values: NDArray[Any]) -> NDArray[Any]:
    """Decay rates, which the checkpoint holds as logarithms of their negatives."""
    return -np.exp(values.astype(np.float32)) if name.endswith(".ssm_a") else values


def shape_nemotron_h(checkpoint: Checkpoint, tensor: PlannedTensor) -> PlannedTensor:
    """The tensor in libllama's shape."""
    part = tensor.name.split(".", 2)[-1]
    if part not in _SHAPES or tensor.load is None:
        return tensor
    shape = _SHAPES[part](checkpoint, tensor.shape)
    load = partial(_load_shaped, tensor.load, shape)
    return replace(tensor, shape=shape, load=load, type_name="F32")


def _load_shaped(load: Callable[[], NDArray[Any]], shape: tuple[int, ...]) -> NDArray[Any]:
    return load().reshape(shape[::-1])
