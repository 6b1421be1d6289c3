"""`linear_cross_entropy` alone: it never holds the logits; chunks, extreme logits, and errors."""

import importlib
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
import torch.autograd.forward_ad as fwd
import torch.nn.functional as F
from largest import Largest
from torch import Tensor

import metakern as mk
from metakern.ops.core.spec import Make

room = importlib.import_module("metakern.ops.linear_cross_entropy")


def gradient(f: Callable, hidden: Tensor, weight: Tensor, target: Tensor, create_graph: bool) -> tuple[Tensor, ...]:
    loss = (f(hidden, weight, target) * torch.tensor([0.7, 1.9])).sum()
    return torch.autograd.grad(loss, (hidden, weight), create_graph=create_graph)


def reverse_over_reverse(f: Callable, hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    g = gradient(f, hidden, weight, target, True)
    return (*g, *torch.autograd.grad(sum((gi * gi).sum() for gi in g), (hidden, weight)))


def forward_over_reverse(f: Callable, hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, ...]:
    with fwd.dual_level():
        duals = (fwd.make_dual(hidden, hidden.cos()), fwd.make_dual(weight, weight.cos()))
        return tuple(t for g in gradient(f, *duals, target, False) for t in fwd.unpack_dual(g))


def plain(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return mk.ops.cross_entropy(hidden @ weight.mT, target)


@pytest.mark.parametrize("own", [True, False])
@pytest.mark.parametrize("order", [reverse_over_reverse, forward_over_reverse])
def test_never_holds_the_logits_of_a_task_at_any_order(order: Callable, own: bool) -> None:
    make = Make(seed=2)
    T, N, V, D = 2, 200, 50, 3
    hidden, weight = make(T, N, D).requires_grad_(), make(*(T,) * own, V, D).requires_grad_()
    target = make.integers(V, T, N)
    with Largest() as ours:
        results = order(mk.ops.linear_cross_entropy, hidden, weight, target)
    with Largest() as theirs:
        expected = order(plain, hidden, weight, target)
    for a, b in zip(results, expected, strict=True):
        torch.testing.assert_close(a, b)
    assert ours.elements < N * V <= theirs.elements


@pytest.mark.parametrize("order", [reverse_over_reverse, forward_over_reverse])
def test_results_do_not_depend_on_the_size_of_chunks(order: Callable, monkeypatch: pytest.MonkeyPatch) -> None:
    make = Make(seed=3)
    args = (make(2, 11, 3).requires_grad_(), make(2, 5, 3).requires_grad_(), make.integers(5, 2, 11))
    expected = order(mk.ops.linear_cross_entropy, *args)
    monkeypatch.setattr(room, "_LEAST_ROWS", 1)
    for rows in (1, 2, 3):
        monkeypatch.setitem(room._BYTES, "cpu", rows * 5 * 8)
        chunks = [s for t, s in room._chunks(SimpleNamespace(most=6), *args[:2]) if t == 1]
        assert [s.stop - s.start for s in chunks] == [rows] * (11 // rows) + [11 % rows] * (11 % rows > 0)
        for a, b in zip(order(mk.ops.linear_cross_entropy, *args), expected, strict=True):
            torch.testing.assert_close(a, b)


BACKENDS = [name for name in ("reference", "triton") if mk.backends()[name] == "available"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("order", [reverse_over_reverse, forward_over_reverse])
def test_results_do_not_depend_on_how_many_tasks_a_chunk_has(
    order: Callable, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = Make(seed=4)
    args = (make(5, 7, 3).requires_grad_(), make(5, 6, 3).requires_grad_(), make.integers(6, 5, 7))

    def loss(*args: Tensor) -> Tensor:
        return mk.ops.linear_cross_entropy(*args)[:2] + mk.ops.linear_cross_entropy(*args)[3:]

    expected = order(loss, *args)
    monkeypatch.setattr(room, "_ONE_TASK", set())  # as on a GPU
    for tasks in (1, 2, 5):
        monkeypatch.setitem(room._BYTES, "cpu", tasks * 4 * 6 * 8)
        chunks = [*room._chunks(SimpleNamespace(most=4), *args[:2])]
        sizes = [1 if isinstance(t, int) else t.stop - t.start for t, rows in chunks if rows.start == 0]
        assert sizes == {1: [1] * 5, 2: [2, 2, 1], 5: [5]}[tasks]
        with mk.backend(backend):
            for a, b in zip(order(loss, *args), expected, strict=True):
                torch.testing.assert_close(a, b)


def test_extreme_logits_and_a_task_without_a_kept_token() -> None:
    hidden = torch.tensor([[[1e4], [-1e4]], [[1.0], [2.0]]], requires_grad=True)
    weight = torch.tensor([[1.0], [-1.0], [0.5]], requires_grad=True)
    target = torch.tensor([[1, 0], [-100, -100]])
    loss = mk.ops.linear_cross_entropy(hidden, weight, target)
    torch.testing.assert_close(loss, torch.tensor([2e4, 0.0]))
    g = torch.autograd.grad(loss.sum(), (hidden, weight), create_graph=True)
    h = torch.autograd.grad(sum((gi * gi).sum() for gi in g), (hidden, weight))
    assert all(t.isfinite().all() for t in (*g, *h))
    assert not g[0][1].any()


def test_equals_torch() -> None:
    make = Make(seed=4)
    hidden, weight, target = make(6, 4), make(5, 4), make.integers(5, 6)
    target[1] = -100
    expected = F.cross_entropy(hidden @ weight.T, target)
    torch.testing.assert_close(mk.ops.linear_cross_entropy(hidden, weight, target), expected)


long = torch.zeros(2, dtype=torch.long)


@pytest.mark.parametrize(
    ("hidden", "weight", "target", "error", "message"),
    [
        (
            torch.ones(4),
            torch.ones(5, 4),
            long,
            ValueError,
            r"hidden must have shape \[N, D\] or \[T, N, D\], got \[4\]",
        ),
        (
            torch.ones(2, 4),
            torch.ones(5, 3),
            long,
            ValueError,
            r"weight must have shape \[V, D\] = \[5, 4\], got \[5, 3\]",
        ),
        (
            torch.ones(2, 4),
            torch.ones(3, 5, 4),
            long,
            ValueError,
            r"weight must have shape \[V, D\] = \[5, 4\], got \[3,",
        ),
        (torch.ones(2, 4), torch.ones(4), long, ValueError, r"weight must have shape \[V, D\]"),
        (
            torch.ones(1, 2, 4),
            torch.ones(3, 5, 4),
            long,
            ValueError,
            r"must have shape \[T, V, D\] = \[1, 5, 4\], got \[3,",
        ),
        (
            torch.ones(1, 2, 4),
            torch.ones(5, 4),
            long,
            ValueError,
            r"target must have shape \[T, N\] = \[1, 2\], got \[2\]",
        ),
        (torch.ones(2, 4), torch.ones(5, 4), long + 5, ValueError, r"target must be in \[0, 5\), got 5"),
        (
            torch.ones(2, 4),
            torch.ones(5, 4),
            long.float(),
            TypeError,
            "target must be int64 or int32, got torch.float32",
        ),
        (torch.ones(2, 4), torch.ones(5, 4).half(), long, TypeError, "weight must have the dtype torch.float32"),
    ],
)
def test_errors(hidden: Tensor, weight: Tensor, target: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"linear_cross_entropy: .*{message}"):
        mk.ops.linear_cross_entropy(hidden, weight, target)
