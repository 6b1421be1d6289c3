"""The rules of linear_cross_entropy in Triton: the logits of a chunk are overwritten by g, or by t_g.

The kernels are those of products and of `cross_entropy`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from metakern.ops.core.spec import Make, Sample
from metakern.ops.core.triton_kernels.products import matmul
from metakern.ops.cross_entropy.triton import cotangents, losses, t_losses
from metakern.ops.linear_cross_entropy import Softmax, rules


def _cotangents(z: Tensor, lse: Tensor, target: Tensor, ct_y: Tensor) -> Tensor:
    return cotangents(z, lse, target, ct_y, out=z)


def _t_cotangents(
    z: Tensor, lse: Tensor, target: Tensor, t_z: Tensor, t_lse: Tensor, ct_y: Tensor, t_ct_y: Tensor | None
) -> tuple[Tensor, Tensor]:
    g = torch.empty_like(z)
    return cotangents(z, lse, target, t_ct_y, ct_y, t_z, t_lse, out=z, g=g), g


RULES = rules(Softmax(losses, t_losses, _cotangents, _t_cotangents), matmul)


def compiled(make: Make) -> list[Sample]:
    return [Sample("tasks", (make(2, 64, 128), make(2, 32000, 128), make.integers(32000, 2, 64)))]
