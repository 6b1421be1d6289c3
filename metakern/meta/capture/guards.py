"""Guards: they notice when something besides its tensors changes that a captured program depends on.

A program replays kernel calls without running Python. So whatever Python could have read while they were recorded must
be the same at each use. `Guards` walks once over everything that the model, the inner optimizer and the loss can reach:

    containers      dict, list, tuple, set, deque, and what they hold
    objects         attributes (config objects, dataclasses, modules with their training flags, hooks and children)
    functions       code, defaults, closures, and the globals and helpers that the code names
    tensors         identity, dtype and layout; values may change in place, since a program reads tensors at each use
    arrays          NumPy arrays and NumPy numbers, by value
    settings        PyTorch's modes and defaults, such as autocast

The walk builds flat lists, so that `Guards.hold` is a few loops in C: microseconds for a small model, about 0.2 ms for
twelve layers of a transformer. Attributes and methods of a user's class are guarded only if reached code names them, so
a counter that only the training loop reads invalidates nothing. Functions of PyTorch, NumPy and other libraries count
as constants; the attributes of their objects are guarded.

Some state can't be compared: iterators, the clock, random numbers outside of PyTorch, the environment, files. Where
reached code names such state, `Guards.obstacles` says so, and nothing is captured.
"""

from __future__ import annotations

import builtins
import copyreg
import dis
import logging
import sys
from array import array
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from contextvars import ContextVar
from enum import Enum
from functools import cached_property, lru_cache, partial
from itertools import chain, product, repeat
from operator import attrgetter, is_
from threading import local
from types import (
    BuiltinFunctionType,
    CellType,
    CodeType,
    FunctionType,
    MappingProxyType,
    MemberDescriptorType,
    MethodType,
    MethodWrapperType,
    ModuleType,
)
from typing import Any
from weakref import ReferenceType

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from metakern.ops.core import backend

MOST_OBJECTS = 200_000  # objects that a walk visits; with more, nothing is captured
MOST_BYTES = 2**20  # bytes of NumPy arrays, which are compared at each use; with more, nothing is captured
_MISSING = object()
_PLAIN = (bool, int, float, complex, str, bytes, type(None))
_CONSTANT = (Enum, torch.dtype, torch.device, torch.Size, torch.layout, torch.memory_format, range, slice)
_LIBRARIES = {*sys.stdlib_module_names, "torch", "torchvision", "torchaudio", "numpy", "scipy", "transformers"}
_LIBRARIES |= {"accelerate", "peft", "einops", "lightning", "pytorch_lightning", "metakern"}
_MODULE_STATE = (
    *("_parameters", "_buffers", "_modules", "_forward_hooks", "_forward_pre_hooks", "_backward_hooks"),
    "_backward_pre_hooks",
)
_GLOBAL_HOOKS = ("_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks")
# State that can't be compared: module -> names in it, or None for all of them.
_UNSEEN: dict[str, set[str] | None] = {
    **dict.fromkeys(("random", "_random", "time", "secrets", "uuid", "io", "_io", "socket", "tempfile", "subprocess")),
    **dict.fromkeys(("numpy.random", "glob", "fileinput", "posix", "nt", "genericpath", "ctypes", "_ctypes", "mmap")),
    **dict.fromkeys(("multiprocessing", "queue", "_queue", "sqlite3", "shelve", "urllib", "requests", "pickle")),
    "os": {"environ", "environb", "getenv", "getenvb", "_Environ", "urandom", "listdir", "scandir", "walk", "stat"}
    | {"getpid", "getcwd", "times", "getloadavg", "cpu_count"},
    "torch": {"load", "initial_seed", "seed", "get_rng_state", "get_num_threads"},
    "posixpath": {"exists", "isfile", "isdir", "getmtime", "getsize"},
    "datetime": {"now", "today", "utcnow"},
    "pathlib": {"open", "read_text", "read_bytes", "exists", "stat", "iterdir", "glob", "rglob", "is_file", "is_dir"},
    "numpy": {"random", "load", "loadtxt", "fromfile", "memmap", "genfromtxt", "geterr", "get_printoptions"},
    "sys": {"argv", "stdin", "_getframe", "modules", "getrecursionlimit"},
    "importlib": {"import_module", "reload"},
    "decimal": {"getcontext"},
    "warnings": {"filters"},
    "inspect": {"stack", "currentframe"},
}
_UNSEEN_BUILTINS = {"open", "input", "eval", "exec", "globals", "__import__"}
# Names by which code can choose attributes while running: where one occurs, any attribute may be read.
_BY_NAME = {"getattr", "vars", "dir", "__dict__", "attrgetter", "methodcaller"}
# Methods of a user's class that do not run within a call of its instance.
_NOT_RUN = {"__init__", "__new__", "__init_subclass__", "__post_init__", "__repr__", "__str__", "__del__", "__copy__"}
_NOT_RUN |= {"__getstate__", "__setstate__", "__reduce__", "__reduce_ex__", "__deepcopy__", "__replace__"}
# Modules whose classes in C have no state that changes. Objects of other classes in C are an obstacle.
_UNCHANGING = {"builtins", "re", "torch", "numpy", "operator", "functools", "decimal", "datetime", "types", "typing"}
_UNCHANGING |= {"_thread", "threading", "abc", "_abc", "weakref", "logging", "collections", "_collections"}
_OF_FUNCTION = attrgetter("__code__", "__defaults__", "__kwdefaults__")
_saved_tensors_hooks: Any = torch._C._autograd._top_saved_tensors_default_hooks
_OF_CELL = attrgetter("cell_contents")
_PRECISIONS = [("generic", "all"), *product(("mkldnn", "cuda"), ("all", "matmul", "conv", "rnn"))]
# Switches of PyTorch's backends, as `_get_NAME` of torch._C. Releases differ in which there are. Those of TF32 are
# among the precisions: the older ones raise an error where the newer ones are used too.
_SWITCHES = [
    getter
    for name in (
        *("cudnn_enabled", "cudnn_benchmark", "cudnn_deterministic", "mkldnn_enabled", "mkldnn_deterministic"),
        *("nnpack_enabled", "miopen_immediate", "qengine", "deterministic_fill_uninitialized_memory"),
        *("blas_preferred_backend", "linalg_preferred_backend", "rocm_fa_preferred_backend", "sdp_priority_order"),
        *("flash_sdp_enabled", "mem_efficient_sdp_enabled", "math_sdp_enabled", "cudnn_sdp_enabled"),
        *("overrideable_sdp_enabled", "math_sdp_allow_fp16_bf16_reduction", "cublas_allow_fp16_accumulation"),
        *("cublas_allow_bf16_reduced_precision_reduction", "cublas_allow_fp16_reduced_precision_reduction"),
        "cpu_allow_fp16_reduced_precision_reduction",
    )
    if (getter := getattr(torch._C, f"_get_{name}", None)) is not None
]


def settings() -> tuple:
    """Return the backend and PyTorch's modes, switches and defaults, which all code depends on."""
    return (
        backend.chosen(),
        torch.get_default_dtype(),
        torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu"),
        torch.is_autocast_cache_enabled(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_anomaly_enabled(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.backends.mha.get_fastpath_enabled(),
        *(torch._C._get_fp32_precision_getter(*of) for of in _PRECISIONS),
        *(switch() for switch in _SWITCHES),
        *map(id, _get_current_function_mode_stack()),
        *map(id, _get_current_dispatch_mode_stack()),
        *map(id, _saved_tensors_hooks(False) or ()),
    )


class Guards:
    """A snapshot of everything that `roots` (by name) can reach, to be compared later.

    Attributes:
        obstacles: Why nothing may be captured, one line each: reachable state that can't be compared.
        signature: A value that is equal for equal states, whatever objects they consist of.
    """

    def __init__(self, roots: Mapping[str, Any]) -> None:
        self.obstacles: list[str] = []
        # What is compared, each with its path from a root:
        self.tensors: dict[int, tuple[Tensor, str]] = {}  # by id
        self.containers: list[tuple[Any, str]] = []  # all their items
        self.entries: list[tuple[dict, Any, str]] = []  # one key of a dictionary
        self.objects: list[tuple[Any, str]] = []  # their classes
        self.functions: list[tuple[FunctionType, str]] = []
        self.cells: list[tuple[CellType, str]] = []
        self.getters: list[tuple[Callable[[], Any], str]] = []
        self.arrays: list[tuple[np.ndarray, tuple, str]] = []
        self._settings = settings()
        walk = _Walk(self)
        walk.run(roots)
        self._kept = walk.kept
        self.signature = (self._settings, *walk.signature)
        self._views = [view for container, _ in self.containers for view in _views(container)]
        self._dicts, self._keys = [d for d, _, _ in self.entries], [key for _, key, _ in self.entries]
        self._each = {
            kind: [x for x, _ in getattr(self, kind)] for kind in ("objects", "functions", "cells", "getters")
        }
        self._tensors = [t for t, _ in self.tensors.values()]
        self._remember()

    def _remember(self) -> None:
        self._lengths = list(map(len, self._views))
        self._values = list(self._now())
        self._layouts = list(map(_layout, self._tensors))

    def _now(self) -> Iterator[Any]:
        return chain(
            chain.from_iterable(self._views),
            map(dict.get, self._dicts, self._keys, repeat(_MISSING)),
            map(type, self._each["objects"]),
            chain.from_iterable(map(_OF_FUNCTION, self._each["functions"])),
            map(_OF_CELL, self._each["cells"]),
            (get() for get in self._each["getters"]),
        )

    def hold(self) -> bool:
        """Whether nothing has changed."""
        if settings() != self._settings or list(map(len, self._views)) != self._lengths:
            return False
        try:
            if not all(map(is_, self._now(), self._values)):
                if self.changes():
                    return False
                self._remember()  # equal values in other objects
        except ValueError:  # a variable of a closure is unset now
            return False
        return list(map(_layout, self._tensors)) == self._layouts and all(
            _contents(array) == contents for array, contents, _ in self.arrays
        )

    def changes(self) -> list[str]:
        """Return the paths to what has changed."""
        found = ["PyTorch's settings"] * (settings() != self._settings)
        if list(map(len, self._views)) == self._lengths:
            pairs = zip(self._paths(), self._now(), self._values, strict=True)
            found += [path for path, new, old in pairs if not _same(new, old)]
        else:
            paths = (path for container, path in self.containers for _ in _views(container))
            lengths = zip(paths, self._views, self._lengths, strict=True)
            found += [path for path, view, length in lengths if len(view) != length]
        tensors = zip(self.tensors.values(), self._layouts, strict=True)
        found += [path for (t, path), old in tensors if _layout(t) != old]
        found += [path for array, old, path in self.arrays if _contents(array) != old]
        return list(dict.fromkeys(found))

    def _paths(self) -> Iterator[str]:
        for container, path in self.containers:
            for view in _views(container):
                yield from (f"{path}{key}" for key in _keys(container)[: len(view)])
        yield from (path for *_, path in self.entries)
        yield from (f"{path}'s class" for _, path in self.objects)
        for _, path in self.functions:
            yield from (f"{path}'s code", f"{path}'s defaults", f"{path}'s defaults")
        yield from (path for _, path in (*self.cells, *self.getters))

    def restore(self) -> None:
        """Undo what a run changed whose results are not used: items, attributes and variables, but no tensor values."""
        start = 0
        lengths = iter(self._lengths)
        for container, _ in self.containers:
            parts = []
            for view in _views(container):
                length = next(lengths)
                parts.append(self._values[start : start + length])
                changed = len(view) != length or not all(map(is_, view, parts[-1]))
                start += length
                if changed and isinstance(container, list):
                    container[:] = parts[-1]
                elif changed and isinstance(container, set | deque):
                    container.clear()
                    (container.update if isinstance(container, set) else container.extend)(parts[-1])
                elif changed and isinstance(container, dict) and len(parts) == 2:
                    kind = OrderedDict if isinstance(container, OrderedDict) else dict
                    kind.clear(container)
                    kind.update(container, zip(*parts, strict=True))
        for (d, key, _), value in zip(self.entries, self._values[start:], strict=False):
            if d.get(key, _MISSING) is not value:
                d.pop(key) if value is _MISSING else d.__setitem__(key, value)
        start += len(self.entries) + len(self.objects) + 3 * len(self.functions)
        for (cell, _), value in zip(self.cells, self._values[start:], strict=False):
            cell.cell_contents = value


class _Walk:
    """Visits everything reachable, breadth first. Attributes and methods of a user's class wait until code names them.

    It fills the lists of `guards` and the signature. `kept` holds the visited objects, so that their ids stay valid.
    """

    def __init__(self, guards: Guards) -> None:
        self.guards, self.signature, self.kept = guards, list[Any](), list[Any]()
        self._queue: deque[tuple[Any, str]] = deque()
        self._seen: dict[int, str] = {}
        self._named = {"forward", "__call__", "training"}
        self._everything = False
        self._waiting: dict[str, list[Callable[[], None]]] = {}
        self._unseen: dict[str, list[str]] = {}  # name -> paths that become obstacles once code has that name
        self._stored: set[str] = set()  # attributes that reached code sets
        self._entered: set[tuple[int, Any]] = set()
        self._bytes = 0

    def run(self, roots: Mapping[str, Any]) -> None:
        self._queue.extend((root, name) for name, root in roots.items())
        self._queue.extend((getattr(torch_module, name), f"torch's {name}") for name in _GLOBAL_HOOKS)
        while self._queue:
            self._visit(*self._queue.popleft())
            if len(self._seen) > MOST_OBJECTS:
                self._obstacle("the model and the loss", f"reach more than {MOST_OBJECTS} objects")
                return

    def _obstacle(self, path: str, why: str) -> None:
        self.guards.obstacles.append(f"{path} {why}")

    def _name(self, names: Iterable[str]) -> None:
        """Note names that occur in reached code; visit what waited for them."""
        for name in names:
            if name not in self._named:
                self._named.add(name)
                for act in self._waiting.pop(name, ()):
                    act()
                for path in self._unseen.pop(name, ()):
                    self._obstacle(path, f"({name}) is state that no guard can see")
        if not self._everything and _BY_NAME & self._named:
            self._everything = True
            for acts in [*self._waiting.values()]:
                for act in acts:
                    act()
            self._waiting.clear()

    def _when_named(self, name: str, act: Callable[[], None]) -> None:
        if self._everything or name in self._named:
            act()
        else:
            self._waiting.setdefault(name, []).append(act)

    def _check_unseen(self, module: str, path: str, own: str | None = None, names: Iterable[str] | None = None) -> bool:
        """Add obstacles for state of a module that no guard can see.

        `own` is a function or class of the module that was reached, `names` the names that reached code uses. Returns
        True if the module or `own` is not to be visited further.
        """
        module = next((name for name in ("numpy.random", "pathlib") if module.startswith(name)), module)
        unseen = _UNSEEN[module] if module in _UNSEEN else _UNSEEN.get(module.partition(".")[0], set()) and set()
        if unseen is None or own in unseen:
            self._obstacle(path, f"({module}) is state that no guard can see")
            return True
        if names is not None:
            for name in unseen.intersection(names):
                self._obstacle(f"{path}.{name}", "is state that no guard can see")
        elif module in ("datetime", "pathlib"):
            for name in unseen:
                if name in self._named:
                    self._obstacle(path, f"({name}) is state that no guard can see")
                else:
                    self._unseen.setdefault(name, []).append(path)
            return own is not None
        return False

    def _visit(self, value: Any, path: str) -> None:
        kind = type(value)
        if is_frozen(value):
            self.signature.append((path, frozen(value)))
            return
        before = self._seen.get(id(value))
        if before is not None:
            self.signature.append((path, before))
            return
        self._seen[id(value)] = path
        self.kept.append(value)
        identity: Any = kind
        if isinstance(value, int | float | complex | str | bytes):
            identity = kind, repr(value)
            self._object(value, path)
        elif isinstance(value, bytearray | array):
            identity = self._array(np.frombuffer(value, np.uint8), path)
        elif kind.__module__.startswith("metakern.meta") and not isinstance(value, nn.Module):
            identity = id(value)  # plans and programs, which no recorded code reads
        elif isinstance(value, Tensor):
            if kind not in (Tensor, nn.Parameter):
                self._class(kind, instance=True)
            self.guards.tensors[id(value)] = value, path
            identity = id(value), _layout(value)
            if getattr(value, "__dict__", None):
                self._container(value.__dict__, path)
        elif isinstance(value, np.ndarray):
            identity = self._array(value, path)
        elif isinstance(value, FunctionType):
            identity = self._function(value, path)
        elif isinstance(value, type):
            identity = id(value)
            if not self._check_unseen(value.__module__, path, value.__name__):
                self._class(value, instance=False)
                if kind is not type:
                    self._class(kind, instance=True)
        elif isinstance(value, ModuleType):
            identity = id(value)
            self._module(value, path, None)
        elif isinstance(value, MethodType):
            self._queue.extend(((value.__func__, path), (value.__self__, f"{path}.__self__")))
        elif isinstance(value, BuiltinFunctionType | MethodWrapperType):
            owner = getattr(value, "__self__", None)
            if owner is None or isinstance(owner, ModuleType):
                identity = id(value)
                self._check_unseen(value.__module__ or "", path, value.__name__)
            else:
                identity = kind, value.__name__
                self._queue.append((owner, f"{path}.__self__"))
        elif isinstance(value, partial):
            self._queue.append((value.func, path))
            self._container(value.args, f"{path}.args")
            self._container(value.keywords, f"{path}.keywords")
        elif isinstance(value, property | cached_property | staticmethod | classmethod):
            of = {property: "fget", cached_property: "func"}.get(kind, "__func__")
            self._queue.append((getattr(value, of, None), path))
        elif isinstance(value, ReferenceType):
            self.guards.getters.append((value, path))
            self._queue.append((value(), path))
        elif isinstance(value, torch.Generator | ContextVar | local):
            self._obstacle(path, f"(a {kind.__name__}) is nothing that a guard can see")
        elif self._check_unseen(kind.__module__, path, kind.__name__):
            identity = kind, repr(value)  # a path or a date, which never changes
        elif isinstance(value, dict | list | tuple | set | frozenset | deque | MappingProxyType):
            self._container(value, path)
            if not _is_library(kind) or _attributes(value):
                self._object(value, path)
        elif isinstance(value, logging.Logger):
            identity = id(value)
            for state in (value.getEffectiveLevel, partial(getattr, value, "disabled")):
                self.guards.getters.append((state, path))
                self.signature.append((path, state()))
        elif hasattr(kind, "__next__") and _is_library(kind):
            self._obstacle(path, f"(a {kind.__name__}) is an iterator: no guard can see its position")
        elif _attributes(value) is not None or any(vars(c).get("__slots__") for c in kind.__mro__):
            self._object(value, path)
        elif kind.__module__.partition(".")[0] in _UNCHANGING and not isinstance(value, memoryview):
            identity = id(value)  # for example a compiled regular expression
        else:
            self._obstacle(path, f"(a {kind.__name__}) keeps its state where no guard can see it")
        self.signature.append((path, identity))

    def _array(self, value: np.ndarray, path: str) -> Any:
        self._bytes += value.nbytes
        if value.dtype.hasobject or self._bytes > MOST_BYTES:
            self._obstacle(path, f"(a NumPy array of {value.dtype} {value.shape}) is more than a guard can compare")
            return None
        contents = _contents(value)
        self.guards.arrays.append((value, contents, path))
        return contents

    def _container(self, value: Any, path: str) -> None:
        self.guards.containers.append((value, path))
        items = value.values() if isinstance(value, Mapping) else value
        keys = tuple(value.keys()) if isinstance(value, Mapping) else ()
        self.signature.append((path, tuple(frozen(key) if type(key) in _PLAIN else id(key) for key in keys)))
        if isinstance(value, set | frozenset) and all(type(item) in _PLAIN for item in value):
            self.signature.append((path, frozenset(map(frozen, value))))
        else:
            self._queue.extend((item, f"{path}{key}") for key, item in zip(_keys(value), items, strict=True))

    def _entry(self, holder: dict, key: Any, path: str) -> None:
        if (id(holder), key) not in self._entered:
            self._entered.add((id(holder), key))
            self.guards.entries.append((holder, key, path))
            if key in self._stored and isinstance(holder.get(key), Tensor):
                self.guards.getters.append((partial(_stored, holder, key), path))
                self.signature.append((path, Tensor))
                self.guards.entries.pop()
            elif key in holder:
                self._queue.append((holder[key], path))
            else:
                self.signature.append((path, None))

    def _object(self, value: Any, path: str) -> None:
        """Visit the class and attributes of an object.

        A library's code may read any attribute of its objects; a user's code reads those that it names.
        """
        kind, attributes = type(value), _attributes(value)
        self.guards.objects.append((value, path))
        self.signature.append((path, id(kind)))
        by_name = _is_by_name(kind)
        self._class(kind, instance=True)
        if attributes is not None:
            views = attributes.keys(), attributes.values()
            if isinstance(value, nn.Module):
                self.signature.append((path, tuple(k for k in attributes if k not in _REST_OF_MODULES)))
                self.guards.containers.append((_View(views[0]), path))
                for key in ("training", *_MODULE_STATE):
                    self._entry(attributes, key, f"{path}.{key}" if key == "training" else path)
                keys = [k for k in attributes if k not in _REST_OF_MODULES]
            else:
                self.guards.containers.append((_View(views[0]), path))
                keys = [*attributes]
                self.signature.append((path, tuple(keys)))
            for key in keys:
                enter = partial(self._entry, attributes, key, f"{path}.{key}")
                self._when_named(key, enter) if by_name else enter()
        for c in kind.__mro__:
            for name, slot in vars(c).items():
                if isinstance(slot, MemberDescriptorType):
                    get = partial(_slot, slot, value)
                    if _is_library(c) and type(get()) not in _PLAIN:
                        continue
                    self.guards.getters.append((get, f"{path}.{name}"))
                    self._queue.append((get(), f"{path}.{name}"))

    def _class(self, kind: type, instance: bool) -> None:
        """Visit the user's classes among the bases of a class: the methods and attributes that reached code names."""
        by_name = _is_by_name(kind)
        for c in kind.__mro__:
            if (id(c), instance) in self._entered:
                continue
            self._entered.add((id(c), instance))
            self.kept.append(c)
            if _is_library(c):
                if "forward" in vars(c):
                    self.guards.getters.append((partial(vars(c).get, "forward"), f"{c.__qualname__}.forward"))
                    self.signature.append((c.__qualname__, id(vars(c)["forward"])))
                continue
            with suppress(Exception):  # a metaclass may refuse the question
                copyreg._slotnames(c)  # type: ignore[attr-defined]  # the first copy of an instance would add it
            self.guards.containers.append((vars(c), f"{c.__qualname__}."))
            for name, value in vars(c).items():
                visit = partial(self._queue.append, (value, f"{c.__qualname__}.{name}"))
                if _is_dunder(name):
                    is_run = name not in _NOT_RUN or not instance
                    if is_run and isinstance(value, FunctionType | staticmethod | classmethod | property):
                        visit()
                elif not isinstance(value, MemberDescriptorType):
                    self._when_named(name, visit) if by_name else visit()

    def _module(self, module: ModuleType, path: str, names: frozenset[str] | None) -> None:
        """Visit the attributes of a module that occur among the names of the code which uses the module."""
        if self._check_unseen(module.__name__, path, names=names):
            return
        attributes, library = vars(module), _is_library_name(module.__name__)
        self.kept.append(module)
        if names is None:
            for key in () if library else [*attributes]:
                self._when_named(key, partial(self._entry, attributes, key, f"{path}.{key}"))
            return
        for key in sorted((names | {"__getattr__"}) & attributes.keys()):
            value = attributes[key]
            if isinstance(value, ModuleType):
                if (id(value), names) not in self._entered:
                    self._entered.add((id(value), names))
                    self._module(value, f"{path}.{key}", names)
            elif not library or isinstance(value, (FunctionType, BuiltinFunctionType, type, *_PLAIN)):
                self._entry(attributes, key, f"{path}.{key}")

    def _function(self, function: FunctionType, path: str) -> Any:
        library = _is_library_name(function.__globals__.get("__name__") or "")
        if library and self._check_unseen(function.__module__ or "", path, function.__name__):
            return None
        if not library:
            self.guards.functions.append((function, path))
            for values in (function.__defaults__, function.__kwdefaults__):
                if values is not None:
                    self._queue.append((values, f"{path}'s defaults"))
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            try:
                contents = cell.cell_contents
            except ValueError:  # a variable that is not set yet
                continue
            self.guards.cells.append((cell, name))
            self._queue.append((contents, name))
        if vars(function):
            self._container(vars(function), f"{path}.")
        if not library:
            self._code(function.__code__, function.__globals__)
        return id(function) if library and not function.__closure__ else function.__code__

    def _code(self, code: CodeType, globals_: dict[str, Any]) -> None:
        names, loaded, imported, stored = _names_of(code)
        self._stored |= stored
        self._name(names)
        for name in loaded:
            value = globals_.get(name, _MISSING)
            if value is _MISSING and name in _UNSEEN_BUILTINS and hasattr(builtins, name):
                self._obstacle(
                    f"{code.co_qualname if hasattr(code, 'co_qualname') else code.co_name}", f"calls {name}()"
                )
            known = vars(builtins).get(name)
            if value is _MISSING and not isinstance(known, BuiltinFunctionType | type | None):
                self._entry(vars(builtins), name, name)  # a user's own builtin
            elif isinstance(value, ModuleType):
                if (id(globals_), name) not in self._entered:
                    self._entered.add((id(globals_), name))
                    self.guards.entries.append((globals_, name, name))
                    self.signature.append((name, id(value)))
                self._module(value, name, names)
            else:
                self._entry(globals_, name, name)
        for name in imported:
            if name in sys.modules:
                self._module(sys.modules[name], name, names)


class _View:
    """The keys of an object's attributes, guarded without their values."""

    def __init__(self, keys: Collection[str]) -> None:
        self.keys = keys


@lru_cache(maxsize=4096)
def _names_of(code: CodeType) -> tuple[frozenset[str], ...]:
    """Return the names in a function's code, including the functions within it, as four sets.

    These are all names (with strings that could be names), the globals, the imported modules, and the attributes that
    it sets.
    """
    names, loaded, imported, stored = set(code.co_names), set[str](), set[str](), set[str]()
    by_operation = {"LOAD_GLOBAL": loaded, "LOAD_NAME": loaded, "STORE_GLOBAL": loaded, "IMPORT_NAME": imported}
    by_operation["STORE_ATTR"] = stored
    for instruction in dis.get_instructions(code):
        if instruction.opname in by_operation:
            by_operation[instruction.opname].add(instruction.argval)
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            for group, more in zip((names, loaded, imported, stored), _names_of(constant), strict=True):
                group |= more
        elif isinstance(constant, str) and constant.isidentifier():
            names.add(constant)
    return frozenset(names), frozenset(loaded), frozenset(imported), frozenset(stored)


def is_frozen(value: Any) -> bool:
    return type(value) in _PLAIN or isinstance(value, (*_CONSTANT, np.generic))


def frozen(value: Any) -> Any:
    """Return a hashable stand-in that is equal for the same value of the same type; 0.0 is not -0.0, and NaN is NaN."""
    if isinstance(value, float):
        return type(value), value.hex()
    if isinstance(value, np.generic):
        return value.dtype.str, value.tobytes()
    if isinstance(value, complex | slice):
        return type(value), repr(value)
    return type(value), value


def _same(new: Any, old: Any) -> bool:
    if new is old:
        return True
    if type(new) is not type(old):
        return False
    if is_frozen(new):
        return frozen(new) == frozen(old)
    return isinstance(new, CodeType) and new == old


def _layout(t: Tensor) -> tuple:
    return t.dtype, t.shape, t.stride() if t.layout is torch.strided else t.layout, t.requires_grad


def _contents(array: np.ndarray) -> tuple:
    return array.dtype.str, array.shape, array.tobytes()


def _views(container: Any) -> tuple[Any, ...]:
    if isinstance(container, _View):
        return (container.keys,)
    if isinstance(container, OrderedDict):  # which has an order of its own
        return OrderedDict.keys(container), OrderedDict.values(container)
    if isinstance(container, dict):
        return dict.keys(container), dict.values(container)
    return (container.keys(), container.values()) if isinstance(container, Mapping) else (container,)


def _keys(container: Any) -> list[str]:
    if isinstance(container, _View):
        return [f".{key}" for key in container.keys]
    if isinstance(container, Mapping):
        return [f"[{key!r}]" if type(key) in _PLAIN else "[…]" for key in container]
    return [f"[{i}]" for i in range(len(container))]


def _attributes(value: Any) -> dict[str, Any] | None:
    try:
        found = object.__getattribute__(value, "__dict__")
    except AttributeError:
        return None
    return found if isinstance(found, dict) else None


def _stored(holder: dict[str, Any], key: str) -> Any:
    """Return the value of an attribute that a run may set, or Tensor for any tensor.

    Which tensor it is need not be guarded: a program that reads it before it sets it is refused.
    """
    value = holder.get(key, _MISSING)
    return Tensor if isinstance(value, Tensor) else value


def _slot(slot: Any, value: Any) -> Any:
    try:
        return slot.__get__(value)
    except AttributeError:
        return _MISSING


def _is_by_name(kind: type) -> bool:
    """Whether a class derives from users' classes and nn.Module alone: then only code that names an attribute reads it.

    A class that derives from another class of a library may have any attribute read by that library.
    """
    known = (object, nn.Module)
    return all(not _is_library(c) or c in known or c.__module__ in ("abc", "typing") for c in kind.__mro__)


def _is_dunder(name: str) -> bool:
    return name.startswith("__") and name.endswith("__")


def _is_library(kind: type) -> bool:
    return _is_library_name(kind.__module__ or "")


def _is_library_name(module: str) -> bool:
    return module.partition(".")[0] in _LIBRARIES


# Attributes of every module, visited separately or not at all, and a recurrent layer's second list of its parameters.
_REST_OF_MODULES = frozenset({*vars(nn.Module()), "_flat_weights", "_flat_weight_refs"})
