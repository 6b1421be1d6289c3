"""Train dialogue models on several data sets and measure how well they adapt, beside tuned baselines.

    python -m benchmarks.dialogue [--cells star,bots/gpt] [--data star=talks.jsonl,sgd=dialogues] [--seeds 3]

`cells.toml` says what is measured. The seed of a cell decides its split into tasks, its weights and its episodes. Each
seed is a run of `metakern train` in runs/benchmark, which an interrupted benchmark goes on with. All contenders have
the same pretrained weights and episodes, take as many outer steps, and get the best inner rate on validation tasks for
each number of steps, as `metakern eval` says. Results go to benchmarks/results/dialogue.json after each seed, and what
is there is skipped. lessons.json beside it has what `benchmarks.dialogue.lessons` measures.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.dialogue.lessons import lessons
from benchmarks.options import Parser, kept, positive
from benchmarks.results import FOLDER, ROOT, machine
from metakern.dialogue.config import Config
from metakern.dialogue.evaluate import STEPS, evaluate
from metakern.dialogue.run import Run
from metakern.dialogue.tasks import load_split
from metakern.dialogue.trainer import train
from metakern.errors import UserError

HERE = Path(__file__).parent
tomllib = import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
CELLS: dict[str, dict[str, Any]] = tomllib.loads((HERE / "cells.toml").read_text())
CONTENDERS = ("pretrained", "pretrained:adam", "finetune", "finetune:adam", "fomaml")
REPLY_STEPS = (0, 1, 3, 10, 30)
SEEDS = 3
LESSONS = "lessons.json"


def config_of(cell: dict[str, Any], data: dict[str, str], seed: int) -> Config:
    """Return the config of a cell's run."""
    name = cell["config"]
    config = Config.load(HERE / name if name.endswith(".toml") else name)
    settings = {"threads": 1, **cell.get("settings", {}), "seed": seed}
    if "from" in cell:
        settings["data"] = data[cell["from"]]
    return Config.parse(settings, "cells.toml", config)


def trained(name: str, cell: dict[str, Any], data: dict[str, str], seed: int) -> tuple[Config, Path]:
    """Train one seed of a cell, or go on with it; return its config and the folder of the run."""
    config, folder = config_of(cell, data, seed), ROOT / "runs" / "benchmark" / f"{name.replace('/', '-')}-{seed}"
    train(config, folder, resume=(folder / "checkpoints" / "last.json").exists())
    return config, folder


def taught(name: str, cell: dict[str, Any], data: dict[str, str], seed: int) -> dict[str, Any]:
    """Return the entry of one seed of a cell in the results of lessons."""
    run = Run.open(trained(name, cell, data, seed)[1])
    found = {who: {key: _rounded(values) for key, values in of.items()} for who, of in lessons(run).items()}
    return {"machine": machine(), "tasks": [task.task_id for task in load_split(run.config).test], "lessons": found}


def measure(name: str, cell: dict[str, Any], data: dict[str, str], seed: int) -> dict[str, Any]:
    """Train and evaluate one seed of a cell, or go on with it; return its entry in the results."""
    config, folder = trained(name, cell, data, seed)
    judged = seed < cell.get("replies", 0)
    compare = (*CONTENDERS, *cell.get("more", ()), *(("retrieval",) if judged else ()))
    repeats = cell.get("repeats", 1)
    report = evaluate(folder, STEPS, compare, reply_steps=REPLY_STEPS if judged else (), repeats=repeats)
    settings = asdict(replace(config, data=cell.get("from", config.data)))
    entry = {
        "machine": machine(),
        "config": {key: value for key, value in settings.items() if value != getattr(Config(), key)},
        "repeats": repeats,
        "tasks": report["tasks"],
        "steps": report["steps"],
        "loss": {contender: _rounded(curve["loss"]) for contender, curve in report["curves"].items()},
        "bits_per_byte": {
            contender: _rounded(curve["bits_per_byte"]["mean"]) for contender, curve in report["curves"].items()
        },
        "lowered": {contender: curve["lowered"] for contender, curve in report["curves"].items()},
    }
    if judged:
        replies = report["replies"]
        entry["reply_steps"] = replies["steps"]
        entry["right"] = {
            kind: {
                contender: _rounded(found[kind]["exact"]["values"]) for contender, found in replies["scores"].items()
            }
            for kind in ("taught", "unseen")
        }
    return entry


def _rounded(values: Any) -> Any:
    return [_rounded(value) for value in values] if isinstance(values, list) else round(values, 5)


def _sources(text: str) -> dict[str, str]:
    found = dict(part.partition("=")[::2] for part in text.split(",") if part)
    known = {cell["from"] for cell in CELLS.values() if "from" in cell}
    if not known.issuperset(found) or not all(found.values()):
        raise argparse.ArgumentTypeError(f"must be name=path with a name of {', '.join(sorted(known))}, got {text!r}")
    return found


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    parser = Parser(prog=prog, description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cells", default="", help="words in their names, comma-separated (default: all)")
    parser.add_argument("--data", type=_sources, default={}, metavar="NAME=PATH", help="data sets that you have")
    parser.add_argument("--seeds", type=positive, default=SEEDS, help=f"seeds of a cell (default: {SEEDS})")
    parser.add_argument("--out", type=kept, default=FOLDER / "dialogue.json", help="file for the results")
    options = parser.parse_args(arguments)
    words = options.cells.split(",")
    for seed in range(options.seeds):
        for name, cell in CELLS.items():
            if not any(word in name for word in words) or seed >= cell.get("seeds", SEEDS):
                continue
            parts = [(options.out, measure)]
            if seed < cell.get("replies", 0):
                parts.append((options.out.with_name(LESSONS), taught))
            left = [(path, of) for path, of in parts if str(seed) not in results.load(path).get(name, {})]
            if left and "from" in cell and cell["from"] not in options.data:
                print(f"{name}: left out, as it needs --data {cell['from']}=PATH", flush=True)
                continue
            for path, of in left:
                print(f"{name}, seed {seed}: {cell['about']}", flush=True)
                try:
                    results.keep(path, name, of(name, cell, options.data, seed), str(seed))
                except UserError as error:
                    parser.exit(error.code, f"{name}, seed {seed}: {error}\n")


if __name__ == "__main__":
    main()
