"""The targets for the meta-gradient and the recurrent cells on one kind of machine, and whether they are met."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from typing import Any

from benchmarks import peers
from benchmarks.tables import AUTO, best, exact, is_peer, is_torch, load, measured, ours, sweeps, table
from benchmarks.workloads import WorkloadName

FIRST = "metakern, first order"
LONG = "gpt:medium,length=1024,tasks=1"
Value = tuple[float, str] | None  # the measured value and its text in the table; None if it was not measured


def judged(*targets: tuple[str, str, float, Value]) -> str:
    """Return the table of targets (name, sign, bound, value); with sign "all" the value is a share, the bound 1."""
    rows = []
    for what, sign, bound, value in targets:
        met = value and (value[0] <= bound if sign == "<=" else value[0] >= bound)
        told = (value[1], "yes" if met else "no") if value else ("not measured", "")
        rows.append([what, sign if sign == "all" else f"{sign} {bound:g}", *told])
    return table(["", "target", "measured", "met"], rows)


def against(workload: str, of: Callable[[str], bool], ratio: str = "over_auto") -> Value:
    """The time of the fastest peer that satisfies `of`, over that of the method of ours that `ratio` compares with."""
    rows = exact(load("maml")[workload], of) if workload in load("maml") else {}
    method, row = best(rows, ratio) if rows else ("", {})
    return (row[ratio], f"{row[ratio]:.2f} x ({method})") if ratio in row else None


def is_jax(peer: str) -> bool:
    return peer == "jax"


def over_default(of: Callable[[str], bool]) -> dict[str, float]:
    """The times of the fastest peer over those of the default call, by workload."""
    found = {name: against(name, of, "over_default") for name in load("maml")}
    return {name: value[0] for name, value in found.items() if value}


def mean_over_default(of: Callable[[str], bool]) -> Value:
    """The geometric mean of `over_default` over all workloads that have it, and their number if some have not."""
    found, count = over_default(of), len(load("maml"))
    if not found:
        return None
    mean = statistics.geometric_mean(found.values())
    return mean, f"{mean:.2f} x" + f" over {len(found)} of {count} workloads" * (len(found) < count)


def extreme(values: dict[str, float], form: str, pick: Callable) -> Value:
    """The smallest (`pick` is min) or largest of the workloads' values, and the workload that has it."""
    if not values:
        return None
    name = pick(values, key=lambda name: values[name])
    return values[name], f"{form.format(values[name])} at {name}"


def of_peak(size: str) -> Value:
    """The least share of the peak that metakern reaches at a size of the GPT, the LSTM, and the Llama with LoRA."""
    rows = {name: found["methods"][ours(found)[0]] for name, found in load("maml").items()}
    names = (f"{family}:{size}" for family in ("gpt", "lstm", "llama-lora"))
    return extreme({name: rows[name]["of_peak"] for name in names if "of_peak" in rows.get(name, {})}, "{:.0%}", min)


def growth(base: str) -> float | None:
    """The peak memory of `metakern recompute` at K = 16, over that at K = 1."""
    method, points = "metakern recompute", sweeps().get((base, "K"), {})
    peaks = {k: row["peak_mib"] for k in points if (row := points[k]["methods"].get(method))}
    return peaks[16] / peaks[1] if peaks.keys() >= {1, 16} else None


def worst_growth() -> Value:
    """The largest growth over all workloads that were swept over K."""
    found = {base: grown for base, key in sweeps() if key == "K" and (grown := growth(base)) is not None}
    return extreme(found, "{:.2f}", max)


def worst(
    value: Callable[[dict[str, Any]], float | None], form: str, of: Callable[[str], bool] = lambda name: True
) -> Value:
    """The largest value over the workloads whose name satisfies `of`, and the workload that has it."""
    values = {name: value(found) for name, found in load("maml").items() if of(name)}
    return extreme({name: v for name, v in values.items() if v is not None}, form, max)


def is_large(name: str) -> bool:
    """Whether a workload is of the size large, or has sequences of length 1024."""
    spec = WorkloadName.parse(name)
    return spec.size == "large" or spec.sizes.get("length") == 1024


def is_usual(name: str) -> bool:
    """Whether a workload is small or medium, without changes."""
    spec = WorkloadName.parse(name)
    return spec.size in ("small", "medium") and not spec.changes


def share(good: Callable[[dict[str, Any]], bool]) -> Value:
    """The share of the workloads that satisfy `good`, and the names of those that do not."""
    bad = [name for name, found in measured().items() if not good(found)]
    count = len(load("maml"))
    return 1 - len(bad) / count, f"{count - len(bad)} of {count}" + f"; not {', '.join(bad)}" * bool(bad)


def is_fastest(found: dict[str, Any]) -> bool:
    """Whether no peer is faster than metakern."""
    method, ratio = ours(found)
    _, row = best(exact(found), ratio)
    return row.get(ratio, row["median_ms"] / found["methods"][method]["median_ms"]) >= 1


def is_leanest(found: dict[str, Any]) -> bool:
    """Whether for each peer some exact float32 method of metakern takes neither more time nor more memory."""
    rows = exact(found, lambda peer: peer == "metakern")
    own = [row for method, row in rows.items() if peers.precision(method) == "float32"]
    return all(
        any(r["median_ms"] <= row["median_ms"] and r["peak_mib"] <= row["peak_mib"] for r in own)
        for row in exact(found).values()
    )


def memory_over_first_order(found: dict[str, Any]) -> float | None:
    rows = found["methods"]
    if not rows.keys() >= {FIRST, "metakern recompute"}:
        return None
    return rows["metakern recompute"]["peak_mib"] / max(rows[FIRST]["peak_mib"], 1)


def first_call(found: dict[str, Any]) -> float:
    """Seconds of the first call with `capture=True`, which verifies the plan and records the program."""
    return found["methods"][AUTO]["first_s"]


def lean_at_length(method: str) -> Value:
    rows = load("maml").get(LONG, {}).get("methods", {})
    if not rows.keys() >= {"plain PyTorch", method}:
        return None
    return (times := rows["plain PyTorch"]["peak_mib"] / rows[method]["peak_mib"], f"{times:.1f} x")


def targets_table() -> str:
    """Return the table of the targets for the meta-gradient."""
    return judged(
        ("workloads where ours is the fastest exact method", "all", 1, share(is_fastest)),
        ("workloads where, for each peer, a method of ours is as fast and as lean", "all", 1, share(is_leanest)),
        ("geometric mean: the fastest peer over our default", ">=", 2, mean_over_default(is_peer)),
        (
            "the fastest peer over our default, worst workload",
            ">=",
            1.5,
            extreme(over_default(is_peer), "{:.2f} x", min),
        ),
        ("geometric mean: the fastest PyTorch peer over our default", ">=", 4, mean_over_default(is_torch)),
        (
            "time of exact second order over our own first order, worst workload",
            "<=",
            2.8,
            worst(lambda found: found["methods"][AUTO].get("over_first_order"), "{:.2f} x"),
        ),
        (
            "peak memory of recompute over our own first order, worst workload",
            "<=",
            1.5,
            worst(memory_over_first_order, "{:.2f} x"),
        ),
        ("first call (captured) in s, worst small or medium workload", "<=", 2, worst(first_call, "{:.1f}", is_usual)),
        ("first call (captured) in s, worst large or long workload", "<=", 4, worst(first_call, "{:.1f}", is_large)),
        ("GPT, LSTM, Llama with LoRA, large: rate of the products over the peak", ">=", 0.8, of_peak("large")),
        ("GPT, LSTM, Llama with LoRA, medium: rate of the products over the peak", ">=", 0.7, of_peak("medium")),
        ("peak memory of recompute, K = 16 over K = 1, worst workload", "<=", 1.4, worst_growth()),
        ("MLP: learn2learn over ours", ">=", 14, against("mlp:medium", lambda peer: peer == "learn2learn")),
        ("MLP: torch.func over ours", ">=", 4.5, against("mlp:medium", lambda peer: peer == "torch_func")),
        ("MLP: the fastest JAX form over ours", ">=", 1.3, against("mlp:medium", is_jax)),
        ("LSTM LM: the fastest PyTorch peer over ours", ">=", 2, against("lstm:medium", is_torch)),
        ("LSTM LM: the fastest JAX form over ours", ">=", 1.25, against("lstm:medium", is_jax)),
        ("small LSTM LM: the fastest PyTorch peer over ours", ">=", 5, against("lstm:small", is_torch)),
        ("GPT: the fastest PyTorch peer over ours", ">=", 1.7, against("gpt:medium", is_torch)),
        ("GPT: the fastest JAX form over ours", ">=", 1.4, against("gpt:medium", is_jax)),
        (
            "GPT at length 1024, one task: plain PyTorch's peak memory over recompute's",
            ">=",
            5,
            lean_at_length("metakern recompute"),
        ),
        (
            "GPT at length 1024, one task: plain PyTorch's peak memory over store's",
            ">=",
            5,
            lean_at_length("metakern store"),
        ),
    )


def recurrent_targets_table() -> str:
    """Return the table of the targets for the LSTM's rules."""
    rows = load("recurrent")["results"]["lstm"]
    sizes = {size: tuple(map(int, size.split("x"))) for size in rows}
    large = [size for size, (_, B, _, H) in sizes.items() if B >= 8 and H >= 256]
    single = [size for size, (T, B, _, _) in sizes.items() if T == 8 and B == 1]

    def at(key: str, among: Iterable[str], pick: Callable = min) -> Value:
        size = pick(among, key=lambda s: rows[s][key][0])
        middle, low, high = rows[size][key]
        return middle, f"{middle:.2f} [{low:.2f}, {high:.2f}] at {size.replace('x', ' x ')}"

    rate = "rate of the recurrence over the rate of torch.mm, {}, worst size".format
    return judged(
        ("time of vjp_jvp over time of vjp, worst size", "<=", 2.2, at("vjp_jvp_over_vjp", rows, max)),
        ("time of torch.nn.LSTM's forward and backward over ours, worst size", ">=", 1, at("torch_over_ours", rows)),
        (rate("H >= 256 and B >= 8"), ">=", 0.6, at("recurrence_of_rate", large)),
        (rate("T = 8 and B = 1"), ">=", 0.35, at("recurrence_of_rate", single)),
    )
