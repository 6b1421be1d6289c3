"""Triton's kernels run in its interpreter here, which has to be chosen before Triton is imported."""

import os

os.environ["TRITON_INTERPRET"] = "1"

from collections.abc import Iterator
from typing import Any

import pytest

from metakern import _native


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The names of the Triton kernels that the test has launched so far."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    names: list[str] = []
    run = interpreter.InterpretedFunction.run

    def record(kernel: Any, *args: Any, **options: Any) -> None:
        names.append(kernel.__name__)
        run(kernel, *args, **options)

    monkeypatch.setattr(interpreter.InterpretedFunction, "run", record)
    return names


@pytest.fixture(params=_native._C.isas() if _native._C else [])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every instruction set that this machine has."""
    best = _native._C.isa()
    _native._C.set_isa(request.param)
    assert _native._C.isa() == request.param
    yield request.param
    _native._C.set_isa(best)
