"""Element-wise formulas, stated once: tangents and cotangents are derived, and one text runs in PyTorch and in Triton.

    forward   y      = f(x)
    jvp       t_y    = Σ ∂y/∂x t_x       node by node, from the inputs to the results
    vjp       ct_x   = Σ ct_y ∂y/∂x      node by node, from the results to the inputs
    vjp_jvp   t_ct_x                     the tangent of the vjp

| node | value | tangent |
|---|---|---|
| a + b, a - b, a * b | | t_a + t_b, t_a - t_b, t_a b + a t_b |
| y = a / b | | (t_a - y t_b) / b |
| y = over(a, b) | a / b, and 0 where b = 0 | over(t_a - y t_b, b) |
| y = root(a) | √a, and 0 where a <= 0 | over(t_a / 2, y): slope zero at zero |
| fma(c, a, b), fms(c, a, b) | c + a b, c - a b, of a product that is used once | |

Equal nodes are one node, and what is zero by its form is not computed: an input that is absent is such a zero.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Node:
    """A function of other nodes, an input of some name, or a number."""

    kind: str
    args: tuple[Any, ...]

    def __add__(self, other: Node | float) -> Node:
        other = _node(other)
        return other if self is ZERO else self if other is ZERO else _made("+", self, other)

    def __sub__(self, other: Node | float) -> Node:
        other = _node(other)
        return self if other is ZERO else other * -1.0 if self is ZERO else _made("-", self, other)

    def __mul__(self, other: Node | float) -> Node:
        other = _node(other)
        if self is ZERO or other is ZERO:
            return ZERO
        if self is ONE or other is ONE:
            return other if self is ONE else self
        if self.kind == "*" and self.args[1].kind == "number":  # which is then a factor of what may be small
            return self.args[0] * (other * self.args[1])
        return _made("*", self, other)

    def __truediv__(self, other: Node | float) -> Node:
        other = _node(other)
        return self if self is ZERO or other is ONE else _made("/", self, other)

    def __rsub__(self, other: float) -> Node:
        return _node(other) - self

    __radd__, __rmul__ = __add__, __mul__


@cache
def _made(kind: str, *args: Any) -> Node:
    if kind in _OPERATORS and all(a.kind == "number" for a in args):
        return _node(_OPERATORS[kind](args[0].args[0], args[1].args[0]))
    return Node(kind, args)


def _node(value: Node | float) -> Node:
    return value if isinstance(value, Node) else _made("number", float(value))


_OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
ZERO, ONE = _node(0), _node(1)


def symbol(name: str) -> Node:
    """An input."""
    return _made("input", name)


def root(a: Node) -> Node:
    """The square root, with slope zero at zero."""
    return a if a is ZERO else _made("root", a)


def over(a: Node, b: Node) -> Node:
    """a / b, and zero where b is."""
    return a if a is ZERO else _made("over", a, b)


def tangents(outputs: Iterable[Node], t: Mapping[Node, Node]) -> tuple[Node, ...]:
    """Those of nodes, from the tangents of inputs."""
    found = dict(t)
    outputs = tuple(outputs)
    for y in _sorted(outputs):
        if y.kind in ("input", "number"):
            found.setdefault(y, ZERO)
            continue
        (a, *rest), t_a = y.args, found[y.args[0]]
        if y.kind == "root":
            found[y] = over(t_a * 0.5, y)
            continue
        b, t_b = rest[0], found[rest[0]]
        if y.kind == "*":
            found[y] = t_a * b + a * t_b
        elif y.kind in ("+", "-"):
            found[y] = t_a + t_b if y.kind == "+" else t_a - t_b
        else:
            found[y] = over(t_a - y * t_b, b) if y.kind == "over" else (t_a - y * t_b) / b
    return tuple(found[y] for y in outputs)


def cotangents(outputs: Iterable[Node], ct: Sequence[Node], inputs: Sequence[Node]) -> tuple[Node, ...]:
    """Those of inputs, from the cotangents of the outputs."""
    found: dict[Node, Node] = {}
    outputs = tuple(outputs)

    def add(node: Node, part: Node) -> None:
        found[node] = found.get(node, ZERO) + part

    for y, ct_y in zip(outputs, ct, strict=True):
        add(y, ct_y)
    for y in reversed(_sorted(outputs)):
        ct_y = found.get(y, ZERO)
        if y.kind in ("input", "number"):
            continue
        a, b = y.args[0], y.args[-1]
        if y.kind in ("+", "-"):
            add(a, ct_y)
            add(b, ct_y if y.kind == "+" else ct_y * -1.0)
        elif y.kind == "*":
            add(a, ct_y * b)
            add(b, ct_y * a)
        elif y.kind == "root":
            add(a, over(ct_y * 0.5, y))
        else:
            part = over(ct_y, b) if y.kind == "over" else ct_y / b
            add(a, part)
            add(b, part * y * -1.0)
    return tuple(found.get(x, ZERO) for x in inputs)


def _sorted(outputs: Iterable[Node]) -> list[Node]:
    """What the outputs consist of, each node after its arguments."""
    seen: dict[Node, None] = {}

    def visit(node: Node) -> None:
        if node not in seen:
            for a in node.args if node.kind not in ("input", "number") else ():
                visit(a)
            seen[node] = None

    for output in outputs:
        visit(output)
    return list(seen)


@dataclass(frozen=True)
class Generated:
    """Python text of a function `f` of the inputs that it needs; `given` says which outputs it returns."""

    name: str
    text: str
    inputs: tuple[str, ...]
    given: tuple[bool, ...]  # the others are zero, or not wanted


@cache
def program(
    formula: Callable[..., tuple[Node, ...]],
    inputs: int,
    rule: str,
    present: frozenset[str],
    wanted: tuple[bool, ...] | None = None,
    merged: bool = True,
) -> Generated:
    """A rule of y = formula(x0, x1, …) whose tangents are t0, …, and cotangents ct0, …, with tangents t_ct0, …

    Inputs that are not `present` are zero. `merged`: with fma and fms.
    """

    def symbols(letters: str, number: int) -> list[Node]:
        names = (f"{letters}{i}" for i in range(number))
        return [symbol(name) if name in present else ZERO for name in names]

    x, t_x = symbols("x", inputs), symbols("t", inputs)
    outputs = formula(*x)
    ct, t_ct = (symbols(letters, len(outputs)) for letters in ("ct", "t_ct"))
    if rule == "jvp":
        outputs = tangents(outputs, dict(zip(x, t_x, strict=True)))
    elif rule != "forward":
        outputs = cotangents(outputs, ct, x)
    if rule == "vjp_jvp":
        outputs = tangents(outputs, dict(zip([*x, *ct], [*t_x, *t_ct], strict=True)))
    given = tuple(y is not ZERO and (wanted is None or wanted[i]) for i, y in enumerate(outputs))
    text, read = _text([y for y, g in zip(outputs, given, strict=True) if g], merged)
    return Generated(f"{formula.__name__.strip('_')}_{rule}", text, read, given)


def _text(outputs: list[Node], merge: bool) -> tuple[str, tuple[str, ...]]:
    """A line for each node; to `merge` is to make a product that is used once, in a sum, a part of it."""
    nodes = _sorted(outputs)
    uses = Counter(a for node in nodes if node.kind not in ("input", "number") for a in node.args)
    uses.update(outputs)
    merged: dict[Node, Node] = {}  # product -> the sum that it is a part of
    for node in nodes:
        if merge and node.kind in ("+", "-"):
            for a in node.args[::-1] if node.kind == "+" else node.args[1:]:
                if a.kind == "*" and uses[a] == 1 and node not in merged.values():
                    merged[a] = node
    names: dict[Node, str] = {}
    lines: list[str] = []
    read: list[str] = []
    for node in nodes:
        if node in merged:
            continue
        if node.kind in ("input", "number"):
            names[node] = node.args[0] if node.kind == "input" else repr(node.args[0])
            read += [node.args[0]] * (node.kind == "input")
            continue
        product = next((a for a in node.args if merged.get(a) is node), None)
        names[node] = f"v{len(lines)}"
        if product is not None:
            others = [a for a in node.args if a is not product]
            parts = ", ".join(names[a] for a in (*others, *product.args))
            value = f"{'fma' if node.kind == '+' else 'fms'}({parts})"
        elif node.kind in _OPERATORS:
            value = f" {node.kind} ".join(names[a] for a in node.args)
        else:
            value = f"{node.kind}({', '.join(names[a] for a in node.args)})"
        lines.append(f"    {names[node]} = {value}\n")
    results = "".join(f"{names[y]}, " for y in outputs)
    return f"def f({', '.join(read)}):\n{''.join(lines)}    return ({results})\n", tuple(read)


def _fma(c: Any, a: Any, b: Any, sign: int = 1) -> Any:
    """c + sign a b, in one pass."""
    if not isinstance(a, Tensor):
        a, b = b, a
    if not isinstance(c, Tensor) or not isinstance(a, Tensor):
        return c + sign * a * b
    return torch.addcmul(c, a, b, value=sign) if isinstance(b, Tensor) else torch.add(c, a, alpha=sign * b)


def torch_fms(c: Any, a: Any, b: Any) -> Any:
    """c - a b, in one pass."""
    return _fma(c, a, b, -1)


def torch_root(a: Tensor) -> Tensor:
    """`root`, of a tensor."""
    if torch._C._are_functorch_transforms_active():  # forward over forward differentiates it once more
        none = a <= 0
        return torch.where(none, 0.0, torch.where(none, 1.0, a).sqrt())
    return a.relu().sqrt()


def torch_over(a: Any, b: Tensor) -> Tensor:
    """`over`, of tensors."""
    zero = b == 0
    return torch.where(zero, 0.0, a / (torch.where(zero, 1.0, b) if torch._C._are_functorch_transforms_active() else b))


@cache
def in_torch(made: Generated) -> Callable[..., tuple[Any, ...]]:
    """The program as a function of tensors and numbers."""
    names: dict[str, Any] = {"fma": _fma, "fms": torch_fms, "root": torch_root, "over": torch_over}
    exec(made.text, names)
    return names["f"]
