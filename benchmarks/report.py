"""Write RESULTS.md, the tables of README.md and of the docs, and the pictures, from the files in benchmarks/results.

On a page each table stands between `<!-- name -->` and `<!-- /name -->`. A test fails if a page and the results differ.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from benchmarks import gpu_tables as gpu
from benchmarks.dialogue import tables as dialogue
from benchmarks.manager_tables import hints_table, parsers_table, policies_table, slots_table
from benchmarks.options import Parser
from benchmarks.pictures import bases, draw, markup, stem
from benchmarks.results import FOLDER, ROOT, machine
from benchmarks.runs_tables import (
    crashes_table,
    damage_table,
    equality_table,
    fsdp_table,
    ratio_table,
    soak_table,
)
from benchmarks.tables import (
    ONE_CORE,
    algorithms_tables,
    attention_table,
    curve_table,
    measured,
    methods_table,
    ops_table,
    recurrent_table,
    serving_table,
    summary_table,
    sweep_table,
)
from benchmarks.targets import recurrent_targets_table, targets_table
from benchmarks.workloads import WorkloadName

FULL = Path(__file__).parent / "RESULTS.md"
ABOUT = """\
This page is written by `python -m benchmarks.report` from the files in `results`. `metakern bench maml` repeats the
measurements of the meta-gradient, from a clone or an installed wheel (`pip install metakern[bench]`). That takes
hours, and an interrupted run goes on where it stopped. `--quick` takes small workloads and no peer but plain PyTorch,
`--workloads gpt:large,length=512` takes one workload, and `--sweep K,tasks` takes every workload at several sizes. A
workload is a size of a family (`gpt:large`); a family is a TOML file in `workloads`, and anybody can add one.

What is measured is one exact second-order meta-gradient, by metakern ("ours") and by its peers: plain PyTorch
(autograd over a loop of tasks), learn2learn, higher, TorchOpt, parallel-metalearn, torch.func, torch.compile, and JAX
in its best forms. Each method runs in a process and an environment of its own, on the same weights and data, and must
agree with a meta-gradient in float64.

- Times are medians of interleaved rounds: 5 rounds for the large workloads except mlp:large, for the sweeps of the GPT
  and for the ops, 7 rounds for the others. Ratios are medians of ratios within a round, so they can differ from the
  ratio of two medians.
- Memory is the peak of one meta-gradient, less the memory of the idle process. "Kept" is what stays in memory between
  two meta-gradients.
- "Of peak" is the rate of the matrix products over the machine's peak. The rate is their counted floating-point
  operations over the time of the whole meta-gradient. The peak is the rate of multiply-adds in registers, which no
  product can exceed: on all threads, with the widest vectors, in the same rounds, the best of which counts. Products
  are counted as plain autograd computes them, and attention without its causal mask.
- Ours is either the default, `metakern.MAML(model, loss)` without options, or captured: `metakern auto` with
  `capture=True`, which records at the first call. The default records at the third call. Its time is that of later
  calls, and its "first call" is the sum of the four calls before.
- A method that needs a compiler is given 90 seconds to half an hour to get ready, as each workload says where it was
  too little; "first call" says what it took."""
ONE = "The same machine with `--cores 1`: one core, one thread."
TARGETS = "The targets that we set for this machine, and what was measured:"
WHY_NOT = """\
Why some targets are missed:

- *As lean as any peer* (the perceptrons, the RNNs, the small GPT): a loop over tasks in plain PyTorch, or in JAX for
  the large perceptron and the large RNN, holds one task at a time and no copy of it. We run one task on each of two
  threads, and hold two. The loop takes a multiple of our time.
- *Memory with recompute*, over first order and over K: `recompute` keeps the adapted weights after some steps,
  four of 16, for each of the two tasks that run at once, beside the activations of one step. A program that runs in
  C++ holds little else, so these weights are what grows with K, and a first-order step does not keep them. With LoRA
  they are small, but the activations of the frozen base are more at second order than in a first-order step.
- *First call* (captured): it verifies the plan in float64 by plain autograd, which holds L x L matrices at length
  1024; it records the program; and it confirms the program by ordinary runs. For large models each of these takes
  seconds.
- *Memory with store at length 1024*: `store` keeps the graph of all three steps; `recompute` is the strategy for long
  sequences. The peak varies from process to process, as does that of the ordinary run that confirms a program."""
RECURRENT = """\
The LSTM by tasks T, sequences B, steps L and hidden units H (`python -m benchmarks.recurrent`; the results of GRU and
RNN are in the file).

- "torch.nn / ours": the time of forward and backward of `torch.nn.LSTM`, one call for each task, over the time of our
  forward and vjp.
- "cells / ours": the time of a Hessian-vector product by a loop over `nn.LSTMCell`, over that of ours.
- "rate": the rate of the matrix products inside the recurrence, over the rate of torch.mm."""
BATCH_1 = """\
The targets for the LSTM. At batch 1 every step reads all recurrent weights, so the rate is limited by the caches, and
by memory where the weights exceed the caches:"""
ALGORITHMS = """\
Every algorithm on three small workloads (`python -m benchmarks.algorithms`), with the same tasks and number of outer
steps: query losses of test tasks after 0 to 10 inner steps, the median of the seeds [least, greatest]; the rates, which
were chosen on validation tasks; the time of an outer step over that of MAML's [quartiles]; and the peak memory of a
step. Algorithms that are missing from a table do not apply to its workload, or have not been measured on it."""
DIALOGUE = """\
How much better dialogue models adapt to unseen tasks when MAML has trained them (`python -m benchmarks.dialogue`). The
run and its contenders have the same model, pretrained weights, episodes and number of outer steps, and for each number
k of inner steps the inner rate that is best on validation tasks. A test task whose support does better at half a decade
less takes that rate (in the newer cells of results/dialogue.json, which have `lowered`). The table has the perplexity
of a contender over that of MAML, within each task [95% interval over tasks]; above 1, MAML is better. "Best plain" is
the best of the contenders without meta-learning at that k, chosen on the test tasks themselves. A seed decides the
split into tasks, the weights and the episodes; a task that several seeds test counts once."""
REPLIES = """\
The share of questions that are answered right after k inner steps, greedily: "taught" ones are in the support, "unseen"
ones in the query. `metakern.dialogue.replies` says what is right."""
LESSONS = """\
Taught as in `metakern chat`, until all taught replies come out or 60 steps are taken: the inner steps, and the shares
of the replies in taught and in unseen conversations that the model gives, greedily, each after the bot's own replies
before it. All begin with as many steps as in training, at the run's rates; steps of Adam follow
(results/lessons.json)."""
PROCESSES = """\
Training in several processes of one machine (`python -m benchmarks.scaling`), 7 tasks a step, 50 steps, against one
process: the relative difference of weights and moments, the largest over all algorithms, with whole parameters and with
those that `--shard` divides."""
FSDP = "A Llama of 4 layers in float64, in a loop of its own that FSDP2 divides, after 50 steps:"
RATIO = "The time of a step of two processes, a thread each, over that of one process with all tasks:"
CRASHES = """\
Commands that are killed or hindered where they touch the disk, and go on (`python -m benchmarks.crashes`). "Right" is a
run that is in the end, bit for bit, the one that nothing happened to."""
SOAK = """\
What a process holds over thousands of outer steps on batches of many shapes, with evaluations in between (`python -m
benchmarks.soak`): after a quarter of the steps, by when every shape has come, and at the end."""
DAMAGE = """\
Damage to the files of a run (`python -m benchmarks.damage`): refused in one line, replaced by the checkpoint before,
harmless as the run is the same, or not noticed ("silent")."""
GPU = """\
`python -m benchmarks.gpu`, from a clone on a machine with a GPU. A check compares all orders of an op, or a
meta-gradient, with float64. Its error may be twice that of plain PyTorch in the same dtype, and some units of rounding
more."""
GPU_WORKLOADS = """\
One exact second-order meta-gradient, in milliseconds. "Captured" is `capture=True`, guards and copies included.
torch.func is reverse over reverse and vmap; as a CUDA graph it is its kernels alone, recorded by hand for one batch."""
GPU_ATTENTION = """\
Causal attention in bfloat16, 16,384 tokens of width 2048, TFLOP/s of the products that the mask leaves (2, 5, 5 and 12
for the four rules), beside PyTorch's flash attention, which serves our forward and vjp."""
GPU_META = """\
One exact second-order meta-gradient of a Llama in bfloat16: 8 layers of width 1024, 32,000 tokens in the vocabulary,
sequences of 2048 tokens, two inner steps on all weights. Time, and the peak of memory beyond the model. The model
asks whether a graph is recorded, and then has eager attention; metakern hides it."""
GPU_OPS = """\
The rules of the other ops: bytes that they must move over those that a copy moves in the same time, or, where that is
more, their operations over those of a large product in bfloat16. Arguments of tasks have 256 MiB, several times the
caches; those of "shared" and of one task are smaller. A copy moves less than the memory could, so more than 100% is
possible."""
GPU_PRODUCTS = """\
Products of float32, microseconds: y = a b for T tasks, a [N, K] and b [K, M], with a bias, a second product or the sums
of a's rows. PyTorch's take a call for each, in float32 arithmetic; ours is one kernel, in parts of TF32 or bfloat16."""
GPU_RECURRENT = "An LSTM layer with one task by sequences B, steps L and hidden units H, in milliseconds:"
ATTENTION = """\
Causal attention in float32, by sequences B, heads H of q and H_kv of k and v, length L and head dimension D (`python
-m benchmarks.attention`).

- "rate of vjp_jvp": the rate of the matrix products that a causal mask leaves, over the rate of torch.mm.
- "flash / ours": the time of forward and backward of PyTorch's flash attention, which has no second derivative, over
  the time of our forward and vjp.
- "ordinary / ours": the time of a Hessian-vector product by PyTorch's twice differentiable attention, over that of
  ours."""
OPS = """\
The rules of every op (`metakern bench ops`): those of the C++ kernels if the op has some, else of the reference. GB/s
and GFLOP/s are in the file.

- "of the limit", for each of the four rules: the limit over the time. The limit is the time of a copy of as many
  bytes, or of a torch.mm of as many operations, whichever is longer.
- "plain / ours": the time of plain PyTorch over that of the public op, for forward, for forward and backward, and for
  a Hessian-vector product (HVP)."""


PAGES: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {
        "picture": partial(
            markup, "maml", "The time of one exact second-order meta-gradient, beside the fastest peers"
        ),
        "maml": partial(summary_table, ["medium"]),
        "dialogue": partial(
            markup,
            "dialogue",
            "How well dialogue models adapt to unseen tasks, beside plain baselines",
        ),
    },
    "docs/dialogue.md": {
        "ratios": partial(dialogue.ratios_table, (dialogue.BEST, "fomaml")),
        "replies": partial(dialogue.replies_table, ("maml", "finetune:adam", "pretrained:adam", "retrieval")),
        "lessons": dialogue.lessons_table,
        "smollm2": partial(curve_table, "smollm2"),
    },
    "docs/manager.md": {
        "parsers": parsers_table,
        "policies": policies_table,
        "hints": hints_table,
        "slots": slots_table,
    },
    "docs/serving.md": {name: partial(serving_table, name) for name in ("serving", "smollm2")},
}


def with_tables(page: str, text: str) -> str:
    """Return the page's text with its tables made anew."""
    for name, made in PAGES[page].items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        text, found = re.subn(pattern, lambda m, made=made: f"{m[1]}{made()}\n{m[2]}", text, flags=re.DOTALL)
        if found != 1:
            raise ValueError(f"{page}: must have one place for the table {name}, got {found}")
    return text


def full() -> str:
    """Return the text of RESULTS.md."""
    parts = ["# Results", ABOUT, "## All workloads", summary_table(), TARGETS, targets_table(), WHY_NOT]
    if measured(ONE_CORE):
        parts += ["## On one core", ONE, summary_table(machine=ONE_CORE)]
    parts.append("## One meta-gradient by method")
    for name, found in measured().items():
        parts += [f"### {name}", f"{WorkloadName.parse(name).title}.{rates(found)}", methods_table(found)]
    parts += ["## Over inner steps, tasks and lengths"] * bool(bases())
    for base, keys in bases().items():
        parts += [f"### {base}", markup(stem(base), base).replace("benchmarks/", "")]
        parts += [sweep_table(key, points) for key, points in keys.items()]
    if algorithms := algorithms_tables():
        parts += ["## Algorithms", ALGORITHMS, *algorithms]
    parts += ["## Dialogue", DIALOGUE, dialogue.ratios_table(), REPLIES, dialogue.replies_table()]
    parts += [LESSONS, dialogue.lessons_table(), dialogue.machines()]
    parts += ["## Recurrent cells", RECURRENT, recurrent_table(), BATCH_1, recurrent_targets_table()]
    parts += ["## Attention", ATTENTION, attention_table(), "## Ops", OPS, ops_table()]
    parts += ["## Many processes", PROCESSES, equality_table(), FSDP, fsdp_table(), RATIO, ratio_table()]
    parts += ["## Crashes, damage and long runs", CRASHES, crashes_table(), DAMAGE, damage_table(), SOAK, soak_table()]
    for found in gpu.gpus():
        parts += [f"## {gpu.title(found)}", GPU, gpu.about(found), gpu.checks(found), GPU_WORKLOADS]
        parts += [gpu.workloads(found), GPU_META, gpu.meta(found), GPU_ATTENTION, gpu.attention(found)]
        parts += [GPU_OPS, gpu.ops(found), GPU_PRODUCTS, gpu.products(found), GPU_RECURRENT, gpu.recurrent(found)]
    return "\n\n".join(parts) + "\n"


def rates(found: dict) -> str:
    """The operations of a workload's products, and the rates of the machine, as sentences."""
    if "gflop" not in found:
        return ""
    peaks = (f"{rate:.0f} GFLOP/s in {dtype}" for dtype, rate in found.get("peak_gflop_per_s", {}).items())
    peak = ", ".join(peaks) or "not measured"
    return f" Its products: {found['gflop']:.2f} GFLOP. Peak: {peak}; torch.mm: {found['gflop_per_s']:.0f} GFLOP/s."


def keep_curve(name: str, run: Path) -> None:
    """Copy the adaptation curve of a run of `make name` to the results, with this machine and the validation losses."""
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


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    parser = Parser(prog=prog, description=(__doc__ or "").splitlines()[0])
    for name in ("smollm2",):
        text = f"first copy the adaptation curve of this run to results/{name}.json"
        parser.add_argument(f"--{name}", type=Path, metavar="RUN", help=text)
    for name, folder in vars(parser.parse_args(arguments)).items():
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
