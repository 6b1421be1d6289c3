"""Threads: one at a time may adapt a model, because the parameters of each task replace its own meanwhile.

Other threads that adapt it wait. Other threads that call it get an error; calls that they are in end first.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

_PATIENCE = 60.0  # seconds to wait for the calls of other threads
_CALL = nn.Module._wrapped_call_impl.__code__  # of a module's call

_LOCKS: WeakKeyDictionary[nn.Module, threading.RLock] = WeakKeyDictionary()
_GUARD = threading.Lock()


def _renewed() -> None:
    """Drop all locks in a forked child: the threads that held them do not exist there."""
    global _GUARD
    _GUARD = threading.Lock()
    _LOCKS.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renewed)


def lock_of(model: nn.Module) -> Any:
    """Return the lock of a model, the same for all engines."""
    with _GUARD:
        return _LOCKS.setdefault(model, threading.RLock())


class Refusal:
    """A forward pre-hook that raises RuntimeError where another thread than the owner calls the model."""

    def __init__(self, owner: int) -> None:
        self.owner = owner

    def __call__(self, *_: Any) -> None:
        if threading.get_ident() != self.owner:
            raise RuntimeError(
                "MAML: model must not be called while another thread adapts it: give each thread a copy of its own"
                " (copy.deepcopy)"
            )


# One hook object per thread and one key for all: the guards of a captured program compare both by identity first.
_REFUSALS: dict[int, Refusal] = {}
_KEY = id(threading)


def _await_calls(model: nn.Module) -> None:
    """Wait until no other thread is within a call of the model. Raises RuntimeError after a minute."""
    end = time.monotonic() + _PATIENCE
    while _is_called(model):
        if time.monotonic() > end:
            raise RuntimeError(
                "MAML: model must not be adapted while another thread is within a call of it: give each thread a copy"
                " of its own (copy.deepcopy)"
            )
        time.sleep(0.001)


def _is_called(model: nn.Module) -> bool:
    """Whether another thread is within a call of the model. A refusal set before this finds those that come after."""
    mine = threading.get_ident()
    for thread, frame in sys._current_frames().items():
        at: FrameType | None = frame if thread != mine else None
        while at is not None:
            if at.f_code is _CALL and at.f_locals.get("self") is model:
                return True
            at = at.f_back
    return False


@contextmanager
def running(model: nn.Module) -> Iterator[None]:
    """Reserve the model for this thread within the block.

    Other threads that adapt it wait; in other threads that call it, the call raises RuntimeError. Calls that they have
    begun before the block end first.
    """
    refuse = _REFUSALS.setdefault(threading.get_ident(), Refusal(threading.get_ident()))
    with lock_of(model):
        hooked = _KEY in model._forward_pre_hooks  # by an outer block of this thread
        if not hooked:
            model._forward_pre_hooks[_KEY] = refuse
        try:
            if not hooked:
                _await_calls(model)
            yield
        finally:
            if not hooked:
                model._forward_pre_hooks.pop(_KEY, None)
