"""Outer losses that weigh the query losses after every inner step, and inner steps with batches of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from models import Functional, T, assert_equal, build, gradients, mlp, points, regression_loss
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import metakern as mk

K, LR = 4, 0.3
WAYS: list[dict[str, Any]] = [
    {"strategy": "store", "capture": False},
    {"strategy": "store", "batching": "loop", "capture": False},
    {"strategy": "recompute", "batching": "vmap", "capture": False},
    {"memory": "least", "capture": False},
    {"strategy": "store", "capture": True},
    {"strategy": "recompute", "capture": True, "task_chunk": 2},
]


def weighted(
    model: nn.Module,
    supports: Sequence[Any],
    queries: Sequence[Any],
    weights: Sequence[float],
    first_order: bool = False,
) -> Tensor:
    """Return the mean over the tasks of the weighted query losses, with its graph, by plain autograd."""
    total: Any = 0.0
    for t in range(T):
        phi: dict[str, Tensor] = dict(model.named_parameters())
        for k, weight in enumerate(weights):
            at = Functional(model, phi)
            total = total + weight * regression_loss(at, tree_map(lambda a, t=t: a[t], queries[k])) / T
            if k < len(supports):
                value = regression_loss(at, tree_map(lambda a, t=t: a[t], supports[k]))
                grads = torch.autograd.grad(value, list(phi.values()), create_graph=not first_order)
                phi = {name: p - LR * g for (name, p), g in zip(phi.items(), grads, strict=True)}
    return total


@pytest.mark.parametrize("per_step", [False, True], ids=["one-batch", "per-step"])
@pytest.mark.parametrize("weights", [(0, 0.1, 0.2, 0.3, 0.4), (0.5, 0, -0.2, 0, 0), (1, 1, 1, 1, 1), (0, 0, 0, 0, 1)])
def test_weighted_query_losses_equal_plain_autograd(weights: Sequence[float], per_step: bool) -> None:
    model = mlp().double()
    supports = [points(10 + k * per_step) for k in range(K)]
    queries = [points(20 + k * per_step) for k in range(K + 1)]
    value = weighted(model, supports, queries, weights)
    truth = gradients(model, value)
    support, query = (mk.PerStep(*supports), mk.PerStep(*queries)) if per_step else (supports[0], queries[0])
    for way in WAYS:
        maml = mk.MAML(model, regression_loss, mk.optim.SGD(LR), K, query_weights=weights, **way)
        for _ in range(3):
            ours = maml(support, query)
            torch.testing.assert_close(ours, value.detach())
            assert_equal(gradients(model, ours), truth)
        with torch.no_grad():
            torch.testing.assert_close(maml(support, query), value.detach())


@pytest.mark.parametrize("way", WAYS)
def test_parameters_that_are_not_adapted_get_the_gradients_of_all_losses(way: dict[str, Any]) -> None:
    model, supports, queries = mlp().double(), [points(1), points(2)], [points(3), points(4), points(5)]
    head = {name: p for name, p in model.named_parameters() if name.startswith("2.")}
    body = {name: p for name, p in model.named_parameters() if name not in head}
    total: Any = 0.0
    for t in range(T):
        phi = head
        for k, weight in enumerate((0.2, 0.3, 0.5)):
            at = Functional(model, body | phi)
            total = total + weight * regression_loss(at, tree_map(lambda a, t=t: a[t], queries[k])) / T
            if k < 2:
                value = regression_loss(at, tree_map(lambda a, t=t: a[t], supports[k]))
                grads = torch.autograd.grad(value, list(phi.values()), create_graph=True)
                phi = {name: p - LR * g for (name, p), g in zip(phi.items(), grads, strict=True)}
    truth = gradients(model, total)
    maml = mk.MAML(model, regression_loss, mk.optim.SGD(LR), 2, adapt=["2"], query_weights=(0.2, 0.3, 0.5), **way)
    for _ in range(3):
        assert_equal(gradients(model, maml(mk.PerStep(*supports), mk.PerStep(*queries))), truth)


def test_weights_may_change_between_calls_of_one_program() -> None:
    model, support, query = mlp().double(), points(1), points(2)
    maml = mk.MAML(model, regression_loss, mk.optim.SGD(LR), 2, capture=True)
    for weights in ((0, 0.5, 0.5), (0, 0.2, 0.8), (0, -1, 3), (0, 0, 1), (1, 0, 0), (0, 0.3, 0.7), None):
        maml.query_weights = weights
        value = weighted(model, [support] * 2, [query] * 3, weights or (0, 0, 1))
        truth = gradients(model, value)
        assert_equal(gradients(model, maml(support, query)), truth)
    assert maml.plan.usage.programs <= 8  # a kind of weights has a program for one task, and one for a microbatch


def test_first_order_and_learned_rates_with_weighted_losses() -> None:
    model, support, query = mlp().double(), points(1), points(2)
    weights = (0, 0.25, 0.25, 0.5)
    truth = gradients(model, weighted(model, [support] * 3, [query] * 4, weights, first_order=True))
    for strategy in ("store", "recompute"):
        maml = mk.MAML(
            model, regression_loss, mk.optim.SGD(LR), 3, True, query_weights=weights, strategy=strategy, capture=False
        )
        assert_equal(gradients(model, maml(support, query)), truth)
    rates = []
    for strategy in ("store", "recompute"):
        inner = mk.optim.Adam(lr=0.05, learn=["lr"]).double()
        maml = mk.MAML(model, regression_loss, inner, 3, query_weights=weights, strategy=strategy, capture=False)
        found = gradients(model, maml(support, query))
        rates.append({**found, "lr": inner.lr.value.grad})
    assert_equal(rates[1], rates[0])


def test_a_support_may_be_a_function_of_the_step() -> None:
    model, batches, query = mlp().double(), [points(1), points(2), points(3)], points(4)
    maml = mk.MAML(model, regression_loss, mk.optim.SGD(LR), 2)
    truth = gradients(model, maml(mk.PerStep(*batches), query))
    assert_equal(gradients(model, maml(lambda k: batches[k], query)), truth)
    torch.testing.assert_close(
        maml.evaluate(lambda k: batches[k], query, (0, 3)), maml.evaluate(mk.PerStep(*batches), query, (0, 3))
    )
    assert_equal(maml.adapt(lambda k: batches[k], 3), maml.adapt(mk.PerStep(*batches), 3))
    assert_equal(maml.adapt(lambda k: batches[k], 0), maml.adapt(batches[0], 0))


def test_batches_of_steps_may_differ_in_size_and_losses_that_do_not_count_need_none() -> None:
    model = mlp().double()
    supports = [points(1), tree_map(lambda a: a[:, :2], points(2))]
    queries = [points(3), points(4), tree_map(lambda a: a[:, :3], points(5))]
    truth = gradients(model, weighted(model, supports, queries, (0.5, 0, 0.5)))
    maml = mk.MAML(model, regression_loss, mk.optim.SGD(LR), 2, query_weights=(0.5, 0, 0.5))
    query = mk.PerStep(queries[0], None, queries[2])
    assert_equal(gradients(model, maml(mk.PerStep(*supports), query)), truth)
    maml.query_weights = (0.5, 0.5, 0)  # the second step does not count
    truth = gradients(model, weighted(model, supports[:1], queries[:2], (0.5, 0.5)))
    assert_equal(gradients(model, maml(mk.PerStep(supports[0]), mk.PerStep(*queries[:2]))), truth)


def test_query_losses_draw_new_dropout_masks_after_each_step() -> None:
    """Both strategies have the mean gradient of the same distribution; a call leaves the generator somewhere new."""
    model = nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.5), nn.Linear(8, 3)).double()
    found = []
    for strategy in ("store", "recompute"):
        maml = mk.MAML(
            model, regression_loss, mk.optim.SGD(LR), 2, query_weights=(0.2, 0.3, 0.5), strategy=strategy, capture=False
        )
        maml(points(1), points(2))
        torch.manual_seed(0)
        draws = [gradients(model, maml(points(1), points(2)))["2.weight"] for _ in range(150)]
        assert not torch.equal(draws[0], draws[1])
        found.append(torch.stack(draws))
    error = (found[0].var(0) + found[1].var(0)).div(150).sqrt()
    assert ((found[0].mean(0) - found[1].mean(0)).abs() < 5 * error).all()


@pytest.mark.parametrize(
    "weights", [(1, 1), (1, 1, 1, 1), "abc", (0, 0, 0), (0, float("nan"), 1), (0, True, 1), torch.ones(3), 1]
)
def test_wrong_weights_are_refused(weights: Any) -> None:
    with pytest.raises(ValueError, match="MAML: query_weights must be"):
        mk.MAML(mlp().double(), regression_loss, steps=2, query_weights=weights)
    maml = mk.MAML(mlp().double(), regression_loss, steps=2)
    maml.query_weights = weights
    with pytest.raises(ValueError, match="MAML: query_weights must be"):
        maml(points(1), points(2))


def test_batches_without_examples_are_refused() -> None:
    maml, whole = mk.MAML(mlp().double(), regression_loss), points(1)
    empty = tuple(x[:, :0] for x in whole)
    with pytest.raises(ValueError, match=r"MAML: support must hold examples, got tensors of sizes \[\[3, 0, 5\]"):
        maml(empty, whole)
    with pytest.raises(ValueError, match="MAML: query must hold examples"):
        maml(whole, empty)
    with pytest.raises(ValueError, match="MAML: support must hold examples"):
        maml.adapt(empty)


def test_too_few_batches_for_the_steps_are_refused() -> None:
    maml = mk.MAML(mlp().double(), regression_loss, steps=3)
    two = mk.PerStep(points(1), points(2))
    with pytest.raises(ValueError, match="support must hold 3 batches for 3 inner steps, got 2"):
        maml(two, points(2))
    with pytest.raises(ValueError, match="query must hold 4 batches"):
        maml(points(1), two)
    with pytest.raises(ValueError, match="support must hold 5 batches"):
        maml.evaluate(two, points(2), (0, 5))
    with pytest.raises(ValueError, match="support must hold 3 batches"):
        maml.adapt(two)
    with pytest.raises(ValueError, match="PerStep: batches must hold one"):
        mk.PerStep()
    with pytest.raises(ValueError, match="steps along dimension 1"):
        mk.PerStep.split((torch.ones(2, 3), torch.ones(2, 4)))
    with pytest.raises(ValueError, match="one number of tasks"):
        maml(mk.PerStep(points(1), points(1), tree_map(lambda a: a[:1], points(1))), points(2))


def test_adaptation_goes_on_from_adapted_parameters() -> None:
    model, loss, support, _, _ = build("gpt-folded")
    maml = mk.MAML(model, loss, mk.optim.SGD(lr=0.3), steps=5)
    first = maml.adapt(support, 2)
    second = maml.adapt(support, 3, start=first)
    assert_equal(second, maml.adapt(support, 5), 1e-12)
    assert_equal(maml.adapt(support, 0, start=first), first, 1e-15)
    losses = maml.evaluate(support, support, (2, 5))
    torch.testing.assert_close(maml.evaluate(support, support, (0, 3), start=first), losses)
    model.float()  # a start takes the dtypes of the parameters, and no graph
    single = maml.adapt(support, 0, start={name: p.requires_grad_() for name, p in first.items()})
    assert not any(p.requires_grad for p in single.values())
    assert all(torch.equal(p, first[name].float()) for name, p in single.items())
    model.double()
    with pytest.raises(ValueError, match="start must hold each adapted parameter"):
        maml.adapt(support, 1, start={"x": torch.ones(2)})
    with pytest.raises(ValueError, match="start must hold each adapted parameter"):
        maml.adapt(support, 1, start={name: p[:1] for name, p in first.items()})
    with pytest.raises(ValueError, match="start must hold"):
        maml.adapt(support, 1, start=[1])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="start must hold"):
        maml.adapt(support, 1, start={name: p.tolist() for name, p in first.items()})
    with pytest.raises(TypeError, match="until must be a function of"):
        maml.adapt(support, 1, until="a")  # type: ignore[arg-type]
