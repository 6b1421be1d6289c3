"""Tables that kernels read from a GPU's memory: addresses, sizes and numbers, whose values the host knows.

Tables are cached by their values. A training loop mostly gets the same memory at each step, and then nothing is copied
to the device.

While a CUDA graph is recorded, nothing may be copied from the host, and a table must live as long as the graph. A graph
of metakern's own keeps its tables, and fills them once the recording is over (`Kept`). In a graph that somebody else
records, kernels write the tables from their arguments, at every replay.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from functools import lru_cache
from itertools import accumulate
from typing import ClassVar

import torch
from torch import Tensor

from metakern.native.record import in_cuda_graph, unrecorded

Values = tuple[int, ...] | tuple[float, ...]


class Kept:
    """The tables of a graph that is recorded within the block, on the current stream of a device; fill them after it.

    A backward pass runs on another thread, but on the same stream.
    """

    recording: ClassVar[dict[tuple[torch.device, int], Kept]] = {}  # by stream

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._made: dict[Hashable, tuple[Tensor, Tensor]] = {}  # by its values: on the device, on the host

    def __enter__(self) -> Kept:
        self._key = self._device, _stream(self._device)
        self.recording[self._key] = self
        return self

    def __exit__(self, *_: object) -> None:
        del self.recording[self._key]

    def table(self, key: Hashable, make: Callable[[], Tensor]) -> Tensor:
        if key not in self._made:
            host = make()
            self._made[key] = torch.empty(host.shape, dtype=host.dtype, device=self._device), host
        return self._made[key][0]

    def fill(self) -> None:
        """Copy the values to the device, and wait for that: a replay may be on any stream."""
        for made, host in self._made.values():
            made.copy_(host)
        if self._made and self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()


def table(values: Values, device: torch.device) -> Tensor:
    """Returns the values as a tensor on a device, int64 or float64, without synchronizing with it."""
    dtype = torch.float64 if isinstance(values[0], float) else torch.int64
    if not in_cuda_graph(device):
        return _cached_table(values, dtype, device, _stream(device))
    if (kept := Kept.recording.get((device, _stream(device)))) is not None:
        return kept.table((values, dtype), lambda: _table(values, dtype))
    made = torch.zeros(len(values), dtype=dtype, device=device)
    torch._foreach_add_(made.unbind(), list(values))
    return made


def blocks(sizes: tuple[int, ...], block: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns the tables `starts` and `owners` of parameters of these sizes, cut into blocks: see foreach.py."""
    if not in_cuda_graph(device):
        return _cached_blocks(sizes, block, device, _stream(device))
    if (kept := Kept.recording.get((device, _stream(device)))) is not None:
        starts = kept.table((sizes, block, "starts"), lambda: _blocks(sizes, block)[0])
        return starts, kept.table((sizes, block, "owners"), lambda: _blocks(sizes, block)[1])
    ends = tuple(accumulate(_counts(sizes, block)))
    owners = torch.searchsorted(table(ends, device), torch.arange(ends[-1], device=device), right=True, out_int32=True)
    return table((0, *ends[:-1]), device), owners


# The dtype is part of the key, because (1,) equals (1.0,).
@lru_cache(maxsize=1024)
@unrecorded
def _cached_table(values: Values, dtype: torch.dtype, device: torch.device, stream: int) -> Tensor:
    made = _table(values, dtype)
    return made.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else made.to(device)


@lru_cache(maxsize=64)
@unrecorded
def _cached_blocks(sizes: tuple[int, ...], block: int, device: torch.device, stream: int) -> tuple[Tensor, Tensor]:
    starts, owners = _blocks(sizes, block)
    return starts.to(device), owners.to(device)


@unrecorded
def _table(values: Values, dtype: torch.dtype) -> Tensor:
    return torch.tensor(values, dtype=dtype, device="cpu")


@unrecorded
def _blocks(sizes: tuple[int, ...], block: int) -> tuple[Tensor, Tensor]:
    counts = torch.tensor(_counts(sizes, block), device="cpu")
    owners = torch.repeat_interleave(torch.arange(len(sizes), dtype=torch.int32, device="cpu"), counts)
    return counts.cumsum(0) - counts, owners


def _counts(sizes: tuple[int, ...], block: int) -> list[int]:
    return [-(-size // block) for size in sizes]


def _stream(device: torch.device) -> int:
    """Returns the stream on which a table is copied: another one may read it before the copy is done."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
