"""Implicit weights: in the inner loop, the weights that tasks have of linear layers and embeddings are not formed.

Where the inner optimizer makes linear combinations of parameters and gradients, as gradient descent does, the weight of
a task after k steps is

    W_k = c_k0 W_0 + Σ_j<k c_k,j+1 G_j        G_j = D_jᵀ X_j

with X_j what the layer saw in step j, D_j the cotangent of its output there, and so G_j the gradient. The layer needs
only W_0, which all tasks share, and the pairs (X_j, D_j):

    y = c_k0 x W_0ᵀ + Σ_j<k c_k,j+1 (x X_jᵀ) D_j

Memory grows with the number of tokens in place of parameters, and the inner loop computes no gradient of a weight. The
coefficients c_k are what the inner optimizer makes of (1, 0, 0, …) in place of the parameter and (0, 1, 0, …),
(0, 0, 1, …), … in place of the gradients, so that rates, momentum and weight decay, fixed or learned, act on them as
they do on weights. An optimizer that reads the norms of gradients gets e_j+1 ‖G_j‖ in place of G_j, and the pair then
holds D_j / ‖G_j‖. Norms need no G_j:

    ‖G_j‖² = Σ_nm (X_j X_jᵀ)_nm (D_j D_jᵀ)_nm

An embedding is a linear layer of unit vectors e(token), so its pairs hold the tokens t_j in place of X_j. If it shares
its table W_0 [tokens, D] with an output layer, each takes the pairs of the other too:

    embedding       y = c_k0 W_0[t] + Σ_j c_k,j+1 ([t = t_j] D_j,  and (D_j at the columns t)ᵀ X_j of the output layer)
    output layer    y = … + Σ_j c_k,j+1 x D_jᵀ, added to the columns t_j

| tensor | shape |
|---|---|
| W_0 | [out, in] |
| c_k, which phi_k holds in place of the weight | [T, K + 1] |
| x, y | [T, N, in], [T, N, out] |
| X_j, D_j | [T, N_j, in], [T, N_j, out] |
| t_j | [T, N_j, 1], as floating-point numbers |

phi_k also holds the pairs of the steps before, so a step adds a pair for each call of a layer. Its pullback is one
Hessian-vector product, as with weights: D is the gradient of the loss with respect to y, so the cotangent of D becomes
a tangent of y, and that of X one more cotangent of the layer's input. docs/design/implicit.md derives it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn

from metakern import ops
from metakern.meta.batches import Outer, at_step
from metakern.meta.batching import Folded, Loss
from metakern.meta.fold import LINEAR, Fold, FoldError, per_task
from metakern.meta.parameters import Parameters
from metakern.meta.unroll import Gradients, Point, Result, Slope, Unroll, added, derivatives, pulled_back, with_zeros
from metakern.optim.base import State

Pairs = list[tuple[int, Tensor, Tensor]]  # (j + 1, X_j, D_j) for each call of a weight's layers in step j, in turn
Call = tuple[str, int, bool]  # the name of a weight, the index of the input, and whether it is a look-up


@dataclass(frozen=True)
class Layout:
    """Which tensors a step adds to phi: `inputs` inputs X, which calls may share, then a cotangent D for each call."""

    inputs: int
    calls: tuple[Call, ...]

    @property
    def size(self) -> int:
        return self.inputs + len(self.calls)


@dataclass
class Seen:
    """What the implicit layers saw in a forward pass: inputs [T, N, in], and for each call its output [T, N, out]."""

    inputs: list[Tensor] = field(default_factory=list)
    outputs: list[Tensor] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    arguments: dict[int, tuple[Tensor, int]] = field(default_factory=dict)  # id of a tensor -> (it, index of the input)

    def index(self, argument: Tensor, rows: Tensor) -> int:
        """Return the index of a layer's input; layers that are called on the same tensor share it."""
        if id(argument) not in self.arguments:
            self.arguments[id(argument)] = argument, len(self.inputs)
            self.inputs.append(rows)
        return self.arguments[id(argument)][1]

    @property
    def layout(self) -> Layout:
        return Layout(len(self.inputs), tuple(self.calls))


class Implicit(Folded):
    """Folding, where the weights `names` are implicit. `decays`: whether c_k0 may differ from 1."""

    def __init__(self, parameters: Parameters, loss: Loss, plain: bool, names: Sequence[str], decays: bool) -> None:
        super().__init__(parameters, loss, plain)
        self.explicit, self.decays = Folded(parameters, loss, plain), decays
        self.size = len(parameters.adapted)  # of phi without pairs
        self.places = {name: i for i, name in enumerate(parameters.adapted) if name in names}  # in phi
        self.transposed: dict[str, bool] = {}
        for module, _, name in parameters.places:
            if name in self.places:
                unit = self.fold.units[module]
                self.transposed[name] = LINEAR.get(unit, False)
                self.fold.units[module] = partial(self._linear if unit in LINEAR else self._look_up, name)
        self.layouts: list[Layout] = []  # of the inner steps
        self.learns = False  # whether autograd is to differentiate with respect to W_0
        self.pair_bytes = 0  # an estimate of what a step adds to phi, for each task
        self._sums: dict[str, Tensor] = {}  # gradients of W_0
        self._pairs: dict[str, Pairs] = {}
        self._tokens: dict[str, Pairs] = {}  # those of look-ups
        self._joined: dict[tuple[int, ...], Tensor] = {}
        self._seen: Seen | None = None
        self._tangents: Iterator[Tensor | None] = iter(())

    @property
    def weights(self) -> dict[str, Tensor]:
        """The shared weights W_0, by name."""
        return {name: self.parameters.adapted[name] for name in self.places}

    @contextmanager
    def learning(self) -> Iterator[None]:
        """Within the block autograd differentiates with respect to W_0 too."""
        self.learns = True
        try:
            yield
        finally:
            self.learns = False

    def losses(self, phi: Sequence[Tensor], batch: Any) -> Tensor:
        params, T = list(phi[: self.size]), phi[0].shape[0]
        self._coefficients = {name: params[i] for name, i in self.places.items()}
        self._pairs, self._tokens = self._opened(phi)
        for i, weight in zip(self.places.values(), self.weights.values(), strict=True):
            params[i] = weight.new_full((), torch.nan).expand(T, *weight.shape)  # what reads it becomes NaN
        try:
            return super().losses(params, batch)
        finally:
            self._pairs, self._tokens, self._joined = {}, {}, {}

    def seen(self, phi: Sequence[Tensor], batch: Any, tangents: Gradients = ()) -> tuple[Tensor, Seen]:
        """Return the losses [T], and what the layers saw; `tangents` are added to the outputs of the calls."""
        self._seen, self._tangents = Seen(), iter(tangents)
        try:
            return self.losses(phi, batch), self._seen
        finally:
            self._seen, self._tangents = None, iter(())

    def steps(self, phi: Sequence[Tensor]) -> int:
        """Return the number of inner steps whose pairs phi holds."""
        size, k = self.size, 0
        while size < len(phi):
            size, k = size + self.layouts[k].size, k + 1
        return k

    def keep(self, k: int, layout: Layout) -> None:
        """Keep the layout of step k."""
        self.layouts[k : k + 1] = [layout]

    def norms(self, layout: Layout, pairs: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return the norm of the gradient of each weight that a step used, [T], given its pairs; above zero."""
        calls: dict[str, dict[bool, list[int]]] = {}
        for call, (name, _, looks_up) in enumerate(layout.calls):
            calls.setdefault(name, {}).setdefault(looks_up, []).append(call)
        products: dict[tuple[int, ...], Tensor] = {}  # X Xᵀ, once for all layers that were called on the same inputs
        found = {}
        for name, kinds in calls.items():
            square, sides = pairs[0].new_zeros(len(pairs[0])), {}
            for looks_up, of in kinds.items():
                inputs = tuple(layout.calls[call][1] for call in of)
                X = torch.cat([pairs[i] for i in inputs], 1)
                D = torch.cat([pairs[layout.inputs + call] for call in of], 1)
                if inputs not in products:
                    products[inputs] = (X.mT == X).to(X.dtype) if looks_up else X @ X.mT
                square = square + (products[inputs] * (D @ D.mT)).sum((1, 2))
                sides[looks_up] = X, D
            if len(sides) == 2:
                (X, D), (tokens, rows) = sides[False], sides[True]
                square = square + 2 * (_columns(D, tokens.squeeze(2).long()) * (X @ rows.mT)).sum((1, 2))
            found[name] = square.clamp_min(torch.finfo(square.dtype).tiny).sqrt()
        return found

    def _opened(self, phi: Sequence[Tensor]) -> tuple[dict[str, Pairs], dict[str, Pairs]]:
        """Return the pairs that phi holds, for each implicit weight: those of layers, and those of look-ups."""
        of_layers: dict[str, Pairs] = {name: [] for name in self.places}
        of_look_ups: dict[str, Pairs] = {name: [] for name in self.places}
        start = self.size
        for k, layout in enumerate(self.layouts[: self.steps(phi)], 1):
            X, D = phi[start : start + layout.inputs], phi[start + layout.inputs : start + layout.size]
            for (name, i, looks_up), d in zip(layout.calls, D, strict=True):
                (of_look_ups if looks_up else of_layers)[name].append((k, X[i], d))
            start += layout.size
        return of_layers, of_look_ups

    def formed(self, phi: Sequence[Tensor]) -> list[Tensor]:
        """Return all parameters of each task at phi, [T, *shape]."""
        found, (of_layers, of_look_ups) = list(phi[: self.size]), self._opened(phi)
        for name, i in self.places.items():
            total = phi[i][:, :1, None] * self.parameters.adapted[name].detach()
            for k, x, d in of_layers[name]:
                left, right = (x, d) if self.transposed[name] else (d, x)
                total = torch.baddbmm(total, (phi[i][:, k, None, None] * left).mT, right)
            for k, tokens, d in of_look_ups[name]:
                total = total.scatter_add(1, tokens.long().expand(d.shape), phi[i][:, k, None, None] * d)
            found[i] = total
        return found

    def add_gradients(self, seen: Seen, cts: Sequence[tuple[Tensor | None, Tensor | None]]) -> None:
        """Add dᵀ x + eᵀ t_x, for the cotangents (d, e) of each call and its input x, to the gradient of its W_0.

        So a weight's gradient takes its own memory once, whatever the numbers of steps and tasks.
        """
        for (name, i, looks_up), ct in zip(seen.calls, cts, strict=True):
            factor = self._shares(name) if looks_up else self._scaled(name, seen.inputs[i])
            for d, x in zip(ct, forward_ad.unpack_dual(factor), strict=True):
                if d is None or x is None:
                    continue
                known, d, x = self._sums.get(name), d.detach(), x.detach()
                if looks_up:
                    total = torch.zeros_like(self.parameters.adapted[name]) if known is None else known
                    tokens = seen.inputs[i].detach().flatten().long()
                    self._sums[name] = total.index_add(0, tokens, (d * x).flatten(0, 1))
                    continue
                d, x = d.flatten(0, 1), x.flatten(0, 1)
                left, right = (x.mT, d) if self.transposed[name] else (d.mT, x)
                self._sums[name] = left @ right if known is None else torch.addmm(known, left, right)

    def take_gradients(self) -> Gradients:
        """Return the gradients of all W_0 that were added up, and begin anew."""
        sums, self._sums = self._sums, {}
        return [sums.get(name) for name in self.places]

    def _linear(self, name: str, fold: Fold, module: nn.Module, x: Tensor) -> Tensor:
        """Run a linear layer; the rule of a unit."""
        W, bias = self.parameters.adapted[name], fold.weight(module, "bias")
        weight = W if self.learns else W.detach()
        weight = weight.mT if self.transposed[name] else weight

        def run(tasks: Tensor) -> Tensor:
            rows = tasks.reshape(fold.tasks, -1, tasks.shape[-1])
            y = ops.linear(self._scaled(name, rows), weight)
            if self._pairs[name]:
                y = y + ops.implicit_linear(rows, None, bias, *self._factors(name))
            elif bias is not None:
                y = y + bias.unsqueeze(1)
            if self._tokens[name]:
                seen, D = self._looked_up(name)
                scores = rows @ D.mT
                y = y.scatter_add(2, seen.unsqueeze(1).expand(scores.shape), scores)
            if self._seen is not None:
                y = self._recorded(self._seen, (name, self._seen.index(x, rows), False), y)
            return y.view(*tasks.shape[:-1], -1)

        return per_task(fold, x, run)

    def _look_up(self, name: str, fold: Fold, module: Any, tokens: Tensor) -> Tensor:
        """Look up the rows of an embedding; the rule of a unit."""
        W = self.parameters.adapted[name]

        def run(tasks: Tensor) -> Tensor:
            rows = tasks.reshape(fold.tasks, -1).long()
            y = self._scaled(name, ops.embedding(rows, W if self.learns else W.detach()))
            if self._pairs[name]:
                X, D, rates = self._factors(name)
                y = y - (_columns(D, rows) * rates.unsqueeze(2)).mT @ X
            if self._tokens[name]:
                seen, D = self._looked_up(name)
                y = y + (rows.unsqueeze(2) == seen.unsqueeze(1)).to(D.dtype) @ D
            if self._seen is not None:
                i = self._seen.index(tokens, rows.unsqueeze(2).to(y.dtype))
                y = self._recorded(self._seen, (name, i, True), y)
            if module.padding_idx is not None:  # whose row has no gradient
                y = torch.where((rows == module.padding_idx).unsqueeze(2), y.detach(), y)
            return y.view(*tasks.shape, -1)

        return per_task(fold, tokens, run)

    def _shares(self, name: str) -> Tensor:
        """Return the coefficient of W_0 for each task, [T, 1, 1]."""
        return self._coefficients[name][:, :1, None]

    def _scaled(self, name: str, rows: Tensor) -> Tensor:
        """Return the rows of a layer's input, or of a table, times the coefficient of W_0."""
        return rows * self._shares(name) if self.decays else rows

    def _factors(self, name: str) -> tuple[Tensor, Tensor, Tensor]:
        """Return the pairs of all steps and calls as one, [T, M, in] and [T, M, out], and the rates of their rows."""
        c, pairs = self._coefficients[name], self._pairs[name]
        key = tuple(id(x) for _, x, _ in pairs)
        if key not in self._joined:  # once for all layers that were called on the same inputs
            self._joined[key] = torch.cat([x for _, x, _ in pairs], 1)
        D = torch.cat([d for _, _, d in pairs], 1)
        rates = torch.cat([-c[:, k : k + 1].expand(-1, x.shape[1]) for k, x, _ in pairs], 1)
        return self._joined[key], D, rates

    def _looked_up(self, name: str) -> tuple[Tensor, Tensor]:
        """Return the tokens of all look-ups in the steps before, [T, M], and their D times the coefficients."""
        c, pairs = self._coefficients[name], self._tokens[name]
        tokens = torch.cat([tokens for _, tokens, _ in pairs], 1).squeeze(2).long()
        return tokens, torch.cat([c[:, k, None, None] * d for k, _, d in pairs], 1)

    def _recorded(self, seen: Seen, call: Call, y: Tensor) -> Tensor:
        """Record a call, and return its output with the next of the tangents added to it."""
        if torch.is_grad_enabled() and not y.requires_grad:  # nothing before it learns, but D is wanted
            y.requires_grad_()
        if (tangent := next(self._tangents, None)) is not None:
            primal, t_y = forward_ad.unpack_dual(y)
            y = forward_ad.make_dual(primal, tangent if t_y is None else t_y + tangent)
        seen.calls.append(call)
        seen.outputs.append(y)
        return y


@dataclass(frozen=True)
class ImplicitUnroll(Unroll):
    """An inner loop with implicit weights.

    W_0 counts as a parameter that the inner loop does not adapt, before `shared`. Where its gradient is found from the
    inputs and outputs of the layers, `batching` adds it up. In a result it is the sum over the tasks, [1, *shape].
    """

    batching: Implicit

    @property
    def explicit(self) -> Unroll:
        """The same inner loop with weights for each task, which may start anywhere."""
        return Unroll(**{f.name: getattr(self, f.name) for f in fields(self)} | {"batching": self.batching.explicit})

    def initial(self, theta: Sequence[Tensor], steps: int) -> list[Tensor]:
        places = self.batching.places.values()
        return [_unit(p, 0, steps + 1) if i in places else p for i, p in enumerate(theta)]

    def formed(self, phi: Sequence[Tensor]) -> list[Tensor]:
        return self.batching.formed(phi)

    def store(self, theta: Sequence[Tensor], shared: Sequence[Tensor], support: Any, outer: Outer) -> Result:
        with self.batching.learning():
            return self._result(super().store(theta, [*self.batching.weights.values(), *shared], support, outer))

    def recompute(self, theta: Sequence[Tensor], shared: Sequence[Tensor], support: Any, outer: Outer) -> Result:
        self.batching.take_gradients()  # of a run that was stopped, as where memory ran out
        return self._result(super().recompute(theta, [*self.batching.weights.values(), *shared], support, outer))

    def weight_gradients(self, found: Gradients) -> Gradients:
        """Return the gradients of W_0: those found, and those added up since the last call."""
        return added(found[: len(self.batching.places)], self.batching.take_gradients())

    def _result(self, found: Result) -> Result:
        """Return a result with the gradients of W_0 among those of theta."""
        theta, places = list(found.theta), self.batching.places.values()
        for i, ct in zip(places, self.weight_gradients(found.shared), strict=True):
            theta[i] = None if ct is None else ct[None]
        return replace(found, theta=theta, shared=found.shared[len(places) :])

    def slope(self, phi: Sequence[Tensor], batch: Any) -> Slope:
        learned = set(range(self.batching.size)) - set(self.batching.places.values())
        with torch.enable_grad():
            leaves = [p.detach().requires_grad_(i in learned) for i, p in enumerate(phi)]
            return self._differentiated(leaves, batch, create_graph=False)

    def _differentiated(self, phi: Sequence[Tensor], batch: Any, create_graph: bool) -> Slope:
        losses, seen = self.batching.seen(phi, batch)
        self.batching.keep(self.batching.steps(phi), seen.layout)
        wanted = [*phi[: self.batching.size], *seen.outputs]
        ct = with_zeros(derivatives(losses.sum(), wanted, create_graph=create_graph), wanted)
        grads, pairs = self._grads(phi, ct), [*seen.inputs, *ct[self.batching.size :]]
        if create_graph:
            return Slope(grads, losses, pairs)
        return Slope(grads, losses.detach(), [t.detach() for t in pairs])

    def _grads(self, phi: Sequence[Tensor], found: Gradients) -> list[Any]:
        """Return the gradients at phi: those found, and for each implicit weight the unit vector of this step."""
        k, grads = self.batching.steps(phi), list(found[: self.batching.size])
        for i in self.batching.places.values():
            grads[i] = _unit(phi[i], k + 1, phi[i].shape[1])
        return grads

    def _updated(self, phi: Sequence[Tensor], slope: Slope, state: State) -> tuple[list[Tensor], State]:
        n, slope = self.batching.size, self._normalized(phi, slope)
        after, state = super()._updated(phi[:n], slope, state)
        return [*after, *phi[n:], *slope.pairs], state

    def _normalized(self, phi: Sequence[Tensor], slope: Slope) -> Slope:
        """Return the slope at phi for an optimizer that reads norms: the lengths of pairs stand in the gradients."""
        if not self.inner.takes_norms:
            return slope
        layout, grads = self.batching.layouts[self.batching.steps(phi)], list(slope.grads)
        X, D = slope.pairs[: layout.inputs], slope.pairs[layout.inputs :]
        norms = self.batching.norms(layout, slope.pairs)
        for name, i in self.batching.places.items():  # a weight that no layer used has no gradient
            grads[i] = grads[i] * (norms[name][:, None] if name in norms else 0)
        D = [d / norms[name][:, None, None] for (name, *_), d in zip(layout.calls, D, strict=True)]
        return replace(slope, grads=grads, pairs=[*X, *D])

    def of_query(
        self, phi: Sequence[Tensor], shared: Sequence[Tensor], outer: Outer, k: int
    ) -> tuple[Tensor, Gradients]:
        with torch.enable_grad():
            leaves = [p.detach().requires_grad_() for p in phi]
            losses, seen = self.batching.seen(leaves, at_step(outer.batch, k))
            losses = outer.weighted(losses, k)
            ct = derivatives(losses.sum(), [*leaves, *seen.outputs, *shared[len(self.batching.places) :]])
        n, m = len(phi), len(phi) + len(seen.outputs)
        self.batching.add_gradients(seen, [(c, None) for c in ct[n:m]])
        return losses.detach(), [*ct[:n], *[None] * len(self.batching.places), *ct[m:]]

    def _pullback(
        self, point: Point, slope: Slope, ct_phi: Gradients, ct_state: Gradients
    ) -> tuple[Gradients, Gradients, Gradients, Gradients]:
        """Return what Unroll does; the cotangents of the new pairs come after those of the gradients."""
        n, m = self.batching.size, len(point.phi)
        with torch.enable_grad():
            pairs = [t.detach().requires_grad_() for t in slope.pairs]
            read = self._normalized(point.phi, replace(slope, grads=slope.grads[:n], pairs=pairs))
        update = super()._pullback(replace(point, phi=point.phi[:n]), read, ct_phi[:n], ct_state)
        of_phi, of_slope, of_state, of_hyper = update
        ct_pairs = ct_phi[m:]
        if self.inner.takes_norms:
            ct_pairs = pulled_back([*read.grads, *read.pairs], [*of_slope[:n], *ct_pairs], pairs)
        return [*of_phi, *ct_phi[n:m]], [*of_slope, *ct_pairs], of_state, of_hyper

    def _forward_over_reverse(
        self, phi: Sequence[Tensor], shared: Sequence[Tensor], batch: Any, v: Gradients, *ct_pairs: Tensor | None
    ) -> tuple[Gradients, Gradients]:
        layout = self.batching.layouts[self.batching.steps(phi)]
        ct_inputs, ct_outputs = ct_pairs[: layout.inputs], ct_pairs[layout.inputs :]
        with torch.enable_grad(), forward_ad.dual_level():
            duals = [p.detach().contiguous().requires_grad_() for p in phi]
            for i, t in enumerate(v):
                if t is not None and i not in self.batching.places.values():
                    duals[i] = forward_ad.make_dual(duals[i], t)
            losses, seen = self.batching.seen(duals, batch, ct_outputs)
            if seen.layout != layout:
                raise FoldError("the model must call the same layers whenever a step is computed")
            total, known = losses.sum(), [(x, t) for x, t in zip(seen.inputs, ct_inputs, strict=True) if t is not None]
            weights = [torch.ones_like(total), *(forward_ad.make_dual(torch.zeros_like(t), t) for _, t in known)]
            wanted = [*duals, *seen.outputs, *shared[len(self.batching.places) :]]
            ct = derivatives([total, *(x for x, _ in known)], wanted, weights)
            parts = [(None, None) if c is None else forward_ad.unpack_dual(c) for c in ct]
            n, m = len(phi), len(phi) + len(seen.outputs)
            self.batching.add_gradients(seen, [(t, c) for c, t in parts[n:m]])
        tangents = [t for _, t in parts]
        grads = [None if c is None else c.detach() for c, _ in parts[: self.batching.size]]
        return self._grads(phi, grads), [*tangents[:n], *[None] * len(self.batching.places), *tangents[m:]]

    def _reverse_over_reverse(
        self, phi: Sequence[Tensor], shared: Sequence[Tensor], batch: Any, v: Gradients, *ct_pairs: Tensor | None
    ) -> tuple[Gradients, Gradients]:
        with torch.enable_grad(), self.batching.learning():
            leaves = [p.detach().requires_grad_() for p in phi]
            slope = self._differentiated(leaves, batch, create_graph=True)
            products = pulled_back([*slope.grads, *slope.pairs], [*v, *ct_pairs], [*leaves, *shared])
        return [g.detach() for g in slope.grads], products


def _unit(like: Tensor, index: int, size: int) -> Tensor:
    """Return the unit vector of an axis for each task of `like`, [T, size]."""
    parts = [like.new_zeros(1, index), like.new_ones(1, 1), like.new_zeros(1, size - index - 1)]
    return torch.cat(parts, 1).expand(len(like), size)


def _columns(D: Tensor, tokens: Tensor) -> Tensor:
    """Return the columns of D [T, M, V] at tokens [T, N], [T, M, N]."""
    return D.gather(2, tokens.unsqueeze(1).expand(-1, D.shape[1], -1))
