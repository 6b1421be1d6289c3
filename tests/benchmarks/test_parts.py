"""The benchmark of parsers and policies: what it takes, what it keeps of a report, and its tables."""

import json

import pytest

from benchmarks import manager, manager_tables, results
from metakern.dialogue.config import Config

WHERE = {"cpu": "none", "cores": 2, "torch": "2", "commit": "abc", "date": "today"}


def scores(*means: float) -> dict[str, list[float]]:
    return {"mean": list(means), "low": [x - 0.2 for x in means], "high": [x + 0.2 for x in means], "values": [[0.0]]}


def test_each_set_has_a_config_of_its_part():
    assert {name: Config.load(config).part for name, config in manager.CONFIGS.items()} == manager.CONFIGS
    assert manager.COMPARE.keys() == set(manager.CONFIGS.values())


def test_a_set_is_measured_once_and_shown_in_a_table(tmp_path, monkeypatch, capsys):
    trained = []

    def judged(folder, steps, compare):
        assert compare == manager.COMPARE["parser"]
        found = {"protonet": {"accuracy": scores(0.5, 0.9)}, "majority": {"accuracy": scores(0.1, 0.1)}}
        return {"part": "parser", "tasks": ["a", "b"], "columns": [1, 5], "scores": found, "left_out": {}, "ways": 2}

    monkeypatch.setattr(manager, "train", lambda config, folder, resume: trained.append((config.data, config.seed)))
    monkeypatch.setattr(manager, "evaluate_part", judged)
    monkeypatch.setattr(manager, "machine", lambda: WHERE)
    monkeypatch.setattr(manager_tables, "FOLDER", tmp_path)
    out = tmp_path / "manager.json"
    for _ in range(2):
        manager.main(["--data", "hwu=mine.csv", "--out", str(out), "--seeds", "2"])
    assert trained == [("mine.csv", 0), ("mine.csv", 1)]
    entry = results.load(out)["hwu"]["0"]
    assert entry["config"]["data"] == "hwu"
    assert entry["scores"]["protonet"]["accuracy"] == {"mean": [0.5, 0.9], "low": [0.3, 0.7], "high": [0.7, 1.1]}
    assert "mine.csv" not in out.read_text()
    lines = manager_tables.parsers_table().splitlines()
    assert lines[0] == (
        "| data |  | found, 1 shot | found, 5 shots | accepted, 1 shot | accepted, 5 shots | refused, 1 shot"
        " | refused, 5 shots |"
    )
    assert lines[2] == "| hwu | prototypes, meta-trained | 50% [30%, 70%] | 90% [70%, 100%] | - | - | - | - |"
    assert lines[-1] == "hwu: none, 2 cores, torch 2, commit abc, today."
    assert manager_tables.policies_table().count("\n") == 2
    assert json.loads(out.read_text()).keys() == {"hwu"}


@pytest.mark.parametrize("data", ["hwu", "other=x", "hwu=", ""])
def test_data_needs_a_known_name_and_a_path(data, capsys):
    with pytest.raises(SystemExit) as stop:
        manager.main(["--data", data])
    assert stop.value.code == 2
    assert "must be name=path with a name of clinc, banking, hwu, sgd" in capsys.readouterr().err
