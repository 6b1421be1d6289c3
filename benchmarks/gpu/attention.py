"""Time attention's rules beside PyTorch's flash attention, and measure its memory over the length."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch

from benchmarks.calls import recorded
from benchmarks.gpu.measure import milliseconds, peak_mib
from benchmarks.gpu.pool import Job, Row
from benchmarks.gpu.problems import OPS, Random, device
from metakern.ops.core.spec import Sample

PRODUCTS = {"forward": 2, "jvp": 5, "vjp": 5, "vjp_jvp": 12, "flash_forward": 2, "flash_backward": 5}
TOKENS, WIDTH = 16384, 2048


def draw(B: int, H: int, L: int, D: int, dtype: torch.dtype) -> Sample:
    make = Random(dtype, seed=1)
    return Sample("", (make(B, H, L, D), make(B, H, L, D), make(B, H, L, D)))


def flash(sample: Sample, where: torch.device) -> dict[str, Callable[[], Any]]:
    """Return calls of PyTorch's kernel and of its backward; they avoid autograd, which leaves a CUDA graph's stream."""
    q, k, v = (t.to(where) for t in sample.args)
    scale, aten = q.shape[-1] ** -0.5, torch.ops.aten

    def forward() -> Any:
        return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True, False, scale=scale)

    y, lse, cum_q, cum_k, max_q, max_k, seed, offset, _ = forward()
    ct = torch.randn_like(y)

    def backward() -> Any:
        return aten._scaled_dot_product_flash_attention_backward(
            ct, q, k, v, y, lse, cum_q, cum_k, max_q, max_k, 0.0, True, seed, offset, scale=scale
        )

    return {"flash_forward": forward, "flash_backward": backward}


def times(L: int, D: int, tiny: bool) -> Row:
    """Time causal attention in bfloat16; the number of tokens is the same at every length."""
    B, H = (1, 2) if tiny else (TOKENS // L, WIDTH // D)
    sample = draw(B, H, L, D, torch.float32 if tiny else torch.bfloat16)
    # PyTorch's kernel runs only on GPUs; elsewhere its arguments are tried on tensors without memory.
    calls = recorded("attention", sample, "triton")
    calls |= flash(sample, device() if torch.cuda.is_available() else torch.device("meta"))
    rows: Row = {}
    for name, call in calls.items():
        ms, flop = milliseconds(call), PRODUCTS[name] * B * H * L * (L + 1) * D
        rows[name] = {"ms": ms, "tflop_per_s": flop / ms / 1e9}
    rate = {name: row["tflop_per_s"] for name, row in rows.items()}
    rows["jvp_of_flash_forward"] = rate["jvp"] / rate["flash_forward"]
    rows["vjp_jvp_of_flash_backward"] = rate["vjp_jvp"] / rate["flash_backward"]
    return rows


def memory(L: int, tiny: bool) -> Row:
    """Measure the peak memory of one sequence at both orders, beyond that of q, k and v."""
    sample = draw(1, 1 if tiny else 4, L, 8 if tiny else 64, torch.float32 if tiny else torch.bfloat16)
    peak = peak_mib(lambda: recorded("attention", sample, "triton"))
    return {"peak_mib": peak, "kib_per_token": 1024 * peak / L}


def jobs(tiny: bool) -> Iterator[Job]:
    for L, D in ((6, 8),) if tiny else ((L, D) for D in (64, 128) for L in (512, 1024, 2048, 4096, 8192)):
        if "attention" in OPS:
            yield Job({"length": L, "head": D}, partial(times, L, D, tiny))


def memory_jobs(tiny: bool) -> Iterator[Job]:
    for L in (5,) if tiny else (4096, 8192, 16384, 32768):
        if "attention" in OPS:
            yield Job({"length": L}, partial(memory, L, tiny))
