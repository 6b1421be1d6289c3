"""Call ops and kernels with tensors that a kernel must not read: each call must return or raise, and never crash.

    python tests/ops/fuzz_ops.py SEED ROUNDS [BACKEND ...]      prints how many calls there were, and how many returned

The storage of an argument is freed or cut short, before the call or between the call and its derivatives. Arguments are
expanded, overlap, have no elements beside sizes of 2**62, are on the device "meta", fake, sparse, nested, complex, of a
subclass that wraps another tensor, or hold indices out of range.
"""

from __future__ import annotations

import os
import sys

os.environ.setdefault("TRITON_INTERPRET", "1")

import random
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

import metakern as mk
from metakern import native
from metakern.ops import SPECS
from metakern.ops.core.spec import Make


class Wrapper(Tensor):
    """A tensor without memory of its own."""

    @staticmethod
    def __new__(cls, wrapped: Tensor) -> Wrapper:
        return Tensor._make_wrapper_subclass(cls, wrapped.shape, dtype=wrapped.dtype, device=wrapped.device)

    def __torch_dispatch__(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("a wrapper computes nothing")


def freed(x: Tensor) -> Tensor:
    x = x.clone()
    x.untyped_storage().resize_(0)
    return x


def cut(x: Tensor) -> Tensor:
    x = x.clone()
    x.untyped_storage().resize_(x.untyped_storage().nbytes() // 2)
    return x


def view_of_freed(x: Tensor) -> Tensor:
    whole = torch.cat([x.flatten(), x.flatten()])
    view = whole[x.numel() :].view(x.shape)
    whole.untyped_storage().resize_(0)
    return view


def overlapping(x: Tensor) -> Tensor:
    strides = [1 if size > 1 else 0 for size in x.shape]
    return x.new_ones(sum(x.shape) + 1).as_strided(x.shape, strides)


def huge(x: Tensor) -> Tensor:
    """Return a tensor without elements, whose other sizes may multiply to more than 2**63."""
    shape = [random.choice([0, 0, size, 2**20, 2**40, 2**62]) for size in x.shape]
    shape[random.randrange(len(shape))] = 0
    return x.new_empty(0).as_strided(shape, [1] * len(shape))


def empty(x: Tensor) -> Tensor:
    return x.new_empty([random.choice([0, size]) for size in x.shape])


def fake(x: Tensor) -> Tensor:
    with FakeTensorMode() as mode:
        whole = mode.from_tensor(torch.cat([x.flatten(), x.flatten()]))
        return whole[x.numel() :].view(x.shape) if random.random() < 0.5 else mode.from_tensor(x)


CHANGES: list[Callable[[Tensor], Any]] = [
    freed,
    cut,
    view_of_freed,
    overlapping,
    empty,
    fake,
    Wrapper,
    lambda x: x.new_ones(()).expand(x.shape),
    lambda x: x.to("meta"),
    lambda x: x.to_sparse(),
    lambda x: x.to_sparse_csr(),
    lambda x: torch.nested.nested_tensor([x, x]),
    lambda x: torch.nested.nested_tensor([x, x], layout=torch.jagged),
    lambda x: torch.complex(x, x).conj(),
    lambda x: torch.view_as_complex(torch.stack([x, x], -1)).conj().imag,
    lambda x: torch._efficientzerotensor(x.shape, dtype=x.dtype),
    lambda x: x.mT.contiguous().mT,
    lambda x: x.bfloat16() if x.is_floating_point() else x + random.choice([-(2**62), -1, 1000, 2**62]),
    lambda x: x.double(),
    lambda x: x[..., ::2],
    lambda x: x.tolist(),
    lambda x: None,
]


def changed(x: Tensor) -> Any:
    """Return x after a random one of `CHANGES`, or x itself where that change does not apply to it."""
    try:
        return random.choice(CHANGES)(x)
    except (RuntimeError, TypeError, IndexError):
        return x


def derivatives(y: Any, leaves: list[Tensor], later: Tensor | None) -> None:
    y = [t for t in tree_leaves(y) if isinstance(t, Tensor) and t.requires_grad]
    ones = [torch.ones_like(t).requires_grad_() for t in y]
    if later is not None:
        later.untyped_storage().resize_(0)
    first = torch.autograd.grad(y, leaves, ones, create_graph=True, allow_unused=True)
    torch.autograd.grad(sum(g.sum() for g in first if g is not None), [*leaves, *ones], allow_unused=True)


def call_op(backend: str) -> None:
    spec = random.choice(list(SPECS.values()))
    dtype = random.choice([torch.float64, torch.float32, torch.float32, torch.bfloat16])
    sample = random.choice(spec.samples(Make(dtype, seed=random.randrange(100))))
    values, tree = tree_flatten((sample.args, dict(sample.kwargs)))
    places = [i for i, v in enumerate(values) if isinstance(v, Tensor) and v.dim()]
    if random.random() < 0.15:  # the same change for all, so that checks of shapes pass
        make = random.choice([huge, empty, freed])
        values = [make(v) if i in places else v for i, v in enumerate(values)]
    else:
        for i in random.sample(places, min(len(places), random.choice([0, 1, 1, 1, 2]))):
            values[i] = changed(values[i])
    args, kwargs = tree_unflatten(values, tree)
    leaves = []
    for i, a in enumerate(args):
        if type(a) is Tensor and a.is_floating_point() and i not in sample.frozen:
            leaves.append(a.requires_grad_())
    mode = random.choice([nullcontext, nullcontext, torch.inference_mode, lambda: torch.autocast("cpu")])
    with mk.backend(backend), mode():
        y = spec.call(*args, **kwargs)
        if leaves and mode is not torch.inference_mode:
            derivatives(y, leaves, random.choice(leaves) if random.random() < 0.4 else None)


def call_kernel() -> None:
    name = random.choice(sorted(native.signatures()))
    letters = "TBHLNDVGM*"
    many = [0, 1, 2, 3, 2**20, 2**40, 2**61]
    sizes = {letter: random.choice(many if random.random() < 0.2 else [0, 1, 2, 3, 4]) for letter in letters}
    sizes["1"] = 1
    inputs: list[Any] = []
    for a in native.signatures()[name].inputs:
        shape = [times * sizes[size] for times, size in a.dims] or [sizes["*"]]
        if a.optional and random.random() < 0.3:
            inputs.append(None)
            continue
        if 0 in shape:
            x = torch.empty(0).as_strided(shape, [1] * len(shape))
        else:
            x = torch.ones(()).expand(shape) if max(shape) > 100 else torch.randn(shape)
        x = x.long() if a.indices else x
        inputs.append(changed(x) if random.random() < 0.2 and max(shape) < 100 else x)
    one = name.startswith(("layer", "rms", "cross", "lstm", "metalstm", "gru", "rnn")) and not name.endswith(
        "cotangents"
    )
    native.call(name, *inputs, scalars=(1.0, 0.0, 0.0) if name.startswith("attention") else (1.0,) * one)


def call_product() -> None:
    T, M, N, K = (random.choice([0, 1, 2, 3, 5]) for _ in range(4))
    operands = [torch.randn(T, M, K), torch.randn(T, K, N), torch.randn(T, M, N) if random.random() < 0.5 else None]
    i = random.randrange(3)
    if operands[i] is not None:
        operands[i] = changed(operands[i])
    native.product(*operands, reuse=random.random() < 0.5)


if __name__ == "__main__":
    seed, rounds, backends = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:] or ["auto", "reference"]
    random.seed(seed)
    torch.manual_seed(seed)
    torch.set_num_threads(2)
    warnings.simplefilter("ignore")
    kinds: list[Callable[[], None]] = [lambda: call_op(random.choice(backends))] * 4
    if native.C is not None:
        kinds += [call_kernel, call_product]
    results = 0
    for number in range(rounds):
        if os.environ.get("VERBOSE"):
            print(number, flush=True)
        try:
            random.choice(kinds)()
            results += 1
        except Exception as error:
            if "INTERNAL ASSERT" in str(error) and "metakern" in str(error):
                raise
            if os.environ.get("VERBOSE"):
                print("   ", type(error).__name__, str(error)[:200].replace("\n", " | "), flush=True)
    print(f"{rounds} calls, {results} results")
