"""The planner: it chooses the batching, the strategy and the chunk of tasks of a meta-gradient, and records why.

Every batching is tried on two tasks before it is used (`verify`): its losses, gradients and Hessian-vector products
must equal those of plain autograd, and the latter must be slopes. `auto` takes the first batching that is exact; the
plan's reasons say why the ones before it are not.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from metakern.meta.batches import tasks_of
from metakern.meta.batching import WAYS, Batching, Loss
from metakern.meta.implicit import Implicit
from metakern.meta.parameters import Parameters
from metakern.meta.seconds import Seconds, Stopwatch, Usage
from metakern.meta.unroll import fewest_snapshots
from metakern.meta.verify import Trial, one_line, opened
from metakern.meta.weights import WEIGHTS, Weights
from metakern.optim import InnerOptimizer

FLOAT64_PARAMETERS = 200_000_000
_NOTES = {  # what a trial could not rule out, where the doctor finds no place that loses derivatives
    "surrogate": "the gradient is a surrogate, not the slope of the loss: metakern.doctor finds the place",
    "hidden": "second derivatives were not compared with the slope of the gradient, which half precision hides",
}
TRIAL_COPIES = 10  # estimate of how many copies of all trainable parameters a trial holds at once


@dataclass(frozen=True)
class Plan:
    """The choices for one kind of batch, and their reasons. `print(plan)` shows all of it.

    Attributes:
        batching: "fold", "vmap" or "loop".
        strategy: "store" or "recompute".
        hvp: The mode of the outer derivative of Hessian-vector products, "forward" or "reverse". Used by "recompute".
        task_chunk: The greatest number of tasks computed at once.
        activation_bytes: An estimate of what one task's loss saves for its backward pass, in bytes.
        implicit: The names of the implicit weights.
        snapshots: The most inner steps whose parameters "recompute" keeps at once, besides the first.
        reasons: One line for each choice.
        seconds: What verification and captured programs took so far.
        usage: How many programs were captured, and how often they ran. Neither counts when plans are compared.
    """

    batching: str
    strategy: str
    hvp: str
    task_chunk: int
    activation_bytes: int
    snapshots: int
    reasons: tuple[str, ...] = field(repr=False)
    implicit: tuple[str, ...] = ()
    seconds: Seconds = field(default=Seconds(), repr=False, compare=False)
    usage: Usage = field(default=Usage(), repr=False, compare=False)

    def halved(self, tried: int) -> Plan:
        """Return the plan to use after memory ran out with `tried` tasks at once."""
        chunk = tried // 2
        return replace(
            self, task_chunk=chunk, reasons=(*self.reasons, f"memory ran out: {chunk} tasks at once from now on")
        )

    def __str__(self) -> str:
        lines = [f"batching {self.batching}, strategy {self.strategy}", f"task_chunk {self.task_chunk}"]
        if self.implicit:
            lines.append(f"{len(self.implicit)} implicit weights")
        if self.strategy == "recompute":
            lines[0] += f" (Hessian-vector products {self.hvp} over reverse)"
        return "\n".join([*lines, *(f"  - {line}" for line in (*self.reasons, self.usage, self.seconds))])


@dataclass(frozen=True)
class Found:
    """A plan, its batching, and what the trial found out about model and loss."""

    plan: Plan
    batching: Batching
    outside: list[Tensor]  # leaves with gradients that the loss reaches and that are no parameters of the model
    draws: bool  # whether model or loss draw random numbers from PyTorch
    python: bool  # whether they draw from Python's or NumPy's generators
    changed: set[tuple[int, str]]  # attributes that a forward pass changes: (id of the module, name)
    graph: bool = False  # whether the loss takes derivatives itself
    verified: tuple[str, ...] = ()  # the reasons that hold for every number of inner steps


class Planner:
    """Makes plans for one model and loss, as far as the options of the user (`wishes`) leave a choice."""

    def __init__(
        self,
        parameters: Parameters,
        loss: Loss,
        wishes: Wishes,
        watch: Stopwatch | None = None,
        inner: InnerOptimizer | None = None,
    ) -> None:
        self.parameters, self.loss, self.wishes, self.watch = parameters, loss, wishes, watch or Stopwatch()
        self._free = 0  # bytes that a plan may count on
        self.inner, self.weights = inner, Weights(parameters, loss, inner, wishes.weights)

    def plan(
        self,
        batches: Sequence[Any],
        inner_steps: int,
        first_order: bool,
        without: Sequence[str] = (),
        slopes: bool = True,
    ) -> Found:
        """Try the batchings on two tasks of each of `batches` and return the first that is exact, with its plan.

        Args:
            batches: One batch for each structure, the support first; second derivatives are verified on it alone.
            inner_steps: The number of inner steps.
            first_order: Whether to leave out the verification of second derivatives.
            without: Batchings that are not to be tried.
            slopes: Whether second derivatives are compared with slopes.

        Raises:
            ValueError: No batching is exact, or second-order terms are lost.
        """
        self._free = free_bytes(next(iter(self.parameters.adapted.values())).device)  # before the trial takes some
        double = self._affordable()
        names = list(WAYS) if self.wishes.batching == "auto" else [self.wishes.batching]
        names = [name for name in names if name not in without]
        reasons = [f"{name} is not possible: it failed on a later batch" for name in without]
        low_rank = self.weights.names
        with opened(self.parameters, self.loss, batches, first_order, double, slopes, self.watch, low_rank) as trial:
            found = self._tried(trial, names, trial.plain, batches, inner_steps, reasons)
            if found is None and not trial.plain and any("third derivatives" in reason for reason in reasons):
                found = self._tried(trial, names, True, batches, inner_steps, reasons)
        if found is not None:
            return self._judged(found, trial.lost, batches)
        words = "MAML: no batching is exact for this model and loss:\n  " + "\n  ".join(reasons)
        if "heckpoint" in words:
            words += (
                "\n  (if the model checkpoints its activations, call its gradient_checkpointing_disable();"
                ' strategy="recompute" saves the memory instead)'
            )
        if trial.writes:
            words += (
                "\n  (the loss writes to its batch, so that later steps get other data: have it clone what it changes)"
            )
        raise ValueError(words)

    def _judged(self, found: Found, lost: str, batches: Sequence[Any]) -> Found:
        """Return `found`; raise ValueError where second-order terms are lost.

        A surrogate gradient (one that is not the slope of the loss, as of a straight-through estimator) is taken as it
        is, with a note among the reasons; so is one whose slope rounding hides, if the doctor finds nothing lost.
        """
        if not lost:
            return found
        from metakern.diagnosis import doctor

        places: list[str] = []
        try:
            report = doctor(self.parameters.model, self.loss, batches[0], batches[-1], adapt=self._is_adapted)
            places = [f"{p.path or 'the model'}: {p.op}, {p.kind}" for p in report.problems if p.order == 2]
        except Exception:  # the doctor can't examine this model, but second-order terms are lost all the same
            places = []
        if lost in _NOTES and not places:
            note, plan = _NOTES[lost], found.plan
            return replace(found, plan=replace(plan, reasons=(*plan.reasons, note)), verified=(*found.verified, note))
        where = "; ".join(places) or "call metakern.doctor to find the place"
        raise ValueError(f"MAML: second derivatives must not be lost, but this model and loss lose them: {where}")

    def _is_adapted(self, name: str) -> bool:
        return name in self.parameters.adapted

    def _tried(
        self, trial: Trial, names: Sequence[str], plain: bool, batches: Sequence[Any], steps: int, reasons: list[str]
    ) -> Found | None:
        for name in names:
            batching: Any = WAYS[name](trial.roles, self.loss, plain)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # a batching is judged by its numbers alone
                    hvp, saved = trial.verify(batching)
            except Exception as error:  # a model may raise anything under a batching that does not suit it
                reasons.append(f"{name} is not possible: {one_line(error)}")
                continue
            how = ", with PyTorch's own operations in place of metakern's" if plain else ""
            reasons.append(f"{name} equals plain autograd on two tasks, {trial.measure()}: taken{how}")
            reasons += [trial.note] * bool(trial.note)
            chosen: Any = WAYS[name](self.parameters, self.loss, plain)
            if name == "fold":
                chosen.fold.records = batching.fold.records
                implicit, why = self.weights.batching(trial, chosen.fold.records, plain, hvp, steps)
                chosen, reasons = implicit or chosen, [*reasons, *why]
            elif self.wishes.weights == "implicit":
                reasons.append("explicit weights: implicit ones need batching fold")
            plan = self._sized(chosen, hvp, saved, tasks_of(batches[0]), steps, reasons)
            draws, verified = any(trial.draws), tuple(reasons)
            return Found(plan, chosen, trial.outside, draws, trial.python, trial.changed, trial.graph, verified)
        return None

    def resized(self, found: Found, batches: Sequence[Any], inner_steps: int) -> Found | None:
        """Return what an earlier trial found, with the plan for another number of inner steps.

        None where other weights are to be implicit then.
        """
        plan = found.plan
        if self.weights.chosen(inner_steps) != [*plan.implicit]:
            return None
        self._free = free_bytes(next(iter(self.parameters.adapted.values())).device)
        tasks = tasks_of(batches[0])
        plan = self._sized(found.batching, plan.hvp, plan.activation_bytes, tasks, inner_steps, found.verified)
        return replace(found, plan=plan)

    def _affordable(self) -> bool:
        """Whether a trial in float64 needs at most half of the free memory."""
        parameters = list(self.parameters.model.parameters())
        numbers = sum(p.numel() for p in parameters if p.requires_grad)
        frozen = sum(p.numel() for p in parameters if not p.requires_grad)
        needed = 8 * (TRIAL_COPIES * numbers + frozen)
        return numbers + frozen <= FLOAT64_PARAMETERS and needed <= self._free // 2

    def _sized(
        self, batching: Batching, hvp: str, saved: int, tasks: int, inner_steps: int, verified: Sequence[str]
    ) -> Plan:
        reasons = [*verified]
        implicit = batching.places if isinstance(batching, Implicit) else {}
        adapted = [p for name, p in self.parameters.adapted.items() if name not in implicit]
        device = next(iter(self.parameters.adapted.values())).device
        copy_bytes = sum(p.numel() * p.element_size() for p in adapted)
        if self.inner is not None:  # its state is as much a part of a step as the parameters
            with torch.no_grad():
                copy_bytes += sum(s.nbytes for s in self.inner.init([p.detach()[None] for p in adapted]))
        pairs = inner_steps * batching.pair_bytes if isinstance(batching, Implicit) else 0  # of all steps
        on_cpu = device.type == "cpu"
        working, free = saved + 3 * copy_bytes + PAIR_COPIES[on_cpu] * pairs, self._free
        wish, strategy = self.wishes.task_chunk, self.wishes.strategy
        room, where = (WORKING_BYTES, "working memory") if on_cpu else (free // 2, "memory")
        if on_cpu and implicit:  # all tasks of a chunk read these weights once
            own = sum(self.parameters.adapted[name].nbytes for name in implicit)
            room = max(room, min(IMPLICIT_COPIES * own, free // 4))

        def fitting(size: int) -> int:
            return wish if isinstance(wish, int) else max(1, room // max(size, 1))

        least = self.wishes.memory == "least"
        snapshots = max(SNAPSHOTS, fewest_snapshots(inner_steps))
        if least:
            snapshots = LEAST_SNAPSHOTS + int(SNAPSHOT_SHARE * saved / max(copy_bytes, 1))
            wish = 1 if wish == "auto" else wish
        snapshots = min(inner_steps, snapshots)
        if strategy == "auto" and least:
            strategy = "recompute"
            reasons.append(
                f'memory="least": recompute, one task at a time; the parameters of {snapshots} of {inner_steps} steps'
                " are kept"
            )
        if strategy == "auto":
            graphs = inner_steps * (3 * saved + 2 * copy_bytes + pairs // 2) + pairs
            stored = min(fitting(working), tasks) * (graphs + working)
            strategy = "store" if stored <= free // 4 else "recompute"
            fits = "fits" if strategy == "store" else "does not fit"
            reasons.append(
                f"{strategy}: the graph of {inner_steps} steps, {mib(stored)}, {fits} a quarter of the free memory"
            )
        if strategy == "recompute":
            working += snapshots * copy_bytes
        chunk = fitting(working)
        if not isinstance(wish, int):
            reasons.append(
                f"{min(chunk, tasks)} of {tasks} tasks at once: {mib(working)} a task, within {mib(room)} of {where}"
            )
        return Plan(batching.name, strategy, hvp, chunk, saved, snapshots, tuple(reasons), tuple(implicit))


SNAPSHOTS = 4  # the fewest inner steps whose parameters "recompute" keeps, if there are as many
# memory="least" keeps those of this many steps, and of as many more as this share of the activations has room for.
LEAST_SNAPSHOTS, SNAPSHOT_SHARE = 2, 0.5
WORKING_BYTES = 192 * 2**20  # a CPU's working set of one chunk: a larger one is slower, a smaller one takes more calls
PAIR_COPIES = (5, 2)  # of all pairs, with cotangents and tangents: on a GPU; on a CPU, where programs reuse memory
IMPLICIT_COPIES = 4  # or as many copies of the implicit weights: what Adam holds of them, with the gradient


@dataclass(frozen=True)
class Wishes:
    """The options of the user, each a value or "auto". Raises ValueError for other values."""

    batching: str = "auto"
    strategy: str = "auto"
    task_chunk: int | str = "auto"
    memory: str = "auto"
    weights: str = "auto"

    def __post_init__(self) -> None:
        if self.batching not in ("auto", *WAYS):
            raise ValueError(f"MAML: batching must be auto, fold, vmap or loop, got {self.batching!r}")
        if self.strategy not in ("auto", "store", "recompute"):
            raise ValueError(f"MAML: strategy must be auto, store or recompute, got {self.strategy!r}")
        if self.memory not in ("auto", "least"):
            raise ValueError(f"MAML: memory must be auto or least, got {self.memory!r}")
        if self.weights not in WEIGHTS:
            raise ValueError(f"MAML: weights must be auto, explicit or implicit, got {self.weights!r}")
        chunk = self.task_chunk
        if chunk != "auto" and not (isinstance(chunk, int) and not isinstance(chunk, bool) and chunk >= 1):
            raise ValueError(f'MAML: task_chunk must be "auto" or an integer of at least 1, got {chunk!r}')


def free_bytes(device: torch.device) -> int:
    """Return how many bytes this process may still allocate on a device.

    On a CPU this includes the page cache that can be reclaimed, and respects the memory limit of the container. Where
    the system does not report its memory, it is 4 GiB.
    """
    if device.type == "cuda":
        kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + kept
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
        free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):  # only Linux has this file
        try:
            free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (ValueError, OSError, AttributeError):
            return 4 * 2**30
    return min([free, *_left_in_groups(Path("/"))])


def _left_in_groups(root: Path) -> Iterator[int]:
    """Yield the bytes left under each memory limit of this process: its control groups' and their ancestors'."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        lines = []
    groups = {"memory": "/", "": "/"}  # where a container's own groups are mounted, whatever they are called outside
    groups |= {name: path for _, names, path in (line.split(":", 2) for line in lines) for name in names.split(",")}
    for mount, path, limit, used in (
        ("sys/fs/cgroup", groups[""], "memory.max", "memory.current"),
        ("sys/fs/cgroup/memory", groups["memory"], "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        group = Path(path.lstrip("/"))
        for folder in dict.fromkeys((group, *group.parents)):
            try:
                values = [int((root / mount / folder / name).read_text()) for name in (limit, used)]
            except (OSError, ValueError):  # no such limit, or "max"
                continue
            yield max(0, values[0] - values[1])


def mib(size: float) -> str:
    return f"{size / 2**20:.1f} MiB"
