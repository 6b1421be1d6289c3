"""`rnn` alone: its nonlinearities."""

from __future__ import annotations

import pytest
import torch

import metakern as mk
from metakern.ops.core.spec import Make


def test_relu_has_no_derivative_where_it_is_off() -> None:
    x = torch.tensor([[[1.0], [-5.0], [2.0]]], requires_grad=True)
    y, h = mk.ops.rnn(x, None, torch.ones(1, 1), torch.ones(1, 1), nonlinearity="relu")
    assert y.flatten().tolist() == [1.0, 0.0, 2.0]
    (ct_x,) = torch.autograd.grad(h.sum(), x)
    assert ct_x.flatten().tolist() == [0.0, 0.0, 1.0]


def test_relu_equals_torch_nn() -> None:
    module = torch.nn.RNN(3, 4, nonlinearity="relu", batch_first=True).double()
    x = Make()(2, 5, 3)
    y, h = mk.ops.rnn(x, None, *module.parameters(), nonlinearity="relu")
    expected, final = module(x)
    torch.testing.assert_close((y, h), (expected, final[0]), rtol=1e-12, atol=1e-12)


def test_nonlinearity_must_be_known() -> None:
    with pytest.raises(ValueError, match=r"^rnn: nonlinearity must be 'tanh' or 'relu', got 'gelu'$"):
        mk.ops.rnn(torch.zeros(1, 2, 1), None, torch.ones(1, 1), torch.ones(1, 1), nonlinearity="gelu")
