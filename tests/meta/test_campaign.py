"""A few runs of the campaign: what it would take to run them all is in `campaign.py`."""

from __future__ import annotations

import campaign
import pytest

SEEDS = range(60)


@pytest.mark.parametrize("seed", SEEDS)
def test_maml_is_exact_or_says_why(seed: int) -> None:
    found = campaign.run(seed, capture=seed % 2 == 1)
    assert not found.failures, found.failures[0]


def test_a_crash_is_a_line_and_not_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(campaign, "_work", _dies_at_one)
    outcomes = list(campaign.outcomes(range(3)))
    assert [(o.seed, [kind for kind, _ in o.failures]) for o in outcomes] == [(0, []), (1, ["crashed"]), (2, [])]


def _dies_at_one(pipe, seeds, capture) -> None:
    for seed in seeds:
        if seed == 1:
            raise SystemExit(3)
        pipe.send(campaign.Outcome(seed))
