"""Trials: plain autograd on two tasks, and whether a batching gives the same losses and derivatives.

A trial runs the user's own model and loss on copies of its tensors: while it is open, they replace the parameters,
buffers and other tensors of the modules, in float64 where model and loss allow it. Afterwards every module is what it
was. The two tasks differ in parameters, and in data as far as the batch allows; a task draws the same random numbers
under every batching (`draws`).

The reference is plain autograd, one task at a time. Its Hessian-vector product must be the slope of its gradient, which
is checked by differences of gradients. Where it is not, `metakern.doctor` says why.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from types import FunctionType, MethodType
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from metakern.meta.batches import mapped, select, structure, tensors, two_tasks
from metakern.meta.batching import Batching, Folded, Loss, exact_kernels, scalar
from metakern.meta.draws import ZEROS, Alike, python_states
from metakern.meta.functions import REPAIRED
from metakern.meta.parameters import Parameters
from metakern.meta.seconds import Stopwatch
from metakern.meta.slopes import direction, judge, norm
from metakern.meta.state import ModuleState, every_module, seeded, undisturbed
from metakern.meta.unroll import Gradients, Unroll, derivatives
from metakern.ops.core.plain import plain_operations
from metakern.optim import SGD

TOLERANCE = 1e-6  # relative error of each tensor in float64; a model that computes in float32 inside has about 1e-7
_Truth = list[list[Tensor | None]]
COSTLY_BYTES = 8 * 2**20  # saved by one task's loss: from here on, smaller tasks are tried if they can be
PROBE_EXAMPLES, PROBE_LENGTH = 2, 32
RANK = 4  # of the noise of weights that may be implicit
STEPS = (1e-6, 1e-7, 1e-5)  # step sizes of the quick comparison; `slopes.judge` decides where all of them disagree


class MismatchError(RuntimeError):
    """The losses or derivatives of a batching differ from those of plain autograd."""


class Trial:
    """Two tasks of each batch, with their losses and derivatives by plain autograd.

    `opened` makes it; it may be used only within that block.
    """

    def __init__(
        self,
        roles: Parameters,
        loss: Loss,
        batches: Sequence[Any],
        first_order: bool,
        slopes: bool,
        dtype: torch.dtype | None,
        plain: bool,
        watch: Stopwatch,
        low_rank: Collection[str] = (),
    ) -> None:
        self.watch = watch
        self._slopes = slopes and not first_order
        self.loss, self.first_order, self.plain, self.note, self.worst = loss, first_order, plain, "", 0.0
        self._modules = every_module(roles.model, *modules_of(loss))
        given = next(iter(roles.adapted.values())).dtype
        self._scale = max(given.itemsize, 4) / dtype.itemsize if dtype and dtype != given else 1.0
        self._own: dict[int, Tensor] = {}  # id of a tensor of the user -> the trial's copy of it
        self.roles = self._placed(roles, dtype)
        self.state = ModuleState(self._modules)
        random = torch.Generator().manual_seed(0)

        def noise(like: Tensor, *shape: int) -> Tensor:
            return torch.randn(2, *shape, generator=random, dtype=torch.float32, device="cpu").to(like)

        self.factors: dict[str, tuple[Tensor, Tensor]] = {}  # of the noise of parameters in `low_rank`
        self.phi: list[Tensor] = []
        for name, p in self.roles.adapted.items():
            scale = 0.05 * (p.detach().abs().mean() + 0.01)
            if name in low_rank:
                left, right = (noise(p, RANK, size) for size in p.shape)
                self.factors[name] = scale / RANK**0.5 * left, right
                self.phi.append(torch.baddbmm(p.detach(), self.factors[name][0].mT, right))
            else:
                self.phi.append(p.detach() + scale * noise(p, *p.shape))
        along = [direction([p[t] for p in self.phi], t) for t in range(2)]
        self.v = [torch.stack(pair) for pair in zip(*along, strict=True)]
        self.shared: list[Tensor] = list(self.roles.shared.values())
        self.outside: list[Tensor] = []  # leaves with gradients that the loss reaches and that are no model parameters
        self.draws: list[list[tuple[str, int]]] = []  # for each batch, the random operations of one task (`Alike`)
        self.python = False  # whether model or loss draw from Python's or NumPy's generators
        self.writes = False  # whether the loss writes to its batch
        self.graph = False  # whether the loss takes derivatives itself, and so fails under `no_grad`
        self.batches: list[Any] = []
        self.parts: list[float] = []  # for each batch, what autograd saves for it over that for the user's two tasks
        self.probe: Any = None  # the first batch, or a smaller one, for the second order
        self.changed: set[tuple[int, str]] = set()  # attributes that a forward pass changes: (id of the module, name)
        # "surrogate": the gradient is not the loss's slope; "lost": only the second order is wrong; "hidden": not known
        self.lost = ""
        self.kinds = [structure(batch) for batch in batches]
        self.apart: list[bool] = []  # for each batch, whether its two tasks differ
        self.truths: list[_Truth] = []  # for each batch, what `_truth` returns
        for batch in batches:
            self._look_at(mapped(lambda t: t.to(dtype) if dtype and t.is_floating_point() else t, batch))
        wide = len(self.phi) + len(self.shared)  # a leaf that only a later batch reaches has no row in an earlier one
        self.truths = [[losses, *(row + [None] * (wide - len(row)) for row in rows)] for losses, *rows in self.truths]

    def _placed(self, roles: Parameters, dtype: torch.dtype | None) -> Parameters:
        """Replace the tensors of the modules by copies in `dtype`, and return the roles of the copied parameters."""

        def converted(t: Tensor) -> Tensor:
            return t.detach().to(dtype or t.dtype, copy=True) if t.is_floating_point() else t.detach().clone()

        def own(t: Tensor) -> Tensor:
            if id(t) in self._own:
                return self._own[id(t)]
            if not isinstance(t, nn.Parameter):
                made = converted(t).requires_grad_(t.requires_grad)
                if not t.is_leaf:  # `_reached` finds a graph that is older than the loss
                    with torch.enable_grad():
                        made = made.clone()
            elif t.requires_grad or (t.is_floating_point() and dtype not in (None, t.dtype)):
                made = nn.Parameter(converted(t), requires_grad=t.requires_grad)
            else:  # a frozen parameter is shared, not copied: under LoRA, they are most of the model
                made = t
            self._own[id(t)] = made
            return made

        self._users = {id(t): t for m in self._modules for t in _tensors_of(m)}
        for module in self._modules:
            for held in (module._parameters, module._buffers, vars(module)):
                for name, value in list(held.items()):
                    if isinstance(value, Tensor):
                        cast(Any, held)[name] = own(value)
            if isinstance(module, nn.RNNBase):
                module._flat_weights = [getattr(module, name) for name in module._flat_weights_names]
            if isinstance(module, nn.RNNBase | nn.MultiheadAttention):  # their dropout happens inside their kernels
                module.dropout = 0.0
        adapted, shared = ({n: own(p) for n, p in d.items()} for d in (roles.adapted, roles.shared))
        return roles.holding(cast(Any, adapted), cast(Any, shared))

    def _look_at(self, batch: Any) -> None:
        """Take two tasks of a batch on which the loss is finite, and append their reference values to `truths`."""
        for again in range(3):
            pair = two_tasks(batch, again)
            try:
                pair, probe, part = (pair, pair, 1.0) if self.batches or self.first_order else self._smaller(pair)
                whole = probe is pair
                truth, drawn = self._truth(pair, second_order=whole and not self.batches, exact=whole)
                if not whole:
                    truth.append(self._truth(probe, second_order=True)[0][2])
                if again < 2 and not all(t is None or t.isfinite().all() for row in truth for t in row):
                    continue
            except Exception:
                if again == 2:
                    raise
                continue
            losses = cast(Tensor, truth[0][0])
            if not losses.isfinite().all():
                raise ValueError(f"MAML: loss must be finite for a plan to be verified, got {losses.tolist()}")
            self.graph |= self._needs_graph(probe)
            if self.changed:
                self._carries_nothing(pair)
            if not self.batches:
                self.probe = probe
            self.batches.append(pair)
            self.parts.append(part)
            self.draws.append(drawn)
            differ = [(not torch.equal(t[0], t[1]), t) for t in tensors(pair)]
            inputs = all(apart for apart, t in differ if t.is_floating_point() and t.numel())
            self.apart.append(inputs and any(apart for apart, _ in differ))
            self.truths.append(truth)
            return

    def _smaller(self, pair: Any) -> tuple[Any, Any, float]:
        """Return two tasks with fewer examples, and with shorter sequences too: for the first and the second order.

        Also return what autograd saves for those with fewer examples, over what it saves for `pair`.

        Plain autograd takes much memory and time, for attention the square of the length. The graph of the loss
        determines its derivatives, and it is the same if no step of the model depends on a size. So smaller tasks are
        taken if autograd saves much for the loss of `pair` and the loss of both smaller ones has the same graph. A loss
        that is 0 or not finite, as where no label is left, tells nothing.
        """

        @self.watch.part("sizes")
        def graph(batch: Any, t: int = 0) -> tuple[list[Any], int]:
            saved: dict[int, int] = {}
            adapted = [nn.Parameter(p[t]) for p in self.phi]
            seeded()
            python, draws = python_states(), Alike()
            with _counted(saved), self._task(t, batch, adapted, draws, exact=False) as value:
                tells = value.isfinite() and value != 0 and not draws.taken and python_states() == python
                found = _graph_of(value) if tells else []
            for p in (*adapted, *self.roles.model.parameters()):
                saved.pop(p.untyped_storage().data_ptr(), None)
            return found, sum(saved.values())

        try:
            whole, size = graph(pair)
            if not whole or size < COSTLY_BYTES:
                return pair, pair, 1.0
        except Exception:  # the trial on the whole batch says what is wrong
            return pair, pair, 1.0

        def cut(length: int | None, times: int) -> tuple[Any, float]:
            smaller = _cut(pair, PROBE_EXAMPLES, length)
            if times * _numbers(smaller) <= _numbers(pair):
                with suppress(Exception):  # the model or the loss may want sizes that go together in another way
                    (found, saved), (other, _) = graph(smaller), graph(smaller, 1)
                    if found == other == whole:
                        return smaller, max(saved, 1) / max(size, 1)
            return pair, 1.0

        (fewer, part), (shorter, _) = cut(None, 2), cut(PROBE_LENGTH, 4)
        if shorter is pair and 4 * _numbers(fewer) <= _numbers(pair):
            shorter = fewer
        return fewer, shorter, part

    def _needs_graph(self, batch: Any) -> bool:
        try:
            with self.steady(exact=False), torch.no_grad(), self.roles.bound([p[0] for p in self.phi]):
                self.loss(self.roles.model, select(batch, 0))
        except Exception:  # with a graph, the same call did not raise
            return True
        return False

    def _carries_nothing(self, batch: Any) -> None:
        """Raise ValueError where a loss depends on what the forward pass before it left in the modules.

        Inner steps would then depend on each other in another way than by parameters, and tasks too.
        """
        losses: list[Tensor] = []
        with self.steady(exact=False), torch.set_grad_enabled(self.graph), self.roles.bound([p[0] for p in self.phi]):
            for _ in range(2):
                seeded()
                self.state.restore_generators()
                with Alike():
                    losses.append(self.loss(self.roles.model, mapped(Tensor.clone, select(batch, 0))).detach())
        tolerance = TOLERANCE if self.phi[0].dtype == torch.float64 else 1e-3
        if torch.allclose(losses[0], losses[1], rtol=tolerance, atol=0, equal_nan=True):
            return
        names = {id(module): name for name, module in self.roles.model.named_modules()}
        names |= {id(module._buffers): f"{name}.a buffer" for name, module in self.roles.model.named_modules()}
        kept = sorted(f"{names[place]}.{name}".strip(".") for place, name in self.changed if place in names)
        raise ValueError(
            "MAML: the loss must not depend on what an earlier forward pass left in the model"
            f" ({', '.join(kept[:3]) or 'in a container'}): begin anew in each forward pass, or pass it in the batch"
        )

    @contextmanager
    def steady(self, exact: bool = True) -> Iterator[None]:
        """Make evaluations within the block repeatable: same attributes, buffers, random states and kernels.

        With `exact` the kernels have exact second derivatives.
        """
        self.state.restore()
        seeded()
        operations = plain_operations() if self.plain else nullcontext()
        try:
            with self.comparable(), exact_kernels(self.roles.model) if exact else nullcontext(), operations:
                yield
        finally:
            self.state.restore()

    def comparable(self) -> comparable:
        """Return the mode in which evaluations are compared."""
        wide = self.roles.adapted and next(iter(self.phi)).dtype == torch.float64
        return comparable(default=torch.float64 if wide else None)

    def _task(self, t: int, batch: Any, phi: Sequence[Tensor], draws: Alike, exact: bool = True) -> Any:
        """Return a context manager that gives one task's loss with its graph; differentiate it within the block."""

        @contextmanager
        def value() -> Iterator[Tensor]:
            with self.steady(exact), torch.enable_grad(), self.roles.bound(phi):
                given = mapped(Tensor.clone, select(batch, t))
                with draws:
                    value = scalar(self.loss(self.roles.model, given))
                self.writes |= any(t._version for t in tensors(given))
                yield value
                self.changed |= self.state.changed()

        return value()

    def _truth(self, batch: Any, second_order: bool, exact: bool = True) -> tuple[_Truth, list[tuple[str, int]]]:
        """Return the losses, gradients and (with `second_order`) Hessian-vector products of both tasks by autograd.

        Also return the random operations of one task, as `Alike` counts them.
        `exact` is needed for second order; without it PyTorch may take its fused attention, which is faster.
        """
        rows: list[tuple] = []
        second_order = second_order and not self.first_order
        buffers = {name: (b, b.detach().clone()) for name, b in self.roles.model.named_buffers()}
        drawn: list[tuple[str, int]] = []
        for t in range(2):
            before = _leaf_number()
            adapted = [nn.Parameter(p[t]) for p in self.phi]
            seeded()
            python, alike = python_states(), Alike()
            with self.watch.part("truth, first order"), self._task(t, batch, adapted, alike, exact) as value:
                self.python |= python_states() != python
                _unchanged(buffers)
                reached = self._reached(value, adapted, before) if t == 0 else []
                if reached:  # a leaf that the loss makes anew at each call is not a parameter of it
                    with self._task(t, batch, adapted, Alike(), exact) as value_again:
                        again = {id(leaf) for leaf in self._reached(value_again, adapted, before)}
                    self._take_in([leaf for leaf in reached if id(leaf) in again])
                grads = derivatives(value, [*adapted, *self.shared], create_graph=second_order)
                if all(g is None for g in grads[: len(adapted)]):
                    raise ValueError("MAML: loss must depend on an adapted parameter, got one with no gradient for any")
                if second_order:  # elements without a gradient, such as an embedding's padding row, do not move
                    for g, v in zip(grads, self.v, strict=False):
                        v[t].mul_(0 if g is None else g.detach() != 0)
                pairs = [(g, v[t]) for g, v in zip(grads, self.v, strict=False) if g is not None]
                products: Gradients = [None] * len(grads)
                if second_order:
                    with self.watch.part("truth, second order"):
                        products = derivatives([g for g, _ in pairs], [*adapted, *self.shared], [v for _, v in pairs])
            rows.append((value.detach(), [None if g is None else g.detach() for g in grads], products))
            drawn = alike.taken
        if second_order and self._slopes:
            with self.watch.part("slopes"):
                self._check_slopes(batch, rows[0][1], rows[0][2])
        losses, n = torch.stack([value for value, _, _ in rows]), len(self.phi)
        truth: _Truth = [[losses], _both(rows[0][1], rows[1][1], n)]
        return ([*truth, _both(rows[0][2], rows[1][2], n)] if second_order else truth), drawn

    def _reached(self, value: Tensor, adapted: Sequence[Tensor], before: int) -> list[Tensor]:
        """Return the leaves of a graph that require a gradient and are no parameters of the model.

        `before`: a sequence number; ValueError is raised for a node that was made earlier.
        """
        known = {id(t) for t in (*adapted, *self.shared, *self.roles.adapted.values())}
        stack, seen, found = [value.grad_fn], set(), []
        while stack:
            node = stack.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            leaf = getattr(node, "variable", None)
            if leaf is None and node._sequence_nr() < before:
                raise ValueError(
                    "MAML: loss must compute anew what requires a gradient, got a tensor whose graph was made before"
                    f" the call ({node.name()}): compute it inside the loss, or detach it"
                )
            if leaf is not None and leaf.requires_grad and id(leaf) not in known:
                known.add(id(leaf))
                found.append(leaf)
            stack += [n for n, _ in node.next_functions]
        return found

    def _take_in(self, leaves: Sequence[Tensor]) -> None:
        """Meta-learn these leaves of the loss with the model, such as a temperature or a criterion's parameters."""
        users = {id(own): self._users[key] for key, own in self._own.items() if key in self._users}
        self.outside += [users.get(id(leaf), leaf) for leaf in leaves]
        self.shared += leaves

    def _check_slopes(self, batch: Any, grads: Gradients, products: Gradients) -> None:
        """Check that the Hessian-vector product of task 0 is the slope of its gradient; set `lost` where it is not."""
        phi, u, n = [p[0] for p in self.phi], [v[0] for v in self.v], len(self.phi)
        if phi[0].dtype.itemsize < 4:  # rounding hides the slopes
            self.lost = "hidden"
            return

        def gradient(z: Sequence[Tensor]) -> Gradients:
            leaves = [nn.Parameter(t) for t in z]
            with self._task(0, batch, leaves, Alike()) as value:
                return derivatives(value, [*leaves, *self.shared])

        double, whole = phi[0].dtype == torch.float64, norm([g for g in grads if g is not None])
        for h in STEPS if double else ():
            up, down = (gradient([p + sign * h * d for p, d in zip(phi, u, strict=True)]) for sign in (1, -1))
            if _close(products, [_less(a, b, 2 * h) for a, b in zip(up, down, strict=True)], whole):
                return
        precision = torch.float64 if double and not _rounds(partial(gradient, phi)) else torch.float32

        @contextmanager
        def scalar(z: Sequence[Tensor]) -> Iterator[Tensor]:
            with self._task(0, batch, z[:n], Alike()) as value:
                yield value

        verdict = judge(scalar, phi, [True] * n, precision)
        if not verdict.exact and (verdict.wrong("first") or verdict.wrong("reverse") or verdict.impossible):
            self.lost = "surrogate" if verdict.wrong("first") else "lost"

    def measure(self) -> str:
        return f"worst relative error {self.worst:.0e} in {str(self.phi[0].dtype).removeprefix('torch.')}"

    def verify(self, batching: Batching) -> tuple[str, int]:
        """Verify a batching against plain autograd.

        Returns the mode of its Hessian-vector products ("forward" or "reverse") and the bytes that one task saves for
        its backward pass. Raises MismatchError where it differs from plain autograd, or whatever the model raises.
        """
        if self.python and batching.name != "loop":
            raise MismatchError("only 'loop' draws from Python's or NumPy's generators for each task")
        with self.watch.part(f"{batching.name}, first order"):
            if isinstance(batching, Folded):
                if not all(self.apart):
                    raise MismatchError("two tasks of the batch can't be made to differ, so folding can't be verified")
                batching.fold.within = self.comparable  # a mode set here has no effect once the fold steps out of vmap
                for batch, kind in zip([self.probe, *self.batches[1:]], self.kinds, strict=True):
                    self._trace(batching, batch, kind)
            bytes_a_task = max(self._first_order(batching, i) for i in range(len(self.batches)))
        if self.first_order:
            return "reverse", bytes_a_task
        with self.watch.part(f"{batching.name}, second order"):
            return self._second_order(batching), bytes_a_task

    def _second_order(self, batching: Batching) -> str:
        """Check the Hessian-vector products of a batching, and return their mode."""
        self.compare("Hessian-vector product", self._products(batching, "reverse"), self.truths[0][2])
        try:
            self.compare("Hessian-vector product", self._products(batching, "forward"), self.truths[0][2])
        except RuntimeError as error:
            self.note = f"Hessian-vector products reverse over reverse, for want of forward mode: {one_line(error)}"
            return "reverse"
        return "forward"

    def drawn(self, i: int) -> list[tuple[str, int]] | None:
        """Return the random operations of one task of batch i, or None where nothing is drawn."""
        return self.draws[i] if self.draws[i] or self.python else None

    def _first_order(self, batching: Batching, i: int) -> int:
        """Check the losses and gradients of batch i; return the bytes that autograd saves for one whole task of it.

        They are those of the user's dtype, or of float32 if that is wider: norms and losses often take it.
        """
        saved: dict[int, int] = {}
        try:
            self._losses(batching, i, _counted(saved))
        except RuntimeError as error:
            if "hooks" not in str(error):
                raise
            self._losses(batching, i, nullcontext())  # torch.func in the loss forbids hooks: nothing is counted
        for p in (*self.phi, *self.roles.model.parameters()):
            saved.pop(p.untyped_storage().data_ptr(), None)
        return int(sum(saved.values()) * self._scale / self.parts[i]) // 2

    def _losses(self, batching: Batching, i: int, hooks: AbstractContextManager) -> None:
        with self.steady(), torch.enable_grad():
            leaves = [p.detach().requires_grad_() for p in self.phi]
            with hooks:
                losses = _Drawing(batching, self.drawn(i)).losses(leaves, self.batches[i])
            grads = [g if g is None else g.detach() for g in derivatives(losses.sum(), [*leaves, *self.shared])]
        self.compare("loss", [losses.detach()], self.truths[i][0])
        self.compare("gradient", grads, self.truths[i][1])

    def _products(self, batching: Batching, hvp: str) -> Sequence[Tensor | None]:
        unroll = Unroll(_Drawing(batching, self.drawn(0)), SGD(), steps=1, hvp=hvp)
        with self.steady():
            return unroll.hessian_vector_product(self.phi, self.shared, self.probe, self.v)[1]

    def _trace(self, batching: Folded, batch: Any, kind: Any) -> None:
        """Record which tensors carry the tasks: those whose first dimension grows with their number.

        `kind` is the structure of the user's batch, whose dtypes may differ from those of the trial's.
        """
        records = []
        for tasks in (2, 3):
            index = torch.arange(tasks, device=self.phi[0].device) % 2
            batching.fold.recording = True
            try:
                with self.steady(), torch.set_grad_enabled(self.graph):
                    batching.losses([p[index] for p in self.phi], select(batch, index))
            finally:
                batching.fold.recording = False
            records.append(batching.fold.record)
        for known in (structure(batch), kind):
            batching.fold.keep(known, *records)

    def compare(self, what: str, found: Sequence[Tensor | None], truth: Sequence[Tensor | None]) -> None:
        low = any(p.dtype in (torch.bfloat16, torch.float16) for p in self.roles.model.parameters())
        tolerance = TOLERANCE if self.phi[0].dtype == torch.float64 else 5e-2 if low else 1e-3
        norms = [0.0 if t is None else t.norm().item() for t in truth]
        # A derivative that is zero up to rounding (as of a batch norm over one example) has no relative error.
        size = norm([cast(Tensor, self.truths[0][0][0])]) if self.truths else 0.0
        rounding = 100 * torch.finfo(self.phi[0].dtype).eps * size / max(norm(self.phi), 1.0)
        floor = max(1e-3 * max(norms), rounding / tolerance, 1e-30)
        for i, (a, b) in enumerate(zip(found, truth, strict=True)):
            if a is None and b is None:
                continue
            a, b = _aligned(a, b)
            error = (a - b).norm().item() / max(norms[i], floor)
            if not b.isfinite().all():
                raise MismatchError(f"plain autograd's {what} has NaN or infinity on two tasks")
            if not error <= tolerance:
                raise MismatchError(f"its {what} differs from plain autograd's by {error:.0e}")
            self.worst = max(self.worst, error)


class _Drawing:
    """A batching under which each of two tasks draws the random numbers that it draws alone."""

    def __init__(self, batching: Batching, draws: list[tuple[str, int]] | None) -> None:
        self.name, self._batching, self._draws = batching.name, batching, draws

    def losses(self, phi: Sequence[Tensor], batch: Any) -> Tensor:
        if self._draws is None:
            return self._batching.losses(phi, batch)
        if self.name != "loop":
            with Alike(2, self._draws):
                return self._batching.losses(phi, batch)
        losses = []
        for t in range(2):
            seeded()
            with Alike(1, self._draws):
                losses.append(self._batching.losses([p[t : t + 1] for p in phi], select(batch, slice(t, t + 1))))
        return torch.cat(losses)


@contextmanager
def opened(
    roles: Parameters,
    loss: Loss,
    batches: Sequence[Any],
    first_order: bool,
    double: bool,
    slopes: bool,
    watch: Stopwatch,
    low_rank: Collection[str] = (),
) -> Iterator[Trial]:
    """Open a trial: in float64 if `double` is set and model and loss allow it, else in the model's own dtype.

    Its tasks differ by matrices of low rank in the parameters named in `low_rank`.

    After the block, model, loss and random states are what they were. Raises ValueError where the loss is not a finite
    scalar, depends on no adapted parameter, or changes buffers.
    """
    device = next(iter(roles.adapted.values())).device
    users = ModuleState(every_module(roles.model, *modules_of(loss)))
    with undisturbed(device):
        try:
            yield _first(roles, loss, batches, first_order, slopes, double, users, watch, low_rank)
        finally:
            users.restore()


def _first(
    roles: Parameters,
    loss: Loss,
    batches: Sequence[Any],
    first_order: bool,
    slopes: bool,
    double: bool,
    users: ModuleState,
    watch: Stopwatch,
    low_rank: Collection[str],
) -> Trial:
    """Return the first trial that does not raise: in float64, then in the model's own dtype.

    In each dtype metakern's ops are tried first, then PyTorch's own operations if an op has no third derivatives.
    """
    ways = [(dtype, plain) for dtype in ((torch.float64, None) if double else (None,)) for plain in (False, True)]
    raised: list[Exception] = []
    for dtype, plain in ways:
        if plain and not (raised and _wants_plain(raised[-1])):
            continue
        try:
            return Trial(roles, loss, batches, first_order, slopes, dtype, plain, watch, low_rank)
        except Exception as error:
            users.restore()
            if dtype is None and not (not plain and _wants_plain(error)):
                raise
            raised.append(error)
    raise raised[-1]


def _wants_plain(error: Exception) -> bool:
    return isinstance(error, NotImplementedError) and "third derivatives" in str(error)


def modules_of(loss: Any, depth: int = 3) -> list[nn.Module]:
    """Return the modules that a loss is, holds, is bound to, closes over, or names as globals."""
    if isinstance(loss, nn.Module):
        return [loss]
    if not depth:
        return []
    parts: list[Any] = []
    if isinstance(loss, partial):
        parts = [loss.func, *loss.args, *loss.keywords.values()]
    elif isinstance(loss, MethodType):
        parts = [loss.__self__, loss.__func__]
    elif isinstance(loss, FunctionType):
        for cell in loss.__closure__ or ():
            with suppress(ValueError):  # an empty cell
                parts.append(cell.cell_contents)
        parts += [*(loss.__defaults__ or ()), *(loss.__kwdefaults__ or {}).values()]
        parts += [loss.__globals__.get(name) for name in loss.__code__.co_names]
        parts = [part for part in parts if isinstance(part, nn.Module | MethodType | FunctionType | partial)]
    elif hasattr(loss, "__dict__") and not isinstance(loss, type | Tensor):
        parts = [part for part in vars(loss).values() if isinstance(part, nn.Module)]
    return list(dict.fromkeys(module for part in parts for module in modules_of(part, depth - 1)))


def _tensors_of(module: nn.Module) -> Iterator[Tensor]:
    for held in (module._parameters, module._buffers, vars(module)):
        yield from (value for value in held.values() if isinstance(value, Tensor))


def _counted(saved: dict[int, int]) -> Any:
    """Return a context manager in which `saved` gets the bytes of each storage that autograd saves, by its address."""

    def count(tensor: Tensor) -> Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor.detach()  # a node that saved its own result would keep itself, and its graph, alive

    return torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor)


def _graph_of(value: Tensor) -> list[Any]:
    """Return the graph of a value: for each node its name and the numbers of the nodes that it leads to.

    The list is empty if the graph has an autograd Function in Python that is not metakern's, as its backward may do
    different things for different sizes.
    """
    nodes: list[Any] = [value.grad_fn]
    number = {value.grad_fn: 0}
    for node in nodes:
        if isinstance(node, BackwardCFunction) and not _module_of(node).startswith("metakern."):
            return []
        for following, _ in node.next_functions if node is not None else ():
            if following is not None and following not in number:
                number[following] = len(nodes)
                nodes.append(following)
    return [(n.name(), [number.get(f) for f, _ in n.next_functions]) for n in nodes if n is not None]


def _module_of(node: Any) -> str:
    """Return the module of the autograd Function that made a node."""
    return str(node._forward_cls.__module__)


def _cut(batch: Any, examples: int, length: int | None) -> Any:
    """Return the first examples of each task and, unless `length` is None, the first steps of each sequence.

    Dimension 1 of the first tensor that has one counts the examples, dimension 2 the steps of a sequence. All sizes
    that equal one of the two are cut.
    """
    shapes = [t.shape[1:] for t in tensors(batch) if t.dim() > 1]
    N = next((shape[0] for shape in shapes), 0)
    L = next((shape[1] for shape in shapes if len(shape) > 1 and shape[0] == N), 0)

    def cut(t: Tensor) -> Tensor:
        if t.dim() > 1 and t.shape[1] == N:
            t = t[:, :examples]
        for d in range(2, t.dim()):
            if length is not None and t.shape[d] == L:
                t = t.narrow(d, 0, min(length, L))
        return t.clone()

    return mapped(cut, batch)


def _numbers(batch: Any) -> int:
    return sum(t.numel() for t in tensors(batch))


def _unchanged(buffers: dict[str, tuple[Tensor, Tensor]]) -> None:
    for name, (buffer, before) in buffers.items():
        if not torch.equal(buffer.nan_to_num(), before.nan_to_num()):
            raise ValueError(
                f"MAML: buffers must not change in a forward pass, got {name!r}: call .eval() on its module"
            )


def _leaf_number() -> int:
    """Return a sequence number that is smaller than those of all autograd nodes made from now on."""
    with torch.enable_grad():  # the caller may be under `no_grad`
        return (torch.ones((), requires_grad=True) * 1).grad_fn._sequence_nr()  # type: ignore[union-attr]


class Roundings(TorchDispatchMode):
    """Sets `seen` where a differentiated float64 tensor is cast to a lower precision.

    Differences of such a function are accurate to the lower precision only.
    """

    seen = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = (torch.zeros if func is ZEROS else func)(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and args[0].dtype == torch.float64:
            differentiated = args[0].requires_grad or not torch.is_grad_enabled()
            self.seen |= result.is_floating_point() and result.dtype != torch.float64 and differentiated
        return result


def _rounds(gradient: Callable[[], Any]) -> bool:
    """Whether computing a gradient casts a differentiated float64 tensor to a lower precision."""
    with Roundings() as roundings:
        gradient()
    return roundings.seen


def _less(a: Tensor | None, b: Tensor | None, h: float) -> Tensor | None:
    if a is None and b is None:
        return None
    a, b = _aligned(a, b)
    return (a - b) / h


def _close(products: Gradients, slopes: Gradients, whole: float) -> bool:
    truths = [norm([t]) for t in slopes if t is not None]
    floor = 1e-2 * max([*truths, 1e-6 * whole], default=0.0)
    for product, slope in zip(products, slopes, strict=True):
        if product is None and slope is None:
            continue
        a, b = _aligned(product, slope)
        if not norm([a - b]) <= 1e-5 * max(norm([b]), floor):
            return False
    return True


class comparable(TorchFunctionMode):  # noqa: N801, a context manager
    """Within the block dropout is the identity and, with `in_float64`, casts of float64 tensors to float32 are skipped.

    Otherwise two ways to compute a loss would differ by their dropout masks or by rounding. The casts are skipped where
    gradients are enabled. What would have PyTorch's default dtype, such as `torch.zeros(3)`, has the dtype `default`,
    if that is given; PyTorch's own setting is one of all threads.
    """

    def __init__(self, in_float64: bool = True, default: torch.dtype | None = None) -> None:
        super().__init__()
        self.in_float64, self.default = in_float64, default

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in REPAIRED:
            return REPAIRED[func](*args, **kwargs)
        if func in _DROPOUTS:
            return args[0] if args else kwargs["input"]
        if func is F.scaled_dot_product_attention:
            kwargs = {**kwargs, "dropout_p": 0.0}
        keeps = self.in_float64 and torch.is_grad_enabled() and args and isinstance(args[0], Tensor)
        if keeps and args[0].dtype == torch.float64:
            if func is Tensor.float or (func is Tensor.to and any(a is torch.float32 for a in args)):
                return args[0]  # for example in transformers' norms, which compute in float32 in every model
            if func in _SOFTMAXES and kwargs.get("dtype") == torch.float32:
                kwargs = {**kwargs, "dtype": torch.float64}
        result = func(*args, **kwargs)
        if self.default in (None, torch.get_default_dtype()) or not isinstance(result, Tensor):
            return result
        is_default = result.dtype == torch.get_default_dtype()
        follows = not is_default or func in _CASTS or any(map(_sets_dtype, tree_leaves((args, kwargs))))
        return result if follows else result.to(self.default)


def _sets_dtype(argument: Any) -> bool:
    """Whether the dtype of a result follows from this argument, so that it is not PyTorch's default."""
    return isinstance(argument, torch.dtype) or (isinstance(argument, Tensor) and not _is_integral(argument.dtype))


def _is_integral(dtype: torch.dtype) -> bool:
    return not dtype.is_floating_point and not dtype.is_complex


_CASTS = {Tensor.float, Tensor.type}
_SOFTMAXES = {F.softmax, F.log_softmax, torch.softmax, torch.log_softmax, Tensor.softmax, Tensor.log_softmax}
_DROPOUTS = {F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout, torch.dropout}


def _aligned(a: Tensor | None, b: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return both tensors detached, with zeros in place of one that is None; at most one may be."""
    some = cast(Tensor, b if a is None else a)
    return (torch.zeros_like(some) if a is None else a.detach(), torch.zeros_like(some) if b is None else b.detach())


def _both(a: Sequence[Tensor | None], b: Sequence[Tensor | None], n: int) -> list[Tensor | None]:
    """Return the results of two tasks together: the first n (per task) stacked, the others (shared) summed."""
    out: list[Tensor | None] = []
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        if x is None and y is None:
            out.append(None)
            continue
        x, y = _aligned(x, y)
        out.append(torch.stack([x, y]) if i < n else x + y)
    return out


def one_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:160]}" if text else type(error).__name__
