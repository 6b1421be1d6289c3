"""Executables compute what their programs do, for every instruction, layout and instruction set; some have none."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from models import KINDS, build, points, regression_loss, tokens
from torch import Tensor

import metakern as mk
from metakern import native
from metakern.meta import capture
from metakern.meta.capture import lowering
from metakern.meta.capture.executable import Executable
from metakern.meta.capture.recorder import record
from metakern.meta.capture.rewrite import rewritten
from metakern.ops.core import checks

pytestmark = [
    pytest.mark.skipif(native.obstacle() is not None, reason="executables are C++"),
    pytest.mark.usefixtures("isa"),
]
aten: Any = torch.ops.aten
Function = Callable[..., list[Tensor]]


def lowered(function: Function, *inputs: Tensor) -> Executable:
    """Record a function on `inputs`, rewrite the program and lower it."""
    program, _ = record(lambda: function(*inputs), inputs, rewritten)
    return lowering.Lowering(inputs).executable(program)


def check(function: Function, make: Callable[[], tuple[Tensor, ...]], tolerance: float = 1e-12) -> None:
    """Lower a function for some inputs; on three others the executable must give the function's results.

    It runs them one by one and all at once, with one thread and with three, and all ways must agree to the bit.
    """
    executable, several = lowered(function, *make()), [make() for _ in range(3)]
    truths = [function(*inputs) for inputs in several]
    for threads in (1, 3):
        alone = [executable([inputs], threads) for inputs in several]
        together = executable(several, threads)
        assert together is not None
        for truth, one, found in zip(truths, alone, together, strict=True):
            assert one is not None
            for expected, a, b in zip(truth, one[0], found, strict=True):
                assert a is not None
                torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
                torch.testing.assert_close(a, expected.contiguous(), rtol=tolerance, atol=tolerance, equal_nan=True)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.transpose(0, 2),
    "permuted": lambda x: x.permute(2, 0, 1),
    "sliced": lambda x: x[:, 1::2, 3:],
    "expanded": lambda x: x[:, :1].expand(-1, 4, -1),
    "a-scalar": lambda x: x[1, 1, 1],
    "a-row": lambda x: x[0, 0],
    "empty": lambda x: x[:, :0],
}
SHAPE = (3, 5, 37)

INSTRUCTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": lambda x, y: torch.add(x, y, alpha=-0.3) + 2,
    "add-broadcast": lambda x, y: x + y[..., :1] if y.dim() else x + y,
    "sub": lambda x, y: torch.sub(x, y, alpha=0.7) - 1.5,
    "number-first": lambda x, y: aten.mul.Tensor(0.5, x) - aten.sub.Tensor(1.5, y) + aten.div.Tensor(2.0, x + 9),
    "rsub": lambda x, y: 2 - x,
    "mul": lambda x, y: x * y * 0.3,
    "div": lambda x, y: x / (y + 9) / 3,
    "neg": lambda x, y: -x,
    "reciprocal": lambda x, y: (x + 9).reciprocal(),
    "square": lambda x, y: x**2 + y**1,
    "power": lambda x, y: (x + 9) ** -1.5,
    "integer-powers": lambda x, y: x**3 + y**4 + (x + 9) ** -1 + (y + 9) ** -2 + (x - 9) ** 5,
    "roots": lambda x, y: (x + 9).sqrt() + (y + 9).rsqrt(),
    "exp": lambda x, y: x.exp(),
    "circle": lambda x, y: x.sin() + (40 * y).cos(),
    "pad": lambda x, y: F.pad(x.reshape(-1, 1), (1, 2), value=-2.0) + F.pad(y.reshape(1, -1), (0, 3, 1, 0))[1, 0],
    "logarithms": lambda x, y: (x.abs() + 1).log() + y.abs().log1p() + x.expm1(),
    "curves": lambda x, y: x.erf() + (0.3 * y).tan().atan(),
    "signs": lambda x, y: x.abs() * y.sign() + (x * 0).sign() + 1 / (-(x * 0)).abs(),
    "extremes": lambda x, y: torch.maximum(x, y) - torch.minimum(x, 2 * y) + x.clamp(-0.5, 0.7) + y.clamp(max=0.1),
    "extremes-of-nan": lambda x, y: torch.maximum(x.sqrt(), y) + torch.minimum(y, x.sqrt()) + x.sqrt().clamp(0.1, 0.2),
    "comparisons": lambda x, y: (x > y).to(x.dtype) + 2 * (x <= y).to(x.dtype) + ((x == y) | (x != y)).to(x.dtype),
    "comparisons-of-integers": lambda x, y: ((9 * x).long() >= (9 * y).long()) & ((x > 0) < (y > 0)),
    "softmax": lambda x, y: x.softmax(-1) + 0.1 * y.log_softmax(0) + (40 * x).softmax(0),
    "losses": lambda x, y: F.mse_loss(x, y) + F.l1_loss(x, y) + F.smooth_l1_loss(x, y) + F.huber_loss(x, y, delta=0.4),
    "activations": lambda x, y: F.elu(x) + F.leaky_relu(y, 0.2) + F.softplus(x) + F.hardtanh(y) + F.softsign(x),
    "mixed-dtypes": lambda x, y: (x > 0) * y + (y > 0).long() * x,
    "relu": lambda x, y: x.relu() + y,
    "relu-of-nan": lambda x, y: (x.relu() / x.relu()).relu() + y,
    "threshold_backward": lambda x, y: aten.threshold_backward(x, y.relu(), 0.0),  # equal where y < 0
    "tanh": lambda x, y: aten.tanh_backward(y, x.tanh()),
    "sigmoid": lambda x, y: aten.sigmoid_backward(y, x.sigmoid()),
    "gelu": lambda x, y: F.gelu(x) + aten.gelu_backward(y, x),
    "silu": lambda x, y: F.silu(x) + aten.silu_backward(y, x),
    "where": lambda x, y: torch.where((x > 0) & (y <= 0.5) | (x < -1), x, y),
    "masked_fill": lambda x, y: x.masked_fill(y > 0, -3.5) * (y > 0).long().masked_fill(x > 0, -100).to(x.dtype),
    "masks": lambda x, y: (~((x >= 0) & (y != 0)) | (x == 0)).clone(),
    "sum": lambda x, y: x.sum() + y.mean(),
    "copies": lambda x, y: torch.cat([torch.stack([x, y]).flatten(), y.contiguous().flatten(), x.reshape(-1)]),
    "casts": lambda x, y: (x.to(torch.float32).to(torch.float64) + (y > 0).to(torch.float64)).to(torch.int64) - 1,
    "casts-to-masks": lambda x, y: (x.to(torch.int64).bool() & y.relu().bool()).to(x.dtype) * 0.5,
    "in-place": lambda x, y: x.clone().mul_(y).add_(x, alpha=2).add_(1).mul_(3),
    "fills": lambda x, y: x * torch.full_like(x, 0.5) + torch.ones_like(x) + x.new_zeros(x.shape).add_(y),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_every_instruction_on_every_layout(name: str, layout: str, dtype: torch.dtype, isa: str) -> None:
    def make() -> tuple[Tensor, ...]:
        return torch.randn(SHAPE, dtype=dtype), torch.randn(SHAPE, dtype=dtype)

    def function(x: Tensor, y: Tensor) -> list[Tensor]:
        return [INSTRUCTIONS[name](LAYOUTS[layout](x), LAYOUTS[layout](y))]

    check(function, make, 1e-12 if dtype == torch.float64 else 2e-5)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", [name for name in INSTRUCTIONS if "extremes" not in name])
def test_zeros_have_the_right_sign(name: str, layout: str) -> None:
    """It decides whether one over a zero is inf or -inf. PyTorch's own extremes of 0 and -0 depend on the layout."""

    def make() -> tuple[Tensor, ...]:
        x = torch.randint(-2, 3, (2, *SHAPE)).double()
        return tuple(torch.where(x == 0, torch.where(torch.rand(x.shape) > 0.5, -0.0, 0.0), x))

    def function(x: Tensor, y: Tensor) -> list[Tensor]:
        return [INSTRUCTIONS[name](LAYOUTS[layout](x), LAYOUTS[layout](y))]

    torch.manual_seed(0)
    executable, inputs = lowered(function, *make()), make()
    found = executable([inputs], 1)
    assert found is not None
    assert (result := found[0][0]) is not None
    truth = function(*inputs)[0].contiguous()
    if truth.is_floating_point():
        assert torch.equal(result.signbit() & (result == 0), truth.signbit() & (truth == 0))


def test_sums_of_negative_zeros_are_positive() -> None:
    for x in (torch.full((), -0.0), torch.full((3, 1), -0.0), torch.full((3, 4), -0.0)):
        sums = lowered(lambda x: [x.sum(), x.sum(-1), x.mean(-1, keepdim=True)], x)([[x]], 1)
        assert sums is not None
        assert not any(t.signbit().any() for t in sums[0] if t is not None)


def test_numbers_may_be_negative_zeros() -> None:
    check(
        lambda x: [1 / (torch.full_like(x, -0.0)), 1 / ((x - 0) * 0 - 0), 1 / (-0.0 * x.abs())],
        lambda: (torch.randn(40),),
    )


@pytest.mark.parametrize("name", INSTRUCTIONS)
def test_every_instruction_divided_among_threads(name: str) -> None:
    def make() -> tuple[Tensor, ...]:  # with enough elements to be worth a thread
        return torch.randn(3, 150, 81, dtype=torch.float64), torch.randn(3, 150, 81, dtype=torch.float64)

    def function(x: Tensor, y: Tensor) -> list[Tensor]:
        return [INSTRUCTIONS[name](LAYOUTS["permuted"](x), LAYOUTS["permuted"](y))]

    check(function, make, 1e-10)


FUNCTIONS = {"exp": torch.exp, "expm1": torch.expm1, "log": torch.log, "log1p": torch.log1p, "erf": torch.erf}


def computed(name: str, x: Tensor) -> Tensor:
    """Run one elementwise instruction."""
    y, run = torch.empty_like(x), native.C.Executable(64, 3)
    places, is_double = [native.C.Place(1, 0), native.C.Place(2, 0)], int(x.dtype == torch.float64)
    run.instruction(name, is_double, 0, places, [x.numel()], [[1], [1]], (0.0, 0.0))
    run.run([[0, y.data_ptr(), x.data_ptr()]], 1, False)
    return y


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_are_right_to_the_last_bits_in_all_of_their_range(name: str, isa: str) -> None:
    """Against float64 in float32, whose relative error is at most 2 units in the last place; and PyTorch in float64."""
    far = torch.logspace(-30, 30, 4001, base=10, dtype=torch.float64)
    near = torch.linspace(-3, 3, 6001, dtype=torch.float64)
    x = torch.cat([near, far, -far, 1 + near * 1e-3, torch.linspace(-87, 88, 4001, dtype=torch.float64)])
    for dtype, units in ((torch.float32, 2), (torch.float64, 4)):
        given = x.to(dtype)
        found, truth = computed(name, given).double(), FUNCTIONS[name](given.double())
        normal = truth.abs() >= torch.finfo(dtype).tiny
        assert normal.sum() > 6000
        error = (found - truth).abs() / truth.abs().where(truth != 0, 1)
        beyond = truth.abs() > torch.finfo(dtype).max
        assert found[beyond & ~truth.isnan()].isinf().all()
        assert error[normal & ~beyond].max() <= units * torch.finfo(dtype).eps
        assert torch.equal(found.isnan(), truth.isnan())


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_functions_of_special_values(name: str, dtype: torch.dtype, isa: str) -> None:
    info, infinity = torch.finfo(dtype), float("inf")
    x = torch.tensor([0.0, -0.0, infinity, -infinity, float("nan"), -1, 1, info.max, -info.max, info.tiny], dtype=dtype)
    found, truth = computed(name, x), FUNCTIONS[name](x)
    torch.testing.assert_close(found, truth, rtol=4 * info.eps, atol=0, equal_nan=True)
    assert torch.equal(found.signbit() & ~found.isnan(), truth.signbit() & ~truth.isnan())


@pytest.mark.parametrize("keepdim", [False, True])
@pytest.mark.parametrize("dims", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2), (-1,)])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "permuted", "sliced", "expanded", "empty"])
def test_sums_over_every_set_of_dimensions(layout: str, dims: tuple[int, ...], keepdim: bool) -> None:
    def function(x: Tensor) -> list[Tensor]:
        x = LAYOUTS[layout](x)
        return [x.sum(dims, keepdim), x.mean(dims, keepdim)]

    check(function, lambda: (torch.randn(4, 6, 75, dtype=torch.float64),))


@pytest.mark.parametrize("keepdim", [False, True])
@pytest.mark.parametrize("dims", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2), (-1,)])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "permuted", "sliced", "expanded"])
@pytest.mark.filterwarnings("ignore:.*degrees of freedom is <= 0")
def test_statistics_over_every_set_of_dimensions(layout: str, dims: tuple[int, ...], keepdim: bool) -> None:
    def function(x: Tensor) -> list[Tensor]:
        x, options = LAYOUTS[layout](x), {"keepdim": keepdim}
        spread = [x.var(dims, correction=c, **options) for c in (0, 9999)] + [x.std(dims, correction=0.5, **options)]
        return [
            x.amax(dims, **options),
            (x * 2).sqrt().amax(dims, **options),
            *spread,
            torch.linalg.vector_norm(x, dim=dims, **options),
        ]

    check(function, lambda: (torch.randn(4, 6, 75, dtype=torch.float64),))


def test_sums_of_many_rows() -> None:
    check(lambda x: [x.sum(), x.sum(0), x.sum(1)], lambda: (torch.randn(1234, 77, dtype=torch.float64),), 1e-11)


def test_passes_that_are_divided_among_threads() -> None:
    def function(x: Tensor) -> list[Tensor]:
        y = torch.where(x > 0, x, x * 2).mT.contiguous() + 1
        casts = [y.to(torch.float32), y.to(torch.float32).to(torch.float64), y.to(torch.int64).to(torch.float32)]
        return [y, y.sum(0), y.sum(1), y.sum(), (y > 1).all(0), (y > 1).to(torch.float64), *casts]

    check(function, lambda: (torch.randn(301, 257, dtype=torch.float64),), 1e-10)


def marked(marks: str, size: int) -> Tensor:
    """Targets `[size]`, -1 where they are ignored."""
    i = torch.arange(size)
    ignored = {
        "none": i < 0,
        "all": i >= 0,
        "every-other": i % 2 > 0,
        "turns": i % 45 < 25,
        "ends": (i < 20) | (i > 60),
    }
    return torch.where(ignored[marks], -1, i)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("marks", ["none", "all", "every-other", "turns", "ends"])
def test_products_leave_out_rows_and_terms_that_do_not_count(marks: str, dtype: torch.dtype, isa: str) -> None:
    T, M, N, K = 2, 100, 37, 300
    rows, terms = (marked(marks, size).repeat(T) for size in (M, K))
    a, b, add = torch.randn(T, M, K, dtype=dtype), torch.randn(T, K, N, dtype=dtype), torch.randn(T, M, N, dtype=dtype)
    a[:, marked(marks, M) < 0] = 0
    a[..., marked(marks, K) < 0] = 0
    half = [t.bfloat16().to(dtype) if dtype == torch.float32 else t for t in (a, b)]
    truths = {False: add + 3 * (a @ b), True: add + 3 * (half[0] @ half[1])}
    if marks == "turns":  # long enough to be left out
        b[:, marked(marks, K) < 0] = torch.nan
        a[:, marked(marks, M) < 0] = torch.nan
    c, run = torch.empty(T, M, N, dtype=dtype), native.C.Executable(64, 7)
    places = [native.C.Place(1 + i, 0) for i in range(6)]
    strides = (*a.stride(), *b.stride(), *add.stride()[:2])
    run.product(dtype == torch.float64, places, (T, M, N, K), strides, 3.0, -1)
    for threads, bfloat16 in ((1, False), (3, False), (2, True)):
        assert run.run([[0, *(t.data_ptr() for t in (a, b, add, c, rows, terms))]], threads, bfloat16)
        torch.testing.assert_close(c, truths[bfloat16], rtol=0, atol=2e-4)


def loss_and_derivatives(
    x: Tensor, w: Tensor, target: Tensor, loss: Callable[[Tensor, Tensor], Tensor]
) -> list[Tensor]:
    """Compute `loss(x w, target)`, its gradients, and second derivatives in x and w."""
    with torch.enable_grad():
        x, w = x.detach().requires_grad_(), w.detach().requires_grad_()
        value = loss(x @ w.mT, target)
        gradients = torch.autograd.grad(value, (x, w), create_graph=True)
        second = torch.autograd.grad(sum((g**2).sum() for g in gradients), (x, w))
    return [value.detach(), *(g.detach() for g in gradients), *second]


def entropy(z: Tensor, target: Tensor, ignored: int = -1) -> Tensor:
    return mk.ops.cross_entropy(z, target, ignored).sum()


HEADS: dict[str, tuple[int, Callable[[Tensor, Tensor], Tensor]]] = {  # marks of 9 products, and a loss of the logits
    "cross-entropy": (8, entropy),
    "of-a-sum": (8, lambda z, target: entropy((z + z) * 0.5, target)),
    "twice": (8, lambda z, target: entropy(z, target) + entropy(z * 2, target)),
    "read-elsewhere": (0, lambda z, target: entropy(z, target) + z.square().mean()),
    "two-targets": (0, lambda z, target: entropy(z, target) + entropy(z, target.flip(1))),
    "two-ignored": (0, lambda z, target: entropy(z, target) + entropy(z, torch.where(target < 0, 3, target), 3)),
    "transposed": (0, lambda z, target: entropy(z[:, :37].mT.contiguous(), target[:, :37])),
}


@pytest.mark.parametrize("name", HEADS)
def test_tokens_that_do_not_count_in_a_loss_cost_no_products(name: str) -> None:
    marks, loss = HEADS[name]

    def make() -> tuple[Tensor, ...]:
        kinds = [("turns", "every-other"), ("ends", "none"), ("all", "turns")][int(torch.randint(3, ()))]
        target = torch.stack([torch.where((m := marked(kind, 90)) < 0, -1, m % 37) for kind in kinds])
        return torch.randn(2, 90, 8, dtype=torch.float64), torch.randn(2, 37, 8, dtype=torch.float64), target

    def function(x: Tensor, w: Tensor, target: Tensor) -> list[Tensor]:
        return loss_and_derivatives(x, w, target, loss)

    inputs = make()
    w = lowering.Lowering(inputs)
    w.executable(record(lambda: function(*inputs), inputs, rewritten)[0])
    assert sum(t is not None for call in w.calls if call.method == "product" for t in call.tensors[4:]) == marks
    for _ in range(3):
        check(function, make, 1e-10)


def test_passes_have_at_most_six_dimensions() -> None:
    def function(x: Tensor) -> list[Tensor]:
        return [x.permute(6, 5, 4, 3, 2, 1, 0) * x]

    with pytest.raises(lowering.LoweringError, match="7 dimensions"):
        lowering.lower(record(lambda: function(x), [x := torch.randn([2] * 7)])[0], [x])
    check(lambda x: [x.permute(5, 4, 3, 2, 1, 0) * x], lambda: (torch.randn([2] * 6),))


def test_integer_passes_and_row_gathers() -> None:
    table = torch.randn(7, 5, dtype=torch.float64)

    def function(index: Tensor, x: Tensor) -> list[Tensor]:
        T = index.shape[0]
        inside = (index >= 0) & (index < 7)
        own = torch.where(inside, index, 0) + torch.arange(T).unsqueeze(1) * 7
        rows = torch.zeros(7 * T, 5, dtype=x.dtype).index_add_(0, own.flatten(), x.flatten(0, 1), alpha=0.5)
        return [
            F.embedding(torch.where(inside, index, 0), table),
            rows,
            rows.index_select(0, own.flatten()),
            x.mT.index_select(0, index.new_zeros(3)),
            (own - 2 * index + 1).clone(),
            inside.all(1),
            inside.all((0, 1)) | inside.all(),
            aten.embedding_dense_backward(x, own, 14, -1, False),
        ]

    check(function, lambda: (torch.randint(-1, 8, (2, 4)), torch.randn(2, 4, 5, dtype=torch.float64)))


def scatters(x: Tensor, i: Tensor, j: Tensor) -> list[Tensor]:
    index, zeros = torch.where(i < 0, 0, i)[None].expand(2, 3, 2), torch.zeros_like(x)
    one = (x[:, :1] > 0).long()
    return [
        x.index_put((i,), x[i] * 2, accumulate=True),
        aten._index_put_impl_(zeros.clone(), [None, i, j], x[:, i, j], True, True),
        aten._index_put_impl_(zeros.clone(), [i, None, j], x[i, :, j], True, True),
        aten._index_put_impl_(x.mT.clone().mT, [None, i], x[:, :1, None].expand(4, 1, 2, 5), True, True),
        x.scatter_add(1, index, x * 2),
        x.mT.scatter_add(2, index, x),
        x.scatter(1, one, -1.0),
        x.scatter(1, one, x[:, 1:]),
        x.mT.scatter(2, torch.arange(5, -1, -1).expand(2, 3, 6), x.mT * 2),
        (x * 2).scatter_(0, one, torch.where(x > 0, x, torch.inf)),
        F.nll_loss(x.flatten(0, 1).log_softmax(-1), (x[..., 0].flatten() > 0).long()),
    ]


GATHERS: dict[str, Callable[[Tensor, Tensor, Tensor], list[Tensor]]] = {
    "index": lambda x, i, j: [x[i], x[:, i], x[i, :, j], x[:, i, j], x[i, i, j], x[..., j]],
    "index_select": lambda x, i, j: [x.index_select(1, j), x.mT.index_select(-1, j), x.flip((0, 2))],
    "gather": lambda x, i, j: [x.gather(-1, j.view(1, 1, 2)), x.mT.gather(1, torch.where(i < 0, 0, i)[None])],
    "scatter": scatters,
    "cumsum": lambda x, i, j: [x.cumsum(0), x.mT.cumsum(-1), (x > 0).cumsum(1), i.cumsum(0), x[..., :0].cumsum(2)],
    "triangles": lambda x, i, j: [x.tril(), x.triu(1), (x > 0).tril(-1), x.mT.tril(2) * 2],
    "counts": lambda x, i, j: [(x > 0).sum(1), i.sum(), (x > 0).sum((0, 2), True), (x > 1).any(), (x > 1).any(2)],
    "integers": lambda x, i, j: [
        torch.minimum(i, j),
        torch.maximum(i, j),
        torch.zeros_like(i).fill_(j.sum()),
        i.clamp(-2, 1),
        i.clamp_min(0) + i.clamp(max=1),
    ],
}


@pytest.mark.parametrize("name", GATHERS)
def test_indices_and_counts(name: str) -> None:
    def make() -> tuple[Tensor, ...]:
        return torch.randn(4, 6, 5, dtype=torch.float64), torch.randint(-4, 4, (3, 2)), torch.randint(0, 5, (2,))

    check(GATHERS[name], make)


def test_indices_out_of_range_stop_the_run() -> None:
    functions: list[Callable[[Tensor, Tensor], list[Tensor]]] = [
        lambda x, i: [x[:, i]],
        lambda x, i: [x.gather(1, i.expand(2, 1))],
        lambda x, i: [x.scatter(1, i.expand(2, 1), x * 2)],
    ]
    for function in functions:
        executable = lowered(function, torch.randn(2, 3), torch.tensor([0]))
        assert executable([[torch.randn(2, 3), torch.tensor([2])]], 1) is not None
        assert executable([[torch.randn(2, 3), torch.tensor([3])]], 1) is None
        assert executable([[torch.randn(2, 3), torch.tensor([-4])]], 1) is None
        counts_from_the_end = executable([[torch.randn(2, 3), torch.tensor([-1])]], 1) is not None
        assert counts_from_the_end == (function is functions[0])  # as in PyTorch


def test_a_known_tensor_that_is_written_to_is_made_anew() -> None:
    check(lambda x: [torch.arange(5).add(0).add_(x)], lambda: (torch.randint(9, (5,)),))


def test_products() -> None:
    def function(a: Tensor, b: Tensor) -> list[Tensor]:
        return [
            a @ b.mT,
            torch.baddbmm(a[:, :1, :1], a, b.mT, beta=-2, alpha=0.5),
            a[0] @ b[0].mT,
            torch.addmm(b[0, :, 0], a[1], b[1].mT),
            native.product(a[:, ::2, ::2], b[..., ::2].mT, scale=3.0),
            native.product(a, b.mT, (a @ b.mT)[:, :1], True),
            torch.bmm(a.expand(3, 4, 6), b[:1].mT.expand(3, 6, 5)),
        ]

    def make() -> tuple[Tensor, ...]:
        return torch.randn(3, 4, 6, dtype=torch.float64), torch.randn(3, 5, 6, dtype=torch.float64)

    check(function, make)


def test_calls_of_kernels_are_lowered() -> None:
    def function(x: Tensor, weight: Tensor, target: Tensor) -> list[Tensor]:
        y, *residuals = native.call("layer_norm_forward", x.mT.contiguous().mT, weight, None, scalars=(1e-5,))
        loss = native.call("cross_entropy_forward", y, target, scalars=(-100.0,))
        return [t for t in (y, *residuals, *loss) if t is not None]

    def make() -> tuple[Tensor, ...]:
        real = {"dtype": torch.float64}
        return torch.randn(2, 3, 5, **real), torch.randn(2, 5, **real), torch.randint(5, (2, 3))

    check(function, make)


def test_memory_is_reused_after_the_last_use() -> None:
    def function(x: Tensor) -> list[Tensor]:
        for i in range(50):
            x = x.exp() * i
        return [x]

    x = torch.zeros(1024, dtype=torch.float64)
    assert lowered(function, x).bytes <= 4 * x.nbytes


def test_allocations_of_an_arena_do_not_overlap() -> None:
    generator = torch.Generator().manual_seed(0)
    arena, taken = lowering.Arena(), {}
    for _ in range(2000):
        if taken and torch.rand((), generator=generator) < 0.5:
            offset = list(taken)[int(torch.randint(len(taken), (), generator=generator))]
            arena.give_back(offset)
            del taken[offset]
        else:
            size = int(torch.randint(1, 5000, (), generator=generator))
            taken[arena.take(size)] = size
        spans = sorted((offset, offset + size) for offset, size in taken.items())
        assert all(a[1] <= b[0] for a, b in pairwise(spans))
        assert not spans or spans[-1][1] <= arena.size
    for offset in taken:
        arena.give_back(offset)
    assert arena.take(arena.size) == 0  # what was given back is one gap again


def test_closed_over_tensors_are_read_at_their_current_address_and_layout() -> None:
    weight = torch.randn(4, 3, dtype=torch.float64)
    executable, x = lowered(lambda x: [x @ weight], torch.randn(2, 4, dtype=torch.float64)), torch.randn(2, 4).double()
    weight.data = torch.randn(4, 3, dtype=torch.float64)
    (found,) = executable([[x]], 1) or ([],)
    torch.testing.assert_close(found[0], x @ weight)
    weight.data = torch.randn(3, 4, dtype=torch.float64).mT
    assert executable([[x]], 1) is None


def test_a_check_that_fails_stops_the_run() -> None:
    def function(x: Tensor) -> list[Tensor]:
        checks.below("op", "x", x, 5, -100)
        return [x + 1]

    executable = lowered(function, torch.tensor([1, -100]))
    assert executable([[torch.tensor([4, -100])]], 1) is not None
    for wrong in ([5, 0], [-1, 0]):
        assert executable([[torch.tensor([1, 1])], [torch.tensor(wrong)]], 2) is None


def test_row_indices_out_of_range_stop_the_run() -> None:
    for function in (lambda x, i: [x.index_select(0, i)], lambda x, i: [torch.zeros(3, 2).index_add_(0, i, x[:1])]):
        executable = lowered(function, torch.randn(3, 2), torch.tensor([0]))
        assert executable([[torch.randn(3, 2), torch.tensor([2])]], 1) is not None
        for index in (-1, 3):
            assert executable([[torch.randn(3, 2), torch.tensor([index])]], 1) is None


@pytest.mark.parametrize(
    "function",
    [
        lambda x: [x.cumprod(0)],
        lambda x: [F.dropout(x, 0.5)],
        lambda x: [x.half() * 2],
        lambda x: [x.add_(1)],
        lambda x: [x.complex32() if hasattr(x, "complex32") else x.cfloat()],
    ],
)
def test_programs_without_an_executable(function: Function) -> None:
    x = torch.randn(3)
    program, _ = record(lambda: function(x), [x])
    with pytest.raises(lowering.LoweringError):
        lowering.lower(program, [x])


def test_invalid_instructions_are_refused() -> None:
    C = native.C
    executable, place = C.Executable(64, 2), C.Place(0, 0)
    for wrong in (C.Place(2, 0), C.Place(-1, 0), C.Place(0, -8)):
        with pytest.raises(ValueError, match="a place must be in one of 2 bases"):
            executable.instruction("copy", 0, 0, [place, wrong], [1], [[1], [1]], (0.0, 0.0))
    for base, offset in ((2**19, 0), (0, 2**43), (0, -(2**43) - 1)):
        with pytest.raises(ValueError, match=f"a place must fit a word, got base {base} and offset {offset}"):
            C.Place(base, offset)
    with pytest.raises(ValueError, match="no such instruction"):
        executable.instruction("nothing", 0, 0, [place], [1], [[1]], (0.0, 0.0))
    with pytest.raises(ValueError, match="no such instruction"):
        executable.instruction("exp", 2, 0, [place, place], [1], [[1], [1]], (0.0, 0.0))
    with pytest.raises(ValueError, match="wrong number of tensors"):
        executable.instruction("copy", 0, 0, [place], [1], [[1]], (0.0, 0.0))
    with pytest.raises(ValueError, match="wrong number of dimensions"):
        executable.instruction("fill", 0, 0, [place], [1] * 7, [[1] * 7], (0.0, 0.0))
    with pytest.raises(ValueError, match="wrong number of strides"):
        executable.instruction("fill", 0, 0, [place], [1], [[1, 1]], (0.0, 0.0))
    with pytest.raises(ValueError, match="wrong numbers of arguments"):
        executable.kernel(0, False, [place], [1], [])
    with pytest.raises(IndexError):
        executable.kernel(10**6, False, [place], [1], [])
    with pytest.raises(ValueError, match="wrong number of bases"):
        executable.run([[0]], 1, False)


@pytest.mark.parametrize("strategy", ["store", "recompute"])
@pytest.mark.parametrize(
    ("name", "batching"), [kind for kind in KINDS if kind[0] not in ("gpt", "gpt-folded", "gru-2")]
)
def test_models_have_executables(name: str, batching: str, strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their microbatches run in an executable, and none of its checks fails."""
    model, loss, _, _, _ = build(name)
    batch = points if loss is regression_loss else tokens
    captured = mk.MAML(model, loss, mk.optim.SGD(lr=0.3), steps=2, batching=batching, strategy=strategy, capture=True)
    played: list[int] = []
    play = capture._Captured.__call__

    def noted(self: Any, microbatches: list, *rest: Any) -> list:
        found = play(self, microbatches, *rest)
        if self.executable is not None:
            assert self.executable(microbatches, 1) is not None
            played.append(len(microbatches))
        return found

    monkeypatch.setattr(capture._Captured, "__call__", noted)
    for i in range(3):
        captured(batch(i), batch(i + 9))
    assert played


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mse": F.mse_loss,
    "l1": F.l1_loss,
    "huber": F.huber_loss,
    "margin": lambda y, target: F.relu(1 - y * target.sign()).mean(),
    "attention": lambda y, target: ((y @ y.mT).softmax(-1) @ target - y).square().mean(),
    "normalized": lambda y, target: (F.normalize(y, dim=-1) - F.layer_norm(target, (3,))).square().mean(),
    "standardized": lambda y, target: ((y - y.mean(0)) / y.std(0) - target).abs().mean(),
    "activations": lambda y, target: (
        (F.elu(y) + F.leaky_relu(y) + F.softplus(y) - target.log_softmax(-1)).square().mean()
    ),
}


@pytest.mark.parametrize("name", LOSSES)
def test_losses_of_plain_pytorch_have_an_executable(name: str) -> None:
    """PyTorch's own decompositions lower what has no instruction."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3)).double()
    batch = torch.randn(4, 6, 5, dtype=torch.float64), torch.randn(4, 6, 3, dtype=torch.float64)
    gradients = []
    for captures in (False, True):
        maml = mk.MAML(model, lambda m, b: LOSSES[name](m(b[0]), b[1]), steps=2, capture=captures)
        for _ in range(3):
            model.zero_grad()
            maml(batch, batch).backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    for plain, captured in zip(*gradients, strict=True):
        torch.testing.assert_close(captured, plain, rtol=1e-9, atol=1e-12)
    assert not [reason for reason in maml.plan.reasons if "captured" in reason]


def test_the_result_of_a_decomposition_is_new_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(lowering.decomposition_table, aten.trunc.default, lambda x: x)

    def function(x: Tensor) -> list[Tensor]:
        doubled = x * 2
        return [doubled.trunc().add_(1), doubled]

    check(function, lambda: (torch.randint(-9, 9, (5, 7)).double(),))
