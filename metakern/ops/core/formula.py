"""Derive the four rules of an element-wise formula, as Python text that runs in PyTorch and in Triton.

A formula is a graph of nodes. The rules are graphs that are derived from it:

    forward   y      = f(x)
    jvp       t_y    = Σ ∂y/∂x t_x       node by node, from the inputs to the outputs
    vjp       ct_x   = Σ ct_y ∂y/∂x      node by node, from the outputs to the inputs
    vjp_jvp   t_ct_x                     the tangent of the vjp

| node | value | tangent |
|---|---|---|
| a + b, a - b, a * b | | t_a + t_b, t_a - t_b, t_a b + a t_b |
| y = a / b | | (t_a - y t_b) / b |
| y = over(a, b) | a / b, and 0 where b = 0 | over(t_a - y t_b, b) |
| y = root(a) | √a, and 0 where a <= 0 | over(t_a / 2, y), which is 0 where a <= 0 |
| fma(c, a, b), fms(c, a, b) | c + a b, c - a b, for a product that is used once | |

Equal nodes are one node (common-subexpression elimination). An absent input is the node ZERO, and every term that it
makes zero is left out of the text.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Node:
    """An operation on other nodes, a named input, or a number."""

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
        if self.kind == "*" and self.args[1].kind == "number":  # multiply it by the factor that may be a smaller tensor
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


_NAMES = {"/": "quotient"}  # of functions in a text; the quotients of Triton's operator are not rounded correctly
_OPERATORS = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv}
ZERO, ONE = _node(0), _node(1)


def symbol(name: str) -> Node:
    """Returns the input of this name."""
    return _made("input", name)


def root(a: Node) -> Node:
    """Returns √a, or 0 where a <= 0. Its derivative is 0 where a <= 0."""
    return a if a is ZERO else _made("root", a)


def over(a: Node, b: Node) -> Node:
    """Returns a / b, or 0 where b = 0."""
    return a if a is ZERO else _made("over", a, b)


def tangents(outputs: Iterable[Node], t: Mapping[Node, Node]) -> tuple[Node, ...]:
    """Returns the tangents of `outputs`, given the tangents `t` of the inputs; inputs that `t` lacks have none."""
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
    """Returns the cotangents of `inputs`, given the cotangents `ct` of the outputs."""
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


def _sorted(outputs: Iterable[Node], leaves: Collection[Node] = ()) -> list[Node]:
    """Returns all nodes that the outputs depend on, in topological order: each after its arguments.

    The arguments of `leaves` are left out.
    """
    seen: dict[Node, None] = {}

    def visit(node: Node) -> None:
        if node not in seen:
            for a in node.args if node.kind not in ("input", "number") and node not in leaves else ():
                visit(a)
            seen[node] = None

    for output in outputs:
        visit(output)
    return list(seen)


@dataclass(frozen=True)
class Generated:
    """The Python text of a function `f`.

    inputs: The names of its parameters. given: for each output of the rule, whether `f` returns it. numbers: the text
        that computes the inputs n0, n1, … from numbers alone; None if there are none.
    """

    name: str
    text: str
    inputs: tuple[str, ...]
    given: tuple[bool, ...]  # False for an output that is zero or not wanted
    numbers: Generated | None = None


@cache
def program(
    formula: Callable[..., tuple[Node, ...]],
    inputs: int,
    rule: str,
    present: frozenset[str],
    wanted: tuple[bool, ...] | None = None,
    merged: bool = True,
    numbers: frozenset[str] = frozenset(),
) -> Generated:
    """Returns the text of one rule of y = formula(x0, x1, …), with `inputs` as the number of the formula's inputs.

    Parameters are named x0, … for inputs, t0, … for their tangents, ct0, … for the cotangents of outputs, and t_ct0, …
    for the tangents of these. Those that are not in `present` are zero. `wanted` marks the outputs to compute, all if
    None. `merged` allows fma and fms in the text. What depends on the parameters in `numbers` alone is left to Python,
    which computes it in float64: 1 - 0.999 has lost 14 of 24 bits in float32.
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
    name, made = f"{formula.__name__.strip('_')}_{rule}", [y for y, g in zip(outputs, given, strict=True) if g]
    apart = _of_numbers(made, numbers)
    text, read = _text(made, merged, apart)
    if not apart:
        return Generated(name, text, read, given)
    return Generated(name, text, read, given, Generated(name, *_text(apart, False), (True,) * len(apart)))


def _of_numbers(outputs: list[Node], numbers: frozenset[str]) -> list[Node]:
    """Returns the operations on `numbers` alone whose results other nodes or the outputs need."""
    alone: dict[Node, bool] = {}
    needed = dict.fromkeys(outputs)
    for node in _sorted(outputs):
        if node.kind in ("input", "number"):
            alone[node] = node.kind == "number" or node.args[0] in numbers
        else:
            alone[node] = all(alone[a] for a in node.args)
            needed |= dict.fromkeys(() if alone[node] else node.args)
    return [node for node in needed if alone[node] and node.kind not in ("input", "number")]


def _text(outputs: list[Node], merge: bool, apart: Sequence[Node] = ()) -> tuple[str, tuple[str, ...]]:
    """Returns the text, a line for each node, and the inputs that it reads.

    `merge` fuses a product into a sum by fma or fms, if that sum is its only use. The nodes `apart` are the inputs n0,
    n1, and so on.
    """
    names = {node: f"n{i}" for i, node in enumerate(apart)}
    nodes = _sorted(outputs, apart)
    uses = Counter(a for node in nodes if node.kind not in ("input", "number") and node not in names for a in node.args)
    uses.update(outputs)
    merged: dict[Node, Node] = {}  # product -> the sum that it is fused into
    for node in nodes:
        if merge and node.kind in ("+", "-") and node not in names:
            for a in node.args[::-1] if node.kind == "+" else node.args[1:]:
                if a.kind == "*" and uses[a] == 1 and node not in merged.values():
                    merged[a] = node
    lines: list[str] = []
    read: list[str] = []
    for node in nodes:
        if node in merged:
            continue
        if node in names:
            read.append(names[node])
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
        elif node.kind in _OPERATORS and node.kind != "/":
            value = f" {node.kind} ".join(names[a] for a in node.args)
        else:
            value = f"{_NAMES.get(node.kind, node.kind)}({', '.join(names[a] for a in node.args)})"
        lines.append(f"    {names[node]} = {value}\n")
    results = "".join(f"{names[y]}, " for y in outputs)
    return f"def f({', '.join(read)}):\n{''.join(lines)}    return ({results})\n", tuple(read)


def _fma(c: Any, a: Any, b: Any, sign: int = 1) -> Any:
    """Returns c + sign a b, as one operation of PyTorch if c is a tensor."""
    if not isinstance(a, Tensor):
        a, b = b, a
    if not isinstance(c, Tensor) or not isinstance(a, Tensor):
        return c + sign * a * b
    return torch.addcmul(c, a, b, value=sign) if isinstance(b, Tensor) else torch.add(c, a, alpha=sign * b)


def torch_fms(c: Any, a: Any, b: Any) -> Any:
    """Returns c - a b, as one operation of PyTorch if c is a tensor."""
    return _fma(c, a, b, -1)


def torch_root(a: Tensor) -> Tensor:
    """Computes `root` for a tensor."""
    if torch._C._are_functorch_transforms_active():  # forward over forward differentiates it: no inf or NaN slope
        none = a <= 0
        return torch.where(none, 0.0, torch.where(none, 1.0, a).sqrt())
    return a.relu().sqrt()


def torch_over(a: Any, b: Tensor) -> Tensor:
    """Computes `over` for tensors."""
    zero = b == 0
    return torch.where(zero, 0.0, a / (torch.where(zero, 1.0, b) if torch._C._are_functorch_transforms_active() else b))


@cache
def in_python(made: Generated) -> Callable[..., tuple[float, ...]]:
    """Compiles the text to a Python function of numbers."""
    names: dict[str, Any] = {"quotient": operator.truediv, "root": lambda a: max(a, 0.0) ** 0.5}
    names["over"] = lambda a, b: a / b if b else 0.0
    exec(made.text, names)
    return names["f"]


@cache
def in_torch(made: Generated) -> Callable[..., tuple[Any, ...]]:
    """Compiles the text to a Python function of tensors and numbers."""
    names: dict[str, Any] = {"fma": _fma, "fms": torch_fms, "root": torch_root, "over": torch_over}
    names["quotient"] = operator.truediv
    exec(made.text, names)
    return names["f"]
