"""higher's differentiable optimizers: steps of torch.optim as functions of parameters, gradients and settings.

    all       phi <- phi - h d     after   g <- g + λ phi   (not in AdamW and Rprop)
    SGD       b <- μ b + (1 - δ) g, or g in the first step                 d = b, or g + μ b (Nesterov)
    Adam      m <- β₁ m + (1 - β₁) g       v <- β₂ v + (1 - β₂) g²         d = m / b₁ / (√(v / b₂) + eps)
    AdamW     as Adam, after phi <- (1 - h λ) phi                          b₁ = 1 - β₁^step, b₂ = 1 - β₂^step
    RMSprop   v <- α v + (1 - α) g²        a <- α a + (1 - α) g            d = b, b <- μ b + g / (√(v - a²) + eps)
    Adagrad   s <- s + g²                  h' = h / (1 + (step - 1) κ)     d = g / (√s + eps), h' in place of h
    Adadelta  v <- ρ v + (1 - ρ) g²        d = √(u + eps) / √(v + eps) g   u <- ρ u + (1 - ρ) d²
    Adamax    m as in Adam                 u <- max(β₂ u, |g| + eps)       d = m / b₁ / u
    ASGD      phi <- phi (1 - l h')        h' <- h / (1 + l h step)^α      d = g, h' in place of h
    Rprop     s <- η₊ s where g has the sign of the former g; where it has the other one, s <- η₋ s and g <- 0
              phi <- phi - s sign(g)

h is `lr`, λ `weight_decay`, μ `momentum`, δ `dampening`, κ `lr_decay`, l `lambd`. In RMSprop a is zero unless
`centered`.

A setting may be a tensor with a history, given as an `override`. Where the argument of a square root is zero, its
derivative is taken as zero: g and all former ones are zero there, and the derivative of the update with respect to g is
that of its numerator alone. It is exact, and not NaN. Each step is plain PyTorch, parameter by parameter, one product
and one sum at a time in higher's order, so that the numbers are higher's bit by bit: `addcmul` rounds once where a
product and a sum round twice.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from metakern.compat.higher.patch import FunctionalModule
from metakern.compat.modules import gradients, same_device

Override = Mapping[str, Any]  # by a setting's name a list: one value, or one for each parameter group
Grads = list[Tensor | None]
Number = float | Tensor
State = dict[str, Any]


class DifferentiableOptimizer(ABC):
    """Base of the differentiable optimizers, each of which starts from the settings and the state of a torch.optim one.

    A subclass defines `_update(grouped_grads)`: it replaces each `self.param_groups[i]["params"][j]` out of place, by
    means of its gradient `grouped_grads[i][j]`, which may be None, and of the state that it keeps in
    `self.state[i][j]`. `register_optim` makes a subclass known to `get_diff_optim`, whose arguments the constructor
    takes.
    """

    def __init__(
        self,
        other: torch.optim.Optimizer,
        reference_params: Iterable[Tensor],
        fmodel: FunctionalModule | None = None,
        device: torch.device | str | None = None,
        override: Override | None = None,
        grad_callback: Callable[[Sequence[Tensor | None]], Sequence[Tensor | None]] | None = None,
        track_higher_grads: bool = True,
    ) -> None:
        numbers = {id(p): i for i, p in enumerate(reference_params)}
        self.param_groups: list[dict[str, Any]] = []
        self.state: list[defaultdict[int, State]] = []
        self._group_to_param_list: list[list[int]] = []  # by group, its parameters' indices in `reference_params`
        for i, group in enumerate(other.param_groups):
            for p in group["params"]:
                if id(p) not in numbers:
                    raise ValueError(
                        "get_diff_optim: the optimizer's parameters must be among the model's, "
                        f"got one of shape {list(p.shape)} in its group {i} that is not"
                    )
            self._group_to_param_list.append([numbers[id(p)] for p in group["params"]])
            settings = tree_map_only(Tensor, torch.clone, {k: v for k, v in group.items() if k != "params"})
            self.param_groups.append({**settings, "params": [None] * len(group["params"])})
            kept = {j: other.state[p] for j, p in enumerate(group["params"]) if p in other.state}
            copies = tree_map_only(Tensor, lambda t: t.detach().to(device=device, copy=True), kept)
            self.state.append(defaultdict(dict, copies))
        self._fmodel, self._grad_callback, self._track_higher_grads = fmodel, grad_callback, track_higher_grads
        self._apply_override(override or {})

    def _apply_override(self, override: Override) -> None:
        for name, values in override.items():
            if not all(name in group for group in self.param_groups):
                known = sorted(set(self.param_groups[0]) - {"params"})
                raise ValueError(f"override: keys must be settings of the optimizer ({', '.join(known)}), got {name!r}")
            if not isinstance(values, Sequence | Tensor) or (isinstance(values, Tensor) and not values.dim()):
                raise TypeError(
                    f"override: {name} must be a list of one value or of one for each parameter group, "
                    f"got {type(values).__name__}"
                )
            if len(values) not in (1, len(self.param_groups)):
                raise ValueError(
                    f"override: {name} must hold one value or one for each of the {len(self.param_groups)} "
                    f"parameter groups, got {len(values)}"
                )
            for i, group in enumerate(self.param_groups):
                group[name] = values[i if len(values) > 1 else 0]

    def step(
        self,
        loss: Tensor,
        params: Iterable[Tensor] | None = None,
        override: Override | None = None,
        grad_callback: Callable[[Sequence[Tensor | None]], Sequence[Tensor | None]] | None = None,
        **kwargs: Any,
    ) -> list[Tensor]:
        """Takes a step on the loss and returns the new parameters, which the functional model has from then on.

        Args:
            loss: A tensor of one element, computed with the present parameters.
            params: The parameters that the loss depends on, in the order of `reference_params`; by default the
                functional model's.
            override: Settings for this step and all later ones.
            grad_callback: Gets the list of gradients, None where there is none, and returns the one that the update
                uses; by default the callback that the optimizer was made with.
            **kwargs: Passed on to `_update`.

        Returns:
            The new parameters, in the order of `reference_params`.

        Raises:
            TypeError: If `loss` is no tensor, or if an override is no list.
            ValueError: If `loss` has more than one element or no graph, if it depends on none of the parameters that
                the step would change, if none of `params` requires a gradient, if there are no parameters, or if an
                override names no setting or has another length.
            RuntimeError: If the graph of `loss` was freed or has a reentrant checkpoint, or if the model was moved to
                another device.

        >>> import torch
        >>> from metakern.compat import higher
        >>> model = torch.nn.Linear(2, 1)
        >>> with higher.innerloop_ctx(model, torch.optim.SGD(model.parameters(), lr=0.1)) as (fmodel, diffopt):
        ...     [p.shape for p in diffopt.step(fmodel(torch.ones(3, 2)).mean())]
        [torch.Size([1, 2]), torch.Size([1])]
        """
        self._apply_override(override or {})
        fast = None if self._fmodel is None else self._fmodel.fast_params
        if params is None and fast is None:
            raise ValueError("diffopt.step: params must be given if no functional model has parameters, got None")
        phi = list(fast if params is None else params)  # type: ignore[arg-type]
        if self._fmodel is not None:
            for source in self._fmodel._fmodel_source:
                same_device("diffopt.step", source, phi)
        stepped = chain(*self._group_to_param_list)
        grads: Sequence[Tensor | None] = gradients("diffopt.step", loss, phi, self._track_higher_grads, stepped)
        callback = self._grad_callback if grad_callback is None else grad_callback
        if callback is not None:
            grads = callback(grads)
        for group, numbers in zip(self.param_groups, self._group_to_param_list, strict=True):
            group["params"] = [phi[number] for number in numbers]
        self._update([[grads[number] for number in numbers] for numbers in self._group_to_param_list], **kwargs)
        for group, numbers in zip(self.param_groups, self._group_to_param_list, strict=True):
            for number, p in zip(numbers, group["params"], strict=True):
                phi[number] = p if self._track_higher_grads else p.detach().requires_grad_()
        if self._fmodel is not None:
            self._fmodel.update_params(phi)
        return phi

    @abstractmethod
    def _update(self, grouped_grads: list[Grads], **kwargs: Any) -> None: ...


class _Each(DifferentiableOptimizer):
    """Base of the optimizers that update each parameter by itself."""

    def _update(self, grouped_grads: list[Grads], **kwargs: Any) -> None:
        for group, states, grads in zip(self.param_groups, self.state, grouped_grads, strict=True):
            for i, g in enumerate(grads):
                if g is not None:
                    g = -g if group.get("maximize") else g
                    group["params"][i] = self._one(group, states[i], group["params"][i], g)

    def _one(self, group: dict[str, Any], state: State, p: Tensor, g: Tensor) -> Tensor:
        """Returns the parameter after the step, given its gradient `g`; updates `state`."""
        raise NotImplementedError


class DifferentiableSGD(_Each):
    """torch.optim.SGD, differentiable: momentum, dampening, Nesterov's momentum, weight decay."""

    def _one(self, group: dict[str, Any], state: State, p: Tensor, g: Tensor) -> Tensor:
        g, momentum = _decayed(group, p, g), group["momentum"]
        if _on(momentum):
            buffer = state.get("momentum_buffer")
            buffer = g if buffer is None else buffer * momentum + (1 - group["dampening"]) * g
            state["momentum_buffer"] = buffer
            g = g + momentum * buffer if group["nesterov"] else buffer
        return p + -group["lr"] * g


class DifferentiableAdam(_Each):
    """torch.optim.Adam and AdamW, differentiable: betas, eps, weight decay of both kinds, amsgrad."""

    def _one(self, group: dict[str, Any], state: State, p: Tensor, g: Tensor) -> Tensor:
        lr, (beta1, beta2) = group["lr"], group["betas"]
        if group.get("decoupled_weight_decay"):
            p = p * (1 - lr * group["weight_decay"])
        else:
            g = _decayed(group, p, g)
        step = _counted(state, p)
        state["exp_avg"] = m = _mean(state.get("exp_avg"), beta1, g)
        state["exp_avg_sq"] = v = _mean_square(state.get("exp_avg_sq"), beta2, g)
        if group["amsgrad"]:
            former = state.get("max_exp_avg_sq")
            state["max_exp_avg_sq"] = v = torch.maximum(torch.zeros_like(v) if former is None else former, v)
        below = _root(v) / (1 - beta2**step) ** 0.5 + group["eps"]
        return p + -(lr / (1 - beta1**step)) * (m / below)


class DifferentiableAdamW(DifferentiableAdam):
    """torch.optim.AdamW, differentiable."""


class DifferentiableRMSprop(_Each):
    """torch.optim.RMSprop, differentiable: alpha, eps, momentum, centered, weight decay."""

    def _one(self, group: dict[str, Any], state: State, p: Tensor, g: Tensor) -> Tensor:
        g, alpha = _decayed(group, p, g), group["alpha"]
        _counted(state, p)
        state["square_avg"] = v = _mean_square(state.get("square_avg"), alpha, g)
        if group["centered"]:
            state["grad_avg"] = mean = _mean(state.get("grad_avg"), alpha, g)
            v = v - mean * mean
        below = _root(v) + group["eps"]
        if not _on(group["momentum"]):
            return p + -group["lr"] * (g / below)
        former = state.get("momentum_buffer")
        state["momentum_buffer"] = b = g / below if former is None else former * group["momentum"] + g / below
        return p + -group["lr"] * b


class DifferentiableAdagrad(_Each):
    """torch.optim.Adagrad, differentiable: lr_decay, eps, weight decay, the initial value of the accumulator."""

    def _one(self, group: dict[str, Any], state: State, p: Tensor, g: Tensor) -> Tensor:
        g = _decayed(group, p, g)
        step = _counted(state, p)
        state["sum"] = s = state["sum"] + g * g
        return p + -(group["lr"] / (1 + (step - 1) * group["lr_decay"])) * (g / (_root(s) + group["eps"]))


class DifferentiableAdadelta(_Each):
    """torch.optim.Adadelta, differentiable: rho, eps, weight decay."""

    def _one(self, group: dict[str, Any], state: State, p: Tensor, g: Tensor) -> Tensor:
        g, rho, eps = _decayed(group, p, g), group["rho"], group["eps"]
        _counted(state, p)
        state["square_avg"] = v = _mean_square(state.get("square_avg"), rho, g)
        deltas = state.get("acc_delta", torch.zeros_like(p))
        delta = _root(deltas + eps) / _root(v + eps) * g
        state["acc_delta"] = _mean_square(deltas, rho, delta)
        return p + -group["lr"] * delta


class DifferentiableAdamax(_Each):
    """torch.optim.Adamax, differentiable: betas, eps, weight decay. Kinks of max and |.| have PyTorch's derivative."""

    def _one(self, group: dict[str, Any], state: State, p: Tensor, g: Tensor) -> Tensor:
        g, (beta1, beta2) = _decayed(group, p, g), group["betas"]
        step = _counted(state, p)
        state["exp_avg"] = m = _mean(state.get("exp_avg"), beta1, g)
        former, size = state.get("exp_inf"), g.abs() + group["eps"]
        state["exp_inf"] = most = size if former is None else torch.maximum(former * beta2, size)
        return p + -(group["lr"] / (1 - beta1**step)) * (m / most)


class DifferentiableASGD(_Each):
    """torch.optim.ASGD, differentiable: lambd, alpha, t0, weight decay; the state holds the average as `ax`."""

    def _one(self, group: dict[str, Any], state: State, p: Tensor, g: Tensor) -> Tensor:
        g, lr, lambd = _decayed(group, p, g), group["lr"], group["lambd"]
        eta, mu = state.get("eta", lr), float(state.get("mu", 1))
        step = _counted(state, p)
        p = p * (1 - lambd * eta) + -eta * g
        state["ax"] = p if mu == 1 else state["ax"] + (p - state["ax"]) * mu
        state["eta"] = lr / (1 + lambd * lr * step) ** group["alpha"]
        state["mu"] = 1 / max(1, step - group["t0"])
        return p


class DifferentiableRprop(_Each):
    """torch.optim.Rprop, differentiable: etas, step_sizes. The update has derivative zero with respect to the gradient,
    as it depends on its sign alone.
    """

    def _one(self, group: dict[str, Any], state: State, p: Tensor, g: Tensor) -> Tensor:
        (shrink, grow), (least, most) = group["etas"], group["step_sizes"]
        _counted(state, p)
        former, size = state.get("prev"), state.get("step_size")
        size = torch.ones_like(g) * group["lr"] if size is None else size
        agreement = torch.zeros_like(g) if former is None else (g * former).sign()
        factor = torch.where(agreement > 0, grow, torch.where(agreement < 0, shrink, torch.ones_like(g)))
        state["step_size"] = size = torch.clamp(size * factor, least, most)
        state["prev"] = g = torch.where(agreement < 0, torch.zeros_like(g), g)
        return p + -g.sign() * size


def _counted(state: State, p: Tensor) -> Any:
    """Counts the step and returns its number: a tensor if the state has one of p's dtype, in which higher rounds."""
    step = state.get("step", 0)
    state["step"] = step = (step if isinstance(step, Tensor) and step.dtype == p.dtype else int(step)) + 1
    return step


def _on(setting: Number) -> bool:
    """Returns whether a setting has an effect. A tensor always does, as its derivative at zero may be wanted."""
    return isinstance(setting, Tensor) or setting != 0


def _decayed(group: dict[str, Any], p: Tensor, g: Tensor) -> Tensor:
    return g + group["weight_decay"] * p if _on(group["weight_decay"]) else g


def _mean(former: Tensor | None, beta: Number, g: Tensor) -> Tensor:
    """β former + (1 - β) g"""
    return (1 - beta) * g if former is None else former * beta + (1 - beta) * g


def _mean_square(former: Tensor | None, beta: Number, g: Tensor) -> Tensor:
    """β former + (1 - β) g²"""
    square = (1 - beta) * g * g
    return square if former is None else former * beta + square


def _root(v: Tensor) -> Tensor:
    """Returns the square root of v. Below the smallest normal number, or 2^-24 in float16, it is constant."""
    return v.clamp_min(min(torch.finfo(v.dtype).tiny, 2.0**-24)).sqrt()


_opt_mapping: dict[type[torch.optim.Optimizer], type[DifferentiableOptimizer]] = {
    torch.optim.SGD: DifferentiableSGD,
    torch.optim.Adam: DifferentiableAdam,
    torch.optim.AdamW: DifferentiableAdamW,
    torch.optim.RMSprop: DifferentiableRMSprop,
    torch.optim.Adagrad: DifferentiableAdagrad,
    torch.optim.Adadelta: DifferentiableAdadelta,
    torch.optim.Adamax: DifferentiableAdamax,
    torch.optim.ASGD: DifferentiableASGD,
    torch.optim.Rprop: DifferentiableRprop,
}


def register_optim(optim_type: type[torch.optim.Optimizer], diff_optim_type: type[DifferentiableOptimizer]) -> None:
    """Makes `get_diff_optim` and `create_diff_optim` use `diff_optim_type` for optimizers of the class `optim_type`.

    Args:
        optim_type: The class itself; its subclasses are registered separately.
        diff_optim_type: The `DifferentiableOptimizer` that computes the same steps.

    >>> import torch
    >>> from metakern.compat import higher
    >>> class Halved(torch.optim.SGD):
    ...     pass
    >>> class DifferentiableHalved(higher.optim.DifferentiableOptimizer):
    ...     def _update(self, grouped_grads, **kwargs):
    ...         for group, grads in zip(self.param_groups, grouped_grads):
    ...             for i, g in enumerate(grads):
    ...                 group["params"][i] = group["params"][i] - 0.5 * group["lr"] * g
    >>> higher.register_optim(Halved, DifferentiableHalved)
    >>> model = torch.nn.Linear(2, 1)
    >>> type(higher.get_diff_optim(Halved(model.parameters(), lr=0.1), model.parameters())).__name__
    'DifferentiableHalved'
    """
    _opt_mapping[optim_type] = diff_optim_type


def _kind(optim_type: type[torch.optim.Optimizer]) -> type[DifferentiableOptimizer]:
    if optim_type not in _opt_mapping:
        known = ", ".join(kind.__name__ for kind in _opt_mapping)
        raise ValueError(
            f"get_diff_optim: opt must be one of {known}, got {optim_type.__name__}: add it by register_optim"
        )
    return _opt_mapping[optim_type]


def get_diff_optim(
    opt: torch.optim.Optimizer,
    reference_params: Iterable[Tensor],
    fmodel: FunctionalModule | None = None,
    device: torch.device | str | None = None,
    override: Override | None = None,
    track_higher_grads: bool = True,
    **kwargs: Any,
) -> DifferentiableOptimizer:
    """Returns a differentiable optimizer that starts from the settings, parameter groups and state of `opt`.

    Args:
        opt: A torch.optim optimizer of a class that `register_optim` knows. It stays as it is.
        reference_params: The model's parameters. Those that `opt` does not have are not updated.
        fmodel: The functional model whose parameters `step(loss)` differentiates and replaces. Without it, call
            `step(loss, params=...)`.
        device: Where the copied state of `opt` is; by default where it was.
        override: Settings in place of those of `opt`: lists of one value, or of one for each parameter group, by the
            setting's name. A tensor that requires a gradient gets one.
        track_higher_grads: Whether derivatives pass through the steps.
        **kwargs: Passed on to the differentiable optimizer, such as `grad_callback`.

    Returns:
        The `DifferentiableOptimizer`.

    Raises:
        TypeError: If an override is no list.
        ValueError: If the class of `opt` is not registered, if `opt` has a parameter that is not in `reference_params`,
            or if an override names no setting or has another length.

    >>> import torch
    >>> from metakern.compat import higher
    >>> model, lr = torch.nn.Linear(2, 1), torch.tensor(0.1, requires_grad=True)
    >>> fmodel = higher.monkeypatch(model)
    >>> opt = torch.optim.SGD(model.parameters(), lr=1.0, momentum=0.9)
    >>> diffopt = higher.get_diff_optim(opt, model.parameters(), fmodel, override={"lr": [lr]})
    >>> _, bias = diffopt.step(fmodel(torch.ones(3, 2)).mean())
    >>> torch.autograd.grad(bias, lr)
    (tensor(-1.),)
    """
    kind = _kind(type(opt))
    return kind(
        opt, reference_params, fmodel, device=device, override=override, track_higher_grads=track_higher_grads, **kwargs
    )


def create_diff_optim(
    opt_type: type[torch.optim.Optimizer],
    opt_kwargs: Mapping[str, Any] | None = None,
    params: Iterable[Any] | None = None,
    fmodel: FunctionalModule | None = None,
    device: torch.device | str | None = None,
    override: Override | None = None,
    track_higher_grads: bool = True,
    **kwargs: Any,
) -> DifferentiableOptimizer:
    """Returns a differentiable optimizer in the state in which `opt_type(params, **opt_kwargs)` starts.

    Args:
        opt_type: A class of torch.optim that `register_optim` knows.
        opt_kwargs: Its settings; by default the class's own.
        params: Tensors, or parameter groups with tensors, of which only shapes, dtypes and devices are used; by default
            the parameters of `fmodel`.
        fmodel: As for `get_diff_optim`, and so are the arguments after it.

    Returns:
        The `DifferentiableOptimizer`.

    Raises:
        TypeError: If an override is no list.
        ValueError: If neither `params` nor `fmodel` is given, if `opt_type` is not registered, or if an override names
            no setting or has another length.

    >>> import torch
    >>> from metakern.compat import higher
    >>> w = torch.ones(2, requires_grad=True)
    >>> diffopt = higher.create_diff_optim(torch.optim.SGD, {"lr": 0.5}, params=[w])
    >>> (phi,) = diffopt.step(w.square().sum(), params=[w])
    >>> phi.detach()
    tensor([0., 0.])
    """
    if params is None and fmodel is None:
        raise ValueError("create_diff_optim: params or fmodel must be given, got neither")
    kind = _kind(opt_type)
    like = list(fmodel.parameters()) if params is None else list(params)  # type: ignore[union-attr]
    blank = tree_map_only(Tensor, lambda t: torch.zeros_like(t, requires_grad=True), like)
    opt = opt_type(blank, **(opt_kwargs or {}))
    reference = [p for group in opt.param_groups for p in group["params"]]
    return kind(
        opt, reference, fmodel, device=device, override=override, track_higher_grads=track_higher_grads, **kwargs
    )


def get_trainable_opt_params(opt: torch.optim.Optimizer, device: Any = None) -> dict[str, list[Any]]:
    """Returns the numeric settings of `opt` as tensors that require a gradient, to be learned and passed as `override`.

    Args:
        opt: A torch.optim optimizer.
        device: Where the tensors are; by default on the CPU, or where a setting that is a tensor is.

    Returns:
        By a setting's name, a list with a tensor, or a tuple of tensors, for each parameter group.

    >>> import torch
    >>> from metakern.compat import higher
    >>> opt = torch.optim.SGD(torch.nn.Linear(2, 1).parameters(), lr=0.5)
    >>> higher.get_trainable_opt_params(opt)["lr"]
    [tensor(0.5000, requires_grad=True)]
    """

    def learned(value: Any) -> Tensor:
        return torch.as_tensor(value, dtype=torch.get_default_dtype(), device=device).detach().clone().requires_grad_()

    def numeric(value: Any) -> bool:
        return all(isinstance(v, float | int | Tensor) and not isinstance(v, bool) for v in tree_leaves(value))

    names = [k for k, v in opt.param_groups[0].items() if k != "params" and v is not None and numeric(v)]
    return {name: [tree_map(learned, group[name]) for group in opt.param_groups] for name in names}


def apply_trainable_opt_params(opt: torch.optim.Optimizer, override: Override) -> None:
    """Sets the settings of `opt`, in place, to the values of an override that was learned.

    Args:
        opt: A torch.optim optimizer.
        override: As `get_trainable_opt_params` returns it. Numbers in `opt` become numbers, tensors become tensors.

    Raises:
        KeyError: If it names no setting of `opt`.
        ValueError: If a list has neither one value nor one for each parameter group.

    >>> import torch
    >>> from metakern.compat import higher
    >>> opt = torch.optim.SGD(torch.nn.Linear(2, 1).parameters(), lr=0.5)
    >>> higher.apply_trainable_opt_params(opt, {"lr": [torch.tensor(0.25, requires_grad=True)]})
    >>> opt.param_groups[0]["lr"]
    0.25
    """
    for name, values in override.items():
        if name not in opt.param_groups[0]:
            raise KeyError(f"override: {name} is no setting of {type(opt).__name__}")
        if not isinstance(values, Sequence):
            raise ValueError(f"override: {name} must be a list of values, got {type(values).__name__}")
        if len(values) not in (1, len(opt.param_groups)):
            raise ValueError(
                f"override: {name} must hold one value or one for each of the {len(opt.param_groups)} "
                f"parameter groups, got {len(values)}"
            )
        for i, group in enumerate(opt.param_groups):
            learned = values[i if len(values) > 1 else 0]
            if isinstance(group[name], Tensor):
                group[name] = torch.as_tensor(learned).detach().to(group[name])
                continue
            value = tree_map_only(Tensor, lambda t: t.tolist(), learned)
            # A setting that counts something is an int, and stays one if what was learned is a whole number.
            whole = type(group[name]) is int and isinstance(value, float) and value.is_integer()
            group[name] = int(value) if whole else value
