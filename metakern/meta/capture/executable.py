"""Executables: lowered programs, which C++ runs in memory that was laid out beforehand, without Python in between.

An executable runs for several microbatches side by side, a thread and an arena each: microbatches so small that what
they need stays in a core's cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from metakern.native.memory import address

ALIGNMENT = 64  # of what an arena holds, in bytes


class Executable:
    """executable([inputs, …], threads): the program's outputs for each list of inputs, or None where a check fails."""

    def __init__(self, native: Any, constants: list[Tensor], outputs: list[Tensor | None]) -> None:
        self._native, self._constants, self._outputs = native, constants, outputs
        self._layouts = [_layout(t) for t in constants]

    @property
    def bytes(self) -> int:
        """Memory of a run beside inputs, outputs, and what it only reads."""
        return self._native.bytes

    def release(self) -> None:
        """Gives back the memory that all executables run in, until one runs again."""
        self._native.release()

    def __call__(self, microbatches: Sequence[Sequence[Tensor]], threads: int) -> list[list[Tensor | None]] | None:
        if [_layout(t) for t in self._constants] != self._layouts:
            return None
        results, bases = [], []
        for inputs in microbatches:
            made = [None if t is None else torch.empty(t.shape, dtype=t.dtype) for t in self._outputs]
            addressed = (*inputs, *self._constants, *(t for t in made if t is not None))
            addresses = (address("MAML", "a tensor of a captured program", t) for t in addressed)
            bases.append([0, *addresses])  # 0: the arena
            results.append(made)
        return results if self._native.run(bases, threads) else None


def _layout(t: Tensor) -> tuple:
    return t.shape, t.stride(), t.dtype
