"""The benchmark of dialogue models: its cells, what it keeps of a run, and its tables and picture."""

import json
import math
from dataclasses import replace
from importlib import import_module

import pytest
import torch
from tiny import tiny_config, write_tasks

from benchmarks import pictures, results
from benchmarks.dialogue import tables
from metakern.dialogue.metrics import interval

benchmark = import_module("benchmarks.dialogue.__main__")
WHERE = {"cpu": "none", "cores": 2, "torch": "2", "commit": "abc", "date": "today"}


def test_every_cell_has_a_config_of_maml_and_known_keys():
    keys = {"config", "settings", "from", "about", "replies", "repeats", "more", "seeds"}
    data = {"star": "talks.jsonl", "sgd": "dialogues"}
    for name, cell in benchmark.CELLS.items():
        assert keys.issuperset(cell), name
        config = benchmark.config_of(cell, data, seed=7)
        assert (config.algorithm, config.seed, config.threads) == ("maml", 7, 1)
        assert config.data == data.get(cell.get("from"), config.data)
        assert name.startswith((cell.get("from") or cell["config"]) + "/")


def test_a_cell_is_measured_kept_and_skipped(tmp_path, monkeypatch, capsys):
    data = write_tasks(tmp_path / "data", tasks=30, dialogues=9)
    config = tiny_config(data, steps=2, pretrain_steps=2, max_length=64, eval_tasks=2)
    cells = {
        "mine/gru": {"config": "mine", "from": "mine", "about": "tea", "replies": 1, "more": ["anil"], "repeats": 2}
    }
    monkeypatch.setattr(benchmark, "CELLS", cells)
    monkeypatch.setattr(benchmark, "ROOT", tmp_path)
    monkeypatch.setattr(benchmark, "config_of", lambda cell, data, seed: replace(config, seed=seed, data=data["mine"]))
    monkeypatch.setattr(benchmark, "CONTENDERS", ("pretrained:adam",))
    monkeypatch.setattr(benchmark, "REPLY_STEPS", (0, 1))
    out = tmp_path / "dialogue.json"
    benchmark.main(["--out", str(out)])
    assert "mine/gru: left out, as it needs --data mine=PATH" in capsys.readouterr().out
    arguments = ["--out", str(out), "--data", f"mine={data}", "--seeds", "2", "--cells", "gru"]
    benchmark.main(arguments)
    found = json.loads(out.read_text())["mine/gru"]
    assert [list(found[seed]["loss"]) for seed in "01"] == [["maml", "pretrained:adam", "anil"]] * 2
    assert found["0"]["config"]["data"] == "mine"
    assert [len(row) for row in found["0"]["loss"]["maml"]] == [len(found["0"]["tasks"])] * 5
    assert list(found["0"]["right"]["unseen"]) == ["maml", "pretrained:adam", "anil", "retrieval"]
    assert "right" not in found["1"]
    before = out.stat().st_mtime_ns
    benchmark.main(arguments)
    assert out.stat().st_mtime_ns == before
    with pytest.raises(SystemExit) as stop:
        benchmark.main(["--data", "other=here"])
    assert stop.value.code == 2
    assert "must be name=path with a name of mine, got 'other=here'" in capsys.readouterr().err


@pytest.fixture
def stored(tmp_path, monkeypatch):
    """Made-up results of two seeds of one cell: three tasks, of which the seeds share one."""

    def entry(tasks, own, **others):
        loss = {"maml": [own, own], **{name.replace("_", ":"): [rows, rows] for name, rows in others.items()}}
        right = {"taught": loss, "unseen": loss}
        return {"machine": WHERE, "tasks": tasks, "loss": loss, "right": right, "steps": [0, 1], "reply_steps": [0, 1]}

    first = entry(["a", "b"], [0.1, 0.2], finetune=[0.5, 0.5], finetune_adam=[0.4, 0.5], fomaml=[0.1, 0.1])
    second = entry(["b", "c"], [0.4, 0.3], finetune=[0.5, 0.5], finetune_adam=[0.7, 0.7])
    for seed, found in enumerate((first, second)):
        for name in ("bots/gpt", "star/lstm"):
            results.keep(tmp_path / "dialogue.json", name, found, str(seed))
    for module in (tables, pictures):
        monkeypatch.setattr(module, "FOLDER", tmp_path)
    return tmp_path


def test_ratios_are_over_tasks_and_best_plain_is_chosen_for_each_seed(stored):
    seeds = tables.load()["bots/gpt"]
    for contender, differences in (
        ("finetune", [0.4, (0.3 + 0.1) / 2, 0.2]),
        (tables.BEST, [0.3, (0.3 + 0.1) / 2, 0.2]),  # Adam in the first seed, SGD in the second
        ("fomaml", [0.0, -0.1]),  # measured with the first seed alone
    ):
        mean, half = interval(torch.tensor(differences, dtype=torch.float64))
        expected = [math.exp(mean + sign * half) for sign in (0, -1, 1)]
        assert tables.ratio(seeds, contender, 1) == pytest.approx(expected)
    assert tables.right(seeds, "unseen", "maml", 0)[0] == pytest.approx((0.1 + 0.3 + 0.3) / 3)


def test_tables_have_a_row_for_each_contender(stored):
    rows = tables.ratios_table().splitlines()
    assert rows[0] == "| data/model |  | k = 0 | k = 1 |"
    assert [row.split(" | ")[1] for row in rows[2:6]] == [
        f"{name} / MAML" for name in ("best plain", "fine-tuned, SGD", "fine-tuned, Adam", "FOMAML")
    ]
    assert rows[2].startswith("| bots/gpt: 3 tasks, 2 seeds | ")
    assert len(tables.ratios_table((tables.BEST,)).splitlines()) == 4
    replies = tables.replies_table(("maml",)).splitlines()
    assert len(replies) == 2 + 2 * 2
    assert replies[2].startswith("| bots/gpt | taught | MAML | 23% [0%, ")
    assert tables.machines() == "none, 2 cores, torch 2, commit abc, today.  "


def test_the_picture_is_drawn_from_the_results(stored, monkeypatch):
    seeds = json.loads((stored / "dialogue.json").read_text())["bots/gpt"]
    shares = {name: [[0, 1], [1, 1]] for name in ("maml", "pretrained:adam", "finetune:adam", "retrieval")}
    for found in seeds.values():
        found["right"] = {"taught": shares, "unseen": shares}
    (stored / "dialogue.json").write_text(json.dumps({"bots/gpt": seeds}))
    pictures.save("dialogue", pictures.adaptation)
    assert {path.name for path in stored.glob("dialogue-*.svg")} == {"dialogue-light.svg", "dialogue-dark.svg"}
