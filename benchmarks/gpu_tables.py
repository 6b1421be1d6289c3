"""Markdown tables of the results of a GPU."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.calls import RULES
from benchmarks.results import FOLDER

Row = dict[str, Any]
Found = dict[str, Any]
WORKLOADS = {  # heading of a column -> key of a row
    "captured": "metakern",
    "not captured": "metakern_not_captured",
    "torch.func": "torch_func",
    "torch.func, as a CUDA graph": "torch_func_graph",
    "plain PyTorch": "plain",
}


def gpus() -> list[Found]:
    """The results of each GPU that was measured."""
    found = [json.loads(Path(path).read_text()) for path in sorted(FOLDER.glob("*.json"))]
    return [data for data in found if isinstance(data, dict) and data.get("machine", {}).get("gpu")]


def title(found: Found) -> str:
    return found["machine"]["gpu"]


def about(found: Found) -> str:
    machine, limits = found["machine"], found["limits"][0]
    runs = (f"{part} {run['commit']}" for part, run in found["runs"].items() if part in found)
    return (
        f"torch {machine['torch']}, CUDA {machine['cuda']}, {machine['date']}. Commits: {', '.join(runs)}. A copy moves"
        f" {limits['copy_gb_per_s']:.0f} GB/s, and a large product in bfloat16 runs at"
        f" {limits['bf16_tflop_per_s']:.0f} TFLOP/s."
    )


def checks(found: Found) -> str:
    """How many checks are good, and which are not."""
    lines = []
    for part in ("checks", "engine", "training"):
        rows = found.get(part, [])
        bad = [row for row in rows if not row.get("good")]
        names = (f"{row['op']} {row['sample']} {row.get('method') or row.get('dtype', '')}: {_why(row)}" for row in bad)
        lines += [f"- {part}: {len(rows) - len(bad)} of {len(rows)} are good.", *(f"  - {name}" for name in names)]
    for row in found.get("sanitizer", []):
        lines.append(f"- compute-sanitizer, {row['tool']}, {row['part']}: {row.get('error', 'nothing found')}")
    return "\n".join(lines)


def _why(row: Row) -> str:
    if isinstance(row.get("error"), str):
        return row["error"]
    plain = f", plain PyTorch's {row['plain']:.1e}" if "plain" in row else ""
    return f"an error of {row['error']:.1e}{plain}" if "error" in row else "other bits than the last task alone"


def workloads(found: Found) -> str:
    """The milliseconds of a meta-gradient."""
    lines = [f"| workload | {' | '.join(WORKLOADS)} |", "|---" * (len(WORKLOADS) + 1) + "|"]
    for row in found.get("workloads", []):
        cells = (f"{row[key]:.1f}" if (key := f"{name}_ms") in row else "-" for name in WORKLOADS.values())
        lines.append(f"| {row['workload']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def meta(found: Found) -> str:
    """The milliseconds and the peak memory of a meta-gradient of a Llama."""
    names = {"metakern": "captured", "not captured": "not captured", "plain": "plain PyTorch, eager attention"}
    lines = [f"| tasks, sequences of each | {' | '.join(names.values())} |", "|---" * (len(names) + 1) + "|"]
    rows = {(row["tasks"], row["sequences"], row["peer"]): row for row in found.get("meta", [])}
    for size in dict.fromkeys(key[:2] for key in rows):
        cells = (_time_and_memory(rows.get((*size, name), {})) for name in names)
        lines.append(f"| {size[0]}, {size[1]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _time_and_memory(row: Row) -> str:
    if "ms" in row:
        return f"{row['ms']:.0f} ms, {row['peak_mib'] / 1024:.1f} GiB"
    return str(row.get("error", "-"))


def ops(found: Found) -> str:
    """How much of the bandwidth of a copy, or of the rate of a product, the rules of an op reach; the larger one."""
    lines = [f"| op, sample, dtype | {' | '.join(RULES)} |", "|---" * (len(RULES) + 1) + "|"]
    for row in found.get("ops", []):
        if RULES[0] in row:
            cells = (_share(row[rule]) for rule in RULES)
            lines.append(f"| {row['op']} {row['sample']} {row['dtype']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _share(rule: Row) -> str:
    of_copy, of_product = round(100 * rule["of_copy"]), round(100 * rule["of_product"])
    return f"{of_copy}%" if of_copy >= of_product else f"{of_product}% of a product"


def products(found: Found) -> str:
    """The microseconds of products of float32."""
    lines = ["| T, N, K, M | transposed | beside the product | metakern | PyTorch |", "|---|---|---|---|---|"]
    names = {"nt": "right", "tn": "left", "nn": "-"}
    for row in found.get("products", []):
        if "metakern_us" in row:
            cells = (", ".join(map(str, row["sizes"])), names[row["form"]], row["beside"] or "-")
            lines.append(f"| {' | '.join(cells)} | {row['metakern_us']:.0f} | {row['pytorch_us']:.0f} |")
    return "\n".join(lines)


def attention(found: Found) -> str:
    """The TFLOP/s of attention's rules."""
    names = {"forward": "forward", "jvp": "jvp", "vjp": "vjp", "vjp_jvp": "vjp_jvp"}
    names |= {"flash_forward": "flash, forward", "flash_backward": "flash, backward"}
    lines = [f"| length, head | {' | '.join(names.values())} |", "|---" * (len(names) + 1) + "|"]
    for row in found.get("attention", []):
        cells = (f"{row[name]['tflop_per_s']:.0f}" for name in names)
        lines.append(f"| {row['length']}, {row['head']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def recurrent(found: Found) -> str:
    """The milliseconds of an LSTM layer, beside cuDNN's."""
    lines = ["| B, L, H | dtype | forward: ours, cuDNN | forward and vjp: ours, cuDNN |", "|---|---|---|---|"]
    for row in found.get("recurrent", []):
        if row.get("beside") == "cudnn":
            pairs = (
                ", ".join(f"{row[f'{who}_{rule}_ms']:.2f}" for who in ("metakern", "cudnn"))
                for rule in ("forward", "forward_vjp")
            )
            lines.append(f"| {', '.join(map(str, row['sizes']))} | {row['dtype']} | {' | '.join(pairs)} |")
    return "\n".join(lines)
