"""learn2learn's interface: the numbers of plain autograd, clones of every kind of module, and errors that help."""

from __future__ import annotations

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
    """A weight in two places, a module in two places, and a buffer that forward changes."""

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
    """A model in float64, inputs [4, ...] and targets."""
    torch.manual_seed(3)
    model = MODELS[name]().double()
    x = torch.randn(4, 3, 5, dtype=torch.float64) if name in ("lstm", "gru") else torch.randn(4, 5).double()
    return model, x, torch.randn_like(x)


def plain(model: nn.Module, x: Tensor, y: Tensor, rates: list[Any], first_order: bool = False) -> Tensor:
    """The loss after the steps, by functional calls of copies: torch's leaves a module in two places damaged."""
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


def test_metasgd_learns_its_rates() -> None:
    model, x, y = made("tied")
    meta = l2l.MetaSGD(model, lr=LR)
    for lr in meta.lrs:
        lr.data.mul_(torch.rand_like(lr) + 0.5)
    theta = list(model.parameters())
    truth = torch.autograd.grad(plain(model, x, y, list(meta.lrs)), [*theta, *meta.lrs])
    F.mse_loss(adapted(meta.clone().clone(), x, y)(x), y).backward()
    same((p.grad for p in meta.parameters()), truth)
    assert sum(p.numel() for p in meta.parameters()) == 2 * sum(p.numel() for p in theta)


def test_a_clone_is_another_module_of_the_same_numbers() -> None:
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
    F.mse_loss(adapted(learner, x, y)(x), y).backward()  # the clone's steps left the learner as it was
    same((p.grad for p in model.parameters()), expected)


def test_buffers_are_the_module_s_own_unless_they_are_differentiated() -> None:
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


def test_what_is_no_module_is_copied_as_it_is() -> None:
    model = nn.ModuleList([nn.Linear(2, 1), None, nn.Linear(1, 1)])
    assert [part is None for part in l2l.clone_module(model)] == [False, True, False]
    assert l2l.clone_module(None) is None


def test_a_memo_keeps_what_two_modules_share() -> None:
    a, b, memo = nn.Linear(2, 2), nn.Linear(2, 2), {}
    b.weight = a.weight
    assert l2l.clone_module(a, memo).weight is l2l.clone_module(b, memo).weight


def test_recurrent_layers_run_on_the_clone_s_weights() -> None:
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


def test_a_replaced_forward_is_the_clone_s_own_or_refused() -> None:
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


def test_unused_and_frozen_parameters_stay_where_that_is_allowed() -> None:
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


def test_attributes_and_state_are_the_module_s() -> None:
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
    same(l2l.maml_update(by_attribute, LR).parameters(), l2l.maml_update(clone, LR, grads).parameters())
    assert all(p.update is None for p in clone.parameters() if hasattr(p, "update"))
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
    for _ in range(2):  # the second by the plan of the first
        maml.zero_grad()
        value = maml.batch(support, query, mse, steps=STEPS)
        value.backward()
        torch.testing.assert_close(value, total)
        same((p.grad for p in maml.parameters()), truth)
    assert list(maml.state_dict()) == keys
    engine = maml._engine[2]
    maml.batch(support, query, mse, steps=STEPS)
    assert maml._engine[2] is engine
    assert list(pickle.loads(pickle.dumps(maml)).state_dict()) == keys  # without the engine, whose loss may be anything
    with pytest.raises(ValueError, match="strategy must be"):
        maml.batch(support, query, mse, steps=STEPS, strategy="none")
    if learner == "maml":
        maml.lr = 2 * LR
    other = maml.batch(support, query, F.l1_loss if learner != "maml" else mse, steps=STEPS)
    assert not torch.allclose(other, total)
    with pytest.raises(ValueError, match="batch: it must be called on the learner that has the parameters"):
        maml.clone().batch(support, query, mse)
    model[0].weight.requires_grad_(False)
    with pytest.raises(ValueError, match=r"batch: every parameter must require a gradient, got '0.weight'"):
        maml.batch(support, query, mse)


def test_patched_models_run_by_the_ops() -> None:
    model, x, y = made("lstm")
    parameters = list(model.parameters())
    truth = torch.autograd.grad(plain(model, x, y, [LR] * len(parameters)), parameters)
    mk.patch(model)
    F.mse_loss(adapted(l2l.MAML(model, lr=LR).clone(), x, y)(x), y).backward()
    same((p.grad for p in parameters), truth)


def test_a_clone_and_its_graph_go_with_their_last_holder() -> None:
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


def test_nan_passes_through_and_no_step_is_no_change() -> None:
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
        (learner(x), ValueError, r"loss must be one number, got shape \[4, 5\]"),
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
    with pytest.raises(ValueError, match=r"MAML.batch: lr must be a number or an nn.Parameter, got a tensor with"):
        l2l.MAML(model, lr=torch.ones((), requires_grad=True) * LR).batch((x, y), (x, y), F.mse_loss)
