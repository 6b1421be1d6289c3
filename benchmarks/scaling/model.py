"""A cost model of an outer step over N processes, and a simulation of steps whose tasks differ in length.

    compute  = max_r sum of the FLOP of the tasks of process r / flop
    exchange = 2 (N - 1) / N · bytes / bandwidth + 2 (N - 1) · latency
    step     = compute + exchange + update        update = 28 P_l / memory

A task of n tokens in its support and n in its query takes (9 K + 3) forward passes of 2 P n FLOP each, by the table in
docs/mathematics.md. The exchange is a ring all-reduce of the gradients, 4 bytes of each of the P_l parameters that are
learned (Patarasuk, Yuan 2009, "Bandwidth optimal all-reduce algorithms for clusters of workstations"). The update of
AdamW reads a gradient, and reads and writes a parameter and two moments: 28 bytes. It is not shared, unless parameters
are sharded.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

SPREAD = 0.25  # standard deviation of the logarithm of a task's length


@dataclass(frozen=True)
class Machine:
    """What one process has: FLOP and bytes of memory a second, bytes a second to its neighbor, seconds of latency."""

    flop: float
    memory: float
    bandwidth: float
    latency: float


@dataclass(frozen=True)
class Work:
    """An outer step: P parameters, `learned` of them in the gradient, `tasks` of `tokens` a side, K inner steps."""

    parameters: float
    tasks: int
    tokens: int
    inner_steps: int
    learned: float | None = None

    @property
    def flop(self) -> float:
        """The FLOP of a task of average length."""
        return (9 * self.inner_steps + 3) * 2 * self.parameters * self.tokens

    @property
    def exchanged(self) -> float:
        """The bytes of the gradients."""
        return 4 * (self.parameters if self.learned is None else self.learned)


def shares(tasks: int, processes: int) -> list[range]:
    """Return the tasks of each process, as `metakern.dialogue.processes.share` divides them.

    >>> shares(7, 2)
    [range(0, 3), range(3, 7)]
    """
    return [range(r * tasks // processes, (r + 1) * tasks // processes) for r in range(processes)]


def exchange(work: Work, machine: Machine, processes: int) -> float:
    """Return the seconds of the all-reduce."""
    hops = 2 * (processes - 1)
    return hops / processes * work.exchanged / machine.bandwidth + hops * machine.latency


def step(work: Work, machine: Machine, processes: int, lengths: list[float] | None = None) -> float:
    """Return the seconds of a step; `lengths` are those of the tasks, as multiples of the average.

    >>> one, two = (step(Work(1e8, 8, 512, 3), Machine(1e14, 1e12, 1e10, 1e-5), n) for n in (1, 2))
    >>> round(one / two, 2)
    1.5
    """
    lengths = lengths or [1.0] * work.tasks
    longest = max(sum(lengths[i] for i in share) for share in shares(work.tasks, processes))
    update = 7 * work.exchanged / machine.memory
    return longest * work.flop / machine.flop + exchange(work, machine, processes) + update


def simulate(work: Work, machine: Machine, processes: int, steps: int = 200) -> float:
    """Return the speedup over one process, the ratio of the times of `steps` steps with tasks of random lengths.

    >>> 6 < simulate(Work(1e8, 64, 4096, 5), Machine(1e14, 1e12, 1e11, 1e-5), 8) < 8
    True
    """
    draw = random.Random(f"{work}/{processes}")
    alone = together = 0.0
    for _ in range(steps):
        lengths = [math.exp(draw.gauss(-(SPREAD**2) / 2, SPREAD)) for _ in range(work.tasks)]
        alone += step(work, machine, 1, lengths)
        together += step(work, machine, processes, lengths)
    return alone / together


def tasks_needed(work: Work, machine: Machine, processes: int, part: float = 0.1) -> int:
    """Return how many tasks a process needs, so that the exchange takes at most `part` of the time of its tasks.

    >>> tasks_needed(Work(1e9, 1, 2048, 3), Machine(4e14, 3e12, 5e10, 1e-5), 16)
    5
    """
    return math.ceil(exchange(work, machine, processes) / (part * work.flop / machine.flop))
