"""The random models of support/sparse_models.py: stock libllama runs them, and most of their neurons stay silent."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.graph_values import graph_values
from support.sparse_models import ARCHITECTURES, MIXTURES, N_VOCAB, TYPES, SparseModel, write_sparse_model

from models.reference import MixtureReference
from pinfer.llama.engine import Engine

TOKENS = np.random.default_rng(0).integers(1, N_VOCAB, 64).tolist()
EVERY = [SparseModel(arch, kind) for arch in ARCHITECTURES for kind in TYPES]
EVERY += [
    SparseModel(arch, kind, n_embd=256, n_ff=256, n_ff_shared=256) for arch in MIXTURES for kind in ("Q4_K", "Q6_K")
]
EVERY += [SparseModel("llama", kind, activation=name) for name in ("reglu", "drelu") for kind in ("F32", "Q8_0")]


def describe(options: SparseModel) -> str:
    return "-".join(filter(None, [options.arch, options.activation, options.type]))


@pytest.mark.parametrize("options", EVERY, ids=describe)
def test_stock_libllama_runs_them_and_repeats_itself(options: SparseModel, tmp_path: Path) -> None:
    path = write_sparse_model(tmp_path / "model.gguf", options)
    again = write_sparse_model(tmp_path / "again.gguf", options)
    assert path.read_bytes() == again.read_bytes()
    assert 100e3 < path.stat().st_size < 5e6
    runs = []
    for _ in range(2):
        with Engine(path, n_ctx=128, n_threads=1, f32_attention=True) as engine:
            runs.append(engine.decode(TOKENS, logits=True))
            engine.clear()
            single = np.concatenate([engine.decode([token], logits=True) for token in TOKENS])
    assert np.isfinite(runs[0]).all()
    assert np.array_equal(runs[0], runs[1])
    assert len({int(token) for token in runs[0].argmax(axis=1)}) > 10, "the logits must depend on the input"
    if options.type in ("F32", "F16"):  # other types round the input of every product, which may turn a router's choice
        error = ((single - runs[0]) ** 2).sum() / (runs[0] ** 2).sum()
        assert error < (1e-8 if options.type == "F32" else 1e-3)


@pytest.mark.parametrize("arch", [arch for arch in ARCHITECTURES if not arch.startswith("rwkv")])
def test_the_reference_agrees_with_libllama(arch: str, tmp_path: Path) -> None:
    path = write_sparse_model(tmp_path / "model.gguf", SparseModel(arch))
    expected = MixtureReference(path, activation="swiglu" if arch == "llama" else None).forward(TOKENS)
    with Engine(path, n_ctx=128, n_threads=1, f32_attention=True) as engine:
        logits = engine.decode(TOKENS, logits=True)
    assert ((logits - expected.logits) ** 2).sum() / (expected.logits**2).sum() < 1e-9


@pytest.mark.parametrize("options", [o for o in EVERY if o.type == "F32"], ids=describe)
def test_most_neurons_stay_silent_in_every_layer(options: SparseModel, tmp_path: Path) -> None:
    path = write_sparse_model(tmp_path / "model.gguf", options)
    if options.arch == "llama":  # its graph computes SiLU: what the activations would be follows from the products
        values = graph_values(path, TOKENS, lambda name, _: name.startswith(("ffn_moe_gate-", "ffn_moe_up-")))
        ups = [v for name, v in values if "up" in name]
        gates = [v for name, v in values if "gate" in name]
        both = options.activation == "drelu"
        fired = [(gate > 0) & ((up > 0) | (not both)) for gate, up in zip(gates, ups, strict=True)]
    else:
        fired = [v != 0 for _, v in graph_values(path, TOKENS, lambda _, operation: operation in ("RELU", "REGLU"))]
    n_mixture = sum(kind in "EB" for kind in options.layers)
    n_dense = options.layers.count("-")
    assert len(fired) == n_mixture * (2 if options.arch == "nemotron_h_moe" else 1) + n_dense
    shares = [float(f.mean()) for f in fired]
    assert min(shares) > 0.05, shares
    assert max(shares) < 0.3, shares


@pytest.mark.parametrize("arch", MIXTURES)
def test_routers_choose_several_experts(arch: str, tmp_path: Path) -> None:
    """Not the same few for every token, and not every expert equally often."""
    options = SparseModel(arch)
    path = write_sparse_model(tmp_path / "model.gguf", options)
    layers = graph_values(path, TOKENS, lambda name, _: name.startswith("ffn_moe_argsort"))
    assert len(layers) == sum(kind in "EB" for kind in options.layers)
    for name, values in layers:
        chosen = values.view(np.int32).reshape(len(TOKENS), options.n_expert)[:, : options.n_expert_used]
        counts = np.bincount(chosen.ravel(), minlength=options.n_expert)
        assert (counts > 0).sum() >= 6, f"{name}: {counts}"
        assert counts.max() > 1.5 * counts.mean(), f"{name}: {counts}"
