"""The model families pinfer converts: what their config.json and tensor names mean, and the GGUF they become.

Names of tensors come from the gguf package's own map; what stands here is where a family departs from it, and what
libllama's graph of that architecture expects. A tensor that is not understood is an error, never left out in silence.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from pinfer.conversion.checkpoint import Checkpoint, CheckpointTensor
from pinfer.conversion.opt_model import add_opt_metadata, opt_tensors, require_expressible_opt
from pinfer.conversion.plan import ConvertPlan, PlannedTensor
from pinfer.conversion.rope import add_rope, partial_rotary_factor, rope_tensors
from pinfer.errors import PinferError

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from numpy.typing import NDArray

    Change = Callable[[Checkpoint, str, NDArray[Any]], NDArray[Any]]

_UNUSED = re.compile(r"rotary_emb\.(inv_freq|cos_cached|sin_cached)$|\.masked_bias$")
_RELU, _RELU2, _SQUARED = ("relu",), ("relu2",), ("relu2", "relu_squared", "squared_relu")
_SMOOTH = {
    "silu": ("silu", "swish"),
    "gelu": ("gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh"),
    "relu2": (),
}
"""names of the function that libllama's graph computes, where it has no exact zeros"""


@dataclass(frozen=True)
class Family:
    """How the checkpoints of one kind become GGUF."""

    arch: str
    gated: bool
    graph_activation: str
    """what libllama's graph of ``arch`` computes: ``relu2``, ``silu`` or ``gelu``"""
    metadata: Callable[[Checkpoint, GGUFWriter], None]
    tensors: Callable[[Checkpoint], list[PlannedTensor]]
    require_expressible: Callable[[Checkpoint], None] = lambda checkpoint: None
    """raises PinferError for members of the family that libllama's graph cannot compute"""


# --- what most families share ----------------------------------------------------------------------------------------


def _head_dim(checkpoint: Checkpoint) -> int:
    n_head = checkpoint.integer("num_attention_heads", "n_head")
    return checkpoint.integer("head_dim", default=checkpoint.integer("hidden_size") // n_head)


def _n_head_kv(checkpoint: Checkpoint) -> int:
    return checkpoint.integer("num_key_value_heads", default=checkpoint.integer("num_attention_heads"))


def _add_shape(checkpoint: Checkpoint, header: GGUFWriter) -> None:
    context = checkpoint.integer("max_position_embeddings")
    # libllama's llama graph attends to everything: beyond the window the words would no longer be the model's
    window = checkpoint.integer("sliding_window", default=context)
    header.add_context_length(min(context, window))
    header.add_embedding_length(checkpoint.integer("hidden_size"))
    header.add_block_count(checkpoint.integer("num_hidden_layers"))
    header.add_feed_forward_length(checkpoint.integer("intermediate_size"))
    header.add_head_count(checkpoint.integer("num_attention_heads"))
    header.add_head_count_kv(_n_head_kv(checkpoint))
    header.add_vocab_size(checkpoint.integer("vocab_size"))


def _add_llama_metadata(checkpoint: Checkpoint, header: GGUFWriter) -> None:
    _add_shape(checkpoint, header)
    header.add_layer_norm_rms_eps(checkpoint.number("rms_norm_eps", default=1e-6))
    header.add_key_length(_head_dim(checkpoint))
    header.add_value_length(_head_dim(checkpoint))
    add_rope(checkpoint, header, _head_dim(checkpoint))


def is_tied(checkpoint: Checkpoint, by_default: bool) -> bool:
    """Whether the output is the embedding: as config.json says, else as the original's config class would."""
    return "lm_head.weight" not in checkpoint.tensors or checkpoint.flag("tie_word_embeddings", by_default)


def _unchanged(checkpoint: Checkpoint, name: str, values: NDArray[Any]) -> NDArray[Any]:
    return values


def _mapped_tensors(
    arch: str, change: Change, tied_by_default: bool, output: str, checkpoint: Checkpoint
) -> list[PlannedTensor]:
    """Tensors under the gguf package's names for them. ``output``: may be tied, or must or must not be a tensor."""
    from gguf import MODEL_ARCH, get_tensor_name_map

    names = get_tensor_name_map(MODEL_ARCH[arch.upper()], checkpoint.integer("num_hidden_layers", "n_layer"))
    tied = is_tied(checkpoint, tied_by_default)
    if output == "never" and not tied:
        raise PinferError(
            f"{checkpoint.folder} has an output apart from its embedding, which libllama's {arch} has not"
        )
    planned = []
    for name, tensor in checkpoint.tensors.items():
        if _UNUSED.search(name) or (tied and name == "lm_head.weight"):
            continue
        mapped = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if mapped is None:
            raise PinferError(
                f"{name} of {checkpoint.folder} is no tensor of a {checkpoint.model_type} model that libllama computes",
                "check that config.json belongs to these weights",
            )
        planned.append(_plan_tensor(checkpoint, tensor, mapped, change))
        if mapped == "token_embd.weight" and tied and output == "always":
            planned.append(_plan_tensor(checkpoint, tensor, "output.weight", change))
    return planned


def _plan_tensor(checkpoint: Checkpoint, tensor: CheckpointTensor, name: str, change: Change) -> PlannedTensor:
    def load() -> NDArray[Any]:
        return change(checkpoint, name, tensor.load())

    return PlannedTensor(name, tensor.shape[::-1], tensor.n_bytes, load=load)


def _mapped(
    arch: str, change: Change = _unchanged, *, tied_by_default: bool = False, output: str = "maybe"
) -> Callable[[Checkpoint], list[PlannedTensor]]:
    return partial(_mapped_tensors, arch, change, tied_by_default, output)


def _with_rope(
    tensors: Callable[[Checkpoint], list[PlannedTensor]],
) -> Callable[[Checkpoint], list[PlannedTensor]]:
    return lambda checkpoint: [*rope_tensors(checkpoint, _head_dim(checkpoint)), *tensors(checkpoint)]


# --- llama and its kin -----------------------------------------------------------------------------------------------


def _interleave_rotation(checkpoint: Checkpoint, name: str, values: NDArray[Any]) -> NDArray[Any]:
    """Q and K rows as libllama rotates them: pairs side by side, where the checkpoint has them half a head apart."""
    part = re.search(r"\.attn_([qk])\.", name)
    if part is None:
        return values
    n_head = checkpoint.integer("num_attention_heads") if part[1] == "q" else _n_head_kv(checkpoint)
    halves = values.reshape(n_head, 2, values.shape[0] // n_head // 2, *values.shape[1:])
    return halves.swapaxes(1, 2).reshape(values.shape)


def _add_minicpm_metadata(checkpoint: Checkpoint, header: GGUFWriter) -> None:
    _add_llama_metadata(checkpoint, header)
    n_embd, n_layer = checkpoint.integer("hidden_size"), checkpoint.integer("num_hidden_layers")
    header.add_embedding_scale(checkpoint.number("scale_emb", default=1.0))
    header.add_residual_scale(checkpoint.number("scale_depth", default=1.0) / n_layer**0.5)
    header.add_logit_scale(n_embd / checkpoint.number("dim_model_base", default=1.0))


def _require_plain_minicpm(checkpoint: Checkpoint) -> None:
    if checkpoint.config.get("num_experts"):
        raise PinferError(f"{checkpoint.folder} is a mixture of experts, which pinfer does not convert")


# --- squared ReLU ----------------------------------------------------------------------------------------------------


def _add_layer_norm_metadata(eps_key: str, rotated_share: float, checkpoint: Checkpoint, header: GGUFWriter) -> None:
    _add_shape(checkpoint, header)
    header.add_layer_norm_eps(checkpoint.number(eps_key, default=1e-5))
    head_dim = _head_dim(checkpoint)
    header.add_key_length(head_dim)
    header.add_value_length(head_dim)
    add_rope(checkpoint, header, int(head_dim * partial_rotary_factor(checkpoint, rotated_share)))


def _one_plus_norm(checkpoint: Checkpoint, name: str, values: NDArray[Any]) -> NDArray[Any]:
    """Nemotron's norms multiply by one plus their weight, libllama's by the weight."""
    import numpy as np

    return values.astype(np.float32) + 1 if name.endswith("norm.weight") else values


def _add_plm_metadata(checkpoint: Checkpoint, header: GGUFWriter) -> None:
    _add_shape(checkpoint, header)
    header.add_layer_norm_rms_eps(checkpoint.number("rms_norm_eps", default=1e-6))
    rotated = checkpoint.integer("qk_rope_head_dim")
    header.add_kv_lora_rank(checkpoint.integer("kv_lora_rank"))
    header.add_key_length(checkpoint.integer("qk_nope_head_dim") + rotated)
    header.add_value_length(checkpoint.integer("v_head_dim"))
    add_rope(checkpoint, header, rotated)


def _require_expressible_plm(checkpoint: Checkpoint) -> None:
    eps = checkpoint.number("rms_norm_eps", default=1e-6)
    if eps != 1e-6:  # the original's norm inside its attention has 1e-6 whatever the others have; libllama knows one
        raise PinferError(f"{checkpoint.folder} has rms_norm_eps = {eps:g}, libllama can compute PLM with 1e-06 only")


# --- falcon ----------------------------------------------------------------------------------------------------------


def _falcon_n_head_kv(checkpoint: Checkpoint) -> int:
    n_head = checkpoint.integer("num_attention_heads", "n_head")
    if checkpoint.flag("new_decoder_architecture", False):
        return checkpoint.integer("num_kv_heads", "n_head_kv", default=n_head)
    return 1 if checkpoint.flag("multi_query", True) else n_head


def _add_falcon_metadata(checkpoint: Checkpoint, header: GGUFWriter) -> None:
    n_embd = checkpoint.integer("hidden_size")
    n_head = checkpoint.integer("num_attention_heads", "n_head")
    header.add_context_length(checkpoint.integer("max_position_embeddings", default=2048))
    header.add_tensor_data_layout("jploski")
    header.add_embedding_length(n_embd)
    header.add_feed_forward_length(checkpoint.integer("ffn_hidden_size", default=4 * n_embd))
    header.add_block_count(checkpoint.integer("num_hidden_layers", "n_layer"))
    header.add_head_count(n_head)
    header.add_head_count_kv(_falcon_n_head_kv(checkpoint))
    header.add_layer_norm_eps(checkpoint.number("layer_norm_epsilon", default=1e-5))
    add_rope(checkpoint, header, n_embd // n_head)


def _ungroup_heads(checkpoint: Checkpoint, name: str, values: NDArray[Any]) -> NDArray[Any]:
    """All queries, then all keys, then all values, where falcon has them group by group."""
    if ".attn_qkv." not in name:
        return values
    import numpy as np

    n_kv = _falcon_n_head_kv(checkpoint)
    n_head = checkpoint.integer("num_attention_heads", "n_head")
    head_dim = checkpoint.integer("hidden_size") // n_head
    groups = values.reshape(n_kv, n_head // n_kv + 2, head_dim, -1)
    parts = (groups[:, :-2], groups[:, -2:-1], groups[:, -1:])
    return np.concatenate([part.reshape(-1, values.shape[1]) for part in parts])


def _require_expressible_falcon(checkpoint: Checkpoint) -> None:
    wrong = [
        what
        for what, is_so in (
            ("ALiBi positions", checkpoint.flag("alibi", False)),
            ("biases", checkpoint.flag("bias", False)),
            (
                "attention before the FFN",
                not checkpoint.flag("parallel_attn", True) and not checkpoint.flag("new_decoder_architecture", False),
            ),
        )
        if is_so
    ]
    if wrong:
        raise PinferError(f"{checkpoint.folder} is a falcon with {' and '.join(wrong)}, which libllama cannot compute")


# --- the families ----------------------------------------------------------------------------------------------------

_LLAMA = Family("llama", True, "silu", _add_llama_metadata, _with_rope(_mapped("llama", _interleave_rotation)))
_FAMILIES: dict[str, Family] = {
    "llama": _LLAMA,
    "sparsellama": _LLAMA,
    "mistral": _LLAMA,
    "bamboo": _LLAMA,
    "turbosparsemistral": _LLAMA,
    "minicpm": Family(
        "minicpm",
        True,
        "silu",
        _add_minicpm_metadata,
        _with_rope(_mapped("minicpm", _interleave_rotation, tied_by_default=True)),
        _require_plain_minicpm,
    ),
    "arcee": Family("arcee", False, "relu2", _add_llama_metadata, _with_rope(_mapped("arcee", _interleave_rotation))),
    "nemotron": Family(
        "nemotron",
        False,
        "relu2",
        partial(_add_layer_norm_metadata, "norm_eps", 0.5),
        _mapped("nemotron", _one_plus_norm, output="always"),
    ),
    "jais2": Family(
        "jais2", False, "relu2", partial(_add_layer_norm_metadata, "layer_norm_eps", 1.0), _mapped("jais2")
    ),
    "plm": Family(
        "plm",
        False,
        "relu2",
        _add_plm_metadata,
        _mapped("plm", tied_by_default=True, output="never"),
        _require_expressible_plm,
    ),
    "falcon": Family(
        "falcon",
        False,
        "gelu",
        _add_falcon_metadata,
        _mapped("falcon", _ungroup_heads, tied_by_default=True),
        _require_expressible_falcon,
    ),
    "opt": Family("gpt2", False, "gelu", add_opt_metadata, opt_tensors, require_expressible_opt),
}
_FAMILIES |= {"RefinedWeb": _FAMILIES["falcon"], "RefinedWebModel": _FAMILIES["falcon"]}


def plan_checkpoint(checkpoint: Checkpoint, activation: str | None = None) -> ConvertPlan:
    """What a checkpoint becomes, without its tokenizer; ``activation`` wins over what config.json says.

    Raises PinferError for families that pinfer does not know and for members that libllama cannot compute.
    """
    family = _FAMILIES.get(checkpoint.model_type)
    if family is None:
        known = sorted({name for name in _FAMILIES if name.islower()} - {"sparsellama", "turbosparsemistral"})
        raise PinferError(
            f"{checkpoint.folder} has model_type {checkpoint.model_type!r}, which pinfer does not convert",
            f"it converts {', '.join(known)}; for others use llama.cpp's convert_hf_to_gguf.py",
        )
    family.require_expressible(checkpoint)
    found, threshold = (activation, 0.0) if activation else _activation(checkpoint, family)
    return ConvertPlan(
        arch=family.arch,
        activation=found,
        add_metadata=partial(family.metadata, checkpoint),
        tensors=_in_order(family.tensors(checkpoint)),
        activation_threshold=threshold,
        names_activation=found != "other" and found != family.graph_activation,
        notes=_notes(checkpoint, found, activation),
    )


def _in_order(tensors: Iterable[PlannedTensor]) -> list[PlannedTensor]:
    """Layer by layer, what belongs to no layer first."""

    def place(tensor: PlannedTensor) -> tuple[int, str]:
        layer = re.match(r"blk\.(\d+)\.", tensor.name)
        return int(layer[1]) if layer else -1, tensor.name

    return sorted(tensors, key=place)


def _is_drelu(checkpoint: Checkpoint) -> bool:
    """Bamboo and TurboSparse apply ReLU to gate and up; their code is remote, their hidden_act says only relu."""
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
            return "reglu", checkpoint.number("hidden_act_param")
    elif named in (*_RELU, *_SQUARED):
        return ("relu" if named in _RELU else "relu2"), 0.0
    if named in _SMOOTH[family.graph_activation]:
        return "other", 0.0
    raise PinferError(
        f"{checkpoint.folder} computes {named!r} in its FFN, which libllama's {family.arch} graph does not",
        "name what it computes if config.json is wrong: --activation relu|relu2|reglu|drelu",
    )


def _notes(checkpoint: Checkpoint, activation: str, given: str | None) -> list[str]:
    notes = []
    if activation == "other":
        notes.append("its FFN has no exact zeros: pinfer will run it dense, as stock llama.cpp does")
        if checkpoint.model_type.lower().startswith(("falcon", "refinedweb")) and given is None:
            notes.append("config.json names no ReLU; if its code has one all the same, say --activation relu")
    if checkpoint.model_type == "mistral" and activation in ("reglu", "drelu") and given is None:
        notes.append(f"taken for {activation}; if that is wrong, --activation reglu|drelu names it")
    window, context = (checkpoint.integer(k, default=0) for k in ("sliding_window", "max_position_embeddings"))
    if 0 < window < context:
        notes.append(f"it attends to the last {window} tokens, libllama to all: the context is set to {window}")
    return notes
