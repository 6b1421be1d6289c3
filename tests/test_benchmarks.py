"""The benchmark of the meta-gradient: its peers are right, a wrong one is not timed, and the limit is counted right."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from benchmarks import peers
from benchmarks.maml import ROOT, RefusedError, Runner, chosen, exact, installed, summary
from benchmarks.problem import Problem
from benchmarks.report import fastest
from benchmarks.workloads import TINY, WORKLOADS, make, of

STOCK = "torch.func, torch.nn's own layers"
HERE = {method: peer for peer in ("metakern", "torch_func") for method in peers.load(peer).methods if method != STOCK}


@pytest.mark.parametrize("name", [name for name in TINY if name not in ("lstm-small", "gpt-long")])
@pytest.mark.parametrize("method", HERE)
def test_methods_of_this_environment_are_exact(name, method):
    work = make(name, tiny=True)
    problem = work.problem(name, True, exact(work))
    step = peers.load(HERE[method]).methods[method](work)
    step()
    assert problem.error(step()) < 1e-6  # at the second call too: nothing accumulates


def test_the_limit_counts_the_products():
    work = make("lstm", tiny=True)  # vocabulary 29, embedding 6, hidden 7, 2 sequences of 5, 3 tasks, K=2
    forward = 2 * (2 * 5) * (6 * 28 + 7 * 28 + 7 * 29)
    assert work.flop() == 3 * (9 * 2 + 3) * forward
    gpt = make("gpt", tiny=True)  # 12 wide, 2 layers
    linear = 2 * (2 * 5) * (2 * 12 * (3 + 1 + 4 + 4) * 12 + 12 * 29)
    attention = 2 * 2 * (2 * 2 * 5 * 5 * 12)
    assert gpt.flop() == 3 * (9 * 2 + 3) * (linear + attention)


def test_a_problem_is_the_same_workload(tmp_path):
    work = make("gpt", tiny=True)
    torch.nn.init.normal_(work.model.head.weight)  # not what the seed gives
    truth = exact(work)
    work.problem("gpt", True, truth).save(tmp_path / "problem.npz")
    problem = Problem.load(tmp_path / "problem.npz")
    again = of(problem)
    assert (again.steps, again.lr, problem.heads, problem.tiny) == (work.steps, work.lr, 2, True)
    assert problem.error(exact(again)) == 0
    off = {name: g * (1 + 1e-3) for name, g in truth.items()}
    assert problem.error(off) == pytest.approx(1e-3)
    with pytest.raises(ValueError, match="must name"):
        problem.error(dict(list(truth.items())[1:]))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "scale", "reason"),
    [("torch.func, reverse over reverse", 1.01, "wrong by 1e-02"), (STOCK, 1, "RuntimeError")],
)
def test_what_is_wrong_or_fails_is_not_timed(tmp_path, method, scale, reason):
    work, file = make("lstm", tiny=True), tmp_path / "problem.npz"
    work.problem("lstm", True, {name: scale * g for name, g in exact(work).items()}).save(file)
    with pytest.raises(RefusedError, match=reason):
        Runner("torch_func", method, file, file, threads=1, limit=100)


@pytest.mark.slow
def test_a_peer_that_is_not_installed_says_why(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(peers.load("higher"), "requirements", ("--no-index metakern-no-such-package",))
    with pytest.raises(RefusedError, match=r"not installed: pip install .* Could not find a version"):
        installed("higher")


def test_ratios_are_those_within_a_round():
    seconds = {"products": [1e-3, 2e-3, 4e-3], "plain PyTorch": [2.0, 6.0, 9.0], "metakern auto": [1.0, 2.0, 1.0]}
    methods = {"plain PyTorch": "plain", "metakern auto": "metakern", "learn2learn": "learn2learn"}
    found = summary(seconds, {method: {} for method in methods}, methods, flop=2 * 2 * 1024**3)
    assert found["limit_ms"] == 4
    row = found["methods"]["plain PyTorch"]
    assert (row["median_ms"], row["over_auto"], row["speedup"]) == (6e3, 3, 1)
    assert row["of_limit"] == pytest.approx(8e-3 / 9)
    assert found["methods"]["metakern auto"]["speedup"] == 3
    assert "learn2learn" not in found["methods"]


def test_methods_are_chosen_by_words():
    assert set(chosen("JAX, higher").values()) == {"jax", "higher"}
    assert len(chosen("")) == sum(len(peers.load(peer).methods) for peer in peers.PEERS)
    with pytest.raises(ValueError, match="got 'betty'"):
        chosen("metakern,betty")


def test_each_peer_shows_its_fastest_form():
    times = {"a, slow": ("a", 3), "metakern store": ("metakern", 2), "a": ("a", 1), "metakern auto": ("metakern", 4)}
    rows = {method: {"peer": peer, "median_ms": time} for method, (peer, time) in times.items()}
    assert list(fastest(rows)) == ["a", "metakern store", "metakern auto"]


@pytest.mark.slow
def test_the_command(tmp_path):
    out = tmp_path / "maml.json"
    out.write_text(json.dumps({"gpt": "kept"}))
    options = [
        "--tiny",
        "--workloads",
        "mlp",
        "--methods",
        "plain",
        "--rounds",
        "2",
        "--threads",
        "1",
        "--out",
        str(out),
    ]
    command = [sys.executable, "-m", "benchmarks.maml", *options, "--quick"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    results = json.loads(out.read_text())
    assert results["gpt"] == "kept"
    row = results["mlp"]["methods"]["plain PyTorch"]
    assert row["error"] < 1e-6
    assert 0 < row["min_ms"] <= row["median_ms"] <= row["max_ms"]
    assert "plain PyTorch" in printed
    failed = subprocess.run([*command[:3], "--workloads", "cnn"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert failed.returncode == 2
    assert "got 'cnn'" in failed.stderr


def test_workloads_have_a_tiny_form_of_the_same_model():
    assert TINY.keys() == WORKLOADS.keys()
    for name in WORKLOADS:
        large, small = (make(name, tiny).model for tiny in (False, True))
        assert large.state_dict().keys() == small.state_dict().keys()
    work = replace(make("mlp", tiny=True), steps=4)
    assert of(work.problem("mlp", True)).steps == 4
