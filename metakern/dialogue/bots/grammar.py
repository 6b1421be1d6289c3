"""The language in which the bots are written: files of facts, questions and answers, and texts with choices.

A file has sections, which are kinds of business or what all bots share:

    [bakery]
    place: bakery                        a list, whose items are separated by "; "
    ? flour: Is your flour organic?; …   a fact and the questions about it
    > hours: And is it organic?; …       questions about it that make sense after an answer about `hours`
    ! All our flour is organic.          an answer; a bot has one of them
    # …                                  a comment

A text has three kinds of choices. What depends on the bot is fixed first, by `fix`; the wording is chosen by `word`.

    <street>              a value of the bot; an answer that needs a value which the bot lacks can't be given
    <two|three> days      a value that is drawn for the bot
    <£2-4/.5>             a price that is drawn for the bot: from £2 to £4 in steps of 50 pence
    {Sure|Yes}, [do ]ask  one of several wordings; one that may be left out ("[ now| soon]": one of two, or neither)
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from random import Random
from typing import TypeVar

__all__ = ["Fact", "Section", "can_be_given", "choose", "fix", "needs", "sample", "sections", "word"]

T = TypeVar("T")
VALUE = re.compile(r"<([^<>]+)>")
WORDING = re.compile(r"\{([^{}\[\]]*)\}|\[([^{}\[\]]*)\]")
PRICES = re.compile(r"£([\d.]+)-([\d.]+)/([\d.]+)")
START = re.compile(r"(^|[.!?] +)([a-z])")


@dataclass
class Fact:
    """How a fact is asked for and answered; `after` has, for the name of another fact, questions that follow it."""

    questions: list[str]
    answers: list[str] = field(default_factory=list)
    after: dict[str, list[str]] = field(default_factory=dict)


@dataclass
class Section:
    """The lists and facts of a section, by name."""

    lists: dict[str, list[str]] = field(default_factory=dict)
    facts: dict[str, Fact] = field(default_factory=dict)


@cache
def sections(name: str) -> dict[str, Section]:
    """Return the sections of the file `name`.txt beside this module."""
    found: dict[str, Section] = {}
    for line in (files("metakern.dialogue.bots") / f"{name}.txt").read_text("utf-8").splitlines():
        sign, _, rest = line.partition(" ")
        key, _, items = rest.partition(": ")
        if line.startswith("["):
            section = found[line.strip("[]")] = Section()
        elif sign == "?":
            fact = section.facts[key] = Fact(items.split("; "))
        elif sign == ">":
            fact.after[key] = items.split("; ")
        elif sign == "!":
            fact.answers.append(rest)
        elif line and sign != "#":
            key, _, items = line.partition(": ")
            section.lists[key] = items.split("; ")
    return found


def choose(items: Sequence[T], rng: Random) -> T:
    """Return one of the items, each as likely as the others."""
    return items[int(rng.random() * len(items))]


def sample(items: Sequence[T], count: int, rng: Random) -> list[T]:
    """Return `count` different items, or all if there are fewer, in random order."""
    return sorted(items, key=lambda _: rng.random())[:count]


def needs(text: str) -> list[str]:
    """Return the names of the values that a text needs.

    >>> needs("In <street>, <two|three> minutes from <landmark>, for <£2-4/.5>.")
    ['street', 'landmark']
    """
    return [name for name in VALUE.findall(text) if "|" not in name and not PRICES.match(name)]


def can_be_given(answer: str, values: Mapping[str, str], unwanted: Sequence[str]) -> bool:
    """Return whether the values suffice for an answer, and it has no unwanted word outside of the values to draw.

    >>> can_be_given("Ring <phone> on <Mondays|Fridays>.", {"phone": "123"}, ["Monday"])
    True
    """
    left = _innermost(VALUE, lambda found: "", answer)
    return all(name in values for name in needs(answer)) and not any(item in left for item in unwanted)


def fix(text: str, values: Mapping[str, str], rng: Random, unwanted: Sequence[str] = ()) -> str:
    """Return a text with values for all that depends on the bot; values to draw have none of the `unwanted` words.

    >>> fix("<name> opens in <two|two> days and costs <£2-2/.5>.", {"name": "It"}, Random("0"))
    'It opens in two days and costs £2.'
    """

    def value(found: re.Match[str]) -> str:
        name = found[1]
        if prices := PRICES.match(name):
            low, high, step = map(float, prices.groups())
            price = low + step * int(rng.random() * (round((high - low) / step) + 1))
            return f"£{price:.0f}" if abs(price - round(price)) < 0.005 else f"£{price:.2f}"
        if "|" in name:
            return choose([item for item in name.split("|") if not any(part in item for part in unwanted)], rng)
        return values[name]

    return _innermost(VALUE, value, text)


def word(text: str, rng: Random) -> str:
    """Return a text with one wording for each choice, and with capital letters where sentences begin.

    >>> word("{a bun|a bun} is sold out[]. sorry!", Random("0"))
    'A bun is sold out. Sorry!'
    """

    def wording(found: re.Match[str]) -> str:
        if found[1] is None and rng.random() < 0.5:
            return ""
        return choose((found[1] if found[1] is not None else found[2]).split("|"), rng)

    text = re.sub(r" +(?=[ .,;:!?]|$)", "", _innermost(WORDING, wording, text)).lstrip()
    return START.sub(lambda found: found[1] + found[2].upper(), text)


def _innermost(pattern: re.Pattern[str], replace: Callable[[re.Match[str]], str], text: str) -> str:
    """Return a text with all matches replaced, the innermost ones first."""
    while (replaced := pattern.sub(replace, text)) != text:
        text = replaced
    return text
