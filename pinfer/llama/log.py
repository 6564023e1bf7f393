"""Captures libllama's log instead of printing it. libllama has one log callback per process, so there is one log."""

from __future__ import annotations

from collections import deque
from typing import Any

_WARN, _ERROR, _CONTINUE = 3, 4, 5  # enum ggml_log_level

_lines: deque[tuple[int, str]] = deque(maxlen=1000)
_callbacks: list[Any] = []  # ctypes callbacks must outlive the library that calls them


def _keep(level: int, text: bytes, _user_data: object) -> None:
    said = text.decode("utf-8", errors="replace")
    if level == _CONTINUE and _lines:
        before, held = _lines.pop()
        _lines.append((before, held + said))
    else:
        _lines.append((level, said))


def capture() -> None:
    """Start a new log: drop the earlier messages and keep those that follow."""
    from llama_cpp import llama_cpp as llama

    if not _callbacks:
        _callbacks.append(llama.llama_log_callback(_keep))
    # Set it every time: other code in this process may have installed its own callback.
    llama.llama_log_set(_callbacks[0], None)
    _lines.clear()


def captured() -> str:
    """libllama's messages since `capture`, at most the last thousand."""
    return "".join(text for _, text in _lines)


def last_words(n: int = 2) -> str:
    """The last ``n`` errors since `capture`, else the last warnings, as one line."""
    for level in (_ERROR, _WARN):
        lines = [" ".join(text.split()) for kind, text in _lines if kind == level and text.strip()]
        if lines:
            return "; ".join(lines[-n:])
    return "it gave no reason"
