"""The C++ kernels: all instruction sets, numbers of threads, extreme values, wrong calls, and forks."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import metakern as mk
from metakern import native
from metakern.ops import SPECS
from metakern.ops.core.spec import Make

pytestmark = pytest.mark.skipif(native.C is None, reason="metakern was built without C++ kernels")

Inputs = tuple[Tensor | None, ...]


@pytest.fixture
def threads() -> Iterator[None]:
    """Restore the number of threads after the test."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


# A size for each letter of the signatures. SMALL has odd sizes; BIG is large enough for several threads and blocks.
SMALL = {"1": 1, "*": 1003, "T": 2, "N": 5, "V": 37, "B": 2, "H": 2, "L": 3, "D": 38, "G": 1, "M": 4}
SMALL |= {"S": 6, "Q": 7, "C": 3}
BIG = {"1": 1, "*": 50_000, "T": 3, "N": 700, "D": 62, "V": 150, "B": 2, "H": 5, "L": 600, "S": 90, "Q": 110, "C": 4}
# Sizes of recurrent kernels, with fewer tasks than threads and with as many.
STEPS = [
    {"T": 1, "B": 9, "L": 3, "H": 37},
    {"T": 3, "B": 5, "L": 4, "H": 33},
    {"T": 2, "B": 1, "L": 5, "H": 70},
    {"T": 1, "B": 2, "L": 1, "H": 90},
]
# Sizes of attention kernels: several blocks of queries and of keys, and heads that share one of k and v.
BLOCKS = [{"B": 2, "H": 4, "G": 2, "L": 70, "M": 170, "D": 33}]
RECURRENT = ("lstm", "gru", "rnn")


def arguments(kernel: str, sizes: dict[str, int], dtype: torch.dtype = torch.float64, seed: int = 0) -> Inputs:
    """Return random inputs of a kernel: recurrences stay bounded, and lengths are random."""
    make = Make(dtype, seed=seed)

    def draw(a: native._Argument) -> Tensor:
        shape = [times * sizes[size] for times, size in a.dims] or [sizes["*"]]
        if a.name == "mask":
            return make.integers(2, *shape)
        if a.name == "labels":
            return make.integers(max(sizes["C"], 1), *shape)
        if a.indices:
            return make.integers(sizes["L"] + 1 if a.name == "lengths" else max(sizes["V"], 1), *shape)
        x = make(*shape)
        return x / (1 + shape[-1]) if a.name == "w_hh" else x.sigmoid() if a.name == "gates" else x

    return tuple(draw(a) for a in native.signatures()[kernel].inputs)


def scalars(kernel: str, reverse: bool = False) -> tuple[float, ...]:
    """Return the scalars of a call; `reverse` chooses other ones."""
    if kernel.startswith(RECURRENT):
        return () if kernel.endswith("cotangents") else (float(reverse),)
    if kernel.startswith("attention"):
        return 0.1, 1.0, 0.0 if reverse else 90.0
    return (1.0,) if kernel.startswith(("layer_norm", "rms_norm", "cross_entropy", "metalstm")) else ()


KERNELS = sorted(native.signatures()) if native.C else []


def test_every_form_of_a_signature_is_read() -> None:
    lstm, norm, gelu = (native.signatures()[name] for name in ("lstm_forward", "layer_norm_vjp", "gelu_tanh_forward"))
    T, B, L, H, D = ((1, size) for size in "TBLHD")
    assert lstm.names == ["u", "w_hh", "h", "c", "lengths", "y", "h_n", "c_n", "gates", "h_before", "c_before"]
    assert lstm.inputs[0] == ("u", [T, B, L, (4, "H")], False, False, "", "")
    assert lstm.inputs[1] == ("w_hh", [T, (4, "H"), H], False, False, "", "")
    assert lstm.inputs[2] == ("h", [T, B, H], False, True, "", "")
    assert lstm.inputs[4] == ("lengths", [T, B], True, True, "", "")
    assert lstm.outputs[3] == ("gates", [T, B, L, (4, "H")], False, False, "", "u")
    assert norm.outputs[2] == ("ct_bias", [T, D], False, True, "bias", "")
    update = native.signatures()["metalstm_update_forward"]
    assert update.inputs[-1] == ("w_own", [T, (6, "1")], False, False, "", "")
    assert gelu.inputs[0] == ("x", [], False, False, "", "")
    assert [signature.number for signature in native.signatures().values()] == list(range(len(KERNELS)))


def problems(kernel: str) -> list[dict[str, int]]:
    """Return the sizes at which a kernel runs with several threads or blocks."""
    return STEPS if kernel.startswith(RECURRENT) else BLOCKS if kernel.startswith("attention") else [BIG]


def test_every_kernel_is_called_by_its_op(monkeypatch: pytest.MonkeyPatch) -> None:
    called = set()
    call = native.call

    def record(kernel: str, *inputs: Tensor | None, **options: Any) -> Inputs:
        called.add(kernel)
        return call(kernel, *inputs, **options)

    monkeypatch.setattr(native, "call", record)
    for spec in SPECS.values():
        for sample in spec.samples(Make()):
            x = [
                a.requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() and i not in sample.frozen else a
                for i, a in enumerate(sample.args)
            ]
            with mk.backend("cpu"):
                y = torch.utils._pytree.tree_leaves(spec.call(*x, **sample.kwargs))
                leaves = [a for a in x if isinstance(a, Tensor) and a.requires_grad]
                ones = [torch.ones_like(a).requires_grad_() for a in y]
                first = torch.autograd.grad(y, leaves, ones, create_graph=True, allow_unused=True)
                sum(g.sum() for g in first if g is not None and g.requires_grad).backward()
    assert called == set(KERNELS)


@pytest.mark.parametrize("kernel", KERNELS)
def test_instruction_sets_agree(kernel: str, isa: str) -> None:
    for sizes in (SMALL, *(problems(kernel) if kernel.startswith((*RECURRENT, "attention")) else [])):
        for dtype, tolerance in ((torch.float64, 1e-13), (torch.float32, 2e-5)):
            inputs = arguments(kernel, sizes, dtype)
            wide = [a.to(torch.float64, copy=True) if a.is_floating_point() else a for a in inputs]
            ours = native.call(kernel, *inputs, scalars=scalars(kernel, reverse=True))
            native.C.set_isa(native.C.isas()[-1])
            for a, b in zip(ours, native.call(kernel, *wide, scalars=scalars(kernel, reverse=True)), strict=True):
                size = b.abs().amax().clamp(min=1).item()
                torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance * size)
            native.C.set_isa(isa)


@pytest.mark.parametrize("kernel", KERNELS)
def test_results_are_bit_identical_for_any_number_of_threads(kernel: str, threads: None, isa: str) -> None:
    for sizes in problems(kernel):
        results = []
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            inputs = arguments(kernel, sizes, torch.float32)
            results.append(native.call(kernel, *inputs, scalars=scalars(kernel)))
        for result in results[1:]:
            for a, b in zip(result, results[0], strict=True):
                assert torch.equal(a, b)


@pytest.mark.parametrize("kernel", [k for k in KERNELS if native.signatures()[k].inputs[0].dims])
def test_the_first_task_does_not_depend_on_the_others(kernel: str) -> None:
    for sizes in problems(kernel):
        alone = native.call(
            kernel, *(a[:1].clone() for a in arguments(kernel, sizes, torch.float32)), scalars=scalars(kernel)
        )
        together = native.call(kernel, *arguments(kernel, sizes, torch.float32), scalars=scalars(kernel))
        for a, b in zip(alone, together, strict=True):
            assert torch.equal(a, b[:1])


@pytest.mark.parametrize("kernel", [k for k in KERNELS if k.startswith(RECURRENT)])
def test_sequences_do_not_depend_on_each_other(kernel: str, isa: str) -> None:
    """Results of a sequence are bit-identical in any batch, whatever row of a tile or thread it is in."""
    sizes = {"T": 1, "B": 61, "L": 5, "H": 70}  # several blocks of steps, in rules that have such blocks
    signature = native.signatures()[kernel]
    inputs = arguments(kernel, sizes, torch.float32)
    batched = [len(a.dims) > 1 and a.dims[1] == (1, "B") for a in signature.inputs]
    one_by_one = [
        native.call(
            kernel,
            *(a[:, b : b + 1].clone() if of_batch else a for a, of_batch in zip(inputs, batched, strict=True)),
            scalars=scalars(kernel),
        )
        for b in range(sizes["B"])
    ]
    together = native.call(kernel, *inputs, scalars=scalars(kernel))
    for a, b in zip(zip(*one_by_one, strict=True), together, strict=True):
        assert torch.equal(torch.cat(a, 1), b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_activations_at_extreme_values(dtype: torch.dtype, isa: str) -> None:
    x = torch.cat([torch.linspace(-40, 40, 4001, dtype=torch.float64), torch.tensor([0.0, -0.0, 1e-30, 1e30, -1e30])])
    x = x.to(dtype).double()
    s, zero = torch.sigmoid(x), torch.zeros_like(x)
    phi = torch.exp(-x * x / 2) / (2 * torch.pi) ** 0.5
    exact = {
        "gelu": (torch.special.ndtr(x) + x * phi, torch.where(phi == 0, zero, phi * (2 - x * x))),
        "silu": (s + x * s * torch.sigmoid(-x), s * torch.sigmoid(-x) * (2 + x * (1 - 2 * s))),
    }
    one, none = torch.ones_like(x, dtype=dtype), torch.zeros_like(x, dtype=dtype)
    for op, (first, second) in exact.items():
        (slope,) = native.call(f"{op}_vjp_jvp", x.to(dtype), none, one, one)
        (bend,) = native.call(f"{op}_vjp_jvp", x.to(dtype), one, one, None)
        bound = 8 * torch.finfo(dtype).eps
        torch.testing.assert_close(slope.double(), first, rtol=bound, atol=bound)
        torch.testing.assert_close(bend.double(), second.nan_to_num(), rtol=bound, atol=4 * bound)
    (y,) = native.call("gelu_tanh_forward", x.to(dtype))
    torch.testing.assert_close(y.double()[x.abs() > 20], x.clamp(min=0)[x.abs() > 20], rtol=0, atol=1e-40)
    nan = torch.full((5,), torch.nan, dtype=dtype)
    for kernel in ("gelu_vjp_jvp", "silu_vjp_jvp", "gelu_tanh_vjp_jvp"):
        assert native.call(kernel, nan, one[:5], one[:5], None)[0].isnan().all()


def test_cross_entropy_of_infinite_logits(isa: str) -> None:
    logits = torch.tensor([[[-torch.inf, 0.0, 1.0]], [[1e30, -1e30, 0.0]], [[-torch.inf] * 3]], dtype=torch.float64)
    y, lse = native.call("cross_entropy_forward", logits, torch.tensor([[2], [0], [0]]), scalars=(-100,))
    expected = torch.nn.functional.cross_entropy(logits[:2, 0], torch.tensor([2, 0]), reduction="none")
    torch.testing.assert_close(y[:2], expected)
    assert y[2].isnan()
    assert lse[1] == 1e30


def test_targets_out_of_range_are_not_used_as_addresses(isa: str) -> None:
    """The public op refuses them; the kernel itself must not crash."""
    logits, target = torch.randn(1, 3, 5), torch.tensor([[2, -(2**62), 2**62]])
    y, lse = native.call("cross_entropy_forward", logits, target, scalars=(-100,))
    torch.testing.assert_close(y, (lse[:, 0] - logits[:, 0, 2]))
    (ct,) = native.call("cross_entropy_vjp", logits, target, lse, torch.ones(1), scalars=(-100,))
    assert not ct[0, 1:].any()


def dimensions(kernel: str) -> list[str]:
    return sorted({size for a in native.signatures()[kernel].inputs for _, size in a.dims if size != "1"})


@pytest.mark.parametrize(("kernel", "empty"), [(kernel, d) for kernel in KERNELS for d in dimensions(kernel)])
def test_empty_sizes(kernel: str, empty: str) -> None:
    for a in native.call(kernel, *arguments(kernel, SMALL | {empty: 0}), scalars=scalars(kernel)):
        assert a is not None
        if empty == "N":
            assert not a.any()  # sums over no rows are zero


def test_wrong_calls_of_kernels_raise() -> None:
    x = torch.randn(2, 3, 4)
    with pytest.raises(ValueError, match=r"gelu_tanh_vjp: ct_y must have shape \[2, 3, 4\], got \[3, 4\]"):
        native.call("gelu_tanh_vjp", x, x[0])
    with pytest.raises(TypeError, match=r"gelu_tanh_vjp: ct_y must be torch[.]float32 like the other tensors, got"):
        native.call("gelu_tanh_vjp", x, x.double())
    with pytest.raises(TypeError, match="gelu_tanh_vjp: ct_y must be a tensor, got None"):
        native.call("gelu_tanh_vjp", x, None)
    with pytest.raises(TypeError, match=r"gelu_tanh_vjp: x must be float32 or float64, got torch[.]bfloat16"):
        native.call("gelu_tanh_vjp", x.bfloat16(), x.bfloat16())
    with pytest.raises(TypeError, match="gelu_tanh_vjp: inputs must number 2, got 1"):
        native.call("gelu_tanh_vjp", x)
    with pytest.raises(ValueError, match=r"rms_norm_forward: weight must have shape TD with .*, got \[2, 3\]"):
        native.call("rms_norm_forward", x, x[..., 0], scalars=(0.1,))
    with pytest.raises(
        ValueError, match=r"rnn_tanh_forward: w_hh must have shape THH with .*'H': 4.*, got \[2, 4, 3\]"
    ):
        native.call("rnn_tanh_forward", x[:, None], x.mT[:, :, :3], None, None, scalars=(0.0,))
    with pytest.raises(ValueError, match=r"gru_forward: u must have shape TBL3H with .*'H': 1.*, got \[2, 1, 3, 4\]"):
        native.call("gru_forward", x[:, None], *[None] * 4, scalars=(0.0,))
    with pytest.raises(ValueError, match=r"gru_forward: w_hh must have shape T3HH with .*'H': 2.*, got \[2, 5, 2\]"):
        native.call("gru_forward", torch.zeros(2, 1, 3, 6), torch.zeros(2, 5, 2), *[None] * 3, scalars=(0.0,))
    with pytest.raises(ValueError, match="gelu_tanh_vjp: ct_y must be on the CPU, got meta"):
        native.call("gelu_tanh_vjp", x, x.to("meta"))
    call = native.C.call
    number = native.signatures()["gelu_tanh_vjp"].number
    with pytest.raises(IndexError):
        call(1_000_000, False, [], [], [], 1, False)
    for tensors, sizes, values in (([1], [1], []), ([1] * 3, [], []), ([1] * 3, [1], [0.5]), ([1, 0, 1], [1], [])):
        with pytest.raises(ValueError, match="gelu_tanh_vjp: "):
            call(number, False, tensors, sizes, values, 1, False)
    with pytest.raises(ValueError, match="sizes must not be negative"):
        call(number, False, [1] * 3, [-1], [], 1, False)
    with pytest.raises(ValueError, match="isa must be one of this machine's, got 'abacus'"):
        native.C.set_isa("abacus")


def test_kernels_take_strided_tensors_zero_tensors_and_negated_views() -> None:
    x, ct = torch.randn(6, 4, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    (expected,) = native.call("gelu_tanh_vjp", x, ct.t().contiguous())
    assert torch.equal(native.call("gelu_tanh_vjp", x, ct.t())[0], expected)
    assert not native.call("gelu_tanh_vjp", x, torch._efficientzerotensor(6, 4, dtype=torch.float64))[0].any()
    negated = torch.view_as_complex(torch.randn(1, 2, dtype=torch.float64)).conj().imag
    assert negated.is_neg()
    (expected,) = native.call("gelu_tanh_vjp", negated + 0, negated + 0)
    assert torch.equal(native.call("gelu_tanh_vjp", negated, negated)[0], expected)


def integers(dtype: torch.dtype, *shape: int, seed: int = 0) -> Tensor:
    """Return small integers, whose products and sums are exact, within a frame of NaN that must not be read."""
    frame = torch.full([2 + size for size in shape], torch.nan, dtype=dtype)
    inner = frame[tuple(slice(1, 1 + size) for size in shape)]
    return inner.copy_(torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(seed)))


def summand(kind: str, dtype: torch.dtype, T: int, M: int, N: int) -> Tensor | None:
    if kind == "none":
        return None
    shape = {"full": (T, M, N), "one_row": (N,), "row_of_each_task": (T, 1, N), "columns": (N, M), "number": ()}[kind]
    add = integers(dtype, *shape, seed=3)
    return add.mT if kind == "columns" else add


ROWS = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 25]  # around the rows of a tile: 5, 6 or 12
COLUMNS = [
    0,
    1,
    3,
    4,
    5,
    7,
    8,
    9,
    15,
    16,
    17,
    31,
    32,
    33,
    63,
    65,
    130,
]  # around the columns of a tile: one or two vectors of 2 to 16 numbers
DEPTHS = [0, 1, 2, 7, 8, 16, 17, 255, 256, 257, 513]  # around the number of products that are summed at a time: 256
SUMMANDS = ["none", "full", "one_row", "row_of_each_task", "columns", "number"]


def check_product(
    dtype: torch.dtype, T: int, M: int, N: int, K: int, layout: int = 0, shared: int = 0, add: str = "none"
) -> None:
    a, b = (
        integers(dtype, *((T, K, M) if layout & 1 else (T, M, K)), seed=1),
        integers(dtype, *((T, N, K) if layout & 2 else (T, K, N)), seed=2),
    )
    a, b = a.mT if layout & 1 else a, b.mT if layout & 2 else b
    a, b = a[:1].expand_as(a) if shared & 1 else a, b[:1].expand_as(b) if shared & 2 else b
    extra = summand(add, dtype, T, M, N)
    before = None if extra is None else extra.clone()
    scale = (1.0, -2.0, 0.5)[(M + N + K) % 3]
    expected = scale * (a.double() @ b.double()) + (0 if extra is None else extra.double())
    found = native.product(a, b, extra, scale=scale).double()
    assert torch.equal(found, expected), (T, M, N, K, layout, shared, add)
    assert extra is None or torch.equal(extra, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_of_every_size_around_the_tiles(dtype: torch.dtype, isa: str) -> None:
    for number, (M, N, K) in enumerate(product(ROWS, COLUMNS, DEPTHS)):
        check_product(dtype, 1, M, N, K, layout=number % 4, add=SUMMANDS[number % 5])
    for number, (M, N) in enumerate(product((1030, 2500), (1, 9, 260))):
        check_product(dtype, 1, M, N, 3, layout=number % 4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_of_every_layout(dtype: torch.dtype, isa: str) -> None:
    for T, (M, N, K), layout, shared, add in product(
        (0, 1, 3), ((0, 5, 3), (5, 0, 3), (5, 9, 0), (1, 1, 1), (14, 37, 20)), range(4), range(4), SUMMANDS
    ):
        check_product(dtype, T, M, N, K, layout, shared, add)


def test_products_are_bit_identical_however_they_are_split(threads: None, isa: str) -> None:
    scale = 0.7  # where it is a power of two, its product with a sum is exact
    for T, M, N, K in ((1, 700, 70, 60), (3, 301, 33, 300), (2, 5, 700, 513), (9, 40, 40, 40), (1, 30, 7, 5)):
        make = Make(torch.float32)
        a, b, add = make(T, M, K), make(T, K, N), make(T, M, N)
        torch.set_num_threads(1)
        expected = native.product(a, b, add, scale=scale)
        for count in (2, 3, 7):
            torch.set_num_threads(count)
            assert torch.equal(native.product(a, b, add, scale=scale), expected)
        for end in {1, 3, M // 2, M - 1}:
            halves = slice(end), slice(end, None)
            parts = [native.product(a[:, rows], b, add[:, rows], scale=scale) for rows in halves]
            assert torch.equal(torch.cat(parts, 1), expected)
        for t in range(T):
            one = native.product(a[t : t + 1], b[t : t + 1], add[t : t + 1], scale=scale)
            assert torch.equal(one, expected[t : t + 1])


def test_a_product_can_reuse_the_memory_of_its_summand(isa: str) -> None:
    for T, M, N, K in ((1, 1, 1, 0), (2, 5, 33, 257), (1, 700, 70, 600)):
        make = Make(torch.float32)
        a, b, add = make(T, M, K), make(T, K, N), make(T, M, N)
        expected = native.product(a, b, add)
        if M > 1:
            row = make(N)
            before = row.clone()
            native.product(a, b, row, reuse=True)
            assert torch.equal(row, before), "a summand of one row for all must not be written"
        found = native.product(a, b, add, reuse=True)
        assert found.data_ptr() == add.data_ptr()
        assert torch.equal(found, expected)


def test_products_of_zero_tensors_and_negated_views() -> None:
    a, b = torch.randn(2, 3, 4, dtype=torch.float64), torch.randn(2, 4, 5, dtype=torch.float64)
    nothing = torch._efficientzerotensor(2, 4, 5, dtype=torch.float64)
    assert not native.product(a, nothing).any()
    add = torch._efficientzerotensor(2, 3, 5, dtype=torch.float64)
    assert torch.equal(native.product(a, b, add), native.product(a, b))
    negated = torch.view_as_complex(torch.randn(2, 4, 5, 2, dtype=torch.float64)).conj().imag
    assert negated.is_neg()
    assert torch.equal(native.product(a, negated, negated[:, :3]), native.product(a, negated + 0, negated[:, :3] + 0))


def test_wrong_products_raise() -> None:
    a, b = torch.randn(2, 3, 4), torch.randn(2, 4, 5)
    with pytest.raises(
        ValueError, match=r"product: b must be \[2, 4, 5\] of torch.float32, got \[2, 3, 5\] of torch.float32"
    ):
        native.product(a, b[:, :3])
    with pytest.raises(ValueError, match=r"product: b must be .* got \[1, 4, 5\] of"):
        native.product(a, b[:1])
    with pytest.raises(ValueError, match=r"product: b must be \[2, 4, 5\] of torch.float32, got .* of torch.float64"):
        native.product(a, b.double())
    with pytest.raises(ValueError, match=r"product: b must be \[2, 4, 5\] of torch.bfloat16, got"):
        native.product(a.bfloat16(), b.bfloat16())
    with pytest.raises(ValueError, match="product: b must be on cpu like a, got meta"):
        native.product(a, b.to("meta"))
    with pytest.raises(ValueError, match=r"product: add must be torch.float32 on cpu, got torch.float64 on cpu"):
        native.product(a, b, torch.zeros(5, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="must match the existing size"):
        native.product(a, b, torch.zeros(4))


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted in /proc")
@pytest.mark.parametrize(
    ("call", "is_large"),
    [
        ("native.product(ones(1, 8, 8), ones(1, 8, 8))", False),
        ("native.product(ones(1, 300, 64), ones(1, 64, 70))", True),
        ("native.product(ones(4, 30, 64), ones(4, 64, 70))", True),
        ("native.call('lstm_forward', ones(2, 2, 3, 32), ones(2, 32, 8), *[None] * 3, scalars=(0.0,))", False),
        ("native.call('lstm_forward', ones(2, 2, 3, 256), ones(2, 256, 64), *[None] * 3, scalars=(0.0,))", True),
        ("native.call('lstm_forward', ones(1, 8, 3, 256), ones(1, 256, 64), *[None] * 3, scalars=(0.0,))", True),
    ],
)
def test_threads_are_used_for_large_problems_alone(call: str, is_large: bool) -> None:
    script = f"""
import os, torch
from torch import ones
from metakern import native
torch.set_num_threads(3)
before = len(os.listdir("/proc/self/task"))
{call}
assert (len(os.listdir("/proc/self/task")) > before) == {is_large}
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_python_threads_share_the_pool_of_threads(threads: None) -> None:
    torch.set_num_threads(2)
    problems = [arguments("layer_norm_vjp", BIG, torch.float32, seed) for seed in range(8)]

    def solve(inputs: Inputs) -> Inputs:
        return native.call("layer_norm_vjp", *inputs, scalars=(1.0,))

    expected = [solve(inputs) for inputs in problems]
    with ThreadPoolExecutor(4) as pool:
        for ours, right in zip(pool.map(solve, problems * 5), expected * 5, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, right, strict=True))


def test_a_forked_child_has_its_own_pool_of_threads() -> None:
    script = """
import os, torch
from metakern import native
torch.set_num_threads(2)
x = torch.randn(300_000)
before = native.call("gelu_tanh_vjp", x, x)[0]
child = os.fork()
if child == 0:  # PyTorch's own threads do not survive a fork, so that comparing must not use them
    after = native.call("gelu_tanh_vjp", x, x)[0]
    os._exit(0 if after.numpy().tobytes() == before.numpy().tobytes() else 1)
assert os.waitpid(child, 0)[1] == 0
assert torch.equal(native.call("gelu_tanh_vjp", x, x)[0], before)
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


@pytest.mark.parametrize("op", SPECS)
@pytest.mark.parametrize("wrong", [None, "x", [1.0]], ids=str)
def test_something_else_in_place_of_a_tensor_is_an_error_of_the_op(op: str, wrong: Any) -> None:
    def message(*args: Any) -> str:
        try:  # None or a list is right for some arguments
            SPECS[op].call(*args, **sample.kwargs)
        except (TypeError, ValueError) as error:
            return str(error)
        return f"{op}: "

    sample = SPECS[op].samples(Make())[0]
    for i in range(len(sample.args)):
        assert message(*sample.args[:i], wrong, *sample.args[i + 1 :]).startswith(f"{op}: ")


def without_memory(x: Tensor) -> Tensor:
    x.untyped_storage().resize_(0)
    return x


@pytest.mark.parametrize("backend", [name for name in ("cpu", "reference") if mk.backends()[name] == "available"])
@pytest.mark.parametrize("op", SPECS)
def test_ops_refuse_tensors_whose_memory_is_gone(op: str, backend: str) -> None:
    """Each argument in turn: a kernel would read a null pointer, in PyTorch's own operations too."""
    spec = SPECS[op]
    for sample in spec.samples(Make()):
        for i, a in enumerate(sample.args):
            if isinstance(a, Tensor) and a.numel():
                args = [*sample.args[:i], without_memory(a.clone()), *sample.args[i + 1 :]]
                with mk.backend(backend), pytest.raises(ValueError, match=r"^\w+: .* of its elements in its storage"):
                    spec.call(*args, **sample.kwargs)
                with pytest.raises(ValueError, match="its memory was freed"), torch.autocast("cpu"):
                    spec.call(*args, **sample.kwargs)


@pytest.mark.parametrize("op", ["layer_norm", "silu", "linear", "lstm", "sgd_update"])
def test_derivatives_refuse_tensors_freed_after_the_forward(op: str) -> None:
    spec = SPECS[op]
    sample = next(iter(spec.samples(Make())))
    leaves = [a.clone().requires_grad_() if a.is_floating_point() else a for a in sample.args]
    for backend in ("cpu", "reference"):
        with mk.backend(backend):
            inputs = [a.clone() if a.is_floating_point() else a for a in leaves]
            y = torch.utils._pytree.tree_leaves(spec.call(*inputs, **sample.kwargs))[0]
            for a in inputs:
                without_memory(a.detach())
            with pytest.raises((ValueError, RuntimeError), match=r"memory was freed|out of bounds for storage"):
                y.sum().backward()


def test_kernels_refuse_tensors_without_readable_memory() -> None:
    """Short storages, sparse, nested and fake tensors raise an error that names the argument."""
    x = torch.randn(2, 3)
    short, gaps, gone = torch.randn(100)[10:16].view(2, 3), torch.randn(4, 6)[::2, ::2], torch.randn(3, 3)[1:]
    for bad, left, needed in ((short, 60, 64), (gaps, 64, 68), (gone, 0, 36)):
        bad.untyped_storage().resize_(left)
        message = f"ct_y must have the {needed} bytes of its elements in its storage, got {left} bytes: its memory was"
        with pytest.raises(ValueError, match=f"gelu_tanh_vjp: {message}"):
            native.call("gelu_tanh_vjp", x, bad)
    rows = torch.randn(4, 6)
    rows.untyped_storage().resize_(80)
    assert native.call("gelu_tanh_vjp", x, rows[:2, ::2])[0].shape == (2, 3), (
        "the part of a storage that is left can be read"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nested = torch.nested.nested_tensor([x, x])
    for bad, message in (
        (x.to_sparse(), "must be a dense tensor, got one of layout torch.sparse_coo"),
        (nested, "must be a dense tensor, got a nested one"),
        (x.tolist(), "must be a tensor, got list"),
    ):
        with pytest.raises(TypeError, match=f"gelu_tanh_vjp: x {message}"):
            native.call("gelu_tanh_vjp", bad, bad)
        with pytest.raises(TypeError, match=f"gelu: x {message}"):
            mk.ops.gelu(bad)
        with pytest.raises(TypeError, match=f"product: a {message}"):
            native.product(bad, x)
    with FakeTensorMode() as mode:
        fake = mode.from_tensor(torch.randn(4, 3))
        for tensor in (fake, fake[2:]):  # the second one has an address
            with pytest.raises(
                ValueError, match=r"gelu_tanh_vjp: x must have memory that a kernel can read, got .* Fake"
            ):
                native.call("gelu_tanh_vjp", tensor, tensor)
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(ValueError, match="ct_x must have memory"):
        native.call("gelu_tanh_vjp", x, x)


def test_huge_sizes_beside_a_size_of_zero_are_refused() -> None:
    def empty(*shape: int) -> Tensor:
        return torch.empty(0).as_strided(shape, [1] * len(shape))

    with pytest.raises(
        ValueError, match=r"layer_norm_forward: sizes must multiply to at most 16777216 beside a size of 0"
    ):
        native.call("layer_norm_forward", empty(1, 2**62, 0), empty(1, 0), empty(1, 0), scalars=(1.0,))
    many = 2**40  # a loop over 2^40 steps of no units
    with pytest.raises(ValueError, match="rnn_tanh_forward: sizes must multiply"):
        native.call("rnn_tanh_forward", empty(1, 1, many, 0), empty(1, 0, 0), None, None, scalars=(0.0,))
    assert native.product(empty(2**40, 0, 2), torch.ones(1, 2, 3).expand(2**40, 2, 3)).shape == (2**40, 0, 3)
    with pytest.raises(ValueError, match=r"product: a and b must be \[T, M, K\] and \[T, K, N\], got \[3\] and"):
        native.product(torch.ones(3), torch.ones(3, 4))


@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_AS limits memory on Linux")
@pytest.mark.parametrize("forked", [False, True])
def test_running_out_of_memory_on_a_thread_raises_memory_error(forked: bool) -> None:
    """The exception on a thread of OpenMP, or of the pool in a forked child, must not end the process."""
    script = f"""
import os, resource, torch
from metakern import native
child = os.fork() if {forked} else 0
if child:
    raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
torch.set_num_threads(2)
def run(size):
    native.call("rnn_tanh_forward", torch.zeros(2, 1, 1, size), w[:, :size, :size], None, None, scalars=(0.0,))
w = torch.zeros(2, 4200, 4200)  # 67 MiB for each thread: more than what malloc has reserved for it
run(200)  # starts the threads before memory is limited
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (8 << 20), resource.RLIM_INFINITY))
try:
    run(4200)
except MemoryError:
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    run(4200)  # the threads must still work
    os._exit(7)
"""
    run = subprocess.run([sys.executable, "-c", script], check=False, timeout=120, capture_output=True, text=True)
    assert run.returncode == 7, run.stderr


@pytest.mark.parametrize(("seed", "rounds", "backends"), [(0, 700, ["auto", "reference"]), (1, 150, ["triton"])])
def test_no_call_ends_the_process(seed: int, rounds: int, backends: list[str]) -> None:
    for name in backends:
        if mk.backends().get(name, "available") != "available":
            pytest.skip(mk.backends()[name])
    script = str(Path(__file__).parent / "fuzz_ops.py")
    command = [sys.executable, "-X", "faulthandler", script, str(seed), str(rounds), *backends]
    environment = os.environ | {"PYTHONPATH": str(Path(mk.__file__).parent.parent)}
    fuzz = subprocess.run(command, check=False, timeout=300, capture_output=True, text=True, env=environment)
    assert fuzz.returncode == 0, fuzz.stderr[-4000:]
    calls, results = map(int, re.findall(r"\d+", fuzz.stdout))
    assert calls == rounds
    assert results > rounds / 10  # the others were refused with an error


OPS_AT_ONCE = """
import faulthandler, os, random, sys, threading, torch
from torch.utils._pytree import tree_leaves
from metakern.ops import SPECS
from metakern.ops.core.spec import Make

faulthandler.dump_traceback_later(120, exit=True)
cases = [(spec, sample) for spec in SPECS.values() for sample in spec.samples(Make(torch.float64))]

def derivatives(spec, sample):
    args = [a.clone() if isinstance(a, torch.Tensor) else a for a in sample.args]
    leaves = [a.requires_grad_() for i, a in enumerate(args)
              if isinstance(a, torch.Tensor) and a.is_floating_point() and i not in sample.frozen]
    y = tree_leaves(spec.call(*args, **sample.kwargs))
    ones = [torch.ones_like(t).requires_grad_() for t in y]
    first = torch.autograd.grad(y, leaves, ones, create_graph=True, allow_unused=True)
    total = sum(g.square().sum() for g in first if g is not None and g.requires_grad)
    second = torch.autograd.grad(total, leaves, allow_unused=True)
    return [t.detach() for t in (*y, *first, *second) if t is not None]

def differs(case):
    pairs = zip(derivatives(*cases[case]), right[case], strict=True)
    return not all(torch.allclose(a, b, rtol=1e-10, atol=1e-12, equal_nan=True) for a, b in pairs)

right = [derivatives(*case) for case in cases]
wrong = []

def work(seed):
    choose = random.Random(seed)
    for _ in range(60):
        torch.set_num_threads(choose.choice([1, 2, 3]))
        case = choose.randrange(len(cases))
        try:
            if differs(case):
                wrong.append(cases[case][0].op.name)
        except Exception as error:
            wrong.append(repr(error))
"""


def test_ops_on_several_python_threads() -> None:
    """Six Python threads run all ops with changing numbers of kernel threads: results stay right and nothing hangs."""
    script = f"""{OPS_AT_ONCE}
threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
assert not wrong, wrong
"""
    run = subprocess.run([sys.executable, "-c", script], check=False, timeout=180, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_ops_in_a_forked_child() -> None:
    """With one thread, as the threads of PyTorch's own operations do not survive a fork."""
    script = f"""{OPS_AT_ONCE}
torch.set_num_threads(2)
child = os.fork()
if child:
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
torch.set_num_threads(1)
failed = [cases[case][0].op.name for case in range(len(cases)) if differs(case)]
os._exit(3 if failed else 0)
"""
    run = subprocess.run([sys.executable, "-c", script], check=False, timeout=180, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]


@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16"])
def test_the_peak_rate_is_that_of_multiply_adds_that_are_done(dtype: str, isa: str) -> None:
    rates = []
    for threads in (1, 2):
        try:
            rates.append(max(native.C.peak(dtype, 1e7, threads) for _ in range(20)))
        except ValueError:
            if dtype != "bfloat16":
                raise
            pytest.skip("the processor has no dot products of bfloat16")
    lanes = {"avx512": 16, "avx2": 8}.get(isa, 4) * {"float32": 1, "float64": 0.5, "bfloat16": 2}[dtype]
    most = lanes * 4 * 8e9  # FLOP/s of a thread: two multiply-adds in each cycle, at 8 GHz
    for threads, rate in enumerate(rates, 1):
        assert 1e8 < rate < threads * most


def test_wrong_arguments_of_the_peak_rate_are_errors() -> None:
    with pytest.raises(ValueError, match="peak: dtype must have multiply-adds on this processor, got int8"):
        native.C.peak("int8", 1e6, 1)
    for flop in (0.0, -1.0, float("nan"), 1e30):
        with pytest.raises(ValueError, match="peak: flop must be between 0 and 1e18, got"):
            native.C.peak("float32", flop, 1)
