"""Text for profiling and measuring: a named data set of the Hugging Face hub, a file, or standard input."""

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
"""A line that is exactly this ends a document; every document is a sequence of its own."""

# Documents are cut here when a text has no separators, so that a book of any size streams through a fixed amount of
# memory. A cut costs one lost context in this many characters.
_MAX_DOCUMENT_CHARS = 1 << 20

_ARTICLE_TITLE = re.compile(r"^ = [^=].* = $")


@dataclass(frozen=True)
class HubSource:
    """Where a named data set lies on the hub, and how to read its lines."""

    repo: str
    filename: str
    member: str | None = None  # inside a zip archive
    description: str = ""


# Both are text in containers that the standard library opens, so no data-set library and no parquet reader is needed.
# WikiText's train split is used, never its test split, which stays good for measuring perplexity.
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
    """Documents read one after another, and the hash of what was read so far."""

    name: str
    _lines: Iterator[str]
    _split: Callable[[Iterator[str]], Iterator[str]]
    _digest: hashlib._Hash = field(default_factory=hashlib.sha256)

    def documents(self) -> Iterator[str]:
        """Yield each document that holds more than white space. The text is read only as far as it is asked for."""
        for document in self._split(self._lines):
            if document.strip():
                self._digest.update(document.encode("utf-8"))
                self._digest.update(b"\0")
                yield document

    @property
    def sha256(self) -> str:
        """Hash of the documents that were yielded, each followed by a zero byte."""
        return self._digest.hexdigest()


def open_corpus(dataset: str, progress: Progress = NULL_PROGRESS) -> Corpus:
    """Open ``c4``, ``wikitext``, a text file (plain, ``.gz``, ``.xz``, ``.jsonl``) or ``-`` for standard input.

    Raises PinferError when the name is unknown, the file cannot be read, or the hub cannot be reached and its cache
    does not hold the data set.
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
    lines = _file_lines(path)
    return Corpus(name, lines, _split_json(path) if is_json else _split_text)


def _file_lines(path: Path) -> Iterator[str]:
    try:
        with _open_bytes(path) as stream:
            yield from _text_lines(stream, str(path))
    except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
        raise PinferError(f"cannot read {path}: {error}", "check the file, or use another text") from error


def _open_bytes(path: Path) -> IO[bytes] | gzip.GzipFile | lzma.LZMAFile:
    if path.suffix == ".gz":
        return gzip.open(path, "rb")
    if path.suffix == ".xz":
        return lzma.open(path, "rb")
    return path.open("rb")


def _text_lines(stream: IO[bytes] | gzip.GzipFile | lzma.LZMAFile, name: str) -> Iterator[str]:
    """Lines of UTF-8 text with their ends normalised to LF; binary data is refused rather than counted as text."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    pending = ""
    while True:
        chunk = stream.read(1 << 16)
        try:
            pending += decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            raise PinferError(
                f"{name} is not UTF-8 text ({error.reason})", "convert it with iconv, or use another text"
            ) from None
        if "\0" in pending:
            raise PinferError(f"{name} is not a text file: it holds zero bytes", "use a text file")
        if not chunk:
            break
        lines = pending.split("\n")
        pending = lines.pop()
        for line in lines:
            yield line.removesuffix("\r")
    if pending:
        yield pending.removesuffix("\r")


def _split_text(lines: Iterator[str]) -> Iterator[str]:
    """Documents of plain text: separated by DOCUMENT_END lines, or cut at an empty line when they grow too long."""
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
    """Articles of WikiText: each begins with its title between single equals signs."""
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
    """One JSON object a line, with ``text`` or with ``messages`` (``[{"role", "content"}, ...]``)."""

    def split(lines: Iterator[str]) -> Iterator[str]:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                yield _json_text(json.loads(line))
            except (ValueError, KeyError, TypeError) as error:
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
    except Exception as error:  # whatever the HTTP client of the hub's library raises, the user's way out is the same
        if (path := cached_files(source.repo, "dataset").get(source.filename)) is not None:
            return path
        cause = " ".join(str(error).split()) or type(error).__name__
        raise PinferError(
            f"cannot get the data set {name} from {endpoint()} ({_shorten(cause)})",
            "connect to the network and try again, or pass a text file: --dataset FILE",
        ) from error


def _shorten(text: str, limit: int = 160) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"
