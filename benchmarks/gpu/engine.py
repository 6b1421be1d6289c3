"""Check the engine on a GPU: meta-gradients of the workloads by every method, and of every algorithm. Time them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import metakern as mk
from benchmarks import few_shot, peers, truth
from benchmarks.gpu.checks import errors
from benchmarks.gpu.measure import eager_milliseconds, milliseconds, peak_mib
from benchmarks.gpu.pool import Job, Row
from benchmarks.gpu.problems import device, flat, moved
from benchmarks.peers.metakern import adapted
from benchmarks.workloads import FAMILIES, Workload, make
from benchmarks.workloads.models import Llama

SINES = few_shot.sines()
CAPTURED = {"capture": True}
# Method -> the options of MAML, and how often it is called: the default captures at its third call. Later calls audit.
METHODS: dict[str, tuple[dict[str, Any], int]] = {
    "default": ({}, 5),
    "captured": (CAPTURED, 3),
    "store": (CAPTURED | {"strategy": "store"}, 3),
    "recompute": (CAPTURED | {"strategy": "recompute"}, 3),
    "not captured": ({"capture": False}, 1),
    "first order": (CAPTURED | {"first_order": True}, 3),
    "implicit": (CAPTURED | {"weights": "implicit"}, 3),
    "autocast": (CAPTURED, 3),  # inside torch.autocast, as is plain PyTorch
}
# Row -> peer, method, and whether it is timed as a CUDA graph of the whole step, as nobody's own call gives it.
TIMED = {
    "metakern": ("metakern", "metakern auto", False),
    "metakern_not_captured": ("metakern", "metakern auto, not captured", False),
    "torch_func": ("torch_func", "torch.func, reverse over reverse", False),
    "torch_func_graph": ("torch_func", "torch.func, reverse over reverse", True),
    "torch_func_forward": ("torch_func", "torch.func, forward over reverse", False),
    "torch_func_forward_graph": ("torch_func", "torch.func, forward over reverse", True),
    "plain": ("plain", "plain PyTorch", False),
    "implicit": ("metakern", "metakern auto, implicit weights", False),
}

FIRST = ("gpt", "lstm", "llm-full", "llama-lora", "mlp", "gru", "rnn").index  # those that time must suffice for
CALLS = {"metakern": (15, 4), "torch_func": (3, 1), "plain": (1, 0)}  # measured, after some to warm up


@torch.no_grad()
def change(work: Workload) -> None:
    """Change the values of a workload in place: exchange the data of tasks, and scale the parameters."""
    for t in (*work.support, *work.query):
        t.copy_(t.flip(0))
    work.query[0].copy_(work.support[0].roll(1, 0))
    if not isinstance(work.model, Llama):  # of which metakern makes a copy
        for p in work.model.parameters():
            p.mul_(1.01)


def workload(name: str, method: str) -> Row:
    """Compare a method's meta-gradient with that of a CPU in float64, and its error with plain PyTorch's in float32.

    All values then change in place, so that a graph that reads old ones is found.
    """
    work, twin = moved(make(name)), make(name)
    first, (options, calls) = method == "first order", METHODS[method]
    low = method == "autocast"
    autocast = partial(torch.autocast, device().type, torch.bfloat16, low)
    plain = peers.load("plain").methods["plain PyTorch, first order" if first else "plain PyTorch"](work)
    ours = adapted(work)
    maml = mk.MAML(ours.model, ours.loss, mk.optim.SGD(ours.lr), ours.steps, **options)
    rows = []
    for count in (calls, 2):
        right = [flat(truth.exact(twin)[first]).to(device())]
        with autocast(), torch.backends.cudnn.flags(enabled=False):  # its recurrent layers have no second derivative
            theirs = errors([flat(plain())], right).item()
        found = []
        for _ in range(count):
            ours.model.zero_grad()
            with autocast():
                kept = maml(ours.support, ours.query)  # as users keep it, and with it a graph, until the next call
                kept.backward()
            found.append(errors([flat({name: ours.theta[name].grad for name in work.theta})], right).item())
        good = max(found) <= 2 * theirs + 4 * torch.finfo(torch.bfloat16 if low else torch.float32).eps
        rows.append({"error": max(found), "plain": theirs, "good": good})
        change(work), change(twin)
    usage, captured = maml.plan.usage, options.get("capture", True)
    row = max(rows, key=lambda row: (not row["good"], row["error"]))
    row["good"] &= usage.captured >= 2 if captured else not usage.captured
    return row | {"captured": usage.captured, "why": "" if row["good"] else str(maml.plan.reasons)}


def times(name: str) -> Row:
    """Return the milliseconds and the peak memory of a meta-gradient by each of TIMED."""
    row: Row = {}
    for key, (peer, method, as_graph) in TIMED.items():
        if key == "implicit" and not name.startswith("llm-full"):
            continue
        step = peers.load(peer).methods[method](moved(make(name)))
        try:
            with torch.backends.cudnn.flags(enabled=peer == "metakern"):
                row[f"{key}_peak_mib"] = None if as_graph else peak_mib(step)  # which is a call to warm up, too
                row[f"{key}_ms"] = milliseconds(step, 1) if as_graph else eager_milliseconds(step, *CALLS[peer])
        except Exception as error:  # a peer may fail; the row has the others
            row[f"{key}_error"] = f"{type(error).__name__}: {error}"[:300]
        torch.cuda.synchronize() if torch.cuda.is_available() else None
    return row


def algorithm(name: str) -> Row:
    """Compare the gradients of an algorithm in float64 with those of a CPU, at each of five calls on other data."""
    captured, reasons = 0, []

    def found(where: torch.device) -> list[Tensor]:
        nonlocal captured, reasons
        torch.manual_seed(0)
        generator, gradients = torch.Generator().manual_seed(1), []
        made = SINES.algorithms[name](SINES.model(), 0.01).to(where, torch.float64)
        for _ in range(5):
            support, query = few_shot.waves(5, generator)
            made.zero_grad()
            kept = made(*(tuple(x.to(where, torch.float64) for x in batch) for batch in (support, query)))
            kept.backward()
            gradients.append(torch.cat([p.grad.flatten().cpu() for p in made.parameters() if p.grad is not None]))
        plan = getattr(made, "plan", None)
        captured = plan.usage.captured if plan else 0
        reasons = [reason for reason in plan.reasons if reason.startswith("not captured")] if plan else []
        return gradients

    truth = found(torch.device("cpu"))
    error = errors(found(device()), truth).max().item()
    return {"error": error, "good": error < 1e-9, "captured": captured, "why": "; ".join(reasons)}


def checks(tiny: bool) -> Iterator[Job]:
    for family in FAMILIES[:1] if tiny else FAMILIES:
        for method in METHODS:
            name = f"{family}:{'tiny' if tiny else 'small,tasks=4,K=2'}"
            yield Job({"op": "meta-gradient", "sample": name, "method": method}, partial(workload, name, method))
    for name in list(SINES.algorithms)[: 1 if tiny else None]:
        yield Job({"op": "algorithm", "sample": name, "dtype": "float64"}, partial(algorithm, name))


def jobs(tiny: bool) -> Iterator[Job]:
    for size in ("tiny",) if tiny else ("small", "medium"):
        for family in FAMILIES[:1] if tiny else sorted(FAMILIES, key=FIRST):
            yield Job({"workload": f"{family}:{size}"}, partial(times, f"{family}:{size}"))
