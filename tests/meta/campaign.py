"""Random tests of the claim that a meta-gradient is exact or an error says why it is not available.

    python tests/meta/campaign.py --runs 2000 --seed 0        seeds 0 to 1999; one line for each failure
    python tests/meta/campaign.py --runs 1 --seed 17          seed 17 alone

A run draws a model, a loss, an inner optimizer and settings (`campaign_worlds`), and calls one `metakern.MAML`, with
one to three changes between the calls. After each call the value and the meta-gradient must equal those of plain
autograd in float64 (`campaign_truth`), or metakern must have raised an error of its own that names the class and says
what it refuses. Model, loss, optimizer, batch and random states must be unchanged. Everything else is a failure:

    different   a wrong number without an error
    internal    an error that does not address the user: a KeyError, or a FoldError although another batching is exact
    changed     an object of the user was changed
    crashed     the process ended, or did not answer in time

Runs are made in another process, so that a crash is a line of the output too. `test_campaign.py` makes a few runs.
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from random import Random
from typing import Any

import campaign_worlds as worlds
import numpy as np
import torch
from campaign_truth import Answer, answer
from campaign_worlds import Drawn, Sizes, World
from torch import Tensor, nn

import metakern as mk
from metakern.meta.fold import FoldError

TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-3}  # relative
NUDGE = {torch.float64: 1e-13, torch.float32: 1e-6}  # a relative change of parameters as small as rounding
FORWARDS = {"last", "calls", "_flat_weight_refs"}  # attributes that a forward may change
OWN_WORDS = re.compile(r"(?!vmap)[A-Za-z_]\w*: ")
TIMEOUT = 120  # seconds for one run


@dataclass
class Outcome:
    """Results of a run: failures, and errors by which metakern refused what plain autograd computes."""

    seed: int
    failures: list[tuple[str, str]] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)
    calls: int = 0
    batchings: list[str] = field(default_factory=list)


@dataclass
class Options:
    """Options of MAML that do not change its result."""

    batching: str
    strategy: str
    task_chunk: int | str
    capture: Any


class Run:
    """One run: two equal worlds from one seed, and calls of one MAML."""

    def __init__(self, seed: int, capture: bool = True) -> None:
        self.seed, self.r, self.outcome = seed, Random(f"run {seed}"), Outcome(seed)
        r = self.r
        self.options = Options(
            r.choice([*["auto"] * 5, "fold", "vmap", "loop"]),
            r.choice(["auto", "store", "recompute"]),
            r.choice(["auto", "auto", 1, 2]),
            r.choice([False, False, True, True, "auto"]),
        )
        with default_dtype(torch.float64):
            self.ours, self.truth = World(seed, True), World(seed, False)
        assert len(self.ours.names) == len(self.truth.names), "the worlds must be alike"
        self.sizes = Sizes(
            r.choice([1, 2, 3, 4]),
            r.choice([1, 2, 2, 3, 6]),
            r.choice([1, 2, 3, 6]),
            r.choice(list(worlds.CONTAINERS)),
            r.choice(["random", "random", "equal", "zeros", "constant", "whole"]),
        )
        for key in self.sizes.keys:
            self.sizes.keys[key] = r.random() < 0.2
        if self.ours.sharp:
            self.options = Options("auto", self.options.strategy, "auto", self.options.capture)
            self.sizes.tasks, self.sizes.support, self.sizes.query = (
                r.choice([2, 4]),
                r.choice([2, 3]),
                r.choice([2, 3]),
            )
            self.sizes.keys["extra"], self.sizes.container = r.random() < 0.3, r.choice(["dict", "example"])
            self.sizes.style = r.choice(["equal", "constant", "random"])
        if self.ours.draws:
            self.sizes.tasks, self.options.batching = 1, "loop"
        if self.ours.draws or not capture:
            self.options.capture = False
        self.story = [str(self.options), *self.ours.names, f"{self.sizes}"]

    def go(self) -> Outcome:
        try:
            self._go()
        except Exception as error:  # a fault of the campaign itself
            self._note("internal", f"the campaign: {type(error).__name__}: {error}")
        return self.outcome

    def _go(self) -> None:
        self.maml = self._made()
        call = 0
        for change in range(self.r.choice([2, 2, 3, 4])):
            if change:
                self._change(call)
            for _ in range(
                self.r.choice([1, 2, 3, 4]) if self.options.capture else 1
            ):  # a program is recorded, checked, and then used
                if self.outcome.failures or not self._call(call):
                    return
                call += 1

    def _made(self) -> mk.MAML:
        ours, options = self.ours, self.options
        maml = mk.MAML(
            ours.model,
            ours.loss.function,
            inner=self._inner(),
            steps=ours.steps,
            first_order=ours.first_order,
            adapt=ours.adapt,
            strategy=options.strategy,
            batching=options.batching,
            task_chunk=options.task_chunk,
            capture=options.capture,
        )
        self._rates(maml.inner)
        return maml

    def _inner(self) -> mk.optim.InnerOptimizer:
        with default_dtype(torch.float64):  # the dtype of learned hyper-parameters, until the model changes it
            return self.ours.inner.metakern()

    def _rates(self, inner: nn.Module) -> None:
        """Change the learned hyper-parameters of both worlds to the same random values."""
        with default_dtype(torch.float64):
            self.truth.inner.prepare(self.truth.adapted())
        leaves = list(self.truth.inner.leaves.values())
        for i, (mine, leaf) in enumerate(zip(inner.parameters(), leaves, strict=True)):
            factor = 1 + 0.2 * worlds.normal(leaf.detach(), f"{self.seed} rate {i}")
            mine.data.mul_(factor.to(mine))
            leaf.data = mine.data.double()

    def _change(self, call: int) -> None:
        change = worlds.change(self.truth, self.r)
        if self.r.random() < 0.3 and not self.ours.sharp:
            self._other_batches()
        elif self.ours.sharp or self.r.random() < 0.5:
            self.sizes.style = "random"
        before = self.ours.loss, self.ours.inner, self.ours.dtype
        for world in (self.ours, self.truth):
            with default_dtype(torch.float64):
                torch.manual_seed(self.seed + call)
                change(world, Random(f"{self.seed} {call}"))
        self.story.append(f"then {change.__name__}")
        maml, ours = self.maml, self.ours
        maml.steps, maml.first_order = ours.steps, ours.first_order
        if ours.loss is not before[0]:
            maml.loss = ours.loss.function
        if ours.inner is not before[1]:
            maml.inner = self._inner()
            maml.inner.prepare(ours.adapted())
            self._rates(maml.inner)
        if ours.loss is not before[0]:
            self._same_dtype()
        if ours.dtype != before[2]:
            self._same_dtype()
            maml.inner.to(ours.dtype)
            for leaf in self.truth.inner.leaves.values():
                leaf.data = leaf.data.to(ours.dtype).double()

    def _same_dtype(self) -> None:
        for world in (self.ours, self.truth):
            world.rounded(world.dtype)

    def _other_batches(self) -> None:
        r, sizes = self.r, self.sizes
        what = r.choice(["tasks", "support", "query", "container", "style", "length", "key"])
        if what == "key":
            key = r.choice(list(sizes.keys))
            sizes.keys[key] = not sizes.keys[key]
        else:
            values: dict[str, list] = {
                "tasks": [1] if self.ours.draws else [1, 2, 3, 5],
                "support": [1, 3, 6, 9],
                "query": [1, 3, 6, 9],
                "container": list(worlds.CONTAINERS),
                "style": ["random", "equal", "zeros", "whole"],
                "length": [2, 3, 5],
            }
            setattr(sizes, what, r.choice(values[what]))
        self.story.append(f"then another {what}")

    def _call(self, call: int) -> bool:
        """Make and judge one call; return False where the run cannot go on."""
        ours, truth, outcome = self.ours, self.truth, self.outcome
        support, query = (
            worlds.batch(self.r, ours.data, ours.each, self.sizes, rows, is_query)
            for rows, is_query in ((self.sizes.support, False), (self.sizes.query, True))
        )
        kind = self.r.choice(["gradient", "gradient", "gradient", "gradient", "no_grad", "inference", "adapt"])
        setting = self.r.choice([*[""] * 12, *SETTINGS])
        self.story += [f"call {call}: {kind}" + (f" with {setting}" if setting else "")]
        outcome.calls += 1
        right: Answer | Exception
        try:
            right = self._right(truth, support, query, kind == "gradient")
        except Exception as error:  # plain autograd cannot compute it either
            right = error
        before = Snapshot(ours, self.maml, draws=ours.draws)
        batches = support.whole(ours.dtype), query.whole(ours.dtype)
        torch.manual_seed(self.seed + 99)
        before.random()
        try:
            with SETTINGS[setting]() if setting else ExitStack():
                found = self._found(kind, *batches)
        except Exception as error:
            self._judge_error(error, right)
            self._note("changed", before.differences())
            self._same_batches(batches, support, query)
            return True
        outcome.batchings.append(self.maml.plan.batching)
        self._note("changed", before.differences())
        self._same_batches(batches, support, query)
        if isinstance(right, Exception):
            return False
        self._judge(right, found, kind, support, query)
        return not outcome.failures

    def _right(self, world: World, support: Drawn, query: Drawn, outer: bool, nudge: float = 0.0) -> Answer:
        with default_dtype(torch.float64), unchanged(world, nudge):
            torch.manual_seed(self.seed + 99)
            tasks = [(support.task(t, world.dtype), query.task(t, world.dtype)) for t in range(self.sizes.tasks)]
            return answer(
                world.model,
                world.loss.function,
                world.inner,
                tasks,
                world.steps,
                world.first_order,
                world.adapt,
                world.loss.leaves,
                outer,
            )

    def _found(self, kind: str, support: Any, query: Any) -> Answer:
        maml, ours = self.maml, self.ours
        learned = [p for p in ours.model.parameters() if p.requires_grad] + [*maml.inner.parameters()]
        learned += ours.loss.leaves
        for p in learned:
            p.grad = None
        if kind == "adapt":
            phi = maml.adapt(support)
            return Answer(torch.zeros(0), [], phi)
        if kind == "gradient":
            value = maml(support, query)
            value.backward()
        else:
            with torch.no_grad() if kind == "no_grad" else torch.inference_mode():
                value = maml(support, query)
        assert maml.query_losses is not None
        mean = maml.query_losses.mean()
        if not torch.allclose(mean, value.detach(), rtol=1e-5, equal_nan=True):
            self._note("different", "the value is not the mean of query_losses")
        gradients = [p.grad for p in learned] if kind == "gradient" else []
        for p in learned:
            p.grad = None
        return Answer(maml.query_losses.detach(), gradients, {})

    def _judge(self, right: Answer, found: Answer, kind: str, support: Drawn, query: Drawn) -> None:
        if kind == "adapt":
            if list(found.adapted) != list(right.adapted):
                self._note("different", f"adapt gives {list(found.adapted)} for {list(right.adapted)}")
                return
            rows = list(found.adapted.values()), list(right.adapted.values())
        elif kind == "gradient":
            rows = found.rows, right.rows  # type: ignore[assignment]
        else:
            rows = [found.losses], [right.losses]
        error = distance(*rows)
        tolerance = TOLERANCE[self.ours.dtype]
        if error <= tolerance:
            return
        nudged = self._right(self.truth, support, query, kind == "gradient", NUDGE[self.ours.dtype])
        other = {"adapt": list(nudged.adapted.values()), "gradient": nudged.rows}.get(kind, [nudged.losses])
        if not error <= tolerance + 10 * distance(other, rows[1]):
            self._note("different", f"by {error:.0e}, {self.maml.plan.batching}, {self.maml.plan.strategy}")

    def _judge_error(self, error: Exception, right: Answer | Exception) -> None:
        text = f"{type(error).__name__}: {str(error).strip()}"
        asked = self.options.batching == "fold" and isinstance(error, FoldError)
        if isinstance(right, Exception) or asked:
            return
        known = isinstance(error, ValueError | TypeError | NotImplementedError | RuntimeError)
        if known and not isinstance(error, FoldError) and OWN_WORDS.match(str(error)):
            self.outcome.refusals.append(text)
        else:
            self._note("internal", text)

    def _same_batches(self, batches: tuple, support: Drawn, query: Drawn) -> None:
        for got, drawn in zip(batches, (support, query), strict=True):
            for mine, other in zip(worlds.fields(got), worlds.fields(drawn.whole(self.ours.dtype)), strict=True):
                if mine is not None and not torch.equal(mine, other):
                    self._note("changed", "a batch")

    def _note(self, kind: str, what: str) -> None:
        if what:
            self.outcome.failures.append((kind, f"{what} | {' '.join(self.story)}"))


class Snapshot:
    """The state that a call must leave unchanged."""

    def __init__(self, world: World, maml: mk.MAML, draws: bool) -> None:
        self.draws, self.maml = draws, maml
        holder = world.loss.holder
        roots = [world.model, *([holder] if isinstance(holder, nn.Module) else [])]
        self.modules = [module for root in roots for module in root.modules()]
        self.attributes = [_contents(module) for module in self.modules]
        tensors = [t for root in roots for t in (*root.parameters(), *root.buffers())]
        self.tensors = [(t, t.detach().clone(), t.requires_grad) for t in (*tensors, *maml.inner.parameters())]
        self.states: tuple = ()

    def random(self) -> None:
        self.states = _random_states()

    def differences(self) -> str:
        found = []
        for module, before in zip(self.modules, self.attributes, strict=True):
            after, name = _contents(module), type(module).__name__
            found += [f"{name}.{key} went" for key in before.keys() - after.keys()]
            for key, value in after.items():
                if key not in before or not _identical(before[key], value):
                    found.append(f"{name}.{key} is another")
            for key, value in vars(module).items():
                if isinstance(value, Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(value):
                    found.append(f"{name}.{key} is a dead tensor")
        for tensor, value, requires_grad in self.tensors:
            if not torch.equal(tensor.nan_to_num(), value.nan_to_num()) or tensor.requires_grad != requires_grad:
                found.append(f"a tensor {list(tensor.shape)}")
        if not self.draws and str(self.states) != str(_random_states()):
            found.append("a random state")
        return ", ".join(found)


def _contents(module: nn.Module) -> dict[Any, Any]:
    """Return the attributes of a module by name, with the entries of dictionaries and lists as items of their own."""
    held: dict[Any, Any] = {}
    computed = {"weight"} if any("WeightNorm" in str(h) for h in module._forward_pre_hooks.values()) else set()
    for name, value in vars(module).items():
        if name in FORWARDS | computed:
            continue
        if isinstance(value, dict):
            held |= {(name, key): part for key, part in value.items()}
        elif isinstance(value, list):
            held |= {(name, i): part for i, part in enumerate(value)}
        else:
            held[name] = value
    return held


def _identical(a: Any, b: Any) -> bool:
    return a is b or (isinstance(a, int | float | str | bool | set | tuple) and a == b)


def _random_states() -> tuple:
    return torch.get_rng_state().tolist(), random.getstate(), [np.asarray(s).tolist() for s in np.random.get_state()]


@contextmanager
def unchanged(world: World, nudge: float) -> Iterator[None]:
    """Within the block parameters are moved by `nudge`; after it parameters and buffers have their old values."""
    kept = [(b, b.detach().clone()) for b in world.model.buffers()]
    theta = [(p, p.detach().clone()) for p in world.model.parameters()]
    with torch.no_grad():
        for i, (p, _) in enumerate(theta if nudge else ()):
            p.mul_(1 + nudge * worlds.normal(p, str(i)))
    try:
        yield
    finally:
        with torch.no_grad():
            for tensor, value in (*kept, *theta):
                tensor.copy_(value)


def distance(found: Sequence[Tensor | None], right: Sequence[Tensor | None]) -> float:
    """Return the largest relative error of the tensors; that of a tensor near zero is relative to the largest norm."""
    if len(found) != len(right):
        return float("inf")
    norms = [0.0 if t is None else t.double().norm().item() for t in right]
    largest, worst = max((n for n in norms if np.isfinite(n)), default=0.0), 0.0
    for a, b, norm in zip(found, right, norms, strict=True):
        if a is None and b is None:
            continue
        a = torch.zeros_like(b) if a is None else a.detach()  # type: ignore[arg-type]
        b = torch.zeros_like(a) if b is None else b.detach()
        if a.shape != b.shape:
            return float("inf")
        if not np.isfinite(norm):
            worst = max(worst, 0.0 if not a.isfinite().all() else float("inf"))
        else:
            error = (a.double() - b.double()).norm().item() / max(norm, 1e-3 * largest, 1e-30)
            worst = max(worst, error if np.isfinite(error) else float("inf"))
    return worst


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def precision(holder: Any) -> Iterator[None]:
    before = holder.fp32_precision
    holder.fp32_precision = "ieee"
    try:
        yield
    finally:
        holder.fp32_precision = before


# Settings of PyTorch that hold during one call.
SETTINGS: dict[str, Callable[[], Any]] = {
    "deterministic algorithms": deterministic,
    "default dtype float64": lambda: default_dtype(torch.float64),
    "anomaly mode": lambda: torch.autograd.set_detect_anomaly(True, check_nan=False),
    "precision of convolutions": lambda: precision(torch.backends.cudnn.conv),
    "precision of products": lambda: precision(torch.backends.cuda.matmul),
}


def run(seed: int, capture: bool = True) -> Outcome:
    """Make one run with warnings ignored; without `capture`, MAML gets `capture=False`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Run(seed, capture).go()


def _work(pipe: Connection, seeds: Sequence[int], capture: bool) -> None:
    torch.set_num_threads(1)
    for seed in seeds:
        pipe.send(run(seed, capture))


def outcomes(seeds: Sequence[int], capture: bool = True) -> Iterator[Outcome]:
    """Yield the outcomes of all seeds, made in a process that is started again if it ends."""
    rest = list(seeds)
    context = multiprocessing.get_context("spawn")
    while rest:
        here, there = context.Pipe()
        process = context.Process(target=_work, args=(there, rest, capture), daemon=True)
        process.start()
        there.close()
        try:
            while rest:
                if not here.poll(TIMEOUT):
                    raise EOFError
                yield here.recv()
                rest.pop(0)
        except EOFError:
            process.kill()
            process.join()
            yield Outcome(rest.pop(0), [("crashed", f"exit code {process.exitcode}")])
        process.join(1)
        process.kill()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Random runs of MAML against plain autograd in float64.")
    parser.add_argument("--runs", type=int, default=300, help="number of runs (300)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first run (0)")
    parser.add_argument(
        "--refusals", action="store_true", help="also print each error by which metakern refused a call"
    )
    parser.add_argument("--no-capture", action="store_true", help="run without captured programs")
    options = parser.parse_args(arguments)
    seeds = range(options.seed, options.seed + options.runs)
    begun, kinds, batchings, calls, refused = time.monotonic(), Counter[str](), Counter[str](), 0, 0
    for done, outcome in enumerate(outcomes(seeds, not options.no_capture), 1):
        calls, refused = calls + outcome.calls, refused + len(outcome.refusals)
        batchings.update(outcome.batchings)
        for kind, what in outcome.failures[:1]:
            kinds[kind] += 1
            print(f"\rseed {outcome.seed}: {kind}: {what}", flush=True)
        for what in outcome.refusals if options.refusals else ():
            print(f"\rseed {outcome.seed}: refused: {what.splitlines()[0]}{what[-300:]!r}", flush=True)
        seconds = time.monotonic() - begun
        left = seconds / done * (options.runs - done)
        failed = sum(kinds.values())
        sys.stderr.write(f"\r{done}/{options.runs} runs, {done / seconds:.1f}/s, {left:.0f} s left, {failed} failed ")
        sys.stderr.flush()
    taken = ", ".join(f"{name} {n}" for name, n in batchings.most_common())
    print(f"\n{options.runs} runs, {calls} calls ({taken}), {refused} refused by an error, failures: {dict(kinds)}")
    return 1 if kinds else 0


if __name__ == "__main__":
    sys.exit(main())
