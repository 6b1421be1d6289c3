"""Markdown tables of the results of one kind of machine."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from benchmarks import peers, results
from benchmarks.results import FOLDER
from benchmarks.workloads import SIZES, WorkloadName, families, family

MACHINE = "amd-epyc-2c"  # the machine whose results README.md and RESULTS.md show
ONE_CORE = "amd-epyc-1c"  # the same machine with `--cores 1`
DEFAULT, AUTO = "metakern default", "metakern auto"
Rows = dict[str, dict[str, Any]]
CELLS = {  # heading of a column -> key of a row and format
    "GFLOP/s": ("gflop_per_s", "{:.0f}"),
    "of peak": ("of_peak", "{:.0%}"),
    "time / metakern default": ("over_default", "{:.2f} x"),
    "time / metakern auto": ("over_auto", "{:.2f} x"),
    "peak, MiB": ("peak_mib", "{:.0f}"),
    "kept, MiB": ("kept_mib", "{:.0f}"),
    "first call, s": ("first_s", "{:.1f}"),
}


def load(part: str, machine: str = MACHINE) -> dict[str, Any]:
    return results.load(FOLDER / f"{machine}.json").get(part, {})


def measured(machine: str = MACHINE) -> dict[str, Any]:
    """The results of the meta-gradient by workload, in the order of families and sizes."""
    data = load("maml", machine)
    return {name: data[name] for name in sorted(data, key=_place)}


def _place(name: str) -> tuple[int, int, str]:
    spec = WorkloadName.parse(name)
    return families().index(spec.family), SIZES.index(spec.size), name


def is_peer(peer: str) -> bool:
    return peer != "metakern"


def exact(found: dict[str, Any], of: Callable[[str], bool] = is_peer) -> Rows:
    """The exact second-order methods whose peer satisfies `of`, fastest first."""
    rows = {method: row for method, row in found["methods"].items() if of(row["peer"]) and is_exact(method)}
    return dict(sorted(rows.items(), key=lambda item: item[1]["median_ms"]))


def is_exact(method: str) -> bool:
    return peers.order(method) == 2 and peers.precision(method) == "float32"


def is_torch(peer: str) -> bool:
    return peer not in ("metakern", "jax")


def best(rows: Rows, ratio: str = "over_auto") -> tuple[str, dict[str, Any]]:
    """The fastest method and its row: by its ratio to metakern within a round if there is one, else by its median."""
    return min(rows.items(), key=lambda item: item[1].get(ratio, item[1]["median_ms"]))


def ours(found: dict[str, Any]) -> tuple[str, str]:
    """The method of metakern that stands for it, and the key of the ratios to it.

    It is the call without options, or `metakern auto` in results that lack that call.
    """
    return (DEFAULT, "over_default") if DEFAULT in found["methods"] else (AUTO, "over_auto")


def cell(row: dict[str, Any] | None, key: str, form: str = "{:.2f} x") -> str:
    """The value of a row as a text, or - if there is none."""
    return form.format(row[key]) if row and key in row else "-"


def ms(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def described(data: dict[str, Any]) -> str:
    where = data["machine"]
    cores = f"{where['cores']} core{'s' * (where['cores'] != 1)}"
    return f"{where['cpu']}, {cores}, torch {where['torch']}, commit {where['commit']}, {where['date']}."


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    cells = [list(head), *map(list, rows)]
    lines = [f"| {' | '.join(row)} |" for row in cells]
    return "\n".join([lines[0], "|---" * len(cells[0]) + "|", *lines[1:]])


def summary_table(sizes: Sequence[str] = SIZES, machine: str = MACHINE) -> str:
    """A row for each workload: metakern beside the fastest peer and the fastest PyTorch peer.

    Of metakern a cell has two numbers: of the call without options, and of `metakern auto`, which is captured.
    """
    rows, where = [], {}
    for name, found in measured(machine).items():
        spec = WorkloadName.parse(name)
        if spec.size not in sizes or (spec.changes and sizes is not SIZES):
            continue
        auto, default = found["methods"][AUTO], found["methods"].get(DEFAULT)
        (method, peer), (_, torch) = (best(exact(found, of), ours(found)[1]) for of in (is_peer, is_torch))

        def pair(key: str, form: str, auto: dict[str, Any] = auto, default: dict[str, Any] | None = default) -> str:
            return f"{cell(default, key, form)} / {cell(auto, key, form)}"

        rows.append(
            [
                name,
                f"{ms(default['median_ms']) if default else '-'} / {ms(auto['median_ms'])}",
                f"{ms(peer['median_ms'])} ({method})",
                *(f"{cell(row, 'over_default')} / {cell(row, 'over_auto')}" for row in (peer, torch)),
                f"{pair('peak_mib', '{:.0f}')}; {peer['peak_mib']:.0f}",
                pair("of_peak", "{:.0%}"),
                f"{pair('first_s', '{:.1f}')}; {peer['first_s']:.1f}",
            ]
        )
        where.setdefault(described(found), []).append(name)
    head = ["workload", "ours, ms: default / captured", "fastest peer, ms", "peer / ours", "PyTorch peer / ours"]
    head += ["MiB: ours; peer", "of peak", "first call, s: ours; peer"]
    notes = (f"{', '.join(names)}: {text}  " for text, names in where.items())
    return "\n".join([table(head, rows), "", *notes])


def methods_table(found: dict[str, Any]) -> str:
    """All methods of a workload, fastest first; those that are not exact stand at the end."""

    def cells(method: str, row: dict[str, Any]) -> list[str]:
        spread = f"{ms(row['median_ms'])} ({ms(row['min_ms'])}-{ms(row['max_ms'])})"
        return [method, spread, *(cell(row, key, form) for key, form in CELLS.values())]

    others = {method: row for method, row in found["methods"].items() if not is_exact(method)}
    rows = exact(found, lambda peer: True) | others
    lines = [table(["method", "time, ms (min-max)", *CELLS], (cells(*item) for item in rows.items())), ""]
    for method, row in others.items():
        if peers.precision(method) == "bfloat16":
            lines.append(f"Error of {method} against float64: {row['error']:.1e}, cosine {row['cosine']:.6f}  ")
    lines += [f"Not timed: {method}: {reason}  " for method, reason in found["refused"].items()]
    return "\n".join([*lines, described(found)])


def sweeps() -> dict[tuple[str, str], dict[Any, dict[str, Any]]]:
    """The results of sweeps: {(workload, key that is varied): {value of the key: results}}."""
    found: dict[tuple[str, str], dict[Any, dict[str, Any]]] = {}
    for name, entry in load("sweep").items():
        spec = WorkloadName.parse(name)
        *others, key = spec.changes
        base = WorkloadName(spec.family, spec.size, {other: spec.changes[other] for other in others})
        found.setdefault((base.name, key), {})[spec.changes[key]] = entry

    def place(where: tuple[str, str]) -> tuple[tuple[int, int, str], int]:
        base, key = where
        return _place(base), list(family(WorkloadName.parse(base).family)["sweep"]).index(key)

    return {where: dict(sorted(found[where].items())) for where in sorted(found, key=place)}


def sweep_table(key: str, points: dict[Any, dict[str, Any]]) -> str:
    """Time and peak memory of each method for each value of `key`, then the machines and commits of the points."""

    def at(point: dict[str, Any], method: str) -> str:
        row = point["methods"].get(method)
        return f"{ms(row['median_ms'])}, {row['peak_mib']:.0f}" if row else point["refused"].get(method, "")

    methods = dict.fromkeys(m for point in points.values() for m in (*point["methods"], *point["refused"]))
    rows = ([method, *(at(point, method) for point in points.values())] for method in methods)
    lines = [table([f"ms, MiB at {key} =", *map(str, points)], rows), ""]
    return "\n".join([*lines, *(f"{line}  " for line in dict.fromkeys(map(described, points.values())))])


def curve_table(name: str) -> str:
    """Perplexity after adaptation, and the paired ratio of the baseline to the meta-trained model."""
    data = results.load(FOLDER / f"{name}.json")
    own, base = data["curves"]["maml"], data["curves"]["finetune"]
    ratio = data["ratios"]["finetune"]
    lines = [
        f"Perplexity on {len(data['tasks'])} unseen subjects [95% interval over the subjects]. "
        "The ratio compares both models within each subject.",
        "",
        "| inner steps | meta-trained | fine-tuned baseline | baseline / meta-trained |",
        "|---|---|---|---|",
    ]
    for i, k in enumerate(data["steps"]):
        cells = [
            f"{curve[key][i]:.{digits}f} [{curve['low'][i]:.{digits}f}, {curve['high'][i]:.{digits}f}]"
            for curve, key, digits in ((own, "perplexity", 1), (base, "perplexity", 1), (ratio, "ratio", 3))
        ]
        lines.append(f"| {k} | {' | '.join(cells)} |")
    if found := data.get("validation"):
        told = (f"{row['before']:.2f} -> {row['after']:.2f} at step {row['step']}" for row in (found[0], found[-1]))
        lines += ["", f"Loss on validation subjects before -> after adaptation: {', '.join(told)}."]
    return "\n".join([*lines, "", described(data)])


def algorithms_tables() -> list[str]:
    """Query losses after inner steps, time and memory of every algorithm: a table for each workload with results."""
    found = []
    for rows in results.load(FOLDER / "algorithms.json").values():
        one, lines = next(iter(rows.values())), []
        for name, row in rows.items():
            columns = list(zip(*row["losses"], strict=True))
            losses = [f"{_short(statistics.median(c))} [{_short(min(c))}, {_short(max(c))}]" for c in columns]
            middle, low, high = row["over_maml"]
            rates = ("" if row[key] is None else f"{row[key]:.2g}" for key in ("lr", "outer_lr"))
            lines.append([name, *losses, *rates, f"{middle:.2f} [{low:.2f}, {high:.2f}]", f"{row['peak_mib']:.0f}"])
        head = ["", *(f"after {k}" for k in one["looks"]), "inner rate", "outer rate", "step / MAML's", "MiB"]
        title = f"{one['about']} {one['steps']} outer steps, {one['seeds']} seeds."
        found.append(f"{title}\n\n{table(head, lines)}\n\n{described(one)}")
    return found


def _short(loss: float) -> str:
    return f"{loss:.3f}" if loss < 100 else "> 100"


def serving_table(name: str) -> str:
    """Tokens and requests a second of `metakern serve` by the number of users, beside one user after the other."""
    found = results.load(FOLDER / "serving.json")[name]
    rows = []
    for users, row in found["users"].items():
        ratios = (f"{mid:.1f} [{low:.1f}, {high:.1f}]" for mid, low, high in row["ratios"].values())
        batch, one = (found["http"][way][users] for way in ("batch", "one row"))
        rates = f"{batch['requests_per_second']:.1f} / {one['requests_per_second']:.1f}"
        times = (
            " / ".join(f"{batch[key][q]:.0f}" for q in ("p50", "p99")) for key in ("first_token_ms", "whole_reply_ms")
        )
        rows.append([users, *ratios, rates, *times])
    head = ["users", "batch / one row", "batch / chat", "requests/s, batch / one row"]
    head += ["first token, ms, p50 / p99", "reply, ms, p50 / p99"]
    memory = found["http"]["memory_mib"]["process, a user"]
    threads = f"{found['threads']} thread{'s' * (found['threads'] != 1)}"
    return f"{table(head, rows)}\n\nA user in memory takes {memory:.1f} MiB. With {threads}; {described(found)}"


def recurrent_table() -> str:
    """The times and ratios of the LSTM's rules, a row for each size."""
    data = load("recurrent")
    rules = ("forward", "jvp", "vjp", "vjp_jvp")
    head = ["T x B x L x H", *(f"{rule}, ms" for rule in rules), "vjp_jvp / vjp", "torch.nn / ours", "cells / ours"]
    rows = []
    for size, row in data["results"]["lstm"].items():
        times = (f"{row['ms'][rule][0]:.2f}" for rule in rules)
        ratios = (f"{row[key][0]:.2f}" for key in ("vjp_jvp_over_vjp", "torch_over_ours"))
        loop, rate = f"{row['cell_loop_over_ours'][0]:.1f}", f"{row['recurrence_of_rate'][0]:.0%}"
        rows.append([size.replace("x", " x "), *times, *ratios, loop, rate])
    return "\n".join([table([*head, "rate"], rows), "", described(data)])


def attention_table() -> str:
    """The times and ratios of attention's rules, a row for each size."""
    data = load("attention")
    rules = ("forward", "jvp", "vjp", "vjp_jvp")
    head = ["B x H/H_kv x L x D", *(f"{rule}, ms" for rule in rules), "rate of vjp_jvp", "flash / ours"]
    rows = []
    for size, row in data["results"].items():
        times = (f"{row['ms'][rule][0]:.2f}" for rule in rules)
        ratios = (f"{row[key][0]:.2f}" for key in ("flash_over_ours", "ordinary_over_ours"))
        rows.append([size, *times, f"{row['of_rate']['vjp_jvp'][0]:.0%}", *ratios])
    return "\n".join([table([*head, "ordinary / ours"], rows), "", described(data)])


def ops_table() -> str:
    """The times of each op's rules by its C++ kernels, or by the reference if it has none."""
    data = {name.split()[-1]: entry for name, entry in load("ops").items() if name.startswith("cpu float32 ")}
    rules, ratios = ("forward", "jvp", "vjp", "vjp_jvp"), ("forward", "vjp", "vjp_jvp")
    rows = []
    for op, entry in data.items():
        for i, (sample, found) in enumerate(entry["samples"].items()):
            backend = "cpu" if "cpu" in found["backends"] else "reference"
            of = found["backends"][backend]
            times = (f"{of[rule]['ms'][0]:.2f}" for rule in rules)
            limits = "".join(f"{of[rule]['of_limit'][0]:.0%} " for rule in rules)
            plain = (f"{of[rule]['plain_over_ours'][0]:.2f}" for rule in ratios)
            rows.append([f"`{op}`" if i == 0 else "", sample, backend, *times, limits.strip(), *plain])
    head = ["op", "sample", "backend", *(f"{rule}, ms" for rule in rules), "of the limit"]
    lines = [table([*head, "plain / ours: forward", "forward + backward", "HVP"], rows), ""]
    return "\n".join([*lines, *(f"{line}  " for line in dict.fromkeys(map(described, data.values())))])
