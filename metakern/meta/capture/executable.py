"""Executables: lowered programs, which C++ runs in one arena whose layout was computed beforehand.

An executable runs several microbatches in parallel, each on its own thread and in its own arena. A microbatch is small
enough for its arena to stay in a core's cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from metakern.native.memory import address

ALIGNMENT = 64  # of tensors in an arena, in bytes
OBJECT_BYTES = 2**15


class Executable:
    """A lowered program: `executable([inputs, …], threads)` returns the outputs for each list of inputs.

    With `bfloat16`, its products of float32 matrices round their operands. It returns None where a check fails, or
    where it no longer fits its constants.
    """

    def __init__(self, native: Any, constants: list[Tensor], outputs: list[Tensor | None]) -> None:
        self._native, self._constants, self._outputs = native, constants, outputs
        self._layouts = [_layout(t) for t in constants]

    @property
    def bytes(self) -> int:
        """The size of the arena: the memory of a run besides inputs, outputs and constants."""
        return self._native.bytes

    @property
    def size(self) -> int:
        """The bytes of its instructions, and of the objects around them."""
        return self._native.size + OBJECT_BYTES

    def fits(self) -> bool:
        """Whether the constants have the layouts that they had when the program was lowered."""
        return [_layout(t) for t in self._constants] == self._layouts

    def release(self) -> None:
        """Free the memory of the arenas of all executables until one runs again."""
        self._native.release()

    def __call__(
        self, microbatches: Sequence[Sequence[Tensor]], threads: int, bfloat16: bool = False
    ) -> list[list[Tensor | None]] | None:
        if not self.fits():
            return None
        results, bases = [], []
        for inputs in microbatches:
            made = [None if t is None else torch.empty(t.shape, dtype=t.dtype) for t in self._outputs]
            addressed = (*inputs, *self._constants, *(t for t in made if t is not None))
            addresses = (address("MAML", "a tensor of a captured program", t) for t in addressed)
            bases.append([0, *addresses])  # 0: the arena
            results.append(made)
        return results if self._native.run(bases, threads, bfloat16) else None


def _layout(t: Tensor) -> tuple:
    return t.shape, t.stride(), t.dtype
