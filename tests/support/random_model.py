"""Random models that libllama runs, of every architecture whose FFN pinfer knows: a few layers of odd sizes, in F32."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

from models.synth import write_vocabulary
from pinfer.model import ACTIVATION_KEY, THRESHOLD_KEY

N_EMBD, N_FF, N_HEAD, N_VOCAB, N_CTX = 96, 192, 4, 320, 256
LAYER_NORM = ("gpt2", "falcon", "nemotron", "jais2")
GATED = ("llama", "minicpm")
FUSED_QKV = ("gpt2", "falcon")


@dataclass(frozen=True)
class RandomModel:
    """The options of a model. Weights depend only on the seed and the tensor's name."""

    arch: str = "llama"
    activation: str | None = None
    """None: no key, the architecture's own activation."""
    threshold: float | None = None
    n_layer: int = 2
    n_head_kv: int = 2
    biases: bool = False
    """Biases of the FFN, where they are optional."""
    two_norms: bool = False
    """falcon: one norm for attention and one for the FFN."""
    tied: bool = True
    seed: int = 0

    @property
    def ffn_biases(self) -> bool:
        return self.biases or self.arch in ("gpt2", "jais2")


class _Writer:
    def __init__(self, path: Path, options: RandomModel) -> None:
        self.options = options
        self.file: Any = gguf.GGUFWriter(path, options.arch)

    def add(self, name: str, shape: tuple[int, ...], mean: float, deviation: float) -> None:
        rng = np.random.default_rng([self.options.seed, *name.encode()])
        values: NDArray[np.float32] = rng.normal(mean, deviation, shape).astype(np.float32)
        self.file.add_tensor(name, values)

    def matrix(self, name: str, n_rows: int, n: int, *, bias: bool = False) -> None:
        """A matrix whose products with inputs of deviation 1 have deviation 1."""
        self.add(f"{name}.weight", (n_rows, n), 0, n**-0.5)
        if bias:
            self.add(f"{name}.bias", (n_rows,), 0, 0.3)

    def norm(self, name: str, n: int = N_EMBD) -> None:
        self.add(f"{name}.weight", (n,), 1, 0.1)
        if self.options.arch in LAYER_NORM:
            self.add(f"{name}.bias", (n,), 0, 0.1)


def write_random_model(path: Path, options: RandomModel) -> Path:
    """Writes the model and returns its path."""
    out = _Writer(path, options)
    _metadata(out.file, options)
    out.add("token_embd.weight", (N_VOCAB, N_EMBD), 0, 0.2)
    if options.arch == "gpt2":
        out.add("position_embd.weight", (N_CTX, N_EMBD), 0, 0.3)
    out.norm("output_norm")
    if options.arch == "nemotron" or not options.tied:
        out.matrix("output", N_VOCAB, N_EMBD)
    for layer in range(options.n_layer):
        _layer(out, f"blk.{layer}")
    out.file.write_header_to_file()
    out.file.write_kv_data_to_file()
    out.file.write_tensors_to_file()
    out.file.close()
    return path


def _metadata(out: Any, options: RandomModel) -> None:
    arch = options.arch
    out.add_block_count(options.n_layer)
    out.add_context_length(N_CTX)
    out.add_embedding_length(N_EMBD)
    out.add_feed_forward_length(N_FF)
    out.add_head_count(N_HEAD)
    out.add_head_count_kv(_n_head_kv(options))
    if arch in LAYER_NORM:
        out.add_layer_norm_eps(1e-5)
    else:
        out.add_layer_norm_rms_eps(1e-5)
    if arch == "plm":
        out.add_key_length(24)
        out.add_value_length(24)
        out.add_kv_lora_rank(32)
        out.add_rope_dimension_count(8)
    elif arch != "gpt2":
        out.add_rope_dimension_count(N_EMBD // N_HEAD)
    if arch == "minicpm":  # so that it is a llama
        out.add_embedding_scale(1.0)
        out.add_residual_scale(1.0)
        out.add_logit_scale(1.0)
    if options.activation is not None:
        out.add_string(ACTIVATION_KEY, options.activation)
    if options.threshold is not None:
        out.add_float32(THRESHOLD_KEY, options.threshold)
    write_vocabulary(out, N_VOCAB)


def _n_head_kv(options: RandomModel) -> int:
    return N_HEAD if options.arch in ("gpt2", "plm") else options.n_head_kv


def _layer(out: _Writer, blk: str) -> None:
    options = out.options
    arch, bias = options.arch, options.ffn_biases
    out.norm(f"{blk}.attn_norm")
    if options.two_norms:
        out.norm(f"{blk}.attn_norm_2")
    _attention(out, blk)
    if arch != "falcon":
        out.norm(f"{blk}.ffn_norm")
    if arch in GATED:
        out.matrix(f"{blk}.ffn_gate", N_FF, N_EMBD, bias=bias)
    out.matrix(f"{blk}.ffn_up", N_FF, N_EMBD, bias=bias)
    out.matrix(f"{blk}.ffn_down", N_EMBD, N_FF, bias=bias)


def _attention(out: _Writer, blk: str) -> None:
    arch = out.options.arch
    if arch == "plm":
        out.matrix(f"{blk}.attn_q", 24 * N_HEAD, N_EMBD)
        out.matrix(f"{blk}.attn_kv_a_mqa", 32 + 8, N_EMBD)
        out.norm(f"{blk}.attn_kv_a_norm", 32)
        out.matrix(f"{blk}.attn_kv_b", N_HEAD * (16 + 24), 32)
        out.matrix(f"{blk}.attn_output", N_EMBD, 24 * N_HEAD)
        return
    n_kv = _n_head_kv(out.options) * N_EMBD // N_HEAD
    if arch in FUSED_QKV:
        out.matrix(f"{blk}.attn_qkv", N_EMBD + 2 * n_kv, N_EMBD, bias=arch == "gpt2")
    else:
        for part, n in (("q", N_EMBD), ("k", n_kv), ("v", n_kv)):
            out.matrix(f"{blk}.attn_{part}", n, N_EMBD, bias=arch == "jais2")
    out.matrix(f"{blk}.attn_output", N_EMBD, N_EMBD, bias=arch in ("gpt2", "jais2"))
