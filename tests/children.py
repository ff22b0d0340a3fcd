"""Forked children that run one thing and die, for tests of what a kill leaves."""

from __future__ import annotations

import os
from typing import Any


def forked(run: Any) -> int:
    """The process id of a child that runs this and nothing else."""
    child = os.fork()
    if child == 0:
        try:
            run()
        finally:
            os._exit(0)
    return child


def signal_of(child: int) -> int:
    """Wait for a child: the signal that ended it, 0 if it ended by itself."""
    return os.waitpid(child, 0)[1] & 0x7F
