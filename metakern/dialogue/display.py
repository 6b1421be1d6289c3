"""Show the user where a long computation stands: a progress bar or, where there is no terminal, lines of text."""

from __future__ import annotations

import logging
from contextlib import ExitStack
from typing import Any, TypeVar

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from metakern.dialogue import processes
from metakern.dialogue.terminal import printable, say
from metakern.meta.seconds import LOG

__all__ = ["Display"]

Self = TypeVar("Self", bound="Display")
PLAN = "plan"


class _Plans(logging.Handler):
    """Shows in a bar what a plan does besides meta-gradients. Meanwhile no other handler gets these records."""

    def __init__(self, display: Display) -> None:
        super().__init__()
        self._display = display

    def emit(self, record: logging.LogRecord) -> None:
        self._display.planning(record.getMessage() if record.levelno >= logging.INFO else "")

    def __enter__(self) -> None:
        self._before = LOG.level, LOG.propagate
        LOG.setLevel(logging.DEBUG)
        LOG.propagate = False
        LOG.addHandler(self)

    def __exit__(self, *_: Any) -> None:
        LOG.removeHandler(self)
        level, LOG.propagate = self._before
        LOG.setLevel(level)


class Display:
    """A context manager that prints lines and, on a terminal, a progress bar below them for each part of the work.

    If `quiet`, or in another process than the first one of a run, it shows nothing.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.console = Console(quiet=quiet or not processes.is_first())
        self.bar = Progress(
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[text]}"), console=self.console
        )
        self._plans, self._shown = _Plans(self), ExitStack()

    def __enter__(self: Self) -> Self:
        if self.console.is_terminal:
            self._shown.enter_context(self.bar)
            self._shown.enter_context(self._plans)
        return self

    def __exit__(self, *_: Any) -> None:
        self._shown.close()

    def say(self, text: str) -> None:
        """Print lines of text as they are, but for what `printable` replaces."""
        say(self.console, text)

    def progress(self, part: str, done: float, text: str, line: bool = True) -> None:
        """Show how far a part of the work is.

        Args:
            part: The name of the part.
            done: The finished share of it, from 0 to 1.
            text: What else to show.
            line: Whether to print a line where there is no terminal.
        """
        if self.console.is_terminal:
            self.bar.update(self._bar_of(part, 1.0), completed=done, text=escape(printable(text)))
        elif line:
            self.say(f"{part} {text}")

    def planning(self, step: str) -> None:
        """Show which step of verifying a plan or a captured program has begun, in a bar of its own; "": none runs."""
        bar = self._bar_of(PLAN, None)  # without a total, it moves to and fro
        if step:
            self.bar.update(bar, text=escape(step))
        else:
            self.bar.remove_task(bar)

    def _bar_of(self, part: str, total: float | None) -> TaskID:
        """Return the bar of a part of the work, a new one where it has none."""
        found = (task.id for task in self.bar.tasks if task.description == part)
        bar = next(found, None)
        return self.bar.add_task(part, total=total, text="") if bar is None else bar
