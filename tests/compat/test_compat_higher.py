"""The interface of higher: the steps of torch.optim, exact derivatives through them, and its errors."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim
from torch.autograd import gradcheck, gradgradcheck

import metakern as mk
from metakern.compat import higher

OPTIMIZERS: dict[str, Callable[[Any], optim.Optimizer]] = {
    "sgd": lambda p: optim.SGD(p, lr=0.1),
    "sgd, momentum": lambda p: optim.SGD(p, lr=0.1, momentum=0.7, dampening=0.3, weight_decay=0.05),
    "sgd, nesterov": lambda p: optim.SGD(p, lr=0.1, momentum=0.7, nesterov=True, maximize=True),
    "adam": lambda p: optim.Adam(p, lr=0.1, betas=(0.8, 0.95), weight_decay=0.05),
    "adam, amsgrad": lambda p: optim.Adam(p, lr=0.1, betas=(0.6, 0.7), eps=1e-3, amsgrad=True),
    "adamw": lambda p: optim.AdamW(p, lr=0.1, weight_decay=0.2),
    "rmsprop": lambda p: optim.RMSprop(p, lr=0.1, alpha=0.8, momentum=0.6, weight_decay=0.05),
    "rmsprop, centered": lambda p: optim.RMSprop(p, lr=0.1, alpha=0.8, eps=1e-3, centered=True),
    "adagrad": lambda p: optim.Adagrad(p, lr=0.1, lr_decay=0.3, weight_decay=0.05, initial_accumulator_value=0.2),
    "adadelta": lambda p: optim.Adadelta(p, lr=0.4, rho=0.8, eps=1e-3, weight_decay=0.05),
    "adamax": lambda p: optim.Adamax(p, lr=0.1, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.05),
    "asgd": lambda p: optim.ASGD(p, lr=0.1, lambd=0.2, alpha=0.6, t0=1, weight_decay=0.05),
    "rprop": lambda p: optim.Rprop(p, lr=0.2, etas=(0.6, 1.3)),
}


class Shared(nn.Module):
    """A model with a tied weight, an unused parameter, a frozen one, and a buffer that forward changes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.rnn, self.last = nn.Linear(4, 4), nn.LSTM(4, 4), nn.Linear(4, 4)
        self.last.weight = self.first.weight
        self.unused = nn.Parameter(torch.randn(3))
        self.first.bias.requires_grad_(False)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls.add_(1)
        return self.last(self.rnn(self.first(x))[0])


def made() -> tuple[Shared, Tensor]:
    torch.manual_seed(5)
    return Shared().double(), torch.randn(3, 2, 4, dtype=torch.float64)


def groups(model: nn.Module) -> list[dict[str, Any]]:
    """Return two parameter groups, the first with its own rate, not in the model's order and without last.bias."""
    named = {n: p for n, p in model.named_parameters() if n != "last.bias"}
    left = [named.pop("unused"), named.pop("rnn.weight_ih_l0")]
    return [{"params": left, "lr": 0.3}, {"params": list(named.values())}]


def same(found: Any, truth: Any, tolerance: float = 1e-10) -> None:
    for a, b in zip(found, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def torch_steps(model: nn.Module, opt: optim.Optimizer, x: Tensor, steps: int) -> None:
    for k in range(steps):
        opt.zero_grad()
        model(x + k).square().sum().backward()
        opt.step()


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("before", [0, 2])
def test_steps_are_those_of_torch_optim_and_start_from_its_state(name: str, before: int) -> None:
    model, x = made()
    opt = OPTIMIZERS[name](groups(model))
    torch_steps(model, opt, x, before)
    state = copy.deepcopy(opt.state_dict())
    with higher.innerloop_ctx(model, opt) as (fmodel, diffopt):
        later = copy.deepcopy((model, opt))
        torch_steps(model, opt, x, 1)
        for k in range(3):
            diffopt.step(fmodel(x + k).square().sum())
    model, opt = later
    assert str(opt.state_dict()) == str(state)
    assert model.calls == before
    start = [p.clone() for p in model.parameters()]
    torch_steps(model, opt, x, 3)
    # torch.optim.ASGD keeps its rate in float32, also for float64 parameters.
    same(fmodel.parameters(), model.parameters(), 1e-6 if name == "asgd" else 1e-10)
    same(fmodel.parameters(time=0), start)
    assert torch.equal(dict(fmodel.named_parameters())["last.bias"], dict(model.named_parameters())["last.bias"])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_derivatives_through_the_steps_are_exact(name: str) -> None:
    """With respect to the initial parameters and every setting, both orders equal finite differences."""
    torch.manual_seed(1)
    model, x = nn.Linear(2, 1).double(), torch.randn(3, 2, dtype=torch.float64)
    opt = OPTIMIZERS[name](model.parameters())
    learned = higher.get_trainable_opt_params(opt)
    names = [n for n in learned if n != "eps"]

    def after(*values: Tensor) -> Tensor:
        rates = dict(zip(names, values[2:], strict=True))
        override = {n: [tuple(rates[n]) if isinstance(learned[n][0], tuple) else rates[n]] for n in names}
        fmodel = higher.monkeypatch(model)
        fmodel.update_params(values[:2])
        diffopt = higher.get_diff_optim(opt, model.parameters(), fmodel, override=override)
        for k in range(2):
            diffopt.step(fmodel(x + k).sin().sum())
        return torch.cat([p.flatten() for p in fmodel.parameters()])

    settings = [torch.stack(v) if isinstance(v, tuple) else v for (v,) in (learned[n] for n in names)]
    # Away from zero, where torch.optim switches a setting off: it takes a momentum of zero for none.
    values = [torch.randn(1, 2), torch.randn(1), *(s.detach().clamp(min=0.05) for s in settings)]
    inputs = tuple(v.double().requires_grad_() for v in values)
    assert gradcheck(after, inputs)
    assert gradgradcheck(after, inputs)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (optim.Adam, {}),
        (optim.Adam, {"amsgrad": True}),
        (optim.AdamW, {}),
        (optim.RMSprop, {"momentum": 0.5}),
        (optim.RMSprop, {"centered": True}),
        (optim.Adagrad, {}),
        (optim.Adadelta, {}),
        (optim.Adamax, {}),
        (optim.ASGD, {}),
        (optim.Rprop, {}),
    ],
)
def test_no_nan_where_gradients_are_zero(kind: Any, options: dict[str, Any]) -> None:
    """The weights of an input that is always zero get finite gradients; the others get those without that input."""
    torch.manual_seed(2)
    x = torch.randn(4, 3, dtype=torch.float64)
    x[:, 1] = 0
    model, few, kept = nn.Linear(3, 2).double(), nn.Linear(2, 2).double(), [0, 2]
    few.load_state_dict({"weight": model.weight[:, kept], "bias": model.bias})
    found = []
    for one, inputs in ((model, x), (few, x[:, kept])):
        with higher.innerloop_ctx(one, kind(one.parameters(), lr=0.1, **options)) as (fmodel, diffopt):
            for _ in range(2):
                diffopt.step(fmodel(inputs).sin().sum())
            meta = fmodel(inputs).square().sum()
        found.append(torch.autograd.grad(meta, fmodel.init_fast_params))
    assert found[0][0].isfinite().all()
    same([found[0][0][:, kept], found[0][1]], found[1])


def spelled_out(name: str, p: Tensor, state: dict[str, Any], g: Tensor) -> Tensor:
    """Return `p` after a step of an optimizer of `OPTIMIZERS`, by the operations of higher, with their rounding."""
    k = state["k"] = state.get("k", 0) + 1
    if name == "sgd":
        return p - 0.1 * g
    if name == "adam":
        g = g + 0.05 * p
        m = state["m"] = state.get("m", 0) * 0.8 + (1 - 0.8) * g
        v = state["v"] = state.get("v", 0) * 0.95 + (1 - 0.95) * g * g
        return p - 0.1 / (1 - 0.8**k) * (m / (v.sqrt() / (1 - 0.95**k) ** 0.5 + 1e-8))
    if name == "adagrad":
        g = g + 0.05 * p
        s = state["s"] = state.get("s", torch.full_like(p, 0.2)) + g * g
        return p - torch.tensor(0.1) / (1 + (k - 1) * torch.tensor(0.3)) * (g / (s.sqrt() + 1e-10))
    g = g + 0.05 * p
    v = state["v"] = state.get("v", 0) * 0.8 + (1 - 0.8) * g * g
    if name == "rmsprop":
        b = state["b"] = state.get("b", 0) * 0.6 + g / (v.sqrt() + 1e-8)
        return p - 0.1 * b
    u = state.get("u", torch.zeros_like(p))
    d = (u + 1e-3).sqrt() / (v + 1e-3).sqrt() * g
    state["u"] = u * 0.8 + (1 - 0.8) * d * d
    return p - 0.4 * d


@pytest.mark.parametrize("name", ["sgd", "adam", "adagrad", "rmsprop", "adadelta"])
def test_steps_are_bit_identical_to_those_of_higher(name: str) -> None:
    for seed in range(10):
        torch.manual_seed(seed)
        model, x = nn.Sequential(nn.Linear(20, 40), nn.Tanh(), nn.Linear(40, 20)), torch.randn(3, 8, 20)
        states: list[dict[str, Any]] = [{} for _ in model.parameters()]
        with higher.innerloop_ctx(model, OPTIMIZERS[name](model.parameters())) as (fmodel, diffopt):
            for k in range(3):
                loss, phi = fmodel(x[k]).square().sum(), list(fmodel.parameters())
                grads = torch.autograd.grad(loss, phi, create_graph=True)
                diffopt.step(loss)
                expected = [spelled_out(name, *each) for each in zip(phi, states, grads, strict=True)]
                assert all(map(torch.equal, fmodel.parameters(), expected))


def test_rprop_has_a_derivative_with_respect_to_its_step_size_alone() -> None:
    model, x = made()
    lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    opt = optim.Rprop(model.parameters(), lr=1.0)
    fmodel = higher.monkeypatch(model)
    diffopt = higher.get_diff_optim(opt, model.parameters(), fmodel, override={"lr": [lr]})
    diffopt.step(fmodel(x).sum())
    moved = fmodel.last.bias - next(p for n, p in model.named_parameters() if n == "last.bias")
    torch.testing.assert_close(torch.autograd.grad(moved.sum(), lr)[0], moved.sum().detach() / 0.1)


def test_helpers_and_buffers() -> None:
    model, x = made()
    nested = {"a": [1, (2, 3)], "b": {4}}
    assert higher.utils.flatten(nested) == [1, 2, 3, 4]
    assert higher.utils._recursive_map(nested, float) == {"a": [1.0, (2.0, 3.0)], "b": {4.0}}
    for safe in (True, False):
        params = higher.utils.get_func_params(model, safe_copy=safe)
        for p, q in zip(params, model.parameters(), strict=True):
            assert torch.equal(p, q)
            assert (p.requires_grad, p.is_leaf, p.data_ptr() != q.data_ptr()) == (q.requires_grad, True, safe)
    fmodel = higher.monkeypatch(model)
    assert isinstance(fmodel, higher.patch._MonkeyPatchBase)
    model(x)
    assert (fmodel.calls, model.calls) == (0, 1)
    higher.patch.buffer_sync(model, fmodel)
    model(x)
    assert (fmodel.calls, model.calls) == (1, 2)
    with pytest.raises(KeyError, match="buffer_sync: fmodule must have the module's submodules, got none at 'first'"):
        higher.patch.buffer_sync(model, nn.Linear(1, 1))


def test_learned_settings_return_to_the_optimizer_with_the_type_that_they_had() -> None:
    opt = optim.SGD([torch.zeros(1)], lr=torch.tensor(0.5), momentum=0, weight_decay=0)
    higher.apply_trainable_opt_params(
        opt, {"lr": [torch.tensor(0.25)], "momentum": [torch.tensor(0.0)], "weight_decay": [torch.tensor(0.5)]}
    )
    group = opt.param_groups[0]
    assert isinstance(group["lr"], Tensor)
    assert (float(group["lr"]), group["momentum"], group["weight_decay"]) == (0.25, 0, 0.5)
    assert type(group["momentum"]) is int


def test_gradients_reach_the_model_only_without_copies_and_with_tracking() -> None:
    model, x = made()
    opt = optim.SGD(model.parameters(), lr=0.1)

    def unroll(**options: Any) -> tuple[Any, Tensor]:
        with higher.innerloop_ctx(model, opt, **options) as (fmodel, diffopt):
            for _ in range(2):
                diffopt.step(fmodel(x).square().sum())
            return fmodel, fmodel(x).square().sum()

    fmodel, value = unroll(copy_initial_weights=False)
    initial = [p for p in fmodel.parameters(time=0) if p.requires_grad]
    truth = torch.autograd.grad(value, initial, retain_graph=True, allow_unused=True)
    value.backward()
    learned = [p for p in model.parameters() if p.requires_grad]
    assert [g is None for g in truth] == [p.grad is None for p in learned] == [True] + [False] * 6
    same((p.grad for p in learned if p.grad is not None), (g for g in truth if g is not None))
    model.zero_grad()
    fmodel, value = unroll(copy_initial_weights=True)
    value.backward()
    assert all(p.grad is None for p in model.parameters())
    assert len(fmodel._fast_params) == 3
    fmodel, value = unroll(copy_initial_weights=False, track_higher_grads=False)
    value.backward()
    assert all(p.grad is None for p in model.parameters())
    assert len(fmodel._fast_params) == 1
    assert all(p.is_leaf for p in fmodel.parameters())


def test_learned_rates_by_group_and_by_step() -> None:
    model, x = made()
    rates = [torch.tensor(r, dtype=torch.float64, requires_grad=True) for r in (0.1, 0.2, 0.3)]

    def after(values: list[Any]) -> Tensor:
        opt = optim.SGD(groups(model), lr=1.0)
        with higher.innerloop_ctx(model, opt, override={"lr": values[:2]}) as (fmodel, diffopt):
            diffopt.step(fmodel(x).square().mean())
            diffopt.step(fmodel(x).square().mean(), override={"lr": values[2:]})
            diffopt.step(fmodel(x).square().mean())
            return fmodel(x).square().mean()

    grads = torch.autograd.grad(after(rates), rates)
    for i, g in enumerate(grads):
        shifted = [[float(r.detach()) + (e if i == j else 0) for j, r in enumerate(rates)] for e in (1e-6, -1e-6)]
        up, down = (after(values) for values in shifted)
        torch.testing.assert_close(g, ((up - down) / 2e-6).detach(), rtol=1e-6, atol=1e-8)
    assert len({float(g) for g in grads}) == 3


def test_settings_of_zero_are_learned_too() -> None:
    model, x = made()
    zeros = [torch.zeros((), dtype=torch.float64, requires_grad=True) for _ in range(2)]
    opt, override = optim.SGD(model.parameters(), lr=0.1), {"momentum": zeros[:1], "weight_decay": zeros[1:]}
    with higher.innerloop_ctx(model, opt, override=override) as (fmodel, diffopt):
        for _ in range(2):
            diffopt.step(fmodel(x).square().mean())
        value = fmodel(x).square().mean()
    assert all(g.abs() > 1e-6 for g in torch.autograd.grad(value, zeros))


def test_callbacks_change_the_gradients() -> None:
    model, x = made()
    opt = optim.SGD(model.parameters(), lr=0.1)

    def clipped(grads: Any) -> list[Tensor | None]:
        return [None if g is None else g.clamp(-0.01, 0.01) for g in grads]

    def after(at_step: Any = None, **options: Any) -> list[Tensor]:
        fmodel = higher.monkeypatch(model)
        diffopt = higher.get_diff_optim(opt, model.parameters(), fmodel, **options)
        return diffopt.step(fmodel(x).square().sum(), grad_callback=at_step)

    same(after(grad_callback=clipped), after(clipped, grad_callback=lambda grads: grads))
    assert not torch.allclose(after()[1], after(clipped)[1])


def test_functional_modules() -> None:
    model, x = made()
    fmodel = higher.monkeypatch(model)
    assert isinstance(fmodel, Shared)
    torch.testing.assert_close(fmodel(x), model(x), rtol=0, atol=0)
    assert fmodel.calls == 1 == model.calls
    assert torch.equal(fmodel.last(x), model.last(x))  # a submodule called on its own
    params = [torch.randn_like(p) for p in model.parameters()]
    with torch.no_grad():
        for p, value in zip(model.parameters(), params, strict=True):
            p.copy_(value)
        torch.testing.assert_close(fmodel(x, params=params), model(x))
    assert all(a is b for a, b in zip(fmodel.fast_params, params, strict=True))
    assert torch.equal(fmodel.last(x), model.last(x))
    assert fmodel.first.weight is fmodel.last.weight is params[1]
    fmodel.fast_params = fmodel.init_fast_params
    assert fmodel.unused is next(fmodel.parameters(time=0))
    assert [n for n, _ in fmodel.named_parameters()] == [n for n, _ in model.named_parameters()]
    stateless = higher.make_functional(model)
    with pytest.raises(ValueError, match="params must be given to a functional module without parameters, got None"):
        stateless(x)
    torch.testing.assert_close(stateless(x, params=params), model(x))


def test_patched_models_have_the_same_meta_gradient() -> None:
    model, x = made()
    found = []
    for prepare in (lambda model: None, mk.patch):
        prepare(model)
        opt = optim.Adam(model.parameters(), lr=0.1)
        with higher.innerloop_ctx(model, opt) as (fmodel, diffopt):
            diffopt.step(fmodel(x).square().sum())
            wanted = [p for p in fmodel.init_fast_params if p.requires_grad]
            found.append(torch.autograd.grad(fmodel(x).square().sum(), wanted, allow_unused=True)[:-1])
    same(*found)


def test_optimizers_without_a_functional_model_or_from_a_class() -> None:
    model, x = made()
    fmodel = higher.monkeypatch(model)
    loss, theta = fmodel(x).square().sum(), list(fmodel.parameters())
    opt = optim.Adam(model.parameters(), lr=0.1)
    truth = higher.get_diff_optim(opt, model.parameters()).step(loss, params=theta)
    loss = fmodel(x).square().sum()
    anew = higher.create_diff_optim(optim.Adam, {"lr": 0.1}, fmodel=fmodel)
    by_groups = higher.create_diff_optim(optim.Adam, {"lr": 9.0}, params=[{"params": theta, "lr": 0.1}])
    same(by_groups.step(fmodel(x).square().sum(), params=theta), truth)
    same(anew.step(loss), truth)
    same(fmodel.parameters(), truth)
    with pytest.raises(
        ValueError, match=r"diffopt.step: params must be given if no functional model has parameters, got None"
    ):
        by_groups.step(loss)
    with pytest.raises(ValueError, match="create_diff_optim: params or fmodel must be given, got neither"):
        higher.create_diff_optim(optim.Adam)


def test_other_optimizers_can_be_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    class Sign(optim.SGD):
        pass

    class DifferentiableSign(higher.DifferentiableOptimizer):
        def _update(self, grouped_grads: Any, **kwargs: Any) -> None:
            for i, (group, grads) in enumerate(zip(self.param_groups, grouped_grads, strict=True)):
                for j, (p, g) in enumerate(zip(group["params"], grads, strict=True)):
                    if g is not None:
                        self.state[i][j]["count"] = self.state[i][j].get("count", 0) + 1
                        group["params"][j] = p - group["lr"] * g.sign()

    model = nn.Linear(2, 1)
    opt = Sign(model.parameters(), lr=0.5)
    fmodel = higher.monkeypatch(model)
    with pytest.raises(ValueError, match=r"opt must be one of SGD, Adam, .*, got Sign: add it by register_optim"):
        higher.get_diff_optim(opt, model.parameters(), fmodel)
    monkeypatch.setattr(higher.optim, "_opt_mapping", dict(higher.optim._opt_mapping))
    higher.register_optim(Sign, DifferentiableSign)
    diffopt = higher.get_diff_optim(opt, model.parameters(), fmodel)
    _, bias = diffopt.step(fmodel(torch.ones(3, 2)).sum())
    assert torch.equal(bias, model.bias - 0.5)
    assert diffopt.state[0][1] == {"count": 1}


def test_learned_settings_are_applied_to_the_optimizer_by_group() -> None:
    model, _ = made()
    opt, other = (optim.Adam(groups(model), lr=lr, betas=(0.5, 0.6)) for lr in (0.25, 0.5))
    override = higher.get_trainable_opt_params(opt)
    assert {"lr", "betas", "eps", "weight_decay"} <= set(override)
    assert all(t.requires_grad for value in override["betas"] for t in value)
    higher.apply_trainable_opt_params(other, override)
    assert [g["lr"] for g in other.param_groups] == pytest.approx([0.3, 0.25])
    assert other.param_groups[1]["betas"] == pytest.approx((0.5, 0.6))
    assert other.param_groups[0]["amsgrad"] is False
    higher.apply_trainable_opt_params(other, {"lr": [torch.tensor(0.125)]})
    assert [g["lr"] for g in other.param_groups] == [0.125, 0.125]
    with pytest.raises(ValueError, match="override: lr must hold one value or one for each of the 2"):
        higher.apply_trainable_opt_params(other, {"lr": [1.0] * 3})
    with pytest.raises(ValueError, match="override: lr must be a list of values, got Tensor"):
        higher.apply_trainable_opt_params(other, {"lr": torch.tensor(0.1)})
    with pytest.raises(KeyError, match="override: rate is no setting of Adam"):
        higher.apply_trainable_opt_params(other, {"rate": [0.1]})


def test_an_inner_loop_and_its_graph_are_freed_without_the_garbage_collector() -> None:
    model, x = made()
    opt = optim.Adam(model.parameters(), lr=0.1)
    gc.disable()
    try:
        with higher.innerloop_ctx(model, opt, copy_initial_weights=False) as (fmodel, diffopt):
            diffopt.step(fmodel(x).square().sum())
        alive = weakref.ref(fmodel), weakref.ref(fmodel.fast_params[0])
        del fmodel, diffopt
        assert [ref() for ref in alive] == [None, None]
    finally:
        gc.enable()


def test_bfloat16_models_and_inner_loops_without_steps() -> None:
    model = nn.Linear(2, 1).bfloat16()
    with higher.innerloop_ctx(model, optim.Adam(model.parameters())) as (fmodel, diffopt):
        same(fmodel.parameters(), model.parameters())
        diffopt.step(fmodel(torch.ones(3, 2).bfloat16()).sum())
    assert all(p.dtype is torch.bfloat16 and p.isfinite().all() for p in fmodel.parameters())


def test_errors() -> None:
    model, x = made()
    opt = optim.SGD(groups(model), lr=0.1)
    with pytest.raises(
        ValueError, match=r"parameters must be among the model's, got one of shape \[3\] in its group 0"
    ):
        higher.get_diff_optim(opt, [p for p in model.parameters() if p.shape != (3,)])
    for override, error, message in (
        ({"lr": torch.tensor(0.1)}, TypeError, "lr must be a list of one value or of one .*, got Tensor"),
        ({"lr": [0.1] * 3}, ValueError, "lr must hold one value or one for each of the 2 .*, got 3"),
        ({"rate": [0.1]}, ValueError, r"keys must be settings of the optimizer \(.*lr.*\), got 'rate'"),
    ):
        with pytest.raises(error, match=message):
            higher.get_diff_optim(opt, model.parameters(), override=override)
    with higher.innerloop_ctx(model, opt) as (fmodel, diffopt):
        before = fmodel(x).square().sum()
        diffopt.step(before)
        for loss in (before, model(x).square().sum()):
            with pytest.raises(ValueError, match=r"diffopt.step: loss must depend on the current parameters"):
                diffopt.step(loss)
        loss = fmodel(x).square().sum()
        loss.backward(retain_graph=False)
        with pytest.raises(RuntimeError, match=r"diffopt.step: loss must have its graph"):
            diffopt.step(loss)
        for params in ([], [torch.zeros(1)] * 2):
            with pytest.raises(ValueError, match=f"params must have an entry for each of the 8 .*, got {len(params)}"):
                fmodel(x, params=params)
        with pytest.raises(ValueError, match="time must be at most 1, the number of updates so far, got 2"):
            fmodel.parameters(time=2)
        with pytest.raises(ValueError, match="monkeypatch: module must not be functional, got a functional one"):
            higher.monkeypatch(fmodel)
    with higher.innerloop_ctx(model, opt, track_higher_grads=False) as (fmodel, diffopt):
        loss = diffopt.step(fmodel(x).square().sum()) and fmodel(x).square().sum()
        with pytest.raises(ValueError, match="time must be -1 or 0 with track_higher_grads=False, got 1"):
            fmodel.parameters(time=1)
        with pytest.raises(
            ValueError, match="track_higher_grads must be True to read the initial parameters, got False"
        ):
            _ = fmodel.init_fast_params
        with pytest.raises(ValueError, match="track_higher_grads must be True or False, got 1"):
            fmodel.track_higher_grads = 1
        assert fmodel.to("cpu").to(x.dtype) is fmodel
        for move in (lambda: fmodel.to("meta"), fmodel.half):
            with pytest.raises(RuntimeError, match="fmodel: the module must stay on its device and in its dtype"):
                move()
        model.to("meta")
        with pytest.raises(RuntimeError, match=r"diffopt.step: the model must stay on the device .*, got it on meta"):
            diffopt.step(loss)
    with pytest.raises(TypeError, match=r"module must be an nn.Module, got str"):
        higher.monkeypatch("model")
    replaced = nn.Linear(2, 2)
    replaced.forward = torch.relu
    with pytest.raises(ValueError, match="the forward of Linear must be a method, got another function"):
        higher.monkeypatch(replaced)
