"""What the doctor says: a page of plain text, and the facts behind it."""

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
    """One place where the meta-gradient is not the derivative of the meta-loss.

    path: of the module, "" for the model itself, "(loss)" for the loss. op: the Function, operation or line. order: 2
    where the gradient is right and its derivative is not; 1 where the gradient itself is not the slope of the loss, be
    it by intent. cost: the relative error of the meta-gradient that is due to this kind of problem alone, None where it
    can't be had.
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
    """The doctor's findings; `print(report)` shows all of them.

    exact: no problem was found. error: relative, of the exact meta-gradient as autograd computes it, against float64
    differences; first_order_error: of the first-order one; kept: the part of the second-order terms that is there.
    They are None where there is no meta-gradient, or no reference (a surrogate gradient has none; beside one, they are
    those of the other problems). obstacles: what
    prevents a faster plan. plan: what `mk.MAML` would do, None where it refuses. peak_bytes: the memory expected for
    all tasks. evaluations: forward passes of one task that the diagnosis took.
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
            of = (
                "what it would be with all but the surrogate repaired" if surrogate else "the exact one, by differences"
            )
            lines += _row("error", f"{self.error:.1e} of {of}")
            lines += _row("first order", f"{self.first_order_error:.1e}, if the second order were left out")
            if self.kept is not None and (self.exact or self._lost):
                lines += _row("kept", f"{100 * self.kept:.0f} % of the second-order part")
        lines += ["", f"Plan of mk.MAML for {_count(self.tasks, 'task')}"]
        if self.plan is None:
            lines += _row("none", "it refuses this model:")
        else:
            mode = f", products {self.plan.hvp} over reverse" if self.plan.strategy == "recompute" else ""
            lines += _row("batching", self.plan.batching) + _row("strategy", self.plan.strategy + mode)
            lines += _row("at once", _count(min(self.plan.task_chunk, self.tasks), "task"))
            lines += _row("memory", f"{mib(self.peak_bytes)} at its peak, beside the model")
        for obstacle in self.obstacles:
            lines += _row("slower" if self.plan else "why", obstacle)
        return "\n".join([*lines, "", f"{self.evaluations} forward passes of one task were looked at."])

    def _unmeasured(self) -> str:
        if self.plan is None:
            return "mk.MAML does not run this model"
        return "there is nothing exact beside a surrogate gradient" if self.problems else "it has no second-order part"

    def _verdict(self) -> str:
        if self.exact:
            return "The meta-gradient is exact."
        text = f"The meta-gradient is NOT exact: {_count(len(self.problems), 'place')}"
        if all(problem.kind == FORWARD_MODE for problem in self.problems):
            return f"{text}, in forward mode; reverse over reverse, which mk.MAML will take, is."
        if not self._lost:
            return f"{text}, where the gradient is not the slope of the loss; no curvature is lost."
        return f"{text}, second-order terms are lost at {self._lost}."

    @property
    def _lost(self) -> int:
        """The places where second-order terms are."""
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
