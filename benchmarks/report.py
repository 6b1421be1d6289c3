"""The tables of the pages, RESULTS.md and the pictures, from the results: `python -m benchmarks.report`.

On a page each table stands between `<!-- name -->` and `<!-- /name -->`; a test fails where the results disagree.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

from benchmarks.options import Parser
from benchmarks.pictures import bases, draw, markup, stem
from benchmarks.results import FOLDER, ROOT, machine
from benchmarks.tables import (
    attention_table,
    curve_table,
    measured,
    methods_table,
    ops_table,
    recurrent_table,
    summary_table,
    sweep_table,
)
from benchmarks.targets import recurrent_targets_table, targets_table
from benchmarks.workloads import WorkloadName

FULL = Path(__file__).parent / "RESULTS.md"
ABOUT = """\
Written by `python -m benchmarks.report` from the files in `results`. `metakern bench maml` measures all of it again,
from a fresh clone or an installed wheel (`pip install metakern[bench]`), which takes hours, and goes on where it was
interrupted; `--quick` takes small workloads and no peer but plain PyTorch, `--workloads gpt:large,length=512` one
workload, `--sweep K,tasks` every workload over sizes. A workload is a family of `workloads`, a file that anybody can
add.

Measured is one exact second-order meta-gradient, by metakern and its peers: plain PyTorch (autograd over a loop of
tasks), learn2learn, higher, TorchOpt, parallel-metalearn, torch.func, torch.compile and JAX in its best forms, each
in a process and an environment of its own, on the same weights and data, and in agreement with float64. Times are
medians of interleaved rounds: 5 for large workloads, the sweeps of the GPT, the ops and compat, 7 for the others;
memory is the peak over the idle process. "Of the limit": the counted operations of the products at the rate of
torch.mm, measured in the same rounds, over the time; above 100% is what products of our own gain. "Kept" stays in
memory between two meta-gradients. Ours is "metakern auto", told by `capture=True` to record at the first call, so
that this call holds all that comes before the measured speed."""
TARGETS = "What we set out to reach on this machine, and what it came to:"
WHY_NOT = """\
Why not: a loop over tasks in plain PyTorch, or JAX's for the large perceptron and RNN, holds one task and no copy of
it, which two threads with a task each can't undercut, at a multiple of our time (the perceptrons, the RNNs, the small
GPT). `recompute` keeps the adapted weights of every step, of each of the two tasks in flight, beside one step's
activations: where an executable leaves little else, that is what grows with K, and what a first-order step does not
hold. Under LoRA those weights are small, but the base's activations at second order are more than a first-order
step's. The first call is the verification of the plan in float64, by plain autograd with its L x L matrices at length
1024, the recording, and the ordinary runs that confirm it; large models take seconds for each. `store` keeps the
graph of three steps, and `recompute` is what there is for length; its peak varies from process to process, as that of
the ordinary run that confirms a recording does."""
RECURRENT = """\
The LSTM by tasks T, sequences B, steps L and hidden units H (`python -m benchmarks.recurrent`; GRU and RNN are in the
file). "torch.nn / ours": forward and backward of `torch.nn.LSTM`, a call a task, over our forward and vjp; "cells /
ours": a Hessian-vector product by a loop over `nn.LSTMCell`, over ours; "rate": of the recurrence's products, as a
part of torch.mm's."""
BATCH_1 = """\
At batch 1 every step reads all recurrent weights, so that the rate is that of the caches, and beyond them of memory:"""
ATTENTION = """\
By sequences B, heads of q and of k and v, length L and head dimension D, causal, in float32 (`python -m
benchmarks.attention`). "Rate": of the products that a causal mask leaves, as a part of torch.mm's; "flash / ours":
forward and backward of PyTorch's flash attention, which has no second derivative, over our forward and vjp; "ordinary
/ ours": a Hessian-vector product by PyTorch's twice differentiable attention, over ours."""


OPS = """\
Every rule of every op, of the CPU's kernels where it has some (`metakern bench ops`; GB/s and GFLOP/s are in the file).
"Of the limit", of the four rules: the longer of a copy of as many bytes and torch.mm of as many operations, over the
time. "Plain / ours": plain PyTorch's time over that of the public op, forward, forward and backward, and a
Hessian-vector product."""


PAGES: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {
        "picture": partial(
            markup, "maml", "The time of one exact second-order meta-gradient, beside the fastest peers"
        ),
        "maml": partial(summary_table, ["medium"]),
    },
    "docs/dialogue.md": {"demo": partial(curve_table, "demo"), "smollm2": partial(curve_table, "smollm2")},
}


def with_tables(page: str, text: str) -> str:
    """The page with its tables made anew."""
    for name, made in PAGES[page].items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        text, found = re.subn(pattern, lambda m, made=made: f"{m[1]}{made()}\n{m[2]}", text, flags=re.DOTALL)
        if found != 1:
            raise ValueError(f"{page}: must have one place for the table {name}, got {found}")
    return text


def full() -> str:
    """RESULTS.md: all workloads, each by method, every sweep, the recurrent cells, attention, every op."""
    parts = ["# Results", ABOUT, "## All workloads", summary_table(), TARGETS, targets_table(), WHY_NOT]
    parts.append("## One meta-gradient by method")
    for name, found in measured().items():
        parts += [f"### {name}", f"{WorkloadName.parse(name).title}.{limit(found)}", methods_table(found)]
    parts += ["## Over inner steps, tasks and lengths"] * bool(bases())
    for base, keys in bases().items():
        parts += [f"### {base}", markup(stem(base), base).replace("benchmarks/", "")]
        parts += [sweep_table(key, points) for key, points in keys.items()]
    parts += ["## Recurrent cells", RECURRENT, recurrent_table(), BATCH_1, recurrent_targets_table()]
    parts += ["## Attention", ATTENTION, attention_table(), "## Ops", OPS, ops_table()]
    return "\n\n".join(parts) + "\n"


def limit(found: dict) -> str:
    if "limit_ms" not in found:
        return ""
    return f" Its products alone: {found['limit_ms']:.1f} ms at {found['gflop_per_s']:.0f} GFLOP/s."


def keep_curve(name: str, run: Path) -> None:
    """The curve of `make name`, with the machine it was measured on, and the losses on validation tasks on the way."""
    report = json.loads((run / "eval.json").read_text())
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    validation = [
        {"step": row["step"], "before": row["validation_before"], "after": row["validation_after"]}
        for row in log
        if "validation_before" in row
    ]
    kept = {"machine": machine(), **report, "run": f"runs/{name}", "validation": validation}
    (FOLDER / f"{name}.json").write_text(json.dumps(kept, indent=1) + "\n")
    shutil.copyfile(run / "eval.png", FOLDER / f"{name}.png")


def main() -> None:
    parser = Parser(description=__doc__)
    for name in ("demo", "smollm2"):
        parser.add_argument(f"--{name}", type=Path, metavar="RUN", help=f"first keep this run's curve as {name}'s")
    for name, folder in vars(parser.parse_args()).items():
        if not folder:
            continue
        try:
            keep_curve(name, folder)
        except FileNotFoundError as error:
            parser.error(f"--{name} must be the folder of an evaluated run, and has no {error.filename}")
    for page in PAGES:
        (ROOT / page).write_text(with_tables(page, (ROOT / page).read_text()))
    FULL.write_text(full())
    draw()


if __name__ == "__main__":
    main()
