"""`pinfer serve`, or stock llama-server, as a process of its own, and requests to it."""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
N_PREDICT = 32
"""Tokens of an answer, unless a request says otherwise."""
PINFER = (sys.executable, "-m", "pinfer", "serve")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        assert isinstance(port, int)
        return port


class Server:
    """A started server, and requests to it."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, log: Path) -> None:
        self.process, self.port, self.log = process, port, log

    def request(
        self, path: str, body: object = None, timeout: float = 120, raw: bytes | None = None
    ) -> tuple[int, Any]:
        """Status and JSON of the answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            data = raw if raw is not None else None if body is None else json.dumps(body).encode()
            connection.request("GET" if data is None else "POST", path, data, {"Content-Type": "application/json"})
            answer = connection.getresponse()
            text = answer.read()
            return answer.status, json.loads(text) if text[:1] in (b"{", b"[") else text
        finally:
            connection.close()

    def complete(self, prompt: str, **settings: object) -> str:
        body = {"prompt": prompt, "n_predict": N_PREDICT, "temperature": 0, **settings}
        status, answer = self.request("/completion", body)
        assert status == 200, answer
        text = answer["content"]
        assert isinstance(text, str)
        return text

    def stream(self, prompt: str, **settings: object) -> http.client.HTTPResponse:
        """An answer that arrives as it is written; the caller reads and closes it."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        body = {"prompt": prompt, "n_predict": N_PREDICT, "temperature": 0, "stream": True, **settings}
        connection.request("POST", "/completion", json.dumps(body).encode(), {"Content-Type": "application/json"})
        return connection.getresponse()

    def memory(self) -> int:
        """Bytes of the process that lie in memory and belong to no file."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        (line,) = [line for line in status.splitlines() if line.startswith("RssAnon:")]
        return int(line.split()[1]) * 1024


@contextmanager
def serving(
    folder: Path,
    *words: str | Path,
    env: dict[str, str] | None = None,
    program: Sequence[str | Path] = PINFER,
    seconds: float = 120,
    without: Sequence[str] = (),
) -> Iterator[Server]:
    """A server that is ready. ``seconds``: how long it may take to load its model; ``without``: variables it must not
    inherit."""
    port = free_port()
    log = folder / f"log-{port}"
    command = [*map(str, (*program, *words)), "--port", str(port)]
    inherited = {name: value for name, value in os.environ.items() if name not in without}
    environment = {**inherited, "PYTHONPATH": str(ROOT), "PINFER_HOME": str(folder / "home"), **(env or {})}
    with (
        log.open("wb") as out,
        subprocess.Popen(command, stdout=out, stderr=out, env=environment) as process,
    ):
        server = Server(process, port, log)
        try:
            deadline = time.monotonic() + seconds
            while True:
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                try:
                    if server.request("/health")[0] == 200:
                        break
                except OSError:
                    pass
                time.sleep(0.1)
            yield server
        finally:
            process.kill()
