"""torch.compile for a model with metakern's ops, at first order.

PyTorch's compiler has no double backward, so call MAML without it.

python examples/compile.py
"""

import torch
import torch.nn.functional as F
from torch import nn

import metakern as mk


class Block(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = mk.nn.RMSNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (4, 8)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, dim=-1))
        return x + self.out(mk.ops.attention(q, k, v).transpose(1, 2).flatten(2))


def main() -> dict[str, float]:
    """Return the number of graph breaks, and the loss and a gradient's norm of the model, plain and compiled."""
    torch.manual_seed(0)
    model, x = nn.Sequential(Block(), nn.GELU(), Block()), torch.randn(3, 10, 32)
    breaks = torch._dynamo.explain(model)(x).graph_break_count
    compiled = torch.compile(model)
    results = {"graph breaks": breaks}
    for name, module in (("plain", model), ("compiled", compiled)):
        model.zero_grad()
        value = F.mse_loss(module(x), torch.zeros_like(x))
        value.backward()
        results |= {f"{name} loss": value.item(), f"{name} gradient": model[0].qkv.weight.grad.norm().item()}
    return results


if __name__ == "__main__":
    for name, value in main().items():
        print(f"{name}: {value:.6f}")
