"""Plan the numbers of steps of a training that is to take a given time, from the measured times of its parts.

    seconds = start + validations + looks + f · (pretrain_steps · p + steps · t)

p and t are the seconds of a step of the pretraining and of the outer loop; looks give the losses in the log. The factor
f multiplies `pretrain_steps`, `steps`, `eval_every` and `log_every`, so there are as many validations and looks as
without a plan.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from metakern.dialogue import processes
from metakern.dialogue.config import Config
from metakern.errors import UserError

__all__ = ["Costs", "PhaseCosts", "planned", "seconds_of", "seconds_of_calls"]

CALLS = 100  # at most; the later half is representative, as the first ones verify, record and check programs


@dataclass(frozen=True)
class PhaseCosts:
    """The seconds that the parts of a phase of the training take.

    Attributes:
        first: What first calls take longer than later ones, all together.
        step: A step; if several numbers of inner steps take turns, the mean over them.
        validation: A validation.
        look: The losses before and after adaptation, for a line of the log.
    """

    first: float
    step: float
    validation: float
    look: float


@dataclass(frozen=True)
class Costs:
    """The seconds that a training takes.

    Attributes:
        start: All that does not depend on the numbers of steps and validations.
        train: The parts of the outer loop.
        pretrain: The parts of the pretraining, if there is one.
    """

    start: float
    train: PhaseCosts
    pretrain: PhaseCosts | None = None

    def summary(self, config: Config) -> str:
        """Return a line that says how many steps are planned, and how many of them a second takes."""
        steps = [f"{config.steps} outer steps at {1 / self.train.step:.3g} a second"]
        if self.pretrain:
            steps = [f"{config.pretrain_steps} steps of pretraining at {1 / self.pretrain.step:.3g} a second", *steps]
        return f"planned: {', '.join(steps)}"


def planned(config: Config, seconds: float, costs: Costs) -> Config:
    """Return `config` with the numbers of steps for a training of about `seconds`, rounded to two digits.

    `pretrain_steps`, `steps`, `eval_every` and `log_every` keep their ratios.

    Raises:
        UserError: If there is no time for an outer step.

    >>> train = PhaseCosts(first=0, step=0.5, validation=2, look=0.2)
    >>> pretrain = PhaseCosts(first=0, step=0.1, validation=1, look=0)
    >>> config = Config(pretrain_steps=400, steps=200, eval_every=100, log_every=20)
    >>> found = planned(config, 303, Costs(10, train, pretrain))
    >>> found.pretrain_steps, found.steps, found.eval_every, found.log_every
    (800, 400, 200, 40)
    """
    steps, every = config.steps, config.eval_every
    fixed = costs.start + (1 + math.ceil(steps / every)) * costs.train.validation
    fixed += math.ceil(steps / config.log_every) * costs.train.look
    scalable = steps * costs.train.step
    if costs.pretrain:
        fixed += (1 + math.ceil(config.pretrain_steps / every)) * costs.pretrain.validation
        scalable += config.pretrain_steps * costs.pretrain.step
    factor = (seconds - fixed) / scalable
    if factor * steps < 1:
        raise UserError(
            f"train: --time must be at least {math.ceil(fixed + scalable / steps)}s, most of it for the start, the"
            f" validations and the log, got {seconds:g}s: give more time, or set a larger eval_every and log_every"
        )
    new = _rounded(factor * steps)
    return replace(
        config,
        pretrain_steps=_rounded(factor * config.pretrain_steps) if config.pretrain_steps else 0,
        steps=new,
        eval_every=-(-new * every // steps),
        log_every=-(-new * config.log_every // steps),
    )


def seconds_of(call: Callable[[], object]) -> float:
    """Return the seconds that a call takes, in the slowest process."""
    began = time.perf_counter()
    call()
    return processes.largest(time.perf_counter() - began)


def seconds_of_calls(call: Callable[[], object], limit: float) -> tuple[float, float]:
    """Return what the first calls take longer than later ones, all together, and the mean of later ones, in seconds.

    There are a hundred calls, or fewer (at least three) once they have taken `limit` seconds. The mean is that of the
    later half, without its slowest call, in which a captured program may have been audited.
    """
    times: list[float] = []
    while len(times) < 3 or (len(times) < CALLS and sum(times) < limit):
        times.append(seconds_of(call))
    early, later = times[: -(len(times) // 2)], sorted(times[-(len(times) // 2) :])
    each = statistics.mean(later[:-1] or later)
    return max(0.0, sum(early) - each * len(early)), each


def _rounded(number: float) -> int:
    """Return a number rounded to two digits, at least 1."""
    return max(1, int(round(number, min(0, 1 - math.floor(math.log10(number))))))
