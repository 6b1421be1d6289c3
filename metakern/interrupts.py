"""Ctrl-C while the command `metakern` is being imported: one line and exit code 130, as later.

PyTorch takes seconds to import. A KeyboardInterrupt in the initialization of one of its parts could become any other
error, so the handler ends the process. It is there only in a process of the command, from the import of the package
on, until `end` is called.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import Any

__all__ = ["begin", "end"]


def begin() -> None:
    """Install the handler, if this is a process of the command and nothing else handles Ctrl-C."""
    main = threading.current_thread() is threading.main_thread()
    if main and _is_command() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _stop)


def end() -> None:
    """Let Ctrl-C raise a KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _stop:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _is_command() -> bool:
    if sys.argv[0] == "-m":  # Python sets the path of the module only after the import of its package
        return ("-m", "metakern") in zip(sys.orig_argv, sys.orig_argv[1:], strict=False)
    return os.path.basename(sys.argv[0]) == "metakern"


def _stop(*_: Any) -> None:
    os.write(2, b"metakern: stopped\n")
    os._exit(130)


begin()
