"""Ctrl-C: deferred while something must not be interrupted, obeyed while something long runs."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import TypeVar

T = TypeVar("T")
_POLL = 0.1
"""seconds"""


@dataclass
class HeldInterrupt:
    """Whether Ctrl-C was pressed inside the block."""

    seen: bool = False


@contextmanager
def hold_interrupt() -> Iterator[HeldInterrupt]:
    """Within the block Ctrl-C only sets ``seen``, which the caller checks to stop cleanly.

    Only the main thread receives signals; in other threads ``seen`` stays False.
    """
    held = HeldInterrupt()

    def remember(_signum: int, _frame: FrameType | None) -> None:
        held.seen = True

    if threading.current_thread() is not threading.main_thread():
        yield held
        return
    before = signal.signal(signal.SIGINT, remember)
    try:
        yield held
    finally:
        signal.signal(signal.SIGINT, before)


def interruptible(work: Callable[[], T]) -> T:
    """The result of ``work``. Ctrl-C takes effect at once, even during minutes in a single numpy call.

    ``work`` runs in a thread. After Ctrl-C the thread is abandoned, so ``work`` must have no side effects. Its
    exceptions are raised here.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(_POLL)
    if errors:
        raise errors[0]
    return results[0]
