"""A gate in front of an RPC server: it forwards everything, and simulates what a server on loopback does not do.

It is a GPU of ``memory`` bytes: it keeps account of the buffers that lie there, tells the client of the rest as a GPU
would, and refuses what does not fit. And it can break off the connection in the middle of something.
"""

from __future__ import annotations

import socket
import struct
import threading
from collections import deque
from contextlib import suppress
from types import TracebackType
from typing import Self

_ALLOC, _FREE, _MEMORY = 0, 4, 11
_WITH_ANSWER = frozenset((_ALLOC, 1, 2, 3, 7, 8, 9, _MEMORY, 13, 14, 15))
"""Commands of ggml's RPC protocol, version 7, that the server answers. It does not answer the others."""


class RpcGate:
    """Listens on ``endpoint``. Use it as a context manager; connections end with it."""

    def __init__(self, server: str, memory: int = 1 << 30, cut_after: int | None = None) -> None:
        """``cut_after``: the connection is cut once the client has sent this many bytes."""
        self._server = server
        self._memory = memory
        self._cut_after = cut_after
        self._buffers: dict[int, int] = {}
        self.peak = 0
        """The largest number of bytes on the device at any time."""
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def used(self) -> int:
        return sum(self._buffers.values())

    def _accept(self) -> None:
        with suppress(OSError):  # closed: the test is over
            while True:
                client, _ = self._listener.accept()
                self._serve(client)

    def _serve(self, client: socket.socket) -> None:
        """Serves one client at a time, as the server does. A client's buffers are freed when it disconnects."""
        host, _, port = self._server.partition(":")
        server = socket.create_connection((host, int(port)))
        for end in (client, server):
            end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        commands: deque[tuple[int, bytes]] = deque()
        back = threading.Thread(target=self._answer, args=(server, client, commands), daemon=True)
        back.start()
        with suppress(OSError, EOFError):
            self._ask(client, server, commands)
        for end in (client, server):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        back.join()
        client.close()
        server.close()
        self._buffers.clear()

    def _ask(self, client: socket.socket, server: socket.socket, commands: deque[tuple[int, bytes]]) -> None:
        n_sent = 0
        while True:
            head = _receive(client, 9)
            command, size = struct.unpack("<BQ", head)
            body = _receive(client, size)
            n_sent += len(head) + size
            if self._cut_after is not None and n_sent > self._cut_after:
                return
            if command in _WITH_ANSWER:
                commands.append((command, body))
            elif command == _FREE:
                self._buffers.pop(struct.unpack("<Q", body)[0], None)
            server.sendall(head + body)

    def _answer(self, server: socket.socket, client: socket.socket, commands: deque[tuple[int, bytes]]) -> None:
        with suppress(OSError, EOFError):
            while True:
                head = _receive(server, 8)
                body = _receive(server, struct.unpack("<Q", head)[0])
                command, request = commands.popleft()
                if command == _ALLOC:
                    body = self._allocate(*struct.unpack("<IQ", request), *struct.unpack("<QQ", body))
                elif command == _MEMORY:
                    body = struct.pack("<QQ", self._memory - self.used, self._memory)
                client.sendall(head + body)
        with suppress(OSError):
            client.shutdown(socket.SHUT_RDWR)

    def _allocate(self, _device: int, _wanted: int, pointer: int, size: int) -> bytes:
        if self.used + size > self._memory:
            return struct.pack("<QQ", 0, 0)  # the server keeps the buffer until the client disconnects
        self._buffers[pointer] = size
        self.peak = max(self.peak, self.used)
        return struct.pack("<QQ", pointer, size)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


def _receive(source: socket.socket, size: int) -> bytes:
    pieces = []
    while size:
        piece = source.recv(min(size, 1 << 20))
        if not piece:
            raise EOFError
        pieces.append(piece)
        size -= len(piece)
    return b"".join(pieces)
