"""A workload as arrays in one file, for methods that have no PyTorch: its weights, data, rates and exact answer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Problem:
    """theta and truth by the state dict's names; truth is the meta-gradient in float64, empty where nobody asked."""

    name: str
    tiny: bool
    theta: dict[str, np.ndarray]
    support: tuple[np.ndarray, ...]
    query: tuple[np.ndarray, ...]
    truth: dict[str, np.ndarray]
    steps: int
    lr: float
    heads: int

    def save(self, path: Path) -> None:
        arrays = {f"theta/{name}": a for name, a in self.theta.items()}
        arrays |= {f"truth/{name}": a for name, a in self.truth.items()}
        for part, batch in (("support", self.support), ("query", self.query)):
            arrays |= {f"{part}/{i}": a for i, a in enumerate(batch)}
        scalars = {key: getattr(self, key) for key in ("name", "tiny", "steps", "lr", "heads")}
        np.savez(path, **arrays, **scalars)

    @classmethod
    def load(cls, path: Path) -> Problem:
        with np.load(path) as stored:
            parts: dict[str, dict[str, np.ndarray]] = {"theta": {}, "truth": {}, "support": {}, "query": {}}
            for key in stored.files:
                part, _, name = key.partition("/")
                if name:
                    parts[part][name] = stored[key]
            scalars = {key: stored[key].item() for key in ("name", "tiny", "steps", "lr", "heads")}
        batches = {part: tuple(parts[part].values()) for part in ("support", "query")}
        return cls(theta=parts["theta"], truth=parts["truth"], **batches, **scalars)

    def error(self, gradient: dict[str, np.ndarray]) -> float:
        """The relative error of a meta-gradient, over all parameters."""
        if set(gradient) != set(self.truth):
            raise ValueError(f"a meta-gradient must name {sorted(self.truth)}, got {sorted(gradient)}")
        distance = sum(np.square(np.asarray(gradient[name], np.float64) - t).sum() for name, t in self.truth.items())
        return float(np.sqrt(distance / sum(np.square(t).sum() for t in self.truth.values())))
