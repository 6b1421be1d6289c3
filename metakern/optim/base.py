"""What an inner optimizer is: a differentiable map from parameters, gradients and state to the next ones."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from functools import cache
from math import isfinite
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from metakern import ops
from metakern.native.record import known
from metakern.ops.core.matrices import wide

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

    def __new__(cls, *args: Any, **options: Any) -> Any:
        """Refuses an option that the optimizer has not, and says which one may be meant."""
        parameters = inspect.signature(cls.__init__).parameters
        if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            for name in options.keys() - parameters.keys():
                near = get_close_matches(name, parameters.keys() - {"self"}, 1, 0.5)
                known = f"did you mean {near[0]}?" if near else f"it has {', '.join(list(parameters)[1:])}"
                raise TypeError(f"{cls.__name__}: {name} is not one of its arguments: {known}")
        return super().__new__(cls)

    def prepare(self, adapted: Mapping[str, nn.Parameter]) -> None:
        """Says which parameters the next updates are of, in the order of phi; for hyper-parameters of their own.

        Called before every unroll, with other parameters after some were frozen or unfrozen: what was learned for a
        name must be kept.
        """

    def init(self, phi: Tensors) -> State:
        """The state before the first step, a flat tuple of tensors."""
        return ()

    def update(self, phi: Tensors, grads: Tensors, state: State) -> tuple[list[Tensor], State]:
        """One step, of differentiable operations."""
        raise NotImplementedError

    def hyper_parameters(self) -> list[nn.Parameter]:
        """Those that the outer loop learns, without those of parameters that are not adapted at present."""
        idle = {id(p) for module in self.modules() if isinstance(module, Hyper) for p in module.idle()}
        return [p for p in self.parameters() if p.requires_grad and id(p) not in idle]


class Stepwise(InnerOptimizer):
    """An optimizer of named hyper-parameters, which keeps tensors like the parameters and may count its steps.

    A subclass says what these tensors begin as (`fills`) and makes one `step` of parameters of one dtype and device.

    learn: the names of learned hyper-parameters; learn_lr: "lr" is one. per: each has one value for "all" parameters,
    for each "parameter" (tensor), or for each "element". steps: it has such values for each of the first so many inner
    steps, of which the last ones stay (Antoniou et al. 2019, "How to train your MAML", section 4).
    """

    counts = False
    lr: Hyper

    def __init__(
        self,
        hyper: Mapping[str, float],
        learn: str | Iterable[str] = (),
        learn_lr: bool = False,
        per: str = "all",
        steps: int | None = None,
    ) -> None:
        super().__init__()
        own = type(self).__name__
        if not isinstance(learn_lr, bool):
            raise TypeError(f"{own}: learn_lr must be True or False, got {learn_lr!r}: lr is where it starts")
        if not isinstance(learn, Iterable):
            raise TypeError(f"{own}: learn must hold names of hyper-parameters, got {learn!r}")
        if per not in PER:
            raise ValueError(f"{own}: per must be 'all', 'parameter' or 'element', got {per!r}")
        if steps is not None and (not isinstance(steps, int) or isinstance(steps, bool) or steps < 1):
            raise ValueError(f"{own}: steps must be None or at least 1, got {steps!r}")
        learned = {learn} if isinstance(learn, str) else set(learn)
        for name in sorted(learned - hyper.keys(), key=repr):
            raise ValueError(f"{own}: learn must name some of {', '.join(hyper)}, got {name!r}")
        learned |= {"lr"} if learn_lr else set()
        self.names = tuple(hyper)
        for name, value in hyper.items():
            setattr(self, name, Hyper(f"{own}: {name}", value, name in learned, per, steps))
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
        return (*tensors, torch.zeros((), dtype=torch.float64, device="cpu")) if self.counts else tensors

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
    """A hyper-parameter: one fixed number, or learned, as `Stepwise` says; `title` names it in errors.

    Learned ones are plain numbers, not logarithms, so that the outer loop may turn a direction off or around
    (Li et al. 2017, "Meta-SGD", section 3). Those of parameters are kept by the parameters' names: freezing a layer, or
    another order of layers, gives no parameter what its neighbour has learned.
    """

    def __init__(self, title: str, value: float, learn: bool = False, per: str = "all", steps: int | None = None):
        super().__init__()
        self.title, self.initial, self.learn, self.per, self.steps = title, float(value), learn, per, steps
        self.bound: tuple[str, ...] = ()  # the names of the parameters that phi is of
        if learn and per == "all":
            self.value = nn.Parameter(torch.full(self._steps, self.initial))
        elif learn:
            self.values = ByName(title)

    @property
    def _steps(self) -> tuple[int, ...]:
        return () if self.steps is None else (self.steps,)

    @property
    def absent(self) -> bool:
        """Whether it is zero, and stays so."""
        return not self.learn and not self.initial

    def prepare(self, adapted: Mapping[str, nn.Parameter]) -> None:
        """Makes values for parameters that have none yet. Raises ValueError where a name now has another shape."""
        if not self.learn or self.per == "all":
            return
        for name, p in adapted.items():
            shape = (*self._steps, *(p.shape if self.per == "element" else ()))
            if name not in self.values:
                self.values[name] = nn.Parameter(torch.full(shape, self.initial, dtype=p.dtype, device=p.device))
            elif self.values[name].shape != shape:
                own = list(self.values[name].shape[len(self._steps) :])
                raise ValueError(
                    f"{self.title} must be learned for parameters of one model, got {name!r} of shape {list(p.shape)} "
                    f"where it has values of shape {own}: give each model an optimizer of its own"
                )
        self.bound = tuple(adapted)

    def idle(self) -> list[nn.Parameter]:
        """The values of parameters that are not adapted at present."""
        if not self.learn or self.per == "all" or len(self.bound) == len(self.values):
            return []
        return [value for name, value in self.values.items() if name not in self.bound]

    def of(self, phi: Tensors, places: Sequence[int], count: int) -> Values:
        """What it is in step `count` for the parameters in these places, as `metakern.ops`' updates take it."""
        if not self.learn:
            return self.initial
        now = -1 if self.steps is None else min(count, self.steps) - 1
        if self.per == "all":
            return (self.value if self.steps is None else self.value[now]).to(phi[places[0]])
        if len(phi) != len(self.bound):
            raise ValueError(
                f"{self.title} must have values for the {len(phi)} parameters of phi, got {len(self.bound)}: call "
                "prepare({name: parameter}) with them before"
            )
        own = [self.values[self.bound[i]] for i in places]
        values = own if self.steps is None else [value[now] for value in own]
        return [v.expand_as(phi[i]) if v.dim() else v for v, i in zip(values, places, strict=True)]


class ByName(nn.Module):
    """Parameters by names that may hold dots, which PyTorch keeps for modules: "0.weight" is registered as "0:weight".

    Loads a state dict in the form of a list, as version 0.1 wrote it, where numbers and shapes are the same.
    """

    def __init__(self, title: str) -> None:
        super().__init__()
        self.title = title

    def __setitem__(self, name: str, value: nn.Parameter) -> None:
        self._parameters[_registered(name)] = value  # `register_parameter` refuses the names of this class's methods

    def __getitem__(self, name: str) -> nn.Parameter:
        found = self._parameters.get(_registered(name))
        if found is None:
            raise KeyError(f"{self.title} must be asked for one of {', '.join(self)}, got {name!r}")
        return found

    def __contains__(self, name: str) -> bool:
        return _registered(name) in self._parameters

    def __iter__(self) -> Iterator[str]:
        return map(_name, self._parameters)

    def __len__(self) -> int:
        return len(self._parameters)

    def items(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, self[name]) for name in self)

    def name_list(self, tensors: dict[str, Tensor], prefix: str) -> None:
        """Gives the values of a list, "0", "1", …, the names of the parameters here, which have the same order."""
        listed = [key for key in tensors if key.startswith(prefix) and key[len(prefix) :].isdecimal()]
        if not listed or any(key.removeprefix(prefix) in self._parameters for key in listed):
            return
        given = [tensors[f"{prefix}{i}"].shape for i in range(len(listed))]
        own = [value.shape for value in self._parameters.values() if value is not None]
        if given != own:
            raise ValueError(
                f"{self.title} must be loaded for the {len(own)} parameters here, got {len(given)} values without "
                f"names{', of other shapes' * (len(own) == len(given))}: adapt what was adapted when they were saved"
            )
        for i, key in enumerate(self._parameters):
            tensors[f"{prefix}{key}"] = tensors.pop(f"{prefix}{i}")

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        self.name_list(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)


@cache
def _registered(name: str) -> str:
    return name.replace("%", "%25").replace(":", "%3A").replace(".", ":")


def _name(registered: str) -> str:
    return registered.replace(":", ".").replace("%3A", ":").replace("%25", "%")


def number(optimizer: str, name: str, value: Any) -> None:
    """A finite number, and no tensor, of which nothing would be learned."""
    if isinstance(value, Tensor):
        raise TypeError(
            f"{optimizer}: {name} must be a number, got a tensor: learn={name!r} learns it from a number on"
        )
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{optimizer}: {name} must be a number, got {value!r}")
    if not isfinite(value):
        raise ValueError(f"{optimizer}: {name} must be finite, got {value}")


def non_negative(optimizer: str, **values: float) -> None:
    for name, value in values.items():
        number(optimizer, name, value)
        if value < 0:
            raise ValueError(f"{optimizer}: {name} must be at least 0, got {value}")


def positive(optimizer: str, **values: float) -> None:
    for name, value in values.items():
        number(optimizer, name, value)
        if value <= 0:
            raise ValueError(f"{optimizer}: {name} must be positive, got {value}")


def fraction(optimizer: str, **values: float) -> None:
    for name, value in values.items():
        number(optimizer, name, value)
        if not 0 <= value < 1:
            raise ValueError(f"{optimizer}: {name} must be in [0, 1), got {value}")


def numbers(optimizer: str, name: str, values: Any, count: int) -> tuple[float, ...]:
    """So many numbers, as a tuple."""
    if isinstance(values, str | Tensor) or not isinstance(values, Sequence) or len(values) != count:
        raise TypeError(f"{optimizer}: {name} must be {count} numbers, got {values!r}")
    for value in values:
        number(optimizer, name, value)
    return tuple(values)
