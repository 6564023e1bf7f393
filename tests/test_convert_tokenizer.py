"""A converted tokenizer gives the same ids in libllama as the original does."""

from __future__ import annotations

import json
import time
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFWriter
from support.tokenizer_originals import (
    FAMILIES,
    N_VOCAB,
    SENTENCEPIECE,
    STRINGS,
    sentencepiece_as_json,
    train_byte_level,
    train_sentencepiece,
    write_byte_level,
    write_json,
    write_opt,
)
from tokenizers import Tokenizer

from pinfer.conversion.tokenizer import TokenizerReport, add_tokenizer
from pinfer.errors import PinferError
from pinfer.gguf_io.reader import GgufFile, read_gguf
from pinfer.llama.vocab import LlamaVocab


@cache
def byte_level(name: str) -> Any:
    return train_byte_level(FAMILIES[name])


@cache
def sentencepiece(name: str) -> bytes:
    return train_sentencepiece(**SENTENCEPIECE[name])


def convert(folder: Path, config: dict[str, Any] | None = None, n_vocab: int = N_VOCAB) -> tuple[Path, TokenizerReport]:
    """A GGUF with only the folder's tokenizer."""
    header = GGUFWriter(None, "llama")
    report = add_tokenizer(folder, config or {}, n_vocab, header)
    path = folder / "vocab.gguf"
    header.write_header_to_file(path)
    header.write_kv_data_to_file()
    header.close()
    return path, report


@contextmanager
def converted(
    folder: Path, config: dict[str, Any] | None = None
) -> Iterator[tuple[LlamaVocab, GgufFile, TokenizerReport]]:
    path, report = convert(folder, config)
    with LlamaVocab(path) as vocab:
        yield vocab, read_gguf(path), report


def assert_equal_ids(vocab: LlamaVocab, expected: Sequence[list[int]], strings: Sequence[str]) -> None:
    wrong = [
        (text, ids, got) for text, ids in zip(strings, expected, strict=True) if (got := vocab.tokenize(text)) != ids
    ]
    assert not wrong, f"{len(wrong)} of {len(strings)} differ, the first: {wrong[0]}"


def original_ids(tokenizer: Any, strings: Sequence[str]) -> list[list[int]]:
    return [e.ids for e in tokenizer.encode_batch(list(strings), add_special_tokens=False)]


@pytest.mark.parametrize("name", FAMILIES)
def test_byte_level_families(name: str, tmp_path: Path) -> None:
    tokenizer, family = byte_level(name), FAMILIES[name]
    assert tokenizer.get_vocab_size() > 1000
    write_byte_level(tmp_path, name, tokenizer)
    strings = [unicodedata.normalize("NFC", text) for text in STRINGS] if family.normalizer else STRINGS
    with converted(tmp_path) as (vocab, gguf, report):
        assert (report.model, report.pre, report.verified_with) == ("gpt2", family.pre, "tokenizers")
        assert report.n_strings > 500
        assert_equal_ids(vocab, original_ids(tokenizer, strings), strings)
        whole = [tokenizer.encode(text).ids for text in strings[:50]]
        assert [vocab.tokenize(text, add_special=True) for text in strings[:50]] == whole
        assert gguf.get("tokenizer.ggml.add_bos_token") is (family.bos is not None)
        assert gguf.get("tokenizer.ggml.eos_token_id") == tokenizer.token_to_id(family.eos)
        chat = [f"Hi {token}there\n{token}{token}" for token in family.specials]
        assert [vocab.tokenize(text, parse_special=True) for text in chat] == original_ids(tokenizer, chat)
        tokenizer.encode_special_tokens = True
        assert_equal_ids(vocab, original_ids(tokenizer, chat), chat)
        tokenizer.encode_special_tokens = False
        assert bool(report.notes) == bool(family.normalizer)


def test_tokens_are_the_bytes_of_the_text(tmp_path: Path) -> None:
    write_byte_level(tmp_path, "opt", byte_level("opt"))
    with converted(tmp_path) as (vocab, _, _):
        for text in STRINGS:
            assert b"".join(vocab.piece(id_) for id_ in vocab.tokenize(text)) == text.encode()


def test_opt_from_its_two_files(tmp_path: Path) -> None:
    tokenizer = byte_level("opt")
    write_opt(tmp_path, tokenizer)
    with converted(tmp_path, {"model_type": "opt"}) as (vocab, gguf, report):
        assert report.pre == "gpt-2"
        assert_equal_ids(vocab, original_ids(tokenizer, STRINGS), STRINGS)
        assert vocab.tokenize("Hello", add_special=True) == [2, *vocab.tokenize("Hello")]
        assert vocab.tokenize("", add_special=True) == [2]
        ids = {name: gguf.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "unknown", "padding")}
        assert ids == {"bos": 2, "eos": 2, "unknown": 2, "padding": 1}
        assert vocab.n_tokens == N_VOCAB > report.n_tokens
        assert vocab.tokenize("a<pad></s>b", parse_special=True)[1:3] == [1, 2]
        assert report.notes == ()


def test_opt_adds_bos_although_no_file_says_so(tmp_path: Path) -> None:
    write_opt(tmp_path, byte_level("opt"))
    (tmp_path / "tokenizer_config.json").unlink()
    with converted(tmp_path, {"model_type": "opt"}) as (vocab, _, _):
        assert vocab.tokenize("", add_special=True) == [2]
    with converted(tmp_path, {"model_type": "gpt2"}) as (vocab, _, _):
        assert vocab.tokenize("", add_special=True) == []


@pytest.mark.parametrize("name", SENTENCEPIECE)
def test_sentencepiece_families(name: str, tmp_path: Path) -> None:
    from sentencepiece import SentencePieceProcessor

    model = sentencepiece(name)
    (tmp_path / "tokenizer.model").write_bytes(model)
    original: Any = SentencePieceProcessor(model_proto=model)
    with converted(tmp_path) as (vocab, gguf, report):
        assert (report.model, report.verified_with) == ("llama", "sentencepiece")
        assert_equal_ids(vocab, original.encode(STRINGS), STRINGS)
        assert vocab.tokenize("Hi", add_special=True) == [original.bos_id(), *original.encode("Hi")]
        assert gguf.get("tokenizer.ggml.eos_token_id") == original.eos_id()
        assert gguf.get("tokenizer.ggml.unknown_token_id") == original.unk_id()
        assert gguf.get("tokenizer.ggml.add_space_prefix") is (name != "no-prefix")
        # Where SentencePiece knows symbols of its own, libllama begins the text behind them with a space.
        assert bool(report.notes) == (name == "minicpm")


def test_sentencepiece_with_added_tokens(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece("llama"))
    special = {"content": "<|im_end|>", "special": True}
    config = {"added_tokens_decoder": {str(N_VOCAB - 10): special}, "eos_token": "<|im_end|>", "add_bos_token": False}
    write_json(tmp_path / "tokenizer_config.json", config)
    write_json(tmp_path / "added_tokens.json", {"<extra>": N_VOCAB - 9, "[PAD]": N_VOCAB})
    with converted(tmp_path) as (vocab, gguf, report):
        assert gguf.get("tokenizer.ggml.eos_token_id") == N_VOCAB - 10
        assert vocab.tokenize("<|im_end|>", parse_special=True, add_special=True) == [N_VOCAB - 10]
        assert N_VOCAB - 10 not in vocab.tokenize("<|im_end|>")
        assert N_VOCAB - 9 in vocab.tokenize("a<extra>b")
        assert len(report.notes) == 1
        assert "'[PAD]'" in report.notes[0]


def test_sentencepiece_that_is_only_a_tokenizer_json(tmp_path: Path) -> None:
    from sentencepiece import SentencePieceProcessor

    model = sentencepiece("llama")
    write_json(tmp_path / "tokenizer.json", sentencepiece_as_json(model))
    config = {"eos_token": "</s>", "bos_token": "<s>", "add_bos_token": True}
    write_json(tmp_path / "tokenizer_config.json", config)
    original: Any = SentencePieceProcessor(model_proto=model)
    with converted(tmp_path) as (vocab, gguf, report):
        assert (report.model, report.verified_with) == ("llama", "tokenizers")
        assert gguf.get("tokenizer.ggml.add_space_prefix") is True
        assert_equal_ids(vocab, original.encode(STRINGS), STRINGS)
        assert vocab.tokenize("", add_special=True) == [1]


def test_several_ends_and_chat_templates(tmp_path: Path) -> None:
    tokenizer = byte_level("arcee")
    write_byte_level(tmp_path, "arcee", tokenizer)
    templates = [{"name": "default", "template": "{{ a }}"}, {"name": "tool_use", "template": "{{ b }}"}]
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    write_json(tmp_path / "tokenizer_config.json", config | {"chat_template": templates})
    ends = [tokenizer.token_to_id(token) for token in ("<|im_end|>", "<|end_of_text|>")]
    write_json(tmp_path / "generation_config.json", {"eos_token_id": ends})
    gguf = read_gguf(convert(tmp_path)[0])
    assert gguf.get("tokenizer.ggml.eos_token_id") == ends[0]
    assert gguf.get("tokenizer.ggml.eot_token_id") == ends[1]
    assert gguf.get("tokenizer.chat_template") == "{{ a }}"
    assert gguf.get("tokenizer.chat_template.tool_use") == "{{ b }}"
    (tmp_path / "chat_template.jinja").write_text("{{ c }}")
    assert read_gguf(convert(tmp_path)[0]).get("tokenizer.chat_template") == "{{ c }}"


# --- what is refused -------------------------------------------------------------------------------------------------


def refusal(folder: Path, n_vocab: int = N_VOCAB) -> str:
    with pytest.raises(PinferError) as error:
        convert(folder, n_vocab=n_vocab)
    return str(error.value)


def test_a_folder_without_tokenizer(tmp_path: Path) -> None:
    assert "has no tokenizer" in refusal(tmp_path)


def edited(folder: Path, **model: object) -> None:
    """tokenizer.json of OPT, with other entries in its model."""
    data = json.loads(byte_level("opt").to_str())
    data["model"] |= model
    write_json(folder / "tokenizer.json", data)
    write_json(folder / "tokenizer_config.json", {"eos_token": "</s>"})


def test_damaged_files(tmp_path: Path) -> None:
    whole = byte_level("opt").to_str()
    (tmp_path / "tokenizer.json").write_text(whole[: len(whole) // 2])
    assert "tokenizer.json is damaged" in refusal(tmp_path)
    (tmp_path / "tokenizer.json").write_text("[]")
    assert "it holds a list, not an object" in refusal(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    assert "it has no vocabulary" in refusal(tmp_path)
    edited(tmp_path, merges=[["a", "b", "c"]])
    assert "is damaged" in refusal(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    model = sentencepiece("llama")
    for data in (model[: len(model) // 2], b"", b"\xff" * 100):
        (tmp_path / "tokenizer.model").write_bytes(data)
        assert "tokenizer.model" in refusal(tmp_path)


@pytest.mark.parametrize("id_", [N_VOCAB, 10**12, 2**70, -1, 1.5, "7", None, True])
def test_a_vocabulary_with_impossible_ids(id_: object, tmp_path: Path) -> None:
    """10^12 once made as many unused tokens."""
    vocab = json.loads(byte_level("opt").to_str())["model"]["vocab"]
    edited(tmp_path, vocab=vocab | {"strange": id_})
    assert "tokenizer.json" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("added_tokens.json", {"<x>": 10**12}),
        ("added_tokens.json", {"<x>": -1}),
        ("added_tokens.json", {"<x>": "many"}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"-5": {"content": "<x>"}}}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"5": "<x>"}}),
        ("tokenizer_config.json", {"added_tokens_decoder": [1]}),
    ],
)
def test_impossible_added_tokens(name: str, content: object, tmp_path: Path) -> None:
    write_byte_level(tmp_path, "opt", byte_level("opt"))
    write_json(tmp_path / name, content)
    assert "added tokens" in refusal(tmp_path)


def test_a_sentencepiece_model_with_an_endless_number(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"\x80" * 4_000_000)
    begin = time.monotonic()
    assert "more than 64 bits" in refusal(tmp_path)
    assert time.monotonic() - begin < 5


def test_gpt2_files_without_merges(tmp_path: Path) -> None:
    write_opt(tmp_path, byte_level("opt"))
    (tmp_path / "merges.txt").unlink()
    assert "merges.txt" in refusal(tmp_path)


@pytest.mark.parametrize("kind", ["WordPiece", "Unigram", "WordLevel"])
def test_other_kinds(kind: str, tmp_path: Path) -> None:
    vocab: object = [["<unk>", 0.0], ["a", -1.0]] if kind == "Unigram" else {"[UNK]": 0, "a": 1}
    write_json(tmp_path / "tokenizer.json", {"version": "1.0", "model": {"type": kind, "vocab": vocab}})
    assert f"is a {kind} tokenizer" in refusal(tmp_path)


def test_a_unigram_sentencepiece_model(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(train_sentencepiece(model_type="unigram"))
    assert "is a Unigram SentencePiece model" in refusal(tmp_path)


def test_sentencepiece_without_bytes(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(train_sentencepiece(byte_fallback=False))
    assert "byte_fallback" in refusal(tmp_path)


def test_more_tokens_than_rows(tmp_path: Path) -> None:
    write_byte_level(tmp_path, "opt", byte_level("opt"))
    assert "embedding has 1200 rows" in refusal(tmp_path, n_vocab=1200)


def test_no_end_of_text(tmp_path: Path) -> None:
    byte_level("arcee").save(str(tmp_path / "tokenizer.json"))
    assert "names the token that ends a text" in refusal(tmp_path)


def test_a_pre_tokenizer_that_llama_cpp_does_not_know(tmp_path: Path) -> None:
    data = json.loads(byte_level("opt").to_str())
    for byte_level_part in (
        {"add_prefix_space": True, "use_regex": True},
        {"add_prefix_space": False, "use_regex": False},
    ):
        data["pre_tokenizer"] = {"type": "ByteLevel", "trim_offsets": True, **byte_level_part}
        write_json(tmp_path / "tokenizer.json", data)
        write_json(tmp_path / "tokenizer_config.json", {"eos_token": "</s>"})
        message = refusal(tmp_path)
        assert "llama.cpp has no tokenizer that agrees" in message
        assert "libllama [" in message


def test_merges_that_are_not_sentencepieces(tmp_path: Path) -> None:
    data = sentencepiece_as_json(sentencepiece("llama"))
    merges = data["model"]["merges"]
    data["model"]["merges"] = merges[:100] + merges[101:]
    write_json(tmp_path / "tokenizer.json", data)
    write_json(tmp_path / "tokenizer_config.json", {"eos_token": "</s>"})
    assert "are not SentencePiece's" in refusal(tmp_path)


def test_a_rewriting_sentencepiece_is_noted(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(train_sentencepiece(normalization_rule_name="nfkc"))
    _, report = convert(tmp_path)
    assert "rewrites some texts" in report.notes[0]


def test_the_pre_tokenizer_is_found_without_a_hint_in_the_file(tmp_path: Path) -> None:
    data = json.loads(byte_level("plm").to_str())
    # The same splitting in other words, which gives no hint.
    split = data["pre_tokenizer"]["pretokenizers"][0]
    split["pattern"]["Regex"] = split["pattern"]["Regex"].replace(r"\p{N}", r"\p{Number}")
    data["normalizer"] = None
    write_json(tmp_path / "tokenizer.json", data)
    write_json(tmp_path / "tokenizer_config.json", {"eos_token": "<|im_end|>"})
    with converted(tmp_path) as (vocab, _, report):
        assert report.pre == "qwen2"
        assert_equal_ids(vocab, original_ids(Tokenizer.from_file(str(tmp_path / "tokenizer.json")), STRINGS), STRINGS)


def test_characters_without_a_token_are_noted(tmp_path: Path) -> None:
    data = json.loads(byte_level("opt").to_str())
    tab = "\u010b"  # GPT-2's name for the vertical tab, which Falcon's vocabulary lacks
    data["model"]["merges"] = [pair for pair in data["model"]["merges"] if tab not in "".join(pair)]
    kept = {text: id_ for text, id_ in data["model"]["vocab"].items() if tab not in text}
    data["model"]["vocab"] = kept
    write_json(tmp_path / "tokenizer.json", data)
    write_json(tmp_path / "tokenizer_config.json", {"eos_token": "</s>"})
    strings = [text for text in STRINGS if "\x0b" not in text]
    with converted(tmp_path) as (vocab, _, report):
        assert report.pre == "gpt-2"
        assert "characters it has no token for" in report.notes[0]
        original = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
        assert_equal_ids(vocab, original_ids(original, strings), strings)
