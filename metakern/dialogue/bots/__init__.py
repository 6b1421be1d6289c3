"""Service bots that a grammar makes: synthetic dialogues, on which a model that adapts has something to gain.

No person has said any of it. The texts are in `common.txt` and `kinds.txt` beside this module, and `grammar.py`
explains how they are written. There are as many kinds of business as `kinds.txt` has sections, and `BOTS` bots of each.

A bot has facts of its own (hours, prices, rules, people, the way there, what it does not offer) and a style of its own
(`style.py`). Its replies are canned, as those of real service bots: to one question it has one reply, or two. So a
model can't know the facts of a bot that it has not seen, but some dialogues of a bot tell what most others ask for.
What users say differs from dialogue to dialogue.

All draws are by `random.Random.random`, seeded with strings, so that a seed gives the same dialogues everywhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from random import Random

from metakern.dialogue.bots.grammar import Fact, Section, can_be_given, choose, fix, sample, sections, word
from metakern.dialogue.bots.style import Style
from metakern.dialogue.words import words

__all__ = ["BOTS", "DIALOGUES", "Bot", "bots", "dialogues"]

BOTS, DIALOGUES = 12, 20  # bots of a kind, dialogues of a bot

# What a bot is asked for: these facts, some that only its kind of business has, and some of those that all kinds have.
ALWAYS = ("hours", "address", "known", "wait", "price/0", "price/1", "price/2", "price/3", "lacks/0")
OWN, SHARED = 5, 4
OPTIONAL = ("booking", "cancel", "returns", "delivery")  # shared by the kinds that have them in their list `also`
NUMBERED = ("price", "lacks")  # facts that a bot has several of, and words in one way
ABOUT = ("item", "price", "thing")  # the values that these differ in

LENGTHS = (2, 2, 2, 3, 3, 3, 4, 4, 5)  # user turns of a dialogue
TRIES = 60  # draws of what a user says, before it may be what the bot has heard before
SECOND = 0.25  # the share of facts with a second wording
CAPITALS = ("I", "I'm", "I've", "I'd", "I'll", "Monday", "Sunday")  # words that keep their capital letter
SENTENCES, LONG_WORD = re.compile(r"[.?!] "), re.compile(r"\b[a-z]{5,}\b")


@dataclass(frozen=True)
class Bot:
    """A service bot.

    Attributes:
        kind: Its kind of business.
        name: The name of its business, which no other bot has.
        values: What `<…>` stands for in the grammar's texts, by the name of the fact ("" for all facts).
        facts: What it can be asked for, by name; "price/0" is the price of its first item.
        replies: For each fact, the one or two replies in the bot's words.
        greeting: What it says before its first reply; "" for most bots.
    """

    kind: str
    name: str
    values: Mapping[str, Mapping[str, str]]
    facts: Mapping[str, Fact]
    replies: Mapping[str, list[str]]
    greeting: str


def bots(seed: int = 0) -> Iterator[Bot]:
    """Yield all bots, kind by kind."""
    style = sections("common")["style"].lists
    taken: list[str] = []
    for kind, section in sections("kinds").items():
        for number in range(BOTS):
            rng = Random(f"bots/{seed}/{kind}/{number}")
            name = ""
            while not name or any(name in other or other in name for other in taken):
                known = {"surname": choose(style["surnames"], rng), "street": choose(style["streets"], rng)}
                name = word(fix(choose(section.lists["names"], rng), known, rng), rng)
            taken.append(name)
            yield _bot(kind, section, _values(section.lists, {"name": name, **known}, rng), rng)


def dialogues(bot: Bot, seed: int = 0) -> Iterator[list[str]]:
    """Yield the dialogues of a bot: lists of what the user and the bot say in turn."""
    talk = sections("common")["talk"].facts
    rng = Random(f"dialogues/{seed}/{bot.name}")
    weights = {name: 0.4 + rng.random() for name in bot.facts if name not in talk}
    heard: set[tuple[str, ...]] = set()
    for _ in range(DIALOGUES):
        turns: list[str] = []
        casual, before = rng.random() < 0.2, ""
        for name in _topics(bot, weights, rng):
            for _ in range(TRIES):
                text = _typed(_question(bot, name, before, rng), casual, rng)
                if words(text) not in heard:
                    break
            heard.add(words(text))
            reply = choose(bot.replies[name], rng)
            turns += [text, reply if turns or name in talk or not bot.greeting else f"{bot.greeting} {reply}"]
            before = name
        yield turns


def _values(lists: Mapping[str, list[str]], known: Mapping[str, str], rng: Random) -> dict[str, str]:
    """Return the values of a bot that its texts may need; times are hours after an "@", which the style writes out."""
    style = sections("common")["style"].lists
    opens, closes = (float(choose(lists[key], rng)) for key in ("opens", "closes"))
    late, early = opens + choose((0, 0.5, 1), rng), closes - choose((1, 2, 3, 4), rng)
    waited, time = choose(lists["waits"], rng).split(" = ")
    daily = lists.get("without", [""])[0].split()  # a kind of business that is not asked about a day is open then
    monday, sunday = rng.random() < 0.6 or "monday" in daily, rng.random() < 0.4 or "sunday" in daily
    names = {key: choose(style[key], rng) for key in ("first", "surnames")}
    letters = "".join(c for c in known["name"].lower() if c.isalnum() or c in " -")
    site = f"{letters.replace(' ', '-')}.{choose(('', 'shop.', 'co.'), rng)}example"
    values = {
        **known,
        **{key: choose(style[f"{key}s"], rng) for key in ("landmark", "stop", "walk")},
        "place": lists["place"][0],
        "does": lists["does"][0],
        "helper": choose(choose((lists["helpers"], lists["helpers"], style["helpers"]), rng), rng),
        "bus": choose(style["buses"], rng),
        "number": str(1 + int(rng.random() * 180)),
        "site": site,
        "email": f"{choose(('hello', 'info', 'post', 'team', 'ask', 'office'), rng)}@{site}",
        "phone": "01{} {} {}".format(*(100 + int(rng.random() * 900) for _ in range(3))),
        "weekdays": "Monday to Friday" if monday else "Tuesday to Friday",
        "open": f"@{opens:g}",
        "close": f"@{closes:g}",
        "sat_open": f"@{late:g}",
        "sat_close": f"@{max(early, late + 2):g}",
        "year": str(1885 + int(rng.random() * 135)),
        "founder": f"{choose(style['first'], rng)} {known['surname']}",
        "person": fix(choose(style["forms"], rng), {"first": names["first"], "surname": names["surnames"]}, rng),
        "role": choose(lists["roles"], rng),
        "waited": waited,
        "time": fix(time, {}, rng),
        **({"monday": f"@{opens:g} to @{closes:g}"} if monday else {"no_monday": "Mondays"}),
        **({"sunday": f"@{late + 1:g} to @{max(early, late + 4):g}"} if sunday else {"no_sunday": "Sundays"}),
    }
    speciality = word(fix(choose(lists["known"], rng), values, rng), rng)
    return {**values, "speciality": speciality[0].lower() + speciality[1:]}


def _bot(kind: str, section: Section, values: dict[str, str], rng: Random) -> Bot:
    """Return a bot with these values: what it can be asked for, and its replies."""
    common = sections("common")
    style = Style(section.lists, values, rng)
    shared, lists = common["facts"].facts, section.lists
    left_out = {*lists.get("without", [""])[0].split(), *OPTIONAL} - {*lists.get("also", [""])[0].split()}
    own = [name for name in section.facts if name not in shared]
    others = [name for name in shared if name not in (*left_out, *ALWAYS, *NUMBERED)]
    names = [*ALWAYS, *sample(own, OWN, rng), *sample(others, SHARED, rng)]

    about = {"": values}
    for i, item in enumerate(sample(lists["items"], 4, rng)):
        item, price = item.split(" <")
        about[f"price/{i}"] = {"item": item, "price": fix(f"<{price}", {}, rng)}
    about["lacks/0"] = {"thing": choose(lists["lacks"], rng)}

    closed = [day for day in ("Sunday", "Monday") if day.lower() not in values]
    open_values = {**values, **{name: f"<{name}>" for name in ABOUT}}
    facts = {name: (shared | section.facts)[name.split("/")[0]] for name in names}
    answers: dict[str, str] = {}
    replies: dict[str, list[str]] = {}
    for name, fact in facts.items():
        base = name.split("/")[0]
        if base not in answers:
            able = [text for text in fact.answers if can_be_given(text, open_values, closed)]
            answers[base] = fix(choose(able, rng), open_values, rng, closed)
            if base in NUMBERED:  # the wording is chosen once, and all but the item or the thing stays the same
                answers[base] = word(answers[base], rng)
        answer = fix(answers[base], about.get(name, {}), rng)
        replies[name] = [style(word(answer, rng)) for _ in range(1 + (rng.random() < SECOND))]
    for name, fact in common["talk"].facts.items():
        answer = style.hello if name == "greeting" else choose(fact.answers, rng)
        facts[name], replies[name] = fact, [style.plain(word(fix(answer, values, rng), rng))]
    return Bot(kind, values["name"], about, facts, replies, style.greeting)


def _topics(bot: Bot, weights: Mapping[str, float], rng: Random) -> list[str]:
    """Return what a dialogue is about, turn by turn: facts, and at times a greeting, small talk or thanks."""
    length = choose(LENGTHS, rng)
    opening = ["greeting"] if rng.random() < 0.12 else []
    closing = ["bye"] if rng.random() < 0.25 else []
    between = [choose(("off", "off", "robot", "mood"), rng)] if length > 2 and rng.random() < 0.25 else []
    asked: list[str] = []
    for _ in range(max(1, length - len(opening + closing + between))):
        left = [name for name in weights if name not in asked]
        follows = [name for name in left if asked and asked[-1].split("/")[0] in bot.facts[name].after]
        if follows and rng.random() < 0.5:
            asked.append(choose(follows, rng))
        else:
            asked.append(max(left, key=lambda name: weights[name] * rng.random()))
    at = 1 + int(rng.random() * len(asked))
    return opening + asked[:at] + between + asked[at:] + closing


def _question(bot: Bot, name: str, before: str, rng: Random) -> str:
    """Return what a user says to ask for the fact `name`, after the answer about the fact `before` ("" at first)."""
    common, fact = sections("common"), bot.facts[name]
    users, values = common["users"].lists, {**bot.values[""], **bot.values.get(name, {})}

    def said(text: str) -> str:
        return word(fix(text, {"first": choose(common["style"].lists["first"], rng), **values}, rng), rng)

    follows = fact.after.get(before.split("/")[0], [])
    if follows and rng.random() < 0.7:
        text, full = said(choose(follows, rng)), False
    else:
        text, full = said(choose(fact.questions, rng)), True
    if name in common["talk"].facts:
        return text
    if full and not SENTENCES.search(text) and rng.random() < (0.15 if before else 0.4):
        text = f"{said(choose(users['contexts'], rng))} {text}"
    if before != "greeting" and rng.random() < (0.55 if full else 0.3):
        leads = users["links" if before else "leads"]
        lead = said(choose([lead for lead in leads if full or lead[-1] in ".!"], rng))
        if lead[-1] in ",:" and text.split()[0] not in CAPITALS:
            text = text[0].lower() + text[1:]
        text = f"{lead} {text}"
    return f"{text} {said(choose(users['tails'], rng))}" if full and rng.random() < 0.15 else text


def _typed(text: str, casual: bool, rng: Random) -> str:
    """Return a text as somebody types it: in lower case if `casual`, and at times with two letters swapped."""
    if casual:
        text = text.lower().rstrip("?.!")
    long = [found.start() for found in LONG_WORD.finditer(text)]
    if long and rng.random() < 0.12:
        at = choose(long, rng) + 1 + int(rng.random() * 3)
        text = text[:at] + text[at + 1] + text[at] + text[at + 2 :]
    return text
