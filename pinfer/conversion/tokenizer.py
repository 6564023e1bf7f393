"""Converts the tokenizer of a checkpoint folder to the ``tokenizer.`` keys of a GGUF, checked against the original.

llama.cpp identifies a byte-level tokenizer's way of splitting text by a name only. The name is found by trial: the
vocabulary is loaded into libllama with each candidate, and the first that gives the same ids as the checkpoint's own
tokenizer for every probe is used. If none does, nothing is written.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gguf import GGUFWriter

from pinfer.conversion.checkpoint import read_object
from pinfer.conversion.hints import DOWNLOAD_AGAIN
from pinfer.conversion.tokenizer_files import (
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Vocabulary,
    read_vocabulary,
)
from pinfer.conversion.tokenizer_original import BYTES, SPACE, JsonTokenizer
from pinfer.conversion.tokenizer_probes import plain_probes, special_probes, vocabulary_probes
from pinfer.errors import PinferError
from pinfer.llama.vocab import LlamaVocab, VocabFile

__all__ = ["TokenizerReport", "add_tokenizer"]

# One name for each way of splitting that llama.cpp knows. The first set takes a word whole if it is in the vocabulary
# (tokenizer.json's ignore_merges).
_WHOLE_TOKEN = ("llama-bpe", "glm4", "tekken", "minicpm5", "youtu")
_BY_MERGES = (
    "gpt-2", "falcon", "qwen2", "smaug-bpe", "jais-2", "starcoder", "qwen35", "gpt-4o", "deepseek-llm",
    "deepseek-coder", "deepseek-v3", "default", "bloom", "viking", "chameleon", "superbpe", "bailingmoe", "seed-coder",
    "exaone-moe", "afmoe", "tiny_aya", "ufakzeka", "laguna", "spark2_5",
)  # fmt: skip
_SPECIAL = ("bos", "eos", "unk", "sep", "pad", "mask")
_UNUSED_SCORE = -10000.0
_SMALL_MERGES = 3000


@dataclass(frozen=True)
class TokenizerReport:
    """What was written and how it was checked."""

    model: str
    """``llama`` (SentencePiece) or ``gpt2`` (byte-level BPE)"""
    pre: str
    """the pre-tokenizer's name; ``default`` for SentencePiece"""
    n_tokens: int
    """tokens of the checkpoint; the rest of the embedding's rows became unused tokens"""
    verified_with: str
    """the library that ran the original: ``tokenizers`` or ``sentencepiece``"""
    n_strings: int
    """texts compared; all had equal ids"""
    notes: tuple[str, ...]
    """where libllama differs from the original, a line each"""


def add_tokenizer(folder: Path, config: Mapping[str, Any], n_vocab: int, header: GGUFWriter) -> TokenizerReport:
    """Adds the tokenizer of ``folder`` to ``header``; ``config`` is config.json, ``n_vocab`` the embedding's rows.

    Raises PinferError if there is no tokenizer, if it is damaged or of a kind that llama.cpp does not know, or if
    libllama would give other ids than the original for ordinary text.
    """
    tokenizer_config = read_object(folder / "tokenizer_config.json") or {}
    vocabulary = read_vocabulary(folder, tokenizer_config, n_vocab)
    notes = _finish(vocabulary, n_vocab)
    n_tokens = sum(text is not None for text in vocabulary.tokens)
    texts = _fill_holes(vocabulary, n_vocab)
    specials = _special_ids(folder, config, tokenizer_config, vocabulary, texts)
    keys = _around(tokenizer_config, config, vocabulary, specials)

    pre, n_strings, found = _verify(vocabulary, texts, specials, keys)
    if vocabulary.model == "llama" and tokenizer_config.get("legacy") is False:
        found.append("after a special token llama.cpp inserts a space, the checkpoint's tokenizer does not")
    _write(header, vocabulary, texts, specials, keys)
    header.add_tokenizer_pre(pre)
    template = _chat_template(folder, tokenizer_config)
    if template is not None:
        header.add_chat_template(template)
    return TokenizerReport(
        model=vocabulary.model,
        pre=pre,
        n_tokens=n_tokens,
        verified_with=vocabulary.original.library,
        n_strings=n_strings,
        notes=(*notes, *found),
    )


# --- completing the vocabulary ---------------------------------------------------------------------------------------


def _finish(vocabulary: Vocabulary, n_vocab: int) -> list[str]:
    """Adds the added tokens; those without a row in the embedding are left out, with a note."""
    if len(vocabulary.tokens) > n_vocab:
        raise PinferError(
            f"{vocabulary.source} has {len(vocabulary.tokens)} tokens, the model's embedding has {n_vocab} rows",
            "the tokenizer belongs to another model: get the one of this checkpoint",
        )
    left_out = [token for token in vocabulary.added if token.id >= n_vocab]
    vocabulary.added = [token for token in vocabulary.added if token.id < n_vocab]
    for token in vocabulary.added:
        known = token.id < len(vocabulary.tokens) and vocabulary.tokens[token.id] == token.text
        if known and vocabulary.types[token.id] == UNKNOWN:
            continue
        score = vocabulary.scores[token.id] if known and vocabulary.model == "llama" else 0.0
        vocabulary.put(token.id, token.text, CONTROL if token.special else USER_DEFINED, score)
    if not left_out:
        return []
    names = ", ".join(repr(token.text) for token in left_out[:3])
    return [f"{len(left_out)} added tokens have no row in the embedding and were left out ({names})"]


def _fill_holes(vocabulary: Vocabulary, n_vocab: int) -> list[str]:
    """The text of every row of the embedding; unused rows get unique names."""
    seen: dict[str, int] = {}
    for id_, text in enumerate(vocabulary.tokens):
        if text is None:
            continue
        # libllama ends the process if two tokens share a text, and renames empty ones.
        if text in seen or not text:
            raise PinferError(
                f"{vocabulary.source} has the token {text!r} twice, as {seen.get(text, id_)} and {id_}", DOWNLOAD_AGAIN
            )
        seen[text] = id_
    texts = []
    for id_ in range(n_vocab):
        known = vocabulary.tokens[id_] if id_ < len(vocabulary.tokens) else None
        name = f"[PAD{id_}]"
        while known is None and name in seen:
            name += "_"
        if known is None:
            vocabulary.put(id_, name, UNUSED, _UNUSED_SCORE)
        texts.append(name if known is None else known)
    return texts


# --- special tokens --------------------------------------------------------------------------------------------------


def _special_ids(
    folder: Path,
    config: Mapping[str, Any],
    tokenizer_config: Mapping[str, Any],
    vocabulary: Vocabulary,
    texts: Sequence[str],
) -> dict[str, int]:
    """Ids by GGUF's names, from the tokenizer's files, else the model's, else the vocabulary's defaults."""
    by_text = {text: id_ for id_, text in enumerate(texts)}
    special_map = read_object(folder / "special_tokens_map.json") or {}
    generation = read_object(folder / "generation_config.json") or {}
    found: dict[str, int] = {}
    ends: list[int] = []
    for name in _SPECIAL:
        ids: list[int] = []
        for source in (tokenizer_config, special_map):
            value = source.get(f"{name}_token")
            text = value.get("content") if isinstance(value, dict) else value
            if isinstance(text, str) and text in by_text:
                ids.append(by_text[text])
        for source in (generation, config):
            value = source.get(f"{name}_token_id")
            ids += [i for i in (value if isinstance(value, list) else [value]) if isinstance(i, int)]
        if name in vocabulary.defaults:
            ids.append(vocabulary.defaults[name])
        ids = [i for i in dict.fromkeys(ids) if 0 <= i < len(texts)]
        if ids:
            found[name] = ids[0]
        if name == "eos":
            listed = generation.get("eos_token_id", config.get("eos_token_id"))
            ends = [i for i in ids[1:] if isinstance(listed, list) and i in listed]
    # If several tokens end an answer, GGUF has two more keys for them.
    found |= dict(zip(("eot", "eom"), ends, strict=False))
    if "eos" not in found:
        raise PinferError(
            f"no file of {folder} names the token that ends a text", "add eos_token to its tokenizer_config.json"
        )
    return found


def _around(
    tokenizer_config: Mapping[str, Any], config: Mapping[str, Any], vocabulary: Vocabulary, specials: dict[str, int]
) -> dict[str, bool]:
    """Whether BOS and EOS are added to a text; ``specials`` gets the tokens that the tokenizer actually adds."""
    before, after = vocabulary.original.around()
    if len(before) > 1 or len(after) > 1:
        raise PinferError(
            f"{vocabulary.source} puts {len(before)} tokens before and {len(after)} after every text",
            "use another model: llama.cpp can add one of each",
        )
    keys = {"add_bos_token": bool(before), "add_eos_token": bool(after)}
    if vocabulary.source.name == "vocab.json" and config.get("model_type") == "opt":
        keys["add_bos_token"] = True  # OPT was trained so, but GPT-2's files do not say it
    for name in keys:
        if isinstance(tokenizer_config.get(name), bool):
            keys[name] = tokenizer_config[name]
    if before and keys["add_bos_token"] and not isinstance(tokenizer_config.get("add_bos_token"), bool):
        specials["bos"] = before[0]
    if after and keys["add_eos_token"] and not isinstance(tokenizer_config.get("add_eos_token"), bool):
        specials["eos"] = after[0]
    if keys["add_bos_token"] and "bos" not in specials:
        keys["add_bos_token"] = False
    return keys


def _chat_template(folder: Path, tokenizer_config: Mapping[str, Any]) -> str | list[dict[str, str]] | None:
    """The chat template: from its own file, else from tokenizer_config.json, as in transformers."""
    inline: Any = tokenizer_config.get("chat_template")
    if isinstance(inline, list):
        named = {
            str(t["name"]): str(t["template"]) for t in inline if isinstance(t, dict) and {"name", "template"} <= set(t)
        }
    else:
        named = {"default": inline} if isinstance(inline, str) else {}
    try:
        for path in sorted((folder / "additional_chat_templates").glob("*.jinja")):
            named[path.stem] = path.read_text(encoding="utf-8")
        if (folder / "chat_template.jinja").is_file():
            named["default"] = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise PinferError(f"a chat template of {folder} cannot be read: {error}", DOWNLOAD_AGAIN) from None
    if not named:
        return None
    if set(named) == {"default"}:
        return named["default"]
    return [{"name": name, "template": template} for name, template in named.items()]


# --- the keys --------------------------------------------------------------------------------------------------------


def _write(
    header: GGUFWriter,
    vocabulary: Vocabulary,
    texts: Sequence[str],
    specials: Mapping[str, int],
    keys: Mapping[str, bool],
) -> None:
    """Adds every key except the pre-tokenizer's name and the chat template."""
    header.add_tokenizer_model(vocabulary.model)
    header.add_token_list(list(texts))
    header.add_token_types(vocabulary.types)
    if vocabulary.model == "llama":
        header.add_token_scores(vocabulary.scores)
    else:
        header.add_token_merges(vocabulary.merges)
    for name, id_ in specials.items():
        getattr(header, f"add_{name}_token_id")(id_)
    for name, value in keys.items():
        getattr(header, f"add_{name}")(value)
    if vocabulary.add_space_prefix is not None:
        header.add_add_space_prefix(vocabulary.add_space_prefix)


# --- comparing with the original -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Probes:
    """Texts and the ids that the original gives."""

    texts: list[str]
    ids: list[list[int]]
    changed: list[str]
    """texts that the original rewrites first; libllama does not, so their ids may differ"""


def _verify(
    vocabulary: Vocabulary, texts: Sequence[str], specials: Mapping[str, int], keys: Mapping[str, bool]
) -> tuple[str, int, list[str]]:
    """The pre-tokenizer's name, the number of equal texts, and where libllama differs."""
    probes = _probes(vocabulary, texts)
    first: str | None = None
    with tempfile.TemporaryDirectory(prefix="pinfer-") as folder:
        for prefix in (True, False) if vocabulary.model == "llama" and vocabulary.add_space_prefix is None else (None,):
            if prefix is not None:
                vocabulary.add_space_prefix = prefix
            header = GGUFWriter(None, "llama")
            _write(header, vocabulary, texts, specials, keys)
            file = VocabFile(Path(folder, "vocab.gguf"), header)
            for pre in _candidates(vocabulary, Path(folder, "small.gguf")):
                file.set_pre(pre)
                with LlamaVocab(file.path) as vocab:
                    wrong = _first_difference(probes, vocab)
                    if wrong is None:
                        return pre, len(probes.texts), _notes(vocabulary, probes, vocab, keys, specials)
                first = first or wrong
    raise PinferError(
        f"llama.cpp has no tokenizer that agrees with {vocabulary.source}: {first}",
        "please report this model",
    )


def _probes(vocabulary: Vocabulary, texts: Sequence[str]) -> _Probes:
    wanted = list(plain_probes())
    wanted += vocabulary_probes(_readable(vocabulary, texts))
    # Texts with control tokens are compared separately, because libllama handles those differently.
    apart = [t.text for t in vocabulary.added if t.special or not t.plain or vocabulary.model == "llama"]
    wanted = [text for text in dict.fromkeys(wanted) if not any(token in text for token in apart)]
    changed = [text for text in wanted if vocabulary.original.is_changed(text)]
    fixed = set(changed)
    kept = [text for text in wanted if text not in fixed]
    return _Probes(kept, vocabulary.original.encode(kept, parse_special=False), changed)


def _readable(vocabulary: Vocabulary, texts: Sequence[str]) -> list[str]:
    """Tokens that are valid text by themselves, decoded."""
    found = []
    for text, kind in zip(texts, vocabulary.types, strict=True):
        if kind != NORMAL:
            continue
        if vocabulary.model == "llama":
            found.append(text.replace(SPACE, " "))
            continue
        try:
            found.append(bytes(BYTES[c] for c in text).decode("utf-8"))
        except (KeyError, UnicodeDecodeError):
            continue
    return found


def _candidates(vocabulary: Vocabulary, path: Path) -> Iterator[str]:
    """Names of pre-tokenizers: likely ones, then those that agree on a vocabulary of the first merges only.

    Loading a large vocabulary for every name would take minutes. The small one is written to ``path``.
    """
    if vocabulary.model == "llama":
        yield "default"
        return
    names = _WHOLE_TOKEN if vocabulary.ignore_merges else _BY_MERGES
    others = _BY_MERGES if vocabulary.ignore_merges else _WHOLE_TOKEN
    guess = [name for name in _guess(vocabulary.pre_tokenizer) if name in names]
    yield from guess
    rest = [name for name in (*names, *others) if name not in guess]
    file, probes = _small(vocabulary, path)
    for name in rest:
        file.set_pre(name)
        with LlamaVocab(path) as vocab:
            agrees = _first_difference(probes, vocab) is None
        if agrees:
            yield name


def _small(vocabulary: Vocabulary, path: Path) -> tuple[VocabFile, _Probes]:
    """The tokenizer with only its first merges, and its ids for the probes."""
    merges = vocabulary.merges[:_SMALL_MERGES]
    pairs = [tuple(merge.split(" ")) for merge in merges]
    tokens = list(dict.fromkeys([*BYTES, *(text for pair in pairs for text in (*pair, "".join(pair)))]))
    original = vocabulary.original
    assert isinstance(original, JsonTokenizer)
    texts = [text for text in plain_probes() if not original.is_changed(text)]
    ids = original.with_merges(tokens, pairs).encode(texts, parse_special=False)
    header = GGUFWriter(None, "llama")
    header.add_tokenizer_model("gpt2")
    header.add_token_list(tokens)
    header.add_token_types([NORMAL] * len(tokens))
    header.add_token_merges(merges)
    header.add_add_bos_token(False)
    return VocabFile(path, header), _Probes(texts, ids, [])


def _guess(pre_tokenizer: Mapping[str, Any]) -> list[str]:
    """Names suggested by the description in tokenizer.json."""
    steps = pre_tokenizer.get("pretokenizers") or [pre_tokenizer]
    kinds = [step.get("type") for step in steps]
    patterns = " ".join(str((step.get("pattern") or {}).get("Regex", "")) for step in steps)
    if "Punctuation" in kinds:
        return ["falcon"]
    if "Digits" in kinds:
        return ["starcoder"]
    if "{512}" in patterns:
        return ["jais-2"]
    if r"\p{N}{1,3}" in patterns:
        return ["llama-bpe", "smaug-bpe"]
    return ["qwen2"] if r"\p{N}" in patterns else ["gpt-2"]


def _first_difference(probes: _Probes, vocab: LlamaVocab, *, parse_special: bool = False) -> str | None:
    for text, ids in zip(probes.texts, probes.ids, strict=True):
        got = vocab.tokenize(text, parse_special=parse_special)
        if got != ids:
            return f"{text!r} gives {_short(ids)}, libllama {_short(got)}"
    return None


def _short(ids: Sequence[int]) -> str:
    return str(list(ids[:12]))[:-1] + (", …]" if len(ids) > 12 else "]")


def _notes(
    vocabulary: Vocabulary, probes: _Probes, vocab: LlamaVocab, keys: Mapping[str, bool], specials: Mapping[str, int]
) -> list[str]:
    """Differences beyond plain text: rewritten texts, and added tokens. BOS and EOS never differ."""
    around = vocab.tokenize("a", add_special=True)
    inner = vocab.tokenize("a")
    before = [specials["bos"]] if keys["add_bos_token"] else []
    after = [specials["eos"]] if keys["add_eos_token"] else []
    if around != before + inner + after:
        raise AssertionError(f"libllama puts {around} around {inner}, not {before} and {after}")
    notes = []
    different = [
        text
        for text, ids in zip(
            probes.changed, vocabulary.original.encode(probes.changed, parse_special=False), strict=True
        )
        if vocab.tokenize(text) != ids
    ]
    if different:
        notes.append(
            "the tokenizer rewrites some texts before splitting them (its normalizer, characters it has no token for), "
            f"llama.cpp does not: {different[0]!r} gives other tokens"
        )
    kept = [token for token in vocabulary.added if vocabulary.types[token.id] in (CONTROL, USER_DEFINED, UNKNOWN)]
    marked = [text for token in kept[:: max(1, len(kept) // 20)] for text in special_probes(token.text)]
    for parse, where in ((False, "read as text"), (True, "in a chat")):
        ids = vocabulary.original.encode(marked, parse_special=parse)
        wrong = _first_difference(_Probes(marked, ids, []), vocab, parse_special=parse)
        if wrong is not None:
            notes.append(f"special tokens {where} can differ: {wrong}")
    return notes
