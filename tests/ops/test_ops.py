"""The battery: tests of every op on every backend of this machine, in float64.

Results are compared with `SPEC.plain`, plain PyTorch operations that PyTorch differentiates. Cotangents, directions and
rates are random and differ between tasks: a cotangent of ones would hide that tasks are mixed up.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwd
from torch import Tensor
from torch.func import grad, jvp, vmap

import metakern as mk
from metakern.ops import SPECS
from metakern.ops.core.spec import Make, Sample, Spec

BACKENDS = [name for name in ("reference", "cpu", "triton") if mk.backends()[name] == "available"]
CASES = [
    pytest.param(spec, sample, backend, id=f"{backend}-{name}-{sample.name}")
    for backend in BACKENDS
    for name, spec in SPECS.items()
    if backend in spec.op.kernels
    for sample in spec.samples(Make(seed=1))
]
FULL = [case for case in CASES if all(t.numel() for t in case.values[1].args if isinstance(t, Tensor))]
PER_TASK = [case for case in FULL if case.values[1].per_task]


def few(cases: list, count: int = 1) -> list:
    """Return the first `count` cases of each op on Triton, whose interpreter is slow, and all of the other backends.

    One is enough for what `Op` derives from the rules, which is the same for every backend.
    """
    kept, seen = [], Counter[str]()
    for case in cases:
        spec, _, name = case.values
        seen[spec.op.name] += name == "triton"
        if name != "triton" or seen[spec.op.name] <= count:
            kept.append(case)
    return kept


every_case = pytest.mark.parametrize(("spec", "sample", "backend"), CASES, indirect=["backend"])
a_few_cases = pytest.mark.parametrize(("spec", "sample", "backend"), few(CASES), indirect=["backend"])
_zero, _missing = ([case for case in CASES if case.values[0].op.zero_tangents == zero] for zero in (True, False))
# Without zero_tangents, a rule of a backend sees which tangents are missing.
cases_of_missing_tangents = pytest.mark.parametrize(
    ("spec", "sample", "backend"), few(_zero) + few(_missing, 2), indirect=["backend"]
)
every_full_case = pytest.mark.parametrize(("spec", "sample", "backend"), FULL, indirect=["backend"])
native_full_cases = pytest.mark.parametrize(
    ("spec", "sample", "backend"), [case for case in FULL if case.values[2] != "triton"], indirect=["backend"]
)
a_few_full_cases = pytest.mark.parametrize(("spec", "sample", "backend"), few(FULL), indirect=["backend"])
some_cases = pytest.mark.parametrize(("spec", "sample", "backend"), few(CASES, 2), indirect=["backend"])
some_per_task_cases = pytest.mark.parametrize(("spec", "sample", "backend"), few(PER_TASK, 2), indirect=["backend"])


@pytest.fixture(autouse=True)
def backend(request: pytest.FixtureRequest) -> Any:
    """Run the test on the backend of the case, with NaN in uninitialized memory."""
    torch.use_deterministic_algorithms(True)
    try:
        with mk.backend(request.param):
            yield request.param
    finally:
        torch.use_deterministic_algorithms(False)


def differentiable(sample: Sample) -> list[int]:
    """Return the positions of the arguments that have derivatives."""
    floats = (i for i, a in enumerate(sample.args) if isinstance(a, Tensor) and a.is_floating_point())
    return [i for i in floats if i not in sample.frozen]


def function(f: Callable, sample: Sample) -> tuple[Callable[..., tuple[Tensor, ...]], list[Tensor]]:
    """Return f as a function of its differentiable inputs that returns a flat tuple, and copies of these inputs."""
    where = differentiable(sample)

    def of_inputs(*inputs: Tensor) -> tuple[Tensor, ...]:
        args = list(sample.args)
        for i, value in zip(where, inputs, strict=True):
            args[i] = value
        return tuple(torch.utils._pytree.tree_leaves(f(*args, **sample.kwargs)))

    return of_inputs, [sample.args[i].detach().clone() for i in where]


def leaves(inputs: Iterable[Tensor]) -> list[Tensor]:
    return [x.detach().clone().requires_grad_() for x in inputs]


def random_like(tensors: Any, seed: int) -> tuple[Tensor, ...]:
    make = Make(tensors[0].dtype if len(tensors) else torch.float64, seed=seed)
    return tuple(make(*t.shape) for t in tensors)


def first(f: Callable, inputs: list[Tensor], ct: tuple[Tensor, ...], create_graph: bool = False) -> tuple[Tensor, ...]:
    """Return ct_x of every input; zeros for an input that the result does not depend on."""
    y, ct = zip(*((yi, c) for yi, c in zip(f(*inputs), ct, strict=True) if yi.requires_grad), strict=True)
    return torch.autograd.grad(y, inputs, ct, create_graph=create_graph, allow_unused=True, materialize_grads=True)


def second(f: Callable, inputs: list[Tensor], ct: tuple[Tensor, ...], v: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return the derivatives of ⟨vjp(ct), v⟩ by the inputs and by ct, by reverse over reverse."""
    inputs, ct = leaves(inputs), tuple(c.detach().clone().requires_grad_() for c in ct)
    ct_x = first(f, inputs, ct, create_graph=True)
    return torch.autograd.grad(ct_x, [*inputs, *ct], v, allow_unused=True, materialize_grads=True)


def close(actual: Any, expected: Any) -> None:
    actual, expected = tuple(actual), tuple(expected)
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-11)


def problem(spec: Spec, sample: Sample) -> tuple[Callable, Callable, list[Tensor], tuple, tuple]:
    """Return the op and plain PyTorch as functions of the inputs, the inputs, random cotangents and directions."""
    op, inputs = function(spec.call, sample)
    plain, _ = function(spec.plain, sample)
    ct = random_like(plain(*inputs), 11)
    return op, plain, inputs, ct, random_like(inputs, 12)


@every_case
def test_value_and_both_orders_equal_plain(spec: Spec, sample: Sample) -> None:
    op, plain, inputs, ct, v = problem(spec, sample)
    close(op(*inputs), plain(*inputs))
    close(first(op, leaves(inputs), ct), first(plain, leaves(inputs), ct))
    close(second(op, inputs, ct, v), second(plain, inputs, ct, v))


@every_case
def test_forward_mode_equals_plain(spec: Spec, sample: Sample) -> None:
    op, plain, inputs, _, v = problem(spec, sample)
    expected = jvp(plain, tuple(inputs), v)
    close(jvp(op, tuple(inputs), v)[1], expected[1])
    with fwd.dual_level():
        y = op(*(fwd.make_dual(x, t) for x, t in zip(inputs, v, strict=True)))
        close((fwd.unpack_dual(yi).tangent for yi in y), expected[1])


@native_full_cases
def test_gradcheck(spec: Spec, sample: Sample) -> None:
    """Finite differences of every rule; Triton's are compared with plain PyTorch's derivatives, which is faster."""
    op, _, inputs, ct, _ = problem(spec, sample)
    inputs, ct = leaves(inputs), leaves(ct)
    assert torch.autograd.gradcheck(op, inputs, check_forward_ad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(op, inputs, ct, check_fwd_over_rev=True, fast_mode=True)


def bent(f: Callable) -> Callable:
    """Return y + y² / 2 of the outputs y of f, so that the cotangents of f have tangents in forward over reverse."""
    return lambda *x: tuple(y + 0.5 * y * y for y in f(*x))


def dual_hvp(f: Callable, inputs: list[Tensor], ct: tuple[Tensor, ...], v: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return the tangents of ct_x, by forward over reverse with dual tensors and torch.autograd.grad."""
    with fwd.dual_level():
        duals = [fwd.make_dual(x, t) for x, t in zip(leaves(inputs), v, strict=True)]
        ct_x = first(f, duals, ct)
        tangents = [fwd.unpack_dual(c).tangent for c in ct_x]
    return tuple(torch.zeros_like(x) if t is None else t for x, t in zip(inputs, tangents, strict=True))


@a_few_cases
def test_every_nesting_of_modes_gives_the_same_second_order(spec: Spec, sample: Sample) -> None:
    op, plain, inputs, ct, v = problem(spec, sample)
    op, plain = bent(op), bent(plain)
    expected = second(plain, inputs, ct, v)[: len(inputs)]
    everything = tuple(range(len(inputs)))

    def loss(*x: Tensor) -> Tensor:
        return sum((y * c).sum() for y, c in zip(op(*x), ct, strict=True))

    def directional(*x: Tensor) -> Tensor:
        return jvp(loss, x, v)[1]

    def inner_product(*x: Tensor) -> Tensor:
        return sum((g * t).sum() for g, t in zip(grad(loss, everything)(*x), v, strict=True))

    close(dual_hvp(op, inputs, ct, v), expected)
    close(jvp(grad(loss, everything), tuple(inputs), v)[1], expected)
    close(grad(inner_product, everything)(*inputs), expected)
    close(grad(directional, everything)(*inputs), expected)

    u = random_like(inputs, 13)
    twice = jvp(directional, tuple(inputs), u)[1]
    close((twice,), (sum((e * t).sum() for e, t in zip(expected, u, strict=True)) + torch.zeros_like(twice),))


@cases_of_missing_tangents
def test_a_missing_tangent_or_cotangent_is_zero(spec: Spec, sample: Sample) -> None:
    """Each input in turn is differentiated while the others are constants."""
    op, plain, inputs, ct, v = problem(spec, sample)
    for i in range(len(inputs)):

        def only(f: Callable, i: int = i) -> Callable:
            return lambda x: f(*inputs[:i], x, *inputs[i + 1 :])

        expected = second(only(plain), [inputs[i]], ct, (v[i],))
        close(second(only(op), [inputs[i]], ct, (v[i],)), expected)
        close(dual_hvp(only(op), [inputs[i]], ct, (v[i],)), expected[:1])


@a_few_cases
def test_vmap_equals_loop(spec: Spec, sample: Sample) -> None:
    op, _, inputs, ct, v = problem(spec, sample)
    size = 3
    many = [torch.stack(random_like([x] * size, 20 + i)) for i, x in enumerate(inputs)]

    def close_to_loop(f: Callable, *stacked: Tensor, in_dims: Any = 0) -> None:
        dims = in_dims if isinstance(in_dims, tuple) else (in_dims,) * len(stacked)
        rows = [[a if d is None else a[i] for a, d in zip(stacked, dims, strict=True)] for i in range(size)]
        with mk.backend("reference"):
            expected = [torch.stack(t) for t in zip(*(f(*row) for row in rows), strict=True)]
        close(vmap(f, in_dims)(*stacked), expected)

    everything = tuple(range(len(inputs)))

    def loss(*x: Tensor) -> Tensor:
        return sum((y * c).sum() for y, c in zip(op(*x), ct, strict=True))

    def hvp(*x: Tensor) -> tuple[Tensor, ...]:
        return jvp(grad(loss, everything), x, v)[1]

    close_to_loop(op, *many)
    close_to_loop(grad(loss, everything), *many)
    close_to_loop(hvp, *many)
    close_to_loop(hvp, many[0], *inputs[1:], in_dims=(0,) + (None,) * (len(inputs) - 1))


@a_few_full_cases
def test_meta_gradient_is_exact_and_not_the_first_order_one(spec: Spec, sample: Sample) -> None:
    op, plain, inputs, _, _ = problem(spec, sample)
    rates = [0.01 * (1 + x.abs()) for x in random_like(inputs, 31)]

    def meta(f: Callable, create_graph: bool) -> tuple[Tensor, ...]:
        theta = leaves(inputs)
        support = sum((y + 0.3 * y * y).sum() for y in f(*theta))
        g = torch.autograd.grad(support, theta, create_graph=create_graph, allow_unused=True, materialize_grads=True)
        phi = [p - rate * gi for p, rate, gi in zip(theta, rates, g, strict=True)]
        return torch.autograd.grad(
            sum((y * y).sum() for y in f(*phi)), theta, allow_unused=True, materialize_grads=True
        )

    exact = meta(plain, True)
    close(meta(op, True), exact)
    first_order = meta(op, False)
    assert any((a - b).norm() > 1e-4 * b.norm() for a, b in zip(first_order, exact, strict=True))


@a_few_full_cases
def test_third_order_raises(spec: Spec, sample: Sample) -> None:
    op, _, inputs, _, _ = problem(spec, sample)
    x = leaves(inputs)
    scalar = sum((y * y).sum() for y in op(*x))
    for _ in range(2):
        g = torch.autograd.grad(scalar, x, create_graph=True, allow_unused=True, materialize_grads=True)
        scalar = sum((gi * gi).sum() for gi in g)
    with pytest.raises(NotImplementedError, match=f"{spec.op.name}: third derivatives"):
        torch.autograd.grad(scalar, x)


@some_per_task_cases
def test_tasks_do_not_mix(spec: Spec, sample: Sample) -> None:
    """At every order, changing the last task leaves the others bit-identical, and permuting tasks permutes results."""
    _, _, inputs, ct, v = problem(spec, sample)
    tasks = inputs[0].shape[0]
    if tasks < 2:
        pytest.fail("a sample with per_task must have at least two tasks")
    order = torch.arange(tasks).roll(1)

    def results(index: Tensor, disturb: bool) -> list[Tensor]:
        def at(t: Any, i: int | None = None) -> Any:
            if not isinstance(t, Tensor) or i in sample.frozen:
                return t
            t = t[index].clone()
            if disturb and t.is_floating_point():
                t[-1] += 1
            return t

        args = tuple(at(a, i) for i, a in enumerate(sample.args))
        changed = replace(sample, args=args)
        f, x = function(spec.call, changed)
        cts, vs = tuple(at(c) for c in ct), tuple(at(t) for t in v)
        return [*f(*x), *first(f, leaves(x), cts), *second(f, x, cts, vs)]

    same = torch.arange(tasks)
    base = results(same, False)
    for a, b in zip(results(same, True), base, strict=True):
        assert torch.equal(a[:-1], b[:-1])
    close(results(order, False), [b[order] for b in base])


@some_cases
def test_strides_do_not_matter(spec: Spec, sample: Sample) -> None:
    op, _, inputs, ct, v = problem(spec, sample)

    def strided(t: Tensor) -> Tensor:
        wide = torch.full((*t.shape, 2), float("nan"), dtype=t.dtype)
        wide[..., 0] = t
        return wide[..., 0]

    x = [strided(t) for t in inputs]
    close(op(*x), op(*inputs))
    ct_x = first(op, leaves(inputs), ct)
    ones = tuple(torch.ones((), dtype=c.dtype).expand(c.shape) for c in ct)
    y = [t.detach().requires_grad_() for t in x]
    close(
        torch.autograd.grad(op(*y), y, tuple(strided(c) for c in ct), allow_unused=True, materialize_grads=True), ct_x
    )
    close(second(op, inputs, ones, v), second(op, inputs, tuple(o.clone() for o in ones), v))
    if sample.per_task:
        expanded = [t[:1].expand_as(t) for t in inputs]
        close(op(*expanded), op(*(e.clone() for e in expanded)))
        close(first(op, leaves(expanded), ct), first(op, leaves([e.clone() for e in expanded]), ct))


@a_few_full_cases
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_errors_are_at_most_twice_those_of_plain_pytorch(
    spec: Spec, sample: Sample, dtype: torch.dtype
) -> None:
    """error(op) <= 2 x error(plain PyTorch in that dtype) + eps, against float64, at every order.

    Errors are geometric means over draws: where terms cancel, the error of a single draw is random.
    """
    draws = [next(s for s in spec.samples(Make(seed=seed)) if s.name == sample.name) for seed in (1, 2, 3, 4)]
    eps = torch.finfo(dtype).eps
    ours, theirs = torch.stack([_errors(spec, draw, dtype) + eps / 8 for draw in draws]).log().mean(0).exp()
    assert (ours <= 2 * theirs + 4 * eps).all()


def _errors(spec: Spec, sample: Sample, dtype: torch.dtype) -> Tensor:
    """Return the relative errors of the op and of plain PyTorch, [2, results], for every result of every order."""
    low = replace(sample, args=tuple(_cast(a, dtype) for a in sample.args))
    exact = replace(sample, args=tuple(_cast(a, torch.float64) for a in low.args))
    ct, v = problem(spec, low)[3:]

    def orders(f: Callable, s: Sample, dtype: torch.dtype) -> list[Tensor]:
        g, x = function(f, s)
        cts, vs = (tuple(t.to(dtype) for t in ts) for ts in (ct, v))
        return [*g(*x), *first(g, leaves(x), cts), *second(g, x, cts, vs)]

    truth, ours, theirs = (
        orders(spec.plain, exact, torch.float64),
        orders(spec.call, low, dtype),
        orders(spec.plain, low, dtype),
    )
    assert all(a.dtype == dtype for a in ours)
    return torch.tensor(
        [
            [((a.double() - t).norm() / (t.norm() + 1e-30)).item() for a, t in zip(found, truth, strict=True)]
            for found in (ours, theirs)
        ]
    )


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
