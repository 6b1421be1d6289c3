"""The targets for a GPU, and whether the measurements meet them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from benchmarks.calls import RULES
from benchmarks.gpu.pool import MEMORY, Row

STREAMED = ("layer_norm", "rms_norm", "gelu", "silu", "swiglu", "cross_entropy", "sgd_update", "adam_update")
Found = dict[str, Any]


def targets(found: Found) -> list[Row]:
    """Return a row for each target: its bound, the worst measured value, where it was measured, and whether it is met.

    A target that was not measured, or of which a row failed, has the value None and is not met.
    """
    return [*_attention(found), *_memory(found), *_meta(found), *_streamed(found)]


def failures(found: Found) -> list[Row]:
    """Return the rows that failed and the checks that are not good; plain PyTorch may run out of memory."""
    rows = [row for part, rows in found.items() if part not in ("machine", "runs", "targets") for row in rows]
    expected = {"peer": "plain", "error": MEMORY}.items()
    return [
        row
        for row in rows
        if (isinstance(row.get("error"), str) or not row.get("good", True)) and not expected <= row.items()
    ]


def _row(target: str, bound: float, value: float | None, where: str = "", most: bool = False) -> Row:
    met = value is not None and (value <= bound if most else value >= bound)
    return {"target": target, "bound": f"{'<=' if most else '>='} {bound}", "value": value, "where": where, "met": met}


def _rows(found: Found, part: str) -> list[Row]:
    return found.get(part, [])


def _worst(cases: Iterable[tuple[float | None, str]]) -> tuple[float | None, str]:
    """Return the smallest value and its place; None if a value is missing or there is none."""
    cases = list(cases)
    missing = [where for value, where in cases if value is None]
    return (None, ", ".join(missing)) if missing or not cases else min(cases)  # type: ignore[type-var]


def _attention(found: Found) -> Iterator[Row]:
    for key, bound in (("vjp_jvp_of_flash_backward", 0.45), ("jvp_of_flash_forward", 0.6)):
        cases = ((row.get(key), f"length {row['length']}, head {row['head']}") for row in _rows(found, "attention"))
        yield _row(f"attention: {key.replace('_of_', ' over ')}, of its rate, bfloat16, causal", bound, *_worst(cases))


def _memory(found: Found) -> Iterator[Row]:
    """The target for memory: KiB for each token at the greatest length, over those at the smallest."""
    rows = {row["length"]: row.get("kib_per_token") for row in _rows(found, "memory")}
    value = None
    if len(rows) > 1 and all(rows.values()):
        value = rows[max(rows)] / rows[min(rows)]
    where = f"{min(rows)} to {max(rows)}" if rows else ""
    yield _row("attention: memory a token, longest over shortest", 1.1, value, where, most=True)


def _meta(found: Found) -> Iterator[Row]:
    rows = {}
    for row in _rows(found, "meta"):
        rows.setdefault((row["tasks"], row["sequences"], row["length"]), {})[row["peer"]] = row
    ratios, beyond = [], []
    for (T, B, L), peers in rows.items():
        ours, plain = (peers.get(peer, {}) for peer in ("metakern", "plain"))
        where = f"{T} tasks of {B} sequences of {L}"
        if plain.get("error") == MEMORY:
            beyond.append((float("ms" in ours) if ours else None, where))
        else:
            ratios.append((plain["ms"] / ours["ms"] if "ms" in plain and "ms" in ours else None, where))
    yield _row("Llama's meta-step: eager attention's time over ours", 3, *_worst(ratios))
    yield _row("Llama's meta-step where eager attention runs out of memory: possible", 1, *_worst(beyond))


def _streamed(found: Found) -> Iterator[Row]:
    rows = _rows(found, "ops")
    for op in STREAMED:
        mine = [row for row in rows if row["op"] == op]
        if mine:
            cases = (
                (row[rule]["of_copy"] if rule in row else None, f"{rule}, {row['sample']}, {row['dtype']}")
                for row in mine
                for rule in RULES
            )
            yield _row(f"{op}: of the copy bandwidth", 0.85, *_worst(cases))
