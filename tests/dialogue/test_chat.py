"""Adaptation to a few exchanges, and chat with and without a terminal."""

import io
import json
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import WORDS, tiny_config, write_tasks

from metakern.dialogue import chat as module
from metakern.dialogue.chat import HELP, Chat, adapt, adapted_model, talk
from metakern.dialogue.readers import Dialogue, Turn, read
from metakern.dialogue.run import Run
from metakern.dialogue.teach import support_batch
from metakern.dialogue.tokenizer import IGNORE
from metakern.dialogue.trainer import train
from metakern.errors import DataError, UserError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    data = write_tasks(folder / "data")
    train(tiny_config(data, steps=2, pretrain_steps=30, pretrain_lr=0.03), folder / "run")
    return folder / "run"


@pytest.fixture
def run(folder):
    return Run.open(folder)


@pytest.fixture
def support(folder):
    return folder.parent / "data" / "task0.jsonl"


texts = st.lists(st.sampled_from(WORDS), min_size=1, max_size=5).map(" ".join)
talks = st.lists(texts, min_size=2, max_size=8).map(
    lambda said: Dialogue("t", "d", tuple(Turn(("user", "bot")[i % 2], s) for i, s in enumerate(said)), {"bot": "bot"})
)


@settings(max_examples=50, deadline=None)
@given(st.lists(talks, min_size=1, max_size=3))
def test_the_support_holds_every_reply_once(folder, dialogues):
    run = Run.open(folder, max_length=80)
    batch = support_batch(run, dialogues)
    ids, labels = batch["input_ids"][0], batch["labels"][0]
    assert ids.shape[1] <= 80
    assert ((labels == IGNORE) | (labels == ids)).all()
    assert (labels != IGNORE).any(1).all()
    learned = [run.tokenizer.decode(row[row != IGNORE].tolist()) for row in labels]
    replies = [turn.text for dialogue in dialogues for turn in dialogue.turns if turn.speaker == "bot"]
    assert "".join(learned) == "".join(replies)
    assert len(learned) >= len(dialogues)


def test_a_window_is_closed_when_the_next_exchange_does_not_fit(run):
    turns = tuple(Turn(("user", "bot")[i % 2], "river stone") for i in range(12))
    size = len(run.tokenizer.encode("river stone")) + 2
    fits = [(run.config.max_length - 1) // (2 * size)] if 2 * size < run.config.max_length else [1]
    rows = support_batch(run, [Dialogue("t", "d", turns, {"bot": "bot"})])["labels"][0]
    eos = [(row == run.tokenizer.eos_id).sum().item() for row in rows]
    assert eos == fits * (6 // fits[0])


def test_short_conversations_are_one_window_each(run):
    talk = Dialogue("t", "d", (Turn("user", "river"), Turn("bot", "stone")), {"bot": "bot"})
    batch = support_batch(run, [talk, talk])
    ids, labels = run.tokenizer.encode_dialogue(talk.turns, "bot", run.config.max_length, "bot")
    assert batch["input_ids"].tolist() == [[ids, ids]]
    assert batch["labels"].tolist() == [[labels, labels]]


def test_a_support_without_a_reply_is_refused(run):
    with pytest.raises(UserError, match="support must hold a reply of the bot, got none"):
        support_batch(run, [Dialogue("t", "d", (Turn("user", "a"), Turn("system", "b")), {"bot": "bot"})])


def test_adaptation_lowers_the_loss_and_does_not_change_the_run(run, support):
    before = {name: value.clone() for name, value in run.model.state_dict().items()}
    dialogues = read(str(support))
    batch = support_batch(run, dialogues)
    model, line = adapted_model(run, dialogues, 4)
    assert all(torch.equal(before[name], value) for name, value in run.model.state_dict().items())
    phi = run.algorithm.adapt(batch, steps=4)
    assert phi
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, phi[name][0])
        assert not torch.equal(parameter, before[name])
    losses = run.algorithm.evaluate(batch, batch, steps=(0, 4)).exp()
    assert losses[1] < losses[0]
    assert line.endswith(f"perplexity on them: {losses[0].item():.1f} -> {losses[1].item():.1f}")


def test_adapt_writes_a_run(folder, run, support, tmp_path):
    line = adapt(folder, str(support), tmp_path / "adapted", 3)
    assert line.startswith("inner steps: 3, windows of support: ")
    model, _ = adapted_model(run, read(str(support)), 3)
    adapted = Run.open(tmp_path / "adapted")
    assert adapted.state["from"] == str(folder)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in adapted.model.state_dict().items())
    with pytest.raises(UserError, match="holds a run already; choose another --out"):
        adapt(folder, str(support), tmp_path / "adapted")
    with pytest.raises(DataError, match="no such file"):
        adapt(folder, str(tmp_path / "none.jsonl"), tmp_path / "more")
    assert not (tmp_path / "more").exists()


def test_replies_are_reproducible_and_commands_are_answered(run):
    chat, same = Chat(run, seed=5), Chat(run, seed=5)
    said = [chat.hear("river stone?"), chat.hear("why river?")]
    assert said == [same.hear("river stone?"), same.hear("why river?")]
    assert [turn.speaker for turn in chat.turns] == ["user", "bot", "user", "bot"]
    assert chat.hear("  ") is None
    assert chat.hear("/forget") == "the conversation is forgotten"
    assert chat.turns == []
    assert chat.hear("/help") == HELP
    assert chat.hear("/nonsense") == f"/nonsense is not a command\n{HELP}"
    for command in ("/teach", "/forget", "/help", "/quit"):
        assert command in HELP
    with pytest.raises(EOFError):
        chat.hear("/quit")


def test_exchanges_taught_in_a_chat_adapt_the_model(run):
    chat = Chat(run, steps=3)
    assert chat.model is run.model
    assert chat.prompt == "you> "
    chat.hear("/teach")
    prompts = []
    for line in ("river stone", "ember ember", "why river", "for ember"):
        prompts.append(chat.prompt)
        assert chat.hear(line) is None
    assert prompts == ["you> ", "bot> ", "you> ", "bot> "]
    assert chat.hear("").startswith("inner steps: 3, windows of support: 2, perplexity on them: ")
    lesson = Dialogue(
        "taught",
        "0",
        tuple(
            Turn(speaker, text)
            for speaker, text in zip(
                ("user", "bot") * 2, ("river stone", "ember ember", "why river", "for ember"), strict=True
            )
        ),
        {"bot": "bot"},
    )
    model, _ = adapted_model(run, [lesson], 3)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in chat.model.state_dict().items())
    assert chat.prompt == "you> "
    chat.hear("/teach")
    assert chat.hear("") == "nothing learned: an exchange needs what you say and an answer"
    assert chat.known == [lesson]


def test_a_support_file_adapts_the_model_before_the_chat(run, support):
    dialogues = read(str(support))
    chat = Chat(run, dialogues)
    model, line = adapted_model(run, dialogues)
    assert chat.greeting == line
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in chat.model.state_dict().items())


def test_without_a_terminal_only_replies_are_printed(run, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("river stone?\n\nwhy river?\n"))
    talk(Chat(run, seed=5))
    other = Chat(run, seed=5)
    assert capsys.readouterr().out == f"{other.hear('river stone?')}\n{other.hear('why river?')}\n"


def test_in_a_terminal_the_chat_greets_prompts_and_quits(run, monkeypatch, capsys):
    lines, asked = iter(["/help", "/quit"]), []

    def ask(prompt):
        asked.append(prompt)
        return next(lines)

    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(module, "_terminal", lambda: ask)
    talk(Chat(run))
    assert asked == ["you> ", "you> "]
    assert (
        capsys.readouterr().out
        == f"not adapted yet: /teach me some exchanges or just talk; /help shows the commands\n{HELP}\n"
    )


@pytest.mark.parametrize("toolkit", [True, False])
def test_the_terminal_has_a_history(monkeypatch, tmp_path, toolkit):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    if not toolkit:
        monkeypatch.setitem(sys.modules, "prompt_toolkit", None)
        assert module._terminal() is input
        assert "readline" in sys.modules
        return
    from prompt_toolkit.application import create_app_session
    from prompt_toolkit.input import create_pipe_input
    from prompt_toolkit.output import DummyOutput

    with create_pipe_input() as keys, create_app_session(input=keys, output=DummyOutput()):
        keys.send_text("river\n")
        assert module._terminal()("you> ") == "river"
        keys.send_text("\x1b[A\n")  # up
        assert module._terminal()("you> ") == "river"
    assert "river" in (tmp_path / "metakern" / "history").read_text()


def test_a_system_turn_in_the_support_is_not_learned(run, tmp_path):
    file = tmp_path / "s.jsonl"
    roles = [("system", "be brief"), ("user", "river"), ("assistant", "stone")]
    file.write_text(json.dumps({"messages": [{"role": role, "content": text} for role, text in roles]}))
    batch = support_batch(run, read(str(file)))
    row = batch["labels"][0][0]
    assert run.tokenizer.decode(row[row != IGNORE].tolist()) == "stone"
