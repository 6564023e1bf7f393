"""A random BitNet model of one layer: attention and FFN with a norm before their last product, planted activity."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray

from models.synth import vocabulary
from pinfer.gguf_io.reader import type_size
from pinfer.llama import ggml
from pinfer.model import ACTIVATION_KEY

N_EMBD, N_FF, N_HEAD, N_VOCAB = 256, 512, 4, 320


def write_bitnet(path: Path, kind: str = "F32", seed: int = 0) -> Path:
    """Writes the model and returns its path. ``kind`` is the type of the FFN, for example ``TQ2_0``."""
    rng = np.random.default_rng(seed)
    out = gguf.GGUFWriter(path, "bitnet")
    out.add_block_count(1)
    out.add_context_length(256)
    out.add_embedding_length(N_EMBD)
    out.add_feed_forward_length(N_FF)
    out.add_head_count(N_HEAD)
    out.add_head_count_kv(N_HEAD)
    out.add_layer_norm_rms_eps(1e-5)
    out.add_rope_dimension_count(N_EMBD // N_HEAD)
    out.add_string(ACTIVATION_KEY, "reglu2")
    tokens, types, merges = vocabulary(N_VOCAB)
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre("gpt-2")
    out.add_token_list(tokens)
    out.add_token_types(types)
    out.add_token_merges(merges)
    out.add_eos_token_id(0)

    def add(name: str, values: NDArray[np.float64], type_name: str = "F32") -> None:
        data = np.ascontiguousarray(values, np.float32)
        if type_name == "F32":
            out.add_tensor(name, data)
            return
        number = gguf.GGMLQuantizationType[type_name]
        block, size = type_size(number)
        rows = ggml.quantise(data, number, data.shape[-1] // block * size)
        out.add_tensor(name, rows, raw_dtype=number)

    def matrix(rows: int, columns: int) -> NDArray[np.float64]:
        values: NDArray[np.float64] = rng.normal(size=(rows, columns)) / np.sqrt(columns)
        return values

    common = rng.normal(size=N_EMBD) / np.sqrt(N_EMBD)  # what all inputs share, and gates lean against
    add("token_embd.weight", rng.normal(size=(N_VOCAB, N_EMBD)) + 16 * common)
    add("output_norm.weight", np.ones(N_EMBD))
    for name in ("attn_norm", "attn_sub_norm", "ffn_norm"):
        add(f"blk.0.{name}.weight", rng.normal(1, 0.1, N_EMBD))
    add("blk.0.ffn_sub_norm.weight", rng.normal(1, 0.1, N_FF))
    for name in ("q", "k", "v", "output"):
        add(f"blk.0.attn_{name}.weight", matrix(N_EMBD, N_EMBD))
    add("blk.0.ffn_gate.weight", matrix(N_FF, N_EMBD) - 0.08 * common, kind)
    add("blk.0.ffn_up.weight", matrix(N_FF, N_EMBD), kind)
    add("blk.0.ffn_down.weight", 4 * matrix(N_EMBD, N_FF), kind)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path
