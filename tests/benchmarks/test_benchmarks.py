"""The benchmarks: methods are checked before they are timed, FLOP are counted right, and the GPU benchmark runs."""

import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from functools import cache, partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import metakern as mk
from benchmarks import compat, maml, peers, progress, results, workloads
from benchmarks.calls import RULES, Shapes, function, recorded
from benchmarks.gpu import attention, checks, engine, llama, ops, recurrent
from benchmarks.gpu import products as gpu_products
from benchmarks.gpu.__main__ import PARTS
from benchmarks.gpu.pool import MEMORY, Job, Pool, run
from benchmarks.gpu.problems import LARGE, Random, cast, enlarged, samples
from benchmarks.gpu.targets import STREAMED, failures, targets
from benchmarks.maml import chosen, of_sweep, parsed, summary, swept
from benchmarks.peers import products
from benchmarks.peers.plain import first_order, plain
from benchmarks.problem import Problem
from benchmarks.results import ROOT
from benchmarks.runner import RefusedError, Runner, installed
from benchmarks.truth import exact, with_truth
from benchmarks.workloads import WorkloadName, families, make, of
from metakern.ops import SPECS
from metakern.ops.core.spec import Make

STOCK = "torch.func, torch.nn's own layers"
triton = pytest.mark.skipif(mk.backends()["triton"] != "available", reason=mk.backends()["triton"])
LOCAL = ("plain", "metakern", "torch_func", "compat")
HERE = {method: peer for peer in LOCAL for method in peers.load(peer).methods if method != STOCK}


@cache
def problem(family):
    """Return the tiny problem of a family, with the exact meta-gradient and the first-order one."""
    name = f"{family}:tiny"
    return make(name).problem(name, **dict(zip(("truth", "first"), exact(make(name)), strict=True)))


@pytest.mark.parametrize("family", families())
@pytest.mark.parametrize("method", HERE)
def test_methods_of_this_environment_are_exact(family, method):
    step = peers.load(HERE[method]).methods[method](of(problem(family)))
    step()
    gradient = {name: g.detach() for name, g in step().items()}  # of the second call: gradients must not accumulate
    error, other = (problem(family).error(gradient, order) for order in (peers.order(method), 3 - peers.order(method)))
    assert error < (0.02 if peers.precision(method) == "bfloat16" else 1e-6)
    assert other > 1e-2  # and not the gradient of the other order
    assert other > 2 * error
    assert problem(family).cosine(gradient, peers.order(method)) > 0.9998


@pytest.mark.parametrize(
    ("library", "case"), [(library, case) for library in compat.CASES for case in compat.CASES[library]]
)
def test_the_loops_that_are_compared_with_the_original_libraries_learn(library, case, monkeypatch):
    monkeypatch.setattr(compat, "OUTER_STEPS", 2)
    losses, *learned = compat.trajectory(library, case, original=False)
    assert losses.shape == (2 * compat.TASKS,)
    assert all(value.isfinite().all() for value in (losses, *learned))
    monkeypatch.setattr(compat, "OUTER_STEPS", 1)
    moved = [not torch.equal(a, b) for a, b in zip(learned, compat.trajectory(library, case, False)[1:], strict=True)]
    assert sum(moved) > len(moved) / 2


def test_a_difference_from_the_original_library_is_an_error(monkeypatch):
    found = {"same": 1e-16, "other": 2e-6}
    monkeypatch.setattr(
        compat.subprocess, "run", lambda *a, **k: SimpleNamespace(returncode=0, stdout=json.dumps(found))
    )
    monkeypatch.setattr(peers, "environment", lambda peer: sys.executable)
    with pytest.raises(RuntimeError, match="higher: other differs from the original by 2e-06 after 20 outer steps"):
        compat.check("higher")
    found["other"] = 1e-7
    assert compat.check("higher") == found


@pytest.mark.parametrize("family", families())
def test_exact_meta_gradients_are_those_of_plain_autograd(family, monkeypatch):
    monkeypatch.setattr("benchmarks.truth.TOKENS", 5)  # one sequence at a time
    work = make(f"{family}:tiny")
    for gradient, step in zip(exact(work), (plain, first_order), strict=True):
        found = step(work.double())()
        assert gradient.keys() == found.keys()
        for name, g in gradient.items():
            torch.testing.assert_close(g, found[name], rtol=1e-10, atol=1e-12)


@pytest.mark.slow
def test_exact_meta_gradients_are_computed_once_and_cached(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    name = "mlp:tiny,K=1"
    found = with_truth(make(name).problem(name))
    np.testing.assert_allclose(found.truth["0.weight"], exact(make(name))[0]["0.weight"], rtol=1e-5)
    monkeypatch.setattr(subprocess, "run", None)
    again = with_truth(make(name).problem(name))
    assert np.array_equal(again.first["0.weight"], found.first["0.weight"])
    with pytest.raises(TypeError):
        with_truth(make("mlp:tiny,K=2").problem("mlp:tiny,K=2"))


def test_flop_of_a_workload_are_those_of_its_products():
    work = make("lstm:tiny")  # vocabulary 29, embedding 6, hidden 7, 2 sequences of 5, 3 tasks, K=2
    forward = 2 * (2 * 5) * (6 * 28 + 7 * 28 + 7 * 29)
    assert work.flop() == 3 * (9 * 2 + 3) * forward
    assert work.flop(order=1) == 3 * (3 * 2 + 3) * forward
    gpt = make("gpt:tiny")  # 12 wide, 2 layers
    linear = 2 * (2 * 5) * (2 * 12 * (3 + 1 + 4 + 4) * 12 + 12 * 29)
    attention = 2 * 2 * (2 * 2 * 5 * 5 * 12)
    assert gpt.flop() == 3 * (9 * 2 + 3) * (linear + attention)
    llama = make("llama-lora:tiny")  # 16 wide, 24 inside, 4 heads over 2, 2 layers, rank 3 on q and v
    frozen = 2 * (2 * 5) * (2 * 16 * (16 + 8 + 8 + 16 + 3 * 24) + 16 * 29)
    factors = 2 * (2 * 5) * 2 * 3 * (16 + 16 + 16 + 8)
    attention = 2 * 2 * (2 * 2 * 5 * 5 * 16)
    assert llama.flop() == 3 * ((9 * 2 + 3) * (factors + attention) + (4 * 2 + 2) * frozen)
    assert llama.flop(order=1) == 3 * ((3 * 2 + 3) * (factors + attention) + (2 * 2 + 2) * frozen)


def test_a_saved_problem_gives_the_same_workload(tmp_path):
    work = make("llama-lora:tiny,K=1")
    torch.nn.init.normal_(work.model.head.weight)  # not what the seed gives
    truth, first = exact(work)
    work.problem("llama-lora:tiny,K=1", truth=truth, first=first).save(tmp_path / "problem.npz")
    problem = Problem.load(tmp_path / "problem.npz")
    again = of(problem)
    assert (again.steps, again.lr, problem.settings["kv_heads"]) == (1, work.lr, 2)
    assert set(problem.theta) == {
        f"blocks.{i}.{layer}.lora_{part}" for i in range(2) for layer in "qv" for part in "AB"
    }
    assert problem.error(exact(again)[0]) == 0
    assert problem.error(exact(again)[1], order=1) == 0
    off = {name: g * (1 + 1e-3) for name, g in truth.items()}
    assert problem.error(off) == pytest.approx(1e-3)
    with pytest.raises(ValueError, match="must name"):
        problem.error(dict(list(truth.items())[1:]))


def test_names_of_workloads_are_parsed():
    assert WorkloadName.parse("gpt").name == "gpt:medium"
    long = WorkloadName.parse("gpt:small,length=1024,tasks=1")
    assert (long.sizes["length"], long.sizes["tasks"], long.sizes["width"]) == (1024, 1, 64)
    assert WorkloadName.parse(long.name) == long
    assert WorkloadName.parse(long.changed(tasks=2).name).sizes["tasks"] == 2
    assert WorkloadName.parse("mlp,widths=3+4").sizes["widths"] == [3, 4]
    assert "MLP 3-4, 32 tasks" in WorkloadName.parse("mlp,widths=3+4").title
    assert [spec.name for spec in parsed("mlp,gpt:large,K=2,tasks=1,lstm; rnn")] == [
        *("mlp:medium", "gpt:large,K=2,tasks=1", "lstm:medium", "rnn:medium")
    ]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("cnn", "family must be one of mlp, rnn, gru, lstm, gpt, llama-lora, llm-full, got 'cnn'"),
        ("gpt:huge", "size of gpt must be one of small, medium, large, tiny, got 'huge'"),
        (
            "lstm,width=3",
            "key of lstm must be one of vocabulary, embedding, hidden, length, sequences, tasks, K, got 'w",
        ),
        ("gpt,K=0", "K must be a positive integer, got '0'"),
        ("mlp,widths=3+x", "widths must be a positive integer, got 'x'"),
    ],
)
def test_unknown_workloads_are_errors(name, said):
    with pytest.raises(ValueError) as error:
        WorkloadName.parse(name)
    assert said in str(error.value)


@pytest.mark.parametrize("family", families())
def test_all_sizes_of_a_family_have_the_same_layers(family):
    small, large = (make(f"{family}:{size}") for size in ("tiny", "small"))
    layers = {name.replace("4.", "2.") if family == "mlp" else name for name in large.model.state_dict()}
    assert layers >= {name.replace("4.", "2.") if family == "mlp" else name for name in small.model.state_dict()}
    assert small.theta.keys() == {name for name in large.theta if name in small.theta}


def test_each_family_is_a_file_whose_keys_are_checked(tmp_path, monkeypatch):
    text = (workloads.FOLDER / "gpt.toml").read_text()
    monkeypatch.setattr(workloads, "FOLDER", tmp_path)
    (tmp_path / "mine.toml").write_text(text)
    assert families() == ["mine"]
    assert make("mine:tiny").problem("mine:tiny").settings["model"] == "gpt"
    for i, (old, new, said) in enumerate(
        [
            ("model = ", "modell = ", "keys must be .*, got 'modell' unknown"),
            ('"gpt"', '"gtp"', "model must be one of mlp, .*, got 'gtp'"),
            ("heads = 4, ", "", "sizes of small must be .*, got 'heads' missing"),
            ("sequences = [", "batch = [", "sizes of sweep must be .*, got 'batch' unknown"),
        ]
    ):
        (tmp_path / f"wrong{i}.toml").write_text(text.replace(old, new))
        with pytest.raises(ValueError, match=said):
            WorkloadName.parse(f"wrong{i}")


def test_a_sweep_varies_one_size():
    base = WorkloadName.parse("gpt:small")
    points = swept("K,length", [base])
    assert [point.sizes["K"] for _, point in points[:5]] == [1, 2, 4, 8, 16]
    assert [point.sizes["length"] for _, point in points[5:]] == [64, 128, 256, 512, 1024, 2048]
    assert points[0][1].sizes["length"] == base.sizes["length"]
    assert swept("length", [WorkloadName.parse("mlp")]) == []
    with pytest.raises(ValueError, match="sweep must be of K, examples, length, sequences, tasks, width, got 'depth'"):
        swept("depth", [base])
    rows = {"JAX, vmap": {"peer": "jax", "median_ms": 1}, "JAX, task loop": {"peer": "jax", "median_ms": 2}}
    assert "JAX, vmap" in of_sweep(base, {"maml": {"gpt:small": {"methods": rows}}})
    assert maml.JAX in of_sweep(base, {})
    assert maml.JAX in peers.load("jax").methods


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "scale", "reason"),
    [("torch.func, reverse over reverse", 1.01, "wrong by 1e-02"), (STOCK, 1, "RuntimeError")],
)
def test_methods_that_are_wrong_or_fail_are_not_timed(tmp_path, method, scale, reason):
    work, file = make("lstm:tiny"), tmp_path / "problem.npz"
    work.problem("lstm:tiny", truth={name: scale * g for name, g in exact(work)[0].items()}).save(file)
    with pytest.raises(RefusedError, match=reason):
        Runner("torch_func", method, file, file, threads=1, limit=100)


@pytest.mark.slow
def test_a_method_that_hangs_or_is_killed_is_refused(tmp_path):
    file = tmp_path / "problem.npz"
    make("mlp:tiny").problem("mlp:tiny").save(file)
    with pytest.raises(RefusedError, match="not ready after 0 s"):
        Runner("plain", "plain PyTorch", file, file, threads=1, limit=0.1)
    runners = {name: Runner("plain", "plain PyTorch", file, file, threads=1, limit=100) for name in ("good", "bad")}
    refused = {}
    runners["bad"]._process.kill()
    with progress.Progress(6) as shown:
        seconds = maml.rounds("mlp:tiny", runners, 3, refused, shown)
    for runner in runners.values():
        runner.close()
    assert refused == {"bad": "out of memory, in round 1"}
    assert {name: len(times) for name, times in seconds.items()} == {"good": 3}
    assert (shown.done, shown.total) == (4, 4)


@pytest.mark.slow
def test_a_peer_that_cannot_be_installed_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(peers.load("higher"), "requirements", ("--no-index metakern-no-such-package",))
    with pytest.raises(RefusedError, match=r"not installed: pip install .* Could not find a version"):
        installed("higher")


def test_ratios_of_methods_are_taken_within_a_round():
    seconds = {"products": [1e-3, 2e-3, 4e-3], "plain PyTorch": [2.0, 6.0, 9.0], "metakern auto": [1.0, 2.0, 1.0]}
    seconds["metakern, first order"] = [0.5, 1.0, 0.25]
    seconds["metakern default"] = [2.0, 2.0, 2.0]
    seconds["metakern, bfloat16"] = [1.0, 1.0, 1.0]
    seconds |= {"peak, float32": [2.0, 0.5, 1.0], "peak, bfloat16": [0.25, 0.5, 0.25]}
    methods = dict.fromkeys(seconds, "peer") | {"learn2learn": "learn2learn"}

    class Work:
        def flop(self, order):
            return {1: 1, 2: 2}[order] * 2 * 1024**3

    found = summary(seconds, {method: {} for method in methods}, methods, Work())
    assert found["gflop_per_s"] == pytest.approx(2 * 1024**3 / 2e-3 / 1e9)
    assert found["peak_gflop_per_s"] == pytest.approx({"float32": 4 * 1024**3 / 1e9, "bfloat16": 8 * 1024**3 / 1e9})
    row = found["methods"]["plain PyTorch"]
    assert (row["median_ms"], row["over_auto"], row["over_default"], row["speedup"]) == (6e3, 3, 3, 1)
    assert row["of_peak"] == pytest.approx(1 / 6)  # of the best round
    assert row["gflop_per_s"] == pytest.approx(4 * 1024**3 / 6e9)
    assert found["methods"]["metakern, bfloat16"]["of_peak"] == pytest.approx(1 / 2)
    assert found["methods"]["metakern auto"]["speedup"] == 3
    assert found["methods"]["metakern auto"]["over_first_order"] == 2
    first = found["methods"]["metakern, first order"]
    assert first["gflop_per_s"] == pytest.approx(2 * 1024**3 / 0.5e9)
    assert "over_first_order" not in first
    assert "learn2learn" not in found["methods"]
    without = {method: times for method, times in seconds.items() if "peak" not in method}
    found = summary(without, {method: {} for method in methods}, methods, Work())
    assert found["peak_gflop_per_s"] == {}
    assert "of_peak" not in found["methods"]["plain PyTorch"]


@pytest.mark.slow
def test_the_rates_of_the_machine_are_those_of_as_many_operations(tmp_path):
    file, rates = tmp_path / "problem.npz", {}
    make("mlp:tiny").problem("mlp:tiny").save(file)
    for method in (products.PRODUCTS, products.PEAKS["float32"]):
        runner = Runner("products", method, file, file, threads=1, limit=100)
        try:
            rates[method] = products.FLOP / min(runner.sample() for _ in range(3))
        finally:
            runner.close()
    assert rates["products"] > 1e9
    assert 1e9 < rates["peak, float32"] < 1e12


def test_methods_are_chosen_by_words_of_their_names():
    assert set(chosen("JAX, higher").values()) == {"jax", "higher"}
    assert len(chosen("")) == sum(len(peers.load(peer).methods) for peer in peers.PEERS)
    with pytest.raises(ValueError, match="got 'betty'"):
        chosen("metakern,betty")


def test_results_are_stored_by_part_and_workload(tmp_path, monkeypatch):
    path = tmp_path / "results" / "cpu.json"
    results.keep(path, "maml", {"ms": 1}, "gpt:medium")
    results.keep(path, "maml", {"ms": 2}, "mlp:medium")
    results.keep(path, "attention", {"ms": 3})
    results.keep(path, "maml", {"ms": 4}, "gpt:medium")
    assert results.load(path) == {"maml": {"gpt:medium": {"ms": 4}, "mlp:medium": {"ms": 2}}, "attention": {"ms": 3}}
    with pytest.raises(TypeError):
        results.keep(path, "maml", {"ms": object()}, "gpt:medium")
    assert results.load(path)["maml"]["gpt:medium"] == {"ms": 4}
    assert os.listdir(path.parent) == ["cpu.json"]
    assert results.load(tmp_path / "none.json") == {}
    where = {"cpu": "Intel(R) Xeon(R) Platinum 8481C CPU @ 2.70GHz", "cores": 8}
    assert results.slug(where) == "intel-xeon-platinum-8481c-8c"
    assert results.slug({"cpu": "AMD EPYC 7B13 64-Core Processor", "cores": 2}) == "amd-epyc-7b13-2c"
    assert results.file(where) == results.FOLDER / "intel-xeon-platinum-8481c-8c.json"
    monkeypatch.setattr(results, "FOLDER", tmp_path / "none")  # as in an installed wheel
    assert str(results.file(where)) == "results/intel-xeon-platinum-8481c-8c.json"


@pytest.mark.skipif(not shutil.which("git"), reason="git is not installed")
def test_the_commit_is_the_last_that_changed_code(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "ROOT", tmp_path)
    assert results.machine()["commit"] == ""

    def git(*arguments):
        command = ["git", "-C", tmp_path, "-c", "user.name=n", "-c", "user.email=e", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    def commit(name, text):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_text(text)
        git("add", ".")
        git("commit", "-m", "why")
        return git("log", "-1", "--format=%h")

    git("init")
    assert commit("metakern/a.py", "1") == results.machine()["commit"]
    code = commit("benchmarks/worker.py", "1")
    for name in ("README.md", "benchmarks/RESULTS.md", "benchmarks/results/cpu.json", "benchmarks/report.py"):
        commit(name, "1")
    assert results.machine()["commit"] == code
    (tmp_path / "metakern/a.py").write_text("2")
    assert results.machine()["commit"] == f"{code}+"


def test_a_run_measures_what_earlier_runs_did_not(tmp_path, monkeypatch, capsys):
    out, measured, where = tmp_path / "maml.json", [], {"cpu": "none", "commit": "abc", "date": "today"}
    refused = {"reason": "wrong by 1e-02"}
    row = {"peer": "plain", "error": 0, "first_s": 1, "peak_mib": 1, "gflop_per_s": 1, "of_peak": 1}
    row |= {"median_ms": 1, "min_ms": 1, "max_ms": 1}

    def measure(spec, methods, args, progress):
        if spec.family == "gru":
            raise RuntimeError("no memory")
        if spec.family == "lstm" and not measured:
            raise KeyboardInterrupt
        measured.append(spec.name)
        found = {"machine": dict(where), "threads": args.threads, "rounds": args.rounds, "methods": {}, "refused": {}}
        found["methods"] = dict.fromkeys(list(methods)[1:], row)
        found["refused"] = dict.fromkeys(list(methods)[:1], refused["reason"])
        return found | {"gflop": 1, "gflop_per_s": 1, "peak_gflop_per_s": {}, "limit_s": args.limit}

    def command(*options):
        measured.clear()
        with pytest.raises(SystemExit) as end:
            maml.main(["--out", str(out), *options])
        return end.value.code, list(measured)

    monkeypatch.setattr(maml, "measure", measure)
    monkeypatch.setattr(results, "machine", lambda: dict(where))
    assert command("--workloads", "mlp:tiny,rnn:tiny") == (0, ["mlp:tiny", "rnn:tiny"])
    assert command("--workloads", "mlp:tiny,rnn:tiny,gpt:tiny") == (0, ["gpt:tiny"])
    assert "2 of 3 workloads are measured" in capsys.readouterr().err
    assert command("--workloads", "lstm:tiny,mlp:tiny", "--again") == (130, [])
    assert command("--workloads", "gru:tiny,mlp:tiny", "--again") == (1, ["mlp:tiny"])
    assert "gru:tiny: not measured: no memory" in capsys.readouterr().out
    assert command("--workloads", "mlp:tiny", "--methods", "plain") == (0, [])
    assert command("--workloads", "mlp:tiny", "--rounds", "20") == (0, ["mlp:tiny"])
    one = "--workloads", "mlp:tiny", "--threads", "1"
    assert command(*one) == (0, ["mlp:tiny"])
    assert command(*one, "--limit", "3600") == (0, [])
    refused["reason"] = "not ready after 1800 s"
    assert command(*one, "--again") == (0, ["mlp:tiny"])
    assert command(*one) == (0, [])
    assert command(*one, "--limit", "3600") == (0, ["mlp:tiny"])
    assert command("--workloads", "mlp:tiny", "--sweep", "tasks")[1][1:] == [f"mlp:tiny,tasks={t}" for t in (4, 16, 64)]
    where |= {"date": "tomorrow"}
    assert command("--workloads", "rnn:tiny") == (0, [])
    where |= {"commit": "abc+"}
    assert command("--workloads", "rnn:tiny") == (0, ["rnn:tiny"])
    assert command("--workloads", "rnn:tiny") == (0, ["rnn:tiny"])  # uncommitted changes: the results may be stale
    assert json.loads(out.read_text()).keys() == {"maml", "sweep"}
    assert command("--workloads", "cnn") == (2, [])


def test_a_run_on_one_core_is_kept_as_that_of_another_machine(tmp_path, monkeypatch):
    cores, kept = os.sched_getaffinity(0), []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(results, "FOLDER", tmp_path / "none")
    monkeypatch.setattr(maml, "measure", lambda spec, methods, args, progress: maml.conditions(args))
    monkeypatch.setattr(maml, "show", lambda spec, found: None)
    monkeypatch.setattr(results, "keep", lambda *arguments: kept.append(arguments))
    try:
        with pytest.raises(SystemExit) as end:
            maml.main(["--workloads", "mlp:tiny", "--cores", "1"])
        assert len(os.sched_getaffinity(0)) == 1
    finally:
        os.sched_setaffinity(0, cores)
    assert end.value.code == 0
    ((path, part, entry, name),) = kept
    assert str(path).endswith("-1c.json")
    assert (part, name, entry["threads"], entry["machine"]["cores"]) == ("maml", "mlp:tiny", 1, 1)


def test_the_calls_that_are_counted_for_the_default_are_those_before_its_final_speed():
    module, work = peers.load("metakern"), of(problem("mlp"))
    step = module.methods["metakern default"](work)

    def runs_the_loss():
        """Run a step, and return whether Python ran the loss: a program that is checked answers without it."""
        seen = []
        # A profiler, as the program depends on all that the loss can see.
        sys.setprofile(lambda frame, event, arg: seen.append(frame.f_code is work.loss.__code__))
        try:
            step()
        finally:
            sys.setprofile(None)
        return any(seen)

    calls = module.calls_until_steady["metakern default"]
    assert [runs_the_loss() for _ in range(calls + 2)] == [True] * calls + [False] * 2


@pytest.mark.slow
def test_benchmarks_maml_writes_and_prints_its_results(tmp_path):
    out = tmp_path / "maml.json"
    out.write_text(json.dumps({"maml": {"gpt:tiny": "kept"}}))
    options = ["--workloads", "mlp:tiny", "--methods", "plain", "--rounds", "2", "--threads", "1", "--out", str(out)]
    command = [sys.executable, "-m", "benchmarks.maml", *options, "--quick"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    found = json.loads(out.read_text())["maml"]
    assert found["gpt:tiny"] == "kept"
    for method in peers.load("plain").methods:
        row = found["mlp:tiny"]["methods"][method]
        assert row["error"] < 1e-6
        assert 0 < row["min_ms"] <= row["median_ms"] <= row["max_ms"]
        assert method in printed
    assert found["mlp:tiny"]["refused"] == {}


@pytest.mark.parametrize("op", LARGE)
def test_large_problems_of_a_gpu_fit_their_op(op):
    for draw in LARGE[op].values():
        sample = draw(Shapes())
        with mk.backend("reference"):
            assert SPECS[op].call(*sample.args, **sample.kwargs).is_meta
        assert all(SPECS[op].cost(sample, order).bytes > 1e5 for order in range(3))


@triton
def test_jobs_of_the_gpu_benchmark_can_be_pickled_and_have_their_own_labels():
    limits = {"copy_gb_per_s": 2, "bf16_tflop_per_s": 1}
    for jobs, _ in PARTS.values():
        labels = [pickle.loads(pickle.dumps(job)).label for job in jobs(limits, False)]
        assert len({json.dumps(label) for label in labels}) == len(labels)


FEW = {"gelu", "linear", "embedding", "sgd_update", "rms_norm", "cross_entropy", "gru"}  # all ops take the same way


def first_of_each(jobs):
    """Return the first job of each op in FEW, and of all else that is no op of ours.

    Also the first of each op with more elements than 32 bits can count.
    """

    def kind(label):
        return label.get("op", str(label)), label.get("sample") == checks.BEYOND

    wanted = [job for job in jobs if job.label.get("op") in FEW or job.label.get("op") not in SPECS]
    return list({kind(job.label): job for job in reversed(wanted)}.values())


@triton
@pytest.mark.slow
@pytest.mark.parametrize(
    "part",
    [checks.jobs, llama.checks, recurrent.checks, engine.checks],
    ids=["ops", "llama", "recurrent", "engine"],
)
def test_checks_of_a_gpu_run_without_one(part):
    jobs = first_of_each(part(True))
    assert jobs
    for job in jobs:
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
        engine.jobs,
        partial(ops.jobs, {"copy_gb_per_s": 2, "bf16_tflop_per_s": 1}),
        gpu_products.jobs,
        recurrent.jobs,
    ],
    ids=["attention", "memory", "llama", "workloads", "ops", "products", "recurrent"],
)
def test_times_of_a_gpu_run_without_one(part):
    jobs = first_of_each(part(True))
    assert jobs
    for job in jobs:
        row, _ = run(job)
        assert "error" not in row, row


def test_flash_attention_is_called_with_the_arguments_that_pytorch_takes():
    sample = attention.draw(1, 2, 64, 32, torch.bfloat16)
    calls = attention.flash(sample, torch.device("meta"))
    assert [t.shape for t in calls["flash_backward"]()] == [t.shape for t in sample.args]


@triton
def test_checks_fail_for_wrong_rules_other_backends_and_random_results():
    x = Random(torch.float32, seed=1)(2, 40).double()
    plain = SPECS["silu"].plain

    def first_order(x):
        x0 = x.detach()
        s = torch.sigmoid(x0)
        return mk.ops.silu(x0) + (x - x0) * s * (1 + x0 * (1 - s))

    def good(op):
        row = checks.compare("triton", [checks.Check(op, plain, plain, [x])], "float32")
        return row["good"], row["repeats"], row["backends"]

    assert good(mk.ops.silu) == (True, True, ["triton"])
    assert good(lambda x: mk.ops.silu(x) * (1 + 1e-6)) == (False, True, ["triton"])
    assert good(first_order) == (False, True, ["triton"])
    assert good(lambda x: x * torch.sigmoid(x)) == (False, True, [])
    assert good(lambda x: mk.ops.silu(x) * (1 + 1e-5 * torch.rand(()))) == (False, False, ["triton"])


def test_tangents_by_reverse_mode_alone_equal_those_of_forward_mode():
    spec = SPECS["swiglu"]
    f, x = function(spec.call, spec.samples(Make())[0])
    for a, b in zip(checks.results(f, x, torch.float64), checks.results(f, x, torch.float64, False), strict=True):
        torch.testing.assert_close(a, b)


@triton
def test_recorded_rules_have_every_tangent_and_cotangent():
    sample = cast(samples("silu", True)["matrix"](Random(torch.float32, seed=1)), torch.float32)
    calls = recorded("silu", sample, "triton")
    assert list(calls) == list(RULES)
    (y,), _ = calls["forward"]()
    torch.testing.assert_close(y, torch.nn.functional.silu(sample.args[0]).reshape(y.shape))
    tensors = torch.utils._pytree.tree_leaves(calls["vjp_jvp"].args[1:])
    assert sum(isinstance(t, torch.Tensor) for t in tensors) == 4  # x, t_x, ct_y, t_ct_y


def test_enlarged_samples_repeat_tasks_and_not_shared_tensors():
    sample = SPECS["lora_linear"].benchmark(Make(torch.bfloat16))[0]
    large = enlarged(sample, 1 << 26)
    tasks = [len(t) // len(s) for s, t in zip(sample.args, large.args, strict=True) if isinstance(s, torch.Tensor)]
    assert tasks == [16, 1, 16, 16]
    assert enlarged(sample, 1) is sample


def test_streamed_targets_are_ops():
    assert set(STREAMED) - SPECS.keys() <= {"adam_update"}


@pytest.mark.slow
def test_a_job_that_fails_leaves_the_other_rows(monkeypatch):
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


def test_jobs_that_run_out_of_memory_run_again_alone(monkeypatch):
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


def test_targets_of_a_gpu_are_judged_by_the_worst_value():
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
    old = {"peer": "plain", "tasks": 1, "sequences": 1, "length": 4, "ms": -1.0}
    others = {"checks": [{"good": False}], "limits": [{}], "meta": [old, old | {"peer": "metakern"}]}
    out.write_text(json.dumps({"memory": [{"length": 4, "kib_per_token": 1.0}], **others}))
    command = [sys.executable, "-m", "benchmarks.gpu", "--tiny", "--out", str(out), "--only"]
    result = subprocess.run(
        [*command, "meta", "--match", "metakern|not captured"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    found = json.loads(out.read_text())
    assert result.returncode == 1, result.stderr  # the failed check that was in the file
    assert len(found["memory"]) == 1
    assert sorted(row["peer"] for row in found["meta"] if row["ms"] > 0) == ["metakern", "not captured"]
    assert [row for row in found["meta"] if row["ms"] < 0] == [old]  # which was not asked for
    assert "Llama's meta-step" in result.stdout
    assert len(found["limits"]) == 1
    failed = subprocess.run([*command, "meta", "--match", "("], cwd=ROOT, capture_output=True, text=True, check=False)
    assert failed.returncode == 2
    assert "--match must be a regular expression, got '('" in failed.stderr
    failed = subprocess.run([*command, "all"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert failed.returncode == 2
    assert "got 'all'" in failed.stderr
