"""How many kernels a GPU runs for a meta-gradient: the launches of Triton, by a stand-in, and PyTorch's operations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import metakern as mk
from benchmarks.peers.metakern import method
from benchmarks.workloads import make
from metakern.ops.core import backend

MOST = 104  # a layer and inner step: eight products for each of four linear layers, 38 additions by autograd, the ops
# Operations without a kernel, or only on a CPU: views, new memory, and checks of indices.
WITHOUT = {
    *("view", "_unsafe_view", "transpose", "t", "expand", "select", "slice", "unsqueeze", "squeeze", "permute"),
    *("detach", "alias", "as_strided", "split", "split_with_sizes", "_reshape_alias", "narrow", "_efficientzerotensor"),
    *("unbind", "empty", "empty_like", "new_empty", "empty_strided", "aminmax", "_local_scalar_dense"),
}  # fmt: skip


class Operations(TorchDispatchMode):
    def __init__(self, launched: list[str]) -> None:
        super().__init__()
        self.launched = launched

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__.partition(".")[0]
        if name not in WITHOUT:
            self.launched.append(name)
        return func(*args, **(kwargs or {}))


def launches(workload: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """Return the number of kernels; those of Triton do not run, so that the values mean nothing."""
    interpreter, found = pytest.importorskip("triton.runtime.interpreter"), list[str]()
    step = method(capture=False, strategy="store")(make(workload))
    step()  # verifies the plan
    with monkeypatch.context() as patch:
        patch.setattr(interpreter.InterpretedFunction, "run", lambda kernel, *a, **b: found.append(kernel.__name__))
        with backend.using(lambda op, kernels: kernels.get("triton", kernels["reference"])), Operations(found):
            step()
    return len(found)


@pytest.mark.skipif(mk.backends()["triton"] != "available", reason=mk.backends()["triton"])
def test_a_layer_of_a_gpt_launches_few_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    found = {(layers, K): launches(f"gpt:tiny,layers={layers},K={K}", monkeypatch) for layers in (1, 2) for K in (1, 2)}
    assert found[2, 2] - found[2, 1] - found[1, 2] + found[1, 1] <= MOST
