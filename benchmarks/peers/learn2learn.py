"""learn2learn: `MAML.clone` and `adapt`, a task at a time.

Its source package holds C files that no longer compile; `build_ext` has them made anew by Cython. Its `__init__`
imports gym, qpth and torchvision, which MAML never uses, so that only the modules of MAML are imported.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec, module_from_spec

from torch import Tensor

from benchmarks.peers.plain import Gradient, by_backward
from benchmarks.workloads import Workload

requirements = (
    "'cython<3.1' 'setuptools<81' wheel",
    "--no-deps --no-build-isolation --use-pep517 --config-settings=--build-option=build_ext learn2learn==0.2.0",
)
shares_torch = True


def learn2learn(work: Workload) -> Callable[[], Gradient]:
    frozen = len(work.theta) < len(list(work.model.parameters()))
    for package in ("learn2learn", "learn2learn.algorithms"):
        sys.modules.setdefault(package, module_from_spec(find_spec(package)))  # there, and never run
    maml = import_module("learn2learn.algorithms.maml").MAML(
        work.model, lr=work.lr, first_order=False, allow_nograd=frozen
    )

    def one(support: tuple[Tensor, ...], query: tuple[Tensor, ...]) -> Tensor:
        learner = maml.clone()
        for _ in range(work.steps):
            learner.adapt(work.loss(learner, support))
        return work.loss(learner, query)

    return by_backward(work, one)


methods = {"learn2learn": learn2learn}
