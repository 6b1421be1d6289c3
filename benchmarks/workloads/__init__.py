"""The workloads of the meta-gradient benchmarks, each a name: `family[:size][,key=value...]`.

A family is a TOML file of this folder; mlp.toml explains its keys. `gpt:large` is the size large of the family gpt,
`gpt` is its size medium, and `gpt,length=1024,tasks=1` changes some keys of that size. Weights and data are drawn from
one seed, and every method gets the same ones.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.problem import Problem
from benchmarks.workloads.models import KINDS, cross_entropy

tomllib = import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
FOLDER = Path(__file__).parent
FAMILIES = ("mlp", "rnn", "gru", "lstm", "gpt", "llama-lora", "llm-full")  # the order of the tables; others follow
SIZES = ("small", "medium", "large", "tiny")
ABOUT = {"title", "model", "lr"}


def families() -> list[str]:
    found = sorted(path.stem for path in FOLDER.glob("*.toml"))
    return sorted(found, key=lambda name: FAMILIES.index(name) if name in FAMILIES else len(FAMILIES))


@cache
def family(name: str) -> dict[str, Any]:
    """Return the content of a family's file; raise ValueError if it is unknown, or its keys are wrong."""
    if name not in families():
        raise ValueError(f"workloads: family must be one of {', '.join(families())}, got {name!r}")
    found = tomllib.loads((FOLDER / f"{name}.toml").read_text())

    def check(what: str, keys: Any, known: set[str]) -> None:
        for state, wrong in (("unknown", set(keys) - known), ("missing", known - set(keys))):
            if wrong:
                raise ValueError(f"{name}.toml: {what} must be {', '.join(sorted(known))}, got {min(wrong)!r} {state}")

    check("keys", found, ABOUT | {*SIZES, "sweep"})
    if found["model"] not in KINDS:
        raise ValueError(f"{name}.toml: model must be one of {', '.join(KINDS)}, got {found['model']!r}")
    known = KINDS[found["model"]].sizes
    for size in SIZES:
        check(f"sizes of {size}", found[size], known)
    check("sizes of sweep", {*found["sweep"], *known}, known)
    return found


@dataclass(frozen=True)
class WorkloadName:
    """The name of a workload, in parts."""

    family: str
    size: str
    changes: dict[str, Any]

    @classmethod
    def parse(cls, name: str) -> WorkloadName:
        """Parse a name; raise ValueError, which lists the known ones, for a wrong family, size, key or value.

        >>> WorkloadName.parse("gpt,length=1024").name
        'gpt:medium,length=1024'
        """
        head, *changes = name.split(",")
        kind, _, size = head.partition(":")
        about = family(kind)
        size = size or "medium"
        if size not in SIZES:
            raise ValueError(f"workloads: size of {kind} must be one of {', '.join(SIZES)}, got {size!r}")
        values = {}
        for change in changes:
            key, _, value = change.partition("=")
            if key not in about[size]:
                raise ValueError(f"workloads: key of {kind} must be one of {', '.join(about[size])}, got {key!r}")
            values[key] = _value(key, value, about[size][key])
        return cls(kind, size, values)

    @property
    def name(self) -> str:
        words = {key: "+".join(map(str, v)) if isinstance(v, list) else v for key, v in self.changes.items()}
        return ",".join((f"{self.family}:{self.size}", *(f"{key}={word}" for key, word in words.items())))

    @property
    def sizes(self) -> dict[str, Any]:
        return family(self.family)[self.size] | self.changes

    @property
    def title(self) -> str:
        words = {key: "-".join(map(str, v)) if isinstance(v, list) else v for key, v in self.sizes.items()}
        return family(self.family)["title"].format(**words)

    def changed(self, **changes: Any) -> WorkloadName:
        return replace(self, changes=self.changes | changes)

    def sweep(self, key: str) -> list[WorkloadName]:
        """Return this workload at each value of `key` that its family has for sweeps; empty if it has none."""
        return [self.changed(**{key: value}) for value in family(self.family)["sweep"].get(key, ())]


def _value(key: str, text: str, like: Any) -> Any:
    """Parse a value of the kind that the file has: a positive integer, a word, or a list of these separated by +."""
    if isinstance(like, list):
        return [_value(key, part, like[0]) for part in text.split("+")]
    if isinstance(like, str) and text:
        return text
    if not (text.isdecimal() and int(text) > 0):
        raise ValueError(f"workloads: {key} must be a positive integer, got {text!r}")
    return int(text)


@dataclass(frozen=True)
class Workload:
    """What is measured: one exact second-order meta-gradient, through `steps` inner steps of SGD with the rate `lr`.

    `loss(model, batch)` is the loss of one task. The model's parameters that require a gradient are adapted and
    meta-learned; the others are frozen.
    """

    model: nn.Module
    loss: Callable[[Any, Any], Tensor]
    support: tuple[Tensor, ...]
    query: tuple[Tensor, ...]
    steps: int
    lr: float

    @property
    def tasks(self) -> int:
        return len(self.support[0])

    @property
    def theta(self) -> dict[str, Tensor]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def double(self) -> Workload:
        """Return the workload in float64."""
        support, query = (
            tuple(a.double() if a.is_floating_point() else a for a in batch) for batch in (self.support, self.query)
        )
        return replace(self, model=copy.deepcopy(self.model).double(), support=support, query=query)

    def flop(self, order: int = 2) -> float:
        """Return the FLOP of the matrix products of one meta-gradient, for all tasks.

        They are counted in one forward pass, and multiplied by

        | | product with a learned weight | product with a frozen weight |
        |---|---|---|
        | exact second order | 9K + 3 | 4K + 2 |
        | first order | 3K + 3 | 2K + 2 |

        Attention counts as without a causal mask. In float64 PyTorch's counter sees the products of recurrent layers.
        """
        exact, frozen = self.double(), 0.0

        def count(module: nn.Linear, args: tuple[Tensor], y: Tensor) -> None:
            nonlocal frozen
            frozen += 2 * y.numel() * module.in_features

        for module in exact.model.modules():
            if isinstance(module, nn.Linear) and not module.weight.requires_grad:
                module.register_forward_hook(count)
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            exact.loss(exact.model, tuple(a[0] for a in exact.support))
        learning = counter.get_total_flops() - frozen
        K = self.steps
        passes = (9 * K + 3, 4 * K + 2) if order == 2 else (3 * K + 3, 2 * K + 2)
        return (passes[0] * learning + passes[1] * frozen) * self.tasks

    def problem(self, name: str, **truth: dict[str, Tensor]) -> Problem:
        """Return the workload as arrays; `truth` gives the fields truth and first of `Problem`."""
        parameters = {key: p.detach().numpy() for key, p in self.model.named_parameters()}
        theta = {key: parameters.pop(key) for key in self.theta}
        support, query = (tuple(a.numpy() for a in batch) for batch in (self.support, self.query))
        exact = {part: {key: g.numpy() for key, g in gradient.items()} for part, gradient in truth.items()}
        spec = WorkloadName.parse(name)
        settings = {"model": family(spec.family)["model"], "lr": self.lr, **spec.sizes, "K": self.steps}
        return Problem(spec.name, theta, parameters, support, query, **exact, settings=settings)


def make(name: str) -> Workload:
    spec = WorkloadName.parse(name)
    about = family(spec.family)
    torch.manual_seed(0)
    model, support, query = KINDS[about["model"]].make(spec.sizes)
    return Workload(model, cross_entropy, support, query, spec.sizes["K"], about["lr"])


def of(problem: Problem) -> Workload:
    """Return the workload of a problem, with the problem's weights and data."""
    work = make(problem.name)
    stored = problem.theta | problem.frozen
    work.model.load_state_dict({name: torch.from_numpy(p) for name, p in stored.items()})
    support, query = (tuple(map(torch.from_numpy, batch)) for batch in (problem.support, problem.query))
    return replace(work, support=support, query=query)
