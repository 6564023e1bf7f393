"""FATReLU: values pass a ReLU only above the model's threshold, in every stage and on every device."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from numpy.typing import NDArray
from support.random_model import N_FF, N_VOCAB, RandomModel, write_random_model
from support.runs import run
from support.shards import nmse, write_shards
from support.small_model import Shape, write_small_model

from models.reference import Reference
from pinfer.artefacts import paths
from pinfer.artefacts.predictor import PredictorFile
from pinfer.artefacts.profile import ProfileFile, SamplesFile
from pinfer.errors import PinferError
from pinfer.eval import EvalOptions, evaluate
from pinfer.llama.engine import Engine, PluginConfig
from pinfer.llama.plugin import load_plugin, plugin_path
from pinfer.model import THRESHOLD_KEY, open_model
from pinfer.profile import ProfileOptions, profile
from pinfer.train import TrainOptions, train

THRESHOLD = 0.4
TOKENS = np.random.default_rng(0).integers(1, N_VOCAB, 100).tolist()
MODELS = [
    RandomModel("gpt2", "relu", THRESHOLD),
    RandomModel("arcee", None, THRESHOLD),
    RandomModel("llama", "reglu", THRESHOLD),
    RandomModel("llama", "drelu", THRESHOLD, biases=True),
]


def _name(options: RandomModel) -> str:
    return f"{options.arch}-{options.activation}"


def _in_pieces(engine: Engine, n: int, tokens: Sequence[int] = TOKENS) -> NDArray[np.float32]:
    engine.clear()
    return np.concatenate([engine.decode(tokens[i : i + n], logits=True) for i in range(0, len(tokens), n)])


@pytest.mark.parametrize("options", MODELS, ids=_name)
def test_logits_are_those_of_the_reference(options: RandomModel, tmp_path: Path) -> None:
    path = write_random_model(tmp_path / "model.gguf", options)
    model = open_model(path)
    assert model.activation_threshold == np.float32(THRESHOLD)
    assert not model.stock_computes_it
    expected = Reference(path).forward(TOKENS).logits
    configurations = {"no shards": PluginConfig.of(model)}
    for share in (0.0, 0.5, 1.0):
        shards = write_shards(path, share)
        configurations[f"hot {share:.0%}"] = replace(
            PluginConfig.of(model), cold=shards.cold, hot=shards.hot if share else None, device="CPU"
        )
        for label, config in configurations.items():
            with Engine(path, plugin=config, n_ctx=128, n_threads=2, f32_attention=True) as engine:
                for n in (1, 7, 100):
                    error = nmse(_in_pieces(engine, n), np.asarray(expected))
                    assert error <= 1e-8, f"{label}, batches of {n}: NMSE {error:.2g}"
        configurations.clear()
    with Engine(path, plugin=PluginConfig(model.activation), n_ctx=128, n_threads=1, f32_attention=True) as engine:
        assert nmse(_in_pieces(engine, 100), np.asarray(expected)) > 1e-4, "the threshold makes no difference"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    path = tmp_path / "text.txt"
    path.write_text(" ".join("".join(rng.choice(list("abcdefghijklmnop"), 4)) for _ in range(3000)))
    return path


@pytest.mark.parametrize("options", MODELS, ids=_name)
def test_profile_and_predictor_follow_the_threshold(options: RandomModel, tmp_path: Path, text: Path) -> None:
    path = write_random_model(tmp_path / "model.gguf", options)
    model = open_model(path)
    report = profile(path, ProfileOptions(str(text), 4096, 128, n_threads=2))
    counted = ProfileFile.read(report.path, model)
    assert report.samples_path is not None
    samples = SamplesFile.read(report.samples_path, model)
    reference = Reference(path)
    for layer, ffn in enumerate(model.ffns):
        neurons = reference.ffn(f"blk.{layer}", samples.x(ffn).astype(np.float64))[1]
        expected = neurons != 0
        assert (samples.active(ffn) != expected).mean() < 1e-3, "x is kept in F16, so ties may turn"
        assert counted.count[layer].sum() == pytest.approx(counted.tokens * N_FF * expected.mean(), rel=0.02)
        assert counted.mass[layer].sum() == pytest.approx(
            np.abs(neurons).sum() / len(neurons) * counted.tokens, rel=0.02
        )

    trained = train(path, TrainOptions(recall=0.99))
    predictor = PredictorFile.read(trained.path, model)
    assert any(predictor.rank), "these neurons can be told from their inputs"
    assert trained.active == pytest.approx(report.active, rel=0.05)
    for layer, recall in enumerate(predictor.recall):
        assert recall > 0.985, f"layer {layer}"
    found = evaluate(path, EvalOptions(text=text, n_tokens=200, n_ctx=64, n_threads=2))
    assert (found.mode, found.reference) == ("predicted", "pinfer")
    assert found.kl_mean < 0.02
    assert found.active < found.computed <= 1


def _with_key(path: Path, value: object, kind: gguf.GGUFValueType) -> Path:
    """A small model with any value as its threshold."""
    write_small_model(path, Shape(n_layer=1))
    reader = gguf.GGUFReader(path)
    out = gguf.GGUFWriter(path.with_name("changed.gguf"), "llama")
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            out.add_key_value(key, field.contents(), field.types[0])
    out.add_key_value(THRESHOLD_KEY, value, kind)
    for tensor in reader.tensors:
        out.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path.with_name("changed.gguf")


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (-0.5, gguf.GGUFValueType.FLOAT32),
        (math.nan, gguf.GGUFValueType.FLOAT32),
        (math.inf, gguf.GGUFValueType.FLOAT32),
        (1e300, gguf.GGUFValueType.FLOAT64),
        (1, gguf.GGUFValueType.UINT32),
        (True, gguf.GGUFValueType.BOOL),
        ("0.5", gguf.GGUFValueType.STRING),
    ],
)
def test_an_invalid_threshold_is_one_error(value: object, kind: gguf.GGUFValueType, tmp_path: Path) -> None:
    path = _with_key(tmp_path / "model.gguf", value, kind)
    with pytest.raises(PinferError, match=f"{THRESHOLD_KEY} must be 0 or more") as caught:
        open_model(path)
    assert "\n" not in str(caught.value)


def test_the_plugin_refuses_an_invalid_threshold(tiny_reglu: Path) -> None:
    plugin = load_plugin()
    for bad in (-1.0, math.nan, math.inf):
        with pytest.raises(PinferError, match="threshold must be 0 or more"):
            plugin.configure(tiny_reglu, activation="reglu", activation_threshold=bad)
    with pytest.raises(PinferError, match="0 where no activation is named"):
        plugin.configure(tiny_reglu, activation_threshold=0.5)


def test_double_precision_is_rounded_as_the_runner_does(tmp_path: Path) -> None:
    path = _with_key(tmp_path / "model.gguf", 0.01, gguf.GGUFValueType.FLOAT64)
    assert open_model(path).activation_threshold == np.float32(0.01)


def test_artefacts_of_another_threshold_are_refused(tmp_path: Path) -> None:
    options = RandomModel("llama", "reglu", 0.01)
    path = write_random_model(tmp_path / "model.gguf", options)
    model = open_model(path)
    shards = write_shards(path, 0.5)
    profile_path = tmp_path / "profile.gguf"
    counts = tuple(np.ones(N_FF, np.int64) for _ in range(model.n_layer))
    mass = tuple(np.ones(N_FF) for _ in range(model.n_layer))
    ProfileFile(10, "none", "0" * 64, counts, mass, (None,) * len(counts)).write(profile_path, model, {})
    ProfileFile.read(profile_path, model)
    other = replace(model, activation_threshold=0.0)
    said = r"made for activation reglu above 0\.01, model\.gguf is run with reglu"
    with pytest.raises(PinferError, match=said) as caught:
        ProfileFile.read(profile_path, other)
    assert f"pinfer profile {path}" in (caught.value.hint or "")
    for config in (PluginConfig("reglu", 0.02), PluginConfig("drelu", model.activation_threshold)):
        with pytest.raises(PinferError, match=r"cold\.gguf was made for activation reglu above 0\.01, .* is run with"):
            Engine(path, plugin=replace(config, cold=shards.cold), n_ctx=32)


def test_artefacts_without_the_key_have_no_threshold(tmp_path: Path) -> None:
    path = write_random_model(tmp_path / "model.gguf", RandomModel("llama", "reglu"))
    shards = write_shards(path, 0.0)
    old = shards.cold.read_bytes()
    key = b"pinfer.activation_threshold"
    assert old.count(key) == 1
    shards.cold.write_bytes(old.replace(key, b"pinfer.activation_otherwise"))
    with Engine(path, plugin=PluginConfig("reglu", cold=shards.cold), n_ctx=32) as engine:
        engine.decode([1, 2])
    with pytest.raises(PinferError, match="was made for activation reglu, "):
        Engine(path, plugin=PluginConfig("reglu", 0.5, cold=shards.cold), n_ctx=32)


def test_runner_computes_by_the_threshold(tmp_path: Path) -> None:
    """A threshold lowers the active share; artefacts with another threshold are reported in one line."""
    shares = {}
    for threshold in (0.0, 1.0):
        path = write_random_model(tmp_path / f"{threshold}.gguf", RandomModel("llama", "reglu", threshold))
        words = ("-p", "abcd", "-n", 8, "--temp", 0, "--ignore-eos")
        shares[threshold] = run(path, *words, as_json=True).json["active"]
    # the products are normal with a deviation of about 1
    assert 0.4 < shares[0.0] < 0.6
    assert 0.05 < shares[1.0] < 0.25
    write_shards(path, 0.0)
    assert run(path, *words).code == 0
    artefacts = paths.artefact_dir(path, open_model(path).fingerprint, for_writing=False)
    changed = (artefacts / paths.COLD).read_bytes()
    at = changed.index(b"pinfer.activation_threshold") + len(b"pinfer.activation_threshold") + 4
    assert changed[at : at + 4] == np.float32(1).tobytes()
    (artefacts / paths.COLD).write_bytes(changed[:at] + np.float32(0.5).tobytes() + changed[at + 4 :])
    with pytest.raises(PinferError, match=r"was made for activation reglu above 0\.5"):
        run(path, *words)


_LOGITS_OF_ANOTHER_PROGRAM = """
import ctypes, sys
import numpy as np
from pinfer.llama import engine, ggml
library = ggml.load_library("ggml")
library.ggml_backend_load.restype = ctypes.c_void_p
library.ggml_backend_load.argtypes = (ctypes.c_char_p,)
assert library.ggml_backend_load(sys.argv[1].encode())
with engine.Engine(sys.argv[2], n_ctx=32, n_threads=1, f32_attention=True) as e:
    np.save(sys.argv[3], e.decode([1, 2, 3, 4, 5], logits=True))
"""


def test_other_programs_set_it_in_the_environment(tmp_path: Path) -> None:
    """Loaded as llama.cpp's own programs do it: by GGML_BACKEND_PATH, configured by variables."""
    path = write_random_model(tmp_path / "model.gguf", RandomModel("llama", "reglu", THRESHOLD))
    out = tmp_path / "logits.npy"
    command = [sys.executable, "-c", _LOGITS_OF_ANOTHER_PROGRAM, str(plugin_path()), str(path), str(out)]

    def logits(threshold: str) -> tuple[NDArray[np.float32] | None, str]:
        env = {**os.environ, "GGML_BACKEND_PATH": str(plugin_path()), "PINFER_ACTIVATION_THRESHOLD": threshold}
        out.unlink(missing_ok=True)
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        assert out.exists() == (done.returncode == 0)
        return np.load(out) if out.exists() else None, done.stderr

    expected = np.asarray(Reference(path).forward([1, 2, 3, 4, 5]).logits)
    for threshold, low, high in ((str(THRESHOLD), 0, 1e-8), ("0", 1e-4, math.inf), ("", 0, 1e-8)):
        got, said = logits(threshold)
        assert got is not None, said
        assert low <= nmse(got, expected) < high
    for bad in ("much", "-1"):
        got, said = logits(bad)
        assert got is None
        assert f"PINFER_ACTIVATION_THRESHOLD={bad} is not a number of 0 or more" in said
