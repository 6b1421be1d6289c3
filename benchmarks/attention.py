"""Time every rule of attention, beside PyTorch's kernels at first and second order, and beside torch.mm.

    python -m benchmarks.attention [--rounds 7] [--threads 2] [--quick]

Attention is causal, in float32. A size is B x H/H_kv x L x D: sequences, heads of q and of k and v, length, head
dimension. The columns are

    forward, jvp, vjp, vjp_jvp    milliseconds of a rule with all inputs differentiated
    rate of each   the rate of the products that a causal mask leaves (2, 5, 5 and 12 of them for each pair of a query
                   and a key that it sees), over the rate of torch.mm at 1024 x 1024 in the same rounds
    flash/         the time of forward and backward of PyTorch's flash attention for CPUs, over that of our forward and
                   vjp
    ordinary/      the time of a Hessian-vector product, reverse over reverse, by PyTorch's twice differentiable
                   attention, which holds L x L matrices, over the time of ours

Every round runs everything once; ratios are medians of ratios within a round, with their quartiles. Results go to the
part "attention" of the machine's file in benchmarks/results.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import results
from benchmarks.options import Parser, kept, positive
from benchmarks.recurrent import SQUARE, quartiles, seconds
from metakern import native
from metakern.ops import SPECS, attention

SIZES = [
    (4, 4, 4, 64, 32), (32, 4, 4, 64, 32), (8, 9, 3, 128, 64), (4, 12, 12, 256, 64), (1, 8, 8, 512, 64),
    (1, 4, 4, 1024, 32), (1, 9, 3, 1024, 64), (1, 8, 2, 2048, 128), (1, 2, 2, 4096, 64),
]  # fmt: skip
QUICK = [(32, 4, 4, 64, 32), (1, 9, 3, 1024, 64)]
PRODUCTS = {"forward": 2, "jvp": 5, "vjp": 5, "vjp_jvp": 12}
Sizes = tuple[int, int, int, int, int]


class Size:
    """One size of attention: the tensors of its rules, and the calls that are timed."""

    def __init__(self, B: int, H: int, H_kv: int, L: int, D: int) -> None:
        torch.manual_seed(0)
        self.inputs = torch.randn(B, H, L, D), torch.randn(B, H_kv, L, D), torch.randn(B, H_kv, L, D)
        self.c = SimpleNamespace(mask=None, causal=True, window=None, scale=D**-0.5, needs=(True,) * 3)
        self.rules = SPECS["attention"].op.kernels["cpu"]
        self.t_inputs = tuple(map(torch.randn_like, self.inputs))
        (self.y,), r = self.forward()
        self.r = (*r, self.y)
        (t_y,), t_r = self.jvp()
        self.t_r = (*t_r, t_y)
        self.ct, self.t_ct = torch.randn(2, *self.y.shape).unbind()
        self.pair = B * H * L * (L + 1) * D  # operations of one product under a causal mask

    def forward(self) -> Any:
        return self.rules.forward(self.c, self.inputs)

    def jvp(self) -> Any:
        return self.rules.jvp(self.c, self.inputs, self.r, self.t_inputs)

    def vjp(self) -> Any:
        return self.rules.vjp(self.c, self.inputs, self.r, (self.ct,))

    def vjp_jvp(self) -> Any:
        return self.rules.vjp_jvp(self.c, self.inputs, self.r, self.t_inputs, self.t_r, (self.ct,), (self.t_ct,))

    def flash(self) -> Any:
        """Run forward and backward of PyTorch's flash attention, which needs as many heads of k and v as of q."""
        q, k, v = self.inputs
        group = q.shape[1] // k.shape[1]
        k, v = (t.repeat_interleave(group, 1) for t in (k, v))
        leaves = [t.requires_grad_() for t in (q.detach(), k.detach(), v.detach())]
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            y = F.scaled_dot_product_attention(*leaves, is_causal=True)
            return torch.autograd.grad(y, leaves, self.ct)

    def second_order(self, f: Callable[..., Tensor]) -> Any:
        leaves = [t.detach().requires_grad_() for t in self.inputs]
        ct = torch.autograd.grad(f(*leaves), leaves, self.ct, create_graph=True)
        return torch.autograd.grad(ct, leaves, self.t_inputs)

    def ours(self) -> Any:
        return self.second_order(attention)

    def ordinary(self) -> Any:
        with sdpa_kernel(SDPBackend.MATH):
            return self.second_order(lambda *qkv: F.scaled_dot_product_attention(*qkv, is_causal=True, enable_gqa=True))


def measure(size: Sizes, rounds: int) -> dict[str, Any]:
    problem, a = Size(*size), torch.randn(SQUARE, SQUARE)
    runs = {rule: getattr(problem, rule) for rule in PRODUCTS}
    runs |= {"flash": problem.flash, "ours": problem.ours, "ordinary": problem.ordinary, "square": lambda: a @ a}
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(seconds(run))

    def ratio(above: Callable[[dict[str, float]], float]) -> list[float]:
        return quartiles([above({name: t[i] for name, t in times.items()}) for i in range(rounds)])

    def rate(rule: str, products: int) -> list[float]:
        return ratio(lambda t: products * problem.pair / t[rule] / (2 * SQUARE**3 / t["square"]))

    return {
        "ms": {name: quartiles([t * 1e3 for t in values]) for name, values in times.items()},
        "of_rate": {rule: rate(rule, products) for rule, products in PRODUCTS.items()},
        "flash_over_ours": ratio(lambda t: t["flash"] / (t["forward"] + t["vjp"])),
        "ordinary_over_ours": ratio(lambda t: t["ordinary"] / t["ours"]),
        "vjp_jvp_over_vjp": ratio(lambda t: t["vjp_jvp"] / t["vjp"]),
        "gflop_per_s": 2 * SQUARE**3 / statistics.median(times["square"]) / 1e9,
    }


def named(size: Sizes) -> str:
    B, H, H_kv, L, D = size
    return f"{B} x {H}/{H_kv} x {L} x {D}"


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    parser = Parser(prog=prog, description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=positive, default=7, help="interleaved rounds (default: %(default)s)")
    parser.add_argument("--threads", type=positive, default=2, help="threads (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="run two sizes, and only print")
    parser.add_argument("--out", type=kept, help="file for the results (default: the machine's file)")
    args = parser.parse_args(arguments)
    if native.obstacle():
        parser.error(str(native.obstacle()))
    torch.set_num_threads(args.threads)
    sizes = QUICK if args.quick else SIZES
    found: dict[str, dict[str, Any]] = {}
    start = time.perf_counter()
    print(f"{'':22}{'ms: forward':>12}{'jvp':>9}{'vjp':>9}{'vjp_jvp':>9}   rate of each             flash/  ordinary/")
    for done, size in enumerate(sizes):
        left = (time.perf_counter() - start) / max(done, 1) * (len(sizes) - done)
        note = f"\r{done + 1} of {len(sizes)}: {named(size)}, {left:.0f} s left" if done else ""
        print(f"{note:60}", end="\r" if done else "", file=sys.stderr, flush=True)
        row = found[named(size)] = measure(size, args.rounds)
        ms = "".join(f"{row['ms'][rule][0]:9.2f}" for rule in PRODUCTS)
        rates = " ".join(f"{row['of_rate'][rule][0]:5.0%}" for rule in PRODUCTS)
        ratios = f"{row['flash_over_ours'][0]:6.2f}  {row['ordinary_over_ours'][0]:9.2f}"
        print(f"{named(size):22}{ms:>39}   {rates}  {ratios}", flush=True)
    if not args.quick:
        where = results.machine()
        entry = {"machine": where, "threads": args.threads, "results": found}
        results.keep(args.out or results.file(where), "attention", entry)


if __name__ == "__main__":
    main()
