"""Guards: whatever changes between two calls of a captured MAML, the results are those of plain autograd.

Each case in `CASES` is a model, a loss, a change of something that they read, and the way to undo it.
"""

from __future__ import annotations

import array
import builtins
import datetime
import decimal
import enum
import functools
import itertools
import logging
import os
import random
import re
import sys
import threading
import time
import types
import warnings
import weakref
from collections import OrderedDict, UserDict, defaultdict, deque, namedtuple
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from models import assert_equal, gradients, plain_loss, points, sgd
from torch import Tensor, nn

import metakern as mk
from metakern.meta import capture
from metakern.meta.capture.guards import Guards, settings

Change = Callable[[], Any]
Case = Callable[[], tuple[nn.Module, Any, Change, Change]]
CASES: dict[str, Case] = {}


def case(function: Case) -> Case:
    """Register a case by its function's name."""
    CASES[function.__name__] = function
    return function


class Net(nn.Module):
    """A linear layer whose output is multiplied by `factor()`."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(5, 3).double()
        for name, value in attributes.items():
            setattr(self, name, value)

    def factor(self) -> Any:
        return 1.0

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(x)) * self.factor()


def error(model: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
    return (model(batch[0]) - batch[1]).square().mean()


def with_factor(factor: Callable[[Any], Any], **attributes: Any) -> Net:
    """Return a model of a new class with this method `factor`, and with these attributes."""
    return type("Made", (Net,), {"factor": factor, "__module__": __name__})(**attributes)


def times(factor: Callable[[], Any]) -> Any:
    """Return the squared error times `factor()`, as a loss."""
    return lambda model, batch: error(model, batch) * factor()


def setting(holder: Any, name: str, value: Any) -> tuple[Change, Change]:
    """Return functions that set an attribute and restore it."""
    before = getattr(holder, name)
    return (lambda: setattr(holder, name, value)), (lambda: setattr(holder, name, before))


def item(holder: Any, key: Any, value: Any) -> tuple[Change, Change]:
    """Return functions that set an item and restore it."""
    before = holder[key]
    return (lambda: holder.__setitem__(key, value)), (lambda: holder.__setitem__(key, before))


@case
def a_list_in_a_dictionary() -> Any:
    model = with_factor(lambda self: self.settings["factors"][1], settings={"factors": [0, 1.0]})
    return model, error, *item(model.settings["factors"], 1, 3.0)


@case
def a_dictionary_entry_is_added() -> Any:
    model = with_factor(lambda self: self.settings.get("factor", 1.0), settings={"other": 1})
    return model, error, lambda: model.settings.update(factor=3.0), lambda: model.settings.pop("factor")


@case
def a_list_grows() -> Any:
    model = with_factor(lambda self: sum(self.terms), terms=[1.0])
    return model, error, lambda: model.terms.append(2.0), lambda: model.terms.pop()


@case
def a_set_grows() -> Any:
    flags = {"a"}
    return Net(), times(lambda: 3.0 if "b" in flags else 1.0), lambda: flags.add("b"), lambda: flags.remove("b")


@case
def a_tuple_is_replaced() -> Any:
    model = with_factor(lambda self: self.betas[0], betas=(1.0, 2.0))
    return model, error, *setting(model, "betas", (3.0, 2.0))


@case
def containers_of_the_library() -> Any:
    queue, ordered, default, user = deque([1.0]), OrderedDict(a=1.0), defaultdict(float, a=1.0), UserDict(a=1.0)
    loss = times(lambda: queue[0] * ordered["a"] * default["a"] * user["a"])

    def change(value: float) -> Change:
        def act() -> None:
            queue[0] = value
            ordered["a"] = default["a"] = user["a"] = value

        return act

    return Net(), loss, change(2.0), change(1.0)


@dataclass
class Settings:
    factor: float = 1.0
    inner: dict = field(default_factory=dict)


class Slots:
    __slots__ = ("factor",)

    def __init__(self) -> None:
        self.factor = 1.0


class Space:
    factor = 1.0
    unused = 1.0

    @property
    def computed(self) -> float:
        return self.factor * 1.0

    @staticmethod
    def static() -> float:
        return GLOBAL

    @classmethod
    def of_class(cls) -> float:
        return cls.factor


class Forwarding:
    """Computes its attributes in `__getattr__`."""

    def __init__(self, **values: float) -> None:
        self._values = values

    def __getattr__(self, name: str) -> float:
        return self._values[name] * 1.0


class Level(enum.Enum):
    LOW = 1.0
    HIGH = 3.0


GLOBAL = 1.0
TABLE = {"factor": [1.0]}
Pair = namedtuple("Pair", "a b")


def helper() -> float:
    return GLOBAL


def helper_of_helper() -> float:
    return (lambda: sum(helper() for _ in range(1)))()


@case
def a_dataclass() -> Any:
    model = with_factor(lambda self: self.config.factor, config=Settings())
    return model, error, *setting(model.config, "factor", 3.0)


@case
def an_object_is_replaced() -> Any:
    model = with_factor(lambda self: self.config.factor, config=Settings())
    return model, error, *setting(model, "config", Settings(3.0))


@case
def slots() -> Any:
    config = Slots()
    return Net(), times(lambda: config.factor), *setting(config, "factor", 3.0)


@case
def a_namespace_a_named_tuple_an_enum() -> Any:
    space = types.SimpleNamespace(pair=Pair(1.0, 2.0), level=Level.LOW)

    def change(pair: Any, level: Level) -> Change:
        return lambda: vars(space).update(pair=pair, level=level)

    loss = times(lambda: space.pair.a * space.level.value)
    return Net(), loss, change(Pair(3.0, 2.0), Level.HIGH), change(Pair(1.0, 2.0), Level.LOW)


@case
def an_attribute_of_a_class() -> Any:
    return Net(), times(lambda: Space.factor), *setting(Space, "factor", 3.0)


@case
def a_property_a_class_method() -> Any:
    space = Space()
    return Net(), times(lambda: space.computed * space.of_class()), *setting(Space, "factor", 3.0)


@case
def an_instance_hides_its_class() -> Any:
    space = Space()
    return Net(), times(lambda: space.factor), lambda: setattr(space, "factor", 3.0), lambda: delattr(space, "factor")


@case
def a_static_method() -> Any:
    return Net(), times(lambda: Space.static()), *item(globals(), "GLOBAL", 3.0)


@case
def an_attribute_that_is_computed() -> Any:
    forwarding = Forwarding(factor=1.0)
    return Net(), times(lambda: forwarding.factor), *item(forwarding._values, "factor", 3.0)


@case
def an_attribute_by_a_name_that_is_computed() -> Any:
    model = with_factor(lambda self: getattr(self, f"fact{'or'}_{1}"), factor_1=1.0)
    return model, error, *setting(model, "factor_1", 3.0)


@case
def a_method_by_a_name_that_is_computed() -> Any:
    model = with_factor(lambda self: getattr(self, f"hidden_{1}")())
    type(model).hidden_1 = lambda self: GLOBAL
    return model, error, *item(globals(), "GLOBAL", 3.0)


@case
def a_global() -> Any:
    return Net(), times(lambda: GLOBAL), *item(globals(), "GLOBAL", 3.0)


@case
def a_fraction_in_a_global() -> Any:
    """Of a class of the standard library, with slots."""
    globals()["HALF"] = Fraction(1, 2)
    return Net(), times(lambda: float(HALF)), *item(globals(), "HALF", Fraction(3, 2))  # type: ignore[name-defined]  # noqa: F821


@case
def the_order_of_an_ordered_dictionary() -> Any:
    ordered = OrderedDict(a=1.0, b=3.0)
    loss = times(lambda: next(iter(ordered.values())))
    return Net(), loss, lambda: ordered.move_to_end("a"), lambda: ordered.move_to_end("a", last=False)


@case
def the_level_of_a_logger() -> Any:
    logger = logging.getLogger("metakern.tests.level")
    loss = times(lambda: 3.0 if logger.isEnabledFor(logging.DEBUG) else 1.0)
    return Net(), loss, lambda: logger.setLevel(logging.DEBUG), lambda: logger.setLevel(logging.WARNING)


@case
def a_builtin_of_the_user() -> Any:
    vars(builtins)["FACTOR"] = 1.0
    loss = times(lambda: FACTOR)  # type: ignore[name-defined]  # noqa: F821
    return Net(), loss, *item(vars(builtins), "FACTOR", 3.0)


@case
def an_attribute_that_the_user_gave_to_a_library() -> Any:
    torch.factor = 1.0  # type: ignore[attr-defined]
    return Net(), times(lambda: torch.factor), *setting(torch, "factor", 3.0)  # type: ignore[attr-defined]


@case
def a_metaclass_that_answers_for_every_name() -> Any:
    class Meta(type):
        def __getattr__(cls, name: str) -> float:
            return {"factor": TABLE["factor"][0]}[name]

    class Config(metaclass=Meta):
        pass

    return Net(), times(lambda: Config.factor), *item(TABLE["factor"], 0, 3.0)


@case
def a_global_container() -> Any:
    return Net(), times(lambda: TABLE["factor"][0]), *item(TABLE["factor"], 0, 3.0)


@case
def a_helper_of_a_helper() -> Any:
    return Net(), times(helper_of_helper), *item(globals(), "GLOBAL", 3.0)


@case
def a_helper_is_replaced() -> Any:
    return Net(), times(lambda: helper()), *item(globals(), "helper", lambda: 3.0)


@case
def a_global_of_a_forward() -> Any:
    return with_factor(lambda self: GLOBAL), error, *item(globals(), "GLOBAL", 3.0)


@case
def a_module() -> Any:
    module = types.ModuleType("module_of_a_user")
    module.factor, module.inner = 1.0, types.ModuleType("module_of_a_user.inner")
    module.inner.factor = 1.0
    globals()["module_of_a_user"] = module
    loss = times(lambda: module_of_a_user.factor * module_of_a_user.inner.factor)  # noqa: F821
    return Net(), loss, *setting(module.inner, "factor", 3.0)


@case
def an_import_within_a_function() -> Any:
    sys.modules["imported_by_a_user"] = module = types.ModuleType("imported_by_a_user")
    module.factor = 1.0

    def factor() -> float:
        from imported_by_a_user import factor

        return factor

    return Net(), times(factor), *setting(module, "factor", 3.0)


@case
def a_default() -> Any:
    def loss(model: Any, batch: Any, weight: Any = (1.0,), *, scale: float = 1.0) -> Tensor:
        return error(model, batch) * weight[0] * scale

    return Net(), loss, *setting(loss, "__defaults__", ((3.0,),))


@case
def a_keyword_default() -> Any:
    def loss(model: Any, batch: Any, *, scale: float = 1.0) -> Tensor:
        return error(model, batch) * scale

    return Net(), loss, *setting(loss, "__kwdefaults__", {"scale": 3.0})


@case
def a_default_tensor() -> Any:
    def loss(model: Any, batch: Any, weight: Tensor = torch.ones(3).double()) -> Tensor:  # noqa: B008
        return ((model(batch[0]) - batch[1]).square() * weight).mean()

    return Net(), loss, *setting(loss, "__defaults__", (torch.tensor([0.1, 7.0, 1.0]).double(),))


@case
def the_code_of_a_function() -> Any:
    def loss(model: Any, batch: Any) -> Tensor:
        return error(model, batch)

    def other(model: Any, batch: Any) -> Tensor:
        return 3 * error(model, batch)

    return Net(), loss, *setting(loss, "__code__", other.__code__)


@case
def a_closure() -> Any:
    factor = 1.0

    def change(value: float) -> Change:
        def act() -> None:
            nonlocal factor
            factor = value

        return act

    return Net(), times(lambda: factor), change(3.0), change(1.0)


@case
def a_closure_of_a_closure() -> Any:
    scale = {"factor": 1.0}

    def wrap(function: Any) -> Any:
        @functools.wraps(function)
        def wrapped(*args: Any) -> Any:
            return function(*args) * scale["factor"]

        return wrapped

    return Net(), wrap(wrap(error)), *item(scale, "factor", 3.0)


@case
def a_partial() -> Any:
    def loss(scale: dict, model: Any, batch: Any, factor: list) -> Tensor:
        return error(model, batch) * scale["factor"] * factor[0]

    factor = [1.0]
    return Net(), functools.partial(loss, {"factor": 2.0}, factor=factor), *item(factor, 0, 3.0)


@case
def an_attribute_of_a_function() -> Any:
    def loss(model: Any, batch: Any) -> Tensor:
        return error(model, batch) * loss.factor

    loss.factor = 1.0
    return Net(), loss, *setting(loss, "factor", 3.0)


class Criterion:
    def __init__(self) -> None:
        self.weight, self.scale = torch.ones(3).double(), {"factor": 1.0}

    def __call__(self, model: Any, batch: Any) -> Tensor:
        return ((model(batch[0]) - batch[1]).square() * self.weight).mean() * self.scale["factor"]

    def method(self, model: Any, batch: Any) -> Tensor:
        return self(model, batch)


@case
def an_object_as_a_loss() -> Any:
    loss = Criterion()
    return Net(), loss, *setting(loss, "weight", torch.tensor([0.1, 7.0, 1.0]).double())


@case
def a_bound_method() -> Any:
    loss = Criterion()
    return Net(), loss.method, *item(loss.scale, "factor", 3.0)


@case
def a_method_of_a_class_is_replaced() -> Any:
    return Net(), Criterion(), *setting(Criterion, "__call__", lambda self, model, batch: 3 * error(model, batch))


@case
def a_loss_that_is_a_module() -> Any:
    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.criterion, self.factor = nn.MSELoss(), 1.0

        def forward(self, model: Any, batch: Any) -> Tensor:
            return self.criterion(model(batch[0]), batch[1]) * self.factor

    loss = Loss()
    return Net(), loss, *setting(loss.criterion, "reduction", "sum")


@case
def a_tensor_is_replaced() -> Any:
    model = with_factor(lambda self: self.mask, mask=torch.tensor([1.0, 2.0, 3.0]).double())
    return model, error, *setting(model, "mask", torch.tensor([3.0, 1.0, 1.0]).double())


@case
def a_tensor_in_a_list_is_replaced() -> Any:
    model = with_factor(lambda self: self.masks[0], masks=[torch.tensor([1.0, 2.0, 3.0]).double()])
    return model, error, *item(model.masks, 0, torch.tensor([3.0, 1.0, 1.0]).double())


@case
def a_tensor_changes_in_place() -> Any:
    mask = torch.tensor([1.0, 2.0, 3.0]).double()
    return Net(), times(lambda: mask.sum()), lambda: mask.mul_(3), lambda: mask.div_(3)


@case
def the_data_of_a_tensor_read_by_another_name() -> Any:
    mask = torch.tensor([1.0, 2.0, 3.0]).double()
    return Net(), times(lambda: mask.data.sum()), *setting(mask, "data", torch.tensor([5.0, 2.0, 3.0]).double())


@case
def an_attribute_of_a_tensor() -> Any:
    mask = torch.ones(())
    mask.factor = 1.0
    return Net(), times(lambda: mask.factor * mask), *setting(mask, "factor", 3.0)


@case
def numpy_numbers_and_arrays() -> Any:
    array, numbers = np.ones(2000), {"a": np.float64(1.0)}
    loss = times(lambda: float(array[600]) * float(numbers["a"]))
    return Net(), loss, *item(array, 600, 3.0)


@case
def a_numpy_number() -> Any:
    numbers = {"a": np.float32(1.0)}
    return Net(), times(lambda: float(numbers["a"])), *item(numbers, "a", np.float32(3.0))


@case
def an_array_that_becomes_a_tensor() -> Any:
    array = np.array([1.0, 2.0])
    return Net(), times(lambda: torch.from_numpy(array).sum()), *item(array, 0, 3.0)


@case
def numbers_that_become_a_tensor() -> Any:
    numbers = [1.0, 2.0]
    return Net(), times(lambda: torch.tensor(numbers, dtype=torch.float64).sum()), *item(numbers, 0, 3.0)


@case
def the_sign_of_zero() -> Any:
    zeros = [0.0]
    loss = times(lambda: 2.0 if np.signbit(zeros[0]) else 1.0)
    return Net(), loss, *item(zeros, 0, -0.0)


@case
def true_is_not_one() -> Any:
    flags = [1]
    return Net(), times(lambda: 2.0 if flags[0] is True else 1.0), *item(flags, 0, True)


@case
def the_order_of_layers() -> Any:
    class Ordered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b, self.c = (nn.Linear(5, n).double() for n in (5, 5, 3))
            self.order = [self.a, self.b]

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.order:
                x = torch.tanh(layer(x))
            return self.c(x)

    model = Ordered()
    return model, error, *setting(model, "order", [model.b, model.a])


@case
def an_activation() -> Any:
    model = with_factor(lambda self: self.act(torch.ones(())), act=torch.tanh)
    return model, error, *setting(model, "act", torch.sigmoid)


@case
def a_hook_reads_a_dictionary() -> Any:
    scale, model = {"factor": 1.0}, Net()
    model.linear.register_forward_hook(lambda module, args, output: output * scale["factor"])
    return model, error, *item(scale, "factor", 3.0)


@case
def a_hook_comes_and_goes() -> Any:
    model, handles = Net(), []

    def change() -> None:
        handles.append(model.linear.register_forward_pre_hook(lambda module, args: (args[0] * 3,)))

    return model, error, change, lambda: handles.pop().remove()


@case
def a_hook_of_all_modules() -> Any:
    handles: list[Any] = []

    def change() -> None:
        def hook(module: Any, args: Any, output: Tensor) -> Tensor:
            return output * 1.5 if isinstance(module, nn.Linear) else output

        handles.append(nn.modules.module.register_module_forward_hook(hook))

    return Net(), error, change, lambda: handles.pop().remove()


@case
def a_forward_on_an_instance() -> Any:
    model = Net()
    return model, error, lambda: setattr(model, "forward", lambda x: model.linear(x)), lambda: delattr(model, "forward")


@case
def a_forward_of_a_library_class() -> Any:
    forward = nn.Linear.forward
    return Net(), error, *setting(nn.Linear, "forward", lambda self, x: 3 * forward(self, x))


@case
def a_method_of_a_base_class() -> Any:
    model = with_factor(lambda self: super(type(self), self).factor() * 1.0)
    return model, error, *setting(Net, "factor", lambda self: 3.0)


@case
def a_parametrization() -> Any:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = 1.0

        def forward(self, x: Tensor) -> Tensor:
            return x * self.factor

    model, scale = Net(), Scale()
    nn.utils.parametrize.register_parametrization(model.linear, "weight", scale)
    return model, error, *setting(scale, "factor", 3.0)


@case
def the_mode_of_a_teacher() -> Any:
    class Teacher(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * (3.0 if self.training else 1.0)

    teacher = nn.Sequential(Teacher(), nn.Identity())
    loss = times(lambda: teacher(torch.ones(()).double()))
    return Net(), loss, teacher.eval, teacher.train


@case
def a_parameter_of_a_teacher_is_replaced() -> Any:
    teacher = nn.Linear(5, 3).double().requires_grad_(False)

    def loss(model: Any, batch: Any) -> Tensor:
        with torch.no_grad():
            target = teacher(batch[0])
        return (model(batch[0]) - target).square().mean()

    return Net(), loss, *setting(teacher, "weight", nn.Parameter(torch.ones(3, 5).double(), requires_grad=False))


@case
def a_weak_reference() -> Any:
    config = Settings()
    reference = weakref.ref(config)
    return Net(), times(lambda: reference().factor), *setting(config, "factor", 3.0)


@case
def a_lambda_in_a_container() -> Any:
    functions = {"factor": lambda: GLOBAL}
    return Net(), times(lambda: functions["factor"]()), *item(functions, "factor", lambda: 3.0)


@case
def a_decorated_teacher() -> Any:
    numbers = [1.0]

    @torch.no_grad()
    def factor() -> float:
        return numbers[0]

    return Net(), times(factor), *item(numbers, 0, 3.0)


@case
def a_cached_property() -> Any:
    class Config:
        factor = 1.0

        @functools.cached_property
        def cached(self) -> float:
            return self.factor

    config = Config()
    return (
        Net(),
        times(lambda: config.cached),
        lambda: vars(config).update(cached=3.0),
        lambda: vars(config).update(cached=1.0),
    )


@case
def the_default_dtype() -> Any:
    def loss(model: Any, batch: Any) -> Tensor:
        return error(model, batch) * (1 + torch.zeros(()).element_size())

    return Net(), loss, lambda: torch.set_default_dtype(torch.float64), lambda: torch.set_default_dtype(torch.float32)


@case
def deterministic_algorithms() -> Any:
    loss = times(lambda: 3.0 if torch.are_deterministic_algorithms_enabled() else 1.0)
    use = torch.use_deterministic_algorithms
    return Net(), loss, lambda: use(True), lambda: use(False)


@case
def a_switch_of_a_backend() -> Any:
    loss = times(lambda: 3.0 if torch.backends.cudnn.benchmark or torch.backends.mkldnn.deterministic else 1.0)
    return Net(), loss, *setting(torch.backends.mkldnn, "deterministic", True)


@case
def the_precision_of_products_on_a_gpu() -> Any:
    loss = times(lambda: 3.0 if torch.backends.cuda.matmul.fp32_precision == "tf32" else 1.0)
    return Net(), loss, *setting(torch.backends.cuda.matmul, "fp32_precision", "tf32")


@case
def the_precision_of_products() -> Any:
    loss = times(lambda: 3.0 if torch.backends.mkldnn.matmul.fp32_precision == "bf16" else 1.0)
    return Net(), loss, *setting(torch.backends.mkldnn.matmul, "fp32_precision", "bf16")


def check(maml: mk.MAML, loss: Any, seed: int) -> None:
    """Assert that the meta-gradient of a batch is that of plain autograd."""
    truth = gradients(maml.model, plain_loss(maml.model, loss, points(seed), points(seed + 9), 2, sgd(0.1)))
    assert_equal(gradients(maml.model, maml(points(seed), points(seed + 9))), truth)


def check_some(maml: mk.MAML, loss: Any) -> None:
    for i in range(3):
        check(maml, loss, i)


def uses(maml: mk.MAML) -> int:
    """Return how often programs were used."""
    plans = maml._engine._plans.values()
    programs = [program for plan in plans for program in plan.captures(maml.capture)._programs.values()]
    return sum(program.uses for program in programs if program is not None)


def captures_of(maml: mk.MAML) -> capture.Captures:
    assert maml._engine.last is not None
    return maml._engine.last.captures(maml.capture)


def test_modes_of_pytorch_are_noticed() -> None:
    """Under autocast the results differ from plain autograd in float64, so they are compared with an ordinary run."""
    model = Net().float()
    mamls = [mk.MAML(model, error, mk.optim.SGD(lr=0.1), steps=2, capture=c) for c in (True, False)]
    batches = [tuple(t.float() for t in points(i)) for i in range(2)]
    modes = [None, torch.bfloat16, torch.float16, None, torch.bfloat16]
    for mode in modes:
        with torch.autocast("cpu", dtype=mode, enabled=mode is not None):
            for _ in range(3):
                found, truth = (gradients(model, maml(*batches)) for maml in mamls)
                assert_equal(found, truth, 1e-2 if mode else 1e-5)
    guards = Guards({"model": model})
    for change in (torch.inference_mode, torch.no_grad, torch.autograd.detect_anomaly):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with change():
                assert not guards.hold()
                assert guards.changes() == ["PyTorch's settings"]
        assert guards.hold()
    assert settings() == settings()


class Counting(Net):
    def __init__(self) -> None:
        super().__init__()
        self.calls, self.seen, self.table = 0, [], {}

    def factor(self) -> float:
        self.calls += 1
        return 1.0


class Appending(Counting):
    def factor(self) -> float:
        self.seen.append(1)
        return 1.0


class Iterating:
    """An iterator in Python, whose state is an attribute."""

    def __init__(self) -> None:
        self.at = 0

    def __next__(self) -> float:
        self.at += 1
        return 1.0


STREAM: Iterator[float] = itertools.repeat(1.0)
VARIABLE: ContextVar[float] = ContextVar("VARIABLE", default=1.0)
GENERATOR = torch.Generator().manual_seed(0)
NUMPY_GENERATOR = np.random.default_rng(0)
LOCAL = threading.local()
FILE = Path(__file__)
# By name: a loss that reads what no guard sees (None: the model does), and a pattern of the reason that the plan gives.
UNSEEN: dict[str, tuple[Any, str]] = {
    "environ": (times(lambda: float(os.environ.get("FACTOR_OF_A_TEST", "1"))), r"os\.environ"),
    "getenv": (times(lambda: float(os.getenv("FACTOR_OF_A_TEST", "1"))), r"os\.getenv"),
    "sys.modules": (times(lambda: getattr(sys.modules[__name__], "GLOBAL")), r"sys\.modules"),  # noqa: B009
    "decimal.getcontext": (times(lambda: 1.0 + 0 * decimal.getcontext().prec), r"decimal\.getcontext"),
    "np.geterr": (times(lambda: 1.0 + 0 * len(np.geterr())), r"np\.geterr"),
    "time": (times(lambda: 1.0 + 0 * time.time()), "time"),
    "datetime": (times(lambda: 1.0 + 0 * datetime.datetime.now().year), r"datetime\.now"),
    "random": (times(lambda: 1.0 + 0 * random.random()), "random"),
    "numpy.random": (times(lambda: 1.0 + 0 * float(np.random.rand())), r"np\.random"),
    "a generator of NumPy": (times(lambda: 1.0 + 0 * float(NUMPY_GENERATOR.random())), "NUMPY_GENERATOR"),
    "a generator of PyTorch": (times(lambda: 1.0 + 0 * torch.rand((), generator=GENERATOR).sum()), "GENERATOR"),
    "an iterator": (times(lambda: next(STREAM)), "STREAM .a repeat. is an iterator"),
    "an iterator in a closure": (
        functools.partial(lambda f, m, b: error(m, b) * next(f), iter([1.0] * 999)),
        "iterator",
    ),
    "a context variable": (times(lambda: VARIABLE.get()), "VARIABLE"),
    "a thread's own value": (times(lambda: getattr(LOCAL, "factor", 1.0)), "LOCAL"),
    "a file": (times(lambda: 1.0 + 0 * len(FILE.read_text())), "read_text"),
    "open": (times(lambda: line_of_a_file()), r"line_of_a_file calls open\(\)"),
    "globals": (times(lambda: globals()["GLOBAL"]), r"calls globals\(\)"),
    "tolist": (times(lambda: 1.0 + 0 * SEEN.tolist()[0]), r"values of a tensor \(tolist\)"),
    "numpy": (times(lambda: 1.0 + 0 * float(SEEN.numpy()[0])), r"values of a tensor \(numpy\)"),
    "asarray": (times(lambda: 1.0 + 0 * float(np.asarray(SEEN)[0])), r"values of a tensor \(__array__\)"),
    "item": (times(lambda: 1.0 + 0 * SEEN[0].item()), "values of a tensor"),
    "a list of tensors": (times(lambda: 1.0 + 0 * torch.tensor([SEEN[0]]).sum()), r"values of a tensor \(tensor\)"),
    "a list by keyword": (
        times(lambda: 1.0 + 0 * torch.tensor(data=[SEEN[0]]).sum()),
        r"values of a tensor \(tensor\)",
    ),
    "a repr": (times(lambda: 1.0 + 0 * len(repr(SEEN))), r"values of a tensor \(__repr__\)"),
    "a counter": (None, r"a run changes model\.calls"),
    "a list that grows": (None, r"a run changes model\.seen"),
    "an iterator of one's own": (
        functools.partial(lambda f, m, b: error(m, b) * next(f), Iterating()),
        r"changes.*\.at",
    ),
}
SEEN = torch.ones(1)


def line_of_a_file() -> float:
    with open(__file__) as lines:
        return 1.0 + 0 * len(lines.readline())


def tolerant(loss: Any) -> Any:
    """Return a loss that catches the error by which a recording ends."""

    def caught(model: Any, batch: Any) -> Tensor:
        try:
            return loss(model, batch)
        except RuntimeError:
            return error(model, batch)

    return caught


@pytest.mark.parametrize("name", UNSEEN)
def test_what_no_guard_sees_prevents_capture_with_a_reason(name: str) -> None:
    loss, why = UNSEEN[name]
    model = {"a counter": Counting, "a list that grows": Appending}.get(name, Net)()
    for of in {loss or error, tolerant(loss or error)}:
        maml = mk.MAML(model, of, mk.optim.SGD(lr=0.1), steps=2, batching="loop", capture=True)
        with pytest.warns(UserWarning, match=f"capture has no effect.*{why}"):
            check_some(maml, of)
        check_some(maml, of)
        assert uses(maml) == 0
        assert len(captures_of(maml).reasons) == 1


def test_replaced_memory_that_an_alias_still_reads_is_noticed() -> None:
    mask = torch.tensor([1.0, 2.0]).double()
    alias = in_a_library("def factor(): return ALIAS.sum()")
    alias.space["ALIAS"], factor = mask.detach(), alias.factor

    def loss(model: Any, batch: Any) -> Tensor:
        return error(model, batch) * factor() * mask[0]

    maml = mk.MAML(Net(), loss, mk.optim.SGD(lr=0.1), steps=2, batching="loop", capture=True)
    check_some(maml, loss)
    assert uses(maml) == 1
    mask.data = torch.tensor([3.0, 2.0]).double()
    with pytest.warns(UserWarning, match="that no guard can see"):
        check_some(maml, loss)


def test_random_numbers_of_python_are_noticed_in_library_code() -> None:
    hidden = in_a_library("import random\ndef factor(): return 1.0 + 0 * random.random()").factor
    maml = mk.MAML(Net(), times(lambda: hidden()), mk.optim.SGD(lr=0.1), steps=2, batching="loop", capture=True)
    with pytest.warns(UserWarning, match="a run changes random's state"):
        check_some(maml, error)
    check(maml, error, 1)


def test_recordings_that_are_discarded_change_no_state() -> None:
    class Model(Counting):
        def factor(self) -> float:
            self.calls += 1
            self.seen.append(self.calls)
            self.table["calls"] = self.table.get("calls", 0) + 1
            return 1.0

    model, other = Model(), Model()
    mamls = [
        mk.MAML(m, error, mk.optim.SGD(lr=0.1), 2, batching="loop", capture=c)
        for m, c in ((model, True), (other, False))
    ]
    for i in range(3, 0, -1):  # another size at each call, so that each records
        support, query = (tuple(t[:, :i] for t in points(i + j)) for j in (0, 9))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found, truth = (gradients(maml.model, maml(support, query)) for maml in mamls)
        assert_equal(found, truth)
        if i < 3:  # the first call also makes the plan
            assert model.calls == other.calls > 0
            assert model.seen == other.seen
            assert model.table == other.table
        model.calls = other.calls = 0
        model.seen[:] = other.seen[:] = []
        model.table["calls"] = other.table["calls"] = 0


def keeps(model: Any) -> Tensor:
    """Store a tensor in the model, then read it."""
    model.kept = model.linear.weight.detach() * 2
    return model.kept.sum()


def fills(model: Any) -> float:
    """Fill a cache at the first run, then read it."""
    if getattr(model, "cache", None) is None:
        model.cache = {"factor": 1.5}
    return model.cache["factor"]


@pytest.mark.parametrize("factor", [keeps, fills])
def test_attributes_that_a_run_sets_before_it_reads_them_allow_capture(factor: Any) -> None:
    model = with_factor(factor)
    maml = mk.MAML(model, error, mk.optim.SGD(lr=0.1), steps=2, batching="loop", capture=True)
    for i in range(6):
        check(maml, error, i)
    assert uses(maml) >= 2


def reads_what_it_kept(model: Any) -> Tensor:
    factor, model.kept = model.kept.sum() * 0 + 1, model.linear.weight.detach() * 2
    return factor


def writes_to_what_it_has(model: Any) -> Tensor:
    model.count[1:].add_(1)
    return model.count[0] + 1


@pytest.mark.parametrize(
    ("factor", "why"), [(reads_what_it_kept, "that no guard can see"), (writes_to_what_it_has, "writes to a tensor")]
)
def test_tensors_kept_from_run_to_run_prevent_capture(factor: Any, why: str) -> None:
    model = with_factor(factor, kept=torch.ones(()), count=torch.zeros(2))
    maml = mk.MAML(model, error, mk.optim.SGD(lr=0.1), steps=2, batching="loop", capture=True)
    loss = times(lambda: 1.0)
    with pytest.warns(UserWarning, match=why):
        check_some(maml, loss)
    assert uses(maml) == 0
    other = mk.MAML(model, error, mk.optim.SGD(lr=0.1), steps=2, batching="loop")
    counts = []
    for m in (other, mk.MAML(model, error, mk.optim.SGD(lr=0.1), steps=2, batching="loop", capture="auto")):
        m(points(1), points(2))
        for _ in range(3):
            before = model.count.clone()
            m(points(1), points(2))
            counts.append((model.count - before).tolist())
    assert all(count == counts[0] for count in counts)


class Number(float):
    """A number of the user's own class."""


class Kept(torch.autograd.Function):
    """Its backward reads a global; no code of the loss calls it by name."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, ct: Tensor) -> Tensor:
        return ct * GLOBAL


@case
def a_number_of_a_class_of_ones_own() -> Any:
    numbers = [Number(1.0)]
    return Net(), times(lambda: numbers[0] * 1.0), *item(numbers, 0, Number(3.0))


@case
def bytes_in_c() -> Any:
    numbers, more = array.array("d", [1.0]), bytearray(b"\1")
    return Net(), times(lambda: numbers[0] * more[0]), *item(numbers, 0, 3.0)


@case
def bytes_that_can_change() -> Any:
    more = bytearray(b"\1")
    return Net(), times(lambda: float(more[0])), *item(more, 0, 3)


@case
def a_function_of_a_library_is_replaced() -> Any:
    sinh = torch.sinh
    model = with_factor(lambda self: torch.sinh(torch.ones(())))
    return model, error, *setting(torch, "sinh", lambda x: 3 * sinh(x))


@case
def a_module_that_computes_its_attributes() -> Any:
    module = types.ModuleType("module_that_computes")
    module.__getattr__ = lambda name: TABLE["factor"][0]
    globals()["module_that_computes"] = module
    return Net(), times(lambda: module_that_computes.factor), *item(TABLE["factor"], 0, 3.0)  # noqa: F821


@case
def a_descriptor_of_ones_own() -> Any:
    class Descriptor:
        def __init__(self) -> None:
            self.value = 1.0

        def __get__(self, instance: Any, owner: Any) -> float:
            return self.value

    descriptor = Descriptor()
    holder = type("Holder", (), {"factor": descriptor, "__module__": __name__})()
    return Net(), times(lambda: holder.factor), *setting(descriptor, "value", 3.0)


@case
def a_function_with_a_derivative_of_its_own() -> Any:
    def loss(model: Any, batch: Any) -> Tensor:
        return (Kept.apply(model(batch[0])) - batch[1]).square().mean()

    return Net(), loss, *item(globals(), "GLOBAL", 3.0)


def test_attributes_that_are_not_read_may_change() -> None:
    model, trainer = Net(), Space()
    model.step, model.numbers = 0, itertools.count()
    maml = mk.MAML(model, times(lambda: trainer.factor), mk.optim.SGD(lr=0.1), steps=2, capture=True)
    for i in range(8):
        model.step += 1
        trainer.unused = float(next(model.numbers))
        check(maml, error, i)
    assert uses(maml) == 6


def test_new_objects_with_equal_values_are_the_same_state() -> None:
    model = with_factor(lambda self: self.factors[0] * self.number, factors=[1.0], number=1000.0)
    maml = mk.MAML(model, error, mk.optim.SGD(lr=0.1), steps=2, capture=True)
    for i in range(7):
        model.factors, model.number = [float("1")], float("1000")
        check(maml, error, i)
    assert uses(maml) == 5
    assert len(captures_of(maml)._states) == 1
    model.factors[0] = 2.0  # the new list must be guarded too
    check(maml, error, 1)
    assert uses(maml) == 5


def test_a_value_that_changes_at_each_call_ends_recording(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "MOST_NEW_STATES", 3)
    model = with_factor(lambda self: self.number, number=1.0)
    maml = mk.MAML(model, error, mk.optim.SGD(lr=0.1), steps=2, capture=True)
    for i in range(3):
        check(maml, error, i)
    for i in range(8):
        model.number = 2.0 + i
        if i == 3:
            with pytest.warns(UserWarning, match=r"model\.number changes from call to call"):
                check(maml, error, i)
        else:
            check(maml, error, i)
    before, model.number = uses(maml), 2.0 + 2  # a state whose program is kept
    for i in range(3):
        check(maml, error, i)
    assert uses(maml) == before + 2


def in_a_library(code: str) -> types.SimpleNamespace:
    """Return the functions in `code`, in a module of torch: guards take its globals for constants."""
    space = {"__name__": "torch.of_a_test"}
    exec(code, space)
    return types.SimpleNamespace(space=space, **{k: v for k, v in space.items() if isinstance(v, types.FunctionType)})


@pytest.mark.parametrize("at", [4, 8, 16])
@pytest.mark.parametrize("microbatch_bytes", [capture.MICROBATCH_BYTES, 1])
def test_audits_find_stale_programs(at: int, microbatch_bytes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "MICROBATCH_BYTES", microbatch_bytes)
    hidden = in_a_library("FACTOR = 1.0\ndef factor(): return FACTOR")
    factor, model = hidden.factor, Net()
    loss = times(lambda: factor())
    maml = mk.MAML(model, loss, mk.optim.SGD(lr=0.1), steps=2, capture=True)
    while uses(maml) < at - 1:
        check(maml, loss, 1)
    hidden.space["FACTOR"] = 2.0
    with pytest.raises(capture.StaleCaptureError, match=rf"at its use {at}: the query losses differs by") as raised:
        maml(points(1), points(2))
    assert "part of the batch, or use capture=False" in str(raised.value)
    for i in range(3):
        check(maml, loss, i)
    assert "gave other results" in captures_of(maml).reasons[0]


def test_audits_are_made_at_powers_of_two_and_then_every_1024_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    captured = capture._Captured.__new__(capture._Captured)
    captured.uses = 0
    due = [i for i in range(1, 5000) if captured.is_due()]
    assert due == [4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 3072, 4096]
    maml = mk.MAML(Net(), error, mk.optim.SGD(lr=0.1), steps=2, capture=True)
    runs, run = [], maml._meta_gradient
    monkeypatch.setattr(maml, "_meta_gradient", lambda *args: runs.append(1) or run(*args))
    for i in range(40):
        before = len(runs)
        check(maml, error, i)
        assert (len(runs) > before) == (i < 2 or i - 1 in (4, 8, 16, 32))


def test_an_audit_does_not_advance_the_random_generator() -> None:
    model = nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.5), nn.Linear(8, 3)).double()
    mamls = [mk.MAML(model, error, mk.optim.SGD(lr=0.1), steps=2, capture=c) for c in (True, False)]
    drawn = []
    for maml in mamls:
        maml(points(0), points(9))
        torch.manual_seed(3)
        drawn.append([maml(points(i), points(i + 9)).item() for i in range(12)] + [torch.rand(()).item()])
    np.testing.assert_allclose(*drawn, rtol=1e-12)


def test_infinite_losses_are_no_difference_from_a_program() -> None:
    def loss(model: Any, batch: Any) -> Tensor:
        return error(model, batch) / (batch[1] < 90).double().mean()

    maml = mk.MAML(Net(), loss, mk.optim.SGD(lr=0.1), steps=2, capture=True)
    support, query = points(1), points(2)
    wrong = (query[0], query[1].clone())
    wrong[1][1] = 99.0
    for i in range(12):
        value = maml(support, wrong if i > 3 else query)
        assert value.isfinite() == (i <= 3)
        assert maml.query_losses.isfinite().tolist() == [True, i <= 3, True]


@pytest.mark.parametrize("freed", ["weight", "batch"])
@pytest.mark.parametrize("batching", ["fold", "loop"])
def test_a_tensor_without_memory_raises(freed: str, batching: str) -> None:
    """A loop slices the batch, which PyTorch itself refuses."""
    model = Net()
    maml = mk.MAML(model, error, mk.optim.SGD(lr=0.1), steps=2, batching=batching, capture=True)
    for i in range(3):
        check(maml, error, i)
    support, query = points(1), points(2)
    t = {"weight": model.linear.weight, "batch": query[0]}[freed]
    before, size = t.detach().clone(), t.untyped_storage().nbytes()
    for smaller in (0, size - 8):
        t.untyped_storage().resize_(smaller)
        with pytest.raises((ValueError, RuntimeError), match=r"its memory was freed|out of bounds for storage"):
            maml(support, query)
    t.untyped_storage().resize_(size)
    t.data.copy_(before)
    check(maml, error, 1)


def test_guards_compare_by_identity_and_no_module_state_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Comparing by value and keeping the state of all modules would take longer than a small meta-gradient."""
    maml = mk.MAML(Net(), error, mk.optim.SGD(lr=0.1), steps=2, capture=True)
    for i in range(3):
        maml(points(i), points(i + 9))
    compared: list[str] = []
    monkeypatch.setattr(Guards, "changes", lambda self: compared.append("by value") or [])
    for i in range(3):
        maml(points(i), points(i + 9))
    assert uses(maml) > 0
    assert compared == []
    assert maml._engine.last is not None
    assert not maml._engine.last._found.changed


def test_auto_records_after_some_calls_and_never_warns() -> None:
    model = Net()
    maml = mk.MAML(model, error, mk.optim.SGD(lr=0.1), steps=2, capture="auto")
    for i in range(8):
        check(maml, error, i)
        assert uses(maml) == max(0, i - 3)
    maml = mk.MAML(model, UNSEEN["environ"][0], mk.optim.SGD(lr=0.1), steps=2, capture="auto")
    for i in range(6):
        check(maml, error, i)
    assert "os.environ" in captures_of(maml).reasons[0]


def test_auto_waits_longer_for_a_program_without_an_executable() -> None:
    class Model(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).erfc()  # erfc has no instruction

    maml = mk.MAML(Model(), error, mk.optim.SGD(lr=0.1), steps=2)
    for i in range(16):
        check(maml, error, i)
        assert uses(maml) == max(0, i - 12)
    assert captures_of(maml).reasons == []
    assert "captured without an executable, as aten.erfc.default has no instruction" in maml.plan.reasons


@dataclass
class Options:
    factor: float


class Opaque:
    def __init__(self, factor: float) -> None:
        self.factor = factor


@pytest.mark.parametrize(
    "make",
    [
        lambda k: np.concatenate([np.ones(1000), [k], np.ones(1000)]),
        lambda k: np.float64(k),
        lambda k: str(k) * 3,
        lambda k: Options(k),
        lambda k: {k},
        lambda k: (k, None),
        lambda k: {"a": [k]},
        lambda k: types.SimpleNamespace(factor=k),
        lambda k: Opaque(k),
    ],
)
def test_values_in_a_batch_other_than_tensors_are_compared_by_value(make: Any) -> None:
    def number(leaf: Any) -> float:
        if isinstance(leaf, np.ndarray):
            return float(leaf[1000])
        if isinstance(leaf, Options | types.SimpleNamespace | Opaque):
            return leaf.factor
        if isinstance(leaf, dict):
            return leaf["a"][0]
        if isinstance(leaf, str):
            return float(leaf[:3])
        return float(next(iter(leaf)) if hasattr(leaf, "__iter__") else leaf)

    def function(batch: Any) -> list[Tensor | None]:
        return [batch[0].square().sum((1, 2)) * number(batch[1])]

    captures, reused = capture.Captures({"model": nn.Identity(), "inner": nn.Identity(), "loss": function}), make(1.0)
    for i, k in enumerate((1.0, 1.0, 1.0, 3.0, 1.0, 3.0, 3.0, 1.0)):
        if isinstance(reused, np.ndarray):
            reused[1000] = k  # in the same memory
        x, leaf = points(i)[0], reused if isinstance(reused, np.ndarray) else make(k)
        captures.begin()
        if isinstance(leaf, Opaque) and i == 0:
            with pytest.warns(UserWarning, match="holds a Opaque, which can't be compared"):
                (found,) = captures(function, (x, leaf))
        else:
            (found,) = captures(function, (x, leaf))
        torch.testing.assert_close(found, x.square().sum((1, 2)) * k)
    programs = [program.uses for program in captures._programs.values()]
    assert sum(programs) == (0 if isinstance(leaf, Opaque) else 4)


@pytest.mark.parametrize(
    ("of", "where"),
    [
        (lambda n: torch.Tensor([n, 2.0]), r"torch.Tensor\(\[…\]\)"),
        (lambda n: torch.LongTensor([n, 2]), r"torch.Tensor\(\[…\]\)"),
        (lambda n: torch.tensor([n, 2]), r"\(tensor\)"),
        (lambda n: torch.arange(9.0).view(3, 3)[1, [n, 2]], "a list of tensors as an index"),
    ],
)
def test_numbers_of_tensors_in_lists_are_noticed(of: Any, where: str) -> None:
    """PyTorch reads them below all modes. The data of the first calls are equal, so that no check would find it."""

    def function(batch: Any) -> list[Tensor | None]:
        return [batch[0].square().sum((1, 2)) * of(batch[1][0]).sum()]

    captures = capture.Captures({"model": nn.Identity(), "inner": nn.Identity(), "loss": function}, "auto")
    for i in range(7):
        x = points(i)[0]
        number = torch.full((len(x),), 1 + i // 5)
        captures.begin()
        (found,) = captures(function, (x, number))
        torch.testing.assert_close(found, x.square().sum((1, 2)) * of(number[0]).sum())
    assert [reason for reason in captures.reasons if re.search(where, reason)]


@pytest.mark.parametrize("numbers", [torch.tensor, torch.Tensor, lambda x: torch.from_numpy(np.array(x))])
def test_numbers_of_python_are_captured_where_they_can_be_told(numbers: Any) -> None:
    def function(batch: Any) -> list[Tensor | None]:
        return [batch[0][:, [0, 1]].square().sum((1, 2)) * numbers([1.0, 2.0]).sum()]

    captures = capture.Captures({"model": nn.Identity(), "inner": nn.Identity(), "loss": function}, "auto")
    for i in range(6):
        captures.begin()
        captures(function, (points(i)[0],))
    assert bool(captures.usage.captured) == (numbers is not torch.Tensor), captures.reasons


def test_programs_do_not_read_the_memory_of_an_earlier_batch() -> None:
    """The user may write into the array of a batch after the call that recorded it."""

    def function(batch: Any) -> list[Tensor | None]:
        return [batch[0].square().sum((1, 2)) * torch.from_numpy(batch[1]).sum()]

    captures, first = capture.Captures({"model": nn.Identity(), "inner": nn.Identity(), "loss": function}), np.ones(2)
    for i in range(5):
        array = first if i < 2 else np.ones(2)
        x = points(i)[0]
        captures.begin()
        (found,) = captures(function, (x, array))
        torch.testing.assert_close(found, x.square().sum((1, 2)) * 2)
        first[:] = 1.0 if i < 1 else 5.0
    assert sum(program.uses for program in captures._programs.values()) == 3


def test_guards_of_a_transformer_are_a_few_thousand_values() -> None:
    """The time of a check is proportional to their number: twelve layers must not have many more."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    guards = Guards({"model": nn.TransformerEncoder(layer, 12), "inner": mk.optim.SGD(lr=0.1), "loss": error})
    assert 2000 < len(guards._values) < 8000
    assert guards.hold()


@pytest.mark.parametrize("name", CASES)
def test_every_change_is_noticed(name: str) -> None:
    """After a change another program is recorded; when it is undone, the first one is used again."""
    model, loss, change, back = CASES[name]()
    maml = mk.MAML(model, loss, mk.optim.SGD(lr=0.1), steps=2, batching="loop", capture=True)
    try:
        for i in range(3):
            check(maml, loss, i)
        assert uses(maml) == 1
        before = gradients(model, maml(points(1), points(10)))
        change()
        for i in range(3):
            check(maml, loss, i)
        after = gradients(model, maml(points(1), points(10)))
        assert before.keys() != after.keys() or any(not torch.allclose(before[key], after[key]) for key in before)
    finally:
        back()
    before_uses = uses(maml)
    check(maml, loss, 5)
    assert uses(maml) == before_uses + 1
