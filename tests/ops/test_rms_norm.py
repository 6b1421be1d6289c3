"""`rms_norm` alone: equality with torch, its default eps, and errors."""

import pytest
import torch
import torch.nn.functional as F

import metakern as mk
from metakern.ops.core.spec import Make


@pytest.mark.parametrize("eps", [None, 1e-2])
def test_equals_torch_on_its_usual_shapes(eps: float | None) -> None:
    make = Make(seed=2)
    weight = make(5)
    for shape in [(5,), (3, 5), (2, 3, 5), (2, 0, 5)]:
        x = make(*shape)
        torch.testing.assert_close(mk.ops.rms_norm(x, weight, eps), F.rms_norm(x, (5,), weight, eps))
        torch.testing.assert_close(mk.ops.rms_norm(x, eps=eps), F.rms_norm(x, (5,), None, eps))
        small = 1e-3 * x.bfloat16()
        torch.testing.assert_close(mk.ops.rms_norm(small, eps=eps), F.rms_norm(small, (5,), None, eps))


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        (
            (torch.ones(2, 3), torch.ones(4)),
            ValueError,
            r"rms_norm: x must have shape \[..., D\] = \[..., 4\], got \[2, 3\]",
        ),
        (
            (torch.ones(2, 3), torch.ones(1, 3)),
            ValueError,
            r"rms_norm: x must have shape \[T, ..., D\] = \[1, ..., 3\]",
        ),
        ((torch.ones(2, 3), torch.ones(1, 2, 3)), ValueError, r"rms_norm: weight must have shape \[D\] or \[T, D\]"),
        ((torch.ones(()),), ValueError, r"rms_norm: x must have shape \[..., D\], got \[\]"),
        ((torch.ones(2, 3), torch.ones(3).half()), TypeError, "rms_norm: weight must have the dtype torch.float32"),
    ],
)
def test_errors(args: tuple, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        mk.ops.rms_norm(*args)
