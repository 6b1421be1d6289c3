"""Hints: system turns before the bot's replies, which say what these should be like.

    act      the dialogue act of the reply, in brackets
    reply    what the bot answered to the nearest message of the support, by TF-IDF

    user: Open on Sunday?   system: [INFORM] We are open till six.   bot: On Sunday we are closed.

A generator that is trained with hints learns to follow them, so that a policy and retrieval have a say in what it says.
The nearest message is one of another conversation, so that no hint tells the reply that it stands before.

Wen et al. 2015, "Semantically conditioned LSTM-based natural language generation" (acts); Weston, Dinan, Miller 2018,
"Retrieve and refine" (retrieved replies).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from metakern.dialogue.baselines import Retrieval
from metakern.dialogue.manager import exchanges_of
from metakern.dialogue.readers import Dialogue, Turn
from metakern.dialogue.tokenizer import SYSTEM_SPEAKERS

__all__ = ["HINT", "KINDS", "Hints"]

KINDS = ("none", "act", "reply", "act+reply")
HINT = "hint"  # the act of a hint


class Hints:
    """Puts hints into conversations.

    Args:
        kinds: One of `KINDS`.
        support: The conversations that replies are retrieved from.

    >>> shop = Dialogue("shop", "1", (Turn("user", "When are you open?"), Turn("bot", "Till six.")))
    >>> asked = (Turn("user", "Open on Sunday?"), Turn("bot", "We are closed.", act="INFORM"))
    >>> [turn.text for turn in Hints("act+reply", [shop])(asked, "bot")]
    ['Open on Sunday?', '[INFORM] Till six.', 'We are closed.']
    """

    def __init__(self, kinds: str, support: Iterable[Dialogue] = ()) -> None:
        self.acts, self._known = "act" in kinds, list[tuple[Turn, Turn, tuple[Turn, ...]]]()
        for dialogue in support if "reply" in kinds else ():
            answered = ((*pair, dialogue.turns) for pair in exchanges_of(dialogue))
            self._known += [exchange for exchange in answered if exchange[0].speaker not in SYSTEM_SPEAKERS]
        known = [(said.text, reply.text) for said, reply, _ in self._known]
        self._nearest = Retrieval(*zip(*known, strict=True)) if known else None

    def __call__(self, turns: Sequence[Turn], bot: str | None, whole: Sequence[Turn] = ()) -> tuple[Turn, ...]:
        """Return `turns` with a hint before each reply of the bot to somebody.

        Args:
            turns: The turns, oldest first.
            bot: The speaker who is the bot.
            whole: The turns of the conversation that they are from, if that is one of the support.
        """
        found: list[Turn] = []
        for before, turn in zip((None, *turns), turns, strict=False):
            if before and turn.speaker == bot and before.speaker not in (bot, *SYSTEM_SPEAKERS):
                found += self.before(before.text, turn.act, whole)
            found.append(turn)
        return tuple(found)

    def before(self, message: str, act: str = "", whole: Sequence[Turn] = ()) -> list[Turn]:
        """Return the hint before the reply to a message, or nothing if there is none."""
        parts = [f"[{act}]" if act and self.acts else "", self._retrieved(message, tuple(whole))]
        text = " ".join(filter(None, parts))
        return [Turn("system", text, HINT)] if text else []

    def _retrieved(self, message: str, whole: tuple[Turn, ...]) -> str:
        """Return the reply to the nearest message, of which a word is in this one, in conversations other than this."""
        if self._nearest is None:
            return ""
        others = zip(self._nearest.cosines(message), self._known, strict=True)
        near = [(cosine, reply.text) for cosine, (_, reply, turns) in others if cosine and turns != whole]
        return max(near, key=lambda pair: pair[0])[1] if near else ""
