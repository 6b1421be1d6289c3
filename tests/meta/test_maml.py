"""The engine against plain autograd in float64: models of every kind, both strategies, every batching, K = 1, 3, 5."""

from __future__ import annotations

import copy
import random
from contextlib import nullcontext
from typing import Any, ClassVar

import pytest
import torch
from models import (
    MODELS,
    Functional,
    T,
    assert_equal,
    build,
    gradients,
    mlp,
    plain_loss,
    points,
    regression_loss,
    sgd,
)
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

import metakern as mk
from metakern.meta.parameters import selector
from metakern.meta.plan import Wishes
from metakern.meta.verify import Trial


@pytest.mark.parametrize(
    ("name", "steps"), [(name, k) for name in MODELS for k in (1, 3, 5) if k < 5 or not name.startswith("hf")]
)
def test_meta_gradient_equals_plain_autograd(name: str, steps: int) -> None:
    model, loss, support, query, batchings = build(name)
    value = plain_loss(model, loss, support, query, steps, sgd(0.3))
    truth = gradients(model, value)
    first_order = gradients(model, plain_loss(model, loss, support, query, steps, sgd(0.3), first_order=True))
    assert max((first_order[n] - truth[n]).norm() / truth[n].norm() for n in truth if truth[n].norm() > 0) > 1e-3
    for batching in batchings:
        for strategy in ("store", "recompute"):
            options = {"batching": batching, "strategy": strategy, "task_chunk": 2}
            maml = mk.MAML(model, loss, inner=mk.optim.SGD(lr=0.3), steps=steps, **options)
            ours = maml(support, query)
            torch.testing.assert_close(ours, value.detach(), rtol=1e-12, atol=1e-12)
            assert_equal(gradients(model, ours), truth)
            assert (maml.plan.batching, maml.plan.strategy) == (batching, strategy)


def test_both_modes_of_the_hessian_vector_product_are_taken_and_exact() -> None:
    """A model whose ops all have forward mode goes forward over reverse; Mish's backward in PyTorch has none."""
    for activation, mode in ((nn.Tanh(), "forward"), (nn.Mish(), "reverse")):
        model = nn.Sequential(nn.Linear(5, 8), activation, nn.Linear(8, 3)).double()
        truth = gradients(model, plain_loss(model, regression_loss, points(1), points(2), 3, sgd(0.1)))
        maml = mk.MAML(model, regression_loss, inner=mk.optim.SGD(lr=0.1), steps=3, strategy="recompute")
        assert_equal(gradients(model, maml(points(1), points(2))), truth)
        assert maml.plan.hvp == mode


def test_float32_is_accurate_in_every_batching_and_strategy() -> None:
    model, loss, support, query, batchings = build("gpt-folded")
    truth = gradients(model, plain_loss(model, loss, support, query, 3, sgd(0.3)))
    model.float()
    for batching in batchings:
        for strategy in ("store", "recompute"):
            maml = mk.MAML(model, loss, mk.optim.SGD(lr=0.3), 3, batching=batching, strategy=strategy)
            found = {name: g.double() for name, g in gradients(model, maml(support, query)).items()}
            assert_equal(found, truth, 2e-5)


@pytest.mark.parametrize("steps", [0, 1, 2, 5, 9])
@pytest.mark.parametrize(
    "inner",
    [
        lambda: mk.optim.SGD(lr=0.3),
        lambda: mk.optim.SGD(lr=0.2, momentum=0.5, learn=["lr", "momentum"]),
        lambda: mk.optim.Adam(lr=0.05, learn=["lr"]),
    ],
    ids=["sgd", "learned-momentum", "adam"],
)
def test_least_memory_gives_the_numbers_of_all_snapshots(inner: Any, steps: int) -> None:
    """Points that were not kept are computed again: parameters, optimizer states, gradients that U's pullback needs."""
    model = mlp().double()
    for first_order in (False, True):
        found = []
        for options in ({"strategy": "store"}, {"strategy": "recompute"}, {"memory": "least", "capture": False}):
            optimizer = inner().double()
            maml = mk.MAML(model, regression_loss, optimizer, steps, first_order, **options)
            value = maml(points(1), points(2))
            of_model = gradients(model, value)
            learned = {name: p.grad for name, p in optimizer.named_parameters() if p.grad is not None}
            found.append(of_model | learned)
        assert maml.plan.strategy == "recompute"
        assert (maml.plan.task_chunk, maml.plan.snapshots) == (1, min(steps, 2))
        for other in found[1:]:
            assert_equal(other, found[0])


def test_least_memory_draws_the_same_dropout_masks() -> None:
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Dropout(0.5), nn.Linear(8, 3)).double()
    support, query = (tree_map(lambda a: a[:1], points(seed)) for seed in (1, 2))  # one task: both draw in one order
    found = []
    for options in ({"strategy": "recompute", "batching": "loop"}, {"memory": "least", "batching": "loop"}):
        maml = mk.MAML(model, regression_loss, mk.optim.SGD(lr=0.3), 7, capture=False, **options)
        maml(support, query)  # the plan is made
        torch.manual_seed(0)
        found.append((gradients(model, maml(support, query)), torch.rand(1)))
    assert_equal(found[1][0], found[0][0])
    assert found[1][1] == found[0][1]


def test_least_memory_computes_the_fewest_steps_again() -> None:
    """8 steps with points 0, 4 and 6: steps 6 and 4 are computed once more, and 0, 1 and 2 on the way to point 3.

    Without memory="least" there are two points more, and three steps are computed once more.
    """
    model, calls = mlp().double(), []

    def loss(model: nn.Module, batch: Any) -> Tensor:
        calls.append(None)
        return regression_loss(model, batch)

    counts = []
    for options in ({"strategy": "recompute"}, {"memory": "least", "task_chunk": 3}):
        maml = mk.MAML(model, loss, mk.optim.SGD(lr=0.3), 8, capture=False, batching="loop", **options)
        maml(points(1), points(2))
        calls.clear()
        maml(points(1), points(2))
        counts.append(len(calls))
    tasks = len(points(1)[0])
    assert counts[0] == tasks * (8 + 1 + 8 + 3)
    assert counts[1] == tasks * (8 + 1 + 8 + 5)


def test_auto_folds_and_the_plan_gives_the_reason() -> None:
    model, loss, support, query, _ = build("gpt-folded")
    maml = mk.MAML(model, loss, steps=2)
    with pytest.raises(RuntimeError, match="plan must be read after"):
        _ = maml.plan
    maml(support, query)
    assert maml.plan.batching == "fold"
    assert "equals plain autograd" in str(maml.plan)


def test_second_derivatives_are_verified_for_meta_gradients_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adaptation and evaluation need none, so that their plan is another, cheaper one."""
    tried: list[str] = []
    products = Trial._products

    def spy(probe: Trial, batching: Any, hvp: str) -> Any:
        tried.append(hvp)
        return products(probe, batching, hvp)

    monkeypatch.setattr(Trial, "_products", spy)
    model, loss, support, query, _ = build("mlp")
    maml = mk.MAML(model, loss, steps=2)
    maml.evaluate(support, query)
    maml.adapt(support)
    assert tried == []
    maml(support, query)
    maml.evaluate(support, query)
    maml(support, query)
    assert tried == ["reverse", "forward"]


class Prototypes(nn.Module):
    """A table of 24 rows for all tasks. 2 tasks have 8 examples and 3 tasks 12, so that 24 is a multiple of both."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.table = nn.Linear(5, 5), nn.Buffer(torch.linspace(-1, 1, 120).view(24, 5))

    def forward(self, x: Tensor) -> Tensor:
        return (x.unsqueeze(-2) * self.linear(self.table)).sum(-1)[..., :3]


def test_a_table_whose_rows_are_a_multiple_of_the_folded_batch_is_exact() -> None:
    model = Prototypes().double()
    truth = gradients(model, plain_loss(model, regression_loss, points(1), points(2), 2, sgd(0.1)))
    maml = mk.MAML(model, regression_loss, mk.optim.SGD(0.1), 2, batching="fold")
    assert_equal(gradients(model, maml(points(1), points(2))), truth)


def test_parameters_that_are_not_adapted_still_get_a_meta_gradient() -> None:
    model, loss, support, query, batchings = build("gpt-folded")
    adapted = lambda name: name.startswith("encoder.linear") or name == "norm.bias"  # noqa: E731
    truth = gradients(model, plain_loss(model, loss, support, query, 3, sgd(0.5), adapted))
    for adapt in (adapted, ["encoder.linear*", "norm.bias"]):
        for batching in batchings:
            for strategy in ("store", "recompute"):
                maml = mk.MAML(model, loss, mk.optim.SGD(0.5), 3, adapt=adapt, batching=batching, strategy=strategy)
                assert_equal(gradients(model, maml(support, query)), truth)
    assert set(maml.adapt(support)) == {name for name, _ in model.named_parameters() if adapted(name)}


def test_frozen_and_unused_parameters() -> None:
    class Partly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = mlp(), nn.Linear(2, 2)
            self.used[0].weight.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    model = Partly().double()
    truth_model = copy.deepcopy(model.used)
    truth = gradients(truth_model, plain_loss(truth_model, regression_loss, points(1), points(2), 3, sgd(0.1)))
    for strategy in ("store", "recompute"):
        maml = mk.MAML(model, regression_loss, inner=mk.optim.SGD(lr=0.1), steps=3, strategy=strategy)
        found = gradients(model, maml(points(1), points(2)))
        assert_equal({n.removeprefix("used."): g for n, g in found.items() if n.startswith("used.")}, truth)
        assert model.used[0].weight.grad is None
        assert model.unused.weight.grad is None


def test_dropout_differs_between_tasks_and_is_the_same_in_both_strategies() -> None:
    """On equal tasks only the masks make the losses differ; from one seed, store and recompute draw the same masks."""
    model, loss, support, _, batchings = build("gpt-folded")
    model.encoder.dropout.p = model.encoder.dropout1.p = model.encoder.dropout2.p = 0.5
    same = tree_map(lambda a: a[:1].expand_as(a).contiguous(), support)
    for batching in batchings:
        found, after = [], []
        for strategy in ("store", "recompute"):
            maml = mk.MAML(model, loss, mk.optim.SGD(lr=0.3), 3, batching=batching, strategy=strategy)
            torch.manual_seed(5)
            found.append(gradients(model, maml(same, same)))
            assert len(set(maml.query_losses.tolist())) == T
            after.append(torch.rand(()))
        assert torch.equal(*after)
        assert_equal(*found)


def test_gradients_accumulate_and_scale() -> None:
    model, loss, support, query, _ = build("mlp")
    maml = mk.MAML(model, loss, steps=2)
    once = gradients(model, maml(support, query))
    (3 * maml(query, support)).backward()
    twin = copy.deepcopy(model)
    other = gradients(twin, mk.MAML(twin, loss, steps=2)(query, support))
    found = {name: p.grad for name, p in model.named_parameters()}
    assert_equal(found, {name: once[name] + 3 * other[name] for name in once})


def test_adaptation_ends_where_the_caller_says_so() -> None:
    model, loss, support, _, _ = build("mlp")
    maml = mk.MAML(model, loss, inner=mk.optim.Adam(lr=0.1), steps=5, task_chunk=T)
    seen: list[dict[str, Tensor]] = []

    def until(k: int, phi: dict[str, Tensor]) -> bool:
        assert k == len(seen)
        seen.append(phi)
        return k == 2

    phi = maml.adapt(support, until=until)
    assert len(seen) == 3
    for k, found in enumerate(seen):
        assert_equal(found, maml.adapt(support, steps=k))
    assert all(torch.equal(phi[name], p) for name, p in seen[-1].items())


def test_curves_of_several_queries_equal_those_of_each_alone() -> None:
    model, loss, *_ = build("mlp")
    maml = mk.MAML(model, loss, task_chunk=2)
    support, queries = points(1), [points(2), points(3), points(1)]
    found = maml.curves(support, queries, (0, 3, 1))
    for curve, query in zip(found, queries, strict=True):
        torch.testing.assert_close(curve, maml.evaluate(support, query, (0, 3, 1)))
    start = maml.adapt(support, 2)
    torch.testing.assert_close(
        maml.curves(support, queries[:1], (1,), start)[0], maml.evaluate(support, queries[0], (3,))
    )
    with pytest.raises(ValueError, match="queries must hold at least one batch, got none"):
        maml.curves(support, [])
    with pytest.raises(ValueError, match="query must have the"):
        maml.curves(support, [queries[0], tree_map(lambda a: a[:2], queries[1])])


def test_losses_without_grad_equal_those_of_evaluate_and_adapt() -> None:
    model, loss, support, query, _ = build("mlp")
    maml = mk.MAML(model, loss, steps=2)
    value = maml(support, query)
    with torch.no_grad():
        quiet = maml(support, query)
    assert not quiet.requires_grad
    torch.testing.assert_close(quiet, value.detach())
    curve = maml.evaluate(support, query, steps=(0, 2, 2, 5))
    assert curve.shape == (4, T)
    torch.testing.assert_close(curve[1].mean(), value.detach())
    torch.testing.assert_close(curve[1], curve[2])
    torch.testing.assert_close(curve[1], maml.query_losses)
    phi = maml.adapt(support)
    assert {name: p.shape[1:] for name, p in phi.items()} == {n: p.shape for n, p in model.named_parameters()}
    for t in range(T):
        functional = Functional(model, {name: p[t] for name, p in phi.items()})
        torch.testing.assert_close(loss(functional, tree_map(lambda a, t=t: a[t], query)), curve[1][t])


def test_zero_steps_is_joint_training() -> None:
    model, loss, support, query, _ = build("mlp")
    truth = gradients(model, plain_loss(model, loss, support, query, 0, sgd(0.1)))
    for strategy in ("store", "recompute"):
        assert_equal(gradients(model, mk.MAML(model, loss, steps=0, strategy=strategy)(support, query)), truth)


def test_a_loss_with_branches_on_values_runs_in_a_loop() -> None:
    def loss(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        error = (model(batch[0]) - batch[1]).square()
        return error.mean() if error.mean().item() > 1 else error.sum()

    model, _, support, query, _ = build("mlp")
    maml = mk.MAML(model, loss, mk.optim.SGD(lr=0.01), steps=3)
    truth = gradients(model, plain_loss(model, loss, support, query, 3, sgd(0.01)))
    assert_equal(gradients(model, maml(support, query)), truth)
    assert maml.plan.batching == "loop"


def test_a_loss_that_reads_the_weights_is_not_folded() -> None:
    def loss(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        penalty = (
            model[0].weight.square().sum() if isinstance(model, nn.Module) else model.phi["0.weight"].square().sum()
        )
        return regression_loss(model, batch) + 0.1 * penalty

    model, _, support, query, _ = build("mlp")
    maml = mk.MAML(model, loss, mk.optim.SGD(lr=0.1), steps=3)
    truth = gradients(model, plain_loss(model, loss, support, query, 3, sgd(0.1)))
    assert_equal(gradients(model, maml(support, query)), truth)
    assert maml.plan.batching == "vmap"


class Fixed(nn.Module):
    """Learned queries, as many as a folded batch may have rows: folding must not go by sizes."""

    def __init__(self, queries: int) -> None:
        super().__init__()
        self.table, self.mix, self.out = nn.Embedding(queries, 5), nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        queries = self.mix(self.table(torch.arange(self.table.num_embeddings)))
        weights = torch.softmax(x @ queries.mT if queries.dim() == 2 else torch.einsum("bi,bqi->bq", x, queries), -1)
        mixed = weights @ queries if queries.dim() == 2 else torch.einsum("bq,bqi->bi", weights, queries)
        return self.out(torch.tanh(mixed))


@pytest.mark.parametrize("queries", [4, 8, 12, 7])
def test_a_size_equal_to_that_of_the_folded_batch_is_not_mistaken_for_it(queries: int) -> None:
    """The batch is folded to T·B = 12 rows; plans are tried on two tasks, which have 8."""
    torch.manual_seed(0)
    model = Fixed(queries).double()
    truth = gradients(model, plain_loss(model, regression_loss, points(1), points(2), 2, sgd(0.3)))
    maml = mk.MAML(model, regression_loss, mk.optim.SGD(lr=0.3), steps=2)
    assert_equal(gradients(model, maml(points(1), points(2))), truth)


def test_chunks_are_halved_when_memory_runs_out() -> None:
    class Small(nn.Module):
        """Runs out of memory, once armed, where it sees more than one task of four points."""

        armed: ClassVar[list[bool]] = []

        def forward(self, x: Tensor) -> Tensor:
            if self.armed and x.shape[0] > 4:
                raise torch.OutOfMemoryError("planted")
            return x

    _, loss, support, query, _ = build("mlp")
    model = nn.Sequential(mlp(), Small()).double()
    truth = gradients(model, plain_loss(model, loss, support, query, 2, sgd(0.1)))
    maml = mk.MAML(model, loss, mk.optim.SGD(lr=0.1), steps=2, batching="fold", task_chunk=100)
    maml(support, query)
    assert maml.plan.task_chunk == 100
    model[1].armed.append(True)
    assert_equal(gradients(model, maml(support, query)), truth)
    assert maml.plan.task_chunk == 1
    assert "memory ran out" in str(maml.plan)


def test_losses_of_chunks_are_in_the_order_of_the_tasks() -> None:
    model, loss, support, query, _ = build("mlp")
    maml = mk.MAML(model, loss, mk.optim.SGD(lr=0.3), steps=2, task_chunk=1)
    assert maml.query_losses is None
    maml(support, query)
    torch.testing.assert_close(maml.query_losses, maml.evaluate(support, query, (2,))[0])
    assert maml.plan.task_chunk == 1


def test_defaults() -> None:
    maml = mk.MAML(mlp(), regression_loss)
    assert (maml.steps, maml.first_order, maml.capture, maml.precision, maml.query_weights) == (
        1,
        False,
        "auto",
        None,
        None,
    )
    assert maml._engine.wishes == Wishes()
    assert repr(maml.inner) == repr(mk.optim.SGD())


def test_wrong_arguments_and_third_derivatives_are_errors() -> None:
    model, loss, support, query, _ = build("mlp")
    normed = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3)).double().eval()
    truth = gradients(normed, plain_loss(normed, loss, support, query, 2, sgd(0.1)))
    assert_equal(gradients(normed, mk.MAML(normed, loss, mk.optim.SGD(lr=0.1), 2)(support, query)), truth)
    with pytest.raises(ValueError, match=r"loss must return a scalar tensor for one task, got \[4, 3\]"):
        mk.MAML(model, lambda m, b: m(b[0]))(support, query)
    with pytest.raises(ValueError, match=r"query must have the 3 tasks of support, got 2"):
        mk.MAML(model, loss)(support, tree_map(lambda a: a[:2], query))
    with pytest.raises(ValueError, match=r"one number of tasks along dimension 0, got \[2, 3\]"):
        mk.MAML(model, loss)((support[0], support[1][:2]), query)
    with pytest.raises(ValueError, match="at least one task, got 0"):
        mk.MAML(model, loss)(tree_map(lambda a: a[:0], support), tree_map(lambda a: a[:0], query))
    with pytest.raises(ValueError, match="must not require a gradient"):
        mk.MAML(model, loss)((support[0].clone().requires_grad_(), support[1]), query)
    with pytest.raises(ValueError, match="query must have the 3 tasks of support, got 2"):
        mk.MAML(model, loss).evaluate(support, tree_map(lambda a: a[:2], query))
    with pytest.raises(ValueError, match="steps must be an integer of at least 0, got -1"):
        mk.MAML(model, loss).adapt(support, -1)
    for steps, message in ((3, "a sequence of numbers of inner steps, got 3"), ((1, -1), "an integer of at least 0")):
        with pytest.raises(ValueError, match=f"MAML: steps must be {message}"):
            mk.MAML(model, loss).evaluate(support, query, steps)  # type: ignore[arg-type]
    for wrong in (3, nn.MSELoss()):
        with pytest.raises(TypeError, match=r"MAML: loss must be a function of \(model, batch\), got"):
            mk.MAML(model, wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="strategy must be auto, store or recompute, got 'fast'"):
        mk.MAML(model, loss, strategy="fast")
    with pytest.raises(ValueError, match="memory must be auto or least, got 'small'"):
        mk.MAML(model, loss, memory="small")
    for steps in (-1, True, 1.0):
        with pytest.raises(ValueError, match=f"steps must be an integer of at least 0, got {steps}"):
            mk.MAML(model, loss, steps=steps)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match='task_chunk must be "auto" or an integer of at least 1, got True'):
        mk.MAML(model, loss, task_chunk=True)
    with pytest.raises(TypeError, match="first_order must be True or False, got 'no'"):
        mk.MAML(model, loss, first_order="no")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="capture must be \"auto\", True or False, got 'no'"):
        mk.MAML(model, loss, capture="no")
    with pytest.raises(ValueError, match="adapt must match a parameter's name"):
        mk.MAML(model, loss, adapt=["nothing"])
    with pytest.raises(TypeError, match=r"inner must be an optimizer of metakern.optim"):
        mk.MAML(model, loss, inner=0.1)
    value = mk.MAML(model, loss)(support, query)
    g = torch.autograd.grad(value, list(model.parameters()), create_graph=True)
    with pytest.raises(NotImplementedError, match="derivatives of the meta-gradient"):
        torch.autograd.grad(g[0].sum(), list(model.parameters()))


def test_patterns_of_parameters_match_whole_names_and_all_below_in_little_time() -> None:
    selected = selector(["head", "layers.*.bias", "a[0].?"])
    names = ["head", "head.weight", "layers.1.mlp.bias", "a[0].b", "a[0].b.c"]
    others = ["ahead", "header", "layers.bias", "a0.b", "a[0].bc", ""]
    assert [selected(name) for name in names + others] == [True] * len(names) + [False] * len(others)
    assert not selector(["*a" * 40 + "b"])("a" * 200)  # a matcher that goes back would try for years


def test_a_buffer_that_changes_is_refused() -> None:
    class Counter(nn.Linear):
        def __init__(self) -> None:
            super().__init__(5, 3, dtype=torch.float64)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(x)

    with pytest.raises(ValueError, match="buffers must not change in a forward pass, got 'calls'"):
        mk.MAML(Counter(), regression_loss)(points(1), points(2))


def test_inference_mode_gives_the_same_results() -> None:
    model, loss, _, _, _ = build("mlp")
    maml = mk.MAML(model, loss, mk.optim.SGD(lr=0.3), steps=2)
    with torch.inference_mode():
        support, query = (tuple(t + 0 for t in points(i)) for i in (1, 2))
        phi, curve, value = maml.adapt(support), maml.evaluate(support, query, (0, 2)), maml(support, query)
        on, on_curve = maml.adapt(support, 1, phi), maml.evaluate(points(1), query, (0, 1), phi)
        assert_equal(maml.adapt(support, until=lambda k, phi: k == 0), maml.adapt(support, 0))
    ordinary = mk.MAML(model, loss, mk.optim.SGD(lr=0.3), steps=2)
    assert_equal(phi, ordinary.adapt(points(1)))
    assert_equal(on, ordinary.adapt(points(1), 1, phi))
    torch.testing.assert_close(on_curve, ordinary.evaluate(points(1), points(2), (0, 1), phi))
    torch.testing.assert_close(curve, ordinary.evaluate(points(1), points(2), (0, 2)))
    assert (curve[0] != curve[1]).all()
    torch.testing.assert_close(value, curve[1].mean())
    assert_equal(gradients(model, maml(support, query)), gradients(model, ordinary(points(1), points(2))))


def test_a_loss_without_gradients_is_refused() -> None:
    model, loss, _, _, _ = build("mlp")

    def detached(model: Any, batch: Any) -> Tensor:
        return loss(model, batch).detach()

    with pytest.raises(ValueError, match="loss must depend on an adapted parameter, got one with no gradient for any"):
        mk.MAML(model, detached)(points(1), points(2))


class Counting(nn.Module):
    """A model that keeps something at each forward pass, and reads it at the next one if it is told to."""

    def __init__(self, kind: str, reads: bool) -> None:
        super().__init__()
        self.layer, self.kind, self.reads, self.count, self.kept = nn.Linear(5, 3), kind, reads, 0, torch.zeros(3)
        self.register_buffer("state", torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        y, self.count = self.layer(x), self.count + 1
        kept = {"count": self.count, "kept": self.kept, "state": self.state}[self.kind]
        y = torch.tanh(y + 0.1 * kept) if self.reads else torch.tanh(y)
        setattr(self, "state" if self.kind == "state" else "kept", y.mean(0).detach())
        return y


@pytest.mark.parametrize(("kind", "named"), [("count", "count"), ("kept", "kept"), ("state", "a buffer")])
def test_a_loss_that_reads_what_a_forward_pass_left_is_refused(kind: str, named: str) -> None:
    support, query = points(0), points(9)
    with pytest.raises(ValueError, match=rf"what an earlier forward pass left in the model \(.*{named}"):
        mk.MAML(Counting(kind, True).double(), regression_loss, steps=3)(support, query)
    model = Counting(kind, False).double()
    for strategy in ("store", "recompute"):
        found = gradients(model, mk.MAML(model, regression_loss, steps=3, strategy=strategy)(support, query))
        assert_equal(found, gradients(model, plain_loss(model, regression_loss, support, query, 3, sgd(0.01))))


class Noisy(nn.Module):
    """A model that counts its calls and draws from a generator of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.generator, self.count = nn.Linear(5, 3), random.Random(0), 0

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return self.layer(x) + self.generator.random()


def test_random_numbers_of_a_model_are_not_what_a_forward_pass_left() -> None:
    assert mk.MAML(Noisy().double(), regression_loss, steps=2)(points(0), points(9)).isfinite()


class Doubled(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        return result * 2 if func is torch.tanh else result


class Reading(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 4), nn.Linear(4, 3)
        self.register_buffer("scale", torch.tensor(1.25))

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x))) * self.scale.tolist()


def test_modes_of_the_caller_reach_a_folded_model() -> None:
    model = Reading().double()
    maml, loop = (mk.MAML(model, regression_loss, steps=2, batching=way) for way in ("fold", "loop"))
    for i in range(5):
        with Doubled() if i % 2 else nullcontext():
            torch.testing.assert_close(maml(points(i), points(i + 9)), loop(points(i), points(i + 9)))
        model.scale.add_(0.5)
    assert any("values of a tensor (tolist)" in reason for reason in maml.plan.reasons)


@pytest.mark.parametrize("place", ["attribute", "buffer"])
@pytest.mark.parametrize("reads", [True, False])
def test_a_graph_from_before_the_call_is_refused_where_the_loss_reads_it(place: str, reads: bool) -> None:
    model = mlp().double()
    old = model[0].weight.mean() * 2
    if place == "buffer":
        model.register_buffer("old", old)
    else:
        model.old = old

    def loss(model: Any, batch: Any) -> Tensor:
        value = regression_loss(model, batch)
        return value * model.old if reads else value

    maml = mk.MAML(model, loss, steps=2)
    if reads:
        with pytest.raises(ValueError, match="whose graph was made before"):
            maml(points(0), points(9))
    else:
        maml(points(0), points(9)).backward()


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 3, dtype=torch.complex128))

    def forward(self, x: Tensor) -> Tensor:
        return (x.to(self.weight.dtype) @ self.weight).abs()


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (lambda: torch.jit.trace(nn.Linear(5, 3).double(), points(0)[0]), "got a TopLevelTracedModule"),
        (Complex, "parameters must be real, got 'weight' of torch.complex128"),
        (lambda: nn.Sequential(nn.Embedding(3, 5, sparse=True)), "the embedding '0' with sparse=True"),
    ],
    ids=["traced", "complex", "sparse"],
)
@pytest.mark.filterwarnings("ignore")
def test_models_that_no_batching_takes_are_refused(make: Any, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        mk.MAML(make(), regression_loss, steps=1)(points(0), points(9))
