"""The rules of layer_norm in Triton, by the kernels in ops/core/triton_kernels/norm.py that both norms share."""

from __future__ import annotations

import torch

from metakern.ops.core.spec import Make, Sample
from metakern.ops.core.triton_kernels import norm

RULES = norm.rules(centered=True)


def compiled(make: Make) -> list[Sample]:
    widths = (4000, 16384) if make.dtype == torch.float32 else (4000,)  # 16384 takes the compiler seconds
    return [Sample(f"{D}", (make(8, 512, D), make(8, D), make(8, D))) for D in widths]
