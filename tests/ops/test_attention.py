"""`attention` alone: masks that hide NaN, queries without keys, alignment, windows, large scores, and errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from largest import Largest
from torch import Tensor
from torch.func import grad, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

import metakern as mk
from metakern.ops import SPECS
from metakern.ops.core.spec import Make


def qkv(B: int, H: int, H_kv: int, L: int, L_k: int, D: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    make = Make(seed=7)
    return make(B, H, L, D), make(B, H_kv, L_k, D), make(B, H_kv, L_k, D)


def run(f: Callable, *args: Tensor, **kwargs: Any) -> list[Tensor]:
    """Return the output, cotangents of the arguments, and second derivatives in both modes, for random cotangents."""
    args, make = tuple(a.detach().clone().requires_grad_() for a in args), Make(seed=9)
    y = f(*args, **kwargs)
    ct, v = make(*y.shape).to(y.dtype), tuple(make(*a.shape).to(a.dtype) for a in args)
    ct_x = torch.autograd.grad(y, args, ct, create_graph=True)
    transposed = torch.autograd.grad(ct_x, args, v)

    def inner(*args: Tensor) -> Tensor:
        return (f(*args, **kwargs) * ct).sum()

    return [y, *ct_x, *transposed, *jvp(grad(inner, (0, 1, 2)), tuple(a.detach() for a in args), v)[1]]


def close(actual: list[Tensor], expected: list[Tensor]) -> None:
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("causal", [True, False])
def test_equals_torch_to_first_order(causal: bool) -> None:
    q, k, v = qkv(2, 4, 2, 5, 5)
    arguments = [t.requires_grad_() for t in (q, k, v)]
    ours = mk.ops.attention(q, k, v, causal=causal, scale=0.3)
    with sdpa_kernel(SDPBackend.MATH):
        theirs = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=0.3, enable_gqa=True)
    ct = Make()(2, 4, 5, 3)
    close([ours, *torch.autograd.grad(ours, arguments, ct)], [theirs, *torch.autograd.grad(theirs, arguments, ct)])


def test_the_last_queries_alone_give_their_rows_of_the_whole_sequence() -> None:
    """As in decoding with a cache, at every order."""
    q, k, v = qkv(2, 4, 2, 6, 6)

    def tail(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return mk.ops.attention(torch.cat((torch.zeros_like(k).repeat(1, 2, 1, 1)[:, :, :4], q), 2), k, v)[:, :, 4:]

    close(run(mk.ops.attention, q[:, :, 4:], k, v), run(tail, q[:, :, 4:], k, v))


@pytest.mark.parametrize("causal", [True, False])
def test_keys_beyond_the_lengths_reach_no_result(causal: bool) -> None:
    q, k, v = qkv(3, 2, 1, 4, 4)
    lengths = torch.tensor([4, 0, 2])
    beyond = (torch.arange(4) >= lengths[:, None])[:, None, :, None]
    spoiled = [t.masked_fill(beyond, float("nan")) for t in (k, v)]
    clean = [t.masked_fill(beyond, 1.0) for t in (k, v)]
    options = {"causal": causal, "lengths": lengths}
    close(run(mk.ops.attention, q, *spoiled, **options), run(mk.ops.attention, q, *clean, **options))
    close(run(mk.ops.attention, q, *spoiled, **options)[:4], run(SPECS["attention"].plain, q, *clean, **options)[:4])
    by_mask = run(mk.ops.attention, q, *spoiled, causal=causal, mask=~beyond[:, 0, :, 0])
    close(by_mask, run(mk.ops.attention, q, *clean, **options))


def test_lengths_and_mask_can_be_combined() -> None:
    q, k, v = qkv(2, 2, 1, 3, 5)
    mask = torch.tensor([[False, True, True, True, True], [True, False, True, True, False]])
    both = run(mk.ops.attention, q, k, v, mask=mask, lengths=torch.tensor([3, 4]), padding="left")
    seen = torch.tensor([[False, False, True, True, True], [False, False, True, True, False]])
    close(both, run(mk.ops.attention, q, k, v, mask=seen))


def test_the_widest_window_hides_nothing_and_the_narrowest_all_but_one_key() -> None:
    q, k, v = qkv(2, 2, 1, 3, 5)
    close(run(mk.ops.attention, q, k, v, window=5), run(mk.ops.attention, q, k, v))
    (y, *_) = run(mk.ops.attention, q, k, v, window=1)
    close([y], [v[:, :, 2:].expand(-1, 2, -1, -1)])


def test_a_tangent_beyond_the_lengths_reaches_no_result() -> None:
    q, k, v = qkv(2, 2, 1, 3, 4)
    lengths = torch.tensor([3, 1])
    beyond = (torch.arange(4) >= lengths[:, None])[:, None, :, None]

    def tangents(fill: float) -> tuple[Tensor, ...]:
        t = tuple(x.masked_fill(beyond, fill) for x in (k.sin(), v.sin()))

        def loss(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return (mk.ops.attention(q, k, v, causal=False, lengths=lengths) ** 2).sum()

        return jvp(grad(loss, (0, 1, 2)), (q, k, v), (q.sin(), *t))[1]

    assert all(torch.equal(a, b) for a, b in zip(tangents(float("nan")), tangents(0.0), strict=True))


def test_queries_that_see_no_key_give_zeros_at_every_order() -> None:
    q, k, v = qkv(2, 2, 2, 5, 3)
    y, ct_q, _, _, x_q, *_ = run(mk.ops.attention, q, k, v)
    for t in (y, ct_q, x_q):
        assert torch.equal(t[:, :, :2], torch.zeros(2, 2, 2, 3).double())
        assert (t[:, :, 2:] != 0).any()
    empty = run(mk.ops.attention, q, k, v, causal=False, lengths=torch.tensor([0, 0]))
    assert all(torch.equal(t, torch.zeros_like(t)) for t in empty)


def test_lengths_equal_shorter_keys_and_values() -> None:
    q, k, v = qkv(2, 2, 1, 3, 5)
    y = mk.ops.attention(q, k, v, causal=False, lengths=torch.tensor([2, 5], dtype=torch.int32))
    close([y[:1]], [mk.ops.attention(q[:1], k[:1, :, :2], v[:1, :, :2], causal=False)])
    close([y[1:]], [mk.ops.attention(q[1:], k[1:], v[1:], causal=False)])


def test_lengths_of_each_task_under_vmap() -> None:
    q, k, v = (t.unflatten(0, (2, 2)) for t in qkv(4, 2, 1, 3, 5))
    lengths = torch.tensor([[2, 5], [0, 4]])

    def attend(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> Tensor:
        return mk.ops.attention(q, k, v, causal=False, lengths=lengths)

    mapped = vmap(attend)(q, k, v, lengths)
    close([mapped.flatten(0, 1)], [attend(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), lengths.flatten())])
    with pytest.raises(ValueError, match=r"^attention: lengths must be between 0 and L_k = 5"):
        vmap(attend)(q, k, v, lengths + 1)


@pytest.mark.skipif(mk.backends()["cpu"] != "available", reason="the reference backend holds L x L matrices")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_no_matrix_of_all_queries_and_keys_is_held(dtype: torch.dtype) -> None:
    L = 200
    q, k, v = (t.to(dtype) for t in qkv(1, 1, 1, L, L, D=2))
    for options in ({}, {"window": 70}, {"lengths": torch.tensor([150]), "padding": "left"}):
        with Largest() as largest:
            run(mk.ops.attention, q, k, v, **options)
        assert L * 2 <= largest.elements < L * L / 8
        with mk.backend("reference"), Largest() as largest:
            run(mk.ops.attention, q, k, v, **options)
        assert largest.elements >= L * L


@pytest.mark.parametrize("factor", [1e3, 1e150])
def test_large_scores_do_not_overflow(factor: float) -> None:
    q, k, v = qkv(2, 2, 1, 4, 4)
    assert all(torch.isfinite(t).all() for t in run(mk.ops.attention, factor * q, k, v))


def test_errors_name_the_argument() -> None:
    q, k, v = qkv(2, 4, 2, 3, 5)

    def refuses(error: type[Exception], message: str, *args: Any, **kwargs: Any) -> None:
        with pytest.raises(error, match="^attention: " + message):
            mk.ops.attention(*args, **kwargs)

    lengths = torch.tensor([5, 1])
    refuses(TypeError, "k must be a tensor, got list", q, [1.0], v)
    refuses(ValueError, r"q must have 4 dimensions, \[B, H, L, D\], got \[4, 3, 3\]", q[0], k, v)
    refuses(TypeError, "v must have the dtype torch.float64 .*, got torch.float32", q, k, v.float())
    refuses(ValueError, r"k must have shape .* = \[2, 2, 5, 3\], got \[2, 2, 5, 2\]", q, k[..., :2], v)
    refuses(ValueError, r"v must have shape .* = \[2, 2, 5, 3\], got \[2, 2, 4, 3\]", q, k, v[:, :, :4])
    refuses(ValueError, "q must have a multiple of the 2 heads of k and v, got 3 heads", q[:, :3], k, v)
    refuses(ValueError, r"lengths must have shape \[B\] = \[2\], got \[1\]", q, k, v, lengths=lengths[:1])
    refuses(TypeError, "lengths must be int64 or int32, got torch.float32", q, k, v, lengths=lengths.float())
    refuses(ValueError, r"lengths must be between 0 and L_k = 5, got \[6, 2\]", q, k, v, lengths=lengths + 1)
    refuses(ValueError, r"lengths must be between 0 and L_k = 5, got \[-1, 1\]", q, k, v, lengths=torch.tensor([-1, 1]))
    refuses(TypeError, "scale must be a number or None, got Tensor", q, k, v, scale=torch.ones(()))
    mask = torch.ones(2, 5, dtype=torch.bool)
    refuses(TypeError, "mask must be torch.bool, got torch.int64", q, k, v, mask=mask.long())
    refuses(ValueError, r"mask must have shape \[B, L_k\] = \[2, 5\], got \[2, 3\]", q, k, v, mask=mask[:, :3])
    refuses(ValueError, "padding must be left or right, got 'both'", q, k, v, lengths=lengths, padding="both")
    refuses(ValueError, "window must be a positive integer with causal=True, got 0", q, k, v, window=0)
    refuses(ValueError, "window must be .*, got 2 with causal=False", q, k, v, window=2, causal=False)
