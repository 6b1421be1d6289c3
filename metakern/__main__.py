"""Entry point of the command `metakern` and of `python -m metakern`."""

import sys
import warnings

DEPRECATIONS = (DeprecationWarning, PendingDeprecationWarning, FutureWarning)


def main() -> int:
    """Run the command line and return its exit code.

    A warning never ends a run, whatever `PYTHONWARNINGS` says. Deprecations, import warnings and resource warnings are
    hidden, since the user of a command can do nothing about them.
    """
    warnings.simplefilter("default")
    for category in (*DEPRECATIONS, ImportWarning, ResourceWarning):
        warnings.simplefilter("ignore", category)
    from metakern import interrupts
    from metakern.cli import main

    interrupts.end()
    return main()


if __name__ == "__main__":
    sys.exit(main())
