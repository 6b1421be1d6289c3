"""What the inner updates share: arguments that are lists of tensors, and learning rates of every kind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from metakern.ops import _checks
from metakern.ops._rules import Tensors
from metakern.ops._spec import Make, Sample
from metakern.ops._tensors import wide

Rate = float | Tensor


class Arguments(NamedTuple):
    """tensors: those of each list after the other, tasks first; rates: none, one [T], or one for each parameter."""

    tensors: Tensors
    rates: Tensors
    lr: float | None  # the rate that is a number
    tasks_added: bool  # the tensors got a dimension of one task, which the results lose again

    def restored(self, y: Sequence[Tensor]) -> list[Tensor]:
        return [yi.squeeze(0) for yi in y] if self.tasks_added else list(y)


def arguments(op: str, lr: Rate | Sequence[Rate], **lists: list[Tensor]) -> Arguments:
    """Checks lists of tensors, of which the first one sets the shapes, and their rates."""
    first, *others = lists
    phi = lists[first]
    for name in others:
        _same_number(op, name, lists[name], first, phi)
    _checks.floating(op, **{f"{name}[{i}]": value for name in lists for i, value in enumerate(lists[name])})
    for name in others:
        for i, (p, value) in enumerate(zip(phi, lists[name], strict=True)):
            _checks.shape(op, f"{name}[{i}]", value, p.shape, f"that of {first}[{i}]")
    tasks: torch.Size | None = phi[0].shape[:1]
    if any(p.dim() == 0 or p.shape[:1] != tasks for p in phi):
        tasks = None
    tensors = tuple(t.unsqueeze(0) if tasks is None else t for name in lists for t in lists[name])
    if isinstance(lr, float | int):
        return Arguments(tensors, (), lr, tasks is None)
    if isinstance(lr, Tensor):
        return Arguments(tensors, (_rate(op, "lr", lr, None, phi[0], tasks),), None, tasks is None)
    _same_number(op, "lr", lr, first, phi)
    rates = (_rate(op, f"lr[{i}]", h, p.shape, p, tasks) for i, (h, p) in enumerate(zip(lr, phi, strict=True)))
    return Arguments(tensors, tuple(rates), None, tasks is None)


def _same_number(op: str, name: str, values: Sequence[Any], first: str, phi: list[Tensor]) -> None:
    if len(values) != len(phi):
        raise ValueError(f"{op}: {name} must have an entry for each of {first}'s {len(phi)}, got {len(values)}")


def _rate(op: str, name: str, rate: Rate, own: torch.Size | None, phi: Tensor, tasks: torch.Size | None) -> Tensor:
    """A rate as the rules want it: [T], or [T, ...] where it has its own value for each element of phi."""
    if not isinstance(rate, Tensor):
        return phi.new_full(tasks or (1,), rate)
    _checks.floating(op, phi=phi, **{name: rate})
    if rate.dim() == 0:
        return rate.expand(tasks or (1,))
    if rate.shape == own:
        return rate.unsqueeze(0) if tasks is None else rate
    if rate.shape != tasks:
        allowed = [
            "[]",
            *([] if tasks is None else [f"[T] = {list(tasks)}"]),
            *([] if own is None else [str(list(own))]),
        ]
        raise ValueError(f"{op}: {name} must have shape {' or '.join(allowed)}, got {list(rate.shape)}")
    return rate


def each_rate(rates: Tensors, lr: float | None, count: int) -> Tensors:
    """A rate for each parameter, from one for all or one each, or the number."""
    return (lr,) * count if not rates else rates * count if len(rates) < count else rates


def spread(rates: Tensors, like: Tensors) -> Tensors:
    """Rates that broadcast over their parameters."""
    return tuple(
        h.view(*h.shape, *(1,) * (p.dim() - h.dim())) if isinstance(h, Tensor) else h
        for h, p in zip(rates, like, strict=True)
    )


def rate_cotangents(rates: Tensors, terms: Tensors) -> Tensors:
    """The terms [T, ...] of each parameter, added up over all that a rate is shared by."""
    sums: list[Any] = [None] * len(rates)
    for i, term in enumerate(terms):
        i %= len(rates)
        term = wide(term)
        term = term if rates[i].dim() == term.dim() else term.flatten(1).sum(1)
        sums[i] = term if sums[i] is None else sums[i] + term
    return tuple(s.to(h.dtype) for s, h in zip(sums, rates, strict=True))


def flat(f: Callable[..., Any], lists: int) -> Callable[..., Any]:
    """`f` for tensors in a row, as shared tests draw them: `count` of each list, then the rates."""

    def call(*tensors: Tensor, count: int, lr: float | None = None, **options: Any) -> Any:
        given, rates = [tensors[i * count : (i + 1) * count] for i in range(lists)], tensors[lists * count :]
        return f(*given, lr if lr is not None else rates[0] if len(rates) < count else rates, **options)

    return call


def plain_rates(phi: Sequence[Tensor], lr: Rate | Sequence[Rate]) -> list[Rate]:
    """A rate that broadcasts over each parameter."""

    def spread(h: Rate, p: Tensor) -> Rate:
        return h.view(-1, *(1,) * (p.dim() - 1)) if isinstance(h, Tensor) and h.dim() == 1 and p.dim() > 1 else h

    return [spread(h, p) for h, p in zip(lr if isinstance(lr, Sequence) else [lr] * len(phi), phi, strict=True)]


def samples(make: Make, lists: int, **options: Any) -> list[Sample]:
    """Parameters of several shapes, with rates of every kind."""

    def tensors(*shapes: tuple[int, ...]) -> tuple[Tensor, ...]:
        return tuple(make(*shape) for _ in range(lists) for shape in shapes)

    def sample(name: str, *args: Tensor, count: int = 2, per_task: bool = True, **more: Any) -> Sample:
        return Sample(name, args, {"count": count, **options, **more}, per_task)

    two = tensors((3, 2, 4), (3, 5))
    return [
        sample("number", *two, lr=0.3),
        sample("one-rate", *two, make(), per_task=False),
        sample("rate-per-task", *two, make(3)),
        sample("rates-per-parameter", *two, make(3), make(3)),
        sample("rate-per-element", *two, make(3, 2, 4), make(3, 5)),
        sample("mixed-rates", *two, make(), make(3, 5), per_task=False),
        sample("no-tasks-in-common", *tensors((2, 3), (), (4,)), make(), count=3, per_task=False),
        sample("own-shapes", *tensors((2, 3), ()), make(2, 3), make(), per_task=False),
        sample("empty", *tensors((2, 0), (2, 3)), make(2)),
    ]


def benchmark(make: Make, lists: int, **options: Any) -> list[Sample]:
    shapes = [(8, 512, 128), (8, 512)] * 12
    tensors = tuple(make(*shape) for _ in range(lists) for shape in shapes)
    return [Sample("8x24", tensors, {"count": len(shapes), "lr": 0.1, **options})]
