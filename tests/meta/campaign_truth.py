"""The exact meta-gradient for the campaign: plain autograd in float64, task by task, with inner updates as formulas.

No metakern code computes it. Parameters are put into the modules by hand, derivatives come from `torch.autograd.grad`,
and attention is PyTorch's composed formula. On the CPU, PyTorch's weight normalization has a wrong second derivative,
and its batch and instance norms have a wrong third one, so these three are written out here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

import metakern as mk

Named = dict[str, Tensor]


class Formulas(TorchFunctionMode):
    """Within the block, the three norms are computed by operations with right derivatives."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        formula = {torch._weight_norm: _weight_norm, F.batch_norm: _batch_norm, F.instance_norm: _instance_norm}
        return formula.get(func, func)(*args, **kwargs or {})


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    return v * g / v.square().sum([i for i in range(v.dim()) if i != dim], keepdim=True).sqrt()


def _batch_norm(
    x: Tensor, mean: Any, var: Any, weight: Any = None, bias: Any = None, training: bool = False, *more: float
) -> Tensor:
    axes = [i for i in range(x.dim()) if i != 1]
    return _normalized(x, axes, None if training else (mean, var), weight, bias, more[1])


def _instance_norm(
    x: Tensor, mean: Any, var: Any, weight: Any = None, bias: Any = None, training: bool = True, *more: float
) -> Tensor:
    return _normalized(x, list(range(2, x.dim())), None if training else (mean, var), weight, bias, more[1])


def _normalized(x: Tensor, axes: list[int], known: Any, weight: Any, bias: Any, eps: float) -> Tensor:
    shape = (1, -1, *(1,) * (x.dim() - 2))
    if known is None:
        centered = x - x.mean(axes, keepdim=True)
        y = centered / (centered.square().mean(axes, keepdim=True) + eps).sqrt()
    else:
        y = (x - known[0].view(shape)) / (known[1].view(shape) + eps).sqrt()
    y = y if weight is None else y * weight.view(shape)
    return y if bias is None else y + bias.view(shape)


@contextmanager
def placed(model: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Within the block, `values` replace the parameters of the model; a tied one is replaced in all of its places."""
    names = {id(p): name for name, p in model.named_parameters()}
    places = [
        (module, attribute, p)
        for module in model.modules()
        for attribute, p in module._parameters.items()
        if p is not None and names[id(p)] in values
    ]

    def put(get: Callable[[Tensor], Any]) -> None:
        for module, attribute, p in places:
            module._parameters[attribute] = get(p)
        for module in model.modules():
            if isinstance(module, nn.RNNBase):
                module._flat_weights = [getattr(module, name) for name in module._flat_weights_names]

    try:
        put(lambda p: values[names[id(p)]])
        yield
    finally:
        put(lambda p: p)


@dataclass
class Inner:
    """An inner optimizer, as one of `mk.optim` and as formulas with their own learned leaves."""

    kind: str
    numbers: dict[str, float]
    learn: tuple[str, ...] = ()
    per: str = "all"
    steps: int | None = None
    options: dict[str, Any] = field(default_factory=dict)
    clip: float | None = None
    learn_norm: bool = False
    leaves: dict[Any, Tensor] = field(default_factory=dict)  # by (hyper-parameter, parameter or "")

    def metakern(self) -> mk.optim.InnerOptimizer:
        numbers = dict(self.numbers)
        if "beta1" in numbers:
            numbers["betas"] = (numbers.pop("beta1"), numbers.pop("beta2"))  # type: ignore[assignment]
        learning = {"learn": self.learn, "per": self.per, "steps": self.steps} if self.learn else {}
        inner = getattr(mk.optim, self.kind)(**numbers, **self.options, **learning)
        return inner if self.clip is None else mk.optim.Clipped(inner, self.clip, self.learn_norm)

    def prepare(self, adapted: Mapping[str, Tensor]) -> None:
        """Make the leaves, in the order of the parameters of the `mk.optim` optimizer."""
        if self.leaves:
            return
        if self.learn_norm and self.clip is not None:
            self.leaves["norm", ""] = torch.tensor(self.clip)
        steps = () if self.steps is None else (self.steps,)
        for name in self.numbers:
            for parameter, p in adapted.items() if self.per != "all" else [("", torch.zeros(()))]:
                if name in self.learn:
                    shape = (*steps, *(p.shape if self.per == "element" else ()))
                    self.leaves[name, parameter] = torch.full(shape, self.numbers[name])

    def value(self, name: str, parameter: str, step: int) -> Any:
        if name not in self.learn:
            return self.numbers.get(name, 0.0)
        leaf = self.leaves[name, "" if self.per == "all" else parameter]
        return leaf if self.steps is None else leaf[min(step, self.steps - 1)]

    def update(self, phi: Named, grads: Named, state: Named, step: int) -> tuple[Named, Named]:
        """Return parameters and state after step `step`, counted from 0; keys of the state are "buffer/parameter"."""
        if self.clip is not None:
            n = length(list(grads.values())) + 1e-6
            limit = self.leaves["norm", ""] if self.learn_norm else torch.tensor(self.clip)
            grads = {name: torch.where(n < limit, 1.0, limit / n) * g for name, g in grads.items()}
        if self.kind == "NormalizedSGD":
            whole = length(list(grads.values()))
            alone = self.options["norm"] == "parameter"
            grads = {name: g / ((length([g]) if alone else whole) + 1e-8) for name, g in grads.items()}
        after: Named = {}
        for name, p in phi.items():
            h = {number: self.value(number, name, step) for number in self.numbers}
            after[name] = self._rule(p, grads[name], h, state, name, step)
        return after, state

    def _rule(self, p: Tensor, g: Tensor, h: dict[str, Any], state: Named, name: str, step: int) -> Tensor:
        lr, decay = h["lr"], h.get("weight_decay", 0.0)

        def kept(what: str, value: Callable[[Any], Tensor]) -> Tensor:
            state[f"{what}/{name}"] = value(state.get(f"{what}/{name}", 0.0))
            return state[f"{what}/{name}"]

        if self.kind == "AdamW":
            p = p * (1 - lr * decay)
        else:
            g = g + decay * p
        if self.kind in ("Adam", "AdamW"):
            m = kept("m", lambda m: h["beta1"] * m + (1 - h["beta1"]) * g)
            v = kept("v", lambda v: h["beta2"] * v + (1 - h["beta2"]) * g * g)
            m, v = m / (1 - h["beta1"] ** (step + 1)), v / (1 - h["beta2"] ** (step + 1))
            return p - lr * m / (root(v) + h["eps"])
        if self.kind == "RMSprop":
            v = kept("v", lambda v: h["alpha"] * v + (1 - h["alpha"]) * g * g)
            d = g / (root(v) + h["eps"])
            return p - lr * (kept("b", lambda b: h["momentum"] * b + d) if "momentum" in h else d)
        if self.kind == "Adagrad":
            return p - lr * g / (root(kept("v", lambda v: v + g * g)) + h["eps"])
        if "momentum" in h:
            b = kept("b", lambda b: h["momentum"] * b + g)
            g = g + h["momentum"] * b if self.options.get("nesterov") else b
        return p - lr * g


def root(v: Tensor) -> Tensor:
    """The square root, with slope 0 at 0."""
    return torch.where(v > 0, torch.where(v > 0, v, 1.0).sqrt(), 0.0)


def length(tensors: Sequence[Tensor]) -> Tensor:
    return root(torch.stack([t.square().sum() for t in tensors]).sum())


@dataclass
class Answer:
    """Query losses [T]; gradients of their mean by parameters, hyper-parameters and leaves of the loss; and phi."""

    losses: Tensor
    gradients: list[Tensor | None]
    adapted: dict[str, Tensor]

    @property
    def rows(self) -> list[Tensor | None]:
        return [self.losses, *self.gradients]


def answer(
    model: nn.Module,
    loss: Callable[[nn.Module, Any], Tensor],
    inner: Inner,
    tasks: Sequence[tuple[Any, Any]],
    steps: int,
    first_order: bool = False,
    adapt: Callable[[str], bool] | None = None,
    leaves: Sequence[Tensor] = (),
    outer: bool = True,
) -> Answer:
    """Return the exact result for `tasks`, pairs of support and query; without `outer`, no outer gradients."""
    theta = {name: p for name, p in model.named_parameters() if p.requires_grad}
    start = {name: p for name, p in theta.items() if adapt is None or adapt(name)}
    inner.prepare(start)
    hyper = [leaf.requires_grad_() for leaf in inner.leaves.values()]
    losses, adapted = [], []
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), Formulas(), torch.enable_grad():
            for support, query in tasks:
                phi: Named = dict(start)
                state: Named = {}
                for step in range(steps):
                    with placed(model, phi):
                        value = loss(model, support)
                        found = torch.autograd.grad(
                            value, list(phi.values()), create_graph=not first_order, materialize_grads=True
                        )
                    phi, state = inner.update(phi, dict(zip(phi, found, strict=True)), state, step)
                adapted.append(phi)
                with placed(model, phi):
                    losses.append(loss(model, query))
            mean = torch.stack(losses).mean()
            wanted = [*theta.values(), *hyper, *leaves]
            gradients: Sequence[Tensor | None] = [None] * len(wanted)
            if outer and mean.requires_grad:
                gradients = torch.autograd.grad(mean, wanted, allow_unused=True)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    stacked = {name: torch.stack([phi[name].detach() for phi in adapted]) for name in start}
    return Answer(torch.stack(losses).detach(), list(gradients), stacked)
