"""Choose between two batched matrix products, ours and torch.bmm, by a measurement on this machine.

A few sizes are timed once for each processor, instruction set and version. That takes some milliseconds at the first
product. The decision is kept in a file of the cache folder, so that all later processes compute the same numbers,
however busy the machine is and however many threads they use. Delete the file to measure again. The environment
variable METAKERN_PRODUCTS, if it is "native" or "torch", decides instead.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from metakern import io
from metakern.errors import CheckpointError

SIZES = ((8, 32, 128, 128), (32, 10, 128, 128), (1, 256, 128, 256), (4, 80, 128, 256))  # T, M, K, N
MARGIN = 1.15  # ours must be so much faster, as torch.bmm is the tested default
ROUNDS = 5
Product = Callable[..., Tensor]  # of two batches of matrices


class Choice(NamedTuple):
    """Whether our product is used, and the reason as a text."""

    is_native: bool
    why: str


def choose(ours: Product, isa: str) -> Choice:
    """Returns the choice for an instruction set: asked for, kept, or measured now.

    Raises:
        ValueError: METAKERN_PRODUCTS is neither "native" nor "torch".
    """
    if asked := os.environ.get("METAKERN_PRODUCTS"):
        if asked not in ("native", "torch"):
            raise ValueError(f"METAKERN_PRODUCTS must be native or torch, got {asked!r}")
        return Choice(asked == "native", f"METAKERN_PRODUCTS={asked}")
    key = {"processor": processor(), "isa": isa, "torch": torch.__version__, "metakern": _version()}
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    file = io.cache_folder() / "products" / f"{digest}.json"
    ratio = _kept(file, key)
    if ratio is None:
        ratio = measured(ours)
        # Another process may have been faster, and all processes must decide alike.
        if _kept(file, key) is None:
            with suppress(CheckpointError):  # the folder can't be written
                io.write(file, json.dumps(key | {"ratio": ratio}, indent=1).encode() + b"\n")
        ratio = _kept(file, key) or ratio
    kept = f", kept in {file}" if _kept(file, key) else ""
    return Choice(ratio >= MARGIN, f"torch.bmm takes {ratio:.2f} x the time of ours{kept}")


def measured(ours: Product) -> float:
    """Returns the time of torch.bmm over that of our product: the median over SIZES of the ratio of the best times.

    Both run on one thread, whose processor time is taken: it does not count the time in which other processes have the
    core. The thread is a new one, in which no mode of PyTorch (autocast, a recorder) is active.
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_measured, ours).result()


def _measured(ours: Product) -> float:
    ones = partial(torch.ones, dtype=torch.float32, device="cpu")
    products: tuple[Product, ...] = ours, torch.bmm
    best = [[math.inf, math.inf] for _ in SIZES]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # from the start: a second thread would go on spinning after its work
    try:
        operands = [(ones(T, M, K), ones(T, K, N)) for T, M, K, N in SIZES]
        for _ in range(ROUNDS):
            for times, (a, b) in zip(best, operands, strict=True):
                for i, product in enumerate(products):
                    start = time.thread_time()
                    product(a, b)
                    times[i] = min(times[i], time.thread_time() - start)
    finally:
        torch.set_num_threads(threads)
    return statistics.median(theirs / own for own, theirs in best)


def _kept(file: Path, key: dict[str, str]) -> float | None:
    """Returns the ratio in the file, or None if there is no file of this key, or a damaged one."""
    try:
        found = json.loads(io.read(file, 2**16))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(found, dict) or found | {"ratio": 0} != key | {"ratio": 0}:
        return None
    ratio = found.get("ratio")
    return ratio if isinstance(ratio, float) and ratio > 0 else None


@cache
def processor() -> str:
    """Returns the processor's model, as exactly as the system says it."""
    names = ("vendor_id", "cpu family", "model", "model name", "stepping", "CPU implementer", "CPU part", "CPU variant")
    with suppress(OSError):
        pairs = (line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines())
        found = dict.fromkeys(text.strip() for name, _, text in pairs if name.strip() in names)
        if found:
            return " ".join(found)
    return f"{platform.machine()} {platform.processor()}".strip()


def _version() -> str:
    try:
        return version("metakern")
    except PackageNotFoundError:
        return ""
