"""Threads: one at a time may adapt a model, because the parameters of each task replace its own meanwhile.

Other threads that adapt it, or a model that shares modules with it, wait. Other threads that call it get an error;
calls of it, or of its parts, that they are in end first. A call of a part that begins meanwhile is not noticed.
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

from torch import nn

from metakern.meta.state import every_module

_PATIENCE = 60.0  # seconds to wait for the calls of other threads
_CALL = nn.Module._wrapped_call_impl.__code__  # of a module's call
_CURE = "give each thread a copy of its own (copy.deepcopy)"

_CHANGED = threading.Condition()  # guards the next two
_RUNNING: dict[tuple[int, int], nn.Module] = {}  # (thread, id of the model) -> the model that the thread adapts
_WAITING: dict[int, int] = {}  # a thread that waits -> the thread whose model it waits for


def _renewed() -> None:
    """Forget all threads in a forked child: they do not exist there."""
    global _CHANGED
    _CHANGED = threading.Condition()
    _RUNNING.clear()
    _WAITING.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renewed)


class Refusal:
    """A forward pre-hook that raises RuntimeError where another thread than the owner calls the model."""

    def __init__(self, owner: int) -> None:
        self.owner = owner

    def __call__(self, *_: Any) -> None:
        if threading.get_ident() != self.owner:
            raise RuntimeError(f"MAML: model must not be called while another thread adapts it: {_CURE}")


# One hook object per thread and one key for all: the guards of a captured program compare both by identity first.
_REFUSALS: dict[int, Refusal] = {}
_KEY = id(threading)


@contextmanager
def running(model: nn.Module) -> Iterator[None]:
    """Reserve the model for this thread within the block, as the module says.

    Raises:
        RuntimeError: If a call of another thread does not end, or another thread waits for a model that this one adapts
            while this one would wait for its model.
    """
    thread = threading.get_ident()
    if (thread, id(model)) in _RUNNING:  # by an outer block
        yield
        return
    _reserve(thread, model)
    try:
        model._forward_pre_hooks[_KEY] = _REFUSALS.setdefault(thread, Refusal(thread))
        _await_calls(model)
        yield
    finally:
        model._forward_pre_hooks.pop(_KEY, None)
        with _CHANGED:
            _RUNNING.pop((thread, id(model)), None)  # a forked child has forgotten it
            _CHANGED.notify_all()


def _reserve(thread: int, model: nn.Module) -> None:
    """Wait until no other thread adapts the model or one that shares modules with it."""
    with _CHANGED:
        while (other := _holder(thread, model)) is not None:
            last = other
            while last in _WAITING:
                last = _WAITING[last]
            if last == thread:
                raise RuntimeError(f"MAML: two threads must not wait for each other's models: {_CURE}")
            _WAITING[thread] = other
            try:
                _CHANGED.wait()
            finally:
                del _WAITING[thread]
        _RUNNING[thread, id(model)] = model


def _holder(thread: int, model: nn.Module) -> int | None:
    """Return another thread that adapts the model, or one that shares modules with it."""
    others = [(other, root) for (other, _), root in _RUNNING.items() if other != thread]
    modules = set(every_module(model)) if others else set()
    return next((other for other, root in others if not modules.isdisjoint(every_module(root))), None)


def _await_calls(model: nn.Module) -> None:
    """Wait until no other thread is within a call of the model. Raises RuntimeError after a minute."""
    end = time.monotonic() + _PATIENCE
    while _is_called(model):
        if time.monotonic() > end:
            raise RuntimeError(f"MAML: model must not be adapted while another thread is within a call of it: {_CURE}")
        time.sleep(0.001)


def _is_called(model: nn.Module) -> bool:
    """Whether another thread is within a call of the model. A refusal set before this finds those that come after."""
    mine, modules = threading.get_ident(), set[nn.Module]()
    for thread, frame in sys._current_frames().items():
        at: FrameType | None = frame if thread != mine else None
        while at is not None:
            if at.f_code is _CALL:
                modules = modules or set(every_module(model))
                if at.f_locals.get("self") in modules:
                    return True
            at = at.f_back
    return False
