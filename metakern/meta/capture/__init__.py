"""Captured meta-gradients: a chunk's kernel calls, recorded once and made again for the chunks that follow.

What a recording can't see is what Python does with anything but tensors, so that no program is taken on trust. It is
used again only while the modules' classes, hooks and plain attributes (numbers, texts, flags), and the plain values
within reach of the loss, are what they were; and on the first other data, and on the first other batch, its results
must be those of an ordinary run. A function that can't be recorded, or fails this, runs ordinarily from then on, with a
warning that says why.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from functools import partial, reduce
from itertools import accumulate, groupby
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from metakern._record import Program, RecordError, record
from metakern.meta._memory import give_back
from metakern.meta._unroll import Random
from metakern.meta.batches import tasks_of
from metakern.meta.capture.fuse import fused
from metakern.meta.capture.tape import Tape, written
from metakern.ops import _backend

PROGRAMS = 32  # kept at once: those used last
PIECE_BYTES = 4 * 2**20  # of a core's part of the caches
_PLAIN = (bool, int, float, complex, str, bytes, type(None))


class Captures:
    """The programs of a function of batches, one for each kind of batch.

    The function returns losses of the batch's tasks, [T], and gradients (or None), which are sums over the tasks. Where
    a program has a tape, a batch goes through it in pieces.
    """

    def __init__(self) -> None:
        self._programs: dict[Any, _Captured | None] = {}  # None: runs ordinarily
        self._piece: dict[Any, int] = {}  # tasks of a piece

    def __call__(self, function: Callable[..., Sequence[Tensor | None]], key: tuple, *batches: Any) -> list:
        """function(*batches), by the program for the key and the batches' structure."""
        tasks = tasks_of(batches[0])
        whole = _Call(function, key, batches)
        piece, first = self._piece.pop(whole.key, 0), None
        if not piece:
            piece, first = self._piece_of(whole, tasks)
        self._piece[whole.key] = piece
        if len(self._piece) > PROGRAMS:
            del self._piece[next(iter(self._piece))]
        number = -(-tasks // piece)
        sizes = sorted((len(range(i, tasks, number)) for i in range(number)), reverse=True)  # equal ones side by side
        ends = accumulate(sizes)
        parts = [whole.part(slice(end - size, end)) for size, end in zip(sizes, ends, strict=True)]
        losses, *gradients = zip(*self._run(parts, first), strict=True)
        return [torch.cat(losses), *(None if g[0] is None else reduce(torch.add, g) for g in gradients)]

    def _piece_of(self, whole: _Call, tasks: int) -> tuple[int, list[Tensor | None] | None]:
        """As many tasks as a cache holds, and a piece for each thread; all tasks where one task has no tape.

        With the results of the first piece, if finding out has made them.
        """
        threads, one, first = torch.get_num_threads(), whole.part(slice(1)), None
        if tasks < threads:
            return tasks, None
        if one.key not in self._programs:
            before = Random(one.inputs[0].device)
            first = self._recorded(one)
            before.restore()
        captured = self._programs[one.key]
        if captured is None or captured.tape is None:
            if captured is None:
                self._programs[whole.key] = None
            return tasks, None
        fewest = -(-tasks // (threads * max(1, PIECE_BYTES // captured.tape.bytes)))
        rounds = next((r for r in range(fewest, 2 * fewest) if tasks % (threads * r) == 0), fewest)  # equal pieces
        piece = -(-tasks // (threads * rounds))
        return piece, first if piece == 1 else None

    def _run(self, calls: list[_Call], first: list[Tensor | None] | None) -> list[list[Tensor | None]]:
        """The calls' results, `first` those of the first one: of new programs one is compared with an ordinary run.

        And one of the next batch: then a program is known to be right.
        """
        results: list[list[Tensor | None]] = [] if first is None else [first]
        new = {call.key for call in calls[: len(results)]}
        ready: list[tuple[_Captured, list[Tensor]]] = []
        sure = set()
        for call in calls[len(results) :]:
            if call.key not in self._programs:
                new.add(call.key)
                results.append(self._recorded(call))
                continue
            captured = self._programs[call.key] = self._programs.pop(call.key)
            if captured is None:
                results.append(list(call()))
            elif captured.checked or call.key in sure:
                ready.append((captured, call.inputs))
                results.append([])
            else:
                found, right = self._compared(captured, call)
                results.append(found)
                captured.checked = right and call.key not in new
                if right:
                    sure.add(call.key)
        found_ready = _played(ready)
        return [result or next(found_ready) for result in results]

    def _recorded(self, call: _Call) -> list[Tensor | None]:
        while len(self._programs) >= PROGRAMS:
            del self._programs[next(iter(self._programs))]
        before = Random(call.inputs[0].device)
        try:
            if call.inputs[0].device.type != "cpu":
                raise RecordError("programs are for CPUs")
            program, results = record(call, call.inputs, fused)
            captured = self._programs[call.key] = _Captured(program, written(program, call.inputs))
        except Exception as error:  # an ordinary run may do what a recorded one can't; if it can't, it says why
            before.restore()
            results = list(call())
            self._give_up(call.key, str(error))
            return results
        before.restore()
        give_back()
        return self._compared(captured, call, results)[0]

    def _compared(
        self, captured: _Captured, call: _Call, truth: list[Tensor | None] | None = None
    ) -> tuple[list[Tensor | None], bool]:
        """The program's results, if they are those of an ordinary run (`truth`), else these; and whether they are."""
        before, reason = Random(call.inputs[0].device), ""
        try:
            (found,) = captured([call.inputs], 1)
        except Exception as error:
            found, reason = [], str(error)
        if truth is None:
            if captured.tape is not None:
                captured.tape.release()  # an ordinary run wants as much
            before.restore()
            truth = list(call())
            give_back()
        if found and _agree(found, truth):
            return found, True
        if not found or all(t is None or t.isfinite().all() for t in truth):  # others confirm nothing
            self._give_up(call.key, reason or "it would give other results than an ordinary run")
        return truth, False

    def _give_up(self, key: Any, reason: str) -> None:
        self._programs[key] = None
        warnings.warn(f"MAML: capture has no effect, as the meta-gradient can't be captured: {reason}", stacklevel=2)


class _Call:
    """A function and its batches, whose tensors are the inputs of a program."""

    def __init__(self, function: Callable[..., Sequence[Tensor | None]], key: tuple, batches: tuple) -> None:
        self._function = function
        self._leaves, self._spec = tree_flatten(batches)
        self._where = [i for i, leaf in enumerate(self._leaves) if isinstance(leaf, Tensor)]
        others = tuple(leaf for leaf in self._leaves if not isinstance(leaf, Tensor))
        self._kind = (*key, str(self._spec), str(others))
        self._take([self._leaves[i].contiguous() for i in self._where])

    def _take(self, inputs: list[Tensor]) -> None:
        self.inputs = inputs
        self.key = (self._kind, *((t.shape, t.dtype, t.device) for t in inputs))

    def __call__(self) -> Sequence[Tensor | None]:
        leaves = [*self._leaves]
        for i, tensor in zip(self._where, self.inputs, strict=True):
            leaves[i] = tensor
        return self._function(*tree_unflatten(leaves, self._spec))

    def part(self, tasks: slice) -> _Call:
        part = copy(self)
        part._take([t[tasks] for t in self.inputs])
        return part


class _Captured:
    """A program, by its tape where it has one."""

    def __init__(self, program: Program, tape: Tape | None) -> None:
        self.program, self.tape, self.checked = program, tape, False

    def __call__(self, pieces: Sequence[Sequence[Tensor]], threads: int) -> list[list[Tensor | None]]:
        results = self.tape(pieces, threads) if self.tape is not None else None
        return [self.program(inputs) for inputs in pieces] if results is None else results  # which says what is wrong


def _played(pieces: Sequence[tuple[_Captured, list[Tensor]]]) -> Iterator[list[Tensor | None]]:
    """The pieces' programs, as many at a time as there are threads."""
    threads = torch.get_num_threads()
    for _, alike in groupby(pieces, key=lambda piece: id(piece[0])):
        captured, inputs = zip(*alike, strict=True)
        for i in range(0, len(inputs), threads):
            yield from captured[0](inputs[i : i + threads], threads)


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
