"""Command line options of the benchmarks, and writing of their results."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

__all__ = ["parser_of", "write_results"]


def parser_of(description: str | None, quick: str) -> argparse.ArgumentParser:
    """The options that the benchmarks share.

    Args:
        description: The benchmark's docstring.
        quick: What --quick runs in place of the real task.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help=f"{quick}, one round, nothing written by default")
    parser.add_argument("--rounds", type=int, default=None, help="3, or 1 with --quick")
    parser.add_argument("--out", type=Path, default=None, help="folder for results")
    return parser


def write_results(
    results: dict[str, Any], name: str, options: argparse.Namespace, draw: Callable[[dict[str, Any], Path], None]
) -> None:
    """Write `name`.json and the figure to the folder of the options; with --quick only if `--out` is given."""
    out = options.out or (None if options.quick else Path(__file__).parent / "results")
    if out is None:
        return
    out.mkdir(parents=True, exist_ok=True)
    text = json.dumps(results, indent=2, sort_keys=True)
    (out / f"{name}.json").write_text(text + "\n", encoding="utf-8")
    draw(results, out / name)
