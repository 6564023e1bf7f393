"""Texts that tell one tokenizer from another."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

_PLAIN = (
    "",
    "a",
    " ",
    "  ",
    "   ",
    "    ",
    " " * 17,
    "\n",
    "\n\n",
    "\n\n\n",
    "\t",
    "\t\t",
    "\r\n",
    "\r",
    " \n",
    "\n ",
    " \n \n ",
    "  \n\t \r\n  x",
    "Hello world",
    "Hello, world!",
    " Hello",
    "  Hello  World  ",
    "Once upon a time, there was a little girl who lived in a house.",
    "The quick brown fox jumps over the lazy dog. THE QUICK BROWN FOX!",
    "I'm you're he's she'd we'll they've don't it's",
    "I'M YOU'RE HE'S SHE'D WE'LL THEY'VE DON'T IT'S",
    "'s't're've'm'll'd 's 't ''s '''",
    "rock'n'roll o'clock l'eau qu'il d'être",
    "0 1 12 123 1234 12345 123456 1234567 12345678 123456789",
    "1234567890" * 4,
    "3.14159 -2.5e-10 1,000,000 $19.99 50% 0x1F 1/2 2nd",
    "a1b2c3 x86_64 v2.0.1 abc123def 12ab34",
    "2024-01-31T23:59:59Z",
    "...",
    "!!! ??? --- === ### *** +++ ~~~ ^^^ ``` ||| <<< >>>",
    "(a) [b] {c} <d> \"e\" 'f' `g` “h” ‘i’ «j»",
    "a+b=c; x<y>z ^~|`$",
    "hello... world!! wait?? (ok)",
    "foo_bar fooBar FooBar foo-bar foo.bar foo/bar foo\\bar",
    "user@example.org https://example.org/a?b=c&d=e#f",
    "def f(x):\n    if x > 0:\n        return x ** 2\n    return None\n",
    "int main(void) {\n\tprintf(\"%d\\n\", 42);\n\treturn 0;\n}\n",
    "<div class=\"a\">\n  <p>text</p>\n</div>",
    "SELECT * FROM t WHERE a = 'b' AND c != 3;",
    "x   y    z     w",
    "tab\tseparated\t\tvalues",
    "line one\nline two\r\nline three\n\n\nline six",
    "trailing spaces   ",
    "trailing newline\n",
    "\u00a0non\u00a0breaking\u2003em\u3000wide\u2028line\u0085next",
    "zero\u200bwidth\u200djoin\ufeffmark\u00adhyphen",
    "control\x00\x01\x02\x1b\x1c\x1f\x7fcharacters",
    "vertical \x0b \x0b\n\x0b\n tab",
    "café naïve Ångström jalapeño Übergröße œuvre",
    "Привет, мир! Как дела?",
    "Καλημέρα κόσμε",
    "שלום עולם",
    "مرحبا بالعالم، كيف الحال؟ ١٢٣",
    "नमस्ते दुनिया १२३",
    "สวัสดีชาวโลก",
    "你好，世界！今天天气很好。",
    "こんにちは世界。カタカナ",
    "안녕하세요 세계",
    "Xin chào thế giới",
    "Привіт ґанок їжак єнот",
    "ქართული ენა Հայերեն",
    "தமிழ் తెలుగు বাংলা",
    "😀 😃😄 👍🏽 👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪🇫🇷 ❤️",
    "math ∑∫∂√∞≠≤≥ ½ ¼ ² ³ ⁴ Ⅷ ① ㊿",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𝟏𝟐𝟑 𐍈 𠜎𠜱",
    "ab你cd好ef12文34",
    "e\u0301a\u0308 n\u0303",
    "ＦＵＬＬ　ｗｉｄｔｈ １２３ ﬁ ﬂ ™",
    "▁underscore ▁▁ low _ line",
    "[INST] hi [/INST] <<SYS>> <|x|> </x> <0x41>",
    "\u0130\u0131\u1e9e\u017f",
    "a" * 70,
    "aAbBcC" * 8,
    "!" * 20 + " " * 9 + "?" * 5,
    "-" * 40 + "\n" + "=" * 40,
    "one\ttwo  three   four\n\tfive \t six",
    "Müller's 3rd café—costs €5,00 (≈$5.40)!",
    "\\u0041 \\n %s {0} ${x} #{y} @z",
    "word " * 12,
)  # fmt: skip

_MAX_FROM_VOCABULARY = 600


def plain_probes() -> Sequence[str]:
    """About a hundred short texts of many kinds, without control tokens of any model."""
    return _PLAIN


def vocabulary_probes(texts: Sequence[str]) -> Iterator[str]:
    """Texts made of tokens from all over the vocabulary: alone, after a space, and next to each other."""
    step = max(1, len(texts) // _MAX_FROM_VOCABULARY)
    chosen = texts[::step]
    for i, text in enumerate(chosen):
        yield (text, " " + text, text + chosen[(7 * i + 3) % len(chosen)])[i % 3]


def special_probes(token: str) -> Iterator[str]:
    """A control token by itself, in the middle of a text, beside spaces, and twice."""
    yield token
    yield f"Hello{token}world"
    yield f" a {token} b "
    yield f"{token}{token}\n{token}x"
