"""FOMAML, ANIL, Meta-SGD and Reptile against their definitions in plain autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from models import assert_equal, build, gradients, plain_loss, sgd
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

import metakern as mk


def test_fomaml_is_plain_autograd_with_constant_inner_gradients() -> None:
    model, loss, support, query, _ = build("gpt-folded")
    truth = gradients(model, plain_loss(model, loss, support, query, 3, sgd(0.3), first_order=True))
    exact = gradients(model, plain_loss(model, loss, support, query, 3, sgd(0.3)))
    for strategy in ("store", "recompute"):
        fomaml = mk.FOMAML(model, loss, inner=mk.optim.SGD(lr=0.3), steps=3, strategy=strategy)
        found = gradients(model, fomaml(support, query))
        assert_equal(found, truth)
        assert any((found[n] - exact[n]).norm() > 1e-3 * exact[n].norm() for n in exact)


def test_anil_adapts_the_last_module_alone() -> None:
    model, loss, support, query, _ = build("mlp")
    head = lambda name: name.startswith("2.")  # noqa: E731
    truth = gradients(model, plain_loss(model, loss, support, query, 3, sgd(0.3), head))
    anil = mk.ANIL(model, loss, inner=mk.optim.SGD(lr=0.3), steps=3)
    assert_equal(gradients(model, anil(support, query)), truth)
    assert sorted(anil.adapt(support)) == ["2.bias", "2.weight"]
    other = mk.ANIL(model, loss, adapt=["0"], steps=3)
    assert sorted(other.adapt(support)) == ["0.bias", "0.weight"]


def test_meta_sgd_learns_a_rate_for_each_element() -> None:
    model, loss, support, query, _ = build("mlp")
    metasgd = mk.MetaSGD(model, loss, lr=0.3, steps=2).double()
    truth = gradients(model, plain_loss(model, loss, support, query, 2, sgd(0.3)))
    assert_equal(gradients(model, metasgd(support, query)), truth)
    rates = list(metasgd.inner.parameters())
    assert [r.shape for r in rates] == [p.shape for p in model.parameters()]
    assert all(r.grad.abs().sum() > 0 for r in rates)


def test_reptile_moves_toward_the_adapted_parameters() -> None:
    model, loss, support, query, _ = build("mlp")
    reptile = mk.Reptile(model, loss, inner=mk.optim.SGD(lr=0.3), steps=4)
    value = reptile(support, query)
    found = gradients(model, value)
    phi = reptile.adapt(support)
    assert_equal(found, {n: (p - phi[n]).mean(0).detach() for n, p in model.named_parameters()})
    torch.testing.assert_close(value.detach(), reptile.evaluate(support, query, (4,)).mean())


def test_reptile_takes_models_without_second_derivatives() -> None:
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x.exp()

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, ct_y: Tensor) -> Tensor:
            return ct_y * ctx.saved_tensors[0].exp()

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return Once.apply(self.linear(x))

    model, batch = Net(), (torch.randn(4, 5, 3), torch.randint(2, (4, 5)))
    reptile = mk.Reptile(model, mk.losses.classification, steps=2, first_order=False)
    found = gradients(model, reptile(batch, batch))
    phi = reptile.adapt(batch)
    for name, p in model.named_parameters():
        torch.testing.assert_close(found[name], (p - phi[name]).mean(0).detach())
    with pytest.raises(ValueError, match="second"):
        mk.MAML(model, mk.losses.classification, steps=2)(batch, batch)
