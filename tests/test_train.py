"""Train: the factors are the best there are, thresholds keep the recall, and no predictor costs more than none."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from support.small_model import Shape, write_small_model

from pinfer.artefacts import paths
from pinfer.artefacts.predictor import FEW_BITS, LayerPredictor, PredictorFile, packed, quantised, unpacked
from pinfer.artefacts.profile import SamplesFile, samples_writer
from pinfer.errors import PinferError
from pinfer.gguf_io.reader import row_bytes
from pinfer.model import Ffn, Model, Tensor, dequantize, open_model
from pinfer.predictors.data import HeldBack, LayerData, parts
from pinfer.predictors.few_bits import compensation, few_bits
from pinfer.predictors.fitting import KINDS, SCATTERED_COST, TrainOptions, fit_layer, scores
from pinfer.predictors.low_rank import Spectrum, covariance
from pinfer.predictors.thresholds import calibrate, gain, inverse_gain, log_gain
from pinfer.train import train

Matrix = NDArray[np.float32]

_MATRIX = Tensor("matrix", 0, "F32", (96, 384), 0, 0)
# What fit_layer takes of it is where it lies in the model, for the report.
FFN = Ffn(0, "dense", 96, 384, 1, None, _MATRIX, _MATRIX)


def _layer(
    activation: str = "relu",
    *,
    n_samples: int = 2000,
    n_embd: int = 96,
    n_ff: int = 384,
    rank: int = 24,
    remainder: float = 0.1,
    bias: float = -1.2,
    seed: int = 0,
) -> LayerData:
    """FFN inputs with a mean and unequal directions, and a predicted matrix of low rank plus a remainder."""
    rng = np.random.default_rng(seed)
    spread = rng.normal(size=(n_embd, n_embd)) * np.geomspace(2, 0.1, n_embd)
    x = (rng.normal(size=(n_samples, n_embd)) @ spread.T / np.sqrt(n_embd) + rng.normal(size=n_embd)).astype(np.float16)
    weight = rng.normal(size=(n_ff, rank)) @ rng.normal(size=(rank, n_embd)) / rank
    weight += remainder * rng.normal(size=(n_ff, n_embd)) * weight.std()
    weight_f32: Matrix = weight.astype(np.float32)
    z = x.astype(np.float32) @ weight_f32.T
    other = rng.normal(size=(n_ff, n_embd)).astype(np.float32)
    return LayerData(
        x=x,
        weight=weight_f32,
        # Each neuron fires rarely, as those of a ReLU model do.
        bias=(bias * z.std(axis=0) - z.mean(axis=0)).astype(np.float32),
        partner=(lambda v: v @ other.T) if activation in ("reglu", "drelu") else None,
        down_norm=rng.uniform(0.2, 2.0, n_ff).astype(np.float32),
        activation=activation,
        first_bytes=2 * n_embd,
        rest_bytes=2 * n_embd * (2 if activation in ("reglu", "drelu") else 1),
    )


def _factors(data: LayerData, rank: int = 10**6) -> tuple[Matrix, Matrix]:
    """A ``[rank, n_embd]`` and B ``[n_ff, rank]`` from all samples, unrounded."""
    return Spectrum.of(data.weight, covariance(data.x.astype(np.float32))).factors(rank)


def _measure(data: LayerData, predictor: LayerPredictor, part: slice) -> tuple[float, float]:
    """Recall and candidates of a predictor, computed from its factors as the plugin would."""
    assert predictor.b is not None
    assert predictor.t is not None
    held = HeldBack.of(data, part)
    named = scores(predictor.a, predictor.b, held.x) > predictor.t
    return float(held.mass[named].sum() / held.mass.sum()), float(named.mean())


# -- factors ----------------------------------------------------------------------------------------------------------


def test_low_rank_matrix_is_recovered() -> None:
    data = _layer(remainder=0.0, rank=24)
    a, b = _factors(data, 24)
    product = b @ a
    assert np.abs(product - data.weight).max() < 1e-3 * np.abs(data.weight).max()


@pytest.mark.parametrize("rank", [1, 8, 40])
def test_factors_beat_every_other_of_that_rank(rank: int) -> None:
    """E‖W x - B A x‖² is the sum of the squared singular values of W L that were left out: the least there is."""
    data = _layer(remainder=0.5)
    x = data.x.astype(np.float64)
    a, b = _factors(data)
    centred = x - x.mean(axis=0)
    error = centred @ (data.weight - b[:, :rank].astype(np.float64) @ a[:rank]).T
    left = np.linalg.svd(data.weight @ np.linalg.cholesky(centred.T @ centred / len(x)), compute_uv=False)[rank:]
    assert (error**2).sum(axis=1).mean() == pytest.approx((left**2).sum(), rel=0.02)
    plain_u, plain_s, plain_v = np.linalg.svd(data.weight, full_matrices=False)
    plain = centred @ (data.weight - plain_u[:, :rank] * plain_s[:rank] @ plain_v[:rank]).T
    assert (error**2).mean() < 0.98 * (plain**2).mean(), "the inputs' covariance was of no use"


def test_factors_fit_half_floats_whatever_the_scale() -> None:
    for scale in (1e-4, 1.0, 100.0):
        data = _layer()
        scaled = dataclasses.replace(data, x=(data.x * np.float16(scale)).astype(np.float16))
        a, b = _factors(scaled, 32)
        for rows in (a, b):
            stored = quantised(np.ascontiguousarray(rows), "f16")
            assert np.isfinite(stored).all()
            assert np.abs(stored - rows).max() < 1e-3 * np.abs(rows).max()


def test_fewer_samples_than_inputs_still_give_a_predictor() -> None:
    data = _layer(n_samples=80, n_embd=128, n_ff=256)
    predictor, report = fit_layer(data, FFN, TrainOptions(recall=0.9, type="f16"))
    assert 0 < report.recall <= 1
    assert report.expected_bytes <= report.exact_bytes
    assert predictor.rank == report.rank


def test_subspace_is_as_good_as_all_eigenvectors() -> None:
    """Where few vectors are wanted they come from a random subspace: the error may exceed the least by 1 %."""
    data = _layer(n_embd=512, n_ff=256, rank=100, remainder=0.3)
    c = covariance(data.x.astype(np.float32))
    root = np.linalg.cholesky(c)

    def error(a: Matrix, b: Matrix) -> float:
        return float(np.square((data.weight - b.astype(np.float64) @ a) @ root).sum())

    spectrum = Spectrum.of(data.weight, c)
    for rank in (1, 32, 128):
        least = np.square(np.linalg.svd(data.weight @ root, compute_uv=False)[rank:]).sum()
        assert least <= error(*spectrum.factors(rank)) * (1 + 1e-6)
        assert error(*spectrum.factors(rank)) < 1.01 * least
    exact = Spectrum.of(np.outer(np.arange(256), np.arange(512)).astype(np.float32), c)
    a, b = exact.factors(64)  # more than there is
    assert np.isfinite(a).all()
    assert error(a, b) != error(a, b * 0)
    assert np.abs(b @ a - exact.weight).max() < 1e-3 * exact.weight.max()


# -- few bits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [1, 2])
def test_errors_are_made_up_for(bits: int) -> None:
    """Products with inputs of unequal, correlated directions come out nearer than with every weight by itself."""
    data = _layer(rank=96)
    x = data.x.astype(np.float32)
    x -= x.mean(axis=0)
    levels = few_bits(data.weight, compensation(covariance(x)), bits)
    assert set(np.unique(levels)) == set(range(1 - 2**bits, 2**bits, 2))
    alone = few_bits(data.weight, compensation(np.eye(96)), bits)

    def unexplained(found: Matrix) -> float:
        true, said = x @ data.weight.T, x @ found.T
        slope = (true * said).sum(axis=0) / (said * said).sum(axis=0)
        return float(np.square(true - said * slope).sum() / np.square(true).sum())

    deviation = data.weight.std(axis=1, keepdims=True)
    plain = np.sign(data.weight) if bits == 1 else np.clip(2 * np.floor(data.weight / deviation) + 1, -3, 3)
    assert unexplained(alone) == pytest.approx(unexplained(plain.astype(np.float32)), rel=0.02)
    assert unexplained(levels) < 0.6 * unexplained(alone)


def test_neurons_are_rounded_each_by_itself() -> None:
    data = _layer()
    how = compensation(covariance(data.x.astype(np.float32)))
    np.testing.assert_array_equal(few_bits(data.weight[::3], how, 2), few_bits(data.weight, how, 2)[::3])


@pytest.mark.parametrize("bits", [1, 2])
def test_codes_lie_as_the_format_says(bits: int) -> None:
    rng = np.random.default_rng(0)
    levels = rng.choice(np.arange(1 - 2**bits, 2**bits, 2), size=(5, 48)).astype(np.float32)
    codes = packed(levels, bits)
    assert codes.shape == (5, 48 * bits // 8)
    for j in (0, 1, 6, 7, 8, 47):
        q = codes[:, j * bits // 8] >> (j * bits % 8) & (2**bits - 1)
        np.testing.assert_array_equal(2 * q.astype(int) - (2**bits - 1), levels[:, j])
    np.testing.assert_array_equal(unpacked(codes, bits), levels)


# -- thresholds -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ["relu", "relu2", "reglu", "drelu"])
@pytest.mark.parametrize("recall", [0.9, 0.99])
@pytest.mark.parametrize("kind", KINDS)
def test_recall_is_reached_on_samples_never_seen(activation: str, recall: float, kind: str) -> None:
    data = _layer(activation, n_samples=3000)
    predictor, report = fit_layer(data, FFN, TrainOptions(recall=recall, type="f16"), (kind,))
    assert report.kind == kind
    measured, candidates = _measure(data, predictor, parts(len(data.x))[2])
    assert measured == pytest.approx(report.recall, abs=1e-6)
    assert candidates == pytest.approx(report.candidates, abs=1e-6)
    # The threshold is found on other samples than it is judged on; what is lost may differ by a third.
    assert 1 - measured == pytest.approx(1 - recall, rel=0.34)
    assert candidates < 0.6


def test_more_recall_takes_more_candidates() -> None:
    data = _layer("relu2")
    held = HeldBack.of(data, parts(len(data.x))[1])
    raw = scores(*_factors(data, 16), held.x)
    shares = []
    for recall in (0.5, 0.9, 0.99, 0.999):
        named = raw > calibrate(raw, held, data, recall)
        assert held.mass[named].sum() >= (recall - 1e-6) * held.mass.sum()
        shares.append(named.mean())
    assert shares == sorted(shares)
    assert shares[0] < shares[-1] / 2


def test_recall_of_one_names_every_neuron_that_fires() -> None:
    data = _layer()
    held = HeldBack.of(data, parts(len(data.x))[1])
    raw = scores(*_factors(data, 24), held.x)
    named = raw > calibrate(raw, held, data, 1.0)
    assert named[held.mass > 0].all()


def test_priced_thresholds_beat_one_threshold_for_all() -> None:
    """At the same mass kept, thresholds by expected worth take fewer candidates than one cut of the score."""
    data = _layer("relu", remainder=0.8)
    held = HeldBack.of(data, parts(len(data.x))[1])
    raw = scores(*_factors(data, 24), held.x)
    named = raw > calibrate(raw, held, data, 0.95)
    kept = held.mass[named].sum()
    flat = (raw + data.bias).ravel()
    order = np.argsort(flat)[::-1]
    n_flat = int(np.searchsorted(np.cumsum(held.mass.ravel()[order]), kept)) + 1
    assert named.sum() < 0.95 * n_flat


def test_neurons_that_never_fire_and_weigh_nothing_are_left_out() -> None:
    data = _layer("reglu")
    data.bias[:10] = -1e3
    data.down_norm[10:20] = 0.0
    predictor, _ = fit_layer(data, FFN, TrainOptions(type="f16"), ("low_rank",))
    assert predictor.t is not None
    assert np.isfinite(predictor.t).all()
    held = HeldBack.of(data, parts(len(data.x))[2])
    assert predictor.a is not None
    assert predictor.b is not None
    named = held.x @ predictor.a.T @ predictor.b.T > predictor.t
    assert not named[:, :20].any()


def test_layer_in_which_nothing_fires() -> None:
    data = _layer()
    data.bias[:] = -1e3
    predictor, report = fit_layer(data, FFN, TrainOptions(type="f16"))
    assert report.recall == 1.0
    assert report.active == 0.0
    assert report.candidates == 0.0 or predictor.rank == 0


@pytest.mark.parametrize("power", [1, 2])
@settings(max_examples=50)
@given(u=st.floats(-5.9, 20))
def test_gain_and_its_inverse(power: int, u: float) -> None:
    at = np.array([u])
    expected = gain(at, power)
    rng = np.random.default_rng(0)
    if -1 < u < 3:
        sample = (np.maximum(u + rng.normal(size=400_000), 0) ** power).mean()
        assert sample == pytest.approx(float(expected[0]), rel=0.02)
    # Above the table u^power stands for it, which at its end is 1/u² too little for the square.
    tolerance = 0.02 if u <= 6 else 0.1
    assert float(inverse_gain(expected, power)[0]) == pytest.approx(u, abs=tolerance)
    assert float(log_gain(at.astype(np.float32), power)[0]) == pytest.approx(float(np.log(expected[0])), abs=0.05)


# -- choice of the rank -----------------------------------------------------------------------------------------------


def test_kind_follows_the_structure() -> None:
    """Thin factors where the matrix has few directions, few bits where it has many, and always what costs least."""
    few = _layer(rank=16, remainder=0.02)
    many = _layer(rank=96, remainder=1.0, bias=-1.6)
    options = TrainOptions(recall=0.98)
    assert fit_layer(few, FFN, options, KINDS)[1].kind == "low_rank"
    predictor, report = fit_layer(many, FFN, options, KINDS)
    assert report.kind in FEW_BITS
    assert (predictor.kind, predictor.rank, predictor.a) == (report.kind, 96, None)
    assert report.predictor_bytes == 384 * (96 * FEW_BITS[report.kind] // 8 + 4)

    def cost(kinds: tuple[str, ...]) -> float:
        found = fit_layer(many, FFN, options, kinds)[1]
        return found.predictor_bytes + SCATTERED_COST * (found.expected_bytes - found.predictor_bytes)

    assert cost(KINDS) <= 1.02 * min(cost((kind,)) for kind in KINDS)


def test_streamed_bytes_cost_less_than_scattered_ones() -> None:
    """A predictor whose rows are as many bytes as it saves does not pay: exact mode streams them."""
    often, rarely = _layer(bias=0.5), _layer(bias=-1.2)
    options = TrainOptions(recall=0.999)
    (_, report), (_, rare) = (fit_layer(data, FFN, options) for data in (often, rarely))
    assert 1 / SCATTERED_COST < report.active < 0.8
    assert report.kind == "none"
    assert rare.kind == "low_rank"


def test_matrix_without_structure_gets_no_predictor() -> None:
    data = _layer(rank=96, remainder=3.0, bias=0.0)
    predictor, report = fit_layer(data, FFN, TrainOptions(recall=0.999, type="f16"))
    assert (report.kind, predictor.rank, predictor.a) == ("none", 0, None)
    assert (report.recall, report.candidates) == (1.0, 1.0)
    assert report.expected_bytes == report.exact_bytes


def test_rank_follows_the_price() -> None:
    data = _layer(rank=80, remainder=0.05)
    dear = dataclasses.replace(data, first_bytes=16 * data.first_bytes)
    cheap_rank, dear_rank = (fit_layer(d, FFN, TrainOptions(type="f16"), ("low_rank",))[1].rank for d in (data, dear))
    assert 32 <= cheap_rank < dear_rank
    assert fit_layer(dear, FFN, TrainOptions(max_rank=40, type="f16"), ("low_rank",))[1].rank == 32
    assert fit_layer(data, FFN, TrainOptions(max_rank=0, type="f16"), ("low_rank",))[1].kind == "none"


@settings(max_examples=5, deadline=None)
@given(
    activation=st.sampled_from(["relu", "relu2", "reglu", "drelu"]),
    rank=st.integers(1, 64),
    remainder=st.floats(0, 2),
    bias=st.floats(-2.5, 0.5),
    factor_type=st.sampled_from(["f16", "q8_0", "q4_0"]),
    kinds=st.sampled_from([KINDS, ("low_rank",)]),
)
def test_predictor_never_costs_more_than_none(
    activation: str, rank: int, remainder: float, bias: float, factor_type: str, kinds: tuple[str, ...]
) -> None:
    data = _layer(activation, n_samples=1000, n_embd=64, n_ff=192, rank=rank, remainder=remainder, bias=bias)
    options = TrainOptions(type=factor_type)
    predictor, report = fit_layer(data, FFN, options, kinds)
    assert report.expected_bytes <= report.exact_bytes
    assert report.kind in (*kinds, "none")
    if predictor.a is not None:
        assert predictor.b is not None
        assert predictor.t is not None
        n = predictor.rank * row_bytes(factor_type, 64) + 192 * row_bytes(factor_type, predictor.rank) + 4 * 192
        assert report.predictor_bytes == n < 192 * data.first_bytes
        # What will be stored is what was measured.
        np.testing.assert_array_equal(quantised(predictor.a, factor_type), predictor.a)
        np.testing.assert_array_equal(quantised(predictor.b, factor_type), predictor.b)


def test_held_back_samples_are_not_fitted_on() -> None:
    for n in (64, 100, 8192, 10**6):
        fit, calibration, test = parts(n)
        assert 0 == fit.start < fit.stop <= calibration.start < calibration.stop <= test.start < test.stop == n


# -- the command ------------------------------------------------------------------------------------------------------


def _write_samples(model: Model, n: int, seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    folder = paths.artefact_dir(model.path, model.fingerprint, for_writing=True)
    layers: list[tuple[NDArray[np.float16], NDArray[np.uint8]]] = []
    for ffn in model.ffns:
        first = ffn.gate or ffn.up
        # Inputs of few directions: what a predictor needs.
        few = rng.normal(size=(n, 24)) @ rng.normal(size=(24, model.n_embd))
        x = (few + 0.1 * rng.normal(size=(n, model.n_embd))).astype(np.float16)
        fired = x.astype(np.float32) @ dequantize(model, first).T > 0
        layers.append((x, np.packbits(fired, axis=1, bitorder="little")))
    with samples_writer(folder / paths.SAMPLES, model, {}, layers):
        pass


@pytest.mark.parametrize("activation", ["relu2", "reglu", "drelu", "relu"])
@pytest.mark.parametrize("factor_type", ["f16", "q8_0", "q4_0"])
def test_file_holds_what_was_learnt(tmp_path: Path, activation: str, factor_type: str) -> None:
    path = write_small_model(tmp_path / "m.gguf", Shape(activation=activation, n_ff=512, biases=True))
    model = open_model(path)
    _write_samples(model, 900)
    report = train(path, TrainOptions(recall=0.98, type=factor_type))
    assert report.path == path.with_name("m.gguf.pinfer") / paths.PREDICTOR
    file = PredictorFile.read(report.path, model)
    assert file.rank == tuple(layer.rank for layer in report.layers)
    assert any(file.rank)
    samples = SamplesFile.read(path.with_name("m.gguf.pinfer") / paths.SAMPLES, model)
    for i, (ffn, layer) in enumerate(zip(model.ffns, report.layers, strict=True)):
        assert (layer.layer, layer.ffn) == (ffn.layer, ffn.kind)
        read = file.layer(i)
        assert read.recall == pytest.approx(layer.recall, rel=1e-6)
        assert read.candidates == pytest.approx(layer.candidates, rel=1e-6)
        if layer.kind == "none":
            continue
        data = LayerData.read(model, ffn, samples)
        recall, candidates = _measure(data, read, parts(900)[2])
        assert recall == pytest.approx(layer.recall, abs=1e-4)
        assert candidates == pytest.approx(layer.candidates, abs=1e-4)
    assert report.expected_bytes < report.exact_bytes
    plain = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert len(plain["layers"]) == model.n_layer


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "Q4_K", "BF16", "F32"])
def test_quantised_models_are_learnt_as_they_are_run(tmp_path: Path, kind: str) -> None:
    path = write_small_model(tmp_path / "m.gguf", Shape(activation="reglu", type=kind, n_ff=512, n_layer=1))
    _write_samples(open_model(path), 600)
    (layer,) = train(path, TrainOptions(recall=0.95)).layers
    # A finer model leaves a predictor more to save, a coarse one may be cheaper without.
    assert layer.kind == "none" or 1 - layer.recall == pytest.approx(0.05, abs=0.02)


def test_training_twice_gives_the_same_bytes(tmp_path: Path) -> None:
    path = write_small_model(tmp_path / "m.gguf", Shape(activation="relu2", n_ff=512))
    _write_samples(open_model(path), 500)
    first = train(path, TrainOptions()).path.read_bytes()
    assert train(path, TrainOptions()).path.read_bytes() == first


def test_without_samples_the_error_names_the_command(tmp_path: Path) -> None:
    path = write_small_model(tmp_path / "m.gguf", Shape())
    with pytest.raises(PinferError, match=r"has no samples yet .*run: pinfer profile .*m\.gguf"):
        train(path, TrainOptions())
    _write_samples(open_model(path), 20)
    with pytest.raises(PinferError, match=r"holds 20 samples, too few"):
        train(path, TrainOptions())
    assert not (tmp_path / "m.gguf.pinfer" / paths.PREDICTOR).exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (TrainOptions(recall=0.0), "recall of 0.0"),
        (TrainOptions(recall=1.5), "recall of 1.5"),
        (TrainOptions(max_rank=-1), "rank cannot be negative"),
        (TrainOptions(type="q4_1"), "unknown type 'q4_1'"),
    ],
)
def test_wrong_options(tmp_path: Path, options: TrainOptions, message: str) -> None:
    with pytest.raises(PinferError, match=message):
        train(tmp_path / "m.gguf", options)


def test_interrupted_training_leaves_the_old_predictor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_small_model(tmp_path / "m.gguf", Shape(activation="relu2", n_ff=512))
    _write_samples(open_model(path), 500)
    predictor = train(path, TrainOptions()).path
    before = predictor.read_bytes()
    calls: list[int] = []

    def stop(data: LayerData, ffn: Ffn, options: TrainOptions) -> object:
        calls.append(ffn.layer)
        if ffn.layer == 1:
            raise KeyboardInterrupt
        return fit_layer(data, ffn, options)

    monkeypatch.setattr("pinfer.train.fit_layer", stop)
    with pytest.raises(KeyboardInterrupt):
        train(path, TrainOptions(recall=0.9))
    assert calls == [0, 1]
    assert predictor.read_bytes() == before
    assert sorted(p.name for p in predictor.parent.iterdir()) == [".lock", paths.PREDICTOR, "samples"]


def _damage(name: str) -> Callable[[bytes], bytes]:
    return lambda data: data.replace(b"low_rank", name.encode())


@pytest.mark.parametrize("damage", [_damage("high_rnk"), lambda data: data[: len(data) // 2], lambda data: b"GGUF"])
def test_damaged_predictor_is_refused(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    path = write_small_model(tmp_path / "m.gguf", Shape(activation="relu2", n_ff=512))
    model = open_model(path)
    _write_samples(model, 500)
    predictor = train(path, TrainOptions()).path
    predictor.write_bytes(damage(predictor.read_bytes()))
    with pytest.raises(PinferError, match=r"damaged.*pinfer train"):
        PredictorFile.read(predictor, model)
