"""The tiny mixture of experts in PyTorch and its GGUF form: llama.cpp's ``nemotron_h_moe``.

A layer is one sub-layer: Mamba-2 (``M``), attention without positions (``*``) or a mixture of experts (``E``), in the
order that ``pattern`` gives. Experts are ungated ReLU² FFNs; a shared expert sees every token. Tensors carry their GGUF
names throughout.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from tiny_model import NORM_EPS, Output, RMSNorm, Shape, TinyModel, read_gguf, write_tokenizer
from torch import Tensor, nn

if TYPE_CHECKING:
    from tokenizers import Tokenizer

ARCH = "nemotron_h_moe"
LEAST_LOAD, MOST_LOAD = 0.25, 4.0  # of an expert, in shares of an even load; outside them the router's bias moves
BIAS_STEP = 0.005
LOAD_DECAY = 0.95


@dataclass(frozen=True)
class MixtureShape:
    """Everything that fixes the sizes of the tensors and the graph."""

    pattern: str  # one of M, * and E for each layer
    n_embd: int
    n_ff: int  # of a routed expert
    n_ff_shared: int
    n_expert: int
    n_expert_used: int
    weights_scale: float  # factor on the normalised weights of the chosen experts
    n_head: int
    n_head_kv: int
    n_inner: int  # width of the Mamba-2 layers
    n_state: int
    n_conv: int
    n_vocab: int
    n_ctx: int

    @property
    def n_layer(self) -> int:
        """Layers, each one sub-layer."""
        return len(self.pattern)

    @property
    def arch(self) -> str:
        """The llama.cpp architecture with this graph."""
        return ARCH

    @property
    def activation(self) -> str:
        """The activation of all experts."""
        return "relu2"

    @property
    def n_head_dim(self) -> int:
        """Size of one head, in attention and Mamba-2 alike."""
        return self.n_embd // self.n_head

    @property
    def n_ssm_head(self) -> int:
        """Heads of a Mamba-2 layer."""
        return self.n_inner // self.n_head_dim

    @property
    def n_mixed(self) -> int:
        """Channels of a Mamba-2 layer that pass through its convolution."""
        return self.n_inner + 2 * self.n_state


class Attention(nn.Module):
    """Causal grouped-query attention without positional embedding."""

    def __init__(self, shape: MixtureShape) -> None:
        super().__init__()
        self.shape = shape
        n_kv = shape.n_head_kv * shape.n_head_dim
        self.attn_norm = RMSNorm(shape.n_embd)
        self.attn_q = nn.Linear(shape.n_embd, shape.n_embd, bias=False)
        self.attn_k = nn.Linear(shape.n_embd, n_kv, bias=False)
        self.attn_v = nn.Linear(shape.n_embd, n_kv, bias=False)
        self.attn_output = nn.Linear(shape.n_embd, shape.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """The sub-layer's output for normed x [batch, token, n_embd]."""
        s = self.shape
        n_batch, n_token, _ = x.shape
        n_kv = s.n_head_kv * s.n_head_dim
        weight = torch.cat((self.attn_q.weight, self.attn_k.weight, self.attn_v.weight))
        q, k, v = (
            part.view(n_batch, n_token, -1, s.n_head_dim).transpose(1, 2)
            for part in F.linear(x, weight).split((s.n_embd, n_kv, n_kv), dim=-1)
        )
        repeat = s.n_head // s.n_head_kv
        k, v = k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.attn_output(y.transpose(1, 2).reshape(n_batch, n_token, s.n_embd))


class Mamba2(nn.Module):
    """Mamba-2 (Dao and Gu, 2024) with one group, in its quadratic form: a window is short enough for that."""

    def __init__(self, shape: MixtureShape) -> None:
        super().__init__()
        self.shape = shape
        n_head = shape.n_ssm_head
        self.attn_norm = RMSNorm(shape.n_embd)
        self.ssm_in = nn.Linear(shape.n_embd, shape.n_inner + shape.n_mixed + n_head, bias=False)
        self.ssm_conv1d = nn.Conv1d(shape.n_mixed, shape.n_mixed, shape.n_conv, groups=shape.n_mixed)
        self.ssm_dt = nn.Parameter(torch.zeros(n_head))
        self.ssm_a_log = nn.Parameter(torch.zeros(n_head))
        self.ssm_d = nn.Parameter(torch.ones(n_head))
        self.ssm_norm = RMSNorm(shape.n_inner)
        self.ssm_out = nn.Linear(shape.n_inner, shape.n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """The sub-layer's output for normed x [batch, token, n_embd]."""
        s = self.shape
        n_batch, n_token, _ = x.shape
        z, mixed, dt = self.ssm_in(x).split((s.n_inner, s.n_mixed, s.n_ssm_head), dim=-1)
        kernel = self.ssm_conv1d.weight[:, 0].float()  # [n_mixed, n_conv]
        padded = F.pad(mixed.float(), (0, 0, s.n_conv - 1, 0))
        mixed = sum((padded[:, j : j + n_token] * kernel[:, j] for j in range(s.n_conv)), self.ssm_conv1d.bias)
        inner, b, c = F.silu(mixed).split((s.n_inner, s.n_state, s.n_state), dim=-1)
        inner = inner.view(n_batch, n_token, s.n_ssm_head, -1)
        dt = F.softplus(dt.float() + self.ssm_dt)  # [batch, token, head]
        decay = torch.cumsum(dt * -self.ssm_a_log.exp(), dim=1).transpose(1, 2)  # [batch, head, token]
        future = torch.ones(n_token, n_token, dtype=torch.bool, device=x.device).triu(1)
        lasting = (decay[..., :, None] - decay[..., None, :]).masked_fill(future, -torch.inf).exp()
        seen = lasting * (c @ b.transpose(1, 2))[:, None]  # [batch, head, token, token]
        y = seen @ (inner * dt[..., None]).transpose(1, 2)  # [batch, head, token, n_head_dim]
        y = y.transpose(1, 2).float() + self.ssm_d[:, None] * inner
        y = F.silu(z.float()) * y.reshape(n_batch, n_token, s.n_inner)
        return self.ssm_out(self.ssm_norm(y))


class Stack(nn.Module):
    """The matrices of all experts, [n_expert, rows, columns]."""

    def __init__(self, n_expert: int, columns: int, rows: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_expert, rows, columns))

    def forward(self, parts: tuple[Tensor, ...]) -> Tensor:
        """Multiplies the inputs of each expert, [n, columns] in ``parts``, by its matrix; one after another."""
        matrices = self.weight.to(parts[0].dtype).unbind(0)
        return torch.cat([F.linear(part, matrix) for part, matrix in zip(parts, matrices, strict=True)])


@dataclass(frozen=True)
class Mixed:
    """What a mixture computed for n tokens, k experts each."""

    y: Tensor  # [batch, token, n_embd]
    routed: Tensor  # [n * k, n_ff], the values that decide which routed neurons fire (those > 0), sorted by expert
    shared: Tensor  # [batch, token, n_ff_shared], those of the shared expert
    chosen: Tensor  # [n, k], experts
    order: Tensor  # [n * k], for each row of ``routed`` its place in ``chosen``

    def fired(self) -> Tensor:
        """Which routed neurons fired, [n, k, n_ff]."""
        values = torch.empty_like(self.routed)
        values[self.order] = self.routed
        return (values > 0).unflatten(0, self.chosen.shape)


@dataclass(frozen=True)
class MixtureOutput(Output):
    """The results of a mixture's forward pass; ``firing`` is of the shared experts, ``mixed`` only with ``inspect``."""

    mixed: list[Mixed]


class Mixture(nn.Module):
    """Routed experts and a shared one. A sigmoid router, whose bias changes only which experts are chosen."""

    def __init__(self, shape: MixtureShape) -> None:
        super().__init__()
        self.shape = shape
        self.attn_norm = RMSNorm(shape.n_embd)
        self.ffn_gate_inp = nn.Linear(shape.n_embd, shape.n_expert, bias=False)
        self.ffn_up_exps = Stack(shape.n_expert, shape.n_embd, shape.n_ff)
        self.ffn_down_exps = Stack(shape.n_expert, shape.n_ff, shape.n_embd)
        self.ffn_up_shexp = nn.Linear(shape.n_embd, shape.n_ff_shared, bias=False)
        self.ffn_down_shexp = nn.Linear(shape.n_ff_shared, shape.n_embd, bias=False)
        self.register_buffer("exp_probs_b", torch.zeros(shape.n_expert))
        self.register_buffer("load", torch.full((shape.n_expert,), 1 / shape.n_expert))

    def forward(self, x: Tensor) -> Mixed:
        """The sub-layer's output for normed x [batch, token, n_embd]."""
        s = self.shape
        shared = self.ffn_up_shexp(x)
        flat = x.reshape(-1, s.n_embd)
        with torch.autocast(x.device.type, enabled=False):
            probs = F.linear(flat.float(), self.ffn_gate_inp.weight).sigmoid()
        chosen = (probs.detach() + self.exp_probs_b).topk(s.n_expert_used, dim=-1).indices
        weights = probs.gather(1, chosen)
        weights = weights / weights.sum(-1, keepdim=True) * s.weights_scale
        counts = torch.bincount(chosen.flatten(), minlength=s.n_expert)
        if self.training:
            self.load.lerp_(counts / counts.sum(), 1 - LOAD_DECAY)
        order = chosen.flatten().argsort(stable=True)
        token = order // s.n_expert_used
        sizes = counts.tolist()
        routed = self.ffn_up_exps(flat.to(shared.dtype)[token].split(sizes))
        neurons = F.relu(routed).square() * weights.flatten()[order, None].to(routed.dtype)
        y = self.ffn_down_exps(neurons.split(sizes)).float()
        y = torch.zeros_like(flat, dtype=torch.float32).index_add(0, token, y)
        y = y.view(x.shape) + self.ffn_down_shexp(F.relu(shared).square())
        return Mixed(y, routed, shared, chosen, order)

    def balance(self) -> None:
        """Moves the bias of experts that are routed far more or far less than evenly. Between, nothing pushes."""
        share = self.load * self.shape.n_expert
        self.exp_probs_b += BIAS_STEP * ((share < LEAST_LOAD).float() - (share > MOST_LOAD).float())


KINDS: dict[str, type[nn.Module]] = {"M": Mamba2, "*": Attention, "E": Mixture}


class TinyMixture(nn.Module):
    """The decoder. Parameters are float32; run it under autocast for bf16 arithmetic."""

    def __init__(self, shape: MixtureShape, seed: int = 0) -> None:
        super().__init__()
        self.shape = shape
        self.token_embd = nn.Embedding(shape.n_vocab, shape.n_embd)
        self.blk = nn.ModuleList(KINDS[kind](shape) for kind in shape.pattern)
        self.output_norm = RMSNorm(shape.n_embd)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if parameter.ndim >= 2:
                    std = 0.02 if "token_embd" in name else parameter.shape[-1] ** -0.5
                    if any(part in name for part in ("attn_output", "ffn_down", "ssm_out")):
                        std /= shape.n_layer**0.5
                    parameter.normal_(0.0, std, generator=generator)
            for block in self.blk:
                if isinstance(block, Mamba2):  # time steps from 0.001 to 0.1, decays from 1 to 16, as Mamba-2 has them
                    n_head = shape.n_ssm_head
                    step = torch.logspace(-3, -1, n_head)
                    block.ssm_dt.copy_(step + torch.log(-torch.expm1(-step)))
                    block.ssm_a_log.copy_(torch.linspace(1, 16, n_head).log())
                    block.ssm_conv1d.bias.zero_()

    def forward(self, tokens: Tensor, inspect: bool = False) -> MixtureOutput:
        """Runs tokens [batch, token]; ``active`` has two numbers per mixture: of its routed experts and the shared one.

        ``inspect`` keeps what each mixture received and computed.
        """
        x = self.token_embd(tokens)
        active, l1, ffn_inputs, kept = [], [], [], []
        for block in self.blk:
            normed = block.attn_norm(x)
            if isinstance(block, Mixture):
                mixed = block(normed)
                y = mixed.y
                for decides in (mixed.routed, mixed.shared):
                    # Divided by the spread: shrinking the matrix does not reduce the loss, only inactive neurons do.
                    spread = decides.detach().float().square().mean().sqrt()
                    l1.append(F.relu(decides).mean(dtype=torch.float32) / spread)
                    active.append((decides.detach() > 0).float().mean())
                if inspect:
                    ffn_inputs.append(normed)
                    kept.append(mixed)
            else:
                y = block(normed)
            x = x + y.float()
        logits = F.linear(self.output_norm(x), self.token_embd.weight)
        firing = [mixed.shared > 0 for mixed in kept]
        return MixtureOutput(logits, torch.stack(active), torch.stack(l1).mean(), ffn_inputs, firing, kept)

    def balance(self) -> None:
        """Adjusts the routers after a training step."""
        for block in self.blk:
            if isinstance(block, Mixture):
                block.balance()

    def loads(self) -> list[Tensor]:
        """Per mixture, the running mean of each expert's share of the routed tokens, in training."""
        return [block.load for block in self.blk if isinstance(block, Mixture)]

    def gguf_tensors(self) -> dict[str, Tensor]:
        """GGUF name -> values, in the shapes of the file (rows first)."""
        tensors: dict[str, Tensor] = {}
        for name, value in [*self.named_parameters(), *self.named_buffers()]:
            if name.endswith("ssm_a_log"):
                tensors[name.removesuffix("_log")] = -value.exp()[:, None]
            elif name.endswith("ssm_d"):
                tensors[name] = value[:, None]
            elif name.endswith("ssm_dt"):
                tensors[f"{name}.bias"] = value
            elif name.endswith("ssm_conv1d.weight"):
                tensors[name] = value[:, 0]
            elif name.endswith("ssm_norm.weight"):
                tensors[name] = value[None, :]
            elif not name.endswith(".load"):
                tensors[name + ".bias" * name.endswith("exp_probs_b")] = value
        return tensors

    def load_gguf_tensors(self, tensors: dict[str, Tensor]) -> None:
        """The inverse of ``gguf_tensors``."""
        with torch.no_grad():
            for name, value in [*self.named_parameters(), *self.named_buffers()]:
                if name.endswith("ssm_a_log"):
                    value.copy_((-tensors[name.removesuffix("_log")]).log().reshape(value.shape))
                elif not name.endswith(".load"):
                    stored = tensors[name + ".bias" * name.endswith(("ssm_dt", "exp_probs_b"))]
                    value.copy_(stored.reshape(value.shape))


def write_mixture(path: Path, model: TinyMixture, tokenizer: Tokenizer, name: str, note: str) -> None:
    """Writes the model with Q8_0 matrices, first to a temporary name in the same folder."""
    import gguf

    s = model.shape
    temporary = path.with_name(path.name + ".tmp")
    writer = gguf.GGUFWriter(str(temporary), ARCH)
    writer.add_name(name)
    writer.add_description(note)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_vocab_size(s.n_vocab)
    writer.add_context_length(s.n_ctx)
    writer.add_embedding_length(s.n_embd)
    writer.add_block_count(s.n_layer)
    # By these two llama.cpp tells a layer's kind: attention has key-value heads, a mixture has feed_forward_length.
    writer.add_feed_forward_length([s.n_ff if kind == "E" else 0 for kind in s.pattern])
    writer.add_head_count_kv([s.n_head_kv if kind == "*" else 0 for kind in s.pattern])
    writer.add_head_count(s.n_head)
    writer.add_layer_norm_eps(NORM_EPS)  # of a draft head, but llama.cpp asks for it
    writer.add_layer_norm_rms_eps(NORM_EPS)
    writer.add_rope_dimension_count(s.n_head_dim)
    writer.add_expert_count(s.n_expert)
    writer.add_expert_used_count(s.n_expert_used)
    writer.add_expert_shared_count(1)
    writer.add_expert_feed_forward_length(s.n_ff)
    writer.add_expert_shared_feed_forward_length(s.n_ff_shared)
    writer.add_expert_weights_norm(True)
    writer.add_expert_weights_scale(s.weights_scale)
    writer.add_ssm_conv_kernel(s.n_conv)
    writer.add_ssm_inner_size(s.n_inner)
    writer.add_ssm_state_size(s.n_state)
    writer.add_ssm_time_step_rank(s.n_ssm_head)
    writer.add_ssm_group_count(1)
    writer.add_string("pinfer.ffn.activation", s.activation)
    write_tokenizer(writer, tokenizer, s.n_vocab)
    for tensor_name, tensor in model.gguf_tensors().items():
        values = tensor.detach().float().cpu().numpy()
        exact = values.ndim == 1 or values.shape[-1] % 32 or "ffn_gate_inp" in tensor_name or "ssm_norm" in tensor_name
        if exact:
            writer.add_tensor(tensor_name, np.ascontiguousarray(values))
        else:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(tensor_name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(temporary, path)


def read_mixture(path: Path) -> TinyMixture:
    """A TinyMixture with the weights of a GGUF written by ``write_mixture`` (dequantised to float32)."""
    import gguf

    reader = gguf.GGUFReader(str(path))

    def value(key: str) -> Any:
        return reader.fields[f"{ARCH}.{key}"].contents()

    kinds = zip(value("feed_forward_length"), value("attention.head_count_kv"), strict=True)
    shape = MixtureShape(
        pattern="".join("E" if n_ff else "*" if n_head_kv else "M" for n_ff, n_head_kv in kinds),
        n_embd=value("embedding_length"),
        n_ff=value("expert_feed_forward_length"),
        n_ff_shared=value("expert_shared_feed_forward_length"),
        n_expert=value("expert_count"),
        n_expert_used=value("expert_used_count"),
        weights_scale=value("expert_weights_scale"),
        n_head=value("attention.head_count"),
        n_head_kv=max(value("attention.head_count_kv")),
        n_inner=value("ssm.inner_size"),
        n_state=value("ssm.state_size"),
        n_conv=value("ssm.conv_kernel"),
        n_vocab=len(reader.fields["tokenizer.ggml.tokens"].data),
        n_ctx=value("context_length"),
    )
    model = TinyMixture(shape)
    model.load_gguf_tensors(
        {
            t.name: torch.from_numpy(np.array(gguf.quants.dequantize(t.data, t.tensor_type), np.float32))
            for t in reader.tensors
        }
    )
    return model


def build(shape: Shape | MixtureShape, seed: int) -> TinyModel | TinyMixture:
    """A model of a shape, with random weights."""
    return TinyMixture(shape, seed) if isinstance(shape, MixtureShape) else TinyModel(shape, seed)


def read_model(path: Path) -> TinyModel | TinyMixture:
    """The model of a GGUF that train_tiny.py has written."""
    import gguf

    arch = gguf.GGUFReader(str(path)).fields["general.architecture"].contents()
    return read_mixture(path) if arch == ARCH else read_gguf(path)
