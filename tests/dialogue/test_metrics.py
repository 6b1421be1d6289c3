"""Metrics against printed tables, simulation and sacrebleu."""

import math
import random

import pytest
import sacrebleu
import torch
from hypothesis import given
from hypothesis import strategies as st

from metakern.dialogue.metrics import _t_quantile, bleu, distinct_n, interval, paired_interval, word_f1


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
