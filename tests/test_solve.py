"""solve: the budget is filled and never exceeded, what is hot is the hottest, and what is predicted adds up."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from support.small_model import Shape, write_profile, write_small_model

from pinfer import solve as stage
from pinfer.artefacts import paths
from pinfer.artefacts.placement import GROUP, PlacementFile
from pinfer.artefacts.predictor import LayerPredictor, PredictorWriter
from pinfer.artefacts.shards import down_types, hot_unit_bytes
from pinfer.errors import PinferError
from pinfer.execution import ExecutionOptions, decide
from pinfer.llama import devices, log
from pinfer.llama.cache_types import DEFAULT_CACHE
from pinfer.model import Model, open_model
from pinfer.placement import budget
from pinfer.placement.compute_buffers import Layout, count_compute_bytes
from pinfer.placement.cost_model import LayerCost, PredictorCost, Use, ffn_cost
from pinfer.placement.machine import HotDevice, Machine, probe, read_machine
from pinfer.placement.model_bytes import compute_bytes, fit_dense, hot_buffers, kv_bytes, layer_bytes, output_bytes
from pinfer.progress import NULL_PROGRESS
from pinfer.solve import SolveOptions, SolveReport, solve
from pinfer.split import SplitOptions, split

MIB = 1 << 20

GPU: dict[str, Any] = {
    "name": "CUDA0",
    "description": "a card",
    "kind": "gpu",
    "memory_total": 24 << 30,
    "memory_free": 23 << 30,
    "bandwidth": 9e11,
    "sync_seconds": 1e-6,
}
MACHINE: dict[str, Any] = {"name": "desktop", "n_threads": 8, "cpu_bandwidth": 6e10, "scattered": 0.4, "devices": [GPU]}


@pytest.fixture
def machine_file(tmp_path: Path) -> Path:
    path = tmp_path / "machine.json"
    path.write_text(json.dumps(MACHINE))
    return path


@pytest.fixture
def model(tmp_path: Path) -> Model:
    shape = Shape(type="Q4_0", n_layer=4, n_embd=512, n_ff=2048, n_vocab=512)
    model = open_model(write_small_model(tmp_path / "m.gguf", shape))
    write_profile(_folder(model) / paths.PROFILE, model)
    return model


def _folder(model: Model) -> Path:
    return paths.artefact_dir(model.path, model.fingerprint, for_writing=True)


class _Noting:
    def __init__(self) -> None:
        self.task = NULL_PROGRESS.task
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def _used(report: SolveReport) -> int:
    return sum(report.n_bytes.values())


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(vram=st.integers(0, 40 * MIB), n_ctx=st.integers(1, 512), cache_type=st.sampled_from(["f16", "q8_0", "f32"]))
def test_a_budget_is_filled_and_never_exceeded(
    model: Model, machine_file: Path, vram: int, n_ctx: int, cache_type: str
) -> None:
    """Counted anew from what the placement says, not from the solver's own sums."""
    options = SolveOptions(
        vram=vram, n_ctx=n_ctx, n_ubatch=64, machine=machine_file, cache_type_k=cache_type, cache_type_v=cache_type
    )
    all_that_pays = sum(solve(model.path, replace(options, vram=1 << 30)).n_hot)
    report = solve(model.path, options)
    placement = PlacementFile.read(report.placement, model)
    assert placement.n_hot == report.n_hot
    total = _dense_bytes(model, placement.n_gpu_layers, n_ctx, (cache_type, cache_type))
    neuron = [hot_unit_bytes(ffn, down_types(ffn, None)) for ffn in model.ffns]
    hot = sum(n * size for n, size in zip(placement.n_hot, neuron, strict=True))
    total += hot + hot_buffers(model, max(placement.n_hot))
    assert total == _used(report) <= vram == placement.vram
    # As long as anything is left that pays, the rest is too small for a group and its buffers.
    if sum(placement.n_hot) < all_that_pays:
        assert vram - total <= max(0.03 * vram, GROUP * neuron[0] + hot_buffers(model, GROUP))
    # hot.gguf is what the device will be given.
    shard = split(model.path, SplitOptions()).hot
    assert sum(t.n_bytes for t in _tensors(shard) if not t.name.endswith("neurons")) <= hot


def _dense_bytes(model: Model, n_gpu_layers: int, n_ctx: int, cache_types: tuple[str, str]) -> int:
    if n_gpu_layers == 0:
        return 0
    on_device = range(model.n_layer + 1 - n_gpu_layers, model.n_layer)
    total = output_bytes(model) + compute_bytes(model, n_ctx, 64)
    return total + sum(layer_bytes(model, i) + kv_bytes(model, i, n_ctx, cache_types) for i in on_device)


def test_several_devices_share_the_hot_neurons(model: Model, tmp_path: Path) -> None:
    path = _machine_with(tmp_path, GPU, {**GPU, "name": "CUDA1", "bandwidth": 4e11})
    options = SolveOptions(vram=(12 * MIB, 8 * MIB), n_ctx=128, n_ubatch=64, machine=path)
    report = solve(model.path, options)
    first, second = report.devices
    assert report.device == "CUDA0,CUDA1"
    assert (first.vram, second.vram) == (12 * MIB, 8 * MIB)
    for device in report.devices:
        assert 0.9 * device.vram < sum(device.n_bytes.values()) <= device.vram
    assert second.n_bytes["dense_weights"] == second.n_bytes["kv_cache"] == 0 < first.n_bytes["dense_weights"]
    assert report.n_bytes["hot_neurons"] == first.n_bytes["hot_neurons"] + second.n_bytes["hot_neurons"]
    assert sum(first.n_hot) > 0 < sum(second.n_hot)
    assert report.n_hot == tuple(a + b for a, b in zip(first.n_hot, second.n_hot, strict=True))
    placement = PlacementFile.read(report.placement, model)
    assert (placement.device, placement.vram) == ("CUDA0,CUDA1", 20 * MIB)
    assert placement.vram_device == (12 * MIB, 8 * MIB)
    assert placement.n_hot == (*first.n_hot, *second.n_hot)
    for layer, order in enumerate(placement.order):
        parts = [placement.hot(0)[layer], placement.hot(1)[layer], placement.cold()[layer]]
        assert [len(part) for part in parts[:2]] == [first.n_hot[layer], second.n_hot[layer]]
        assert np.array_equal(np.concatenate(parts), order)
    # One device of the file, in another order, or one number for both.
    only = solve(model.path, replace(options, vram=12 * MIB, device="cuda1"))
    assert (only.device, only.vram) == ("CUDA1", 12 * MIB)
    turned = solve(model.path, replace(options, device="CUDA1, CUDA0"))
    assert [d.name for d in turned.devices] == ["CUDA1", "CUDA0"]
    both = solve(model.path, replace(options, vram=20 * MIB + 1))
    assert [d.vram for d in both.devices] == [10 * MIB + 1, 10 * MIB]
    free = solve(model.path, replace(options, vram=None))
    assert all(d.vram < 23 << 30 for d in free.devices)
    assert free.n_hot == (model.n_ff,) * model.n_layer
    with pytest.raises(PinferError, match=r"--vram has 3 sizes for 2 devices \(CUDA0, CUDA1\)"):
        solve(model.path, replace(options, vram=(1, 2, 3)))


def _machine_with(folder: Path, *devices: dict[str, Any]) -> Path:
    path = folder / "machine.json"
    path.write_text(json.dumps({**MACHINE, "devices": devices}))
    return path


def test_what_a_driver_takes_is_counted_once_for_each_user(model: Model, tmp_path: Path) -> None:
    """libllama and the hot part open the device each for itself."""
    path = _machine_with(tmp_path, {**GPU, "overhead": 2 * MIB})
    report = solve(model.path, SolveOptions(vram=30 * MIB, n_ctx=128, n_ubatch=64, machine=path))
    assert report.n_bytes["driver"] == 4 * MIB
    assert 0 < _used(report) <= 30 * MIB
    noting = _Noting()
    report = solve(model.path, SolveOptions(vram=2 * MIB, n_ctx=128, n_ubatch=64, machine=path), noting)
    assert (_used(report), report.n_gpu_layers, sum(report.n_hot)) == (0, 0, 0)
    assert "everything stays on the CPU" in noting.notes[0]


def _tensors(path: Path) -> Any:
    from pinfer.gguf_io.reader import read_gguf

    return read_gguf(path).tensors.values()


def test_more_memory_brings_more_activations_to_the_device(model: Model, machine_file: Path) -> None:
    shares = []
    for vram in (6 * MIB, 10 * MIB, 12 * MIB, 15 * MIB, 30 * MIB):
        report = solve(model.path, SolveOptions(vram=vram, n_ubatch=64, machine=machine_file))
        assert report.greedy <= report.objective <= report.bound
        shares.append(report.hot_activations)
    assert shares == sorted(shares)
    assert shares[0] < 0.9 < shares[-1]
    assert report.tokens_per_s > report.tokens_per_s_cold


def test_the_hottest_neurons_are_the_hot_ones(model: Model, machine_file: Path) -> None:
    profile = write_profile(_folder(model) / paths.PROFILE, model, seed=3)
    report = solve(model.path, SolveOptions(vram=12 * MIB, n_ubatch=64, machine=machine_file))
    placement = PlacementFile.read(report.placement, model)
    assert any(0 < n < model.n_ff for n in placement.n_hot)
    activations = 0
    for order, n, count in zip(placement.order, placement.n_hot, profile.count, strict=True):
        assert n % GROUP == 0
        assert n == 0 or count[order[:n]].min() >= count[order[n:]].max(initial=0)
        activations += count[order[:n]].sum()
    assert report.objective == pytest.approx(activations / profile.tokens)
    assert report.hot_activations == pytest.approx(activations / sum(c.sum() for c in profile.count))


def test_a_slow_way_to_the_device_keeps_layers_off_it(model: Model, tmp_path: Path) -> None:
    path = tmp_path / "slow.json"
    path.write_text(json.dumps({**MACHINE, "devices": [{**GPU, "sync_seconds": 1.0}]}))
    report = solve(model.path, SolveOptions(vram=30 * MIB, n_ubatch=64, machine=path))
    assert report.n_hot == (0,) * model.n_layer
    # In between, a layer gets its least count or nothing.
    path.write_text(json.dumps({**MACHINE, "devices": [{**GPU, "sync_seconds": 2e-5}]}))
    report = solve(model.path, SolveOptions(vram=30 * MIB, n_ubatch=64, machine=path))
    machine = read_machine(path)
    profile = write_profile(_folder(model) / paths.PROFILE, model)
    for ffn, count, n in zip(model.ffns, profile.count, report.n_hot, strict=True):
        frequency = np.sort(count)[::-1] / profile.tokens
        cost = ffn_cost(ffn, down_types(ffn, None), Use(frequency), None, machine)
        groups = n // GROUP
        assert groups >= cost.least_groups(0) > 1
        device = cost.devices[0]
        assert cost.cpu[0] - cost.cpu[groups] >= device[groups] >= 2e-5
        assert device[groups] <= cost.cpu[groups] or groups <= max(cost.least_groups(0), *cost.most_groups())


def test_costs_by_hand(model: Model) -> None:
    """One layer of 2048 neurons of 3 rows; Q4_0 rows of 512 values are 288 bytes, Q8_0 ones 544."""
    device = HotDevice("X", "", "gpu", 1, 1, 1e9, 1e-3)
    machine = Machine("m", 1, 2e9, 0.5, (device, replace(device, bandwidth=5e8)))
    ffn, use = model.ffns[0], Use(np.full(2048, 0.25))
    types = down_types(ffn, None)
    exact = ffn_cost(ffn, types, use, None, machine)
    assert exact.devices[0][[0, 1, 32]] == pytest.approx([0, 1e-3 + 64 * 1120 / 1e9, 1e-3 + 2048 * 1120 / 1e9])
    assert exact.devices[1][[0, 1, 32]] == pytest.approx([0, 1e-3 + 64 * 1120 / 5e8, 1e-3 + 2048 * 1120 / 5e8])
    # All gates, a quarter of the other rows, at half of 2 GB/s.
    per_neuron = (288 + 0.25 * (288 + 544)) / 1e9
    assert exact.cpu[[0, 1, 32]] == pytest.approx([2048 * per_neuron, 1984 * per_neuron, 0])
    # All sides work at the same time, and the slowest decides.
    assert exact.seconds((0, 0)) == pytest.approx(2048 * per_neuron)
    assert exact.seconds((3, 5)) == pytest.approx(max(1536 * per_neuron, 1e-3 + 320 * 1120 / 5e8))
    predicted = ffn_cost(ffn, types, use, PredictorCost(10_000, 0.5), machine)
    per_neuron = (0.5 * 288 + 0.25 * (288 + 544)) / 1e9
    assert predicted.cpu[[0, 31, 32]] == pytest.approx([2048 * per_neuron + 5e-6, 64 * per_neuron + 5e-6, 0])


def test_no_device_gets_more_of_a_layer_than_it_does_in_the_time_of_the_others() -> None:
    cpu = 3 * np.arange(12, -1, -1, dtype=np.float64)
    fast, slow = np.arange(1, 14, dtype=np.float64), np.arange(1, 27, 2, dtype=np.float64)
    fast[0] = slow[0] = 0
    # 8 time units: the fast device has done 7 groups by then, the slow one 3, the CPU the other 2.
    cost = LayerCost(cpu, (fast, slow))
    assert cost.most_groups() == (7, 3)
    assert cost.seconds((7, 3)) == 8 == min(cost.seconds((a, b)) for a in range(13) for b in range(13 - a))
    assert LayerCost(cpu, (fast,)).most_groups() == (int(np.argmin(np.maximum(cpu, fast))),)
    assert [cost.least_groups(d) for d in range(2)] == [1, 1]
    # Where the slow device has no memory left, the fast one may do more than its share.
    assert cost.most_alone(0) == int(np.argmin(np.maximum(cpu, fast))) == 9
    assert LayerCost(cpu, ()).most_groups() == ()


def test_a_predictor_that_is_there_is_counted(model: Model, machine_file: Path) -> None:
    options = SolveOptions(vram=0, machine=machine_file)
    exact = solve(model.path, options).tokens_per_s
    with PredictorWriter(_folder(model) / paths.PREDICTOR, model, "f16") as out:
        for _ in range(3):
            a, b = np.zeros((32, model.n_embd), np.float32), np.zeros((model.n_ff, 32), np.float32)
            out.add(LayerPredictor(32, 1.0, 0.2, a, b, np.zeros(model.n_ff, np.float32)))
        out.add(LayerPredictor(0, 1.0, 1.0, kind="none"))
        out.finish({})
    cost = PredictorCost(2 * 32 * (512 + 2048) + 4 * 2048, float(np.float32(0.2)))
    assert stage._predictors(model, _folder(model)) == [cost] * 3 + [None]
    assert solve(model.path, options).tokens_per_s > exact


def test_no_vram_leaves_everything_on_the_cpu(model: Model) -> None:
    report = solve(model.path, SolveOptions(vram=0))
    assert (report.n_hot, report.n_gpu_layers, _used(report)) == ((0,) * 4, 0, 0)
    assert report.tokens_per_s > 0


def test_without_a_profile_only_nothing_can_be_placed(model: Model, machine_file: Path) -> None:
    (_folder(model) / paths.PROFILE).unlink()
    noting = _Noting()
    report = solve(model.path, SolveOptions(vram=0), noting)
    placement = PlacementFile.read(report.placement, model)
    assert all((o == np.arange(model.n_ff)).all() for o in placement.order)
    assert "no profile" in noting.notes[0]
    with pytest.raises(PinferError, match=r"m.gguf has no profile yet.*run: pinfer profile"):
        solve(model.path, SolveOptions(vram=20 * MIB, machine=machine_file))


def test_a_budget_too_small_for_dense_layers_is_one_of_hot_neurons(model: Model, machine_file: Path) -> None:
    noting = _Noting()
    report = solve(model.path, SolveOptions(vram=2 * MIB, machine=machine_file), noting)
    assert (report.n_gpu_layers, report.n_bytes["compute_buffers"]) == (0, 0)
    assert report.n_bytes["hot_neurons"] > MIB // 4
    assert noting.notes == []
    report = solve(model.path, SolveOptions(vram=4096, machine=machine_file), noting)
    assert _used(report) == 0
    assert noting.notes == ["nothing fits into this budget or would be faster there: everything stays on the CPU"]


def test_it_is_said_when_hot_neurons_alone_would_be_faster(model: Model, tmp_path: Path) -> None:
    noting = _Noting()
    path = _machine_with(tmp_path, GPU)
    report = solve(model.path, SolveOptions(vram=30 * MIB, n_ctx=128, n_ubatch=64, machine=path), noting)
    assert report.tokens_per_s_hot_first < report.tokens_per_s
    assert not any("hot neurons alone" in note for note in noting.notes)
    # Each dense layer there costs more of the way to the device than it saves.
    noting = _Noting()
    slow = _machine_with(tmp_path, {**GPU, "sync_seconds": 1e-3})
    report = solve(model.path, SolveOptions(vram=30 * MIB, n_ctx=128, n_ubatch=64, machine=slow), noting)
    assert report.tokens_per_s_hot_first > 1.05 * report.tokens_per_s
    assert "hot neurons alone would give" in noting.notes[0]


def test_it_is_said_when_the_model_fits_as_it_is(model: Model, tmp_path: Path) -> None:
    path = _machine_with(tmp_path, {**GPU, "sync_seconds": 5e-6})
    noting = _Noting()
    # Stock libllama would compute SiLU for this one.
    solve(model.path, SolveOptions(vram=30 * MIB, n_ctx=128, n_ubatch=64, machine=path), noting)
    shape = Shape(activation="relu2", arch="arcee", type="Q4_0", n_layer=4, n_embd=512, n_ff=3072, n_vocab=512)
    model = open_model(write_small_model(tmp_path / "native.gguf", shape))
    write_profile(_folder(model) / paths.PROFILE, model)
    solve(model.path, SolveOptions(vram=10 * MIB, n_ctx=128, n_ubatch=64, machine=path), noting)
    assert not any("fits" in note for note in noting.notes)
    report = solve(model.path, SolveOptions(vram=30 * MIB, n_ctx=128, n_ubatch=64, machine=path), noting)
    assert report.tokens_per_s_dense > 1.05 * report.tokens_per_s
    assert noting.notes[-1].startswith("the whole model fits on CUDA0")
    assert noting.notes[-1].endswith(f"pinfer run {model.path} --dense -ngl all")


def test_dense_layers_fill_the_budget_from_the_output_back(model: Model) -> None:
    def compute(n_gpu_layers: int) -> int:
        return compute_bytes(model, 512, 64) + 1000 * n_gpu_layers

    parts = [fit_dense(model, room * MIB // 8, 512, DEFAULT_CACHE, compute) for room in range(120)]
    sizes = [part.n_gpu_layers for part in parts]
    assert sizes == sorted(sizes)
    assert set(sizes) == set(range(model.n_layer + 2))
    for room, part in enumerate(parts):
        assert part.total <= room * MIB // 8
        assert part.compute_buffers == (compute(part.n_gpu_layers) if part.n_gpu_layers else 0)
    assert parts[0].total == 0


def test_the_device_of_this_machine(model: Model, monkeypatch: pytest.MonkeyPatch, machine_file: Path) -> None:
    """The CPU stands for a GPU here: what is chosen by name or by kind, and how much of it."""
    cpu = devices.list_devices()[-1]
    assert cpu.kind == "cpu"
    monkeypatch.setattr(budget, "probe", lambda chosen, *_: _pretended(chosen))
    noting = _Noting()
    if len(devices.list_devices()) == 1:
        report = solve(model.path, SolveOptions(), noting)
        assert (report.vram, report.device, sum(report.n_hot)) == (0, "none", 0)
        assert noting.notes == ["no GPU found: every neuron stays on the CPU"]
        with pytest.raises(PinferError, match="--vram has 3 sizes for 2 devices"):
            solve(model.path, SolveOptions(vram=(1, 2, 3), device="CUDA0,CUDA1"))
        assert solve(model.path, SolveOptions(vram=(20 * MIB, 20 * MIB))).device == "none,none1"
        report = solve(model.path, SolveOptions(vram=30 * MIB, n_ubatch=64), noting)
        assert report.device == "none"
        assert sum(report.n_hot) > 0
        assert "running this placement needs one" in noting.notes[1]
        assert solve(model.path, SolveOptions(vram=30 * MIB, device="CUDA7")).device == "CUDA7"
    with pytest.raises(PinferError, match=rf"there is no device 'CUDA7' here; choose one of: .*{cpu.name}"):
        solve(model.path, SolveOptions(device="CUDA7"))
    # A CPU device takes hot neurons by the budget alone, and no dense layers.
    report = solve(model.path, SolveOptions(device="cpu", vram=4 * MIB))
    assert (report.device, report.n_gpu_layers) == (cpu.name, 0)
    assert 0 < sum(report.n_hot) < model.n_layer * model.n_ff
    assert solve(model.path, SolveOptions(device="cpu")).n_hot == (model.n_ff,) * model.n_layer
    with pytest.raises(PinferError, match="--device names CPU twice"):
        solve(model.path, SolveOptions(device="CPU,cpu"))
    with pytest.raises(PinferError, match="does not describe device CUDA1"):
        solve(model.path, SolveOptions(device="CUDA1", machine=machine_file))
    with pytest.raises(PinferError, match=r"asks for 25.0 GiB, CUDA0 has 24.0 GiB"):
        solve(model.path, SolveOptions(vram=25 << 30, machine=machine_file))
    assert solve(model.path, SolveOptions(machine=machine_file)).vram < 23 << 30


def _pretended(chosen: Sequence[devices.Device]) -> Machine:
    found = tuple(HotDevice(d.name, "", d.kind, 8 << 30, 8 << 30, 1e10, 1e-5) for d in chosen)
    return Machine("here", 2, 1e10, 0.5, found)


def test_the_probe_measures_plausible_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    from pinfer.placement import machine

    monkeypatch.setattr(machine, "_CPU_BYTES", 16 << 20)
    found = probe(machine.choose_devices(["cpu"]), 256, 1024)
    assert 1e7 < found.cpu_bandwidth < 1e13
    assert 0.05 <= found.scattered <= 1
    (device,) = found.devices
    assert (device.kind, device.name, device.overhead) == ("cpu", "CPU", 0)
    assert 1e-7 < device.sync_seconds < 10
    assert device.memory_total >= device.memory_free > 0


def test_a_driver_is_asked_what_it_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that reports less free memory after a product than before, when all buffers have been given back."""
    cpu = next(d for d in devices.list_devices() if d.kind == "cpu")
    free = iter([1000 * MIB, 970 * MIB, 500 * MIB, 600 * MIB])
    monkeypatch.setattr(devices, "_free_memory", lambda _: next(free))
    assert devices.measure_overhead(cpu, 1, 64) == 0
    monkeypatch.setattr(devices, "_OWN_DRIVERS", ("CPU",))
    assert devices.measure_overhead(cpu, 1, 64) == 30 * MIB + 10 * MIB
    assert devices.measure_overhead(cpu, 1, 64) == 10 * MIB


@pytest.mark.parametrize(
    ("files", "cores", "memory"),
    [
        ({}, 2, None),
        ({"/proc/self/cgroup": "0::/a/b\n", "/sys/fs/cgroup/a/b/cpu.max": "max 100000\n"}, 2, None),
        (
            {
                "/proc/self/cgroup": "0::/a/b\n",
                "/sys/fs/cgroup/a/cpu.max": "150000 100000\n",
                "/sys/fs/cgroup/a/b/memory.max": "1048576\n",
            },
            1,
            MIB,
        ),
        (
            {
                "/proc/self/cgroup": "9:name=systemd:/x\n2:cpu,cpuacct:/x\n1:memory:/x\n",
                "/sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "50000\n",
                "/sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
                "/sys/fs/cgroup/cpu,cpuacct/x/cpu.cfs_quota_us": "-1\n",
                "/sys/fs/cgroup/cpu,cpuacct/x/cpu.cfs_period_us": "100000\n",
                "/sys/fs/cgroup/memory/x/memory.limit_in_bytes": "2097152\n",
            },
            1,
            2 * MIB,
        ),
    ],
)
def test_cores_and_memory_respect_the_container(
    monkeypatch: pytest.MonkeyPatch, files: dict[str, str], cores: int, memory: int | None
) -> None:
    topology = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
    files = {**files, topology.format(0): "0,4", topology.format(1): "1", topology.format(4): "0,4"}
    monkeypatch.setattr(psutil.Process, "cpu_affinity", lambda _: [0, 1, 4])
    monkeypatch.setattr(devices, "_text", lambda path: files.get(str(path), ""))
    assert devices.physical_cores() == cores
    free = psutil.virtual_memory().available
    assert devices.free_memory() == memory if memory else devices.free_memory() == pytest.approx(free, rel=0.2)


def test_a_log_that_does_not_tell_the_buffer_is_an_error(tiny_relu2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As when another libllama words it otherwise: 0 bytes would break every budget."""
    monkeypatch.setattr(log, "captured", lambda: "CPU: the buffer takes 3 MiB")
    with pytest.raises(PinferError, match="log does not tell the compute buffer of CPU"):
        count_compute_bytes(open_model(tiny_relu2), "CPU", Layout(0, 64, 32, DEFAULT_CACHE))


def test_a_machine_survives_its_file(tmp_path: Path) -> None:
    device = HotDevice("CUDA0", "d", "gpu", 10, 9, 1e12, 1e-5, 3)
    machine = Machine("m", 4, 5e10, 0.4, (device, replace(device, name="CUDA1")))
    path = tmp_path / "machine.json"
    for content in (machine.to_json(), {"machine": machine.to_json(), "more": 1}):
        path.write_text(json.dumps(content))
        assert read_machine(path) == machine
    bare = {key: value for key, value in MACHINE.items() if key != "devices"}
    for content, names in (({"device": None}, []), ({"device": GPU}, ["CUDA0"]), ({"devices": []}, [])):
        path.write_text(json.dumps({**bare, **content}))
        assert [device.name for device in read_machine(path).devices] == names


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        ("{", "is not JSON"),
        ("[]", "it is not an object"),
        ("{}", "'device' is missing"),
        ('{"device": 3}', "devices is not a list of objects"),
        ('{"devices": [3], "cpu_bandwidth": 1, "scattered": 1}', "devices is not a list of objects"),
        ('{"device": null, "cpu_bandwidth": 0, "scattered": 0.5}', "cpu_bandwidth is 0"),
        ('{"device": null, "cpu_bandwidth": "fast", "scattered": 0.5}', "cpu_bandwidth is not a number between"),
        ('{"device": null, "cpu_bandwidth": 1, "scattered": 2}', "scattered is not a number between 0 and 1"),
        ('{"device": {"kind": "tpu"}, "cpu_bandwidth": 1, "scattered": 1}', "kind is not one of gpu, igpu, cpu"),
        ('{"device": null, "cpu_bandwidth": Infinity, "scattered": 1}', "cpu_bandwidth is not a number"),
        ('{"device": null, "cpu_bandwidth": NaN, "scattered": 1}', "cpu_bandwidth is not a number"),
        ('{"device": null, "cpu_bandwidth": [1], "scattered": 1}', "cpu_bandwidth is not a number"),
        ('{"device": null, "cpu_bandwidth": 1, "scattered": 1, "n_threads": {}}', "n_threads is not a number"),
        ('{"device": null, "cpu_bandwidth": 1' + 400 * "0" + ', "scattered": 1}', "cpu_bandwidth is not a number"),
        (60_000 * "[", "is not JSON"),
        ('{"device": {"kind": "gpu", "memory_total": 1, "name": "a,b"}}', "the name of a device is not a word"),
        ('{"device": {"kind": "gpu"}, "cpu_bandwidth": 1, "scattered": 1}', "'memory_total' is missing"),
    ],
)
def test_a_machine_file_that_makes_no_sense_is_one_line(tmp_path: Path, content: str, cause: str) -> None:
    path = tmp_path / "machine.json"
    path.write_text(content)
    with pytest.raises(PinferError, match=cause) as error:
        read_machine(path)
    assert "\n" not in str(error.value)
    with pytest.raises(PinferError, match="cannot be read"):
        read_machine(tmp_path / "missing.json")


def test_what_does_not_exist_is_refused(model: Model) -> None:
    with pytest.raises(PinferError, match="there is no cache type 'q3_9'; use one of: f32, f16"):
        solve(model.path, SolveOptions(vram=0, cache_type_k="q3_9"))


def test_the_report_is_json_and_lies_in_the_placement(model: Model, machine_file: Path) -> None:
    report = solve(model.path, SolveOptions(vram=20 * MIB, n_ubatch=64, machine=machine_file))
    told = json.loads(json.dumps(report.to_json()))
    placement = PlacementFile.read(report.placement, model)
    assert placement.report == told
    assert told["machine"]["devices"][0]["name"] == told["devices"][0]["name"] == placement.device == "CUDA0"
    assert told["n_bytes"]["hot_neurons"] > 0
    again = solve(model.path, SolveOptions(vram=20 * MIB, n_ubatch=64, machine=machine_file))
    assert PlacementFile.read(again.placement, model).id != placement.id
    assert again.n_hot == report.n_hot


_BUFFERS = """
import sys
from llama_cpp import llama_cpp as llama
said = []
log = llama.llama_log_callback(lambda level, text, data: said.append(text.decode()))
llama.llama_log_set(log, None)
llama.llama_backend_init()
model = llama.llama_model_load_from_file(sys.argv[1].encode(), llama.llama_model_default_params())
for n_ctx, n_batch in ((256, 64), (2048, 512), (8192, 512)):
    params = llama.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch, params.n_threads = n_ctx, n_batch, n_batch, 1
    params.flash_attn_type = params.n_outputs_max = 1
    said.clear()
    context = llama.llama_init_from_model(model, params)
    lines = [line.split("=") for line in said if "buffer size" in line]
    sizes = {name.split()[-3]: size.split()[0] for name, size in lines}
    print(n_ctx, n_batch, sizes["KV"], sizes["compute"])
    llama.llama_free(context)
"""


def test_cache_and_buffers_are_what_libllama_takes(tiny_relu2: Path) -> None:
    model = open_model(tiny_relu2)
    command = [sys.executable, "-c", _BUFFERS, str(tiny_relu2)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    lines = [line.split() for line in done.stdout.splitlines()]
    assert len(lines) == 3
    for n_ctx, n_batch, cache, compute in lines:
        counted = sum(kv_bytes(model, layer, int(n_ctx), DEFAULT_CACHE) for layer in range(model.n_layer))
        assert counted == pytest.approx(float(cache) * MIB, rel=0.01)
        # What libllama counts without giving a model memory is what it takes when it does.
        layout = Layout(0, int(n_ctx), int(n_batch), DEFAULT_CACHE)
        assert count_compute_bytes(model, "CPU", layout) == pytest.approx(float(compute) * MIB, rel=0.15)


def test_a_run_takes_the_cache_types_that_were_solved_for(model: Model, machine_file: Path) -> None:
    options = SolveOptions(vram=20 * MIB, n_ubatch=64, machine=machine_file, cache_type_k="q8_0", cache_type_v="f32")
    solve(model.path, options)
    assert decide(model, ExecutionOptions()).cache_types == ("q8_0", "f32")
    assert decide(model, ExecutionOptions(cache_type_v="bf16")).cache_types == ("q8_0", "bf16")
    assert decide(model, ExecutionOptions(no_artefacts=True)).cache_types == DEFAULT_CACHE
    with pytest.raises(PinferError, match="no cache type"):
        decide(model, ExecutionOptions(cache_type_k="q3_9"))
