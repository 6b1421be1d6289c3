"""Where it is allowed, ops on small tensors run as plain PyTorch, by sizes alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

import metakern as mk
from metakern.ops.core.plain import where_small

TARGET = torch.arange(8)


def rows(n: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """A tensor [8, n] that requires a gradient."""
    return torch.randn(8, n, dtype=dtype, requires_grad=True)


def turned(x: Tensor) -> Tensor:
    angle = torch.ones(8, x.shape[-1], dtype=x.dtype)
    return mk.ops.rope(x, angle.cos(), angle.sin())


# The op of x [8, n], and an n from which on the rules are faster.
OPS: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "cross_entropy": (lambda x: mk.ops.cross_entropy(x, TARGET), 2**14),
    "gelu": (mk.ops.gelu, 2**15),
    "gelu, tanh": (lambda x: mk.ops.gelu(x, "tanh"), 2**11),
    "layer_norm": (lambda x: mk.ops.layer_norm(x, x[0].sin(), x[1]), 2**13),
    "linear": (lambda x: mk.ops.linear(x, x[:4].sin(), x[0, :4]), 2**17),
    "nn.linear": (lambda x: mk.nn.linear.linear(x, x[:4].sin(), x[0, :4]), 2**17),
    "rms_norm": (lambda x: mk.ops.rms_norm(x, x[0].sin()), 2**13),
    "rope": (turned, 2**14),
}
every_op = pytest.mark.parametrize("name", OPS)
pytestmark = pytest.mark.usefixtures("small_is_plain")


@pytest.fixture
def small_is_plain() -> Iterator[None]:
    with where_small():
        yield


def by_rules(y: Tensor) -> bool:
    """Return whether y was computed by the Functions of an op."""
    todo: list[Any] = [y.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and type(node).__name__ == "_OpBackward":
            return True
        todo += [before for before, _ in node.next_functions] if node is not None else []
    return False


@every_op
def test_the_size_decides(name: str) -> None:
    f, limit = OPS[name]
    assert not by_rules(f(rows(10)))
    assert by_rules(f(rows(limit)))


@every_op
def test_small_calls_equal_the_rules_to_second_order(name: str) -> None:
    f, x, g = OPS[name][0], rows(10), torch.randn(8, 10, dtype=torch.float64)

    def orders() -> tuple[Tensor, ...]:
        y = f(x)
        (first,) = torch.autograd.grad(y.sin().sum(), x, create_graph=True)
        with forward_ad.dual_level():
            dual = f(forward_ad.make_dual(x, g))
            (slope,) = torch.autograd.grad(dual.sin().sum(), x)
            forward = forward_ad.unpack_dual(slope).tangent.detach()
        return y, first, *torch.autograd.grad(first, x, g), forward

    plain = orders()
    with where_small(False):
        assert by_rules(f(x))
        exact = orders()
    for a, e in zip(plain, exact, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-11)


@every_op
def test_the_rules_run_where_they_are_asked_for(name: str) -> None:
    f, x = OPS[name][0], rows(10)
    with mk.backend("reference"):
        assert by_rules(f(x))
    with torch.autocast("cpu", torch.bfloat16):
        if name != "nn.linear":  # autocast takes PyTorch's function
            assert by_rules(f(x))
    assert by_rules(f(rows(10, torch.bfloat16)))
    expected = torch.stack([f(xi) for xi in (x, 2 * x)])
    torch.testing.assert_close(torch.func.vmap(f)(torch.stack((x, 2 * x))), expected, rtol=1e-9, atol=1e-11)


def test_one_table_of_embeddings_is_indexed() -> None:
    table = rows(10)
    assert not by_rules(mk.ops.embedding(TARGET, table))
    assert by_rules(mk.ops.embedding(TARGET[:4].view(2, 2), torch.stack((table, table))))


def test_a_small_task_without_kept_tokens_has_no_loss() -> None:
    x = rows(10)
    y = mk.ops.cross_entropy(x, torch.full((8,), -100))
    assert not y.any()
    assert not by_rules(y)
    assert not torch.autograd.grad(y, x)[0].any()


def test_wrong_arguments_of_small_layers_are_errors() -> None:
    layer = mk.nn.Linear(3, 5)
    with pytest.raises(ValueError, match="linear: x must have shape"):
        layer(torch.zeros(2, 4))
    layer.weight.data.untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="its memory was freed"):
        layer(torch.zeros(2, 3))
