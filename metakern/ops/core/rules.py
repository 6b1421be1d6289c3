"""What an op is given by: four rules on each backend. `autograd.py` makes everything else of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

Tensors = tuple[Any, ...]  # tensors, and None for what is absent or zero


@dataclass(frozen=True)
class Rules:
    """The four kernels of an op on one backend.

    `c` holds the op's constants by name (`c.eps`, `c.target`) and `c.needs`, which says for each input whether its
    cotangent is wanted (the others may be returned as None). Tuples follow the order of the op's inputs, outputs and
    residuals; an absent optional input is None throughout. `t_ct_y` is None when it is zero.

    Where the op has `vjp_residuals`, `vjp` appends so many tensors to ct_x, and `vjp_jvp` finds them as `c.from_vjp`,
    or None there where no vjp has run.

        forward(c, x)                                 -> y, r
        jvp(c, x, r, t_x)                             -> t_y, t_r
        vjp(c, x, r, ct_y)                            -> ct_x
        vjp_jvp(c, x, r, t_x, t_r, ct_y, t_ct_y)      -> t_ct_x       (an entry may be None where it is zero)
    """

    forward: Callable[..., tuple[Tensors, Tensors]]
    jvp: Callable[..., tuple[Tensors, Tensors]]
    vjp: Callable[..., Tensors]
    vjp_jvp: Callable[..., Tensors]
    dtypes: frozenset[torch.dtype] | None = None  # None: every floating-point dtype
