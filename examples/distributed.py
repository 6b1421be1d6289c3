"""torchrun and DistributedDataParallel: each process adapts its share of the tasks, and gradients are averaged.

torchrun --nproc-per-node 2 examples/distributed.py
"""

import os

import torch
import torch.distributed as dist
from plain_loop import loss, sines
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import metakern as mk


def learner() -> mk.MAML:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 40), nn.Tanh(), nn.Linear(40, 40), nn.Tanh(), nn.Linear(40, 1))
    return mk.MAML(model, loss, inner=mk.optim.SGD(lr=0.02, learn_lr=True, per="element"), steps=3)


def train(maml: nn.Module, rank: int, world: int, steps: int = 50, tasks: int = 16) -> list[torch.Tensor]:
    """Return the parameters after some outer steps on the same tasks, however many processes share the tasks."""
    optimizer = torch.optim.AdamW(maml.parameters(), lr=3e-3)
    share = slice(rank * tasks // world, (rank + 1) * tasks // world)
    torch.manual_seed(1)
    for _ in range(steps):
        x, y = (t[share] for t in sines(tasks, 20))
        value = maml((x[:, :10], y[:, :10]), (x[:, 10:], y[:, 10:]))
        optimizer.zero_grad()
        value.backward()
        nn.utils.clip_grad_norm_(maml.parameters(), 10.0)
        optimizer.step()
    return [p.detach() for p in maml.parameters()]


if __name__ == "__main__":
    dist.init_process_group("gloo")
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    shared = train(DistributedDataParallel(learner()), rank, world)
    if rank == 0:
        alone = train(learner(), 0, 1)
        error = max(((a - b).norm() / b.norm()).item() for a, b in zip(shared, alone, strict=True))
        print(f"{world} processes against one, relative difference after 50 steps: {error:.1e}")
    dist.destroy_process_group()
