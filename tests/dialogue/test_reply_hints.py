"""Hints: what stands before a reply, in training, teaching, evaluation and chat, and where it comes from."""

import random
from dataclasses import replace

import pytest
from tiny import WORDS, tiny_config, untrained_run, write_tasks

from metakern.dialogue.chat import Chat
from metakern.dialogue.config import Config
from metakern.dialogue.evaluate import evaluate
from metakern.dialogue.generate import Sampling
from metakern.dialogue.hints import Hints
from metakern.dialogue.manager import Decision
from metakern.dialogue.manager.policy import ActPolicy
from metakern.dialogue.readers import Dialogue, Turn, read
from metakern.dialogue.run import Run
from metakern.dialogue.split import TaskData
from metakern.dialogue.tasks import episodes
from metakern.dialogue.teach import teach
from metakern.dialogue.tokenizer import IGNORE, Tokenizer
from metakern.dialogue.trainer import train
from metakern.errors import DataError, UserError
from metakern.serve.service import Service, Settings
from metakern.serve.store import Store

SHOP = Dialogue("shop", "1", (Turn("user", "When are you open?"), Turn("bot", "Till six.", "INFORM")))
TALKS = Dialogue("shop", "2", (Turn("user", "What do you sell?"), Turn("bot", "Pianos.", "OFFER")))


def texts(turns):
    return [f"{turn.speaker}: {turn.text}" for turn in turns]


def test_a_hint_names_the_act_and_the_reply_to_the_nearest_message_of_another_conversation():
    asked = (Turn("user", "Are you open now?"), Turn("bot", "Yes.", "INFORM"), Turn("bot", "Come in.", "OFFER"))
    both = [SHOP, TALKS]
    shown = ["user: Are you open now?", "bot: Yes.", "bot: Come in."]
    assert texts(Hints("none", both)(asked, "bot")) == shown
    assert texts(Hints("act", both)(asked, "bot")) == [shown[0], "system: [INFORM]", *shown[1:]]
    assert texts(Hints("reply", both)(asked, "bot")) == [shown[0], "system: Till six.", *shown[1:]]
    assert texts(Hints("act+reply", both)(asked, "bot"))[1] == "system: [INFORM] Till six."
    own = Hints("reply", both)(SHOP.turns, "bot", SHOP.turns)
    assert texts(own)[1] == "system: Pianos."  # "you" is in both, and its own reply is not told
    assert texts(Hints("reply", [SHOP, SHOP])(SHOP.turns, "bot", SHOP.turns)) == texts(SHOP.turns)
    assert Hints("reply", both).before("violins!") == []
    assert Hints("act+reply").before("hi") == []


def test_hints_are_read_but_not_learned():
    tokenizer = Tokenizer.train([SHOP, TALKS], 300)
    config = Config(hints="act+reply", support_size=1, query_size=1, max_length=90)
    source = episodes(config, (TaskData("shop", (SHOP, TALKS)),), tokenizer)
    support, query = source.sample(0, 1)
    said = tokenizer.decode(query["input_ids"][0, 0].tolist())
    taught = tokenizer.decode(support["input_ids"][0, 0].tolist())
    assert "[INFORM] Pianos." in said + taught or "[OFFER] Till six." in said + taught
    assert ("[INFORM]" in taught) != ("[OFFER]" in taught)
    learned = [i for i in query["labels"][0, 0].tolist() if i != IGNORE]
    assert tokenizer.decode(learned) in ("Till six.", "Pianos.")
    [(_, _, [exchange])] = source.exchanges()
    assert tokenizer.decode(exchange.prompt).count("[") == 1
    assert exchange.context in (SHOP.turns[0].text, TALKS.turns[0].text)
    plain = replace(TALKS, turns=tuple(replace(turn, act="") for turn in TALKS.turns))
    with pytest.raises(DataError, match="hints: data must have dialogue acts, as the format sgd has, got none"):
        episodes(config, (TaskData("shop", (plain, replace(plain, turns=plain.turns * 2))),), tokenizer)


def test_a_policy_gives_the_query_its_acts():
    tokenizer = Tokenizer.train([SHOP, TALKS], 300)
    config = Config(hints="act", support_size=1, query_size=1, max_length=90)
    learned = []

    def policy(support):
        learned.append(support)
        return lambda d: replace(d, turns=tuple(replace(t, act="X" * (t.speaker == "bot")) for t in d.turns))

    source = episodes(config, (TaskData("shop", (SHOP, TALKS)),), tokenizer, policy=policy)
    _, support, query = next(source.evaluation())
    assert "[X]" not in tokenizer.decode(support["input_ids"][0, 0].tolist())
    assert "[X]" in tokenizer.decode(query["input_ids"][0, 0].tolist())
    assert learned[0][0] in (SHOP, TALKS)


class Acting:
    """A policy that always generates, with the same act."""

    def learn(self, dialogues):
        pass

    def completed(self, dialogue):
        turns = (t if t.act or t.speaker == "user" else replace(t, act="INFORM") for t in dialogue.turns)
        return replace(dialogue, turns=tuple(turns))

    def __call__(self, turns, parse):
        return Decision("generate", act="INFORM")


def test_a_model_that_is_taught_by_acts_obeys_the_policy(tmp_path):
    run = untrained_run(tmp_path / "run", hints="act", model="gpt")
    assert "[INFORM]" in run.tokenizer.decode(run.tokenizer.encode("[INFORM]"))
    pairs = [("river?", "cloud otter", "INFORM"), ("river?", "maple", "OFFER")]
    known = [
        Dialogue("t", str(i), (Turn("user", said), Turn("bot", reply, act)), {"bot": "bot"})
        for i, (said, reply, act) in enumerate(pairs)
    ]
    assert teach(run, known, most=200).end.right == 2  # which no model without hints can
    chat = Chat(run, known, policy=Acting(), most=200, sampling=Sampling(temperature=0))
    assert "".join(chat.generator([Turn("user", "river?")], Acting()([], None))) == "cloud otter"
    assert chat.hear("river?") == "cloud otter"
    assert chat.turns[-1].act == "INFORM"
    chat = Chat(run, policy=Acting(), most=200, sampling=Sampling(temperature=0))
    for line in ("/teach", "stone?", "violin", ""):
        said = chat.hear(line)
    assert "taught replies right: 1 of 1" in said
    assert chat.hear("stone?") == "violin"  # taught without an act, and asked with one
    store = Store(tmp_path / "users.sqlite")
    with pytest.raises(UserError, match="serve: the run's hints must be none, as a server has no policy, got 'act'"):
        Service(run, store, Settings())
    store.close()


def with_acts(folder, tasks=10):
    """Write conversations in the format sgd, in which a bot's act tells the words of its reply."""
    import json

    folder.mkdir()
    for t in range(tasks):
        draw, talks = random.Random(t), []
        for i in range(10):
            turns = []
            for _ in range(2):
                act = draw.choice(("INFORM", "OFFER"))
                said = " ".join(draw.choices(WORDS, k=3))
                reply = f"{said.split()[0]} {'cloud' if act == 'INFORM' else 'stone'}"
                turns.append(
                    {"speaker": "USER", "utterance": f"{act.lower()} {said}", "frames": [{"slots": [], "actions": []}]}
                )
                frame = {"actions": [{"act": act}], "slots": []}
                turns.append({"speaker": "SYSTEM", "utterance": reply, "frames": [frame]})
            talks.append({"dialogue_id": f"{t}_{i}", "services": [f"S{chr(65 + t)}_1"], "turns": turns})
        (folder / f"dialogues_{t:03}.json").write_text(json.dumps(talks), "utf-8")
    return str(folder)


def test_an_evaluation_takes_the_acts_of_the_data_or_those_of_a_policy(tmp_path):
    data = with_acts(tmp_path / "sgd")
    assert {turn.act for d in read(data) for turn in d.turns} == {"", "INFORM", "OFFER"}
    common = {"data": data, "max_length": 64, "steps": 20, "eval_every": 20, "min_words": 99}
    base = tiny_config(write_tasks(tmp_path / "data"))
    run = train(replace(base, **common, hints="act", pretrain_steps=0, width=16, hidden=16), tmp_path / "run")
    policy = train(replace(base, **common, part="policy", pretrain_steps=0), tmp_path / "policy")
    told = evaluate(run.path, (0, 1))
    chosen = evaluate(run.path, (0, 1), policy=policy.path)
    assert (told["policy"], chosen["policy"]) == (None, str(policy.path))
    assert told["curves"]["maml"]["loss"][0] != chosen["curves"]["maml"]["loss"][0]
    dialogue = next(iter(read(data)))
    acting = ActPolicy(policy)
    predicted = acting.rewriter([dialogue])(dialogue)
    for i, turn in enumerate(predicted.turns):
        if turn.speaker == "bot":
            p = acting.probabilities(dialogue.turns[:i])
            assert turn.act == max(p, key=p.__getitem__)
        else:
            assert turn == dialogue.turns[i]
    blank = replace(dialogue, turns=tuple(replace(turn, act="") for turn in dialogue.turns))
    assert acting.completed(blank) == predicted
    assert acting.completed(dialogue) == dialogue
    other = train(replace(base, **common, part="policy", pretrain_steps=0, seed=5), tmp_path / "other")
    with pytest.raises(UserError, match="a policy must not have been trained on a test task, got 'S"):
        evaluate(run.path, (0, 1), policy=other.path)
    with pytest.raises(UserError, match="must be the run of a policy, got one of a generator"):
        evaluate(run.path, (0, 1), policy=run.path)
    plain = untrained_run(tmp_path / "plain")
    with pytest.raises(UserError, match="hints must have acts for a policy to choose, got 'none'"):
        evaluate(plain.path, (0, 1), policy=policy.path)
    assert isinstance(Run.open(run.path).config.hints, str)
