"""Find the values of slots in a message: those that were taught, and new ones that stand where taught ones stood.

A span of words is compared with each taught value in its sentence. The score is a sum of weights of what is alike:

    left, right    the word before and the word after
    first, last    the first and the last word
    shape          whether the words are capitalized, numbers or others
    overlap        the share of the words that both have

    slot of a span = that of the taught value with the highest score, if it reaches the threshold

A span that has the same words as a taught value is always found. So slots are learned from a few annotated messages, by
their nearest neighbors. The weights were learned once, from the services of the Schema-Guided Dialogue set that
`benchmarks.slots` trains on: they maximize the likelihood of the right slots in messages of a service, given others of
it, as matching networks do (Vinyals et al. 2016, section 2.1).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from metakern.dialogue.readers import Turn
from metakern.dialogue.words import IDEOGRAPHS, words

__all__ = ["FEATURES", "SlotFinder", "Span", "alike", "spans_of"]

FEATURES = ("left", "right", "first", "last", "shape", "overlap")
WEIGHTS = (3.62, 2.11, 0.59, 1.98, 2.81, 2.71)
THRESHOLD = 6.73
PIECE = re.compile(rf"{IDEOGRAPHS.pattern}|[^\W_]+|[^\w\s]|_")
LONGEST = 5  # words of a new value
MOST = 512  # words of a message that are looked at
EDGE = ""  # what stands before the first and after the last word


class Span(NamedTuple):
    """Consecutive words of a text, with what `alike` compares."""

    begin: int
    end: int
    words: tuple[str, ...]
    left: str
    right: str
    shapes: tuple[str, ...]


class _Text:
    """A text in pieces: words, and signs of punctuation by themselves."""

    def __init__(self, text: str) -> None:
        self.text = text
        found = [m for _, m in zip(range(MOST), PIECE.finditer(text), strict=False)]
        self.begins, self.ends = [m.start() for m in found], [m.end() for m in found]
        self.pieces = [m[0].casefold() for m in found]
        self.shapes = ["9" if m[0].isdigit() else "A" if m[0][0].isupper() else "a" for m in found]

    def span(self, i: int, j: int) -> Span:
        """Return the span of the pieces from i up to j."""
        left = self.pieces[i - 1] if i else EDGE
        right = self.pieces[j] if j < len(self.pieces) else EDGE
        return Span(self.begins[i], self.ends[j - 1], tuple(self.pieces[i:j]), left, right, tuple(self.shapes[i:j]))

    def known(self, value: str, taken: Sequence[Span] = ()) -> Span | None:
        """Return the span of a value where it first stands between pieces, apart from `taken`; None if nowhere."""
        begin = self.text.find(value)
        while begin >= 0:
            end = begin + len(value)
            free = all(end <= span.begin or span.end <= begin for span in taken)
            if free and begin in self.begins and end in self.ends:
                return self.span(self.begins.index(begin), self.ends.index(end) + 1)
            begin = self.text.find(value, begin + 1)
        return None


def alike(span: Span, taught: Span) -> tuple[float, ...]:
    """Return how alike two spans are in each of `FEATURES`, from 0 to 1."""
    one, other = set(span.words), set(taught.words)
    return (
        float(span.left == taught.left),
        float(span.right == taught.right),
        float(span.words[0] == taught.words[0]),
        float(span.words[-1] == taught.words[-1]),
        float(span.shapes == taught.shapes),
        len(one & other) / len(one | other),
    )


def spans_of(text: str, longest: int) -> list[Span]:
    """Return all spans of up to `longest` words of a text."""
    said = _Text(text)
    count = len(said.pieces)
    return [said.span(i, j) for i in range(count) for j in range(i + 1, min(i + longest, count) + 1)]


class SlotFinder:
    """Finds the slots that annotated turns have.

    Args:
        turns: The turns, of which those with slots teach.

    Attributes:
        taught: The values that were taught: the name of the slot, the span, and the value as it was written.

    >>> taught = Turn("user", "A table in Paris at 8 please", slots=(("city", "Paris"), ("time", "8")))
    >>> SlotFinder([taught])("any table in Rome at 9 please?")
    {'city': 'Rome', 'time': '9'}
    """

    def __init__(self, turns: Iterable[Turn]) -> None:
        self.taught: list[tuple[str, Span, str]] = []
        for turn in turns:
            text, taken = _Text(turn.text) if turn.slots else None, list[Span]()
            for name, value in sorted(turn.slots, key=lambda slot: -len(slot[1])):
                if text and words(value) and (span := text.known(value, taken)):
                    taken.append(span)
                    self.taught.append((name, span, value))
        self.longest = max([LONGEST, *(len(span.words) for _, span, _ in self.taught)])
        self._lefts = {span.left for _, span, _ in self.taught}
        self._words = {word for _, span, _ in self.taught for word in span.words}

    def __call__(self, text: str) -> dict[str, str]:
        """Return the slots of a text with their values, in the order of the text.

        Of spans that overlap, the longest taught value counts or, without one, the span with the highest score. A value
        that was taught is written as it was taught, a new one as the text has it.
        """
        if not self.taught:
            return {}
        taken, found = list[Span](), dict[str, tuple[Span, str]]()
        for _, span, name, value in sorted(filter(None, map(self._best, spans_of(text, self.longest))), reverse=True):
            if name not in found and not any(span.begin < other.end and other.begin < span.end for other in taken):
                taken.append(span)
                found[name] = span, value or text[span.begin : span.end]
        return {name: value for name, (_, value) in sorted(found.items(), key=lambda item: item[1][0])}

    def _best(self, span: Span) -> tuple[tuple[int, float], Span, str, str] | None:
        """Return the rank of a span, its slot, and the taught value if it is one; None if it is no slot."""
        if span.left not in self._lefts and self._words.isdisjoint(span.words):
            return None  # left, first, last and overlap are 0, and the others do not reach the threshold
        known = [other for other in self.taught if other[1].words == span.words]
        scored = [
            (sum(w * x for w, x in zip(WEIGHTS, alike(span, other), strict=True)), name, value)
            for name, other, value in known or self.taught
        ]
        score, name, value = max(scored)
        if known:
            return (len(span.words), score), span, name, value
        return ((0, score), span, name, "") if score >= THRESHOLD else None
