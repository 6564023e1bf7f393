"""Reading models: what is found in a GGUF, and that damaged files are refused."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.small_model import Shape, write_small_model

from pinfer.artefacts.shards import DOWN_TYPES
from pinfer.errors import PinferError
from pinfer.gguf_io.reader import GgufError, read_gguf, type_size
from pinfer.llama import ggml
from pinfer.model import dequantize, open_model

ROOT = Path(__file__).resolve().parent.parent


def test_tiny_relu2_is_described(tiny_relu2: Path) -> None:
    model = open_model(tiny_relu2)
    reader = gguf.GGUFReader(tiny_relu2)

    def field(name: str) -> int:
        return int(reader.fields[f"arcee.{name}"].contents())

    assert (model.arch, model.activation, model.gated, model.is_sparse) == ("arcee", "relu2", False, True)
    assert model.n_layer == field("block_count")
    assert model.n_embd == field("embedding_length")
    assert model.n_ff == field("feed_forward_length")
    assert model.n_head == (field("attention.head_count"),) * model.n_layer
    assert model.n_head_kv == (field("attention.head_count_kv"),) * model.n_layer
    assert model.head_dim_k == model.n_embd // model.n_head[0]
    assert model.n_vocab == len(reader.fields["tokenizer.ggml.tokens"].data)
    assert len(model.fingerprint) == 32
    assert [(f.name, f.kind, f.n_embd, f.n_ff, f.n_experts) for f in model.ffns] == [
        (f"blk.{i}", "dense", model.n_embd, model.n_ff, 1) for i in range(model.n_layer)
    ]
    assert all(f.gate is None for f in model.ffns)
    assert {t.name: (t.shape, t.offset, t.n_bytes, t.type) for t in model.tensors} == {
        t.name: (tuple(int(n) for n in t.shape), t.data_offset, t.n_bytes, int(t.tensor_type)) for t in reader.tensors
    }


def test_tiny_reglu_is_described(tiny_reglu: Path) -> None:
    model = open_model(tiny_reglu)
    assert (model.arch, model.activation, model.gated, model.is_sparse) == ("llama", "reglu", True, True)
    assert len(model.ffns) == model.n_layer
    assert all(f.gate for f in model.ffns)


def test_metadata_equals_the_reference_reader(tiny_relu2: Path) -> None:
    file = read_gguf(tiny_relu2)
    reader = gguf.GGUFReader(tiny_relu2)
    for key, field in reader.fields.items():
        if not key.startswith("GGUF."):
            assert file.get(key) == field.contents(), key
            assert file.count(key) == (len(field.data) if field.types[0] == gguf.GGUFValueType.ARRAY else 0)


def test_activation_comes_from_the_flag_then_the_file_then_the_architecture(tmp_path: Path, tiny_relu2: Path) -> None:
    path = write_small_model(tmp_path / "m.gguf", Shape(activation="reglu"))
    assert open_model(path).activation == "reglu"
    assert open_model(path, "drelu").activation == "drelu"
    assert open_model(tiny_relu2).activation == "relu2"
    with pytest.raises(
        PinferError, match=r"activation relu does not use ffn_gate tensors, but layer 0 of m.gguf has one"
    ):
        open_model(path, "relu")
    with pytest.raises(PinferError, match="activation reglu needs ffn_gate tensors"):
        open_model(tiny_relu2, "reglu")
    with pytest.raises(PinferError, match="unknown activation 'silu'"):
        open_model(path, "silu")


def test_a_model_without_exact_zeros_can_be_opened_but_not_prepared(tmp_path: Path) -> None:
    model = open_model(write_small_model(tmp_path / "m.gguf", Shape(activation="other")))
    assert not model.is_sparse
    with pytest.raises(PinferError, match=r"m.gguf \(architecture llama\) is not known to have a ReLU-family FFN"):
        model.require_sparse()


@pytest.mark.parametrize("type_name", [*DOWN_TYPES, "IQ3_S"])
def test_dequantised_rows_equal_the_gguf_packages(tmp_path: Path, type_name: str) -> None:
    path = write_small_model(tmp_path / "m.gguf", Shape(type=type_name, n_layer=1))
    model = open_model(path)
    up = model.ffns[0].up
    reader = next(t for t in gguf.GGUFReader(path).tensors if t.name == up.name)
    expected = gguf.quants.dequantize(reader.data, reader.tensor_type).astype(np.float32).reshape(model.n_ff, -1)
    # Both compute in float32; products of scales may be rounded in another order.
    tolerance = 4 * np.finfo(np.float32).eps * np.abs(expected).max()
    picked = np.array([3, 0, model.n_ff - 1])
    for rows in (slice(None), slice(2, 5), picked):
        difference = np.abs(dequantize(model, up, rows) - expected[rows])
        assert difference.max() <= tolerance, f"{type_name}: {difference.max()} at {np.argmax(difference)}"


def test_a_large_vocabulary_costs_little(tmp_path: Path) -> None:
    path = tmp_path / "vocabulary.gguf"
    out = gguf.GGUFWriter(path, "llama")
    tokens = [f"token {i}" for i in range(128_000)]
    out.add_token_list(tokens)
    out.add_token_merges([f"a{i} b{i}" for i in range(280_000)])
    out.add_tensor("t", np.zeros((1, 32), np.float32))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    start = time.perf_counter()
    file = read_gguf(path)
    assert time.perf_counter() - start < 1
    assert file.count("tokenizer.ggml.tokens") == 128_000
    assert file.get("tokenizer.ggml.tokens") == tokens


def test_truncated_files_are_one_line_errors(tiny_relu2: Path) -> None:
    whole = tiny_relu2.read_bytes()
    rng = np.random.default_rng(0)
    header = read_gguf(tiny_relu2).data_offset
    # Most of a model is weights; cuts in the header are the interesting ones.
    for size in [*rng.integers(0, header, 100), *rng.integers(header, len(whole), 100)]:
        tiny_relu2.write_bytes(whole[:size])
        with pytest.raises(PinferError, match="cannot use ") as error:
            open_model(tiny_relu2)
        assert "\n" not in str(error.value)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_damaged_files_raise_no_other_exception(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "damaged.gguf"
    original = tmp_path / "original.gguf"
    if not original.exists():
        write_small_model(original, Shape(n_layer=1, n_embd=64, n_ff=64))
    content = bytearray(original.read_bytes())
    header = read_gguf(original).data_offset
    for at in data.draw(st.lists(st.integers(0, header - 1), min_size=1, max_size=8)):
        content[at] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    # Damage to some names and numbers cannot be detected.
    with contextlib.suppress(PinferError):
        open_model(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    for name, content, cause in (
        ("empty.gguf", b"", "it is not a GGUF file"),
        ("text.gguf", b"Once upon a time", "it is not a GGUF file"),
        ("magic.gguf", b"GGUF", "the header ends too early"),
        ("old.gguf", b"GGUF\x01\0\0\0" + bytes(16), "GGUF version 1 is not supported"),
        ("big.gguf", b"GGUF\0\0\0\x03" + bytes(16), "big-endian"),
        ("bare.gguf", b"GGUF\x03\0\0\0" + bytes(16), "it has no general.architecture"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(PinferError, match=cause):
            open_model(tmp_path / name)
    with pytest.raises(PinferError, match="does not exist"):
        open_model(tmp_path / "missing.gguf")
    with pytest.raises(PinferError, match="is a folder"):
        open_model(tmp_path)


def test_sizes_that_overflow_are_refused(tmp_path: Path) -> None:
    """A tensor of 2^62 rows must not wrap around to one that fits."""
    path = write_small_model(tmp_path / "m.gguf", Shape(n_layer=1))
    content = path.read_bytes()
    at = content.index(b"blk.0.ffn_up.weight") + len(b"blk.0.ffn_up.weight") + 4 + 8
    path.write_bytes(content[:at] + (1 << 62).to_bytes(8, "little") + content[at + 8 :])
    with pytest.raises(GgufError, match=r"it is cut off: tensor 'blk.0.ffn_up.weight'"):
        read_gguf(path)


def test_every_type_that_can_be_made_is_read_back(tmp_path: Path) -> None:
    """The errors that the verification of shards allows hold for data of very different kinds."""
    rng = np.random.default_rng(0)
    kinds = {
        "normal": rng.normal(size=(200, 512)),
        "heavy": rng.standard_t(1.5, size=(200, 512)),
        "positive": np.abs(rng.normal(size=(200, 512))),
        "sparse": rng.normal(size=(200, 512)) * (rng.random((200, 512)) < 0.02),
        "small": rng.normal(size=(200, 512)) * 1e-4,
    }
    for name, allowed in DOWN_TYPES.items():
        kind = gguf.GGMLQuantizationType[name]
        block, size = type_size(kind)
        for what, rows in kinds.items():
            wanted = np.asarray(rows, dtype=np.float32)
            found = ggml.dequantise(ggml.quantise(wanted, kind, 512 // block * size), kind, 512)
            largest = np.abs(wanted).reshape(200, -1, block).max(axis=2)
            worst = np.abs(found - wanted).reshape(200, -1, block).max(axis=2)
            excess = worst - largest * allowed.relative * 1.001 - allowed.absolute
            assert excess.max() <= 0, f"{name}, {what}: off by {worst.max()}"
