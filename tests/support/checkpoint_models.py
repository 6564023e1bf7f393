"""The originals of the tiny checkpoints: models of transformers, and families with remote code by their definition.

Each function takes what config.json holds and returns transformers' class, the config it is built from, and a function
that makes a loaded model the original where transformers' class alone is not it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

__all__ = ["Original", "load_original", "original_of"]


@dataclass(frozen=True)
class Original:
    """How to build, load and run one family."""

    model_class: Any
    config: Any
    finish: Callable[[Any], None] = lambda model: None
    """changes a model in place into the original"""

    def new(self) -> Any:
        """A model without the folder's weights."""
        model = self.model_class(self.config)
        self.finish(model)
        return model


def _auto(config: Mapping[str, Any]) -> Original:
    settings = transformers.AutoConfig.for_model(**config)
    return Original(getattr(transformers, config["architectures"][0]), settings)


def _known(config: Mapping[str, Any], **known: Any) -> dict[str, Any]:
    """The config for a class of transformers that does not know the remote code's keys."""
    ours = {"architectures", "auto_map", "model_type", "transformers_version", "torch_dtype"}
    remote = {"hidden_act_param", "scale_emb", "scale_depth", "dim_model_base"}
    return {key: config[key] for key in config if key not in ours | remote} | known


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


def _bamboo(config: Mapping[str, Any]) -> Original:
    """Bamboo and TurboSparse-Mistral (arXiv 2406.05955, section 4): Mistral with dReLU, a ReLU on both factors."""
    settings = transformers.MistralConfig(**_known(config))
    return Original(transformers.MistralForCausalLM, settings, lambda model: _gated(model, torch.relu, torch.relu))


def _minicpm(config: Mapping[str, Any]) -> Original:
    """MiniCPM (arXiv 2404.06395, table 7): LLaMA whose embeddings, residual branches and logits are scaled."""
    branch = config["scale_depth"] / config["num_hidden_layers"] ** 0.5
    width = config["hidden_size"] / config["dim_model_base"]

    def finish(model: Any) -> None:
        is_fat = config["hidden_act"] == "fatrelu"
        _gated(model, fatrelu(config["hidden_act_param"]) if is_fat else torch.relu)
        model.model.embed_tokens.register_forward_hook(lambda _module, _in, made: made * config["scale_emb"])
        model.model.norm.register_forward_hook(lambda _module, _in, made: made / width)
        for layer in model.model.layers:
            layer.self_attn.register_forward_hook(lambda _module, _in, made: (made[0] * branch, *made[1:]))
            layer.mlp.register_forward_hook(lambda _module, _in, made: made * branch)

    known = {"hidden_act": "relu", "tie_word_embeddings": config.get("tie_word_embeddings", True)}
    return Original(transformers.LlamaForCausalLM, transformers.LlamaConfig(**_known(config, **known)), finish)


def _plm(config: Mapping[str, Any]) -> Original:
    """PLM (arXiv 2503.12167, section 2): DeepSeek-V2's attention, and an FFN of down(relu(up x)²) without a gate."""

    def ungated(mlp: Any) -> Callable[[Any], Any]:
        return lambda x: mlp.down_proj(torch.relu(mlp.up_proj(x)) ** 2)

    def finish(model: Any) -> None:
        for layer in model.model.layers:
            del layer.mlp.gate_proj
            layer.mlp.forward = ungated(layer.mlp)

    known = {"hidden_act": "relu", "first_k_dense_replace": config["num_hidden_layers"]}
    settings = transformers.DeepseekV2Config(**_known(config, **known))
    return Original(transformers.DeepseekV2ForCausalLM, settings, finish)


def _turbosparse_mixtral(config: Mapping[str, Any]) -> Original:
    """TurboSparse-Mixtral (arXiv 2406.05955, section 4): Mixtral whose experts have dReLU."""

    def drelu_of(experts: Any) -> Callable[[Any, Any, Any], Any]:
        def forward(x: torch.Tensor, chosen: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
            y = torch.zeros_like(x)
            for token, place in torch.cartesian_prod(torch.arange(x.shape[0]), torch.arange(chosen.shape[1])):
                expert = chosen[token, place]
                gate, up = (experts.gate_up_proj[expert] @ x[token]).chunk(2)
                neurons = torch.relu(gate) * torch.relu(up)
                y[token] += weights[token, place] * (experts.down_proj[expert] @ neurons)
            return y

        return forward

    def finish(model: Any) -> None:
        for layer in model.model.layers:
            layer.mlp.experts.forward = drelu_of(layer.mlp.experts)

    settings = transformers.MixtralConfig(**_known(config))
    return Original(transformers.MixtralForCausalLM, settings, finish)


ORIGINALS: dict[str, Callable[[Mapping[str, Any]], Original]] = {
    "auto": _auto,
    "bamboo": _bamboo,
    "fatrelu_llama": _fatrelu_llama,
    "minicpm": _minicpm,
    "plm": _plm,
    "turbosparse_mixtral": _turbosparse_mixtral,
}


def original_of(config: Mapping[str, Any], original: str) -> Original:
    """The original of a config.json."""
    # transformers' configs write into the dicts they are given.
    return ORIGINALS[original](copy.deepcopy(dict(config)))


def load_original(folder: Path, config: Mapping[str, Any], original: str) -> Any:
    """The original with the folder's weights, in float32."""
    made = original_of(config, original)
    model, report = made.model_class.from_pretrained(
        folder,
        config=made.config,
        dtype=torch.float32,
        attn_implementation="eager",
        output_loading_info=True,
    )
    made.finish(model)
    parts = {name for name, _ in model.named_parameters()}
    missing = [name for name in report["missing_keys"] if name in parts]
    if missing or report["unexpected_keys"] or report["mismatched_keys"]:
        raise RuntimeError(f"{folder.name}: not every weight was loaded: {missing} of {report}")
    return model.eval()
