"""A learned loss: the inner loop follows a small network that has learned to ignore wrong labels.

python examples/learned_loss.py

Every parameter that the loss reaches is meta-learned, so that the network needs nothing but a place in the loss.
Bechtle et al. 2021, "Meta-learning via learned loss".
"""

import torch
from torch import nn

import metakern as mk

Batch = tuple[torch.Tensor, torch.Tensor, str]


def lines(tasks: int, points: int = 12, wrong: float = 0.3) -> tuple[Batch, Batch]:
    """Return a support of random lines, in which a share of the points is wrong, and a query without wrong points."""
    slope, offset = torch.randn(2, tasks, 1, 1)
    x = torch.randn(tasks, 2 * points, 1)
    y = slope * x + offset
    noisy = y + 8 * torch.randn_like(y) * (torch.rand_like(y) < wrong)
    return (x[:, :points], noisy[:, :points], "support"), (x[:, points:], y[:, points:], "query")


def error_after_training(learned: bool, outer_steps: int) -> float:
    """Return the mean squared error of new lines after 5 inner steps on a learned loss, or on the squared error."""
    torch.manual_seed(0)
    criterion = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1), nn.Softplus())

    def loss(model: nn.Module, batch: Batch) -> torch.Tensor:
        x, y, kind = batch
        error = (model(x) - y).abs()
        return criterion(error).mean() if learned and kind == "support" else error.square().mean()

    maml = mk.MAML(nn.Linear(1, 1), loss, mk.optim.SGD(lr=0.1, learn_lr=True), steps=5)
    optimizer = torch.optim.Adam([*maml.parameters(), *criterion.parameters()], lr=1e-2)
    for _ in range(outer_steps):
        optimizer.zero_grad()
        maml(*lines(32)).backward()
        optimizer.step()
    return maml.evaluate(*lines(500), steps=(5,)).mean().item()


def main(outer_steps: int = 400) -> None:
    for name, learned in (("squared error", False), ("learned loss", True)):
        print(f"{name}: mean squared error of new lines {error_after_training(learned, outer_steps):.3f}")


if __name__ == "__main__":
    main()
