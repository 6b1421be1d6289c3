"""Trainings that two processes share, for test_processes.py: python sharing.py DATA OUT.

In process 1 memory runs out once, a signal asks one training to stop, and another signal kills the process in the last
two, which go on after a restart by the launcher. Some trainings divide their parameters between the processes.
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch
from tiny import tiny_config

import metakern as mk
from metakern.dialogue import processes
from metakern.dialogue.episodes import Episodes
from metakern.dialogue.evaluate import evaluate
from metakern.dialogue.sharding import Sharding, gathered
from metakern.dialogue.trainer import StoppedError, train

RUNS = {
    "hypernetwork": {"algorithm": "hypernetwork", "algorithm_options": ("width=8", "rank=2"), "capture": False},
    "finetune": {"algorithm": "finetune", "shard": True},
    "mamlplusplus": {"algorithm": "mamlplusplus", "algorithm_options": ("anneal=4", "first_order_calls=1")},
    "maml": {"pretrain_steps": 2, "lr_per": "all", "positive_rates": True, "clip": 0.1, "shard": True},
}
STOPPED_AT, KILLED_AT = 2, 4


def config_of(name, data):
    return tiny_config(data, **{"tasks": 7, "pretrain_steps": 0, "lm_weight": 0.3} | RUNS[name])


def run_out_of_memory():
    """Let the first meta-gradient of several tasks raise what PyTorch raises without memory; list sizes of chunks."""
    real, sizes = mk.HyperNetwork._meta_gradient, []

    def short(self, prepared, support, *others):
        sizes.append(len(support["input_ids"]))
        if len(sizes) == 1:
            raise torch.OutOfMemoryError("out of memory")
        return real(self, prepared, support, *others)

    mk.HyperNetwork._meta_gradient = short
    return sizes


def send(number, step):
    """Let a signal reach this process in a step."""
    real = Episodes.sample

    def sample(self, now, *others):
        if now == step:
            Episodes.sample = real
            os.kill(os.getpid(), number)
        return real(self, now, *others)

    Episodes.sample = sample


def prototypes_apart():
    """Return by how much the shared gradients of ProtoNet differ from those of all tasks in one process."""
    torch.manual_seed(0)
    protonet = mk.ProtoNet(torch.nn.Linear(5, 3), classes=2)
    x, y = torch.randn(7, 8, 5), torch.arange(8).remainder(2).expand(7, 8)
    protonet((x, y), (x + 1, y)).backward()
    alone = [p.grad for p in protonet.parameters()]
    protonet.zero_grad()
    x, y = (t[processes.share(7)] for t in (x, y))
    loss = protonet((x, y), (x + 1, y)) * processes.weight(len(x))
    loss.backward()
    processes.sum_gradients(list(protonet.parameters()), loss)
    return max((p.grad - g).abs().max().item() for p, g in zip(protonet.parameters(), alone, strict=True))


class Skipping(torch.nn.Module):
    """Process 0 skips the second of three layers and process 1 the first, as a model does that skips some at random."""

    def __init__(self):
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(3, 3) for _ in range(3))

    def forward(self, support, query):
        return self.layers[processes.rank()](support).square().sum()


def gradients_of_skipped_layers():
    """Return by how much each divided gradient differs from that of the one process that has it; None without one."""
    torch.manual_seed(0)
    model, x = Skipping(), torch.randn(4, 3)
    truth = [torch.autograd.grad(layer(x).square().sum(), list(layer.parameters())) for layer in model.layers]
    sharding = Sharding(model, True)
    sharding.backward(sharding(model, x, None))
    found = [[p.grad if p.grad is None else gathered(p.grad) for p in layer.parameters()] for layer in model.layers]
    return [
        [None if g is None else (g - t).abs().max().item() for g, t in zip(gradients, true, strict=True)]
        for gradients, true in zip(found, truth, strict=True)
    ]


def main(data, out):
    other = processes.rank() == 1
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        sizes = run_out_of_memory() if other else []
        train(config_of("hypernetwork", data), out / "hypernetwork")
        report = evaluate(out / "hypernetwork", (0, 2), reply_steps=(1,))
        if other:
            send(signal.SIGINT, STOPPED_AT - 1)
        try:
            train(config_of("finetune", data), out / "finetune")
        except StoppedError as error:
            stopped = processes.gather(str(error))
        sizes = processes.gather(sizes)[1]
        found = {"prototypes": prototypes_apart(), "sizes": sizes, "stopped": stopped, "report": report}
        found["skipped"] = gradients_of_skipped_layers()
        processes.first(lambda: (out / "found.json").write_text(json.dumps(found)))
        if other:
            send(signal.SIGKILL, KILLED_AT)
    train(config_of("mamlplusplus", data), out / "mamlplusplus")
    if other and os.environ["TORCHELASTIC_RESTART_COUNT"] == "1":
        send(signal.SIGKILL, KILLED_AT)
    train(config_of("maml", data), out / "maml")


if __name__ == "__main__":
    for _ in range(3):  # a launch may have several groups, one after another
        with processes.joined():
            processes.gather(0)
    with processes.joined():
        main(*map(Path, sys.argv[1:]))
