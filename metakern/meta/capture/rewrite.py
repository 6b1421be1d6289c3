"""Rewrites of a program to fewer calls and less memory traffic: common-subexpression elimination and two fusions.

    y = f(x),  z = f(x)          ->   y = z = f(x)          of small tensors, views and checks; also a view of a view
    y = s x,   c = a y           ->   c = s (a x)           a number becomes a factor of the matrix product
    c = a b,   d = p + s c       ->   d = p + s (a b)       the matrix product adds to p

The last two occur in the updates of an inner loop and in the sums of its cotangents. Each fusion saves a loop over
three tensors. Large tensors are not shared, since a function may compute one again to save memory.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

from metakern import native
from metakern.meta.capture.program import Register, Step, registers

_PRODUCT: Any = native.product.__wrapped__  # type: ignore[attr-defined]
_aten = torch.ops.aten
_ADD, _VIEW = _aten.add.Tensor, _aten.view.default
SMALL = 4096  # elements


def rewritten(steps: list[Step], outputs: list[Any]) -> list[Step]:
    """Return the steps after `cse` and both fusions."""
    return fuse_sums(fuse_scales(cse(steps, outputs), outputs), outputs)


def cse(steps: list[Step], outputs: list[Any]) -> list[Step]:
    """Common-subexpression elimination: return the steps without repeated calls whose results are small or views."""
    fixed = written(steps) | set(registers(outputs))
    names: dict[Register, Register] = {}
    first: dict[Any, Step] = {}
    bases: dict[Register, Register] = {}  # result of a view -> the tensor that it views
    kept = []
    for step in steps:
        step = step.reading(names)
        made = step.makes
        light = _is_view(step) or all(r.shape.numel() <= SMALL for r in made)
        if light and not step.has_side_effects and fixed.isdisjoint((*step.reads, *made)):
            if step.function is _VIEW and isinstance(step.args[0], Register):
                base = bases[step.results] = bases.get(step.args[0], step.args[0])
                if base.shape == step.results.shape:
                    names[step.results] = base
                    continue
                step = replace(step, args=(base, step.args[1]))
            before = first.setdefault((step.function, _hashable((step.args, step.kwargs))), step)
            if before is not step:
                names.update(zip(made, before.makes, strict=True))
                continue
        kept.append(step)
    return kept


def _hashable(value: Any) -> Any:
    """Return a hashable value that is equal for equal arguments; 1 is not 1.0, and a tensor equals only itself."""
    if isinstance(value, dict):
        return tuple((key, _hashable(v)) for key, v in value.items())
    if isinstance(value, list | tuple):
        return tuple(map(_hashable, value))
    return value if isinstance(value, Register) else id(value) if isinstance(value, Tensor) else (type(value), value)


def fuse_scales(steps: list[Step], outputs: list[Any]) -> list[Step]:
    """Return the steps with multiplications by a number moved into the matrix products that read them."""
    users, fixed = _users(steps), written(steps) | set(registers(outputs))
    names: dict[Register, Register] = {}
    factors: dict[int, float] = defaultdict(lambda: 1.0)
    for step in steps:
        if _is_multiple(step) and step.args[0] not in fixed:
            products = _products_of(step.results, steps, users, fixed)
            for i in products:
                factors[i] *= step.args[1]
            if products:
                names[step.results] = names.get(step.args[0], step.args[0])
    kept = []
    for i, step in enumerate(steps):
        if step.results not in names:
            step = step.reading(names)
            kept.append(_times(step, factors[i]) if i in factors else step)
    return kept


def _is_multiple(step: Step) -> bool:
    """Whether a step is s x for a number s, with a result of x's dtype."""
    if step.function not in (_aten.mul.Scalar, _aten.mul.Tensor) or not isinstance(step.args[1], int | float):
        return False
    return isinstance(step.args[0], Register) and step.args[0].dtype == step.results.dtype


def _products_of(y: Register, steps: list[Step], users: dict[Register, list[int]], fixed: set[Register]) -> list[int]:
    """Return the matrix products that y or a view of it is an operand of; none if y has any other use."""
    found, names = [], [y]
    for name in names:
        if name in fixed:
            return []
        for i in users[name]:
            step = steps[i]
            if step.function is _PRODUCT and name not in registers(step.args[2:]):
                found.append(i)
            elif _is_view(step):
                names.append(step.results)
            else:
                return []
    return found if len(found) == len(set(found)) else []


def fuse_sums(steps: list[Step], outputs: list[Any]) -> list[Step]:
    """Return the steps with sums moved into the matrix products whose results they add."""
    users, fixed = _users(steps), written(steps) | set(registers(outputs))
    products = {step.results: i for i, step in enumerate(steps) if _can_add(step, users, fixed)}
    kept: list[Step | None] = []
    for step in steps:
        kept.append(step)
        if step.function is not _ADD:
            continue
        (p, c), scale = step.args, step.kwargs.get("alpha", 1)
        if c not in products and scale == 1:
            p, c = c, p
        if c in products and _alike(p, c):
            product = steps[products[c]]
            kept[products[c]] = None
            with_sum = replace(product, args=(*product.args[:2], p), results=step.results)
            kept[-1] = _times(with_sum, scale)
    return [step for step in kept if step is not None]


def _can_add(step: Step, users: dict[Register, list[int]], fixed: set[Register]) -> bool:
    """Whether a step is a matrix product without a summand, with one use, and operands that are not written to."""
    if (
        step.function is not _PRODUCT
        or step.has_side_effects
        or any(arg is not None and arg is not False for arg in step.args[2:])
    ):
        return False
    return len(users[step.results]) == 1 and fixed.isdisjoint(registers((step.args, step.results)))


def _alike(p: Any, c: Register) -> bool:
    return isinstance(p, Register | Tensor) and p.shape == c.shape and p.dtype == c.dtype


def _times(product: Step, factor: float) -> Step:
    return replace(product, kwargs={**product.kwargs, "scale": product.kwargs.get("scale", 1.0) * factor})


def _users(steps: Sequence[Step]) -> dict[Register, list[int]]:
    users: dict[Register, list[int]] = defaultdict(list)
    for i, step in enumerate(steps):
        for register in step.reads:
            users[register].append(i)
    return users


def _is_view(step: Step) -> bool:
    """Whether the result of a step shares the memory of its first argument."""
    return step.function is _aten._unsafe_view.default or is_view(step.function)


def is_view(function: Any) -> bool:
    """Whether the result of a function is declared to share the memory of an argument."""
    return isinstance(function, OpOverload) and _declares_view(function)


@cache
def _declares_view(function: OpOverload) -> bool:
    schema = function._schema
    return not schema.is_mutable and any(r.alias_info is not None for r in schema.returns)


def written(steps: Sequence[Step]) -> set[Register]:
    """Return the registers that share memory with a register which some step writes to."""
    origin: dict[Register, Register] = {}
    for step in steps:
        if _is_view(step) and isinstance(step.args[0], Register):
            of = origin.get(step.args[0], step.args[0])
            origin.update(dict.fromkeys(step.makes, of))
    written = {origin.get(register, register) for step in steps for register in step.writes}
    return written | {register for register, of in origin.items() if of in written}
