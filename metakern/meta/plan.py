"""Which batching, strategy and chunk of tasks a meta-gradient uses here, and why.

Nothing is taken on trust. Every candidate is tried on two tasks before it is used (`verify`): its losses, gradients and
Hessian-vector products must equal those of plain autograd, and these must be slopes. `auto` takes the first candidate
that is exact, and the plan says why the others are not.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metakern.meta.batches import tasks_of
from metakern.meta.batching import WAYS, Batching, Loss
from metakern.meta.parameters import Parameters
from metakern.meta.verify import Trial, one_line, opened

FLOAT64_PARAMETERS = 200_000_000
TRIAL_COPIES = 10  # of all parameters, that a trial holds at once


@dataclass(frozen=True)
class Plan:
    """What was chosen. `reasons` explains each choice; `print(plan)` shows all of it."""

    batching: str
    strategy: str
    hvp: str
    task_chunk: int
    activation_bytes: int
    reasons: tuple[str, ...] = field(repr=False)

    def halved(self, tried: int) -> Plan:
        """The plan after memory ran out with so many tasks at once."""
        chunk = tried // 2
        return replace(
            self, task_chunk=chunk, reasons=(*self.reasons, f"memory ran out: {chunk} tasks at once from now")
        )

    def __str__(self) -> str:
        lines = [f"batching {self.batching}, strategy {self.strategy}", f"task_chunk {self.task_chunk}"]
        if self.strategy == "recompute":
            lines[0] += f" (Hessian-vector products {self.hvp} over reverse)"
        return "\n".join([*lines, *(f"  - {reason}" for reason in self.reasons)])


@dataclass(frozen=True)
class Found:
    """A plan, the batching that it is for, and the trained leaves that the loss reaches beside the model's."""

    plan: Plan
    batching: Batching
    outside: list[Tensor]
    draws: bool  # whether the model draws random numbers
    python: bool  # whether of Python's or NumPy's generators
    changed: set[tuple[int, str]]  # attributes of modules, (id, name), that a forward pass changes
    graph: bool = False  # whether the loss takes derivatives itself


class Planner:
    """Makes the plan for one model, loss and inner loop, and batches of one structure."""

    def __init__(self, parameters: Parameters, loss: Loss, wishes: Wishes) -> None:
        self.parameters, self.loss, self.wishes = parameters, loss, wishes

    def plan(
        self,
        batches: Sequence[Any],
        inner_steps: int,
        first_order: bool,
        without: Sequence[str] = (),
        slopes: bool = True,
    ) -> Found:
        """Tries the candidates on two tasks of each of `batches`, support first.

        without: batchings that are not to be tried. slopes: whether second derivatives are compared with slopes.
        Raises ValueError where no batching is exact, or where second-order terms are lost.
        """
        double = self._affordable()
        names = list(WAYS) if self.wishes.batching == "auto" else [self.wishes.batching]
        names = [name for name in names if name not in without]
        reasons = [f"{name} is not possible: it did not do for other batches" for name in without]
        with opened(self.parameters, self.loss, batches, first_order, double, slopes) as trial:
            found = self._tried(trial, names, trial.plain, batches, inner_steps, reasons)
            if found is None and not trial.plain and any("third derivatives" in reason for reason in reasons):
                found = self._tried(trial, names, True, batches, inner_steps, reasons)
        if found is not None:
            return self._judged(found, trial.lost, batches)
        words = "MAML: no batching is exact for this model and loss:\n  " + "\n  ".join(reasons)
        if "heckpoint" in words:
            words += (
                "\n  (where the model checkpoints its activations: gradient_checkpointing_disable(), and"
                ' strategy="recompute" saves the memory)'
            )
        raise ValueError(words)

    def _judged(self, found: Found, lost: str, batches: Sequence[Any]) -> Found:
        """Raises ValueError where second-order terms are lost; a gradient that is a surrogate on purpose is its own."""
        if not lost:
            return found
        from metakern.diagnosis import doctor

        places: list[str] = []
        try:
            report = doctor(self.parameters.model, self.loss, batches[0], batches[-1], adapt=self._is_adapted)
            places = [f"{p.path or 'the model'}: {p.op}, {p.kind}" for p in report.problems if p.order == 2]
        except Exception:  # what the doctor can't look at may be lost all the same
            places = []
        if lost == "surrogate" and not places:
            note = "the gradient is a surrogate, no slope of the loss, in first order: metakern.doctor says where"
            return replace(found, plan=replace(found.plan, reasons=(*found.plan.reasons, note)))
        where = "; ".join(places) or "metakern.doctor looks for the place"
        raise ValueError(f"MAML: second derivatives must not be lost, and are by this model and loss: {where}")

    def _is_adapted(self, name: str) -> bool:
        return name in self.parameters.adapted

    def _tried(
        self, trial: Trial, names: Sequence[str], plain: bool, batches: Sequence[Any], steps: int, reasons: list[str]
    ) -> Found | None:
        for name in names:
            batching: Any = WAYS[name](trial.roles, self.loss, plain)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # a candidate is judged by its numbers
                    hvp, saved = trial.verify(batching)
            except Exception as error:  # whatever a model raises under a batching, that batching is not for it
                reasons.append(f"{name} is not possible: {one_line(error)}")
                continue
            how = ", by PyTorch's own operations" if plain else ""
            reasons.append(f"{name} equals plain autograd on two tasks, {trial.measure()}: taken{how}")
            reasons += [trial.note] * bool(trial.note)
            chosen: Any = WAYS[name](self.parameters, self.loss, plain)
            if name == "fold":
                chosen.fold.records = batching.fold.records
            plan = self._sized(name, hvp, saved, tasks_of(batches[0]), steps, reasons)
            return Found(plan, chosen, trial.outside, any(trial.draws), trial.python, trial.changed, trial.graph)
        return None

    def _affordable(self) -> bool:
        """Whether a trial in float64 fits what is free."""
        parameters = list(self.parameters.model.parameters())
        numbers = sum(p.numel() for p in parameters if p.requires_grad)
        frozen = sum(p.numel() for p in parameters if not p.requires_grad)
        device = next(iter(self.parameters.adapted.values())).device
        needed = 8 * (TRIAL_COPIES * numbers + frozen)
        return numbers + frozen <= FLOAT64_PARAMETERS and needed <= free_bytes(device) // 2

    def _sized(self, name: str, hvp: str, saved: int, tasks: int, inner_steps: int, reasons: list[str]) -> Plan:
        adapted = self.parameters.adapted.values()
        device = next(iter(adapted)).device
        copy_bytes = sum(p.numel() * p.element_size() for p in adapted)
        working, free = saved + 3 * copy_bytes, free_bytes(device)
        wish, strategy = self.wishes.task_chunk, self.wishes.strategy
        on_cpu = device.type == "cpu"
        room, where = (WORKING_BYTES, "working memory") if on_cpu else (free // 2, "memory")

        def fitting(size: int) -> int:
            return wish if isinstance(wish, int) else max(1, room // max(size, 1))

        if strategy == "auto":
            stored = min(fitting(working), tasks) * (inner_steps * (3 * saved + 2 * copy_bytes) + working)
            strategy = "store" if stored <= free // 4 else "recompute"
            fits = "fits" if strategy == "store" else "does not fit"
            reasons.append(
                f"{strategy}: the graph of {inner_steps} steps, {mib(stored)}, {fits} a quarter of what is free"
            )
        if strategy == "recompute":  # which keeps the parameters of every step
            working += inner_steps * copy_bytes
        chunk = fitting(working)
        if not isinstance(wish, int):
            reasons.append(
                f"{min(chunk, tasks)} of {tasks} tasks at once: {mib(working)} a task, {mib(room)} of {where}"
            )
        return Plan(name, strategy, hvp, chunk, saved, tuple(reasons))


WORKING_BYTES = 192 * 2**20  # a CPU's working set of one chunk of tasks: more is slower, less is more calls


@dataclass(frozen=True)
class Wishes:
    """What the user asked for: a choice, or "auto"."""

    batching: str = "auto"
    strategy: str = "auto"
    task_chunk: int | str = "auto"

    def __post_init__(self) -> None:
        if self.batching not in ("auto", *WAYS):
            raise ValueError(f"MAML: batching must be auto, fold, vmap or loop, got {self.batching!r}")
        if self.strategy not in ("auto", "store", "recompute"):
            raise ValueError(f"MAML: strategy must be auto, store or recompute, got {self.strategy!r}")
        chunk = self.task_chunk
        if chunk != "auto" and not (isinstance(chunk, int) and not isinstance(chunk, bool) and chunk >= 1):
            raise ValueError(f'MAML: task_chunk must be "auto" or at least 1, got {chunk!r}')


def free_bytes(device: torch.device) -> int:
    """The memory that a process may still take: on a CPU with what the page cache would give back, within the limits of
    its container."""
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):  # not every system tells
        try:
            free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (ValueError, OSError, AttributeError):
            return 4 * 2**30
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            free = min(free, max(0, int(Path(limit).read_text()) - int(Path(used).read_text())))
        except (OSError, ValueError):  # no such limit, or "max"
            continue
    return free


def mib(size: float) -> str:
    return f"{size / 2**20:.1f} MiB"
