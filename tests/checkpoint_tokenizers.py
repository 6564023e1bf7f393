"""Tiny tokenizers of the families' kinds, trained on the repository's own test text."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

__all__ = ["TOKENIZERS"]

_TEXT = Path(__file__).resolve().parent / "data" / "profile.txt"
N_TOKENS = 323


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _token(content: str, **flags: bool) -> dict[str, Any]:
    return {"content": content, "lstrip": False, "normalized": True, "rstrip": False, "single_word": False} | flags


def _train(tokenizer: Tokenizer, special: list[str], n_tokens: int = N_TOKENS) -> Tokenizer:
    trainer = trainers.BpeTrainer(
        vocab_size=n_tokens,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train([str(_TEXT)], trainer)
    return tokenizer


def llama(folder: Path) -> None:
    """SentencePiece BPE with byte fallback, no normalisation and one digit per token, as LLaMA's and Mistral's."""
    model = io.BytesIO()
    # Lower case leaves room for pieces of several letters.
    lines = [line.lower() for line in _TEXT.read_text(encoding="utf-8").splitlines() if line.strip()]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=N_TOKENS,
        character_coverage=0.98,
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        num_threads=1,
        minloglevel=2,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    special = {name: _token(token) for name, token in (("bos", "<s>"), ("eos", "</s>"), ("unk", "<unk>"))}
    _write_json(
        folder / "tokenizer_config.json",
        {
            "add_bos_token": True,
            "add_eos_token": False,
            "bos_token": {"__type": "AddedToken"} | special["bos"],
            "clean_up_tokenization_spaces": False,
            "eos_token": {"__type": "AddedToken"} | special["eos"],
            "legacy": False,
            "model_max_length": 1000000000000000019884624838656,
            "pad_token": None,
            "sp_model_kwargs": {},
            "tokenizer_class": "LlamaTokenizer",
            "unk_token": {"__type": "AddedToken"} | special["unk"],
        },
    )
    _write_json(folder / "special_tokens_map.json", {f"{name}_token": token for name, token in special.items()})


def opt(folder: Path) -> None:
    """GPT-2's byte-level BPE as vocab.json and merges.txt, with OPT's special tokens and </s> in front of a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    _train(tokenizer, ["<s>", "<pad>", "</s>", "<unk>"])
    tokenizer.model.save(str(folder))
    special = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}
    _write_json(
        folder / "tokenizer_config.json",
        {
            "errors": "replace",
            "unk_token": {"__type": "AddedToken"} | _token("</s>"),
            "bos_token": {"__type": "AddedToken"} | _token("</s>"),
            "eos_token": {"__type": "AddedToken"} | _token("</s>"),
            "pad_token": {"__type": "AddedToken"} | _token("<pad>"),
            "add_prefix_space": False,
            "add_bos_token": True,
            "tokenizer_class": "GPT2Tokenizer",
        },
    )
    _write_json(folder / "special_tokens_map.json", {name: _token(token) for name, token in special.items()})


def falcon(folder: Path) -> None:
    """Falcon's tokenizer.json: punctuation, GPT-2's words, digits, then groups of three; no token before a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Punctuation(behavior="contiguous"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
            pre_tokenizers.Digits(individual_digits=False),
            pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), behavior="isolated"),
        ]
    )
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    names = ("TITLE", "ABSTRACT", "INTRODUCTION", "SUMMARY", "COMMENT", "ANSWER", "QUESTION", "DOMAIN", "PREFIX")
    special = [f">>{name}<<" for name in (*names, "SUFFIX", "MIDDLE")]
    _train(tokenizer, [*special, "<|endoftext|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(
        folder / "tokenizer_config.json",
        {
            "add_prefix_space": False,
            "eos_token": "<|endoftext|>",
            "model_input_names": ["input_ids", "attention_mask"],
            "model_max_length": 2048,
            "special_tokens_map_file": None,
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    )
    _write_json(
        folder / "special_tokens_map.json",
        {"additional_special_tokens": special, "eos_token": "<|endoftext|>"},
    )


TOKENIZERS: dict[str, Callable[[Path], None]] = {"falcon": falcon, "llama": llama, "opt": opt}
