"""The chitchat-dataset package: English conversations of two strangers under a prompt (MIT).

    {uuid: {"messages": [[{"text", "timestamp", "sender"}, … one turn], …], "prompt", "ratings", "start"}}

tasks="topics"    a task is a prompt; the bot is the second to speak
tasks="subjects"  a task is a word that people talk about (piano, pizza, physics); its dialogues are passages about it
tasks="senders"   a task is a person, who is the bot; every conversation belongs to the tasks of both its speakers

People drift from their prompt within a few turns, so a prompt says little about a conversation's later parts. For
subjects, conversations are cut into passages of whole turns and at least `PASSAGE` words. A passage's subject is the
word with the highest tf · idf (Spärck Jones 1972) among the words of at least `LETTERS` letters that occur in at least
`FEWEST`, and in at most one in `RARE` conversations; a subject needs `FEWEST_PASSAGES` conversations, each of which
gives it one passage, the one that names it most.

Left out: conversations of one speaker, of fewer than 4 turns or with an e-mail address, and topics without a prompt.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from metakern.dialogue.readers import Dialogue, Turn, dialogue, json_of, reader, text_of
from metakern.dialogue.words import words
from metakern.errors import DataError

__all__ = ["chitchat"]

EMAIL = re.compile(r"\S@\w[\w-]*\.\w")
TASKS = ("topics", "subjects", "senders")
PASSAGE, LETTERS, FEWEST, RARE, FEWEST_PASSAGES = 40, 4, 30, 16, 24


@reader(
    "chitchat",
    suffixes=(".json",),
    sniff=lambda record: (
        "messages" not in record and any(isinstance(value, dict) and "messages" in value for value in record.values())
    ),
    package="chitchat_dataset",
    data="dataset.json",
    variant="tasks",
)
def chitchat(path: Path, skipped: Counter[str], *, tasks: str = "topics") -> Iterator[Dialogue]:
    """Yield the dialogues of chitchat; see the module."""
    if tasks not in TASKS:
        raise DataError(f"chitchat: tasks must be one of {', '.join(TASKS)}, got {tasks}")
    found = _conversations(path, skipped, tasks)
    yield from _subjects(list(found)) if tasks == "subjects" else found


def _conversations(path: Path, skipped: Counter[str], tasks: str) -> Iterator[Dialogue]:
    """Whole conversations, under their prompts or for both of their speakers."""
    data = json_of(text_of(path), path)
    if not isinstance(data, dict):
        raise DataError(f"{path}: must be an object of conversations, got {type(data).__name__}")
    for key, conversation in data.items():
        try:
            messages = [m for turn in conversation["messages"] for m in turn]
            prompt = _text(conversation.get("prompt"))
            said = [(_text(m["sender"]), _text(m["text"])) for m in messages]
        except (AttributeError, KeyError, TypeError):
            skipped["without messages of sender and text"] += 1
            continue
        talk = dialogue(prompt, key, said)
        speakers = list(dict.fromkeys(turn.speaker for turn in talk.turns))
        if "" in speakers:
            skipped["without messages of sender and text"] += 1
        elif len(speakers) != 2:
            skipped["without two speakers"] += 1
        elif len(talk.turns) < 4:
            skipped["with fewer than 4 turns"] += 1
        elif any(EMAIL.search(turn.text) for turn in talk.turns):
            skipped["with an e-mail address"] += 1
        elif tasks == "senders":
            for speaker in speakers:
                yield Dialogue(speaker, key, talk.turns, {"bot": speaker, "topic": prompt})
        elif len(prompt) < 2:
            skipped["without a prompt"] += 1
        else:
            yield Dialogue(prompt, key, talk.turns, {"bot": speakers[1]})


def _text(value: Any) -> str:
    """A text or a number as text; null is none."""
    if value is not None and not isinstance(value, (str, int, float)):
        raise TypeError
    return "" if value is None else str(value).strip()


def _subjects(conversations: list[Dialogue]) -> Iterator[Dialogue]:
    """Passages under the words that they are about."""
    occurs: Counter[str] = Counter()
    for talk in conversations:
        occurs.update({word for turn in talk.turns for word in words(turn.text)})
    many = len(conversations) / RARE
    subjects = {w for w, n in occurs.items() if FEWEST <= n <= many and len(w) >= LETTERS and w.isalpha()}
    weight = {word: math.log(len(conversations) / occurs[word]) for word in subjects}
    passages = [(talk, turns, Counter(_words(turns))) for talk in conversations for turns in _passages(talk.turns)]
    for _ in range(2):  # the passages of words that turn out too rare go to the other subjects
        best: dict[str, dict[str, tuple[int, Dialogue]]] = defaultdict(dict)
        for talk, turns, count in passages:
            named = [word for word in count if word in subjects]
            if named:
                word = max(named, key=lambda w: (count[w] * weight[w], w))
                kept = best[word].get(talk.dialogue_id)
                if kept is None or count[word] > kept[0]:
                    best[word][talk.dialogue_id] = count[word], Dialogue(word, talk.dialogue_id, turns, talk.meta)
        subjects = {word for word, found in best.items() if len(found) >= FEWEST_PASSAGES}
    for word in sorted(subjects):
        for _, talk in best[word].values():
            yield talk


def _passages(turns: Iterable[Turn]) -> Iterator[tuple[Turn, ...]]:
    """Consecutive turns, at least two, of at least `PASSAGE` words; a shorter end is dropped."""
    passage: list[Turn] = []
    for turn in turns:
        passage.append(turn)
        if len(passage) >= 2 and len(_words(passage)) >= PASSAGE:
            yield tuple(passage)
            passage = []


def _words(turns: Iterable[Turn]) -> list[str]:
    return [word for turn in turns for word in words(turn.text)]
