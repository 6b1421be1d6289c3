"""Slots: values that were taught, and new ones where taught ones stood."""

import json
import random

import pytest

from benchmarks import results, slots
from metakern.dialogue.manager.slots import FEATURES, MOST, THRESHOLD, WEIGHTS, SlotFinder, alike, spans_of
from metakern.dialogue.readers import Turn


def said(text: str, **values: str) -> Turn:
    return Turn("user", text, slots=tuple(values.items()))


TAUGHT = (
    said("I need a bus from Fresno to San Diego", start="Fresno", end="San Diego"),
    said("Leaving at 9:15 am for two people.", time="9:15 am", people="two"),
    said("what is there?"),
)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a bus from Oakland to Los Angeles", {"start": "Oakland", "end": "Los Angeles"}),
        ("Leaving at 7:45 am, for two people", {"time": "7:45 am", "people": "two"}),
        ("we are two", {"people": "two"}),
        ("SAN DIEGO!", {"end": "San Diego"}),
        ("nothing of this kind", {}),
        ("", {}),
        ("?", {}),
        ("two " * 5000, {"people": "two"}),
    ],
)
def test_known_and_new_values_are_found(text, found):
    assert SlotFinder(TAUGHT)(text) == found


def test_values_that_stand_nowhere_and_messages_without_any_teach_nothing():
    strange = said("to Boston", city="Chicago", part="osto", sign="?", both="to Boston", inner="Boston")
    assert [name for name, _, _ in SlotFinder([strange]).taught] == ["both"]
    assert SlotFinder([])("from Fresno") == SlotFinder([TAUGHT[2]])("from Fresno") == {}


def test_a_value_of_an_ideographic_script_is_found_between_characters():
    finder = SlotFinder([said("我想去北京旅行", city="北京")])
    assert finder("你去北京吗") == {"city": "北京"}
    assert finder("我想去上海旅行") == {"city": "上海"}


def test_spans_are_compared_in_each_feature():
    assert len(FEATURES) == len(WEIGHTS)
    spans = {text[s.begin : s.end]: s for text in ["at 9 in Paris"] for s in spans_of(text, 2)}
    assert spans.keys() == {"at", "9", "in", "Paris", "at 9", "9 in", "in Paris"}
    assert alike(spans["at"], spans["at"]) == (1,) * len(FEATURES)
    assert alike(spans["at"], spans["in"]) == (0, 0, 0, 0, 1, 0)
    assert alike(spans["at 9"], spans["9"]) == (0, 1, 0, 1, 0, 0.5)
    assert len(spans_of("a " * 10000, 1)) == MOST


def test_the_weights_are_those_that_were_measured():
    entry = results.load(results.FOLDER / "slots.json")["0"]
    assert entry["weights"] == dict(zip(FEATURES, WEIGHTS, strict=True))
    assert entry["threshold"] == THRESHOLD


def test_the_benchmark_fits_weights_that_find_more_than_known_values(tmp_path, monkeypatch, capsys):
    draw, found = random.Random(0), []
    names = [a + b + c for a in "BDFG" for b in "aeiou" for c in "lmnr"]
    for service in ("Air_1", "Bus_1", "Car_1", "Dog_1"):
        for i in range(30):
            value = draw.choice(names)
            text = f"{draw.choice(('please', 'now', 'well'))} go to {value} with {draw.choice(('me', 'us'))}"
            slot = {"slot": "place", "start": text.index(value), "exclusive_end": text.index(value) + len(value)}
            frame = {"slots": [slot], "actions": []}
            turns = [{"speaker": "USER", "utterance": text, "frames": [frame]}]
            turns.append({"speaker": "SYSTEM", "utterance": "yes", "frames": [{"slots": [], "actions": []}]})
            found.append({"dialogue_id": f"{service}{i}", "services": [service], "turns": turns})
    (tmp_path / "dialogues_001.json").write_text(json.dumps(found))
    monkeypatch.setattr(results, "FOLDER", tmp_path)
    monkeypatch.setattr(slots.slots, "WEIGHTS", WEIGHTS)
    monkeypatch.setattr(slots.slots, "THRESHOLD", THRESHOLD)
    slots.main(["--data", str(tmp_path)])
    entry = results.load(tmp_path / "slots.json")["0"]
    assert len(entry["train"]) == 3
    assert len(entry["test"]) == 1
    near, known = (entry["scores"][name]["4"]["f1"] for name in ("nearest contexts", "known values"))
    assert near > 0.95
    assert known < 0.5
    assert "nearest contexts" in capsys.readouterr().out
