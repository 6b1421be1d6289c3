"""Adapt a trained model to a few exchanges, and chat with it.

A line in a chat is a message to the bot, or one of the commands in `HELP`. The bot is a `Manager`: it answers as taught
where it was taught, and generates a reply elsewhere.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from metakern import io
from metakern.dialogue.generate import Sampling
from metakern.dialogue.manager import Manager, Parser, Policy, contradictions, exchanges_of
from metakern.dialogue.manager.generator import LanguageModel
from metakern.dialogue.manager.parser import NearestParser
from metakern.dialogue.manager.policy import TaughtPolicy
from metakern.dialogue.readers import Dialogue, Turn, read
from metakern.dialogue.run import Run
from metakern.dialogue.teach import MOST_STEPS
from metakern.dialogue.terminal import printable
from metakern.dialogue.tokenizer import bot_in
from metakern.dialogue.words import words
from metakern.errors import CheckpointError, UserError

__all__ = ["CHAT_SAMPLING", "Chat", "adapt", "talk"]

HELP = """\
/teach     type exchanges: in turn, what you say and what the bot should answer; an empty line ends them
/why       show why the bot said the last thing: what it understood, what it chose to do, what was taught like it
/undo      take back the last lesson, or the last message and its answer
/forget    forget the conversation; what was taught stays
/save DIR  write the adapted bot as a new run, and what it was taught
/help      show the commands
/quit      end the chat"""
GREETING = "not adapted yet: /teach me some exchanges or just talk; /help shows the commands"
CHAT_SAMPLING = Sampling(temperature=0.7, top_p=0.9)
TAUGHT = "support.jsonl"  # the file of a saved bot that holds what it was taught


def adapt(
    path: str | Path,
    support: str,
    out: str | Path,
    most: int = MOST_STEPS,
    progress: Callable[[str], object] | None = None,
    format: str = "auto",
    **options: Any,
) -> str:
    """Adapt a run to conversations until it gives the taught replies, and write the result as a new run.

    Args:
        path: The folder of the run, which is not changed.
        support: The conversations to adapt to: a file or folder, or packaged data, as `readers.read` takes it.
        out: The folder of the new run. It gets a copy of the conversations, `support.jsonl`, for chats with the run.
        most: The largest number of inner steps, as of `metakern.dialogue.teach.teach`.
        progress: A function that is called with a line about each step.
        format: The format of the conversations, as of `readers.read`.
        options: The options of the format's reader.

    Returns:
        A line about the steps, the taught replies that are right, and the loss on the support.

    Raises:
        UserError: If `path` is not the folder of the run of a generator, `out` holds a run already or is in use, or the
            support has no reply of the bot.
        DataError: If the support can't be read.
        CheckpointError: If the run's checkpoint can't be used, or a file can't be written.

    >>> import contextlib, io, tempfile
    >>> from metakern.dialogue.config import Config
    >>> from metakern.dialogue.trainer import train
    >>> data = {"data": "chatterbot:english", "vocab_size": 262, "max_length": 16}
    >>> config = Config(**data, width=8, inner_steps=1, steps=1, pretrain_steps=0)
    >>> with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
    ...     run = train(config, f"{folder}/run")
    ...     line = adapt(f"{folder}/run", "chatterbot:german", f"{folder}/german", most=1)
    >>> line
    'inner steps: 1, taught replies right: 0 of ..., loss on them: ... -> ...'
    """
    run, out = Run.open(path), Path(out)
    with io.locked(out):
        _check_free(out)
        generator = LanguageModel(run, most=most)
        known = read(support, format, **options)
        line = generator.learn(known, progress)
        _write(run, generator.model, known, out)
    return line


class Chat:
    """A conversation with a bot, line by line.

    `hear` takes a line and returns what to show, `answer` yields it in pieces as soon as they are known. `greeting` is
    to be shown first, `prompt` before each line.

    Args:
        run: The run whose model talks; it is not changed.
        support: Dialogues to learn at the start. Without any, a run that was adapted knows what it was taught.
        parser: Says what a message means; None stands for `NearestParser()`.
        policy: Says what to do about it; None stands for `TaughtPolicy()`.
        progress: A function that is called with a line about each step of an adaptation.
        sampling: How to choose tokens; None stands for `CHAT_SAMPLING`.
        options: The other arguments of `metakern.dialogue.manager.generator.LanguageModel`.

    Raises:
        UserError: If `run` is not one of a generator, a number is out of range, or `support` has nothing to learn.
    """

    def __init__(
        self,
        run: Run,
        support: Sequence[Dialogue] = (),
        *,
        parser: Parser | None = None,
        policy: Policy | None = None,
        progress: Callable[[str], object] | None = None,
        sampling: Sampling | None = None,
        **options: Any,
    ) -> None:
        self.run, self.progress = run, progress
        self.generator = LanguageModel(run, sampling=sampling or CHAT_SAMPLING, **options)
        self.manager = Manager(parser or NearestParser(), policy or TaughtPolicy(), self.generator)
        self.known, self.turns = list(support), list[Turn]()
        self.done: list[list[Dialogue] | None] = []  # what /undo takes back: what was known before a lesson, or a reply
        self.lesson: list[Turn] | None = None
        self.greeting = self._learn() if self.known else self._recall()

    @property
    def model(self) -> nn.Module:
        """The adapted model."""
        return self.generator.model

    @property
    def prompt(self) -> str:
        """What to show before the next line: "bot> " where /teach wants the bot's answer, otherwise "you> "."""
        return "bot> " if self.lesson and len(self.lesson) % 2 else "you> "

    def hear(self, line: str) -> str | None:
        """Return the bot's reply to `line`, or what the command in it answers; None if there is nothing to show.

        Raises:
            EOFError: At the command /quit.
            UserError: If the model's logits are not finite, or /save can't write.
        """
        pieces = list(self.answer(line))
        return "".join(pieces) if pieces else None

    def answer(self, line: str) -> Iterator[str]:
        """Yield what `hear` returns, in pieces.

        A reply belongs to the conversation when it is whole; one that is broken off does not.
        """
        line = line.strip()
        if self.lesson is not None:
            yield from filter(None, [self._taught(self.lesson, line)])
        elif line.startswith("/"):
            yield self._obey(*line.partition(" ")[::2])
        elif line:
            turns = [*self.turns, Turn("user", line)]
            pieces = []
            for piece in self.manager.reply(turns):
                pieces.append(piece)
                yield piece
            if not pieces:
                yield ""
            act = self.manager.decision.act if self.manager.decision else ""
            self.turns = [*turns, Turn("bot", "".join(pieces), act)]
            self.done.append(None)

    def _obey(self, command: str, argument: str) -> str:
        if command == "/quit":
            raise EOFError
        if command == "/teach":
            self.lesson = []
            return "type what you say and what I should answer, in turn; an empty line ends it"
        if command == "/forget":
            self.turns.clear()
            self.done = [known for known in self.done if known is not None]
            return "the conversation is forgotten"
        if command == "/why":
            return self.why()
        if command == "/undo":
            return self._undo()
        if command == "/save":
            return self._save(argument.strip())
        return HELP if command == "/help" else f"{command} is not a command\n{HELP}"

    def why(self) -> str:
        """Return lines about the last reply: the parse of the message, the decision, the nearest taught texts."""
        parse, decision = self.manager.parse, self.manager.decision
        if not self.turns or parse is None or decision is None:
            return "nothing was said yet"
        intent = "none of those taught" if parse.intent is None else parse.intent
        lines = [f"intent: {intent} (confidence {parse.confidence:.2f}, threshold {parse.threshold:.2f})"]
        lines += [f"slots: {', '.join(f'{name} = {value}' for name, value in parse.slots.items())}"] * bool(parse.slots)
        lines.append(f"policy: {decision.action}, as {decision.why}")
        lines += [f"taught, {n.similarity:.2f} like it: {n.text} -> {n.label}" for n in parse.neighbors]
        return "\n".join(lines)

    def _taught(self, lesson: list[Turn], line: str) -> str | None:
        if line:
            lesson.append(Turn("bot" if len(lesson) % 2 else "user", line))
            return None
        self.lesson = None
        if len(lesson) < 2:
            return "nothing learned: an exchange needs what you say and an answer"
        before = list(self.known)
        new = Dialogue("taught", str(len(self.known)), tuple(lesson), {"bot": "bot"})
        replaced = [known for known in before if _asks_the_same(known, new)]
        self.known = [*(known for known in before if known not in replaced), new]
        try:
            said = self._learn()
        except BaseException:  # Ctrl-C among them, which breaks off a lesson
            self.known = before
            raise
        self.done.append(before)
        return said + "; the earlier answer to it is forgotten" * bool(replaced)

    def _learn(self) -> str:
        """Learn all that is known, and return a line about it, with another one for each contradiction."""
        lines = [self.manager.learn(self.known, self.progress)]
        for text in contradictions(self.known):
            lines.append(f"taught with two answers, of which the last one counts: {text}")
        return "\n".join(lines)

    def _recall(self) -> str:
        """Take up what an adapted run was taught, which its weights hold; return the line to greet with."""
        taught = self.run.path / TAUGHT
        if self.run.state["phase"] != "adapted" or not taught.exists():
            return GREETING
        self.known = list(read(str(taught)))
        self.manager.recall(self.known)
        self.generator.recall(self.known)
        exchanges = sum(len(exchanges_of(dialogue)) for dialogue in self.known)
        return f"exchanges taught before: {exchanges}; /teach me more or just talk; /help shows the commands"

    def _undo(self) -> str:
        if not self.done:
            return "nothing to take back"
        before = self.done.pop()
        if before is None:
            self.turns = self.turns[:-2]
            return "the last message and its answer are taken back"
        self.known = before
        if self.known:
            return f"the last lesson is taken back; {self._learn()}"
        self.manager.forget()
        return "the last lesson is taken back; nothing is taught any more"

    def _save(self, folder: str) -> str:
        if not folder:
            return "name the folder of the new run: /save runs/mine"
        if not self.known:
            return "nothing to save: nothing was taught yet"
        out = Path(folder)
        with io.locked(out):
            _check_free(out)
            _write(self.run, self.model, self.known, out)
        return f"saved; next: metakern chat {folder}"


def _check_free(out: Path) -> None:
    if (out / "config.toml").exists():
        raise UserError(f"{out}: holds a run already; choose another folder")


def _write(run: Run, model: nn.Module, known: Sequence[Dialogue], out: Path) -> None:
    """Write a run whose model has been adapted to `known` into the folder `out`; `run` itself stays as it is."""
    io.write(out / TAUGHT, "".join(map(_messages, known)).encode())
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    try:
        run.model.load_state_dict(model.state_dict())
        state = {"phase": "adapted", "step": run.state["step"], "from": str(run.path)}
        adapted = replace(run, path=out, state=state)
        adapted.save_vocabulary()
        adapted.save("best")
        io.write(out / "config.toml", run.config.toml().encode())  # makes the folder a run, so it comes last
    finally:
        run.model.load_state_dict(before)


def _messages(dialogue: Dialogue) -> str:
    """Return a dialogue as a line of chat messages."""
    bot = bot_in(dialogue)
    roles = [("assistant" if turn.speaker == bot else turn.speaker, turn.text) for turn in dialogue.turns]
    messages = [{"role": role if role in ("assistant", "system") else "user", "content": text} for role, text in roles]
    return json.dumps({"topic": dialogue.task_id, "messages": messages}, ensure_ascii=False) + "\n"


def _asks_the_same(known: Dialogue, new: Dialogue) -> bool:
    """Whether both are one exchange each, with the same words of the user."""
    pairs = [exchanges_of(dialogue) for dialogue in (known, new)]
    if any(len(pair) != 1 or len(d.turns) != 2 for pair, d in zip(pairs, (known, new), strict=True)):
        return False
    first, second = (pair[0][0].text for pair in pairs)
    return (words(first) or (first,)) == (words(second) or (second,))


def talk(chat: Chat) -> None:
    """Run a chat until /quit or the end of the input.

    On a terminal it shows prompts and keeps a history of lines. From a pipe it reads lines and prints only what `hear`
    returns. Pieces of replies are printed as they come; Ctrl-C breaks off a reply.
    """
    interactive = sys.stdin.isatty()
    if interactive:
        print(printable(chat.greeting))
    ask = _terminal() if interactive else lambda prompt: _next_line()
    while True:
        try:
            line = ask(chat.prompt)
        except EOFError:
            if interactive or not chat.lesson:
                return
            line = ""  # the end of a pipe ends a lesson, too
        except KeyboardInterrupt:
            return
        shown = False
        try:
            for piece in chat.answer(line):
                print(printable(piece), end="", flush=True)
                shown = True
        except EOFError:
            return
        except KeyboardInterrupt:
            if not interactive:
                return
        except UserError as error:
            if not interactive:
                raise
            print(printable(str(error)), end="")
            shown = True
        if shown:
            print(flush=True)


def _next_line() -> str:
    if line := sys.stdin.readline():
        return line.encode("utf-8", "replace").decode()  # bytes that are not UTF-8 come as surrogates
    raise EOFError


def _terminal() -> Callable[[str], str]:
    """Return the function that asks for a line: prompt_toolkit's, with a history in a file, or Python's `input`."""
    try:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.history import FileHistory
    except ImportError:
        import readline  # noqa: F401  (gives input() a history and editing keys)

        return input
    try:
        return PromptSession(history=FileHistory(str(io.private(io.cache_folder() / "history")))).prompt
    except CheckpointError:  # without a file, the history lasts as long as the chat
        return PromptSession().prompt
