"""Autocast and GradScaler: bfloat16 or float16 in the model, float32 for parameters, adapted parameters and sums.

python examples/mixed_precision.py
"""

import torch
from plain_loop import sines
from torch import nn

import metakern as mk


def loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Return the mean squared error of one task; autocast runs the model in bfloat16."""
    x, y = batch
    with torch.autocast(x.device.type, torch.bfloat16):
        return (model(x).float() - y).square().mean()


def main(steps: int = 200) -> tuple[float, float]:
    """Return the mean query loss of the first 20 and of the last 20 outer steps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 1))
    maml = mk.MAML(model, loss, inner=mk.optim.SGD(lr=0.02), steps=3)
    optimizer = torch.optim.AdamW(maml.parameters(), lr=3e-3)
    scaler = torch.amp.GradScaler("cpu")  # float16 needs it; bfloat16 has the range of float32
    values = []
    for _ in range(steps):
        x, y = sines(tasks=16, points=20)
        value = maml((x[:, :10], y[:, :10]), (x[:, 10:], y[:, 10:]))
        optimizer.zero_grad()
        scaler.scale(value).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(maml.parameters(), 10.0)
        scaler.step(optimizer)
        scaler.update()
        values.append(value.item())
    return sum(values[:20]) / 20, sum(values[-20:]) / 20


if __name__ == "__main__":
    first, last = main()
    print(f"query loss after three inner steps: {first:.2f} -> {last:.2f}")
