"""Time every rule of every recurrent cell, beside torch.nn, a loop over cells, and torch.mm.

    python -m benchmarks.recurrent [--cells lstm,gru,rnn] [--rounds 7] [--threads 2] [--quick]

A size is T x B x L x H: tasks with weights of their own, sequences of a task, steps, hidden units (and as many inputs).
The columns are

    forward, jvp, vjp, vjp_jvp    milliseconds of a rule with all inputs differentiated
    /vjp          the time of vjp_jvp over that of vjp
    torch/        the time of forward and backward of torch.nn's layer, one call for each task, over that of our forward
                  and vjp
    loop/         the time of a Hessian-vector product, reverse over reverse, by a loop over torch.nn's cells, over that
                  of ours
    recurrence    the rate of the products inside the recurrence, forward and back, over the rate of torch.mm at
                  1024 x 1024 in the same rounds

Every round runs everything once; ratios are medians of ratios within a round, with their quartiles. Results go to the
part "recurrent" of the machine's file in benchmarks/results.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import results
from benchmarks.options import Parser, kept, positive
from metakern import native
from metakern.ops import SPECS, gru, lstm, rnn

CELLS = {"lstm": 4, "gru": 3, "rnn": 1}  # rows of the weights for each hidden unit
SIZES = [
    (1, 8, 64, 64), (1, 8, 64, 256), (1, 8, 64, 1024), (1, 1, 64, 256), (1, 64, 64, 256), (1, 8, 16, 256),
    (1, 8, 512, 256), (8, 1, 64, 256), (8, 8, 20, 256), (32, 8, 16, 64), (32, 2, 32, 64), (8, 1, 16, 1024),
    (1, 1, 512, 64), (1, 64, 16, 1024),
]  # fmt: skip
QUICK = [(8, 8, 20, 256), (32, 2, 32, 64)]
SQUARE = 1024


class Size:
    """One size of a layer with T tasks: the tensors of its rules, and the calls that are timed."""

    def __init__(self, cell: str, T: int, B: int, L: int, H: int) -> None:
        self.cell, self.sizes, rows = cell, (T, B, L, H), CELLS[cell] * H
        torch.manual_seed(0)
        self.states = tuple(torch.randn(T, B, H) for _ in range(2 if cell == "lstm" else 1))
        weights = [torch.randn(T, *shape) * H**-0.5 for shape in ((rows, H), (rows, H), (rows,), (rows,))]
        self.inputs = torch.randn(T, B, L, H), *self.states, *weights
        self.rules = SPECS[cell].op.kernels["cpu"]
        self.y, self.r = self.rules.forward(self._constants(), self.inputs)
        self.t_inputs, self.ct, self.t_ct = (tuple(map(torch.randn_like, ts)) for ts in (self.inputs, self.y, self.y))
        self.t_y, self.t_r = self.rules.jvp(self._constants(), self.inputs, self._residuals(), self.t_inputs)
        self.from_vjp = self.vjp()[len(self.inputs) :]
        self.flop = 4 * T * B * L * rows * H  # of forward: two products

    def _constants(self, from_vjp: Any = None) -> SimpleNamespace:
        needs = (True,) * len(self.inputs)
        return SimpleNamespace(lengths=None, reverse=False, nonlinearity="tanh", needs=needs, from_vjp=from_vjp)

    def _residuals(self, tangents: bool = False) -> tuple[Tensor, ...]:
        r, y = (self.t_r, self.t_y) if tangents else (self.r, self.y)
        return (*r, *y) if SPECS[self.cell].op.saves_output else r

    def forward(self) -> Any:
        return self.rules.forward(self._constants(), self.inputs)

    def jvp(self) -> Any:
        return self.rules.jvp(self._constants(), self.inputs, self._residuals(), self.t_inputs)

    def vjp(self) -> Any:
        return self.rules.vjp(self._constants(), self.inputs, self._residuals(), self.ct)

    def vjp_jvp(self) -> Any:
        tangents = self.t_inputs, self._residuals(tangents=True)
        constants = self._constants(self.from_vjp)
        return self.rules.vjp_jvp(constants, self.inputs, self._residuals(), *tangents, self.ct, self.t_ct)

    def recurrence(self) -> tuple[Callable[[], Any], Callable[[], Any]]:
        """Return calls of the kernels that run over time, of forward and of vjp."""
        T, B, L, H = self.sizes
        name, u = ("rnn_tanh" if self.cell == "rnn" else self.cell), torch.randn(T, B, L, CELLS[self.cell] * H)
        w_hh, b_hh, residuals = self.inputs[-3], self.inputs[-1], self._residuals()
        own = (b_hh,) if self.cell == "gru" else ()
        kept = residuals[1:2] if self.cell == "rnn" else (residuals[0], residuals[-1])
        states, nothing = self.states, (None,) * (len(self.states) + 1)
        return (
            lambda: native.call(f"{name}_forward", u, w_hh, *own, *states, None, scalars=(0.0,)),
            lambda: native.call(f"{name}_vjp", self.ct[0], w_hh, *kept, *nothing, scalars=(0.0,)),
        )

    def first_order_of_torch(self) -> Callable[[], Any]:
        """Return a call of forward and backward of torch.nn's layer for every task."""
        T, _, _, H = self.sizes
        layers = [getattr(nn, self.cell.upper())(H, H, batch_first=True) for _ in range(T)]
        x = self.inputs[0].clone().requires_grad_()
        parameters = [p for layer in layers for p in layer.parameters()]

        def run() -> None:
            states = [tuple(s[t : t + 1] for s in self.states) for t in range(T)]
            outputs = [
                layer(x[t], states[t] if self.cell == "lstm" else states[t][0])[0] for t, layer in enumerate(layers)
            ]
            torch.autograd.grad(outputs, [x, *parameters], [self.ct[0][t] for t in range(T)])

        return run

    def second_order(self) -> tuple[Callable[[], Any], Callable[[], Any]]:
        """Return calls of a Hessian-vector product in the weights, by a loop over torch.nn's cells and by the op."""
        T, _, L, H = self.sizes
        cell = getattr(nn, ("RNN" if self.cell == "rnn" else self.cell.upper()) + "Cell")
        cells = [cell(H, H) for _ in range(T)]
        x, weights = self.inputs[0], [w.clone().requires_grad_() for w in self.inputs[-4:]]

        def loop() -> None:
            for t, one in enumerate(cells):
                state: Any = tuple(s[t] for s in self.states) if self.cell == "lstm" else self.states[0][t]
                outputs = []
                for l in range(L):
                    state = one(x[t, :, l], state)
                    outputs.append(state[0] if self.cell == "lstm" else state)
                parameters = list(one.parameters())
                ct = self.ct[0][t].unbind(1)
                grads = torch.autograd.grad(outputs, parameters, ct, create_graph=True)
                torch.autograd.grad(grads, parameters, [v[t] for v in self.t_inputs[-4:]])

        def ours() -> None:
            op = {"lstm": lstm, "gru": gru, "rnn": rnn}[self.cell]
            state: Any = self.states if self.cell == "lstm" else self.states[0]
            y = op(x, state, *weights)[0]
            grads = torch.autograd.grad(y, weights, self.ct[0], create_graph=True)
            torch.autograd.grad(grads, weights, self.t_inputs[-4:])

        return loop, ours


def seconds(f: Callable[[], Any], least: float = 0.02) -> float:
    """Return the seconds of one call, the mean over as many calls as take `least` seconds."""
    count, start = 0, time.perf_counter()
    while (passed := time.perf_counter() - start) < least or not count:
        f()
        count += 1
    return passed / count


def quartiles(values: list[float]) -> list[float]:
    """Return [median, lower quartile, upper quartile]."""
    low, middle, high = statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
    return [middle, low, high]


def measure(cell: str, size: tuple[int, int, int, int], rounds: int) -> dict[str, Any]:
    problem = Size(cell, *size)
    forward, back = problem.recurrence()
    loop, ours = problem.second_order()
    a = torch.randn(SQUARE, SQUARE)
    runs = {
        "forward": problem.forward,
        "jvp": problem.jvp,
        "vjp": problem.vjp,
        "vjp_jvp": problem.vjp_jvp,
        "recurrence": forward,
        "recurrence_back": back,
        "torch": problem.first_order_of_torch(),
        "cell_loop": loop,
        "second_order": ours,
        "square": lambda: a @ a,
    }
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(seconds(run))

    def ratio(above: Callable[[dict[str, float]], float]) -> list[float]:
        return quartiles([above({name: t[i] for name, t in times.items()}) for i in range(rounds)])

    square = 2 * SQUARE**3
    return {
        "ms": {name: quartiles([t * 1e3 for t in values]) for name, values in times.items()},
        "torch_over_ours": ratio(lambda t: t["torch"] / (t["forward"] + t["vjp"])),
        "cell_loop_over_ours": ratio(lambda t: t["cell_loop"] / t["second_order"]),
        "vjp_jvp_over_vjp": ratio(lambda t: t["vjp_jvp"] / t["vjp"]),
        "recurrence_of_rate": ratio(
            lambda t: (problem.flop / (t["recurrence"] + t["recurrence_back"])) / (square / t["square"])
        ),
        "gflop_per_s": square / statistics.median(times["square"]) / 1e9,
    }


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    parser = Parser(prog=prog, description=__doc__.splitlines()[0])
    parser.add_argument("--cells", default=",".join(CELLS), help="comma-separated (default: %(default)s)")
    parser.add_argument("--rounds", type=positive, default=7, help="interleaved rounds (default: %(default)s)")
    parser.add_argument("--threads", type=positive, default=2, help="threads (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="run two sizes, and only print")
    parser.add_argument("--out", type=kept, help="file for the results (default: the machine's file)")
    args = parser.parse_args(arguments)
    if unknown := set(args.cells.split(",")) - set(CELLS):
        parser.error(f"cells must be among {', '.join(CELLS)}, got {', '.join(sorted(unknown))}")
    if native.obstacle():
        parser.error(str(native.obstacle()))
    torch.set_num_threads(args.threads)
    sizes = QUICK if args.quick else SIZES
    todo = [(cell, size) for cell in args.cells.split(",") for size in sizes]
    found: dict[str, dict[str, Any]] = {}
    start = time.perf_counter()
    print(f"{'':23}{'ms: forward':>12}{'jvp':>9}{'vjp':>9}{'vjp_jvp':>9}   /vjp  torch/  loop/  recurrence")
    for done, (cell, size) in enumerate(todo):
        name = "x".join(map(str, size))
        left = (time.perf_counter() - start) / max(done, 1) * (len(todo) - done)
        note = f"\r{done + 1} of {len(todo)}: {cell} {name}, {left:.0f} s left" if done else ""
        print(f"{note:60}", end="\r", file=sys.stderr, flush=True)
        row = found.setdefault(cell, {})[name] = measure(cell, size, args.rounds)
        ms = "".join(f"{row['ms'][rule][0]:9.2f}" for rule in ("forward", "jvp", "vjp", "vjp_jvp"))
        print(
            f"{cell:5}{name:16}  {ms:>39}  {row['vjp_jvp_over_vjp'][0]:5.2f}  {row['torch_over_ours'][0]:5.2f} "
            f"{row['cell_loop_over_ours'][0]:6.1f}  {row['recurrence_of_rate'][0]:9.0%}",
            flush=True,
        )
    if not args.quick:
        where = results.machine()
        entry = {"machine": where, "threads": args.threads, "results": found}
        results.keep(args.out or results.file(where), "recurrent", entry)


if __name__ == "__main__":
    main()
