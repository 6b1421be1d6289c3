"""Which weights are implicit: those that can be, whose form was verified, and for which it pays.

The verification compares losses, gradients and Hessian-vector products with those of plain autograd, on the two tasks
of a trial. There the weights differ from the shared one by a product of small rank, which is the pair of an earlier
inner step (`implicit.py`). A direction V of a weight, whose gradient is G = Dᵀ X, is a direction of the pair (X, D):

    <V, G> = <V, Dᵀ X>        ct_D = X Vᵀ        ct_X = D V        of a look-up: ct_D = V[tokens]

So the product of the Hessian with V is the pullback of a step. For the shared weight it is the sum over the tasks.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from metakern.meta.batches import Outer
from metakern.meta.batching import Loss
from metakern.meta.draws import Alike
from metakern.meta.fold import LINEAR, LOOK_UP, Fold
from metakern.meta.implicit import Implicit, ImplicitUnroll, Layout
from metakern.meta.parameters import Parameters
from metakern.meta.unroll import Gradients
from metakern.meta.verify import Trial, one_line
from metakern.optim import SGD, InnerOptimizer

WEIGHTS = ("auto", "explicit", "implicit")
LARGE = 2**18  # numbers of a weight from which on "auto" takes the implicit form
SHARE = 0.5  # "auto" takes it where the pairs of all steps have at most so many numbers, times those of the weight


class Weights:
    """Which weights of a model may be implicit with an inner optimizer, as far as the option `weights` allows.

    Attributes:
        names: The names of these weights.
        reasons: Why other matrices are explicit, in lines for the plan.
        numbers: How many numbers the pairs of each of these weights have in an inner step of a task; set by `batching`.
    """

    def __init__(self, parameters: Parameters, loss: Loss, inner: InnerOptimizer | None, wish: str) -> None:
        self.parameters, self.loss, self.inner, self.wish = parameters, loss, inner, wish
        self.names, left = ([], {}) if wish == "explicit" or inner is None else _candidates(parameters, inner)
        if wish == "auto":  # which is measured on CPUs
            sizes = {name: p.numel() for name, p in parameters.adapted.items() if p.device.type == "cpu"}
            self.names = [name for name in self.names if sizes.get(name, 0) >= LARGE]
        self.numbers: dict[str, int] = {}
        self.reasons = [f"explicit weights: {_listed(names)}: {why}" for why, names in left.items()]

    def batching(
        self, trial: Trial, records: Any, plain: bool, hvp: str, steps: int
    ) -> tuple[Implicit | None, list[str]]:
        """Return the batching with implicit weights, or None where there are none to be, and the reasons."""
        if not self.names:
            return None, self.reasons if self.wish == "implicit" else []
        try:
            with trial.watch.part("implicit weights"), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                self.numbers = numbers_of(trial, self._made(trial.roles, records, plain, self.names))
                if not (names := self.chosen(steps)):
                    return None, ["explicit weights: a task has too many tokens for implicit ones to pay"]
                verify(trial, self._made(trial.roles, records, plain, names), hvp)
        except Exception as error:  # a model may raise anything where a weight is not what it expects
            return None, [f"implicit weights are not possible: {one_line(error)}", *self.reasons]
        made = self._made(self.parameters, records, plain, names)
        made.pair_bytes = sum(self.numbers[name] * p.itemsize for name, p in made.weights.items())
        reason = f"implicit weights: {_listed(names)} equal plain autograd on two tasks, {trial.measure()}"
        return made, [reason, *self.reasons]

    def _made(self, parameters: Parameters, records: Any, plain: bool, names: Sequence[str]) -> Implicit:
        decay: Any = getattr(self.inner, "weight_decay", None)
        decays = decay is None or not decay.absent
        made = Implicit(parameters, self.loss, plain, names, decays)
        made.fold.records = made.explicit.fold.records = records
        return made

    def chosen(self, steps: int) -> list[str]:
        """Return the names of the weights to be implicit: with "auto" where that takes less time and memory."""
        if self.wish == "implicit":
            return self.names
        sizes = {name: self.parameters.adapted[name].numel() for name in self.numbers}
        return [name for name, size in sizes.items() if steps * self.numbers[name] <= SHARE * size]


def _candidates(parameters: Parameters, inner: InnerOptimizer) -> tuple[list[str], dict[str, list[str]]]:
    """Return the names of the weights that can be implicit, and those of other matrices by the reason."""
    matrices = [name for name, p in parameters.adapted.items() if p.dim() > 1]
    if not inner.combines:
        return [], {f"{type(inner).__name__} does not scale all elements of a parameter by the same numbers": matrices}
    if torch.is_autocast_enabled("cpu") or torch.is_autocast_enabled("cuda"):
        return [], {"inside torch.autocast": matrices}
    if any(parameters.adapted[name].itemsize < 4 for name in matrices):
        return [], {"in half precision, coefficients would be rounded": matrices}
    units, users = Fold(parameters).units, dict[str, set[Any]]()
    for module, attribute, name in parameters.places:
        unit: Any = units.get(module) if attribute == "weight" else None
        user = LINEAR[unit] if unit in LINEAR else LOOK_UP if unit is LOOK_UP else type(module).__name__
        users.setdefault(name, set()).add(user)
    found = [name for name in matrices if users[name] == {True} or users[name] <= {False, LOOK_UP}]
    left: dict[str, list[str]] = {}
    for name in matrices:
        if name not in found:
            others = sorted(user for user in users[name] if isinstance(user, str))
            left.setdefault(f"used by {', '.join(others) or 'layers of both layouts'}", []).append(name)
    return found, left


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 3 else f"{names[0]}, {names[1]}, … {names[-1]} ({len(names)})"


def numbers_of(trial: Trial, batching: Implicit) -> dict[str, int]:
    """Return how many numbers the pairs of each weight have in an inner step of a task."""
    found = dict.fromkeys(batching.places, 0)
    with _steady(trial, batching, 0), torch.set_grad_enabled(trial.graph):
        _, seen = batching.seen(_point(trial, batching), trial.batches[0])
    for (name, i, _), y in zip(seen.calls, seen.outputs, strict=True):
        x = seen.inputs[i]
        found[name] += int(x.shape[1] / trial.parts[0]) * (x.shape[2] + y.shape[2])
    return found


def verify(trial: Trial, batching: Implicit, hvp: str) -> None:
    """Compare implicit weights with plain autograd; raise MismatchError where they differ, or what the model raises.

    `hvp`: the mode of Hessian-vector products that the plan takes.
    """
    unroll, phi = ImplicitUnroll(batching, SGD(), 1, hvp=hvp), _point(trial, batching)
    shared = [*batching.weights.values(), *trial.shared]
    for i, batch in enumerate(trial.batches):
        with _steady(trial, batching, i):
            losses, ct = unroll.of_query(phi, shared, Outer(batch, (0,)), 0)
        trial.compare("loss", [losses], trial.truths[i][0])
        trial.compare("gradient", *_aligned(trial, unroll, ct, trial.truths[i][1]))
    for mode in dict.fromkeys(("reverse", hvp)) if not trial.first_order else ():
        unroll = replace(unroll, hvp=mode)
        with _steady(trial, batching, 0):
            slope = unroll.slope(phi, trial.probe)
        with _steady(trial, batching, 0):
            along = _direction(trial, batching, slope.pairs)
            _, products = unroll.hessian_vector_product(phi, shared, trial.probe, trial.v, *along)
        trial.compare("Hessian-vector product", *_aligned(trial, unroll, products, trial.truths[0][2]))


@contextmanager
def _steady(trial: Trial, batching: Implicit, i: int) -> Iterator[None]:
    """Make evaluations of batch i within the block repeatable, as those of plain autograd were."""
    drawn = trial.drawn(i)
    batching.fold.within = trial.comparable  # a mode set here has no effect once the fold steps out of vmap
    with trial.steady(), nullcontext() if drawn is None else Alike(2, drawn):
        yield


def _point(trial: Trial, batching: Implicit) -> list[Tensor]:
    """Return phi of the trial's tasks, with implicit weights: the pair of one step, and room for one more."""
    phi, pairs = list(trial.phi), [_oriented(batching, name, *trial.factors[name]) for name in batching.places]
    for i in batching.places.values():
        phi[i] = phi[i].new_tensor([1, 1, 0]).expand(2, 3)
    batching.keep(0, Layout(len(pairs), tuple((name, i, False) for i, name in enumerate(batching.places))))
    return [*phi, *(x for x, _ in pairs), *(d for _, d in pairs)]


def _oriented(batching: Implicit, name: str, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """Return (X, D), given tensors whose product leftᵀ right is shaped as the weight."""
    return (left, right) if batching.transposed[name] else (right, left)


def _direction(trial: Trial, batching: Implicit, pairs: Sequence[Tensor]) -> list[Tensor]:
    """Return the direction of the trial's weights as one of the pairs of a step, the last one that was computed."""
    layout = batching.layouts[1]
    X, D = pairs[: layout.inputs], pairs[layout.inputs :]
    of_X, of_D = [torch.zeros_like(x) for x in X], []
    for (name, i, looks_up), d in zip(layout.calls, D, strict=True):
        v = trial.v[batching.places[name]]
        if looks_up:
            of_D.append(v.gather(1, X[i].long().expand(d.shape)))
            continue
        v = v.mT if batching.transposed[name] else v
        of_X[i] = of_X[i] + d @ v
        of_D.append(X[i] @ v.mT)
    return [*of_X, *of_D]


def _aligned(trial: Trial, unroll: ImplicitUnroll, found: Gradients, truth: Gradients) -> tuple[list[Any], list[Any]]:
    """Return derivatives with respect to phi, W_0 and shared parameters, and those of plain autograd, in one order."""
    batching, places = unroll.batching, unroll.batching.places
    n, count = batching.size, len(places)
    of_pairs, of_weights = found[n : n + 2 * count], unroll.weight_gradients(found[n + 2 * count :])
    ours = [c for i, c in enumerate(found[:n]) if i not in places.values()]
    theirs = [t for i, t in enumerate(truth[:n]) if i not in places.values()]
    for j, (name, i) in enumerate(places.items()):
        t = truth[i]
        x, _ = _oriented(batching, name, *trial.factors[name])
        ours += [of_weights[j], of_pairs[count + j]]  # with g_t the derivative of task t: Σ_t g_t, and X_t g_tᵀ of each
        theirs += [None, None] if t is None else [t.sum(0), x @ (t if batching.transposed[name] else t.mT)]
    return [*ours, *found[n + 3 * count :]], [*theirs, *truth[n:]]
