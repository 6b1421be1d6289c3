"""`gru` alone: the order of its gates and its two biases."""

from __future__ import annotations

import torch

import metakern as mk


def test_gates_are_in_the_order_reset_update_new() -> None:
    def step(*gates: float) -> float:
        """Return the state after h = 1, with the arguments of the gates as input bias.

        An open reset gate adds 100 to the argument of the new gate.
        """
        w_hh = torch.tensor([[0.0], [0.0], [100.0]])
        x, w_ih = torch.zeros(1, 1, 1), torch.zeros(3, 1)
        return mk.ops.gru(x, torch.ones(1, 1), w_ih, w_hh, torch.tensor(gates))[1].item()

    shut, open_ = -200.0, 200.0
    assert step(shut, open_, -30.0) == 1.0
    assert step(open_, shut, -30.0) == 1.0
    assert step(shut, shut, -30.0) == -1.0
    assert step(shut, shut, 0.0) == 0.0


def test_the_reset_gate_scales_the_hidden_bias_but_not_the_input_bias() -> None:
    zeros = torch.zeros(3, 1)
    bias = torch.tensor([-100.0, -100.0, 0.5])
    x, h = torch.zeros(1, 1, 1), torch.zeros(1, 1)
    assert mk.ops.gru(x, h, zeros, zeros, bias)[1].item() == torch.tanh(torch.tensor(0.5)).item()
    assert mk.ops.gru(x, h, zeros, zeros, None, bias)[1].item() == 0.0
