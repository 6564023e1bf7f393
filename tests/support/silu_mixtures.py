"""Random mixtures whose experts have no exact zeros (SiLU, GELU), of today's architectures, small enough for tests.

- ``qwen3moe``: norms of queries and keys; ``olmoe``: the same over all heads, as many of each; ``llama``: Mixtral
- ``qwen2moe``: a shared expert with a gate of its own
- ``glm4moe``: sigmoid router with a bias, a shared expert, the first layer dense
- ``deepseek2``: latent attention, a shared expert, the first layer dense, scaled weights
- ``grok``: GELU
- ``gpt-oss``: biases of the experts, clamped SwiGLU, attention sinks
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf

from models.synth import write_vocabulary
from support.sparse_models import N_CTX, N_HEAD_DIM, N_HEAD_KV, N_VOCAB, OUTPUT, Writer, write_attention

ARCHITECTURES = ("qwen3moe", "qwen2moe", "olmoe", "llama", "glm4moe", "deepseek2", "grok", "gpt-oss")
_N_LATENT, _N_NOPE, _N_ROPE = 32, 32, 16
_DENSE_FIRST = ("glm4moe", "deepseek2")
_SHARED = ("qwen2moe", "glm4moe", "deepseek2")


@dataclass(frozen=True)
class SiluMixture:
    """The options of a model. Weights depend only on the seed and the tensor's name."""

    arch: str = "qwen3moe"
    type: str = "F32"
    """Of the FFN and the attention; embeddings, norms and routers are F32. K-quants need sizes of 256."""
    n_embd: int = 128
    n_layer: int = 3
    n_ff: int = 96
    """Of one expert."""
    n_expert: int = 8
    n_expert_used: int = 3
    seed: int = 0


def write_silu_mixture(path: Path, options: SiluMixture) -> Path:
    """Writes the model and returns its path."""
    out = Writer(path, options)
    _metadata(out.file, options)
    out.embedding()
    out.norm("output_norm")
    out.matrix("output", N_VOCAB, options.n_embd, kind="F32", scale=3.0)
    for layer in range(options.n_layer):
        blk = f"blk.{layer}"
        out.norm(f"{blk}.attn_norm")
        _attention(out, blk)
        if options.arch in ("glm4moe", "gpt-oss"):
            out.norm(f"{blk}.post_attention_norm")
        else:
            out.norm(f"{blk}.ffn_norm")
        if options.arch == "grok":
            out.norm(f"{blk}.attn_output_norm")
            out.norm(f"{blk}.layer_output_norm")
        if layer == 0 and options.arch in _DENSE_FIRST:
            _ffn(out, blk, "", options.n_ff)
        else:
            _experts(out, blk, options)
    out.file.write_header_to_file()
    out.file.write_kv_data_to_file()
    out.file.write_tensors_to_file()
    out.file.close()
    return path


def _metadata(out: Any, options: SiluMixture) -> None:
    arch, n_head = options.arch, options.n_embd // N_HEAD_DIM
    out.add_block_count(options.n_layer)
    out.add_context_length(N_CTX)
    out.add_embedding_length(options.n_embd)
    out.add_feed_forward_length(options.n_ff)
    out.add_layer_norm_rms_eps(1e-5)
    out.add_head_count(n_head)
    out.add_head_count_kv(n_head if arch in ("deepseek2", "olmoe") else N_HEAD_KV)
    out.add_rope_dimension_count(_N_ROPE if arch == "deepseek2" else N_HEAD_DIM)
    out.add_expert_count(options.n_expert)
    out.add_expert_used_count(options.n_expert_used)
    if arch not in ("olmoe", "llama"):
        out.add_expert_feed_forward_length(options.n_ff)
    if arch == "qwen2moe":
        out.add_expert_shared_feed_forward_length(options.n_ff)
    if arch in _DENSE_FIRST:
        out.add_expert_shared_count(1)
        out.add_leading_dense_block_count(1)
        out.add_expert_weights_norm(arch == "glm4moe")
    if arch == "glm4moe":
        out.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    if arch == "deepseek2":
        out.add_q_lora_rank(_N_LATENT)
        out.add_kv_lora_rank(_N_LATENT)
        out.add_key_length(_N_NOPE + _N_ROPE)
        out.add_value_length(N_HEAD_DIM)
        out.add_expert_weights_scale(1.5)
    if arch == "grok":
        out.add_embedding_scale(1.0)
    if arch == "gpt-oss":
        out.add_sliding_window(32)
    write_vocabulary(out, N_VOCAB)


def _attention(out: Writer, blk: str) -> None:
    arch, n_head = out.options.arch, out.n_embd // N_HEAD_DIM
    if arch == "deepseek2":
        out.matrix(f"{blk}.attn_q_a", _N_LATENT, out.n_embd)
        out.vector(f"{blk}.attn_q_a_norm.weight", _N_LATENT, mean=1.0)
        out.matrix(f"{blk}.attn_q_b", n_head * (_N_NOPE + _N_ROPE), _N_LATENT)
        out.matrix(f"{blk}.attn_kv_a_mqa", _N_LATENT + _N_ROPE, out.n_embd)
        out.vector(f"{blk}.attn_kv_a_norm.weight", _N_LATENT, mean=1.0)
        out.matrix(f"{blk}.attn_kv_b", n_head * (_N_NOPE + N_HEAD_DIM), _N_LATENT)
        out.matrix(f"{blk}.attn_output", out.n_embd, n_head * N_HEAD_DIM, scale=OUTPUT)
        return
    if arch == "olmoe":
        for part in ("q", "k", "v"):
            out.matrix(f"{blk}.attn_{part}", out.n_embd, out.n_embd)
        out.matrix(f"{blk}.attn_output", out.n_embd, out.n_embd, scale=OUTPUT)
    else:
        write_attention(out, blk)
    if arch in ("qwen3moe", "olmoe"):
        for part in ("q", "k"):
            out.vector(f"{blk}.attn_{part}_norm.weight", N_HEAD_DIM if arch == "qwen3moe" else out.n_embd, mean=1.0)
    if arch == "gpt-oss":
        out.vector(f"{blk}.attn_sinks.weight", n_head)
        out.vector(f"{blk}.attn_output.bias")


def _ffn(out: Writer, blk: str, suffix: str, n_ff: int) -> None:
    for part in ("gate", "up"):
        out.matrix(f"{blk}.ffn_{part}{suffix}", n_ff, out.n_embd)
    out.matrix(f"{blk}.ffn_down{suffix}", out.n_embd, n_ff, scale=OUTPUT)


def _experts(out: Writer, blk: str, o: SiluMixture) -> None:
    out.router(f"{blk}.ffn_gate_inp", o.n_expert)
    for part in ("gate", "up"):
        out.matrix(f"{blk}.ffn_{part}_exps", o.n_expert, o.n_ff, o.n_embd)
    out.matrix(f"{blk}.ffn_down_exps", o.n_expert, o.n_embd, o.n_ff, scale=OUTPUT)
    if o.arch == "glm4moe":
        out.vector(f"{blk}.exp_probs_b.bias", o.n_expert)
    if o.arch in _SHARED:
        _ffn(out, blk, "_shexp", o.n_ff)
    if o.arch == "qwen2moe":
        out.vector(f"{blk}.ffn_gate_inp_shexp.weight")
    if o.arch == "gpt-oss":
        out.vector(f"{blk}.ffn_gate_inp.bias", o.n_expert)
        for part, n in (("gate", o.n_ff), ("up", o.n_ff), ("down", o.n_embd)):
            name = f"{blk}.ffn_{part}_exps.bias"
            out.add(name, out.normal(name, o.n_expert, n, deviation=0.3))
