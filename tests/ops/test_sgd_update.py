"""`sgd_update` alone: one Function for all parameters, mixed rates, and errors."""

import pytest
import torch

import metakern as mk
from metakern.ops.core.spec import Make


def test_updates_of_no_parameters_are_empty() -> None:
    assert mk.ops.sgd_update([], [], 0.1) == []


def test_rates_can_be_numbers_and_tensors_in_one_list() -> None:
    make = Make(seed=2)
    phi, grad, rate = [make(3, 2), make(3, 4)], [make(3, 2), make(3, 4)], make(3).requires_grad_()
    w, b = mk.ops.sgd_update(phi, grad, [0.5, rate])
    torch.testing.assert_close(w, phi[0] - 0.5 * grad[0])
    torch.testing.assert_close(b, phi[1] - rate[:, None] * grad[1])
    ct = make(3, 4)
    torch.testing.assert_close(torch.autograd.grad(b, rate, ct)[0], -(ct * grad[1]).sum(1))


def test_one_autograd_function_updates_all_parameters() -> None:
    phi = [torch.ones(2, n, requires_grad=True) for n in range(1, 5)]
    y = mk.ops.sgd_update(phi, phi, 0.5)
    assert len({yi.grad_fn for yi in y}) == 1


@pytest.mark.parametrize(
    ("phi", "grad", "lr", "error", "message"),
    [
        (
            [torch.ones(2)],
            [],
            0.1,
            ValueError,
            "sgd_update: grad must have an entry for each of the 1 tensors of phi, got 0",
        ),
        (
            [torch.ones(2)],
            [torch.ones(2)],
            [0.1, 0.2],
            ValueError,
            "lr must have an entry for each of the 1 tensors of phi, got 2",
        ),
        (
            [torch.ones(2)],
            [torch.ones(3)],
            0.1,
            ValueError,
            r"grad\[0\] must have shape that of phi\[0\] = \[2\], got \[3\]",
        ),
        ([torch.ones(2)], [torch.ones(2).double()], 0.1, TypeError, r"sgd_update: grad\[0\] must have the dtype"),
        (
            [torch.ones(2, 5)],
            [torch.ones(2, 5)],
            torch.ones(3),
            ValueError,
            r"lr must have shape \[\] or \[T\] = \[2\], got",
        ),
        (
            [torch.ones(2, 5)],
            [torch.ones(2, 5)],
            [torch.ones(5)],
            ValueError,
            r"lr\[0\] must have .* or \[2, 5\], got \[5\]",
        ),
        ([torch.ones(())], [torch.ones(())], torch.ones(3), ValueError, r"lr must have shape \[\], got \[3\]"),
        ([torch.ones(2)], [torch.ones(2)], torch.ones(2).double(), TypeError, "lr must have the dtype torch.float32"),
    ],
)
def test_errors(phi: list, grad: list, lr: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        mk.ops.sgd_update(phi, grad, lr)


def test_momentum_needs_buffers() -> None:
    with pytest.raises(ValueError, match="sgd_update: b must be given with momentum, got None"):
        mk.ops.sgd_update([torch.ones(2)], [torch.ones(2)], 0.1, momentum=0.5)
