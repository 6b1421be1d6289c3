"""Functions of PyTorch replaced by ops: equal to second order, or left to PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

import metakern as mk
from metakern.meta.functions import FusedFunctions
from metakern.ops.core.spec import Make

SEEN = torch.tensor([[True, True, False], [True, False, False]])
TARGET = torch.tensor([0, 2, -100, 1])


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the ops that were called."""
    names: list[str] = []

    def counted(name: str, op: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            names.append(name)
            return op(*args, **kwargs)

        return call

    for name in ("attention", "cross_entropy", "gelu", "silu"):
        monkeypatch.setattr(mk.ops, name, counted(name, getattr(mk.ops, name)))
    return names


def attention(**options: Any) -> Callable[..., Tensor]:
    return lambda *qkv: F.scaled_dot_product_attention(*qkv, **options)


def cross_entropy(target: Tensor = TARGET, **options: Any) -> Callable[[Tensor], Tensor]:
    return lambda logits: F.cross_entropy(logits, target, **options)


def attended(L: int = 3, L_k: int = 3, H: int = 2, H_kv: int = 2) -> list[tuple[int, ...]]:
    return [(2, H, L, 4), (2, H_kv, L_k, 4), (2, H_kv, L_k, 4)]


def orders(f: Callable[..., Tensor], shapes: list[tuple[int, ...]]) -> list[Tensor]:
    """Return the output of `f` on random inputs, its first derivatives, and a derivative of those."""
    make = Make(seed=3)
    x = [make(*shape).requires_grad_() for shape in shapes]
    with sdpa_kernel(SDPBackend.MATH):
        y = f(*x)
        g = torch.autograd.grad(y, x, make(*y.shape), create_graph=True)
        return [y, *g, *torch.autograd.grad(g, x, [make(*gi.shape) for gi in g])]


@pytest.mark.parametrize(
    ("name", "f", "shapes"),
    [
        ("attention", attention(), attended(3, 5)),
        ("attention", attention(is_causal=True, scale=0.3), attended()),
        ("attention", attention(attn_mask=SEEN[:, None, None]), attended(5, 3)),
        ("attention", attention(enable_gqa=True), attended(H=4)),
        ("cross_entropy", cross_entropy(), [(4, 5)]),
        ("cross_entropy", cross_entropy(ignore_index=2), [(3, 5)]),
        ("gelu", lambda x: F.gelu(x), [(3, 5)]),
        ("gelu", nn.GELU("tanh"), [(3, 5)]),
        ("silu", lambda x: F.silu(x), [(3, 5)]),
    ],
)
def test_functions_that_an_op_computes_are_replaced_by_it(
    name: str, f: Callable, shapes: list, called: list[str]
) -> None:
    if name == "cross_entropy" and shapes == [(3, 5)]:
        f = cross_entropy(torch.tensor([2, 1, 0]), ignore_index=2)
    expected = orders(f, shapes)
    assert not called
    with FusedFunctions():
        actual = orders(f, shapes)
    assert called == [name]
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("f", "shapes"),
    [
        (attention(is_causal=True), attended(3, 5)),
        (attention(attn_mask=torch.ones(3, 3, dtype=torch.bool).tril()), attended()),
        (attention(attn_mask=SEEN[:, None, None].double()), attended()),
        (attention(), [(2, 3, 4), (2, 3, 4), (2, 3, 4)]),
        (attention(), [(2, 2, 3, 4), (2, 2, 5, 4), (2, 2, 5, 6)]),
        (attention(), [(1, 2, 3, 4), (2, 2, 5, 4), (2, 2, 5, 4)]),
        (cross_entropy(reduction="sum"), [(4, 5)]),
        (cross_entropy(label_smoothing=0.1), [(4, 5)]),
        (cross_entropy(weight=torch.arange(5).double()), [(4, 5)]),
        (cross_entropy(TARGET[None]), [(1, 5, 4)]),
        (lambda x: F.silu(x + 0, inplace=True), [(3, 5)]),
    ],
)
def test_functions_that_no_op_computes_are_left_to_pytorch(f: Callable, shapes: list, called: list[str]) -> None:
    expected = orders(f, shapes)
    with FusedFunctions():
        assert all(torch.equal(a, e) for a, e in zip(orders(f, shapes), expected, strict=True))
    assert not called


def test_cross_entropy_without_a_kept_target_is_nan_as_in_pytorch() -> None:
    with FusedFunctions():
        assert F.cross_entropy(torch.randn(3, 5), torch.full((3,), -100)).isnan()


@pytest.mark.parametrize("batching", ["fold", "vmap", "loop"])
def test_models_and_losses_run_by_the_ops(batching: str, called: list[str]) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = nn.Linear(4, 12), nn.Linear(4, 5)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.inner(x).unsqueeze(1).chunk(3, -1)
            return self.head(F.gelu(F.scaled_dot_product_attention(q, k, v, is_causal=True)).squeeze(1))

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())

    batch = torch.randn(3, 2, 3, 4), torch.randint(5, (3, 2, 3))
    maml = mk.MAML(Model(), loss, batching=batching)
    maml(batch, batch).backward()
    assert maml.plan.batching == batching
    assert {"attention", "gelu", "cross_entropy"} <= set(called)


def test_function_modes_do_not_see_the_operations_within_ops() -> None:
    class Seen(TorchFunctionMode):
        count = 0

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: dict | None = None) -> Any:
            self.count += 1
            return func(*args, **(kwargs or {}))

    x, weight = torch.randn(2, 3, requires_grad=True), torch.randn(3)
    with Seen() as seen:
        y = mk.ops.layer_norm(x, weight)
        assert seen.count == 0
        assert y.sum().requires_grad
        assert seen.count == 2
    torch.testing.assert_close(y, mk.ops.layer_norm(x, weight))
