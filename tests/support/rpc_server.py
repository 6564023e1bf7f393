"""An RPC server of ggml on loopback, with this machine's CPU as its device: ``with RpcServer() as server: ...``.

It is the library's own server in a child process, on a port that was free. However the test ends, so does the child: it
is killed when the block is left, and the kernel kills it should the tests' process itself be killed.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Self

ROOT = Path(__file__).resolve().parents[2]
_PR_SET_PDEATHSIG = 1


class RpcServer:
    """A server process that computes with ``n_threads`` threads."""

    def __init__(self, n_threads: int = 1) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.endpoint = f"127.0.0.1:{free.getsockname()[1]}"
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        self._process = subprocess.Popen(
            [sys.executable, __file__, self.endpoint, str(n_threads), str(os.getpid())],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
        )

    def wait_until_it_listens(self, seconds: float = 60) -> None:
        """Reads the kernel's table of sockets, because the server would take a connection for its client."""
        port = int(self.endpoint.rpartition(":")[2])
        listening = f":{port:04X} 00000000:0000 0A"
        deadline = time.monotonic() + seconds
        while listening not in Path("/proc/net/tcp").read_text():
            assert self._process.poll() is None, self._output()
            assert time.monotonic() < deadline, "the RPC server does not start"
            time.sleep(0.02)

    def kill(self) -> None:
        """kill -9, as if its machine had failed; safe to call twice."""
        self._process.kill()
        self._process.wait()

    def pause(self) -> None:
        """The server stays alive but no longer answers."""
        self._process.send_signal(signal.SIGSTOP)

    def _output(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.read().decode("utf-8", "replace")

    def __enter__(self) -> Self:
        try:
            self.wait_until_it_listens()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.kill()
        assert self._process.stdout is not None
        self._process.stdout.close()


def has_rpc() -> bool:
    """Whether the libggml under test has an RPC server."""
    return _start_server() is not None


def _start_server() -> int | None:
    from pinfer.llama.ggml import load_library

    base, registry = load_library("ggml-base"), load_library("ggml")
    registry.ggml_backend_reg_by_name.restype = ctypes.c_void_p
    registry.ggml_backend_reg_by_name.argtypes = (ctypes.c_char_p,)
    base.ggml_backend_reg_get_proc_address.restype = ctypes.c_void_p
    base.ggml_backend_reg_get_proc_address.argtypes = (ctypes.c_void_p, ctypes.c_char_p)
    rpc = registry.ggml_backend_reg_by_name(b"RPC")
    found: int | None = base.ggml_backend_reg_get_proc_address(rpc, b"ggml_backend_rpc_start_server") if rpc else None
    return found


def _serve(endpoint: str, n_threads: int, parent: int) -> None:
    from pinfer.llama.ggml import load_library

    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return
    address = _start_server()
    assert address is not None, "this libggml is built without RPC"
    registry = load_library("ggml")
    registry.ggml_backend_dev_by_name.restype = ctypes.c_void_p
    registry.ggml_backend_dev_by_name.argtypes = (ctypes.c_char_p,)
    devices = (ctypes.c_void_p * 1)(registry.ggml_backend_dev_by_name(b"CPU"))
    size = ctypes.c_size_t
    serve = ctypes.CFUNCTYPE(None, ctypes.c_char_p, ctypes.c_char_p, size, size, ctypes.POINTER(ctypes.c_void_p))
    serve(address)(endpoint.encode(), None, n_threads, 1, devices)


if __name__ == "__main__":
    _serve(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
