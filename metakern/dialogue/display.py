"""Show the user where a long computation stands: a progress bar or, where there is no terminal, lines of text."""

from __future__ import annotations

from typing import Any, TypeVar

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn

from metakern.dialogue import processes
from metakern.dialogue.terminal import printable, say

__all__ = ["Display"]

Self = TypeVar("Self", bound="Display")


class Display:
    """A context manager that prints lines and, on a terminal, a progress bar below them for each part of the work.

    If `quiet`, or in another process than the first one of a run, it shows nothing.
    """

    def __init__(self, quiet: bool = False) -> None:
        self.console = Console(quiet=quiet or not processes.is_first())
        self.bar = Progress(
            TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[text]}"), console=self.console
        )

    def __enter__(self: Self) -> Self:
        if self.console.is_terminal:
            self.bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        if self.console.is_terminal:
            self.bar.stop()

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
            if not any(task.description == part for task in self.bar.tasks):
                self.bar.add_task(part, total=1.0, text="")
            self.bar.update(self.bar.task_ids[-1], completed=done, text=escape(printable(text)))
        elif line:
            self.say(f"{part} {text}")
