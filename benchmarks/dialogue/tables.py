"""Markdown tables of results/dialogue.json, and the numbers of its picture.

    ratio_k = exp(mean_t mean_s [b_k(t, s) - l_k(t, s)])

l_k(t, s) is the query loss of the run, trained by MAML, on the test task t of the seed s after k inner steps, and
b_k(t, s) that of a contender. Intervals are 95% Student t intervals over tasks; a task that several seeds test counts
once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from benchmarks import results
from benchmarks.results import FOLDER
from benchmarks.tables import described, table

Interval = tuple[float, float, float]  # the middle, the low end, the high end
OWN, BEST = "maml", "best plain"
NAMES = {"fomaml": "FOMAML", "finetune": "fine-tuned, SGD", "finetune:adam": "fine-tuned, Adam"} | {
    "pretrained": "pretrained, SGD",
    "pretrained:adam": "pretrained, Adam",
    "incontext": "in context",
    "prompt": "soft prompt",
    "reptile": "Reptile",
    "anil": "ANIL",
    "boil": "BOIL",
    "hypernetwork": "hypernetwork",
    OWN: "MAML",
}


def load() -> dict[str, dict[str, Any]]:
    """Return the results of the cells: for each the entries by seed."""
    return results.load(FOLDER / "dialogue.json")


def over_tasks(seeds: Iterable[dict[str, Any]], value: Callable[[dict[str, Any]], Iterable[float]]) -> Interval:
    """Return the mean and the interval, over tasks, of a value that an entry has for each of its tasks."""
    from metakern.dialogue.metrics import interval

    found: dict[str, list[float]] = {}
    for entry in seeds:
        for task, x in zip(entry["tasks"], value(entry), strict=True):
            found.setdefault(task, []).append(x)
    mean, half = interval([sum(values) / len(values) for values in found.values()])
    return mean, mean - half, mean + half


def ratio(seeds: dict[str, Any], contender: str, i: int) -> Interval:
    """Return the ratio of perplexities of a contender, or of the best plain one of each seed, and the run."""

    from metakern.dialogue.contenders import is_plain

    def difference(entry: dict[str, Any]) -> Iterable[float]:
        loss = entry["loss"]
        of = {name: rows[i] for name, rows in loss.items()}
        name = min(filter(is_plain, of), key=lambda n: sum(of[n])) if contender == BEST else contender
        return (b - own for b, own in zip(of[name], of[OWN], strict=True))

    having = (entry for entry in seeds.values() if contender == BEST or contender in entry["loss"])
    mean, low, high = map(math.exp, over_tasks(having, difference))
    return mean, low, high


def right(seeds: dict[str, Any], kind: str, contender: str, i: int) -> Interval:
    """Return the share of right replies to taught or unseen questions."""
    having = (entry for entry in seeds.values() if contender in entry.get("right", {}).get(kind, {}))
    return over_tasks(having, lambda entry: entry["right"][kind][contender][i])


def ratios_table(contenders: Sequence[str] = ()) -> str:
    """The ratios of all cells, a row for each contender; () stands for all."""
    rows, steps = [], []
    for name, seeds in load().items():
        steps = next(iter(seeds.values()))["steps"]
        measured = dict.fromkeys((BEST, *(c for entry in seeds.values() for c in entry["loss"] if c != OWN)))
        for contender in contenders or measured:
            if contender in measured:
                found = (ratio(seeds, contender, i) for i in range(len(steps)))
                shown = (f"{x:.2f} [{low:.2f}, {high:.2f}]" if x < 100 else "> 100" for x, low, high in found)
                rows.append([titled(name, seeds), f"{NAMES.get(contender, contender)} / MAML", *shown])
    return table(["data/model", "", *(f"k = {k}" for k in steps)], rows)


def titled(name: str, seeds: dict[str, Any]) -> str:
    """Return a cell's name with its numbers of tasks and seeds."""
    tasks, n = {task for entry in seeds.values() for task in entry["tasks"]}, len(seeds)
    return f"{name}: {len(tasks)} tasks, {n} seed{'s' * (n > 1)}"


def replies_table(contenders: Sequence[str] = ()) -> str:
    """The shares of right replies of all cells whose replies were judged; () stands for all contenders."""
    rows, steps = [], []
    for name, seeds in load().items():
        entry = next((entry for entry in seeds.values() if "right" in entry), None)
        if not entry:
            continue
        steps = entry["reply_steps"]
        for kind, measured in entry["right"].items():
            for contender in contenders or measured:
                shares = (right(seeds, kind, contender, i) for i in range(len(steps)))
                shown = (f"{x:.0%} [{max(low, 0):.0%}, {min(high, 1):.0%}]" for x, low, high in shares)
                rows.append([name, kind, NAMES.get(contender, contender), *shown])
    return table(["data/model", "questions", "", *(f"k = {k}" for k in steps)], rows)


def lesson(contender: str, key: str) -> Callable[[dict[str, Any]], Iterable[float]]:
    """Return what reads a value of a contender's lessons from an entry."""
    return lambda entry: entry["lessons"][contender][key]


def lessons_table() -> str:
    """How models that were taught until they reply as taught do, for the cells of results/lessons.json."""
    rows = []
    for name, seeds in results.load(FOLDER / "lessons.json").items():
        for contender in next(iter(seeds.values()))["lessons"]:
            steps, taught, unseen = (
                over_tasks(seeds.values(), lesson(contender, key)) for key in ("steps", "taught", "unseen")
            )
            shares = (f"{x:.0%} [{max(low, 0):.0%}, {min(high, 1):.0%}]" for x, low, high in (taught, unseen))
            who = NAMES.get(contender, contender).removesuffix(", SGD")
            rows.append([name, who, f"{steps[0]:.1f} [{steps[1]:.1f}, {steps[2]:.1f}]", *shares])
    return table(["data/model", "", "inner steps", "taught", "unseen"], rows)


def machines() -> str:
    """Where and when the cells were measured."""
    cells = (*load().values(), *results.load(FOLDER / "lessons.json").values())
    lines = (f"{described(entry)}  " for seeds in cells for entry in seeds.values())
    return "\n".join(dict.fromkeys(lines))
