"""Meta-LSTM: MAML whose inner update rule is an LSTM that is learned along with theta.

Ravi, Larochelle 2017, "Optimization as a model for few-shot learning", section 3 and algorithm 1.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from metakern import optim
from metakern.meta.algorithms.maml import MAML
from metakern.meta.batching import Loss


class MetaLSTM(MAML):
    """MAML with `metakern.optim.LSTMOptimizer` as the inner optimizer (Ravi, Larochelle 2017).

    The meta-gradient is exact. With `first_order=True` inner gradients and losses count as constants, which is the
    assumption of the paper (section 3.3). Pass `metalstm.parameters()` to the outer optimizer: it holds the model's
    parameters and the weights of the LSTM. Its query loss is the training loss of algorithm 1 of the paper.

    Args:
        model: The model, as `metakern.MAML` takes it.
        loss: `loss(model, batch)` returns the loss of one task, a scalar tensor.
        lr: The rate that all coordinates (elements of parameters) start with, in (0, 1).
        hidden: The number of hidden units of the LSTM. Each coordinate has a state of 2 hidden + 2 numbers.
        **options: The other arguments of `metakern.MAML`, except `inner`.

    Raises:
        TypeError: As `metakern.MAML` and `metakern.optim.LSTMOptimizer` raise it; also if `inner` is passed.
        ValueError: As `metakern.MAML` and `metakern.optim.LSTMOptimizer` raise it.

    >>> import torch, metakern as mk
    >>> model = torch.nn.Linear(8, 4)
    >>> metalstm = mk.MetaLSTM(model, mk.losses.classification, lr=0.05, steps=3)
    >>> x, y = torch.randn(5, 10, 8), torch.randint(4, (5, 10))
    >>> metalstm((x, y), (x, y)).backward()
    >>> metalstm.inner.w_hh.grad.shape
    torch.Size([80, 20])
    """

    def __init__(self, model: nn.Module, loss: Loss, lr: float = 0.01, hidden: int = 20, **options: Any) -> None:
        super().__init__(model, loss, inner=optim.LSTMOptimizer(lr, hidden=hidden), **options)
