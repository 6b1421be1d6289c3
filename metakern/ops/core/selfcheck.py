"""Kernels that check themselves: an op's first use of kernels on a device compares its four rules with the reference.

The inputs are the op's first sample (`Spec.samples`) in the dtype at hand. The reference computes the rules in float64,
and also in that dtype: a kernel's error may be a few times as large as that of the reference. Kernels that differ,
raise or crash are switched off with a warning: the reference takes their place, and `metakern.backends()` says why. A
backend that is chosen by hand is not checked.

The verdicts of a device, its driver, these releases and this build are kept in a file of the cache folder, a line each:

    {"op": "silu", "backend": "triton", "dtype": "float32", "found": "begun", "process": 4711}

`found` is "good", or says what is wrong. Where three processes began a check and ended without a verdict, it was the
check that ended them, and its kernels are switched off too. Errors, such as that of a missing compiler, are not kept.

A check runs in a thread of its own, in which no mode, transform or backend of the caller is active.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import threading
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from copy import copy
from dataclasses import replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

import metakern
from metakern import io, native
from metakern.native.record import in_cuda_graph
from metakern.ops.core.rules import Rules, Tensors

if TYPE_CHECKING:
    from metakern.ops.core.spec import Make, Spec  # imported at a call, since ops choose kernels by this module

GOOD, BEGUN, ENDED = "good", "begun", "ended by an error"
CRASHES = 3  # checks without a verdict after which kernels are switched off: a user may have ended one or two
LARGEST = 2**20  # bytes of a file of verdicts
TIMES, ULPS, SHARE = 8, 2**10, 0.1  # how far an error may exceed the reference's, in which least and greatest bounds
RULES = {
    "y": "outputs are wrong",
    "t_y": "derivatives in forward mode are wrong",
    "ct_x": "derivatives are wrong",
    "t_ct_x": "second derivatives are wrong",
}


class Kernels(NamedTuple):
    """The kernels of an op on a backend for a dtype."""

    op: str
    backend: str
    dtype: str


_lock = threading.RLock()


def _renewed() -> None:
    """Drop the lock in a forked child: the thread that held it does not exist there."""
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renewed)

_faults: dict[tuple[int, torch.device, torch.dtype], tuple[Rules, str]] = {}  # the rules by their identity


def fault(op: str, name: str, kernels: Mapping[str, Rules], device: torch.device, dtype: torch.dtype) -> str:
    """Returns why the kernels of a backend must not be used on a device, or "". Checks them at their first use."""
    rules = kernels[name]
    key = id(rules), device, dtype
    if key not in _faults:
        if in_cuda_graph(device):
            return ""  # the check would become a part of the graph
        with _lock:
            if key not in _faults:
                _faults[key] = rules, _first_use(op, name, kernels, device, dtype)
    return _faults[key][1]


def faults() -> dict[Kernels, str]:
    """Returns the kernels that are switched off on the devices that this process has used, with the reasons."""
    return {kernels: found for verdicts in _OPEN for kernels, found in verdicts.found.items() if found != GOOD}


def _first_use(op: str, name: str, kernels: Mapping[str, Rules], device: torch.device, dtype: torch.dtype) -> str:
    from metakern.ops import SPECS

    spec = SPECS.get(op)
    if spec is None or spec.op.kernels is not kernels:  # of an op outside of this package
        return ""
    verdicts, which = _verdicts(device), Kernels(op, name, str(dtype).removeprefix("torch."))
    found = verdicts.of(which)
    if found is None:
        verdicts.add(which, BEGUN)
        try:
            with ThreadPoolExecutor(1) as thread:
                found = thread.submit(_checked, spec, kernels[name], device, dtype).result()
        except Exception as error:
            if not _is_alive(device):
                verdicts.add(which, "check crashes the GPU")
                raise RuntimeError(
                    f"{op}: the check of its {name} kernels has crashed the GPU; start the program again, which will do"
                    f" without these kernels: {error}"
                ) from error
            found = f"check raises {type(error).__name__}: {' '.join(str(error).split())[:200]}"
            verdicts.add(which, ENDED)
            verdicts.found[which] = found
        except BaseException:
            verdicts.add(which, ENDED)
            raise
        else:
            verdicts.add(which, found)
    if found in (GOOD, ENDED):
        return ""
    warnings.warn(
        f"{op}: its {name} kernels are switched off for {which.dtype} on {verdicts.device}, since their {found}; plain"
        f" PyTorch takes their place. Please report this; metakern.backend({name!r}) uses the kernels all the same.",
        stacklevel=2,
    )
    return found


def _is_alive(device: torch.device) -> bool:
    """Whether a device still works after an error."""
    try:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    except RuntimeError:
        return False
    return True


def _checked(spec: Spec, rules: Rules, device: torch.device, dtype: torch.dtype) -> str:
    """Returns the verdict on the rules of a backend, or `ENDED` without one. Runs in a thread of its own."""
    with torch.no_grad():
        try:
            c, given, same, exact = _expected(spec, device, dtype)
        except Exception:  # as where PyTorch's settings refuse an operation of the reference
            return ENDED
        try:
            found = _results(spec, rules, c, *given)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        except torch.OutOfMemoryError:
            return ENDED
    wrong = (rule for rule in RULES if not _equal(found[rule], same[rule], exact[rule], torch.finfo(dtype).eps))
    return next((RULES[rule] for rule in wrong), GOOD)


def _expected(spec: Spec, device: torch.device, dtype: torch.dtype) -> tuple[Any, tuple[Tensors, ...], Any, Any]:
    """Returns constants and arguments of the rules, and the reference's results, in this dtype and in float64."""
    from metakern.ops.core.spec import Make

    reference, random = spec.op.kernels["reference"], Make(dtype, device, seed=1)

    def like(values: Tensors) -> Tensors:
        return tuple(None if v is None else random(*v.shape) for v in values)

    c, x = _inputs(spec, Make(dtype, device))
    y, _ = reference.forward(copy(c), x)
    given = x, like(x), like(y), like(y)
    exact = _results(spec, reference, SimpleNamespace(**_wide(vars(c))), *_wide(given))
    return c, given, _results(spec, reference, c, *given), exact


def _inputs(spec: Spec, make: Make) -> tuple[SimpleNamespace, Tensors]:
    """Returns the constants and inputs with which the rules are called for the first sample of an op."""
    from metakern.ops.core import backend

    calls: list[tuple[SimpleNamespace, Tensors]] = []

    def chosen(op: str, kernels: Mapping[str, Rules]) -> Rules:
        reference = kernels["reference"]

        def forward(c: SimpleNamespace, x: Tensors) -> tuple[Tensors, Tensors]:
            if op == spec.op.name:
                c.needs = tuple(t is not None and t.requires_grad for t in x)
                calls.append((c, tuple(None if t is None else t.detach() for t in x)))
            return reference.forward(copy(c), x)

        return replace(reference, forward=forward)

    def leaf(t: Tensor) -> Tensor:
        return t.requires_grad_() if t.is_floating_point() else t

    sample = spec.samples(make)[0]
    args = [a if i in sample.frozen else tree_map_only(Tensor, leaf, a) for i, a in enumerate(sample.args)]
    with backend.using(chosen), torch.enable_grad():
        spec.call(*args, **sample.kwargs)
    return calls[0]


def _results(spec: Spec, rules: Rules, c: Any, x: Tensors, t_x: Tensors, ct_y: Tensors, t_ct_y: Tensors) -> Any:
    """Returns what the four rules return, by the names in `RULES`."""
    c, keeps = copy(c), spec.op.saves_output
    y, r = rules.forward(c, x)
    r = (*r, *y) if keeps else r
    t_y, t_r = rules.jvp(c, x, r, t_x)
    t_r = (*t_r, *t_y) if keeps else t_r
    ct_x = rules.vjp(c, x, r, ct_y)
    c.from_vjp, ct_x = ct_x[len(x) :], ct_x[: len(x)]
    t_ct_x = rules.vjp_jvp(c, x, r, t_x, t_r, ct_y, t_ct_y)
    return {"y": y, "t_y": t_y, "ct_x": _wanted(ct_x, x, c), "t_ct_x": _wanted(t_ct_x, x, c)}


def _wanted(values: Tensors, x: Tensors, c: Any) -> Tensors:
    """Returns the cotangents that are wanted, zeros in place of None."""
    each = zip(values, x, c.needs, strict=True)
    return tuple(torch.zeros_like(a) if value is None else value for value, a, needed in each if needed)


def _wide(tree: Any) -> Any:
    return tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, tree)


def _equal(found: Tensors, same: Tensors, exact: Tensors, eps: float) -> bool:
    """Whether the tensors of a rule are as near to the exact ones as those of the reference in the same dtype."""
    for a, b, e in zip(found, same, exact, strict=True):
        if a.shape != e.shape or a.dtype != b.dtype:
            return False
        finite = e.isfinite()
        if not torch.equal(a.isfinite(), finite):
            return False
        a, b, e = (t[finite].double() for t in (a, b, e))
        if not e.numel():
            continue
        scale = max(t.abs().max() for t in exact if t.numel())
        allowed = TIMES * (b - e).abs().max() + min(ULPS * eps, SHARE) * scale
        if (a - e).abs().max() > allowed:
            return False
    return True


class Verdicts:
    """The verdicts of a device: those in its file, to which each process adds its own."""

    def __init__(self, device: str, identity: Mapping[str, Any]) -> None:
        self.device = device
        digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
        self.path = io.cache_folder() / "kernels" / f"{digest}.jsonl"
        self.found: dict[Kernels, str] = {}
        self._begun = Counter[Kernels]()
        for kernels, found, process in self._lines():
            if found != BEGUN:
                del self._begun[kernels]
                if found != ENDED:
                    self.found[kernels] = found
            elif not _is_running(process):
                self._begun[kernels] += 1

    def of(self, kernels: Kernels) -> str | None:
        """Returns the verdict on kernels, or None if they must be checked."""
        if kernels not in self.found and self._begun[kernels] >= CRASHES:
            self.found[kernels] = f"check has ended {self._begun[kernels]} processes"
        return self.found.get(kernels)

    def add(self, kernels: Kernels, found: str) -> None:
        if found not in (BEGUN, ENDED):
            self.found[kernels] = found
        line = json.dumps(kernels._asdict() | {"found": found, "process": os.getpid()}) + "\n"
        with suppress(OSError):  # without a file, each process checks for itself
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
            try:
                os.write(file, line.encode())
            finally:
                os.close(file)

    def _lines(self) -> Iterator[tuple[Kernels, str, int]]:
        """Yield what the file says; what is not a line of this kind is skipped."""
        try:
            text = io.read(self.path, LARGEST).decode()
        except (OSError, ValueError):
            return
        for line in text.splitlines():
            with suppress(ValueError, TypeError, KeyError, RecursionError):
                entry = json.loads(line)
                texts = [entry[key] for key in (*Kernels._fields, "found")]
                if all(isinstance(text, str) for text in texts) and isinstance(entry["process"], int):
                    yield Kernels(*texts[:-1]), texts[-1], entry["process"]


def _is_running(process: int) -> bool:
    """Whether another process with this number exists."""
    if process == os.getpid() or process <= 0:
        return False
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


def _verdicts(device: torch.device) -> Verdicts:
    """Returns the verdicts of a device; those of equal devices are the same."""
    where: tuple[Any, ...]
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        driver = getattr(torch._C, "_cuda_getDriverVersion", lambda: None)()
        where = (properties.name, properties.major, properties.minor, driver, torch.version.cuda, torch.version.hip)
    else:
        where = (native.C.isa() if native.C else "", native.choice.processor())
    return _of(where)


@cache
def _of(where: tuple[Any, ...]) -> Verdicts:
    triton = version("triton") if importlib.util.find_spec("triton") else ""
    _OPEN.append(
        Verdicts(str(where[0]), {"device": where, "torch": torch.__version__, "triton": triton, "build": _build()})
    )
    return _OPEN[-1]


_OPEN: list[Verdicts] = []


def _build() -> list[Any]:
    """Returns what changes with the code of the kernels: names, sizes and times of the files."""
    package = Path(metakern.__file__).parent
    files = [*package.glob("*.so"), *(package / "ops").rglob("*.py")]
    states = [(file, file.stat()) for file in sorted(files)]
    return [(file.relative_to(package).as_posix(), state.st_size, state.st_mtime_ns) for file, state in states]
