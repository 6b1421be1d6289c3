"""Implicit weights against plain autograd and against explicit weights, and which weights can be implicit."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from models import T, assert_equal, build, gradients, mlp, plain_loss, points, regression_loss, sgd
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import metakern as mk
from metakern.meta import engine, plan, weights
from metakern.meta.implicit import Implicit, ImplicitUnroll
from metakern.meta.verify import Trial

STRATEGIES = ("store", "recompute")


def implicit(model: nn.Module, loss: Callable, inner: Any, steps: int, **options: Any) -> mk.MAML:
    return mk.MAML(model, loss, inner, steps, **{"weights": "implicit", "capture": False, "task_chunk": 2} | options)


def learned(maml: Any, value: Tensor) -> dict[str, Tensor]:
    """Return copies of the gradients of model and inner optimizer."""
    maml.zero_grad()
    value.backward()
    return {name: p.grad.clone() for name, p in maml.named_parameters() if p.grad is not None}


def assert_as_explicit(make: Callable[..., Any], *batches: Any) -> Any:
    """Assert that `make(weights=…, strategy=…)` gives one meta-gradient for all options; return the last object."""
    truth = None
    for form, strategy in (("explicit", "store"), *(("implicit", strategy) for strategy in STRATEGIES)):
        maml = make(weights=form, strategy=strategy)
        found = learned(maml, maml(*batches))
        assert bool(maml.plan.implicit) == (form == "implicit")
        truth = truth or found
        assert_equal(found, truth)
    return maml


@pytest.mark.parametrize(
    ("name", "steps", "count"),
    [("mlp", 1, 2), ("mlp", 3, 2), ("mlp", 5, 2), ("gpt-folded", 3, 4), ("hf-gpt2", 3, 10), ("hf-llama", 3, 16)],
)
def test_meta_gradient_equals_plain_autograd(name: str, steps: int, count: int) -> None:
    model, loss, support, query, _ = build(name)
    value = plain_loss(model, loss, support, query, steps, sgd(0.3))
    truth = gradients(model, value)
    for strategy in STRATEGIES:
        maml = implicit(model, loss, mk.optim.SGD(lr=0.3), steps, strategy=strategy)
        ours = maml(support, query)
        torch.testing.assert_close(ours, value.detach(), rtol=1e-12, atol=1e-12)
        assert_equal(gradients(model, ours), truth)
        assert len(maml.plan.implicit) == count
        assert (maml.plan.batching, maml.plan.strategy) == ("fold", strategy)


@pytest.mark.parametrize("first_order", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {"lr": 0.3, "learn": ["lr"], "per": "parameter", "steps": 2},
        {"lr": 0.2, "momentum": 0.5, "learn": ["lr", "momentum"]},
        {"lr": 0.2, "momentum": 0.4, "nesterov": True, "weight_decay": 0.1, "learn": ["weight_decay"]},
    ],
    ids=["rates", "momentum", "nesterov-decay"],
)
def test_hyper_parameters_get_their_gradients(options: dict[str, Any], first_order: bool) -> None:
    model = mlp().double()

    def make(**forms: Any) -> mk.MAML:
        inner = mk.optim.SGD(**options).double()
        return mk.MAML(model, regression_loss, inner, 4, first_order, capture=False, **forms)

    maml = assert_as_explicit(make, points(1), points(2))
    assert all(p.grad is not None and p.grad.norm() > 0 for p in maml.inner.parameters())


class Again(nn.Module):
    """A layer that is called twice, another one with its weight, and a head without a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 3, bias=False)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.a(self.b(self.a(x).tanh()).tanh()).tanh())


def test_a_weight_may_be_used_several_times() -> None:
    model = Again().double()
    value = plain_loss(model, regression_loss, points(1), points(2), 3, sgd(0.3))
    truth = gradients(model, value)
    for strategy in STRATEGIES:
        maml = implicit(model, regression_loss, mk.optim.SGD(lr=0.3), 3, strategy=strategy)
        assert_equal(gradients(model, maml(points(1), points(2))), truth)
        assert maml.plan.implicit == ("a.weight", "head.weight")


def test_parameters_that_are_not_adapted_get_their_mixed_derivatives() -> None:
    model = Again().double()
    adapted = lambda name: name != "a.bias" and not name.startswith("head")  # noqa: E731
    truth = gradients(model, plain_loss(model, regression_loss, points(1), points(2), 3, sgd(0.3), adapted))
    for strategy in STRATEGIES:
        maml = implicit(model, regression_loss, mk.optim.SGD(lr=0.3), 3, strategy=strategy, adapt=adapted)
        assert_equal(gradients(model, maml(points(1), points(2))), truth)


NORMED = {
    "clipped": lambda: mk.optim.Clipped(mk.optim.SGD(lr=0.3, learn_lr=True, per="parameter"), 0.5, learn_norm=True),
    "clipped-momentum": lambda: mk.optim.Clipped(mk.optim.SGD(lr=0.3, momentum=0.5, weight_decay=0.1), 0.5),
    "clipped-twice": lambda: mk.optim.Clipped(mk.optim.Clipped(mk.optim.SGD(lr=0.3), 0.4), 0.9),
    "clipped-rarely": lambda: mk.optim.Clipped(mk.optim.SGD(lr=0.3), 1.5),
    "normalized": lambda: mk.optim.NormalizedSGD(lr=0.3, learn_lr=True),
    "normalized-each": lambda: mk.optim.NormalizedSGD(lr=0.1, momentum=0.3, norm="parameter"),
}


@pytest.mark.parametrize("inner", NORMED)
@pytest.mark.parametrize("model", ["mlp", "again", "mish"])
def test_optimizers_may_read_the_norms_of_gradients(inner: str, model: str) -> None:
    made = {"mlp": mlp, "again": Again, "mish": lambda: nn.Sequential(nn.Linear(5, 8), nn.Mish(), nn.Linear(8, 3))}
    net = made[model]().double()

    def make(**forms: Any) -> mk.MAML:
        return mk.MAML(net, regression_loss, NORMED[inner]().double(), 3, capture=False, **forms)

    maml = assert_as_explicit(make, points(1), points(2))
    assert maml.plan.hvp == ("reverse" if model == "mish" else "forward")


@pytest.mark.parametrize("inner", NORMED)
def test_norms_of_gradients_that_are_zero_at_first(inner: str) -> None:
    """The head starts at zero, so the other layers learn nothing in the first step, but have second derivatives."""
    net = mlp().double()
    with torch.no_grad():
        net[-1].weight.zero_()

    def make(**forms: Any) -> mk.MAML:
        return mk.MAML(net, regression_loss, NORMED[inner]().double(), 2, capture=False, **forms)

    maml = assert_as_explicit(make, points(1), points(2))
    assert maml.model[0].weight.grad.norm() > 0


@pytest.mark.parametrize(
    ("inner", "tied"),
    [("plain", False), ("clipped", False), *((name, True) for name in ("plain", "momentum-decay", *NORMED))],
)
def test_look_ups_and_heads_that_share_their_table(inner: str, tied: bool) -> None:
    net = Embedded(tied, padding=3).double()
    optimizers: dict[str, Callable[[], Any]] = NORMED | {
        "plain": lambda: mk.optim.SGD(lr=0.3, learn_lr=True, per="parameter"),
        "momentum-decay": lambda: mk.optim.SGD(lr=0.3, momentum=0.5, weight_decay=0.1, learn="weight_decay"),
    }

    def make(**forms: Any) -> mk.MAML:
        return mk.MAML(net, guesses, optimizers[inner]().double(), 3, capture=False, **forms)

    maml = assert_as_explicit(make, labelled(1), labelled(2))
    assert len(maml.plan.implicit) == (3 if tied else 4)
    adapted = [make(weights=form).adapt(labelled(1)) for form in ("implicit", "explicit")]
    assert_equal(*adapted)


def test_all_parameters_may_be_implicit() -> None:
    model = nn.Sequential(nn.Linear(5, 8, bias=False), nn.Tanh(), nn.Linear(8, 3, bias=False)).double()
    make = partial(mk.MAML, model, regression_loss, mk.optim.SGD(lr=0.3), 3, capture=False)
    assert len(assert_as_explicit(make, points(1), points(2)).plan.implicit) == 2


def test_a_model_without_forward_mode_goes_reverse_over_reverse() -> None:
    model = nn.Sequential(nn.Linear(5, 8), nn.Mish(), nn.Linear(8, 3)).double()
    make = partial(mk.MAML, model, regression_loss, mk.optim.SGD(lr=0.3), 3, capture=False)
    assert assert_as_explicit(make, points(1), points(2)).plan.hvp == "reverse"


def test_steps_may_have_batches_of_different_sizes_and_query_losses_of_their_own() -> None:
    model = mlp().double()
    support = mk.PerStep(*(tree_map(lambda a, n=n: a[:, :n], points(n)) for n in (3, 1, 4)))
    query = mk.PerStep(*(tree_map(lambda a, n=n: a[:, :n], points(10 + n)) for n in (2, 3, 4, 1)))
    make = partial(mk.MAML, model, regression_loss, mk.optim.SGD(lr=0.3), 3, capture=False)
    assert_as_explicit(partial(make, query_weights=[0.1, 0.0, 0.4, 1.0]), support, query)


def test_the_least_memory_gives_the_same_numbers() -> None:
    model, found = mlp().double(), []
    for options in ({"strategy": "store"}, {"memory": "least"}):
        maml = implicit(model, regression_loss, mk.optim.SGD(lr=0.3), 6, **options)
        found.append(gradients(model, maml(points(1), points(2))))
    assert maml.plan.strategy == "recompute"
    assert_equal(found[1], found[0])


def test_a_run_that_was_stopped_leaves_nothing_behind() -> None:
    model, calls = mlp().double(), []

    def loss(model: Any, batch: Any) -> Tensor:
        calls.append(None)
        if len(calls) == stop:
            raise KeyError("stopped")
        return regression_loss(model, batch)

    stop = 0
    maml = implicit(model, loss, mk.optim.SGD(lr=0.3), 3, strategy="recompute", task_chunk=T)
    truth = gradients(model, maml(points(1), points(2)))
    calls.clear()
    stop = 6  # three steps, the query, and the second of the Hessian-vector products
    with pytest.raises(KeyError, match="stopped"):
        maml(points(1), points(2))
    assert_equal(gradients(model, maml(points(1), points(2))), truth)


@pytest.mark.parametrize("clips", [False, True], ids=["sgd", "clipped"])
@pytest.mark.parametrize("kind", ["layers", "tables"])
def test_captured_programs_follow_the_data_and_the_parameters(kind: str, clips: bool) -> None:
    torch.manual_seed(0)
    model, loss, draw = (mlp(), regression_loss, points) if kind == "layers" else (Embedded(True), guesses, labelled)
    model, inner = model.double(), mk.optim.SGD(lr=0.3, learn_lr=True).double()
    inner = mk.optim.Clipped(inner, 0.5) if clips else inner
    maml = implicit(model, loss, inner, 2, capture=True)
    for seed in range(4):
        found = learned(maml, maml(draw(seed), draw(seed + 10)))
        fresh = implicit(model, loss, maml.inner, 2, weights="explicit")
        assert_equal(found, learned(fresh, fresh(draw(seed), draw(seed + 10))))
        with torch.no_grad():
            for p in maml.parameters():
                p.mul_(1.1)
    assert maml.plan.implicit
    assert maml.plan.usage.ordinary == 0


@pytest.mark.parametrize(("copies", "chunk"), [(0, 1), (10**6, T)], ids=["one-task", "all-tasks"])
def test_chunks_may_take_as_much_memory_as_some_copies_of_the_weights(
    copies: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plan, "WORKING_BYTES", 1)
    monkeypatch.setattr(plan, "IMPLICIT_COPIES", copies)
    given: list[bool] = []
    monkeypatch.setattr(engine, "give_back", lambda: given.append(True))
    maml = implicit(mlp().double(), regression_loss, mk.optim.SGD(lr=0.1), 2, task_chunk="auto")
    for seed in (1, 2):
        maml(points(seed), points(seed + 10))
    assert min(maml.plan.task_chunk, T) == chunk
    assert len(given) == 1  # the memory of the trial, once


@pytest.mark.parametrize(("room", "chunk"), [(T, T), (T - 1, T - 1)])
def test_the_pairs_of_all_steps_count_twice_in_a_chunk(room: int, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    steps, support, query = 3, points(1), points(11)
    options: dict[str, Any] = {"task_chunk": "auto", "strategy": "recompute", "batching": "fold"}
    inner = mk.optim.SGD(lr=0.1)
    first = implicit(mlp().double(), regression_loss, inner, steps, **options)
    first(support, query)
    assert first._engine.last is not None
    batching, copy = first._engine.last.unroll.batching, sum(p.nbytes for p in first.parameters() if p.dim() == 1)
    size = first.plan.activation_bytes + (3 + first.plan.snapshots) * copy + 2 * steps * batching.pair_bytes
    monkeypatch.setattr(plan, "IMPLICIT_COPIES", 0)
    monkeypatch.setattr(plan, "WORKING_BYTES", room * size + size // 2)
    again = implicit(mlp().double(), regression_loss, inner, steps, **options)
    again(support, query)
    assert again.plan.task_chunk == chunk


def test_nothing_is_left_of_the_trial_of_a_large_model(monkeypatch: pytest.MonkeyPatch) -> None:
    trials: list[weakref.ref[Trial]] = []
    monkeypatch.setattr(engine, "LARGE_BYTES", 1)
    made = Trial.__init__
    monkeypatch.setattr(Trial, "__init__", lambda self, *args: (trials.append(weakref.ref(self)), made(self, *args))[1])
    monkeypatch.setattr(engine, "give_back", lambda: trials.append(trials[0]() is None))
    gc.disable()
    try:
        implicit(mlp().double(), regression_loss, mk.optim.SGD(lr=0.1), 2)(points(1), points(11))
    finally:
        gc.enable()
    assert trials[1:] == [True]


class Sizes(TorchDispatchMode):
    """Keeps the sizes of all tensors that operations return within the block."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        self.seen |= {t.untyped_storage().size() // t.itemsize for t in tree_leaves(result) if isinstance(t, Tensor)}
        return result


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_no_weight_of_a_task_is_formed(strategy: str) -> None:
    model = nn.Sequential(nn.Linear(5, 61), nn.Tanh(), nn.Linear(61, 47), nn.Tanh(), nn.Linear(47, 3)).double()
    for form in ("explicit", "implicit"):
        options = {"weights": form, "strategy": strategy, "task_chunk": T}
        maml = implicit(model, regression_loss, mk.optim.SGD(lr=0.3), 2, **options)
        maml(points(1), points(2)).backward()  # makes the plan
        model.zero_grad()
        with Sizes() as sizes:
            maml(points(1), points(2)).backward()
            maml.evaluate(points(1), points(2), steps=(0, 3))
        assert (T * 61 * 47 in sizes.seen) == (form == "explicit")


def test_adapted_weights_are_formed_at_the_end_and_can_be_adapted_further() -> None:
    model, inner = mlp().double(), mk.optim.SGD(lr=0.3, weight_decay=0.1)
    phi = {}
    for form in ("explicit", "implicit"):
        maml = implicit(model, regression_loss, inner, 3, weights=form)
        first = maml.adapt(points(1))
        phi[form] = first | {f"{name} again": p for name, p in maml.adapt(points(2), steps=2, start=first).items()}
        phi[form]["curve"] = maml.evaluate(points(1), points(2), steps=(0, 1, 4))
        stopped = maml.adapt(points(1), until=lambda k, phi: k == 2 and phi["0.weight"].shape == (T, 8, 5))
        phi[form] |= {f"{name} after 2": p for name, p in stopped.items()}
    assert maml.plan.implicit
    assert_equal(phi["implicit"], phi["explicit"], 1e-12)


@pytest.mark.parametrize(
    "make",
    [
        partial(mk.FOMAML, steps=2),
        partial(mk.ANIL, steps=2),
        partial(mk.MAMLPlusPlus, steps=2),
        partial(mk.Reptile, steps=2),
    ],
    ids=["fomaml", "anil", "maml++", "reptile"],
)
def test_algorithms(make: Callable[..., Any]) -> None:
    model = mlp().double()
    assert_as_explicit(lambda **forms: make(model, regression_loss, capture=False, **forms), points(1), points(2))


def test_streams_go_on_from_the_weights_of_the_window_before() -> None:
    model = mlp().double()
    stream = mk.PerStep(*(points(seed) for seed in range(5)))
    make = partial(mk.Streaming, model, regression_loss, mk.optim.SGD(lr=0.2), window=2, capture=False)
    assert_as_explicit(make, stream)


class Embedded(nn.Module):
    """A look-up, twice in a call, and a head that may have its table."""

    def __init__(self, tied: bool, padding: int | None = None) -> None:
        super().__init__()
        self.embedding, self.layer, self.head = (
            nn.Embedding(7, 6, padding_idx=padding),
            nn.Linear(6, 6),
            nn.Linear(6, 7, bias=False),
        )
        self.positions = nn.Embedding(9, 6)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.embedding(tokens.flip(1)).sin() + self.positions(torch.arange(5))
        return self.head(self.layer(x).tanh()).mean(1)


def guesses(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def labelled(seed: int) -> tuple[Tensor, Tensor]:
    make = torch.Generator().manual_seed(seed)
    return torch.randint(7, (T, 4, 5), generator=make), torch.randint(7, (T, 4), generator=make)


class Table(nn.Embedding):
    """A type without a rule of its own."""


def other() -> nn.Module:
    model = Embedded(False)
    model.embedding = Table(7, 6)
    return model


def scaled() -> nn.Module:
    model = mlp()
    nn.utils.parametrizations.weight_norm(model[0])
    return model


def penalized(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    return regression_loss(model, batch) + 0.1 * model[2].weight.square().sum()


@pytest.mark.parametrize(
    ("make", "loss", "batch", "inner", "found", "reason"),
    [
        (other, guesses, labelled, mk.optim.SGD(0.3), ("layer.weight", "head.weight", "positions.weight"), "by Table"),
        (scaled, regression_loss, points, mk.optim.SGD(0.3), ("2.weight",), "used by ParametrizationList"),
        (mlp, penalized, points, mk.optim.SGD(0.3), (), "fold is not possible"),
        (mlp, regression_loss, points, mk.optim.Adam(0.1), (), "Adam does not scale"),
        (mlp, regression_loss, points, mk.optim.MetaSGD(0.1), (), "MetaSGD does not scale"),
        (mlp, regression_loss, points, mk.optim.Clipped(mk.optim.Adam(0.1), 1.0), (), "Clipped does not scale"),
    ],
    ids=["other", "weight-norm", "penalty", "adam", "metasgd", "clipped-adam"],
)
def test_other_weights_are_explicit_with_a_reason(
    make: Any, loss: Any, batch: Any, inner: Any, found: tuple[str, ...], reason: str
) -> None:
    model, of_explicit = make().double(), {}
    inner = inner.double()
    for form in ("explicit", "implicit"):
        maml = implicit(model, loss, inner, 2, weights=form)
        of_form = learned(maml, maml(batch(1), batch(2)))
        of_explicit = of_explicit or of_form
    assert_equal(of_form, of_explicit)
    assert maml.plan.implicit == found
    assert reason in str(maml.plan)


def test_autocast_and_other_batchings_are_explicit() -> None:
    model = mlp()
    batches = [tree_map(Tensor.float, points(seed)) for seed in (1, 2)]
    for context, options, reason in (
        (torch.autocast("cpu", torch.bfloat16), {}, "inside torch.autocast"),
        (nullcontext(), {"batching": "vmap"}, "need batching fold"),
    ):
        with context:
            maml = implicit(model, regression_loss, mk.optim.SGD(lr=0.1), 1, **options)
            maml(*batches).backward()
        assert not maml.plan.implicit
        assert reason in str(maml.plan)


@pytest.mark.parametrize("fault", ["rates", "tangents", "inputs"])
def test_a_wrong_implicit_weight_is_found_by_the_verification(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    factors, product, recorded = Implicit._factors, ImplicitUnroll._forward_over_reverse, Implicit._recorded

    def wrong_rates(self: Any, name: str) -> tuple[Tensor, Tensor, Tensor]:
        X, D, rates = factors(self, name)
        return X, D, rates * 1.001

    def lost_tangents(self: Any, phi: Any, shared: Any, batch: Any, v: Any, *ct_pairs: Any) -> Any:
        return product(self, phi, shared, batch, v, *(None for _ in ct_pairs))

    def detached(self: Any, seen: Any, call: Any, y: Tensor) -> Tensor:
        seen.inputs[call[1]] = seen.inputs[call[1]].detach()
        return recorded(self, seen, call, y)

    wrong: dict[str, tuple[Any, str, Any]] = {
        "rates": (Implicit, "_factors", wrong_rates),
        "tangents": (ImplicitUnroll, "_forward_over_reverse", lost_tangents),
        "inputs": (Implicit, "_recorded", detached),
    }
    monkeypatch.setattr(*wrong[fault])
    model = mlp().double()
    maml = implicit(model, regression_loss, mk.optim.SGD(lr=0.3), 2)
    maml(points(1), points(2))
    assert not maml.plan.implicit
    assert "implicit weights are not possible: MismatchError" in str(maml.plan)


def test_auto_takes_large_weights_that_see_few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "LARGE", 40 * 40)
    model = nn.Sequential(nn.Linear(5, 40), nn.Tanh(), nn.Linear(40, 80), nn.Tanh(), nn.Linear(80, 3)).double()
    plans, one = [], implicit(model, regression_loss, mk.optim.SGD(lr=0.3), 1, weights="auto")
    for steps in (2, 4):  # 4 rows a step: 16 rows break even at 40 x 80 / 120 = 26.7, of which `auto` allows a half
        maml = implicit(model, regression_loss, mk.optim.SGD(lr=0.3), steps, weights="auto")
        one.steps = steps
        for made in (maml, one):
            made(points(1), points(2))
        assert maml.plan.implicit == one.plan.implicit
        plans.append(maml.plan)
    assert plans[0].implicit == ("2.weight",)
    assert plans[1].implicit == ()
    assert "too many tokens" in str(plans[1])
    with pytest.raises(ValueError, match="weights must be auto, explicit or implicit, got 'none'"):
        implicit(model, regression_loss, mk.optim.SGD(), 1, weights="none")
