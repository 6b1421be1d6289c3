"""What serves users, apart from HTTP: the run, the engine, the teacher, the store, and users' models in memory."""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from dataclasses import dataclass

from metakern.dialogue.run import Run
from metakern.dialogue.teach import MOST_STEPS
from metakern.errors import UserError
from metakern.serve.engine import Engine, Resident
from metakern.serve.limits import ApiError, Rates
from metakern.serve.metrics import Histogram, Requests
from metakern.serve.store import Deleted, Store
from metakern.serve.teacher import Teacher

__all__ = ["Service", "Settings"]


@dataclass(frozen=True)
class Settings:
    """The limits of a server.

    Attributes:
        rows: The largest number of replies in a batch.
        waiting: The largest number of requests that wait for a place in the batch.
        models: The largest number of users' models in memory.
        rate: Requests a minute of each user.
        body: The largest body of a request, in bytes.
        exchanges: The largest number of exchanges of a user.
        most_steps: The largest number of inner steps of an adaptation.
        cors: The origins whose pages may ask this server.
        log_texts: Whether the log has messages and replies.
    """

    rows: int = 32
    waiting: int = 256
    models: int = 256
    rate: float = 600
    body: int = 2**18
    exchanges: int = 100
    most_steps: int = MOST_STEPS
    cors: tuple[str, ...] = ()
    log_texts: bool = False


class Service:
    """A run that serves users. Its methods may be called from any thread.

    Args:
        run: The run; nobody else may use it.
        store: The store, which `close` closes.
        settings: The limits.

    Raises:
        UserError: If the run's model can't be served.
    """

    def __init__(self, run: Run, store: Store, settings: Settings) -> None:
        self.run, self.store, self.settings = run, store, settings
        self.name = run.path.resolve().name
        self.rates, self.requests, self.first_token = Rates(settings.rate), Requests(), Histogram()
        self._residents: OrderedDict[tuple[str, bool], Resident] = OrderedDict()
        self._lock = threading.RLock()
        length = run.config.max_length
        if run.config.hints != "none":
            raise UserError(f"serve: the run's hints must be none, as a server has no policy, got {run.config.hints!r}")
        self.engine = Engine(run.model, settings.rows, settings.waiting, run.tokenizer.eos_id, length)
        outdated = store.open_for(self._digest())
        self.teacher = Teacher(run, store, self._adopted, settings.most_steps)
        for name in outdated:
            self.teacher.schedule(name)

    @property
    def models(self) -> int:
        """The number of users' models in memory."""
        return len(self._residents)

    def resident(self, name: str, base: bool = False) -> Resident:
        """Return the model of a user, from memory or from the store; `base`: the run's model, for this user.

        Raises:
            ApiError: If the weights can't be read; they are then adapted again.
        """
        with self._lock:
            found = self._residents.pop((name, base), None)
            if found is None:
                user = None if base else self.store.user(name)
                try:
                    phi = self.store.weights(user) if user else None
                    weights = self.engine.stack.base if phi is None else self.engine.stack.flat(phi)
                except (UserError, ValueError):
                    self.teacher.schedule(name)
                    raise ApiError(503, "your model can't be read and is adapted again: try later", retry=5) from None
                found = Resident(weights)
            self._residents[name, base] = found
            while len(self._residents) > self.settings.models:
                self._residents.popitem(last=False)
            return found

    def delete(self, name: str) -> Deleted | None:
        """Delete a user with everything that is known, in the store and in memory; None: nothing is known."""
        self.teacher.forget(name)
        deleted = self.store.delete(name)
        with self._lock:
            gone = [self._residents.pop((name, base), None) for base in (False, True)]
        for resident in filter(None, gone):
            self.engine.forget(resident)
        return deleted

    def close(self) -> None:
        """End the replies and the adaptation that are under way; what was taught is adapted to at the next start."""
        self.engine.close()
        self.teacher.close()
        self.store.close()

    def _adopted(self, name: str) -> None:
        with self._lock:
            self._residents.pop((name, False), None)

    def _digest(self) -> str:
        """Return a digest of the run's weights and vocabulary, for which adapted weights are good."""
        weights = self.engine.stack.base.cpu().numpy().tobytes()
        return hashlib.sha256(weights + (self.run.vocabulary + self.run.base).encode()).hexdigest()
