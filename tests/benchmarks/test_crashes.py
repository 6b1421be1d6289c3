"""The command that kills and hinders trainings: a few trials, and a fault that it finds."""

import json
import sys

import pytest

from benchmarks import crashes


@pytest.mark.slow
def test_a_run_that_was_killed_or_hindered_ends_as_if_nothing_had_happened(tmp_path):
    command = [sys.executable, "-m", "benchmarks.crashes", "--out", tmp_path / "crashes.json"]
    command += ["--only", "kill,full,limit,clock,adapt,eval", "--every", "60"]
    said = crashes.subprocess.run(command, capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stdout + said.stderr
    found = json.loads((tmp_path / "crashes.json").read_text())
    assert found.keys() == {"kill", "full", "limit", "clock", "adapt", "eval"}
    assert all(entry["trials"].keys() == {"right"} for entry in found.values())


def test_a_difference_in_a_bit_is_one():
    x = crashes.torch.zeros(3)
    y = x.clone()
    y[1] = -0.0
    assert crashes.same([{"x": x, "seconds": 1.0}], [{"x": x.clone(), "seconds": 2.0}])
    assert not crashes.same({"x": x}, {"x": x + 1e-30})
    assert not crashes.same({"x": x}, {"y": x})
    assert not crashes.same({"x": x.numpy().tobytes()}, {"x": y.numpy().tobytes()})


def test_the_shim_kills_in_the_middle_of_a_write(tmp_path):
    for at, size in ((1, 2), (2, 4)):
        child = crashes.os.fork()
        if not child:
            crashes.io.os = crashes.Shim(crashes.kill_at(at))
            crashes.io.write(tmp_path / "file", b"data")
        assert crashes.os.waitstatus_to_exitcode(crashes.os.waitpid(child, 0)[1]) == -9
        (left,) = tmp_path.iterdir()
        assert left.stat().st_size == size
        left.unlink()
