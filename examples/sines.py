"""The first experiment of the MAML paper: sine waves from ten points, after 0 to 10 inner steps.

python examples/sines.py

Finn, Abbeel, Levine 2017, "Model-agnostic meta-learning for fast adaptation of deep networks", section 5.1.
"""

import torch
from torch import nn

import metakern as mk

STEPS = (0, 1, 2, 5, 10)
Batch = tuple[torch.Tensor, torch.Tensor]


def sines(tasks: int, points: int = 10) -> tuple[Batch, Batch]:
    """Return support and query of sine waves of random amplitude and phase, `[tasks, points, 1]`."""
    amplitude, phase = 0.1 + 4.9 * torch.rand(tasks, 1, 1), torch.pi * torch.rand(tasks, 1, 1)
    x = 10 * torch.rand(tasks, 2 * points, 1) - 5
    y = amplitude * (x + phase).sin()
    return (x[:, :points], y[:, :points]), (x[:, points:], y[:, points:])


def loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Return the mean squared error of one task."""
    x, y = batch
    return (model(x) - y).square().mean()


def curve(steps: int, outer_steps: int) -> list[float]:
    """Train with a number of inner steps (0: plain training on all tasks); return the errors of new waves."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 1))
    maml = mk.MAML(model, loss, mk.optim.SGD(lr=0.01), steps)
    optimizer = torch.optim.Adam(maml.parameters(), lr=2e-3)
    for _ in range(outer_steps):
        optimizer.zero_grad()
        maml(*sines(25)).backward()
        optimizer.step()
    return maml.evaluate(*sines(200), steps=STEPS).mean(1).tolist()


def main(outer_steps: int = 2000) -> None:
    print("mean squared error after inner steps", *STEPS, sep="\t")
    for name, steps in (("MAML", 1), ("plain training", 0)):
        print(name, *(f"{error:.3f}" for error in curve(steps, outer_steps)), sep="\t")


if __name__ == "__main__":
    main()
