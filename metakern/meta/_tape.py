"""A captured program as a tape: its calls in C++, on memory that is laid out beforehand, without Python in between.

Writing a tape runs the program once on tensors without memory, which tells where each view lies and how long each
tensor lives; tensors that never live at once share memory. A tape runs for several pieces of a batch side by side, a
thread and a memory each: pieces so small that what they need stays in a core's cache. A program with an operation that
no pass of csrc/pass.h computes has no tape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from metakern import _native
from metakern._record import Program, Register, Step, registers, renamed
from metakern.meta._unroll import _random_states, _set_random_states
from metakern.ops import _checks

_aten: Any = torch.ops.aten
_TYPES = {torch.float32: 0, torch.float64: 1, torch.int64: 2, torch.bool: 3}
_ALIGNMENT, _MOST_DIMS = 64, 6


class UnwritableError(Exception):
    """What a tape can't do, or not as the program does it."""


class Tape:
    """tape([inputs, …], threads): the program's outputs for each list of inputs, or None where a check fails."""

    def __init__(self, native: Any, constants: list[Tensor], outputs: list[Tensor | None]) -> None:
        self._native, self._constants, self._outputs = native, constants, outputs
        self._layouts = [_layout(t) for t in constants]

    @property
    def bytes(self) -> int:
        """Memory of a run beside inputs, outputs, and what it only reads."""
        return self._native.bytes

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
        return _Writer(inputs).tape(program)
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


class _Writer:
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
        steps = [step for step in program.steps if step.function not in _RANDOM_STATES]  # which nobody reads
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
            getattr(tape, call.method)(*call.arguments([place(t) for t in call.tensors]))
        return tape

    def outside(self, t: Tensor) -> Tensor:
        """The layout of a tensor whose memory is told at each run."""
        if t.device.type != "cpu" or t.layout != torch.strided or t.is_neg() or t.dtype not in _TYPES:
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
        writer = _WRITERS.get(step.function)
        known = all(r in self.folded for r in registers((step.args, step.kwargs))) and not any(_tensors(step.args))
        if known and not step.acts and isinstance(step.function, OpOverload) and step.function not in _FACTORIES:
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
        kwargs = {**kwargs, "device": "meta"} if kwargs.get("device") is not None else kwargs
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
        floats = {x.dtype for x in (out, *inputs)} if name not in ("where", *_COMPARISONS) else {inputs[-1].dtype}
        if len(floats) > 1 or not floats <= set(_TYPES) or (name in _FLOAT_PASSES and not out.is_floating_point()):
            raise UnwritableError(f"{name} of {floats}")
        tensors = (out, *(x.expand(out.shape) for x in inputs))
        dims = sorted(zip(out.shape, *(x.stride() for x in tensors), strict=True), key=lambda d: -d[1])
        self.walk(name, tensors, _merged(dims), _TYPES[floats.pop()], 0, s, t)
        return out

    def sum(self, out: Tensor, x: Tensor, dims: Sequence[int], scale: float = 1.0) -> Tensor:
        """out = scale times the sum of x over the dimensions, which `out` doesn't have or has as ones."""
        if not x.is_floating_point() or x.dtype != out.dtype:
            raise UnwritableError(f"sum of {x.dtype}")
        summed = {d % x.dim() for d in dims} if x.dim() else set()
        kept_strides = iter(out.stride() if out.dim() < x.dim() else ())
        strides = [
            0 if d in summed else out.stride(d) if out.dim() == x.dim() else next(kept_strides) for d in range(x.dim())
        ]
        dims_of: dict[bool, list[tuple[int, ...]]] = {True: [], False: []}
        for d, size in enumerate(x.shape):
            if size != 1:
                dims_of[d in summed].append((size, strides[d], x.stride(d)))
        kept, reduced = sorted(dims_of[False], key=lambda d: -d[1]), sorted(dims_of[True], key=lambda d: -d[2])
        if not reduced:
            self.map("affine", out.view(x.shape), x, s=scale)
            return out
        if kept and kept[-1][2] < reduced[-1][2]:
            order, number = [*_merged(kept[:-1]), *_merged(reduced), kept[-1]], -len(_merged(reduced))
        else:
            order, number = [*_merged(kept), *_merged(reduced)], len(_merged(reduced))
        self.walk("sum", (out, x), order, _TYPES[x.dtype], number, scale, 0.0)
        return out

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


_COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")
_FLOAT_PASSES = {"div", "reciprocal", "power", "square", "sqrt", "rsqrt", "exp", "relu", "threshold_backward", "tanh"}
_FLOAT_PASSES |= {"tanh_backward", "sigmoid", "sigmoid_backward", "gelu", "gelu_backward", "silu", "silu_backward"}
_RANDOM_STATES: Any = (_random_states.__wrapped__, _set_random_states.__wrapped__)  # type: ignore[attr-defined]
_WRITERS: dict[Any, Callable[..., Any]] = {}
_FACTORIES: set[Any] = {_aten.zeros.default}  # of memory that may be written to


def _writes(*functions: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def decorated(writer: Callable[..., Any]) -> Callable[..., Any]:
        _WRITERS.update(dict.fromkeys(functions, writer))
        return writer

    return decorated


def _number(x: Any) -> bool:
    return isinstance(x, int | float)


def _like(w: _Writer, op: Any, *args: Any, **kwargs: Any) -> Tensor:
    out = w.made(op, *args, **kwargs)
    if out.dtype not in _TYPES:
        raise UnwritableError(f"a result of {out.dtype}")
    return w.new(out)


for _name in ("relu", "exp", "sqrt", "rsqrt", "tanh", "sigmoid", "silu"):
    _op, _in_place = getattr(_aten, _name).default, getattr(_aten, f"{_name}_").default
    _WRITERS[_op] = lambda w, x, name=_name, op=_op: w.map(name, _like(w, op, x), x)
    _WRITERS[_in_place] = lambda w, x, name=_name: w.map(name, x, x)
for _name in ("tanh_backward", "sigmoid_backward", "silu_backward"):
    _op = getattr(_aten, _name).default
    _WRITERS[_op] = lambda w, ct, x, name=_name, op=_op: w.map(name, _like(w, op, ct, x), ct, x)
for _name in _COMPARISONS:
    _op = getattr(_aten, _name).Scalar
    _WRITERS[_op] = lambda w, x, s, name=_name, op=_op: w.map(name, _like(w, op, x, s), x, s=s)


@_writes(_aten.gelu.default)
def _gelu(w: _Writer, x: Tensor, approximate: str = "none") -> Tensor:
    if approximate != "none":
        raise UnwritableError("gelu's tanh form")
    return w.map("gelu", _like(w, _aten.gelu.default, x), x)


@_writes(_aten.gelu_backward.default)
def _gelu_backward(w: _Writer, ct: Tensor, x: Tensor, approximate: str = "none") -> Tensor:
    if approximate != "none":
        raise UnwritableError("gelu's tanh form")
    return w.map("gelu_backward", _like(w, _aten.gelu_backward.default, ct, x), ct, x)


@_writes(_aten.threshold_backward.default)
def _threshold_backward(w: _Writer, ct: Tensor, x: Tensor, threshold: float) -> Tensor:
    return w.map("threshold_backward", _like(w, _aten.threshold_backward.default, ct, x, threshold), ct, x, s=threshold)


def _add(w: _Writer, out: Tensor, x: Any, y: Any, alpha: float) -> Tensor:
    return w.map("affine", out, x, s=1.0, t=alpha * y) if _number(y) else w.map("add", out, x, y, s=alpha)


def _mul(w: _Writer, out: Tensor, x: Any, y: Any) -> Tensor:
    return w.map("affine", out, x, s=y) if _number(y) else w.map("mul", out, x, y)


def _div(w: _Writer, out: Tensor, x: Any, y: Any) -> Tensor:
    return w.map("affine", out, x, s=1 / y) if _number(y) and y else w.map("div", out, x, y)


_ADD, _SUB, _MUL, _DIV = _aten.add.Tensor, _aten.sub.Tensor, _aten.mul.Tensor, _aten.div.Tensor


@_writes(_ADD, _aten.add.Scalar)
def _add_tensor(w: _Writer, x: Any, y: Any, alpha: float = 1) -> Tensor:
    return _add(w, _like(w, _ADD, x, y), x, y, alpha)


@_writes(_SUB, _aten.sub.Scalar)
def _sub_tensor(w: _Writer, x: Any, y: Any, alpha: float = 1) -> Tensor:
    return _add(w, _like(w, _SUB, x, y), x, y, -alpha)


@_writes(_MUL, _aten.mul.Scalar)
def _mul_tensor(w: _Writer, x: Any, y: Any) -> Tensor:
    return _mul(w, _like(w, _MUL, x, y), x, y)


@_writes(_DIV, _aten.div.Scalar)
def _div_tensor(w: _Writer, x: Any, y: Any) -> Tensor:
    return _div(w, _like(w, _DIV, x, y), x, y)


@_writes(_aten.addcmul.default)
def _addcmul(w: _Writer, x: Tensor, y: Tensor, z: Tensor, value: float = 1) -> Tensor:
    return _add(w, _like(w, _aten.addcmul.default, x, y, z), x, _mul_tensor(w, y, z), value)


@_writes(_aten.add_.Tensor, _aten.add_.Scalar)
def _add_in_place(w: _Writer, x: Tensor, y: Any, alpha: float = 1) -> Tensor:
    return _add(w, x, x, y, alpha)


@_writes(_aten.mul_.Tensor, _aten.mul_.Scalar)
def _mul_in_place(w: _Writer, x: Tensor, y: Any) -> Tensor:
    return _mul(w, x, x, y)


@_writes(_aten.sub_.Tensor, _aten.sub_.Scalar)
def _sub_in_place(w: _Writer, x: Tensor, y: Any, alpha: float = 1) -> Tensor:
    return _add(w, x, x, y, -alpha)


@_writes(_aten.div_.Tensor, _aten.div_.Scalar)
def _div_in_place(w: _Writer, x: Tensor, y: Any) -> Tensor:
    return _div(w, x, x, y)


@_writes(_aten.neg.default)
def _neg(w: _Writer, x: Tensor) -> Tensor:
    return w.map("affine", _like(w, _aten.neg.default, x), x, s=-1.0)


@_writes(_aten.rsub.Scalar)
def _rsub(w: _Writer, x: Tensor, y: float, alpha: float = 1) -> Tensor:
    return w.map("affine", _like(w, _aten.rsub.Scalar, x, y), x, s=-alpha, t=y)


@_writes(_aten.reciprocal.default)
def _reciprocal(w: _Writer, x: Tensor) -> Tensor:
    return w.map("reciprocal", _like(w, _aten.reciprocal.default, x), x, s=1.0)


@_writes(_aten.pow.Tensor_Scalar)
def _pow(w: _Writer, x: Tensor, exponent: float) -> Tensor:
    out = _like(w, _aten.pow.Tensor_Scalar, x, exponent)
    if exponent == 1:
        return w.map("copy", out, x)
    return w.map("square", out, x) if exponent == 2 else w.map("power", out, x, s=exponent)


@_writes(_aten.where.self)
def _where(w: _Writer, mask: Tensor, x: Tensor, y: Tensor) -> Tensor:
    if mask.dtype != torch.bool or x.dtype != y.dtype:
        raise UnwritableError("where of several dtypes")
    return w.map("where", _like(w, _aten.where.self, mask, x, y), mask, x, y)


@_writes(_aten.bitwise_and.Tensor, _aten.logical_and.default)
def _and(w: _Writer, x: Tensor, y: Tensor) -> Tensor:
    if x.dtype != torch.bool:
        raise UnwritableError("bits")
    return w.map("logical_and", _like(w, _aten.logical_and.default, x, y), x, y)


@_writes(_aten.bitwise_or.Tensor, _aten.logical_or.default)
def _or(w: _Writer, x: Tensor, y: Tensor) -> Tensor:
    if x.dtype != torch.bool:
        raise UnwritableError("bits")
    return w.map("logical_or", _like(w, _aten.logical_or.default, x, y), x, y)


@_writes(_aten.bitwise_not.default, _aten.logical_not.default)
def _not(w: _Writer, x: Tensor) -> Tensor:
    if x.dtype != torch.bool:
        raise UnwritableError("bits")
    return w.map("logical_not", _like(w, _aten.logical_not.default, x), x)


@_writes(_aten.all.default, _aten.all.dim, _aten.all.dims)
def _all(w: _Writer, x: Tensor, dim: Any = None, keepdim: bool = False) -> Tensor:
    """A mask that is taken with each element in turn: along `dim` it has no stride."""
    if x.dtype != torch.bool:
        raise UnwritableError("all of numbers")
    dims = list(range(x.dim())) if dim is None else [dim] if isinstance(dim, int) else list(dim)
    out = w.map("fill", _like(w, _aten.all.dims, x, dims, True), s=1.0)
    w.map("logical_and", out.expand(x.shape), out.expand(x.shape), x)
    return out if keepdim or not x.dim() else out.squeeze(dims)


@_writes(_aten.sum.default, _aten.sum.dim_IntList)
def _sum(w: _Writer, x: Tensor, dim: Sequence[int] | None = None, keepdim: bool = False, dtype: Any = None) -> Tensor:
    dims = list(dim or range(x.dim()))
    return w.sum(_like(w, _aten.sum.dim_IntList, x, dims, keepdim, dtype=dtype), x, dims)


@_writes(_aten.mean.default, _aten.mean.dim)
def _mean(w: _Writer, x: Tensor, dim: Sequence[int] | None = None, keepdim: bool = False, dtype: Any = None) -> Tensor:
    dims = list(dim or range(x.dim()))
    out = _like(w, _aten.mean.dim, x, dims, keepdim, dtype=dtype)
    number = prod(x.shape[d] for d in dims)
    return w.sum(out, x, dims, 1 / number if number else torch.inf)


def _filled(value: float | None, *ops: Any) -> None:
    """Factories: their result is a number everywhere, their last argument where `value` is None."""
    _FACTORIES.update(ops)
    for op in ops:

        def fill(w: _Writer, *args: Any, op: Any = op, **kwargs: Any) -> Tensor:
            return w.map("fill", _like(w, op, *args, **kwargs), s=args[-1] if value is None else value)

        _WRITERS[op] = fill


_filled(0.0, _aten.zeros_like.default, _aten.new_zeros.default, _aten._new_zeros_with_same_feature_meta.default)
_filled(1.0, _aten.ones_like.default, _aten.new_ones.default)
_filled(None, _aten.full_like.default, _aten.new_full.default)


@_writes(_aten.zeros.default)
def _zeros(w: _Writer, size: Sequence[int], **kwargs: Any) -> Tensor:
    return w.map("fill", _like(w, _aten.zeros.default, size, **{**kwargs, "device": "meta"}))


@_writes(_aten.zero_.default)
def _zero(w: _Writer, x: Tensor) -> Tensor:
    return w.map("fill", x)


@_writes(_aten.clone.default, _aten._to_copy.default)
def _clone(w: _Writer, x: Tensor, **kwargs: Any) -> Tensor:
    function = _aten.clone.default if set(kwargs) <= {"memory_format"} else _aten._to_copy.default
    return w.map("copy", _like(w, function, x, **kwargs), x)


@_writes(_aten.unsafe_split.Tensor)
def _unsafe_split(w: _Writer, x: Tensor, size: int, dim: int = 0) -> Any:
    return w.made(_aten.split.Tensor, x, size, dim)


@_writes(_aten._unsafe_view.default)
def _unsafe_view(w: _Writer, x: Tensor, size: Sequence[int]) -> Tensor:
    return w.made(_aten.view.default, x, size)


@_writes(_aten.copy_.default)
def _copy(w: _Writer, x: Tensor, y: Tensor, non_blocking: bool = False) -> Tensor:
    return w.map("copy", x, y)


@_writes(_aten.cat.default)
def _cat(w: _Writer, tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    out, start = _like(w, _aten.cat.default, tensors, dim), 0
    for t in tensors:
        if t.dim() == out.dim():  # PyTorch skips empty vectors
            w.map("copy", out.narrow(dim, start, t.shape[dim]), t)
            start += t.shape[dim]
    return out


@_writes(_aten.stack.default)
def _stack(w: _Writer, tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    out = _like(w, _aten.stack.default, tensors, dim)
    for i, t in enumerate(tensors):
        w.map("copy", out.select(dim, i), t)
    return out


@_writes(_aten.slice_backward.default)
def _slice_backward(w: _Writer, ct: Tensor, sizes: Sequence[int], dim: int, start: int, end: int, step: int) -> Tensor:
    out = w.map("fill", _like(w, _aten.slice_backward.default, ct, sizes, dim, start, end, step))
    w.map("copy", _aten.slice.Tensor(out, dim, start, end, step), ct)
    return out


@_writes(_aten.select_backward.default)
def _select_backward(w: _Writer, ct: Tensor, sizes: Sequence[int], dim: int, index: int) -> Tensor:
    out = w.map("fill", _like(w, _aten.select_backward.default, ct, sizes, dim, index))
    w.map("copy", out.select(dim, index), ct)
    return out


@_writes(_aten.embedding.default)
def _embedding(w: _Writer, table: Tensor, index: Tensor, *_: Any) -> Tensor:
    return _rows(w, _like(w, _aten.embedding.default, table, index), table, index)


@_writes(_aten.index_select.default)
def _index_select(w: _Writer, table: Tensor, dim: int, index: Tensor) -> Tensor:
    if dim % max(table.dim(), 1):
        raise UnwritableError("index_select within rows")
    return _rows(w, _like(w, _aten.index_select.default, table, dim, index), table, index)


def _rows(w: _Writer, out: Tensor, table: Tensor, index: Tensor) -> Tensor:
    if index.dtype != torch.int64 or not out.is_contiguous():
        raise UnwritableError("rows by other than int64")
    row = prod(table.shape[1:]) * table.element_size()
    tensors = out, w.in_rows(table), w.in_rows(index)
    w.call("take_rows", *tensors, arguments=lambda places: (places, index.numel(), table.shape[0], row))
    return out


@_writes(_aten.index_add_.default)
def _index_add(w: _Writer, to: Tensor, dim: int, index: Tensor, source: Tensor, alpha: float = 1) -> Tensor:
    floats = to.is_floating_point() and to.dtype == source.dtype
    if dim % max(to.dim(), 1) or index.dtype != torch.int64 or not to.is_contiguous() or not floats:
        raise UnwritableError("index_add_ within rows")
    is_double, sizes = to.dtype == torch.float64, (index.numel(), to.shape[0], prod(to.shape[1:]))
    tensors = to, w.in_rows(source), w.in_rows(index)
    w.call("add_rows", *tensors, arguments=lambda places: (is_double, places, *sizes, alpha))
    return to


@_writes(_aten.embedding_dense_backward.default)
def _embedding_backward(w: _Writer, ct: Tensor, index: Tensor, rows: int, padding: int, by_frequency: bool) -> Tensor:
    if by_frequency or padding >= 0:
        raise UnwritableError("embedding's padding and frequencies")
    out = w.map("fill", w.new(ct.new_empty(rows, ct.shape[-1])))
    return _index_add(w, out, 0, w.in_rows(index).view(-1), w.in_rows(ct).view(-1, ct.shape[-1]))


@_writes(_native.product.__wrapped__)  # type: ignore[attr-defined]
def _product(
    w: _Writer, a: Tensor, b: Tensor, add: Tensor | None = None, reuse: bool = False, scale: float = 1.0
) -> Tensor:
    arranged = _native.arrange_product(a, b, add, reuse)
    for t, made in zip((a, b, add), arranged.tensors, strict=False):
        w.copied(t, made)
    is_double, sizes, strides = a.dtype == torch.float64, arranged.sizes, arranged.strides
    w.new(arranged.tensors[3])
    w.call("product", *arranged.tensors, arguments=lambda places: (is_double, places, sizes, strides, scale))
    return arranged.tensors[3]


@_writes(_aten.bmm.default)
def _bmm(w: _Writer, a: Tensor, b: Tensor) -> Tensor:
    if a.dtype not in _native.DTYPES:
        raise UnwritableError(f"products of {a.dtype}")
    return _product(w, a, b)


@_writes(_aten.mm.default)
def _mm(w: _Writer, a: Tensor, b: Tensor) -> Tensor:
    return _bmm(w, a.unsqueeze(0), b.unsqueeze(0)).squeeze(0)


@_writes(_aten.baddbmm.default)
def _baddbmm(w: _Writer, add: Tensor, a: Tensor, b: Tensor, beta: float = 1, alpha: float = 1) -> Tensor:
    if a.dtype not in _native.DTYPES or beta != 1:
        raise UnwritableError(f"products of {a.dtype}, {beta} times a summand")
    return _product(w, a, b, add.expand(*a.shape[:2], b.shape[2]), scale=alpha)


@_writes(_aten.addmm.default)
def _addmm(w: _Writer, add: Tensor, a: Tensor, b: Tensor, beta: float = 1, alpha: float = 1) -> Tensor:
    full = add.expand(a.shape[0], b.shape[1])
    return _baddbmm(w, full.unsqueeze(0), a.unsqueeze(0), b.unsqueeze(0), beta, alpha).squeeze(0)


@_writes(_native.call.__wrapped__)  # type: ignore[attr-defined]
def _kernel(w: _Writer, kernel: str, *inputs: Tensor | None, scalars: Sequence[float] = ()) -> tuple:
    signature = _native._signatures()[kernel]
    if any(
        a.indices and t is not None and t.dtype != torch.int64 for a, t in zip(signature.inputs, inputs, strict=True)
    ):
        raise UnwritableError("indices other than int64")
    arranged = _native.arrange(kernel, *inputs)
    for t, made in zip(inputs, arranged.inputs, strict=True):
        w.copied(t, made)
    for made in arranged.outputs:
        if made is not None:
            w.new(made)
    number, is_double, sizes = signature.number, arranged.dtype == torch.float64, arranged.sizes
    w.call(
        "kernel",
        *arranged.inputs,
        *arranged.outputs,
        arguments=lambda places: (number, is_double, places, sizes, list(scalars)),
    )
    return arranged.outputs


@_writes(_checks._below.__wrapped__)  # type: ignore[attr-defined]
def _below(w: _Writer, op: str, name: str, value: Tensor, high: int, ignored: int | None) -> None:
    if value.dtype != torch.int64:
        raise UnwritableError("indices other than int64")
    count = value.numel()
    w.call("check", w.in_rows(value), arguments=lambda places: (places[0], count, high, ignored or 0))
