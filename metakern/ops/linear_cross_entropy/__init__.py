"""Cross-entropy of the logits of a linear layer, computed in chunks of rows at each order and never held as a whole.

    z = x Wᵀ        ℓ_n = log Σ_v exp(z_nv)        p_nv = exp(z_nv - ℓ_n)        e_n = one-hot(target_n)

    forward   y_n  = ℓ_n - z_n[target_n]
    jvp       t_z  = t_x Wᵀ + x t_Wᵀ        t_ℓ_n = Σ_v p_nv t_z_nv        t_y_n = t_ℓ_n - t_z_n[target_n]
    vjp       g    = ct_y (p - e)           ct_x  = g W                    ct_W  = gᵀ x
    vjp_jvp   t_g  = ct_y p (t_z - t_ℓ) + t_ct_y (p - e)
              t_ct_x = t_g W + g t_W        t_ct_W = t_gᵀ x + gᵀ t_x

| tensor | shape |
|---|---|
| hidden x | [T, N, D] |
| weight W | [T, V, D] |
| target | [T, N] |
| y, residual ℓ | [T, N], float32 for half precision |

The rules give the loss of each token. The public function takes the mean of each task after them, so that with a shared
weight the tokens of all tasks are one sequence. A chunk has as many rows of a task as fit a fixed number of bytes, but
at least 64; and at most half of its tokens (with a shared weight: half of a task's tokens, or 64 if that is more). On a
GPU it has these rows of as many tasks as fit, since small chunks leave most of it idle. Half precision has its products
in half precision and everything else in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from metakern.ops.core import checks, matrices, triton_kernels
from metakern.ops.core.autocast import autocast
from metakern.ops.core.autograd import Op
from metakern.ops.core.matrices import wide
from metakern.ops.core.rules import Rules, Tensors
from metakern.ops.core.spec import Cost, Make, Sample, Spec
from metakern.ops.cross_entropy import SPEC as _CROSS_ENTROPY
from metakern.ops.cross_entropy import kept, lower, ragged

# Bytes of a chunk of logits. On a CPU it fits the cache, with enough rows for a matrix product; a GPU needs more work.
_BYTES = {"cpu": 4 * 2**20, "cuda": 64 * 2**20}
_LEAST_ROWS = 64
_ONE_TASK = {"cpu"}  # devices where a chunk has rows of one task alone
Tasks = int | slice


@autocast("lower")
def linear_cross_entropy(hidden: Tensor, weight: Tensor, target: Tensor, ignore_index: int = -100) -> Tensor:
    """Returns `cross_entropy(hidden @ weight.T, target)` while holding only a chunk of the logits, at every order.

    It is differentiable twice in `hidden` and `weight`. In half precision the products are in half precision and
    everything else in float32; `torch.autocast` lowers float32 to the region's dtype.

    Args:
        hidden: The inputs of the linear layer, [T, N, D] for N tokens of each of T tasks, or [N, D].
        weight: [V, D]; or, with hidden [T, N, D], [T, V, D] with one for each task.
        target: [T, N] or [N], int64 or int32, in [0, V).
        ignore_index: The target of tokens that do not count in the mean.

    Returns:
        The mean over the tokens of each task that count, in nats: [T], or a scalar for hidden [N, D]; 0 for a task in
        which no token counts.

    Raises:
        TypeError: For `hidden` and `weight` that are not floating point or not of one dtype, or a target that is not
            int64 or int32.
        ValueError: Where shapes or devices do not fit; on the CPU also for a target outside [0, V).

    >>> import metakern as mk, torch
    >>> mk.ops.linear_cross_entropy(torch.zeros(2, 3, 5), torch.ones(4, 5), torch.zeros(2, 3, dtype=torch.long))
    tensor([1.3863, 1.3863])
    """
    name = "linear_cross_entropy"
    checks.floating(name, hidden=hidden, weight=weight)
    if hidden.dim() not in (2, 3):
        raise ValueError(f"{name}: hidden must have shape [N, D] or [T, N, D], got {list(hidden.shape)}")
    if weight.dim() not in (2, 3):
        raise ValueError(f"{name}: weight must have shape [V, D] or [T, V, D], got {list(weight.shape)}")
    own = weight.dim() == 3 and hidden.dim() == 3
    expected = (*hidden.shape[:own], *weight.shape[-2:-1], hidden.shape[-1])
    checks.shape(name, "weight", weight, expected, "[T, V, D]" if own else "[V, D]")
    checks.indices(name, "target", target, hidden.device)
    checks.shape(name, "target", target, hidden.shape[:-1], "[N]" if hidden.dim() == 2 else "[T, N]")
    checks.below(name, "target", target, weight.shape[-2], ignore_index)
    share, place = kept(target, ignore_index, wide(hidden[..., :0]).dtype)
    most = max((target.shape[-1] + 1) // 2, _LEAST_ROWS)
    if own:
        (y,) = OP(hidden, weight, target=place.squeeze(-1), most=most)
    else:
        (y,) = OP(matrices.rows(hidden, None), weight[None], target=place.reshape(1, -1), most=most)
    return (share * y.view(share.shape)).sum(-1).to(hidden.dtype)


class Softmax(NamedTuple):
    """The rules of the cross-entropy of each token, for a chunk of rows of logits z; `rules` adds the products.

    losses(z, target)                                       -> y, ℓ
    t_losses(z, ℓ, target, t_z)                             -> t_y, t_ℓ
    cotangents(z, ℓ, target, ct_y)                          -> g                 may overwrite z
    t_cotangents(z, ℓ, target, t_z, t_ℓ, ct_y, t_ct_y)      -> t_g, g            may overwrite z and t_z
    """

    losses: Callable[..., tuple[Tensor, Tensor]]
    t_losses: Callable[..., tuple[Tensor, Tensor]]
    cotangents: Callable[..., Tensor]
    t_cotangents: Callable[..., tuple[Tensor, Tensor]]


def rules(softmax: Softmax, matmul: Callable[[Tensor, Tensor], Tensor] = torch.matmul) -> Rules:
    """Returns the four rules: the products with the weight, around the rules of the softmax."""

    def forward(c: SimpleNamespace, inputs: Tensors) -> tuple[Tensors, Tensors]:
        hidden, weight = inputs
        losses, lses = _Rows(c.target), _Rows(c.target)
        for t, rows in _chunks(c, hidden, weight):
            loss, lse = softmax.losses(matmul(hidden[t, rows], weight[t].mT), c.target[t, rows])
            losses.add(t, loss)
            lses.add(t, lse)
        nothing = wide(hidden[:0].flatten())
        return (losses.all(nothing),), (lses.all(nothing),)

    def jvp(c: SimpleNamespace, inputs: Tensors, r: Tensors, t_inputs: Tensors) -> tuple[Tensors, Tensors]:
        (hidden, weight), (lse,) = inputs, r
        t_losses, t_lses = _Rows(c.target), _Rows(c.target)
        for t, rows in _chunks(c, hidden, weight):
            logits = matmul(hidden[t, rows], weight[t].mT)
            t_logits = _t_logits(matmul, inputs, t_inputs, t, rows)
            t_loss, t_lse = softmax.t_losses(logits, lse[t, rows], c.target[t, rows], t_logits)
            t_losses.add(t, t_loss)
            t_lses.add(t, t_lse)
        nothing = lse[:0].flatten()
        return (t_losses.all(nothing),), (t_lses.all(nothing),)

    def vjp(c: SimpleNamespace, inputs: Tensors, r: Tensors, ct_outputs: Tensors) -> Tensors:
        (hidden, weight), (lse,), (ct_y,) = inputs, r, ct_outputs
        ct_hidden, ct_weight = _Rows(hidden), _Sums(c, hidden, weight, matmul)
        for t, rows in _chunks(c, hidden, weight):
            x = hidden[t, rows]
            g = softmax.cotangents(matmul(x, weight[t].mT), lse[t, rows], c.target[t, rows], ct_y[t, rows]).to(x.dtype)
            if c.needs[0]:
                ct_hidden.add(t, matmul(g, weight[t]))
            if c.needs[1]:
                ct_weight.add(t, g.mT, x)
        return ct_hidden.all(hidden[:0]) if c.needs[0] else None, ct_weight.all() if c.needs[1] else None

    def vjp_jvp(
        c: SimpleNamespace,
        inputs: Tensors,
        r: Tensors,
        t_inputs: Tensors,
        t_r: Tensors,
        ct_outputs: Tensors,
        t_ct_outputs: Tensors | None,
    ) -> Tensors:
        (hidden, weight), (t_hidden, t_weight), (lse,), (t_lse,), (ct_y,) = inputs, t_inputs, r, t_r, ct_outputs
        t_ct_hidden, t_ct_weight = _Rows(hidden), _Sums(c, hidden, weight, matmul)
        for t, rows in _chunks(c, hidden, weight):
            x, t_logits = hidden[t, rows], _t_logits(matmul, inputs, t_inputs, t, rows)
            t_ct_y = None if t_ct_outputs is None else t_ct_outputs[0][t, rows]
            tangents = (t_logits, t_lse[t, rows], ct_y[t, rows], t_ct_y)
            t_g, g = softmax.t_cotangents(matmul(x, weight[t].mT), lse[t, rows], c.target[t, rows], *tangents)
            t_g, g = t_g.to(x.dtype), g.to(x.dtype)
            if c.needs[0]:
                t_ct_x = matmul(t_g, weight[t])
                t_ct_hidden.add(t, t_ct_x if t_weight is None else _plus_product(t_ct_x, g, t_weight[t]))
            if c.needs[1]:
                t_ct_weight.add(t, t_g.mT, x)
                if t_hidden is not None:
                    t_ct_weight.add(t, g.mT, t_hidden[t, rows])
        return t_ct_hidden.all(hidden[:0]) if c.needs[0] else None, t_ct_weight.all() if c.needs[1] else None

    return Rules(forward, jvp, vjp, vjp_jvp)


def _losses(z: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    z, place = wide(z), target.unsqueeze(-1)
    likelihood = torch.log_softmax(z, -1).gather(-1, place).squeeze(-1)
    return -likelihood, z.gather(-1, place).squeeze(-1) - likelihood


def _t_losses(z: Tensor, lse: Tensor, target: Tensor, t_z: Tensor) -> tuple[Tensor, Tensor]:
    t_lse = (torch.softmax(wide(z), -1) * t_z).sum(-1)
    return t_lse - t_z.gather(-1, target.unsqueeze(-1)).squeeze(-1), t_lse


def _cotangents_of_logits(z: Tensor, lse: Tensor, target: Tensor, ct_y: Tensor) -> Tensor:
    ct_y = ct_y.unsqueeze(-1)
    return lower(torch.softmax(wide(z), -1).mul_(ct_y), target.unsqueeze(-1), ct_y)


def _t_cotangents_of_logits(
    z: Tensor, lse: Tensor, target: Tensor, t_z: Tensor, t_lse: Tensor, ct_y: Tensor, t_ct_y: Tensor | None
) -> tuple[Tensor, Tensor]:
    p, ct_y, place = torch.softmax(wide(z), -1), ct_y.unsqueeze(-1), target.unsqueeze(-1)
    t_g = wide(t_z).sub_(t_lse.unsqueeze(-1)).mul_(ct_y)
    if t_ct_y is None:
        t_g.mul_(p)
    else:
        t_ct_y = t_ct_y.unsqueeze(-1)
        lower(t_g.add_(t_ct_y).mul_(p), place, t_ct_y)
    return t_g, lower(p.mul_(ct_y), place, ct_y)


def _chunks(c: SimpleNamespace, hidden: Tensor, weight: Tensor) -> Iterator[tuple[Tasks, slice]]:
    """Returns an iterator over the chunks, each a task (on a GPU, also a slice of tasks) and a slice of their rows.

    A chunk has at most `c.most` rows of a task and at most half of the task's, rounded up.
    """
    (T, N, _), V, device = hidden.shape, weight.shape[1], hidden.device.type
    size, groups = _rows_at_once(c, hidden, weight), cast(Iterable[Tasks], range(T))
    at_once = _BYTES.get(device, _BYTES["cuda"]) // (size * _row_bytes(hidden, V))
    if at_once > 1 and device not in _ONE_TASK:
        groups = (slice(t, min(t + at_once, T)) for t in range(0, T, at_once))
    return ((t, slice(n, min(n + size, N))) for t in groups for n in range(0, N, size))


def _row_bytes(hidden: Tensor, V: int) -> int:
    return max(V, 1) * max(hidden.element_size(), 4)


def _rows_at_once(c: SimpleNamespace, hidden: Tensor, weight: Tensor) -> int:
    """Returns how many rows of a task a chunk has."""
    size = _BYTES.get(hidden.device.type, _BYTES["cuda"]) // _row_bytes(hidden, weight.shape[1])
    return max(min(max(size, _LEAST_ROWS), c.most, (hidden.shape[1] + 1) // 2), 1)


class _Rows:
    """Results for each row of `like`, [T, N, ...], from those of the chunks."""

    def __init__(self, like: Tensor) -> None:
        self._shape = like.shape
        self._found: dict[Any, list[Tensor]] = {}

    def add(self, t: Tasks, rows: Tensor) -> None:
        self._found.setdefault(t if isinstance(t, int) else t.start, []).append(rows)

    def all(self, nothing: Tensor) -> Tensor:
        """Returns all results; `nothing` has their dtype and no element."""
        dim = 1 - len(self._shape)  # of the rows
        found = [torch.cat(parts, dim) if len(parts) > 1 else parts[0] for parts in self._found.values()]
        return torch.cat(found or [nothing]).view(self._shape)


class _Sums:
    """The sum over all rows of products, for each task: a cotangent of the weight, [T, V, D].

    Of many chunks it is added up in float32.
    """

    def __init__(self, c: SimpleNamespace, hidden: Tensor, weight: Tensor, matmul: Any) -> None:
        self._like, self._matmul = weight, matmul
        self._dtype = wide(weight[:0]).dtype if 2 * _rows_at_once(c, hidden, weight) < hidden.shape[1] else weight.dtype
        self._found: dict[Any, Tensor] = {}

    def add(self, t: Tasks, a: Tensor, b: Tensor) -> None:
        """Add a b to the sums of task (or tasks) t."""
        key = t if isinstance(t, int) else t.start
        known = self._found.get(key)
        self._found[key] = self._matmul(a, b).to(self._dtype) if known is None else _plus_product(known, a, b)

    def all(self) -> Tensor:
        found = [sums if sums.dim() == 3 else sums[None] for sums in self._found.values()]
        if not found:
            return torch.zeros_like(self._like)
        return (found[0] if len(found) == 1 else torch.cat(found)).to(self._like.dtype)


def _t_logits(matmul: Any, inputs: Tensors, t_inputs: Tensors, t: Tasks, rows: slice) -> Tensor:
    """Returns t_x Wᵀ + x t_Wᵀ for a chunk; one of the two tangents may be None."""
    (hidden, weight), (t_hidden, t_weight) = inputs, t_inputs
    if t_hidden is None:
        return matmul(hidden[t, rows], t_weight[t].mT)
    t_logits = matmul(t_hidden[t, rows], weight[t].mT)
    return t_logits if t_weight is None else _plus_product(t_logits, hidden[t, rows], t_weight[t].mT)


def _plus_product(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Returns total + a b, in the memory of `total`, which may be float32 for half-precision factors."""
    if total.dtype != a.dtype:
        return total.add_(a @ b)
    return total.addmm_(a, b) if total.dim() == 2 else total.baddbmm_(a, b)


OP = Op(
    "linear_cross_entropy",
    inputs=("hidden", "weight"),
    constants=("target",),
    kernels={
        "reference": rules(Softmax(_losses, _t_losses, _cotangents_of_logits, _t_cotangents_of_logits)),
        "triton": triton_kernels.rules("linear_cross_entropy"),
    },
    zero_tangents=False,
)


def _plain(hidden: Tensor, weight: Tensor, target: Tensor, ignore_index: int = -100) -> Tensor:
    return _CROSS_ENTROPY.plain(hidden @ weight.mT, target, ignore_index)


def _samples(make: Make) -> list[Sample]:
    return [
        Sample("tasks", (make(2, 5, 3), make(2, 4, 3), make.integers(4, 2, 5))),
        Sample("ragged", (make(3, 4, 2), make(3, 5, 2), ragged(make, 5, 3, 4))),
        Sample("shared", (make(2, 3, 4), make(5, 4), ragged(make, 5, 2, 3, 0)), {"ignore_index": 0}, per_task=False),
        Sample("one", (make(7, 3), make(5, 3), make.integers(5, 7).int()), per_task=False),
        Sample("large", (10 * make(2, 3, 5), 10 * make(2, 4, 5), ragged(make, 4, 2, 3))),
        Sample("one-token", (make(2, 1, 3), make(2, 5, 3), make.integers(5, 2, 1))),
        Sample("no-tokens", (make(2, 0, 3), make(2, 5, 3), make.integers(5, 2, 0))),
    ]


def _benchmark(make: Make) -> list[Sample]:
    return [
        Sample("8x160x256-2000", (make(8, 160, 256), make(8, 2000, 256), make.integers(2000, 8, 160))),
        Sample("1024x256-32000", (make(1024, 256), make(32000, 256), make.integers(32000, 1024)), per_task=False),
    ]


def _cost(sample: Sample, order: int) -> Cost:
    hidden, weight, target = sample.args
    logits = target.numel() * weight.shape[-2]
    moved = hidden.numel() + weight.numel()
    return Cost(
        flop=logits * (2 * (1, 3, 7)[order] * hidden.shape[-1] + (4, 5, 10)[order]),
        bytes=(1, 2, 3)[order] * moved * hidden.element_size(),
    )


SPEC = Spec(OP, linear_cross_entropy, _plain, _samples, _benchmark, _cost)
