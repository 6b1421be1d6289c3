"""Several processes: they train what one process trains, stop together, and survive the end of one of them."""

import json
import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from installing import ROOT, run
from sharing import KILLED_AT, RUNS, STOPPED_AT, config_of
from tiny import write_tasks

from metakern import cli
from metakern.dialogue import checkpoint, processes
from metakern.dialogue.evaluate import evaluate
from metakern.dialogue.trainer import train
from metakern.errors import UserError

LAUNCH = "import sys; from metakern.dialogue.processes import launch; sys.exit(launch(sys.argv[1:], 2, max_restarts=2))"


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """The folder of the runs of two processes, what these found, and what they printed."""
    out = tmp_path_factory.mktemp("shared")
    data = write_tasks(out / "data")
    script = str(Path(__file__).with_name("sharing.py"))
    path = f"{ROOT}:{ROOT / 'tests'}"
    done = run(sys.executable, "-c", LAUNCH, script, str(data), str(out), PYTHONPATH=path, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    return out, json.loads((out / "found.json").read_text()), done.stderr


def log_of(folder):
    """Return the phase and the numbers of each line of a run's log."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [(line.pop("phase"), line) for line in lines]


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_train_what_one_trains(tmp_path, shared, name):
    out, found, _ = shared
    if name == "finetune":
        assert checkpoint.load(out / name / "checkpoints", "last")[1]["step"] == STOPPED_AT
        train(config_of(name, out / "data"), out / name, resume=True)  # one process goes on with the run of two
    train(config_of(name, out / "data"), tmp_path)
    (tensors, state), (others, other) = (checkpoint.load(f / "checkpoints", "last") for f in (tmp_path, out / name))
    assert tensors.keys() == others.keys()
    for key in tensors.keys() - {"random"}:
        torch.testing.assert_close(others[key], tensors[key], rtol=1e-5, atol=1e-6)
    assert [state[key] for key in ("phase", "step", "worse")] == [other[key] for key in ("phase", "step", "worse")]
    for (phase, line), (same, shared_line) in zip(log_of(tmp_path), log_of(out / name), strict=True):
        assert phase == same
        assert shared_line == pytest.approx(line, rel=1e-5)
    if name == "hypernetwork":
        report, alone = found["report"], evaluate(out / name, (0, 2), reply_steps=(1,))
        assert report["curves"][name]["loss"] == [pytest.approx(row) for row in alone["curves"][name]["loss"]]
        assert report["replies"]["scores"] == alone["replies"]["scores"]


def test_gradients_of_prototypes_are_those_of_all_tasks(shared):
    assert shared[1]["prototypes"] < 1e-6


def test_processes_may_skip_different_layers(shared):
    first, second, neither = shared[1]["skipped"]
    assert max(*first, *second) < 1e-6
    assert neither == [None, None]


def test_memory_that_is_short_in_one_process_shrinks_its_chunks(shared):
    sizes = shared[1]["sizes"]
    assert sizes[0] == 4  # of 7 tasks
    assert set(sizes[1:]) == {2}


def test_all_processes_stop_at_the_step_in_which_one_is_asked_to(shared):
    first, second = shared[1]["stopped"]
    assert first == second
    assert f"stopped at step {STOPPED_AT} of train" in first


def test_a_run_is_saved_when_a_process_is_killed(shared):
    saved = re.findall(r"has ended or can't be reached; the run is saved at step (\d) of train", shared[2])
    assert saved, shared[2]
    assert int(saved[0]) in (KILLED_AT - 1, KILLED_AT)  # the process may be gone before its last messages arrive
    assert "its parts of the parameters are lost, and the run is as at the last checkpoint" in shared[2]


def test_a_process_on_its_own_has_all_tasks():
    assert [processes.size(), processes.rank(), processes.is_first()] == [1, 0, True]
    assert processes.gather("x") == ["x"]
    assert list(range(7))[processes.share(7)] == list(range(7))
    state = torch.get_rng_state()
    processes.seed("train", 3)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("count", [1, 2, 7, 16])
def test_shares_are_whole_and_of_about_equal_size(monkeypatch, count):
    monkeypatch.setattr(processes, "size", lambda: 3)
    shares = []
    for rank in range(3):
        monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
        shares.append(list(range(count))[processes.share(count)])
    assert [task for part in shares for task in part] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_more_processes_than_tasks_are_refused(monkeypatch):
    monkeypatch.setattr(processes, "size", lambda: 3)
    processes.check(3, "cpu")
    with pytest.raises(UserError, match="tasks must be at least 3, one for each process, got 2: raise"):
        processes.check(2, "cpu")


def test_another_launch_does_not_go_on_with_a_run_that_is_there(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "first")
    config = replace(config_of("finetune", write_tasks(tmp_path / "data")), steps=1)
    train(config, tmp_path / "run")
    assert train(config, tmp_path / "run").state["step"] == 1  # as after a restart
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "second")
    with pytest.raises(UserError, match="holds a run already"):
        train(config, tmp_path / "run")


def test_the_command_line_starts_processes_but_not_within_one_of_them(monkeypatch, capsys):
    started = []
    monkeypatch.setattr(processes, "launch", lambda *arguments: started.append(arguments) or 7)
    command = ["train", "--processes", "2", "--max-restarts", "3", "--data", "nowhere"]
    assert cli.main(command) == 7
    assert started == [(["-m", "metakern", *command], 2, 3)]
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert cli.main(command) == 2
    assert "nowhere" in capsys.readouterr().err
    assert len(started) == 1


def test_commands_of_the_page_are_understood():
    page = (ROOT / "docs" / "scaling.md").read_text("utf-8").replace("\\\n", " ")
    commands = re.findall(r"^ *(?:metakern|.*-m metakern) (.*)$", page, re.MULTILINE)
    assert len(commands) == 7
    for command in commands:
        cli._parser().parse_args(shlex.split(command))


@pytest.mark.parametrize(
    ("variables", "complaint"),
    [
        ({"RANK": "0", "WORLD_SIZE": "x"}, "variable WORLD_SIZE must be a number, got 'x': unset it, or use torchrun"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "variable MASTER_ADDR must be set where WORLD_SIZE is 2: start by torchrun"),
        (
            {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "abc"},
            "variable MASTER_PORT must be a number, got 'abc'",
        ),
    ],
)
def test_an_environment_that_is_not_torchruns_is_refused(monkeypatch, variables, complaint):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=complaint), processes.joined():
        raise AssertionError("it must not begin")


def test_a_port_without_processes_is_nothing(monkeypatch):
    """As Kubernetes sets it for a service that is named master."""
    monkeypatch.setenv("MASTER_PORT", "tcp://10.0.0.1:80")
    with processes.joined():
        assert processes.size() == 1
