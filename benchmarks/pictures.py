"""Pictures of the results of one kind of machine, each as PNG and as SVG, for light and for dark pages."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from textwrap import fill
from typing import Any

from benchmarks import peers
from benchmarks.dialogue import tables as dialogue
from benchmarks.results import FOLDER
from benchmarks.tables import best, exact, is_torch, measured, ms, ours, sweeps
from benchmarks.workloads import WorkloadName

THEMES = {"light": ("#1f2328", "#8b949e", "#d0d7de"), "dark": ("#e6edf3", "#7d8590", "#3d444d")}  # ink, peers, grid
OURS = "#2f81f7"
COLORS = {"metakern": OURS, "plain": "#8b949e", "jax": "#d29922"}
LINES = {"metakern default": "-.", "metakern auto": "-", "metakern store": "--", "metakern recompute": ":"}


def bases() -> dict[str, dict[str, dict[Any, dict[str, Any]]]]:
    """The sweeps: {workload: {key that is varied: {value of the key: results}}}."""
    found: dict[str, dict[str, dict[Any, dict[str, Any]]]] = {}
    for (base, key), points in sweeps().items():
        found.setdefault(base, {})[key] = points
    return found


def stem(base: str) -> str:
    """Return the first part of the file names of a workload's sweeps."""
    return "sweep-" + re.sub("[^a-z0-9]+", "-", base.lower())


def markup(name: str, alt: str) -> str:
    """Return the HTML of a picture for light and dark pages; its paths start at the repository's root."""
    source = f"benchmarks/results/{name}"
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{source}-dark.svg">'
        f'<img alt="{alt}" src="{source}-light.svg"></picture>'
    )


def draw() -> None:
    """Draw the picture of the README and those of all sweeps."""
    save("maml", bars)
    save("dialogue", adaptation)
    for base, keys in bases().items():
        save(stem(base), partial(lines, base, keys))


def draw_scaling(found: dict[str, Any]) -> None:
    """Draw the simulated speedups over several processes."""
    save("scaling", partial(speedups, found))


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
    """Bars for each medium workload: the times of the fastest JAX form and PyTorch peer, as multiples of metakern's."""
    from matplotlib.figure import Figure

    data = {name: found for name, found in measured().items() if name.endswith(":medium")}
    figure = Figure(figsize=(7.5, 0.3 + 0.75 * len(data)), layout="constrained")
    axes = figure.subplots()
    places, longest = [], 1.0
    for group, found in enumerate(data.values()):
        method, over = ours(found)
        rows = [("metakern", found["methods"][method], 1.0)]
        for of in (lambda peer: peer == "jax", is_torch):
            if peer_rows := exact(found, of):
                method, row = best(peer_rows, over)
                rows.append((method.partition(",")[0], row, row[over]))
        for i, (method, row, ratio) in enumerate(rows):
            place, color = 4 * group + i, OURS if i == 0 else COLORS.get(row["peer"], THEMES[theme][1])
            axes.barh(place, ratio, height=0.9, color=color)
            times = "" if i == 0 else f", {ratio:.1f} x"
            axes.text(ratio + 0.05, place, f"{method}: {ms(row['median_ms'])} ms{times}", va="center")
            longest = max(longest, ratio)
        places.append(4 * group + (len(rows) - 1) / 2)
    axes.set_yticks(places, [WorkloadName.parse(name).family.upper() for name in data], fontweight="bold")
    axes.tick_params(axis="y", length=0)
    axes.set_xlim(0, longest * 1.25)
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    axes.invert_yaxis()
    axes.set_title("One exact second-order meta-gradient: time, as a multiple of metakern's", loc="left")
    return figure


def adaptation(theme: str) -> Any:
    """The ratio of the best plain contender to MAML by inner steps, and the shares of right replies of the bots."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    figure = Figure(figsize=(7.5, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    cells = dialogue.load()
    for name, seeds in cells.items():
        if not name.endswith("/gpt"):
            continue
        steps = next(iter(seeds.values()))["steps"]
        middle, low, high = zip(*(dialogue.ratio(seeds, dialogue.BEST, i) for i in range(len(steps))), strict=True)
        (line,) = left.plot(steps, middle, marker=".", label=name.removesuffix("/gpt"))
        left.fill_between(steps, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    left.axhline(1, color=THEMES[theme][1], linewidth=1)
    left.set_xticks(steps)
    left.set_title("Perplexity: best plain baseline / MAML", loc="left")
    entry = cells["bots/gpt"]["0"]
    places = range(len(entry["reply_steps"]))
    for name, color, style in (
        ("maml", OURS, "-"),
        ("pretrained:adam", "#a371f7", "-"),
        ("finetune:adam", COLORS["jax"], "-"),
        ("retrieval", THEMES[theme][1], "--"),
    ):
        for kind, width in (("taught", 0.8), ("unseen", 1.8)):
            shares = [dialogue.right(cells["bots/gpt"], kind, name, i)[0] for i in places]
            label = dialogue.NAMES.get(name, name) if kind == "unseen" else None
            right.plot(places, shares, color=color, linestyle=style, linewidth=width, marker=".", label=label)
    right.set_xticks(places, map(str, entry["reply_steps"]))
    right.yaxis.set_major_formatter(PercentFormatter(1))
    right.set_title("Right replies of unseen bots (thin: taught)", loc="left")
    for axes in (left, right):
        axes.set_xlabel("inner steps")
        axes.legend(frameon=False)
        axes.grid(True)
    return figure


def speedups(found: dict[str, Any], theme: str) -> Any:
    """Simulated speedups by the number of processes, for bandwidths (left) and models (right)."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 3.2), layout="constrained")
    processes = found["processes"]
    for axes, kind, title in zip(
        figure.subplots(1, 2, sharey=True),
        ("bandwidth", "model"),
        ("1 G parameters, by bandwidth", "By parameters, at 25 Gbit/s"),
        strict=True,
    ):
        axes.plot(processes, processes, color=THEMES[theme][1], linewidth=1, label="ideal")
        for name, speedup in found[kind].items():
            axes.plot(processes, speedup, marker=".", label=name)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_xticks(processes, map(str, processes))
        axes.set_yticks(processes, map(str, processes))
        axes.set_xlabel("processes")
        axes.set_title(f"Simulated speedup. {title}", loc="left")
        axes.legend(frameon=False)
        axes.grid(True)
    return figure


def lines(base: str, keys: dict[str, dict[Any, dict[str, Any]]], theme: str) -> Any:
    """Lines of time (above) and peak memory (below), a column for each key that was varied."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator

    width = max(2, len(keys))  # in panels: the legend and the title need two
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
    figure.suptitle(fill(WorkloadName.parse(base).title, 40 * width))
    return figure
