"""An independent forward pass in numpy for llama, arcee, falcon and gpt2 GGUFs with a ReLU-family FFN.

It shares no code with llama.cpp or with pinfer's native part: tests compare both with it. One sequence, no KV cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]

_OWN_ACTIVATION = {"arcee": "relu2"}


@dataclass(frozen=True)
class Result:
    """The results of a forward pass over n tokens."""

    logits: Array  # [n, n_vocab]
    ffn_inputs: list[Array]  # per layer [n, n_embd]
    neurons: list[Array]  # per layer [n, n_ff], f_i(x); a neuron fired where this is not 0

    def fired(self, layer: int) -> NDArray[np.bool_]:
        """Which neurons fired, [n, n_ff]."""
        return np.asarray(self.neurons[layer] != 0)


class Reference:
    """A model with all weights dequantised to ``dtype``; for small models."""

    def __init__(self, path: Path, activation: str | None = None, dtype: type = np.float64) -> None:
        """``activation``: relu, relu2, reglu or drelu; or swiglu (llama) or gelu, as stock llama.cpp computes them."""
        import gguf

        reader = gguf.GGUFReader(str(path))
        self.dtype = dtype
        self.arch: str = reader.fields["general.architecture"].contents()
        if self.arch not in ("llama", "arcee", "falcon", "gpt2"):
            raise ValueError(f"no reference for architecture {self.arch}")
        stated = reader.fields.get("pinfer.ffn.activation")
        self.activation: str = activation or (stated.contents() if stated else _OWN_ACTIVATION[self.arch])
        limit = reader.fields.get("pinfer.ffn.activation_threshold")
        self.threshold = float(limit.contents()) if limit else 0.0
        self._fields = reader.fields
        self.n_layer = int(self._value("block_count"))
        self.n_embd = int(self._value("embedding_length"))
        self.n_ff = int(self._value("feed_forward_length"))
        self.n_head = int(self._value("attention.head_count"))
        self.n_head_kv = int(self._value("attention.head_count_kv", self.n_head))
        self.n_head_dim = self.n_embd // self.n_head
        self.n_ctx = int(self._value("context_length"))
        self.rope_base = float(self._value("rope.freq_base", 10000.0))
        self._layer_norm = self.arch in ("falcon", "gpt2")
        self._eps = float(self._value(f"attention.layer_norm_{'' if self._layer_norm else 'rms_'}epsilon"))
        self._tensors: dict[str, Array] = {}
        for tensor in reader.tensors:
            shape = tuple(int(n) for n in reversed(tensor.shape))
            values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
            self._tensors[tensor.name] = np.asarray(values, dtype).reshape(shape)

    def _value(self, key: str, default: Any = None) -> Any:
        field = self._fields.get(f"{self.arch}.{key}")
        if field is None and default is None:
            raise ValueError(f"the model lacks {self.arch}.{key}")
        return default if field is None else field.contents()

    def tensor(self, name: str) -> Array:
        """Weights by GGUF name, [rows, columns] for matrices."""
        return self._tensors[name]

    def replace(self, name: str, values: Array) -> None:
        """Replaces the weights by others of the same shapes."""
        if values.shape != self._tensors[name].shape:
            raise ValueError(f"{name} is {self._tensors[name].shape}, not {values.shape}")
        self._tensors[name] = np.asarray(values, self.dtype)

    def _linear(self, name: str, x: Array) -> Array:
        y = x @ self._tensors[f"{name}.weight"].T
        bias = self._tensors.get(f"{name}.bias")
        return y if bias is None else y + bias

    def _norm(self, name: str, x: Array) -> Array:
        if self._layer_norm:
            x = x - x.mean(-1, keepdims=True)
        y = x / np.sqrt((x * x).mean(-1, keepdims=True) + self._eps) * self._tensors[f"{name}.weight"]
        bias = self._tensors.get(f"{name}.bias")
        return np.asarray(y if bias is None else y + bias)

    def _rope(self, x: Array) -> Array:
        """Rotary embedding of x [n, head, n_head_dim]: rotates neighbours, in falcon halves, in gpt2 nothing."""
        if self.arch == "gpt2":
            return x
        half = self.n_head_dim // 2
        angle = np.outer(np.arange(len(x)), self.rope_base ** (-np.arange(half) / half))[:, None, :]
        cos, sin = np.cos(angle).astype(self.dtype), np.sin(angle).astype(self.dtype)
        pairs = (slice(0, half), slice(half, None)) if self.arch == "falcon" else (slice(0, None, 2), slice(1, None, 2))
        a, b = x[..., pairs[0]], x[..., pairs[1]]
        y = np.empty_like(x)
        y[..., pairs[0]], y[..., pairs[1]] = a * cos - b * sin, a * sin + b * cos
        return y

    def _attention(self, blk: str, x: Array) -> Array:
        n = len(x)
        n_kv = self.n_head_kv * self.n_head_dim
        if f"{blk}.attn_qkv.weight" in self._tensors:
            qkv = self._linear(f"{blk}.attn_qkv", x)
            q, k, v = qkv[:, : self.n_embd], qkv[:, self.n_embd : self.n_embd + n_kv], qkv[:, self.n_embd + n_kv :]
        else:
            q, k, v = (self._linear(f"{blk}.attn_{name}", x) for name in "qkv")
        q = self._rope(q.reshape(n, self.n_head, -1))
        k = self._rope(k.reshape(n, self.n_head_kv, -1))
        v = v.reshape(n, self.n_head_kv, -1)
        repeat = self.n_head // self.n_head_kv
        k, v = np.repeat(k, repeat, axis=1), np.repeat(v, repeat, axis=1)
        scores = q.transpose(1, 0, 2) @ k.transpose(1, 2, 0) / self.dtype(np.sqrt(self.n_head_dim))
        scores = np.where(np.tril(np.ones((n, n), bool)), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        y = (weights @ v.transpose(1, 0, 2)).transpose(1, 0, 2).reshape(n, self.n_embd)
        return self._linear(f"{blk}.attn_output", y.astype(self.dtype))

    def _relu(self, x: Array) -> Array:
        """x where it exceeds the model's threshold, else 0."""
        return np.where(x > self.threshold, x, self.dtype(0))

    def ffn(self, blk: str, x: Array) -> tuple[Array, Array]:
        """Output [n, n_embd] and neurons [n, n_ff] of the FFN of ``blk.N`` for its inputs x [n, n_embd]."""
        up = self._linear(f"{blk}.ffn_up", x)
        neurons: Array
        if self.activation in ("reglu", "drelu"):
            gate = self._relu(self._linear(f"{blk}.ffn_gate", x))
            neurons = gate * (self._relu(up) if self.activation == "drelu" else up)
        elif self.activation == "swiglu":
            gate = self._linear(f"{blk}.ffn_gate", x)
            neurons = gate / (1 + np.exp(-gate)) * up
        elif self.activation == "gelu":
            neurons = up / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (up + 0.044715 * up**3)))
        elif self.activation in ("relu", "relu2"):
            neurons = self._relu(up)
            if self.activation == "relu2":
                neurons = neurons * neurons
        else:
            raise ValueError(f"no reference for activation {self.activation}")
        return self._linear(f"{blk}.ffn_down", neurons), neurons

    def forward(self, tokens: Sequence[int] | NDArray[np.integer[Any]]) -> Result:
        """Logits, FFN inputs and neurons of a sequence of at most n_ctx tokens that starts at position 0."""
        ids = np.asarray(tokens, np.int64)
        h = self._tensors["token_embd.weight"][ids]
        if self.arch == "gpt2":
            h = h + self._tensors["position_embd.weight"][: len(ids)]
        ffn_inputs, all_neurons = [], []
        for layer in range(self.n_layer):
            blk = f"blk.{layer}"
            normed = self._norm(f"{blk}.attn_norm", h)
            second = f"{blk}.attn_norm_2"
            attended = self._attention(blk, self._norm(second, h) if f"{second}.weight" in self._tensors else normed)
            if self.arch == "falcon":  # attention and FFN side by side on the same normed input
                y, neurons = self.ffn(blk, normed)
                h = h + attended + y
            else:
                h = h + attended
                normed = self._norm(f"{blk}.ffn_norm", h)
                y, neurons = self.ffn(blk, normed)
                h = h + y
            ffn_inputs.append(normed)
            all_neurons.append(neurons)
        head = self._tensors.get("output.weight", self._tensors["token_embd.weight"])
        return Result(self._norm("output_norm", h) @ head.T, ffn_inputs, all_neurons)

    def greedy(self, prompt: Sequence[int], n_predict: int, stop: int | None = None) -> list[int]:
        """Greedy decoding of n_predict tokens; ends early after the token ``stop``."""
        tokens = list(prompt)
        for _ in range(n_predict):
            tokens.append(int(self.forward(tokens).logits[-1].argmax()))
            if tokens[-1] == stop:
                break
        return tokens[len(prompt) :]
