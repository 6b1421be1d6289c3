"""`rnn`, `gru` and `lstm`: arguments, initial and final states, shared weights, lengths, and extreme values."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import combinations
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import metakern as mk
from metakern.ops import SPECS
from metakern.ops.core.spec import Make

GATES = {"rnn": 1, "gru": 3, "lstm": 4}
every_cell = pytest.mark.parametrize("cell", GATES)


def weights(cell: str, *lead: int, features: int = 3, hidden: int = 2, seed: int = 1) -> list[Tensor]:
    make, rows = Make(seed=seed), GATES[cell] * hidden
    return [make(*lead, rows, features), make(*lead, rows, hidden), make(*lead, rows), make(*lead, rows)]


def states(cell: str, *shape: int, seed: int = 2) -> list[Tensor]:
    make = Make(seed=seed)
    return [make(*shape) for _ in range(2 if cell == "lstm" else 1)]


def run(f: Callable, *args: Any) -> list[Tensor]:
    """Return outputs, cotangents of all arguments, and second derivatives by reverse over reverse."""
    args = tuple(None if a is None else a.detach().clone().requires_grad_() for a in args)
    wrt, make = [a for a in args if a is not None], Make(seed=9)
    outputs = tree_leaves(f(*args))
    options: dict[str, Any] = {"allow_unused": True, "materialize_grads": True}
    ct_x = torch.autograd.grad(outputs, wrt, [make(*o.shape) for o in outputs], create_graph=True, **options)
    v = [make(*c.shape) for c in ct_x]
    if not any(c.requires_grad for c in ct_x):
        return [*outputs, *ct_x, *(torch.zeros_like(x) for x in wrt)]
    curved, along = zip(*((c, vi) for c, vi in zip(ct_x, v, strict=True) if c.requires_grad), strict=True)
    return [*outputs, *ct_x, *torch.autograd.grad(curved, wrt, along, **options)]


def close(actual: list[Tensor], expected: list[Tensor]) -> None:
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-11)


@every_cell
def test_a_sequence_without_steps_returns_the_initial_state(cell: str) -> None:
    arguments = [Make()(2, 3, 0, 3), *states(cell, 2, 3, 2), *weights(cell, 2)]
    y, *final = SPECS[cell].call(*arguments)
    initial = arguments[1:-4]
    assert y.shape == (2, 3, 0, 2)
    close(final, initial)
    assert all(f.data_ptr() != i.data_ptr() for f, i in zip(final, initial, strict=True))
    results = run(SPECS[cell].call, *arguments)[len(final) + 1 :]
    ct_x, second = results[: len(arguments)], results[len(arguments) :]
    assert all(not t.any() for t in (ct_x[0], *ct_x[-4:], *second))
    assert [t.shape for t in ct_x] == [t.shape for t in second] == [a.shape for a in arguments]
    make = Make(seed=9)
    _, *ct = [make(*o.shape) for o in (y, *final)]
    close(ct_x[1:-4], ct)
    t_x = [make(*a.shape) for a in arguments]
    t_y, *t_final = tree_leaves(torch.func.jvp(SPECS[cell].call, tuple(arguments), tuple(t_x))[1])
    assert t_y.shape == y.shape
    close(t_final, t_x[1:-4])


@every_cell
def test_shared_parameters_beside_those_of_each_task(cell: str) -> None:
    """Each subset of the parameters is shared by all tasks, and the others differ between tasks."""
    spec, x, initial = SPECS[cell], Make()(3, 2, 4, 3), states(cell, 3, 2, 2)
    own, shared = weights(cell, 3), weights(cell, seed=5)
    for subset in range(1, 15):
        mixed = [shared[i] if subset >> i & 1 else own[i] for i in range(4)]

        def plain(*args: Tensor) -> Any:
            *rest, w_ih, w_hh, b_ih, b_hh = args
            ranks = {w_ih: 3, w_hh: 3, b_ih: 2, b_hh: 2}
            return spec.plain(*rest, *(p if p.dim() == rank else p.expand(3, *p.shape) for p, rank in ranks.items()))

        close(run(spec.call, x, *initial, *mixed), run(plain, x, *initial, *mixed))


class Rows(TorchDispatchMode):
    """Records the number of rows of every product of two matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            self.seen.append(args[-2].shape[0])
        return func(*args, **kwargs or {})


@every_cell
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_shared_weight_takes_one_product_over_all_tasks(cell: str, dtype: torch.dtype) -> None:
    """An expanded or shared w_ih, beside other weights of each task, is multiplied with all inputs at once."""
    x, (w_ih, *rest) = Make(dtype)(3, 2, 4, 3).requires_grad_(), [p.to(dtype) for p in weights(cell, 3)]
    gradients = []
    for of_all in (w_ih[:1].expand_as(w_ih), w_ih[0].clone()):
        of_all.requires_grad_()
        with mk.backend("reference"), Rows() as rows:
            y, *_ = SPECS[cell].call(x, *([None] * len(states(cell, 1))), of_all, *rest)
            gradients.append(torch.autograd.grad(y.sum(), [x, of_all])[1])
        assert rows.seen == [24, 24]
    assert not torch.equal(gradients[0][0], gradients[0][1])
    torch.testing.assert_close(gradients[0].sum(0), gradients[1])


@every_cell
def test_derivatives_are_exact_for_any_two_arguments_alone(cell: str) -> None:
    spec, arguments = SPECS[cell], [Make()(2, 2, 3, 3), *states(cell, 2, 2, 2), *weights(cell, 2)]
    for i, j in combinations(range(len(arguments)), 2):

        def of_two(f: Callable, i: int = i, j: int = j) -> Callable:
            return lambda a, b: f(*(a if n == i else b if n == j else x for n, x in enumerate(arguments)))

        close(run(of_two(spec.call), arguments[i], arguments[j]), run(of_two(spec.plain), arguments[i], arguments[j]))


@every_cell
def test_a_tangent_is_not_written_to(cell: str) -> None:
    """With one step, the tangent of a bias has the layout of a buffer that a kernel could write to."""
    arguments = [Make()(2, 1, 1, 3), *states(cell, 2, 1, 2), *weights(cell, 2)]
    for i, argument in enumerate(arguments):
        before = Make(seed=i)(*argument.shape)
        tangent = before.clone()

        def of_one(x: Tensor, i: int = i) -> Any:
            return SPECS[cell].call(*arguments[:i], x, *arguments[i + 1 :])

        torch.func.jvp(of_one, (argument,), (tangent,))
        assert torch.equal(tangent, before)


@every_cell
def test_saturated_gates_stay_finite(cell: str) -> None:
    x, initial = 100 * Make()(2, 2, 3, 3), [100 * s for s in states(cell, 2, 2, 2)]
    actual = run(SPECS[cell].call, x, *initial, *weights(cell, 2))
    assert all(torch.isfinite(a).all() for a in actual)
    close(actual, run(SPECS[cell].plain, x, *initial, *weights(cell, 2)))


@every_cell
def test_derivatives_of_the_final_state_alone(cell: str) -> None:
    x, initial = Make()(2, 2, 3, 3), states(cell, 2, 2, 2)

    def final(f: Callable) -> Callable:
        return lambda *args: f(*args)[-1]

    spec = SPECS[cell]
    close(run(final(spec.call), x, *initial, *weights(cell, 2)), run(final(spec.plain), x, *initial, *weights(cell, 2)))


@every_cell
def test_equals_torch_nn(cell: str) -> None:
    torch.manual_seed(0)
    module = getattr(nn, cell.upper())(3, 5, batch_first=True).double()
    x, initial = Make()(4, 6, 3), states(cell, 4, 5)
    parameters = list(module.parameters())

    def theirs(x: Tensor, *rest: Tensor) -> Any:
        hx = tuple(s[None] for s in rest[: len(initial)])
        names = [name for name, _ in module.named_parameters()]
        values = dict(zip(names, rest[len(initial) :], strict=True))
        y, final = torch.func.functional_call(module, values, (x, hx if cell == "lstm" else hx[0]))
        return y, *(f[0] for f in (final if cell == "lstm" else (final,)))

    close(run(SPECS[cell].call, x, *initial, *parameters), run(theirs, x, *initial, *parameters))


@every_cell
@pytest.mark.parametrize("reverse", [False, True])
def test_lengths_equal_packed_sequences_of_torch_nn(cell: str, reverse: bool) -> None:
    """With `reverse`, the op is compared with the second direction of a bidirectional module of torch.nn."""
    torch.manual_seed(0)
    module = getattr(nn, cell.upper())(3, 5, bidirectional=True).double()
    named = dict(module.named_parameters())
    own = [name for name in named if name.endswith("_reverse") == reverse]
    x, lengths = Make()(4, 6, 3), torch.tensor([3, 6, 1, 6])
    initial, half = states(cell, 4, 5), slice(5, None) if reverse else slice(5)

    def ours(x: Tensor, *rest: Tensor) -> Any:
        return SPECS[cell].call(x, *rest, lengths, reverse=reverse)

    def theirs(x: Tensor, *rest: Tensor) -> Any:
        hx = [torch.stack([s, s]) for s in rest[: len(initial)]]
        values = named | dict(zip(own, rest[len(initial) :], strict=True))
        packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
        y, final = torch.func.functional_call(module, values, (packed, tuple(hx) if cell == "lstm" else hx[0]))
        y, _ = pad_packed_sequence(y, batch_first=True)
        return y[..., half], *(f[int(reverse)] for f in (final if cell == "lstm" else (final,)))

    arguments = [x, *initial, *(named[name] for name in own)]
    close(run(ours, *arguments), run(theirs, *arguments))


@every_cell
def test_lengths_of_each_task_under_vmap(cell: str) -> None:
    x, initial, lengths = Make()(3, 2, 4, 3), states(cell, 3, 2, 2), torch.tensor([[4, 2], [0, 3], [1, 4]])
    own = weights(cell, 3)
    one = torch.func.vmap(SPECS[cell].call)(x, *initial, *own, lengths)
    close(one, SPECS[cell].call(x, *initial, *own, lengths))


@every_cell
def test_inputs_beyond_the_lengths_reach_no_result(cell: str) -> None:
    """In both directions of time; not even NaN reaches the outputs, which are zero there."""
    lengths = torch.tensor([[4, 2], [0, 3]])
    beyond = (torch.arange(4) >= lengths.unsqueeze(-1)).unsqueeze(-1)
    clean, initial, own = Make()(2, 2, 4, 3).masked_fill(beyond, 0), states(cell, 2, 2, 2), weights(cell, 2)
    for reverse in (False, True):

        def call(*args: Tensor, reverse: bool = reverse) -> Any:
            return SPECS[cell].call(*args, lengths, reverse=reverse)

        a, b = (run(call, x, *initial, *own) for x in (clean, clean.masked_fill(beyond, 1e6)))
        close(a, b)
        y = call(clean.masked_fill(beyond, float("nan")), *initial, *own)[0]
        assert torch.equal(y, call(clean, *initial, *own)[0])
        assert not y.masked_select(beyond).any()


@every_cell
def test_errors_name_the_argument(cell: str) -> None:
    rows, op = GATES[cell] * 2, getattr(mk.ops, cell)
    w_ih, w_hh, b_ih, b_hh = weights(cell)
    x, prefix = Make()(4, 5, 3), rf"^{cell}: "
    own = weights(cell, 4)
    per_task = Make()(4, 2, 5, 3)

    def refuses(error: type[Exception], message: str, *args: Any) -> None:
        with pytest.raises(error, match=prefix + message):
            op(*args)

    refuses(TypeError, "x must be a tensor, got list", [1.0], None, w_ih, w_hh)
    refuses(TypeError, "w_hh must be a tensor, got NoneType", x, None, w_ih, None)
    refuses(TypeError, r"x must be floating point, got torch.int64", x.long(), None, w_ih, w_hh)
    refuses(TypeError, r"w_ih must have the dtype torch.float64 .*, got torch.float32", x, None, w_ih.float(), w_hh)
    refuses(ValueError, r"w_ih must be on cpu .*, got meta", x, None, w_ih.to("meta"), w_hh)
    refuses(ValueError, r"x must have shape \[B, L, I\] or \[T, B, L, I\], got \[5, 3\]", x[0], None, w_ih, w_hh)
    refuses(ValueError, rf"w_hh must have shape .*, got \[{rows}\]", x, None, w_ih, b_hh)
    refuses(ValueError, rf"w_ih must have shape .* = \[{rows}, 3\], got \[{rows}, 2\]", x, None, w_ih[:, :2], w_hh)
    refuses(ValueError, rf"w_hh must have shape .* = \[{rows}, 2\], got \[{rows - 1}, 2\]", x, None, w_ih, w_hh[:-1])
    refuses(ValueError, rf"b_hh must have shape .* = \[{rows}\], got \[1\]", x, None, w_ih, w_hh, b_ih, b_hh[:1])
    refuses(ValueError, r"x must have shape \[T, B, L, I\] for weights of each task", x, None, *own)
    refuses(ValueError, rf"w_ih must have shape .* = \[4, {rows}, 3\], got \[2, ", per_task, None, own[0][:2], w_hh)
    bad = Make()(4, 3)
    bad_state = (bad, bad) if cell == "lstm" else bad
    refuses(ValueError, r"h must have shape \[B, H\] = \[4, 2\], got \[4, 3\]", x, bad_state, w_ih, w_hh)

    def refuses_lengths(error: type[Exception], message: str, lengths: Any, *lead: int) -> None:
        refuses(error, message, Make()(*(lead or (4,)), 5, 3), None, w_ih, w_hh, None, None, lengths)

    refuses_lengths(TypeError, "lengths must be a tensor, got list", [5, 5, 5, 5])
    refuses_lengths(TypeError, r"lengths must be int64 or int32, got torch.float32", torch.ones(4))
    refuses_lengths(TypeError, r"lengths must be int64 or int32, got torch.bool", torch.ones(4, dtype=torch.bool))
    refuses_lengths(ValueError, r"lengths must be in \[0, 6\), got -1", torch.tensor([5, -1, 0, 5]))
    refuses_lengths(ValueError, r"lengths must be in \[0, 6\), got 6", torch.tensor([6, 1, 0, 5]))
    refuses_lengths(ValueError, r"lengths must have shape \[B\] = \[4\], got \[3\]", torch.tensor([5, 5, 5]))
    refuses_lengths(ValueError, r"lengths must have shape \[T, B\] = \[2, 4\], got \[4\]", torch.tensor([5] * 4), 2, 4)
    refuses_lengths(
        ValueError, "lengths must be on cpu like the other arguments, got meta", torch.ones(4).long().to("meta")
    )


@every_cell
@pytest.mark.parametrize(
    ("T", "B", "L", "I", "H"),
    [(0, 2, 3, 4, 5), (2, 0, 3, 4, 5), (2, 3, 0, 4, 5), (2, 3, 4, 0, 5), (2, 3, 4, 5, 0), (0, 0, 0, 0, 0)],
)
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_sizes_of_zero(cell: str, T: int, B: int, L: int, I: int, H: int, backend: str) -> None:
    arguments = [Make()(T, B, L, I), *states(cell, T, B, H), *weights(cell, T, features=I, hidden=H)]
    for lengths in (None, torch.full((T, B), L // 2), torch.zeros(T, B, dtype=torch.int32)):
        with mk.backend(backend):
            results = run(lambda *args, lengths=lengths: SPECS[cell].call(*args, lengths), *arguments)
        if T and B:
            plain = run(lambda *args, lengths=lengths: SPECS[cell].plain(*args, lengths), *arguments)
            close(results, plain)
        assert all(torch.isfinite(r).all() for r in results)


@every_cell
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_nan_and_infinity_stay_in_their_sequence(cell: str, backend: str) -> None:
    """NaN reaches all later steps of its sequence; other sequences and tasks stay finite."""
    for bad in (float("nan"), float("inf"), -float("inf")):
        x = Make()(2, 2, 3, 3)
        x[0, 0, 1, 0] = bad
        with mk.backend(backend):
            y, *_ = run(SPECS[cell].call, x, *states(cell, 2, 2, 2), *weights(cell, 2))
        assert torch.isfinite(y[0, 0, 0]).all()
        assert torch.isfinite(y[0, 1]).all()
        assert torch.isfinite(y[1]).all()
        assert y[0, 0, 1:].isnan().all() or not math.isnan(bad)


@every_cell
def test_strided_and_expanded_arguments(cell: str) -> None:
    x, initial, own = Make()(3, 2, 4, 3), states(cell, 3, 2, 2), weights(cell, 3)

    def scattered(t: Tensor) -> Tensor:
        """Return equal values in another layout: dimensions in reverse order, with gaps."""
        wide = torch.full((*reversed(t.shape), 2), float("nan"), dtype=t.dtype)[..., 0]
        return wide.copy_(t.permute(*reversed(range(t.dim())))).permute(*reversed(range(t.dim())))

    def expanded(t: Tensor) -> Tensor:
        return t[..., :1].expand_as(t)

    lengths = torch.tensor([[4, 0, 2, 9], [1, 9, 3, 9], [2, 9, 4, 9]])[:, ::2]
    for change in (scattered, expanded):
        changed = [change(t) for t in (x, *initial, *own)]
        for n in (None, lengths):
            copies = [t.clone(memory_format=torch.contiguous_format) for t in changed]
            expected = SPECS[cell].call(*copies, n if n is None else n.contiguous())
            close(SPECS[cell].call(*changed, n), expected)
