"""Folding: the model runs once with all tasks in its batch dimension, and its layers use a weight for each task.

A model that is called on `[B, ...]` for one task is called once on `[T·B, ...]` for all tasks. Everything without
parameters (attention, activations, dropout, reshapes) runs unchanged on the larger batch. A module that owns adapted
parameters is a unit. It runs by the rule of its type: products with a weight per task for linear layers, metakern's ops
for embeddings, norms and recurrent layers, and `torch.func.vmap` of the unit alone for every other type.

Which tensors carry the tasks is not guessed from their size, which could coincide. The model is traced once with 2
tasks and once with 3; a tensor is folded if its first dimension is T·B, or a multiple of it (as after a reshape to
[T·B·L, D]), in both traces. Later calls replay this record.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from metakern import ops
from metakern.meta.functions import FusedFunctions
from metakern.meta.parameters import Parameters, put
from metakern.meta.threads import Refusal
from metakern.nn import Linear
from metakern.nn.lora import LoraLinear
from metakern.nn.lora import run as run_lora
from metakern.nn.recurrent import run
from metakern.patching import huggingface


class FoldError(RuntimeError):
    """The model or loss can't be folded; another batching can still be exact."""


class Fold:
    """A model's units with their rules, and the record of which tensors carry the tasks."""

    def __init__(
        self, parameters: Parameters, operations: Callable[[], AbstractContextManager] = FusedFunctions
    ) -> None:
        self.model, self.parameters, self.operations = parameters.model, parameters, operations
        self.units = _units(parameters)
        self.originals = {module: module.forward for module in self.units}
        self.tasks = self.size = 0  # T, and T·B while the model runs
        self.within: Callable[[], AbstractContextManager] = nullcontext  # a context that the model runs in
        self.recording = False
        self.records: dict[Any, list[int]] = {}  # structure of a batch -> its record
        self.record: list[int] = []  # for each question to `folded`: the tensor's size over T·B, or 0 if not folded
        self._position = 0

    @contextmanager
    def active(self, phi: Sequence[Tensor], structure: Any) -> Iterator[None]:
        """Within the block the model accepts the batched tensors of a vmap over tasks, and runs folded with `phi`."""
        patched: dict[nn.Module, Callable] = {
            module: partial(unit, self, module) for module, unit in self.units.items()
        }
        inner = patched.pop(self.model, self.model.forward)
        patched[self.model] = partial(self._enter, inner)
        kept = {module: module.__dict__.get("forward") for module in patched}
        self.tasks, self._position = phi[0].shape[0], 0
        self._refuse = Refusal(threading.get_ident())
        if not self.recording and structure not in self.records:
            raise FoldError("the batch must have a structure that was verified, got another one")
        self.record = [] if self.recording else self.records[structure]
        with self.parameters.bound(phi):
            try:
                for module, forward in patched.items():
                    module.__dict__["forward"] = forward
                yield
            finally:
                for module, before in kept.items():
                    del module.__dict__["forward"]
                    if before is not None:
                        module.__dict__["forward"] = before
        if self._position != len(self.record):
            raise FoldError("the model made fewer calls than when it was traced: use batching='vmap' or 'loop'")

    def folded(self, tensor: Tensor, dim: int = 0) -> bool:
        """Whether a tensor carries the tasks in `dim`: recorded while tracing, replayed in the same order later."""
        now = tensor.dim() > dim and tensor.shape[dim] % self.size == 0
        if self.recording:
            self.record.append(tensor.shape[dim] // self.size if now else 0)
        elif self._position >= len(self.record):
            raise FoldError("the model made more calls than when it was traced: use batching='vmap' or 'loop'")
        answer = self.record[self._position] > 0
        self._position += 1
        if answer and not now:
            raise FoldError(
                f"a folded tensor must have a multiple of {self.size} in dimension {dim}, got {list(tensor.shape)}"
            )
        return answer

    def keep(self, structure: Any, one: list[int], other: list[int]) -> None:
        """Keep, for batches of this structure, the tensors that are folded in both of two records."""
        if len(one) != len(other):
            raise FoldError("the model's calls depend on the number of tasks")
        self.records[structure] = [a if a == b else 0 for a, b in zip(one, other, strict=True)]

    def split(self, tensor: Tensor) -> Tensor:
        """[T·B, ...] -> [T, B, ...]"""
        return tensor.unflatten(0, (self.tasks, -1))

    def merge(self, tensor: Tensor) -> Tensor:
        """[T, B, ...] -> [T·B, ...]"""
        if tensor.dim() < 2 or tensor.shape[1] * self.tasks % self.size:
            raise FoldError(f"a unit's output must keep the batch dimension, got {list(tensor.shape[1:])}")
        return tensor.flatten(0, 1)

    def spread(self, tensor: Tensor) -> Tensor:
        """[T, ...] -> [T·B, ...]: repeat what all examples of a task share; a batch dimension of 1 is expanded."""
        if tensor.dim() > 3 and tensor.shape[1] == 1:
            tensor = tensor.squeeze(1)
        return tensor.unsqueeze(1).expand(-1, self.size // self.tasks, *tensor.shape[1:]).flatten(0, 1)

    def weight(self, module: nn.Module, name: str) -> Any:
        """Return a unit's parameter for each task, [T, *shape], or None. One that is not adapted is expanded."""
        value = module._parameters.get(name)
        return value.expand(self.tasks, *value.shape) if isinstance(value, nn.Parameter) else value

    def _enter(self, forward: Callable, *args: Any, **kwargs: Any) -> Any:
        """Run the model folded; called in place of its forward, inside the vmap over tasks of the user's loss."""
        self._refuse()  # another thread may have looked up this forward just before the block ended
        leaves, spec = tree_flatten((args, kwargs))
        where = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        result: list[tuple[list, TreeSpec, list[int]]] = []
        modes = _modes()

        def run(in_dims: tuple, tensors: tuple) -> tuple[tuple, tuple]:
            mapped = [t.movedim(d, 0) for t, d in zip(tensors, in_dims, strict=True) if d is not None]
            if any(t.dim() < 2 for t in mapped) or len({t.shape[1] for t in mapped}) != 1:
                raise FoldError("the model's inputs must share a batch dimension")
            self.size = self.tasks * mapped[0].shape[1]
            if not self.size:
                raise FoldError("the model's inputs must hold examples, got a batch dimension of 0")
            inner = list(leaves)
            for i, tensor, dim in zip(where, tensors, in_dims, strict=True):
                inner[i] = tensor if dim is None else tensor.movedim(dim, 0).flatten(0, 1)
            inner_args, inner_kwargs = tree_unflatten(inner, spec)
            with _pushed(modes), self.within(), self.operations():
                outputs, out_spec = tree_flatten(forward(*inner_args, **inner_kwargs))
            out_where = [i for i, o in enumerate(outputs) if isinstance(o, Tensor)]
            result.append((outputs, out_spec, out_where))
            carry = [self.folded(outputs[i]) for i in out_where]
            out = tuple(self.split(outputs[i]) if c else outputs[i] for i, c in zip(out_where, carry, strict=True))
            return out, tuple(0 if c else None for c in carry)

        tensors = _Enter.apply(run, *(leaves[i] for i in where))
        outputs, out_spec, out_where = result[0]
        for i, tensor in zip(out_where, tensors, strict=True):
            outputs[i] = tensor
        return tree_unflatten(outputs, out_spec)


def _modes() -> list[TorchFunctionMode]:
    """Return the caller's function modes, which have no effect once _Enter steps out of vmap.

    Those that trials and `operations` set are left out, as a fold enters its own.
    """
    own = "metakern.meta.functions", "metakern.meta.verify"
    return [mode for mode in _get_current_function_mode_stack() if type(mode).__module__ not in own]


@contextmanager
def _pushed(modes: Sequence[TorchFunctionMode]) -> Iterator[None]:
    """Set modes within the block, without what entering them may do besides."""
    for mode in modes:
        _push_mode(mode)
    try:
        yield
    finally:
        for _ in modes:
            _pop_mode()


class _Enter(torch.autograd.Function):
    """Steps out of the vmap over tasks: its vmap rule gets the tensors of all tasks and runs the model on them."""

    @staticmethod
    def forward(run: Callable, *tensors: Tensor) -> Any:
        raise FoldError("the loss calls the model on tensors that do not depend on the task")

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: Any) -> None:
        pass

    @staticmethod
    def vmap(info: Any, in_dims: tuple, run: Callable, *tensors: Tensor) -> tuple[tuple, tuple]:
        return run(in_dims[1:], tensors)


Unit = Callable[..., Any]  # unit(fold, module, *args, **kwargs) computes the module's forward, folded


def _units(parameters: Parameters) -> dict[nn.Module, Unit]:
    """Return the rules of the units: the outermost modules that own an adapted parameter, and other batch norms."""
    owners = {id(module) for module, _, _ in parameters.places}
    units: dict[nn.Module, Unit] = {}

    def visit(module: nn.Module) -> None:
        if id(module) in owners or isinstance(module, nn.modules.batchnorm._BatchNorm):
            units[module] = _rule(module)
        else:
            for child in module.children():
                visit(child)

    visit(parameters.model)
    return units


def _rule(module: Any) -> Unit:
    kind: Any = type(module)
    if "forward" in module.__dict__:  # this module's forward has been replaced, so the rule of its type may not hold
        return _mapped
    if kind in (nn.Linear, Linear):
        return _linear
    if kind is nn.Embedding and module.max_norm is None and not module.sparse and not module.scale_grad_by_freq:
        return _embedding
    if isinstance(module, nn.LayerNorm | nn.RMSNorm) and len(module.normalized_shape) == 1:
        return _layer_norm if isinstance(module, nn.LayerNorm) else _rms_norm
    if isinstance(module, nn.RNNBase) and not module.proj_size:
        return _recurrent
    if kind in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d):
        return _batch_norm
    if kind is LoraLinear:
        return _lora
    if isinstance(module, huggingface.Conv1D):
        return _conv1d
    if isinstance(module, huggingface.Elementary):
        return _elementary
    if kind.__module__.startswith("transformers."):
        known = huggingface.known(kind)
        if known is huggingface.Conv1D:
            return _conv1d
        if known in (huggingface.RMSNorm, huggingface.CenteredRMSNorm):
            return _broadcast
    return _mapped


def per_task(fold: Fold, x: Tensor, op: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply one of metakern's ops on [T, ..., D] to a tensor of the model, without the overhead of function modes."""
    with torch._C.DisableTorchFunction():
        return _split(fold, x, op)


def _split(fold: Fold, x: Tensor, function: Callable[[Tensor], Tensor]) -> Tensor:
    """Apply a function on [T, ..., D] to a tensor of the model, which is folded or the same for all tasks."""
    if fold.folded(x):
        return function(fold.split(x)).flatten(0, 1)
    return fold.spread(function(x.expand(fold.tasks, *x.shape)))


def _linear(fold: Fold, module: nn.Module, x: Tensor) -> Tensor:
    weight, bias = fold.weight(module, "weight"), fold.weight(module, "bias")
    return per_task(fold, x, lambda x: ops.linear(x, weight, bias))


def _lora(fold: Fold, module: LoraLinear, x: Tensor) -> Tensor:
    """Apply the frozen base once to the rows of all tasks, and the factors to each task's rows."""
    apply = _split if module.training and module.dropout else per_task  # `comparable` must see a dropout
    return apply(fold, x, lambda x: run_lora(module, x, partial(fold.weight, module)))


def _layer_norm(fold: Fold, module: nn.LayerNorm, x: Tensor) -> Tensor:
    weight, bias = fold.weight(module, "weight"), fold.weight(module, "bias")
    return per_task(fold, x, lambda x: ops.layer_norm(x, weight, bias, module.eps))


def _batch_norm(fold: Fold, module: Any, x: Tensor) -> Tensor:
    """Make each task a group of channels: [T·B, C, ...] becomes [B, T·C, ...], with the statistics of each task."""
    module._check_input_dim(x)
    C, T = x.shape[1], fold.tasks
    statistics = [module._buffers.get(name) for name in ("running_mean", "running_var")]
    weights = [fold.weight(module, name) for name in ("weight", "bias")]
    training = module.training or statistics[0] is None
    if not fold.folded(x):
        raise FoldError(f"{type(module).__name__} must be given the batch, got a tensor that is the same for all tasks")
    flat = fold.split(x).transpose(0, 1).flatten(1, 2)
    mean, var = (None if s is None else s.repeat(T) for s in statistics)
    weight, bias = (None if w is None else w.reshape(T * C) for w in weights)
    y = nn.functional.batch_norm(flat, mean, var, weight, bias, training, 0.0, module.eps)
    return y.unflatten(1, (T, C)).transpose(0, 1).flatten(0, 1)


def _rms_norm(fold: Fold, module: nn.RMSNorm, x: Tensor) -> Tensor:
    weight = fold.weight(module, "weight")
    eps = torch.finfo(x.dtype).eps if module.eps is None else module.eps
    return per_task(fold, x, lambda x: ops.rms_norm(x, weight, eps))


def _embedding(fold: Fold, module: Any, tokens: Tensor) -> Tensor:
    weight = fold.weight(module, "weight")

    def look_up(tokens: Tensor) -> Tensor:
        rows = ops.embedding(tokens, weight)
        if module.padding_idx is None:
            return rows
        return torch.where((tokens == module.padding_idx).unsqueeze(-1), rows.detach(), rows)  # has no gradient

    return per_task(fold, tokens, look_up)


def _elementary(fold: Fold, module: Any, x: Tensor) -> Tensor:
    """A module that is one op of its input and parameters, as `metakern.patch` puts them into Hugging Face models."""
    return per_task(fold, x, lambda x: type(module).compute(module, x, partial(fold.weight, module)))


def _conv1d(fold: Fold, module: Any, x: Tensor) -> Tensor:
    return per_task(fold, x, lambda x: huggingface.Conv1D.compute(module, x, partial(fold.weight, module)))


LOOK_UP: Unit = _embedding
LINEAR: dict[Unit, bool] = {_linear: False, _conv1d: True}  # rules of linear layers -> whether the weight is [in, out]


def _broadcast(fold: Fold, module: nn.Module, x: Tensor) -> Tensor:
    """A norm of Hugging Face, run by its own forward: it is elementwise in its weight, which becomes [T, 1, ..., D]."""

    def norm(x: Tensor) -> Tensor:
        mine = module._parameters["weight"]
        weight = fold.weight(module, "weight")
        put([(module, "weight", weight.view(fold.tasks, *(1,) * (x.dim() - 2), -1))])
        try:
            return fold.originals[module](x)
        finally:
            put([(module, "weight", mine)])

    return _split(fold, x, norm)


def _recurrent(fold: Fold, module: nn.RNNBase, x: Tensor, hx: Any = None) -> tuple[Tensor, Any]:
    """A recurrent layer of torch.nn or metakern.nn. Its states have the batch in dimension 1."""
    batch_dim = 0 if module.batch_first else 1
    states = None if hx is None else tuple(hx) if module.mode == "LSTM" else (hx,)
    if not isinstance(x, Tensor) or x.dim() != 3 or not fold.folded(x, batch_dim):
        got = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise FoldError(f"{type(module).__name__} must be given a padded batch of sequences, got {got}")
    if states is not None:
        carries = [fold.folded(state, 1) for state in states]  # every one is recorded
        if not all(carries):
            raise FoldError(f"{type(module).__name__} must be given a state for each sequence, got one for all tasks")
        states = tuple(state.unflatten(1, (fold.tasks, -1)) for state in states)
    y, states = run(module, fold.split(x.transpose(0, batch_dim)), states, partial(fold.weight, module))
    states = tuple(state.flatten(1, 2) for state in states)
    return y.flatten(0, 1).transpose(0, batch_dim), states if module.mode == "LSTM" else states[0]


def _mapped(fold: Fold, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Any other module: `torch.func.vmap` of its forward over the tasks and its adapted parameters."""
    leaves, spec = tree_flatten((args, kwargs))
    where = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    carries = [fold.folded(leaves[i]) for i in where]
    tensors = [fold.split(leaves[i]) if c else leaves[i] for i, c in zip(where, carries, strict=True)]
    places = [
        (owner, name, value)
        for owner in module.modules()
        for name, value in owner._parameters.items()
        if value is not None and not isinstance(value, nn.Parameter)
    ]
    result: list[tuple[list, TreeSpec]] = []

    def one(values: tuple, tensors: tuple) -> tuple:
        inner = list(leaves)
        for i, tensor in zip(where, tensors, strict=True):
            inner[i] = tensor
        inner_args, inner_kwargs = tree_unflatten(inner, spec)
        put((owner, name, value) for (owner, name, _), value in zip(places, values, strict=True))
        result.append(tree_flatten(fold.originals[module](*inner_args, **inner_kwargs)))
        return tuple(o for o in result[0][0] if isinstance(o, Tensor))

    try:
        mapped = torch.func.vmap(one, (0, tuple(0 if c else None for c in carries)), randomness="different")(
            tuple(value for _, _, value in places), tuple(tensors)
        )
    finally:
        put(places)
    outputs, out_spec = result[0]
    folded = iter([(fold.merge if any(carries) else fold.spread)(o) for o in mapped])
    return tree_unflatten([next(folded) if isinstance(o, Tensor) else o for o in outputs], out_spec)
