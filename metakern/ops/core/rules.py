"""The interface of an op's four rules on a backend. `autograd.py` builds all derivatives from them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Tensors = tuple[Any, ...]  # tensors, and None for what is absent or zero


@dataclass(frozen=True)
class Rules:
    """The four rules of an op on one backend.

        forward(c, x)                                 -> y, r
        jvp(c, x, r, t_x)                             -> t_y, t_r
        vjp(c, x, r, ct_y)                            -> ct_x
        vjp_jvp(c, x, r, t_x, t_r, ct_y, t_ct_y)      -> t_ct_x       (an entry may be None if it is zero)

    `c` holds the op's constants by name (`c.eps`, `c.target`) and `c.needs`, a flag for each input: whether its
    cotangent is wanted. Others may be returned as None. All tuples follow the order of the op's inputs, outputs and
    residuals. An absent optional input is None everywhere. `t_ct_y` is None if it is zero.

    If the op has `vjp_residuals`, `vjp` returns that many tensors after ct_x. `vjp_jvp` reads them as `c.from_vjp`,
    which is None if no vjp has run.
    """

    forward: Callable[..., tuple[Tensors, Tensors]]
    jvp: Callable[..., tuple[Tensors, Tensors]]
    vjp: Callable[..., Tensors]
    vjp_jvp: Callable[..., Tensors]
    dtypes: frozenset[torch.dtype] | None = None  # None: every floating-point dtype
