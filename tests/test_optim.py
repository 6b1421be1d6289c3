"""Inner optimizers: one step equals torch.optim's, and the meta-gradient through them equals plain autograd's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_capture import calls_of
from torch import Tensor, nn
from torch.func import functional_call

import metakern as mk

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
    """Muon of matrices, descent of the others at half the rate."""

    def of(x: Tensor) -> Tensor:
        a, b, c = 3.4445, -4.7750, 2.0315
        x = x / x.norm()
        for _ in range(5):
            x = a * x + b * x @ x.mT @ x + c * x @ x.mT @ x @ x.mT @ x
        return x

    return [of(gi[0])[None] * max(1, gi.shape[1] / gi.shape[2]) ** 0.5 if gi.dim() == 3 else gi / 2 for gi in g]


# What torch.optim has not: plain descent along another direction.
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
    """Descent along a direction of ordinary operations, as an optimizer of the parameters of one task."""

    def __init__(self, direction: Callable[[list[Tensor]], list[Tensor]], lr: float) -> None:
        self.direction, self.lr = direction, lr

    def init(self, phi: list[Tensor]) -> tuple:
        return ()

    def update(self, phi: list[Tensor], grads: list[Tensor], state: tuple) -> tuple:
        return [p - self.lr * d for p, d in zip(phi, self.direction(list(grads)), strict=True)], state


def unrolled(net: nn.Module, inner: Any) -> Tensor:
    """Plain autograd through `inner.update`, a task at a time."""
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
def test_adapts_as_torch_optim_does(name: str) -> None:
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
    """One of INNER that learns all of its hyper-parameters but those that are absent."""
    names = [n for n in INNER[name][0]().names if not getattr(INNER[name][0](), n).absent]
    return INNER[name][0](learn=names, per=per, steps=steps)


def perturbed(inner: mk.optim.InnerOptimizer) -> None:
    """Hyper-parameters that differ in all that they may differ in."""
    draw = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for h in inner.parameters():
            h.mul_(1 - 0.2 * torch.rand(h.shape, dtype=torch.float64, generator=draw).to(h))


@pytest.mark.parametrize("adjust", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_muon_adapts_as_torch_optim_does(nesterov: bool, adjust: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """That of torch.optim, without its rounding to bfloat16."""
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
    """Without steps of their own, for elements; otherwise for two of the four steps, the second one of which stays."""
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


def test_first_order_learns_its_rate_exactly_given_constant_gradients() -> None:
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
    """An input that is always zero gives weights whose gradients are exactly zero; a task that fits, all of them."""
    net = model()
    x, y = batch(1)
    x[..., 0] = 0
    y[0] = net(x[0]).detach()
    maml = mk.MAML(net, loss, inner=EVERY[name](), steps=3, strategy=strategy)
    maml((x, y), batch(2)).backward()
    assert all(p.grad.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("strategy", ["store", "recompute"])
@pytest.mark.parametrize("name", EVERY)
def test_captured_numbers_are_those_of_ordinary_runs(name: str, strategy: str) -> None:
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
    assert not calls  # by the program


@pytest.mark.skipif(mk.backends()["triton"] != "available", reason=mk.backends()["triton"])
@pytest.mark.parametrize(
    ("name", "per"),
    [
        *((name, per) for name in INNER for per in ("fixed", "parameter")),
        *((name, per) for name in ("sgd", "nesterov", "adam") for per in ("all", "element")),
        *((name, "fixed") for name in DIRECTIONS),
    ],
)
def test_kernels_are_launched_where_there_are_some(name: str, per: str, launched: list[str]) -> None:
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
def test_tasks_of_a_chunk_do_not_mix_and_dtypes_may(name: str) -> None:
    """The first weight in float32, the others in float64; every task as if it were alone."""
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


def test_nothing_to_adapt() -> None:
    for make in EVERY.values():
        inner = make()
        assert inner.update([], [], inner.init([]))[0] == []


def test_the_last_steps_values_stay() -> None:
    inner = mk.optim.SGD(lr=1.0, learn_lr=True, per="parameter", steps=2)
    inner.prepare({"w": nn.Parameter(torch.zeros(1))})
    with torch.no_grad():
        inner.lr.values[0].copy_(torch.tensor([1.0, 10.0]))
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


def test_refusals() -> None:
    for make, text in (
        (lambda: mk.optim.SGD(lr=-1), "SGD: lr must be at least 0, got -1"),
        (lambda: mk.optim.SGD(momentum=1.0), r"SGD: momentum must be in \[0, 1\), got 1.0"),
        (
            lambda: mk.optim.SGD(learn=("lr", "beta1")),
            "SGD: learn must name some of lr, weight_decay, momentum, got 'b",
        ),
        (lambda: mk.optim.SGD(learn_lr=True, steps=0), "steps must be None or at least 1, got 0"),
        (lambda: mk.optim.RMSprop(alpha=1.0), r"RMSprop: alpha must be in \[0, 1\), got 1.0"),
        (lambda: mk.optim.RMSprop(eps=0), "RMSprop: eps must be positive, got 0"),
        (lambda: mk.optim.Adagrad(lr_decay=-1), "Adagrad: lr_decay must be at least 0, got -1"),
        (lambda: mk.optim.NormalizedSGD(lr=-1), "NormalizedSGD: lr must be at least 0, got -1"),
        (lambda: mk.optim.NormalizedSGD(norm="each"), "norm must be 'all' or 'parameter', got 'each'"),
        (lambda: mk.optim.Clipped(mk.optim.SGD(), 0), "Clipped: norm must be positive, got 0"),
        (lambda: mk.optim.Muon(ns_steps=-1), "Muon: ns_steps must be at least 0, got -1"),
        (lambda: mk.optim.Muon(adjust_lr_fn="rms"), "adjust_lr_fn must be one of original, match_rms_adamw, got 'rms'"),
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
