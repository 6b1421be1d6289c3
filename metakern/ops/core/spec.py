"""What the shared tests and benchmarks know of an op."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from metakern.ops.core.autograd import Op


@dataclass(frozen=True)
class Sample:
    """Arguments of one call. Floating-point tensors among `args` are its differentiable inputs.

    per_task: every tensor among `args` has the tasks first, so that results must not mix them. frozen: the places in
    `args` of tensors that are neither, because the op holds them constant and all tasks share them.
    """

    name: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    per_task: bool = True
    frozen: tuple[int, ...] = ()


@dataclass(frozen=True)
class Cost:
    """What a call must spend at least: operations, and bytes (each input read once, each output written once)."""

    flop: float
    bytes: float


@dataclass(frozen=True)
class Spec:
    """An op as tests and benchmarks see it.

    call: the public function. plain: the same function of ordinary PyTorch operations, differentiable by PyTorch to any
    order: the independent truth. samples(make): small arguments of many kinds, odd and empty sizes included;
    `make(*shape)` draws a tensor. benchmark(make): arguments of the sizes that users have. cost(sample, order): order 0
    is `forward`, 1 `vjp`, 2 `vjp_jvp`.
    """

    op: Op
    call: Callable[..., Any]
    plain: Callable[..., Any]
    samples: Callable[[Make], list[Sample]]
    benchmark: Callable[[Make], list[Sample]]
    cost: Callable[[Sample, int], Cost]


class Make:
    """Draws the tensors of samples: one seed, one dtype, one device."""

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
        """Those of sequences, a list for each task."""
        return torch.tensor(tasks, device=self.device)
