"""Registers ggml's RPC servers as devices of this process, through the plugin (native/include/pinfer_remote.h)."""

from __future__ import annotations

import ctypes
import os
import sys
from typing import Any

from pinfer.errors import PinferError
from pinfer.llama import plugin
from pinfer.llama.ggml import load_library

_LINE_BYTES = 1024
_ABORT = ctypes.CFUNCTYPE(None, ctypes.c_char_p)
_CALLBACKS: list[Any] = []  # ctypes callbacks must outlive the library that calls them


def connect(servers: str) -> None:
    """Register the devices of ``host:port[,host:port]`` as RPC0, RPC1, ... in the order of the list.

    They stay registered until the process ends; only then can another process use these servers. Raises PinferError
    for the first server that is missing, does not answer, or speaks another protocol version.
    """
    library = _library()
    _speak_when_ggml_aborts(library)
    line = ctypes.create_string_buffer(_LINE_BYTES)
    if not library.pinfer_remote_add(servers.encode(), line, _LINE_BYTES):
        raise PinferError(line.value.decode("utf-8", errors="replace"))


def _library() -> ctypes.CDLL:
    plugin.load_plugin()
    library = ctypes.CDLL(str(plugin.plugin_path()))
    for name in ("pinfer_remote_add", "pinfer_remote_explain"):
        function = getattr(library, name)
        function.restype = ctypes.c_bool
        function.argtypes = (ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t)
    return library


def _speak_when_ggml_aborts(library: ctypes.CDLL) -> None:
    """Print one line instead of ggml's backtrace. When a server goes away, its client can only abort the process."""
    if _CALLBACKS or os.environ.get("PINFER_DEBUG"):
        return

    def leave(message: bytes) -> None:
        line = ctypes.create_string_buffer(_LINE_BYTES)
        if library.pinfer_remote_explain(message, line, _LINE_BYTES):
            text = line.value.decode("utf-8", errors="replace")
        else:
            last = message.decode("utf-8", errors="replace").rpartition("/")[2]
            text = f"libggml stopped: {' '.join(last.split())}; rerun with PINFER_DEBUG=1 for the backtrace"
        # A progress bar occupies this line and has hidden the cursor.
        clear = "\r\x1b[2K\x1b[?25h" if sys.stderr.isatty() else ""
        os.write(2, f"{clear}pinfer: {text}\n".encode())
        os._exit(1)

    _CALLBACKS.append(_ABORT(leave))
    base = load_library("ggml-base")
    base.ggml_set_abort_callback.restype = ctypes.c_void_p
    base.ggml_set_abort_callback.argtypes = (_ABORT,)
    base.ggml_set_abort_callback(_CALLBACKS[0])
