"""Captured meta-gradients: the kernel calls of a chunk are recorded once and replayed for later chunks.

A recording does not see what Python does with anything but tensors. Three things make sure that a program still
computes what an ordinary run (one by Python and autograd) would compute:

guards   A program is used only while everything else that it depends on is unchanged (`guards.py`): attributes,
         globals, closures and hooks of the model, the inner optimizer and the loss, and PyTorch's settings. When these
         change, another program is recorded; when they change back, the first one is used again.
checks   The results of a new program, and those for its next batch, must equal those of an ordinary run. Otherwise the
         program is dropped.
audits   The results of its uses 4, 8, 16, …, 1024, and of every 1024th one after that, must equal those of an ordinary
         run. Otherwise StaleCaptureError is raised.

Each check and each audit costs an ordinary run: with the recorded one, eleven in the first thousand calls, then one in
1,024.

A function that can't be recorded, or fails the checks, runs ordinarily from then on; `Captures.reasons` says why.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from copy import copy
from functools import partial, reduce
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
from metakern.meta.precision import in_precision
from metakern.meta.unroll import Random
from metakern.native.memory import check

PROGRAMS = 32  # programs kept; the one unused for longest is dropped
STATES = 8  # guarded states kept; the one unseen for longest is dropped
MOST_NEW_STATES = 16  # after more new states in a row, nothing more is recorded
MOST_CHANGED = 2  # recorded runs that may change guarded values before recording is given up
MICROBATCH_BYTES = 4 * 2**20  # a core's share of the caches
AUTO_CALLS = 3  # "auto" captures at this call with batches of one kind
PYTHON_CALLS = 12  # the same for programs that Python runs: recording one takes the time that ten calls of it save
FIRST_AUDIT, AUDIT_EVERY = 4, 1024  # uses of a program
_ROOTS = ("model", "inner", "loss")
Results = list[Tensor | None]


class StaleCaptureError(RuntimeError):
    """A captured program gave other results than an ordinary run: something that no guard sees has changed."""


class Captures:
    """The captured programs of a function of batches, one for each kind of batch and state of its surroundings.

    The function returns the losses of the batch's tasks, `[T]`, and gradients (or None), which are sums over the tasks.
    A program that has an executable runs a batch in microbatches.

    Args:
        roots: Model, inner optimizer and loss. Everything that they can reach is guarded.
        capture: True records at the first call, and warns if it can't. "auto" records at the third call with batches
            of one kind (at the twelfth, if the program has no executable), and never warns.
        names: Names of the function's results, for messages.
        precision: The precision of products, None or "bfloat16". Programs do not depend on it: they are recorded,
            checked and audited in float32, and run in this precision.
    """

    def __init__(
        self,
        roots: tuple[Any, Any, Any],
        capture: bool | str = True,
        names: Sequence[str] = (),
        precision: str | None = None,
    ) -> None:
        self._roots, self._auto, self._names, self._precision = roots, capture == "auto", names, precision
        self._states: list[_State] = []  # in the order of last use, the latest first
        self._numbered = self._new_states = self._changed = 0
        self._programs: dict[Any, _Captured | None] = {}  # None: calls of this key run ordinarily
        self._microbatch: dict[Any, int] = {}  # key of a batch -> tasks in each microbatch
        self._calls: dict[Any, int] = {}  # key of a batch -> calls left until "auto" captures
        self._reasons: dict[str, None] = {}
        self._run_by_python: dict[str, None] = {}  # reasons why programs have no executable
        self._late: list[str] = []  # reasons to be noted at the end of the call, if an ordinary run succeeds

    @property
    def reasons(self) -> list[str]:
        """Why some calls run ordinarily, one line for each reason."""
        return [*self._reasons]

    @property
    def explained(self) -> list[str]:
        """Lines for `Plan.reasons`: why some calls are not captured, and why some programs have no executable."""
        slow = (f"captured without an executable, as {reason}" for reason in self._run_by_python)
        return [*(f"not captured: {reason}" for reason in self._reasons), *slow]

    def __call__(self, function: Callable[..., Sequence[Tensor | None]], key: tuple, *batches: Any) -> Results:
        """Return `function(*batches)`, by a captured program where there is one.

        Programs are kept by `key`, by the structure, shapes and other values of the batches, and by the guarded state.
        """
        tasks = tasks_of(batches[0])
        self._late.clear()
        state = self._state()
        whole = _Application(function, batches)
        if state is None or whole.obstacle:
            if whole.obstacle:
                self._note(whole.obstacle)
            return self._ordinary(partial(function, *batches))
        whole.kind = (state.number, *key, *whole.kind)
        if self._auto and self._too_early(whole.key):
            return self._ordinary(partial(function, *batches))
        microbatch, first = self._microbatch.pop(whole.key, 0), None
        is_new = not microbatch
        if is_new:
            microbatch, first = self._microbatch_of(whole, tasks, state.guards)
        self._microbatch[whole.key] = microbatch
        _drop_oldest(self._microbatch)
        if is_new and self._auto and self._is_for_python(whole):
            self._calls[whole.key] = PYTHON_CALLS - AUTO_CALLS
            return self._ordinary(partial(function, *batches))
        number = -(-tasks // microbatch)
        sizes = sorted((len(range(i, tasks, number)) for i in range(number)), reverse=True)  # equal sizes are adjacent
        ends = accumulate(sizes)
        parts = [whole.part(slice(end - size, end)) for size, end in zip(sizes, ends, strict=True)]
        losses, *gradients = zip(*self._run(parts, first, state.guards), strict=True)
        while self._late:
            self._note(self._late.pop())
        return [torch.cat(losses), *(None if g[0] is None else reduce(torch.add, g) for g in gradients)]

    def _ordinary(self, function: Callable[[], Sequence[Tensor | None]]) -> Results:
        """Return `function()`, run by Python and autograd."""
        return list(in_precision(self._precision)(function)())

    def _state(self) -> _State | None:
        """Return the current guarded state, or None if nothing is captured in it."""
        for i, state in enumerate(self._states):
            if state.guards.hold():
                self._states.insert(0, self._states.pop(i))
                self._new_states = 0
                return state if state.number >= 0 else None
        if self._new_states > MOST_NEW_STATES:
            return None
        guards = Guards(dict(zip(_ROOTS, self._roots, strict=True)))
        for i, state in enumerate(self._states):
            if state.guards.signature == guards.signature:  # equal values in other objects
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
        """Whether the program of one task has no executable, and the whole batch was not recorded yet."""
        captured = self._programs.get(whole.part(slice(1)).key)
        return captured is not None and captured.executable is None and whole.key not in self._programs

    def _microbatch_of(self, whole: _Application, tasks: int, guards: Guards) -> tuple[int, Results | None]:
        """Return the number of tasks in a microbatch, and the results of the first one if they are known already.

        A microbatch has as many tasks as fit a core's cache, at most a thread's share of the batch. It is the whole
        batch where that has fewer tasks than there are threads, or where one task's program has no executable.
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
        """Return the results of the calls; `first` are those of the first call, if known.

        A new program is compared with an ordinary run once when it is recorded and once in the next batch.
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
                results.append(self._ordinary(call))
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
        """Return the results of the programs, after the audits that are due."""
        due = {id(captured) for captured in {id(c): c for c, _ in ready}.values() if captured.is_due()}
        before = Random(ready[0][1].inputs[0].device) if due else None
        results = list(_played([(captured, call.inputs) for captured, call in ready], self._precision))
        if before is not None:
            before.restore()
            for (captured, call), found in zip(ready, results, strict=True):
                # Only programs that Python runs draw random numbers. All of them are audited, in order, so that each
                # ordinary run draws what its program drew.
                if id(captured) in due or captured.executable is None:
                    self._audit(captured, call, found)
        return results

    def _audit(self, captured: _Captured, call: _Application, found: Results) -> None:
        if self._precision is not None:
            before = Random(call.inputs[0].device)
            (found,) = captured([call.inputs], 1)
            before.restore()
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
        """Whether a new recording gives nearly the same bits: then the difference to an ordinary run is rounding.

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
        """Record the call and return its results.

        Where recording fails, the call runs ordinarily; unless `is_all` is set, an empty list is returned instead.
        """
        while len(self._programs) >= PROGRAMS:
            del self._programs[next(iter(self._programs))]
        before = _Before(call, guards)
        try:
            if call.inputs[0].device.type != "cpu":
                raise RecordError("programs run on CPUs only")
            program, results = record(call, call.inputs, rewritten)
            changed = [*guards.changes(), *before.drawn()]
            if not changed:
                pinned = _pinned(program, guards, call.arrays)
                executable = self._lowered(program, call.inputs)
                captured = self._programs[call.key] = _Captured(program, executable, pinned)
        except Exception as error:  # an ordinary run may succeed; if not, its own error is raised
            before.restore()
            # Not for a part: what an ordinary run changes must change once.
            results = self._ordinary(call) if is_all else []
            self._programs[call.key] = None
            self._note(str(error)) if is_all else self._late.append(str(error))
            return results
        if changed:
            self._changed += 1  # the first runs may fill a cache, which later ones leave alone
            if self._changed > MOST_CHANGED:
                self._give_up(call.key, f"a run changes {', '.join(changed[:3])}")
            return results
        before.random.restore()
        give_back()
        return self._compared(captured, call, results)[0]

    def _compared(self, captured: _Captured, call: _Application, truth: Results | None = None) -> tuple[Results, bool]:
        """Compare the program with an ordinary run (`truth`, made here if None), both in float32.

        Returns the program's results and True if they agree, else those of the ordinary run and False.
        """
        before, reason = Random(call.inputs[0].device), ""
        try:
            (found,) = captured([call.inputs], 1)
        except Exception as error:
            found, reason = [], str(error)
        if truth is None:
            if captured.executable is not None:
                captured.executable.release()  # frees the arenas, as an ordinary run needs as much memory
            before.restore()
            truth = list(call())
            give_back()
        difference = _difference(found, truth, self._names) if found else ""
        right = bool(found) and not difference
        if not right and (not found or all(t is None or t.isfinite().all() for t in truth)):  # infinite: undecided
            self._give_up(call.key, reason or f"it would give other results than an ordinary run: {difference}")
        if self._precision is not None:
            before.restore()
            return (captured([call.inputs], 1, self._precision)[0] if right else self._ordinary(call)), right
        return (found if right else truth), right

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
    """A state of everything that programs depend on besides their inputs. With a negative number, none are used."""

    def __init__(self, guards: Guards, number: int) -> None:
        self.guards, self.number = guards, number


class _Before:
    """A snapshot of what a recorded run may change besides tensors, restored where its results are not used."""

    def __init__(self, call: _Application, guards: Guards) -> None:
        self.random, self._guards = Random(call.inputs[0].device), guards
        self._python, self._numpy = random.getstate(), np.random.get_state()

    def drawn(self) -> list[str]:
        """Return the names of the generators of Python and NumPy that were used since."""
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
    """A function with its batches. Their tensors are the inputs of a program; `obstacle` says why there can be none."""

    def __init__(self, function: Callable[..., Sequence[Tensor | None]], batches: tuple) -> None:
        self._function = function
        self._leaves, self._rebuild = flatten(batches)
        self._where = [i for i, leaf in enumerate(self._leaves) if isinstance(leaf, Tensor)]
        self.arrays: list[np.ndarray] = []  # copies, since `kind` holds the values that the arrays have now
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
    """Return a hashable stand-in for a leaf that is no tensor. Raises TypeError if it can't be compared by value."""
    if is_frozen(leaf):
        return frozen(leaf)
    if isinstance(leaf, np.ndarray) and not leaf.dtype.hasobject and leaf.nbytes <= MOST_BYTES:
        return leaf.dtype.str, leaf.shape, leaf.tobytes()
    if isinstance(leaf, set | frozenset):
        return type(leaf), frozenset(map(_value, leaf))
    raise TypeError(f"the batch holds a {type(leaf).__name__}, which can't be compared by value")


class _Captured:
    """A program with its executable (or None) and its count of uses. The memory of `pinned` tensors must not move."""

    def __init__(self, program: Program, executable: Executable | None, pinned: Sequence[Tensor] = ()) -> None:
        self.program, self.executable, self.checked, self.uses = program, executable, False, 0
        self._pinned = [(t, _address(t)) for t in pinned]
        self._constants = program.constants

    def moved(self) -> bool:
        return any(_address(t) != address for t, address in self._pinned)

    def is_due(self) -> bool:
        """Count a use, and return whether it is to be audited."""
        self.uses += 1
        doubled = self.uses >= FIRST_AUDIT and self.uses & (self.uses - 1) == 0
        return doubled if self.uses <= AUDIT_EVERY else self.uses % AUDIT_EVERY == 0

    def __call__(
        self, microbatches: Sequence[Sequence[Tensor]], threads: int, precision: str | None = None
    ) -> list[Results]:
        for t in (*self._constants, *(t for inputs in microbatches for t in inputs)):
            check("MAML", "a tensor of a captured program", t)
        bfloat16 = precision == "bfloat16"
        results = self.executable(microbatches, threads, bfloat16) if self.executable is not None else None
        if results is None:  # there is no executable, or a check failed in C++; by Python, it raises its error
            program = in_precision(precision)(self.program)
            results = [program(inputs) for inputs in microbatches]
        return results


def _address(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()


def _pinned(program: Program, guards: Guards, arrays: Sequence[np.ndarray]) -> list[Tensor]:
    """Return the guarded tensors whose memory the program reads through another tensor.

    Raises RecordError where the program reads memory that no guard sees.
    """
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


def _played(microbatches: Sequence[tuple[_Captured, list[Tensor]]], precision: str | None) -> Iterator[Results]:
    """Yield the results of the microbatches, running as many of one program at a time as there are threads."""
    threads = torch.get_num_threads()
    for _, alike in groupby(microbatches, key=lambda microbatch: id(microbatch[0])):
        captured, inputs = zip(*alike, strict=True)
        for i in range(0, len(inputs), threads):
            yield from captured[0](inputs[i : i + threads], threads, precision)


def _difference(found: Results, truth: Results, names: Sequence[str], exponent: float = 0.6) -> str:
    """Describe the first result that differs by more than rounding, or return "".

    The tolerance is eps**exponent, relative to the norm of the result, or to a thousandth of the largest norm if that
    is more: a small gradient may be the rest of large terms that cancel. Elements that are infinite or NaN on both
    sides are not compared.
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
