"""`cross_entropy` alone: extreme logits, tasks without a kept token, and errors."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import metakern as mk
from metakern.ops.core.spec import Make


def orders(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the losses, the gradient of their sum, and a Hessian-vector product."""
    logits = logits.clone().requires_grad_()
    y = mk.ops.cross_entropy(logits, target)
    (g,) = torch.autograd.grad(y.sum(), logits, create_graph=True)
    return y, g, torch.autograd.grad((g * torch.arange(g.shape[-1])).sum(), logits)[0]


def test_equals_torch() -> None:
    make = Make(seed=2)
    logits, target = make(6, 5), make.integers(5, 6)
    target[2] = -100
    torch.testing.assert_close(mk.ops.cross_entropy(logits, target), F.cross_entropy(logits, target))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_extreme_logits_are_finite_at_every_order(dtype: torch.dtype) -> None:
    logits = (1e4 * torch.eye(4)).expand(2, 4, 4).to(dtype) * torch.tensor([1, -1]).view(2, 1, 1)
    target = torch.tensor([[0, 1, 2, 0], [1, 2, 3, 3]])
    y, g, h = orders(logits, target)
    assert all(t.isfinite().all() for t in (y, g, h))
    torch.testing.assert_close(y[0], torch.tensor(2500.0, dtype=dtype), rtol=4e-3, atol=0)
    assert torch.equal(g[0, :3], torch.zeros(3, 4, dtype=dtype))


def test_a_task_without_a_kept_token_gives_zero_and_zero_derivatives() -> None:
    logits = Make(seed=3)(2, 3, 4)
    target = torch.tensor([[-100, -100, -100], [1, -100, 2]])
    for t in orders(logits, target):
        assert torch.equal(t[0], torch.zeros_like(t[0]))
        assert t[1].any()


@pytest.mark.parametrize(
    ("logits", "target", "error", "message"),
    [
        (torch.ones(4), torch.ones(4).long(), ValueError, r"logits must have shape \[N, V\] or \[T, N, V\], got \[4\]"),
        (
            torch.ones(2, 4),
            torch.ones(3).long(),
            ValueError,
            r"cross_entropy: target must have shape \[N\] = \[2\], got \[3\]",
        ),
        (
            torch.ones(5, 2, 4),
            torch.ones(2).long(),
            ValueError,
            r"target must have shape \[T, N\] = \[5, 2\], got \[2\]",
        ),
        (torch.ones(2, 4), torch.ones(2), TypeError, "cross_entropy: target must be int64 or int32, got torch.float32"),
        (torch.ones(2, 4), torch.tensor([3, 4]), ValueError, r"cross_entropy: target must be in \[0, 4\), got 4"),
        (torch.ones(2, 4), torch.tensor([-1, 0]), ValueError, r"cross_entropy: target must be in \[0, 4\), got -1"),
        (torch.ones(2, 4).int(), torch.tensor([0, 0]), TypeError, "logits must be floating point, got torch.int32"),
    ],
)
def test_errors(logits: Tensor, target: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        mk.ops.cross_entropy(logits, target)
