"""Ops that are exact to second order, in both modes, batched over tasks. One op, one file."""

from metakern.ops.silu import SPEC as _SILU
from metakern.ops.silu import silu

SPECS = {spec.op.name: spec for spec in (_SILU,)}

__all__ = ["SPECS", "silu"]
