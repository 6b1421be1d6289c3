"""The generator: a language model that adapts until it gives the taught replies, and then speaks token by token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from metakern.dialogue.generate import Sampling, stream, text_of_stream
from metakern.dialogue.hints import Hints
from metakern.dialogue.manager import Decision
from metakern.dialogue.readers import Dialogue, Turn
from metakern.dialogue.run import Run
from metakern.dialogue.tasks import load_adapted
from metakern.dialogue.teach import MOST_STEPS, Progress, teach
from metakern.errors import UserError, by_the_user
from metakern.meta.parameters import twin

__all__ = ["LanguageModel"]


class LanguageModel:
    """The generator of a run that `metakern train` made.

    Args:
        run: A run or its folder; it is not changed.
        most: The largest number of inner steps of an adaptation, as of `metakern.dialogue.teach.teach`.
        sampling: How to choose tokens; None stands for the defaults of `Sampling`.
        stop: Texts before which a reply ends.
        most_tokens: The largest number of tokens of a reply; None stands for half of the run's `max_length`.
        seed: The seed of the sampling.

    Attributes:
        model: The adapted model; the run's own before the first `learn`.
        hints: What says before a reply what it should be like, if the run was trained with hints: the act that the
            policy chose, and the taught reply to the nearest message.

    Raises:
        UserError: If the run is not one of a generator, or a number is out of range.
    """

    def __init__(
        self,
        run: Run | str | Path,
        *,
        most: int = MOST_STEPS,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        most_tokens: int | None = None,
        seed: int = 0,
    ) -> None:
        self.run = run if isinstance(run, Run) else Run.open(run)
        if self.run.config.part != "generator":
            raise UserError(
                f"{self.run.path}: must be the run of a generator, got one of a {self.run.config.part}: give it as"
                f" --{self.run.config.part} beside the run of a generator"
            )
        if most_tokens is not None and most_tokens < 1:
            raise UserError(f"chat: max_tokens must be at least 1, got {most_tokens}")
        self.most, self.stop, self.most_tokens = most, tuple(filter(None, stop)), most_tokens
        self.sampling = sampling or Sampling()
        self.random = torch.Generator().manual_seed(seed)
        self.model, self.hints = self.run.model, Hints(self.run.config.hints)

    def learn(self, dialogues: Sequence[Dialogue], progress: Callable[[str], object] | None = None) -> str:
        """Adapt the model as trained until it gives the bot's replies in `dialogues`; return a line about it.

        Raises:
            UserError: If no dialogue has a reply of the bot.
        """

        def shown(now: Progress) -> None:
            if progress:
                progress(f"inner step {now.steps}, taught replies right: {now.right} of {now.replies}")

        dialogues = list(dialogues)
        lesson = teach(self.run, dialogues, self.most, shown)
        if progress:
            progress("")
        self.model = twin(self.run.model)
        load_adapted(self.model, lesson.phi)
        self.recall(dialogues)
        return lesson.summary

    def recall(self, dialogues: Sequence[Dialogue]) -> None:
        """Take hints from `dialogues`, which the model holds already."""
        self.hints = Hints(self.run.config.hints, dialogues)

    def forget(self) -> None:
        """Go back to the model as it was trained."""
        self.model = self.run.model
        self.recall([])

    def __call__(self, turns: Sequence[Turn], decision: Decision) -> Iterator[str]:
        """Yield the pieces of a reply to `turns`; those of very long turns that do not fit are dropped, oldest first.

        Raises:
            UserError: If the model's logits are not finite.
        """
        length, tokenizer = self.run.config.max_length, self.run.tokenizer
        turns = [*self.hints(turns, "bot"), *self.hints.before(turns[-1].text, decision.act)]
        prompt = tokenizer.prompt(turns, length, "bot")
        room = min(length // 2, length - len(prompt))
        with by_the_user():
            ids = stream(
                self.model,
                prompt,
                max_new_tokens=min(room, self.most_tokens or room),
                eos_id=tokenizer.eos_id,
                generator=self.random,
                sampling=self.sampling,
            )
            yield from text_of_stream(tokenizer.decode, ids, self.stop)
