"""Plans for a given time: the arithmetic, and times of calls of which the first are slower."""

import pytest

from metakern.dialogue.config import Config
from metakern.dialogue.planning import Costs, PhaseCosts, planned, seconds_of_calls
from metakern.errors import UserError

CONFIG = Config(pretrain_steps=400, steps=350, eval_every=175, log_every=25)
COSTS = Costs(
    start=20.0,
    train=PhaseCosts(first=9.0, step=0.6, validation=4.0, look=0.5),
    pretrain=PhaseCosts(first=9.0, step=0.2, validation=2.0, look=9.0),
)
FIXED = 20.0 + 3 * 4.0 + 14 * 0.5 + 4 * 2.0


def seconds_of_plan(config):
    return FIXED + 0.2 * config.pretrain_steps + 0.6 * config.steps


def test_the_config_itself_is_the_plan_for_its_own_time():
    assert planned(CONFIG, seconds_of_plan(CONFIG), COSTS) == CONFIG


@pytest.mark.parametrize("seconds", [50.0, 100.0, 600.0, 7200.0, 1e6])
def test_numbers_of_steps_keep_their_ratios(seconds):
    found = planned(CONFIG, seconds, COSTS)
    assert seconds_of_plan(found) == pytest.approx(seconds, rel=0.05)
    assert found.pretrain_steps / found.steps == pytest.approx(400 / 350, rel=0.2 if found.steps < 10 else 0.1)
    assert (found.eval_every, found.log_every) == (-(-found.steps // 2), -(-found.steps // 14))
    for number in (found.pretrain_steps, found.steps):
        assert number == float(f"{number:.1e}")


def test_a_time_too_short_for_a_step_is_one_line_with_a_time_that_is_enough():
    message = (
        "train: --time must be at least 48s, .*, got 47s: give more time, or set a larger eval_every and log_every"
    )
    with pytest.raises(UserError, match=message):
        planned(CONFIG, 47.0, COSTS)
    found = planned(CONFIG, 48.0, COSTS)
    assert (found.pretrain_steps, found.steps, found.eval_every, found.log_every) == (1, 1, 1, 1)


def test_without_pretraining_there_is_none_in_the_plan():
    config = Config(pretrain_steps=0, steps=350, eval_every=175, log_every=25)
    costs = Costs(COSTS.start, COSTS.train)
    found = planned(config, 20 + 3 * 4 + 14 * 0.5 + 700 * 0.6, costs)
    assert (found.pretrain_steps, found.steps) == (0, 700)
    assert costs.summary(found) == "planned: 700 outer steps at 1.67 a second"


@pytest.mark.parametrize(
    ("durations", "limit", "calls", "first", "each"),
    [
        ([9.0, 5.0, *[1.0] * 200], 1e9, 100, 8.0 + 4.0, 1.0),
        ([9.0, 5.0, *[1.0] * 57, 4.0, *[1.0] * 200], 1e9, 100, 8.0 + 4.0, 1.0),  # an audit among the later calls
        ([9.0, 5.0, 1.0, 1.0, 4.0, 1.0], 16.0, 4, 12.0, 1.0),
        ([9.0, 5.0, 1.0, 1.0], 0.0, 3, 8.0 + 4.0, 1.0),
        ([1.0, 1.0, 2.0, 2.0], 0.0, 3, 0.0, 2.0),
    ],
)
def test_the_first_calls_are_apart(monkeypatch, durations, limit, calls, first, each):
    now, done = [0.0], []

    def call():
        now[0] += durations[len(done)]
        done.append(now[0])

    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    assert seconds_of_calls(call, limit) == (pytest.approx(first), pytest.approx(each))
    assert len(done) == calls
