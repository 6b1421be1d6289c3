"""higher's interface on metakern, `from metakern.compat import higher`: differentiable inner loops of torch.optim."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from metakern.compat.higher import optim, patch, utils
from metakern.compat.higher.optim import (
    DifferentiableOptimizer,
    Override,
    apply_trainable_opt_params,
    create_diff_optim,
    get_diff_optim,
    get_trainable_opt_params,
    register_optim,
)
from metakern.compat.higher.patch import make_functional, monkeypatch

__all__ = [
    "DifferentiableOptimizer",
    "apply_trainable_opt_params",
    "create_diff_optim",
    "get_diff_optim",
    "get_trainable_opt_params",
    "innerloop_ctx",
    "make_functional",
    "monkeypatch",
    "optim",
    "patch",
    "register_optim",
    "utils",
]


@contextmanager
def innerloop_ctx(
    model: nn.Module,
    opt: torch.optim.Optimizer,
    device: torch.device | str | None = None,
    copy_initial_weights: bool = True,
    override: Override | None = None,
    track_higher_grads: bool = True,
) -> Iterator[tuple[Any, DifferentiableOptimizer]]:
    """A functional copy of the model, and a differentiable optimizer that goes on from `opt`, for an inner loop.

    `copy_initial_weights=False` lets derivatives reach the model's own parameters, as MAML needs it. The arguments are,
    and errors are raised as, those of `monkeypatch` and `get_diff_optim`.

    >>> import torch
    >>> from metakern.compat import higher
    >>> model, x = torch.nn.Linear(8, 4), torch.randn(10, 8)
    >>> opt = torch.optim.Adam(model.parameters(), lr=0.01)
    >>> with higher.innerloop_ctx(model, opt, copy_initial_weights=False) as (fmodel, diffopt):
    ...     for _ in range(3):
    ...         _ = diffopt.step(fmodel(x).square().mean())
    ...     fmodel(x).square().mean().backward()
    >>> model.weight.grad.shape
    torch.Size([4, 8])
    """
    fmodel = monkeypatch(model, device, copy_initial_weights, track_higher_grads)
    diffopt = get_diff_optim(
        opt, model.parameters(), fmodel, device=device, override=override, track_higher_grads=track_higher_grads
    )
    yield fmodel, diffopt
