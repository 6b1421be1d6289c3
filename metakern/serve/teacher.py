"""Adapt users' models in the background: one thread, one user after the other."""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

from metakern.dialogue.readers import Dialogue, Turn
from metakern.dialogue.run import Run
from metakern.dialogue.teach import Progress, teach
from metakern.errors import UserError
from metakern.serve.store import Exchange, Store

__all__ = ["Status", "Teacher"]

log = logging.getLogger("metakern.serve")
State = Literal["waiting", "adapting", "ready", "failed"]


@dataclass(frozen=True)
class Status:
    """How far the adaptation of a user's model is.

    Attributes:
        state: "waiting", "adapting", "ready" (what was taught is served) or "failed" (what was served before still is).
        curve: The progress after each inner step so far.
        seconds: How long the adaptation took.
        error: Why it failed.
    """

    state: State
    curve: tuple[Progress, ...] = ()
    seconds: float = 0.0
    error: str = ""


READY = Status("ready")


class Teacher:
    """The thread that adapts. Its methods may be called from any thread.

    Args:
        run: Its algorithm adapts; no other thread may use it.
        store: Where exchanges come from and weights go.
        adopted: It is called with a user's name after new weights are in the store.
        most: The largest number of inner steps.
    """

    def __init__(self, run: Run, store: Store, adopted: Callable[[str], object], most: int) -> None:
        self.run, self.store, self.adopted, self.most = run, store, adopted, most
        self.count, self.seconds = 0, 0.0  # of adaptations since the start
        self._statuses: dict[str, Status] = {}
        self._waiting: OrderedDict[str, None] = OrderedDict()
        self._closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="metakern-teacher", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """The number of users who wait for an adaptation."""
        return len(self._waiting)

    def schedule(self, name: str) -> None:
        """Adapt the model of a user to what the store has by then."""
        with self._changed:
            self._waiting[name] = None
            if self._statuses.get(name, READY).state != "adapting":
                self._statuses[name] = Status("waiting")
            self._changed.notify()

    def status(self, name: str) -> Status:
        with self._changed:
            return self._statuses.get(name, READY)

    def forget(self, name: str) -> None:
        """Drop the status of a user, and do not adapt a model that waits for it."""
        with self._changed:
            self._waiting.pop(name, None)
            self._statuses.pop(name, None)

    def close(self) -> None:
        """End the thread, and the adaptation that is under way."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not (self._closing or self._waiting):
                    self._changed.wait()
                if self._closing:
                    return
                name, _ = self._waiting.popitem(last=False)
            try:
                self._adapt(name)
            except _Closing:
                return
            except Exception as error:
                if not isinstance(error, UserError):
                    log.exception("serve: an adaptation failed")
                self._set(name, replace(self.status(name), state="failed", error=str(error)))

    def _adapt(self, name: str) -> None:
        user = self.store.user(name)
        if user is None:
            return self.forget(name)
        began = time.monotonic()
        self._set(name, Status("adapting"))

        def progress(now: Progress) -> None:
            if self._closing:
                raise _Closing
            curve = self.status(name).curve[: now.steps]
            self._set(name, Status("adapting", (*curve, now), time.monotonic() - began))

        phi, dialogues = None, support(self.store.exchanges(name))
        if dialogues:
            lesson = teach(self.run, dialogues, self.most, progress)
            phi = {parameter: p[0] for parameter, p in lesson.phi.items()}
        if not self.store.adopt(user, phi):
            return self.forget(name)
        self.adopted(name)
        self.count += 1
        self.seconds += time.monotonic() - began
        with self._changed:
            state: State = "waiting" if name in self._waiting else "ready"
            self._statuses[name] = replace(self._statuses.get(name, READY), state=state)
        return None

    def _set(self, name: str, status: Status) -> None:
        with self._changed:
            self._statuses[name] = status


class _Closing(BaseException):
    """The server ends."""


def support(exchanges: list[Exchange]) -> list[Dialogue]:
    """Return exchanges as dialogues to adapt to. Of several answers to the same words, the last counts.

    >>> [d.turns[1].text for d in support([Exchange(1, "tea?", "yes", 0.0), Exchange(2, "tea?", "no", 0.0)])]
    ['no']
    """
    last = {exchange.say: exchange for exchange in exchanges}
    return [
        Dialogue("taught", str(e.id), (Turn("user", e.say), Turn("bot", e.answer)), {"bot": "bot"})
        for e in last.values()
    ]
