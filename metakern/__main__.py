"""``python -m metakern`` is ``metakern``."""

import sys

from metakern.cli import main

if __name__ == "__main__":
    sys.exit(main())
