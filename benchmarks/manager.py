"""Train parsers and policies of a dialogue manager and judge them on unseen intents and services, beside baselines.

    python -m benchmarks.manager --data clinc=data_full.json,banking=banking77,sgd=dialogues [--seeds 1]

`clinc`, `banking` and `hwu` are sets of texts with intents, which train a parser by the packaged config `parser`. `sgd`
is the Schema-Guided Dialogue set, which trains a policy by the config `policy`, and then generators with each kind of
hint by benchmarks/dialogue/sgd.toml in fewer steps, on the same services. Acts in their hints are those of the data
and, a second time, those that the policy chooses. The seed decides the split, the weights and the episodes. Runs are
kept in runs/benchmark, where an interrupted benchmark goes on. Results go to benchmarks/results/manager.json after
each, and what is there is skipped.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import results
from benchmarks.manager_tables import HINTED
from benchmarks.options import Parser, kept, positive
from benchmarks.results import FOLDER, ROOT, machine
from metakern.dialogue.config import Config
from metakern.dialogue.evaluate import evaluate
from metakern.dialogue.hints import KINDS as HINTS
from metakern.dialogue.manager.evaluate import evaluate_part, show_part
from metakern.dialogue.report import show
from metakern.dialogue.trainer import train
from metakern.errors import UserError

CONFIGS = {"clinc": "parser", "banking": "parser", "hwu": "parser", "sgd": "policy"}
COMPARE = {"parser": ("pretrained", "finetune"), "policy": ("finetune", "finetune:adam")}
STEPS = (0, 1, 3, 10)
REPLY_STEPS = (0, 3, 10)
SEEDS = 1


def measure(name: str, config: Config) -> dict[str, Any]:
    """Train and judge a run, or go on with it, and show the scores; return its entry in the results."""
    folder = _trained(name, config)
    report = evaluate_part(folder, STEPS, COMPARE[config.part])
    show_part({**report, "data": name}, Console())
    settings = asdict(replace(config, data=name))
    return {
        "machine": machine(),
        "config": {key: value for key, value in settings.items() if value != getattr(Config(), key)},
        **{key: report[key] for key in ("part", "tasks", "columns")},
        "scores": {
            contender: {metric: _rounded(found) for metric, found in scores.items()}
            for contender, scores in report["scores"].items()
        },
    }


def measure_hints(name: str, policy: Config) -> dict[str, Any]:
    """Train generators with each kind of hint on the tasks of a policy that has been trained; return their entry."""
    same = {key: getattr(policy, key) for key in ("data", "seed", "threads", "validation_part", "test_part")}
    file = ROOT / "benchmarks" / "dialogue" / "sgd.toml"
    few = {"tasks": 2, "steps": 150, "eval_every": 50, "inner_lr": 0.1}  # an hour for all kinds
    base = replace(Config.load(file), max_length=112, **few, **same)  # hints need room
    chooser, found = _trained(name, policy), dict[str, Any]()
    for kind in HINTS:
        folder = _trained(f"{name}-{kind}", replace(base, hints=kind))
        for label, acts in ((kind, None), (f"{kind}, policy", chooser)):
            if acts is None or "act" in kind:
                report = evaluate(folder, STEPS, (), None, REPLY_STEPS, policy=acts)
                show(report, Console())
                curve, unseen = report["curves"]["maml"], report["replies"]["scores"]["maml"]["unseen"]
                found[label] = {
                    "bits": [[round(x, 4) for x in row] for row in curve["bits_per_byte"]["values"]],
                    **{key: _rounded(unseen[key]) for key in ("chrf", "bleu")},
                }
    settings = asdict(replace(base, data=name))
    return {
        "machine": machine(),
        "config": {key: value for key, value in settings.items() if value != getattr(Config(), key)},
        "part": "generator",
        "tasks": report["tasks"],
        "columns": list(STEPS),
        "reply_columns": list(REPLY_STEPS),
        "scores": found,
    }


def _trained(name: str, config: Config) -> Path:
    """Train a run, or go on with it, and return its folder."""
    folder = ROOT / "runs" / "benchmark" / f"manager-{name}-{config.seed}"
    train(config, folder, resume=(folder / "checkpoints" / "last.json").exists())
    return folder


def _rounded(found: dict[str, Any]) -> dict[str, list[float]]:
    return {end: [round(x, 4) for x in found[end]] for end in ("mean", "low", "high")}


def _sources(text: str) -> dict[str, str]:
    found = dict(part.partition("=")[::2] for part in text.split(",") if part)
    if not found or not CONFIGS.keys() >= found.keys() or not all(found.values()):
        raise argparse.ArgumentTypeError(f"must be name=path with a name of {', '.join(CONFIGS)}, got {text!r}")
    return found


def main(arguments: Sequence[str] | None = None, prog: str | None = None) -> None:
    parser = Parser(prog=prog, description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=_sources, required=True, metavar="NAME=PATH", help="data sets that you have")
    parser.add_argument("--seeds", type=positive, default=SEEDS, help=f"seeds of a data set (default: {SEEDS})")
    parser.add_argument("--out", type=kept, default=FOLDER / "manager.json", help="file for the results")
    options = parser.parse_args(arguments)
    for seed in range(options.seeds):
        for name, path in options.data.items():
            config = replace(Config.load(CONFIGS[name]), data=path, seed=seed, threads=1)
            for entry, of in ((name, measure), *(((HINTED, measure_hints),) if name == "sgd" else ())):
                if str(seed) in results.load(options.out).get(entry, {}):
                    continue
                print(f"{entry}, seed {seed}", flush=True)
                try:
                    results.keep(options.out, entry, of(name, config), str(seed))
                except UserError as error:
                    parser.exit(error.code, f"{entry}, seed {seed}: {error}\n")


if __name__ == "__main__":
    main()
