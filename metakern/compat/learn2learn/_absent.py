"""Parts of learn2learn that are left out, which say so when something is taken from them."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import NoReturn


class _Absent(ModuleType):
    _what: str

    def __getattr__(self, name: str) -> NoReturn:
        # `__path__` is what the import of a module within it asks for.
        if name.startswith("__") and name != "__path__":
            raise AttributeError(name)
        raise ImportError(
            f"{self.__name__} is left out of metakern.compat, which has no {self._what}: take them from learn2learn "
            "itself, and the algorithms from here"
        )


def absent(name: str, what: str) -> ModuleType:
    """A module of that name that can be imported, and nothing from it."""
    module = _Absent(name)
    module._what = what
    sys.modules[name] = module
    return module
