"""`lora_linear` alone: a base that has no derivative and is not copied for a task, and errors."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwd
from storages import Storages
from torch import Tensor

import metakern as mk
from metakern.ops.core.spec import Make

BACKENDS = [name for name in ("reference", "cpu") if mk.backends()[name] == "available"]
T, N, SIZE, OUT, R = 3, 2, 30, 40, 2


def reverse_over_reverse(loss: Callable, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    g = torch.autograd.grad(loss(*inputs), inputs, create_graph=True)
    return (*g, *torch.autograd.grad(sum((gi * gi).sum() for gi in g), inputs))


def forward_over_reverse(loss: Callable, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    with fwd.dual_level():
        duals = [fwd.make_dual(x, x.detach().cos()) for x in inputs]
        return tuple(t for g in torch.autograd.grad(loss(*duals), duals) for t in fwd.unpack_dual(g))


ORDERS = pytest.mark.parametrize("order", [reverse_over_reverse, forward_over_reverse])


@pytest.fixture
def problem() -> tuple[Tensor, Callable[..., Tensor], Callable[..., Tensor], list[Tensor]]:
    """The base, a loss of (x, A, B) by the op, the same loss by plain operations, and the inputs x, A and B."""
    make = Make(seed=1)
    weight, bias, ct = make(OUT, SIZE), make(OUT), make(T, N, OUT)
    inputs = [make(T, N, SIZE), make(T, R, SIZE), make(T, OUT, R)]

    def ours(x: Tensor, A: Tensor, B: Tensor, op: Callable = mk.ops.lora_linear) -> Tensor:
        return (ct * op(x, weight, A, B, 0.7, bias).sin()).sum()

    def merged(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        return (ct * (torch.einsum("tni,toi->tno", x, weight + 0.7 * B @ A) + bias).sin()).sum()

    return weight, ours, merged, [x.requires_grad_() for x in inputs]


def mapped(*args: Any) -> Tensor:
    return torch.func.vmap(mk.ops.lora_linear, (0, None, 0, 0, None, None))(*args)


@ORDERS
@pytest.mark.parametrize("op", [mk.ops.lora_linear, mapped])
@pytest.mark.parametrize("backend", BACKENDS)
def test_holds_nothing_of_the_size_of_the_base_at_any_order(
    order: Callable, op: Callable, backend: str, problem: Any
) -> None:
    """Neither the results of operations nor the tensors that autograd saves have as many elements as the base."""
    weight, ours, merged, inputs = problem
    saved: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() != weight.data_ptr():
            saved.append(tensor.untyped_storage().nbytes() // tensor.element_size())
        return tensor

    with mk.backend(backend), Storages(weight) as found, torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        results = order(partial(ours, op=op), inputs)
    with Storages(weight) as others:
        expected = order(merged, inputs)
    for a, b in zip(results, expected, strict=True):
        torch.testing.assert_close(a, b)
    assert max(found.elements, *saved) < OUT * SIZE < T * OUT * SIZE <= others.elements


def test_the_base_takes_one_product_over_all_tasks_in_each_rule(problem: Any) -> None:
    """In all four rules if x requires a gradient, otherwise in the forward alone."""
    weight, ours, _, inputs = problem
    with mk.backend("reference"), Storages(weight) as found:
        reverse_over_reverse(ours, inputs)
    assert found.products == 4
    x = inputs[0].detach()
    with mk.backend("reference"), Storages(weight) as found:
        reverse_over_reverse(lambda A, B: ours(x, A, B), inputs[1:])
    assert found.products == 1


@ORDERS
def test_shared_factors_and_strided_bases(order: Callable, problem: Any) -> None:
    """A and B are expanded over the tasks, or have no dimension of tasks; the base is stored transposed."""
    weight, _, _, inputs = problem
    x, A, B = inputs[0], inputs[1][0].detach().requires_grad_(), inputs[2][0].detach().requires_grad_()
    stored = weight.mT.contiguous()
    ct = Make(seed=2)(T, N, OUT)

    def loss(f: Callable) -> Callable[..., Tensor]:
        return lambda x, A, B: (ct * f(x, A, B).sin()).sum()

    def expanded(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        A, B = (p.unsqueeze(0).expand(T, *p.shape) for p in (A, B))
        return mk.ops.lora_linear(x, stored.mT, A, B, 0.7)

    expected = order(loss(lambda x, A, B: x @ (weight + 0.7 * B @ A).mT), [x, A, B])
    ours = (expanded, lambda x, A, B: mk.ops.lora_linear(x, stored.mT, A, B, 0.7))
    for f in ours:
        for a, b in zip(order(loss(f), [x, A, B]), expected, strict=True):
            torch.testing.assert_close(a, b)


def test_a_base_of_each_member_under_vmap() -> None:
    make = Make(seed=3)
    x, weight, A, B = make(4, 3, 5), make(4, 2, 5), make(4, 1, 5), make(4, 2, 1)
    many = torch.func.vmap(mk.ops.lora_linear)(x, weight, A, B)
    each = [mk.ops.lora_linear(*args) for args in zip(x, weight, A, B, strict=True)]
    torch.testing.assert_close(many, torch.stack(each))


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_the_base_has_no_derivative(name: str) -> None:
    make = Make(seed=4)
    base = {"weight": make(3, 4), "bias": make(3)}

    def f(value: Tensor) -> Tensor:
        return mk.ops.lora_linear(make(2, 4), A=make(1, 4), B=make(3, 1), **base | {name: value})

    with pytest.raises(ValueError, match=f"^lora_linear: {name} must not require a gradient, got one that does$"):
        f(base[name].clone().requires_grad_())
    with pytest.raises(ValueError, match=f"^lora_linear: {name} must not have a tangent, got one that has$"):
        torch.func.jvp(f, (base[name],), (base[name],))


ones = torch.ones


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        (
            (ones(2, 3), ones(4, 3), ones(1, 5), ones(4, 1)),
            ValueError,
            r"x must have shape \[..., in\] = \[..., 5\], got \[2, 3\]",
        ),
        (
            (ones(2, 7, 3), ones(4, 3), ones(3, 1, 3), ones(3, 4, 1)),
            ValueError,
            r"x must have shape \[T, ..., in\] = \[3, ..., 3\], got \[2, 7, 3\]",
        ),
        ((ones(2, 3), ones(4, 3), ones(3), ones(4, 1)), ValueError, r"A must have shape \[R, in\] or \[T, R, in\]"),
        (
            (ones(2, 3), ones(4, 5), ones(1, 3), ones(4, 1)),
            ValueError,
            r"weight must have shape \[out, in\] = \[..., 3\], got \[4, 5\]",
        ),
        (
            (ones(2, 3), ones(2, 4, 3), ones(2, 1, 3), ones(2, 4, 1)),
            ValueError,
            r"weight must have shape \[out, in\] = \[..., 3\], got \[2, 4, 3\]",
        ),
        (
            (ones(2, 3), ones(4, 3), ones(2, 3), ones(4, 1)),
            ValueError,
            r"B must have shape \[out, R\] = \[4, 2\], got \[4, 1\]",
        ),
        (
            (ones(2, 3), ones(4, 3), ones(2, 1, 3), ones(4, 1)),
            ValueError,
            r"B must have shape \[T, out, R\] = \[2, 4, 1\], got \[4, 1\]",
        ),
        (
            (ones(2, 3), ones(4, 3), ones(1, 3), ones(4, 1), 1.0, ones(3)),
            ValueError,
            r"bias must have shape \[out\] = \[4\], got \[3\]",
        ),
        (
            (ones(2, 3).bfloat16(), ones(4, 3).bfloat16(), ones(1, 3), ones(4, 1)),
            TypeError,
            "A must have the dtype torch.bfloat16 of the other arguments, got torch.float32",
        ),
        ((ones(2, 3), ones(4, 3).char(), ones(1, 3), ones(4, 1)), TypeError, "weight must be floating point, got"),
        ((ones(2, 3), None, ones(1, 3), ones(4, 1)), TypeError, "weight must be a tensor, got NoneType"),
    ],
)
def test_errors(args: tuple, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^lora_linear: {message}"):
        mk.ops.lora_linear(*args)
