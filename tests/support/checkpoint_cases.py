"""The tiny checkpoints of tests/checkpoints: each one's config.json as its family publishes it, and how it is stored.

The keys are those of the published models, in the spelling of the transformers release that wrote them: most say
`rope_theta` and `torch_dtype`, the newest `rope_parameters` and `dtype`. The sizes are small and odd; some norms have
an epsilon large enough to be noticed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["CASES", "HYBRIDS_AND_MIXTURES", "VOCAB", "Case"]

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
    attributes: bool = False
    """in `bin`: tensors that carry attributes, which makes the pickle rebuild them by another name"""
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
    "layer_norm_epsilon": 0.02,
    "new_decoder_architecture": True,
    "num_attention_heads": 6,
    "num_kv_heads": 2,
}

_BAMBOO: dict[str, Any] = {
    "architectures": ["BambooForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_bamboo.BambooConfig",
        "AutoModel": "modeling_bamboo.BambooForCausalLM",
        "AutoModelForCausalLM": "modeling_bamboo.BambooForCausalLM",
    },
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "relu",
    "hidden_size": 50,
    "initializer_range": 0.02,
    "intermediate_size": 200,
    "max_position_embeddings": 32768,
    "model_type": "bamboo",
    "num_attention_heads": 5,
    "num_hidden_layers": 2,
    "num_key_value_heads": 1,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "sliding_window": 4096,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.34.0.dev0",
    "use_cache": True,
    "vocab_size": VOCAB,
}

# MiniCPM-S-1B's file names no model_type: its remote code does.
_MINICPM: dict[str, Any] = {
    "architectures": ["MiniCPMForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_minicpm.MiniCPMConfig",
        "AutoModel": "modeling_minicpm.MiniCPMModel",
        "AutoModelForCausalLM": "modeling_minicpm.MiniCPMForCausalLM",
        "AutoModelForSeq2SeqLM": "modeling_minicpm.MiniCPMForCausalLM",
        "AutoModelForSequenceClassification": "modeling_minicpm.MiniCPMForSequenceClassification",
    },
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "fatrelu",
    "hidden_act_param": 0.03,
    "hidden_size": 48,
    "initializer_range": 0.1,
    "intermediate_size": 152,
    "max_position_embeddings": 4096,
    "num_attention_heads": 6,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.36.0",
    "use_cache": True,
    "vocab_size": VOCAB,
    "scale_emb": 12,
    "dim_model_base": 16,
    "scale_depth": 1.4,
}

_ARCEE: dict[str, Any] = {
    "architectures": ["ArceeForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 318,
    "eos_token_id": 321,
    "head_dim": 14,
    "hidden_act": "relu2",
    "hidden_size": 56,
    "initializer_range": 0.02,
    "intermediate_size": 216,
    "max_position_embeddings": 4096,
    "mlp_bias": False,
    "model_type": "arcee",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.54.0",
    "use_cache": True,
    "vocab_size": VOCAB,
}

# AFM-4.5B's.
_YARN: dict[str, Any] = {
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "factor": 20.0,
    "mscale": 1.0,
    "original_max_position_embeddings": 4096,
    "rope_type": "yarn",
    "type": "yarn",
}

_NEMOTRON: dict[str, Any] = {
    "architectures": ["NemotronForCausalLM"],
    "bos_token_id": 2,
    "eos_token_id": 3,
    "hidden_act": "relu2",
    "hidden_size": 64,
    "initializer_range": 0.0134,
    "intermediate_size": 200,
    "max_position_embeddings": 4096,
    "model_type": "nemotron",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "norm_eps": 0.02,
    "rope_theta": 10000,
    "partial_rotary_factor": 0.5,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.32.0.dev0",
    "use_cache": True,
    "vocab_size": VOCAB,
    "head_dim": 16,
}

_JAIS2: dict[str, Any] = {
    "architectures": ["Jais2ForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "dtype": "bfloat16",
    "eos_token_id": 321,
    "head_dim": 10,
    "hidden_act": "relu2",
    "hidden_size": 50,
    "initializer_range": 0.02,
    "intermediate_size": 216,
    "layer_norm_eps": 0.02,
    "max_position_embeddings": 8192,
    "mlp_bias": True,
    "model_type": "jais2",
    "num_attention_heads": 5,
    "num_hidden_layers": 2,
    "num_key_value_heads": 5,
    "rope_scaling": None,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "transformers_version": "4.57.0",
    "use_cache": True,
    "vocab_size": VOCAB,
}

_PLM: dict[str, Any] = {
    "architectures": ["PLMForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_plm.PLMConfig",
        "AutoModel": "modeling_plm.PLMModel",
        "AutoModelForCausalLM": "modeling_plm.PLMForCausalLM",
    },
    "bos_token_id": 320,
    "eos_token_id": 322,
    "hidden_act": "relu2",
    "hidden_size": 60,
    "initializer_range": 0.02,
    "intermediate_size": 216,
    "kv_lora_rank": 28,
    "max_position_embeddings": 4096,
    "model_type": "plm",
    "num_attention_heads": 5,
    "num_hidden_layers": 2,
    "num_key_value_heads": 5,
    "pretraining_tp": 1,
    "q_lora_rank": None,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 6,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 100000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.49.0",
    "use_cache": True,
    "v_head_dim": 14,
    "vocab_size": VOCAB,
}

_NEMOTRON_H: dict[str, Any] = {
    "architectures": ["NemotronHForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "chunk_size": 16,
    "conv_kernel": 4,
    "eos_token_id": 2,
    "expand": 2,
    "head_dim": 24,
    "hidden_size": 48,
    "hybrid_override_pattern": "M-M*-M-",
    "initializer_range": 0.02,
    "intermediate_size": 152,
    "layer_norm_epsilon": 0.01,
    "mamba_head_dim": 12,
    "mamba_hidden_act": "silu",
    "mamba_num_heads": 6,
    "mamba_proj_bias": False,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "mlp_hidden_act": "relu2",
    "model_type": "nemotron_h",
    "n_groups": 2,
    "num_attention_heads": 3,
    "num_hidden_layers": 7,
    "num_key_value_heads": 1,
    "residual_in_fp32": False,
    "ssm_state_size": 16,
    "tie_word_embeddings": False,
    "time_step_floor": 0.0001,
    "time_step_max": 0.1,
    "time_step_min": 0.001,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.48.0.dev0",
    "use_bias": False,
    "use_cache": True,
    "use_conv_bias": True,
    "vocab_size": VOCAB,
}

# Nemotron 3's.
_NEMOTRON_H_MOE: dict[str, Any] = _NEMOTRON_H | {
    "hybrid_override_pattern": "MEM*EE",
    "intermediate_size": 40,
    "moe_intermediate_size": 40,
    "moe_shared_expert_intermediate_size": 72,
    "n_group": 1,
    "n_routed_experts": 6,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 6,
    "routed_scaling_factor": 2.5,
    "topk_group": 1,
}

_MIXTRAL: dict[str, Any] = {
    "architectures": ["TurboSparseMixtralForCausalLM"],
    "attention_dropout": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_turbosparsemixtral.TurboSparseMixtralConfig",
        "AutoModelForCausalLM": "modeling_turbosparsemixtral.TurboSparseMixtralForCausalLM",
    },
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "relu",
    "hidden_size": 48,
    "initializer_range": 0.02,
    "intermediate_size": 88,
    "max_position_embeddings": 32768,
    "model_type": "turbosparsemixtral",
    "num_attention_heads": 4,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "num_local_experts": 6,
    "output_router_logits": False,
    "rms_norm_eps": 0.01,
    "rope_theta": 1000000.0,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.36.0.dev0",
    "use_cache": True,
    "vocab_size": VOCAB,
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
            "rms_norm_eps": 0.02,
            "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"},
            "tie_word_embeddings": True,
            "transformers_version": "5.0.0",
        },
        "llama",
        dtype="bfloat16",
    ),
    Case("prosparse", _PROSPARSE, "llama", "fatrelu_llama", dtype="bfloat16", gate_scale=0.1),
    Case(
        "prosparse-threshold",
        _PROSPARSE | {"hidden_act_param": 0.15, "num_key_value_heads": 1, "torch_dtype": "float16"},
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
        # As ReluFalcon-40B is published.
        files="bin",
        n_shards=2,
        attributes=True,
    ),
    Case("bamboo", _BAMBOO, "llama", "bamboo", dtype="bfloat16"),
    Case(
        "turbosparse-mistral",
        _BAMBOO
        | {
            "attention_dropout": 0.0,
            "num_attention_heads": 5,
            "num_key_value_heads": 5,
            "rms_norm_eps": 0.01,
            "rope_theta": 1000000.0,
            "sliding_window": None,
            "torch_dtype": "float16",
            "transformers_version": "4.41.0",
            "use_cache": False,
        },
        "llama",
        "bamboo",
    ),
    Case("minicpm-s", _MINICPM, "llama", "minicpm", dtype="bfloat16", embedding_std=0.03, gate_scale=0.3),
    Case(
        "minicpm-relu",
        # As a later transformers writes the same model: with the keys that the published file leaves to their defaults.
        {key: _MINICPM[key] for key in _MINICPM if key != "hidden_act_param"}
        | {
            "attention_bias": False,
            "attention_dropout": 0.0,
            "hidden_act": "relu",
            "model_type": "minicpm",
            "num_key_value_heads": 6,
            "pretraining_tp": 1,
            "rms_norm_eps": 0.01,
            "rope_theta": 20000.0,
            "scale_depth": 1.1,
            "scale_emb": 9,
            "tie_word_embeddings": True,
            "torch_dtype": "float16",
            "transformers_version": "4.41.2",
        },
        "llama",
        "minicpm",
        embedding_std=0.04,
    ),
    Case("arcee", _ARCEE | {"rms_norm_eps": 0.02}, "arcee", dtype="bfloat16"),
    Case("arcee-yarn", _ARCEE | {"max_position_embeddings": 65536, "rope_scaling": _YARN}, "arcee", dtype="bfloat16"),
    Case("nemotron", _NEMOTRON, "nemotron", dtype="bfloat16", files="bin"),
    Case("jais2", _JAIS2, "jais2", dtype="bfloat16"),
    Case("plm", _PLM, "plm", "plm", dtype="bfloat16"),
    Case("nemotron-h", _NEMOTRON_H, "arcee", dtype="bfloat16"),
    Case("nemotron-h-moe", _NEMOTRON_H_MOE, "arcee", dtype="bfloat16", n_shards=2),
    Case("turbosparse-mixtral", _MIXTRAL, "llama", "turbosparse_mixtral", dtype="bfloat16"),
)

HYBRIDS_AND_MIXTURES = ("nemotron-h", "nemotron-h-moe", "turbosparse-mixtral")
"""cases whose layers differ, or have experts"""
