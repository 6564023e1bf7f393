"""Eval: exact mode is dense, predicted mode stays within its bounds on text that was never profiled."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.reference import Reference
from pinfer import eval as stage
from pinfer.artefacts import paths
from pinfer.errors import PinferError
from pinfer.eval import EvalOptions, _chunks, _log_probabilities, _Totals, evaluate
from pinfer.profile import ProfileOptions, profile
from pinfer.train import TrainOptions, train

DATA = Path(__file__).resolve().parent / "data"
HELDOUT, PROFILED = DATA / "heldout.txt", DATA / "profile.txt"

TINY = ["tiny-relu2.gguf", "tiny-reglu.gguf"]
REFERENCE = {"tiny-relu2.gguf": "libllama", "tiny-reglu.gguf": "pinfer"}


@pytest.mark.parametrize("name", TINY)
def test_predicted_mode_stays_close_to_the_model(name: str, copy_model: Callable[[str], Path]) -> None:
    """KL divergence from dense at most 0.02, and the same next token in 97 of 100 positions."""
    path = copy_model(name)
    profile(path, ProfileOptions(str(PROFILED), 16384, n_threads=2))
    learnt = train(path, TrainOptions())
    assert any(layer.kind != "none" for layer in learnt.layers)
    report = evaluate(path, EvalOptions(text=HELDOUT, n_tokens=1500, n_threads=1))
    print(f"\n{name}: {report}")
    assert report.mode == "predicted"
    assert report.reference == REFERENCE[name]
    assert report.tokens == 1500
    assert report.kl_mean <= 0.02
    assert report.top1_agreement >= 0.97
    assert report.active <= report.computed < 1
    # The share computed on new text is the one that training reported.
    assert report.computed == pytest.approx(learnt.candidates, abs=0.05)
    assert report.perplexity_sparse == pytest.approx(report.perplexity_dense, rel=0.02)

    exact = evaluate(path, EvalOptions(text=HELDOUT, n_tokens=200, exact=True, n_threads=1))
    assert exact.mode == "exact"
    assert exact.computed == 1.0
    assert exact.kl_mean < 1e-5 < report.kl_mean


@pytest.mark.parametrize("name", TINY)
def test_exact_mode_is_dense_and_perplexity_is_that_of_an_independent_pass(
    name: str, copy_model: Callable[[str], Path]
) -> None:
    path = copy_model(name)
    report = evaluate(path, EvalOptions(text=HELDOUT, n_tokens=150, n_ctx=64, n_threads=1))
    assert (report.mode, report.reference) == ("exact", REFERENCE[name])
    assert report.kl_mean < 1e-5
    assert report.kl_p99 < 1e-4
    assert report.top1_agreement >= 0.99  # two tokens may be equally likely up to rounding
    assert report.computed == 1.0
    assert 0 < report.active < 1

    from pinfer.hub.corpus import open_corpus
    from pinfer.llama.engine import Engine
    from pinfer.profile import windows_of

    reference = Reference(path)
    losses: list[float] = []
    with Engine(path, n_ctx=64, n_threads=1) as engine:
        windows = list(windows_of(engine, open_corpus(str(HELDOUT)).documents(), 64))
    for window in windows:
        cut = window[: 150 - len(losses) + 1]
        logits = np.asarray(reference.forward(cut[:-1]).logits, dtype=np.float64)
        log_p = logits - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True))
        log_p -= logits.max(1, keepdims=True)
        losses += list(-log_p[np.arange(len(cut) - 1), cut[1:]])
        if len(losses) == 150:
            break
    assert report.tokens == len(losses) == 150
    assert report.perplexity_dense == pytest.approx(math.exp(np.mean(losses)), rel=2e-3)
    assert report.perplexity_sparse == pytest.approx(math.exp(np.mean(losses)), rel=2e-3)


def test_engines_that_take_turns_measure_the_same(tiny_relu2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = EvalOptions(text=HELDOUT, n_tokens=100, n_ctx=32, n_threads=1)
    at_once = evaluate(tiny_relu2, options)
    monkeypatch.setattr(stage, "_KEPT_BYTES", 1)
    assert evaluate(tiny_relu2, options) == at_once


def test_short_text_is_used_whole(tiny_relu2: Path, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("The river runs through the town.")
    report = evaluate(tiny_relu2, EvalOptions(text=text, n_tokens=5000, n_threads=1))
    assert report.tokens < 20
    assert report.tokens_wanted == 5000
    assert json.loads(json.dumps(report.to_json(), allow_nan=False))["tokens"] == report.tokens


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("", {}, "has no text to predict"),
        ("Some text.", {"n_tokens": 0}, "nothing to predict"),
        ("Some text.", {"n_ctx": 1}, "nothing to predict"),
        (None, {}, "no such file"),
    ],
)
def test_what_cannot_be_measured(
    tiny_relu2: Path, tmp_path: Path, text: str | None, options: dict[str, Any], message: str
) -> None:
    path = tmp_path / "a.txt"
    if text is not None:
        path.write_text(text)
    with pytest.raises(PinferError, match=message):
        evaluate(tiny_relu2, EvalOptions(text=path, **options))


def test_damaged_predictor_is_named(tiny_relu2: Path) -> None:
    folder = tiny_relu2.with_name("tiny-relu2.gguf.pinfer")
    folder.mkdir()
    (folder / paths.PREDICTOR).write_bytes(b"GGUF")
    with pytest.raises(PinferError, match=r"predictor\.gguf"):
        evaluate(tiny_relu2, EvalOptions(text=HELDOUT, n_tokens=10, n_threads=1))
    assert evaluate(tiny_relu2, EvalOptions(text=HELDOUT, n_tokens=10, exact=True, n_threads=1)).tokens == 10


# -- the sums ---------------------------------------------------------------------------------------------------------


def test_divergence_and_agreement_of_known_distributions() -> None:
    p = np.array([[0.5, 0.25, 0.25], [0.8, 0.1, 0.1]], dtype=np.float32)
    q = np.array([[0.25, 0.5, 0.25], [0.8, 0.1, 0.1]], dtype=np.float32)
    totals = _Totals(n_neurons=10, n_candidates=4, n_active=3, n_hot=4)
    totals.add(np.log(p), np.log(q), [0, 1])
    report = totals.report("predicted", "libllama", 2)
    kl = 0.5 * math.log(2) + 0.25 * math.log(0.5)
    assert report.kl_mean == pytest.approx(kl / 2, rel=1e-5)
    assert report.kl_p99 == pytest.approx(0.99 * kl, rel=1e-5)
    assert report.top1_agreement == 0.5
    assert report.perplexity_dense == pytest.approx(math.exp(-(math.log(0.5) + math.log(0.1)) / 2), rel=1e-5)
    assert report.perplexity_sparse == pytest.approx(math.exp(-(math.log(0.25) + math.log(0.1)) / 2), rel=1e-5)
    assert (report.computed, report.active) == (0.8, 0.5)  # four of ten were hot


@given(st.lists(st.lists(st.floats(-500, 500, width=32), min_size=3, max_size=3), min_size=1, max_size=5))
def test_log_probabilities_sum_to_one(rows: list[list[float]]) -> None:
    log_p = _log_probabilities(np.array(rows, dtype=np.float32))
    np.testing.assert_allclose(np.exp(log_p).sum(axis=1), 1, rtol=1e-5)


@given(st.lists(st.integers(2, 40), min_size=1, max_size=20), st.integers(1, 200))
def test_chunks_hold_every_window_once_in_order(lengths: list[int], row_bytes: int) -> None:
    windows = [[i] * n for i, n in enumerate(lengths)]
    chunks = list(_chunks(windows, row_bytes))
    assert [w for chunk in chunks for w in chunk] == windows
    assert all(chunks)
