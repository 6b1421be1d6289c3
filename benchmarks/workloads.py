"""The workloads of the meta-gradient benchmarks: a model, a loss of one task, and batches, from one seed.

Models are plain torch.nn, as a user brings them. Every method gets the same weights and data, through a `Problem`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.problem import Problem


@dataclass(frozen=True)
class Workload:
    """One exact second-order meta-gradient: `loss(model, batch)` of one task, K inner SGD steps at `lr`."""

    model: nn.Module
    loss: Callable[[Any, Any], Tensor]
    support: tuple[Tensor, ...]
    query: tuple[Tensor, ...]
    steps: int
    lr: float

    @property
    def tasks(self) -> int:
        return len(self.support[0])

    def double(self) -> Workload:
        """The same in float64."""
        support, query = (
            tuple(a.double() if a.is_floating_point() else a for a in batch) for batch in (self.support, self.query)
        )
        return replace(self, model=copy.deepcopy(self.model).double(), support=support, query=query)

    def flop(self) -> float:
        """What the products of one meta-gradient cost: 9K + 3 forward passes of a task, for each task.

        Attention counts in full. float64 keeps recurrent layers in products that PyTorch's counter sees.
        """
        exact = self.double()
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            exact.loss(exact.model, tuple(a[0] for a in exact.support))
        return counter.get_total_flops() * (9 * self.steps + 3) * self.tasks

    def problem(self, name: str, tiny: bool, truth: dict[str, Tensor] | None = None) -> Problem:
        theta = {key: p.detach().numpy() for key, p in self.model.named_parameters()}
        support, query = (tuple(a.numpy() for a in batch) for batch in (self.support, self.query))
        exact = {key: g.numpy() for key, g in (truth or {}).items()}
        heads = getattr(self.model, "heads", 0)
        return Problem(name, tiny, theta, support, query, exact, self.steps, self.lr, heads)


class RecurrentLM(nn.Module):
    """Embedding, one recurrent layer, output layer."""

    def __init__(self, cell: type[nn.RNNBase], vocabulary: int, embedding: int, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, embedding)
        self.rnn = cell(embedding, hidden, batch_first=True)
        self.head = nn.Linear(hidden, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.rnn(self.embedding(tokens))[0])


class GPT(nn.Module):
    """Learned positions, pre-norm blocks with scaled dot-product attention and GELU, output layer of its own."""

    def __init__(self, vocabulary: int, width: int, heads: int, layers: int, length: int) -> None:
        super().__init__()
        self.heads = heads
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "norm1": nn.LayerNorm(width),
                    "qkv": nn.Linear(width, 3 * width),
                    "out": nn.Linear(width, width),
                    "norm2": nn.LayerNorm(width),
                    "up": nn.Linear(width, 4 * width),
                    "down": nn.Linear(4 * width, width),
                }
            )
            for _ in range(layers)
        )
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1], device=tokens.device)[None])
        for block in self.blocks:
            B, L, D = x.shape
            q, k, v = (
                t.view(B, L, self.heads, -1).transpose(1, 2) for t in block["qkv"](block["norm1"](x)).chunk(3, -1)
            )
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + block["out"](attended.transpose(1, 2).reshape(B, L, D))
            x = x + block["down"](F.gelu(block["up"](block["norm2"](x))))
        return self.head(self.norm(x))


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    x, y = batch
    return F.cross_entropy(model(x).flatten(0, -2), y.flatten())


def mlp(sizes: tuple[int, ...], examples: int, tasks: int, steps: int) -> Workload:
    layers = [layer for a, b in pairwise(sizes) for layer in (nn.Linear(a, b), nn.ReLU())][:-1]

    def batch() -> tuple[Tensor, Tensor]:
        return torch.randn(tasks, examples, sizes[0]), torch.randint(sizes[-1], (tasks, examples))

    return Workload(nn.Sequential(*layers), cross_entropy, batch(), batch(), steps, 0.1)


def language(model: nn.Module, vocabulary: int, length: int, sequences: int, tasks: int, steps: int) -> Workload:
    def batch() -> tuple[Tensor, Tensor]:
        drawn = torch.randint(vocabulary, (tasks, sequences, length + 1))
        return drawn[..., :-1].contiguous(), drawn[..., 1:].contiguous()

    return Workload(model, cross_entropy, batch(), batch(), steps, 0.1)


def recurrent(cell: type[nn.RNNBase]) -> Callable[[], Workload]:
    return lambda: language(RecurrentLM(cell, 2000, 128, 256), 2000, length=20, sequences=8, tasks=8, steps=3)


def tiny_recurrent(cell: type[nn.RNNBase]) -> Callable[[], Workload]:
    return lambda: language(RecurrentLM(cell, 29, 6, 7), 29, length=5, sequences=2, tasks=3, steps=2)


def tiny_gpt() -> Workload:
    return language(GPT(29, 12, 2, 2, 5), 29, length=5, sequences=2, tasks=3, steps=2)


WORKLOADS: dict[str, Callable[[], Workload]] = {
    "mlp": lambda: mlp((64, 128, 128, 16), examples=10, tasks=32, steps=5),
    "rnn": recurrent(nn.RNN),
    "gru": recurrent(nn.GRU),
    "lstm": recurrent(nn.LSTM),
    "lstm-small": lambda: language(RecurrentLM(nn.LSTM, 2000, 64, 64), 2000, length=32, sequences=2, tasks=32, steps=5),
    "gpt": lambda: language(GPT(2000, 128, 4, 2, 64), 2000, length=64, sequences=4, tasks=8, steps=3),
    "gpt-long": lambda: language(GPT(2000, 128, 4, 2, 1024), 2000, length=1024, sequences=4, tasks=1, steps=3),
}
# The same models at sizes that cost nothing: to load what a library loads at its first use, and for tests.
TINY: dict[str, Callable[[], Workload]] = {
    "mlp": lambda: mlp((5, 7, 6, 4), examples=3, tasks=3, steps=2),
    "rnn": tiny_recurrent(nn.RNN),
    "gru": tiny_recurrent(nn.GRU),
    "lstm": tiny_recurrent(nn.LSTM),
    "lstm-small": tiny_recurrent(nn.LSTM),
    "gpt": tiny_gpt,
    "gpt-long": tiny_gpt,
}


def make(name: str, tiny: bool = False) -> Workload:
    torch.manual_seed(0)
    return (TINY if tiny else WORKLOADS)[name]()


def of(problem: Problem) -> Workload:
    """The workload in PyTorch, with the problem's own weights and data."""
    work = make(problem.name, problem.tiny)
    work.model.load_state_dict({name: torch.from_numpy(p) for name, p in problem.theta.items()})
    support, query = (tuple(map(torch.from_numpy, batch)) for batch in (problem.support, problem.query))
    return replace(work, support=support, query=query, steps=problem.steps, lr=problem.lr)
