"""Bench: both sides do the same work alternately, ratios match the records, and every error is one line."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

import gguf
import numpy as np
import pytest
from support.command_line import CommandLine

from models.synth import SynthOptions, write_model
from pinfer import bench as stage
from pinfer.artefacts import paths
from pinfer.bench import BenchOptions, bench
from pinfer.benchmark import limit as bench_limit
from pinfer.benchmark import machine
from pinfer.benchmark.process import WorkerProcess, worker_environment
from pinfer.benchmark.report import DENSE, SPARSE, BenchReport, Case
from pinfer.cli import app
from pinfer.cli.bench import print_bench
from pinfer.errors import PinferError
from pinfer.llama.engine import Engine
from pinfer.llama.plugin import Stats
from pinfer.model import open_model
from pinfer.profile import ProfileOptions, profile
from pinfer.solve import SolveOptions, solve
from pinfer.split import SplitOptions, split
from pinfer.train import TrainOptions, train

TEXT = Path(__file__).resolve().parent / "data" / "profile.txt"
QUICK = BenchOptions(
    n_prompt=(96,), n_gen=(8,), n_seq=(1, 3), repetitions=2, n_threads=2, n_stream_bytes=16 << 20, text=TEXT
)


@pytest.fixture(scope="module")
def learnt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tiny-relu2 with all its artefacts, every neuron cold."""
    path = tmp_path_factory.mktemp("learnt") / "tiny-relu2.gguf"
    path.write_bytes((Path(__file__).resolve().parent.parent / "models" / path.name).read_bytes())
    profile(path, ProfileOptions(str(TEXT), 2048, n_threads=1))
    train(path, TrainOptions())
    solve(path, SolveOptions(vram=0))
    split(path, SplitOptions())
    return path


@pytest.fixture(scope="module")
def report(learnt: Path) -> BenchReport:
    return bench(learnt, QUICK)


def test_both_sides_run_in_turn_on_the_same_tokens(report: BenchReport) -> None:
    assert report.mode == "predicted"
    assert report.tokens_from == "profile.txt"
    assert [(r.test.name, r.side) for r in report.results] == [
        (name, side) for name in ("pp96", "tg8", "tg8 ×3") for side in (SPARSE, DENSE)
    ]
    for n, sparse, dense in zip(range(3), report.results[::2], report.results[1::2], strict=True):
        assert sparse.order == (4 * n, 4 * n + 2)
        assert dense.order == (4 * n + 1, 4 * n + 3)
        assert sparse.tokens_sha256 == dense.tokens_sha256
    assert len({r.tokens_sha256 for r in report.results}) == 3


def test_ratios_match_the_records(report: BenchReport) -> None:
    for test in (r.test for r in report.results[::2]):
        sparse, dense = (r for r in report.results if r.test == test)
        ratio = report.ratio(test)
        assert ratio is not None
        pairs = [a / b for a, b in zip(sparse.tokens_per_s, dense.tokens_per_s, strict=True)]
        assert list(ratio.pairs) == pytest.approx(pairs)
        record = next(r for r in report.records() if r["test"] == test.name and r["side"] == SPARSE)
        assert record["ratio"] == pytest.approx(median(pairs))
        assert record["avg_ts"] == pytest.approx(fmean(sparse.tokens_per_s))
        assert record["stddev_ts"] == pytest.approx(stdev(sparse.tokens_per_s))
    assert report.memory_ratio == pytest.approx(report.peak[SPARSE] / report.peak[DENSE])
    assert min(report.peak.values()) > 8 << 20  # more than the model's file


def test_the_sparse_side_is_sparse_and_the_dense_side_is_stock(report: BenchReport) -> None:
    for result in report.results:
        decoding_sparsely = result.side == SPARSE and result.test.n_gen > 0
        assert (result.computed is not None) == decoding_sparsely
        if result.computed is not None and result.active is not None:
            assert 0 < result.active <= result.computed < 0.9
    assert report.recall is not None
    assert 0.9 < report.recall <= 1
    assert report.environment.isa in ("avx512", "avx2", "neon", "scalar")
    assert report.environment.ggml
    assert report.model.n_params > 1_000_000


def test_the_limit_is_bandwidth_over_bytes(report: BenchReport) -> None:
    counted = [r for r in report.results if r.token_bytes is not None]
    assert [(r.test.name, r.side) for r in counted] == [("tg8", SPARSE), ("tg8", DENSE)]
    sparse, dense = (r.token_bytes for r in counted)
    assert sparse is not None
    assert dense is not None
    assert sparse.dense_weights == dense.dense_weights
    assert 0 < sparse.ffn < dense.ffn
    assert sparse.predictor > 0 == dense.predictor
    for result in counted:
        assert result.token_bytes is not None
        limit = report.limit(result)
        assert limit is not None
        assert limit == pytest.approx(report.bandwidth / result.token_bytes.total)
        record = next(r for r in report.records() if r["test"] == "tg8" and r["side"] == result.side)
        assert record["limit_share"] == pytest.approx(result.median / limit)


def test_bytes_per_token_match_the_file(learnt: Path) -> None:
    model = open_model(learnt)
    reader = gguf.GGUFReader(learnt)
    dense = bench_limit.dense_bytes(model, 1)
    # Tied: the embedding is the output matrix. F16 cache: 2 bytes for each value of K and V.
    assert dense.dense_weights + dense.ffn == sum(int(t.n_bytes) for t in reader.tensors)
    assert dense.kv_cache == 5 * 2 * 2 * 64 * 2

    folder = paths.artefact_dir(model.path, model.fingerprint, for_writing=False)
    every = Stats(5, 0, 5 * 1024, 5 * 1024, 5 * 1024, 0, 0, 0)
    assert bench_limit.sparse_bytes(model, 1, every, folder / paths.COLD, None).ffn == dense.ffn
    silent = replace(every, n_candidates=0, n_active=0)
    assert bench_limit.sparse_bytes(model, 1, silent, folder / paths.COLD, None).ffn == 0
    # Without shards the down matrix is read whole. Tokens that no counter includes were dense.
    assert bench_limit.sparse_bytes(model, 1, silent, None, None).ffn == dense.ffn / 2
    nothing = Stats(0, 0, 0, 0, 0, 0, 0, 0)
    assert bench_limit.sparse_bytes(model, 1, nothing, None, None).ffn == dense.ffn


@pytest.mark.parametrize("output", ["md", "csv", "json", "jsonl"])
def test_every_format_can_be_read_back(report: BenchReport, output: str, capsys: pytest.CaptureFixture[str]) -> None:
    print_bench(replace(report, notes=("a note",)), output)
    out, err = capsys.readouterr()
    speeds = [r.mean for r in report.results]
    if output == "md":
        rows = [line.strip("|").split("|") for line in out.splitlines() if line.startswith("| ")]
        assert {len(row) for row in rows} == {9}
        assert [float(row[2].split("±")[0]) for row in rows[1:]] == pytest.approx(speeds, abs=0.006)
    elif output == "csv":
        rows_of = list(csv.DictReader(io.StringIO(out)))
        assert [float(row["avg_ts"]) for row in rows_of] == pytest.approx(speeds)
        assert json.loads(rows_of[0]["samples_ts"]) == pytest.approx(report.results[0].tokens_per_s)
    elif output == "json":
        read = json.loads(out)
        assert [row["avg_ts"] for row in read["results"]] == pytest.approx(speeds)
        assert read["notes"] == ["a note"]
    else:
        assert [json.loads(line)["avg_ts"] for line in out.splitlines()] == pytest.approx(speeds)
    assert err == ("" if output == "json" else "note: a note\n")


def test_parallel_decoding_keeps_sequences_apart(tiny_relu2: Path) -> None:
    """Each of the worker's sequences ends with the logits that it has when it is decoded alone."""
    with Engine(tiny_relu2, plugin=None, n_ctx=64, n_threads=1) as engine:
        texts = ["Once upon a time", "The house by the sea"]
        streams = [engine.tokenize(text)[:4] for text in texts]
        alone = []
        for stream in streams:
            engine.clear()
            alone.append(engine.decode(stream)[0])
    from pinfer.benchmark.worker import BenchEngine

    with BenchEngine(tiny_relu2, plugin=None, n_threads=1, n_gpu_layers=0) as bench_engine:
        bench_engine.open_context(8, len(streams), 512, 512)
        assert bench_engine.time_decoding(streams) > 0
        logits = bench_engine._llama.llama_get_logits(bench_engine._context)
        together = np.ctypeslib.as_array(logits, shape=(2, bench_engine.n_vocab))
        for one, other in zip(alone, together, strict=True):
            assert np.abs(one - other).max() < 1e-2 * np.abs(one).max()


def test_a_model_without_artefacts_is_measured_in_exact_mode(tiny_reglu: Path) -> None:
    found = bench(tiny_reglu, replace(QUICK, n_prompt=(), n_seq=(1,), text=None))
    assert found.mode == "exact"
    assert found.tokens_from == "built-in text"
    assert found.recall is None
    assert found.results[0].computed == 1.0
    assert 0 < (found.results[0].active or 0) < 0.5
    assert any("another activation than this model's reglu" in note for note in found.notes)


def test_artefacts_can_be_ignored(learnt: Path) -> None:
    exact = bench(learnt, replace(QUICK, n_prompt=(), n_seq=(1,), repetitions=1, exact=True, compare="none"))
    assert (exact.mode, exact.recall) == ("exact", None)
    assert exact.results[0].computed == 1.0
    assert [r.side for r in exact.results] == [SPARSE]
    assert exact.ratios == ()
    assert exact.memory_ratio is None
    alone = bench(learnt, replace(QUICK, n_prompt=(), n_seq=(1,), repetitions=1, no_artefacts=True, compare="none"))
    # The plugin decides whether to compute an ungated FFN sparsely without shards. Bench reports what it did.
    assert alone.results[0].computed in (None, 1.0)
    assert (alone.results[0].computed is None) == any("nothing was computed sparsely" in note for note in alone.notes)
    assert alone.recall is None
    assert alone.results[0].token_bytes is not None
    assert exact.results[0].token_bytes is not None
    assert alone.results[0].token_bytes.ffn > exact.results[0].token_bytes.ffn  # the down matrix is read whole


def test_steps_add_up_to_the_token(learnt: Path) -> None:
    found = bench(learnt, replace(QUICK, n_prompt=(), n_seq=(1, 3), repetitions=1, steps=True, compare="none"))
    assert [steps.test.name for steps in found.steps] == ["tg8", "tg8 ×3"]
    for steps in found.steps:
        names = {"input quantised", "predictor", "first products", "down rows", "sums of threads", "other"}
        assert {f"FFN: {name}" for name in names} <= set(steps.ffn)
        assert "FFN: second products" not in steps.ffn  # ungated
        assert 0 < sum(steps.ffn.values()) < steps.token
        assert set(steps.by_node) == {"ggml: products", "ggml: attention", "ggml: small nodes"}
        assert steps.rest > 0


def test_without_being_asked_nothing_is_attributed(report: BenchReport) -> None:
    assert report.steps == ()


@pytest.mark.parametrize("plain", [True, False])
def test_a_dense_model_and_the_dense_flag_run_stock_libllama(plain: bool, tiny_relu2: Path, tmp_path: Path) -> None:
    path = tiny_relu2
    if plain:
        path = _without_activation(tmp_path)
    found = bench(path, replace(QUICK, dense=not plain))
    assert found.mode == DENSE
    assert {r.side for r in found.results} == {DENSE}
    assert found.environment.isa == ""
    assert any("running dense" in note for note in found.notes) == plain
    assert found.ratios == ()


def _without_activation(folder: Path) -> Path:
    """A small SiLU llama: a reglu one whose activation key is renamed."""
    path = folder / "silu.gguf"
    write_model(path, SynthOptions(n_vocab=512))
    path.write_bytes(path.read_bytes().replace(b"pinfer.ffn.activation", b"pinfer.was.activation"))
    return path


def test_hot_neurons_run_on_the_device_they_were_placed_for(tiny_relu2: Path) -> None:
    profile(tiny_relu2, ProfileOptions(str(TEXT), 1024, n_threads=1))
    solve(tiny_relu2, SolveOptions(vram=4 << 20, device="CPU"))
    split(tiny_relu2, SplitOptions())
    found = bench(tiny_relu2, replace(QUICK, n_prompt=(), n_seq=(1,), repetitions=1, compare="none"))
    (result,) = found.results
    assert result.computed == 1.0  # of the cold ones
    assert result.token_bytes is None  # the limit is unknown for two memories


def test_a_short_text_repeats() -> None:
    source = stage._TokenSource("three", (5, 6, 7), bos=1)
    assert source.streams(Case(8, 0, 1), 0) == [[1, 5, 6, 7, 5, 6, 7, 5]]
    assert source.streams(Case(0, 2, 3), 0) == [[1, 5], [1, 7], [1, 6]]


def test_every_run_has_its_own_text() -> None:
    """What warms the caches, and what a sequence holds before the test, is not what is timed."""
    case = Case(0, 4, 2, n_depth=6)
    source = stage._TokenSource("counted", tuple(range(100, 100 + stage._n_text(case, 3))), bos=1)
    texts = source.texts(case)
    assert [len(text) for text in texts] == [6, 6]
    assert {text[0] for text in texts} == {1}
    streams = [stream for run in range(3) for stream in source.streams(case, run)]
    assert [len(stream) for stream in streams] == [4] * 6
    used = [t for piece in (*texts, *streams) for t in piece if t != 1]
    assert len(set(used)) == len(used)


def test_depth_is_in_the_cache_and_in_the_report(tiny_relu2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    ask = WorkerProcess.ask

    def recorded(worker: WorkerProcess, do: str, **arguments: Any) -> Any:
        if do == "time":
            asked.append(arguments)
        return ask(worker, do, **arguments)

    monkeypatch.setattr(WorkerProcess, "ask", recorded)
    found = bench(tiny_relu2, replace(QUICK, n_prompt=(16,), n_seq=(1, 2), n_depth=(0, 48), dense=True))
    assert [r.test.name for r in found.results] == [
        *("pp16", "tg8", "tg8 ×2", "pp16 @ d48", "tg8 @ d48", "tg8 ×2 @ d48")
    ]
    assert [r["n_depth"] for r in found.records()] == [0, 0, 0, 48, 48, 48]
    shallow, deep = (r.token_bytes for r in found.results if r.test.n_gen and r.test.n_seq == 1)
    assert shallow is not None
    assert deep is not None
    assert deep.kv_cache - shallow.kv_cache == 48 * 5 * 2 * 2 * 64 * 2  # 2 bytes for each K and V of 5 layers
    assert [[len(text) for text in a["texts"]] for a in asked[-3:]] == [[48, 48]] * 3
    assert len({json.dumps(a["streams"]) for a in asked}) == 6 * 3  # a warm-up and two runs of each test


@pytest.mark.parametrize(("flash", "plain"), [(2.0, 1.0), (1.0, 2.0)])
def test_stock_gets_its_faster_attention_at_depth(
    tiny_relu2: Path, monkeypatch: pytest.MonkeyPatch, flash: float, plain: float
) -> None:
    """Stock's times are replaced: with flash attention a run takes ``flash`` seconds, without it ``plain``."""
    opened: dict[str, list[bool]] = {SPARSE: [], DENSE: []}
    ask = WorkerProcess.ask

    def slowed(worker: WorkerProcess, do: str, **arguments: Any) -> Any:
        if do == "open":
            opened[worker.name].append(arguments["flash_attention"])
        answer = ask(worker, do, **arguments)
        if do == "time" and worker.name == DENSE:
            answer["seconds"] = flash if opened[DENSE][-1] else plain
        return answer

    monkeypatch.setattr(WorkerProcess, "ask", slowed)
    found = bench(tiny_relu2, replace(QUICK, n_prompt=(16,), n_seq=(1,), n_depth=(0, 32)))
    assert opened[SPARSE] == [True] * 4
    assert opened[DENSE] == [True, True, True, True, False] + ([True] if flash < plain else [])
    by_test = {(r.test.name, r.side): r for r in found.results}
    assert [key for key, r in by_test.items() if r.no_flash] == ([("tg8 @ d32", DENSE)] if flash > plain else [])
    assert by_test["tg8 @ d32", DENSE].tokens_per_s == (8.0, 8.0)
    assert any("without flash attention in tg8 @ d32" in note for note in found.notes) == (flash > plain)


@pytest.mark.parametrize("n_batch", [512, 7])
def test_a_test_at_depth_starts_where_the_text_ends(tiny_relu2: Path, n_batch: int) -> None:
    """The logits of a second run are those of the whole text decoded from the start."""
    from pinfer.benchmark.worker import BenchEngine

    with BenchEngine(tiny_relu2, plugin=None, n_ctx=128, n_threads=1) as engine:
        tokens = engine.tokenize(TEXT.read_text(encoding="utf-8")[:600])[:100]
        whole = engine.decode(tokens)[0].copy()
        engine.open_context(128, 1, n_batch, n_batch)
        for run in (tokens[-20:-10], tokens[60:]):
            engine.rewind([tokens[:60]])
            assert engine.time_decoding([run], 60) > 0
        logits = np.ctypeslib.as_array(engine._llama.llama_get_logits(engine._context), shape=(engine.n_vocab,))
        assert np.abs(logits - whole).max() < 1e-2 * np.abs(whole).max()
        engine.rewind([tokens[:60]])
        assert engine.time_prompt(tokens[60:], 60) > 0
        logits = np.ctypeslib.as_array(engine._llama.llama_get_logits(engine._context), shape=(engine.n_vocab,))
        assert np.abs(logits - whole).max() < 1e-2 * np.abs(whole).max()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"n_prompt": (), "n_gen": (0,)}, "nothing to measure"),
        ({"n_seq": (0,)}, "nothing to measure"),
        ({"n_ctx": 16}, "too small for a test of 96"),
        ({"text": Path("missing.txt")}, "missing.txt"),
    ],
)
def test_impossible_options_are_errors(change: dict[str, Any], words: str, tiny_relu2: Path) -> None:
    with pytest.raises((PinferError, FileNotFoundError), match=words):
        bench(tiny_relu2, replace(QUICK, **change))


def test_a_prompt_longer_than_the_learned_positions_is_refused(tmp_path: Path) -> None:
    """libllama would abort."""
    path = tmp_path / "gpt2.gguf"
    write_model(path, SynthOptions(arch="gpt2", n_ctx=64, n_head_kv=4))
    with pytest.raises(PinferError, match="no positions beyond 64"):
        bench(path, replace(QUICK, n_prompt=(65,)))


def test_a_damaged_artefact_is_one_line(tiny_relu2: Path) -> None:
    folder = tiny_relu2.with_name(tiny_relu2.name + ".pinfer")
    folder.mkdir()
    (folder / paths.COLD).write_bytes(b"GGUF but not for long")
    with pytest.raises(PinferError, match=rf"{paths.COLD}.*pinfer split") as caught:
        bench(tiny_relu2, QUICK)
    assert "\n" not in str(caught.value)


def test_a_dead_worker_is_one_line(tiny_relu2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[WorkerProcess] = []

    class Mortal(WorkerProcess):
        def ask(self, do: str, **arguments: object) -> Any:
            started.append(self)
            if do == "time" and self.name == DENSE:
                os.kill(self.pid, signal.SIGKILL)
            return super().ask(do, **arguments)

    monkeypatch.setattr(stage, "WorkerProcess", Mortal)
    with pytest.raises(PinferError) as caught:
        bench(tiny_relu2, QUICK)
    assert str(caught.value).startswith(
        "the process that measures dense ended by SIGKILL, probably because memory ran out"
    )
    assert "\n" not in str(caught.value)
    assert not [w for w in started if Path(f"/proc/{w.pid}").exists()]


def test_the_last_line_of_a_dead_worker_is_reported() -> None:
    dying = "import sys; sys.stderr.write('first\\nGGML_ASSERT(x) failed\\n\\n'); sys.exit(3)"
    with WorkerProcess("sparse", [sys.executable, "-c", dying]) as worker, pytest.raises(PinferError) as caught:
        worker.ask("load")
    assert str(caught.value) == "the process that measures sparse ended by exit code 3: GGML_ASSERT(x) failed"
    with WorkerProcess("dense") as worker, pytest.raises(PinferError, match="dense: libllama cannot load"):
        worker.ask("load", model="nowhere.gguf", plugin=None, n_threads=1)


def test_the_environment_does_not_treat_the_sides_differently(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GGML_BACKEND_PATH", "libggml-pinfer.so")
    monkeypatch.setenv("PINFER_ARTEFACTS", "elsewhere")
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    monkeypatch.setenv("GOMP_SPINCOUNT", "infinity")
    monkeypatch.setenv("PINFER_ISA", "scalar")
    found = worker_environment()
    assert not {"GGML_BACKEND_PATH", "PINFER_ARTEFACTS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"} & set(found)
    assert found["PINFER_ISA"] == "scalar"


def test_the_idle_side_sleeps(tiny_relu2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Uses OpenMP's default wait policy, as a measurement does; conftest sets another."""
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    with WorkerProcess(DENSE) as worker:
        worker.ask("load", model=str(tiny_relu2), plugin=None, n_threads=2)
        worker.ask("open", n_ctx=8, n_seq=1)
        worker.ask("time", kind="tg", streams=[[1, 2, 3, 4]])
        time.sleep(0.2)  # the threads spin for a while; on a shared machine that while is longer
        before = _cpu_ticks(worker.pid)
        time.sleep(0.5)
        assert _cpu_ticks(worker.pid) - before <= 2


def _cpu_ticks(pid: int) -> int:
    values = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(values[11]) + int(values[12])


def test_used_by_others_is_busy_time_minus_own_time() -> None:
    begin, end = machine.CpuTime(10.0, 100.0), machine.CpuTime(20.0, 115.0)
    assert machine.used_by_others(begin, end, own=10.0) == pytest.approx(0.5)
    assert machine.used_by_others(begin, end, own=30.0) == 0.0
    assert machine.used_by_others(None, end, own=1.0) is None


def test_a_busy_machine_is_noted(tiny_relu2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "used_by_others", lambda *_: 0.7)
    found = bench(tiny_relu2, replace(QUICK, n_gen=(), repetitions=1, dense=True))
    assert any(note.startswith("busy: other processes used 0.7 CPUs") for note in found.notes)
    monkeypatch.setattr(machine, "used_by_others", lambda *_: 0.01)
    quiet = bench(tiny_relu2, replace(QUICK, n_gen=(), repetitions=1, dense=True))
    assert not any("busy" in note for note in quiet.notes)


@pytest.fixture
def pinfer(tmp_path: Path) -> CommandLine:
    return CommandLine(tmp_path, tmp_path / "home")


def test_the_command_prints_records_and_nothing_else_on_stdout(tiny_relu2: Path, pinfer: CommandLine) -> None:
    words = ("bench", tiny_relu2, "-p", "32", "-n", "8", "-np", "1,2", "-r", "2", "-t", "2", "-o", "jsonl")
    outcome = pinfer(*words)
    assert outcome.code == 0, outcome.err
    records = [json.loads(line) for line in outcome.out.splitlines()]
    assert [(r["test"], r["side"]) for r in records] == [
        (name, side) for name in ("pp32", "tg8", "tg8 ×2") for side in (SPARSE, DENSE)
    ]
    assert all(len(r["samples_ts"]) == 2 for r in records)
    wrong = pinfer("bench", tiny_relu2, "-np", "many")
    assert wrong.code == 2
    assert "'many' is not a valid list of numbers" in wrong.err_lines[-1]


def test_every_flag_arrives(monkeypatch: pytest.MonkeyPatch, tiny_relu2: Path) -> None:
    caught: list[BenchOptions] = []

    def catch(_path: Path, options: BenchOptions, _progress: object) -> None:
        caught.append(options)
        raise PinferError("caught")

    monkeypatch.setattr(stage, "bench", catch)
    words = "-p 1,2 -n 3 -np 4 -r 6 -t 7 -c 8 -ngl 9 --compare none --dense --exact --no-artefacts --device d --text t"
    for flags in ((), (*words.split(), "--rpc", "h:1", "--activation", "relu2")):
        assert app.run_cli(["bench", str(tiny_relu2), *flags]) == 1
    default, given = caught
    assert default == BenchOptions()
    expected = BenchOptions(
        n_prompt=(1, 2),
        n_gen=(3,),
        n_seq=(4,),
        repetitions=6,
        n_threads=7,
        n_ctx=8,
        n_gpu_layers=9,
        compare="none",
        dense=True,
        exact=True,
        no_artefacts=True,
        device="d",
        activation="relu2",
        text=Path("t"),
        rpc="h:1",
    )
    assert given == expected


def test_ctrl_c_ends_both_workers(tiny_relu2: Path, pinfer: CommandLine) -> None:
    command = [sys.executable, "-m", "pinfer", "bench", str(tiny_relu2), "-n", "200", "-p", "0", "-r", "2000"]
    process = subprocess.Popen(
        command, cwd=pinfer.folder, env=pinfer.environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        _wait_until(lambda: len(_children(process.pid)) == 2)
        workers = _children(process.pid)
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 130
    assert out == ""
    assert "Traceback" not in err
    _wait_until(lambda: not [pid for pid in workers if Path(f"/proc/{pid}").exists()])


def _children(pid: int) -> list[int]:
    try:
        return [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except FileNotFoundError:
        return []


def _wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)
