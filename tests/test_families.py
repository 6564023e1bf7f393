"""Converted checkpoints of every family give the logits and text of the originals (see tests/checkpoints/README.md).

Attention is computed in F32 here, so that only the FFN and the conversion can cause differences: at F32 the logits
agree to rounding. FATReLU jumps at its threshold, so rounding at F16 switches single neurons on or off.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from support.changed_checkpoint import CHECKPOINTS, changed_checkpoint
from support.checkpoint_cases import HYBRIDS_AND_MIXTURES
from support.command_line import CommandLine
from support.shards import nmse, write_shards

from pinfer.conversion.checkpoint import open_checkpoint
from pinfer.convert import ConvertOptions, convert
from pinfer.errors import PinferError
from pinfer.llama.engine import ALWAYS_DENSE, Engine, PluginConfig
from pinfer.llama.plugin import load_plugin
from pinfer.model import open_model
from pinfer.placement.model_bytes import hot_buffers
from pinfer.profile import ProfileOptions, profile
from pinfer.progress import NULL_PROGRESS
from pinfer.solve import SolveOptions, solve
from pinfer.split import SplitOptions, split
from pinfer.train import TrainOptions, train

CASES = sorted({path.parent.name for path in CHECKPOINTS.glob("*/reference.npz")} - set(HYBRIDS_AND_MIXTURES))
TOLERANCE = {"f32": 1e-6, "f16": 1e-4}
N_PROMPTS = 3

Tensor = NDArray[np.float32]

ARCHITECTURES = {
    "opt": ("gpt2", "relu"),
    "falcon": ("falcon", "relu"),
    "llama": ("llama", "reglu"),
    "sparsellama": ("llama", "reglu"),
    "bamboo": ("llama", "drelu"),
    "minicpm": ("minicpm", "reglu"),
    "arcee": ("arcee", "relu2"),
    "nemotron": ("nemotron", "relu2"),
    "plm": ("plm", "relu2"),
    "jais2": ("jais2", "relu2"),
}


@dataclass(frozen=True)
class Reference:
    """What the original computes for one prompt."""

    prompt: list[int]
    logits: NDArray[np.float32]
    """of every position, ``[len(prompt), n_vocab]``"""
    greedy: list[int]


def references(case: str) -> list[Reference]:
    with np.load(CHECKPOINTS / case / "reference.npz") as saved:
        return [
            Reference(saved[f"prompt_{i}"].tolist(), saved[f"logits_{i}"], saved[f"greedy_{i}"].tolist())
            for i in range(N_PROMPTS)
        ]


def converted(case: str, type_: str, folder: Path) -> Path:
    out = folder / f"{case}-{type_}.gguf"
    return convert(CHECKPOINTS / case, ConvertOptions(out=out, type=type_), NULL_PROGRESS).path


def configurations(path: Path) -> Iterator[tuple[str, PluginConfig]]:
    plugin = PluginConfig.of(open_model(path))
    yield "no shards", plugin
    yield "dense", replace(plugin, n_batch_dense=ALWAYS_DENSE)
    for share in (0.0, 0.5, 1.0):
        shards = write_shards(path, share)
        yield f"hot {share:.0%}", replace(plugin, hot=shards.hot, cold=shards.cold, device="CPU")


def check(engine: Engine, reference: Reference, tolerance: float, label: str) -> None:
    """The prompt at once, in batches of 5 and token by token, and the greedy continuation."""
    for n in (len(reference.prompt), 5, 1):
        engine.clear()
        pieces = [reference.prompt[i : i + n] for i in range(0, len(reference.prompt), n)]
        logits = np.concatenate([engine.decode(piece, logits=True) for piece in pieces])
        error = nmse(logits, reference.logits)
        assert error <= tolerance, f"{label}, batches of {n}: NMSE {error:.2g}"
    tokens = [int(logits[-1].argmax())]
    while len(tokens) < len(reference.greedy):
        tokens.append(int(engine.decode(tokens[-1:])[0].argmax()))
    assert tokens == reference.greedy, label


@pytest.mark.parametrize("type_", ["f32", "f16"])
@pytest.mark.parametrize("case", CASES)
def test_converted_gives_what_the_original_gives(case: str, type_: str, tmp_path: Path) -> None:
    path = converted(case, type_, tmp_path)
    model = open_model(path)
    checkpoint = open_checkpoint(CHECKPOINTS / case)
    assert (model.arch, model.activation) == ARCHITECTURES[checkpoint.model_type]
    has_threshold = checkpoint.config.get("hidden_act") == "fatrelu"
    assert model.activation_threshold == pytest.approx(checkpoint.config["hidden_act_param"] if has_threshold else 0)
    counters = load_plugin()
    for label, plugin in configurations(path):
        with Engine(path, plugin=plugin, n_ctx=96, n_threads=1, f32_attention=True) as engine:
            counters.reset_stats()
            for i, reference in enumerate(references(case)):
                check(engine, reference, TOLERANCE[type_], f"{case} {type_}, {label}, prompt {i}")
            stats = counters.stats()
        assert stats.n_fallback == 0, f"{label}: parts of the FFN were not recognised"
        if label != "dense":
            n_cold = stats.n_neurons - stats.n_hot
            assert n_cold * 0.02 < stats.n_active < n_cold * 0.98 or n_cold == 0, f"{label}: nothing was skipped"


@pytest.mark.parametrize("case", CASES)
def test_stock_libllama_opens_what_is_written(case: str, tmp_path: Path) -> None:
    """Without the plugin, architectures with this activation give the same logits, the others do not."""
    path = converted(case, "f32", tmp_path)
    model = open_model(path)
    reference = references(case)[0]
    with Engine(path, n_ctx=96, n_threads=1, f32_attention=True) as engine:
        error = nmse(engine.decode(reference.prompt, logits=True), reference.logits)
    is_native = load_plugin().arch_activation(model.arch) == model.activation
    assert (error <= TOLERANCE["f32"]) == is_native


def first_logits(checkpoint: Path, reference: Reference, out: Path) -> Tensor:
    path = convert(checkpoint, ConvertOptions(out=out, type="f32"), NULL_PROGRESS).path
    with Engine(path, plugin=PluginConfig.of(open_model(path)), n_ctx=96, n_threads=1, f32_attention=True) as engine:
        return engine.decode(reference.prompt, logits=True)


def test_arcee_with_attention_biases(tmp_path: Path) -> None:
    """Biases of 0 change nothing; a bias of the values does."""
    reference = references("arcee")[0]

    def biased(value: float) -> Path:
        def add(tensors: dict[str, Tensor]) -> None:
            for name in [
                name for name in tensors if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight"))
            ]:
                size = value if "v_proj" in name else 0.0
                tensors[name.replace("weight", "bias")] = np.full(len(tensors[name]), size, np.float32)

        return changed_checkpoint("arcee", tmp_path / str(value), {"attention_bias": True}, add)

    assert nmse(first_logits(biased(0.0), reference, tmp_path / "0.gguf"), reference.logits) <= TOLERANCE["f32"]
    assert nmse(first_logits(biased(0.5), reference, tmp_path / "1.gguf"), reference.logits) > 100 * TOLERANCE["f32"]


@pytest.mark.parametrize(
    ("source", "name"), [("self_attn.o_proj", "attn_output"), ("mlp.up_proj", "ffn_up"), ("mlp.down_proj", "ffn_down")]
)
def test_arcee_with_biases_that_libllama_does_not_add(source: str, name: str, tmp_path: Path) -> None:
    def add(tensors: dict[str, Tensor]) -> None:
        rows = len(tensors[f"model.layers.0.{source}.weight"])
        tensors[f"model.layers.0.{source}.bias"] = np.zeros(rows, np.float32)

    checkpoint = changed_checkpoint("arcee", tmp_path, {}, add)
    with pytest.raises(PinferError, match=f"has biases in {name}, libllama's arcee adds none there"):
        convert(checkpoint, ConvertOptions(out=tmp_path / "out.gguf"), NULL_PROGRESS)
    assert not (tmp_path / "out.gguf").exists()


def test_jais2_without_biases_gets_zeros(tmp_path: Path) -> None:
    reference = references("jais2")[0]
    parts = ("o_proj.bias", "up_proj.bias", "down_proj.bias")

    def zero(tensors: dict[str, Tensor]) -> None:
        tensors |= {name: np.zeros_like(values) for name, values in tensors.items() if name.endswith(parts)}

    def remove(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.endswith(parts)]:
            del tensors[name]

    zeros = first_logits(changed_checkpoint("jais2", tmp_path / "zero", {}, zero), reference, tmp_path / "0.gguf")
    without = first_logits(changed_checkpoint("jais2", tmp_path / "none", {}, remove), reference, tmp_path / "1.gguf")
    assert (zeros == without).all()
    assert nmse(without, reference.logits) > 100 * TOLERANCE["f32"], "the biases mattered"


def test_every_family_has_a_case() -> None:
    assert {open_checkpoint(CHECKPOINTS / case).model_type for case in CASES} == set(ARCHITECTURES)


def test_opt_350m_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PinferError, match="post-norm"):
        converted("opt-350m", "f16", tmp_path)


@pytest.mark.parametrize("case", ["opt", "falcon-40b", "prosparse", "bamboo", "minicpm-s", "nemotron", "plm", "jais2"])
def test_whole_pipeline(case: str, tmp_path: Path) -> None:
    """From the checkpoint to the runner: exact mode with shards generates the same tokens."""
    path = converted(case, "f16", tmp_path)
    text = Path(__file__).parent / "data" / "profile.txt"
    profile(path, ProfileOptions(dataset=str(text), n_tokens=768, n_ctx=64, n_threads=1))
    train(path, TrainOptions())
    model = open_model(path)
    room = sum(tensor.n_bytes for tensor in model.tensors if ".ffn_" in tensor.name) // 2
    solve(path, SolveOptions(vram=hot_buffers(model, model.n_ff) + room, device="CPU"))
    split(path, SplitOptions(verify=True))
    command = CommandLine(tmp_path / "work", tmp_path / "home")
    with Engine(path, plugin=PluginConfig.of(open_model(path)), n_ctx=64, n_threads=1) as engine:
        prompt = engine.tokenize("Once upon a time")
        words = engine.generate(prompt, 12)
    for flag, mode in (("--exact", "exact"), (None, "predicted")):
        flags = [flag] if flag else []
        ran = command("run", path, "-p", "Once upon a time", "-n", "12", "--temp", "0", "-c", "64", "--json", *flags)
        assert ran.code == 0, ran.err
        report = json.loads(ran.out)
        assert (report["mode"], report["prompt_tokens"], report["n_fallback"]) == (mode, prompt, 0)
        assert report["hot"] > 0
        if mode == "exact":
            assert report["tokens"] == words[: len(report["tokens"])]
            assert report["n_gen"] > 0
        else:
            assert 0 < report["candidates"] <= 1
