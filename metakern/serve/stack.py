"""A language model of `metakern.dialogue` whose layers hold the weights of many users, for inference.

Row r of the batch runs with row r of the weights. All weights are in one tensor, the arena `[rows, P]`, in which a row
is a model: it is set by one copy. The parameters of the layers are views of the arena, `[rows, *shape]`.

| tensor | shape |
|---|---|
| arena | [R, P] for R rows and P parameters |
| weight of a layer | [R, out, in] |
| tokens | [R, L] |
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from metakern.errors import UserError
from metakern.nn import GRU, LSTM, RNN, RMSNorm
from metakern.nn.recurrent import run

__all__ = ["Stack"]


class Stack:
    """Rows of weights and of a cache, and the model that runs with them.

    Args:
        model: An `RNNLM` or `GPT`, of which a copy is made.
        rows: R, the largest number of sequences in a batch.

    Attributes:
        base: The weights of `model`, `[P]`.
        arena: The weights of each row, `[R, P]`.
        cache: The cache of each row, tensors `[R, ...]`.

    Raises:
        UserError: If the model has a layer that can't hold the weights of several users.
    """

    def __init__(self, model: nn.Module, rows: int) -> None:
        self.model: Any = copy.deepcopy(model).eval()
        parameters = dict(self.model.named_parameters())
        self._shapes = {name: p.shape for name, p in parameters.items()}
        self.base = torch.cat([p.detach().flatten() for p in parameters.values()])
        self.arena = self.base.repeat(rows, 1)
        sizes = [p.numel() for p in parameters.values()]
        views = {
            id(p): part.unflatten(1, p.shape)
            for p, part in zip(parameters.values(), self.arena.split(sizes, 1), strict=True)
        }
        self._places: list[tuple[nn.Module, str, Tensor]] = []
        for module in self.model.modules():
            own = [(module, name, views[id(p)]) for name, p in module._parameters.items() if p is not None]
            if own:
                if type(module) not in LAYERS:
                    raise UserError(f"serve: layers must be {', '.join(sorted(NAMES))}, got {type(module).__name__}")
                module.__class__ = LAYERS[type(module)]
                self._places += own
        self.cache = self.at(0, rows).empty_cache(rows)

    def at(self, begin: int, end: int) -> Any:
        """Return the model, with the weights of the rows `begin` to `end`; it is the same object at each call."""
        for module, name, value in self._places:
            module._parameters[name] = value[begin:end]  # type: ignore[assignment]
        return self.model

    def cache_at(self, begin: int, end: int) -> tuple[Tensor, ...]:
        """Return the cache of the rows `begin` to `end`, as views."""
        return tuple(part[begin:end] for part in self.cache)

    def flat(self, phi: Mapping[str, Tensor]) -> Tensor:
        """Return the weights `[P]` of the model in which `phi` replaces some parameters, given by name, `[*shape]`.

        Raises:
            ValueError: If a name or a shape is not the model's.
        """
        parts = dict(zip(self._shapes, self.base.split([prod(shape) for shape in self._shapes.values()]), strict=True))
        for name, p in phi.items():
            if self._shapes.get(name) != p.shape:
                raise ValueError(f"{name} {list(p.shape)} is not a parameter of the model")
            parts[name] = p.flatten()
        return torch.cat([part.to(self.base) for part in parts.values()])

    def move(self, source: int, target: int) -> None:
        """Copy the weights and the cache of a row to another one."""
        for tensor in (self.arena, *self.cache):
            tensor[target].copy_(tensor[source])


class _Embedding(nn.Embedding):
    def forward(self, tokens: Tensor) -> Tensor:
        return self.weight[torch.arange(len(tokens), device=tokens.device).unsqueeze(1), tokens]


class _Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias.unsqueeze(1), x, self.weight.mT)


class _RMSNorm(nn.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], eps=self.eps) * self.weight.unsqueeze(1)


class _Recurrent(nn.RNNBase):
    def forward(self, input: Tensor | PackedSequence, hx: Any = None) -> Any:
        x, lengths = input, None
        if isinstance(x, PackedSequence):
            x, lengths = pad_packed_sequence(x, batch_first=True)
            lengths = lengths.to(x.device).unsqueeze(1)
        states = hx if self.mode == "LSTM" else (hx,)
        states = tuple(state.unsqueeze(2) for state in states)  # [layers, R, 1, H]
        y, states = run(self, x.unsqueeze(1), states, partial(getattr, self), lengths)
        states = tuple(state.squeeze(2) for state in states)
        return y.squeeze(1), states if self.mode == "LSTM" else states[0]


LAYERS: dict[type, type] = {
    nn.Embedding: _Embedding,
    nn.Linear: _Linear,
    RMSNorm: _RMSNorm,
    **dict.fromkeys((RNN, GRU, LSTM), _Recurrent),
}
NAMES = {kind.__name__ for kind in LAYERS}
