"""How much adaptation lowers the loss of unseen tasks, and whether that is little.

gain = mean_t l_0(t) - min_k mean_t l_k(t)          nats per token, after k steps at the best rate for k
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["LITTLE", "gain", "worth"]

LITTLE = 0.1  # nats per token


def gain(means: Sequence[float]) -> float:
    """Return the gain, given the mean losses after numbers of steps, of which the first is 0.

    >>> gain([2.5, 2.0, 2.25])
    0.5
    """
    return means[0] - min(means)


def worth(gain: float, of: str = "", where: str = "") -> str:
    """Return a sentence that says what adaptation is worth, and a second line if that is little.

    Args:
        gain: In nats per token.
        of: What is adapted, such as "of the pretrained weights".
        where: What it is measured on, such as "on the validation tasks".

    >>> worth(0.5, where="on the test tasks")
    'adaptation is worth 0.50 nats per token on the test tasks'
    """
    line = " ".join(filter(None, ("adaptation", of, f"is worth {gain:.2f} nats per token", where)))
    if gain >= LITTLE:
        return line
    return f"{line}\nthat is little: the context tells the task already, and no meta-learner can win much more here"
