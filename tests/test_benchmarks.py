"""The benchmarks: peers are right, what is wrong is not timed, limits are counted right, and the one for GPUs runs."""

import json
import os
import pickle
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial

import pytest
import torch

import metakern as mk
from benchmarks import peers
from benchmarks.calls import RULES, Shapes, function, recorded
from benchmarks.gpu import attention, checks, llama, ops, recurrent
from benchmarks.gpu.__main__ import PARTS
from benchmarks.gpu.pool import MEMORY, Job, Pool, run
from benchmarks.gpu.problems import LARGE, Random, cast, enlarged, samples
from benchmarks.gpu.targets import STREAMED, failures, targets
from benchmarks.maml import ROOT, RefusedError, Runner, chosen, exact, installed, summary
from benchmarks.problem import Problem
from benchmarks.report import fastest
from benchmarks.workloads import TINY, WORKLOADS, make, of
from metakern.ops import SPECS
from metakern.ops._spec import Make

STOCK = "torch.func, torch.nn's own layers"
triton = pytest.mark.skipif(mk.backends()["triton"] != "available", reason=mk.backends()["triton"])
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


@pytest.mark.parametrize("op", LARGE)
def test_large_problems_of_a_gpu_fit_their_op(op):
    for draw in LARGE[op].values():
        sample = draw(Shapes())
        with mk.backend("reference"):
            assert SPECS[op].call(*sample.args, **sample.kwargs).is_meta
        assert all(SPECS[op].cost(sample, order).bytes > 1e5 for order in range(3))


@triton
def test_every_row_of_a_gpu_can_be_sent_to_a_process():
    limits = {"copy_gb_per_s": 2, "bf16_tflop_per_s": 1}
    for jobs, _ in PARTS.values():
        labels = [pickle.loads(pickle.dumps(job)).label for job in jobs(limits, False)]
        assert len({json.dumps(label) for label in labels}) == len(labels)


def first_of_each(jobs):
    """A job for each op, and one for each that is tried beyond 32 bits."""

    def kind(label):
        return label.get("op", str(label)), label.get("sample") == checks.BEYOND

    return list({kind(job.label): job for job in reversed(list(jobs))}.values())


@triton
@pytest.mark.slow
@pytest.mark.parametrize("part", [checks.jobs, llama.checks, recurrent.checks], ids=["ops", "llama", "recurrent"])
def test_checks_of_a_gpu_run_without_one(part):
    for job in first_of_each(part(True)):
        row, _ = run(job)
        assert row["good"], row


@triton
@pytest.mark.slow
@pytest.mark.parametrize(
    "part",
    [
        attention.jobs,
        attention.memory_jobs,
        llama.jobs,
        partial(ops.jobs, {"copy_gb_per_s": 2, "bf16_tflop_per_s": 1}),
        recurrent.jobs,
    ],
    ids=["attention", "memory", "llama", "ops", "recurrent"],
)
def test_times_of_a_gpu_run_without_one(part):
    for job in first_of_each(part(True)):
        row, _ = run(job)
        assert "error" not in row, row


def test_calls_of_flash_attention_fit_pytorch():
    sample = attention.draw(1, 2, 64, 32, torch.bfloat16)
    calls = attention.flash(sample, torch.device("meta"))
    assert [t.shape for t in calls["flash_backward"]()] == [t.shape for t in sample.args]


@triton
def test_a_wrong_rule_a_reference_and_chance_are_no_good_check():
    x = Random(torch.float32, seed=1)(2, 40).double()
    plain = SPECS["silu"].plain

    def first_order(x):
        x0 = x.detach()
        s = torch.sigmoid(x0)
        return mk.ops.silu(x0) + (x - x0) * s * (1 + x0 * (1 - s))

    def good(op):
        row = checks.compare("triton", [checks.Problem(op, plain, plain, [x])], "float32")
        return row["good"], row["repeats"], row["backends"]

    assert good(mk.ops.silu) == (True, True, ["triton"])
    assert good(lambda x: mk.ops.silu(x) * (1 + 1e-6)) == (False, True, ["triton"])
    assert good(first_order) == (False, True, ["triton"])
    assert good(lambda x: x * torch.sigmoid(x)) == (False, True, [])
    assert good(lambda x: mk.ops.silu(x) * (1 + 1e-7 * torch.rand(()))) == (False, False, ["triton"])


def test_tangents_put_together_are_those_of_forward_mode():
    spec = SPECS["swiglu"]
    f, x = function(spec.call, spec.samples(Make())[0])
    for a, b in zip(checks.results(f, x, torch.float64), checks.results(f, x, torch.float64, False), strict=True):
        torch.testing.assert_close(a, b)


@triton
def test_rules_are_recorded_with_all_they_can_be_called_with():
    sample = cast(samples("silu", True)["matrix"](Random(torch.float32, seed=1)), torch.float32)
    calls = recorded("silu", sample, "triton")
    assert list(calls) == list(RULES)
    (y,), _ = calls["forward"]()
    torch.testing.assert_close(y, torch.nn.functional.silu(sample.args[0]).reshape(y.shape))
    tensors = torch.utils._pytree.tree_leaves(calls["vjp_jvp"].args[1:])
    assert sum(isinstance(t, torch.Tensor) for t in tensors) == 4  # x, t_x, ct_y, t_ct_y


def test_tasks_are_repeated_and_what_they_share_is_not():
    sample = SPECS["lora_linear"].benchmark(Make(torch.bfloat16))[0]
    large = enlarged(sample, 1 << 26)
    tasks = [len(t) // len(s) for s, t in zip(sample.args, large.args, strict=True) if isinstance(s, torch.Tensor)]
    assert tasks == [16, 1, 16, 16]
    assert enlarged(sample, 1) is sample


def test_targets_name_ops():
    assert set(STREAMED) - SPECS.keys() <= {"adam_update"}


@pytest.mark.slow
def test_a_row_that_fails_costs_no_other(monkeypatch):
    monkeypatch.setattr("benchmarks.gpu.pool.LIMIT", 20)
    made = {"ends": partial(os._exit, 3), "bad": partial(int, "x"), "good": partial(dict, ms=1)}
    with Pool() as pool:
        rows = {row["name"]: row for row in pool.rows([Job({"name": name}, f) for name, f in made.items()])}
        monkeypatch.setattr("benchmarks.gpu.pool.LIMIT", 0.2)
        (hung,) = pool.rows([Job({}, partial(time.sleep, 60))])
        pool.deadline = time.monotonic()
        (late,) = pool.rows([Job({}, dict)])
    assert rows["good"] == {"name": "good", "ms": 1}
    assert "ValueError" in rows["bad"]["error"]
    assert rows["ends"]["error"] == "the process ended with exit code 3"
    assert hung["error"].startswith("no result after")
    assert late["error"] == "the time is up"


def test_what_runs_out_of_memory_beside_others_runs_again_alone(monkeypatch):
    at_once = []

    def row(pool, job):
        at_once.append(job.label["name"])
        return job.label | ({"error": MEMORY} if at_once.count("large") == 1 and job.label["name"] == "large" else {})

    monkeypatch.setattr(Pool, "_row", row)
    jobs = [Job({"name": name}, dict) for name in ("large", "small")]
    assert sorted(row["name"] for row in Pool().rows(jobs, 2) if "error" not in row) == ["large", "small"]
    assert at_once.count("large") == 2
    monkeypatch.setattr(Pool, "_row", lambda pool, job: job.label | {"error": MEMORY})
    assert [row["error"] for row in Pool().rows(jobs)] == [MEMORY] * 2


def test_targets_of_a_gpu_are_met_by_the_worst_value():
    rates = {"vjp_jvp_of_flash_backward": 0.5, "jvp_of_flash_forward": 0.7}
    rules = {rule: {"of_copy": 0.9} for rule in RULES}
    llama = {"sequences": 1, "length": 8}
    found = {
        "machine": {"gpu": "none"},
        "attention": [{"length": 8, "head": 4} | rates, {"length": 16, "head": 4} | rates],
        "memory": [{"length": 8, "kib_per_token": 2.0}, {"length": 32, "kib_per_token": 2.1}],
        "meta": [
            {"peer": "metakern", "tasks": 1, "ms": 2.0} | llama,
            {"peer": "plain", "tasks": 1, "ms": 8.0} | llama,
            {"peer": "metakern", "tasks": 2, "ms": 2.0} | llama,
            {"peer": "plain", "tasks": 2, "error": MEMORY} | llama,
        ],
        "ops": [{"op": "silu", "sample": "a", "dtype": "float32"} | rules],
    }

    def values():
        return [(row["value"], row["met"]) for row in targets(found)]

    assert values() == [(0.5, True), (0.7, True), (1.05, True), (4, True), (1, True), (0.9, True)]
    assert not failures(found)
    found["attention"][1]["jvp_of_flash_forward"] = 0.5
    found["memory"][1]["kib_per_token"] = 8.0
    found["meta"][1]["ms"] = 5.0
    del found["meta"][2]["ms"]
    found["ops"][0]["vjp"] = {"of_copy": 0.8}
    assert values() == [(0.5, True), (0.5, False), (4, False), (2.5, False), (0, False), (0.8, False)]
    assert targets(found)[1]["where"] == "length 16, head 4"
    found["attention"][0] = {"length": 8, "head": 4, "error": "it broke"}
    found["checks"] = [{"op": "silu", "good": False}, {"op": "gelu", "good": True}]
    assert values()[:2] == [(None, False)] * 2
    assert [row.get("op", row.get("error")) for row in failures(found)] == ["it broke", "silu"]
    assert all(not row["met"] for row in targets({}))


@pytest.mark.slow
def test_the_command_for_gpus(tmp_path):
    out = tmp_path / "gpu.json"
    out.write_text(json.dumps({"memory": [{"length": 4, "kib_per_token": 1.0}], "checks": [{"good": False}]}))
    command = [sys.executable, "-m", "benchmarks.gpu", "--tiny", "--out", str(out), "--only"]
    result = subprocess.run([*command, "meta"], cwd=ROOT, capture_output=True, text=True, check=False)
    found = json.loads(out.read_text())
    assert result.returncode == 1, result.stderr  # the check that it found there
    assert len(found["memory"]) == 1
    assert {row["peer"] for row in found["meta"] if row["ms"] > 0} == {"metakern", "plain"}
    assert "Llama's meta-step" in result.stdout
    failed = subprocess.run([*command, "all"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert failed.returncode == 2
    assert "got 'all'" in failed.stderr
