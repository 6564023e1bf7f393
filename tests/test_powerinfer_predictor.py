"""The predictor of a PowerInfer file works as well on the inputs that the plugin sees as on PowerInfer's."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import MODELS, ROOT
from support.powerinfer_models import as_llama, bamboo, falcon, opt
from support.powerinfer_writer import Matrix, Weights, read_weights, write_powerinfer
from test_powerinfer_file import convert, divergence

from pinfer.artefacts.predictor import PredictorFile
from pinfer.conversion.powerinfer_file import open_powerinfer
from pinfer.conversion.powerinfer_predictor import (
    ImportedFactors,
    ImportOptions,
    ImportReport,
    has_predictor,
    without_scale,
)
from pinfer.convert import import_predictor
from pinfer.errors import PinferError
from pinfer.llama.engine import NEVER_DENSE, Engine, PluginConfig
from pinfer.llama.plugin import load_plugin
from pinfer.model import open_model
from pinfer.profile import ProfileOptions, profile

TEXT = str(ROOT / "tests" / "data" / "profile.txt")
HELD_OUT = ROOT / "tests" / "data" / "heldout.txt"
OPTIONS = ImportOptions(dataset=TEXT, n_tokens=1536, n_threads=1)
KEEP = ImportOptions(dataset=TEXT, n_tokens=1536, n_threads=1, keep=True)

Predictors = Mapping[int, tuple[Matrix, Matrix]]


def first_matrices(weights: Weights) -> list[tuple[Matrix, str]]:
    """For each layer, the matrix whose sign decides, to be multiplied by the norm's input, and the norm's name."""
    found = []
    for layer in range(len([name for name in weights.tensors if name.endswith("ffn_up.weight")])):
        norm = f"blk.{layer}.{'attn' if weights.arch == 'falcon' else 'ffn'}_norm"
        up = weights.tensors[f"blk.{layer}.ffn_up.weight"]
        first = weights.tensors.get(f"blk.{layer}.ffn_gate.weight", up) * weights.tensors[f"{norm}.weight"]
        if f"{norm}.bias" in weights.tensors:
            first = first - first.mean(axis=1, keepdims=True)
        found.append((first, norm))
    return found


def exact(weights: Weights) -> Predictors:
    """Scores equal to the first product: each input enters relu once as it is and once negated."""
    predictors = {}
    for layer, (first, _) in enumerate(first_matrices(weights)):
        eye = np.eye(first.shape[1], dtype=np.float32)
        predictors[layer] = np.concatenate([eye, -eye]), np.concatenate([first, -first], axis=1)
    return predictors


def thin(weights: Weights, rank: int) -> Predictors:
    """The same for the largest singular directions of the first matrix."""
    predictors = {}
    for layer, (first, _) in enumerate(first_matrices(weights)):
        u, s, v = np.linalg.svd(first.astype(np.float64), full_matrices=False)
        a, b = v[:rank].astype(np.float32), (u[:, :rank] * s[:rank]).astype(np.float32)
        predictors[layer] = np.concatenate([a, -a]), np.concatenate([b, -b], axis=1)
    return predictors


def imported(
    folder: Path, weights: Weights, kind: str = "F16", options: ImportOptions = KEEP
) -> tuple[Path, ImportReport]:
    """The converted model and what became of the predictor."""
    source = write_powerinfer(folder / "m.powerinfer.gguf", weights, kind)
    model = convert(source, folder / "m.gguf")
    return model, import_predictor(source, model, options)


def test_a_rms_norm_is_undone_exactly(tmp_path: Path) -> None:
    weights = read_weights(MODELS / "tiny-reglu.gguf")
    _, report = imported(tmp_path, weights.with_predictors(exact(weights)))
    assert report.n_imported == 5
    assert {layer.kind for layer in report.layers} == {"mlp"}
    # By sign alone, before the factors are rounded, the candidates are the neurons that fire.
    assert report.sign_recall is not None
    assert report.sign_recall > 0.9999
    assert report.sign_recall_active is not None
    assert report.sign_recall_active > 0.999
    assert report.sign_candidates == pytest.approx(report.active, rel=2e-3)
    # Coarser values need a few candidates more; at a recall below 1 the neurons of least mass are left out.
    assert report.recall == pytest.approx(0.995, abs=2e-3)
    assert report.candidates < 1.2 * report.active
    assert report.predictor_bytes < 5 * 2 * 512 * (256 + 768) / 2
    assert report.corpus == "profile.txt"
    assert report.sparse_threshold == 0
    assert report.to_json()["n_imported"] == 5


@pytest.mark.parametrize("weights", [bamboo(), falcon(), falcon(two_norms=True), opt()], ids=lambda w: w.arch)
def test_every_architecture_keeps_its_predictor(weights: Weights, tmp_path: Path) -> None:
    _, report = imported(tmp_path, weights.with_predictors(exact(weights)))
    assert report.n_imported == 2
    assert report.recall > 0.99
    # A perfect predictor names every neuron that can fire, half of them in random models, and of drelu's half in vain.
    assert report.candidates < 0.55


def test_a_low_rank_predictor_that_pays_is_kept_and_used(synthetic: Path, tmp_path: Path) -> None:
    weights = read_weights(synthetic)
    folder = tmp_path / "thin"
    folder.mkdir()
    model, report = imported(folder, weights.with_predictors(thin(weights, 32)), options=OPTIONS)
    assert report.n_imported == len(report.layers) == 2
    assert report.recall > 0.99
    assert report.candidates < 0.5
    assert report.expected_bytes < 0.8 * report.exact_bytes
    file = PredictorFile.read(report.path, open_model(model))
    assert file.kind == ("mlp", "mlp")
    assert max(file.rank) <= 64
    assert divergence(*_exact_and_predicted(model, report.path)[:2]) < 2e-3


def _exact_and_predicted(model: Path, predictor: Path, n_tokens: int = 128) -> tuple[Matrix, Matrix, float]:
    """Logits without and with the predictor, and the share of neurons that it named."""
    logits = []
    named = 1.0
    for path in (None, predictor):
        config = PluginConfig(open_model(model).activation, predictor=path, n_batch_dense=NEVER_DENSE)
        # Token by token: in a batch a neuron is computed for all tokens where it is named for one.
        with Engine(model, plugin=config, n_ctx=n_tokens, n_batch=1, n_threads=1) as engine:
            tokens = engine.tokenize(HELD_OUT.read_text(encoding="utf-8")[:4000])[:n_tokens]
            logits.append(engine.decode(tokens, logits=True))
            stats = load_plugin().stats(model)
            named = stats.n_candidates / stats.n_neurons
    assert not np.array_equal(logits[0], logits[1])
    return logits[0], logits[1], named


def test_factors_get_the_cheapest_types_and_rank(synthetic: Path, tmp_path: Path) -> None:
    """Hidden values that no neuron needs go, those left are rounded, and the recall is kept."""
    weights = read_weights(synthetic)
    thin_predictors = thin(weights, 32)
    rng = np.random.default_rng(3)
    useless = {
        layer: (
            np.concatenate([rng.normal(size=(64, fc1.shape[1])).astype(np.float32) * 0.1, fc1]),
            np.concatenate([np.zeros((len(fc2), 64), np.float32), fc2], axis=1),
        )
        for layer, (fc1, fc2) in thin_predictors.items()
    }
    model, report = imported(tmp_path, weights.with_predictors(useless), options=OPTIONS)
    assert report.n_imported == 2
    assert report.recall > 0.99
    file = PredictorFile.read(report.path, open_model(model))
    assert max(file.rank) <= 64
    n_ff, n_embd = useless[0][1].shape[0], useless[0][0].shape[1]
    for layer in report.layers:
        assert layer.predictor_bytes < 128 * 2 * (n_embd + n_ff) / 4
        assert file.artefact.tensor(f"blk.{layer.layer}.pred_b").type_name != "F16"


@pytest.mark.parametrize("weights", [falcon(), opt()], ids=lambda w: w.arch)
def test_the_plugin_adds_the_constant_behind_a_layer_norm(weights: Weights, tmp_path: Path) -> None:
    model, report = imported(tmp_path, weights.with_predictors(exact(weights)))
    predictor = PredictorFile.read(report.path, open_model(model)).layer(1)
    assert predictor.c is not None
    assert np.abs(predictor.c).max() > 0
    _, _, named = _exact_and_predicted(model, report.path, 60)
    assert named == pytest.approx(report.candidates, rel=0.1)


@pytest.mark.parametrize("kind", ["F16", "Q4_0"])
def test_the_plugin_predicts_as_was_measured(kind: str, tmp_path: Path) -> None:
    weights = read_weights(MODELS / "tiny-reglu.gguf")
    # Inputs below 0 count for less, so that it shows whether relu was taken.
    lopsided = {
        i: (fc1, fc2 * np.repeat(np.array([1, 0.7], np.float32), 256)) for i, (fc1, fc2) in exact(weights).items()
    }
    model, report = imported(tmp_path, weights.with_predictors(lopsided), kind)
    assert report.recall > 0.99
    exact_logits, predicted_logits, named = _exact_and_predicted(model, report.path)
    assert divergence(exact_logits, predicted_logits) < 1e-3
    assert named == pytest.approx(report.candidates, rel=0.1)


def test_ranks_are_padded_to_blocks(tmp_path: Path) -> None:
    weights = bamboo()
    model, report = imported(tmp_path, weights.with_predictors(thin(weights, 20)))
    assert PredictorFile.read(report.path, open_model(model)).rank == (64, 64)
    assert report.recall > 0.99


def test_a_useless_predictor_is_replaced_by_a_trained_one(synthetic: Path, tmp_path: Path) -> None:
    weights = read_weights(synthetic)
    rng = np.random.default_rng(0)
    useless = {
        layer: (rng.normal(size=(32, 256)).astype(np.float32), rng.normal(size=(768, 32)).astype(np.float32))
        for layer in range(2)
    }
    model, report = imported(tmp_path, weights.with_predictors(useless), options=OPTIONS)
    assert report.n_imported == 0
    assert not any(layer.imported for layer in report.layers)
    assert {layer.kind for layer in report.layers} <= {"low_rank", "one_bit", "two_bit"}
    assert report.recall > 0.99
    assert report.sign_recall is not None
    assert report.sign_recall < 0.8
    kinds = PredictorFile.read(report.path, open_model(model)).kind
    assert kinds == tuple(layer.kind for layer in report.layers)


def test_layers_without_a_predictor_are_trained(synthetic: Path, tmp_path: Path) -> None:
    weights = read_weights(synthetic)
    directions = thin(weights, 32)
    model, report = imported(tmp_path, weights.with_predictors({1: directions[1]}), options=OPTIONS)
    assert [layer.imported for layer in report.layers] == [False, True]
    assert report.layers[0].sign_recall is None
    file = PredictorFile.read(report.path, open_model(model))
    assert file.kind[1] == "mlp"
    # Each layer has factors of its own types, or codes.
    assert [file.artefact.has(f"blk.{layer}.pred_a") for layer in range(2)] == [
        k in ("low_rank", "mlp") for k in file.kind
    ]


def test_existing_samples_are_used(tmp_path: Path) -> None:
    weights = read_weights(MODELS / "tiny-reglu.gguf")
    source = write_powerinfer(tmp_path / "m.pi", weights.with_predictors(exact(weights)), "F16")
    model = convert(source, tmp_path / "m.gguf")
    profile(model, ProfileOptions(str(HELD_OUT), 512, n_threads=1))
    report = import_predictor(source, model, replace(KEEP, dataset=None))
    assert report.n_samples == 512
    assert report.corpus == str(HELD_OUT)
    assert "too few to rely on; use a longer text: --predictor-only --dataset" in report.notes()[1]
    # another text is counted anew
    report = import_predictor(source, model, KEEP)
    assert report.n_samples == 1536
    assert report.corpus == "profile.txt"


def test_a_file_without_a_predictor_is_refused(tmp_path: Path) -> None:
    source = write_powerinfer(tmp_path / "m.pi", bamboo(), "F16")
    assert not has_predictor(source)
    with pytest.raises(PinferError, match="no predictor"):
        import_predictor(source, convert(source, tmp_path / "m.gguf"), OPTIONS)


def test_another_model_is_refused(tmp_path: Path) -> None:
    weights = bamboo()
    source = write_powerinfer(tmp_path / "m.pi", weights.with_predictors(exact(weights)), "F16")
    other = Path(shutil.copy(MODELS / "tiny-reglu.gguf", tmp_path))
    with pytest.raises(PinferError, match="was not made from"):
        import_predictor(source, other, OPTIONS)
    same_shape = write_powerinfer(tmp_path / "other.pi", bamboo(seed=1), "F16")
    with pytest.raises(PinferError, match="was not made from"):
        import_predictor(source, convert(same_shape, tmp_path / "other.gguf"), OPTIONS)


def test_a_text_that_is_too_short_is_reported(tmp_path: Path) -> None:
    weights = bamboo()
    source = write_powerinfer(tmp_path / "m.pi", weights.with_predictors(exact(weights)), "F16")
    text = tmp_path / "short.txt"
    text.write_text("the man")
    with pytest.raises(PinferError, match=r"short\.txt"):
        import_predictor(source, convert(source, tmp_path / "m.gguf"), ImportOptions(dataset=str(text), n_threads=1))


def test_a_recall_out_of_range_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PinferError, match="recall"):
        import_predictor(tmp_path, tmp_path, ImportOptions(recall=1.5))


# What the re-basing rests on, against the formulas of the norms in double precision.


def _layer_norm(x: np.ndarray, weight: Matrix, bias: Matrix) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    mean, deviation = x.mean(axis=1, keepdims=True), x.std(axis=1, keepdims=True)
    return weight * (x - mean) / deviation + bias, mean, deviation


def test_inputs_that_the_norm_drops_are_ignored() -> None:
    fc1 = np.ones((2, 3), np.float32)
    found = without_scale(fc1, np.array([2.0, 0.0, -0.5], np.float32))
    assert np.array_equal(found, np.array([[0.5, 0.0, -2.0]] * 2, np.float32))


@pytest.mark.parametrize("share", [0.0, 0.1])
@pytest.mark.parametrize("weights", [bamboo(), falcon(), opt()], ids=lambda w: w.arch)
def test_a_layer_scores_as_its_file_does(weights: Weights, share: float, tmp_path: Path) -> None:
    """The file's scores of the norm's inputs against the result's scores of the norm's outputs."""
    rng = np.random.default_rng(2)
    n_embd, n_ff = 96, 200
    fc1 = rng.normal(0.05, 1, (40, n_embd)).astype(np.float16).astype(np.float32)
    fc2 = rng.normal(size=(n_ff, 40)).astype(np.float16).astype(np.float32)
    source = write_powerinfer(tmp_path / "m.pi", weights.with_predictors({0: (fc1, fc2), 1: (fc1, fc2)}), "F16")
    model = open_model(convert(source, tmp_path / "m.gguf"))
    factors = ImportedFactors.of(open_powerinfer(source), model, 1)

    _, norm = first_matrices(weights)[1]
    weight, bias = weights.tensors[f"{norm}.weight"], weights.tensors.get(f"{norm}.bias")
    x = rng.normal(size=(256, n_embd)) * rng.uniform(0.5, 20, (256, 1))
    x = x - x.mean(axis=1, keepdims=True) + share * x.std(axis=1, keepdims=True)
    if bias is None:
        size = np.sqrt((x**2).mean(axis=1, keepdims=True))
        y = weight * x / size
    else:
        y, _, size = _layer_norm(x, weight, bias)
    wanted = np.maximum(x @ fc1.T, 0) @ fc2.T / size
    found = factors.at(share).scores(y.astype(np.float32))
    assert np.abs(found - wanted).max() < 1e-3 * np.abs(wanted).max()


def test_bamboo_and_llama_differ_only_in_name() -> None:
    assert [name for _, name in first_matrices(bamboo())] == [name for _, name in first_matrices(as_llama(bamboo()))]
