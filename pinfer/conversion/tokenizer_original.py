"""A checkpoint's own tokenizer, run by the library it was made for: what a converted vocabulary has to agree with."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pinfer.errors import PinferError

SPACE = "\u2581"  # what SentencePiece writes for a space
_AGAIN = "download the checkpoint again"


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes: those that can be seen stand for themselves."""
    seen = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in seen]
    return {chr(byte): byte for byte in seen} | {chr(256 + i): byte for i, byte in enumerate(hidden)}


BYTES = _byte_alphabet()


@dataclass(frozen=True)
class Added:
    """A token that was put beside the trained vocabulary, found in a text before anything else is."""

    id: int
    text: str
    special: bool
    """a control token: not text, but an instruction"""
    plain: bool = True
    """it matches wherever its text stands and takes no white space with it, which is all that llama.cpp can do"""


class Original(Protocol):
    """The tokenizer of the checkpoint."""

    library: str

    def encode(self, texts: Sequence[str], *, parse_special: bool) -> list[list[int]]:
        """Ids of each text, nothing put around them; ``parse_special`` reads control tokens in it."""
        ...

    def is_changed(self, text: str) -> bool:
        """Whether the tokenizer rewrites ``text`` before it cuts it up, in a way that libllama has no means for."""
        ...

    def around(self) -> tuple[list[int], list[int]]:
        """What it puts before and after a text by itself."""
        ...


def read_json(path: Path) -> Any:
    """A JSON file; None where there is none. Raises PinferError where it is damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise PinferError(f"{path} cannot be read: {error.strerror or error}", "check its permissions") from None
    except ValueError as error:
        raise PinferError(f"{path} is damaged: {error}", _AGAIN) from None


class JsonTokenizer:
    """A ``tokenizer.json``, or ``vocab.json`` with ``merges.txt``, run by the tokenizers library."""

    library = "tokenizers"

    def __init__(self, path: Path, text: str) -> None:
        """``text`` is what is in ``path``, as JSON. Raises PinferError where the library refuses it."""
        from tokenizers import Tokenizer

        try:
            self.tokenizer: Any = Tokenizer.from_str(text)
        except Exception as error:  # the library raises nothing narrower
            raise PinferError(f"{path} is damaged: {error}", _AGAIN) from None
        self._path, self._text = path, text
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        self._normalizer: Any = self.tokenizer.normalizer
        self._dropped: frozenset[int] = frozenset()

    def is_byte_level(self, vocab: Mapping[str, int]) -> None:
        """Tells it that ``vocab`` is made of bytes. Those it lacks are dropped, here before merging, there after it."""
        self._dropped = frozenset(byte for text, byte in BYTES.items() if text not in vocab)

    def with_merges(self, tokens: Sequence[str], merges: Sequence[tuple[str, ...]]) -> JsonTokenizer:
        """The same tokenizer with another vocabulary, and nothing added to it."""
        data = json.loads(self._text)
        data["added_tokens"], data["post_processor"] = [], None
        data["model"] |= {"vocab": {text: id_ for id_, text in enumerate(tokens)}, "merges": merges, "unk_token": None}
        return JsonTokenizer(self._path, json.dumps(data))

    def add(self, tokens: Iterable[Added]) -> None:
        """Tokens that another file of the checkpoint adds."""
        from tokenizers import AddedToken

        for token in tokens:
            if self.tokenizer.token_to_id(token.text) in (None, token.id):
                made = AddedToken(token.text, special=token.special, normalized=False)
                (self.tokenizer.add_special_tokens if token.special else self.tokenizer.add_tokens)([made])

    def added(self) -> list[Added]:
        """The tokens beside the trained vocabulary, by id."""
        found: Mapping[int, Any] = self.tokenizer.get_added_tokens_decoder()
        return [
            Added(id_, t.content, t.special, not (t.lstrip or t.rstrip or t.single_word))
            for id_, t in sorted(found.items())
        ]

    def encode(self, texts: Sequence[str], *, parse_special: bool) -> list[list[int]]:
        self.tokenizer.encode_special_tokens = not parse_special
        return [e.ids for e in self.tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]

    def is_changed(self, text: str) -> bool:
        if self._dropped and not self._dropped.isdisjoint(text.encode()):
            return True
        if self._normalizer is not None:
            seen = str(self._normalizer.normalize_str(text))
            # SentencePiece's way to write spaces, and one before the text, is libllama's as well.
            if seen not in (text, text.replace(" ", SPACE), SPACE + text.replace(" ", SPACE)):
                return True
        return self._swallows_space and text[:1] in (" ", SPACE)

    @property
    def _swallows_space(self) -> bool:
        """Metaspace puts no space before a text that begins with one; SentencePiece and libllama do."""
        return type(self.tokenizer.pre_tokenizer).__name__ == "Metaspace"

    def around(self) -> tuple[list[int], list[int]]:
        inner = self.tokenizer.encode("a", add_special_tokens=False).ids
        whole = self.tokenizer.encode("a", add_special_tokens=True).ids
        for start in range(len(whole) - len(inner) + 1):
            if whole[start : start + len(inner)] == inner:
                return whole[:start], whole[start + len(inner) :]
        return [], []


class SentencePiece:
    """A ``tokenizer.model``, run by the sentencepiece library."""

    library = "sentencepiece"

    def __init__(self, path: Path, data: bytes, *, added: Iterable[Added], add_dummy_prefix: bool) -> None:
        """``added`` are the tokens of the checkpoint's other files. Raises PinferError where the library refuses it."""
        from sentencepiece import SentencePieceProcessor

        try:
            self.processor: Any = SentencePieceProcessor(model_proto=data)
        except Exception as error:  # RuntimeError or worse, by version
            raise PinferError(f"{path} is not a SentencePiece model or damaged: {error}", _AGAIN) from None
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
        # The odd pieces of such a split are the tokens themselves. What lies between is a text of its own.
        for i, piece in enumerate(pattern.split(text)):
            if i % 2:
                ids.append(self._ids[piece])
            elif piece:
                ids += self.processor.encode(piece)
        return ids

    def is_changed(self, text: str) -> bool:
        return bool(text) and self.processor.normalize(text) != self._prefix + text.replace(" ", SPACE)

    def around(self) -> tuple[list[int], list[int]]:
        # LlamaTokenizer's default. The files of the checkpoint may say otherwise.
        bos = self.processor.bos_id()
        return ([bos] if bos >= 0 else []), []


def _alternatives(texts: Iterable[str]) -> re.Pattern[str] | None:
    longest_first = sorted(set(texts), key=len, reverse=True)
    return re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if longest_first else None
