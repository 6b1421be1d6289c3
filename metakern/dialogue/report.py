"""Show what `metakern.dialogue.evaluate.evaluate` measured: tables with intervals, some replies, and plots."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, PercentFormatter
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from metakern import io
from metakern.dialogue.display import Display
from metakern.dialogue.metrics import exact
from metakern.dialogue.replies import KINDS
from metakern.dialogue.terminal import printable, say
from metakern.errors import CheckpointError

__all__ = ["keep", "plot", "plot_replies", "show", "show_table", "within"]

FARTHEST = 5  # the largest ratio that is plotted
WIDE = 10_000  # columns, for output that is no terminal's
Row = tuple[str, dict[str, Any], str, str]  # a name, values with their `low` and `high`, their key and their format


def keep(files: Mapping[Path, bytes]) -> None:
    """Write the files of a report and say so, or say why that fails: the report can be shown all the same."""
    try:
        for path, data in files.items():
            io.write(path, data)
    except CheckpointError as error:
        print(f"metakern: {printable(str(error))}", file=sys.stderr)
    else:
        Display().say(f"written: {', '.join(map(str, files))}")


def show(report: dict[str, Any], console: Console) -> None:
    """Print a report of `evaluate` as tables with intervals, a row for each contender and a column for each step.

    They show perplexities, their ratios, bits per byte and, if replies were judged, the shares of right ones.
    """
    if not console.is_terminal:
        console = Console(file=console.file, width=WIDE)

    curves, steps, own = report["curves"], report["steps"], next(iter(report["curves"]))
    for reason, count in sorted(report["left_out"].items()):
        say(console, f"left out: {count} {reason}")
    if seen := report["seen"]:
        say(console, f"not unseen: the run was trained or validated on texts of {len(seen)} tasks, such as {seen[0]}")
    say(console, f"{report['data']}, {counted(report)}, by inner steps [95% interval over tasks]\n")
    perplexities = [(name, values, "perplexity", ".1f") for name, values in curves.items()]
    show_table(console, "perplexity", steps, perplexities)
    for name, values in curves.items():
        if lowered := [f"{n} after {k} steps" for n, k in zip(values["lowered"], steps, strict=True) if n]:
            say(
                console,
                f"episodes whose support did better at a lower rate of {name}, so took it: {', '.join(lowered)}",
            )
    ratios: list[Row] = [(f"{name} / {own}", values, "ratio", ".3f") for name, values in report["ratios"].items()]
    if ratios:
        if (best := report["best_plain"]) and len(ratios) > 1:
            ratios.append((f"best plain / {own}", best, "ratio", ".3f"))
        show_table(console, f"ratio of perplexities (above 1: {own} is better)", steps, ratios)
    bits = [(name, values["bits_per_byte"], "mean", ".3f") for name, values in curves.items()]
    show_table(console, "bits per byte", steps, bits)
    if replies := report.get("replies"):
        for kind in KINDS:
            right = [(name, within(values[kind]["exact"]), "mean", ".0%") for name, values in replies["scores"].items()]
            show_table(console, f"{kind} questions answered right", replies["steps"], right)
        _show_samples(replies["samples"], console)


def counted(report: dict[str, Any]) -> str:
    """Return how many tasks a report is about, and how many of them are unseen."""
    tasks, seen = len(report["tasks"]), len(report["seen"])
    return f"{tasks} tasks, {tasks - seen} of them unseen" if seen else f"{tasks} unseen tasks"


def within(shares: Mapping[str, Any]) -> dict[str, Any]:
    """Return shares whose intervals, which know no bounds, are cut to [0, 1]."""
    low, high = ([min(max(x, 0.0), 1.0) if math.isfinite(x) else x for x in shares[end]] for end in ("low", "high"))
    return {**shares, "low": low, "high": high}


def _show_samples(samples: dict[str, Any], console: Console) -> None:
    before, after = samples["steps"]
    named = {"bot": "bot", "before": f"after {before} steps", "after": f"after {after} steps"}
    width = max(map(len, named.values()))
    say(console, f"{samples['task']}, the first of these tasks:")
    for kind, title in zip(KINDS, ("taught, so in its support", "not taught, so in its query"), strict=True):
        say(console, f"\n  {title}")
        for sample in samples[kind]:
            say(console, f"    {'user':<{width}}  {sample['question']}")
            for key, name in named.items():
                right = "  (right)" * (key != "bot" and exact(sample[key], sample["bot"]))
                say(console, f"    {name:<{width}}  {' '.join(sample[key].split())}{right}")
            say(console, "")


def show_table(console: Console, title: str, columns: Sequence[int], rows: Sequence[Row]) -> None:
    """Print a table, without intervals if they do not fit into the terminal. One task alone has no interval.

    Args:
        console: Where to print it.
        title: A line above it.
        columns: The numbers that head the columns.
        rows: Each with as many values as there are columns.
    """

    def made(with_intervals: bool) -> Table:
        table = Table("", box=SIMPLE_HEAD)
        for k in columns:
            table.add_column(str(k), justify="right")
        for name, values, key, form in rows:
            cells = []
            for value, low, high in zip(values[key], values["low"], values["high"], strict=True):
                interval = f" [{low:{form}}, {high:{form}}]" if with_intervals and math.isfinite(high) else ""
                cells.append(f"{value:{form}}{interval}")
            table.add_row(escape(printable(name)), *map(escape, cells))
        return table

    table, note = made(True), ""
    if console.measure(table, options=console.options.update(max_width=WIDE)).maximum > console.width:
        table, note = made(False), " (with intervals in a wider terminal)"
    say(console, title + note)
    console.print(table)


def plot(report: dict[str, Any]) -> bytes:
    """Return a report of `evaluate` as a PNG: perplexities and, if there are other contenders, how the run compares.

    One more panel has their ratios, up to a factor of `FARTHEST`. If plain ones are among them, another has a dot for
    each task.
    """
    steps, ratios, best = report["steps"], report["ratios"], report["best_plain"]
    with _figure(report, 1 + bool(ratios) + bool(best)) as (figure, (left, *right)):
        for color, (name, values) in enumerate(report["curves"].items()):
            _line(left, steps, values, "perplexity", name, f"C{color}", band=not color)
        left.set_ylabel("perplexity of the query (lower is better)")
        left.set_yscale("log")
        _bound(left, 0, FARTHEST * max(next(iter(report["curves"].values()))["perplexity"]))
        _label_numbers(left)
        for axes in right[:1]:
            for color, (name, values) in enumerate(ratios.items(), start=1):
                _line(axes, steps, values, "ratio", name, f"C{color}")
            axes.axhline(1, color="C0", linewidth=1.5)
            axes.set_yscale("log")
            _bound(axes, 1 / FARTHEST, FARTHEST)
            _label_numbers(axes)
            axes.set_ylabel(f"perplexity of the contender / {next(iter(report['curves']))}")
        for axes in (left, *right[:1]):
            axes.set_xticks(steps)
            axes.legend(frameon=False)
        for axes in right[1:]:
            _scatter(axes, report)
        return _png(figure)


def _bound(axes: Axes, low: float, high: float) -> None:
    """Show nothing outside of [low, high]."""
    lowest, highest = axes.get_ylim()
    axes.set_ylim(max(lowest, low), min(highest, high))


def _label_numbers(axes: Axes) -> None:
    """Label some numbers of a logarithmic scale, as they are."""
    lowest, highest = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7) if highest < 30 * lowest else (1, 3)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())


def _scatter(axes: Axes, report: dict[str, Any]) -> None:
    """Draw a dot for each task: the loss of the best plain contender, and the run's, after as many steps as it trains.

    If no measured number of steps is one that the run trains with, it is the one nearest to the largest of them.
    """
    i, k = min(enumerate(report["steps"]), key=lambda step: abs(step[1] - max(report["inner_steps"])))
    own, name = next(iter(report["curves"])), report["best_plain"]["names"][i]
    x, y = (report["curves"][key]["loss"][i] for key in (name, own))
    ends = min(*x, *y), max(*x, *y)
    axes.plot(ends, ends, color="0.6", linewidth=1, label="equal")
    axes.plot(x, y, "o", markersize=4, alpha=0.6)
    axes.set_aspect("equal")
    axes.set_xlabel(f"{name}: nats per token after {k} steps")
    axes.set_ylabel(f"{own}: nats per token, a dot for each task")


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
        figure = Figure(figsize=(4.2 * panels + 1.6, 4.2), layout="constrained")
        tasks = f"{counted(report)}, {report['support_size']} support conversations each"
        figure.suptitle(f"{report['data']}: {tasks}; bands are 95% intervals over tasks", fontsize=11)
        axes = list(figure.subplots(1, panels, squeeze=False)[0])
        for panel in axes:
            panel.set_xlabel("inner steps on the support")
        yield figure, axes


def _png(figure: Figure) -> bytes:
    image = BytesIO()
    figure.savefig(image, format="png", dpi=160)
    return image.getvalue()


def _line(
    axes: Axes, steps: list[int], values: dict[str, Any], key: str, name: str, color: str, band: bool = True
) -> None:
    axes.plot(steps, values[key], marker="o", markersize=5, linewidth=2, color=color, label=name)
    if band:
        axes.fill_between(steps, values["low"], values["high"], color=color, alpha=0.18, linewidth=0)
