"""The pictures of what was measured on one kind of machine, each as PNG and SVG, for light and for dark pages."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from textwrap import fill
from typing import Any

from benchmarks import peers
from benchmarks.results import FOLDER
from benchmarks.tables import exact, fastest, measured, ms, sweeps
from benchmarks.workloads import Spec

THEMES = {"light": ("#1f2328", "#8b949e", "#d0d7de"), "dark": ("#e6edf3", "#7d8590", "#3d444d")}  # ink, peers, grid
OURS, LIMIT = "#2f81f7", "#da3633"
COLORS = {"metakern": OURS, "plain": "#8b949e", "jax": "#d29922"}
LINES = {"metakern auto": "-", "metakern store": "--", "metakern recompute": ":"}


def bases() -> dict[str, dict[str, dict[Any, dict[str, Any]]]]:
    """The sweeps of each workload, by the size that they vary."""
    found: dict[str, dict[str, dict[Any, dict[str, Any]]]] = {}
    for (base, key), points in sweeps().items():
        found.setdefault(base, {})[key] = points
    return found


def stem(base: str) -> str:
    """What the pictures of a workload's sweeps are called."""
    return "sweep-" + re.sub("[^a-z0-9]+", "-", base.lower())


def markup(name: str, alt: str) -> str:
    """A picture in Markdown, for a light or a dark page; the paths are those of the README."""
    source = f"benchmarks/results/{name}"
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{source}-dark.svg">'
        f'<img alt="{alt}" src="{source}-light.svg"></picture>'
    )


def draw() -> None:
    """All of them."""
    save("maml", bars)
    for base, keys in bases().items():
        save(stem(base), partial(lines, base, keys))


def save(name: str, make: Callable[[str], Any]) -> None:
    from matplotlib import rc_context

    for theme, (ink, _, grid) in THEMES.items():
        style = {
            "font.size": 8,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": False,
            "grid.color": grid,
            "grid.linewidth": 0.5,
            "svg.hashsalt": name,  # the same results give the same file
            "svg.fonttype": "none",
            "font.family": "sans-serif",
            **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), ink),
        }
        with rc_context(style):
            figure = make(theme)
            figure.savefig(FOLDER / f"{name}-{theme}.png", dpi=120, transparent=True, metadata={"Software": None})
            figure.savefig(FOLDER / f"{name}-{theme}.svg", transparent=True, metadata={"Date": None})


def bars(theme: str) -> Any:
    """Time and memory of each peer's fastest form and of metakern's, a panel for each workload of medium size."""
    from matplotlib.figure import Figure

    data = {name: found for name, found in measured().items() if name.endswith(":medium")}
    columns = min(3, len(data))
    height = -(-len(data) // columns)
    figure = Figure(figsize=(4.2 * columns, 2.6 * height), layout="constrained")
    panels = figure.subplots(height, columns, squeeze=False).flat
    for axes, (name, found) in zip(panels, data.items(), strict=False):
        rows = fastest(exact(found, lambda peer: True))
        colors = [OURS if row["peer"] == "metakern" else THEMES[theme][1] for row in rows.values()]
        # A peer shows its fastest form, metakern each of its own.
        names = [method if row["peer"] == "metakern" else method.partition(",")[0] for method, row in rows.items()]
        drawn = axes.barh(names, [row["median_ms"] for row in rows.values()], color=colors)
        axes.bar_label(
            drawn, [f"{ms(row['median_ms'])} ms, {row['peak_mib']:.0f} MiB" for row in rows.values()], padding=3
        )
        if "limit_ms" in found:
            axes.axvline(found["limit_ms"], color=LIMIT, linewidth=1)
        axes.invert_yaxis()
        axes.margins(x=0.62)
        axes.set_xticks([])
        axes.set_title(Spec.parse(name).family.upper(), loc="left")
    for axes in panels:
        axes.set_axis_off()
    figure.suptitle("one exact second-order meta-gradient: time and peak memory; red: its products alone")
    return figure


def lines(base: str, keys: dict[str, dict[Any, dict[str, Any]]], theme: str) -> Any:
    """Time above, peak memory below, over each size that was varied."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator

    width = max(2, len(keys))  # panels, which the legend and the title have room in
    figure = Figure(figsize=(3.2 * width, 4.8), layout="constrained")
    grid = figure.subplots(2, len(keys), squeeze=False, sharex="col")
    for column, (key, points) in enumerate(keys.items()):
        methods = dict.fromkeys(m for point in points.values() for m in point["methods"] if peers.order(m) == 2)
        for axes, value in zip(grid[:, column], ("median_ms", "peak_mib"), strict=True):
            for method in methods:
                rows = {x: point["methods"][method] for x, point in points.items() if method in point["methods"]}
                color = COLORS.get(next(iter(rows.values()))["peer"], THEMES[theme][0])
                style = {"color": color, "linestyle": LINES.get(method, "-"), "marker": ".", "label": method}
                axes.plot(list(rows), [max(row[value], 1) for row in rows.values()], **style)
            axes.set_xscale("log", base=2)
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_locator(NullLocator())
            axes.grid(True)
            axes.set_xticks(list(points), [str(x) for x in points])
        grid[1, column].set_xlabel(key)
    grid[0, 0].set_ylabel("time, ms")
    grid[1, 0].set_ylabel("peak memory, MiB")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(fill(Spec.parse(base).title, 40 * width))
    return figure
