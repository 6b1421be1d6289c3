"""The room for captured programs: the memory that those of all functions of one model may take.

Programs unused for longest make room for new ones. Recording a program takes as long as several ordinary calls: with
more kinds of batches than there is room for, recording each of them again and again would take more time than programs
save. So with `capture="auto"` the next program is recorded some calls after one was dropped.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from itertools import count
from typing import Any

ROOM = 512 * 2**20  # bytes of the programs of one model, besides arenas and what the model holds anyway
LEAST = 4096  # bytes of any entry, as its key holds the shapes of all tensors of a batch
WAIT = 64  # calls after a program was dropped until another one is recorded

FULL = f"the programs of the model take {ROOM >> 20} MiB, so "
WAITS = f"{FULL}most batches of new shapes run ordinarily"
DROPS = f"{FULL}some are dropped and recorded again: capture='auto' runs such batches ordinarily"


class Room:
    """What the programs of one model take, as the sum of their sizes in bytes."""

    def __init__(self) -> None:
        self._entries: dict[tuple[int, Any], tuple[Any, int]] = {}  # program and size, in the order of last use
        self._numbers = count()
        self._taken = self._calls = 0
        self._dropped_at: int | None = None

    def call(self) -> None:
        """Count a call of a function that has programs here."""
        self._calls += 1

    @property
    def is_full(self) -> bool:
        """Whether new programs have to wait. They do not in the call whose first program made another one go."""
        return self._dropped_at is not None and 0 < self._calls - self._dropped_at < WAIT

    def _put(self, key: tuple[int, Any], program: Any, size: int) -> None:
        self._remove(key)
        size = max(size, LEAST)
        self._entries[key] = program, size
        self._taken += size
        while self._taken > ROOM and len(self._entries) > 1:
            self._remove(next(iter(self._entries)))
            self._dropped_at = self._calls

    def _remove(self, key: tuple[int, Any]) -> None:
        _, size = self._entries.pop(key, (None, 0))
        self._taken -= size

    def _clear(self, number: int) -> None:
        for key in [key for key in list(self._entries) if key[0] == number]:
            self._remove(key)


class Programs(Mapping[Any, Any]):
    """The programs of one function by key, in a room that it shares with others."""

    def __init__(self, room: Room) -> None:
        self._room, self._number = room, next(room._numbers)
        weakref.finalize(self, room._clear, self._number).atexit = False

    def __getitem__(self, key: Any) -> Any:
        return self._room._entries[self._number, key][0]

    def __iter__(self) -> Iterator[Any]:
        return iter([key for number, key in list(self._room._entries) if number == self._number])

    def __len__(self) -> int:
        return len(list(iter(self)))

    def count(self) -> int:
        """Return the number of programs, which another thread may ask for. None stands for no program."""
        entries = list(self._room._entries.items())
        return sum(number == self._number and program is not None for (number, _), (program, _) in entries)

    def put(self, key: Any, program: Any, size: int = 0) -> None:
        """Keep a program of so many bytes, as the one used last."""
        self._room._put((self._number, key), program, size)

    def use(self, key: Any) -> None:
        """Have the program dropped after all others that are kept now."""
        entries = self._room._entries
        entries[self._number, key] = entries.pop((self._number, key))

    def drop(self, key: Any) -> None:
        self._room._remove((self._number, key))
