"""Small tokenizers built like those of the supported families, and texts of many kinds to test them with."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

N_VOCAB = 3000

_WORDS = """
the of and to in is that it was for on are as with his they at be this have from or one had by word but not what
all were we when your can said there use an each which she do how their if will up other about out many then
them these so some her would make like him into time has look two more write go see number no way could people
my than first water been call who neuron activation model language tokenizer Unicode Hello World PowerInfer I'm
you're don't he's we'll they've it'd Don'T café naïve über Straße œuvre año señor ångström piñata fröhlich
garçon Привет мир как дела слово нейрон Україна їжак Καλημέρα κόσμε λόγος שלום עולם مرحبا بالعالم كلمة العربية
سلام नमस्ते दुनिया हिन्दी বাংলা தமிழ் తెలుగు สวัสดี ชาวโลก 你好 世界 今天 天气 很好 神经 元 こんにちは 世界
カタカナ ひらがな 안녕하세요 세계 한국어 ქართული Հայերեն አማርኛ ខ្មែរ မြန်မာ Việt Nam đường
"""
WORDS = _WORDS.split()

CODE = (
    "def f(x):\n    return x ** 2\n",
    "for (int i = 0; i < n; ++i) {\n\tsum += a[i];\n}",
    "if x != None and y >= 0x1F: pass",
    '<div class="a b">&nbsp;</div>',
    "SELECT id, name FROM t WHERE a = 'b';",
    "import numpy as np  # comment",
    "a->b::c<T&>();",
    '{"key": [1, 2.5e-3, null], "k": true}',
    "x = lambda *args, **kw: None",
    "/* C */ // C++\n#include <stdio.h>",
    "$PATH:~/bin && ls -la | grep x",
)

EMOJI = ("😀", "👍🏽", "👩‍👩‍👧‍👦", "🏳️‍🌈", "🇩🇪🇫🇷", "❤️", "🧑🏿‍🚀", "☎️", "1️⃣", "🤷🏻‍♀️", "🎉🎉", "©️")

SPACES = (
    " ", "  ", "   ", "    ", " " * 9, " " * 33, "\n", "\n\n", "\n\n\n", "\r\n", "\r", "\t", "\t\t", " \n", "\n ",
    " \t ", "\u00a0", "\u2003", "\u3000", "\u2028", "\u0085", "\u200b", "\x0b", "\x0c", "\u202f ", "  \n  \n",
)  # fmt: skip

# First and last code point of stretches whose characters have been in Unicode since before every table in use was made.
_STRETCHES = (
    (0x21, 0x7E), (0xA1, 0x24F), (0x250, 0x2AF), (0x300, 0x36F), (0x391, 0x3A1), (0x3A3, 0x3FF),
    (0x400, 0x481), (0x531, 0x556), (0x5D0, 0x5EA), (0x621, 0x64A), (0x660, 0x669), (0x905, 0x939),
    (0x966, 0x96F), (0xE01, 0xE3A), (0x10D0, 0x10F6), (0x1200, 0x1248), (0x1E00, 0x1EFF), (0x2010, 0x2027),
    (0x2030, 0x205E), (0x2070, 0x2071), (0x2074, 0x208E), (0x20A0, 0x20B5), (0x2150, 0x2184), (0x2190, 0x23FA),
    (0x2460, 0x26FF), (0x2776, 0x2793), (0x3001, 0x303F), (0x3041, 0x3096), (0x30A1, 0x30FA), (0x4E00, 0x9FA5),
    (0xAC00, 0xD7A3), (0xFF01, 0xFF5E), (0x10330, 0x1034A), (0x1D400, 0x1D454), (0x1F300, 0x1F320), (0x1F600, 0x1F64F),
    (0x20000, 0x2A6D6),
)  # fmt: skip


def _piece(random_: random.Random) -> str:
    kind = random_.randrange(12)
    if kind < 3:
        return random_.choice(WORDS)
    if kind == 3:
        word = random_.choice(WORDS)
        return random_.choice(
            (word.upper(), word.capitalize(), word + random_.choice(("'s", "'LL", "'re", "’t", "'d")))
        )
    if kind == 4:
        return "".join(random_.choice("0123456789") for _ in range(random_.randint(1, 12)))
    if kind == 5:
        return random_.choice(SPACES)
    if kind == 6:
        return random_.choice(EMOJI)
    if kind == 7:
        return random_.choice(CODE)
    if kind == 8:
        return "".join(random_.choice("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~") for _ in range(random_.randint(1, 6)))
    if kind == 9:
        return "".join(chr(random_.randrange(0, 0x20)) for _ in range(random_.randint(1, 3)))
    first, last = random_.choice(_STRETCHES)
    return "".join(chr(random_.randint(first, last)) for _ in range(random_.randint(1, 6)))


def texts(n: int, seed: int) -> list[str]:
    """``n`` texts, the same ones for the same seed: many scripts, runs of white space, emoji, code, digits, nothing."""
    random_ = random.Random(seed)
    made = ["", " ", "\n", "\x00"]
    while len(made) < n:
        between = random_.choice(("", "", " ", " ", random_.choice(SPACES)))
        made.append(between.join(_piece(random_) for _ in range(random_.randint(1, 12))))
    return made[:n]


CORPUS = texts(4000, seed=1)
STRINGS = texts(1000, seed=2)


# --- byte-level BPE --------------------------------------------------------------------------------------------------

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = _LLAMA3.replace("{1,3}", "")
_JAIS2 = _LLAMA3.replace(
    r"\s+(?!\S)|\s+",
    "|".join(rf"\s{{{n}}}(?!\S)" for n in (512, 256, 128, 64, 32, 16, 8, 4)) + r"|\s{1,2}(?!\S)|\s{1}",
)


def _split_by(pattern: str) -> Any:
    from tokenizers import Regex, pre_tokenizers

    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), byte_level])


def _gpt2() -> Any:
    from tokenizers import pre_tokenizers

    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def _falcon() -> Any:
    from tokenizers import Regex, pre_tokenizers

    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Punctuation("contiguous"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
            pre_tokenizers.Digits(individual_digits=False),
            pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), "isolated"),
        ]
    )


@dataclass(frozen=True)
class ByteLevelFamily:
    """How a family's tokenizer.json is put together."""

    pre_tokenizer: Callable[[], Any]
    pre: str
    """the name llama.cpp has for it"""
    specials: tuple[str, ...]
    eos: str
    bos: str | None = None
    """put before every text"""
    ignore_merges: bool = False
    normalizer: str | None = None
    specials_first: bool = False


FAMILIES: Mapping[str, ByteLevelFamily] = {
    "opt": ByteLevelFamily(
        _gpt2, "gpt-2", ("<s>", "<pad>", "</s>", "<unk>"), "</s>", bos="</s>", specials_first=True
    ),
    "falcon": ByteLevelFamily(
        _falcon, "falcon", (">>TITLE<<", ">>ABSTRACT<<", "<|endoftext|>"), "<|endoftext|>", specials_first=True
    ),
    "arcee": ByteLevelFamily(
        lambda: _split_by(_LLAMA3), "llama-bpe", ("<|begin_of_text|>", "<|end_of_text|>", "<|im_start|>", "<|im_end|>"),
        "<|im_end|>", bos="<|begin_of_text|>", ignore_merges=True,
    ),
    "llama3-merges": ByteLevelFamily(
        lambda: _split_by(_LLAMA3), "smaug-bpe", ("<|begin_of_text|>", "<|end_of_text|>"), "<|end_of_text|>"
    ),
    "plm": ByteLevelFamily(
        lambda: _split_by(_QWEN2), "qwen2", ("<|endoftext|>", "<|im_start|>", "<|im_end|>"), "<|im_end|>",
        normalizer="NFC",
    ),
    "jais2": ByteLevelFamily(
        lambda: _split_by(_JAIS2), "jais-2", ("<|begin_of_text|>", "<|endoftext|>", "<|pad|>"), "<|endoftext|>",
        bos="<|begin_of_text|>",
    ),
}  # fmt: skip


def train_byte_level(family: ByteLevelFamily) -> Any:
    """A ``tokenizers.Tokenizer`` of that family, trained on CORPUS."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE(ignore_merges=family.ignore_merges))
    if family.normalizer:
        tokenizer.normalizer = getattr(normalizers, family.normalizer)()
    tokenizer.pre_tokenizer = family.pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=N_VOCAB - 10,
        special_tokens=list(family.specials) if family.specials_first else [],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens(list(family.specials))
    if family.bos:
        around = [(family.bos, tokenizer.token_to_id(family.bos))]
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{family.bos} $A", special_tokens=around)
    return tokenizer


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def write_byte_level(folder: Path, name: str, tokenizer: Any) -> None:
    """A checkpoint folder with tokenizer.json."""
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(folder / "tokenizer_config.json", {"eos_token": FAMILIES[name].eos, "bos_token": FAMILIES[name].bos})


def write_opt(folder: Path, tokenizer: Any) -> None:
    """The files of an OPT checkpoint: GPT-2's two and the special tokens."""
    model = json.loads(tokenizer.to_str())["model"]
    write_json(folder / "vocab.json", model["vocab"])
    pairs = [" ".join(pair) if isinstance(pair, list) else pair for pair in model["merges"]]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(pairs) + "\n", encoding="utf-8")
    named = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}
    token = {"__type": "AddedToken", "lstrip": False, "rstrip": False, "single_word": False, "normalized": True}
    write_json(folder / "special_tokens_map.json", {key: {"content": text, **token} for key, text in named.items()})
    config = {"add_bos_token": True, "add_prefix_space": False, "tokenizer_class": "GPT2Tokenizer", "errors": "replace"}
    write_json(folder / "tokenizer_config.json", config | {k: {"content": t, **token} for k, t in named.items()})


# --- SentencePiece ---------------------------------------------------------------------------------------------------

SENTENCEPIECE: Mapping[str, Mapping[str, Any]] = {
    "llama": {},
    "minicpm": {"user_defined_symbols": ["<用户>", "<AI>"], "split_digits": True},
    "nemotron": {"pad_id": 0, "unk_id": 1, "bos_id": 2, "eos_id": 3, "split_digits": True},
    "no-prefix": {"add_dummy_prefix": False},
}


def train_sentencepiece(**options: Any) -> bytes:
    """A ``tokenizer.model`` with the settings of Llama's, overridden by ``options``."""
    from sentencepiece import SentencePieceTrainer

    written = io.BytesIO()
    settings: dict[str, Any] = {
        "model_type": "bpe", "vocab_size": N_VOCAB - 10, "byte_fallback": True, "character_coverage": 0.98,
        "normalization_rule_name": "identity", "remove_extra_whitespaces": False, "allow_whitespace_only_pieces": True,
        "max_sentence_length": 10000, "minloglevel": 2, "num_threads": 1, "pad_id": -1,
        "unk_id": 0, "bos_id": 1, "eos_id": 2,
    }  # fmt: skip
    # Its training reads lines, which hold no line ends and no zero bytes.
    lines = [line for text in CORPUS for line in text.replace("\x00", "").splitlines() if line]
    SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=written, **(settings | options))
    return written.getvalue()


def sentencepiece_as_json(model: bytes) -> dict[str, Any]:
    """The tokenizer.json that converters make of a SentencePiece model with byte fallback."""
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(model_proto=model)
    pieces = [processor.id_to_piece(i) for i in range(processor.get_piece_size())]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    merges = []
    normal = [
        i for i in vocab.values() if not (processor.is_control(i) or processor.is_unknown(i) or processor.is_byte(i))
    ]
    for id_ in sorted(normal, key=processor.get_score, reverse=True):
        cuts = [(pieces[id_][:n], pieces[id_][n:]) for n in range(1, len(pieces[id_]))]
        merges += sorted(
            (cut for cut in cuts if cut[0] in vocab and cut[1] in vocab), key=lambda c: (vocab[c[0]], vocab[c[1]])
        )
    added = [
        {"id": i, "content": pieces[i], "special": True, "normalized": False, "lstrip": False, "rstrip": False,
         "single_word": False}
        for i in range(3)
    ]  # fmt: skip
    return {
        "version": "1.0",
        "added_tokens": added,
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "BPE", "unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True, "vocab": vocab,
            "merges": merges,
        },
    }  # fmt: skip
