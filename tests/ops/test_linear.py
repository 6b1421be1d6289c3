"""`linear` alone: expanded weights, which are never copied, cotangents that are not used, and errors."""

import pytest
import torch
import torch.nn.functional as F
from storages import Storages
from torch import Tensor

import metakern as mk
from metakern.ops.core.spec import Make


def test_equals_torch_on_its_usual_shapes() -> None:
    make = Make(seed=2)
    weight, bias = make(3, 4), make(3)
    for shape in [(4,), (5, 4), (2, 5, 4), (0, 4)]:
        x = make(*shape)
        torch.testing.assert_close(mk.ops.linear(x, weight, bias), F.linear(x, weight, bias))


def second(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    """Return the second derivatives of a cubic loss by x, weight and bias."""
    y = mk.ops.linear(x, weight, bias)
    g = torch.autograd.grad((y * y * y).sum(), (x, weight, bias), create_graph=True)
    return torch.autograd.grad(sum((gi * gi.detach().sin()).sum() for gi in g), (x, weight, bias))


def test_an_expanded_weight_equals_its_copies_at_both_orders_and_is_never_copied() -> None:
    make = Make(seed=3)
    x, weight, bias = make(4, 5, 3), make(1, 2, 3).expand(4, 2, 3), make(1, 2).expand(4, 2)
    copies = second(*(t.clone().requires_grad_() for t in (x, weight, bias)))
    with torch.profiler.profile(record_shapes=True) as profile:
        expanded = second(*(t.detach().requires_grad_() for t in (x, weight, bias)))
    for a, b in zip(expanded, copies, strict=True):
        torch.testing.assert_close(a, b)
    copied = [e for e in profile.events() if e.name == "aten::clone" and e.input_shapes[0] == [4, 2, 3]]
    assert not copied


def test_a_backward_pass_computes_only_the_cotangents_that_it_uses() -> None:
    """torch.autograd.grad with respect to x alone multiplies nothing for the weight; later ones still depend on it."""
    make = Make(seed=4)
    x, weight = make(2, 3, 4).requires_grad_(), make(2, 5, 4).requires_grad_()
    found = []
    for f in (mk.ops.linear, lambda h, w: h @ w.mT):
        with mk.backend("reference"):
            h = x.sin()
            y = f(h, weight)
            with Storages(h) as reads:
                (g,) = torch.autograd.grad((y * y).sum(), x, create_graph=True)
            assert reads.products == 0
            with Storages(h) as reads:
                found.append((g, *torch.autograd.grad((g * g).sum(), (x, weight))))
            assert reads.products > 0
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        (
            (torch.ones(2, 3), torch.ones(4, 5)),
            ValueError,
            r"linear: x must have shape \[..., in\] = \[..., 5\], got \[2, 3\]",
        ),
        (
            (torch.ones(3, 2, 5), torch.ones(2, 4, 5)),
            ValueError,
            r"linear: x must have shape \[T, ..., in\] = \[2, ..., 5\], got \[3, 2, 5\]",
        ),
        ((torch.ones(5), torch.ones(5, 4, 5)), ValueError, r"linear: x must have shape \[T, ..., in\]"),
        (
            (torch.ones(5), torch.ones(5)),
            ValueError,
            r"linear: weight must have shape \[out, in\] or \[T, out, in\], got \[5\]",
        ),
        ((torch.ones(5), torch.ones(4, 5), torch.ones(5)), ValueError, r"linear: bias must have shape \[out\] = \[4\]"),
        (
            (torch.ones(2, 5), torch.ones(2, 4, 5), torch.ones(4)),
            ValueError,
            r"bias must have shape \[T, out\] = \[2, 4\]",
        ),
        ((torch.ones(5), torch.ones(4, 5).double()), TypeError, "linear: weight must have the dtype torch.float32"),
        ((torch.ones(5).int(), torch.ones(4, 5)), TypeError, "linear: x must be floating point, got torch.int32"),
        (([1.0], torch.ones(4, 1)), TypeError, "linear: x must be a tensor, got list"),
        ((torch.ones(5), torch.ones(4, 5, device="meta")), ValueError, "linear: weight must be on cpu"),
    ],
)
def test_errors(args: tuple, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        mk.ops.linear(*args)
