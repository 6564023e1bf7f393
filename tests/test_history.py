"""`pinfer bench --compare FILE`: what got slower since, by records of earlier runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.command_line import CommandLine

from pinfer.bench import BenchOptions, bench
from pinfer.benchmark.history import Change, Spread, changes, read_records
from pinfer.errors import PinferError

QUICK = BenchOptions(n_prompt=(), n_gen=(4,), n_seq=(1,), repetitions=2, n_stream_bytes=1 << 22)


@pytest.mark.parametrize(
    ("now", "verdict"),
    [((0.8, 0.99), "slower"), ((1.3, 1.5), "faster"), ((0.8, 1.0), "same"), ((0.5, 2.0), "same")],
)
def test_spreads_that_overlap_say_nothing(now: tuple[float, float], verdict: str) -> None:
    low, high = now
    assert Change("tg4", "abc", Spread(1.1, 1.0, 1.2), Spread((low + high) / 2, low, high)).verdict == verdict


def test_the_newest_record_of_the_same_case_is_taken(tiny_relu2: Path, tmp_path: Path) -> None:
    report = bench(tiny_relu2, QUICK)
    (sparse,) = [record for record in report.records() if record["ratio"]]
    fast = sparse | {"ratio": 90.0, "ratio_low": 80.0, "ratio_high": 100.0, "commit": "fast"}
    slow = sparse | {"ratio": 0.01, "ratio_low": 0.01, "ratio_high": 0.01, "commit": "slow"}
    others = [fast | {"model_filename": "other"}, fast | {"test": "tg9"}, fast | {"mode": "predicted"}]
    file = tmp_path / "records.jsonl"
    for records, verdict, commit in (([slow, fast, *others], "slower", "fast"), ([fast, slow], "faster", "slow")):
        file.write_text("\n".join(json.dumps(record) for record in records) + "\n\n")
        (change,) = changes(report, read_records(file))
        assert (change.verdict, change.commit, change.now.median) == (verdict, commit, sparse["ratio"])
    assert changes(report, [fast | {"n_threads": 99}]) == []


def test_the_command_says_it_on_stderr(tiny_relu2: Path, tmp_path: Path) -> None:
    pinfer = CommandLine(tmp_path / "work", tmp_path / "home")
    words: list[str | Path] = ["bench", tiny_relu2, "-p", "0", "-n", "4", "-np", "1", "-r", "2"]
    file = tmp_path / "records.jsonl"
    first = pinfer(*words, "-o", "jsonl")
    assert first.code == 0, first.err
    file.write_text(first.out)
    again = pinfer(*words, "--compare", file, "-o", "jsonl")
    assert again.code == 0, again.err
    assert len(again.out.splitlines()) == 2
    assert any(line.startswith(("tg4: same", "tg4: slower", "tg4: faster")) for line in again.err_lines)
    file.write_text("")
    assert "no record of this model" in pinfer(*words, "--compare", file).err


@pytest.mark.parametrize("text", ["nonsense", "[1]", '{"a": 1}', '{"test": "tg4"}'])
def test_other_files_are_refused(text: str, tmp_path: Path) -> None:
    file = tmp_path / "records.jsonl"
    file.write_text(text)
    with pytest.raises(PinferError, match=r"line 1 of .* is not a record of pinfer bench"):
        read_records(file)
    with pytest.raises(PinferError, match="cannot read"):
        read_records(tmp_path / "missing")
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(PinferError, match="cannot read"):
        read_records(file)
