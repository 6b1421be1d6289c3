"""The rules of rms_norm in Triton, by the kernels in ops/core/triton_kernels/norm.py that both norms share."""

from __future__ import annotations

from metakern.ops.core.spec import Make, Sample
from metakern.ops.core.triton_kernels import norm

RULES = norm.rules(centered=False)


def compiled(make: Make) -> list[Sample]:
    return [Sample(f"{D}", (make(8, 512, D), make(8, D))) for D in (4096,)]
