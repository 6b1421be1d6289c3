"""Read EmpatheticDialogues (Rashkin et al. 2019): train.csv, valid.csv, test.csv or a folder of them.

A row is a turn. No text is quoted: a comma is written _comma_, and a bar _pipe_. Test files have a ninth column.

    conv_id,utterance_idx,context,prompt,speaker_idx,utterance,selfeval,tags
    hit:0_conv:1,1,sentimental,I remember …,1,I remember going to see the fireworks_comma_ alone.,5|5|5_2|2|5,

Rows of the package datasets have the same keys. The one who tells of a feeling speaks first; the bot is the listener.
A task is the feeling (context).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from metakern.dialogue.readers import Dialogue, Source, dialogue, files, reader, records, table

__all__ = ["empathetic"]

SUFFIXES = (".csv", ".jsonl", ".json")
KEYS = ("conv_id", "utterance_idx", "context", "utterance")


@reader(
    "empathetic",
    suffixes=SUFFIXES,
    sniff=lambda record: record.keys() >= set(KEYS),
    sniff_line=lambda line: set(line.split(",")) >= set(KEYS),
)
def empathetic(path: Source, skipped: Counter[str]) -> Iterator[Dialogue]:
    """Yield the dialogues of a file or directory; the module describes the format."""
    for file in files(path, SUFFIXES):
        by_row = isinstance(file, Path) and file.suffix.lower() == ".csv"
        rows = table(file, quoted=False) if by_row else records(file, "conv_id and utterance")
        for name, group in groupby((row for _, row in rows), lambda row: str(row.get("conv_id"))):
            turns = list(group)
            if all(_is_turn(turn) for turn in turns):
                said = [(_speaker(turn), _plain(turn["utterance"])) for turn in turns]
                yield dialogue(turns[0]["context"], name, said, {"bot": "bot"})
            else:
                skipped["without context, utterance_idx and utterance"] += 1


def _is_turn(row: Mapping[str, Any]) -> bool:
    texts = (row.get("context"), row.get("utterance"))
    return all(isinstance(text, str) for text in texts) and str(row.get("utterance_idx")).isdecimal()


def _speaker(row: Mapping[str, Any]) -> str:
    return ("bot", "user")[int(row["utterance_idx"]) % 2]


def _plain(text: str) -> str:
    return text.replace("_comma_", ",").replace("_pipe_", "|")
