"""PINFER_TRACE: where the time of an FFN goes, readable at any moment of a run."""

from __future__ import annotations

import json
import os
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from support.runs import run_command
from support.shards import write_shards

from pinfer.llama import plugin as native
from pinfer.llama.engine import Engine, PluginConfig
from pinfer.model import open_model


def runner(model: Path, trace: Path, n_tokens: int) -> subprocess.Popen[str]:
    return subprocess.Popen(
        run_command(model, "-p", "Once upon a time", "-n", n_tokens, "--ignore-eos", "--temp", 0, "-t", 1),
        env={**os.environ, "PINFER_TRACE": str(trace)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def events(trace: Path, name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(trace.read_text())
    return [event for event in found if event["name"] == name]


def test_every_layer_is_traced(tiny_relu2: Path, tmp_path: Path) -> None:
    write_shards(tiny_relu2, 0.5)
    n_layer = open_model(tiny_relu2).n_layer
    trace = tmp_path / "trace.json"
    run = runner(tiny_relu2, trace, 8)
    _, said = run.communicate(timeout=60)
    assert run.returncode == 0, said
    assert [event["args"]["name"] for event in events(trace, "thread_name")] == ["CPU", "CPU"]
    for name, row in (("copy", 0), ("cold", 0), ("wait", 0), ("hot", 1)):
        found = events(trace, name)
        # the prompt is one batch, and every token but the last is decoded
        assert [event["args"]["layer"] for event in found] == list(range(n_layer)) * 8
        assert {event["args"]["tokens"] for event in found[n_layer:]} == {1}
        assert all(event["ph"] == "X" and event["tid"] == row and event["dur"] >= 0 for event in found)
    # a CPU device computes before the cold part begins, and nothing is left to wait for
    for hot, cold, wait in zip(events(trace, "hot"), events(trace, "cold"), events(trace, "wait"), strict=True):
        assert hot["ts"] + hot["dur"] <= cold["ts"] + 0.01
        assert cold["ts"] + cold["dur"] <= wait["ts"] + 0.01


def test_a_killed_run_leaves_a_whole_trace(tiny_relu2: Path, tmp_path: Path) -> None:
    write_shards(tiny_relu2, 0.5)
    trace = tmp_path / "trace.json"
    run = runner(tiny_relu2, trace, 100_000)
    deadline = time.monotonic() + 60
    while not (trace.is_file() and trace.stat().st_size > 20_000):
        assert time.monotonic() < deadline
        assert run.poll() is None
        time.sleep(0.01)
    run.kill()
    run.communicate()
    assert len(events(trace, "cold")) > 10


def test_a_trace_that_cannot_be_written(tiny_relu2: Path, tmp_path: Path) -> None:
    run = runner(tiny_relu2, tmp_path / "no" / "trace.json", 2)
    _, said = run.communicate(timeout=60)
    assert run.returncode == 0
    assert "trace.json cannot be written (No such file or directory)" in said


def test_the_seconds_of_a_hot_part(tiny_relu2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PINFER_TRACE", raising=False)
    shards = write_shards(tiny_relu2, 0.5)
    plugin = native.load_plugin()
    config = PluginConfig.of(open_model(tiny_relu2))
    with Engine(tiny_relu2, plugin=config, n_ctx=64, n_threads=1) as engine:
        engine.generate([1, 2, 3], 4)
        stats = plugin.stats()
        assert stats.seconds_hot == stats.seconds_cold == stats.seconds_wait == 0
        assert stats.hidden is None
    config = PluginConfig(config.activation, hot=[shards.hot], cold=shards.cold, device="CPU")
    with Engine(tiny_relu2, plugin=config, n_ctx=64, n_threads=1) as engine:
        engine.generate([1, 2, 3], 4)
        stats = plugin.stats()
        assert stats.seconds_hot > 0
        assert stats.seconds_cold > 0
        assert stats.hidden == 0
        assert plugin.hot_shard_bytes(tiny_relu2, 0) == stats.hot_bytes > 0
        assert plugin.hot_shard_bytes(tiny_relu2, 1) == 0
        assert plugin.last_failure() is None
        assert plugin.devices_at_work() is None


def test_python_cuts_batches_where_the_plugin_does() -> None:
    header = Path(__file__).parents[1] / "native" / "include" / "pinfer.h"
    assert f"#define PINFER_HOT_TOKENS {native.HOT_TOKENS}\n" in header.read_text()
