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
from metakern.dialogue.chat import GREETING, HELP, Chat, adapt, talk
from metakern.dialogue.generate import Sampling
from metakern.dialogue.manager.policy import TaughtPolicy
from metakern.dialogue.readers import Dialogue, Turn, read
from metakern.dialogue.run import Run
from metakern.dialogue.teach import support_batch, teach
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


def lesson_of(*said: str, number: int = 0) -> Dialogue:
    turns = tuple(Turn(("user", "bot")[i % 2], text) for i, text in enumerate(said))
    return Dialogue("taught", str(number), turns, {"bot": "bot"})


def teach_in(chat: Chat, *said: str) -> str:
    chat.hear("/teach")
    for text in said:
        assert chat.hear(text) is None
    return chat.hear("")


def test_adapt_writes_a_run_and_leaves_the_other_as_it_is(folder, run, support, tmp_path):
    seen = []
    line = adapt(folder, str(support), tmp_path / "adapted", 3, seen.append)
    assert line.startswith("inner steps: ")
    assert (seen[0].split(",")[0], seen[-1]) == ("inner step 0", "")
    lesson = teach(run, read(str(support)), 3)
    adapted = Run.open(tmp_path / "adapted")
    assert adapted.state["from"] == str(folder)
    assert lesson.phi
    for name, parameter in adapted.model.named_parameters():
        torch.testing.assert_close(parameter, lesson.phi[name][0])
        assert not torch.equal(parameter, run.model.get_parameter(name))
    with pytest.raises(UserError, match="holds a run already; choose another folder"):
        adapt(folder, str(support), tmp_path / "adapted")
    with pytest.raises(DataError, match="no such file"):
        adapt(folder, str(tmp_path / "none.jsonl"), tmp_path / "more")
    assert not (tmp_path / "more").exists()


def test_an_adaptation_that_is_cut_short_can_be_repeated(folder, support, tmp_path, monkeypatch):
    real = module.io.write
    for failing in ("tokenizer.json", "best.json", "config.toml"):

        def full(path, data, failing=failing):
            if path.name == failing:
                raise KeyboardInterrupt
            real(path, data)

        with monkeypatch.context() as patch:
            patch.setattr("metakern.dialogue.tokenizer.write", full)
            patch.setattr("metakern.io.write", full)
            with pytest.raises(KeyboardInterrupt):
                adapt(folder, str(support), tmp_path / "adapted")
        with pytest.raises(UserError, match="is not the folder of a run"):
            Run.open(tmp_path / "adapted")
    adapt(folder, str(support), tmp_path / "adapted")
    assert Run.open(tmp_path / "adapted").state["phase"] == "adapted"
    with pytest.raises(UserError, match="holds a run already"):
        train(Run.open(folder).config, tmp_path / "adapted")


def test_replies_are_reproducible_and_commands_are_answered(run):
    chat, same = Chat(run, seed=5), Chat(run, seed=5)
    said = [chat.hear("river stone?"), chat.hear("why river?")]
    assert said == [same.hear("river stone?"), "".join(same.answer("why river?"))]
    assert [turn.speaker for turn in chat.turns] == ["user", "bot", "user", "bot"]
    assert chat.hear("  ") is None
    assert chat.hear("/forget") == "the conversation is forgotten"
    assert chat.turns == []
    assert chat.hear("/help") == HELP
    assert chat.hear("/nonsense") == f"/nonsense is not a command\n{HELP}"
    for command in ("/teach", "/forget", "/why", "/save", "/undo", "/help", "/quit"):
        assert command in HELP
    with pytest.raises(EOFError):
        chat.hear("/quit")


def test_what_is_taught_is_answered_word_for_word_and_the_model_adapts(run):
    chat = Chat(run, most=3)
    assert chat.model is run.model
    assert (chat.prompt, chat.greeting) == ("you> ", GREETING)
    chat.hear("/teach")
    prompts = []
    for line in ("river stone", "ember ember", "why river", "for ember"):
        prompts.append(chat.prompt)
        assert chat.hear(line) is None
    assert prompts == ["you> ", "bot> ", "you> ", "bot> "]
    line = chat.hear("")
    lesson = lesson_of("river stone", "ember ember", "why river", "for ember")
    assert chat.known == [lesson]
    found = teach(run, [lesson], 3)
    assert line == found.summary
    for name, parameter in chat.model.named_parameters():
        torch.testing.assert_close(parameter, found.phi[name][0])
    assert chat.prompt == "you> "
    assert chat.hear("River, stone?") == "ember ember"
    assert chat.manager.decision.action == "retrieve"
    assert chat.hear("why river") == "for ember"
    chat.hear("copper lantern harbor")
    assert chat.manager.decision.action == "generate"
    chat.hear("/teach")
    assert chat.hear("") == "nothing learned: an exchange needs what you say and an answer"
    assert chat.known == [lesson]


def test_the_chat_says_why(run):
    chat = Chat(run, [lesson_of("river stone", "ember"), lesson_of("maple stone", "otter", number=1)], most=1)
    assert chat.hear("/why") == "nothing was said yet"
    chat.hear("river stone")
    assert chat.hear("/why").splitlines() == [
        "intent: ember (confidence 1.00, threshold 0.90)",
        "policy: retrieve, as the message was taught (confidence 1.00, threshold 0.90)",
        "taught, 1.00 like it: river stone -> ember",
        "taught, 0.34 like it: maple stone -> otter",
    ]
    chat.hear("copper river")
    assert "intent: none of those taught" in chat.hear("/why")


def test_undo_takes_back_replies_and_lessons(run):
    chat = Chat(run, most=1)
    assert chat.hear("/undo") == "nothing to take back"
    teach_in(chat, "river", "stone")
    teach_in(chat, "maple", "otter")
    chat.hear("river")
    assert chat.hear("/undo") == "the last message and its answer are taken back"
    assert chat.turns == []
    assert chat.hear("/undo").startswith("the last lesson is taken back; inner steps: 1")
    assert chat.known == [lesson_of("river", "stone")]
    assert chat.hear("/undo") == "the last lesson is taken back; nothing is taught any more"
    assert chat.model is run.model
    chat.hear("river")
    assert chat.manager.parse.intent is None


def test_a_lesson_that_contradicts_an_earlier_one_replaces_it(run):
    chat = Chat(run, most=1)
    teach_in(chat, "Open today?", "river")
    assert teach_in(chat, "open TODAY", "stone").endswith("; the earlier answer to it is forgotten")
    assert [d.turns[1].text for d in chat.known] == ["stone"]
    assert chat.hear("open today?") == "stone"


def test_contradictions_of_a_support_are_named_and_the_last_answer_counts(run):
    chat = Chat(run, [lesson_of("river?", "stone"), lesson_of("river!", "maple", number=1)], most=1)
    assert chat.greeting.endswith("\ntaught with two answers, of which the last one counts: river!")
    assert chat.hear("river") == "maple"


def test_a_saved_chat_is_a_run_with_what_it_was_taught(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    chat = Chat(run, most=1)
    assert chat.hear("/save").startswith("name the folder")
    assert chat.hear("/save mine").startswith("nothing to save")
    teach_in(chat, "river", "stone \x1b[2J")
    assert chat.hear("/save mine") == "saved; next: metakern chat mine"
    saved = Run.open("mine")
    assert all(torch.equal(p, chat.model.get_parameter(name)) for name, p in saved.model.named_parameters())
    assert [d.turns[1].text for d in read("mine/support.jsonl")] == ["stone \x1b[2J"]
    with pytest.raises(UserError, match="holds a run already"):
        chat.hear("/save mine")
    again = Chat(saved, most=1)
    assert again.greeting.startswith("exchanges taught before: 1;")
    assert all(torch.equal(p, saved.model.get_parameter(name)) for name, p in again.model.named_parameters())
    assert (again.hear("river"), again.hear("/undo")) == (
        chat.hear("river"),
        "the last message and its answer are taken back",
    )
    teach_in(again, "maple", "otter")
    assert [again.hear(said) for said in ("river", "maple")] == [chat.hear("river"), "otter"]
    assert Chat(saved, [lesson_of("cloud", "ember")], most=1).hear("river") != chat.hear("river")


def test_a_lesson_may_end_with_the_input(run, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("/teach\nriver\nstone\n"))
    chat = Chat(run, most=1)
    talk(chat)
    assert "inner steps: 1" in capsys.readouterr().out
    assert chat.hear("river") == "stone"


def test_a_policy_may_ask_back_or_hand_over_instead_of_inventing(run):
    known = [lesson_of("river stone", "ember")]
    asks = Chat(run, known, policy=TaughtPolicy("ask back"), most=1)
    assert asks.hear("river cloud") == "Do you mean: river stone"
    assert asks.hear("violin").startswith("I am not sure what you mean.")
    assert Chat(run, known, policy=TaughtPolicy("hand over"), most=1).hear("violin").startswith("I do not know that.")
    with pytest.raises(UserError, match="unknown must be one of generate, ask back, hand over, got 'guess'"):
        TaughtPolicy("guess")


def test_lengths_stop_words_and_sampling_reach_the_model(run):
    long, short = Chat(run, sampling=Sampling(0)), Chat(run, sampling=Sampling(0), most_tokens=2)
    whole = long.hear("river stone?")
    assert whole.startswith(short.hear("river stone?"))
    assert len(run.tokenizer.encode(short.turns[-1].text)) <= 2
    stop = whole[2:4]
    assert Chat(run, sampling=Sampling(0), stop=[stop]).hear("river stone?") == whole[: whole.index(stop)].rstrip()
    with pytest.raises(UserError, match="max_tokens must be at least 1, got 0"):
        Chat(run, most_tokens=0)


def test_a_very_long_message_is_answered(run):
    assert isinstance(Chat(run, [lesson_of("river", "stone")], most=1).hear("ember cloud " * 20_000), str)


def test_without_a_terminal_only_replies_are_printed(run, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("river stone?\n\nwhy river?\n"))
    talk(Chat(run, seed=5))
    other = Chat(run, seed=5)
    assert capsys.readouterr().out == f"{other.hear('river stone?')}\n{other.hear('why river?')}\n"


def test_bytes_that_are_not_utf_8_are_read_all_the_same(run, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.StringIO("river\udce9\n"))
    talk(Chat(run, seed=5))
    assert capsys.readouterr().out == f"{Chat(run, seed=5).hear('river?')}\n"


def test_in_a_terminal_the_chat_greets_prompts_and_quits(run, monkeypatch, capsys):
    lines, asked = iter(["/help", "/quit"]), []

    def ask(prompt):
        asked.append(prompt)
        return next(lines)

    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(module, "_terminal", lambda: ask)
    talk(Chat(run))
    assert asked == ["you> ", "you> "]
    assert capsys.readouterr().out == f"{GREETING}\n{HELP}\n"


def test_no_escape_sequence_reaches_the_terminal(run, monkeypatch, capsys):
    chat = Chat(run, [lesson_of("river", "\x1b]0;owned\x07stone\x9b2J")], most=1)
    chat.greeting = "\x1b[2J"
    monkeypatch.setattr(sys, "stdin", io.StringIO("river\n/why\n/\x1b[1m\n"))
    talk(chat)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(module, "_terminal", lambda: lambda prompt: "/quit")
    talk(chat)
    shown = capsys.readouterr().out
    assert shown.startswith("␛]0;owned␇stone\ufffd2J\n")
    assert not set(shown) & {"\x1b", "\x07", "\x9b"}


def test_a_reply_is_printed_piece_by_piece(run, monkeypatch, capsys):
    chat = Chat(run)
    monkeypatch.setattr(chat.manager, "reply", lambda turns: iter(["one", " two"]))
    pieces = chat.answer("river")
    assert next(pieces) == "one"
    assert chat.turns == []
    assert list(pieces) == [" two"]
    assert chat.turns[-1] == Turn("bot", "one two")


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
    history = tmp_path / "metakern" / "history"
    assert "river" in history.read_text()
    assert history.stat().st_mode & 0o777 == 0o600
    history.unlink()
    history.mkdir()  # a cache that can't be used
    with create_pipe_input() as keys, create_app_session(input=keys, output=DummyOutput()):
        keys.send_text("stone\n")
        assert module._terminal()("you> ") == "stone"


def test_a_system_turn_in_the_support_is_not_learned(run, tmp_path):
    file = tmp_path / "s.jsonl"
    roles = [("system", "be brief"), ("user", "river"), ("assistant", "stone")]
    file.write_text(json.dumps({"messages": [{"role": role, "content": text} for role, text in roles]}))
    batch = support_batch(run, read(str(file)))
    row = batch["labels"][0][0]
    assert run.tokenizer.decode(row[row != IGNORE].tolist()) == "stone"
