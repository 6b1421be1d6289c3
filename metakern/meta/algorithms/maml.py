"""Model-agnostic meta-learning, with the exact second-order meta-gradient.

    phi_0 = theta        phi_{k+1} = U(phi_k, grad S_t(phi_k))        L(theta) = mean_t Q_t(phi_K)

Finn, Abbeel, Levine 2017, "Model-agnostic meta-learning for fast adaptation of deep networks", algorithm 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from metakern.meta.batches import ordinary, tasks_of
from metakern.meta.batching import Loss
from metakern.meta.engine import Engine, Prepared, running
from metakern.meta.parameters import Adapt, Parameters
from metakern.meta.plan import Plan, Wishes
from metakern.meta.unroll import Gradients, added
from metakern.optim import SGD, InnerOptimizer


class MAML(nn.Module):
    """Exact second-order MAML for any module.

    A call with support and query batches gives the mean query loss over their tasks after `steps` inner steps, a
    scalar. Its `backward()` adds the meta-gradient to the parameters' `.grad`. Batches are trees of tensors with the
    tasks along dimension 0: tuples, dictionaries, dataclasses; what is no tensor in them is the same for all tasks.

    Args:
        model: Any `nn.Module`. It is left as it is.
        loss: `loss(model, batch)` is the loss of one task, a scalar tensor; it calls the model as usual.
        inner: The optimizer of the inner loop; by default `metakern.optim.SGD()`.
        steps: The number of inner steps, K.
        first_order: Take the inner gradients for constants.
        adapt: Which parameters the inner loop changes: None for all, name patterns ("head.*"), or a predicate on names.
            The others are meta-learned all the same.
        strategy: "store" keeps the graph of all steps, "recompute" the parameters alone; "auto" chooses by what is
            free.
        batching: "fold" puts the tasks into the model's batch dimension, "vmap" maps the loss over them, "loop" takes
            one at a time; "auto" takes the first that is exact.
        task_chunk: So many tasks at once; "auto" chooses by the caches, or by a GPU's memory.
        capture: On a CPU, whether to record the kernels of a meta-gradient and run them in C++ for batches of the same
            shapes, without Python or autograd. "auto" records at the third call with batches of one kind, or later
            where that takes longer, and never warns; True at the first, and warns where it can't; False never. What
            model and loss read beside tensors is guarded, and audited now and then (`metakern.meta.capture`).

    Raises:
        TypeError, ValueError: For arguments of another kind or out of range.
        ValueError: At a call, where no batching is exact for this model and loss, or second derivatives are lost.
        StaleCaptureError: At a call, where an audit finds that something changed which no guard sees.

    `maml.plan` says what was chosen and why; `maml.query_losses` has the losses of the last call, [T]. All choices give
    the same numbers.

    >>> import torch, metakern as mk
    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))
    >>> maml = mk.MAML(model, mk.losses.classification, inner=mk.optim.SGD(lr=0.1), steps=3)
    >>> x, y = torch.randn(5, 10, 8), torch.randint(4, (5, 10))
    >>> maml((x, y), (x, y)).backward()
    >>> model[0].weight.grad.shape
    torch.Size([16, 8])
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        inner: InnerOptimizer | None = None,
        steps: int = 1,
        first_order: bool = False,
        adapt: Adapt = None,
        strategy: str = "auto",
        batching: str = "auto",
        task_chunk: int | str = "auto",
        capture: bool | str = "auto",
    ) -> None:
        super().__init__()
        if not isinstance(model, nn.Module):
            raise TypeError(f"MAML: model must be an nn.Module, got {type(model).__name__}")
        if not callable(loss):
            raise TypeError(f"MAML: loss must be a function of (model, batch), got {type(loss).__name__}")
        if inner is not None and not isinstance(inner, InnerOptimizer):
            raise TypeError(f"MAML: inner must be one of metakern.optim's optimizers, got {type(inner).__name__}")
        if not isinstance(first_order, bool):
            raise TypeError(f"MAML: first_order must be True or False, got {first_order!r}")
        if not isinstance(capture, bool) and capture != "auto":
            raise ValueError(f'MAML: capture must be "auto", True or False, got {capture!r}')
        self.model, self.inner = model, SGD() if inner is None else inner
        self.loss, self.steps, self.first_order, self.capture = loss, _non_negative(steps), first_order, capture
        self._engine = Engine(model, adapt, Wishes(batching, strategy, task_chunk))
        with running(model):
            self.inner.prepare(Parameters(model, adapt).adapted)
        self.query_losses: Tensor | None = None  # of the last call, for each task, [T]

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "loss" and not isinstance(value, nn.Module):
            self._modules.pop("loss", None)  # one that is a module may be followed by a function
        super().__setattr__(name, value)

    @property
    def plan(self) -> Plan:
        """What was chosen for the last batch, and why."""
        if self._engine.last is None:
            raise RuntimeError("MAML: plan must be read after a batch was seen, got none: call maml(support, query)")
        return self._engine.last.explained

    def forward(self, support: Any, query: Any) -> Tensor:
        """The mean query loss over tasks, a scalar; with gradients enabled, its backward() is the meta-gradient."""
        tasks = _count(support, query)
        if not torch.is_grad_enabled():
            self.query_losses = self.evaluate(support, query, (self.steps,))[0]
            return self.query_losses.mean()
        support, query = ordinary(support), ordinary(query)
        prepared = self._prepare(support, query, outer=True)
        gradients: Gradients = [None] * len(prepared.outer)
        losses = []
        run = partial(self._meta_gradient, prepared, 1 / tasks)
        if self.capture is True or (self.capture and prepared.outer[0].device.type == "cpu"):
            run = partial(prepared.captures(self.capture), run, (tasks,))
        for found in prepared.by_chunks(run, support, query):
            losses.append(found[0])
            gradients = added(gradients, found[1:])
        self.query_losses = torch.cat(losses)
        return _MetaGradient.apply(self.query_losses.mean(), gradients, *prepared.outer)

    def adapt(self, support: Any, steps: int | None = None) -> dict[str, Tensor]:
        """The parameters of each task after `steps` inner steps (by default as many as in training), detached.

        Returns {name: [T, *shape]}, for the adapted parameters.
        """
        steps = self.steps if steps is None else _non_negative(steps)
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(False):
                return self.adapt(ordinary(support), steps)
        prepared = self._prepare(support)

        def compute(support: Any) -> list[Tensor]:
            *_, phi = prepared.unroll.trajectory(prepared.theta(tasks_of(support)), support, steps)
            return phi

        chunks = list(prepared.by_chunks(compute, support))
        phi = (torch.cat(parts).detach().clone() for parts in zip(*chunks, strict=True))
        return dict(zip(prepared.parameters.adapted, phi, strict=True))

    def evaluate(self, support: Any, query: Any, steps: Sequence[int] = (0, 1, 3, 5, 10)) -> Tensor:
        """The adaptation curve: query losses after each number of inner steps, [len(steps), T], detached."""
        _count(support, query)
        if not len(steps):
            raise ValueError("MAML: steps must name at least one number of inner steps, got none")
        if torch.is_inference_mode_enabled():  # adaptation takes gradients
            with torch.inference_mode(False):
                return self.evaluate(ordinary(support), ordinary(query), steps)
        prepared = self._prepare(support, query)
        wanted = [_non_negative(step) for step in steps]

        def compute(support: Any, query: Any) -> Tensor:
            theta = prepared.theta(tasks_of(support))
            trajectory = enumerate(prepared.unroll.trajectory(theta, support, max(wanted, default=0)))
            losses = {k: prepared.unroll.query(phi, query) for k, phi in trajectory if k in wanted}
            return torch.stack([losses[k] for k in wanted])

        return torch.cat(list(prepared.by_chunks(compute, support, query)), dim=1)

    def _meta_gradient(self, prepared: Prepared, weight: float, support: Any, query: Any) -> list[Tensor | None]:
        """The part of one chunk of tasks, whose query losses count `weight` each: losses [T], then the gradients."""
        unroll, plan = prepared.unroll, prepared.plan
        compute = unroll.store if plan.strategy == "store" else unroll.recompute
        found = compute(prepared.theta(tasks_of(support)), prepared.shared, support, query, weight)
        return [found.losses, *found.theta, *found.shared, *found.hyper]

    def _prepare(self, *batches: Any, outer: bool = False) -> Prepared:
        """The plan for such batches, support first; `outer`: for a meta-gradient too."""
        with running(self.model):
            return self._engine.prepared(self.loss, self.inner, self.steps, self.first_order, outer, batches)


class _MetaGradient(Function):
    """The one autograd node of a meta-step: its inputs are the parameters, their gradients are known already."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: Gradients, *parameters: Tensor) -> Tensor:
        ctx.gradients, ctx.parameters = gradients, parameters
        return value.clone()

    @staticmethod
    def backward(ctx: Any, ct: Tensor) -> tuple:
        return (None, None, *_Known.apply(ctx.gradients, ct, *ctx.parameters))


class _Known(Function):
    """The meta-gradient depends on the parameters, so that a derivative of it is refused, not taken for zero."""

    @staticmethod
    def forward(ctx: Any, gradients: Gradients, ct: Tensor, *parameters: Tensor) -> tuple:
        return tuple(None if g is None else g * ct.to(g.dtype) for g in gradients)

    @staticmethod
    def backward(ctx: Any, *ct: Tensor) -> tuple:
        raise NotImplementedError("MAML: derivatives of the meta-gradient are not implemented")


def _count(support: Any, query: Any) -> int:
    tasks, others = tasks_of(support, "support"), tasks_of(query, "query")
    if tasks != others:
        raise ValueError(f"MAML: query must have the {tasks} tasks of support, got {others}")
    return tasks


def _non_negative(steps: int) -> int:
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 0:
        raise ValueError(f"MAML: steps must be an integer of at least 0, got {steps!r}")
    return steps
