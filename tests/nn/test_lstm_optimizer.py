"""The LSTM as an inner optimizer: meta-gradients equal plain autograd through torch.nn's LSTM cell, task by task."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from models import calls_of
from torch import Tensor, nn
from torch.func import functional_call

import metakern as mk

T, B, K, P = 3, 4, 3, 3.0


def model() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 2)).double()


def batch(seed: int) -> tuple[Tensor, Tensor]:
    make = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=make, dtype=torch.float64)  # noqa: E731
    return draw(T, B, 5), draw(T, B, 2)


def loss(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


def optimizer(**options: Any) -> mk.optim.LSTMOptimizer:
    """Return an optimizer whose weights are so large that each of them matters."""
    torch.manual_seed(4)
    inner = mk.optim.LSTMOptimizer(0.1, 0.9, hidden=3, p=P, **options).double()
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for w in inner.parameters():
            w.add_(0.5 * torch.randn(w.shape, generator=draw, dtype=torch.float64))
    return inner


def read(z: Tensor) -> Tensor:
    """Andrychowicz et al. 2016, appendix A: [n] -> [n, 2]."""
    rows = [
        torch.stack([zi.abs().log() / P, zi.sign()])
        if zi.abs() >= torch.e**-P
        else torch.stack([-zi / zi, torch.e**P * zi])
        for zi in z
    ]
    return torch.stack(rows)


def step(inner: mk.optim.LSTMOptimizer, phi: Tensor, g: Tensor, value: Tensor, state: tuple) -> tuple[Tensor, tuple]:
    """Ravi, Larochelle 2017, section 3.2, on top of torch.nn's LSTM cell: phi, g [n], value [], state (h, c, i, f)."""
    h, c, i, f = state
    x = torch.cat([read(g), read(value[None]).expand(len(g), 2)], 1)
    h, c = torch.lstm_cell(x, (h, c), inner.w_ih, inner.w_hh, inner.b, torch.zeros_like(inner.b))
    i = (torch.cat([h, phi[:, None], i[:, None]], 1) @ inner.w_gates[0] + inner.b_gates[0]).sigmoid()
    f = (torch.cat([h, phi[:, None], f[:, None]], 1) @ inner.w_gates[1] + inner.b_gates[1]).sigmoid()
    return f * phi - i * g, (h, c, i, f)


def plain(
    net: nn.Module,
    inner: mk.optim.LSTMOptimizer,
    constant: bool = False,
    adapted: Callable[[str], bool] = lambda name: True,
) -> Tensor:
    """Return the mean query loss over the tasks; with `constant`, gradients and losses of inner steps are constants."""
    total, (sx, sy), (qx, qy) = 0.0, batch(1), batch(2)
    theta = {name: p for name, p in net.named_parameters() if adapted(name)}
    for t in range(T):
        phi = torch.cat([p.flatten() for p in theta.values()])
        n = len(phi)

        def value(phi: Tensor, x: Tensor, y: Tensor) -> Tensor:
            parts = phi.split([p.numel() for p in theta.values()])
            named = {name: part.view_as(p) for (name, p), part in zip(theta.items(), parts, strict=True)}
            return (functional_call(net, named, (x,)) - y).square().mean()

        state: tuple = (inner.h.expand(n, -1), inner.c.expand(n, -1), *(g.expand(n) for g in inner.gates))
        for _ in range(K):
            support = value(phi, sx[t], sy[t])
            (g,) = torch.autograd.grad(support, phi, create_graph=True)
            phi, state = step(inner, phi, *((g.detach(), support.detach()) if constant else (g, support)), state)
        total = total + value(phi, qx[t], qy[t]) / T
    return total


def found(maml: mk.MAML) -> list[Tensor]:
    maml.zero_grad()
    maml(batch(1), batch(2)).backward()
    return [p.grad.clone() for p in maml.parameters()]


def assert_equal(found: list[Tensor], truth: Any) -> None:
    for ours, right in zip(found, truth, strict=True):
        assert right.norm() > 1e-8
        assert (ours - right).norm() <= 1e-9 * right.norm()


@pytest.mark.parametrize("hvp", ["forward", "reverse"])
@pytest.mark.parametrize("batching", ["fold", "vmap", "loop"])
@pytest.mark.parametrize("strategy", ["store", "recompute"])
def test_meta_gradient_equals_plain_autograd(
    strategy: str, batching: str, hvp: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, inner = model(), optimizer()
    maml = mk.MAML(net, loss, inner, steps=K, strategy=strategy, batching=batching, task_chunk=2)
    truth = torch.autograd.grad(plain(net, inner), list(maml.parameters()))
    found(maml)  # makes the plan, whose trial takes products too
    calls, product = list[str](), getattr(mk.meta.unroll.Unroll, f"_{hvp}_over_reverse")

    def counted(*args: Any) -> Any:
        calls.append(hvp)
        return product(*args)

    monkeypatch.setattr(mk.meta.unroll.Unroll, "_forward_over_reverse", counted)
    assert_equal(found(maml), truth)
    assert bool(calls) == (strategy == "recompute")


@pytest.mark.parametrize("strategy", ["store", "recompute"])
def test_constant_gradients(strategy: str) -> None:
    """`detach_gradients` and `first_order` are one assumption; the exact meta-gradient is another."""
    net = model()
    truth = torch.autograd.grad(plain(net, optimizer(), constant=True), list(net.parameters()))
    exact = torch.autograd.grad(plain(net, optimizer()), list(net.parameters()))
    for options, first_order in (({"detach_gradients": True}, False), ({}, True)):
        maml = mk.MAML(net, loss, optimizer(**options), steps=K, strategy=strategy, first_order=first_order)
        ours = found(maml)[: len(truth)]
        assert_equal(ours, truth)
        assert all((a - b).norm() > 1e-3 * b.norm() for a, b in zip(ours, exact, strict=True))


@pytest.mark.parametrize("strategy", ["store", "recompute"])
def test_parameters_that_are_not_adapted_reach_the_meta_gradient_through_the_losses(strategy: str) -> None:
    net, inner = model(), optimizer()
    head = lambda name: name.startswith("2.")  # noqa: E731
    maml = mk.MAML(net, loss, inner, steps=K, strategy=strategy, adapt=head)
    truth = torch.autograd.grad(plain(net, inner, adapted=head), list(maml.parameters()))
    assert_equal(found(maml), truth)


def test_few_snapshots_give_the_same_meta_gradient() -> None:
    net, inner = model(), optimizer()
    truth = torch.autograd.grad(plain(net, inner), [*net.parameters(), *inner.parameters()])
    assert_equal(found(mk.MAML(net, loss, inner, steps=K, memory="least")), truth)


@pytest.mark.parametrize("wrapper", ["clipped", "muon"])
@pytest.mark.parametrize("strategy", ["store", "recompute"])
def test_wrappers_pass_the_losses_on(wrapper: str, strategy: str) -> None:
    net, inner = model(), optimizer()
    outer = mk.optim.Clipped(inner, 1e9) if wrapper == "clipped" else mk.optim.Muon(0.1, others=inner)
    values = [found(mk.MAML(net, loss, outer, steps=K, strategy=s)) for s in (strategy, "store")]
    torch.testing.assert_close(*values, rtol=1e-9, atol=1e-12)
    if wrapper == "clipped":
        truth = torch.autograd.grad(plain(net, inner), [*net.parameters(), *inner.parameters()])
        assert_equal(values[0], truth)


@pytest.mark.parametrize("strategy", ["store", "recompute"])
def test_captured_meta_gradients_equal_those_of_ordinary_runs(strategy: str) -> None:
    net, inner = model(), optimizer()
    ordinary, captured = (mk.MAML(net, loss, inner, K, strategy=strategy, capture=c) for c in (False, True))
    calls = calls_of(captured)
    for _ in range(3):
        calls.clear()
        torch.testing.assert_close(found(captured), found(ordinary), rtol=1e-9, atol=1e-12)
        with torch.no_grad():
            for w in inner.parameters():
                w.mul_(1.1)
    assert not calls  # the last run was that of the program


@pytest.mark.parametrize("strategy", ["store", "recompute"])
def test_no_nan_where_gradients_and_losses_are_zero(strategy: str) -> None:
    net = model()
    x, y = batch(1)
    x[..., 0] = 0
    y[0] = net(x[0]).detach()
    maml = mk.MAML(net, loss, mk.optim.LSTMOptimizer(), steps=2, strategy=strategy)
    maml((x, y), batch(2)).backward()
    assert all(p.grad.isfinite().all() for p in maml.parameters())


def test_its_first_weights_are_small_and_its_first_gates_the_given_ones() -> None:
    inner = mk.optim.LSTMOptimizer()
    assert inner.p == 10.0
    for gates in (inner.gates, inner.b_gates.sigmoid()):
        assert gates.tolist() == pytest.approx([0.01, 0.995])
    assert not any(state.any() for state in (inner.h, inner.c))
    for w in (inner.w_ih, inner.w_hh, inner.b, inner.w_gates):
        assert -0.01 <= w.min() < -0.008 < 0.008 < w.max() <= 0.01


def test_it_starts_near_gradient_descent() -> None:
    net = model()
    ours = mk.MAML(net, loss, mk.optim.LSTMOptimizer(lr=0.1, decay=0.9999), steps=K).adapt(batch(1))
    descent = mk.MAML(net, loss, mk.optim.SGD(lr=0.1), steps=K).adapt(batch(1))
    for name, p in net.named_parameters():
        assert (ours[name] - descent[name]).norm() < 0.2 * (descent[name] - p).norm()


def test_parameters_of_two_dtypes_and_of_no_dimension() -> None:
    """Each dtype has a state of its own, and each task is updated as if it were alone."""
    inner, draw = mk.optim.LSTMOptimizer(hidden=2), torch.Generator().manual_seed(4)
    phi, grads = ([torch.randn(T, *s, generator=draw) for s in ((2, 3), (), (4,))] for _ in range(2))
    phi[2], grads[2] = phi[2].double(), grads[2].double()

    def twice(phi: list[Tensor], grads: list[Tensor], losses: Tensor) -> list[Tensor]:
        state = inner.init(phi)
        assert [s.dtype for s in state] == [torch.float32] * 3 + [torch.float64] * 3
        for _ in range(2):
            phi, state = inner.update(phi, grads, state, losses)
        assert [p.shape for p in phi] == [g.shape for g in grads]
        return [*phi, *state]

    losses = torch.rand(T, generator=draw)
    together = twice(phi, grads, losses)
    for t in range(T):
        alone = twice(*([x[t : t + 1] for x in values] for values in (phi, grads)), losses[t : t + 1])
        torch.testing.assert_close(alone, [x[t : t + 1] for x in together])
    assert inner.update([], [], inner.init([]), losses)[0] == []


def test_weights_are_saved_and_copied() -> None:
    saved, loaded = (mk.MAML(model(), loss, inner) for inner in (optimizer(), mk.optim.LSTMOptimizer(hidden=3)))
    loaded.load_state_dict(saved.state_dict())
    copied = copy.deepcopy(saved)
    for maml in (loaded, copied):
        for a, b in zip(maml.inner.parameters(), saved.inner.parameters(), strict=True):
            torch.testing.assert_close(a, b.to(a))


def test_wrong_arguments() -> None:
    make = mk.optim.LSTMOptimizer
    for options, error, message in (
        ({"lr": 1.0}, ValueError, r"lr must be in \(0, 1\), got 1.0"),
        ({"decay": 0.0}, ValueError, r"decay must be in \(0, 1\), got 0.0"),
        ({"lr": torch.tensor(0.1)}, TypeError, "lr must be a number, got a tensor"),
        ({"hidden": 0}, ValueError, "hidden must be positive, got 0"),
        ({"hidden": 2.5}, TypeError, "hidden must be an integer, got 2.5"),
        ({"hidden": True}, TypeError, "hidden must be an integer, got True"),
        ({"p": -1}, ValueError, "p must be positive, got -1"),
        ({"detach_gradients": 1}, TypeError, "detach_gradients must be True or False, got 1"),
        ({"hiden": 3}, TypeError, "hiden is not one of its arguments: did you mean hidden"),
    ):
        with pytest.raises(error, match=f"LSTMOptimizer: {message}"):
            make(**options)
    with pytest.raises(TypeError, match="update must get the losses"):
        make().update([torch.ones(1, 1)], [torch.ones(1, 1)], make().init([torch.ones(1, 1)]))


@pytest.mark.parametrize("first_order", [False, True])
def test_metalstm_is_maml_with_this_optimizer(first_order: bool) -> None:
    net = model()
    metalstm = mk.MetaLSTM(net, loss, lr=0.1, hidden=3, steps=K, first_order=first_order)
    metalstm.inner.load_state_dict(optimizer().state_dict())
    metalstm.inner.double().p = P
    truth = torch.autograd.grad(plain(net, metalstm.inner, constant=first_order), list(metalstm.parameters()))
    assert_equal(found(metalstm), truth)
    for options, lr in (({}, 0.01), ({"lr": 0.1}, 0.1)):
        assert mk.MetaLSTM(net, loss, **options).inner.b_gates[0].sigmoid().item() == pytest.approx(lr)
