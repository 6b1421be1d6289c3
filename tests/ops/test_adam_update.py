"""`adam_update` alone: the square root at zero, and errors."""

import pytest
import torch

import metakern as mk

ARGUMENTS = [[torch.ones(2, 3)] for _ in range(4)]


@pytest.mark.parametrize("backend", [b for b in ("reference", "triton") if mk.backends()[b] == "available"])
def test_no_nan_where_gradients_and_moments_are_zero(backend: str) -> None:
    """At the first step, phi' as a function of grad has the slope -lr / eps there and no second derivative."""
    phi, grad, m, v = (torch.zeros(2, 3, requires_grad=True) for _ in range(4))
    with mk.backend(backend):
        (moved,), _, _ = mk.ops.adam_update([phi], [grad], [m], [v], 0.1, step=1, eps=0.5)
        ct = torch.rand(2, 3, requires_grad=True)
        (ct_grad,) = torch.autograd.grad(moved, grad, ct, create_graph=True)
        torch.testing.assert_close(ct_grad, -0.1 / 0.5 * ct)
        second = torch.autograd.grad(ct_grad, [grad, m, v], torch.rand(2, 3))
    assert all(torch.equal(s, torch.zeros(2, 3)) for s in second)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (ARGUMENTS, {"lr": 0.1, "step": 0}, "adam_update: step must be at least 1, got 0"),
        ([*ARGUMENTS[:3], []], {"lr": 0.1, "step": 1}, "v must have an entry for each of the 1 tensors of phi, got 0"),
        (
            [*ARGUMENTS[:2], [torch.ones(2)], ARGUMENTS[3]],
            {"lr": 0.1, "step": 1},
            r"m\[0\] must have shape that of phi",
        ),
        (ARGUMENTS, {"lr": torch.ones(3), "step": 1}, r"adam_update: lr must have shape \[\] or \[T\] = \[2\], got"),
    ],
)
def test_errors(arguments: list, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mk.ops.adam_update(*arguments, **options)


def test_updates_of_no_parameters_are_empty() -> None:
    assert mk.ops.adam_update([], [], [], [], 0.1, step=1) == ([], [], [])
