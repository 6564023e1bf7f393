"""``pinfer serve``: llama.cpp's HTTP server over the plugin."""

from __future__ import annotations

import socket
import sys

from pinfer.errors import PinferError
from pinfer.execution import Execution
from pinfer.llama.plugin import runner_path
from pinfer.run import LlamaFlags

ROUTER = ("--models-dir", "--models-preset")
"""Flags that have the server start models on demand, each in a process of its own."""

_HOST = ("--host",)
_PORT = ("--port",)
_DEFAULT_PORT = 8080


def check_address(flags: LlamaFlags) -> None:
    """Raises PinferError where another program listens already: llama.cpp would load the model before it noticed."""
    host = flags.value("server", _HOST) or "127.0.0.1"
    port = flags.value("server", _PORT) or str(_DEFAULT_PORT)
    if not port.isdigit() or int(port) == 0 or host.endswith(".sock"):
        return
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, int(port), type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as listener:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
    except (OSError, OverflowError) as error:
        raise PinferError(
            f"cannot listen on {host}:{port} ({getattr(error, 'strerror', None) or error})",
            f"choose another port: --port {int(port) + 1 if int(port) < 65535 else _DEFAULT_PORT}",
        ) from error


def describe(execution: Execution) -> str:
    """What of the model is sparse, and on which devices."""
    if execution.plugin is None:
        return f"serving {execution.model.path.name}: dense, by stock llama.cpp"
    if execution.model.places_experts:
        return f"serving {execution.model.path.name}: its most used experts on {execution.plugin.device or 'the GPU'}"
    neurons = "neurons" if execution.mode == "exact" else "predicted neurons"
    hot = f", the hot ones on {execution.plugin.device or 'the GPU'}" if execution.plugin.hot else ""
    return f"serving {execution.model.path.name}: {execution.plugin.activation} FFN by its active {neurons}{hot}"


def router_command(own_words: list[str], flags: LlamaFlags) -> tuple[list[str], dict[str, str]]:
    """The command line of a server that starts its models by itself, and its environment.

    For every model it runs ``pinfer serve`` again with ``own_words``, so each is configured as if it were served alone.
    """
    again = [sys.executable, "-m", "pinfer", "serve", *own_words]
    return [str(runner_path()), "server", *flags.words()], {"PINFER_ROUTER_COMMAND": "\n".join(again)}
