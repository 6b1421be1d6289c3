"""Show the progress of a long run: on a terminal a bar with rate and remaining time, elsewhere lines."""

from __future__ import annotations

import sys
import time
from types import TracebackType
from typing import Any

SILENCE = 10  # seconds between lines


class Progress:
    """The progress over `total` steps: `say(what)` begins the next step, `skip(count)` leaves steps out."""

    def __init__(self, total: int) -> None:
        self.total, self.done = total, 0
        self._start = self._said = time.monotonic()
        self._bar: Any = _bar() if sys.stderr.isatty() else None

    def __enter__(self) -> Progress:
        if self._bar:
            self._bar.start()
            self._task = self._bar.add_task("", total=self.total)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, where: TracebackType | None) -> None:
        if self._bar:
            self._bar.stop()

    def say(self, what: str) -> None:
        if self._bar:
            self._bar.update(self._task, completed=self.done, total=self.total, description=what)
        elif (now := time.monotonic()) - self._said >= SILENCE:
            left = (now - self._start) / max(self.done, 1) * (self.total - self.done)
            print(f"{self.done + 1}/{self.total} {what}, {left / 60:.0f} min left", file=sys.stderr, flush=True)
            self._said = now
        self.done += 1

    def skip(self, count: int) -> None:
        self.total -= count


def _bar() -> Any:
    """Return a progress bar of rich, or None if rich is not installed."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
        from rich.progress import TimeRemainingColumn as Remaining
    except ImportError:
        return None

    class Rate(ProgressColumn):
        def render(self, task: Task) -> str:
            return f"{60 * task.speed:.0f} steps a minute" if task.speed else ""

    columns = (BarColumn(20), MofNCompleteColumn(), Rate(), Remaining(), TextColumn("{task.description}"))
    return Progress(
        *columns,
        console=Console(stderr=True),
        transient=True,
        redirect_stdout=sys.stdout.isatty(),
        speed_estimate_period=3600,
    )
