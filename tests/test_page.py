"""The web page of `pinfer serve` in headless Chromium: it loads, takes a message and shows the answer as it arrives.

Skipped without Chromium or in a build without the page. `make test-page` builds the page and runs the test.
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
from pathlib import Path
from typing import NoReturn

import pytest
from support.browser import browsing, find_browser
from support.command_line import MODELS
from support.server import Server, serving

MESSAGE = "Once upon a time"
# Keeps every text the page shows; streaming is over too soon to be seen by asking now and then.
RECORD = """
    window.shown = [];
    new MutationObserver(() => window.shown.push(document.body.innerText))
        .observe(document.body, {subtree: true, childList: true, characterData: true});
"""


def _skip(why: str) -> NoReturn:
    if os.environ.get("PINFER_TEST_PAGE"):
        pytest.fail(why)
    pytest.skip(why)


def _has_page(server: Server) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
    try:
        connection.request("GET", "/", headers={"Accept-Encoding": "gzip"})
        return connection.getresponse().status == 200
    finally:
        connection.close()


def _flat(text: str) -> str:
    """The page shows Markdown, which has its own line breaks."""
    return " ".join(text.split())


def test_a_message_is_sent_and_its_answer_is_streamed(tmp_path: Path) -> None:
    program = find_browser()
    if program is None:
        _skip("needs Chromium: apt-get install chromium")
    model = Path(shutil.copy(MODELS / "tiny-relu2.gguf", tmp_path / "tiny.gguf"))
    with serving(tmp_path, model, "-np", "1", "--temp", "0", "-n", "200") as server:
        if not _has_page(server):
            assert "`make web-ui` adds the page" in server.log.read_text()
            _skip("needs the web page: make web-ui")
        chat = {"messages": [{"role": "user", "content": MESSAGE}]}
        _, wanted = server.request("/v1/chat/completions", chat)
        answer = _flat(wanted["choices"][0]["message"]["content"])
        assert len(answer.split()) > 20
        with browsing(program, tmp_path) as page:
            page.open(f"http://127.0.0.1:{server.port}/")
            page.wait_for("document.querySelector('textarea') !== null")
            page.wait_for("document.body.innerText.includes('tiny')")  # the model's name comes from the server
            page.evaluate("document.querySelector('textarea').focus()")
            page.type(MESSAGE)
            page.evaluate(RECORD)
            page.press_enter()
            page.wait_for(f"document.body.innerText.split(/\\s+/).join(' ').includes({json.dumps(answer)})")
            shown = [_flat(text) for text in page.evaluate("window.shown")]
    lengths = {max(n for n in range(len(answer) + 1) if answer[:n] in text) for text in shown}
    assert sum(len(MESSAGE) < n < len(answer) for n in lengths) >= 3, "the answer came in one piece"
