"""Ctrl-C held back while something must not be cut short."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType


@dataclass
class HeldInterrupt:
    """Whether Ctrl-C was pressed since the block was entered."""

    seen: bool = False


@contextmanager
def hold_interrupt() -> Iterator[HeldInterrupt]:
    """Within the block Ctrl-C only sets ``seen``; who entered it looks there and ends in good order.

    In threads other than the main one, which get no signals, nothing is ever seen.
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
