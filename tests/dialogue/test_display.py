"""The display of progress: lines of text, or a bar on a terminal."""

from io import StringIO

from rich.console import Console

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
