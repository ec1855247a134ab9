"""The paper's figures from its published files: what agrees, what differs, what nobody can compute."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest

from command_line import call
from saeffect.errors import BadFile, NotFound
from saeffect.study.reproduce import AGREES, DIFFERS, NO_FILE, ROUNDED, UNPUBLISHED, reproduce

REFERENCE = Path(__file__).parents[1] / "reference"


def row_of(table: pd.DataFrame, figure: str, arm: str) -> pd.Series:
    """The only row of a figure and an arm."""
    ((_, row),) = table[(table["figure"] == figure) & (table["arm"] == arm)].iterrows()
    return row


@pytest.fixture(scope="module")
def control() -> pd.DataFrame:
    return reproduce(REFERENCE)


@pytest.mark.parametrize(
    ("figure", "paper", "ours"),
    [
        ("medical features", "101", 101),
        ("mean coherence", "0.5438", 0.54378),
        ("median coherence", "0.5648", 0.56482),
        ("lowest coherence", "0.1130", 0.11298),
        ("highest coherence", "0.7641", 0.76405),
        ("mean activation", "2.166", 2.16626),
        ("variance of activations", "0.633", 0.63310),
        ("coverage, unique, %", "84.51", 100 * 420 / 497),
        ("coverage, total, %", "89.99", 100 * 908 / 1009),
    ],
)
def test_the_control_s_figures_agree(control: pd.DataFrame, figure: str, paper: str, ours: float) -> None:
    row = row_of(control, figure, "control")
    assert (row["paper"], row["verdict"]) == (paper, AGREES)
    assert row["ours"] == pytest.approx(ours, abs=5e-5)


def test_the_papers_share_of_features_differs(control: pd.DataFrame) -> None:
    row = row_of(control, "medical features, %", "control")
    assert row["verdict"] == DIFFERS
    assert row["ours"] == pytest.approx(100 * 101 / 24_576)


def test_missing_files_fall_back_to_printed_figures(control: pd.DataFrame) -> None:
    row = row_of(control, "normalised mean difference", "both")
    assert (row["verdict"], round(row["ours"], 4)) == (AGREES, 0.3037)
    assert "the paper's own figures" in row["note"]
    assert row_of(control, "mean coherence", "treatment")["verdict"] == NO_FILE
    assert row_of(control, "mean lower by, %", "both")["verdict"] == NO_FILE
    assert row_of(control, "mean similarity, steered", "control")["verdict"] == UNPUBLISHED


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """Their layout, with a fine-tuned side of our own: two features and two steered texts."""
    features = tmp_path / "features"
    features.mkdir()
    shutil.copy(REFERENCE / "paper_features_baseline.json", features / "features_medical_baseline.json")
    words = [{"word": "Ġdoctor", "activation": 0.8}, {"word": "Ġnurse", "activation": 0.79}]
    tuned = {str(n): {"top_words": words, "medical_words": words} for n in (7, 9)}
    (features / "features_medical_finetuned.json").write_text(json.dumps(tuned))
    for arm, scores in (("baseline", [(0.4, 0.5)]), ("fine-tuned", [(0.4, 0.3), (0.4, 0.4001)])):
        run = tmp_path / "experiments" / arm / "2024_coeff_50"
        run.mkdir(parents=True)
        for number, (unsteered, steered) in enumerate(scores):
            line = f"   Semantic Similarity - Baseline: {unsteered:.4f}  |  Steered: {steered:.4f}\n"
            (run / f"feature_{number}.txt").write_text(f"FEATURE {number}\n{line}")
    return tmp_path


def test_both_sides_and_the_runs(repository: Path) -> None:
    found = reproduce(repository)
    assert row_of(found, "mean activation", "treatment")["ours"] == pytest.approx(0.795)
    lower = row_of(found, "mean lower by, %", "both")
    assert lower["ours"] == pytest.approx(100 * (1 - 0.795 / 2.1662560))
    assert lower["verdict"] == ROUNDED, "0.794 / 2.166 gives the printed 63.34"
    passing = found[found["figure"] == "passing"].set_index(["arm", "place"])
    assert passing.loc[("control", "Appendix"), "ours"] == 1
    assert passing.loc[("treatment", "Appendix"), "ours"] == 1
    assert row_of(found, "passing, %", "treatment")["ours"] == 50
    normalised = row_of(found, "normalised mean difference", "both")
    assert (normalised["verdict"], normalised["note"]) == (DIFFERS, "")


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["reproduce", str(REFERENCE), "--csv", str(tmp_path / "figures.csv")]) == 0
    shown = capsys.readouterr().out
    assert max(map(len, shown.splitlines())) <= 100
    line = next(line for line in shown.splitlines() if "mean activation" in line)
    assert line.split()[-3:] == ["2.166", "2.166", "agrees"]
    assert len(pd.read_csv(tmp_path / "figures.csv")) == len(reproduce(REFERENCE))


def test_a_folder_without_the_files(tmp_path: Path, complains) -> None:
    with complains(NotFound, "none of the paper's", "git clone", at=str(tmp_path)):
        reproduce(tmp_path)
    with complains(NotFound, "no folder", at="FILES"):
        reproduce(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("features_medical_baseline.json", '{"2": {"top_words": 3}}', "top_words and medical_words"),
        ("features_medical_baseline.json", "[1, 2]", "top_words and medical_words"),
        ("features_medical_baseline.json", "{}", "expected features"),
        ("coherence_scores_medical_features_baseline.csv", "coherence_score\n", "expected features, one a line"),
        ("coherence_scores_medical_features_baseline.csv", "feature_id,score\n1,2\n", "coherence_score"),
        ("experiments/baseline/run/feature_1.txt", "nothing", "Semantic Similarity"),
    ],
)
def test_a_file_of_another_form(tmp_path: Path, name: str, text: str, expected: str, complains) -> None:
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    with complains(BadFile, expected, at=str(path)):
        reproduce(tmp_path)
