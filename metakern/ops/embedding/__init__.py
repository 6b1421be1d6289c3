"""Embedding: rows of a table that all tasks share, or of a table for each task.

    y_n = W[token_n]

    forward   y      = W[tokens]                   jvp       t_y    = t_W[tokens]
    vjp       ct_W   = Σ_n e(token_n) ct_yₙᵀ       vjp_jvp   t_ct_W = Σ_n e(token_n) t_ct_yₙᵀ,  zero where t_ct_y is

| tensor | shape |
|---|---|
| tokens | [T, N], int64 or int32 |
| weight W | [T, V, D] |
| y | [T, N, D] |

Residuals: none. The op is linear in W. Sums over a token's occurrences accumulate in float32 for half precision.
"""

from __future__ import annotations

from math import inf, prod
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from metakern.ops.core import checks, plain, triton_kernels
from metakern.ops.core.autocast import autocast
from metakern.ops.core.autograd import Op
from metakern.ops.core.matrices import shared, wide
from metakern.ops.core.rules import Rules, Tensors
from metakern.ops.core.spec import Cost, Make, Sample, Spec

_SMALL = inf  # tokens: with one table, on a CPU, indexing is faster at every size; see core/plain.py


@autocast("widest")
def embedding(tokens: Tensor, weight: Tensor) -> Tensor:
    """Returns the rows of `weight` at `tokens`, differentiable twice in `weight`.

    Sums over the occurrences of a token accumulate in float32 for half precision.

    Args:
        tokens: [...], int64 or int32, in [0, V); or [T, ...] for T tasks with tables of their own.
        weight: The table, [V, D], or [T, V, D] with one for each task.

    Returns:
        [..., D] or [T, ..., D].

    Raises:
        TypeError: For a weight that is not floating point, or tokens that are not int64 or int32.
        ValueError: Where shapes or devices do not fit; on the CPU also for a token outside [0, V), which on a GPU
            triggers a device-side assertion.

    >>> import metakern as mk, torch
    >>> weight = torch.arange(6.0).view(3, 2)
    >>> mk.ops.embedding(torch.tensor([2, 0]), weight)
    tensor([[4., 5.],
            [0., 1.]])
    """
    checks.floating("embedding", weight=weight)
    checks.indices("embedding", "tokens", tokens, weight.device)
    if weight.dim() not in (2, 3):
        raise ValueError(f"embedding: weight must have shape [V, D] or [T, V, D], got {list(weight.shape)}")
    if weight.dim() == 3 and tokens.shape[:1] != weight.shape[:1]:
        raise ValueError(f"embedding: tokens must have shape [T, ...] = [{len(weight)}, ...], got {list(tokens.shape)}")
    checks.below("embedding", "tokens", tokens, weight.shape[-2])
    if weight.dim() == 2 and plain.is_faster(weight, tokens.numel(), _SMALL):
        return _plain(tokens, weight)
    if weight.dim() == 2:
        (y,) = OP(weight[None], tokens=tokens.reshape(1, -1))
    else:
        (y,) = OP(weight, tokens=tokens.reshape(len(weight), prod(tokens.shape[1:])))
    return y.view(*tokens.shape, weight.shape[-1])


def _forward(c: SimpleNamespace, inputs: Tensors) -> tuple[Tensors, Tensors]:
    return (_rows(inputs[0], c.tokens),), ()


def _jvp(c: SimpleNamespace, inputs: Tensors, r: Tensors, t_inputs: Tensors) -> tuple[Tensors, Tensors]:
    return (_rows(t_inputs[0], c.tokens),), ()


def _vjp(c: SimpleNamespace, inputs: Tensors, r: Tensors, ct_outputs: Tensors) -> Tensors:
    (weight,), (ct_y,) = inputs, ct_outputs
    T, V, D = weight.shape
    ct_weight = wide(ct_y).new_zeros(T * V, D)
    ct_weight.index_add_(0, places(c.tokens, V), wide(ct_y).flatten(0, 1))
    return (ct_weight.view(T, V, D).to(weight.dtype),)


def _vjp_jvp(
    c: SimpleNamespace,
    inputs: Tensors,
    r: Tensors,
    t_inputs: Tensors,
    t_r: Tensors,
    ct_outputs: Tensors,
    t_ct_outputs: Tensors | None,
) -> Tensors:
    return (None,) if t_ct_outputs is None else _vjp(c, inputs, r, t_ct_outputs)


def _rows(weight: Tensor, tokens: Tensor) -> Tensor:
    if shared(weight):
        return F.embedding(tokens, weight[0])
    return weight.flatten(0, 1).index_select(0, places(tokens, weight.shape[1])).unflatten(0, tokens.shape)


def places(tokens: Tensor, V: int) -> Tensor:
    """Returns the row of each token in the tables of all tasks, [T * V, D].

    A token out of range gets T * V, which is no row, so that it cannot read the table of another task.
    """
    T = tokens.shape[0]
    places = tokens + V * torch.arange(T, device=tokens.device).unsqueeze(1)
    return places.where((tokens >= 0) & (tokens < V), T * V).flatten()


REFERENCE = Rules(_forward, _jvp, _vjp, _vjp_jvp)

OP = Op(
    "embedding",
    inputs=("weight",),
    constants=("tokens",),
    kernels={"reference": REFERENCE, "triton": triton_kernels.rules("embedding")},
)


def _plain(tokens: Tensor, weight: Tensor) -> Tensor:
    if weight.dim() == 2:
        return weight[tokens.long()]
    return torch.stack([w[t.long()] for w, t in zip(weight, tokens, strict=True)])


def _samples(make: Make) -> list[Sample]:
    return [
        Sample("shared", (make.integers(7, 2, 3), make(7, 3)), per_task=False),
        Sample("one", (make.integers(5), make(5, 3)), per_task=False),
        Sample("tasks", (make.integers(5, 3, 4), make(3, 5, 2))),
        Sample("deep-int32", (make.integers(3, 2, 2, 3).int(), make(2, 3, 3))),
        Sample("no-tokens", (make.integers(3, 2, 0), make(2, 3, 3))),
    ]


def _benchmark(make: Make) -> list[Sample]:
    return [Sample("8x160-2000x128", (make.integers(2000, 8, 160), make(8, 2000, 128)))]


def _cost(sample: Sample, order: int) -> Cost:
    tokens, weight = sample.args
    y, size = tokens.numel() * weight.shape[-1], weight.element_size()
    moved = 2 * y if order == 0 else y + weight.numel()
    return Cost(flop=0 if order == 0 else y, bytes=moved * size + tokens.numel() * tokens.element_size())


SPEC = Spec(OP, embedding, _plain, _samples, _benchmark, _cost)
