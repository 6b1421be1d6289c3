"""What `rnn`, `gru` and `lstm` share: their arguments, and the large products outside the recurrence.

Sequences are `[T, B, L, ...]`, states `[T, B, H]`, weights `[T, out, in]`, biases `[T, out]`. A weight that is expanded
over T (stride 0) is one matrix for all tasks: products with it are one large product, its cotangent is still a task's
own. Half precision is computed in float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from metakern.ops import _checks
from metakern.ops._rules import Op, Tensors
from metakern.ops._tensors import product, shared


def apply(
    op: Op,
    gates: int,
    x: Tensor,
    states: dict[str, Tensor | None],
    weights: dict[str, Tensor],
    biases: dict[str, Tensor | None],
    **options: Any,
) -> tuple[Tensor, ...]:
    """Checks the arguments, brings the tasks first, gives output [..., B, L, H] and final states [..., B, H]."""
    for key, value in {"x": x, **weights}.items():
        _checks.tensor(op.name, key, value)
    _checks.floating(op.name, x=x, **states, **weights, **biases)
    if x.dim() not in (3, 4):
        raise ValueError(f"{op.name}: x must have shape [B, L, I] or [T, B, L, I], got {list(x.shape)}")
    w_hh = weights["w_hh"]
    if w_hh.dim() not in (2, 3):
        raise ValueError(f"{op.name}: w_hh must have shape [{gates}H, H] or [T, {gates}H, H], got {list(w_hh.shape)}")
    *lead, length, features = x.shape
    hidden = w_hh.shape[-1]
    rows = gates * hidden
    sizes = {"w_ih": (rows, features), "w_hh": (rows, hidden), "b_ih": (rows,), "b_hh": (rows,)}
    present = {key: p for key, p in (weights | biases).items() if p is not None}
    owned = {key: p.dim() > len(sizes[key]) for key, p in present.items()}
    if any(owned.values()) and x.dim() != 4:
        raise ValueError(f"{op.name}: x must have shape [T, B, L, I] for weights of each task, got {list(x.shape)}")
    for key, p in present.items():
        meaning = f"[{'T, ' * owned[key]}{gates}H{', I' * (key == 'w_ih')}{', H' * (key == 'w_hh')}]"
        _checks.shape(op.name, key, p, (*lead[: owned[key]], *sizes[key]), meaning)
    for key, state in states.items():
        if state is not None:
            _checks.shape(op.name, key, state, (*lead, hidden), "[T, B, H]" if x.dim() == 4 else "[B, H]")

    tasks, batch = lead if any(owned.values()) else (1, math.prod(lead))

    def tasks_first(key: str, p: Tensor | None) -> Tensor | None:
        return p if p is None or owned[key] else p.expand(tasks, *p.shape)

    y, *final = op(
        x.reshape(tasks, batch, length, features),
        *(s if s is None else s.reshape(tasks, batch, hidden) for s in states.values()),
        *(tasks_first(key, p) for key, p in (weights | biases).items()),
        **options,
    )
    return y.reshape(*lead, length, hidden), *(s.reshape(*lead, hidden) for s in final)


def wide(tensors: Iterable[Tensor | None]) -> tuple[Any, ...]:
    """Half precision as float32; what is expanded over the tasks stays expanded."""

    def widened(t: Tensor | None) -> Tensor | None:
        if t is None or t.dtype not in (torch.float16, torch.bfloat16):
            return t
        return t[:1].float().expand_as(t) if shared(t) else t.float()

    return tuple(widened(t) for t in tensors)


def narrow(inputs: Sequence[Any], tensors: Iterable[Any]) -> tuple[Any, ...]:
    """Back to the dtype of the op's inputs."""
    return tuple(t if t is None else t.to(inputs[0].dtype) for t in tensors)


def times(x: Tensor, w: Tensor) -> Tensor:
    """x w, all steps at once: [T, B, L, in], [T, in, out] -> [T, B, L, out]."""
    return product(x.flatten(1, 2), w).unflatten(1, x.shape[1:3])


def outer(ct: Tensor, x: Tensor) -> Tensor:
    """ctᵀ x over a task's tokens: [T, B, L, out], [T, B, L, in] -> [T, out, in]."""
    return torch.bmm(ct.flatten(1, 2).mT, x.flatten(1, 2))


def total(terms: Iterable[Tensor | None], like: Tensor) -> Tensor:
    """The sum of the present terms in the shape of `like`; zeros where there is none."""
    present = [t for t in terms if t is not None]
    return sum(present[1:], present[0]).expand_as(like) if present else torch.zeros_like(like)


def affine(x: Tensor, w: Tensor, *biases: Tensor | None) -> Tensor:
    """x wᵀ plus biases [T, out]."""
    y = times(x, w.mT)
    present = [b for b in biases if b is not None]
    return y + sum(present[1:], present[0])[:, None, None] if present else y


def t_affine(
    x: Tensor, w: Tensor, t_x: Tensor | None, t_w: Tensor | None, *t_biases: Tensor | None
) -> tuple[Tensor | None, ...]:
    """The terms of the tangent of `affine`; None where a tangent is zero."""
    return (
        None if t_x is None else times(t_x, w.mT),
        None if t_w is None else times(x, t_w.mT),
        *(None if t_b is None else t_b[:, None, None] for t_b in t_biases),
    )


def cotangents(needs: Sequence[bool], x: Tensor, before: Tensor, w_ih: Tensor, ct_u: Tensor, ct_a: Tensor) -> Tensors:
    """ct_x, ct_w_ih, ct_w_hh, ct_b_ih, ct_b_hh, those needed, of u = x w_ihᵀ + b_ih and a = before w_hhᵀ + b_hh.

    `needs` follows the op's inputs: x, its states, the weights, the biases.
    """
    return (
        times(ct_u, w_ih) if needs[0] else None,
        outer(ct_u, x) if needs[-4] else None,
        outer(ct_a, before) if needs[-3] else None,
        ct_u.sum((1, 2)) if needs[-2] else None,
        ct_a.sum((1, 2)) if needs[-1] else None,
    )


def t_cotangents(
    needs: Sequence[bool],
    x: Tensor,
    before: Tensor,
    w_ih: Tensor,
    ct_u: Tensor,
    ct_a: Tensor,
    t_x: Tensor | None,
    t_before: Tensor,
    t_w_ih: Tensor | None,
    t_ct_u: Tensor,
    t_ct_a: Tensor,
) -> Tensors:
    """The tangents of what `cotangents` gives."""
    t_ct_x, t_ct_w_ih, t_ct_w_hh, *t_ct_b = cotangents(needs, x, before, w_ih, t_ct_u, t_ct_a)
    if needs[0] and t_w_ih is not None:
        t_ct_x = t_ct_x + times(ct_u, t_w_ih)
    if needs[-4] and t_x is not None:
        t_ct_w_ih = t_ct_w_ih + outer(ct_u, t_x)
    if needs[-3]:
        t_ct_w_hh = t_ct_w_hh + outer(ct_a, t_before)
    return t_ct_x, t_ct_w_ih, t_ct_w_hh, *t_ct_b


def previous(first: Tensor | None, sequence: Tensor) -> Tensor:
    """What each step finds: `first` (zeros where None), then `sequence` without its last step."""
    length = sequence.shape[2]
    first = torch.zeros_like(sequence[:, :, :1]) if first is None else first[:, :, None]
    return torch.cat((first, sequence[:, :, :-1]), 2)[:, :, :length]


def last(final: Tensor, sequence: Tensor) -> Tensor:
    """The cotangent of the last state: that of the final state and that of the last step, if there is one."""
    return final + sequence[:, :, -1:].sum(2)


def start(state: Tensor | None, x: Tensor, hidden: int) -> Tensor:
    """The initial state, zeros where None."""
    return x.new_zeros(*x.shape[:2], hidden) if state is None else state.clone()


def stack(steps: list[Tensor], x: Tensor, size: int) -> Tensor:
    """[T, B, size] of each step -> [T, B, L, size], for the x of the op."""
    return torch.stack(steps, 2) if steps else x.new_zeros(*x.shape[:3], size)
