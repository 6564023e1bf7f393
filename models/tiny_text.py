"""Text for the tiny models: reading documents, restoring capitals, tokenising, and drawing windows.

Texts are UTF-8 files (plain or ``.xz``) of documents, each followed by a line that is exactly ``<|endoftext|>``.
"""

from __future__ import annotations

import hashlib
import lzma
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SEPARATOR = "<|endoftext|>"
END_OF_TEXT = 0  # token id of the separator: BOS and EOS of the model

_WORD = re.compile(r"[A-Za-z]+(?:'[a-z]+)?")
_SPEECH = frozenset(
    (
        "said",
        "asked",
        "replied",
        "shouted",
        "cried",
        "yelled",
        "exclaimed",
        "answered",
        "called",
        "thought",
        "whispered",
    )
)


@dataclass(frozen=True)
class Source:
    """A text file and its share of the training tokens (shares need not add up to one)."""

    path: Path
    weight: float

    @staticmethod
    def parse(text: str) -> Source:
        """``FILE`` or ``FILE:WEIGHT``."""
        name, _, weight = text.rpartition(":")
        if name and re.fullmatch(r"[0-9.]+", weight):
            return Source(Path(name), float(weight))
        return Source(Path(text), 1.0)


def read_documents(path: Path) -> list[str]:
    """The documents of a text file without their separators. A file without separators is one document."""
    if path.suffix == ".xz":
        with lzma.open(path, "rt", encoding="utf-8") as handle:
            text = handle.read()
    else:
        text = path.read_text(encoding="utf-8")
    return [doc.strip("\n") for doc in text.split(SEPARATOR) if doc.strip()]


def is_held_out(document: str, share: float) -> bool:
    """True for a fixed pseudo-random ``share`` of documents.

    Only the letters at the beginning count, so that copies of a document in other case or layout fall on the same side.
    """
    letters = re.sub(r"[^a-z]", "", document[:400].lower())[:80]
    digest = hashlib.sha256(letters.encode()).digest()
    return int.from_bytes(digest[:4], "big") < share * 2**32


def is_lower_case(documents: list[str]) -> bool:
    """Whether a text has lost its capitals: its first documents have hardly any."""
    sample = "".join(documents[:200])
    return sum(c.isupper() for c in sample) < 0.001 * max(1, len(sample))


def learn_names(documents: Iterable[str]) -> frozenset[str]:
    """Words that a text capitalises inside sentences too (names, "I", "Mom")."""
    capital: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for document in documents:
        for match in re.finditer(r"(?<=[a-z,] )[A-Za-z]+", document):
            word = match.group()
            total[word.lower()] += 1
            capital[word.lower()] += word[0].isupper() and (len(word) == 1 or not word.isupper())
    return frozenset(word for word, n in total.items() if n >= 2 and capital[word] > 0.7 * n) | {"i"}


def restore_case(document: str, names: frozenset[str]) -> str:
    """Capitalises a lower-case story: beginnings of sentences and speech, known names, and X in "named X"."""
    local = names | {m.group(1) for m in re.finditer(r"\b(?:named|called|name is|name was) ([a-z]+)[ ,.!]", document)}
    local -= {"the", "a", "an", "it", "him", "her", "his", "out", "to", "for", "and", "them", "my", "their", "this"}
    lines = []
    for line in document.split("\n"):
        lines.append(_restore_line(line, local))
    return "\n".join(lines)


def _restore_line(line: str, names: frozenset[str]) -> str:
    out: list[str] = []
    position = 0
    in_quote = False
    words = list(_WORD.finditer(line))
    for n, match in enumerate(words):
        between = line[position : match.start()]
        opened = False
        for c in between:
            if c == '"':
                in_quote = not in_quote
                opened = in_quote
        word = match.group()
        stem = word.split("'")[0]
        first = position == 0 or opened or re.search(r"[.!?]['\")]*\s+$", between) is not None
        if first and not opened and '"' in between and position > 0:
            # In `"...?" she asked` the sentence continues, in `"...!" They ran` it does not.
            following = [w.group() for w in words[n : n + 4]]
            first = not any(w in _SPEECH for w in following)
        if first or stem in names:
            word = word[0].upper() + word[1:]
        out += [between, word]
        position = match.end()
    out.append(line[position:])
    return "".join(out)


def load_sources(sources: list[Source], held_out: float) -> list[tuple[Source, list[str]]]:
    """The training documents of every source: without held-out ones, and with capitals restored."""
    texts = [(s, [d for d in read_documents(s.path) if not is_held_out(d, held_out)]) for s in sources]
    return restore_texts(texts)


def restore_texts(texts: list[tuple[Source, list[str]]]) -> list[tuple[Source, list[str]]]:
    """Restores capitals in lower-case texts, with names taken from the other texts."""
    lower = [is_lower_case(documents) for _, documents in texts]
    if not any(lower):
        return texts
    # Short texts first, long ones cut: names from stories matter more than those from an encyclopaedia.
    cased = [d for (_, docs), low in zip(texts, lower, strict=True) if not low for d in docs[:2000]]
    names = learn_names(d[:20000] for d in cased)
    return [
        (s, [restore_case(d, names) for d in docs] if low else docs)
        for (s, docs), low in zip(texts, lower, strict=True)
    ]


def train_tokenizer(
    texts: list[tuple[Source, list[str]]], n_vocab: int, seed: int, n_chars: int = 12_000_000
) -> Tokenizer:
    """Trains byte-level BPE with GPT-2's pre-tokenisation on ``n_chars`` drawn by the sources' weights."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=n_vocab,
        special_tokens=[SEPARATOR],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_tokenizer_sample(texts, n_chars, seed), trainer)
    return tokenizer


def _tokenizer_sample(texts: list[tuple[Source, list[str]]], n_chars: int, seed: int) -> Iterator[str]:
    rng = np.random.default_rng(seed)
    total = sum(source.weight for source, _ in texts)
    for source, documents in texts:
        left = n_chars * source.weight / total
        for n in rng.permutation(len(documents)):
            if left <= 0:
                break
            yield documents[n][: int(left) + 1]
            left -= len(documents[n])


@dataclass(frozen=True)
class TokenStream:
    """One source as tokens: its documents in order, each preceded by END_OF_TEXT."""

    weight: float
    tokens: NDArray[np.uint16]  # [n]
    starts: NDArray[np.int64]  # [n_documents] position of the END_OF_TEXT before each document


def encode_documents(tokenizer: Tokenizer, documents: list[str]) -> tuple[NDArray[np.uint16], NDArray[np.int64]]:
    """Tokens and document starts of a list of documents."""
    pieces: list[NDArray[np.uint16]] = []
    starts, position = [], 0
    for low in range(0, len(documents), 500):
        encodings: list[Any] = tokenizer.encode_batch(documents[low : low + 500])
        for encoding in encodings:
            piece = np.empty(len(encoding.ids) + 1, np.uint16)
            piece[0] = END_OF_TEXT
            piece[1:] = encoding.ids
            starts.append(position)
            pieces.append(piece)
            position += len(piece)
    return np.concatenate(pieces), np.asarray(starts, np.int64)


class WindowSampler:
    """Draws training windows; its whole state is a numpy random generator, so training can be resumed exactly.

    A window is END_OF_TEXT followed by text, from a document's beginning half of the time and from anywhere otherwise:
    at run time llama.cpp, too, puts that token before whatever it is given.
    """

    def __init__(self, streams: list[TokenStream], n_ctx: int, seed: int) -> None:
        self._streams = streams
        self._n_ctx = n_ctx
        self._shares = np.array([s.weight for s in streams]) / sum(s.weight for s in streams)
        self.rng = np.random.default_rng(seed)

    def draw(self, n_batch: int) -> NDArray[np.int64]:
        """[n_batch, n_ctx + 1] tokens; inputs are all but the last column, targets all but the first."""
        rows = np.empty((n_batch, self._n_ctx + 1), np.int64)
        for row in rows:
            stream = self._streams[self.rng.choice(len(self._streams), p=self._shares)]
            limit = len(stream.tokens) - self._n_ctx - 1
            if self.rng.random() < 0.5:
                start = int(stream.starts[self.rng.integers(len(stream.starts))]) + 1
            else:
                start = int(self.rng.integers(1, max(2, limit)))
            start = max(1, min(start, limit))
            piece = stream.tokens[start : start + self._n_ctx]
            row[:] = END_OF_TEXT
            row[1 : 1 + len(piece)] = piece
        return rows
