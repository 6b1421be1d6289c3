"""The places of a loss at which derivatives can be lost: the loss itself, and every call of a module within it.

Each place is judged by itself, as a function of its inputs and parameters. Its outputs y become the scalar

    <c, y> + <d, (y - y_0)²> / 2        c, d random, y_0 the outputs of the place's first evaluation

whose second derivative is not zero even if y is linear: without the square, a linear place that loses its second order
would pass for exact. Names play no role. The model is copied, in float64 if model and loss can run in it. Before every
evaluation, the random states and all that a forward pass changes are restored.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map_only, tree_unflatten

from metakern.diagnosis.report import LOSS
from metakern.meta.batching import Loss, exact_kernels
from metakern.meta.parameters import Parameters, twin
from metakern.meta.slopes import NOISE, Tensors, Verdict, direction, gradient, judge
from metakern.meta.state import seeded
from metakern.meta.verify import Roundings, comparable

_STANDARD = set(vars(nn.Module()))


@dataclass
class Call:
    """One call of a module or an autograd Function, recorded in a run of the loss; the root is the loss itself."""

    path: str
    module: nn.Module  # for a Function, the module that calls it
    function: Callable[..., Any]  # what is called
    inputs: list[Any] = field(default_factory=list)  # the leaves of (args, kwargs)
    spec: TreeSpec | None = None  # their structure
    flows: list[int] = field(default_factory=list)  # indices of the inputs that depend on trained parameters
    active: list[bool] = field(default_factory=list)  # for each of `flows`, whether it depends on adapted parameters
    outputs: list[Any] = field(default_factory=list)
    out_spec: TreeSpec | None = None
    connected: list[bool] = field(default_factory=list)  # for each output, whether it has a graph
    state: State | None = None  # of the module, before the call
    children: list[Call] = field(default_factory=list)

    @property
    def root(self) -> bool:
        return self.spec is None

    @property
    def owned(self) -> list[nn.Parameter]:
        """The trained parameters that the call reads by itself: its module's, or for a Function none."""
        own = self.root or self.function is self.module
        return [p for p in self.module.parameters() if p.requires_grad] if own else []

    def walk(self) -> Iterator[Call]:
        """Yields this call and all calls within it."""
        yield self
        for child in self.children:
            yield from child.walk()

    @property
    def signature(self) -> Any:
        """A string that is equal for calls that compute the same, as far as their attributes tell.

        Attributes that are neither plain values nor tensors are compared by identity.
        """
        modules = [(type(m), m.training, *_attributes(m)) for m in self.module.modules()]
        parameters = [(name, p.shape, p.requires_grad) for name, p in self.module.named_parameters()]
        tensors = [(x.shape, x.dtype) if isinstance(x, Tensor) else _plain(x) for x in self.inputs]
        return str((self.root, modules, parameters, tensors, self.spec, self.flows, self.active))


class State:
    """A snapshot of what a forward pass can change in modules: their attributes, buffers and random generators."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = [(m, dict(vars(m)), dict(m._buffers)) for m in model.modules()]
        self.buffers = [(b, b.detach().clone()) for b in model.buffers()]
        own = [v for _, attributes, _ in self.modules for v in attributes.values()]
        self.generators = [(g, g.get_state()) for g in own if isinstance(g, torch.Generator)]
        self.randoms = [(r, r.getstate()) for r in own if isinstance(r, random.Random)]

    def restore(self) -> None:
        for module, attributes, buffers in self.modules:
            vars(module).clear()
            vars(module).update(attributes)
            module._buffers.clear()
            module._buffers.update(buffers)
        with torch.no_grad():
            for buffer, value in self.buffers:
                if not torch.equal(buffer, value):
                    buffer.data.copy_(value)
        for generator, state in self.generators:
            generator.set_state(state)
        for r, held in self.randoms:
            r.setstate(held)


class Patient:
    """A copy of a model, and the batches of one task, in the dtype in which they are judged."""

    def __init__(self, model: nn.Module, loss: Loss, support: Any, query: Any, adapt: Any, dtype: torch.dtype) -> None:
        def cast(t: Tensor) -> Tensor:
            return t.detach().to(dtype, copy=True) if t.is_floating_point() else t.detach().clone()

        self.model, self.loss, self.dtype = twin(model, dtype), loss, dtype
        self.support, self.query = (tree_map_only(Tensor, cast, batch) for batch in (support, query))
        self.parameters = Parameters(self.model, adapt)
        self.adapted = {id(p) for p in self.parameters.adapted.values()}
        self.state = State(self.model)
        self.batch, self.second_order = self.support, True  # what is judged: MAML uses only the gradient of the query
        self.precision, self.evaluations = dtype, 0

    @contextmanager
    def steady(self, state: State | None = None) -> Iterator[None]:
        """Within the block, random states, buffers, attributes, default dtype and kernels are always the same."""
        self.begin(state or self.state)
        try:
            with warnings.catch_warnings(), comparable(default=self.dtype), exact_kernels(), torch.enable_grad():
                warnings.simplefilter("ignore")
                yield
        finally:
            (state or self.state).restore()

    def begin(self, state: State) -> None:
        state.restore()
        seeded()

    def value(self, batch: Any) -> Any:
        """Returns the loss of a batch, and counts the evaluation."""
        self.evaluations += 1
        return self.loss(self.model, tree_map_only(Tensor, Tensor.clone, batch))

    @property
    def root(self) -> Call:
        return Call(LOSS, self.model, self.loss)

    def calls(self) -> Call:
        """Returns the tree of the calls that the loss makes for `batch`."""
        root = self._traced(list(self.parameters.adapted.values()))
        for call in root.walk():
            call.active = [True] * len(call.flows)
        if not self.parameters.shared:
            return root
        part, root = root, self._traced([*self.parameters.adapted.values(), *self.parameters.shared.values()])
        for call, of_adapted in zip(root.walk(), part.walk(), strict=True):
            call.active = [i in of_adapted.flows for i in call.flows]
        return root

    def _traced(self, trained: Sequence[nn.Parameter]) -> Call:
        """Records the calls of the loss, in a run in which only the parameters `trained` require a gradient."""
        root = self.root
        stack, keep = [root], {id(p) for p in trained}

        def enter(path: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple, kwargs: dict) -> None:
                inputs, spec = tree_flatten((args, kwargs))
                flows = [i for i, x in enumerate(inputs) if isinstance(x, Tensor) and x.requires_grad]
                copies = [copied(x) for x in inputs]
                call = Call(path, module, module, copies, spec, flows, state=State(module))
                stack[-1].children.append(call)
                stack.append(call)

            return hook

        def leave(module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
            call = stack.pop()
            outputs, call.out_spec = tree_flatten(output)
            call.outputs = [copied(y) for y in outputs]
            call.connected = [isinstance(y, Tensor) and y.requires_grad for y in outputs]

        with self.steady(), ExitStack() as undo:
            for parameter in self.model.parameters():
                if parameter.requires_grad and id(parameter) not in keep:
                    parameter.requires_grad_(False)
                    undo.callback(parameter.requires_grad_, True)
            for path, module in self.model.named_modules():
                undo.callback(module.register_forward_pre_hook(enter(path), with_kwargs=True).remove)
                undo.callback(module.register_forward_hook(leave, with_kwargs=True).remove)
            self.value(self.batch)
        return root


class Place:
    """A call as a scalar function of z: its parameters, its inputs, and the outputs of the modules in `cut`.

    Modules that are cut out do not run; they return their part of z.
    """

    def __init__(self, patient: Patient, call: Call, cut: Sequence[nn.Module] = ()) -> None:
        self.patient, self.call = patient, call
        self.parameters = Parameters(call.module) if call.owned else None
        own = list(self.parameters.adapted.values()) if self.parameters else []
        self.cut = [c for c in _outermost(call, {id(m) for m in cut}) if any(map(is_float, c.outputs))]
        replayed = [(c, i) for c in self.cut for i, y in enumerate(c.outputs) if is_float(y)]
        self.sizes = len(own), len(call.flows), len(replayed)
        self.z: Tensors = [
            *(p.detach() for p in own),
            *(call.inputs[i] for i in call.flows),
            *(c.outputs[i] for c, i in replayed),
        ]
        self.active = [
            *(id(p) in patient.adapted for p in own),
            *call.active,
            *(c.connected[i] for c, i in replayed),
        ]
        if not patient.second_order:
            self.active = [False] * len(self.z)
        self._weights: list[tuple[Tensor, Tensor, Tensor]] | None = None

    def judge(self) -> Verdict:
        return judge(self.scalar, self.z, self.active, self.patient.precision) if self.z else Verdict()

    @contextmanager
    def scalar(self, z: Tensors, linear: bool = False) -> Iterator[Tensor]:
        """Yields the scalar at z, without the square if `linear`; differentiate it within the block.

        The parameters are bound to z for the whole block, as a checkpoint may run again in the backward.
        """
        own, flowing, replayed = self._split(list(z))
        with self.patient.steady(self.call.state), ExitStack() as stack:
            self._replay(stack, replayed)
            if self.parameters:
                stack.enter_context(self.parameters.bound(own))
            if self.call.root:
                yield self.patient.value(self.patient.batch)
                return
            self.patient.evaluations += 1
            inputs = [copied(x) for x in self.call.inputs]
            for i, x in zip(self.call.flows, flowing, strict=True):
                inputs[i] = x.clone()  # no leaf, as the module may write to it in place
            assert self.call.spec is not None
            args, kwargs = tree_unflatten(inputs, self.call.spec)
            yield self._number(tree_flatten(self.call.function(*args, **kwargs))[0], linear)

    def _split(self, z: list[Tensor]) -> list[list[Tensor]]:
        """Splits z into parameters, inputs, and outputs of the modules that are cut out."""
        a, b, _ = self.sizes
        return [z[:a], z[a : a + b], z[a + b :]]

    def _replay(self, stack: ExitStack, tensors: list[Tensor]) -> None:
        """Lets the modules that are cut out return the given tensors, call by call, as long as `stack` is open."""
        queues: dict[nn.Module, list[Any]] = {}
        rest = iter(tensors)
        for call in self.cut:
            outputs = [next(rest).clone() if is_float(y) else y for y in call.outputs]
            assert call.out_spec is not None
            queues.setdefault(call.module, []).append(tree_unflatten(outputs, call.out_spec))
        for module, queue in queues.items():
            vars(module)["forward"] = lambda *_, _queue=queue, **__: _queue.pop(0)
            stack.callback(vars(module).pop, "forward", None)

    def _number(self, outputs: list[Any], linear: bool) -> Tensor:
        """Returns the scalar of the outputs; c, d and y_0 are set at the first call."""
        connected = self.call.connected or [False] * len(outputs)
        outputs = [y for y, on in zip(outputs, connected, strict=True) if is_float(y) and (on or not any(connected))]
        if self._weights is None:
            generator = torch.Generator().manual_seed(1)
            self._weights = []
            for y in outputs:
                c, d = (torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y) for _ in range(2))
                self._weights.append((c, d / (y.detach().abs().mean() + 1e-30), y.detach().clone()))
        total = torch.zeros((), dtype=self.patient.dtype, device=outputs[0].device)
        for y, (c, d, y_0) in zip(outputs, self._weights, strict=True):
            total = total + (c * y).sum() + (0 if linear else (d * (y - y_0) ** 2).sum() / 2)
        return total


def treat(model: nn.Module, loss: Loss, support: Any, query: Any, adapt: Any) -> Patient:
    """Returns a patient in float64 if loss and gradient can be computed in it, else in float32.

    Raises ValueError if the loss raises in both, or if it can't be judged (`_check`).
    """
    obstacle: Exception | None = None
    for dtype in (torch.float64, torch.float32):
        patient = Patient(model, loss, support, query, adapt, dtype)
        place = Place(patient, patient.root)
        try:
            with Roundings() as roundings, place.scalar([t.requires_grad_() for t in place.z]) as value:
                pass
        except Exception as error:  # a kernel or a model may require float32
            obstacle = error
            continue
        _check(value, place)
        patient.precision = torch.float32 if roundings.seen else dtype
        try:
            gradient(place.scalar, place.z)
        except Exception as error:
            if dtype == torch.float64 and "dtype" in str(error):
                continue
        return patient
    text = f"{type(obstacle).__name__}: {obstacle}"
    raise ValueError(f"doctor: loss must run on a task of support, got {' '.join(text.split())[:300]}") from obstacle


def _check(value: Any, place: Place) -> None:
    """Raises ValueError for a loss that is no finite scalar, changes from call to call, or ignores the parameters."""
    if not isinstance(value, Tensor) or value.dim() or not value.is_floating_point():
        got = f"{list(value.shape)} of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
        raise ValueError(f"doctor: loss must return a scalar tensor for one task, got {got}")
    if not value.isfinite():
        raise ValueError(f"doctor: loss must be finite on the first task of support, got {value.item()}")
    with place.scalar(place.z) as again:
        if not torch.isclose(value, again, rtol=torch.finfo(value.dtype).eps ** 0.75):
            raise ValueError(
                "doctor: loss must be the same for the same parameters and random state, got one that changes from "
                "call to call: draw random numbers by torch, random or numpy.random"
            )
    with place.scalar([z + NOISE * u for z, u in zip(place.z, direction(place.z, 0), strict=True)]) as moved:
        if torch.equal(value, moved):
            raise ValueError("doctor: loss must depend on the model's parameters, got one that does not")


def _outermost(call: Call, cut: set[int]) -> Iterator[Call]:
    """Yields the outermost calls, within a call, of the modules whose ids are in `cut`."""
    for child in call.children:
        if id(child.module) in cut:
            yield child
        else:
            yield from _outermost(child, cut)


def _attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yields the names and plain values of the attributes that the module's class adds to nn.Module's."""
    for name, value in sorted(vars(module).items()):
        if name not in _STANDARD and not isinstance(value, Tensor):
            yield name, _plain(value)


def _plain(value: Any) -> Any:
    """Returns the value if it is a plain one, else what identifies it."""
    plain = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, type)
    if isinstance(value, list | tuple | set | frozenset):
        return type(value), [_plain(v) for v in value]
    if isinstance(value, MethodType):
        return id(value.__func__), id(value.__self__)
    return value if isinstance(value, plain) else id(value)


def copied(value: Any) -> Any:
    """Returns a detached copy of a tensor; anything else as it is."""
    return value.detach().clone() if isinstance(value, Tensor) else value


def is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
