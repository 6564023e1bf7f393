"""BitNet: a gated ReLU² with a norm between the activation and the down product."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from support.bitnet import N_EMBD, N_FF, N_VOCAB, write_bitnet
from support.graph_values import graph_values

from pinfer.errors import PinferError
from pinfer.execution import ExecutionOptions, decide
from pinfer.llama.engine import Engine, PluginConfig
from pinfer.llama.plugin import load_plugin
from pinfer.model import dequantize, open_model
from pinfer.profile import ProfileOptions, profile
from pinfer.solve import SolveOptions, solve
from pinfer.split import SplitOptions, split
from pinfer.train import TrainOptions, train

TOKENS = np.random.default_rng(0).integers(1, N_VOCAB, 80).tolist()
BATCHES = (80, 5, 1)


def expected(path: Path) -> tuple[NDArray[np.float64], float]:
    """Logits of every token, from the FFN inputs that stock libllama computes, and the share of active neurons."""
    model = open_model(path)
    found = dict(graph_values(path, TOKENS, lambda name, _: name in ("ffn_norm-0", "ffn_inp-0")))
    x, stream = (found[name].reshape(-1, N_EMBD).astype(np.float64) for name in ("ffn_norm-0", "ffn_inp-0"))
    ffn = model.ffns[0]
    assert ffn.gate is not None
    assert ffn.norm is not None
    gate, up, down = (dequantize(model, t).astype(np.float64) for t in (ffn.gate, ffn.up, ffn.down))
    h = np.maximum(x @ gate.T, 0) ** 2 * (x @ up.T)
    normed = h / np.sqrt((h * h).mean(axis=1, keepdims=True) + 1e-5) * model.gguf.array(ffn.norm)
    stream = stream + normed @ down.T
    stream /= np.sqrt((stream * stream).mean(axis=1, keepdims=True) + 1e-5)
    return stream @ dequantize(model, model.gguf.tensors["token_embd.weight"]).astype(np.float64).T, float(
        (h != 0).mean()
    )


def logits(path: Path, plugin: PluginConfig | None, n_batch: int) -> NDArray[np.float32]:
    with Engine(path, plugin=plugin, n_ctx=128, n_threads=2, f32_attention=True) as engine:
        pieces = [TOKENS[i : i + n_batch] for i in range(0, len(TOKENS), n_batch)]
        found = np.concatenate([engine.decode(piece, logits=True) for piece in pieces])
        if plugin:
            stats = load_plugin().stats(path)
            assert stats.n_fallback == 0
            assert stats.n_tokens + stats.n_tokens_dense == len(TOKENS)
            assert not plugin.predictor or stats.n_candidates < stats.n_neurons
        return found


def error(found: NDArray[np.float32], wanted: NDArray[np.float64]) -> float:
    return float(((found - wanted) ** 2).sum() / (wanted**2).sum())


@pytest.mark.parametrize(("kind", "bound"), [("F32", 1e-9), ("F16", 1e-5), ("Q8_0", 1e-3), ("TQ2_0", 1e-3)])
def test_every_mode_computes_what_the_model_means(kind: str, bound: float, tmp_path: Path) -> None:
    path = write_bitnet(tmp_path / "model.gguf", kind)
    model = open_model(path)
    assert (model.activation, model.is_sparse, model.stock_computes_it) == ("reglu2", True, False)
    wanted, active = expected(path)
    assert 0.05 < active < 0.4
    stock = error(logits(path, None, BATCHES[0]), wanted)
    assert stock > 10 * bound, "stock libllama computes SiLU"

    text = tmp_path / "text.txt"
    text.write_text("a word and another word, then a third one\n" * 200)
    for n_batch in BATCHES:
        assert error(logits(path, PluginConfig.of(model), n_batch), wanted) < bound
    profile(path, ProfileOptions(dataset=str(text), n_tokens=4000, n_ctx=128, force=True))
    report = solve(path, SolveOptions(vram=1 << 30, device="CPU", n_ctx=128))
    assert report.n_hot == (0,), "a norm over all neurons needs them in one place"
    split(path, SplitOptions(verify=True))
    exact = decide(model, ExecutionOptions(exact=True)).plugin
    for n_batch in BATCHES:
        assert error(logits(path, exact, n_batch), wanted) < bound
    train(path, TrainOptions(recall=0.9999))
    predicted = decide(model, ExecutionOptions()).plugin
    assert predicted is not None
    assert error(logits(path, predicted, 1), wanted) < 2e-2, "other text than the predictor was trained on"


def test_neurons_on_a_device_are_refused(tmp_path: Path) -> None:
    from pinfer.artefacts import paths
    from pinfer.artefacts.placement import PlacementFile, new_placement_id

    path = write_bitnet(tmp_path / "model.gguf")
    model = open_model(path)
    order = (np.arange(N_FF, dtype=np.int32),)
    with paths.writing_to(model) as folder:
        placement = PlacementFile(new_placement_id(), (64,), "CPU", 1 << 30, 0, 128, {}, order)
        placement.write(folder / paths.PLACEMENT, model, {})
    split(path, SplitOptions())
    with pytest.raises(PinferError, match="a norm follows their activation"):
        logits(path, decide(model, ExecutionOptions()).plugin, 1)
