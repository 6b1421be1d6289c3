"""The adaptation curve: how good a model is on unseen tasks after 0, 1, 3, … inner steps, beside baselines.

    perplexity_k     = exp(mean_t l_k(t))
    bits_per_byte_k  = mean_t [l_k(t) · tokens(t) / (ln 2 · bytes(t))]
    ratio_k          = exp(mean_t [b_k(t) - l_k(t)])          > 1: the baseline is worse

l_k(t) is the query loss of task t after k steps, in nats per token, and b_k(t) that of a baseline on the same episode.
tokens(t) counts the labeled tokens of the query, and bytes(t) those of their text in UTF-8. So bits per byte do not
depend on how many tokens a tokenizer makes of a text. Intervals are 95% Student t intervals, over tasks, of the means;
exp is applied to their ends. `metakern.dialogue.replies` says how replies are judged.
"""

from __future__ import annotations

import json
import math
import time
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
from matplotlib.ticker import NullLocator, PercentFormatter
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import Tensor

from metakern import io
from metakern.dialogue import checkpoint
from metakern.dialogue.baselines import InContext
from metakern.dialogue.display import Display
from metakern.dialogue.episodes import Episodes
from metakern.dialogue.metrics import interval, over_tasks, paired_interval
from metakern.dialogue.replies import Questions, draw_questions, generated, retrieved, scores
from metakern.dialogue.run import Run
from metakern.dialogue.tasks import curve, episodes, load_split, load_whole
from metakern.dialogue.tokenizer import IGNORE
from metakern.dialogue.trainer import train
from metakern.errors import UserError
from metakern.meta.algorithms.registry import ALGORITHMS, find_algorithm
from metakern.optim.base import Stepwise

__all__ = ["at_factors", "best_factors", "evaluate", "plot", "plot_replies", "show"]

STEPS = (0, 1, 3, 5, 10)
REPLY_STEPS = (0, 1, 3, 5, 10, 30)
RETRIEVAL = "retrieval"
KINDS = ("taught", "unseen")
REACH = 6  # how many half decades above and below 1 the factor of the inner rates is searched


def evaluate(
    path: str | Path,
    steps: Sequence[int] = STEPS,
    compare: Sequence[str] = (),
    data: str | None = None,
    reply_steps: Sequence[int] = (),
) -> dict[str, Any]:
    """Measure the adaptation curve of a run on its test tasks, and write `eval.json` and `eval.png` into its folder.

    With `reply_steps`, it also judges replies, and writes `replies.png`.

    Every algorithm, the run's and the baselines, gets the same chances: for each number of steps all its inner rates,
    learned or not, are multiplied by the factor that has the lowest loss on the validation tasks.

    Args:
        path: The folder of the run.
        steps: Numbers of inner steps.
        compare: Algorithms to compare with. Each is trained into the folder `path/<algorithm>`, if it has not been: the
            same model from the same pretrained weights, on the same episodes, for as many outer steps as the run. With
            `reply_steps` also "retrieval", which has no weights, and so no perplexity.
        data: Data of which all tasks are judged in place of the run's test tasks; named as `Config.data` is. Rates of
            baselines are chosen on the run's validation tasks.
        reply_steps: Numbers of inner steps after which replies are judged, such as `REPLY_STEPS`; none by default.

    Returns:
        What `eval.json` holds. `curves` has, for each algorithm, the query losses of the tasks (`loss`,
        `[len(steps)][T]`, in nats per token), the `perplexity` and the ends of its interval (`low`, `high`), and
        `bits_per_byte`, as `metrics.over_tasks` returns it. `ratios` has, for each baseline, `ratio`, `low` and `high`.
        `steps` is in ascending order. With `data`, `left_out` counts what was left out of it, by reason, and `seen` has
        the tasks that the run was trained on.

        With `reply_steps`, `replies` has these `steps`, the `questions` asked of each task, and `scores`: for each
        algorithm, for `taught` and `unseen` questions and for each metric, what `metrics.over_tasks` returns.

    Raises:
        UserError: If a number of steps is negative, an algorithm unknown, or `path` not the folder of a run; if there
            are algorithms to compare with and the run has not been trained or is an adapted one; if "retrieval" is
            compared without `reply_steps`.
        DataError: If the data can't be read or hold too few tasks, or a task has no reply that can be judged.
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
        if name != RETRIEVAL and not find_algorithm(name):
            raise UserError(f"eval: compare must be among {', '.join((*ALGORITHMS, RETRIEVAL))}, got {name!r}")
    if RETRIEVAL in compare and not reply_steps:
        raise UserError("eval: retrieval has replies but no perplexity: add --replies")
    if not steps or min(steps) < 0:
        raise UserError(f"eval: steps must be whole numbers of at least 0, got {list(steps)}")
    if min(reply_steps, default=0) < 0:
        raise UserError(f"eval: reply_steps must be whole numbers of at least 0, got {list(reply_steps)}")
    steps, reply_steps = (tuple(sorted(set(numbers))) for numbers in (steps, reply_steps))
    run = Run.open(path)
    split = load_split(run.config)
    validation = episodes(run.config, split.validation, run.tokenizer)
    tasks, skipped = load_whole(run.config, data) if data else (split.test, {})
    seen = {task.task_id for task in split.train}.intersection(task.task_id for task in tasks)
    test = episodes(run.config, tasks, run.tokenizer)
    asked = draw_questions(test) if reply_steps else []
    bits = _bits_per_byte(test)
    own, curves, replies = run.config.algorithm, {}, {}
    for name in dict.fromkeys((own, *compare)):
        if name == RETRIEVAL:
            replies[name] = scores(test, asked, [list(retrieved(test, asked))] * len(reply_steps))
            continue
        each = run if name == own else _baseline(run, name)
        factors: dict[int, float] = {}
        for numbers in (steps, tuple(k for k in reply_steps if k not in steps)):
            factors |= zip(numbers, best_factors(each, validation, numbers) if numbers else (), strict=True)
        of_steps = [factors[k] for k in steps]
        losses = at_factors(each, of_steps, test, steps)
        curves[name] = {
            **_summary(losses),
            "bits_per_byte": over_tasks(losses.double() * bits),
            "rate_factor": of_steps,
        }
        if reply_steps:
            replies[name] = _replies(each, test, asked, reply_steps, factors)
    report = {
        "run": str(path),
        "data": data or run.config.data,
        "support_size": run.config.support_size,
        "query_size": run.config.query_size,
        "tasks": [name for names, _, _ in test.evaluation() for name in names],
        "left_out": skipped,
        "seen": sorted(seen),
        "steps": list(steps),
        "curves": curves,
        "ratios": {name: _ratio(curves[name], curves[own]) for name in curves if name != own},
    }
    folder = Path(path)
    if reply_steps:
        counts = {kind: [len(getattr(task, kind)) for task in asked] for kind in KINDS}
        report["replies"] = {"steps": list(reply_steps), "questions": counts, "scores": replies}
        io.write(folder / "replies.png", plot_replies(report))
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


def _replies(
    run: Run, test: Episodes, asked: Sequence[Questions], steps: Sequence[int], factors: dict[int, float]
) -> dict[str, Any]:
    """Return the scores of a run's replies after numbers of steps, with a factor of the inner rates for each."""
    replies: list[list[list[str]]] = []
    began = time.monotonic()
    with Display() as display:
        for i, k in enumerate(steps):
            if replies and isinstance(run.algorithm, InContext):
                replies.append(replies[-1])
                continue
            replies.append([])
            with _scaled(run, factors[k]):
                for task in generated(run.algorithm, test, asked, k):
                    replies[-1].append(task)
                    done = (i + len(replies[-1]) / len(asked)) / len(steps)
                    minutes, rest = divmod(round((time.monotonic() - began) * (1 / done - 1)), 60)
                    text = f"after {k} steps  {len(replies[-1])}/{len(asked)} tasks  {minutes}:{rest:02d} left"
                    name, last = f"replies of {run.config.algorithm}", len(replies[-1]) == len(asked)
                    display.progress(name, done, text, line=last)
    found = scores(test, asked, replies)
    return {**found, "rate_factor": [factors[k] for k in steps]}


def _bits_per_byte(source: Episodes) -> Tensor:
    """Return the bits per byte that a query loss of 1 nat per token is, for each task, `[T]`."""
    tokens, sizes = [], []
    for _, _, query in source.evaluation():
        for labels in query["labels"][..., 1:]:
            rows = [row[row != IGNORE].tolist() for row in labels]
            tokens.append(sum(map(len, rows)))
            sizes.append(sum(len(source.tokenizer.decode(row).encode()) for row in rows))
    return torch.tensor(tokens).double() / (math.log(2) * torch.tensor(sizes))


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
    """Print a report of `evaluate` as tables with intervals, a line for each step.

    They show perplexities with ratios, bits per byte and, if replies were judged, the shares of right ones.
    """
    where = f"{report['data']}, {len(report['tasks'])} unseen tasks [95% interval over tasks]"
    curves = report["curves"]
    for reason, count in sorted(report["left_out"].items()):
        console.print(f"left out: {count} {reason}", markup=False, highlight=False, soft_wrap=True)
    if seen := report["seen"]:
        said = f"not unseen: the run was trained on {len(seen)} of these tasks, such as {seen[0]}"
        console.print(said, markup=False, highlight=False, soft_wrap=True)
    columns = [(name, values, "perplexity", ".1f") for name, values in curves.items()]
    columns += [(f"{name} / {next(iter(curves))}", values, "ratio", ".3f") for name, values in report["ratios"].items()]
    _table(console, f"perplexity after adaptation, {where}", report["steps"], columns)
    columns = [(name, values["bits_per_byte"], "mean", ".3f") for name, values in curves.items()]
    _table(console, f"bits per byte after adaptation, {where}", report["steps"], columns)
    if replies := report.get("replies"):
        for kind in KINDS:
            columns = [(name, values[kind]["exact"], "mean", ".0%") for name, values in replies["scores"].items()]
            _table(console, f"{kind} questions answered right, {where}", replies["steps"], columns)


def _table(
    console: Console, title: str, steps: Sequence[int], columns: Sequence[tuple[str, dict[str, Any], str, str]]
) -> None:
    """Print a table; a column is its title, its values with their `low` and `high`, their key and their format.

    One task alone has no interval.
    """
    table = Table(box=SIMPLE_HEAD)
    table.add_column("steps", justify="right")
    for name, *_ in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for i, k in enumerate(steps):
        cells = []
        for _, values, key, form in columns:
            low, high = values["low"][i], values["high"][i]
            interval = f" [{low:{form}}, {high:{form}}]" if math.isfinite(high) else ""
            cells.append(f"{values[key][i]:{form}}{interval}")
        table.add_row(str(k), *map(escape, cells))
    console.print(title, markup=False, highlight=False, soft_wrap=True)
    console.print(table)


def plot(report: dict[str, Any]) -> bytes:
    """Return a report of `evaluate` as a PNG: perplexities and, if there are baselines, the ratios beside them."""
    steps, ratios = report["steps"], report["ratios"]
    with _figure(report, 2 if ratios else 1) as (figure, (left, *right)):
        for color, (name, values) in enumerate(report["curves"].items()):
            _line(left, steps, values, "perplexity", name, f"C{color}")
        left.set_ylabel("perplexity of the query (lower is better)")
        for axes in right:
            for color, (name, values) in enumerate(ratios.items(), start=1):
                _line(axes, steps, values, "ratio", name, f"C{color}")
            axes.axhline(1, color="C0", linewidth=1.5)
            axes.set_ylabel(f"perplexity of the baseline / {next(iter(report['curves']))}")
        for axes in (left, *right):
            axes.set_xticks(steps)
            axes.legend(frameon=False)
        return _png(figure)


def plot_replies(report: dict[str, Any]) -> bytes:
    """Return the replies in a report of `evaluate` as a PNG: the shares of taught and unseen questions answered right.

    The steps are on a scale that is logarithmic from 1 on.
    """
    replies = report["replies"]
    with _figure(report, len(KINDS)) as (figure, panels):
        for axes, kind in zip(panels, KINDS, strict=True):
            for color, (name, values) in enumerate(replies["scores"].items()):
                _line(axes, replies["steps"], values[kind]["exact"], "mean", name, f"C{color}")
            axes.set_ylabel(f"{kind} questions answered right")
            axes.set_ylim(-0.03, 1.03)
            axes.yaxis.set_major_formatter(PercentFormatter(1))
            axes.set_xscale("symlog", linthresh=1, linscale=0.5)
            axes.set_xlim(-0.2, 1.2 * max(replies["steps"][-1], 1))
            axes.set_xticks(replies["steps"], map(str, replies["steps"]))
            axes.xaxis.set_minor_locator(NullLocator())
        panels[0].legend(frameon=False)
        return _png(figure)


@contextmanager
def _figure(report: dict[str, Any], panels: int) -> Iterator[tuple[Figure, list[Axes]]]:
    """Yield a figure over the inner steps and its panels, in the style that holds within the block."""
    style: Any = {
        "font.size": 11,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.25,
    }
    with rc_context(style):
        figure = Figure(figsize=(10 if panels > 1 else 6, 4.2), layout="constrained")
        tasks = f"{len(report['tasks'])} unseen tasks, {report['support_size']} support conversations each"
        figure.suptitle(f"{report['data']}: {tasks}; bands are 95% intervals over tasks", fontsize=11)
        axes = list(figure.subplots(1, panels, squeeze=False)[0])
        for panel in axes:
            panel.set_xlabel("inner steps on the support")
        yield figure, axes


def _png(figure: Figure) -> bytes:
    image = BytesIO()
    figure.savefig(image, format="png", dpi=160)
    return image.getvalue()


def _line(axes: Axes, steps: list[int], values: dict[str, Any], key: str, name: str, color: str) -> None:
    axes.plot(steps, values[key], marker="o", markersize=5, linewidth=2, color=color, label=name)
    axes.fill_between(steps, values["low"], values["high"], color=color, alpha=0.18, linewidth=0)
