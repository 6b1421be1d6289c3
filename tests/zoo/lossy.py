"""Models that lose a part of their first or second derivative, each in another way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

from metakern import native
from zoo.cases import Act, Case, D, SavesInput, case

# By name: a function that makes the case, the kind of problem, and a part of the operation's name in the report.
LOSSY: dict[str, tuple[Callable[[], Case], str, str]] = {}


def lossy(kind: str, op: str = "") -> Callable[[Callable[[], Case]], Callable[[], Case]]:
    """Register a case by its function's name, with what the doctor must report of it."""

    def register(make: Callable[[], Case]) -> Callable[[], Case]:
        LOSSY[make.__name__] = make, kind, op
        return make

    return register


class Gated(nn.Module):
    """Multiplies its input by a gate: a function of the output of its own layer."""

    def __init__(self, gate: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.gate = nn.Linear(D, D), gate

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(torch.sigmoid(self.layer(x)))


# Functions whose backward has no second derivative, or a wrong one: PyTorch raises no error and terms are lost.


class NumpyCube(SavesInput):
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
    """A linear function: its own second derivative is zero, but the terms of later layers are lost."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.flip(-1)

    @staticmethod
    def backward(ctx: Any, ct: Tensor) -> Tensor:
        return torch.from_numpy(ct.detach().numpy()[..., ::-1].copy())


class OnceCube(SavesInput):
    @staticmethod
    @once_differentiable
    def backward(ctx: Any, ct: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return ct * (3 * x**2 + 1)


class NoGradCube(SavesInput):
    @staticmethod
    def backward(ctx: Any, ct: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        with torch.no_grad():
            return ct * (3 * x**2 + 1)


class DetachedCube(SavesInput):
    """The backward keeps the graph of the cotangent and drops that of the input."""

    @staticmethod
    def backward(ctx: Any, ct: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return ct * (3 * x.detach() ** 2 + 1)


class NonTensorCube(Function):
    """The slope is a plain attribute of the context, computed in forward, where no graph is recorded."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.slope = 3 * x**2 + 1
        return x**3 + x

    @staticmethod
    def backward(ctx: Any, ct: Tensor) -> Tensor:
        return ct * ctx.slope


class _CubeSlope(Function):
    """ct (3 x² + 1), whose own backward has 3 x in the place of 6 x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ct: Tensor) -> Tensor:
        ctx.save_for_backward(x, ct)
        return ct * (3 * x**2 + 1)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, Tensor]:
        x, ct = ctx.saved_tensors
        return 3 * x * ct * g, (3 * x**2 + 1) * g


class HalfCube(SavesInput):
    @staticmethod
    def backward(ctx: Any, ct: Tensor) -> Tensor:
        return _CubeSlope.apply(*ctx.saved_tensors, ct)


class ZeroTangentCube(SavesInput):
    """Exact in reverse mode; its rule for forward mode returns zeros."""

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
    """The backward returns no gradient for the second input, although the value depends on it."""

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


# Values that leave the graph, so that the first derivative is already wrong.


@lossy("stop-gradient", "detach at lossy.py")
def detached_gate() -> Case:
    return case(Gated(lambda gate: gate.detach()))


@lossy("stop-gradient", "data at lossy.py")
def data_gate() -> Case:
    return case(Gated(lambda gate: gate.data))


class Normalized(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x / x.norm().item()


@lossy("stop-gradient", "item at lossy.py")
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


@lossy("stop-gradient", "no_grad at lossy.py")
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


@lossy("in-place write", "data at lossy.py")
def write_through_data() -> Case:
    return case(WritesData())


class WritesRows(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        y = x * 1.5
        with torch.no_grad():
            y[:, 0] = x[:, 1] ** 2
        return y


@lossy("in-place write", "no_grad at lossy.py")
def write_under_no_grad() -> Case:
    return case(WritesRows())


@lossy("stop-gradient", "no_grad")
def spectral_norm_in_training() -> Case:
    return case(parametrizations.spectral_norm(nn.Linear(D, D)))


@lossy("stop-gradient", "detach at lossy.py")
def weighted_loss() -> Case:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        errors = (model(batch[0]) - batch[1]) ** 2
        return (errors * errors.detach()).mean()

    return case(loss=loss)


class Between(nn.Module):
    """The `detach` is in the forward of a module that has submodules, between their calls."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).tanh().detach() + x)


@lossy("stop-gradient", "detach at lossy.py")
def between_modules() -> Case:
    return case(Between())


# Surrogate gradients: they differ from the slope on purpose.


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


# Faults and limits of PyTorch, and hooks.


@lossy("no second derivative", "_cdist_backward")
def distances() -> Case:
    centers = torch.randn(D, D).double()
    return case(Act(lambda x: torch.cdist(x, centers)))


def _hooked(x: Tensor) -> Tensor:
    y = x.sin()
    if y.requires_grad:
        y.register_hook(lambda ct: ct.detach())
    return y


@lossy("stop-gradient", "detach at lossy.py")
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


# Models that were written to test the doctor after it was finished.


class EnergySlope(nn.Module):
    """The gradient of an energy of each row; an affine layer norm has a wrong second derivative in PyTorch's vmap."""

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


@lossy("stop-gradient", "detach at lossy.py")
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


@lossy("in-place write", "no_grad at lossy.py")
def running_scale() -> Case:
    return case(RunningScale())


class HalfSaved(Function):
    """Saves its input in half precision, to use less memory."""

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


@lossy("stop-gradient", "data at lossy.py")
def weight_by_data() -> Case:
    return case(ByData())


class OneOfMany(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(D, 256), nn.Linear(256, D)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).tanh()
        return self.b(torch.cat([h[:, :255], h[:, 255:].detach()], 1))


@lossy("stop-gradient", "detach at lossy.py")
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


@lossy("stop-gradient", "detach at lossy.py")
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
    """A fixed point that is iterated without a graph, then one step with it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        with torch.no_grad():
            for _ in range(40):
                y = torch.tanh(0.3 * self.layer(y) + x)
        return torch.tanh(0.3 * self.layer(y) + x)


@lossy("stop-gradient", "no_grad at lossy.py")
def phantom_gradient() -> Case:
    return case(FixedPoint())


class TwoOutputs(Function):
    """A Function of two inputs; the gradient of the second one detaches the slope."""

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
    """Forward over reverse of torch.linalg.solve is wrong in PyTorch 2.13."""
    return case(Act(lambda x: torch.linalg.solve(x.T @ x + torch.eye(D).to(x), x.T).T))
