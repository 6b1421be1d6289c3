"""Placeholders for the parts of learn2learn that are left out: taking something from one is an ImportError."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import NoReturn


class _Absent(ModuleType):
    _what: str

    def __getattr__(self, name: str) -> NoReturn:
        # The import of a submodule reads `__path__`.
        if name.startswith("__") and name != "__path__":
            raise AttributeError(name)
        raise ImportError(
            f"{self.__name__} is left out of metakern.compat, which has no {self._what}: take them from learn2learn "
            "itself, and the algorithms from here"
        )


def absent(name: str, what: str) -> ModuleType:
    """Returns a module that can be imported as `name`, and of which every attribute is an ImportError."""
    module = _Absent(name)
    module._what = what
    sys.modules[name] = module
    return module
