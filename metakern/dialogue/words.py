"""Split texts in any script into words: metrics count them, and two texts are the same if their words are.

Each character has a kind, which follows from its Unicode category. A word is a pattern of kinds:

    letters and digits with their marks    one word; don't is two, since an apostrophe is punctuation
    an ideograph, kana or bopomofo         a word each, since nothing separates the words of Chinese and Japanese
    an emoji or another pictorial symbol   a word each, with its skin tone, variation selector and keycap, and with what
                                           a zero-width joiner (ZWJ) or the second letter of a flag adds

Punctuation, white space and the signs + = < > $ ^ ~ ° © are not words. Words are compared without regard to case
(Unicode case folding), composition (NFC), width (the compatibility forms U+F900 to U+FFEF), the vowel points of Arabic
and Hebrew, the Arabic elongation, soft hyphens and other invisible characters.

Thai, Lao, Khmer and Burmese put spaces between phrases, not words, and only a dictionary could separate the words. In
these scripts, all that stands between two spaces or zero-width spaces (U+200B) is one word, and `length` estimates how
many words it holds.
"""

from __future__ import annotations

import re
import unicodedata

__all__ = ["length", "words"]

ASCII = re.compile(r"[^\W_]+")
COMPATIBLE = re.compile("[\uf900-\uffef]+")
IDEOGRAPHS = re.compile(
    "[\u3005-\u3007\u3040-\u312f\u31a0-\u31ff\u3400-\u9fff\U0001b000-\U0001b16f\U00020000-\U0003ffff]"
)
UNSPACED = re.compile("[\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff]")
# The usual length of a word in Thai, Lao, Khmer and Burmese, where vowel signs above and below do not count.
LETTERS_OF_A_WORD = 3

# Kinds: L letter or digit, I ideograph, M mark, S symbol, F flag letter, T skin tone, V emoji selector, J joiner,
# G tag of a flag, C character that is dropped, P other sign, and a space.
WORD = re.compile("[LIP]V[MTG]*(?:J[SP][VMTG]*)*|I[MV]*|L[LMVJC]*|FF|[SFT][VMTG]*(?:J[SP][VMTG]*)*")


class _Kinds(dict[int, str]):
    """The kind of each code point, for `str.translate`; each is computed once."""

    def __missing__(self, code: int) -> str:
        self[code] = kind = _kind(chr(code))
        return kind


def _kind(char: str) -> str:
    category = unicodedata.category(char)
    if char.isalnum():
        kind = "C" if char == "\u0640" else "I" if IDEOGRAPHS.match(char) else "L"
    elif category[0] == "M":
        optional = "\u0590" <= char <= "\u08ff"  # points of Hebrew, Arabic and Syriac
        kind = "V" if char == "\ufe0f" else "C" if optional else "M"
    elif category == "Cf":
        tag = "\U000e0020" <= char <= "\U000e007f"
        kind = "J" if char == "\u200d" else "G" if tag else " " if char == "\u200b" else "C"
    elif "\U0001f3fb" <= char <= "\U0001f3ff":
        kind = "T"
    elif "\U0001f1e6" <= char <= "\U0001f1ff":
        kind = "F"
    elif category == "So" and char >= "\u2190" and not "\ufff0" <= char <= "\uffff":
        kind = "S"
    else:
        kind = " " if char.isspace() else "P"
    return kind


KINDS = _Kinds()


def words(text: str) -> tuple[str, ...]:
    """Return the words of a text, case folded; the module's docstring says what a word is.

    >>> words("What is A.I.?"), words("你好吗?"), words("नमस्ते 🙂👍🏽")
    (('what', 'is', 'a', 'i'), ('你', '好', '吗'), ('नमस्ते', '🙂', '👍🏽'))
    """
    if text.isascii():
        return tuple(ASCII.findall(text.casefold()))
    text = COMPATIBLE.sub(lambda found: unicodedata.normalize("NFKC", found[0]), text)
    text = unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold())
    kinds = text.translate(KINDS)
    return tuple(_word(text[m.start() : m.end()], m[0]) for m in WORD.finditer(kinds))


def length(word: str) -> int:
    """Return how many words a word counts as: 1, or in scripts without spaces one for every three letters.

    >>> length("incomprehensibilities"), length("สวัสดีครับ")
    (1, 2)
    """
    if word.isascii():
        return 1
    letters = sum(KINDS[ord(c)] == "L" for c in word) if UNSPACED.match(word) else 0
    return max(1, round(letters / LETTERS_OF_A_WORD))


def _word(word: str, kinds: str) -> str:
    """Return a word without the characters to drop, and without joiners, which matter only between symbols."""
    if kinds[0] == "L" and ("C" in kinds or "J" in kinds):
        return "".join(char for char, kind in zip(word, kinds, strict=True) if kind not in "CJ")
    return word
