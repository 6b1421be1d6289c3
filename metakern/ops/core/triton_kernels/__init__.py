"""The backend "triton". An op's kernels are in `metakern/ops/<op>/triton.py`, which is imported at the first call.

The kernel of all updates is in `foreach.py`.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from metakern.ops.core import matrices
from metakern.ops.core.rules import Rules

DTYPES = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})


def rules(op: str, module: str = "") -> Rules:
    """Returns rules that import and call `RULES` of `metakern.ops.<op>.triton`, or of `metakern.ops.<module>`."""

    def rule(name: str) -> Any:
        return lambda *args: getattr(import_module(f"metakern.ops.{module or f'{op}.triton'}").RULES, name)(*args)

    return Rules(rule("forward"), rule("jvp"), rule("vjp"), rule("vjp_jvp"), DTYPES)


def product(a: Tensor, b: Tensor, add: Tensor | None = None, reuse: bool = False) -> Tensor:
    """Returns add + a b as `matrices.product` does; on a GPU by a Triton kernel where that is faster and installed."""
    return (_products() if a.is_cuda else matrices).product(a, b, add, reuse)


@cache
def _products() -> Any:
    return import_module(f"{__name__}.products") if importlib.util.find_spec("triton") else matrices
