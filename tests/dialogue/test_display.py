"""The display of progress: lines of text, or a bar on a terminal."""

import logging
from io import StringIO

import torch
from rich.console import Console

import metakern as mk
from metakern.dialogue.display import Display


def test_without_a_terminal_it_prints_the_lines_that_are_wanted(capsys):
    with Display() as display:
        display.say("[two] tasks")
        display.progress("train", 0.1, "1/10", line=False)
        display.progress("train", 0.2, "2/10")
    assert capsys.readouterr().out == "[two] tasks\ntrain 2/10\n"


def test_a_terminal_has_a_bar_for_each_part_of_the_work():
    display = Display()
    display.bar.live.console = display.console = Console(file=StringIO(), force_terminal=True, width=80)
    with display:
        for part, done in (("pretrain", 0.5), ("pretrain", 1.0), ("train", 0.25)):
            display.progress(part, done, f"{done}", line=False)
        assert [(task.description, task.completed) for task in display.bar.tasks] == [
            ("pretrain", 1.0),
            ("train", 0.25),
        ]
    assert "train" in display.console.file.getvalue()


def test_a_terminal_shows_what_the_first_call_does(caplog):
    display = Display()
    display.bar.live.console = display.console = Console(file=StringIO(), force_terminal=True, width=80)
    maml = mk.MAML(torch.nn.Linear(3, 2), mk.losses.classification)
    batch = torch.randn(2, 4, 3), torch.randint(2, (2, 4))
    seen, show = [], display.planning

    def planning(step):
        show(step)
        seen.append((step, [task.description for task in display.bar.tasks]))

    display.planning = planning
    with display:
        display.progress("train", 0.0, "0/10", line=False)
        maml(batch, batch)
        display.progress("train", 0.1, "1/10", line=False)
        assert [(task.description, task.completed) for task in display.bar.tasks] == [("train", 0.1)]
    assert {"truth, first order", "truth, second order", "fold, first order"} <= {step for step, _ in seen}
    assert all(bars == (["train", "plan"] if step else ["train"]) for step, bars in seen)
    assert not caplog.records
    with caplog.at_level(logging.INFO, "metakern.plan"):
        mk.MAML(torch.nn.Linear(3, 2), mk.losses.classification)(batch, batch)
    assert "fold, second order" in caplog.messages
    assert not any("ended" in message for message in caplog.messages)
