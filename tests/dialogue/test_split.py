"""Splits that keep a bot's canned replies, families of tasks, and tasks that are named."""

import json

import pytest

from metakern.dialogue.config import Config
from metakern.dialogue.readers import Dialogue, dialogue, read
from metakern.dialogue.split import Split, split_tasks, whole_tasks
from metakern.dialogue.tasks import load_split, load_whole
from metakern.errors import DataError, UserError

CANNED = "our shop is open from nine to five"


def task(name: str, *questions: str, group: str = "", reply: str = CANNED) -> list[Dialogue]:
    """Return a dialogue for each question, all with the same reply."""
    meta = {"bot": "bot"} | ({"group": group} if group else {})
    return [dialogue(name, str(i), [("user", q), ("bot", reply)], meta) for i, q in enumerate(questions)]


def three(*questions: str) -> list[Dialogue]:
    return [d for name in "abc" for d in task(name, *(f"{q} {name}" for q in questions))]


def names(split: Split) -> tuple[set[str], set[str], set[str]]:
    return tuple({task.task_id for task in part} for part in (split.train, split.validation, split.test))


def test_a_bot_may_repeat_its_replies_and_a_user_no_long_turn():
    talks = three("open", "hours", "when may i come to your shop")
    assert split_tasks(talks, min_dialogues=2).skipped == {}
    again = [*talks, *task("a", "When may I come to your shop, A?", reply="at nine")]
    shared = {"dialogues that share a text with another of their task": 1}
    assert split_tasks(again, min_dialogues=2).skipped == shared
    assert split_tasks(again, min_dialogues=2, overlap="dialogues").skipped == {}
    assert split_tasks(again, min_dialogues=2, min_words=9).skipped == {}
    with pytest.raises(DataError, match=r"got 0 \(6 dialogues that share a text .* set overlap to dialogues"):
        split_tasks(talks, min_dialogues=2, overlap="turns")


def test_whole_dialogues_never_recur():
    same = [*three("open", "hours"), *task("a", "Open a!")]
    for overlap in ("users", "turns", "dialogues"):
        found, skipped = whole_tasks(same, overlap=overlap, min_dialogues=1, min_words=99)
        assert skipped == {"dialogues that share a text with another of their task": 1}
        assert [len(task.dialogues) for task in found] == [2, 2, 2]


def test_without_a_named_bot_the_second_speaker_is_the_bot():
    talks = [dialogue(t, str(i), [("ann", f"hm {t} {i}"), ("bob", CANNED)]) for t in "abc" for i in range(2)]
    assert split_tasks(talks, min_dialogues=2).skipped == {}
    turned = [dialogue(t, str(i), [("bob", CANNED), ("ann", f"hm {t} {i}")]) for t in "abc" for i in range(2)]
    with pytest.raises(DataError):
        split_tasks(turned, min_dialogues=2)


def test_tasks_of_a_group_stay_in_one_split():
    talks = [
        d
        for kind in ("shop", "bank", "gym", "zoo", "spa")
        for i in range(4)
        for d in task(f"{kind} {i}", f"hi {kind} {i}", f"yo {kind} {i}", group=kind)
    ]
    seen = set()
    for seed in range(6):
        split = split_tasks(talks, seed=seed, fractions=(0.6, 0.2, 0.2), min_dialogues=2)
        kinds = [{name.split()[0] for name in part} for part in names(split)]
        assert [len(part) for part in kinds] == [3, 1, 1]
        assert len(set.union(*kinds)) == 5
        assert sum(map(len, names(split))) == 20
        seen |= kinds[2]
    assert len(seen) > 1


def test_groups_that_share_a_task_are_one():
    talks = [
        *task("ann and bob", "hi 1", "hi 2", group="ann"),
        *task("ann and bob", "hi 3", "hi 4", group="bob"),
        *task("ann", "hi 5", "hi 6", group="ann"),
        *task("bob", "hi 7", "hi 8", group="bob"),
        *(d for name in "cdef" for d in task(name, f"hi {name}", f"yo {name}")),
    ]
    for seed in range(8):
        found = names(split_tasks(talks, seed=seed, fractions=(0.4, 0.3, 0.3), min_dialogues=2))
        assert sum({"ann and bob", "ann", "bob"} <= part for part in found) == 1


def test_a_group_of_all_tasks_counts_as_none():
    talks = [d for name in "abcd" for d in task(name, f"hi {name}", f"yo {name}", group="all")]
    assert list(map(len, names(split_tasks(talks, min_dialogues=2)))) == [2, 1, 1]


def test_too_few_groups_are_an_error():
    talks = [d for name in "abcd" for d in task(name, f"hi {name}", f"yo {name}", group=min(name, "b"))]
    with pytest.raises(DataError, match="must have 3 groups of tasks of at least 2 dialogues, got 2"):
        split_tasks(talks, min_dialogues=2)


def test_named_tasks_are_held_out_and_the_rest_of_their_group_is_left_out():
    talks = [d for i in range(9) for d in task(f"t{i}", f"hi {i}", f"yo {i}", group=f"g{i // 2}")]
    split = split_tasks(talks, min_dialogues=2, test={"t0", "t8"}, validation={"t2", "t3"})
    assert names(split) == ({"t4", "t5", "t6", "t7"}, {"t2", "t3"}, {"t0", "t8"})
    assert split.skipped == {"tasks whose group has a task that is named for a held-out split": 1}
    with pytest.raises(DataError):
        split_tasks(talks, min_dialogues=2, test={"none"})


def test_messages_name_their_group(tmp_path):
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    records = ({"topic": "a", "group": "shops"}, {"topic": "b"}, {"topic": "c", "group": None})
    lines = (json.dumps(record | {"messages": messages}) + "\n" for record in records)
    (tmp_path / "talks.jsonl").write_text("".join(lines))
    assert [d.meta.get("group") for d in read(str(tmp_path / "talks.jsonl"))] == ["shops", None, None]


def test_an_unknown_overlap_is_an_error():
    with pytest.raises(ValueError, match="overlap must be one of users, turns, dialogues, got 'all'"):
        split_tasks([], overlap="all")


def written(path, tasks: str, numbers=range(4)) -> str:
    lines = (
        f'{{"task": "{name}", "messages": [{{"role": "user", "content": "{name} {i}"}},'
        f' {{"role": "assistant", "content": "yes {name}"}}]}}\n'
        for name in tasks
        for i in numbers
    )
    path.write_text("".join(lines))
    return str(path)


def test_files_and_patterns_name_the_held_out_tasks(tmp_path):
    data = written(tmp_path / "train.jsonl", "abcdef")
    config = Config(data=data, min_dialogues=2, test_tasks=("a", "[bc]"), validation_tasks=("d",))
    assert names(load_split(config)) == ({"e", "f"}, {"d"}, {"a", "b", "c"})
    other = written(tmp_path / "test.jsonl", "axy")
    config = Config(data=data, min_dialogues=2, test_data=other, validation_tasks=("b*",))
    assert names(load_split(config)) == ({"c", "d", "e", "f"}, {"b"}, {"a", "x", "y"})
    tasks, skipped = load_whole(config, other)
    assert ({t.task_id for t in tasks}, skipped) == ({"a", "x", "y"}, {})
    with pytest.raises(UserError, match="test_tasks must match a task of the data, such as a, b, c, d, e; got zz"):
        load_split(Config(data=data, test_tasks=("zz",)))
