"""Inner optimizers: their steps equal those of torch.optim, and meta-gradients through them equal plain autograd."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import calls_of
from torch import Tensor, nn
from torch.func import functional_call

import metakern as mk
from metakern.dialogue import checkpoint
from metakern.errors import CheckpointError
from metakern.optim.base import ByName

T, B, K = 3, 4, 4

INNER: dict[str, tuple[Callable[..., mk.optim.InnerOptimizer], Callable[..., torch.optim.Optimizer]]] = {
    "sgd": (lambda **o: mk.optim.SGD(0.2, **o), lambda p: torch.optim.SGD(p, 0.2)),
    "momentum": (
        lambda **o: mk.optim.SGD(0.1, momentum=0.7, weight_decay=0.03, **o),
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.7, weight_decay=0.03),
    ),
    "nesterov": (
        lambda **o: mk.optim.SGD(0.1, momentum=0.7, nesterov=True, **o),
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.7, nesterov=True),
    ),
    "rmsprop": (
        lambda **o: mk.optim.RMSprop(0.05, alpha=0.7, eps=0.01, weight_decay=0.03, **o),
        lambda p: torch.optim.RMSprop(p, 0.05, alpha=0.7, eps=0.01, weight_decay=0.03),
    ),
    "rmsprop-centered": (
        lambda **o: mk.optim.RMSprop(0.05, alpha=0.7, eps=0.01, momentum=0.6, centered=True, **o),
        lambda p: torch.optim.RMSprop(p, 0.05, alpha=0.7, eps=0.01, momentum=0.6, centered=True),
    ),
    "adagrad": (
        lambda **o: mk.optim.Adagrad(0.1, 0.2, weight_decay=0.03, initial_accumulator_value=0.1, **o),
        lambda p: torch.optim.Adagrad(p, 0.1, 0.2, weight_decay=0.03, initial_accumulator_value=0.1),
    ),
    "adam": (
        lambda **o: mk.optim.Adam(0.05, betas=(0.7, 0.9), weight_decay=0.03, **o),
        lambda p: torch.optim.Adam(p, 0.05, betas=(0.7, 0.9), weight_decay=0.03),
    ),
    "adamw": (
        lambda **o: mk.optim.AdamW(0.05, betas=(0.7, 0.9), weight_decay=0.03, **o),
        lambda p: torch.optim.AdamW(p, 0.05, betas=(0.7, 0.9), weight_decay=0.03),
    ),
}


def normalized(g: list[Tensor]) -> list[Tensor]:
    return [gi / (torch.cat([gj.flatten() for gj in g]).norm() + 0.1) for gi in g]


def normalized_each(g: list[Tensor]) -> list[Tensor]:
    return [gi / (gi.norm() + 0.1) for gi in g]


def clipped(g: list[Tensor]) -> list[Tensor]:
    return [gi * (0.6 / (torch.cat([gj.flatten() for gj in g]).norm() + 1e-6)).clamp(max=1) for gi in g]


def orthogonalized(g: list[Tensor]) -> list[Tensor]:
    """Muon's direction for matrices [1, rows, columns], and half of the gradient for the others."""

    def of(x: Tensor) -> Tensor:
        a, b, c = 3.4445, -4.7750, 2.0315
        x = x / x.norm()
        for _ in range(5):
            x = a * x + b * x @ x.mT @ x + c * x @ x.mT @ x @ x.mT @ x
        return x

    return [of(gi[0])[None] * max(1, gi.shape[1] / gi.shape[2]) ** 0.5 if gi.dim() == 3 else gi / 2 for gi in g]


# Optimizers that torch.optim lacks, with the direction along which they descend.
DIRECTIONS: dict[str, tuple[mk.optim.InnerOptimizer, Callable[[list[Tensor]], list[Tensor]]]] = {
    "normalized": (mk.optim.NormalizedSGD(0.2, eps=0.1), normalized),
    "normalized-each": (mk.optim.NormalizedSGD(0.2, eps=0.1, norm="parameter"), normalized_each),
    "clipped": (mk.optim.Clipped(mk.optim.SGD(0.2), 0.6), clipped),
    "muon": (mk.optim.Muon(0.2, weight_decay=0, momentum=0, others=mk.optim.SGD(0.1)), orthogonalized),
}


def model() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 2)).double()


def batch(seed: int) -> tuple[Tensor, Tensor]:
    make = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=make, dtype=torch.float64)  # noqa: E731
    return draw(T, B, 5), draw(T, B, 2)


def loss(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


class Plain:
    """Descent along a direction, by plain operations, with the interface of an inner optimizer."""

    def __init__(self, direction: Callable[[list[Tensor]], list[Tensor]], lr: float) -> None:
        self.direction, self.lr = direction, lr

    def init(self, phi: list[Tensor]) -> tuple:
        return ()

    def update(self, phi: list[Tensor], grads: list[Tensor], state: tuple) -> tuple:
        return [p - self.lr * d for p, d in zip(phi, self.direction(list(grads)), strict=True)], state


def unrolled(net: nn.Module, inner: Any) -> Tensor:
    """Return the mean query loss after K steps of `inner.update`, task by task, by plain autograd."""
    total, (sx, sy), (qx, qy) = 0.0, batch(1), batch(2)
    names = [name for name, _ in net.named_parameters()]
    for t in range(T):
        phi = [p[None] for p in net.parameters()]
        state = inner.init(phi)

        def functional(x: Tensor, phi: list[Tensor]) -> Tensor:
            return functional_call(net, {n: p[0] for n, p in zip(names, phi, strict=True)}, (x,))

        for _ in range(K):
            value = (functional(sx[t], phi) - sy[t]).square().mean()
            grads = torch.autograd.grad(value, phi, create_graph=True)
            phi, state = inner.update(phi, grads, state)
        total = total + (functional(qx[t], phi) - qy[t]).square().mean() / T
    return total


@pytest.mark.parametrize("name", INNER)
def test_steps_equal_those_of_torch_optim(name: str) -> None:
    ours, theirs = INNER[name]
    net = model()
    phi = mk.MAML(net, loss, inner=ours(), steps=K).adapt(batch(1))
    for t in range(T):
        twin = model()
        optimizer = theirs(twin.parameters())
        for _ in range(K):
            optimizer.zero_grad()
            loss(twin, tuple(a[t] for a in batch(1))).backward()
            optimizer.step()
        for key, p in twin.named_parameters():
            torch.testing.assert_close(phi[key][t], p.detach(), rtol=1e-11, atol=1e-12)


def learned(name: str, per: str, steps: int | None = None) -> mk.optim.InnerOptimizer:
    """Return an optimizer of `INNER` that learns all of the hyper-parameters that it uses."""
    names = [n for n in INNER[name][0]().names if not getattr(INNER[name][0](), n).absent]
    return INNER[name][0](learn=names, per=per, steps=steps)


def perturbed(inner: mk.optim.InnerOptimizer) -> None:
    """Scale each learned value at random, so that parameters, elements and steps have different ones."""
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for h in inner.parameters():
            h.mul_(1 - 0.2 * torch.rand(h.shape, dtype=torch.float64, generator=draw).to(h))


@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_steps_of_muon_equal_those_of_torch_optim(nesterov: bool, adjust: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the rounding to bfloat16 in torch.optim."""
    converted = Tensor.to
    monkeypatch.setattr(Tensor, "bfloat16", Tensor.clone)
    monkeypatch.setattr(
        Tensor, "to", lambda x, *a, **k: x.clone() if k.get("dtype") is torch.bfloat16 else converted(x, *a, **k)
    )
    options = {"lr": 0.05, "momentum": 0.7, "nesterov": nesterov, "adjust_lr_fn": adjust}
    phi = mk.MAML(model(), loss, inner=mk.optim.Muon(**options), steps=K).adapt(batch(1))
    for t in range(T):
        twin = model()
        matrices, others = ([p for p in twin.parameters() if (p.dim() == 2) is kind] for kind in (True, False))
        optimizers = [torch.optim.Muon(matrices, **options), torch.optim.AdamW(others, 0.05, weight_decay=0.1)]
        for _ in range(K):
            twin.zero_grad()
            loss(twin, tuple(a[t] for a in batch(1))).backward()
            for optimizer in optimizers:
                optimizer.step()
        for key, p in twin.named_parameters():
            torch.testing.assert_close(phi[key][t], p.detach(), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("per", ["all", "parameter", "element"])
@pytest.mark.parametrize("strategy", ["store", "recompute"])
@pytest.mark.parametrize("name", INNER)
def test_meta_gradient_and_hyper_parameters_equal_plain_autograd(name: str, strategy: str, per: str) -> None:
    """Per element, all steps share the values; otherwise the last three of the four steps share the second ones."""
    net = model()
    inner = learned(name, per, None if per == "element" else 2)
    maml = mk.MAML(net, loss, inner=inner, steps=K, strategy=strategy).double()
    perturbed(inner)
    everything = list(maml.parameters())
    truth = torch.autograd.grad(unrolled(net, inner), everything)
    assert all(right.norm() > 1e-8 for right in truth)
    maml(batch(1), batch(2)).backward()
    for parameter, right in zip(everything, truth, strict=True):
        assert (parameter.grad - right).norm() <= 1e-9 * right.norm()


@pytest.mark.parametrize("strategy", ["store", "recompute"])
@pytest.mark.parametrize("batching", ["fold", "vmap", "loop"])
@pytest.mark.parametrize("name", DIRECTIONS)
def test_other_directions_equal_plain_autograd(name: str, batching: str, strategy: str) -> None:
    inner, direction = DIRECTIONS[name]
    net = model()
    everything = list(net.parameters())
    truth = torch.autograd.grad(unrolled(net, Plain(direction, 0.2)), everything)
    maml = mk.MAML(net, loss, inner=inner, steps=K, strategy=strategy, batching=batching, task_chunk=2)
    maml(batch(1), batch(2)).backward()
    for parameter, right in zip(everything, truth, strict=True):
        assert (parameter.grad - right).norm() <= 1e-10 * right.norm()


def test_the_rate_of_fomaml_has_the_derivative_of_one_step() -> None:
    for strategy in ("store", "recompute"):
        net = model()
        maml = mk.FOMAML(net, loss, inner=mk.optim.SGD(0.2, learn_lr=True), steps=1, strategy=strategy).double()
        maml(batch(1), batch(2)).backward()
        step = 1e-6
        with torch.no_grad():
            maml.inner.lr.value += step
            up = maml(batch(1), batch(2))
            maml.inner.lr.value -= 2 * step
            down = maml(batch(1), batch(2))
        torch.testing.assert_close(maml.inner.lr.value.grad, (up - down) / (2 * step), rtol=1e-5, atol=1e-8)


EVERY = {name: make for name, (make, _) in INNER.items()} | {
    name: lambda inner=inner: inner for name, (inner, _) in DIRECTIONS.items()
}


@pytest.mark.parametrize("strategy", ["store", "recompute"])
@pytest.mark.parametrize("name", EVERY)
def test_no_nan_where_gradients_are_zero(name: str, strategy: str) -> None:
    """An input that is always zero makes some gradients exactly zero, and a task that fits makes all of them zero."""
    net = model()
    x, y = batch(1)
    x[..., 0] = 0
    y[0] = net(x[0]).detach()
    maml = mk.MAML(net, loss, inner=EVERY[name](), steps=3, strategy=strategy)
    maml((x, y), batch(2)).backward()
    assert all(p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("strategy", ["store", "recompute"])
@pytest.mark.parametrize("name", EVERY)
def test_captured_meta_gradients_equal_those_of_ordinary_runs(name: str, strategy: str) -> None:
    inner = learned(name, "element", 2) if name in INNER else EVERY[name]()
    net = model()
    ordinary, captured = (mk.MAML(net, loss, inner, 2, strategy=strategy, capture=c).double() for c in (False, True))
    calls = calls_of(captured)
    for i in range(3):
        found = []
        for maml in (ordinary, captured):
            calls.clear()
            maml.zero_grad()
            maml(batch(i), batch(i + 9)).backward()
            found.append([p.grad.clone() for p in maml.parameters()])
        torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)
        perturbed(inner)
    assert not calls  # the last run was that of the program


@pytest.mark.skipif(mk.backends()["triton"] != "available", reason=mk.backends()["triton"])
@pytest.mark.parametrize(
    ("name", "per"),
    [
        *((name, per) for name in INNER for per in ("fixed", "parameter")),
        *((name, per) for name in ("sgd", "nesterov", "adam") for per in ("all", "element")),
        *((name, "fixed") for name in DIRECTIONS),
    ],
)
def test_every_optimizer_launches_its_triton_kernels(name: str, per: str, launched: list[str]) -> None:
    net, results = model(), []
    inner = EVERY[name]() if per == "fixed" else learned(name, per)
    for backend in ("reference", "triton"):
        with mk.backend(backend):
            maml = mk.MAML(net, loss, inner, steps=2, strategy="store", task_chunk=T).double()
            maml.zero_grad()
            maml(batch(1), batch(2)).backward()
            results.append([p.grad.clone() for p in maml.parameters()])
        assert ("_kernel" in launched) == (backend == "triton")
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", EVERY)
def test_tasks_of_a_chunk_do_not_mix(name: str) -> None:
    """Each task is updated as if it were alone; the first weight is float32, the others are float64."""
    inner, draw = EVERY[name](), torch.Generator().manual_seed(4)
    net = model()
    inner.prepare(dict(net.named_parameters()))
    dtypes = [torch.float32, *(torch.float64,) * 3]
    tensors = [
        [torch.randn(T, *p.shape, generator=draw, dtype=d) for p, d in zip(net.parameters(), dtypes, strict=True)]
        for _ in range(3)
    ]

    def twice(phi: list[Tensor], *grads: list[Tensor]) -> list[Tensor]:
        state = inner.init(phi)
        for g in grads:
            phi, state = inner.update(phi, g, state)
        return [*phi, *state]

    together = twice(*tensors)
    assert [p.dtype for p in together[:4]] == dtypes
    for t in range(T):
        alone = twice(*([x[t : t + 1] for x in values] for values in tensors))
        for a, b in zip(alone, together, strict=True):
            torch.testing.assert_close(a, b[t : t + 1] if b.dim() else b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", INNER)
def test_learned_hyper_parameters_are_saved(name: str) -> None:
    saved, loaded = (mk.MAML(model(), loss, learned(name, "parameter", 2)) for _ in range(2))
    perturbed(saved.inner)
    assert not all(map(torch.equal, saved.inner.parameters(), loaded.inner.parameters()))
    loaded.load_state_dict(saved.state_dict())
    assert all(map(torch.equal, saved.inner.parameters(), loaded.inner.parameters()))


def test_updates_of_no_parameters_are_empty() -> None:
    for make in EVERY.values():
        inner = make()
        assert inner.update([], [], inner.init([]))[0] == []


def test_steps_beyond_the_learned_ones_use_the_last_values() -> None:
    inner = mk.optim.SGD(lr=1.0, learn_lr=True, per="parameter", steps=2)
    inner.prepare({"w": nn.Parameter(torch.zeros(1))})
    with torch.no_grad():
        inner.lr.values["w"].copy_(torch.tensor([1.0, 10.0]))
    phi, state = [torch.zeros(1, 1)], inner.init([torch.zeros(1, 1)])
    moved = []
    for _ in range(3):
        phi, state = inner.update(phi, [-torch.ones(1, 1)], state)
        moved.append(phi[0].item())
    assert moved == [1.0, 11.0, 21.0]


def test_adam_is_differentiable_at_a_zero_gradient() -> None:
    """At the first step the update is lr g / (|g| + eps), whose slope at g = 0 is lr / eps."""
    inner = mk.optim.Adam(lr=0.5, eps=0.25)
    g = torch.zeros(1, 1, dtype=torch.float64, requires_grad=True)
    (moved,), _ = inner.update([torch.ones_like(g)], [g], inner.init([g]))
    torch.testing.assert_close(torch.autograd.grad(moved, g)[0].item(), -0.5 / 0.25)


RATES = {"0.weight": 0.0, "0.bias": 0.2, "2.weight": 0.5, "2.bias": 1.0}


def with_rates(net: nn.Module, inner: mk.optim.InnerOptimizer | None = None, **options: Any) -> mk.MAML:
    """Return a MAML whose learned rates are those in `RATES`."""
    inner = inner or mk.optim.SGD(lr=0.1, learn_lr=True, per=options.pop("per", "parameter"))
    maml = mk.MAML(net, loss, inner, **options)
    with torch.no_grad():
        for name, rate in RATES.items():
            inner.lr.values[name].fill_(rate)
    return maml


def by_hand(net: nn.Module, names: tuple[str, ...], rates: dict[str, float]) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss after one step with these rates, by plain autograd, and its gradients by parameters and rates."""
    theta = dict(net.named_parameters())
    learned = {name: torch.tensor(rates[name], dtype=torch.float64, requires_grad=True) for name in names}
    (sx, sy), (qx, qy) = batch(1), batch(2)
    total: Any = 0.0
    for t in range(T):
        value = (functional_call(net, theta, (sx[t],)) - sy[t]).square().mean()
        grads = torch.autograd.grad(value, [theta[name] for name in names], create_graph=True)
        phi = theta | {n: theta[n] - learned[n] * g for n, g in zip(names, grads, strict=True)}
        total = total + (functional_call(net, phi, (qx[t],)) - qy[t]).square().mean() / T
    found = torch.autograd.grad(total, [*(theta[name] for name in names), *learned.values()])
    return total.detach(), dict(zip([*names, *(f"rate of {name}" for name in names)], found, strict=True))


@pytest.mark.parametrize("capture", [False, True])
@pytest.mark.parametrize("strategy", ["store", "recompute"])
def test_rates_follow_the_names_of_parameters(strategy: str, capture: bool) -> None:
    """Layers are frozen and freed again between calls; each parameter must keep its own rate."""
    net = model()
    maml = with_rates(net, strategy=strategy, capture=capture)
    inner = maml.inner
    for frozen in ((), ("0.weight", "0.bias"), ("0.bias",), ("2.weight", "2.bias"), ()):
        for name, p in net.named_parameters():
            p.requires_grad_(name not in frozen)
        names = tuple(name for name in RATES if name not in frozen)
        value, truth = by_hand(net, names, RATES)
        for _ in range(2):
            maml.zero_grad()
            found = maml(batch(1), batch(2))
            found.backward()
            torch.testing.assert_close(found.detach(), value, rtol=1e-10, atol=0)
            for name in names:
                torch.testing.assert_close(net.get_parameter(name).grad, truth[name], rtol=1e-9, atol=1e-12)
                rate = inner.lr.values[name].grad
                torch.testing.assert_close(rate, truth[f"rate of {name}"].to(rate), rtol=1e-9, atol=1e-12)
            assert all(inner.lr.values[name].grad is None for name in frozen)


@pytest.mark.parametrize("name", ["adam", "momentum", "muon", "clipped"])
def test_every_optimizer_keeps_rates_by_name(name: str) -> None:
    """After a layer is frozen, an optimizer adapts the others as one that never had rates for that layer."""

    def make() -> mk.optim.InnerOptimizer:
        options: dict[str, Any] = {"learn": ("lr", "weight_decay"), "per": "element", "steps": 2}
        if name == "muon":
            return mk.optim.Muon(0.1, **options)
        if name == "clipped":
            return mk.optim.Clipped(mk.optim.SGD(0.1, weight_decay=0.1, **options), 0.5)
        return INNER[name][0](**options)

    def differ(maml: mk.MAML) -> None:
        with torch.no_grad():
            for key, h in maml.inner.named_parameters():
                h.fill_(0.01 + 0.1 * (sum(map(ord, key)) % 7))

    net = model()
    once_whole = mk.MAML(net, loss, make(), steps=3)
    once_whole(batch(1), batch(2))
    net[0].requires_grad_(False)
    never_whole = mk.MAML(net, loss, make(), steps=3)
    for maml in (once_whole, never_whole):
        differ(maml)
    found, right = (maml.adapt(batch(1)) for maml in (once_whole, never_whole))
    assert set(found) == {"2.weight", "2.bias"}
    for key, value in right.items():
        assert torch.equal(found[key], value)


def test_unfrozen_parameters_get_rates_of_their_own() -> None:
    net = model()
    net[0].requires_grad_(False)
    maml = mk.MetaSGD(net, loss, lr=0.3)
    with torch.no_grad():
        for value in maml.inner.parameters():
            value.fill_(2.0)
    net[0].requires_grad_(True)
    maml(batch(1), batch(2)).backward()
    rates = {name: value.detach().unique().item() for name, value in maml.inner.lr.values.items()}
    assert {name: round(rate, 6) for name, rate in rates.items()} == {
        "0.weight": 0.3,
        "0.bias": 0.3,
        "2.weight": 2.0,
        "2.bias": 2.0,
    }
    assert all(value.grad is not None for value in maml.inner.parameters())


def test_an_optimizer_can_be_shared_by_two_models_and_copied() -> None:
    """Parameters of the same name share their rate; other shapes are refused. Calls may alternate."""
    whole, half = model(), model()
    half[0].requires_grad_(False)
    inner = mk.optim.SGD(lr=0.1, learn_lr=True, per="parameter")
    first = with_rates(whole, inner)
    second = mk.MAML(half, loss, inner)
    copied = copy.deepcopy(first)
    for _ in range(2):
        for maml, net, names in ((first, whole, tuple(RATES)), (second, half, ("2.weight", "2.bias"))):
            maml.zero_grad()
            found = maml(batch(1), batch(2))
            found.backward()
            value, truth = by_hand(net, names, RATES)
            torch.testing.assert_close(found.detach(), value, rtol=1e-10, atol=0)
            torch.testing.assert_close(net[2].weight.grad, truth["2.weight"], rtol=1e-9, atol=1e-12)
    with torch.no_grad():
        inner.lr.values["2.bias"].fill_(9.0)
    assert copied.inner.lr.values["2.bias"] == 1.0
    torch.testing.assert_close(copied(batch(1), batch(2)).detach(), by_hand(whole, tuple(RATES), RATES)[0])
    wide = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 2))
    message = "SGD: lr must be learned for parameters of one model, got '0.weight' of shape"
    elements = mk.optim.MetaSGD()
    mk.MAML(whole, loss, elements)
    with pytest.raises(ValueError, match=message):
        mk.MAML(wide, loss, elements)


def test_names_with_dots_and_colons_are_kept_apart() -> None:
    values = ByName("SGD: lr")
    names = ["a.b", "a:b", "a%3Ab", "a%2Eb", "a", "keys", "values", "items", "weight.1", "a:.b", "a.:b"]
    for i, name in enumerate(names):
        values[name] = nn.Parameter(torch.tensor(float(i)))
    assert list(values) == names
    assert [value.item() for _, value in values.items()] == list(range(len(names)))
    other = ByName("SGD: lr")
    for name in reversed(names):
        other[name] = nn.Parameter(torch.zeros(()))
    other.load_state_dict(values.state_dict())
    assert all(torch.equal(other[name], values[name]) for name in names)
    with pytest.raises(KeyError, match=r"SGD: lr must be indexed by one of a.b, .*, got 'b'"):
        values["b"]


def test_lists_of_rates_are_loaded_where_they_fit() -> None:
    """State dicts and checkpoints had lists before values were kept by name."""
    net = model()
    maml = with_rates(net)
    named = maml.state_dict()
    listed = {key: value for key, value in named.items() if "lr.values" not in key}
    listed |= {f"inner.lr.values.{i}": torch.tensor(10.0 + i, dtype=torch.float64) for i in range(4)}
    fresh = mk.MAML(model(), loss, mk.optim.SGD(learn_lr=True, per="parameter"))
    fresh.load_state_dict(listed)
    assert [value.item() for _, value in fresh.inner.lr.values.items()] == [10, 11, 12, 13]
    assert "inner.lr.values.0" in listed, "the caller's state dict must not be changed"
    checkpointed = mk.MAML(model(), loss, mk.optim.SGD(learn_lr=True, per="parameter"))
    checkpoint.load_module(checkpointed, listed, Path("old"))
    assert [value.item() for _, value in checkpointed.inner.lr.values.items()] == [10, 11, 12, 13]
    del listed["inner.lr.values.3"]
    message = "SGD: lr must be loaded for the 4 parameters here, got 3 values without names"
    with pytest.raises(ValueError, match=message):
        fresh.load_state_dict(listed)
    with pytest.raises(CheckpointError, match=f"old: {message}"):
        checkpoint.load_module(checkpointed, listed, Path("old"))


def test_update_before_prepare_is_an_error() -> None:
    inner = mk.optim.SGD(lr=1.0, learn_lr=True, per="parameter")
    with pytest.raises(ValueError, match=r"SGD: lr must have values for the 1 parameters of phi, got 0: call prepare"):
        inner.update([torch.zeros(1, 1)], [torch.ones(1, 1)], ())


def test_wrong_arguments_of_optimizers() -> None:
    optimizers = [
        getattr(mk.optim, name)
        for name in mk.optim.__all__
        if name not in ("Clipped", "InnerOptimizer", "LSTMOptimizer", "MetaCurvature", "StepOffsets")
    ]
    assert len(optimizers) == 8
    for make in optimizers:
        name = make.__name__
        if make is not mk.optim.MetaSGD:
            with pytest.raises(
                TypeError, match=rf"{name}: learnlr is not one of its arguments: did you mean learn_lr\?"
            ):
                make(learnlr=True)
            for per in ("lr", 3):
                with pytest.raises(ValueError, match=f"{name}: per must be 'all', 'parameter' or 'element', got"):
                    make(learn_lr=True, per=per)
            with pytest.raises(TypeError, match=f"{name}: learn must hold names of hyper-parameters, got True"):
                make(learn=True)
            with pytest.raises(
                TypeError, match=f"{name}: learn_lr must be True or False, got 0.1: give the initial rate as lr"
            ):
                make(learn_lr=0.1)
            with pytest.raises(ValueError, match=f"{name}: steps must be None or an integer of at least 1, got True"):
                make(learn_lr=True, steps=True)
        with pytest.raises(TypeError, match=f"{name}: zzz is not one of its arguments: it has lr"):
            make(zzz=1)
        for value, error, message in (
            (float("nan"), ValueError, "finite, got nan"),
            (float("inf"), ValueError, "finite, got inf"),
            (-1.0, ValueError, "at least 0, got -1.0"),
            ("0.1", TypeError, "a number, got '0.1'"),
            (True, TypeError, "a number, got True"),
            (None, TypeError, "a number, got None"),
            (torch.tensor(0.1), TypeError, "a number, got a tensor: to learn it, give a number"),
        ):
            with pytest.raises(error, match=f"^{name}: lr must be {message}"):
                make(lr=value)
        make(lr=np.float32(0.5))
    with pytest.raises(TypeError, match="Clipped: norms is not one of its arguments: did you mean norm"):
        mk.optim.Clipped(mk.optim.SGD(), norms=1.0)
    with pytest.raises(TypeError, match="Clipped: learn_norm must be True or False, got 2"):
        mk.optim.Clipped(mk.optim.SGD(), 1.0, learn_norm=2)
    with pytest.raises(TypeError, match=r"Adam: betas must be 2 numbers, got 0.9"):
        mk.optim.Adam(betas=0.9)
    with pytest.raises(TypeError, match=r"Muon: ns_steps must be an integer, got 2.5"):
        mk.optim.Muon(ns_steps=2.5)
    with pytest.raises(TypeError, match=r"Muon: ns_coefficients must be 3 numbers, got \(1, 2\)"):
        mk.optim.Muon(ns_coefficients=(1, 2))


@pytest.mark.parametrize("name", ["MAML", "FOMAML", "ANIL", "MetaLSTM", "MetaSGD", "Reptile"])
def test_unknown_arguments_of_algorithms(name: str) -> None:
    for options in ({"step": 3}, {"first_ordr": True}, {"task_chunks": 2}):
        (wrong,) = options
        with pytest.raises(TypeError, match=wrong):
            getattr(mk, name)(model(), loss, **options)


def test_values_out_of_range_are_errors() -> None:
    for make, text in (
        (lambda: mk.optim.SGD(lr=-1), "SGD: lr must be at least 0, got -1"),
        (lambda: mk.optim.SGD(momentum=1.0), r"SGD: momentum must be in \[0, 1\), got 1.0"),
        (
            lambda: mk.optim.SGD(learn=("lr", "beta1")),
            "SGD: learn must name some of lr, weight_decay, momentum, got 'b",
        ),
        (lambda: mk.optim.SGD(learn_lr=True, steps=0), "steps must be None or an integer of at least 1, got 0"),
        (lambda: mk.optim.RMSprop(alpha=1.0), r"RMSprop: alpha must be in \[0, 1\), got 1.0"),
        (lambda: mk.optim.RMSprop(eps=0), "RMSprop: eps must be positive, got 0"),
        (lambda: mk.optim.Adagrad(lr_decay=-1), "Adagrad: lr_decay must be at least 0, got -1"),
        (lambda: mk.optim.NormalizedSGD(lr=-1), "NormalizedSGD: lr must be at least 0, got -1"),
        (lambda: mk.optim.NormalizedSGD(norm="each"), "norm must be 'all' or 'parameter', got 'each'"),
        (lambda: mk.optim.Clipped(mk.optim.SGD(), 0), "Clipped: norm must be positive, got 0"),
        (lambda: mk.optim.Muon(ns_steps=-1), "Muon: ns_steps must be at least 0, got -1"),
        (
            lambda: mk.optim.Muon(adjust_lr_fn="rms"),
            "adjust_lr_fn must be None or one of original, match_rms_adamw, got 'rms'",
        ),
        (lambda: mk.optim.SGD(nesterov=True), "SGD: momentum must be positive with nesterov"),
        (lambda: mk.optim.Adam(eps=0), "Adam: eps must be positive, got 0"),
        (lambda: mk.optim.AdamW(betas=(0.9, 1.0)), r"AdamW: beta2 must be in \[0, 1\), got 1.0"),
        (lambda: mk.optim.SGD(learn_lr=True, per="layer"), "per must be 'all', 'parameter' or 'element', got 'layer'"),
    ):
        with pytest.raises(ValueError, match=text):
            make()
    for make in (lambda: mk.optim.Clipped(torch.optim.SGD, 1.0), lambda: mk.optim.Muon(others=torch.optim.SGD)):
        with pytest.raises(TypeError, match=r"must be one of metakern\.optim's optimizers, got type"):
            make()


def test_a_fixed_hyper_parameter_may_be_set() -> None:
    sgd = mk.optim.SGD(lr=0.1, momentum=0.5, learn="momentum")
    sgd.lr = 0.25
    (phi,), _ = sgd.update([torch.ones(1, 2)], [torch.ones(1, 2)], sgd.init([torch.ones(1, 2)]))
    assert phi.tolist() == [[0.75, 0.75]]
    assert "(lr): Hyper(0.25)" in repr(sgd)
    assert "(momentum): Hyper(0.5, learned, per='all')" in repr(sgd)
    with pytest.raises(ValueError, match=r"momentum is learned: change its parameters under torch.no_grad\(\)"):
        sgd.momentum = 0.1
    with pytest.raises(TypeError, match="SGD: lr must be a number, got 'fast'"):
        sgd.lr = "fast"


def test_meta_curvature_is_a_product_with_a_matrix_along_each_dimension() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(6, 2)).double()
    inner = mk.optim.MetaCurvature(lr=0.2, largest=4)
    x, y = torch.randn(2, T, B, 2, 3, dtype=torch.float64), torch.randn(2, T, B, 2, dtype=torch.float64)
    loss = lambda model, batch: (model(batch[0]) - batch[1]).square().mean()  # noqa: E731
    makes = {"strategy": ("store", "recompute"), "capture": (False, True)}
    maml = mk.MAML(model, loss, inner, steps=2)
    for _, matrix in inner.matrices.items():
        matrix.data += 0.3 * torch.randn_like(matrix)
    assert [name for name, _ in inner.matrices.items()] == [
        "0.weight/0", "0.weight/1", "0.weight/2", "0.bias/0", "3.weight/0", "3.bias/0",
    ]  # fmt: skip

    def update(p: Tensor, g: Tensor, name: str) -> Tensor:
        letters = "abc"[: g.dim()]
        for d, letter in enumerate(letters):
            if f"{name}/{d}" in inner.matrices:
                g = torch.einsum(
                    f"z{letter},{letters}->{letters.replace(letter, 'z')}", inner.matrices[f"{name}/{d}"], g
                )
        return p - 0.2 * g

    total: Any = 0.0
    for t in range(T):
        phi: dict[str, Tensor] = dict(model.named_parameters())
        call = lambda phi, b, t=t: (functional_call(model, phi, x[b, t]) - y[b, t]).square().mean()  # noqa: E731
        for _ in range(2):
            grads = torch.autograd.grad(call(phi, 0), list(phi.values()), create_graph=True)
            phi = {name: update(p, g, name) for (name, p), g in zip(phi.items(), grads, strict=True)}
        total = total + call(phi, 1) / T
    leaves = [*model.parameters(), *inner.parameters()]
    truth = torch.autograd.grad(total, leaves)
    for strategy in makes["strategy"]:
        for capture in makes["capture"]:
            maml = mk.MAML(model, loss, inner, steps=2, strategy=strategy, capture=capture)
            found = torch.autograd.grad(maml((x[0], y[0]), (x[1], y[1])), leaves)
            for a, b in zip(found, truth, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    with pytest.raises(ValueError, match="give each model an optimizer of its own"):
        mk.MAML(nn.Sequential(nn.Conv1d(2, 4, 2)), loss, inner)
    for largest in (0, True):
        with pytest.raises(ValueError, match="largest must be"):
            mk.optim.MetaCurvature(largest=largest)
    with pytest.raises(ValueError, match="MetaCurvature: lr must be at least 0"):
        mk.optim.MetaCurvature(lr=-0.1)


def test_meta_curvature_begins_as_gradient_descent_and_learns_the_matrices_in_use() -> None:
    inner, (p, g) = mk.optim.MetaCurvature(), torch.randn(2, T, 3, 4)
    assert (inner.lr, inner.largest) == (0.01, 1024)
    with pytest.raises(ValueError, match="matrices must be there for the 1 parameters of phi, got 0: call prepare"):
        inner.update([p], [g], ())
    inner.prepare({"a": nn.Parameter(p[0]), "b": nn.Parameter(p[0, 0])})
    inner.prepare({"a": nn.Parameter(p[0])})
    torch.testing.assert_close(inner.update([p], [g], ())[0], [p - 0.01 * g])
    assert [tuple(m.shape) for m in inner.hyper_parameters()] == [(3, 3), (4, 4)]
    inner.matrices["a/0"].requires_grad_(False)
    assert [tuple(m.shape) for m in inner.hyper_parameters()] == [(4, 4)]
