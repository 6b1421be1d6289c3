"""The rules of linear in Triton: sums of two products, biases and their cotangents are computed with the products."""

from __future__ import annotations

from metakern.ops.core.spec import Make, Sample
from metakern.ops.core.triton_kernels.products import product, total, total_and_sums
from metakern.ops.linear import rules

RULES = rules(product, total, total_and_sums)


def compiled(make: Make) -> list[Sample]:
    shapes = ((8, 96, 128, 80), (2, 16, 32, 48), (8, 512, 192, 576))  # T, N, K, M, which choose all blocks
    return [Sample("", (make(T, N, K), make(T, M, K), make(T, M))) for T, N, K, M in shapes]
