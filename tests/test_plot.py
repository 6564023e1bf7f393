"""`pinfer plot`: what each picture shows, the files and the text it is drawn as, and bad input in one line."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.command_line import ROOT, CommandLine
from support.runs import run_command
from support.shards import write_shards
from support.small_model import Shape, write_profile, write_small_model

from pinfer.artefacts import paths
from pinfer.artefacts.placement import PlacementFile
from pinfer.artefacts.predictor import LayerPredictor, PredictorWriter
from pinfer.artefacts.profile import ProfileFile
from pinfer.artefacts.shards import cold_neuron_bytes, down_types, hot_unit_bytes
from pinfer.benchmark import machine
from pinfer.benchmark.limit import TokenBytes
from pinfer.benchmark.report import DENSE, SPARSE, BenchReport, Case, ModelFacts, Ratio, Result
from pinfer.cli import app
from pinfer.errors import PinferError
from pinfer.model import Model, open_model
from pinfer.placement.model_bytes import layer_bytes
from pinfer.plot import plot_bench, plot_placement, plot_predictor, plot_profile, plot_trace
from pinfer.plotting.draw import draw_file, draw_text, figure_of
from pinfer.plotting.picture import Panel, Picture, Series
from pinfer.solve import SolveOptions, solve

KINDS = ("profile", "placement", "predictor")


@pytest.fixture
def command(tmp_path: Path) -> CommandLine:
    return CommandLine(tmp_path / "work", tmp_path / "home")


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return write_small_model(tmp_path / "small.gguf", Shape(n_layer=3, n_ff=256))


def _folder(model: Model) -> Path:
    return paths.artefact_dir(model.path, model.fingerprint, for_writing=True)


def _write_predictor(model: Model, kinds: tuple[str, ...]) -> None:
    rng = np.random.default_rng(0)
    with PredictorWriter(_folder(model) / paths.PREDICTOR, model, "f16") as out:
        for i, (f, kind) in enumerate(zip(model.ffns, kinds, strict=True)):
            t = np.zeros(f.n_neurons, np.float32)
            if kind == "none":
                out.add(LayerPredictor(0, 1.0, 1.0))
            elif kind == "one_bit":
                levels = np.sign(rng.normal(size=(f.n_neurons, f.n_embd))).astype(np.float32)
                out.add(LayerPredictor(f.n_embd, 0.95, 0.3, None, levels, t, kind))
            else:
                a = rng.normal(size=(32, f.n_embd)).astype(np.float32)
                b = rng.normal(size=(f.n_neurons, 32)).astype(np.float32)
                out.add(LayerPredictor(32, 0.9 + 0.01 * i, 0.2, a, b, t, kind))
        out.finish({})


def _machine(path: Path, *free: int) -> Path:
    """The description of a machine with GPUs of these sizes."""
    names = [f"CUDA{i}" for i in range(len(free))]
    gpu = {"description": "a GPU", "kind": "gpu", "bandwidth": 9e11, "sync_seconds": 1e-6}
    devices = [{**gpu, "name": name, "memory_total": n, "memory_free": n} for name, n in zip(names, free, strict=True)]
    text = {"name": "desktop", "n_threads": 4, "cpu_bandwidth": 1e9, "scattered": 0.5, "devices": devices}
    path.write_text(json.dumps(text))
    return path


def _all(model_path: Path, tmp_path: Path) -> Model:
    """Writes every artefact that is drawn."""
    model = open_model(model_path)
    write_profile(_folder(model) / paths.PROFILE, model)
    _write_predictor(model, ("low_rank", "one_bit", "none"))
    mib = 1 << 20
    gpus = _machine(tmp_path / "m.json", 64 * mib, 64 * mib)
    solve(model_path, SolveOptions(vram=(3 * mib // 2 - 300_000, 3 * mib // 2), n_ctx=128, n_ubatch=64, machine=gpus))
    return model


def panel(picture: Picture, title: str) -> Panel:
    return next(p for p in picture.panels if p.title.startswith(title))


def series(of: Panel, name: str) -> Series:
    return next(s for s in of.series if s.name == name)


# --- profile ----------------------------------------------------------------------------------------------------------


def test_cumulative_activations(small: Path) -> None:
    model = open_model(small)
    skewed = np.zeros(256, np.int64)
    skewed[[200, 7, 90, 3]] = (80, 40, 20, 20)
    counts = (skewed, np.full(256, 10, np.int64), np.zeros(256, np.int64))
    file = ProfileFile(100, "a text", "0" * 64, counts, tuple(c.astype(float) for c in counts), (None,) * 3)
    file.write(_folder(model) / paths.PROFILE, model, {})
    picture = plot_profile(small)
    assert picture.title == "small.gguf: profile"
    assert picture.subtitle == f"100 tokens of a text; drawn on {machine.cpu_name()}"
    curves = panel(picture, "Share of activations")
    assert [s.name for s in curves.series] == ["layer 0", "layer 1", "layer 2", "whole model"]
    assert [s.emphasis for s in curves.series] == [False, False, False, True]
    first = series(curves, "layer 0")
    reached = dict(zip(first.x, first.y, strict=True))
    # the first steps of a hundredth are 3, 5, 8 of 256 neurons
    assert [reached[100 * n / 256] for n in (0, 3, 5)] == [0, 87.5, 100]
    even = series(curves, "layer 1")
    assert even.y == pytest.approx(even.x)
    assert set(series(curves, "layer 2").y) == {0}
    whole = series(curves, "whole model")
    assert (whole.x[0], whole.y[0], whole.x[-1], whole.y[-1]) == (0, 0, 100, 100)
    # 8 of 768 neurons: the four skewed ones and four of the others
    assert dict(zip(whole.x, whole.y, strict=True))[100 * 8 / 768] == pytest.approx(100 * 200 / 2720)
    (activity,) = panel(picture, "Activity").series
    assert list(activity.x) == [0, 1, 2]
    assert activity.y == pytest.approx((100 * 160 / 25600, 10, 0))
    assert len(picture.panels) == 2, "only mixtures are routed"


def test_the_routing_of_a_mixture(tiny_moe: Path) -> None:
    model = open_model(tiny_moe)
    rng = np.random.default_rng(0)
    routed = tuple(np.arange(f.n_experts)[::-1].copy() if f.is_stack else None for f in model.ffns)
    count = tuple(
        rng.integers(0, 20, f.n_neurons) if r is None else rng.integers(0, np.repeat(r, f.n_ff) + 1)
        for f, r in zip(model.ffns, routed, strict=True)
    )
    file = ProfileFile(64, "a text", "0" * 64, count, tuple(c.astype(float) for c in count), routed)
    file.write(_folder(model) / paths.PROFILE, model, {})
    picture = plot_profile(tiny_moe)
    routing = panel(picture, "Routing")
    stacks = [f for f in model.ffns if f.is_stack]
    assert [s.name for s in routing.series] == [*(f"layer {f.layer} experts" for f in stacks), "even routing"]
    n = stacks[0].n_experts
    shares = 100 * np.cumsum(np.arange(n)[::-1]) / np.arange(n).sum()
    assert routing.series[0].x == pytest.approx(100 * np.arange(n + 1) / n)
    assert routing.series[0].y == pytest.approx([0, *shares])
    activity = panel(picture, "Activity")
    assert {s.name for s in activity.series} == {"shared expert", "routed experts"}
    for i, f in enumerate(model.ffns):
        of_kind = series(activity, "routed experts" if f.is_stack else "shared expert")
        assert of_kind.y[of_kind.x.index(f.layer)] == pytest.approx(100 * file.active(i))


# --- placement --------------------------------------------------------------------------------------------------------


def test_what_lies_where(small: Path, tmp_path: Path) -> None:
    model = _all(small, tmp_path)
    file = PlacementFile.read(_folder(model) / paths.PLACEMENT, model)
    assert 1 < file.n_gpu_layers <= model.n_layer, "some layers are on the device"
    # As solved the dense layers fill the first device.
    file = replace(file, n_hot=(64, 128, 0, 64, 0, 128))
    file.write(_folder(model) / paths.PLACEMENT, model, {})
    picture = plot_placement(small)
    assert picture.title == "small.gguf: placement"
    assert picture.subtitle == "devices: CUDA0, CUDA1; context 128; solved for desktop"
    units, weights, budget = picture.panels
    assert [s.name for s in units.series] == ["cold, on the CPU", "hot, on CUDA0", "hot, on CUDA1"]
    for i, f in enumerate(model.ffns):
        hot = [len(file.hot(device)[i]) for device in (0, 1)]
        cold = f.n_units - sum(hot)
        assert [s.y[i] for s in units.series] == pytest.approx([100 * n / f.n_units for n in (cold, *hot)])
        types = down_types(f, None)
        dense = layer_bytes(model, f.layer)
        there = f.layer >= model.n_layer + 1 - file.n_gpu_layers
        wanted = {
            "CPU: cold neurons": cold * cold_neuron_bytes(f, types),
            "CUDA0: hot neurons": hot[0] * hot_unit_bytes(f, types),
            "CUDA1: hot neurons": hot[1] * hot_unit_bytes(f, types),
            "CPU: attention, norms, other": 0 if there else dense,
            "CUDA0: attention, norms, other": dense if there else 0,
        }
        unit = {"KiB": 1 << 10, "MiB": 1 << 20}[weights.y_label]
        drawn = {s.name: s.y[f.layer] * unit for s in weights.series}
        assert drawn == pytest.approx({name: n for name, n in wanted.items() if name in drawn})
        assert not any(n for name, n in wanted.items() if name not in drawn)
    assert budget.categories == ("CUDA0", "CUDA1")
    assert budget.x_label == "MiB"
    assert [sum(s.x[i] for s in budget.series) * (1 << 20) for i in (0, 1)] == pytest.approx(file.vram_device)
    used = [sum(s.x[i] for s in budget.series if s.name != "free") * (1 << 20) for i in (0, 1)]
    assert used == pytest.approx(file.vram_needed)
    assert {"hot neurons", "kv cache", "free"} <= {s.name for s in budget.series}


def test_placements_without_a_device_or_a_report(small: Path) -> None:
    model = open_model(small)
    solve(small, SolveOptions(vram=0))
    picture = plot_placement(small)
    assert "devices: none" in picture.subtitle
    assert [s.name for s in picture.panels[0].series] == ["cold, on the CPU"]
    assert set(picture.panels[0].series[0].y) == {100}
    assert len(picture.panels) == 2
    write_shards(small, 0.5, n_devices=2)
    picture = plot_placement(small)
    assert picture.subtitle.endswith(f"; drawn on {machine.cpu_name()}")
    assert [s.name for s in picture.panels[0].series][1:] == ["hot, on CPU (0)", "hot, on CPU (1)"]
    assert len(picture.panels) == 2, "there is no report to take the budget from"
    file = _folder(model) / paths.PLACEMENT
    damaged = replace(PlacementFile.read(file, model), report={"devices": [{}, {}]})
    damaged.write(file, model, {})
    with pytest.raises(PinferError, match=r"its report cannot be read; make it again: pinfer solve"):
        plot_placement(small)


# --- predictor --------------------------------------------------------------------------------------------------------


def test_recall_against_bytes(small: Path) -> None:
    model = open_model(small)
    _write_predictor(model, ("low_rank", "one_bit", "none"))
    picture = plot_predictor(small)
    points, by_layer = picture.panels
    # per neuron a threshold, and half floats of rank 32, or a bit for each input
    low_rank, one_bit = 2 * 32 * (256 + 256) + 4 * 256, 256 * 256 // 8 + 4 * 256
    assert points.x_label == "KiB"
    assert [(s.name, s.labels) for s in points.series] == [
        ("low rank", ("0",)),
        ("one bit", ("1",)),
        ("none: every neuron", ("2",)),
    ]
    assert [s.x[0] * 1024 for s in points.series] == [low_rank, one_bit, 0]
    assert [s.y[0] for s in points.series] == pytest.approx([90, 95, 100])
    assert series(by_layer, "recall: activation kept").y == pytest.approx((90, 95, 100))
    assert series(by_layer, "candidates: neurons named").y == pytest.approx((20, 30, 100))
    share = 100 * (low_rank + one_bit) / sum(f.n_bytes for f in model.ffns)
    assert picture.subtitle.startswith(f"{share:.1f} % of the FFNs' bytes")


# --- bench ------------------------------------------------------------------------------------------------------------

PROMPT, DECODE = Case(512, 0, 1), Case(0, 128, 1)


def _report(commit: str, time: str, speed: float, model: str = "m.gguf") -> BenchReport:
    """A bench in which sparse decoding is ``speed`` times as fast as dense, and half its bytes are read."""
    environment = machine.describe(2, "ggml", "avx2", 0.0, time, "")

    def result(test: Case, side: str, mean: float, n_bytes: float | None) -> Result:
        read = TokenBytes(n_bytes, 0, 0, 0) if n_bytes else None
        return Result(test, side, (0.9 * mean, mean, 1.2 * mean), (0, 1, 2), "0" * 64, None, None, read)

    return BenchReport(
        environment=replace(environment, commit=commit, cpu="a CPU"),
        model=ModelFacts(model, "m", "F16", 1, 1, "relu2"),
        mode="exact",
        tokens_from="built-in text",
        results=(
            result(PROMPT, SPARSE, 100.0, None),
            result(PROMPT, DENSE, 100.0, None),
            result(DECODE, SPARSE, 10.0 * speed, 5e8),
            result(DECODE, DENSE, 10.0, 1e9),
        ),
        ratios=(Ratio(PROMPT, (0.9, 1.0, 1.1)), Ratio(DECODE, (0.8 * speed, speed, 1.5 * speed))),
        peak={SPARSE: 1, DENSE: 1},
        recall=None,
        candidates=None,
        bandwidth=2e10,
        others=None,
        notes=(),
    )


def _write(path: Path, *reports: BenchReport) -> Path:
    lines = [json.dumps(record) for report in reports for record in report.records()]
    path.write_text("\n".join(lines) + "\n\n")
    return path


def test_ratios_with_their_spread_and_the_memory_limit(tmp_path: Path) -> None:
    file = _write(tmp_path / "b.jsonl", _report("abc", "2026-01-01T00:00:00Z", 1.5))
    picture = plot_bench([file])
    assert (picture.title, picture.subtitle) == ("m.gguf: pinfer bench", "a CPU; pinfer abc")
    ratios, limits = picture.panels
    assert ratios.categories == ("pp512", "tg128")
    assert ratios.reference == 1
    measured, by_bytes = ratios.series
    assert list(measured.x) == [1.0, 1.5]
    assert list(measured.y) == [0, 1]
    assert measured.low == pytest.approx((0.9, 1.2))
    assert measured.high == pytest.approx((1.1, 2.25))
    assert (by_bytes.x, by_bytes.y) == ((2.0,), (1,))
    assert limits.categories == ("tg128",)
    # 15 of 40 and 10 of 20 tokens per second
    assert {s.name: (s.low[0], s.x[0], s.high[0]) for s in limits.series} == {
        "pinfer": pytest.approx((0.9 * 37.5, 37.5, 1.2 * 37.5)),
        "stock libllama": pytest.approx((45, 50, 60)),
    }


def test_the_report_as_one_object_gives_the_same_picture(tmp_path: Path) -> None:
    report = _report("abc", "2026-01-01T00:00:00Z", 1.5)
    whole = tmp_path / "b.json"
    whole.write_text(json.dumps(report.to_json(), indent=2))
    assert plot_bench([whole]) == plot_bench([_write(tmp_path / "b.jsonl", report)])


def test_ratios_over_commits(tmp_path: Path) -> None:
    """Files in any order; runs of one commit count together; a commit may lack a case."""
    newer = _write(tmp_path / "1.jsonl", _report("new", "2026-02-01T00:00:00Z", 3.0))
    older = _write(
        tmp_path / "2.jsonl",
        _report("old", "2026-01-01T00:00:00Z", 1.0),
        _report("old", "2026-01-02T00:00:00Z", 2.0),
        _report("old", "2026-01-02T00:00:00Z", 5.0, model="other.gguf"),
    )
    picture = plot_bench([newer, older])
    assert picture.title == "m.gguf, other.gguf: pinfer bench"
    latest = series(picture.panels[0], "measured: median, lowest and highest")
    drawn = dict(zip(picture.panels[0].categories, latest.x, strict=True))
    assert drawn["tg128, m.gguf"] == 3.0, "the last commit is compared"
    assert drawn["tg128, other.gguf"] == 5.0
    commits = panel(picture, "Over commits")
    assert commits.categories == ("old", "new")
    of_m = series(commits, "tg128, m.gguf")
    assert (of_m.x, of_m.y) == ((0, 1), (1.5, 3.0))
    assert of_m.low == pytest.approx((0.8, 2.4))
    assert of_m.high == pytest.approx((3.0, 4.5))
    assert series(commits, "tg128, other.gguf").x == (0,)


@pytest.mark.parametrize("text", ["", "{}\n", "not JSON\n", "[1]\n", '{"results": [{}]}', '{"results": 3}', "\x00"])
def test_files_that_hold_no_records(tmp_path: Path, text: str) -> None:
    file = tmp_path / "b.jsonl"
    file.write_text(text)
    with pytest.raises(PinferError, match=r"pinfer bench MODEL -o jsonl >> FILE"):
        plot_bench([file])


def test_a_broken_record_is_named_by_its_line(tmp_path: Path) -> None:
    file = _write(tmp_path / "b.jsonl", _report("abc", "2026-01-01T00:00:00Z", 1.5))
    lines = file.read_text().splitlines()
    lines[2] = lines[2].replace('"ratio": 1.5', '"ratio": NaN')
    file.write_text("\n".join(lines))
    with pytest.raises(PinferError, match=r"b\.jsonl:3 is not a record of pinfer bench"):
        plot_bench([file])


def test_records_of_one_side_have_no_ratio(tmp_path: Path) -> None:
    report = _report("abc", "2026-01-01T00:00:00Z", 1.5)
    alone = replace(report, results=tuple(r for r in report.results if r.side == SPARSE), ratios=())
    with pytest.raises(PinferError, match=r"compares pinfer with stock libllama; measure both sides"):
        plot_bench([_write(tmp_path / "b.jsonl", alone)])


# --- trace ------------------------------------------------------------------------------------------------------------


def _trace(path: Path, *passes: tuple[int, float], layers: int = 2) -> Path:
    """A trace of passes, given by their tokens and the milliseconds of cold. Hot takes half as long."""
    names = [("CPU", 0), ("CUDA0", 1)]
    events: list[dict[str, Any]] = [{"ph": "M", "name": "process_name", "pid": 1, "tid": 0, "args": {"name": "pinfer"}}]
    events += [{"ph": "M", "name": "thread_name", "pid": 1, "tid": i, "args": {"name": n}} for n, i in names]
    now = 1e9
    for tokens, cold in passes:
        for layer in range(layers):
            parts = (("copy", 0, 0, 100), ("hot", 1, 100, 500 * cold), ("cold", 0, 100, 1000 * cold))
            for name, row, begin, duration in (*parts, ("wait", 0, 100 + 1000 * cold, 50)):
                # the last layer of a prompt computes only the token whose logits are wanted
                args = {"layer": layer, "tokens": tokens if layer + 1 < layers or layers == 1 else 1}
                bar = {"ph": "X", "name": name, "pid": 1, "tid": row, "ts": now + begin, "dur": duration, "args": args}
                events.append(bar)
            now += 1000 * cold + 1000
    path.write_text(json.dumps(events))
    return path


@pytest.mark.parametrize("layers", [1, 2])
def test_the_time_of_a_token(tmp_path: Path, layers: int) -> None:
    file = _trace(tmp_path / "t.json", (7, 90.0), (1, 8.0), (1, 2.0), (1, 4.0), layers=layers)
    picture = plot_trace(file)
    assert picture.title == "t.json: where the time of a token goes"
    assert picture.subtitle.startswith("CPU, device 0: CUDA0; drawn on ")
    spans, by_layer = picture.panels
    assert spans.categories == ("CPU", "device 0: CUDA0")
    assert spans.x_label == "ms"
    whole = layers * 4 + (layers - 1) * 1 + 0.15
    assert spans.title == f"The median of 3: one token, {whole:.3g} ms"
    cold, hot, copy, wait = spans.series
    assert [s.name.partition(",")[0] for s in spans.series] == ["cold", "hot", "copy", "wait"]
    assert cold.name == f"cold, {4 * layers} ms"
    assert cold.x == pytest.approx([0.1 + 5 * i for i in range(layers)])
    assert cold.high == pytest.approx([4.1 + 5 * i for i in range(layers)])
    assert set(cold.y) == set(copy.y) == set(wait.y) == {0}
    assert hot.high[0] == pytest.approx(2.1)
    assert set(hot.y) == {1}
    assert wait.high[0] - wait.x[0] == pytest.approx(0.05)
    assert series(by_layer, "cold").x == tuple(range(layers))
    assert series(by_layer, "cold").y == pytest.approx([4] * layers)
    assert series(by_layer, "hot").y == pytest.approx([2] * layers)


def test_a_trace_of_a_prompt_alone(tmp_path: Path) -> None:
    picture = plot_trace(_trace(tmp_path / "t.json", (7, 0.1), layers=1))
    assert picture.title == "t.json: where the time of a batch of 7 tokens goes"
    assert picture.panels[0].x_label == "µs"
    assert series(picture.panels[1], "cold").y == pytest.approx([100])


def test_the_trace_of_a_run(tiny_relu2: Path, tmp_path: Path) -> None:
    write_shards(tiny_relu2, 0.5)
    file = tmp_path / "trace.json"
    run = subprocess.run(
        run_command(tiny_relu2, "-p", "Once upon a time", "-n", 5, "--ignore-eos", "--temp", 0, "-t", 1),
        env={**os.environ, "PINFER_TRACE": str(file)},
        capture_output=True,
        check=True,
        timeout=120,
    )
    assert run.returncode == 0
    spans, by_layer = plot_trace(file).panels
    n_layer = open_model(tiny_relu2).n_layer
    assert spans.title.startswith("The median of 4: one token, "), (
        "the prompt is left out, and one token is sampled last"
    )
    assert [len(s.x) for s in spans.series] == [n_layer] * 4
    assert [len(s.x) for s in by_layer.series] == [n_layer] * 4


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "[1]",
        '[{"name": "thread_name"}]',
        '[{"ph": "X", "name": "cold", "tid": 0, "ts": 0, "dur": 1, "args": {"layer": 0, "tokens": 1}}]',
    ],
)
def test_files_that_are_no_traces(tmp_path: Path, text: str) -> None:
    file = tmp_path / "t.json"
    file.write_text(text)
    with pytest.raises(PinferError, match=r"write one: PINFER_TRACE=FILE pinfer run MODEL"):
        plot_trace(file)


# --- drawing ----------------------------------------------------------------------------------------------------------


def _pictures(small: Path, tmp_path: Path) -> dict[str, Picture]:
    _all(small, tmp_path)
    reports = [_report(c, f"2026-0{i}-01T00:00:00Z", 1.5) for i, c in enumerate(("abc", "def"), 1)]
    return {
        "profile": plot_profile(small),
        "placement": plot_placement(small),
        "predictor": plot_predictor(small),
        "bench": plot_bench([_write(tmp_path / "b.jsonl", *reports)]),
        "trace": plot_trace(_trace(tmp_path / "t.json", (1, 4.0), (1, 2.0))),
    }


def test_figures_show_the_data(small: Path, tmp_path: Path) -> None:
    pictures = _pictures(small, tmp_path)
    for picture in pictures.values():
        figure = figure_of(picture)
        assert picture.title in figure.get_suptitle()
        for axes, drawn in zip(figure.axes, picture.panels, strict=True):
            assert axes.get_title("left") == drawn.title
            if drawn.kind == "curves":
                lines = {tuple(map(float, line.get_ydata())) for line in axes.get_lines()}  # type: ignore[arg-type]
                assert {s.y for s in drawn.series} <= lines
            elif drawn.kind in ("columns", "bars", "spans"):
                patches = list(axes.patches)
                lengths = [p.get_height() if drawn.kind == "columns" else p.get_width() for p in patches]  # type: ignore[attr-defined]
                wanted: list[float] = []
                for s in drawn.series:
                    ends = [b - a for a, b in zip(s.x, s.high, strict=False)]
                    wanted += {"columns": list(s.y), "bars": list(s.x), "spans": ends}[drawn.kind]
                assert lengths == pytest.approx(wanted)
            elif drawn.kind == "points":
                offsets = [np.asarray(c.get_offsets()) for c in axes.collections]
                assert [o.tolist() for o in offsets] == [[[s.x[0], s.y[0]]] for s in drawn.series]
            legend = axes.get_legend()
            assert (legend is not None) == (len(drawn.series) > 1 or drawn.kind in ("ranges", "points"))


def test_files_are_written_and_repeatable(small: Path, tmp_path: Path) -> None:
    for name, picture in _pictures(small, tmp_path).items():
        for suffix, magic in (("png", b"\x89PNG\r\n"), ("svg", b"<?xml")):
            file = tmp_path / f"{name}.{suffix}"
            draw_file(picture, file)
            first = file.read_bytes()
            assert first.startswith(magic)
            draw_file(picture, file)
            assert file.read_bytes() == first


def test_text_shows_the_data(small: Path, tmp_path: Path) -> None:
    pictures = _pictures(small, tmp_path)
    for picture in pictures.values():
        text = draw_text(picture)
        assert text.startswith(f"{picture.title}\n{picture.subtitle}\n")
        assert "\x1b" not in text, "NO_COLOR is set and stdout is not a terminal"
        assert all(p.title in text for p in picture.panels)
        assert max(map(len, text.splitlines())) <= 120
        for drawn in picture.panels:
            if not drawn.ordered:
                assert all(s.name in text for s in drawn.series)
    # 4 of 9.15 ms: cold, the pause between the layers, and cold
    trace = draw_text(pictures["trace"]).splitlines()
    (cpu,) = (line for line in trace if line.lstrip().startswith("CPU │"))
    assert abs(cpu.count("█") / len(cpu.partition("│")[2]) - 2 * 2 / 5.15) < 0.05
    (budget,) = (line for line in draw_text(pictures["placement"]).splitlines() if line.startswith("CUDA1 │"))
    assert budget.count("·") > 0, "what is free"
    assert len(budget.partition("│")[2]) == 120 - 5 - 12, "the largest budget is as wide as the page"


def test_a_single_value_of_zero_is_drawn(tmp_path: Path) -> None:
    """Nothing may divide by the largest value."""
    zero = Series("nothing", (0.0,), (0.0,), (0.0,), (0.0,), ("a",))
    for kind in ("columns", "bars", "ranges", "spans", "points", "curves"):
        picture = Picture("t", "s", (Panel(kind, "p", "x", "y", (zero,), ("a",)),))
        draw_file(picture, tmp_path / "p.png")
        assert "nothing" in draw_text(picture) or kind in ("points", "curves")


# --- the command ------------------------------------------------------------------------------------------------------


def test_the_commands(small: Path, tmp_path: Path, command: CommandLine) -> None:
    _all(small, tmp_path)
    for name in KINDS:
        drawn = command("plot", name, small)
        assert drawn.code == 0, drawn.err
        assert drawn.out.startswith(f"small.gguf: {name}\n")
    written = command("plot", "profile", small, "-o", "p.PNG", "--json")
    assert written.code == 0, written.err
    assert (tmp_path / "work" / "p.PNG").read_bytes().startswith(b"\x89PNG")
    assert "wrote p.PNG" in written.err
    assert json.loads(written.out) == json.loads(json.dumps(plot_profile(small).to_json()))
    bench = _write(tmp_path / "b.jsonl", _report("abc", "2026-01-01T00:00:00Z", 1.5))
    assert "pp512" in command("plot", "bench", bench).out
    assert "device 0: CUDA0" in command("plot", "trace", _trace(tmp_path / "t.json", (1, 4.0))).out


def test_bad_input_is_one_line(small: Path, tmp_path: Path, command: CommandLine) -> None:
    missing = tmp_path / "missing"
    wrong = [
        (1, ("profile", small), "has no profile yet"),
        (1, ("placement", small), "run: pinfer solve"),
        (1, ("predictor", small), "run: pinfer train"),
        (1, ("bench", missing), "cannot be read: No such file or directory"),
        (1, ("trace", tmp_path), "cannot be read: Is a directory"),
        (1, ("trace", small), "is not a text file"),
        (2, ("trace", missing, "-o", "picture.gif"), "'picture.gif' is not a valid picture"),
        (2, ("bench",), "Missing argument"),
    ]
    for code, words, said in wrong:
        outcome = command("plot", *words)
        assert outcome.code == code, outcome.err
        assert len(outcome.err_lines) == 1
        assert said in outcome.err
        assert outcome.out == ""
    write_profile(_folder(open_model(small)) / paths.PROFILE, open_model(small))
    nowhere = command("plot", "profile", small, "-o", missing / "p.svg")
    assert (nowhere.code, len(nowhere.err_lines)) == (1, 1)
    assert "No such file or directory" in nowhere.err


@pytest.mark.parametrize(
    ("module", "words", "said"),
    [
        ("matplotlib", ("-o", "p.png"), "-o needs matplotlib, which is not installed; run: pip install 'matplotlib"),
        ("plotext", (), "drawing in the terminal needs plotext, which is not installed; run: pip install 'plotext"),
    ],
)
def test_missing_packages(
    module: str,
    words: tuple[str, ...],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    trace = _trace(tmp_path / "t.json", (1, 4.0))
    assert app.run_cli(["plot", "trace", str(trace), *words]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert said in err


def test_nothing_heavy_is_imported_before_drawing() -> None:
    code = (
        "import sys\nfrom pinfer.cli.app import run_cli\nrun_cli(['plot', 'profile', '--help'])\n"
        "heavy = [n for n in ('numpy', 'matplotlib', 'plotext') if n in sys.modules]\n"
        "import pinfer.plot, pinfer.plotting.draw\n"
        "sys.exit(str(heavy + [n for n in ('matplotlib', 'plotext') if n in sys.modules]).strip('[]') or None)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
