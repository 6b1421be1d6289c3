"""What `rnn`, `gru` and `lstm` share: checks of arguments, the four rules of any cell, and the recurrence in PyTorch.

With u = x W_ihᵀ + b_ih, p_t = h_{t-1} W_hhᵀ + b_hh and the state s (h, and c of an LSTM), a cell is the function

    s_t, kept_t = cell(u_t, p_t, s_{t-1})

of one hidden unit at a time; `Cell` has its formula and derivatives. kept_t are its gates. The recurrence computes only
what depends on the step before. Everything else is one large product over all steps, before or after it:

    forward   u                                            then s_t, step by step
    jvp       t_u = t_x W_ihᵀ + x t_W_ihᵀ + t_b_ih
              and h_{t-1} t_W_hhᵀ + t_b_hh, a part of t_p  then t_s_t
    vjp       backward in time, from sources ct_y:         ct_s_t, which gives ct_u_t and ct_a_t, the cotangent of p_t
              ct_x = ct_u W_ih           ct_W_ih = Σ ct_uᵀ x          ct_b_ih = Σ ct_u
                                         ct_W_hh = Σ ct_aᵀ h_{t-1}    ct_b_hh = Σ ct_a
    vjp_jvp   the same recurrence for the tangents, from sources t_ct_y and, to h_{t-1}, ct_a_t t_W_hh; then the
              tangents of the products above by the product rule

Residuals are, for each step, the gates and the state before it: h_{t-1}, and c_{t-1} of an LSTM. No rule has to
repeat the forward recurrence. vjp passes ct_s_t to vjp_jvp, which computes ct_u and ct_a from it without a second
backward recurrence.

Sequences are [T, B, L, ...], states [T, B, H], weights [T, out, in], biases [T, out], lengths [T, B]. A weight that is
expanded over T (stride 0) is one matrix for all tasks: products with it are one large product, but each task has its
own cotangent of it. A step beyond the length of its sequence leaves the states as they are, and its output is zero:
results are those of torch.nn.utils.rnn.pack_padded_sequence. Half precision is computed in float32; the CUDA kernels
store bfloat16, and carry the states from step to step in float32.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from metakern import native
from metakern.ops.core import checks, cpp, matrices, triton_kernels
from metakern.ops.core.autograd import Op
from metakern.ops.core.matrices import products, shared
from metakern.ops.core.rules import Rules, Tensors

Gates = tuple[Tensor, ...]  # a tensor [T, B, H] for each gate, or each state


def apply(
    op: Op,
    gates: int,
    x: Tensor,
    states: dict[str, Tensor | None],
    weights: dict[str, Tensor],
    biases: dict[str, Tensor | None],
    lengths: Tensor | None,
    **options: Any,
) -> tuple[Tensor, ...]:
    """Checks the arguments, reshapes them to tasks first, and applies the op.

    Returns the output [..., B, L, H], then the final states [..., B, H].
    """
    checks.floating(op.name, (*states, *biases), x=x, **states, **weights, **biases)
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
        checks.shape(op.name, key, p, (*lead[: owned[key]], *sizes[key]), meaning)
    for key, state in states.items():
        if state is not None:
            checks.shape(op.name, key, state, (*lead, hidden), "[T, B, H]" if x.dim() == 4 else "[B, H]")
    tasks, batch = lead if any(owned.values()) else (1, math.prod(lead))
    if lengths is not None:
        checks.indices(op.name, "lengths", lengths, x.device)
        checks.shape(op.name, "lengths", lengths, tuple(lead), "[T, B]" if x.dim() == 4 else "[B]")
        checks.below(op.name, "lengths", lengths, length + 1)
        lengths = lengths.long().reshape(tasks, batch)

    def tasks_first(key: str, p: Tensor | None) -> Tensor | None:
        return p if p is None or owned[key] else p.expand(tasks, *p.shape)

    y, *final = op(
        x.reshape(tasks, batch, length, features),
        *(s if s is None else s.reshape(tasks, batch, hidden) for s in states.values()),
        *(tasks_first(key, p) for key, p in (weights | biases).items()),
        lengths=lengths,
        **options,
    )
    return y.reshape(*lead, length, hidden), *(s.reshape(*lead, hidden) for s in final)


@dataclass(frozen=True)
class Cell:
    """The formulas of one step of a cell on tensors [T, B, H], the same as in csrc/cells.h.

        forward(c, u, p, s)                           -> s, kept
        jvp(c, kept, s, t_u, t_p, t_s)                -> t_s, t_kept
        total(c, kept, s, ct)                         -> ct, to whose part for c_t (LSTM) the path through h_t is added
        vjp(c, kept, s, ct)                           -> ct_a, ct_u, ct_s without the path through W_hh; from a total ct
        vjp_jvp(c, kept, s, t_kept, t_s, ct, t_ct)    -> t_ct_a, t_ct_u, t_ct_s: tangents of total and vjp together

    `c` holds the op's constants, s the states before the step, ct the cotangents of those after it. In vjp_jvp ct is
    total and t_ct is not. name: The prefix of the kernels' names. gates: Rows of W for each hidden unit. kept: Tensors
    that a step keeps. keeps_gates: Whether they are residuals of their own; if not, they are the output. states: Number
    of states. split: Whether ct_u differs from ct_a.
    """

    name: Callable[[SimpleNamespace], str]
    gates: int
    forward: Callable[..., tuple[Gates, Gates]]
    jvp: Callable[..., tuple[Gates, Gates]]
    vjp: Callable[..., tuple[Gates, Gates, Gates]]
    vjp_jvp: Callable[..., tuple[Gates, Gates, Gates]]
    total: Callable[..., Gates] = lambda c, kept, s, ct: ct
    kept: int = 1
    states: int = 1
    split: bool = False
    keeps_gates: bool = True

    def residuals(self, r: Tensors) -> tuple[Tensor, Tensors]:
        """Splits an op's residuals into the gates and the states before each step."""
        return (r[0], r[1 : 1 + self.states]) if self.keeps_gates else (r[self.states], r[: self.states])


def kernels(cell: Cell) -> dict[str, Rules]:
    """Returns the cell's rules on every backend; only the recurrence and the products differ."""
    return {
        "reference": _rules(cell, _Loops(cell), matrices.product),
        "cpu": _rules(cell, _Kernels(cell), cpp.product),
        "cuda": _rules(cell, _Kernels(cell), triton_kernels.product, native.CUDA_DTYPES),
    }


def plain(layer: Callable[..., Tensors], states: int) -> Callable[..., Tensors]:
    """Returns `Spec.plain` of a recurrent op, made of `layer`, a loop over the steps of x [..., L, I].

    `states` is the number of initial states that `layer` takes. With lengths, `layer` runs on one sequence at a time,
    cut to its length. reverse flips sequences before the loop and outputs after it.
    """

    def whole(x: Tensor, *rest: Tensor | None, reverse: bool = False, **options: Any) -> Tensors:
        if not reverse:
            return layer(x, *rest, **options)
        y, *final = layer(x.flip(-2), *rest, **options)
        return y.flip(-2), *final

    def ragged(x: Tensor, *rest: Tensor | None, **options: Any) -> Tensors:
        start, parameters, lengths = rest[:states], rest[states : states + 4], rest[states + 4 :]
        if not lengths or lengths[0] is None:
            return whole(x, *start, *parameters, **options)
        *lead, length, _ = x.shape
        rows = []
        for at in itertools.product(*map(range, lead)):
            first = (None if s is None else s[at][None] for s in start)
            ranks = zip(parameters, (2, 2, 1, 1), strict=False)
            own = (p if p is None or p.dim() == rank else p[at[0]] for p, rank in ranks)
            y, *final = whole(x[at][None, : int(lengths[0][at])], *first, *own, **options)
            rows.append((F.pad(y, (0, 0, 0, length - y.shape[1])), *final))
        return tuple(torch.cat(column).unflatten(0, lead) for column in zip(*rows, strict=True))

    return ragged


def _rules(
    cell: Cell,
    recurrence: _Loops | _Kernels,
    product: matrices.Product,
    dtypes: frozenset[torch.dtype] | None = None,
) -> Rules:
    widen = all_wide if dtypes is None else tuple  # kernels that list their dtypes take half precision

    def times(*pairs: tuple[Tensor | None, Tensor | None], add: Tensor | None = None) -> Any:
        """Returns add + Σ x w for x [T, B, L, in] and w [T, in, out], as [T, B, L, out]; None if there is no term."""
        flat = ((None if x is None else x.flatten(1, 2), w) for x, w in pairs)
        y = products(product, *flat, add=None if add is None else add.flatten(1, 2))
        return None if y is None else y.unflatten(1, next(x for x, _ in pairs if x is not None).shape[1:3])

    def outer(*pairs: tuple[Tensor, Tensor | None]) -> Any:
        """Returns Σ ctᵀ x over each task's tokens, [T, out, in], for ct [T, B, L, out] and x [T, B, L, in]."""
        return products(product, *((ct.flatten(1, 2).mT, None if x is None else x.flatten(1, 2)) for ct, x in pairs))

    def forward(c: SimpleNamespace, inputs: Tensors) -> tuple[Tensors, Tensors]:
        x, *states, w_ih, w_hh, b_ih, b_hh = widen(inputs)
        bias = b_ih if cell.split else _sum(b_ih, b_hh)
        u = times((x, w_ih.mT), add=_steps(bias, x))
        y, r = recurrence.forward(c, u, w_hh, b_hh if cell.split else None, states)
        return _narrow(inputs, y), _narrow(inputs, r)

    def jvp(c: SimpleNamespace, inputs: Tensors, r: Tensors, t_inputs: Tensors) -> tuple[Tensors, Tensors]:
        x, *_, w_ih, w_hh, _, _ = widen(inputs)
        t_x, *t_states, t_w_ih, t_w_hh, t_b_ih, t_b_hh = widen(t_inputs)
        gates, before = cell.residuals(widen(r))
        of_x = (t_x, w_ih.mT), (x, None if t_w_ih is None else t_w_ih.mT)
        of_h = (before[0], None if t_w_hh is None else t_w_hh.mT)
        of_bias = _steps(t_b_ih if cell.split else _sum(t_b_ih, t_b_hh), x)
        if cell.split:
            t_u, t_p = times(*of_x, add=of_bias), times(of_h, add=_steps(t_b_hh, x))
        else:
            t_u, t_p = times(*of_x, of_h, add=of_bias), None
        if t_u is None:
            t_u = x.new_zeros(*x.shape[:3], w_hh.shape[1])
        elif t_x is None and t_w_ih is None and (cell.split or t_w_hh is None):
            t_u = t_u.clone()  # it is the user's bias, and a kernel may overwrite its first input
        t_y, t_r = recurrence.jvp(c, t_u, t_p, w_hh, gates, before, t_states)
        return _narrow(inputs, t_y), _narrow(inputs, t_r)

    def vjp(c: SimpleNamespace, inputs: Tensors, r: Tensors, ct_outputs: Tensors) -> Tensors:
        x, *_, w_ih, w_hh, _, _ = widen(inputs)
        gates, before = cell.residuals(widen(r))
        ct_a, ct_u, ct_states, cts = recurrence.vjp(c, w_hh, gates, before, widen(ct_outputs))
        needs = c.needs
        ct_x = times((ct_u, w_ih)) if needs[0] else None
        ct_w_ih = outer((ct_u, x)) if needs[-4] else None
        ct_w_hh = outer((ct_a, before[0])) if needs[-3] else None
        return _narrow(inputs, (ct_x, *ct_states, ct_w_ih, ct_w_hh, *sums(needs, ct_u, ct_a), *cts))

    def vjp_jvp(
        c: SimpleNamespace,
        inputs: Tensors,
        r: Tensors,
        t_inputs: Tensors,
        t_r: Tensors,
        ct_outputs: Tensors,
        t_ct_outputs: Tensors | None,
    ) -> Tensors:
        x, *_, w_ih, w_hh, _, _ = widen(inputs)
        t_x, *_, t_w_ih, t_w_hh, _, _ = widen(t_inputs)
        (gates, before), (t_gates, t_before) = cell.residuals(widen(r)), cell.residuals(widen(t_r))
        if c.from_vjp is None:
            ct_a, ct_u, _, cts = recurrence.vjp(c, w_hh, gates, before, widen(ct_outputs))
        else:
            cts = widen(c.from_vjp)
            ct_a, ct_u = recurrence.cotangents(c, gates, before, cts)
        source = times((ct_a, t_w_hh))
        t_ct = widen(t_ct_outputs or (None,) * (1 + cell.states))
        t_ct_a, t_ct_u, t_ct_states = recurrence.vjp_jvp(c, w_hh, gates, before, t_gates, t_before, cts, source, t_ct)
        needs = c.needs
        t_ct_x = times((t_ct_u, w_ih), (ct_u, t_w_ih)) if needs[0] else None
        t_ct_w_ih = outer((t_ct_u, x), (ct_u, t_x)) if needs[-4] else None
        t_ct_w_hh = outer((t_ct_a, before[0]), (ct_a, t_before[0])) if needs[-3] else None
        return _narrow(inputs, (t_ct_x, *t_ct_states, t_ct_w_ih, t_ct_w_hh, *sums(needs, t_ct_u, t_ct_a)))

    def sums(needs: Sequence[bool], ct_u: Tensor, ct_a: Tensor) -> Tensors:
        """Returns ct_b_ih and ct_b_hh, which are equal unless the cell is `split`."""
        of_u = ct_u.sum((1, 2)) if needs[-2] else None
        if not needs[-1]:
            return of_u, None
        return of_u, ct_a.sum((1, 2)) if of_u is None or cell.split else of_u.clone()

    return Rules(forward, jvp, vjp, vjp_jvp, dtypes)


class _Loops:
    """The recurrence in plain PyTorch, on any device: at each step a product, then the cell's formulas."""

    def __init__(self, cell: Cell) -> None:
        self.cell = cell

    def forward(
        self, c: SimpleNamespace, u: Tensor, w_hh: Tensor, b_hh: Tensor | None, states: Sequence[Tensor | None]
    ) -> tuple[Tensors, Tensors]:
        cell, hidden, steps = self.cell, w_hh.shape[2], []
        s = _started(states, u, hidden)
        bias = None if b_hh is None else b_hh[:, None]
        for l, inside in _times(c, u):
            p = matrices.product(s[0], w_hh.mT, bias).chunk(cell.gates, -1)
            new, kept = cell.forward(c, u[:, :, l].chunk(cell.gates, -1), p, s)
            steps.append(inside((new[0], torch.cat(kept, -1), *s)))
            s = inside(new, s)
        y, *r = _stacked(c.reverse, steps, u, (hidden, cell.kept * hidden, *(hidden,) * cell.states))
        return (y, *s), tuple(r[not cell.keeps_gates :])

    def jvp(
        self,
        c: SimpleNamespace,
        t_u: Tensor,
        t_p: Tensor | None,
        w_hh: Tensor,
        gates: Tensor,
        before: Tensors,
        t_states: Sequence[Tensor | None],
    ) -> tuple[Tensors, Tensors]:
        cell, hidden, steps = self.cell, w_hh.shape[2], []
        t_s = _started(t_states, t_u, hidden)
        for l, inside in _times(c, t_u):
            p = matrices.product(t_s[0], w_hh.mT, None if t_p is None else t_p[:, :, l]).chunk(cell.gates, -1)
            kept, s = gates[:, :, l].chunk(cell.kept, -1), tuple(b[:, :, l] for b in before)
            t_new, t_kept = cell.jvp(c, kept, s, t_u[:, :, l].chunk(cell.gates, -1), p, t_s)
            steps.append(inside((t_new[0], torch.cat(t_kept, -1), *t_s)))
            t_s = inside(t_new, t_s)
        t_y, *t_r = _stacked(c.reverse, steps, t_u, (hidden, cell.kept * hidden, *(hidden,) * cell.states))
        return (t_y, *t_s), tuple(t_r[not cell.keeps_gates :])

    def vjp(
        self, c: SimpleNamespace, w_hh: Tensor, gates: Tensor, before: Tensors, ct_outputs: Tensors
    ) -> tuple[Tensor, Tensor, Tensors, Tensors]:
        cell = self.cell

        def pull(l: int, ct: Gates) -> tuple[Gates, Gates, Gates, Gates]:
            kept, s = gates[:, :, l].chunk(cell.kept, -1), tuple(b[:, :, l] for b in before)
            ct = cell.total(c, kept, s, ct)
            return *cell.vjp(c, kept, s, ct), ct

        return self._back(c, w_hh, ct_outputs, pull, cell.states)

    def cotangents(self, c: SimpleNamespace, gates: Tensor, before: Tensors, cts: Tensors) -> tuple[Tensor, Tensor]:
        ct_a, ct_u, _ = self.cell.vjp(c, gates.chunk(self.cell.kept, -1), before, cts)
        return torch.cat(ct_a, -1), torch.cat(ct_u, -1)

    def vjp_jvp(
        self,
        c: SimpleNamespace,
        w_hh: Tensor,
        gates: Tensor,
        before: Tensors,
        t_gates: Tensor,
        t_before: Tensors,
        cts: Tensors,
        source: Tensor | None,
        t_ct_outputs: Tensors,
    ) -> tuple[Tensor, Tensor, Tensors]:
        cell = self.cell

        def pull(l: int, t_ct: Gates) -> tuple[Gates, Gates, Gates, Gates]:
            kept, t_kept = (g[:, :, l].chunk(cell.kept, -1) for g in (gates, t_gates))
            s, t_s, ct = (tuple(b[:, :, l] for b in states) for states in (before, t_before, cts))
            t_ct_a, t_ct_u, t_ct_s = cell.vjp_jvp(c, kept, s, t_kept, t_s, ct, t_ct)
            t_ct_h = t_ct_s[0] if source is None else t_ct_s[0] + source[:, :, l]
            return t_ct_a, t_ct_u, (t_ct_h, *t_ct_s[1:]), ()

        t_ct_y, *t_ct_last = (
            cts[0].new_zeros(shape) if t is None else t
            for t, shape in zip(
                t_ct_outputs, (cts[0].shape, *((*ct.shape[:2], ct.shape[3]) for ct in cts)), strict=True
            )
        )
        return self._back(c, w_hh, (t_ct_y, *t_ct_last), pull, 0)[:3]

    def _back(
        self, c: SimpleNamespace, w_hh: Tensor, ct_outputs: Tensors, pull: Callable[..., Any], totals: int
    ) -> tuple[Tensor, Tensor, Tensors, Tensors]:
        """Runs a recurrence backward in time, with `pull` as the formulas of one step.

        Returns ct_a, ct_u, the cotangents of the initial states, and the `totals` total cotangents from `pull`.
        """
        ct_y, *last = ct_outputs
        rows, hidden = w_hh.shape[1:]
        steps, ct_s = [], tuple(ct.clone() for ct in last)  # as without steps they are returned
        for l, inside in _times(c, ct_y, back=True):
            ct_a, ct_u, ct_new, total = pull(l, (ct_s[0] + ct_y[:, :, l], *ct_s[1:]))
            ct_a, ct_u, *total = inside((torch.cat(ct_a, -1), torch.cat(ct_u, -1), *total))
            steps.append((ct_a, ct_u, *total))
            ct_h, *ct_rest = inside(ct_new, ct_s)
            ct_s = matrices.product(ct_a, w_hh, ct_h), *ct_rest
        found = _stacked(not c.reverse, steps, ct_y, (rows, rows, *(hidden,) * totals))
        return found[0], found[1], ct_s, found[2:]


class _Kernels:
    """The recurrence in C++ or CUDA, by the kernels `<cell>_<rule>` of csrc/cpu and csrc/cuda."""

    def __init__(self, cell: Cell) -> None:
        self.cell = cell

    def forward(
        self, c: SimpleNamespace, u: Tensor, w_hh: Tensor, b_hh: Tensor | None, states: Sequence[Tensor | None]
    ) -> tuple[Tensors, Tensors]:
        weights = (w_hh, b_hh) if self.cell.split else (w_hh,)
        return self._outputs(self._call(c, "forward", (u,), weights, (*states, c.lengths)))

    def jvp(
        self,
        c: SimpleNamespace,
        t_u: Tensor,
        t_p: Tensor | None,
        w_hh: Tensor,
        gates: Tensor,
        before: Tensors,
        t_states: Sequence[Tensor | None],
    ) -> tuple[Tensors, Tensors]:
        t_p_too = (t_p,) if self.cell.split else ()
        rest = (*t_p_too, gates, *self._read(before), *t_states, c.lengths)
        return self._outputs(self._call(c, "jvp", (t_u,), (w_hh,), rest))

    def vjp(
        self, c: SimpleNamespace, w_hh: Tensor, gates: Tensor, before: Tensors, ct_outputs: Tensors
    ) -> tuple[Tensor, Tensor, Tensors, Tensors]:
        ct_y, *ct_last = ct_outputs
        rest = gates, *self._read(before), *ct_last, c.lengths
        ct_a, ct_u, *ct = self._cotangents(self._call(c, "vjp", (ct_y,), (w_hh,), rest))
        return ct_a, ct_u, tuple(ct[: self.cell.states]), tuple(ct[self.cell.states :])

    def cotangents(self, c: SimpleNamespace, gates: Tensor, before: Tensors, cts: Tensors) -> tuple[Tensor, Tensor]:
        found = native.call(f"{self.cell.name(c)}_cotangents", *cts, gates, *self._read(before))
        ct_a, ct_u = self._cotangents(found)
        return ct_a, ct_u

    def vjp_jvp(
        self,
        c: SimpleNamespace,
        w_hh: Tensor,
        gates: Tensor,
        before: Tensors,
        t_gates: Tensor,
        t_before: Tensors,
        cts: Tensors,
        source: Tensor | None,
        t_ct_outputs: Tensors,
    ) -> tuple[Tensor, Tensor, Tensors]:
        rest = gates, *self._read(before), t_gates, *self._read(t_before), source, *t_ct_outputs, c.lengths
        ct_a, ct_u, *ct_states = self._cotangents(self._call(c, "vjp_jvp", cts, (w_hh,), rest))
        return ct_a, ct_u, tuple(ct_states)

    def _read(self, before: Tensors) -> Tensors:
        """Returns the states that the cell's formulas read: c of an LSTM, h of a GRU, none of an RNN."""
        return before if self.cell.split else before[1:]

    def _outputs(self, found: Tensors) -> tuple[Tensors, Tensors]:
        n = 1 + self.cell.states
        return found[:n], found[n:]

    def _cotangents(self, found: Tensors) -> Tensors:
        """Inserts ct_u where the kernel has left it out because it equals ct_a."""
        return found if self.cell.split else (found[0], *found)

    def _call(self, c: SimpleNamespace, rule: str, first: Tensors, weights: Tensors, rest: Tensors) -> Tensors:
        """Runs a kernel. If all tasks share their weights, they are passed as one task with T * B sequences."""
        tasks = first[0].shape[0]
        merge = tasks > 1 and all(w is None or shared(w) for w in weights)
        if merge:
            weights = tuple(w if w is None else w[:1] for w in weights)
            first, rest = (tuple(t if t is None else t.flatten(0, 1)[None] for t in ts) for ts in (first, rest))
        kernel, scalars = f"{self.cell.name(c)}_{rule}", (float(c.reverse),)
        found: Tensors = native.call(kernel, *first, *weights, *rest, scalars=scalars)
        return tuple(t[0].unflatten(0, (tasks, -1)) for t in found) if merge else found


def all_wide(tensors: Iterable[Tensor | None]) -> tuple[Any, ...]:
    """Converts half precision to float32; a tensor that is expanded over the tasks stays expanded."""

    def widened(t: Tensor | None) -> Tensor | None:
        if t is None or t.dtype not in (torch.float16, torch.bfloat16):
            return t
        return t[:1].float().expand_as(t) if shared(t) else t.float()

    return tuple(widened(t) for t in tensors)


def _narrow(inputs: Sequence[Any], tensors: Iterable[Any]) -> tuple[Any, ...]:
    """Converts tensors to the dtype of the op's inputs."""
    return tuple(t if t is None else t.to(inputs[0].dtype) for t in tensors)


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return a if b is None else b if a is None else a + b


def _steps(bias: Tensor | None, x: Tensor) -> Tensor | None:
    """Expands a bias [T, out] to [T, B, L, out] for all steps of x [T, B, L, in]."""
    return None if bias is None else bias[:, None, None].expand(-1, *x.shape[1:3], -1)


def _started(states: Sequence[Tensor | None], like: Tensor, hidden: int) -> Gates:
    """Returns copies of the initial states, zeros for None."""
    return tuple(like.new_zeros(*like.shape[:2], hidden) if s is None else s.clone() for s in states)


def _times(c: SimpleNamespace, x: Tensor, back: bool = False) -> Iterator[tuple[int, Callable[..., Gates]]]:
    """Yields the steps in order, or backward if `back`, each with a function inside(new, old).

    inside replaces `new` by `old`, or by zero if there is no `old`, in sequences that end before the step.
    """
    length = x.shape[2]
    for l in range(length) if c.reverse == back else reversed(range(length)):
        mask = None if c.lengths is None else (l < c.lengths).unsqueeze(-1)

        def inside(new: Gates, old: Gates | None = None, mask: Tensor | None = mask) -> Gates:
            if mask is None:
                return new
            return tuple(torch.where(mask, n, 0 if old is None else old[i]) for i, n in enumerate(new))

        yield l, inside


def _stacked(latest_first: bool, steps: list[Gates], like: Tensor, sizes: Sequence[int]) -> Tensors:
    """Stacks tensors [T, B, size] of each step to [T, B, L, size]; zeros shaped by `like`, [T, B, L, ...], if L = 0."""
    if not steps:
        return tuple(like.new_zeros(*like.shape[:3], size) for size in sizes)
    return tuple(torch.stack(column, 2) for column in zip(*steps[:: -1 if latest_first else 1], strict=True))
