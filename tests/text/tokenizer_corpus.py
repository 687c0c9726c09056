"""Lines of mixed text to tokenise: sentences and words of many scripts, code, numbers, emoji, odd spaces and marks."""

from __future__ import annotations

import inspect
import json.decoder
import random
import textwrap
import tokenize
import unicodedata
from collections.abc import Callable

_SENTENCES = (
    "The quick brown fox jumps over the lazy dog; it wasn't 3.14 o'clock yet!",
    "I'M SURE HE'LL'VE SAID: \"we'd've, y'all'd've\" -- don't you think?",
    "Größere Straßenbahnen fahren übers Öl, ÄRGER mit Übermaß.",
    "L'été déjà, Noël à Besançon où naît l'œuvre ÉTERNELLE.",
    "Зелёный ЁЖИК в тумане съел 12,5 кг яблок за 3 дня.",
    "Ο Γιάννης αγόρασε 25 ΜΉΛΑ από την Αθήνα.",
    "İstanbul'da ığdır ağacı ŞEKER ĞÜZEL.",
    "Tiếng Việt có nhiều dấu: đường, nguyễn, ỨNG DỤNG.",
    "人工智能正在改变世界，2024年有1000多个模型。",
    "東京は日本の首都です。カタカナとひらがな、漢字ｶﾅ全角ＡＢＣ１２３！",
    "한국어 문장은 띄어쓰기가 있습니다. 가나다라 ㅋㅋㅋ 123개",
    "नमस्ते दुनिया, हिन्दी में १२३ अंक हैं।",
    "สวัสดีชาวโลก ราคา ๕๐๐ บาท",
    "مرحبا بالعالم، لدي ٤٥ تفاحة و٦٧ برتقالة.",
    "שָׁלוֹם עוֹלָם, 42 ספרים",
    "বাংলা ভাষা ২১শে ফেব্রুয়ারি",
    "தமிழ் மொழி 100 ஆண்டுகள்",
    "ქართული ენა ᲥᲐᲠᲗᲣᲚᲘ და Հայերեն լեզու",
    "ខ្ញុំស្រឡាញ់ភាសាខ្មែរ ລາວ မြန်မာ",
    "Emoji: 😀👍🏽👩‍👩‍👧‍👦🏳️‍🌈🇩🇪🇯🇵 ❤️ ☃︎ 🤷🏻‍♀️ ok",
    "math: ∀x∈ℝ, ∑ᵢ xᵢ² ≤ ½·π⁻¹ ⇒ ∞ ≠ ∅, ℂ ⊂ ℍ, Ω K Å µm",
    "fractions ½ ¾ ⅞ Ⅷ ⅻ ① ㊿ 四 ٣ ၅ 𝟘𝟙𝟚 ²³",
    "URL https://example.org/a_b/c-d?x=1&y=%20#frag, mail a.b+c@d.example",
    "price $1,234,567.89 or €99 £5 ¥1000 ₹50 1e-10 0xDEADBEEF 1_000_000 007",
    "CamelCaseWords snake_case_words kebab-case XMLHttpRequest iPhone15Pro aB1c2D",
    "<|notatoken|> <think> </s> [INST] <<SYS>> <0x0A> ▁under ▁▁ <unk>",
    "ﬁne ligatures ǅ ǈ ʰʲ ƻǀǁ ªº ⓐⒷ 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𐐀𐐨 ꙮ",
)
_SPACES = (" ", "  ", "   ", "\t", "\t\t", "\n", "\n\n", "\r\n", "\r", " \n", "\n ", "\n\t", "\xa0", "\u2003")
_ODD_SPACES = ("\u3000", "\u2028", "\u2029", "\x0b", "\x0c", "\x85", "\u200b", "\ufeff", "\u1680", "\u202f")
_MARKS = "\u0301\u0308\u0303\u0327\u20dd\u0e31\u093f\u064b\u05b8\ufe0f\u3099"
_CONTROLS = "\x01\x1b\x7f\x80\x9f\xad\u200d\u2060\u202e\ufffd\ufffc\ue000\U000f0000\ufdd0\uffff\U0010ffff"
_PUNCTUATION = "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~…“”‘’«»—–·、。！？「」（）：；¿¡§¶†‡•"


def corpus(count: int, seed: int = 0) -> list[str]:
    """`count` different lines, the same ones for the same seed."""
    draw = random.Random(seed)
    makers: tuple[Callable[[random.Random], str], ...] = (
        _sentence,
        _mixed,
        _mixed,
        _code,
        _numbers,
        _decomposed,
        _noise,
    )
    lines: dict[str, None] = dict.fromkeys(_SENTENCES)
    while len(lines) < count:
        lines[draw.choice(makers)(draw)] = None
    return list(lines)[:count]


def _sentence(draw: random.Random) -> str:
    return draw.choice(_SPACES[:6]).join(draw.choice(_SENTENCES) for _ in range(draw.randint(1, 3)))


def _mixed(draw: random.Random) -> str:
    words = [word for sentence in draw.sample(_SENTENCES, 4) for word in sentence.split(" ")]
    parts = []
    for _ in range(draw.randint(2, 14)):
        word = draw.choice(words)
        parts += [draw.choice((word, word[: draw.randint(1, 4)], word.upper(), word.title())), draw.choice(_SPACES)]
        if draw.random() < 0.2:
            parts.append(draw.choice(_PUNCTUATION) * draw.randint(1, 4))
    return "".join(parts)


_CODE: list[str] = []


def _code(draw: random.Random) -> str:
    if not _CODE:
        for module in (json.decoder, textwrap, tokenize):
            _CODE.extend(inspect.getsource(module).split("\n"))
    at = draw.randrange(len(_CODE) - 8)
    return "\n".join(_CODE[at : at + draw.randint(1, 8)])


def _numbers(draw: random.Random) -> str:
    zero = draw.choice("0000000٠०๐０𝟎")
    digits = "".join(chr(ord(zero) + draw.randrange(10)) for _ in range(draw.randint(1, 11)))
    return (
        draw.choice(("", " ", "x", "-", "第", "$", "\n"))
        + digits
        + draw.choice(("", "%", "kg", ".5", "年", " 7", "'s"))
    )


def _decomposed(draw: random.Random) -> str:
    text = unicodedata.normalize(draw.choice(("NFD", "NFKD", "NFC")), draw.choice(_SENTENCES))
    at = draw.randrange(len(text))
    return text[:at] + draw.choice(_MARKS) * draw.randint(0, 3) + text[at:]


def _noise(draw: random.Random) -> str:
    def one() -> str:
        kind = draw.random()
        if kind < 0.25:
            return draw.choice(_SPACES + _ODD_SPACES)
        if kind < 0.45:
            return draw.choice(_PUNCTUATION)
        if kind < 0.55:
            return draw.choice(_CONTROLS + _MARKS)
        while True:
            code = draw.choice((draw.randrange(0x250), draw.randrange(0x3000), draw.randrange(0x30000)))
            if unicodedata.category(chr(code)) not in ("Cs", "Cn") and code:
                return chr(code)

    return "".join(one() for _ in range(draw.randint(1, 24)))
