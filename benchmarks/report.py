"""The README's tables and pictures from the results: `python -m benchmarks.report`.

Each table stands between `<!-- name -->` and `<!-- /name -->`; a test fails where the README and the results disagree.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from pathlib import Path
from typing import Any

from benchmarks.maml import machine as machine_here

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
TITLES = {
    "mlp": "MLP 64-128-128-16, 32 tasks, 10+10 examples, K=5",
    "lstm": "LSTM LM, vocabulary 2000, embedding 128, hidden 256, length 20, 8+8 sequences, 8 tasks, K=3",
    "gpt": "GPT, vocabulary 2000, 128 wide, 4 heads, 2 layers, length 64, 4+4 sequences, 8 tasks, K=3",
}


def load(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def maml_table() -> str:
    """Time, ratio and memory of a meta-gradient, by workload and method."""
    data = load("maml")
    lines = ["| workload | method | time, ms (min-max) | against plain | memory, MiB |", "|---|---|---|---|---|"]
    for workload, rows in data["results"].items():
        for method, row in rows.items():
            spread = f"{row['median_ms']:.0f} ({row['min_ms']:.0f}-{row['max_ms']:.0f})"
            cells = (TITLES[workload], method, spread, f"{row['speedup']:.2f} x", f"{row['peak_mib']:.0f}")
            lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "Peak memory over the number of inner steps, MiB over the idle process:", ""]
    lines += ["| workload | method | K = 1 | 4 | 16 |", "|---|---|---|---|---|"]
    for workload, methods in data["memory_mib"].items():
        for method, peaks in methods.items():
            lines.append(f"| {workload.upper()} | {method} | {' | '.join(f'{peak:.0f}' for peak in peaks.values())} |")
    return "\n".join([*lines, "", described(data)])


def demo_table() -> str:
    """Perplexity after adaptation, and the paired ratio of the baseline to the meta-trained model."""
    data = load("demo")
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
    return "\n".join([*lines, "", described(data)])


def described(data: dict[str, Any]) -> str:
    where = data["machine"]
    return f"{where['cpu']}, {where['cores']} cores, torch {where['torch']}, commit {where['commit']}, {where['date']}."


TABLES = {"maml": maml_table, "demo": demo_table}


def with_tables(text: str) -> str:
    """The README with its tables made anew."""
    for name, table in TABLES.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        text, found = re.subn(pattern, lambda m, t=table: f"{m[1]}{t()}\n{m[2]}", text, flags=re.DOTALL)
        if found != 1:
            raise ValueError(f"README.md: must have one place for the table {name}, got {found}")
    return text


def draw() -> None:
    """Time and memory of the meta-step, as a picture."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    data = load("maml")["results"]
    with rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(9, 3.2), layout="constrained")
        panels = figure.subplots(1, 2)
        for axes, key, label in zip(panels, ("median_ms", "peak_mib"), ("time, ms", "peak memory, MiB"), strict=True):
            for j, method in enumerate(next(iter(data.values()))):
                values = [rows[method][key] for rows in data.values()]
                spots = [i + (j - 1.5) * 0.2 for i in range(len(values))]
                bars = axes.bar(spots, values, 0.18, label=method, color="0.6" if j == 0 else f"C{j - 1}")
                axes.bar_label(bars, fmt="{:.0f}", fontsize=7, padding=1)
            axes.set_xticks(range(len(data)), [name.upper() for name in data])
            axes.set_ylabel(label)
        panels[0].legend(frameon=False, fontsize=8)
        figure.suptitle("one exact second-order meta-gradient (lower is better)", fontsize=11)
        figure.savefig(RESULTS / "maml.png", dpi=160)


def keep_demo(run: Path) -> None:
    """The curve of `make demo`, with the machine it was measured on."""
    report = json.loads((run / "eval.json").read_text())
    (RESULTS / "demo.json").write_text(json.dumps({"machine": machine_here(), **report}, indent=1) + "\n")
    shutil.copyfile(run / "eval.png", RESULTS / "demo.png")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--demo", type=Path, metavar="RUN", help="first keep the curve of this run as the demo's")
    if folder := parser.parse_args().demo:
        keep_demo(folder)
    readme = ROOT / "README.md"
    readme.write_text(with_tables(readme.read_text()))
    draw()
