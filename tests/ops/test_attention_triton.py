"""Attention's Triton kernels in the interpreter, with several blocks and every branch; PyTorch's flash attention."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import metakern as mk
from metakern.ops import SPECS
from metakern.ops.core.spec import Make

pytestmark = pytest.mark.skipif(mk.backends()["triton"] != "available", reason=mk.backends()["triton"])

SPEC = SPECS["attention"]
LEFT, RIGHT = torch.arange(7) >= 3, torch.arange(7) < 2
HOLES = torch.tensor([False, True, False, False, True, True, False])
NONE = torch.zeros(7, dtype=torch.bool)
CASES: dict[str, tuple[tuple[int, ...], dict[str, Any]]] = {
    "causal": ((1, 1, 1, 7, 7, 3), {}),
    "causal_in_whole_blocks": ((1, 1, 1, 8, 8, 16), {}),
    "full": ((1, 1, 1, 5, 7, 24), {"causal": False}),
    "decoding": ((1, 1, 1, 3, 9, 2), {}),
    "more_queries": ((1, 1, 1, 9, 5, 2), {}),
    "grouped": ((1, 4, 2, 5, 6, 2), {"scale": -0.4}),
    "wide": ((1, 1, 1, 5, 3, 80), {"causal": False}),
    "window_in_a_block": ((1, 1, 1, 9, 9, 2), {"window": 1}),
    "window_of_blocks": ((1, 2, 1, 9, 11, 2), {"window": 5}),
    "window_with_a_mask": ((2, 1, 1, 7, 7, 2), {"window": 4, "mask": torch.stack((HOLES, LEFT))}),
    "masks": ((2, 1, 1, 5, 7, 2), {"mask": torch.stack((HOLES, NONE)), "causal": False}),
    "masks_causal": ((2, 1, 1, 7, 7, 2), {"mask": torch.stack((LEFT, RIGHT))}),
}


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make blocks so small that queries and keys have several, of different sizes."""
    from metakern.ops.attention import triton

    monkeypatch.setattr(triton, "blocks", lambda *_: (triton.Blocks(4, 2, 4, 1),))


def qkv(make: Make, B: int, H: int, H_kv: int, L: int, L_k: int, D: int) -> tuple[Tensor, Tensor, Tensor]:
    return make(B, H, L, D), make(B, H_kv, L_k, D), make(B, H_kv, L_k, D)


def orders(f: Any, x: tuple[Tensor, ...], make: Make, **options: Any) -> list[Tensor]:
    """Return the output, cotangents of the arguments, and second derivatives by reverse over reverse."""
    x = tuple(a.detach().clone().requires_grad_() for a in x)
    y = f(*x, **options)
    ct = make(*y.shape).requires_grad_()
    ct_x = torch.autograd.grad(y, x, ct, create_graph=True)
    loss = sum((c * make(*c.shape)).sum() for c in ct_x) + (y * y * make(*y.shape)).sum()
    return [y.detach(), *(c.detach() for c in ct_x), *torch.autograd.grad(loss, (*x, ct))]


def tangent_of_vjp(f: Any, x: tuple[Tensor, ...], make: Make, **options: Any) -> tuple[Tensor, ...]:
    """Return second derivatives by forward over reverse, where the cotangent has a tangent too."""
    v = tuple(make(*a.shape) for a in x)

    def loss(*x: Tensor) -> Tensor:
        return (f(*x, **options) ** 2 * weight).sum()

    weight = make(*x[0].shape)
    return torch.func.jvp(torch.func.grad(loss, (0, 1, 2)), x, v)[1]


@pytest.mark.parametrize("name", CASES)
def test_kernels_equal_plain_pytorch_at_every_order(name: str) -> None:
    shape, options = CASES[name]
    x = qkv(Make(seed=3), *shape)
    with mk.backend("triton"):
        found = [*orders(SPEC.call, x, Make(seed=4), **options), *tangent_of_vjp(SPEC.call, x, Make(seed=5), **options)]
    truth = [*orders(SPEC.plain, x, Make(seed=4), **options), *tangent_of_vjp(SPEC.plain, x, Make(seed=5), **options)]
    for a, e in zip(found, truth, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-11)


def test_masked_keys_reach_no_result() -> None:
    q, k, v = qkv(Make(seed=3), 2, 1, 1, 5, 7, 3)
    options = {"mask": torch.stack((HOLES, RIGHT)), "causal": False}
    hidden = ~options["mask"][:, None, :, None]
    with mk.backend("triton"):
        found, clean = (
            orders(SPEC.call, (q, k.masked_fill(hidden, fill), v.masked_fill(hidden, fill)), Make(seed=4), **options)
            for fill in (float("nan"), 1.0)
        )
    assert all(torch.equal(a, b) for a, b in zip(found, clean, strict=True))


@pytest.mark.filterwarnings("ignore:All-NaN:RuntimeWarning")
def test_blocks_without_visible_keys_are_not_read() -> None:
    """They hold NaN, which would reach a result: 0 · NaN is NaN."""
    q, k, v = qkv(Make(seed=3), 1, 1, 1, 8, 8, 3)
    for spoiled, rows, options in ((slice(4, 8), slice(0, 4), {}), (slice(0, 2), slice(4, 8), {"window": 3})):
        bad_k, bad_v = k.clone(), v.clone()
        bad_k[:, :, spoiled], bad_v[:, :, spoiled] = float("nan"), float("nan")
        with mk.backend("triton"):
            y = SPEC.call(q, bad_k, bad_v, **options)
            assert torch.equal(y[:, :, rows], SPEC.call(q, k, v, **options)[:, :, rows])


def test_results_do_not_depend_on_the_sizes_of_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    from metakern.ops.attention import triton

    x, found = qkv(Make(seed=3), 1, 2, 1, 7, 9, 3), []
    for sizes in ((2, 8), (8, 2), (16, 16)):
        monkeypatch.setattr(triton, "blocks", lambda *_, sizes=sizes: (triton.Blocks(*sizes, 4, 1),))
        with mk.backend("triton"):
            found.append(orders(SPEC.call, x, Make(seed=4), window=3))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-12, atol=1e-13)


def test_float32_errors_are_at_most_twice_those_of_plain_pytorch() -> None:
    x = qkv(Make(torch.float32, seed=3), 1, 4, 1, 6, 9, 16)
    with mk.backend("triton"):
        ours = orders(SPEC.call, x, Make(torch.float32, seed=4))
    theirs = orders(SPEC.plain, x, Make(torch.float32, seed=4))
    truth = orders(SPEC.plain, tuple(a.double() for a in x), Make(torch.float64, seed=4))

    def errors(found: list[Tensor]) -> Tensor:
        return torch.stack([(a - t).norm() / t.norm() for a, t in zip(found, truth, strict=True)])

    assert all(a.dtype == torch.float32 for a in ours)
    assert (errors(ours) <= 2 * errors(theirs) + torch.finfo(torch.float32).eps).all()


def test_unwanted_cotangents_are_not_computed(launched: list[str]) -> None:
    q, k, v = qkv(Make(seed=3), 1, 1, 1, 3, 3, 2)
    with mk.backend("triton"):
        for wanted, kernels in (((q,), ["_queries_kernel"]), ((v,), ["_keys_kernel"]), ((), [])):
            for x in (q, k, v):
                x.requires_grad_(any(x is w for w in wanted))
            y = SPEC.call(q, k, v)
            launched.clear()
            if wanted:
                y.sum().backward()
            assert launched == (["_delta_kernel", *kernels] if wanted else [])


def test_wide_heads_sum_keys_and_values_in_two_launches(launched: list[str]) -> None:
    x = tuple(a.requires_grad_() for a in qkv(Make(seed=3), 1, 1, 1, 2, 2, 130))
    with mk.backend("triton"):
        found = torch.autograd.grad(SPEC.call(*x).square().sum(), x)
    assert launched.count("_keys_kernel") == 2
    torch.testing.assert_close(found, torch.autograd.grad(SPEC.plain(*x).square().sum(), x), rtol=1e-9, atol=1e-11)


def test_flash_attention_of_pytorch_is_chosen_where_it_applies() -> None:
    from metakern.ops.attention.triton import by_library

    def takes(
        L: int = 8, L_k: int = 8, D: int = 64, dtype: torch.dtype = torch.bfloat16, capability: Any = (9, 0), **c: Any
    ) -> bool:
        q, k = (torch.empty(1, 2, size, D, dtype=dtype, device="meta") for size in (L, L_k))
        constants = {"mask": None, "window": None, "causal": True, "scale": 0.1} | c
        return by_library(SimpleNamespace(**constants), q, k, capability)

    assert takes()
    assert takes(dtype=torch.float16, D=256)
    assert takes(L=4, causal=False)
    assert takes(capability=(8, 6), D=192)
    assert not takes(L=4)
    assert not takes(capability=(8, 6), D=256)
    assert not takes(capability=(7, 5))
    assert not takes(capability=None)
    assert not takes(dtype=torch.float32)
    assert not takes(D=60)
    assert not takes(D=264)
    assert not takes(L=0, L_k=0)
    assert not takes(scale=-0.1)
    assert not takes(mask=torch.ones(1, 8, dtype=torch.bool))
    assert not takes(window=4)


def test_flash_attention_of_pytorch_has_the_signatures_that_are_called() -> None:
    flash = torch.ops.aten._scaled_dot_product_flash_attention.default._schema
    names = "query key value dropout_p is_causal return_debug_mask scale"
    assert [a.name for a in flash.arguments] == names.split()
    assert [r.name for r in flash.returns][:2] == ["output", "logsumexp"]
    backward = torch.ops.aten._scaled_dot_product_flash_attention_backward.default._schema
    names = "grad_out query key value out logsumexp cum_seq_q cum_seq_k max_q max_k dropout_p is_causal"
    assert [a.name for a in backward.arguments] == [*names.split(), "philox_seed", "philox_offset", "scale"]
