"""A local mock of the Hugging Face hub: lists repositories, serves files, refuses requests, drops connections."""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Hub:
    """What the mock serves, how it behaves, and the requests it got."""

    files: dict[str, bytes] = field(default_factory=dict)
    """by ``user/repo/name``, data sets by ``datasets/user/repo/name``"""
    url: str = ""
    commit: str = COMMIT
    token: str = ""
    """the token a request must carry; empty: none is needed"""
    gated: set[str] = field(default_factory=set)
    """repositories that are listed but whose files are refused"""
    status: int = 0
    """answer everything with this"""
    cut: int = 0
    """drop the connection halfway through this many downloads"""
    ignores_range: bool = False
    """answer a request for the rest of a file with 200 and the whole file"""
    stall: str = ""
    """name of a file of which only the first half is sent until ``go_on`` is set"""
    stalled: threading.Event = field(default_factory=threading.Event)
    go_on: threading.Event = field(default_factory=threading.Event)
    ranges: list[str | None] = field(default_factory=list)
    """Range header of each GET of a file"""
    tokens: set[str | None] = field(default_factory=set)
    """tokens that requests carried"""

    def add(self, repo: str, files: Mapping[str, bytes]) -> None:
        self.files |= {f"{repo}/{name}": data for name, data in files.items()}

    def environment(self, cache: Path, *, offline: bool = False) -> dict[str, str]:
        """Variables to add to ``clean_environment`` for a process that uses this hub.

        huggingface_hub reads them when it is imported.
        """
        return {
            "HF_HOME": str(cache),
            "HF_ENDPOINT": self.url,
            "HF_HUB_OFFLINE": "1" if offline else "0",
            "HF_HUB_ETAG_TIMEOUT": "5",
            "NO_PROXY": "*",
        }


def clean_environment() -> dict[str, str]:
    """This process's environment without the user's own hub settings."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}


@contextmanager
def serve_hub(files: Mapping[str, bytes] | None = None) -> Iterator[Hub]:
    """Runs the server on a free port of this machine."""
    hub = Hub(dict(files or {}))

    class Handler(_Handler):
        state = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        hub.go_on.set()
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: Hub

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        hub = self.state
        path = unquote(urlsplit(self.path).path).strip("/")
        if path.startswith("api/") and not path.startswith("api/models/"):  # requests huggingface_hub makes for itself
            self._refuse(404, "")
            return
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
        hub.tokens.add(token)
        if hub.status:
            self._refuse(hub.status, "")
        elif hub.token and token != hub.token:
            self._refuse(401, "RepoNotFound")
        elif path.startswith("api/models/"):
            self._list(path.removeprefix("api/models/").split("/revision/")[0], with_body=with_body)
        else:
            self._file(path, with_body=with_body)

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        if code:
            self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _list(self, repo: str, *, with_body: bool) -> None:
        names = sorted(name.removeprefix(f"{repo}/") for name in self.state.files if name.startswith(f"{repo}/"))
        if not names:
            self._refuse(404, "RepoNotFound")
            return
        siblings = [{"rfilename": name} for name in names]
        body = json.dumps({"_id": "0", "id": repo, "modelId": repo, "sha": self.state.commit, "siblings": siblings})
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if with_body:
            self.wfile.write(body.encode())

    def _file(self, path: str, *, with_body: bool) -> None:
        hub = self.state
        repo, _, rest = path.partition("/resolve/")
        revision, _, name = rest.partition("/")
        data = hub.files.get(f"{repo}/{name}")
        if revision not in ("main", hub.commit) or data is None:
            known = any(file.startswith(f"{repo}/") for file in hub.files)
            self._refuse(404, "EntryNotFound" if known else "RepoNotFound")
            return
        if repo in hub.gated:
            self._refuse(403, "GatedRepo")
            return
        asked = self.headers.get("Range")
        obeys = asked is not None and not hub.ignores_range
        begin = int(asked.removeprefix("bytes=").split("-")[0]) if asked and obeys else 0
        self.send_response(206 if obeys else 200)
        self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", hub.commit)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(data) - begin))
        if obeys:
            self.send_header("Content-Range", f"bytes {begin}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        if with_body:
            hub.ranges.append(asked)
            self._send(name, data, begin)

    def _send(self, name: str, data: bytes, begin: int) -> None:
        hub = self.state
        middle = max(begin, len(data) // 2)
        if hub.cut > 0:
            hub.cut -= 1
            self.wfile.write(data[begin:middle])
            self.close_connection = True
            return
        if hub.stall == name:
            self.wfile.write(data[begin:middle])
            hub.stalled.set()
            hub.go_on.wait(60)
            self.close_connection = True
            return
        self.wfile.write(data[begin:])

    def log_message(self, format: str, *args: object) -> None:
        pass
