"""The recorder: runs a function of tensors once and makes a program of the kernel calls in this run.

    program, outputs = record(function, inputs)          outputs = program(other_inputs)

It records PyTorch's operations below autograd and the calls of our own kernels (`metakern.native.record.recordable`).

An integer or a boolean that Python reads, as in `if mask.all()`, is a decision: the program is right only for inputs
that give the same number. `program.decisions` has these numbers, and a program that computes them. A number that
follows from shapes alone decides nothing.

RecordError is raised where Python reads other values of a tensor (`.item()` of a float, `.tolist()`, `.numpy()`, the
indices of a mask), and where an operation writes to a tensor that outlives the run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.weak import WeakTensorKeyDictionary

from metakern.meta.capture.program import Decisions, Program, Register, Rewrite, Step, dce, leaves, registers
from metakern.meta.capture.rewrite import written
from metakern.meta.draws import ZEROS, dropout_of
from metakern.native.record import Recording

_aten = torch.ops.aten
_LOOKS_AT_DATA = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
INTEGERS = {torch.bool, torch.int64, torch.int32}
_RANDOM = torch.Tag.nondeterministic_seeded
LARGE_BYTES = 2**20  # of a tensor, on a GPU
LIFTS = {_aten.lift_fresh.default, _aten.lift.default}
_COPIES = {_aten._to_copy.default, _aten.copy_.default, _aten.copy.default}
_LEAVES_PYTORCH = {
    Tensor.tolist,
    Tensor.numpy,
    Tensor.__array__,
    Tensor.__dlpack__,
    Tensor.storage,
    Tensor.__reduce_ex__,
    Tensor.__repr__,
}
_MAKES_TENSORS = {torch.tensor, torch.as_tensor, torch.asarray, torch.scalar_tensor, Tensor.new_tensor, Tensor.new}
_INDEXES = {Tensor.__getitem__, Tensor.__setitem__}


class RecordError(RuntimeError):
    """The function did something that no program can repeat."""


def record(
    function: Callable[[], Sequence[Tensor | None]],
    inputs: Sequence[Tensor],
    rewrite: Rewrite = lambda steps, outputs: steps,
) -> tuple[Program, list[Tensor | None]]:
    """Run `function`, which reads `inputs`; return its rewritten program and its results.

    Raises RecordError, after undoing what the run wrote to tensors that it did not make.
    """
    watcher = _Watcher()
    recorder = Recorder(inputs, watcher)
    try:
        with watcher, recorder:
            results = list(function())
        for error in (recorder.error, watcher.error):  # the function itself may have caught it
            if error is not None:
                raise error
    except BaseException:
        recorder.undo()
        raise
    names = recorder.named(list(inputs))
    program = Program(names, recorder.steps, recorder.named(results), rewrite)
    program.peak_bytes = recorder.peak_bytes
    program.made, program.read = [*recorder.lifted, *watcher.made], [*recorder.read.values()]
    if recorder.decisions:
        read, program.numbers = map(list, zip(*recorder.decisions, strict=True))
        steps = _steps_to(read, recorder.steps)
        vary = _varying(names, steps)
        kept = [(number, value) for number, value in recorder.decisions if vary.issuperset(registers(number))]
        if kept:
            read, values = map(list, zip(*kept, strict=True))
            program.decisions = Decisions(Program(names, dce(steps, read), read, rewrite), values)
    return program, results


def _varying(inputs: Sequence[Any], steps: Sequence[Step]) -> set[Register]:
    """Return the registers that depend on inputs, or on other tensors that were there before."""
    found = set(registers(inputs))
    for step in steps:
        if not found.isdisjoint(step.reads) or leaves((step.args, step.kwargs), Tensor):
            found.update(step.makes)
    return found


def _steps_to(numbers: list[Any], steps: Sequence[Step]) -> list[Step]:
    """Return the steps that compute numbers which Python read.

    Raises RecordError unless they are operations of PyTorch on the inputs, without parameters and without writes.
    """
    found = dce([replace(step, has_side_effects=False) for step in steps if step.results is not None], numbers)
    values = {*registers(numbers), *(register for step in found for register in (*step.reads, *step.makes))}
    given = [t for step in found for t in leaves((step.args, step.kwargs), Tensor)]
    if (
        any(t.is_floating_point() for t in given)
        or not all(isinstance(step.function, OpOverload) and _RANDOM not in step.function.tags for step in found)
        or not values.isdisjoint(written(steps))
    ):
        raise RecordError("Python looks at the values of a tensor that is computed from parameters, or written to")
    return found


class _Watcher(TorchFunctionMode):
    """Sees what the dispatcher doesn't: tensors made from Python numbers, and tensor values that leave PyTorch."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[Tensor] = []
        self.error: RecordError | None = None
        self._call: tuple[Any, Any, Any] | None = None  # the function that runs now, with its arguments

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _LEAVES_PYTORCH or (func in _MAKES_TENSORS and _holds_tensors(*args, *(kwargs or {}).values())):
            self.error = RecordError(f"Python looks at the values of a tensor ({func.__name__})")
            raise self.error
        before, self._call = self._call, (func, args, kwargs or {})
        try:
            result = func(*args, **(kwargs or {}))
        finally:
            self._call = before
        if func in _MAKES_TENSORS and isinstance(result, Tensor) and all(result is not arg for arg in args):
            self.made.append(result)
        return result

    def origin_of_numbers(self) -> str:
        """Say where the numbers of a tensor that PyTorch makes now may come from, if that may be another tensor."""
        if self._call is None:
            return "torch.Tensor([…]), for which torch.tensor or torch.stack can be seen"
        func, args, kwargs = self._call
        if func in _INDEXES and isinstance(args[1], tuple):
            args = (*args[1], *args[2:])
        return "a list of tensors as an index" if _holds_tensors(*args, *kwargs.values()) else ""


class Recorder(Recording):
    """Records calls as steps, and gives a register to every tensor that a call makes.

    It holds the results of calls only weakly, so that a recorded run needs no more memory than an ordinary one.

    `peak_bytes`: the most memory of a GPU that tensors had after a call with a large result.
    """

    peak_bytes = 0

    def __init__(self, inputs: Sequence[Tensor], watcher: _Watcher) -> None:
        super().__init__()
        self._watcher = watcher
        self.steps: list[Step] = []
        self.lifted: list[Tensor] = []
        self._overwritten: list[tuple[Tensor, Tensor]] = []  # tensors, with copies of their former values
        self._own = {_storage(t) for t in inputs}  # memory that the run may write to: inputs, and what it made
        self.error: RecordError | None = None
        self.decisions: list[tuple[Any, int]] = []  # registers or constants that Python read, and their values
        self.read: dict[int, Tensor] = {}  # tensors that kernels read which make no step
        self._device = inputs[0].device
        self._is_on_gpu = self._device.type == "cuda"
        self._numbers, self._next = WeakTensorKeyDictionary(), count()
        self._made(tuple(inputs))

    @classmethod
    def _should_skip_dynamo(cls) -> bool:  # skipping it would import the compiler
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _aten._local_scalar_dense.default and args[0].dtype in INTEGERS:
            with _disable_current_modes():
                self.decisions.append((self.named(args[0]), args[0].item()))
            return self.decisions[-1][1]
        traits = _traits(func)
        if traits.looks_at_data and not _is_of_integers(func, args):
            self.error = RecordError(f"Python looks at the values of a tensor ({func})")
            raise self.error
        if func is ZEROS:
            func = _aten.zeros.default
        if func in LIFTS:
            self.lifted.append(args[0])
            is_copy = args[0].untyped_storage().resizable()  # unlike a tensor on the memory of an array
            if is_copy and (origin := self._watcher.origin_of_numbers()):
                self.error = RecordError(f"Python looks at the values of a tensor ({origin})")
            if args[0].device.type == "cuda":
                self.error = RecordError("it copies numbers to a GPU (torch.tensor): make that tensor once, before")
            self._own.add(_storage(args[0]))
        return self.run(func, args, kwargs or {}, traits.has_side_effects)

    def run(self, function: Callable[..., Any], args: tuple, kwargs: dict[str, Any], has_side_effects: bool) -> Any:
        """Call the function and record it as one step; calls within it are not recorded."""
        named_args, named_kwargs = self.named(args), self.named(kwargs)
        before = {_storage(t) for t in leaves((args, kwargs), Tensor)}
        writes = _traits(function).writes if isinstance(function, OpOverload) else ()
        with _disable_current_modes() if torch._C._len_torch_dispatch_stack() else nullcontext():
            if writes:
                self._keep(leaves(_arguments(writes, args, kwargs), Tensor))
            result = function(*args, **kwargs)
        results = leaves(result, Tensor)
        self._own |= {_storage(t) for t in results} - before
        if self._is_on_gpu:
            self._stays_on_gpu(function, args, kwargs, result)
            if any(t.untyped_storage().nbytes() >= LARGE_BYTES for t in results):
                self.peak_bytes = max(self.peak_bytes, torch.cuda.memory_allocated(self._device))
        named_result = self._made(result)
        if isinstance(function, OpOverload):
            written = _arguments(writes, named_args, named_kwargs)
        else:
            made = {_memory(t) for t in results}
            pairs = zip(args, named_args, strict=True)
            written = [name for arg, name in pairs if isinstance(arg, Tensor) and _memory(arg) in made - {0}]
        found = tuple(registers(written))
        self.steps.append(
            Step(function, named_args, named_kwargs, named_result, has_side_effects or bool(found), found)
        )
        return result

    def _keep(self, tensors: Iterable[Tensor]) -> None:
        """Copy what the operation is about to overwrite, if it is older than the run; the run then ends in an error."""
        for t in tensors:
            if _storage(t) not in self._own:
                self._overwritten.append((t, t.clone()))
                self.error = RecordError(f"it writes to a tensor {list(t.shape)} that it did not make")

    def reads(self, tensors: Iterable[Tensor]) -> None:
        self.read |= {id(t): t for t in tensors if _storage(t) not in self._own}

    def _stays_on_gpu(self, function: Callable[..., Any], args: tuple, kwargs: dict[str, Any], result: Any) -> None:
        """Note an error where a call copies between CPU and GPU, or draws random numbers: no CUDA graph repeats that.

        A graph has the numbers of CPU tensors that it saw. Those that the run made of Python's numbers are the same.
        """
        given, found = leaves((args, kwargs), Tensor), leaves(result, Tensor)
        on_cpu = [t for t in given if t.device.type == "cpu"]
        if isinstance(function, OpOverload) and _RANDOM in function.tags and dropout_of(function, args, kwargs) != 0:
            self.error = RecordError("it draws random numbers, on a GPU")
        elif any(_storage(t) not in self._own for t in on_cpu):
            self.error = RecordError("it reads a tensor on the CPU, beside those on a GPU")
        elif len({t.device.type for t in (*given, *found)}) > 1 and (
            function in _COPIES or any(t.dim() for t in on_cpu)
        ):
            self.error = RecordError("it copies a tensor between the CPU and a GPU")

    def undo(self) -> None:
        for t, was in reversed(self._overwritten):
            with torch.no_grad():
                t.copy_(was)

    def named(self, value: Any) -> Any:
        """Return the value with registers in place of known tensors; the others stay, as constants."""
        if isinstance(value, Tensor):
            return self._numbers.get(value, value)
        if isinstance(value, list | tuple):
            return [self.named(v) for v in value] if isinstance(value, list) else tuple(map(self.named, value))
        return {key: self.named(v) for key, v in value.items()} if isinstance(value, dict) else value

    def _made(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._numbers.setdefault(value, Register(next(self._next), value.shape, value.dtype))  # or known
        return tuple(map(self._made, value)) if isinstance(value, list | tuple) else None


def _holds_tensors(*args: Any) -> bool:
    """Whether an argument is a list of tensors: what is made of it has their numbers, which Python reads."""
    return any(isinstance(arg, list | tuple) and leaves(arg, Tensor) for arg in args)


class _Traits(NamedTuple):
    """What the declaration of an operation says. It is read once, as reading takes longer than a small operation."""

    looks_at_data: bool
    has_side_effects: bool
    writes: tuple[tuple[int, str], ...]  # place and name of each argument that it writes to


@cache
def _traits(function: OpOverload) -> _Traits:
    arguments = enumerate(function._schema.arguments)
    writes = tuple((i, a.name) for i, a in arguments if a.alias_info is not None and a.alias_info.is_write)
    looks_at_data = not _LOOKS_AT_DATA.isdisjoint(function.tags)
    return _Traits(looks_at_data, function._schema.is_mutable or _RANDOM in function.tags, writes)


def _arguments(which: Iterable[tuple[int, str]], args: tuple, kwargs: dict[str, Any]) -> list[Any]:
    return [args[i] if i < len(args) else kwargs.get(name) for i, name in which]


def _is_of_integers(function: OpOverload, args: tuple) -> bool:
    """Whether a call indexes by integers alone: the shape of the result then depends on shapes alone."""
    return function is _aten.index.Tensor and all(t is None or t.dtype is not torch.bool for t in args[1])


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
