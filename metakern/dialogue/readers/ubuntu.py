"""Read the Ubuntu Dialogue Corpus (Lowe et al. 2015): its ranking files or its chats.

Ranking, train.csv, valid.csv and test.csv of version 2: __eou__ ends an utterance and __eot__ a turn. The bot gives the
reply, which is the second column. Training rows with the label 0, whose reply is drawn at random, are left out. There
are no topics: the task is the name of the file without its suffix.

    Context,Utterance,Label
    anyone knows why ? __eou__ __eot__ which version ? __eou__ __eot__,the latest __eou__,1

Chats, dialogs/<number>/<number>.tsv: a message on each line, with its time, its sender, its addressee and its text. The
bot is the second to speak, who helps the first. A task is one helper.

    2004-11-23T11:49:00.000Z␉ann␉␉anyone knows why ?
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from metakern.dialogue.readers import Dialogue, Source, alternating, dialogue, files, reader, records, table, text_of
from metakern.errors import DataError

__all__ = ["ubuntu"]

SUFFIXES = (".csv", ".tsv", ".jsonl", ".json")
REPLIES = ("Utterance", "Ground Truth Utterance")
MESSAGE = re.compile(r"\d{4}-\d\d-\d\dT[^\t]*\t[^\t]+\t[^\t]*\t")


def _is_ranking(columns: Mapping[str, Any]) -> bool:
    return "Context" in columns and any(reply in columns for reply in REPLIES)


@reader(
    "ubuntu",
    suffixes=SUFFIXES,
    sniff=_is_ranking,
    sniff_line=lambda line: MESSAGE.match(line) is not None or _is_ranking(dict.fromkeys(line.split(","))),
)
def ubuntu(path: Source, skipped: Counter[str]) -> Iterator[Dialogue]:
    """Yield the dialogues of a file or directory; the module describes the formats."""
    for file in files(path, SUFFIXES):
        suffix = file.suffix.lower() if isinstance(file, Path) else ""
        if suffix == ".tsv":
            yield _chat(file)
            continue
        for number, row in table(file) if suffix == ".csv" else records(file, "Context and Utterance"):
            texts = [row[key] for key in ("Context", *REPLIES) if isinstance(row.get(key), str)]
            if len(texts) != 2:
                skipped["without context and utterance"] += 1
            elif str(row.get("Label", 1)) not in ("1", "1.0"):
                skipped["with a reply drawn at random"] += 1
            else:
                turns = [text.replace("__eou__", "\n") for side in texts for text in side.split("__eot__")]
                turns = ["\n".join(filter(None, map(str.strip, text.split("\n")))) for text in turns]
                said = [text for text in turns if text]
                pairs = alternating(said, first=("user", "bot")[len(said) % 2])
                yield dialogue(file.stem, f"{file.stem}:{number}", pairs, {"bot": "bot"})


def _chat(file: Path) -> Dialogue:
    turns = []
    for number, line in enumerate(text_of(file).split("\n"), 1):
        if not line.strip():
            continue
        fields = line.rstrip("\r").split("\t", 3)
        if len(fields) < 4 or not fields[1]:
            raise DataError(f"{file}:{number}: must have a time, a sender, an addressee and a text, got {line[:20]!r}")
        turns.append((fields[1], fields[3]))
    speakers = list(dict.fromkeys(who for who, text in turns if text.strip()))
    helper = speakers[1] if len(speakers) > 1 else ""
    return dialogue(helper, f"{file.parent.name}/{file.stem}", turns, {"bot": helper})
