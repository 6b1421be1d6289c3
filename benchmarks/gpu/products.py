"""Time products of float32, with what their kernel computes beside them, next to PyTorch's operations."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.gpu.measure import milliseconds
from benchmarks.gpu.pool import Job, Row
from benchmarks.gpu.problems import Random
from metakern.ops.core import matrices
from metakern.ops.core.triton_kernels import products

# T, N, K, M; which factors are transposed views ("nt": the right one); what is computed beside the product.
SIZES: list[tuple[tuple[int, int, int, int], str, str]] = [
    ((8, 256, 128, 512), "nt", "bias"),
    ((8, 256, 512, 128), "nt", "bias"),
    ((8, 512, 256, 128), "tn", "sums"),
    ((8, 2000, 256, 128), "tn", ""),
    ((8, 256, 2000, 128), "nn", ""),
    ((8, 256, 128, 2000), "nt", ""),
    ((8, 256, 128, 384), "nt", "second product"),
    ((4, 16, 704, 256), "nn", ""),
    ((4, 704, 16, 256), "tn", ""),
    ((8, 160, 256, 2000), "nt", "bias"),
    ((1, 2048, 128, 512), "nt", "bias"),
    ((4, 2048, 1024, 2816), "nt", ""),
    ((4, 1024, 2048, 1024), "tn", ""),
]


def times(sizes: tuple[int, int, int, int], form: str, beside: str) -> Row:
    """Return the microseconds of both, and their errors relative to float64."""
    (T, N, K, M), draw = sizes, Random(torch.float32, seed=1)

    def factors() -> tuple[Tensor, Tensor]:
        a = draw(T, N, K) if form[0] == "n" else draw(T, K, N).mT
        return a, draw(T, K, M) if form[1] == "n" else draw(T, M, K).mT

    pairs = [factors() for _ in range(2 if beside == "second product" else 1)]
    bias = draw(T, 1, M) if beside == "bias" else None

    def plain() -> Tensor:
        y = matrices.products(matrices.product, *pairs, add=bias)
        if beside == "sums":
            pairs[0][0].sum(2)
        assert y is not None
        return y

    def ours() -> Tensor:
        y = products.total_and_sums(*pairs)[0] if beside == "sums" else products.total(*pairs, add=bias)
        assert y is not None
        return y

    exact = sum((a.double() @ b.double() for a, b in pairs), 0 if bias is None else bias.double())
    errors = [((f() - exact).norm() / exact.norm()).item() for f in (ours, plain)]  # type: ignore[union-attr]
    row = {"metakern_us": 1e3 * milliseconds(ours), "pytorch_us": 1e3 * milliseconds(plain)}
    return row | dict(zip(("metakern_error", "pytorch_error"), errors, strict=True))


def jobs(tiny: bool) -> Iterator[Job]:
    for sizes, form, beside in [((2, 3, 4, 5), "nt", "bias")] if tiny else SIZES:
        yield Job({"sizes": list(sizes), "form": form, "beside": beside}, partial(times, sizes, form, beside))
