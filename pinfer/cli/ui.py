"""Output: progress and messages on stderr, tables and JSON on stdout.

Rich is imported inside functions, so that ``pinfer --help`` stays fast.
"""

from __future__ import annotations

import json
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from pinfer.cli.formats import format_amount, format_bytes, format_done, format_rate, format_seconds
from pinfer.progress import Progress

if TYPE_CHECKING:
    from pathlib import Path

    from rich.progress import Progress as RichProgress
    from rich.progress import Task
    from rich.table import Table


# Without a terminal, a line is printed after this share of the work and at least this many seconds, or after a longer
# time without a line.
_LINE_SHARE = 0.1
_LINE_SECONDS = 2.0
_SILENT_SECONDS = 30.0
# Width of tables if stdout is not a terminal.
_PIPE_WIDTH = 200


def say(text: str) -> None:
    """One line on stderr."""
    print(text, file=sys.stderr, flush=True)


def stderr_progress() -> Progress:
    """Progress for a stage: a bar if stderr is a terminal, plain lines otherwise."""
    return _BarProgress() if sys.stderr.isatty() else _LineProgress()


class _LineProgress:
    """Progress as plain lines, for logs and pipes."""

    @contextmanager
    def task(self, label: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
        begin = last = time.monotonic()
        done = shown = 0

        def advance(n: int) -> None:
            nonlocal done, shown, last
            done += n
            now = time.monotonic()
            due = _LINE_SECONDS if done - shown >= _LINE_SHARE * total else _SILENT_SECONDS
            if now - last < due:
                return
            shown, last = done, now
            rate = done / (now - begin)
            share = f" ({100 * done / total:.0f} %)" if total > 0 else ""
            eta = f", ETA {format_seconds((total - done) / rate)}" if total > done and rate > 0 else ""
            say(f"{label}: {format_done(done, total, unit)}{share}, {format_rate(rate, unit)}{eta}")

        yield advance
        seconds = time.monotonic() - begin
        say(f"{label}: {format_amount(done, unit)} in {seconds:.1f} s ({format_rate(done / max(seconds, 1e-9), unit)})")

    def note(self, text: str) -> None:
        say(text)


class _BarProgress:
    """Progress as Rich bars on the terminal; tasks may nest."""

    def __init__(self) -> None:
        self._live: RichProgress | None = None

    @contextmanager
    def task(self, label: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
        if self._live is not None:
            with self._row(self._live, label, total, unit) as advance:
                yield advance
            return
        self._live = _rich_progress()
        try:
            with self._live, self._row(self._live, label, total, unit) as advance:
                yield advance
        finally:
            self._live = None

    @contextmanager
    def _row(self, live: RichProgress, label: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
        row = live.add_task(label, total=total if total > 0 else None, unit=unit)
        yield lambda n: live.advance(row, n)
        live.update(row, total=live.tasks[live.task_ids.index(row)].completed)

    def note(self, text: str) -> None:
        if self._live is not None:
            self._live.console.print(text, markup=False, highlight=False)
        else:
            say(text)


def _rich_progress() -> RichProgress:
    from rich.console import Console
    from rich.progress import BarColumn, ProgressColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress
    from rich.text import Text

    class Amount(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(format_done(task.completed, task.total or 0, str(task.fields["unit"])))

    class Rate(ProgressColumn):
        def render(self, task: Task) -> Text:
            speed = task.finished_speed or task.speed
            return Text(format_rate(speed, str(task.fields["unit"])) if speed else "")

    return RichProgress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        Amount(),
        Rate(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        speed_estimate_period=20,
    )


def print_json(value: Mapping[str, object]) -> None:
    """One JSON object on stdout."""
    print(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False))


def print_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> None:
    """A table on stdout; columns are right-aligned except those in ``left``."""
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i in left else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    if title:
        print(title)
    _show(table)


def print_facts(facts: Sequence[tuple[str, str]]) -> None:
    """Names and values on stdout, one pair per line."""
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    table.add_column()
    for name, value in facts:
        table.add_row(name, value)
    _show(table)


def _show(table: Table) -> None:
    from rich.console import Console

    console = Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH, highlight=False, markup=False, emoji=False)
    with console.capture() as captured:
        console.print(table)
    # Rich adds a margin and pads lines to the table's width. Remove both for piped and copied text.
    lines = [line.rstrip() for line in captured.get().splitlines()]
    print(textwrap.dedent("\n".join(line for line in lines if line)))


def print_paths(*paths: Path | None) -> None:
    """Print the written files, one line each on stderr."""
    for path in paths:
        if path is not None:
            say(f"wrote {path} ({format_bytes(path.stat().st_size)})")
