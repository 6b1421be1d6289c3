"""Which batching, strategy and chunk of tasks a meta-gradient uses here, and why.

Nothing is taken on trust. At the first batch every candidate is tried on two tasks in float64, with parameters that
differ between the tasks, on a copy of the model without dropout: its losses, gradients and Hessian-vector products must
equal those of plain autograd on copies of the model with the parameters really set. `auto` takes the first candidate
that is exact, and the plan says why the others are not.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

from metakern.meta import _batching
from metakern.meta._batching import Batching, Loss, select, tasks_of
from metakern.meta._parameters import Parameters, twin
from metakern.meta._unroll import Unroll, _grad
from metakern.optim import SGD

FLOAT64_PARAMETERS = 200_000_000
TOLERANCE = 1e-6  # relative, of every tensor, in float64: models that compute in float32 reach 1e-7


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


class Planner:
    """Makes the plan for one model, loss and inner loop; keeps it for as long as batches have the same structure."""

    def __init__(self, parameters: Parameters, loss: Loss, wishes: Wishes) -> None:
        self.parameters, self.loss, self.wishes = parameters, loss, wishes

    def plan(self, support: Any, inner_steps: int, first_order: bool) -> tuple[Plan, Batching]:
        """Tries the candidates on two tasks of `support`; raises ValueError where none is exact."""
        refuse_batch_norm(self.parameters.model)
        probe = _Probe.of(self.parameters, self.loss, support, first_order)
        names = list(_batching.WAYS) if self.wishes.batching == "auto" else [self.wishes.batching]
        reasons: list[str] = []
        for name in names:
            batching = _batching.WAYS[name](probe.parameters, self.loss)
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # a candidate is judged by its numbers
                    hvp, saved = probe.verify(batching)
            except Exception as error:  # whatever a model raises under a batching, that batching is not for it
                reasons.append(f"{name} is not possible: {_one_line(error)}")
                continue
            reasons.append(f"{name} equals plain autograd on two tasks, {probe.measure()}: taken")
            reasons += [probe.note] * bool(probe.note)
            chosen = _batching.WAYS[name](self.parameters, self.loss)
            if isinstance(batching, _batching.Folded) and isinstance(chosen, _batching.Folded):
                chosen.fold.record, chosen.fold.recording = batching.fold.record, False
            return self._sized(name, hvp, saved, tasks_of(support), inner_steps, reasons), chosen
        raise ValueError("MAML: no batching is exact for this model and loss:\n  " + "\n  ".join(reasons))

    def _sized(self, name: str, hvp: str, saved: int, tasks: int, inner_steps: int, reasons: list[str]) -> Plan:
        adapted = self.parameters.adapted.values()
        device = next(iter(adapted)).device
        copy_bytes = sum(p.numel() * p.element_size() for p in adapted)
        working, free = saved + 3 * copy_bytes, _free_bytes(device)
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
                f"{strategy}: the graph of {inner_steps} steps, {_mib(stored)}, {fits} a quarter of what is free"
            )
        if strategy == "recompute":  # which keeps the parameters of every step
            working += inner_steps * copy_bytes
        chunk = fitting(working)
        if not isinstance(wish, int):
            reasons.append(
                f"{min(chunk, tasks)} of {tasks} tasks at once: {_mib(working)} a task, {_mib(room)} of {where}"
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
        if self.batching not in ("auto", *_batching.WAYS):
            raise ValueError(f"MAML: batching must be auto, fold, vmap or loop, got {self.batching!r}")
        if self.strategy not in ("auto", "store", "recompute"):
            raise ValueError(f"MAML: strategy must be auto, store or recompute, got {self.strategy!r}")
        chunk = self.task_chunk
        if chunk != "auto" and not (isinstance(chunk, int) and chunk >= 1):
            raise ValueError(f'MAML: task_chunk must be "auto" or at least 1, got {chunk!r}')


def refuse_batch_norm(model: nn.Module) -> None:
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
            raise ValueError(
                f"MAML: batch-norm must be in eval mode, got {name!r} in training mode, where it mixes examples and "
                "changes its statistics inside the inner loop: call .eval() on it, or use layer or group norm"
            )


class _Probe:
    """Two tasks, parameters that differ between them, and the truth about them by plain autograd."""

    def __init__(
        self, model: nn.Module, adapt: Sequence[str], loss: Loss, support: Any, first_order: bool, tolerance: float
    ) -> None:
        self.parameters, self.loss, self.tolerance = Parameters(model, lambda name: name in adapt), loss, tolerance
        self.first_order, self.worst, self.note = first_order, 0.0, ""
        index = torch.arange(2) % tasks_of(support)
        self.batch = select(support, index.to(next(model.parameters()).device))
        random = torch.Generator().manual_seed(0)

        def noise(p: Tensor) -> Tensor:
            return torch.randn(2, *p.shape, generator=random, dtype=torch.float64).to(p)

        theta = [p.detach() for p in self.parameters.adapted.values()]
        self.phi = [p + 0.05 * (p.abs().mean() + 0.01) * noise(p) for p in theta]
        self.v = [noise(p) for p in theta]
        self.shared = list(self.parameters.shared.values())
        self.truth = self._truth()

    @classmethod
    def of(cls, parameters: Parameters, loss: Loss, support: Any, first_order: bool) -> _Probe:
        """In float64 where that is affordable and the model allows it, else in the model's own dtype."""
        model, adapted = parameters.model, tuple(parameters.adapted)
        if sum(p.numel() for p in model.parameters()) <= FLOAT64_PARAMETERS:
            try:
                double = tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, support)
                return cls(_quiet_twin(model, torch.float64), adapted, loss, double, first_order, TOLERANCE)
            except (RuntimeError, TypeError):  # the model or the loss insists on a dtype
                pass
        low = any(p.dtype in (torch.bfloat16, torch.float16) for p in model.parameters())
        return cls(_quiet_twin(model), adapted, loss, support, first_order, 5e-2 if low else 1e-3)

    def measure(self) -> str:
        return f"worst relative error {self.worst:.0e} in {str(self.phi[0].dtype).removeprefix('torch.')}"

    def _truth(self) -> list[list[Tensor | None]]:
        """[losses, gradients of each parameter, Hessian-vector products of each parameter] of plain autograd."""
        model, names = self.parameters.model, list(self.parameters.adapted)
        buffers = {name: (b, b.detach().clone()) for name, b in model.named_buffers()}
        rows: list[tuple] = []
        for t in range(2):
            with torch.no_grad():
                for name, value in zip(names, self.phi, strict=True):
                    self.parameters.adapted[name].copy_(value[t])
            adapted = list(self.parameters.adapted.values())
            with comparable(), _batching.exact_kernels(), torch.enable_grad():
                value = _batching.scalar(self.loss(model, select(self.batch, t)))
                grads = _grad(value, [*adapted, *self.shared], create_graph=not self.first_order)
                if all(g is None for g in grads[: len(adapted)]):
                    raise ValueError("MAML: loss must depend on an adapted parameter, got one with no gradient for any")
                pairs = [(g, v[t]) for g, v in zip(grads, self.v, strict=False) if g is not None]
                products = _grad([g for g, _ in pairs], [*adapted, *self.shared], [v for _, v in pairs])
            rows.append((value.detach(), grads, products))
        for name, (buffer, before) in buffers.items():
            if not torch.equal(buffer, before):
                raise ValueError(
                    f"MAML: buffers must not change in a forward pass, got {name!r}: call .eval() on its module"
                )
        losses = torch.stack([value for value, _, _ in rows])
        n = len(names)
        return [[losses], *(_both(rows[0][i], rows[1][i], n) for i in (1, 2))]

    def verify(self, batching: Batching) -> tuple[str, int]:
        """The mode of its Hessian-vector products ("forward" or "reverse"), and the bytes a task saves for backward."""
        if isinstance(batching, _batching.Folded):
            batching.fold.within = comparable  # a mode does not reach through the step out of vmap
            self._trace(batching)
        saved: dict[int, int] = {}

        def count(tensor: Tensor) -> Tensor:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with comparable(), _batching.exact_kernels(), torch.enable_grad():
            leaves = [p.detach().requires_grad_() for p in self.phi]
            with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
                losses = batching.losses(leaves, self.batch)
            grads = [g if g is None else g.detach() for g in _grad(losses.sum(), [*leaves, *self.shared])]
            self._compare("loss", [losses.detach()], self.truth[0])
            self._compare("gradient", grads, self.truth[1])
            for p in (*leaves, *self.parameters.model.parameters()):
                saved.pop(p.untyped_storage().data_ptr(), None)
            element = next(iter(self.parameters.adapted.values())).element_size()
            bytes_a_task = sum(saved.values()) * 4 // (2 * max(element, 4))
            if self.first_order:
                return "reverse", bytes_a_task
            self._compare("Hessian-vector product", self._products(batching, "reverse"), self.truth[2])
            try:
                self._compare("Hessian-vector product", self._products(batching, "forward"), self.truth[2])
            except RuntimeError as error:
                self.note = (
                    f"Hessian-vector products reverse over reverse, for want of forward mode: {_one_line(error)}"
                )
                return "reverse", bytes_a_task
        return "forward", bytes_a_task

    def _products(self, batching: Batching, hvp: str) -> Sequence[Tensor | None]:
        unroll = Unroll(batching, SGD(), steps=1, hvp=hvp)
        return unroll.hessian_vector_product(self.phi, self.shared, self.batch, self.v)[1]

    def _trace(self, batching: _batching.Folded) -> None:
        """Records which tensors carry the tasks: those whose first dimension follows their number."""
        records = []
        with comparable(), _batching.exact_kernels(), torch.no_grad():
            for tasks in (2, 3):
                index = torch.arange(tasks, device=self.phi[0].device) % 2
                batching.fold.recording = True
                batching.losses([p[index] for p in self.phi], select(self.batch, index))
                records.append(batching.fold.record)
        batching.fold.agree(records[0])

    def _compare(self, what: str, found: Sequence[Tensor | None], truth: Sequence[Tensor | None]) -> None:
        norms = [0.0 if t is None else t.norm().item() for t in truth]
        for i, (a, b) in enumerate(zip(found, truth, strict=True)):
            if a is None and b is None:
                continue
            a, b = _aligned(a, b)
            error = (a - b).norm().item() / max(norms[i], 1e-3 * max(norms), 1e-30)
            if not error <= self.tolerance:
                raise _MismatchError(f"its {what} differs from plain autograd's by {error:.0e}")
            self.worst = max(self.worst, error)


def _quiet_twin(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """A copy whose modules that drop units inside of their kernels do not."""
    copied = twin(model, dtype)
    for module in copied.modules():
        if isinstance(module, nn.RNNBase | nn.MultiheadAttention):
            module.dropout = 0.0
    return copied


class _MismatchError(RuntimeError):
    """A candidate's numbers are not plain autograd's."""


class comparable(TorchFunctionMode):  # noqa: N801, a context manager
    """Dropout is the identity, and what has derivatives stays float64: two ways to a loss can only be compared so."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
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


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):  # not every system tells
        return 4 * 2**30


def _mib(size: float) -> str:
    return f"{size / 2**20:.1f} MiB"


def _one_line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:160]}" if text else type(error).__name__
