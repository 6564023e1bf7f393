"""Exact mode is the dense model: every weight type, batch size, thread count and share of hot neurons.

tiny-relu2 is compared with stock libllama in the same process. Stock libllama would compute SiLU for tiny-reglu, so there,
and where the shards hold requantised down rows, the reference is the numpy forward pass of models/reference.py on the very
weights the shards hold.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from pinfer import ggml, paths
from pinfer.engine import NEVER_DENSE, Engine, PluginConfig
from pinfer.model import open_model
from pinfer.placement_file import PlacementFile, new_placement_id
from pinfer.shard_file import ShardFile, cold_layout, down_types
from pinfer.split import SplitOptions, SplitReport, split
from quantised import FTYPES, quantise

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "models"))
from reference import Reference  # noqa: E402

Logits = NDArray[np.float32]
N_PREDICT = 128
PROMPT = "Once upon a time there was a little"
TEXT = (ROOT / "tests" / "data" / "heldout.txt").read_text(encoding="utf-8")[:4000]


def tolerance(type_name: str) -> float:
    """Largest NMSE of logits that rounding explains.

    Both sides keep KV in F16. F16: llama.cpp rounds x and h to 11 bits, pinfer does not. BF16: to 8 bits. Quantised: x is
    rounded to blocks of 8 bits on both sides (5e-5 a product), h on one side only, and the error runs through the layers.
    """
    if type_name in ("F32", "F16"):
        return 1e-6
    return 1e-4 if type_name == "BF16" else 3e-3


def nmse(got: NDArray[np.floating], want: NDArray[np.floating]) -> float:
    return float(((got - want) ** 2).sum() / (want.astype(np.float64) ** 2).sum())


@dataclass(frozen=True)
class Case:
    """A model file of one type, and what dense computation makes of it."""

    path: Path
    type_name: str
    prompt: list[int]
    text: list[int]


@pytest.fixture(params=["tiny-relu2.gguf", "tiny-reglu.gguf"])
def model_name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=list(FTYPES))
def case(request: pytest.FixtureRequest, model_name: str, tmp_path: Path) -> Case:
    path = quantise(ROOT / "models" / model_name, request.param, tmp_path / f"{request.param}-{model_name}")
    with Engine(path, n_ctx=64) as engine:
        prompt = engine.tokenize(PROMPT)
        text = engine.tokenize(TEXT)[:512]
    assert len(text) == 512
    return Case(path, request.param, prompt, text)


def write_shards(path: Path, hot_share: float) -> SplitReport:
    """Split with a random but fixed choice of hot neurons: a multiple of 64 a layer, or all."""
    model = open_model(path)
    rng = np.random.default_rng(1)
    n_hot = model.n_ff if hot_share == 1 else int(model.n_ff * hot_share) // 64 * 64
    order = tuple(rng.permutation(model.n_ff).astype(np.int32) for _ in range(model.n_layer))
    folder = paths.artefact_dir(path, model.fingerprint, for_writing=True)
    placement = PlacementFile(new_placement_id(), (n_hot,) * model.n_layer, "CPU", 1 << 30, 0, 512, {}, order)
    placement.write(folder / paths.PLACEMENT, model, {})
    return split(path, SplitOptions())


def down_of_shards(path: Path, shards: SplitReport) -> list[NDArray[np.float32]]:
    """The down matrices [n_embd, n_ff] that the two shards hold, dequantised."""
    model = open_model(path)
    cold, hot = ShardFile.read(shards.cold, "cold", model), ShardFile.read(shards.hot, "hot", model)
    out = []
    for layer in range(model.n_layer):
        down = np.full((model.n_embd, model.n_ff), np.nan, np.float32)
        if len(cold.neurons[layer]):
            layout = cold_layout(model, layer, down_types(model, layer, None))
            bundles = cold.artefact.array(f"blk.{layer}.cold").view(np.uint8).reshape(-1, layout.stride)
            rows = np.ascontiguousarray(bundles[:, layout.down_at : layout.down_at + layout.down])
            down[:, cold.neurons[layer]] = ggml.dequantise(rows, cold.down_type[layer], model.n_embd).T
        if len(hot.neurons[layer]):
            raw = hot.artefact.raw(f"blk.{layer}.ffn_down.weight")
            n_hot = len(hot.neurons[layer])
            rows = np.ascontiguousarray(raw.reshape(model.n_embd, -1))
            down[:, hot.neurons[layer]] = ggml.dequantise(rows, hot.down_type[layer], n_hot).reshape(model.n_embd, n_hot)
        assert not np.isnan(down).any(), "a neuron is in no shard"
        out.append(down)
    return out


@dataclass(frozen=True)
class Dense:
    """Dense logits after the prompt and its continuation, and of the text."""

    tokens: list[int]  # prompt and greedy continuation
    greedy: Logits  # [N_PREDICT, n_vocab]: the logits the continuation was chosen from
    text: Logits  # [512, n_vocab], of which batches of 7 look at the first 126


def dense_libllama(case: Case) -> Dense:
    with Engine(case.path, n_ctx=512) as engine:
        answer = continue_greedily(engine, case.prompt)
        engine.clear()
        return Dense(case.prompt + answer[0], answer[1], engine.decode(case.text, logits=True))


def dense_reference(case: Case, tokens: list[int], down: list[NDArray[np.float32]] | None) -> Dense:
    """Logits of the numpy forward pass along ``tokens``, with the shards' own down matrices where there are shards."""
    reference = Reference(case.path, dtype=np.float32)
    for layer, matrix in enumerate(down or []):
        reference.tensor(f"blk.{layer}.ffn_down.weight")[:] = matrix
    n = len(case.prompt)
    greedy = reference.forward(tokens).logits[n - 1 : -1]
    return Dense(tokens, greedy.astype(np.float32), reference.forward(case.text).logits.astype(np.float32))


def continue_greedily(engine: Engine, prompt: list[int]) -> tuple[list[int], Logits]:
    """N_PREDICT greedy tokens, past any end, and the logits each was chosen from."""
    engine.clear()
    tokens: list[int] = []
    rows = []
    step = prompt
    for _ in range(N_PREDICT):
        rows.append(engine.decode(step)[0])
        tokens.append(int(rows[-1].argmax()))
        step = tokens[-1:]
    return tokens, np.stack(rows)


def in_pieces(engine: Engine, tokens: list[int], n: int) -> Logits:
    engine.clear()
    return np.concatenate([engine.decode(tokens[i : i + n], logits=True) for i in range(0, len(tokens), n)])


def check_greedy(name: str, type_name: str, got: tuple[list[int], Logits], dense: Dense) -> None:
    """Every token is the dense model's choice, up to near-ties: where the dense logits of the two tokens differ by less than
    rounding may move them. F32 and F16 get no such allowance.
    """
    tokens, logits = got
    error = nmse(logits, dense.greedy)
    assert error <= tolerance(type_name), f"{name}: NMSE {error:.2g} on the continuation"
    gap = dense.greedy.max(1) - dense.greedy[np.arange(N_PREDICT), tokens]
    allowed = 0.0 if type_name in ("F32", "F16") else 4 * np.sqrt(tolerance(type_name) * (dense.greedy**2).mean())
    worst = int(gap.argmax())
    assert gap[worst] <= allowed, f"{name}: token {worst} is {gap[worst]:.3g} below the dense choice"


def configurations(path: Path) -> Iterator[tuple[str, PluginConfig, SplitReport | None]]:
    yield "no shards", PluginConfig(n_batch_dense=NEVER_DENSE), None
    for share in (0.0, 0.5, 1.0):
        shards = write_shards(path, share)
        config = PluginConfig(hot=shards.hot, cold=shards.cold, device="CPU", n_batch_dense=NEVER_DENSE)
        yield f"hot {share:.0%}", config, shards


def test_exact_is_dense(case: Case) -> None:
    gated = open_model(case.path).gated
    dense = None if gated else dense_libllama(case)
    for label, config, shards in configurations(case.path):
        down = down_of_shards(case.path, shards) if shards else None
        for n_threads in (1, 2):
            name = f"{case.type_name} {label}, {n_threads} threads"
            with Engine(case.path, plugin=config, n_ctx=512, n_threads=n_threads) as engine:
                got = continue_greedily(engine, case.prompt)
                by_7 = in_pieces(engine, case.text[:126], 7)
                by_512 = in_pieces(engine, case.text, 512)
            # Where down is requantised, and for SiLU graphs, libllama is no reference: see the top.
            plain = case.type_name in ("F32", "F16", "BF16")
            if gated or (shards and not plain):
                want = dense_reference(case, case.prompt + got[0], down)
            else:
                assert dense is not None
                assert not plain or case.type_name == "BF16" or got[0] == dense.tokens[len(case.prompt) :], name
                want = dense if case.prompt + got[0] == dense.tokens else dense_reference(case, case.prompt + got[0], down)
            check_greedy(name, case.type_name, got, want)
            for batch, logits in ((7, by_7), (512, by_512)):
                error = nmse(logits, want.text[: len(logits)])
                assert error <= tolerance(case.type_name), f"{name}, batches of {batch}: NMSE {error:.2g}"
