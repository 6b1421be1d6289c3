"""The change of a weight as pairs, as a matrix, as low-rank factors, and as a LoRA layer.

    ΔW = -Σ_j rate_j D_jᵀ X_j = B A

The pairs are those of `metakern.ops.implicit_linear`. The singular values of ΔW are found without ΔW, from the QR
decompositions of both sides:

    Xᵀ = V R      (r D)ᵀ = U L      L Rᵀ = U' σ V'ᵀ      ΔW = -(U U') σ (V V')ᵀ

| tensor | shape |
|---|---|
| X, D, rates r | [T, M, in], [T, M, out], [T, M]; or all of them without T |
| ΔW | [T, out, in] |
| U, V | [T, out, min(M, out)], [T, in, min(M, in)] |
| A, B | [T, R, in], [T, out, R] |
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from metakern.adapters.lora import Settings, adapt, adaptable, matrix
from metakern.ops.implicit_linear import rates_of_pairs


def dense_update(X: Tensor, D: Tensor, rates: Tensor | float) -> Tensor:
    """Returns the change of a weight as a matrix for each task, -Σ_j rate_j D_jᵀ X_j.

    Args:
        X: The inputs of the layer at M tokens, [M, in], or [T, M, in] for T tasks.
        D: The cotangents of its outputs at these tokens, [M, out] or [T, M, out], as X is.
        rates: The learning rate of each pair, [M] or [T, M], or one for all: a number or a scalar.

    Returns:
        [out, in] or [T, out, in]. It is differentiable.

    Raises:
        TypeError: For tensors that are not floating point, or not of one dtype, or rates that are no number.
        ValueError: Where shapes or devices do not fit.

    >>> import torch
    >>> dense_update(torch.ones(2, 3), torch.tensor([[1.0], [2.0]]), 0.1)
    tensor([[-0.3000, -0.3000, -0.3000]])
    """
    r = rates_of_pairs("dense_update", X, D, rates)
    return -(D * r.unsqueeze(-1)).to(D.dtype).mT @ X


@torch.no_grad()
def low_rank_update(X: Tensor, D: Tensor, rates: Tensor | float, error: float = 1e-3) -> tuple[Tensor, Tensor]:
    """Returns the change of a weight as factors A and B of the lowest rank that keeps to an error.

    `|B A - ΔW| <= error |ΔW|` in the Frobenius norm, for each task, with ΔW = -Σ_j rate_j D_jᵀ X_j, not formed here.
    By Eckart and Young the singular value decomposition gives the lowest such rank. It is computed in float64, in time
    that grows with M² (in + out), and the factors are rounded to the dtype of X.

    Args:
        X: The inputs of the layer at M tokens, [M, in], or [T, M, in] for T tasks.
        D: The cotangents of its outputs at these tokens, [M, out] or [T, M, out], as X is.
        rates: The learning rate of each pair, [M] or [T, M], or one for all: a number or a scalar.
        error: The largest relative error, in [0, 1); 0 keeps all of ΔW.

    Returns:
        A [R, in] and B [out, R], or [T, R, in] and [T, out, R]. The rank R is that of the task that needs most, at
        least 1.

    Raises:
        TypeError: For tensors that are not floating point, or not of one dtype, or rates that are no number.
        ValueError: Where shapes or devices do not fit, for an error outside [0, 1), or for values that are not finite.

    >>> import torch
    >>> A, B = low_rank_update(torch.ones(2, 3), torch.tensor([[1.0], [2.0]]), 0.1)
    >>> A.shape, B @ A
    (torch.Size([1, 3]), tensor([[-0.3000, -0.3000, -0.3000]]))
    """
    name = "low_rank_update"
    r = rates_of_pairs(name, X, D, rates)
    if not (isinstance(error, float | int) and 0 <= error < 1):
        raise ValueError(f"{name}: error must be a number in [0, 1), got {error!r}")
    right, R = torch.linalg.qr(_finite(name, "X", X.double()).mT)
    left, L = torch.linalg.qr(_finite(name, "D and rates", D.double() * r.double().unsqueeze(-1)).mT)
    U, sigma, V_T = torch.linalg.svd(L @ R.mT, full_matrices=False)
    tail = sigma.square().flip(-1).cumsum(-1).flip(-1)  # the squared error of each rank from 0 on
    needed = (tail > error**2 * tail[..., :1]).sum(-1)
    rank = int(needed.max()) if needed.numel() else 0
    root = sigma[..., :rank].sqrt()
    A, B = root.unsqueeze(-1) * V_T[..., :rank, :] @ right.mT, -left @ (U[..., :rank] * root.unsqueeze(-2))
    if rank == 0:
        A, B = A.new_zeros(*X.shape[:-2], 1, X.shape[-1]), B.new_zeros(*D.shape[:-2], D.shape[-1], 1)
    return A.to(X.dtype), B.to(X.dtype)


def _finite(name: str, key: str, value: Tensor) -> Tensor:
    if not value.isfinite().all():
        raise ValueError(f"{name}: {key} must be finite, got infinite values or NaN: lower the learning rates")
    return value


def lora_from_factors(model: nn.Module, factors: Mapping[str, tuple[Tensor, Tensor]]) -> list[str]:
    """Changes weights of `model` by B A, in place, as LoRA layers: each keeps its weight and gets the factors A and B.

    `metakern.save_lora` then writes the factors, and `metakern.merge_lora` adds them to the weights. All parameters but
    the factors are frozen, as by `metakern.lora`.

    Args:
        model: A model without LoRA layers.
        factors: A [R, in] and B [out, R] for each layer, by its name, such as those of `low_rank_update`.

    Returns:
        The names of the layers, in the model's order.

    Raises:
        TypeError: If `model` is no `nn.Module`.
        ValueError: If the model has LoRA layers already; if there are no factors, or some do not fit a layer of the
            model that can be adapted.

    >>> import metakern as mk, torch
    >>> layer = torch.nn.Sequential(torch.nn.Linear(3, 1, bias=False))
    >>> x, before = torch.ones(3), layer(torch.ones(3))
    >>> lora_from_factors(layer, {"0": low_rank_update(torch.ones(2, 3), torch.tensor([[1.0], [2.0]]), 0.1)})
    ['0']
    >>> layer(x) - before
    tensor([-0.9000], grad_fn=<SubBackward0>)
    """
    name = "lora_from_factors"
    obstacles = adaptable(name, model)
    if not factors:
        raise ValueError(f"{name}: factors must name a layer, got none")
    for path, (A, B) in factors.items():
        if obstacle := obstacles.get(path, "is no linear layer of model"):
            raise ValueError(f"{name}: factors must be of layers that can be adapted, got {path!r}, which {obstacle}")
        out, size = matrix(model.get_submodule(path)).shape
        if A.dim() != 2 or A.shape[1] != size or B.shape != (out, A.shape[0]):
            shapes = f"[R, {size}] and [{out}, R], got {list(A.shape)} and {list(B.shape)}"
            raise ValueError(f"{name}: factors of {path!r} must have shapes {shapes}: give those of one task")
    layers = [path for path in obstacles if path in factors]
    adapt(model, {path: Settings(factors[path][0].shape[0]) for path in layers}, (), factors[layers[0]][0].dtype)
    with torch.no_grad():
        for path in layers:
            layer: Any = model.get_submodule(path)
            A, B = factors[path]
            layer.lora_A.copy_(A)
            layer.lora_B.copy_(B)
    return layers
