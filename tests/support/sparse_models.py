"""Random models of today's sparse architectures, small enough for tests: mixtures of experts, Nemotron-H and RWKV.

libllama runs all of them. Most neurons stay silent, as in real ones: every FFN input has a component along one
direction u, against which the rows of the first FFN matrix lean, each by another amount.

- ``nemotron_h_moe``: ReLU² experts without a gate, a shared expert, sigmoid router; layers of Mamba-2 and attention
- ``nemotron_h``: the same with dense FFNs, and layers without any FFN
- ``smallthinker``: ReGLU experts, whose router sees the input of the attention
- ``llama``: Mixtral; stock libllama applies SiLU, the key pinfer.ffn.activation says what the experts were trained with
- ``rwkv7``, ``rwkv6``: dense ReLU² FFNs between recurrent layers
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import gguf
import numpy as np
from numpy.typing import NDArray

from models.synth import write_vocabulary
from pinfer.gguf_io.reader import type_size
from pinfer.llama import ggml
from pinfer.model import ACTIVATION_KEY

Array = NDArray[np.float32]

N_VOCAB, N_CTX = 320, 256
N_HEAD_DIM, N_HEAD_KV = 32, 2
N_STATE, N_CONV = 16, 4
WKV_HEAD_SIZE = 64  # libllama reads beyond shorter heads where vectors have 16 numbers
N_LORA = 32
ARCHITECTURES = ("nemotron_h_moe", "nemotron_h", "smallthinker", "llama", "rwkv7", "rwkv6")
MIXTURES = ("nemotron_h_moe", "smallthinker", "llama")
TYPES = ("F32", "F16", "Q8_0", "Q5_0", "Q5_1", "IQ4_NL", "MXFP4")
COMMON = 0.6  # share of an embedding's norm along u
OUTPUT = 0.3  # deviation of what a sub-layer adds to the stream, whose deviation begins at 1


@dataclass(frozen=True)
class SparseModel:
    """The options of a model. Weights depend only on the seed and the tensor's name."""

    arch: str = "nemotron_h_moe"
    type: str = "F32"
    """Of the FFN and the attention; embeddings, norms and routers are F32. K-quants need sizes of 256."""
    activation: str | None = None
    """The key pinfer.ffn.activation; None: no key."""
    pattern: str = ""
    """Nemotron-H: its layers, M Mamba-2, * attention, E experts, - dense FFN; empty: the architecture's own.

    libllama aborts without any M, and without any *: one of its two memories would be empty.
    """
    n_embd: int = 128
    n_layer: int = 3
    """Of the other architectures."""
    n_ff: int = 96
    """Of a dense FFN, or of one expert."""
    n_ff_shared: int = 160
    """Of the shared expert, which only nemotron_h_moe has."""
    n_expert: int = 8
    n_expert_used: int = 3
    threshold: float = 1.1
    """Mean of the neurons' thresholds in deviations of the first product: how rarely they fire."""
    seed: int = 0

    @property
    def layers(self) -> str:
        """One letter for each layer, as in ``pattern``; B is a layer with attention and FFN."""
        own = {"nemotron_h_moe": "ME*EE", "nemotron_h": "M-*--*"}
        return self.pattern or own.get(self.arch, "B" * self.n_layer)

    @property
    def gated(self) -> bool:
        return self.arch in ("llama", "smallthinker")


def write_sparse_model(path: Path, options: SparseModel) -> Path:
    """Writes the model and returns its path."""
    out = Writer(path, options)
    _metadata(out.file, options)
    out.embedding()
    out.norm("output_norm")
    out.matrix("output", N_VOCAB, options.n_embd, kind="F32", scale=3.0)
    for number, kind in enumerate(options.layers):
        blk = f"blk.{number}"
        if options.arch in ("rwkv7", "rwkv6"):
            _rwkv(out, number)
            continue
        out.norm(f"{blk}.attn_norm")
        if kind == "M":
            _mamba(out, blk)
        elif kind in "*B":
            write_attention(out, blk)
        if kind == "B":
            out.norm(f"{blk}.ffn_norm")
        if kind == "-":
            out.first(f"{blk}.ffn_up", options.n_ff)
            out.matrix(f"{blk}.ffn_down", options.n_embd, options.n_ff, scale=OUTPUT)
        elif kind in "EB":
            _experts(out, blk)
    out.file.write_header_to_file()
    out.file.write_kv_data_to_file()
    out.file.write_tensors_to_file()
    out.file.close()
    return path


class WrittenModel(Protocol):
    """What a writer has to know."""

    @property
    def arch(self) -> str: ...
    @property
    def type(self) -> str: ...
    @property
    def n_embd(self) -> int: ...
    @property
    def seed(self) -> int: ...


class Writer:
    """Random tensors of a model."""

    def __init__(self, path: Path, options: WrittenModel) -> None:
        self.options = options
        self.n_embd = options.n_embd
        self.file: Any = gguf.GGUFWriter(path, options.arch)
        u = self._rng("u").normal(size=self.n_embd)
        u -= u.mean()  # which LayerNorm would remove
        self.u: Array = (u / np.linalg.norm(u)).astype(np.float32)

    def _rng(self, name: str) -> np.random.Generator:
        return np.random.default_rng([self.options.seed, *name.encode()])

    def normal(self, name: str, *shape: int, mean: float = 0.0, deviation: float = 1.0) -> Array:
        return self._rng(name).normal(mean, deviation, shape).astype(np.float32)

    def add(self, name: str, values: Array, kind: str = "F32") -> None:
        """Adds a tensor [..., rows, columns]."""
        if kind == "F32":
            self.file.add_tensor(name, np.ascontiguousarray(values, np.float32))
            return
        number = gguf.GGMLQuantizationType[kind]
        block, size = type_size(number)
        flat = np.ascontiguousarray(values.reshape(-1, values.shape[-1]), np.float32)
        data = ggml.quantise(flat, number, values.shape[-1] // block * size)
        self.file.add_tensor(name, data.reshape(*values.shape[:-1], -1), raw_dtype=number)

    def vector(self, name: str, n: int = 0, mean: float = 0.0, deviation: float = 0.1) -> None:
        self.add(name, self.normal(name, n or self.n_embd, mean=mean, deviation=deviation))

    def norm(self, name: str) -> None:
        self.vector(f"{name}.weight", mean=1.0)
        if self.options.arch in ("rwkv7", "rwkv6"):
            self.vector(f"{name}.bias")

    def matrix(self, name: str, *shape: int, kind: str | None = None, scale: float = 1.0) -> None:
        """A matrix [..., rows, columns] whose products with inputs of deviation 1 have deviation ``scale``."""
        values = self.normal(name, *shape, deviation=scale * shape[-1] ** -0.5)
        self.add(f"{name}.weight", values, self.options.type if kind is None else kind)

    def first(self, name: str, *shape: int) -> None:
        """The first matrix of an FFN [..., n_ff, n_embd]: each neuron leans against u by its own threshold."""
        assert isinstance(self.options, SparseModel)
        rows = self.normal(name, *shape, self.n_embd, deviation=(self.n_embd * (1 - COMMON**2)) ** -0.5)
        rows -= (rows @ self.u)[..., None] * self.u
        mean = self.options.threshold - (0.8 if self.options.activation == "drelu" else 0.0)  # both have to be positive
        threshold = self.normal(f"{name}.threshold", *shape, mean=mean, deviation=0.5)
        along = threshold / np.float32(COMMON * self.n_embd**0.5)
        self.add(f"{name}.weight", rows - along[..., None] * self.u, self.options.type)

    def router(self, name: str, n_expert: int) -> None:
        """It favours some experts."""
        rows = self.normal(name, n_expert, self.n_embd, deviation=self.n_embd**-0.5)
        favour = self.normal(f"{name}.favour", n_expert, deviation=0.7 / (COMMON * self.n_embd**0.5))
        self.add(f"{name}.weight", rows + np.outer(favour, self.u))

    def embedding(self) -> None:
        rows = self.normal("token_embd", N_VOCAB, self.n_embd)
        rows -= np.outer(rows @ self.u, self.u)
        rows *= np.float32(np.sqrt(1 - COMMON**2)) / np.linalg.norm(rows, axis=1, keepdims=True)
        self.add("token_embd.weight", (rows + np.float32(COMMON) * self.u) * np.float32(self.n_embd**0.5))


def _metadata(out: Any, options: SparseModel) -> None:
    arch, layers, n_head = options.arch, options.layers, options.n_embd // N_HEAD_DIM
    out.add_block_count(len(layers))
    out.add_context_length(N_CTX)
    out.add_embedding_length(options.n_embd)
    out.add_layer_norm_eps(1e-5)
    out.add_layer_norm_rms_eps(1e-5)
    if arch in ("rwkv7", "rwkv6"):
        out.add_feed_forward_length(options.n_ff)
        out.add_head_count(0)
        out.add_wkv_head_size(WKV_HEAD_SIZE)
        out.add_token_shift_count(2)
        if arch == "rwkv7":
            out.add_decay_lora_rank(N_LORA)
            out.add_iclr_lora_rank(N_LORA)
            out.add_value_residual_mix_lora_rank(N_LORA)
            out.add_gate_lora_rank(N_LORA)
        else:
            out.add_time_mix_extra_dim(N_LORA)
            out.add_time_decay_extra_dim(N_LORA)
            out.add_rescale_every_n_layers(2)
    else:
        out.add_head_count(n_head)
        out.add_rope_dimension_count(N_HEAD_DIM)
        if arch in ("nemotron_h_moe", "nemotron_h"):
            # A layer is attention if it has key-value heads, an FFN if it has feed_forward_length, else Mamba-2.
            out.add_head_count_kv([N_HEAD_KV if kind == "*" else 0 for kind in layers])
            out.add_feed_forward_length([options.n_ff if kind in "E-" else 0 for kind in layers])
            out.add_ssm_conv_kernel(N_CONV)
            out.add_ssm_inner_size(2 * options.n_embd)
            out.add_ssm_state_size(N_STATE)
            out.add_ssm_time_step_rank(2 * n_head)
            out.add_ssm_group_count(2)
        else:
            out.add_head_count_kv(N_HEAD_KV)
            out.add_feed_forward_length(options.n_ff)
    if arch in MIXTURES:
        out.add_expert_count(options.n_expert)
        out.add_expert_used_count(options.n_expert_used)
        if arch != "llama":
            out.add_expert_feed_forward_length(options.n_ff)
        if arch == "smallthinker":
            out.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
        if arch == "nemotron_h_moe":
            out.add_expert_shared_count(1)
            out.add_expert_shared_feed_forward_length(options.n_ff_shared)
            out.add_expert_weights_norm(True)
            out.add_expert_weights_scale(2.5)
    if options.activation is not None:
        out.add_string(ACTIVATION_KEY, options.activation)
    write_vocabulary(out, N_VOCAB)


def write_attention(out: Writer, blk: str) -> None:
    """Grouped queries without biases."""
    for part, n in (("q", out.n_embd), ("k", N_HEAD_KV * N_HEAD_DIM), ("v", N_HEAD_KV * N_HEAD_DIM)):
        out.matrix(f"{blk}.attn_{part}", n, out.n_embd)
    out.matrix(f"{blk}.attn_output", out.n_embd, out.n_embd, scale=OUTPUT)


def _experts(out: Writer, blk: str) -> None:
    o = out.options
    assert isinstance(o, SparseModel)
    out.router(f"{blk}.ffn_gate_inp", o.n_expert)
    if o.gated:
        out.first(f"{blk}.ffn_gate_exps", o.n_expert, o.n_ff)
    if o.gated and o.activation != "drelu":
        out.matrix(f"{blk}.ffn_up_exps", o.n_expert, o.n_ff, out.n_embd)
    else:
        out.first(f"{blk}.ffn_up_exps", o.n_expert, o.n_ff)
    out.matrix(f"{blk}.ffn_down_exps", o.n_expert, out.n_embd, o.n_ff, scale=OUTPUT)
    if o.arch == "nemotron_h_moe":
        out.vector(f"{blk}.exp_probs_b.bias", o.n_expert, deviation=0.1)
        out.first(f"{blk}.ffn_up_shexp", o.n_ff_shared)
        out.matrix(f"{blk}.ffn_down_shexp", out.n_embd, o.n_ff_shared, scale=OUTPUT)


def _mamba(out: Writer, blk: str) -> None:
    n_inner, n_head, n_group = 2 * out.n_embd, 2 * out.n_embd // N_HEAD_DIM, 2
    n_mixed = n_inner + 2 * n_group * N_STATE
    out.matrix(f"{blk}.ssm_in", n_inner + n_mixed + n_head, out.n_embd)
    out.matrix(f"{blk}.ssm_conv1d", n_mixed, N_CONV, kind="F32")
    out.vector(f"{blk}.ssm_conv1d.bias", n_mixed)
    out.vector(f"{blk}.ssm_dt.bias", n_head, mean=-2.0)
    out.add(f"{blk}.ssm_a", -np.exp(out.normal(f"{blk}.ssm_a", n_head, 1)))
    out.add(f"{blk}.ssm_d", out.normal(f"{blk}.ssm_d", n_head, 1, mean=1.0, deviation=0.1))
    out.add(
        f"{blk}.ssm_norm.weight", out.normal(f"{blk}.ssm_norm", n_group, n_inner // n_group, mean=1.0, deviation=0.1)
    )
    out.matrix(f"{blk}.ssm_out", out.n_embd, n_inner, scale=OUTPUT)


def _rwkv(out: Writer, number: int) -> None:
    o = out.options
    assert isinstance(o, SparseModel)
    blk = f"blk.{number}"
    if number == 0:
        out.norm("token_embd_norm")
    out.norm(f"{blk}.attn_norm")
    out.norm(f"{blk}.attn_norm_2")
    mix = f"{blk}.time_mix"
    for name in ("key", "value", "receptance"):
        out.matrix(f"{mix}_{name}", out.n_embd, out.n_embd)
    out.matrix(f"{mix}_output", out.n_embd, out.n_embd, scale=OUTPUT)
    out.norm(f"{mix}_ln")
    if o.arch == "rwkv7":
        for name in "avwg":
            if name != "g":
                out.vector(f"{mix}_{name}0.weight", deviation=0.5)
            out.matrix(f"{mix}_{name}1", N_LORA, out.n_embd, kind="F32")
            out.matrix(f"{mix}_{name}2", out.n_embd, N_LORA, kind="F32")
        out.add(
            f"{mix}_lerp_fused.weight", out.normal(f"{mix}_lerp_fused", 6, 1, 1, out.n_embd, mean=0.5, deviation=0.2)
        )
        for name, mean in (("k_k", 1.0), ("k_a", 1.0), ("r_k", 0.0)):
            out.vector(f"{mix}_{name}.weight", mean=mean)
    else:
        out.matrix(f"{mix}_gate", out.n_embd, out.n_embd)
        out.matrix(f"{mix}_w1", 5 * N_LORA, out.n_embd, kind="F32")
        out.matrix(f"{mix}_w2", 5, out.n_embd, N_LORA, kind="F32", scale=0.2)
        out.matrix(f"{mix}_decay_w1", N_LORA, out.n_embd, kind="F32")
        out.matrix(f"{mix}_decay_w2", out.n_embd, N_LORA, kind="F32")
        out.vector(f"{mix}_decay.weight", deviation=1.0)
        out.add(
            f"{mix}_first.weight", out.normal(f"{mix}_first", out.n_embd // WKV_HEAD_SIZE, WKV_HEAD_SIZE, deviation=0.5)
        )
        out.add(f"{mix}_lerp_x.weight", out.normal(f"{mix}_lerp_x", 1, 1, out.n_embd, mean=0.5, deviation=0.2))
        out.add(
            f"{mix}_lerp_fused.weight", out.normal(f"{mix}_lerp_fused", 5, 1, 1, out.n_embd, mean=0.5, deviation=0.2)
        )
        out.matrix(f"{blk}.channel_mix_receptance", out.n_embd, out.n_embd)
        out.add(
            f"{blk}.channel_mix_lerp_r.weight", out.normal(f"{blk}.lerp_r", 1, 1, out.n_embd, mean=0.5, deviation=0.2)
        )
    out.add(f"{blk}.channel_mix_lerp_k.weight", out.normal(f"{blk}.lerp_k", 1, 1, out.n_embd, mean=0.5, deviation=0.2))
    out.first(f"{blk}.channel_mix_key", o.n_ff)
    out.matrix(f"{blk}.channel_mix_value", out.n_embd, o.n_ff, scale=OUTPUT)
