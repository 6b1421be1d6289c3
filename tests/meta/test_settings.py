"""Settings of PyTorch: every op and every meta-gradient give the same numbers with them as without."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from campaign import default_dtype, deterministic
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import metakern as mk
from metakern.ops import SPECS
from metakern.ops.core.spec import Make, Sample


@contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def anomaly() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Anomaly Detection has been enabled")
        with torch.autograd.detect_anomaly():
            yield


@contextmanager
def precision(setting: Any, name: str, value: str) -> Iterator[None]:
    before = getattr(setting, name)
    setattr(setting, name, value)
    try:
        yield
    finally:
        setattr(setting, name, before)


SETTINGS: dict[str, Callable[[], Any]] = {
    "meta device": lambda: default_device("meta"),
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "deterministic": deterministic,
    "anomaly": anomaly,
    "grad mode off": torch.no_grad,
    "inference mode": torch.inference_mode,
}
if hasattr(torch.backends, "fp32_precision"):
    SETTINGS |= {
        "ieee": lambda: precision(torch.backends, "fp32_precision", "ieee"),
        "tf32": lambda: precision(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
    }


def results(op: str, samples: list[Sample]) -> list[Tensor]:
    """Return the outputs of every sample and, if gradients are enabled, its first and second derivatives."""
    spec, found = SPECS[op], []
    for sample in samples:
        args = [a.clone() if isinstance(a, Tensor) else a for a in sample.args]
        leaves = [
            a.requires_grad_()
            for i, a in enumerate(args)
            if isinstance(a, Tensor) and a.is_floating_point() and i not in sample.frozen
        ]
        y = tree_leaves(spec.call(*args, **sample.kwargs))
        found += [t.detach() for t in y]
        if not torch.is_grad_enabled():
            continue
        ones = [torch.ones_like(t).requires_grad_() for t in y]
        first = torch.autograd.grad(y, leaves, ones, create_graph=True, allow_unused=True)
        second = torch.autograd.grad(
            sum(g.square().sum() for g in first if g is not None and g.requires_grad), leaves, allow_unused=True
        )
        found += [g.detach() for g in (*first, *second) if g is not None]
    return found


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("op", SPECS)
def test_ops_do_not_depend_on_settings(op: str, setting: str) -> None:
    samples = SPECS[op].samples(Make(torch.float32))
    for backend in (name for name in ("cpu", "reference") if mk.backends()[name] == "available"):
        with mk.backend(backend):
            with torch.no_grad() if "mode" in setting else torch.enable_grad():
                right = results(op, samples)
            with SETTINGS[setting]():
                found = results(op, samples)
        assert len(found) == len(right)
        for a, b in zip(found, right, strict=True):
            assert a.dtype == b.dtype
            assert a.device == b.device
            torch.testing.assert_close(a.clone(), b, rtol=1e-5, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("setting", [name for name in SETTINGS if "mode" not in name and name != "meta device"])
@pytest.mark.parametrize("inner", [mk.optim.SGD, mk.optim.Adam, mk.optim.MetaSGD])
def test_meta_gradients_do_not_depend_on_settings(inner: Any, setting: str) -> None:
    def gradients() -> list[Tensor]:
        maml.zero_grad()
        maml((x, y), (x, y)).backward()
        return [p.grad.clone() for p in maml.parameters()]

    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    x, y = torch.randn(3, 5, 3), torch.randint(2, (3, 5))
    maml = mk.MAML(net, mk.losses.classification, inner(lr=0.1), steps=2)
    right = gradients()
    with SETTINGS[setting]():
        maml = mk.MAML(net, mk.losses.classification, inner(lr=0.1), steps=2)
        found = gradients()
    for a, b in zip(found, right, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.skipif(mk.backends()["triton"] != "available", reason=mk.backends()["triton"])
def test_triton_products_have_the_precision_that_pytorch_is_set_to(monkeypatch: pytest.MonkeyPatch) -> None:
    from metakern.ops.core.triton_kernels import launch

    assert launch.precision() == "tf32x3"
    for setting in ("ieee", "tf32"):
        if setting in SETTINGS:
            with SETTINGS[setting]():
                assert launch.precision() == ("tf32" if setting == "tf32" else "tf32x3")
    if hasattr(torch.backends, "fp32_precision"):
        nearer = [
            precision(part, "fp32_precision", "none") for part in (torch.backends.cudnn, torch.backends.cuda.matmul)
        ]
        with nearer[0], nearer[1], precision(torch.backends, "fp32_precision", "tf32"):
            assert launch.precision() == "tf32"
    for allowed, expected in ((True, "tf32"), (False, "tf32x3")):  # PyTorch before 2.9
        monkeypatch.setattr(torch.backends.cuda, "matmul", SimpleNamespace(allow_tf32=allowed))
        assert launch.precision() == expected


@pytest.mark.skipif(mk.backends()["triton"] != "available", reason=mk.backends()["triton"])
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("op", ["linear", "attention", "layer_norm", "global_norm", "sgd_update"])
def test_triton_kernels_do_not_depend_on_settings(op: str, setting: str) -> None:
    sample = next(s for s in SPECS[op].samples(Make(torch.float32)) if s.args[0].numel())
    right = tree_leaves(SPECS[op].call(*sample.args, **sample.kwargs))
    with mk.backend("triton"), SETTINGS[setting]():
        found = tree_leaves(SPECS[op].call(*sample.args, **sample.kwargs))
    for a, b in zip(found, right, strict=True):
        torch.testing.assert_close(a.clone(), b, rtol=1e-4, atol=1e-5)


class Constants(nn.Module):
    """A layer that makes tensors of PyTorch's default dtype in each call, and notes that dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.seen: set[torch.dtype] = set()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.add(torch.get_default_dtype())
        return self.linear(x) @ (torch.eye(3) + torch.tensor(0.5) * torch.arange(3.0) + torch.arange(3) / 2)


def test_verification_does_not_set_the_default_dtype() -> None:
    model = Constants()
    x, y = torch.randn(3, 5, 3), torch.randint(3, (3, 5))
    mk.MAML(model, mk.losses.classification, mk.optim.SGD(0.1))((x, y), (x, y)).backward()
    mk.doctor(model, mk.losses.classification, (x, y), (x, y))
    assert model.seen == {torch.float32}


def test_first_calls_in_several_threads_leave_the_settings_as_they_are() -> None:
    x, y = torch.randn(3, 5, 3), torch.randint(3, (3, 5))
    seen: set[torch.dtype] = set()

    def work() -> None:
        for _ in range(3):
            seen.add(torch.get_default_dtype())
            model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.3), nn.Linear(4, 3))
            mk.MAML(model, mk.losses.classification, mk.optim.SGD(0.1))((x, y), (x, y)).backward()

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(300)
    assert seen == {torch.float32}
    assert torch.get_default_dtype() == torch.float32
