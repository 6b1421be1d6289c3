"""Accelerate: it prepares MAML and the outer optimizer, and does the backward pass and the gradient clipping.

pip install accelerate
accelerate launch examples/accelerate_loop.py        or        python examples/accelerate_loop.py
"""

import torch
from accelerate import Accelerator
from plain_loop import loss, sines
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import metakern as mk


def main(epochs: int = 10) -> tuple[float, float]:
    """Return the mean query loss of the first and of the last epoch."""
    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True)
    model = nn.Sequential(nn.Linear(1, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 1))
    maml = mk.MAML(model, loss, inner=mk.optim.SGD(lr=0.02, learn_lr=True), steps=3)
    optimizer = torch.optim.AdamW(maml.parameters(), lr=3e-3)
    tasks = DataLoader(TensorDataset(*sines(320, 20)), batch_size=16, shuffle=True)
    maml, optimizer, tasks = accelerator.prepare(maml, optimizer, tasks)
    means = []
    for _ in range(epochs):
        values = []
        for x, y in tasks:
            value = maml((x[:, :10], y[:, :10]), (x[:, 10:], y[:, 10:]))
            optimizer.zero_grad()
            accelerator.backward(value)
            accelerator.clip_grad_norm_(maml.parameters(), 10.0)
            optimizer.step()
            values.append(accelerator.gather(value.detach()).mean().item())
        means.append(sum(values) / len(values))
    return means[0], means[-1]


if __name__ == "__main__":
    first, last = main()
    print(f"query loss after three inner steps: {first:.2f} -> {last:.2f}")
