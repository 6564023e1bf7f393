"""Decode attention at depth: with the plugin's kernel, logits and greedy tokens are stock libllama's up to rounding.

The sides are compared with the plugin on both of them and PINFER_ATTENTION=off on one, and with stock libllama.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from support.shards import nmse

from models.synth import SynthOptions, write_model

WORKER = Path(__file__).resolve().parent / "support" / "attention_worker.py"
N_VOCAB = 512
N_STEPS = 16
# NMSE of logits. ggml adds up V in F16 where the cache is F16, and rounds q to blocks of 8 bits where it is quantised.
TOLERANCE = {"f16": 1e-5, "q8_0": 1e-4, "q4_0": 1e-4}
Logits = NDArray[np.float32]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Arcee, whose ReLU² stock libllama computes: 6 heads of 64 on 2 KV heads."""
    path = tmp_path_factory.mktemp("depth") / "arcee.gguf"
    write_model(
        path, SynthOptions("arcee", n_embd=384, n_ff=768, n_layer=3, n_head=6, n_vocab=N_VOCAB, n_ctx=2048, type="F16")
    )
    return path


def tokens(n: int, seed: int) -> list[int]:
    return [int(t) for t in np.random.default_rng(seed).integers(1, N_VOCAB, n)]


def logits(
    model: Path,
    out: Path,
    depths: tuple[int, ...] = (1000,),
    *,
    plugin: bool = True,
    attention: bool = True,
    cache: tuple[str, str] = ("f16", "f16"),
    unified: bool = False,
) -> Logits:
    """[step, sequence, vocabulary] after a prompt of that length for each sequence."""
    wanted = {
        "model": str(model),
        "plugin": plugin,
        "cache": cache,
        "prompts": [tokens(n, i) for i, n in enumerate(depths)],
        "steps": [tokens(len(depths), 100 + i) for i in range(N_STEPS)],
        "unified": unified,
    }
    environment = os.environ | ({} if attention else {"PINFER_ATTENTION": "off"})
    done = subprocess.run(
        [sys.executable, WORKER, out], input=json.dumps(wanted), text=True, capture_output=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    found: Logits = np.load(out)
    return found


def check(got: Logits, expected: Logits, tolerance: float) -> None:
    """Logits agree, and so do greedy tokens unless two logits are closer than rounding can move them."""
    error = nmse(got, expected)
    assert error <= tolerance, f"NMSE {error:.2g}"
    chosen = np.take_along_axis(expected, got.argmax(2)[..., None], 2)[..., 0]
    gap = expected.max(2) - chosen
    assert gap.max() <= 4 * np.sqrt(tolerance * (expected.astype(np.float64) ** 2).mean()), f"gap {gap.max():.3g}"
    assert (gap == 0).mean() > 0.9


@pytest.mark.parametrize("cache", ["f16", "q8_0", "q4_0"])
def test_the_kernel_agrees_with_stock_at_depth(model: Path, tmp_path: Path, cache: str) -> None:
    ours = logits(model, tmp_path / "ours.npy", cache=(cache, cache))
    off = logits(model, tmp_path / "off.npy", cache=(cache, cache), attention=False)
    assert not np.array_equal(ours, off), "the kernel was not used"
    check(ours, off, TOLERANCE[cache])
    check(ours, logits(model, tmp_path / "stock.npy", cache=(cache, cache), plugin=False), TOLERANCE[cache])
    assert np.array_equal(ours, logits(model, tmp_path / "again.npy", cache=(cache, cache)))


@pytest.mark.parametrize("unified", [False, True], ids=["caches of their own", "one cache"])
def test_sequences_of_different_lengths(model: Path, tmp_path: Path, unified: bool) -> None:
    depths = (700, 20, 300)
    ours = logits(model, tmp_path / "ours.npy", depths, unified=unified)
    off = logits(model, tmp_path / "off.npy", depths, unified=unified, attention=False)
    assert not np.array_equal(ours, off), "the kernel was not used"
    check(ours, off, TOLERANCE["f16"])


@pytest.mark.parametrize("cache", [("q5_0", "q5_0"), ("bf16", "bf16"), ("f16", "q5_1")], ids="/".join)
def test_other_cache_types_are_left_to_ggml(model: Path, tmp_path: Path, cache: tuple[str, str]) -> None:
    ours = logits(model, tmp_path / "ours.npy", (700,), cache=cache)
    assert np.array_equal(ours, logits(model, tmp_path / "off.npy", (700,), cache=cache, attention=False))


def test_stock_models_keep_ggmls_attention(model: Path, tmp_path: Path) -> None:
    stock = logits(model, tmp_path / "stock.npy", (700,), plugin=False)
    assert np.array_equal(stock, logits(model, tmp_path / "off.npy", (700,), plugin=False, attention=False))
