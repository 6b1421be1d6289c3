"""Graphs on a GPU, by a stand-in for CUDA's: it repeats recorded operations into the tensors that they made."""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from models import build, points, regression_loss
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

import metakern as mk
from benchmarks import few_shot
from benchmarks.peers.metakern import adapted
from benchmarks.workloads import FAMILIES, make
from metakern.meta import capture
from metakern.meta.capture.graph import Graph, Graphs, _Reads
from metakern.meta.capture.recorder import LIFTS, Recorder, RecordError, record
from metakern.native.record import Recording
from metakern.ops.core.triton_kernels import tables

STEPS, SINES = 3, few_shot.sines()


class FakeGraph:
    """The kernels of a run at fixed addresses."""

    def __init__(self) -> None:
        self.calls: list[tuple] = []

    @torch.no_grad()
    def replay(self) -> None:
        for function, args, kwargs, made in self.calls:
            given = {t.untyped_storage().data_ptr() for t in tensors_of((args, kwargs))}
            for old, new in zip(made, tensors_of(function(*args, **kwargs)), strict=True):
                if old.untyped_storage().data_ptr() not in given:
                    old.copy_(new)


class FakeCapture(Recording):
    def __init__(self, graph: FakeGraph, pool: Any, capture_error_mode: str) -> None:
        super().__init__()
        self.graph = graph
        assert (pool, capture_error_mode) == ("pool", "thread_local")

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def run(self, function: Any, args: Any, kwargs: Any, has_side_effects: bool) -> Any:
        with _disable_current_modes():
            made = function(*args, **kwargs)
        if function is not torch.ops.aten.empty.memory_format:  # a graph launches kernels, and memory has none
            self.graph.calls.append((function, args, kwargs, tensors_of(made)))
        return made

    def reads(self, tensors: Any) -> None:
        pass

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._efficientzerotensor.default:
            func = torch.ops.aten.zeros.default
        return self.run(func, args, kwargs or {}, False)


def tensors_of(tree: Any) -> list[Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor)]


@pytest.fixture
def gpu(monkeypatch):
    """Have captured programs take CPU tensors for those of a GPU."""
    stream = SimpleNamespace(wait_event=lambda event: None)
    for name, fake in {
        "CUDAGraph": FakeGraph,
        "graph": FakeCapture,
        "graph_pool_handle": lambda: "pool",
        "Event": lambda: SimpleNamespace(record=lambda: None),
        "current_stream": lambda: stream,
        "set_stream": lambda stream: None,
        "device": lambda device: nullcontext(),
        "memory_allocated": lambda device: 0,
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(capture, "free_bytes", lambda device: 2**30)
    monkeypatch.setattr(capture._Application, "device", property(lambda self: torch.device("cuda")))


def mamls(**options: Any) -> tuple[mk.MAML, mk.MAML]:
    """Return a captured algorithm and an ordinary one, over equal models."""
    return tuple(
        mk.MAML(build("mlp")[0], regression_loss, mk.optim.SGD(0.05), STEPS, capture=capture, **options)
        for capture in (True, False)
    )


def assert_equal(captured: mk.MAML, ordinary: mk.MAML, seed: int, tasks: int = 3) -> None:
    support, query = ([t[:tasks] for t in points(i)] for i in (seed, seed + 100))
    for maml in (captured, ordinary):
        maml.zero_grad()
        maml(support, query).backward()
    torch.testing.assert_close(captured.query_losses, ordinary.query_losses)
    for a, b in zip(captured.parameters(), ordinary.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("options", [{}, {"strategy": "recompute"}, {"task_chunk": 2}, {"batching": "loop"}], ids=str)
def test_a_graph_gives_what_an_ordinary_run_gives_for_other_batches_and_parameters(gpu, options):
    captured, ordinary = mamls(**options)
    for seed in range(6):
        assert_equal(captured, ordinary, seed)
        with torch.no_grad():
            for maml in (captured, ordinary):
                for p in maml.parameters():
                    p.mul_(1.1)
    usage = captured.plan.usage
    assert usage.captured >= 6
    assert usage.ordinary == 0


@pytest.mark.filterwarnings("ignore:.*parameters move in memory")
def test_a_graph_is_recorded_again_where_parameters_move_until_they_move_too_often(gpu):
    captured, ordinary = mamls()
    for seed in range(12):
        assert_equal(captured, ordinary, seed)
        for p in captured.parameters():
            p.data = p.data.clone()
    assert captured.plan.usage.captured == capture.MOST_MOVED + 1
    assert "not captured: parameters move in memory from call to call" in captured.plan.reasons


def test_every_number_of_tasks_has_a_graph(gpu):
    captured, ordinary = mamls()
    for seed in range(6):
        assert_equal(captured, ordinary, seed, tasks=2 + seed % 2)
    assert captured.plan.usage.programs == 2


def test_a_graph_that_needs_more_than_its_share_of_the_memory_is_not_made(gpu, monkeypatch):
    monkeypatch.setattr(Recorder, "peak_bytes", 2**29 + 1)
    captured, ordinary = mamls()
    with pytest.warns(UserWarning, match="a CUDA graph of it may need 512 MiB, more than 512 MiB"):
        assert_equal(captured, ordinary, 1)


@pytest.fixture
def recorder_on_gpu(monkeypatch):
    """Have recorders take CPU tensors for those of a GPU."""
    made = Recorder.__init__

    def on_gpu(self: Recorder, *arguments: Any) -> None:
        made(self, *arguments)
        self._is_on_gpu = True

    monkeypatch.setattr(Recorder, "__init__", on_gpu)


def test_only_the_memory_of_the_recorded_run_counts_and_not_that_of_earlier_ones(recorder_on_gpu, monkeypatch):
    """PyTorch's own peak is that of all runs so far, such as the verification in float64."""
    allocated = iter((7, 9, 8, 8))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: next(allocated))
    x = torch.randn(2**17, dtype=torch.float64)
    program, _ = record(lambda: [((x + 1) * 2).sum() + (x * x)[:1]], [x])
    assert program.peak_bytes == 9
    assert next(allocated, None) is None


def test_a_capture_that_fails_is_followed_by_a_whole_one_and_the_call_runs_ordinarily(gpu, monkeypatch):
    begun = []

    class Failing(FakeCapture):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            begun.append(self)

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if self is begun[0]:
                raise RuntimeError("operation not permitted when stream is capturing")
            return super().__torch_dispatch__(func, types, args, kwargs)

    monkeypatch.setattr(torch.cuda, "graph", Failing)
    captured, ordinary = mamls()
    with pytest.warns(UserWarning, match="operation not permitted when stream is capturing"):
        assert_equal(captured, ordinary, 1)
    assert len(begun) == 2


def test_a_failed_recording_raises_what_made_it_fail_and_leaves_the_stream_as_it_was(gpu, monkeypatch):
    class Failing(FakeCapture):
        def __exit__(self, *error: Any) -> None:
            super().__exit__(*error)
            if error[0]:
                raise RuntimeError("operation failed due to a previous error during capture")

    streams: list[Any] = []
    monkeypatch.setattr(torch.cuda, "graph", Failing)
    monkeypatch.setattr(torch.cuda, "set_stream", streams.append)
    graphs, was = Graphs(), torch.cuda.current_stream()
    with pytest.raises(ZeroDivisionError):
        Graph(lambda inputs: [inputs[0] / (1 // 0)], [torch.ones(2)], [], [], graphs)
    assert streams == [was]
    assert graphs._pool is None
    (results,) = Graph(lambda inputs: [inputs[0] * 2], [torch.ones(2)], [], [], graphs)([[torch.ones(2)]], 1) or []
    assert results[0].equal(torch.full((2,), 2.0))
    assert gc.isenabled()


def recorded(function: Any, numbers: list[int]) -> Graph:
    return Graph(lambda inputs: [function(inputs[0])], [torch.ones(2)], [], numbers, Graphs())


def test_a_model_does_not_see_that_a_graph_is_recorded(gpu, monkeypatch):
    """transformers would make a mask for packed sequences, and attention would run by its eager formula."""
    states = []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", asked := lambda: True)

    def look(x: Tensor) -> Tensor:
        states.append(torch.cuda.is_current_stream_capturing())
        with ThreadPoolExecutor(1) as thread:
            states.append(thread.submit(torch.cuda.is_current_stream_capturing).result())
        return x * 2

    recorded(look, [])
    assert states == [False, True]
    assert torch.cuda.is_current_stream_capturing is asked


@pytest.mark.parametrize("reads", [1, 3])
def test_a_recording_that_reads_other_numbers_than_the_run_before_fails(gpu, reads):
    def function(x: Tensor) -> Tensor:
        return x * sum(int(x.sum().long()) for _ in range(reads))

    with pytest.raises(RuntimeError, match=r"reads (fewer|more) numbers while a graph is recorded than before"):
        recorded(function, [2, 2])
    recorded(function, [2] * reads)


def maml(model: nn.Module, lr: float, **options: Any) -> mk.MAML:
    return mk.MAML(model, regression_loss, mk.optim.SGD(lr), STEPS, **options)


_dispatch = Recorder.__torch_dispatch__


def strict(self: Recorder, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
    """Refuse what no CUDA graph can hold: numbers as a tensor (a copy), values as numbers (a wait), random numbers."""
    assert func not in LIFTS
    assert func is not torch.ops.aten._local_scalar_dense.default
    assert torch.Tag.nondeterministic_seeded not in func.tags
    return _dispatch(self, func, types, args, kwargs)


MAKERS = {
    "implicit weights": partial(maml, weights="implicit"),
    "implicit weights, stored": partial(maml, weights="implicit", strategy="store"),
    "a shared body, stored": partial(maml, adapt=["4"], strategy="store"),
    "a shared body": partial(maml, adapt=["4"], strategy="recompute"),
    **SINES.algorithms,
}


@pytest.mark.parametrize("name", MAKERS)
def test_a_recording_uses_no_leaf_that_another_graph_has(gpu, monkeypatch, name):
    """A user keeps a loss, and so the nodes of all leaves, which are on a stream that a CUDA graph can't wait for."""
    depth, used = 0, set[str]()

    class Noted(FakeCapture):
        def __enter__(self) -> Any:
            nonlocal depth
            depth += 1
            return super().__enter__()

        def __exit__(self, *error: Any) -> None:
            nonlocal depth
            depth -= 1
            super().__exit__(*error)

    def note(name: str, gradient: Tensor) -> None:
        if depth:
            used.add(name)

    monkeypatch.setattr(torch.cuda, "graph", Noted)
    monkeypatch.setattr(Recorder, "__torch_dispatch__", strict)
    torch.manual_seed(0)
    captured = MAKERS[name](SINES.model().double(), 0.01).double()
    torch.manual_seed(0)
    ordinary = MAKERS[name](SINES.model().double(), 0.01).double()
    captured.capture, ordinary.capture = True, False
    for key, p in captured.named_parameters():
        p.register_hook(partial(note, key))
    generator = torch.Generator().manual_seed(1)
    leaves, places = [*captured.parameters()], [id(p) for m in captured.modules() for p in m._parameters.values()]
    for _ in range(4):
        support, query = (tuple(t.double() for t in batch) for batch in few_shot.waves(5, generator))
        for made in (captured, ordinary):
            made.zero_grad()
            torch.manual_seed(2)
            kept = made(support, query)
            kept.backward()
        for a, b in zip(captured.parameters(), ordinary.parameters(), strict=True):
            assert (a.grad is None) == (b.grad is None)
            if a.grad is not None:
                torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-12)
    assert captured.plan.usage.captured == 4, captured.plan.reasons
    assert not used
    assert all(a is b for a, b in zip(captured.parameters(), leaves, strict=True))
    assert [id(p) for m in captured.modules() for p in m._parameters.values()] == places


@pytest.mark.parametrize(
    ("family", "options"),
    [
        *((family, {"strategy": "store"}) for family in FAMILIES),
        *((family, {"strategy": "recompute"}) for family in ("mlp", "lstm", "llm-full")),
        *((family, {"weights": "implicit"}) for family in ("gpt", "llm-full")),
    ],
    ids=str,
)
def test_a_meta_step_has_nothing_that_a_cuda_graph_cannot_hold(gpu, monkeypatch, family, options):
    monkeypatch.setattr(Recorder, "__torch_dispatch__", strict)
    work, plain = (adapted(make(f"{family}:tiny")) for _ in range(2))
    captured, ordinary = (
        mk.MAML(w.model, w.loss, mk.optim.SGD(w.lr), w.steps, capture=capture, **options)
        for w, capture in ((work, True), (plain, False))
    )
    for _ in range(3):
        for made in (captured, ordinary):
            made.zero_grad()
            kept = made(work.support, work.query)
            kept.backward()
    assert captured.plan.usage.captured == 3, captured.plan.reasons
    for a, b in zip(captured.parameters(), ordinary.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*capture has no effect")
def test_a_loss_that_reads_a_tensor_that_learns_has_no_graph(gpu):
    outside = torch.ones((), dtype=torch.float64, requires_grad=True)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return outside * regression_loss(model, batch)

    made = mk.MAML(build("mlp")[0], loss, mk.optim.SGD(0.05), STEPS, capture=True)
    made(points(1), points(2)).backward()
    assert "not captured: the loss reads tensors that learn, which are no parameters" in made.plan.reasons
    assert outside.grad is not None


def test_a_graph_refuses_constants_that_moved(gpu):
    weight, x = torch.randn(3), torch.randn(3)
    graph = Graph(lambda inputs: [inputs[0] * weight, None], [x], [weight], [], Graphs())
    other = torch.randn(3)
    (results,) = graph([[other]], 1)
    assert results[0].equal(other * weight)
    assert results[1] is None
    weight.data = weight.data.clone()
    assert graph([[other]], 1) is None


def test_tables_of_a_graph_are_filled_once_after_its_recording(gpu, monkeypatch):
    monkeypatch.setattr(tables, "in_cuda_graph", lambda device: True)
    cpu, made = torch.device("cpu"), list[Tensor]()

    def scaled(inputs: list[Tensor]) -> list[Tensor]:
        made.append(tables.table((2.0, 3.0), cpu))
        return [inputs[0] * made[-1]]

    graph = Graph(scaled, [torch.ones(2)], [], [], Graphs())
    for x in (torch.tensor([1.0, 2.0]), torch.tensor([-1.0, 5.0])):
        (results,) = graph([[x]], 1)
        assert results[0].equal(x * torch.tensor([2.0, 3.0], dtype=torch.float64))
    assert len(made) == 1
    assert [function.__name__ for function, *_ in graph._graph.calls] == ["mul.Tensor", "detach.default"]


def test_python_gets_the_numbers_of_the_recorded_run():
    with _Reads([7, 1]):
        assert int(torch.tensor(3)) == 7
        assert torch.tensor(2.5).item() == 2.5  # the recorder refuses those of a GPU, and gives no number for others
        assert bool(torch.tensor(0))


@pytest.mark.parametrize(
    ("function", "error"),
    [
        (lambda x: nn.functional.dropout(x, 0.5), "it draws random numbers, on a GPU"),
        (lambda x: x * OUTSIDE, "it reads a tensor on the CPU"),
        (lambda x: nn.functional.dropout(x, 0.5, training=False) * 2, None),
        (lambda x: x + torch.zeros(()), None),
    ],
    ids=["dropout", "CPU", "no dropout", "made"],
)
def test_what_no_graph_can_repeat_is_an_error(recorder_on_gpu, function, error):
    x = torch.randn(4)
    with pytest.raises(RecordError, match=error) if error else nullcontext():
        record(lambda: [function(x)], [x])


OUTSIDE = torch.tensor(2.0)
