"""A dialogue manager: what the user means, what to do about it, and what to say.

    message -> Parser -> Parse -> Policy -> Decision -> Generator -> reply
    taught exchanges -> all three, each of which learns from them

Each part is a protocol class, so that any object with these methods can take its place. `Manager` composes them. The
parts of metakern are in `parser` (nearest neighbors, prototypes), `policy` (what was taught, the next act) and
`generator` (the adapted language model).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from metakern.dialogue.readers import Dialogue, Turn
from metakern.dialogue.tokenizer import bot_in
from metakern.dialogue.words import words
from metakern.errors import UserError

__all__ = [
    "ACTIONS",
    "Decision",
    "Generator",
    "Manager",
    "Neighbor",
    "Parse",
    "Parser",
    "Policy",
    "contradictions",
    "exchanges_of",
]

ACTIONS = ("retrieve", "generate", "ask back", "hand over")


@dataclass(frozen=True)
class Neighbor:
    """A taught text, its intent or reply, and how similar the message is to it, at most 1."""

    text: str
    label: str
    similarity: float


@dataclass(frozen=True)
class Parse:
    """What a parser makes of a message.

    Attributes:
        intent: The likeliest label among those taught; None if `confidence` is below `threshold`: none of these.
        confidence: That of the likeliest label, at most 1.
        threshold: What the confidence must reach.
        slots: Slots that the message fills, by name, with their values.
        neighbors: The most similar taught texts, the nearest first.
    """

    intent: str | None
    confidence: float
    threshold: float
    slots: Mapping[str, str] = field(default_factory=dict)
    neighbors: tuple[Neighbor, ...] = ()


@dataclass(frozen=True)
class Decision:
    """What a policy decides to do.

    Attributes:
        action: One of `ACTIONS`.
        reply: What to say, unless the action is "generate".
        act: The dialogue act of the reply, such as "REQUEST"; "" if the policy knows no acts.
        why: The reason, for the user.
    """

    action: str
    reply: str = ""
    act: str = ""
    why: str = ""


class Parser(Protocol):
    """Finds the intent of a message among those that it was taught."""

    def learn(self, dialogues: Sequence[Dialogue]) -> None:
        """Replace all that was learned by the exchanges of `dialogues`, whose replies are the labels."""

    def __call__(self, text: str) -> Parse:
        """Return what `text` means."""


class Policy(Protocol):
    """Chooses what to do next."""

    def learn(self, dialogues: Sequence[Dialogue]) -> None:
        """Replace all that was learned by `dialogues`."""

    def __call__(self, turns: Sequence[Turn], parse: Parse) -> Decision:
        """Return what to do after `turns`, of which the last is the user's and `parse` its parse."""


class Generator(Protocol):
    """Says something."""

    def learn(self, dialogues: Sequence[Dialogue], progress: Callable[[str], object] | None = None) -> str:
        """Replace all that was learned by `dialogues`, and return a line about it.

        `progress` is called with a line about each step and, at the end, with an empty one.
        """

    def forget(self) -> None:
        """Forget all that was learned."""

    def __call__(self, turns: Sequence[Turn], decision: Decision) -> Iterator[str]:
        """Yield the pieces of a reply to `turns`."""


class Manager:
    """A bot of a parser, a policy and a generator, all of which learn from the same few exchanges.

    Args:
        parser: Says what a message means.
        policy: Says what to do about it.
        generator: Says what is not said word for word as taught.

    Attributes:
        parse: The parse of the last message; None before the first.
        decision: The decision about it; None before the first.

    >>> from metakern.dialogue.manager.parser import NearestParser
    >>> from metakern.dialogue.manager.policy import TaughtPolicy
    >>> manager = Manager(NearestParser(), TaughtPolicy(unknown="hand over"))
    >>> line = manager.learn([Dialogue("shop", "1", (Turn("user", "What do you sell?"), Turn("bot", "Pianos.")))])
    >>> "".join(manager.reply([Turn("user", "what do you sell")]))
    'Pianos.'
    """

    def __init__(self, parser: Parser, policy: Policy, generator: Generator | None = None) -> None:
        self.parser, self.policy, self.generator = parser, policy, generator
        self.parse: Parse | None = None
        self.decision: Decision | None = None

    def learn(self, dialogues: Sequence[Dialogue], progress: Callable[[str], object] | None = None) -> str:
        """Teach all parts `dialogues`, in place of what they learned before; return a line about it.

        Replies that are taught without an act get one for the generator from a policy that has a method `completed`:
        the act that this policy would choose before them in a chat.

        Raises:
            UserError: If no dialogue has a reply of the bot.
        """
        if not any(exchanges_of(dialogue) for dialogue in dialogues):
            raise UserError("teach: support must hold a reply of the bot, got none")
        completed: Callable[[Dialogue], Dialogue] = getattr(self.policy, "completed", lambda dialogue: dialogue)
        line = self.generator.learn(list(map(completed, dialogues)), progress) if self.generator else ""
        self.recall(dialogues)
        return line

    def recall(self, dialogues: Sequence[Dialogue]) -> None:
        """Teach parser and policy `dialogues`, which the generator holds already, in place of what they learned."""
        self.parser.learn(dialogues)
        self.policy.learn(dialogues)

    def forget(self) -> None:
        """Forget all that was taught."""
        self.recall([])
        if self.generator:
            self.generator.forget()

    def reply(self, turns: Sequence[Turn]) -> Iterator[str]:
        """Yield the pieces of the reply to `turns`, the last of which must be the user's.

        Raises:
            UserError: If the policy wants a reply generated, and there is no generator.
        """
        self.parse = self.parser(turns[-1].text)
        self.decision = self.policy(turns, self.parse)
        if self.decision.action != "generate":
            yield self.decision.reply
        elif self.generator is None:
            raise UserError("manager: generator must be given for a policy that generates, got None")
        else:
            yield from self.generator(turns, self.decision)


def exchanges_of(dialogue: Dialogue) -> list[tuple[Turn, Turn]]:
    """Return the turns of the bot in a dialogue, each with the turn that it answers."""
    bot = bot_in(dialogue)
    pairs = zip(dialogue.turns, dialogue.turns[1:], strict=False)
    return [(said, reply) for said, reply in pairs if reply.speaker == bot and said.speaker != bot]


def contradictions(dialogues: Sequence[Dialogue]) -> list[str]:
    """Return the first messages of dialogues that are taught with two different answers, which no model can give both.

    >>> talks = [Dialogue("t", a, (Turn("user", "Open?"), Turn("bot", a))) for a in ("Yes.", "No.")]
    >>> contradictions(talks)
    ['Open?']
    """
    answers: dict[tuple[str, ...], set[str]] = {}
    found: dict[tuple[str, ...], str] = {}
    for said, reply in (exchanges_of(dialogue)[0] for dialogue in dialogues if exchanges_of(dialogue)):
        key = words(said.text) or (said.text,)
        answers.setdefault(key, set()).add(reply.text)
        if len(answers[key]) > 1:
            found.setdefault(key, said.text)
    return list(found.values())
