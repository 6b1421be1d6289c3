"""A few hundred inputs of `strangers.py`, which says how to try more; and that it notices faults."""

import pytest
from strangers import Fuzzer

from metakern.dialogue import sources


@pytest.fixture(scope="module")
def fuzzer(tmp_path_factory):
    return Fuzzer(tmp_path_factory.mktemp("fuzz"))


def test_inputs_of_strangers_are_used_or_refused_by_one_line(fuzzer):
    tried = [fuzzer.fault("tests", number) for number in range(500)]
    assert not [wrong for _, wrong in tried if wrong]
    assert {kind for kind, _ in tried} == {"data", "config", "runs", "adapters"}


def test_a_fault_is_noticed(fuzzer, monkeypatch):
    monkeypatch.setattr(sources, "_damaged", lambda *_: None)
    assert any(fuzzer.fault("tests", number)[1] for number in range(60))
