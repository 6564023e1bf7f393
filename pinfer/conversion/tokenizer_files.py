"""Reads the tokenizer files of a checkpoint folder into a vocabulary as a GGUF holds it."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pinfer.conversion.checkpoint import read_object
from pinfer.conversion.hints import DOWNLOAD_AGAIN
from pinfer.conversion.tokenizer_original import Added, JsonTokenizer, SentencePiece
from pinfer.errors import PinferError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # enum llama_token_type

_KINDS = "SentencePiece BPE (tokenizer.model) and byte-level BPE (tokenizer.json, vocab.json) are supported"


@dataclass
class Vocabulary:
    """A tokenizer to be written into a GGUF. ``tokens`` may have holes (None), which become unused tokens."""

    model: str
    """``llama``: SentencePiece's BPE by scores; ``gpt2``: byte-level BPE by merges"""
    source: Path
    original: JsonTokenizer | SentencePiece
    tokens: list[str | None]
    types: list[int]
    added: list[Added]
    scores: list[float] = field(default_factory=list)
    merges: list[str] = field(default_factory=list)
    add_space_prefix: bool | None = None
    ignore_merges: bool = False
    pre_tokenizer: Mapping[str, Any] = field(default_factory=dict)
    """as tokenizer.json describes it"""
    defaults: Mapping[str, int] = field(default_factory=dict)
    """special tokens by name (``bos``), used if no other file names them"""

    def put(self, id_: int, text: str, kind: int, score: float = 0.0) -> None:
        """Sets a token of the trained vocabulary or an added one; ``id_`` is below the embedding's rows."""
        while len(self.tokens) <= id_:
            self.tokens.append(None)
            self.types.append(UNUSED)
            if self.model == "llama":
                self.scores.append(0.0)
        self.tokens[id_] = text
        self.types[id_] = kind
        if self.model == "llama":
            self.scores[id_] = score


def read_vocabulary(folder: Path, tokenizer_config: Mapping[str, Any], n_vocab: int) -> Vocabulary:
    """The tokenizer of ``folder``, for an embedding of ``n_vocab`` rows.

    Added tokens may have larger ids. Raises PinferError if there is no tokenizer that can be converted.
    """
    model, whole, vocab = folder / "tokenizer.model", folder / "tokenizer.json", folder / "vocab.json"
    named = _special_texts(folder, tokenizer_config)
    added = _added_elsewhere(folder, tokenizer_config, named)
    if model.is_file() and not (whole.is_file() and not _is_sentencepiece(model)):
        return _from_sentencepiece(model, _with_json_added(whole, added))
    if whole.is_file():
        return _from_json(whole, n_vocab, added, named)
    if vocab.is_file():
        return _from_json(vocab, n_vocab, added, named, merges=folder / "merges.txt")
    raise PinferError(
        f"{folder} has no tokenizer (tokenizer.model, tokenizer.json, or vocab.json with merges.txt)",
        "put the tokenizer's files of the checkpoint into the folder",
    )


def _added_token(id_: object, description: Mapping[str, Any]) -> Added:
    """A token as tokenizer.json and tokenizer_config.json describe it. Raises what a wrong description makes it."""
    plain = not (description.get("lstrip") or description.get("rstrip") or description.get("single_word"))
    return Added(_id(id_), str(description["content"]), bool(description.get("special")), plain)


def _id(value: object) -> int:
    id_ = int(str(value))
    if not 0 <= id_ < 1 << 31:
        raise ValueError(f"id {value}")
    return id_


def _added_elsewhere(folder: Path, tokenizer_config: Mapping[str, Any], named: set[str]) -> list[Added]:
    """Added tokens of tokenizer_config.json and added_tokens.json, by id."""
    found: dict[int, Added] = {}
    try:
        for text, id_ in (read_object(folder / "added_tokens.json") or {}).items():
            found[_id(id_)] = Added(_id(id_), str(text), False)
        for key, token in (tokenizer_config.get("added_tokens_decoder") or {}).items():
            found[_id(key)] = _added_token(key, token)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise PinferError(f"the added tokens of {folder} are not valid", DOWNLOAD_AGAIN) from None
    return [replace(found[id_], special=found[id_].special or found[id_].text in named) for id_ in sorted(found)]


def _special_texts(folder: Path, tokenizer_config: Mapping[str, Any]) -> set[str]:
    """Texts of special tokens, from all files of the folder."""
    texts: set[str] = set()
    for source in (tokenizer_config, read_object(folder / "special_tokens_map.json") or {}):
        for key, value in source.items():
            if key.endswith("_token") or key in ("additional_special_tokens", "extra_special_tokens"):
                for item in value if isinstance(value, list) else [value]:
                    text = item.get("content") if isinstance(item, dict) else item
                    if isinstance(text, str):
                        texts.add(text)
    return texts


def _with_json_added(path: Path, added: Sequence[Added]) -> list[Added]:
    """``added``, and those tokens of tokenizer.json whose ids are not among them."""
    try:
        tokens = (read_object(path) or {}).get("added_tokens") or ()
        found = {token.id: token for token in [_added_token(token["id"], token) for token in tokens]}
    except (AttributeError, KeyError, TypeError, ValueError):
        raise PinferError(f"the added tokens of {path} are not valid", DOWNLOAD_AGAIN) from None
    found |= {token.id: token for token in added}
    return [found[id_] for id_ in sorted(found)]


# --- tokenizer.model -------------------------------------------------------------------------------------------------


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Number and value of each field of a protocol buffer: varints as int, all others as bytes."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value
            if shift > 63:
                raise ValueError("a number of more than 64 bits")

    while at < len(data):
        tag = varint()
        kind = tag & 7
        if kind == 0:
            yield tag >> 3, varint()
            continue
        size = {1: 8, 2: -1, 5: 4}.get(kind)
        if size is None:
            raise ValueError(f"wire type {kind}")
        if size < 0:
            size = varint()
        if at + size > len(data):
            raise ValueError("cut off")
        yield tag >> 3, data[at : at + size]
        at += size


@dataclass(frozen=True)
class _Piece:
    text: str
    score: float
    type: int


@dataclass(frozen=True)
class _SentencePieceModel:
    """The fields of sentencepiece_model.proto that matter here, with its defaults."""

    pieces: list[_Piece]
    model_type: int = 1
    add_dummy_prefix: bool = True
    escapes_spaces: bool = True
    suffix_spaces: bool = False


def _parse_piece(data: bytes) -> _Piece:
    text, score, kind = "", 0.0, NORMAL
    for number, value in _fields(data):
        if number == 1 and isinstance(value, bytes):
            text = value.decode("utf-8")
        elif number == 2 and isinstance(value, bytes):
            score = struct.unpack("<f", value)[0]
        elif number == 3 and isinstance(value, int):
            kind = value
    return _Piece(text, score, kind)


def _parse_model(data: bytes) -> _SentencePieceModel:
    pieces, flags = [], {}
    for number, value in _fields(data):
        if not isinstance(value, bytes):
            continue
        if number == 1:
            pieces.append(_parse_piece(value))
        elif number == 2:
            trainer = dict(_fields(value))
            flags["model_type"] = trainer.get(3, 1)
            flags["suffix_spaces"] = bool(trainer.get(24, 0))
        elif number == 3:
            normalizer = dict(_fields(value))
            flags["add_dummy_prefix"] = bool(normalizer.get(3, 1))
            flags["escapes_spaces"] = bool(normalizer.get(5, 1))
    return _SentencePieceModel(pieces, **flags)  # type: ignore[arg-type]


def _is_sentencepiece(path: Path) -> bool:
    try:
        return bool(_parse_model(path.read_bytes()).pieces)
    except (IndexError, ValueError, struct.error):
        return False


def _from_sentencepiece(path: Path, added: list[Added]) -> Vocabulary:
    data = path.read_bytes()
    try:
        model = _parse_model(data)
    except (IndexError, ValueError, struct.error) as error:
        raise PinferError(f"{path} is not a SentencePiece model or damaged: {error}", DOWNLOAD_AGAIN) from None
    original = SentencePiece(path, data, added=added, add_dummy_prefix=model.add_dummy_prefix)
    if model.model_type != 2:
        kind = {1: "Unigram", 3: "Word", 4: "Char"}.get(model.model_type, f"type {model.model_type}")
        raise PinferError(f"{path} is a {kind} SentencePiece model", _KINDS)
    if model.suffix_spaces or not model.escapes_spaces:
        raise PinferError(f"{path} treats spaces in a way that llama.cpp does not support", _KINDS)
    processor = original.processor
    ids = {"bos": processor.bos_id(), "eos": processor.eos_id(), "unk": processor.unk_id(), "pad": processor.pad_id()}
    vocabulary = Vocabulary(
        model="llama",
        source=path,
        original=original,
        tokens=[],
        types=[],
        added=added,
        add_space_prefix=model.add_dummy_prefix,
        defaults={name: id_ for name, id_ in ids.items() if id_ >= 0},
    )
    for id_, piece in enumerate(model.pieces):
        vocabulary.put(id_, piece.text, piece.type, piece.score)
    # Symbols that SentencePiece finds before all others behave like added tokens.
    vocabulary.added = added + [
        Added(id_, piece.text, False)
        for id_, piece in enumerate(model.pieces)
        if piece.type == USER_DEFINED and not any(token.id == id_ for token in added)
    ]
    _require_bytes(path, vocabulary)
    return vocabulary


def _require_bytes(path: Path, vocabulary: Vocabulary) -> None:
    """libllama needs them for characters that are not in the vocabulary."""
    present = set(vocabulary.tokens)
    if any(f"<0x{byte:02X}>" not in present for byte in range(256)):
        raise PinferError(f"{path} has no tokens for single bytes (byte_fallback)", _KINDS)


# --- tokenizer.json, or vocab.json with merges.txt -------------------------------------------------------------------


def _from_json(path: Path, n_vocab: int, added: list[Added], named: set[str], merges: Path | None = None) -> Vocabulary:
    data = read_object(path) or {}
    if merges is not None:
        data = _as_tokenizer_json(data, merges)
    model = data.get("model")
    if not isinstance(model, dict) or not model.get("vocab"):
        raise PinferError(f"{path} is damaged: it has no vocabulary", DOWNLOAD_AGAIN)
    kind = model.get("type") or ("BPE" if "merges" in model else "nameless")
    if kind != "BPE":
        raise PinferError(f"{path} is a {kind} tokenizer", _KINDS)
    vocab = model["vocab"]
    if not isinstance(vocab, dict) or not all(type(id_) is int and id_ >= 0 for id_ in vocab.values()):
        raise PinferError(f"{path} is damaged: its vocabulary is not an object of ids", DOWNLOAD_AGAIN)
    if max(vocab.values()) >= n_vocab:
        raise PinferError(
            f"{path} has a token with id {max(vocab.values())}, the model's embedding has {n_vocab} rows",
            "the tokenizer belongs to another model: get the one of this checkpoint",
        )
    for name in ("continuing_subword_prefix", "end_of_word_suffix", "dropout"):
        if model.get(name):
            raise PinferError(f"{path} is a BPE tokenizer with {name} = {model[name]!r}", _KINDS)
    original = JsonTokenizer(path, json.dumps(data))
    original.add(added)
    # A token that some file calls special is found before all others, like the added ones.
    beside = {token.text for token in original.added()}
    original.add(Added(vocab[text], text, True) for text in sorted(named - beside) if text in vocab)
    vocabulary = Vocabulary(
        model="llama" if model.get("byte_fallback") else "gpt2",
        source=path,
        original=original,
        tokens=[],
        types=[],
        added=original.added(),
        ignore_merges=bool(model.get("ignore_merges")),
        pre_tokenizer=data.get("pre_tokenizer") or {},
    )
    try:
        pairs = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model.get("merges") or ()]
    except TypeError:
        pairs = [()]
    if any(len(pair) != 2 for pair in pairs):
        raise PinferError(f"{path} is damaged: its merges are not pairs", DOWNLOAD_AGAIN)
    if vocabulary.model == "llama":
        _fill_by_scores(path, vocabulary, model, pairs)
    else:
        original.is_byte_level(vocab)
        for text, id_ in vocab.items():
            vocabulary.put(id_, text, NORMAL)
        vocabulary.merges = [" ".join(pair) for pair in pairs]
    return vocabulary


def _as_tokenizer_json(vocab: dict[str, Any], merges: Path) -> dict[str, Any]:
    """GPT-2's vocab.json and merges.txt as its own tokenizer reads them."""
    try:
        lines = merges.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise PinferError(f"{merges}, which belongs to vocab.json, cannot be read: {error}", DOWNLOAD_AGAIN) from None
    pairs = [line.rstrip("\r") for line in lines if line.strip() and not line.startswith("#version")]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": None,
        "decoder": byte_level,
        "model": {"type": "BPE", "vocab": vocab, "merges": pairs},
    }


def _fill_by_scores(
    path: Path, vocabulary: Vocabulary, model: Mapping[str, Any], pairs: Sequence[tuple[str, ...]]
) -> None:
    """Recovers SentencePiece's scores from the order of the merges that were made from them.

    libllama merges any two neighbours that make a token, best score first. That is equal to following the merges only
    if they list every such pair of a token, and all pairs of one token in a row.
    """
    rank: dict[str, int] = {}
    known: set[tuple[str, ...]] = set(pairs)
    last = ""
    for i, (left, right) in enumerate(pairs):
        product = left + right
        if product != last and product in rank:
            raise PinferError(f"the merges of {path} are not SentencePiece's: {product!r} comes twice", _KINDS)
        rank.setdefault(product, i)
        last = product
    vocab: Mapping[str, int] = model["vocab"]
    special = {token.text for token in vocabulary.added}
    for text, id_ in vocab.items():
        for cut in range(1, len(text)):
            pair = (text[:cut], text[cut:])
            if pair not in known and pair[0] in vocab and pair[1] in vocab and not _is_byte(text):
                raise PinferError(
                    f"the merges of {path} are not SentencePiece's: {pair[0]!r} and {pair[1]!r} are not among them",
                    _KINDS,
                )
        kind = BYTE if _is_byte(text) else UNKNOWN if text == model.get("unk_token") else NORMAL
        vocabulary.put(id_, text, kind, 0.0 if text in special else -float(rank.get(text, len(pairs))))
    _require_bytes(path, vocabulary)


def _is_byte(text: str) -> bool:
    return len(text) == 6 and text.startswith("<0x") and text.endswith(">")
