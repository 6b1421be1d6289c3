"""Measure what problems cost: the error of the meta-gradient, compared with one in which some of them are repaired.

A module y = f(x) that loses second-order terms is repaired by finite differences of its first order. With J the
Jacobian of f, g the cotangent of ct_x = Jᵀ ct_y, and ∂_h the derivative at h = 0:

    ct_ct_y = J g = ∂_h f(x + h g)        ct_x' = ∂_x <ct_y, J g> = ∂_h J(x + h g)ᵀ ct_y

ct_x' is the part of x's cotangent that comes through ct_x. A line that detaches is repaired by not detaching.

The true meta-gradient is the engine's own chain of Hessian-vector products, each by finite differences of the inner
gradient. The optimizer's part of that chain is computed as in `mk.MAML`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from metakern.diagnosis.causes import Taps
from metakern.diagnosis.places import Patient, State, is_float
from metakern.diagnosis.report import LOSS, Problem
from metakern.meta.batches import Outer
from metakern.meta.batching import Loop
from metakern.meta.parameters import put
from metakern.meta.slopes import Tensors, norm, slope
from metakern.meta.unroll import Gradients, Unroll, added, derivatives, with_zeros
from metakern.optim import InnerOptimizer


class Costs:
    """Computes meta-gradients of one task, with given problems repaired."""

    def __init__(self, patient: Patient, inner: InnerOptimizer, steps: int) -> None:
        self.patient, self.steps = patient, steps
        self.inner = copy.deepcopy(inner)
        self.inner.prepare(patient.parameters.adapted)
        self.inner.to(patient.dtype)

    def store(self, repaired: Sequence[Problem] = (), first_order: bool = False) -> list[Tensor]:
        """Returns the meta-gradient by autograd."""
        return self._run(lambda batching: Unroll(batching, self.inner, self.steps, first_order).store, repaired)

    def forward_over_reverse(self) -> list[Tensor]:
        """Returns the meta-gradient by autograd, with Hessian-vector products forward over reverse."""
        return self._run(lambda batching: Unroll(batching, self.inner, self.steps).recompute, ())

    def truth(self, repaired: Sequence[Problem] = ()) -> list[Tensor]:
        """Returns the meta-gradient by finite differences of the inner gradient."""
        return self._run(lambda batching: _ByDifferences(batching, self.inner, self.steps).recompute, repaired)

    def _run(self, strategy: Callable[..., Any], repaired: Sequence[Problem]) -> list[Tensor]:
        theta, shared = (list(p.values()) for p in (self.patient.parameters.adapted, self.patient.parameters.shared))
        support, query = (
            tree_map_only(Tensor, lambda t: t.unsqueeze(0), batch)
            for batch in (self.patient.support, self.patient.query)
        )
        with self.patient.steady(), ExitStack() as stack:
            stack.enter_context(Taps(frozenset(site for p in repaired for site in p.undo)).open())
            for path in {p.path for p in repaired if repairable(p) and not p.undo}:
                _repair(stack, self.patient.model.get_submodule(path))
            phi = [p.detach().expand(1, *p.shape) for p in theta]
            found = strategy(_Steady(self.patient))(phi, shared, support, Outer(query, (self.steps,)))
        return [g.detach() for g in with_zeros([*found.summed, *found.shared], [*theta, *shared])]


class _Steady(Loop):
    """A loop over tasks in which each evaluation begins in the same random state, with the same buffers."""

    def __init__(self, patient: Patient) -> None:
        super().__init__(patient.parameters, lambda model, batch: patient.value(batch))
        self.begin, self.state = patient.begin, State(patient.model)  # with what is repaired

    def one(self, batch: Any, phi: Sequence[Tensor]) -> Tensor:
        self.begin(self.state)
        return super().one(batch, phi)


def repairable(problem: Problem) -> bool:
    """Returns whether a meta-gradient without this problem can be computed."""
    return bool(problem.undo) or (problem.order == 2 and problem.path != LOSS)


def distance(a: Tensors, b: Tensors) -> float:
    """Returns the norm of the difference of two meta-gradients."""
    return norm([x - y for x, y in zip(a, b, strict=True)])


class _ByDifferences(Unroll):
    """The engine's unroll with Hessian-vector products by finite differences of the gradient."""

    def hessian_vector_product(
        self, phi: Sequence[Tensor], shared: Sequence[Tensor], batch: Any, v: Gradients, *ct_read: Tensor | None
    ) -> tuple[list[Tensor], Gradients]:
        def gradients(at: Tensors, weights: Tensor | None = None) -> list[Tensor]:
            with torch.enable_grad():
                leaves = [p.detach().requires_grad_() for p in at]
                inputs, losses = [*leaves, *shared], self.batching.losses(leaves, batch)
                total = losses.sum() if weights is None else losses @ weights
                return with_zeros(derivatives(total, inputs), inputs)

        products: Gradients = slope(gradients, phi, with_zeros(v, phi))
        for ct_losses in ct_read:
            products = added(products, gradients(phi, ct_losses))
        return gradients(phi)[: len(phi)], products


def _repair(stack: ExitStack, module: nn.Module) -> None:
    """Replaces the forward of a module, as long as `stack` is open, by one with second derivatives by differences."""
    original = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        inputs, spec = tree_flatten((args, kwargs))
        flows = [i for i, x in enumerate(inputs) if is_float(x)]
        places = [(m, n, p) for m in module.modules() for n, p in m._parameters.items() if p is not None]
        own = list({id(p): p for *_, p in places}.values())
        result: list[Any] = []

        def run(x: Sequence[Tensor]) -> list[Tensor]:
            for i, tensor in zip(flows, x, strict=False):
                inputs[i] = tensor.clone()
            values = dict(zip(map(id, own), x[len(flows) :], strict=True))
            put((m, n, values[id(p)]) for m, n, p in places)
            args, kwargs = tree_unflatten(inputs, spec)
            try:
                result[:] = tree_flatten(original(*args, **kwargs))
            finally:
                put(places)
            return [y for y in result[0] if is_float(y)]

        exact = _Exact.apply(run, *(inputs[i] for i in flows), *own)
        rest = iter(exact if isinstance(exact, tuple) else (exact,))
        return tree_unflatten([next(rest) if is_float(y) else y for y in result[0]], result[1])

    vars(module)["forward"] = forward
    stack.callback(vars(module).pop, "forward", None)


Run = Callable[[Sequence[Tensor]], list[Tensor]]


class _Exact(Function):
    """The outputs y = f(x) of a module, for x its inputs and parameters."""

    @staticmethod
    def forward(ctx: Any, run: Run, *x: Tensor) -> tuple[Tensor, ...]:
        ctx.run = run
        ctx.save_for_backward(*x)
        with torch.enable_grad():
            return tuple(y.detach() for y in run([t.detach() for t in x]))

    @staticmethod
    def backward(ctx: Any, *ct: Tensor) -> tuple:
        return (None, *_ExactVjp.apply(ctx.run, len(ct), *ct, *ctx.saved_tensors))


class _ExactVjp(Function):
    """The cotangents ct_x = Jᵀ ct_y of a module, whose own backward is by finite differences."""

    @staticmethod
    def forward(ctx: Any, run: Run, n: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.run, ctx.n = run, n
        ctx.save_for_backward(*tensors)
        return tuple(_with_vjp(run, tensors[n:], tensors[:n])[1])

    @staticmethod
    def backward(ctx: Any, *g: Tensor) -> tuple:
        ct, x = ctx.saved_tensors[: ctx.n], ctx.saved_tensors[ctx.n :]
        found = slope(lambda x: [t for part in _with_vjp(ctx.run, x, ct) for t in part], x, g)
        return (None, None, *found)


def _with_vjp(run: Run, x: Sequence[Tensor], ct: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Returns the outputs of `run` at x, and the cotangents of x for the cotangents `ct` of the outputs."""
    with torch.enable_grad():
        leaves = [t.detach().requires_grad_() for t in x]
        y = run(leaves)
        on = [(a, c) for a, c in zip(y, ct, strict=True) if a.requires_grad]
        return [t.detach() for t in y], with_zeros(derivatives([a for a, _ in on], leaves, [c for _, c in on]), leaves)
