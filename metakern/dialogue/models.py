"""Small causal language models: a recurrent one and a GPT.

    RNNLM   embedding -> rnn | gru | lstm -> [projection] -> head
    GPT     embedding -> layers x (x + attention(norm x); x + mlp(norm x)) -> norm -> head    (pre-norm, rotary)

| tensor         | shape   |
|----------------|---------|
| input_ids      | [B, L]  |
| logits         | [B, L, V] |

The logits at position i depend only on tokens up to i, so padding on the right needs no mask: `attention_mask` is
accepted and ignored. The head shares the weight of the embedding (in an RNNLM, if `tie` says so). `build_model` makes
a model of the same architecture from `model.config`.

Radford et al. 2019, "Language models are unsupervised multitask learners", section 2.3 (GPT); Su et al. 2021,
"RoFormer", section 3.2 (rotary positions); Press and Wolf 2017, "Using the output embedding to improve language
models" (tied heads).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from metakern import ops
from metakern.nn import GRU, LSTM, RNN, RMSNorm

__all__ = ["GPT", "MODELS", "RNNLM", "build_model"]

CELLS = {"rnn": RNN, "gru": GRU, "lstm": LSTM}


class RNNLM(nn.Module):
    """A recurrent language model.

    Args:
        cell: "rnn", "gru" or "lstm".
        vocab_size: V, the number of tokens.
        embedding: The width of the embedding.
        hidden: The number of hidden units in a layer.
        layers: The number of recurrent layers.
        dropout: The probability of dropping a unit after the embedding, between layers and before the head.
        tie: Whether the head shares the weight of the embedding. Hidden states are then projected to the width of the
            embedding, if `hidden` differs from it.

    Raises:
        ValueError: If `cell` is unknown, a size is below 1, or `dropout` is not a probability.

    >>> model = RNNLM("gru", vocab_size=300, embedding=8, hidden=16)
    >>> model(torch.zeros(2, 5, dtype=torch.long)).shape
    torch.Size([2, 5, 300])
    """

    def __init__(
        self,
        cell: str,
        vocab_size: int,
        embedding: int = 128,
        hidden: int = 256,
        layers: int = 1,
        dropout: float = 0.0,
        tie: bool = True,
    ) -> None:
        super().__init__()
        if cell not in CELLS:
            raise ValueError(f"RNNLM: cell must be one of {', '.join(CELLS)}, got {cell!r}")
        _check("RNNLM", vocab_size=vocab_size, embedding=embedding, hidden=hidden, layers=layers)
        self.config = {"name": cell, "vocab_size": vocab_size, "embedding": embedding, "hidden": hidden}
        self.config |= {"layers": layers, "dropout": dropout, "tie": tie}
        self.embedding = nn.Embedding(vocab_size, embedding)
        nn.init.normal_(self.embedding.weight, std=embedding**-0.5)
        self.drop = nn.Dropout(dropout)
        self.rnn = CELLS[cell](embedding, hidden, layers, batch_first=True, dropout=dropout if layers > 1 else 0.0)
        self.projection = nn.Linear(hidden, embedding) if tie and hidden != embedding else nn.Identity()
        self.head = nn.Linear(embedding if tie else hidden, vocab_size)
        if tie:
            self.head.weight = self.embedding.weight
        nn.init.zeros_(self.head.bias)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return the logits `[B, L, V]` of the tokens `input_ids` `[B, L]`, int64."""
        return self.head(self.hidden_states(input_ids))

    def hidden_states(self, input_ids: Tensor) -> Tensor:
        """Return what the head is applied to, `[B, L, D]`."""
        hidden, _ = self.rnn(self.drop(self.embedding(input_ids)))
        return self.drop(self.projection(hidden))


class GPT(nn.Module):
    """A Transformer decoder: pre-norm, with RMSNorm, rotary positions and GELU.

    Args:
        vocab_size: V, the number of tokens.
        width: D, the width of the embedding and of all layers, a multiple of 2 * heads.
        heads: The number of attention heads in a layer.
        layers: The number of layers.
        max_length: The longest input, in tokens.
        dropout: The probability of dropping a unit after the embedding, the attention and the MLP.

    Raises:
        ValueError: If a size is below 1, `width` is not a multiple of 2 * heads, or `dropout` is not a probability; at
            a call, if the input is longer than `max_length`.

    >>> model = GPT(vocab_size=300, width=16, heads=2, layers=1, max_length=8)
    >>> model(torch.zeros(2, 5, dtype=torch.long)).shape
    torch.Size([2, 5, 300])
    """

    def __init__(
        self,
        vocab_size: int,
        width: int = 128,
        heads: int = 4,
        layers: int = 2,
        max_length: int = 256,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        _check("GPT", vocab_size=vocab_size, width=width, heads=heads, layers=layers, max_length=max_length)
        if width % (2 * heads):
            raise ValueError(f"GPT: width must be a multiple of 2 * heads, got {width} and {heads} heads")
        self.config = {"name": "gpt", "vocab_size": vocab_size, "width": width, "heads": heads}
        self.config |= {"layers": layers, "max_length": max_length, "dropout": dropout}
        self.max_length, self.head_width = max_length, width // heads
        self.embedding = nn.Embedding(vocab_size, width)
        self.drop = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(layers))
        self.norm = RMSNorm(width)
        self.head = nn.Linear(width, vocab_size)
        self.head.weight = self.embedding.weight
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 2:
                # Each block adds to the residual stream twice; this factor keeps the size of the sum at the start.
                depth = (2 * layers) ** -0.5 if name.endswith(("out.weight", "down.weight")) else 1.0
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5 * depth)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return the logits `[B, L, V]` of the tokens `input_ids` `[B, L]`, int64."""
        return self.head(self.hidden_states(input_ids))

    def hidden_states(self, input_ids: Tensor) -> Tensor:
        """Return what the head is applied to, `[B, L, D]`."""
        if input_ids.shape[-1] > self.max_length:
            raise ValueError(f"GPT: input_ids must be at most {self.max_length} long, got {input_ids.shape[-1]}")
        x = self.drop(self.embedding(input_ids))
        rotation = rotations(x.shape[1], self.head_width, x)
        for block in self.blocks:
            x = block(x, *rotation)
        return self.norm(x)


class Block(nn.Module):
    """One pre-norm layer of a GPT: x `[B, L, D]` -> `[B, L, D]`, given the `rotations` of its heads."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = RMSNorm(width), RMSNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        B, L, D = x.shape
        q, k, v = self.qkv(self.attention_norm(x)).view(B, L, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        attended = ops.attention(ops.rope(q, cos, sin), ops.rope(k, cos, sin), v)
        x = x + self.drop(self.out(attended.transpose(1, 2).reshape(B, L, D)))
        return x + self.drop(self.down(ops.gelu(self.up(self.mlp_norm(x)))))


def rotations(L: int, D: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cosines and sines `[L, D]` for `ops.rope` with heads of width D.

    The angle of position l in columns j and j + D / 2 is l * 10000^(-2 j / D).
    """
    rates = 10000 ** (-torch.arange(0, D, 2, device=like.device) / D)
    angles = torch.arange(L, device=like.device).unsqueeze(1) * rates.repeat(2)
    return angles.cos().to(like.dtype), angles.sin().to(like.dtype)


MODELS = (*CELLS, "gpt")


def build_model(name: str, vocab_size: int, **sizes: Any) -> nn.Module:
    """Return a new language model.

    Args:
        name: "rnn", "gru" or "lstm" for an `RNNLM`, "gpt" for a `GPT`.
        vocab_size: The number of tokens.
        sizes: The other arguments of `RNNLM` or `GPT`, by keyword.

    Returns:
        A module that maps token ids `[B, L]` to logits `[B, L, V]`.

    Raises:
        ValueError: If `name` is unknown, or a value is out of range.
        TypeError: If the model has no such argument.

    >>> model = build_model("lstm", 300, embedding=8, hidden=8)
    >>> build_model(**model.config).config == model.config
    True
    """
    if name not in MODELS:
        raise ValueError(f"build_model: name must be one of {', '.join(MODELS)}, got {name!r}")
    return GPT(vocab_size, **sizes) if name == "gpt" else RNNLM(name, vocab_size, **sizes)


def _check(model: str, **sizes: int) -> None:
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{model}: {name} must be at least 1, got {value}")
