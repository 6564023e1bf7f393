"""Profile: the counts are those of an independent forward pass, and nothing that was counted is lost."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.reference import Reference
from models.synth import planted_frequencies
from pinfer.artefacts import paths
from pinfer.artefacts.artefact import ArtefactWriter
from pinfer.artefacts.profile import ProfileFile, SamplesFile
from pinfer.errors import PinferError
from pinfer.gguf_io.writer import replace_together
from pinfer.llama.engine import Engine, PluginConfig
from pinfer.llama.plugin import Stats, load_plugin
from pinfer.model import Model, open_model
from pinfer.profile import ProfileOptions, ProfileReport, _stride, profile, share_of_most, windows_of

TEXT = Path(__file__).resolve().parent / "data" / "profile.txt"


class Notes:
    """A progress that keeps what was said."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.advanced = 0
        self.total = 0

    @contextmanager
    def task(self, label: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
        assert (label, unit) == ("profile", "tokens")
        self.total = total

        def advance(n: int) -> None:
            self.advanced += n

        yield advance

    def note(self, text: str) -> None:
        self.lines.append(text)


def _read(report: ProfileReport, model: Model) -> tuple[ProfileFile, SamplesFile]:
    assert report.samples_path is not None
    return ProfileFile.read(report.path, model), SamplesFile.read(report.samples_path, model)


def _windows(path: Path, n_tokens: int, n_ctx: int, text: Path = TEXT) -> list[list[int]]:
    """The sequences that a profile of ``n_tokens`` tokens is to run, made anew."""
    from pinfer.hub.corpus import open_corpus

    windows: list[list[int]] = []
    with Engine(path, n_ctx=n_ctx, n_threads=1) as engine:
        for window in windows_of(engine, open_corpus(str(text)).documents(), n_ctx):
            left = n_tokens - sum(map(len, windows))
            if left <= 0:
                break
            windows.append(window[:left])
    return windows


@pytest.mark.parametrize("name", ["tiny-relu2.gguf", "tiny-reglu.gguf"])
def test_counts_are_those_of_an_independent_forward_pass(name: str, copy_model: Callable[[str], Path]) -> None:
    path = copy_model(name)
    model = open_model(path)
    n_tokens, n_ctx = 600, 128
    report = profile(path, ProfileOptions(str(TEXT), n_tokens, n_ctx, n_threads=2, n_samples=50))
    counted, samples = _read(report, model)
    assert (counted.tokens, report.tokens, report.interrupted) == (n_tokens, n_tokens, False)

    windows = _windows(path, n_tokens, n_ctx)
    assert [len(w) for w in windows][:4] == [n_ctx] * 4
    reference = Reference(path, dtype=np.float32)
    results = [reference.forward(window) for window in windows]
    stride = _stride(n_tokens, 50, n_ctx)
    for layer, ffn in enumerate(model.ffns):
        fired = np.concatenate([r.fired(layer) for r in results])
        expected = fired.sum(axis=0)
        # Where a product is zero to rounding, its sign is nobody's. libllama rounds x to 11 bits and keeps KV in F16,
        # and some neurons hover near zero: at most 2 % of the tokens.
        wrong = np.abs(expected - counted.count[layer])
        worst = wrong.argmax()
        assert wrong.max() <= 0.02 * n_tokens, (layer, worst, expected[worst], counted.count[layer][worst])
        assert wrong.sum() <= 1e-3 * fired.size
        mass = np.concatenate([np.abs(r.neurons[layer]) for r in results]).sum(axis=0, dtype=np.float64)
        np.testing.assert_allclose(counted.mass[layer], mass, rtol=5e-3, atol=2e-3 * mass.mean())

        x = np.concatenate([r.ffn_inputs[layer] for r in results])[::stride][:50]
        assert samples.n_samples == len(x) == 50
        np.testing.assert_allclose(samples.x(ffn), x, rtol=2e-3, atol=6e-3)
        assert (samples.active(ffn) != fired[::stride][:50]).mean() < 1e-3


def test_planted_frequencies_come_back(synthetic: Path) -> None:
    text = synthetic.with_name("text.txt")
    rng = np.random.default_rng(0)
    text.write_text(" ".join("".join(rng.choice(list("abcdefghijklmnop"), 4)) for _ in range(6000)))
    report = profile(synthetic, ProfileOptions(str(text), 4096, n_threads=2, n_samples=0))
    assert report.samples_path is None
    counted = ProfileFile.read(report.path, open_model(synthetic))
    for layer, planted in enumerate(planted_frequencies(synthetic)):
        measured = counted.count[layer] / counted.tokens
        # Tokens repeat, so the sample is smaller than its length: a neuron is off by a few hundredths at most.
        assert abs(measured.mean() - planted.mean()) < 0.02, layer
        assert np.abs(measured - planted).mean() < 0.03, layer
        assert np.corrcoef(measured, planted)[0, 1] > 0.98, layer
    assert report.active == pytest.approx(0.10, abs=0.02)
    assert report.most == pytest.approx(0.22, abs=0.05)


def test_report_says_what_the_counts_say(tiny_relu2: Path) -> None:
    notes = Notes()
    report = profile(tiny_relu2, ProfileOptions(str(TEXT), 700, n_threads=2, n_samples=8), notes)
    assert (notes.advanced, notes.total) == (700, 700)
    counted, _ = _read(report, open_model(tiny_relu2))
    assert report.active == pytest.approx(np.mean(counted.count) / 700)
    assert report.most == pytest.approx(share_of_most(np.concatenate(counted.count)))
    for layer in report.layers:
        assert layer.active == pytest.approx(counted.count[layer.layer].mean() / 700)
        assert layer.never == (counted.count[layer.layer] == 0).mean()
    plain = json.loads(json.dumps(report.to_json(), allow_nan=False))
    assert plain["tokens"] == 700
    assert len(plain["layers"]) == len(report.layers)


def test_two_profiles_of_one_text_are_equal(tiny_reglu: Path) -> None:
    options = ProfileOptions(str(TEXT), 300, n_threads=2, n_samples=20)
    model = open_model(tiny_reglu)
    first, first_samples = _read(profile(tiny_reglu, options), model)
    count = [c.copy() for c in first.count]
    x = [first_samples.x(ffn).copy() for ffn in model.ffns]
    second, second_samples = _read(profile(tiny_reglu, options), model)
    assert second.corpus_sha256 == first.corpus_sha256
    for layer, ffn in enumerate(model.ffns):
        np.testing.assert_array_equal(count[layer], second.count[layer])
        np.testing.assert_array_equal(x[layer], second_samples.x(ffn))


def test_text_shorter_than_asked_is_used_whole_and_said(tiny_relu2: Path, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("The river runs through the old town.\n<|endoftext|>\nA second document.\n")
    n_tokens = sum(map(len, _windows(tiny_relu2, 10**6, 256, text)))
    notes = Notes()
    report = profile(tiny_relu2, ProfileOptions(str(text), 1000, n_threads=1), notes)
    assert report.tokens == report.n_samples == n_tokens < 40
    assert report.tokens_wanted == 1000
    assert notes.lines == [f"short.txt has {n_tokens} tokens, fewer than the 1,000 asked for"]


def test_each_document_begins_anew(tiny_relu2: Path, tmp_path: Path) -> None:
    text = tmp_path / "two.txt"
    text.write_text("The river runs.\n<|endoftext|>\nThe river runs.\n")
    one, two = _windows(tiny_relu2, 10**6, 256, text)
    assert one == two
    report = profile(tiny_relu2, ProfileOptions(str(text), 1000, n_threads=1))
    model = open_model(tiny_relu2)
    counted, samples = _read(report, model)
    x = samples.x(model.ffns[3])
    assert not np.any(counted.count[-1] % 2), "the second document saw the first"
    np.testing.assert_array_equal(x[: len(one)], x[len(one) :])


def _interrupt_after(monkeypatch: pytest.MonkeyPatch, n_windows: int) -> None:
    """Press Ctrl-C before window number ``n_windows``."""
    clear = Engine.clear
    begun = 0

    def stop(self: Engine) -> None:
        nonlocal begun
        if begun == n_windows:
            signal.raise_signal(signal.SIGINT)
        begun += 1
        clear(self)

    monkeypatch.setattr(Engine, "clear", stop)


def test_interrupt_keeps_what_was_counted(tiny_relu2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _interrupt_after(monkeypatch, 3)
    notes = Notes()
    report = profile(tiny_relu2, ProfileOptions(str(TEXT), 2000, n_ctx=64, n_threads=2, n_samples=100), notes)
    assert (report.interrupted, report.tokens, report.tokens_wanted) == (True, 192, 2000)
    assert notes.lines == ["interrupted: keeping the 192 tokens that were counted"]
    counted, samples = _read(report, open_model(tiny_relu2))
    assert counted.tokens == 192
    assert samples.n_samples == report.n_samples == math.ceil(192 / _stride(2000, 100, 64))


def test_a_real_signal_ends_it_at_a_batch(tiny_relu2: Path) -> None:
    class Impatient(Notes):
        @contextmanager
        def task(self, label: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
            def advance(n: int) -> None:
                self.advanced += n
                if self.advanced >= 128:
                    signal.raise_signal(signal.SIGINT)

            yield advance

    report = profile(tiny_relu2, ProfileOptions(str(TEXT), 1000, n_ctx=64, n_threads=1), Impatient())
    assert (report.interrupted, report.tokens) == (True, 128)
    assert ProfileFile.read(report.path, open_model(tiny_relu2)).tokens == 128


def test_interrupt_while_writing_loses_nothing(tiny_relu2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def replace_slowly(writers: Sequence[ArtefactWriter]) -> None:
        signal.raise_signal(signal.SIGINT)
        replace_together(writers)

    monkeypatch.setattr("pinfer.profile.replace_together", replace_slowly)
    report = profile(tiny_relu2, ProfileOptions(str(TEXT), 64, n_threads=1))
    assert (report.interrupted, report.tokens) == (True, 64)
    assert _read(report, open_model(tiny_relu2))[0].tokens == 64


def test_interrupt_before_anything_was_counted_leaves_the_old_profile(
    tiny_relu2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = profile(tiny_relu2, ProfileOptions(str(TEXT), 64, n_threads=1))
    before = report.path.read_bytes()
    _interrupt_after(monkeypatch, 0)
    with pytest.raises(KeyboardInterrupt):
        profile(tiny_relu2, ProfileOptions(str(TEXT), 64, n_threads=1))
    assert report.path.read_bytes() == before
    assert sorted(p.name for p in report.path.parent.rglob("*")) == [".lock", "profile.gguf", "samples", "samples.gguf"]


def test_model_without_exact_zeros_is_refused(tiny_reglu: Path) -> None:
    data = tiny_reglu.read_bytes()
    key = b"pinfer.ffn.activation"
    assert data.count(key) == 1
    tiny_reglu.write_bytes(data.replace(key, b"pinfer.ffn.otherwise!"))  # now it is a plain llama: SiLU
    with pytest.raises(PinferError, match="is not known to have a ReLU-family FFN") as caught:
        profile(tiny_reglu, ProfileOptions(str(TEXT), 64))
    assert "\n" not in str(caught.value)
    assert not tiny_reglu.with_name(tiny_reglu.name + ".pinfer").exists()
    assert profile(tiny_reglu, ProfileOptions(str(TEXT), 64, activation="reglu", n_threads=1)).tokens == 64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (ProfileOptions(str(TEXT), 0), "cannot profile 0 tokens"),
        (ProfileOptions(str(TEXT), 5, n_ctx=-1), "a context of -1 tokens is not possible"),
        (ProfileOptions(str(TEXT), 5, n_ctx=1), "a context of 1 tokens is not possible"),
        (ProfileOptions(str(TEXT), 5, n_samples=-1), "cannot be negative"),
        (ProfileOptions("no-such-file", 5), "unknown data set 'no-such-file'"),
    ],
)
def test_wrong_options(tiny_relu2: Path, options: ProfileOptions, message: str) -> None:
    with pytest.raises(PinferError, match=message):
        profile(tiny_relu2, options)


def test_empty_text(tiny_relu2: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n\n")
    with pytest.raises(PinferError, match=r"empty\.txt holds no text"):
        profile(tiny_relu2, ProfileOptions(str(tmp_path / "empty.txt")))


def test_profile_of_another_model_is_refused(tiny_relu2: Path, tiny_reglu: Path) -> None:
    report = profile(tiny_relu2, ProfileOptions(str(TEXT), 16, n_threads=1))
    with pytest.raises(PinferError, match="made from another model"):
        ProfileFile.read(report.path, open_model(tiny_reglu))


def test_observing_changes_nothing(tiny_relu2: Path) -> None:
    """The last layer is computed for every token while counting, and logits stay those of stock libllama."""
    tokens = _windows(tiny_relu2, 100, 128)[0]
    with Engine(tiny_relu2, n_ctx=128, n_threads=1) as engine:
        stock = engine.decode(tokens, logits=True)
    profile(tiny_relu2, ProfileOptions(str(TEXT), 16, n_threads=1))
    with Engine(tiny_relu2, n_ctx=128, n_threads=1) as engine:
        np.testing.assert_array_equal(engine.decode(tokens, logits=True), stock)
        assert load_plugin().stats() == Stats(*[0] * 8), "an engine without the plugin was computed by it"
    with Engine(tiny_relu2, plugin=PluginConfig(activation="relu2"), n_ctx=128, n_threads=1) as engine:
        after = engine.decode(tokens, logits=True)
    assert float(((after - stock) ** 2).sum() / (stock**2).sum()) < 1e-6


@given(count=st.lists(st.integers(0, 1000), min_size=1, max_size=50))
def test_share_of_most_is_the_smallest(count: list[int]) -> None:
    share = share_of_most(np.array(count, dtype=np.int64))
    n = round(share * len(count))
    ordered = sorted(count, reverse=True)
    if sum(count) == 0:
        assert n == 0
        return
    assert sum(ordered[:n]) >= 0.8 * sum(count) - 1e-9
    assert sum(ordered[: n - 1]) < 0.8 * sum(count) + 1e-9


@given(n_tokens=st.integers(1, 10**6), n_samples=st.integers(0, 10**4), n_ctx=st.integers(1, 4096))
def test_stride_visits_every_position_and_fills_the_samples(n_tokens: int, n_samples: int, n_ctx: int) -> None:
    stride = _stride(n_tokens, n_samples, n_ctx)
    assert stride >= 1
    assert math.gcd(stride, n_ctx) == 1
    assert math.ceil(n_tokens / stride) >= min(n_samples, n_tokens)


def test_artefacts_lie_beside_the_model(tiny_relu2: Path) -> None:
    report = profile(tiny_relu2, ProfileOptions(str(TEXT), 16, n_threads=1))
    folder = tiny_relu2.with_name("tiny-relu2.gguf.pinfer")
    assert report.path == folder / paths.PROFILE
    assert report.samples_path == folder / paths.SAMPLES


def test_layers_offered_to_a_gpu_are_counted_as_well(tiny_relu2: Path) -> None:
    """The loader is told to leave the FFN with the plugin, which it would not by itself."""
    model = open_model(tiny_relu2)
    counts = []
    for n_gpu_layers in (0, 99):
        options = ProfileOptions(str(TEXT), 64, n_threads=1, n_gpu_layers=n_gpu_layers)
        counts.append(np.stack(ProfileFile.read(profile(tiny_relu2, options).path, model).count))
    np.testing.assert_array_equal(counts[0], counts[1])


# -- the engine -------------------------------------------------------------------------------------------------------


def test_engine_decodes_in_batches_as_in_one(tiny_reglu: Path) -> None:
    config = PluginConfig(activation="reglu")
    with Engine(tiny_reglu, plugin=config, n_ctx=64, n_batch=7, n_threads=1) as engine:
        tokens = engine.tokenize("A man walked along the river and saw a boat.")
        whole = engine.decode(tokens, logits=True)
        assert whole.shape == (len(tokens), engine.n_vocab)
        engine.clear()
        last = engine.decode(tokens)
        engine.clear()
        steps = np.concatenate([engine.decode([token]) for token in tokens])
    np.testing.assert_allclose(last[0], whole[-1], atol=1e-3)
    np.testing.assert_allclose(steps, whole, atol=1e-2 * whole.std())


def test_engine_writes_back_what_it_read(tiny_relu2: Path) -> None:
    text = "Once upon a time, ä ö ü 漢字 \U0001f600 <|endoftext|> there was"
    with Engine(tiny_relu2, n_ctx=64, n_threads=1) as engine:
        tokens = engine.tokenize(text)
        assert tokens[0] == engine.bos
        assert engine.bos not in tokens[1:], "a control token in a text is text"
        assert engine.detokenize(tokens[1:]) == text
        assert engine.generate(tokens, 8) == engine.generate(tokens, 8)


def test_engine_gives_the_last_words_of_libllama(tmp_path: Path, tiny_relu2: Path) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(tiny_relu2.read_bytes()[:100_000])
    with pytest.raises(PinferError, match=r"libllama cannot load .*broken\.gguf: .*model"):
        Engine(broken)
    with (
        Engine(tiny_relu2, n_ctx=32, n_threads=1) as engine,
        pytest.raises(PinferError, match=r"context of \d+ tokens is full"),
    ):
        engine.decode([1] * (engine.n_ctx + 1))
