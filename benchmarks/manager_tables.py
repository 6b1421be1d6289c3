"""Markdown tables of results/manager.json: parsers on unseen intents and policies on unseen services."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks import results
from benchmarks.results import FOLDER
from benchmarks.tables import described, table
from metakern.dialogue.metrics import paired_interval

NAMES = {
    "protonet": "prototypes, meta-trained",
    "finetune": "plainly trained",
    "finetune:adam": "plainly trained, adapted by Adam",
    "pretrained": "untrained encoder",
    "retrieval": "nearest text, TF-IDF",
    "majority": "majority",
    "maml": "MAML",
}
HINTED = "sgd, hints"
HINTS = {
    "none": "none",
    "act": "acts of the data",
    "act, policy": "acts that the policy chooses",
    "reply": "nearest taught reply",
    "act+reply": "nearest taught reply, acts of the data",
    "act+reply, policy": "nearest taught reply, acts that the policy chooses",
}
PARSER = {"accuracy": "found", "accepted": "accepted", "refused": "refused"}
POLICY = {"accuracy": "exact", "f1": "F1"}


def parsers_table() -> str:
    """A row for each data set and contender: shares after each number of shots, of the first seed."""
    return _table("parser", PARSER, "shot")


def policies_table() -> str:
    """A row for each data set and contender: scores after each number of inner steps, of the first seed."""
    return _table("policy", POLICY, "step")


def hints_table() -> str:
    """A row for each kind of hint: bits a byte and chrF after numbers of inner steps, beside a model without hints."""
    entry = results.load(FOLDER / "manager.json")[HINTED]["0"]
    ks, replies = entry["columns"], entry["reply_columns"]
    after = [f"{k} step{'s' * (k != 1)}" for k in (*ks, ks[-1], *replies)]
    titles = ["bits a byte"] * len(ks) + ["less than without"] + ["chrF"] * len(replies)
    rows, plain = [], entry["scores"]["none"]["bits"]
    for name, scores in entry["scores"].items():
        bits = [f"{statistics.mean(row):.2f}" for row in scores["bits"]]
        mean, half = paired_interval(plain[-1], scores["bits"][-1])
        less = "-" if name == "none" else f"{mean:.2f} [{mean - half:.2f}, {mean + half:.2f}]"
        rows.append([HINTS[name], *bits, less, *(f"{x:.1f}" for x in scores["chrf"]["mean"])])
    head = ["hints", *(f"{title}, {k}" for title, k in zip(titles, after, strict=True))]
    return f"{table(head, rows)}\n\n{described(entry)}"


def slots_table() -> str:
    """A row for each way to find slots, in services of unseen domains: F1, precision and recall by the support."""
    entry = results.load(FOLDER / "slots.json")["0"]
    sizes = list(next(iter(entry["scores"].values())))
    rows = [
        [name, *(f"{of['f1']:.0%} ({of['precision']:.0%}, {of['recall']:.0%})" for of in found.values())]
        for name, found in entry["scores"].items()
    ]
    return f"{table(['', *(f'{size} conversations' for size in sizes)], rows)}\n\n{described(entry)}"


def _table(part: str, metrics: dict[str, str], unit: str) -> str:
    found = {name: seeds["0"] for name, seeds in results.load(FOLDER / "manager.json").items()}
    found = {name: entry for name, entry in found.items() if entry["part"] == part}
    columns: Sequence[int] = next((entry["columns"] for entry in found.values()), ())
    head = ["data", "", *(f"{title}, {k} {unit}{'s' * (k != 1)}" for title in metrics.values() for k in columns)]
    rows = [
        [name, NAMES[contender], *(cell for metric in metrics for cell in _cells(scores.get(metric), len(columns)))]
        for name, entry in found.items()
        for contender, scores in entry["scores"].items()
    ]
    where = dict.fromkeys(f"{name}: {described(entry)}" for name, entry in found.items())
    return "\n".join([table(head, rows), "", *where])


def _cells(values: dict[str, Any] | None, columns: int) -> list[str]:
    if values is None:
        return ["-"] * columns
    rows = zip(values["mean"], values["low"], values["high"], strict=True)
    return [f"{mean:.0%} [{max(low, 0):.0%}, {min(high, 1):.0%}]" for mean, low, high in rows]
