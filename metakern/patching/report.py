"""The report of `patch` and `unpatch`, with a line for each kind of module."""

from __future__ import annotations

from typing import NamedTuple


class Replaced(NamedTuple):
    """A module that was replaced.

    Attributes:
        path: The module's name in the model; "" for the model itself.
        before: What it was: a class, or the loss of a model.
        after: What it is now: a class, or the ops that it runs.
    """

    path: str
    before: str
    after: str


class Left(NamedTuple):
    """A module that was not replaced.

    Attributes:
        path: The module's name in the model; "" for the model itself.
        kind: Its class, or the part of a model that was left, such as "attention of GPT2LMHeadModel".
        why: The reason.
    """

    path: str
    kind: str
    why: str


class Report(NamedTuple):
    """What `patch` or `unpatch` did; `print(report)` shows a line for each kind of module.

    Attributes:
        replaced: A `Replaced` (path, before, after) for each module that was replaced.
        left: A `Left` (path, kind, why) for each module that was not, though it is of a kind that `patch` replaces or
            has parameters.

    >>> import metakern as mk, torch
    >>> report = mk.patch(torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.LSTM(8, 8, proj_size=2)))
    >>> report.replaced[0].after, report.left[0].why
    ('metakern.nn.Linear', 'proj_size must be 0, got 2')
    """

    replaced: tuple[Replaced, ...]
    left: tuple[Left, ...] = ()

    def __str__(self) -> str:
        kinds: dict[str, list[str]] = {}
        for path, before, after in self.replaced:
            kinds.setdefault(f"{before} -> {after}", []).append(path)
        for path, kind, why in self.left:
            kinds.setdefault(f"{kind} left: {why}", []).append(path)
        rows = [(_pattern(paths), len(paths), what) for what, paths in kinds.items()]
        width = max((len(pattern) for pattern, _, _ in rows), default=0)
        lines = (f"  {pattern:{width}}  {f'{n} x ' if n > 1 else ''}{what}" for pattern, n, what in rows)
        return "\n".join([f"{len(self.replaced)} replaced, {len(self.left)} left", *lines])


def _pattern(paths: list[str]) -> str:
    """Returns one pattern for all paths of a depth, with * where they differ: "layers.*.norm, norm"."""
    depths: dict[int, list[list[str]]] = {}
    for path in paths:
        parts = (path or "(model)").split(".")
        depths.setdefault(len(parts), []).append(parts)
    columns = ([set(column) for column in zip(*alike, strict=True)] for alike in depths.values())
    return ", ".join(".".join("*" if len(names) > 1 else min(names) for names in row) for row in columns)
