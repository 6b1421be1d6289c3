"""Readers: every format gives dialogues, and every bad input is an error of one line."""

import gzip
import importlib
import json
import os
import re
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metakern.dialogue import readers
from metakern.dialogue.readers import READERS, Dialogue, Reader, Turn, dialogue, read, words
from metakern.errors import DataError

DATA = Path(__file__).parent / "data"


def jsonl(path: Path, *records: object) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    return str(path)


def talk(*texts: str, **keys: object) -> dict[str, object]:
    """Return a record of messages, by user and assistant in turn; `keys` are added to it."""
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)], **keys}


def one_line(excinfo: pytest.ExceptionInfo[DataError], *parts: str) -> None:
    """Assert that the error is one line and contains `parts`."""
    message = str(excinfo.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_chitchat_topics_merge_turns_and_count_skipped_conversations():
    found = read(str(DATA / "chitchat.json"))
    assert [(d.task_id, d.dialogue_id, d.meta) for d in found] == [
        ("What if pigs could fly?", "c1", {"bot": "bob"}),
        ("Mozart or Beethoven?", "c2", {"bot": "eve"}),
    ]
    assert found[0].turns[0] == Turn("ann", "Hi there\nhow are   you?")
    assert found.skipped == {
        "with an e-mail address": 1,
        "with fewer than 4 turns": 1,
        "without a prompt": 1,
        "without messages of sender and text": 1,
        "without two speakers": 1,
    }
    assert found.summary().endswith(
        "2 dialogues of 2 tasks; skipped 5 (1 with an e-mail address, 1 with fewer than 4 turns,"
        " 1 without a prompt, 1 without messages of sender and text, 1 without two speakers)"
    )


def test_chitchat_senders_are_the_bots_of_their_tasks():
    found = read(str(DATA / "chitchat.json"), tasks="senders")
    assert sorted((d.task_id, d.dialogue_id) for d in found) == [
        ("ann", "c1"),
        ("ann", "noprompt"),
        ("bob", "c1"),
        ("bob", "c2"),
        ("eve", "c2"),
        ("eve", "noprompt"),
    ]
    assert all(d.meta["bot"] == d.task_id for d in found)


def test_packaged_chitchat():
    topics = read("chitchat")
    assert len({d.task_id for d in topics}) == 34
    assert len(topics) == 3137
    assert all(len({t.speaker for t in d.turns}) == 2 and len(d.turns) >= 4 for d in topics)
    senders = Counter(d.task_id for d in read("chitchat:senders"))
    assert sum(count >= 8 for count in senders.values()) == 144


def test_packaged_chitchat_has_subjects():
    found = read("chitchat:subjects")
    assert len(found) > 10_000
    counts = Counter(d.task_id for d in found)
    assert {"piano", "pizza", "physics"} < counts.keys()
    assert min(counts.values()) >= 24
    assert len({(d.task_id, d.dialogue_id) for d in found}) == len(found)
    assert all(d.task_id in {w for t in d.turns for w in words(t.text)} and len(d.turns) >= 2 for d in found)
    turns = [(d.dialogue_id, id(t)) for d in found for t in d.turns]
    assert len(set(turns)) == len(turns)


def test_a_passage_belongs_to_the_subject_that_it_names_most(tmp_path, monkeypatch):
    module = importlib.import_module("metakern.dialogue.readers.chitchat")
    for name, value in {"PASSAGE": 4, "FEWEST": 2, "RARE": 1, "FEWEST_PASSAGES": 2}.items():
        monkeypatch.setattr(module, name, value)

    def conversation(*texts: str) -> dict:
        messages = [[{"text": text, "timestamp": "", "sender": "ab"[i % 2]}] for i, text in enumerate(texts)]
        return {"messages": messages, "prompt": "anything"}

    talks = {
        "1": conversation("you play piano", "piano yes", "so nice", "pizza then"),
        "2": conversation("my piano is old", "sell it", "or eat pizza pizza", "with piano music"),
        "3": conversation("hm ok", "no", "some salad", "today too"),
        "4": conversation("eh oh", "no", "well salad", "x"),
        "5": conversation("unique words", "here and", "nobody else", "says them"),
    }
    path = tmp_path / "talks.json"
    path.write_text(json.dumps(talks))
    found = read(str(path), "chitchat", tasks="subjects")
    assert [(d.task_id, d.dialogue_id, d.turns[0].text) for d in found] == [
        ("piano", "1", "you play piano"),
        ("piano", "2", "my piano is old"),
        ("pizza", "1", "so nice"),
        ("pizza", "2", "or eat pizza pizza"),
        ("salad", "3", "hm ok"),
        ("salad", "4", "eh oh"),
    ]


def test_chatterbot_skips_repeated_questions_and_keeps_scalars_as_text():
    found = read(str(DATA / "chatterbot"))
    assert [(d.task_id, [t.text for t in d.turns]) for d in found] == [
        ("english/food", ["Do you eat?", "Yes"]),
        ("english/food", ["42", "Note: a number", "yes"]),
        ("german/essen", ["Isst du?", "Nein."]),
    ]
    assert found.skipped == {
        "that are not a list of turns": 1,
        "with a repeated question": 1,
        "with fewer than 2 turns": 1,
    }
    assert {d.task_id for d in read(str(DATA / "chatterbot"), language="german")} == {"german/essen"}
    assert read(str(DATA / "chatterbot" / "english" / "food.yml"))[0].task_id == "english/food"


def test_the_name_of_packaged_data_wins_over_a_folder_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    jsonl(tmp_path / "chatterbot", talk("Hi", "Ho"))
    assert len(read("chatterbot:english")) > 400
    assert len(read("./chatterbot", "messages")) == 1


def test_packaged_chatterbot():
    found = read("chatterbot:english")
    questions = [(d.task_id, words(d.turns[0].text)) for d in found]
    assert len(set(questions)) == len(questions) > 400
    every = {d.task_id.split("/")[0]: d.meta["group"] for d in read("chatterbot")}
    assert {"english", "chinese", "german"} < every.keys()
    moved = {language: group for language, group in every.items() if language != group}
    assert moved == {"traditionalchinese": "chinese", "hinglish": "hindi"}
    with pytest.raises(DataError, match=r"language must be one of .*english.*, got klingon"):
        read("chatterbot:klingon")


def test_messages_roles_parts_and_tasks(tmp_path):
    path = jsonl(
        tmp_path / "mine.jsonl",
        talk("Hi", "Hello", topic="a"),
        talk("Hi", "Hello", task="b", topic="a"),
        talk("Hi", "Hello", persona=["likes tea\n", "has 2 cats"]),
        talk("Hi", "Hello", topic=None),
        {"prompt": "Question?", "completion": "Answer."},
        {"prompt": [{"role": "human", "content": "Q"}], "completion": [{"role": "gpt", "content": "A"}]},
        {
            "messages": [
                {"role": "developer", "content": "Be kind."},
                {
                    "role": "user",
                    "content": [{"type": "text", "text": "Look:"}, {"type": "image"}, {"type": "text", "text": "x"}],
                },
                {"role": "assistant", "content": None},
                {"role": "function", "content": "3"},
                {"role": "assistant", "content": "Three."},
            ]
        },
    )
    found = read(path)
    assert [d.task_id for d in found] == ["a", "b", "likes tea has 2 cats", "mine", "mine", "mine", "mine"]
    assert [d.dialogue_id for d in found] == [f"mine:{i}" for i in range(1, 8)]
    assert found[4].turns == (Turn("user", "Question?"), Turn("assistant", "Answer."))
    assert found[5].turns == (Turn("user", "Q"), Turn("assistant", "A"))
    assert found[6].turns == (
        Turn("system", "Be kind."),
        Turn("user", "Look: x"),
        Turn("tool", "3"),
        Turn("assistant", "Three."),
    )
    assert {d.meta["bot"] for d in found} == {"assistant"}


def test_messages_task_key_arrays_and_directories(tmp_path):
    (tmp_path / "one.json").write_text(json.dumps([talk("Hi", "Yo", who="x"), talk("Hi", "Yo")]), "utf-8")
    jsonl(tmp_path / "two.jsonl", talk("Hi", "Ho"))
    assert [d.task_id for d in read(str(tmp_path), "messages")] == ["one", "one", "two"]
    keyed = read(str(tmp_path / "one.json"), task_key="who")
    assert ([d.task_id for d in keyed], keyed.skipped) == (["x"], {"without the key who": 1})
    (tmp_path / "bom.jsonl").write_text("\ufeff" + json.dumps(talk("Hi", "Ho")), "utf-8")
    assert len(read(str(tmp_path / "bom.jsonl"))) == 1


def test_bad_dialogues_among_good_ones_are_skipped_and_counted(tmp_path):
    bad = [
        talk("alone"),
        talk("", "  "),
        {"messages": [{"role": "pirate", "content": "arr"}]},
        {"messages": 3},
        {"x": 1},
        {"messages": [{"role": "user", "content": "a"}, {"role": "system", "content": "b"}]},
    ]
    found = read(jsonl(tmp_path / "mixed.jsonl", *bad, talk("Hi", "Ho")))
    assert len(found) == 1
    assert found.skipped == {"without a turn of the assistant": 3, "without messages of role and content": 3}


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (b"", ("an empty file",)),
        (b"\n\n", ("an empty file",)),
        (
            b'{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n{"messa',
            (":2: must be JSON, got ", "the file may be cut short"),
        ),
        (b'[\n{"messages": [', (":2: must be JSON, got ", "cut short")),
        (b'{"messages": [\xff]}', (":1: must be UTF-8, got byte 0xff", "iconv")),
        (b'\n\n{"messages": "caf\xe9"}', (":3: must be UTF-8, got byte 0xe9",)),
        (b'{"messages": [{"role": "assistant", "content": "only me"}]}', ("1 with fewer than 2 turns",)),
        (b'[["messages"]]', (":1: must be an object with messages, got list",)),
        (b'{"messages": ' + b"[" * 100_000, (":1: must be JSON",)),
        (b'{"messages": [], "id": ' + b"9" * 10_000 + b"}", (":1: must be JSON",)),
    ],
)
def test_a_bad_file_of_messages_is_an_error_of_one_line(tmp_path, content, parts):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError) as excinfo:
        read(str(path))
    one_line(excinfo, str(path), *parts)


def test_bad_sources_are_errors_of_one_line(tmp_path):
    with pytest.raises(DataError) as excinfo:
        read("chitchap")
    one_line(excinfo, "chitchap: no such file or directory", "did you mean chitchat?")
    with pytest.raises(DataError, match="no such file or directory"):
        read("x" * 5000)
    with pytest.raises(DataError, match=r"format must be one of .*, got 'mesages'; did you mean messages\?"):
        read(str(DATA / "topics.jsonl"), "mesages")
    with pytest.raises(DataError, match="tasks must be one of topics, subjects, senders, got weather"):
        read(str(DATA / "chitchat.json"), tasks="weather")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(DataError, match=r"notes.txt: must be in a known format, got another: set format to one of "):
        read(str(tmp_path / "notes.txt"))
    with pytest.raises(DataError, match=r"must hold files that end in .jsonl or .ndjson or .json, got none"):
        read(str(tmp_path), "messages")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(DataError, match="must be an object of conversations, got list"):
        read(str(tmp_path / "list.json"), "chitchat")
    with pytest.raises(DataError, match=f"^{re.escape(str(tmp_path))}: cannot be read: "):
        read(str(tmp_path), "chitchat")


# Nine lines of YAML that stand for 9**9 texts.
BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 9)}]\n" for i in range(9))
BOMB += "conversations: [*a9]"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("conversations: [", "must be YAML"),
        ("- a\n- b\n", "key conversations"),
        ("conversations: 3", "key conversations"),
        ("", "key conversations"),
        ("conversations: [[a, b]]\nconversations: [[c, d]]", "must have each key once"),
        ("conversations: [&a [*a, b]]", "must be YAML without aliases, got *a: write it out"),
        (BOMB, "must be YAML without aliases"),
        ("a: " + "{b: " * 60 + "c" + "}" * 60, "of moderate depth"),
        ("conversations: [[a\0, b]]", "must be YAML"),
        ("conversations: " + "[" * 20_000 + "]" * 20_000, "must be YAML"),
    ],
)
def test_bad_yaml_is_an_error_of_one_line(tmp_path, text, problem):
    path = tmp_path / "bad.yml"
    path.write_text(text)
    with pytest.raises(DataError) as excinfo:
        read(str(path))
    one_line(excinfo, str(path), problem)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".yml", ".txt"])
def test_a_pipe_or_a_device_is_an_error_and_blocks_nobody(tmp_path, suffix):
    for place in (lambda path: os.mkfifo(path), lambda path: path.symlink_to("/dev/zero")):
        path = tmp_path / f"talk{suffix}"
        path.unlink(missing_ok=True)
        place(path)
        with pytest.raises(DataError, match="cannot be read: it must be a regular file, not a pipe or a device"):
            read(str(path))
    with pytest.raises(DataError, match=r"must be in a known format|must hold"):  # in a folder, they are no data
        read(str(tmp_path))


def test_long_lines_and_texts_have_limits(tmp_path):
    def record(size):
        roles = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "a" * size}]
        return json.dumps({"messages": roles}) + "\n"

    path = tmp_path / "talk.jsonl"
    path.write_text(record(100_000_000))
    with pytest.raises(DataError, match="must hold a dialogue, got 1 with a turn of more than 100,000 characters"):
        read(str(path))
    path.write_text(record(100_000) + record(100_001))
    assert len(read(str(path))) == 1
    path = tmp_path / "talk.csv"
    path.write_text("question,answer\nHi," + "a" * 10**6 + "\n")
    with pytest.raises(DataError, match="field larger than field limit"):
        read(str(path))
    path.write_text("a")
    os.truncate(path, 2**32)
    with pytest.raises(DataError, match="it must have at most 2,147,483,648 bytes, got 4,294,967,296"):
        read(str(path))


def test_a_missing_package_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match=re.escape("chitchat_dataset is missing: pip install metakern[dialogue]")):
        read("chitchat")


def test_missing_yaml_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(DataError, match=re.escape("pyyaml is missing: pip install metakern[dialogue]")):
        read(str(DATA / "chatterbot"))


def test_a_format_is_one_decorated_function(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "READERS", dict(READERS))

    @readers.reader("lines", suffixes=(".talk",))
    def lines(path, skipped):
        yield dialogue("t", path.stem, [(str(i % 2), line) for i, line in enumerate(path.read_text().splitlines())])

    assert isinstance(readers.READERS["lines"], Reader)
    (tmp_path / "x.talk").write_text("one\ntwo\n")
    assert readers.read(str(tmp_path / "x.talk")) == [Dialogue("t", "x", (Turn("0", "one"), Turn("1", "two")))]


@pytest.mark.parametrize(
    ("record", "task_id"),
    [
        ({"task": 0, "topic": "x"}, "0"),
        ({"task": False, "topic": "x"}, "False"),
        ({"task": 0.0, "topic": "x"}, "0.0"),
        ({"task": [0], "topic": "x"}, "0"),
        ({"task": "", "topic": 0}, "0"),
        ({"task": " \n", "topic": "x"}, "x"),
        ({"task": None, "topic": "x"}, "x"),
        ({"task": [], "topic": "x"}, "x"),
        ({"task": [None, ""], "topic": "x"}, "x"),
        ({"task": "\ud800", "topic": "x"}, "?"),
        ({"topic": None}, "mine"),
    ],
)
def test_zero_and_false_name_a_task_and_null_and_empty_do_not(tmp_path, record, task_id):
    for key in ("messages", "conversations"):
        spoken = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
        assert read(jsonl(tmp_path / "mine.jsonl", {key: spoken, **record}))[0].task_id == task_id


def test_records_without_the_task_key_are_skipped_and_counted(tmp_path):
    path = jsonl(tmp_path / "mine.jsonl", *(talk("Hi", "Ho", who=who) for who in (0, "b", "", None, [])))
    found = read(path, task_key="who")
    assert ([d.task_id for d in found], found.skipped) == (["0", "b"], {"without the key who": 3})


@pytest.mark.parametrize(
    ("content", "text", "skipped"),
    [
        (["the answer"], "the answer", 0),
        (["the", "answer"], "the answer", 0),
        ({"parts": ["the", {"text": "answer"}]}, "the answer", 0),
        ({"content_type": "text", "parts": ["the answer"]}, "the answer", 0),
        ({"type": "text", "text": "the answer"}, "the answer", 0),
        ([{"type": "text", "text": {"value": "the answer", "annotations": []}}], "the answer", 0),
        ([["the"], [[{"text": "answer"}]]], "the answer", 0),
        ([{"type": "text", "text": "the"}, {"type": "image_url", "image_url": {}}, None, "answer"], "the answer", 2),
        ({"text": None, "value": "the answer"}, "the answer", 0),
        (42, "42", 0),
        ([0, " of ", -7], "0  of  -7", 0),
        (123456789012345678901234567890, "123456789012345678901234567890", 0),
    ],
)
def test_contents_in_parts_are_joined_and_parts_without_text_are_counted(tmp_path, content, text, skipped):
    spoken = [{"role": "user", "content": "q"}, {"role": "assistant", "content": content}]
    found = read(jsonl(tmp_path / "mine.jsonl", {"messages": spoken}))
    assert found[0].turns == (Turn("user", "q"), Turn("assistant", text))
    assert found.skipped == ({"message parts without text": skipped} if skipped else {})


@pytest.mark.parametrize("content", [True, {}, {"image": "x"}, {"parts": None}, {"text": False}, [True]])
def test_dialogues_with_unreadable_contents_are_skipped_and_counted(tmp_path, content):
    odd = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": content}]}
    found = read(jsonl(tmp_path / "mine.jsonl", odd, talk("Hi", "Ho")))
    assert (len(found), found.skipped) == (1, {"without messages of role and content": 1})


def test_messages_without_content_are_left_out_only_where_they_may_lack_it(tmp_path):
    def with_answer(**answer: object) -> dict[str, object]:
        last = {"role": "assistant", "content": "Well."}
        return {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", **answer}, last]}

    silent = [with_answer(content=None), with_answer(tool_calls=[{}]), with_answer(function_call={})]
    named = [with_answer(parts=["Yes."]), with_answer(text="Yes."), with_answer(content=None, parts=[{"text": "Yes."}])]
    found = read(jsonl(tmp_path / "mine.jsonl", *silent, *named, with_answer(), with_answer(name="x")))
    assert [d.turns[1].text for d in found] == ["Well."] * 3 + ["Yes.\nWell."] * 3
    assert found.skipped == {"without messages of role and content": 2}


def test_roles_are_read_in_any_case(tmp_path):
    spoken = [{"role": "User", "content": "Hi"}, {"role": " ASSISTANT", "content": "Ho"}]
    found = read(jsonl(tmp_path / "mine.jsonl", {"messages": spoken}))
    assert found[0].turns == (Turn("user", "Hi"), Turn("assistant", "Ho"))


def test_numbers_keep_their_digits(tmp_path):
    path = tmp_path / "mine.jsonl"
    spoken = '{"role": "user", "content": 3.10}, {"role": "assistant", "content": [1e400, NaN]}'
    path.write_text(f'{{"task": 1.50, "messages": [{spoken}]}}')
    found = read(str(path))
    assert (found[0].task_id, [turn.text for turn in found[0].turns]) == ("1.50", ["3.10", "1e400 NaN"])


@pytest.mark.parametrize("name", ["mine.json", "mine.jsonl", "MINE.JSON"])
@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("many", [None, " ", "\n", "\r\n\r\n \r\n", "\n\ufeff"])
@pytest.mark.parametrize("start", ["", "\ufeff", "\n\n  "])
def test_records_are_read_as_json_arrays_and_json_lines_in_every_layout(tmp_path, name, indent, many, start):
    record = {"tools": "x" * 5000, "meta": {"sender": "conversations"}, "sender": "me", **talk("Hi", "Ho", topic="a")}
    one = json.dumps(record, indent=indent)
    layouts = [one, f"[{one}]"] if many is None else [one + many + one, f"[{one},{many}{one}]\n"]
    for text in layouts:
        (tmp_path / name).write_bytes((start + text).encode())
        found = read(str(tmp_path / name))
        assert [(d.task_id, len(d.turns)) for d in found] == [("a", 2)] * (1 if many is None else 2)
        assert found.skipped == {}


def test_the_first_record_of_a_known_kind_decides_the_format(tmp_path):
    odd = [{}, {"x": 1}]
    assert len(read(jsonl(tmp_path / "a.jsonl", *odd, talk("Hi", "Ho")))) == 1
    with pytest.raises(
        DataError, match=r"b.jsonl: must be in a known format, got another: set format to one of chatterbot, .*sharegpt"
    ):
        read(jsonl(tmp_path / "b.jsonl", *odd))
    shared = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "prompt": "x"}
    assert len(read(jsonl(tmp_path / "c.jsonl", *odd, shared))) == 1
    (tmp_path / "d.json").write_text(
        json.dumps([talk("Hi", "Ho"), {"messages": None, "prompt": "q", "completion": "a"}])
    )
    assert [d.turns[1].text for d in read(str(tmp_path / "d.json"))] == ["Ho", "a"]


def test_sharegpt(tmp_path):
    def part(name: str, *spoken: tuple[str, object], **keys: object) -> dict[str, object]:
        return {"id": name, "conversations": [{"from": who, "value": text} for who, text in spoken], **keys}

    records = [
        part("Ab1_0", ("human", "How do I bake bread?"), ("gpt", "With flour.")),
        part("Ab1_12", ("gpt", "And with salt."), ("human", "Thanks"), ("gpt", "Enjoy.")),
        part("Cd2_0", ("user", "Hi"), ("chatgpt", "Hello"), ("user", "?"), ("bing", "Yes?"), system="Be brief."),
        part("Cd2_2", ("system", "Sing."), ("human", "Do re"), ("bard", "mi"), topic=0),
        part("Ef3_0"),
        part("Ef3_1", ("human", "Hello?")),
        part("Gh4_0", ("human", "Hello?"), ("martian", "Hello.")),
        part("Gh4_1", ("human", "Hello?"), ("gpt", None)),
        {"id": "Ij5_0", "conversations": None},
        {"id": "Kl6_0"},
    ]
    (tmp_path / "shared.json").write_text(json.dumps(records, indent=1))
    jsonl(tmp_path / "shared.jsonl", *records)
    for name in ("shared.json", "shared.jsonl"):
        found = read(str(tmp_path / name))
        assert [d.task_id for d in found] == ["shared", "shared", "shared", "0"]
        assert [d.dialogue_id for d in found] == [f"shared:{i}" for i in range(1, 5)]
        assert found[1].turns[0] == Turn("assistant", "And with salt.")
        assert [turn.speaker for turn in found[2].turns] == ["system", *("user", "assistant") * 2]
        assert found[3].turns == (Turn("system", "Sing."), Turn("user", "Do re"), Turn("assistant", "mi"))
        assert {d.meta["bot"] for d in found} == {"assistant"}
        assert found.skipped == {
            "without a turn of the assistant": 3,
            "without conversations of from and value": 3,
        }
    by_id = read(str(tmp_path / "shared.json"), task_key="id")
    assert [d.task_id for d in by_id] == ["Ab1", "Ab1", "Cd2", "Cd2"]


@pytest.mark.parametrize("cut", [60, 100, 150, 190])
@pytest.mark.parametrize("indent", [None, 1])
def test_a_truncated_sharegpt_file_is_an_error_of_one_line(tmp_path, cut, indent):
    spoken = [{"from": "human", "value": "How do I bake bread?"}, {"from": "gpt", "value": "With flour and water."}]
    text = json.dumps([{"id": "Ab1_0", "conversations": spoken}] * 2, indent=indent)[:cut]
    (tmp_path / "cut.json").write_text(text)
    with pytest.raises(DataError) as excinfo:
        read(str(tmp_path / "cut.json"))
    line = text.count("\n") + 1
    assert re.search(
        rf":({line}|{line - 1}): must be JSON, got .* at column \d+: the file may be cut", str(excinfo.value)
    )
    one_line(excinfo)


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ('[{"messages": []}, {"messages": []}', (":1: must be JSON, got no ", "cut short")),
        ('[{"messages": []},', (":1: must be JSON, got no closing bracket", "cut short")),
        ('[{"messages": []} {"messages": []}]', (":1: must be JSON, got no comma",)),
        ('[{"messages": []}]\nmore', (":2: must be JSON, got more after the end at column 1",)),
        ('[{"messages": []},\n\n 3]', (":3: must be an object with messages, got int",)),
        ('{"messages": []}\n{"mess\n{"messages": []}', (":2: must be JSON, got Unterminated string starting at col",)),
        ('{"messages": []}\n{"messages": [\n{"messages": []}', (":2: must be JSON, got Expecting value at column 15",)),
        ('{"messages": []}\n\0\0', (":2: must be JSON",)),
        ('{"messages": [], "messages": []}', (":1: must have each key once in an object, got 'messages' twice: keep",)),
        ('{"messages": []}\n{"messages": [{"role": 1, "role": 2}]}', (":2: must have each key once", "'role'")),
        (b"\x1f\x8b\x08\x00\xff\xff", ("must be text, got a compressed file: unpack it with gunzip",)),
        (b"PK\x03\x04\xff\xff", ("unpack it with unzip",)),
        (b"\xff\xfe{\x00}\x00", (":1: must be UTF-8, got byte 0xff: convert it with iconv",)),
        ("null", (":1: must be an object with messages, got NoneType",)),
    ],
)
def test_damaged_records_are_errors_of_one_line(tmp_path, content, parts):
    path = tmp_path / "bad.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError) as excinfo:
        read(str(path))
    one_line(excinfo, str(path), *parts)


def test_a_compressed_file_of_any_name_says_how_to_unpack_it(tmp_path):
    (tmp_path / "talk.jsonl.gz").write_bytes(gzip.compress(json.dumps(talk("Hi", "Ho")).encode()))
    with pytest.raises(DataError, match=r"talk.jsonl.gz: must be text, got a compressed file: unpack it with gunzip"):
        read(str(tmp_path / "talk.jsonl.gz"))


def test_deeply_nested_contents_are_skipped_and_counted(tmp_path):
    path = tmp_path / "deep.jsonl"
    deep = '{"messages": [{"role": "user", "content": ' + "[" * 900 + '"a"' + "]" * 900 + "}]}\n"
    path.write_text(deep + json.dumps(talk("Hi", "Ho")))
    found = read(str(path))
    assert (len(found), sum(found.skipped.values())) == (1, 1)


def test_lone_surrogates_are_replaced_and_zero_bytes_kept(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps(talk("\ud83d\ude42 \udc00", "b\0c", topic="a\ud800")))
    found = read(str(path))
    assert [(d.task_id, [turn.text for turn in d.turns]) for d in found] == [("a?", ["🙂 ?", "b\0c"])]
    for d in found:
        (d.task_id + d.dialogue_id + "".join(turn.text for turn in d.turns)).encode()


def test_other_files_of_a_directory_are_counted_and_hidden_ones_ignored(tmp_path):
    (tmp_path / "a.json").write_text('{"version": 1}')
    jsonl(tmp_path / "b.jsonl", talk("Hi", "Ho"))
    (tmp_path / "c.yml").write_text("conversations:\n- [q, a]\n")
    (tmp_path / "LICENSE").write_text("free")
    (tmp_path / "._b.jsonl").write_bytes(b"\xff\0")
    (tmp_path / ".git").mkdir()
    jsonl(tmp_path / ".git" / "d.jsonl", talk("Hi", "Ho"))
    (tmp_path / "e.json").mkdir()
    found = read(str(tmp_path))
    assert len(found) == 1
    assert found.skipped == {
        "files that do not end in .jsonl or .ndjson or .json": 2,
        "without messages of role and content": 1,
    }
    assert read(str(tmp_path), "chatterbot").skipped == {"files that do not end in .yml or .yaml": 3}


def test_chitchat_ignores_null_texts_and_skips_null_prompts_and_senders(tmp_path):
    def conversation(prompt: object, *spoken: tuple[object, object]) -> dict[str, object]:
        return {"prompt": prompt, "messages": [[{"sender": who, "text": text}] for who, text in spoken]}

    four = [("a", "1"), ("b", "2"), ("a", 3), ("b", "4")]
    talks = {
        "null prompt": conversation(None, *four),
        "null text": conversation("Weather", ("a", None), *four),
        "null sender": conversation("Weather", (None, "0"), *four),
        "a list": conversation("Weather", ("a", ["0"]), *four),
        "a sender 0": conversation("Weather", (0, "1"), ("b", "2"), (0, "3"), ("b", "4")),
    }
    path = tmp_path / "talks.json"
    path.write_text(json.dumps(talks))
    found = read(str(path))
    assert [(d.dialogue_id, d.turns[0]) for d in found] == [
        ("null text", Turn("a", "1")),
        ("a sender 0", Turn("0", "1")),
    ]
    assert found.skipped == {"without a prompt": 1, "without messages of sender and text": 2}


def test_chatterbot_compares_questions_without_words_as_they_are_written(tmp_path):
    (tmp_path / "a.yml").write_text(
        "conversations:\n- [':-)', glad]\n- [':-(', sad]\n- ['🙂', glad]\n- [':-)', x]\n", "utf-8"
    )
    found = read(str(tmp_path / "a.yml"))
    assert [d.turns[0].text for d in found] == [":-)", ":-(", "🙂"]
    assert found.skipped == {"with a repeated question": 1}


@given(
    st.lists(st.tuples(st.sampled_from("ab"), st.text(st.characters(exclude_categories=()), max_size=8)), max_size=8)
)
def test_dialogue_strips_texts_merges_turns_and_loses_no_character(turns):
    result = dialogue("t", "d", turns).turns
    assert all(turn.text == turn.text.strip() != "" for turn in result)
    assert all(a.speaker != b.speaker for a, b in pairwise(result))
    said = Counter("".join("".join(text.encode("utf-8", "replace").decode().split()) for _, text in turns))
    assert said == Counter("".join("".join(turn.text.split()) for turn in result))
