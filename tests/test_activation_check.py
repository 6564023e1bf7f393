"""A model with a wrongly stated activation is detected before it is profiled; other models are not."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import gguf
import numpy as np
import pytest
from support.quantised import quantise
from support.random_model import RandomModel, write_random_model

from pinfer.errors import PinferError
from pinfer.llama.activation_check import LEAST_TOKENS, Readings, first_tokens, judge, losses
from pinfer.llama.engine import Engine, PluginConfig
from pinfer.model import open_model
from pinfer.profile import ProfileOptions, profile

TEXT = str(Path(__file__).resolve().parent / "data" / "profile.txt")
BOTH = r"perplexity ([\d,.]+) as (\w+), ([\d,.e+]+) as stock llama\.cpp computes it"


class Notes:
    """A progress that records its messages."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def task(self, label: str, total: int, unit: str) -> AbstractContextManager[Callable[[int], None]]:
        return nullcontext(lambda n: None)

    def note(self, text: str) -> None:
        self.lines.append(text)


def _said(path: Path, activation: str | None = None, *, force: bool = False) -> list[str]:
    notes = Notes()
    options = ProfileOptions(TEXT, 1100, 256, n_threads=2, n_samples=0, activation=activation, force=force)
    assert profile(path, options, notes).tokens == 1100
    return notes.lines


@pytest.mark.parametrize(
    ("name", "claimed", "others"),
    [("tiny-reglu.gguf", "drelu", "reglu|reglu2"), ("tiny-relu2.gguf", "relu", "relu2")],
)
def test_a_wrong_claim_is_refused_before_anything_is_written(
    name: str, claimed: str, others: str, copy_model: Callable[[str], Path]
) -> None:
    path = copy_model(name)
    with pytest.raises(PinferError, match=rf"{name} does not look like a {claimed} model: {BOTH}") as caught:
        _said(path, claimed)
    found = re.search(BOTH, caught.value.message)
    assert found is not None
    assert float(found[1]) > 1.5 * float(found[3]) > 30
    assert "\n" not in str(caught.value)
    assert "run it dense" in (caught.value.hint or "")
    assert f"--activation {others};" in (caught.value.hint or "")
    written = [file.name for file in path.with_name(f"{name}.pinfer").rglob("*") if file.is_file()]
    assert written in ([], [".lock"])
    assert _said(path, claimed, force=True) == []


def test_readings_that_support_the_claim_are_printed(tiny_reglu: Path, tmp_path: Path) -> None:
    """relu(g / s) · s u is relu(g) · u, so the model stays the same; SiLU of a small g is half of g."""
    path = quantise(tiny_reglu, "F32", tmp_path / "scaled.gguf")
    for tensor in gguf.GGUFReader(path, "r+").tensors:
        if tensor.name.endswith(("ffn_gate.weight", "ffn_up.weight")):
            weights = tensor.data  # mapped
            weights *= np.float32(1 / 1024 if "gate" in tensor.name else 1024)
    (line,) = _said(path)
    found = re.fullmatch(BOTH, line)
    assert found is not None, line
    assert found[2] == "reglu"
    assert 1.5 * float(found[1]) < float(found[3].replace(",", ""))


def test_readings_that_hardly_differ_are_not_printed(tiny_reglu: Path) -> None:
    """Its products are so large that SiLU is nearly ReLU."""
    assert _said(tiny_reglu) == []


@pytest.mark.parametrize(
    "options",
    [RandomModel("llama", "reglu"), RandomModel("llama", "drelu", 0.5), RandomModel("gpt2", "relu")],
    ids=lambda o: f"{o.arch}-{o.activation}",
)
def test_an_untrained_model_is_not_accused(options: RandomModel, tmp_path: Path) -> None:
    assert _said(write_random_model(tmp_path / "model.gguf", options)) == []


def test_losses_are_those_of_whole_windows(tiny_relu2: Path) -> None:
    with Engine(tiny_relu2, n_ctx=256, n_threads=1, repack=False) as engine:
        tokens = engine.tokenize(Path(TEXT).read_text(encoding="utf-8")[:1200])
        windows = first_tokens([tokens[:150], tokens[150:151], tokens[151:]], 180)
        assert [len(w) for w in windows] == [150, 32]
        n_read: list[int] = []
        found = losses(engine, windows, n_read.append)
        assert sum(n_read) == len(found) == 180
        expected = []
        for window in windows:
            engine.clear()
            logits = engine.decode(window[:-1], logits=True).astype(np.float64)
            expected += list(np.log(np.exp(logits).sum(1)) - logits[np.arange(len(window) - 1), window[1:]])
    # Other batch sizes round differently.
    np.testing.assert_allclose(found, expected, rtol=0.01, atol=0.01)


def _readings(claimed: float, stock: float, n: int = 500, spread: float = 1.0) -> Readings:
    noise = np.random.default_rng(0).normal(0, spread, (2, n))
    noise -= noise.mean(axis=1, keepdims=True)
    return Readings(claimed + noise[0], stock + noise[1], n_vocab=32000)


@pytest.mark.parametrize(
    ("readings", "verdict"),
    [
        (_readings(9.0, 2.0), "refused"),
        (_readings(2.0, 9.0), "praised"),
        (_readings(2.5, 2.0), "refused"),
        (_readings(2.3, 2.0), "silent"),  # 1.35 times
        (_readings(2.5, 2.0, spread=5.0), "silent"),  # by chance
        (_readings(2.5, 2.0, n=LEAST_TOKENS - 1, spread=0.1), "silent"),  # too few
        (_readings(12.0, 10.0), "silent"),  # both as bad as guessing: log(32000) is 10.4
        (Readings(np.empty(0), np.empty(0), 32000), "silent"),
    ],
)
def test_the_rule(readings: Readings, verdict: str, tiny_reglu: Path) -> None:
    model = open_model(tiny_reglu)
    if verdict == "refused":
        with pytest.raises(PinferError, match="does not look like a reglu model"):
            judge(model, readings)
    else:
        assert (judge(model, readings) is not None) == (verdict == "praised")


def test_nan_logits_are_the_worst_reading(tiny_relu2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = Engine.decode

    def broken(self: Engine, tokens: list[int], *, logits: bool = False) -> object:
        return np.full_like(decode(self, tokens, logits=logits), math.nan)

    monkeypatch.setattr(Engine, "decode", broken)
    with Engine(tiny_relu2, plugin=PluginConfig("relu2"), n_ctx=128, n_threads=1) as engine:
        assert (losses(engine, [list(range(1, 100))], lambda n: None) == 100).all()
