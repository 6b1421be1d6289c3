"""A loop of your own: any model, any outer optimizer, gradient clipping, a schedule.

python examples/plain_loop.py
"""

import torch
from torch import nn

import metakern as mk


def sines(tasks: int, points: int = 10) -> tuple[torch.Tensor, torch.Tensor]:
    """Return sine waves of random amplitude and phase, one for each task: x and y, `[tasks, points, 1]`."""
    amplitude, phase = 0.1 + 4.9 * torch.rand(tasks, 1, 1), torch.pi * torch.rand(tasks, 1, 1)
    x = 10 * torch.rand(tasks, points, 1) - 5
    return x, amplitude * (x + phase).sin()


def loss(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Return the mean squared error of one task."""
    x, y = batch
    return (model(x) - y).square().mean()


def main(steps: int = 300) -> tuple[float, float]:
    """Return the mean query loss of the first 20 and of the last 20 outer steps."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 1))
    maml = mk.MAML(model, loss, inner=mk.optim.SGD(lr=0.02, learn_lr=True), steps=3)
    optimizer = torch.optim.AdamW(maml.parameters(), lr=3e-3)  # trains the model and the inner rate
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    values = []
    for _ in range(steps):
        x, y = sines(tasks=16, points=20)
        value = maml((x[:, :10], y[:, :10]), (x[:, 10:], y[:, 10:]))
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(maml.parameters(), 10.0)
        optimizer.step()
        schedule.step()
        values.append(value.item())
    return sum(values[:20]) / 20, sum(values[-20:]) / 20


if __name__ == "__main__":
    first, last = main()
    print(f"query loss after three inner steps: {first:.2f} -> {last:.2f}")
