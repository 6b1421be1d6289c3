"""Captured meta-gradients: the kernel calls of a chunk are recorded once and replayed for later chunks.

A recording does not see what Python does with anything but tensors. Three things make sure that a program still
computes what an ordinary run (one by Python and autograd) would compute:

guards   A program is used only while everything else that it depends on is unchanged (`guards.py`): attributes,
         globals, closures and hooks of the model, the inner optimizer and the loss, and PyTorch's settings. When these
         change, another program is recorded; when they change back, the first one is used again.
checks   The results of a new program must equal those of the recorded run, and its first results in the next call of
         MAML those of an ordinary run. Otherwise the program is dropped; StaleCaptureError is raised if the call that
         recorded it used it for other tasks too.
audits   The results of its uses 4, 8, 16, …, 1024, and of every 1024th one after that, must equal those of an ordinary
         run. Otherwise StaleCaptureError is raised.

Each check and each audit costs an ordinary run: with the recorded one, eleven in the first thousand calls, then one in
1,024.

A function that can't be recorded, or fails the checks, runs ordinarily from then on; `Captures.reasons` says why.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from functools import partial
from hashlib import sha256
from itertools import accumulate, count, groupby, takewhile
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metakern.meta.allocator import give_back
from metakern.meta.batches import containers, flatten
from metakern.meta.capture import operations  # noqa: F401  (fills the table of lowering rules)
from metakern.meta.capture.executable import Executable
from metakern.meta.capture.graph import SHARE, Graph, Graphs
from metakern.meta.capture.guards import MOST_BYTES, Guards, frozen, is_frozen
from metakern.meta.capture.lowering import LoweringError, lower
from metakern.meta.capture.program import Decisions, Program
from metakern.meta.capture.recorder import RecordError, record
from metakern.meta.capture.rewrite import rewritten
from metakern.meta.capture.room import DROPS, WAITS, Programs, Room
from metakern.meta.plan import free_bytes
from metakern.meta.precision import in_precision
from metakern.meta.seconds import Stopwatch, Usage
from metakern.meta.unroll import Random
from metakern.native.memory import check

KINDS = 4096  # kinds of batches that are remembered; the one unseen for longest is forgotten
STATES = 8  # guarded states kept; the one unseen for longest is dropped
MOST_NEW_STATES = 16  # after more new states in a row, nothing more is recorded
MOST_BRANCHES = 8  # programs for batches of one kind, which differ in the numbers that Python read
MOST_CHANGED = 2  # recorded runs that may change guarded values before recording is given up
MICROBATCH_BYTES = 4 * 2**20  # a core's share of the caches
STEP_BYTES = 2048  # of a step of a program that Python runs
AUTO_CALLS = 3  # "auto" captures at this call with batches of one kind
PYTHON_CALLS = 12  # the same for programs that Python runs: recording one takes the time that ten calls of it save
MOST_MOVED = 8  # programs of one function on a GPU that are recorded anew because a tensor has moved
MOST_MISSES = 3  # comparisons in which a program may differ by little, as where a ReLU's input is 0 up to rounding
LITTLE = 0.3  # such a relative difference is at most eps**LITTLE
FIRST_AUDIT, AUDIT_EVERY = 4, 1024  # uses of a program
NUDGES, SPREADS = 4, 5.0  # runs with other rounding; what differs by at most this multiple of theirs is rounding
Results = list[Tensor | None]


class StaleCaptureError(RuntimeError):
    """A captured program gave other results than an ordinary run: something that no guard sees has changed."""


class Captures:
    """The captured programs of a function of batches, one for each kind of batch and state of its surroundings.

    The function returns the losses of the batch's tasks, `[T]`, and gradients (or None), which are sums over the tasks.
    A program that has an executable runs a batch in microbatches.

    Args:
        roots: Model, inner optimizer, loss and whatever else computes, by name. All that they can reach is guarded.
        capture: True records at the first call, and warns if it can't. "auto" records at the third call with tasks of
            one kind (at the twelfth, if the program has no executable), and never warns.
        names: Names of the function's results, for messages.
        precision: The precision of products, None or "bfloat16". Programs do not depend on it: they are recorded,
            checked and audited in float32, and run in this precision.
        watch: Adds up the time of recording, lowering and comparison.
        fresh: A context in which the function uses no leaf that had a graph before. A CUDA graph is recorded in it. It
            may raise RecordError.
        room: What holds the programs, with those of other functions; None for a room of its own.
    """

    def __init__(
        self,
        roots: dict[str, Any],
        capture: bool | str = True,
        names: Sequence[str] = (),
        precision: str | None = None,
        watch: Stopwatch | None = None,
        fresh: Callable[[], AbstractContextManager[None]] = nullcontext,
        room: Room | None = None,
    ) -> None:
        self._fresh = fresh
        self._roots, self._auto, self._names, self._precision = roots, capture == "auto", names, precision
        self._watch = watch or Stopwatch()
        self._at = 0  # the number of the call of MAML
        self._chunks = self._captured = 0  # chunks of tasks that ran, and those of them that programs ran
        self._states: list[_State] = []  # in the order of last use, the latest first
        self._numbered = self._new_states = self._changed = 0
        self._room = Room() if room is None else room
        self._programs = Programs(self._room)  # None: calls of this key run ordinarily
        # Key of a batch -> the decisions of its programs, by number; None: Python read no numbers of it.
        self._branches: dict[Any, dict[int, Decisions | None]] = {}
        self._next_branch = count(1)
        self._graphs = Graphs()
        self._moved = 0  # programs that were dropped because a tensor has moved
        self._microbatch: dict[Any, int] = {}  # key of a batch -> tasks in each microbatch
        self._calls: dict[Any, tuple[int, int]] = {}  # key of a task -> calls with such tasks, and the last of them
        self._slow: dict[Any, None] = {}  # keys of tasks whose program has no executable
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

    @property
    def usage(self) -> Usage:
        """How many programs there are, and how many chunks of tasks ran by them and ordinarily."""
        return Usage(self._programs.count(), self._captured, self._chunks - self._captured)

    def begin(self) -> None:
        """Begin a call of MAML; all batches until the next one are its chunks."""
        self._at += 1

    def __call__(self, function: Callable[..., Sequence[Tensor | None]], *batches: Any) -> Results:
        """Return `function(*batches)`, by a captured program where there is one.

        Programs are kept by the structure, shapes and other values of the batches, by the guarded state, and by the
        integers and booleans that Python reads from the batches' tensors.
        """
        self._chunks += 1
        self._room.call()
        self._late.clear()
        state = self._state()
        whole = _Application(function, batches)
        if state is None or whole.obstacle:
            if whole.obstacle:
                self._note(whole.obstacle)
            return self._ordinary(partial(function, *batches))
        whole.kind = (state.number, *whole.kind)
        tasks, one, truth = len(whole.inputs[0]), None, None
        if not (microbatch := self._microbatch.pop(whole.batch, 0)):
            one = whole.part(slice(1))
            if (self._auto and self._too_early(one.batch)) or self._has_to_wait():
                return self._ordinary(partial(function, *batches))
            microbatch, truth = self._microbatch_of(whole, one, tasks, state.guards)
            if self._auto and self._is_for_python(one, whole) and one.batch not in self._slow:
                self._slow[one.batch] = None
                _drop_oldest(self._slow)
                return self._ordinary(partial(function, *batches))
        self._microbatch[whole.batch] = microbatch
        _drop_oldest(self._microbatch)
        number = -(-tasks // microbatch)
        sizes = sorted((len(range(i, tasks, number)) for i in range(number)), reverse=True)  # equal sizes are adjacent
        ends = accumulate(sizes)
        slices = [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]
        parts = [whole] if number == 1 else [*map(whole.part, slices)]
        if self._room.is_full and not all(map(self._is_kept, parts)) and self._has_to_wait():
            return self._ordinary(partial(function, *batches))
        truths = {}
        if truth and one is not None and parts[0].batch == one.batch:
            parts[0].branch = one.branch
            truths[one.key] = truth
        losses, sums = list[Any](), Results()
        for value, *gradients in self._run(parts, state.guards, truths):
            sums = _added(sums, gradients, in_place=len(losses) > 1) if losses else gradients
            losses.append(value)
            del gradients  # they are as large as the model
        self._captured += all(self._programs.get(part.key) is not None for part in parts)
        while self._late:
            self._note(self._late.pop())
        return [torch.cat(losses), *sums]

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
        guards = Guards(self._roots)
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
        """Count the call; return whether "auto" still waits with tasks of this key."""
        seen, last = self._calls.pop(key, (0, -1))
        seen += last != self._at
        self._calls[key] = seen, self._at
        _drop_oldest(self._calls)
        return seen < (PYTHON_CALLS if key in self._slow else AUTO_CALLS)

    def _is_for_python(self, one: _Application, whole: _Application) -> bool:
        """Whether the program of one task has no executable, and the whole batch was not recorded yet."""
        captured = self._programs.get(one.key)
        return captured is not None and captured.executable is None and not self._branch_of(whole)

    def _microbatch_of(
        self, whole: _Application, one: _Application, tasks: int, guards: Guards
    ) -> tuple[int, Results | None]:
        """Return the number of tasks in a microbatch, and the results of task `one` if it was recorded just now.

        A microbatch has as many tasks as fit a core's cache, at most a thread's share of the batch. It is the whole
        batch on a GPU, where that has fewer tasks than there are threads, and where one task's program has no
        executable.
        """
        threads, truth = torch.get_num_threads(), None
        if tasks < threads or whole.device.type != "cpu":
            return tasks, None
        one.branch = self._branch_of(one) or next(self._next_branch)
        if one.key not in self._programs:
            before = _Before(one, guards)
            truth = self._recorded(one, guards, is_all=tasks == 1)
            if tasks > 1:
                before.restore()
        captured = self._programs.get(one.key)
        if captured is None or not isinstance(captured.executable, Executable):
            if one.key in self._programs and captured is None and not self._branch_of(whole):
                whole.branch = next(self._next_branch)
                self._keep(whole, None)
            return tasks, truth
        fewest = -(-tasks // (threads * max(1, MICROBATCH_BYTES // captured.executable.bytes)))
        rounds = next(
            (r for r in range(fewest, 2 * fewest) if tasks % (threads * r) == 0), fewest
        )  # equal microbatches
        return -(-tasks // (threads * rounds)), truth

    def _run(self, calls: list[_Application], guards: Guards, truths: dict[Any, Results]) -> Iterator[Results]:
        """Yield the results of the calls as they come: gradients are as large as the model, and are not held for all.

        `truths`: the results of runs that were recorded just now, by the key of the program; the first call with such a
        key is the one that was recorded.
        """
        for _, alike in groupby(calls, key=lambda call: call.batch):
            rest = list(alike)
            while rest:
                first = rest[0]
                first.branch = first.branch or self._branch_of(first) or next(self._next_branch)
                captured = self._programs.get(first.key)
                if captured is not None and captured.moved():
                    self._programs.drop(first.key)
                    self._moved += first.device.type != "cpu"
                    if self._moved > MOST_MOVED:
                        self._give_up(first, "parameters move in memory from call to call")
                if first.key not in self._programs and first.key not in truths:
                    truths[first.key] = self._recorded(first, guards)
                group = [first, *takewhile(partial(self._joins, first), rest[1:])]
                rest = rest[len(group) :]
                captured = self._programs.get(first.key)
                if captured is not None:
                    self._programs.use(first.key)
                    sure = captured.checked
                    yield from (
                        self._played(captured, group) if sure else self._tried(captured, group, truths.get(first.key))
                    )
                else:
                    done = [truths[first.key]] if first.key in truths else []
                    yield from (*done, *map(self._ordinary, group[len(done) :]))

    def _branch_of(self, call: _Application) -> int:
        """Return the number of the program for the numbers that Python reads in this call, or 0 if there is none."""
        branches = self._branches.get(call.batch, {})
        return next((i for i, found in branches.items() if found is None or found.hold(call.inputs)), 0)

    def _has_to_wait(self) -> bool:
        """Whether a batch without a program runs ordinarily because there is no room; say so.

        With `capture=True` a program is recorded all the same: whether one is used depends on the batch alone.
        """
        if self._room.is_full:
            self._note(WAITS if self._auto else DROPS, DROPS)
        return self._auto and self._room.is_full

    def _is_kept(self, call: _Application) -> bool:
        """Whether there are programs for such batches."""
        return any((*call.batch, branch) in self._programs for branch in self._branches.get(call.batch, {}))

    def _joins(self, first: _Application, call: _Application) -> bool:
        """Whether a call runs as `first` does; if so, give it the same branch."""
        known = first.branch in self._branches.get(first.batch, {})
        if known and self._branch_of(call) != first.branch:
            return False
        call.branch = first.branch
        return True

    def _keep(self, call: _Application, captured: _Captured | None) -> None:
        """Keep the program of a call, or None if such calls run ordinarily."""
        self._programs.put(call.key, captured, 0 if captured is None else captured.size)
        branches = self._branches.setdefault(call.batch, {})
        if captured is not None:
            branches[call.branch] = captured.decisions
        else:
            branches.setdefault(call.branch, None)
        _drop_oldest(self._branches)

    def _tried(self, captured: _Captured, calls: list[_Application], truth: Results | None) -> list[Results]:
        """Return the results of a program that is not checked yet, or those of ordinary runs where it is wrong.

        `truth` are the results of the recorded run of the first call, None if the program is older. In the call of MAML
        that recorded the program, its other results are not compared. The next call of MAML compares its first results,
        which are for other data; a difference is then an error, as results that may be wrong were used.
        """
        is_next = captured.recorded_at != self._at
        before, reason, found = Random(calls[0].inputs[0].device), "", list[Results]()
        try:
            found = list(_played(captured, calls))
        except Exception as error:
            reason = str(error)
        with self._watch.part("comparison"):
            if truth is None and (is_next or not captured.agreed or not found):
                before.restore()
                truth = captured.truth(calls[0])
            difference = _difference(found[0], truth, self._names) if found and truth is not None else ""
            if found and difference and captured.was_ahead:
                before.restore()
                self._audit(captured, calls[0], found[0])
                difference = ""
        if found and not difference:
            captured.agreed, captured.checked = True, is_next and captured.agreed
            captured.was_ahead |= not captured.checked and (len(calls) > 1 or truth is None)
            if self._precision is None:
                return found
            before.restore()
            return list(_played(captured, calls, self._precision))
        results = [truth or found[0], *(list(call()) for call in calls[1:])]
        if not found or all(t is None or t.isfinite().all() for t in results[0]):  # infinite results decide nothing
            captured.misses += 1
            by_little = found and not _difference(found[0], results[0], self._names, LITTLE)
            if not by_little or captured.misses == MOST_MISSES:
                self._give_up(calls[0], reason or f"it would give other results than an ordinary run: {difference}")
        if self._precision is None:
            return results
        before.restore()
        return [self._ordinary(call) for call in calls]

    def _played(self, captured: _Captured, calls: list[_Application]) -> Iterable[Results]:
        """Return the results of a program, after the audits that are due."""
        if not captured.is_due():
            return _played(captured, calls, self._precision)
        before = Random(calls[0].inputs[0].device)
        results = list(_played(captured, calls, self._precision))
        before.restore()
        with self._watch.part("comparison"):
            in_float32 = results
            if self._precision is not None:
                in_float32 = list(_played(captured, calls))
                before.restore()
            for call, found in zip(calls, in_float32, strict=True):
                self._audit(captured, call, found)
        return results

    def _audit(self, captured: _Captured, call: _Application, found: Results) -> None:
        """Compare the results of a program with an ordinary run; raise StaleCaptureError where they differ.

        Where derivatives jump (ReLU, max pooling), rounding alone can make them differ by much, and that is no error.
        """
        before = Random(call.inputs[0].device)
        truth = captured.truth(call)
        if not (difference := _difference(found, truth, self._names)):
            return
        after = Random(call.inputs[0].device)
        program = self._recorded_again(captured, call, found, before)
        spread = [] if program is None else _spread(program, call, before)
        after.restore()
        if program is not None and not _difference(found, truth, self._names, spread=spread):
            return
        cause = (
            "Something that no guard sees has changed since it was recorded. Pass what changes as a part of the batch, "
            "or use capture=False"
            if program is None
            else "Rounding does not explain it: it is a fault of metakern. Please report it, and use capture=False"
        )
        self._programs.put(call.key, None)
        use = max(captured.uses, 1)
        reason = f"a captured program gave other results than an ordinary run at its use {use}: {difference}"
        self._reasons[reason] = None
        raise StaleCaptureError(f"MAML: {reason}. {cause}")

    def _recorded_again(
        self, captured: _Captured, call: _Application, found: Results, before: Random
    ) -> Program | None:
        """Record the call again; return the program if it gives nearly the bits of the old one, which is not stale."""
        try:
            used = _memory_in_use(call.device)
            before.restore()
            program, _ = record(call, call.inputs, rewritten)
            again = _Captured(program, self._executable(call, program, self._states[0].guards, used))
            before.restore()
            results = again([call.inputs], 1)
        except Exception:
            return None
        same = results is not None and not _difference(found, results[0], self._names, exponent=0.95)
        return program if same else None

    def _recorded(self, call: _Application, guards: Guards, is_all: bool = True) -> Results:
        """Record the call and return its results.

        Where recording fails, the call runs ordinarily; unless `is_all` is set, an empty list is returned instead.
        """
        before = _Before(call, guards)
        try:
            if len(self._branches.get(call.batch, {})) >= MOST_BRANCHES:
                raise RecordError("Python looks at values of tensors that differ from batch to batch")
            with self._watch.part("recording"):
                used = _memory_in_use(call.device)
                program, results = record(call, call.inputs, rewritten)
                changed = [*guards.changes(), *before.drawn()]
            if not changed:
                pinned = _pinned(program, guards, call.arrays)
                executable = self._executable(call, program, guards, used)
                self._keep(call, _Captured(program, executable, pinned, self._at))
        except Exception as error:  # an ordinary run may succeed; if not, its own error is raised
            before.restore()
            # Not for a part: what an ordinary run changes must change once.
            results = self._ordinary(call) if is_all else []
            self._keep(call, None)
            self._note(str(error)) if is_all else self._late.append(str(error))
            return results
        if changed:
            self._changed += 1  # the first runs may fill a cache, which later ones leave alone
            if self._changed > MOST_CHANGED:
                self._give_up(call, f"a run changes {', '.join(changed[:3])}")
            return results
        before.random.restore()
        give_back()
        return results

    def _lowered(self, program: Program, inputs: Sequence[Tensor]) -> Executable | None:
        try:
            with self._watch.part("lowering"):
                return lower(program, inputs)
        except LoweringError as error:
            self._run_by_python[str(error)] = None
            return None

    def _executable(self, call: _Application, program: Program, guards: Guards, used: int) -> Executable | Graph | None:
        """Return what runs a recorded call: an executable, or a CUDA graph on a GPU; None if Python must.

        `used`: the bytes in use on the GPU before. Raises RecordError where a graph has no room.
        """
        if call.device.type == "cpu":
            return self._lowered(program, call.inputs)
        needed = program.peak_bytes - used
        if needed > (free := SHARE * free_bytes(call.device)):
            raise RecordError(f"a CUDA graph of it may need {needed >> 20} MiB, more than {int(free) >> 20} MiB")
        constants = {id(t): t for t in (*(t for t, _ in guards.tensors.values()), *program.constants)}
        device = call.inputs[0].device
        if any(t.device.type == device.type and t.device != device for t in program.constants):
            raise RecordError("it reads tensors on several GPUs")
        on_gpu = [t for t in constants.values() if t.device == device and t.layout is torch.strided]
        with self._watch.part("lowering"), self._fresh():
            return Graph(lambda inputs: call.reading(inputs)(), call.inputs, on_gpu, program.numbers, self._graphs)

    def _give_up(self, call: _Application, reason: str) -> None:
        self._keep(call, None)
        self._note(reason)

    def _note(self, reason: str, warning: str = "") -> None:
        if reason not in self._reasons and not self._auto:
            effect = "capture has no effect, as the meta-gradient can't be captured"
            warnings.warn(f"MAML: {warning or f'{effect}: {reason}'}", stacklevel=2)
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
    """A function with its batches. Their tensors are the inputs of a program; `obstacle` says why there can be none.

    `branch` is the number of its program among those for such batches (`Captures._branches`), 0 if it is not known yet.
    """

    branch = 0

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
            # Objects of its own: a recorder could not tell apart two inputs that are one tensor in this call.
            self._take([self._leaves[i].detach().contiguous() for i in self._where])
            if len(found := {str(t.device) for t in self.inputs}) > 1:
                self.obstacle = f"the batch holds tensors on {', '.join(sorted(found))}"

    def _take(self, inputs: list[Tensor]) -> None:
        self.inputs = inputs
        self._layouts = tuple((t.shape, t.dtype, t.device) for t in inputs)

    @property
    def batch(self) -> tuple:
        """The key of the batches: their structure, shapes and values that are no tensors."""
        return (self.kind, self._layouts)

    @property
    def key(self) -> tuple:
        """The key of its program."""
        return (*self.batch, self.branch)

    def __call__(self) -> Sequence[Tensor | None]:
        leaves = [*self._leaves]
        for i, tensor in zip(self._where, self.inputs, strict=True):
            leaves[i] = tensor
        return self._function(*self._rebuild(leaves))

    @property
    def device(self) -> torch.device:
        return self.inputs[0].device

    def part(self, tasks: slice) -> _Application:
        return self.reading([t[tasks] for t in self.inputs])

    def reading(self, inputs: list[Tensor]) -> _Application:
        """Return the application of the function to other tensors."""
        other = copy(self)
        other._take(inputs)
        return other


def _value(leaf: Any) -> Any:
    """Return a small hashable stand-in for a leaf that is no tensor.

    Raises TypeError if it can't be compared by value.
    """
    if is_frozen(leaf):
        return frozen(leaf)
    if isinstance(leaf, np.ndarray) and not leaf.dtype.hasobject and leaf.nbytes <= MOST_BYTES:
        return leaf.dtype.str, leaf.shape, sha256(leaf.tobytes()).digest()
    if isinstance(leaf, set | frozenset):
        return type(leaf), frozenset(map(_value, leaf))
    raise TypeError(f"the batch holds a {type(leaf).__name__}, which can't be compared by value")


class _Captured:
    """A program as its executable, or as it was recorded if it has none. The memory of `pinned` tensors must not move.

    An executable replaces the recorded steps, whose Python objects take far more memory than its instructions.

    `uses` counts its uses. `recorded_at` is the number of the call of MAML that recorded it. `agreed`: it gave the
    results of an ordinary run. `checked`: it did so in a later call. `was_ahead`: before that, results for other data
    than the recorded ones were used. `misses` counts the comparisons in which it did not.
    """

    def __init__(
        self,
        program: Program,
        executable: Executable | Graph | None,
        pinned: Sequence[Tensor] = (),
        recorded_at: int = 0,
    ) -> None:
        self._program: Any = program if executable is None else None
        self.executable, self.uses, self.misses, self.recorded_at = executable, 0, 0, recorded_at
        self.agreed = self.checked = self.was_ahead = False
        self._pinned = [(t, _address(t)) for t in pinned]
        self._constants, self.decisions = program.constants, program.decisions
        steps = len(program.steps) * STEP_BYTES if executable is None else executable.size
        self.size = steps + sum(t.nbytes for t in program.made)

    def moved(self) -> bool:
        """Whether a tensor that it reads has another place or layout than when it was recorded."""
        fits = self.executable is None or self.executable.fits()
        return not fits or any(_address(t) != address for t, address in self._pinned)

    def is_due(self) -> bool:
        """Count a use, and return whether it is to be audited."""
        self.uses += 1
        doubled = self.uses >= FIRST_AUDIT and self.uses & (self.uses - 1) == 0
        return doubled if self.uses <= AUDIT_EVERY else self.uses % AUDIT_EVERY == 0

    def truth(self, call: _Application) -> Results:
        """Return the results of an ordinary run of the call, which gets the memory of the arenas meanwhile."""
        if self.executable is not None:
            self.executable.release()
        results = list(call())
        give_back()
        return results

    def __call__(
        self, microbatches: Sequence[Sequence[Tensor]], threads: int, precision: str | None = None
    ) -> list[Results] | None:
        """Return the results of each microbatch, or None where the executable refuses one of them."""
        for t in (*self._constants, *(t for inputs in microbatches for t in inputs)):
            check("MAML", "a tensor of a captured program", t)
        if self.executable is not None:
            return self.executable(microbatches, threads, precision == "bfloat16")
        program = in_precision(precision)(self._program)
        return [program(inputs) for inputs in microbatches]


def _memory_in_use(device: torch.device) -> int:
    """Return the bytes of tensors on a GPU; 0 for a CPU."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


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
    if len(kept) > KINDS:
        del kept[next(iter(kept))]


def _played(captured: _Captured, calls: Sequence[_Application], precision: str | None = None) -> Iterator[Results]:
    """Yield the results of the microbatches, running as many at a time as there are threads.

    Where the executable refuses one, as an index is out of range, ordinary runs give the results or raise the error.
    """
    threads = torch.get_num_threads()
    for i in range(0, len(calls), threads):
        group = calls[i : i + threads]
        yield from (
            captured([call.inputs for call in group], threads, precision)
            or map(in_precision(precision)(captured.truth), group)
        )


def _added(sums: Results, more: Results, in_place: bool) -> Results:
    """Return sums of gradients with those of another microbatch added."""
    pairs: Any = zip(sums, more, strict=True)
    return [None if a is None else a.add_(b) if in_place else a + b for a, b in pairs]


def _spread(program: Program, call: _Application, before: Random) -> list[float]:
    """Return by how much other rounding changes each result: the largest of NUDGES distances."""

    def distance(a: Tensor | None, b: Tensor | None) -> float:
        return 0.0 if a is None or b is None else (a - b).norm().item()

    before.restore()
    plain = program(call.inputs)
    spread = [0.0] * len(plain)
    for seed in range(NUDGES):
        before.restore()
        spread = list(map(max, spread, map(distance, program.nudged(call.inputs, seed), plain)))
    return spread


def _difference(
    found: Results, truth: Results, names: Sequence[str], exponent: float = 0.6, spread: Sequence[float] = ()
) -> str:
    """Describe the first result that differs by more than rounding, or return "".

    The tolerance is eps**exponent, relative to the norm of the result, or to a thousandth of the largest norm if that
    is more: a small gradient may be the rest of large terms that cancel. For results without a name, which are
    gradients of hyper-parameters, it is a hundredth, and eps**(exponent - 0.1): they are sums over all elements of a
    parameter. Elements that are infinite or NaN on both sides are not compared. `spread`: what other rounding changes
    in each result, of which SPREADS times as much is no difference.
    """
    finite = [None if t is None else t.where(t.isfinite(), 0) for t in truth]
    norms = [0.0 if t is None else t.norm().item() for t in finite]
    for i, (a, b, norm) in enumerate(zip(found, truth, norms, strict=True)):
        name = names[i] if i < len(names) else f"result {i}"
        if (a is None) != (b is None):
            return f"{name} is {'missing' if a is None else 'there'}"
        if a is not None and b is not None:
            error = torch.where(b.isfinite() | a.isfinite(), a - b, 0).norm().item()
            tolerance = torch.finfo(b.dtype).eps ** (exponent if i < len(names) else exponent - 0.1)
            allowed = tolerance * max(norm, (1e-3 if i < len(names) else 1e-2) * max(norms))
            if not error <= max(allowed, SPREADS * spread[i] if spread else 0.0):
                return f"{name} differs by {error:.1e}, of {norm:.1e}"
    return ""
