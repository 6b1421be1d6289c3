"""The base classes of inner optimizers: differentiable maps from parameters, gradients and state to the next ones."""

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
Values = float | Tensor | list[Tensor]  # a number, a tensor for all parameters, or a tensor for each parameter
PER = ("all", "parameter", "element")


class InnerOptimizer(nn.Module):
    """The base of inner optimizers: phi_{k+1}, s_{k+1} = update(phi_k, g_k, s_k).

    Every tensor of phi and g is `[T, *shape]`, a parameter of T tasks. An optimizer is a module, so that the outer loop
    can learn its hyper-parameters: each `nn.Parameter` of it gets its exact gradient. A subclass defines `update`, and
    `init` if it has a state. It sets `affine` if its update is affine in (phi, g, state), so that the VJP of the update
    depends on none of them. It sets `combines` if it returns linear combinations of phi, the gradient and the state,
    whose coefficients are the same for all elements of a parameter; they may depend on the norms of whole gradients,
    and then it sets `takes_norms` too. It sets `takes_losses` if its update reads the support losses, which then are
    the fourth argument of `update`.

    Raises:
        TypeError: For an option that the class does not have; the error names the most similar one.

    >>> import metakern as mk, torch
    >>> class Descent(mk.optim.InnerOptimizer):
    ...     def update(self, phi, grads, state):
    ...         return [p - 0.1 * g for p, g in zip(phi, grads)], state
    >>> Descent().update([torch.zeros(2)], [torch.ones(2)], ())
    ([tensor([-0.1000, -0.1000])], ())
    """

    affine = False
    combines = False
    takes_norms = False
    takes_losses = False

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        signature = inspect.signature(cls.__init__)  # which help() and the documentation would take from __new__
        cls.__signature__ = signature.replace(parameters=list(signature.parameters.values())[1:])  # type: ignore[attr-defined]

    def __new__(cls, *args: Any, **options: Any) -> Any:
        """Raises TypeError for an option that the class does not have, and names the most similar one."""
        parameters = inspect.signature(cls.__init__).parameters
        if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            for name in options.keys() - parameters.keys():
                near = get_close_matches(name, parameters.keys() - {"self"}, 1, 0.5)
                known = f"did you mean {near[0]}?" if near else f"it has {', '.join(list(parameters)[1:])}"
                raise TypeError(f"{cls.__name__}: {name} is not one of its arguments: {known}")
        return super().__new__(cls)

    def __setattr__(self, name: str, value: Any) -> None:
        """Sets an attribute; a number that is set for a fixed hyper-parameter becomes its value from now on."""
        hyper = self.__dict__.get("_modules", {}).get(name)
        if isinstance(hyper, Hyper) and not isinstance(value, nn.Module):
            number(type(self).__name__, name, value)
            if hyper.learn:
                raise ValueError(f"{hyper.title} is learned: change its parameters under torch.no_grad() instead")
            hyper.initial = float(value)
        else:
            super().__setattr__(name, value)

    def prepare(self, adapted: Mapping[str, nn.Parameter]) -> None:
        """Prepares the next updates for these parameters, for optimizers with values for each parameter.

        MAML calls it when it is constructed and for every batch. The parameters are others after layers were frozen or
        unfrozen; values that were learned for a name must be kept.

        Args:
            adapted: The adapted parameters by name, in the order of phi, without the tasks.
        """

    def init(self, phi: Tensors) -> State:
        """Returns the state before the first step.

        Args:
            phi: The parameters of all tasks, [T, ...] each.

        Returns:
            A flat tuple of tensors; empty for an optimizer without a state.
        """
        return ()

    def update(self, phi: Tensors, grads: Tensors, state: State, *losses: Tensor) -> tuple[list[Tensor], State]:
        """Takes one step, with differentiable operations.

        Args:
            phi: The parameters of all tasks, [T, ...] each.
            grads: The gradients of the support losses, shaped like `phi`.
            state: The state after the last step, or of `init`.
            losses: One tensor [T], the support losses at `phi`, if the optimizer has `takes_losses`; otherwise none.

        Returns:
            (parameters, state) after the step, in the same forms.

        Raises:
            NotImplementedError: In the base class.
        """
        raise NotImplementedError

    def hyper_parameters(self) -> list[nn.Parameter]:
        """Returns the hyper-parameters that the outer loop learns.

        Values of model parameters that are not adapted at present are left out.
        """
        idle = {id(p) for module in self.modules() if isinstance(module, Hyper) for p in module.idle()}
        return [p for p in self.parameters() if p.requires_grad and id(p) not in idle]


class Stepwise(InnerOptimizer):
    """An inner optimizer with named hyper-parameters, state tensors shaped like the parameters, and a count of steps.

    A subclass defines the initial values of its state tensors (`fills`), whether it counts its steps (`counts`), and a
    `step` for parameters of one dtype and device.

    Args:
        hyper: The hyper-parameters by name, with their values or initial values.
        learn: The name, or names, of the hyper-parameters that the outer loop learns.
        learn_lr: Whether to learn lr, as with "lr" in `learn`.
        per: Whether a learned hyper-parameter has one value for "all" parameters, one for each "parameter" (tensor), or
            one for each "element".
        steps: K for separate learned values in each of the first K inner steps, the last of which also serve all later
            steps (Antoniou et al. 2019, "How to train your MAML", section 4); None for the same values in all steps.

    Raises:
        ValueError: For an unknown name in `learn`, another `per`, or `steps` that is no integer of at least 1.
        TypeError: For a `learn` that holds no names, or a learn_lr that is no bool.
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
            raise TypeError(f"{own}: learn_lr must be True or False, got {learn_lr!r}: give the initial rate as lr")
        if not isinstance(learn, Iterable):
            raise TypeError(f"{own}: learn must hold names of hyper-parameters, got {learn!r}")
        if per not in PER:
            raise ValueError(f"{own}: per must be 'all', 'parameter' or 'element', got {per!r}")
        if steps is not None and (not isinstance(steps, int) or isinstance(steps, bool) or steps < 1):
            raise ValueError(f"{own}: steps must be None or an integer of at least 1, got {steps!r}")
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
        """The initial value of each state tensor that a parameter has."""
        return ()

    def step(self, count: int, phi: list[Tensor], grads: list[Tensor], *state: list[Tensor], **hyper: Values) -> Any:
        """Takes step number `count` (the first is 1); returns the parameters and each list of the state after it."""
        raise NotImplementedError

    def prepare(self, adapted: Mapping[str, nn.Parameter]) -> None:
        for name in self.names:
            getattr(self, name).prepare(adapted)

    def init(self, phi: Tensors) -> State:
        """Returns the state tensors, for all parameters in turn, then the number of steps taken if it is counted.

        The number is a float64 scalar on the CPU.
        """
        tensors = tuple(torch.full_like(p, fill) for fill in self.fills for p in phi)
        return (*tensors, torch.zeros((), dtype=torch.float64, device="cpu")) if self.counts else tensors

    def update(self, phi: Tensors, grads: Tensors, state: State, *losses: Tensor) -> tuple[list[Tensor], State]:
        n, counted = len(phi), (state[-1] + 1,) if self.counts else ()
        number = known(counted[0]) if counted else 1
        lists = [phi, grads, *(state[i * n : (i + 1) * n] for i in range(len(self.fills)))]
        results: list[list[Any]] = [[None] * n for _ in lists[1:]]
        for places in alike(phi):
            hyper = {name: getattr(self, name).of(phi, places, int(number)) for name in self.names}
            made = self.step(int(number), *([values[i] for i in places] for values in lists), **hyper)
            for result, values in zip(results, made, strict=True):
                for i, value in zip(places, values, strict=True):
                    result[i] = value
        return results[0], (*(tensor for result in results[1:] for tensor in result), *counted)


def alike(phi: Tensors) -> list[list[int]]:
    """Returns the indices in phi, grouped by dtype and device."""
    groups: dict[Any, list[int]] = {}
    for i, p in enumerate(phi):
        groups.setdefault((p.dtype, p.device), []).append(i)
    return list(groups.values())


def norms(x: Tensors) -> Tensor:
    """Returns the norm over all tensors x for each task, [T], on the device of the first tensor."""
    parts = [ops.global_norm([x[i] for i in places]) for places in alike(x)]
    return parts[0] if len(parts) == 1 else ops.global_norm([part.to(wide(x[0])) for part in parts])


def scaled(x: Tensors, s: Tensor) -> list[Tensor]:
    """Returns each tensor of x times s [T], task by task."""
    found: list[Any] = [None] * len(x)
    for places in alike(x):
        for i, y in zip(places, ops.scale([x[i] for i in places], s.to(x[places[0]])), strict=True):
            found[i] = y
    return found


class Hyper(nn.Module):
    """A hyper-parameter: one fixed number, or learned in one of the ways of `Stepwise`.

    Learned values are plain numbers, not logarithms, so that the outer loop can make a rate zero or negative (Li et al.
    2017, "Meta-SGD", section 3). Values of model parameters are kept by the names of these, so that each keeps its own
    when layers are frozen or reordered. `title` names the hyper-parameter in errors.
    """

    def __init__(self, title: str, value: float, learn: bool = False, per: str = "all", steps: int | None = None):
        super().__init__()
        self.title, self.initial, self.learn, self.per, self.steps = title, float(value), learn, per, steps
        self.bound: tuple[str, ...] = ()  # the names of the parameters in phi, in order
        if learn and per == "all":
            self.value = nn.Parameter(torch.full(self._steps, self.initial))
        elif learn:
            self.values = ByName(title)

    def extra_repr(self) -> str:
        steps = "" if self.steps is None else f", one value for each of {self.steps} steps"
        return f"{self.initial}, learned, per={self.per!r}{steps}" if self.learn else f"{self.initial}"

    @property
    def _steps(self) -> tuple[int, ...]:
        return () if self.steps is None else (self.steps,)

    @property
    def absent(self) -> bool:
        """Whether it is zero and not learned."""
        return not self.learn and not self.initial

    def prepare(self, adapted: Mapping[str, nn.Parameter]) -> None:
        """Creates values for parameters that have none yet. Raises ValueError if a name now has another shape."""
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
        """Returns the values of parameters that are not adapted at present."""
        if not self.learn or self.per == "all" or len(self.bound) == len(self.values):
            return []
        return [value for name, value in self.values.items() if name not in self.bound]

    def of(self, phi: Tensors, places: Sequence[int], count: int) -> Values:
        """Returns its value in step `count` for the parameters phi[i], i in `places`, as the update ops take it."""
        if not self.learn:
            return self.initial
        now = -1 if self.steps is None else min(count, self.steps) - 1
        if self.per == "all":
            return (self.value if self.steps is None else self.value[now]).to(phi[places[0]])
        if len(phi) != len(self.bound):
            raise ValueError(
                f"{self.title} must have values for the {len(phi)} parameters of phi, got {len(self.bound)}: call "
                "prepare({name: parameter}) with them before update()"
            )
        own = [self.values[self.bound[i]] for i in places]
        values = own if self.steps is None else [value[now] for value in own]
        return [v.expand_as(phi[i]) if v.dim() else v for v, i in zip(values, places, strict=True)]


class ByName(nn.Module):
    """A mapping from names to parameters.

    PyTorch does not allow dots in the names of parameters, so that "0.weight" is registered as "0:weight". A state dict
    with a list of values instead of names, as version 0.1 wrote it, is loaded if number and shapes agree.
    """

    def __init__(self, title: str) -> None:
        super().__init__()
        self.title = title

    def __setitem__(self, name: str, value: nn.Parameter) -> None:
        self._parameters[_registered(name)] = value  # `register_parameter` refuses the names of this class's methods

    def __getitem__(self, name: str) -> nn.Parameter:
        found = self._parameters.get(_registered(name))
        if found is None:
            raise KeyError(f"{self.title} must be indexed by one of {', '.join(self)}, got {name!r}")
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
        """Renames listed values "0", "1", … in a state dict to the names of the parameters here, in the same order."""
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
    """Raises TypeError unless `value` is a real number, ValueError unless it is finite.

    A tensor is refused because it would not be learned, which a user may expect.
    """
    if isinstance(value, Tensor):
        raise TypeError(
            f"{optimizer}: {name} must be a number, got a tensor: to learn it, give a number and a learn option"
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
    """Returns a tuple of `values`. Raises TypeError unless they are `count` numbers, ValueError if any isn't finite."""
    if isinstance(values, str | Tensor) or not isinstance(values, Sequence) or len(values) != count:
        raise TypeError(f"{optimizer}: {name} must be {count} numbers, got {values!r}")
    for value in values:
        number(optimizer, name, value)
    return tuple(values)
