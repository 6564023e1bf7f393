"""Defers Ctrl-C while something must not be interrupted."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType


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
