"""`layer_norm` alone: equality with torch, large means, and errors."""

import pytest
import torch
import torch.nn.functional as F

import metakern as mk
from metakern.ops.core.spec import Make


def test_equals_torch_on_its_usual_shapes() -> None:
    make = Make(seed=2)
    weight, bias = make(5), make(5)
    for shape in [(5,), (3, 5), (2, 3, 5), (2, 0, 5)]:
        x = make(*shape)
        torch.testing.assert_close(mk.ops.layer_norm(x, weight, bias, 1e-3), F.layer_norm(x, (5,), weight, bias, 1e-3))


def test_a_large_mean_loses_no_precision_to_cancellation() -> None:
    x = (1e4 + Make(seed=3)(4, 64)).float()
    exact = F.layer_norm(x.double(), (64,))
    # Two roundings of the mean: sums in few lanes are rounded more often.
    assert (mk.ops.layer_norm(x).double() - exact).abs().max() < 2 * 1e4 * torch.finfo(x.dtype).eps


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        (
            (torch.ones(2, 3), torch.ones(4)),
            ValueError,
            r"layer_norm: x must have shape \[..., D\] = \[..., 4\], got \[2, 3\]",
        ),
        (
            (torch.ones(2, 3), torch.ones(1, 3)),
            ValueError,
            r"layer_norm: x must have shape \[T, ..., D\] = \[1, ..., 3\]",
        ),
        ((torch.ones(2, 3), torch.ones(1, 2, 3)), ValueError, r"layer_norm: weight must have shape \[D\] or \[T, D\]"),
        (
            (torch.ones(2, 3), torch.ones(3), torch.ones(2)),
            ValueError,
            r"layer_norm: bias must have shape \[D\] = \[3\], got \[2\]",
        ),
        ((torch.ones(2, 3), None, torch.ones(2)), ValueError, r"layer_norm: x must have shape"),
        ((torch.ones(()),), ValueError, r"layer_norm: x must have shape \[..., D\], got \[\]"),
        ((torch.ones(2, 3), torch.ones(3).half()), TypeError, "layer_norm: weight must have the dtype torch.float32"),
    ],
)
def test_errors(args: tuple, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        mk.ops.layer_norm(*args)
