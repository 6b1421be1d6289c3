"""Samples that an op is checked and timed with: those of its SPEC, and sizes that are hard for its kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from math import ceil
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from benchmarks.calls import Shapes, function
from benchmarks.workloads import Workload
from metakern.ops import SPECS
from metakern.ops.core.spec import Make, Sample
from metakern.ops.cross_entropy import ragged

RECURRENT = ("rnn", "gru", "lstm")
OPS = tuple(name for name, spec in SPECS.items() if "triton" in spec.op.kernels and name not in RECURRENT)
Draw = Callable[[Make], Sample]


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def moved(work: Workload) -> Workload:
    """Return the workload on the device."""
    support, query = (tuple(t.to(device()) for t in batch) for batch in (work.support, work.query))
    return replace(work, model=work.model.to(device()), support=support, query=query)


def flat(gradient: dict[str, Tensor]) -> Tensor:
    """Return a gradient as one vector in float64, in the order of the names."""
    return torch.cat([gradient[name].detach().flatten().double() for name in sorted(gradient)])


class Random(Make):
    """Draws tensors on the device itself, which is fast for large ones."""

    def __init__(self, dtype: torch.dtype, seed: int) -> None:
        super().__init__(dtype, device())
        self.generator = torch.Generator(self.device).manual_seed(seed)

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=self.dtype, device=self.device)

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self.generator, device=self.device)


def _matrix(*shape: int, inputs: int = 1) -> Draw:
    return lambda make: Sample("", tuple(make(*shape) for _ in range(inputs)))


def _norm(T: int, N: int, D: int, inputs: int) -> Draw:
    return lambda make: Sample("", (make(T, N, D), *(make(T, D) for _ in range(inputs - 1))))


def _logits(T: int, N: int, V: int) -> Draw:
    return lambda make: Sample("", (make(T, N, V), ragged(make, V, T, N)))


def _hidden(T: int, N: int, D: int, V: int) -> Draw:
    return lambda make: Sample("", (make(T, N, D), make(T, V, D) * D**-0.5, ragged(make, V, T, N)))


def _attention(
    B: int, H: int, H_kv: int, L: int, L_k: int, D: int, extra: Callable[[Make], dict[str, Any]] | None = None
) -> Draw:
    def draw(make: Make) -> Sample:
        qkv = make(B, H, L, D), make(B, H_kv, L_k, D), make(B, H_kv, L_k, D)
        return Sample("", qkv, extra(make) if extra else {}, per_task=False)

    return draw


# Samples beside those of SPECS: odd, wide and long rows, as real models have them, and all options of attention.
LARGE: dict[str, dict[str, Draw]] = {
    "silu": {"3x1001x4099": _matrix(3, 1001, 4099)},
    "gelu": {"3x1001x4099": _matrix(3, 1001, 4099)},
    "swiglu": {"3x1001x4099": _matrix(3, 1001, 4099, inputs=2)},
    "layer_norm": {f"{T}x{N}x{D}": _norm(T, N, D, 3) for T, N, D in ((2, 515, 4096), (3, 100, 5001), (2, 128, 16384))},
    "rms_norm": {f"{T}x{N}x{D}": _norm(T, N, D, 2) for T, N, D in ((2, 515, 4096), (3, 100, 5001), (2, 128, 16384))},
    "cross_entropy": {"4x200x32000": _logits(4, 200, 32000), "2x100x151936": _logits(2, 100, 151936)},
    "linear_cross_entropy": {"2x500x1024-32003": _hidden(2, 500, 1024, 32003)},
    "attention": {
        "causal-1024x64": _attention(2, 8, 8, 1024, 1024, 64),
        "causal-2048x128": _attention(1, 4, 4, 2048, 2048, 128),
        "grouped-1000x128": _attention(2, 8, 2, 1000, 1000, 128),
        "full-777-1300x64": _attention(2, 4, 4, 777, 1300, 64, lambda make: {"causal": False}),
        "decoding-129-2048x128": _attention(2, 8, 2, 129, 2048, 128),
        "more-queries-600-500x64": _attention(2, 4, 2, 600, 500, 64),
        "window-1500x64": _attention(2, 4, 4, 1500, 1500, 64, lambda make: {"window": 256}),
        "lengths-900x64": _attention(4, 4, 2, 900, 900, 64, lambda make: {"lengths": make.lengths(900, 0, 517, 64)}),
        "left-900x128": _attention(
            4, 4, 2, 900, 900, 128, lambda make: {"lengths": make.lengths(900, 1, 517, 64), "padding": "left"}
        ),
        "mask-700x64": _attention(
            3, 4, 4, 700, 700, 64, lambda make: {"mask": make.integers(3, 3, 700) > 0, "causal": False}
        ),
        "scale-500x80": _attention(2, 4, 2, 500, 500, 80, lambda make: {"scale": 0.2}),
        "small-300x16": _attention(4, 4, 4, 300, 300, 16),
        "wide-300x256": _attention(2, 4, 2, 300, 300, 256),
    },
}  # fmt: skip

# Samples with more elements than a 32-bit integer can count.
FAR: dict[str, Draw] = {
    "silu": _matrix(3, 30000, 24001),
    "rms_norm": _norm(3, 30000, 24001, 2),
    "cross_entropy": _logits(3, 30000, 24001),
}
EXTREME = (
    "large",
)  # left out: second derivatives vanish there, so that an error is only rounding. Other tests have it


def samples(op: str, tiny: bool) -> dict[str, Draw]:
    """Return an op's samples by name, without empty ones: small ones of many kinds, or those of real sizes."""
    spec = SPECS[op]
    draw = spec.samples if tiny else spec.benchmark
    drawn = [s for s in draw(Shapes()) if s.name not in EXTREME]
    full = [s for s in drawn if all(t.numel() for t in tree_leaves(s.args) if isinstance(t, Tensor))]
    return {s.name: partial(_named, draw, s.name) for s in full} | ({} if tiny else LARGE.get(op, {}))


def _named(draw: Callable[[Make], Iterable[Sample]], name: str, make: Make) -> Sample:
    return next(sample for sample in draw(make) if sample.name == name)


def cast(sample: Sample, dtype: torch.dtype) -> Sample:
    """Return the sample on the device, with its floating-point tensors in `dtype`."""

    def one(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(device(), dtype if value.is_floating_point() else value.dtype)

    return replace(sample, args=tree_map(one, sample.args), kwargs=tree_map(one, dict(sample.kwargs)))


def last_task(sample: Sample) -> Sample:
    return replace(sample, args=tuple(a[-1:].clone() if isinstance(a, Tensor) else a for a in sample.args))


def enlarged(sample: Sample, size: int) -> Sample:
    """Return the sample with its tasks repeated until its arguments have `size` bytes, if it has tasks."""
    tensors = [t for t in tree_leaves((sample.args, dict(sample.kwargs))) if isinstance(t, Tensor)]
    times = ceil(size / sum(t.numel() * t.element_size() for t in tensors))
    if times < 2 or not sample.per_task:
        return sample
    tasks = function(lambda: None, sample)[1][0].shape[0]

    def repeat(value: Any) -> Any:
        return value.repeat(times, *(1,) * (value.dim() - 1)) if isinstance(value, Tensor) else value

    def shared(i: int, value: Any) -> bool:
        return i in sample.frozen or not isinstance(value, Tensor) or value.shape[:1] != (tasks,)

    args = tuple(a if shared(i, a) else repeat(a) for i, a in enumerate(sample.args))
    return replace(sample, args=args, kwargs={k: v if shared(-1, v) else repeat(v) for k, v in sample.kwargs.items()})
