"""The models of the workloads, in plain torch.nn, and their random data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from inspect import signature
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]
ROPE_BASE = 10000.0


def mlp(widths: Sequence[int]) -> nn.Module:
    return nn.Sequential(*[layer for a, b in pairwise(widths) for layer in (nn.Linear(a, b), nn.ReLU())][:-1])


class RecurrentLM(nn.Module):
    """A language model of an embedding, one recurrent layer and an output layer."""

    def __init__(self, cell: type[nn.RNNBase], vocabulary: int, embedding: int, hidden: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, embedding)
        self.rnn = cell(embedding, hidden, batch_first=True)
        self.head = nn.Linear(hidden, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.rnn(self.embedding(tokens))[0])


class GPT(nn.Module):
    """A GPT: learned positions, pre-norm blocks of causal attention and GELU, an output layer with its own weight."""

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


class LoraLinear(nn.Linear):
    """y = x Wᵀ + (x Aᵀ) Bᵀ with W frozen: LoRA with alpha equal to the rank. B is not zero, as after some training."""

    def __init__(self, width: int, out: int, rank: int) -> None:
        super().__init__(width, out, bias=False)
        self.lora_A = nn.Parameter(torch.randn(rank, width) * width**-0.5)
        self.lora_B = nn.Parameter(torch.randn(out, rank) * 0.1 * rank**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + F.linear(F.linear(x, self.lora_A), self.lora_B)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return x [B, H, L, D] with rotary positions: dimension i turns with i + D/2, by the angles of cos, sin [L, D]."""
    a, b = x.chunk(2, -1)
    return x * cos + torch.cat((-b, a), -1) * sin


def gated(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


class Llama(nn.Module):
    """A Llama: pre-norm blocks of RMS norms, rotary positions, grouped-query attention and SwiGLU.

    Only LoRA's factors learn, or all parameters if there are none. targets: the layers of a block that have factors.
    """

    rotate, gated = staticmethod(rotate), staticmethod(gated)

    def __init__(
        self,
        vocabulary: int,
        width: int,
        inner: int,
        heads: int,
        kv_heads: int,
        layers: int,
        rank: int,
        targets: Sequence[str],
    ) -> None:
        super().__init__()
        self.head_dim = width // heads
        kv = kv_heads * self.head_dim
        shapes = {"q": (width, width), "k": (width, kv), "v": (width, kv), "o": (width, width)}
        shapes |= {"gate": (width, inner), "up": (width, inner), "down": (inner, width)}

        def linear(name: str) -> nn.Linear:
            return LoraLinear(*shapes[name], rank) if name in targets else nn.Linear(*shapes[name], bias=False)

        self.tokens = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {name: linear(name) for name in shapes} | {f"norm{i}": nn.RMSNorm(width, eps=1e-5) for i in (1, 2)}
            )
            for _ in range(layers)
        )
        self.norm, self.head = nn.RMSNorm(width, eps=1e-5), nn.Linear(width, vocabulary, bias=False)
        for name, p in self.named_parameters():
            p.requires_grad_("lora_" in name or not targets)

    def angles(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and sines, [L, head_dim], for the positions of x [B, L, D]."""
        like = {"device": x.device, "dtype": x.dtype}
        speed = ROPE_BASE ** -(torch.arange(0, self.head_dim, 2, **like) / self.head_dim)
        angles = torch.outer(torch.arange(x.shape[1], **like), speed).repeat(1, 2)
        return angles.cos(), angles.sin()

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens)
        cos, sin = self.angles(x)
        for block in self.blocks:
            B, L, D = x.shape
            normed = block["norm1"](x)
            q, k, v = (block[name](normed).view(B, L, -1, self.head_dim).transpose(1, 2) for name in "qkv")
            q, k = self.rotate(q, cos, sin), self.rotate(k, cos, sin)
            attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            x = x + block["o"](attended.transpose(1, 2).reshape(B, L, D))
            normed = block["norm2"](x)
            x = x + block["down"](self.gated(block["gate"](normed), block["up"](normed)))
        return self.head(self.norm(x))


def full_llama(vocabulary: int, width: int, inner: int, heads: int, kv_heads: int, layers: int) -> nn.Module:
    return Llama(vocabulary, width, inner, heads, kv_heads, layers, rank=0, targets=())


def vectors(tasks: int, examples: int, widths: Sequence[int]) -> Batch:
    return torch.randn(tasks, examples, widths[0]), torch.randint(widths[-1], (tasks, examples))


def tokens(tasks: int, sequences: int, length: int, vocabulary: int) -> Batch:
    """Draw tokens; the target of each token is the next one."""
    drawn = torch.randint(vocabulary, (tasks, sequences, length + 1))
    return drawn[..., :-1].contiguous(), drawn[..., 1:].contiguous()


def cross_entropy(model: nn.Module, batch: Batch) -> Tensor:
    x, y = batch
    return F.cross_entropy(model(x).flatten(0, -2), y.flatten())


@dataclass(frozen=True)
class Kind:
    """An architecture, and the function that draws its support and query sets, one call for each."""

    model: Callable[..., nn.Module]
    data: Callable[..., Batch]

    @property
    def sizes(self) -> set[str]:
        """Return the keys that a workload must have: the arguments of both functions, and K."""
        return {"K", *signature(self.model).parameters, *signature(self.data).parameters}

    def make(self, sizes: dict[str, Any]) -> tuple[nn.Module, Batch, Batch]:
        model, data = (
            partial(part, **{name: sizes[name] for name in signature(part).parameters})
            for part in (self.model, self.data)
        )
        return model(), data(), data()


KINDS = {
    "mlp": Kind(mlp, vectors),
    "rnn": Kind(partial(RecurrentLM, nn.RNN), tokens),
    "gru": Kind(partial(RecurrentLM, nn.GRU), tokens),
    "lstm": Kind(partial(RecurrentLM, nn.LSTM), tokens),
    "gpt": Kind(GPT, tokens),
    "llama": Kind(Llama, tokens),
    "full-llama": Kind(full_llama, tokens),
}
