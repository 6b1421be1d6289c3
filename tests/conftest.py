"""Triton's kernels run in its interpreter here, which has to be chosen before Triton is imported."""

import os

os.environ["TRITON_INTERPRET"] = "1"

from collections.abc import Iterator
from typing import Any

import pytest


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
