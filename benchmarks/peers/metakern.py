"""metakern as a call without options gives it; with each strategy, captured; with other options; and first order.

With `capture=True` the first call records the program. By default the third call does, and the fourth checks it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import nn

from benchmarks.peers.plain import Gradient
from benchmarks.workloads import Workload
from benchmarks.workloads.models import Llama, LoraLinear

requirements: tuple[str, ...] = ()
shares_torch = True


def adapted(work: Workload) -> Workload:
    """Return the workload with metakern's LoRA on a patched model, and its ops for rotary positions and SwiGLU."""
    import metakern as mk

    if not isinstance(work.model, Llama):
        return work
    model = copy.deepcopy(work.model)
    model.rotate, model.gated = mk.ops.rope, mk.ops.swiglu
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, LoraLinear)}
    for name, layer in layers.items():
        base = nn.Linear(layer.in_features, layer.out_features, bias=False, device=layer.weight.device)
        model.set_submodule(name, base)
    if layers:
        mk.lora(model, rank=next(iter(layers.values())).lora_A.shape[0], targets=list(layers))
    mk.patch(model)
    model.load_state_dict(work.model.state_dict())
    return replace(work, model=model)


def method(**options: Any) -> Callable[[Workload], Callable[[], Gradient]]:
    def prepare(work: Workload) -> Callable[[], Gradient]:
        import metakern as mk

        work = adapted(work)
        maml = mk.MAML(work.model, work.loss, inner=mk.optim.SGD(lr=work.lr), steps=work.steps, **options)

        def step() -> Gradient:
            work.model.zero_grad()
            maml(work.support, work.query).backward()
            return {name: p.grad for name, p in work.theta.items()}

        return step

    return prepare


methods = {
    "metakern default": method(),
    **{f"metakern {name}": method(strategy=name, capture=True) for name in ("store", "recompute", "auto")},
    "metakern auto, not captured": method(capture=False),
    "metakern auto, bfloat16": method(capture=True, precision="bfloat16"),
    **{f"metakern auto, {form} weights": method(capture=True, weights=form) for form in ("explicit", "implicit")},
    "metakern least memory": method(capture=True, memory="least"),
    "metakern, first order": method(first_order=True, capture=True),
}
calls_until_steady = {"metakern default": 4}
