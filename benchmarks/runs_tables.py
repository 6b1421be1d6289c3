"""Markdown tables of runs: of several processes, of what stops them, and of damage to their folders."""

from __future__ import annotations

from typing import Any

from benchmarks import results
from benchmarks.results import FOLDER
from benchmarks.tables import described, table

DISTURBANCES = {
    "kill": "kill -9 before each write (half of it written), fsync and rename",
    "random": "kill -9 at random times",
    "full": "the disk is full from each write on",
    "limit": "no file may grow (ulimit -f) from each write on",
    "rename": "each rename fails (EIO, ESTALE)",
    "clock": "the clock is set to 1970 or 2096 before each call",
    "sigterm": "SIGTERM at random times",
    "sigint": "Ctrl-C at random times",
    "import": "Ctrl-C while PyTorch is imported",
    "suspend": "SIGSTOP and SIGCONT at random times",
    "processes": "kill -9 to one of two processes at random times",
    "adapt": "`metakern adapt`, kill -9 before each call",
    "eval": "`metakern eval --compare finetune`, kill -9 before each call",
}
PARTS = {"equal": "whole", "shard": "divided"}


def equality_table() -> str:
    """A row for each number of processes, with whole and with divided parameters: the largest differences."""
    found = results.load(FOLDER / "scaling.json")
    rows, where = [], {}
    for name, entry in found.items():
        part, processes = _part(name)
        algorithms = {key: value for key, value in entry.items() if isinstance(value, dict) and "weights" in value}
        if part in PARTS:
            cells = (max((value[key], key_) for key_, value in algorithms.items()) for key in ("weights", "moments"))
            rows.append([processes, PARTS[part], *(f"{apart:.1e} ({worst})" for apart, worst in cells)])
            where[described(entry)] = None
    head = ["processes", "parameters", "weights apart by", "moments apart by"]
    return "\n".join([table(head, rows), "", *where])


def fsdp_table() -> str:
    """A row for each number of processes and kind of Llama that FSDP2 divides."""
    found = results.load(FOLDER / "scaling.json")
    rows, where = [], {}
    for name, entry in found.items():
        part, processes = _part(name)
        if part == "fsdp":
            for kind in ("whole", "lora"):
                one = entry[kind]
                rows.append([processes, {"lora": "LoRA"}.get(kind, kind), f"{one['error']:.1e}", f"{one['held']:.0%}"])
            where[described(entry)] = None
    return "\n".join([table(["processes", "Llama", "weights apart by", "held by each"], rows), "", *where])


def ratio_table() -> str:
    """A row for each model whose step was timed in two processes."""
    found = results.load(FOLDER / "scaling.json")["ratio"]
    rows = [
        [
            f"{entry['parameters']:,}",
            f"{entry['measured']:.2f}",
            f"{entry['predicted']:.2f}",
            f"{1e3 * entry['seconds']['one']:.0f} ms",
            f"{1e3 * entry['seconds']['exchange']:.1f} ms",
        ]
        for entry in found.values()
        if isinstance(entry, dict) and "measured" in entry
    ]
    head = ["parameters", "two processes / one", "by the cost model", "one process", "all-reduce"]
    return "\n".join([table(head, rows), "", described(found)])


def crashes_table() -> str:
    """A row for each kind of disturbance."""
    found = results.load(FOLDER / "crashes.json")
    rows = {text: (found[name], found[name]["trials"]) for name, text in DISTURBANCES.items() if name in found}
    return _counted(rows, ("right", "wrong"))


def damage_table() -> str:
    """A row for each seed: how often damage to a run's folder was noticed."""
    found = results.load(FOLDER / "damage.json")
    rows = {}
    for name, entry in found.items():
        total: dict[str, int] = {}
        for outcomes in entry["outcomes"].values():
            for outcome, count in outcomes.items():
                total[outcome] = total.get(outcome, 0) + count
        rows[name] = entry, total
    return _counted(rows, ("refused", "replaced", "harmless", "silent", "traceback"))


def soak_table() -> str:
    """A row for each training: what the process held at a quarter of the steps and at the end."""
    rows, where = [], {}
    for name, entry in results.load(FOLDER / "soak.json").items():
        looks = entry["looks"]
        early, late = looks[len(looks) // 4 - 1], looks[-1]
        steps = (f"{look['step']:,}" for look in (early, late))
        memory = (f"{look['memory_mib']:.1f} MiB" for look in (early, late))
        counts = (f"{early[key]:.0f}, {late[key]:.0f}" for key in ("files", "threads"))
        rows.append([name, f"{entry['shapes']}", ", ".join(steps), ", ".join(memory), *counts])
        where[described(entry)] = None
    return "\n".join([table(["", "shapes", "after steps", "memory", "open files", "threads"], rows), "", *where])


def _part(name: str) -> tuple[str, str]:
    part, _, processes = name.partition(", ")
    return part, processes.partition(" ")[0] or "2"


def _counted(rows: dict[str, tuple[dict[str, Any], dict[str, int]]], columns: tuple[str, ...]) -> str:
    cells = [[name, str(sum(n.values())), *(str(n.get(c, 0)) for c in columns)] for name, (_, n) in rows.items()]
    where = dict.fromkeys(described(entry) for entry, _ in rows.values())
    return "\n".join([table(["", "trials", *columns], cells), "", *where])
