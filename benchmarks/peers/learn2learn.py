"""learn2learn: `MAML.clone` and `adapt`, one task at a time.

Its source package has C files that no longer compile; `build_ext` makes Cython write them anew. Its `__init__` imports
gym, qpth and torchvision, which MAML does not use, so only the modules of MAML are imported.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec, module_from_spec
from typing import Any

from torch import Tensor

from benchmarks.peers.plain import Gradient, by_backward
from benchmarks.workloads import Workload

requirements = (
    "'cython<3.1' 'setuptools<81' wheel",
    "--no-deps --no-build-isolation --use-pep517 --config-settings=--build-option=build_ext learn2learn==0.2.0",
)
shares_torch = True


def original(name: str) -> Any:
    """Return a class of learn2learn from its own module, without running the package's `__init__`."""
    for package in ("learn2learn", "learn2learn.algorithms"):
        sys.modules.setdefault(package, module_from_spec(find_spec(package)))  # present, but never run
    return getattr(import_module(f"learn2learn.algorithms.{'maml' if name == 'MAML' else 'meta_sgd'}"), name)


def loop(work: Workload, maml_class: Any) -> Callable[[], Gradient]:
    frozen = len(work.theta) < len(list(work.model.parameters()))
    maml = maml_class(work.model, lr=work.lr, first_order=False, allow_nograd=frozen)

    def one(support: tuple[Tensor, ...], query: tuple[Tensor, ...]) -> Tensor:
        learner = maml.clone()
        for _ in range(work.steps):
            learner.adapt(work.loss(learner, support))
        return work.loss(learner, query)

    return by_backward(work, one)


def learn2learn(work: Workload) -> Callable[[], Gradient]:
    return loop(work, original("MAML"))


methods = {"learn2learn": learn2learn}
