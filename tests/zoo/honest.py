"""Models whose gradient is exact on every path, although their code looks suspicious."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import metakern as mk
from zoo.cases import Act, Case, D, SavesInput, case, squared
from zoo.lossy import NumpyCube

HONEST: dict[str, Callable[[], Case]] = {}


def honest(make: Callable[[], Case]) -> Callable[[], Case]:
    """Register a case by its function's name."""
    HONEST[make.__name__] = make
    return make


@honest
def weight_norm() -> Case:
    """PyTorch's fused CPU kernel has a wrong double backward; metakern replaces it by plain operations."""
    return case(parametrizations.weight_norm(nn.Linear(D, D)))


def register(name: str, *middle: Callable[[], nn.Module]) -> None:
    """Register a case under a name: `zoo.case` with a new module from each function in `middle`."""

    def make() -> Case:
        return case(*(m() for m in middle))

    HONEST[name] = make


class ExactCube(SavesInput):
    @staticmethod
    def backward(ctx: Any, ct: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return ct * (3 * x**2 + 1)


class NoBackwardNeeded(nn.Module):
    """A mask and an index, computed without a graph: their exact derivative is zero."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            mask = (x > 0.1).to(x.dtype)
        return x * mask + x.detach().argmax(-1, keepdim=True)


class Stable(nn.Module):
    """A softmax whose shift is detached: the shift has no effect on the result."""

    def forward(self, x: Tensor) -> Tensor:
        e = (x - x.detach().amax(-1, keepdim=True)).exp()
        return e / e.sum(-1, keepdim=True)


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(lambda x: self.layer(x).tanh(), x, use_reentrant=False)


class Counting(nn.Module):
    """A counter and a buffer that forward changes, and noise that depends on the counter."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.history = 0, torch.zeros(())
        self.register_buffer("mean", torch.zeros(D))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.mean.mul_(0.9).add_(0.1 * x.detach().mean(0))
        return x + 0.1 * torch.randn_like(x) / self.calls


class Cast(nn.Module):
    """A norm that computes in float32 whatever the dtype of its input, as in many models."""

    def forward(self, x: Tensor) -> Tensor:
        y = x.float()
        return (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


class Recurrent(nn.Module):
    def __init__(self, kind: Callable[..., nn.Module]) -> None:
        super().__init__()
        self.cell = kind(D, D, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.cell(x.unsqueeze(0))[0].squeeze(0)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(D, D), nn.Linear(D, D)
        self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).tanh())


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(D, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = x.unsqueeze(0)
        return self.attend(x, x, x, need_weights=False)[0].squeeze(0)


class Pooled(nn.Module):
    """ReLU, then a maximum over windows, where many values are tied at zero."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool1d(self.conv(x.unsqueeze(1)).relu(), 2).flatten(1)


class Zeroed(nn.Module):
    """A branch with a scale of zero at the start, as in LoRA and in residual networks."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.scale = nn.Linear(D, D, bias=False), nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.layer(x).relu()


class Scan(nn.Module):
    """A loop over columns with in-place writes that autograd records."""

    def forward(self, x: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        y[:, 0] = x[:, 0]
        for i in range(1, x.shape[1]):
            y[:, i] = 0.5 * y[:, i - 1].clone() + x[:, i] ** 2 / math.sqrt(D)
        return y


class Masked(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        scores = (x @ x.T).masked_fill(torch.ones(len(x), len(x)).triu(1).bool(), -torch.inf)
        return scores.softmax(-1) @ x


class Experts(nn.Module):
    """A mixture of experts: the choice of experts has no derivative, their weights have one."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.experts = nn.Linear(D, 4), nn.ModuleList(nn.Linear(D, D) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x).topk(2, -1)
        weights, y = weights.softmax(-1), torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            row, column = (chosen == number).nonzero(as_tuple=True)
            y = y.index_add(0, row, weights[row, column, None] * expert(x[row]).relu())
        return y


class CalledOften(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.layer(x), self.layer(x[:2])
        return a * b.mean() + self.layer(a)


class Generated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.generator, self.layer = nn.Linear(D, D * D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        weights = {"weight": self.generator(x.mean(0)).view(D, D), "bias": self.layer.bias}
        return torch.func.functional_call(self.layer, weights, (x,)).tanh()


class UntilConverged(nn.Module):
    """A loop whose number of rounds depends on `.item()`; nothing else does."""

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(100):
            y = x - x.logsumexp(-1, keepdim=True)
            y = y - y.logsumexp(-2, keepdim=True)
            change, x = (y - x).abs().max().item(), y
            if change < 1e-9:
                break
        return x.exp()


class Implicit(Function):
    """Solves x = y + y³ for y by Newton's method; the backward applies the Function again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        y = torch.zeros_like(x)
        for _ in range(40):
            y = y - (y + y**3 - x) / (1 + 3 * y**2)
        return y

    @staticmethod
    def backward(ctx: Any, ct: Tensor) -> Tensor:
        return ct / (1 + 3 * Implicit.apply(*ctx.saved_tensors) ** 2)


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(D, 2, 8, dropout=0.2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.unsqueeze(0)).squeeze(0)


register("masked_attention", Masked)
register("mixture_of_experts", Experts)
register("called_often", CalledOften)
register("hypernetwork", Generated)
register("until_converged", UntilConverged)
register("implicit_function", lambda: Act(Implicit.apply))
register("transformer_layer", Encoder)
register("batch_norm_in_training", lambda: nn.BatchNorm1d(D))
register(
    "wide_relu", lambda: nn.Linear(D, 1024), nn.ReLU, lambda: nn.Linear(1024, 256), nn.ReLU, lambda: nn.Linear(256, D)
)
register("fft", lambda: Act(lambda x: torch.fft.rfft(x, n=2 * D - 2).abs()))
register("eigenvalues", lambda: Act(lambda x: x * torch.linalg.eigvalsh(x.T @ x + torch.arange(D).to(x).diag())))
register("products_with_zeros", nn.ReLU, lambda: Act(lambda x: x + x.cumprod(-1) + x.prod(-1, keepdim=True)))
register("relu", nn.ReLU)
register("relu_in_place", lambda: nn.Linear(D, D), lambda: nn.ReLU(inplace=True))
register(
    "kinks", nn.Hardtanh, nn.LeakyReLU, nn.PReLU, lambda: Act(torch.abs), lambda: Act(lambda x: x.clamp(-0.2, 0.3))
)
register("max_pool", Pooled, lambda: nn.Linear(12, D))
register("maxima", lambda: Act(lambda x: x.sort(-1)[0] + x.amax(-1, keepdim=True) + x.median(-1, keepdim=True)[0]))
register("dropout", lambda: nn.Dropout(0.4), nn.SiLU)
register("tied_weights", Tied)
register("checkpoint_without_reentry", Checkpointed)
register("layer_norm", lambda: nn.LayerNorm(D), nn.GELU)
register("batch_norm_in_evaluation", lambda: nn.BatchNorm1d(D).eval())
register("lstm", lambda: Recurrent(nn.LSTM))
register("gru_of_metakern", lambda: Recurrent(mk.nn.GRU))
register("attention", Attention)
register("exact_function", lambda: Act(ExactCube.apply))
register("masks_without_gradient", NoBackwardNeeded)
register("detached_shift", Stable)
register("counters_and_noise", Counting)
register("norm_in_float32", Cast)
register("zero_initialized", Zeroed)
register("scan", Scan)
register("piecewise_constant", lambda: Act(lambda x: x * x.sign() + x.round()))


@honest
def fused_ops_of_metakern() -> Case:
    made = case(nn.LayerNorm(D), nn.GELU(), nn.Linear(D, D), nn.SiLU())
    mk.patch(made.model)
    return made


@honest
def embedding() -> Case:
    model = nn.Sequential(nn.Embedding(9, D), nn.Flatten(), nn.Linear(4 * D, 3)).double()
    support, query = ((torch.randint(9, (2, 5, 4)), torch.randn(2, 5, 3).double()) for _ in range(2))
    return Case(model, squared, support, query)


@honest
def gpt() -> Case:
    from metakern.dialogue.models import build_model

    model = build_model("gpt", 11, width=8, heads=2, max_length=6)
    support, query = ({"input_ids": torch.randint(11, (2, 3, 6))} for _ in range(2))
    support, query = ({**batch, "labels": batch["input_ids"]} for batch in (support, query))
    return Case(model, mk.losses.causal_lm, support, query)


@honest
def frozen_and_unused() -> Case:
    made = case(nn.Linear(D, D), nn.Tanh())
    made.model.register_parameter("unused", nn.Parameter(torch.randn(2).double()))
    made.model[0].weight.requires_grad_(False)
    return made


@honest
def detached_target() -> Case:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        return F.mse_loss(model(batch[0]), batch[1].detach().data) + 0.01 * float(batch[1].mean())

    return case(loss=loss)


@honest
def opaque_body_under_an_adapted_head() -> Case:
    """Only the head is adapted, as in ANIL, so that the body needs no second derivative."""
    return case(Act(NumpyCube.apply), adapt=["3"])
