"""Choose the kernels that an op uses: the reference in plain PyTorch, C++ on the CPU, Triton, or CUDA.

Automatic choice takes the fastest backend that has a kernel for the tensors' device and dtype, if that passes the check
of its first use there (`selfcheck.py`), or else the reference. A backend chosen by hand (`metakern.backend("cpu")`, or
the environment variable METAKERN_BACKEND) must be available here; if not, a call of an op raises RuntimeError, whose
text says how to make it available. An op that has no kernels on the chosen backend, or none for the dtype, uses the
reference.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from metakern import native
from metakern.ops.core import selfcheck

if TYPE_CHECKING:
    from metakern.ops.core.rules import Rules

NAMES = ("reference", "cpu", "triton", "cuda")
_AUTOMATIC = {"cpu": ("cpu",), "cuda": ("cuda", "triton")}
Chooser = Callable[[str, Mapping[str, "Rules"]], "Rules"]
_chosen: ContextVar[str | Chooser | None] = ContextVar("metakern_backend", default=None)


@contextmanager
def backend(name: str) -> Iterator[None]:
    """Uses one backend for all ops inside a `with` block.

    If the backend is not available here, each op called inside the block raises RuntimeError, whose text says how to
    make it available.

    Args:
        name: "reference" for plain PyTorch on any device, "cpu" for C++ kernels, "triton" or "cuda" for a GPU's, or
            "auto" for the fastest that has kernels for the tensors at hand. It takes precedence over METAKERN_BACKEND.

    Raises:
        ValueError: For another name.

    >>> import metakern as mk, torch
    >>> with mk.backend("reference"):
    ...     mk.ops.silu(torch.zeros(2))
    tensor([0., 0.])
    """
    if name not in (*NAMES, "auto"):
        raise ValueError(f"backend: name must be one of {', '.join((*NAMES, 'auto'))}, got {name!r}")
    with using(name):
        yield


@contextmanager
def using(choice: str | Chooser) -> Iterator[None]:
    """Uses one backend, or what a function of the op's name and kernels returns, inside a `with` block."""
    token = _chosen.set(choice)
    try:
        yield
    finally:
        _chosen.reset(token)


def backends() -> dict[str, str]:
    """Returns which backends are available on this machine.

    Returns:
        A dictionary from each backend's name to "available", or to the reason why it is not and what to do about it.
        "available, except for ..." names kernels that were wrong at their first use on a device of this process, which
        automatic choice therefore does not use.

    >>> import metakern as mk
    >>> mk.backends()["reference"]
    'available'
    """
    off: dict[str, list[str]] = {}
    for which, found in selfcheck.faults().items():
        off.setdefault(which.backend, []).append(f"{which.op} in {which.dtype}, whose {found}")
    available = {name: f"available, except for {'; '.join(texts)}" for name, texts in off.items()}
    return {name: _obstacle(name) or available.get(name, "available") for name in NAMES}


def _obstacle(name: str) -> str | None:
    """Returns why a backend can't be used here, or None if it can. Neither imports Triton nor initializes the GPU."""
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


def chosen() -> str | Chooser:
    """Returns the backend that was chosen by hand, or "auto"."""
    return _chosen.get() or os.environ.get("METAKERN_BACKEND") or "auto"


def choose(op: str, kernels: Mapping[str, Rules], tensors: tuple[Tensor | None, ...]) -> Rules:
    """Returns the rules that a call of `op` uses, by the device and dtype of the first tensor that is not None."""
    name = chosen()
    if not isinstance(name, str):
        return name(op, kernels)
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
        if (dtypes is None or first.dtype in dtypes) and not (
            name == "auto" and selfcheck.fault(op, candidate, kernels, first.device, first.dtype)
        ):
            return kernels[candidate]
    return kernels["reference"]
