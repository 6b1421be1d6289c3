"""A few runs of `campaign.py`, which says how to make more."""

from __future__ import annotations

import campaign
import pytest

SEEDS = range(60)


@pytest.mark.parametrize("seed", SEEDS)
def test_maml_is_exact_or_says_why(seed: int) -> None:
    found = campaign.run(seed, capture=seed % 2 == 1)
    assert not found.failures, found.failures[0]


def test_most_calls_are_computed_and_not_refused() -> None:
    """A MAML that refused everything would pass the runs above."""
    found = [campaign.run(seed) for seed in range(10)]
    assert sum(len(outcome.batchings) for outcome in found) > sum(outcome.calls for outcome in found) / 2


def test_a_process_that_dies_is_reported_and_started_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(campaign, "_work", _dies_at_one)
    outcomes = list(campaign.outcomes(range(3)))
    assert [(o.seed, [kind for kind, _ in o.failures]) for o in outcomes] == [(0, []), (1, ["crashed"]), (2, [])]


def _dies_at_one(pipe, seeds, capture) -> None:
    for seed in seeds:
        if seed == 1:
            raise SystemExit(3)
        pipe.send(campaign.Outcome(seed))
