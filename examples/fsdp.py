"""FSDP2: parameters and optimizer state are sharded over processes, and each process adapts its share of the tasks.

FSDP2 refuses scalar parameters, such as one learned inner rate for all; here each element has a rate (per="element").

torchrun --nproc-per-node 2 examples/fsdp.py
"""

import os

import torch.distributed as dist
from distributed import learner, train
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

if __name__ == "__main__":
    dist.init_process_group("gloo")
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    maml = learner()
    fully_shard(maml, mesh=init_device_mesh("cpu", (world,)))
    sharded = [p.full_tensor() for p in train(maml, rank, world)]
    if rank == 0:
        alone = train(learner(), 0, 1)
        error = max(((a - b).norm() / b.norm()).item() for a, b in zip(sharded, alone, strict=True))
        print(f"{world} processes against one, relative difference after 50 steps: {error:.1e}")
    dist.destroy_process_group()
