"""The benchmark of the server: its three ways give the same replies, and its numbers are there."""

import torch

from benchmarks import serving
from benchmarks.serving import make_run, measure_http, measure_replies, percentiles, teach_all
from metakern.dialogue.run import Run


def test_replies_are_compared_before_they_are_timed(folder):
    found = measure_replies(Run.open(folder), users=3, replies=2, rounds=1)
    assert found["tokens_per_second"].keys() == {"batch", "one row", "chat"}
    assert all(len(quartiles) == 3 for quartiles in found["ratios"].values())


def test_percentiles_are_in_milliseconds():
    assert percentiles([i / 1000 for i in range(101)]) == {"p50": 50.0, "p99": 99.0}


def test_requests_are_measured_through_a_server_of_a_new_run(tmp_path, monkeypatch):
    config = serving.Config
    sizes = {"width": 8, "layers": 1, "heads": 2, "vocab_size": 300}
    monkeypatch.setattr(serving, "Config", lambda **settings: config(**settings | sizes))
    run = make_run(tmp_path / "run", torch.get_num_threads(), "gpt")
    teach_all(run, 2)
    found = measure_http(run, (2,), 1)
    assert found["batch"][2]["requests_per_second"] > 0
    assert found["one row"][2]["first_token_ms"].keys() == {"p50", "p99"}
    assert found["memory_mib"]["weights and cache, a user"] > 0
