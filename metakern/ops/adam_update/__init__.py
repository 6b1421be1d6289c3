"""One step of Adam or AdamW for all parameters and tasks of a model in one call.

    g    = grad + λ phi                    b₁ = 1 - β₁^step        b₂ = 1 - β₂^step
    m'   = β₁ m + (1 - β₁) g               v' = β₂ v + (1 - β₂) g²
    phi' = phi - h (m' / b₁ / (√(v' / b₂) + eps) + ω phi)

| tensor | shape |
|---|---|
| phi_i, grad_i, m_i, v_i and the results | [T, ...], a shape for each parameter |
| rate h, β₁, β₂, eps, decay λ or ω | a number; one tensor [T]; or for each parameter a tensor [T] or [T, ...] |

λ is the weight decay of Adam, ω that of AdamW. The slope of the root at zero is taken as zero, which gives no NaN and
is exact as a function of g: where v' = 0, g and its history are zero, so dv'/dg = 0 and the update has the slope that
m' gives it. The four rules are derived from the formula (`formula.py`). Half precision is computed in float32.
Residuals: none. Kingma, Ba 2015, "Adam", algorithm 1; Loshchilov, Hutter 2019, "Decoupled weight decay
regularization", algorithm 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from metakern.ops.core import checks, updates
from metakern.ops.core.formula import Node, root
from metakern.ops.core.spec import Make, Sample, Spec
from metakern.ops.core.updates import Hyper, Update


def adam_update(
    phi: Sequence[Tensor],
    grad: Sequence[Tensor],
    m: Sequence[Tensor],
    v: Sequence[Tensor],
    lr: Hyper,
    *,
    step: int,
    betas: tuple[Hyper, Hyper] = (0.9, 0.999),
    eps: Hyper = 1e-8,
    weight_decay: Hyper = 0.0,
    decoupled: bool = False,
) -> tuple[list[Tensor], ...]:
    """Returns the parameters and both moments after one step of Adam; differentiable twice in all arguments but `step`.

    The equations are those of torch.optim.Adam and AdamW (Kingma, Ba 2015, algorithm 1; Loshchilov, Hutter 2019,
    algorithm 2). Half precision is computed in float32.

    Args:
        phi: A tensor for each parameter, [T, ...] for T tasks, or of any shape.
        grad: The gradients, shaped like `phi`.
        m: The first moments before the step, shaped like `phi`.
        v: The second moments before the step, shaped like `phi`.
        lr: The learning rate, in any form that `sgd_update` takes.
        step: The number of this step, for the bias corrections; the first step is 1.
        betas: The decay rates of m and v; each in the forms of `lr`.
        eps: Added to the root of the corrected `v`; the same forms.
        weight_decay: Adam's, added to the gradient as weight_decay phi, or AdamW's; the same forms.
        decoupled: Whether the weight decay is AdamW's, which shrinks phi by the factor 1 - lr weight_decay.

    Returns:
        (parameters, first moments, second moments), a list each.

    Raises:
        TypeError: For tensors that are not floating point, or not of one dtype.
        ValueError: Where lengths, shapes or devices do not fit, or `step` is below 1.

    >>> import metakern as mk, torch
    >>> zero = torch.zeros(2, 1)
    >>> (w,), _, _ = mk.ops.adam_update([zero], [torch.tensor([[3.0], [0.0]])], [zero], [zero], 0.1, step=1)
    >>> w
    tensor([[-0.1000],
            [ 0.0000]])
    """
    if step < 1:
        raise ValueError(f"adam_update: step must be at least 1, got {step}")
    decays = (0.0, weight_decay) if decoupled else (weight_decay, 0.0)
    biases = (_bias(f"beta{i}", beta, step) for i, beta in enumerate(betas, 1))
    return _UPDATE((phi, grad, m, v), (lr, *betas, *biases, eps, *decays))


def _bias(name: str, beta: Hyper, step: int) -> Hyper:
    for b in beta if isinstance(beta, Sequence) else (beta,):
        if isinstance(b, Tensor):
            checks.tensor("adam_update", name, b)
    return [1 - b**step for b in beta] if isinstance(beta, Sequence) else 1 - beta**step


def _adam(
    phi: Node,
    grad: Node,
    m: Node,
    v: Node,
    lr: Node,
    beta1: Node,
    beta2: Node,
    bias1: Node,
    bias2: Node,
    eps: Node,
    coupled: Node,
    decoupled: Node,
) -> tuple[Node, ...]:
    g = grad + coupled * phi
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * (g * g)
    u = m / (bias1 * (root(v / bias2) + eps))
    return phi - lr * (u + decoupled * phi), m, v


_UPDATE = Update(
    "adam_update",
    ("phi", "grad", "m", "v"),
    ("lr", "beta1", "beta2", "bias1", "bias2", "eps", "coupled", "decoupled"),
    _adam,
)


def _plain(
    phi: Sequence[Tensor],
    grad: Sequence[Tensor],
    m: Sequence[Tensor],
    v: Sequence[Tensor],
    lr: Hyper,
    *,
    step: int,
    betas: tuple[Hyper, Hyper],
    eps: Hyper,
    weight_decay: Hyper,
    decoupled: bool,
) -> tuple[list[Tensor], ...]:
    every = (updates.plain_rates(phi, h) for h in (lr, *betas, eps, weight_decay))
    moved = []
    for p, g, a, b, h, beta1, beta2, epsilon, decay in zip(phi, grad, m, v, *every, strict=True):
        if not decoupled:
            g = g + decay * p
        a, b = beta1 * a + (1 - beta1) * g, beta2 * b + (1 - beta2) * g**2
        if decoupled:
            p = p * (1 - h * decay)
        corrected = a / (1 - beta1**step) / (updates.plain_root(b / (1 - beta2**step)) + epsilon)
        moved.append((p - h * corrected, a, b))
    return tuple(map(list, zip(*moved, strict=True)))


def _flat(f: Any) -> Any:
    def of_betas(*lists: Sequence[Tensor], beta1: Hyper, beta2: Hyper, **options: Any) -> Any:
        return f(*lists, betas=(beta1, beta2), **options)

    return updates.flat(of_betas, 4)


def _samples(make: Make) -> list[Sample]:
    adam = {"step": 2, "beta1": 0.6, "beta2": 0.8, "eps": 0.1, "weight_decay": 0.2, "decoupled": False}
    learned = ("beta1", "beta2", "eps", "weight_decay")
    kinds = updates.some(updates.samples(make, 4, learned, **adam), *updates.SOME)
    adamw = updates.samples(make, 4, learned, **adam | {"step": 3, "decoupled": True})
    return updates.squared([*kinds, *updates.some(adamw, "mixed-rates", "learned", prefix="adamw-")], 3)


def _benchmark(make: Make) -> list[Sample]:
    adam = {"step": 2, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.0, "decoupled": False}
    return updates.squared(updates.benchmark(make, 4, **adam), 3)


_COST = updates.cost((14, 24, 60), (7, 10, 15))
SPEC = Spec(_UPDATE.op(2, (1,) + (0,) * 7), _flat(adam_update), _flat(_plain), _samples, _benchmark, _COST)
