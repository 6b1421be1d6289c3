"""Functions without arguments that run an op's rules or the op itself, for benchmarks to time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.autograd.forward_ad as fwd
from torch import Tensor
from torch.utils._pytree import tree_leaves

import metakern as mk
from metakern.ops import SPECS
from metakern.ops.core import backend
from metakern.ops.core.rules import Rules
from metakern.ops.core.spec import Make, Sample

# Rule -> order, as `Spec.cost` has it: a jvp costs as much as a vjp.
ORDERS = {"forward": 0, "jvp": 1, "vjp": 1, "vjp_jvp": 2}
RULES = tuple(ORDERS)
Call = Callable[[], Any]


class Shapes(Make):
    """Makes tensors without memory, for what needs only their shapes."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__(dtype, "meta")

    def __call__(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device)

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.long, device=self.device)


def function(f: Callable[..., Any], sample: Sample) -> tuple[Callable[..., Any], list[Tensor]]:
    """Return f as a function of only the sample's differentiable inputs, and these inputs."""
    at = [i for i, a in enumerate(sample.args) if isinstance(a, Tensor) and a.is_floating_point()]
    at = [i for i in at if i not in sample.frozen]

    def of_inputs(*x: Tensor) -> Any:
        args = list(sample.args)
        for i, value in zip(at, x, strict=True):
            args[i] = value
        return f(*args, **sample.kwargs)

    return of_inputs, [sample.args[i] for i in at]


def recorded(op: str, sample: Sample, name: str) -> dict[str, Call]:
    """Call an op at both orders; return {rule: a function that calls it again with the tensors of that call}.

    All inputs and cotangents have tangents, so each rule does the most work that it can be asked for.
    """
    calls: dict[str, Call] = {}
    choose = backend.choose

    def note(name: str, kernels: Any, tensors: Any) -> Rules:
        rules = choose(name, kernels, tensors)

        def rule(name: str) -> Callable[..., Any]:
            def call(*args: Any) -> Any:
                calls[name] = partial(without_graph, getattr(rules, name), *args)
                return calls[name]()

            return call

        return Rules(*(rule(name) for name in RULES))

    f, x = function(SPECS[op].call, sample)
    with patch.object(backend, "choose", note), mk.backend(name), fwd.dual_level():
        duals = [dual(a.detach().requires_grad_()) for a in x]
        y = tree_leaves(f(*duals))
        torch.autograd.grad(y, duals, [dual(torch.randn_like(fwd.unpack_dual(t).primal)) for t in y])
    return {name: calls[name] for name in RULES}


@torch.no_grad()
def without_graph(rule: Callable[..., Any], *args: Any) -> Any:
    """Call a rule without recording a graph, as an autograd Function does."""
    return rule(*args)


def dual(x: Tensor) -> Tensor:
    """Return x with a random tangent."""
    return fwd.make_dual(x, torch.randn_like(x))


def orders(f: Callable[..., Any], sample: Sample) -> tuple[Call, Call, Call]:
    """Return three functions: forward, forward and backward, and a Hessian-vector product.

    The last one differentiates the backward along a random direction, reverse over reverse, with respect to inputs and
    cotangents, as it happens inside a model.
    """
    f, x = function(f, sample)
    forward = torch.no_grad()(lambda: f(*x))
    leaves, v = [a.detach().requires_grad_() for a in x], [torch.randn_like(a) for a in x]
    ct = [torch.randn_like(y).requires_grad_() for y in tree_leaves(forward())]

    def gradient(create_graph: bool = False) -> tuple[Tensor | None, ...]:
        y = tree_leaves(f(*leaves))
        return torch.autograd.grad(y, leaves, ct, create_graph=create_graph, allow_unused=True)

    def hessian() -> Any:
        ct_x, along = zip(*((g, a) for g, a in zip(gradient(True), v, strict=True) if g is not None), strict=True)
        return torch.autograd.grad(ct_x, [*leaves, *ct], along, allow_unused=True)

    return forward, gradient, hessian
