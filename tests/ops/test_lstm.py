"""`lstm` alone: the order of its gates, and its pair of states."""

from __future__ import annotations

import pytest
import torch

import metakern as mk


def test_gates_are_in_the_order_input_forget_cell_output() -> None:
    def step(*gates: float) -> tuple[float, float]:
        """Return the state after c = 0.5, with the arguments of the gates as bias."""
        state = torch.zeros(1, 1), torch.full((1, 1), 0.5)
        _, (h, c) = mk.ops.lstm(torch.zeros(1, 1, 1), state, torch.zeros(4, 1), torch.zeros(4, 1), torch.tensor(gates))
        return h.item(), c.item()

    shut, open_ = -200.0, 200.0
    assert step(shut, open_, open_, shut) == (0.0, 0.5)
    assert step(open_, shut, open_, shut) == (0.0, 1.0)
    assert step(open_, shut, shut, shut) == (0.0, -1.0)
    assert step(shut, open_, 0.0, open_) == pytest.approx((0.46211716, 0.5))


def test_state_must_be_a_pair() -> None:
    x, w_ih, w_hh = torch.zeros(1, 2, 3), torch.zeros(8, 3), torch.zeros(8, 2)
    with pytest.raises(TypeError, match=r"^lstm: state must be None or a pair \(h, c\), got Tensor$"):
        mk.ops.lstm(x, torch.zeros(1, 2), w_ih, w_hh)
    with pytest.raises(TypeError, match=r"^lstm: state must be None or a pair \(h, c\), got tuple$"):
        mk.ops.lstm(x, (torch.zeros(1, 2),), w_ih, w_hh)
    with pytest.raises(ValueError, match=r"^lstm: c must have shape \[B, H\] = \[1, 2\], got \[2, 2\]$"):
        mk.ops.lstm(x, (torch.zeros(1, 2), torch.zeros(2, 2)), w_ih, w_hh)
