"""LoRA adapters."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np

from pinfer.model import open_model


def write_adapter(path: Path, model: Path, parts: tuple[str, ...]) -> Path:
    """A LoRA of rank 4 for the given FFN matrices (``up``, ``down_exps``, …) of every layer, strong enough to change
    the words.
    """
    opened = open_model(model)
    rng = np.random.default_rng(3)
    out = gguf.GGUFWriter(path, opened.arch)
    out.add_string("general.type", "adapter")
    out.add_string("adapter.type", "lora")
    out.add_float32("adapter.lora.alpha", 4.0)
    for tensor in opened.tensors:
        if tensor.name.endswith(tuple(f".ffn_{part}.weight" for part in parts)):
            scale = 0.2 if "down" in tensor.name else 0.13
            n_in, n_out, *n_experts = tensor.shape
            for end, shape in (("a", (*n_experts, 4, n_in)), ("b", (*n_experts, n_out, 4))):
                out.add_tensor(f"{tensor.name}.lora_{end}", rng.normal(0, scale, shape).astype(np.float32))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path
