"""OPT as a GPT-2 graph: learned positions without the two offset rows, q, k and v in one matrix, ReLU for GELU.

OPT is GPT-2's block with another activation (Zhang et al. 2022, section 2.1). Only 350M normalises after each block.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from gguf import GGUFWriter
from numpy.typing import NDArray

from pinfer.conversion.checkpoint import Checkpoint, CheckpointTensor
from pinfer.conversion.hints import ANOTHER_MODEL, DOWNLOAD_AGAIN
from pinfer.conversion.plan import PlannedTensor
from pinfer.errors import PinferError

_N_OFFSET = 2
"""rows of the position embedding before the first position"""
_LAYER_NAMES = {
    "self_attn_layer_norm": "attn_norm",
    "self_attn.out_proj": "attn_output",
    "final_layer_norm": "ffn_norm",
    "fc1": "ffn_up",
    "fc2": "ffn_down",
}
_NAMES = {"embed_tokens": "token_embd", "final_layer_norm": "output_norm"}


def require_expressible_opt(checkpoint: Checkpoint) -> None:
    """Raises PinferError for variants that are not GPT-2's block, such as OPT-350M."""
    n_embd = checkpoint.integer("hidden_size")
    if not checkpoint.flag("do_layer_norm_before", True):
        raise PinferError(
            f"{checkpoint.folder} is an OPT with post-norm (as 350M), which libllama cannot compute",
            "use another size of OPT: 125M, 1.3B, 2.7B, 6.7B, 13B, 30B, 66B or 175B",
        )
    if checkpoint.integer("word_embed_proj_dim", default=n_embd) != n_embd:
        raise PinferError(f"{checkpoint.folder} projects its embeddings, which libllama cannot compute", ANOTHER_MODEL)
    if checkpoint.flag("_remove_final_layer_norm", False):
        raise PinferError(f"{checkpoint.folder} has no final layer norm, which libllama's graph needs", ANOTHER_MODEL)


def add_opt_metadata(checkpoint: Checkpoint, header: GGUFWriter) -> None:
    """Keys of the gpt2 architecture."""
    n_head = checkpoint.integer("num_attention_heads")
    header.add_context_length(checkpoint.integer("max_position_embeddings"))
    header.add_embedding_length(checkpoint.integer("hidden_size"))
    header.add_block_count(checkpoint.integer("num_hidden_layers"))
    header.add_feed_forward_length(checkpoint.integer("ffn_dim"))
    header.add_head_count(n_head)
    header.add_head_count_kv(n_head)
    header.add_layer_norm_eps(1e-5)  # fixed in the original
    header.add_vocab_size(checkpoint.integer("vocab_size"))


def opt_tensors(checkpoint: Checkpoint) -> list[PlannedTensor]:
    """Tensors under libllama's names; missing biases become zeros, missing norm weights ones."""
    tied = checkpoint.flag("tie_word_embeddings", True)
    found: dict[str, CheckpointTensor] = {}
    for name, tensor in checkpoint.tensors.items():
        found[re.sub(r"^(model\.)?decoder\.", "", name)] = tensor
    planned: list[PlannedTensor] = []
    used: set[str] = set()

    def take(name: str) -> CheckpointTensor:
        if name not in found:
            raise PinferError(f"{checkpoint.folder} has no tensor {name}", DOWNLOAD_AGAIN)
        used.add(name)
        return found[name]

    def add(name: str, source: str) -> None:
        for kind in ("weight", "bias"):
            if f"{source}.{kind}" in found:
                tensor = take(f"{source}.{kind}")
                planned.append(PlannedTensor(f"{name}.{kind}", tensor.shape[::-1], tensor.n_bytes, load=tensor.load))

    for source, name in _NAMES.items():
        add(name, source)
    if not tied and "lm_head.weight" in found:
        add("output", "lm_head")
    used.add("lm_head.weight")
    planned.append(_positions(checkpoint, take("embed_positions.weight")))
    for layer in range(checkpoint.integer("num_hidden_layers")):
        for source, name in _LAYER_NAMES.items():
            add(f"blk.{layer}.{name}", f"layers.{layer}.{source}")
        for kind in ("weight", "bias"):
            names = [f"layers.{layer}.self_attn.{part}_proj.{kind}" for part in "qkv"]
            if names[0] in found:
                planned.append(_fused(f"blk.{layer}.attn_qkv.{kind}", [take(name) for name in names]))
    if unknown := sorted(set(found) - used):
        raise PinferError(
            f"{unknown[0]} of {checkpoint.folder} is not a tensor of OPT models that libllama knows",
            "check that config.json belongs to these weights",
        )
    return planned + _missing_constants(checkpoint, {tensor.name for tensor in planned})


def _positions(checkpoint: Checkpoint, tensor: CheckpointTensor) -> PlannedTensor:
    n_positions = checkpoint.integer("max_position_embeddings")
    if len(tensor.shape) != 2 or tensor.shape[0] != n_positions + _N_OFFSET:
        raise PinferError(
            f"{tensor.name} of {checkpoint.folder} has shape {list(tensor.shape)}, not {n_positions + _N_OFFSET} rows",
            DOWNLOAD_AGAIN,
        )
    return PlannedTensor(
        "position_embd.weight",
        (tensor.shape[1], n_positions),
        tensor.n_bytes,
        load=lambda: tensor.load()[_N_OFFSET:],
        type_name="F32",
    )


def _fused(name: str, parts: Sequence[CheckpointTensor]) -> PlannedTensor:
    def load() -> NDArray[Any]:
        return np.concatenate([part.load() for part in parts])

    shapes = {part.shape for part in parts}
    if len(shapes) != 1 or () in shapes:
        raise PinferError(f"{', '.join(part.name for part in parts)} differ in shape", DOWNLOAD_AGAIN)
    rows = sum(part.shape[0] for part in parts)
    return PlannedTensor(name, (*parts[0].shape[:0:-1], rows), sum(part.n_bytes for part in parts), load=load)


def _missing_constants(checkpoint: Checkpoint, names: set[str]) -> list[PlannedTensor]:
    """What the gpt2 graph needs and a variant lacks: ``enable_bias`` or ``layer_norm_elementwise_affine`` is false."""
    n_embd, n_ff = checkpoint.integer("hidden_size"), checkpoint.integer("ffn_dim")
    sizes = {"attn_norm": n_embd, "attn_qkv": 3 * n_embd, "attn_output": n_embd, "ffn_norm": n_embd}
    sizes |= {"ffn_up": n_ff, "ffn_down": n_embd}
    wanted = {f"blk.{i}.{name}": n for i in range(checkpoint.integer("num_hidden_layers")) for name, n in sizes.items()}
    wanted["output_norm"] = n_embd
    constants = [PlannedTensor.constant(f"{name}.bias", n, 0.0) for name, n in wanted.items()]
    constants += [PlannedTensor.constant(f"{name}.weight", n, 1.0) for name, n in wanted.items() if "norm" in name]
    return [tensor for tensor in constants if tensor.name not in names]
