"""What got slower or faster since an earlier bench, by the records that ``pinfer bench -o jsonl`` wrote."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pinfer.benchmark.report import SPARSE, BenchReport
from pinfer.errors import PinferError

# A record is of the same case where these agree.
_CASE = ("model_filename", "test", "mode", "n_threads", "cpu")


@dataclass(frozen=True)
class Spread:
    """Sparse over dense: the median of the pairs, the smallest and the largest."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f}× ({self.low:.2f}-{self.high:.2f})"


@dataclass(frozen=True)
class Change:
    """A test then and now. Ratios are compared, since speeds differ with what else the machine does."""

    test: str
    commit: str
    """of the earlier record"""
    before: Spread
    now: Spread

    @property
    def verdict(self) -> str:
        """``slower`` or ``faster`` where the spreads do not overlap, else ``same``."""
        if self.now.high < self.before.low:
            return "slower"
        return "faster" if self.now.low > self.before.high else "same"


def read_records(path: Path) -> list[dict[str, Any]]:
    """Records in their order. Raises PinferError where the file is missing or has other lines."""
    hint = "make such a file: pinfer bench MODEL -o jsonl >> FILE"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise PinferError(f"cannot read {path} ({getattr(error, 'strerror', None) or error})", hint) from error
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line) if line.strip() else None
        except ValueError:
            record = ()
        if record is None:
            continue
        if not isinstance(record, dict) or not {"model_filename", "test", "side"} <= record.keys():
            raise PinferError(f"line {number} of {path} is not a record of pinfer bench", hint)
        records.append(record)
    return records


def changes(report: BenchReport, records: Sequence[dict[str, Any]]) -> list[Change]:
    """Each test of the report that an earlier record has, with the newest of them."""
    found = []
    for record in report.records():
        earlier = [r for r in records if r.get("ratio") and all(r.get(key) == record[key] for key in _CASE)]
        if record["side"] == SPARSE and record["ratio"] and earlier:
            last = earlier[-1]
            found.append(Change(str(record["test"]), str(last.get("commit") or "?"), _spread(last), _spread(record)))
    return found


def _spread(record: dict[str, Any]) -> Spread:
    return Spread(record["ratio"], record["ratio_low"], record["ratio_high"])
