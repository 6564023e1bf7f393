"""Shards: hot and cold together are the model, byte for byte where bytes are kept, whatever the type and placement."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.small_model import Shape, write_profile, write_small_model

from pinfer import split as stage
from pinfer.artefacts import paths, shards, verify
from pinfer.artefacts.placement import PlacementFile, new_placement_id
from pinfer.artefacts.shards import DOWN_TYPES, ShardFile, down_name
from pinfer.errors import PinferError
from pinfer.llama import ggml
from pinfer.model import Ffn, Model, dequantize, open_model
from pinfer.progress import NULL_PROGRESS, Progress
from pinfer.split import SplitOptions, split

TYPES = [
    "F32",
    "F16",
    "BF16",
    "Q8_0",
    "Q4_0",
    "Q4_1",
    "Q5_0",
    "Q5_1",
    "Q6_K",
    "Q4_K",
    "IQ4_NL",
    "IQ4_XS",
    "Q3_K",
    "Q2_K",
]


def _folder(path: Path) -> Path:
    folder = path.with_name(path.name + ".pinfer")
    folder.mkdir(exist_ok=True)
    return folder


def _place(model: Model, *n_hot: list[int], seed: int = 0) -> PlacementFile:
    """Hot neurons per layer of each device; which ones is random but fixed."""
    rng = np.random.default_rng(seed)
    order = tuple(rng.permutation(model.n_ff).astype(np.int32) for _ in range(model.n_layer))
    device = ",".join(["CPU", "RPC0", "RPC1"][: len(n_hot)])
    counts = tuple(n for layers in n_hot for n in layers)
    vram = tuple(range(len(n_hot)))
    placement = PlacementFile(
        new_placement_id(), counts, device, sum(vram), 0, 512, {"why": "test"}, order, vram_device=vram
    )
    placement.write(_folder(model.path) / paths.PLACEMENT, model, {})
    return placement


def _check_by_the_format(model: Model) -> None:
    """Reads all shards with the reference reader, by nothing but docs/formats.md, and compares them with the model."""
    folder = _folder(model.path)
    paths_hot = [folder / "hot.gguf", *sorted(folder.glob("hot-*.gguf"))]
    hot = [{t.name: t for t in gguf.GGUFReader(path).tensors} for path in paths_hot]
    cold = {t.name: t for t in gguf.GGUFReader(folder / "cold.gguf").tensors}
    assert all(t.data_offset % 4096 == 0 for t in cold.values())
    original = {t.name: t for t in gguf.GGUFReader(model.path).tensors}

    def rows(tensors: dict[str, gguf.ReaderTensor], name: str) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
        t = tensors[name]
        return np.ascontiguousarray(t.data).view(np.uint8).reshape(int(np.prod(t.shape[1:])), -1)

    for f in model.ffns:
        seen: list[int] = []
        blk = f"{f.name}."
        down = dequantize(model, f.down)
        for shard, down_part in (*((one, "ffn_down.weight") for one in hot), (cold, "ffn_down_t.weight")):
            parts = ["ffn_gate.weight", "ffn_up.weight"] if model.gated else ["ffn_up.weight"]
            if blk + "neurons" not in shard:
                assert not any(blk + part in shard for part in (*parts, down_part))
                continue
            neurons = shard[blk + "neurons"].data
            seen += neurons.tolist()
            for part in parts:
                assert shard[blk + part].tensor_type == original[blk + part].tensor_type
                assert shard[blk + part].shape.tolist() == [model.n_embd, len(neurons)]
                assert (rows(shard, blk + part) == rows(original, blk + part)[neurons]).all()
            t = shard[blk + down_part]
            wanted = down[:, neurons].T if shard is cold else down[:, neurons]
            assert t.shape.tolist() == list(wanted.shape[::-1])
            found = ggml.dequantise(rows(shard, t.name), t.tensor_type, wanted.shape[1])
            _assert_close(found, wanted, t.tensor_type.name)
            _assert_biases(model, f, shard, neurons)
        assert sorted(seen) == list(range(model.n_ff))


def _assert_close(
    found: np.ndarray[tuple[int, ...], np.dtype[np.float32]],
    wanted: np.ndarray[tuple[int, ...], np.dtype[np.float32]],
    type_name: str,
) -> None:
    allowed = DOWN_TYPES[type_name]
    worst = float(np.abs(found - wanted).max())
    assert worst <= 1.001 * allowed.relative * float(np.abs(wanted).max()) + allowed.absolute, (type_name, worst)
    # A transposition or a shift by one would pass no such test, coarse as some types are.
    assert np.corrcoef(found.ravel(), wanted.ravel())[0, 1] > (0.9 if type_name == "Q2_K" else 0.97)


def _assert_biases(
    model: Model,
    f: Ffn,
    shard: dict[str, gguf.ReaderTensor],
    neurons: np.ndarray[tuple[int, ...], np.dtype[np.int32]],
) -> None:
    for part, bias in (("gate", f.gate_bias), ("up", f.up_bias)):
        name = f"{f.name}.ffn_{part}.bias"
        assert (name in shard) == (bias is not None)
        if bias is not None:
            assert (shard[name].data == model.gguf.array(bias)[neurons]).all()


@pytest.mark.parametrize("type_name", TYPES)
def test_hot_and_cold_are_the_model(tmp_path: Path, type_name: str) -> None:
    shape = Shape(type=type_name, n_layer=3, n_ff=512, biases=type_name in ("F32", "Q4_0"))
    model = open_model(write_small_model(tmp_path / "m.gguf", shape))
    placement = _place(model, [0, 192, 512])
    report = split(model.path, SplitOptions(verify=True))
    _check_by_the_format(model)
    expected = type_name if type_name in ("F32", "F16", "BF16") else "Q8_0"
    assert report.cold_down_types == report.hot_down_types == (expected,)
    assert (report.n_hot, report.n_cold, report.order, report.verified) == (704, 832, "placement", True)
    for kind in ("hot", "cold"):
        assert ShardFile.read(_folder(model.path) / f"{kind}.gguf", kind, model).placement_id == placement.id


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    activation=st.sampled_from(["relu", "relu2", "reglu", "drelu"]),
    type_name=st.sampled_from(["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q6_K"]),
    down_type=st.sampled_from([None, "F32", "F16", "BF16", "Q8_0", "Q4_0", "Q6_K"]),
    n_ff=st.sampled_from([64, 96, 320, 704]),
    n_embd=st.sampled_from([64, 256, 512]),
    biases=st.booleans(),
    share=st.lists(st.floats(0, 1), min_size=2, max_size=2),
    parts=st.lists(st.floats(0, 1), min_size=0, max_size=2),
    seed=st.integers(0, 1 << 30),
)
def test_hot_and_cold_are_the_model_whatever_the_shape(
    tmp_path: Path,
    activation: str,
    type_name: str,
    down_type: str | None,
    n_ff: int,
    n_embd: int,
    biases: bool,
    share: list[float],
    parts: list[float],
    seed: int,
) -> None:
    block = 256 if type_name == "Q6_K" else 32
    if n_embd % block or n_ff % block:
        type_name = "Q8_0"
    shape = Shape(activation, type_name, 2, n_embd, n_ff, biases, seed)
    model = open_model(write_small_model(tmp_path / "m.gguf", shape))
    hot = [n_ff if s > 0.95 else int(s * n_ff) // 64 * 64 for s in share]
    # Each device takes its part of what those before it have left.
    devices = []
    for part in parts:
        taken = [int(part * n) // 64 * 64 for n in hot]
        devices.append(taken)
        hot = [n - k for n, k in zip(hot, taken, strict=True)]
    _place(model, *devices, hot, seed=seed)
    split(model.path, SplitOptions(down_type=down_type, verify=True))
    _check_by_the_format(model)


def test_pieces_and_bands_make_no_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With limits of a few rows the same bytes are written as in one go."""
    model = open_model(write_small_model(tmp_path / "m.gguf", Shape(type="Q4_0", n_ff=1024)))
    _place(model, [128, 576])
    folder = _folder(model.path)
    split(model.path, SplitOptions())
    whole = [(folder / name).read_bytes() for name in (paths.HOT, paths.COLD)]
    monkeypatch.setattr(shards, "PIECE_BYTES", 2000)
    monkeypatch.setattr(stage, "_COLUMN_BYTES", 4 * 256 * 300)
    monkeypatch.setattr(stage, "_BAND", 300 * 272)
    split(model.path, SplitOptions(verify=True))
    assert [(folder / name).read_bytes() for name in (paths.HOT, paths.COLD)] == whole


def test_plain_values_are_moved_as_they_are(tmp_path: Path) -> None:
    for type_name in ("F32", "F16", "BF16"):
        model = open_model(write_small_model(tmp_path / f"{type_name}.gguf", Shape(type=type_name)))
        _place(model, [64, 64])
        split(model.path, SplitOptions())
        cold = ShardFile.read(_folder(model.path) / paths.COLD, "cold", model)
        down = model.ffns[0].down
        width = down.n_bytes // (model.n_ff * model.n_embd)
        elements = model.raw(down).reshape(model.n_embd, model.n_ff, width)[:, cold.units[0]]
        found = cold.artefact.raw(down_name("cold", model.ffns[0]))
        assert (found.reshape(-1, model.n_embd, width) == elements.transpose(1, 0, 2)).all()


def test_k_quants_give_way_where_a_block_would_not_fit(tmp_path: Path) -> None:
    model = open_model(write_small_model(tmp_path / "m.gguf", Shape(type="Q8_0")))
    _place(model, [64, 0])
    notes: list[str] = []
    report = split(model.path, SplitOptions(down_type="Q6_K", verify=True), _Noting(notes))
    assert report.hot_down_types == ("Q8_0",)
    assert report.cold_down_types == ("Q6_K",)
    assert notes == ["rows that blocks of Q6_K do not divide are kept as Q6_K, Q8_0"]
    odd = open_model(write_small_model(tmp_path / "odd.gguf", Shape(type="F16", n_embd=80, n_ff=72)))
    _place(odd, [64, 72])
    report = split(odd.path, SplitOptions(down_type="Q8_0", verify=True))
    assert report.hot_down_types == report.cold_down_types == ("F16",)
    _check_by_the_format(odd)
    with pytest.raises(PinferError, match=r"down rows cannot be of type 'IQ1_S'; use one of: F32, F16"):
        split(model.path, SplitOptions(down_type="IQ1_S"))


class _Noting:
    """A progress that keeps its notes."""

    def __init__(self, notes: list[str]) -> None:
        self.task = NULL_PROGRESS.task
        self.notes = notes

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_without_a_placement_everything_is_cold(tmp_path: Path) -> None:
    model = open_model(write_small_model(tmp_path / "m.gguf", Shape()))
    notes: list[str] = []
    progress: Progress = _Noting(notes)
    report = split(model.path, SplitOptions(verify=True), progress)
    assert (report.n_hot, report.order) == (0, "model")
    assert "in the order of the model" in notes[0]
    cold = ShardFile.read(report.cold, "cold", model)
    assert all((n == np.arange(model.n_ff)).all() for n in cold.units)
    assert gguf.GGUFReader(report.hot).tensors == []

    profile = write_profile(_folder(model.path) / paths.PROFILE, model)
    report = split(model.path, SplitOptions(verify=True))
    assert report.order == "profile"
    cold = ShardFile.read(report.cold, "cold", model)
    for neurons, count in zip(cold.units, profile.count, strict=True):
        assert (np.diff(count[neurons]) <= 0).all()
    _check_by_the_format(model)


def test_each_device_has_a_shard_of_its_own(tmp_path: Path) -> None:
    model = open_model(write_small_model(tmp_path / "m.gguf", Shape(type="Q4_0", n_layer=3, n_ff=480, biases=True)))
    placement = _place(model, [64, 0, 128], [0, 0, 64], [192, 480, 288])
    report = split(model.path, SplitOptions(verify=True))
    _check_by_the_format(model)
    assert [path.name for path in report.hot_shards] == ["hot.gguf", "hot-1.gguf", "hot-2.gguf"]
    assert report.hot == report.hot_shards[0]
    assert report.n_hot == 64 + 128 + 64 + 192 + 480 + 288 == model.n_layer * model.n_ff - report.n_cold
    assert report.hot_bytes == sum(path.stat().st_size for path in report.hot_shards)
    for device, path in enumerate(report.hot_shards):
        shard = ShardFile.read(path, "hot", model)
        assert shard.placement_id == placement.id
        for layer, neurons in enumerate(shard.units):
            assert neurons.tolist() == placement.hot(device)[layer].tolist()
    # The best neurons of a layer are those of the first device.
    assert placement.hot(0)[2].tolist() == placement.order[2][:128].tolist()
    read = PlacementFile.read(_folder(model.path) / paths.PLACEMENT, model)
    assert (read.device, read.vram, read.vram_device, read.n_hot) == ("CPU,RPC0,RPC1", 3, (0, 1, 2), placement.n_hot)


def test_shards_of_devices_that_are_gone_go_too(tmp_path: Path) -> None:
    model = open_model(write_small_model(tmp_path / "m.gguf", Shape()))
    folder = _folder(model.path)
    for name in ("hot-x.gguf", "hot-01.gguf", "other-1.gguf"):
        (folder / name).touch()
    for n_devices in (3, 2, 1):
        _place(model, *([64, 0] for _ in range(n_devices)))
        split(model.path, SplitOptions(verify=True))
        found = sorted(path.name for path in folder.glob("hot*.gguf"))
        assert found == sorted(["hot-01.gguf", "hot-x.gguf", "hot.gguf", "hot-1.gguf", "hot-2.gguf"][: 2 + n_devices])
    (folder / paths.PLACEMENT).unlink()
    split(model.path, SplitOptions())
    assert (folder / "other-1.gguf").exists()


def test_threads_are_bounded_by_the_memory_their_columns_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = open_model(write_small_model(tmp_path / "m.gguf", Shape(n_embd=256)))
    monkeypatch.setattr(stage, "physical_cores", lambda: 64)
    assert stage._n_threads(model) == 64
    assert stage._n_threads(replace(model, n_embd=8192)) == 32
    monkeypatch.setattr(stage, "_COLUMN_BYTES", 1)
    assert stage._n_threads(model) == 1


def test_verification_sees_every_device(tmp_path: Path) -> None:
    model = open_model(write_small_model(tmp_path / "m.gguf", Shape(type="Q4_0")))
    _place(model, [64, 64], [64, 128])
    report = split(model.path, SplitOptions(verify=True))
    verify.verify_shards(model, report.hot_shards, report.cold)
    with pytest.raises(PinferError, match=r"layer 0: neuron \d+ occurs 0 times"):
        verify.verify_shards(model, report.hot_shards[:1], report.cold)
    with pytest.raises(PinferError, match=r"layer 0: neuron \d+ occurs 2 times"):
        verify.verify_shards(model, (*report.hot_shards, report.hot), report.cold)
    _corrupt(report.hot_shards[1], "blk.1.ffn_up.weight", 7)
    with pytest.raises(PinferError, match="layer 1: the hot up row of neuron"):
        verify.verify_shards(model, report.hot_shards, report.cold)


def _corrupt(path: Path, name: str, at: int) -> None:
    tensor = next(t for t in gguf.GGUFReader(path).tensors if t.name == name)
    content = bytearray(path.read_bytes())
    content[tensor.data_offset + at] ^= 0x40
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("shard", "tensor", "where", "cause"),
    [
        ("hot", "blk.1.ffn_gate.weight", 700, "layer 1: the hot gate row of neuron"),
        ("hot", "blk.0.ffn_up.weight", 0, "layer 0: the hot up row of neuron"),
        ("hot", "blk.0.ffn_down.weight", 1, "layer 0: the hot down rows are off by"),
        ("hot", "blk.0.ffn_up.bias", 3, "layer 0: the up biases of the hot neurons differ"),
        ("hot", "blk.0.neurons", 0, "layer 0: neuron"),
        ("cold", "blk.0.ffn_gate.weight", 5, "layer 0: the cold gate row of neuron"),
        ("cold", "blk.0.ffn_up.weight", 200, "layer 0: the cold up row of neuron"),
        ("cold", "blk.1.ffn_down_t.weight", 1, "layer 1: the cold down rows are off by"),
        ("cold", "blk.1.ffn_gate.bias", 2, "layer 1: the gate biases of the cold neurons differ"),
        ("cold", "blk.1.neurons", 0, "layer 1: neuron"),
    ],
)
def test_verification_finds_a_single_wrong_byte(
    tmp_path: Path, shard: str, tensor: str, where: int, cause: str
) -> None:
    model = open_model(write_small_model(tmp_path / "m.gguf", Shape(type="Q4_0", biases=True)))
    _place(model, [64, 128])
    report = split(model.path, SplitOptions(verify=True))
    _corrupt(report.hot if shard == "hot" else report.cold, tensor, where)
    with pytest.raises(PinferError, match=cause):
        verify.verify_shards(model, report.hot_shards, report.cold)


def test_verification_finds_shards_of_two_placements(tmp_path: Path) -> None:
    model = open_model(write_small_model(tmp_path / "m.gguf", Shape()))
    _place(model, [64, 64])
    report = split(model.path, SplitOptions())
    old = report.hot.read_bytes()
    _place(model, [64, 64])
    split(model.path, SplitOptions())
    report.hot.write_bytes(old)
    with pytest.raises(PinferError, match="from different placements"):
        verify.verify_shards(model, report.hot_shards, report.cold)


def test_a_failed_verification_keeps_the_old_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = open_model(write_small_model(tmp_path / "m.gguf", Shape()))
    _place(model, [64, 64])
    report = split(model.path, SplitOptions())
    old = report.hot.read_bytes(), report.cold.read_bytes()
    _place(model, [128, 64])
    good = stage._transposed_down

    def wrong(*arguments: object) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
        rows = good(*arguments)  # type: ignore[arg-type]
        rows[0, 1] ^= 0x40
        return rows

    monkeypatch.setattr(stage, "_transposed_down", wrong)
    with pytest.raises(PinferError, match="the cold down rows are off by"):
        split(model.path, SplitOptions(verify=True))
    assert (report.hot.read_bytes(), report.cold.read_bytes()) == old
    assert list(report.hot.parent.glob(".*.tmp")) == []


_KILLED = """
import os, signal, sys
from pathlib import Path
from pinfer import split as stage
write = stage._write_cold
def killed(model, plan, layer, *rest):
    if layer == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    write(model, plan, layer, *rest)
stage._write_cold = killed
stage.split(Path(sys.argv[1]), stage.SplitOptions())
"""


def test_a_killed_split_leaves_the_old_shards_whole(tmp_path: Path) -> None:
    model = open_model(write_small_model(tmp_path / "m.gguf", Shape()))
    _place(model, [64, 64])
    report = split(model.path, SplitOptions())
    old = report.hot.read_bytes(), report.cold.read_bytes()
    _place(model, [128, 64])
    root = Path(__file__).resolve().parent.parent
    environment = {**os.environ, "PYTHONPATH": str(root)}
    ended = subprocess.run([sys.executable, "-c", _KILLED, str(model.path)], env=environment, check=False)
    assert ended.returncode == -signal.SIGKILL
    assert (report.hot.read_bytes(), report.cold.read_bytes()) == old
    assert len(list(report.hot.parent.glob(".*.tmp"))) == 2
    # The next one clears the remains away.
    split(model.path, SplitOptions(verify=True))
    assert list(report.hot.parent.glob(".*.tmp")) == []
    assert report.hot.read_bytes() != old[0]


_MEASURED = """
import resource, sys
from pathlib import Path
from pinfer.split import SplitOptions, split
from pinfer import split as stage
from pinfer.artefacts import shards
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
shards.PIECE_BYTES = stage._COLUMN_BYTES = 1 << 20
stage._BAND = 4 << 20
split(Path(sys.argv[1]), SplitOptions(verify=True))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """Pages of the model and of what is written do not stay: 64 MB of FFN pass through a fraction of it."""
    shape = Shape(type="F16", n_layer=4, n_embd=1024, n_ff=2560)
    path = write_small_model(tmp_path / "m.gguf", shape)
    root = Path(__file__).resolve().parent.parent
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, "-c", _MEASURED, str(path)], env=environment, check=True, capture_output=True, text=True
    )
    grown = int(done.stdout.split()[-1]) * 1024
    assert path.stat().st_size > 60e6
    # Libraries that are loaded on the way take some of this.
    assert grown < 45e6, f"{grown / 1e6:.0f} MB"


def test_progress_counts_every_byte(tmp_path: Path) -> None:
    from collections.abc import Callable, Iterator
    from contextlib import contextmanager

    model = open_model(write_small_model(tmp_path / "m.gguf", Shape(type="Q8_0")))
    _place(model, [64, 256])
    done: dict[str, list[int]] = {}

    class Counting:
        @contextmanager
        def task(self, label: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
            assert unit == "bytes"
            counts = done.setdefault(label, [total])
            yield counts.append

        def note(self, text: str) -> None:
            raise AssertionError(text)

    split(model.path, SplitOptions(verify=True), Counting())
    for label, (total, *steps) in done.items():
        # Headers, biases and padding are in the total and take no time.
        assert 0.5 * total < sum(steps) <= total, label
    assert sorted(done) == ["split", "verify"]


def test_a_placement_that_makes_no_sense_is_damage(tmp_path: Path) -> None:
    model = open_model(write_small_model(tmp_path / "m.gguf", Shape()))
    for n_hot in ([[65, 0]], [[0, 320]], [[192, 0], [128, 0]], [[64, 10], [0, 64]]):
        _place(model, *n_hot)
        with pytest.raises(PinferError, match=r"placement.gguf is damaged: layer . has \d+ hot neurons of 256"):
            split(model.path, SplitOptions())
    placement = _place(model, [64, 64])
    twice = placement.order[0].copy()
    twice[0] = twice[1]
    broken = PlacementFile(placement.id, (64, 64), "CPU", 0, 0, 512, {}, (twice, placement.order[1]))
    broken.write(_folder(model.path) / paths.PLACEMENT, model, {})
    with pytest.raises(PinferError, match="the order of layer 0 does not contain each neuron once"):
        split(model.path, SplitOptions())


def test_a_disk_that_fills_up_loses_nothing(tmp_path: Path) -> None:
    model = open_model(write_small_model(tmp_path / "m.gguf", Shape(n_ff=1024)))
    _place(model, [64, 64])
    report = split(model.path, SplitOptions())
    old = report.hot.read_bytes(), report.cold.read_bytes()
    limit, ignored = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(old[1]) // 2, limit[1]))
    try:
        with pytest.raises(PinferError, match=r"no space left while writing .*cold.gguf; what was there before"):
            split(model.path, SplitOptions())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, ignored)
    assert (report.hot.read_bytes(), report.cold.read_bytes()) == old
    assert list(report.hot.parent.glob(".*.tmp")) == []


def test_speed_is_reported(tmp_path: Path) -> None:
    model = open_model(write_small_model(tmp_path / "m.gguf", Shape()))
    start = time.monotonic()
    report = split(model.path, SplitOptions())
    assert 0 < report.seconds <= time.monotonic() - start
    assert report.to_json()["cold"] == str(report.cold)
