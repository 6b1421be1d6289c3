"""The machine's rates: of torch.mm of 1024 x 1024 float32 matrices, and of multiply-adds in registers, the peak.

No product is faster than its multiply-adds. Each function here does FLOP floating-point operations.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.workloads import Workload

requirements: tuple[str, ...] = ()
shares_torch = True
FLOP = 2 * 1024**3
PRODUCTS = "products"
PEAKS = {"float32": "peak, float32", "bfloat16": "peak, bfloat16"}  # dtype of the products -> method


def products(work: Workload) -> Callable[[], None]:
    a, b, out = torch.randn(3, 1024, 1024).unbind()

    def step() -> None:
        torch.mm(a, b, out=out)

    return step


def peak(dtype: str) -> Callable[[Workload], Callable[[], None]]:
    def prepare(work: Workload) -> Callable[[], None]:
        from metakern import native

        if native.C is None:
            raise RuntimeError(native.obstacle())

        def step() -> None:
            native.C.peak(dtype, FLOP, torch.get_num_threads())

        return step

    return prepare


methods = {PRODUCTS: products, **{method: peak(dtype) for dtype, method in PEAKS.items()}}
