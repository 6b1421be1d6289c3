"""The engine: exact results whatever the first batch is and whatever changes, and an unchanged user's model."""

from __future__ import annotations

import copy
import gc
import random
import sys
import threading
import types
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

import metakern as mk
from metakern.meta import plan, threads, verify
from metakern.meta.batches import mapped, select, tasks_of
from metakern.meta.plan import WORKING_BYTES, _left_in_groups

T, LR = 3, 0.3
Loss = Callable[[Any, Any], Tensor]


class Called:
    """A model that is called with the parameters `phi`, by `functional_call`."""

    def __init__(self, model: nn.Module, phi: dict[str, Tensor]) -> None:
        self.model, self.phi = model, phi

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return functional_call(self.model, self.phi, args, kwargs)


def plain(model: nn.Module, loss: Loss, support: Any, query: Any, steps: int = 2, more: Any = ()) -> list[Tensor]:
    """Return the mean query loss and its gradients by the parameters and by `more`, by plain autograd."""
    theta = {name: p for name, p in model.named_parameters() if p.requires_grad}
    total: Any = 0.0
    for t in range(tasks_of(support)):
        phi = dict(theta)
        for _ in range(steps):
            value = loss(Called(model, phi), select(support, t))
            grads = torch.autograd.grad(value, list(phi.values()), create_graph=True, allow_unused=True)
            phi = {n: p if g is None else p - LR * g for (n, p), g in zip(phi.items(), grads, strict=True)}
        total = total + loss(Called(model, phi), select(query, t)) / tasks_of(support)
    grads = torch.autograd.grad(total, [*theta.values(), *more], allow_unused=True)
    return [
        total.detach(),
        *(torch.zeros_like(x) if g is None else g for g, x in zip(grads, [*theta.values(), *more], strict=True)),
    ]


def ours(maml: Any, support: Any, query: Any, more: Any = ()) -> list[Tensor]:
    wanted = [*(p for p in maml.model.parameters() if p.requires_grad), *more]
    for p in wanted:
        p.grad = None
    value = maml(support, query)
    value.backward()
    return [value.detach(), *(torch.zeros_like(p) if p.grad is None else p.grad for p in wanted)]


def same(found: list[Tensor], truth: list[Tensor], tolerance: float = 1e-9) -> None:
    for a, b in zip(found, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def maml_of(model: nn.Module, loss: Loss, **options: Any) -> mk.MAML:
    return mk.MAML(model, loss, **{"inner": mk.optim.SGD(lr=LR), "steps": 2, **options})


def points(seed: int, tasks: int = T, examples: int = 4) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(tasks, examples, 3, generator=draw, dtype=torch.float64)
    return x, torch.randint(2, (tasks, examples), generator=draw)


def ce(model: Any, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


class Net(nn.Module):
    """Two layers with the function `between` between them."""

    def __init__(self, between: Callable[[Tensor], Tensor] = torch.tanh, first: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first = nn.Linear(3, 6).double() if first is None else first.double()
        self.between, self.last = between, nn.Linear(6, 2).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(self.first(x)))


class Centered(Net):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x - x.mean(0))


@pytest.mark.parametrize("first", ["one task", "equal tasks", "zeros", "constant"])
@pytest.mark.parametrize("model", [Net, Centered])
def test_plans_are_exact_whatever_the_first_batch_is(model: type[Net], first: str) -> None:
    net, (x, y) = model(), points(1)
    batches = {
        "one task": (x[:1], y[:1]),
        "equal tasks": (x[:1].expand_as(x).clone(), y[:1].expand_as(y).clone()),
        "zeros": (torch.zeros_like(x), torch.zeros_like(y)),
        "constant": (torch.ones_like(x), torch.ones_like(y)),
    }
    maml = maml_of(net, ce)
    for batch in (batches[first], points(2), points(3, 5)):
        same(ours(maml, batch, points(4, tasks_of(batch))), plain(net, ce, batch, points(4, tasks_of(batch))))
    assert maml.plan.batching == ("fold" if model is Net else "vmap")


@pytest.fixture
def trials(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of inner steps for which a plan was verified."""
    found, verified = list[int](), plan.Planner.plan

    def counted(self: Any, batches: Any, steps: int, *args: Any, **options: Any) -> Any:
        found.append(steps)
        return verified(self, batches, steps, *args, **options)

    monkeypatch.setattr(plan.Planner, "plan", counted)
    return found


@pytest.mark.parametrize("options", [{}, {"strategy": "recompute", "capture": True}, {"weights": "implicit"}], ids=str)
def test_another_number_of_inner_steps_needs_no_other_trial(trials: list[int], options: dict[str, Any]) -> None:
    net = Net()
    maml, plans = maml_of(net, ce, **options), dict[int, plan.Plan]()
    for steps in (1, 3, 0, 5, 1, 3):
        maml.steps = steps
        same(ours(maml, points(steps), points(2)), plain(net, ce, points(steps), points(2), steps))
        plans[steps] = maml.plan
    assert trials == [1]
    for steps, made in plans.items():
        assert made.batching == "fold"
        assert (f"the graph of {steps} steps" in str(made)) != ("strategy" in options)
    maml.evaluate(points(1), points(2), (0, 7))
    maml.first_order = True
    maml(points(1), points(2))
    assert trials == [1, 3]


def test_the_query_is_verified_too() -> None:
    class Switch(Net):
        def forward(self, x: Tensor, center: Any = None) -> Tensor:
            y = super().forward(x)
            return y if center is None else y - y.mean(0)

    def loss(model: Any, batch: dict) -> Tensor:
        return F.cross_entropy(model(batch["x"], batch.get("center")), batch["y"])

    (x, y), (x2, y2) = points(1), points(2)
    support, query = {"x": x, "y": y}, {"x": x2, "y": y2, "center": torch.ones(T, 1)}
    net = Switch()
    same(ours(maml_of(net, loss), support, query), plain(net, loss, support, query))
    found = maml_of(net, loss).evaluate(support, query, (0, 2))
    assert abs(found[1].mean() - plain(net, loss, support, query)[0]) < 1e-9


def test_models_that_depend_on_the_batch_size_are_exact() -> None:
    class Large(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x - x.mean(0) if x.shape[0] > 9 else x)

    net = Large()
    maml = maml_of(net, ce)
    for tasks, examples in ((2, 4), (3, 4), (2, 10), (1, 4)):
        support, query = points(1, tasks, examples), points(2, tasks, 4)
        same(ours(maml, support, query), plain(net, ce, support, query))


@pytest.mark.parametrize(
    "change", ["loss", "inner", "training", "flag", "forward", "class", "module", "hook", "frozen"]
)
def test_every_change_is_noticed(change: str) -> None:
    class Flagged(Net):
        center, scale = False, 1.0

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x - x.mean(0) if self.center else x) * self.scale

    class Other(Flagged):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) - super().forward(x).mean(0)

    net = Flagged(first=nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6)))
    net.eval()
    net.center, loss = False, ce
    maml = maml_of(net, loss)
    support, query = points(1), points(2)
    same(ours(maml, support, query), plain(net, ce, support, query))
    if change == "loss":
        loss = maml.loss = lambda model, batch: F.cross_entropy(model(batch[0]), batch[1], label_smoothing=0.5)
    elif change == "inner":
        maml.inner = mk.optim.SGD(lr=LR, weight_decay=0.0, momentum=0.0)
        maml.steps = 1
    elif change == "training":
        net.train()
    elif change == "flag":
        net.center = True
    elif change == "forward":
        net.forward = lambda x: Flagged.forward(net, x) ** 2  # type: ignore[method-assign]
    elif change == "class":
        net.__class__ = Other
    elif change == "module":
        net.last = nn.Sequential(nn.Linear(6, 2), nn.Sigmoid()).double()
    elif change == "hook":
        net.last.register_forward_hook(lambda module, args, y: y - y.mean(0))
    else:
        net.first.requires_grad_(False)
    truth = plain(copy.deepcopy(net) if change == "training" else net, loss, support, query, maml.steps)
    same(ours(maml, support, query), truth)
    if change == "flag":
        net.center = False
        same(ours(maml, support, query), plain(net, loss, support, query))


def test_a_number_that_changes_at_each_call_needs_no_new_plan() -> None:
    class Warm(Net):
        temperature = 1.0

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) / self.temperature

    net = Warm()
    maml, plans = maml_of(net, ce), set()
    for i in range(4):
        net.temperature = 1.0 + i
        same(ours(maml, points(1), points(2)), plain(net, ce, points(1), points(2)))
        plans.add(id(maml._engine.last))
    assert len(plans) == 1


def test_plans_are_kept_and_used_again() -> None:
    net = Net()
    maml, plans = maml_of(net, ce), set()
    for _ in range(3):
        net.train()
        maml(points(1), points(2))
        plans.add(id(maml._engine.last))
        net.eval()
        maml.evaluate(points(1), points(2))
        maml.adapt(points(1))
        plans.add(id(maml._engine.last))
    assert len(plans) == 2
    maml(points(1, T, 4000), points(2))
    assert id(maml._engine.last) not in plans
    assert maml.plan.task_chunk < 29000


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, ct: Tensor) -> Tensor:
        return 3 * ct * ctx.saved_tensors[0] ** 2


class Opaque(Cube):
    @staticmethod
    def backward(ctx: Any, ct: Tensor) -> Tensor:
        return ct * torch.from_numpy(3 * ctx.saved_tensors[0].detach().numpy() ** 2)


@pytest.mark.parametrize(("function", "word"), [(Cube, "once_differentiable"), (Opaque, "opaque backward")])
@pytest.mark.parametrize("batching", ["auto", "loop"])
def test_lost_second_derivatives_are_refused_with_their_module(function: Any, word: str, batching: str) -> None:
    class Act(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return function.apply(x)

    net = nn.Sequential(nn.Linear(3, 4), Act(), nn.Linear(4, 2)).double()
    with pytest.raises(ValueError, match=rf"MAML: second derivatives must not be lost.*1: \w+, {word}"):
        maml_of(net, ce, batching=batching)(points(1), points(2))
    maml_of(net, ce, first_order=True)(points(1), points(2)).backward()  # first order needs none


@pytest.mark.parametrize("old", [False, True])
def test_weight_norm_has_the_right_second_derivative(old: bool) -> None:
    class Normed(nn.Module):
        def __init__(self, g: Tensor, v: Tensor, b: Tensor) -> None:
            super().__init__()
            self.b, self.g, self.v = (nn.Parameter(t.detach().clone()) for t in (b, g, v))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x, self.g * self.v / self.v.norm(dim=1, keepdim=True), self.b)

    layer = nn.Linear(3, 2).double()
    if old:
        with pytest.warns(FutureWarning):
            net = nn.utils.weight_norm(layer)
        g, v = net.weight_g, net.weight_v
    else:
        net = nn.utils.parametrizations.weight_norm(layer)
        g, v = net.parametrizations.weight.original0, net.parametrizations.weight.original1
    truth = plain(Normed(g, v, net.bias), ce, points(1), points(2))
    same(ours(maml_of(net, ce), points(1), points(2)), truth)


def test_leaves_of_the_loss_are_learned() -> None:
    class Criterion(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor([1.5, 0.7], dtype=torch.float64))

        def forward(self, model: Any, batch: Any) -> Tensor:
            return F.cross_entropy(model(batch[0]) * self.scale, batch[1])

    w = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    criterion, net = Criterion(), Net()
    for loss, leaf in ((lambda m, b: F.cross_entropy(m(b[0]) * w, b[1]), w), (criterion, criterion.scale)):
        for strategy in ("store", "recompute"):
            found = ours(maml_of(net, loss, strategy=strategy), points(1), points(2), [leaf])
            same(found, plain(net, loss, points(1), points(2), more=[leaf]))
    made_before = w.exp()
    with pytest.raises(ValueError, match="loss must compute anew what requires a gradient"):
        maml_of(net, lambda m, b: ce(m, b) * made_before)(points(1), points(2))


@pytest.mark.parametrize(
    "penalty",
    [
        lambda m, b: irm(m, b),
        lambda m, b: gradient_penalty(m, b),
        lambda m, b: ce(m, b) + torch.func.grad(lambda x: m(x[None]).square().sum())(b[0][0]).square().sum(),
        lambda m, b: torch.func.hessian(lambda x: m(x[None])[0, 0])(b[0][0]).square().sum() + ce(m, b),
    ],
    ids=["irm", "gradient", "func-grad", "func-hessian"],
)
@pytest.mark.parametrize("patched", [False, True])
def test_losses_that_take_derivatives_are_exact(penalty: Loss, patched: bool) -> None:
    net = Net(nn.GELU())
    truth = plain(net, penalty, points(1), points(2), 1)
    if patched:
        mk.patch(net)
    same(ours(maml_of(net, penalty, steps=1), points(1), points(2)), truth)


def irm(model: Any, batch: Any) -> Tensor:
    w = torch.ones((), dtype=torch.float64, requires_grad=True)
    return torch.autograd.grad(F.cross_entropy(model(batch[0]) * w, batch[1]), w, create_graph=True)[0] ** 2


def gradient_penalty(model: Any, batch: Any) -> Tensor:
    x = batch[0].clone().requires_grad_()
    (g,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    return ce(model, batch) + g.square().mean()


class Noise(nn.Module):
    def __init__(self, draw: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.draw = draw

    def forward(self, x: Tensor) -> Tensor:
        return self.draw(x)


generator = torch.Generator()
DRAWS: dict[str, Callable[[Tensor], Tensor]] = {
    "noise": lambda x: x + 0.1 * torch.randn_like(x),
    "own dropout": lambda x: x * torch.bernoulli(torch.full_like(x, 0.7)),
    "in place": lambda x: x * torch.empty_like(x).uniform_(0.5, 1.5),
    "generator": lambda x: x + torch.randn(x.shape, generator=generator, dtype=x.dtype),
    "rrelu": lambda x: F.rrelu(x, training=True),
    "gumbel": lambda x: F.gumbel_softmax(x),
    "normal": lambda x: x + torch.distributions.Normal(x, 0.1).rsample(),
    "drop path": lambda x: x * (torch.rand(x.shape[0], 1, dtype=x.dtype) < 0.7),
    "mixup": lambda x: 0.5 * x + 0.5 * x[torch.randperm(x.shape[0])],
    "python": lambda x: x * random.random(),
    "numpy": lambda x: x * float(np.random.rand()),
    "layer drop": lambda x: x if torch.rand(()).item() < 0.5 else x * 2,
}


@pytest.mark.parametrize("name", DRAWS)
def test_random_models_draw_anew_for_each_task_and_call(name: str) -> None:
    """Both strategies give the same numbers from one seed."""
    net = Net(Noise(DRAWS[name]))
    equal = mapped(lambda t: t[:1].expand_as(t).clone(), points(1, 4))
    found = []
    for strategy in ("store", "recompute"):
        maml = maml_of(net, ce, strategy=strategy)
        maml(points(5, 4), points(6, 4))
        torch.manual_seed(3), random.seed(3), np.random.seed(3), generator.manual_seed(3)
        found.append(ours(maml, equal, equal))
        if name not in ("generator", "layer drop"):
            assert len({round(v, 12) for v in maml.query_losses.tolist()}) == 4
        again = ours(maml, equal, equal)
        assert name == "layer drop" or not torch.equal(again[0], found[-1][0])
    if name != "generator":
        same(*found)


def normed(kind: str, **options: Any) -> nn.Module:
    if kind == "2d":
        return nn.Sequential(
            nn.Unflatten(1, (3, 1, 1)), nn.BatchNorm2d(3, **options), nn.Flatten(), nn.Linear(3, 2)
        ).double()
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, **options), nn.ReLU(), nn.Linear(4, 2)).double()


@pytest.mark.parametrize("kind", ["1d", "2d"])
@pytest.mark.parametrize("options", [{}, {"track_running_stats": False}, {"affine": False}, {"momentum": None}])
@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_is_exact_and_its_statistics_do_not_change(kind: str, options: dict, training: bool) -> None:
    torch.manual_seed(0)
    net = normed(kind, **options).train(training)
    buffers = {name: b.clone() for name, b in net.named_buffers()}
    truth = plain(copy.deepcopy(net), ce, points(1), points(2, T, 6))
    for batching in ("fold", "vmap", "loop"):
        for strategy in ("store", "recompute"):
            maml = maml_of(net, ce, batching=batching, strategy=strategy)
            same(ours(maml, points(1), points(2, T, 6)), truth)
    assert all(torch.equal(b, buffers[name]) for name, b in net.named_buffers())
    assert mk.doctor(net, ce, points(1), points(2)).exact


@dataclass
class Points:
    x: Tensor
    y: Tensor
    name: str = "points"
    weight: float | None = None


def test_batches_in_common_containers() -> None:
    transformers = pytest.importorskip("transformers")
    (x, y), net = points(1), Net()
    truth = plain(net, ce, (x, y), (x, y))
    kinds: dict[str, tuple[Any, Loss]] = {
        "none": ({"xy": (x, y), "mask": None}, lambda m, b: ce(m, b["xy"])),
        "strings": ([x, y, "text", 3, np.ones(2)], lambda m, b: ce(m, b)),
        "dataclass": (Points(x, y), lambda m, b: ce(m, (b.x, b.y))),
        "namespace": (types.SimpleNamespace(x=x, y=y), lambda m, b: ce(m, (b.x, b.y))),
        "encoding": (transformers.BatchEncoding({"x": x, "y": y}), lambda m, b: ce(m, (b["x"], b["y"]))),
    }
    for batch, loss in kinds.values():
        for batching in ("fold", "vmap", "loop"):
            same(ours(maml_of(net, loss, batching=batching), batch, batch), truth)
    none_in_the_query = maml_of(net, kinds["none"][1])
    same(ours(none_in_the_query, {"xy": (x, y)}, {"xy": (x, y), "mask": None}), truth)
    with pytest.raises(ValueError, match=r"batches must be made of tensors, lists.*, got a Odd"):
        maml_of(net, ce)([x, y, odd(x)], [x, y])


def odd(x: Tensor) -> Any:
    held = type("Odd", (), {})()
    held.x = x
    return held


def test_padded_tasks_have_the_loss_of_their_own_examples() -> None:
    tasks = [select(points(i, 1, n), 0) for i, n in enumerate((4, 2, 3))]
    batch, net = mk.pad_tasks(tasks), Net()
    expected = sum(
        plain(net, ce, mapped(lambda t: t[None], task), mapped(lambda t: t[None], task))[0] for task in tasks
    )
    assert abs(ours(maml_of(net, mk.losses.classification), batch, batch)[0] - expected / 3) < 1e-9
    with pytest.raises(ValueError, match="pad_tasks: tasks must have one structure"):
        mk.pad_tasks([(torch.ones(2),), (torch.ones(2, 2),)])


def test_padded_tasks_of_named_tuples_and_lists() -> None:
    class Task(NamedTuple):
        x: Tensor
        y: Tensor

    parts = [(torch.ones(n, 2), torch.arange(n)) for n in (3, 1)]
    expected = mk.pad_tasks(parts)
    for found, kind in ((mk.pad_tasks([Task(*p) for p in parts]), tuple), (mk.pad_tasks([[*p] for p in parts]), list)):
        assert type(found) is kind
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def squares(model: Any, batch: Any) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


class Forked(nn.Module):
    """Takes another way where an input is negative, which shows only when such a task comes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 3).double(), nn.Linear(3, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        return self.b(y.tanh()) if bool((x.detach() > 0).all()) else 2 * y


@pytest.mark.parametrize("negative", [slice(0, 2), slice(2, 4), slice(3, 4)])
def test_another_batching_takes_over_in_the_middle_of_a_batch(negative: slice, trials: list[int]) -> None:
    torch.manual_seed(0)
    x, y, model = torch.rand(4, 5, 3).double() + 0.1, torch.randn(4, 5, 3).double(), Forked()
    mk.MAML(model, squares, inner=mk.optim.SGD(lr=LR), steps=2, task_chunk=2)((x, y), (x, y))
    maml = mk.MAML(model, squares, inner=mk.optim.SGD(lr=LR), steps=2, task_chunk=2)
    maml((x, y), (x, y)).backward()  # verified where all is positive
    assert maml.plan.batching == "fold"
    x[negative] *= -1
    for found, exact in zip(ours(maml, (x, y), (x, y)), plain(model, squares, (x, y), (x, y)), strict=True):
        torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-11)
    assert maml.plan.batching == "loop"
    maml.steps, before = 3, len(trials)  # what failed is not taken for another number of steps
    same(ours(maml, (x, y), (x, y)), plain(model, squares, (x, y), (x, y), 3))
    assert (maml.plan.batching, len(trials)) == ("loop", before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_bytes_of_activations_are_those_of_the_models_dtype(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(30, 20), nn.Tanh()).to(dtype)
    batch = torch.randn(4, 50, 30, dtype=dtype), torch.randn(4, 50, 20, dtype=dtype)
    maml = mk.MAML(model, squares, steps=1)
    maml(batch, batch)
    numbers = 50 * 30 + 3 * 50 * 20  # x, the tanh, and what the loss keeps
    assert numbers / 2 < maml.plan.activation_bytes / max(dtype.itemsize, 4) < 1.5 * numbers


def test_memory_limits_of_control_groups(tmp_path: Path) -> None:
    def write(path: str, value: str) -> None:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(value)

    write("proc/self/cgroup", "4:cpu,memory:/jobs/a\n0::/user/session\n")
    write("sys/fs/cgroup/user/memory.max", "900")
    write("sys/fs/cgroup/user/memory.current", "100")
    write("sys/fs/cgroup/user/session/memory.max", "max")
    write("sys/fs/cgroup/user/session/memory.current", "100")
    write("sys/fs/cgroup/memory/jobs/a/memory.limit_in_bytes", "500")
    write("sys/fs/cgroup/memory/jobs/a/memory.usage_in_bytes", "600")
    write("sys/fs/cgroup/memory/memory.limit_in_bytes", "7000")
    write("sys/fs/cgroup/memory/memory.usage_in_bytes", "1000")
    assert list(_left_in_groups(tmp_path)) == [800, 0, 6000]
    assert list(_left_in_groups(tmp_path / "elsewhere")) == []


def test_what_adapt_must_be() -> None:
    with pytest.raises(TypeError, match="MAML: adapt must be a name pattern, a list of them, or a function"):
        mk.MAML(nn.Linear(2, 2), squares, adapt=3)  # type: ignore[arg-type]


def state_of(model: nn.Module) -> list[Any]:
    """Return the classes, attributes, tensors and hooks of all modules, to be compared later."""
    held: list[Any] = []
    for module in model.modules():
        held.append(type(module))
        for name, value in vars(module).items():
            held.append((name, id(value), list(map(id, value)) if isinstance(value, list) else None))
        held += [(id(p), p.detach().clone(), p.grad) for p in module._parameters.values() if p is not None]
        held += [(id(b), b.clone()) for b in module._buffers.values() if b is not None]
        held += [list(module._forward_hooks), list(module._forward_pre_hooks)]
    return held


def test_the_users_model_is_not_changed() -> None:
    class Keeper(Net):
        def __init__(self) -> None:
            super().__init__(first=nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6), nn.Dropout(0.5)))
            self.calls, self.seen, self.mask = 0, [], torch.ones(6)
            self.kept: Any = None

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.seen.append(x.shape[0])
            self.kept = self.first(x) * self.mask
            return self.last(self.kept)

    net = Keeper().float()
    x, y = points(1)
    batch = x.float(), y
    net(batch[0][0])
    moved = net.to
    net.to = lambda *args, **kwargs: moved(*args, **kwargs)  # type: ignore[method-assign]  # as accelerate does
    net.last.register_forward_hook(lambda module, args, y: None)
    before, draws = state_of(net), torch.get_rng_state()
    for batching in ("fold", "vmap", "loop"):
        with pytest.raises(ValueError, match="got a Odd"):
            maml_of(net, ce, batching=batching)([*batch, odd(x)], batch)
        mk.MAML(net, ce, batching=batching, steps=1).evaluate(batch, batch, (0,))
        torch.set_rng_state(draws)
        after = state_of(net)
        assert len(after) == len(before)
        for a, b in zip(after, before, strict=True):
            if isinstance(a, tuple) and len(a) == 3 and a[0] in ("calls", "kept", "seen"):
                continue  # set by the forward itself
            if isinstance(a, tuple) and any(isinstance(v, Tensor) for v in a):
                assert a[0] == b[0]
                assert torch.equal(a[1], b[1])
            else:
                assert a == b


@pytest.mark.parametrize(
    "setting", ["cudnn.conv", "cudnn.rnn", "matmul", "all", "deterministic", "float64", "anomaly", "inference"]
)
def test_results_do_not_depend_on_settings_of_pytorch(setting: str) -> None:
    net, lstm = Net(), nn.LSTM(3, 2, batch_first=True).double()
    truth = plain(net, ce, points(1), points(2))

    def recurrent(model: Any, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0][None])[0][0], batch[1])

    owners = {"cudnn.conv": torch.backends.cudnn.conv, "cudnn.rnn": torch.backends.cudnn.rnn}
    owners |= {"matmul": torch.backends.cuda.matmul, "all": torch.backends}
    if setting in owners:
        before = owners[setting].fp32_precision
        owners[setting].fp32_precision = "ieee"
    deterministic, default = torch.are_deterministic_algorithms_enabled(), torch.get_default_dtype()
    try:
        if setting == "deterministic":
            torch.use_deterministic_algorithms(True)
        elif setting == "float64":
            torch.set_default_dtype(torch.float64)
        with torch.autograd.set_detect_anomaly(setting == "anomaly"):
            same(ours(maml_of(net, ce), points(1), points(2)), truth)
            maml_of(lstm, recurrent)(points(1), points(2)).backward()
        with torch.inference_mode(setting == "inference"):
            curve = maml_of(net, ce).evaluate(points(1), points(2), (2,))
        assert abs(curve.mean() - truth[0]) < 1e-9
    finally:
        torch.use_deterministic_algorithms(deterministic)
        torch.set_default_dtype(default)
        if setting in owners:
            owners[setting].fp32_precision = before


@pytest.mark.parametrize("patience", [60.0, 0.1])
def test_a_call_that_another_thread_is_in_ends_first(patience: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads, "_PATIENCE", patience)
    entered, go = threading.Event(), threading.Event()
    x, found = points(1)[0][0], list[Tensor]()

    def between(x: Tensor) -> Tensor:
        if threading.get_ident() == reader.ident:
            entered.set()
            go.wait(60)
        return x.tanh()

    net = Net(between)
    reader = threading.Thread(target=lambda: found.append(net(x)))
    reader.start()
    assert entered.wait(60)
    if patience > 1:
        threading.Timer(0.3, go.set).start()
        maml_of(net, ce, batching="loop").evaluate(points(1), points(2), (2,))
        assert go.is_set()
    else:
        with pytest.raises(RuntimeError, match="while another thread is within a call of it"):
            maml_of(net, ce, batching="loop").evaluate(points(1), points(2), (2,))
    go.set()
    reader.join(60)
    assert torch.equal(found[0], net(x))
    assert not net._forward_pre_hooks


@pytest.mark.parametrize("batching", ["fold", "loop", "vmap"])
def test_two_threads_on_models_that_share_modules(batching: str) -> None:
    nets = [Net(), Net()]
    nets[1].first = nets[0].first
    truths, failures = [plain(net, ce, points(1), points(2))[0] for net in nets], list[Any]()

    def work(net: Net, truth: float) -> None:
        try:
            maml = maml_of(net, ce, batching=batching)
            values = [maml.evaluate(points(1), points(2), (2,)).mean().item() for _ in range(10)]
            values += [maml(points(1), points(2)).item() for _ in range(10)]
            failures.extend(value for value in values if abs(value - truth) > 1e-9)
        except Exception as error:
            failures.append(error)

    workers = [threading.Thread(target=work, args=pair) for pair in zip(nets, truths, strict=True)]
    interval = sys.getswitchinterval()
    try:
        sys.setswitchinterval(1e-5)
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(120)
    finally:
        sys.setswitchinterval(interval)
    assert not any(worker.is_alive() for worker in workers)
    assert failures == []


def test_threads_that_would_wait_for_each_other_are_told() -> None:
    one, other, both = Net(), Net(), threading.Barrier(2)
    told = list[str]()

    def work(first: Net, second: Net) -> None:
        with threads.running(first):
            both.wait(60)
            try:
                with threads.running(second):
                    pass
            except RuntimeError as error:
                told.append(str(error))

    workers = [threading.Thread(target=work, args=pair) for pair in ((one, other), (other, one))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert not any(worker.is_alive() for worker in workers)
    assert len(told) == 1
    assert "two threads must not wait for each other's models: give each thread a copy" in told[0]
    assert not threads._RUNNING
    assert not threads._WAITING


def test_two_threads_on_one_model() -> None:
    net, done = Net(), threading.Event()
    truth, failures, x = plain(net, ce, points(1), points(2)), list[Exception](), points(1)[0][0]
    y = net(x)

    def work(batching: str) -> None:
        try:
            for _ in range(10):
                maml = maml_of(net, ce, batching=batching)
                assert abs(maml.evaluate(points(1), points(2), (2,)).mean() - truth[0]) < 1e-9
        except Exception as error:
            failures.append(error)

    def read() -> None:
        while not done.is_set():
            try:
                assert torch.equal(net(x), y)
            except Exception as error:
                if "must not be called while another thread adapts it" not in str(error):
                    failures.append(error)

    workers = [threading.Thread(target=work, args=(b,)) for b in ("fold", "loop", "vmap")]
    reader, interval = threading.Thread(target=read), sys.getswitchinterval()
    try:
        sys.setswitchinterval(1e-5)  # threads meet at many places
        reader.start()
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(120)
    finally:
        done.set()
        sys.setswitchinterval(interval)
    reader.join(120)
    assert not any(thread.is_alive() for thread in (reader, *workers))
    assert failures == []
    same(ours(maml_of(net, ce), points(1), points(2)), truth)


def test_a_token_out_of_range_is_an_error_in_every_batching() -> None:
    net = nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 2)).double()

    def loss(model: Any, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1])

    tokens, y = torch.randint(5, (T, 4)), torch.randint(2, (T, 4))
    for batching in ("fold", "vmap", "loop"):
        maml = maml_of(net, loss, batching=batching)
        same(ours(maml, (tokens, y), (tokens, y)), plain(net, loss, (tokens, y), (tokens, y)))
        wrong = tokens.clone()
        wrong[0, 1] = 6
        with pytest.raises((ValueError, IndexError), match=r"tokens must be in|out of range"):
            maml((wrong, y), (tokens, y))


def test_bound_methods_and_partials_and_closures() -> None:
    class Learner:
        def __init__(self, net: nn.Module) -> None:
            self.net, self.scale = net, 2.0

        def loss(self, model: Any, batch: Any) -> Tensor:
            return ce(model, batch) * self.scale

    net = Net()
    losses: list[Any] = [Learner(net).loss, partial(lambda m, b, k: k * ce(m, b), k=2.0)]
    for loss in losses:
        same(ours(maml_of(net, loss), points(1), points(2)), plain(net, loss, points(1), points(2)))
    with pytest.raises(ValueError, match="steps must name at least one number"):
        maml_of(net, ce).evaluate(points(1), points(2), ())


def test_a_padding_row_is_no_lost_derivative() -> None:
    """The loss depends on the padding row of an embedding, which has no gradient."""
    net = nn.Sequential(nn.Embedding(5, 4, padding_idx=2), nn.Tanh(), nn.Linear(4, 2)).double()
    net[0].weight.data[2] = 0.7
    tokens, y = torch.arange(T * 4).view(T, 4) % 5, torch.randint(2, (T, 4))
    for batching in ("fold", "vmap", "loop"):
        maml = maml_of(net, ce, batching=batching)
        same(ours(maml, (tokens, y), (tokens, y)), plain(net, ce, (tokens, y), (tokens, y)))


def test_a_loss_that_is_a_module_can_be_replaced_by_a_function() -> None:
    class Criterion(nn.Module):
        def forward(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
            return 2 * ce(model, batch)

    maml = maml_of(Net(), Criterion())
    support, query = points(1), points(2)
    maml(support, query)
    maml.loss = ce
    assert "loss" not in dict(maml.named_children())
    same(ours(maml, support, query), plain(maml.model, ce, support, query))
    maml.loss = Criterion()
    same(ours(maml, support, query), plain(maml.model, lambda model, batch: 2 * ce(model, batch), support, query))


class Long(nn.Module):
    """Attention over a sequence, and a step that may depend on the length."""

    def __init__(self, step: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        super().__init__()
        self.embedding, self.attention = nn.Embedding(11, 8), nn.MultiheadAttention(8, 2, batch_first=True)
        self.out, self.step = nn.Linear(8, 11), step

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        return self.out(self.step(self.attention(x, x, x, need_weights=False)[0]))


class Lossy(torch.autograd.Function):
    """x², whose second derivative is lost for long sequences."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, ct_y: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return ct_y * 2 * (x.detach() if x.shape[-2] > 32 else x)


def words(model: Any, batch: Any) -> Tensor:
    return F.cross_entropy(model(batch[0]).flatten(0, -2), batch[1].flatten())


def probes_of(monkeypatch: pytest.MonkeyPatch, costly: int = 0) -> list[Any]:
    """The tasks on which first order and second order are verified, from here on."""
    probes: list[Any] = []
    inner = verify.Trial._smaller

    def kept(self: verify.Trial, pair: Any) -> Any:
        *tasks, part = inner(self, pair)
        probes.append(tasks)
        return *tasks, part

    monkeypatch.setattr(verify, "COSTLY_BYTES", costly)
    monkeypatch.setattr(verify.Trial, "_smaller", kept)
    return probes


def sentences(length: int, tasks: int = 2, examples: int = 9) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(length)
    ids, labels = (torch.randint(11, (tasks, examples, length), generator=random) for _ in range(2))
    return ids, labels


def test_costly_tasks_are_verified_on_smaller_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = Long().double(), sentences(70)
    whole = maml_of(model, words)
    whole(batch, batch)
    probes = probes_of(monkeypatch)
    maml = maml_of(model, words)
    found = ours(maml, batch, batch)
    assert [[t.shape for t in probe] for probe in probes[0]] == [[(2, 2, 70)] * 2, [(2, 2, 32)] * 2]
    assert maml.plan.activation_bytes == pytest.approx(whole.plan.activation_bytes, rel=0.35)
    with sdpa_kernel(SDPBackend.MATH):
        exact = plain(model, words, batch, batch)
    for a, b in zip(found, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("costly", [0, 10**12])
@pytest.mark.parametrize("step", [Lossy.apply, lambda x: x if x.shape[-2] < 40 else Lossy.apply(x)])
def test_lost_second_derivatives_are_found_in_costly_tasks(
    monkeypatch: pytest.MonkeyPatch, costly: int, step: Callable[[Tensor], Tensor]
) -> None:
    probes_of(monkeypatch, costly)
    batch = sentences(70)
    with pytest.raises(ValueError, match="MAML: second derivatives must not be lost"):
        maml_of(Long(step).double(), words)(batch, batch)


@pytest.mark.parametrize(
    ("step", "examples"),
    [
        (lambda x: x if x.shape[-2] < 40 else x.tanh(), 2),  # another graph for short sequences
        (lambda x: x if x.shape[0] < 4 else x.tanh(), 9),  # for few examples
        (lambda x: x.unflatten(-2, (7, 10)).flatten(-3, -2), 2),  # raises for other lengths
        (lambda x: Square.apply(x), 9),  # Python decides what its backward does
        (lambda x: x * torch.rand(()), 9),  # draws
    ],
)
def test_what_depends_on_sizes_is_verified_on_whole_tasks(
    monkeypatch: pytest.MonkeyPatch, step: Callable[[Tensor], Tensor], examples: int
) -> None:
    model, batch, probes = Long(step).double(), sentences(70), probes_of(monkeypatch)
    maml_of(model, words)(batch, batch)
    assert [tasks[0].shape for tasks in probes[0]] == [(2, examples, 70)] * 2


@pytest.mark.parametrize(
    ("unlabelled", "sizes"),
    [
        (np.s_[:, :, :32], [(2, 70), (2, 70)]),
        (np.s_[1, :, :32], [(2, 70), (2, 70)]),
        (np.s_[:, :2], [(9, 70), (9, 70)]),
        (np.s_[:, 2:, 32:], [(2, 70), (2, 32)]),
    ],
)
def test_smaller_tasks_have_labels(monkeypatch: pytest.MonkeyPatch, unlabelled: Any, sizes: Any) -> None:
    (ids, labels), probes = sentences(70), probes_of(monkeypatch)
    labels[unlabelled] = -100
    maml_of(Long().double(), words)((ids, labels), (ids, labels))
    assert [tuple(tasks[0].shape[1:]) for tasks in probes[0]] == sizes


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, ct_y: Tensor) -> Tensor:
        return 2 * ct_y * ctx.saved_tensors[0]


class Mine(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


def times_ten(self: nn.Linear, x: Tensor) -> Tensor:
    return 10 * torch.matmul(x, self.weight.mT) + self.bias


@pytest.mark.parametrize(
    ("kind", "holder", "name", "new"),
    [
        (Mine, Mine, "forward", times_ten),
        (nn.Linear, nn.Linear, "forward", times_ten),
        (nn.Linear, F, "linear", lambda x, weight, bias: torch.matmul(x, 10 * weight.mT) + bias),
        (nn.Linear, nn.Module, "__call__", lambda self, *args: times_ten(self, *args)),
    ],
)
def test_functions_that_are_replaced_between_calls_run(
    monkeypatch: pytest.MonkeyPatch, kind: type, holder: Any, name: str, new: Any
) -> None:
    torch.manual_seed(0)
    net, support, query = kind(3, 2).double(), points(1), points(2)
    maml = maml_of(net, ce)
    maml(support, query).backward()
    with monkeypatch.context() as patched:
        if name == "__call__":
            inner = nn.Module.__call__
            new = lambda self, *args: times_ten(self, *args) if self is net else inner(self, *args)  # noqa: E731
        patched.setattr(holder, name, new)
        found, exact = ours(maml, support, query), plain(net, ce, support, query)
    for a, b in zip(found, exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    again = ours(maml, support, query)
    for a, b in zip(again, plain(net, ce, support, query), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def test_another_model_may_be_assigned() -> None:
    maml = maml_of(Net(), ce)
    maml(points(1), points(2)).backward()
    names = [name for name, _ in maml.named_parameters()]
    maml.model = other = Net()
    assert [name for name, _ in maml.named_parameters()] == names
    for a, b in zip(ours(maml, points(1), points(2)), plain(other, ce, points(1), points(2)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    with pytest.raises(TypeError, match=r"MAML: model must be an nn.Module, got int"):
        maml.model = 3  # type: ignore[assignment]
    names = names[-1:]
    maml = mk.MAML(Net(), ce, adapt=[name.removeprefix("model.") for name in names], batching="loop")
    maml.model = Net()  # what is adapted stays, and how
    assert [f"model.{name}" for name in maml.adapt(points(1))] == names
    assert maml.plan.batching == "loop"


@pytest.mark.parametrize("cast", [lambda x: x.float(), lambda x: x.to(torch.float32)])
def test_data_in_float64_may_be_cast_in_the_loss(cast: Callable[[Tensor], Tensor]) -> None:
    net, (support, query) = nn.Linear(3, 2), (points(1), points(2))
    maml = maml_of(net, lambda model, batch: F.cross_entropy(model(cast(batch[0])), batch[1]))
    found = ours(maml, support, query)
    assert maml.plan.batching == "fold"
    expected = ours(
        maml_of(net, ce), *(mapped(lambda t: t.float() if t.is_floating_point() else t, b) for b in (support, query))
    )
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


class Turned(nn.Linear):
    """A linear layer of rotated features, whose angles are computed in float32 as transformers' rotary embeddings."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            rates, positions = torch.ones(1, 1).to(dtype=torch.float), torch.arange(x.shape[-1], device=x.device)
            angles = (rates @ positions[None].float()).to(x.dtype)
        return super().forward(x * angles.cos())


def test_casts_of_integers_keep_their_dtype_in_the_trial() -> None:
    net, batches = (
        Turned(3, 2),
        [mapped(lambda t: t.float() if t.is_floating_point() else t, points(i)) for i in (1, 2)],
    )
    maml = maml_of(net, ce)
    maml(*batches)
    assert "in float64: taken" in str(maml.plan)


class Halved(nn.Linear):
    """A linear layer that takes bfloat16 alone, so that a trial can't run in float64."""

    def __init__(self) -> None:
        super().__init__(3, 2, dtype=torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.bfloat16(), self.weight, self.bias)


def test_a_plan_says_that_half_precision_hides_slopes() -> None:
    maml = maml_of(Halved(), ce)
    maml(points(1), points(2))
    assert "in bfloat16: taken" in str(maml.plan)
    assert "which half precision hides" in str(maml.plan)
    assert "surrogate" not in str(maml.plan)


def test_a_loss_that_folding_no_longer_takes_gets_another_batching() -> None:
    criterion, net = nn.CrossEntropyLoss(label_smoothing=0.1), Net()
    loss = lambda model, batch: criterion(model(batch[0]), batch[1])  # noqa: E731
    maml = maml_of(net, loss)
    maml(points(1), points(2))
    assert maml.plan.batching == "fold"
    criterion.weight = torch.tensor([0.3, 0.7], dtype=torch.float64)
    for a, b in zip(ours(maml, points(1), points(2)), plain(net, loss, points(1), points(2)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):  # an error of the user's stays what it is
        maml((points(1)[0][..., :2], points(1)[1]), points(2))


def test_a_verified_plan_keeps_no_tensor_of_its_trial() -> None:
    def trials() -> int:
        gc.collect()
        return sum(type(x) in (Tensor, nn.Parameter) and x.dtype == torch.float64 for x in gc.get_objects())

    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))  # tanh and the loss save their own results
    maml, before = mk.MAML(model, mk.losses.classification, steps=2, capture=False), trials()
    maml((torch.randn(2, 6, 5), torch.randint(3, (2, 6))), (torch.randn(2, 6, 5), torch.randint(3, (2, 6)))).backward()
    assert trials() == before


def test_the_plan_counts_the_state_of_the_inner_optimizer() -> None:
    """Adam has two more numbers for each parameter, and momentum one."""
    model, batch = nn.Linear(200, 100), (torch.randn(2, 5, 200), torch.randn(2, 5, 100))
    loss = lambda model, batch: (model(batch[0]) - batch[1]).square().mean()  # noqa: E731
    needed = {}
    for name, inner in (("sgd", mk.optim.SGD()), ("momentum", mk.optim.SGD(momentum=0.5)), ("adam", mk.optim.Adam())):
        maml = mk.MAML(model, loss, inner, steps=2, strategy="recompute", capture=False)
        maml(batch, batch)
        needed[name] = WORKING_BYTES / maml.plan.task_chunk
    assert needed["momentum"] > 1.7 * needed["sgd"]
    assert needed["adam"] > 2.5 * needed["sgd"]


def test_a_plan_counts_on_the_memory_that_was_free_before_its_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU the trial in float64 takes memory, which is free again when the plan is carried out."""
    order, opened = [], plan.opened

    def noted(*args: Any) -> Any:
        order.append("trial")
        return opened(*args)

    monkeypatch.setattr(plan, "free_bytes", lambda device: order.append("free") or 2**40)
    monkeypatch.setattr(plan, "opened", noted)
    maml = mk.MAML(nn.Linear(3, 2), mk.losses.classification, steps=2)
    x, y = torch.randn(2, 4, 3), torch.randint(2, (2, 4))
    maml((x, y), (x, y)).backward()
    assert order == ["free", "trial"]
    assert maml.plan.strategy == "store"


def test_a_loss_that_writes_to_its_batch_is_refused_with_the_reason() -> None:
    def scaled(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.mse_loss(model(batch[0].mul_(0.5)), batch[1])

    batch = torch.randn(2, 4, 5), torch.randn(2, 4, 3)
    with pytest.raises(ValueError, match=r"no batching is exact(.|\n)*the loss writes to its batch.*: have it clone"):
        mk.MAML(nn.Linear(5, 3), scaled)(batch, batch)
