"""Keeps freed memory in the process, as an inner loop frees and allocates the same tensors at every step."""

from __future__ import annotations

import ctypes
import os
from functools import cache

KEPT_BYTES = 512 * 2**20
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # M_TRIM_THRESHOLD and M_MMAP_THRESHOLD of malloc.h


@cache
def keep_freed_memory() -> None:
    """Have glibc keep up to KEPT_BYTES of freed memory, for the whole process. Without glibc it does nothing.

    By default glibc returns memory to the system at once and takes it again, zeroed page by page, which is much of the
    time of a meta-step. The size from which an allocation gets pages of its own is set to 32 MiB, the value that
    glibc's own adaptation ends at. Nothing is done if the environment configures malloc.
    """
    if any(name.startswith("MALLOC_") for name in os.environ) or "malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return
    mallopt = getattr(_libc(), "mallopt", None)
    if mallopt is None:
        return
    mallopt(_TRIM_THRESHOLD, KEPT_BYTES)
    mallopt(_MMAP_THRESHOLD, 32 * 2**20)


def give_back() -> None:
    """Return free memory to the system (glibc only), before memory is allocated in another way."""
    trim = getattr(_libc(), "malloc_trim", None)
    if trim is not None:
        trim(0)


@cache
def _libc() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(None)
    except (OSError, TypeError):
        return None
