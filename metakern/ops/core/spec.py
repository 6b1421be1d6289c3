"""The description of an op that the shared tests and benchmarks use."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from metakern.ops.core.autograd import Op


@dataclass(frozen=True)
class Sample:
    """Arguments of one call.

    args: Positional arguments. Floating-point tensors among them are differentiable inputs.
    per_task: Whether every tensor in `args` has the tasks first, so that no task's result may depend on another.
    frozen: Positions in `args` of tensors to which neither applies: they have no derivative, and all tasks share them.
    """

    name: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    per_task: bool = True
    frozen: tuple[int, ...] = ()


@dataclass(frozen=True)
class Cost:
    """Lower bounds of the work of a call: floating-point operations, and bytes moved.

    The bytes read each input once and write each output once.
    """

    flop: float
    bytes: float


@dataclass(frozen=True)
class Spec:
    """What shared tests and benchmarks need of an op.

    call: The public function.
    plain: The same function in ordinary PyTorch operations, which autograd differentiates to any order. Tests compare
        `call` and all its derivatives with it.
    samples(make): Small arguments of many kinds, odd and empty sizes included; `make(*shape)` draws a tensor.
    benchmark(make): Arguments of realistic sizes.
    cost(sample, order): The cost of `forward` (order 0), `vjp` (1) or `vjp_jvp` (2).
    """

    op: Op
    call: Callable[..., Any]
    plain: Callable[..., Any]
    samples: Callable[[Make], list[Sample]]
    benchmark: Callable[[Make], list[Sample]]
    cost: Callable[[Sample, int], Cost]


class Make:
    """Draws the tensors of samples, with one seed, dtype and device."""

    def __init__(self, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu", seed: int = 0) -> None:
        self.dtype, self.device = dtype, torch.device(device)
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, *shape: int) -> Tensor:
        """A standard normal tensor."""
        return torch.randn(shape, generator=self.generator, dtype=torch.float64).to(self.device, self.dtype)

    def integers(self, high: int, *shape: int) -> Tensor:
        """Uniform integers below `high`."""
        return torch.randint(high, shape, generator=self.generator).to(self.device)

    def lengths(self, *tasks: list[int]) -> Tensor:
        """The lengths of sequences, a list for each task, as an integer tensor [T, B]."""
        return torch.tensor(tasks, device=self.device)
