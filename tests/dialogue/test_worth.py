"""What adaptation is worth: sizes that are counted by hand, and gains on data with and without anything to adapt to."""

import io

import pytest
from rich.console import Console
from tiny import tiny_config, write_tasks

from metakern.cli import main
from metakern.dialogue.gain import LITTLE
from metakern.dialogue.readers import dialogue
from metakern.dialogue.split import Split, TaskData
from metakern.dialogue.worth import measure, show, sizes


def test_sizes_are_those_counted_by_hand():
    turns = [("system", "be kind"), ("user", "one two"), ("assistant", "three"), ("user", "four")]
    talks = [
        dialogue("a", "1", [*turns, ("assistant", "five six seven")]),
        dialogue("a", "2", [("user", "one"), ("assistant", "Three!")]),
        dialogue("a", "3", [("user", "one two"), ("assistant", "eight")]),
    ]
    found = sizes(Split((TaskData("a", tuple(talks)),), (), (), {"tasks": 2}))
    assert found == {
        "tasks": 1,
        "dialogues": 3,
        "dialogues_a_task": 3,
        "turns": 8,
        "words_of_a_user": 6 / 4,
        "words_of_a_reply": 6 / 4,
        "recurring": 0.5,
        "left_out": {"tasks": 2},
    }


@pytest.mark.slow
def test_the_gain_is_large_where_tasks_have_words_of_their_own(tmp_path, capsys):
    data = write_tasks(tmp_path / "tasks", tasks=20)
    found = measure(tiny_config(data, steps=60, outer_lr=0.02, test_part=0.2, validation_part=0.2))
    assert found["gain"] == found["loss"][0] - min(found["loss"]) > LITTLE
    assert len(found["loss"]) == len(found["rates"]) == len(found["steps"])
    text = io.StringIO()
    show("tasks", found | {"gain": 0.05}, Console(file=text))
    assert "adaptation is worth 0.05 nats per token\nthat is little" in text.getvalue()
    arguments = ["data", str(data), "--steps", "2", "--vocab-size", "300", "--max-length", "24", "--threads", "1"]
    assert main(arguments) == 0
    assert f"{data}: 20 tasks, " in capsys.readouterr().out
