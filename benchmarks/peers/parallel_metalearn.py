"""parallel-metalearn: its MAML trainer, over tasks by vmap, in chunks, or one at a time.

The model is wrapped to return the dictionary that the trainer expects. The outer optimizer does not change the weights.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.peers._modules import differentiable
from benchmarks.peers.plain import Gradient
from benchmarks.workloads import Workload

requirements = ("--no-deps parallel-metalearn==0.5.6", "tqdm")
shares_torch = True


class Wrapped(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor, **_: Any) -> dict[str, Tensor]:
        return {"logits": self.model(x)}

    def get_fast_weights(self) -> OrderedDict[str, Tensor]:
        return OrderedDict((name, p) for name, p in self.named_parameters() if p.requires_grad)


class CrossEntropy(nn.Module):
    """The loss of a task, twice: the trainer expects a metric beside it."""

    def forward(self, out_dict: dict[str, Tensor], targets: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        loss = F.cross_entropy(out_dict["logits"].flatten(0, -2), targets.flatten())
        return loss, loss.detach()


class Still(torch.optim.SGD):
    def step(self, closure: Any = None) -> None:
        """Do nothing: only the meta-gradient is measured."""


def method(backend: str, chunks: int = 1) -> Callable[[Workload], Callable[[], Gradient]]:
    def prepare(work: Workload) -> Callable[[], Gradient]:
        from metalearn.algorithms.MAML import MAML
        from metalearn.inner_optimizers.optimizers import InnerSGD

        model = Wrapped(differentiable(work.model) if backend == "vmap" else work.model)
        inner = InnerSGD(model.get_fast_weights(), inner_lr=work.lr, max_inner_steps=work.steps, learn_lr=False)
        trainer = MAML(
            model=model,
            optimizer=Still(model.parameters(), lr=0.0),
            inner_optimizer=inner,
            support_loss_fn=CrossEntropy(),
            inner_steps=work.steps,
            chunk_size=-(-work.tasks // chunks),
            device=torch.device("cpu"),
            backend=backend,
        )

        def step() -> Gradient:
            with sdpa_kernel(SDPBackend.MATH):
                trainer.step(iter([(*work.support, *work.query)]))
            return {name.removeprefix("model."): p.grad for name, p in model.get_fast_weights().items()}

        return step

    return prepare


methods = {
    "parallel-metalearn, vmap": method("vmap"),
    "parallel-metalearn, vmap, tasks in 4 chunks": method("vmap", chunks=4),
    "parallel-metalearn, sequential": method("sequential"),
}
