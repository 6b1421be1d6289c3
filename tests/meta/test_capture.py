"""Captured programs give the meta-gradients of ordinary runs; what cannot be captured runs without a program."""

from __future__ import annotations

import copy
import ctypes
import functools
import gc
import pickle
import re
import warnings
import weakref
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import (
    KINDS,
    assert_equal,
    build,
    calls_of,
    gradients,
    mlp,
    plain_loss,
    points,
    regression_loss,
    sgd,
    tokens,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack

import metakern as mk
from metakern import native
from metakern.dialogue.models import build_model
from metakern.meta import capture
from metakern.meta.capture import room
from metakern.meta.capture.executable import Executable
from metakern.meta.capture.recorder import RecordError, record
from metakern.meta.capture.rewrite import rewritten
from metakern.meta.unroll import Random


@pytest.mark.parametrize("strategy", ["store", "recompute"])
@pytest.mark.parametrize(("name", "batching"), KINDS)
def test_captured_meta_gradients_equal_those_of_ordinary_runs(name: str, batching: str, strategy: str) -> None:
    model, loss, _, _, _ = build(name)
    batch = points if loss is regression_loss else tokens
    options = {"inner": mk.optim.SGD(lr=0.3), "steps": 2, "batching": batching, "strategy": strategy}
    ordinary, captured = (mk.MAML(model, loss, capture=c, **options) for c in (False, True))
    calls = calls_of(captured)
    for i in range(4):
        truth = gradients(model, ordinary(batch(i), batch(i + 9)))
        calls.clear()
        found = gradients(model, captured(batch(i), batch(i + 9)))
        torch.testing.assert_close(captured.query_losses, ordinary.query_losses)
        assert_equal(found, truth, 1e-12)
        assert bool(calls) == (i < 2)  # recorded, then checked, then computed by the program
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                parameter -= 0.1 * truth[key]


def test_chunks_share_a_program_and_other_shapes_get_their_own() -> None:
    model, loss, _, _, _ = build("mlp")
    captured = mk.MAML(model, loss, steps=2, task_chunk=1, capture=True)
    for i, size in enumerate((4, 4, 3, 3)):
        support, query = (tuple(t[:, :size] for t in points(i + j)) for j in (0, 9))
        truth = gradients(model, plain_loss(model, loss, support, query, 2, sgd(0.01)))
        assert_equal(gradients(model, captured(support, query)), truth)
    programs = [p for plan in captured._engine._plans.values() for p in plan.captures(True)._programs.values()]
    assert sum(program.checked for program in programs) == 2


def test_a_batch_that_the_executable_refuses_runs_ordinarily() -> None:
    """A program that has an executable keeps no steps; its next batches are not disturbed."""
    model = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3)).double()

    def loss(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    def batch(seed: int) -> tuple[Tensor, Tensor]:
        draw = torch.Generator().manual_seed(seed)
        return torch.randint(5, (3, 6), generator=draw), torch.randint(3, (3, 6), generator=draw)

    maml = mk.MAML(model, loss, mk.optim.SGD(lr=0.3), steps=2, capture=True)
    for i in range(3):
        maml(batch(i), batch(i + 9))
    programs = maml._engine.last.captures(True)._programs.values()
    if native.obstacle() is None:
        assert all(program.executable is not None and program._program is None for program in programs)
    tokens, labels = batch(3)
    tokens[2, 0] = 5
    with pytest.raises(ValueError, match=r"tokens must be in \[0, 5\), got 5"):
        maml((tokens, labels), batch(12))
    truth = gradients(model, plain_loss(model, loss, batch(4), batch(13), 2, sgd(0.3)))
    assert_equal(gradients(model, maml(batch(4), batch(13))), truth)


def _batches_of(sizes: range) -> list[Any]:
    return [(torch.randn(2, size, 5), torch.randn(2, size, 3)) for size in sizes]


def test_programs_of_all_plans_share_a_limited_room(monkeypatch: pytest.MonkeyPatch) -> None:
    captured = mk.MAML(mlp(), regression_loss, capture=True)
    held = captured._engine._room
    for batch in _batches_of(range(9, 12)):
        captured(batch, batch)
    monkeypatch.setattr(room, "ROOM", held._taken)
    monkeypatch.setattr(room, "WAIT", 0)
    for batch in _batches_of(range(17, 23)):  # more than twice as large, so of another plan
        captured(batch, batch)
        assert held._taken <= room.ROOM
    first, second = (len(plan.captures(True)._programs) for plan in captured._engine._plans.values())
    assert first == 0 < second
    captured._engine._plans.clear()
    captured._engine.last = None
    gc.collect()
    assert held._taken == 0


def test_one_tensor_in_two_places_of_a_batch_is_two_inputs() -> None:
    def function(x: Tensor, y: Tensor) -> list[Tensor]:
        return [(x * y.exp()).sum(1)]

    captures = capture.Captures({"model": nn.Identity(), "inner": nn.Identity(), "loss": function})
    x = torch.randn(3, 4)
    for y in (x, x, torch.randn(3, 4), torch.randn(3, 4)):
        captures.begin()
        torch.testing.assert_close(captures(function, x, y), function(x, y))
    assert captures.usage.captured == 4


@pytest.mark.parametrize("mode", [True, "auto"])
def test_more_shapes_than_there_is_room_for(mode: bool | str, monkeypatch: pytest.MonkeyPatch) -> None:
    """ "auto" does not record again and again; with True it does not depend on earlier batches what is captured."""
    model, recorded = mlp(), list[Any]()
    ordinary, captured = (mk.MAML(model, regression_loss, capture=c) for c in (False, mode))
    batches = _batches_of(range(16, 28))
    for batch in [*batches[:3]] * 3:
        captured(batch, batch)
    assert captured._engine._room._taken
    monkeypatch.setattr(room, "ROOM", captured._engine._room._taken)
    monkeypatch.setattr(room, "WAIT", 10)
    monkeypatch.setattr(capture, "record", lambda *args: recorded.append(args) or record(*args))
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for batch in 6 * batches:
            found = gradients(model, captured(batch, batch))
            assert_equal(found, gradients(model, ordinary(batch, batch)), 1e-5)
    said = [str(warning.message) for warning in warned]
    assert bool(said) == (mode is True)
    assert all(re.match("MAML: the programs of the model take .* dropped and recorded again", line) for line in said)
    reasons = [reason for plan in captured._engine._plans.values() for reason in plan.explained.reasons]
    assert any("the programs of the model take" in reason for reason in reasons)
    assert len(recorded) >= 60 if mode is True else 4 <= len(recorded) <= 2 * (72 // 10)  # of one task and of all
    recorded.clear()
    (batch,) = _batches_of(range(30, 31))
    for _ in range(15):  # a new shape that stays gets its program
        captured(batch, batch)
    assert 0 < len(recorded) <= 2
    assert captured.plan.usage.captured


def test_kinds_of_batches_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "KINDS", 3)
    captured = mk.MAML(mlp(), regression_loss)
    for batch in 3 * _batches_of(range(16, 22)):
        captured(batch, batch)
    captures = captured._engine.last.captures("auto")
    assert len(captures._calls) == 3
    assert not captures._programs  # each is as new as ever


def test_a_program_in_use_is_not_dropped_for_a_new_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "MICROBATCH_BYTES", 2**30)
    monkeypatch.setattr(room, "ROOM", 2 * room.LEAST)
    monkeypatch.setattr(Executable, "size", 1)
    monkeypatch.setattr(room, "WAIT", 0)
    model, loss, _, _, _ = build("mlp")
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        captured = mk.MAML(model, loss, steps=2, task_chunk=6, capture=True)
        for i in range(3):  # chunks of 6, 6 and 5 tasks: microbatches of three and three, three and two
            support, query = (tuple(t.repeat(9, 1, 1)[:17] for t in points(i + j)) for j in (0, 9))
            truth = gradients(model, plain_loss(model, loss, support, query, 2, sgd(0.01)))
            assert_equal(gradients(model, captured(support, query)), truth)
    finally:
        torch.set_num_threads(threads)


def test_learned_rates_and_another_inner_optimizer() -> None:
    model, loss, _, _, _ = build("mlp")
    inner = mk.optim.Adam(lr=0.05, learn_lr=True)
    ordinary, captured = (mk.MAML(model, loss, inner, steps=3, capture=c) for c in (False, True))
    for i in range(4):
        found = []
        for maml in (ordinary, captured):
            inner.zero_grad()
            maml(points(i), points(i + 9)).backward()
            found.append([p.grad for p in inner.parameters()])
        torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)
        with torch.no_grad():
            for p in inner.parameters():
                p *= 1.1


@pytest.mark.parametrize("strategy", ["store", "recompute"])
def test_dropout_draws_what_an_ordinary_run_draws(strategy: str) -> None:
    model, loss, _, _, _ = build("gpt-folded")
    model.encoder.dropout.p = model.encoder.dropout1.p = 0.5
    ordinary, captured = (mk.MAML(model, loss, steps=2, strategy=strategy, capture=c) for c in (False, True))
    found: dict[bool, list[Tensor]] = {False: [], True: []}
    for maml in (ordinary, captured):
        maml(tokens(1), tokens(2))
        torch.manual_seed(5)
        for i in range(3):
            found[maml.capture] += [*gradients(model, maml(tokens(i), tokens(i))).values(), torch.rand(())]
    torch.testing.assert_close(*found.values(), rtol=1e-12, atol=1e-12)


class Scaled(nn.Module):
    """Depends on a number in an attribute and on one in a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.factor, self.settings = nn.Linear(5, 3), 1.0, {"factor": 1.0}

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.factor * self.settings["factor"]


FACTOR = 1.0


def test_numbers_and_hooks_that_change_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    model, power = Scaled().double(), 2.0

    def loss(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        return FACTOR * ((model(batch[0]) - batch[1]).abs() ** power).mean()

    captured = mk.MAML(model, loss, steps=2, capture=True)

    def check() -> None:
        for i in range(3):
            truth = gradients(model, plain_loss(model, loss, points(i), points(i + 9), 2, sgd(0.01)))
            assert_equal(gradients(model, captured(points(i), points(i + 9))), truth)

    check()
    model.factor = 2.0
    check()
    power = 3.0
    check()
    monkeypatch.setitem(globals(), "FACTOR", 0.5)
    check()
    model.register_forward_hook(lambda module, args, output: 2 * output)
    check()
    captured.steps = 3
    plain = plain_loss(model, loss, points(1), points(2), 3, sgd(0.01))
    assert_equal(gradients(model, captured(points(1), points(2))), gradients(model, plain))


def test_a_program_that_differs_from_its_ordinary_run_is_not_used() -> None:
    model, library = Scaled().double(), {"__name__": "torch.of_a_test", "FACTOR": 1.0}
    exec("def factor(): return FACTOR", library)  # a function of a library: guards take its globals for constants

    def loss(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        return regression_loss(model, batch) * library["factor"]()

    captured = mk.MAML(model, functools.partial(scaled_loss, library["factor"]), steps=2, capture=True)
    captured(points(0), points(9))
    library["FACTOR"] = 2.0
    for i in (1, 2):
        truth = gradients(model, plain_loss(model, loss, points(i), points(i + 9), 2, sgd(0.01)))
        if i == 1:
            with pytest.warns(UserWarning, match="capture has no effect.*other results than an ordinary run"):
                found = gradients(model, captured(points(i), points(i + 9)))
        else:
            found = gradients(model, captured(points(i), points(i + 9)))
        assert_equal(found, truth)


@pytest.mark.parametrize("wrong", [1, 2, 3])
def test_a_program_that_differs_by_little_is_tried_on_other_data(wrong: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for a ReLU whose input is 0 up to rounding: its derivative may be another one in a program."""
    model, run, factor = mlp().double(), capture._Captured.__call__, 1.0

    def rounded(self: Any, *args: Any) -> Any:
        return [[t if t is None else t * factor for t in results] for results in run(self, *args)]

    monkeypatch.setattr(capture, "MICROBATCH_BYTES", 1)
    monkeypatch.setattr(capture._Captured, "__call__", rounded)
    captured = mk.MAML(model, regression_loss, steps=2, capture=True)
    refused = pytest.warns(UserWarning, match="other results than an ordinary run")
    for i in range(6):
        factor = 1 + 1e-6 * (i < wrong)
        with refused if wrong == 3 == i + 1 else nullcontext():
            found = gradients(model, captured(points(i), points(i + 9)))
        truth = plain_loss(model, regression_loss, points(i), points(i + 9), 2, sgd(0.01))
        assert_equal(found, gradients(model, truth))
    assert (captured.plan.usage.programs == 1) == (wrong < 3)


def borderline(seed: int) -> tuple[Tensor, Tensor]:
    """Equal inputs for a layer whose weights sum to zero: its outputs are 0 up to rounding."""
    x, y = torch.zeros(4, 5, 400), torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(seed))
    return x + torch.rand(4, 5, 1, generator=torch.Generator().manual_seed(seed)), y


def ordinary(seed: int) -> tuple[Tensor, Tensor]:
    make = torch.Generator().manual_seed(seed)
    return torch.randn(4, 5, 400, generator=make), torch.randn(4, 5, 3, generator=make)


@pytest.mark.parametrize(("fault", "dropout"), [(False, 0.0), (True, 0.0), (True, 0.3)])
def test_an_audit_tells_rounding_from_a_fault(fault: bool, dropout: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where ReLUs jump, a program differs from an ordinary run; a fault that shows later is an error, however small."""
    run, found, threads = capture._Captured.__call__, list[str](), torch.get_num_threads()
    difference = capture._difference

    def faulty(self: Any, microbatches: Any, *args: Any) -> Any:
        results = run(self, microbatches, *args)
        wrong = fault and microbatches[0][0].std() < 0.5
        return [[t if t is None else t * 1.02 for t in r] for r in results] if wrong else results

    def seen(*args: Any, **options: Any) -> str:
        found.append(difference(*args, **options))
        return found[-1]

    monkeypatch.setattr(capture._Captured, "__call__", faulty)
    monkeypatch.setattr(capture, "_difference", seen)
    torch.manual_seed(0)
    first = nn.Linear(400, 64, bias=False)
    model = nn.Sequential(first, nn.Dropout(dropout), nn.Tanh() if fault else nn.ReLU(), nn.Linear(64, 3))
    with torch.no_grad():
        first.weight -= first.weight.mean(1, keepdim=True)
    captured = mk.MAML(model, regression_loss, mk.optim.SGD(0.01), 2, capture=True)
    torch.set_num_threads(1)  # one program for all tasks
    try:
        for i in range(3):
            captured(ordinary(i), ordinary(i + 9))
        assert not any(found)
        refused = pytest.raises(capture.StaleCaptureError, match=r"use 4: .* a fault of metakern")
        with refused if fault else nullcontext():
            for i in range(3, 9):
                captured(borderline(i), ordinary(i + 9))
    finally:
        torch.set_num_threads(threads)
    assert any(found)


def loss_times_first(first: Any, model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    return regression_loss(model, batch) * first(batch[0].clone())


def scaled_loss(factor: Any, model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    return regression_loss(model, batch) * factor()


@pytest.mark.parametrize("chunk", [1, 3])
def test_a_value_of_the_data_in_a_program_raises_at_the_next_call(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The program of one task runs the other tasks of its first batch before it was compared on their data."""
    monkeypatch.setattr(capture, "MICROBATCH_BYTES", 1)
    library: dict[str, Any] = {"__name__": "torch.of_a_test", "read": ctypes.c_double.from_address}
    exec("def first(x): return read(x.data_ptr()).value", library)  # a function of a library that PyTorch can't see
    model, loss = Scaled().double(), functools.partial(loss_times_first, library["first"])
    captured = mk.MAML(model, loss, steps=2, batching="loop", task_chunk=chunk, capture=True)
    captured(points(0), points(9))
    with pytest.raises(capture.StaleCaptureError, match="at its use 1: the query losses differs by"):
        captured(points(1), points(10))
    truth = gradients(model, plain_loss(model, loss, points(2), points(11), 2, sgd(0.01)))
    assert_equal(gradients(model, captured(points(2), points(11))), truth)


@pytest.mark.parametrize("chunk", [2, "auto"])
@pytest.mark.parametrize("microbatch_bytes", [capture.MICROBATCH_BYTES, 1])
def test_another_number_of_tasks_uses_the_same_programs(
    microbatch_bytes: int, chunk: int | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capture, "MICROBATCH_BYTES", microbatch_bytes)
    monkeypatch.setattr(capture, "FIRST_AUDIT", 2**20)
    model, loss, _, _, _ = build("mlp")
    captured = mk.MAML(model, loss, steps=2, task_chunk=chunk, capture="auto")
    calls = calls_of(captured)
    for i, tasks in enumerate((4, 5, 3, 3, 1, 4, 2, 5)):
        support, query = (tuple(t.repeat(2, 1, 1)[:tasks] for t in points(i + j)) for j in (0, 9))
        truth = gradients(model, plain_loss(model, loss, support, query, 2, sgd(0.01)))
        calls.clear()
        assert_equal(gradients(model, captured(support, query)), truth)
        torch.testing.assert_close(captured.query_losses.mean(), captured(support, query).detach())
        if microbatch_bytes == 1 and i > 3:
            assert not calls
    if microbatch_bytes == 1:
        assert captured.plan.usage.programs == 1
        assert captured.plan.usage.captured > captured.plan.usage.ordinary > 0
        assert f"  - {captured.plan.usage}\n" in str(captured.plan)


def test_the_plan_says_what_its_first_calls_took() -> None:
    model, loss, _, _, _ = build("mlp")
    captured = mk.MAML(model, loss, steps=2, capture=True)
    captured(points(0), points(9))
    plan, first = captured.plan, captured.plan.seconds
    parts = [name for name, seconds in first.parts if seconds > 0]
    assert parts[:4] == ["sizes", "truth, first order", "truth, second order", "slopes"]
    assert {"fold, first order", "fold, second order", "recording", "comparison"} <= {*parts}
    assert first.total == pytest.approx(sum(first[part] for part in parts))
    assert first["loop, first order"] == 0
    assert f"recording {first['recording']:.2f}" in str(first)
    assert str(first) in str(plan)
    captured(points(1), points(10))
    assert captured.plan == plan
    assert captured.plan.seconds["comparison"] > first["comparison"]
    assert captured.plan.seconds["recording"] == first["recording"]


def test_copies_have_programs_of_their_own() -> None:
    captured = mk.MAML(mlp().double(), regression_loss, steps=2, capture=True)
    for i in range(3):
        captured(points(i), points(i + 9))
    for copied in (copy.deepcopy(captured), pickle.loads(pickle.dumps(captured))):
        with torch.no_grad():
            copied.model[0].weight += 1
        for i in range(3):
            value = copied(points(i), points(i + 9))
        ordinary = mk.MAML(copied.model, regression_loss, steps=2)
        torch.testing.assert_close(value, ordinary(points(2), points(11)))


def test_programs_are_recorded_below_other_dispatch_modes() -> None:
    class Other(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return func(*args, **(kwargs or {}))

    def loss(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        with Other():
            return regression_loss(model, batch)

    captured = mk.MAML(mlp().double(), loss, steps=2, batching="loop", capture=True)
    for i in range(3):
        value = captured(points(i), points(i + 9))
    torch.testing.assert_close(value, mk.MAML(captured.model, loss, steps=2)(points(2), points(11)))
    assert any(program.checked for program in captured._engine.last.captures(True)._programs.values())


def test_losses_that_read_values_in_python_are_not_captured() -> None:
    def loss(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        error = (model(batch[0]) - batch[1]).square()
        return error.mean() if error.mean().item() > 1 else error.sum()

    model, _, _, _, _ = build("mlp")
    captured = mk.MAML(model, loss, mk.optim.SGD(lr=0.01), steps=3, capture=True)
    for i in range(3):
        truth = gradients(model, plain_loss(model, loss, points(i), points(i + 9), 3, sgd(0.01)))
        if i == 0:
            with pytest.warns(UserWarning, match=r"capture has no effect.*values of a tensor \(aten\._local_scalar"):
                found = gradients(model, captured(points(i), points(i + 9)))
        else:
            found = gradients(model, captured(points(i), points(i + 9)))
        assert_equal(found, truth)


@pytest.mark.parametrize("tasks", [1, 3])
def test_what_python_reads_from_a_mask_decides_which_program_runs(tasks: int) -> None:
    def loss(model: Any, batch: tuple[Tensor, ...]) -> Tensor:
        x, y, mask = batch
        error = (model(x) - y).square().mean(-1)
        return error.mean() if mask.all() else (error * mask).sum() / int(mask.sum())

    def data(seed: int, kinds: list[int]) -> tuple[Tensor, ...]:
        x, y = (t[:tasks] for t in points(seed))
        mask = torch.ones(x.shape[:2], dtype=torch.bool)
        for task, kind in enumerate(kinds):
            mask[task, x.shape[1] - kind :] = False
        return x, y, mask

    model = mlp().double()
    ways = [mk.MAML(model, loss, steps=2, batching="loop", capture=capture) for capture in (True, False)]
    for i, kinds in enumerate([[0, 0, 0], [1, 1, 1], [0, 1, 0], [1, 0, 0]]):
        support, query = data(i, kinds[:tasks]), data(i + 9, kinds[::-1][:tasks])
        found, truth = (gradients(model, maml(support, query)) for maml in ways)
        assert_equal(found, truth)
    captures = ways[0]._engine.last.captures(True)
    assert not captures.reasons
    assert len(captures._programs) >= 2
    assert all(program is not None for program in captures._programs.values())


def test_numbers_that_follow_from_shapes_decide_nothing() -> None:
    """As whether the positions of a sequence are those of packed sequences, which transformers asks in each pass."""
    kinds = torch.tensor([1, 2, 3])

    def positions(x: Tensor) -> bool:
        return bool((torch.arange(x.shape[1]).diff() != 1).any())

    def function(x: Tensor, what: list[Any]) -> list[Tensor]:
        return [x * sum(int(read(x)) for read in what)]

    x = torch.ones(2, 3)
    sources = {"shapes": positions, "the inputs": lambda x: x.long().sum(), "a tensor": lambda x: kinds.sum()}
    for what, numbers in ((["shapes"], None), (["shapes", "the inputs"], [6]), (["a tensor", "shapes"], [6])):
        program, _ = record(lambda what=what: function(x, [sources[name] for name in what]), [x], rewritten)
        assert program.numbers == [{"shapes": 0}.get(name, 6) for name in what]
        assert (program.decisions and program.decisions.numbers) == numbers
    assert program.decisions.hold([x])
    kinds.add_(1)
    assert not program.decisions.hold([x])


def test_a_count_that_always_differs_is_not_captured() -> None:
    def loss(model: Any, batch: tuple[Tensor, ...]) -> Tensor:
        return (model(batch[0]) - batch[1]).square().sum() / int(batch[2].sum())

    model = mlp().double()
    ways = [mk.MAML(model, loss, steps=1, batching="loop", capture=capture) for capture in (True, False)]
    for i in range(10):
        batch = (*(t[:1] for t in points(i)), torch.tensor([[i + 2]]))
        if i == 8:
            with pytest.warns(UserWarning, match="Python looks at values of tensors that differ from batch to batch"):
                ways[0](batch, batch)
        assert_equal(*(gradients(model, maml(batch, batch)) for maml in ways))


def test_losses_that_fail_when_recorded_are_not_captured() -> None:
    def loss(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        if any(isinstance(mode, mk.native.record.Recording) for mode in _get_current_dispatch_mode_stack()):
            raise NotImplementedError("not under a mode")
        return regression_loss(model, batch)

    model, _, _, _, _ = build("mlp")
    captured = mk.MAML(model, loss, steps=1, capture=True)
    with pytest.warns(UserWarning, match="capture has no effect.*not under a mode"):
        found = gradients(model, captured(points(1), points(2)))
    assert_equal(found, gradients(model, plain_loss(model, regression_loss, points(1), points(2), 1, sgd(0.01))))
    with pytest.raises(RuntimeError, match="must match the size"):
        mk.MAML(model, loss, steps=1, capture=True)(points(1), points(2, outputs=4))


def test_zeros_without_memory_are_recorded_as_zeros() -> None:
    """Forward mode makes such zeros for missing tangents. Without their own case PyTorch would read them and crash."""
    x = torch.randn(3)
    program, results = record(lambda: [x + 1, torch._efficientzerotensor((3,))], [x])
    for found in (results, program([x])):
        assert not found[1]._is_zerotensor()
        assert_equal(dict(enumerate(found)), {0: x + 1, 1: torch.zeros(3)})


def test_programs_check_the_range_of_targets() -> None:
    model = nn.Linear(5, 3)
    captured = mk.MAML(model, mk.losses.classification, steps=1, capture=True)
    x, y = torch.randn(2, 4, 5), torch.randint(3, (2, 4))
    for _ in range(3):
        captured((x, y), (x, y))
    with pytest.raises(ValueError, match=r"target must be in \[0, 3\), got 7"):
        captured((x, torch.full_like(y, 7)), (x, y))


def test_programs_write_in_place_read_closed_over_tensors_and_drop_dead_code() -> None:
    weight, calls = torch.ones(3), []

    @mk.native.record.recordable()
    def kernel(a: Tensor) -> Tensor:
        calls.append(1)
        return a.detach() * weight

    def function(x: Tensor) -> list[Tensor | None]:
        y = x * 2
        view = y.detach()[1:]
        view.add_(kernel(x)[1:])
        _ = torch.exp(x)  # dead code
        a, b = torch.split(y, [1, 2])
        return [y, None, torch.cat([b, a]), F.dropout(x, 0.5)]

    inputs = torch.arange(3.0), torch.randn(3)
    program, _ = record(lambda: function(inputs[0]), inputs[:1])
    weight.fill_(5.0)
    torch.manual_seed(3)
    truth = function(inputs[1])
    calls.clear()
    torch.manual_seed(3)
    found = program(inputs[1:])
    assert found[1] is None
    assert all(torch.equal(found[i], truth[i]) for i in (0, 2, 3))
    assert calls == [1]
    assert not any("exp" in str(step.function) for step in program.steps)


def mul_add(x: Tensor, y: Tensor) -> list[Tensor]:
    """Scalars before and after a product and through a view of it, and sums on either side."""
    scaled = x * 0.5
    return [y + multiply(scaled.mT, x), torch.add(y, multiply(x.mT, scaled), alpha=-3), multiply(x.mT, x) + y]


def sums_of_products(x: Tensor, y: Tensor) -> list[Tensor]:
    return [y + multiply(x.mT, x) + multiply(x.mT, x * 2) + multiply(x.mT, x * 3)]


def used_twice(x: Tensor, y: Tensor) -> list[Tensor]:
    scaled, both = x * 0.5, multiply(x.mT, x)
    return [scaled, multiply(scaled.mT, x), both + y, both]


def square_of_a_multiple(x: Tensor, y: Tensor) -> list[Tensor]:
    scaled = x[:, :3] * 0.5
    return [multiply(scaled, scaled), scaled.sum()]


def written_between(x: Tensor, y: Tensor) -> list[Tensor]:
    operand = x * 1
    scaled, both = operand * 0.5, multiply(operand.mT, operand)
    operand.view(-1).add_(1)
    return [multiply(scaled.mT, x), both + y, operand]


def sums_that_broadcast(x: Tensor, y: Tensor) -> list[Tensor]:
    return [y[:, :1] + multiply(x.mT, x), y.double() + multiply(x.mT, x)]


def added_to_what_is_there(x: Tensor, y: Tensor) -> list[Tensor]:
    return [y * 2 + multiply(x.mT, x, y), multiply(x.mT, x, y * 1, True) + y]


def views_of_views(x: Tensor, y: Tensor) -> list[Tensor]:
    flat = x.view(2, -1)
    same = flat.view(x.shape)
    small = [torch.arange(5) * 2 for _ in range(2)]
    small[0].mul_(3)
    return [
        same * 2,
        flat.view(5, -1),
        *small,
        same.view(2, 5, 3).mT,
        torch.randn(2) + 0 * small[1].sum(),
        torch.randn(2),
    ]


def draws_again(x: Tensor, y: Tensor) -> list[Tensor]:
    generator = Random(x.device)
    drawn = []
    for _ in range(3):
        generator.restore()
        drawn.append(torch.randn(2))
    later = Random(x.device)
    torch.randn(2)
    later.restore()
    return [*drawn, torch.randn(2), x + 0]


multiply = mk.native.product


@pytest.mark.skipif(mk.native.obstacle() is not None, reason="the products are C++")
@pytest.mark.parametrize(
    ("function", "fewer"),
    [
        (mul_add, ("aten.mul.Scalar", "aten.mul.Tensor", "aten.add.Tensor")),
        (sums_of_products, ("aten.mul.Tensor", "aten.add.Tensor")),
        (used_twice, ()),
        (square_of_a_multiple, ()),
        (written_between, ()),
        (sums_that_broadcast, ()),
        (added_to_what_is_there, ()),
        (views_of_views, ()),
        (draws_again, ()),
    ],
)
def test_rewritten_programs_compute_the_same(function: Any, fewer: tuple[str, ...]) -> None:
    """Rewriting changes no result, also where it almost applies, and leaves none of the operations in `fewer`."""
    inputs = [(torch.randn(2, 5, 3), torch.randn(2, 3, 3)) for _ in range(2)]
    for rewrite in (lambda steps, outputs: steps, rewritten):
        program, _ = record(lambda: function(*inputs[0]), inputs[0], rewrite)
        before = [t.clone() for t in inputs[1]]
        torch.manual_seed(0)
        truth = function(*inputs[1])
        torch.manual_seed(0)
        torch.testing.assert_close(program(inputs[1]), truth, rtol=1e-5, atol=1e-5)
        assert all(map(torch.equal, before, inputs[1]))
    names = [str(step.function) for step in program.steps]
    assert not set(names).intersection(fewer), names


@pytest.mark.parametrize("look", [lambda x: x[0].item(), lambda x: x[x > 0].sum(), lambda x: torch.equal(x, x)])
def test_reading_values_in_python_stops_a_recording(look: Any) -> None:
    x = torch.randn(4)
    with pytest.raises(RecordError, match="looks at the values"):
        record(lambda: [look(x) and x], [x])


def test_an_ordinary_run_that_confirms_a_program_gets_the_memory_of_its_arenas(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    model, released = mlp().double(), Executable.release
    captured = mk.MAML(model, regression_loss, steps=2, capture=True, task_chunk=1)
    run = captured._meta_gradient
    monkeypatch.setattr(Executable, "release", lambda self: (events.append("release"), released(self))[1])
    monkeypatch.setattr(captured, "_meta_gradient", lambda *args: (events.append("run"), run(*args))[1])
    captured(points(0), points(9))
    for i in range(1, 4):  # checked, then audited at uses 4 and 8
        events.clear()
        captured(points(i), points(9 + i))
        assert events == ["release", "run"] * (len(events) // 2)
        assert events


def test_few_microbatches_have_their_gradients_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "MICROBATCH_BYTES", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    made: list[weakref.ref[Tensor]] = []
    alive: list[int] = []
    run = capture._Captured.__call__

    def counted(self: Any, microbatches: Any, *args: Any) -> Any:
        alive.append(sum(t() is not None for t in made))
        results = run(self, microbatches, *args)
        made.extend(weakref.ref(result[1]) for result in results)
        return results

    model, loss, _, _, _ = build("mlp")
    captured = mk.MAML(model, loss, steps=1, capture=True)
    support, query = (tuple(t.repeat(3, 1, 1) for t in points(i)) for i in (0, 9))
    for _ in range(2):
        captured(support, query)
    monkeypatch.setattr(capture._Captured, "__call__", counted)
    found = gradients(model, captured(support, query))
    assert len(made) == 9
    assert alive == [0] * 5
    assert_equal(found, gradients(model, plain_loss(model, loss, support, query, 1, sgd(0.01))))


@pytest.mark.parametrize(
    ("name", "sizes"), [("gpt", {"width": 16, "heads": 2, "max_length": 40}), ("gru", {"embedding": 8, "hidden": 16})]
)
def test_tokens_that_are_no_labels_may_be_others_in_each_batch(name: str, sizes: dict[str, int]) -> None:
    """A program leaves them out of the head's products; which these are is up to the batch."""
    torch.manual_seed(0)
    model = build_model(name, 50, layers=1, **sizes).double()

    def batch(share: float) -> dict[str, Tensor]:
        ids = torch.randint(50, (6, 3, 40))
        is_label = (torch.arange(40) + torch.randint(40, (6, 3, 1))) % 37 >= 37 * share
        return {"input_ids": ids, "labels": ids.where(is_label, -100)}

    captured, plain = (mk.MAML(model, mk.losses.causal_lm, steps=2, capture=capture) for capture in (True, False))
    for share in (0.5, 0.0, 0.9, 1.0, 0.6):
        support, query = batch(share), batch(share)
        found, truth = (gradients(model, maml(support, query)) for maml in (captured, plain))
        assert_equal(found, truth, 1e-12)
    assert captured.plan is not None
    assert captured.plan.usage.ordinary == 0
