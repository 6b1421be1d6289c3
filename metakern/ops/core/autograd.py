"""Build a twice-differentiable autograd op from its four rules.

An op y = f(x) is defined by its four rules (`rules.py`). Every combination of reverse and forward mode follows:

    reverse               Op.backward   applies  Vjp            ct_x = vjp(ct_y)
    reverse over reverse  Vjp.backward  applies  VjpTransposed  ct_ct_y = jvp(g), ct_x = vjp_jvp(g, t_r, ct_y, None)
    forward over reverse  Vjp.jvp       applies  VjpTangent     t_ct_x = vjp_jvp(t_x, t_r, ct_y, t_ct_y)
    forward               Op.jvp        applies  Jvp            t_y, t_r = jvp(t_x)
    reverse over forward  Jvp.backward  applies  JvpTransposed  ct_t_x = vjp(ct), ct_x = vjp_jvp(t_x, t_r, ct, None)
    forward over forward  Jvp.jvp       differentiates the reference's jvp, plain PyTorch, once more

Here g are the cotangents of ct_x, and ct those of t_y. The term ∂ₓ⟨ct_y, J t_x⟩ of `vjp_jvp` is the same in all three
rows that use it, so one kernel serves them. A backward never calls a rule itself. It applies another Function, which
autograd can differentiate; otherwise second derivatives would silently be missing terms. Differentiating VjpTransposed,
VjpTangent or JvpTransposed raises NotImplementedError with the op's name.

Every tensor that reaches a rule has the tasks first, `[T, ...]`, with the same T. `torch.func.vmap` folds the mapped
dimension into T. The residuals r of `forward` are outputs of the Function, so that forward mode carries their tangents
t_r to `vjp_jvp`, which need not compute them again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch._functorch.utils import unwrap_dead_wrappers
from torch.autograd import Function

from metakern.native import memory
from metakern.ops.core import backend
from metakern.ops.core.autocast import plainly
from metakern.ops.core.rules import Rules, Tensors


@dataclass(frozen=True)
class Op:
    """A twice-differentiable op, defined by its rules on each backend. docs/extending.md has an example.

    Args:
        name: The op's name in error messages.
        inputs: Names of the differentiable inputs, in the order in which the rules take them.
        kernels: The rules of each backend that has some; "reference" must be among them.
        constants: Names of the tensors that have no derivative, such as targets or lengths.
        outputs: Number of outputs.
        saves_output: Appends the outputs to the residuals, (*r, *y), and their tangents to t_r.
        zero_tangents: Whether the rules receive zeros for an input's zero tangent; if False they receive None, which
            lets them skip a product.
        vjp_residuals: Number of tensors that `vjp` returns after ct_x, for `vjp_jvp` to read as `c.from_vjp`.
    """

    name: str
    inputs: tuple[str, ...]
    kernels: Mapping[str, Rules]
    constants: tuple[str, ...] = ()
    outputs: int = 1
    saves_output: bool = False
    zero_tangents: bool = True
    vjp_residuals: int = 0

    def __call__(self, *x: Tensor | None, **constants: Any) -> tuple[Tensor, ...]:
        """Applies the op and returns its outputs.

        Args:
            x: The differentiable inputs, `[T, ...]` with the same T; None where one is absent.
            constants: The tensors of `self.constants`, and any other values that the rules read, such as `eps`.

        Raises:
            ValueError: If a tensor of `self.constants` requires a gradient, or METAKERN_BACKEND names no backend.
            RuntimeError: If the backend chosen by hand is not available here.
        """
        if torch.compiler.is_dynamo_compiling():  # only then, as _uncompiled imports the compiler; one graph break
            return _uncompiled(self, *x, **constants)
        tensors = tuple(constants.pop(name) for name in self.constants)
        for name, tensor in zip(self.constants, tensors, strict=True):
            if tensor is not None and tensor.requires_grad:
                raise ValueError(f"{self.name}: {name} must not require a gradient, got one that does")
        call = _Call(self, backend.choose(self.name, self.kernels, x), constants)
        return _Op.apply(call, *x, *tensors)[: self.outputs]


@torch._disable_dynamo
def _uncompiled(op: Op, *x: Tensor | None, **constants: Any) -> tuple[Tensor, ...]:
    return op(*x, **constants)


@dataclass(slots=True, eq=False)  # not frozen: one is made at every call
class _Call:
    """The state that the Functions of one call share.

    needs: for each input, whether its cotangent is wanted. residuals: the number of residuals.
    """

    op: Op
    rules: Rules
    options: Mapping[str, Any]
    needs: tuple[bool, ...] = ()
    residuals: int = 0

    def wanting(self, needs: tuple[bool, ...], residuals: int) -> _Call:
        return _Call(self.op, self.rules, self.options, needs, residuals)

    def split(self, values: tuple, *groups: str) -> list[tuple]:
        """Splits a flat tuple into groups: "x" as inputs, "c" constants, "r" residuals, "y" outputs, "q" vjp's own."""
        op = self.op
        sizes = {"x": len(op.inputs), "c": len(op.constants), "r": self.residuals, "y": op.outputs}
        sizes["q"] = op.vjp_residuals
        parts, start = [], 0
        for group in groups:
            parts.append(values[start : start + sizes[group]])
            start += sizes[group]
        return parts

    def saved(self, ctx: Any, *groups: str) -> list[tuple]:
        """Returns the saved tensors, split into groups. Raises ValueError where one's memory was freed meanwhile."""
        tensors = ctx.saved_tensors
        for tensor in tensors:
            if tensor is not None:
                memory.check(self.op.name, "every saved tensor", tensor)
        return self.split(tensors, *groups)

    def namespace(
        self, constants: Tensors, needs: tuple[bool, ...] = (), from_vjp: Tensors | None = None
    ) -> SimpleNamespace:
        named = dict(zip(self.op.constants, constants, strict=True))
        return SimpleNamespace(**self.options, **named, needs=needs or self.needs, from_vjp=from_vjp)

    def tangents(self, t_x: Tensors, x: Tensors) -> Tensors:
        return _filled(t_x, x) if self.op.zero_tangents else t_x

    def residual_tangents(self, c: SimpleNamespace, x: Tensors, r: Tensors, t_x: Tensors) -> Tensors:
        t_y, t_r = plainly(self.rules.jvp, c, x, r, t_x)
        return (*t_r, *t_y) if self.op.saves_output else t_r

    def refuse(self, what: str = "third derivatives") -> NoReturn:
        raise NotImplementedError(
            f"{self.op.name}: {what} are not implemented, metakern's ops are exact to second order"
        )


def _filled(values: Tensors, like: Tensors) -> Tensors:
    """Replaces None by zeros of the primal's shape, except where the primal itself is None."""
    return tuple(torch.zeros_like(b) if a is None and b is not None else a for a, b in zip(values, like, strict=True))


def _cotangents(ct: Tensors, shapes: tuple[torch.Size, ...]) -> Tensors:
    """Replaces None by zeros of the output's shape. At least one of `ct` is a tensor."""
    present = next(c for c in ct if c is not None)
    return tuple(present.new_zeros(shape) if c is None else c for c, shape in zip(ct, shapes, strict=True))


def _pruned(values: Tensors, keep: tuple[bool, ...]) -> tuple[Tensor, ...]:
    return tuple(value for value, kept in zip(values, keep, strict=True) if kept)


def _scattered(values: tuple[Tensor | None, ...], keep: tuple[bool, ...]) -> Tensors:
    """The inverse of `_pruned`: None in the places that were not kept."""
    rest = iter(values)
    return tuple(next(rest) if kept else None for kept in keep)


def _used(ctx: Any) -> tuple[bool, ...]:
    """Returns for each argument of a Function whether the backward pass that is running uses its cotangent.

    `ctx.needs_input_grad` is True for all arguments that require gradients. But torch.autograd.grad asks for those of
    a few tensors: an inner step does not use the cotangents of the parameters that it does not adapt.
    """
    nodes = (node for node, _ in ctx.next_functions)  # of the arguments that are tensors
    runs = (next(nodes) if given else None for given in ctx.given)
    return (False, *(needed and _runs(node) for needed, node in zip(ctx.needs_input_grad[1:], runs, strict=False)))


def _runs(node: Any) -> bool:
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # a leaf that is asked for, of which it can't tell
        return True


class _Rule(Function):
    """The base of all Functions here: zero gradients arrive as None, and vmap folds into the tasks."""

    @classmethod
    def apply(cls, *args: Any) -> Any:
        """Function.apply without its inspection of `forward`'s signature, which costs as much as a small op."""
        if torch._C._are_functorch_transforms_active():
            return super().apply(*args)
        return super(Function, cls).apply(*unwrap_dead_wrappers(args))  # type: ignore[misc]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        call, *tensors = inputs
        ctx.call = call
        ctx.given = tuple(tensor is not None for tensor in tensors)
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)
        ctx.set_materialize_grads(False)

    @classmethod
    def folded(cls, info: Any, in_dims: tuple, call: _Call, *tensors: Tensor | None) -> tuple[tuple, tuple]:
        """Folds [V, T, ...] into [V * T, ...], applies the Function and unfolds its outputs.

        A tensor that is not mapped is expanded, which copies nothing if T = 1.
        """
        size = info.batch_size

        def fold(tensor: Tensor | None, dim: int | None) -> Tensor | None:
            if tensor is None:
                return None
            return (tensor.expand(size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)).flatten(0, 1)

        outputs = cls.apply(call, *(fold(t, d) for t, d in zip(tensors, in_dims[1:], strict=True)))
        return (
            tuple(None if o is None else o.unflatten(0, (size, o.shape[0] // size)) for o in outputs),
            tuple(None if o is None else 0 for o in outputs),
        )


class _Op(_Rule):
    """y and r, from x, constants."""

    @staticmethod
    def forward(call: _Call, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        x, constants = call.split(tensors, "x", "c")
        y, r = plainly(call.rules.forward, call.namespace(constants), x)
        return (*y, *r)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        call, *tensors = inputs
        y, r = output[: call.op.outputs], output[call.op.outputs :]
        kept = (*r, *y) if call.op.saves_output else r
        ctx.shapes = tuple(yi.shape for yi in y)
        ctx.mark_non_differentiable(*(o for o in output if not o.is_floating_point()))
        _Rule.setup_context(ctx, (call.wanting((), len(kept)), *tensors, *kept), ())

    @staticmethod
    def backward(ctx: Any, *ct: Tensor | None) -> tuple:
        call, ct_y = ctx.call, ct[: ctx.call.op.outputs]
        if any(c is not None for c in ct[call.op.outputs :]):
            call.refuse("derivatives through residuals")
        needs = _used(ctx)[1 : 1 + len(call.op.inputs)]
        if not any(needs) or all(c is None for c in ct_y):
            return (None,) * len(ctx.needs_input_grad)
        x, constants, r = call.saved(ctx, "x", "c", "r")
        ct_y = _cotangents(ct_y, ctx.shapes)
        ct_x = _Vjp.apply(call.wanting(needs, call.residuals), *x, *constants, *r, *ct_y)[: sum(needs)]
        return (None, *_scattered(ct_x, needs), *(None for _ in constants))

    @staticmethod
    def jvp(ctx: Any, _: None, *t: Tensor | None) -> tuple:
        call = ctx.call
        x, constants, r = call.saved(ctx, "x", "c", "r")
        t_x, t_constants = call.split(t, "x", "c")
        for name, t_constant in zip(call.op.constants, t_constants, strict=True):
            if t_constant is not None:
                raise ValueError(f"{call.op.name}: {name} must not have a tangent, got one that has")
        return _Jvp.apply(call, *x, *constants, *r, *t_x)

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *args: Any) -> tuple:
        return _Op.folded(info, in_dims, *args)


class _Vjp(_Rule):
    """The wanted ct_x, then the residuals of vjp, from x, constants, r, ct_y."""

    @staticmethod
    def forward(call: _Call, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        x, constants, r, ct_y = call.split(tensors, "x", "c", "r", "y")
        ct_x = plainly(call.rules.vjp, call.namespace(constants), x, r, ct_y)
        return (*_pruned(ct_x[: len(x)], call.needs), *ct_x[len(x) :])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        q = output[sum(inputs[0].needs) :]
        ctx.mark_non_differentiable(*q)
        _Rule.setup_context(ctx, (*inputs, *q), ())

    @staticmethod
    def backward(ctx: Any, *g: Tensor | None) -> tuple:
        call = ctx.call
        x, constants, r, ct_y, q = call.saved(ctx, "x", "c", "r", "y", "q")
        needs, _, _, needs_ct = call.split(_used(ctx)[1:], "x", "c", "r", "y")
        nothing = (None,) * (1 + len(x) + len(constants) + len(r) + len(ct_y))
        g = g[: sum(call.needs)]
        if all(gi is None for gi in g):
            return nothing
        t_x = _scattered(g, call.needs)
        out = _VjpTransposed.apply(call.wanting(needs, call.residuals), *x, *constants, *r, *ct_y, *t_x, *q)
        ct_x = _scattered(out[len(ct_y) :], needs)
        ct_ct_y = (c if n else None for c, n in zip(out[: len(ct_y)], needs_ct, strict=True))
        return (None, *ct_x, *(None for _ in (*constants, *r)), *ct_ct_y)

    @staticmethod
    def jvp(ctx: Any, _: None, *t: Tensor | None) -> tuple:
        call = ctx.call
        x, constants, r, ct_y, q = call.saved(ctx, "x", "c", "r", "y", "q")
        t_x, _, t_r, t_ct_y = call.split(t, "x", "c", "r", "y")
        t_ct_x = _VjpTangent.apply(call, *x, *constants, *r, *t_x, *t_r, *ct_y, *t_ct_y, *q)
        return (*t_ct_x, *(None for _ in q))

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *args: Any) -> tuple:
        return _Vjp.folded(info, in_dims, *args)


class _Jvp(_Rule):
    """t_y and t_r, from x, constants, r, t_x."""

    @staticmethod
    def forward(call: _Call, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        x, constants, r, t_x = call.split(tensors, "x", "c", "r", "x")
        t_y, t_r = plainly(call.rules.jvp, call.namespace(constants), x, r, call.tangents(t_x, x))
        return (*t_y, *t_r)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        call, *tensors = inputs
        t_y, t_r = output[: call.op.outputs], output[call.op.outputs :]
        ctx.shapes = tuple(t.shape for t in t_y)
        _Rule.setup_context(ctx, (call, *tensors, *t_r, *(t_y if call.op.saves_output else ())), ())

    @staticmethod
    def backward(ctx: Any, *ct: Tensor | None) -> tuple:
        call, ct_t_y = ctx.call, ct[: ctx.call.op.outputs]
        if any(c is not None for c in ct[call.op.outputs :]):
            call.refuse()
        x, constants, r, t_x, t_r = call.saved(ctx, "x", "c", "r", "x", "r")
        nothing = (None,) * (1 + 2 * len(x) + len(constants) + len(r))
        if all(c is None for c in ct_t_y):
            return nothing
        needs, _, _, needs_t = call.split(_used(ctx)[1:], "x", "c", "r", "x")
        ct_t_y = _cotangents(ct_t_y, ctx.shapes)
        wanted = call.wanting((*needs, *needs_t), call.residuals)
        out = _scattered(_JvpTransposed.apply(wanted, *x, *constants, *r, *t_x, *t_r, *ct_t_y), (*needs, *needs_t))
        return (None, *out[: len(x)], *(None for _ in (*constants, *r)), *out[len(x) :])

    @staticmethod
    def jvp(ctx: Any, _: None, *t: Tensor | None) -> tuple:
        """Forward over forward: differentiates the reference's jvp, which is plain PyTorch."""
        call = ctx.call
        x, constants, _, t_x, _ = call.saved(ctx, "x", "c", "r", "x", "r")
        t_of_x, _, _, t_of_t = call.split(t, "x", "c", "r", "x")
        c, reference = call.namespace(constants), call.op.kernels["reference"]
        present = tuple(xi is not None for xi in x)

        def tangent(*flat: Tensor) -> tuple[Tensor, ...]:
            primal = _scattered(flat[: sum(present)], present)
            direction = _scattered(flat[sum(present) :], present)
            y, residuals = reference.forward(c, primal)
            t_y, t_residuals = reference.jvp(
                c, primal, (*residuals, *y) if call.op.saves_output else residuals, direction
            )
            return (*t_y, *t_residuals)

        # A dual tensor must not be expanded.
        primals = tuple(p.contiguous() for p in (*_pruned(x, present), *_pruned(_filled(t_x, x), present)))
        directions = (*_pruned(_filled(t_of_x, x), present), *_pruned(_filled(t_of_t, x), present))
        return torch.func.jvp(tangent, primals, directions)[1]

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *args: Any) -> tuple:
        return _Jvp.folded(info, in_dims, *args)


class _Last(_Rule):
    """The base of second-order Functions: it saves nothing, and a derivative of one raises NotImplementedError."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
        ctx.call = inputs[0]

    @staticmethod
    def backward(ctx: Any, *ct: Tensor | None) -> None:
        ctx.call.refuse()

    @staticmethod
    def jvp(ctx: Any, *t: Tensor | None) -> None:
        ctx.call.refuse()


class _VjpTransposed(_Last):
    """Reverse over reverse: ct_ct_y and the wanted ct_x, from x, constants, r, ct_y and the cotangents t_x of ct_x."""

    @staticmethod
    def forward(call: _Call, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        x, constants, r, ct_y, t_x, q = call.split(tensors, "x", "c", "r", "y", "x", "q")
        c, t_x = call.namespace(constants, from_vjp=q), call.tangents(t_x, x)
        t_y, t_r = plainly(call.rules.jvp, c, x, r, t_x)
        if not any(call.needs):
            return t_y
        t_r = (*t_r, *t_y) if call.op.saves_output else t_r
        return (*t_y, *_pruned(plainly(call.rules.vjp_jvp, c, x, r, t_x, t_r, ct_y, None), call.needs))

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *args: Any) -> tuple:
        return _VjpTransposed.folded(info, in_dims, *args)


class _VjpTangent(_Last):
    """Forward over reverse: t_ct_x, from x, constants, r, t_x, t_r, ct_y, t_ct_y."""

    @staticmethod
    def forward(call: _Call, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        x, constants, r, t_x, t_r, ct_y, t_ct_y, q = call.split(tensors, "x", "c", "r", "x", "r", "y", "y", "q")
        c = call.namespace(constants, from_vjp=q)
        some_ct = any(t is not None for t in t_ct_y)
        if all(t is None for t in t_x):
            t_ct_x = plainly(call.rules.vjp, c, x, r, _filled(t_ct_y, ct_y))[: len(x)] if some_ct else (None,) * len(x)
        else:
            t_x = call.tangents(t_x, x)
            if any(t is None for t in t_r):
                t_r = call.residual_tangents(c, x, r, t_x)
            t_ct_x = plainly(call.rules.vjp_jvp, c, x, r, t_x, t_r, ct_y, _filled(t_ct_y, ct_y) if some_ct else None)
        return _filled(_pruned(t_ct_x, call.needs), _pruned(x, call.needs))

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *args: Any) -> tuple:
        return _VjpTangent.folded(info, in_dims, *args)


class _JvpTransposed(_Last):
    """Reverse over forward: the wanted ct_x, then the wanted ct_t_x, from x, constants, r, t_x, t_r, ct_t_y."""

    @staticmethod
    def forward(call: _Call, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        x, constants, r, t_x, t_r, ct_t_y = call.split(tensors, "x", "c", "r", "x", "r", "y")
        needs, needs_t = call.needs[: len(x)], call.needs[len(x) :]
        ct_x = ct_t_x = (None,) * len(x)
        if any(needs):
            t_x = call.tangents(t_x, x)
            ct_x = plainly(call.rules.vjp_jvp, call.namespace(constants, needs), x, r, t_x, t_r, ct_t_y, None)
        if any(needs_t):
            ct_t_x = plainly(call.rules.vjp, call.namespace(constants, needs_t), x, r, ct_t_y)[: len(x)]
        return (*_pruned(ct_x, needs), *_pruned(ct_t_x, needs_t))

    @staticmethod
    def vmap(info: Any, in_dims: tuple, *args: Any) -> tuple:
        return _JvpTransposed.folded(info, in_dims, *args)
