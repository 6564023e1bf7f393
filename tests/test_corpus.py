"""Texts to profile and measure on: files of all kinds, standard input, and a local mock of the hub."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import lzma
import os
import subprocess
import sys
import time
import tracemalloc
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.hub_server import Hub, clean_environment, serve_hub

from pinfer.errors import PinferError
from pinfer.hub import corpus
from pinfer.hub.corpus import DOCUMENT_END, open_corpus

TEXT = f"First document.\nIts second line.\n{DOCUMENT_END}\nSecond: ä ö ü.\n{DOCUMENT_END}\n\n{DOCUMENT_END}\nThird\n"
DOCUMENTS = ["First document.\nIts second line.", "Second: ä ö ü.", "Third"]


def _read(name: str | Path) -> list[str]:
    return list(open_corpus(str(name)).documents())


@pytest.mark.parametrize("suffix", [".txt", ".gz", ".xz", ".raw"])
def test_plain_text_in_every_container(tmp_path: Path, suffix: str) -> None:
    data = TEXT.encode()
    packed = {".gz": gzip.compress(data), ".xz": lzma.compress(data)}
    path = tmp_path / f"text{suffix}"
    path.write_bytes(packed.get(suffix, data))
    source = open_corpus(str(path))
    assert list(source.documents()) == DOCUMENTS
    assert source.name == path.name
    assert source.sha256 == hashlib.sha256(b"".join(d.encode() + b"\0" for d in DOCUMENTS)).hexdigest()


def test_hash_covers_what_was_read_and_no_more(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text(TEXT)
    source = open_corpus(str(path))
    assert next(source.documents()) == DOCUMENTS[0]
    assert source.sha256 == hashlib.sha256(DOCUMENTS[0].encode() + b"\0").hexdigest()


def test_byte_order_mark_and_windows_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbf" + TEXT.replace("\n", "\r\n").encode())
    assert _read(path) == DOCUMENTS


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.xz"])
def test_json_lines(tmp_path: Path, suffix: str) -> None:
    chat = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hello."}]
    lines = [json.dumps(r) for r in ({"text": "one\ntwo", "url": "u"}, {"messages": chat}, {"text": " "})]
    data = ("\n\n".join(lines) + "\n").encode()
    path = tmp_path / f"a{suffix}"
    path.write_bytes(lzma.compress(data) if suffix.endswith("xz") else data)
    assert _read(path) == ["one\ntwo", "Hi?\n\nHello."]


@pytest.mark.parametrize("line", ["{", "[]", '"text"', "{}", '{"text": 3}', '{"messages": [{"role": "user"}]}'])
def test_json_lines_of_another_kind_name_the_line(tmp_path: Path, line: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\n' + line + "\n")
    with pytest.raises(PinferError, match=r"a\.jsonl line 2 "):
        _read(path)


def test_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(TEXT.encode())))
    source = open_corpus("-")
    assert list(source.documents()) == DOCUMENTS
    assert source.name == "stdin"


@given(text=st.text(st.characters(codec="utf-8", exclude_characters="\0\r\ufeff"), max_size=300))
def test_no_character_is_lost(text: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_bytes(text.encode())
    documents = _read(path)
    kept = [piece for piece in text.split("\n") if piece != DOCUMENT_END]
    assert "".join(documents).replace("\n", "").split() == "".join(kept).split()


def test_text_without_separators_is_cut_at_an_empty_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "_MAX_DOCUMENT_CHARS", 100)
    path = tmp_path / "a.txt"
    path.write_text("\n".join(["word " * 5, ""] * 40))
    documents = _read(path)
    assert len(documents) > 5
    assert all(len(d) <= 200 for d in documents)
    assert sum(d.count("word") for d in documents) == 200


def test_a_text_without_newlines_streams_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "_MAX_DOCUMENT_CHARS", 100_000)
    path = tmp_path / "a.txt"
    text = "word é " * 200_000
    path.write_text("title\n" + text, encoding="utf-8")
    documents = _read(path)
    assert documents[0].startswith("title\nword")
    assert "".join(documents).removeprefix("title\n") == text
    assert max(map(len, documents)) < 200_000 + (1 << 16) + 10


def test_a_long_line_takes_linear_time_and_little_memory(tmp_path: Path) -> None:
    """64 MiB without a newline: was quadratic, and held whole."""
    path = tmp_path / "a.txt"
    with path.open("wb") as file:
        for _ in range(64):
            file.write(b"some words " * 95_325 + b" ")
    tracemalloc.start()
    begin = time.monotonic()
    n = sum(len(document) for document in open_corpus(str(path)).documents())
    seconds = time.monotonic() - begin
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert n == path.stat().st_size
    assert peak < 16 << 20, peak
    assert seconds < 20, seconds


def test_a_json_line_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "_MAX_JSON_CHARS", 100_000)
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "' + "x" * 300_000 + '"}')
    with pytest.raises(PinferError, match="one JSON object a line"):
        _read(path)
    path.write_text("[" * 90_000)
    with pytest.raises(PinferError, match=r"a\.jsonl line 1 "):
        _read(path)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("a.txt", b"caf\xe9 au lait", "not UTF-8 text"),
        ("a.txt", b"GGUF\x03\0\0\0\x07", "not a text file"),
        ("a.gz", b"not gzip at all", "cannot read"),
        ("a.gz", gzip.compress(os.urandom(1000).hex().encode())[:600], "cannot read"),
        ("a.xz", lzma.compress(os.urandom(1000).hex().encode())[:600], "cannot read"),
        ("a.xz", b"not xz at all", "cannot read"),
    ],
)
def test_binary_and_damaged_files_give_one_line(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(PinferError, match=message) as caught:
        _read(tmp_path / name)
    assert "\n" not in str(caught.value)
    assert caught.value.hint


def test_unknown_name_lists_what_there_is() -> None:
    with pytest.raises(PinferError, match=r"unknown data set 'c5'.*c4, wikitext, the path of a text file, or -"):
        open_corpus("c5")


def test_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PinferError, match="is a folder"):
        open_corpus(str(tmp_path))


# -- the hub ----------------------------------------------------------------------------------------------------------

C4 = ["A web page.\nWith two lines.", "Another one."]
ARTICLES = (
    " \n = Robert Boulter = \n \n Robert is an actor . \n \n = = Career = = \n \n He acted . \n = Du Fu = \n Poet . \n"
)


def _c4_shard() -> bytes:
    lines = [json.dumps({"text": text, "timestamp": "2019-04-25T12:57:54Z", "url": "u"}) for text in C4]
    return gzip.compress("\n".join(lines).encode())


def _wikitext_zip() -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("wikitext-2-raw/wiki.test.raw", " = Held out = \n never read \n")
        archive.writestr("wikitext-2-raw/wiki.train.raw", ARTICLES)
        # huggingface_hub writes, and can resume, whole pieces of 10 MiB.
        archive.writestr("wikitext-2-raw/padding", bytes(24 << 20), zipfile.ZIP_STORED)
    return out.getvalue()


@pytest.fixture
def hub() -> Iterator[Hub]:
    """A local server that has the two data sets."""
    files = {
        "datasets/allenai/c4/en/c4-validation.00000-of-00008.json.gz": _c4_shard(),
        "datasets/ggml-org/ci/wikitext-2-raw-v1.zip": _wikitext_zip(),
    }
    with serve_hub(files) as state:
        yield state


_SCRIPT = """
import json, sys
from pinfer.hub.corpus import open_corpus
from pinfer.errors import PinferError
try:
    print(json.dumps(list(open_corpus(sys.argv[1]).documents())))
except PinferError as error:
    sys.exit(f"refused: {error}")
"""


def _fetch(dataset: str, cache: Path, hub: Hub, *, offline: bool = False) -> subprocess.CompletedProcess[str]:
    """Reads a data set in a separate process, because huggingface_hub reads its settings on import."""
    environment = clean_environment() | hub.environment(cache, offline=offline)
    environment["PYTHONPATH"] = str(Path(__file__).resolve().parent.parent)
    return subprocess.run(
        [sys.executable, "-c", _SCRIPT, dataset], env=environment, capture_output=True, text=True, timeout=120
    )


def test_c4_comes_from_the_hub_and_then_from_the_cache(hub: Hub, tmp_path: Path) -> None:
    first = _fetch("c4", tmp_path / "hf", hub)
    assert first.returncode == 0, first.stderr
    assert json.loads(first.stdout) == C4
    again = _fetch("c4", tmp_path / "hf", hub, offline=True)
    assert json.loads(again.stdout) == C4
    assert len(hub.ranges) == 1


def test_wikitext_is_the_train_split_by_article_and_resumes(hub: Hub, tmp_path: Path) -> None:
    hub.cut = 1
    result = _fetch("wikitext", tmp_path / "hf", hub)
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout) == [
        "= Robert Boulter =\nRobert is an actor .\n= = Career = =\nHe acted .",
        "= Du Fu =\nPoet .",
    ]
    assert any(asked and not asked.startswith("bytes=0-") for asked in hub.ranges), "it started over"


@pytest.mark.parametrize("offline", [True, False])
def test_without_a_hub_the_error_says_how_to_pass_a_file(tmp_path: Path, offline: bool) -> None:
    result = _fetch("wikitext", tmp_path / "hf", Hub(url="http://127.0.0.1:9"), offline=offline)
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("refused: cannot download the data set wikitext from http://127.0.0.1:9 ")
    assert "--dataset FILE" in last


def test_file_missing_on_the_hub(hub: Hub, tmp_path: Path) -> None:
    hub.files.clear()
    result = _fetch("c4", tmp_path / "hf", hub)
    assert result.returncode == 1
    assert "refused: cannot download the data set c4" in result.stderr
