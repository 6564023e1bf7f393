"""Synthetic mixtures, Nemotron-H and RWKV: the planted activity and routing are measured, and libllama runs them."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support.graph_values import graph_values

from models import synth
from models.reference import MixtureReference
from models.synth import Mamba, Mixture, Rwkv, SynthOptions
from pinfer.llama.engine import Engine

ROOT = Path(__file__).resolve().parent.parent
SMALL = SynthOptions(n_ff=384, n_layer=5, n_vocab=4096, n_ctx=2048, n_threads=1)
MAMBA = Mamba(512, 8, n_state=32, n_group=2)
MODELS = {
    "nemotron_h_moe": replace(
        SMALL,
        arch="nemotron_h_moe",
        pattern="ME*EE",
        mixture=Mixture(16, 3, n_ff_shared=512, weights_scale=2.5),
        mamba=MAMBA,
    ),
    "nemotron_h": replace(SMALL, arch="nemotron_h", pattern="M-*--", mamba=MAMBA),
    "smallthinker": replace(SMALL, arch="smallthinker", mixture=Mixture(16, 3), active=0.4, hot_share=0.55, n_layer=3),
    "llama": replace(SMALL, activation="drelu", mixture=Mixture(16, 3), n_layer=3),
    "rwkv7": replace(SMALL, arch="rwkv7", rwkv=Rwkv(), active=0.12, n_layer=3),
}


def deviation(counts: NDArray[Any], p: NDArray[Any], n: NDArray[Any] | int) -> float:
    """Root mean square of the deviations of counts from n * p, in units of their sampling errors."""
    return float(np.sqrt(((counts - n * p) ** 2 / (n * p * (1 - p) + 0.05)).mean()))


@pytest.mark.parametrize("arch", [arch for arch in MODELS if arch != "rwkv7"])
def test_activity_and_routing_are_as_planted(arch: str, tmp_path: Path) -> None:
    options = MODELS[arch]
    path = tmp_path / "synth.gguf"
    synth.write_model(path, options)
    model = MixtureReference(path, dtype=np.float32)
    tokens = np.random.default_rng(3).integers(0, options.n_vocab, 800)
    results = [model.forward(part) for part in np.split(tokens, 8)]
    planted = iter(synth.planted_frequencies(path))
    routing, experts = synth.planted_routing(path), synth.planted_expert_frequencies(path)
    assert list(routing) == list(experts) == [n for n, kind in enumerate(options.kinds) if kind in "EB"]
    for layer in range(options.n_layer):
        if results[0].neurons[layer] is not None:
            fired = np.concatenate([result.neurons[layer] for result in results]) != 0
            p = next(planted)
            assert p.mean() == pytest.approx(options.active, rel=0.02)
            assert fired.mean() == pytest.approx(options.active, rel=0.05)
            assert deviation(fired.sum(0), p, len(tokens)) < 1.35
        if layer in routing:
            assert options.mixture is not None
            chosen = [result.routing[layer] for result in results]
            n_expert = options.mixture.n_expert
            counts = np.sum([c.counts(n_expert) for c in chosen if c is not None], axis=0)
            assert routing[layer].sum() == pytest.approx(options.mixture.n_expert_used)
            assert deviation(counts, routing[layer], len(tokens)) < 1.8
            fired_by = [np.sum([c.fired(e).sum(0) for c in chosen if c is not None], axis=0) for e in range(n_expert)]
            assert deviation(np.stack(fired_by), experts[layer], counts[:, None]) < 1.35
            assert np.sum(fired_by) / (counts.sum() * options.n_ff) == pytest.approx(options.active, rel=0.05)
    assert next(planted, None) is None


def test_activity_of_rwkv_is_as_planted(tmp_path: Path) -> None:
    options = MODELS["rwkv7"]
    path = tmp_path / "synth.gguf"
    synth.write_model(path, options)
    tokens = np.random.default_rng(3).integers(0, options.n_vocab, 800).tolist()
    layers = graph_values(path, tokens, lambda _, operation: operation == "RELU")
    planted = synth.planted_frequencies(path)
    assert len(layers) == len(planted) == options.n_layer
    for (_, values), p in zip(layers, planted, strict=True):
        fired = values.reshape(len(tokens), -1) != 0
        assert fired.mean() == pytest.approx(options.active, rel=0.05)
        # Neighbouring tokens share an input, so that there are fewer independent ones.
        assert deviation(fired.sum(0), p, len(tokens)) < 1.6


@pytest.mark.parametrize("kind", ["F32", "Q8_0", "Q5_0", "Q4_0", "Q4_K"])
@pytest.mark.parametrize("arch", MODELS)
def test_libllama_generates(arch: str, kind: str, tmp_path: Path) -> None:
    path = tmp_path / "synth.gguf"
    synth.write_model(path, replace(MODELS[arch], type=kind, n_layer=3, n_vocab=512))
    with Engine(path, n_ctx=64, n_threads=1) as engine:
        tokens = engine.tokenize("The quick brown fox")
        logits = engine.decode(tokens, logits=True)
        said: list[int] = []
        for _ in range(12):
            said.append(int(logits[-1].argmax()))
            logits = engine.decode(said[-1:], logits=True)
    assert np.isfinite(logits).all()
    assert len(set(said)) > 6, "it repeats itself"


def test_the_written_order_of_experts_differs_between_layers(tmp_path: Path) -> None:
    path = tmp_path / "synth.gguf"
    synth.write_model(path, MODELS["smallthinker"])
    first, second, third = synth.planted_routing(path).values()
    assert sorted(first) == sorted(second) == sorted(third)
    assert not np.array_equal(first, second)
    assert not np.array_equal(second, third)


def test_command_line_refuses_in_one_line(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "models" / "synth.py"), str(tmp_path / "never.gguf")]
    command += ["--arch", "nemotron_h_moe", "--n-expert", "8", "--pattern", "*E"]
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert refused.returncode == 1
    assert refused.stderr.count("\n") == 1


def test_a_few_layers_of_a_preset_have_every_kind() -> None:
    for name, n_layer, kinds in (
        ("nemotron-3-nano", 4, "MEM*"),
        ("nemotron-3-nano", 7, "MEMEM*E"),
        ("nemotron-3-nano", 52, synth.PRESETS["nemotron-3-nano"].pattern),
        ("nemotron-h-9b", 4, "M-M*"),
    ):
        options = replace(synth.PRESETS[name], n_layer=n_layer)
        options.check()
        assert options.kinds == kinds


def test_command_line_writes_a_mixture(tmp_path: Path) -> None:
    out = tmp_path / "synth.gguf"
    command = [sys.executable, str(ROOT / "models" / "synth.py"), str(out), "--arch", "nemotron_h_moe"]
    command += ["--n-expert", "8", "--pattern", "ME*E", "--n-layer", "4", "--type", "q8_0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert list(synth.planted_routing(out)) == [1, 3]
