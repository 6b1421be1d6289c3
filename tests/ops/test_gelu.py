"""`gelu` alone: equality with torch, extreme values, and errors."""

import pytest
import torch
import torch.nn.functional as F

import metakern as mk
from metakern.ops.core.spec import Make

approximations = pytest.mark.parametrize("approximate", ["none", "tanh"])


@approximations
def test_equals_torch(approximate: str) -> None:
    x = 3 * Make(seed=2)(4, 9)
    torch.testing.assert_close(mk.ops.gelu(x, approximate), F.gelu(x, approximate=approximate))


@approximations
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_values_have_the_derivatives_of_the_limits(approximate: str, dtype: torch.dtype) -> None:
    x = torch.tensor([-1e4, -100.0, 100.0, 1e4], dtype=dtype, requires_grad=True)
    y = mk.ops.gelu(x, approximate)
    (g,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    (h,) = torch.autograd.grad(g.sum(), x)
    assert torch.equal(y, x.relu())
    assert torch.equal(g, (x > 0).to(dtype))
    assert torch.equal(h, torch.zeros_like(x))


def test_errors() -> None:
    with pytest.raises(ValueError, match="gelu: approximate must be 'none' or 'tanh', got 'erf'"):
        mk.ops.gelu(torch.ones(2), "erf")
    with pytest.raises(TypeError, match=r"gelu: x must be floating point, got torch.int64"):
        mk.ops.gelu(torch.ones(2).long())
