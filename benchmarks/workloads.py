"""The workloads of the meta-gradient benchmarks: a model, a loss of one task, and batches, from one seed.

Models are plain torch.nn, as a user brings them; every method gets the same weights and data.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Workload:
    """One exact second-order meta-gradient: `loss(model, batch)` of one task, K inner SGD steps at `lr`."""

    model: nn.Module
    loss: Callable[[nn.Module, Any], Tensor]
    support: Any
    query: Any
    steps: int
    lr: float


class RecurrentLM(nn.Module):
    """Embedding, one LSTM layer, output layer."""

    def __init__(self, vocabulary: int, embedding: int, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, embedding)
        self.rnn = nn.LSTM(embedding, hidden, batch_first=True)
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


def _tokens(vocabulary: int, *shape: int) -> tuple[Tensor, Tensor]:
    drawn = torch.randint(vocabulary, (*shape[:-1], shape[-1] + 1))
    return drawn[..., :-1].contiguous(), drawn[..., 1:].contiguous()


def mlp() -> Workload:
    """64-128-128-16, 32 tasks, 10+10 examples, K=5."""
    sizes = ((64, 128), (128, 128), (128, 16))
    layers = [layer for a, b in sizes for layer in (nn.Linear(a, b), nn.ReLU())][:-1]

    def batch() -> tuple[Tensor, Tensor]:
        return torch.randn(32, 10, 64), torch.randint(16, (32, 10))

    return Workload(nn.Sequential(*layers), cross_entropy, batch(), batch(), 5, 0.1)


def lstm() -> Workload:
    """Vocabulary 2000, embedding 128, hidden 256, length 20, 8+8 sequences, 8 tasks, K=3."""
    return Workload(
        RecurrentLM(2000, 128, 256), cross_entropy, _tokens(2000, 8, 8, 20), _tokens(2000, 8, 8, 20), 3, 0.1
    )


def gpt() -> Workload:
    """Vocabulary 2000, 128 wide, 4 heads, 2 layers, length 64, 4+4 sequences, 8 tasks, K=3."""
    return Workload(GPT(2000, 128, 4, 2, 64), cross_entropy, _tokens(2000, 8, 4, 64), _tokens(2000, 8, 4, 64), 3, 0.1)


WORKLOADS = {"mlp": mlp, "lstm": lstm, "gpt": gpt}


def make(name: str) -> Workload:
    torch.manual_seed(0)
    return WORKLOADS[name]()
