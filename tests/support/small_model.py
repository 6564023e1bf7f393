"""Random models of any shape and type, for tests of the stages that never run one: a header, FFNs and little else."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

from pinfer.artefacts.profile import ProfileFile
from pinfer.gguf_io.reader import type_size
from pinfer.llama import ggml
from pinfer.model import Model

GATED = ("reglu", "drelu")


@dataclass(frozen=True)
class Shape:
    """What is written; the weights follow from the seed."""

    activation: str = "reglu"
    type: str = "F16"
    n_layer: int = 2
    n_embd: int = 256
    n_ff: int = 256
    biases: bool = False
    seed: int = 0
    n_vocab: int = 32
    arch: str = "llama"


def _rows(rng: np.random.Generator, n_rows: int, n: int, kind: gguf.GGMLQuantizationType) -> NDArray[np.uint8]:
    block, size = type_size(kind)
    return ggml.quantise(rng.normal(0, 0.05, (n_rows, n)).astype(np.float32), kind, n // block * size)


def write_small_model(path: Path, shape: Shape) -> Path:
    """Writes the model and returns its path."""
    rng = np.random.default_rng(shape.seed)
    kind = gguf.GGMLQuantizationType[shape.type]
    out = gguf.GGUFWriter(path, shape.arch)
    out.add_block_count(shape.n_layer)
    out.add_embedding_length(shape.n_embd)
    out.add_feed_forward_length(shape.n_ff)
    out.add_head_count(4)
    out.add_head_count_kv(2)
    out.add_context_length(512)
    out.add_string("pinfer.ffn.activation", shape.activation)

    def matrix(name: str, n_rows: int, n: int, of: gguf.GGMLQuantizationType = kind) -> None:
        out.add_tensor(name, _rows(rng, n_rows, n, of), raw_dtype=of)

    matrix("token_embd.weight", shape.n_vocab, shape.n_embd, gguf.GGMLQuantizationType.F16)
    out.add_tensor("output_norm.weight", np.ones(shape.n_embd, np.float32))
    for i in range(shape.n_layer):
        out.add_tensor(f"blk.{i}.attn_norm.weight", np.ones(shape.n_embd, np.float32))
        matrix(f"blk.{i}.attn_q.weight", shape.n_embd, shape.n_embd, gguf.GGMLQuantizationType.F16)
        if shape.activation in GATED:
            matrix(f"blk.{i}.ffn_gate.weight", shape.n_ff, shape.n_embd)
        matrix(f"blk.{i}.ffn_up.weight", shape.n_ff, shape.n_embd)
        matrix(f"blk.{i}.ffn_down.weight", shape.n_embd, shape.n_ff)
        if shape.biases:
            for part in ("gate", "up") if shape.activation in GATED else ("up",):
                out.add_tensor(f"blk.{i}.ffn_{part}.bias", rng.normal(size=shape.n_ff).astype(np.float32))
            out.add_tensor(f"blk.{i}.ffn_down.bias", rng.normal(size=shape.n_embd).astype(np.float32))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path


def write_profile(path: Path, model: Model, seed: int = 0, tokens: int = 4096) -> ProfileFile:
    """A profile with power-law counts, as ``pinfer profile`` would have written it."""
    rng = np.random.default_rng(seed)
    count = tuple(np.minimum(tokens, rng.pareto(1.2, f.n_ff) * 0.05 * tokens).astype(np.int64) for f in model.ffns)
    mass = tuple(c.astype(np.float64) for c in count)
    profile = ProfileFile(tokens, "synthetic", "0" * 64, count, mass, (None,) * len(count))
    path.parent.mkdir(parents=True, exist_ok=True)
    with profile.writer(path, model, {}):
        pass
    return profile
