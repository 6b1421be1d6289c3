"""Continual adaptation: to a first task, then to a second from there, and what is left of the first.

python examples/continual.py
"""

import torch
from torch import nn

import metakern as mk

STEPS = 10
Batch = tuple[torch.Tensor, torch.Tensor]


def halves(tasks: int, points: int = 10) -> tuple[Batch, Batch]:
    """Return two tasks each of `tasks` learners: a sine wave left of 0, and another one right of 0."""
    batches = []
    for side in (-1, 1):
        amplitude, phase = 0.5 + 2 * torch.rand(tasks, 1, 1), torch.pi * torch.rand(tasks, 1, 1)
        x = side * 5 * torch.rand(tasks, points, 1)
        batches.append((x, amplitude * (x + phase).sin()))
    return batches[0], batches[1]


def joined(a: Batch, b: Batch) -> Batch:
    return torch.cat((a[0], b[0]), 1), torch.cat((a[1], b[1]), 1)


def loss(model: nn.Module, batch: Batch) -> torch.Tensor:
    """Return the mean squared error of one task."""
    return (model(batch[0]) - batch[1]).square().mean()


def main(outer_steps: int = 600) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1))
    maml = mk.MAML(model, loss, mk.optim.SGD(lr=0.01), STEPS)
    optimizer = torch.optim.Adam(maml.parameters(), lr=2e-3)
    for step in range(outer_steps):
        optimizer.zero_grad()
        a, b = halves(16)
        task = (a, b, joined(a, b))[step % 3]
        maml(task, task).backward()
        optimizer.step()
    a, b = halves(200)
    phi = maml.adapt(a, STEPS)
    show("after the first task", model, phi, a, b)
    show("after the second", model, maml.adapt(b, STEPS, start=phi), a, b)
    show("after the second, with a replay of the first", model, maml.adapt(joined(a, b), STEPS, start=phi), a, b)


def show(when: str, model: nn.Module, phi: dict[str, torch.Tensor], *tasks: Batch) -> None:
    call = torch.func.vmap(lambda phi, x: torch.func.functional_call(model, phi, x))
    errors = (f"{(call(phi, x) - y).square().mean():.3f}" for x, y in tasks)
    print(f"{when}: errors of both tasks", *errors)


if __name__ == "__main__":
    main()
