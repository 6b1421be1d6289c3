"""Linear and recurrent layers whose matrices are Kronecker products.

    y = (R^T ⊗ L) vec(X) + b      that is Y = L X R + B

| tensor | shape |
|---|---|
| x, y | [n m], the columns of a matrix one after the other, or [..., n, m] |
| left L | [n, n] |
| right R | [m, m] |
| bias B | [n, m] |

Jose, Cissé, Fleuret 2018, "Kronecker recurrent units".
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

State = tuple[Tensor, Tensor]


def kronecker_addmm(
    mat1: Tensor, mat2: Tensor, mat3: Tensor, bias: Tensor | None = None, alpha: float = 1.0, beta: float = 1.0
) -> Tensor:
    """Returns alpha mat1 mat3 mat2 + beta bias, the product with a Kronecker matrix.

    Args:
        mat1: L, [n, n].
        mat2: R, [m, m].
        mat3: X, [..., n, m].
        bias: B, [n, m]; None for none.
        alpha: The factor of the product.
        beta: The factor of the bias.

    Returns:
        [..., n, m].

    >>> import torch
    >>> from metakern.compat.learn2learn.nn import kronecker_addmm
    >>> kronecker_addmm(torch.eye(2), 2 * torch.eye(3), torch.ones(2, 3))
    tensor([[2., 2., 2.],
            [2., 2., 2.]])
    """
    y = alpha * (mat1 @ mat3 @ mat2)
    return y if bias is None else y + beta * bias


class KroneckerLinear(nn.Module):
    """A linear layer y = (R^T ⊗ L) x + b, with `left` L [n, n] and `right` R [m, m].

    L and R start as the identity, the bias [n, m] as zero. The input is [n m] or [..., n, m], and the output has its
    shape. Jose, Cissé, Fleuret 2018, "Kronecker recurrent units".

    Args:
        n: The size of L.
        m: The size of R.
        bias: Whether there is a bias.
        psd: Whether to compute with L^T L and R^T R, which are positive semi-definite, in place of L and R.
        device: Where the parameters are. The input is moved there, and the output back.

    Raises:
        ValueError: At a call, for an input of another shape.

    >>> import torch
    >>> from metakern.compat.learn2learn.nn import KroneckerLinear
    >>> KroneckerLinear(2, 3)(torch.ones(6)).detach()
    tensor([1., 1., 1., 1., 1., 1.])
    """

    def __init__(self, n: int, m: int, bias: bool = True, psd: bool = False, device: Any = None) -> None:
        super().__init__()
        self.left = nn.Parameter(torch.eye(n, device=device))
        self.right = nn.Parameter(torch.eye(m, device=device))
        self.bias = nn.Parameter(torch.zeros(n, m, device=device)) if bias else None
        self.psd, self.device = psd, device

    def forward(self, x: Tensor) -> Tensor:
        n, m = self.left.size(0), self.right.size(0)
        left = self.left.t() @ self.left if self.psd else self.left
        right = self.right.t() @ self.right if self.psd else self.right
        if x.shape != (n * m,) and x.shape[-2:] != (n, m):
            raise ValueError(f"KroneckerLinear: x must be of shape [{n * m}] or [..., {n}, {m}], got {list(x.shape)}")
        here = x if self.device is None else x.to(self.device)
        if x.dim() == 1:  # the columns of X one after the other
            return kronecker_addmm(left, right, here.reshape(m, n).t(), self.bias).t().flatten().to(x.device)
        return kronecker_addmm(left, right, here, self.bias).to(x.device)


class KroneckerRNN(nn.Module):
    """A step of a recurrent network, h' = sigma(W_h x + U_h h) and y = W_y h', of Kronecker layers.

    It takes x and h, each [n m] or [..., n, m], and returns (y, h') of the same shape.

    Args:
        n: The size of the left matrices.
        m: The size of the right matrices.
        bias: Whether the three layers have a bias.
        sigma: The activation; by default tanh.

    >>> import torch
    >>> from metakern.compat.learn2learn.nn import KroneckerRNN
    >>> y, h = KroneckerRNN(2, 3)(torch.ones(6), torch.zeros(6))
    >>> y.shape, h.shape
    (torch.Size([6]), torch.Size([6]))
    """

    def __init__(self, n: int, m: int, bias: bool = True, sigma: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.W_h, self.U_h, self.W_y = (KroneckerLinear(n, m, bias=bias) for _ in range(3))
        self.sigma = nn.Tanh() if sigma is None else sigma

    def forward(self, x: Tensor, hidden: Tensor) -> State:
        hidden = self.sigma(self.W_h(x) + self.U_h(hidden))
        return self.W_y(hidden), hidden


class KroneckerLSTM(nn.Module):
    """A step of an LSTM of Kronecker layers.

    It takes x and (h, c), each [n m] or [..., n, m], and returns h' and (h', c').

    Args:
        n: The size of the left matrices.
        m: The size of the right matrices.
        bias: Whether the eight layers have a bias.
        sigma: The activation of the gates; by default the logistic function.

    >>> import torch
    >>> from metakern.compat.learn2learn.nn import KroneckerLSTM
    >>> y, (h, c) = KroneckerLSTM(2, 3)(torch.ones(6), (torch.zeros(6), torch.zeros(6)))
    >>> y.shape, c.shape
    (torch.Size([6]), torch.Size([6]))
    """

    def __init__(self, n: int, m: int, bias: bool = True, sigma: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        for gate in "ifgo":
            for source in "ih":
                setattr(self, f"W_{source}{gate}", KroneckerLinear(n, m, bias=bias))
        self.sigma = nn.Sigmoid() if sigma is None else sigma
        self.tanh = nn.Tanh()

    def forward(self, x: Tensor, hidden: State) -> tuple[Tensor, State]:
        h, c = hidden
        i, f, g, o = (getattr(self, f"W_i{gate}")(x) + getattr(self, f"W_h{gate}")(h) for gate in "ifgo")
        c = self.sigma(f) * c + self.sigma(i) * self.tanh(g)
        h = self.sigma(o) * self.tanh(c)
        return h, (h, c)
