"""learn2learn's algorithms."""

from __future__ import annotations

from typing import Any

from metakern.compat.learn2learn.algorithms.base_learner import BaseLearner
from metakern.compat.learn2learn.algorithms.gbml import GBML
from metakern.compat.learn2learn.algorithms.maml import MAML, maml_update
from metakern.compat.learn2learn.algorithms.meta_sgd import MetaSGD, meta_sgd_update

__all__ = ["GBML", "MAML", "BaseLearner", "MetaSGD", "maml_update", "meta_sgd_update"]


def __getattr__(name: str) -> Any:
    """Imports the Lightning classes when one is asked for, as importing Lightning takes seconds."""
    if name == "lightning" or name.startswith("Lightning"):
        from importlib import import_module

        lightning = import_module(f"{__name__}.lightning")
        return lightning if name == "lightning" else getattr(lightning, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
