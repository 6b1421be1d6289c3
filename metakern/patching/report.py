"""What `patch` did, said in a line for each kind of module."""

from __future__ import annotations

from typing import NamedTuple


class Replaced(NamedTuple):
    """A module at `path`, "" being the model itself, that was `before` and is `after`."""

    path: str
    before: str
    after: str


class Left(NamedTuple):
    """A module at `path`, of the class `kind`, that stayed what it was, and why."""

    path: str
    kind: str
    why: str


class Report(NamedTuple):
    """What `patch` or `unpatch` did; made to be printed."""

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
    """Paths of one depth as one, with * where they differ: "layers.*.norm, norm"."""
    depths: dict[int, list[list[str]]] = {}
    for path in paths:
        parts = (path or "(model)").split(".")
        depths.setdefault(len(parts), []).append(parts)
    columns = ([set(column) for column in zip(*alike, strict=True)] for alike in depths.values())
    return ", ".join(".".join("*" if len(names) > 1 else min(names) for names in row) for row in columns)
