"""Build, check and time the kernels on a GPU.

    python -m benchmarks.gpu [--only checks,attention] [--match norm] [--budget 480] [--tiny]

    checks      compare all orders of every op with Triton kernels, of every recurrent cell, and the meta-gradient of a
                Llama with float64; the error must be at most twice that of plain PyTorch in the same dtype
    engine      compare the meta-gradients of all workloads by every method, and of all algorithms, likewise
    training    train small dialogue models on the GPU and the CPU: all losses must be the same up to rounding
    workloads   time the meta-gradients of all workloads: captured or not, beside torch.func and plain PyTorch
    attention   time every rule beside PyTorch's flash attention, lengths 512 to 8192
    memory      the memory of attention at both orders, lengths 4096 to 32,768
    meta        time the second-order meta-gradient of a Llama at length 2048, beside plain PyTorch with eager attention
    ops         time every rule of every other op, beside a copy's bandwidth and the rate of a large product
    products    time products of float32, with biases, sums or second products, beside PyTorch
    recurrent   time the recurrent cells, beside cuDNN and plain PyTorch
    sanitizer   look for bad accesses and races at small sizes by compute-sanitizer, if it is installed

A time is the median over replays of a CUDA graph with several calls. Kernels that are timed first run in several
processes at once, so that Triton compiles them in parallel. A row that fails, or that the budget of seconds does not
cover, has an error; the other rows go on. Rows go to benchmarks/results/<GPU>.json as they come, and at
the end the targets, met or not. --match takes only the rows whose labels a regular expression finds; the file keeps the
other rows. The exit code is 2 without a GPU and 1 if a check fails. --tiny tries the program
itself, on the CPU under TRITON_INTERPRET=1; its times mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import attention, checks, dialogue, engine, llama, measure, ops, products, recurrent
from benchmarks.gpu.pool import Job, Pool, Row, prepare
from benchmarks.gpu.targets import failures, targets
from benchmarks.results import machine
from metakern import native

ROOT = Path(__file__).parent.parent.parent
RESULTS = ROOT / "benchmarks" / "results"
AT_ONCE = 12  # processes that share the GPU while nothing is timed
SMALL = {"recurrent": recurrent.small, "ops": checks.small}  # part -> its checks; "metakern" is in its kernels' names
Jobs = Iterable[Job]
# Part -> its jobs, and how they run: "at once", in all processes; "compiled", in one, after all processes have run them
# once to compile the kernels; or "alone", in one.
PARTS: dict[str, tuple[Callable[[Row, bool], Jobs], str]] = {
    "checks": (lambda limits, tiny: chain(checks.jobs(tiny), llama.checks(tiny), recurrent.checks(tiny)), "at once"),
    "engine": (lambda limits, tiny: engine.checks(tiny), "at once"),
    "training": (lambda limits, tiny: dialogue.checks(tiny), "at once"),
    "attention": (lambda limits, tiny: attention.jobs(tiny), "compiled"),
    "workloads": (lambda limits, tiny: engine.jobs(tiny), "alone"),
    "memory": (lambda limits, tiny: attention.memory_jobs(tiny), "alone"),
    "meta": (lambda limits, tiny: llama.jobs(tiny), "alone"),
    "ops": (ops.jobs, "compiled"),
    "products": (lambda limits, tiny: products.jobs(tiny), "compiled"),
    "recurrent": (lambda limits, tiny: recurrent.jobs(tiny), "alone"),
}


def rows(pool: Pool, jobs: list[Job], how: str, at_once: int) -> Iterator[Row]:
    if how == "compiled" and at_once > 1:
        for _ in pool.rows(jobs, at_once):
            pass
    return pool.rows(jobs, at_once if how == "at once" else 1)


def sanitized(tool: str, part: str, seconds: float) -> Row:
    """Run a part's small checks under a tool of compute-sanitizer; return a row with its result."""
    label = {"tool": tool, "part": part}
    program = shutil.which("compute-sanitizer")
    if program is None:
        return label | {"error": "compute-sanitizer is not on the path"}
    command = [program, "--tool", tool, "--error-exitcode", "9", "--kernel-name", "kns=metakern"]
    try:
        run = subprocess.run(
            [*command, sys.executable, "-m", "benchmarks.gpu", "--small", part],
            cwd=ROOT,
            env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            capture_output=True,
            text=True,
            timeout=max(seconds, 1),
            check=False,
        )
    except subprocess.TimeoutExpired:
        return label | {"error": "the time is up"}
    if run.returncode == 0:
        return label | {"good": True}
    lines = [line for line in (run.stdout + run.stderr).splitlines() if line.startswith("=====") or "Error" in line]
    return label | {"error": "\n".join([*dict.fromkeys(lines)][:12])}  # many hazards are reported by the same lines


def sanitizer(seconds: float) -> Iterator[Row]:
    """Run all tools on all parts; they run at the same time, because nothing is timed."""
    cases = [(tool, part, seconds) for part in SMALL for tool in ("memcheck", "racecheck")]
    with ThreadPoolExecutor(len(cases)) as threads:
        yield from threads.map(lambda case: sanitized(*case), cases)


def compilers() -> dict[str, str]:
    nvcc = shutil.which("nvcc")
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout if nvcc else ""
    release = re.search(r"release ([\d.]+)", said)
    return {
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "",
        "cuda": str(torch.version.cuda),
        "cudnn": str(torch.backends.cudnn.version()),
        "nvcc": release[1] if release else "",
    }


def build() -> None:
    """If this checkout has no compiled kernels, build them and restart this program."""
    if native._cuda is None or native.C is None:
        env = os.environ | {"METAKERN_NATIVE": "cuda"}
        subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=ROOT, env=env, check=True)
        os.execv(sys.executable, [sys.executable, "-m", "benchmarks.gpu", *sys.argv[1:]])


def table(found: list[Row]) -> str:
    lines = []
    for row in found:
        value = "not measured" if row["value"] is None else f"{row['value']:.2f}"
        lines.append(f"{'met' if row['met'] else 'NOT':4}{row['target']}: {value} ({row['bound']}) {row['where']}")
    return "\n".join(lines)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="benchmarks.gpu", description=(__doc__ or "").split("\n", 1)[0])
    names = (*PARTS, "sanitizer")
    parser.add_argument("--only", help="comma-separated parts; the file keeps its other parts (default: all)")
    parser.add_argument("--match", default="", help="regular expression: only the rows whose label it finds")
    parser.add_argument("--budget", type=float, default=480, help="seconds for the whole run (default: %(default)s)")
    parser.add_argument("--out", type=Path, help="file for the results (default: benchmarks/results/<GPU>.json)")
    parser.add_argument("--tiny", action="store_true", help="take tiny sizes, on the CPU too if TRITON_INTERPRET=1")
    parser.add_argument("--small", choices=SMALL, help=argparse.SUPPRESS)
    args = parser.parse_args()
    try:
        re.compile(args.match)
    except re.error as error:
        parser.error(f"--match must be a regular expression, got {args.match!r}: {error}")
    args.parts = args.only.split(",") if args.only else names
    for part in args.parts:
        if part not in names:
            parser.error(f"--only must name parts among {', '.join(names)}, got {part!r}")
    return args


def main() -> int:
    args, began = parsed(), time.monotonic()
    gpu = torch.cuda.is_available()
    if not gpu and not args.tiny:
        print("benchmarks.gpu: no GPU is present, or this PyTorch was built without CUDA", file=sys.stderr)
        return 2
    if gpu:
        build()
    prepare()
    if args.small:
        return 0 if SMALL[args.small]() else 1
    device = compilers()
    path = args.out or RESULTS / f"{re.sub(r'[^A-Za-z0-9]+', '-', device['gpu'] or 'no GPU')}.json"
    found: dict[str, Any] = json.loads(path.read_text()) if (args.only or args.match) and path.exists() else {}
    found["machine"] = machine() | device

    def keep(part: str, rows: Iterable[Row], labels: Sequence[Row] = ()) -> None:
        old = found.get(part, []) if args.match and labels else []
        found[part] = [row for row in old if not any(label.items() <= row.items() for label in labels)]
        found.setdefault("runs", {})[part] = {key: found["machine"][key] for key in ("commit", "date")}
        for row in rows:
            found[part].append(row)
            print(f"{time.monotonic() - began:5.0f} s  {part}: {json.dumps(row)}", flush=True)
            path.write_text(json.dumps(found, indent=1) + "\n")

    at_once = 1 if args.tiny else min(AT_ONCE, os.cpu_count() or 1)
    with Pool(began + args.budget) as pool:
        keep("limits", pool.rows([Job({}, partial(measure.limits, args.tiny))]))
        for part, (jobs, how) in PARTS.items():
            if part in args.parts:
                wanted = [job for job in jobs(found["limits"][0], args.tiny) if re.search(args.match, str(job.label))]
                keep(part, rows(pool, wanted, how, at_once), [json.loads(json.dumps(job.label)) for job in wanted])
    if "sanitizer" in args.parts and gpu:
        keep("sanitizer", sanitizer(began + args.budget - time.monotonic()))
    found["targets"], bad = targets(found), failures(found)
    path.write_text(json.dumps(found, indent=1) + "\n")
    for row in bad:
        print(f"failed: {json.dumps(row)}")
    print(table(found["targets"]))
    print(f"{path}: {sum(len(found.get(part, [])) for part in PARTS)} rows, {len(bad)} failed")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
