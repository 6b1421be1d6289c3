"""What a plan reports about its calls: the wall time besides meta-gradients, and the use of captured programs.

The logger `metakern.plan` says at level INFO which part begins, as the first call of a large model takes minutes; and
at level DEBUG when none runs any more.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

LOG = logging.getLogger("metakern.plan")


@dataclass(frozen=True)
class Seconds:
    """Wall time by part, in seconds, added up over all calls of a plan. `print(seconds)` shows it in one line.

    Attributes:
        parts: Pairs (part, seconds), in the order in which the parts first ran: "truth, first order" and "truth, second
            order" (plain autograd on the two tasks of the trial), the same for each batching that was tried ("fold,
            first order", …), "slopes" (finite differences), "sizes" (whether a smaller task has the same graph),
            "confirmation" (folded losses compared with those of a task alone), "recording", "lowering" and "comparison"
            (programs compared with ordinary runs, by checks and audits).
    """

    parts: tuple[tuple[str, float], ...] = ()

    @property
    def total(self) -> float:
        return sum(seconds for _, seconds in self.parts)

    def __getitem__(self, part: str) -> float:
        """Return the seconds of a part, 0 if it did not run."""
        return dict(self.parts).get(part, 0.0)

    def __str__(self) -> str:
        parts = ", ".join(f"{part} {seconds:.2f}" for part, seconds in self.parts)
        return f"{self.total:.2f} s besides meta-gradients" + f" ({parts})" * bool(parts)


@dataclass(frozen=True)
class Usage:
    """How meta-gradients were computed so far. `print(usage)` shows it in one line.

    Attributes:
        programs: The number of captured programs.
        captured: The number of chunks of tasks that programs ran, those included that recorded them.
        ordinary: The number of the other chunks.
    """

    programs: int = 0
    captured: int = 0
    ordinary: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(self.programs + other.programs, self.captured + other.captured, self.ordinary + other.ordinary)

    def __str__(self) -> str:
        return f"{self.programs} programs; chunks of tasks: {self.captured} by programs, {self.ordinary} ordinary"


class Stopwatch:
    """Adds up the wall time of named parts. The time of a part within another one counts for the inner one alone."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}
        self._running: list[str] = []
        self._since = 0.0

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        self._charge()
        self._running.append(name)
        LOG.info("%s", name)
        self._seconds.setdefault(name, 0.0)
        try:
            yield
        finally:
            self._charge()
            self._running.pop()
            if not self._running:
                LOG.debug("%s has ended", name)

    def _charge(self) -> None:
        """Add the time since the last call to the part that runs."""
        now = time.perf_counter()
        if self._running:
            self._seconds[self._running[-1]] += now - self._since
        self._since = now

    @property
    def seconds(self) -> Seconds:
        return Seconds(tuple(self._seconds.items()))
