"""Markdown tables of results/manager.json: parsers on unseen intents and policies on unseen services."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks import results
from benchmarks.results import FOLDER
from benchmarks.tables import described, table

NAMES = {
    "protonet": "prototypes, meta-trained",
    "finetune": "plainly trained",
    "finetune:adam": "plainly trained, adapted by Adam",
    "pretrained": "untrained encoder",
    "retrieval": "nearest text, TF-IDF",
    "majority": "majority",
    "maml": "MAML",
}
PARSER = {"accuracy": "found", "accepted": "accepted", "refused": "refused"}
POLICY = {"accuracy": "exact", "f1": "F1"}


def parsers_table() -> str:
    """A row for each data set and contender: shares after each number of shots, of the first seed."""
    return _table("parser", PARSER, "shot")


def policies_table() -> str:
    """A row for each data set and contender: scores after each number of inner steps, of the first seed."""
    return _table("policy", POLICY, "step")


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
