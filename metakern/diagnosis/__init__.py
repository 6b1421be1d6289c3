"""Find out whether a meta-gradient is exact; if not, find every place that loses second-order terms, why, at what cost.

Numbers decide: autograd's first and second derivatives are compared with finite differences, in float64 where the model
allows it, at points near the model's parameters (`metakern.meta.slopes`). The loss is judged first. If it is not exact,
the modules that it calls are judged, each by itself, and so on down to the deepest ones that are not exact (`places`).
The code is looked at only to name the cause (`causes`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from metakern.diagnosis.causes import explain
from metakern.diagnosis.costs import Costs, distance, repairable
from metakern.diagnosis.places import Call, Patient, Place, treat
from metakern.diagnosis.report import FORWARD_MODE, Problem, Report
from metakern.meta.batches import select, tasks_of
from metakern.meta.batching import Loss
from metakern.meta.parameters import Adapt, Parameters
from metakern.meta.plan import Plan, Planner, Wishes
from metakern.meta.slopes import Verdict, norm
from metakern.meta.state import undisturbed
from metakern.optim import SGD, InnerOptimizer

__all__ = ["Problem", "Report", "doctor"]


def doctor(
    model: nn.Module,
    loss: Loss,
    support: Any,
    query: Any,
    *,
    inner: InnerOptimizer | None = None,
    steps: int = 1,
    adapt: Adapt = None,
) -> Report:
    """Checks whether the meta-gradient is exact; if not, finds where second-order terms are lost, why, at what cost.

    Derivatives are computed as MAML does, with PyTorch's twice differentiable kernels, and compared with finite
    differences. Lost terms below 1e-6 of the second order can't be seen; in a model that only runs in float32, below a
    few percent. Dropout counts as the identity. The model, its gradients and buffers, and the random states stay as
    they are.

    It takes some tens of gradients of one task if all is exact. Else it also takes some hundreds of gradients of parts
    of the model; modules that are alike are checked once.

    Args:
        model: Any module, as for `mk.MAML`.
        loss: `loss(model, batch)` is the loss of one task, a scalar.
        support: A batch with the tasks along dimension 0. Only the first task is checked.
        query: A batch of the same tasks.
        inner: The inner optimizer; by default `mk.optim.SGD()`.
        steps: The number of inner steps.
        adapt: Which parameters the inner loop changes, as for `mk.MAML`.

    Returns:
        A `metakern.diagnosis.Report` with `exact`, `problems`, `plan` and more; print it.

    Raises:
        TypeError: If `model` is no `nn.Module`, `loss` can't be called, or `inner` is no inner optimizer.
        ValueError: If there is nothing to check: the loss raises on the first task, is no finite scalar, does not
            depend on the model's parameters, or differs from call to call; the model has no trainable parameters; the
            batches have no tasks, or different numbers of them; `steps` is negative; or `adapt` matches no parameter.

    >>> import torch, metakern as mk
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))
    >>> x, y = torch.randn(5, 10, 8), torch.randint(4, (5, 10))
    >>> report = mk.doctor(model, mk.losses.classification, (x, y), (x, y), steps=3)
    >>> report.exact, report.problems, report.plan.batching
    (True, [], 'fold')
    """
    inner = SGD() if inner is None else inner
    tasks = _checked(model, loss, support, query, inner, steps, adapt)
    with _undisturbed(model), torch.enable_grad():
        patient = treat(model, loss, select(support, 0), select(query, 0), adapt)
        diagnosis = _Diagnosis(patient)
        problems = diagnosis.problems()
        patient.batch, patient.second_order = patient.query, False
        known = {known for p in problems for known in (p.path, p.op)}
        problems += [p for p in _Diagnosis(patient).problems() if known.isdisjoint((p.path, p.op))]
        plan, obstacles = _planned(model, loss, support, steps, adapt)
        if plan and plan.hvp == "reverse" and diagnosis.raising:
            obstacles.append(f"no forward mode in {', '.join(path or 'the model' for path in diagnosis.raising)}")
        error = first_order_error = kept = None
        if plan and steps:  # MAML's inner loop runs this model
            problems, (error, first_order_error, kept) = _measured(Costs(patient, inner, steps), problems)
    return Report(
        problems,
        obstacles,
        plan,
        error,
        first_order_error,
        kept,
        steps,
        tasks,
        str(patient.dtype).removeprefix("torch."),
        _peak(plan, Parameters(model, adapt), steps, tasks),
        patient.evaluations,
    )


class _Diagnosis:
    """Searches the tree of calls for the deepest places that are not exact."""

    def __init__(self, patient: Patient) -> None:
        self.patient = patient
        self.known: dict[Any, list[Problem]] = {}  # by a call's signature
        self.raising: list[str] = []  # the deepest modules whose forward mode raises, one of each kind

    def problems(self) -> list[Problem]:
        """Returns all problems of the loss for the patient's batch."""
        root = Place(self.patient, self.patient.root)
        verdict = root.judge()
        if verdict.exact and not isinstance(verdict.forward, Exception):
            return []
        try:
            call = self.patient.calls()
        except Exception:  # modules whose calls can't be recorded are judged as part of the loss
            call = self.patient.root
        return list({(p.path, p.op, p.kind): p for p in self._found(call, verdict)}.values())

    def _within(self, call: Call) -> list[Problem]:
        """Returns the problems of a call, which are searched for once among calls that are alike."""
        key = call.signature
        if key not in self.known:
            self.known[key] = [replace(p, path=p.path.removeprefix(call.path)) for p in self._found(call)]
        return [replace(p, path=(call.path + p.path).strip(".")) for p in self.known[key]]

    def _found(self, call: Call, verdict: Verdict | None = None) -> list[Problem]:
        """Returns the problems of the calls within a call, and its own if it is not exact without those."""
        place = Place(self.patient, call)
        verdict = place.judge() if verdict is None else verdict
        raising = isinstance(verdict.forward, Exception)
        if (verdict.exact and not raising) or (isinstance(verdict.first, Exception) and not _runs(place)):
            return []
        before = len(self.raising)
        found = [problem for child in call.children for problem in self._within(child)]
        if raising and len(self.raising) == before:
            self.raising.append(call.path)
        if verdict.exact:  # forward mode raised for the whole call: within it, it may be wrong without an error
            return [problem for problem in found if problem.kind == FORWARD_MODE]
        if found:
            bad = [self.patient.model.get_submodule(p.path) for p in found]
            place = Place(self.patient, call, cut=bad)
            verdict = place.judge()
            if verdict.exact or not _runs(place):
                return found
        return found + explain(self.patient, place, verdict)


def _runs(place: Place) -> bool:
    """Returns whether a call can be run again by itself; one that can't is judged as part of its caller."""
    try:
        with place.scalar(place.z):
            return True
    except Exception:
        return False


def _measured(costs: Costs, problems: list[Problem]) -> tuple[list[Problem], tuple[float | None, ...]]:
    """Returns the problems, each with the cost of its kind; and `error`, `first_order_error` and `kept` of the report.

    The three are None if there is no meta-gradient, or nothing to compare it with.
    """
    nothing = problems, (None, None, None)
    measurable = [p for p in problems if p.order == 2 or p.undo]
    try:
        if len(measurable) == len(problems):
            truth = costs.truth([p for p in problems if p.undo])
        elif measurable:  # a surrogate gradient has no true one: only the other problems are repaired for comparison
            truth = costs.store([p for p in measurable if repairable(p)])
        else:
            return nothing
        first, found = costs.store(first_order=True), costs.store()
    except Exception:  # there is no meta-gradient
        return nothing
    size = norm(truth)
    if not size:
        return nothing

    def cost(kind: tuple[str, str]) -> float | None:
        others = [p for p in measurable if (p.op, p.kind) != kind]
        if len(others) == len(measurable) or not all(map(repairable, others)):
            return None
        try:
            alone = costs.forward_over_reverse() if kind[1] == FORWARD_MODE else costs.store(others)
        except Exception:  # a repaired module may raise
            return None
        return distance(alone, truth) / size

    by_kind = {kind: cost(kind) for kind in {(p.op, p.kind) for p in problems}}
    problems = [replace(p, cost=by_kind[p.op, p.kind]) for p in problems]
    second, kept = [t - f for t, f in zip(truth, first, strict=True)], None
    if norm(second) > 1e-6 * size:
        there = [a - f for a, f in zip(found, first, strict=True)]
        kept = sum((a * b).sum().item() for a, b in zip(there, second, strict=True)) / norm(second) ** 2
    return problems, (distance(found, truth) / size, distance(first, truth) / size, kept)


def _planned(model: nn.Module, loss: Loss, support: Any, steps: int, adapt: Adapt) -> tuple[Plan | None, list[str]]:
    """Returns MAML's plan and the reasons why there is no faster one; or None and the reasons why there is no plan."""
    try:
        plan = Planner(Parameters(model, adapt), loss, Wishes()).plan([support], steps, False, slopes=False).plan
    except Exception as error:
        return None, [" ".join(line.replace("MismatchError: ", "").split()) for line in str(error).splitlines()]
    reasons = [reason.replace("MismatchError: ", "") for reason in plan.reasons]
    return plan, [r for r in reasons if "not possible" in r or "for want of" in r or "does not fit" in r]


def _peak(plan: Plan | None, parameters: Parameters, steps: int, tasks: int) -> int:
    """Returns the expected peak memory, in bytes, of the tasks that run at once.

    It is estimated from the bytes that one backward pass saves: the graphs of all steps for the strategy "store", one
    Hessian-vector product for "recompute".
    """
    if plan is None:
        return 0
    copies, saved = sum(p.numel() * p.element_size() for p in parameters.adapted.values()), plan.activation_bytes
    if plan.strategy == "store":
        task = steps * (2 * saved + copies) + saved + 3 * copies
    else:
        task = 5 * saved // 2 + (steps + 6) * copies
    return min(plan.task_chunk, tasks) * task


def _checked(model: Any, loss: Any, support: Any, query: Any, inner: Any, steps: Any, adapt: Adapt) -> int:
    if not isinstance(model, nn.Module):
        raise TypeError(f"doctor: model must be an nn.Module, got {type(model).__name__}")
    if not callable(loss):
        raise TypeError(f"doctor: loss must be a function of (model, batch), got {type(loss).__name__}")
    if not isinstance(inner, InnerOptimizer):
        raise TypeError(f"doctor: inner must be one of mk.optim's, got {type(inner).__name__}")
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 0:
        raise ValueError(f"doctor: steps must be an integer of at least 0, got {steps!r}")
    if not any(p.requires_grad for p in model.parameters()):
        raise ValueError("doctor: model must have trainable parameters, got none")
    with _named():
        tasks, others = tasks_of(support, "support"), tasks_of(query, "query")
        Parameters(model, adapt)
    if tasks != others:
        raise ValueError(f"doctor: query must have the {tasks} tasks of support, got {others}")
    return tasks


@contextmanager
def _named() -> Iterator[None]:
    """Within the block, errors of MAML's checks start with "doctor:"."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise type(error)(str(error).replace("MAML:", "doctor:", 1)) from None


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Restores the states of all random generators at the end of the block."""
    devices: Sequence[Any] = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with undisturbed(torch.device("cpu")), torch.random.fork_rng(devices=devices):
        yield
