"""Copies of models for both interfaces: each reaches its own modules, and recomputed forwards are exact."""

from __future__ import annotations

import collections
import copy
import dataclasses
import functools
import gc
import pickle
import types
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import metakern as mk
from metakern.compat import higher
from metakern.compat import learn2learn as l2l
from metakern.compat.modules import fused, fused_where_large, surroundings
from metakern.ops.core.plain import where_small

LR, STEPS = 0.7, 3
Step = Callable[[Tensor], Any]


class Net(nn.Module):
    """Two layers; each subclass reaches the second one in another way."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)
        self.setup()

    def setup(self) -> None: ...

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.a(x).tanh())

    def head(self, h: Tensor) -> Tensor:
        return self.b(h)


class InDict(Net):
    def setup(self) -> None:
        self.table = {"b": self.b}

    def head(self, h: Tensor) -> Tensor:
        return self.table["b"](h)


class Nested(Net):
    def setup(self) -> None:
        self.blocks = [(0, collections.OrderedDict(b=collections.deque([self.b])))]

    def head(self, h: Tensor) -> Tensor:
        return self.blocks[0][1]["b"][0](h)


class AsKey(Net):
    def setup(self) -> None:
        self.scale = {self.b: 1.0}

    def head(self, h: Tensor) -> Tensor:
        return self.scale[self.b] * next(iter(self.scale))(h)


class BoundForward(Net):
    def setup(self) -> None:
        self.call = self.b.forward

    def head(self, h: Tensor) -> Tensor:
        return self.call(h)


class OwnMethods(Net):
    def setup(self) -> None:
        self.calls = [self.one]

    def one(self, h: Tensor) -> Tensor:
        return self.b(h)

    def head(self, h: Tensor) -> Tensor:
        return self.calls[0](h)


class Partial(BoundForward):
    def setup(self) -> None:
        self.call = functools.partial(lambda m, h: m(h), self.b)


class Closure(BoundForward):
    def setup(self) -> None:
        def again(h: Tensor, times: int = 1) -> Tensor:
            return again(h, times - 1) if times else self.b(h)

        self.call = again


class Default(BoundForward):
    def setup(self) -> None:
        def call(h: Tensor, *, m: nn.Module = self.b) -> Tensor:
            return m(h)

        self.call = call


class Helper:
    def __init__(self, m: nn.Module) -> None:
        self.m, self.me = m, self

    def __call__(self, h: Tensor) -> Tensor:
        return self.me.m(h)


class InObject(BoundForward):
    def setup(self) -> None:
        self.call = Helper(self.b)


class Slots:
    __slots__ = ("m",)

    def __init__(self, m: nn.Module) -> None:
        self.m = m


class InSlots(Net):
    make: Callable[..., Any] = Slots

    def setup(self) -> None:
        self.holder = type(self).make(m=self.b)

    def head(self, h: Tensor) -> Tensor:
        return self.holder.m(h)


@dataclasses.dataclass(frozen=True)
class Frozen:
    m: nn.Module


class InDataclass(InSlots):
    make = Frozen


class InNamespace(InSlots):
    make = types.SimpleNamespace


class Parameters(Net):
    def setup(self) -> None:
        self.affine = [self.b.weight, self.b.bias]

    def head(self, h: Tensor) -> Tensor:
        return F.linear(h, *self.affine)


class Unregistered(BoundForward):
    def setup(self) -> None:
        self.hidden = [nn.Sequential(self.b)]

    def head(self, h: Tensor) -> Tensor:
        return self.hidden[0](h)


class Weak(Net):
    def setup(self) -> None:
        self.ref = weakref.ref(self.b)

    def head(self, h: Tensor) -> Tensor:
        part = self.ref()
        assert part is not None
        return part(h)


class Cached(Net):
    def setup(self) -> None:
        self.part = functools.lru_cache(maxsize=None)(self.named)

    def named(self, name: str) -> Any:
        return getattr(self, name)

    def head(self, h: Tensor) -> Tensor:
        return self.part("b")(h)


class Parent(Net):
    def setup(self) -> None:
        self.b.parents = [self]

    def head(self, h: Tensor) -> Tensor:
        return self.b.parents[0].b(h)


class Hooked(Net):
    """A hook stores the output of the first layer in the model, and forward reads it from there."""

    def setup(self) -> None:
        self.a.register_forward_hook(self.keep)

    def keep(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        self.kept = output

    def forward(self, x: Tensor) -> Tensor:
        self.a(x)
        return self.b(self.kept.tanh())


class PartForward(Net):
    def setup(self) -> None:
        forward = self.b.forward
        self.b.forward = lambda h: forward(h)  # type: ignore[method-assign]


class RootForward(Net):
    def setup(self) -> None:
        forward = self.forward
        self.forward = functools.wraps(forward)(lambda x: forward(x))  # type: ignore[method-assign]


class Compiled(Net):
    def setup(self) -> None:
        self.compile(backend="eager")


class CompiledPart(Net):
    def setup(self) -> None:
        self.b = torch.compile(self.b, backend="eager")


class CompiledForward(Net):
    def setup(self) -> None:
        self.b.forward = torch.compile(self.b.forward, backend="eager")  # type: ignore[method-assign]


WAYS = [
    Net, InDict, Nested, AsKey, BoundForward, OwnMethods, Partial, Closure, Default, InObject, InSlots, InDataclass,
    InNamespace, Parameters, Unregistered, Weak, Cached, Parent, Hooked, PartForward, RootForward, Compiled,
    CompiledPart, CompiledForward,
]  # fmt: skip


def twice(kind: type[Net]) -> type[Net]:
    """Return a subclass whose code names `recompute`, so that its copies run each forward on modules of their own."""
    return type(kind.__name__, (kind,), {"recompute": lambda self: self.recompute()})


def data() -> tuple[Tensor, Tensor]:
    torch.manual_seed(4)
    return torch.randn(3, 5, 3).double(), torch.randint(2, (3, 5))


def learner(interface: str, model: nn.Module, first_order: bool = False) -> tuple[Any, Step]:
    if interface == "learn2learn":
        clone: Any = l2l.MAML(model, lr=LR, first_order=first_order).clone()
        return clone, clone.adapt
    if interface == "GBML":
        clone = l2l.GBML(model, lambda p: l2l.nn.Scale(p.shape), lr=LR, first_order=first_order).double().clone()
        return clone, clone.adapt
    if interface == "clone_module":
        clone = l2l.clone_module(model)

        def step(loss: Tensor) -> None:
            grads = torch.autograd.grad(loss, list(clone.parameters()), create_graph=not first_order)
            l2l.maml_update(clone, LR, grads)

        return clone, step
    fmodel = higher.monkeypatch(model, copy_initial_weights=False)
    opt = torch.optim.SGD(model.parameters(), lr=LR)
    return fmodel, higher.get_diff_optim(opt, model.parameters(), fmodel).step


def meta_gradient(interface: str, model: nn.Module, between: bool = False, first_order: bool = False) -> list[Tensor]:
    """Return the meta-gradient through an interface; `between` adds losses from before each step."""
    x, y = data()
    clone, step = learner(interface, model, first_order)
    total = torch.zeros(()).double()
    for _ in range(STEPS):
        if between:
            total = total + F.cross_entropy(clone(x[2]), y[2])
        step(F.cross_entropy(clone(x[0]), y[0]))
    (total + F.cross_entropy(clone(x[1]), y[1])).backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


def made(kind: type[nn.Module], *args: Any) -> nn.Module:
    torch.manual_seed(1)
    return kind(*args).double()


def plain(between: bool = False, first_order: bool = False) -> list[Tensor]:
    """Return the same meta-gradient of a `Net` by plain autograd."""
    x, y = data()
    model = made(Net)
    theta = dict(model.named_parameters())

    def loss(phi: dict[str, Tensor], i: int) -> Tensor:
        return F.cross_entropy(functional_call(model, phi, (x[i],)), y[i])

    phi, total = theta, torch.zeros(()).double()
    for _ in range(STEPS):
        if between:
            total = total + loss(phi, 2)
        grads = torch.autograd.grad(loss(phi, 0), list(phi.values()), create_graph=not first_order, retain_graph=True)
        phi = {n: p - LR * g for (n, p), g in zip(phi.items(), grads, strict=True)}
    return list(torch.autograd.grad(total + loss(phi, 1), list(theta.values())))


def same(found: Any, truth: Any) -> None:
    for a, b in zip(found, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("kind", WAYS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("interface", ["learn2learn", "clone_module", "higher"])
@pytest.mark.parametrize("apart", [False, True])
def test_a_copy_computes_with_its_own_modules_however_they_are_reached(
    kind: type[Net], interface: str, apart: bool
) -> None:
    model = made(twice(kind) if apart else kind)
    before = [p.detach().clone() for p in model.parameters()]
    same(meta_gradient(interface, model), plain())
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_copies_of_a_compiled_model_run_its_python_code() -> None:
    for interface in ("learn2learn", "clone_module", "higher"):
        same(meta_gradient(interface, torch.compile(made(Net), backend="eager")), plain())


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)  # raised by the compiler
def test_a_copy_can_be_compiled() -> None:
    x, _ = data()
    for interface in ("learn2learn", "GBML", "higher"):
        clone, _ = learner(interface, made(Net))
        torch.testing.assert_close(torch.compile(clone, backend="eager")(x[0]), clone(x[0]))


def test_models_that_cannot_be_copied_are_refused() -> None:
    class Scripted(Net):
        def setup(self) -> None:
            self.b = torch.jit.script(self.b)

    class Locked:
        def __init__(self, m: nn.Module) -> None:
            self.m = m

        def __copy__(self) -> Any:
            raise TypeError("not to be copied")

    for clone in (l2l.clone_module, higher.monkeypatch):
        with pytest.warns((DeprecationWarning, FutureWarning), match="torch.jit.script"):
            scripted = Scripted()
        with pytest.raises(ValueError, match=r"clone: the model must be written in Python, got RecursiveScriptModule"):
            clone(scripted)
        model = made(Net)
        model.helper = Locked(model.b)
        with pytest.raises(
            ValueError, match=r"clone: an object that holds a part of the model must be copyable, got a Locked"
        ):
            clone(model)


class OfItsClass(Net):
    """The second layer is reached through an attribute of the class, which copies share."""

    registry: dict[str, nn.Module]

    def setup(self) -> None:
        type(self).registry = {"b": self.b}

    def head(self, h: Tensor) -> Tensor:
        return self.registry["b"](h)


@pytest.mark.parametrize("interface", ["learn2learn", "GBML", "higher"])
def test_a_module_that_is_not_reached_through_the_model_is_refused(interface: str) -> None:
    with pytest.raises(ValueError, match=r"each part of the model must be reached through the model, got 'b' reached"):
        meta_gradient(interface, made(OfItsClass))
    x, _ = data()
    made(OfItsClass)(x[0])  # the check must not stay on after the error


@pytest.mark.parametrize("interface", ["learn2learn", "clone_module", "higher"])
def test_models_with_hooks_of_accelerate_are_copied_unless_they_are_offloaded(interface: str) -> None:
    hooks = pytest.importorskip("accelerate.hooks")
    model = made(Net)
    for part in (model, model.a, model.b):
        hooks.add_hook_to_module(part, hooks.AlignDevicesHook(execution_device="cpu", io_same_device=True))
    to = model.to
    model.to = lambda *args: to(*args)  # accelerate does so when it dispatches a model
    same(meta_gradient(interface, model), plain())
    offloaded = made(Net)
    hooks.add_hook_to_module(offloaded.b, hooks.AlignDevicesHook(execution_device="cpu", offload=True))
    with pytest.raises(ValueError, match="clone: parameters must be in memory, got a Linear that accelerate offloads"):
        learner(interface, offloaded)


def test_attributes_without_parameters_are_shared_and_later_ones_are_kept() -> None:
    model = made(Net)
    config, anchor = {"depth": [2]}, [torch.ones(3)]
    model.config, model.anchor = config, anchor
    clone = l2l.MAML(model, lr=LR).clone().module
    assert clone.config is config
    assert clone.anchor is anchor
    clone.anchor = list(clone.parameters())  # the initial parameters, as for a proximal term
    first = clone.anchor[0]
    l2l.update_module(clone, [torch.ones_like(p) for p in clone.parameters()])
    assert clone.anchor[0] is first is not clone.a.weight
    inherited = made(Parameters)
    copied = l2l.clone_module(l2l.clone_module(inherited))
    l2l.update_module(copied, [torch.ones_like(p) for p in copied.parameters()])
    assert copied.affine[0] is copied.b.weight
    assert inherited.affine[0] is inherited.b.weight


class Recomputing(nn.Module):
    """A model that recomputes its second layer in the backward, by a checkpoint."""

    def __init__(self, on: bool = True, reentrant: bool = False) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)
        self.on, self.reentrant, self.count, self.state = on, reentrant, 0, {"part": self.b, "h": None}

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        h = self.a(x).tanh()
        self.state["h"], self.last = h, self.b

        def tail(h: Tensor) -> Tensor:
            return self.b(h)

        return checkpoint(tail, h, use_reentrant=self.reentrant) if self.on else tail(h)


@pytest.mark.parametrize("interface", ["learn2learn", "GBML", "higher"])
@pytest.mark.parametrize("between", [False, True])
@pytest.mark.parametrize("first_order", [False, True])
def test_a_recomputed_forward_uses_the_weights_of_its_step(interface: str, between: bool, first_order: bool) -> None:
    if interface == "higher" and first_order:
        pytest.skip("its first order keeps no graph")
    same(meta_gradient(interface, made(Recomputing), between, first_order), plain(between, first_order))


def test_clone_module_refuses_to_recompute_a_forward_from_before_a_step() -> None:
    same(meta_gradient("clone_module", made(Recomputing), first_order=True), plain(first_order=True))
    for options in ({}, {"between": True}, {"between": True, "first_order": True}):
        with pytest.raises(
            RuntimeError, match=r"a forward from before a step must not be recomputed .* gradient_check"
        ):
            meta_gradient("clone_module", made(Recomputing), **options)


again = functools.partial(checkpoint, use_reentrant=False)


class Recomputed(torch.autograd.Function):
    """Recomputation by a Function of the user's own."""

    @staticmethod
    def forward(ctx: Any, run: Any, h: Tensor) -> Tensor:
        ctx.run, ctx.h = run, h
        return run(h)

    @staticmethod
    def backward(ctx: Any, ct: Tensor) -> Any:
        with torch.enable_grad():
            h = ctx.h.detach().requires_grad_()
            ctx.run(h).backward(ct)
        return None, h.grad


class Given(Net):
    """Applies its second layer by the function `way`, which may recompute: the code of the model does not show it."""

    def __init__(self, way: Any) -> None:
        super().__init__()
        self.way = way

    def head(self, h: Tensor) -> Tensor:
        return self.way(self.b, h)


class ByPartial(Net):
    def head(self, h: Tensor) -> Tensor:
        return again(self.b, h)


@pytest.mark.parametrize("interface", ["learn2learn", "higher"])
def test_every_way_to_recompute_is_exact_or_refused(interface: str) -> None:
    same(meta_gradient(interface, made(ByPartial)), plain())
    same(meta_gradient(interface, made(Given, again)), plain())
    same(meta_gradient(interface, made(Given, lambda part, h: checkpoint(part, h, use_reentrant=False))), plain())
    hidden = {"run": again}

    class Holder:
        def __call__(self, part: nn.Module, h: Tensor) -> Tensor:
            return hidden["run"](part, h)

    with pytest.raises(RuntimeError, match=r"clone: a forward from before a step must not be recomputed"):
        meta_gradient(interface, made(Given, Holder()))
    x, y = data()
    clone, step = learner(interface, made(Given, Recomputed.apply))
    early = F.cross_entropy(clone(x[1]), y[1])
    (clone.module if interface == "learn2learn" else clone).way = lambda part, h: part(h)
    step(F.cross_entropy(clone(x[0]), y[0]))
    with pytest.raises(RuntimeError, match=r"clone: a forward from before a step must not be recomputed"):
        early.backward()


@pytest.mark.parametrize("interface", ["learn2learn", "clone_module", "higher"])
def test_a_learner_in_a_checkpoint_is_refused_after_a_step(interface: str) -> None:
    x, y = data()
    model = made(Net)
    clone, step = learner(interface, model)

    def loss(i: int) -> Tensor:
        return F.cross_entropy(checkpoint(clone, x[i], use_reentrant=False), y[i])

    loss(1).backward()
    truth = torch.autograd.grad(F.cross_entropy(model(x[1]), y[1]), list(model.parameters()))
    same([p.grad for p in model.parameters()], truth)
    step(loss(0))
    with pytest.raises(RuntimeError, match=r"clone: a forward from before a step must not be recomputed"):
        loss(1).backward()


@pytest.mark.parametrize("interface", ["learn2learn", "higher"])
def test_other_methods_that_recompute_are_refused_in_a_meta_gradient(interface: str) -> None:
    class Encoder(Recomputing):
        def encode(self, x: Tensor) -> Tensor:
            return checkpoint(lambda x: self.b(self.a(x).tanh()), x, use_reentrant=False)

    x, y = data()
    clone, step = learner(interface, made(Encoder))
    for _ in range(STEPS):
        step(F.cross_entropy(clone.encode(x[0]), y[0]))
    with pytest.raises(RuntimeError, match=r"clone: a forward from before a step must not be recomputed"):
        F.cross_entropy(clone.encode(x[1]), y[1]).backward()


@pytest.mark.parametrize("interface", ["learn2learn", "GBML", "higher"])
def test_reentrant_checkpoints_are_refused(interface: str) -> None:
    with pytest.raises(RuntimeError, match=r"must not be reentrant, .* pass use_reentrant=False, .* or call gradient_"):
        meta_gradient(interface, made(Recomputing, True, True))


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable. is deprecated:FutureWarning")
@pytest.mark.parametrize("patched", [False, True])
@pytest.mark.parametrize("interface", ["learn2learn", "higher"])
@pytest.mark.parametrize("family", ["GPT2", "Llama"])
def test_gradient_checkpointing_of_hugging_face(family: str, interface: str, patched: bool) -> None:
    transformers = pytest.importorskip("transformers")
    sizes: dict[str, dict[str, int]] = {
        "GPT2": {"n_embd": 8, "n_layer": 2, "n_head": 2, "n_positions": 8, "bos_token_id": 0, "eos_token_id": 0},
        "Llama": {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2},
    }
    config = getattr(transformers, f"{family}Config")(
        vocab_size=20, use_cache=False, attn_implementation="eager", **sizes[family]
    )
    tokens, found = torch.randint(20, (2, 2, 7)), []
    for on in (False, True):
        torch.manual_seed(2)
        kind = "GPT2LMHeadModel" if family == "GPT2" else "LlamaForCausalLM"
        model = getattr(transformers, kind)(config).double().eval()
        model.train(on)  # it recomputes in training alone
        for part in model.modules():
            if isinstance(part, nn.Dropout):
                part.p = 0.0
        if patched:
            mk.patch(model)
        if on:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        clone, step = learner(interface, model)
        for _ in range(2):
            step(clone(input_ids=tokens[0], labels=tokens[0]).loss)
        clone(input_ids=tokens[1], labels=tokens[1]).loss.backward()
        found.append([p.grad for p in model.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("interface", ["learn2learn", "higher"])
def test_attributes_that_forward_sets_are_set_on_the_copy(interface: str) -> None:
    x, _ = data()
    model = made(Recomputing)
    clone, _ = learner(interface, model)
    copied = clone.module if interface == "learn2learn" else clone
    clone(x[0])
    clone(x[1])
    assert (copied.count, model.count) == (2, 0)
    assert torch.equal(copied.state["h"], copied.a(x[1]).tanh())
    assert copied.state["part"] is copied.b is copied.last
    assert model.state == {"part": model.b, "h": None}
    copied.on = False
    clone(x[0])
    assert copied.count == 3
    copied.eval()
    with torch.no_grad():
        clone(x[0])
    assert (copied.count, copied.b.training) == (4, False)


def test_a_recomputing_clone_is_freed_without_the_garbage_collector() -> None:
    x, y = data()
    gc.collect()
    gc.disable()
    try:
        clone, step = learner("learn2learn", made(Recomputing, False))
        clone.module.state = {}
        step(F.cross_entropy(clone(x[0]), y[0]))
        alive = weakref.ref(clone.module.a), weakref.ref(clone.module.a.weight)
        del clone, step
        assert [ref() for ref in alive] == [None, None]
    finally:
        gc.enable()


def test_copies_and_pickles_of_a_clone_are_ordinary_modules() -> None:
    x, y = data()
    clone, step = learner("clone_module", made(Recomputing))
    step(F.cross_entropy(clone(x[0]), y[0]))
    l2l.detach_module(clone, keep_requires_grad=True)
    clone.state.clear()
    for model in (copy.deepcopy(clone), pickle.loads(pickle.dumps(clone)), clone):
        for _ in range(2):
            F.cross_entropy(model(x[0]), y[0]).backward()
        assert all(p.grad is not None for p in model.parameters())


def test_parameters_of_functional_models_can_be_set() -> None:
    fmodel = higher.monkeypatch(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1, bias=False)))
    weight = torch.zeros(1, 2, requires_grad=True)
    fmodel[1].weight = weight
    assert len(fmodel._fast_params) == 2
    assert fmodel.fast_params[2] is fmodel[1].weight is weight
    assert torch.equal(fmodel(torch.ones(1, 2)), torch.zeros(1, 1))
    opt = higher.create_diff_optim(torch.optim.SGD, {"lr": 1.0}, fmodel=fmodel)
    opt.step(fmodel(torch.ones(1, 2)).sum())
    assert torch.equal(torch.autograd.grad(fmodel[1].weight.sum(), weight)[0], torch.ones(1, 2))
    with pytest.raises(TypeError, match="fmodel: weight must be a tensor, got NoneType"):
        fmodel[1].weight = None
    with pytest.raises(ValueError, match=r"fmodel: submodules must be set in the model before .* got '1' set later"):
        setattr(fmodel, "1", nn.Linear(2, 2))
    with pytest.raises(ValueError, match="fmodel: parameters must all be set before a single one is, got 'weight'"):
        higher.make_functional(nn.Linear(2, 1)).weight = weight
    with pytest.raises(
        ValueError, match=r"fmodel: parameters must be set in the functional model itself, got 'weight'"
    ):
        copy.deepcopy(higher.monkeypatch(nn.Linear(2, 1))).weight = weight


class Scaled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * F.gelu(x)


def test_only_patched_models_that_may_call_a_replaced_function_run_within_fused() -> None:
    layers = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
    assert surroundings(layers, False) is nullcontext
    mk.patch(layers)
    assert surroundings(layers, False) is where_small
    assert surroundings(layers, True) is fused
    for other in (nn.GELU(), nn.MultiheadAttention(4, 2), nn.Embedding(3, 3), nn.CrossEntropyLoss(), Scaled()):
        assert surroundings(nn.Sequential(layers, other), False) is fused_where_large
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
    assert surroundings(nn.Sequential(layers, normed), False) is fused_where_large
    layers[1].register_forward_hook(lambda module, args, y: F.gelu(y))
    assert surroundings(layers, False) is fused_where_large
