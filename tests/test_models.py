"""The shipped models and the synthetic ones: their properties, and that they compute what they claim."""

from __future__ import annotations

import dataclasses
import hashlib
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from pinfer.llama.engine import Engine

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from models import synth, tiny_text  # noqa: E402
from models.reference import MixtureReference, MixtureResult, Reference  # noqa: E402
from models.synth import SynthOptions  # noqa: E402

SHIPPED = {
    "tiny-relu2": ("arcee", "relu2"),
    "tiny-reglu": ("llama", "reglu"),
    "tiny-moe": ("nemotron_h_moe", "relu2"),
}
MIXTURES = ("tiny-moe",)
STOCK = {"llama": "swiglu", "arcee": "relu2", "falcon": "gelu", "gpt2": "gelu"}  # the activation that libllama applies
PARAMETERS = {
    "afm-4.5b": 4.5e9,
    "llama-7b": 6.74e9,
    "falcon-7b": 7.2e9,
    "opt-6.7b": 6.7e9,
    "opt-30b": 30e9,
    "falcon-40b": 41.5e9,
    "llama-70b": 69e9,
    "nemotron-3-nano": 31.6e9,
    "nemotron-h-9b": 8.9e9,
    "smallthinker-21b": 21.5e9,
    "turbosparse-mixtral": 46.7e9,
    "rwkv7-7.2b": 7.2e9,
}


# -- synthetic models --------------------------------------------------------------------------------------------------


@given(
    n_ff=st.sampled_from([256, 768, 11008]),
    active=st.floats(0.03, 0.3),
    hot_share=st.floats(0.15, 0.5),
)
@settings(max_examples=15, deadline=None)
def test_frequencies_follow_the_wanted_law(n_ff: int, active: float, hot_share: float) -> None:
    if active / 0.95 > hot_share / 0.8 * 0.9:
        return  # the hot neurons would need a frequency above 1
    p = synth.frequency_profile(n_ff, active, hot_share)
    assert np.all(np.diff(p) <= 0)
    assert p.max() <= 0.95
    assert p.mean() == pytest.approx(active, rel=0.01)
    n_hot = np.searchsorted(np.cumsum(p), 0.8 * p.sum()) + 1
    assert n_hot / n_ff == pytest.approx(hot_share, abs=0.01 + 1 / n_ff)


@pytest.mark.parametrize(
    ("arch", "activation"),
    [
        ("llama", "reglu"),
        ("llama", "drelu"),
        ("arcee", "relu2"),
        ("arcee", "relu"),
        ("falcon", "relu"),
        ("gpt2", "relu"),
    ],
)
def test_planted_frequencies_are_measured_in_every_layer(arch: str, activation: str, tmp_path: Path) -> None:
    options = SynthOptions(arch=arch, activation=activation, n_ff=512, n_layer=5, n_vocab=4096, n_threads=2)
    path = tmp_path / "synth.gguf"
    synth.write_model(path, options)
    model = Reference(path, dtype=np.float32)
    planted = synth.planted_frequencies(path)
    assert len(planted) == options.n_layer
    n_windows, n_window = 10, 200
    counts = np.zeros((options.n_layer, options.n_ff))
    rng = np.random.default_rng(3)
    for _ in range(n_windows):
        result = model.forward(rng.integers(0, options.n_vocab, n_window).tolist())
        counts += [result.fired(layer).sum(0) for layer in range(options.n_layer)]
    n = n_windows * n_window
    for layer, p in enumerate(planted):
        frequency = counts[layer] / n
        assert p.mean() == pytest.approx(options.active, rel=0.01)
        assert frequency.mean() == pytest.approx(options.active, rel=0.05)
        # Deviations in units of the sampling error; drelu's gate and up are only nearly independent at this width.
        deviation = (frequency - p) / np.sqrt(p * (1 - p) / n + 1e-5)
        limit = 1.6 if activation == "drelu" else 1.35
        assert np.sqrt((deviation**2).mean()) < limit, f"layer {layer}: worst {np.abs(frequency - p).max():.3f}"


def test_active_fraction_and_hot_share_can_be_set(tmp_path: Path) -> None:
    path = tmp_path / "synth.gguf"
    synth.write_model(path, SynthOptions(active=0.2, hot_share=0.4, n_ff=1024, n_layer=1, n_threads=1))
    (p,) = synth.planted_frequencies(path)
    falling = np.sort(p)[::-1]
    assert p.mean() == pytest.approx(0.2, rel=0.01)
    assert falling[:410].sum() / p.sum() == pytest.approx(0.8, abs=0.01)
    assert not np.array_equal(p, falling), "neurons must not lie in the order of their frequency"


def test_the_file_depends_only_on_the_seed(tmp_path: Path) -> None:
    def digest(name: str, **changes: Any) -> str:
        path = tmp_path / "same-name.gguf"
        synth.write_model(path, dataclasses.replace(SynthOptions(type="Q4_0", n_vocab=512), **changes))
        return hashlib.sha256(path.read_bytes()).hexdigest()

    first = digest("a", n_threads=1)
    assert digest("b", n_threads=3) == first
    assert digest("c", n_threads=1, seed=2) != first


def test_writing_streams(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(synth, "CHUNK_ELEMENTS", 1 << 16)
    path = tmp_path / "synth.gguf"
    options = SynthOptions(n_ff=4096, n_layer=6, n_vocab=8192, n_threads=1)
    tracemalloc.start()
    try:
        synth.write_model(path, options)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert path.stat().st_size > 40e6
    assert peak < 15e6, f"{peak / 1e6:.0f} MB for a file of {path.stat().st_size / 1e6:.0f} MB"


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "synth.gguf"
    path.write_bytes(b"old")

    def stop(n: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        synth.write_model(path, SynthOptions(n_threads=1), stop)
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.glob("*.gguf*")] == ["synth.gguf"]


@pytest.mark.parametrize("name", synth.PRESETS)
def test_presets_have_the_size_of_their_models(name: str) -> None:
    options = synth.PRESETS[name]
    options.check()
    n_parameters = synth.size_of(dataclasses.replace(options, type="F16")) / 2
    assert n_parameters == pytest.approx(PARAMETERS[name], rel=0.04)
    for kind in synth.TYPES:
        assert synth.size_of(dataclasses.replace(options, type=kind)) > 0


@pytest.mark.parametrize(
    "changes",
    [
        {"arch": "mamba"},
        {"arch": "rwkv7", "activation": "relu2"},
        {"arch": "smallthinker"},
        {"arch": "arcee", "mixture": synth.Mixture(8, 2)},
        {"mixture": synth.Mixture(8, 5)},
        {"arch": "nemotron_h", "pattern": "*-", "mamba": synth.Mamba(256, 4)},
        {"arch": "nemotron_h", "pattern": "ME", "mamba": synth.Mamba(256, 4)},
        {"arch": "arcee", "activation": "reglu"},
        {"arch": "llama", "activation": "relu"},
        {"type": "Q3_K"},
        {"n_head": 5},
        {"n_vocab": 100},
        {"active": 0.9},
    ],
)
def test_impossible_shapes_are_refused(changes: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        synth.write_model(tmp_path / "never.gguf", dataclasses.replace(SynthOptions(), **changes))
    assert not (tmp_path / "never.gguf").exists()


def test_command_line_of_synth(tmp_path: Path) -> None:
    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(ROOT / "models" / "synth.py"), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    out = tmp_path / "synth.gguf"
    done = call(str(out), "--arch", "gpt2", "--type", "q4_k", "--n-layer", "1", "--n-ff", "512")
    assert done.returncode == 0, done.stderr
    types = {t.name: t.tensor_type.name for t in GGUFReader(str(out)).tensors}
    assert types["blk.0.ffn_up.weight"] == types["blk.0.ffn_down.weight"] == "Q4_K"
    assert types["blk.0.ffn_up.bias"] == "F32"
    refused = call(str(out), "--n-head", "3")
    assert refused.returncode == 1
    assert refused.stderr.count("\n") == 1
    assert refused.stderr.startswith("error: ")


@pytest.mark.parametrize("kind", synth.TYPES)
@pytest.mark.parametrize("arch", STOCK)
def test_libllama_loads_and_computes_synthetic_models(arch: str, kind: str, tmp_path: Path) -> None:
    path = tmp_path / "synth.gguf"
    options = SynthOptions(arch=arch, type=kind, n_ff=512, n_vocab=512, tied=arch == "gpt2", output=0.3, n_threads=1)
    synth.write_model(path, options)
    expected_model = Reference(path, activation=STOCK[arch])
    with Engine(path, n_ctx=64, n_threads=1) as engine:
        tokens = engine.tokenize("The quick brown fox, 12 dogs!")
        assert engine.detokenize(tokens[1:]) == "The quick brown fox, 12 dogs!"
        logits = engine.decode(tokens, logits=True)
    expected = expected_model.forward(tokens).logits
    # Quantised products round the activations to 8 bits as well.
    limit = {"F32": 1e-6, "F16": 1e-5}.get(kind, 3e-3)
    assert nmse(logits, expected) < limit


# -- shipped models ----------------------------------------------------------------------------------------------------


def nmse(got: NDArray[Any], expected: NDArray[Any]) -> float:
    """Squared error relative to the expected squares."""
    return float(((got - expected) ** 2).sum() / (expected**2).sum())


@pytest.fixture(scope="module", params=sorted(SHIPPED))
def shipped(request: pytest.FixtureRequest) -> str:
    """Name of a shipped model."""
    return str(request.param)


@pytest.fixture(scope="module")
def vectors(shipped: str) -> dict[str, NDArray[Any]]:
    """What PyTorch computed for the model."""
    with np.load(ROOT / "tests" / "vectors" / f"{shipped}.npz") as saved:
        return dict(saved)


@pytest.fixture(scope="module")
def reference(shipped: str) -> Reference:
    """The numpy forward pass of the model."""
    path = ROOT / "models" / f"{shipped}.gguf"
    return MixtureReference(path) if shipped in MIXTURES else Reference(path)


def test_shipped_models_have_the_documented_properties(shipped: str) -> None:
    path = ROOT / "models" / f"{shipped}.gguf"
    arch, activation = SHIPPED[shipped]
    fields = GGUFReader(str(path)).fields
    assert path.stat().st_size <= 25e6
    assert fields["general.architecture"].contents() == arch
    assert fields["pinfer.ffn.activation"].contents() == activation
    if shipped in MIXTURES:
        return
    for key in ("embedding_length", "feed_forward_length"):
        assert fields[f"{arch}.{key}"].contents() % 256 == 0, "K-quants need whole blocks"


def test_tokenizer_ids_are_those_of_the_training(
    shipped: str, vectors: dict[str, NDArray[Any]], tmp_path: Path
) -> None:
    texts = vectors["sample_text"].tobytes().decode().split("\0")
    ends = np.cumsum(vectors["sample_lengths"])
    with Engine(ROOT / "models" / f"{shipped}.gguf", n_ctx=64, n_threads=1) as engine:
        for text, expected in zip(texts, np.split(vectors["sample_ids"], ends[:-1]), strict=True):
            assert engine.tokenize(text, bos=False) == expected.tolist(), text


def test_reference_agrees_with_pytorch(reference: Reference, vectors: dict[str, NDArray[Any]]) -> None:
    for number in range(4):
        logits = reference.forward(vectors[f"prompt_{number}"]).logits[-1]
        assert nmse(logits, vectors[f"logits_{number}"]) < 1e-9


def test_recorded_continuations_are_greedy(reference: Reference, vectors: dict[str, NDArray[Any]]) -> None:
    for number in range(4):
        prompt, continuation = vectors[f"prompt_{number}"], vectors[f"continuation_{number}"]
        logits = reference.forward([*prompt, *continuation]).logits
        assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == continuation.tolist()


def windows_of(vectors: dict[str, NDArray[Any]]) -> list[NDArray[Any]]:
    """The windows of held-out text on which firing was counted."""
    return np.split(vectors["text_tokens"], np.cumsum(vectors["text_lengths"])[:-1])


def test_activity_on_held_out_text(reference: Reference, vectors: dict[str, NDArray[Any]]) -> None:
    counts = np.zeros_like(vectors["counts"])
    routed, fired = (np.zeros_like(vectors.get(key, counts)) for key in ("chosen", "expert_counts"))
    for window in windows_of(vectors):
        result = reference.forward(window)
        counts += np.stack([(f != 0).sum(0) for f in result.neurons if f is not None]).astype(counts.dtype)
        if isinstance(result, MixtureResult):
            routing = [choice for choice in result.routing if choice is not None]
            n_expert = routed.shape[1]
            routed += np.stack([choice.counts(n_expert) for choice in routing]).astype(routed.dtype)
            fired += np.stack([[c.fired(e).sum(0) for e in range(n_expert)] for c in routing]).astype(fired.dtype)
    n_tokens = vectors["text_lengths"].sum()
    # With other rounding, a few neurons near zero may fall on the other side.
    assert np.abs(counts - vectors["counts"]).sum() <= 1e-5 * n_tokens * counts.size + 5
    if "chosen" not in vectors:
        assert counts.mean() / n_tokens <= 0.15
        return
    # Another choice of a router changes the neurons of a whole expert, and the rest of the window a little.
    assert np.abs(routed - vectors["chosen"]).sum() <= 1e-4 * vectors["chosen"].sum() + 2
    assert np.abs(fired - vectors["expert_counts"]).sum() <= 1e-4 * vectors["expert_counts"].sum() + 50


# -- the shipped mixture -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mixture_vectors() -> dict[str, NDArray[Any]]:
    """What PyTorch computed for tiny-moe."""
    with np.load(ROOT / "tests" / "vectors" / "tiny-moe.npz") as saved:
        return dict(saved)


def test_stock_libllama_reaches_the_perplexity_of_pytorch(mixture_vectors: dict[str, NDArray[Any]]) -> None:
    """Stock libllama computes the mixture correctly, all at once and token by token."""
    losses = []
    with Engine(ROOT / "models" / "tiny-moe.gguf", n_ctx=256, n_threads=1) as engine:
        for n_batch in (256, 1):
            windows = windows_of(mixture_vectors)[: 9 if n_batch > 1 else 1]
            for window in windows:
                engine.clear()
                pieces = np.split(window, range(n_batch, len(window), n_batch))
                logits = np.concatenate([engine.decode(piece.tolist(), logits=True) for piece in pieces])[:-1]
                logits -= logits.max(1, keepdims=True)
                of_next = logits[np.arange(len(logits)), window[1:]]
                losses.append(np.log(np.exp(logits).sum(1)) - of_next)
    assert np.exp(np.concatenate(losses[:-1]).mean()) == pytest.approx(float(mixture_vectors["perplexity"]), rel=0.01)
    assert losses[-1].mean() == pytest.approx(losses[0].mean(), rel=0.01)


def test_routing_of_the_mixture_is_real(mixture_vectors: dict[str, NDArray[Any]]) -> None:
    """Every expert is used, some far more than others, and most neurons stay silent."""
    chosen, fired = mixture_vectors["chosen"], mixture_vectors["expert_counts"]
    for layer, counts in enumerate(chosen):
        shares = np.sort(counts / counts.sum())[::-1]
        assert shares[-1] > 0, f"layer {layer}: {shares}"
        assert 1.5 / len(shares) < shares[0] < 0.45, f"layer {layer}: {shares}"
        active = fired[layer].sum() / (counts.sum() * fired.shape[2])
        assert 0.03 <= active <= 0.30, f"layer {layer}: {active:.3f}"


# -- text of the recipe ------------------------------------------------------------------------------------------------


def test_case_is_restored() -> None:
    names = tiny_text.learn_names(["One day Lily and Tom saw her Mom. They said that Lily ran, and I saw Tom and Mom."])
    lower = (
        'once upon a time, lily met a dog named rex. "can i play?" asked lily. rex said, "yes!" they ran.\n\n'
        'the end of "rex and tom".'
    )
    assert tiny_text.restore_case(lower, names) == (
        'Once upon a time, Lily met a dog named Rex. "Can I play?" asked Lily. Rex said, "Yes!" They ran.\n\n'
        'The end of "Rex and Tom".'
    )


def test_held_out_documents_do_not_depend_on_case_or_layout() -> None:
    documents = [f"Story {n * 7919} of the\nold house, told by {chr(97 + n % 26) * (n % 9 + 1)}" for n in range(2000)]
    held = [tiny_text.is_held_out(d, 0.1) for d in documents]
    assert 0.05 < np.mean(held) < 0.2
    assert held == [tiny_text.is_held_out(d.lower().replace("\n", " "), 0.1) for d in documents]


def test_windows_begin_with_end_of_text_and_hold_the_text() -> None:
    tokens = np.arange(5000, dtype=np.uint16) % 1000 + 1
    starts = np.arange(0, 5000, 100)
    tokens[starts] = tiny_text.END_OF_TEXT
    stream = tiny_text.TokenStream(1.0, tokens, starts.astype(np.int64))
    rows = tiny_text.WindowSampler([stream], 64, seed=1).draw(200)
    assert rows.shape == (200, 65)
    assert np.all(rows[:, 0] == tiny_text.END_OF_TEXT)
    joined = tokens.tobytes()
    assert all(row[1:].astype(np.uint16).tobytes() in joined for row in rows)
    at_start = np.mean([row[1] % 100 == 2 for row in rows])  # the token after a document's first separator
    assert 0.35 < at_start < 0.65
    again = tiny_text.WindowSampler([stream], 64, seed=1).draw(200)
    assert np.array_equal(rows, again)
