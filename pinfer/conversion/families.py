"""The model families pinfer converts: what their config.json and tensor names mean, and the GGUF they become.

Names of tensors come from the gguf package's own map. This file has what differs in a family, and what libllama's graph
of that architecture expects. A tensor that is not understood is an error; none is left out silently.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
from gguf import MODEL_ARCH, GGUFWriter, get_tensor_name_map
from numpy.typing import NDArray

from pinfer.conversion.checkpoint import Checkpoint, CheckpointTensor
from pinfer.conversion.experts import is_expert, stacked_experts
from pinfer.conversion.hints import ANOTHER_MODEL, DOWNLOAD_AGAIN
from pinfer.conversion.nemotron_h import (
    add_nemotron_h_metadata,
    change_nemotron_h,
    is_mixture,
    layer_kinds,
    require_expressible_nemotron_h,
    shape_nemotron_h,
)
from pinfer.conversion.opt_model import add_opt_metadata, opt_tensors, require_expressible_opt
from pinfer.conversion.plan import ConvertPlan, PlannedTensor
from pinfer.conversion.rope import add_rope, rope_tensors, rotated_dims
from pinfer.errors import PinferError
from pinfer.model import MAX_LAYERS

Change = Callable[[Checkpoint, str, NDArray[Any]], NDArray[Any]]

_UNUSED = re.compile(r"rotary_emb\.(inv_freq|cos_cached|sin_cached)$|\.masked_bias$")
_RENAMED = {"dt_bias": "dt_proj.bias", "e_score_correction_bias": "e_score_correction.bias"}
"""ends of names that gguf's map spells in another way"""
_SQUARED = ("relu2", "relu_squared", "squared_relu")
_SMOOTH = {
    "silu": ("silu", "swish"),
    "gelu": ("gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh"),
    "relu2": (),
}
"""config.json's names of what libllama's graph computes, if that has no exact zeros"""


def _unchanged(checkpoint: Checkpoint, name: str, values: NDArray[Any]) -> NDArray[Any]:
    return values


@dataclass(frozen=True)
class Family:
    """How the checkpoints of one kind become GGUF."""

    arch: str
    gated: bool
    graph_activation: str
    """what libllama's graph of ``arch`` computes: ``relu2``, ``silu`` or ``gelu``"""
    metadata: Callable[[Checkpoint, GGUFWriter], None]
    change: Change = _unchanged
    """what becomes of a tensor's values, given its name in the GGUF"""
    shape: Callable[[Checkpoint, PlannedTensor], PlannedTensor] = lambda checkpoint, tensor: tensor
    """the tensor in the shape and type that the graph needs"""
    tied_by_default: bool = False
    """whether the original's config class takes the output for the embedding"""
    output: Literal["maybe", "never", "always"] = "maybe"
    """whether the graph has the output as a tensor apart from the embedding"""
    biases: frozenset[str] | None = None
    """tensors whose biases the graph adds (``attn_q``); None: of all"""
    rope_factors: tuple[str, ...] = ()
    """kinds of rope scaling by single frequencies that the graph computes"""
    require_expressible: Callable[[Checkpoint], None] = lambda checkpoint: None
    """raises PinferError for members of the family that libllama's graph cannot compute"""
    missing_tensors: Callable[[Checkpoint, Container[str]], list[PlannedTensor]] = lambda checkpoint, names: []
    """constants for what the graph needs and a checkpoint may lack, given the names it has"""
    tensors: Callable[[Checkpoint], list[PlannedTensor]] | None = None
    """the tensors, where gguf's map of names does not do"""


# --- what most families share ----------------------------------------------------------------------------------------


def _heads(checkpoint: Checkpoint) -> tuple[int, int]:
    """Query heads, and key-value heads."""
    n_head = checkpoint.integer("num_attention_heads", "n_head")
    return _checked_heads(checkpoint, n_head, checkpoint.integer("num_key_value_heads", default=n_head))


def _checked_heads(checkpoint: Checkpoint, n_head: int, n_kv: int) -> tuple[int, int]:
    if n_head % n_kv:
        raise PinferError(
            f"config.json of {checkpoint.folder} has {n_head} heads, which {n_kv} key-value heads do not divide",
            DOWNLOAD_AGAIN,
        )
    return n_head, n_kv


def _head_dim(checkpoint: Checkpoint) -> int:
    return checkpoint.integer("head_dim", default=checkpoint.integer("hidden_size") // _heads(checkpoint)[0])


def _window(checkpoint: Checkpoint) -> tuple[int, int]:
    """The sliding window, and the context the model was trained for."""
    context = checkpoint.integer("max_position_embeddings", default=2048)
    return checkpoint.integer("sliding_window", default=context), context


def _add_shape(checkpoint: Checkpoint, header: GGUFWriter) -> None:
    n_head, n_kv = _heads(checkpoint)
    # libllama's graphs of these families attend to all tokens: beyond the window the text would not be the model's
    header.add_context_length(min(_window(checkpoint)))
    header.add_embedding_length(checkpoint.integer("hidden_size"))
    header.add_block_count(checkpoint.integer("num_hidden_layers"))
    header.add_feed_forward_length(checkpoint.integer("intermediate_size"))
    header.add_head_count(n_head)
    header.add_head_count_kv(n_kv)
    header.add_vocab_size(checkpoint.integer("vocab_size"))


def _add_metadata(
    checkpoint: Checkpoint, header: GGUFWriter, *, eps: str = "rms_norm_eps", share: float = 1.0, all_dims: bool = True
) -> None:
    """Keys of a family with one kind of norm, whose epsilon is ``eps`` in config.json.

    ``share`` of a head's dimensions are rotated if config.json does not say; ``all_dims``: the graph rotates no less.
    """
    _add_shape(checkpoint, header)
    add_eps = header.add_layer_norm_rms_eps if eps == "rms_norm_eps" else header.add_layer_norm_eps
    add_eps(checkpoint.number(eps, default=1e-6 if eps == "rms_norm_eps" else 1e-5, zero=True))
    head_dim = _head_dim(checkpoint)
    header.add_key_length(head_dim)
    header.add_value_length(head_dim)
    add_rope(checkpoint, header, rotated_dims(checkpoint, head_dim, share, allows_part=not all_dims))


def _is_tied(checkpoint: Checkpoint, by_default: bool) -> bool:
    """Whether the output is the embedding. ``by_default`` is what the original's config class assumes."""
    return "lm_head.weight" not in checkpoint.tensors or checkpoint.flag("tie_word_embeddings", by_default)


def _mapped_tensors(family: Family, checkpoint: Checkpoint) -> list[PlannedTensor]:
    """Tensors under the gguf package's names for them."""
    names = get_tensor_name_map(MODEL_ARCH[family.arch.upper()], _n_layer(checkpoint))
    tied = _is_tied(checkpoint, family.tied_by_default)
    if family.output == "never" and not tied:
        raise PinferError(
            f"{checkpoint.folder} has an output of its own, libllama's {family.arch} has not", ANOTHER_MODEL
        )
    planned = rope_tensors(checkpoint, family.rope_factors, _head_dim(checkpoint))
    for name, tensor in checkpoint.tensors.items():
        if _UNUSED.search(name) or (tied and name == "lm_head.weight") or is_expert(name):
            continue
        *parents, last = name.split(".")
        mapped = names.get_name(".".join([*parents, _RENAMED.get(last, last)]), try_suffixes=(".weight", ".bias"))
        if mapped is None:
            raise PinferError(
                f"{name} of {checkpoint.folder} is not a tensor of {checkpoint.model_type} models that libllama knows",
                "check that config.json belongs to these weights",
            )
        targets = [mapped, "output.weight"] if mapped == "token_embd.weight" and tied else [mapped]
        for target in targets if family.output == "always" else [mapped]:
            load = partial(_load_changed, family.change, checkpoint, tensor, target)
            planned.append(
                family.shape(checkpoint, PlannedTensor(target, tensor.shape[::-1], tensor.n_bytes, load=load))
            )
    planned += stacked_experts(checkpoint)
    return planned + family.missing_tensors(checkpoint, {tensor.name for tensor in planned})


def _load_changed(change: Change, checkpoint: Checkpoint, tensor: CheckpointTensor, name: str) -> NDArray[Any]:
    return change(checkpoint, name, tensor.load())


# --- llama and its relatives -----------------------------------------------------------------------------------------


def _interleave_rotation(checkpoint: Checkpoint, name: str, values: NDArray[Any]) -> NDArray[Any]:
    """Q and K rows as libllama rotates them: pairs side by side, where the checkpoint has them half a head apart."""
    part = re.search(r"\.attn_([qk])\.", name)
    if part is None:
        return values
    n_head = _heads(checkpoint)["qk".index(part[1])]
    halves = values.reshape(n_head, 2, values.shape[0] // n_head // 2, *values.shape[1:])
    return halves.swapaxes(1, 2).reshape(values.shape)


def _add_minicpm_metadata(checkpoint: Checkpoint, header: GGUFWriter) -> None:
    _add_metadata(checkpoint, header)
    n_embd, n_layer = checkpoint.integer("hidden_size"), checkpoint.integer("num_hidden_layers")
    header.add_embedding_scale(checkpoint.number("scale_emb", default=1.0))
    header.add_residual_scale(checkpoint.number("scale_depth", default=1.0) / n_layer**0.5)
    header.add_logit_scale(n_embd / checkpoint.number("dim_model_base", default=1.0))


def _require_plain_minicpm(checkpoint: Checkpoint) -> None:
    if checkpoint.config.get("num_experts"):
        raise PinferError(
            f"{checkpoint.folder} is a mixture of experts, which pinfer does not convert",
            "use llama.cpp's convert_hf_to_gguf.py",
        )


# --- squared ReLU ----------------------------------------------------------------------------------------------------


def _require_expressible_nemotron(checkpoint: Checkpoint) -> None:
    n_embd, n_head, head_dim = checkpoint.integer("hidden_size"), _heads(checkpoint)[0], _head_dim(checkpoint)
    if n_head * head_dim != n_embd:
        raise PinferError(
            f"{checkpoint.folder} has {n_head} heads of {head_dim} dimensions, "
            f"libllama's nemotron can only compute {n_head} x {n_embd / n_head:g} for a hidden_size of {n_embd}",
            ANOTHER_MODEL,
        )


def _one_plus_norm(checkpoint: Checkpoint, name: str, values: NDArray[Any]) -> NDArray[Any]:
    """Nemotron's norms multiply by one plus their weight, libllama's by the weight."""
    return values.astype(np.float32) + 1 if name.endswith("norm.weight") else values


def _jais2_biases(checkpoint: Checkpoint, names: Container[str]) -> list[PlannedTensor]:
    n_embd, n_ff = checkpoint.integer("hidden_size"), checkpoint.integer("intermediate_size")
    sizes = {"attn_output": n_embd, "ffn_up": n_ff, "ffn_down": n_embd}
    wanted = [(f"blk.{i}.{part}.bias", n) for i in range(_n_layer(checkpoint)) for part, n in sizes.items()]
    return [PlannedTensor.constant(name, n, 0.0) for name, n in wanted if name not in names]


def _add_plm_metadata(checkpoint: Checkpoint, header: GGUFWriter) -> None:
    _add_shape(checkpoint, header)
    header.add_layer_norm_rms_eps(checkpoint.number("rms_norm_eps", default=1e-6))
    rotated = checkpoint.integer("qk_rope_head_dim")
    header.add_kv_lora_rank(checkpoint.integer("kv_lora_rank"))
    header.add_key_length(checkpoint.integer("qk_nope_head_dim") + rotated)
    header.add_value_length(checkpoint.integer("v_head_dim"))
    add_rope(checkpoint, header, rotated_dims(checkpoint, rotated, 1.0))


def _require_expressible_plm(checkpoint: Checkpoint) -> None:
    eps = checkpoint.number("rms_norm_eps", default=1e-6)
    if eps != 1e-6:  # the original's norm inside its attention always uses 1e-6; libllama has one value for all norms
        raise PinferError(
            f"{checkpoint.folder} has rms_norm_eps = {eps:g}, libllama can compute PLM with 1e-06 only", ANOTHER_MODEL
        )


# --- mixtures --------------------------------------------------------------------------------------------------------


def _add_mixtral_metadata(checkpoint: Checkpoint, header: GGUFWriter) -> None:
    _add_metadata(checkpoint, header)
    header.add_expert_count(checkpoint.integer("num_local_experts"))
    header.add_expert_used_count(checkpoint.integer("num_experts_per_tok"))


# --- falcon ----------------------------------------------------------------------------------------------------------


def _falcon_heads(checkpoint: Checkpoint) -> tuple[int, int]:
    n_head = checkpoint.integer("num_attention_heads", "n_head")
    n_kv = 1 if checkpoint.flag("multi_query", True) else n_head
    if checkpoint.flag("new_decoder_architecture", False):
        n_kv = checkpoint.integer("num_kv_heads", "n_head_kv", default=n_head)
    return _checked_heads(checkpoint, n_head, n_kv)


def _add_falcon_metadata(checkpoint: Checkpoint, header: GGUFWriter) -> None:
    n_embd = checkpoint.integer("hidden_size")
    n_head, n_kv = _falcon_heads(checkpoint)
    header.add_context_length(checkpoint.integer("max_position_embeddings", default=2048))
    header.add_tensor_data_layout("jploski")
    header.add_embedding_length(n_embd)
    header.add_feed_forward_length(checkpoint.integer("ffn_hidden_size", default=4 * n_embd))
    header.add_block_count(_n_layer(checkpoint))
    header.add_head_count(n_head)
    header.add_head_count_kv(n_kv)
    header.add_layer_norm_eps(checkpoint.number("layer_norm_epsilon", default=1e-5, zero=True))
    add_rope(checkpoint, header, rotated_dims(checkpoint, n_embd // n_head, 1.0))


def _ungroup_heads(checkpoint: Checkpoint, name: str, values: NDArray[Any]) -> NDArray[Any]:
    """All queries, then all keys, then all values, where falcon has them group by group."""
    if ".attn_qkv." not in name:
        return values
    n_head, n_kv = _falcon_heads(checkpoint)
    head_dim = checkpoint.integer("hidden_size") // n_head
    groups = values.reshape(n_kv, n_head // n_kv + 2, head_dim, -1)
    parts = (groups[:, :-2], groups[:, -2:-1], groups[:, -1:])
    return np.concatenate([part.reshape(-1, values.shape[1]) for part in parts])


def _require_expressible_falcon(checkpoint: Checkpoint) -> None:
    new = checkpoint.flag("new_decoder_architecture", False)
    found = {
        "ALiBi positions": checkpoint.flag("alibi", False),
        "biases": checkpoint.flag("bias", False),
        "attention before the FFN": not checkpoint.flag("parallel_attn", True) and not new,
    }
    if wrong := [what for what, is_so in found.items() if is_so]:
        raise PinferError(
            f"{checkpoint.folder} is a falcon with {' and '.join(wrong)}, which libllama cannot compute", ANOTHER_MODEL
        )


# --- the families ----------------------------------------------------------------------------------------------------

_QKV = frozenset({"attn_q", "attn_k", "attn_v"})
_NORMS = frozenset({"attn_norm", "attn_norm_2", "ffn_norm", "output_norm"})
_LLAMA = Family(
    "llama",
    True,
    "silu",
    _add_metadata,
    _interleave_rotation,
    rope_factors=("llama3", "longrope", "su"),
)
_FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "sparsellama": _LLAMA,
    "mistral": _LLAMA,
    "bamboo": _LLAMA,
    "turbosparsemistral": _LLAMA,
    "minicpm": replace(
        _LLAMA,
        arch="minicpm",
        metadata=_add_minicpm_metadata,
        tied_by_default=True,
        require_expressible=_require_plain_minicpm,
    ),
    "mixtral": replace(_LLAMA, metadata=_add_mixtral_metadata),
    "nemotron_h": Family(
        "nemotron_h",
        False,
        "relu2",
        add_nemotron_h_metadata,
        change_nemotron_h,
        shape_nemotron_h,
        require_expressible=require_expressible_nemotron_h,
    ),
    "arcee": Family(
        "arcee", False, "relu2", _add_metadata, _interleave_rotation, biases=_QKV, rope_factors=("llama3",)
    ),
    "nemotron": Family(
        "nemotron",
        False,
        "relu2",
        partial(_add_metadata, eps="norm_eps", share=0.5, all_dims=False),
        _one_plus_norm,
        output="always",
        require_expressible=_require_expressible_nemotron,
    ),
    "jais2": Family(
        "jais2", False, "relu2", partial(_add_metadata, eps="layer_norm_eps"), missing_tensors=_jais2_biases
    ),
    "plm": Family(
        "plm",
        False,
        "relu2",
        _add_plm_metadata,
        tied_by_default=True,
        output="never",
        biases=frozenset(),
        require_expressible=_require_expressible_plm,
    ),
    "falcon": Family(
        "falcon",
        False,
        "gelu",
        _add_falcon_metadata,
        _ungroup_heads,
        tied_by_default=True,
        biases=_NORMS,
        require_expressible=_require_expressible_falcon,
    ),
    "opt": Family(
        "gpt2", False, "gelu", add_opt_metadata, require_expressible=require_expressible_opt, tensors=opt_tensors
    ),
}
_FAMILIES["turbosparsemixtral"] = _FAMILIES["mixtral"]
_FAMILIES |= {"RefinedWeb": _FAMILIES["falcon"], "RefinedWebModel": _FAMILIES["falcon"]}


def plan_checkpoint(checkpoint: Checkpoint, activation: str | None = None) -> ConvertPlan:
    """What a checkpoint becomes, without its tokenizer; ``activation`` overrides config.json's.

    Raises PinferError for families that pinfer does not know and for members that libllama cannot compute.
    """
    family = _FAMILIES.get(checkpoint.model_type)
    if family is None:
        known = sorted(
            {name for name in _FAMILIES if name.islower()} - {"sparsellama", "turbosparsemistral", "turbosparsemixtral"}
        )
        raise PinferError(
            f"{checkpoint.folder} has model_type {checkpoint.model_type[:40]!r}, which pinfer does not convert",
            f"it converts {', '.join(known)}; for others use llama.cpp's convert_hf_to_gguf.py",
        )
    if family.arch == "nemotron_h" and is_mixture(checkpoint):
        family = replace(family, arch="nemotron_h_moe")
    family.require_expressible(checkpoint)
    _n_layer(checkpoint)
    found, threshold = (activation, 0.0) if activation else _activation(checkpoint, family)
    tensors = _in_order(family.tensors(checkpoint) if family.tensors else _mapped_tensors(family, checkpoint))
    _check_tensors(checkpoint, family, tensors)
    return ConvertPlan(
        arch=family.arch,
        activation=found,
        add_metadata=partial(family.metadata, checkpoint),
        tensors=tensors,
        activation_threshold=threshold,
        names_activation=found not in ("other", family.graph_activation),
        notes=_notes(checkpoint, found, activation),
    )


def _n_layer(checkpoint: Checkpoint) -> int:
    """Layers by config.json. Raises PinferError for more than the weights can hold, or than libllama computes."""
    is_hybrid = checkpoint.model_type == "nemotron_h"
    n_layer = len(layer_kinds(checkpoint)) if is_hybrid else checkpoint.integer("num_hidden_layers", "n_layer")
    n_tensors = len(checkpoint.tensors)
    if n_layer > n_tensors:
        raise PinferError(
            f"config.json of {checkpoint.folder} names {n_layer} layers, but its weights are {n_tensors} tensors",
            DOWNLOAD_AGAIN,
        )
    if n_layer > MAX_LAYERS:
        raise PinferError(
            f"{checkpoint.folder} has {n_layer} layers, libllama computes at most {MAX_LAYERS}", ANOTHER_MODEL
        )
    return n_layer


def _check_tensors(checkpoint: Checkpoint, family: Family, tensors: Iterable[PlannedTensor]) -> None:
    """Raises PinferError for tensors that a GGUF or libllama's graph has no place for."""
    biased: set[str] = set()
    names = Counter(tensor.name for tensor in tensors)
    for tensor in tensors:
        if not 1 <= len(tensor.shape) <= 4 or 0 in tensor.shape or names[tensor.name] > 1:
            cause = "comes twice" if names[tensor.name] > 1 else f"has shape {list(tensor.shape[:8])}"
            raise PinferError(f"{tensor.name} of {checkpoint.folder} {cause}", DOWNLOAD_AGAIN)
        part = re.sub(r"^blk\.\d+\.|\.bias$", "", tensor.name)
        if tensor.name.endswith(".bias") and family.biases is not None and part not in family.biases:
            biased.add(part)
    if biased:
        raise PinferError(
            f"{checkpoint.folder} has biases in {', '.join(sorted(biased))}, libllama's {family.arch} adds none there",
            ANOTHER_MODEL,
        )


def _in_order(tensors: Iterable[PlannedTensor]) -> list[PlannedTensor]:
    """Layer by layer; tensors outside the layers come first."""

    def place(tensor: PlannedTensor) -> tuple[int, str]:
        layer = re.match(r"blk\.(\d+)\.", tensor.name)
        return int(layer[1]) if layer else -1, tensor.name

    return sorted(tensors, key=place)


def _is_drelu(checkpoint: Checkpoint) -> bool:
    """Bamboo and TurboSparse apply ReLU to gate and up; their code is remote, their hidden_act only says relu."""
    names = f"{checkpoint.model_type} {checkpoint.architecture}".lower()
    if "bamboo" in names or "turbosparse" in names:
        return True
    return checkpoint.model_type == "mistral" and bool(checkpoint.config.get("auto_map"))


def _activation(checkpoint: Checkpoint, family: Family) -> tuple[str, float]:
    """pinfer's name of the activation, and FATReLU's threshold."""
    config = checkpoint.config
    keys = ("activation_function", "hidden_act", "activation")
    named = next((str(config[key]).lower() for key in keys if config.get(key)), family.graph_activation)
    if family.gated:
        if named == "drelu" or (named == "relu" and _is_drelu(checkpoint)):
            return "drelu", 0.0
        if named == "relu":
            return "reglu", 0.0
        if named == "fatrelu":
            return "reglu", checkpoint.number("hidden_act_param", zero=True)
    elif named == "relu" or named in _SQUARED:
        return ("relu" if named == "relu" else "relu2"), 0.0
    if named in _SMOOTH[family.graph_activation]:
        return "other", 0.0
    raise PinferError(
        f"{checkpoint.folder} computes {named[:40]!r} in its FFN, which libllama's {family.arch} graph does not",
        "if config.json is wrong, pass --activation relu|relu2|reglu|drelu|reglu2",
    )


def _notes(checkpoint: Checkpoint, activation: str, given: str | None) -> list[str]:
    notes = []
    if activation == "other":
        notes.append("its FFN has no exact zeros: pinfer will run it dense, as stock llama.cpp does")
        if checkpoint.model_type.lower().startswith(("falcon", "refinedweb")) and given is None:
            notes.append("config.json names no ReLU; if the model's code has one, pass --activation relu")
    if checkpoint.model_type == "mistral" and activation in ("reglu", "drelu") and given is None:
        notes.append(
            f"its activation was taken to be {activation}; if that is wrong, pass --activation reglu|drelu|reglu2"
        )
    window, context = _window(checkpoint)
    if window < context:
        notes.append(
            f"it attends to the last {window} tokens only, libllama's graph to all: the context is set to {window}; "
            "a larger -c would change the text"
        )
    return notes
