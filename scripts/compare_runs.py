"""Compare two run directories table by table: did a change of the code change a number?

    python scripts/compare_runs.py runs/before runs/after
    python scripts/compare_runs.py runs/before runs/after --rtol 1e-6

Every parquet, CSV and JSON file of either directory is compared; pictures, pages and the manifest (which holds
times) are not. Prints one line for each difference; exits with 1 if there is any, else with 0.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

_COMPARED = (".parquet", ".csv", ".json")
_LEFT_OUT = {"manifest.json"}


def differences(before: Path, after: Path, *, rtol: float = 0.0, atol: float = 0.0) -> Iterator[str]:
    """One line for each file, column or key that is not the same in both directories.

    Args:
        before: A run directory.
        after: Another.
        rtol: Allowed difference of numbers, relative to the larger one; 0 compares every digit.
        atol: Difference of numbers that is allowed besides.
    """
    old, new, allowed = _files(before), _files(after), (rtol, atol)
    for name in sorted(old.keys() | new.keys()):
        if name not in new:
            yield f"{name}: only in {before}"
        elif name not in old:
            yield f"{name}: only in {after}"
        elif name.endswith(".json"):
            yield from (f"{name}: {line}" for line in _json_differences(_json(old[name]), _json(new[name]), allowed))
        else:
            yield from (f"{name}: {line}" for line in _table_differences(_table(old[name]), _table(new[name]), allowed))


def _files(folder: Path) -> dict[str, Path]:
    paths = (path for path in folder.rglob("*") if path.is_file() and path.suffix in _COMPARED)
    return {str(path.relative_to(folder)): path for path in paths if path.name not in _LEFT_OUT}


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _table(path: Path) -> pd.DataFrame:
    return pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path, dtype=str, keep_default_na=False)


def _table_differences(old: pd.DataFrame, new: pd.DataFrame, allowed: tuple[float, float]) -> Iterator[str]:
    for column in old.columns.symmetric_difference(new.columns, sort=False):
        yield f"column {column!r} only {'before' if column in old else 'after'}"
    if len(old) != len(new):
        yield f"{len(old):,} rows before, {len(new):,} after"
        return
    for column in old.columns.intersection(new.columns, sort=False):
        pairs = list(zip(old[column], new[column], strict=True))
        rows = [row for row, (a, b) in enumerate(pairs) if not _same(a, b, allowed)]
        if rows:
            a, b = pairs[rows[0]]
            yield f"column {column!r}: {len(rows):,} of {len(old):,} rows, first in row {rows[0]}: {a} → {b}"


def _json_differences(old: Any, new: Any, allowed: tuple[float, float], key: str = "") -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted(old.keys() | new.keys()):
            inner = f"{key}.{name}" if key else str(name)
            if name not in old or name not in new:
                yield f"{inner} only {'before' if name in old else 'after'}"
            else:
                yield from _json_differences(old[name], new[name], allowed, inner)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, (a, b) in enumerate(zip(old, new, strict=True)):
            yield from _json_differences(a, b, allowed, f"{key}[{index}]")
    elif not _same(old, new, allowed):
        yield f"{key}: {old} → {new}"


def _same(a: Any, b: Any, allowed: tuple[float, float]) -> bool:
    """Equal values; NaN equals NaN, and lists are compared element by element."""
    if isinstance(a, np.ndarray | list) and isinstance(b, np.ndarray | list):
        return len(a) == len(b) and all(_same(x, y, allowed) for x, y in zip(a, b, strict=True))
    if isinstance(a, float | np.floating) and isinstance(b, float | np.floating):
        a, b = float(a), float(b)
        rtol, atol = allowed
        return a == b or (np.isnan(a) and np.isnan(b)) or abs(a - b) <= atol + rtol * max(abs(a), abs(b))
    if a is pd.NA or b is pd.NA:
        return a is b
    return bool(a == b) or (a is None and b is None)


def main() -> int:
    """Print the differences; 1 if there is any."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    parser.add_argument("--rtol", type=float, default=0.0, help="allowed relative difference of numbers")
    options = parser.parse_args()
    for folder in (options.before, options.after):
        if not folder.is_dir():
            parser.error(f"there is no folder {folder}")
    lines = list(differences(options.before, options.after, rtol=options.rtol))
    print("\n".join(lines) if lines else "no difference")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
