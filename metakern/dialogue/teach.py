"""Teach a model exchanges: adapt it until it gives the taught replies.

The first inner steps are those of the run's algorithm, as many as in its training. They go far, but more of them may
lead nowhere, as no training has seen them. If replies are still wrong, the steps that follow are Adam's. Its rate is
the root mean square of the algorithm's first step, which says how far a step may go in this model.

A reply is right if the model, decoding greedily, gives it token by token. That is so exactly if each of its tokens is
the likeliest one after the tokens before it, so one forward pass over the support judges all replies after each inner
step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import metakern as mk
from metakern.dialogue.episodes import collate
from metakern.dialogue.hints import Hints
from metakern.dialogue.rates import LOWER, scaled
from metakern.dialogue.readers import Dialogue, Turn
from metakern.dialogue.run import Run
from metakern.dialogue.tasks import on_device_of
from metakern.dialogue.tokenizer import IGNORE, bot_in
from metakern.errors import UserError

__all__ = ["MOST_STEPS", "Lesson", "Progress", "judged", "support_batch", "teach"]

MOST_STEPS = 60
RATES = 1e-3, 3e-2  # the lowest and the highest rate of Adam


@dataclass(frozen=True)
class Progress:
    """How far an adaptation is.

    Attributes:
        steps: The number of inner steps so far.
        loss: The mean loss of the tokens to learn, in nats.
        right: The number of taught replies that the model gives.
        replies: The number of taught replies.
    """

    steps: int
    loss: float
    right: int
    replies: int


@dataclass(frozen=True)
class Lesson:
    """The result of an adaptation.

    Attributes:
        phi: The adapted parameters by name, each `[1, *shape]`, as an algorithm's `adapt` returns them.
        end: The progress after the inner steps that led to `phi`.
        curve: The progress after 0, 1, 2, … inner steps, which may be more than led to `phi`.
    """

    phi: dict[str, Tensor]
    end: Progress
    curve: tuple[Progress, ...]

    @property
    def summary(self) -> str:
        """A line for the user: inner steps, right replies, and the loss before and after."""
        end, before = self.end, self.curve[0].loss
        right = f"taught replies right: {end.right} of {end.replies}"
        return f"inner steps: {end.steps}, {right}, loss on them: {before:.2f} -> {end.loss:.2f}"


class Window(NamedTuple):
    """A part of a dialogue that the model reads at once: its turns, and the speaker who is the bot."""

    turns: Sequence[Turn]
    bot: str | None


class Reply(NamedTuple):
    """Where a taught reply is in the support: the tokens `begin` to `end` of a window."""

    window: int
    begin: int
    end: int


def teach(
    run: Run,
    dialogues: Iterable[Dialogue],
    most: int = MOST_STEPS,
    progress: Callable[[Progress], object] | None = None,
) -> Lesson:
    """Return the parameters of the run's model, adapted to `dialogues` until it gives the bot's replies in them.

    The number of inner steps is at least the largest one of the training, and at most `most`. Those beyond that of the
    training are steps of Adam. The adaptation ends before `most` if all replies are right; a question with several
    answers can have one of them right. Otherwise the result has the parameters after the step with the most right
    replies; of several such steps, the one with the lowest loss.

    Args:
        run: Its model is not changed. Its algorithm is in eval mode afterwards.
        dialogues: The support.
        most: The largest number of inner steps, at least 0.
        progress: A function that is called before the first step and after each. What it raises ends the adaptation.

    Raises:
        UserError: If no dialogue has a reply of the bot, or the run's algorithm has no inner loop.

    >>> import contextlib, io, tempfile
    >>> from metakern.dialogue.config import Config
    >>> from metakern.dialogue.trainer import train
    >>> data = {"data": "chatterbot:english", "vocab_size": 262, "max_length": 24}
    >>> config = Config(**data, width=8, inner_steps=1, steps=1, pretrain_steps=0)
    >>> with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
    ...     run = train(config, folder)
    >>> lesson = teach(run, [Dialogue("taught", "1", (Turn("user", "tea?"), Turn("bot", "yes")))], most=2)
    >>> [progress.steps for progress in lesson.curve], lesson.end.replies
    ([0, 1, 2], 1)
    """
    dialogues = list(dialogues)
    windows = _windows(run, dialogues, dialogues)
    support, replies = _collated(run, windows), _replies(run, windows)
    least, own = min(run.config.most_inner_steps, most), run.algorithm
    attainable = len({tuple(support["input_ids"][0, i, :begin].tolist()) for i, begin, _ in replies})
    curve: list[Progress] = []
    found: list[tuple[dict[str, Tensor], Progress]] = []  # the best so far
    before: dict[str, Tensor] = {}
    rate = RATES[0]

    def enough(steps: int, phi: dict[str, Tensor]) -> bool:
        nonlocal rate
        del curve[steps:]  # the engine begins anew if it has to change its plan
        curve.append(now := _progress(run, phi, support, replies, steps))
        if progress is not None:
            progress(now)
        if steps == 0:
            before.update((name, p.detach().clone()) for name, p in phi.items())
        elif steps == 1 and before:
            rate = _rate(before, phi)
            before.clear()
        if steps < least:
            return False
        if not found or (now.right, -now.loss) > (found[0][1].right, -found[0][1].loss):
            found[:] = [({name: p.detach().clone() for name, p in phi.items()}, now)]
        return now.right >= attainable

    with run.teaching:
        own.eval()
        own.adapt(support, steps=least, until=enough)
        if found[0][1].right < attainable and any(after.loss > now.loss for now, after in pairwise(curve)):
            first = list(curve)
            with scaled(own, LOWER):
                own.adapt(support, steps=least, until=enough)
            if found[0][1] is first[-1]:
                curve[:] = first
        phi, best = found[0]
        if most > least and best.right < attainable:
            if run.adam is None:
                run.adam = mk.MAML(run.model, mk.losses.causal_lm, inner=mk.optim.Adam(lr=1.0), adapt=list(phi)).eval()
            with scaled(run.adam, rate):
                run.adam.adapt(support, most - least, phi, until=lambda k, phi: k > 0 and enough(least + k, phi))
    return Lesson(*found[0], tuple(curve))


def judged(
    run: Run, phi: dict[str, Tensor], dialogues: Iterable[Dialogue], support: Iterable[Dialogue] = ()
) -> Progress:
    """Return how many of the bot's replies in `dialogues` the adapted model gives, each in its context; `steps` is 0.

    Hints have the replies in `support`.

    Raises:
        UserError: As `teach`.
    """
    windows = _windows(run, dialogues, support)
    return _progress(run, phi, _collated(run, windows), _replies(run, windows), 0)


def _rate(before: dict[str, Tensor], after: dict[str, Tensor]) -> float:
    """Return the root mean square of an inner step, within `RATES`."""
    squares = sum((after[name] - p).square().sum().item() for name, p in before.items())
    root = math.sqrt(squares / sum(p.numel() for p in before.values()))
    return min(max(RATES[0], root), RATES[1])  # the lowest for NaN


def support_batch(run: Run, dialogues: Iterable[Dialogue]) -> dict[str, Tensor]:
    """Return `dialogues` as the support of one task, tensors `[1, B, L]` on the device of the run's model.

    Each of the B windows holds as many consecutive exchanges of a dialogue as fit into `max_length` tokens. An exchange
    that is longer has a window to itself, which is cut at `max_length`.

    Raises:
        UserError: If no window has a token to learn.
    """
    dialogues = list(dialogues)
    return _collated(run, _windows(run, dialogues, dialogues))


def _windows(run: Run, dialogues: Iterable[Dialogue], support: Iterable[Dialogue]) -> list[Window]:
    """Return the windows of dialogues that have a token to learn, with the hints of the run's config."""
    config, tokenizer, hints = run.config, run.tokenizer, Hints(run.config.hints, support)
    found = []
    for dialogue in dialogues:
        bot = bot_in(dialogue)
        windows: list[list[Turn]] = []
        for exchange in _exchanges(hints(dialogue.turns, bot, dialogue.turns), bot):
            longer = [*windows[-1], *exchange] if windows else exchange
            if windows and tokenizer.length(longer, bot) <= config.max_length:
                windows[-1] = longer
            else:
                windows.append(exchange)
        found += [Window(turns, bot) for turns in windows]
    found = [window for window in found if any(label != IGNORE for label in _encoded(run, window)[1])]
    if not found:
        raise UserError("adapt: support must hold a reply of the bot, got none")
    return found


def _encoded(run: Run, window: Window) -> tuple[list[int], list[int]]:
    return run.tokenizer.encode_dialogue(window.turns, run.config.train_on, run.config.max_length, window.bot)


def _collated(run: Run, windows: Sequence[Window]) -> dict[str, Tensor]:
    rows = [_encoded(run, window) for window in windows]
    return on_device_of(run.model, collate([rows], run.tokenizer.pad_id))


def _replies(run: Run, windows: Sequence[Window]) -> list[Reply]:
    return [
        Reply(i, len(before), len(before) + len(reply))
        for i, window in enumerate(windows)
        for _, before, reply in run.tokenizer.replies(window.turns, run.config.max_length, window.bot)
    ]


def _exchanges(turns: Iterable[Turn], bot: str | None) -> list[list[Turn]]:
    """Return `turns` in exchanges: lists that end with a turn of the bot (the last one may lack it)."""
    exchanges: list[list[Turn]] = []
    for turn in turns:
        if not exchanges or (turn.speaker != bot and exchanges[-1][-1].speaker == bot):
            exchanges.append([])
        exchanges[-1].append(turn)
    return exchanges


@torch.no_grad()
def _progress(
    run: Run, phi: dict[str, Tensor], support: dict[str, Tensor], replies: Sequence[Reply], steps: int
) -> Progress:
    ids, labels = support["input_ids"][0], support["labels"][0]  # [B, L]
    inputs = {"input_ids": ids, "attention_mask": support["attention_mask"][0]}
    output = torch.func.functional_call(run.model, {name: p[0] for name, p in phi.items()}, kwargs=inputs)
    logits = getattr(output, "logits", output)[:, :-1].float()  # [B, L - 1, V]
    loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE).item()
    likeliest = logits.argmax(-1) == ids[:, 1:]
    right = sum(bool(likeliest[i, begin - 1 : end - 1].all()) for i, begin, end in replies)
    return Progress(steps, loss if math.isfinite(loss) else math.inf, right, len(replies))
