"""Check all orders of an op against float64: the error is at most twice that of plain PyTorch in the same dtype.

Beside that, four units of rounding are allowed. A kernel that multiplies float32 matrices in three TF32 parts drops the
product of the low parts, and rounds these: its unit is 2^-21, not 2^-23.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
import torch.autograd.forward_ad as fwd
from torch import Tensor
from torch.utils._pytree import tree_leaves

import metakern as mk
from benchmarks.calls import function
from benchmarks.gpu.pool import Job, Row
from benchmarks.gpu.problems import FAR, OPS, Random, cast, last_task, samples
from metakern.ops import SPECS
from metakern.ops.core import backend
from metakern.ops.core.spec import Sample

DTYPES = ("bfloat16", "float32")
BEYOND = "more than 2^31 elements"
IN_PARTS = ("attention", "linear", "metalstm_update")  # ops whose kernels multiply float32 matrices in TF32 parts
HALF = ("causal-1024x64", "grouped-1000x128", "lengths-900x64")  # samples of attention that are checked in float16 too


class Check(NamedTuple):
    """An op, plain PyTorch in the same dtype, plain PyTorch in float64, and the float64 arguments of all three."""

    op: Callable[..., Any]
    plain: Callable[..., Any]
    exact: Callable[..., Any]
    arguments: list[Tensor]


def results(f: Callable[..., Any], arguments: list[Tensor], dtype: torch.dtype, forward: bool = True) -> list[Tensor]:
    """Return outputs, first derivatives, and second derivatives by reverse over reverse and by forward over reverse.

    Those by forward over reverse are tangents of the outputs and of the first derivatives; inputs and cotangents have
    tangents. PyTorch has no forward mode for some operations: without `forward` these tangents are computed from
    reverse mode. Random tensors are rounded to bfloat16, so that they are the same in every dtype.
    """
    x = [a.to(dtype).requires_grad_() for a in arguments]
    draw, options = Random(torch.bfloat16, seed=9), {"allow_unused": True, "materialize_grads": True}

    def like(tensors: list[Tensor]) -> list[Tensor]:
        return [draw(*t.shape).to(dtype) for t in tensors]

    y = tree_leaves(f(*x))
    ct, t_ct, t_x = (like(tensors) for tensors in (y, y, x))
    leaves = [c.requires_grad_() for c in ct]
    ct_x = torch.autograd.grad(y, x, leaves, create_graph=True, **options)
    second = torch.autograd.grad(ct_x, [*x, *leaves], t_x, retain_graph=not forward, **options)
    if forward:
        with fwd.dual_level():
            duals = [fwd.make_dual(a.detach().requires_grad_(), t) for a, t in zip(x, t_x, strict=True)]
            y_dual = tree_leaves(f(*duals))
            ct_dual = [fwd.make_dual(c.detach(), t) for c, t in zip(ct, t_ct, strict=True)]
            t_ct_x = torch.autograd.grad(y_dual, duals, ct_dual, **options)
            tangents = [fwd.unpack_dual(t).tangent for t in (*y_dual, *t_ct_x)]
        tangents = [torch.zeros_like(p) if t is None else t for t, p in zip(tangents, (*y, *x), strict=True)]
    else:
        bent, t_y = second[: len(x)], second[len(x) :]
        straight = torch.autograd.grad(y, x, t_ct, **options)
        tangents = [*t_y, *(a + b for a, b in zip(bent, straight, strict=True))]
    return [t.detach().double() for t in (*y, *ct_x, *second, *tangents)]


def errors(found: list[Tensor], truth: list[Tensor]) -> Tensor:
    """Return the relative error of each result, [results]."""
    return torch.stack([(a - t).norm() / (t.norm() + 1e-30) for a, t in zip(found, truth, strict=True)])


@contextmanager
def deterministic() -> Iterator[None]:
    """Fill new memory with NaN, and make PyTorch's own kernels deterministic; one that has no such form raises."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def chosen() -> Iterator[set[str]]:
    """Collect the backends whose rules run, to notice an op that falls back to the reference."""
    names: set[str] = set()
    choose = backend.choose

    def note(op: str, kernels: Any, tensors: Any) -> Any:
        rules = choose(op, kernels, tensors)
        names.update(name for name, candidate in kernels.items() if candidate is rules)
        return rules

    with patch.object(backend, "choose", note):
        yield names


def compare(backend: str, problems: list[Check], dtype: str, in_parts: bool = False) -> Row:
    """Compare an op with plain PyTorch at all orders, on a backend; return a row with the errors.

    Errors are geometric means over the problems, because the error of a single one may be small or large by chance.
    """
    low, means, names, repeats = getattr(torch, dtype), [], set(), True
    eps = torch.finfo(low).eps
    for op, plain, exact, arguments in problems:
        truth = results(exact, arguments, torch.float64, forward=False)
        theirs = results(plain, arguments, low, forward=False)
        with mk.backend(backend), chosen() as taken:
            ours = results(op, arguments, low)
            with deterministic():
                once, twice = (results(op, arguments, low) for _ in range(2))
        means.append(torch.stack([errors(found, truth) for found in (theirs, ours, once)]) + eps / 8)
        repeats = repeats and all(a.equal(b) for a, b in zip(once, twice, strict=True))
        names |= taken
    theirs, *ours = torch.stack(means).log().mean(0).exp()
    worst = torch.maximum(*ours)
    return {
        "error": worst.max().item(),
        "plain": theirs.max().item(),
        "repeats": repeats,
        "backends": sorted(names),
        "good": bool((worst <= 2 * theirs + 4 * (4 if in_parts else 1) * eps).all()) and repeats and names == {backend},
    }


def check(op: str, sample: str, dtype: str, tiny: bool) -> Row:
    """Check one sample of an op; small samples are drawn four times."""
    spec, draw, problems = SPECS[op], samples(op, tiny)[sample], []
    for seed in range(4 if tiny else 1):
        low = cast(draw(Random(getattr(torch, dtype), seed)), getattr(torch, dtype))
        exact, arguments = function(spec.plain, cast(low, torch.float64))
        problems.append(Check(function(spec.call, low)[0], function(spec.plain, low)[0], exact, arguments))
    return compare("triton", problems, dtype, in_parts=dtype == "float32" and op in IN_PARTS)


def far(op: str, tiny: bool) -> Row:
    """Check that the last task of a tensor with more than 2^31 elements gives what that task alone gives.

    The rounding may differ: how many rows a program sums depends on the number of tasks.
    """

    def found(sample: Sample) -> list[Tensor]:
        f, x = function(SPECS[op].call, sample)
        leaves = [t.requires_grad_() for t in x]
        y = f(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, y.detach())]

    make = Random(torch.float32 if tiny else torch.bfloat16, seed=1)
    draws = samples(op, True).values() if tiny else (FAR[op],)
    sample = next(sample for draw in draws if (sample := draw(make)).per_task)
    with mk.backend("triton"):
        alone = found(last_task(sample))
        error = errors([t[-1:].double() for t in found(sample)], [t.double() for t in alone]).max().item()
        return {"error": error, "good": error <= 4 * torch.finfo(alone[0].dtype).eps}


def jobs(tiny: bool) -> Iterator[Job]:
    """Every op at small samples of many kinds, and at the sizes of real models."""
    for op in OPS:
        for small in (True,) if tiny else (True, False):
            for sample in samples(op, small):
                for dtype in ("float32",) if small else (*DTYPES, "float16") if sample in HALF else DTYPES:
                    label = {"op": op, "sample": sample, "small": small, "dtype": dtype}
                    yield Job(label, partial(check, op, sample, dtype, small))
    for op in FAR.keys() & OPS:
        yield Job({"op": op, "sample": BEYOND}, partial(far, op, tiny))


def small() -> bool:
    """Check two small samples of each op, for compute-sanitizer; return whether all are good."""
    return all(check(op, sample, "float32", True)["good"] for op in OPS for sample in list(samples(op, True))[:2])
