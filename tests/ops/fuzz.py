"""Call every compiled kernel with sizes, strides and values that hypothesis draws; test_sanitizers.py runs this.

    python tests/ops/fuzz.py LIBRARY EXAMPLES        with LIBRARY a build of metakern._C by METAKERN_SANITIZE=1

Results are not checked: the sanitizer finds accesses beyond a tensor, as each is an allocation of its own. The values
include NaN, infinities, absent tensors, and indices and lengths far out of range.
"""

from __future__ import annotations

import sys
from importlib.util import module_from_spec, spec_from_file_location
from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

library, examples = sys.argv[1], int(sys.argv[2])
spec = spec_from_file_location("metakern._C", library)
assert spec is not None
assert spec.loader is not None
sys.modules["metakern._C"] = module_from_spec(spec)
spec.loader.exec_module(sys.modules["metakern._C"])

from metakern import native  # noqa: E402
from metakern.meta.capture.lowering import lower  # noqa: E402
from metakern.meta.capture.recorder import record  # noqa: E402

assert native.C.__file__ == library
LIMITS = {"T": 3, "B": 5, "H": 40, "L": 4, "N": 30, "D": 70, "V": 70, "G": 3, "M": 300, "*": 3000}
LIMITS |= {"S": 9, "Q": 9, "C": 6}
ODD = [0, 1, -1, -(2**62), 2**62]
budget = settings(
    max_examples=examples, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
setting = st.tuples(
    st.sampled_from(native.C.isas()),
    st.integers(1, 3),
    st.sampled_from([torch.float32, torch.float64]),
    st.integers(0, 2**32),
)


def start(isa: str, threads: int, seed: int) -> torch.Generator:
    """Set the instruction set and the number of threads; return a random generator."""
    native.C.set_isa(isa)
    torch.set_num_threads(threads)
    return torch.Generator().manual_seed(seed)


def numbers(shape: list[int], dtype: torch.dtype, random: torch.Generator, special: bool) -> Tensor:
    x = torch.randn(shape, generator=random, dtype=torch.float64).to(dtype)
    if special and x.numel():
        for value in (float("nan"), float("inf"), -float("inf"), 1e30, -0.0):
            x.view(-1)[int(torch.randint(x.numel(), (), generator=random))] = value
    return x


@budget
@given(setting, st.sampled_from(sorted(native.signatures())), st.data())
def kernels(chosen: tuple, kernel: str, data: st.DataObject) -> None:
    isa, threads, dtype, seed = chosen
    random, signature = start(isa, threads, seed), native.signatures()[kernel]
    letters = sorted({size for a in signature.inputs for _, size in a.dims} or {"*"})
    sizes = {size: 1 if size == "1" else data.draw(st.integers(0, LIMITS[size]), size) for size in letters}
    if "N" in sizes and data.draw(st.booleans(), "many rows"):
        sizes["N"] *= 30
    if "G" in sizes:
        sizes |= {"H": sizes["G"] * data.draw(st.integers(1, 3), "group"), "L": data.draw(st.integers(0, 120), "L")}
    special, inputs = data.draw(st.booleans(), "special"), []
    for a in signature.inputs:
        shape = [times * sizes[size] for times, size in a.dims] or [sizes["*"]]
        if a.optional and data.draw(st.booleans(), f"no {a.name}"):
            inputs.append(None)
        elif a.indices:
            high = 1 + max(sizes.get("L", 0), sizes.get("V", 0))
            x = torch.randint(high, shape, generator=random)
            for value in ODD[: 5 * special * x.numel()]:
                x.view(-1)[int(torch.randint(x.numel(), (), generator=random))] = value
            inputs.append(x)
        else:
            inputs.append(numbers(shape, dtype, random, special))
    scalars = {
        "rms": (1.0,),
        "layer": (1.0,),
        "attention": (0.3, seed % 2, seed // 2 % 3 * (seed % 2) * 60),
        "cross": (-100.0,),
        "lstm": (seed % 2,),
        "gru": (seed % 2,),
        "rnn": (seed % 2,),
        "metalstm": (10.0,),
    }
    given_scalars = () if kernel.endswith("cotangents") else scalars.get(kernel.split("_")[0], ())
    native.call(kernel, *inputs, scalars=given_scalars)


@st.composite
def matrices(draw: st.DrawFn, shape: tuple[int, ...]) -> tuple[list[int], list[int]]:
    """Draw strides for a shape: any order of the dimensions, gaps, and expanded dimensions."""
    strides, step = [0] * len(shape), 1
    for i in draw(st.permutations(range(len(shape)))):
        if draw(st.integers(0, 5)):
            strides[i] = step
            step *= max(shape[i], 1) + draw(st.sampled_from([0, 0, 1, 3]))
    return list(shape), strides


def laid_out(shape: list[int], strides: list[int], dtype: torch.dtype, random: torch.Generator) -> Tensor:
    """Return a tensor whose storage ends with its last element."""
    extent = 1 + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True)) if all(shape) else 0
    return numbers([extent], dtype, random, False).as_strided(shape, strides)


@budget
@given(setting, st.integers(0, 3), st.integers(0, 30), st.integers(0, 70), st.integers(0, 40), st.data())
def products(chosen: tuple, T: int, M: int, N: int, K: int, data: st.DataObject) -> None:
    isa, threads, dtype, seed = chosen
    random = start(isa, threads, seed)
    M, K = data.draw(st.sampled_from([(M, K), (M, K), (60 * M, K), (M, 20 * K)]), "M, K")
    a, b, add = (
        data.draw(matrices(shape), name) for name, shape in (("a", (T, M, K)), ("b", (T, K, N)), ("add", (T, M, N)))
    )
    extra = laid_out(*add, dtype, random) if data.draw(st.booleans(), "with add") else None
    native.product(laid_out(*a, dtype, random), laid_out(*b, dtype, random), extra, scale=0.5)


LOWERED = [
    lambda x, y, index: [torch.add(x, y, alpha=0.5), torch.where(x > 0, x, y), x.exp().relu() / 3],
    lambda x, y, index: [x.sum(), x.sum(0), x.sum((1, 2)), x.mean(-1, True), x.sum(1), (x > 0).all(1)],
    lambda x, y, index: [torch.cat([x, y], 1), x.mT.contiguous(), torch.stack([x, y], 3), y.clone().mul_(x)],
    lambda x, y, index: [x.index_select(0, index), x.new_zeros(9, *x.shape[1:]).index_add_(0, index, y[:1])],
]


@budget
@given(setting, st.sampled_from(LOWERED), st.integers(0, 5), st.integers(0, 40), st.integers(0, 70), st.data())
def executables(chosen: tuple, function: Any, A: int, B: int, C: int, data: st.DataObject) -> None:
    isa, threads, dtype, seed = chosen
    random = start(isa, threads, seed)
    x, y = (laid_out(*data.draw(matrices((A, B, C)), name), dtype, random) for name in "xy")
    inputs = [x, y, torch.randint(A, (1 if A else 0,), generator=random) if A else torch.zeros(0, dtype=torch.int64)]
    program, _ = record(lambda: function(*inputs), inputs)
    assert lower(program, inputs)([inputs, inputs], threads) is not None


if __name__ == "__main__":
    kernels()
    products()
    executables()
    print("nothing found in", library)
