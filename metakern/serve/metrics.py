"""Counters, gauges and histograms in the text format of Prometheus."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping

__all__ = ["Histogram", "Requests", "exposition"]

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class Histogram:
    """The distribution of durations, in seconds."""

    def __init__(self) -> None:
        self._counts, self._sum, self._lock = [0] * (len(SECONDS) + 1), 0.0, threading.Lock()

    def observe(self, seconds: float) -> None:
        with self._lock:
            self._counts[bisect_left(SECONDS, seconds)] += 1
            self._sum += seconds

    def lines(self, name: str) -> list[str]:
        """Return the samples of the metric `name`.

        >>> histogram = Histogram()
        >>> histogram.observe(0.02)
        >>> histogram.lines("x")[1:4]
        ['x_bucket{le="0.01"} 0', 'x_bucket{le="0.025"} 1', 'x_bucket{le="0.05"} 1']
        """
        with self._lock:
            totals = [sum(self._counts[: i + 1]) for i in range(len(self._counts))]
            buckets = zip([*map(str, SECONDS), "+Inf"], totals, strict=True)
            samples = [f'{name}_bucket{{le="{bound}"}} {total}' for bound, total in buckets]
            return [*samples, f"{name}_sum {self._sum}", f"{name}_count {totals[-1]}"]


class Requests:
    """The number of requests by route and status."""

    def __init__(self) -> None:
        self._counts, self._lock = Counter[tuple[str, int]](), threading.Lock()

    def count(self, route: str, status: int) -> None:
        with self._lock:
            self._counts[route, status] += 1

    def lines(self, name: str) -> list[str]:
        with self._lock:
            return [f'{name}{{route="{r}",status="{s}"}} {n}' for (r, s), n in sorted(self._counts.items())]


def exposition(metrics: Mapping[str, tuple[str, str, float | Histogram | Requests]]) -> str:
    """Return the page of metrics: for each name its type, what it means, and its value.

    >>> print(exposition({"up": ("gauge", "whether the server is up", 1)}), end="")
    # HELP up whether the server is up
    # TYPE up gauge
    up 1
    """
    lines = []
    for name, (kind, text, value) in metrics.items():
        lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
        lines += [f"{name} {value}"] if isinstance(value, int | float) else value.lines(name)
    return "\n".join([*lines, ""])
