"""Measure training over several processes of this machine, and simulate more of them.

    python -m benchmarks.scaling [--only equal,shard,fsdp,ratio,stream,simulate] [--processes 2] [--steps 50]
                                 [--megabytes 200]

`equal` trains a small model with every algorithm, 7 tasks a step, in several processes and in one, and compares their
weights, moments and logs; `shard` does so with parameters that are divided between the processes. `fsdp` does so with a
Llama of 4 layers in float64, in a loop of its own. `ratio` times a step of two processes, a thread each, as a ratio to
that of one process with all tasks, beside the prediction of the cost model from a step with half of the tasks and an
all-reduce. Timings need two idle cores. `stream` measures the memory of conversations that stay in their files, on a
generated file. `simulate` computes speedups of the cost model (`benchmarks/scaling/model.py`) for three machines and
draws them. Results go to benchmarks/results/scaling.json.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import pictures, results
from benchmarks.options import Parser, kept, positive
from benchmarks.results import FOLDER
from benchmarks.scaling.model import Machine, Work, simulate
from metakern.dialogue.processes import launch

PARTS = ("equal", "shard", "fsdp", "ratio", "stream", "simulate")
PROCESSES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
# The rates that a process is assumed to have; the bandwidth is that to another machine.
MACHINES = {
    "1 Gbit/s": Machine(flop=4e14, memory=3e12, bandwidth=1.25e8, latency=5e-5),
    "25 Gbit/s": Machine(flop=4e14, memory=3e12, bandwidth=3.1e9, latency=2e-5),
    "400 Gbit/s": Machine(flop=4e14, memory=3e12, bandwidth=5e10, latency=5e-6),
}
WORKS = {
    "10 M": Work(1e7, tasks=256, tokens=2048, inner_steps=3),
    "1 G": Work(1e9, tasks=256, tokens=2048, inner_steps=3),
    "8 G": Work(8e9, tasks=256, tokens=2048, inner_steps=3),
    "8 G, LoRA": Work(8e9, tasks=256, tokens=2048, inner_steps=3, learned=2e7),
}


def simulated() -> dict[str, Any]:
    """Return the speedups over one process: of a model of 1 G parameters by bandwidth, and of models at 25 Gbit/s."""
    by_bandwidth = {name: [simulate(WORKS["1 G"], m, n) for n in PROCESSES] for name, m in MACHINES.items()}
    by_model = {name: [simulate(work, MACHINES["25 Gbit/s"], n) for n in PROCESSES] for name, work in WORKS.items()}
    return {"processes": list(PROCESSES), "bandwidth": by_bandwidth, "model": by_model}


def shared(part: str, folder: Path, steps: int, processes: int) -> None:
    if code := launch(["-m", "benchmarks.scaling.shared", part, str(folder), str(steps)], processes):
        raise SystemExit(code)


def measured(part: str, folder: Path, steps: int, processes: int, megabytes: int) -> dict[str, Any]:
    """Return what a part of `benchmarks.scaling.shared` finds in several processes."""
    if part == "stream":
        command = [sys.executable, "-m", "benchmarks.scaling.streamed", str(folder), str(megabytes)]
        return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    if part not in ("equal", "shard"):
        shared(part, folder, steps, processes)
        return json.loads((folder / f"{part}.json").read_text())
    from benchmarks.scaling.shared import compared

    shared(part, folder / "shared", steps, processes)
    alone = [sys.executable, "-m", "benchmarks.scaling.shared", part, str(folder / "one"), str(steps)]
    subprocess.run(alone, check=True)
    runs = sorted(run.name for run in (folder / "one").iterdir())
    return {name: compared(folder / "shared" / name, folder / "one" / name) for name in runs}


def main(argv: Sequence[str] = ()) -> None:
    parser = Parser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default=",".join(PARTS), help="parts, comma-separated (default: all)")
    parser.add_argument("--processes", type=positive, default=2, help="processes; ratio is for two (default: 2)")
    parser.add_argument("--steps", type=positive, default=50, help="outer steps of equal, shard and fsdp (default: 50)")
    parser.add_argument("--megabytes", type=positive, default=200, help="size of the file of stream (default: 200)")
    parser.add_argument("--out", type=kept, default=FOLDER / "scaling.json", help="file for the results")
    args = parser.parse_args(argv)
    for part in args.only.split(","):
        if part not in PARTS:
            parser.error(f"--only must be among {', '.join(PARTS)}, got {part!r}")
    for part in args.only.split(","):
        if part == "simulate":
            entry = simulated()
        else:
            with tempfile.TemporaryDirectory() as folder:
                found = measured(part, Path(folder), args.steps, args.processes, args.megabytes)
            entry = {"machine": results.machine(), "steps": args.steps, **found}
        results.keep(args.out, part if args.processes == 2 else f"{part}, {args.processes} processes", entry)
        print(part, json.dumps(entry), flush=True)
    if "simulate" in args.only:
        pictures.draw_scaling(results.load(args.out)["simulate"])


if __name__ == "__main__":
    main(sys.argv[1:])
