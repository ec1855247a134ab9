"""The command line in this process: a process of its own takes seconds to start."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from saeffect.cli.app import main

__all__ = ["call"]


def call(arguments: Sequence[str]) -> int:
    """Run `saeffect` with these arguments; its exit code."""
    argv, sys.argv = sys.argv, ["saeffect", *arguments]
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    finally:
        sys.argv = argv
    return 0
