"""Converted checkpoints of Nemotron-H and of mixtures give what the originals give (see tests/checkpoints/README.md).

Stock libllama computes Nemotron-H correctly. For TurboSparse-Mixtral, whose dReLU it does not know, the conversion is
checked with the numpy forward pass of models/reference.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader
from numpy.typing import NDArray
from support.changed_checkpoint import CHECKPOINTS, changed_checkpoint
from support.checkpoint_cases import HYBRIDS_AND_MIXTURES

from models.reference import MixtureReference
from pinfer.convert import ConvertOptions, convert
from pinfer.errors import PinferError
from pinfer.llama.engine import Engine
from pinfer.progress import NULL_PROGRESS

NATIVE = ("nemotron-h", "nemotron-h-moe")
ARCHITECTURES = {"nemotron-h": "nemotron_h", "nemotron-h-moe": "nemotron_h_moe", "turbosparse-mixtral": "llama"}
# Attention in F32, so that at F32 only the order of sums differs.
TOLERANCE = {"f32": 1e-8, "f16": 1e-4}


def converted(source: Path, type_: str, folder: Path) -> Path:
    out = folder / f"{source.name}-{type_}.gguf"
    return convert(source, ConvertOptions(out=out, type=type_), NULL_PROGRESS).path


def references(case: str) -> list[tuple[NDArray[np.int32], NDArray[np.float32], list[int]]]:
    """Prompt, logits and greedy continuation."""
    with np.load(CHECKPOINTS / case / "reference.npz") as saved:
        return [(saved[f"prompt_{i}"], saved[f"logits_{i}"], saved[f"greedy_{i}"].tolist()) for i in range(3)]


def nmse(made: NDArray[Any], expected: NDArray[np.float32]) -> float:
    return float(((made - expected) ** 2).sum() / (expected.astype(np.float64) ** 2).sum())


def test_every_case_is_tested() -> None:
    assert set(ARCHITECTURES) == set(HYBRIDS_AND_MIXTURES)


@pytest.mark.parametrize("type_", ["f32", "f16"])
@pytest.mark.parametrize("case", NATIVE)
def test_stock_libllama_gives_what_the_original_gives(case: str, type_: str, tmp_path: Path) -> None:
    path = converted(CHECKPOINTS / case, type_, tmp_path)
    assert GGUFReader(str(path)).fields["general.architecture"].contents() == ARCHITECTURES[case]
    with Engine(path, n_ctx=96, n_threads=1, f32_attention=True) as engine:
        for prompt, expected, greedy in references(case):
            for n in (len(prompt), 5, 1):
                engine.clear()
                pieces = [prompt[i : i + n].tolist() for i in range(0, len(prompt), n)]
                logits = np.concatenate([engine.decode(piece, logits=True) for piece in pieces])
                error = nmse(logits, expected)
                assert error <= TOLERANCE[type_], f"batches of {n}: NMSE {error:.2g}"
            tokens = [int(logits[-1].argmax())]
            while len(tokens) < len(greedy):
                tokens.append(int(engine.decode(tokens[-1:])[0].argmax()))
            assert tokens == greedy


@pytest.mark.parametrize("case", HYBRIDS_AND_MIXTURES)
def test_the_reference_gives_what_the_original_gives(case: str, tmp_path: Path) -> None:
    path = converted(CHECKPOINTS / case, "f32", tmp_path)
    model = MixtureReference(path)
    assert model.activation == ("drelu" if case == "turbosparse-mixtral" else "relu2")
    for prompt, expected, greedy in references(case):
        assert nmse(model.forward(prompt).logits, expected) <= 1e-9
        assert model.greedy(prompt.tolist(), len(greedy)) == greedy


def test_layers_in_the_newest_spelling(tmp_path: Path) -> None:
    """transformers 5 writes a list of names, and no number of layers."""
    names = {"M": "linear_attention", "*": "full_attention", "-": "mlp"}
    kinds = json.loads((CHECKPOINTS / "nemotron-h" / "config.json").read_text())["hybrid_override_pattern"]
    settings: dict[str, object] = {"hybrid_override_pattern": None, "num_hidden_layers": None}
    settings["layers_block_type"] = [names[kind] for kind in kinds]
    source = changed_checkpoint("nemotron-h", tmp_path, settings, lambda tensors: None)
    prompt, expected, _ = references("nemotron-h")[0]
    assert nmse(MixtureReference(converted(source, "f32", tmp_path)).forward(prompt).logits, expected) <= 1e-9


@pytest.mark.parametrize(
    ("case", "config", "message"),
    [
        ("nemotron-h", {"hybrid_override_pattern": "M-X*-M-"}, "no valid pattern of layers"),
        ("nemotron-h", {"hybrid_override_pattern": 7}, "no valid pattern of layers"),
        ("nemotron-h", {"hybrid_override_pattern": "M-M-M-M"}, "no attention layer"),
        ("nemotron-h", {"mlp_hidden_act": "silu"}, "another activation"),
        ("nemotron-h", {"use_conv_bias": False}, "without biases"),
        ("nemotron-h-moe", {"n_group": 2}, "groups of experts"),
        ("nemotron-h-moe", {"n_routed_experts": 7}, "has 6 experts"),
        ("turbosparse-mixtral", {"num_local_experts": 5}, "has 6 experts"),
    ],
)
def test_what_libllama_cannot_compute_is_refused(
    case: str, config: dict[str, object], message: str, tmp_path: Path
) -> None:
    source = changed_checkpoint(case, tmp_path, config, lambda tensors: None)
    with pytest.raises(PinferError, match=message):
        converted(source, "f32", tmp_path)
    assert not list(tmp_path.glob("*.gguf"))


def test_a_missing_expert_is_noticed(tmp_path: Path) -> None:
    def drop(tensors: dict[str, Any]) -> None:
        del tensors["backbone.layers.1.mixer.experts.3.up_proj.weight"]

    source = changed_checkpoint("nemotron-h-moe", tmp_path, {}, drop)
    with pytest.raises(PinferError, match="has 5 experts"):
        converted(source, "f32", tmp_path)
