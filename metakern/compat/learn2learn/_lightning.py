"""Lightning, by the name that the program has imported: `pytorch_lightning` and `lightning` have different classes."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from typing import Any


def _lightning() -> Any:
    names = ("pytorch_lightning", "lightning.pytorch")
    for name in (*(name for name in names if name in sys.modules), *names):
        if find_spec(name.partition(".")[0]) is not None:
            return import_module(name)
    raise ImportError("learn2learn's Lightning classes need Lightning, which is not installed: pip install lightning")


pl = _lightning()
