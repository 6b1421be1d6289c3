"""The synthetic bots: a seed fixes them, the facts of a bot agree, and the English is well formed."""

import hashlib
import json
import re
from collections import Counter, defaultdict
from random import Random

import pytest

from metakern.dialogue.bots import BOTS, DIALOGUES, Bot, bots
from metakern.dialogue.bots.grammar import fix, needs, sections, word
from metakern.dialogue.readers import Dialogue, Dialogues, read, words
from metakern.errors import DataError

Tasks = dict[str, list[Dialogue]]


@pytest.fixture(scope="module")
def found() -> Dialogues:
    return read("bots")


@pytest.fixture(scope="module")
def tasks(found: Dialogues) -> Tasks:
    by_task = defaultdict(list)
    for item in found:
        by_task[item.task_id].append(item)
    return dict(by_task)


@pytest.fixture(scope="module")
def made() -> list[Bot]:
    return list(bots())


def said(dialogues: list[Dialogue], speaker: str) -> list[str]:
    return [turn.text for item in dialogues for turn in item.turns if turn.speaker == speaker]


def test_sizes_and_groups(found: Dialogues, tasks: Tasks) -> None:
    assert found.summary() == f"bots (synthetic): {len(found)} dialogues of {len(tasks)} tasks"
    assert found.skipped == {}
    assert set(map(len, tasks.values())) == {DIALOGUES}
    groups = Counter(items[0].meta["group"] for items in tasks.values())
    assert len(groups) == 26
    assert set(groups.values()) == {BOTS}
    assert all(item.meta == {"bot": "bot", "group": item.task_id.split("/")[0]} for item in found)
    assert {len(item.turns) for item in found} == {4, 6, 8, 10}
    assert all(turn.speaker == ("user", "bot")[i % 2] for item in found for i, turn in enumerate(item.turns))
    assert len({word for text in said(found, "bot") for word in words(text) if word.isalpha()}) < 3000


def test_a_seed_gives_the_same_dialogues_everywhere(found: Dialogues) -> None:
    text = json.dumps([[item.task_id, item.dialogue_id, [t.text for t in item.turns]] for item in found])
    assert (
        hashlib.sha256(text.encode()).hexdigest() == "a348a9423a131a624275f94e35a2e6e068b4ea5f41becc24968f4f343fb92845"
    )
    assert read("bots:0") == found


def test_the_variant_is_the_seed(found: Dialogues, tasks: Tasks) -> None:
    others = read("bots:7")
    assert others.source == "bots:7 (synthetic)"
    assert others == read("bots", seed=7)
    assert not {item.turns for item in found} & {item.turns for item in others}
    for seed in ("x", "-1", "1.5", "²", "9" * 5000):
        with pytest.raises(DataError, match=f"bots: seed must be a whole number of at most 9 digits, .* got '{seed}'"):
            read(f"bots:{seed}")


def test_no_file_is_read_as_bots(tmp_path) -> None:
    (tmp_path / "talk.jsonl").write_text("{}")
    with pytest.raises(DataError, match="no file is in the format bots, whose data is synthetic: read 'bots'"):
        read(str(tmp_path / "talk.jsonl"), "bots")
    assert len(read("bots", "bots")) == len(read("bots"))


def test_a_bot_has_one_or_two_replies_to_a_question(tasks: Tasks, made: list[Bot]) -> None:
    for bot, items in zip(made, tasks.values(), strict=True):
        assert items[0].task_id == f"{bot.kind}/{bot.name}"
        assert {1, 2} >= set(map(len, bot.replies.values()))
        canned = {reply for replies in bot.replies.values() for reply in replies}
        assert all({text, text.removeprefix(f"{bot.greeting} ")} & canned for text in said(items, "bot"))


ONE_IN_A_BOT = {
    "phone": r"\b01\d{3} \d{3} \d{3}\b",
    "e-mail": r"\S+@\S+example",
    "site": r"[\w-]+\.(?:shop\.|co\.)?example",
    "currency": r"[£€$](?=\d)",
    "weekdays": r"(?:Monday|Tuesday) to Friday",
    "Saturday": r"On Saturdays (?:it's only until|we close at) ([\d:]+)",
    "Sunday": r"closed on Sundays|Sundays from [\d:]+",
    "clock": r"\d [ap]m\b|\d:\d\d(?! [ap]m)",
}


@pytest.mark.parametrize("fact", ONE_IN_A_BOT)
def test_the_facts_of_a_bot_agree_in_all_its_dialogues(tasks: Tasks, fact: str) -> None:
    seen = 0
    for items in tasks.values():
        values = {match for text in said(items, "bot") for match in re.findall(ONE_IN_A_BOT[fact], text)}
        if fact == "clock":
            values = {":" in value for value in values}
        assert len(values) <= 1, (items[0].task_id, values)
        seen += len(values)
    assert seen > 10


def test_a_bot_that_is_named_for_its_street_is_there(made: list[Bot]) -> None:
    streets = sections("common")["style"].lists["streets"]
    named = [
        (bot, street)
        for bot in made
        for street in streets
        if bot.name.endswith((f"at {street}", f"{street} Post Office"))
    ]
    assert len(named) > 5
    for bot, street in named:
        assert all(f"{bot.values['']['number']} {street}" in reply for reply in bot.replies["address"])


@pytest.mark.parametrize("day", ["Sunday", "Monday"])
def test_no_reply_names_a_day_on_which_the_bot_is_closed(made: list[Bot], day: str) -> None:
    closed = [bot for bot in made if day.lower() not in bot.values[""]]
    assert len(closed) > BOTS
    for bot in closed:
        assert bot.values[""][f"no_{day.lower()}"] == f"{day}s"
        others = [reply for name, replies in bot.replies.items() if name != day.lower() for reply in replies]
        assert not [reply for reply in others if day in reply]


def test_an_item_has_one_price_which_its_reply_names(made: list[Bot]) -> None:
    for bot in made:
        for i in range(4):
            item, price = (bot.values[f"price/{i}"][key] for key in ("item", "price"))
            amount = float(price.removeprefix("£"))
            for reply in bot.replies[f"price/{i}"]:
                assert item.lower() in reply.lower()
                assert amount in {float(found) for found in re.findall(r"[£€$](\d+(?:\.\d\d)?)", reply)}, reply


def test_no_reply_names_another_bot(tasks: Tasks, made: list[Bot]) -> None:
    names = [bot.name for bot in made]
    assert len(set(names)) == len(names)
    anyone = re.compile("|".join(map(re.escape, sorted(names, key=len, reverse=True))))
    for bot, items in zip(made, tasks.values(), strict=True):
        assert set(anyone.findall("\n".join(said(items, "bot")))) <= {bot.name}


WRONG = {
    "a before a vowel": r"\b[Aa] (?!one-|used|uni)[aeiouAEIOU]",
    "an before a consonant": r"\b[Aa]n (?!MOT|X-ray|hour)[^aeiouAEIOU]",
    "spaces": r"  | [.,;:!?]|^\s|\s$",
    "marks": r"[.,;:!?][.,;:!?]",
    "a word twice": r"\b(\w+) \1\b",
    "a lower-case beginning": r"^[a-z]|[.!?] [a-z]",
    "the grammar's signs": r"[<>{}\[\]|]|(?<!\w)@|@\d",
    "one with a plural": r"\b(?:one|an?|1) (?:minute|hour|day|week|month|year|visit|car|lesson|step|table)s\b",
    "a plural without s": r"\b(?:two|three|four|five|six|ten|\d\d) (?:minute|hour|day|week|month|year|visit)\b",
    "a price": r"[£€$](?!\d+(?:\.\d\d)?(?![\d])(?!\.\d))",
    "a time": r"\b(?:1[3-9]|2\d)(?::\d\d)? [ap]m|\b\d:\d(?!\d)|\b0:",
}


@pytest.mark.parametrize("fault", WRONG)
def test_texts_are_well_formed(found: Dialogues, fault: str) -> None:
    typed = [text for text in said(found, "user") if text != text.lower()]
    for text in (*set(said(found, "bot")), *(typed if fault not in ("a plural without s",) else ())):
        assert not re.search(WRONG[fault], text), text


def test_formal_bots_use_no_contractions_and_no_exclamation_marks(tasks: Tasks) -> None:
    for items in tasks.values():
        text = "\n".join(said(items, "bot"))
        if "Thank you for your enquiry" in text or "Please do not hesitate" in text:
            assert not re.search(r"!|\b(?:we're|it's|don't|can't|there's|you'll|we've|isn't)\b", text, re.IGNORECASE)


def test_users_do_not_repeat_themselves_and_replies_recur(tasks: Tasks) -> None:
    shares = []
    for name, items in tasks.items():
        asked = [words(text) for text in said(items, "user")]
        assert len(set(asked)) > 0.97 * len(asked)
        rng = Random(name)
        shuffled = sorted(items, key=lambda _: rng.random())
        support = set(said(shuffled[:8], "bot"))
        query = said(shuffled[8:], "bot")
        shares.append(sum(text in support for text in query) / len(query))
    assert 0.75 < sum(shares) / len(shares) < 0.85


def test_every_answer_of_the_grammar_can_be_given(made: list[Bot]) -> None:
    values = {name for bot in made for name in bot.values[""]} | {"item", "price", "thing", "greeting"}
    for file in ("common", "kinds"):
        for section in sections(file).values():
            for fact in section.facts.values():
                assert fact.questions
                assert fact.answers
                assert values >= {name for answer in fact.answers for name in needs(answer)}


def test_a_text_takes_values_first_and_wordings_then() -> None:
    rng = Random("0")
    texts = {word(fix("{a|the} <bun|loaf> is <£1-2/.5>[ now| today] .", {}, rng), rng) for _ in range(400)}
    assert texts == {
        f"{a} {thing} is {price}{when}."
        for a in ("A", "The")
        for thing in ("bun", "loaf")
        for price in ("£1", "£1.50", "£2")
        for when in ("", " now", " today")
    }
