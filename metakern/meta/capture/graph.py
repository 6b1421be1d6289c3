"""CUDA graphs: the kernels of an ordinary run on a GPU, launched again by the driver without Python or autograd.

The run that is recorded before says whether a graph can repeat it (`Recorder`). A graph launches the same kernels at
the same addresses: it reads the memory of parameters and other tensors where it is, and its inputs are copied to where
the run read them. It holds the memory of a whole run as long as it lives.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from metakern.meta.capture.recorder import INTEGERS
from metakern.meta.capture.room import ROOM
from metakern.meta.draws import ZEROS
from metakern.ops.core.triton_kernels.tables import Kept

MOST_GRAPHS = 32  # of a model
SHARE = 0.5  # of the free memory that a graph may take; ordinary runs, which audit it, take as much beside it
_READ = torch.ops.aten._local_scalar_dense.default


class Graphs:
    """What the graphs of one function share: their memory, since only one runs at a time, and the end of the last."""

    def __init__(self) -> None:
        self._pool: Any = None
        self._done: torch.cuda.Event | None = None

    @property
    def pool(self) -> Any:
        self._pool = self._pool or torch.cuda.graph_pool_handle()
        return self._pool

    @contextmanager
    def recorded(self, graph: torch.cuda.CUDAGraph) -> Iterator[None]:
        """Record what the current device is given within the block. What made a recording fail is raised."""
        stream, cause = torch.cuda.current_stream(), None
        gc.collect()
        with _no_collection():  # the end of another graph, of which only a cycle of objects is left, would break this
            try:
                with _capturing(graph, self.pool):
                    try:
                        yield
                    except BaseException as error:  # the end of a broken recording raises another one
                        cause = error
                        raise
            except BaseException as error:
                self._mend(stream)
                raise cause or error from None

    def _mend(self, stream: torch.cuda.Stream) -> None:
        """Undo what a failed recording leaves behind: its stream, its pool and what its generators expect."""
        torch.cuda.set_stream(stream)
        with suppress(Exception):  # the pool may have been closed
            torch._C._cuda_endAllocateToPool(stream.device.index, self.pool)
        self._pool = None
        with suppress(Exception), _capturing(torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()):
            torch.zeros(1, device=stream.device)  # a whole recording frees the generators

    def wait(self) -> None:
        """Have the current stream wait for the last run, which may be on another stream."""
        if self._done is not None:
            torch.cuda.current_stream().wait_event(self._done)

    def done(self) -> None:
        self._done = self._done or torch.cuda.Event()
        self._done.record()


class Graph:
    """A captured run: `graph([inputs])` returns its outputs for other inputs of the same layout.

    Args:
        function: `function(inputs)` runs ordinarily and returns a list of tensors (or None).
        inputs: Tensors on one GPU.
        constants: The other tensors that the run reads. It returns None where one has moved.
        numbers: The integers and booleans that Python reads in the run, in order.
        graphs: What it shares with other graphs.
    """

    def __init__(
        self,
        function: Callable[[list[Tensor]], Sequence[Tensor | None]],
        inputs: Sequence[Tensor],
        constants: Iterable[Tensor],
        numbers: Sequence[int],
        graphs: Graphs,
    ) -> None:
        self._graphs, self._graph, self._device = graphs, torch.cuda.CUDAGraph(), inputs[0].device
        self._constants = list(constants)
        self._places = [_place(t) for t in self._constants]
        with torch.no_grad(), torch.cuda.device(self._device):
            graphs.wait()
            self._inputs = [t.clone() for t in inputs]
            reads, self._tables = _Reads(numbers), Kept(self._device)
            with torch.enable_grad(), _HIDDEN, graphs.recorded(self._graph), self._tables:
                with reads if numbers else nullcontext():
                    found = list(function(self._inputs))
                reads.finish()
                self._outputs = [None if t is None else t.detach() for t in found]
            self._tables.fill()

    @property
    def size(self) -> int:
        """Bytes for `Room`, which so holds MOST_GRAPHS graphs: they share memory on the GPU, and it is short there."""
        return ROOM // MOST_GRAPHS

    def fits(self) -> bool:
        """Whether all tensors that it reads are where they were, with the layouts that they had."""
        return [_place(t) for t in self._constants] == self._places

    def release(self) -> None:
        """A graph keeps its memory."""

    def __call__(
        self, microbatches: Sequence[Sequence[Tensor]], threads: int, bfloat16: bool = False
    ) -> list[list[Tensor | None]] | None:
        if not self.fits():
            return None
        results = []
        with torch.no_grad(), torch.cuda.device(self._device):
            for inputs in microbatches:
                self._graphs.wait()
                torch._foreach_copy_(self._inputs, list(inputs))
                self._graph.replay()
                made = [None if t is None else torch.empty_like(t) for t in self._outputs]
                torch._foreach_copy_(_present(made), _present(self._outputs))
                self._graphs.done()
                results.append(made)
        return results


class _Hidden:
    """Within the block, `torch.cuda.is_current_stream_capturing` is False for this thread.

    A model that asks it would take another way than in the run before: transformers then makes masks for packed
    sequences, with which attention is no longer causal.
    """

    def __init__(self) -> None:
        self._lock, self._threads, self._real = threading.Lock(), list[int](), torch.cuda.is_current_stream_capturing

    def __enter__(self) -> None:
        with self._lock:
            if not self._threads:
                self._real = torch.cuda.is_current_stream_capturing
                torch.cuda.is_current_stream_capturing = self._asked
            self._threads.append(threading.get_ident())

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._threads.remove(threading.get_ident())
            if not self._threads:
                torch.cuda.is_current_stream_capturing = self._real

    def _asked(self) -> bool:
        return threading.get_ident() not in self._threads and self._real()


_HIDDEN = _Hidden()


def _capturing(graph: torch.cuda.CUDAGraph, pool: Any) -> Any:
    return torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local")


@contextmanager
def _no_collection() -> Iterator[None]:
    """Keep Python from collecting cycles of objects within the block."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


class _Reads(TorchDispatchMode):
    """Gives Python the numbers that it read in the recorded run, as a capture may not wait for the GPU."""

    def __init__(self, numbers: Sequence[int]) -> None:
        super().__init__()
        self._numbers = iter(numbers)

    def _next(self) -> int:
        for number in self._numbers:
            return number
        raise RuntimeError("the run reads more numbers while a graph is recorded than before")

    def finish(self) -> None:
        """Raise RuntimeError unless all numbers were read: with fewer, some went to the wrong place."""
        for _ in self._numbers:
            raise RuntimeError("the run reads fewer numbers while a graph is recorded than before")

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _READ and args[0].dtype in INTEGERS:
            return self._next()
        if func is ZEROS:
            return torch.zeros(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _present(tensors: Iterable[Tensor | None]) -> list[Tensor]:
    return [t for t in tensors if t is not None]


def _place(t: Tensor) -> tuple:
    return t.data_ptr(), t.shape, t.stride(), t.dtype
