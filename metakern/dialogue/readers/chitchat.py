"""Read the package chitchat-dataset: English conversations of two strangers about a prompt (MIT).

    {uuid: {"messages": [[{"text", "timestamp", "sender"}, … one turn], …], "prompt", "ratings", "start"}}

The option `tasks` says what a task is:

    "topics"    a prompt; the bot is the second to speak
    "subjects"  a word that people talk about (piano, pizza, physics); its dialogues are passages about it
    "senders"   a person, who is the bot; each conversation belongs to the tasks of both its speakers

People drift from their prompt within a few turns, so a prompt says little about the later parts of a conversation. For
subjects, conversations are cut into passages of whole turns, which have at least `PASSAGE` words. A word can be a
subject if it has at least `LETTERS` letters and occurs in at least `FEWEST` conversations, but in at most one in
`RARE`. The subject of a passage is the one of its words with the highest tf · idf (Spärck Jones 1972). From each
conversation, a subject takes the passage that names it most. A subject with passages from fewer than `FEWEST_PASSAGES`
conversations is dropped.

Conversations are left out if they do not have two speakers and at least 4 turns, or if they have an e-mail address;
for topics and subjects, also if they have no prompt.
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


def _is_conversation(value: Any) -> bool:
    """Return whether a value has messages in turns, which are lists; in CrossWOZ, they are objects."""
    messages = value.get("messages") if isinstance(value, dict) else None
    return isinstance(messages, list) and all(isinstance(turn, list) for turn in messages)


@reader(
    "chitchat",
    suffixes=(".json",),
    sniff=lambda record: "messages" not in record and any(map(_is_conversation, record.values())),
    package="chitchat_dataset",
    data="dataset.json",
    variant="tasks",
)
def chitchat(path: Path, skipped: Counter[str], *, tasks: str = "topics") -> Iterator[Dialogue]:
    """Yield the dialogues of a file; `tasks` is "topics", "subjects" or "senders", as the module explains."""
    if tasks not in TASKS:
        raise DataError(f"chitchat: tasks must be one of {', '.join(TASKS)}, got {tasks}")
    found = _conversations(path, skipped, tasks)
    yield from _subjects(list(found)) if tasks == "subjects" else found


def _conversations(path: Path, skipped: Counter[str], tasks: str) -> Iterator[Dialogue]:
    """Yield whole conversations; the task is the prompt or, for "senders", each of the two speakers in turn."""
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
    """Return a text or a number as text, and null as an empty text; raise TypeError for anything else."""
    if value is not None and not isinstance(value, (str, int, float)):
        raise TypeError
    return "" if value is None else str(value).strip()


def _subjects(conversations: list[Dialogue]) -> Iterator[Dialogue]:
    """Yield passages; the task of a passage is its subject, as the module defines it."""
    occurs: Counter[str] = Counter()
    for talk in conversations:
        occurs.update({word for turn in talk.turns for word in words(turn.text)})
    many = len(conversations) / RARE
    subjects = {w for w, n in occurs.items() if FEWEST <= n <= many and len(w) >= LETTERS and w.isalpha()}
    weight = {word: math.log(len(conversations) / occurs[word]) for word in subjects}
    passages = [(talk, turns, Counter(_words(turns))) for talk in conversations for turns in _passages(talk.turns)]
    for _ in range(2):  # in the second round, passages of the subjects that were dropped go to others
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
    """Yield runs of at least two turns with at least `PASSAGE` words in all; a shorter rest is dropped."""
    passage: list[Turn] = []
    for turn in turns:
        passage.append(turn)
        if len(passage) >= 2 and len(_words(passage)) >= PASSAGE:
            yield tuple(passage)
            passage = []


def _words(turns: Iterable[Turn]) -> list[str]:
    return [word for turn in turns for word in words(turn.text)]
