"""DistributedDataParallel over algorithms: two processes with half of the tasks each have the gradient of all tasks."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import metakern as mk

T, C, D = 4, 3, 5
LOSS = mk.losses.classification


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(D, 6), nn.LayerNorm(6), nn.Tanh(), nn.Linear(6, C))


class Inputs(nn.Linear):
    """Reads the inputs of a batch."""

    def forward(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        return super().forward(batch[0])


def contextual() -> nn.Module:
    return nn.Sequential(mk.nn.Contextual(nn.Linear(D, 6), 2), nn.Tanh(), nn.Linear(6, C))


ALGORITHMS: dict[str, Callable[[], nn.Module]] = {
    "MAML": lambda: mk.MAML(net(), LOSS, steps=2, capture=False),
    "MAML++": lambda: mk.MAMLPlusPlus(net(), LOSS, steps=2, per_step_norms=True, capture=False),
    "Meta-LSTM": lambda: mk.MetaLSTM(net(), LOSS, lr=0.1, hidden=2, steps=2, capture=False),
    "iMAML": lambda: mk.IMAML(net(), LOSS, steps=3, learn_strength=True, solver_steps=3, tolerance=1e9, capture=False),
    "CAVIA": lambda: mk.CAVIA(contextual(), LOSS, steps=2, capture=False),
    "hypernetwork": lambda: mk.HyperNetwork(
        net(), LOSS, mk.nn.SetEncoder(Inputs(D, 4)), size=4, width=5, steps=1, capture=False
    ),
    "Reptile": lambda: mk.Reptile(net(), LOSS, steps=2, capture=False),
    "ProtoNet": lambda: mk.ProtoNet(net(), "cosine"),
    "ProtoMAML": lambda: mk.ProtoMAML(net(), LOSS, steps=2, capture=False),
}


def batch(seed: int) -> tuple[Tensor, Tensor]:
    make = torch.Generator().manual_seed(seed)
    x = torch.randn(T, 2 * C, D, generator=make, dtype=torch.float64)
    return x, torch.arange(2 * C).remainder(C).expand(T, -1)


def gradients(algorithm: nn.Module, support: Any, query: Any) -> list[Tensor | None]:
    """Return the gradients after two calls: DistributedDataParallel finds at the second what the first left open."""
    for _ in range(2):
        algorithm.zero_grad()
        algorithm(support, query).backward()
    return [None if p.grad is None else p.grad.clone() for p in algorithm.parameters()]


def worker(rank: int, folder: str) -> None:
    """Write the gradients of each algorithm, by this rank's tasks and alone by all tasks, or the error."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    own, found = slice(rank * T // 2, (rank + 1) * T // 2), {}
    for name, make in ALGORITHMS.items():
        torch.manual_seed(0)
        algorithm = make().double()
        alone = gradients(copy.deepcopy(algorithm), batch(1), batch(2))
        halves = (tuple(x[own] for x in batch(seed)) for seed in (1, 2))
        found[name] = alone, gradients(DistributedDataParallel(algorithm), *halves)
    torch.save(found, f"{folder}/{rank}.pt")
    dist.barrier()  # neither process leaves while the other one still needs it
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What two processes found, which are started once for all algorithms."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(worker, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.skipif(not dist.is_available(), reason="PyTorch is built without torch.distributed")
@pytest.mark.parametrize("name", ALGORITHMS)
def test_two_processes_have_the_gradient_of_all_tasks(name: str, found: list[dict[str, Any]]) -> None:
    for rank in found:
        for alone, ours in zip(*rank[name], strict=True):
            if alone is not None:
                torch.testing.assert_close(ours, alone, rtol=1e-9, atol=1e-12)
            else:
                assert ours is None or not ours.any()
    assert any(g is not None and g.norm() > 0 for g in found[0][name][0])
