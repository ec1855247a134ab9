"""Tables of a run directory are read as pandas reads them, or say what is wrong with them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from saeffect.errors import BadFile, NotFound
from saeffect.study.results import read_table


@pytest.fixture
def file(tmp_path: Path) -> Path:
    table = pd.DataFrame(
        {
            "feature": [3, 1],
            "label": ["a", None],
            "tokens": [[" x", "y"], []],
            "group": pd.array([1, None], dtype="Int64"),
            "passed": [True, False],
            "nothing": [None, None],
        }
    )
    path = tmp_path / "table.parquet"
    table.to_parquet(path, index=False)
    return path


@pytest.mark.parametrize("columns", [None, ["tokens", "feature"]])
def test_a_table_is_as_pandas_reads_it(file: Path, columns: list[str] | None) -> None:
    pd.testing.assert_frame_equal(read_table(file, columns), pd.read_parquet(file, columns=columns))


def test_a_table_that_is_not_as_expected_says_so(file: Path, complains: Callable[..., Any]) -> None:
    with complains(BadFile, "p_value", at=str(file)):
        read_table(file, ["feature", "p_value"])
    file.write_bytes(b"PAR1")
    with complains(BadFile, "cannot be read", at=str(file)):
        read_table(file)
    file.unlink()
    with complains(NotFound, "no table.parquet", at=str(file)):
        read_table(file)
