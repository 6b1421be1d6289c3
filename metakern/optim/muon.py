"""Muon: momentum whose matrices are orthogonalized by Newton-Schulz iterations, as an inner optimizer.

    b <- momentum b + g        d = g + momentum b (Nesterov), or b        o = newton_schulz(d)
    phi <- phi - lr (f o + weight_decay phi)        f = √max(1, M / N), or 0.2 √max(M, N)

for parameters that are matrices, [M, N], embeddings included. Another optimizer updates all other parameters, AdamW
by default. The equations are those of torch.optim.Muon (Jordan et al. 2024, "Muon: an optimizer for hidden layers in
neural networks"). The two factors f are "original" and "match_rms_adamw" (Liu et al. 2025, "Muon is scalable for LLM
training", section 2.2). torch.optim.Muon rounds d to bfloat16; here everything is in the parameters' own dtype.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import sqrt

import torch
from torch import Tensor, nn

from metakern import ops
from metakern.ops.newton_schulz import COEFFICIENTS
from metakern.optim.adam import AdamW
from metakern.optim.base import (
    InnerOptimizer,
    State,
    Stepwise,
    Tensors,
    Values,
    fraction,
    non_negative,
    numbers,
    positive,
)

FACTORS = {
    "original": lambda rows, columns: sqrt(max(1, rows / columns)),
    "match_rms_adamw": lambda rows, columns: 0.2 * sqrt(max(rows, columns)),
}


class Muon(Stepwise):
    """Muon as an inner optimizer, for matrices, with another optimizer for all other parameters.

    The equations are those of torch.optim.Muon (Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural
    networks"), in the parameters' own dtype.

    Args:
        lr: The learning rate.
        weight_decay: Each step subtracts lr weight_decay phi.
        momentum: The factor of the momentum buffers.
        nesterov: Whether the momentum is Nesterov's.
        ns_coefficients: The coefficients (a, b, c) of `metakern.ops.newton_schulz`.
        eps: The least norm by which Newton-Schulz divides a matrix.
        ns_steps: The number of Newton-Schulz steps.
        adjust_lr_fn: The factor of the rate for a matrix [M, N]: "original" (the default, None) for √max(1, M / N), or
            "match_rms_adamw" for 0.2 √max(M, N).
        others: The optimizer of the parameters that are no matrices; None for AdamW with the same lr and weight_decay,
            learned where those of Muon are.
        learn: Any of lr, weight_decay and momentum; as for `SGD`.
        learn_lr, per, steps: As for `SGD`.

    Raises:
        ValueError: For a negative rate, decay or ns_steps, a momentum outside [0, 1), an eps that is not positive,
            another adjust_lr_fn, a number that is not finite, or as `SGD` does for `learn`, `per` and `steps`.
        TypeError: For a value that is no number, ns_coefficients that are not three numbers, ns_steps that is no
            integer, `others` that is no inner optimizer, or as `SGD` does for `learn` and `learn_lr`.

    >>> import metakern as mk, torch
    >>> model = torch.nn.Linear(3, 2)
    >>> maml = mk.MAML(model, mk.losses.classification, mk.optim.Muon(lr=0.02, others=mk.optim.SGD(lr=0.1)), steps=2)
    """

    fills = (0.0,)

    def __init__(
        self,
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = COEFFICIENTS,
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        others: InnerOptimizer | None = None,
        *,
        learn: str | Iterable[str] = (),
        learn_lr: bool = False,
        per: str = "all",
        steps: int | None = None,
    ) -> None:
        non_negative("Muon", lr=lr, weight_decay=weight_decay, ns_steps=ns_steps)
        if not isinstance(ns_steps, int):
            raise TypeError(f"Muon: ns_steps must be an integer, got {ns_steps!r}")
        numbers("Muon", "ns_coefficients", ns_coefficients, 3)
        fraction("Muon", momentum=momentum)
        positive("Muon", eps=eps)
        if adjust_lr_fn not in (None, *FACTORS):
            raise ValueError(f"Muon: adjust_lr_fn must be None or one of {', '.join(FACTORS)}, got {adjust_lr_fn!r}")
        if others is not None and not isinstance(others, InnerOptimizer):
            raise TypeError(f"Muon: others must be one of metakern.optim's optimizers, got {type(others).__name__}")
        super().__init__({"lr": lr, "weight_decay": weight_decay, "momentum": momentum}, learn, learn_lr, per, steps)
        self.nesterov, self.eps, self.ns_steps = nesterov, eps, ns_steps
        self.ns_coefficients, self.adjust_lr_fn = ns_coefficients, adjust_lr_fn or "original"
        if others is None:
            same = [name for name in ("lr", "weight_decay") if getattr(self, name).learn]
            others = AdamW(lr, weight_decay=weight_decay, learn=same, per=per, steps=steps)
        self.others = others

    def prepare(self, adapted: Mapping[str, nn.Parameter]) -> None:
        super().prepare({name: p for name, p in adapted.items() if p.dim() == 2})
        self.others.prepare({name: p for name, p in adapted.items() if p.dim() != 2})

    def init(self, phi: Tensors) -> State:
        matrices, others = _split(phi, phi)
        return (*super().init(matrices), *self.others.init(others))

    @property
    def takes_losses(self) -> bool:  # type: ignore[override]
        return self.others.takes_losses

    def update(self, phi: Tensors, grads: Tensors, state: State, *losses: Tensor) -> tuple[list[Tensor], State]:
        kept = sum(p.dim() == 3 for p in phi) + self.counts
        matrices, others = zip(_split(phi, phi), _split(phi, grads), (state[:kept], state[kept:]), strict=True)
        (mine, state_of_mine), (rest, state_of_rest) = super().update(*matrices), self.others.update(*others, *losses)
        each = {True: iter(mine), False: iter(rest)}
        return [next(each[p.dim() == 3]) for p in phi], (*state_of_mine, *state_of_rest)

    def step(
        self, count: int, phi: list[Tensor], grads: list[Tensor], *state: list[Tensor], **hyper: Values
    ) -> tuple[list[Tensor], ...]:
        n = len(phi)
        rates, decays, momenta = (_each(hyper[name], n) for name in ("lr", "weight_decay", "momentum"))
        ahead = [-1 * momentum for momentum in momenta]
        b = ops.sgd_update(grads, state[0], ahead)
        directions = self._orthogonalized(ops.sgd_update(grads, b, ahead) if self.nesterov else b)
        factors = [FACTORS[self.adjust_lr_fn](*p.shape[1:]) for p in phi]
        rates = [factor * rate for factor, rate in zip(factors, rates, strict=True)]
        decays = [decay / factor for factor, decay in zip(factors, decays, strict=True)]
        return ops.sgd_update(phi, directions, rates, weight_decay=decays), b

    def _orthogonalized(self, x: list[Tensor]) -> list[Tensor]:
        """Orthogonalizes all matrices, those of one shape in one call."""
        found: dict[int, Tensor] = {}
        for shape in dict.fromkeys(m.shape for m in x):
            places = [i for i, m in enumerate(x) if m.shape == shape]
            many = torch.cat([x[i] for i in places]) if len(places) > 1 else x[places[0]]
            y = ops.newton_schulz(many, self.ns_steps, self.ns_coefficients, self.eps)
            found.update(zip(places, y.split(shape[0]), strict=True))
        return [found[i] for i in range(len(x))]


def _split(phi: Tensors, values: Tensors) -> tuple[list[Tensor], list[Tensor]]:
    """Splits `values` into those of the parameters that are matrices, and the others."""
    pairs = list(zip(phi, values, strict=True))
    return [v for p, v in pairs if p.dim() == 3], [v for p, v in pairs if p.dim() != 3]


def _each(value: Values, number: int) -> list:
    return value if isinstance(value, list) else [value] * number
