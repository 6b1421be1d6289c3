"""A language model whose layers hold the weights of many users, for inference.

Row r of the batch runs with row r of the weights. All weights are in one tensor, the arena `[rows, P]`, in which a row
is a model: it is set by one copy. The parameters of the layers are views of the arena, `[rows, *shape]`. Frozen
parameters, such as all but the factors of LoRA, are there once for all rows.

| tensor | shape |
|---|---|
| arena | [R, P] for R rows and P parameters that are not frozen |
| weight of a layer | [R, out, in] |
| tokens | [R, L] |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from metakern.errors import UserError
from metakern.meta.parameters import twin
from metakern.nn import GRU, LSTM, RNN, RMSNorm
from metakern.nn.lora import LoraLinear
from metakern.nn.recurrent import run

__all__ = ["Stack"]


class Stack:
    """Rows of weights and of a cache, and the model that runs with them.

    Args:
        model: An `RNNLM`, a `GPT` or a pretrained model with LoRA, of which a copy is made, without frozen parameters.
        rows: R, the largest number of sequences in a batch.
        length: The longest sequence of a pretrained model, in tokens.

    Attributes:
        base: The weights of `model` that are not frozen, `[P]`.
        arena: The weights of each row, `[R, P]`.
        cache: The cache of each row, tensors `[R, ...]`.

    Raises:
        UserError: If the model has a layer that can't hold the weights of several users, or can't be decoded with a
            cache for them.
    """

    def __init__(self, model: nn.Module, rows: int, length: int = 0) -> None:
        copied = twin(model).eval()
        parameters = {name: p for name, p in copied.named_parameters() if p.requires_grad}
        trained = set(map(id, parameters.values()))
        owners = [m for m in copied.modules() if any(id(p) in trained for p in m._parameters.values())]
        for module in owners:
            if type(module) not in LAYERS:
                raise UserError(
                    f"serve: layers must be {', '.join(sorted(NAMES))}, got {type(module).__name__}; a pretrained model"
                    " must be trained with --lora"
                )
        self._shapes = {name: p.shape for name, p in parameters.items()}
        self.base = torch.cat([p.detach().flatten() for p in parameters.values()])
        self.arena = self.base.repeat(rows, 1)
        views = {id(parameters[name]): view for name, view in self._named(self.arena).items()}
        self._places: list[tuple[nn.Module, str, Tensor]] = []
        for module in owners:
            module.__class__ = LAYERS[type(module)]
            self._places += [(module, name, views[id(p)]) for name, p in module._parameters.items() if id(p) in views]
        if hasattr(copied, "next_logits"):
            self.model: Any = copied
            self.cache = self.at(0, rows).empty_cache(rows)
            return
        try:
            self.model = _pretrained(copied, length)
            self.cache = self.at(0, rows).empty_cache(rows)
            self._check(twin(model).eval())
        except UserError:
            raise
        except Exception as error:  # models of Hugging Face raise errors of any class for a cache that they can't use
            why = " ".join(str(error)[:200].split())
            raise UserError(f"serve: {type(model).__name__} can't be decoded with a cache: {why}") from None

    @torch.no_grad()
    def _check(self, model: nn.Module) -> None:
        """Compare the logits of two rows, one of them as long as can be, with those of a pretrained model.

        Raises:
            UserError: If they differ.
        """
        draws = torch.Generator().manual_seed(0)
        length, rows = self.model.length, slice(0, min(2, len(self.arena)))
        ids = torch.randint(self.model.vocabulary, (2, length), generator=draws)[rows]
        self.arena[rows] += 0.02 * torch.randn(self.arena[rows].shape, generator=draws)
        known = torch.zeros(len(ids), dtype=torch.long)
        for counts in (torch.tensor([length - 1, length // 2])[rows], torch.tensor([1, 1])[rows]):
            new = ids.gather(1, (known.unsqueeze(1) + torch.arange(int(counts.max()))).clamp(max=length - 1))
            logits = self.at(0, len(ids)).next_logits(new, counts, self.cache_at(0, len(ids)), known)
            known = known + counts
            for row, count in enumerate(known.tolist()):
                phi = {name: p[row] for name, p in self._named(self.arena).items()}
                output: Any = torch.func.functional_call(model, phi, kwargs={"input_ids": ids[row : row + 1, :count]})
                truth = output.logits[0, -1]
                if not torch.allclose(logits[row], truth, 1e-3, 1e-3 * truth.abs().max().item()):
                    raise UserError(f"serve: {type(model).__name__} gives other logits with a cache for several users")
        self.arena[rows] = self.base
        for part in self.cache:
            part[rows] = 0

    def at(self, begin: int, end: int) -> Any:
        """Return the model, with the weights of the rows `begin` to `end`; it is the same object at each call."""
        for module, name, value in self._places:
            module._parameters[name] = value[begin:end]  # type: ignore[assignment]
        return self.model

    def cache_at(self, begin: int, end: int) -> tuple[Tensor, ...]:
        """Return the cache of the rows `begin` to `end`, as views."""
        return tuple(part[begin:end] for part in self.cache)

    def copied_cache(self, row: int, known: int) -> tuple[Tensor, ...]:
        """Return a copy of the cache of a row, which holds `known` tokens."""
        parts = [part[row] for part in self.cache]
        return tuple((part[..., :known, :] if self.model.cuts_cache else part).clone() for part in parts)

    def put_cache(self, row: int, cache: Sequence[Tensor]) -> None:
        """Put back what `copied_cache` returned, or empty the cache of a row if there is nothing."""
        for part in self.cache:
            part[row].zero_()
        for part, kept in zip(self.cache, cache, strict=False):
            (part[row, ..., : kept.shape[-2], :] if self.model.cuts_cache else part[row]).copy_(kept)

    def flat(self, phi: Mapping[str, Tensor]) -> Tensor:
        """Return the weights `[P]` of the model in which `phi` replaces some parameters, given by name, `[*shape]`.

        Raises:
            ValueError: If a name or a shape is not the model's.
        """
        parts = self._named(self.base)
        for name, p in phi.items():
            if self._shapes.get(name) != p.shape:
                raise ValueError(f"{name} {list(p.shape)} is not a parameter of the model")
            parts[name] = p
        return torch.cat([part.flatten().to(self.base) for part in parts.values()])

    def _named(self, weights: Tensor) -> dict[str, Tensor]:
        """Return views of weights `[..., P]`: each parameter, `[..., *shape]`, by name."""
        parts = weights.split([prod(shape) for shape in self._shapes.values()], -1)
        return {
            name: part.unflatten(-1, shape) for (name, shape), part in zip(self._shapes.items(), parts, strict=True)
        }

    def move(self, source: int, target: int) -> None:
        """Copy the weights and the cache of a row to another one."""
        for tensor in (self.arena, *self.cache):
            tensor[target].copy_(tensor[source])


def _pretrained(model: nn.Module, length: int) -> Any:
    from metakern.serve.pretrained import Pretrained  # transformers, which other models do without

    return Pretrained(model, length)


class _Embedding(nn.Embedding):
    def forward(self, tokens: Tensor) -> Tensor:
        return self.weight[torch.arange(len(tokens), device=tokens.device).unsqueeze(1), tokens]


class _Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias.unsqueeze(1), x, self.weight.mT)


class _RMSNorm(nn.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], eps=self.eps) * self.weight.unsqueeze(1)


class _Lora(LoraLinear):
    def forward(self, x: Tensor) -> Tensor:
        rows = len(self.lora_A)
        return super().forward(x) if x.dim() > 2 else super().forward(x.unflatten(0, (rows, -1))).flatten(0, 1)


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
    LoraLinear: _Lora,
}
NAMES = {kind.__name__ for kind in LAYERS}
