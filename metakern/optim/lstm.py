"""An LSTM as the update rule of the inner loop, learned with the initialisation.

    phi <- f phi - i grad        f, i in (0, 1), from an LSTM that reads the gradient and the loss

`metakern.ops.metalstm_update` has the formulas. Ravi, Larochelle 2017, "Optimization as a model for few-shot learning".
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from metakern.ops.metalstm_update import metalstm_update
from metakern.optim.base import InnerOptimizer, State, Tensors, alike, number, positive


class LSTMOptimizer(InnerOptimizer):
    """A learned LSTM as an inner optimizer (Ravi, Larochelle 2017, sections 3 and 5).

    Each coordinate (element of a parameter) has its own rate i and decay f at each step: phi <- f phi - i grad. A first
    LSTM layer with `hidden` units reads the coordinate's gradient and the task's loss, both as a logarithm and a sign
    (Andrychowicz et al. 2016, appendix A). The second layer reads the output of the first, phi, and the gates of the
    last step, and gives i and f. All coordinates share the weights, which the outer loop learns together with the state
    before the first step; their number does not depend on the model.

    With H hidden units, a step takes 8 H² + 20 H FLOP of products for a coordinate, and its derivative three times
    that. A coordinate has 2 H + 2 numbers of state, which are kept for each inner step; a step reads and writes 4 H + 7
    numbers. For H = 20 and float32 these are 3600 FLOP and 348 bytes, where SGD takes 2 FLOP and 12 bytes.

    Args:
        lr: The rate i that coordinates start with, in (0, 1). No rate ever exceeds 1.
        decay: The factor f that coordinates start with, in (0, 1).
        hidden: The number of hidden units of the first layer.
        p: The gradient and the loss are read on a logarithmic scale where they exceed e^-p.
        detach_gradients: Whether gradients and losses count as constants in the meta-gradient, which then has no second
            derivatives (Ravi, Larochelle 2017, section 3.3). `MAML` with `first_order=True` gives the same
            meta-gradient in less time.

    Raises:
        ValueError: For an lr or decay outside (0, 1), a p that is not positive, a number that is not finite, or hidden
            below 1.
        TypeError: For a value that is no number, a hidden that is no integer, or a detach_gradients that is no bool.

    >>> import metakern as mk, torch
    >>> inner = mk.optim.LSTMOptimizer(lr=0.1)
    >>> [tuple(p.shape) for p in inner.parameters()]
    [(80, 4), (80, 20), (80,), (2, 22), (2,), (20,), (20,), (2,)]
    >>> maml = mk.MAML(torch.nn.Linear(3, 2), mk.losses.classification, inner, steps=3)
    """

    takes_losses = True

    def __init__(
        self,
        lr: float = 0.01,
        decay: float = 0.995,
        hidden: int = 20,
        p: float = 10.0,
        detach_gradients: bool = False,
    ) -> None:
        super().__init__()
        for name, value in (("lr", lr), ("decay", decay)):
            number("LSTMOptimizer", name, value)
            if not 0 < value < 1:
                raise ValueError(f"LSTMOptimizer: {name} must be in (0, 1), got {value}")
        if not isinstance(hidden, int) or isinstance(hidden, bool):
            raise TypeError(f"LSTMOptimizer: hidden must be an integer, got {hidden!r}")
        positive("LSTMOptimizer", hidden=hidden, p=p)
        if not isinstance(detach_gradients, bool):
            raise TypeError(f"LSTMOptimizer: detach_gradients must be True or False, got {detach_gradients!r}")
        self.p, self.detach_gradients = float(p), detach_gradients

        def small(*shape: int) -> nn.Parameter:
            return nn.Parameter(0.02 * torch.rand(shape) - 0.01)

        gates = torch.tensor([lr, decay])
        self.w_ih, self.w_hh, self.b = small(4 * hidden, 4), small(4 * hidden, hidden), small(4 * hidden)
        self.w_gates, self.b_gates = small(2, hidden + 2), nn.Parameter(torch.logit(gates))
        self.h, self.c = nn.Parameter(torch.zeros(hidden)), nn.Parameter(torch.zeros(hidden))
        self.gates = nn.Parameter(gates)

    def init(self, phi: Tensors) -> State:
        """Returns h, c [T, H, N] and the gates [T, 2, N] for the N elements of all parameters of a dtype and device."""
        state: list[Tensor] = []
        for places in alike(phi):
            first = phi[places[0]]
            size = len(first), -1, sum(phi[i][0].numel() for i in places)
            state += (s.to(first).view(1, -1, 1).expand(size) for s in (self.h, self.c, self.gates))
        return tuple(state)

    def update(self, phi: Tensors, grads: Tensors, state: State, *losses: Tensor) -> tuple[list[Tensor], State]:
        if not losses:
            raise TypeError("LSTMOptimizer: update must get the losses [T] as its fourth argument, got none")
        if self.detach_gradients:
            grads, losses = [g.detach() for g in grads], (losses[0].detach(),)
        moved, after = list(phi), list[Tensor]()
        for n, places in enumerate(alike(phi)):
            x, g = (torch.cat([values[i].reshape(len(phi[i]), -1) for i in places], 1) for values in (phi, grads))
            h, c, gates = state[3 * n : 3 * n + 3]
            weights = [w.to(x) for w in (self.w_ih, self.w_hh, self.b, self.w_gates, self.b_gates)]
            y, *next_state = metalstm_update(x, g, losses[0].to(x), h, c, gates, *weights, p=self.p)
            for i, part in zip(places, y.split([phi[i][0].numel() for i in places], 1), strict=True):
                moved[i] = part.reshape(phi[i].shape)
            after += next_state
        return moved, tuple(after)
