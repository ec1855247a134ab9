"""Tables and figures in a run directory, read on first use."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq

from saeffect.errors import BadFile, NotFound, first_line, unknown_name

__all__ = ["Picture", "read_table", "run_figures", "run_tables"]

_TABLE_FOLDERS = ("comparison", "steering")


def run_tables(folder: Path) -> Mapping[str, pd.DataFrame]:
    """Every table by name, such as "contrasts", "table1", "dose_search"; those of an arm as "control/features"."""
    paths = {path.stem: path for name in _TABLE_FOLDERS for path in sorted((folder / name).glob("*.parquet"))}
    paths |= {f"{path.parent.name}/{path.stem}": path for path in sorted(folder.glob("arms/*/*.parquet"))}
    return _LazyMapping(folder, "table", paths, read_table)


def run_figures(folder: Path) -> Mapping[str, Picture]:
    """Every figure of the report by name, such as "learned" or "contrasts"."""
    paths = {path.stem: path for path in sorted((folder / "figures").glob("*.svg"))}
    return _LazyMapping(folder, "figure", paths, lambda path: Picture(path.stem, path))


def read_table(path: Path, columns: list[str] | None = None) -> pd.DataFrame:
    """A table of a run directory, or some of its columns; NotFound if there is none, BadFile if it is broken."""
    try:
        with pq.ParquetFile(path) as file:  # half the time of pandas.read_parquet, which makes a data set of each file
            table = file.read(columns)
        frame: pd.DataFrame = (table if columns is None else table.select(columns)).to_pandas()
        return frame
    except FileNotFoundError as error:
        raise NotFound(f"there is no {path.name}.", at=str(path), fix="run the stage before this one.") from error
    except Exception as error:  # pyarrow raises many kinds
        fix = "delete it and run again."
        raise BadFile(f"this table cannot be read: {first_line(error).rstrip('.')}.", at=str(path), fix=fix) from error


@dataclass(frozen=True)
class Picture:
    """A figure of the report, which a notebook displays; `svg` is its source, `path` its file."""

    name: str
    path: Path

    @property
    def svg(self) -> str:
        return self.path.read_text(encoding="utf-8")

    def _repr_svg_(self) -> str:
        return self.svg


class _LazyMapping(Mapping[str, Any]):
    """Values by name, each read on access; `UnknownName` lists the names."""

    def __init__(self, folder: Path, kind: str, paths: Mapping[str, Path], read: Any) -> None:
        self._folder, self._kind, self._paths, self._read = folder, kind, paths, read

    def __getitem__(self, name: str) -> Any:
        if name not in self._paths:
            raise unknown_name(self._kind, name, self._paths, at=str(self._folder))
        return self._read(self._paths[name])

    def __contains__(self, name: object) -> bool:
        return name in self._paths

    def __iter__(self) -> Iterator[str]:
        return iter(self._paths)

    def __len__(self) -> int:
        return len(self._paths)

    def __repr__(self) -> str:
        return f"{self._kind}s: {', '.join(self._paths)}"
