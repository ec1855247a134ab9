from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest

from saeffect.comparison import Comparison, MatchTables
from saeffect.report import ReportContext, write_tables
from saeffect.report.tables.write import _csv_field
from synthetic_changes import first_screen


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, comparison: Comparison, context: ReportContext) -> Path:
    folder = tmp_path_factory.mktemp("tables")
    write_tables(comparison, folder, context=context)
    return folder


def test_every_table_is_there_in_both_formats(folder: Path) -> None:
    names = "table1 table2 contrasts judgements match_counts weights activity design domain_features doses".split()
    names += "steering_outcomes outcome_effects steering_baselines baseline_effects together_effects".split()
    names += ["dose_response", "dose_response_by_arm"]
    names += ["calibration", "by_chance", "power", "regression", "partial_residuals", "threats", *MatchTables.names()]
    names += first_screen()
    assert sorted(p.name for p in folder.iterdir()) == sorted(
        [f"{name}.{ending}" for name in names for ending in ("csv", "json")] + ["answer.json"]
    )


def test_numbers_keep_every_digit(folder: Path, comparison: Comparison) -> None:
    expected = comparison.contrasts["estimate"].tolist()
    with (folder / "contrasts.csv").open(newline="") as file:
        assert [float(row["estimate"] or "nan") for row in csv.DictReader(file)] == pytest.approx(
            expected, rel=0, nan_ok=True
        )
    loaded = json.loads((folder / "contrasts.json").read_text())
    assert [row["estimate"] for row in loaded] == [None if x != x else x for x in expected]


def test_what_is_undefined_is_empty_with_its_reason(folder: Path, arms: dict) -> None:
    undefined = arms["treatment"].of_domain(arms["treatment"].coherence).query("coherence != coherence")["feature"]
    assert len(undefined), "the synthetic study should have a feature without coherence"
    with (folder / "domain_features.csv").open(newline="") as file:
        rows = [
            row for row in csv.DictReader(file) if row["arm"] == "treatment" and int(row["feature"]) in set(undefined)
        ]
    assert {(row["coherence"], row["coherence_reason"]) for row in rows} == {
        ("", "fewer than two top tokens are in the word vectors")
    }
    found = [row for row in json.loads((folder / "domain_features.json").read_text()) if row["coherence"] is None]
    assert found
    assert all(row["coherence_reason"] for row in found)


def test_no_csv_field_is_a_formula(folder: Path) -> None:
    for path in folder.glob("*.csv"):
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.reader(file):
                assert not any(field[:1] in ("=", "@", "+", "\t") for field in row), path.name
                assert all(not field.startswith("-") or float(field) < 0 for field in row), path.name


@pytest.mark.parametrize("text", ["=1+1", "+1", "-2+3+cmd|' /C calc'!A0", "@SUM(A1)", "\t=1", "\r=1"])
def test_what_a_person_typed_stays_text_in_a_spreadsheet(text: str) -> None:
    assert _csv_field(text) == "'" + text


def test_numbers_and_other_text_are_written_as_they_are() -> None:
    assert [_csv_field(value) for value in (-1, -0.5, True, None, "a-b", "")] == ["-1", "-0.5", "true", "", "a-b", ""]


def test_lists_come_back_whole(folder: Path, arms: dict) -> None:
    with (folder / "domain_features.csv").open(newline="", encoding="utf-8") as file:
        rows = {(row["arm"], int(row["feature"])): json.loads(row["top_tokens"]) for row in csv.DictReader(file)}
    for name, arm in arms.items():
        for feature in arm.domain:
            assert rows[name, int(feature)] == list(arm.features["top_tokens"].iloc[feature])


def test_same_bytes_twice(folder: Path, tmp_path: Path, comparison: Comparison, context: ReportContext) -> None:
    for path in write_tables(comparison, tmp_path, context=context):
        assert path.read_bytes() == (folder / path.name).read_bytes(), path.name


def test_an_empty_table_keeps_its_header(tmp_path: Path, comparison: Comparison) -> None:
    names = Comparison.table_names()
    emptied = replace(comparison, **{name: getattr(comparison, name).head(0) for name in names})
    write_tables(emptied, tmp_path)
    assert (tmp_path / "weights.csv").read_text() == "arm,feature,rank,weight\n"
    assert json.loads((tmp_path / "weights.json").read_text()) == []
