"""Which kernels an op uses: the reference in plain PyTorch, C++ on the CPU, Triton, or CUDA.

Automatic choice takes the fastest backend that has a kernel for the tensors' device and dtype, and the reference where
none has. A backend chosen by hand (`metakern.backend("cpu")`, or the environment variable METAKERN_BACKEND) must be
available here, or the call raises with the cure; an op that has no kernel of its own on that backend, or none for the
dtype, uses the reference.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from metakern import native

if TYPE_CHECKING:
    from metakern.ops.core.rules import Rules

NAMES = ("reference", "cpu", "triton", "cuda")
_AUTOMATIC = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}
_chosen: ContextVar[str | None] = ContextVar("metakern_backend", default=None)


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Uses one backend inside a `with` block: "reference", "cpu", "triton", "cuda", or "auto".

    Raises ValueError for an unknown name. A backend that is not available raises when an op is called, with the cure.

    >>> import metakern as mk, torch
    >>> with mk.backend("reference"):
    ...     mk.ops.silu(torch.zeros(2))
    tensor([0., 0.])
    """
    if name not in (*NAMES, "auto"):
        raise ValueError(f"backend: name must be one of {', '.join((*NAMES, 'auto'))}, got {name!r}")
    token = _chosen.set(name)
    try:
        yield
    finally:
        _chosen.reset(token)


def backends() -> dict[str, str]:
    """What is available on this machine: {name: "available" or the reason why it is not, with the cure}."""
    return {name: _obstacle(name) or "available" for name in NAMES}


def _obstacle(name: str) -> str | None:
    """Why a backend can't be used here, or None. Imports no Triton, and only asks whether there is a device."""
    if name == "cpu":
        return native.obstacle()
    if name == "triton":
        if importlib.util.find_spec("triton") is None:
            return "Triton is not installed: pip install 'metakern[triton]'"
        if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
            return "no GPU is present: use one, or set TRITON_INTERPRET=1 to run Triton kernels in the interpreter"
    if name == "cuda":
        return native.cuda_obstacle()
    return None


def chosen() -> str:
    """The backend that was chosen by hand, or "auto"."""
    return _chosen.get() or os.environ.get("METAKERN_BACKEND") or "auto"


def choose(op: str, kernels: Mapping[str, Rules], tensors: tuple[Tensor | None, ...]) -> Rules:
    """The rules that a call of `op` on these tensors uses."""
    name = chosen()
    if name not in (*NAMES, "auto"):
        raise ValueError(f"METAKERN_BACKEND must be one of {', '.join((*NAMES, 'auto'))}, got {name!r}")
    first = next(t for t in tensors if t is not None)
    if name == "auto":
        candidates = [b for b in _AUTOMATIC.get(first.device.type, ()) if b in kernels and _obstacle(b) is None]
    else:
        obstacle = _obstacle(name)
        if obstacle:
            raise RuntimeError(f"{op}: backend {name!r} is not available: {obstacle}")
        candidates = [name] if name in kernels else []
    for candidate in candidates:
        dtypes = kernels[candidate].dtypes
        if dtypes is None or first.dtype in dtypes:
            return kernels[candidate]
    return kernels["reference"]
