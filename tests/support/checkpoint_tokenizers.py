"""Tiny tokenizers of the families' kinds, trained on the repository's own test text."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

__all__ = ["TOKENIZERS"]

_TEXT = Path(__file__).resolve().parent.parent / "data" / "profile.txt"
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


def _sentencepiece(folder: Path, add_bos: bool, **ids: Any) -> None:
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
        **ids,
    )
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    special = {name: _token(token) for name, token in (("bos", "<s>"), ("eos", "</s>"), ("unk", "<unk>"))}
    _write_json(
        folder / "tokenizer_config.json",
        {
            "add_bos_token": add_bos,
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


def llama(folder: Path) -> None:
    """LLaMA's and Mistral's: SentencePiece BPE with byte fallback, no normalisation, one digit per token."""
    _sentencepiece(folder, add_bos=True)


def nemotron(folder: Path) -> None:
    """Minitron's: SentencePiece with other ids for the special tokens, and no BOS."""
    _sentencepiece(folder, add_bos=False, pad_id=0, unk_id=1, bos_id=2, eos_id=3)


def opt(folder: Path) -> None:
    """GPT-2's byte-level BPE as vocab.json and merges.txt, with OPT's special tokens and </s> before a text."""
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


_NUMBERS = {"one": r"\p{N}", "three": r"\p{N}{1,3}"}
_SPACES = {
    "all": r"\s+(?!\S)|\s+",
    "powers": "|".join(rf"\s{{{n}}}(?!\S)" for n in (512, 256, 128, 64, 32, 16, 8, 4)) + r"|\s{1,2}(?!\S)|\s{1}",
}


def _words(numbers: str, spaces: str) -> Regex:
    """How tokenizers derived from tiktoken split text; they differ in groups of digits and runs of spaces."""
    return Regex(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
        + _NUMBERS[numbers]
        + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
        + _SPACES[spaces]
    )


def _split_bpe(words: Regex, before: list[str], after: list[str], ignore_merges: bool = False) -> Tokenizer:
    """Byte-level BPE with special tokens before and after the learned ones."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    _train(tokenizer, before, N_TOKENS - len(after))
    tokenizer.add_special_tokens(after)
    return tokenizer


def _save_fast(tokenizer: Tokenizer, folder: Path, tokenizer_class: str, **special: str | None) -> None:
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(
        folder / "tokenizer_config.json",
        {
            "added_tokens_decoder": {
                str(i): _token(token.content, normalized=False) | {"special": True}
                for i, token in sorted(tokenizer.get_added_tokens_decoder().items())
            },
            **special,
            "clean_up_tokenization_spaces": False,
            "model_max_length": 32768,
            "tokenizer_class": tokenizer_class,
        },
    )
    _write_json(folder / "special_tokens_map.json", {name: token for name, token in special.items() if token})


def arcee(folder: Path) -> None:
    """AFM's, like Llama 3's: words that are tokens need no merges; <|begin_of_text|> before a text."""
    after = ["<|begin_of_text|>", "<|end_of_text|>", "<|im_start|>", "<|im_end|>", "<|finetune_right_pad_id|>"]
    tokenizer = _split_bpe(_words("three", "all"), [], after, ignore_merges=True)
    bos = after[0]
    template = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    _save_fast(tokenizer, folder, "PreTrainedTokenizerFast", bos_token=bos, eos_token=after[3], pad_token=after[4])


def jais2(folder: Path) -> None:
    """Jais-2's: runs of spaces are split into powers of two."""
    after = ["<|eot_id|>", "<|im_end|>"]
    tokenizer = _split_bpe(_words("three", "powers"), ["<|endoftext|>"], after)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    _save_fast(tokenizer, folder, "PreTrainedTokenizerFast", bos_token="<|endoftext|>", eos_token=after[0])


def plm(folder: Path) -> None:
    """PLM's, which is Qwen2's: NFC normalisation, one digit per token, no BOS."""
    after = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = _split_bpe(_words("one", "all"), [], after)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.model.save(str(folder))
    _save_fast(tokenizer, folder, "Qwen2Tokenizer", bos_token=None, eos_token=after[2], pad_token=after[0])


TOKENIZERS: dict[str, Callable[[Path], None]] = {
    "arcee": arcee,
    "falcon": falcon,
    "jais2": jais2,
    "llama": llama,
    "nemotron": nemotron,
    "opt": opt,
    "plm": plm,
}
