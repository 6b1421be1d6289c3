"""The engine: it makes, verifies and keeps a plan for each kind of batch, and runs a batch by its plan.

A plan holds for what it was verified on: the loss and the inner optimizer, the structure of support and query, their
sizes to a factor of two, PyTorch's settings, and the state of the model (its modules with their classes, training
flags, forwards and plain attributes; its parameters and which of them are trained). When one of these changes, another
plan is made. For another number of inner steps, only strategy and chunks are chosen anew. The plans used last are
kept. Under fold, the losses are also compared with those of single tasks, once for each new size of a batch.
"""

from __future__ import annotations

import gc
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from math import ceil
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metakern.meta.allocator import give_back, keep_freed_memory
from metakern.meta.batches import select, structure, tasks_of, tensors, whole
from metakern.meta.batching import Folded, Loss, exact_kernels
from metakern.meta.capture import Captures
from metakern.meta.capture.recorder import RecordError
from metakern.meta.capture.room import Room
from metakern.meta.draws import Alike
from metakern.meta.fold import FoldError
from metakern.meta.implicit import Implicit, ImplicitUnroll
from metakern.meta.parameters import Adapt, Parameters, put
from metakern.meta.plan import Found, Plan, Planner, Wishes
from metakern.meta.seconds import Stopwatch, Usage
from metakern.meta.state import INTERNAL, PLAIN, ModuleState, contents, every_module, undisturbed
from metakern.meta.threads import running
from metakern.meta.unroll import Unroll
from metakern.meta.verify import comparable, modules_of, one_line
from metakern.optim import InnerOptimizer

PLANS = 64  # plans kept; the one unused for longest is dropped
IMPLICIT = "implicit weights"  # in place of a batching's name among those that failed
LARGE_BYTES = 64 * 2**20  # of adapted parameters, from which on what a trial leaves is collected at once
SIZES = 256  # batch sizes for which a plan remembers that its folded losses were confirmed
_FOLDED = ("linear", "embedding", "layer_norm", "rms_norm")  # functions of modules that folding replaces


class Engine:
    """The plans of one model. Loss, inner optimizer and number of steps are passed at each call, as they may change."""

    def __init__(self, model: nn.Module, adapt: Adapt, wishes: Wishes) -> None:
        self.model, self.adapt, self.wishes = model, adapt, wishes
        self.last: Prepared | None = None
        self._plans: OrderedDict[Any, Prepared] = OrderedDict()
        self._room = Room()
        self._volatile: set[tuple[int, str]] = set()  # (id of a module, attribute): those that a forward pass changes

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the plans: they hold functions of this model's parameters, and a copy has its own."""
        return {**self.__dict__, "last": None, "_plans": OrderedDict(), "_room": Room(), "_volatile": set()}

    def prepared(
        self, loss: Loss, inner: InnerOptimizer, steps: int, first_order: bool, outer: bool, batches: Sequence[Any]
    ) -> Prepared:
        """Return the plan for these batches, support first; make it if there is none.

        `outer`: the plan is used for meta-gradients, so that second derivatives are verified too.
        """
        for batch, what in zip(batches, ("support", "query"), strict=False):
            tasks_of(batch, what)
        batches = whole(*batches)
        kinds = frozenset(map(_sizes, batches))
        base, numbers = self._base(loss, inner, first_order)
        found = self._kept(base, kinds, outer, steps)
        if found is None:
            other = self._kept(base, kinds, outer)
            found = None if other is None else other.resized(batches, steps)
            if found is None:
                found = self._made(loss, inner, steps, first_order, outer, batches)
                base, numbers = self._base(loss, inner, first_order)  # a trial finds attributes that do not count
            self._plans[base, kinds, outer, steps] = found
            if len(self._plans) > PLANS:
                self._plans.popitem(last=False)
        inner.prepare(found.parameters.adapted)  # another model may have used this optimizer meanwhile
        found.numbers = tuple(numbers.items())
        self.last = found
        return found

    def _kept(self, base: tuple, kinds: frozenset, outer: bool, steps: int | None = None) -> Prepared | None:
        """Return a plan that was verified on batches of these kinds, and for meta-gradients if `outer`; or None.

        It is for this number of inner steps, or for any.
        """
        for key, found in self._plans.items():
            if kinds <= key[1] and outer <= key[2] and steps in (None, key[3]) and key[0] == base:
                self._plans.move_to_end(key)
                return found
        return None

    def _made(
        self,
        loss: Loss,
        inner: InnerOptimizer,
        steps: int,
        first_order: bool,
        outer: bool,
        batches: Sequence[Any],
        without: Sequence[str] = (),
        watch: Stopwatch | None = None,
    ) -> Prepared:
        watch = watch or Stopwatch()
        roles = Parameters(self.model, self.adapt)
        inner.prepare(roles.adapted)
        learned = set(map(id, inner.hyper_parameters()))
        if twice := [name for name, p in roles.shared.items() if id(p) in learned]:
            raise ValueError(
                f"MAML: inner must not learn a parameter of the model that is not adapted, got {twice[0]!r}: adapt it,"
                " or give inner a parameter of its own"
            )
        attributes, numbers = self._attributes(loss)
        before = attributes.keys() | numbers.keys()
        kinds: dict[Any, Any] = {}
        for batch in sorted(batches, key=_largest):  # of batches of one structure, only the largest is tried
            kinds[structure(batch)] = batch
        first = structure(batches[0])  # the support comes first: its second derivatives are verified
        tried = [kinds.pop(first), *kinds.values()]
        wishes = replace(self.wishes, weights="explicit") if IMPLICIT in without else self.wishes
        planner = Planner(roles, loss, wishes, watch, inner)
        found = planner.plan(tried, steps, first_order or not outer, without)
        if sum(p.nbytes for p in roles.adapted.values()) >= LARGE_BYTES:
            gc.collect()  # a trial has cycles, and takes several times the memory of a meta-gradient
        give_back()
        self._volatile |= found.changed & before
        for i, leaf in enumerate(found.outside):
            roles.shared[f"(loss) {i}"] = leaf  # type: ignore[assignment]

        def again(failed: str, batches: Sequence[Any], steps: int) -> Prepared:
            return self._made(loss, inner, steps, first_order, outer, batches, [*without, failed], watch)

        return Prepared(planner, found, inner, steps, first_order, again, self._room)

    def _base(self, loss: Loss, inner: InnerOptimizer, first_order: bool) -> tuple[tuple, dict[tuple[int, str], Any]]:
        """Return what a plan depends on besides batches and inner steps, to be compared; and the numbers beside it.

        When one of these numbers changes, as an annealed temperature does at each step, folded losses are compared
        again.
        """
        own = (p for m in every_module(self.model) for p in m._parameters.values() if p is not None)
        parameters = tuple((id(p), p.requires_grad, p.dtype, p.device) for p in own)
        attributes, numbers = self._attributes(loss)
        switches = (_autocast(), torch.get_default_dtype(), nn.Module.__call__, *map(partial(getattr, F), _FOLDED))
        of_loop = (id(loss), id(inner), first_order)
        deterministic = torch.are_deterministic_algorithms_enabled()
        return (of_loop, parameters, tuple(attributes.items()), switches, deterministic), numbers

    def _attributes(self, loss: Loss) -> tuple[dict[tuple[int, str], Any], dict[tuple[int, str], Any]]:
        """Return the plain attributes of all modules of model and loss, their classes, children and hooks.

        Containers and configuration objects are looked into. The values of numbers are apart, in the second dictionary.
        """
        found: dict[tuple[int, str], Any] = {}
        numbers: dict[tuple[int, str], Any] = {}
        seen: dict[int, tuple[Any, Any]] = {}
        for module in every_module(self.model, *modules_of(loss)):
            place = id(module)
            for name, value in vars(module).items():
                if (place, name) in self._volatile:
                    continue
                if type(value) in PLAIN:
                    (numbers if type(value) in (int, float) else found)[place, name] = value
                elif name not in INTERNAL:
                    if id(value) not in seen:  # many modules may share one configuration object
                        seen[id(value)] = contents(value, numbers=False), contents(value, numbers=True)
                    found[place, name], numbers[place, name] = seen[id(value)]
            try:
                found[place, "__class__"] = type(module), type(module).forward
            except AttributeError:
                raise ValueError(
                    f"MAML: modules must be Python's own, got a {type(module).__name__}, whose parameters can't be"
                    " replaced by a task's: use the module that torch.jit made it of"
                ) from None
            if module._buffers:  # one that is None is another loss than one that is a tensor
                found[place, "_buffers"] = tuple((name, b is None) for name, b in module._buffers.items())
            found[place, "_modules"] = tuple(map(id, module._modules.values()))
            if hooks := (*module._forward_hooks, *module._forward_pre_hooks):
                found[place, "hooks"] = hooks
        return found, numbers


class Prepared:
    """A verified plan with the parameters by role and the inner loop, ready to run batches."""

    def __init__(
        self,
        planner: Planner,
        found: Found,
        inner: InnerOptimizer,
        steps: int,
        first_order: bool,
        again: Callable[[str, Sequence[Any], int], Prepared],
        room: Room,
        watch: Stopwatch | None = None,
    ) -> None:
        self._planner, self._found, self._steps, self._first_order = planner, found, steps, first_order
        self._again, self._room, self._watch = again, room, watch or planner.watch
        self.loss, self.parameters, self.plan = planner.loss, planner.parameters, found.plan
        batching = found.batching
        kind: type[Unroll] = ImplicitUnroll if isinstance(batching, Implicit) else Unroll
        self.unroll = kind(
            batching, inner, steps, first_order, self.plan.hvp, found.python, found.graph, self.plan.snapshots
        )
        self._confirmed: OrderedDict[Any, None] = OrderedDict()
        self._captures, self.numbers = dict[tuple[Any, ...], Captures](), tuple[Any, ...]()
        self.shared: list[Tensor] = list(self.parameters.shared.values())
        self.outer: list[Tensor] = [*self.parameters.adapted.values(), *self.shared, *inner.hyper_parameters()]

    def resized(self, batches: Sequence[Any], steps: int) -> Prepared | None:
        """Return a plan for another number of inner steps, without another trial; None where one is needed."""
        found = self._planner.resized(self._found, batches, steps)
        if found is None:
            return None
        others = self._first_order, self._again, self._room, Stopwatch()
        return Prepared(self._planner, found, self.unroll.inner, steps, *others)

    @property
    def _may_change(self) -> bool:
        """Whether another batching may replace this one where it fails."""
        return self._planner.wishes.batching == "auto"

    @property
    def explained(self) -> Plan:
        """The plan, with what it took so far, and why meta-gradients are not captured or have no executable."""
        reasons = [reason for captures in self._captures.values() for reason in captures.explained]
        usage = sum((captures.usage for captures in self._captures.values()), Usage())
        return replace(self.plan, reasons=(*self.plan.reasons, *reasons), seconds=self._watch.seconds, usage=usage)

    def captures(self, capture: bool | str, precision: str | None = None, **others: Any) -> Captures:
        """Return the captured programs of this plan for values of the options `capture` and `precision`.

        `others`: modules that compute besides model, inner optimizer and loss, and settings, by name.
        """
        key = capture, precision, *(id(x) if isinstance(x, nn.Module) else x for x in others.values())
        if key not in self._captures:
            roots = {"model": self.parameters.model, "inner": self.unroll.inner, "loss": self.loss, **others}
            names = ["the query losses", *self.parameters.adapted, *self.parameters.shared]
            fresh = partial(self._fresh_leaves, roots.values())
            self._captures[key] = Captures(roots, capture, names, precision, self._watch, fresh, self._room)
        return self._captures[key]

    @contextmanager
    def _fresh_leaves(self, roots: Iterable[Any]) -> Iterator[None]:
        """Within the block, tensors of the same memory stand for all tensors that learn.

        The node of a leaf belongs to the stream on which it was first used, and lives as long as any graph that has it,
        such as that of a loss which the user keeps. A CUDA graph is recorded on another stream, and can't have it.
        """
        parameters, before = self.parameters, (self.shared, self.outer)
        roles = parameters.adapted, parameters.shared
        modules = every_module(*(root for root in roots if isinstance(root, nn.Module)))
        places = [(m, name, p) for m in modules for name, p in m._parameters.items() if p is not None]
        fresh = {id(p): nn.Parameter(p.detach()) for _, _, p in places if p.requires_grad}
        if any(id(t) not in fresh for t in self.outer):
            raise RecordError("the loss reads tensors that learn, which are no parameters")
        own: Any = lambda p: fresh.get(id(p), p)  # noqa: E731
        try:
            put((m, name, own(p)) for m, name, p in places)
            parameters.adapted, parameters.shared = ({name: own(p) for name, p in role.items()} for role in roles)
            self.shared, self.outer = list(map(own, self.shared)), list(map(own, self.outer))
            yield
        finally:
            put(places)
            parameters.adapted, parameters.shared = roles
            self.shared, self.outer = before

    @property
    def explicit(self) -> Unroll:
        """The inner loop with explicit weights."""
        return self.unroll.explicit if isinstance(self.unroll, ImplicitUnroll) else self.unroll

    def theta(self, tasks: int, own: Mapping[str, Tensor] = MappingProxyType({})) -> list[Tensor]:
        """Return phi_0, `[tasks, *shape]`: the shared initialisation, or the `own` value of each task."""
        shared = self.parameters.adapted.items()
        return [own[name].detach() if name in own else p.detach().expand(tasks, *p.shape) for name, p in shared]

    def by_chunks(self, compute: Callable[..., Any], *batches: Any, more: Sequence[Any] = ()) -> Iterator[Any]:
        """Yield `compute(*chunk)` for chunks of about equal size, at most the plan's.

        `more`: further trees of tensors `[T, ...]` for `compute`, which the loss does not get. Where memory runs out,
        the chunk size is halved from there on.
        """
        keep_freed_memory()
        start, tasks = 0, tasks_of(batches[0])
        while start < tasks:
            chunks = ceil((tasks - start) / self.plan.task_chunk)
            tried = ceil((tasks - start) / chunks)
            part = slice(start, start + tried)
            try:
                with running(self.parameters.model), exact_kernels(self.parameters.model), self._kept_tensors():
                    chunk = [select(batch, part) for batch in batches]  # views: a loss may change their flags
                    self._confirm(whole(*chunk))
                    result = compute(*chunk, *(select(tree, part) for tree in more))
            except FoldError as error:
                if not self._may_change:
                    raise
                leaves = list(map(id, self.outer))
                self._replan(str(error), batches)
                if start and list(map(id, self.outer)) != leaves:
                    raise RuntimeError(
                        "MAML: chunks of a batch must reach the same tensors that learn; make task_chunk larger"
                    ) from error
                continue
            except RuntimeError as error:
                if _out_of_memory(error) and tried > 1:
                    self.plan = self.plan.halved(tried)
                    continue
                if not self._may_change or _out_of_memory(error) or str(error).startswith("MAML: "):
                    raise
                try:  # something may have changed so that this batching fails, and another one does not
                    self._replan(one_line(error), batches)
                except Exception:
                    raise error from None
                continue
            yield result
            del result  # it is as large as the model
            start = part.stop

    @contextmanager
    def _kept_tensors(self) -> Iterator[None]:
        """Remove tensors that a forward pass stores in its modules within the block, as they hold many tasks."""
        state = ModuleState(self.parameters.model.modules()) if self._found.changed else None
        try:
            yield
        finally:
            if state is not None:
                state.restore_tensors()

    def _replan(self, why: str, batches: Sequence[Any]) -> None:
        """Replace this plan by one with the next batching, after this batching failed on a later batch."""
        name = IMPLICIT if self.plan.implicit else self.unroll.batching.name
        other = self._again(name, whole(*batches), self._steps)
        self.__dict__.update(other.__dict__)
        self.plan = replace(self.plan, reasons=(*self.plan.reasons, f"{name} failed on a later batch: {why}"))

    def _confirm(self, batches: Sequence[Any]) -> None:
        """Compare folded losses with those of the first and the last task alone, once for each size of a batch.

        Raises FoldError where they differ.
        """
        batching = self.unroll.batching
        if not isinstance(batching, Folded):
            return
        for batch in batches:
            size = tuple(t.shape for t in tensors(batch)), structure(batch), self.numbers
            if size in self._confirmed:
                continue
            with self._watch.part("confirmation"):
                self._compare_folded(batching, batch)
            self._confirmed[size] = None
            if len(self._confirmed) > SIZES:
                self._confirmed.popitem(last=False)

    def _compare_folded(self, batching: Folded, batch: Any) -> None:
        """Compare folded losses with those of the first and the last task alone; raise FoldError where they differ."""
        tasks = tasks_of(batch)
        apart = 1 + 0.1 * torch.arange(tasks) / tasks  # the parameters differ, even if the data of tasks are equal
        theta = [
            p if name in self.plan.implicit else p * apart.to(p).view(-1, *(1,) * (p.dim() - 1))
            for name, p in zip(self.parameters.adapted, self.theta(tasks), strict=True)
        ]
        state = ModuleState(self.parameters.model.modules())
        alike = partial(comparable, in_float64=False)  # the model's own dtypes: what casts must cast
        tolerance = 1e-3 if theta[0].dtype in (torch.float32, torch.float64) and not _autocast() else 5e-2
        with undisturbed(theta[0].device), torch.set_grad_enabled(self.unroll.graph), alike():
            batching.fold.within = alike  # the mode set here has no effect once the fold steps out of vmap
            try:
                with Alike(tasks) if self._found.draws else nullcontext():
                    found = batching.losses(self.unroll.initial(theta, 0), batch)
            finally:
                batching.fold.within = nullcontext
                state.restore()
            for t in {0, tasks - 1}:
                with Alike() if self._found.draws else nullcontext():
                    alone = batching.one(select(batch, t), [p[t] for p in theta])
                state.restore()
                if not torch.allclose(found[t], alone, rtol=tolerance, atol=tolerance / 100, equal_nan=True):
                    raise FoldError("the losses of folded tasks differ from those of a task alone at this size")


def _autocast() -> bool:
    return torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda")


def _sizes(batch: Any) -> Any:
    """Return the structure of a batch and the size of one task, to a factor of two."""
    return structure(batch), _largest(batch).bit_length()


def _largest(batch: Any) -> int:
    """Return the number of elements in the largest tensor of one task."""
    return max((t.numel() // len(t) for t in tensors(batch)), default=0)


def _out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
