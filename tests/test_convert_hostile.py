"""Damaged and hostile files: pickles and GGUF headers made or mutated to break the readers.

A reader must end with its own error or with a description that lies inside the file. A crash would end pytest itself.
"""

from __future__ import annotations

import struct
import time
import zipfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pinfer.conversion.torch_file import open_torch_file
from pinfer.errors import PinferError
from pinfer.gguf_io.reader import GgufError, read_gguf
from pinfer.gguf_io.writer import GgufFileWriter
from pinfer.model import open_model

# --- pickles, opcode by opcode ------------------------------------------------------------------------------------

VALUES = np.arange(6, dtype="<f4")


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def value(what: object) -> bytes:
    """Opcodes that push a value."""
    match what:
        case None:
            return b"N"
        case str():
            return text(what)
        case int():
            return b"L%dL\n" % what
        case float():
            return b"G" + struct.pack(">d", what)
        case bytes():  # opcodes already
            return what
        case tuple():
            return b"(" + b"".join(map(value, what)) + b"t"
        case list():
            return b"](" + b"".join(map(value, what)) + b"e"
        case dict():
            return b"}(" + b"".join(value(k) + value(v) for k, v in what.items()) + b"u"
    raise TypeError(what)


def storage(key: str = "0", kind: str = "FloatStorage") -> bytes:
    return value(("storage", b"ctorch\n" + kind.encode() + b"\n", key, "cpu", len(VALUES))) + b"Q"


def tensor(storage: object, offset: object, shape: object, strides: object) -> bytes:
    call = b"ctorch._utils\n_rebuild_tensor_v2\n"
    return call + value((storage, offset, shape, strides, 0, {})) + b"R"


def write_bin(path: Path, state: bytes) -> Path:
    """A PyTorch file whose pickle pushes ``state``, with one storage of six floats."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/data.pkl", b"\x80\x02" + state + b".")
        archive.writestr("model/data/0", VALUES.tobytes())
    return path


def refused(path: Path) -> str:
    with pytest.raises(PinferError) as caught:
        open_torch_file(path)
    assert str(path) in caught.value.message
    assert "\n" not in str(caught.value)
    assert caught.value.hint
    return caught.value.message


PLAIN = (storage(), 0, (2, 3), (3, 1))


@pytest.mark.parametrize(
    ("view", "expected"),
    [
        (PLAIN, [[0, 1, 2], [3, 4, 5]]),
        ((storage(), 0, (3, 2), (1, 3)), [[0, 3], [1, 4], [2, 5]]),
        ((storage(), 4, (2,), (1,)), [4, 5]),
        ((storage(), 2, (), ()), 2),
        ((storage(), 0, (0, 3), (3, 1)), np.empty((0, 3))),
    ],
)
def test_views_inside_the_storage_are_read(view: tuple[Any, ...], expected: object, tmp_path: Path) -> None:
    file = open_torch_file(write_bin(tmp_path / "w.bin", value({"x": tensor(*view)})))
    np.testing.assert_array_equal(file.read("x"), expected)
    assert file.tensors["x"].dtype == "F32"


@pytest.mark.parametrize(
    "view",
    [
        (storage(), -1, (2, 3), (3, 1)),
        (storage(), 0, (-2, -3), (3, 1)),
        (storage(), 0, (2, 3), (-3, 1)),
        (storage(), 5, (2, 3), (-3, -1)),
        (storage(), 1 << 70, (2, 3), (3, 1)),
        (storage(), -(1 << 70), (2, 3), (3, 1)),
        (storage(), 0, (1 << 70, 3), (3, 1)),
        (storage(), 0, (2, 3), (1 << 70, 1)),
        (storage(), 0, (1 << 47, 1 << 47), (0, 0)),
        (storage(), 0, (7,), (0,)),
        (storage(), 0, (2, 3), (4, 1)),
        (storage(), 1, (2, 3), (3, 1)),
        (storage(), 6, (1,), (1,)),
        (storage(), 0.0, (2, 3), (3, 1)),
        (storage(), None, (2, 3), (3, 1)),
        (storage(), 0, (2.0, 3), (3, 1)),
        (storage(), 0, (2, 3), (3, None)),
        (storage(), 0, (2, 3), (1,)),
        (storage(), 0, [2, 3], [3, 1]),
        (storage(), 0, "23", "31"),
        (storage(), 0, (1,) * 1000, (1,) * 1000),
        (storage("1"), 0, (2, 3), (3, 1)),
        (storage("0", "DoubleStorage"), 0, (2, 3), (3, 1)),
        (value(("storage", "Evil", "0", "cpu", 6)) + b"Q", 0, (2, 3), (3, 1)),
        (value(("storage", [], "0", "cpu", 6)) + b"Q", 0, (2, 3), (3, 1)),
        (None, 0, (2, 3), (3, 1)),
        ("0", 0, (2, 3), (3, 1)),
    ],
)
def test_views_outside_the_storage_are_refused(view: tuple[Any, ...], tmp_path: Path) -> None:
    assert "damaged" in refused(write_bin(tmp_path / "w.bin", value({"x": tensor(*view)})))


REWRITES = [
    {"offset": -100},
    {"shape": (1 << 20, 1 << 20)},
    {"strides": (-3, 1)},
    {"storage": None},
    {"kind": "DoubleStorage"},
    {"key": "1"},
    {"__class__": "str"},
]


@pytest.mark.parametrize("state", REWRITES, ids=lambda state: next(iter(state)))
@pytest.mark.parametrize("slots", [False, True])
@pytest.mark.parametrize("target", ["tensor", "storage", "function", "class"])
def test_build_cannot_rewrite_what_was_made(state: dict[str, object], slots: bool, target: str, tmp_path: Path) -> None:
    build = value((None, state) if slots else state) + b"b"
    made = {
        "tensor": tensor(*PLAIN) + build,
        "storage": tensor(storage() + build, *PLAIN[1:]),
        "function": b"ctorch._utils\n_rebuild_tensor_v2\n" + build + value((*PLAIN, 0, {})) + b"R",
        "class": b"ccollections\nOrderedDict\n" + build + b"0" + tensor(*PLAIN),
    }
    refused(write_bin(tmp_path / "w.bin", value({"x": made[target]})))


def test_attributes_of_a_state_dict_are_ignored(tmp_path: Path) -> None:
    """PyTorch writes ``_metadata``; a hostile file could replace a method."""
    state = b"ccollections\nOrderedDict\n)R(" + value("x") + tensor(*PLAIN) + b"u"
    state += value({"_metadata": {}, "items": None, "keys": None, "get": 0}) + b"b"
    file = open_torch_file(write_bin(tmp_path / "w.bin", state))
    np.testing.assert_array_equal(file.read("x"), VALUES.reshape(2, 3))


@pytest.mark.parametrize(
    "state",
    [
        b"ctorch._utils\n_rebuild_parameter\n)R",
        b"ctorch._tensor\n_rebuild_from_type_v2\n(cos\nsystem\nNX\x02\x00\x00\x00lstR",
        b"ctorch._utils\n_rebuild_tensor_v2\n(NtR",
        b"ctorch\nTensor\n)R",
        b"ctorch._tensor\n_rebuild_from_type_v2\n(ctorch._utils\n_rebuild_tensor_v2\nNNNtR",
        b"}r\xff\xff\xff\x7f",
        b"(" * 100_000,
        b"](" * 50_000 + b"e" * 50_000 + b"Q",
        b"",
    ],
    ids=["no-data", "system", "few-arguments", "class-called", "no-tuple", "huge-memo", "marks", "nested", "empty"],
)
def test_pickles_that_make_no_tensor(state: bytes, tmp_path: Path) -> None:
    refused(write_bin(tmp_path / "w.bin", state))


def test_a_pickle_that_inflates(tmp_path: Path) -> None:
    path = tmp_path / "w.bin"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, archive.open("m/data.pkl", "w") as member:
        for _ in range(300):
            member.write(bytes(1 << 20))
    assert path.stat().st_size < 1 << 20
    assert "too large" in refused(path)


# --- mutations ----------------------------------------------------------------------------------------------------

T = TypeVar("T")
QUICK = settings(
    max_examples=250, deadline=None, database=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
EDITS = st.lists(
    st.tuples(st.integers(0, 1 << 16), st.sampled_from([0, 1, 2, 0x7F, 0x80, 0xFF]) | st.integers(0, 255)),
    min_size=1,
    max_size=8,
)


def mutated(data: bytes, edits: list[tuple[int, int]]) -> bytes:
    changed = bytearray(data)
    for at, byte in edits:
        changed[at % len(data)] = byte
    return bytes(changed)


def result_or_error(read: Callable[[Path], T], path: Path) -> T | str:
    try:
        return read(path)
    except (PinferError, GgufError) as error:
        return str(error)


@QUICK
@given(edits=EDITS)
def test_a_mutated_pickle_is_refused_or_read_inside_the_file(edits: list[tuple[int, int]], tmp_path: Path) -> None:
    state = value({"x": tensor(*PLAIN), "y": tensor(storage(), 3, (3,), (1,))})
    path = write_bin(tmp_path / "w.bin", mutated(state, edits))
    file = result_or_error(open_torch_file, path)
    if isinstance(file, str):
        assert "\n" not in file
        return
    for name in file.tensors:
        assert file.read(name).nbytes <= VALUES.nbytes
        file.read(name).sum()


@QUICK
@given(edits=EDITS)
def test_a_mutated_archive_is_refused_or_read_inside_the_file(edits: list[tuple[int, int]], tmp_path: Path) -> None:
    path = write_bin(tmp_path / "w.bin", value({"x": tensor(*PLAIN)}))
    path.write_bytes(mutated(path.read_bytes(), edits))
    file = result_or_error(open_torch_file, path)
    if isinstance(file, str):
        assert "\n" not in file
        return
    for name in file.tensors:
        file.read(name).astype(np.float64).sum()


@cache
def small_gguf(folder: Path) -> tuple[bytes, int]:
    """A GGUF with every kind of entry, and the length of its header."""
    path = folder / "small.gguf"
    with GgufFileWriter(path, "llama") as out:
        out.header.add_block_count(2)
        out.header.add_name("a name")
        out.header.add_token_list(["a", "bc", "", "déf"])
        out.header.add_token_scores([0.0, -1.0, 2.0, 3.0])
        out.header.add_add_bos_token(True)
        out.add_array("token_embd.weight", np.ones((4, 32), np.float32))
        out.add_array("blk.0.ffn_up.weight", np.ones((3, 32), np.float16))
        out.add_array("x", np.ones(7, np.int8))
    return path.read_bytes(), read_gguf(path).data_offset


@settings(QUICK, max_examples=1000)
@given(edits=EDITS)
def test_a_mutated_gguf_is_refused_or_read_inside_the_file(
    edits: list[tuple[int, int]], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    data, header = small_gguf(tmp_path_factory.getbasetemp())
    path = tmp_path / "m.gguf"
    path.write_bytes(mutated(data[:header], edits) + data[header:])
    gguf = result_or_error(read_gguf, path)
    if isinstance(gguf, str):
        assert "\n" not in gguf
        return
    for key in gguf.keys():  # noqa: SIM118
        gguf.get(key)
        gguf.typed(key)
        assert gguf.count(key) <= len(data)
    for entry in gguf.tensors.values():
        assert 0 <= entry.offset <= entry.offset + entry.n_bytes <= len(data)
        assert gguf.raw(entry).nbytes == entry.n_bytes


@pytest.mark.parametrize("count", [1 << 27, 1 << 40, (1 << 64) - 1])
def test_a_gguf_whose_header_never_ends(count: int, tmp_path: Path) -> None:
    """Zeros are empty strings and empty keys: a sparse file of 8 GB holds any number of them."""
    strings = struct.pack("<4sIQQ", b"GGUF", 3, 0, 1) + struct.pack("<Q1sIIQ", 1, b"k", 9, 8, count)
    values = struct.pack("<4sIQQ", b"GGUF", 3, 0, count)
    tensors = struct.pack("<4sIQQ", b"GGUF", 3, count, 0)
    for head in (strings, values, tensors):
        path = tmp_path / "m.gguf"
        path.write_bytes(head)
        with path.open("r+b") as file:
            file.truncate(8 << 30)
        with pytest.raises(GgufError):
            read_gguf(path)


@pytest.mark.parametrize(("n_layer", "n_tensors"), [((1 << 31) - 1, 3), (3_000_000, 600), (513, 600), (5, 4)])
def test_a_gguf_with_more_layers_than_it_can_hold(n_layer: int, n_tensors: int, tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    with GgufFileWriter(path, "llama") as out:
        out.header.add_block_count(n_layer)
        out.header.add_embedding_length(32)
        for i in range(n_tensors):
            out.add_array(f"t{i}", np.ones(1, np.float32))
    begin = time.monotonic()
    with pytest.raises(PinferError, match=f"{n_layer} layers in {n_tensors} tensors; libllama allows 512"):
        open_model(path)
    assert time.monotonic() - begin < 5
