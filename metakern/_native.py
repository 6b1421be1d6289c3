"""The compiled kernels, where the package was built with them."""

from __future__ import annotations

from types import ModuleType

_C: ModuleType | None
try:
    from metakern import _C  # type: ignore[attr-defined, no-redef]
except ImportError:
    _C = None


def obstacle() -> str | None:
    """Why the C++ kernels can't be used, or None."""
    if _C is None:
        return "metakern was built without C++ kernels: reinstall where a C++17 compiler is found (METAKERN_NATIVE=cpu)"
    return None
