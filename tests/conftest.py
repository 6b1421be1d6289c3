"""Options and fixtures of all tests.

Triton kernels run in Triton's interpreter, which must be chosen before Triton is imported. Tests run with one thread
unless they set another number.
"""

import os

os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import re
import shutil
import signal
import threading
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from installing import ROOT

from metakern import native
from metakern.ops import SPECS
from metakern.ops.core import selfcheck

MISSING = re.compile("could not import|pip install|the extra|package .* is not installed")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--everything", action="store_true", help="fail tests that are skipped because a package is missing"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Let Ctrl-C act in the processes that tests start: a shell ignores it for jobs in the background."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _fail_for_want_of_a_package(report: Any) -> None:
    """Turn a skip for a missing package into a failure, so that a broken environment is noticed."""
    if report.skipped and MISSING.search(str(report.longrepr)) and not hasattr(report, "wasxfail"):
        report.outcome, report.longrepr = "failed", f"skipped under --everything: {report.longrepr[-1]}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the longest tests first, so that the processes that share all tests end at about the same time."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector: pytest.Collector) -> Generator[None, Any, Any]:
    report = yield
    if collector.config.getoption("--everything"):
        _fail_for_want_of_a_package(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    report = yield
    if item.config.getoption("--everything"):
        _fail_for_want_of_a_package(report)
    return report


@pytest.fixture(scope="session", autouse=True)
def kernels_are_checked() -> None:
    """Let kernels check themselves before the first test, so that tests which count calls do not count these."""
    for op, spec in SPECS.items():
        for dtype in (torch.float32, torch.float64):
            if native.C and "cpu" in spec.op.kernels:
                selfcheck.fault(op, "cpu", spec.op.kernels, torch.device("cpu"), dtype)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A list of the names of the Triton kernels that the test has launched so far."""
    interpreter = pytest.importorskip("triton.runtime.interpreter")
    names: list[str] = []
    run = interpreter.InterpretedFunction.run

    def record(kernel: Any, *args: Any, **options: Any) -> None:
        names.append(kernel.__name__)
        run(kernel, *args, **options)

    monkeypatch.setattr(interpreter.InterpretedFunction, "run", record)
    return names


@pytest.fixture(params=native.C.isas() if native.C else [])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run the test once with each instruction set of this machine; return its name."""
    best = native.C.isa()
    native.C.set_isa(request.param)
    assert native.C.isa() == request.param
    yield request.param
    native.C.set_isa(best)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder with a copy of the files that a build needs."""
    for name in ("csrc", "metakern"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("pyproject.toml", "setup.py", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "README.md").touch()
    return tmp_path
