"""Small random models of the four architectures that PowerInfer files have, with odd sizes."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

from pinfer.gguf_io.reader import TypedValue, read_gguf
from support.powerinfer_writer import Matrix, Weights, value

N_LAYER = 2
N_EMBD = 96
N_HEAD = 4
N_FF = 200  # no whole number of blocks
N_CONTEXT = 64
BPE_MODEL = Path(__file__).resolve().parents[2] / "models" / "tiny-reglu.gguf"


def _array(items: list[str] | list[int] | list[float], kind: gguf.GGUFValueType) -> TypedValue:
    return TypedValue(gguf.GGUFValueType.ARRAY, kind, items)


def _spm_keys() -> dict[str, TypedValue]:
    """A SentencePiece vocabulary: specials, bytes, letters and a few pairs of them."""
    kinds = gguf.GGUFValueType
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    words = ["▁", *letters, *(f"▁{letter}" for letter in letters), "he", "th", "▁the", "an", "in"]
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    types = [2, 3, 3, *[6] * 256, *[1] * len(words)]
    return {
        "tokenizer.ggml.model": value("llama"),
        "tokenizer.ggml.tokens": _array(tokens, kinds.STRING),
        "tokenizer.ggml.scores": _array([0.0] * 259 + [-float(i) for i in range(len(words))], kinds.FLOAT32),
        "tokenizer.ggml.token_type": _array(types, kinds.INT32),
        "tokenizer.ggml.bos_token_id": value(1),
        "tokenizer.ggml.eos_token_id": value(2),
    }


def _bpe_keys() -> dict[str, TypedValue]:
    """The vocabulary of a model in this repository as in files of 2023: without the pre-tokenizer's name."""
    file = read_gguf(BPE_MODEL)
    names = ("model", "tokens", "token_type", "merges", "bos_token_id", "eos_token_id")
    return {f"tokenizer.ggml.{name}": file.typed(f"tokenizer.ggml.{name}") for name in names}


def _keys(arch: str, tokenizer: dict[str, TypedValue], **more: str | float | bool) -> dict[str, TypedValue]:
    keys: dict[str, TypedValue] = {"general.name": value(f"small {arch}")}
    shape = {
        "context_length": N_CONTEXT,
        "embedding_length": N_EMBD,
        "block_count": N_LAYER,
        "feed_forward_length": N_FF,
        "attention.head_count": N_HEAD,
    }
    for key, item in (shape | {name.replace("__", "."): item for name, item in more.items()}).items():
        keys[f"{arch}.{key}"] = value(item)
    return keys | tokenizer


class _Random:
    """Matrices that keep the norm of their inputs."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)

    def matrix(self, n_rows: int, n: int) -> Matrix:
        return self._rng.normal(0, n**-0.5, (n_rows, n)).astype(np.float32)

    def norm(self) -> Matrix:
        return self._rng.uniform(0.5, 1.5, N_EMBD).astype(np.float32)

    def bias(self, n: int = N_EMBD) -> Matrix:
        return self._rng.normal(0, 0.1, n).astype(np.float32)


def _ffn(random: _Random, layer: int, *, gated: bool, n_ff: int) -> dict[str, Matrix]:
    parts = {"ffn_gate": (n_ff, N_EMBD), "ffn_up": (n_ff, N_EMBD), "ffn_down": (N_EMBD, n_ff)}
    return {
        f"blk.{layer}.{name}.weight": random.matrix(*shape)
        for name, shape in parts.items()
        if gated or name != "ffn_gate"
    }


def bamboo(seed: int = 0, n_ff: int = N_FF) -> Weights:
    """A llama graph under bamboo's name."""
    random = _Random(seed)
    tokenizer = _spm_keys()
    n_vocab = len(tokenizer["tokenizer.ggml.tokens"].value)
    tensors = {"token_embd.weight": random.matrix(n_vocab, N_EMBD) * 4}
    for i in range(N_LAYER):
        tensors |= _ffn(random, i, gated=True, n_ff=n_ff)
        for name, rows in (("q", N_EMBD), ("k", N_EMBD // 2), ("v", N_EMBD // 2), ("output", N_EMBD)):
            tensors[f"blk.{i}.attn_{name}.weight"] = random.matrix(rows, N_EMBD)
        tensors[f"blk.{i}.attn_norm.weight"], tensors[f"blk.{i}.ffn_norm.weight"] = random.norm(), random.norm()
    tensors |= {"output_norm.weight": random.norm(), "output.weight": random.matrix(n_vocab, N_EMBD)}
    more = {
        "attention__head_count_kv": N_HEAD // 2,
        "attention__layer_norm_rms_epsilon": 1e-5,
        "rope__dimension_count": N_EMBD // N_HEAD,
        "rope__freq_base": 10000.0,
        "feed_forward_length": n_ff,
    }
    return Weights("bamboo", _keys("bamboo", tokenizer, **more), tensors)


def falcon(seed: int = 0, n_ff: int = N_FF, two_norms: bool = False) -> Weights:
    """Parallel attention and FFN; the larger models have two norms."""
    random = _Random(seed)
    tokenizer = _bpe_keys()
    n_vocab = len(tokenizer["tokenizer.ggml.tokens"].value)
    head = N_EMBD // N_HEAD
    n_kv = 2 if two_norms else 1
    tensors = {"token_embd.weight": random.matrix(n_vocab, N_EMBD) * 4}
    for i in range(N_LAYER):
        tensors |= _ffn(random, i, gated=False, n_ff=n_ff)
        tensors[f"blk.{i}.attn_qkv.weight"] = random.matrix(N_EMBD + 2 * n_kv * head, N_EMBD)
        tensors[f"blk.{i}.attn_output.weight"] = random.matrix(N_EMBD, N_EMBD)
        for name in ("attn_norm", "attn_norm_2") if two_norms else ("attn_norm",):
            tensors[f"blk.{i}.{name}.weight"], tensors[f"blk.{i}.{name}.bias"] = random.norm(), random.bias()
    tensors |= {"output_norm.weight": random.norm(), "output_norm.bias": random.bias()}
    tensors["output.weight"] = random.matrix(n_vocab, N_EMBD)
    more: dict[str, str | int | float] = {
        "tensor_data_layout": "jploski",
        "attention__head_count_kv": n_kv,
        "attention__layer_norm_epsilon": 1e-5,
        "feed_forward_length": n_ff,
    }
    return Weights("falcon", _keys("falcon", tokenizer, **more), tensors)


def opt(seed: int = 0, n_ff: int = N_FF, biases: bool = True) -> Weights:
    """As in OPT's checkpoints: separate query, key and value, two unused position rows, tied output."""
    random = _Random(seed)
    tokenizer = _bpe_keys()
    n_vocab = len(tokenizer["tokenizer.ggml.tokens"].value)
    tensors = {
        "token_embd.weight": random.matrix(n_vocab, N_EMBD) * 4,
        "position_embd.weight": random.matrix(N_CONTEXT + 2, N_EMBD) * 4,
    }
    for i in range(N_LAYER):
        tensors |= _ffn(random, i, gated=False, n_ff=n_ff)
        for part in ("q", "k", "v", "output"):
            tensors[f"blk.{i}.attn_{part}.weight"] = random.matrix(N_EMBD, N_EMBD)
            tensors[f"blk.{i}.attn_{part}.bias"] = random.bias()
        tensors[f"blk.{i}.ffn_up.bias"], tensors[f"blk.{i}.ffn_down.bias"] = random.bias(n_ff), random.bias()
        for name in ("attn_norm", "ffn_norm"):
            tensors[f"blk.{i}.{name}.weight"], tensors[f"blk.{i}.{name}.bias"] = random.norm(), random.bias()
    tensors |= {"output_norm.weight": random.norm(), "output_norm.bias": random.bias()}
    if not biases:
        tensors = {name: values for name, values in tensors.items() if not name.endswith(".bias")}
    return Weights("opt", _keys("opt", tokenizer, feed_forward_length=n_ff), tensors)


def as_gpt2(weights: Weights) -> Weights:
    """OPT in libllama's gpt2 graph, assembled here from its parts."""
    tensors = {}
    for name, values in weights.tensors.items():
        if "attn_q." in name:
            kind = name.rpartition(".")[2]
            parts = [weights.tensors[name.replace("attn_q", f"attn_{part}")] for part in "qkv"]
            tensors[name.replace("attn_q", "attn_qkv")] = np.concatenate(parts)
            assert kind in ("weight", "bias")
        elif not any(f"attn_{part}." in name for part in "kv"):
            tensors[name] = values[2:] if name == "position_embd.weight" else values
    for i in range(N_LAYER):
        for name, n in (
            ("attn_norm", N_EMBD),
            ("attn_qkv", 3 * N_EMBD),
            ("attn_output", N_EMBD),
            ("ffn_norm", N_EMBD),
            ("ffn_up", weights.tensors[f"blk.{i}.ffn_up.weight"].shape[0]),
            ("ffn_down", N_EMBD),
        ):
            tensors.setdefault(f"blk.{i}.{name}.bias", np.zeros(n, np.float32))
    tensors.setdefault("output_norm.bias", np.zeros(N_EMBD, np.float32))
    keys = {key.replace("opt.", "gpt2."): item for key, item in weights.keys.items()}
    more = {"gpt2.attention.layer_norm_epsilon": value(1e-5), "tokenizer.ggml.pre": value("gpt-2")}
    return Weights("gpt2", keys | more, tensors)


def as_llama(weights: Weights) -> Weights:
    """Bamboo in libllama's llama graph."""
    keys = {key.replace("bamboo.", "llama."): item for key, item in weights.keys.items()}
    return Weights("llama", keys, weights.tensors)
