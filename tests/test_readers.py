"""Readers: every format as dialogues, every bad input as one clear line."""

import importlib
import json
import re
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metakern.dialogue import readers
from metakern.dialogue.readers import READERS, DataError, Dialogue, Reader, Turn, dialogue, read, words

DATA = Path(__file__).parent / "data"


def jsonl(path: Path, *records: object) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    return str(path)


def talk(*texts: str, **keys: object) -> dict[str, object]:
    roles = ("user", "assistant")
    return {"messages": [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)], **keys}


def one_line(excinfo: pytest.ExceptionInfo[DataError], *parts: str) -> None:
    message = str(excinfo.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_chitchat_topics_merge_turns_and_count_what_they_skip():
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


def test_chatterbot_deduplicates_questions_and_keeps_words_as_written():
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
    assert len(read("chatterbot:english")) > 500
    assert len(read("./chatterbot", "messages")) == 1


def test_packaged_chatterbot():
    found = read("chatterbot:english")
    questions = [(d.task_id, words(d.turns[0].text)) for d in found]
    assert len(set(questions)) == len(questions) > 500
    assert {d.task_id.split("/")[0] for d in read("chatterbot")} > {"english", "chinese", "german"}
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
def test_a_bad_file_is_one_clear_line(tmp_path, content, parts):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError) as excinfo:
        read(str(path))
    one_line(excinfo, str(path), *parts)


def test_bad_sources_are_one_clear_line(tmp_path):
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
    with pytest.raises(DataError, match=r"notes.txt: of no known format: name one of "):
        read(str(tmp_path / "notes.txt"))
    with pytest.raises(DataError, match=r"must hold files that end in .jsonl or .ndjson or .json, got none"):
        read(str(tmp_path), "messages")
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(DataError, match="must be an object of conversations, got list"):
        read(str(tmp_path / "list.json"), "chitchat")
    with pytest.raises(DataError, match=f"^{re.escape(str(tmp_path))}: cannot be read: "):
        read(str(tmp_path), "chitchat")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("conversations: [", "must be YAML"),
        ("- a\n- b\n", "key conversations"),
        ("conversations: 3", "key conversations"),
    ],
)
def test_bad_yaml_is_one_clear_line(tmp_path, text, problem):
    path = tmp_path / "bad.yml"
    path.write_text(text)
    with pytest.raises(DataError) as excinfo:
        read(str(path))
    one_line(excinfo, str(path), problem)


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


@given(
    st.lists(st.tuples(st.sampled_from("ab"), st.text(st.characters(exclude_categories=()), max_size=8)), max_size=8)
)
def test_dialogue_cleans_and_merges_whatever_comes(turns):
    result = dialogue("t", "d", turns).turns
    assert all(turn.text == turn.text.strip() != "" for turn in result)
    assert all(a.speaker != b.speaker for a, b in pairwise(result))
    said = Counter("".join("".join(text.encode("utf-8", "replace").decode().split()) for _, text in turns))
    assert said == Counter("".join("".join(turn.text.split()) for turn in result))
