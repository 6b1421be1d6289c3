"""Models, losses, batches and changes between calls that the campaign draws, all from one seed.

A `World` is built twice from a seed, once for metakern and once for plain autograd: what metakern does to its model
cannot reach the other one. Every change is made to both.
"""

from __future__ import annotations

from collections import UserDict, namedtuple
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from random import Random
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from campaign_truth import Inner
from torch import Tensor, nn
from torch.nn.utils import parametrizations, weight_norm

import metakern as mk

D, H, L, C, V = 4, 6, 5, 3, 7  # features, hidden units, length, classes, tokens
ACTIVATIONS: tuple[type[nn.Module], ...] = (
    nn.Tanh,
    nn.Sigmoid,
    nn.GELU,
    nn.SiLU,
    nn.ReLU,
    nn.ELU,
    nn.LeakyReLU,
    nn.Softplus,
    nn.Mish,
    nn.PReLU,
)


# Models: each takes a batch of "vectors" [B, D], "images" [B, 2, 6, 6] or "tokens" [B, L], and returns [B, C] or,
# with `each`, a row for each position, [B, L, C].


def activation(r: Random) -> nn.Module:
    return r.choice(ACTIVATIONS)()


def norm(r: Random, channels: int, images: bool) -> nn.Module:
    batch_norm = partial(
        nn.BatchNorm2d if images else nn.BatchNorm1d,
        channels,
        affine=r.random() < 0.7,
        track_running_stats=r.random() < 0.6,
    )
    kinds: list[Callable[[], nn.Module]] = [nn.Identity, batch_norm, partial(nn.GroupNorm, 2, channels)]
    if images:
        kinds.append(partial(nn.InstanceNorm2d, channels, affine=r.random() < 0.5))
    else:
        kinds += [partial(nn.LayerNorm, channels), partial(nn.RMSNorm, channels), partial(nn.Dropout, 0.0)]
    return r.choice(kinds)()


class Recurrent(nn.Module):
    def __init__(self, r: Random, each: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(V, D, padding_idx=r.choice([None, 0]))
        kind, two = r.choice([nn.RNN, nn.GRU, nn.LSTM]), r.random() < 0.3
        self.layer = kind(D, H, num_layers=r.choice([1, 2]), bidirectional=two, batch_first=True)
        self.head = nn.Linear(H * (1 + two), C)
        self.each = each

    def forward(self, tokens: Tensor) -> Tensor:
        h, _ = self.layer(self.embedding(tokens))
        return self.head(h if self.each else h[:, -1])


class Attention(nn.Module):
    def __init__(self, r: Random, each: bool) -> None:
        super().__init__()
        self.embedding, self.position = nn.Embedding(V, H), nn.Parameter(torch.randn(L, H))
        self.qkv, self.head = nn.Linear(H, 3 * H), nn.Linear(H, C)
        self.each, self.causal = each, r.random() < 0.5

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embedding(tokens) + self.position[: tokens.shape[1]]
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(h).chunk(3, -1))
        h = h + F.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2).flatten(2)
        return self.head(h if self.each else h.mean(1))


class Transformer(nn.Module):
    def __init__(self, r: Random, each: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(V, H)
        self.layer = nn.TransformerEncoderLayer(
            H, 2, 8, dropout=0.0, activation=r.choice(["relu", "gelu"]), batch_first=True, norm_first=r.random() < 0.5
        )
        self.head, self.each = nn.Linear(H, C), each

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.layer(self.embedding(tokens))
        return self.head(h if self.each else h[:, 0])


class Tied(nn.Module):
    """The head is tied to the embedding; the first C of its V logits are used."""

    def __init__(self, r: Random, each: bool) -> None:
        super().__init__()
        self.embedding, self.mix, self.head = nn.Embedding(V, H), nn.Linear(H, H), nn.Linear(H, V, bias=False)
        self.head.weight = self.embedding.weight
        self.each = each

    def forward(self, tokens: Tensor) -> Tensor:
        h = torch.tanh(self.mix(self.embedding(tokens)))
        return self.head(h if self.each else h.mean(1))[..., :C]


class Raw(nn.Module):
    """Parameters without layers, one of the module and two in a ParameterDict, and a buffer."""

    def __init__(self, r: Random) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(D, H))
        self.more = nn.ParameterDict({"second": nn.Parameter(torch.randn(H, C)), "shift": nn.Parameter(torch.randn(C))})
        self.register_buffer("mix", torch.randn(D))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.einsum("bd,dh->bh", x * self.mix, self.first).sin()
        return h @ self.more["second"] + self.more["shift"]


class Residual(nn.Module):
    def __init__(self, r: Random) -> None:
        super().__init__()
        self.layers, self.head = nn.ModuleList(nn.Linear(D, D) for _ in range(2)), nn.Linear(D, C)
        self.acts = nn.ModuleDict({"0": activation(r), "1": activation(r)})
        self.register_buffer("gate", torch.rand(D), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        for i, layer in enumerate(self.layers):
            x = x + self.gate * self.acts[str(i)](layer(x))
        return self.head(x)


def perceptron(r: Random, each: bool) -> nn.Module:
    return nn.Sequential(nn.Linear(D, H), norm(r, H, False), activation(r), nn.Linear(H, C))


def linear(r: Random, each: bool) -> nn.Module:
    return nn.Linear(D, C, bias=r.random() < 0.7)


def convolution(r: Random, each: bool) -> nn.Module:
    pool = r.choice([nn.MaxPool2d(2), nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(3)])
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1), norm(r, 4, True), activation(r), pool, nn.Flatten(), nn.Linear(36, C)
    )


def parametrized(r: Random, each: bool) -> nn.Module:
    way = r.choice([weight_norm, parametrizations.weight_norm, parametrizations.orthogonal])
    return nn.Sequential(way(nn.Linear(D, H)), activation(r), nn.Linear(H, C))


BODIES: dict[Callable[..., nn.Module], str] = {
    linear: "vectors",
    perceptron: "vectors",
    parametrized: "vectors",
    lambda r, each: Raw(r): "vectors",  # type: ignore[misc]
    lambda r, each: Residual(r): "vectors",  # type: ignore[misc]
    convolution: "images",
    Recurrent: "tokens",
    Attention: "tokens",
    Transformer: "tokens",
    Tied: "tokens",
}


# Wrappers: each adds to a model something that batching or capture could get wrong.


class Wrapped(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.body(x))

    def after(self, h: Tensor) -> Tensor:
        return h


class Centered(Wrapped):
    on = True

    def after(self, h: Tensor) -> Tensor:
        return h - h.mean(0) if self.on else h


class CenteredInput(Wrapped):
    def forward(self, x: Tensor) -> Tensor:
        return self.body(x - x.mean(0) if x.is_floating_point() else x)


class Averaging(Wrapped):
    """A buffer that forward changes in training mode, which metakern refuses."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__(body)
        self.register_buffer("average", torch.zeros(()))

    def after(self, h: Tensor) -> Tensor:
        if self.training:
            self.average.mul_(0.9).add_(h.detach().square().mean() + 1, alpha=0.1)
        return h


class Flagged(Wrapped):
    """Subtracts the mean of the batch if a flag is set."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__(body)
        self.center = False

    def after(self, h: Tensor) -> Tensor:
        return h - h.mean(0) if self.center else h


class Training(Wrapped):
    def after(self, h: Tensor) -> Tensor:
        return h - h.mean(0) if self.training else h


class SizeDependent(Wrapped):
    def after(self, h: Tensor) -> Tensor:
        return h * 2 if h.shape[0] > 6 else h


class Scaled(Wrapped):
    def __init__(self, body: nn.Module) -> None:
        super().__init__(body)
        self.scale = 1.5

    def after(self, h: Tensor) -> Tensor:
        return h.tanh() * self.scale


class Threshold(Wrapped):
    """A number decides whether the mean of the batch is subtracted."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__(body)
        self.strength = 0.0

    def after(self, h: Tensor) -> Tensor:
        return h - self.strength * h.mean(0) if self.strength > 0 else h


class Configured(Wrapped):
    """A flag in a dictionary, or in an attribute of an object."""

    def __init__(self, body: nn.Module, plain: bool) -> None:
        super().__init__(body)
        self.config: Any = {"center": False} if plain else SimpleNamespace(center=False)

    def after(self, h: Tensor) -> Tensor:
        center = self.config["center"] if isinstance(self.config, dict) else self.config.center
        return h - h.mean(0) if center else h


class Acting(Wrapped):
    """Applies a function that is an attribute."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__(body)
        self.function: Callable[[Tensor], Tensor] = torch.tanh

    def after(self, h: Tensor) -> Tensor:
        return self.function(h)


class Keeping(Wrapped):
    def after(self, h: Tensor) -> Tensor:
        self.last = h
        return self.last * 1.5


class Counting(Wrapped):
    calls = 0

    def after(self, h: Tensor) -> Tensor:
        self.calls += 1
        return h


class Masking(Wrapped):
    """Multiplies by a tensor that is a plain attribute."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__(body)
        self.mask = torch.linspace(0.5, 1.5, C)

    def after(self, h: Tensor) -> Tensor:
        return h.tanh() * self.mask


class Buffered(Wrapped):
    def __init__(self, body: nn.Module) -> None:
        super().__init__(body)
        self.register_buffer("shift", torch.linspace(-0.5, 0.5, C))

    def after(self, h: Tensor) -> Tensor:
        return h + self.shift * h.sin()


class Reached(Wrapped):
    """Reaches the body through a list or a dictionary."""

    def __init__(self, body: nn.Module, named: bool) -> None:
        super().__init__(body)
        self.parts: Any = {"body": body} if named else [body]

    def forward(self, x: Tensor) -> Tensor:
        return self.parts["body" if isinstance(self.parts, dict) else 0](x)


class Dropping(Wrapped):
    def __init__(self, body: nn.Module, p: float) -> None:
        super().__init__(body)
        self.drop = nn.Dropout(p)

    def after(self, h: Tensor) -> Tensor:
        return self.drop(h)


def replaced(body: nn.Module) -> nn.Module:
    """Replace the forward of `body` by a closure."""
    forward = body.forward
    body.forward = lambda x: forward(x) * 0.7  # type: ignore[method-assign]
    return body


WRAPPERS: tuple[Callable[[nn.Module], nn.Module], ...] = (
    Centered,
    CenteredInput,
    Averaging,
    Flagged,
    Training,
    Training,
    SizeDependent,
    SizeDependent,
    Scaled,
    Threshold,
    partial(Configured, plain=True),
    partial(Configured, plain=False),
    Acting,
    Keeping,
    Counting,
    Masking,
    Buffered,
    partial(Reached, named=True),
    partial(Reached, named=False),
    partial(Dropping, p=0.0),
    replaced,
)


SHARP = (
    CenteredInput,
    CenteredInput,
    Averaging,
    Flagged,
    Training,
    Training,
    SizeDependent,
    Threshold,
    partial(Configured, plain=False),
    Acting,
    Keeping,
)


class Outer(Wrapped):
    """The outermost module: takes an optional second input, and returns a tensor, a tuple or a dictionary."""

    def __init__(self, body: nn.Module, gives: str, center: bool) -> None:
        super().__init__(body)
        self.gives, self.center, self.side = gives, center, nn.Linear(1, C)
        self.register_buffer("usual", torch.ones(1, 1))  # in place of `extra` where it is None, the same for all rows

    def forward(self, x: Tensor, extra: Tensor | None = None) -> Any:
        h = self.body(x)
        side = self.side(self.usual if extra is None else extra.unsqueeze(-1))
        h = h + side.view(-1, *(1,) * (h.dim() - 2), C)
        if extra is not None and self.center:
            h = h - (h * extra.view(-1, *(1,) * (h.dim() - 1))).mean(0)
        return {"tensor": h, "tuple": (h, x), "dict": {"logits": h}}[self.gives]


# Batches.

Pair = namedtuple("Pair", "x y mask", defaults=(None,))


@dataclass
class Example:
    x: Tensor
    y: Tensor
    mask: Tensor | None = None
    extra: Tensor | None = None


CONTAINERS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "tuple": lambda d: (d["x"], d["y"], d.get("mask")),
    "list": lambda d: [d["x"], d["y"], d.get("mask")],
    "pair": lambda d: (d["x"], d["y"]),
    "named": lambda d: Pair(d["x"], d["y"], d.get("mask")),
    "dict": dict,
    "user": UserDict,
    "example": lambda d: Example(d["x"], d["y"], d.get("mask"), d.get("extra")),
    "namespace": lambda d: SimpleNamespace(**d),
    "nested": lambda d: {"inputs": {"x": d["x"], "extra": d.get("extra")}, "targets": [d["y"]], "mask": d.get("mask")},
}


def fields(batch: Any) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Return x, y, mask and extra of a batch in any container; None for those that it lacks."""
    if isinstance(batch, tuple | list):
        x, y, mask = (*batch, None)[:3]
        return x, y, mask, None
    if isinstance(batch, Mapping | UserDict):
        if "inputs" in batch:
            return batch["inputs"]["x"], batch["targets"][0], batch["mask"], batch["inputs"]["extra"]
        return batch["x"], batch["y"], batch.get("mask"), batch.get("extra")
    return batch.x, batch.y, getattr(batch, "mask", None), getattr(batch, "extra", None)


@dataclass
class Drawn:
    """The tensors of a batch; `whole` and `task` put those of all tasks or of one into the container."""

    container: str
    tensors: dict[str, Tensor]
    others: dict[str, Any]

    def whole(self, dtype: torch.dtype) -> Any:
        moved = {name: t.to(dtype) if t.is_floating_point() else t.clone() for name, t in self.tensors.items()}
        return CONTAINERS[self.container]({**moved, **self.others})

    def task(self, t: int, dtype: torch.dtype) -> Any:
        """Return the batch of task t in float64, with values that are rounded to `dtype`."""
        alone = {
            name: (v[t].to(dtype).double() if v.is_floating_point() else v[t]).clone()
            for name, v in self.tensors.items()
        }
        return CONTAINERS[self.container]({**alone, **self.others})


@dataclass
class Sizes:
    """How batches are drawn; a run may change it between calls."""

    tasks: int
    support: int
    query: int
    container: str
    style: str
    length: int = L
    keys: dict[str, bool] = field(default_factory=lambda: {"mask": False, "extra": False, "ignored": False})


def batch(r: Random, data: str, each: bool, sizes: Sizes, rows: int, query: bool) -> Drawn:
    g = torch.Generator().manual_seed(r.getrandbits(32))
    T, B, N = sizes.tasks, rows, sizes.length
    if data == "tokens":
        x = torch.randint(V, (T, B, N), generator=g)
    else:
        x = torch.randn(T, B, *{"vectors": (D,), "images": (2, 6, 6)}[data], generator=g, dtype=torch.float64)
    y = torch.randint(C, (T, B, N) if each else (T, B), generator=g)
    if sizes.style == "equal":
        x, y = x[:1].expand_as(x).clone(), y[:1].expand_as(y).clone()
    elif sizes.style in ("zeros", "constant"):
        x, y = torch.full_like(x, float(sizes.style == "constant")), torch.zeros_like(y)
    elif sizes.style == "whole" and data != "tokens":
        x = x.round()
    tensors, others = {"x": x, "y": y}, dict[str, Any]()
    if sizes.keys["mask"]:
        tensors["mask"] = (torch.rand(y.shape, generator=g) < 0.7).double()
    if sizes.keys["extra"] and query:
        tensors["extra"] = torch.rand(T, B, generator=g, dtype=torch.float64)
    if sizes.keys["ignored"]:
        y[torch.rand(y.shape, generator=g) < 0.3] = -100
    if sizes.container in ("dict", "user", "namespace") and r.random() < 0.3:
        others = {"note": r.choice(["a", "b"]), "none": None, "number": 3}
    return Drawn(sizes.container, tensors, others)


# Losses.


class Criterion(nn.Module):
    """A loss with a parameter, and a factor that is a plain attribute."""

    def __init__(self, base: Callable[..., Tensor]) -> None:
        super().__init__()
        self.weight, self.base, self.factor = nn.Parameter(torch.linspace(0.5, 1.5, C)), base, 1.0

    def forward(self, model: nn.Module, batch: Any) -> Tensor:
        return self.base(model, batch, lambda h: h * self.weight * self.factor)


class Task:
    """A loss that is a bound method."""

    def __init__(self, base: Callable[..., Tensor]) -> None:
        self.base, self.factor = base, 1.0

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return self.factor * self.base(model, batch)


def scores(model: nn.Module, x: Tensor, extra: Tensor | None) -> Tensor:
    out = model(x) if extra is None else model(x, extra=extra)
    return out["logits"] if isinstance(out, dict) else out[0] if isinstance(out, tuple) else out


def compared(kind: str, h: Tensor, y: Tensor, mask: Tensor | None) -> Tensor:
    """Return the mean loss of scores [..., C] for classes y [...]."""
    h, y = h.reshape(-1, C), y.reshape(-1)
    if kind == "cross entropy":
        each = F.cross_entropy(h, y, reduction="none")
    elif kind == "weighted":
        return F.cross_entropy(h, y, weight=torch.linspace(0.5, 2.0, C).to(h))
    elif kind == "smooth":
        return F.cross_entropy(h, y, label_smoothing=0.1)
    elif kind == "plain":
        return F.cross_entropy(h, y)
    else:
        target = (y.unsqueeze(-1) == torch.arange(C)).to(h)
        function = F.mse_loss if kind == "squares" else F.binary_cross_entropy_with_logits
        each = function(h, target, reduction="none").mean(-1)
    if mask is None:
        return each.mean()
    mask = mask.reshape(-1).to(h)
    return (each * mask).sum() / mask.sum().clamp(min=1.0)


def base_loss(kind: str, more: str, model: nn.Module, batch: Any, change: Callable[[Tensor], Tensor] | None) -> Tensor:
    x, y, mask, extra = fields(batch)
    if more == "input gradient":
        x = x.detach().requires_grad_()
    h = scores(model, x, extra)
    value = compared(kind, h if change is None else change(h), y, mask)
    if more == "decay":
        value = value + 0.1 * torch.stack([p.square().sum() for p in model.parameters()]).sum()
    elif more == "twice":
        value = value + 0.5 * compared("squares", scores(model, x, None).tanh(), y, mask)
    elif more == "detached":
        value = value + F.mse_loss(h, scores(model, x, extra).detach() + 0.5)
    elif more == "input gradient":
        (slope,) = torch.autograd.grad(h.sin().sum(), x, create_graph=True)
        value = value + 0.1 * slope.square().sum()
    elif more == "invariance":
        scale = torch.ones((), dtype=h.dtype, requires_grad=True)
        (slope,) = torch.autograd.grad(compared(kind, h * scale, y, mask), scale, create_graph=True)
        value = value + slope.square()
    return value


@dataclass
class Lossy:
    """A loss, its leaves that are learned in the outer loop, and the object that holds its state."""

    function: Callable[..., Tensor]
    leaves: list[Tensor]
    holder: Any = None


def loss(r: Random, data: str) -> Lossy:
    kind = r.choice(["cross entropy", "plain", "plain", "weighted", "smooth", "squares", "binary"])
    rare = ["decay", "twice", "detached", "invariance", *(["input gradient"] if data != "tokens" else [])]
    more = r.choice(rare) if r.random() < 0.25 else ""
    form = r.choice(["closure", "partial", "method", "module", "temperature", "teacher"])

    def base(model: nn.Module, batch: Any, change: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        return base_loss(kind, more, model, batch, change)

    if form == "partial":
        return Lossy(partial(base, change=torch.tanh), [])
    if form == "method":
        task = Task(base)
        return Lossy(task.loss, [], task)
    if form == "module":
        criterion = Criterion(base)
        return Lossy(criterion, list(criterion.parameters()), criterion)
    if form == "temperature":
        temperature = nn.Parameter(torch.tensor(1.3))
        return Lossy(lambda model, batch: base(model, batch, lambda h: h * temperature), [temperature])
    if form == "teacher":
        teacher = nn.Linear(C, C).requires_grad_(False)
        return Lossy(lambda model, batch: base(model, batch, lambda h: h + 0.1 * teacher(h)), [], teacher)
    return Lossy(lambda model, batch: base(model, batch), [])


def inner(r: Random) -> Inner:
    kind = r.choice(["SGD", "SGD", "SGD", "Adam", "AdamW", "RMSprop", "Adagrad", "NormalizedSGD"])
    numbers: dict[str, float] = {"lr": r.choice([0.05, 0.1, 0.3])}
    options: dict[str, Any] = {}
    if kind in ("Adam", "AdamW"):
        numbers |= {"beta1": 0.8, "beta2": 0.9, "eps": 0.05}
    elif kind == "RMSprop":
        numbers |= {"alpha": 0.8, "eps": 0.05}
    elif kind == "Adagrad":
        numbers |= {"eps": 0.05}
    if r.random() < 0.4 or kind == "AdamW":
        numbers["weight_decay"] = 0.1
    if kind in ("SGD", "NormalizedSGD", "RMSprop") and r.random() < 0.4:
        numbers["momentum"] = 0.7
        if kind != "RMSprop":
            options["nesterov"] = r.random() < 0.5
    if kind == "NormalizedSGD":
        options["norm"] = r.choice(["all", "parameter"])
    learn: tuple[str, ...] = ()
    if r.random() < 0.4:
        learn = tuple(n for n in numbers if n in ("lr", "weight_decay", "momentum") and (n == "lr" or r.random() < 0.4))
    per, steps = (r.choice(["all", "parameter", "element"]), r.choice([None, None, 2])) if learn else ("all", None)
    clip = r.choice([None, None, None, 0.5])
    # In the order of the names of the `mk.optim` optimizer.
    order = [n for n in ORDER[kind] if n in numbers]
    return Inner(
        kind, {n: numbers[n] for n in order}, learn, per, steps, options, clip, clip is not None and r.random() < 0.5
    )


ORDER = {
    "SGD": ("lr", "weight_decay", "momentum"),
    "NormalizedSGD": ("lr", "weight_decay", "momentum"),
    "Adam": ("lr", "beta1", "beta2", "eps", "weight_decay"),
    "AdamW": ("lr", "beta1", "beta2", "eps", "weight_decay"),
    "RMSprop": ("lr", "alpha", "eps", "weight_decay", "momentum"),
    "Adagrad": ("lr", "eps", "weight_decay"),
}


class World:
    """A model, a loss and an inner optimizer, drawn from a seed; `ours` says whether it is the world for metakern."""

    def __init__(self, seed: int, ours: bool) -> None:
        r = Random(seed)
        torch.manual_seed(seed)
        self.ours, self.dtype = ours, torch.float64
        self.sharp = r.random() < 0.5  # a small model in which every change shows at once
        body = r.choice([linear, perceptron] if self.sharp else list(BODIES))
        self.data, self.each = BODIES[body], BODIES[body] == "tokens" and r.random() < 0.4
        model = body(r, self.each)
        wrappers = [r.choice(WRAPPERS) for _ in range(r.choice([0, 1, 1, 2, 3]))]
        wrappers = [r.choice(SHARP)] if self.sharp else wrappers
        for wrapper in wrappers:
            model = wrapper(model)
        self.draws = (
            r.random() < 0.1 and not self.sharp
        )  # dropout draws as in plain autograd only in a loop over one task
        if self.draws:
            model = Dropping(model, 0.5)
        model = Outer(model, r.choice(["tensor", "tensor", "tuple", "dict"]), r.random() < 0.7)
        self.names = [type(m).__name__ for m in model.modules()]
        adaptable = r.random()
        layers = [n for n, m in model.named_modules() if type(m) is nn.Linear and "forward" not in vars(m)]
        self.model, self.extra = model, ""
        tied = len({id(m.weight) for m in model.modules() if isinstance(m, nn.Linear | nn.Embedding)})
        loose = tied == sum(isinstance(m, nn.Linear | nn.Embedding) for m in model.modules())
        parametrized = body is globals()["parametrized"]
        if adaptable < 0.1 and layers and loose and not parametrized and body is not Transformer:
            self._lora(layers, r.randrange(2**30))
        elif adaptable < 0.25:
            self.extra = "patch"
            if ours:
                mk.patch(model)
        for name, p in model.named_parameters():
            with torch.no_grad():
                p.add_(0.1 * normal(p, f"{seed} {name}"))
        model.train(r.random() < 0.5)
        self.loss = loss(r, self.data)
        self.inner = inner(r)
        self.adapt: Callable[[str], bool] | None = r.choice([None, None, None, half])
        if self.extra == "lora" or not any(half(name) for name, _ in model.named_parameters()):
            self.adapt = None
        self.steps, self.first_order = r.choice([0, 1, 1, 2, 3]), r.random() < 0.15

    def adapted(self) -> dict[str, nn.Parameter]:
        """Return the parameters that the inner loop changes, by name."""
        named = self.model.named_parameters()
        return {n: p for n, p in named if p.requires_grad and (self.adapt is None or self.adapt(n))}

    def _lora(self, linear: list[str], seed: int) -> None:
        """Add LoRA to the layers; in the world for plain autograd, compute it by its formula."""
        self.extra = "lora"
        mk.lora(self.model, rank=2, alpha=3.0, targets=linear, seed=seed)
        if self.ours:
            return
        for name in linear:
            layer: Any = self.model.get_submodule(name)

            def forward(x: Tensor, layer: Any = layer) -> Tensor:
                return F.linear(x, layer.weight, layer.bias) + 1.5 * (x @ layer.lora_A.mT) @ layer.lora_B.mT

            layer.forward = forward

    def rounded(self, dtype: torch.dtype) -> None:
        """Convert the model and the loss to `dtype`; for plain autograd, round their values to it and keep float64."""
        self.dtype = dtype
        modules = [self.model, *([self.loss.holder] if isinstance(self.loss.holder, nn.Module) else [])]
        for root in modules:
            root.to(dtype)
            for module in root.modules():
                if isinstance(mask := vars(module).get("mask"), Tensor):
                    module.mask = mask.to(dtype)  # type: ignore[assignment]
        for leaf in self.loss.leaves:
            leaf.data = leaf.data.to(dtype)
        if not self.ours:
            for root in modules:
                root.double()
                for module in root.modules():
                    if isinstance(mask := vars(module).get("mask"), Tensor):
                        module.mask = mask.double()  # type: ignore[assignment]
            for leaf in self.loss.leaves:
                leaf.data = leaf.data.double()


def half(name: str) -> bool:
    """Return whether `adapt` takes a parameter: it takes about two thirds, by the letters of their names."""
    return sum(map(ord, name)) % 3 != 0


def normal(like: Tensor, seed: str) -> Tensor:
    generator = torch.Generator().manual_seed(Random(seed).getrandbits(40))
    return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)


# Changes between calls. Each gets a random generator with the same seed in both worlds.

Change = Callable[[World, Random], None]


def parts(world: World, *kinds: type[nn.Module]) -> list[nn.Module]:
    return [m for m in world.model.modules() if isinstance(m, kinds)]


def weights(world: World, r: Random) -> None:
    with torch.no_grad():
        seed, way = r.random(), r.choice(["in place", "load", "new"])
        values = {name: p + 0.1 * normal(p, f"{seed} {name}") for name, p in world.model.named_parameters()}
        if way == "load":
            world.model.load_state_dict(values, strict=False)
        for name, p in world.model.named_parameters():
            if way == "in place":
                p.copy_(values[name])
            elif way == "new" and not parts(world, Tied, nn.RNNBase):
                module, _, attribute = name.rpartition(".")
                owner = world.model.get_submodule(module)
                setattr(owner, attribute, nn.Parameter(values[name], requires_grad=p.requires_grad))


def mode(world: World, r: Random) -> None:
    world.model.train(not world.model.training)


def mode_of_one(world: World, r: Random) -> None:
    module = r.choice(list(world.model.modules()))
    module.train(not module.training)


def flag(world: World, r: Random) -> None:
    for module in parts(world, Flagged, Centered):
        name = "center" if isinstance(module, Flagged) else "on"
        setattr(module, name, not getattr(module, name))


def number(world: World, r: Random) -> None:
    for module in world.model.modules():
        for name, value in (("scale", 2.5), ("strength", 0.5), ("negative_slope", 0.3), ("alpha", 0.6), ("eps", 1e-2)):
            if isinstance(vars(module).get(name), float) and not isinstance(module, mk.nn.LoraLinear):
                setattr(module, name, value)


def config(world: World, r: Random) -> None:
    for module in parts(world, Configured):
        if isinstance(module.config, dict):
            module.config["center"] = not module.config["center"]
        else:
            module.config.center = not module.config.center


def function(world: World, r: Random) -> None:
    other = r.choice([torch.sin, centered])
    for module in parts(world, Acting):
        module.function = other


def centered(h: Tensor) -> Tensor:
    return h - h.mean(0)


def tensor(world: World, r: Random) -> None:
    way = r.random() < 0.5
    for module in parts(world, Masking, Buffered, Residual, Raw):
        name = next(n for n in ("mask", "shift", "gate", "mix") if hasattr(module, n))
        if way:
            getattr(module, name).mul_(1.7)
        else:
            setattr(module, name, getattr(module, name) * 1.7)


def activations(world: World, r: Random) -> None:
    """Replace each activation by another module, or its forward."""
    way = r.choice(["module", "forward", "centered"])
    for module in list(world.model.modules()):
        for name, child in list(module._modules.items()):
            if isinstance(child, ACTIVATIONS) and not isinstance(child, nn.PReLU):
                if way == "module":
                    module._modules[name] = nn.Softsign()
                else:
                    child.forward = torch.sin if way == "forward" else centered  # type: ignore[method-assign]


def body_forward(world: World, r: Random) -> None:
    body: Any = world.model.body
    forward = body.forward
    body.forward = lambda x: forward(x) - forward(x).mean(0)


def frozen(world: World, r: Random) -> None:
    if world.extra == "lora" or world.inner.per != "all":
        return
    named = dict(world.model.named_parameters())
    for name in r.sample(sorted(named), len(named) // 2):
        named[name].requires_grad_(not named[name].requires_grad)
    adapted = [p for name, p in named.items() if world.adapt is None or world.adapt(name)]
    if not any(p.requires_grad for p in adapted):
        adapted[0].requires_grad_()
    if world.adapt is not None:
        for p in adapted:
            p.requires_grad_()


def other_loss(world: World, r: Random) -> None:
    world.loss = loss(r, world.data)


def attribute_of_loss(world: World, r: Random) -> None:
    if isinstance(world.loss.holder, Criterion | Task):
        world.loss.holder.factor *= 1.5


def other_inner(world: World, r: Random) -> None:
    world.inner = inner(r)


def steps(world: World, r: Random) -> None:
    world.steps = (world.steps + 1) % 4


def order(world: World, r: Random) -> None:
    world.first_order = not world.first_order


def dtype(world: World, r: Random) -> None:
    world.rounded(torch.float32 if world.dtype == torch.float64 else torch.float64)


def nothing(world: World, r: Random) -> None:
    """No change: only the batch is another one."""


# Each change with the kinds of modules that it concerns: it is drawn for models that have one of them.
CHANGES: dict[Change, tuple[type[nn.Module], ...]] = {
    nothing: (nn.Module,),
    weights: (nn.Module,),
    mode: (Training, nn.modules.batchnorm._NormBase, Averaging),
    mode_of_one: (nn.Module,),
    flag: (Flagged, Centered),
    number: (Scaled, Threshold, nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase, nn.LeakyReLU, nn.ELU),
    config: (Configured,),
    function: (Acting,),
    tensor: (Masking, Buffered, Residual, Raw),
    activations: tuple(kind for kind in ACTIVATIONS if kind is not nn.PReLU),
    body_forward: (nn.Module,),
    frozen: (nn.Module,),
    other_loss: (nn.Module,),
    attribute_of_loss: (nn.Module,),
    other_inner: (nn.Module,),
    steps: (nn.Module,),
    order: (nn.Module,),
    dtype: (nn.Module,),
}


def change(world: World, r: Random) -> Change:
    """Draw a change that concerns the model; those that concern few models are as likely as all others together."""
    rare = [c for c, kinds in CHANGES.items() if nn.Module not in kinds and parts(world, *kinds)]
    common = [c for c, kinds in CHANGES.items() if nn.Module in kinds]
    if world.sharp and not rare and r.random() < 0.6:
        return nothing
    return r.choice(rare if rare and (world.sharp or r.random() < 0.5) else common)
