"""The instructions of a lowered program, and a pass over them: tokens that do not count in a loss cost no products.

    z = x Wᵀ        l = cross_entropy(z, target)        g = the cotangent of z        ct_x = g W        ct_W = gᵀ x

Rows of z whose target is ignored are not read, and these rows of g are zero. So the products before and after may leave
these rows out, and the products of their sums may leave these terms out; so may those of second derivatives. Which rows
these are is read from the targets at each run.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

# Kernels of cross-entropy -> the places of logits and their tangents among their tensors. The target is at place 1.
_LOGITS = {
    "cross_entropy_forward": (0,),
    "cross_entropy_jvp": (0, 3),
    "cross_entropy_vjp": (0,),
    "cross_entropy_vjp_jvp": (0, 3),
}
_LINEAR = ("add", "copy", "affine")


@dataclass(frozen=True)
class Instruction:
    """A call of a method of the native executable: `method(*before, places of the tensors, *after)`.

    `name` is that of a kernel or an elementwise instruction, and `writes` are the tensors that it writes to.
    """

    method: str
    tensors: tuple[Tensor | None, ...]
    before: tuple
    after: tuple
    writes: tuple[Tensor, ...]
    name: str = ""


class _Rows(NamedTuple):
    """Which rows of a tensor `[rows, width]` count: those whose target is not `ignored`."""

    target: Tensor
    ignored: int
    width: int

    def like(self, other: _Rows | None) -> bool:
        """Whether both are about the same targets."""
        return other is not None and self._key() == other._key()

    def _key(self) -> tuple:
        return memory_of(self.target), self.target.storage_offset(), self.target.numel(), self.ignored


def memory_of(t: Tensor) -> int:
    """Return what is equal for tensors that share their memory."""
    return t.untyped_storage()._cdata


def is_whole(t: Tensor) -> bool:
    """Whether a tensor is all of its memory, in order."""
    return t.is_contiguous() and t.untyped_storage().nbytes() == t.nbytes


def without_ignored(calls: Sequence[Instruction], fixed: Container[int]) -> list[Instruction]:
    """Return the instructions with marks of rows and terms that products may leave out.

    `fixed`: memory that others than the instructions read or write.
    """
    return _Marking(calls, fixed).marked() if any(call.name in _LOGITS for call in calls) else list(calls)


class _Marking:
    """Finds the products of which rows or terms may be left out."""

    def __init__(self, calls: Sequence[Instruction], fixed: Container[int]) -> None:
        self.calls, self.fixed = calls, fixed
        self.writers: dict[int, list[int]] = defaultdict(list)
        self.readers: dict[int, list[int]] = defaultdict(list)
        for i, call in enumerate(calls):
            for memory in {memory_of(t) for t in call.writes}:
                self.writers[memory].append(i)
            for memory in {memory_of(t) for t in call.tensors if t is not None}:
                self.readers[memory].append(i)
        self.unread: dict[int, _Rows] = {}  # memory -> its only rows that are read
        self.zero: dict[int, _Rows] = {}  # memory whose rows are zero if they do not count, at the present instruction

    def marked(self) -> list[Instruction]:
        # The last ones come first: of what is added up, the same rows are read as of the sum.
        for memory, places in sorted(self.writers.items(), key=lambda item: -item[1][-1]):
            if memory not in self.fixed and (rows := self._rows_read(memory, places)):
                self.unread[memory] = rows
        kept = []
        for i, call in enumerate(self.calls):
            rows, terms, result = None, None, None
            if call.method == "product":
                rows, terms = self._zero_operands(call)
                result = self._zero_result(call, rows)
                rows = rows or self.unread.get(memory_of(call.writes[0]))
                if rows and terms and rows.ignored != terms.ignored:
                    terms = None
                if counting := rows or terms:
                    targets = (found.target if found else None for found in (rows, terms))
                    after = (*call.after[:3], counting.ignored)
                    call = Instruction(call.method, (*call.tensors[:4], *targets), call.before, after, call.writes)
            elif call.name in ("cross_entropy_vjp", "cross_entropy_vjp_jvp"):
                result = self._rows_of(i)
            elif call.name in _LINEAR:
                result = self._zero_sum(call)
            for t in call.writes:
                self.zero.pop(memory_of(t), None)
            if result is not None:
                self.zero[memory_of(call.writes[0])] = result
            kept.append(call)
        return kept

    def _rows_read(self, memory: int, places: list[int]) -> _Rows | None:
        """Return the rows that are read of a memory which these instructions write; None if they may be all."""
        uses = [self._use(i, memory) for i in self.readers[memory] if i not in places]
        rows = uses[0] if uses else None
        if rows is None or not all(rows.like(use) for use in uses) or self._made_at(rows.target) > places[0]:
            return None
        return rows if all(self._makes(self.calls[i], memory, rows) for i in places) else None

    def _use(self, i: int, memory: int) -> _Rows | None:
        """Return which rows of a memory an instruction reads, or None if it may read all."""
        call = self.calls[i]
        at = [place for place, t in enumerate(call.tensors) if t is not None and memory_of(t) == memory]
        if call.name in _LOGITS:
            whole = all(is_whole(call.tensors[place]) for place in at)  # type: ignore[arg-type]
            return self._rows_of(i) if whole and set(at) <= set(_LOGITS[call.name]) else None
        adds = (call.method == "product" and at == [2] and _adds_whole(call)) or _is_sum_of_wholes(call)
        return self.unread.get(memory_of(call.writes[0])) if adds else None

    def _makes(self, call: Instruction, memory: int, rows: _Rows) -> bool:
        """Whether an instruction that writes to a memory is a sum, or a product with one row for each target."""
        if call.method != "product":
            return _is_sum_of_wholes(call)
        T, M, N, _ = call.after[0]
        operands = [memory_of(t) for t in call.tensors[:2] if t is not None]
        return memory not in operands and (rows.target.numel(), rows.width) == (T * M, N)

    def _rows_of(self, i: int) -> _Rows | None:
        """Return which rows count in a kernel of the cross-entropy; None if its target is written later."""
        logits, target = self.calls[i].tensors[:2]
        assert logits is not None
        assert target is not None
        if self._made_at(target) > i or not target.is_contiguous():
            return None
        return _Rows(target, int(self.calls[i].after[1][0]), logits.shape[-1])

    def _made_at(self, target: Tensor) -> int:
        """Return the place of the last instruction that writes to a target, -1 for an input."""
        return max(self.writers[memory_of(target)], default=-1)

    def _zero_operands(self, call: Instruction) -> tuple[_Rows | None, _Rows | None]:
        """Return which rows of a product's a count as others are zero, and which terms of its sums."""
        (T, M, N, K), strides = call.after[:2]
        a, b = (None if t is None or t.storage_offset() else self.zero.get(memory_of(t)) for t in call.tensors[:2])
        rows = terms = None
        if a and _is_matrix(strides[:3], T, M, K) and (a.target.numel(), a.width) == (T * M, K):
            rows = a
        elif a and _is_matrix((strides[0], strides[2], strides[1]), T, K, M):
            terms = a if (a.target.numel(), a.width) == (T * K, M) else None
        if b and not terms and _is_matrix(strides[3:6], T, K, N) and (b.target.numel(), b.width) == (T * K, N):
            terms = b
        return rows, terms

    def _zero_result(self, call: Instruction, rows: _Rows | None) -> _Rows | None:
        """Return which rows of a product's result count as others are zero, given those of its a."""
        add = call.tensors[2]
        if rows is None or not (add is None or (_adds_whole(call) and rows.like(self.zero.get(memory_of(add))))):
            return None
        return rows._replace(width=call.after[0][2])

    def _zero_sum(self, call: Instruction) -> _Rows | None:
        """Return which rows of a sum, a copy or a multiple count as others are zero."""
        found = [self.zero.get(memory_of(t)) for t in call.tensors[1:] if t is not None]
        first = found[0]
        if first is None or not _is_sum_of_wholes(call) or (call.name == "affine" and call.after[2][1]):
            return None
        others_alike = all(other is not None and first.like(other) and first.width == other.width for other in found)
        return first if others_alike else None


def _is_matrix(strides: Sequence[int], T: int, rows: int, columns: int) -> bool:
    """Whether strides over tasks, rows and columns are those of a contiguous tensor `[T, rows, columns]`."""
    return tuple(strides[1:]) == (columns, 1) and (T == 1 or strides[0] == rows * columns)


def _is_sum_of_wholes(call: Instruction) -> bool:
    """Whether an instruction adds, copies or multiplies by a number, and all its tensors are whole."""
    return call.name in _LINEAR and all(t is None or is_whole(t) for t in call.tensors)


def _adds_whole(call: Instruction) -> bool:
    """Whether what a product adds has a row of its own for each row of the result, in the same order."""
    add, (T, M, N, _), strides = call.tensors[2], *call.after[:2]
    return add is not None and is_whole(add) and (strides[7] == N or M == 1) and (T == 1 or strides[6] == M * N)
