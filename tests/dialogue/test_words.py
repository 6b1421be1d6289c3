"""Words in every script: where they begin and end, and which spellings count as the same word."""

import re
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metakern.dialogue.metrics import distinct_n, word_f1
from metakern.dialogue.words import length, words


@given(st.text(st.characters(max_codepoint=127)))
def test_words_of_ascii_are_runs_of_letters_and_digits(text):
    assert words(text) == tuple(re.findall("[a-z0-9]+", text.lower()))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It's naïve, isn\u2019t it? 5½ €", ["it", "s", "naïve", "isn", "t", "it", "5½"]),
        ("snake_case 20°C x²", ["snake", "case", "20", "c", "x²"]),
        ("नमस्ते, आप कैसे हैं?", ["नमस्ते", "आप", "कैसे", "हैं"]),
        ("வணக்கம் நண்பா", ["வணக்கம்", "நண்பா"]),
        ("সুপ্রভাত", ["সুপ্রভাত"]),
        ("สวัสดี ครับ", ["สวัสดี", "ครับ"]),
        ("สวัสดี\u200bครับ", ["สวัสดี", "ครับ"]),
        ("မင်္ဂလာပါ ခင်ဗျာ", ["မင်္ဂလာပါ", "ခင်ဗျာ"]),
        ("សួស្តី", ["សួស្តី"]),
        ("안녕 친구야", ["안녕", "친구야"]),
        ("你好吗? 我叫Ann2。", ["你", "好", "吗", "我", "叫", "ann2"]),
        ("カード・がき 々 𠮷", ["カ", "ー", "ド", "が", "き", "々", "𠮷"]),
        ("Ünï ΣΑΣ Straße", ["ünï", "\u03c3\u03b1\u03c3", "strasse"]),
    ],
)
def test_words_of_many_scripts(text, expected):
    assert words(text) == tuple(unicodedata.normalize("NFC", word) for word in expected)


@pytest.mark.parametrize(
    "symbols",
    [
        ["🙂", "👍", "🙂"],
        ["👍🏽", "👍🏿", "👍"],
        ["❤️", "☺️", "✈"],
        ["👩‍❤️‍👨", "🏳️‍🌈", "🧑🏽‍⚕️", "🙂‍↔️"],
        ["🇩🇪", "🇫🇷", "🇩🇪"],
        ["🏴\U000e0067\U000e0062\U000e0073\U000e0063\U000e0074\U000e007f", "🏴"],
        ["1️⃣", "2️⃣", "#️⃣", "‼️", "©️"],
    ],
)
def test_a_symbol_with_its_modifiers_is_one_word(symbols):
    assert words(" ".join(symbols)) == tuple(symbols)
    assert words("".join(symbols)) == tuple(symbols)
    assert words("Ok!" + ", ".join(symbols) + " yes") == ("ok", *symbols, "yes")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Crème brûlée", unicodedata.normalize("NFD", "crème BRÛLÉE!")),
        ("한국어", unicodedata.normalize("NFD", "한국어")),
        ("がぎ", unicodedata.normalize("NFD", "がぎ")),
        ("क़लम", unicodedata.normalize("NFC", "क़लम")),
        ("\uff21\uff22\uff23 \uff11\uff12", "abc 12"),
        ("ｶﾞ", "ガ"),
        ("ﬁne", "fine"),
        ("مُحَمَّد", "محمد"),
        ("محـــمد", "محمد"),
        ("שָׁלוֹם", "שלום"),
        ("می‌خواهم", "میخواهم"),
        ("co\u00adoperate\u2060", "cooperate"),
        ("\u200fعمر", "عمر"),
    ],
)
def test_spellings_that_count_as_the_same_word(one, other):
    assert words(one) == words(other) != ()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("की", "का"),
        ("🙂", "👍"),
        ("สาว", "สิว"),
        ("كتاب", "كاتب"),
        ("かき", "がき"),
        ("مها", "مهآ"),
        ("résumé", "resume"),
    ],
)
def test_spellings_that_count_as_different_words(one, other):
    assert words(one) != words(other)
    assert word_f1(one, other) < 1 == word_f1(one, one)


def test_punctuation_gives_no_words():
    assert words("?!… — :-) $ + = \u0301 \ufffd \u200d") == ()


@given(st.text())
def test_words_do_not_depend_on_the_unicode_normal_form(text):
    found = words(text)
    assert all(found)
    assert words(unicodedata.normalize("NFD", text)) == words(unicodedata.normalize("NFC", text)) == found


def test_metrics_count_words_of_every_script():
    assert word_f1("मुझे चाय दो", "मुझे पानी दो") == pytest.approx(2 / 3)
    assert word_f1("नमस्ते 🙂", "नमस्ते 👍") == pytest.approx(1 / 2)
    assert distinct_n(["की का कि"], 1) == 1.0


def test_length_estimates_the_words_of_scripts_without_spaces():
    assert [length(word) for word in ("hello", "incomprehensibilities", "नमस्ते", "你", "🙂")] == [1] * 5
    assert length("ครับ") == 1
    assert length("เมื่อวานนี้ฉันไปตลาดกับแม่") >= 5
    assert length("မနေ့ကကျွန်တော်ဈေးကိုသွားပြီးငါးဝယ်ခဲ့ပါတယ်") >= 5
