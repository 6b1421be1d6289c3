"""torch.func: metakern's ops under grad, vmap, jvp and hessian, in any nesting up to second order.

python examples/torch_func.py
"""

import torch
from torch.func import grad, hessian, jvp, vmap

import metakern as mk


def loss(weight: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return the mean square of self-attention with RMS-normalized q and k: weight `[3 D, D]`, x `[B, L, D]`."""
    q, k, v = mk.ops.linear(x, weight).chunk(3, dim=-1)
    q, k = (mk.ops.rms_norm(each, torch.ones_like(each[0, 0]), 1e-6) for each in (q, k))
    return mk.ops.attention(q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1)).square().mean()


def adapted(weight: torch.Tensor, support: torch.Tensor, query: torch.Tensor, lr: float = 0.5) -> torch.Tensor:
    """Return the query loss after one inner step of gradient descent on the support loss."""
    return loss(weight - lr * grad(loss)(weight, support), query)


def main() -> dict[str, torch.Tensor]:
    """Return meta-gradients, a Hessian, and a Hessian-vector product computed in two ways."""
    torch.manual_seed(0)
    options = {"dtype": torch.float64}
    weight, direction = torch.randn(12, 4, **options), torch.randn(12, 4, **options)
    support, query = torch.randn(5, 2, 6, 4, **options), torch.randn(5, 2, 6, 4, **options)
    H = hessian(loss)(weight, support[0]).reshape(48, 48)
    _, forward_over_reverse = jvp(lambda w: grad(loss)(w, support[0]), (weight,), (direction,))
    return {
        "meta-gradients of 5 tasks": vmap(grad(adapted), in_dims=(None, 0, 0))(weight, support, query),
        "a Hessian": H,
        "H v from it": (H @ direction.flatten()).view(12, 4),
        "H v, forward over reverse": forward_over_reverse,
    }


if __name__ == "__main__":
    for name, value in main().items():
        print(f"{name}: {list(value.shape)}, norm {value.norm():.6f}")
