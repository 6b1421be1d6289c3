"""`metakern bench`: FLOP counts, rows of results, the comparison with another commit, and an installed wheel."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from installing import ROOT, build
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import against, ops, results
from benchmarks.calls import RULES, orders, recorded
from benchmarks.maml import beside, summary
from benchmarks.runner import RefusedError, Runner
from benchmarks.workloads import make
from metakern import cli
from metakern.ops import SPECS
from metakern.ops.core.spec import Cost, Make


def sample(op, name=None):
    return next(s for s in SPECS[op].samples(Make(seed=1)) if name in (None, s.name))


@pytest.fixture
def tiny(monkeypatch):
    """Let every op be timed at its first two test samples, which are tiny."""
    for name, spec in SPECS.items():
        few = [s.name for s in spec.samples(Make())][:2]
        draw = spec.samples
        monkeypatch.setitem(
            SPECS,
            name,
            replace(spec, benchmark=lambda make, draw=draw, few=few: [s for s in draw(make) if s.name in few]),
        )
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("op", "name", "passes"),
    [
        ("linear", "tasks", ((1, 0, 0), (1, 1, 0), (1, 1, 1))),
        ("lora_linear", "tasks", ((1, 0, 0), (1, 1, 0))),
        ("implicit_linear", "tasks", ((1, 0, 0),)),
        *((cell, "per_task", ((1, 0, 0), (1, 1, 0), (1, 2, 1))) for cell in ("rnn", "gru", "lstm")),
        ("attention", "full", ((1, 0, 0),)),
    ],
)
def test_flop_of_an_op_are_those_that_pytorch_counts(op, name, passes):
    """FLOP of the rules equal those that PyTorch counts.

    Row i of `passes` says how often order i runs the rules of orders 0, 1 and 2: order 0 is a forward, order 1 adds a
    backward, order 2 adds the backward of that backward.
    """
    costs = [SPECS[op].cost(sample(op, name), order).flop for order in range(3)]
    for call, times in zip(orders(SPECS[op].plain, sample(op, name)), passes, strict=False):
        with FlopCounterMode(display=False) as counter:
            call()
        assert counter.get_total_flops() == sum(n * cost for n, cost in zip(times, costs, strict=True))


@pytest.mark.parametrize("op", SPECS)
def test_ops_and_plain_pytorch_compute_the_same_results(op):
    """Calls that are timed against each other give the same results at every order, and a rule repeats its own."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        ours = [tree_leaves(call()) for call in orders(SPECS[op].call, sample(op))]
        torch.manual_seed(1)
        plain = [tree_leaves(call()) for call in orders(SPECS[op].plain, sample(op))]
        rules = recorded(op, sample(op), "reference")
    for a, b in zip(ours, plain, strict=True):
        for x, y in zip(a, b, strict=True):
            some = x if y is None else y
            zero = None if some is None else torch.zeros_like(some)
            torch.testing.assert_close(x if x is not None else zero, y if y is not None else zero)
    assert tuple(rules) == RULES
    for rule in rules.values():
        torch.testing.assert_close(rule(), rule(), rtol=0, atol=0)


def test_ratios_of_ops_are_taken_within_a_round():
    product = [2 * 1024**3 * 1e-9 * slow for slow in (1, 1, 2)]  # 1 GFLOP/s, then half of it
    times = {
        "cpu vjp": [2.0, 4.0, 4.0],
        "cpu order 1": [3.0, 3.0, 6.0],
        "plain order 1": [6.0, 9.0, 12.0],
        "copy 1": [1.0, 1.0, 1.0],
        "product": product,
        "cpu vjp @": [4.0, 8.0, 2.0],
        "cpu order 1 @": [9.0, 9.0, 6.0],
    }
    found = ops.row(times, "cpu", "vjp", Cost(flop=2e9, bytes=8e9), 1024)
    assert found["ms"][0] == 4000
    assert (found["gb_per_s"], found["gflop_per_s"]) == (2, 0.5)
    assert found["of_limit"][0] == 1  # of 2 s / 2 s, 2 s / 4 s, 4 s / 4 s
    assert found["plain_over_ours"][0] == 2
    assert found["other_over_ours"][0] == 2
    assert found["other_over_ours_through_op"][0] == 3
    copies = times | {"copy 1": [8.0] * 3}
    assert ops.row(copies, "cpu", "vjp", Cost(flop=2e9, bytes=8e9), 1024)["of_limit"][0] == 2
    assert "plain_over_ours" not in ops.row(times | {"cpu jvp": [1.0] * 3}, "cpu", "jvp", Cost(1, 1), 1024)


@pytest.fixture
def bench(monkeypatch):
    """A function that runs `metakern bench BENCHMARK` with arguments and returns the exit code."""

    def run(*arguments, benchmark="ops"):
        monkeypatch.setattr(sys, "path", [*sys.path])
        return cli.main(["bench", benchmark, *arguments])

    return run


def test_bench_ops_adds_its_results_to_the_file(bench, tiny, tmp_path, capsys):
    out = tmp_path / "machine.json"
    out.write_text(
        json.dumps({"maml": {"mlp": "kept"}, "ops": {"cpu float32 gelu": "kept", "cpu float32 silu": "old"}})
    )
    backends = [name for name, why in ops.available("cpu").items() if not why]
    command = ["--ops", "silu,lstm", "--rounds", "2", "--quick", "--threads", "1", "--out", str(out), "--device", "cpu"]
    command += ["--backends", ",".join(backends)]
    assert bench(*command) == 0
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines()[:-1])) <= 100
    found = json.loads(out.read_text())
    assert found["maml"] == {"mlp": "kept"}
    assert found["ops"].keys() == {"cpu float32 gelu", "cpu float32 silu", "cpu float32 lstm"}
    entry = found["ops"]["cpu float32 lstm"]
    assert entry["machine"] == results.machine()
    assert (entry["rounds"], entry["threads"], entry["dtype"], entry["device"]) == (2, 1, "float32", "cpu")
    (first,) = entry["samples"].values()
    assert list(first["backends"]) == backends
    for rules in first["backends"].values():
        assert tuple(rules) == RULES
        assert all(row["ms"][0] > 0 and row["of_limit"][0] > 0 for row in rules.values())
        assert [rule for rule, row in rules.items() if "plain_over_ours" in row] == ["forward", "vjp", "vjp_jvp"]
    assert bench(*command[:-2], "--dtype", "float64") == 0
    (first,) = json.loads(out.read_text())["ops"]["cpu float64 lstm"]["samples"].values()
    assert list(first["backends"]) == backends[-1:]  # the fastest


def test_an_interrupt_keeps_the_ops_that_were_measured(bench, tiny, tmp_path, capsys, monkeypatch):
    measure, out = ops.measure, tmp_path / "machine.json"

    def interrupted(op, *rest):
        if op == "silu":
            raise KeyboardInterrupt
        return measure(op, *rest)

    monkeypatch.setattr(ops, "measure", interrupted)
    with pytest.raises(SystemExit) as end:
        bench("--ops", "rope,silu,gelu", "--rounds", "1", "--threads", "1", "--out", str(out))
    assert end.value.code == 130
    assert list(json.loads(out.read_text())["ops"]) == ["cpu float32 rope"]
    assert capsys.readouterr().err.splitlines()[-1] == f"stopped; rope: kept in {out}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ops", "silu,cnn"], "--ops must be among adagrad_update, .*, got 'cnn'"),
        (["--backends", "tpu"], "--backends must be among reference.* here, got 'tpu'"),
        (["--backends", "cpu", "--ops", "embedding"], "--backends must (have kernels of embedding|be among)"),
        (["--rounds", "0"], "--rounds: must be a positive whole number, got '0'"),
        (["--against", "no-such-commit"], "--against (must be a commit.*got 'no-such-commit'|needs git)"),
        (["--dtype", "int8"], "--dtype: invalid choice: 'int8'"),
        (["--out", "."], "--out: must be a file of results or a new one, got '.'"),
        (["--out", __file__], "--out: must be a file of results or a new one, got '.*py' \\(Extra data"),
        (["--out", f"{__file__}/results.json"], "--out: must be in a folder that can be written"),
    ],
)
def test_wrong_arguments_of_bench_ops_are_one_line(arguments, message, bench, capsys):
    assert one_line(lambda: bench(*arguments), "ops", capsys, message)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workloads", "cnn"], "family must be one of mlp, .*, got 'cnn'"),
        (["--methods", "tensorflow"], "methods must be among plain PyTorch; .*, got 'tensorflow'"),
        (["--sweep", "depth"], "sweep must be of K, .*, got 'depth'"),
        (["--rounds", "0"], "--rounds: must be a positive whole number, got '0'"),
        (["--threads", "two"], "--threads: must be a positive whole number, got 'two'"),
        (["--limit", "nan"], "--limit: must be a positive number of seconds, got 'nan'"),
        (["--against", "no-such-commit"], "--against (must be a commit.*got 'no-such-commit'|needs git)"),
    ],
)
def test_wrong_arguments_of_bench_maml_are_one_line(arguments, message, bench, capsys):
    assert one_line(lambda: bench(*arguments, benchmark="maml"), "maml", capsys, message)


def one_line(run, benchmark, capsys, message):
    """Assert that `run` exits with code 2 and one line; return whether the line has `message`."""
    with pytest.raises(SystemExit) as end:
        run()
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.startswith(f"metakern bench {benchmark}: ")
    return re.search(message, error)


def test_a_missing_package_of_a_benchmark_is_one_line(bench, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "rich", None)
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert bench("--ops", "silu", "--quick") == 2
    assert capsys.readouterr().err == "metakern: the package rich is missing: pip install metakern[bench]\n"


def git(folder, *arguments):
    who = ("-c", "user.name=a", "-c", "user.email=a@b")
    return subprocess.run(["git", *who, *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A git repository in the place of this one. Building its commit `v1` writes `METAKERN_NATIVE` to the file `asked`;
    its last commit fails to build.
    """
    home = tmp_path / "clone"
    for name in ("metakern", "csrc", "benchmarks"):
        (home / name).mkdir(parents=True)
        (home / name / "__init__.py").write_text("def where():\n    return __file__\n")
    for name in set(against.SOURCES) - {"metakern", "csrc"}:
        (home / name).touch()
    (home / "setup.py").write_text("import os; open('asked', 'w').write(os.environ['METAKERN_NATIVE'])")
    git(home, "init", "-q")
    git(home, "add", ".")
    git(home, "commit", "-qm", "one")
    git(home, "tag", "v1")
    (home / "setup.py").write_text("raise SystemExit('no compiler')")
    git(home, "commit", "-qam", "two")
    monkeypatch.setattr(against, "HOME", home)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return home


def test_another_commit_is_built_once_and_imported_from_there(clone, monkeypatch):
    folder = against.checkout("v1")
    assert folder.name == git(clone, "rev-parse", "v1").strip()
    assert (folder / "asked").read_text() == "cpu"
    assert not (folder / "benchmarks").exists()
    (folder / "asked").unlink()
    assert against.checkout("HEAD~1") == folder
    assert not (folder / "asked").exists()
    monkeypatch.setattr(against, "HOME", ROOT)  # the benchmarks of this tree, the metakern of the folder
    process = against.Process(folder, "importlib:import_module", "metakern")
    try:
        assert process("where") == str(folder / "metakern" / "__init__.py")
        with pytest.raises(RuntimeError, match=r"AttributeError: .*nothing"):
            process("nothing")
        assert process("where")
    finally:
        process.close()


def test_unknown_commits_and_failed_builds_are_errors(clone):
    with pytest.raises(ValueError, match="got 'v2'"):
        against.checkout("v2")
    with pytest.raises(ValueError, match="got '--all'"):
        against.checkout("--all")
    with pytest.raises(RuntimeError, match="was not built: no compiler"):
        against.checkout("HEAD")
    assert not list((Path(os.environ["XDG_CACHE_HOME"]) / "metakern" / "against").iterdir())


def test_a_process_that_cannot_start_raises_with_its_error(tmp_path):
    process = against.Process(tmp_path, "benchmarks.no_such_module:Timer")
    try:
        with pytest.raises(RuntimeError, match=r"No module named .benchmarks\.no_such_module"):
            process("prepare")
    finally:
        process.close()


def test_the_metakern_of_another_commit_is_a_method_of_its_own(tmp_path):
    (tmp_path / "metakern.py").write_text("raise ImportError('not this metakern')")
    work, file = make("mlp:tiny"), tmp_path / "problem.npz"
    work.problem("mlp:tiny").save(file)
    with pytest.raises(RefusedError, match="not this metakern"):
        Runner("metakern", "metakern auto", file, file, threads=1, limit=100, folder=tmp_path)
    methods = beside({"plain PyTorch": "plain", "metakern auto": "metakern", "metakern, first order": "metakern"}, "v1")
    assert list(methods) == ["plain PyTorch", "metakern auto", "metakern, first order", "metakern auto @ v1"]
    seconds = {"products": [1, 1, 1], "metakern auto": [1, 2, 4], "metakern auto @ v1": [2, 2, 12]}
    rows = summary(seconds, {method: {} for method in seconds}, methods, work)["methods"]
    assert rows["metakern auto @ v1"]["over_this"][0] == 2
    assert "over_this" not in rows["metakern auto"]


@pytest.mark.slow
def test_two_trees_are_timed_side_by_side(bench, monkeypatch, capsys):
    monkeypatch.setattr(against, "checkout", lambda rev: against.HOME)
    options = "--rounds", "2", "--quick", "--against", "v1", "--backends", "reference"
    assert bench("--ops", "embedding", *options) == 0
    printed = capsys.readouterr().out
    assert "v1 / this: rule" in printed
    assert printed.partition("vjp_jvp")[2].count("(") == 2  # the quartiles of two ratios


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [["--benchmark-disable"], ["--benchmark-max-time=0.01", "--benchmark-json=found.json"]]
)
def test_benchmarks_run_under_pytest_benchmark(options, tmp_path):
    case = f"{ROOT / 'benchmarks' / 'test_ops.py'}::test_rule[swiglu-8x512x512-vjp_jvp-reference]"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "--rootdir", str(ROOT), case, *options]
    env = {key: value for key, value in os.environ.items() if "XDIST" not in key} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "1 passed" in done.stdout
    if "--benchmark-disable" not in options:
        (row,) = json.loads((tmp_path / "found.json").read_text())["benchmarks"]
        cost = SPECS["swiglu"].cost(ops.draw("swiglu", "8x512x512", torch.float32), 2)
        assert row["extra_info"]["gb_per_s"] == pytest.approx(cost.bytes / row["stats"]["median"] / 1e9)


@pytest.mark.slow
def test_an_installed_wheel_has_the_benchmarks(source, tmp_path):
    shutil.copytree(ROOT / "benchmarks", source / "benchmarks", ignore=shutil.ignore_patterns("__pycache__"))
    assert build(source, "none").returncode == 0
    (wheel,) = (source / "dist").iterdir()
    site, here = tmp_path / "site", tmp_path / "here"
    here.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    home = site / "metakern" / "_bench"
    assert [path.name for path in home.iterdir()] == ["benchmarks"]
    assert not [path for path in home.rglob("*") if path.name in ("results", "gpu", "test_ops.py")]

    def run(*command, cwd=here, **environment):
        environment = os.environ | {"PYTHONPATH": str(site)} | environment
        command = [sys.executable, *command]
        return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)

    done = run("-m", "metakern", "bench", "ops", "--ops", "embedding", "--rounds", "1", "--backends", "reference")
    assert done.returncode == 0, done.stderr
    (written,) = here.iterdir()
    (file,) = written.iterdir()
    assert "cpu float32 embedding" in json.loads(file.read_text())["ops"]
    for name, arguments, message in (
        ("report", [], "must run in a clone of metakern"),
        ("ops", ["--against", "HEAD"], "needs git and a clone"),
    ):
        done = run("-m", "metakern", "bench", name, *arguments)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1)
        assert message in done.stderr
    # The worker of a peer must start where neither PyTorch nor metakern is installed.
    absent = "import sys; sys.modules['torch'] = sys.modules['metakern'] = None; import benchmarks.worker"
    done = run("-c", f"{absent}, benchmarks.problem; benchmarks.peers.load('jax')", cwd=home, PYTHONPATH="")
    assert done.returncode == 0, done.stderr
