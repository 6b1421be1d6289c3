"""Learned offsets of some parameters for each inner step, around any inner optimizer.

    phi_k = phi_0 + o_k, k = 1, …, K        phi_k = phi_0 + o_K, k > K

for the named parameters, in place of a step along their gradients. With the parameters of norms, these are the weights
and biases for each step of MAML++ (Antoniou, Edwards, Storkey 2019, "How to train your MAML", section 4).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from metakern.native.record import known
from metakern.optim.base import ByName, InnerOptimizer, State, Tensors


class StepOffsets(InnerOptimizer):
    """An inner optimizer with learned offsets of some parameters at each step; another updates all other parameters.

    After k inner steps a named parameter is what it was before the first step, plus its offset for step k; from the
    last offset on it stays. The offsets are zero at first and learned by the outer loop.

    Args:
        inner: The optimizer of the other parameters.
        names: The names of the parameters with offsets, as in `model.named_parameters()`.
        steps: The number of offsets of a parameter.

    Raises:
        TypeError: For an `inner` that is not an inner optimizer, or a single string as `names`.
        ValueError: For `steps` that is no integer of at least 1.

    >>> import metakern as mk, torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.LayerNorm(6), torch.nn.Linear(6, 4))
    >>> inner = mk.optim.StepOffsets(mk.optim.SGD(lr=0.1), ["1.weight", "1.bias"], steps=3)
    >>> maml = mk.MAML(model, mk.losses.classification, inner, steps=3)
    >>> [(name, tuple(p.shape)) for name, p in inner.offsets.items()]
    [('1.weight', (3, 6)), ('1.bias', (3, 6))]
    """

    def __init__(self, inner: InnerOptimizer, names: Iterable[str], steps: int) -> None:
        super().__init__()
        if not isinstance(inner, InnerOptimizer):
            raise TypeError(
                f"StepOffsets: inner must be one of metakern.optim's optimizers, got {type(inner).__name__}"
            )
        if isinstance(names, str):
            raise TypeError(f"StepOffsets: names must be a list of names, got {names!r}")
        if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
            raise ValueError(f"StepOffsets: steps must be an integer of at least 1, got {steps!r}")
        self.inner, self.names, self.steps = inner, frozenset(names), steps
        self.offsets = ByName("StepOffsets: offsets")
        self.bound: tuple[str, ...] = ()  # the names of the parameters in phi, in order

    @property
    def affine(self) -> bool:  # type: ignore[override]
        return self.inner.affine

    @property
    def takes_losses(self) -> bool:  # type: ignore[override]
        return self.inner.takes_losses

    def prepare(self, adapted: Mapping[str, nn.Parameter]) -> None:
        self.inner.prepare({name: p for name, p in adapted.items() if name not in self.names})
        for name, p in adapted.items():
            if name in self.names and name not in self.offsets:
                self.offsets[name] = nn.Parameter(p.new_zeros(self.steps, *p.shape))
        self.bound = tuple(adapted)

    def hyper_parameters(self) -> list[nn.Parameter]:
        idle = {id(p) for name, p in self.offsets.items() if name not in self.bound}
        own = [p for p in self.offsets.parameters() if p.requires_grad and id(p) not in idle]
        return [*self.inner.hyper_parameters(), *own]

    def init(self, phi: Tensors) -> State:
        """Returns the state of the other optimizer, then the number of steps taken, a float64 scalar on the CPU."""
        return (*self.inner.init(self._others(phi)), torch.zeros((), dtype=torch.float64, device="cpu"))

    def update(self, phi: Tensors, grads: Tensors, state: State, *losses: Tensor) -> tuple[list[Tensor], State]:
        *rest, count = state
        count = count + 1
        moved, after = self.inner.update(self._others(phi), self._others(grads), tuple(rest), *losses)
        others, now = iter(moved), int(known(count)) - 1
        found = [
            p + self._change(name, now).to(p) if name in self.names else next(others)
            for name, p in zip(self.bound, phi, strict=True)
        ]
        return found, (*after, count)

    def _others(self, values: Tensors) -> list[Tensor]:
        return [value for name, value in zip(self.bound, values, strict=True) if name not in self.names]

    def _change(self, name: str, step: int) -> Tensor:
        """Returns what a step adds to a parameter; the number of the first step is 0."""
        offsets = self.offsets[name]
        if step >= self.steps:
            return torch.zeros_like(offsets[0])
        return offsets[step] - offsets[step - 1] if step else offsets[0]
