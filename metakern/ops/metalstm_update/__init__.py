"""One step of an LSTM that updates parameters, for all coordinates (elements of parameters) and tasks in one call.

Every coordinate has a state of its own, and all share the weights. Its LSTM reads the gradient and the loss, and a
second layer reads the LSTM's output h', the parameter, and its own last gates. Its gates are a decay f' and a learning
rate i', and its cell state is the parameter itself:

    x = u(grad), u(loss)                u(z) = (log|z| / p, sign z), or (-1, e^p z) where |z| < e^-p
    a = w_ih x + w_hh h + b             c' = σ(a_f) c + σ(a_i) tanh(a_g),  h' = σ(a_o) tanh(c')
    i', f' = σ(w_gates [h', phi, i or f] + b_gates)
    phi' = f' phi - i' grad

| tensor | shape |
|---|---|
| phi, grad and phi' | [T, N] |
| loss | [T] |
| h, c and h', c' of H hidden units | [T, H, N] |
| gates (i, f), and gates' | [T, 2, N] |
| w_ih, w_hh, b, in the order i, f, g, o of torch.nn.LSTM | [T, 4H, 4], [T, 4H, H], [T, 4H] |
| w_gates, b_gates | [T, 2, H + 2], [T, 2] |

Ravi, Larochelle 2017, "Optimization as a model for few-shot learning", section 3 (the second layer) and 5.1 (two
layers); Andrychowicz et al. 2016, "Learning to learn by gradient descent by gradient descent", appendix A (u).
"""

from __future__ import annotations

from math import exp

import torch
from torch import Tensor


def metalstm_update(
    phi: Tensor,
    grad: Tensor,
    loss: Tensor,
    h: Tensor,
    c: Tensor,
    gates: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b: Tensor,
    w_gates: Tensor,
    b_gates: Tensor,
    *,
    p: float = 10.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _plain(phi, grad, loss, h, c, gates, w_ih, w_hh, b, w_gates, b_gates, p=p)


def features(z: Tensor, p: float) -> Tensor:
    """Returns u(z), stacked in dimension 1."""
    large = z.abs() >= exp(-p)
    log = torch.where(large, torch.where(large, z, 1.0).abs().log() / p, -1.0)
    return torch.stack([log, torch.where(large, z.sign(), exp(p) * z)], 1)


def _plain(
    phi: Tensor,
    grad: Tensor,
    loss: Tensor,
    h: Tensor,
    c: Tensor,
    gates: Tensor,
    w_ih: Tensor,
    w_hh: Tensor,
    b: Tensor,
    w_gates: Tensor,
    b_gates: Tensor,
    *,
    p: float = 10.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x = torch.cat([features(grad, p), features(loss, p).unsqueeze(2).expand(-1, -1, phi.shape[1])], 1)
    i, f, g, o = (w_ih @ x + w_hh @ h + b.unsqueeze(-1)).chunk(4, 1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    h = o.sigmoid() * c.tanh()
    hidden, rest = w_gates[..., :-2], w_gates[..., -2:].unsqueeze(-1)
    gates = (
        hidden @ h + rest[..., 0, :] * phi.unsqueeze(1) + rest[..., 1, :] * gates + b_gates.unsqueeze(-1)
    ).sigmoid()
    return gates[:, 1] * phi - gates[:, 0] * grad, h, c, gates
