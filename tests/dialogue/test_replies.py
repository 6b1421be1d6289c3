"""Replies: questions are windows as in training, what was memorized is right, and scores are per task and per kind."""

from dataclasses import replace

import pytest
import torch
from tiny import tiny_config, write_tasks

import metakern as mk
from metakern.dialogue.baselines import FineTune, InContext, PromptTuning
from metakern.dialogue.episodes import Episodes
from metakern.dialogue.models import build_model
from metakern.dialogue.readers import Dialogue, Turn, dialogue
from metakern.dialogue.replies import METRICS, draw_questions, generated, retrieved, scores
from metakern.dialogue.split import TaskData
from metakern.dialogue.tasks import load_split
from metakern.dialogue.tokenizer import IGNORE, Tokenizer
from metakern.errors import DataError


def tasks_of(*names: str) -> list[TaskData]:
    """Return tasks that answer the same two questions, each in its own way."""
    talks = {
        "elements": [("gold?", "it is Au"), ("tin?", "that is Sn")],
        "colors": [("gold?", "warm yellow"), ("tin?", "a cold gray")],
    }
    return [
        TaskData(
            name,
            tuple(dialogue(name, str(i), [("user", q), ("bot", a)]) for i, (q, a) in enumerate(talks[name] * copies)),
        )
        for name, copies in ((name, 2) for name in names)
    ]


def source_of(tasks, tokenizer=None, **options) -> Episodes:
    tokenizer = tokenizer or Tokenizer.train([d for task in tasks for d in task.dialogues], 262)
    return Episodes(tasks, tokenizer, **{"support_size": 2, "query_size": 2, "max_length": 48, "seed": 1} | options)


@pytest.mark.parametrize("train_on", ["bot", "all"])
def test_a_question_is_the_window_before_a_reply_token_by_token(tmp_path, train_on):
    data = write_tasks(tmp_path / "data", tasks=12, dialogues=9)
    split = load_split(tiny_config(data))
    tokenizer = Tokenizer.train([d for task in split.train for d in task.dialogues], 300)
    source = source_of(split.train, tokenizer, max_length=64, train_on=train_on)
    batches = [sides for _, *sides in by_task(source)]
    seen = 0
    for (name, *sides), windows in zip(source.exchanges(), batches, strict=True):
        for exchanges, rows in zip(sides, windows, strict=True):
            learned = set()
            for ids, labels in rows:
                for e in exchanges:
                    begin, end = len(e.prompt), len(e.prompt) + len(e.reply)
                    if tuple(ids[:end]) == e.prompt + e.reply:
                        assert labels[begin:end] == list(e.reply)
                        assert e.prompt[-1] == tokenizer.bot_id
                        learned.add(e)
                        seen += 1
                if train_on == "bot":  # every learned token is in a reply
                    inside = {e for e in exchanges if tuple(ids[: len(e.prompt + e.reply)]) == e.prompt + e.reply}
                    assert sum(len(e.reply) for e in inside) == sum(label != IGNORE for label in labels)
            assert learned == set(exchanges), name
    assert seen > 40


def by_task(source):
    """Yield the names and the episode of each task: windows, which are lists of ids and labels without padding."""
    keys = ("input_ids", "labels", "attention_mask")
    for names, *sides in source.evaluation(batch=1):
        windows = [
            [(i[m.bool()].tolist(), t[m.bool()].tolist()) for i, t, m in zip(*(side[k][0] for k in keys), strict=True)]
            for side in sides
        ]
        yield names, *windows


def test_the_first_question_of_a_window_is_the_prompt_of_a_chat():
    source = source_of(tasks_of("elements"))
    for _, *sides in source.exchanges():
        for exchange in (e for side in sides for e in side):
            assert source.tokenizer.prompt([Turn("user", exchange.context)], 48, "bot") == list(exchange.prompt)


def test_replies_of_the_bot_to_itself_and_before_anybody_spoke_are_no_exchanges():
    talk = [("bot", "hello"), ("ann", "hi"), ("bot", "tea?"), ("bot", "or coffee?"), ("ann", "tea"), ("bot", "here")]
    turns = tuple(Turn(*turn) for turn in talk)
    tasks = [TaskData("cafe", tuple(Dialogue("cafe", str(i), turns, {"bot": "bot"}) for i in range(2)))]
    source = source_of(tasks, support_size=4, max_length=96)
    decode = source.tokenizer.decode
    for _, *sides in source.exchanges():
        for e in (e for side in sides for e in side):
            assert decode(e.reply) in ("tea?", "here")
            assert e.context.splitlines()[-1] == {"tea?": "hi", "here": "tea"}[decode(e.reply)]
            assert decode(e.prompt) == e.context.replace("\n", "")


@pytest.mark.parametrize("make", [FineTune, mk.MAML, mk.FOMAML])
def test_a_model_that_memorizes_two_pairs_answers_the_taught_questions_of_each_task(make):
    source = source_of(tasks_of("elements", "colors"))
    torch.manual_seed(0)
    model = build_model("gpt", 262, width=32, heads=2, layers=1, max_length=48)
    before = {name: p.clone() for name, p in model.named_parameters()}
    algorithm = make(model, mk.losses.causal_lm, inner=mk.optim.Adam(lr=0.01), steps=1)
    asked = draw_questions(source)
    found = [list(generated(algorithm, source, asked, k)) for k in (0, 60)]
    taught = scores(source, asked, found)["taught"]
    assert taught["exact"]["values"] == [[0.0, 0.0], [1.0, 1.0]]
    assert taught["word_f1"]["mean"] == [pytest.approx(0, abs=0.3), 1.0]
    assert taught["chrf"]["values"][1] == pytest.approx([100.0, 100.0])
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert algorithm.training


def test_a_soft_prompt_replies_with_what_it_learned():
    source = source_of(tasks_of("elements", "colors"))
    torch.manual_seed(0)
    model = build_model("gru", 262, embedding=24, hidden=48)
    algorithm = PromptTuning(model, mk.losses.causal_lm, length=4, inner=mk.optim.Adam(lr=0.03), steps=1)
    optimizer = torch.optim.Adam(algorithm.parameters(), 0.01)
    (_, support, query) = next(iter(source.evaluation()))
    for _ in range(80):  # it learns both tasks' answers, of which the prompt must choose
        optimizer.zero_grad()
        algorithm(support, query).backward()
        optimizer.step()
    asked = draw_questions(source)
    before, after = (scores(source, asked, [list(generated(algorithm, source, asked, k))]) for k in (0, 60))
    assert after["taught"]["exact"]["mean"][0] > before["taught"]["exact"]["mean"][0]


def test_in_context_models_have_the_support_before_each_question(monkeypatch):
    source = source_of(tasks_of("elements", "colors"))
    model = build_model("gpt", 262, width=8, heads=2, layers=1, max_length=48 * 3)
    algorithm = InContext(model, mk.losses.causal_lm)
    asked, prompts = draw_questions(source), []

    def greedy(model, given, max_new_tokens, **options):
        prompts.append((given, max_new_tokens))
        return [[] for _ in given]

    monkeypatch.setattr("metakern.dialogue.replies.greedy", greedy)
    found = list(generated(algorithm, source, asked, 3))
    assert [len(replies) for replies in found] == [len(task.taught) + len(task.unseen) for task in asked]
    for (_, support, _), task, (given, limits) in zip(by_task(source), asked, prompts, strict=True):
        context = [i for ids, _ in support for i in ids]
        for question, prompt, limit in zip([*task.taught, *task.unseen], given, limits, strict=True):
            assert prompt == context + list(question.prompt)
            assert limit == min(len(question.reply) + 8, 48 - len(question.prompt))


def test_retrieval_answers_all_that_was_taught_and_what_is_asked_again():
    source = source_of(tasks_of("elements", "colors"))
    asked = draw_questions(source)
    found = scores(source, asked, [list(retrieved(source, asked))])
    assert found["taught"]["exact"]["values"] == [[1.0, 1.0]]
    for task, replies in zip(asked, retrieved(source, asked), strict=True):
        known = {e.context: source.tokenizer.decode(e.reply) for e in task.support}
        for question, reply in zip(task.unseen, replies[len(task.taught) :], strict=True):
            assert reply == known.get(question.context, reply)


def test_scores_of_replies_written_by_hand():
    source = source_of(tasks_of("elements", "colors"), support_size=1, query_size=3)
    asked = draw_questions(source)
    assert [(len(task.taught), len(task.unseen)) for task in asked] == [(1, 2), (1, 2)]
    right = [[source.tokenizer.decode(e.reply) for e in (*task.taught, *task.unseen)] for task in asked]
    half = [[*right[0][:2], "nothing"], ["nothing", *right[1][1:]]]
    found = scores(source, asked, [right, half])
    assert found["taught"].keys() == found["unseen"].keys() == METRICS.keys()
    assert found["taught"]["exact"]["values"] == [[1.0, 1.0], [1.0, 0.0]]
    assert found["unseen"]["exact"]["values"] == [[1.0, 1.0], [0.5, 1.0]]
    assert found["taught"]["bleu"]["values"][1][1] == 0.0
    assert found["unseen"]["distinct_1"]["values"][1] == [1.0, 1.0]
    mean, t = 0.75, 12.706  # Student's t for two tasks
    assert found["unseen"]["exact"]["mean"][1] == mean
    assert found["unseen"]["exact"]["low"][1] == pytest.approx(mean - t * 0.5 / 2, abs=1e-3)
    assert found["unseen"]["exact"]["high"][1] == pytest.approx(mean + t * 0.5 / 2, abs=1e-3)


def test_the_seed_draws_at_most_limit_questions(tmp_path):
    config = tiny_config(write_tasks(tmp_path / "data", tasks=12, dialogues=20), max_length=64)
    split = load_split(config)
    tokenizer = Tokenizer.train([d for task in split.train for d in task.dialogues], 300)
    sizes = {"support_size": 8, "query_size": 8, "max_length": 64}
    source = source_of(split.train, tokenizer, **sizes)
    asked = draw_questions(source, limit=3)
    assert {(len(task.taught), len(task.unseen)) for task in asked} == {(3, 3)}
    assert asked == draw_questions(source, limit=3)
    assert asked[0].taught == draw_questions(source, limit=9)[0].taught[:3]
    assert asked[0].taught != asked[0].support[:3] or asked[1].taught != asked[1].support[:3]
    assert all(set(task.taught) <= set(task.support) for task in asked)
    assert asked != draw_questions(source_of(split.train, tokenizer, **sizes | {"seed": 7}), limit=3)


def test_a_reply_that_is_cut_off_is_asked_if_40_characters_are_left():
    def task(reply: str) -> list[TaskData]:
        talks = [dialogue("t", str(i), [("user", f"{i}?"), ("bot", reply)]) for i in range(2)]
        return [TaskData("t", tuple(talks))]

    long = "x" * 100
    tokenizer = Tokenizer.train(task(long)[0].dialogues, 262)
    (asked,) = draw_questions(source_of(task(long), tokenizer, max_length=60))
    assert 40 <= len(asked.taught[0].reply) < 100
    with pytest.raises(
        DataError, match="task 't' must have a reply of the bot to judge in its support, and a user before it, got none"
    ):
        draw_questions(source_of(task(long), tokenizer, max_length=32))
    (asked,) = draw_questions(source_of(task("x" * 8), tokenizer, max_length=32))
    assert asked.taught[0].reply[-1] == tokenizer.eos_id


def test_tasks_without_a_turn_of_the_bot_are_an_error():
    talks = tuple(dialogue("t", str(i), [("ann", f"{i}!"), ("ann", "well")]) for i in range(2))
    with pytest.raises(
        DataError, match="task 't' must have a reply of the bot to judge in its support, and a user before it, got none"
    ):
        draw_questions(source_of([TaskData("t", talks)], train_on="all"))
    blank = tuple(replace(d, turns=(Turn("user", f"{i}?"), Turn("bot", " "))) for i, d in enumerate(talks))
    with pytest.raises(DataError, match="got none: where windows of 48 tokens hold no whole one and no 40 characters"):
        draw_questions(source_of([TaskData("t", blank)], Tokenizer.train(talks, 262)))


def test_large_models_are_adapted_one_task_at_a_time(monkeypatch):
    source = source_of(tasks_of("elements", "colors"))
    torch.manual_seed(0)
    model = build_model("gru", 262, embedding=8, hidden=8)
    algorithm = mk.MAML(model, mk.losses.causal_lm, inner=mk.optim.Adam(lr=0.01), steps=1)
    asked, batches, adapt = draw_questions(source), [], algorithm.adapt
    monkeypatch.setattr(algorithm, "adapt", lambda s, steps: batches.append(len(s["labels"])) or adapt(s, steps))
    together = list(generated(algorithm, source, asked, 3))
    monkeypatch.setattr("metakern.dialogue.replies.HELD", 1)
    assert list(generated(algorithm, source, asked, 3)) == together
    assert batches == [2, 2, 1, 1, 1, 1]  # at two rates


def test_a_model_that_diverged_gives_no_reply():
    source = source_of(tasks_of("elements"))
    model = build_model("gpt", 262, width=8, heads=2, layers=1, max_length=48)
    algorithm = FineTune(model, mk.losses.causal_lm, inner=mk.optim.SGD(lr=1e38), steps=1)
    asked = draw_questions(source)
    (replies,) = generated(algorithm, source, asked, 3)
    assert set(replies) == {""}
