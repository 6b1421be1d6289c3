"""Cross-entropy: the mean of the negative log-likelihood of the targets, over the kept tokens of each task.

    ℓ_n = log Σ_v exp(z_nv)          p_nv = exp(z_nv - ℓ_n)          e_n = one-hot(target_n)
    s_n = 1 / (number of kept tokens of the task) where n is kept, 0 where its target is ignored

    forward   y      = Σ_n s_n (ℓ_n - z_n[target_n])
    jvp       t_ℓ_n  = Σ_v p_nv t_z_nv               t_y = Σ_n s_n (t_ℓ_n - t_z_n[target_n])
    vjp       ct_z   = s ct_y (p - e)
    vjp_jvp   t_ct_z = s ct_y p (t_z - t_ℓ) + s t_ct_y (p - e)

| tensor | shape |
|---|---|
| logits z | [T, N, V] |
| target | [T, N], int64 or int32 |
| y | [T] |
| residual ℓ | [T, N], float32 for half precision |

A task without a kept token gives 0, with zero derivatives. Half precision is computed in float32.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from metakern.ops.core import checks, cpp, plain, triton_kernels
from metakern.ops.core.autocast import autocast
from metakern.ops.core.autograd import Op
from metakern.ops.core.matrices import wide
from metakern.ops.core.rules import Rules, Tensors
from metakern.ops.core.spec import Cost, Make, Sample, Spec

_SMALL = 2**17  # logits; see core/plain.py


@autocast("float32")
def cross_entropy(logits: Tensor, target: Tensor, ignore_index: int = -100) -> Tensor:
    """Returns the mean cross-entropy of each task in nats, over the targets that are not `ignore_index`.

    It is differentiable twice in the logits. Half precision is computed in float32, to which `torch.autocast` casts the
    logits.

    Args:
        logits: [T, N, V], unnormalized log-probabilities of V classes for N tokens of each of T tasks; or [N, V].
        target: [T, N] or [N], int64 or int32, in [0, V).
        ignore_index: The target of tokens that do not count in the mean.

    Returns:
        [T], or a scalar for [N, V]; 0 for a task in which no token counts.

    Raises:
        TypeError: For logits that are not floating point, or a target that is not int64 or int32.
        ValueError: Where shapes or devices do not fit; on the CPU also for a target outside [0, V).

    >>> import metakern as mk, torch
    >>> mk.ops.cross_entropy(torch.zeros(2, 3, 4), torch.tensor([[0, 1, -100], [-100, -100, -100]]))
    tensor([1.3863, 0.0000])
    """
    checks.floating("cross_entropy", logits=logits)
    if logits.dim() not in (2, 3):
        raise ValueError(f"cross_entropy: logits must have shape [N, V] or [T, N, V], got {list(logits.shape)}")
    checks.indices("cross_entropy", "target", target, logits.device)
    checks.shape("cross_entropy", "target", target, logits.shape[:-1], "[N]" if logits.dim() == 2 else "[T, N]")
    checks.below("cross_entropy", "target", target, logits.shape[-1], ignore_index)
    if logits.dim() == 2 and plain.is_faster(logits, logits.numel(), _SMALL):
        reduction = "mean" if (target != ignore_index).any() else "sum"  # the mean of no tokens would be NaN
        return F.cross_entropy(logits, target.long(), ignore_index=ignore_index, reduction=reduction)
    if logits.dim() == 3:
        return OP(logits, target=target, ignore_index=ignore_index)[0]
    return OP(logits[None], target=target[None], ignore_index=ignore_index)[0].squeeze(0)


def kept(target: Tensor, ignore_index: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns the weight s [T, N] of each token in its task's mean, and the index of its target, [T, N, 1].

    Both are 0 for ignored tokens.
    """
    keep = target != ignore_index
    share = keep.to(dtype) / keep.sum(-1, keepdim=True).clamp(min=1)
    return share, target.where(keep, 0).long().unsqueeze(-1)


def lower(p: Tensor, place: Tensor, by: Tensor) -> Tensor:
    """Subtracts `by` e from p, in place; it is deterministic on every device, which an atomic addition is not."""
    return p.scatter_(-1, place, p.gather(-1, place) - by)


# The reference computes the softmax from the logits, in one pass; exp(z - ℓ) would take three. The kernels use ℓ.
def _forward(c: SimpleNamespace, inputs: Tensors) -> tuple[Tensors, Tensors]:
    logits = wide(inputs[0])
    share, place = kept(c.target, c.ignore_index, logits.dtype)
    likelihood = torch.log_softmax(logits, -1).gather(-1, place).squeeze(-1)
    lse = logits.gather(-1, place).squeeze(-1) - likelihood
    return ((share * -likelihood).sum(-1).to(inputs[0].dtype),), (lse,)


def _jvp(c: SimpleNamespace, inputs: Tensors, r: Tensors, t_inputs: Tensors) -> tuple[Tensors, Tensors]:
    logits, t_logits = wide(inputs[0]), wide(t_inputs[0])
    share, place = kept(c.target, c.ignore_index, logits.dtype)
    t_lse = (torch.softmax(logits, -1) * t_logits).sum(-1)
    t_y = (share * (t_lse - t_logits.gather(-1, place).squeeze(-1))).sum(-1)
    return (t_y.to(inputs[0].dtype),), (t_lse,)


def _vjp(c: SimpleNamespace, inputs: Tensors, r: Tensors, ct_outputs: Tensors) -> Tensors:
    logits, ct_y = wide(inputs[0]), wide(ct_outputs[0])
    share, place = kept(c.target, c.ignore_index, logits.dtype)
    scale = (share * ct_y.unsqueeze(-1)).unsqueeze(-1)
    return (lower(torch.softmax(logits, -1).mul_(scale), place, scale).to(inputs[0].dtype),)


def _vjp_jvp(
    c: SimpleNamespace,
    inputs: Tensors,
    r: Tensors,
    t_inputs: Tensors,
    t_r: Tensors,
    ct_outputs: Tensors,
    t_ct_outputs: Tensors | None,
) -> Tensors:
    logits, t_logits, ct_y = wide(inputs[0]), wide(t_inputs[0]), wide(ct_outputs[0])
    share, place = kept(c.target, c.ignore_index, logits.dtype)
    t_ct_logits = (t_logits - t_r[0].unsqueeze(-1)).mul_((share * ct_y.unsqueeze(-1)).unsqueeze(-1))
    if t_ct_outputs is None:
        t_ct_logits.mul_(torch.softmax(logits, -1))
    else:
        t_scale = (share * wide(t_ct_outputs[0]).unsqueeze(-1)).unsqueeze(-1)
        lower(t_ct_logits.add_(t_scale).mul_(torch.softmax(logits, -1)), place, t_scale)
    return (t_ct_logits.to(inputs[0].dtype),)


OP = Op(
    "cross_entropy",
    inputs=("logits",),
    constants=("target",),
    kernels={
        "reference": Rules(_forward, _jvp, _vjp, _vjp_jvp),
        "cpu": cpp.rules("cross_entropy", constants=("target",), scalars=lambda c: (c.ignore_index,)),
        "triton": triton_kernels.rules("cross_entropy"),
    },
)


def _plain(logits: Tensor, target: Tensor, ignore_index: int = -100) -> Tensor:
    if logits.dim() == 3:
        return torch.stack([_plain(z, t, ignore_index) for z, t in zip(logits, target, strict=True)])
    total = F.cross_entropy(logits, target.long(), ignore_index=ignore_index, reduction="sum")
    return total / max((target != ignore_index).sum().item(), 1)


def ragged(make: Make, V: int, T: int, N: int, ignore_index: int = -100) -> Tensor:
    """Draws targets [T, N] below V; task t ignores the last t of its tokens."""
    target = make.integers(V, T, N)
    ignored = torch.arange(N).flip(0) < torch.arange(T).unsqueeze(1)
    return target.where(~ignored.to(target.device), ignore_index)


def _samples(make: Make) -> list[Sample]:
    return [
        Sample("tasks", (make(3, 4, 5), make.integers(5, 3, 4))),
        Sample("ragged", (make(3, 4, 5), ragged(make, 5, 3, 4))),
        Sample("ignored-in-range", (make(2, 5, 3), ragged(make, 3, 2, 5, 1)), {"ignore_index": 1}),
        Sample("one", (make(5, 7), make.integers(7, 5).int()), per_task=False),
        Sample("large", (100 * make(2, 3, 5), ragged(make, 5, 2, 3))),
        Sample("nothing-kept", (make(2, 2, 3), ragged(make, 3, 3, 2)[1:])),
        Sample("no-tokens", (make(2, 0, 3), make.integers(3, 2, 0))),
    ]


def _benchmark(make: Make) -> list[Sample]:
    return [Sample("8x160x2000", (make(8, 160, 2000), make.integers(2000, 8, 160)))]


def _cost(sample: Sample, order: int) -> Cost:
    n, size = sample.args[0].numel(), sample.args[0].element_size()
    return Cost(flop=(4, 5, 8)[order] * n, bytes=(1, 2, 3)[order] * n * size)


SPEC = Spec(OP, cross_entropy, _plain, _samples, _benchmark, _cost)
