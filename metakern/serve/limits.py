"""What a client may do: what it is called, how often it may ask, how much it may send; and errors that say no."""

from __future__ import annotations

import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

from starlette.exceptions import HTTPException

__all__ = ["ApiError", "Rates", "error_body", "limited", "valid_name"]

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}
KEPT = 10_000  # names whose rates are remembered


class ApiError(Exception):
    """An error that the client gets in OpenAI's form, with a status code."""

    def __init__(self, status: int, message: str, param: str | None = None, retry: float | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.retry = status, message, param, retry


def error_body(status: int, message: str, param: str | None = None) -> dict[str, Any]:
    """Return an error in OpenAI's form."""
    kind = "server_error" if status >= 500 else TYPES.get(status, "invalid_request_error")
    return {"message": message, "type": kind, "param": param, "code": None}


class Rates:
    """A token bucket for each name: `per_minute` requests a minute, as many at once.

    >>> now = 0.0
    >>> rates = Rates(60, lambda: now)
    >>> [rates.wait("ann") for _ in range(60)] == [0.0] * 60, rates.wait("ann"), rates.wait("bob")
    (True, 1.0, 0.0)
    """

    def __init__(self, per_minute: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.per_minute, self.clock, self._lock = per_minute, clock, threading.Lock()
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()  # requests left, and when that was

    def wait(self, name: str) -> float:
        """Count a request, and return 0; or return the seconds after which one would be counted."""
        with self._lock:
            now = self.clock()
            left, then = self._left.pop(name, (self.per_minute, now))
            left = min(self.per_minute, left + (now - then) * self.per_minute / 60)
            allowed = left >= 1
            self._left[name] = (left - allowed, now)
            if len(self._left) > KEPT:
                self._left.popitem(last=False)
            return 0.0 if allowed else (1 - left) * 60 / self.per_minute


def valid_name(name: str) -> bool:
    """Return whether a text can be a user's name: up to 64 letters, digits and `._@-`.

    >>> valid_name("ann@example.org"), valid_name("../ann")
    (True, False)
    """
    return NAME.fullmatch(name) is not None


def limited(receive: Callable[[], Any], most: int) -> Callable[[], Any]:
    """Return an ASGI `receive` that raises the status 413 after `most` bytes of a body."""
    size = 0

    async def counted() -> Any:
        nonlocal size
        message = await receive()
        size += len(message.get("body", b""))
        if size > most:
            raise HTTPException(413, f"the body must have at most {most} bytes")
        return message

    return counted
