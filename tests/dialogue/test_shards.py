"""Conversations that stay in their files: what is drawn from them is what is drawn from memory."""

import json
import random
from dataclasses import replace

import pytest
import torch
from tiny import tiny_config, write_tasks

from metakern.dialogue.shards import Hashes, Line, Seen, stream
from metakern.dialogue.tasks import episodes, load_split
from metakern.dialogue.tokenizer import Tokenizer
from metakern.errors import DataError, UserError

MESSAGES = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]


def texts(dialogue):
    return {turn.text for turn in dialogue.turns}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return tiny_config(write_tasks(tmp_path_factory.mktemp("shards")), format="messages", overlap="turns", min_words=2)


def test_splits_and_episodes_are_those_of_dialogues_in_memory(config):
    splits = [load_split(replace(config, stream=streams)) for streams in (False, True)]
    held, streamed = splits
    assert held.summary() == streamed.summary()
    assert "left out" in held.summary()
    tokenizer = Tokenizer.train([d for task in held.train for d in task.dialogues], 300)
    for part in ("train", "validation", "test"):
        names = [[task.task_id for task in getattr(split, part)] for split in splits]
        assert names[0] == names[1]
        first, second = (episodes(config, getattr(split, part), tokenizer) for split in splits)
        for a, b in zip(
            (*first.sample(3, 4), *next(first.evaluation())[1:]),
            (*second.sample(3, 4), *next(second.evaluation())[1:]),
            strict=True,
        ):
            assert all(torch.equal(a[key], b[key]) for key in a)
    assert all(isinstance(d, Line) for task in streamed.train for d in task.dialogues)


def test_only_the_drawn_dialogues_are_read(config, monkeypatch):
    split = load_split(replace(config, stream=True))
    tokenizer = Tokenizer.train([d for task in split.train for d in task.dialogues], 300)
    source = episodes(config, split.train, tokenizer)
    read, real = [], Line.read
    monkeypatch.setattr(Line, "read", lambda self: read.append(self) or real(self))
    source.sample(0, 2, lambda count: slice(1, count))
    assert len(read) == config.support_size + config.query_size


def test_hashes_are_a_set():
    found = Hashes.of(["a", ("b", "c"), "a"])
    assert len(found) == 2
    assert found | {"x"} == {*found, "x"}
    assert next(iter(found)) in found
    assert not found.isdisjoint(Hashes.of(["a"]))
    assert found.isdisjoint(Hashes.of(["c"]))


def test_texts_that_were_met_are_those_of_a_set():
    draw, seen, expected = random.Random(0), Seen(), set()
    texts = [*(draw.randrange(2000).to_bytes(8, "little") for _ in range(5000)), bytes(8), "a", ("b", "c"), b"short"]
    draw.shuffle(texts)
    for text in texts:
        assert seen.isdisjoint([text]) == (text not in expected)
        seen.update([text])
        expected.add(text)
    assert all(not seen.isdisjoint([text]) for text in texts)
    assert seen.isdisjoint([(2000).to_bytes(8, "little"), "b", b""])


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ('{"messages": [', r"talk.jsonl:2: must be JSON"),
        ("[1]", r"talk.jsonl:2: must be an object on each line, got list"),
        (b"\xff\n", r"talk.jsonl:2: must be UTF-8"),
    ],
)
def test_damaged_lines_are_named(tmp_path, text, error):
    line = json.dumps({"messages": MESSAGES, "topic": "x"}).encode() + b"\n"
    (tmp_path / "talk.jsonl").write_bytes(line + (text if isinstance(text, bytes) else text.encode()))
    with pytest.raises(DataError, match=error):
        stream(tmp_path / "talk.jsonl", "messages", texts)


def test_what_cannot_be_streamed_is_refused(tmp_path):
    path = tmp_path / "talk.jsonl"
    path.write_text(json.dumps({"messages": MESSAGES[:1]}))
    with pytest.raises(DataError, match="must hold a dialogue, got none"):
        stream(path, "messages", texts)
    with pytest.raises(DataError, match="format must be messages or another one of JSON records, got 'auto'"):
        stream(path, "auto", texts)
    with pytest.raises(UserError, match="windows must be any or opening with stream, got 'later'"):
        load_split(tiny_config(tmp_path, stream=True, windows="later"))


def test_a_file_that_changes_is_an_error(tmp_path):
    path = tmp_path / "talk.jsonl"
    path.write_text("\n".join(json.dumps({"messages": MESSAGES}) for _ in range(2)))
    _, second = stream(path, "messages", texts)
    assert second.turns[1].text == "hello"
    path.write_text("{}")
    with pytest.raises(DataError, match="must stay as it is while it is streamed, but has changed"):
        second.read()
