"""Recording: one run of a function of tensors becomes the sequence of kernel calls that it made.

    program, outputs = record(function, inputs)          outputs = program(other_inputs)

Recorded are PyTorch's operations below autograd and the calls of our own kernels (`recordable`). A program makes them
again, in their order, on other inputs of the same shapes: without the function's Python, without autograd, and each
tensor is freed after its last use. Tensors that the function only reads (parameters, buffers) are read where they are,
at each call. Everything else that it looked at (numbers, shapes, flags) is as it was in the run.

An operation whose result Python looks at (`.item()`, `.tolist()`, `.numpy()`, a mask's nonzero elements) can't be
recorded: RecordError.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import wraps
from itertools import count
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes, _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakTensorKeyDictionary

F = TypeVar("F", bound=Callable[..., Any])
_LOOKS_AT_DATA = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
_RANDOM = torch.Tag.nondeterministic_seeded
_aten = torch.ops.aten
_LIFTS = {_aten.lift_fresh.default, _aten.lift.default}
_LEAVES_PYTORCH = {
    Tensor.tolist,
    Tensor.numpy,
    Tensor.__array__,
    Tensor.__dlpack__,
    Tensor.storage,
    Tensor.__reduce_ex__,
}
_MAKES_TENSORS = {torch.tensor, torch.as_tensor, torch.asarray, torch.scalar_tensor, Tensor.new_tensor, Tensor.new}
_SECOND_NAME = {_aten.detach.default, _aten.alias.default}
# PyTorch's bindings of methods are faster than its operators' objects.
_BINDINGS: dict[Any, Callable[..., Any]] = {
    _aten.view.default: Tensor.view,
    _aten.transpose.int: Tensor.transpose,
    _aten.permute.default: Tensor.permute,
    _aten.expand.default: Tensor.expand,
    _aten.unsqueeze.default: Tensor.unsqueeze,
    _aten.squeeze.dim: Tensor.squeeze,
    _aten.add.Tensor: Tensor.add,
    _aten.mul.Tensor: Tensor.mul,
    _aten.mul.Scalar: Tensor.mul,
}


class RecordError(RuntimeError):
    """What a function did that no program can do again."""


def recordable(acts: bool = False) -> Callable[[F], F]:
    """A function that PyTorch's dispatcher does not see, such as the call of a kernel: recorded as one.

    One that `acts` depends on more than its arguments, or changes more than what it shares with its results. One
    without results is a check: it is made, though once is enough.
    """

    def decorated(function: F) -> F:
        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            if torch._C._len_torch_dispatch_stack():
                for mode in _get_current_dispatch_mode_stack():
                    if isinstance(mode, _Recorder):
                        return mode.run(function, args, kwargs, acts)
            return function(*args, **kwargs)

        return call  # type: ignore[return-value]

    return decorated


def known(tensor: Tensor) -> Any:
    """The number in a tensor that is the same in every run, such as a count of steps: no obstacle to recording."""
    with torch._C.DisableTorchFunction():
        return tensor.tolist()


@dataclass(frozen=True)
class Register:
    """A tensor of a program."""

    number: int
    shape: torch.Size = field(compare=False)
    dtype: torch.dtype = field(compare=False)


@dataclass(frozen=True)
class Step:
    """A call with registers in the places of tensors. One that acts does more than make its results out of what it
    reads: it writes to that, or has to do with random numbers."""

    function: Callable[..., Any]
    args: tuple
    kwargs: dict[str, Any]
    results: Any
    acts: bool
    writes: tuple[Register, ...]

    @property
    def checks(self) -> bool:
        return self.results is None and not isinstance(self.function, OpOverload)


Rewrite = Callable[[list[Step], list[Any]], list[Step]]  # of steps, given the outputs


class Program:
    """What was recorded: tensors in, tensors (or None) out."""

    def __init__(self, inputs: list[Register], steps: list[Step], outputs: list[Any], rewrite: Rewrite) -> None:
        self.made: list[Tensor] = []  # of numbers, in the recorded run
        steps, self.outputs = _with_one_name(steps, outputs)
        self.inputs = inputs
        self.steps = _without_unused(rewrite(_without_unused(steps, self.outputs), self.outputs), self.outputs)
        self._run = _compiled(inputs, self.steps, self.outputs)

    @property
    def constants(self) -> list[Tensor]:
        """The tensors that the program reads at each call beside its inputs."""
        found = [t for step in self.steps for t in tree_leaves((step.args, step.kwargs)) if isinstance(t, Tensor)]
        return list({id(t): t for t in [*found, *(t for t in self.outputs if isinstance(t, Tensor))]}.values())

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor | None]:
        with torch.no_grad(), torch._C._AutoDispatchBelowAutograd():
            return self._run(*inputs)


def record(
    function: Callable[[], Sequence[Tensor | None]],
    inputs: Sequence[Tensor],
    rewrite: Rewrite = lambda steps, outputs: steps,
) -> tuple[Program, list[Tensor | None]]:
    """Runs the function, which reads `inputs`; its program, rewritten, and its results. Raises RecordError."""
    recorder, watcher = _Recorder(inputs), _Watcher()
    try:
        with watcher, recorder:
            results = list(function())
        for error in (recorder.error, watcher.error):  # which the function may have caught
            if error is not None:
                raise error
    except BaseException:
        recorder.undo()
        raise
    program = Program(recorder.named(list(inputs)), recorder.steps, recorder.named(results), rewrite)
    program.made = [*recorder.lifted, *watcher.made]
    return program, results


class _Watcher(TorchFunctionMode):
    """Sees what the dispatcher doesn't: tensors that are made of numbers, and numbers that are made of tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[Tensor] = []
        self.error: RecordError | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _LEAVES_PYTORCH:
            self.error = RecordError(f"Python looks at the values of a tensor ({func.__name__})")
            raise self.error
        result = func(*args, **(kwargs or {}))
        if func in _MAKES_TENSORS and isinstance(result, Tensor) and all(result is not arg for arg in args):
            self.made.append(result)
        return result


class _Recorder(TorchDispatchMode):
    """Numbers every tensor that a call makes. It holds none: the run takes the memory that it takes without."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.steps: list[Step] = []
        self.lifted: list[Tensor] = []
        self._overwritten: list[tuple[Tensor, Tensor]] = []  # with what they were
        self._own = {_storage(t) for t in inputs}  # memory that the run has made, or was given
        self.error: RecordError | None = None
        self._numbers, self._next = WeakTensorKeyDictionary(), count()
        self._made(tuple(inputs))

    @classmethod
    def _should_skip_dynamo(cls) -> bool:  # skipping it would import the compiler
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _LOOKS_AT_DATA.intersection(func.tags):
            self.error = RecordError(f"Python looks at the values of a tensor ({func})")
            raise self.error
        if func in _LIFTS:
            self.lifted.append(args[0])
            self._own.add(_storage(args[0]))
        return self.run(func, args, kwargs or {}, func._schema.is_mutable or _RANDOM in func.tags)

    def run(self, function: Callable[..., Any], args: tuple, kwargs: dict[str, Any], acts: bool) -> Any:
        """Calls the function and notes it; what it calls in turn is its own business."""
        named_args, named_kwargs = self.named(args), self.named(kwargs)
        before = {_storage(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        with _disable_current_modes():
            if isinstance(function, OpOverload) and function._schema.is_mutable:
                self._keep(function, args, kwargs)
            result = function(*args, **kwargs)
        self._own |= {_storage(t) for t in tree_leaves(result) if isinstance(t, Tensor)} - before
        named_result = self._made(result)
        if isinstance(function, OpOverload):
            marks = [a.alias_info is not None and a.alias_info.is_write for a in function._schema.arguments]
            written = [named_kwargs.get(a.name) for a, w in zip(function._schema.arguments, marks, strict=True) if w]
            written += [arg for arg, w in zip(named_args, marks, strict=False) if w]
        else:
            made = {_memory(t) for t in tree_leaves(result) if isinstance(t, Tensor)}
            pairs = zip(args, named_args, strict=True)
            written = [name for arg, name in pairs if isinstance(arg, Tensor) and _memory(arg) in made - {0}]
        writes = tuple(registers(written))
        self.steps.append(Step(function, named_args, named_kwargs, named_result, acts or bool(writes), writes))
        return result

    def _keep(self, function: OpOverload, args: tuple, kwargs: dict[str, Any]) -> None:
        """What the operation is about to overwrite, where that was there before the run: an error, at its end."""
        for i, argument in enumerate(function._schema.arguments):
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            if argument.alias_info is not None and argument.alias_info.is_write:
                for t in tree_leaves(value):
                    if isinstance(t, Tensor) and _storage(t) not in self._own:
                        self._overwritten.append((t, t.clone()))
                        self.error = RecordError(f"it writes to a tensor {list(t.shape)} that it did not make")

    def undo(self) -> None:
        for t, was in reversed(self._overwritten):
            with torch.no_grad():
                t.copy_(was)

    def named(self, value: Any) -> Any:
        """The value with registers for the tensors that are known; the others are read where they are."""
        if isinstance(value, Tensor):
            return self._numbers.get(value, value)
        if isinstance(value, list | tuple):
            return [self.named(v) for v in value] if isinstance(value, list) else tuple(map(self.named, value))
        return {key: self.named(v) for key, v in value.items()} if isinstance(value, dict) else value

    def _made(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self._numbers.setdefault(value, Register(next(self._next), value.shape, value.dtype))  # or known
        return tuple(map(self._made, value)) if isinstance(value, list | tuple) else None


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def registers(value: Any) -> Iterator[Register]:
    if isinstance(value, Register):
        yield value
    elif isinstance(value, list | tuple | dict):
        for part in value.values() if isinstance(value, dict) else value:
            yield from registers(part)


def renamed(value: Any, names: dict[Register, Any]) -> Any:
    if isinstance(value, Register):
        return names.get(value, value)
    if isinstance(value, dict):
        return {key: renamed(v, names) for key, v in value.items()}
    return type(value)(renamed(v, names) for v in value) if isinstance(value, list | tuple) else value


def _with_one_name(steps: list[Step], outputs: Any) -> tuple[list[Step], Any]:
    """Without the calls that give a tensor a second name; its shape is changed under none of them."""
    if any(torch.Tag.inplace_view in getattr(step.function, "tags", ()) for step in steps):
        return steps, outputs
    names: dict[Register, Any] = {}
    kept = []
    for step in steps:
        step = replace(step, args=renamed(step.args, names), kwargs=renamed(step.kwargs, names))
        if step.function in _SECOND_NAME and isinstance(step.args[0], Register):
            names[step.results] = step.args[0]
        else:
            kept.append(replace(step, results=renamed(step.results, names)))
    return kept, renamed(outputs, names)


def _without_unused(steps: list[Step], outputs: Any) -> list[Step]:
    used, kept = set(registers(outputs)), []
    for step in reversed(steps):
        if step.acts or step.checks or used.intersection(registers(step.results)):
            used.update(registers((step.args, step.kwargs)))
            kept.append(step)
    return kept[::-1]


def _compiled(inputs: Sequence[Register], steps: Sequence[Step], outputs: Any) -> Callable[..., list[Tensor | None]]:
    """The steps as one Python function, a line each, which forgets a tensor after the last line that reads it."""
    constants: dict[str, Any] = {}

    def constant(value: Any) -> str:
        name = f"c{len(constants)}"
        constants[name] = value
        return name

    def text(value: Any) -> str:
        if isinstance(value, Register):
            return f"r{value.number}"
        if isinstance(value, list):
            return f"[{', '.join(map(text, value))}]"
        if isinstance(value, tuple):
            return f"({''.join(f'{text(v)}, ' for v in value)})"
        return repr(value) if value is None or isinstance(value, bool | int | str) else constant(value)

    last: dict[Register, int] = {}
    for i, step in enumerate(steps):
        last.update(dict.fromkeys(registers((step.args, step.kwargs, step.results)), i))
    for register in registers(outputs):
        last[register] = len(steps)
    functions: dict[Any, str] = {}
    lines = [f"def run({', '.join(map(text, inputs))}):"]
    for i, step in enumerate(steps):
        if step.function not in functions:
            direct = _BINDINGS.get(step.function) or getattr(step.function, "_op", step.function)
            functions[step.function] = constant(direct)
        args = [*map(text, step.args), *(f"{key}={text(value)}" for key, value in step.kwargs.items())]
        results = list(registers(step.results))
        to = f"{text(step.results).replace('None', '_')} = " if results else ""
        mentioned = dict.fromkeys((*registers((step.args, step.kwargs)), *results))
        dead = "".join(f"{text(r)} = " for r in mentioned if last[r] == i)
        lines.append(f"    {to}{functions[step.function]}({', '.join(args)})")
        lines += [f"    {dead}None"] * bool(dead)
    lines.append(f"    return {text(outputs)}")
    exec("\n".join(lines), constants)
    return constants["run"]
