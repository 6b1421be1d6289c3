"""Metrics against printed tables, simulation and sacrebleu."""

import math
import random

import pytest
import sacrebleu
import torch
from hypothesis import given
from hypothesis import strategies as st

from metakern.dialogue.metrics import (
    _t_quantile,
    bleu,
    chrf,
    distinct_n,
    exact,
    interval,
    over_tasks,
    paired_interval,
    word_f1,
)


@pytest.mark.parametrize(
    ("freedom", "quantile"),  # two-sided 95% points of Student's t, from printed tables
    [(1, 12.706), (2, 4.303), (3, 3.182), (4, 2.776), (9, 2.262), (10, 2.228), (29, 2.045), (60, 2.000), (1000, 1.962)],
)
def test_t_quantile(freedom, quantile):
    assert _t_quantile(freedom) == pytest.approx(quantile, abs=6e-4)


def test_interval_covers_the_mean_95_times_in_100():
    rng = random.Random(0)
    drawn = [interval([rng.gauss(3.0, 2.0) for _ in range(5)]) for _ in range(4000)]
    covered = sum(abs(mean - 3.0) <= half for mean, half in drawn) / len(drawn)
    assert covered == pytest.approx(0.95, abs=0.012)


def test_interval_of_tensors_and_of_one_task():
    assert interval(torch.tensor([2.0, 2.0, 2.0])) == (2.0, 0.0)
    assert interval([7.0]) == (7.0, math.inf)
    with pytest.raises(ValueError, match=r"values must be \[T\] with T at least 1, got \[0\]"):
        interval([])
    with pytest.raises(ValueError, match=r"got \[2, 2\]"):
        interval(torch.zeros(2, 2))


def test_paired_interval_is_narrower_where_tasks_differ_more_than_methods():
    tasks = torch.arange(10.0)
    gain = torch.tensor([0.1, 0.2] * 5)
    mean, half = paired_interval(tasks + gain, tasks)
    assert mean == pytest.approx(0.15)
    assert half == pytest.approx(2.262 * gain.double().std().item() / math.sqrt(10), rel=1e-3)
    assert half < interval(tasks)[1] / 10
    with pytest.raises(ValueError, match=r"b must be \[2\] as a is, got \[3\]"):
        paired_interval([1, 2], [1, 2, 3])


@given(st.lists(st.sampled_from("abcd")), st.lists(st.sampled_from("abcd")))
def test_word_f1_is_symmetric_and_ignores_order(a, b):
    left, right = " ".join(a), " ".join(b)
    assert word_f1(left, right) == pytest.approx(word_f1(right, left))
    assert word_f1(left, right) == pytest.approx(word_f1(" ".join(sorted(a)), right))
    assert 0 <= word_f1(left, right) <= 1
    kept = [word for word in a if word != "a"]
    assert word_f1(left, left.upper() + "!") == (1.0 if kept else 0.0)


def test_word_f1_counts_repetitions():
    assert word_f1("go go go", "go") == pytest.approx(0.5)
    assert word_f1("", "x") == word_f1("x", "y") == 0.0


def test_over_tasks_has_the_interval_of_each_row():
    rows = [[1.0, 2.0, 4.0], [0.0, 0.0, 3.0]]
    found = over_tasks(rows)
    assert found["values"] == over_tasks(torch.tensor(rows))["values"] == rows
    for i, row in enumerate(rows):
        mean, half = interval(row)
        assert [found[key][i] for key in ("low", "mean", "high")] == [mean - half, mean, mean + half]


@pytest.mark.parametrize(
    ("reply", "reference", "right"),
    [
        ("See  you\nat noon. ", "see you at noon.", True),
        ("See you at noon", "See you at noon.", False),
        ("See you at noon. Bye.", "See you at noon.", False),
        ("", "x", False),
        ("STRASSE", "straße", True),
        ("a" * 40 + "b", "a" * 40 + "c", True),
        ("a" * 39 + "b", "a" * 39 + "c", False),
        ("a" * 40, "a" * 60, True),
    ],
)
def test_exact_compares_the_first_40_characters_without_case_and_white_space(reply, reference, right):
    assert exact(reply, reference) is right


@pytest.mark.parametrize("reference", ["", " \n\t"])
def test_exact_refuses_a_reference_of_white_space(reference):
    with pytest.raises(ValueError, match="exact: reference must hold more than white space, got"):
        exact("x", reference)


def test_chrf_is_sacrebleus_and_credits_parts_of_words():
    replies, references = ["the cats sat", "hello"], ["the cat sat", "hullo"]
    assert chrf(replies, references) == pytest.approx(sacrebleu.corpus_chrf(replies, [references]).score)
    assert chrf(["cats"], ["cat"]) > 0 == word_f1("cats", "cat")
    with pytest.raises(ValueError, match="chrf: references must be as many as replies, got 0 and 0"):
        chrf([], [])


def test_bleu_is_sacrebleus():
    replies, references = ["the cat is on the mat", "hello there you"], ["a cat is on the mat", "hello there, you"]
    assert bleu(replies, references) == pytest.approx(sacrebleu.corpus_bleu(replies, [references]).score)
    assert 0 < bleu(replies, references) < 100
    with pytest.raises(ValueError, match="references must be as many as replies, got 1 and 2"):
        bleu(replies, references[:1])


def test_distinct_n():
    assert distinct_n(["I am. I am!", "you are"], 1) == pytest.approx(4 / 6)
    assert distinct_n(["I am. I am!", "you are"], 2) == pytest.approx(3 / 4)
    assert distinct_n(["one"], 2) == distinct_n([], 1) == 0.0
    with pytest.raises(ValueError, match="n must be at least 1, got 0"):
        distinct_n(["x"], 0)
