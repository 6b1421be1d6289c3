"""How a bot says what it has to say: its register, its phrases, its emoji, and its formats of times and prices.

A formal bot uses no contractions and no exclamation marks. A brief one has no phrases around its replies.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from random import Random

from metakern.dialogue.bots.grammar import choose, fix, sections

__all__ = ["Style"]

# For each register the shares of bots with an opening phrase, with a closing phrase, and with an emoji.
REGISTERS = {
    "formal": (0.6, 0.6, 0.0),
    "friendly": (0.7, 0.6, 0.4),
    "playful": (0.8, 0.6, 0.8),
    "brief": (0.0, 0.0, 0.1),
}
GREETS = 0.4  # the share of those without an opening phrase that begin their first reply with a greeting
CURRENCIES = ("£", "€", "$")
PRICE, CLOCK = re.compile(r"£(\d+(?:\.\d+)?)"), re.compile(r"@(\d+(?:\.\d+)?)")


class Style:
    """The style of a bot.

    Args:
        kind: The lists of its kind of business.
        values: The values that its phrases may need.
        rng: What it is drawn by.

    Attributes:
        hello: How it answers a greeting; a text with choices.
        greeting: What comes before its first reply; "" for most bots.
    """

    def __init__(self, kind: Mapping[str, list[str]], values: Mapping[str, str], rng: Random) -> None:
        common = sections("common")["style"].lists
        self.register = choose(list(REGISTERS), rng)
        self.currency, self.cents, self.short = choose(CURRENCIES, rng), rng.random() < 0.3, rng.random() < 0.5
        self.long_forms = dict(pair.split(" = ") for pair in common["long forms"])
        self.contracted = re.compile(rf"\b({'|'.join(self.long_forms)})\b", re.IGNORECASE)
        openers, closers = common.get(f"{self.register} openers", [""]), common.get(f"{self.register} closers", [""])
        if self.register == "playful":
            openers = choose((openers, kind["sounds"]), rng)
        if self.register in ("playful", "friendly"):
            closers = choose((closers, kind["mottos"]), rng)
        phrases = (openers, closers, choose((kind["emoji"], kind["emoji"], common["emoji"]), rng))
        self.opener, self.closer, self.emoji = (
            fix(choose(phrase, rng), values, rng) if rng.random() < share else ""
            for phrase, share in zip(phrases, REGISTERS[self.register], strict=True)
        )
        self.hello = choose(common[f"{self.register} greetings"], rng)
        greeting = self.plain(fix(choose(common["first words"], rng), values, rng))
        self.greeting = greeting if not self.opener and rng.random() < GREETS else ""

    def __call__(self, text: str) -> str:
        """Return a reply: the text in this style, with the phrases around it."""
        return " ".join(part for part in (self.opener, self.plain(text), self.closer, self.emoji) if part)

    def plain(self, text: str) -> str:
        """Return the text in this style, without the phrases."""
        if self.register == "formal":
            text = self.contracted.sub(self._long_form, text).replace("!", ".")
        return CLOCK.sub(self._clock, PRICE.sub(self._price, text))

    def _long_form(self, found: re.Match[str]) -> str:
        text = self.long_forms[found[1].lower()]
        return text[0].upper() + text[1:] if found[1][0].isupper() else text

    def _price(self, found: re.Match[str]) -> str:
        amount = float(found[1])
        return f"{self.currency}{amount:.{0 if amount.is_integer() and not self.cents else 2}f}"

    def _clock(self, found: re.Match[str]) -> str:
        hour, minute = divmod(round(float(found[1]) * 60), 60)
        if not self.short:
            return f"{hour}:{minute:02d}"
        if (hour, minute) == (12, 0):
            return "noon"
        return f"{(hour - 1) % 12 + 1}{f':{minute:02d}' if minute else ''} {'am' if hour < 12 else 'pm'}"
