"""The FFN graphs that libllama builds for each architecture are recognised and computed with the model's activation.

Where stock libllama computes another function, the reference is the numpy forward pass of models/reference.py.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from support.random_model import N_FF, N_VOCAB, RandomModel, write_random_model
from support.runs import run
from support.shards import nmse, write_shards

from models.reference import Reference
from pinfer.errors import PinferError
from pinfer.llama.engine import Engine, PluginConfig
from pinfer.llama.plugin import load_plugin
from pinfer.model import open_model

TOKENS = np.random.default_rng(0).integers(1, N_VOCAB, 100).tolist()
# Everything is in F32, the KV cache too.
TOLERANCE = 1e-8

# Architectures whose activation stock libllama applies itself ...
NATIVE = [
    RandomModel("arcee"),
    RandomModel("arcee", tied=False),
    RandomModel("nemotron"),
    RandomModel("nemotron", biases=True),
    RandomModel("plm"),
    RandomModel("jais2"),
    RandomModel("jais2", n_head_kv=4, tied=False),
]
# ... and those whose activation is stated in the file.
NAMED = [
    RandomModel("gpt2", "relu"),
    RandomModel("gpt2", "relu2", tied=False),
    RandomModel("falcon", "relu", n_head_kv=1),
    RandomModel("falcon", "relu", n_head_kv=2, two_norms=True, tied=False),
    RandomModel("llama", "reglu", n_head_kv=4),
    RandomModel("llama", "drelu", biases=True, tied=False),
    RandomModel("minicpm", "reglu"),
    RandomModel("minicpm", "drelu", biases=True),
]


def _describe(options: RandomModel) -> str:
    flags = [name for name in ("biases", "two_norms", "tied") if getattr(options, name)]
    named = "" if options.threshold is None else f"above {options.threshold:g}"
    return "-".join([options.arch, *filter(None, [options.activation, named]), f"kv{options.n_head_kv}", *flags])


def _expected(path: Path, options: RandomModel) -> NDArray[np.float64]:
    """Logits of all TOKENS."""
    if options in NATIVE:
        with Engine(path, n_ctx=128, n_threads=1, f32_attention=True) as engine:
            return engine.decode(TOKENS, logits=True).astype(np.float64)
    if options.arch == "minicpm":  # its scales are 1
        path = write_random_model(path.with_name("llama.gguf"), replace(options, arch="llama"))
    return np.asarray(Reference(path).forward(TOKENS).logits, np.float64)


def _decoded(path: Path, config: PluginConfig, n_layer: int) -> tuple[NDArray[np.float32], ...]:
    """Logits token by token, in batches of 7, and in one batch. The plugin has to compute every FFN."""
    plugin = load_plugin()
    found = []
    with Engine(path, plugin=config, n_ctx=128, n_threads=2, f32_attention=True) as engine:
        for n_batch, n_tokens in ((1, 20), (7, 42), (100, 100)):
            engine.clear()
            plugin.reset_stats()
            pieces = [TOKENS[i : i + n_batch] for i in range(0, n_tokens, n_batch)]
            found.append(np.concatenate([engine.decode(piece, logits=True) for piece in pieces]))
            stats = plugin.stats()
            assert stats.n_fallback == 0, f"{stats.n_fallback} nodes were not recognised"
            assert stats.n_tokens + stats.n_tokens_dense == n_layer * n_tokens
            assert (stats.n_hot > 0) == (config.hot is not None and n_batch < 64), "prompts are computed on the CPU"
    return tuple(found)


@pytest.mark.parametrize("options", [*NATIVE, *NAMED], ids=_describe)
def test_every_ffn_is_computed_by_the_plugin(options: RandomModel, tmp_path: Path) -> None:
    path = write_random_model(tmp_path / "model.gguf", options)
    expected = _expected(path, options)
    model = open_model(path)
    assert model.activation == (options.activation or "relu2")
    configurations = {"no shards": PluginConfig.of(model)}
    for share in (0.0, 0.5):
        shards = write_shards(path, share)
        configurations[f"hot {share:.0%}"] = replace(
            PluginConfig.of(model), cold=shards.cold, hot=shards.hot if share else None, device="CPU"
        )
        for label, config in configurations.items():
            for logits in _decoded(path, config, options.n_layer):
                error = nmse(logits, expected[: len(logits)])
                assert error <= TOLERANCE, f"{label}, {len(logits)} tokens: NMSE {error:.2g}"
        configurations.clear()


def test_a_rule_makes_a_difference(tmp_path: Path) -> None:
    """Stock libllama, or another activation, gives very different logits; else the tests above would prove nothing."""
    options = RandomModel("llama", "reglu")
    path = write_random_model(tmp_path / "model.gguf", options)
    expected = _expected(path, options)
    for config in (None, PluginConfig("drelu"), PluginConfig("reglu", 0.5)):
        with Engine(path, plugin=config, n_ctx=128, n_threads=1, f32_attention=True) as engine:
            assert nmse(engine.decode(TOKENS, logits=True), expected) > 1e4 * TOLERANCE


def test_neurons_are_counted(tmp_path: Path) -> None:
    options = RandomModel("llama", "reglu")
    path = write_random_model(tmp_path / "model.gguf", options)
    plugin = load_plugin()
    with Engine(path, plugin=PluginConfig.of(open_model(path)), n_ctx=128, n_threads=1) as engine:
        engine.decode(TOKENS[:5], logits=True)
        stats = plugin.stats()
    fired = [Reference(path).forward(TOKENS[:5]).fired(layer) for layer in range(options.n_layer)]
    assert stats.n_neurons == stats.n_candidates == 5 * N_FF * options.n_layer
    assert abs(stats.n_active - int(np.sum(fired))) <= 2


def test_plm_is_run_without_flash_attention(tmp_path: Path) -> None:
    """With flash attention, which libllama chooses by default, its graph of PLM would abort."""
    path = write_random_model(tmp_path / "model.gguf", RandomModel("plm"))
    words = ("-p", "abcd", "-n", 4, "--temp", 0, "--ignore-eos")
    assert run(path, *words).code == 0
    assert run(path, *words, dense=True).code == 0
    assert run(path, *words, "-fa", "off").code == 0
    for choice in ("on", "auto"):
        with pytest.raises(PinferError, match="no flash attention for plm models; leave out -fa"):
            run(path, *words, "-fa", choice)
