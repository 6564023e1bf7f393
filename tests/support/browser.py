"""A page in headless Chromium, driven through the DevTools protocol on a pair of pipes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

_NAMES = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")


def find_browser() -> str | None:
    """The program, if one is installed."""
    return next((path for name in _NAMES if (path := shutil.which(name))), None)


class Page:
    """One tab. Commands and their answers are JSON with a NUL at the end (Chromium's --remote-debugging-pipe)."""

    def __init__(self, into: IO[bytes], out: IO[bytes]) -> None:
        self._into, self._out = into, out
        self._session: str | None = None
        self._n = 0
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]

    def _call(self, method: str, **parameters: object) -> dict[str, Any]:
        self._n += 1
        message = {"id": self._n, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        self._into.write(json.dumps(message).encode() + b"\0")
        self._into.flush()
        while True:
            answer = json.loads(self._read())
            if answer.get("id") == self._n:  # anything else is an event
                assert "error" not in answer, (method, answer["error"])
                result = answer["result"]
                assert isinstance(result, dict)
                return result

    def _read(self) -> bytes:
        data = bytearray()
        while byte := self._out.read(1):
            if byte == b"\0":
                return bytes(data)
            data += byte
        raise AssertionError("Chromium has ended")

    def open(self, url: str) -> None:
        self._call("Page.navigate", url=url)

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        done = self._call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in done, (expression, done["exceptionDetails"])
        return done["result"].get("value")

    def wait_for(self, expression: str, seconds: float = 60) -> Any:
        """The expression's value as soon as it is true."""
        deadline = time.monotonic() + seconds
        while not (value := self.evaluate(expression)):
            assert time.monotonic() < deadline, f"{expression}; the page says: {self.text()}"
            time.sleep(0.05)
        return value

    def text(self) -> str:
        """The text a reader sees."""
        return str(self.evaluate("document.body.innerText"))

    def type(self, text: str) -> None:
        """Typed into the element that has the focus."""
        self._call("Input.insertText", text=text)

    def press_enter(self) -> None:
        for kind in ("keyDown", "keyUp"):
            self._call(
                "Input.dispatchKeyEvent", type=kind, key="Enter", code="Enter", windowsVirtualKeyCode=13, text="\r"
            )


@contextmanager
def browsing(program: str, folder: Path) -> Iterator[Page]:
    """A page of a browser with its profile in ``folder``."""
    switches = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
    switches += ["--remote-debugging-pipe", "--window-size=1280,900", f"--user-data-dir={folder / 'browser'}"]
    their_in, our_out = os.pipe()
    our_in, their_out = os.pipe()
    # Chromium reads commands from descriptor 3 and writes to 4.
    shell = f'exec "$@" 3<&{their_in} 4>&{their_out}'
    with (
        os.fdopen(our_out, "wb") as into,
        os.fdopen(our_in, "rb") as out,
        (folder / "browser.log").open("wb") as log,
        subprocess.Popen(
            ["bash", "-c", shell, "bash", program, *switches],
            pass_fds=(their_in, their_out),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        ) as process,
    ):
        os.close(their_in)
        os.close(their_out)
        try:
            yield Page(into, out)
        finally:
            process.terminate()
