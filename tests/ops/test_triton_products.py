"""Products in Triton: every form that callers use, with and without parts, in the interpreter; and their precision."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import metakern as mk
from metakern.ops.core import triton_kernels
from metakern.ops.core.spec import Make

if mk.backends()["triton"] != "available":
    pytest.skip(mk.backends()["triton"], allow_module_level=True)

from metakern.ops.core.triton_kernels import products

SIZES = [(3, 5, 6, 7), (1, 9, 2, 3)]  # T, N, K, M


@pytest.fixture(params=[True, False], ids=["in-parts", "whole"])
def in_parts(request: Any, monkeypatch: pytest.MonkeyPatch) -> bool:
    monkeypatch.setattr(products, "in_parts", lambda a: request.param)
    return request.param


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The grids of all launches."""
    grids, launch = [], products.launch

    def note(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        grids.append(grid)
        launch(kernel, grid, *args, **options)

    monkeypatch.setattr(products, "launch", note)
    return grids


def transposed(make: Make, T: int, N: int, K: int) -> Tensor:
    return make(T, K, N).mT


def every_other(make: Make, T: int, N: int, K: int) -> Tensor:
    return make(T, N, 2 * K)[..., ::2]


def shared(make: Make, T: int, N: int, K: int) -> Tensor:
    return make(1, N, K).expand(T, -1, -1)


LAYOUTS: list[Callable[..., Tensor]] = [Make.__call__, transposed, every_other, shared]
BIASES: dict[str, Callable[..., Tensor | None]] = {
    "no bias": lambda make, T, N, M: None,
    "a row for each task": lambda make, T, N, M: make(T, 1, M),
    "one row": lambda make, T, N, M: make(1, 1, M),
    "one row, expanded": lambda make, T, N, M: make(1, 1, M).expand(T, N, M),
    "other rows": lambda make, T, N, M: make(T, N, M),
}


FORMS = [(a, b, "no bias") for a in LAYOUTS for b in LAYOUTS] + [(transposed, shared, bias) for bias in BIASES]


@pytest.mark.parametrize(("a", "b", "bias"), FORMS)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_products_and_totals(in_parts: bool, sizes: Any, a: Any, b: Any, bias: str) -> None:
    (T, N, K, M), make = sizes, Make(seed=3)
    left, right, c, d = a(make, T, N, K), b(make, T, K, M), make(T, N, K), make(T, K, M)
    add = BIASES[bias](make, T, N, M)
    expected = torch.einsum("tnk,tkm->tnm", left, right) + (0 if add is None else add)
    torch.testing.assert_close(products.product(left, right, add), expected, rtol=1e-12, atol=1e-12)
    for pairs in ([(left, right), (c, d)], [(None, right), (left, right), (c, None), (c, d)]):
        torch.testing.assert_close(products.total(*pairs, add=add), expected + c @ d, rtol=1e-12, atol=1e-12)
    for pairs, total in (([(left, right)], 0), ([(left, right), (c, d)], c @ d), ([(left, right), (c, None)], 0)):
        y, s = products.total_and_sums(*pairs)
        torch.testing.assert_close(y, expected - (0 if add is None else add) + total, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(s, left.sum(2), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sizes", [(0, 2, 3, 4), (2, 0, 3, 4), (2, 3, 0, 4), (2, 3, 4, 0)], ids=str)
def test_empty_products(in_parts: bool, sizes: Any) -> None:
    (T, N, K, M), make = sizes, Make(seed=3)
    a, b, add = make(T, N, K), make(T, K, M), make(T, 1, M)
    torch.testing.assert_close(products.product(a, b, add), a @ b + add)
    y, s = products.total_and_sums((a, b))
    torch.testing.assert_close(y, a @ b)
    torch.testing.assert_close(s, a.sum(2))


def test_what_is_missing_adds_nothing() -> None:
    a, b = Make(seed=3)(2, 3, 4), Make(seed=4)(2, 4, 5)
    assert products.total((None, b), (a, None)) is None
    y, s = products.total_and_sums((None, b), (a, b))
    torch.testing.assert_close(y, a @ b)
    assert s is None


def test_zero_and_negated_tensors_are_values(in_parts: bool) -> None:
    make = Make(seed=3)
    a, b, c = torch._efficientzerotensor((2, 3, 4), dtype=torch.float64), make(2, 4, 5), make(2, 3, 4)
    torch.testing.assert_close(products.total((a, b), (c, b)), c @ b)
    negated = torch._neg_view(c)
    torch.testing.assert_close(products.total((negated, b), (c, b)), torch.zeros(2, 3, 5, dtype=torch.float64))


def test_what_tasks_share_is_one_product(launches: list[tuple[int, ...]], in_parts: bool) -> None:
    make = Make(seed=3)
    products.product(make(3, 5, 6), make(1, 6, 7).expand(3, -1, -1))
    assert launches == ([(8, 1)] if in_parts else [])  # 15 rows and 7 columns, in blocks of 4


def test_matrices_of_one_task_have_two_dimensions() -> None:
    a, b = Make(seed=3)(3, 4), Make(seed=4)(4, 5)
    torch.testing.assert_close(products.matmul(a, b), a @ b)
    torch.testing.assert_close(products.matmul(a[None], b[None]), (a @ b)[None])


def test_only_gpus_of_data_centers_have_float32_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "INTERPRETED", False)
    a = torch.zeros(8, 64, 512)
    for capability, expected in ((9, 0), True), ((8, 0), True), ((8, 9), False), (None, False):
        monkeypatch.setattr(products.launching, "capability", lambda device, c=capability: c)
        assert products.in_parts(a) is expected
        assert not products.in_parts(a.bfloat16())
    monkeypatch.setattr(products.launching, "capability", lambda device: (9, 0))
    monkeypatch.setattr(products, "precision", lambda: "tf32")  # PyTorch may use TF32, and so its own kernels
    assert not products.in_parts(a)


def test_blocks_follow_the_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "INTERPRETED", False)
    monkeypatch.setattr(products, "in_parts", lambda a: True)
    few, small, large = torch.zeros(4, 16, 704), torch.zeros(8, 256, 512), torch.zeros(8, 256, 512)
    assert products.blocks(few, 256, two=False)[:3] == (16, 32, 128)
    assert products.blocks(small, 128, two=False)[:3] == (32, 32, 32)
    assert products.blocks(large, 2000, two=False)[3:] == (4, 3, "tf32x3")
    assert products.blocks(large.mT, 2000, two=False).precision == "bf16x6"


def test_without_triton_products_are_pytorchs(monkeypatch: pytest.MonkeyPatch) -> None:
    triton_kernels._products.cache_clear()
    monkeypatch.setattr(triton_kernels.importlib.util, "find_spec", lambda name: None)
    assert triton_kernels._products() is triton_kernels.matrices
    triton_kernels._products.cache_clear()
