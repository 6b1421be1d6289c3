"""Freed memory stays with the process: an inner loop frees and takes the same tensors at every step."""

from __future__ import annotations

import ctypes
import os
from functools import cache

KEPT_BYTES = 512 * 2**20
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # mallopt's names for them (malloc.h)


@cache
def keep_freed_memory() -> None:
    """Has glibc keep up to KEPT_BYTES of freed memory, once for the process; elsewhere nothing.

    By default it hands memory back at once and takes it anew, zeroed page by page, which takes much of a meta-step's
    time. The threshold from which a tensor has pages of its own is set to the 32 MiB that glibc itself arrives at. Who
    has set these thresholds in the environment is left alone.
    """
    if any(name.startswith("MALLOC_") for name in os.environ) or "malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return
    mallopt = getattr(_libc(), "mallopt", None)
    if mallopt is None:
        return
    mallopt(_TRIM_THRESHOLD, KEPT_BYTES)
    mallopt(_MMAP_THRESHOLD, 32 * 2**20)


def give_back() -> None:
    """Hands what is free now back to the system, for who is about to take memory of another kind (glibc)."""
    trim = getattr(_libc(), "malloc_trim", None)
    if trim is not None:
        trim(0)


@cache
def _libc() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(None)
    except (OSError, TypeError):
        return None
