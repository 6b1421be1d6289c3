"""Kernels are compared with the reference at their first use; wrong ones are switched off, and say so."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as fwd
from installing import ROOT
from torch import Tensor

import metakern as mk
from metakern import io
from metakern.ops import SPECS
from metakern.ops.core import selfcheck
from metakern.ops.core.rules import Rules
from metakern.ops.core.spec import Make

BACKENDS = [name for name in ("cpu", "triton") if mk.backends()[name].startswith("available")]
CHECKED = [
    pytest.param(name, spec.op.kernels[name], spec, dtype, id=f"{name}-{op}-{dtype}".replace("torch.", ""))
    for name in BACKENDS
    for op, spec in SPECS.items()
    for dtype in (torch.float32, torch.float64, torch.bfloat16)
    if name in spec.op.kernels and dtype in (spec.op.kernels[name].dtypes or {dtype})
]
needs_kernels = pytest.mark.skipif("cpu" not in BACKENDS, reason="there are no C++ kernels")


@pytest.fixture(autouse=True)
def no_verdicts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Begin without verdicts, in memory and on the disk. Returns a function that forgets those in memory."""
    monkeypatch.setattr(io, "cache_folder", lambda: tmp_path)

    def forget() -> None:
        monkeypatch.setattr(selfcheck, "_faults", {})
        monkeypatch.setattr(selfcheck, "_OPEN", [])
        selfcheck._of.cache_clear()

    forget()
    yield forget
    selfcheck._of.cache_clear()


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """Put a fault into rules of an op's C++ kernels; the list that is returned grows with each call of the rule."""

    def planted(op: str, rule: str, fault: Callable[[Any], Any]) -> list[int]:
        kernels: Any = SPECS[op].op.kernels
        right: Rules = kernels["cpu"]
        calls: list[int] = []

        def wrong(*args: Any) -> Any:
            calls.append(threading.get_ident())
            return fault(getattr(right, rule)(*args))

        monkeypatch.setitem(kernels, "cpu", replace(right, **{rule: wrong}))
        return calls

    return planted


def scaled(values: Any) -> Any:
    """The values of a rule, of which the first tensor is a hundredth too large."""
    first, *rest = values
    return (scaled(first), *rest) if isinstance(first, tuple) else (first * 1.01, *rest)


def lines(folder: Path) -> list[dict[str, Any]]:
    (file,) = (folder / "kernels").iterdir()
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize(("name", "rules", "spec", "dtype"), CHECKED)
def test_right_kernels_pass(name: str, rules: Rules, spec: Any, dtype: torch.dtype) -> None:
    assert selfcheck._checked(spec, rules, torch.device("cpu"), dtype) == selfcheck.GOOD


@needs_kernels
@pytest.mark.parametrize("op", ["silu", "linear", "lstm"])
@pytest.mark.parametrize(
    ("rule", "what"),
    [
        ("forward", "outputs are wrong"),
        ("jvp", "derivatives in forward mode are wrong"),
        ("vjp", "derivatives are wrong"),
        ("vjp_jvp", "second derivatives are wrong"),
    ],
)
def test_a_wrong_rule_is_switched_off(
    rule: str, what: str, op: str, plant: Any, no_verdicts: Any, tmp_path: Path
) -> None:
    plant(op, rule, scaled)
    spec = SPECS[op]
    sample = spec.samples(Make(torch.float32))[0]
    for time in ("checked", "known to a later process"):
        no_verdicts()
        with pytest.warns(
            UserWarning, match=f"{op}: its cpu kernels are switched off for float32 on .*, since .*{what}"
        ):
            y = torch.utils._pytree.tree_leaves(spec.call(*sample.args, **sample.kwargs))
        expected = torch.utils._pytree.tree_leaves(spec.plain(*sample.args, **sample.kwargs))
        torch.testing.assert_close(y, expected)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # one warning is enough
            spec.call(*sample.args, **sample.kwargs)
        assert mk.backends()["cpu"] == f"available, except for {op} in float32, whose {what}", time
    assert [line["found"] for line in lines(tmp_path) if line["op"] == op] == ["begun", what]


@needs_kernels
def test_a_check_runs_once_for_each_dtype(plant: Any, no_verdicts: Any) -> None:
    calls = plant("silu", "vjp", lambda values: values)
    for dtype in (torch.float32, torch.float64):
        for _ in range(3):
            mk.ops.silu(torch.ones(3, dtype=dtype))
    assert len(calls) == 2
    assert threading.get_ident() not in calls
    no_verdicts()
    mk.ops.silu(torch.ones(3))
    assert len(calls) == 2  # the verdict was kept
    assert mk.backends()["cpu"] == "available"


@needs_kernels
def test_a_backend_chosen_by_hand_is_not_checked(plant: Any, tmp_path: Path) -> None:
    plant("silu", "forward", scaled)
    with mk.backend("cpu"):
        y = mk.ops.silu(torch.ones(3))
    torch.testing.assert_close(y, torch.nn.functional.silu(torch.ones(3)) * 1.01)
    assert not list(tmp_path.iterdir())


@needs_kernels
def test_an_error_is_not_kept(plant: Any, no_verdicts: Any, tmp_path: Path) -> None:
    def failing(values: Any) -> Any:
        raise OSError("no compiler\nis here")

    plant("silu", "jvp", failing)
    for _ in range(2):
        no_verdicts()
        with pytest.warns(UserWarning, match="since their check raises OSError: no compiler is here"):
            torch.testing.assert_close(mk.ops.silu(torch.ones(3)), torch.nn.functional.silu(torch.ones(3)))
        assert "silu in float32, whose check raises OSError" in mk.backends()["cpu"]
    assert [line["found"] for line in lines(tmp_path)] == ["begun", "ended by an error"] * 2


@needs_kernels
def test_ctrl_c_during_a_check_ends_it_without_a_verdict(plant: Any, tmp_path: Path) -> None:
    def interrupted(values: Any) -> Any:
        raise KeyboardInterrupt

    plant("silu", "jvp", interrupted)
    with pytest.raises(KeyboardInterrupt):
        mk.ops.silu(torch.ones(3))
    assert [line["found"] for line in lines(tmp_path)] == ["begun", "ended by an error"]


CRASH = """
import os, signal, sys
from dataclasses import replace
from pathlib import Path
import torch
import metakern as mk
from metakern import io
from metakern.ops import SPECS

io.cache_folder = lambda: Path(sys.argv[1])
kernels = SPECS["silu"].op.kernels
kernels["cpu"] = replace(kernels["cpu"], vjp_jvp=lambda *args: os.kill(os.getpid(), signal.SIGKILL))
print(mk.ops.silu(torch.ones(3)).sum().item(), mk.backends()["cpu"])
"""


@needs_kernels
@pytest.mark.slow
def test_kernels_whose_check_ends_processes_are_switched_off(tmp_path: Path) -> None:
    command = [sys.executable, "-c", CRASH, str(tmp_path)]
    for _ in range(3):
        ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
        assert ended.returncode == -signal.SIGKILL, ended.stderr
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=True)
    assert result.stdout.startswith("2.193")
    assert "available, except for silu in float32, whose check has ended 3 processes" in result.stdout
    assert "silu: its cpu kernels are switched off" in result.stderr


@needs_kernels
@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[1]\n{}\n" + b"[" * 100_000, b'{"op": 1, "backend": "cpu"}\n'])
def test_a_damaged_file_of_verdicts_is_checked_anew(
    content: bytes, plant: Any, no_verdicts: Any, tmp_path: Path
) -> None:
    calls = plant("silu", "vjp", lambda values: values)
    mk.ops.silu(torch.ones(3))
    (file,) = (tmp_path / "kernels").iterdir()
    file.write_bytes(content)
    no_verdicts()
    mk.ops.silu(torch.ones(3))
    assert len(calls) == 2


@needs_kernels
def test_without_a_cache_each_process_checks(plant: Any, no_verdicts: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(io, "cache_folder", lambda: Path(os.devnull) / "metakern")
    calls = plant("silu", "vjp", scaled)
    for count in (1, 2):
        no_verdicts()
        with pytest.warns(UserWarning, match="switched off"):
            mk.ops.silu(torch.ones(3))
        assert len(calls) == count


def contexts() -> Iterator[Any]:
    x = torch.linspace(-2, 2, 6)
    expected = torch.nn.functional.silu(x)

    def vmapped() -> Tensor:
        return torch.func.vmap(mk.ops.silu)(x)

    def differentiated() -> Tensor:
        return torch.func.grad(lambda x: mk.ops.silu(x).sum())(x)

    def dual() -> Tensor:
        with fwd.dual_level():
            return fwd.unpack_dual(mk.ops.silu(fwd.make_dual(x, torch.ones(6)))).tangent

    def inference() -> Tensor:
        with torch.inference_mode():
            return mk.ops.silu(x)

    def autocast() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return mk.ops.silu(x)

    def deterministic() -> Tensor:
        torch.use_deterministic_algorithms(True)
        try:
            return mk.ops.silu(x)
        finally:
            torch.use_deterministic_algorithms(False)

    def doubles() -> Tensor:
        torch.set_default_dtype(torch.float64)
        try:
            return mk.ops.silu(x)
        finally:
            torch.set_default_dtype(torch.float32)

    def device() -> Tensor:
        with torch.device("meta"):
            return mk.ops.silu(x)

    slope = torch.func.grad(lambda x: torch.nn.functional.silu(x).sum())(x)
    for call in (vmapped, inference, autocast, deterministic, doubles, device):
        yield pytest.param(call, expected, id=call.__name__)
    for call in (differentiated, dual):
        yield pytest.param(call, slope, id=call.__name__)


@needs_kernels
@pytest.mark.parametrize(("call", "expected"), list(contexts()))
@pytest.mark.parametrize("wrong", [False, True], ids=["right", "wrong"])
def test_the_state_of_the_caller_does_not_reach_a_check(
    call: Any, expected: Tensor, wrong: bool, plant: Any, recwarn: Any
) -> None:
    plant("silu", "vjp_jvp", scaled if wrong else lambda values: values)
    before = torch.get_rng_state()
    torch.testing.assert_close(call(), expected, check_dtype=False)
    assert torch.equal(torch.get_rng_state(), before)
    assert sum("switched off" in str(warning.message) for warning in recwarn) == wrong


@needs_kernels
def test_an_op_from_elsewhere_is_not_checked(tmp_path: Path) -> None:
    op = replace(SPECS["silu"].op, kernels=dict(SPECS["silu"].op.kernels))
    torch.testing.assert_close(op(torch.ones(1, 3))[0], torch.nn.functional.silu(torch.ones(1, 3)))
    assert not list(tmp_path.iterdir())
