"""The report of `metakern.doctor`: its findings, and a page of plain text that shows them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from textwrap import wrap
from typing import Any

from metakern.meta.plan import Plan, mib

WIDTH = 100
LOSS = "(loss)"  # in place of a module's path
FORWARD_MODE = "forward-mode rule"


@dataclass(frozen=True)
class Problem:
    """One place at which autograd's derivatives are not those of the loss.

    Attributes:
        path: The module's name; "" for the model itself, "(loss)" for the loss.
        op: The autograd Function, the operation or the line of code.
        kind: The kind of problem, such as "opaque backward", "stop-gradient" or "no second derivative".
        why: The cause, a sentence.
        cure: What to do, a sentence.
        order: 2 if the gradient is right and its derivative is wrong; 1 if the gradient itself is not the slope of the
            loss, even if that is intended, as in a straight-through estimator.
        cost: The relative error of the meta-gradient that all problems of this op and kind cause by themselves; None
            if it can't be measured.
        undo: The lines of code without which the problem disappears; for the measurement of costs.

    >>> import metakern as mk
    >>> mk.diagnosis.Problem("head", "NumpyCube", "opaque backward", "it runs NumPy", "write it in PyTorch").order
    2
    """

    path: str
    op: str
    kind: str
    why: str
    cure: str
    order: int = 2
    cost: float | None = None
    undo: frozenset[Any] = field(default=frozenset(), repr=False)


@dataclass(frozen=True)
class Report:
    """The findings of `metakern.doctor`; `print(report)` shows all of them.

    `error`, `first_order_error` and `kept` are None if there is no meta-gradient, or nothing to compare it with: a
    surrogate gradient has no true one. If there are other problems beside it, the three measure those alone.

    Attributes:
        exact: Whether no problem was found.
        problems: The problems, one for each place.
        obstacles: Why `mk.MAML` has no faster plan; if `plan` is None, why it refuses the model.
        plan: The plan that `mk.MAML` makes; None if it refuses the model.
        error: The relative error of autograd's meta-gradient, compared with one by finite differences.
        first_order_error: The relative error of the first-order meta-gradient.
        kept: The fraction of the second-order terms that autograd's meta-gradient has, 1 if it has all.
        steps: The number of inner steps.
        tasks: The number of tasks in the batches.
        dtype: The dtype of the computation: "float64", or "float32" for a model that runs in no other.
        peak_bytes: The expected peak memory of a meta-gradient of all tasks by this plan, in bytes, beside the model.
        evaluations: The number of forward passes of one task, or of parts of the model, that the diagnosis took.

    >>> import torch, metakern as mk
    >>> x, y = torch.randn(5, 10, 8), torch.randint(4, (5, 10))
    >>> report = mk.doctor(torch.nn.Linear(8, 4), mk.losses.classification, (x, y), (x, y))
    >>> report.exact, report.dtype, report.error < 1e-6
    (True, 'float64', True)
    """

    problems: Sequence[Problem]
    obstacles: Sequence[str]
    plan: Plan | None
    error: float | None
    first_order_error: float | None
    kept: float | None
    steps: int
    tasks: int
    dtype: str
    peak_bytes: int
    evaluations: int

    @property
    def exact(self) -> bool:
        return not self.problems

    def __str__(self) -> str:
        lines = [self._verdict(), ""]
        groups: dict[Any, list[Problem]] = defaultdict(list)
        for problem in self.problems:
            groups[(problem.op, problem.kind, problem.why, problem.cure, problem.cost)].append(problem)
        for number, ((op, kind, why, cure, cost), group) in enumerate(groups.items(), 1):
            lines += [f"{number}  {kind}: {op}", *_row("where", _paths(group)), *_row("why", why), *_row("cure", cure)]
            lines += [*_row("costs", _share(cost, kind)), ""]
        lines.append(f"Meta-gradient of {_count(self.steps, 'inner step')}, one task, {self.dtype}")
        if self.error is None:
            lines += _row("error", f"not measured: {self._unmeasured()}")
        else:
            surrogate = any(problem.order == 1 and not problem.undo for problem in self.problems)
            of = "one in which all but the surrogate is repaired" if surrogate else "the exact one, by differences"
            lines += _row("error", f"{self.error:.1e}, relative to {of}")
            lines += _row("first order", f"{self.first_order_error:.1e}, if second-order terms were left out")
            if self.kept is not None and (self.exact or self._lost):
                lines += _row("kept", f"{100 * self.kept:.0f} % of the second-order part")
        lines += ["", f"Plan of mk.MAML for {_count(self.tasks, 'task')}"]
        if self.plan is None:
            lines += _row("none", "mk.MAML refuses this model:")
        else:
            mode = f", products {self.plan.hvp} over reverse" if self.plan.strategy == "recompute" else ""
            lines += _row("batching", self.plan.batching) + _row("strategy", self.plan.strategy + mode)
            lines += _row("at once", _count(min(self.plan.task_chunk, self.tasks), "task"))
            lines += _row("memory", f"{mib(self.peak_bytes)} at the peak, in addition to the model")
        for obstacle in self.obstacles:
            lines += _row("slower" if self.plan else "why", obstacle)
        return "\n".join(
            [*lines, "", f"The diagnosis took {self.evaluations} forward passes of one task or its parts."]
        )

    def _unmeasured(self) -> str:
        if self.plan is None:
            return "mk.MAML does not run this model"
        if any(problem.order == 1 and not problem.undo for problem in self.problems):
            return "a surrogate gradient has no exact one"
        return "it is zero, or computing it raised" if self.steps else "there is no inner step"

    def _verdict(self) -> str:
        if self.exact:
            return "The meta-gradient is exact."
        text = f"The meta-gradient is NOT exact: {_count(len(self.problems), 'place')}"
        if all(problem.kind == FORWARD_MODE for problem in self.problems):
            return f"{text}, in forward mode only. Reverse over reverse, which mk.MAML will use, it is exact."
        if not self._lost:
            return f"{text}, where the gradient is not the slope of the loss; no second-order terms are lost."
        return f"{text}, second-order terms are lost at {self._lost}."

    @property
    def _lost(self) -> int:
        """The number of places at which second-order terms are lost."""
        return sum(problem.order == 2 for problem in self.problems)


def _row(name: str, text: str) -> list[str]:
    first, *rest = wrap(" ".join(text.split()), WIDTH - 15, break_on_hyphens=False) or [""]
    return [f"   {name:<12}{first}", *(" " * 15 + line for line in rest)]


def _paths(group: list[Problem]) -> str:
    paths = list(dict.fromkeys("the loss" if p.path == LOSS else p.path or "the model itself" for p in group))
    shown = ", ".join(paths[:4])
    return shown if len(paths) <= 4 else f"{shown} and {len(paths) - 4} more"


def _share(cost: float | None, kind: str) -> str:
    if kind == FORWARD_MODE:
        kept = "nothing reverse over reverse"
        return kept if cost is None else f"{kept}, an error of {100 * cost:.2g} % forward over reverse"
    if cost is not None:
        return f"an error of {100 * cost:.2g} % of the meta-gradient"
    return "all of it: there is no meta-gradient" if kind.startswith("no ") else "not measured"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
