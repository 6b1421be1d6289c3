"""Train small dialogue models on the GPU and on the CPU: the same seeds must give the same losses."""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.pool import Job, Row
from benchmarks.gpu.problems import device
from metakern.dialogue.config import Config
from metakern.dialogue.trainer import train

SMALL: dict[str, Any] = {
    "data": "bots",
    "vocab_size": 300,
    "max_length": 48,
    "support_size": 4,
    "query_size": 2,
    "width": 32,
    "layers": 1,
    "heads": 2,
    "dropout": 0.0,
    "inner_steps": (2,),
    "tasks": 3,
    "steps": 6,
    "pretrain_steps": 4,
    "log_every": 1,
    "eval_every": 3,
    "eval_tasks": 2,
}
# (model, algorithm) -> further settings
RUNS: dict[tuple[str, str], dict[str, Any]] = {
    ("gpt", "maml"): {"lr_per": "element"},
    ("gpt", "fomaml"): {},
    ("gpt", "anil"): {},
    ("gpt", "reptile"): {},
    ("lstm", "maml"): {"lr_per": "parameter"},
    ("gru", "mamlplusplus"): {},
    ("rnn", "maml"): {},
}
LOSSES = ("loss", "before", "after", "validation_before", "validation_after")
TOLERANCE = 2e-3  # relative: rounding grows over the outer steps


def losses(config: Config) -> tuple[list[float], float]:
    """Train a model; return all losses of its log, and the seconds that it took."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        began = time.perf_counter()
        train(config, Path(folder) / "run")
        seconds = time.perf_counter() - began
        lines = map(json.loads, (Path(folder) / "run" / "log.jsonl").read_text().splitlines())
        return [line[key] for line in lines for key in LOSSES if key in line], seconds


def check(model: str, algorithm: str) -> Row:
    """Compare the losses of a run on the GPU with those of the same run on the CPU."""
    config = Config(**SMALL | RUNS[model, algorithm], model=model, algorithm=algorithm)
    right, cpu_seconds = losses(config)
    found, seconds = losses(replace(config, device=device().type))
    error = (torch.tensor(found).sub(torch.tensor(right)).abs() / torch.tensor(right).abs()).max().item()
    good = len(found) == len(right) and error < TOLERANCE
    return {"error": error, "good": good, "seconds": seconds, "cpu_seconds": cpu_seconds, "losses": len(right)}


def checks(tiny: bool) -> Iterator[Job]:
    for model, algorithm in list(RUNS)[: 1 if tiny else None]:
        yield Job({"op": "training", "sample": model, "method": algorithm}, partial(check, model, algorithm))
