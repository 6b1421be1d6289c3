"""The lowering rules: how each operation of PyTorch, and each call of our kernels, becomes instructions.

A rule is called with the `Lowering` and the operation's arguments, with meta tensors as layouts, and returns the
results in the same way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from metakern import native
from metakern.meta.capture.lowering import COMPARISONS, FACTORIES, RULES, Lowering, LoweringError
from metakern.ops.core import checks

_aten: Any = torch.ops.aten


def _lowers(*operations: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a function as the rule of these operations."""

    def decorated(rule: Callable[..., Any]) -> Callable[..., Any]:
        RULES.update(dict.fromkeys(operations, rule))
        return rule

    return decorated


def _makes(operation: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register the rule of an operation whose result is new memory, which later steps may write to."""
    FACTORIES.add(operation)
    return _lowers(operation)


def _alike(w: Lowering, x: Tensor, *others: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return the layout of an elementwise result: that of the first tensor of its shape, in x's dtype or `dtype`."""
    shape = torch.broadcast_shapes(x.shape, *(other.shape for other in others))
    like = next((t for t in (x, *others) if t.shape == shape), None)
    return w.new(x.new_empty(shape, dtype=dtype) if like is None else torch.empty_like(like, dtype=dtype or x.dtype))


def _is_of_tensors(operation: Any, inputs: int) -> bool:
    arguments = operation._schema.arguments
    return len(arguments) == inputs and all(str(argument.type) == "Tensor" for argument in arguments)


# Operations of PyTorch that have an instruction of the same name (csrc/instructions.h) and take only tensors.
for _name, _inputs in getattr(native.C, "elementwise", {}).items():
    for _spelling in (_name, f"{_name}_"):
        _op = getattr(getattr(_aten, _spelling, None), "default", None)
        if _op is not None and _is_of_tensors(_op, _inputs):
            if _spelling == _name:
                RULES[_op] = lambda w, *x, name=_name: w.map(name, _alike(w, *x), *x)
            else:
                RULES[_op] = lambda w, *x, name=_name: w.map(name, x[0], *x)
for _name in COMPARISONS:
    _op = getattr(_aten, _name).Scalar
    RULES[_op] = lambda w, x, s, name=_name: w.map(name, _alike(w, x, dtype=torch.bool), x, s=s)


for _name in COMPARISONS:
    for _op in (getattr(_aten, _name).Tensor, getattr(torch.ops.prims, _name).default):
        RULES[_op] = lambda w, x, y, name=_name: w.map(f"{name}_of", _alike(w, x, y, dtype=torch.bool), x, y)


def _extreme(name: str, comparison: str) -> None:
    """Register the rule of `maximum` or `minimum`; integers are chosen by a comparison."""

    def rule(w: Lowering, x: Tensor, y: Tensor) -> Tensor:
        if x.is_floating_point():
            return w.map(name, _alike(w, x, y), x, y)
        return _where(w, w.map(comparison, _alike(w, x, y, dtype=torch.bool), x, y), x, y)

    RULES[getattr(_aten, name).default] = rule


_extreme("maximum", "gt_of")
_extreme("minimum", "lt_of")


@_lowers(_aten.clamp.default)
def _clamp(w: Lowering, x: Tensor, min: float | None = None, max: float | None = None) -> Tensor:
    for extreme, bound in ((_aten.maximum.default, min), (_aten.minimum.default, max)):
        if bound is not None:
            if not (x.is_floating_point() or isinstance(bound, int)):
                raise LoweringError(f"clamping {x.dtype} to a float has no instruction")
            x = RULES[extreme](w, x, w.map("fill", w.new(x.new_empty(())), s=bound))
    return x


@_lowers(_aten.clamp_min.default)
def _clamp_min(w: Lowering, x: Tensor, min: float) -> Tensor:
    return _clamp(w, x, min)


@_lowers(_aten.clamp_min_.Tensor)
def _clamp_min_in_place(w: Lowering, x: Tensor, min: Tensor) -> Tensor:
    return (
        w.map("maximum", x, x, min)
        if x.is_floating_point()
        else w.map("copy", x, RULES[_aten.maximum.default](w, x, min))
    )


@_lowers(_aten.clamp_max.default)
def _clamp_max(w: Lowering, x: Tensor, max: float) -> Tensor:
    return _clamp(w, x, None, max)


@_lowers(_aten.gelu.default)
def _gelu(w: Lowering, x: Tensor, approximate: str = "none") -> Tensor:
    if approximate != "none":
        raise LoweringError("gelu's tanh approximation has no instruction")
    return w.map("gelu", _alike(w, x), x)


@_lowers(_aten.gelu_backward.default)
def _gelu_backward(w: Lowering, ct: Tensor, x: Tensor, approximate: str = "none") -> Tensor:
    if approximate != "none":
        raise LoweringError("gelu's tanh approximation has no instruction")
    return w.map("gelu_backward", _alike(w, ct, x), ct, x)


@_lowers(_aten.threshold_backward.default)
def _threshold_backward(w: Lowering, ct: Tensor, x: Tensor, threshold: float) -> Tensor:
    return w.map("threshold_backward", _alike(w, ct, x), ct, x, s=threshold)


def _cast(w: Lowering, x: Tensor, dtype: torch.dtype) -> Tensor:
    return x if x.dtype == dtype else w.map("copy", _alike(w, x, dtype=dtype), x)


def _sum_of(w: Lowering, out: Tensor, x: Tensor, y: Tensor | float, scale: float) -> Tensor:
    """Lower out = x + scale y."""
    if isinstance(y, Tensor):
        return w.map("add", out, x, y, s=scale)
    return w.affine(out, x, 1, float(scale) * y if x.is_floating_point() else scale * y)  # -0.0 for a difference with 0


def _product_of(w: Lowering, out: Tensor, x: Tensor, y: Tensor | float) -> Tensor:
    return w.map("mul", out, x, y) if isinstance(y, Tensor) else w.affine(out, x, y)


def _quotient_of(w: Lowering, out: Tensor, x: Tensor, y: Tensor | float) -> Tensor:
    if not isinstance(y, Tensor) and not y:
        raise LoweringError("a division by the number zero has no instruction")
    return w.map("div", out, x, y) if isinstance(y, Tensor) else w.affine(out, x, 1 / y)


def _binary(name: str, of: Callable[..., Tensor], *more: float) -> None:
    """Register the rules of a binary operation: of a tensor or a number y, with a new result and in place.

    `of` lowers the operation to instructions; `more` are factors of its argument alpha.
    """
    op, in_place = getattr(_aten, name), getattr(_aten, f"{name}_")

    def write(w: Lowering, x: Any, y: Any, alpha: float = 1) -> Tensor:
        if not isinstance(x, Tensor):  # a number on the left of a tensor
            x = w.map("fill", w.new(torch.empty((), dtype=torch.result_type(x, y), device="meta")), s=x)
        if isinstance(y, Tensor) and x.dtype != y.dtype:
            x, y = (_cast(w, t, torch.result_type(x, y)) for t in (x, y))
        others = (y,) if isinstance(y, Tensor) else ()
        return of(w, _alike(w, x, *others), x, y, *(sign * alpha for sign in more))

    def write_in_place(w: Lowering, x: Tensor, y: Any, alpha: float = 1) -> Tensor:
        return of(w, x, x, y, *(sign * alpha for sign in more))

    _lowers(op.Tensor, op.Scalar)(write)
    _lowers(in_place.Tensor, in_place.Scalar)(write_in_place)


_binary("add", _sum_of, 1)
_binary("sub", _sum_of, -1)
_binary("mul", _product_of)
_binary("div", _quotient_of)


@_lowers(torch.ops.prims.div.default)
def _prims_div(w: Lowering, x: Tensor, y: Tensor) -> Tensor:
    return _quotient_of(w, _alike(w, x, y), x, y)


@_lowers(_aten.fill_.Scalar)
def _fill(w: Lowering, x: Tensor, value: float) -> Tensor:
    return w.map("fill", x, s=value)


@_lowers(_aten.fill_.Tensor)
def _fill_with_tensor(w: Lowering, x: Tensor, value: Tensor) -> Tensor:
    return w.map("copy", x, value)


@_lowers(_aten.addcmul.default)
def _addcmul(w: Lowering, x: Tensor, y: Tensor, z: Tensor, value: float = 1) -> Tensor:
    return _sum_of(w, _alike(w, x, y, z), x, _product_of(w, _alike(w, y, z), y, z), value)


@_lowers(_aten.neg.default)
def _neg(w: Lowering, x: Tensor) -> Tensor:
    return w.affine(_alike(w, x), x, -1)


@_lowers(_aten.rsub.Scalar)
def _rsub(w: Lowering, x: Tensor, y: float, alpha: float = 1) -> Tensor:
    return w.affine(_alike(w, x), x, -alpha, y)


@_lowers(_aten.reciprocal.default)
def _reciprocal(w: Lowering, x: Tensor) -> Tensor:
    return w.map("reciprocal", _alike(w, x), x, s=1.0)


@_lowers(_aten.pow.Tensor_Scalar)
def _pow(w: Lowering, x: Tensor, exponent: float) -> Tensor:
    out = _alike(w, x)
    if exponent == 1:
        return w.map("copy", out, x)
    return w.map("square", out, x) if exponent == 2 else w.map("power", out, x, s=exponent)


@_lowers(_aten.where.self)
def _where(w: Lowering, mask: Tensor, x: Tensor, y: Tensor) -> Tensor:
    if mask.dtype != torch.bool or x.dtype != y.dtype:
        raise LoweringError("where has no instruction for a mask that is not boolean, or operands of different dtypes")
    return w.map("where", _alike(w, x, y, mask), mask, x, y)


@_lowers(_aten.masked_fill.Scalar)
def _masked_fill(w: Lowering, x: Tensor, mask: Tensor, value: float) -> Tensor:
    if not x.is_floating_point() and not isinstance(value, int):
        raise LoweringError("filling integers with a float has no instruction")
    filled = w.map("fill", w.new(x.new_empty(())), s=value)
    return _where(w, mask, filled, x)


@_lowers(_aten.bitwise_and.Tensor, _aten.logical_and.default)
def _and(w: Lowering, x: Tensor, y: Tensor) -> Tensor:
    if x.dtype != torch.bool:
        raise LoweringError(f"bitwise and logical operations on {x.dtype} have no instruction")
    return w.map("logical_and", _alike(w, x, y), x, y)


@_lowers(_aten.masked_fill_.Scalar)
def _masked_fill_in_place(w: Lowering, x: Tensor, mask: Tensor, value: float) -> Tensor:
    return w.map("copy", x, _masked_fill(w, x, mask, value))


@_lowers(_aten.logical_and_.default)
def _and_in_place(w: Lowering, x: Tensor, y: Tensor) -> Tensor:
    return w.map("copy", x, _and(w, x, y))


@_lowers(_aten.bitwise_or.Tensor, _aten.logical_or.default)
def _or(w: Lowering, x: Tensor, y: Tensor) -> Tensor:
    if x.dtype != torch.bool:
        raise LoweringError(f"bitwise and logical operations on {x.dtype} have no instruction")
    return w.map("logical_or", _alike(w, x, y), x, y)


@_lowers(_aten.bitwise_not.default, _aten.logical_not.default)
def _not(w: Lowering, x: Tensor) -> Tensor:
    if x.dtype != torch.bool:
        raise LoweringError(f"bitwise and logical operations on {x.dtype} have no instruction")
    return w.map("logical_not", _alike(w, x), x)


def _reduced(
    w: Lowering, x: Tensor, dim: int | Sequence[int] | None, keepdim: bool
) -> tuple[list[int], Tensor, Tensor]:
    """Return the reduced dimensions (all, if none are named), the result with these kept as size 1, and the result."""
    named = [dim] if isinstance(dim, int) else dim or range(x.dim())
    dims = [d % x.dim() for d in named] if x.dim() else []
    wide = w.new(x.new_empty([1 if d in dims else size for d, size in enumerate(x.shape)]))
    return dims, wide, wide if keepdim else wide.squeeze(dims)


@_lowers(_aten.all.default, _aten.all.dim, _aten.all.dims)
def _all(w: Lowering, x: Tensor, dim: Any = None, keepdim: bool = False) -> Tensor:
    """Lower `all` to a logical and of x with the result, which has stride 0 along the reduced dimensions."""
    if x.dtype != torch.bool:
        raise LoweringError(f"all of {x.dtype} has no instruction")
    _, wide, out = _reduced(w, x, dim, keepdim)
    w.map("fill", wide, s=1.0)
    w.map("logical_and", wide.expand(x.shape), wide.expand(x.shape), x)
    return out


@_lowers(_aten.any.default, _aten.any.dim, _aten.any.dims)
def _any(w: Lowering, x: Tensor, dim: Any = None, keepdim: bool = False) -> Tensor:
    return _not(w, _all(w, _not(w, x), dim, keepdim))


@_lowers(_aten.cumsum.default)
def _cumsum(w: Lowering, x: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    """Lower `cumsum` to log2 n sums of y and y moved by 1, 2, 4, … elements (Hillis, Steele 1986)."""
    y = _cast(w, x, dtype or (x.dtype if x.is_floating_point() else torch.int64))
    size = x.shape[dim] if x.dim() else 0
    for offset in (1 << i for i in range(max(size - 1, 0).bit_length())):
        moved, rest = y.narrow(dim, 0, size - offset), y.narrow(dim, offset, size - offset)
        y = w.map("copy", _alike(w, y), y)
        w.map("add", y.narrow(dim, offset, size - offset), rest, moved, s=1.0)
    return y


@_lowers(_aten.tril.default)
def _tril(w: Lowering, x: Tensor, diagonal: int = 0) -> Tensor:
    return _masked_fill(w, x, w.constant(~torch.ones(x.shape[-2:], dtype=torch.bool).tril(diagonal)), 0)


@_lowers(_aten.triu.default)
def _triu(w: Lowering, x: Tensor, diagonal: int = 0) -> Tensor:
    return _masked_fill(w, x, w.constant(~torch.ones(x.shape[-2:], dtype=torch.bool).triu(diagonal)), 0)


@_lowers(_aten.var.correction)
def _var(
    w: Lowering, x: Tensor, dim: Sequence[int] | None = None, correction: float | None = 1, keepdim: bool = False
) -> Tensor:
    off = _sum_of(w, _alike(w, x), x, _mean(w, x, dim, keepdim=True), -1)
    dims, wide, out = _reduced(w, x, dim, keepdim)
    number = prod(x.shape[d] for d in dims) - (1 if correction is None else correction)
    w.sum(wide, w.map("square", _alike(w, x), off), dims, 1 / number if number > 0 else torch.inf, None)
    return out


def _some(dims: Sequence[int] | None) -> Sequence[int]:
    """Return the dimensions of a primitive reduction, for which none named means none reduced, unlike in aten."""
    if not dims:
        raise LoweringError("a reduction over no dimension has no instruction")
    return dims


@_lowers(torch.ops.prims.var.default)
def _prims_var(w: Lowering, x: Tensor, dims: Sequence[int], correction: float = 1, **options: Any) -> Tensor:
    return _var(w, x, _some(dims), correction)


@_lowers(_aten.var_mean.correction)
def _var_mean(w: Lowering, x: Tensor, dim: Any = None, correction: float | None = 1, keepdim: bool = False) -> tuple:
    return _var(w, x, dim, correction, keepdim), _mean(w, x, dim, keepdim)


@_lowers(_aten.std.correction)
def _std(w: Lowering, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    variance = _var(w, x, *args, **kwargs)
    return w.map("sqrt", _alike(w, variance), variance)


@_lowers(_aten.amax.default)
def _amax(w: Lowering, x: Tensor, dim: int | Sequence[int] = (), keepdim: bool = False) -> Tensor:
    """Lower `amax` to the larger of x and the result, which has stride 0 along the reduced dimensions."""
    if not x.is_floating_point():
        raise LoweringError(f"amax of {x.dtype} has no instruction")
    _, wide, out = _reduced(w, x, dim, keepdim)
    w.map("fill", wide, s=float("-inf"))
    w.map("running_max", wide.expand(x.shape), wide.expand(x.shape), x)
    return out


@_lowers(_aten.sum.default, _aten.sum.dim_IntList)
def _sum(w: Lowering, x: Tensor, dim: Sequence[int] | None = None, keepdim: bool = False, dtype: Any = None) -> Tensor:
    """Lower `sum`; integers are added as doubles, which is exact below 2^53."""
    if not x.is_floating_point():
        return _cast(w, _sum(w, _cast(w, x, torch.float64), dim, keepdim), dtype or torch.int64)
    dims, wide, out = _reduced(w, x, dim, keepdim)
    w.sum(wide, x, dims, 1.0, dtype)
    return out


@_lowers(torch.ops.prims.sum.default)
def _prims_sum(w: Lowering, x: Tensor, dims: Sequence[int] | None, **options: Any) -> Tensor:
    return _sum(w, x, _some(dims))


@_lowers(_aten.mean.default, _aten.mean.dim)
def _mean(w: Lowering, x: Tensor, dim: Sequence[int] | None = None, keepdim: bool = False, dtype: Any = None) -> Tensor:
    dims, wide, out = _reduced(w, x, dim, keepdim)
    number = prod(x.shape[d] for d in dims)
    w.sum(wide, x, dims, 1 / number if number else torch.inf, dtype)
    return out


@_makes(_aten.zeros.default)
def _zeros(w: Lowering, size: Sequence[int], **options: Any) -> Tensor:
    dtype = options.get("dtype") or torch.get_default_dtype()
    return w.map("fill", w.new(torch.empty(size, dtype=dtype, device="meta")))


@_makes(_aten.empty_permuted.default)
def _empty_permuted(w: Lowering, size: Sequence[int], order: Sequence[int], **options: Any) -> Tensor:
    dtype = options.get("dtype") or torch.get_default_dtype()
    return w.new(torch.empty_permuted(list(size), list(order), dtype=dtype, device="meta"))


@_makes(_aten.scalar_tensor.default)
def _scalar_tensor(w: Lowering, value: float, **options: Any) -> Tensor:
    dtype = options.get("dtype") or torch.get_default_dtype()
    return w.map("fill", w.new(torch.empty((), dtype=dtype, device="meta")), s=value)


@_makes(_aten.new_zeros.default)
def _new_zeros(w: Lowering, x: Tensor, size: Sequence[int], **options: Any) -> Tensor:
    return w.map("fill", w.new(x.new_empty(size, dtype=options.get("dtype"))))


@_makes(_aten.new_full.default)
def _new_full(w: Lowering, x: Tensor, size: Sequence[int], value: float, **options: Any) -> Tensor:
    return w.map("fill", w.new(x.new_empty(size, dtype=options.get("dtype"))), s=value)


@_makes(_aten.new_ones.default)
def _new_ones(w: Lowering, x: Tensor, size: Sequence[int], **options: Any) -> Tensor:
    return _new_full(w, x, size, 1.0, **options)


@_makes(_aten.zeros_like.default)
def _zeros_like(w: Lowering, x: Tensor, **options: Any) -> Tensor:
    return w.map("fill", _alike(w, x, dtype=options.get("dtype")))


@_makes(_aten.ones_like.default)
def _ones_like(w: Lowering, x: Tensor, **options: Any) -> Tensor:
    return w.map("fill", _alike(w, x, dtype=options.get("dtype")), s=1.0)


@_makes(_aten.full_like.default)
def _full_like(w: Lowering, x: Tensor, value: float, **options: Any) -> Tensor:
    return w.map("fill", _alike(w, x, dtype=options.get("dtype")), s=value)


@_makes(_aten._new_zeros_with_same_feature_meta.default)
def _zeros_for(w: Lowering, x: Tensor, like: Tensor, self_num_batch_dims: int = 0) -> Tensor:
    return w.map("fill", w.new(x.new_empty((*x.shape[:self_num_batch_dims], *like.shape))))


@_lowers(_aten.zero_.default)
def _zero(w: Lowering, x: Tensor) -> Tensor:
    return w.map("fill", x)


@_lowers(_aten.clone.default, _aten._to_copy.default)
def _clone(w: Lowering, x: Tensor, **kwargs: Any) -> Tensor:
    memory_format = kwargs.get("memory_format") or torch.preserve_format
    out = torch.empty_like(x, dtype=kwargs.get("dtype") or x.dtype, memory_format=memory_format)
    return w.map("copy", w.new(out), x)


@_lowers(_aten.unsafe_split.Tensor)
def _unsafe_split(w: Lowering, x: Tensor, size: int, dim: int = 0) -> Any:
    return w.made(_aten.split.Tensor, x, size, dim)


@_lowers(_aten._unsafe_view.default)
def _unsafe_view(w: Lowering, x: Tensor, size: Sequence[int]) -> Tensor:
    return w.made(_aten.view.default, x, size)


@_lowers(_aten.copy_.default)
def _copy(w: Lowering, x: Tensor, y: Tensor, non_blocking: bool = False) -> Tensor:
    return w.map("copy", x, y)


@_lowers(_aten.cat.default)
def _cat(w: Lowering, tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    tensors, start = [t for t in tensors if t.shape != (0,)] or tensors[:1], 0  # as PyTorch does, skip empty vectors
    shape = list(tensors[0].shape)
    shape[dim] = sum(t.shape[dim] for t in tensors)
    out = w.new(tensors[0].new_empty(shape))
    for t in tensors:
        w.map("copy", out.narrow(dim, start, t.shape[dim]), t)
        start += t.shape[dim]
    return out


@_lowers(_aten.constant_pad_nd.default)
def _constant_pad(w: Lowering, x: Tensor, pad: Sequence[int], value: float = 0) -> Tensor:
    if min(pad) < 0:
        raise LoweringError("padding by a negative size has no instruction")
    # PyTorch names the padding of the last dimension first.
    pairs = [(0, 0)] * (x.dim() - len(pad) // 2) + list(zip(pad[-2::-2], pad[::-2], strict=True))
    out = w.new(x.new_empty([before + size + after for size, (before, after) in zip(x.shape, pairs, strict=True)]))
    w.map("fill", out, s=float(value))
    inner = out
    for dim, (before, _) in enumerate(pairs):
        inner = inner.narrow(dim, before, x.shape[dim])
    w.map("copy", inner, x)
    return out


@_lowers(_aten.stack.default)
def _stack(w: Lowering, tensors: Sequence[Tensor], dim: int = 0) -> Tensor:
    dim %= tensors[0].dim() + 1
    out = w.new(tensors[0].new_empty((*tensors[0].shape[:dim], len(tensors), *tensors[0].shape[dim:])))
    for i, t in enumerate(tensors):
        w.map("copy", out.select(dim, i), t)
    return out


@_lowers(_aten.slice_backward.default)
def _slice_backward(w: Lowering, ct: Tensor, sizes: Sequence[int], dim: int, start: int, end: int, step: int) -> Tensor:
    out = w.map("fill", w.new(ct.new_empty(sizes)))
    w.map("copy", _aten.slice.Tensor(out, dim, start, end, step), ct)
    return out


@_lowers(_aten.select_backward.default)
def _select_backward(w: Lowering, ct: Tensor, sizes: Sequence[int], dim: int, index: int) -> Tensor:
    out = w.map("fill", w.new(ct.new_empty(sizes)))
    w.map("copy", out.select(dim, index), ct)
    return out


@_lowers(_aten.embedding.default)
def _embedding(w: Lowering, table: Tensor, index: Tensor, *_: Any) -> Tensor:
    return _rows(w, table, index)


@_lowers(_aten.index_select.default)
def _index_select(w: Lowering, table: Tensor, dim: int, index: Tensor) -> Tensor:
    return _rows(w, table.movedim(dim, 0), index).movedim(0, dim) if table.dim() else _rows(w, table, index)


@_lowers(_aten.flip.default)
def _flip(w: Lowering, x: Tensor, dims: Sequence[int]) -> Tensor:
    for dim in dims:
        x = _index_select(w, x, dim, w.constant(torch.arange(x.shape[dim]).flip(0)))
    return x


@_lowers(_aten.index.Tensor, _aten._unsafe_index.Tensor)
def _index(w: Lowering, x: Tensor, indices: Sequence[Tensor | None]) -> Tensor:
    table, index, dims, place = _table(w, x, indices)
    rows = _rows(w, w.in_rows(table).flatten(0, len(dims) - 1), index)
    return rows.movedim([*range(index.dim())], [*range(place, place + index.dim())])


@_lowers(_aten._index_put_impl_.default, _aten.index_put_.default)
def _index_put_in_place(
    w: Lowering,
    x: Tensor,
    indices: Sequence[Tensor | None],
    values: Tensor,
    accumulate: bool = False,
    unsafe: bool = False,
) -> Tensor:
    if not accumulate:
        raise LoweringError("index_put without accumulate has no instruction")
    view, index, dims, place = _table(w, x, indices)
    table, rest = w.in_rows(view), view.shape[len(dims) :]
    values = values.expand(*rest[:place], *index.shape, *rest[place:])
    values = values.movedim([*range(place, place + index.dim())], [*range(index.dim())])
    rows = table.flatten(0, len(dims) - 1).view(-1, prod(rest))
    _index_add(w, rows, 0, w.in_rows(index).view(-1), w.in_rows(values).view(-1, prod(rest)))
    if table is not view:
        w.map("copy", view, table)
    return x


@_lowers(_aten.index_put.default)
def _index_put(w: Lowering, x: Tensor, *args: Any) -> Tensor:
    return _index_put_in_place(w, _clone(w, x, memory_format=torch.contiguous_format), *args)


def _table(w: Lowering, x: Tensor, indices: Sequence[Tensor | None]) -> tuple[Tensor, Tensor, list[int], int]:
    """Return what indexing by tensors reads: x with the indexed dimensions first, and the numbers of its rows.

    Returns also the indexed dimensions, and the place of theirs in the result: that of the first one if they are
    adjacent, else 0.
    """
    dims = [d for d, index in enumerate(indices) if index is not None]
    rows: Tensor | None = None
    for d in dims:
        index = _within(w, indices[d], x.shape[d])  # type: ignore[arg-type]
        if rows is not None:
            index = w.map("add", _alike(w, rows, index), w.affine(_alike(w, rows), rows, x.shape[d]), index, s=1.0)
        rows = index
    assert rows is not None
    place = dims[0] if dims[-1] - dims[0] == len(dims) - 1 else 0
    return x.permute(*dims, *(d for d in range(x.dim()) if d not in dims)), rows, dims, place


def _within(w: Lowering, index: Tensor, size: int) -> Tensor:
    """Lower the check that an index is in [-size, size); return it counted from the front."""
    if index.dtype != torch.int64:
        raise LoweringError(f"indexing by {index.dtype} has no instruction")
    is_negative = w.map("lt", _alike(w, index, dtype=torch.bool), index, s=0.0)
    index = w.map("where", _alike(w, index), is_negative, w.affine(_alike(w, index), index, 1, size), index)
    w.call("check", w.in_rows(index), after=(index.numel(), size, 0), writes=())
    return index


@_lowers(_aten.gather.default)
def _gather(w: Lowering, x: Tensor, dim: int, index: Tensor, sparse_grad: bool = False) -> Tensor:
    return _rows(w, w.in_rows(x).view(-1), _element_numbers(w, x.shape, dim, index))


@_lowers(_aten.scatter_add_.default)
def _scatter_add_in_place(w: Lowering, x: Tensor, dim: int, index: Tensor, source: Tensor) -> Tensor:
    if not x.is_contiguous():
        raise LoweringError("scatter_add_ to a tensor that is not contiguous has no instruction")
    source = w.in_rows(source[tuple(map(slice, index.shape))])
    _index_add(w, x.view(-1), 0, _element_numbers(w, x.shape, dim, index).view(-1), source.view(-1))
    return x


@_lowers(_aten.scatter_add.default)
def _scatter_add(w: Lowering, x: Tensor, dim: int, index: Tensor, source: Tensor) -> Tensor:
    return _scatter_add_in_place(w, _clone(w, x, memory_format=torch.contiguous_format), dim, index, source)


@_lowers(_aten.scatter_.src)
def _scatter_in_place(w: Lowering, x: Tensor, dim: int, index: Tensor, source: Tensor) -> Tensor:
    if not x.is_contiguous():
        raise LoweringError("scatter_ to a tensor that is not contiguous has no instruction")
    numbers = _element_numbers(w, x.shape, dim, index)
    tensors = x, w.in_rows(source[tuple(map(slice, index.shape))]), numbers
    w.call("put_rows", *tensors, after=(index.numel(), x.numel(), x.element_size()))
    return x


@_lowers(_aten.scatter.src)
def _scatter(w: Lowering, x: Tensor, dim: int, index: Tensor, source: Tensor) -> Tensor:
    return _scatter_in_place(w, _clone(w, x, memory_format=torch.contiguous_format), dim, index, source)


def _element_numbers(w: Lowering, shape: Sequence[int], dim: int, index: Tensor) -> Tensor:
    """Return the numbers, in a contiguous tensor of this shape, of the elements that an index along `dim` names.

    As in PyTorch, the index must be in [0, size).
    """
    if index.dtype != torch.int64:
        raise LoweringError(f"indexing by {index.dtype} has no instruction")
    along = shape[dim] if shape else 1
    w.call("check", w.in_rows(index), after=(index.numel(), along, 0), writes=())
    if not index.dim():
        return index
    strides = [prod(shape[d + 1 :]) for d in range(len(shape))]
    others = torch.zeros(index.shape, dtype=torch.int64)
    for d, size in enumerate(index.shape):
        if d != dim % len(shape):
            others += strides[d] * torch.arange(size).view(-1, *(1,) * (len(shape) - d - 1))
    out = w.new(torch.empty(index.shape, dtype=torch.int64, device="meta"))
    return w.map("add", out, w.constant(others), index, s=float(strides[dim]))


@_lowers(_aten.scatter.value)
def _scatter_value(w: Lowering, x: Tensor, dim: int, index: Tensor, value: float) -> Tensor:
    """Lower `scatter` of a number to one place along a dimension, as the derivative of a negative log-likelihood is."""
    one = [1 if d == dim % x.dim() else size for d, size in enumerate(x.shape)]
    if list(index.shape) != one:
        raise LoweringError("scatter of a number to several places along a dimension has no instruction")
    index = _within(w, index, x.shape[dim])
    places = w.constant(torch.arange(x.shape[dim]).view(-1, *(1,) * (x.dim() - dim % x.dim() - 1)))
    is_there = w.map("eq_of", w.new(x.new_empty(x.shape, dtype=torch.bool)), places, index)
    return _masked_fill(w, x, is_there, value)


def _rows(w: Lowering, table: Tensor, index: Tensor) -> Tensor:
    if index.dtype != torch.int64:
        raise LoweringError(f"selecting rows by {index.dtype} has no instruction")
    out = w.new(table.new_empty((*index.shape, *table.shape[1:])))
    row = prod(table.shape[1:]) * table.element_size()
    tensors = out, w.in_rows(table), w.in_rows(index)
    w.call("take_rows", *tensors, after=(index.numel(), table.shape[0], row))
    return out


@_lowers(_aten.index_add_.default)
def _index_add(w: Lowering, to: Tensor, dim: int, index: Tensor, source: Tensor, alpha: float = 1) -> Tensor:
    floats = to.is_floating_point() and to.dtype == source.dtype
    if dim % max(to.dim(), 1) or index.dtype != torch.int64 or not to.is_contiguous() or not floats:
        raise LoweringError(
            f"index_add_ along dimension {dim} of {to.dtype}, indexed by {index.dtype}, has no instruction"
        )
    is_double, sizes = to.dtype == torch.float64, (index.numel(), to.shape[0], prod(to.shape[1:]))
    tensors = to, w.in_rows(source), w.in_rows(index)
    w.call("add_rows", *tensors, before=(is_double,), after=(*sizes, alpha))
    return to


@_lowers(_aten.embedding_dense_backward.default)
def _embedding_backward(w: Lowering, ct: Tensor, index: Tensor, rows: int, padding: int, by_frequency: bool) -> Tensor:
    if by_frequency or padding >= 0:
        raise LoweringError("an embedding's padding_idx or scale_grad_by_freq has no instruction")
    out = w.map("fill", w.new(ct.new_empty(rows, ct.shape[-1])))
    return _index_add(w, out, 0, w.in_rows(index).view(-1), w.in_rows(ct).view(-1, ct.shape[-1]))


@_lowers(native.product.__wrapped__)  # type: ignore[attr-defined]
def _product(
    w: Lowering, a: Tensor, b: Tensor, add: Tensor | None = None, reuse: bool = False, scale: float = 1.0
) -> Tensor:
    arranged = native.arrange_product(a, b, add, reuse)
    for t, made in zip((a, b, add), arranged.tensors, strict=False):
        w.copied(t, made)
    result = w.new(arranged.tensors[3])
    before, after = (a.dtype == torch.float64,), (arranged.sizes, arranged.strides, scale, 0)
    w.call("product", *arranged.tensors, None, None, before=before, after=after, writes=(result,))
    return result


@_lowers(_aten.bmm.default)
def _bmm(w: Lowering, a: Tensor, b: Tensor) -> Tensor:
    if a.dtype not in native.DTYPES:
        raise LoweringError(f"a matrix product of {a.dtype} has no instruction")
    return _product(w, a, b)


@_lowers(_aten.mm.default)
def _mm(w: Lowering, a: Tensor, b: Tensor) -> Tensor:
    return _bmm(w, a.unsqueeze(0), b.unsqueeze(0)).squeeze(0)


@_lowers(_aten.baddbmm.default)
def _baddbmm(w: Lowering, add: Tensor, a: Tensor, b: Tensor, beta: float = 1, alpha: float = 1) -> Tensor:
    if a.dtype not in native.DTYPES:
        raise LoweringError(f"a matrix product of {a.dtype} has no instruction")
    add = add if beta == 1 else w.affine(_alike(w, add), add, beta)
    return _product(w, a, b, add.expand(*a.shape[:2], b.shape[2]), scale=alpha)


@_lowers(_aten.addmm.default)
def _addmm(w: Lowering, add: Tensor, a: Tensor, b: Tensor, beta: float = 1, alpha: float = 1) -> Tensor:
    full = add.expand(a.shape[0], b.shape[1])
    return _baddbmm(w, full.unsqueeze(0), a.unsqueeze(0), b.unsqueeze(0), beta, alpha).squeeze(0)


@_lowers(native.call.__wrapped__)  # type: ignore[attr-defined]
def _kernel(w: Lowering, kernel: str, *inputs: Tensor | None, scalars: Sequence[float] = ()) -> tuple:
    signature = native.signatures()[kernel]
    inputs = tuple(
        w.map("copy", w.new(torch.empty_like(t, dtype=torch.int64)), t)
        if argument.indices and t is not None and t.dtype != torch.int64
        else t
        for argument, t in zip(signature.inputs, inputs, strict=True)
    )
    arranged = native.arrange(kernel, *inputs)
    for t, made in zip(inputs, arranged.inputs, strict=True):
        w.copied(t, made)
    for made in arranged.outputs:
        if made is not None:
            w.new(made)
    number, is_double, sizes = signature.number, arranged.dtype == torch.float64, arranged.sizes
    tensors, after = (*arranged.inputs, *arranged.outputs), (sizes, list(scalars))
    w.call("kernel", *tensors, before=(number, is_double), after=after, writes=arranged.outputs, name=kernel)
    return arranged.outputs


@_lowers(checks.all_below.__wrapped__)  # type: ignore[attr-defined]
def _all_below(w: Lowering, op: str, name: str, value: Tensor, high: int, ignored: int | None) -> None:
    if value.dtype != torch.int64:
        raise LoweringError(f"checking indices of {value.dtype} has no instruction")
    count = value.numel()
    w.call("check", w.in_rows(value), after=(count, high, ignored or 0), writes=())
