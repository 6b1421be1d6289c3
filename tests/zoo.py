"""Models for the doctor: those that lose derivatives, each in its own way, and honest ones that look suspicious.

A model is a `Case`: what it is, a loss, and batches of two tasks. `LOSSY` has beside each the kind and the name, of a
Function, operation or line, that the doctor has to find.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import metakern as mk
from metakern import native

D = 6


class Case(NamedTuple):
    model: nn.Module
    loss: Callable[[nn.Module, Any], Tensor]
    support: Any
    query: Any
    options: dict[str, Any] = {}  # noqa: RUF012, never written to


LOSSY: dict[str, tuple[Callable[[], Case], str, str]] = {}
HONEST: dict[str, Callable[[], Case]] = {}


def lossy(kind: str, op: str = "") -> Callable[[Callable[[], Case]], Callable[[], Case]]:
    def register(make: Callable[[], Case]) -> Callable[[], Case]:
        LOSSY[make.__name__] = make, kind, op
        return make

    return register


def honest(make: Callable[[], Case]) -> Callable[[], Case]:
    HONEST[make.__name__] = make
    return make


def squared(model: nn.Module, batch: Any) -> Tensor:
    return F.mse_loss(model(batch[0]), batch[1])


def case(*middle: nn.Module, loss: Callable[[nn.Module, Any], Tensor] = squared, **options: Any) -> Case:
    """A layer, what is in question, and a layer."""
    model = nn.Sequential(nn.Linear(D, D), nn.Tanh(), *middle, nn.Linear(D, 3)).double()
    support, query = ((torch.randn(2, 5, D).double(), torch.randn(2, 5, 3).double()) for _ in range(2))
    return Case(model, loss, support, query, options)


class Act(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Gated(nn.Module):
    """A gate of the input, by a function of its own layer's output."""

    def __init__(self, gate: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.gate = nn.Linear(D, D), gate

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(torch.sigmoid(self.layer(x)))


class _Saving(Function):
    """What most Functions have in common."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3 + x


# Kernels in a backward: nothing is raised, curvature is lost.


class NumpyCube(_Saving):
    @staticmethod
    def backward(ctx: Any, ct: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return ct * torch.from_numpy(3 * x.detach().numpy() ** 2 + 1)


class NativeGelu(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return F.gelu(x, approximate="tanh")

    @staticmethod
    def backward(ctx: Any, ct: Tensor) -> Tensor:
        return native.call("gelu_tanh_jvp", *ctx.saved_tensors, ct)[0]  # type: ignore[return-value]


class TritonSilu(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return F.silu(x)

    @staticmethod
    def backward(ctx: Any, ct: Tensor) -> Tensor:
        from metakern.ops.silu.triton import RULES

        return RULES.vjp(None, ctx.saved_tensors, (), (ct,))[0]


class NumpyFlip(Function):
    """Linear: its own curvature is zero, what is lost is that of what follows."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.flip(-1)

    @staticmethod
    def backward(ctx: Any, ct: Tensor) -> Tensor:
        return torch.from_numpy(ct.detach().numpy()[..., ::-1].copy())


class OnceCube(_Saving):
    @staticmethod
    @once_differentiable
    def backward(ctx: Any, ct: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return ct * (3 * x**2 + 1)


class NoGradCube(_Saving):
    @staticmethod
    def backward(ctx: Any, ct: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        with torch.no_grad():
            return ct * (3 * x**2 + 1)


class DetachedCube(_Saving):
    """The cotangent keeps its graph, the input does not."""

    @staticmethod
    def backward(ctx: Any, ct: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return ct * (3 * x.detach() ** 2 + 1)


class NonTensorCube(Function):
    """Saved on the context as a plain attribute under forward's no_grad."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.slope = 3 * x**2 + 1
        return x**3 + x

    @staticmethod
    def backward(ctx: Any, ct: Tensor) -> Tensor:
        return ct * ctx.slope


class _CubeSlope(Function):
    """ct (3 x² + 1), whose own backward has 3 x for 6 x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ct: Tensor) -> Tensor:
        ctx.save_for_backward(x, ct)
        return ct * (3 * x**2 + 1)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        x, ct = ctx.saved_tensors
        return 3 * x * ct * g, (3 * x**2 + 1) * g


class HalfCube(_Saving):
    @staticmethod
    def backward(ctx: Any, ct: Tensor) -> Tensor:
        return _CubeSlope.apply(*ctx.saved_tensors, ct)


class ZeroTangentCube(_Saving):
    """Right in reverse; its forward mode gives zeros."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:  # type: ignore[override]
        return x**3 + x

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, ct: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return ct * (3 * x**2 + 1)

    @staticmethod
    def jvp(ctx: Any, t_x: Tensor) -> Tensor:
        return torch.zeros_like(t_x)


class TwoInputs(Function):
    """No gradient for the second input, though the value depends on it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        return x * scale

    @staticmethod
    def backward(ctx: Any, ct: Tensor) -> tuple[Tensor, None]:
        return ct * ctx.saved_tensors[0], None


class SignThrough(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sign()

    @staticmethod
    def backward(ctx: Any, ct: Tensor) -> Tensor:
        return ct


class Reversed(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, ct: Tensor) -> Tensor:
        return -ct


class DoubledSine(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx: Any, ct: Tensor) -> Tensor:
        return 2 * ct * ctx.saved_tensors[0].cos()


@torch.library.custom_op("metakern_zoo::bare", mutates_args=())
def bare(x: Tensor) -> Tensor:
    return x.sin()


@torch.library.custom_op("metakern_zoo::shallow", mutates_args=())
def shallow(x: Tensor) -> Tensor:
    return x.sin()


@torch.library.custom_op("metakern_zoo::shallow_slope", mutates_args=())
def shallow_slope(x: Tensor, ct: Tensor) -> Tensor:
    return x.cos() * ct


shallow.register_autograd(
    lambda ctx, ct: shallow_slope(ctx.saved_tensors[0], ct),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


@lossy("opaque backward", "NumpyCube")
def numpy_kernel() -> Case:
    return case(Act(NumpyCube.apply))


@lossy("opaque backward", "NativeGelu")
def pybind_kernel() -> Case:
    return case(Act(NativeGelu.apply))


@lossy("opaque backward", "TritonSilu")
def triton_kernel() -> Case:
    return case(Act(TritonSilu.apply))


@lossy("opaque backward", "NumpyFlip")
def linear_kernel() -> Case:
    return case(Act(NumpyFlip.apply), nn.Linear(D, D), nn.Tanh())


@lossy("once_differentiable", "OnceCube")
def once() -> Case:
    return case(Act(OnceCube.apply))


@lossy("opaque backward", "NoGradCube")
def no_grad_in_backward() -> Case:
    return case(Act(NoGradCube.apply))


@lossy("opaque backward", "DetachedCube")
def detach_in_backward() -> Case:
    return case(Act(DetachedCube.apply))


@lossy("opaque backward", "NonTensorCube")
def slope_kept_on_context() -> Case:
    return case(Act(NonTensorCube.apply))


@lossy("wrong double backward", "HalfCube")
def wrong_by_a_factor() -> Case:
    return case(Act(HalfCube.apply))


@lossy("forward-mode rule", "ZeroTangentCube")
def zero_jvp() -> Case:
    return case(Act(ZeroTangentCube.apply))


@lossy("no formula", "metakern_zoo.bare")
def op_without_formula() -> Case:
    return case(Act(lambda x: bare(x)))


@lossy("no formula", "metakern_zoo.shallow_slope")
def op_with_a_formula_of_one_order() -> Case:
    return case(Act(lambda x: shallow(x)))


# Values that leave the graph: the first order is wrong already.


@lossy("stop-gradient", "detach at zoo.py")
def detached_gate() -> Case:
    return case(Gated(lambda gate: gate.detach()))


@lossy("stop-gradient", "data at zoo.py")
def data_gate() -> Case:
    return case(Gated(lambda gate: gate.data))


class Normalized(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / x.norm().item()


@lossy("stop-gradient", "item at zoo.py")
def norm_as_a_number() -> Case:
    return case(Normalized())


class Frozen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            gate = self.layer(x).sigmoid()
        return x * gate


@lossy("stop-gradient", "no_grad at zoo.py")
def no_grad_gate() -> Case:
    return case(Frozen())


@lossy("stop-gradient")
def numpy_gate() -> Case:
    return case(Gated(lambda gate: torch.from_numpy(np.tanh(gate.detach().numpy()))))


@lossy("stop-gradient")
def list_gate() -> Case:
    return case(Gated(lambda gate: torch.tensor(gate.tolist(), dtype=gate.dtype)))


@lossy("stop-gradient", "TwoInputs")
def no_gradient_for_an_input() -> Case:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.rand(D) + 0.5)

        def forward(self, x: Tensor) -> Tensor:
            return TwoInputs.apply(x, self.scale)

    return case(Scaled())


class WritesData(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x * 1.5
        y.data.mul_(x.data)
        return y


@lossy("in-place write", "data at zoo.py")
def write_through_data() -> Case:
    return case(WritesData())


class WritesRows(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x * 1.5
        with torch.no_grad():
            y[:, 0] = x[:, 1] ** 2
        return y


@lossy("in-place write", "no_grad at zoo.py")
def write_under_no_grad() -> Case:
    return case(WritesRows())


@lossy("stop-gradient", "no_grad")
def spectral_norm_in_training() -> Case:
    return case(parametrizations.spectral_norm(nn.Linear(D, D)))


@lossy("stop-gradient", "detach at zoo.py")
def weighted_loss() -> Case:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        errors = (model(batch[0]) - batch[1]) ** 2
        return (errors * errors.detach()).mean()

    return case(loss=loss)


class Between(nn.Module):
    """What is lost lies between modules."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).tanh().detach() + x)


@lossy("stop-gradient", "detach at zoo.py")
def between_modules() -> Case:
    return case(Between())


# Surrogates: the gradient is not the slope, by intent.


@lossy("straight-through")
def rounding_straight_through() -> Case:
    return case(Act(lambda x: x + ((4 * x).round() / 4 - x).detach()))


@lossy("straight-through", "SignThrough")
def sign_straight_through() -> Case:
    return case(Act(SignThrough.apply))


class Quantizer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.codes = nn.Parameter(torch.randn(4, D), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        nearest = self.codes[torch.cdist(x, self.codes).argmin(-1)]
        return x + (nearest - x).detach()


@lossy("straight-through")
def vector_quantizer() -> Case:
    return case(Quantizer())


@lossy("straight-through")
def hard_gumbel_softmax() -> Case:
    return case(Act(lambda x: F.gumbel_softmax(x, hard=True)))


@lossy("surrogate gradient", "Reversed")
def gradient_reversal() -> Case:
    return case(Act(Reversed.apply))


@lossy("surrogate gradient", "DoubledSine")
def wrong_backward() -> Case:
    return case(Act(DoubledSine.apply))


def _clipped(x: Tensor) -> Tensor:
    y = x * 1.0
    if y.requires_grad:
        y.register_hook(lambda ct: ct.clamp(-0.01, 0.01))
    return y


@lossy("surrogate gradient")
def clipping_hook() -> Case:
    return case(Act(_clipped))


# PyTorch's own.


@lossy("no second derivative", "_cdist_backward")
def distances() -> Case:
    centers = torch.randn(D, D).double()
    return case(Act(lambda x: torch.cdist(x, centers)))


@honest
def weight_norm() -> Case:
    """PyTorch's fused kernel for CPUs has a wrong double backward, so it is run by plain operations."""
    return case(parametrizations.weight_norm(nn.Linear(D, D)))


def _hooked(x: Tensor) -> Tensor:
    y = x.sin()
    if y.requires_grad:
        y.register_hook(lambda ct: ct.detach())
    return y


@lossy("stop-gradient", "detach at zoo.py")
def detaching_hook() -> Case:
    return case(Act(_hooked))


class Reentrant(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.layer, x, use_reentrant=True)


@lossy("no first derivative", "CheckpointFunction")
def reentrant_checkpoint() -> Case:
    return case(Reentrant())


# Found in a blind trial, written when the doctor was done.


class EnergySlope(nn.Module):
    """The gradient of an energy for each row; PyTorch's second derivative of an affine layer norm is wrong in vmap."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.rand(D) + 0.5), nn.Parameter(torch.randn(D))

    def forward(self, x: Tensor) -> Tensor:
        def energy(row: Tensor) -> Tensor:
            return F.layer_norm(row, (D,), self.weight, self.bias).pow(3).sum()

        return torch.func.vmap(torch.func.grad(energy))(x) * 0.05


@lossy("wrong double backward")
def vmap_of_a_layer_norm() -> Case:
    return case(EnergySlope())


class DetachingVmap(ZeroTangentCube):
    @staticmethod
    def vmap(info: Any, in_dims: Any, x: Tensor) -> tuple[Tensor, int]:
        return x.detach() ** 3 + x.detach(), 0


@lossy("stop-gradient", "detach at zoo.py")
def wrong_vmap_rule() -> Case:
    return case(Act(lambda x: torch.func.vmap(DetachingVmap.apply)(x) + x))


class RunningScale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.scale.lerp_(x.abs().max(), 0.5)
        return x / self.scale


@lossy("in-place write", "no_grad at zoo.py")
def running_scale() -> Case:
    return case(RunningScale())


class HalfSaved(Function):
    """Saves memory by keeping its input in half precision."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x.half())
        return x**3 + x

    @staticmethod
    def backward(ctx: Any, ct: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return ct * (3 * x.to(ct.dtype) ** 2 + 1)


@lossy("opaque backward", "HalfSaved")
def compressed_activations() -> Case:
    return case(Act(HalfSaved.apply))


class ByData(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.layer.weight.data, self.layer.bias)


@lossy("stop-gradient", "data at zoo.py")
def weight_by_data() -> Case:
    return case(ByData())


class OneOfMany(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(D, 256), nn.Linear(256, D)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).tanh()
        return self.b(torch.cat([h[:, :255], h[:, 255:].detach()], 1))


@lossy("stop-gradient", "detach at zoo.py")
def one_channel_of_many() -> Case:
    return case(OneOfMany())


class Caching(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight, self.cache = nn.Parameter(torch.randn(D, D)), None

    def forward(self, x: Tensor) -> Tensor:
        if self.cache is None:
            self.cache = (self.weight / self.weight.norm()).detach()
        return x @ self.cache


@lossy("stop-gradient", "detach at zoo.py")
def cached_weight() -> Case:
    return case(Caching())


@lossy("surrogate gradient", "Linear")
def backward_hook() -> Case:
    layer = nn.Linear(D, D)
    layer.register_full_backward_hook(lambda module, ct_x, ct_y: tuple(c / 2 for c in ct_x))
    return case(layer, nn.Tanh())


@lossy("straight-through")
def fake_quantization() -> Case:
    return case(Act(lambda x: torch.fake_quantize_per_tensor_affine(x.float(), 0.05, 0, -128, 127).to(x.dtype)))


class FixedPoint(nn.Module):
    """Found without a graph, then one step with it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        with torch.no_grad():
            for _ in range(40):
                y = torch.tanh(0.3 * self.layer(y) + x)
        return torch.tanh(0.3 * self.layer(y) + x)


@lossy("stop-gradient", "no_grad at zoo.py")
def phantom_gradient() -> Case:
    return case(FixedPoint())


class TwoOutputs(Function):
    """Of its two gradients one forgets its input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, weight)
        return x * weight, (x * weight).sin()

    @staticmethod
    def backward(ctx: Any, ct_a: Tensor, ct_b: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        slope = (x * weight).cos()
        return (ct_a + ct_b * slope) * weight, (ct_a + ct_b * slope.detach()) * x


class TwoOutputsOf(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, D))

    def forward(self, x: Tensor) -> Tensor:
        a, b = TwoOutputs.apply(x, self.weight)
        return a + b * b


@lossy("wrong double backward", "TwoOutputs")
def one_gradient_of_two() -> Case:
    return case(TwoOutputsOf())


@lossy("forward-mode rule")
def solve() -> Case:
    """Taken for honest when it was written: PyTorch's forward over reverse of linalg.solve is wrong, in 2.13."""
    return case(Act(lambda x: torch.linalg.solve(x.T @ x + torch.eye(D).to(x), x.T).T))


# Honest ones.


def _of(name: str, *middle: Callable[[], nn.Module]) -> None:
    def make() -> Case:
        return case(*(m() for m in middle))

    make.__name__ = name
    honest(make)


class ExactCube(_Saving):
    @staticmethod
    def backward(ctx: Any, ct: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return ct * (3 * x**2 + 1)


class NoBackwardNeeded(nn.Module):
    """A mask without derivative that is right to have none."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            mask = (x > 0.1).to(x.dtype)
        return x * mask + x.detach().argmax(-1, keepdim=True)


class Stable(nn.Module):
    """A softmax whose shift is detached, as it has no effect."""

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
    """State that a forward pass changes, and noise of its own generator."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.history = 0, torch.zeros(())
        self.register_buffer("mean", torch.zeros(D))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.mean.mul_(0.9).add_(0.1 * x.detach().mean(0))
        return x + 0.1 * torch.randn_like(x) / self.calls


class Cast(nn.Module):
    """A norm that insists on float32, as many do."""

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
    """Ties of zeros everywhere: ReLU, then a maximum over windows."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(1, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool1d(self.conv(x.unsqueeze(1)).relu(), 2).flatten(1)


class Zeroed(nn.Module):
    """A branch that starts at zero, as a LoRA's or a residual's does."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.scale = nn.Linear(D, D, bias=False), nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.layer(x).relu()


class Scan(nn.Module):
    """A loop, writes in place that autograd sees, and the sizes of things as numbers."""

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
    """The choice has no derivative, the weights have."""

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
    """A number decides when to stop, and nothing else."""

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(100):
            y = x - x.logsumexp(-1, keepdim=True)
            y = y - y.logsumexp(-2, keepdim=True)
            change, x = (y - x).abs().max().item(), y
            if change < 1e-9:
                break
        return x.exp()


class Implicit(Function):
    """x = y + y³ solved for y by Newton's method; the backward applies the Function again."""

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


_of("masked_attention", Masked)
_of("mixture_of_experts", Experts)
_of("called_often", CalledOften)
_of("hypernetwork", Generated)
_of("until_converged", UntilConverged)
_of("implicit_function", lambda: Act(Implicit.apply))
_of("transformer_layer", Encoder)
_of("batch_norm_in_training", lambda: nn.BatchNorm1d(D))
_of("wide_relu", lambda: nn.Linear(D, 1024), nn.ReLU, lambda: nn.Linear(1024, 256), nn.ReLU, lambda: nn.Linear(256, D))
_of("fft", lambda: Act(lambda x: torch.fft.rfft(x, n=2 * D - 2).abs()))
_of("eigenvalues", lambda: Act(lambda x: x * torch.linalg.eigvalsh(x.T @ x + torch.arange(D).to(x).diag())))
_of("products_with_zeros", nn.ReLU, lambda: Act(lambda x: x + x.cumprod(-1) + x.prod(-1, keepdim=True)))
_of("relu", nn.ReLU)
_of("relu_in_place", lambda: nn.Linear(D, D), lambda: nn.ReLU(inplace=True))
_of("kinks", nn.Hardtanh, nn.LeakyReLU, nn.PReLU, lambda: Act(torch.abs), lambda: Act(lambda x: x.clamp(-0.2, 0.3)))
_of("max_pool", Pooled, lambda: nn.Linear(12, D))
_of("maxima", lambda: Act(lambda x: x.sort(-1)[0] + x.amax(-1, keepdim=True) + x.median(-1, keepdim=True)[0]))
_of("dropout", lambda: nn.Dropout(0.4), nn.SiLU)
_of("tied_weights", Tied)
_of("checkpoint_without_reentry", Checkpointed)
_of("layer_norm", lambda: nn.LayerNorm(D), nn.GELU)
_of("batch_norm_in_evaluation", lambda: nn.BatchNorm1d(D).eval())
_of("lstm", lambda: Recurrent(nn.LSTM))
_of("gru_of_metakern", lambda: Recurrent(mk.nn.GRU))
_of("attention", Attention)
_of("exact_function", lambda: Act(ExactCube.apply))
_of("masks_without_gradient", NoBackwardNeeded)
_of("detached_shift", Stable)
_of("counters_and_noise", Counting)
_of("norm_in_float32", Cast)
_of("zero_initialized", Zeroed)
_of("scan", Scan)
_of("piecewise_constant", lambda: Act(lambda x: x * x.sign() + x.round()))


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
    """ANIL: of the body only the first order is needed."""
    return case(Act(NumpyCube.apply), adapt=["3"])
