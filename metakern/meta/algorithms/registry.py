"""The algorithms by name, for configs and commands; other packages add theirs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points
from typing import Any

from metakern.errors import UserError

RATES = ("learned", "fixed", "own")


@dataclass(frozen=True)
class Algorithm:
    """An algorithm that configs may name.

    Attributes:
        make: `make(model, loss, **options)` returns a module with `(support, query) -> loss`, `adapt` and `evaluate`,
            and an attribute `inner`, the inner optimizer; `options` are those of `metakern.MAML`.
        rates: "learned" where the outer loop may learn the rates of the inner optimizer, "fixed" where it may not, and
            "own" where the algorithm has its own inner optimizer, and takes `lr` in place of `inner`.
    """

    make: Callable[..., Any]
    rates: str = "learned"


ALGORITHMS: dict[str, Algorithm] = {}
# The names of this package's own, which `metakern.dialogue` adds.
OWN = (
    *("maml", "mamlplusplus", "fomaml", "anil", "boil", "metasgd", "metalstm", "imaml", "hypernetwork", "reptile"),
    *("finetune", "prompt", "incontext"),
)


def register_algorithm(name: str, make: Callable[..., Any], rates: str = "learned") -> None:
    """Let configs and `metakern train --algorithm` name an algorithm of another package.

    A package is found without a call if its metadata has an entry point `name = "module:class"` in the group
    `metakern.algorithms`; its rates are then "learned", or what the attribute `rates` of the class says.

    Args:
        name: Its name in configs.
        make: `make(model, loss, **options)`, such as a subclass of `metakern.MAML`.
        rates: "learned" where the outer loop may learn the rates of the inner optimizer, "fixed" where it may not, and
            "own" where the algorithm has its own inner optimizer, and takes `lr` in place of `inner`.

    Raises:
        TypeError: `name` is no string, or `make` can't be called.
        ValueError: The name is taken or empty, or `rates` is none of the three.

    >>> import metakern as mk
    >>> mk.register_algorithm("signs", mk.FOMAML)
    >>> ALGORITHMS.pop("signs").make
    <class 'metakern.meta.algorithms.fomaml.FOMAML'>
    """
    if not isinstance(name, str) or not callable(make):
        raise TypeError(f"register_algorithm: name must be a string, and make a function, got {name!r} and {make!r}")
    if not name or name in ALGORITHMS or name in OWN:
        raise ValueError(f"register_algorithm: name must be a new one, got {name!r}")
    if rates not in RATES:
        raise ValueError(f"register_algorithm: rates must be one of {', '.join(RATES)}, got {rates!r}")
    ALGORITHMS[name] = Algorithm(make, rates)


def find_algorithm(name: Any) -> bool:
    """Return whether `name` is an algorithm, after a look at the entry points of installed packages.

    Raises:
        UserError: If the entry point can't be loaded, or is no algorithm.
    """
    if name not in ALGORITHMS:
        for point in entry_points(group="metakern.algorithms", name=str(name)):
            try:
                make = point.load()
                register_algorithm(name, make, getattr(make, "rates", "learned"))
            except (ImportError, AttributeError, TypeError, ValueError) as error:
                raise UserError(f"algorithm {name!r} can't be loaded from {point.value}: {error}") from None
            break
    return name in ALGORITHMS
