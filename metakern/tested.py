"""The versions of packages that metakern is tested with. docs/compatibility.md says how and when."""

from __future__ import annotations

import re

__all__ = ["TESTED", "remark"]

# For each package, the lowest and the highest release with which the tests that need it have passed.
TESTED: dict[str, tuple[str, str]] = {
    "python": ("3.10", "3.13"),
    "torch": ("2.10.0", "2.15.0"),
    "numpy": ("1.26.0", "2.4.6"),
    "transformers": ("4.53.0", "5.24.0"),
    "triton": ("3.6.0", "3.9.0"),
}


def remark(package: str, version: str) -> str:
    """Returns a remark about a version outside the tested range.

    Args:
        package: "python" or the name of a package. One that is not in `TESTED` gets no remark.
        version: Its version as `__version__` has it, such as "2.13.0+cpu".

    Returns:
        The remark, or "" for a version inside the range.

    >>> remark("torch", "1.0")
    'older than 2.10.0, the lowest that was tested'
    >>> remark("torch", "99.0.1+cu130")
    'newer than ..., the highest that was tested'
    >>> remark("torch", "2.13.0+cpu")
    ''
    """
    if package not in TESTED:
        return ""
    lowest, highest = TESTED[package]
    found = _numbers(version)
    if found < _numbers(lowest):
        return f"older than {lowest}, the lowest that was tested"
    top = _numbers(highest)
    return f"newer than {highest}, the highest that was tested" if found[: len(top)] > top else ""


def _numbers(version: str) -> tuple[int, ...]:
    """Returns "2.13.0+cpu" as (2, 13, 0)."""
    return tuple(int(part) for part in re.match(r"[\d.]*\d|", version)[0].split(".") if part)  # type: ignore[index]
