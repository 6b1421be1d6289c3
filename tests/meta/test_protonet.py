"""Prototypical networks and ProtoMAML against their definitions, one task at a time in plain autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import assert_equal, gradients
from torch import Tensor, nn

import metakern as mk

T, C, D = 3, 4, 5


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(D, 7), nn.Tanh(), nn.Linear(7, 6)).double()


def examples(N: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return examples [T, N, D] and labels; task t has C - t classes, of which each has at least one example."""
    make = torch.Generator().manual_seed(seed)
    x = torch.randn(T, N, D, generator=make, dtype=torch.float64)
    y = torch.stack(
        [torch.cat([torch.arange(C - t), torch.randint(C - t, (N - C + t,), generator=make)]) for t in range(T)]
    )
    return x, y


def ragged(N: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return examples of which the last t of task t are padding, with large values."""
    x, y = examples(N, seed)
    for t in range(1, T):
        y[t, -t:] = -1
        x[t, -t:] = 100.0
    return x, y


def plain(model: nn.Module, support: Any, query: Any, temperature: Tensor | None = None) -> Tensor:
    """Return the query losses [T], with one task and one class after the other."""
    losses = []
    for t in range(T):
        (sx, sy), (qx, qy) = ([part[t][batch[1][t] >= 0] for part in batch] for batch in (support, query))
        s, q = model(sx), model(qx)
        classes = sy.unique().tolist()
        means = [s[sy == c].mean(0) for c in classes]
        if temperature is None:
            logits = torch.stack([-((q - p) ** 2).sum(-1) for p in means], -1)
        else:
            logits = torch.stack([F.cosine_similarity(q, p[None], dim=-1) for p in means], -1) / temperature
        target = torch.tensor([classes.index(c) for c in qy.tolist()])
        losses.append(F.cross_entropy(logits, target))
    return torch.stack(losses)


@pytest.mark.parametrize("draw", [examples, ragged])
@pytest.mark.parametrize("distance", ["euclidean", "cosine"])
def test_protonet_is_plain_autograd_at_both_orders(distance: str, draw: Any) -> None:
    protonet = mk.ProtoNet(model(), distance, temperature=0.3).double()
    encoder, support, query = protonet.model, draw(9, 1), draw(7, 2)
    temperature = None if protonet.log_temperature is None else protonet.log_temperature.exp()
    truth = plain(encoder, support, query, temperature)
    value = protonet(support, query)
    torch.testing.assert_close(protonet.query_losses, truth.detach(), rtol=1e-10, atol=1e-12)
    assert not protonet.query_losses.requires_grad
    parameters = list(protonet.parameters())
    v = [torch.randn_like(p) for p in parameters]
    orders = []
    for loss in (truth.mean(), value):
        grads = torch.autograd.grad(loss, parameters, create_graph=True)
        along = sum((g * t).sum() for g, t in zip(grads, v, strict=True))
        orders.append((*grads, *torch.autograd.grad(along, parameters)))
    for expected, found in zip(*orders, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    assert all(g.norm() > 0 for g in orders[1])


def test_the_cosine_is_divided_by_a_temperature_that_is_learned_as_a_logarithm() -> None:
    for options, temperature in (({}, 0.1), ({"temperature": 0.3}, 0.3)):
        protonet = mk.ProtoNet(model(), "cosine", **options)
        assert protonet.log_temperature.exp().item() == pytest.approx(temperature)


def test_batches_with_masks_and_dictionaries_are_those_with_negative_labels() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = model()

        def forward(self, *, features: Tensor) -> Tensor:
            return self.body(features)

    (sx, sy), (qx, qy) = examples(9, 1), examples(7, 2)
    keep = torch.arange(9) < torch.tensor([[9], [8], [7]])
    truth = mk.ProtoNet(model())((sx, sy.where(keep, -1)), (qx, qy))
    torch.testing.assert_close(mk.ProtoNet(model())((sx, sy, keep), (qx, qy)), truth)
    named = {"features": sx, "labels": sy, "mask": keep}, {"features": qx, "labels": qy}
    torch.testing.assert_close(mk.ProtoNet(Named())(*named), truth)
    torch.testing.assert_close(mk.ProtoNet(model())((sx, sy.where(keep, -1).int()), (qx, qy.int())), truth)


def test_tasks_are_classified_as_if_each_were_alone() -> None:
    protonet, support, query = mk.ProtoNet(model()), ragged(9, 1), examples(7, 2)
    together = protonet.log_probabilities(support, query)
    assert together.shape == (T, 7, C)
    torch.testing.assert_close(together.exp().sum(-1), torch.ones(T, 7, dtype=torch.float64))
    assert together[1, :, 3].eq(-torch.inf).all()
    assert together[0].isfinite().all()
    for t in range(T):
        alone = protonet.log_probabilities(*(tuple(part[t : t + 1] for part in b) for b in (support, query)))[0]
        torch.testing.assert_close(together[t, :, : alone.shape[1]], alone)
    with pytest.raises(ValueError, match="query must have the 3 tasks of support, got 2"):
        protonet.log_probabilities(support, tuple(part[:2] for part in query))


def test_a_task_may_lack_the_first_class() -> None:
    protonet, support, query = mk.ProtoNet(model()), ragged(9, 1), ragged(7, 2)
    for _, y in (support, query):
        y[1] = y[1].where(y[1] != 0, 2)
    truth = plain(protonet.model, support, query)
    protonet(support, query).backward()
    torch.testing.assert_close(protonet.query_losses, truth.detach())
    assert all(p.grad.isfinite().all() for p in protonet.parameters())
    query[1][1, 0] = 0
    with pytest.raises(ValueError, match="query must have classes of its task's support, got class 0 in task 1"):
        protonet(support, query)


def test_adapt_returns_prototypes_and_shots() -> None:
    protonet, (x, y) = mk.ProtoNet(model()), ragged(9, 1)
    found = protonet.adapt((x, y))
    assert found["shots"][2].tolist() == [int((y[2] == c).sum()) for c in range(C)]
    torch.testing.assert_close(found["prototypes"][1, 2], protonet.model(x[1][y[1] == 2]).mean(0).detach())
    assert not found["prototypes"].requires_grad
    assert found["prototypes"][2, 3].eq(0).all()
    x[y < 0] = torch.nan
    assert torch.equal(protonet.adapt((x, y))["prototypes"], found["prototypes"])


def test_evaluate_has_a_row_for_each_number_of_steps() -> None:
    protonet, support, query = mk.ProtoNet(model()), examples(9, 1), examples(7, 2)
    protonet(support, query)
    found = protonet.evaluate(support, query, steps=(0, 1, 5))
    assert torch.equal(found, protonet.query_losses.expand(3, T))
    assert not found.requires_grad
    found[0] = 0
    assert torch.equal(found[1], protonet.query_losses)
    with pytest.raises(ValueError, match="steps must name at least one number of inner steps, got none"):
        protonet.evaluate(support, query, steps=())


def test_a_task_without_a_query_has_the_loss_zero() -> None:
    protonet, support, (x, y) = mk.ProtoNet(model()), examples(9, 1), examples(7, 2)
    y[1] = -1
    protonet(support, (x, y)).backward()
    assert protonet.query_losses[1] == 0
    assert protonet.query_losses[0] > 0
    assert all(p.grad.isfinite().all() for p in protonet.parameters())


@pytest.mark.parametrize("training", [True, False])
def test_a_batch_norm_takes_the_statistics_of_one_task(training: bool) -> None:
    encoder = nn.Sequential(nn.Linear(D, 4), nn.BatchNorm1d(4, track_running_stats=training)).double().train(training)
    support, query = examples(9, 1), examples(7, 2)
    before = [b.clone() for b in encoder.buffers()]
    found = gradients(encoder, mk.ProtoNet(encoder)(support, query))
    for now, b in zip(encoder.buffers(), before, strict=True):
        assert torch.equal(now, b)
    assert encoder[1].track_running_stats == training
    assert_equal(found, gradients(encoder, plain(encoder, support, query).mean()))


def _with(batch: tuple[Tensor, Tensor], task: int, labels: Any) -> tuple[Tensor, Tensor]:
    y = batch[1].clone()
    y[task] = torch.as_tensor(labels)
    return batch[0], y


X, Q = examples(9, 1), examples(7, 2)


@pytest.mark.parametrize(
    ("support", "query", "message"),
    [
        (_with(X, 1, -1), Q, "support must hold examples of at least two classes in each task, got none in task 1"),
        (_with(X, 2, 0), Q, "support must hold examples of at least two classes in each task, got one in task 2"),
        (X, _with(Q, 1, 3), "query must have classes of its task's support, got class 3 in task 1"),
        (X, _with(Q, 0, 9), "query must have classes of its task's support, got class 9 in task 0"),
        ((X[0][:, :0], X[1][:, :0]), Q, "support must hold examples, got tensors of sizes"),
        ({"labels": X[1][:, :0], "scale": X[0]}, Q, "support must hold examples of at least two .* got none in task 0"),
        ((X[0], X[1].double()), Q, r"support must have integer labels \[T, N\], got torch.float64 \[3, 9\]"),
        ((X[0], X[1][:, :8]), Q, r"labels must be one for each example, got \[3, 8\] labels for 27 examples"),
        (X, (Q[0], Q[1][:, 0]), r"query must have integer labels \[T, N\], got torch.int64 \[3\]"),
        (X[0], Q, r"support must be \(x, y\), \(x, y, mask\) or a dictionary with labels, got Tensor"),
        (X, (Q[0][:2], Q[1][:2]), "query must have the 3 tasks of support, got 2"),
    ],
)
def test_what_has_no_prototypes_is_refused(support: Any, query: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mk.ProtoNet(model())(support, query)


def test_wrong_arguments_are_refused() -> None:
    for options, message in (
        ({"distance": "l1"}, "distance must be euclidean or cosine, got 'l1'"),
        ({"temperature": 0.0}, "temperature must be positive, got 0.0"),
        ({"temperature": float("inf")}, "temperature must be positive, got inf"),
        ({"classes": 1}, "classes must be None or an integer of at least 2, got 1"),
        ({"classes": 2.5}, "classes must be None or an integer of at least 2, got 2.5"),
    ):
        with pytest.raises(ValueError, match=f"ProtoNet: {message}"):
            mk.ProtoNet(model(), **options)
    with pytest.raises(TypeError, match=r"ProtoNet: model must be an nn.Module, got function"):
        mk.ProtoNet(lambda x: x)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="ProtoNet: labels must be below the 3 classes, got 3"):
        mk.ProtoNet(model(), classes=3)(X, Q)
    with pytest.raises(ValueError, match=r"ProtoNet: model must return embeddings \[B, D\], got \[27\]"):
        mk.ProtoNet(nn.Sequential(nn.Linear(D, 1), nn.Flatten(0)).double())(X, Q)
    with pytest.raises(ValueError, match=r"ProtoNet: model must return embeddings \[B, D\], got tuple"):
        mk.ProtoNet(nn.GRU(D, 2, batch_first=True).double())(X, Q)


def plain_protomaml(
    encoder: nn.Module, support: Any, query: Any, steps: int, lr: float, first_order: bool = False
) -> Tensor:
    """Return the query losses [T] of ProtoMAML with SGD, one task at a time; each task has a head of its classes."""
    losses = []
    supports = support.batches if isinstance(support, mk.PerStep) else (support,) * max(steps, 1)
    for t in range(T):
        *inner, (qx, qy) = ([part[t][batch[1][t] >= 0] for part in batch] for batch in (*supports, query))
        sx, sy = inner[0]
        classes = sy.unique().tolist()
        target = lambda y, classes=classes: torch.tensor([classes.index(c) for c in y.tolist()])  # noqa: E731
        features = encoder(sx)
        p = torch.stack([features[sy == c].mean(0) for c in classes])
        theta = {name: value.clone() for name, value in encoder.named_parameters()}  # of which w and b are no functions
        phi = {**theta, "w": 2 * p, "b": -p.square().sum(-1)}

        def loss(phi: dict[str, Tensor], x: Tensor, target: Tensor) -> Tensor:
            body = {name: value for name, value in phi.items() if name not in ("w", "b")}
            return F.cross_entropy(F.linear(torch.func.functional_call(encoder, body, x), phi["w"], phi["b"]), target)

        for x, y in inner[:steps]:
            grads = torch.autograd.grad(loss(phi, x, target(y)), list(phi.values()), create_graph=not first_order)
            phi = {name: value - lr * g for (name, value), g in zip(phi.items(), grads, strict=True)}
        losses.append(loss(phi, qx, target(qy)))
    return torch.stack(losses)


def classifier() -> nn.Sequential:
    return nn.Sequential(model(), nn.Linear(6, C)).double()


def without_padding(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the batch with the label -100, which the losses ignore, in place of -1."""
    return batch[0], batch[1].where(batch[1] >= 0, -100)


@pytest.mark.parametrize("strategy", ["store", "recompute"])
@pytest.mark.parametrize("batching", ["fold", "vmap", "loop"])
@pytest.mark.parametrize("draw", [examples, ragged])
def test_protomaml_is_plain_autograd(draw: Any, batching: str, strategy: str) -> None:
    net, support, query = classifier(), without_padding(draw(9, 1)), without_padding(draw(7, 2))
    options = {"inner": mk.optim.SGD(lr=0.2), "steps": 2, "strategy": strategy, "batching": batching}
    protomaml = mk.ProtoMAML(net, mk.losses.classification, capture=False, **options)
    value = protomaml(support, query)
    truth = plain_protomaml(net[0], support, query, 2, 0.2)
    torch.testing.assert_close(protomaml.query_losses, truth.detach(), rtol=1e-10, atol=1e-12)
    found, exact = gradients(net, value), gradients(net, truth.mean())
    assert_equal(found, exact, 1e-9)
    assert {name.split(".")[0] for name in found} == {"0"}
    through_constants = gradients(net, plain_protomaml(net[0], support, query, 2, 0.2, first_order=True).mean())
    assert any((found[n] - through_constants[n]).norm() > 1e-3 * found[n].norm() for n in found)


def test_protomaml_of_first_order_differentiates_the_initial_head() -> None:
    net, support, query = classifier(), examples(9, 1), examples(7, 2)
    options = {"inner": mk.optim.SGD(lr=0.2), "steps": 2, "first_order": True}
    found = gradients(net, mk.ProtoMAML(net, mk.losses.classification, **options)(support, query))
    assert_equal(found, gradients(net, plain_protomaml(net[0], support, query, 2, 0.2, first_order=True).mean()), 1e-9)


def test_protomaml_starts_from_the_support_of_the_first_step() -> None:
    net, support, query = classifier(), mk.PerStep(examples(9, 1), examples(8, 2)), examples(7, 3)
    protomaml = mk.ProtoMAML(net, mk.losses.classification, inner=mk.optim.SGD(lr=0.2), steps=2)
    truth = plain_protomaml(net[0], support, query, 2, 0.2)
    assert_equal(gradients(net, protomaml(support, query)), gradients(net, truth.mean()), 1e-9)
    with pytest.raises(ValueError, match="query must have classes of its task's support, got class 3 in task 1"):
        protomaml(support, mk.PerStep(None, query, _with(query, 1, 3)))
    fewer = _with(support.batches[0], 1, torch.arange(9) % 2)
    with pytest.raises(ValueError, match="query must have classes of its task's support, got class 2 in task 1"):
        protomaml(mk.PerStep(fewer, support.batches[1]), query)


def test_protomaml_takes_the_input_of_the_head_where_norms_read_the_batch() -> None:
    body = nn.Sequential(nn.Linear(D, 4), nn.BatchNorm1d(4, track_running_stats=False)).double()
    net, support, query = nn.Sequential(body, nn.Linear(4, C)).double(), examples(9, 1), examples(7, 2)
    protomaml = mk.ProtoMAML(net, mk.losses.classification, inner=mk.optim.SGD(lr=0.2), steps=2)
    truth = plain_protomaml(body, support, query, 2, 0.2)
    assert_equal(gradients(net, protomaml(support, query)), gradients(net, truth.mean()), 1e-9)


def test_a_model_that_is_its_own_head_starts_at_the_prototypes_of_its_inputs() -> None:
    phi = mk.ProtoMAML(nn.Linear(D, C).double(), mk.losses.classification).adapt(X, steps=0)
    torch.testing.assert_close(phi["weight"], 2 * mk.ProtoNet(nn.Identity()).adapt(X)["prototypes"])


def test_protomaml_is_captured() -> None:
    net, batches = classifier(), [(examples(9, 10 + i), examples(7, 20 + i)) for i in range(4)]
    captured = mk.ProtoMAML(net, mk.losses.classification, inner=mk.optim.SGD(lr=0.2), steps=2, capture=True)
    for support, query in batches:
        found = gradients(net, captured(support, query))
        assert_equal(found, gradients(net, plain_protomaml(net[0], support, query, 2, 0.2).mean()), 1e-9)
    assert captured.plan.usage.captured
    assert "without an executable" not in str(captured.plan)


def test_protomaml_learns_hyper_parameters_and_adam() -> None:
    net, support, query = classifier(), examples(9, 1), examples(7, 2)
    values = []
    for strategy in ("store", "recompute"):
        inner = mk.optim.Adam(lr=0.05, learn_lr=True).double()
        protomaml = mk.ProtoMAML(net, mk.losses.classification, inner=inner, steps=3, strategy=strategy)
        values.append({**gradients(net, protomaml(support, query)), "lr": next(inner.parameters()).grad})
    assert_equal(*values, 1e-9)
    assert values[0]["lr"].abs() > 0


def test_protomaml_starts_at_the_prototypes() -> None:
    net, support, query = classifier(), examples(9, 1), examples(7, 2)
    protomaml = mk.ProtoMAML(net, mk.losses.classification, steps=3)
    found = protomaml.evaluate(support, query, steps=(0, 3))
    torch.testing.assert_close(found[0], mk.ProtoNet(net[0]).evaluate(support, query)[0])
    assert not torch.allclose(found[0], found[1])
    phi = protomaml.adapt(support, steps=0)
    torch.testing.assert_close(phi["1.weight"], 2 * mk.ProtoNet(net[0]).adapt(support)["prototypes"])
    assert phi["1.bias"][1, 3] == -torch.inf
    net[1].forward = net[1].forward  # as a hook that replaces it
    protomaml.adapt(support, steps=0)
    assert "forward" in net[1].__dict__
    with torch.autocast("cpu", torch.bfloat16):
        phi = mk.ProtoMAML(classifier().float(), mk.losses.classification).adapt((X[0].float(), X[1]), steps=0)
    assert {p.dtype for p in phi.values()} == {torch.float32}


def test_protomaml_refuses_what_it_cannot_initialise() -> None:
    make, loss = mk.ProtoMAML, mk.losses.classification
    with pytest.raises(ValueError, match=r"ProtoMAML: head must name a linear layer with a bias, got '0.1'"):
        make(classifier(), loss, head="0.1")
    with pytest.raises(ValueError, match=r"ProtoMAML: head must name a linear layer with a bias, got None"):
        make(nn.Conv1d(2, 2, 1), loss)
    with pytest.raises(ValueError, match=r"ProtoMAML: head must name a linear layer with a bias, got '1'"):
        make(nn.Sequential(model(), nn.Linear(6, C, bias=False)), loss, head="1")
    with pytest.raises(ValueError, match=r"ProtoMAML: the head's '1.weight' must be adapted and not shared"):
        make(classifier(), loss, adapt=["0"])
    tied = nn.Sequential(nn.Linear(D, D), nn.Linear(D, D))
    tied[1].weight = tied[0].weight
    with pytest.raises(ValueError, match=r"ProtoMAML: the head's '0.weight' must be adapted and not shared"):
        make(tied, loss, head="0")
    with pytest.raises(
        ValueError, match=r"ProtoMAML: support must hold examples of at least two classes .* one in task 2"
    ):
        make(classifier(), loss)(_with(X, 2, 0), Q)
    with pytest.raises(ValueError, match=r"ProtoMAML: query must have classes of its task's support, got class 3"):
        make(classifier(), loss)(X, _with(Q, 1, 3))
    decays = mk.optim.SGD(lr=0.1, weight_decay=0.1)
    with pytest.raises(ValueError, match=r"ProtoMAML: inner must have no weight_decay .* got class 3 .* in task 1"):
        make(classifier(), loss, inner=decays)(X, Q)
    whole = X[0], torch.arange(9).remainder(C).expand(T, 9)
    make(classifier(), loss, inner=decays)(whole, whole)
    twice = nn.Sequential(*[nn.Linear(D, D).double()] * 2)
    with pytest.raises(
        ValueError, match=r"must call its head once, on embeddings \[B, D\], got \[\[27, 5\], \[27, 5\]\]"
    ):
        make(twice, loss)(X, Q)
    longer = nn.Sequential(nn.Unflatten(1, (D, 1)), nn.Linear(1, C)).double()
    with pytest.raises(
        ValueError, match=r"the model must call its head once, on embeddings \[B, D\], got \[\[27, 5, 1\]\]"
    ):
        make(longer, lambda net, batch: loss(lambda x: net(x).mean(1), batch))(X, (Q[0], Q[1].clamp(max=1)))
