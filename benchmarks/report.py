"""The README's tables and pictures from the results: `python -m benchmarks.report`.

Each table stands between `<!-- name -->` and `<!-- /name -->`; a test fails where the README and the results disagree.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.results import machine as machine_here

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
MACHINE = "amd-epyc-2c"  # whose CPU the README is about
RECURRENT = "LM, vocabulary 2000, embedding 128, hidden 256, length 20, 8+8 sequences, 8 tasks, K=3"
TITLES = {
    "mlp:medium": "MLP 64-128-128-16, 32 tasks, 10+10 examples, K=5",
    "rnn:medium": f"RNN {RECURRENT}",
    "gru:medium": f"GRU {RECURRENT}",
    "lstm:medium": f"LSTM {RECURRENT}",
    "lstm:small": "small LSTM LM, vocabulary 2000, embedding 64, hidden 64, length 32, 2+2 sequences, 32 tasks, K=5",
    "gpt:medium": "GPT, vocabulary 2000, 128 wide, 4 heads, 2 layers, length 64, 4+4 sequences, 8 tasks, K=3",
    "gpt:medium,length=1024,tasks=1": "the same GPT at length 1024, 4+4 sequences, 1 task, K=3",
}
CELLS = {  # heading of a column: key and form; a ratio is absent where its base was not measured
    "of the limit": ("of_limit", "{:.0%}"),
    "plain / it": ("speedup", "{:.2f} x"),
    "it / metakern auto": ("over_auto", "{:.2f} x"),
    "peak, MiB": ("peak_mib", "{:.0f}"),
    "kept, MiB": ("kept_mib", "{:.0f}"),
    "first call, s": ("first_s", "{:.1f}"),
}


def load(part: str) -> dict[str, Any]:
    return results.load(RESULTS / f"{MACHINE}.json")[part]


def fastest(rows: dict[str, Any]) -> dict[str, Any]:
    """The fastest form of each peer and all of metakern's, by time."""
    ordered = sorted(rows.items(), key=lambda item: item[1]["median_ms"])
    peers = [row["peer"] for _, row in ordered]
    return {
        method: row
        for i, (method, row) in enumerate(ordered)
        if row["peer"] == "metakern" or row["peer"] not in peers[:i]
    }


def ms(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def maml_table() -> str:
    """Each workload's meta-gradient by method, then memory over the inner steps."""
    data = load("maml")
    lines = []
    for workload, found in data.items():
        rows = fastest(found["methods"])
        best = next((method for method, row in rows.items() if row["peer"] != "metakern"), None)
        title = TITLES[workload]
        if "limit_ms" in found:
            title += f"; its products alone: {ms(found['limit_ms'])} ms at {found['gflop_per_s']:.0f} GFLOP/s"
        lines += [f"**{title}**", ""]
        lines += [f"| method | time, ms (min-max) | {' | '.join(CELLS)} |", "|---" * (2 + len(CELLS)) + "|"]
        for method, row in rows.items():
            cells = [
                f"**{method}**" if method == best else method,
                f"{ms(row['median_ms'])} ({ms(row['min_ms'])}-{ms(row['max_ms'])})",
                *(form.format(row[key]) if key in row else "" for key, form in CELLS.values()),
            ]
            lines.append(f"| {' | '.join(cells)} |")
        lines += ["", *(f"Not timed: {method}: {reason}  " for method, reason in found["refused"].items())]
        lines += [described(found), ""]
    lines += ["Peak memory over the number of inner steps, MiB over the idle process:", ""]
    lines += ["| workload | method | K = 1 | 4 | 16 |", "|---|---|---|---|---|"]
    for workload, found in data.items():
        for method, peaks in found["memory_mib"].items():
            lines.append(f"| {workload} | {method} | {' | '.join(f'{peak:.0f}' for peak in peaks.values())} |")
    return "\n".join(lines)


def curve_table(name: str) -> str:
    """Perplexity after adaptation, and the paired ratio of the baseline to the meta-trained model."""
    data = results.load(RESULTS / f"{name}.json")
    own, base = data["curves"]["maml"], data["curves"]["finetune"]
    ratio = data["ratios"]["finetune"]
    lines = [
        f"Perplexity on {len(data['tasks'])} unseen subjects [95% interval over them]; the ratio is paired by subject.",
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


def described(data: dict[str, Any]) -> str:
    where = data["machine"]
    return f"{where['cpu']}, {where['cores']} cores, torch {where['torch']}, commit {where['commit']}, {where['date']}."


def recurrent_table() -> str:
    """The LSTM's rules by size; the other cells are in the file."""
    data = load("recurrent")
    lines = [
        "| T x B x L x H | forward | jvp | vjp | vjp_jvp, ms | vjp_jvp / vjp | torch.nn / ours | cells / ours | rate |",
        "|---" * 9 + "|",
    ]
    for size, row in data["results"]["lstm"].items():
        times = (f"{row['ms'][rule][0]:.2f}" for rule in ("forward", "jvp", "vjp", "vjp_jvp"))
        ratios = (f"{row[key][0]:.2f}" for key in ("vjp_jvp_over_vjp", "torch_over_ours"))
        loop, rate = f"{row['cell_loop_over_ours'][0]:.1f}", f"{row['recurrence_of_rate'][0]:.0%}"
        lines.append(f"| {' | '.join((size.replace('x', ' x '), *times, *ratios, loop, rate))} |")
    return "\n".join([*lines, "", described(data)])


def attention_table() -> str:
    """Attention's rules by size."""
    data = load("attention")
    lines = [
        "| B x H/H_kv x L x D | forward | jvp | vjp | vjp_jvp, ms | rate of vjp_jvp | flash / ours | ordinary / ours |",
        "|---" * 8 + "|",
    ]
    for size, row in data["results"].items():
        times = (f"{row['ms'][rule][0]:.2f}" for rule in ("forward", "jvp", "vjp", "vjp_jvp"))
        ratios = (f"{row[key][0]:.2f}" for key in ("flash_over_ours", "ordinary_over_ours"))
        rate = f"{row['of_rate']['vjp_jvp'][0]:.0%}"
        lines.append(f"| {' | '.join((size, *times, rate, *ratios))} |")
    return "\n".join([*lines, "", described(data)])


def against(workload: str, jax: bool) -> str:
    """The fastest of the peers that are, or are not, JAX, over metakern."""
    peers = {
        method: row
        for method, row in load("maml")[workload]["methods"].items()
        if row["peer"] != "metakern" and (row["peer"] == "jax") == jax
    }
    method = min(peers, key=lambda name: peers[name]["over_auto"])
    return f"{peers[method]['over_auto']:.2f} x ({method})"


def over_its_products(workload: str) -> str:
    return f"{1 / load('maml')[workload]['methods']['metakern auto']['of_limit']:.2f}"


def growth(workload: str) -> str:
    peaks = load("maml")[workload]["memory_mib"]["metakern recompute"]
    return f"{peaks['16'] / peaks['1']:.2f}"


def table(lines: list[tuple[str, str, str]]) -> str:
    return "\n".join(["| | target | measured |", "|---|---|---|", *(f"| {' | '.join(line)} |" for line in lines)])


def transformer_targets_table() -> str:
    """What the GPT was to reach on this kind of machine, beside what was measured; length 1024 where it was."""
    lines = [
        ("GPT's meta-gradient: the fastest PyTorch peer over ours", ">= 1.7", against("gpt:medium", jax=False)),
        ("the fastest JAX form over ours", ">= 1.4", against("gpt:medium", jax=True)),
        ("ours over its products alone, at torch.mm's rate", "<= 1.25", over_its_products("gpt:medium")),
        ("peak memory with recompute, K = 16 over K = 1", "<= 1.4", growth("gpt:medium")),
    ]
    if long := load("maml").get("gpt:medium,length=1024,tasks=1"):
        plain = long["methods"]["plain PyTorch"]["peak_mib"]
        for method in ("metakern recompute", "metakern store"):
            times = plain / long["methods"][method]["peak_mib"]
            what = f"length 1024, one task: peak memory of {method} over plain PyTorch's"
            lines.append((what, "<= 1 / 5", f"1 / {times:.1f}"))
    return table(lines)


def targets_table() -> str:
    """What the LSTM was to reach on this kind of machine, beside what was measured."""
    rows = load("recurrent")["results"]["lstm"]
    sizes = {size: tuple(map(int, size.split("x"))) for size in rows}
    large = [size for size, (_, B, _, H) in sizes.items() if B >= 8 and H >= 256]
    single = [size for size, (T, B, _, _) in sizes.items() if T == 8 and B == 1]

    def worst(key: str, among: list[str], pick: Callable = min, form: str = "{:.2f}") -> str:
        size = pick(among, key=lambda s: rows[s][key][0])
        middle, low, high = (form.format(value) for value in rows[size][key])
        return f"{middle} [{low}, {high}] at {size.replace('x', ' x ')}"

    lines = [
        ("vjp_jvp over vjp, worst size", "<= 2.2", worst("vjp_jvp_over_vjp", list(rows), max)),
        ("torch.nn.LSTM's forward + backward over ours, worst size", ">= 1", worst("torch_over_ours", list(rows))),
        ("recurrence, of the matrix rate, hidden >= 256 and batch >= 8, worst", ">= 60%",
         worst("recurrence_of_rate", large, form="{:.0%}")),
        ("recurrence, of the matrix rate, batch 1 and 8 tasks, worst", ">= 35%",
         worst("recurrence_of_rate", single, form="{:.0%}")),
        ("LSTM LM's meta-gradient: the fastest PyTorch peer over ours", ">= 2", against("lstm:medium", jax=False)),
        ("the fastest JAX form over ours", ">= 1.25", against("lstm:medium", jax=True)),
        ("ours over its products alone, at torch.mm's rate", "<= 1.2", over_its_products("lstm:medium")),
        ("small LSTM LM's: the fastest PyTorch peer over ours", ">= 5", against("lstm:small", jax=False)),
        ("peak memory with recompute, K = 16 over K = 1", "<= 1.4", growth("lstm:medium")),
    ]  # fmt: skip
    return table(lines)


TABLES = {
    "maml": maml_table,
    "demo": partial(curve_table, "demo"),
    "smollm2": partial(curve_table, "smollm2"),
    "recurrent": recurrent_table,
    "targets": targets_table,
    "attention": attention_table,
    "transformer-targets": transformer_targets_table,
}


def with_tables(text: str) -> str:
    """The README with its tables made anew."""
    for name, table in TABLES.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        text, found = re.subn(pattern, lambda m, t=table: f"{m[1]}{t()}\n{m[2]}", text, flags=re.DOTALL)
        if found != 1:
            raise ValueError(f"README.md: must have one place for the table {name}, got {found}")
    return text


def draw() -> None:
    """Time and memory of the meta-gradient, a panel for each workload."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    data = load("maml")
    columns = min(3, len(data))
    height = -(-len(data) // columns)
    with rc_context({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(4 * columns, 2.6 * height), layout="constrained")
        panels = figure.subplots(height, columns, squeeze=False).flat
        for axes, (workload, found) in zip(panels, data.items(), strict=False):
            rows = fastest(found["methods"])
            colors = ["C0" if row["peer"] == "metakern" else "0.65" for row in rows.values()]
            names = [method.partition(",")[0] for method in rows]
            bars = axes.barh(names, [row["median_ms"] for row in rows.values()], color=colors)
            labels = [f"{ms(row['median_ms'])} ms, {row['peak_mib']:.0f} MiB" for row in rows.values()]
            axes.bar_label(bars, labels, padding=3)
            if "limit_ms" in found:
                axes.axvline(found["limit_ms"], color="C3", linewidth=1)
            axes.invert_yaxis()
            axes.margins(x=0.45)
            axes.set_xticks([])
            axes.set_title(workload.upper(), loc="left")
        for axes in panels:
            axes.set_axis_off()
        figure.suptitle("one exact second-order meta-gradient: time and peak memory; red: its products alone")
        figure.savefig(RESULTS / "maml.png", dpi=160)


def keep_curve(name: str, run: Path) -> None:
    """The curve of `make name`, with the machine it was measured on, and the losses on validation tasks on the way."""
    report = json.loads((run / "eval.json").read_text())
    log = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    validation = [
        {"step": row["step"], "before": row["validation_before"], "after": row["validation_after"]}
        for row in log
        if "validation_before" in row
    ]
    kept = {"machine": machine_here(), **report, "run": f"runs/{name}", "validation": validation}
    (RESULTS / f"{name}.json").write_text(json.dumps(kept, indent=1) + "\n")
    shutil.copyfile(run / "eval.png", RESULTS / f"{name}.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("demo", "smollm2"):
        parser.add_argument(f"--{name}", type=Path, metavar="RUN", help=f"first keep this run's curve as {name}'s")
    for name, folder in vars(parser.parse_args()).items():
        if folder:
            keep_curve(name, folder)
    readme = ROOT / "README.md"
    readme.write_text(with_tables(readme.read_text()))
    draw()
