"""Log-probabilities of classes, from the squared distances of queries to the means of each class's support examples.

    p_c  = Σ_{i of class c} x_i / n_c        n_c examples of class c        z_qc = -|u_q - p_c|²
    y_qc = z_qc - log Σ_c exp(z_qc)          π = exp(y)                     y_qc = -inf where n_c = 0

    jvp       t_z  = -2 (u_q - p_c) · (t_u_q - t_p_c)        t_y = t_z - Σ_c π t_z
    vjp       ct_z = ct_y - π Σ_c ct_y
              ct_u_q = -2 Σ_c ct_z (u_q - p_c)    ct_p_c = 2 Σ_q ct_z (u_q - p_c)    ct_x_i = ct_p_c / n_c
    vjp_jvp   t_ct_z = t_ct_y - π (Σ_c t_ct_y + t_y Σ_c ct_y)
              t_ct_u_q = -2 Σ_c (t_ct_z (u_q - p_c) + ct_z (t_u_q - t_p_c))        t_ct_p_c, t_ct_x_i likewise

| tensor | shape |
|---|---|
| support x | [T, S, D] |
| labels | [T, S], int64 or int32; negative for examples that do not count |
| query u | [T, Q, D] |
| y | [T, Q, C] |
| residuals p, y | p [T, C, D], float32 for half precision |

Snell, Swersky, Zemel 2017, "Prototypical networks for few-shot learning", section 2. Half precision is computed in
float32. The products of the reference take u and p less the mean of all p, which changes no distance: where embeddings
are far from zero and near each other, their digits would cancel.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor

from metakern.ops.core import checks, cpp, triton_kernels
from metakern.ops.core.autocast import autocast
from metakern.ops.core.autograd import Op
from metakern.ops.core.matrices import wide
from metakern.ops.core.rules import Rules, Tensors
from metakern.ops.core.spec import Cost, Make, Sample, Spec


@autocast("float32")
def prototype_log_softmax(support: Tensor, labels: Tensor, query: Tensor, classes: int) -> Tensor:
    """Returns the log-probabilities of the classes of queries, given embedded examples of each class.

    They are the log-softmax of the negative squared distances to the classes' mean examples (prototypes). It is
    differentiable twice in support and query. Half precision is computed in float32, to which `torch.autocast` casts.

    Args:
        support: [T, S, D], S embedded examples of each of T tasks; or [S, D].
        labels: [T, S] or [S], int64 or int32, below `classes`. Examples with a negative label do not count.
        query: [T, Q, D] or [Q, D].
        classes: C, the number of classes, at least 1.

    Returns:
        [T, Q, C] or [Q, C]; -inf for a class without an example in its task.

    Raises:
        TypeError: For embeddings that are not floating point, or labels that are not int64 or int32.
        ValueError: Where shapes or devices do not fit; on the CPU also for a label that is not below `classes`, or a
            task in which no example counts.

    >>> import metakern as mk, torch
    >>> support, labels = torch.tensor([[0.0], [2.0], [4.0]]), torch.tensor([0, 0, 1])
    >>> mk.ops.prototype_log_softmax(support, labels, torch.tensor([[1.0], [2.5]]), classes=2).exp()
    tensor([[9.9988e-01, 1.2339e-04],
            [5.0000e-01, 5.0000e-01]])
    """
    op = "prototype_log_softmax"
    checks.floating(op, support=support, query=query)
    if support.dim() not in (2, 3):
        raise ValueError(f"{op}: support must have shape [S, D] or [T, S, D], got {list(support.shape)}")
    alone = support.dim() == 2
    if query.dim() != support.dim() or query.shape[:-2] != support.shape[:-2] or query.shape[-1] != support.shape[-1]:
        meaning = f"[Q, {support.shape[-1]}]" if alone else f"[{support.shape[0]}, Q, {support.shape[-1]}]"
        raise ValueError(f"{op}: query must have shape {meaning}, got {list(query.shape)}")
    checks.indices(op, "labels", labels, support.device)
    checks.shape(op, "labels", labels, support.shape[:-1], "[S]" if alone else "[T, S]")
    if not isinstance(classes, int) or classes < 1:
        raise ValueError(f"{op}: classes must be an integer of at least 1, got {classes!r}")
    highest = F.pad(labels, (0, 1), value=-1).amax(-1).clamp(min=-1)
    checks.below(op, "the highest label of a task", highest, classes)
    if alone:
        support, labels, query = support[None], labels[None], query[None]
    shots = (labels.unsqueeze(1) == torch.arange(classes, device=labels.device).unsqueeze(1)).sum(-1)
    y = OP(support, query, labels=labels.long(), shots=shots.to(wide(support[:0]).dtype))[0]
    return y.squeeze(0) if alone else y


def membership(c: SimpleNamespace) -> Tensor:
    """Returns 1 / n_c where support example i has class c, else 0, [T, C, S]."""
    place = torch.arange(c.shots.shape[1], device=c.labels.device).unsqueeze(1)
    return (c.labels.unsqueeze(1) == place).to(c.shots.dtype) / c.shots.clamp(min=1).unsqueeze(-1)


def counted(c: SimpleNamespace, x: Tensor) -> Tensor:
    """Returns the support x [T, S, D] in the dtype of accumulation, with zeros for the examples that do not count."""
    return torch.where((c.labels >= 0).unsqueeze(-1), wide(x), 0.0)


def centred(c: SimpleNamespace, u: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """Returns u and p less the mean of the prototypes p of a task."""
    present = (c.shots > 0).to(p.dtype)
    centre = (present.unsqueeze(1) @ p) / present.sum(-1).clamp(min=1).view(-1, 1, 1)
    return wide(u) - centre, torch.where((c.shots > 0).unsqueeze(-1), p - centre, 0.0)


def _forward(c: SimpleNamespace, inputs: Tensors) -> tuple[Tensors, Tensors]:
    p = membership(c) @ counted(c, inputs[0])
    u, q = centred(c, inputs[1], p)
    z = 2 * (u @ q.mT) - q.square().sum(-1).unsqueeze(1)
    y = torch.log_softmax(z.masked_fill((c.shots == 0).unsqueeze(1), -torch.inf), -1)
    return (y.to(inputs[0].dtype),), (p,)


def _jvp(c: SimpleNamespace, inputs: Tensors, r: Tensors, t_inputs: Tensors) -> tuple[Tensors, Tensors]:
    p, y = r[0], wide(r[1])
    t_p, t_u = membership(c) @ counted(c, t_inputs[0]), wide(t_inputs[1])
    u, q = centred(c, inputs[1], p)
    t_z = 2 * (u @ t_p.mT + t_u @ q.mT - (q * t_p).sum(-1).unsqueeze(1))
    t_y = t_z - (y.exp() * t_z).sum(-1, keepdim=True)
    t_y = t_y.masked_fill((c.shots == 0).unsqueeze(1), 0.0)
    return (t_y.to(inputs[0].dtype),), (t_p,)


def _vjp(c: SimpleNamespace, inputs: Tensors, r: Tensors, ct_outputs: Tensors) -> Tensors:
    p, y = r[0], wide(r[1])
    u, q = centred(c, inputs[1], p)
    ct_z = _ct_z(c, y, wide(ct_outputs[0]))
    ct_p = 2 * (ct_z.mT @ u - ct_z.sum(1).unsqueeze(-1) * q)
    return _cotangents(c, inputs[0].dtype, ct_p, 2 * (ct_z @ q))


def _vjp_jvp(
    c: SimpleNamespace,
    inputs: Tensors,
    r: Tensors,
    t_inputs: Tensors,
    t_r: Tensors,
    ct_outputs: Tensors,
    t_ct_outputs: Tensors | None,
) -> Tensors:
    (p, y), (t_p, t_y), t_u, ct_y = map(wide, r), map(wide, t_r), wide(t_inputs[1]), wide(ct_outputs[0])
    u, q = centred(c, inputs[1], p)
    ct_z = _ct_z(c, y, ct_y)
    t_ct_z = -y.exp() * t_y * _total(c, ct_y)
    if t_ct_outputs is not None:
        t_ct_z = t_ct_z + _ct_z(c, y, wide(t_ct_outputs[0]))
    t_ct_p = t_ct_z.mT @ u - t_ct_z.sum(1).unsqueeze(-1) * q + ct_z.mT @ t_u - ct_z.sum(1).unsqueeze(-1) * t_p
    return _cotangents(c, inputs[0].dtype, 2 * t_ct_p, 2 * (t_ct_z @ q + ct_z @ t_p))


def _total(c: SimpleNamespace, ct_y: Tensor) -> Tensor:
    """Returns the sum of a row of ct_y over the classes that have an example, [T, Q, 1]."""
    return ct_y.masked_fill((c.shots == 0).unsqueeze(1), 0.0).sum(-1, keepdim=True)


def _ct_z(c: SimpleNamespace, y: Tensor, ct_y: Tensor) -> Tensor:
    """Returns ct_y - π Σ_c ct_y. Its rows have the sum 0, so a term of ct_u that is the same for all classes is 0."""
    return (ct_y - y.exp() * _total(c, ct_y)).masked_fill((c.shots == 0).unsqueeze(1), 0.0)


def _cotangents(c: SimpleNamespace, dtype: torch.dtype, ct_p: Tensor, ct_u: Tensor) -> Tensors:
    return (membership(c).mT @ ct_p).to(dtype), ct_u.to(dtype)


OP = Op(
    "prototype_log_softmax",
    inputs=("support", "query"),
    constants=("labels", "shots"),
    saves_output=True,
    kernels={
        "reference": Rules(_forward, _jvp, _vjp, _vjp_jvp),
        "cpu": cpp.rules("prototype_log_softmax", constants=("labels", "shots")),
        "triton": triton_kernels.rules("prototype_log_softmax"),
    },
)


def _plain(support: Tensor, labels: Tensor, query: Tensor, classes: int) -> Tensor:
    if support.dim() == 3:
        tasks = [_plain(*task, classes) for task in zip(support, labels, query, strict=True)]
        return torch.stack(tasks)
    z = []
    for c in range(classes):
        mine = labels == c
        absent = query.new_full(query.shape[:1], -torch.inf)
        z.append(-(query - support[mine].mean(0)).square().sum(-1) if mine.any() else absent)
    return torch.log_softmax(torch.stack(z, -1), -1)


def _samples(make: Make) -> list[Sample]:
    def labels(T: int, S: int, C: int, padding: int = 0) -> Tensor:
        """Labels of which each class has one; the last `padding` examples of odd tasks are padding."""
        y = torch.cat([torch.arange(C).to(make.device).expand(T, C), make.integers(C, T, S - C)], 1)
        y[1::2, S - padding :] = -1
        return y

    return [
        Sample("tasks", (make(3, 7, 5), labels(3, 7, 4), make(3, 6, 5), 4)),
        Sample("padding", (make(2, 9, 3), labels(2, 9, 3, 4).int(), make(2, 5, 3), 3)),
        Sample("one", (make(6, 9), labels(1, 6, 2)[0], make(5, 9), 2), per_task=False),
        Sample("wide", (make(2, 5, 67), labels(2, 5, 5), make(2, 3, 67), 5)),
        Sample("no-queries", (make(2, 4, 3), labels(2, 4, 3), make(2, 0, 3), 3)),
        Sample("no-features", (make(2, 4, 0), labels(2, 4, 3), make(2, 3, 0), 3)),
    ]


def _benchmark(make: Make) -> list[Sample]:
    T, S, Q, C, D = 16, 25, 75, 5, 256
    labels = torch.arange(S).remainder(C).expand(T, S).to(make.device)
    return [Sample("16x25+75x256", (make(T, S, D), labels, make(T, Q, D), C))]


def _cost(sample: Sample, order: int) -> Cost:
    support, _, query, classes = sample.args
    size, n, pairs = support.element_size(), support.numel() + query.numel(), query.numel() * classes
    y = pairs // max(support.shape[-1], 1)
    flop, numbers = ((3 * pairs, n + y), (5 * pairs, 2 * n + 2 * y), (10 * pairs, 3 * n + 4 * y))[order]
    return Cost(flop=flop, bytes=numbers * size)


SPEC = Spec(OP, prototype_log_softmax, _plain, _samples, _benchmark, _cost)
