"""The targets for the meta-gradient and the recurrent cells on one kind of machine, and whether they are met."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from typing import Any

from benchmarks.tables import AUTO, best, exact, is_torch, load, measured, sweeps, table

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


def against(workload: str, of: Callable[[str], bool]) -> Value:
    """The time of the fastest peer that satisfies `of`, over that of `metakern auto`."""
    rows = exact(load("maml")[workload], of) if workload in load("maml") else {}
    method, row = best(rows) if rows else ("", {})
    return (row["over_auto"], f"{row['over_auto']:.2f} x ({method})") if "over_auto" in row else None


def is_jax(peer: str) -> bool:
    return peer == "jax"


def mean_against(of: Callable[[str], bool]) -> Value:
    """The geometric mean of `against` over all workloads."""
    found = [value[0] for name in load("maml") if (value := against(name, of))]
    return (mean := statistics.geometric_mean(found), f"{mean:.2f} x") if found else None


def over_its_products(workload: str) -> Value:
    limit = load("maml").get(workload, {}).get("methods", {}).get(AUTO, {}).get("of_limit")
    return (1 / limit, f"{1 / limit:.2f}") if limit else None


def growth(workload: str) -> Value:
    """The peak memory of `metakern recompute` at K = 16, over that at K = 1."""
    method, points = "metakern recompute", sweeps().get((workload, "K"), {})
    peaks = {str(k): row["peak_mib"] for k in points if (row := points[k]["methods"].get(method))}
    peaks = peaks or load("maml").get(workload, {}).get("memory_mib", {}).get(method, {})
    if not peaks.keys() >= {"1", "16"}:
        return None
    return (grown := peaks["16"] / peaks["1"], f"{grown:.2f}")


def worst(value: Callable[[dict[str, Any]], float | None], form: str) -> Value:
    """The largest value over all workloads, and the workload that has it."""
    values = {name: v for name, found in load("maml").items() if (v := value(found)) is not None}
    if not values:
        return None
    name = max(values, key=lambda name: values[name])
    return values[name], f"{form.format(values[name])} at {name}"


def share(good: Callable[[dict[str, Any]], bool]) -> Value:
    """The share of the workloads that satisfy `good`, and the names of those that do not."""
    bad = [name for name, found in measured().items() if not good(found)]
    count = len(load("maml"))
    return 1 - len(bad) / count, f"{count - len(bad)} of {count}" + f"; not {', '.join(bad)}" * bool(bad)


def is_fastest(found: dict[str, Any]) -> bool:
    """Whether no peer is faster than `metakern auto`."""
    _, row = best(exact(found))
    return row.get("over_auto", row["median_ms"] / found["methods"][AUTO]["median_ms"]) >= 1


def is_leanest(found: dict[str, Any]) -> bool:
    """Whether for each peer some exact method of metakern takes neither more time nor more memory."""
    ours = exact(found, lambda peer: peer == "metakern").values()
    return all(
        any(r["median_ms"] <= row["median_ms"] and r["peak_mib"] <= row["peak_mib"] for r in ours)
        for row in exact(found).values()
    )


def memory_over_first_order(found: dict[str, Any]) -> float | None:
    rows = found["methods"]
    if not rows.keys() >= {FIRST, "metakern recompute"}:
        return None
    return rows["metakern recompute"]["peak_mib"] / max(rows[FIRST]["peak_mib"], 1)


def lean_at_length(method: str) -> Value:
    rows = load("maml").get(LONG, {}).get("methods", {})
    if not rows.keys() >= {"plain PyTorch", method}:
        return None
    return (times := rows["plain PyTorch"]["peak_mib"] / rows[method]["peak_mib"], f"{times:.1f} x")


def targets_table() -> str:
    """Return the table of the targets for the meta-gradient."""
    torch, jax, every = is_torch, is_jax, lambda peer: peer != "metakern"
    ours = "the time of ours over the limit"
    grown = "peak memory of recompute, K = 16 over K = 1"
    return judged(
        ("workloads where ours is the fastest exact method", "all", 1, share(is_fastest)),
        ("workloads where, for each peer, a method of ours is as fast and as lean", "all", 1, share(is_leanest)),
        ("geometric mean: the fastest peer over ours", ">=", 1.4, mean_against(every)),
        ("geometric mean: the fastest PyTorch peer over ours", ">=", 2, mean_against(torch)),
        (
            "time of exact second order over our own first order, worst workload",
            "<=",
            3.3,
            worst(lambda found: found["methods"][AUTO].get("over_first_order"), "{:.2f} x"),
        ),
        (
            "peak memory of recompute over our own first order, worst workload",
            "<=",
            1.5,
            worst(memory_over_first_order, "{:.2f} x"),
        ),
        (
            "time of the first call in s, worst workload",
            "<=",
            2,
            worst(lambda found: found["methods"][AUTO]["first_s"], "{:.1f}"),
        ),
        ("MLP: learn2learn over ours", ">=", 14, against("mlp:medium", lambda peer: peer == "learn2learn")),
        ("MLP: torch.func over ours", ">=", 4.5, against("mlp:medium", lambda peer: peer == "torch_func")),
        ("MLP: the fastest JAX form over ours", ">=", 1.3, against("mlp:medium", jax)),
        ("LSTM LM: the fastest PyTorch peer over ours", ">=", 2, against("lstm:medium", torch)),
        ("LSTM LM: the fastest JAX form over ours", ">=", 1.25, against("lstm:medium", jax)),
        (f"LSTM LM: {ours}", "<=", 1.2, over_its_products("lstm:medium")),
        (f"LSTM LM: {grown}", "<=", 1.4, growth("lstm:medium")),
        ("small LSTM LM: the fastest PyTorch peer over ours", ">=", 5, against("lstm:small", torch)),
        ("GPT: the fastest PyTorch peer over ours", ">=", 1.7, against("gpt:medium", torch)),
        ("GPT: the fastest JAX form over ours", ">=", 1.4, against("gpt:medium", jax)),
        (f"GPT: {ours}", "<=", 1.25, over_its_products("gpt:medium")),
        (f"GPT: {grown}", "<=", 1.4, growth("gpt:medium")),
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
