"""An independent forward pass in numpy for GGUFs with a ReLU-family FFN: llama, arcee, falcon, gpt2, and mixtures.

It shares no code with llama.cpp or with pinfer's native part: tests compare both with it. One sequence, no KV cache.
Mixtures of experts (llama, smallthinker, nemotron_h_moe) and nemotron_h have a class of their own, MixtureReference.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]

_OWN_ACTIVATION = {"arcee": "relu2", "nemotron_h": "relu2", "nemotron_h_moe": "relu2", "smallthinker": "reglu"}


@dataclass(frozen=True)
class Result:
    """The results of a forward pass over n tokens."""

    logits: Array  # [n, n_vocab]
    ffn_inputs: list[Any]  # per layer [n, n_embd]
    neurons: list[Any]  # per layer [n, n_ff], f_i(x); a neuron fired where this is not 0

    def fired(self, layer: int) -> NDArray[np.bool_]:
        """Which neurons fired, [n, n_ff]."""
        return np.asarray(self.neurons[layer] != 0)


@dataclass(frozen=True)
class Routing:
    """What the router of a mixture chose for n tokens, k experts each, and what these experts computed."""

    experts: NDArray[np.int64]  # [n, k], the best first
    weights: Array  # [n, k], factors on the experts' outputs
    neurons: Array  # [n, k, n_ff], f_i(x) of the chosen experts, without the weights

    def counts(self, n_expert: int) -> NDArray[np.int64]:
        """How many tokens each expert computed, [n_expert]."""
        return np.bincount(self.experts.ravel(), minlength=n_expert)

    def fired(self, expert: int) -> NDArray[np.bool_]:
        """Which neurons of an expert fired, [tokens routed to it, n_ff]."""
        return np.asarray(self.neurons[self.experts == expert] != 0)


@dataclass(frozen=True)
class MixtureResult(Result):
    """The results of a mixture's forward pass. A layer without FFN has None in ``ffn_inputs``, ``neurons`` too.

    ``neurons`` are those of a dense FFN or of the shared expert.
    """

    routing: list[Routing | None]  # per layer; None without experts


class Reference:
    """A model with all weights dequantised to ``dtype``; for small models."""

    ARCHITECTURES: tuple[str, ...] = ("llama", "arcee", "falcon", "gpt2")

    def __init__(self, path: Path, activation: str | None = None, dtype: type = np.float64) -> None:
        """``activation``: relu, relu2, reglu or drelu; or swiglu (llama) or gelu, as stock llama.cpp computes them."""
        import gguf

        reader = gguf.GGUFReader(str(path))
        self.dtype = dtype
        self.arch: str = reader.fields["general.architecture"].contents()
        if self.arch not in self.ARCHITECTURES:
            raise ValueError(f"no reference for architecture {self.arch}")
        stated = reader.fields.get("pinfer.ffn.activation")
        self.activation: str = activation or (stated.contents() if stated else _OWN_ACTIVATION[self.arch])
        limit = reader.fields.get("pinfer.ffn.activation_threshold")
        self.threshold = float(limit.contents()) if limit else 0.0
        self._fields = reader.fields
        self.n_layer = int(self._value("block_count"))
        self.n_embd = int(self._value("embedding_length"))
        # Arrays have a number for each layer, 0 where it has no FFN or no attention.
        self.n_ff = int(np.max(self._value("feed_forward_length")))
        self.n_head = int(self._value("attention.head_count"))
        self.n_head_kv = int(np.max(self._value("attention.head_count_kv", self.n_head)))
        self.n_head_dim = int(self._value("attention.key_length", self.n_embd // self.n_head))
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
        """Rotary embedding of x [n, head, n_head_dim]: rotates neighbours, or halves; where there is none, nothing."""
        if self.arch in ("gpt2", "nemotron_h", "nemotron_h_moe"):
            return x
        half = self.n_head_dim // 2
        angle = np.outer(np.arange(len(x)), self.rope_base ** (-np.arange(half) / half))[:, None, :]
        cos, sin = np.cos(angle).astype(self.dtype), np.sin(angle).astype(self.dtype)
        halves = self.arch in ("falcon", "smallthinker")
        pairs = (slice(0, half), slice(half, None)) if halves else (slice(0, None, 2), slice(1, None, 2))
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
        y = (weights @ v.transpose(1, 0, 2)).transpose(1, 0, 2).reshape(n, -1)
        return self._linear(f"{blk}.attn_output", y.astype(self.dtype))

    def _relu(self, x: Array) -> Array:
        """x where it exceeds the model's threshold, else 0."""
        return np.where(x > self.threshold, x, self.dtype(0))

    def ffn(self, blk: str, x: Array) -> tuple[Array, Array]:
        """Output [n, n_embd] and neurons [n, n_ff] of the FFN of ``blk.N`` for its inputs x [n, n_embd]."""
        gated = f"{blk}.ffn_gate.weight" in self._tensors
        gate = self._linear(f"{blk}.ffn_gate", x) if gated else None
        neurons = self._activate(self._linear(f"{blk}.ffn_up", x), gate)
        return self._linear(f"{blk}.ffn_down", neurons), neurons

    def _activate(self, up: Array, gate: Array | None) -> Array:
        """The neurons f_i(x) from the products with up and, where there is one, gate."""
        neurons: Array
        if gate is not None:
            if self.activation == "swiglu":
                neurons = gate / (1 + np.exp(-gate)) * up
            elif self.activation in ("reglu", "drelu"):
                neurons = self._relu(gate) * (self._relu(up) if self.activation == "drelu" else up)
            else:
                raise ValueError(f"no reference for activation {self.activation} with a gate")
        elif self.activation == "gelu":
            neurons = up / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (up + 0.044715 * up**3)))
        elif self.activation in ("relu", "relu2"):
            neurons = self._relu(up)
            if self.activation == "relu2":
                neurons = neurons * neurons
        else:
            raise ValueError(f"no reference for activation {self.activation} without a gate")
        return neurons

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


class MixtureReference(Reference):
    """Mixtures of experts, and Nemotron-H, whose layers are one sub-layer each: Mamba-2, attention or an FFN."""

    ARCHITECTURES = ("llama", "smallthinker", "nemotron_h", "nemotron_h_moe")

    def __init__(self, path: Path, activation: str | None = None, dtype: type = np.float64) -> None:
        super().__init__(path, activation, dtype)
        self.n_expert = int(self._value("expert_count", 0))
        self.n_expert_used = int(self._value("expert_used_count", 0))
        self.weights_scale = float(self._value("expert_weights_scale", 1.0))
        softmax = 1  # of llama.cpp's gating functions
        gating = self._value("expert_gating_func", softmax)
        self._softmax = self.arch == "llama" or (self.arch == "smallthinker" and gating == softmax)

    def has(self, name: str) -> bool:
        """Whether the model has a tensor ``name.weight``."""
        return f"{name}.weight" in self._tensors

    def mixture(self, blk: str, x: Array, routed_by: Array) -> tuple[Array, Routing]:
        """Output [n, n_embd] of the routed experts for inputs x [n, n_embd]; ``routed_by`` is the router's input."""
        scores = self._linear(f"{blk}.ffn_gate_inp", routed_by)
        if self._softmax:
            scores = np.exp(scores - scores.max(-1, keepdims=True))
            scores /= scores.sum(-1, keepdims=True)
        else:
            scores = 1 / (1 + np.exp(-scores))
        bias = self._tensors.get(f"{blk}.exp_probs_b.bias", self.dtype(0))
        experts = np.argsort(-(scores + bias), axis=-1, kind="stable")[:, : self.n_expert_used]
        weights = np.take_along_axis(scores, experts, axis=-1)
        weights = weights / weights.sum(-1, keepdims=True) * self.dtype(self.weights_scale)
        y = np.zeros_like(x)
        n_ff = self._tensors[f"{blk}.ffn_up_exps.weight"].shape[1]
        neurons = np.zeros((*experts.shape, n_ff), self.dtype)
        for expert in range(self.n_expert):
            tokens, place = np.nonzero(experts == expert)
            part = x[tokens]
            up = part @ self._tensors[f"{blk}.ffn_up_exps.weight"][expert].T
            gate = self._tensors.get(f"{blk}.ffn_gate_exps.weight")
            found = self._activate(up, None if gate is None else part @ gate[expert].T)
            neurons[tokens, place] = found
            y[tokens] += weights[tokens, place, None] * (found @ self._tensors[f"{blk}.ffn_down_exps.weight"][expert].T)
        return y, Routing(experts, weights, neurons)

    def shared(self, blk: str, x: Array) -> tuple[Array, Array]:
        """Output [n, n_embd] and neurons [n, n_ff] of the shared expert."""
        neurons = self._activate(self._linear(f"{blk}.ffn_up_shexp", x), None)
        return self._linear(f"{blk}.ffn_down_shexp", neurons), neurons

    def _mamba(self, blk: str, x: Array) -> Array:
        """A Mamba-2 layer, token by token."""
        n_state, n_conv, n_head, n_group, n_inner = (
            int(self._value(f"ssm.{key}"))
            for key in ("state_size", "conv_kernel", "time_step_rank", "group_count", "inner_size")
        )
        n_mixed = n_inner + 2 * n_group * n_state
        z, mixed, dt = np.split(self._linear(f"{blk}.ssm_in", x), [n_inner, n_inner + n_mixed], axis=-1)
        kernel, bias = self._tensors[f"{blk}.ssm_conv1d.weight"], self._tensors[f"{blk}.ssm_conv1d.bias"]
        padded = np.concatenate([np.zeros((n_conv - 1, n_mixed), self.dtype), mixed])
        mixed = sum((padded[j : j + len(x)] * kernel[:, j] for j in range(n_conv)), bias)
        mixed = mixed / (1 + np.exp(-mixed))
        inner, b, c = np.split(mixed, [n_inner, n_inner + n_group * n_state], axis=-1)
        inner = inner.reshape(len(x), n_head, -1)
        b, c = (np.repeat(m.reshape(len(x), n_group, n_state), n_head // n_group, axis=1) for m in (b, c))
        dt = np.log1p(np.exp(dt + self._tensors[f"{blk}.ssm_dt.bias"]))
        decay = np.exp(dt * self._tensors[f"{blk}.ssm_a"][:, 0])
        state: Array = np.zeros((n_head, inner.shape[2], n_state), self.dtype)
        y = np.empty_like(inner)
        for t in range(len(x)):
            state = decay[t][:, None, None] * state + (dt[t][:, None] * inner[t])[:, :, None] * b[t][:, None, :]
            y[t] = (state @ c[t][:, :, None])[:, :, 0]
        y = (y + self._tensors[f"{blk}.ssm_d"] * inner).reshape(len(x), n_inner)
        y = (z / (1 + np.exp(-z)) * y).reshape(len(x), n_group, -1)
        y = y / np.sqrt((y * y).mean(-1, keepdims=True) + self._eps) * self._tensors[f"{blk}.ssm_norm.weight"]
        return self._linear(f"{blk}.ssm_out", y.reshape(len(x), n_inner))

    def forward(self, tokens: Sequence[int] | NDArray[np.integer[Any]]) -> MixtureResult:
        """Logits, FFN inputs, neurons and routing of a sequence that starts at position 0."""
        h = self._tensors["token_embd.weight"][np.asarray(tokens, np.int64)]
        ffn_inputs, all_neurons, routing = [], [], []
        for layer in range(self.n_layer):
            blk = f"blk.{layer}"
            before, x = h, self._norm(f"{blk}.attn_norm", h)
            if self.has(f"{blk}.ssm_in"):
                h = h + self._mamba(blk, x)
            elif self.has(f"{blk}.attn_q"):
                h = h + self._attention(blk, x)
            if self.has(f"{blk}.ffn_norm"):
                x = self._norm(f"{blk}.ffn_norm", h)
            neurons, choice = None, None
            if self.has(f"{blk}.ffn_up_exps"):
                y, choice = self.mixture(blk, x, before if self.arch == "smallthinker" else x)
                if self.has(f"{blk}.ffn_up_shexp"):
                    more, neurons = self.shared(blk, x)
                    y = y + more
                h = h + y
            elif self.has(f"{blk}.ffn_up"):
                y, neurons = self.ffn(blk, x)
                h = h + y
            ffn_inputs.append(None if neurons is None and choice is None else x)
            all_neurons.append(neurons)
            routing.append(choice)
        head = self._tensors.get("output.weight", self._tensors["token_embd.weight"])
        return MixtureResult(self._norm("output_norm", h) @ head.T, ffn_inputs, all_neurons, routing)
