"""docs/own-data.md: its commands run on small files of synthetic bots, and its samples are read as it says."""

import csv
import io
import re
import shlex
import sys
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, zip_longest
from pathlib import Path

import pytest
from installing import ROOT

from metakern.cli import main
from metakern.dialogue.bots import Bot, bots, dialogues
from metakern.dialogue.readers import csv as reader
from metakern.dialogue.readers import read

PAGE = (ROOT / "docs" / "own-data.md").read_text("utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
SETTINGS = ["--steps=30", "--vocab-size=400", "--max-length=48", "--width=16", "--support-size=4", "--query-size=4"]
RATES = ["--inner-lr=0.3", "--outer-lr=0.02", "--warmup=2", "--validation-part=0.2", "--test-part=0.2", "--threads=1"]
FLAGS = {
    "data": [*SETTINGS, *RATES, "--heads=2"],
    "train": [*SETTINGS, *RATES, "--hidden=16", "--inner-steps=1", "--eval-every=30"],
    "eval": ["--steps=0,1", "--reply-steps=0,1"],
    "adapt": ["--steps=2"],
    "chat": ["--steps=2"],
}


def rows(bot: Bot) -> Iterator[tuple[str, str, str]]:
    """Yield each question of a bot's dialogues, its answer, and the name of the bot."""
    for talk in dialogues(bot):
        yield from ((question, answer, bot.name) for question, answer in zip(talk[::2], talk[1::2], strict=True))


def talks(made: Sequence[Bot], *speakers: str) -> Iterator[list[Sequence[str]]]:
    """Yield the messages of each dialogue: its name, the speaker, the text, and the name of the bot."""
    for bot in made:
        for number, talk in enumerate(dialogues(bot)):
            yield [(f"{bot.name} {number}", speakers[i % 2], text, bot.name) for i, text in enumerate(talk)]


def write(path: Path, columns: str, found: Iterable[Sequence[str]], delimiter: str = ",") -> None:
    with open(path, "w", encoding="utf-8-sig", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows([columns.split(), *found])


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with the files that the page names."""
    monkeypatch.chdir(tmp_path)
    *made, new = list(bots())[:8]
    for name, of in {"faq": made, "new-bot": [new]}.items():
        write(tmp_path / f"{name}.csv", "question answer bot", (row for bot in of for row in rows(bot)))
    for name, of in {"shops": made, "new-shop": [new]}.items():
        write(tmp_path / f"{name}.csv", "Frage Antwort Laden", (row for bot in of for row in rows(bot)), ";")
    by_time = filter(None, chain.from_iterable(zip_longest(*talks(made, "customer", "agent"))))
    write(tmp_path / "chats.csv", "conversation_id role text department", by_time, "\t")
    write(tmp_path / "named.csv", "Case Who Said Product", chain.from_iterable(talks(made, "Ann", "Eva")))
    return tmp_path


@pytest.mark.slow
def test_the_commands_of_the_page_work(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands = [
        shlex.split(line, comments=True) for kind, block in BLOCKS if kind == "bash" for line in block.splitlines()
    ]
    assert [words[1] for words in commands].count("train") == 3
    assert {words[1] for words in commands} == {"data", "train", "eval", "adapt", "chat"}
    for program, command, *arguments in commands:
        assert program == "metakern"
        monkeypatch.setattr(sys, "stdin", io.StringIO("When do you open?\n"))
        ended = main([command, *arguments, *FLAGS.get(command, [])])
        out, err = capsys.readouterr()
        assert ended == 0, f"{command} {arguments}: {err}"
        if command == "data":
            assert "7 tasks, " in out
            assert float(re.findall(r"adaptation is worth (\S+) nats per token", out)[0]) > 0.1
        if command == "adapt":
            before, after = map(float, re.findall(r"loss on them: (\S+) -> (\S+)", out)[0])
            assert after < before
        if command == "eval":
            assert all(name in out for name in ("finetune", "retrieval", "unseen questions answered right"))
        if command == "chat":
            assert out.count("\n") >= 1


def test_the_samples_of_the_page_are_read(tmp_path: Path) -> None:
    samples = [block for kind, block in BLOCKS if kind == "text"]
    tasks = []
    for text in samples:
        (tmp_path / "sample.csv").write_text(text, "utf-8")
        tasks.append([talk.task_id for talk in read(str(tmp_path / "sample.csv"))])
    assert tasks == [["bakery", "bakery", "garage"], ["delivery", "returns"]]


def test_the_page_names_what_the_reader_knows() -> None:
    table = re.sub(r"\W+", " ", PAGE.partition("| column | names |")[2].partition("\n\n")[0]).split()
    kinds = (reader.MESSAGES, reader.FAQ, reader.SIDES)
    known = {name for kind in kinds for names in kind.values() for name in names} | {*reader.TASKS}
    assert {name for name in known if not name.endswith("id")} <= {*table}
    roles = PAGE.partition("Who is called ")[2].partition(" in a log")[0]
    assert {*re.split(r", | or ", roles)} <= {*reader.BOTS}
