"""Checks that the tests' original tokenizers equal transformers' classes: run with a Python that has transformers.

    python tools/models_tokenizers.py

It trains the tests' small tokenizers, writes each as its checkpoint has it into a temporary folder, loads that with
transformers, and compares the ids of the tests' 1,000 texts. It leaves nothing behind.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from support.tokenizer_originals import (
    FAMILIES,
    SENTENCEPIECE,
    STRINGS,
    sentencepiece_as_json,
    train_byte_level,
    train_sentencepiece,
    write_byte_level,
    write_json,
    write_opt,
)

_NAMED = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "add_bos_token": True}


def check() -> dict[str, int]:
    """Number of texts that differ, by what was compared; all zero if the tests' originals are right."""
    from sentencepiece import SentencePieceProcessor
    from transformers import GPT2Tokenizer, LlamaTokenizer, PreTrainedTokenizerFast

    found = {}
    for name, family in FAMILIES.items():
        tokenizer = train_byte_level(family)
        expected = [tokenizer.encode(text).ids for text in STRINGS]
        found[name] = _count(
            PreTrainedTokenizerFast, expected, STRINGS, partial(write_byte_level, name=name, tokenizer=tokenizer)
        )
        if name == "opt":
            with_bos = [[2, *tokenizer.encode(text, add_special_tokens=False).ids] for text in STRINGS]
            found["opt, GPT2Tokenizer"] = _count(
                GPT2Tokenizer, with_bos, STRINGS, partial(write_opt, tokenizer=tokenizer)
            )
    # LlamaTokenizer writes one space less where a text begins with one: there SentencePiece is the model's authority.
    strings = [text for text in STRINGS if not text.startswith((" ", "▁"))]
    for name in ("llama", "minicpm"):
        model = train_sentencepiece(**SENTENCEPIECE[name])
        processor: Any = SentencePieceProcessor(model_proto=model)
        expected = [[1, *ids] for ids in processor.encode(strings)]
        found[f"{name}, LlamaTokenizer"] = _count(LlamaTokenizer, expected, strings, partial(_write_model, model=model))
        if name == "llama":
            everything = processor.encode(STRINGS)
            found["llama, tokenizer.json"] = _count(
                PreTrainedTokenizerFast, everything, STRINGS, partial(_write_as_json, model=model)
            )
    return found


def _write_model(folder: Path, model: bytes) -> None:
    (folder / "tokenizer.model").write_bytes(model)
    write_json(folder / "tokenizer_config.json", _NAMED)


def _write_as_json(folder: Path, model: bytes) -> None:
    write_json(folder / "tokenizer.json", sentencepiece_as_json(model))
    write_json(folder / "tokenizer_config.json", _NAMED | {"add_bos_token": False})


def _count(kind: Any, expected: Sequence[list[int]], strings: Sequence[str], write: Callable[[Path], None]) -> int:
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        tokenizer = kind.from_pretrained(folder)
    got = tokenizer(list(strings))["input_ids"]
    wrong = [(text, a, b) for text, a, b in zip(strings, expected, got, strict=True) if a != b]
    for text, a, b in wrong[:1]:
        print(f"  {text!r}: {a[:12]} {b[:12]}", file=sys.stderr)
    return len(wrong)


def main() -> int:
    """Prints a line for each comparison; returns 1 if any text differs."""
    found = check()
    for name, wrong in found.items():
        print(f"{name:28} {wrong or 'no'} text{'' if wrong == 1 else 's'} of {len(STRINGS)} differ")
    return int(any(found.values()))


if __name__ == "__main__":
    sys.exit(main())
