"""Trials: what plain autograd gives for two tasks, and whether a way to batch tasks gives the same.

A trial runs the user's own model and loss, on tensors of the trial's own: for its time they stand in the places of the
model's parameters, buffers and other tensors, in float64 where model and loss allow it. Afterwards every module is what
it was. The two tasks differ in data and parameters, whatever the batch holds; random numbers are the same in all ways
(`draws`).

The truth are the derivatives of autograd, a task at a time, if their second order is the slope of the first: the
Hessian-vector product is compared with differences of gradients. Where it is not, `metakern.doctor` says why.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from types import FunctionType, MethodType
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from metakern.meta.batches import mapped, select, structure, tensors, two_tasks
from metakern.meta.batching import Batching, Folded, Loss, exact_kernels, scalar
from metakern.meta.draws import ZEROS, Alike, python_states
from metakern.meta.functions import REPAIRED
from metakern.meta.parameters import Parameters
from metakern.meta.slopes import direction, judge, norm
from metakern.meta.state import ModuleState, seeded, undisturbed
from metakern.meta.unroll import Gradients, Unroll, derivatives
from metakern.ops.core.autocast import plain_operations
from metakern.optim import SGD

TOLERANCE = 1e-6  # relative, of every tensor, in float64: models that compute in float32 reach 1e-7
STEPS = (1e-6, 1e-7, 1e-5)  # of differences of gradients, before `slopes.judge` looks closer


class MismatchError(RuntimeError):
    """A candidate's numbers are not plain autograd's."""


class Trial:
    """Two tasks of a model and a loss; made by `opened`, within which it may be asked."""

    def __init__(
        self,
        roles: Parameters,
        loss: Loss,
        batches: Sequence[Any],
        first_order: bool,
        slopes: bool,
        dtype: torch.dtype | None,
        plain: bool,
    ) -> None:
        self._slopes = slopes and not first_order
        self.loss, self.first_order, self.plain, self.note, self.worst = loss, first_order, plain, "", 0.0
        self._modules = list(dict.fromkeys(m for root in (roles.model, *modules_of(loss)) for m in root.modules()))
        self._default = torch.get_default_dtype()
        self._own: dict[int, Tensor] = {}  # the trial's tensor for one of the user's, by its id
        self.roles = self._placed(roles, dtype)
        self.state = ModuleState(self._modules)
        random = torch.Generator().manual_seed(0)

        def noise(p: Tensor) -> Tensor:
            return torch.randn(2, *p.shape, generator=random, dtype=torch.float64, device="cpu").to(p)

        theta = [p.detach() for p in self.roles.adapted.values()]
        self.phi = [p + 0.05 * (p.abs().mean() + 0.01) * noise(p) for p in theta]
        along = [direction([p[t] for p in self.phi], t) for t in range(2)]
        self.v = [torch.stack(pair) for pair in zip(*along, strict=True)]
        self.shared: list[Tensor] = list(self.roles.shared.values())
        self.outside: list[Tensor] = []  # leaves that the loss reaches, which are parameters of neither
        self.draws: list[list[tuple[str, int]]] = []  # of each batch, what a task draws
        self.python = False  # whether Python's or NumPy's generators are drawn from
        self.graph = False  # whether the loss takes derivatives itself, so that it has none under `no_grad`
        self.batches: list[Any] = []
        self.changed: set[tuple[int, str]] = set()  # attributes of modules, (id, name), that a forward pass changes
        self.lost = ""  # "surrogate" where the gradient is no slope, "lost" where the second order alone is none
        self.kinds = [structure(batch) for batch in batches]
        self.apart: list[bool] = []  # whether its two tasks differ
        self.truths: list[list[list[Tensor | None]]] = []
        for batch in batches:
            self._look_at(mapped(lambda t: t.to(dtype) if dtype and t.is_floating_point() else t, batch))
        wide = len(self.phi) + len(self.shared)  # leaves that one batch alone reaches have no part in the other's
        self.truths = [[losses, *(row + [None] * (wide - len(row)) for row in rows)] for losses, *rows in self.truths]

    def _placed(self, roles: Parameters, dtype: torch.dtype | None) -> Parameters:
        """Puts tensors of the trial's own into the modules."""

        def converted(t: Tensor) -> Tensor:
            return t.detach().to(dtype or t.dtype, copy=True) if t.is_floating_point() else t.detach().clone()

        def own(t: Tensor) -> Tensor:
            if id(t) in self._own:
                return self._own[id(t)]
            if not isinstance(t, nn.Parameter):
                made = converted(t).requires_grad_(t.requires_grad and t.is_leaf)
            elif t.requires_grad or (t.is_floating_point() and dtype not in (None, t.dtype)):
                made = nn.Parameter(converted(t), requires_grad=t.requires_grad)
            else:  # frozen, and most of a model under LoRA
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
            if isinstance(module, nn.RNNBase | nn.MultiheadAttention):  # they drop units inside of their kernels
                module.dropout = 0.0
        adapted, shared = ({n: own(p) for n, p in d.items()} for d in (roles.adapted, roles.shared))
        return roles.holding(cast(Any, adapted), cast(Any, shared))

    def _look_at(self, batch: Any) -> None:
        """Two tasks of a batch that the loss takes and is finite on, and the truth about them."""
        for again in range(3):
            pair = two_tasks(batch, again)
            try:
                truth = self._truth(pair, second_order=not self.batches)
                if again < 2 and not all(t is None or t.isfinite().all() for row in truth for t in row):
                    continue
            except Exception:
                if again == 2:
                    raise
                continue
            losses = cast(Tensor, truth[0][0])
            if not losses.isfinite().all():
                raise ValueError(f"MAML: loss must be finite for a plan to be verified, got {losses.tolist()}")
            self.graph |= self._needs_graph(pair)
            self.batches.append(pair)
            differ = [(not torch.equal(t[0], t[1]), t) for t in tensors(pair)]
            inputs = all(apart for apart, t in differ if t.is_floating_point() and t.numel())
            self.apart.append(inputs and any(apart for apart, _ in differ))
            self.truths.append(truth)
            return

    def _needs_graph(self, batch: Any) -> bool:
        try:
            with self.steady(), torch.no_grad(), self.roles.bound([p[0] for p in self.phi]):
                self.loss(self.roles.model, select(batch, 0))
        except Exception:  # which it did not raise with a graph
            return True
        return False

    @contextmanager
    def steady(self) -> Iterator[None]:
        """Within the block all is as at every evaluation: attributes, buffers, random states, exact kernels."""
        self.state.restore()
        seeded()
        if self.roles.adapted and next(iter(self.phi)).dtype == torch.float64:
            torch.set_default_dtype(torch.float64)
        operations = plain_operations() if self.plain else nullcontext()
        try:
            with comparable(), exact_kernels(self.roles.model), operations:
                yield
        finally:
            torch.set_default_dtype(self._default)
            self.state.restore()

    def _task(self, t: int, batch: Any, phi: Sequence[Tensor], draws: Alike) -> Any:
        """A task's loss, with its graph, within the context that it is to be differentiated in."""

        @contextmanager
        def value() -> Iterator[Tensor]:
            with self.steady(), torch.enable_grad(), self.roles.bound(phi):
                with draws:
                    value = scalar(self.loss(self.roles.model, mapped(Tensor.clone, select(batch, t))))
                yield value
                self.changed |= self.state.changed()

        return value()

    def _truth(self, batch: Any, second_order: bool) -> list[list[Tensor | None]]:
        """[losses, gradients of each parameter, and Hessian-vector products] of plain autograd."""
        rows: list[tuple] = []
        second_order = second_order and not self.first_order
        buffers = {name: (b, b.detach().clone()) for name, b in self.roles.model.named_buffers()}
        drawn: list[tuple[str, int]] = []
        for t in range(2):
            before = _leaf_number()
            adapted = [nn.Parameter(p[t]) for p in self.phi]
            seeded()
            python, alike = python_states(), Alike()
            with self._task(t, batch, adapted, alike) as value:
                self.python |= python_states() != python
                _unchanged(buffers)
                reached = self._reached(value, adapted, before) if t == 0 else []
                if reached:  # what the loss makes anew at each call is no parameter of it
                    with self._task(t, batch, adapted, Alike()) as value_again:
                        again = {id(leaf) for leaf in self._reached(value_again, adapted, before)}
                    self._take_in([leaf for leaf in reached if id(leaf) in again])
                grads = derivatives(value, [*adapted, *self.shared], create_graph=second_order)
                if all(g is None for g in grads[: len(adapted)]):
                    raise ValueError("MAML: loss must depend on an adapted parameter, got one with no gradient for any")
                if second_order:  # rows that are not learned, as an embedding's for padding, do not move
                    for g, v in zip(grads, self.v, strict=False):
                        v[t].mul_(0 if g is None else g.detach() != 0)
                pairs = [(g, v[t]) for g, v in zip(grads, self.v, strict=False) if g is not None]
                products: Gradients = [None] * len(grads)
                if second_order:
                    products = derivatives([g for g, _ in pairs], [*adapted, *self.shared], [v for _, v in pairs])
            rows.append((value.detach(), [None if g is None else g.detach() for g in grads], products))
            drawn = alike.taken
        if second_order and self._slopes:
            self._check_slopes(batch, rows[0][1], rows[0][2])
        self.draws.append(drawn)
        losses, n = torch.stack([value for value, _, _ in rows]), len(self.phi)
        truth: list[list[Tensor | None]] = [[losses], _both(rows[0][1], rows[1][1], n)]
        return [*truth, _both(rows[0][2], rows[1][2], n)] if second_order else truth

    def _reached(self, value: Tensor, adapted: Sequence[Tensor], before: int) -> list[Tensor]:
        """The trained leaves of a graph that are not the model's parameters."""
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
                    f" the call ({node.name()}): compute it inside of the loss"
                )
            if leaf is not None and leaf.requires_grad and id(leaf) not in known:
                known.add(id(leaf))
                found.append(leaf)
            stack += [n for n, _ in node.next_functions]
        return found

    def _take_in(self, leaves: Sequence[Tensor]) -> None:
        """Has leaves that the loss reaches learned with the model: a temperature, the parameters of a criterion."""
        users = {id(own): self._users[key] for key, own in self._own.items() if key in self._users}
        self.outside += [users.get(id(leaf), leaf) for leaf in leaves]
        self.shared += leaves

    def _check_slopes(self, batch: Any, grads: Gradients, products: Gradients) -> None:
        """Whether the Hessian-vector product of task 0 is a slope of its gradient: `lost` says what is amiss."""
        phi, u, n = [p[0] for p in self.phi], [v[0] for v in self.v], len(self.phi)

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
        """The mode of its Hessian-vector products ("forward" or "reverse"), and the bytes a task saves for backward.

        Raises MismatchError, or what the model raises, where it does not do what plain autograd does.
        """
        if self.python and batching.name != "loop":
            raise MismatchError("the model draws from Python's or NumPy's generators, which a loop alone does a task")
        if isinstance(batching, Folded):
            if not all(self.apart):
                raise MismatchError("the batch does not tell two tasks apart")
            batching.fold.within = comparable  # a mode does not reach through the step out of vmap
            for batch, kind in zip(self.batches, self.kinds, strict=True):
                self._trace(batching, batch, kind)
        bytes_a_task = max(self._first_order(batching, i) for i in range(len(self.batches)))
        if self.first_order:
            return "reverse", bytes_a_task
        self._compare("Hessian-vector product", self._products(batching, "reverse"), self.truths[0][2])
        try:
            self._compare("Hessian-vector product", self._products(batching, "forward"), self.truths[0][2])
        except RuntimeError as error:
            self.note = f"Hessian-vector products reverse over reverse, for want of forward mode: {one_line(error)}"
            return "reverse", bytes_a_task
        return "forward", bytes_a_task

    def _drawn(self, i: int) -> list[tuple[str, int]] | None:
        """What a task draws for a batch; None where nothing is drawn."""
        return self.draws[i] if self.draws[i] or self.python else None

    def _first_order(self, batching: Batching, i: int) -> int:
        saved: dict[int, int] = {}

        def count(tensor: Tensor) -> Tensor:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        hooks: Any = torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor)
        try:
            self._losses(batching, i, hooks)
        except RuntimeError as error:
            if "hooks" not in str(error):
                raise
            self._losses(batching, i, nullcontext())  # torch.func in the loss: what it saves is not counted
        for p in (*self.phi, *self.roles.model.parameters()):
            saved.pop(p.untyped_storage().data_ptr(), None)
        element = next(iter(self.roles.adapted.values())).element_size()
        return sum(saved.values()) * 4 // (2 * max(element, 4))

    def _losses(self, batching: Batching, i: int, hooks: AbstractContextManager) -> None:
        with self.steady(), torch.enable_grad():
            leaves = [p.detach().requires_grad_() for p in self.phi]
            with hooks:
                losses = _Drawing(batching, self._drawn(i)).losses(leaves, self.batches[i])
            grads = [g if g is None else g.detach() for g in derivatives(losses.sum(), [*leaves, *self.shared])]
        self._compare("loss", [losses.detach()], self.truths[i][0])
        self._compare("gradient", grads, self.truths[i][1])

    def _products(self, batching: Batching, hvp: str) -> Sequence[Tensor | None]:
        unroll = Unroll(_Drawing(batching, self._drawn(0)), SGD(), steps=1, hvp=hvp)
        with self.steady():
            return unroll.hessian_vector_product(self.phi, self.shared, self.batches[0], self.v)[1]

    def _trace(self, batching: Folded, batch: Any, kind: Any) -> None:
        """Records which tensors carry the tasks: those whose first dimension follows their number. `kind` is the
        structure of the user's batch, whose tensors may be of another dtype than the trial's."""
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

    def _compare(self, what: str, found: Sequence[Tensor | None], truth: Sequence[Tensor | None]) -> None:
        low = any(p.dtype in (torch.bfloat16, torch.float16) for p in self.roles.model.parameters())
        tolerance = TOLERANCE if self.phi[0].dtype == torch.float64 else 5e-2 if low else 1e-3
        norms = [0.0 if t is None else t.norm().item() for t in truth]
        # Derivatives that are zero but for rounding, as of a centered batch of one, have no relative error.
        size = norm([cast(Tensor, self.truths[0][0][0])]) if self.truths else 0.0
        rounding = 100 * torch.finfo(self.phi[0].dtype).eps * size / max(norm(self.phi), 1.0)
        floor = max(1e-3 * max(norms), rounding / tolerance, 1e-30)
        for i, (a, b) in enumerate(zip(found, truth, strict=True)):
            if a is None and b is None:
                continue
            a, b = _aligned(a, b)
            error = (a - b).norm().item() / max(norms[i], floor)
            if not error <= tolerance:
                raise MismatchError(f"its {what} differs from plain autograd's by {error:.0e}")
            self.worst = max(self.worst, error)


class _Drawing:
    """A batching whose tasks draw the random numbers that each draws alone."""

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
    roles: Parameters, loss: Loss, batches: Sequence[Any], first_order: bool, double: bool, slopes: bool = True
) -> Iterator[Trial]:
    """A trial in float64, if that is affordable (`double`) and model and loss allow it, else in the model's own dtype.

    At the end model, loss and random states are what they were. Raises ValueError for what is no loss.
    """
    device = next(iter(roles.adapted.values())).device
    users = ModuleState(dict.fromkeys(m for root in (roles.model, *modules_of(loss)) for m in root.modules()))
    with undisturbed(device):
        try:
            yield _first(roles, loss, batches, first_order, slopes, double, users)
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
) -> Trial:
    """The first trial that model and loss allow: in float64 by ops, by plain operations, in their own dtype."""
    ways = [(dtype, plain) for dtype in ((torch.float64, None) if double else (None,)) for plain in (False, True)]
    raised: list[Exception] = []
    for dtype, plain in ways:
        if plain and not (raised and _wants_plain(raised[-1])):
            continue
        try:
            return Trial(roles, loss, batches, first_order, slopes, dtype, plain)
        except Exception as error:
            users.restore()
            if dtype is None and not (not plain and _wants_plain(error)):
                raise
            raised.append(error)
    raise raised[-1]


def _wants_plain(error: Exception) -> bool:
    return isinstance(error, NotImplementedError) and "third derivatives" in str(error)


def modules_of(loss: Any, depth: int = 3) -> list[nn.Module]:
    """The modules that a loss is, is bound to, or closes over."""
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


def _unchanged(buffers: dict[str, tuple[Tensor, Tensor]]) -> None:
    for name, (buffer, before) in buffers.items():
        if not torch.equal(buffer.nan_to_num(), before.nan_to_num()):
            raise ValueError(
                f"MAML: buffers must not change in a forward pass, got {name!r}: call .eval() on its module"
            )


def _leaf_number() -> int:
    """A number below those of all nodes of autograd's graph that are still to be made."""
    with torch.enable_grad():  # `no_grad` may be the caller's
        return (torch.ones((), requires_grad=True) * 1).grad_fn._sequence_nr()  # type: ignore[union-attr]


class Roundings(TorchDispatchMode):
    """Whether what has derivatives is rounded to less than float64 on the way: its differences are those of less."""

    seen = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = (torch.zeros if func is ZEROS else func)(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and args[0].dtype == torch.float64:
            differentiated = args[0].requires_grad or not torch.is_grad_enabled()
            self.seen |= result.is_floating_point() and result.dtype != torch.float64 and differentiated
        return result


def _rounds(gradient: Callable[[], Any]) -> bool:
    """Whether a gradient rounds what is differentiated to less than float64 on the way."""
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
    """Dropout is the identity, and what has derivatives stays float64: two ways to a loss can only be compared so."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in REPAIRED:
            return REPAIRED[func](*args, **kwargs)
        if func in _DROPOUTS:
            return args[0] if args else kwargs["input"]
        if func is F.scaled_dot_product_attention:
            kwargs = {**kwargs, "dropout_p": 0.0}
        if torch.is_grad_enabled() and args and isinstance(args[0], Tensor) and args[0].dtype == torch.float64:
            if func is Tensor.float or (func is Tensor.to and any(a is torch.float32 for a in args)):
                return args[0]  # as in transformers' norms, which are float32 in every model
            if func in _SOFTMAXES and kwargs.get("dtype") == torch.float32:
                kwargs = {**kwargs, "dtype": torch.float64}
        return func(*args, **kwargs)


_SOFTMAXES = {F.softmax, F.log_softmax, torch.softmax, torch.log_softmax, Tensor.softmax, Tensor.log_softmax}
_DROPOUTS = {F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout, torch.dropout}


def _aligned(a: Tensor | None, b: Tensor | None) -> tuple[Tensor, Tensor]:
    """Zeros for the one that is None; not both are."""
    some = cast(Tensor, b if a is None else a)
    return (torch.zeros_like(some) if a is None else a.detach(), torch.zeros_like(some) if b is None else b.detach())


def _both(a: Sequence[Tensor | None], b: Sequence[Tensor | None], n: int) -> list[Tensor | None]:
    """The results of two tasks: stacked for the first n (per task), summed for the rest (shared)."""
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
