"""What an inner optimizer is: a differentiable map from parameters, gradients and state to the next ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor, nn

from metakern import ops
from metakern._record import known
from metakern.ops._tensors import wide

Tensors = Sequence[Tensor]
State = tuple[Tensor, ...]
Values = float | Tensor | list[Tensor]  # a number, a tensor for all parameters, or one for each
PER = ("all", "parameter", "element")


class InnerOptimizer(nn.Module):
    """phi_{k+1}, s_{k+1} = update(phi_k, g_k, s_k), with every tensor `[T, *shape]`: a parameter for each task.

    A module, because its hyper-parameters may be learned in the outer loop: what is an `nn.Parameter` of it gets its
    exact gradient. `affine` says that the update is affine in (phi, g, state), so that its pullback needs none of them.
    """

    affine = False

    def prepare(self, adapted: Mapping[str, nn.Parameter]) -> None:
        """Called once with the adapted parameters, for hyper-parameters that are shaped by them."""

    def init(self, phi: Tensors) -> State:
        """The state before the first step, a flat tuple of tensors."""
        return ()

    def update(self, phi: Tensors, grads: Tensors, state: State) -> tuple[list[Tensor], State]:
        """One step, of differentiable operations."""
        raise NotImplementedError

    def hyper_parameters(self) -> list[nn.Parameter]:
        """Those that the outer loop learns."""
        return [p for p in self.parameters() if p.requires_grad]


class Learning(TypedDict, total=False):
    """What is learned of an optimizer.

    learn: the names of learned hyper-parameters; learn_lr: "lr" is one. per: each has one value for "all" parameters,
    for each "parameter" (tensor), or for each "element". steps: it has such values for each of the first so many inner
    steps, of which the last ones stay (Antoniou et al. 2019, "How to train your MAML", section 4).
    """

    learn: Iterable[str]
    learn_lr: bool
    per: str
    steps: int | None


class Stepwise(InnerOptimizer):
    """An optimizer of named hyper-parameters, which keeps tensors like the parameters and may count its steps.

    A subclass says what these tensors begin as (`fills`) and makes one `step` of parameters of one dtype and device.
    """

    counts = False
    lr: Hyper

    def __init__(self, hyper: Mapping[str, float], learning: Learning) -> None:
        super().__init__()
        learn, steps = learning.get("learn", ()), learning.get("steps")
        learned = {learn} if isinstance(learn, str) else set(learn)
        for name in sorted(learned - hyper.keys()):
            names = ", ".join(hyper)
            raise ValueError(f"{type(self).__name__}: learn must name some of {names}, got {name!r}")
        learned |= {"lr"} if learning.get("learn_lr") else set()
        self.names = tuple(hyper)
        for name, value in hyper.items():
            setattr(self, name, Hyper(value, name in learned, learning.get("per", "all"), steps))
        self.counts = self.counts or (steps is not None and bool(learned))

    @property
    def fills(self) -> tuple[float, ...]:
        """What its tensors for a parameter are filled with at first."""
        return ()

    def step(self, count: int, phi: list[Tensor], grads: list[Tensor], *state: list[Tensor], **hyper: Values) -> Any:
        """Step number `count` (the first is 1): the parameters, and the next one of each tensor of the state."""
        raise NotImplementedError

    def prepare(self, adapted: Mapping[str, nn.Parameter]) -> None:
        for name in self.names:
            getattr(self, name).prepare(adapted)

    def init(self, phi: Tensors) -> State:
        """The tensors, each for all parameters, and the number of steps taken, in float64, where it is counted."""
        tensors = tuple(torch.full_like(p, fill) for fill in self.fills for p in phi)
        return (*tensors, torch.zeros((), dtype=torch.float64)) if self.counts else tensors

    def update(self, phi: Tensors, grads: Tensors, state: State) -> tuple[list[Tensor], State]:
        n, counted = len(phi), (state[-1] + 1,) if self.counts else ()
        number = known(counted[0]) if counted else 1
        lists = [phi, grads, *(state[i * n : (i + 1) * n] for i in range(len(self.fills)))]
        results: list[list[Any]] = [[None] * n for _ in lists[1:]]
        for places in _alike(phi):
            hyper = {name: getattr(self, name).of(phi, places, int(number)) for name in self.names}
            made = self.step(int(number), *([values[i] for i in places] for values in lists), **hyper)
            for result, values in zip(results, made, strict=True):
                for i, value in zip(places, values, strict=True):
                    result[i] = value
        return results[0], (*(tensor for result in results[1:] for tensor in result), *counted)


def _alike(phi: Tensors) -> list[list[int]]:
    """The places of tensors of one dtype and device."""
    groups: dict[Any, list[int]] = {}
    for i, p in enumerate(phi):
        groups.setdefault((p.dtype, p.device), []).append(i)
    return list(groups.values())


def norms(x: Tensors) -> Tensor:
    """Of each task over all tensors, [T], on the first one's device."""
    parts = [ops.global_norm([x[i] for i in places]) for places in _alike(x)]
    return parts[0] if len(parts) == 1 else ops.global_norm([part.to(wide(x[0])) for part in parts])


def scaled(x: Tensors, s: Tensor) -> list[Tensor]:
    """Each tensor times its task's value of s [T]."""
    found: list[Any] = [None] * len(x)
    for places in _alike(x):
        for i, y in zip(places, ops.scale([x[i] for i in places], s.to(x[places[0]])), strict=True):
            found[i] = y
    return found


class Hyper(nn.Module):
    """A hyper-parameter: one fixed number, or learned, as `Learning` says.

    Learned ones are plain numbers, not logarithms, so that the outer loop may turn a direction off or around
    (Li et al. 2017, "Meta-SGD", section 3).
    """

    def __init__(self, value: float, learn: bool = False, per: str = "all", steps: int | None = None) -> None:
        super().__init__()
        if per not in PER:
            raise ValueError(f"learning rate: per must be 'all', 'parameter' or 'element', got {per!r}")
        if steps is not None and not (isinstance(steps, int) and steps >= 1):
            raise ValueError(f"learning rate: steps must be None or at least 1, got {steps!r}")
        self.initial, self.learn, self.per, self.steps = float(value), learn, per, steps
        if learn and per == "all":
            self.value = nn.Parameter(torch.full(self._steps, self.initial))

    @property
    def _steps(self) -> tuple[int, ...]:
        return () if self.steps is None else (self.steps,)

    @property
    def absent(self) -> bool:
        """Whether it is zero, and stays so."""
        return not self.learn and not self.initial

    def prepare(self, adapted: Mapping[str, nn.Parameter]) -> None:
        if self.learn and self.per != "all" and not hasattr(self, "values"):
            shapes = (p.shape if self.per == "element" else () for p in adapted.values())
            self.values = nn.ParameterList(
                torch.full((*self._steps, *shape), self.initial, dtype=p.dtype, device=p.device)
                for shape, p in zip(shapes, adapted.values(), strict=True)
            )

    def of(self, phi: Tensors, places: Sequence[int], count: int) -> Values:
        """What it is in step `count` for the parameters in these places, as `metakern.ops`' updates take it."""
        if not self.learn:
            return self.initial
        now = -1 if self.steps is None else min(count, self.steps) - 1
        if self.per == "all":
            return (self.value if self.steps is None else self.value[now]).to(phi[places[0]])
        values = [self.values[i] if self.steps is None else self.values[i][now] for i in places]
        return [v.expand_as(phi[i]) if v.dim() else v for v, i in zip(values, places, strict=True)]


def non_negative(optimizer: str, **values: float) -> None:
    for name, value in values.items():
        if not value >= 0:
            raise ValueError(f"{optimizer}: {name} must be at least 0, got {value}")


def positive(optimizer: str, **values: float) -> None:
    for name, value in values.items():
        if not value > 0:
            raise ValueError(f"{optimizer}: {name} must be positive, got {value}")


def fraction(optimizer: str, **values: float) -> None:
    for name, value in values.items():
        if not 0 <= value < 1:
            raise ValueError(f"{optimizer}: {name} must be in [0, 1), got {value}")
