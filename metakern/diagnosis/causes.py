"""Find the cause of lost derivatives at a place: an autograd Function, or a line of code that detaches.

A Function is judged like any place, as a function of its inputs. For a line that detaches, the place is judged again
without its effect: if the place is exact then, the derivatives were lost there. The code itself is looked at only to
choose the words.
"""

from __future__ import annotations

import inspect
import linecache
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten

from metakern.diagnosis.places import Call, Patient, Place, copied
from metakern.diagnosis.report import FORWARD_MODE, Problem
from metakern.meta.slopes import Differences, Tensors, Verdict, direction, gradient
from metakern.meta.unroll import derivatives

SITES = 16  # the number of lines that are tried one by one
_WRITES = re.compile(r"\w_\(|\]\s*=[^=]|[^=!<>]\s*[-+*/@]=|\bout=")
_SOURCES = Path(__file__).parent.parent


@dataclass(frozen=True)
class Site:
    """A line of code that takes a tensor out of autograd's graph; `name` is what it uses, such as "detach"."""

    name: str
    file: str
    line: int
    function: str

    def __str__(self) -> str:
        return f"{Path(self.file).name}:{self.line}"

    @property
    def writes(self) -> bool:
        """Whether the line, or one of the two below a `no_grad`, writes into a tensor."""
        lines = range(self.line, self.line + (3 if self.name == "no_grad" else 1))
        return any(_WRITES.search(linecache.getline(self.file, n)) for n in lines)


@dataclass
class Taps:
    """Records the lines that take tensors out of autograd's graph, `seen`; the lines in `undone` leave them in it."""

    undone: frozenset[Site] = frozenset()
    seen: dict[Site, None] = field(default_factory=dict)

    def passes(self, name: str, tensor: Tensor | None = None) -> bool:
        """Records the calling line; returns whether it is in `undone`, and the tensor stays in the graph."""
        frame: Any = sys._getframe(2)
        while frame and frame.f_code.co_filename.endswith("_contextlib.py"):
            frame = frame.f_back
        code = frame.f_code
        site = Site(name, code.co_filename, frame.f_lineno, code.co_name)
        if (tensor is None or tensor.requires_grad) and not _internal(site.file):
            self.seen[site] = None
        return site in self.undone

    @contextmanager
    def open(self) -> Iterator[Taps]:
        """Within the block, `torch.no_grad` and the methods of `Tensor` that detach are replaced by recording ones."""
        base: Any = torch._C.TensorBase
        enter, passes = torch.no_grad.__enter__, self.passes

        def method(name: str) -> Callable[..., Any]:
            original = getattr(Tensor, name)

            def tapped(self: Tensor, *args: Any, **kwargs: Any) -> Any:
                return self if passes(name, self) else original(self, *args, **kwargs)

            return tapped

        def data(self: Tensor) -> Tensor:
            return self if passes("data", self) else base.data.__get__(self)

        def no_grad(self: Any) -> None:
            if passes("no_grad"):
                self.prev = torch.is_grad_enabled()
            else:
                enter(self)

        names = ("detach", "item", "numpy", "tolist", "data_ptr", "__float__", "__array__")
        before = {name: vars(Tensor).get(name) for name in (*names, "data")}
        patched: Any = Tensor
        try:
            for name in names:
                setattr(patched, name, method(name))
            patched.data = property(data, base.data.__set__)
            torch.no_grad.__enter__ = no_grad  # type: ignore[method-assign]
            yield self
        finally:
            torch.no_grad.__enter__ = enter  # type: ignore[method-assign]
            for name, value in before.items():
                if value is None:
                    delattr(patched, name)
                else:
                    setattr(patched, name, value)


def explain(patient: Patient, place: Place, verdict: Verdict) -> list[Problem]:
    """Returns the problems of a place that is not exact although all modules within it are, or are cut out."""
    with Taps().open() as taps:
        functions, cut = _functions(place)
    sites, found = list(taps.seen), []
    for call in functions:
        inner = Place(patient, call)
        judged = inner.judge()
        if not judged.exact:
            cls = call.function.__self__  # type: ignore[attr-defined]
            found.append(_of_function(inner, judged, cls in cut, sites))
    if not found or (verdict.wrong("first") and all(problem.order == 2 for problem in found)):
        found.append(_of_lines(place, verdict, sites))
        undone = found[-1].undo
        with Taps(undone).open():
            beneath = place.judge() if undone else Verdict()
        if len(found) == 1 and not beneath.exact:  # the second order was not judged while the first was wrong
            found.append(_of_lines(place, beneath, sites, undone))
    return found


def _functions(place: Place) -> tuple[list[Call], set[type]]:
    """Returns the calls of Python's autograd Functions, one of each kind, and those whose backward has no graph."""
    leaves = [t.detach().requires_grad_() for t in place.z]
    cut: set[type] = set()
    with place.scalar(leaves) as value:
        nodes = [n for n in _graph(value.grad_fn) if hasattr(n, "_forward_cls")]
        for node in nodes:

            def look(inputs: tuple, outputs: tuple, cls: type = node._forward_cls) -> None:
                if any(g is not None and g.is_floating_point() and not g.requires_grad for g in inputs):
                    cut.add(cls)

            node.register_hook(look)
        with suppress(Exception):  # the verdict holds the error
            derivatives(value, leaves, create_graph=True)
    classes = list(dict.fromkeys(node._forward_cls for node in nodes))
    calls: dict[str, Call] = {}
    originals = {cls: inspect.getattr_static(cls, "forward") for cls in classes}
    own = {cls: "forward" in vars(cls) for cls in classes}

    def watched(cls: Any, forward: Any) -> Any:
        with_ctx = cls.setup_context is torch.autograd.Function.setup_context

        def record(*args: Any) -> Any:
            inputs, spec = tree_flatten((args[1:] if with_ctx else args, {}))
            flows = [i for i, x in enumerate(inputs) if isinstance(x, Tensor) and x.requires_grad]
            call = Call(place.call.path, place.call.module, cls.apply, [copied(x) for x in inputs], spec, flows)
            call.active, call.state = [True] * len(flows), place.call.state
            calls.setdefault(str((cls, [getattr(x, "shape", None) for x in inputs], flows)), call)
            return forward(*args)

        return staticmethod(record)

    try:
        for cls in classes:
            cls.forward = watched(cls, cls.forward)
        with place.scalar([t.detach().requires_grad_() for t in place.z]):
            pass
    finally:
        for cls in classes:
            if own[cls]:
                cls.forward = originals[cls]
            else:
                del cls.forward
    return [call for call in calls.values() if call.flows], cut


def _forgets(place: Place) -> bool:
    """Returns whether the gradients that a Function's backward returns have no graph."""
    leaves = [t.detach().requires_grad_() for t in place.z]
    with place.scalar(leaves, linear=True) as value:
        grads = derivatives(value, leaves, create_graph=True)
    return not any(g is not None and g.requires_grad for g in grads)


def _of_function(place: Place, verdict: Verdict, cut: bool, sites: list[Site]) -> Problem:
    """Returns the problem of a Function's call; `cut` says that its backward was seen to return no graph."""
    cls: Any = place.call.function.__self__  # type: ignore[attr-defined]
    name = _pretty(cls.__name__)
    problem = Problem(place.call.path, name, "", "", "")
    within = ", ".join(f"{s.name} at {s}" for s in sites if s.function == "backward" and _defines(cls, s))
    seen = f" ({within})" if within else ""
    if isinstance(verdict.first, Exception):
        return _raising(problem, verdict.first, "first")
    if verdict.wrong("first"):
        return _first_order(problem, place, None, [])
    if verdict.wrong("reverse"):
        cut = cut or _forgets(place)
        once = getattr(cls.backward, "__code__", None) is not None and hasattr(cls.backward, "__wrapped__")
        if once and cut:
            why = "its backward is marked once_differentiable: what it returns has no graph, and no error is raised"
            return replace(problem, kind="once_differentiable", why=why, cure=_APPLY)
        if cut:
            why = f"its backward returns tensors without a graph, as a kernel of Triton, C++ or NumPy does{seen}"
            return replace(problem, kind="opaque backward", why=why, cure=_APPLY)
        why = "its backward can be differentiated, but its derivative is not the slope of what the backward returns"
        cure = "check it by torch.autograd.gradgradcheck: what its backward calls needs a correct backward itself"
        return replace(problem, kind="wrong double backward", why=why + seen, cure=cure)
    if verdict.impossible:
        return _raising(problem, verdict.reverse, "second")
    return _forward_mode(problem)


_APPLY = "let the backward call a Function that has a backward of its own, or write it in differentiable operations"


def _of_lines(place: Place, verdict: Verdict, sites: list[Site], undone: frozenset[Site] = frozenset()) -> Problem:
    """Returns the problem of a place where no Function is at fault: the lines that detach, or what raised."""
    problem = Problem(place.call.path, _kind_of(place.call), "", "", "")
    culprits = _culprits(place, verdict, sites, undone)
    if culprits:
        problem = replace(problem, op=" and ".join(f"{s.name} at {s}" for s in culprits), undo=frozenset(culprits))
    if isinstance(verdict.first, Exception):
        return _raising(problem, verdict.first, "first")
    if verdict.wrong("first"):
        return _first_order(problem, place, culprits, sites)
    if verdict.wrong("reverse"):
        if culprits:
            why = f"{problem.op} leaves the gradient right, but cuts what it depends on out of its graph"
            return replace(problem, kind="stop-gradient", why=why, cure=f"remove {problem.op}")
        why = "autograd's second derivative is not the slope of its gradient: an operation's or a hook's rule is wrong"
        cure = "check its operations one by one by torch.autograd.gradgradcheck, and without torch.func.vmap"
        return replace(problem, kind="wrong double backward", why=why, cure=cure)
    if verdict.impossible:
        return _raising(problem, verdict.reverse, "second")
    return _forward_mode(problem)


def _first_order(problem: Problem, place: Place, culprits: list[Site] | None, sites: list[Site]) -> Problem:
    """Returns the problem of a place whose gradient is not the slope: a surrogate, or something is detached."""
    claims, truths = _slopes_by_input(place)
    failing = [(c, t) for c, t in zip(claims, truths, strict=True) if abs(c - t) > 1e-4 * max(abs(c), abs(t))]
    if any(abs(t) <= 1e-4 * abs(c) for c, t in failing):
        why = (
            "its gradient is a surrogate, and so is the second order: the function is a staircase, whose slope is zero"
        )
        cure = "none, if that is intended; a smooth function, such as a soft maximum, has an exact meta-gradient"
        return replace(problem, kind="straight-through", why=why, cure=cure, order=1, undo=frozenset())
    if culprits:
        writes = any(s.writes for s in culprits)
        kind = "in-place write" if writes else "stop-gradient"
        what = "autograd does not see a write" if writes else "a value that depends on parameters becomes a constant"
        why = f"{problem.op}: {what}, and the gradient itself is wrong"
        cure = f"remove {problem.op}, unless the value is intended to be a constant"
        return replace(problem, kind=kind, why=why, cure=cure, order=1)
    if culprits is None and any(abs(c) <= 1e-12 * abs(t) for c, t in failing):
        why = "its backward gives no gradient, or zeros, to an input that its value depends on"
        return replace(problem, kind="stop-gradient", why=why, cure="return that gradient", order=1)
    if culprits is None:
        why = "its backward is not the derivative of its forward, on purpose or by mistake"
        cure = "none, if that is intended; else check it by torch.autograd.gradcheck"
        return replace(problem, kind="surrogate gradient", why=why, cure=cure, order=1)
    if sites:
        op = " and ".join(f"{s.name} at {s}" for s in sites[:3])
        why = f"its value depends on parameters or inputs in a way that autograd does not see: {op}"
        cure = "compute it by differentiable operations of tensors, without NumPy, lists, numbers or no_grad in between"
        return replace(problem, kind="stop-gradient", op=op, why=why, cure=cure, order=1)
    why = "the gradient is not the slope of the value: a hook changes it, or an operation's rule is wrong"
    cure = "none, if that is intended; else check its operations one by one by torch.autograd.gradcheck"
    return replace(problem, kind="surrogate gradient", why=why, cure=cure, order=1)


def _forward_mode(problem: Problem) -> Problem:
    why = "its forward-mode rule (jvp) is wrong: forward over reverse loses terms without an error"
    cure = "correct the jvp; mk.MAML notices, and takes its products reverse over reverse, at a higher cost"
    return replace(problem, kind=FORWARD_MODE, why=why, cure=cure)


def _raising(problem: Problem, error: Any, order: str) -> Problem:
    text = " ".join(str(error).split())
    known = re.search(r"derivative for (\S+) is not implemented", text)
    custom = re.search(r"backward through (\S+?)(\.default)? but no autograd formula", text)
    if known:
        problem = replace(problem, op=known[1].strip("'"))
    if custom:
        why, cure = "it is a custom op without an autograd formula", "add one by torch.library.register_autograd"
        return replace(problem, op=custom[1], kind="no formula", why=why, cure=cure)
    why = f"its {order} derivative raises {type(error).__name__}: {text[:160]}"
    cure = "call mk.patch(model): it replaces PyTorch's fused kernels by ops that have it" if known else _APPLY
    return replace(problem, kind=f"no {order} derivative", why=why, cure=cure)


def _culprits(place: Place, verdict: Verdict, sites: list[Site], undone: frozenset[Site]) -> list[Site]:
    """Returns the lines that must not detach for the place to be exact: one if that is enough, else all that it takes.

    If the gradient itself is wrong, the place need only have the right gradient without them.
    """
    candidates = [s for s in sites if s.name in ("detach", "data", "item", "no_grad") and s not in undone]

    def cured(lines: list[Site]) -> bool:
        with Taps(undone.union(lines)).open():
            try:
                judged = place.judge()
            except Exception:  # the code needs the line to detach
                return False
        hides = verdict.wrong("first") and judged.first is not None
        return isinstance(judged.first, float) and not judged.wrong("first") if hides else judged.exact

    for site in candidates[:SITES]:
        if cured([site]):
            return [site]
    if len(candidates) < 2 or not cured(candidates):
        return []
    needed = list(candidates)
    for site in candidates[:SITES]:
        if cured([s for s in needed if s is not site]):
            needed.remove(site)
    return needed


def _slopes_by_input(place: Place) -> tuple[list[float], list[float]]:
    """Returns, for each input and parameter alone, the slope that the gradient claims and the one by differences."""

    def value(z: Tensors) -> Tensors:
        with place.scalar(z) as s:
            return [s.detach()]

    _, g = gradient(place.scalar, place.z)
    claims, truths = [], []
    for i, u in enumerate(direction(place.z, 20)):
        alone = [u if i == j else torch.zeros_like(t) for j, t in enumerate(place.z)]
        differences = Differences(value, place.z, alone, place.patient.precision)
        while differences.more():
            pass
        claims.append((g[i] * u).sum().item())
        truths.append(differences.best()[0][0].item())
    return claims, truths


def _graph(node: Any) -> Iterator[Any]:
    """Yields all nodes of the graph that ends at `node`."""
    seen, todo = set(), [node]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            todo += [n for n, _ in node.next_functions]


def _internal(file: str) -> bool:
    """Returns whether a file is part of the engine or of PyTorch's autograd, which detach only where they should."""
    return file.startswith((str(_SOURCES / "diagnosis"), str(_SOURCES / "meta"))) or "torch/autograd" in file


def _defines(cls: type, site: Site) -> bool:
    """Returns whether a line is in the definition of a class."""
    try:
        lines, start = inspect.getsourcelines(cls)
    except (OSError, TypeError):
        return False
    return site.file == inspect.getsourcefile(cls) and start <= site.line < start + len(lines)


def _pretty(name: str) -> str:
    return re.sub(r"^GeneratedBackwardFor_", "", name)


def _kind_of(call: Call) -> str:
    return getattr(call.function, "__name__", "loss") if call.root else type(call.module).__name__
