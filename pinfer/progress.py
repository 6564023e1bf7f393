"""How the stages report progress. `pinfer.cli.ui` draws it; tests pass `NULL_PROGRESS`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Progress(Protocol):
    """Shows running tasks: ``with progress.task(...) as advance: advance(512)``."""

    def task(self, label: str, total: int, unit: str) -> AbstractContextManager[Callable[[int], None]]:
        """Start a task of ``total`` units (``"tokens"``, ``"bytes"``, ``"layers"``, ...)."""
        ...

    def note(self, text: str) -> None:
        """Print one line on stderr without disturbing the bar."""
        ...


class _NullProgress:
    @contextmanager
    def task(self, label: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
        yield lambda n: None

    def note(self, text: str) -> None:
        pass


NULL_PROGRESS: Progress = _NullProgress()
