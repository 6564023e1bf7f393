"""The tiny decoder in PyTorch, its loss on activations, and its GGUF form.

The graph is llama.cpp's ``llama`` (gated) or ``arcee`` (ungated): RMSNorm, grouped-query attention with rotary
embedding in interleaved pairs, FFN, output head tied to the embedding. Tensors carry their GGUF names throughout.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from tokenizers import Tokenizer

ACTIVATIONS = ("relu", "relu2", "reglu", "drelu")
NORM_EPS = 1e-5
ROPE_BASE = 10000.0


@dataclass(frozen=True)
class Shape:
    """Everything that fixes the sizes of the tensors and the graph."""

    activation: str
    n_embd: int
    n_ff: int
    n_layer: int
    n_head: int
    n_head_kv: int
    n_vocab: int
    n_ctx: int

    @property
    def gated(self) -> bool:
        """Whether the FFN has a gate matrix."""
        return self.activation in ("reglu", "drelu")

    @property
    def arch(self) -> str:
        """The llama.cpp architecture with this graph; only ``arcee`` has an ungated FFN."""
        return "llama" if self.gated else "arcee"

    @property
    def n_head_dim(self) -> int:
        """Size of one head."""
        return self.n_embd // self.n_head


class RMSNorm(nn.Module):
    """Root-mean-square norm with a learned scale, computed in float32."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), (x.shape[-1],), self.weight, NORM_EPS)


def rope_tables(n_ctx: int, n_head_dim: int) -> tuple[Tensor, Tensor]:
    """Cosine and sine [n_ctx, n_head_dim / 2] of the rotary embedding."""
    frequency = ROPE_BASE ** (-torch.arange(0, n_head_dim, 2, dtype=torch.float64) / n_head_dim)
    angle = torch.arange(n_ctx, dtype=torch.float64)[:, None] * frequency[None, :]
    return angle.cos().float(), angle.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the pairs (2i, 2i + 1) of the last axis of x [batch, head, token, n_head_dim]."""
    even, odd = x[..., 0::2].float(), x[..., 1::2].float()
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


class Block(nn.Module):
    """Attention and FFN of one layer."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        n_kv = shape.n_head_kv * shape.n_head_dim
        self.attn_norm = RMSNorm(shape.n_embd)
        self.attn_q = nn.Linear(shape.n_embd, shape.n_embd, bias=False)
        self.attn_k = nn.Linear(shape.n_embd, n_kv, bias=False)
        self.attn_v = nn.Linear(shape.n_embd, n_kv, bias=False)
        self.attn_output = nn.Linear(shape.n_embd, shape.n_embd, bias=False)
        self.ffn_norm = RMSNorm(shape.n_embd)
        if shape.gated:
            self.ffn_gate = nn.Linear(shape.n_embd, shape.n_ff, bias=False)
        self.ffn_up = nn.Linear(shape.n_embd, shape.n_ff, bias=False)
        self.ffn_down = nn.Linear(shape.n_ff, shape.n_embd, bias=False)

    def attention(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Causal attention of normed x [batch, token, n_embd]."""
        s = self.shape
        n_batch, n_token, _ = x.shape
        weight = torch.cat((self.attn_q.weight, self.attn_k.weight, self.attn_v.weight))  # one product instead of three
        n_q, n_kv = s.n_embd, s.n_head_kv * s.n_head_dim
        q, k, v = (
            part.view(n_batch, n_token, -1, s.n_head_dim).transpose(1, 2)
            for part in F.linear(x, weight).split((n_q, n_kv, n_kv), dim=-1)
        )
        q, k = rotate(q, cos, sin).to(v.dtype), rotate(k, cos, sin).to(v.dtype)
        repeat = s.n_head // s.n_head_kv
        k, v = k.repeat_interleave(repeat, dim=1), v.repeat_interleave(repeat, dim=1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.attn_output(y.transpose(1, 2).reshape(n_batch, n_token, s.n_embd))

    def ffn(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The FFN of normed x, and the values that decide which neurons fire (those > 0)."""
        up = self.ffn_up(x)
        if self.shape.activation == "reglu":
            gate = self.ffn_gate(x)
            return self.ffn_down(F.relu(gate) * up), gate
        if self.shape.activation == "drelu":
            gate = self.ffn_gate(x)
            return self.ffn_down(F.relu(gate) * F.relu(up)), torch.minimum(gate, up)
        fired = F.relu(up)
        return self.ffn_down(fired.square() if self.shape.activation == "relu2" else fired), up


@dataclass(frozen=True)
class Output:
    """The results of a forward pass: logits, and for each layer its active fraction and L1 term."""

    logits: Tensor  # [batch, token, n_vocab]
    active: Tensor  # [n_layer]
    l1: Tensor  # scalar, mean over layers
    ffn_inputs: list[Tensor]  # per layer [batch, token, n_embd], only with ``inspect``
    firing: list[Tensor]  # per layer bool [batch, token, n_ff], only with ``inspect``


class TinyModel(nn.Module):
    """The decoder. Parameters are float32; run it under autocast for bf16 arithmetic."""

    def __init__(self, shape: Shape, seed: int = 0) -> None:
        super().__init__()
        self.shape = shape
        self.token_embd = nn.Embedding(shape.n_vocab, shape.n_embd)
        self.blk = nn.ModuleList(Block(shape) for _ in range(shape.n_layer))
        self.output_norm = RMSNorm(shape.n_embd)
        cos, sin = rope_tables(shape.n_ctx, shape.n_head_dim)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if parameter.ndim == 2:
                    std = 0.02 if "token_embd" in name else parameter.shape[1] ** -0.5
                    if "attn_output" in name or "ffn_down" in name:
                        std /= (2 * shape.n_layer) ** 0.5
                    parameter.normal_(0.0, std, generator=generator)

    def forward(self, tokens: Tensor, inspect: bool = False) -> Output:
        """Runs tokens [batch, token]; ``inspect`` keeps FFN inputs and firing neurons."""
        n_token = tokens.shape[1]
        cos, sin = self.cos[:n_token], self.sin[:n_token]
        x = self.token_embd(tokens)
        active, l1, ffn_inputs, firing = [], [], [], []
        for block in self.blk:
            x = x + block.attention(block.attn_norm(x), cos, sin).float()
            normed = block.ffn_norm(x)
            y, decides = block.ffn(normed)
            x = x + y.float()
            # Divided by the spread: shrinking the matrix does not reduce the loss, only inactive neurons do.
            l1.append(F.relu(decides).mean(dtype=torch.float32) / decides.detach().float().square().mean().sqrt())
            active.append((decides.detach() > 0).float().mean())
            if inspect:
                ffn_inputs.append(normed)
                firing.append(decides > 0)
        logits = F.linear(self.output_norm(x), self.token_embd.weight)
        return Output(logits, torch.stack(active), torch.stack(l1).mean(), ffn_inputs, firing)

    def gguf_tensors(self) -> dict[str, Tensor]:
        """GGUF name -> parameter."""
        return dict(self.named_parameters())


def write_gguf(path: Path, model: TinyModel, tokenizer: Tokenizer, name: str, note: str) -> None:
    """Writes the model with F16 matrices and F32 norms, first to a temporary name in the same folder."""
    import gguf

    s = model.shape
    temporary = path.with_name(path.name + ".tmp")
    writer = gguf.GGUFWriter(str(temporary), s.arch)
    writer.add_name(name)
    writer.add_description(note)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_vocab_size(s.n_vocab)
    writer.add_context_length(s.n_ctx)
    writer.add_embedding_length(s.n_embd)
    writer.add_block_count(s.n_layer)
    writer.add_feed_forward_length(s.n_ff)
    writer.add_head_count(s.n_head)
    writer.add_head_count_kv(s.n_head_kv)
    writer.add_layer_norm_rms_eps(NORM_EPS)
    writer.add_rope_dimension_count(s.n_head_dim)
    writer.add_rope_freq_base(ROPE_BASE)
    writer.add_string("pinfer.ffn.activation", s.activation)
    write_tokenizer(writer, tokenizer, s.n_vocab)
    for tensor_name, tensor in model.gguf_tensors().items():
        values = tensor.detach().float().cpu().numpy()
        writer.add_tensor(tensor_name, values.astype(np.float16) if values.ndim == 2 else values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    os.replace(temporary, path)


def write_tokenizer(writer: Any, tokenizer: Tokenizer, n_vocab: int) -> None:
    import json

    bpe = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(bpe["vocab"], key=bpe["vocab"].__getitem__)
    if len(tokens) != n_vocab:
        raise ValueError(f"the tokenizer has {len(tokens)} tokens, the model {n_vocab}")
    merges = [m if isinstance(m, str) else " ".join(m) for m in bpe["merges"]]
    control, normal = 3, 1
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([control] + [normal] * (len(tokens) - 1))
    writer.add_token_merges(merges)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(True)


def read_gguf(path: Path) -> TinyModel:
    """A TinyModel with the weights of a GGUF written by ``write_gguf`` (dequantised to float32)."""
    import gguf

    reader = gguf.GGUFReader(str(path))

    def number(key: str) -> int:
        return int(reader.fields[f"{arch}.{key}"].contents())

    arch = reader.fields["general.architecture"].contents()
    activation = reader.fields.get("pinfer.ffn.activation")
    shape = Shape(
        activation=activation.contents() if activation else {"arcee": "relu2"}[arch],
        n_embd=number("embedding_length"),
        n_ff=number("feed_forward_length"),
        n_layer=number("block_count"),
        n_head=number("attention.head_count"),
        n_head_kv=number("attention.head_count_kv"),
        n_vocab=len(reader.fields["tokenizer.ggml.tokens"].data),
        n_ctx=number("context_length"),
    )
    model = TinyModel(shape)
    tensors = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    with torch.no_grad():
        for name, parameter in model.gguf_tensors().items():
            parameter.copy_(torch.from_numpy(np.array(tensors[name], np.float32)).reshape(parameter.shape))
    return model
