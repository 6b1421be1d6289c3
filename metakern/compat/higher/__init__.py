"""higher's interface on metakern: inner loops with the optimizers of torch.optim, differentiable through their steps.

from metakern.compat import higher      # was: import higher
"""

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
    """Yields a functional copy of the model and a differentiable optimizer that starts in the state of `opt`.

    `diffopt.step(loss)` replaces the copy's parameters; the model's own parameters and `opt` stay as they are.

    Args:
        model: Any module.
        opt: A torch.optim optimizer of parameters of `model`, of a class that `register_optim` knows.
        device: Where the copy is; by default where the model is.
        copy_initial_weights: Whether the copy starts from detached copies of the parameters. Set it to False for MAML:
            derivatives then reach the model's own parameters.
        override: Settings in place of those of `opt`: lists of one value, or of one for each parameter group, by the
            setting's name. A tensor that requires a gradient gets one.
        track_higher_grads: Whether derivatives pass through the steps. False saves memory, for evaluation.

    Yields:
        The functional copy, `fmodel`, and the `DifferentiableOptimizer`, `diffopt`.

    Raises:
        TypeError: If `model` is no `nn.Module`, or if an override is no list.
        ValueError: If the model is functional already or can't be copied, if the class of `opt` is not registered, if
            `opt` has a parameter that is not the model's, or if an override names no setting or has another length.

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
