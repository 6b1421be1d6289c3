"""Small causal language models: a recurrent one and a GPT.

    RNNLM   embedding -> rnn | gru | lstm -> [projection] -> head
    GPT     embedding -> layers x (x + attention(norm x); x + mlp(norm x)) -> norm -> head    (pre-norm, rotary)

| tensor         | shape   |
|----------------|---------|
| input_ids      | [B, L]  |
| logits         | [B, L, V] |

The logits at position i depend only on tokens up to i, so padding on the right needs no mask: `attention_mask` is
accepted and ignored. `next_logits` reads only new tokens: what it needs of those before them is in a cache, the keys
and values of a GPT or the states of an RNNLM. The head shares the weight of the embedding (in an RNNLM, if `tie` says
so). `build_model` makes a model of the same architecture from `model.config`.

Radford et al. 2019, "Language models are unsupervised multitask learners", section 2.3 (GPT); Su et al. 2021,
"RoFormer", section 3.2 (rotary positions); Press and Wolf 2017, "Using the output embedding to improve language
models" (tied heads).
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from metakern import ops
from metakern.nn import GRU, LSTM, RNN, RMSNorm

__all__ = ["GPT", "MODELS", "RNNLM", "build_model"]

CELLS = {"rnn": RNN, "gru": GRU, "lstm": LSTM}
Cache = tuple[Tensor, ...]  # [B, ...] each


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

    cuts_cache = False  # whether `next_logits` can go on from the first tokens of a cache

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

    def empty_cache(self, rows: int) -> Cache:
        """Return a cache for `rows` sequences: the states after no token, each `[rows, layers, H]`."""
        shape = rows, self.rnn.num_layers, self.rnn.hidden_size
        return tuple(self.embedding.weight.new_zeros(shape) for _ in range(1 + (self.rnn.mode == "LSTM")))

    def next_logits(self, input_ids: Tensor, counts: Tensor, cache: Cache, known: Tensor) -> Tensor:
        """Return the logits `[B, V]` of the token after new tokens, and put these into the cache.

        Args:
            input_ids: `[B, L]`, the new tokens, padded on the right.
            counts: `[B]`, int64: the number of new tokens of each sequence, from 1 to L.
            cache: What `empty_cache(B)` returned and earlier calls have filled.
            known: `[B]`, int64: the number of tokens in the cache of each sequence.
        """
        x = self.embedding(input_ids)
        if x.shape[1] > 1:
            x = pack_padded_sequence(x, counts.cpu(), batch_first=True, enforce_sorted=False)
        before = tuple(state.transpose(0, 1) for state in cache)
        _, after = self.rnn(x, before if len(before) > 1 else before[0])
        for state, new in zip(cache, after if len(before) > 1 else (after,), strict=True):
            state.copy_(new.transpose(0, 1))
        return self.head(self.projection(cache[0][:, -1:])).squeeze(1)


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

    cuts_cache = True

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
        self.max_length, self.heads, self.head_width = max_length, heads, width // heads
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

    def empty_cache(self, rows: int) -> Cache:
        """Return a cache for `rows` sequences: keys and values `[rows, layers, heads, max_length, D / heads]`."""
        shape = rows, len(self.blocks), self.heads, self.max_length, self.head_width
        keys = self.embedding.weight.new_zeros(shape)
        return keys, torch.zeros_like(keys)

    def next_logits(self, input_ids: Tensor, counts: Tensor, cache: Cache, known: Tensor) -> Tensor:
        """Return the logits `[B, V]` of the token after new tokens, and put these into the cache.

        Args:
            input_ids: `[B, L]`, the new tokens, padded on the right.
            counts: `[B]`, int64: the number of new tokens of each sequence, from 1 to L.
            cache: What `empty_cache(B)` returned and earlier calls have filled.
            known: `[B]`, int64: the number of tokens in the cache of each sequence.

        Raises:
            ValueError: If a sequence becomes longer than `max_length`.
        """
        B, L = input_ids.shape
        longest = int((known + counts).max())
        if longest > self.max_length:
            raise ValueError(f"GPT: a sequence must be at most {self.max_length} long, got {longest}")
        steps = torch.arange(L, device=known.device)
        positions = (known.unsqueeze(1) + steps).clamp(max=self.max_length - 1)  # [B, L]
        x = self.embedding(input_ids)
        cos, sin = (table[positions] for table in rotations(self.max_length, self.head_width, x))
        rows, columns = torch.where(steps < counts.unsqueeze(1))  # of the tokens that are no padding
        seen = torch.arange(longest, device=known.device) <= positions.unsqueeze(-1)  # [B, L, longest]
        for i, block in enumerate(self.blocks):
            layer = cache[0][:, i], cache[1][:, i]
            x = cast(Block, block).extend(x, cos, sin, layer, (rows, columns), positions[rows, columns], seen)
        last = x[torch.arange(B, device=known.device), counts - 1].unsqueeze(1)
        return self.head(self.norm(last)).squeeze(1)


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
        q, k, v = self._projected(x)
        return self._after(x, ops.attention(ops.rope(q, cos, sin), ops.rope(k, cos, sin), v))

    def extend(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        cache: tuple[Tensor, Tensor],
        new: tuple[Tensor, Tensor],
        places: Tensor,
        seen: Tensor,
    ) -> Tensor:
        """Do as `forward` for new tokens, after those whose keys and values are in a cache.

        Args:
            x: `[B, L, D]`, the new tokens with padding; `cos` and `sin` are the rotations of each, `[B, L, D / H]`.
            cache: The keys and the values of the layer, `[B, H, max_length, D / H]` each.
            new: The sequence and the place in `x` of each token that is no padding.
            places: The place in the cache of each of them.
            seen: `[B, L, longest]`, True for the places of the cache that a token sees.
        """
        q, k, v = self._projected(x)
        q, k = ops.rope(q, cos, sin), ops.rope(k, cos, sin)
        for held, added in zip(cache, (k, v), strict=True):
            held[new[0], :, places] = added[new[0], :, new[1]]
        keys, values = (held[:, :, : seen.shape[-1]] for held in cache)
        return self._after(x, F.scaled_dot_product_attention(q, keys, values, attn_mask=seen.unsqueeze(1)))

    def _projected(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return queries, keys and values, each `[B, H, L, D / H]`."""
        B, L, D = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(B, L, 3, self.heads, D // self.heads)
        return qkv.permute(2, 0, 3, 1, 4).unbind()

    def _after(self, x: Tensor, attended: Tensor) -> Tensor:
        """Return the output of the layer, given its input and what its heads `[B, H, L, D / H]` attended to."""
        x = x + self.drop(self.out(attended.transpose(1, 2).reshape(x.shape)))
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
