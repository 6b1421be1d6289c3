"""Meta-SGD: a learned learning rate for each element of each parameter.

phi <- phi - alpha * g        alpha [*shape], learned with theta (Li et al. 2017, "Meta-SGD", equation 3)
"""

from __future__ import annotations

from metakern.optim.sgd import SGD


class MetaSGD(SGD):
    """SGD as an inner optimizer with a learned rate for each element of each parameter (Li et al. 2017, "Meta-SGD").

    Args:
        lr: The initial value of all rates.

    Raises:
        ValueError: For a rate that is negative or not finite.
        TypeError: For a rate that is no number.

    >>> import metakern as mk
    >>> mk.optim.MetaSGD(lr=0.1).lr.per
    'element'
    """

    def __init__(self, lr: float = 0.01) -> None:
        super().__init__(lr, learn_lr=True, per="element")
