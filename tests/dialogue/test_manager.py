"""The dialogue manager: episodes, models, training and judgement of parsers and policies, and how the parts compose."""

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from tiny import WORDS, tiny_config

from metakern.cli import main
from metakern.dialogue.config import Config
from metakern.dialogue.evaluate import evaluate
from metakern.dialogue.manager import Decision, Manager, Parse, contradictions
from metakern.dialogue.manager.acts import Acts, acts_in
from metakern.dialogue.manager.evaluate import _f1, evaluate_part, show_part
from metakern.dialogue.manager.generator import LanguageModel
from metakern.dialogue.manager.models import ActModel, BagEncoder
from metakern.dialogue.manager.parser import FewShotParser, NearestParser, best_threshold
from metakern.dialogue.manager.policy import ActPolicy, TaughtPolicy
from metakern.dialogue.manager.utterances import Utterances, by_intent
from metakern.dialogue.readers import Dialogue, Turn, dialogue, read
from metakern.dialogue.run import Run
from metakern.dialogue.split import TaskData
from metakern.dialogue.tasks import load_split, source_of
from metakern.dialogue.tokenizer import IGNORE
from metakern.dialogue.trainer import train
from metakern.errors import CheckpointError, DataError, UserError

ACTS = ("REQUEST", "OFFER", "INFORM+OFFER")


def write_intents(file: Path, intents: int = 12, texts: int = 10) -> Path:
    """Write texts in the format of CLINC150; those of an intent use three words of its own."""
    draw = random.Random(1)
    favorites = {f"intent_{i}": draw.sample(WORDS, 3) for i in range(intents)}
    pairs = [(" ".join(draw.choices(own, k=4)), name) for name, own in favorites.items() for _ in range(texts)]
    file.write_text(json.dumps({"train": pairs}))
    return file


def write_services(folder: Path, services: int = 8, dialogues: int = 6) -> Path:
    """Write dialogues in the format of SGD, in which the act follows from a word, and which word differs by service."""
    folder.mkdir()
    found = []
    for s in range(services):
        draw = random.Random(s)
        meaning = dict(zip(WORDS[:3], draw.sample(ACTS, 3), strict=True))
        for i in range(dialogues):
            turns = []
            for _ in range(3):
                word = draw.choice(WORDS[:3])
                text = f"{word} {draw.choice(WORDS[3:])}"
                acts = [{"act": act, "slot": "", "values": []} for act in meaning[word].split("+")]
                slot = {"slot": "word", "start": 0, "exclusive_end": len(word)}
                turns.append({"speaker": "USER", "utterance": text, "frames": [{"slots": [slot], "actions": []}]})
                turns.append({"speaker": "SYSTEM", "utterance": "yes", "frames": [{"slots": [], "actions": acts}]})
            found.append({"dialogue_id": f"{s}_{i}", "services": [f"S{chr(65 + s)}_1"], "turns": turns})
    (folder / "dialogues_001.json").write_text(json.dumps(found))
    return folder


def taught(*pairs: tuple[str, str]) -> list[Dialogue]:
    return [dialogue("taught", str(i), [("user", said), ("bot", reply)]) for i, (said, reply) in enumerate(pairs)]


@pytest.fixture(scope="module", autouse=True)
def few_episodes():
    """Choose thresholds and judge parsers by few episodes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("metakern.dialogue.manager.parser.EPISODES", 6)
        patch.setattr("metakern.dialogue.manager.evaluate.EPISODES", 12)
        yield


@pytest.fixture(scope="module")
def parser(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parser")
    sizes = {"part": "parser", "algorithm": "protonet", "model": "bag", "width": 32, "steps": 20, "pretrain_steps": 0}
    shares = {"validation_part": 0.25, "test_part": 0.25, "query_size": 3, "eval_every": 10, "ways": 2}
    config = tiny_config(write_intents(folder / "intents.json"), **sizes, **shares, log_every=20)
    return train(config, folder / "run")


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("policy")
    sizes = {"part": "policy", "model": "gru", "width": 16, "hidden": 16, "steps": 30, "pretrain_steps": 0, "tasks": 4}
    shares = {"validation_part": 0.2, "test_part": 0.3, "min_dialogues": 4, "eval_every": 15, "overlap": "dialogues"}
    rates = {"lr_per": "all", "inner_lr": 0.5, "outer_lr": 0.03, "rate_lr": 0.01}
    config = tiny_config(write_services(folder / "sgd"), **sizes, **shares, **rates, log_every=30)
    return train(config, folder / "run")


# Data


def test_turns_of_sgd_have_acts_and_slots(tmp_path):
    found = read(str(write_services(tmp_path / "sgd", 2, 2)))
    user, bot = found[0].turns[:2]
    assert (user.act, user.slots) == ("", (("word", user.text.split()[0]),))
    assert bot.act in ACTS
    assert acts_in(found) == sorted(ACTS)
    with pytest.raises(DataError, match="policy: data must have two dialogue acts of the bot, as the format sgd has"):
        acts_in(taught(("river", "stone")))


@pytest.mark.parametrize("frames", [None, "no", [3], [{"actions": 1, "slots": [{"slot": 2}]}], [{"actions": [{}]}]])
def test_damaged_frames_of_sgd_are_turns_without_acts(tmp_path, frames):
    turns = [{"speaker": s, "utterance": "river", "frames": frames} for s in ("USER", "SYSTEM")]
    file = tmp_path / "dialogues_001.json"
    file.write_text(json.dumps([{"services": ["Banks_1"], "turns": turns}]))
    assert [(turn.act, turn.slots) for turn in read(str(file))[0].turns] == [("", ())] * 2


def test_episodes_of_intents_share_no_text_and_repeat(parser):
    config, tokenizer = parser.config, parser.tokenizer
    source = source_of(config, load_split(config).train, tokenizer, parser.labels)
    episode = source.episode(random.Random(3), shots=2, strangers=4)
    support, query = ({text for text, _ in side} for side in (episode.support, episode.query))
    assert len(episode.intents) == config.ways
    assert support.isdisjoint(query)
    assert {name for _, name in episode.strangers}.isdisjoint(episode.intents)
    for text, k in (*episode.support, *episode.query):
        assert text in source.texts[episode.intents[k]]
    batches = source.sample(4, tasks=3), source.sample(4, tasks=3)
    for a, b in zip(*batches, strict=True):
        assert all(torch.equal(a[key], b[key]) for key in a)
    assert not torch.equal(batches[0][0]["input_ids"], source.sample(6, tasks=3)[0]["input_ids"])
    shots = [len(source.sample(step, tasks=1)[0]["labels"][0]) // config.ways for step in (0, 1)]
    assert shots == [1, 5]


def test_labels_of_plain_training_number_all_intents(parser):
    split = load_split(parser.config)
    local, whole = (source_of(parser.config, split.train, parser.tokenizer, (), whole=w) for w in (False, True))
    names = local.names(0, tasks=2)
    labels = whole.sample(0, tasks=2)[0]["labels"]
    assert [" / ".join(parser.labels[k] for k in row) for row in labels] == names
    assert local.sample(0, tasks=2)[0]["labels"].tolist() == [[0, 1]] * 2


def test_data_that_no_parser_can_learn_is_refused(parser):
    talk = dialogue("t", "d", [("user", "a"), ("bot", "b"), ("user", "c"), ("bot", "d")])
    with pytest.raises(DataError, match=r"parser: data must have texts with intents, .* got a dialogue of 4 turns"):
        by_intent([talk])
    assert [d.task_id for d in by_intent(taught(("pay now", "pay"), ("blah", "oos")))] == ["pay"]
    tasks = [TaskData(name, tuple(taught(*[(f"{name} {i}", name) for i in range(3)]))) for name in ("pay", "call")]
    options = {"ways": 2, "queries": 2, "max_length": 16, "seed": 0}
    with pytest.raises(DataError, match="more texts than the largest of shots, 3, got 3 of 'pay'"):
        Utterances(tasks, parser.tokenizer, shots=(1, 3), **options)
    with pytest.raises(DataError, match="2 intents in each split, got 1"):
        Utterances(tasks[:1], parser.tokenizer, shots=(1,), **options)


def test_acts_label_the_turn_before_the_bots(policy):
    turns = [("bot", "hi", "OFFER"), ("user", "river", ""), ("bot", "ok", "REQUEST"), ("user", "stone", "")]
    turns += [("bot", "so", "NEW"), ("user", "bye", "")]
    talks = tuple(
        Dialogue("t", str(i), tuple(Turn(*turn) for turn in turns[i % 2 :]), {"bot": "bot"}) for i in range(4)
    )
    options = {"support_size": 2, "query_size": 2, "max_length": 8, "seed": 0}
    source = Acts([TaskData("t", talks)], policy.tokenizer, acts=("OFFER", "REQUEST"), **options)
    assert source.unknown == 4
    (_, support, query), examples = next(source.evaluation()), next(source.examples())
    for batch, side in zip((support, query), examples, strict=True):
        labels = batch["labels"][0]
        assert sorted(row[:3].tolist() for row in labels) == [[IGNORE, 1, IGNORE], [1, IGNORE, IGNORE]]
        assert labels[labels != IGNORE].tolist() == [label for _, label in side] == [1, 1]
        assert [text for text, _ in side] == ["river", "river"]
        assert batch["speakers"].sum() == 5
        assert batch["input_ids"].shape == (1, 2, 8, 8)


# Models


def test_a_new_bag_encoder_compares_texts_as_tfidf_does():
    torch.manual_seed(0)
    texts = [[1, 2, 9], [1, 3, 9], [1, 4, 9], [5, 6, 9]]
    encoder = BagEncoder(20, width=4096)
    encoder.weigh(texts)
    idf = {1: 1 + torch.tensor(5 / 4).log().item(), 2: 1 + torch.tensor(5 / 2).log().item(), 9: 0.0}
    for token, weight in idf.items():
        assert encoder.importance.weight[token].item() == pytest.approx(weight)
    x = encoder(torch.tensor(texts))
    cosine = idf[1] ** 2 / (idf[1] ** 2 + idf[2] ** 2)
    assert (x[0] @ x[1]).item() == pytest.approx(cosine, abs=0.06)
    assert (x[0] @ x[3]).item() == pytest.approx(0, abs=0.06)
    padded = encoder(torch.tensor([[9, 2, 1, 7]]), torch.tensor([[1, 1, 1, 0]]))
    torch.testing.assert_close(padded[0], x[0])
    assert encoder(torch.tensor([[3]]), torch.tensor([[0]])).tolist() == [[0.0] * 4096]


def test_acts_are_predicted_from_no_later_turn_and_no_padding():
    torch.manual_seed(0)
    model = ActModel(20, width=8, cell="lstm", hidden=8, classes=3)
    ids, speakers = torch.randint(1, 20, (2, 4, 5)), torch.tensor([[0, 1, 0, 1]] * 2)
    y = model(ids, torch.ones_like(ids), speakers=speakers)
    later = ids.clone()
    later[:, 2:] = 3
    torch.testing.assert_close(model(later, torch.ones_like(ids), speakers=speakers)[:, :2], y[:, :2])
    assert not torch.allclose(model(ids, torch.ones_like(ids), speakers=1 - speakers), y)
    wider = torch.nn.functional.pad(ids, (0, 3))
    mask = torch.nn.functional.pad(torch.ones_like(ids), (0, 3))
    torch.testing.assert_close(model(wider, mask, speakers=speakers), y)


# Parsers


def test_a_message_of_new_words_is_not_taken_for_a_taught_one():
    parser = NearestParser()
    parser.learn(taught(("what do you sell", "pianos"), ("are you open", "till six")))
    assert parser("What do you sell?").intent == "pianos"
    for text in ("what do you sell on mars", "sell", "what do you do", "", "?!", "🙂" * 9):
        assert parser(text).intent is None, text
    assert parser("open").neighbors[0].label == "till six"
    assert parser("zebra").neighbors == ()
    parser.learn([])
    assert parser("what do you sell").intent is None


def test_slots_are_the_longest_known_values():
    said = Turn("user", "from San Jose to Jose", "", (("from", "San Jose"), ("name", "Jose"), ("empty", "?")))
    parser = NearestParser()
    parser.learn([Dialogue("t", "d", (said, Turn("bot", "ok")), {"bot": "bot"})])
    assert parser("near san jose, please").slots == {"from": "San Jose"}
    assert parser("Jose in San Jose").slots == {"name": "Jose", "from": "San Jose"}
    assert parser("Josephine").slots == {}


def test_a_trained_parser_learns_intents_from_a_few_texts(parser):
    found = FewShotParser(parser.path)
    assert {"1", "5"} == found.run.state["thresholds"].keys()
    assert Run.open(parser.path).labels == tuple(parser.labels) == found.run.labels
    found.learn(taught(("river stone", "a"), ("stone river stone", "a"), ("violin copper", "b")))
    assert found.labels == ["a", "b"]
    assert found.scores(["river", "copper violin"]).argmax(1).tolist() == [0, 1]
    sure = found("stone river")
    assert (sure.intent, sure.neighbors[0].label) == ("a", "a")
    assert sure.confidence > found.threshold > found("lantern harbor").confidence
    assert found("lantern harbor").intent is None
    assert FewShotParser(parser, threshold=-1.0).threshold == -1.0
    found.learn(taught(("river", "only")))
    assert (found("river").intent, found("").intent) == ("only", None)
    found.learn([])
    assert found("river").intent is None


@given(
    st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=1, max_size=8),
    st.lists(st.integers(0, 9), min_size=1, max_size=8),
)
def test_the_threshold_is_the_best_one(known, strangers):
    confidence, right = (torch.tensor(column) for column in zip(*known, strict=True))
    others = torch.tensor(strangers)

    def score(t):
        return ((confidence >= t) & right).double().mean() + (others < t).double().mean()

    t = best_threshold(confidence / 1.0, right, others / 1.0)
    assert score(t) == pytest.approx(max(score(x / 2) for x in range(-1, 20)).item())


def test_a_parser_of_protomaml_has_a_limit_of_labels(parser, tmp_path):
    config = replace(parser.config, algorithm="protomaml", steps=2, inner_lr=0.05)
    run = train(config, tmp_path / "run")
    found = FewShotParser(run)
    found.learn(taught(("river stone", "a"), ("violin copper", "b")))
    scores = found.scores(["river stone", "violin copper"])
    torch.testing.assert_close(scores.sum(1), torch.ones(2))
    assert scores.argmax(1).tolist() == [0, 1]
    with pytest.raises(UserError, match="labels must be at most 2, as the run of protomaml has so many ways, got 3"):
        found.learn(taught(("river", "a"), ("violin", "b"), ("otter", "c")))


# Policies


def test_a_policy_learns_the_acts_of_a_service(policy):
    assert policy.labels == tuple(sorted(ACTS))
    turns = [Turn("user", "river maple")]
    parse = Parse(None, 0.0, 0.5)
    chooser = ActPolicy(policy, steps=8)
    before = chooser.probabilities(turns)
    assert sum(before.values()) == pytest.approx(1)
    for act in ACTS:
        talks = [
            Dialogue("t", str(i), (Turn("user", f"river {word}"), Turn("bot", "ok", act)), {"bot": "bot"})
            for i, word in enumerate(WORDS[3:6])
        ]
        chooser.learn(talks)
        decision = chooser(turns, parse)
        assert (decision.action, decision.act) == ("generate", act)
        assert f"next act {act}" in decision.why
    chooser.learn(taught(("river", "stone")))
    assert chooser.probabilities(turns) == before
    with pytest.raises(UserError, match=r"acts of the support must be among .*OFFER.*, got SING"):
        chooser.learn([Dialogue("t", "d", (Turn("user", "a"), Turn("bot", "b", "SING")), {"bot": "bot"})])


def test_f1_counts_single_acts():
    assert _f1([("OFFER", "INFORM+OFFER"), ("REQUEST", "REQUEST"), ("A", "B")]) == pytest.approx(2 * 2 / 7)


def test_runs_of_other_parts_are_refused(parser, policy):
    with pytest.raises(UserError, match="must be the run of a parser, got one of a policy"):
        FewShotParser(policy)
    with pytest.raises(UserError, match="must be the run of a policy, got one of a parser"):
        ActPolicy(parser)
    with pytest.raises(UserError, match="must be the run of a generator, got one of a parser"):
        LanguageModel(parser)
    for bad in ({"part": "policy", "model": "gpt"}, {"part": "policy", "model": "gru", "pretrain_steps": 3}):
        with pytest.raises(UserError, match="model must be one of rnn, gru, lstm for a policy, with pretrain_steps 0"):
            Config(**bad)


# Judgement


def test_a_parser_is_judged_beside_baselines(parser, capsys):
    report = evaluate_part(parser.path, (0,), ("finetune", "pretrained"))
    assert report == json.loads((parser.path / "eval.json").read_text())
    assert list(report["scores"]) == ["protonet", "finetune", "pretrained", "retrieval", "majority"]
    assert report["scores"]["majority"]["accuracy"]["mean"] == [0.5, 0.5]
    assert report["scores"]["protonet"]["accuracy"]["mean"][1] > 0.75
    for scores in report["scores"].values():
        assert all(len(found["values"][0]) == len(report["tasks"]) for found in scores.values())
    accuracy, accepted = (report["scores"]["protonet"][m]["mean"] for m in ("accuracy", "accepted"))
    assert all(a >= b for a, b in zip(accuracy, accepted, strict=True))
    show_part(report, Console(width=200))
    assert "out-of-scope texts refused" in capsys.readouterr().out


def test_a_policy_is_judged_beside_baselines(policy, capsys):
    assert main(["eval", str(policy.path), "--steps", "0,5", "--compare", "finetune", "--repeats", "2"]) == 0
    report = json.loads((policy.path / "eval.json").read_text())
    assert list(report["scores"]) == ["maml", "finetune", "retrieval", "majority"]
    assert (report["columns"], report["unknown"]) == ([0, 5], 0)
    zero, five = report["scores"]["maml"]["accuracy"]["mean"]
    assert five > zero + 0.15
    assert report["scores"]["retrieval"]["accuracy"]["mean"][0] > report["scores"]["majority"]["accuracy"]["mean"][0]
    out = capsys.readouterr().out
    assert "acts predicted exactly" in out
    assert main(["eval", str(policy.path), "--replies"]) == 2
    assert "is the run of a policy, which has no replies" in capsys.readouterr().err


# All together


def test_parts_of_others_can_take_the_places(parser):
    class Echo:
        def learn(self, dialogues, progress=None):
            return f"{len(dialogues)} dialogues"

        def forget(self):
            pass

        def __call__(self, turns, decision):
            yield from (decision.action, " ", turns[-1].text)

    manager = Manager(NearestParser(), TaughtPolicy(), Echo())
    assert manager.learn(taught(("river", "stone"))) == "1 dialogues"
    assert "".join(manager.reply([Turn("user", "river")])) == "stone"
    assert list(manager.reply([Turn("user", "maple")])) == ["generate", " ", "maple"]
    assert manager.decision == Decision("generate", why=manager.decision.why)
    with pytest.raises(UserError, match="teach: support must hold a reply of the bot, got none"):
        manager.learn([Dialogue("t", "d", (Turn("user", "a"), Turn("system", "b")), {"bot": "bot"})])
    with pytest.raises(UserError, match="manager: generator must be given for a policy that generates, got None"):
        list(Manager(NearestParser(), TaughtPolicy()).reply([Turn("user", "maple")]))
    few = Manager(FewShotParser(parser), TaughtPolicy("ask back"))
    few.learn(taught(("river stone", "a"), ("violin copper", "b")))
    assert "".join(few.reply([Turn("user", "stone river")])) == "a"


def test_contradictions_are_of_first_messages_alone():
    later = [dialogue("t", str(i), [("user", str(i)), ("bot", "so"), ("user", "yes"), ("bot", str(i))]) for i in "12"]
    assert contradictions(later) == []
    assert contradictions(taught(("Open?", "yes"), ("open", "no"), ("shut", "no"), ("shut", "no"))) == ["open"]


def test_commands_for_generators_refuse_other_runs(parser, policy, capsys):
    for command in (["chat", str(parser.path)], ["doctor", str(parser.path)]):
        assert main(command) == 2
        assert "must be the run of a generator" in capsys.readouterr().err
    with pytest.raises(UserError, match="got one of a policy: use evaluate_part"):
        evaluate(policy.path)
    assert main(["doctor", str(policy.path)]) == 0
    assert "exact" in capsys.readouterr().out


def test_a_run_of_labels_needs_its_labels(parser, tmp_path):
    copy = tmp_path / "run"
    shutil.copytree(parser.path, copy)
    (copy / "labels.json").write_text('{"a": 1}')
    with pytest.raises(CheckpointError, match=r"is not the vocabulary that .* was trained with: put its files back"):
        Run.open(copy)
    (copy / "labels.json").unlink()
    with pytest.raises(CheckpointError, match=r"is not the vocabulary that .* was trained with: put its files back"):
        Run.open(copy)
