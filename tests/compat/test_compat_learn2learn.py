"""The interface of learn2learn: exact meta-gradients, clones of every kind of module, and its errors."""

from __future__ import annotations

import argparse
import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.parametrizations import weight_norm

import metakern as mk
from metakern.compat import learn2learn as l2l

LR, STEPS = 0.1, 3


class Tied(nn.Module):
    """A model with a tied weight, a module in two places, and a buffer that forward changes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.body = nn.Linear(5, 5), nn.Sequential(nn.Linear(5, 5), nn.Tanh())
        self.last, self.again = nn.Linear(5, 5), self.body
        self.last.weight = self.first.weight
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return self.last(self.again(self.body(self.first(x))))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.rnn, self.head = kind(5, 4, num_layers=2, batch_first=True), nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0])


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": lambda: nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Sequential(nn.Linear(7, 5), nn.Sigmoid())),
    "tied": Tied,
    "lstm": lambda: Recurrent(nn.LSTM),
    "gru": lambda: Recurrent(nn.GRU),
    "batch-norm": lambda: nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 5)),
    "weight-norm": lambda: nn.Sequential(weight_norm(nn.Linear(5, 4)), nn.Tanh(), nn.Linear(4, 5)),
}


def made(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    """Return a model in float64, inputs [4, ...] and targets."""
    torch.manual_seed(3)
    model = MODELS[name]().double()
    x = torch.randn(4, 3, 5, dtype=torch.float64) if name in ("lstm", "gru") else torch.randn(4, 5).double()
    return model, x, torch.randn_like(x)


def plain(model: nn.Module, x: Tensor, y: Tensor, rates: list[Any], first_order: bool = False) -> Tensor:
    """Return the loss after the steps, by plain autograd.

    Each functional call is of a copy: `functional_call` leaves a module that is in two places with wrong parameters.
    """
    phi = dict(model.named_parameters())

    def run(phi: dict[str, Tensor]) -> Tensor:
        return F.mse_loss(functional_call(copy.deepcopy(model), phi, (x,)), y)

    for _ in range(STEPS):
        grads = torch.autograd.grad(run(phi), list(phi.values()), create_graph=not first_order)
        phi = {n: p - lr * g for (n, p), g, lr in zip(phi.items(), grads, rates, strict=True)}
    return run(phi)


def adapted(learner: Any, x: Tensor, y: Tensor) -> Any:
    for _ in range(STEPS):
        learner.adapt(F.mse_loss(learner(x), y))
    return learner


def same(found: Any, truth: Any) -> None:
    for a, b in zip(found, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("first_order", [False, True])
def test_maml_has_the_meta_gradient_of_plain_autograd(name: str, first_order: bool) -> None:
    model, x, y = made(name)
    parameters = list(model.parameters())
    truth = torch.autograd.grad(plain(model, x, y, [LR] * len(parameters), first_order), parameters)
    maml = l2l.MAML(model, lr=LR, first_order=first_order)
    F.mse_loss(adapted(maml.clone(), x, y)(x), y).backward()
    same((p.grad for p in parameters), truth)
    exact = torch.autograd.grad(plain(model, x, y, [LR] * len(parameters)), parameters)
    assert first_order != all(torch.allclose(p.grad, g) for p, g in zip(parameters, exact, strict=True))


def test_metasgd_has_the_meta_gradient_of_plain_autograd() -> None:
    model, x, y = made("tied")
    meta = l2l.MetaSGD(model, lr=LR)
    for lr in meta.lrs:
        lr.data.mul_(torch.rand_like(lr) + 0.5)
    theta = list(model.parameters())
    truth = torch.autograd.grad(plain(model, x, y, list(meta.lrs)), [*theta, *meta.lrs])
    F.mse_loss(adapted(meta.clone().clone(), x, y)(x), y).backward()
    same((p.grad for p in meta.parameters()), truth)
    assert sum(p.numel() for p in meta.parameters()) == 2 * sum(p.numel() for p in theta)


def test_a_clone_has_its_own_modules_and_equal_parameters() -> None:
    model, x, _ = made("tied")
    maml = l2l.MAML(model, lr=LR)
    clone = maml.clone()
    torch.testing.assert_close(clone(x), model(x), rtol=0, atol=0)
    assert len(list(clone.parameters())) == len(list(maml.parameters())) == 5
    assert clone.module.first.weight is clone.module.last.weight
    assert clone.module.body is clone.module.again is not model.body
    own = {p.data_ptr() for p in model.parameters()}
    assert not any(p.data_ptr() in own for p in clone.parameters())
    assert not any(isinstance(p, nn.Parameter) for p in clone.parameters())


def test_clones_of_clones_reach_the_first_parameters() -> None:
    model, x, y = made("mlp")
    maml = l2l.MAML(model, lr=LR)
    learner = maml.clone()
    learner.adapt(F.mse_loss(learner(x), y))
    truth = learner.clone()
    F.mse_loss(adapted(truth, x, y)(x), y).backward(retain_graph=True)
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    F.mse_loss(adapted(learner, x, y)(x), y).backward()  # the steps of the clone must not change the learner
    same((p.grad for p in model.parameters()), expected)


def test_buffers_are_shared_unless_they_require_a_gradient() -> None:
    model, x, y = made("batch-norm")
    scale = nn.Sequential(model)
    scale.register_buffer("scale", torch.ones(2).double().requires_grad_())
    scale.register_buffer("absent", None)
    clone = l2l.clone_module(scale)
    adapted(l2l.MAML(model, lr=LR).clone(), x, y)
    assert model[1].num_batches_tracked == STEPS
    assert clone.scale is not scale.scale
    clone.scale.sum().backward()
    assert torch.equal(scale.scale.grad, torch.ones(2).double())
    assert clone[0][1].running_mean is model[1].running_mean


def test_entries_that_are_none_stay_none() -> None:
    model = nn.ModuleList([nn.Linear(2, 1), None, nn.Linear(1, 1)])
    assert [part is None for part in l2l.clone_module(model)] == [False, True, False]
    assert l2l.clone_module(None) is None


def test_modules_cloned_with_one_memo_share_their_parameters() -> None:
    a, b, memo = nn.Linear(2, 2), nn.Linear(2, 2), {}
    b.weight = a.weight
    assert l2l.clone_module(a, memo).weight is l2l.clone_module(b, memo).weight


def test_recurrent_layers_of_a_clone_compute_with_its_weights() -> None:
    for kind in (nn.RNN, nn.LSTM, nn.GRU):
        model = kind(2, 3)
        clone, x = l2l.clone_module(model), torch.randn(4, 2, 2)
        with torch.no_grad():
            before = model(x)[0].clone()
            for p in clone.parameters():
                p.add_(1)
            l2l.clone_module(model).weight_hh_l0 = nn.Parameter(torch.ones_like(model.weight_hh_l0))
            assert not torch.allclose(clone(x)[0], before)
            assert torch.equal(model(x)[0], before)


def test_a_replaced_forward_runs_on_the_clone_or_is_refused() -> None:
    model = nn.Linear(2, 2)
    original = model.forward
    model.forward = type(model).forward.__get__(model)
    clone = l2l.update_module(l2l.clone_module(model), [torch.ones(2, 2), torch.zeros(2)])
    assert not torch.allclose(clone(torch.ones(2)), model(torch.ones(2)))
    model.forward = lambda x: original(x)
    clone = l2l.update_module(l2l.clone_module(model), [torch.ones(2, 2), torch.zeros(2)])
    torch.testing.assert_close(clone(torch.ones(2)), model(torch.ones(2)) + 2)
    model.forward = F.relu
    with pytest.raises(ValueError, match="the forward of Linear must be a method, got another function"):
        l2l.clone_module(model)


def test_unused_and_frozen_parameters_are_errors_unless_allowed() -> None:
    model, x, y = made("mlp")
    model.unused = nn.Linear(2, 2).double()
    maml = l2l.MAML(model, lr=LR)
    learner = maml.clone()
    forward = lambda: F.mse_loss(learner.module[:3](x), y)  # noqa: E731
    with pytest.raises(ValueError, match=r"MAML.adapt: loss must depend on every parameter, .* on 'unused.weight'"):
        learner.adapt(forward())
    learner.adapt(forward(), allow_unused=True)
    assert torch.equal(learner.unused.weight, model.unused.weight)
    assert not torch.equal(learner.module[0].weight, model[0].weight)
    model[0].weight.requires_grad_(False)
    learner = l2l.MAML(model, lr=LR, allow_unused=True).clone()
    with pytest.raises(ValueError, match=r"MAML.adapt: every parameter must require a gradient, got '0.weight'"):
        learner.adapt(forward())
    learner = l2l.MAML(model, lr=LR, allow_nograd=True).clone()
    learner.adapt(forward())
    assert torch.equal(learner.module[0].weight, model[0].weight)
    forward().backward()
    assert model[0].weight.grad is None
    assert model[0].bias.grad is not None


def test_attributes_and_state_dicts_are_those_of_the_module() -> None:
    model, x, _ = made("tied")
    maml = l2l.MAML(model, lr=nn.Parameter(torch.tensor(LR)))
    assert maml.first is model.first
    assert maml.clone().calls is model.calls
    with pytest.raises(AttributeError, match="nothing"):
        _ = maml.nothing
    assert [n for n in maml.state_dict() if n != "lr"] == [f"module.{n}" for n in model.state_dict()]
    l2l.MAML(copy.deepcopy(model), lr=LR).load_state_dict({f"module.{n}": p for n, p in model.state_dict().items()})
    assert list(l2l.MetaSGD(nn.Linear(2, 3)).state_dict()) == ["module.weight", "module.bias", "lrs.0", "lrs.1"]
    copied = copy.deepcopy(maml)
    torch.testing.assert_close(copied(x), maml(x), rtol=0, atol=0)
    assert copied.module is not model


def test_update_detach_and_the_magic_box() -> None:
    model, x, y = made("tied")
    model.last.bias.requires_grad_(False)
    clone = l2l.clone_module(model)
    updates = [None if i == 1 else torch.randn_like(p) for i, p in enumerate(clone.parameters())]
    assert l2l.update_module(clone, updates) is clone
    for p, q, u in zip(model.parameters(), clone.parameters(), updates, strict=True):
        assert torch.equal(q, p if u is None else p + u)
    assert clone.first.weight is clone.last.weight
    with pytest.raises(ValueError, match=r"update_module: updates must have an entry for each of the 5 .* got 1"):
        l2l.update_module(clone, updates[:1])
    wanted = [p for p in clone.parameters() if p.requires_grad]
    grads = [*torch.autograd.grad(F.mse_loss(clone(x), y), wanted), None]
    by_attribute = l2l.clone_module(clone)
    for p, g in zip(by_attribute.parameters(), grads, strict=True):
        p.update = None if g is None else -LR * g
    stepped = list(by_attribute.parameters())
    same(l2l.maml_update(by_attribute, LR).parameters(), l2l.maml_update(clone, LR, grads).parameters())
    assert all(p.update is None for p in stepped)
    l2l.detach_module(clone, keep_requires_grad=True)
    assert [p.is_leaf and p.requires_grad for p in clone.parameters()] == [True] * 4 + [False]
    l2l.detach_module(clone)
    assert not any(p.requires_grad for p in clone.parameters())
    with pytest.raises(ValueError, match=r"maml_update: grads must have an entry for each of the 5 .* got 0"):
        l2l.maml_update(clone, LR, [])
    assert l2l.magic_box("x") == "x"


@pytest.mark.parametrize("learner", ["maml", "learned-rate", "metasgd"])
def test_a_batch_is_the_loop_over_its_tasks(learner: str) -> None:
    model, *_ = made("mlp")
    maml: Any = {
        "maml": lambda: l2l.MAML(model, lr=LR),
        "learned-rate": lambda: l2l.MAML(model, lr=nn.Parameter(torch.tensor(LR).double())),
        "metasgd": lambda: l2l.MetaSGD(model, lr=LR),
    }[learner]()
    support, query = [(torch.randn(3, 4, 5).double(), torch.randn(3, 4, 5).double()) for _ in range(2)]
    keys = list(maml.state_dict())

    def mse(predictions: Tensor, targets: Tensor) -> Tensor:
        return F.mse_loss(predictions, targets)

    total = torch.zeros(()).double()
    for t in range(3):
        one = adapted(maml.clone(), support[0][t], support[1][t])
        total = total + F.mse_loss(one(query[0][t]), query[1][t]) / 3
    truth = torch.autograd.grad(total, list(maml.parameters()))
    for _ in range(2):  # the second time with the plan of the first
        maml.zero_grad()
        value = maml.batch(support, query, mse, steps=STEPS)
        value.backward()
        torch.testing.assert_close(value, total)
        same((p.grad for p in maml.parameters()), truth)
    assert list(maml.state_dict()) == keys
    engine = maml._engine[2]
    maml.batch(support, query, mse, steps=STEPS)
    assert maml._engine[2] is engine
    assert (
        list(pickle.loads(pickle.dumps(maml)).state_dict()) == keys
    )  # without the engine, whose loss may not be picklable
    with pytest.raises(ValueError, match="strategy must be"):
        maml.batch(support, query, mse, steps=STEPS, strategy="none")
    if learner == "maml":
        maml.lr = 2 * LR
    other = maml.batch(support, query, F.l1_loss if learner != "maml" else mse, steps=STEPS)
    assert not torch.allclose(other, total)
    with pytest.raises(ValueError, match="batch: it must be called on the learner that was cloned, got a clone"):
        maml.clone().batch(support, query, mse)
    model[0].weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"batch: every parameter must require a gradient, got '0.weight'"):
        maml.batch(support, query, mse)


def test_patched_models_have_the_meta_gradient_of_plain_autograd() -> None:
    model, x, y = made("lstm")
    parameters = list(model.parameters())
    truth = torch.autograd.grad(plain(model, x, y, [LR] * len(parameters)), parameters)
    mk.patch(model)
    F.mse_loss(adapted(l2l.MAML(model, lr=LR).clone(), x, y)(x), y).backward()
    same((p.grad for p in parameters), truth)


def test_a_clone_and_its_graph_are_freed_without_the_garbage_collector() -> None:
    model, x, y = made("lstm")
    maml = l2l.MAML(model, lr=LR)
    gc.disable()
    try:
        learner = adapted(maml.clone(), x, y)
        alive = weakref.ref(learner.module), weakref.ref(next(learner.parameters()))
        del learner
        assert [ref() for ref in alive] == [None, None]
    finally:
        gc.enable()


def test_no_steps_give_plain_gradients_and_nan_losses_give_nan_parameters() -> None:
    model, x, y = made("mlp")
    learner = l2l.MAML(model, lr=LR).clone()
    F.mse_loss(learner(x), y).backward()
    same((p.grad for p in model.parameters()), torch.autograd.grad(F.mse_loss(model(x), y), list(model.parameters())))
    learner.adapt(F.mse_loss(learner(x), y * torch.nan))
    assert all(p.isnan().any() for p in learner.parameters())


def test_errors() -> None:
    model, x, y = made("mlp")
    maml, other = l2l.MAML(model, lr=LR), l2l.MAML(copy.deepcopy(model), lr=LR).clone()
    learner = maml.clone()
    before = F.mse_loss(learner(x), y)
    learner.adapt(before)
    for loss in (before, F.mse_loss(other(x), y)):
        with pytest.raises(ValueError, match=r"MAML.adapt: loss must depend on the current parameters of this model"):
            learner.adapt(loss)
    for loss, error, message in (
        (1.0, TypeError, "loss must be a tensor, got float"),
        (learner(x), ValueError, r"loss must have one element, got shape \[4, 5\]"),
        (F.mse_loss(learner(x), y).detach(), ValueError, "loss must have a graph, got a tensor without one"),
    ):
        with pytest.raises(error, match=message):
            learner.adapt(loss)
    loss = F.mse_loss(learner(x), y)
    loss.backward()
    with pytest.raises(RuntimeError, match=r"MAML.adapt: loss must have its graph, got one whose graph was freed"):
        learner.adapt(loss)
    learner = maml.clone().to("cpu").to(x.dtype)
    for move in (lambda: learner.to("meta"), lambda: learner.to(torch.bfloat16), learner.half):
        with pytest.raises(RuntimeError, match="MAML: a clone must stay on its device and in its dtype"):
            move()
    loss = F.mse_loss(learner(x), y)
    model.to("meta")
    with pytest.raises(RuntimeError, match=r"the model must stay on the device where .* began, cpu, got it on meta"):
        learner.adapt(loss)
    with pytest.raises(ValueError, match="MetaSGD: lrs must have an entry for each of the 4 parameters, got 1"):
        l2l.MetaSGD(model, lrs=[torch.ones(2)])
    with pytest.raises(TypeError, match=r"MAML: model must be an nn.Module, got str"):
        l2l.MAML("model", lr=LR)
    with pytest.raises(TypeError, match=r"MAML: lr must be a number or a tensor, got NoneType"):
        l2l.MAML(model, lr=None)
    with pytest.raises(ValueError, match=r"MAML.batch: lr must be a number or an nn.Parameter, got a tensor that"):
        l2l.MAML(model, lr=torch.ones((), requires_grad=True) * LR).batch((x, y), (x, y), F.mse_loss)


def test_steps_are_bit_identical_to_those_of_learn2learn() -> None:
    for seed in range(20):
        torch.manual_seed(seed)
        model, x = nn.Sequential(nn.Linear(20, 40), nn.Tanh(), nn.Linear(40, 20)), torch.randn(3, 8, 20)
        rates = [nn.Parameter(torch.rand_like(p)) for p in model.parameters()]
        for maml in (l2l.MAML(model, lr=LR), l2l.MetaSGD(model, lrs=rates)):
            learner = maml.clone()
            lrs: list[Any] = list(learner.lrs) if isinstance(learner, l2l.MetaSGD) else [LR] * 4
            for k in range(3):
                loss, phi = learner(x[k]).square().sum(), list(learner.module.parameters())
                grads = torch.autograd.grad(loss, phi, create_graph=True)
                learner.adapt(loss)
                expected = [p - lr * g for p, lr, g in zip(phi, lrs, grads, strict=True)]
                assert all(map(torch.equal, learner.module.parameters(), expected))


class Gain(nn.Module):
    """A transform of gradients that is not linear in its parameter."""

    def __init__(self, like: Tensor) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.linspace(0.5, 1.5, like.numel(), dtype=like.dtype).reshape(like.shape))

    def forward(self, grad: Tensor) -> Tensor:
        return self.gain**2 * grad


@pytest.mark.parametrize("adapt_transform", [False, True])
def test_gbml_has_the_meta_gradient_of_plain_autograd(adapt_transform: bool) -> None:
    model, x, y = made("mlp")
    gbml = l2l.algorithms.GBML(model, Gain, lr=LR, adapt_transform=adapt_transform)
    theta, psi = list(model.parameters()), list(gbml.compute_update.parameters())
    names = [n for n, _ in model.named_parameters()]

    def loss(phi: Any) -> Tensor:
        return F.mse_loss(functional_call(model, dict(zip(names, phi, strict=True)), (x,)), y)

    phi, gains = theta, psi
    for k in range(STEPS):
        value = loss(phi)
        if adapt_transform and k:
            steps = torch.autograd.grad(value, gains, create_graph=True)
            stepped = [g - LR * d for g, d in zip(gains, steps, strict=True)]
        else:
            stepped = gains
        grads = torch.autograd.grad(value, phi, create_graph=True)
        phi, gains = [p - LR * g**2 * d for p, g, d in zip(phi, stepped, grads, strict=True)], stepped
    truth = torch.autograd.grad(loss(phi), [*theta, *psi])
    learner = adapted(gbml.clone(), x, y)
    F.mse_loss(learner(x), y).backward()
    same([p.grad for p in [*theta, *psi]], truth)
    model[0].weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"ParameterUpdate: every parameter must require a gradient"):
        adapted(gbml.clone(), x, y)
    adapted(gbml.clone(allow_nograd=True, allow_unused=True), x, y)
    with pytest.raises(TypeError, match=r"GBML: module must be an nn.Module, got str"):
        l2l.GBML("model", Gain)


def test_gbml_refuses_unused_parameters_unless_allowed() -> None:
    model, x, y = made("mlp")
    model.unused = nn.Linear(2, 2).double()
    gbml = l2l.GBML(model, lambda p: None if p.dim() == 1 else Gain(p), lr=LR)
    learner = gbml.clone()
    forward = lambda: F.mse_loss(learner.module[:3](x), y)  # noqa: E731
    with pytest.raises(
        ValueError, match=r"ParameterUpdate: loss must depend on every parameter, got one of shape \[2,"
    ):
        learner.adapt(forward())
    learner.adapt(forward(), allow_unused=True)
    assert torch.equal(learner.unused.weight, model.unused.weight)
    forward().backward()
    assert model[0].weight.grad is not None
    with pytest.raises(TypeError, match="transform must return a module or None, got int"):
        l2l.optim.ParameterUpdate(model.parameters(), lambda p: 1)
    with pytest.raises(ValueError, match="parameters must be the 6 that transforms were made for, got 1"):
        gbml.compute_update(forward(), [model[0].weight])
    with pytest.raises(TypeError, match=r"GBML.adapt: loss must be a tensor, got float"):
        learner.adapt(1.0)


def test_gbml_adapts_transforms_that_may_be_frozen_or_have_no_parameters() -> None:
    model, x, y = made("mlp")
    for transform in (lambda p: None, lambda p: nn.Identity()):
        learner = adapted(l2l.GBML(model, transform, lr=LR, adapt_transform=True).clone(), x, y)
        expected = adapted(l2l.GBML(model, transform, lr=LR).clone(), x, y)
        assert all(torch.equal(a, b) for a, b in zip(learner.parameters(), expected.parameters(), strict=True))
    gbml = l2l.GBML(model, Gain, lr=LR, adapt_transform=True)
    next(gbml.compute_update.parameters()).requires_grad_(False)
    with pytest.raises(ValueError, match=r"GBML.adapt: every parameter of the transform must require a gradient"):
        adapted(gbml.clone(), x, y)
    adapted(gbml.clone(allow_nograd=True), x, y)


def test_meta_sgd_update_needs_a_rate_for_each_parameter() -> None:
    model = nn.Linear(2, 1)
    grads = [torch.ones_like(p) for p in model.parameters()]
    with pytest.raises(ValueError, match="meta_sgd_update: lrs must have an entry for each of the 2 parameters, got 1"):
        l2l.meta_sgd_update(l2l.clone_module(model), lrs=[torch.ones(())], grads=grads)


def test_transforms_of_gradients() -> None:
    torch.manual_seed(0)
    g = torch.randn(4, 3, 2, 2)
    curvature = l2l.optim.MetaCurvatureTransform(g, lr=0.5)
    for p in curvature.parameters():
        nn.init.normal_(p)
    expected = 0.5 * torch.einsum(
        "ia,abf,bo,gf->iog", curvature.mc_in, g.flatten(2), curvature.mc_out, curvature.mc_f
    ).reshape(g.shape)
    torch.testing.assert_close(curvature(g), expected)
    for shape in ((4,), (4, 3)):
        g = torch.randn(shape)
        for make in (
            l2l.optim.MetaCurvatureTransform,
            l2l.optim.KroneckerTransform(l2l.nn.KroneckerLinear),
            l2l.optim.ModuleTransform(lambda n, m: nn.Identity()),
        ):
            torch.testing.assert_close(make(g)(g), g)
    for make in (l2l.optim.MetaCurvatureTransform, l2l.optim.KroneckerTransform(l2l.nn.KroneckerLinear)):
        with pytest.raises(ValueError, match=r"must be of 1, 2 or 4 dimensions, got one of shape \[1, 1, 1\]"):
            make(torch.zeros(1, 1, 1))
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    by_part = l2l.optim.TransformDictionary({net[0]: Gain, net[1].bias: lambda p: l2l.nn.Scale(p.shape)})
    assert [type(by_part(p)) for p in net.parameters()] == [Gain, Gain, type(None), l2l.nn.Scale]
    with pytest.raises(TypeError, match="keys must be modules or parameters, got one of str"):
        l2l.optim.TransformDictionary({"weight": Gain})


def test_a_learned_optimizer_gets_its_gradient_from_the_next_loss() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(3, 1).double(), torch.randn(2, 5, 3).double()
    learned = l2l.optim.LearnableOptimizer(model, Gain, lr=0.1)
    theta = [p.detach().clone() for p in model.parameters()]
    gains = [p.detach().clone().requires_grad_() for p in learned.parameters()]
    model(x[0]).square().sum().backward()
    updates = [0.1 * g**2 * p.grad for g, p in zip(gains, model.parameters(), strict=True)]
    learned.step()
    learned.zero_grad()
    model(x[1]).square().sum().backward()
    weight, bias = (p - u for p, u in zip(theta, updates, strict=True))
    truth = torch.autograd.grad(F.linear(x[1], weight, bias).square().sum(), gains)
    same([p.grad for p in learned.parameters()], truth)
    assert all(p.grad is not None for p in model.parameters())
    with pytest.raises(TypeError, match=r"LearnableOptimizer: model must be an nn.Module, got int"):
        l2l.optim.LearnableOptimizer(1, Gain)


def test_kronecker_layers_multiply_by_the_kronecker_product() -> None:
    torch.manual_seed(0)
    for psd in (False, True):
        layer = l2l.nn.KroneckerLinear(2, 3, psd=psd)
        for p in layer.parameters():
            nn.init.normal_(p)
        left, right = (m.t() @ m if psd else m for m in (layer.left, layer.right))
        x = torch.randn(6)
        expected = torch.kron(right.t().contiguous(), left) @ x + layer.bias.t().flatten()
        torch.testing.assert_close(layer(x), expected)
        torch.testing.assert_close(layer(torch.stack([x.reshape(3, 2).t()] * 4))[1], expected.reshape(3, 2).t())
    with pytest.raises(ValueError, match=r"KroneckerLinear: x must be of shape \[6\] or \[..., 2, 3\], got \[5\]"):
        layer(torch.zeros(5))
    rnn, lstm, x, h = l2l.nn.KroneckerRNN(2, 3), l2l.nn.KroneckerLSTM(2, 3), torch.randn(2, 3), torch.randn(2, 3)
    y, h_next = rnn(x, h)
    torch.testing.assert_close(y, torch.tanh(x + h))
    assert torch.equal(y, h_next)
    y, (h_next, c) = lstm(x, (h, torch.ones(2, 3)))
    gate = torch.sigmoid(x + h)
    torch.testing.assert_close(c, gate + gate * torch.tanh(x + h))
    torch.testing.assert_close(y, gate * torch.tanh(c))
    assert y is h_next
    assert list(lstm.state_dict())[:6] == [f"W_{s}i.{p}" for s in "ih" for p in ("left", "right", "bias")]


def test_small_modules_and_classifiers() -> None:
    torch.manual_seed(0)
    assert l2l.nn.Flatten()(torch.zeros(2, 3, 4)).shape == (2, 12)
    assert l2l.nn.Lambda(torch.neg)(torch.ones(1)) == -1
    assert torch.equal(l2l.nn.Scale((2, 1), alpha=3)(torch.ones(2, 2)), torch.full((2, 2), 3.0))
    net = l2l.nn.freeze(nn.Linear(2, 2))
    assert not any(p.requires_grad for p in net.parameters())
    assert all(p.requires_grad for p in l2l.nn.unfreeze(net).parameters())
    support, labels, query = torch.randn(6, 4, requires_grad=True), torch.tensor([0, 1, 2] * 2), torch.randn(5, 4)
    means = torch.stack([support[labels == k].mean(0) for k in range(3)])
    torch.testing.assert_close(
        l2l.nn.PrototypicalClassifier(support, labels)(query), -(torch.cdist(query, means) ** 2), rtol=1e-4, atol=1e-5
    )
    logits = l2l.nn.PrototypicalClassifier(support, labels, distance="cosine")(query)
    torch.testing.assert_close(logits, F.cosine_similarity(query[:, None], means, dim=2))
    logits.sum().backward()
    assert support.grad is not None
    with pytest.raises(
        ValueError, match=r"prototypes must be set before a call, got None: call fit_\(support, labels\)"
    ):
        l2l.nn.PrototypicalClassifier()(query)
    with pytest.raises(ValueError, match="distance must be 'euclidean', 'cosine' or a function, got 'l1'"):
        l2l.nn.PrototypicalClassifier(distance="l1")
    net = nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.Linear(3, 1)))
    x, before = torch.randn(4, 2), copy.deepcopy(net)
    meta = l2l.nn.MetaModule(
        net, {nn.Linear: lambda m: l2l.nn.ParameterTransform(m, lambda p: l2l.nn.Scale(alpha=2.0))}
    )
    torch.testing.assert_close(
        meta(x),
        F.linear(F.linear(x, *(2 * p for p in before[0].parameters())), *(2 * p for p in before[1][0].parameters())),
    )
    learner = l2l.MAML(meta, lr=0.1, allow_nograd=True).clone()
    learner.adapt(learner(x).square().sum())
    learner(x).sum().backward()
    assert [p.grad is not None for p in meta.parameters()] == [p.requires_grad for p in meta.parameters()]
    assert len(list(meta.meta_parameters())) == 4
    assert all(map(torch.equal, meta.module().parameters(), before.parameters()))


def test_distributions() -> None:
    mean, net = torch.zeros(2, requires_grad=True), nn.Linear(2, 2)
    dist = torch.distributions.Independent(torch.distributions.Normal(mean, torch.ones(2)), 1)
    dist.net = net
    moved = torch.distributions.TransformedDistribution(
        dist, [torch.distributions.AffineTransform(torch.ones(2, requires_grad=True), 2.0)]
    )
    for each in (dist, moved):
        mean.grad = None
        clone = l2l.clone_distribution(each)
        value = clone.log_prob(torch.full((2,), 0.5))
        torch.testing.assert_close(value, each.log_prob(torch.full((2,), 0.5)), rtol=0, atol=0)
        value.backward()
        assert mean.grad is not None
        assert not l2l.detach_distribution(clone).log_prob(torch.ones(2)).requires_grad
        assert each.log_prob(torch.ones(2)).requires_grad
    clone = l2l.clone_distribution(dist)
    assert clone.net.weight is not net.weight
    assert not l2l.detach_distribution(clone).net.weight.requires_grad
    assert net.weight.requires_grad
    assert list(l2l.clone_named_parameters({"mean": mean})) == ["mean"]


def test_parts_of_learn2learn_that_are_left_out_raise_import_errors() -> None:
    from metakern.compat.learn2learn import algorithms

    for name in ("data", "gym", "text", "vision"):
        with pytest.raises(ImportError, match=rf"compat.learn2learn.{name} is left out of metakern.compat"):
            exec(f"from metakern.compat.learn2learn.{name} import anything")
        with pytest.raises(ImportError, match=rf"compat.learn2learn.{name} is left out of metakern.compat"):
            exec(f"import metakern.compat.learn2learn.{name}.part")
        with pytest.raises(ImportError, match="take them from learn2learn itself"):
            _ = getattr(l2l, name).part
    with pytest.raises(ImportError, match="SVClassifier is left out"):
        _ = l2l.nn.SVClassifier
    with pytest.raises(ImportError, match="LightningMetaOptNet is left out"):
        _ = algorithms.LightningMetaOptNet
    for module in (l2l, l2l.nn, algorithms):
        assert not hasattr(module, "nothing")


def episodes(ways: int, shots: int, queries: int) -> Any:
    """Return a source of tasks: each class is a random point in 6 dimensions, with noise around it."""

    class Tasks:
        def sample(self) -> tuple[Tensor, Tensor]:
            labels = torch.arange(ways).repeat_interleave(shots + queries)
            return torch.randn(ways, 6)[labels] + 0.1 * torch.randn(len(labels), 6), labels

    return Tasks()


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")
def test_lightning_classes_train(tmp_path: Any) -> None:
    pytest.importorskip("lightning")
    from metakern.compat.learn2learn import algorithms
    from metakern.compat.learn2learn._lightning import pl
    from metakern.compat.learn2learn.utils.lightning import EpisodicBatcher

    torch.manual_seed(0)
    sizes = {"train_ways": 3, "test_ways": 3, "train_shots": 2, "test_shots": 2, "lr": 0.02}
    net = lambda width: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, width))  # noqa: E731
    modules: list[Any] = [
        algorithms.LightningMAML(net(3), adaptation_lr=0.3, adaptation_steps=2, **sizes),
        algorithms.LightningANIL(net(8), nn.Linear(8, 3), adaptation_lr=0.3, **sizes),
        algorithms.LightningPrototypicalNetworks(net(4), distance_metric="cosine", **sizes),
    ]
    for module in modules:
        tasks = episodes(3, 2, 1)
        trainer = pl.Trainer(
            max_epochs=2, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
            enable_checkpointing=False, default_root_dir=tmp_path,
        )  # fmt: skip
        before = [p.detach().clone() for p in module.parameters()]
        trainer.fit(module, EpisodicBatcher(tasks, epoch_length=4))
        assert not any(map(torch.equal, module.parameters(), before))
        assert {"train_loss", "valid_accuracy"} <= set(trainer.callback_metrics)
        assert module.hparams["train_ways"] == 3
        loss, accuracy = module.meta_learn(tasks.sample(), 0, 3, 2, 1)
        assert loss.isfinite()
        assert 0 <= accuracy <= 1
        with pytest.raises(ValueError, match="data must hold 12 examples, 3 ways of 3 shots and 1 queries, got 9"):
            module.meta_learn(tasks.sample(), 0, 3, 3, 1)
    parser = algorithms.LightningMAML.add_model_specific_args(argparse.ArgumentParser(add_help=False))
    assert parser.parse_args(["--adaptation_lr", "0.5"]).adaptation_lr == 0.5
    with pytest.raises(TypeError, match=r"LightningMAML: settings must be among .*, got inner_lr"):
        algorithms.LightningMAML(net(3), inner_lr=0.1)
    with pytest.raises(ValueError, match="LightningMAML: data_parallel must be False"):
        algorithms.LightningMAML(net(3), data_parallel=True)
    with pytest.raises(
        ValueError, match="LightningANIL: test_ways must be train_ways, 4, as all tasks share one classifier, got"
    ):
        algorithms.LightningANIL(net(3), net(3), train_ways=4)
