"""The originals of the tiny checkpoints: transformers' own models, and what lives as remote code from its definition.

Each function takes what config.json holds and returns transformers' class, the config it is built from, and a function
that makes a loaded model the original where transformers' class alone is not it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

__all__ = ["ORIGINALS", "Original", "load_original"]


@dataclass(frozen=True)
class Original:
    """How to build, load and run one family."""

    model_class: Any
    config: Any
    finish: Callable[[Any], None] = lambda model: None
    """changes a model in place into the original"""


def _auto(config: Mapping[str, Any]) -> Original:
    settings = transformers.AutoConfig.for_model(**config)
    return Original(getattr(transformers, config["architectures"][0]), settings)


def _known(config: Mapping[str, Any], **known: Any) -> dict[str, Any]:
    """The config as a class of transformers takes it that does not know the remote code's keys."""
    remote = ("architectures", "auto_map", "model_type", "hidden_act_param", "transformers_version", "torch_dtype")
    return {key: config[key] for key in config if key not in remote} | known


def fatrelu(threshold: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """FATReLU (ProSparse, arXiv 2402.13516, section 3.3): x where x > threshold, else 0."""
    return lambda x: torch.where(x > threshold, x, torch.zeros_like(x))


def _gated(model: Any, gate: Callable[[Any], Any], up: Callable[[Any], Any] = lambda x: x) -> None:
    """Makes every FFN of a LLaMA or Mistral down(gate(W_gate x) * up(W_up x))."""

    def forward_of(mlp: Any) -> Callable[[Any], Any]:
        return lambda x: mlp.down_proj(gate(mlp.gate_proj(x)) * up(mlp.up_proj(x)))

    for layer in model.model.layers:
        layer.mlp.forward = forward_of(layer.mlp)


def _fatrelu_llama(config: Mapping[str, Any]) -> Original:
    """ProSparse's SparseLlamaForCausalLM: LLaMA with FATReLU on the gate."""
    settings = transformers.LlamaConfig(**_known(config, hidden_act="relu"))
    threshold = config["hidden_act_param"]
    return Original(transformers.LlamaForCausalLM, settings, lambda model: _gated(model, fatrelu(threshold)))


ORIGINALS: dict[str, Callable[[Mapping[str, Any]], Original]] = {"auto": _auto, "fatrelu_llama": _fatrelu_llama}


def load_original(folder: Path, config: Mapping[str, Any], original: str) -> Any:
    """The original with the folder's weights, in float32."""
    made = ORIGINALS[original](config)
    model, report = made.model_class.from_pretrained(
        folder,
        config=made.config,
        dtype=torch.float32,
        attn_implementation="eager",
        output_loading_info=True,
    )
    left = {kind: names for kind, names in report.items() if names}
    if left:
        raise RuntimeError(f"{folder.name}: not every weight was loaded: {left}")
    made.finish(model)
    return model.eval()
