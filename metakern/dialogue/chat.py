"""Adapt a trained model to a few exchanges, and chat with it.

A line in a chat is a message to the bot, or one of the commands in `HELP`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from metakern import io
from metakern.dialogue.generate import check_sampling, generate
from metakern.dialogue.readers import Dialogue, Turn, read
from metakern.dialogue.run import Run
from metakern.dialogue.tasks import load_adapted
from metakern.dialogue.teach import support_batch
from metakern.errors import UserError, by_the_user
from metakern.meta.parameters import twin

__all__ = ["Chat", "adapt", "talk"]

HELP = """\
/teach   type exchanges: in turn, what you say and what the bot should answer; an empty line ends them
/forget  forget the conversation; what was taught stays
/help    show the commands
/quit    end the chat"""


def adapted_model(run: Run, dialogues: Iterable[Dialogue], steps: int | None = None) -> tuple[nn.Module, str]:
    """Return a copy of the run's model, adapted to `dialogues`, and a line about its perplexity on them.

    Args:
        run: Its model is not changed.
        dialogues: The support.
        steps: The number of inner steps; None stands for as many as in training.

    Raises:
        UserError: If no dialogue has a reply of the bot.
    """
    steps = run.config.most_inner_steps if steps is None else steps
    support = support_batch(run, dialogues)
    run.algorithm.eval()
    before, after = run.algorithm.evaluate(support, support, steps=(0, steps)).mean(1).exp().tolist()
    phi = run.algorithm.adapt(support, steps=steps)
    model = twin(run.model)
    load_adapted(model, phi)
    windows = support["input_ids"].shape[1]
    line = f"inner steps: {steps}, windows of support: {windows}, perplexity on them: {before:.1f} -> {after:.1f}"
    return model, line


def adapt(
    path: str | Path, support: str, out: str | Path, steps: int | None = None, format: str = "auto", **options: Any
) -> str:
    """Adapt a run to conversations, and write the result as a new run.

    Args:
        path: The folder of the run, which is not changed.
        support: The conversations to adapt to: a file or folder, or packaged data, as `readers.read` takes it.
        out: The folder of the new run.
        steps: The number of inner steps; None stands for as many as in training.
        format: The format of the conversations, as of `readers.read`.
        options: The options of the format's reader.

    Returns:
        A line about the perplexity on the support, before and after.

    Raises:
        UserError: If `path` is not the folder of a run, `out` holds one already, or the support has no reply of the
            bot.
        DataError: If the support can't be read.
        CheckpointError: If the run's checkpoint can't be used, or a file can't be written.

    >>> import contextlib, io, tempfile
    >>> from metakern.dialogue.config import Config
    >>> from metakern.dialogue.trainer import train
    >>> data = {"data": "chatterbot:english", "vocab_size": 262, "max_length": 16}
    >>> config = Config(**data, width=8, inner_steps=1, steps=1, pretrain_steps=0)
    >>> with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
    ...     run = train(config, f"{folder}/run")
    ...     line = adapt(f"{folder}/run", "chatterbot:german", f"{folder}/german")
    >>> line
    'inner steps: 1, windows of support: ..., perplexity on them: ... -> ...'
    """
    run, out = Run.open(path), Path(out)
    if (out / "config.toml").exists():
        raise UserError(f"{out}: holds a run already; choose another --out")
    model, line = adapted_model(run, read(support, format, **options), steps)
    run.model.load_state_dict(model.state_dict())
    run.tokenizer.save(out / "tokenizer.json")
    io.write(out / "config.toml", run.config.toml().encode())
    adapted = replace(run, path=out, state={"phase": "adapted", "step": run.state["step"], "from": str(path)})
    adapted.save("best")
    return line


class Chat:
    """A conversation with the model of a run, line by line.

    `hear` takes a line and returns what to show. `greeting` is to be shown first, `prompt` before each line.

    Args:
        run: Its model talks; it is not changed.
        support: Dialogues to adapt to at the start.
        steps: The number of inner steps of each adaptation; None stands for as many as in training.
        temperature: As of `generate`.
        top_p: As of `generate`.
        seed: The seed of the sampling.

    Raises:
        UserError: If `temperature` or `top_p` is out of range, or `support` has nothing to learn.
    """

    def __init__(
        self,
        run: Run,
        support: Sequence[Dialogue] = (),
        *,
        steps: int | None = None,
        temperature: float = 0.7,
        top_p: float = 0.9,
        seed: int = 0,
    ) -> None:
        with by_the_user():
            check_sampling(temperature, top_p)
        self.run, self.steps, self.sampling = run, steps, {"temperature": temperature, "top_p": top_p}
        self.generator = torch.Generator().manual_seed(seed)
        self.known, self.turns = list(support), list[Turn]()
        self.lesson: list[Turn] | None = None
        self.model, self.greeting = (
            run.model,
            "not adapted yet: /teach me some exchanges or just talk; /help shows the commands",
        )
        if self.known:
            self.model, self.greeting = adapted_model(run, self.known, steps)

    @property
    def prompt(self) -> str:
        """What to show before the next line: "bot> " where /teach wants the bot's answer, otherwise "you> "."""
        return "bot> " if self.lesson and len(self.lesson) % 2 else "you> "

    def hear(self, line: str) -> str | None:
        """Return the bot's reply to `line`, or what the command in it answers; None if there is nothing to show.

        Raises:
            EOFError: At the command /quit.
            UserError: If the model's logits are not finite.
        """
        line = line.strip()
        if self.lesson is not None:
            return self._learn(self.lesson, line)
        if line.startswith("/"):
            return self._obey(line)
        if not line:
            return None
        self.turns.append(Turn("user", line))
        length = self.run.config.max_length
        prompt = self.run.tokenizer.prompt(self.turns, length, "bot")
        with by_the_user():
            ids = generate(
                self.model,
                prompt,
                max_new_tokens=min(length // 2, length - len(prompt)),
                eos_id=self.run.tokenizer.eos_id,
                generator=self.generator,
                **self.sampling,
            )
        self.turns.append(Turn("bot", self.run.tokenizer.decode(ids).strip()))
        return self.turns[-1].text

    def _obey(self, command: str) -> str:
        if command == "/quit":
            raise EOFError
        if command == "/teach":
            self.lesson = []
            return "type what you say and what I should answer, in turn; an empty line ends it"
        if command == "/forget":
            self.turns.clear()
            return "the conversation is forgotten"
        return HELP if command == "/help" else f"{command} is not a command\n{HELP}"

    def _learn(self, lesson: list[Turn], line: str) -> str | None:
        if line:
            lesson.append(Turn("bot" if len(lesson) % 2 else "user", line))
            return None
        self.lesson = None
        if len(lesson) < 2:
            return "nothing learned: an exchange needs what you say and an answer"
        self.known.append(Dialogue("taught", str(len(self.known)), tuple(lesson), {"bot": "bot"}))
        self.model, line = adapted_model(self.run, self.known, self.steps)
        return line


def talk(chat: Chat) -> None:
    """Run a chat until /quit or the end of the input.

    On a terminal it shows prompts and keeps a history of lines. From a pipe it reads lines and prints only what `hear`
    returns.
    """
    interactive = sys.stdin.isatty()
    if interactive:
        print(chat.greeting)
    ask = _terminal() if interactive else lambda prompt: _next_line()
    while True:
        try:
            answer = chat.hear(ask(chat.prompt))
        except (EOFError, KeyboardInterrupt):
            return
        if answer is not None:
            print(answer, flush=True)


def _next_line() -> str:
    if line := sys.stdin.readline():
        return line
    raise EOFError


def _terminal() -> Callable[[str], str]:
    """Return the function that asks for a line: prompt_toolkit's, with a history in a file, or Python's `input`."""
    try:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.history import FileHistory
    except ImportError:
        import readline  # noqa: F401  (gives input() a history and editing keys)

        return input
    io.cache_folder().mkdir(parents=True, exist_ok=True)
    return PromptSession(history=FileHistory(str(io.cache_folder() / "history"))).prompt
