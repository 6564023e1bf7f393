"""Exact mode is the dense model: every weight type, batch size, thread count and share of hot neurons.

tiny-relu2 is compared with stock libllama in the same process. Stock libllama would compute SiLU for tiny-reglu, so
there, and where the shards hold requantised down rows, the reference is the numpy forward pass of models/reference.py
on the very weights the shards hold.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from support.quantised import FTYPES, quantise
from support.shards import nmse, write_shards

from models.reference import Reference
from pinfer.artefacts.shards import ShardFile, down_name
from pinfer.llama import ggml
from pinfer.llama.engine import NEVER_DENSE, Engine, PluginConfig
from pinfer.model import open_model
from pinfer.split import SplitReport

ROOT = Path(__file__).resolve().parent.parent
Logits = NDArray[np.float32]
N_PREDICT = 128
PROMPT = "Once upon a time there was a little"
TEXT = (ROOT / "tests" / "data" / "heldout.txt").read_text(encoding="utf-8")[:4000]


def tolerance(type_name: str) -> float:
    """The largest NMSE of logits that rounding can cause.

    llama.cpp keeps KV in F16 and rounds the x and h of F16 matrices to 11 bits, of BF16 to 8 bits, of quantised ones to
    blocks of 8 bits with one scale: 32 values for most types, where a value is off by 0.7 % (5e-5 a product), but
    256 values for K-quants and the IQ types of that size, where the largest h is ten times the usual and values are off
    by 10 / 127 / sqrt(12) = 2 % (5e-4 a product). pinfer does not round where it need not, the reference never.
    """
    if type_name.endswith("_K") or type_name in ("IQ3_S", "IQ4_XS"):
        return 1e-3
    return {"F32": 1e-6, "F16": 1e-6, "BF16": 1e-5}.get(type_name, 2e-4)


@dataclass(frozen=True)
class Case:
    """A model file of one type, and its results in dense computation."""

    path: Path
    prompt: list[int]
    text: list[int]
    reference: Reference
    down: list[NDArray[np.float32]]  # the model's own


def make_case(model_name: str, type_name: str, folder: Path) -> Case:
    path = quantise(ROOT / "models" / model_name, type_name, folder / f"{type_name}-{model_name}")
    with Engine(path, n_ctx=64) as engine:
        prompt = engine.tokenize(PROMPT)
        text = engine.tokenize(TEXT)[:512]
    assert len(text) == 512
    reference = Reference(path, dtype=np.float32)
    down = [reference.tensor(f"blk.{layer}.ffn_down.weight") for layer in range(reference.n_layer)]
    return Case(path, prompt, text, reference, down)


def down_of_shards(path: Path, shards: SplitReport) -> list[NDArray[np.float32]]:
    """The down matrices [n_embd, n_ff] that the two shards hold, dequantised."""
    model = open_model(path)
    cold, hot = ShardFile.read(shards.cold, "cold", model), ShardFile.read(shards.hot, "hot", model)
    out = []
    for layer, ffn in enumerate(model.ffns):
        down = np.full((model.n_embd, model.n_ff), np.nan, np.float32)
        if len(cold.units[layer]):
            rows = cold.artefact.raw(down_name("cold", ffn))
            down[:, cold.units[layer]] = ggml.dequantise(rows, cold.down_type[layer], model.n_embd).T
        if len(hot.units[layer]):
            raw = hot.artefact.raw(f"blk.{layer}.ffn_down.weight")
            n_hot = len(hot.units[layer])
            rows = np.ascontiguousarray(raw.reshape(model.n_embd, -1))
            down[:, hot.units[layer]] = ggml.dequantise(rows, hot.down_type[layer], n_hot).reshape(model.n_embd, n_hot)
        assert not np.isnan(down).any(), "a neuron is in no shard"
        out.append(down)
    return out


@dataclass(frozen=True)
class Dense:
    """Dense logits after the prompt and its continuation, and of the text."""

    tokens: list[int]  # prompt and greedy continuation
    greedy: Logits  # [N_PREDICT, n_vocab]: the logits from which the continuation was chosen
    text: Logits  # [512, n_vocab]; batches of 7 use the first 126


def dense_libllama(case: Case) -> Dense:
    with Engine(case.path, n_ctx=512) as engine:
        answer = continue_greedily(engine, case.prompt)
        engine.clear()
        return Dense(case.prompt + answer[0], answer[1], engine.decode(case.text, logits=True))


def forward(case: Case, tokens: list[int], down: list[NDArray[np.float32]] | None) -> Logits:
    """Logits of the numpy forward pass, with the shards' own down matrices where there are shards."""
    for layer, matrix in enumerate(case.down if down is None else down):
        case.reference.replace(f"blk.{layer}.ffn_down.weight", matrix)
    return np.asarray(case.reference.forward(tokens).logits, np.float32)


def dense_reference(
    case: Case, tokens: list[int], down: list[NDArray[np.float32]] | None, text: Logits | None
) -> Dense:
    """The reference for ``tokens``; ``text`` gives the logits of the text if they are known already."""
    greedy = forward(case, tokens, down)[len(case.prompt) - 1 : -1]
    return Dense(tokens, greedy, forward(case, case.text, down) if text is None else text)


def continue_greedily(engine: Engine, prompt: list[int]) -> tuple[list[int], Logits]:
    """N_PREDICT greedy tokens, ignoring end tokens, and the logits each was chosen from."""
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
    """Every token is the dense model's choice, up to near-ties: where the dense logits of the two tokens differ by less
    than rounding may move them. F32 and F16 get no such allowance.
    """
    tokens, logits = got
    error = nmse(logits, dense.greedy)
    assert error <= tolerance(type_name), f"{name}: NMSE {error:.2g} on the continuation"
    gap = dense.greedy.max(1) - dense.greedy[np.arange(N_PREDICT), tokens]
    allowed = 0.0 if type_name in ("F32", "F16") else 4 * np.sqrt(tolerance(type_name) * (dense.greedy**2).mean())
    worst = int(gap.argmax())
    assert gap[worst] <= allowed, f"{name}: token {worst} is {gap[worst]:.3g} below the dense choice"


@dataclass(frozen=True)
class Configuration:
    """A way to run the plugin, and the weights that it uses."""

    label: str
    plugin: PluginConfig
    down: list[NDArray[np.float32]] | None  # of the shards; None: the model's own
    all_cold: bool = False  # then long batches use the shards too


def configurations(path: Path) -> Iterator[Configuration]:
    activation = open_model(path).activation
    yield Configuration("no shards", PluginConfig(activation), None)
    for share in (0.0, 0.5, 1.0):
        shards = write_shards(path, share)
        plugin = PluginConfig(activation, hot=shards.hot, cold=shards.cold, device="CPU")
        yield Configuration(f"hot {share:.0%}", plugin, down_of_shards(path, shards), all_cold=share == 0)


@pytest.mark.parametrize("type_name", FTYPES)
@pytest.mark.parametrize("model_name", ["tiny-relu2.gguf", "tiny-reglu.gguf"])
def test_exact_is_dense(model_name: str, type_name: str, tmp_path: Path) -> None:
    case = make_case(model_name, type_name, tmp_path)
    stock = None if open_model(case.path).gated else dense_libllama(case)
    # dense products are the model's where neurons are hot, whatever the shards hold
    model_text = stock.text if stock is not None else forward(case, case.text, None)
    for configuration in configurations(case.path):
        # libllama is not a reference if down is requantised, nor for SiLU graphs: see the top.
        use_stock = stock is not None and (type_name in ("F32", "F16", "BF16") or configuration.down is None)
        want = stock if use_stock else None
        # a batch of 512 is computed densely by default; the second round computes it sparsely
        for n_threads, n_batch_dense in ((1, 0), (2, NEVER_DENSE)):
            name = f"{type_name} {configuration.label}, {n_threads} threads"
            plugin = replace(configuration.plugin, n_batch_dense=n_batch_dense)
            with Engine(case.path, plugin=plugin, n_ctx=512, n_threads=n_threads) as engine:
                got = continue_greedily(engine, case.prompt)
                batches = {n: in_pieces(engine, case.text[:length], n) for n, length in ((7, 126), (512, 512))}
            tokens = case.prompt + got[0]
            if want is None or want.tokens != tokens:
                # stock rounds the x of F16 matrices; the reference does not, so it has to agree at near-ties
                assert not (use_stock and type_name == "F32"), f"{name}: other tokens than stock libllama"
                known = model_text if configuration.down is None else None
                if want is not None:
                    known = want.text
                want = dense_reference(case, tokens, configuration.down, known)
            check_greedy(name, type_name, got, want)
            for n, logits in batches.items():
                of_model = n == 512 and n_batch_dense == 0 and not configuration.all_cold
                error = nmse(logits, (model_text if of_model else want.text)[: len(logits)])
                assert error <= tolerance(type_name), f"{name}, batches of {n}: NMSE {error:.2g}"
