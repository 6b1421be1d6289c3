"""The cost model of several processes: its shares, its limits, and the picture of its results."""

import doctest
from dataclasses import replace

import pytest

from benchmarks import pictures, results
from benchmarks.scaling import model
from benchmarks.scaling.model import Machine, Work, exchange, shares, simulate, step, tasks_needed
from metakern.dialogue import processes

MACHINE = Machine(flop=1e14, memory=1e12, bandwidth=1e10, latency=1e-5)
WORK = Work(parameters=1e8, tasks=12, tokens=1024, inner_steps=3)


def test_examples_of_the_model():
    assert doctest.testmod(model).failed == 0


def test_shares_are_those_of_the_trainer(monkeypatch):
    for count, tasks in ((1, 7), (2, 7), (3, 16)):
        monkeypatch.setattr(processes, "size", lambda count=count: count)
        for rank, share in enumerate(shares(tasks, count)):
            monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
            assert list(range(tasks))[processes.share(tasks)] == list(share)


def test_one_process_has_no_exchange_and_a_free_one_leaves_the_slowest_share():
    assert exchange(WORK, MACHINE, 1) == 0
    free = replace(MACHINE, bandwidth=1e30, latency=0.0, memory=1e30)
    assert step(WORK, free, 1) / step(WORK, free, 5) == pytest.approx(12 / 3)
    assert simulate(WORK, free, 12) < simulate(replace(WORK, tasks=1200), free, 12) < 12


def test_the_exchange_takes_the_same_part_of_large_and_small_models():
    free = replace(MACHINE, latency=0.0)
    needed = [tasks_needed(replace(WORK, parameters=p), free, 8) for p in (1e6, 1e9)]
    assert needed[0] == needed[1] > 1
    assert tasks_needed(replace(WORK, learned=1e5), free, 8) == 1


def test_results_are_drawn(tmp_path, monkeypatch):
    found = results.load(results.FOLDER / "scaling.json")["simulate"]
    monkeypatch.setattr(pictures, "FOLDER", tmp_path)
    pictures.draw_scaling(found)
    for theme in pictures.THEMES:
        drawn, kept = (folder / f"scaling-{theme}.svg" for folder in (tmp_path, results.FOLDER))
        assert drawn.read_text() == kept.read_text()
