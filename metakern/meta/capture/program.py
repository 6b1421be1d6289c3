"""Programs: the graph that a recorder makes (steps over registers), and a Python function that runs it.

A program repeats the recorded calls in their order, on other inputs of the same shapes, without the function's Python
and without autograd. It frees each tensor after its last use. Tensors that are no inputs, such as parameters and
buffers, are constants: the program holds the tensor and reads its memory at each call. Numbers, shapes and flags are
those of the recorded run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._pytree import tree_map_only

UNITS = 4  # units in the last place by which a nudge changes a number at most
_aten = torch.ops.aten
_NESTED = (list, tuple, dict)
_SECOND_NAME = {_aten.detach.default, _aten.alias.default}
# Calls of Tensor's methods are faster than calls of the operators they stand for.
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


@dataclass(frozen=True, slots=True)
class Register:
    """A tensor of a program: an input, or a result of a step."""

    number: int
    shape: torch.Size = field(compare=False)
    dtype: torch.dtype = field(compare=False)


@dataclass(frozen=True, slots=True)
class Step:
    """A recorded call, with registers in place of tensors.

    A step with side effects writes to its arguments or uses random numbers. It keeps its place in the program.

    Attributes:
        writes: The registers that it writes to.
        reads: The registers among its arguments.
        makes: The registers among its results.
        checks: Whether it has no result and is one of our functions: it raises where its arguments are wrong.
    """

    function: Callable[..., Any]
    args: tuple
    kwargs: dict[str, Any]
    results: Any
    has_side_effects: bool
    writes: tuple[Register, ...]
    reads: list[Register] = field(init=False, repr=False, compare=False)
    makes: list[Register] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "reads", registers((self.args, self.kwargs)))
        object.__setattr__(self, "makes", registers(self.results))

    @property
    def checks(self) -> bool:
        return self.results is None and not isinstance(self.function, OpOverload)

    def reading(self, names: dict[Register, Any]) -> Step:
        """Return the step with each argument that is a register replaced by its entry in `names`, if it has one."""
        if names.keys().isdisjoint(self.reads):
            return self
        return replace(self, args=renamed(self.args, names), kwargs=renamed(self.kwargs, names))


Rewrite = Callable[[list[Step], list[Any]], list[Step]]  # (steps, outputs) -> steps


class Program:
    """A recorded function: `program(inputs)` returns a list of tensors (or None)."""

    def __init__(self, inputs: list[Register], steps: list[Step], outputs: list[Any], rewrite: Rewrite) -> None:
        self.made: list[Tensor] = []  # tensors that the recorded run made from Python numbers
        self.read: list[Tensor] = []  # constants that no step names
        self.numbers: list[int] = []  # that Python read in the recorded run
        self.decisions: Decisions | None = None  # on those numbers that another run may give other values
        self.peak_bytes = 0  # that tensors had on a GPU in the recorded run, those from before included
        steps, self.outputs = _with_one_name(steps, outputs)
        self.inputs = inputs
        self.steps = dce(rewrite(dce(steps, self.outputs), self.outputs), self.outputs)

    @property
    def constants(self) -> list[Tensor]:
        """The tensors that the program reads at each call besides its inputs."""
        found = [t for step in self.steps for t in leaves((step.args, step.kwargs), Tensor)]
        found += [*self.read, *leaves(self.outputs, Tensor)]
        found += self.decisions.program.constants if self.decisions is not None else []
        return list({id(t): t for t in found}.values())

    @cached_property
    def _run(self) -> Callable[..., list[Tensor | None]]:
        return _compiled(self.inputs, self.steps, self.outputs)

    def __call__(self, inputs: Sequence[Tensor]) -> list[Tensor | None]:
        with torch.no_grad(), torch._C._AutoDispatchBelowAutograd():
            return self._run(*inputs)

    def nudged(self, inputs: Sequence[Tensor], seed: int) -> list[Tensor | None]:
        """Run with other rounding: change each number that a step computes or reads by some units in the last place."""
        nudge = _Nudge(seed)
        constants = {id(t): nudge(t) for t in self.constants}
        own = partial(tree_map_only, Tensor, lambda t: constants[id(t)])
        steps = [
            replace(step, function=nudge.after(step.function), args=own(step.args), kwargs=own(step.kwargs))
            for step in self.steps
        ]
        with torch.no_grad(), torch._C._AutoDispatchBelowAutograd():
            return _compiled(self.inputs, steps, self.outputs)(*map(nudge, inputs))


@dataclass(frozen=True)
class Decisions:
    """Numbers that Python read in a recorded run, and the program that computes them."""

    program: Program
    numbers: list[int]

    def hold(self, inputs: Sequence[Tensor]) -> bool:
        """Whether Python would read the same numbers with these inputs."""
        return [int(t) for t in self.program(inputs) if t is not None] == self.numbers


class _Nudge:
    """Changes numbers by up to UNITS units in the last place."""

    def __init__(self, seed: int) -> None:
        self._seed, self._generators = seed, dict[torch.device, torch.Generator]()
        self._functions: dict[Any, Callable[..., Any]] = {}

    def __call__(self, t: Tensor) -> Tensor:
        if not t.is_floating_point():
            return t
        if t.device not in self._generators:
            self._generators[t.device] = torch.Generator(t.device).manual_seed(self._seed)
        random = torch.rand(t.shape, generator=self._generators[t.device], dtype=torch.float32, device=t.device)
        return t * (1 + UNITS * torch.finfo(t.dtype).eps * (2 * random - 1).to(t.dtype))

    def after(self, function: Any) -> Callable[..., Any]:
        """Return the function followed by a nudge of its results, but of those that share memory with its arguments."""
        if function not in self._functions:
            self._functions[function] = self._followed(_direct(function))
        return self._functions[function]

    def _followed(self, direct: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            memory = {t.untyped_storage().data_ptr() for t in leaves((args, kwargs), Tensor)}

            def other(t: Tensor) -> Tensor:
                return t if t.untyped_storage().data_ptr() in memory else self(t)

            return tree_map_only(Tensor, other, direct(*args, **kwargs))

        return call


def _direct(function: Any) -> Callable[..., Any]:
    """Return what does the same as a step's function in less time."""
    return _BINDINGS.get(function) or getattr(function, "_op", function)


def registers(value: Any) -> list[Register]:
    """Return the registers in nested lists, tuples and dictionaries, in order."""
    return leaves(value, Register)


def leaves(value: Any, kind: type) -> list[Any]:
    """Return the values of a type in nested lists, tuples and dictionaries, in order."""
    if isinstance(value, kind):
        return [value]
    found: list[Any] = []
    if isinstance(value, _NESTED):
        for part in value.values() if isinstance(value, dict) else value:
            if isinstance(part, kind):
                found.append(part)
            elif isinstance(part, _NESTED):
                found += leaves(part, kind)
    return found


def renamed(value: Any, names: dict[Register, Any]) -> Any:
    """Return the value with each register replaced by its entry in `names`, if it has one."""
    if isinstance(value, Register):
        return names.get(value, value)
    if isinstance(value, dict):
        return {key: renamed(v, names) for key, v in value.items()}
    return type(value)(renamed(v, names) for v in value) if isinstance(value, list | tuple) else value


def _with_one_name(steps: list[Step], outputs: Any) -> tuple[list[Step], Any]:
    """Remove `detach` and `alias`, whose result is the same tensor, and use one register for both.

    Nothing is removed if a step changes the shape of a tensor in place, which the other tensor would not see.
    """
    if any(torch.Tag.inplace_view in getattr(step.function, "tags", ()) for step in steps):
        return steps, outputs
    names: dict[Register, Any] = {}
    kept = []
    for step in steps:
        step = step.reading(names)
        if step.function in _SECOND_NAME and isinstance(step.args[0], Register):
            names[step.results] = step.args[0]
        elif names.keys().isdisjoint(step.makes):
            kept.append(step)
        else:
            kept.append(replace(step, results=renamed(step.results, names)))
    return kept, renamed(outputs, names)


def dce(steps: list[Step], outputs: Any) -> list[Step]:
    """Dead-code elimination: return the steps that the outputs depend on, side effects and checks."""
    used, kept = set(registers(outputs)), []
    for step in reversed(steps):
        if step.has_side_effects or step.checks or not used.isdisjoint(step.makes):
            used.update(step.reads)
            kept.append(step)
    return kept[::-1]


def _compiled(inputs: Sequence[Register], steps: Sequence[Step], outputs: Any) -> Callable[..., list[Tensor | None]]:
    """Return the steps as one Python function, one line for each, which drops each tensor after its last use."""
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
        last.update(dict.fromkeys((*step.reads, *step.makes), i))
    for register in registers(outputs):
        last[register] = len(steps)
    functions: dict[Any, str] = {}
    lines = [f"def run({', '.join(map(text, inputs))}):"]
    for i, step in enumerate(steps):
        if step.function not in functions:
            functions[step.function] = constant(_direct(step.function))
        args = [*map(text, step.args), *(f"{key}={text(value)}" for key, value in step.kwargs.items())]
        results = step.makes
        to = f"{text(step.results).replace('None', '_')} = " if results else ""
        mentioned = dict.fromkeys((*step.reads, *results))
        dead = "".join(f"{text(r)} = " for r in mentioned if last[r] == i)
        lines.append(f"    {to}{functions[step.function]}({', '.join(args)})")
        lines += [f"    {dead}None"] * bool(dead)
    lines.append(f"    return {text(outputs)}")
    exec("\n".join(lines), constants)
    return constants["run"]
