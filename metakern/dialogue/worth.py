"""What adaptation is worth on some data, before anybody meta-trains on them.

A small model is trained plainly on the training tasks, and then fine-tuned to the support of each test task. The gain
(`metakern.dialogue.gain`) is how much that lowers the loss of the query.

Where the context already tells the task, there is nothing to adapt to, and no meta-learner can win more than is there.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from metakern.dialogue.config import Config
from metakern.dialogue.gain import gain, worth
from metakern.dialogue.rates import at_factors, best_factors
from metakern.dialogue.split import Split
from metakern.dialogue.tasks import episodes, load_split
from metakern.dialogue.terminal import say
from metakern.dialogue.tokenizer import SYSTEM_SPEAKERS, bot_in
from metakern.dialogue.trainer import StoppedError, train
from metakern.dialogue.words import words

__all__ = ["STEPS", "measure", "show", "sizes"]

STEPS = (0, 1, 3, 5, 10, 30)


def sizes(split: Split) -> dict[str, Any]:
    """Return how many tasks, dialogues and turns there are, how long the turns are, and how many replies recur.

    `recurring` is the share of replies that the bot gives word for word in another dialogue of the task too.

    >>> from metakern.dialogue.readers import read
    >>> from metakern.dialogue.split import split_tasks
    >>> sizes(split_tasks(read("chatterbot:english")))["recurring"] < 0.5
    True
    """
    tasks = [task for part in (split.train, split.validation, split.test) for task in part]
    users, replies, recurring = [], [], []
    for task in tasks:
        said = [list(_turns(d, of_bot=True)) for d in task.dialogues]
        occurs: dict[tuple[str, ...], int] = {}
        for turns in said:
            for text in set(turns):
                occurs[text] = occurs.get(text, 0) + 1
        recurring += [occurs[text] > 1 for turns in said for text in turns]
        replies += [len(text) for turns in said for text in turns]
        users += [len(text) for d in task.dialogues for text in _turns(d, of_bot=False)]
    dialogues = [len(task.dialogues) for task in tasks]
    return {
        "tasks": len(tasks),
        "dialogues": sum(dialogues),
        "dialogues_a_task": statistics.median(dialogues),
        "turns": len(users) + len(replies),
        "words_of_a_user": statistics.mean(users or [0]),
        "words_of_a_reply": statistics.mean(replies or [0]),
        "recurring": statistics.mean(recurring or [0]),
        "left_out": dict(split.skipped),
    }


def measure(config: Config) -> dict[str, Any]:
    """Return `sizes` of the data of `config`, and the `loss` of test tasks after each of `STEPS`, with the `gain`.

    The model of `config` is trained for `config.steps` steps, in a folder that is removed afterwards; the rates are
    chosen on the validation tasks.

    Raises:
        DataError, UserError, DivergenceError: As `train`.
        StoppedError: After Ctrl-C or SIGTERM.
    """
    split = load_split(config)
    found = sizes(split)
    with tempfile.TemporaryDirectory() as folder:
        plain = replace(config, algorithm="finetune", algorithm_options=(), pretrain_steps=0, eval_every=config.steps)
        try:
            run = train(plain, Path(folder) / "run")
        except StoppedError:
            raise StoppedError("data: stopped; nothing is kept") from None
        validation, test = (episodes(plain, part, run.tokenizer) for part in (split.validation, split.test))
        factors = best_factors(run.algorithm, validation, STEPS, config.eval_tasks)
        losses = at_factors(run.algorithm, factors, test, STEPS)[0].mean(1).tolist()
    found |= {"steps": list(STEPS), "rates": [config.inner_lr * factor for factor in factors]}
    return found | {"loss": losses, "gain": gain(losses)}


def show(name: str, found: dict[str, Any], console: Console) -> None:
    """Print what `measure` found."""
    say(
        console,
        f"{name}: {found['tasks']} tasks, {found['dialogues']} dialogues (median {found['dialogues_a_task']:g} a task),"
        f" {found['turns']} turns",
    )
    for reason, count in sorted(found["left_out"].items()):
        say(console, f"left out: {count} {reason}")
    say(
        console,
        f"words in a user's turn {found['words_of_a_user']:.1f}, in a reply {found['words_of_a_reply']:.1f};"
        f" {found['recurring']:.0%} of the replies recur in another dialogue of the task",
    )
    curve = ", ".join(f"{loss:.3f} after {k}" for k, loss in zip(found["steps"], found["loss"], strict=True))
    say(console, f"loss of unseen tasks in nats per token, fine-tuned: {curve}")
    say(console, worth(found["gain"]))


def _turns(dialogue: Any, of_bot: bool) -> Iterable[tuple[str, ...]]:
    bot = bot_in(dialogue)
    spoken = (turn for turn in dialogue.turns if turn.speaker not in SYSTEM_SPEAKERS)
    return (words(turn.text) or (turn.text,) for turn in spoken if (turn.speaker == bot) is of_bot)
