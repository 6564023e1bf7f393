"""Pictures of measurements: the records of `pinfer bench`, and the trace of PINFER_TRACE."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from statistics import median
from typing import Any

from pinfer.errors import PinferError
from pinfer.plotting.picture import Panel, Picture, Series

_RECORD_HINT = "write one: pinfer bench MODEL -o jsonl >> FILE"
_TRACE_HINT = "write one: PINFER_TRACE=FILE pinfer run MODEL"
_PARTS = ("cold", "hot", "copy", "wait")
"""of the time of an FFN, as the plugin names them"""


def _read(path: Path, hint: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise PinferError(f"{path} cannot be read: {error.strerror or error}", hint) from None
    except UnicodeDecodeError:
        raise PinferError(f"{path} is not a text file", hint) from None


# --- bench ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Ratio:
    """Speed of pinfer over that of stock libllama, in one test of one run."""

    model: str
    test: str
    mode: str
    cpu: str
    commit: str
    time: str
    median: float
    low: float
    high: float
    limit: float | None
    """the ratio if both sides only had to read their bytes"""
    of_limit: Mapping[str, tuple[float, float, float]]
    """by side: lowest, median and highest share of the memory limit"""


def bench_picture(files: Sequence[Path]) -> Picture:
    """Ratios with their spread, against the memory limit, and over commits if the records have several."""
    ratios = sorted(_ratios([record for file in files for record in _records(file)]), key=lambda r: r.time)
    if not ratios:
        raise PinferError(
            f"no record of {', '.join(map(str, files))} compares pinfer with stock libllama",
            "measure both sides: pinfer bench MODEL -o jsonl >> FILE",
        )
    name = _naming(ratios)
    latest: dict[str, list[_Ratio]] = {}
    for ratio in ratios:  # in the order of time: the last commit of each case stays
        others = latest.setdefault(name(ratio), [])
        latest[name(ratio)] = [r for r in others if r.commit == ratio.commit] + [ratio]
    commits = tuple(dict.fromkeys(ratio.commit for ratio in ratios))
    panels = [_ratio_panel(latest)]
    if any(ratio.of_limit for case in latest.values() for ratio in case):
        panels.append(_limit_panel(latest))
    if len(commits) > 1:
        panels.append(_commit_panel(ratios, commits, name))
    models = ", ".join(dict.fromkeys(ratio.model for ratio in ratios))
    machines = ", ".join(dict.fromkeys(ratio.cpu for ratio in ratios))
    return Picture(f"{models}: pinfer bench", f"{machines}; pinfer {commits[-1]}".rstrip(), tuple(panels))


def _records(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a JSONL file, or of a report of ``pinfer bench --json``."""
    text = _read(path, _RECORD_HINT)
    try:
        whole = json.loads(text)
    except ValueError:
        whole = None
    if isinstance(whole, dict) and isinstance(whole.get("results"), list):
        found = [(str(path), record) for record in whole["results"]]
    else:
        found = [(f"{path}:{n}", _parsed(line)) for n, line in enumerate(text.splitlines(), 1) if line.strip()]
    for where, record in found:
        if not _is_record(record):
            raise PinferError(f"{where} is not a record of pinfer bench", _RECORD_HINT)
        yield record


def _parsed(line: str) -> object:
    try:
        return json.loads(line)
    except ValueError:
        return None


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)


def _is_record(record: object) -> bool:
    if not isinstance(record, dict):
        return False
    texts = ("model_filename", "test", "side", "mode", "cpu", "commit", "pinfer_version", "time")
    numbers = ("ratio", "ratio_low", "ratio_high", "limit_ts")
    samples = record.get("samples_ts")
    return (
        all(isinstance(record.get(key), str) for key in texts)
        and all(key in record and (record[key] is None or _is_number(record[key])) for key in numbers)
        and isinstance(samples, list)
        and bool(samples)
        and all(map(_is_number, samples))
    )


def _ratios(records: Sequence[Mapping[str, Any]]) -> Iterator[_Ratio]:
    def run(record: Mapping[str, Any]) -> tuple[str, ...]:
        return tuple(record[key] for key in ("model_filename", "test", "time", "cpu", "commit"))

    dense = {run(record): record for record in records if record["side"] == "dense"}
    for record in records:
        if record["side"] == "dense" or record["ratio"] is None:
            continue
        sides = {"pinfer": record} | ({"stock libllama": dense[run(record)]} if run(record) in dense else {})
        limits = {side: r["limit_ts"] for side, r in sides.items() if r["limit_ts"]}
        yield _Ratio(
            model=record["model_filename"],
            test=record["test"],
            mode=record["mode"],
            cpu=record["cpu"],
            commit=record["commit"] or record["pinfer_version"],
            time=record["time"],
            median=record["ratio"],
            low=record["ratio_low"],
            high=record["ratio_high"],
            limit=limits["pinfer"] / limits["stock libllama"] if len(limits) == 2 else None,
            of_limit={side: _spread([t / limit for t in sides[side]["samples_ts"]]) for side, limit in limits.items()},
        )


def _spread(values: Sequence[float]) -> tuple[float, float, float]:
    return min(values), median(values), max(values)


def _naming(ratios: Sequence[_Ratio]) -> Callable[[_Ratio], str]:
    """Names of cases: the test, and whatever else differs between the records."""
    keys = [key for key in ("model", "mode", "cpu") if len({getattr(ratio, key) for ratio in ratios}) > 1]
    return lambda ratio: ", ".join([ratio.test, *(getattr(ratio, key) for key in keys)])


def _together(case: Sequence[_Ratio]) -> tuple[float, float, float]:
    """Lowest, median and highest of the runs of one case."""
    return min(r.low for r in case), median(r.median for r in case), max(r.high for r in case)


def _ratio_panel(cases: Mapping[str, Sequence[_Ratio]]) -> Panel:
    low, mid, high = zip(*map(_together, cases.values()), strict=True)
    limits = [(i, r.limit) for i, case in enumerate(cases.values()) for r in case[-1:] if r.limit is not None]
    series = [Series("measured: median, lowest and highest", mid, tuple(range(len(cases))), low, high)]
    if limits:
        at, values = zip(*limits, strict=True)
        series.append(Series("if both only had to read their bytes", values, at))
    return Panel("ranges", "pinfer ÷ stock libllama", "ratio of speeds", "", tuple(series), tuple(cases), reference=1.0)


def _limit_panel(cases: Mapping[str, Sequence[_Ratio]]) -> Panel:
    limited = {name: case[-1] for name, case in cases.items() if case[-1].of_limit}
    series = []
    for side in dict.fromkeys(side for ratio in limited.values() for side in ratio.of_limit):
        at = tuple(i for i, ratio in enumerate(limited.values()) if side in ratio.of_limit)
        shares = [ratio.of_limit[side] for ratio in limited.values() if side in ratio.of_limit]
        low, mid, high = (tuple(100 * value for value in column) for column in zip(*shares, strict=True))
        series.append(Series(side, mid, at, low, high))
    title = "Speed as a share of the memory limit"
    return Panel("ranges", title, "% of the speed that memory bandwidth allows", "", tuple(series), tuple(limited), 100)


def _commit_panel(ratios: Sequence[_Ratio], commits: tuple[str, ...], name: Callable[[_Ratio], str]) -> Panel:
    series = []
    for case in dict.fromkeys(map(name, ratios)):
        of_case = {c: [r for r in ratios if name(r) == case and r.commit == c] for c in commits}
        at = tuple(i for i, commit in enumerate(commits) if of_case[commit])
        low, mid, high = zip(*(_together(found) for found in of_case.values() if found), strict=True)
        series.append(Series(case, at, mid, low, high))
    return Panel("curves", "Over commits", "", "pinfer ÷ stock libllama", tuple(series), commits, reference=1.0)


# --- trace ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Event:
    """A bar of the trace, in microseconds."""

    name: str
    row: int
    begin: float
    duration: float
    layer: int
    tokens: int

    @property
    def end(self) -> float:
        return self.begin + self.duration


def trace_picture(path: Path, machine: str) -> Picture:
    """Copy, cold, wait and hot of a typical token: over time, and by layer over all tokens."""
    events, rows = _trace(path)
    passes = list(_passes(events))
    if not passes:
        raise PinferError(f"{path} has no events", _TRACE_HINT)
    # Decoding makes most of the batches, so the most frequent size is that of decoding.
    sizes = Counter(map(_tokens, passes))
    tokens = min(sizes, key=lambda size: (-sizes[size], size))
    passes = [each for each in passes if _tokens(each) == tokens]
    typical = sorted(passes, key=_duration)[(len(passes) - 1) // 2]
    what = "token" if tokens == 1 else f"batch of {tokens} tokens"
    unit = "ms" if _duration(typical) >= 1000 else "µs"
    names = [name for name in _PARTS if any(event.name == name for event in typical)]
    title = f"The median of {len(passes)}: one {what}, {_format(_duration(typical), unit)}"
    return Picture(
        f"{path.name}: where the time of a {what} goes",
        f"{', '.join(rows)}; drawn on {machine}",
        (
            Panel("spans", title, unit, "", tuple(_span_series(typical, name, unit) for name in names), rows),
            _layer_panel(passes, names, what, unit),
        ),
    )


def _trace(path: Path) -> tuple[list[_Event], tuple[str, ...]]:
    """The events of a trace and the names of its rows."""
    not_one = PinferError(f"{path} is not a trace of pinfer", _TRACE_HINT)
    try:
        content = json.loads(_read(path, _TRACE_HINT))
        if not isinstance(content, list):
            raise not_one
        names = {int(e["tid"]): str(e["args"]["name"]) for e in content if e["name"] == "thread_name"}
        events = [
            _Event(e["name"], int(e["tid"]), float(e["ts"]), float(e["dur"]), int(a["layer"]), int(a["tokens"]))
            for e in content
            if e["ph"] == "X"
            for a in [e["args"]]
        ]
    except (ValueError, TypeError, KeyError):
        raise not_one from None
    ours = all(e.name in _PARTS and e.row in names and isfinite(e.begin + e.duration) for e in events)
    if not ours or sorted(names) != list(range(len(names))):
        raise not_one
    # Two rows of the same name are the CPU and a device of the CPU's backend.
    labels = (name if i == 0 else f"device {i - 1}: {name}" for i, name in sorted(names.items()))
    return events, tuple(labels)


def _passes(events: Sequence[_Event]) -> Iterator[list[_Event]]:
    """The events of each pass through the layers, cut where the layers begin again."""
    one_layer = len({event.layer for event in events}) == 1
    current: list[_Event] = []
    for event in events:
        again = any((e.name, e.row) == (event.name, event.row) for e in current) if one_layer else False
        if current and (event.layer < current[-1].layer or again):
            yield current
            current = []
        current.append(event)
    if current:
        yield current


def _tokens(events: Sequence[_Event]) -> int:
    """Tokens of a pass. Its last layer computes only those whose logits are wanted."""
    return max(event.tokens for event in events)


_MICROSECONDS = {"µs": 1, "ms": 1000}


def _format(duration: float, unit: str) -> str:
    return f"{duration / _MICROSECONDS[unit]:.3g} {unit}"


def _duration(events: Sequence[_Event]) -> float:
    """Microseconds from the first event to the end of the last."""
    return max(event.end for event in events) - min(event.begin for event in events)


def _span_series(events: Sequence[_Event], name: str, unit: str) -> Series:
    divisor = _MICROSECONDS[unit]
    start = min(event.begin for event in events)
    mine = [event for event in events if event.name == name]
    return Series(
        f"{name}, {_format(sum(event.duration for event in mine), unit)}",
        tuple((event.begin - start) / divisor for event in mine),
        tuple(float(event.row) for event in mine),
        high=tuple((event.end - start) / divisor for event in mine),
    )


def _layer_panel(passes: Sequence[Sequence[_Event]], names: Sequence[str], what: str, unit: str) -> Panel:
    """The time of each part by layer, the median over the passes; parts of several devices are added."""
    series = []
    for name in names:
        durations: dict[int, list[float]] = {}
        for events in passes:
            of_pass: dict[int, float] = {}
            for event in events:
                if event.name == name:
                    of_pass[event.layer] = of_pass.get(event.layer, 0.0) + event.duration / _MICROSECONDS[unit]
            for layer, duration in of_pass.items():
                durations.setdefault(layer, []).append(duration)
        layers = sorted(durations)
        series.append(Series(name, tuple(map(float, layers)), tuple(median(durations[layer]) for layer in layers)))
    return Panel("curves", f"By layer, the median of {len(passes)}", "layer", f"{unit} per {what}", tuple(series))
