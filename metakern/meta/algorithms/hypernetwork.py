"""Hypernetworks: a network reads the support and writes the parameters that the task starts from.

    e_t = encoder(support_t)        phi_{t,0} = theta + G(e_t)        phi_{k+1} = U(phi_k, grad S_t(phi_k)), k < K

Without inner steps (K = 0) a task is adapted by one pass of the encoder. G is a multilayer perceptron of e_t and a
learned embedding of each parameter, with an output layer for each shape; of a large matrix it writes low-rank factors.

Ha, Dai, Le 2017, "HyperNetworks", section 3; Karimi Mahabadi, Ruder, Dehghani, Henderson 2021, "Parameter-efficient
multi-task fine-tuning for transformers via shared hypernetworks", section 3 (an embedding for each layer); Charakorn,
Cetin, Tang, Lange 2025, "Text-to-LoRA", section 3 (LoRA factors).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from metakern.meta.algorithms.maml import MAML, refuse
from metakern.meta.batches import at_step, over_tasks
from metakern.meta.batching import Loss
from metakern.meta.engine import Prepared
from metakern.meta.parameters import Parameters
from metakern.meta.verify import one_line
from metakern.optim import InnerOptimizer


class HyperNetwork(MAML):
    """Learn to write a task's parameters from its support, with MAML's interface; inner steps may follow.

    The parameters that `adapt` selects start at theta plus what the generator writes; nothing at first. After
    `metakern.lora(model)` these are the LoRA factors. The outer loop learns theta, the generator and the encoder, so
    give its optimizer the parameters of this object.

    Args:
        model: The model, as `metakern.MAML` takes it.
        loss: `loss(model, batch)` returns the loss of one task, a scalar tensor.
        encoder: `encoder(support)` returns the embedding `[D]` of one task, from its support without the task
            dimension; `metakern.nn.SetEncoder` is one. It may read parts of the batch that the loss does not, such as
            a description of the task.
        size: D.
        width: The width of the generator.
        rank: A matrix whose sides are both larger than this is written as a product of this rank.
        inner: The optimizer of the inner steps.
        steps: The number of inner steps after the generator.
        **options: The other arguments of `metakern.MAML`, except `weights`: tasks do not start from the same ones.

    Attributes:
        generator: The `Generator`.

    Raises:
        TypeError: As `metakern.MAML` raises it; also if `encoder` is not an `nn.Module`.
        ValueError: As `metakern.MAML` raises it; also if a size is not an integer of at least 1. At a call, if the
            encoder returns something else than `[D]`.
        RuntimeError: At a call, if the encoder does not run under `torch.func.vmap`.

    >>> import torch, metakern as mk
    >>> model = torch.nn.Sequential(torch.nn.Linear(1, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    >>> loss = lambda model, batch: (model(batch[0]) - batch[1]).square().mean()
    >>> net = torch.nn.Sequential(torch.nn.Linear(2, 16), torch.nn.Tanh())
    >>> encoder = mk.nn.SetEncoder(lambda batch: net(torch.cat(batch, -1)), modules=[net])
    >>> hyper = mk.HyperNetwork(model, loss, encoder, size=16)
    >>> x, y = torch.randn(5, 10, 1), torch.randn(5, 10, 1)
    >>> hyper((x, y), (x, y)).backward()
    >>> hyper.adapt((x, y))["0.weight"].shape
    torch.Size([5, 16, 1])
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        encoder: nn.Module,
        size: int,
        width: int = 64,
        rank: int = 8,
        inner: InnerOptimizer | None = None,
        steps: int = 0,
        **options: Any,
    ) -> None:
        if not isinstance(encoder, nn.Module):
            raise TypeError(f"HyperNetwork: encoder must be an nn.Module, got {type(encoder).__name__}")
        refuse("HyperNetwork", options, "weights")
        super().__init__(model, loss, inner, steps, **options | {"weights": "explicit"})
        self.encoder, self.size = encoder, size
        self.generator = Generator(Parameters(model, self._engine.adapt).adapted, size, width, rank)

    def _others(self) -> dict[str, Any]:
        return {"encoder": self.encoder, "generator": self.generator}

    def _initial(self, prepared: Prepared, support: Any) -> dict[str, Tensor]:
        def one(batch: Any) -> Tensor:
            found = self.encoder(batch)
            if not isinstance(found, Tensor) or found.shape != (self.size,):
                got = list(found.shape) if isinstance(found, Tensor) else type(found).__name__
                raise ValueError(f"HyperNetwork: encoder must return the embedding [{self.size}] of a task, got {got}")
            return found

        try:
            codes = over_tasks(one, at_step(support, 0))
        except RuntimeError as error:
            if "vmap" not in str(error):
                raise
            raise RuntimeError(
                "HyperNetwork: encoder must run under torch.func.vmap over the tasks, without values as Python numbers,"
                " and with its batch norms in eval mode or with track_running_stats=False, got an error:"
                f" {one_line(error)}"
            ) from error
        written = self.generator(codes)
        adapted = prepared.parameters.adapted.items()  # of which those that were frozen before have no output
        return {name: p + written[name].to(p) for name, p in adapted if name in written}


class Generator(nn.Module):
    """Writes a change of each parameter from the embedding of a task: `[T, size]` to `{name: [T, *shape]}`.

    The changes are zero at first.

    Args:
        parameters: The parameters by name.
        size: The size of a task's embedding.
        width: The size of a parameter's embedding and of the hidden layers.
        rank: A matrix whose sides are both larger than this is written as a product of this rank.

    Raises:
        ValueError: For a size, width or rank that is not an integer of at least 1.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], size: int, width: int = 64, rank: int = 8) -> None:
        super().__init__()
        for what, value in (("size", size), ("width", width), ("rank", rank)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"HyperNetwork: {what} must be an integer of at least 1, got {value!r}")
        like = next(iter(parameters.values()))
        place: Any = {"device": like.device, "dtype": like.dtype}
        self.rank, self.shapes = rank, {name: tuple(p.shape) for name, p in parameters.items()}
        self.embedding = nn.Parameter(torch.randn(len(parameters), width, **place))
        self.hidden = nn.Sequential(
            nn.Linear(size + width, width, **place), nn.GELU(), nn.Linear(width, width, **place), nn.GELU()
        )
        kinds = dict.fromkeys(self.shapes.values())
        self.outputs = nn.ModuleDict({_key(shape): self._output(shape, width, place) for shape in kinds})

    def _is_factored(self, shape: tuple[int, ...]) -> bool:
        return len(shape) == 2 and min(shape) > self.rank

    def _output(self, shape: tuple[int, ...], width: int, place: Any) -> nn.Linear:
        count = self.rank * sum(shape) if self._is_factored(shape) else torch.Size(shape).numel()
        layer = nn.Linear(width, count, **place)
        zeros = slice(self.rank * shape[0]) if self._is_factored(shape) else slice(None)  # of factors, one is zero
        for p in layer.parameters():
            p.data[zeros] = 0
        return layer

    def forward(self, tasks: Tensor) -> dict[str, Tensor]:
        T, names = len(tasks), list(self.shapes)
        tasks = tasks.to(self.embedding).unsqueeze(1).expand(-1, len(names), -1)
        x = self.hidden(torch.cat([tasks, self.embedding.expand(T, -1, -1)], -1))  # [T, parameters, width]
        written = {}
        for shape in dict.fromkeys(self.shapes.values()):
            own = [i for i, name in enumerate(names) if self.shapes[name] == shape]
            rows = torch.stack([x[:, i] for i in own], 1)  # a list as an index would be copied to a GPU at each call
            y = self.outputs[_key(shape)](rows)  # [T, len(own), numbers]
            if self._is_factored(shape):
                left, right = y.split([self.rank * shape[0], self.rank * shape[1]], -1)
                y = left.unflatten(-1, (shape[0], self.rank)) @ right.unflatten(-1, (self.rank, shape[1]))
            for i, change in zip(own, y.unbind(1), strict=True):
                written[names[i]] = change.reshape(T, *shape)
        return written


def _key(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "scalar"
