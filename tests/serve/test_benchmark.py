"""The benchmark of the server: its three ways give the same replies, and its numbers are there."""

from benchmarks.serving import measure_replies, percentiles
from metakern.dialogue.run import Run


def test_replies_are_compared_before_they_are_timed(folder):
    found = measure_replies(Run.open(folder), users=3, replies=2, rounds=1)
    assert found["tokens_per_second"].keys() == {"batch", "one row", "chat"}
    assert all(len(quartiles) == 3 for quartiles in found["ratios"].values())


def test_percentiles_are_in_milliseconds():
    assert percentiles([i / 1000 for i in range(101)]) == {"p50": 50.0, "p99": 99.0}
