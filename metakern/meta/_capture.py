"""Captured meta-gradients: a chunk's kernel calls, recorded once and made again for the chunks that follow.

What a recording can't see is what Python does with anything but tensors, so that no program is taken on trust. It is
used again only while the modules' classes, hooks and plain attributes (numbers, texts, flags), and the plain values
within reach of the loss, are what they were; and on the first other batch its results must be those of an ordinary run.
A function that can't be recorded, or fails this, runs ordinarily from then on, with a warning that says why.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from metakern._record import Program, RecordError, record
from metakern.meta._fuse import fused
from metakern.meta._unroll import Random
from metakern.ops import _backend

PROGRAMS = 8  # kept at once, the latest
_PLAIN = (bool, int, float, complex, str, bytes, type(None))


class Captures:
    """The programs of a function of batches, one for each kind of batch."""

    def __init__(self) -> None:
        self._programs: dict[Any, Program | None] = {}  # None: runs ordinarily
        self._checked: set[Any] = set()

    def __call__(self, function: Callable[..., Sequence[Tensor | None]], key: tuple, *batches: Any) -> list:
        """function(*batches), tensors or None, by the program for the key and the batches' structure."""
        leaves, spec = tree_flatten(batches)
        where = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        inputs = [leaves[i].contiguous() for i in where]
        others = tuple(leaf for leaf in leaves if not isinstance(leaf, Tensor))
        key = (*key, str(spec), str(others), *((t.shape, t.dtype, t.device) for t in inputs))

        def run() -> Sequence[Tensor | None]:
            for i, tensor in zip(where, inputs, strict=True):
                leaves[i] = tensor
            return function(*tree_unflatten(leaves, spec))

        if key not in self._programs:
            return self._recorded(key, run, inputs)
        program = self._programs[key]
        if program is None:
            return list(run())
        return program(inputs) if key in self._checked else self._compared(key, program, run, inputs)

    def _recorded(self, key: Any, run: Callable[[], Sequence[Tensor | None]], inputs: list[Tensor]) -> list:
        while len(self._programs) >= PROGRAMS:
            oldest = next(iter(self._programs))
            del self._programs[oldest]
            self._checked.discard(oldest)
        before = Random(inputs[0].device)
        try:
            if inputs[0].device.type != "cpu":
                raise RecordError("programs are for CPUs")
            self._programs[key], results = record(run, inputs, fused)
        except Exception as error:  # an ordinary run may do what a recorded one can't; if it can't, it says why
            before.restore()
            results = list(run())
            self._give_up(key, str(error))
        return results

    def _compared(self, key: Any, program: Program, run: Callable[[], Sequence[Tensor | None]], inputs: list) -> list:
        before, reason = Random(inputs[0].device), ""
        try:
            found = program(inputs)
        except Exception as error:
            found, reason = [], str(error)
        before.restore()
        results = list(run())
        if found and _agree(found, results):
            self._checked.add(key)
        elif not found or all(r is None or r.isfinite().all() for r in results):  # others confirm nothing
            self._give_up(key, reason or "on another batch it would give other results than an ordinary run")
        return results

    def _give_up(self, key: Any, reason: str) -> None:
        self._programs[key] = None
        warnings.warn(f"MAML: capture has no effect, as the meta-gradient can't be captured: {reason}", stacklevel=2)


def _agree(found: Sequence[Tensor | None], truth: Sequence[Tensor | None]) -> bool:
    """Equal to rounding, which differs where PyTorch composes an operation otherwise while it is recorded."""
    norms = [0.0 if t is None else t.norm().item() for t in truth]
    for a, b, norm in zip(found, truth, norms, strict=True):
        if (a is None) != (b is None):
            return False
        if a is not None and b is not None:
            tolerance = torch.finfo(b.dtype).eps ** 0.6 * max(norm, 1e-3 * max(norms))
            if not (a - b).norm().item() <= tolerance:
                return False
    return True


def surroundings(model: nn.Module, inner: nn.Module, loss: Callable[..., Any]) -> tuple:
    """What a captured run depends on beside its tensors, as far as it can be seen: to be equal at each use."""
    seen: list[Any] = [_backend.chosen(), torch.get_default_dtype(), torch.is_autocast_enabled("cpu")]
    for module in (*model.modules(), *inner.modules()):
        seen += filter(_plain, vars(module).values())
        seen += map(id, (*module._parameters.values(), *module._buffers.values()))
        seen += (type(module), vars(module).get("forward"), *module._forward_pre_hooks, *module._forward_hooks)
    return (*seen, *_within_reach(loss))


def _within_reach(function: Any) -> Iterator[Any]:
    """The plain values that a function's code names: arguments bound, defaults, closure, globals."""
    if isinstance(function, partial):
        yield from filter(_plain, (*function.args, *function.keywords.values()))
        yield from _within_reach(function.func)
    elif isinstance(function, MethodType):
        yield from filter(_plain, getattr(function.__self__, "__dict__", {}).values())
        yield from _within_reach(function.__func__)
    elif isinstance(function, FunctionType):
        cells = [cell.cell_contents for cell in function.__closure__ or ()]
        named = [function.__globals__.get(name) for name in function.__code__.co_names]
        yield from filter(_plain, (*cells, *named, *(function.__defaults__ or ())))
    else:
        yield from filter(_plain, getattr(function, "__dict__", {}).values())


def _plain(value: Any) -> bool:
    return type(value) in _PLAIN
