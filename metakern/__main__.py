"""The process that `metakern` and ``python -m metakern`` start."""

import sys
import warnings

DEPRECATIONS = (DeprecationWarning, PendingDeprecationWarning, FutureWarning)


def main() -> int:
    """Run the command line; a warning never ends a run, and what other packages deprecate is not for its user."""
    warnings.simplefilter("default")
    for category in (*DEPRECATIONS, ImportWarning, ResourceWarning):
        warnings.simplefilter("ignore", category)
    from metakern.cli import main

    return main()


if __name__ == "__main__":
    sys.exit(main())
