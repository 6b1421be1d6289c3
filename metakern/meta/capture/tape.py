"""A captured program as a tape: its calls in C++, on memory that is laid out beforehand, without Python in between.

Writing a tape runs the program once on tensors without memory, which tells where each view lies and how long each
tensor lives; tensors that never live at once share memory. A tape runs for several pieces of a batch side by side, a
thread and a memory each: pieces so small that what they need stays in a core's cache. A program with an operation that
no pass of csrc/pass.h computes has no tape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from metakern import _native
from metakern._record import Program, Register, Step, registers, renamed
from metakern.meta.capture.operations import (
    COMPARISONS,
    FACTORIES,
    FLOAT_PASSES,
    RANDOM_STATES,
    TYPES,
    WRITERS,
    UnwritableError,
)

_ALIGNMENT, _MOST_DIMS = 64, 6


class Tape:
    """tape([inputs, …], threads): the program's outputs for each list of inputs, or None where a check fails."""

    def __init__(self, native: Any, constants: list[Tensor], outputs: list[Tensor | None]) -> None:
        self._native, self._constants, self._outputs = native, constants, outputs
        self._layouts = [_layout(t) for t in constants]

    @property
    def bytes(self) -> int:
        """Memory of a run beside inputs, outputs, and what it only reads."""
        return self._native.bytes

    def release(self) -> None:
        """Gives back the memory that all tapes run in, until one runs again."""
        self._native.release()

    def __call__(self, pieces: Sequence[Sequence[Tensor]], threads: int) -> list[list[Tensor | None]] | None:
        if [_layout(t) for t in self._constants] != self._layouts:
            return None
        results, bases = [], []
        for inputs in pieces:
            made = [None if t is None else torch.empty(t.shape, dtype=t.dtype) for t in self._outputs]
            told = (*inputs, *self._constants, *(t for t in made if t is not None))
            bases.append([0, *(t.data_ptr() or _ALIGNMENT for t in told)])  # 0: the tape's own memory
            results.append(made)
        return results if self._native.run(bases, threads) else None


def written(program: Program, inputs: Sequence[Tensor]) -> Tape | None:
    """The program's tape; None where it has none."""
    if _native.obstacle() or any(t.device.type != "cpu" for t in inputs):
        return None
    try:
        return Writer(inputs).tape(program)
    except UnwritableError:
        return None


def _layout(t: Tensor) -> tuple:
    return t.shape, t.stride(), t.dtype


@dataclass
class _Call:
    """A step of a tape: a method of the native one, and what it is given, once it is known where the tensors lie."""

    method: str
    tensors: tuple[Tensor | None, ...]
    arguments: Callable[[list[Any]], tuple]


class Writer:
    """Follows a program with tensors of device "meta", each of which has a layout and no memory."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        self.calls: list[_Call] = []
        self.values: dict[Register, Tensor] = {}
        self.folded: dict[Register, Tensor] = {}  # known now: numbers of the recorded run
        self.bases: dict[int, int] = {}  # of the memory that is told at each run
        self.constants: dict[int, tuple[Tensor, Tensor]] = {}
        self.filled: set[int] = set()  # memory that is meant: not a copy that PyTorch made on the way
        self.inputs = [self.outside(t) for t in inputs]

    def tape(self, program: Program) -> Tape:
        self.values.update(zip(program.inputs, self.inputs, strict=True))
        if any(torch.Tag.nondeterministic_seeded in getattr(step.function, "tags", ()) for step in program.steps):
            raise UnwritableError("random numbers")
        steps = [step for step in program.steps if step.function not in RANDOM_STATES]  # which nobody reads
        for step in steps:
            self.step(step)
        results = [None if value is None else self.value(value) for value in program.outputs]
        outputs = [None if t is None else self.new(torch.empty(t.shape, dtype=t.dtype, device="meta")) for t in results]
        for t, output in zip(results, outputs, strict=True):
            if t is not None and output is not None:
                self.bases[_memory(output)] = -1
                self.map("copy", output, t)
        told = [*self.inputs, *(meta for _, meta in self.constants.values()), *(t for t in outputs if t is not None)]
        self.bases = {_memory(t): 1 + i for i, t in enumerate(told)}
        return Tape(self.native(), [t for t, _ in self.constants.values()], outputs)

    def native(self) -> Any:
        """The tape, with a place for every tensor: memory is given out again after its last use."""
        C = _native._C
        last: dict[int, int] = {}
        for i, call in enumerate(self.calls):
            last.update((_memory(t), i) for t in call.tensors if t is not None)
        arena, offsets = _Arena(), {}
        for i, call in enumerate(self.calls):
            own = {_memory(t): t for t in call.tensors if t is not None and _memory(t) not in self.bases}
            for memory, t in own.items():
                if memory not in offsets:
                    offsets[memory] = arena.take(t.untyped_storage().nbytes())
            for memory in own:
                if last[memory] == i:
                    arena.give_back(offsets[memory])
        tape = C.Tape(max(arena.size, _ALIGNMENT), 1 + len(self.bases))

        def place(t: Tensor | None) -> Any:
            if t is None:
                return C.Place(-1, 0)
            memory, within = _memory(t), t.storage_offset() * t.element_size()
            return C.Place(self.bases.get(memory, 0), within + (0 if memory in self.bases else offsets[memory]))

        for call in self.calls:
            try:
                getattr(tape, call.method)(*call.arguments([place(t) for t in call.tensors]))
            except ValueError as error:
                raise UnwritableError(str(error)) from error
        return tape

    def outside(self, t: Tensor) -> Tensor:
        """The layout of a tensor whose memory is told at each run."""
        if t.device.type != "cpu" or t.layout != torch.strided or t.is_neg() or t.dtype not in TYPES:
            raise UnwritableError(f"a tensor of {t.dtype} on {t.device}")
        meta = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="meta")
        self.bases[_memory(meta)] = -1
        return self.new(meta)

    def new(self, t: Tensor) -> Tensor:
        """A tensor in memory of its own, which the tape fills."""
        self.filled.add(_memory(t))
        return t

    def constant(self, t: Tensor) -> Tensor:
        if id(t) not in self.constants:
            self.constants[id(t)] = t, self.outside(t)
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
        writer = WRITERS.get(step.function)
        known = all(r in self.folded for r in registers((step.args, step.kwargs))) and not any(_tensors(step.args))
        if known and not step.acts and isinstance(step.function, OpOverload) and step.function not in FACTORIES:
            args, kwargs = renamed((step.args, step.kwargs), self.folded)
            self.folded.update(_pairs(step.results, step.function(*args, **kwargs)))
            return
        for register in step.writes:
            if register not in self.values or _memory(self.values[register]) in self.bases:
                raise UnwritableError("writes to memory of others")
        args, kwargs = self.value(step.args), self.value(step.kwargs)
        if writer is not None:
            results = writer(self, *args, **kwargs)
        elif _is_view(step.function):
            results = self.made(step.function, *args, **kwargs)
        else:
            raise UnwritableError(f"{step.function} is no pass")
        self.values.update(_pairs(step.results, results))

    def made(self, function: Any, *args: Any, **kwargs: Any) -> Any:
        """What the function returns, as a layout."""
        try:
            return function(*args, **kwargs)
        except RuntimeError as error:
            raise UnwritableError(str(error)) from error

    def call(self, method: str, *tensors: Tensor | None, arguments: Callable[[list[Any]], tuple]) -> None:
        if any(t is not None and _memory(t) not in self.filled for t in tensors):
            raise UnwritableError(f"{method} of a hidden copy")
        self.calls.append(_Call(method, tensors, arguments))

    def map(self, name: str, out: Tensor, *inputs: Tensor, s: float = 0.0, t: float = 0.0) -> Tensor:
        """A pass over `out` and what broadcasts to it."""
        types = {x.dtype for x in (out, *inputs)}
        if name == "copy" and len(types) > 1:
            name, types = f"from_{str(inputs[0].dtype).removeprefix('torch.')}", {out.dtype}
        elif name in ("where", *COMPARISONS):
            types = {inputs[-1].dtype}
        if len(types) > 1 or not types <= set(TYPES) or (name in FLOAT_PASSES and not out.is_floating_point()):
            raise UnwritableError(f"{name} of {types}")
        tensors = (out, *(x.expand(out.shape) for x in inputs))
        dims = sorted(zip(out.shape, *(x.stride() for x in tensors), strict=True), key=lambda d: -d[1])
        self.walk(name, tensors, _merged(dims), TYPES[types.pop()], 0, s, t)
        return out

    def affine(self, out: Tensor, x: Tensor, s: float, t: float) -> Tensor:
        """out = s x + t."""
        if not (x.is_floating_point() or all(isinstance(number, int) for number in (s, t))):
            raise UnwritableError(f"{x.dtype} and numbers of another kind")
        return self.map("affine", out, x, s=s, t=t)

    def sum(self, out: Tensor, x: Tensor, dims: Sequence[int], scale: float, dtype: torch.dtype | None) -> None:
        """out = scale times the sum of x over the dimensions, which have size one in `out`."""
        if not x.is_floating_point() or dtype not in (None, x.dtype):
            raise UnwritableError(f"a sum of {x.dtype} in {dtype}")
        dims_of: dict[bool, list[tuple[int, ...]]] = {True: [], False: []}
        for d, size in enumerate(x.shape):
            if size != 1:
                dims_of[d in dims].append((size, 0 if d in dims else out.stride(d), x.stride(d)))
        kept, reduced = sorted(dims_of[False], key=lambda d: -d[1]), sorted(dims_of[True], key=lambda d: -d[2])
        if not reduced:
            self.map("affine", out, x, s=scale)
            return
        if kept and kept[-1][2] < reduced[-1][2]:
            order, number = [*_merged(kept[:-1]), *_merged(reduced), kept[-1]], -len(_merged(reduced))
        else:
            order, number = [*_merged(kept), *_merged(reduced)], len(_merged(reduced))
        self.walk("sum", (out, x), order, TYPES[x.dtype], number, scale, 0.0)

    def walk(self, name: str, tensors: tuple, dims: list, type_: int, reduced: int, s: float, t: float) -> None:
        dims = dims or [(1, *(0 for _ in tensors))]
        if len(dims) > _MOST_DIMS:
            raise UnwritableError(f"{len(dims)} dimensions")
        sizes, *strides = (list(column) for column in zip(*dims, strict=True))
        self.call("pass_", *tensors, arguments=lambda places: (name, type_, reduced, places, sizes, strides, (s, t)))

    def in_rows(self, t: Tensor) -> Tensor:
        """t in contiguous memory."""
        if t.is_contiguous():
            return t
        return self.map("copy", self.new(torch.empty_like(t, memory_format=torch.contiguous_format)), t)

    def copied(self, t: Tensor | None, arranged: Tensor | None) -> None:
        """Fills what the arranging of a call has made anew."""
        if t is not None and arranged is not None and _memory(t) != _memory(arranged):
            self.map("copy", self.new(arranged), t)


class _Arena:
    """Memory given out and back: the smallest gap that is large enough, else more of it."""

    def __init__(self) -> None:
        self.size = 0
        self._taken: dict[int, int] = {}  # offset: size

    def take(self, size: int) -> int:
        size = max(-(-size // _ALIGNMENT), 1) * _ALIGNMENT
        end, best = 0, None
        for offset in sorted(self._taken):
            if offset - end >= size and (best is None or offset - end < best[0]):
                best = offset - end, end
            end = offset + self._taken[offset]
        at = end if best is None else best[1]
        self._taken[at] = size
        self.size = max(self.size, at + size)
        return at

    def give_back(self, offset: int) -> None:
        del self._taken[offset]


def _memory(t: Tensor) -> int:
    return t.untyped_storage()._cdata


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
    """Sizes and strides with the dimensions that every tensor walks through as if they were one."""
    merged: list[tuple[int, ...]] = []
    for size, *strides in dims:
        if size == 1:
            continue
        if merged and all(a == b * size for a, b in zip(merged[-1][1:], strides, strict=True)):
            merged[-1] = (merged[-1][0] * size, *strides)
        else:
            merged.append((size, *strides))
    return merged


def _is_view(function: Any) -> bool:
    schema = getattr(function, "_schema", None)
    return schema is not None and not schema.is_mutable and any(r.alias_info is not None for r in schema.returns)
