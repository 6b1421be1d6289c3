"""Optimizer updates as ops: an element-wise formula over all parameters and tasks, differentiable in everything.

`formula.py` derives the four rules from `Update.formula`. The cotangent of a hyper-parameter is a sum over all elements
that share it; PyTorch computes that sum on every backend.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from metakern.ops.core import backend, checks, triton_kernels
from metakern.ops.core.autograd import Op
from metakern.ops.core.formula import Generated, Node, in_python, in_torch, program, symbol
from metakern.ops.core.matrices import wide
from metakern.ops.core.rules import Rules, Tensors
from metakern.ops.core.spec import Cost, Make, Sample

Rate = float | Tensor
Hyper = Rate | Sequence[Rate]


@dataclass(frozen=True)
class Update:
    """An op y = formula(*lists, *hyper), computed element by element.

    name: The op's name in error messages.
    lists: Names of the arguments that are lists of a tensor for each parameter. The first one sets the shapes.
    hyper: Names of the hyper-parameters. Each is a number, a tensor [] or [T], or a list with an entry for each
        parameter: a number, a tensor [] or [T], or a tensor of the parameter's shape.
    formula: A function of a `Node` for each list and each hyper-parameter, which returns a node for each output.
    """

    name: str
    lists: tuple[str, ...]
    hyper: tuple[str, ...]
    formula: Callable[..., tuple[Node, ...]]

    @property
    def outputs(self) -> int:
        return _outputs(self)

    def __call__(self, lists: Sequence[Sequence[Tensor]], hyper: Sequence[Hyper]) -> tuple[list[Tensor], ...]:
        """Applies the update and returns its outputs, each a list of tensors shaped like those of the first list.

        Raises TypeError or ValueError, naming the argument, if kinds, dtypes, devices, shapes or lengths do not fit.
        """
        named = dict(zip(self.lists, map(list, lists), strict=True))
        if not any(named.values()):
            return tuple([] for _ in range(self.outputs))
        phi, tasks = checked(self.name, named)
        tensors = [t.unsqueeze(0) if tasks is None else t for values in named.values() for t in values]
        given = [_hyper(self.name, key, h, phi, tasks) for key, h in zip(self.hyper, hyper, strict=True)]
        count, rates = len(phi), tuple(len(h) if isinstance(h, tuple) else 0 for h in given)
        numbers = tuple(None if isinstance(h, tuple) else h for h in given)
        x = (*tensors, *(h for hs in given if isinstance(hs, tuple) for h in hs))
        y = self.op(count, rates)(*x, update=self, count=count, rates=rates, numbers=numbers)
        y = tuple(yi.squeeze(0) for yi in y) if tasks is None else y
        return tuple(list(y[i * count : (i + 1) * count]) for i in range(self.outputs))

    def plain(self, lists: Sequence[Sequence[Tensor]], hyper: Sequence[Hyper]) -> tuple[list[Tensor], ...]:
        """Computes the same in ordinary PyTorch operations, without checks, for autograd and for captured programs."""
        values = [*lists, *(h if isinstance(h, Sequence) else [h] * len(lists[0]) for h in hyper)]
        absent = {len(lists) + i for i, h in enumerate(hyper) if isinstance(h, float) and not h}
        inputs = frozenset(f"x{i}" for i in range(len(values)) if i not in absent)
        made = program(self.formula, len(values), "forward", inputs)
        of_each = zip(*(values[int(name[1:])] for name in made.inputs), strict=True)
        return tuple(map(list, zip(*(in_torch(made)(*x) for x in of_each), strict=True)))

    def op(self, count: int, rates: tuple[int, ...]) -> Op:
        """Returns the op for `count` parameters, with 0, 1 or `count` tensors for each hyper-parameter: `rates`."""
        return _op(self, count, rates)


@cache
def _outputs(update: Update) -> int:
    return len(update.formula(*map(symbol, (*update.lists, *update.hyper))))


@cache
def _op(update: Update, count: int, rates: tuple[int, ...]) -> Op:
    sizes = zip((*update.lists, *update.hyper), ((count,) * len(update.lists)) + rates, strict=True)
    inputs = tuple(f"{name}_{i}" for name, size in sizes for i in range(size))
    return Op(update.name, inputs=inputs, kernels=KERNELS, outputs=count * update.outputs)


def has_kernels(tensor: Tensor) -> bool:
    """Whether an update of tensors like this one runs in a kernel, not in the reference."""
    return backend.choose("update", KERNELS, (tensor,)) is not KERNELS["reference"]


def checked(op: str, lists: dict[str, list[Tensor]]) -> tuple[list[Tensor], torch.Size | None]:
    """Checks the lists; returns the first, and [T] if all of its tensors have the same first size, T, else None."""
    first, *others = lists
    phi = lists[first]
    for name in others:
        _same_number(op, name, lists[name], first, phi)
    checks.floating(op, **{f"{name}[{i}]": value for name in lists for i, value in enumerate(lists[name])})
    for name in others:
        for i, (p, value) in enumerate(zip(phi, lists[name], strict=True)):
            checks.shape(op, f"{name}[{i}]", value, p.shape, f"that of {first}[{i}]")
    tasks = phi[0].shape[:1]
    return phi, None if any(p.dim() == 0 or p.shape[:1] != tasks for p in phi) else tasks


def _same_number(op: str, name: str, values: Sequence[Any], first: str, phi: list[Tensor]) -> None:
    if len(values) != len(phi):
        raise ValueError(
            f"{op}: {name} must have an entry for each of the {len(phi)} tensors of {first}, got {len(values)}"
        )


def _hyper(op: str, name: str, value: Hyper, phi: list[Tensor], tasks: torch.Size | None) -> float | Tensors:
    """Returns a hyper-parameter as a number, a tensor [T] for all parameters, or one for each, [T] or [T, ...]."""
    if isinstance(value, float | int):
        return float(value)
    if isinstance(value, Tensor):
        return (_rate(op, name, value, None, phi[0], tasks),)
    _same_number(op, name, value, "phi", phi)
    if all(isinstance(h, float | int) and h == value[0] for h in value):
        return float(value[0])
    return tuple(
        _rate(op, f"{name}[{i}]", h, p.shape, p, tasks) for i, (h, p) in enumerate(zip(value, phi, strict=True))
    )


def _rate(op: str, name: str, rate: Rate, own: torch.Size | None, phi: Tensor, tasks: torch.Size | None) -> Tensor:
    """Returns a rate as a tensor [T], or [T, ...] if it has a value of its own for each element of phi."""
    if not isinstance(rate, Tensor):
        return phi.new_full(tasks or (1,), rate)
    checks.floating(op, phi=phi, **{name: rate})
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


def rules(run: Callable[[Generated, Mapping[str, Any], Tensors], list[Tensors]], merged: bool) -> Rules:
    """Returns the four rules of all updates, by a function that runs programs of `formula.py`.

    run(program, values, like) returns the program's outputs, each a tuple of a tensor for each parameter. `values` has
    the program's inputs by name: a number, or a tuple of a tensor for each parameter, of the shape of `like` or [T].
    """

    def ran(
        c: SimpleNamespace, rule: str, x: Tensors, wanted: tuple[bool, ...] | None = None, **others: Tensors | None
    ) -> list[Tensors | None]:
        values: dict[str, Any] = dict(_inputs(c, "x", x))
        for letters, tensors in others.items():
            values |= _inputs(c, letters, tensors or ())
        numbers = frozenset(name for name, value in values.items() if isinstance(value, float) and not merged)
        size = len(c.numbers) + len(c.update.lists)
        made = program(c.update.formula, size, rule, frozenset(values), wanted, merged, numbers)
        if made.numbers:
            found = in_python(made.numbers)(*map(values.__getitem__, made.numbers.inputs))
            values |= {f"n{i}": float(number) for i, number in enumerate(found)}
        results = iter(run(made, values, x[: c.count]))
        return [next(results) if given else None for given in made.given]

    def forward(c: SimpleNamespace, x: Tensors) -> tuple[Tensors, Tensors]:
        return _flat(ran(c, "forward", x), x[: c.count]), ()

    def jvp(c: SimpleNamespace, x: Tensors, r: Tensors, t_x: Tensors) -> tuple[Tensors, Tensors]:
        return _flat(ran(c, "jvp", x, t=t_x), x[: c.count]), ()

    def vjp(c: SimpleNamespace, x: Tensors, r: Tensors, ct_y: Tensors) -> Tensors:
        return _summed(c, x, ran(c, "vjp", x, _wanted(c), ct=ct_y))

    def vjp_jvp(
        c: SimpleNamespace,
        x: Tensors,
        r: Tensors,
        t_x: Tensors,
        t_r: Tensors,
        ct_y: Tensors,
        t_ct_y: Tensors | None,
    ) -> Tensors:
        return _summed(c, x, ran(c, "vjp_jvp", x, _wanted(c), t=t_x, ct=ct_y, t_ct=t_ct_y))

    return Rules(forward, jvp, vjp, vjp_jvp)


def _inputs(c: SimpleNamespace, letters: str, flat: Tensors) -> dict[str, Any]:
    """Returns values by their names in programs, without those that are known to be zero."""
    named: dict[str, Any] = {}
    lists = len(flat) // c.count if letters in ("ct", "t_ct") else len(c.update.lists)
    for i, group in enumerate(_groups(c, flat, lists)):
        if group:
            named[f"{letters}{i}"] = group * c.count if len(group) < c.count else group
        elif letters == "x" and c.numbers[i - lists]:
            named[f"x{i}"] = c.numbers[i - lists]
    return named


def _groups(c: SimpleNamespace, flat: Sequence[Any], lists: int) -> list[tuple]:
    """Splits a flat sequence into a tuple for each list, then one for each hyper-parameter."""
    parts, start = [], 0
    for size in ((c.count,) * lists + c.rates) if flat else ():
        parts.append(tuple(flat[start : start + size]))
        start += size
    return parts


def _wanted(c: SimpleNamespace) -> tuple[bool, ...]:
    return tuple(any(group) for group in _groups(c, c.needs, len(c.update.lists)))


def _flat(outputs: list[Tensors | None], like: Tensors) -> Tensors:
    return tuple(y for ys in outputs for y in (ys or map(torch.zeros_like, like)))


def _summed(c: SimpleNamespace, x: Tensors, terms: list[Tensors | None]) -> Tensors:
    """Returns the cotangents of the lists, and those of each hyper-parameter summed over all elements that share it."""
    n = len(c.update.lists)
    found: list[Any] = [t for ts in terms[:n] for t in (ts or (None,) * c.count)]
    for rates, ts in zip(_groups(c, x, n)[n:], terms[n:], strict=True):
        sums: list[Any] = [None] * len(rates)
        for i, term in enumerate(ts or () if rates else ()):
            i %= len(rates)
            term = wide(term)
            term = term if rates[i].dim() == term.dim() else term.flatten(1).sum(1)
            sums[i] = term if sums[i] is None else sums[i] + term
        found += [None if s is None else s.to(h.dtype) for s, h in zip(sums, rates, strict=True)]
    return tuple(found)


def run_torch(made: Generated, values: Mapping[str, Any], like: Tensors) -> list[Tensors]:
    """Runs a program in PyTorch, one parameter after another, so that temporaries stay in the cache and are freed."""
    function, results = in_torch(made), []
    spread = [values[name] if isinstance(values[name], float) else _spread(values[name], like) for name in made.inputs]
    for i, p in enumerate(like):
        x = [a if isinstance(a, float) else wide(a[i]) for a in spread]
        y = function(*x)
        results.append(
            [(yi.clone() if any(yi is a for a in (*x, *y[:k])) else yi).to(p.dtype) for k, yi in enumerate(y)]
        )
    return list(zip(*results, strict=True))


def _spread(values: Tensors, like: Tensors) -> Tensors:
    """Reshapes values to broadcast over their parameters."""
    return tuple(h.view(*h.shape, *(1,) * (p.dim() - h.dim())) for h, p in zip(values, like, strict=True))


KERNELS = {
    "reference": rules(run_torch, merged=True),
    "triton": triton_kernels.rules("update", "core.triton_kernels.foreach"),
}


def flat(f: Callable[..., Any], lists: int) -> Callable[..., Any]:
    """Returns `f` as a function of flat tensors, as in `Sample.args`.

    They are `count` tensors of each list, then the learning rates, then the hyper-parameters named in `learned`.
    """

    def call(*tensors: Tensor, count: int, learned: tuple[str, ...] = (), **options: Any) -> Any:
        given = [tensors[i * count : (i + 1) * count] for i in range(lists)]
        others = len(tensors) - len(learned)
        if "lr" not in options:
            rates = tensors[lists * count : others]
            options["lr"] = rates[0] if len(rates) < count else list(rates)
        return f(*given, **options, **dict(zip(learned, tensors[others:], strict=True)))

    return call


def plain_rates(phi: Sequence[Tensor], lr: Hyper) -> list[Rate]:
    """Returns the rate of each parameter, reshaped to broadcast over it."""

    def spread(h: Rate, p: Tensor) -> Rate:
        return h.view(-1, *(1,) * (p.dim() - 1)) if isinstance(h, Tensor) and h.dim() == 1 and p.dim() > 1 else h

    return [spread(h, p) for h, p in zip(lr if isinstance(lr, Sequence) else [lr] * len(phi), phi, strict=True)]


def plain_root(v: Tensor) -> Tensor:
    """Returns √v, or 0 where v <= 0. Its derivative is 0 where v <= 0."""
    positive = v > 0
    return torch.where(positive, torch.where(positive, v, 1).sqrt(), 0)


def samples(make: Make, lists: int, learned: tuple[str, ...] = (), **options: Any) -> list[Sample]:
    """Returns samples: parameters of several shapes, rates of every kind, and other hyper-parameters for each task."""

    def tensors(*shapes: tuple[int, ...]) -> tuple[Tensor, ...]:
        return tuple(make(*shape) for _ in range(lists) for shape in shapes)

    def sample(name: str, *args: Tensor, count: int = 2, per_task: bool = True, **more: Any) -> Sample:
        return Sample(name, args, {"count": count, **options, **more}, per_task)

    two = tensors((3, 2, 4), (3, 5))
    every = {name: value for name, value in options.items() if name not in learned}
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
        *(
            [
                Sample(
                    "learned",
                    (*two, make(3), *(make(3).sigmoid() for _ in learned)),
                    {"count": 2, "learned": learned, **every},
                )
            ]
            if learned
            else []
        ),
    ]


def benchmark(make: Make, lists: int, **options: Any) -> list[Sample]:
    shapes = [(8, 512, 128), (8, 512)] * 12
    tensors = tuple(make(*shape) for _ in range(lists) for shape in shapes)
    return [Sample("8x24", tensors, {"count": len(shapes), "lr": 0.1, **options})]


def squared(samples: list[Sample], lists: int) -> list[Sample]:
    """Returns the samples with the list at position `lists` squared, as second moments are not negative."""

    def changed(sample: Sample) -> Sample:
        count = sample.kwargs["count"]
        args = (a.square() if lists * count <= i < (lists + 1) * count else a for i, a in enumerate(sample.args))
        return replace(sample, args=tuple(args))

    return [changed(sample) for sample in samples]


def cost(flop: tuple[float, ...], tensors: tuple[float, ...]) -> Callable[[Sample, int], Cost]:
    """Returns `Spec.cost` from the operations, and the tensors read and written, for each element at each order."""

    def of(sample: Sample, order: int) -> Cost:
        n = sum(t.numel() for t in sample.args[: sample.kwargs["count"]])
        return Cost(flop=flop[order] * n, bytes=tensors[order] * n * sample.args[0].element_size())

    return of


def some(samples: list[Sample], *names: str, prefix: str = "") -> list[Sample]:
    """Returns the samples of these names, with `prefix` put before their names."""
    return [replace(sample, name=f"{prefix}{sample.name}") for sample in samples if sample.name in names]


SOME = (
    "number",
    "rate-per-task",
    "no-tasks-in-common",
    "empty",
    "learned",
)  # the samples of sgd_update have rates of all kinds
