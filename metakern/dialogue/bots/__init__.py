"""Service bots that a grammar makes: synthetic dialogues, on which a model that adapts has something to gain.

No person has said any of it. The texts are in `common.txt` and `kinds.txt` beside this module, and `grammar.py`
explains how they are written. There are as many kinds of business as `kinds.txt` has sections, and `BOTS` bots of each.

A bot has facts of its own (hours, prices, rules, people, the way there, what it does not offer) and a style of its own
(register, greeting, opening and closing phrases, emoji, format of times and prices). Its replies are canned, as those
of real service bots: to one question it has one reply, or two. So a model can't know the facts of a bot that it has not
seen, but some dialogues of a bot tell what most others ask for. What users say differs from dialogue to dialogue.

All draws are by `random.Random.random`, seeded with strings, so that a seed gives the same dialogues everywhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from random import Random

from metakern.dialogue.bots.grammar import Fact, Section, choose, fix, needs, sample, sections, word
from metakern.dialogue.words import words

__all__ = ["BOTS", "DIALOGUES", "Bot", "bots", "dialogues"]

BOTS, DIALOGUES = 12, 20  # bots of a kind, dialogues of a bot
REGISTERS = ("formal", "friendly", "playful", "brief")
OPENS, CLOSES = (0.6, 0.7, 0.8, 0.0), (0.6, 0.6, 0.6, 0.0)  # the share of bots of each register with such a phrase
ALWAYS = ("hours", "address", "price/0", "price/1", "price/2", "known", "wait")
OTHERS = 4  # further facts that all kinds of business have
OWN = 5  # further facts that only its kind has
NOT_ASKED_ALONE = ("price", "lacks")  # made for each item and each thing
OPEN = {name: f"<{name}>" for name in ("item", "price", "thing")}  # values that stay open
CURRENCIES = ("£", "€", "$")
LONG_FORMS = {
    "we're": "we are", "i'm": "I am", "it's": "it is", "that's": "that is", "there's": "there is", "you're": "you are",
    "they're": "they are", "who's": "who is", "someone's": "someone is", "everything's": "everything is",
    "what's": "what is", "something's": "something is", "nothing's": "nothing is", "the oven's": "the oven is",
    "we've": "we have", "i've": "I have", "we'll": "we will", "i'll": "I will", "you'll": "you will",
    "they'll": "they will", "it'll": "it will", "you'd": "you would", "we'd": "we would", "don't": "do not",
    "doesn't": "does not", "can't": "cannot", "isn't": "is not", "aren't": "are not", "won't": "will not",
    "mustn't": "must not", "needn't": "need not", "didn't": "did not", "hasn't": "has not", "haven't": "have not",
    "there'll": "there will", "couldn't": "could not",
}  # fmt: skip
CONTRACTED = re.compile(r"\b(" + "|".join(LONG_FORMS) + r")\b", re.IGNORECASE)
PRICE, CLOCK = re.compile(r"£(\d+(?:\.\d+)?)"), re.compile(r"@(\d+(?:\.\d+)?)")
SENTENCES = re.compile(r"[.?!] ")
FIRST_PERSON = ("I", "I'm", "I've", "I'd", "I'll")
BOUND = 60  # tries to draw what a user says, before it may be what a user said to the bot before


@dataclass(frozen=True)
class Bot:
    """A service bot.

    Attributes:
        kind: Its kind of business.
        name: The name of the business, which no other bot has.
        values: What `<…>` stands for in the grammar's texts: the facts that do not belong to one question.
        questions: For each fact, how it is asked for.
        after: For each fact, the questions that make sense after another one, by the name of that one.
        replies: For each fact, the one or two replies in the bot's words.
        greeting: What precedes the reply to the first question; "" for most bots.
    """

    kind: str
    name: str
    values: Mapping[str, str]
    questions: Mapping[str, list[str]]
    after: Mapping[str, Mapping[str, list[str]]]
    replies: Mapping[str, list[str]]
    greeting: str


def bots(seed: str = "0") -> Iterator[Bot]:
    """Yield all bots, kind by kind."""
    names: list[str] = []
    common = sections("common")
    for kind, section in sections("kinds").items():
        for number in range(BOTS):
            rng = Random(f"bots/{seed}/{kind}/{number}")
            name = ""
            while not name or any(name in other or other in name for other in names):
                places = {key: choose(common["style"].lists[f"{key}s"], rng) for key in ("surname", "street")}
                name = word(fix(choose(section.lists["names"], rng), places, rng), rng)
            names.append(name)
            yield _bot(kind, section, common, {"name": name, **places}, rng)


def dialogues(bot: Bot, seed: str = "0") -> Iterator[list[str]]:
    """Yield the dialogues of a bot: lists of what the user and the bot say in turn."""
    users, talk = sections("common")["users"].lists, sections("common")["talk"].facts
    said: set[tuple[str, ...]] = set()
    rng = Random(f"dialogues/{seed}/{bot.name}")
    facts = [name for name in bot.replies if name not in talk]
    weights = {name: 0.4 + rng.random() for name in facts}
    for _ in range(DIALOGUES):
        casual, turns, asked = rng.random() < 0.2, list[str](), list[str]()
        for topic in _topics(bot, facts, weights, rng):
            base = topic.split("/")[0]
            before = asked[-1].split("/")[0] if asked else ""
            follows = bot.after[topic].get(before, []) if topic in bot.after else []
            for _ in range(BOUND):
                follow = bool(follows) and rng.random() < 0.7
                text = word(fix(choose(follows if follow else bot.questions[topic], rng), _about(bot, topic), rng), rng)
                if base not in talk:
                    lead = "leads" if not turns else "links" if asked[-1] != "greeting" else ""
                    text = _framed(text, lead, users, bot, rng, follow=follow)
                text = _typed(text, casual, rng)
                if (key := words(text)) not in said:
                    break
            said.add(key)
            asked.append(topic)
            reply = choose(bot.replies[topic], rng)
            turns += [text, f"{bot.greeting} {reply}" if bot.greeting and not turns and base not in talk else reply]
        yield turns


def _bot(kind: str, section: Section, common: Mapping[str, Section], known: Mapping[str, str], rng: Random) -> Bot:
    values = _values(section, common["style"].lists, known, rng)
    dress = _Style(section, common["style"].lists, values, rng)
    facts = {**common["facts"].facts, **section.facts}
    for name in section.lists.get("without", [""])[0].split():
        facts.pop(name, None)
    optional = ("booking", "cancel", "returns", "delivery")
    also = section.lists.get("also", [""])[0].split()
    items = [item.split(" <£") for item in sample(section.lists["items"], 4, rng)]
    things = sample(section.lists["lacks"], 2, rng)
    about = {f"price/{i}": {"item": item, "price": fix(f"<£{prices}", {}, rng)} for i, (item, prices) in enumerate(items)}
    about |= {f"lacks/{i}": {"thing": thing} for i, thing in enumerate(things)}
    shared = [n for n in facts if n not in section.facts and n not in optional and n not in NOT_ASKED_ALONE] + also
    own = sample([n for n in section.facts if n not in common["facts"].facts], OWN, rng)
    more = sample([n for n in shared if n not in ALWAYS], OTHERS, rng)
    names = [*ALWAYS, "price/3", "lacks/0", *own, *more]

    replies: dict[str, list[str]] = {}
    chosen: dict[str, Fact] = {}
    patterns: dict[str, str] = {}
    for name in names:
        base = name.split("/")[0]
        chosen[name] = facts[base]
        able = [a for a in facts[base].answers if all(n in values or n in about.get(name, {}) for n in needs(a))]
        if base not in patterns or base not in NOT_ASKED_ALONE:
            patterns[base] = choose(able, rng)
            if base in NOT_ASKED_ALONE:  # one wording for all prices
                patterns[base] = word(fix(patterns[base], {**values, **OPEN}, rng), rng)
        answer = fix(patterns[base], {**values, **about.get(name, {})}, rng)
        replies[name] = [dress(word(answer, rng)) for _ in range(2 if rng.random() < 0.25 else 1)]
    for name, fact in common["talk"].facts.items():
        chosen[name] = fact
        text = choose(fact.answers, rng) if name != "greeting" else dress.hello
        replies[name] = [dress.plain(word(fix(text, values, rng), rng))]
    values = {**values, **{f"{n}:{key}": value for n, v in about.items() for key, value in v.items()}}
    questions = {name: fact.questions for name, fact in chosen.items()}
    return Bot(kind, known["name"], values, questions, {n: f.after for n, f in chosen.items()}, replies, dress.greeting)


def _values(section: Section, style: Mapping[str, list[str]], known: Mapping[str, str], rng: Random) -> dict[str, str]:
    """Return the values that the texts of a bot may need."""
    lists = section.lists

    def person() -> str:
        names = {"first": choose(style["first"], rng), "surname": choose(style["surnames"], rng)}
        return fix(choose(style["forms"], rng), names, rng)

    site = "".join(c for c in known["name"].lower().replace("&", "and") if c.isalnum() or c == " ").replace(" ", "-")
    site += choose((".example", ".shop.example", ".co.example"), rng)
    opens, closes = (f"@{choose(lists[key], rng)}" for key in ("opens", "closes"))
    early = float(opens[1:]) + choose((0, 0.5, 1), rng)
    hours = f"@{early + 1:g} to @{max(float(closes[1:]) - choose((3, 4, 5), rng), early + 3):g}"
    waited, times = choose(lists["waits"], rng).split(" = ")
    monday = rng.random() < 0.6
    values = {
        **known,
        "kind": section.lists["place"][0],
        "place": section.lists["place"][0],
        "helper": choose([*lists["helpers"], *lists["helpers"], *style["helpers"]], rng),
        "number": str(1 + int(rng.random() * 180)),
        "street": choose(style["streets"], rng),
        "landmark": choose(style["landmarks"], rng),
        "stop": choose(style["stops"], rng),
        "bus": choose(style["buses"], rng),
        "walk": choose(style["walks"], rng),
        "site": site,
        "email": f"{choose(('hello', 'info', 'post', 'team', 'ask', 'office'), rng)}@{site}",
        "phone": f"01{int(rng.random() * 900) + 100} {int(rng.random() * 900) + 100} {int(rng.random() * 900) + 100}",
        "weekdays": "Monday to Friday" if monday else "Tuesday to Friday",
        "open": opens,
        "close": closes,
        "sat_open": f"@{early:g}",
        "sat_close": f"@{max(float(closes[1:]) - choose((1, 2, 3, 4), rng), early + 3):g}",
        "year": str(1885 + int(rng.random() * 135)),
        "founder": f"{choose(style['first'], rng)} {known['surname']}",
        "person": person(),
        "role": choose(lists["roles"], rng),
        "does": lists["does"][0],
        "waited": waited,
        "time": fix(times, {}, rng),
    }
    values["speciality"] = word(fix(choose(lists["known"], rng), values, rng), rng)
    values["speciality"] = values["speciality"][0].lower() + values["speciality"][1:]
    values |= {"monday": f"{opens} to {closes}"} if monday else {"no_monday": "Mondays"}
    return values | ({"sunday": hours} if rng.random() < 0.4 else {"no_sunday": "Sundays"})


class _Style:
    """How a bot says what it has to say."""

    def __init__(self, section: Section, style: Mapping[str, list[str]], values: Mapping[str, str], rng: Random) -> None:
        self.values = values
        index = int(rng.random() * len(REGISTERS))
        self.register = REGISTERS[index]
        self.currency, self.short = choose(CURRENCIES, rng), rng.random() < 0.5
        self.cents, self.noon = rng.random() < 0.3, rng.random() < 0.5
        playful = self.register == "playful"

        def phrase(share: float, lists: list[list[str]]) -> str:
            text = fix(choose(choose(lists, rng), rng), values, rng)
            return text if rng.random() < share else ""

        own = {part: [section.lists[part]] if playful else [] for part in ("sounds", "mottos")}
        brief = self.register == "brief"
        openers = [style[f"{'friendly' if brief else self.register} openers"], *own["sounds"]]
        closers = [style[f"{'friendly' if brief else self.register} closers"], *own["mottos"]]
        if self.register == "friendly":
            closers.append(section.lists["mottos"])
        self.opener, self.closer = phrase(OPENS[index], openers), phrase(CLOSES[index], closers)
        emoji = choose([*section.lists["emoji"], *section.lists["emoji"], *style["emoji"]], rng)
        self.emoji = emoji if rng.random() < (0, 0.4, 0.8, 0.1)[index] else ""
        self.hello = choose(style[f"{self.register} greetings"], rng)
        hello = choose(("Hi!", "Hello!", f"Welcome to {values['name']}!", f"Hello from {values['helper']}!"), rng)
        self.greeting = self.plain(hello) if not self.opener and rng.random() < 0.4 else ""

    def plain(self, text: str) -> str:
        """Return a text in the bot's register, and with its formats of prices and times."""
        if self.register == "formal":
            text = CONTRACTED.sub(_long_form, text).replace("!", ".")
        return CLOCK.sub(self._clock, PRICE.sub(self._price, text))

    def __call__(self, text: str) -> str:
        """Return a reply: the text with the bot's phrases around it."""
        return " ".join(part for part in (self.opener, self.plain(text), self.closer, self.emoji) if part)

    def _price(self, found: re.Match[str]) -> str:
        amount = float(found[1])
        whole = amount == round(amount) and not self.cents
        return f"{self.currency}{amount:.0f}" if whole else f"{self.currency}{amount:.2f}"

    def _clock(self, found: re.Match[str]) -> str:
        hour, minute = int(float(found[1])), round(float(found[1]) % 1 * 60)
        if not self.short:
            return f"{hour}:{minute:02d}"
        if hour == 12 and not minute:
            return "noon" if self.noon else "12 pm"
        return f"{(hour - 1) % 12 + 1}{f':{minute:02d}' if minute else ''} {'am' if hour < 12 else 'pm'}"


def _long_form(found: re.Match[str]) -> str:
    text = LONG_FORMS[found[1].lower()]
    return text[0].upper() + text[1:] if found[1][0].isupper() else text


def _topics(bot: Bot, facts: list[str], weights: Mapping[str, float], rng: Random) -> list[str]:
    """Return what a dialogue is about, turn by turn: names of facts, and at times a greeting, a joke or thanks."""
    length = choose((2, 2, 2, 3, 3, 3, 4, 4, 5), rng)
    opening = ["greeting"] if rng.random() < 0.12 else []
    closing = ["bye"] if rng.random() < 0.25 else []
    between = [choose(("off", "off", "robot", "mood"), rng)] if length > 2 and rng.random() < 0.25 else []
    asked: list[str] = []
    while len(opening) + len(asked) + len(between) + len(closing) < max(length, len(opening) + len(closing) + 1):
        left = [name for name in facts if name not in asked]
        last = asked[-1].split("/")[0] if asked else ""
        follows = [name for name in left if last in bot.after[name]]
        if follows and rng.random() < 0.5:
            asked.append(choose(follows, rng))
        else:
            asked.append(max(left, key=lambda name: rng.random() ** (1 / weights[name])))
    where = 1 + int(rng.random() * len(asked))
    return opening + asked[:where] + between + asked[where:] + closing


def _about(bot: Bot, topic: str) -> dict[str, str]:
    """Return the values for a question about `topic`."""
    return {**bot.values, **{k: bot.values[f"{topic}:{k}"] for k in ("item", "thing") if f"{topic}:{k}" in bot.values}}


def _framed(
    text: str, leads: str, users: Mapping[str, list[str]], bot: Bot, rng: Random, *, follow: bool
) -> str:
    """Return a question with what people put before and after one; `leads` names a list of beginnings, or is empty."""
    if not follow and not SENTENCES.search(text) and rng.random() < 0.3:
        text = f"{fix(choose(users['contexts'], rng), bot.values, rng)} {text}"
    if leads and rng.random() < (0.3 if follow else 0.55):
        lead = fix(choose(users[leads], rng), bot.values, rng)
        if lead[-1] in ",:" and text.split()[0] not in FIRST_PERSON:
            text = text[0].lower() + text[1:]
        text = f"{lead} {text}"
    if not follow and rng.random() < 0.15:
        names = {"first": choose(sections("common")["style"].lists["first"], rng)}
        text = f"{text} {fix(choose(users['tails'], rng), names, rng)}"
    return text


def _typed(text: str, casual: bool, rng: Random) -> str:
    """Return a text as somebody types it: in lower case if `casual`, and at times with two letters swapped."""
    if casual:
        text = text.lower().rstrip("?.!")
    if rng.random() < 0.12:
        long = [m for m in re.finditer(r"\b[a-z]{5,}\b", text)]
        if long:
            at = choose(long, rng).start() + 1 + int(rng.random() * 3)
            text = text[:at] + text[at + 1] + text[at] + text[at + 2 :]
    return text
