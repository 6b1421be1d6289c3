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


def test_generators_are_trained_with_each_kind_of_hint(tmp_path, monkeypatch):
    trained, judged = [], []

    def evaluate(folder, steps, compare, data, reply_steps, policy):
        judged.append((folder.name, policy and policy.name))
        of_steps = [[2.0 - 0.1 * len(judged)] * 2] * 4
        replies = {"maml": {"unseen": {"chrf": scores(10, 20, 30), "bleu": scores(1, 2, 3)}}}
        curves = {"maml": {"bits_per_byte": {"values": of_steps}}}
        return {"curves": curves, "replies": {"scores": replies}, "tasks": ["a", "b"]}

    def train(config, folder, resume):
        trained.append((config.part, config.hints, config.test_part, config.data))

    for name, value in {"train": train, "evaluate": evaluate, "show": print, "machine": lambda: WHERE}.items():
        monkeypatch.setattr(manager, name, value)
    monkeypatch.setattr(manager_tables, "FOLDER", tmp_path)
    config = Config.load("policy")
    entry = manager.measure_hints("sgd", config)
    assert trained[0][:2] == ("policy", "none")
    assert [hints for part, hints, *_ in trained[1:]] == ["none", "act", "reply", "act+reply"]
    assert {(share, data) for _, _, share, data in trained} == {(config.test_part, config.data)}
    assert [policy for _, policy in judged] == [None, None, "manager-sgd-0", None, None, "manager-sgd-0"]
    results.keep(tmp_path / "manager.json", manager_tables.HINTED, entry, "0")
    lines = manager_tables.hints_table().splitlines()
    assert "less than without, 10 steps | chrF, 0 steps" in lines[0]
    assert lines[2].startswith("| none | 1.90 | 1.90 | 1.90 | 1.90 | - | 10.0 |")
    assert lines[3].startswith("| acts of the data | 1.80 | 1.80 | 1.80 | 1.80 | 0.10 [0.10, 0.10] |")
    assert len(lines) == 10
    assert manager_tables.parsers_table().count("\n") == 2


@pytest.mark.parametrize("data", ["hwu", "other=x", "hwu=", ""])
def test_data_needs_a_known_name_and_a_path(data, capsys):
    with pytest.raises(SystemExit) as stop:
        manager.main(["--data", data])
    assert stop.value.code == 2
    assert "must be name=path with a name of clinc, banking, hwu, sgd" in capsys.readouterr().err
