"""Adapting a trained model to a handful of exchanges, and talking with it.

In a conversation a line is something said, or a command:

    /teach   type exchanges, what you say and what the bot should answer in turn; an empty line ends them
    /forget  forget the conversation (what was taught stays)
    /help    these lines
    /quit    the end
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from metakern import io
from metakern.dialogue.config import cache_folder
from metakern.dialogue.episodes import collate
from metakern.dialogue.generate import generate
from metakern.dialogue.readers import Dialogue, Turn, read
from metakern.dialogue.run import Run
from metakern.dialogue.tasks import on_device_of
from metakern.dialogue.tokenizer import IGNORE, bot_of
from metakern.errors import UserError, by_the_user
from metakern.meta.parameters import twin

__all__ = ["Chat", "adapt", "support_batch", "talk"]

HELP = "\n".join(line.strip() for line in (__doc__ or "").splitlines() if line.startswith("    /"))


def support_batch(run: Run, dialogues: Iterable[Dialogue]) -> dict[str, Tensor]:
    """``dialogues`` as the support of one task, ``[1, B, L]``: windows of as many whole exchanges as fit."""
    config, tokenizer = run.config, run.tokenizer
    rows = []
    for dialogue in dialogues:
        bot = dialogue.meta.get("bot") or bot_of(dialogue.turns)
        windows: list[list[Turn]] = []
        for exchange in _exchanges(dialogue.turns, bot):
            longer = [*windows[-1], *exchange] if windows else exchange
            if windows and tokenizer.length(longer, bot) <= config.max_length:
                windows[-1] = longer
            else:
                windows.append(exchange)
        rows += [tokenizer.encode_dialogue(turns, config.train_on, config.max_length, bot) for turns in windows]
    rows = [(ids, labels) for ids, labels in rows if any(label != IGNORE for label in labels)]
    if not rows:
        raise UserError("adapt: the support must hold a reply of the bot, got none")
    return on_device_of(run.model, collate([rows], tokenizer.pad_id))


def _exchanges(turns: Iterable[Turn], bot: str | None) -> list[list[Turn]]:
    """``turns`` cut after what the bot says."""
    exchanges: list[list[Turn]] = []
    for turn in turns:
        if not exchanges or (turn.speaker != bot and exchanges[-1][-1].speaker == bot):
            exchanges.append([])
        exchanges[-1].append(turn)
    return exchanges


def adapted_model(run: Run, dialogues: Iterable[Dialogue], steps: int | None = None) -> tuple[nn.Module, str]:
    """A copy of the run's model, adapted to ``dialogues`` by ``steps`` (as in training), and a line that says so."""
    steps = run.config.inner_steps if steps is None else steps
    support = support_batch(run, dialogues)
    run.algorithm.eval()
    before, after = run.algorithm.evaluate(support, support, steps=(0, steps)).mean(1).exp().tolist()
    phi = run.algorithm.adapt(support, steps=steps)
    model = twin(run.model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in phi:
                parameter.copy_(phi[name][0])
    windows = support["input_ids"].shape[1]
    return model, f"{steps} steps on a support of {windows}: its perplexity went from {before:.1f} to {after:.1f}"


def adapt(path: str | Path, support: str, out: str | Path, steps: int | None = None) -> str:
    """Write the run ``path``, adapted to the conversations in the file ``support``, as the run ``out``."""
    run, out = Run.open(path), Path(out)
    if (out / "config.toml").exists():
        raise UserError(f"{out}: holds a run already; choose another --out")
    model, line = adapted_model(run, read(support), steps)
    run.model.load_state_dict(model.state_dict())
    run.tokenizer.save(out / "tokenizer.json")
    io.write(out / "config.toml", run.config.toml().encode())
    adapted = replace(run, path=out, state={"phase": "adapted", "step": run.state["step"], "from": str(path)})
    adapted.save("best")
    return line


class Chat:
    """A conversation: `hear` takes a line and gives what to show; `prompt` says whose line is next."""

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
        self.run, self.steps, self.sampling = run, steps, {"temperature": temperature, "top_p": top_p}
        self.generator = torch.Generator().manual_seed(seed)
        self.known, self.turns = list(support), list[Turn]()
        self.lesson: list[Turn] | None = None
        self.model, self.greeting = run.model, "not adapted: /teach me some exchanges, or just talk; /help"
        if self.known:
            self.model, self.greeting = adapted_model(run, self.known, steps)

    @property
    def prompt(self) -> str:
        """``you`` or, while being taught the bot's side, ``bot``."""
        return "bot> " if self.lesson and len(self.lesson) % 2 else "you> "

    def hear(self, line: str) -> str | None:
        """Answer ``line``, or obey it; None for nothing to show, EOFError for the end."""
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
            return "what you say and what I should answer, in turn; an empty line ends it"
        if command == "/forget":
            self.turns.clear()
            return "forgotten"
        return HELP if command == "/help" else f"{command} is no command\n{HELP}"

    def _learn(self, lesson: list[Turn], line: str) -> str | None:
        if line:
            lesson.append(Turn("bot" if len(lesson) % 2 else "user", line))
            return None
        self.lesson = None
        if len(lesson) < 2:
            return "nothing learned: that was no exchange"
        self.known.append(Dialogue("taught", str(len(self.known)), tuple(lesson), {"bot": "bot"}))
        self.model, line = adapted_model(self.run, self.known, self.steps)
        return line


def talk(chat: Chat) -> None:
    """Talk until the end: with a history on a terminal; line by line, replies alone, where input is piped."""
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
    """What asks for a line on a terminal: prompt_toolkit with a lasting history, or what Python has."""
    try:
        from prompt_toolkit import PromptSession
        from prompt_toolkit.history import FileHistory
    except ImportError:
        import readline  # noqa: F401  (gives input() a history and editing keys)

        return input
    cache_folder().mkdir(parents=True, exist_ok=True)
    return PromptSession(history=FileHistory(str(cache_folder() / "history"))).prompt
