"""Conversion of PowerInfer files: the text stays that of the original weights, and bad files give a one-line error."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from conftest import MODELS
from numpy.typing import NDArray
from support.powerinfer_models import N_CONTEXT, N_EMBD, as_gpt2, as_llama, bamboo, falcon, opt
from support.powerinfer_writer import Matrix, Weights, read_weights, value, write_model, write_powerinfer

from pinfer.conversion.powerinfer_file import is_powerinfer, open_powerinfer, plan_powerinfer
from pinfer.errors import PinferError
from pinfer.gguf_io.reader import GgufFile, read_gguf
from pinfer.gguf_io.writer import GgufFileWriter
from pinfer.llama import ggml
from pinfer.llama.engine import NEVER_DENSE, Engine, PluginConfig
from pinfer.model import open_model

PROMPT = "Once upon a time, there was a little girl"


@dataclass(frozen=True)
class Family:
    """One architecture: a model as PowerInfer stores it, and as libllama needs it."""

    make: Callable[[int], Weights]
    """takes the number of neurons"""
    wanted: Callable[[Weights], Weights]
    activation: str


def _same(weights: Weights) -> Weights:
    return weights


FAMILIES = {
    "bamboo": Family(lambda n: bamboo(n_ff=n), as_llama, "drelu"),
    "falcon": Family(lambda n: falcon(n_ff=n), _same, "relu"),
    "falcon, two norms": Family(lambda n: falcon(n_ff=n, two_norms=True), _same, "relu"),
    "opt": Family(lambda n: opt(n_ff=n), as_gpt2, "relu"),
    "opt without biases": Family(lambda n: opt(n_ff=n, biases=False), as_gpt2, "relu"),
}


def convert(source: Path, out: Path) -> Path:
    """The GGUF of ``source`` in its own types."""
    plan = plan_powerinfer(source)
    with GgufFileWriter(out, plan.arch) as writer:
        plan.add_metadata(writer.header)
        writer.header.add_string("pinfer.ffn.activation", plan.activation)
        for tensor in plan.tensors:
            assert tensor.type_name is not None
            writer.declare(tensor.name, tensor.shape, tensor.type_name)
        for tensor in plan.tensors:
            read = tensor.raw or tensor.load
            assert read is not None
            writer.write(tensor.name, read())
    return out


def run(model: Path, tokens: Sequence[int] | None = None) -> tuple[NDArray[np.float32], list[int]]:
    """Logits of some tokens, and the greedy continuation."""
    config = PluginConfig(open_model(model).activation, n_batch_dense=NEVER_DENSE)
    with Engine(model, plugin=config, n_ctx=N_CONTEXT, n_threads=1) as engine:
        prompt = list(tokens) if tokens is not None else engine.tokenize(PROMPT)
        return engine.decode(prompt, logits=True), engine.generate(prompt, 16)


def tokens_of(model: Path) -> list[int]:
    with Engine(model, n_ctx=N_CONTEXT, n_threads=1) as engine:
        return engine.tokenize(PROMPT)


def divergence(wanted: NDArray[np.float32], found: NDArray[np.float32]) -> float:
    """Mean Kullback-Leibler divergence of the next-token distributions."""

    def logs(x: NDArray[np.float32]) -> NDArray[np.float64]:
        shifted = x.astype(np.float64) - x.max(axis=1, keepdims=True)
        result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
        return result

    p, q = logs(wanted), logs(found)
    return float((np.exp(p) * (p - q)).sum(axis=1).mean())


def same_tensors(wanted: GgufFile, found: GgufFile, *, but: str = "never") -> None:
    assert set(found.tensors) == set(wanted.tensors)
    for name, tensor in wanted.tensors.items():
        if but in name:
            continue
        other = found.tensors[name]
        assert (other.shape, other.type_name) == (tensor.shape, tensor.type_name), name
        assert np.array_equal(found.raw(other), wanted.raw(tensor)), name


def test_the_format_is_recognised_by_its_magic(tmp_path: Path) -> None:
    source = write_powerinfer(tmp_path / "m.gguf", bamboo(), "F16")
    assert is_powerinfer(source)
    assert not is_powerinfer(MODELS / "tiny-reglu.gguf")
    assert not is_powerinfer(tmp_path)
    assert not is_powerinfer(tmp_path / "missing.gguf")


def test_f16_is_the_original_byte_for_byte(tmp_path: Path) -> None:
    original = MODELS / "tiny-reglu.gguf"
    source = write_powerinfer(tmp_path / "m.powerinfer.gguf", read_weights(original), "F16")
    found = convert(source, tmp_path / "m.gguf")
    same_tensors(read_gguf(original), read_gguf(found))
    logits, words = run(found)
    wanted, wanted_words = run(original)
    assert np.array_equal(logits, wanted)
    assert words == wanted_words


@pytest.mark.parametrize("name", FAMILIES)
def test_every_architecture_keeps_its_text_in_f16(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    weights = family.make(200)
    source = write_powerinfer(tmp_path / "m.powerinfer.gguf", weights, "F16")
    wanted = write_model(tmp_path / "wanted.gguf", family.wanted(weights), "F16", family.activation)
    found = convert(source, tmp_path / "m.gguf")
    same_tensors(read_gguf(wanted), read_gguf(found))
    tokens = tokens_of(found)
    logits, words = run(found, tokens)
    wanted_logits, wanted_words = run(wanted, tokens)
    assert np.array_equal(logits, wanted_logits)
    assert words == wanted_words
    assert plan_powerinfer(source).activation == family.activation


@pytest.mark.parametrize(("n_ff", "down_type"), [(224, "Q8_0"), (200, "F16")])
@pytest.mark.parametrize("name", FAMILIES)
def test_only_the_down_matrix_of_a_quantised_model_is_requantised(
    name: str, n_ff: int, down_type: str, tmp_path: Path
) -> None:
    family = FAMILIES[name]
    weights = family.make(n_ff)
    source = write_powerinfer(tmp_path / "m.powerinfer.gguf", weights, "Q4_0")
    ordinary = read_gguf(write_model(tmp_path / "ordinary.gguf", family.wanted(weights), "Q4_0", family.activation))
    found = read_gguf(convert(source, tmp_path / "m.gguf"))
    same_tensors(ordinary, found, but="ffn_down.weight")
    for layer in range(2):
        down = found.tensors[f"blk.{layer}.ffn_down.weight"]
        assert down.type_name == down_type
        wanted = _float(open_powerinfer(source).gguf, f"blk.{layer}.ffn_down_t.weight").T
        error = np.abs(_float(found, down.name) - wanted)
        # Half a step of 127 to either side, and the rounding of the step itself; F16 is finer.
        assert error.max() <= np.abs(wanted).max() * (0.5 / 127 + 2**-11), error.max()


def _float(file: GgufFile, name: str) -> Matrix:
    tensor = file.tensors[name]
    return ggml.dequantise(file.raw(tensor), tensor.type, tensor.row_length)


def test_q4_0_stays_close_to_the_file(tmp_path: Path) -> None:
    """Compared with a model of exactly the file's values; F16 instead of Q8_0 would halve the divergence."""
    weights = read_weights(MODELS / "tiny-reglu.gguf")
    source = write_powerinfer(tmp_path / "m.powerinfer.gguf", weights, "Q4_0")
    file = open_powerinfer(source).gguf
    values = {name: _float(file, name) for name in file.tensors}
    held = {name.replace("_t.", "."): v.T if "_t." in name else v for name, v in values.items()}
    exact = replace(weights, tensors={name: v if len(v) > 1 else v.reshape(-1) for name, v in held.items()})
    wanted, _ = run(write_model(tmp_path / "exact.gguf", exact, "Q4_0", "reglu", down_kind="F32"))
    found, _ = run(convert(source, tmp_path / "m.gguf"))
    coarse, _ = run(write_model(tmp_path / "coarse.gguf", exact, "Q4_0", "reglu", down_kind="Q4_0"))
    assert divergence(wanted, found) < 1e-3
    assert divergence(wanted, coarse) > 3 * divergence(wanted, found)


def test_metadata_is_copied_under_the_new_name(tmp_path: Path) -> None:
    weights = bamboo()
    found = read_gguf(convert(write_powerinfer(tmp_path / "m.pi", weights, "F16", threshold=0.25), tmp_path / "m.gguf"))
    for key, wanted in weights.keys.items():
        if key == "general.name":
            continue  # the converted model's own
        held = found.typed(key.replace("bamboo.", "llama."))
        assert (held.type, held.item_type) == (wanted.type, wanted.item_type), key
        assert _plain(held.value) == _plain(wanted.value), key
    assert not any(key.startswith(("bamboo.", "powerinfer.")) for key in found.keys())  # noqa: SIM118


def _plain(item: object) -> object:
    if isinstance(item, list):
        return [_plain(part) for part in item]
    if isinstance(item, bytes):
        return item.decode()
    return float(np.float32(item)) if isinstance(item, float) else item


def test_strings_that_are_not_text_are_copied_byte_for_byte(tmp_path: Path) -> None:
    weights = bamboo()
    tokens = weights.keys["tokenizer.ggml.tokens"]
    odd = [*tokens.value[:-1], b"\xff\xfe"]
    keys = {**weights.keys, "tokenizer.ggml.tokens": replace(tokens, value=odd)}
    source = write_powerinfer(tmp_path / "m.pi", replace(weights, keys=keys), "F16")
    found = read_gguf(convert(source, tmp_path / "m.gguf"))
    assert found.typed("tokenizer.ggml.tokens").value[-1] == b"\xff\xfe"


def test_keys_that_old_files_lack_are_added(tmp_path: Path) -> None:
    found = read_gguf(convert(write_powerinfer(tmp_path / "o.pi", opt(), "F16"), tmp_path / "o.gguf"))
    assert found.get("tokenizer.ggml.pre") == "gpt-2"
    assert found.get("gpt2.context_length") == N_CONTEXT
    assert found.get("gpt2.attention.layer_norm_epsilon") == pytest.approx(1e-5)
    assert found.get("tokenizer.ggml.add_bos_token") is True
    found = read_gguf(convert(write_powerinfer(tmp_path / "f.pi", falcon(), "F16"), tmp_path / "f.gguf"))
    assert found.get("tokenizer.ggml.pre") == "falcon"
    assert "tokenizer.ggml.add_bos_token" not in found


def test_keys_of_the_file_are_kept(tmp_path: Path) -> None:
    weights = opt()
    own = {
        "tokenizer.ggml.pre": value("default"),
        "tokenizer.ggml.add_bos_token": value(False),
        "opt.attention.layer_norm_epsilon": value(1e-3),
    }
    source = write_powerinfer(tmp_path / "o.pi", replace(weights, keys={**weights.keys, **own}), "F16")
    found = read_gguf(convert(source, tmp_path / "o.gguf"))
    assert found.get("tokenizer.ggml.pre") == "default"
    assert found.get("tokenizer.ggml.add_bos_token") is False
    assert found.get("gpt2.attention.layer_norm_epsilon") == pytest.approx(1e-3)


def test_positions_without_the_offset_rows_stay(tmp_path: Path) -> None:
    weights = opt()
    positions = weights.tensors["position_embd.weight"][2:]
    shorter = replace(weights, tensors={**weights.tensors, "position_embd.weight": positions})
    found = read_gguf(convert(write_powerinfer(tmp_path / "o.pi", shorter, "F16"), tmp_path / "o.gguf"))
    assert found.tensors["position_embd.weight"].shape == (N_EMBD, N_CONTEXT)


def test_a_down_matrix_that_is_not_transposed_is_copied(tmp_path: Path) -> None:
    weights = bamboo()
    source = tmp_path / "m.pi"
    write_model(source, weights, "F16", "drelu")
    with open(source, "r+b") as file:
        file.write(b"PWRI")
    wanted = read_gguf(write_model(tmp_path / "wanted.gguf", as_llama(weights), "F16", "drelu"))
    same_tensors(wanted, read_gguf(convert(source, tmp_path / "m.gguf")))


def _refused(source: Path) -> str:
    with pytest.raises(PinferError) as error:
        plan_powerinfer(source)
    message = str(error.value)
    assert "\n" not in message
    assert source.name in message
    return message


def _without(weights: Weights, name: str) -> Weights:
    return replace(weights, tensors={key: v for key, v in weights.tensors.items() if key != name})


@pytest.mark.parametrize(
    ("weights", "name"),
    [
        (bamboo(), "blk.1.attn_k.weight"),
        (bamboo(), "blk.0.ffn_gate.weight"),
        (bamboo(), "output_norm.weight"),
        (falcon(), "blk.0.attn_norm.bias"),
        (falcon(), "blk.1.ffn_up.weight"),
        (opt(), "blk.1.attn_v.bias"),
        (opt(), "position_embd.weight"),
        (opt(), "blk.1.attn_q.weight"),
    ],
    ids=lambda part: part if isinstance(part, str) else part.arch,
)
def test_a_missing_tensor_is_named(weights: Weights, name: str, tmp_path: Path) -> None:
    message = _refused(write_powerinfer(tmp_path / "m.pi", _without(weights, name), "F16"))
    assert name.replace("attn_q.", "attn_qkv.") in message


def test_a_missing_down_matrix_is_named(tmp_path: Path) -> None:
    source = write_powerinfer(tmp_path / "m.pi", _without(bamboo(), "blk.1.ffn_down.weight"), "F16")
    assert "blk.1.ffn_down.weight" in _refused(source)


def test_half_a_predictor_is_refused(tmp_path: Path) -> None:
    fc1, fc2 = np.zeros((32, N_EMBD), np.float32), np.zeros((200, 32), np.float32)
    source = write_powerinfer(tmp_path / "m.pi", bamboo().with_predictors({0: (fc1, fc2)}), "F16")
    assert open_powerinfer(source).predictor_rank(0) == 32
    assert open_powerinfer(source).predictor_rank(1) == 0
    source = write_powerinfer(tmp_path / "m.pi", bamboo().with_predictors({0: (fc1, fc2[:-1])}), "F16")
    assert "blk.0.fc2.weight" in _refused(source)
    data = source.read_bytes().replace(b"blk.0.fc2.weight", b"blk.9.fc2.weight")
    source.write_bytes(data)
    assert "blk.0.fc2.weight" in _refused(source)


@pytest.mark.parametrize("arch", ["mpt", "gpt2", "pinfer"])
def test_other_architectures_are_refused(arch: str, tmp_path: Path) -> None:
    message = _refused(write_powerinfer(tmp_path / "m.pi", replace(bamboo(), arch=arch), "F16"))
    assert repr(arch) in message
    assert "bamboo" in message


def test_an_unknown_tensor_is_refused(tmp_path: Path) -> None:
    weights = bamboo()
    odd = {**weights.tensors, "blk.0.ffn_gate_inp.weight": np.zeros((8, N_EMBD), np.float32)}
    assert "ffn_gate_inp" in _refused(write_powerinfer(tmp_path / "m.pi", replace(weights, tensors=odd), "F16"))


def test_matrices_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    weights = bamboo()
    odd = {**weights.tensors, "blk.1.ffn_gate.weight": np.zeros((199, N_EMBD), np.float32)}
    assert "blk.1.ffn_gate.weight" in _refused(
        write_powerinfer(tmp_path / "m.pi", replace(weights, tensors=odd), "F16")
    )
    weights = opt()
    odd = {**weights.tensors, "blk.1.attn_k.weight": np.zeros((N_EMBD - 1, N_EMBD), np.float32)}
    assert "blk.1.attn_k.weight" in _refused(write_powerinfer(tmp_path / "m.pi", replace(weights, tensors=odd), "F16"))


@pytest.mark.parametrize(
    "key", ["bamboo.block_count", "bamboo.embedding_length", "bamboo.attention.head_count", "tokenizer.ggml.tokens"]
)
def test_a_missing_key_is_refused(key: str, tmp_path: Path) -> None:
    weights = bamboo()
    keys = {name: item for name, item in weights.keys.items() if name != key}
    message = _refused(write_powerinfer(tmp_path / "m.pi", replace(weights, keys=keys), "F16"))
    assert key in message or "tokenizer" in message


def test_a_vocabulary_without_merges_is_refused(tmp_path: Path) -> None:
    weights = opt()
    keys = {name: item for name, item in weights.keys.items() if "merges" not in name}
    assert "merges" in _refused(write_powerinfer(tmp_path / "m.pi", replace(weights, keys=keys), "F16"))


def test_other_files_are_refused(tmp_path: Path) -> None:
    for name, data in (("empty", b""), ("text", b"PowerInfer"), ("gguf", b"GGUF\x03\0\0\0")):
        source = tmp_path / name
        source.write_bytes(data)
        _refused(source)
    _refused(tmp_path / "missing")
    _refused(tmp_path)


def test_a_truncated_file_is_refused_wherever_it_ends(tmp_path: Path) -> None:
    whole = write_powerinfer(tmp_path / "m.pi", bamboo(), "F16").read_bytes()
    source = tmp_path / "cut.pi"
    header = read_gguf(tmp_path / "m.pi", b"PWRI").data_offset
    ends = [5, 12, 30, header // 2, header - 40, header + 100, len(whole) // 2, len(whole) - 40]
    for end in ends:
        source.write_bytes(whole[:end])
        _refused(source)


def test_damaged_headers_are_read_or_refused(tmp_path: Path) -> None:
    whole = bytearray(write_powerinfer(tmp_path / "m.pi", bamboo(), "F16").read_bytes())
    source = tmp_path / "damaged.pi"
    rng = np.random.default_rng(0)
    header = read_gguf(tmp_path / "m.pi", b"PWRI").data_offset
    refused = 0
    for _ in range(100):
        data = whole.copy()
        for at in rng.integers(4, header, 3):
            data[at] = rng.integers(256)
        source.write_bytes(data)
        try:
            plan_powerinfer(source)
        except PinferError:
            refused += 1
    assert refused > 10
