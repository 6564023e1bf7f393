"""Text for profiling and measuring: a named data set on the Hugging Face hub, a file, or standard input."""

from __future__ import annotations

import codecs
import gzip
import hashlib
import json
import lzma
import re
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from pinfer.errors import PinferError
from pinfer.progress import NULL_PROGRESS, Progress

DOCUMENT_END = "<|endoftext|>"
"""A line that is exactly this ends a document. Each document is a sequence of its own."""

# A text without separators is cut at an empty line after this many characters, or anywhere after twice as many, so that
# any text streams through a fixed amount of memory. A cut loses the context of the text before it.
_MAX_DOCUMENT_CHARS = 1 << 20

_MAX_JSON_CHARS = 1 << 26
"""in one line of JSON, which cannot be cut"""

_ARTICLE_TITLE = re.compile(r"^ = [^=].* = $")


@dataclass(frozen=True)
class HubSource:
    """Where a named data set is on the hub, and how to read it."""

    repo: str
    filename: str
    member: str | None = None  # inside a zip archive
    description: str = ""


# Both are text in containers that the standard library opens; no data-set library or parquet reader is needed.
# Of WikiText only the train split is used. The test split is kept for measuring perplexity.
HUB_SOURCES: dict[str, HubSource] = {
    "c4": HubSource(
        repo="allenai/c4",
        filename="en/c4-validation.00000-of-00008.json.gz",
        description="C4, English, first validation shard",
    ),
    "wikitext": HubSource(
        repo="ggml-org/ci",
        filename="wikitext-2-raw-v1.zip",
        member="wikitext-2-raw/wiki.train.raw",
        description="WikiText-2 raw, train split",
    ),
}


@dataclass
class Corpus:
    """Documents that are read one by one, and the hash of those read so far."""

    name: str
    _lines: Iterator[str]
    _split: Callable[[Iterator[str]], Iterator[str]]
    _digest: hashlib._Hash = field(default_factory=hashlib.sha256)

    def documents(self) -> Iterator[str]:
        """Yields each document that holds more than white space, reading no further than asked."""
        for document in self._split(self._lines):
            if document.strip():
                self._digest.update(document.encode("utf-8"))
                self._digest.update(b"\0")
                yield document

    @property
    def sha256(self) -> str:
        """Hash of the documents yielded so far, each followed by a zero byte."""
        return self._digest.hexdigest()


def open_corpus(dataset: str, progress: Progress = NULL_PROGRESS) -> Corpus:
    """Opens ``c4``, ``wikitext``, a text file (plain, ``.gz``, ``.xz``, ``.jsonl``) or ``-`` for standard input.

    Raises PinferError if the name is unknown, or if the data set is neither in the cache nor to be had from the hub.
    A file that cannot be read raises it when the first document is asked for.
    """
    if dataset == "-":
        return Corpus("stdin", _text_lines(sys.stdin.buffer, "standard input"), _split_text)
    if dataset in HUB_SOURCES and not Path(dataset).is_file():
        return _open_hub(dataset, HUB_SOURCES[dataset], progress)
    path = Path(dataset).expanduser()
    if path.is_dir():
        raise PinferError(f"{dataset} is a folder", "name a text file in it")
    if not path.exists():
        raise PinferError(
            f"unknown data set {dataset!r} and no such file",
            f"use {', '.join(sorted(HUB_SOURCES))}, the path of a text file, or - for standard input",
        )
    return _open_file(path, path.name)


def _open_file(path: Path, name: str) -> Corpus:
    is_json = any(suffix in (".jsonl", ".json") for suffix in path.suffixes)
    return Corpus(name, _file_lines(path, is_json), _split_json(path) if is_json else _split_text)


def _file_lines(path: Path, is_json: bool) -> Iterator[str]:
    try:
        with _open_bytes(path) as stream:
            yield from _text_lines(stream, str(path), is_json=is_json)
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise PinferError(f"cannot read {path}: {error}", "check the file, or use another text") from error


def _open_bytes(path: Path) -> IO[bytes] | gzip.GzipFile | lzma.LZMAFile:
    if path.suffix == ".gz":
        return gzip.open(path, "rb")
    if path.suffix == ".xz":
        return lzma.open(path, "rb")
    return path.open("rb")


def _text_lines(
    stream: IO[bytes] | gzip.GzipFile | lzma.LZMAFile, name: str, *, is_json: bool = False
) -> Iterator[str]:
    """Lines of UTF-8 text without their ends, LF or CRLF. Raises PinferError for binary data.

    A line that is longer than any document may be comes in pieces, each of which ends a document.
    """
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    held: list[str] = []
    n_held = 0
    while chunk := stream.read(1 << 16):
        *lines, rest = _decode(decoder, chunk, name).split("\n")
        for line in lines:
            yield "".join((*held, line)).removesuffix("\r")
            held, n_held = [], 0
        held.append(rest)
        n_held += len(rest)
        if is_json and n_held > _MAX_JSON_CHARS:
            raise PinferError(
                f"{name} has a line of more than {_MAX_JSON_CHARS >> 20} million characters",
                "give one JSON object a line, or a plain text file",
            )
        if not is_json and n_held >= 2 * _MAX_DOCUMENT_CHARS:
            yield "".join(held)
            held, n_held = [], 0
    held.append(_decode(decoder, b"", name))
    if last := "".join(held):
        yield last.removesuffix("\r")


def _decode(decoder: codecs.IncrementalDecoder, chunk: bytes, name: str) -> str:
    try:
        text = decoder.decode(chunk, final=not chunk)
    except UnicodeDecodeError as error:
        raise PinferError(
            f"{name} is not UTF-8 text ({error.reason})", "convert it with iconv, or use another text"
        ) from None
    if "\0" in text:
        raise PinferError(f"{name} is not a text file: it contains zero bytes", "use a text file")
    return text


def _split_text(lines: Iterator[str]) -> Iterator[str]:
    """Documents of plain text: separated by DOCUMENT_END lines, or cut where they grow too long."""
    held: list[str] = []
    n_chars = 0
    for line in lines:
        ends = line == DOCUMENT_END
        if not ends:
            held.append(line)
            n_chars += len(line) + 1
        if ends or n_chars >= 2 * _MAX_DOCUMENT_CHARS or (n_chars >= _MAX_DOCUMENT_CHARS and not line.strip()):
            yield "\n".join(held)
            held, n_chars = [], 0
    if held:
        yield "\n".join(held)


def _split_wikitext(lines: Iterator[str]) -> Iterator[str]:
    """Articles of WikiText. Each begins with its title between single equals signs."""
    held: list[str] = []
    for line in lines:
        if _ARTICLE_TITLE.match(line) and held:
            yield "\n".join(held)
            held = []
        if line.strip():
            held.append(line.strip())
    if held:
        yield "\n".join(held)


def _split_json(path: Path) -> Callable[[Iterator[str]], Iterator[str]]:
    """A splitter for one JSON object a line, with ``text`` or ``messages`` (``[{"role", "content"}, ...]``)."""

    def split(lines: Iterator[str]) -> Iterator[str]:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                yield _json_text(json.loads(line))
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise PinferError(
                    f"{path.name} line {number} is not a JSON object with 'text' or 'messages'",
                    "give one object a line, or a plain text file",
                ) from error

    return split


def _json_text(record: object) -> str:
    if not isinstance(record, dict):
        raise TypeError("not an object")
    if "text" in record:
        text = record["text"]
        if not isinstance(text, str):
            raise TypeError("text is not a string")
        return text
    return "\n\n".join(str(message["content"]) for message in record["messages"])


def _open_hub(name: str, source: HubSource, progress: Progress) -> Corpus:
    path = _download(name, source, progress)
    if source.member is not None:
        return Corpus(name, _zip_lines(path, source.member), _split_wikitext)
    return _open_file(path, name)


def _zip_lines(path: Path, member: str) -> Iterator[str]:
    try:
        with zipfile.ZipFile(path) as archive, archive.open(member) as stream:
            yield from _text_lines(stream, member)
    except (OSError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise PinferError(f"cannot read {member} in {path}: {error}", f"remove {path} and try again") from error


def _download(name: str, source: HubSource, progress: Progress) -> Path:
    from pinfer.hub.fetch import cached_files, endpoint, fetch_files

    progress.note(f"data set {name}: {source.description} ({source.repo} on the Hugging Face hub)")
    try:
        return fetch_files(source.repo, [source.filename], f"data set {name}", progress, repo_type="dataset")[0]
    except Exception as error:  # whatever goes wrong, the fix is the same
        if (path := cached_files(source.repo, "dataset").get(source.filename)) is not None:
            return path
        cause = " ".join(str(error).split())[:160] or type(error).__name__
        raise PinferError(
            f"cannot download the data set {name} from {endpoint()} ({cause})",
            "connect to the network and try again, or pass a text file: --dataset FILE",
        ) from error
