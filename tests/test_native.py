"""The C++ kernels themselves: every instruction set, any number of threads, hard values, wrong calls, forks."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor

import metakern as mk
from metakern import _native
from metakern.ops import SPECS
from metakern.ops._spec import Make

pytestmark = pytest.mark.skipif(_native._C is None, reason="metakern was built without C++ kernels")
ISAS = _native._C.isas() if _native._C else []

Inputs = tuple[Tensor | None, ...]


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set that this machine has."""
    best = _native._C.isa()
    _native._C.set_isa(request.param)
    assert _native._C.isa() == request.param
    yield request.param
    _native._C.set_isa(best)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def arguments(kernel: str, sizes: dict[str, int], dtype: torch.dtype = torch.float64, seed: int = 0) -> Inputs:
    """Random inputs of a kernel: every size as given, 3 where it is not."""
    make = Make(dtype, seed=seed)
    return tuple(
        make.integers(sizes["V"], *(sizes[d] for d in a.dims))
        if a.indices
        else make(*(sizes.get(d, 3) for d in a.dims))
        for a in _native._signatures()[kernel].inputs
    )


def scalars(kernel: str) -> tuple[float, ...]:
    return (1.0,) if kernel.startswith(("layer_norm", "rms_norm", "cross_entropy")) else ()


KERNELS = sorted(_native._signatures()) if _native._C else []
BIG = {"*": 50_000, "T": 3, "N": 700, "D": 62, "V": 150, "B": 2, "H": 5, "L": 600}


def test_every_kernel_is_called_by_its_op(monkeypatch: pytest.MonkeyPatch) -> None:
    called = set()
    call = _native.call

    def record(kernel: str, *inputs: Tensor | None, **options: Any) -> Inputs:
        called.add(kernel)
        return call(kernel, *inputs, **options)

    monkeypatch.setattr(_native, "call", record)
    for spec in SPECS.values():
        for sample in spec.samples(Make()):
            x = [a.requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a for a in sample.args]
            with mk.backend("cpu"):
                y = torch.utils._pytree.tree_leaves(spec.call(*x, **sample.kwargs))
                leaves = [a for a in x if isinstance(a, Tensor) and a.requires_grad]
                ones = [torch.ones_like(a).requires_grad_() for a in y]
                first = torch.autograd.grad(y, leaves, ones, create_graph=True, allow_unused=True)
                sum(g.sum() for g in first if g is not None and g.requires_grad).backward()
    assert called == set(KERNELS)


@pytest.mark.parametrize("kernel", KERNELS)
def test_instruction_sets_agree(kernel: str, isa: str) -> None:
    sizes = {"*": 1003, "T": 2, "N": 5, "V": 37, "B": 2, "H": 2, "L": 3, "D": 38}
    for dtype, tolerance in ((torch.float64, 1e-13), (torch.float32, 2e-5)):
        inputs = arguments(kernel, sizes, dtype)
        ours = _native.call(kernel, *inputs, scalars=scalars(kernel))
        _native._C.set_isa("baseline")
        wide = (None if a is None else a.double() if a.is_floating_point() else a for a in inputs)
        for a, b in zip(ours, _native.call(kernel, *wide, scalars=scalars(kernel)), strict=True):
            torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance)
        _native._C.set_isa(isa)


@pytest.mark.parametrize("kernel", KERNELS)
def test_threads_do_not_change_a_bit(kernel: str, threads: None) -> None:
    inputs = arguments(kernel, BIG, torch.float32)
    results = []
    for count in (1, 2, 3, 7):
        torch.set_num_threads(count)
        results.append(_native.call(kernel, *inputs, scalars=scalars(kernel)))
    for result in results[1:]:
        for a, b in zip(result, results[0], strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("kernel", [k for k in KERNELS if ":T" in dict(_native._C.signatures())[k]])
def test_a_task_of_many_blocks_does_not_see_its_neighbors(kernel: str) -> None:
    inputs = arguments(kernel, BIG, torch.float32)
    alone = _native.call(kernel, *(a[:1] for a in inputs), scalars=scalars(kernel))
    together = _native.call(kernel, *inputs, scalars=scalars(kernel))
    for a, b in zip(alone, together, strict=True):
        assert torch.equal(a, b[:1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_activations_at_hard_values(dtype: torch.dtype, isa: str) -> None:
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
        (slope,) = _native.call(f"{op}_vjp_jvp", x.to(dtype), none, one, one)
        (bend,) = _native.call(f"{op}_vjp_jvp", x.to(dtype), one, one, None)
        bound = 8 * torch.finfo(dtype).eps
        torch.testing.assert_close(slope.double(), first, rtol=bound, atol=bound)
        torch.testing.assert_close(bend.double(), second.nan_to_num(), rtol=bound, atol=4 * bound)
    (y,) = _native.call("gelu_tanh_forward", x.to(dtype))
    torch.testing.assert_close(y.double()[x.abs() > 20], x.clamp(min=0)[x.abs() > 20], rtol=0, atol=1e-40)
    nan = torch.full((5,), torch.nan, dtype=dtype)
    for kernel in ("gelu_vjp_jvp", "silu_vjp_jvp", "gelu_tanh_vjp_jvp"):
        assert _native.call(kernel, nan, one[:5], one[:5], None)[0].isnan().all()


def test_cross_entropy_of_infinite_logits(isa: str) -> None:
    logits = torch.tensor([[[-torch.inf, 0.0, 1.0]], [[1e30, -1e30, 0.0]], [[-torch.inf] * 3]], dtype=torch.float64)
    y, lse = _native.call("cross_entropy_forward", logits, torch.tensor([[2], [0], [0]]), scalars=(-100,))
    expected = torch.nn.functional.cross_entropy(logits[:2, 0], torch.tensor([2, 0]), reduction="none")
    torch.testing.assert_close(y[:2], expected)
    assert y[2].isnan()
    assert lse[1] == 1e30


def test_targets_out_of_range_are_no_addresses(isa: str) -> None:
    """The public op refuses them; the kernel must not crash either."""
    logits, target = torch.randn(1, 3, 5), torch.tensor([[2, -(2**62), 2**62]])
    y, lse = _native.call("cross_entropy_forward", logits, target, scalars=(-100,))
    torch.testing.assert_close(y, (lse[:, 0] - logits[:, 0, 2]))
    (ct,) = _native.call("cross_entropy_vjp", logits, target, lse, torch.ones(1), scalars=(-100,))
    assert not ct[0, 1:].any()


def dimensions(kernel: str) -> list[str]:
    return sorted({d for a in _native._signatures()[kernel].inputs for d in a.dims})


@pytest.mark.parametrize(("kernel", "empty"), [(kernel, d) for kernel in KERNELS for d in dimensions(kernel)])
def test_empty_sizes(kernel: str, empty: str) -> None:
    sizes = {"*": 3, "T": 2, "N": 3, "D": 4, "V": 5, "B": 2, "H": 2, "L": 3}
    inputs = [
        a.narrow(b.dims.index(empty), 0, 0) if empty in b.dims else a
        for a, b in zip(arguments(kernel, sizes), _native._signatures()[kernel].inputs, strict=True)
    ]
    for a in _native.call(kernel, *inputs, scalars=scalars(kernel)):
        assert a is not None
        if empty == "N":
            assert not a.any()  # a sum over no rows


def test_wrong_calls_raise() -> None:
    x = torch.randn(2, 3, 4)
    with pytest.raises(ValueError, match=r"gelu_tanh_vjp: ct_y must have shape \[2, 3, 4\], got \[3, 4\]"):
        _native.call("gelu_tanh_vjp", x, x[0])
    with pytest.raises(TypeError, match=r"gelu_tanh_vjp: ct_y must be torch[.]float32 like the other tensors, got"):
        _native.call("gelu_tanh_vjp", x, x.double())
    with pytest.raises(TypeError, match="gelu_tanh_vjp: ct_y must be a tensor, got None"):
        _native.call("gelu_tanh_vjp", x, None)
    with pytest.raises(TypeError, match=r"gelu_tanh_vjp: x must be float32 or float64, got torch[.]bfloat16"):
        _native.call("gelu_tanh_vjp", x.bfloat16(), x.bfloat16())
    with pytest.raises(TypeError, match="gelu_tanh_vjp: inputs must number 2, got 1"):
        _native.call("gelu_tanh_vjp", x)
    with pytest.raises(ValueError, match=r"rms_norm_forward: weight must have shape TD with .*, got \[2, 3\]"):
        _native.call("rms_norm_forward", x, x[..., 0], scalars=(0.1,))
    with pytest.raises(ValueError, match="gelu_tanh_vjp: ct_y must be on the CPU, got meta"):
        _native.call("gelu_tanh_vjp", x, x.to("meta"))
    call = _native._C.call
    number = _native._signatures()["gelu_tanh_vjp"].number
    with pytest.raises(IndexError):
        call(1_000_000, False, [], [], [], 1)
    for tensors, sizes, values in (([1], [1], []), ([1] * 3, [], []), ([1] * 3, [1], [0.5]), ([1, 0, 1], [1], [])):
        with pytest.raises(ValueError, match="gelu_tanh_vjp: "):
            call(number, False, tensors, sizes, values, 1)
    with pytest.raises(ValueError, match="sizes must not be negative"):
        call(number, False, [1] * 3, [-1], [], 1)
    with pytest.raises(ValueError, match="isa must be one of this machine's, got 'abacus'"):
        _native._C.set_isa("abacus")


def test_strides_zeros_without_memory_and_negated_views() -> None:
    x, ct = torch.randn(6, 4, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    (expected,) = _native.call("gelu_tanh_vjp", x, ct.t().contiguous())
    assert torch.equal(_native.call("gelu_tanh_vjp", x, ct.t())[0], expected)
    assert not _native.call("gelu_tanh_vjp", x, torch._efficientzerotensor(6, 4, dtype=torch.float64))[0].any()
    negated = torch.view_as_complex(torch.randn(1, 2, dtype=torch.float64)).conj().imag
    assert negated.is_neg()
    (expected,) = _native.call("gelu_tanh_vjp", negated + 0, negated + 0)
    assert torch.equal(_native.call("gelu_tanh_vjp", negated, negated)[0], expected)


def test_python_threads_share_the_pool(threads: None) -> None:
    torch.set_num_threads(2)
    problems = [arguments("layer_norm_vjp", BIG, torch.float32, seed) for seed in range(8)]

    def solve(inputs: Inputs) -> Inputs:
        return _native.call("layer_norm_vjp", *inputs, scalars=(1.0,))

    expected = [solve(inputs) for inputs in problems]
    with ThreadPoolExecutor(4) as pool:
        for ours, right in zip(pool.map(solve, problems * 5), expected * 5, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, right, strict=True))


def test_a_forked_child_has_a_pool_of_its_own() -> None:
    script = """
import os, torch
from metakern import _native
torch.set_num_threads(2)
x = torch.randn(300_000)
before = _native.call("gelu_tanh_vjp", x, x)[0]
child = os.fork()
if child == 0:
    os._exit(0 if torch.equal(_native.call("gelu_tanh_vjp", x, x)[0], before) else 1)
assert os.waitpid(child, 0)[1] == 0
assert torch.equal(_native.call("gelu_tanh_vjp", x, x)[0], before)
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
