"""What each process runs: python -m benchmarks.scaling.shared PART OUT STEPS. Without a launcher it runs alone."""

from __future__ import annotations

import contextlib
import io
import json
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import metakern as mk
from metakern.dialogue import checkpoint, processes
from metakern.dialogue.config import Config
from metakern.dialogue.models import build_model
from metakern.dialogue.registry import ALGORITHMS
from metakern.dialogue.trainer import train

TASKS = 7  # two processes get 3 and 4 of them
OPTIONS = {
    "hypernetwork": ("width=8", "rank=2"),
    "imaml": ("tolerance=1e9",),
    "mamlplusplus": ("anneal=20", "first_order_calls=5"),
}
ROUNDS, WARM = 15, 4  # the first calls plan and record


def config_of(algorithm: str, steps: int, shard: bool = False) -> Config:
    """Return the config of a small training, with learned rates, two numbers of inner steps and the plain loss."""
    return Config(
        data="chatterbot:english",
        vocab_size=300,
        max_length=24,
        support_size=3,
        query_size=2,
        model="gru",
        width=8,
        hidden=8,
        layers=1,
        algorithm=algorithm,
        algorithm_options=OPTIONS.get(algorithm, ()),
        inner_lr=0.03 if algorithm == "metasgd" else 0.1,
        inner_steps=(1, 2),
        lm_weight=0.3,
        tasks=TASKS,
        steps=steps,
        pretrain_steps=10,
        eval_every=steps,
        threads=1,
        shard=shard,
    )


def equal(out: Path, steps: int, shard: bool = False) -> None:
    """Train with every algorithm into `out/<algorithm>`."""
    for name in ALGORITHMS:
        if not (out / name / "done").exists():
            with contextlib.redirect_stdout(io.StringIO()):
                train(config_of(name, steps, shard), out / name)
            processes.first((out / name / "done").touch)


def sharded(out: Path, steps: int) -> None:
    """Train as `equal` does, with parameters that are divided between the processes."""
    equal(out, steps, shard=True)


def compared(two: Path, one: Path) -> dict[str, float]:
    """Return the relative differences of the weights, the moments and the logged numbers of two runs."""
    (tensors, _), (others, _) = (checkpoint.load(folder / "checkpoints", "last") for folder in (two, one))
    if tensors.keys() != others.keys():
        raise RuntimeError(f"{two} and {one} hold other tensors")
    found = {"weights": 0.0, "moments": 0.0}
    for name, x in tensors.items():
        if name != "random" and x.is_floating_point():
            apart = ((x - others[name]).norm() / others[name].norm().clamp(min=1e-12)).item()
            kind = "weights" if name.startswith("weights.") else "moments"
            found[kind] = max(found[kind], apart)
    logs = [[json.loads(line) for line in (f / "log.jsonl").read_text().splitlines()] for f in (two, one)]
    pairs = [(a[key], b[key]) for a, b in zip(*logs, strict=True) for key in b if isinstance(b[key], float)]
    return {**found, "log": max(abs(a - b) / max(abs(b), 1e-6) for a, b in pairs)}


def learner(lora: bool) -> mk.MAML:
    """Return MAML over a patched Llama of 4 layers in float64, whole or with LoRA, with a learned rate per element."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=64, num_hidden_layers=4, max_position_embeddings=32, **sizes)
    model = LlamaForCausalLM(config).double().eval()
    mk.patch(model)
    if lora:
        mk.lora(model, 4, seed=0)
    return mk.MAML(model, mk.losses.causal_lm, mk.optim.SGD(0.1, learn_lr=True, per="element"), steps=2)


def trained(maml: nn.Module, steps: int, tasks: int = 4, alone: bool = False) -> torch.optim.Optimizer:
    """Take outer steps on random tokens; `alone`: with all tasks of a step."""
    optimizer = torch.optim.AdamW([p for p in maml.parameters() if p.requires_grad], lr=1e-3)
    draw = torch.Generator().manual_seed(1)
    for _ in range(steps):
        ids = torch.randint(64, (tasks, 3, 16), generator=draw)[slice(None) if alone else processes.share(tasks)]
        batch = {"input_ids": ids, "labels": ids}
        optimizer.zero_grad()
        maml(batch, batch).backward()
        nn.utils.clip_grad_norm_(maml.parameters(), 1.0)
        optimizer.step()
    return optimizer


def fsdp(out: Path, steps: int) -> None:
    """Train a Llama that FSDP2 shards, and compare it with one process; save it by torch.distributed.checkpoint."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    found: dict[str, Any] = {}
    for kind in ("whole", "lora"):
        maml: Any = learner(kind == "lora")
        fully_shard(maml, mesh=init_device_mesh("cpu", (processes.size(),)))
        optimizer = trained(maml, steps)
        dcp.save({"maml": maml.state_dict()}, checkpoint_id=out / kind)
        values = {name: p.full_tensor() for name, p in maml.state_dict().items()}
        moments = [x for state in optimizer.state.values() for x in state.values() if x.dim()]
        held = sum(x.to_local().numel() for x in (*maml.parameters(), *moments))
        if processes.is_first():
            other = learner(kind == "lora")
            trained(other, steps, alone=True)
            apart = [
                ((values[name] - p).norm() / p.norm().clamp(min=1e-12)).item() for name, p in other.state_dict().items()
            ]
            copy = learner(kind == "lora")
            state = {"maml": copy.state_dict()}
            dcp.load(state, checkpoint_id=out / kind, no_dist=True)
            copy.load_state_dict(state["maml"])
            same = all(torch.equal(p, values[name]) for name, p in copy.state_dict().items())
            numbers = sum(x.numel() for x in (*maml.parameters(), *moments))
            found[kind] = {"error": max(apart), "held": held / numbers, "loaded_in_one_process": same}
    processes.first(lambda: (out / "fsdp.json").write_text(json.dumps(found)))


def ratio(out: Path, steps: int) -> None:
    """Time steps of a small and a larger model."""
    found = {str(width): timed(width) for width in (64, 256)}
    processes.first(lambda: (out / "ratio.json").write_text(json.dumps(found)))


def timed(width: int) -> dict[str, Any]:
    """Return the time of a step of two processes over that of one with all tasks, and what the cost model predicts."""
    torch.manual_seed(0)
    model = build_model("gpt", 512, width=width, layers=2, heads=4, max_length=64, dropout=0.0)
    maml = mk.MAML(model, mk.losses.causal_lm, mk.optim.SGD(0.1), steps=3, capture=True)
    parameters = list(maml.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-3)
    ids = torch.randint(512, (8, 4, 48))
    half = ids[processes.share(8)]
    flat = torch.zeros(sum(p.numel() for p in parameters))

    def step(batch: Tensor, together: bool) -> None:
        data = {"input_ids": batch, "labels": batch}
        optimizer.zero_grad()
        loss = maml(data, data) * (processes.weight(len(batch)) if together else 1.0)
        loss.backward()
        if together:
            processes.sum_gradients(parameters, loss)
        optimizer.step()

    calls: dict[str, Callable[[], object]] = {
        "one": lambda: step(ids, False) if processes.is_first() else None,
        "half": lambda: step(half, False),
        "two": lambda: step(half, True),
        "exchange": lambda: dist.all_reduce(flat),
    }
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(WARM + ROUNDS):
        for name, call in calls.items():
            dist.barrier()
            began = time.perf_counter()
            call()
            took = processes.largest(time.perf_counter() - began)
            if i >= WARM:
                seconds[name].append(took)
    least = {name: min(times) for name, times in seconds.items()}
    ratios = [two / one for two, one in zip(seconds["two"], seconds["one"], strict=True)]
    return {
        "parameters": flat.numel(),
        "seconds": least,
        "predicted": (least["half"] + least["exchange"]) / least["one"],
        "measured": least["two"] / least["one"],
        "quartiles": statistics.quantiles(ratios, n=4),
    }


PARTS: dict[str, Callable[[Path, int], None]] = {"equal": equal, "shard": sharded, "fsdp": fsdp, "ratio": ratio}

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    part, folder, count = sys.argv[1:]
    with processes.joined():
        PARTS[part](Path(folder), int(count))
