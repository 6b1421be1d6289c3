"""Captured meta-gradients: a chunk's kernel calls, recorded once and made again for the chunks that follow.

What a recording can't see is what Python does with anything but tensors, so no program is taken on trust. Three things
keep it right:

guards   A program is used only while everything else that it depends on is what it was (`guards.py`): the model's,
         the inner optimizer's and the loss's attributes, globals, closures, hooks, and PyTorch's settings. When they
         change, another program is recorded; when they change back, the first one is used again.
checks   The results of a new program, and those of its next batch, must be those of an ordinary run.
audits   So must those of its uses 4, 8, 16, … 1024, and of every 1024th one from there on; else StaleCaptureError.

Each check and each audit costs an ordinary run: with the recorded one, eleven in the first thousand calls, then one in
a thousand (1,024).

A function that can't be recorded, or fails the checks, runs ordinarily from then on; `Captures.reasons` says why.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from functools import reduce
from itertools import accumulate, groupby
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metakern.meta.allocator import give_back
from metakern.meta.batches import containers, flatten, tasks_of
from metakern.meta.capture import operations  # noqa: F401  (fills the table of lowering rules)
from metakern.meta.capture.executable import Executable
from metakern.meta.capture.guards import MOST_BYTES, Guards, frozen, is_frozen
from metakern.meta.capture.lowering import LoweringError, lower
from metakern.meta.capture.program import Program
from metakern.meta.capture.recorder import RecordError, record
from metakern.meta.capture.rewrite import rewritten
from metakern.meta.unroll import Random
from metakern.native.memory import check

PROGRAMS = 32  # kept at once: those used last
STATES = 8  # of the surroundings, kept at once: those seen last
MOST_NEW_STATES = 16  # one after the other, none of which was seen twice
MOST_CHANGED = 2  # recorded runs that change what guards see
MICROBATCH_BYTES = 4 * 2**20  # of a core's part of the caches
AUTO_CALLS = 3  # with batches of one kind, of which "auto" captures the last
PYTHON_CALLS = 12  # where a program would be run by Python: recording takes the time that ten calls of it save
FIRST_AUDIT, AUDIT_EVERY = 4, 1024
_ROOTS = ("model", "inner", "loss")
Results = list[Tensor | None]


class StaleCaptureError(RuntimeError):
    """A captured program gives other results than an ordinary run: something that no guard sees has changed."""


class Captures:
    """The programs of a function of batches, one for each kind of batch and state of what the function depends on.

    roots: (model, inner optimizer, loss), whose reach is guarded. capture: True records at the first call and warns
    where it can't; "auto" records at the third call with batches of one kind, or at the twelfth where there is no
    executable, and never warns.
    names: what the function returns, for messages.

    The function returns losses of the batch's tasks, [T], and gradients (or None), which are sums over the tasks. Where
    a program has an executable, a batch goes through it in microbatches.
    """

    def __init__(self, roots: tuple[Any, Any, Any], capture: bool | str = True, names: Sequence[str] = ()) -> None:
        self._roots, self._auto, self._names = roots, capture == "auto", names
        self._states: list[_State] = []  # the last one seen first
        self._numbered = self._new_states = self._changed = 0
        self._programs: dict[Any, _Captured | None] = {}  # None: runs ordinarily
        self._microbatch: dict[Any, int] = {}  # tasks of a microbatch
        self._calls: dict[Any, int] = {}  # left until "auto" captures, by kind of batch
        self._reasons: dict[str, None] = {}
        self._run_by_python: dict[str, None] = {}
        self._late: list[str] = []  # reasons that hold if an ordinary run succeeds

    @property
    def reasons(self) -> list[str]:
        """Why some calls run ordinarily, a line each."""
        return [*self._reasons]

    @property
    def explained(self) -> list[str]:
        """Those, and why some programs have no executable, as `Plan.reasons` has them."""
        slow = (f"captured without an executable, as {reason}" for reason in self._run_by_python)
        return [*(f"not captured: {reason}" for reason in self._reasons), *slow]

    def __call__(self, function: Callable[..., Sequence[Tensor | None]], key: tuple, *batches: Any) -> Results:
        """function(*batches), by the program for the key, the batches' structure and the state of the surroundings."""
        tasks = tasks_of(batches[0])
        self._late.clear()
        state = self._state()
        whole = _Application(function, batches)
        if state is None or whole.obstacle:
            if whole.obstacle:
                self._note(whole.obstacle)
            return list(function(*batches))
        whole.kind = (state.number, *key, *whole.kind)
        if self._auto and self._too_early(whole.key):
            return list(function(*batches))
        microbatch, first = self._microbatch.pop(whole.key, 0), None
        is_new = not microbatch
        if is_new:
            microbatch, first = self._microbatch_of(whole, tasks, state.guards)
        self._microbatch[whole.key] = microbatch
        _drop_oldest(self._microbatch)
        if is_new and self._auto and self._is_for_python(whole):
            self._calls[whole.key] = PYTHON_CALLS - AUTO_CALLS
            return list(function(*batches))
        number = -(-tasks // microbatch)
        sizes = sorted((len(range(i, tasks, number)) for i in range(number)), reverse=True)  # equal ones side by side
        ends = accumulate(sizes)
        parts = [whole.part(slice(end - size, end)) for size, end in zip(sizes, ends, strict=True)]
        losses, *gradients = zip(*self._run(parts, first, state.guards), strict=True)
        while self._late:
            self._note(self._late.pop())
        return [torch.cat(losses), *(None if g[0] is None else reduce(torch.add, g) for g in gradients)]

    def _state(self) -> _State | None:
        """The state that everything beside the batches is in; None where nothing is captured in it."""
        for i, state in enumerate(self._states):
            if state.guards.hold():
                self._states.insert(0, self._states.pop(i))
                self._new_states = 0
                return state if state.number >= 0 else None
        if self._new_states > MOST_NEW_STATES:
            return None
        guards = Guards(dict(zip(_ROOTS, self._roots, strict=True)))
        for i, state in enumerate(self._states):
            if state.guards.signature == guards.signature:  # equal containers that are other objects
                state.guards = guards
                self._states.insert(0, self._states.pop(i))
                return state if state.number >= 0 else None
        self._new_states += 1
        if self._new_states > MOST_NEW_STATES:
            changes = ", ".join(self._states[0].guards.changes()[:3])
            self._note(f"{changes} changes from call to call")
            return None
        self._numbered += 1
        state = _State(guards, -1 if guards.obstacles else self._numbered)
        self._states.insert(0, state)
        del self._states[STATES:]
        if guards.obstacles:
            self._note("; ".join(dict.fromkeys(guards.obstacles[:3])))
            return None
        return state

    def _too_early(self, key: Any) -> bool:
        left = self._calls.pop(key, AUTO_CALLS) - 1
        self._calls[key] = max(left, 0)
        _drop_oldest(self._calls)
        return left > 0

    def _is_for_python(self, whole: _Application) -> bool:
        """Whether a task's program was made and has no executable, while there is none for the whole batch yet."""
        captured = self._programs.get(whole.part(slice(1)).key)
        return captured is not None and captured.executable is None and whole.key not in self._programs

    def _microbatch_of(self, whole: _Application, tasks: int, guards: Guards) -> tuple[int, Results | None]:
        """As many tasks as a cache holds, and one for each thread; all tasks where one task has no executable.

        With the results of the first microbatch, if finding out has made them.
        """
        threads, one, first = torch.get_num_threads(), whole.part(slice(1)), None
        if tasks < threads:
            return tasks, None
        if one.key not in self._programs:
            before = _Before(one, guards)
            first = self._recorded(one, guards, is_all=tasks == 1)
            if tasks > 1:
                before.restore()
        captured = self._programs.get(one.key)
        if captured is None or captured.executable is None:
            if one.key in self._programs and captured is None:
                self._programs[whole.key] = None
            return tasks, first if tasks == 1 else None
        fewest = -(-tasks // (threads * max(1, MICROBATCH_BYTES // captured.executable.bytes)))
        rounds = next(
            (r for r in range(fewest, 2 * fewest) if tasks % (threads * r) == 0), fewest
        )  # equal microbatches
        microbatch = -(-tasks // (threads * rounds))
        return microbatch, first if microbatch == 1 else None

    def _run(self, calls: list[_Application], first: Results | None, guards: Guards) -> list[Results]:
        """The calls' results, `first` those of the first one: of new programs one is compared with an ordinary run.

        And one of the next batch: then a program is known to be right.
        """
        results: list[Results] = [] if first is None else [first]
        new = {call.key for call in calls[: len(results)]}
        ready: list[tuple[_Captured, _Application]] = []
        sure = set()
        for call in calls[len(results) :]:
            captured = self._programs.get(call.key)
            if captured is not None and captured.moved():
                del self._programs[call.key]
            if call.key not in self._programs:
                new.add(call.key)
                results.append(self._recorded(call, guards))
                continue
            captured = self._programs[call.key] = self._programs.pop(call.key)
            if captured is None:
                results.append(list(call()))
            elif captured.checked or call.key in sure:
                ready.append((captured, call))
                results.append([])
            else:
                found, right = self._compared(captured, call)
                results.append(found)
                captured.checked = right and call.key not in new
                if right:
                    sure.add(call.key)
        found_ready = iter(self._played(ready))
        return [result or next(found_ready) for result in results]

    def _played(self, ready: list[tuple[_Captured, _Application]]) -> list[Results]:
        """The programs' results, audited where it is time."""
        due = {id(captured) for captured in {id(c): c for c, _ in ready}.values() if captured.is_due()}
        before = Random(ready[0][1].inputs[0].device) if due else None
        results = list(_played([(captured, call.inputs) for captured, call in ready]))
        if before is not None:
            before.restore()
            for (captured, call), found in zip(ready, results, strict=True):
                if (
                    id(captured) in due or captured.executable is None
                ):  # one that Python runs draws what the others drew before
                    self._audit(captured, call, found)
        return results

    def _audit(self, captured: _Captured, call: _Application, found: Results) -> None:
        truth = list(call())
        difference = _difference(found, truth, self._names)
        if not difference or self._would_be_recorded_again(captured, call, found):
            return
        self._programs[call.key] = None
        reason = f"a captured program gave other results than an ordinary run at its use {captured.uses}: {difference}"
        self._reasons[reason] = None
        raise StaleCaptureError(
            f"MAML: {reason}. Something that no guard sees has changed since it was recorded. Pass what changes as a "
            "part of the batch, or use capture=False"
        )

    def _would_be_recorded_again(self, captured: _Captured, call: _Application, found: Results) -> bool:
        """Whether a new recording computes the same to the last bits: then the difference is one of rounding.

        Rounding is amplified without bound where a derivative jumps (ReLU, max pooling), in ordinary runs too.
        """
        before = Random(call.inputs[0].device)
        try:
            program, _ = record(call, call.inputs, rewritten)
            again = _Captured(program, self._lowered(program, call.inputs))
            before.restore()
            (results,) = again([call.inputs], 1)
        except Exception:
            return False
        return not _difference(found, results, self._names, exponent=0.95)

    def _recorded(self, call: _Application, guards: Guards, is_all: bool = True) -> Results:
        """The call's results, and its program where there is one; no results where it fails and `is_all` is not set."""
        while len(self._programs) >= PROGRAMS:
            del self._programs[next(iter(self._programs))]
        before = _Before(call, guards)
        try:
            if call.inputs[0].device.type != "cpu":
                raise RecordError("programs are for CPUs")
            program, results = record(call, call.inputs, rewritten)
            changed = [*guards.changes(), *before.drawn()]
            if not changed:
                pinned = _pinned(program, guards, call.arrays)
                executable = self._lowered(program, call.inputs)
                captured = self._programs[call.key] = _Captured(program, executable, pinned)
        except Exception as error:  # an ordinary run may do what a recorded one can't; if it can't, it says why
            before.restore()
            results = list(call()) if is_all else []  # what an ordinary run changes, it must change once
            self._programs[call.key] = None
            self._note(str(error)) if is_all else self._late.append(str(error))
            return results
        if changed:
            self._changed += 1  # the first time it may be what is filled once, such as a cache
            if self._changed > MOST_CHANGED:
                self._give_up(call.key, f"a run changes {', '.join(changed[:3])}")
            return results
        before.random.restore()
        give_back()
        return self._compared(captured, call, results)[0]

    def _compared(self, captured: _Captured, call: _Application, truth: Results | None = None) -> tuple[Results, bool]:
        """The program's results, if they are those of an ordinary run (`truth`), else these; and whether they are."""
        before, reason = Random(call.inputs[0].device), ""
        try:
            (found,) = captured([call.inputs], 1)
        except Exception as error:
            found, reason = [], str(error)
        if truth is None:
            if captured.executable is not None:
                captured.executable.release()  # an ordinary run wants as much
            before.restore()
            truth = list(call())
            give_back()
        difference = _difference(found, truth, self._names) if found else ""
        if found and not difference:
            return found, True
        if not found or all(t is None or t.isfinite().all() for t in truth):  # others confirm nothing
            self._give_up(call.key, reason or f"it would give other results than an ordinary run: {difference}")
        return truth, False

    def _lowered(self, program: Program, inputs: Sequence[Tensor]) -> Executable | None:
        try:
            return lower(program, inputs)
        except LoweringError as error:
            self._run_by_python[str(error)] = None
            return None

    def _give_up(self, key: Any, reason: str) -> None:
        self._programs[key] = None
        self._note(reason)

    def _note(self, reason: str) -> None:
        if reason not in self._reasons and not self._auto:
            warnings.warn(
                f"MAML: capture has no effect, as the meta-gradient can't be captured: {reason}", stacklevel=2
            )
        self._reasons[reason] = None


class _State:
    """A state of everything that programs depend on beside their inputs; its number is negative where none is used."""

    def __init__(self, guards: Guards, number: int) -> None:
        self.guards, self.number = guards, number


class _Before:
    """What a recorded run may change beside tensors, to be put back where its results are not used."""

    def __init__(self, call: _Application, guards: Guards) -> None:
        self.random, self._guards = Random(call.inputs[0].device), guards
        self._python, self._numpy = random.getstate(), np.random.get_state()

    def drawn(self) -> list[str]:
        """Random generators outside of PyTorch which were used since."""
        numpy = zip(np.random.get_state(), self._numpy, strict=True)
        used = {"random's state": random.getstate() != self._python}
        used["numpy.random's state"] = not all(np.array_equal(a, b) for a, b in numpy)
        return [name for name, is_used in used.items() if is_used]

    def restore(self) -> None:
        self.random.restore()
        self._guards.restore()
        random.setstate(self._python)
        np.random.set_state(self._numpy)


class _Application:
    """A function and its batches, whose tensors are the inputs of a program."""

    def __init__(self, function: Callable[..., Sequence[Tensor | None]], batches: tuple) -> None:
        self._function = function
        self._leaves, self._rebuild = flatten(batches)
        self._where = [i for i, leaf in enumerate(self._leaves) if isinstance(leaf, Tensor)]
        self.arrays: list[np.ndarray] = []  # their values are a part of the kind, so they are kept as they are now
        self.kind: tuple = ()
        self.obstacle = ""
        for i, leaf in enumerate(self._leaves):
            if isinstance(leaf, Tensor):
                if type(leaf) is not Tensor or leaf.layout is not torch.strided:
                    self.obstacle = f"the batch holds a tensor that is a {type(leaf).__name__} of {leaf.layout}"
            elif isinstance(leaf, np.ndarray):
                self._leaves[i] = leaf.copy()
                self.arrays.append(self._leaves[i])
        try:
            others = tuple(_value(leaf) for leaf in self._leaves if not isinstance(leaf, Tensor))
            self.kind = (containers(batches), others)
            hash(self.kind)
        except TypeError as error:
            self.obstacle = str(error)
        if not self.obstacle:
            self._take([self._leaves[i].contiguous() for i in self._where])

    def _take(self, inputs: list[Tensor]) -> None:
        self.inputs = inputs
        self._layouts = tuple((t.shape, t.dtype, t.device) for t in inputs)

    @property
    def key(self) -> tuple:
        return (self.kind, self._layouts)

    def __call__(self) -> Sequence[Tensor | None]:
        leaves = [*self._leaves]
        for i, tensor in zip(self._where, self.inputs, strict=True):
            leaves[i] = tensor
        return self._function(*self._rebuild(leaves))

    def part(self, tasks: slice) -> _Application:
        part = copy(self)
        part._take([t[tasks] for t in self.inputs])
        return part


def _value(leaf: Any) -> Any:
    """A hashable stand-in for what a batch holds beside tensors, by value; raises TypeError where there is none."""
    if is_frozen(leaf):
        return frozen(leaf)
    if isinstance(leaf, np.ndarray) and not leaf.dtype.hasobject and leaf.nbytes <= MOST_BYTES:
        return leaf.dtype.str, leaf.shape, leaf.tobytes()
    if isinstance(leaf, set | frozenset):
        return type(leaf), frozenset(map(_value, leaf))
    raise TypeError(f"the batch holds a {type(leaf).__name__}, which can't be compared by value")


class _Captured:
    """A program, and its executable where it has one. `pinned`: tensors whose memory must stay where it was."""

    def __init__(self, program: Program, executable: Executable | None, pinned: Sequence[Tensor] = ()) -> None:
        self.program, self.executable, self.checked, self.uses = program, executable, False, 0
        self._pinned = [(t, _address(t)) for t in pinned]
        self._constants = program.constants

    def moved(self) -> bool:
        return any(_address(t) != address for t, address in self._pinned)

    def is_due(self) -> bool:
        """Counts a use, and says whether it is one to be audited."""
        self.uses += 1
        doubled = self.uses >= FIRST_AUDIT and self.uses & (self.uses - 1) == 0
        return doubled if self.uses <= AUDIT_EVERY else self.uses % AUDIT_EVERY == 0

    def __call__(self, microbatches: Sequence[Sequence[Tensor]], threads: int) -> list[Results]:
        for t in (*self._constants, *(t for inputs in microbatches for t in inputs)):
            check("MAML", "a tensor of a captured program", t)
        results = self.executable(microbatches, threads) if self.executable is not None else None
        return (
            [self.program(inputs) for inputs in microbatches] if results is None else results
        )  # which says what is wrong


def _address(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()


def _pinned(program: Program, guards: Guards, arrays: Sequence[np.ndarray]) -> list[Tensor]:
    """Tensors that the program reads by another name; raises RecordError where it reads one that no guard sees."""
    made = {id(t) for t in program.made}
    memory = {_address(t): t for t, _ in guards.tensors.values() if t.layout is torch.strided}
    spans = [_span_of(array) for array in (*arrays, *(array for array, _, _ in guards.arrays))]
    found = []
    for t in program.constants:
        if id(t) in guards.tensors or id(t) in made or t.numel() == 0:
            continue
        address = _address(t)
        if address in memory:
            found.append(memory[address])
        elif not any(start <= address < end for start, end in spans):
            raise RecordError(
                f"it reads a tensor {list(t.shape)} that no guard can see, such as one of an iterator or of a library"
            )
    return found


def _span_of(array: np.ndarray) -> tuple[int, int]:
    start = array.__array_interface__["data"][0]
    return start, start + array.nbytes


def _drop_oldest(kept: dict[Any, Any]) -> None:
    if len(kept) > PROGRAMS:
        del kept[next(iter(kept))]


def _played(microbatches: Sequence[tuple[_Captured, list[Tensor]]]) -> Iterator[Results]:
    """The microbatches' programs, as many at a time as there are threads."""
    threads = torch.get_num_threads()
    for _, alike in groupby(microbatches, key=lambda microbatch: id(microbatch[0])):
        captured, inputs = zip(*alike, strict=True)
        for i in range(0, len(inputs), threads):
            yield from captured[0](inputs[i : i + threads], threads)


def _difference(found: Results, truth: Results, names: Sequence[str], exponent: float = 0.6) -> str:
    """Which results differ by more than rounding, which differs where an operation is composed otherwise; or "".

    A small gradient may be what is left of large ones, so that a result counts relative to the largest one too. Where
    the truth is infinite or not a number, so must be what was found; the rest is compared.
    """
    finite = [None if t is None else t.where(t.isfinite(), 0) for t in truth]
    norms = [0.0 if t is None else t.norm().item() for t in finite]
    for i, (a, b, norm) in enumerate(zip(found, truth, norms, strict=True)):
        name = names[i] if i < len(names) else f"result {i}"
        if (a is None) != (b is None):
            return f"{name} is {'missing' if a is None else 'there'}"
        if a is not None and b is not None:
            error = torch.where(b.isfinite() | a.isfinite(), a - b, 0).norm().item()
            tolerance = torch.finfo(b.dtype).eps ** exponent
            if not error <= tolerance * max(norm, 1e-3 * max(norms)):
                return f"{name} differs by {error:.1e}, of {norm:.1e}"
    return ""
