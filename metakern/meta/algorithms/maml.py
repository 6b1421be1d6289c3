"""Model-agnostic meta-learning (MAML) with the exact second-order meta-gradient.

    phi_0 = theta        phi_{k+1} = U(phi_k, grad S_t(phi_k))        L(theta) = mean_t Q_t(phi_K)

Finn, Abbeel, Levine 2017, "Model-agnostic meta-learning for fast adaptation of deep networks", algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from metakern.meta.batches import Outer, PerStep, at_step, ordinary, per_step, same_tasks, tasks_of
from metakern.meta.batching import Loss
from metakern.meta.engine import Engine, Prepared
from metakern.meta.parameters import Adapt, Parameters
from metakern.meta.plan import Plan, Wishes
from metakern.meta.precision import check, in_precision
from metakern.meta.threads import running
from metakern.meta.unroll import Gradients, Unroll, added, derivatives
from metakern.optim import SGD, InnerOptimizer

Until = Callable[[int, dict[str, Tensor]], bool]


class MAML(nn.Module):
    """Exact second-order MAML for any `nn.Module`.

    `maml(support, query)` adapts the parameters to each task by `steps` inner steps on its support batch, and returns
    the mean query loss over the tasks, a scalar. Its `backward()` adds the meta-gradient to the parameters' `.grad`.

    A batch is a tree of tensors (tuples, lists, dictionaries, dataclasses) with the tasks along dimension 0 of every
    tensor, `[T, ...]`. Anything in it that is not a tensor is the same for all tasks. A `metakern.PerStep` holds a
    batch for each inner step.

    `strategy`, `batching`, `task_chunk`, `memory`, `weights` and `capture` change time and memory, not the numbers (up
    to rounding). `maml.plan` shows what was chosen, and why.

    Args:
        model: The model; its parameters are the shared initialisation theta. MAML does not modify it.
        loss: `loss(model, batch)` returns the loss of one task, a scalar tensor. It calls the model as usual, on a
            batch without the task dimension.
        inner: The optimizer of the inner loop; by default `metakern.optim.SGD()`.
        steps: The number of inner steps, K, at least 0.
        first_order: Treat the inner gradients as constants. The meta-gradient is then cheaper, and biased.
        adapt: Which parameters the inner loop changes: None for all that require a gradient, a list of name patterns
            (`["head.*"]`), or a predicate on names. The others are meta-learned, but not adapted.
        strategy: "store" keeps the graph of all inner steps. "recompute" keeps only the parameters of some steps and
            computes each step again in the backward pass. "auto" stores where the graph fits a quarter of the free
            memory.
        batching: "fold" puts the tasks into the model's batch dimension, "vmap" maps the loss over the tasks by
            `torch.func.vmap`, and "loop" runs one task at a time. "auto" takes the first of them that equals plain
            autograd on two tasks of the batch.
        task_chunk: How many tasks are computed at once. "auto" takes as many as need 192 MiB of memory on a CPU, or
            half of a GPU's free memory.
        capture: Whether to record the kernel calls of a meta-gradient and repeat them for later batches whose tasks
            have the same shapes, without Python or autograd: on a CPU in C++, on a GPU as a CUDA graph, which needs
            batches of one number of tasks. True records at the first call, and warns if it can't. "auto" records at the
            third call with such tasks (at the twelfth, if an operation has no instruction in C++), and never warns.
            False never records. What the model and the loss read besides tensors is guarded, and some calls are
            compared with an ordinary run (see `metakern.meta.capture`).
        memory: "least" takes less memory and more time: one task at a time, and "recompute" with the parameters of
            still fewer inner steps. `strategy` and `task_chunk` go before it.
        precision: None, or "bfloat16" to round the operands of every product of matrices to bfloat16, on a CPU. Sums,
            parameters, losses, norms, softmax and the states of optimizers stay float32. The derivatives are those of
            the float32 model at all orders, with each of their products evaluated in bfloat16, so the meta-gradient
            is that of the model up to the rounding. Products with vectors and convolutions stay float32.
        query_weights: The weights of the query losses after 0, 1, ..., K inner steps in the outer loss (Antoniou,
            Edwards, Storkey 2019, "How to train your MAML", section 4), `steps` + 1 numbers. A loss of weight 0 is not
            computed. None counts the loss after K steps alone. It may be set anew at each call.
        weights: "implicit" does not form the weights that tasks have of linear layers and embeddings: a layer computes
            its output from the shared weight, the inputs that it saw in earlier inner steps, and the cotangents of its
            outputs there. Memory then grows with the number of tokens in place of these weights. It needs batching
            "fold" and gradient descent with rates for whole parameters, as `metakern.optim.SGD`, `NormalizedSGD` and
            `Clipped` take; weights for which it is not possible stay "explicit". "auto" takes it for large weights
            that see few tokens.

    Attributes:
        query_losses: The outer loss of each task at the last call, `[T]`, detached; None before the first call.

    Raises:
        TypeError: `model` is not an `nn.Module`, `loss` is not callable, `inner` is not an optimizer of
            `metakern.optim`, `first_order` is not a bool, or `adapt` is not None, a predicate or strings.
        ValueError: Another argument has a value that is not named above; the model has no trainable parameters;
            `adapt` matches no parameter, or one that does not require a gradient; or `inner` has learned values for
            parameters of other shapes. At a call: `precision` is "bfloat16" inside `torch.autocast`, or where a
            parameter is not float32 or not on a CPU.
        RuntimeError: `precision` is "bfloat16", and the C++ kernels are missing.

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
        memory: str = "auto",
        precision: str | None = None,
        query_weights: Sequence[float] | None = None,
        weights: str = "auto",
    ) -> None:
        super().__init__()
        if not callable(loss) or type(loss).__module__ == "torch.nn.modules.loss":
            raise TypeError(
                f"MAML: loss must be a function of (model, batch), got {type(loss).__name__}: mk.losses.classification "
                "is one, or write lambda model, batch: criterion(model(batch[0]), batch[1])"
            )
        inner = _optimizer(SGD() if inner is None else inner)
        check(precision, ())
        engine = _engine_of(model, adapt, Wishes(batching, strategy, task_chunk, memory, weights), inner)
        self.model, self.inner = model, inner
        self.loss, self.steps, self.first_order, self.capture = loss, steps, first_order, capture
        self.precision, self.query_weights = precision, query_weights
        if query_weights is not None:
            _checked(query_weights, steps)
        self._engine = engine
        self.query_losses: Tensor | None = None  # [T]

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _CHECKS:
            _CHECKS[name](value)
        if name == "loss" and not isinstance(value, nn.Module):
            self._modules.pop("loss", None)  # nn.Module refuses to replace a submodule by a plain function
        if name == "model" and "_engine" in self.__dict__:
            self._engine = _engine_of(value, self._engine.adapt, self._engine.wishes, self.inner)
        super().__setattr__(name, value)

    @property
    def plan(self) -> Plan:
        """The plan of the last batch: its batching, strategy and chunk of tasks, and the reasons for each.

        Raises:
            RuntimeError: No batch was seen yet.
        """
        if self._engine.last is None:
            raise RuntimeError("MAML: plan must be read after a batch was seen, got none: call maml(support, query)")
        plan = self._engine.last.explained
        note = "precision bfloat16: products of matrices take operands rounded to bfloat16; all else is float32"
        return plan if self.precision is None else replace(plan, reasons=(*plan.reasons, note))

    def forward(self, support: Any, query: Any) -> Tensor:
        """Return the mean outer loss over the tasks, a scalar: of the query loss after adaptation, or as weighted.

        Its `backward()` adds the meta-gradient to `.grad`; derivatives of the meta-gradient raise NotImplementedError.
        Where gradients are disabled (`torch.no_grad`), only the loss is computed.

        Args:
            support: The batch of the inner steps, a tree of tensors `[T, ...]`; or a function of the number of an inner
                step, from 0, that returns its batch.
            query: The batch of the outer loss, a tree of tensors `[T, ...]`, with the same tasks.

        Raises:
            ValueError: A batch is not a tree of tensors with one number of tasks; a `PerStep` has too few batches, or
            `query_weights` has not `steps` + 1 finite numbers, one of them not 0; the loss is not a scalar, is not
                finite when the plan is verified, or depends on no adapted parameter; no batching is exact for this
                model and loss; or second derivatives are lost (`metakern.doctor` finds the place).
            RuntimeError: A later batch can't be folded like the first one, and `batching` is "fold", or earlier chunks
                of the batch are computed already: use "vmap" or "loop".
            StaleCaptureError: A captured program no longer equals an ordinary run, because something changed that no
                guard sees.
        """
        return self._mean(support, query)

    def _mean(self, support: Any, query: Any, start: Mapping[str, Tensor] | None = None) -> Tensor:
        """Return the mean outer loss, as `forward` does; `start`: what the adapted parameters start from."""
        support = per_step(support, self.steps)
        outer = self._outer(query, same_tasks(support, query))
        _reaches(support, query, outer.last)
        if not torch.is_grad_enabled():
            losses = self.evaluate(support, query, outer.steps, start)
            self.query_losses = losses[0] if outer.weights is None else (losses * outer.weights.T).sum(0)
            return self.query_losses.mean()
        given = [] if start is None else self._given(self._prepare(support, outer, outer=True), support, start)
        self.query_losses, gradients, leaves = self._gradients(support, outer, *given)
        return meta_gradient(self.query_losses, gradients, leaves)

    def _gradients(self, support: Any, outer: Outer, *start: list[Tensor]) -> tuple[Tensor, Gradients, list[Tensor]]:
        """Return the outer losses `[T]`, the gradients of their sum, and the leaves that these are gradients of.

        `start` may hold one list, of tensors `[T, *shape]`: what the adapted parameters start from in place of theta.
        Its derivative with respect to theta counts as the identity.
        """
        support, outer = ordinary(support), ordinary(outer)
        prepared = self._prepare(support, outer, outer=True)
        leaves = [*prepared.outer, *self._beside(prepared)]
        gradients: Gradients = [None] * len(leaves)
        losses = []
        run = partial(self._meta_gradient, prepared)
        if self.capture is True or (self.capture and prepared.outer[0].device.type in ("cpu", "cuda")):
            captures = prepared.captures(self.capture, self.precision, **self._others())
            captures.begin()
            run = partial(captures, run)
        else:
            run = in_precision(self.precision)(run)
        for found in prepared.by_chunks(run, support, outer, more=start):
            losses.append(found[0])
            gradients = added(gradients, found[1:])
            del found
        return torch.cat(losses), gradients, leaves

    def adapt(
        self,
        support: Any,
        steps: int | None = None,
        start: Mapping[str, Tensor] | None = None,
        until: Until | None = None,
    ) -> dict[str, Tensor]:
        """Return the adapted parameters of each task.

        Args:
            support: The batch of the inner steps, a tree of tensors `[T, ...]`.
            steps: The number of inner steps; by default that of the constructor.
            start: What an earlier call returned, to adapt further from there: continual adaptation. The optimizer's
                state begins anew. By default the shared initialisation.
            until: `until(k, phi)` is called with the parameters phi_k `[T, *shape]` by name after k = 0, 1, 2, … inner
                steps, and ends the adaptation with them if it returns True. It gets the tasks of one chunk at a time,
                and k begins at 0 again for the next chunk, or if the plan has to change.

        Returns:
            A dictionary from the name of each adapted parameter to a detached tensor `[T, *shape]`.

        Raises:
            ValueError: `steps` is not an integer of at least 0; `start` has not exactly the adapted parameters, each
                `[T, *shape]`; or as for a call.
            TypeError: `until` is not a function.

        >>> import torch, metakern as mk
        >>> maml = mk.MAML(torch.nn.Linear(8, 4), mk.losses.classification, steps=3)
        >>> phi = maml.adapt((torch.randn(5, 10, 8), torch.randint(4, (5, 10))))
        >>> phi["weight"].shape
        torch.Size([5, 4, 8])
        """
        steps = self.steps if steps is None else non_negative(steps)
        if until is not None and not callable(until):
            raise TypeError(f"MAML: until must be a function of (k, phi), got {type(until).__name__}")
        support = per_step(support, steps)
        _reaches(support, None, steps)
        if torch.is_inference_mode_enabled():
            with torch.inference_mode(False):
                return self.adapt(ordinary(support), steps, start, until)
        prepared = self._prepare(support)

        @in_precision(self.precision)
        def compute(support: Any, *start: list[Tensor]) -> list[Tensor]:
            unroll = self._loop(prepared, *start)
            for k, phi in enumerate(self._trajectory(prepared, support, steps, *start)):
                if until is not None:
                    formed = unroll.formed(phi)
                    if until(k, dict(zip(prepared.parameters.adapted, formed, strict=True))):
                        return formed
            return unroll.formed(phi)

        given = self._given(prepared, support, start)
        chunks = list(prepared.by_chunks(compute, support, more=given))
        phi = (torch.cat(parts).detach().clone() for parts in zip(*chunks, strict=True))
        return dict(zip(prepared.parameters.adapted, phi, strict=True))

    def evaluate(
        self,
        support: Any,
        query: Any,
        steps: Sequence[int] = (0, 1, 3, 5, 10),
        start: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Return the query losses after several numbers of inner steps (the adaptation curve).

        Args:
            support: The batch of the inner steps, a tree of tensors `[T, ...]`.
            query: The batch of the losses, a tree of tensors `[T, ...]`, with the same tasks.
            steps: The numbers of inner steps after which the query loss is computed.
            start: As for `adapt`.

        Returns:
            A detached tensor `[len(steps), T]`.

        Raises:
            ValueError: `steps` is empty or holds something other than integers of at least 0, or as for a call.

        >>> import torch, metakern as mk
        >>> maml = mk.MAML(torch.nn.Linear(8, 4), mk.losses.classification)
        >>> x, y = torch.randn(5, 10, 8), torch.randint(4, (5, 10))
        >>> maml.evaluate((x, y), (x, y), steps=(0, 1)).shape
        torch.Size([2, 5])
        """
        return self.curves(support, [query], steps, start)[0]

    def curves(
        self,
        support: Any,
        queries: Sequence[Any],
        steps: Sequence[int] = (0, 1, 3, 5, 10),
        start: Mapping[str, Tensor] | None = None,
    ) -> Tensor:
        """Return what `evaluate` returns for each of several query batches, from one adaptation.

        Args:
            support: As for `evaluate`.
            queries: The batches of the losses, at least one, each as for `evaluate`.
            steps: As for `evaluate`.
            start: As for `adapt`.

        Returns:
            A detached tensor `[len(queries), len(steps), T]`.

        Raises:
            ValueError: `queries` is empty, or as `evaluate` raises it.
        """
        wanted = counts(steps)
        support, queries = per_step(support, max(wanted)), list(queries)
        if not queries:
            raise ValueError("MAML: queries must hold at least one batch, got none")
        for query in queries:
            same_tasks(support, query)
        if torch.is_inference_mode_enabled():  # adaptation takes gradients
            with torch.inference_mode(False):
                return self.curves(ordinary(support), list(map(ordinary, queries)), steps, start)
        prepared = self._prepare(support, *queries)
        for query in queries:
            _reaches(support, query, max(wanted))

        @in_precision(self.precision)
        def compute(support: Any, *more: Any) -> Tensor:
            queries, start = more[:asked], more[asked:]
            unroll = self._loop(prepared, *start)
            trajectory = enumerate(self._trajectory(prepared, support, max(wanted), *start))
            losses = {k: [unroll.query(phi, at_step(q, k)) for q in queries] for k, phi in trajectory if k in wanted}
            return torch.stack([loss for k in wanted for loss in losses[k]])

        asked, given = len(queries), self._given(prepared, support, start)
        found = torch.cat(list(prepared.by_chunks(compute, support, *queries, more=given)), dim=1)
        return found.view(len(wanted), asked, -1).transpose(0, 1)

    def _outer(self, query: Any, tasks: int) -> Outer:
        """Return the outer loss by `steps` and `query_weights`."""
        if self.query_weights is None:
            return Outer(query, (self.steps,))
        weights = _checked(self.query_weights, self.steps)
        counted = tuple(k for k, weight in enumerate(weights) if weight)
        return Outer(query, counted, self._weights([weights[k] for k in counted], tasks))

    def _weights(self, weights: Sequence[float], tasks: int) -> Tensor:
        """Return the weights of query losses for each task, `[tasks, len(weights)]`."""
        return next(self.model.parameters()).new_tensor(weights).expand(tasks, -1)

    def _meta_gradient(
        self, prepared: Prepared, support: Any, outer: Outer, *start: list[Tensor]
    ) -> list[Tensor | None]:
        """Return the outer losses `[T]` of one chunk of tasks, then the gradients of their sum.

        The gradients are in the order of `prepared.outer`.
        """
        with torch.enable_grad():
            own = {} if start else self._initial(prepared, support)
        unroll = self._loop(prepared, *start)
        compute = unroll.store if prepared.plan.strategy == "store" else unroll.recompute
        theta = start[0] if start else prepared.theta(tasks_of(support), own)
        found = compute(theta, prepared.shared, support, outer)
        if not own:
            return [found.losses, *found.summed, *found.shared, *found.hyper]
        names = list(prepared.parameters.adapted)
        ct_own = {name: ct for name, ct in zip(names, found.theta, strict=True) if name in own and ct is not None}
        ct_theta = [None if name in own else ct for name, ct in zip(names, found.summed, strict=True)]
        beside = self._beside(prepared)
        through = derivatives([own[name] for name in ct_own], [*prepared.outer, *beside], list(ct_own.values()))
        direct = [*ct_theta, *found.shared, *found.hyper, *[None] * len(beside)]
        return [found.losses, *added(direct, through)]

    def _initial(self, prepared: Prepared, support: Any) -> dict[str, Tensor]:
        """Return the initial values `[T, *shape]` of adapted parameters that depend on the task, by name.

        The others start at the shared parameters. The values come with their graph: the gradient with respect to them
        is pulled back through it to the parameters that they were computed from.
        """
        return {}

    def _others(self) -> dict[str, Any]:
        """Return what else a meta-gradient depends on, by name: settings, and modules that compute initial values."""
        return {}

    def _beside(self, prepared: Prepared) -> list[Tensor]:
        """Return the trainable parameters of the modules in `_others` that are not in `prepared.outer`, each once."""
        modules = [module for module in self._others().values() if isinstance(module, nn.Module)]
        parameters = {id(p): p for module in modules for p in module.parameters() if p.requires_grad}
        known = set(map(id, prepared.outer))
        return [p for key, p in parameters.items() if key not in known]

    def _theta(self, prepared: Prepared, support: Any, *start: list[Tensor]) -> list[Tensor]:
        """Return phi_0 of the tasks of a batch, or what they are to start from instead, without a graph."""
        if start:
            return start[0]
        with torch.no_grad():
            return prepared.theta(tasks_of(support), self._initial(prepared, support))

    def _trajectory(self, prepared: Prepared, support: Any, steps: int, *start: list[Tensor]) -> Iterator[list[Tensor]]:
        """Yield phi_0, …, phi_steps of the tasks of a batch, without a graph."""
        return self._loop(prepared, *start).trajectory(self._theta(prepared, support, *start), support, steps)

    def _loop(self, prepared: Prepared, *start: list[Tensor]) -> Unroll:
        """Return the inner loop: with explicit weights if the tasks do not all start from the shared ones."""
        return prepared.explicit if start or type(self)._initial is not MAML._initial else prepared.unroll

    def _given(self, prepared: Prepared, support: Any, start: Mapping[str, Tensor] | None) -> list[list[Tensor]]:
        """Return what the user wants the adapted parameters to start from, as a list of one list; [] for None."""
        if start is None:
            return []
        theta = prepared.theta(tasks_of(support, "support"))
        return [_started(start, dict(zip(prepared.parameters.adapted, theta, strict=True)))]

    def _optimizer(self) -> InnerOptimizer:
        """Return the optimizer of the inner loop."""
        return self.inner

    def _prepare(self, *batches: Any, outer: bool = False) -> Prepared:
        """Return the verified plan for these batches, support first. `outer`: also for meta-gradients."""
        check(self.precision, self.model.parameters())
        with running(self.model):
            return self._engine.prepared(self.loss, self._optimizer(), self.steps, self.first_order, outer, batches)


def meta_gradient(losses: Tensor, gradients: Gradients, parameters: Sequence[Tensor]) -> Tensor:
    """Return the mean of the losses `[T]`; its `backward()` gives the parameters `gradients`, over the number T."""
    return _MetaGradient.apply(losses, gradients, *parameters)


class _MetaGradient(Function):
    """The one autograd node of a meta-step: the mean of the losses `[T]`, given the gradients of their sum.

    Its inputs are the parameters.
    """

    @staticmethod
    def forward(ctx: Any, losses: Tensor, gradients: Gradients, *parameters: Tensor) -> Tensor:
        ctx.gradients, ctx.parameters, ctx.tasks = gradients, parameters, len(losses)
        return losses.mean()

    @staticmethod
    def backward(ctx: Any, ct: Tensor) -> tuple:
        return (None, None, *_Known.apply(ctx.gradients, ct / ctx.tasks, *ctx.parameters))


class _Known(Function):
    """The meta-gradient as a function of the parameters, so that its derivative is an error and not zero."""

    @staticmethod
    def forward(ctx: Any, gradients: Gradients, ct: Tensor, *parameters: Tensor) -> tuple:
        present = [g for g in gradients if g is not None]
        if present and all(g.dtype == ct.dtype and g.device == ct.device for g in present):
            scaled = iter(torch._foreach_mul(present, ct))
        else:
            scaled = (g * ct.to(g.dtype) for g in present)
        return tuple(None if g is None else next(scaled) for g in gradients)

    @staticmethod
    def backward(ctx: Any, *ct: Tensor) -> tuple:
        raise NotImplementedError("MAML: derivatives of the meta-gradient are not implemented")


def _reaches(support: Any, query: Any, steps: int) -> None:
    """Check that batches which differ from step to step hold one for each of `steps` inner steps."""
    for batch, what, count in ((support, "support", steps), (query, "query", steps + 1)):
        if isinstance(batch, PerStep) and len(batch.batches) < count:
            raise ValueError(
                f"MAML: {what} must hold {count} batches for {steps} inner steps, got {len(batch.batches)}"
            )


def _checked(weights: Any, steps: int) -> list[float]:
    if isinstance(weights, str | Tensor) or not isinstance(weights, Sequence) or len(weights) != steps + 1:
        raise ValueError(f"MAML: query_weights must be {steps + 1} numbers, for 0 to {steps} steps, got {weights!r}")
    numbers = all(isinstance(w, int | float) and not isinstance(w, bool) and isfinite(w) for w in weights)
    if not numbers or not any(weights):
        raise ValueError(f"MAML: query_weights must be finite numbers, not all 0, got {weights!r}")
    return [float(w) for w in weights]


def _started(start: Any, theta: dict[str, Tensor]) -> list[Tensor]:
    """Return the tensors of `start` in the order of theta, with its dtypes and devices; check names and shapes."""
    shapes = {name: tuple(p.shape) for name, p in theta.items()}
    given = None
    if isinstance(start, Mapping):
        given = {name: tuple(p.shape) if isinstance(p, Tensor) else None for name, p in start.items()}
    if given != shapes:
        wrong = sorted(name for name in {**shapes, **(given or {})} if (given or {}).get(name) != shapes.get(name))
        raise ValueError(
            "MAML: start must hold each adapted parameter for each task, as adapt() returns them, got another "
            + (f"{wrong[0]!r}" if given is not None else type(start).__name__)
        )
    return [start[name].detach().to(p) for name, p in theta.items()]


def _engine_of(model: Any, adapt: Adapt, wishes: Wishes, inner: InnerOptimizer) -> Engine:
    if not isinstance(model, nn.Module):
        raise TypeError(f"MAML: model must be an nn.Module, got {type(model).__name__}")
    engine = Engine(model, adapt, wishes)
    with running(model):
        inner.prepare(Parameters(model, adapt).adapted)
    return engine


def counts(steps: Any) -> list[int]:
    """Return the numbers of inner steps of an adaptation curve. Raises ValueError where they are no such sequence."""
    if not isinstance(steps, Sequence):
        raise ValueError(f"MAML: steps must be a sequence of numbers of inner steps, got {_shown(steps)}")
    if not len(steps):
        raise ValueError("MAML: steps must name at least one number of inner steps, got none")
    return [non_negative(step) for step in steps]


def non_negative(steps: int) -> int:
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 0:
        raise ValueError(f"MAML: steps must be an integer of at least 0, got {_shown(steps)}")
    return steps


def _optimizer(inner: Any) -> InnerOptimizer:
    if not isinstance(inner, InnerOptimizer):
        got = inner if isinstance(inner, type) else type(inner)
        raise TypeError(
            "MAML: inner must be an optimizer of metakern.optim, such as mk.optim.SGD(lr=0.1), got "
            f"{got.__module__}.{got.__qualname__}{' itself' if inner is got else ''}"
        )
    return inner


def _order(first_order: Any) -> None:
    if not isinstance(first_order, bool):
        raise TypeError(f"MAML: first_order must be True or False, got {first_order!r}")


def _captured(capture: Any) -> None:
    if not isinstance(capture, bool) and capture != "auto":
        raise ValueError(f'MAML: capture must be "auto", True or False, got {capture!r}')


_CHECKS: dict[str, Callable[[Any], Any]] = {  # of attributes that may be set between calls
    "steps": non_negative,
    "inner": _optimizer,
    "first_order": _order,
    "capture": _captured,
}


def refuse(of: str, options: Mapping[str, Any], *names: str) -> None:
    """Raise TypeError if `options` has one of these names, which the algorithm `of` sets itself."""
    for name in names:
        if name in options:
            raise TypeError(f"{of}: {name} must not be given, since it sets its own, got {options[name]!r}")


def _shown(value: Any) -> str:
    return repr(value) if isinstance(value, int | float | str | None) else type(value).__name__
