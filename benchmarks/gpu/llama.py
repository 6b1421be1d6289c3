"""The second-order meta-gradient of a Llama in bfloat16, by metakern on a patched model and by plain PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import metakern as mk
from benchmarks import peers
from benchmarks.gpu.checks import errors
from benchmarks.gpu.measure import eager_milliseconds, peak_mib
from benchmarks.gpu.pool import Job, Row
from benchmarks.gpu.problems import Random, device, flat
from benchmarks.workloads import Workload

METHODS = {"metakern": "metakern auto", "not captured": "metakern auto, not captured", "plain": "plain PyTorch"}
STEPS, LR = 2, 1e-3
LENGTH = 2048
SIZES = ((1, 1), (4, 1), (4, 4))  # tasks, and sequences of each


def config(V: int, D: int, F: int, layers: int, H: int, H_kv: int) -> dict[str, int]:
    """Return options of a LlamaConfig; D and F are the widths of the model and of its MLP."""
    names = "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"
    return dict(zip((*names, "num_key_value_heads"), (V, D, F, layers, H, H_kv), strict=True))


TIMED, CHECKED, TINY = config(32000, 1024, 2816, 8, 16, 4), config(500, 256, 512, 2, 4, 2), config(19, 16, 24, 2, 4, 2)


def work(shape: dict[str, int], T: int, B: int, L: int, dtype: torch.dtype) -> Workload:
    """Return the workload, with the same weights and tokens in every dtype: the weights are rounded to bfloat16."""
    import transformers

    torch.manual_seed(0)
    llama = transformers.LlamaConfig(**shape, max_position_embeddings=L, use_cache=False)
    model = transformers.AutoModelForCausalLM.from_config(llama, attn_implementation="eager")
    model = model.to(device(), torch.bfloat16).to(dtype)
    tokens = Random(dtype, seed=2).integers(shape["vocab_size"], 2, T, B, L + 1)
    support, query = ((t[..., :-1], t[..., 1:]) for t in tokens)
    return Workload(model, causal_lm, support, query, STEPS, LR)


def causal_lm(model: Any, batch: Any) -> Tensor:
    """The loss of plain PyTorch: cross-entropy over all logits, in float32."""
    tokens, targets = batch
    return F.cross_entropy(model(tokens).logits.flatten(0, 1).float(), targets.flatten())


def step(peer: str, work: Workload) -> Any:
    if peer != "plain":
        mk.patch(work.model)
        work = replace(work, loss=mk.losses.causal_lm)
    return peers.load("plain" if peer == "plain" else "metakern").methods[METHODS[peer]](work)


def check(L: int, dtype: str, tiny: bool) -> Row:
    """Compare the meta-gradient with that of plain PyTorch in float64."""
    kind = getattr(torch, dtype)

    def found(peer: str, dtype: torch.dtype) -> Tensor:
        return flat(step(peer, work(TINY if tiny else CHECKED, 2, 2, L, dtype))())

    truth = found("plain", torch.float64)
    ours, theirs = (errors([found(peer, kind)], [truth]).item() for peer in ("metakern", "plain"))
    return {"error": ours, "plain": theirs, "good": ours <= 2 * theirs + 4 * torch.finfo(kind).eps}


def times(peer: str, T: int, B: int, L: int, tiny: bool) -> Row:
    one = step(peer, work(TINY if tiny else TIMED, T, B, L, torch.float32 if tiny else torch.bfloat16))
    one()
    return {"peak_mib": peak_mib(one), "ms": eager_milliseconds(one, 1 if tiny else 3)}


def checks(tiny: bool) -> Iterator[Job]:
    for dtype in ("float32",) if tiny else ("float32", "bfloat16"):
        L = 5 if tiny else 300
        yield Job({"op": "meta-gradient", "sample": f"llama-{L}", "dtype": dtype}, partial(check, L, dtype, tiny))


def jobs(tiny: bool) -> Iterator[Job]:
    L = 4 if tiny else LENGTH
    for T, B in SIZES[:1] if tiny else SIZES:
        for peer in METHODS:
            yield Job({"peer": peer, "tasks": T, "sequences": B, "length": L}, partial(times, peer, T, B, L, tiny))
