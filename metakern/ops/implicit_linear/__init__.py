"""Linear layer whose weight differs, for each task, from a shared one by a sum of outer products that is never formed.

    y = x (W - Σ_j rate_j D_jᵀ X_j)ᵀ + b = x Wᵀ + b - Σ_j rate_j (x X_jᵀ) D_j

Gradient descent makes such weights: X_j is what the layer saw at a token of an earlier step, D_j the cotangent of its
output there, and rate_j the learning rate. The product with W is that of `linear`. This op adds the correction, for
which it has four rules. With r the rates, one for each row of the scores S, P, Q and G:

    S = X xᵀ      P = -r S       t_S = X t_xᵀ + t_X xᵀ            t_P = -(r t_S + t_r S)
    Q = D ct_yᵀ   G = -r Q       t_Q = D t_ct_yᵀ + t_D ct_yᵀ      t_G = -(r t_Q + t_r Q)

    forward   y      = b + Pᵀ D
    jvp       t_y    = t_b + t_Pᵀ D + Pᵀ t_D
    vjp       ct_x   = Gᵀ X                   ct_X   = G x                 ct_D   = P ct_y
              ct_r   = -Σ_n Q S               ct_b   = Σ_n ct_y
    vjp_jvp   t_ct_x = t_Gᵀ X + Gᵀ t_X        t_ct_X = t_G x + G t_x       t_ct_D = t_P ct_y + P t_ct_y
              t_ct_r = -Σ_n (t_Q S + Q t_S)   t_ct_b = Σ_n t_ct_y

| tensor | shape |
|---|---|
| x | [T, N, in] |
| bias b | [T, out], optional |
| X, D | [T, M, in], [T, M, out] |
| rates r | [T, M] |
| y | [T, N, out] |
| S, P, Q, G | [T, M, N], of which only those of a block of rows of x are in memory |

Residuals: none. A weight of its own would take in·out numbers for each task and N·in·out multiplications for its
gradient; this takes M·(in + out) numbers and N·M·(in + out) multiplications. Every product sums over, or results in, as
many numbers as the layer is wide, beside which the traffic of the scores is small. So all of them are ordinary matrix
products, and only the scores that a derivative uses are computed. Half precision accumulates in float32 inside each
product, and over blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metakern.ops.core import checks, cpp, matrices, triton_kernels
from metakern.ops.core.autocast import autocast
from metakern.ops.core.autograd import Op
from metakern.ops.core.matrices import Product, products, rows, wide
from metakern.ops.core.rules import Rules, Tensors
from metakern.ops.core.spec import Cost, Make, Sample, Spec
from metakern.ops.linear import SPEC as _LINEAR
from metakern.ops.linear import linear

# Bytes of S for a block of rows of x. It fits into the cache, so that the second products read it from there.
_BYTES = {"cpu": 4 * 2**20, "cuda": 16 * 2**20}
_LEAST_ROWS = 64


@autocast("lower")
def implicit_linear(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, X: Tensor, D: Tensor, rates: Tensor | float
) -> Tensor:
    """Returns x Wᵀ + b - Σ_j rate_j (x X_jᵀ) D_j, a linear layer after gradient descent that forms no weight.

    It equals a linear layer whose weight was changed by `weight -= rate_j * outer(D_j, X_j)` for each pair j. Rates of
    steps, momentum and masks are all rates of pairs: a token of padding has the rate 0. The result is differentiable
    twice in all arguments. Half precision accumulates in float32; `torch.autocast` lowers float32 to its own dtype.

    Args:
        x: [..., in], or [T, ..., in] for T tasks with pairs of their own.
        weight: The weight W before the changes, [out, in], which all tasks share, or [T, out, in] with one for each
            task; None for the correction alone, without x Wᵀ.
        bias: [out], or [T, out] with one for each task; None for zeros.
        X: The inputs of the layer at M tokens of earlier steps, [M, in], or [T, M, in] with those of each task.
        D: The cotangents of its outputs at these tokens, [M, out] or [T, M, out], as X is.
        rates: The learning rate of each pair, [M] or [T, M], or one for all: a number or a scalar. Where the other
            arguments are in half precision, it may be float32.

    Returns:
        [..., out] or [T, ..., out].

    Raises:
        TypeError: For tensors that are not floating point, or not of one dtype, or rates that are no number.
        ValueError: Where shapes or devices do not fit.

    >>> import metakern as mk, torch
    >>> x, weight, X, D = torch.ones(2, 1, 3), torch.ones(4, 3), torch.ones(2, 5, 3), torch.ones(2, 5, 4)
    >>> mk.ops.implicit_linear(x, weight, None, X, D, torch.tensor([[0.0], [0.1]]).expand(2, 5))[:, 0, 0]
    tensor([3.0000, 1.5000])
    """
    name = "implicit_linear"
    checks.tensor(name, "x", x)
    r = rates_of_pairs(name, X, D, rates)
    checks.floating(name, ("weight", "bias"), X=X, x=x, weight=weight, bias=bias)
    tasks, own, out = checks.tasks(name, x, "in", X=(X, "M, in")), X.shape[:-2], D.shape[-1]
    if weight is not None:
        _fits(name, "weight", weight, own, (out, X.shape[-1]), "out, in")
    if bias is not None:
        _fits(name, "bias", bias, own, (out,), "out")
        bias = bias.expand(*own, out)
    base = None if weight is None else linear(x, weight)
    if tasks is None:
        X, D, r, bias = X[None], D[None], r[None], None if bias is None else bias[None]
    (y,) = OP(rows(x, tasks), bias, X, D, r)
    y = y.view(*x.shape[:-1], out)
    return y if base is None else base + y


def rates_of_pairs(op: str, X: Tensor, D: Tensor, rates: Tensor | float) -> Tensor:
    """Checks pairs X [T, M, in] and D [T, M, out], or without T, and returns their rates as a tensor [T, M] or [M]."""
    for key, value in {"X": X, "D": D}.items():
        checks.tensor(op, key, value)
    checks.floating(op, X=X, D=D)
    if X.dim() not in (2, 3):
        raise ValueError(f"{op}: X must have shape [M, in] or [T, M, in], got {list(X.shape)}")
    shape, of_tasks, dtype = X.shape[:-1], "T, " * (X.dim() - 2), wide(X[:0]).dtype
    checks.shape(op, "D", D, (*shape, D.shape[-1] if D.dim() else 0), f"[{of_tasks}M, out]")
    if not isinstance(rates, Tensor):
        if not isinstance(rates, float | int):
            raise TypeError(f"{op}: rates must be a tensor or a number, got {type(rates).__name__}")
        return torch.full(shape, float(rates), dtype=dtype, device=X.device)
    checks.floating(op, X=X, rates=rates.to(X.dtype) if rates.dtype == dtype else rates)
    if rates.dim() and rates.shape != shape[-1:]:
        checks.shape(op, "rates", rates, shape, f"[{of_tasks}M]")
    return rates.expand(shape)


def _fits(name: str, key: str, value: Tensor, own: tuple[int, ...], shape: tuple[int, ...], meaning: str) -> None:
    """Requires a parameter [*shape] that all tasks share or, where the pairs are those of each task, [T, *shape]."""
    if own and value.dim() > len(shape):
        checks.shape(name, key, value, (*own, *shape), f"[T, {meaning}]")
    else:
        checks.shape(name, key, value, shape, f"[{meaning}]")


class Side(NamedTuple):
    """The factors of S = X xᵀ (rows x, pairs X) or Q = D ct_yᵀ (rows ct_y, pairs D), and their tangents."""

    rows: Any
    pairs: Any
    t_rows: Any = None
    t_pairs: Any = None


class Wanted(NamedTuple):
    """Which of P, t_P, G, t_G and the sums for the rates, ct_r or t_ct_r, a rule uses."""

    P: bool = False
    t_P: bool = False  # noqa: N815
    G: bool = False
    t_G: bool = False  # noqa: N815
    for_rates: bool = False
    tangents: bool = False  # the sums are t_ct_r

    def factors(self, of_x: Side, of_ct_y: Side, t_rates: Tensor | None) -> tuple[bool, bool, bool, bool]:
        """Returns which of S, t_S, Q and t_Q have to be computed; a tangent that is zero has not."""
        t_S, t_Q = (side.t_rows is not None or side.t_pairs is not None for side in (of_x, of_ct_y))
        return (
            self.P or (self.t_P and t_rates is not None) or (self.for_rates and (t_Q or not self.tangents)),
            t_S and (self.t_P or self.for_rates),
            self.G or (self.t_G and t_rates is not None) or (self.for_rates and (t_S or not self.tangents)),
            t_Q and (self.t_G or self.for_rates),
        )


def rules(product: Product, scores: Callable[..., Tensors]) -> Rules:
    """Returns the four rules without blocks, given a product and `scores`.

    scores(wanted, rates, t_rates, of_x, of_ct_y) gets a `Side` for S and one for Q. It returns P, t_P, G, t_G and the
    sums for the rates, each None where it is zero or not wanted.
    """
    total = partial(products, product)

    def forward(c: SimpleNamespace, inputs: Tensors) -> tuple[Tensors, Tensors]:
        x, bias, X, D, rates = inputs
        P, *_ = scores(Wanted(P=True), rates, None, Side(x, X), Side(None, D))
        return (product(P.mT, D, None if bias is None else bias.unsqueeze(1)),), ()

    def jvp(c: SimpleNamespace, inputs: Tensors, r: Tensors, t_inputs: Tensors) -> tuple[Tensors, Tensors]:
        (x, _, X, D, rates), (t_x, t_bias, t_X, t_D, t_rates) = inputs, t_inputs
        wanted = Wanted(P=t_D is not None, t_P=True)
        P, t_P, *_ = scores(wanted, rates, t_rates, Side(x, X, t_x, t_X), Side(None, D))
        t_b = None if t_bias is None else t_bias.unsqueeze(1)
        t_y = total((_transposed(t_P), D), (_transposed(P), t_D), add=t_b)
        if t_y is t_b:
            return (t_bias.unsqueeze(1).expand(*x.shape[:2], -1).clone(),), ()
        return (t_y,), ()

    def vjp(c: SimpleNamespace, inputs: Tensors, r: Tensors, ct_outputs: Tensors) -> Tensors:
        (x, _, X, D, rates), (ct_y,) = inputs, ct_outputs
        for_x, for_bias, for_X, for_D, for_rates = c.needs
        wanted = Wanted(P=for_D, G=for_x or for_X, for_rates=for_rates)
        P, _, G, _, ct_rates = scores(wanted, rates, None, Side(x, X), Side(ct_y, D))
        return (
            product(G.mT, X) if for_x else None,
            ct_y.sum(1) if for_bias else None,
            product(G, x) if for_X else None,
            product(P, ct_y) if for_D else None,
            ct_rates,
        )

    def vjp_jvp(
        c: SimpleNamespace,
        inputs: Tensors,
        r: Tensors,
        t_inputs: Tensors,
        t_r: Tensors,
        ct_outputs: Tensors,
        t_ct_outputs: Tensors | None,
    ) -> Tensors:
        (x, _, X, D, rates), (t_x, _, t_X, t_D, t_rates), (ct_y,) = inputs, t_inputs, ct_outputs
        for_x, for_bias, for_X, for_D, for_rates = c.needs
        (t_ct_y,) = t_ct_outputs or (None,)
        wanted = Wanted(
            P=for_D and t_ct_y is not None,
            t_P=for_D,
            G=(for_x and t_X is not None) or (for_X and t_x is not None),
            t_G=for_x or for_X,
            for_rates=for_rates,
            tangents=True,
        )
        of_x, of_ct_y = Side(x, X, t_x, t_X), Side(ct_y, D, t_ct_y, t_D)
        P, t_P, G, t_G, t_ct_rates = scores(wanted, rates, t_rates, of_x, of_ct_y)
        return (
            total((_transposed(t_G), X), (_transposed(G), t_X)) if for_x else None,
            t_ct_y.sum(1) if for_bias and t_ct_y is not None else None,
            total((t_G, x), (G, t_x)) if for_X else None,
            total((t_P, ct_y), (P, t_ct_y)) if for_D else None,
            t_ct_rates,
        )

    return Rules(forward, jvp, vjp, vjp_jvp)


def _transposed(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.mT


def _scores(product: Product) -> Callable[..., Tensors]:
    """Returns `scores` in plain PyTorch around a product."""

    def both(side: Side, S: bool, t_S: bool) -> tuple[Any, Any]:
        rows, pairs, t_rows, t_pairs = side
        return (
            product(pairs, rows.mT) if S else None,
            products(product, (pairs, _transposed(t_rows)), (t_pairs, rows.mT)) if t_S else None,
        )

    def scores(wanted: Wanted, rates: Tensor, t_rates: Tensor | None, of_x: Side, of_ct_y: Side) -> Tensors:
        needed = wanted.factors(of_x, of_ct_y, t_rates)
        (S, t_S), (Q, t_Q) = both(of_x, *needed[:2]), both(of_ct_y, *needed[2:])
        pairs = ((t_Q, S), (Q, t_S)) if wanted.tangents else ((Q, S),)
        sums = [(wide(a) * b).sum(2) for a, b in pairs if a is not None and b is not None] if wanted.for_rates else []
        of_rates = -sum(sums[1:], sums[0]).to(rates.dtype) if sums else None
        factor, t_factor = -rates.unsqueeze(2), None if t_rates is None else -t_rates.unsqueeze(2)
        t_P = _t_scaled(S, t_S, factor, t_factor) if wanted.t_P else None
        t_G = _t_scaled(Q, t_Q, factor, t_factor) if wanted.t_G else None
        P, G = S.mul_(factor) if wanted.P else None, Q.mul_(factor) if wanted.G else None
        return P, t_P, G, t_G, of_rates

    return scores


def _t_scaled(A: Tensor | None, t_A: Tensor | None, factor: Tensor, t_factor: Tensor | None) -> Tensor | None:
    """Returns factor t_A + t_factor A, in the memory of t_A if it is given, or None if it is zero."""
    scaled = None if t_A is None else t_A.mul_(factor)
    if A is None or t_factor is None:
        return scaled
    return (A * t_factor).to(A.dtype) if scaled is None else scaled.add_(A * t_factor)


def by_blocks(rules: Rules) -> Rules:
    """Returns rules that call the given ones for a block of rows at a time."""

    def joined(blocks: list[Tensors]) -> Tensors:
        """Concatenates the results for rows, which come first in each block, and adds up the others."""
        if len(blocks) == 1:
            return blocks[0]
        of_rows, *others = zip(*blocks, strict=True)
        return None if of_rows[0] is None else torch.cat(of_rows, 1), *map(_summed, others)

    def forward(c: SimpleNamespace, inputs: Tensors) -> tuple[Tensors, Tensors]:
        return joined([rules.forward(c, _at(n, inputs))[0] for n in _blocks(inputs)]), ()

    def jvp(c: SimpleNamespace, inputs: Tensors, r: Tensors, t_inputs: Tensors) -> tuple[Tensors, Tensors]:
        return joined([rules.jvp(c, _at(n, inputs), (), _at(n, t_inputs))[0] for n in _blocks(inputs)]), ()

    def vjp(c: SimpleNamespace, inputs: Tensors, r: Tensors, ct_outputs: Tensors) -> Tensors:
        return joined([rules.vjp(c, _at(n, inputs), (), _at(n, ct_outputs)) for n in _blocks(inputs)])

    def vjp_jvp(
        c: SimpleNamespace,
        inputs: Tensors,
        r: Tensors,
        t_inputs: Tensors,
        t_r: Tensors,
        ct_outputs: Tensors,
        t_ct_outputs: Tensors | None,
    ) -> Tensors:
        groups = inputs, (), t_inputs, (), ct_outputs, t_ct_outputs
        return joined([rules.vjp_jvp(c, *(g and _at(n, g) for g in groups)) for n in _blocks(inputs)])

    return Rules(forward, jvp, vjp, vjp_jvp)


def _at(n: slice, group: Tensors) -> Tensors:
    """Returns a group of tensors for a block of rows: the first tensor is of rows, the others belong to all of them."""
    first, *rest = group
    return None if first is None else first[:, n], *rest


def _blocks(inputs: Tensors) -> Iterator[slice]:
    """Returns the blocks of rows, one at least: S for a block has at most `_BYTES`, or else `_LEAST_ROWS` rows."""
    x, _, X, *_ = inputs
    (T, N, _), M = x.shape, X.shape[1]
    row_bytes = max(T * M, 1) * max(x.element_size(), 4)
    size = max(_BYTES.get(x.device.type, _BYTES["cuda"]) // row_bytes, _LEAST_ROWS)
    return (slice(n, min(n + size, N)) for n in range(0, max(N, 1), size))


def _summed(values: Tensors) -> Tensor | None:
    """Returns the sum of the values of all blocks, or None if they have none; half precision is added in float32."""
    first, *rest = values
    return None if first is None else sum(rest, wide(first)).to(first.dtype)


OP = Op(
    "implicit_linear",
    inputs=("x", "bias", "X", "D", "rates"),
    kernels={
        "reference": by_blocks(rules(matrices.product, _scores(matrices.product))),
        "cpu": by_blocks(rules(cpp.product, _scores(cpp.product))),
        "triton": triton_kernels.rules("implicit_linear"),
    },
    zero_tangents=False,
)


def _plain(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, X: Tensor, D: Tensor, rates: Tensor | float
) -> Tensor:
    tasks = "t" * (X.dim() - 2)
    r = torch.as_tensor(rates, dtype=x.dtype, device=x.device).expand(X.shape[:-1])
    s = torch.einsum(f"{tasks}...i,{tasks}mi->{tasks}...m", x, X)
    y = -torch.einsum(f"{tasks}...m,{tasks}m,{tasks}mo->{tasks}...o", s, r, D)
    if weight is not None:
        y = y + _LINEAR.plain(x, weight)
    if bias is None:
        return y
    return y + bias.view(*bias.shape[:-1], *(1,) * (x.dim() - bias.dim()), bias.shape[-1])


def _samples(make: Make) -> list[Sample]:
    def sample(
        name: str,
        rows: tuple[int, ...],
        M: int,
        out: int,
        T: int | None = None,
        weight: str = "task",
        bias: str = "task",
        rates: str = "pair",
    ) -> Sample:
        tasks = () if T is None else (T,)
        of = {"task": tasks, "shared": ()}
        args = (
            make(*tasks, *rows),
            make(*of[weight], out, rows[-1]) if weight in of else None,
            make(*of[bias], out) if bias in of else None,
            make(*tasks, M, rows[-1]),
            make(*tasks, M, out),
            make(*{"pair": (*tasks, M), "token": (M,), "one": ()}[rates]),
        )
        own = T is not None and weight != "shared" and bias != "shared" and rates == "pair"
        return Sample(name, args, per_task=own)

    return [
        sample("correction", (3, 4), 2, 3, T=2, weight="none"),
        sample("tasks", (5, 3), 2, 5, T=2),
        sample("shared", (2, 2, 3), 5, 2, T=2, weight="shared", bias="shared", rates="token"),
        sample("own-bias", (3, 4), 2, 3, T=2, weight="shared", rates="one"),
        sample("vector", (5,), 3, 2, bias="none"),
        sample("no-rows", (0, 3), 2, 4, T=2, bias="shared"),
        sample("no-pairs", (2, 3), 0, 4, T=2),
        sample("no-tasks", (2, 3), 2, 4, T=0),
    ]


def _benchmark(make: Make) -> list[Sample]:
    def sample(name: str, T: int, N: int, M: int, size: int, out: int) -> Sample:
        return Sample(name, (make(T, N, size), None, make(T, out), make(T, M, size), make(T, M, out), make(T, M)))

    return [sample("8x64x128-512-512", 8, 64, 128, 512, 512), sample("4x64x192-576-1536", 4, 64, 192, 576, 1536)]


def _cost(sample: Sample, order: int) -> Cost:
    x, weight, _, X, D, _ = sample.args
    (M, size), out, element = X.shape[-2:], D.shape[-1], x.element_size()
    n, base = x.numel() // size, 0 if weight is None else size * out
    moved = n * size + X.numel() + D.numel() + (0 if weight is None else weight.numel())
    return Cost(
        flop=2 * n * (M * ((1, 3, 7)[order] * size + (1, 2, 5)[order] * out) + (1, 2, 4)[order] * base),
        bytes=((1, 2, 3)[order] * moved + (1, 1, 2)[order] * n * out) * element,
    )


SPEC = Spec(OP, implicit_linear, _plain, _samples, _benchmark, _cost)
