"""The tiny checkpoints of tests/checkpoints: each one's config.json as its family publishes it, and how it is stored.

The keys are those of the published models (the spelling of the transformers release that wrote them included: most say
`rope_theta` and `torch_dtype`, the newest `rope_parameters` and `dtype`); only the sizes are small and odd.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["CASES", "VOCAB", "Case"]

VOCAB = 331
"""rows of every embedding; the tokenizers are a little smaller, as published ones are"""


@dataclass(frozen=True)
class Case:
    """One folder of tests/checkpoints."""

    name: str
    config: Mapping[str, Any]
    """what config.json holds"""
    tokenizer: str
    """a function of checkpoint_tokenizers.py"""
    original: str = "auto"
    """which function of checkpoint_models.py is the original: `auto` where transformers has the model itself"""
    dtype: str = "float16"
    files: str = "safetensors"
    """`safetensors` or `bin` (a state_dict of torch.save)"""
    n_shards: int = 1
    prefix: bool = True
    """False: tensors are named as the bare decoder names them, without `model.`"""
    seed: int = 0
    embedding_std: float = 0.4
    gate_scale: float = 1.0
    """of the gates' weights, undone in those of up: what a threshold is measured against"""
    refused: bool = False
    """only a config.json, which must be refused"""


_LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "relu",
    "hidden_size": 50,
    "initializer_range": 0.02,
    "intermediate_size": 200,
    "max_position_embeddings": 4096,
    "model_type": "llama",
    "num_attention_heads": 5,
    "num_hidden_layers": 2,
    "num_key_value_heads": 5,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.31.0",
    "use_cache": True,
    "vocab_size": VOCAB,
}

_PROSPARSE: dict[str, Any] = _LLAMA | {
    "architectures": ["SparseLlamaForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_sparsellama.SparseLlamaConfig",
        "AutoModel": "modeling_sparsellama.SparseLlamaForCausalLM",
        "AutoModelForCausalLM": "modeling_sparsellama.SparseLlamaForCausalLM",
    },
    "hidden_act": "fatrelu",
    "hidden_act_param": 0.01,
    "max_length": 4096,
    "model_type": "sparsellama",
    "torch_dtype": "bfloat16",
}

_OPT: dict[str, Any] = {
    "_remove_final_layer_norm": False,
    "activation_dropout": 0.0,
    "activation_function": "relu",
    "architectures": ["OPTForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 2,
    "do_layer_norm_before": True,
    "dropout": 0.1,
    "eos_token_id": 2,
    "ffn_dim": 216,
    "hidden_size": 60,
    "init_std": 0.02,
    "layerdrop": 0.0,
    "max_position_embeddings": 96,
    "model_type": "opt",
    "num_attention_heads": 5,
    "num_hidden_layers": 2,
    "pad_token_id": 1,
    "prefix": "</s>",
    "torch_dtype": "float16",
    "transformers_version": "4.21.0.dev0",
    "use_cache": True,
    "vocab_size": VOCAB,
    "word_embed_proj_dim": 60,
}

_FALCON: dict[str, Any] = {
    "activation": "relu",
    "alibi": False,
    "apply_residual_connection_post_layernorm": False,
    "architectures": ["FalconForCausalLM"],
    "attention_dropout": 0.0,
    "bias": False,
    "bos_token_id": 11,
    "eos_token_id": 11,
    "hidden_dropout": 0.0,
    "hidden_size": 60,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "model_type": "falcon",
    "multi_query": True,
    "new_decoder_architecture": False,
    "num_attention_heads": 5,
    "num_hidden_layers": 2,
    "parallel_attn": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.27.4",
    "use_cache": True,
    "vocab_size": VOCAB,
}

_FALCON_40B: dict[str, Any] = {key: _FALCON[key] for key in _FALCON if key != "multi_query"} | {
    "hidden_size": 72,
    "ffn_hidden_size": 200,
    "new_decoder_architecture": True,
    "num_attention_heads": 6,
    "num_kv_heads": 2,
}

CASES: tuple[Case, ...] = (
    Case("llama-mha", _LLAMA, "llama", n_shards=3, seed=1),
    Case(
        "llama-gqa-tied",
        # As the newest transformers writes it.
        {key: _LLAMA[key] for key in _LLAMA if key not in ("rope_scaling", "torch_dtype")}
        | {
            "attention_bias": False,
            "dtype": "bfloat16",
            "head_dim": 8,
            "hidden_size": 64,
            "intermediate_size": 216,
            "max_position_embeddings": 8192,
            "mlp_bias": False,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"},
            "tie_word_embeddings": True,
            "transformers_version": "5.0.0",
        },
        "llama",
        dtype="bfloat16",
    ),
    Case("prosparse", _PROSPARSE, "llama", "fatrelu_llama", dtype="bfloat16", gate_scale=0.05),
    Case(
        "prosparse-threshold",
        _PROSPARSE | {"hidden_act_param": 0.25, "num_key_value_heads": 1, "torch_dtype": "float16"},
        "llama",
        "fatrelu_llama",
    ),
    Case("opt", _OPT, "opt", embedding_std=0.25),
    Case(
        "opt-bin",
        _OPT | {"hidden_size": 44, "word_embed_proj_dim": 44, "num_attention_heads": 2, "num_hidden_layers": 3},
        "opt",
        embedding_std=0.25,
        files="bin",
        n_shards=2,
        prefix=False,
    ),
    Case(
        "opt-350m",
        _OPT | {"_remove_final_layer_norm": False, "do_layer_norm_before": False, "word_embed_proj_dim": 36},
        "opt",
        refused=True,
    ),
    Case("falcon-7b", _FALCON, "falcon", dtype="bfloat16"),
    Case("falcon-40b", _FALCON_40B, "falcon", dtype="bfloat16"),
    Case(
        "falcon-40b-untied",
        _FALCON_40B | {"num_attention_heads": 4, "num_kv_heads": 2, "hidden_size": 56, "tie_word_embeddings": False},
        "falcon",
        dtype="float16",
    ),
)
