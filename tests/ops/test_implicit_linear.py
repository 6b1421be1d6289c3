"""`implicit_linear` alone: it equals gradient descent on a weight, forms none, holds a block of rows, and errors."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwd
from largest import Largest
from storages import Storages
from torch import Tensor

import metakern as mk
from metakern.ops.core.spec import Make

room = importlib.import_module("metakern.ops.implicit_linear")
BACKENDS = [name for name in ("reference", "cpu") if mk.backends()[name] == "available"]
ones = torch.ones


def reverse_over_reverse(f: Callable, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    g = torch.autograd.grad(f(*inputs).sin().sum(), inputs, create_graph=True)
    return (*g, *torch.autograd.grad(sum((gi * gi).sum() for gi in g), inputs))


def forward_over_reverse(f: Callable, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    with fwd.dual_level():
        duals = [fwd.make_dual(x, x.detach().cos()) for x in inputs]
        return tuple(t for g in torch.autograd.grad(f(*duals).sin().sum(), duals) for t in fwd.unpack_dual(g))


ORDERS = pytest.mark.parametrize("order", [reverse_over_reverse, forward_over_reverse])


def drawn(T: int, N: int, M: int, size: int, out: int) -> list[Tensor]:
    """Return x, a shared weight, a bias of each task, X, D and rates, which require gradients."""
    make = Make(seed=1)
    shapes = (T, N, size), (out, size), (T, out), (T, M, size), (T, M, out), (T, M)
    return [make(*shape).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("backend", BACKENDS)
def test_meta_gradient_of_gradient_descent_equals_that_of_weights(backend: str) -> None:
    """Two layers, three steps with momentum, learned rates of each step, and tokens of padding in one task."""
    make, steps, momentum = Make(seed=2), 3, 0.7
    theta = [make(6, 4), make(3, 6)]
    lr = torch.tensor([0.3, 0.2, 0.4], dtype=torch.float64)
    x, target, mask = make(2, 5, 4), make(2, 5, 3), torch.ones(2, 5, dtype=torch.float64)
    mask[1, 3:] = 0
    x[1, 3:] = 100.0  # the gradient there is not zero: the rate leaves it out

    def loss(y: Tensor) -> Tensor:
        return ((y - target) ** 2).mean(2).sum()

    def explicit(theta: list[Tensor], lr: Tensor) -> Tensor:
        phi, velocity = [w.expand(2, *w.shape) for w in theta], [torch.zeros_like(w) for w in theta]

        def outputs(phi: list[Tensor]) -> list[Tensor]:
            pre = x @ phi[0].mT
            return [pre, pre.tanh() @ phi[1].mT]

        for k in range(steps):
            y = outputs(phi)
            inputs, cts = [x, y[0].tanh()], torch.autograd.grad(loss(y[-1]), y, create_graph=True)
            grads = [(ct * mask.unsqueeze(2)).mT @ seen for ct, seen in zip(cts, inputs, strict=True)]
            velocity = [momentum * v + g for v, g in zip(velocity, grads, strict=True)]
            phi = [w - lr[k] * v for w, v in zip(phi, velocity, strict=True)]
        return loss(outputs(phi)[-1])

    def implicit(theta: list[Tensor], lr: Tensor) -> Tensor:
        seen: list[list[Tensor]] = [[], []]
        cts: list[list[Tensor]] = [[], []]

        def outputs(k: int) -> tuple[list[Tensor], list[Tensor]]:
            rates = [sum(lr[i] * momentum ** (i - j) for i in range(j, k)) * mask for j in range(k)]
            h, inputs, made = x, [], []
            for i, weight in enumerate(theta):
                inputs.append(h)
                pairs = [torch.cat(parts, 1) for parts in (seen[i], cts[i], rates)] if k else None
                made.append(
                    mk.ops.linear(h, weight) if pairs is None else mk.ops.implicit_linear(h, weight, None, *pairs)
                )
                h = made[-1].tanh()
            return inputs, made

        for k in range(steps):
            inputs, y = outputs(k)
            for i, ct in enumerate(torch.autograd.grad(loss(y[-1]), y, create_graph=True)):
                seen[i].append(inputs[i])
                cts[i].append(ct)
        return loss(outputs(steps)[1][-1])

    results = []
    for f in (explicit, implicit):
        leaves = [t.clone().requires_grad_() for t in (*theta, lr)]
        with mk.backend(backend):
            value = f(leaves[:2], leaves[2])
            results.append([value.detach(), *torch.autograd.grad(value, leaves)])
    torch.testing.assert_close(results[1], results[0], rtol=1e-11, atol=1e-11)


def second(f: Callable, inputs: list[Tensor], i: int, j: int) -> tuple[Tensor, ...]:
    """Return the derivatives of the cotangent of input i by input j and by ct, in both modes."""
    draw, leaves = Make(seed=3), [t.detach().requires_grad_(k in (i, j)) for k, t in enumerate(inputs)]
    v = draw(*inputs[i].shape)
    y = f(*leaves)
    ct, t_ct = draw(*y.shape).requires_grad_(), draw(*y.shape)
    (ct_i,) = torch.autograd.grad(y, leaves[i], ct, create_graph=True)
    by_reverse = torch.autograd.grad(ct_i, [leaves[j], ct], v, allow_unused=True, materialize_grads=True)
    with fwd.dual_level():
        duals = [fwd.make_dual(leaf, v) if k == i else leaf for k, leaf in enumerate(leaves)]
        (ct_j,) = torch.autograd.grad(f(*duals), duals[j], ct.detach(), create_graph=True)
        tangent = fwd.unpack_dual(ct_j).tangent
        (ct_j,) = torch.autograd.grad(f(*duals), duals[j], fwd.make_dual(ct.detach(), t_ct), create_graph=True)
        tangents = (tangent, fwd.unpack_dual(ct_j).tangent)
    return (*by_reverse, *(torch.zeros_like(inputs[j]) if t is None else t.detach() for t in tangents))


def of_correction(f: Callable) -> Callable:
    return lambda x, X, D, rates: f(x, None, None, X, D, rates)


@pytest.mark.parametrize("backend", [*BACKENDS, *["triton"] * (mk.backends()["triton"] == "available")])
def test_every_pair_of_inputs_has_its_second_derivatives(backend: str) -> None:
    """With a tangent of one input and the cotangent of one other wanted, most of the scores are not computed."""
    x, _, _, *pairs = drawn(2, 3, 2, 4, 3)
    inputs = [x, *pairs]
    ours, plain = of_correction(mk.ops.implicit_linear), of_correction(room.SPEC.plain)
    for i in range(len(inputs)):
        for j in range(len(inputs)):
            expected = second(plain, inputs, i, j)
            with mk.backend(backend):
                torch.testing.assert_close(second(ours, inputs, i, j), expected, msg=f"{i}, {j}")


@ORDERS
@pytest.mark.parametrize("backend", BACKENDS)
def test_results_do_not_depend_on_blocks(order: Callable, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = drawn(2, 11, 5, 3, 4)
    with mk.backend(backend):
        expected = order(mk.ops.implicit_linear, inputs)
        monkeypatch.setattr(room, "_LEAST_ROWS", 1)
        for size in (1, 4, 10):
            monkeypatch.setitem(room._BYTES, "cpu", size * 2 * 5 * 8)
            torch.testing.assert_close(order(mk.ops.implicit_linear, inputs), expected)


@ORDERS
@pytest.mark.parametrize("backend", BACKENDS)
def test_holds_neither_a_weight_of_a_task_nor_the_products_of_all_rows_and_pairs(
    order: Callable, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(room._BYTES, "cpu", 0)
    monkeypatch.setattr(room, "_LEAST_ROWS", 8)
    inputs = drawn(3, 70, 60, 40, 50)
    with mk.backend(backend), Largest() as ours:
        results = order(mk.ops.implicit_linear, inputs)
    with Largest() as others:
        expected = order(room.SPEC.plain, inputs)
    torch.testing.assert_close(results, expected)
    assert ours.elements < min(3 * 70 * 60, 2 * 3 * 40 * 50) <= others.elements


def test_an_inner_step_multiplies_only_for_the_cotangent_of_x() -> None:
    """In the backward pass, and in the one through it."""
    x, _, _, X, D, rates = drawn(2, 5, 4, 3, 6)
    h = x.sin()
    with mk.backend("reference"):
        y = mk.ops.implicit_linear(h, None, None, X, D, rates)
        with Storages(h) as found:
            (ct_x,) = torch.autograd.grad(y.sin().sum(), x, create_graph=True)
        assert found.products == 0
        with Storages(X) as found:
            torch.autograd.grad((ct_x * ct_x).sum(), D)
        assert found.products == 3  # t_S for the cotangents of ct_y and D, and S for that of D in the forward


def test_sums_over_blocks_of_half_precision_are_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(room._BYTES, "cpu", 0)
    monkeypatch.setattr(room, "_LEAST_ROWS", 1)
    x, X = ones(1, 600, 1).bfloat16(), ones(1, 1, 1).bfloat16().requires_grad_()
    y = mk.ops.implicit_linear(x, None, None, X, ones(1, 1, 1).bfloat16(), 1.0)
    assert torch.autograd.grad(y.sum(), X)[0].item() == -600  # a sum in bfloat16 would stay at 256


def test_rates_may_be_wider_than_half_precision() -> None:
    x, rates = ones(1, 1).bfloat16(), torch.tensor(1 + 2**-10, requires_grad=True)
    y = mk.ops.implicit_linear(x, None, None, ones(2, 1).bfloat16(), torch.tensor([[1.0], [-1.0]]).bfloat16(), rates)
    assert torch.autograd.grad(y.sum(), rates)[0].dtype == torch.float32
    ours = mk.ops.implicit_linear(x, None, None, 257 * ones(1, 1).bfloat16(), ones(1, 1).bfloat16(), rates)
    assert ours.item() == -torch.tensor(256 * (1 + 2**-10)).bfloat16().item()


def test_a_number_equals_a_rate_of_each_pair() -> None:
    x, weight, _, X, D, _ = (t.detach() for t in drawn(2, 3, 4, 5, 6))
    rates = torch.full((2, 4), 0.3, dtype=torch.float64)
    many = mk.ops.implicit_linear(x, weight, None, X, D, rates)
    for fewer in (0.3, rates[0, 0], rates[0]):
        assert torch.equal(mk.ops.implicit_linear(x, weight, None, X, D, fewer), many)
    assert torch.equal(mk.ops.implicit_linear(x, weight, None, X, D, 0), mk.ops.linear(x, weight))


FITTING: dict[str, Any] = {
    "x": ones(2, 3, 4),
    "weight": ones(5, 4),
    "bias": ones(5),
    "X": ones(2, 6, 4),
    "D": ones(2, 6, 5),
    "rates": 0.1,
}


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"x": ones(2, 3, 5)}, ValueError, r"x must have shape \[T, ..., in\] = \[2, ..., 4\], got \[2, 3, 5\]"),
        ({"x": ones(3, 3, 4)}, ValueError, r"x must have shape \[T, ..., in\] = \[2, ..., 4\], got \[3, 3, 4\]"),
        ({"x": None}, TypeError, "x must be a tensor, got NoneType"),
        ({"X": ones(4)}, ValueError, r"X must have shape \[M, in\] or \[T, M, in\], got \[4\]"),
        ({"D": ones(2, 7, 5)}, ValueError, r"D must have shape \[T, M, out\] = \[2, 6, 5\], got \[2, 7, 5\]"),
        ({"D": ones(6, 5)}, ValueError, r"D must have shape \[T, M, out\] = \[2, 6, 5\], got \[6, 5\]"),
        ({"D": ones(2, 6, 5).double()}, TypeError, "D must have the dtype torch.float32"),
        ({"weight": ones(6, 4)}, ValueError, r"weight must have shape \[out, in\] = \[5, 4\], got \[6, 4\]"),
        (
            {"weight": ones(3, 5, 4)},
            ValueError,
            r"weight must have shape \[T, out, in\] = \[2, 5, 4\], got \[3, 5, 4\]",
        ),
        ({"weight": ones(5, 4).int()}, TypeError, "weight must be floating point, got torch.int32"),
        ({"bias": ones(4)}, ValueError, r"bias must have shape \[out\] = \[5\], got \[4\]"),
        ({"bias": ones(3, 5)}, ValueError, r"bias must have shape \[T, out\] = \[2, 5\], got \[3, 5\]"),
        ({"rates": ones(5)}, ValueError, r"rates must have shape \[T, M\] = \[2, 6\], got \[5\]"),
        ({"rates": ones(2, 1)}, ValueError, r"rates must have shape \[T, M\] = \[2, 6\], got \[2, 1\]"),
        ({"rates": ones(6).int()}, TypeError, "rates must be floating point, got torch.int32"),
        ({"rates": ones(6).double()}, TypeError, "rates must have the dtype torch.float32"),
        ({"rates": "0.1"}, TypeError, "rates must be a tensor or a number, got str"),
        ({"X": ones(6, 4), "D": ones(6, 5), "bias": ones(2, 5)}, ValueError, r"bias must have shape \[out\] = \[5\]"),
        ({"X": ones(6, 4), "D": ones(6, 5), "rates": ones(2, 6)}, ValueError, r"rates must have shape \[M\] = \[6\]"),
    ],
)
def test_errors(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^implicit_linear: {message}"):
        mk.ops.implicit_linear(**FITTING | changed)
