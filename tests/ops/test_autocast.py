"""Ops under torch.autocast: the dtypes of PyTorch, exact second derivatives, and accurate meta-gradients."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import metakern as mk

PAIRS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], tuple[tuple[int, ...], ...]]] = {
    "linear": (mk.ops.linear, F.linear, ((5, 8), (6, 8), (6,))),
    "attention": (
        lambda q, k, v: mk.ops.attention(q, k, v, causal=False),
        F.scaled_dot_product_attention,
        ((2, 3, 5, 8),) * 3,
    ),
    "layer_norm": (lambda x, w: mk.ops.layer_norm(x, w), lambda x, w: F.layer_norm(x, (8,), w), ((5, 8), (8,))),
    "rms_norm": (lambda x, w: mk.ops.rms_norm(x, w, 1e-5), lambda x, w: F.rms_norm(x, (8,), w, 1e-5), ((5, 8), (8,))),
    "gelu": (mk.ops.gelu, F.gelu, ((5, 8),)),
    "silu": (mk.ops.silu, F.silu, ((5, 8),)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", PAIRS)
def test_dtypes_are_those_of_pytorch(name: str, dtype: torch.dtype) -> None:
    ours, theirs, shapes = PAIRS[name]
    tensors = [torch.randn(shape, dtype=dtype) for shape in shapes]
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = ours(*tensors), theirs(*tensors)
    if not name.endswith("norm") or dtype != torch.bfloat16:  # PyTorch's autocast covers norms on GPUs alone
        assert found.dtype == expected.dtype
    torch.testing.assert_close(found.double(), expected.double(), rtol=3e-2, atol=3e-2)


def test_arguments_of_mixed_dtypes_are_cast() -> None:
    x, weight = torch.randn(2, 3, 8, dtype=torch.bfloat16), torch.randn(8)
    with pytest.raises(TypeError, match="must have the dtype"):
        mk.ops.layer_norm(x, weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert mk.ops.layer_norm(x, weight).dtype == torch.float32
        assert mk.ops.swiglu(x, x.float()).dtype == torch.float32
        assert mk.ops.linear(x, torch.randn(4, 8)).dtype == torch.bfloat16
        state = torch.zeros(3, 5), torch.zeros(3, 5)
        output, _ = mk.ops.lstm(x.transpose(0, 1).contiguous(), state, torch.randn(20, 8), torch.randn(20, 5))
        assert output.dtype == torch.bfloat16


def test_derivatives_are_the_same_inside_and_outside_of_autocast() -> None:
    x, weight = (torch.randn(n, 8, requires_grad=True) for n in (5, 8))

    def second(inside: bool) -> tuple[Tensor, ...]:
        y = mk.ops.layer_norm(mk.ops.linear(x, weight)).square().sum()
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            gradients = torch.autograd.grad(y, (x, weight), create_graph=True)
            return torch.autograd.grad(gradients[0].square().sum(), (x, weight))

    torch.testing.assert_close(second(True), second(False), rtol=0, atol=0)


@pytest.mark.parametrize("strategy", ["store", "recompute"])
@pytest.mark.parametrize("where", ["in the loss", "around all"])
def test_meta_gradients_are_near_those_of_float32(where: str, strategy: str) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, norm_first=True)
    model = nn.Sequential(nn.Embedding(11, 16), layer, nn.Linear(16, 11))
    mk.patch(model)
    tokens = torch.randint(11, (3, 4, 7))

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16) if where == "in the loss" else nullcontext():
            return mk.losses.causal_lm(model, batch)

    def meta_gradient(low: bool) -> Tensor:
        model.zero_grad()
        chosen = loss if low else mk.losses.causal_lm
        maml = mk.MAML(model, chosen, mk.optim.SGD(lr=0.3), steps=2, strategy=strategy)
        with torch.autocast("cpu", torch.bfloat16, enabled=low and where == "around all"):
            value = maml((tokens[:, :2], tokens[:, :2]), (tokens[:, 2:], tokens[:, 2:]))
        value.backward()
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    truth, found = meta_gradient(low=False), meta_gradient(low=True)
    assert found.isfinite().all()
    assert 0 < (found - truth).norm() < 0.1 * truth.norm()
