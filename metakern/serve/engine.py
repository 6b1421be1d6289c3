"""Continuous batching: one thread decodes the replies of all users together, a token of each at a time.

    admit    waiting requests take free rows; their prompts, padded, are read in one call
    step     one call gives all rows their next tokens
    leave    a reply that has ended frees its row, which the last row then fills

A request joins and leaves between two tokens, so that nobody waits for the longest reply. The rows in use are the first
ones, so the weights and the caches of a batch are views. What a user's last conversation has left in the cache is kept
with the user's model; a request that continues the conversation reads only what is new.
"""

from __future__ import annotations

import logging
import random
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from metakern.serve.sampling import draw
from metakern.serve.stack import Stack

__all__ = ["Engine", "FullError", "Request", "Resident"]

log = logging.getLogger("metakern.serve")
ADMITTED = 16  # prompts that are read in one call, which the replies under way wait for


class FullError(Exception):
    """There are as many waiting requests as the engine takes."""


@dataclass(eq=False)
class Resident:
    """A user's model in memory.

    Attributes:
        weights: The weights, `[P]`.
        ids: The tokens of the user's last conversation that are in `cache`.
        cache: The cache after them, tensors without the dimension of rows.
    """

    weights: Tensor
    ids: list[int] = field(default_factory=list)
    cache: tuple[Tensor, ...] = ()


@dataclass(eq=False)
class Request:
    """A reply to generate.

    Attributes:
        resident: The model.
        prompt: The ids before the reply, at least one.
        max_new_tokens: The largest number of ids of the reply, at least 1.
        emit: It is called in the engine's thread with new ids, and the reason if these are the last: "stop" after the
            id that ends a reply, "length", "cancelled", "diverged" (the logits are not finite), "failed" or "shutdown";
            None if the reply goes on.
        temperature: At least 0.
        top_p: In (0, 1].
        seed: The seed of the draws.
        stream: Whether ids are emitted one by one, or all at the end.
        cancelled: Set it to end the reply.
    """

    resident: Resident
    prompt: list[int]
    max_new_tokens: int
    emit: Callable[[list[int], str | None], None]
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stream: bool = True
    cancelled: bool = False


class _Row:
    """A reply under way: the ids in the cache, the ids generated, and the last of these, which is not in the cache."""

    def __init__(self, request: Request, known: int) -> None:
        self.request, self.ids, self.reply = request, request.prompt[:known], list[int]()
        self.random = random.Random(request.seed)


class Engine:
    """The thread that decodes. `submit` and the other methods may be called from any thread.

    Args:
        model: As of `Stack`.
        rows: The largest number of replies in a batch.
        waiting: The largest number of requests that wait for a row.
        eos_id: The id that ends a reply.
        length: As of `Stack`.

    Raises:
        UserError: As `Stack`.
    """

    def __init__(self, model: nn.Module, rows: int, waiting: int, eos_id: int, length: int = 0) -> None:
        self.stack = Stack(model, rows, length)
        self.limit, self.eos_id = waiting, eos_id
        self.tokens = self.steps = 0  # counted since the start
        self._rows: list[_Row] = []
        self._held: list[Resident | None] = [None] * rows  # whose weights are in each row
        self._waiting: deque[Request] = deque()
        self._joining: list[Request] = []  # taken from the waiting ones, but without a row yet
        self._forgotten: list[tuple[Resident, threading.Event]] = []
        self._closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="metakern-engine", daemon=True)
        self._thread.start()

    @property
    def active(self) -> int:
        """The number of replies under way."""
        return len(self._rows)

    @property
    def waiting(self) -> int:
        """The number of requests that wait for a row."""
        return len(self._waiting)

    def submit(self, requests: Sequence[Request]) -> None:
        """Let requests wait for rows, all or none of them.

        Raises:
            FullError: If there would be too many, or the engine is closed.
        """
        with self._changed:
            if self._closing or len(self._waiting) + len(requests) > self.limit:
                raise FullError
            self._waiting.extend(requests)
            self._changed.notify()

    def forget(self, resident: Resident) -> None:
        """End the replies of a model and overwrite its weights and caches, and return when that is done."""
        done = threading.Event()
        with self._changed:
            if self._closing:
                return
            self._forgotten.append((resident, done))
            self._changed.notify()
        done.wait()

    def close(self) -> None:
        """End all replies, and the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    @torch.no_grad()
    def _run(self) -> None:
        while not self._closing:
            try:
                self._turn()
            except Exception:
                log.exception("serve: replies were lost by an error")
                for row in list(self._rows):
                    self._leave(row, "failed")
                while self._joining:
                    self._joining.pop().emit([], "failed")
        for row in list(self._rows):
            self._leave(row, "shutdown")
        for request in self._waiting:
            request.emit([], "shutdown")
        for _, done in self._forgotten:
            done.set()

    def _turn(self) -> None:
        """Wait until there is something to do, then give each reply its next token, and admit waiting requests."""
        with self._changed:
            while not (self._closing or self._waiting or self._rows or self._forgotten):
                self._changed.wait()
            if self._closing:
                return
            forgotten, self._forgotten = self._forgotten, []
            for resident, _ in forgotten:
                for request in self._waiting:
                    request.cancelled = request.cancelled or request.resident is resident
            free = min(ADMITTED, len(self._held) - len(self._rows))
            self._joining = [self._waiting.popleft() for _ in range(min(free, len(self._waiting)))]
        for resident, done in forgotten:
            self._overwrite(resident)
            done.set()
        for row in [row for row in self._rows if row.request.cancelled]:
            self._leave(row, "cancelled")
        if self._rows:
            self._advance(self._rows, [[row.reply[-1]] for row in self._rows], 0)
        if self._joining:
            self._admit()

    def _admit(self) -> None:
        begin, new = len(self._rows), []
        while self._joining:
            request = self._joining[0]
            place, resident = len(self._rows), request.resident
            if request.cancelled:
                request.emit([], "cancelled")
                del self._joining[0]
                continue
            if self._held[place] is not resident:
                self.stack.arena[place].copy_(resident.weights)
                self._held[place] = resident
            known = self._reusable(resident, request.prompt)
            self.stack.put_cache(place, resident.cache if known else ())
            self._rows.append(_Row(request, known))
            del self._joining[0]
            new.append(request.prompt[known:])
        if new:
            self._advance(self._rows[begin:], new, begin)

    def _reusable(self, resident: Resident, prompt: list[int]) -> int:
        """Return how many of the prompt's ids need not be read, as they are in the cache of the last conversation."""
        pairs = enumerate(zip(resident.ids, prompt[:-1], strict=False))
        same = next((i for i, (known, new) in pairs if known != new), min(len(resident.ids), len(prompt) - 1))
        return same if self.stack.model.cuts_cache or same == len(resident.ids) else 0

    def _advance(self, rows: Sequence[_Row], new: Sequence[list[int]], begin: int) -> None:
        """Put new ids into the caches of consecutive rows from `begin` on, and add the next token to each reply."""
        rows, end = list(rows), begin + len(rows)
        counts = torch.tensor([len(ids) for ids in new])
        longest = max(map(len, new))
        padded = torch.tensor([[*ids, *[0] * (longest - len(ids))] for ids in new])
        known = torch.tensor([len(row.ids) for row in rows])
        model = self.stack.at(begin, end)
        logits = model.next_logits(padded, counts, self.stack.cache_at(begin, end), known)
        requests = [row.request for row in rows]
        tokens = draw(
            logits,
            [request.temperature for request in requests],
            [request.top_p for request in requests],
            [row.random.random() for row in rows],
        )
        self.steps += 1
        for row, ids, token in zip(rows, new, tokens, strict=True):
            row.ids += ids
            if token == -1:
                self._leave(row, "diverged")
            elif token == self.eos_id:
                self._leave(row, "stop")
            else:
                self.tokens += 1
                row.reply.append(token)
                if len(row.reply) == row.request.max_new_tokens:
                    self._leave(row, "length", [token])
                elif row.request.stream:
                    row.request.emit([token], None)

    def _leave(self, row: _Row, reason: str, last: Sequence[int] = ()) -> None:
        """Free a row, keep its cache with the user's model, and emit the end of the reply."""
        place, end, resident = self._rows.index(row), len(self._rows) - 1, row.request.resident
        if reason in ("stop", "length"):
            resident.ids, resident.cache = row.ids, self.stack.copied_cache(place, len(row.ids))
        if place != end:
            self.stack.move(end, place)
            self._held[place] = self._held[end]
            self._rows[place] = self._rows[end]
        self._rows.pop()
        row.request.emit(list(last) if row.request.stream else row.reply, reason)

    def _overwrite(self, resident: Resident) -> None:
        for row in [row for row in self._rows if row.request.resident is resident]:
            self._leave(row, "cancelled")
        for place, held in enumerate(self._held):
            if held is resident:
                self.stack.arena[place].copy_(self.stack.base)
                self._held[place] = None
        for part in self.stack.cache:
            part[len(self._rows) :].zero_()
        resident.ids, resident.cache = [], ()
