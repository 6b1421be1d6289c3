"""`swiglu` alone: extreme values, and errors."""

import pytest
import torch

import metakern as mk


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_extreme_gates_have_the_derivatives_of_the_limits(dtype: torch.dtype) -> None:
    gate = torch.tensor([-1e4, -1000.0, 100.0, 1e4], dtype=dtype, requires_grad=True)
    up = torch.tensor([3.0, -2.0, 0.5, 4.0], dtype=dtype, requires_grad=True)
    y = mk.ops.swiglu(gate, up)
    g = torch.autograd.grad(y.sum(), (gate, up), create_graph=True)
    h = torch.autograd.grad(g[0].sum() + (g[1] * g[1]).sum() / 2, (gate, up))
    on = (gate > 0).to(dtype)
    for actual, expected in zip(
        (y, *g, *h), (gate.relu() * up, on * up, gate.relu(), gate.relu() * on, on), strict=True
    ):
        assert torch.equal(actual, expected)


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"swiglu: up must have shape that of gate = \[2, 3\], got \[3\]"):
        mk.ops.swiglu(torch.ones(2, 3), torch.ones(3))
    with pytest.raises(TypeError, match=r"swiglu: up must have the dtype torch.float32 of the other arguments"):
        mk.ops.swiglu(torch.ones(2), torch.ones(2).double())
