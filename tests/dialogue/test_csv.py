"""What only the CSV format has: names of columns, delimiters, the bot of a log, and files with mistakes."""

import re
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest
from test_formats import BANKING, EMPATHETIC, FAQ, HWU, UBUNTU

from metakern.dialogue.config import Config
from metakern.dialogue.readers import _recognize, read
from metakern.dialogue.tasks import load_split, load_whole
from metakern.errors import DataError

SAID = [("user", "Open?"), ("bot", "Yes, we are.")]


def write(tmp_path: Path, text: str | bytes, name: str = "faq.csv") -> str:
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(tmp_path / name)


def said(source: str, *arguments: str, **options: str) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return the task and the turns of each dialogue."""
    found = read(source, *arguments, **options)
    return [(talk.task_id, [(turn.speaker, turn.text) for turn in talk.turns]) for talk in found]


@pytest.mark.parametrize(
    ("header", "task"),
    [
        ("Question,Answer,Topic", "tea"),
        (" PROMPT , response,Category", "tea"),
        ("ask,reply,department", "tea"),
        ("prompt,completion,bot", "tea"),
        ("user,bot,task_id", "tea"),
        ("Human,Assistant,Domain", "tea"),
        ("question,answer,intent", "faq"),
        ("question,answer,Notes", "faq"),
        ("user,bot,notes", "faq"),
    ],
)
def test_columns_have_common_names(tmp_path: Path, header: str, task: str) -> None:
    assert said(write(tmp_path, f'{header}\nOpen?,"Yes, we are.",tea\n')) == [(task, SAID)]


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("name", ["faq.csv", "faq.tsv", "FAQ.CSV"])
def test_delimiters_byte_order_marks_and_line_breaks(
    tmp_path: Path, delimiter: str, start: bytes, end: str, name: str
) -> None:
    rows = (("question", '"answer"', "bot"), ('"a, b;\tc\n""d"""', "Yes.", "x"), ("", "", ""), ("Ünd?", "No.", "y"))
    text = end.join(delimiter.join(row) for row in rows) + end * 2
    found = said(write(tmp_path, start + text.encode(), name))
    assert found == [("x", [("user", 'a, b;\tc\n"d"'), ("bot", "Yes.")]), ("y", [("user", "Ünd?"), ("bot", "No.")])]


def test_the_delimiter_is_that_of_the_columns_not_the_commonest(tmp_path: Path) -> None:
    text = 'id;question;answer;"notes, dates, names, places"\n1;Open?;Yes, we are.;\n'
    assert said(write(tmp_path, text)) == [("faq", SAID)]


def test_options_name_the_columns(tmp_path: Path) -> None:
    faq = write(tmp_path, "Nr;Frage;Antwort;Laden\n1;Open?;Yes, we are.;tea\n")
    options = {"question": "Frage", "answer": "antwort"}
    assert said(faq, "csv", **options) == [("faq", SAID)]
    assert said(faq, "csv", **options, task_key="Laden") == [("tea", SAID)]
    swapped = write(tmp_path, 'user,bot,answer\ntea,Open?,"Yes, we are."\n')
    assert said(swapped, question="bot", answer="answer", task_key="user") == [("tea", SAID)]
    log = write(tmp_path, 'Fall,Wer,Was\n1,Kunde,Open?\n1,Eva,"Yes, we are."\n', "log.csv")
    named = {"conversation": "Fall", "speaker": "Wer", "text": "Was", "bot_speaker": "eva"}
    assert said(log, "csv", **named) == [("log", [("Kunde", "Open?"), SAID[1]])]


def test_columns_of_several_kinds(tmp_path: Path) -> None:
    both = write(tmp_path, 'prompt,reply,chat,role,text\nA?,B.,1,user,Open?\nC?,D.,1,bot,"Yes, we are."\n')
    assert said(both) == [("faq", SAID)]
    users = write(tmp_path, 'user,bot,question,answer\nann,tea,Open?,"Yes, we are."\n')
    assert said(users) == [("tea", SAID)]
    sides = write(tmp_path, 'user,bot,assistant\nOpen?,tea,"Yes, we are."\n')
    assert said(sides, task_key="bot") == [("tea", SAID)]
    assert said(sides) == [("faq", [SAID[0], ("bot", "tea")])]


def test_the_bot_of_a_log_has_the_role_or_the_name_of_one(tmp_path: Path) -> None:
    def log(*speakers: str) -> str:
        rows = "".join(f"1,{speaker},{speaker} says\n" for speaker in speakers)
        return write(tmp_path, f"chat_id,author,content\n{rows}", "log.csv")

    for bot in ("assistant", "BOT", "agent", "Operator", "support"):
        assert [who for who, _ in said(log("system", bot, "client"))[0][1]] == ["system", "bot", "user"]
    assert [who for who, _ in said(log("human", "system"), bot_speaker="system")[0][1]] == ["user", "bot"]
    assert [who for who, _ in said(log("ann", "agent"), bot_speaker="ann")[0][1]] == ["bot", "agent"]
    for speakers in (("user", "system"), ("ann", "bob")):
        with pytest.raises(DataError, match=r"got 1 without a turn of a bot, assistant or agent .*bot_speaker=NAME"):
            read(log(*speakers))
    with pytest.raises(DataError, match="got 1 without a turn of eve "):
        read(log("ann", "agent"), bot_speaker="eve")


def test_the_task_of_a_conversation_is_that_of_its_rows(tmp_path: Path) -> None:
    rows = [
        (1, "user", ""),
        (1, "bot", "tea "),
        (2, "user", "tea"),
        (2, "bot", "rice"),
        (3, "user", ""),
        (3, "bot", ""),
    ]
    text = "".join(f"{number},{role},hi {role},{topic}\n" for number, role, topic in rows)
    found = read(write(tmp_path, f"conversation,role,text,topic\n{text}"))
    assert [(talk.task_id, talk.dialogue_id) for talk in found] == [("tea", "faq:1")]
    assert found.skipped == {"of several tasks": 1, "without a task": 1}


def test_groups_are_kept_and_each_file_of_a_folder_is_a_task(tmp_path: Path) -> None:
    write(tmp_path, "question,answer,group\nOpen?,No.,shops\nShut?,Yes.,\n", "a.csv")
    write(tmp_path, "question;answer\nOpen?;Yes.\n", "b.csv")
    found = read(str(tmp_path))
    assert [(talk.task_id, talk.meta.get("group")) for talk in found] == [("a", "shops"), ("a", None), ("b", None)]


@pytest.mark.parametrize(
    ("text", "format"),
    [
        (EMPATHETIC, "empathetic"),
        (UBUNTU, "ubuntu"),
        (BANKING, "intents"),
        (HWU, "intents"),
        ("answer,category\nYes.,tea\n", "intents"),
        ("conversation_id,role,text,category\n", "csv"),
        (FAQ.replace("bot", "category"), "csv"),
    ],
)
def test_sets_in_csv_keep_their_formats(tmp_path: Path, text: str, format: str) -> None:
    assert _recognize(Path(write(tmp_path, text))).name == format


def test_a_byte_order_mark_does_not_hide_a_column_of_another_format(tmp_path: Path) -> None:
    assert len(read(write(tmp_path, "\ufeff" + BANKING))) == 2


NEEDED = "the first line must name the columns question and answer, or conversation, speaker and text, got "


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("", {}, "faq.csv: must hold a dialogue, got an empty file"),
        (" \n\n", {}, "faq.csv: must hold a dialogue, got an empty file"),
        (";;\n", {}, "faq.csv: must hold a dialogue, got an empty file"),
        ("question,answer\n", {}, "faq.csv: must hold a dialogue, got an empty file"),
        ("question,answer\n,No.\n,,\n", {}, "must hold a dialogue, got 1 rows without a question and an answer"),
        ("Open?,Yes.\nShut?,No.\n", {}, f"faq.csv: {NEEDED}Open?, Yes.: add such a line, or tell which is which by"),
        ('"Open\nnow?",Yes.\n', {}, f"faq.csv: {NEEDED}Open now?, Yes.: "),
        ("question,comment\n", {}, f"faq.csv: {NEEDED}question, comment: "),
        ("user,response,message\n", {}, f"faq.csv: {NEEDED}user, response, message: "),
        ("role,text\n", {}, f"faq.csv: {NEEDED}role, text: "),
        ("question|answer\n", {}, f"faq.csv: {NEEDED}question|answer: "),
        ("customer,agent,minutes\n", {}, f"faq.csv: {NEEDED}customer, agent, minutes: "),
        ("sep=;\nquestion;answer\n", {}, f"faq.csv: {NEEDED}sep=: "),
        ("question,answer,who\na,b,c\n", {"speaker": "who"}, f"faq.csv: {NEEDED}question, answer, who: "),
        ("question,answer\n", {"question": "Frage"}, "question must be the name of a column, got 'Frage': the columns"),
        ("question,answer\n", {"task_key": "shop"}, "task must be the name of a column, got 'shop': the columns are "),
        ("question,Question,answer\n", {}, "faq.csv: the first line must name each column once, got 'question' twice"),
        ("question,answer\nOpen?,Yes, we are.\n", {}, "faq.csv:2: must have 2 columns, got 3: put a text that has a"),
        (
            "question;answer\nOpen\nnow?;Yes.\n",
            {},
            "faq.csv:2: must have 2 columns, got 1: put a text that has a semic",
        ),
        ('question,answer\na,b\n"Open?,Yes.\nc,d\n', {}, "faq.csv:3: must be CSV, got unexpected end of data: "),
        ('question,answer\n"Open" now?,Yes.\n', {}, "faq.csv:2: must be CSV, got "),
        ('question,answer\n"' + "x" * 200_000, {}, "faq.csv:2: must be CSV, got field larger than field limit"),
        (
            b"question,answer\n" + b"a,b\n" * 9999 + b"\xe4,b\n",
            {},
            "faq.csv:10001: must be UTF-8, got byte 0xe4: convert",
        ),
        (b"\xff\xfeq\0u\0", {}, "faq.csv:1: must be UTF-8, got byte 0xff"),
        (b"PK\x03\x04\x14\xff", {}, "faq.csv: must be text, got a compressed file: unpack it with unzip"),
        (b"\0\1\2,\n\0", {}, f"faq.csv: {NEEDED}"),
    ],
)
def test_bad_files_are_errors_of_one_line(tmp_path: Path, text: str | bytes, options: dict, message: str) -> None:
    with pytest.raises(DataError, match=re.escape(message)) as error:
        read(write(tmp_path, text), "csv", **options)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500 + len(str(tmp_path))


def test_a_header_that_is_not_known_names_the_format(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"must be in a known format, got another: set format to one of .*csv"):
        read(write(tmp_path, "Frage;Antwort\nOpen?;Yes.\n"))


def test_unnamed_columns_at_the_end_may_be_empty(tmp_path: Path) -> None:
    assert (
        said(write(tmp_path, "question;answer;;\nOpen?;Yes, we are.;;\n;;;\nOpen?;Yes, we are.\n"))
        == [("faq", SAID)] * 2
    )
    with pytest.raises(DataError, match=r"faq.csv:2: must have 2 columns, got 3"):
        read(write(tmp_path, "question;answer;\nOpen?;Yes.;why\n"))


def test_a_run_says_which_rows_were_left_out(tmp_path: Path) -> None:
    def faq(name: str, shops: str, rows: int = 9) -> str:
        found = [f"What is number {i} of {shop}?,It is {i}.,{shop}" for shop in shops for i in range(rows)]
        return write(tmp_path, "\n".join(("question,answer,bot", *found, "Why?,,a", "Whose?,Nobody's.,")), name)

    config = Config(data=faq("faq.csv", "abcd"))
    once = {"rows without a question and an answer": 1, "rows without a task": 1}
    assert load_split(config).skipped == once
    assert load_whole(config, config.data)[1] == once
    test = replace(config, test_data=faq("test.csv", "ef"))
    assert load_split(test).skipped == dict.fromkeys(once, 2)
    with pytest.raises(
        DataError, match=r"got 0 \(1 rows without a question and an answer, 1 rows without a task, 1 task"
    ):
        load_split(Config(data=faq("few.csv", "a", rows=3)))


def test_a_large_file_is_not_held_in_memory(tmp_path: Path) -> None:
    source = write(tmp_path, "question,answer,notes\n" + f"Open?,Yes.,{'x' * 5000}\n" * 4_000)
    tracemalloc.start()
    found = read(source)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(found) == 4_000
    assert peak < 10e6 < (tmp_path / "faq.csv").stat().st_size
