"""The command that damages runs: it finds nothing in metakern, and finds a fault that is planted."""

import json

import pytest
from tiny import tiny_config, write_tasks

from benchmarks import damage
from metakern.dialogue import checkpoint
from metakern.dialogue.trainer import train


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("damage")
    train(tiny_config(write_tasks(folder / "data"), pretrain_steps=0, eval_every=2), folder / "run")
    return folder / "run"


def test_damage_is_noticed_and_the_checkpoint_before_used(run):
    counts = damage.damaged(run, 150, seed=0)
    total = sum(counts.values(), damage.Counter())
    assert total["silent"] == total["traceback"] == 0
    assert total["refused"] > 30
    assert total["replaced"] > 10
    assert len(counts) == len(damage.CHANGES)


def test_damage_that_is_not_noticed_is_counted(run, monkeypatch, capsys):
    def unchecked(path):
        record = json.loads(path.read_bytes())
        record.pop("digest", None)
        return record

    monkeypatch.setattr(checkpoint, "_record", unchecked)
    monkeypatch.setattr(damage, "CHANGES", {"a letter": damage.CHANGES["a letter or digit"]})
    counts = damage.damaged(run, 60, seed=0)["a letter"]
    assert counts["silent"] > 0
    assert ": silent: a letter in checkpoints/" in capsys.readouterr().out
