"""Splits and episodes: no text is shared between splits or within a task, and a seed fixes the episodes."""

import hashlib
import json
import os
import re
import subprocess
import sys
from functools import partial
from itertools import combinations, pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from metakern.dialogue.episodes import Episodes
from metakern.dialogue.readers import Dialogue, Turn, dialogue, read
from metakern.dialogue.split import Split, TaskData
from metakern.dialogue.split import split_tasks as split_by
from metakern.dialogue.tokenizer import IGNORE, SPECIAL_TOKENS, Tokenizer
from metakern.errors import DataError

TOPICS = Path(__file__).parent / "data" / "topics.jsonl"
DIALOGUES = read(str(TOPICS))
split_tasks = partial(split_by, overlap="turns")
SPLIT = split_tasks(DIALOGUES, seed=3, min_dialogues=4)
TOKENIZER = Tokenizer.train(DIALOGUES, 262)  # bytes alone: the digests below do not depend on how merges are learned


def episodes(tasks=SPLIT.train, **options) -> Episodes:
    sizes = {"support_size": 2, "query_size": 3, "max_length": 64, "seed": 5} | options
    return Episodes(tasks, TOKENIZER, **sizes)


def texts(dialogue: Dialogue) -> set[str]:
    """Return the texts of a dialogue that no other may share: the whole of it, and each turn of 5 or more words.

    They are computed in another way than in the package.
    """
    turns = [re.sub(r"[\W_]+", " ", turn.text.casefold()).strip() for turn in dialogue.turns]
    return {" | ".join(turns), *(turn for turn in turns if len(turn.split()) >= 5)}


def disjoint(*groups: list[Dialogue]) -> bool:
    """Return whether no two groups share a text."""
    pools = [set().union(*map(texts, group)) for group in groups]
    return all(a.isdisjoint(b) for a, b in combinations(pools, 2))


def parts(split: Split) -> list[list[Dialogue]]:
    """Return the dialogues of train, validation and test."""
    return [[d for task in part for d in task.dialogues] for part in (split.train, split.validation, split.test)]


SPOKEN = st.lists(st.sampled_from(["a", "b", "c"]), min_size=1, max_size=6).map(" ".join)
CORPUS = st.lists(
    st.tuples(
        st.sampled_from(["s1", "s2", "s3", "s4", "s5", "s6"]),
        st.sampled_from(["s1", "s2", "x"]),
        st.lists(SPOKEN, min_size=2, max_size=4),
    ),
    min_size=15,
    max_size=60,
)


@settings(deadline=None)
@given(CORPUS, st.integers(0, 3))
def test_nothing_is_shared_between_splits_or_within_a_task(corpus, seed):
    dialogues = [
        dialogue(
            task, str(i), [((task, other + "?")[j % 2], f"{text}!") for j, text in enumerate(spoken)], {"bot": task}
        )
        for i, (task, other, spoken) in enumerate(corpus)
    ]
    try:
        split = split_tasks(dialogues, seed=seed, min_dialogues=2)
    except DataError:  # too few tasks are left to split
        reject()
    assert disjoint(*parts(split))
    for task in (*split.train, *split.validation, *split.test):
        assert len(task.dialogues) >= 2
        assert all(disjoint([a], [b]) for a, b in combinations(task.dialogues, 2))
        assert all(d in dialogues and d.task_id == task.task_id for d in task.dialogues)


@settings(deadline=None)
@given(CORPUS, st.integers(0, 3))
def test_speakers_of_held_out_tasks_do_not_occur_in_train(corpus, seed):
    unique = [  # no two turns share words, so that only speakers can connect two splits
        dialogue(task, str(i), [((task, other)[j % 2], f"{i} {j}") for j in range(len(spoken))], {"bot": task})
        for i, (task, other, spoken) in enumerate(corpus)
        if task != other
    ]
    try:
        split = split_tasks(unique, seed=seed, min_dialogues=2)
    except DataError:  # too few tasks are left to split
        reject()
    train, validation, test = ({turn.speaker for d in part for turn in d.turns} for part in parts(split))
    assert train.isdisjoint(task.task_id for task in (*split.validation, *split.test))
    assert validation.isdisjoint(task.task_id for task in split.test)
    assert test


@pytest.mark.parametrize("source", ["chitchat:topics", "chitchat:subjects", "chitchat:senders"])
def test_real_conversations_are_split_without_leaks(source):
    split = split_tasks(read(source), seed=1)
    assert disjoint(*parts(split))
    assert all(
        len({text for d in task.dialogues for text in texts(d)}) == sum(len(texts(d)) for d in task.dialogues)
        for task in (*split.train, *split.validation, *split.test)
    )
    held_out = {task.task_id for task in (*split.validation, *split.test)}
    assert held_out.isdisjoint(turn.speaker for d in parts(split)[0] for turn in d.turns)
    assert min(len(split.validation), len(split.test)) >= 3
    assert len(split.train) > 20


def test_short_turns_may_recur_and_long_turns_and_dialogues_may_not():
    def task(name: str, *second: str) -> list[Dialogue]:
        return [
            dialogue(name, str(i), [("x", f"{name} {i}"), ("y", text)], {"bot": "y"}) for i, text in enumerate(second)
        ]

    free = [*task("a", "yes", "YES!"), *task("b", "yes", "ok"), *task("c", "yes", "how are you now")]
    assert split_tasks(free, min_dialogues=2).skipped == {}
    within = [*free, *task("d", "this one has five words", "This one has: five words?")]
    assert split_tasks(within, min_dialogues=2).skipped == {
        "dialogues that share a text with another of their task": 1,
        "tasks of fewer than 2 dialogues": 1,
    }
    assert split_tasks(within, min_dialogues=2, min_words=6).skipped == {}
    between = [d for group in [task(n, "yes", "no", "this one has five words") for n in "abc"] for d in group]
    split = split_tasks(between, min_dialogues=2)
    assert split.skipped == {"dialogues that share a text or a task's speaker with a held-out split": 2}
    assert [len(task.dialogues) for task in (*split.test, *split.validation, *split.train)] == [3, 2, 2]


@pytest.mark.parametrize(
    ("greeting", "sentence", "same"),
    [
        ("नमस्ते जी", "मुझे आज बहुत ठंड लग रही है", "मुझे आज, बहुत ठंड लग रही है!"),
        ("สวัสดีครับ", "เมื่อวานนี้ฉันไปตลาดกับแม่", "เมื่อวานนี้ฉันไปตลาดกับแม่ 🙂"),
        ("မင်္ဂလာပါ", "မနေ့ကကျွန်တော်ဈေးကိုသွားပြီးငါးဝယ်ခဲ့ပါတယ်", "မနေ့ကကျွန်တော်ဈေးကိုသွားပြီးငါးဝယ်ခဲ့ပါတယ်။"),
        ("ok 🙂🙂🙂🙂🙂", "this one has five words", "This one has five words 🙂"),
        ("🙂👍🙂👍🙂👍", "this one has five words", "this one 👍 has five words"),
        ("??? !!! ... :-) ;-)", "this one has five words", "(this) (one) (has) (five) (words)"),
    ],
)
def test_short_turns_may_recur_and_long_turns_may_not_in_every_script(greeting, sentence, same):
    def talks(*second: str) -> list[Dialogue]:
        return [dialogue(t, str(i), [("x", f"{t} {i}"), ("y", text)]) for t in "abc" for i, text in enumerate(second)]

    assert split_tasks(talks(greeting, greeting), min_dialogues=2).skipped == {}
    once = talks(greeting, greeting, "hm")
    again = [dialogue("a", text, [("x", f"a {i}"), ("y", text)]) for i, text in enumerate((sentence, same), 10)]
    assert split_tasks([*once, *again], min_dialogues=2).skipped == {
        "dialogues that share a text with another of their task": 1
    }


def test_turns_without_words_are_compared_as_they_are_written():
    talks = [
        dialogue(t, str(i), [("x", t), ("y", text)])
        for t in "abc"
        for i, text in enumerate((":-)", ":-(", "🙂", "👍", ":-)"))
    ]
    split = split_tasks(talks, min_dialogues=2)
    assert split.skipped == {"dialogues that share a text with another of their task": 3}
    assert {len(task.dialogues) for task in (*split.train, *split.validation, *split.test)} == {4}


def test_system_turns_may_recur():
    same = [
        dialogue(
            t, str(i), [("system", "you are a kind and patient helper"), ("user", f"{t} {i}"), ("assistant", "yes")]
        )
        for t in "abc"
        for i in range(2)
    ]
    assert split_tasks(same, min_dialogues=2).skipped == {}
    named = [
        Dialogue("assistant", d.dialogue_id, d.turns, {"bot": "assistant"}) if d.task_id == "a" else d for d in same
    ]
    assert split_tasks(named, min_dialogues=2).skipped == {}, "a role must not count as the name of a speaker"


def test_splits_have_the_fractions_and_do_not_depend_on_the_order_of_dialogues():
    names = lambda part: {task.task_id for task in part}  # noqa: E731
    assert [len(part) for part in (SPLIT.train, SPLIT.validation, SPLIT.test)] == [8, 1, 1]
    assert names(SPLIT.train) | names(SPLIT.validation) | names(SPLIT.test) == {d.task_id for d in DIALOGUES}
    shuffled = split_tasks(DIALOGUES[::-1], seed=3, min_dialogues=4)
    assert [names(part) for part in (shuffled.train, shuffled.validation, shuffled.test)] == [
        names(part) for part in (SPLIT.train, SPLIT.validation, SPLIT.test)
    ]
    assert len({tuple(sorted(names(split_tasks(DIALOGUES, seed=s, min_dialogues=4).test))) for s in range(9)}) > 2
    alone = split_tasks(DIALOGUES, fractions=(0, 0, 1), min_dialogues=4)
    assert (len(alone.train), len(alone.validation), len(alone.test)) == (0, 0, 10)


def test_tasks_above_max_held_out_are_in_train():
    talks = [
        dialogue(t, f"{t}{i}", [("x", f"{t} {i}"), ("y", "yes")]) for n, t in enumerate("abcdef") for i in range(2 + n)
    ]
    for seed in range(5):
        split = split_tasks(talks, seed=seed, min_dialogues=2, max_held_out=4)
        assert {task.task_id for task in (*split.validation, *split.test)} <= set("abc")
        assert {task.task_id for task in split.train} > set("def")


def test_too_little_data_is_an_error_that_says_how_much_is_needed():
    single = {d.task_id: d for d in DIALOGUES}.values()
    with pytest.raises(
        DataError, match=r"at least 8 dialogues, got 0 \(10 tasks of fewer than 8 dialogues left out\): add"
    ):
        split_tasks(single)
    with pytest.raises(DataError, match="must have 3 tasks of at least 4 dialogues, got 2"):
        split_tasks([d for d in DIALOGUES if d.task_id in ("rain", "cats")], min_dialogues=4)
    same = [
        dialogue(t, str(i), [("x", str(i)), ("y", "the very same five words" if i else t)])
        for t in "abc"
        for i in range(2)
    ]
    with pytest.raises(DataError, match="validation must have a task, got none that shares no text"):
        split_tasks(same, min_dialogues=2, fractions=(0.34, 0.33, 0.33))
    with pytest.raises(ValueError, match="fractions must be at least 0 and add up to 1"):
        split_tasks(DIALOGUES, fractions=(0.5, 0.1, 0.1))
    with pytest.raises(ValueError, match="min_dialogues must be at least 2"):
        split_tasks(DIALOGUES, min_dialogues=1)


def test_the_summary_counts_held_out_dialogues_with_speakers_of_train():
    talks = [dialogue(t, f"{t}{i}", [("ann", f"{t} {i}"), (f"{t}{i}", "hm")]) for t in "abc" for i in range(2)]
    lines = split_tasks(talks, min_dialogues=2).summary().splitlines()
    assert lines == [
        "train: 1 tasks, 2 dialogues",
        "validation: 1 tasks, 2 dialogues",
        "test: 1 tasks, 2 dialogues",
        "4 of 4 held-out dialogues have a speaker who also talks in train",
    ]


def test_batches_have_the_shapes_padding_and_labels_that_the_loss_expects():
    support, query = episodes().sample(0, 4)
    for batch, size in ((support, 2), (query, 3)):
        assert set(batch) == {"input_ids", "attention_mask", "labels"}
        assert all(value.shape == (4, size, 64) and value.dtype == torch.int64 for value in batch.values())
        ids, mask, labels = batch["input_ids"], batch["attention_mask"].bool(), batch["labels"]
        assert (ids[~mask] == TOKENIZER.pad_id).all()
        assert (labels[~mask] == IGNORE).all()
        assert (mask.long().diff() <= 0).all(), "padding must be on the right"
        assert ((labels == ids) | (labels == IGNORE)).all()
        assert (labels != IGNORE).any(-1).all()
        assert (ids[..., 0] == TOKENIZER.bos_id).all()
    short, _ = episodes(max_length=1000).sample(0, 2)
    assert short["input_ids"].shape[-1] % 8 == 0
    assert short["attention_mask"].sum(-1).max() > short["input_ids"].shape[-1] - 8 - 100


@pytest.mark.parametrize("train_on", ["bot", "all"])
@pytest.mark.parametrize("sizes", [(1, 1), (4, 1), (1, 4), (7, 9)])
def test_support_and_query_come_from_different_dialogues(sizes, train_on):
    drawn = episodes(support_size=sizes[0], query_size=sizes[1], max_length=1000, train_on=train_on)
    for names, *sides in drawn.evaluation():
        for t, name in enumerate(names):
            last = {
                d.dialogue_id: d.turns[-1].text for task in SPLIT.train if task.task_id == name for d in task.dialogues
            }
            found = [
                {
                    i
                    for i, text in last.items()
                    for row in side["input_ids"][t]
                    if text in TOKENIZER.decode(row.tolist())
                }
                for side in sides
            ]
            assert found[0].isdisjoint(found[1])
            # Five dialogues a task are divided in proportion to the sizes, and all are used before one recurs.
            assert [len(side) for side in found] == {(1, 1): [1, 1], (4, 1): [4, 1], (1, 4): [1, 4], (7, 9): [2, 3]}[
                sizes
            ]


def test_a_sample_depends_on_the_seed_and_the_step_alone():
    drawn = episodes()
    first = drawn.sample(7, 3)
    drawn.sample(8, 3), list(drawn.evaluation()), torch.manual_seed(1)
    again = drawn.sample(7, 3)
    assert all(torch.equal(a[key], b[key]) for a, b in zip(first, again, strict=True) for key in a)
    other = episodes(seed=6).sample(7, 3)
    assert not torch.equal(first[0]["input_ids"], other[0]["input_ids"])
    assert not torch.equal(first[0]["input_ids"], drawn.sample(8, 3)[0]["input_ids"])


def test_a_sample_repeats_tasks_only_beyond_their_number():
    drawn = episodes(support_size=1, query_size=1, max_length=16)
    support, _ = drawn.sample(0, len(drawn))
    assert len({tuple(row) for row in support["input_ids"].flatten(1).tolist()}) == len(drawn) == 8
    assert drawn.sample(0, 11)[0]["labels"].shape[0] == 11


def test_evaluation_does_not_depend_on_the_batch_size():
    drawn = episodes()
    whole = list(drawn.evaluation(batch=100))
    assert [name for names, _, _ in whole for name in names] == [task.task_id for task in SPLIT.train]
    ones = list(drawn.evaluation(batch=1))
    for t, (names, support, query) in enumerate(ones):
        assert names == [whole[0][0][t]]
        assert torch.equal(support["input_ids"][0], whole[0][1]["input_ids"][t])
        assert torch.equal(query["labels"][0], whole[0][2]["labels"][t])
    assert sum(len(names) for names, _, _ in drawn.evaluation(3, batch=2)) == 3


def test_every_window_begins_with_the_system_turn():
    turns = [("system", "Rhyme."), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    tasks = (TaskData("t", tuple(dialogue("t", str(i), turns, {"bot": "assistant"}) for i in range(2))),)
    for train_on in ("bot", "all"):
        support, query = episodes(tasks, train_on=train_on, support_size=9, query_size=9).sample(0, 1)
        rows = {TOKENIZER.decode(row.tolist()) for side in (support, query) for row in side["input_ids"][0]}
        assert rows == ({"Rhyme.abcd", "Rhyme.cd"} if train_on == "bot" else {"Rhyme.abcd", "Rhyme.bcd", "Rhyme.cd"})


def test_opening_and_later_windows_share_no_turn():
    turns = [(("ann", "bob")[i % 2], f"{i:02}") for i in range(40)]  # 4 tokens each
    tasks = (TaskData("t", tuple(dialogue("t", str(i), turns, {"bot": "bob"}) for i in range(2))),)

    def numbers(windows: str) -> set[int]:
        drawn = episodes(tasks, windows=windows, support_size=200, query_size=1, max_length=17).sample(0, 1)[0]
        rows = [TOKENIZER.decode(row.tolist()) for row in drawn["input_ids"][0]]
        return {int(row[i : i + 2]) for row in rows for i in range(0, len(row) - 1, 2)}

    assert numbers("opening") == {0, 1, 2, 3}
    assert numbers("later") == set(range(4, 40))
    assert numbers("any") == set(range(40))
    with pytest.raises(DataError, match="task 't' must have 2 dialogues with a reply"):
        episodes(tasks, windows="later", max_length=200)


def test_augmented_tasks_are_renamed_the_same_way_in_support_and_query():
    plain, renamed = episodes(), episodes(augment=1.0)
    words, frame = set(TOKENIZER.word_ids), set(range(len(SPECIAL_TOKENS)))
    assert len(words) == TOKENIZER.vocab_size - len(frame)
    assert not words & frame
    tables = []
    for step in range(3):
        sides = list(zip(plain.sample(step, 2), renamed.sample(step, 2), strict=True))
        for t in range(2):
            names: dict[int, int] = {}
            for before, after in sides:
                assert torch.equal(before["attention_mask"], after["attention_mask"])
                for key in ("input_ids", "labels"):
                    for old, new in zip(
                        before[key][t].flatten().tolist(), after[key][t].flatten().tolist(), strict=True
                    ):
                        assert names.setdefault(old, new) == new
            assert len(set(names.values())) == len(names)  # no two tokens get one name
            assert all(old == new for old, new in names.items() if old not in words)
            moved = [old for old, new in names.items() if old != new]
            assert 0.05 * len(names) < len(moved) < 0.6 * len(names)
            tables.append(names)
    for a, b in pairwise(tables):  # each task has names of its own
        assert any(a.get(old, new) != new for old, new in b.items())
    judged = (next(source.evaluation())[1]["input_ids"] for source in (plain, renamed))
    assert torch.equal(*judged)  # evaluations are as people wrote them


def test_the_share_of_augmented_tasks():
    plain, some = episodes(), episodes(augment=0.25)
    changed = [
        not torch.equal(a, b)
        for step in range(60)
        for a, b in zip(plain.sample(step, 4)[0]["labels"], some.sample(step, 4)[0]["labels"], strict=True)
    ]
    assert 0.15 < sum(changed) / len(changed) < 0.35


def test_bad_arguments():
    with pytest.raises(ValueError, match="windows must be any, opening or later, got 'best'"):
        episodes(windows="best")
    with pytest.raises(ValueError, match="train_on must be bot or all, got 'us'"):
        episodes(train_on="us")
    with pytest.raises(ValueError, match="support_size, query_size and repeats must be at least 1, got 0, 3 and 1"):
        episodes(support_size=0)
    with pytest.raises(ValueError, match="tasks must be at least 1, got 0"):
        episodes().sample(0, 0)
    with pytest.raises(DataError, match="tasks must hold a task, got none"):
        episodes(())
    silent = TaskData("t", (Dialogue("t", "1", (Turn("user", "a"), Turn("user2", "b")), {"bot": "nobody"}),) * 2)
    with pytest.raises(DataError, match="task 't' must have 2 dialogues with a reply"):
        episodes((silent,))


def fingerprint() -> str:
    """Return a digest of the split, of training episodes and of evaluation episodes."""
    digest = hashlib.sha256()
    digest.update(
        json.dumps(
            [
                [[d.dialogue_id for d in t.dialogues] for t in part]
                for part in (SPLIT.train, SPLIT.validation, SPLIT.test)
            ]
        ).encode()
    )
    drawn = episodes()
    for batch in [*drawn.sample(0, 3), *drawn.sample(123, 5), *next(drawn.evaluation())[1:]]:
        for key in sorted(batch):
            digest.update(json.dumps(batch[key].tolist()).encode())
    return digest.hexdigest()[:16]


@pytest.mark.parametrize("hash_seed", ["1", "2"])
def test_the_same_seed_gives_the_same_episodes_on_every_machine(hash_seed):
    code = "import test_episodes; print(test_episodes.fingerprint())"
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    env = os.environ | {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": path}
    output = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout
    assert output.split() == ["b31b58017aab561b"]


def test_tasks_are_drawn_in_proportion_to_a_power_of_their_sizes():
    tasks = [
        TaskData(str(n), tuple(dialogue(str(n), str(i), [("x", f"{n} {i}"), ("bot", "yes")]) for i in range(n)))
        for n in (2, 8)
    ]
    for power, share in ((0.0, 0.5), (0.5, 1 / 3), (1.0, 0.2)):
        source = episodes(tasks, task_power=power)
        drawn = [source.names(step, 1)[0] for step in range(2000)]
        assert drawn.count("2") / 2000 == pytest.approx(share, abs=0.03)
    assert sorted(source.names(0, 2)) == ["2", "8"]  # none twice before all have come once
