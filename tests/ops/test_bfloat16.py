"""Products of float32 matrices in bfloat16: the kernels, PyTorch's products, and the ops at first and second order."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import metakern as mk
from metakern import native
from metakern.native.bfloat16 import bfloat16_products
from metakern.ops import SPECS
from metakern.ops.core.spec import Make

pytestmark = pytest.mark.skipif(native.C is None, reason="needs the C++ kernels")
_aten: Any = torch.ops.aten


def rounded(x: Tensor) -> Tensor:
    return x.bfloat16().double()


def assert_sums(found: Tensor, a: Tensor, b: Tensor, add: Tensor | None = None, scale: float = 1.0) -> None:
    """Assert that `found` is add + scale a b of rounded operands, up to a summation of K terms in float32."""
    truth, size = scale * (rounded(a) @ rounded(b)), abs(scale) * (rounded(a).abs() @ rounded(b).abs())
    if add is not None:
        truth, size = truth + add.double(), size + add.double().abs()
    bound = (a.shape[-1] + 4) * torch.finfo(torch.float32).eps * size
    assert found.dtype == torch.float32
    assert ((found.double() - truth).abs() <= bound + 1e-37).all()


SIZES = [
    (1, 1, 1),
    (3, 5, 7),
    (12, 32, 256),
    (13, 33, 257),
    (25, 40, 64),
    (7, 130, 31),
    (40, 1, 300),
    (5, 64, 2),
    (50, 520, 513),
]


@pytest.mark.parametrize(("M", "N", "K"), SIZES)
@pytest.mark.parametrize("a_is_transposed", [False, True])
@pytest.mark.parametrize("b_is_transposed", [False, True])
def test_products_round_their_operands(
    isa: str, M: int, N: int, K: int, a_is_transposed: bool, b_is_transposed: bool
) -> None:
    make = Make(torch.float32)
    a = make(2, K, M).mT if a_is_transposed else make(2, M, K)
    b = make(2, N, K).mT if b_is_transposed else make(2, K, N)
    add, row = make(2, M, N), make(N)
    with bfloat16_products():
        assert_sums(native.product(a, b), a, b)
        assert_sums(native.product(a, b, add, scale=-0.3), a, b, add, -0.3)
        assert_sums(native.product(a, b, row), a, b, row)


@pytest.mark.parametrize("sizes", [(0, 3, 4), (3, 0, 4), (3, 4, 0)])
def test_empty_products(isa: str, sizes: tuple[int, int, int]) -> None:
    M, N, K = sizes
    with bfloat16_products():
        found = native.product(torch.ones(2, M, K), torch.ones(2, K, N), torch.ones(N))
    assert torch.equal(found, torch.ones(2, M, N))


def test_rounding_is_to_the_nearest_with_ties_to_even(isa: str) -> None:
    bits = torch.randint(-(2**31), 2**31, (4096,), generator=torch.Generator().manual_seed(0)).int()
    ties = (bits & ~0xFFFF) | 0x8000
    x = torch.cat([bits, ties]).view(torch.float32)
    x = torch.cat([x[x.isnan() | (x.abs() > 1e-37)], torch.tensor([0.0, torch.inf, -torch.inf, torch.nan, 3.4e38])])
    with bfloat16_products():
        found = native.product(x.view(1, -1, 1), torch.ones(1, 1, 1)).flatten()
    torch.testing.assert_close(found, x.bfloat16().float(), rtol=0, atol=0, equal_nan=True)


def test_results_do_not_depend_on_threads_or_neighbours(isa: str) -> None:
    make, threads = Make(torch.float32), torch.get_num_threads()
    a, b = make(3, 200, 300), make(3, 300, 150)
    with bfloat16_products():
        truth = native.product(a, b)
        try:
            torch.set_num_threads(3)
            assert torch.equal(native.product(a, b), truth)
        finally:
            torch.set_num_threads(threads)
        a[1], b[1] = torch.nan, torch.inf
        assert torch.equal(native.product(a, b)[[0, 2]], truth[[0, 2]])


def test_products_of_pytorch_are_replaced() -> None:
    make = Make(torch.float32)
    a, b, add = make(2, 9, 40), make(2, 40, 11), make(2, 9, 11)
    with bfloat16_products():
        assert_sums(torch.bmm(a, b), a, b)
        assert_sums(a[0] @ b[0], a[0], b[0])
        assert_sums(torch.einsum("tij,tjk->tik", a, b), a, b)
        assert_sums(F.linear(a, b[0].mT, add[0, 0]), a, b[0], add[0, 0])
        assert_sums(torch.addmm(add[0], a[0], b[0], beta=2, alpha=0.5), a[0], b[0], 2 * add[0], 0.5)
        assert_sums(torch.baddbmm(torch.full_like(add, torch.nan), a, b, beta=0), a, b)
        assert_sums(add.clone()[0].addmm_(a[0], b[0]), a[0], b[0], add[0])
        assert_sums(add.clone().baddbmm_(a, b), a, b, add)


def test_backward_passes_and_torch_func_obey() -> None:
    make = Make(torch.float32)
    x, weight, ct = make(9, 40), make(11, 40).requires_grad_(), make(9, 11)
    with bfloat16_products():
        (found,) = torch.autograd.grad(x @ weight.mT, weight, ct)
        assert_sums(found, ct.mT, x)
        many = torch.func.vmap(lambda row: torch.func.grad(lambda w: ((row @ w.mT) * ct).sum())(weight))(
            x.expand(2, 9, 40)
        )
        assert_sums(many[1], ct.mT, x)


def test_float64_vectors_and_code_outside_the_block_are_left_alone() -> None:
    make = Make()
    a, b = make(9, 40), make(40, 11)
    with bfloat16_products():
        assert torch.equal(a @ b, torch.mm(a, b))
        torch.testing.assert_close(native.product(a[None], b[None])[0], a @ b, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(a.float() @ b[:, 0].float(), (a @ b[:, 0]).float())
    torch.testing.assert_close(a.float() @ b.float(), (a @ b).float())


def test_another_thread_is_left_alone() -> None:
    a, found = torch.randn(1, 9, 40), []
    truth = native.product(a, a.mT)
    with bfloat16_products():
        thread = threading.Thread(target=lambda: found.append(native.product(a, a.mT)))
        thread.start()
        thread.join()
        assert not torch.equal(native.product(a, a.mT), truth)
    assert torch.equal(found[0], truth)


class Rounding(TorchDispatchMode):
    """Rounds the operands of all products to bfloat16, in the dtype that they have."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        first = {_aten.mm.default: 0, _aten.bmm.default: 0, _aten.addmm.default: 1, _aten.baddbmm.default: 1}.get(func)
        if first is not None:
            args = (*args[:first], *(rounded(t) for t in args[first : first + 2]), *args[first + 2 :])
        return func(*args, **kwargs or {})


def _attention(make: Make) -> tuple:
    return make(2, 4, 50, 16), make(2, 2, 50, 16), make(2, 2, 50, 16)


def _recurrent(gates: int, states: int) -> Callable[[Make], tuple]:
    def args(make: Make) -> tuple:
        state = tuple(make(3, 5, 24) for _ in range(states))
        weights = 0.2 * make(3, gates * 24, 20), 0.2 * make(3, gates * 24, 24)
        return make(3, 5, 7, 20), *state, *weights

    return args


ARGUMENTS: dict[str, Callable[[Make], tuple]] = {
    "linear": lambda make: (make(3, 20, 40), make(3, 30, 40), make(3, 30)),
    "lora_linear": lambda make: (make(3, 20, 40), make(30, 40), make(3, 4, 40), make(3, 30, 4), 0.5),
    "implicit_linear": lambda make: (
        *(make(3, 20, 40), make(30, 40), make(3, 30)),
        *(make(3, 50, 40), make(3, 50, 30), 0.1 * make(3, 50)),
    ),
    "attention": _attention,
    "linear_cross_entropy": lambda make: (make(2, 40, 24), make(2, 60, 24), make.integers(60, 2, 40)),
    "rnn": _recurrent(1, 1),
    "gru": _recurrent(3, 1),
    "lstm": _recurrent(4, 2),
}


def orders(function: Callable[..., Any], args: tuple, frozen: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """Return the outputs, their cotangents' pullback, and its pullback (reverse over reverse), each as one vector."""
    leaves: list[Tensor] = []

    def leaf(x: Any, i: int) -> Any:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        x = x.to(dtype)
        if i not in frozen:
            leaves.append(x.requires_grad_())
        return x

    make = Make(seed=7)
    made = torch.utils._pytree.tree_leaves(function(*(leaf(x, i) for i, x in enumerate(args))))
    ct = [make(*y.shape).to(dtype).requires_grad_() for y in made]
    first = torch.autograd.grad(made, leaves, ct, create_graph=True)
    ct_first = [make(*g.shape).to(dtype) for g in first]
    second = torch.autograd.grad(first, [*leaves, *ct], ct_first, allow_unused=True, materialize_grads=True)
    return [torch.cat([t.detach().double().flatten() for t in group]) for group in (made, first, second)]


@pytest.mark.parametrize("name", ARGUMENTS)
def test_ops_round_no_more_than_plain_products_do(isa: str, name: str) -> None:
    spec, args = SPECS[name], ARGUMENTS[name](Make())
    frozen = (1,) if name == "lora_linear" else ()
    truth = orders(spec.plain, args, frozen, torch.float64)
    with Rounding():
        plain = orders(spec.plain, args, frozen, torch.float64)
    exact = orders(spec.call, args, frozen, torch.float32)
    with bfloat16_products():
        found = orders(spec.call, args, frozen, torch.float32)
    for order, (f, e, p, t) in enumerate(zip(found, exact, plain, truth, strict=True)):
        error, without, allowed = ((x - t).norm() / t.norm() for x in (f, e, p))
        assert error <= 2 * allowed, (order, error, allowed)
        assert error > 10 * without, order  # the products were rounded


def test_forward_over_reverse_equals_reverse_over_reverse() -> None:
    make = Make(torch.float32)
    q, k, v, ct = (make(1, 2, 33, 16) for _ in range(4))

    def gradient(q: Tensor) -> Tensor:
        return torch.func.grad(lambda q: (mk.ops.attention(q, k, v) * ct).sum())(q)

    t_q = make(*q.shape)
    with bfloat16_products():
        _, forward = torch.func.jvp(gradient, (q,), (t_q,))
        reverse = torch.func.vjp(gradient, q)[1](t_q)[0]
    torch.testing.assert_close(forward, reverse, rtol=0.02, atol=0.02 * reverse.abs().max().item())
