"""A checkpoint's own tokenizer, run by the library it was made for: the reference for a converted vocabulary."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, Tokenizer

from pinfer.conversion.hints import DOWNLOAD_AGAIN
from pinfer.errors import PinferError

SPACE = "\u2581"  # what SentencePiece writes for a space


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable characters for the 256 bytes: a printable byte stands for itself."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


BYTES = _byte_alphabet()


@dataclass(frozen=True)
class Added:
    """A token added to the trained vocabulary. It is found in a text before any other."""

    id: int
    text: str
    special: bool
    """a control token, not text"""
    plain: bool = True
    """it matches anywhere and takes no white space with it; llama.cpp supports no other kind"""


class JsonTokenizer:
    """A ``tokenizer.json``, or ``vocab.json`` with ``merges.txt``, run by the tokenizers library."""

    library = "tokenizers"

    def __init__(self, path: Path, text: str) -> None:
        """``text`` is the content of ``path`` as JSON. Raises PinferError if the library refuses it."""
        try:
            self.tokenizer: Any = Tokenizer.from_str(text)
        except Exception as error:  # the library raises nothing narrower
            raise PinferError(f"{path} is damaged: {error}", DOWNLOAD_AGAIN) from None
        self._path, self._text = path, text
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        self._normalizer: Any = self.tokenizer.normalizer
        self._dropped: frozenset[int] = frozenset()

    def is_byte_level(self, vocab: Mapping[str, int]) -> None:
        """Declares ``vocab`` byte-level. Bytes it lacks are dropped: here before merging, in libllama after it."""
        self._dropped = frozenset(byte for text, byte in BYTES.items() if text not in vocab)

    def with_merges(self, tokens: Sequence[str], merges: Sequence[tuple[str, ...]]) -> JsonTokenizer:
        """The same tokenizer with another vocabulary, and nothing added to it."""
        data = json.loads(self._text)
        data["added_tokens"], data["post_processor"] = [], None
        data["model"] |= {"vocab": {text: id_ for id_, text in enumerate(tokens)}, "merges": merges, "unk_token": None}
        return JsonTokenizer(self._path, json.dumps(data))

    def add(self, tokens: Iterable[Added]) -> None:
        """Adds tokens from another file of the checkpoint."""
        for token in tokens:
            if self.tokenizer.token_to_id(token.text) in (None, token.id):
                made = AddedToken(token.text, special=token.special, normalized=False)
                (self.tokenizer.add_special_tokens if token.special else self.tokenizer.add_tokens)([made])

    def added(self) -> list[Added]:
        """The added tokens, by id."""
        found: Mapping[int, Any] = self.tokenizer.get_added_tokens_decoder()
        return [
            Added(id_, t.content, t.special, not (t.lstrip or t.rstrip or t.single_word))
            for id_, t in sorted(found.items())
        ]

    def encode(self, texts: Sequence[str], *, parse_special: bool) -> list[list[int]]:
        """Ids of each text without BOS and EOS; with ``parse_special``, control tokens in it are read as such."""
        self.tokenizer.encode_special_tokens = not parse_special
        return [e.ids for e in self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def is_changed(self, text: str) -> bool:
        """Whether the tokenizer rewrites ``text`` before splitting it, in a way that libllama cannot."""
        if self._dropped and not self._dropped.isdisjoint(text.encode()):
            return True
        if self._normalizer is not None:
            seen = str(self._normalizer.normalize_str(text))
            # SentencePiece's way to write spaces, and a space before the text, are libllama's too.
            if seen not in (text, text.replace(" ", SPACE), SPACE + text.replace(" ", SPACE)):
                return True
        return self._swallows_space and text[:1] in (" ", SPACE)

    @property
    def _swallows_space(self) -> bool:
        """Metaspace puts no space before a text that begins with one; SentencePiece and libllama do."""
        return type(self.tokenizer.pre_tokenizer).__name__ == "Metaspace"

    def around(self) -> tuple[list[int], list[int]]:
        """Ids that it puts before and after every text."""
        inner = self.tokenizer.encode("a", add_special_tokens=False).ids
        whole = self.tokenizer.encode("a", add_special_tokens=True).ids
        for start in range(len(whole) - len(inner) + 1):
            if whole[start : start + len(inner)] == inner:
                return whole[:start], whole[start + len(inner) :]
        return [], []


class SentencePiece:
    """A ``tokenizer.model``, run by the sentencepiece library. Methods are those of JsonTokenizer."""

    library = "sentencepiece"

    def __init__(self, path: Path, data: bytes, *, added: Iterable[Added], add_dummy_prefix: bool) -> None:
        """``added`` are the tokens of the checkpoint's other files. Raises PinferError if the library refuses it."""
        try:
            self.processor: Any = SentencePieceProcessor(model_proto=data)
        except Exception as error:  # RuntimeError or worse, by version
            raise PinferError(f"{path} is not a SentencePiece model or damaged: {error}", DOWNLOAD_AGAIN) from None
        self._prefix = SPACE if add_dummy_prefix else ""
        self._ids = {token.text: token.id for token in added}
        self._parsed = _alternatives(token.text for token in added)
        self._always = _alternatives(token.text for token in added if not token.special)

    def encode(self, texts: Sequence[str], *, parse_special: bool) -> list[list[int]]:
        pattern = self._parsed if parse_special else self._always
        return [self._encode(text, pattern) for text in texts]

    def _encode(self, text: str, pattern: re.Pattern[str] | None) -> list[int]:
        if pattern is None:
            return list(self.processor.encode(text))
        ids: list[int] = []
        # The odd pieces of this split are the tokens; each piece between them is a text of its own.
        for i, piece in enumerate(pattern.split(text)):
            if i % 2:
                ids.append(self._ids[piece])
            elif piece:
                ids += self.processor.encode(piece)
        return ids

    def is_changed(self, text: str) -> bool:
        return bool(text) and self.processor.normalize(text) != self._prefix + text.replace(" ", SPACE)

    def around(self) -> tuple[list[int], list[int]]:
        # LlamaTokenizer's default; the checkpoint's files may override it.
        bos = self.processor.bos_id()
        return ([bos] if bos >= 0 else []), []


def _alternatives(texts: Iterable[str]) -> re.Pattern[str] | None:
    longest_first = sorted(set(texts), key=len, reverse=True)
    return re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if longest_first else None
