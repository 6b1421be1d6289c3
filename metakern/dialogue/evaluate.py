"""The adaptation curve: the perplexity on unseen tasks after 0, 1, 3, … inner steps, beside baselines.

    perplexity_k = exp(mean_t l_k(t))
    ratio_k      = exp(mean_t [b_k(t) - l_k(t)])          > 1: the baseline is worse

l_k(t) is the query loss of task t after k steps, in nats per token, and b_k(t) that of a baseline on the same episode.
Intervals are 95% Student t intervals, over tasks, of the means in the exponents; exp is applied to their ends.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from metakern import io
from metakern.dialogue import checkpoint
from metakern.dialogue.episodes import Episodes
from metakern.dialogue.metrics import interval, paired_interval
from metakern.dialogue.run import Run
from metakern.dialogue.tasks import curve, episodes, load_split, load_whole
from metakern.dialogue.trainer import train
from metakern.errors import UserError
from metakern.meta.algorithms.registry import ALGORITHMS, find_algorithm
from metakern.optim.base import Stepwise

__all__ = ["at_factors", "best_factors", "evaluate", "plot", "show"]

STEPS = (0, 1, 3, 5, 10)
REACH = 6  # how many half decades above and below 1 the factor of the inner rates is searched


def evaluate(
    path: str | Path, steps: Sequence[int] = STEPS, compare: Sequence[str] = (), data: str | None = None
) -> dict[str, Any]:
    """Measure the adaptation curve of a run on its test tasks, and write `eval.json` and `eval.png` into its folder.

    Every algorithm, the run's and the baselines, gets the same chances: for each number of steps all its inner rates,
    learned or not, are multiplied by the factor that has the lowest loss on the validation tasks.

    Args:
        path: The folder of the run.
        steps: Numbers of inner steps.
        compare: Algorithms to compare with. Each is trained into the folder `path/<algorithm>`, if it has not been: the
            same model from the same pretrained weights, on the same episodes, for as many outer steps as the run.
        data: Data of which all tasks are judged in place of the run's test tasks; named as `Config.data` is. Rates of
            baselines are chosen on the run's validation tasks.

    Returns:
        What `eval.json` holds. `curves` has, for each algorithm, the query losses of the tasks (`loss`,
        `[len(steps)][T]`, in nats per token), the `perplexity` and the ends of its interval (`low`, `high`). `ratios`
        has, for each baseline, `ratio`, `low` and `high`. `steps` is in ascending order.

    Raises:
        UserError: If a number of steps is negative, an algorithm unknown, or `path` not the folder of a run; if there
            are algorithms to compare with and the run has not been trained or is an adapted one.
        DataError: If the data can't be read or hold too few tasks.
        CheckpointError: If a checkpoint can't be used, or a file can't be written.

    >>> import contextlib, io, tempfile
    >>> from metakern.dialogue.config import Config
    >>> config = Config(data="chatterbot:english", vocab_size=262, max_length=16, hidden=8, inner_steps=1, steps=1)
    >>> with tempfile.TemporaryDirectory() as path, contextlib.redirect_stdout(io.StringIO()):
    ...     run = train(config, path)
    ...     report = evaluate(path, steps=(0, 1))
    >>> len(report["curves"]["maml"]["perplexity"])
    2
    """
    for name in compare:
        if not find_algorithm(name):
            raise UserError(f"eval: compare must be among {', '.join(ALGORITHMS)}, got {name!r}")
    if not steps or min(steps) < 0:
        raise UserError(f"eval: steps must be whole numbers of at least 0, got {list(steps)}")
    steps = tuple(sorted(set(steps)))
    run = Run.open(path)
    split = load_split(run.config)
    validation = episodes(run.config, split.validation, run.tokenizer)
    test = episodes(run.config, load_whole(run.config, data) if data else split.test, run.tokenizer)
    own, curves = run.config.algorithm, {}
    for name in (own, *(name for name in compare if name != own)):
        each = run if name == own else _baseline(run, name)
        factors = best_factors(each, validation, steps)
        curves[name] = {**_summary(at_factors(each, factors, test, steps)), "rate_factor": factors}
    report = {
        "run": str(path),
        "data": data or run.config.data,
        "support_size": run.config.support_size,
        "query_size": run.config.query_size,
        "tasks": [name for names, _, _ in test.evaluation() for name in names],
        "steps": list(steps),
        "curves": curves,
        "ratios": {name: _ratio(curves[name], curves[own]) for name in curves if name != own},
    }
    folder = Path(path)
    io.write(folder / "eval.json", (json.dumps(_finite(report), indent=1) + "\n").encode())
    io.write(folder / "eval.png", plot(report))
    return report


def _baseline(run: Run, name: str) -> Run:
    """Return the baseline `name` of `run`; train it first, or train it further, if it has fewer outer steps."""
    if "from" in run.state:
        raise UserError(f"{run.path}: is adapted from {run.state['from']}: compare that run")
    state = checkpoint.load(run.path / "checkpoints", "last")[1]
    if state["phase"] != "train" or not state["step"]:
        cure = f"go on with: metakern train --resume --out {run.path}"
        raise UserError(f"{run.path}: has not been trained yet, so it has no baseline; {cure}")
    config = replace(run.config, algorithm=name, steps=state["step"], minutes=0.0)
    if name != run.config.algorithm:
        config = replace(config, algorithm_options=())
    if name == "finetune":
        config = replace(config, outer_lr=config.finetune_lr or config.outer_lr)
    folder = run.path / name
    begun = (folder / "checkpoints" / "last.json").exists()
    if begun and checkpoint.load(folder / "checkpoints", "last")[1]["step"] >= config.steps:
        return Run.open(folder)
    return train(config, folder, resume=begun, start=run.path)


def _optimizers(run: Run) -> list[Stepwise]:
    """Return the inner optimizers of a run whose rates can be scaled."""
    inner = getattr(run.algorithm, "inner", None)
    return [module for module in inner.modules() if isinstance(module, Stepwise)] if inner is not None else []


@contextmanager
def _scaled(run: Run, factor: float) -> Iterator[None]:
    """Within the block, all inner rates of a run, learned or not, are multiplied by a factor."""
    rates = [optimizer.lr for optimizer in _optimizers(run)]
    before = [([p.detach().clone() for p in rate.parameters()], rate.initial) for rate in rates]
    try:
        with torch.no_grad():
            for rate in rates:
                rate.initial *= factor
                for p in rate.parameters():
                    p.mul_(factor)
        yield
    finally:
        with torch.no_grad():
            for rate, (values, initial) in zip(rates, before, strict=True):
                rate.initial = initial
                for p, value in zip(rate.parameters(), values, strict=True):
                    p.copy_(value)


def _at_factor(run: Run, factor: float, source: Episodes, steps: tuple[int, ...], limit: int = 0) -> Tensor:
    """Return the query losses `[len(steps), T]` of a run whose inner rates are multiplied by a factor."""
    with _scaled(run, factor):
        return curve(run.algorithm, source, steps, limit)[1]


def at_factors(run: Run, factors: Sequence[float], source: Episodes, steps: tuple[int, ...]) -> Tensor:
    """Return the query losses `[len(steps), T]` of a run, with a factor of its inner rates for each number of steps."""
    found = {factor: _at_factor(run, factor, source, steps) for factor in dict.fromkeys(factors)}
    return torch.stack([found[factor][i] for i, factor in enumerate(factors)])


def best_factors(run: Run, validation: Episodes, steps: tuple[int, ...]) -> list[float]:
    """Return the factor of the inner rates with the lowest mean loss on the validation tasks, for each number of steps.

    The search goes in half decades from the rates as they are, until both neighbors of each best factor are worse. An
    algorithm without inner rates has the factor 1.
    """
    if not _optimizers(run):
        return [1.0] * len(steps)
    means: dict[int, Tensor] = {}
    best = [0] * len(steps)
    while untried := {e for b in best for e in (b - 1, b, b + 1) if abs(e) <= REACH} - means.keys():
        for exponent in sorted(untried):
            losses = _at_factor(run, 10 ** (exponent / 2), validation, steps, run.config.eval_tasks)
            means[exponent] = losses.mean(1).nan_to_num(math.inf, math.inf)
        best = [min(means, key=lambda e: (means[e][i].item(), abs(e))) for i in range(len(steps))]
    return [10 ** (exponent / 2) for exponent in best]


def _summary(losses: Tensor) -> dict[str, Any]:
    mean, half = zip(*(interval(row) for row in losses), strict=True)
    return {"loss": losses.tolist(), **_through_exp(mean, half, "perplexity")}


def _ratio(baseline: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    pairs = zip(torch.tensor(baseline["loss"]), torch.tensor(own["loss"]), strict=True)
    mean, half = zip(*(paired_interval(b, o) for b, o in pairs), strict=True)
    return _through_exp(mean, half, "ratio")


def _through_exp(mean: Sequence[float], half: Sequence[float], name: str) -> dict[str, list[float]]:
    center, reach = torch.tensor(mean).double(), torch.tensor(half).double()
    ends = {name: center, "low": center - reach, "high": center + reach}
    return {key: value.exp().tolist() for key, value in ends.items()}


def _finite(value: Any) -> Any:
    """Return `value` with None in the places of inf and nan, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def show(report: dict[str, Any], console: Console) -> None:
    """Print a report of `evaluate` as a table: perplexities and ratios with their intervals, a line for each step."""
    table = Table(box=SIMPLE_HEAD)
    table.add_column("steps", justify="right")
    columns = [(name, values, "perplexity", ".1f") for name, values in report["curves"].items()]
    own = columns[0][0]
    columns += [(f"{name} / {own}", values, "ratio", ".3f") for name, values in report["ratios"].items()]
    for title, *_ in columns:
        table.add_column(title, justify="right", no_wrap=True)
    for i, k in enumerate(report["steps"]):
        cells = [
            f"{values[key][i]:{form}} [{values['low'][i]:{form}}, {values['high'][i]:{form}}]"
            for _, values, key, form in columns
        ]
        table.add_row(str(k), *(escape(cell) for cell in cells))
    tasks = f"{len(report['tasks'])} unseen tasks"
    title = f"perplexity after adaptation, {report['data']}, {tasks} [95% interval over tasks]"
    console.print(title, markup=False, highlight=False, soft_wrap=True)
    console.print(table)


def plot(report: dict[str, Any]) -> bytes:
    """Return a report of `evaluate` as a PNG: perplexities and, if there are baselines, the ratios beside them."""
    steps, ratios = report["steps"], report["ratios"]
    style: Any = {
        "font.size": 11,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.25,
    }
    with rc_context(style):
        figure = Figure(figsize=(10 if ratios else 6, 4.2), layout="constrained")
        left, *right = figure.subplots(1, 2 if ratios else 1, squeeze=False)[0]
        for color, (name, values) in enumerate(report["curves"].items()):
            _line(left, steps, values, "perplexity", name, f"C{color}")
        left.set_ylabel("perplexity of the query (lower is better)")
        for axes in right:
            for color, (name, values) in enumerate(ratios.items(), start=1):
                _line(axes, steps, values, "ratio", name, f"C{color}")
            axes.axhline(1, color="C0", linewidth=1.5)
            axes.set_ylabel(f"perplexity of the baseline / {next(iter(report['curves']))}")
        for axes in (left, *right):
            axes.set_xlabel("inner steps on the support")
            axes.set_xticks(steps)
            axes.legend(frameon=False)
        tasks = f"{len(report['tasks'])} unseen tasks, {report['support_size']} support conversations each"
        figure.suptitle(f"{report['data']}: {tasks}; bands are 95% intervals over tasks", fontsize=11)
        image = BytesIO()
        figure.savefig(image, format="png", dpi=160)
    return image.getvalue()


def _line(axes: Axes, steps: list[int], values: dict[str, Any], key: str, name: str, color: str) -> None:
    axes.plot(steps, values[key], marker="o", markersize=5, linewidth=2, color=color, label=name)
    axes.fill_between(steps, values["low"], values["high"], color=color, alpha=0.18, linewidth=0)
