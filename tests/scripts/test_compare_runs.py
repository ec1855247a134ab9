from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "compare_runs.py"


@pytest.fixture
def differences() -> Callable[..., list[str]]:
    spec = importlib.util.spec_from_file_location("compare_runs", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda *folders, **options: list(module.differences(*folders, **options))


def write(folder: Path, *, value: float = 1.0, column: str = "x", tokens: tuple[str, ...] = ("a",)) -> Path:
    folder.mkdir()
    table = pd.DataFrame({"feature": [0, 1], column: [value, np.nan], "top_tokens": [list(tokens), ["b"]]})
    table.to_parquet(folder / "features.parquet")
    table.drop(columns="top_tokens").to_csv(folder / "features.csv", index=False)
    (folder / "answer.json").write_text(json.dumps({"rows": [{"p": value}]}))
    (folder / "manifest.json").write_text(json.dumps({"seconds": value}))
    return folder


def test_equal_runs_have_no_difference(tmp_path: Path, differences: Callable[..., list[str]]) -> None:
    assert differences(write(tmp_path / "a"), write(tmp_path / "b")) == []


def test_a_changed_number_is_named_in_every_format(tmp_path: Path, differences: Callable[..., list[str]]) -> None:
    a, b = write(tmp_path / "a"), write(tmp_path / "b", value=1.0 + 1e-9)
    assert differences(a, b) == [
        "answer.json: rows[0].p: 1.0 → 1.000000001",
        "features.csv: column 'x': 1 of 2 rows, first in row 0: 1.0 → 1.000000001",
        "features.parquet: column 'x': 1 of 2 rows, first in row 0: 1.0 → 1.000000001",
    ]


def test_rtol_lets_rounding_pass(tmp_path: Path, differences: Callable[..., list[str]]) -> None:
    a, b = write(tmp_path / "a"), write(tmp_path / "b", value=1.0 + 1e-9)
    (a / "features.csv").unlink(), (b / "features.csv").unlink()
    assert differences(a, b, rtol=1e-8) == []
    assert len(differences(a, b, rtol=1e-10)) == 2


def test_missing_files_and_columns_are_named(tmp_path: Path, differences: Callable[..., list[str]]) -> None:
    a, b = write(tmp_path / "a"), write(tmp_path / "b", column="y", tokens=("a", "c"))
    (b / "features.csv").unlink()
    lines = differences(a, b)
    assert f"features.csv: only in {a}" in lines
    assert "features.parquet: column 'x' only before" in lines
    assert "features.parquet: column 'y' only after" in lines
    assert any("column 'top_tokens': 1 of 2 rows" in line for line in lines)


def test_a_missing_value_equals_itself_only(tmp_path: Path, differences: Callable[..., list[str]]) -> None:
    a, b = write(tmp_path / "a"), write(tmp_path / "b")
    for folder, known in ((a, [True, None]), (b, [True, None])):
        pd.DataFrame({"differs": pd.array(known, dtype="boolean")}).to_parquet(folder / "recipe.parquet")
    assert differences(a, b) == []
    pd.DataFrame({"differs": pd.array([None, True], dtype="boolean")}).to_parquet(b / "recipe.parquet")
    assert differences(a, b) == ["recipe.parquet: column 'differs': 2 of 2 rows, first in row 0: True → <NA>"]
