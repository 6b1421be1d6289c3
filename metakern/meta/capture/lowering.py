"""Lowering: turns a program into a C++ executable.

The program is traced once on meta tensors, which gives layouts and lifetimes. Each temporary gets an offset in one
arena; its memory is reused after its last use. `operations.py` has the rules, one for each operation of PyTorch and for
our own kernels. A program with an operation that has no rule has no executable; Python runs it.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Callable, Iterator, Sequence
from math import inf
from typing import Any

import torch
from torch import Tensor
from torch._decomp import decomposition_table
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from metakern import native
from metakern.meta.capture.executable import ALIGNMENT, Executable
from metakern.meta.capture.instructions import Instruction, is_whole, memory_of, without_ignored
from metakern.meta.capture.program import Program, Register, Step, renamed
from metakern.meta.capture.rewrite import is_view, written
from metakern.meta.unroll import random_states, set_random_states

MOST_DIMS = 6
TYPES = {torch.float32: 0, torch.float64: 1, torch.int64: 2, torch.bool: 3}  # as csrc/instructions.h numbers them
COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")
RANDOM_STATES: Any = (random_states.__wrapped__, set_random_states.__wrapped__)  # type: ignore[attr-defined]
RULES: dict[Any, Callable[..., Any]] = {}  # operation -> rule(lowering, *arguments as layouts) -> results as layouts
FACTORIES: set[Any] = set()  # operations whose result is new memory, which later steps may write to


_CLONE = torch.ops.aten.clone.default


class LoweringError(Exception):
    """A program can't be lowered; the message says why, as a clause."""


def lower(program: Program, inputs: Sequence[Tensor]) -> Executable:
    """Return the executable of a program for inputs laid out as `inputs`. Raises LoweringError if there is none."""
    if obstacle := native.obstacle():
        raise LoweringError(obstacle)
    return Lowering(inputs).executable(program)


class Lowering:
    """Traces a program on meta tensors, which have a layout but no memory, and collects the instructions."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        self.calls: list[Instruction] = []
        self.values: dict[Register, Tensor] = {}
        self.folded: dict[Register, Tensor] = {}  # values known at lowering (constant folding)
        self.written: set[Register] = set()  # what some step writes to
        self.bases: dict[int, int] = {}  # memory whose address is passed at each run -> its index among the addresses
        self.constants: dict[int, tuple[Tensor, Tensor]] = {}  # id -> the tensor and its layout
        self.filled: set[int] = set()  # memory with defined contents, unlike a copy that PyTorch makes on meta tensors
        self.inputs = [self.addressed(t) for t in inputs]

    def executable(self, program: Program) -> Executable:
        self.values.update(zip(program.inputs, self.inputs, strict=True))
        if any(torch.Tag.nondeterministic_seeded in getattr(step.function, "tags", ()) for step in program.steps):
            raise LoweringError("random numbers have no instruction")
        steps = [step for step in program.steps if step.function not in RANDOM_STATES]  # no step reads the states
        self.written = written(steps)
        for step in steps:
            self.step(step)
        results = [None if value is None else self.value(value) for value in program.outputs]
        outputs = [None if t is None else self.new(torch.empty(t.shape, dtype=t.dtype, device="meta")) for t in results]
        direct: dict[int, Tensor] = {}  # memory of a temporary that is a whole output -> the output
        for t, output in zip(results, outputs, strict=True):
            if t is not None and output is not None:
                if is_whole(t) and not {memory_of(t)} & {*self.bases, *direct}:
                    direct[memory_of(t)] = output
                    continue
                self.bases[memory_of(output)] = -1
                self.map("copy", output, t)
        given = [*self.inputs, *(meta for _, meta in self.constants.values()), *(t for t in outputs if t is not None)]
        self.bases = {memory_of(t): 1 + i for i, t in enumerate(given)}
        self.bases.update((memory, self.bases[memory_of(output)]) for memory, output in direct.items())
        self.calls = without_ignored(self.calls, self.bases)
        return Executable(self.placed(), [t for t, _ in self.constants.values()], outputs)

    def placed(self) -> Any:
        """Return the native executable, with a place for every tensor. Memory is reused after its last use."""
        C = native.C
        last: dict[int, int] = {}
        for i, call in enumerate(self.calls):
            last.update((memory_of(t), i) for t in call.tensors if t is not None)
        arena, offsets = Arena(), {}
        for i, call in enumerate(self.calls):
            own = {memory_of(t): t for t in call.tensors if t is not None and memory_of(t) not in self.bases}
            for memory, t in own.items():
                if memory not in offsets:
                    offsets[memory] = arena.take(t.untyped_storage().nbytes())
            for memory in own:
                if last[memory] == i:
                    arena.give_back(offsets[memory])
        executable = C.Executable(max(arena.size, ALIGNMENT), 1 + max(self.bases.values(), default=0))

        def place(t: Tensor | None) -> Any:
            if t is None:
                return C.Place(-1, 0)
            memory, within = memory_of(t), t.storage_offset() * t.element_size()
            return C.Place(self.bases.get(memory, 0), within + (0 if memory in self.bases else offsets[memory]))

        for call in self.calls:
            try:
                getattr(executable, call.method)(*call.before, list(map(place, call.tensors)), *call.after)
            except ValueError as error:
                raise LoweringError(str(error)) from error
        return executable

    def addressed(self, t: Tensor) -> Tensor:
        """Return the layout of a tensor whose address is passed at each run."""
        if t.layout != torch.strided or t.is_neg():
            kind = "a lazily negated view" if t.layout == torch.strided else f"a tensor of layout {t.layout}"
            raise LoweringError(f"{kind} can't be read by instructions")
        if t.device.type != "cpu" or t.dtype not in TYPES:
            raise LoweringError(f"a tensor of {t.dtype} on {t.device} can't be read by instructions")
        meta = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")
        self.bases[memory_of(meta)] = -1
        return self.new(meta)

    def new(self, t: Tensor) -> Tensor:
        """Return t, marked as memory of its own that is filled by an instruction."""
        self.filled.add(memory_of(t))
        return t

    def constant(self, t: Tensor) -> Tensor:
        if id(t) not in self.constants:
            self.constants[id(t)] = t, self.addressed(t)
        return self.constants[id(t)][1]

    def value(self, x: Any) -> Any:
        if isinstance(x, Register):
            return self.values[x] if x in self.values else self.constant(self.folded[x])
        if isinstance(x, Tensor):
            return self.constant(x)
        if isinstance(x, list | tuple):
            return type(x)(map(self.value, x))
        return {key: self.value(v) for key, v in x.items()} if isinstance(x, dict) else x

    def step(self, step: Step) -> None:
        known = all(r in self.folded for r in step.reads) and not any(_tensors(step.args))
        if (
            known
            and not step.has_side_effects
            and isinstance(step.function, OpOverload)
            and step.function not in FACTORIES
            and self.written.isdisjoint(step.makes)
        ):
            args, kwargs = renamed((step.args, step.kwargs), self.folded)
            self.folded.update(_pairs(step.results, step.function(*args, **kwargs)))
            return
        for register in step.writes:
            if register not in self.values or memory_of(self.values[register]) in self.bases:
                raise LoweringError("it writes to an input or a constant")
        self.values.update(
            _pairs(step.results, self.apply(step.function, self.value(step.args), self.value(step.kwargs)))
        )

    def apply(self, function: Any, args: Any, kwargs: Any) -> Any:
        """Lower one operation on layouts: by its rule, as a view, or by PyTorch's decomposition into others."""
        if (rule := RULES.get(function)) is not None:
            return rule(self, *args, **kwargs)
        if is_view(function):
            return self.made(function, *args, **kwargs)
        decomposition = decomposition_table.get(function)
        if decomposition is None or function._schema.is_mutable:
            raise LoweringError(f"{function} has no instruction")
        given = {memory_of(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        try:
            with _Decomposing(self):
                results = decomposition(*args, **kwargs)
        except Exception as error:  # an operation inside has no instruction, or is not for meta tensors
            raise LoweringError(f"{function} has no instruction") from error
        # The operation makes new memory, which later steps may write to, even if its decomposition does not.
        return tree_map_only(Tensor, lambda t: RULES[_CLONE](self, t) if memory_of(t) in given else t, results)

    def made(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the results of a function of PyTorch on layouts."""
        try:
            return function(*args, **kwargs)
        except RuntimeError as error:
            raise LoweringError(str(error)) from error

    def call(
        self,
        method: str,
        *tensors: Tensor | None,
        before: tuple = (),
        after: tuple = (),
        writes: Sequence[Tensor | None] | None = None,
        name: str = "",
    ) -> None:
        """Add an instruction; it writes to its first tensor unless `writes` says otherwise."""
        if any(t is not None and memory_of(t) not in self.filled for t in tensors):
            raise LoweringError(f"an operand of {method} is a copy that PyTorch made while tracing")
        writes = tensors[:1] if writes is None else writes
        self.calls.append(Instruction(method, tensors, before, after, tuple(t for t in writes if t is not None), name))

    def map(self, name: str, out: Tensor, *inputs: Tensor, s: float = 0.0, t: float = 0.0) -> Tensor:
        """Add an elementwise instruction on `out` and inputs that broadcast to its shape; return `out`."""
        types = {x.dtype for x in (out, *inputs)}
        if name == "copy" and len(types) > 1 and out.dtype == torch.bool:
            name, s = "ne", 0.0
        if name == "copy" and len(types) > 1:
            name, types = f"from_{str(inputs[0].dtype).removeprefix('torch.')}", {out.dtype}
        elif name == "where" or name.removesuffix("_of") in COMPARISONS:
            types = {x.dtype for x in inputs[name == "where" :]}
        if len(types) > 1 or not types <= set(TYPES):  # C++ refuses a type that it has no kernel for
            raise LoweringError(f"{name} of {' and '.join(sorted(map(str, types)))} has no instruction")
        tensors = (out, *(x.expand(out.shape) for x in inputs))
        dims = sorted(zip(out.shape, *(x.stride() for x in tensors), strict=True), key=lambda d: -d[1])
        self.walk(name, tensors, _merged(dims), TYPES[types.pop()], 0, s, t)
        return out

    def affine(self, out: Tensor, x: Tensor, s: float, t: float = -0.0) -> Tensor:
        """Add the instruction out = s x + t; return `out`. By default it is s x: adding -0 keeps a zero's sign."""
        if not (x.is_floating_point() or all(isinstance(number, int) for number in (s, t or 0))):
            raise LoweringError(f"arithmetic of {x.dtype} with floats has no instruction")
        return self.map("affine", out, x, s=s, t=t)

    def sum(self, out: Tensor, x: Tensor, dims: Sequence[int], scale: float, dtype: torch.dtype | None) -> None:
        """Add the instruction out = scale times the sum of x over `dims`, which have size one in `out`."""
        if not x.is_floating_point() or dtype not in (None, x.dtype):
            raise LoweringError(f"a sum of {x.dtype} in {dtype or x.dtype} has no instruction")
        dims_of: dict[bool, list[tuple[int, ...]]] = {True: [], False: []}
        for d, size in enumerate(x.shape):
            if size != 1:
                dims_of[d in dims].append((size, 0 if d in dims else out.stride(d), x.stride(d)))
        kept, reduced = sorted(dims_of[False], key=lambda d: -d[1]), sorted(dims_of[True], key=lambda d: -d[2])
        if not reduced:
            self.affine(out, x, scale, 0.0)  # a sum of -0 alone is 0
            return
        if kept and kept[-1][2] < reduced[-1][2]:
            order, number = [*_merged(kept[:-1]), *_merged(reduced), kept[-1]], -len(_merged(reduced))
        else:
            order, number = [*_merged(kept), *_merged(reduced)], len(_merged(reduced))
        self.walk("sum", (out, x), order, TYPES[x.dtype], number, scale, 0.0)

    def walk(self, name: str, tensors: tuple, dims: list, type_: int, reduced: int, s: float, t: float) -> None:
        dims = dims or [(1, *(0 for _ in tensors))]
        if len(dims) > MOST_DIMS:
            raise LoweringError(f"{name} over {len(dims)} dimensions has no instruction (at most {MOST_DIMS})")
        sizes, *strides = (list(column) for column in zip(*dims, strict=True))
        self.call("instruction", *tensors, before=(name, type_, reduced), after=(sizes, strides, (s, t)), name=name)

    def in_rows(self, t: Tensor) -> Tensor:
        """Return t, or a contiguous copy of it."""
        if t.is_contiguous():
            return t
        return self.map("copy", self.new(torch.empty_like(t, memory_format=torch.contiguous_format)), t)

    def copied(self, t: Tensor | None, arranged: Tensor | None) -> None:
        """Add the copy of t to `arranged`, where arranging a call's arguments has made new memory for it."""
        if t is not None and arranged is not None and memory_of(t) != memory_of(arranged):
            self.map("copy", self.new(arranged), t)


class _Decomposing(TorchDispatchMode):
    """Lowers the operations that a decomposition calls."""

    def __init__(self, lowering: Lowering) -> None:
        super().__init__()
        self.lowering = lowering

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def layout(t: Tensor) -> Tensor:
            return t if t.device.type == "meta" else self.lowering.constant(t)

        return self.lowering.apply(func, *tree_map_only(Tensor, layout, (args, kwargs or {})))


class Arena:
    """An allocator of offsets: it takes the smallest free gap that is large enough, else grows the arena."""

    def __init__(self) -> None:
        self.size = 0
        self._taken: dict[int, int] = {}  # offset: size
        self._gaps: list[tuple[int, float]] = [(0, inf)]  # (offset, size), in the order of offsets

    def take(self, size: int) -> int:
        size = max(-(-size // ALIGNMENT), 1) * ALIGNMENT
        i = min((i for i, (_, gap) in enumerate(self._gaps) if gap >= size), key=lambda i: self._gaps[i][1])
        at, gap = self._gaps[i]
        self._gaps[i : i + 1] = [(at + size, gap - size)] if gap > size else []
        self._taken[at] = size
        self.size = max(self.size, at + size)
        return at

    def give_back(self, offset: int) -> None:
        begin, size = offset, float(self._taken.pop(offset))
        i = j = bisect(self._gaps, (offset, 0))
        if j < len(self._gaps) and self._gaps[j][0] == begin + size:
            size += self._gaps[j][1]
            j += 1
        if i and sum(self._gaps[i - 1]) == begin:
            i -= 1
            begin, size = self._gaps[i][0], size + self._gaps[i][1]
        self._gaps[i:j] = [(begin, size)]


def _tensors(value: Any) -> Iterator[bool]:
    for part in value if isinstance(value, list | tuple) else (value,):
        yield from _tensors(part) if isinstance(part, list | tuple) else (isinstance(part, Tensor),)


def _pairs(names: Any, results: Any) -> Iterator[tuple[Register, Tensor]]:
    if isinstance(names, Register):
        yield names, results
    elif isinstance(names, tuple):
        for name, result in zip(names, results, strict=True):
            yield from _pairs(name, result)


def _merged(dims: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Merge dimensions that are contiguous in every tensor; each is (size, stride of each tensor)."""
    merged: list[tuple[int, ...]] = []
    for size, *strides in dims:
        if size == 1:
            continue
        if merged and all(a == b * size for a, b in zip(merged[-1][1:], strides, strict=True)):
            merged[-1] = (merged[-1][0] * size, *strides)
        else:
            merged.append((size, *strides))
    return merged
