"""A workload as NumPy arrays in one file, for methods that have no PyTorch."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Problem:
    """A workload's weights, data, settings, and its meta-gradients in float64.

    theta: the weights that learn, by their names in the state dict. frozen: the others. truth: the exact meta-gradient.
    first: the first-order one; both are empty if they were not computed. settings: the model, the inner rate lr, and
    all sizes, such as the number of inner steps K.
    """

    name: str
    theta: Arrays
    frozen: Arrays
    support: tuple[np.ndarray, ...]
    query: tuple[np.ndarray, ...]
    settings: dict[str, Any]
    truth: Arrays = field(default_factory=dict)
    first: Arrays = field(default_factory=dict)

    def save(self, path: Path) -> None:
        parts: dict[str, Any] = {part: getattr(self, part) for part in ("theta", "frozen", "truth", "first")}
        parts |= {part: dict(enumerate(getattr(self, part))) for part in ("support", "query")}
        arrays = {f"{part}/{name}": array for part, found in parts.items() for name, array in found.items()}
        np.savez(path, name=self.name, settings=json.dumps(self.settings), **arrays)

    @classmethod
    def load(cls, path: Path) -> Problem:
        parts: dict[str, Any] = {part: {} for part in ("theta", "frozen", "support", "query", "truth", "first")}
        with np.load(path) as stored:
            for key in stored.files:
                part, _, name = key.partition("/")
                if name:
                    parts[part][name] = stored[key]
            name, settings = stored["name"].item(), json.loads(stored["settings"].item())
        parts |= {part: tuple(parts[part].values()) for part in ("support", "query")}
        return cls(name=name, settings=settings, **parts)

    def error(self, gradient: Arrays, order: int = 2) -> float:
        """Return the relative error of a meta-gradient of this order, over all parameters."""
        found, truth = self._vectors(gradient, order)
        return float(np.linalg.norm(found - truth) / np.linalg.norm(truth))

    def cosine(self, gradient: Arrays, order: int = 2) -> float:
        """Return the cosine of the angle between a meta-gradient of this order and the true one."""
        found, truth = self._vectors(gradient, order)
        return float(found @ truth / (np.linalg.norm(found) * np.linalg.norm(truth)))

    def _vectors(self, gradient: Arrays, order: int) -> tuple[np.ndarray, np.ndarray]:
        truth = self.truth if order == 2 else self.first
        if set(gradient) != set(truth):
            raise ValueError(f"a meta-gradient must name {sorted(truth)}, got {sorted(gradient)}")
        found = [np.asarray(gradient[name], np.float64).ravel() for name in truth]
        return np.concatenate(found), np.concatenate([np.ravel(t).astype(np.float64) for t in truth.values()])
