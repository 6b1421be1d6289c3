"""The commands and tables of long runs: the soak, and what the tables say of processes, crashes and damage."""

import json

from benchmarks import results, runs_tables, soak

WHERE = {"cpu": "none", "cores": 2, "torch": "2", "commit": "abc", "date": "today"}


def test_a_soak_is_kept_and_shown(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(runs_tables, "FOLDER", tmp_path)
    soak.main(["--steps", "40", "--shapes", "3", "--out", str(tmp_path / "soak.json")])
    kept = results.load(tmp_path / "soak.json")
    assert [look["step"] for look in kept["captured"]["looks"]] == [*range(2, 41, 2)]
    assert kept["not captured"]["looks"][-1]["memory_mib"] > 10
    assert "| captured | 3 | 10, 40 |" in runs_tables.soak_table()


def test_a_leak_is_seen():
    before = soak.held()
    kept = b"x" * 2**25
    with open(__file__):
        after = soak.held()
    assert after["memory_mib"] - before["memory_mib"] > 30
    assert after["files"] == before["files"] + 1
    assert kept


def test_tables_show_the_worst_algorithm_and_count_outcomes(tmp_path, monkeypatch):
    monkeypatch.setattr(runs_tables, "FOLDER", tmp_path)
    apart = {"maml": {"weights": 1e-7, "moments": 3e-7}, "anil": {"weights": 2e-7, "moments": 1e-8}}
    (tmp_path / "scaling.json").write_text(json.dumps({"shard, 4 processes": {"machine": WHERE, **apart}}))
    assert "| 4 | divided | 2.0e-07 (anil) | 3.0e-07 (maml) |" in runs_tables.equality_table()
    kinds = {"kill": {"machine": WHERE, "trials": {"right": 5, "wrong": 1}}}
    (tmp_path / "crashes.json").write_text(json.dumps(kinds))
    assert "fsync and rename | 6 | 5 | 1 |" in runs_tables.crashes_table()
    damage = {"seed 0": {"machine": WHERE, "outcomes": {"a bit": {"refused": 2}, "noise": {"refused": 1, "silent": 1}}}}
    (tmp_path / "damage.json").write_text(json.dumps(damage))
    assert "| seed 0 | 4 | 3 | 0 | 0 | 1 | 0 |" in runs_tables.damage_table()
