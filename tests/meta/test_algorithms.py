"""The algorithms against their definitions in plain autograd."""

from __future__ import annotations

import copy
import importlib
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import Functional, T, assert_equal, build, gradients, mlp, plain_loss, points, regression_loss, sgd
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_map

import metakern as mk
from metakern.meta.algorithms.anil import head_of
from metakern.meta.algorithms.hypernetwork import Generator
from metakern.meta.algorithms.imaml import _conjugate_gradients, _neumann
from metakern.meta.algorithms.registry import ALGORITHMS, OWN


def test_fomaml_is_plain_autograd_with_constant_inner_gradients() -> None:
    model, loss, support, query, _ = build("gpt-folded")
    truth = gradients(model, plain_loss(model, loss, support, query, 3, sgd(0.3), first_order=True))
    exact = gradients(model, plain_loss(model, loss, support, query, 3, sgd(0.3)))
    for strategy in ("store", "recompute"):
        fomaml = mk.FOMAML(model, loss, inner=mk.optim.SGD(lr=0.3), steps=3, strategy=strategy)
        found = gradients(model, fomaml(support, query))
        assert_equal(found, truth)
        assert any((found[n] - exact[n]).norm() > 1e-3 * exact[n].norm() for n in exact)
    with pytest.raises(TypeError, match="first_order"):
        mk.FOMAML(model, loss, first_order=False)


def test_anil_adapts_the_last_module_alone() -> None:
    model, loss, support, query, _ = build("mlp")
    head = lambda name: name.startswith("2.")  # noqa: E731
    truth = gradients(model, plain_loss(model, loss, support, query, 3, sgd(0.3), head))
    anil = mk.ANIL(model, loss, inner=mk.optim.SGD(lr=0.3), steps=3)
    assert_equal(gradients(model, anil(support, query)), truth)
    assert sorted(anil.adapt(support)) == ["2.bias", "2.weight"]
    other = mk.ANIL(model, loss, adapt=["0"], steps=3)
    assert sorted(other.adapt(support)) == ["0.bias", "0.weight"]
    with pytest.raises(ValueError, match="adapt must match"):
        mk.ANIL(model, loss, adapt=[])


def test_the_head_is_the_last_module_with_trainable_parameters_of_its_own() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 4))
    model[2].requires_grad_(False)
    assert head_of(model) == ["1.weight"]
    model[1].weight = model[0].weight
    assert head_of(model) == ["0.weight"]


def test_meta_sgd_learns_a_rate_for_each_element() -> None:
    model, loss, support, query, _ = build("mlp")
    metasgd = mk.MetaSGD(model, loss, lr=0.3, steps=2).double()
    truth = gradients(model, plain_loss(model, loss, support, query, 2, sgd(0.3)))
    assert_equal(gradients(model, metasgd(support, query)), truth)
    assert mk.MetaSGD(model, loss).inner.lr.initial == 0.01
    rates = list(metasgd.inner.parameters())
    assert [r.shape for r in rates] == [p.shape for p in model.parameters()]
    assert all(r.grad.abs().sum() > 0 for r in rates)


def test_reptile_moves_toward_the_adapted_parameters() -> None:
    model, loss, support, query, _ = build("mlp")
    reptile = mk.Reptile(model, loss, inner=mk.optim.SGD(lr=0.3), steps=4)
    value = reptile(support, query)
    found = gradients(model, value)
    phi = reptile.adapt(support)
    assert_equal(found, {n: (p - phi[n]).mean(0).detach() for n, p in model.named_parameters()})
    torch.testing.assert_close(value.detach(), reptile.evaluate(support, query, (4,)).mean())


def test_reptile_leaves_all_but_the_adapted_parameters_without_a_gradient() -> None:
    model, loss, support, query, _ = build("mlp")
    inner = mk.optim.SGD(lr=0.3, learn_lr=True).double()
    reptile = mk.Reptile(model, loss, inner=inner, steps=2, adapt=["2"])
    phi = reptile.adapt(support)
    assert_equal(
        gradients(reptile, reptile(support, query)),
        {f"model.{n}": (p - phi[n]).mean(0).detach() for n, p in model.named_parameters() if n in phi},
    )


def test_reptile_returns_the_query_loss_after_all_steps() -> None:
    model, loss, support, query, _ = build("mlp")
    options = {"inner": mk.optim.SGD(lr=0.3), "steps": 2}
    expected = mk.MAML(model, loss, **options).evaluate(support, query, (2,)).mean()
    reptile = mk.Reptile(model, loss, query_weights=(0.5, 0.5, 0), **options)
    for batch in (query, mk.PerStep(None, None, query)):
        torch.testing.assert_close(reptile(support, batch).detach(), expected)
        with torch.no_grad():
            torch.testing.assert_close(reptile(support, batch), expected)


def test_reptile_takes_models_without_second_derivatives() -> None:
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x.exp()

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, ct_y: Tensor) -> Tensor:
            return ct_y * ctx.saved_tensors[0].exp()

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return Once.apply(self.linear(x))

    model, batch = Net(), (torch.randn(4, 5, 3), torch.randint(2, (4, 5)))
    reptile = mk.Reptile(model, mk.losses.classification, steps=2, first_order=False)
    found = gradients(model, reptile(batch, batch))
    phi = reptile.adapt(batch)
    for name, p in model.named_parameters():
        torch.testing.assert_close(found[name], (p - phi[name]).mean(0).detach())
    with pytest.raises(ValueError, match="second"):
        mk.MAML(model, mk.losses.classification, steps=2)(batch, batch)


def test_boil_adapts_all_but_the_head() -> None:
    model, loss, support, query, _ = build("mlp")
    body = lambda name: not name.startswith("2.")  # noqa: E731
    truth = gradients(model, plain_loss(model, loss, support, query, 3, sgd(0.3), body))
    boil = mk.BOIL(model, loss, inner=mk.optim.SGD(lr=0.3), steps=3)
    assert_equal(gradients(model, boil(support, query)), truth)
    assert sorted(boil.adapt(support)) == ["0.bias", "0.weight"]
    assert sorted(mk.BOIL(model, loss, head=["0"], steps=3).adapt(support)) == ["2.bias", "2.weight"]
    model[0].weight.requires_grad_(False)
    assert sorted(mk.BOIL(model, loss).adapt(support)) == ["0.bias"]
    with pytest.raises(ValueError, match="BOIL: model must have trainable parameters outside of the head"):
        mk.BOIL(model, loss, head=["*"])


def test_maml_plus_plus_anneals_the_weights_and_the_order_of_its_derivatives() -> None:
    model, loss, support, query, _ = build("mlp")
    maml = mk.MAMLPlusPlus(model, loss, mk.optim.SGD(lr=0.3), steps=3, anneal=4, first_order_calls=2)
    for calls in range(6):
        each = max(1 - calls / 4, 0.03) / 3
        weights = (0, each, each, 1 - 2 * each)
        plain = mk.MAML(model, loss, mk.optim.SGD(lr=0.3), 3, first_order=calls < 2, query_weights=weights)
        truth = gradients(model, plain(support, query))
        with torch.no_grad():
            quiet = maml(support, query)  # counts no training call
        with pytest.raises(ValueError, match="query must have the 3 tasks of support, got 2"):
            maml(support, tree_map(lambda a: a[:2], query))  # nor does this
        assert maml.calls == calls
        value = maml(support, query)
        torch.testing.assert_close(quiet, value.detach())
        assert_equal(gradients(model, value), truth)
        assert maml.query_weights == pytest.approx(weights)
    other = mk.MAMLPlusPlus(model, loss, mk.optim.SGD(lr=0.3), steps=3)
    other.load_state_dict(maml.state_dict())
    assert other.calls == 6
    for p in mk.MAMLPlusPlus(model, loss, steps=3, lr=0.2).inner.parameters():
        assert p.tolist() == pytest.approx([0.2] * 3)
    default = mk.MAMLPlusPlus(model, loss)
    assert (default.steps, default.anneal, default.inner.lr.initial) == (5, 1000, 0.01)
    assert mk.MAMLPlusPlus(model, loss, steps=3, anneal=0).weights(0)[1:] == pytest.approx((0.01, 0.01, 0.98))
    for wrong in ({"steps": 0}, {"steps": True}, {"anneal": -1}, {"first_order_calls": True}):
        with pytest.raises(ValueError, match="MAMLPlusPlus: "):
            mk.MAMLPlusPlus(model, loss, **wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"MAML: model must be an nn\.Module, got function"):
        mk.MAMLPlusPlus(loss, loss, per_step_norms=True)  # type: ignore[arg-type]


def implicit(model: nn.Module, support: Any, query: Any, strength: float, adapted: list[str]) -> dict[str, Tensor]:
    """Return iMAML's gradient by Newton's method and a dense solve, from plain autograd, for a regression loss."""
    theta = {name: p.detach() for name, p in model.named_parameters()}
    sizes = [theta[name].numel() for name in adapted]
    start = torch.cat([theta[name].flatten() for name in adapted])

    def loss(flat: Tensor, others: dict[str, Tensor], batch: Any, t: int) -> Tensor:
        parts = zip(adapted, flat.split(sizes), strict=True)
        phi = others | {name: part.view_as(theta[name]) for name, part in parts}
        return regression_loss(Functional(model, phi), tree_map(lambda a: a[t], batch))

    shared = {name: p for name, p in theta.items() if name not in adapted}
    total = {name: torch.zeros_like(p) for name, p in theta.items()}
    for t in range(T):
        inner = lambda z, s, t=t: loss(z, s, support, t) + strength / 2 * (z - start).square().sum()  # noqa: E731
        z = start
        for _ in range(50):
            H = torch.func.hessian(inner)(z, shared)
            z = z - torch.linalg.solve(H, torch.func.grad(inner)(z, shared))
        of_phi, of_shared = torch.func.grad(loss, (0, 1))(z, shared, query, t)
        x = torch.linalg.solve(H, of_phi)
        for name, part in zip(adapted, (strength * x).split(sizes), strict=True):
            total[name] += part.view_as(theta[name]) / T
        mixed = torch.func.grad(lambda s, z=z, x=x, inner=inner: torch.func.grad(inner)(z, s) @ x)(shared)
        for name in shared:
            total[name] += (of_shared[name] - mixed[name]) / T
    return total


@pytest.mark.parametrize(("solver", "adapt"), [("cg", None), ("neumann", ["2"])])
def test_imaml_is_the_implicit_gradient_at_the_minimum(solver: str, adapt: list[str] | None) -> None:
    model, support, query = mlp().double(), points(1), points(2)
    adapted = [name for name, _ in model.named_parameters() if adapt is None or name.startswith("2.")]
    truth = implicit(model, support, query, 6.0, adapted)
    options: dict[str, Any] = {"steps": 60, "strength": 6.0, "solver": solver, "solver_steps": 30, "adapt": adapt}
    imaml = mk.IMAML(model, regression_loss, mk.optim.SGD(lr=0.13), capture=False, **options)
    assert_equal(gradients(model, imaml(support, query)), truth, 1e-9)
    assert imaml.residuals.shape == (T,)
    assert imaml.residuals.max() < 1e-9
    captured = mk.IMAML(model, regression_loss, mk.optim.SGD(lr=0.13), capture=True, **options)
    for _ in range(3):
        assert_equal(gradients(model, captured(support, query)), truth, 1e-9)
    assert captured.plan.usage.programs >= 1
    captured.strength = 9.0  # after a program was recorded
    imaml.strength = 9.0
    assert_equal(gradients(model, captured(support, query)), gradients(model, imaml(support, query)), 1e-9)
    captured.solver_steps = imaml.solver_steps = 2
    captured.inner.lr = imaml.inner.lr = 0.05
    assert_equal(gradients(model, captured(support, query)), gradients(model, imaml(support, query)), 1e-9)
    assert imaml.residuals.max() > 1e-9


def test_imaml_equals_maml_at_a_converged_inner_loop() -> None:
    model, support, query = mlp().double(), points(1), points(2)

    class Anchored(mk.optim.InnerOptimizer):
        """SGD on the loss plus (3/2) |phi - phi_0|²; phi_0 is the state."""

        def init(self, phi: Any) -> Any:
            return tuple(phi)

        def update(self, phi: Any, grads: Any, state: Any) -> Any:
            return [p - 0.2 * (g + 3.0 * (p - s)) for p, g, s in zip(phi, grads, state, strict=True)], state

    truth = gradients(model, mk.MAML(model, regression_loss, Anchored(), 80, capture=False)(support, query))
    imaml = mk.IMAML(model, regression_loss, mk.optim.SGD(lr=0.2), 80, strength=3.0, solver_steps=40, capture=False)
    assert_equal(gradients(model, imaml(support, query)), truth, 1e-6)


def normed() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.LayerNorm(8), nn.Linear(8, 3)).double()


def with_offsets(maml: mk.MAMLPlusPlus) -> dict[str, Tensor]:
    """Set the offsets of the norms to random values, and return them by name."""
    make = torch.Generator().manual_seed(3)
    offsets = dict(maml.inner.offsets.items())
    for p in offsets.values():
        p.data = torch.randn(p.shape, generator=make, dtype=torch.float64)
    return offsets


@pytest.mark.parametrize("training", [True, False], ids=["statistics of the batch", "running statistics"])
def test_maml_plus_plus_has_norms_for_each_step(training: bool) -> None:
    model, support, query = normed().train(training), points(1), points(2)
    theta, weights = dict(model.named_parameters()), [0.0, 0.2, 0.3, 0.5]
    for options in ({"strategy": "store"}, {"strategy": "recompute", "batching": "loop"}, {"capture": True}):
        maml = mk.MAMLPlusPlus(model, regression_loss, mk.optim.SGD(lr=0.3), 3, per_step_norms=True, **options)
        maml.weights = lambda calls: tuple(weights)  # type: ignore[method-assign]
        offsets = with_offsets(maml)
        assert sorted(offsets) == ["1.bias", "1.weight", "3.bias", "3.weight"]

        def update(phi: dict[str, Tensor], grads: dict[str, Tensor], k: int, offsets: Any = offsets) -> Any:
            moved = {name: p - 0.3 * grads[name] for name, p in phi.items() if name not in offsets}
            return {name: theta[name] + o[k] if k < 3 else phi[name] for name, o in offsets.items()} | moved

        value = sum(
            w * plain_loss(model, regression_loss, support, query, k, update) for k, w in enumerate(weights) if w
        )
        truth = gradients(maml, value)
        assert all(truth[f"inner.offsets.{name.replace('.', ':')}"].norm() > 1e-3 for name in offsets)
        buffers = {name: b.clone() for name, b in model.named_buffers()}
        for _ in range(3):
            ours = maml(support, query)
            torch.testing.assert_close(ours.detach(), value.detach())
            assert_equal(gradients(maml, ours), truth)
        assert all(torch.equal(b, buffers[name]) for name, b in model.named_buffers())
    losses = maml.evaluate(support, query, (5,))
    torch.testing.assert_close(losses.mean(), plain_loss(model, regression_loss, support, query, 5, update).detach())


def test_per_step_norms_need_norms_that_adapt() -> None:
    for model, options in ((mlp(), {}), (normed(), {"adapt": ["0"]})):
        with pytest.raises(ValueError, match="per_step_norms must have norms with adapted parameters, got none"):
            mk.MAMLPlusPlus(model, regression_loss, per_step_norms=True, **options)
    with pytest.raises(ValueError, match="per_step_norms must be True or False, got 1"):
        mk.MAMLPlusPlus(normed(), regression_loss, per_step_norms=1)  # type: ignore[arg-type]
    maml = mk.MAMLPlusPlus(normed(), regression_loss, steps=2, per_step_norms=True, adapt=["0", "3"])
    assert sorted(maml.inner.offsets) == ["3.bias", "3.weight"]
    with pytest.raises(TypeError, match="StepOffsets: inner must be one of"):
        mk.optim.StepOffsets(torch.optim.SGD, ["0.weight"], 2)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"StepOffsets: names must be a list of names, got '0\.weight'"):
        mk.optim.StepOffsets(mk.optim.SGD(), "0.weight", 2)
    with pytest.raises(ValueError, match="StepOffsets: steps must be an integer of at least 1, got 0"):
        mk.optim.StepOffsets(mk.optim.SGD(), ["0.weight"], 0)


def linear_minima(model: nn.Linear, support: Any, strength: Tensor) -> list[Tensor]:
    """Return [W, b] at the minimum of iMAML's inner loss of each task, in closed form, for a linear model."""
    theta = torch.cat([model.weight, model.bias[:, None]], 1)
    found = []
    for x, y in zip(*support, strict=True):
        x = torch.cat([x, torch.ones_like(x[:, :1])], 1)
        c = 2 / y.numel()  # of the mean of squares
        A = c * x.T @ x + strength * torch.eye(x.shape[1], dtype=x.dtype)
        found.append(torch.linalg.solve(A, c * x.T @ y + strength * theta.T).T)
    return found


def linear_truth(model: nn.Linear, support: Any, query: Any, strength: Tensor) -> Tensor:
    """Return the mean query loss at `linear_minima`, with its graph."""
    losses = []
    for w, x, y in zip(linear_minima(model, support, strength), *query, strict=True):
        losses.append((x @ w[:, :-1].T + w[:, -1] - y).square().mean())
    return torch.stack(losses).mean()


@pytest.mark.parametrize(
    ("solver", "options"),
    [("cg", {"capture": True, "solver_steps": 12}), ("neumann", {"task_chunk": 2, "solver_steps": 40})],
)
def test_imaml_learns_the_strength_of_its_penalty(solver: str, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model, support, query = nn.Linear(5, 3).double(), points(1), points(2)
    settings: dict[str, Any] = {"steps": 32, "strength": 9.0, "learn_strength": True, **options}
    imaml = mk.IMAML(model, regression_loss, solver=solver, **settings)
    for _ in range(3):
        log = imaml.log_strength.detach().clone().requires_grad_()
        value = linear_truth(model, support, query, log.exp())
        truth = {**gradients(model, value), "log_strength": log.grad}
        imaml.log_strength.grad = None
        ours = imaml(support, query)
        torch.testing.assert_close(ours.detach(), value.detach())
        found = gradients(model, ours)
        assert_equal({**found, "log_strength": imaml.log_strength.grad.clone()}, truth, 1e-8)
        with torch.no_grad():
            imaml.log_strength += 0.3  # after a program was recorded
    assert imaml.strength == pytest.approx(9 * torch.e**0.9)
    imaml.strength = 2.0
    assert imaml.log_strength.exp().item() == pytest.approx(2.0)
    assert [name for name, _ in imaml.named_parameters()] == ["log_strength", "model.weight", "model.bias"]


def test_a_warm_start_reaches_the_minimum_around_theta_in_few_steps() -> None:
    torch.manual_seed(0)
    model, support, query = nn.Linear(5, 3).double(), points(1), points(2)
    strength = torch.tensor(9.0).double()
    truth, minima = (
        gradients(model, linear_truth(model, support, query, strength)),
        linear_minima(model, support, strength),
    )
    for options in ({"capture": True}, {"capture": False, "task_chunk": 2}):
        make = lambda steps, options=options: mk.IMAML(  # noqa: E731
            model, regression_loss, steps=steps, strength=9.0, solver_steps=20, keep_solutions=True, **options
        )
        cold, warm = make(40), make(1)
        with pytest.warns(UserWarning, match="IMAML: the inner loop must reach a relative residual of 0.1, got"):
            assert (gradients(model, warm(support, query))["weight"] - truth["weight"]).norm() > 0.01
        for _ in range(3):
            assert_equal(gradients(model, cold(support, query)), truth, 1e-9)
            assert_equal(
                cold.solutions, {"weight": torch.stack(minima)[:, :, :-1], "bias": torch.stack(minima)[..., -1]}
            )
            assert_equal(gradients(model, warm(support, query, start=cold.solutions)), truth, 1e-9)
        assert_equal(warm.adapt(support, 3, start=cold.solutions), cold.solutions, 1e-9)
        losses = cold.evaluate(support, query, (40,))
        torch.testing.assert_close(warm.evaluate(support, query, (0, 3), start=cold.solutions), losses.expand(2, T))
        with torch.no_grad():
            torch.testing.assert_close(warm(support, query, start=cold.solutions), losses.mean())
    assert_equal(warm.adapt(support, 2, start=warm.adapt(support, 3)), warm.adapt(support, 5))
    with pytest.raises(ValueError, match="start must hold each adapted parameter for each task"):
        warm(support, query, start={"weight": minima[0]})
    default = mk.IMAML(model, regression_loss)
    assert (default.solutions, default.log_strength) == (None, None)
    assert (default.steps, default.strength, default.solver, default.solver_steps) == (16, 2.0, "cg", 10)
    assert (default.tolerance, default.inner.lr.initial, warm.inner.lr.initial) == (0.1, 0.1, 0.5 / 9)


def test_imaml_says_how_far_its_inner_loops_are_from_their_minima() -> None:
    model, support, query = mlp().double(), points(1), points(2)
    imaml = mk.IMAML(model, regression_loss, mk.optim.SGD(lr=0.05), 4, strength=2.5, tolerance=1.0, capture=False)
    for strength in (2.5, 4.0):
        imaml.strength = strength
        imaml(support, query)
        phi = imaml.adapt(support)
        for t in range(T):
            own = {name: p[t].clone().requires_grad_() for name, p in phi.items()}
            loss = regression_loss(Functional(model, own), tree_map(lambda a, t=t: a[t], support))
            g = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(own.values()))])
            d = strength * torch.cat([(own[name] - p).flatten() for name, p in model.named_parameters()])
            torch.testing.assert_close(imaml.inner_residuals[t], ((g + d).norm() / (g.norm() + d.norm())).detach())
    imaml.tolerance = 0.99 * imaml.inner_residuals.max().item()
    with pytest.warns(UserWarning, match="IMAML: the inner loop must reach"):
        imaml(support, query)
    imaml.steps = 0
    imaml(support, query)
    torch.testing.assert_close(imaml.inner_residuals, torch.ones(T).double())


def test_imaml_reports_what_does_not_converge_once_and_refuses_what_has_no_minimum() -> None:
    model, support, query = mlp().double(), points(1), points(2)
    imaml = mk.IMAML(model, regression_loss, strength=1e-3, solver="neumann", capture=False)
    with pytest.warns(UserWarning, match="IMAML: ") as caught:
        imaml(support, query)
    for found, start in zip(caught, ("inner loop", "solver"), strict=True):
        assert f"IMAML: the {start} must reach a relative residual of 0.1, got" in str(found.message)
        assert found.filename == __file__
    imaml(support, query)
    for wrong in (
        {"strength": 0.0},
        {"learn_strength": 1},
        {"keep_solutions": "yes"},
        {"query_weights": (0.5, 0.5), "steps": 1},
        {"solver": "lu"},
        {"solver_steps": 0},
        {"solver_steps": True},
        {"tolerance": -1.0},
        {"inner": mk.optim.SGD(lr=0.1, learn_lr=True)},
        {"inner": mk.optim.SGD(lr=0.1, learn_lr=True, per="parameter")},
        {"inner": mk.optim.MetaCurvature()},
    ):
        with pytest.raises(ValueError, match="IMAML: "):
            mk.IMAML(model, regression_loss, **wrong)  # type: ignore[arg-type]
    imaml.query_weights = (0.5, 0.5)
    with pytest.raises(ValueError, match="IMAML: query_weights must be None"):
        imaml(support, query)
    with pytest.raises(ValueError, match=r"IMAML: strength must be positive, got 0\.0"):
        imaml.strength = 0.0
    with pytest.warns(UserWarning, match="IMAML: the .* must reach a relative residual of 0.1, got nan"):
        mk.IMAML(model, regression_loss, mk.optim.SGD(lr=1e30), solver_steps=1)(support, query)
    with pytest.raises(ValueError, match="support must be one batch"):
        mk.IMAML(model, regression_loss, steps=1)(mk.PerStep(support), query)
    with pytest.raises(ValueError, match="support must be one batch"):
        mk.IMAML(model, regression_loss, steps=1)(lambda k: support, query)


def systems() -> tuple[Tensor, list[Tensor], Any]:
    """Return H [5, 6, 6], b [5, 4] and [5, 2], and v -> H v; two are random, then b = 0, then H = I, then H = -9 I."""
    make, eye = torch.Generator().manual_seed(0), torch.eye(6, dtype=torch.float64)
    a = torch.randn(2, 6, 6, generator=make, dtype=torch.float64)
    H = torch.cat([a @ a.mT, torch.stack([eye, eye, -9 * eye])])
    b = torch.randn(5, 6, generator=make, dtype=torch.float64)
    b[2] = 0
    return H, [b[:, :4], b[:, 4:]], lambda v: list((H @ torch.cat(v, 1)[..., None])[..., 0].split([4, 2], 1))


def test_conjugate_gradients_solve_each_system_in_as_many_steps_as_it_has_unknowns() -> None:
    H, b, product = systems()
    shifted, flat = H + 0.7 * torch.eye(6, dtype=torch.float64), torch.cat(b, 1)
    x, residuals = _conjugate_gradients(product, b, 0.7, 6)
    found = torch.cat(x, 1)
    torch.testing.assert_close(found[:4], torch.linalg.solve(shifted, flat)[:4])
    assert not found[4].any()  # its matrix is not positive definite
    torch.testing.assert_close(residuals, torch.tensor([0, 0, 0, 0, 1]).double())
    x, residuals = _conjugate_gradients(product, b, 0.7, 3)
    rest = (flat - (shifted @ torch.cat(x, 1)[..., None])[..., 0]).norm(dim=1)
    assert (rest[:2] > 0.01).all()
    torch.testing.assert_close(residuals[:2], (rest / flat.norm(dim=1))[:2])


def test_conjugate_gradients_stand_still_after_a_direction_of_negative_curvature() -> None:
    make = torch.Generator().manual_seed(0)
    a = torch.randn(8, 6, 6, generator=make, dtype=torch.float64)
    H, b = (a + a.mT) / 2, torch.randn(8, 6, generator=make, dtype=torch.float64)
    found, residuals = _conjugate_gradients(lambda v: [(H @ v[0][..., None])[..., 0]], [b], 2.2, 6)
    stopped = 0
    for t in range(8):
        A, x, r, p = H[t] + 2.2 * torch.eye(6, dtype=torch.float64), torch.zeros(6).double(), b[t], b[t]
        for _ in range(6):
            if p @ A @ p <= 0:
                stopped += 1
                break
            alpha = (r @ r) / (p @ A @ p)
            after = r - alpha * A @ p
            x, r, p = x + alpha * p, after, after + (after @ after) / (r @ r) * p
        torch.testing.assert_close(found[0][t], x)
        torch.testing.assert_close(residuals[t], r.norm() / b[t].norm())
    assert 0 < stopped < 8


def test_the_neumann_series_has_a_term_more_than_its_steps() -> None:
    H, b, product = systems()
    terms = [torch.cat(b, 1)]
    for _ in range(3):
        terms.append(-(H @ terms[-1][..., None])[..., 0] / 20)
    x, residuals = _neumann(product, b, 20.0, 3)
    torch.testing.assert_close(torch.cat(x, 1), sum(terms) / 20)
    torch.testing.assert_close(residuals, (terms[-1].norm(dim=1) / terms[0].norm(dim=1)).nan_to_num(0))


def test_a_captured_imaml_follows_its_settings() -> None:
    model, support, query = nn.Linear(5, 3).double(), points(1), points(2)
    settings: dict[str, Any] = {"inner": mk.optim.SGD(lr=0.04), "steps": 6, "tolerance": 1e9}
    captured = mk.IMAML(model, regression_loss, capture=True, **settings)
    for name, value in (
        ("solver", "neumann"),
        ("solver_steps", 3),
        ("keep_solutions", True),
        ("strength", 6.0),
        ("inner", mk.optim.SGD(lr=0.02)),
        ("steps", 5),
    ):
        captured(support, query)
        setattr(captured, name, value)
        settings[name] = value
        ordinary = mk.IMAML(model, regression_loss, capture=False, **settings)
        truth = gradients(model, ordinary(support, query))
        assert_equal(gradients(model, captured(support, query)), truth)
        torch.testing.assert_close(captured.solutions, ordinary.solutions)
        torch.testing.assert_close(captured.residuals, ordinary.residuals)
    assert_equal(gradients(model, ordinary(support, mk.PerStep(*[None] * 5, query))), truth)
    assert captured._optimizer() is captured._optimizer()  # another one would be recorded anew


def test_the_solutions_of_imaml_have_the_dtypes_of_the_parameters() -> None:
    class ToDouble(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.double()

    model, (x, y) = nn.Sequential(nn.Linear(5, 3), ToDouble(), nn.Linear(3, 3).double()), points(1)
    imaml = mk.IMAML(model, regression_loss, steps=20, keep_solutions=True)
    imaml((x.float(), y), (x.float(), y)).backward()
    assert {name: p.dtype for name, p in imaml.solutions.items()} == {n: p.dtype for n, p in model.named_parameters()}


def test_imaml_has_no_residual_and_no_gradient_where_both_losses_are_at_their_minima() -> None:
    model, (x, _) = nn.Linear(5, 3).double(), points(1)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_((8 * p).round())  # products of whole numbers are the same in any order
    x = (8 * x).round()
    y = model(x).detach()
    for solver in ("cg", "neumann"):
        imaml = mk.IMAML(model, regression_loss, solver=solver, strength=8.0)
        found = gradients(model, imaml((x, y), (x, y)))
        assert not any(g.any() for g in (*found.values(), imaml.residuals, imaml.inner_residuals))


def test_imaml_has_no_residual_where_the_gradient_is_nothing_but_rounding() -> None:
    model, (x, _) = nn.Linear(5, 3).double(), points(1)
    y = torch.nextafter(model(x).detach(), torch.tensor(torch.inf).double())
    imaml = mk.IMAML(model, regression_loss)
    imaml((x, y), (x, y))
    assert not imaml.inner_residuals.any()
    imaml((x, y + 1e-6), (x, y))
    assert imaml.inner_residuals.all()


class ByLoss(mk.optim.InnerOptimizer):
    takes_losses = True

    def update(self, phi: Any, grads: Any, state: Any, losses: Tensor) -> Any:
        return [p - 0.1 * losses.view(-1, *[1] * (p.dim() - 1)) * g for p, g in zip(phi, grads, strict=True)], state


@pytest.mark.parametrize("make", [lambda: mk.optim.SGD(0.05, momentum=0.5), mk.optim.Adam, ByLoss])
def test_the_penalty_of_imaml_passes_on_states_and_losses(make: Any) -> None:
    model, support, inner = mlp().double(), points(1), make()
    phi = {name: p.detach().expand(T, *p.shape) for name, p in model.named_parameters()}
    state = inner.init(list(phi.values()))
    for _ in range(3):
        leaves = {name: p.clone().requires_grad_() for name, p in phi.items()}
        losses = torch.stack(
            [
                regression_loss(
                    Functional(model, {n: p[t] for n, p in leaves.items()}), tree_map(lambda a, t=t: a[t], support)
                )
                for t in range(T)
            ]
        )
        grads = torch.autograd.grad(losses.sum(), list(leaves.values()))
        pulled = [g + 2.5 * (p - p0) for g, p, p0 in zip(grads, phi.values(), model.parameters(), strict=True)]
        read = (losses,) if inner.takes_losses else ()
        found, state = inner.update(list(phi.values()), pulled, state, *read)
        phi = {name: p.detach() for name, p in zip(phi, found, strict=True)}
    assert_equal(mk.IMAML(model, regression_loss, make(), strength=2.5).adapt(support, 3), phi)


def plain_stream(model: nn.Module, chunks: list[Any], window: int) -> Tensor:
    """Return the mean loss over all chunks; at the start of a window, phi counts as theta plus a constant."""
    total: Any = 0.0
    for t in range(T):
        phi: dict[str, Tensor] = dict(model.named_parameters())
        for k, chunk in enumerate(chunks):
            if k % window == 0 and k:
                phi = {name: p + (phi[name] - p).detach() for name, p in model.named_parameters()}
            value = regression_loss(Functional(model, phi), tree_map(lambda a, t=t: a[t], chunk))
            total = total + value / (T * len(chunks))
            grads = torch.autograd.grad(value, list(phi.values()), create_graph=True)
            phi = {name: p - 0.3 * g for (name, p), g in zip(phi.items(), grads, strict=True)}
    return total


@pytest.mark.parametrize("window", [None, 1, 2, 3, 9])
def test_streaming_learns_from_each_chunk_after_predicting_it(window: int | None) -> None:
    model, chunks = mlp().double(), [points(seed) for seed in range(5)]
    value = plain_stream(model, chunks, window or len(chunks))
    truth = gradients(model, value)
    joined = tree_map(lambda *parts: torch.stack(parts, 1), *chunks)
    for options in ({"strategy": "store"}, {"strategy": "recompute"}, {"capture": True}, {"task_chunk": 2}):
        streaming = mk.Streaming(model, regression_loss, mk.optim.SGD(lr=0.3), window, **options)
        for stream in (joined, mk.PerStep(*chunks), joined):
            ours = streaming(stream)
            torch.testing.assert_close(ours, value.detach())
            assert_equal(gradients(model, ours), truth)
        losses = streaming.evaluate(joined)
        assert losses.shape == (len(chunks), T)
        torch.testing.assert_close(streaming.query_losses, losses.mean(0))
        streaming.query_losses = None
        with torch.no_grad():
            torch.testing.assert_close(streaming(joined), value.detach())
        torch.testing.assert_close(streaming.query_losses, losses.mean(0))
        torch.testing.assert_close(losses, streaming.evaluate(mk.PerStep(*chunks), steps=range(len(chunks))))
        plain = mk.MAML(model, regression_loss, mk.optim.SGD(lr=0.3))
        assert_equal(streaming.adapt(joined), plain.adapt(mk.PerStep(*chunks), len(chunks)))


def test_streaming_refuses_windows_that_would_lose_the_optimizer_state() -> None:
    model, chunks = mlp().double(), mk.PerStep(*(points(seed) for seed in range(4)))
    with pytest.raises(ValueError, match="window must be None for an inner optimizer with a state"):
        mk.Streaming(model, regression_loss, mk.optim.Adam(), window=2)(chunks)
    mk.Streaming(model, regression_loss, mk.optim.Adam())(chunks).backward()
    for window in (0, True):
        with pytest.raises(ValueError, match="window must be None or an integer"):
            mk.Streaming(model, regression_loss, window=window)


def test_streams_are_adapted_and_evaluated_as_by_maml() -> None:
    model, stream, query = mlp().double(), mk.PerStep(*(points(seed) for seed in range(4))), points(9)
    streaming, plain = (
        make(model, regression_loss, mk.optim.SGD(lr=0.3), task_chunk=T) for make in (mk.Streaming, mk.MAML)
    )
    start = plain.adapt(points(7), 1)
    assert_equal(streaming.adapt(stream, 2, start), plain.adapt(stream, 2, start))
    for given, steps in (((query, (0, 3), start), (0, 3)), ((None, None, start), range(4))):
        expected = plain.evaluate(stream, query if given[0] else stream, steps, start)
        torch.testing.assert_close(streaming.evaluate(stream, *given), expected)
        several = streaming.curves(stream, [given[0] if given[0] else stream] * 2, *given[1:])
        torch.testing.assert_close(several, expected.expand(2, -1, -1))
    seen: list[int] = []
    streaming.adapt(stream, until=lambda k, phi: seen.append(k) or k == 1)  # type: ignore[func-returns-value]
    assert seen == [0, 1]


def test_windows_start_in_the_precision_of_the_steps() -> None:
    model, stream = mlp(), mk.PerStep(*(tuple(x.float() for x in points(seed)) for seed in range(4)))
    streaming = mk.Streaming(model, regression_loss, mk.optim.SGD(lr=0.3), window=2, precision="bfloat16")
    value = streaming(stream).detach()
    torch.testing.assert_close(value, streaming.evaluate(stream).mean(), rtol=1e-6, atol=1e-7)
    assert "precision bfloat16" in str(streaming.plan)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(8, 6)

    def forward(self, batch: Any) -> Tensor:
        return self.net(torch.cat(batch, -1)).tanh().mean(0)


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("adapt", [None, ["2"]], ids=["all", "head"])
def test_hypernetwork_writes_what_the_inner_loop_starts_from(adapt: list[str] | None, steps: int) -> None:
    torch.manual_seed(0)
    model, support, query = mlp().double(), points(1), points(2)
    names = [name for name, _ in model.named_parameters() if adapt is None or name.startswith("2.")]
    options: dict[str, Any] = {"size": 6, "width": 7, "rank": 2, "steps": steps, "adapt": adapt}
    hyper = mk.HyperNetwork(model, regression_loss, Encoder().double(), inner=mk.optim.SGD(lr=0.3), **options)
    assert (hyper.generator.rank, hyper.generator.embedding.shape) == (2, (len(names), 7))
    starts = hyper.adapt(support, 0)
    for name in names:
        torch.testing.assert_close(starts[name], dict(model.named_parameters())[name].expand_as(starts[name]))
    for p in hyper.generator.parameters():
        p.data += 0.3 * torch.randn_like(p)
    assert list(starts) == names

    total: Any = 0.0
    for t in range(T):
        at = lambda batch, t=t: tree_map(lambda a: a[t], batch)  # noqa: E731
        written = hyper.generator(hyper.encoder(at(support)).unsqueeze(0))
        phi = {name: p + written[name][0] if name in written else p for name, p in model.named_parameters()}
        for _ in range(steps):
            value = regression_loss(Functional(model, phi), at(support))
            grads = torch.autograd.grad(value, [phi[name] for name in names], create_graph=True)
            phi = phi | {name: phi[name] - 0.3 * g for name, g in zip(names, grads, strict=True)}
        total = total + regression_loss(Functional(model, phi), at(query)) / T
    truth = gradients(hyper, total)
    for options_of_plan in ({"strategy": "store"}, {"strategy": "recompute"}, {"capture": True}, {"task_chunk": 2}):
        other = mk.HyperNetwork(
            model, regression_loss, hyper.encoder, inner=mk.optim.SGD(lr=0.3), **options, **options_of_plan
        )
        other.generator.load_state_dict(hyper.generator.state_dict())
        for _ in range(3):
            value = other(support, query)
            torch.testing.assert_close(value.detach(), total.detach())
            assert_equal(gradients(other, value), truth)
            other.zero_grad()
    hyper.encoder.net.weight.requires_grad_(False)
    found = gradients(hyper, hyper(support, query))
    assert "encoder.net.weight" not in found
    torch.testing.assert_close(found["encoder.net.bias"], truth["encoder.net.bias"])
    captured = mk.HyperNetwork(
        model, regression_loss, Encoder().double(), inner=mk.optim.SGD(lr=0.3), **options, capture=True
    )
    captured.generator.load_state_dict(hyper.generator.state_dict())
    captured(support, query)
    captured.encoder = hyper.encoder  # after a program was recorded
    torch.testing.assert_close(captured(support, query).detach(), total.detach())
    default = mk.HyperNetwork(model, regression_loss, Encoder(), size=6)
    assert (default.steps, default.generator.rank, default.generator.embedding.shape[1]) == (0, 8, 64)
    with pytest.raises(ValueError, match="encoder must return the embedding"):
        mk.HyperNetwork(model, regression_loss, Encoder().double(), size=5)(support, query)
    for wrong in ({"size": 0}, {"size": 6, "width": True}, {"size": 6, "rank": 2.5}):
        with pytest.raises(ValueError, match=r"HyperNetwork: \w+ must be an integer of at least 1, got"):
            mk.HyperNetwork(model, regression_loss, Encoder(), **wrong)
    with pytest.raises(TypeError, match=r"encoder must be an nn\.Module"):
        mk.HyperNetwork(model, regression_loss, regression_loss, size=5)  # type: ignore[arg-type]


def test_hypernetwork_reads_the_support_of_the_first_step() -> None:
    torch.manual_seed(0)
    model, first, query = mlp().double(), points(1), points(2)
    support, inner = mk.PerStep(first, points(3)), mk.optim.SGD(lr=0.3)
    hyper = mk.HyperNetwork(model, regression_loss, Encoder().double(), size=6, inner=inner, steps=2)
    for p in hyper.generator.parameters():
        p.data += 0.3 * torch.randn_like(p)
    starts = hyper.adapt(first, 0)
    expected = mk.MAML(model, regression_loss, inner, 2).evaluate(support, query, (0, 2), start=starts)
    torch.testing.assert_close(hyper.evaluate(support, query, (0, 2)), expected)
    torch.testing.assert_close(hyper(support, query).detach(), expected[1].mean())


def test_hypernetwork_writes_in_the_dtype_of_the_model_and_nothing_for_what_was_frozen() -> None:
    model, support = mlp(), tuple(t.float() for t in points(1))
    model[0].weight.requires_grad_(False)
    hyper = mk.HyperNetwork(model, regression_loss, Encoder(), size=6)
    model[0].weight.requires_grad_(True)
    for p in hyper.generator.double().parameters():
        p.data += 0.3 * torch.randn_like(p)
    starts = hyper.adapt(support)
    assert {p.dtype for p in starts.values()} == {torch.float32}
    for name, p in model.named_parameters():
        assert torch.equal(starts[name], p.expand_as(starts[name])) == (name == "0.weight")


def test_a_generator_writes_each_parameter_from_its_embedding_and_that_of_the_task() -> None:
    torch.manual_seed(0)
    shapes = {"a": (5, 4), "b": (3, 5), "c": (5, 4), "d": (4,), "e": (), "f": (4, 5, 6)}  # a and c in factors
    parameters = {name: nn.Parameter(torch.zeros(shape).double()) for name, shape in shapes.items()}
    generator, e = Generator(parameters, size=6, width=7, rank=3), torch.randn(T, 6).double()
    changes = list(generator(e).values())
    assert all(torch.equal(change, torch.zeros_like(change)) for change in changes)
    sum(change.sum() for change in changes).backward()
    assert all(layer.weight.grad.any() for layer in generator.outputs.values())
    for p in generator.parameters():
        p.data = torch.randn_like(p)
    found = generator(e)
    assert list(found) == ["a", "c", "b", "d", "e", "f"]
    for t in range(T):
        for i, (name, shape) in enumerate(shapes.items()):
            x = torch.cat([e[t], generator.embedding[i]])
            for layer in (generator.hidden[0], generator.hidden[2]):
                x = F.gelu(layer.weight @ x + layer.bias)
            output = generator.outputs["x".join(map(str, shape)) or "scalar"]
            y = output.weight @ x + output.bias
            change = y[:15].view(5, 3) @ y[15:].view(3, 4) if name in "ac" else y.view(shape)
            torch.testing.assert_close(found[name][t], change)
    assert generator.float()(e)["a"].dtype == torch.float32


def test_a_set_encoder_pools_what_counts() -> None:
    net = nn.Linear(3, 4).double()
    x, mask = torch.randn(5, 3).double(), torch.tensor([True, False, True, True, False])
    for pool in ("mean", "attention"):
        encoder = mk.nn.SetEncoder(lambda b: net(b[0]), pool, 4, mask=lambda b: b[1], modules=[net]).double()
        torch.testing.assert_close(encoder((x, mask)), net(x[mask]).mean(0))  # the query begins as zeros
        z, weights = net(x[mask]), torch.full((3,), 1 / 3).double()
        if encoder.query is not None:
            encoder.query.data.normal_()
            weights = (z @ encoder.query / 4**0.5).softmax(0)
        orders = [
            (e, *torch.autograd.grad(e.square().sum(), list(encoder.parameters())))
            for e in (encoder((x, mask)), weights @ z)
        ]
        torch.testing.assert_close(*orders)
        torch.testing.assert_close(encoder((x, mask)), encoder((x[mask], torch.ones(3, dtype=torch.bool))))
        assert encoder((x, mask & False)).abs().sum() == 0
        assert len(list(encoder.parameters())) == 2 + (pool == "attention")
    torch.testing.assert_close(mk.nn.SetEncoder(net)(x), net(x).mean(0))
    torch.testing.assert_close(mk.nn.SetEncoder(net, "attention", 4)(x), net(x).mean(0))  # of another dtype
    for wrong in ("max", "attention"):
        with pytest.raises(ValueError, match="pool must be"):
            mk.nn.SetEncoder(net, wrong)
    with pytest.raises(ValueError, match=r"code \[N, D\]"):
        mk.nn.SetEncoder(net)(x[0])
    with pytest.raises(ValueError, match=r"code \[N, D\] of the examples, got tuple"):
        mk.nn.SetEncoder(nn.GRU(3, 4).double())(x)


def test_cavia_starts_each_task_at_a_zero_context() -> None:
    torch.manual_seed(0)
    layer = mk.nn.Contextual(nn.Linear(5, 6), size=3)
    model = nn.Sequential(layer, nn.Tanh(), nn.Linear(6, 3)).double()
    layer.context.data.normal_()  # has no effect
    support, query = points(1), points(2)
    total: Any = 0.0
    for t in range(T):
        at = lambda batch, t=t: tree_map(lambda a: a[t], batch)  # noqa: E731
        phi = dict(model.named_parameters()) | {"0.context": torch.zeros(3, dtype=torch.float64, requires_grad=True)}
        for _ in range(2):
            value = regression_loss(Functional(model, phi), at(support))
            (g,) = torch.autograd.grad(value, phi["0.context"], create_graph=True)
            phi = phi | {"0.context": phi["0.context"] - 2.0 * g}
        total = total + regression_loss(Functional(model, phi), at(query)) / T
    truth = gradients(model, total)
    for options in ({"strategy": "store"}, {"strategy": "recompute"}, {"capture": True}, {"batching": "vmap"}):
        cavia = mk.CAVIA(model, regression_loss, inner=mk.optim.SGD(lr=2.0), steps=2, **options)
        for _ in range(3):
            assert_equal(gradients(model, cavia(support, query)), truth)
            assert layer.context.grad is None
    assert cavia.adapt(support, 0)["0.context"].abs().sum() == 0
    assert list(mk.CAVIA(mk.nn.Contextual(nn.Linear(5, 3), 2).double(), regression_loss).adapt(support)) == ["context"]
    with pytest.raises(ValueError, match="adapt must match"):
        mk.CAVIA(mlp(), regression_loss)


def test_a_contextual_layer_adds_a_function_of_its_context() -> None:
    torch.manual_seed(0)
    x, tokens = torch.randn(5, 3).double(), torch.tensor([1, 6])
    for inner, args, features in (
        (nn.Linear(3, 4), x, None),
        (nn.Embedding(7, 4), tokens, None),
        (nn.Sequential(nn.Linear(3, 4)), x, 4),
        (nn.Linear(3, 1), x, 4),
    ):
        layer = mk.nn.Contextual(inner.double(), 2, features)
        assert (layer.context.dtype, layer.spread.dtype) == (torch.float64, torch.float64)
        assert torch.equal(layer(input=args), inner(args).expand(-1, 4))  # the context begins as zeros
        layer.context.data.normal_()
        orders = [
            (y, *torch.autograd.grad(y.square().sum(), (layer.context, layer.spread)))
            for y in (layer(args), inner(args) + layer.context @ layer.spread.T)
        ]
        torch.testing.assert_close(*orders)
    wide = mk.nn.Contextual(nn.Linear(2, 100), 64)
    assert wide.spread.std().item() == pytest.approx(1 / 8, rel=0.1)
    with pytest.raises(ValueError, match="features must be given for a ReLU"):
        mk.nn.Contextual(nn.ReLU(), 2)
    for size in (0, True):
        with pytest.raises(ValueError, match="size must be an integer"):
            mk.nn.Contextual(nn.Linear(2, 2), size)


class Reading(nn.Module):
    """An encoder of tasks that shares its first layer."""

    def __init__(self, first: nn.Module) -> None:
        super().__init__()
        self.first, self.out = first, nn.Linear(4, 6).double()

    def forward(self, batch: Any) -> Tensor:
        return self.out(self.first(batch[0]).tanh().mean(0))


@pytest.mark.parametrize("strategy", ["store", "recompute"])
@pytest.mark.parametrize("adapt", [["2.*"], None], ids=["head", "all"])
def test_a_layer_that_model_and_encoder_share_counts_once(adapt: list[str] | None, strategy: str) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    options: Any = {"steps": 1, "inner": mk.optim.SGD(0.1), "adapt": adapt, "strategy": strategy}
    hyper = mk.HyperNetwork(model, regression_loss, Reading(model[0]), size=6, **options)
    with torch.no_grad():
        for p in hyper.generator.parameters():
            p.add_(0.3 * torch.randn_like(p))
    support, query = ((torch.randn(T, 5, 3).double(), torch.randn(T, 5, 2).double()) for _ in "sq")
    found = gradients(hyper, hyper(support, query))
    total = 0
    for t in range(T):
        s, q = (tuple(x[t] for x in batch) for batch in (support, query))
        written = hyper.generator(hyper.encoder(s).unsqueeze(0))
        own = {name: p for name, p in model.named_parameters() if name in written}
        phi = {name: p + written[name][0] for name, p in own.items()}
        rest = {name: p for name, p in model.named_parameters() if name not in written}
        loss = regression_loss(Functional(model, {**rest, **phi}), s)
        slopes = torch.autograd.grad(loss, list(phi.values()), create_graph=True)
        phi = {name: p - 0.1 * g for (name, p), g in zip(phi.items(), slopes, strict=True)}
        total = total + regression_loss(Functional(model, {**rest, **phi}), q) / T
    assert_equal(found, gradients(hyper, total))


def test_an_encoder_that_vmap_does_not_run_is_one_line() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    encoder = mk.nn.SetEncoder(lambda batch: net(batch[0]), modules=[net])
    hyper = mk.HyperNetwork(nn.Linear(3, 2), regression_loss, encoder, size=4)
    batch = torch.randn(T, 5, 3), torch.randn(T, 5, 2)
    with pytest.raises(RuntimeError, match=r"^HyperNetwork: encoder must run under torch.func.vmap .*batch norms.*$"):
        hyper(batch, batch)
    net[1].eval()
    hyper(batch, batch).backward()


def test_a_set_encoder_of_a_function_is_not_copied_with_the_modules_of_the_original() -> None:
    net = nn.Linear(3, 4)
    with pytest.raises(TypeError, match="SetEncoder: encode must be a module to be copied"):
        copy.deepcopy(mk.nn.SetEncoder(lambda x: net(x), modules=[net]))
    encoder = mk.nn.SetEncoder(net, "attention", 4)
    copied, x = copy.deepcopy(encoder), torch.randn(5, 3)
    expected = encoder(x)
    nn.init.zeros_(net.weight)
    assert torch.equal(copied(x), expected)
    assert copied.query is not encoder.query


def test_a_rate_that_is_a_parameter_of_the_model_is_refused_where_it_is_not_adapted() -> None:
    model = nn.Linear(3, 2)
    model.rate = nn.Parameter(torch.tensor(0.1))
    inner = mk.optim.SGD(0.1, learn_lr=True)
    inner.lr.value = model.rate
    batch = torch.randn(T, 5, 3), torch.randn(T, 5, 2)
    with pytest.raises(
        ValueError, match="inner must not learn a parameter of the model that is not adapted, got 'rate'"
    ):
        mk.MAML(model, regression_loss, inner, adapt=["weight", "bias"])(batch, batch)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("steps", -1, "steps must be an integer of at least 0, got -1"),
        ("steps", 1.5, "steps must be an integer of at least 0, got 1.5"),
        ("first_order", "no", "first_order must be True or False, got 'no'"),
        ("capture", "x", "capture must be \"auto\", True or False, got 'x'"),
        ("inner", None, "inner must be an optimizer of metakern.optim"),
    ],
)
def test_attributes_that_are_set_later_are_checked_as_arguments_are(name: str, value: Any, error: str) -> None:
    maml = mk.MAML(nn.Linear(3, 2), regression_loss)
    before = getattr(maml, name)
    with pytest.raises((TypeError, ValueError), match=error):
        setattr(maml, name, value)
    assert getattr(maml, name) is before


@pytest.mark.parametrize(
    ("make", "option"),
    [
        (mk.MAMLPlusPlus, {"first_order": True}),
        (mk.MAMLPlusPlus, {"query_weights": (0.5, 0.5)}),
        (mk.IMAML, {"first_order": True}),
        (mk.IMAML, {"strategy": "store"}),
        (mk.Streaming, {"steps": 7}),
        (mk.ProtoMAML, {"weights": "implicit"}),
    ],
)
def test_options_that_an_algorithm_sets_itself_are_refused(make: Any, option: dict[str, Any]) -> None:
    (name,) = option
    with pytest.raises(TypeError, match=f"{make.__name__}: {name} must not be given"):
        make(nn.Linear(3, 2), regression_loss, **option)


def test_names_that_can_not_be_registered() -> None:
    importlib.import_module("metakern.dialogue.registry")
    assert set(OWN) <= set(ALGORITHMS)
    for name, make in (("maml", mk.FOMAML), ("", mk.MAML), (3, mk.MAML), ("own", 5)):
        with pytest.raises((TypeError, ValueError), match="register_algorithm: name must be"):
            mk.register_algorithm(name, make)  # type: ignore[arg-type]
