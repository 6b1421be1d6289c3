"""Confidence intervals of means over tasks, and measures of replies.

    interval      mean ± t(0.975, T - 1) · s / √T        s² = Σ (x - mean)² / (T - 1)
    exact         1 if reply and reference agree in their first 40 characters, 0 otherwise
    word_f1       2 P R / (P + R), with precision P and recall R of the reply's bag of words in the reference's
    distinct_n    distinct n-grams / n-grams over all replies
    bleu, chrf    corpus BLEU-4 and chrF2 as sacrebleu computes them

Student 1908 (interval); Dinan et al. 2019, "The second conversational intelligence challenge", section 4.1 (word F1,
without articles and punctuation); Li et al. 2016, "A diversity-promoting objective function", section 5 (distinct-n);
Post 2018, "A call for clarity in reporting BLEU scores"; Popović 2015, "chrF: character n-gram F-score for automatic
MT evaluation".
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from metakern.dialogue.words import words

__all__ = ["bleu", "by_task", "chrf", "distinct_n", "exact", "interval", "over_tasks", "paired_interval", "word_f1"]

ARTICLES = {"a", "an", "the"}
JUDGED = 40  # the number of characters of a reply that `exact` compares


def interval(values: Tensor | Sequence[float]) -> tuple[float, float]:
    """Return the mean of values of T tasks, and half the width of its 95% confidence interval (Student's t).

    Args:
        values: `[T]`, with T at least 1. For one task the half width is infinite.

    Raises:
        ValueError: If `values` has another shape.

    >>> mean, half_width = interval([1.0, 2.0, 4.0])
    >>> f"{mean:.3f} ± {half_width:.3f}"
    '2.333 ± 3.795'
    """
    x = torch.as_tensor(values, dtype=torch.float64)
    if x.dim() != 1 or x.numel() == 0:
        raise ValueError(f"interval: values must be [T] with T at least 1, got {list(x.shape)}")
    T = x.numel()
    if T == 1:
        return x.item(), math.inf
    return x.mean().item(), _t_quantile(T - 1) * x.std().item() / math.sqrt(T)


def paired_interval(a: Tensor | Sequence[float], b: Tensor | Sequence[float]) -> tuple[float, float]:
    """Return the mean of the differences a - b, and half the width of its 95% confidence interval (Student's t).

    Args:
        a: `[T]`, the values of T tasks, with T at least 1.
        b: `[T]`, other values of the same tasks, in the same order.

    Raises:
        ValueError: If `a` and `b` have different shapes or are not `[T]`.

    >>> paired_interval([3.0, 5.0, 9.0], [2.0, 4.0, 8.0])
    (1.0, 0.0)
    """
    first, second = (torch.as_tensor(values, dtype=torch.float64) for values in (a, b))
    if first.shape != second.shape:
        raise ValueError(f"paired_interval: b must be {list(first.shape)} as a is, got {list(second.shape)}")
    return interval(first - second)


def by_task(values: Tensor | Sequence[Sequence[float]], repeats: int) -> Tensor:
    """Return the means of rows of values over the `repeats` episodes of each task, which stand one after the other.

    Args:
        values: `[K, T * repeats]`.
        repeats: At least 1.

    Returns:
        `[K, T]`.

    >>> by_task([[1.0, 3.0, 5.0, 5.0]], repeats=2)
    tensor([[2., 5.]])
    """
    rows = torch.as_tensor(values)
    return rows.unflatten(1, (-1, repeats)).mean(2) if repeats > 1 else rows


def over_tasks(values: Tensor | Sequence[Sequence[float]]) -> dict[str, list[Any]]:
    """Return rows of values of T tasks with the mean of each row and the ends of its 95% confidence interval.

    Args:
        values: `[K, T]`, with T at least 1.

    Returns:
        A dictionary of lists: `values` `[K][T]`, and `mean`, `low` and `high` `[K]`.

    >>> over_tasks([[2.0, 2.0, 2.0]])
    {'values': [[2.0, 2.0, 2.0]], 'mean': [2.0], 'low': [2.0], 'high': [2.0]}
    """
    rows = torch.as_tensor(values, dtype=torch.float64)
    mean, half = zip(*map(interval, rows), strict=True)
    low, high = ([m + sign * h for m, h in zip(mean, half, strict=True)] for sign in (-1, 1))
    return {"values": rows.tolist(), "mean": list(mean), "low": low, "high": high}


def plain(text: str) -> str:
    """Return a text as `exact` compares it: case folded, with single spaces in the places of all white space."""
    return " ".join(text.split()).casefold()


def exact(reply: str, reference: str) -> bool:
    """Return whether a reply is right: its first 40 characters are those of the reference, if it has as many.

    Case and the kind and amount of white space do not matter. A reference of fewer characters must be the whole reply.

    Args:
        reply: The text that is judged.
        reference: The text that it is compared with.

    Raises:
        ValueError: If `reference` holds nothing but white space.

    >>> exact("See  you at noon.", "see you at noon."), exact("See you at noon. Bye!", "See you at noon.")
    (True, False)
    """
    if not plain(reference):
        raise ValueError(f"exact: reference must hold more than white space, got {reference!r}")
    return plain(reply)[:JUDGED] == plain(reference)[:JUDGED]


def word_f1(reply: str, reference: str) -> float:
    """Return the F1 of the words of a reply, in [0, 1].

    Words are those of `metakern.dialogue.words`; the articles a, an and the do not count, nor does the order.

    Args:
        reply: The text that is judged.
        reference: The text that it is compared with.

    Returns:
        The harmonic mean of precision and recall (Dinan et al. 2019, section 4.1); 0 if no word is common.

    >>> word_f1("The cat sat.", "a cat sat down")
    0.8
    """
    a, b = (Counter(word for word in words(text) if word not in ARTICLES) for text in (reply, reference))
    common = (a & b).total()
    return 2 * common / (a.total() + b.total()) if common else 0.0


def bleu(replies: Sequence[str], references: Sequence[str]) -> float:
    """Return the corpus BLEU-4 of replies, in [0, 100], as sacrebleu computes it by default (Post 2018).

    Args:
        replies: At least one text.
        references: One reference for each reply.

    Raises:
        ValueError: If there is no reply, or the numbers of replies and references differ.
        ImportError: If the package sacrebleu is missing.

    >>> round(bleu(["the cat sat on the mat"], ["the cat sat on the mat"]))
    100
    """
    return _sacrebleu("bleu", replies, references)


def chrf(replies: Sequence[str], references: Sequence[str]) -> float:
    """Return the corpus chrF2 of replies, in [0, 100], as sacrebleu computes it by default (Popović 2015).

    It compares n-grams of characters, so it also credits a reply for parts of words. Arguments and errors are those of
    `bleu`.

    >>> round(chrf(["the cat sat on the mat"], ["the cat sat on the mat"]))
    100
    """
    return _sacrebleu("chrf", replies, references)


def _sacrebleu(metric: str, replies: Sequence[str], references: Sequence[str]) -> float:
    if len(replies) != len(references) or not replies:
        raise ValueError(f"{metric}: references must be as many as replies, got {len(references)} and {len(replies)}")
    try:
        import sacrebleu
    except ImportError:
        raise ImportError(f"{metric}: the package sacrebleu is missing: pip install metakern[dialogue]") from None
    return float(getattr(sacrebleu, f"corpus_{metric}")(list(replies), [list(references)]).score)


def distinct_n(replies: Sequence[str], n: int) -> float:
    """Return the share of distinct n-grams among all n-grams of replies, in [0, 1] (Li et al. 2016, section 5).

    Args:
        replies: Texts; their words are those of `metakern.dialogue.words`.
        n: The number of words in an n-gram, at least 1.

    Returns:
        0 if no reply has n words.

    Raises:
        ValueError: If `n` is below 1.

    >>> distinct_n(["so so good", "so good"], 2)
    0.6666666666666666
    """
    if n < 1:
        raise ValueError(f"distinct_n: n must be at least 1, got {n}")
    grams = [w[i : i + n] for w in map(words, replies) for i in range(len(w) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def _t_quantile(freedom: int, confidence: float = 0.95) -> float:
    """Return the t that |Student's t| with `freedom` degrees of freedom is below with probability `confidence`.

    Abramowitz and Stegun 1964, 26.7.3 and 26.7.4, solved by bisection.
    """

    def inside(angle: float) -> float:
        cos, term, total = math.cos(angle), 1.0, 0.0
        for k in range(2 + freedom % 2, freedom + 1, 2):
            total += term
            term *= cos * cos * (k - 1) / k
        if freedom % 2 == 0:
            return math.sin(angle) * total
        return 2 / math.pi * (angle + math.sin(angle) * cos * total)

    low, high = 0.0, math.pi / 2
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if inside(middle) < confidence else (low, middle)
    return math.sqrt(freedom) * math.tan((low + high) / 2)
