"""Policies: what to do after a message.

TaughtPolicy   the message means something that was taught -> retrieve: the taught reply, word for word
               two taught messages are equally near        -> ask back: which of the two is meant
               nothing taught is near                      -> generate, ask back or hand over, as the user chose
ActPolicy      the same, and the next dialogue act, by a model that adapts to a service from its support
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from metakern.dialogue.manager import ACTIONS, Decision, Parse, exchanges_of
from metakern.dialogue.manager.acts import TURNS, Speech, encoded_turns
from metakern.dialogue.readers import Dialogue, Turn
from metakern.dialogue.run import Run
from metakern.dialogue.tasks import load_adapted, on_device_of
from metakern.dialogue.tokenizer import IGNORE, bot_in
from metakern.errors import UserError
from metakern.meta.parameters import twin

__all__ = ["ActPolicy", "TaughtPolicy"]

UNKNOWN = ACTIONS[1:]
MARGIN = 0.02  # the difference of similarities below which two neighbors are equally near
ASK = "I am not sure what you mean. Can you say it in other words?"
HAND_OVER = "I do not know that. I hand over to a person."


class TaughtPolicy:
    """Replies as taught where a message was taught, and does what `unknown` says elsewhere.

    Args:
        unknown: What to do if a message has none of the taught intents: "generate", "ask back" or "hand over". The last
            two never invent a reply.
        hand_over: What to say when handing over.

    Raises:
        UserError: If `unknown` is something else.

    >>> TaughtPolicy()([Turn("user", "Open?")], Parse("Till six.", 0.95, 0.9)).reply
    'Till six.'
    """

    def __init__(self, unknown: str = "generate", hand_over: str = HAND_OVER) -> None:
        if unknown not in UNKNOWN:
            raise UserError(f"policy: unknown must be one of {', '.join(UNKNOWN)}, got {unknown!r}")
        self.unknown, self.hand_over = unknown, hand_over

    def learn(self, dialogues: Sequence[Dialogue]) -> None:
        """Learn nothing: the parse has all that was taught."""

    def __call__(self, turns: Sequence[Turn], parse: Parse) -> Decision:
        """Return what to do after `turns`."""
        sure = f"confidence {parse.confidence:.2f}, threshold {parse.threshold:.2f}"
        if parse.intent is not None:
            return Decision("retrieve", parse.intent, why=f"the message was taught ({sure})")
        why = f"nothing taught is near enough ({sure})"
        if self.unknown == "generate":
            return Decision("generate", why=why)
        if self.unknown == "hand over":
            return Decision("hand over", self.hand_over, why=why)
        two = [neighbor.text for neighbor in parse.neighbors[:2]]
        if len(two) == 2 and parse.neighbors[0].similarity - parse.neighbors[1].similarity < MARGIN:
            return Decision("ask back", f"Do you mean: {two[0]} Or: {two[1]}", why=f"two are equally near ({sure})")
        return Decision("ask back", f"Do you mean: {two[0]}" if two else ASK, why=why)


class ActPolicy:
    """A `TaughtPolicy` that also predicts the next act, by a run that `metakern train --part policy` made.

    It adapts to the acts in the dialogues that it learns. Without acts in them, it predicts by the weights as trained.

    Args:
        run: A run or its folder; it is not changed.
        taught: The policy that chooses the action; None stands for `TaughtPolicy()`.
        steps: The number of inner steps; None stands for as many as in training.

    Attributes:
        acts: The acts that it chooses from.

    Raises:
        UserError: If the run is not one of a policy.
    """

    def __init__(self, run: Run | str | Path, taught: TaughtPolicy | None = None, steps: int | None = None) -> None:
        self.run = run if isinstance(run, Run) else Run.open(run)
        if self.run.config.part != "policy":
            raise UserError(
                f"{self.run.path}: must be the run of a policy, got one of a {self.run.config.part}: metakern train"
                " --part policy makes one"
            )
        self.taught, self.acts = taught or TaughtPolicy(), self.run.labels
        self.steps = self.run.config.most_inner_steps if steps is None else steps
        self.run.algorithm.eval()
        self.model = self.run.model

    def learn(self, dialogues: Sequence[Dialogue]) -> None:
        """Adapt to the acts in `dialogues`.

        Raises:
            UserError: If they have acts, and the training saw none of them.
        """
        self.taught.learn(dialogues)
        self.model = self.run.model
        given = {reply.act for dialogue in dialogues for _, reply in exchanges_of(dialogue) if reply.act}
        if not given:
            return
        support = self._encoded([(dialogue.turns, bot_in(dialogue)) for dialogue in dialogues])
        if (support["labels"] == IGNORE).all():
            raise UserError(
                f"policy: acts of the support must be among {', '.join(self.acts)}, got {', '.join(sorted(given))}"
            )
        self.model = twin(self.run.model)
        load_adapted(self.model, self.run.algorithm.adapt(support, steps=self.steps))
        self.model.eval()

    @torch.no_grad()
    def probabilities(self, turns: Sequence[Turn]) -> dict[str, float]:
        """Return the probability of each act of the reply to `turns`."""
        latest = turns[-TURNS:]
        p = self._logits(latest, "bot")[len(latest) - 1].softmax(-1)
        return dict(zip(self.acts, p.tolist(), strict=True))

    @torch.no_grad()
    def predicted(self, dialogue: Dialogue) -> Dialogue:
        """Return a dialogue in which each turn of the bot has the act that the policy expects there.

        The first turn, before which there is nothing, and those beyond the policy's `TURNS` keep theirs.
        """
        bot, turns = bot_in(dialogue), list(dialogue.turns)
        for i, number in enumerate(self._logits(turns, bot).argmax(-1).tolist()[: len(turns[:TURNS]) - 1], 1):
            if turns[i].speaker == bot:
                turns[i] = replace(turns[i], act=self.acts[number])
        return replace(dialogue, turns=tuple(turns))

    def completed(self, dialogue: Dialogue) -> Dialogue:
        """Return a dialogue in which turns of the bot without an act have the one of `predicted`."""
        pairs = zip(dialogue.turns, self.predicted(dialogue).turns, strict=True)
        return replace(dialogue, turns=tuple(turn if turn.act else expected for turn, expected in pairs))

    def rewriter(self, support: Sequence[Dialogue]) -> Callable[[Dialogue], Dialogue]:
        """Learn a support, and return `predicted`; episodes take this method as their `policy`."""
        self.learn(support)
        return self.predicted

    def __call__(self, turns: Sequence[Turn], parse: Parse) -> Decision:
        """Return what to do after `turns`, with the likeliest act."""
        decision, p = self.taught(turns, parse), self.probabilities(turns)
        act = max(p, key=p.__getitem__)
        return Decision(decision.action, decision.reply, act, f"{decision.why}; next act {act} ({p[act]:.0%})")

    def _logits(self, turns: Sequence[Turn], bot: str | None) -> torch.Tensor:
        """Return the logits of the acts after each turn, `[U, C]`, padded at the end."""
        batch = self._encoded([(turns, bot)])
        labels = batch.pop("labels")
        return self.model(**{name: x[0] for name, x in batch.items()}).reshape(labels.shape[-1], -1)

    def _encoded(self, dialogues: Sequence[Speech]) -> dict[str, torch.Tensor]:
        number = {act: i for i, act in enumerate(self.acts)}
        batch = encoded_turns([dialogues], self.run.tokenizer, number, self.run.config.max_length)
        return on_device_of(self.run.model, batch)
