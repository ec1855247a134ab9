from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from saeffect.errors import BadFile, ConfigError, NotFound, SaeffectError, UnknownName
from saeffect.review.verdicts import read_verdicts, summarise_verdicts, write_verdicts

HEADER = "feature,arm,rater,verdict,label,note\n"


def _file(tmp_path: Path, text: str, encoding: str = "utf-8") -> Path:
    path = tmp_path / "verdicts.csv"
    path.write_bytes(text.encode(encoding))
    return path


def _refusal(tmp_path: Path, text: str, **options: object) -> SaeffectError:
    with pytest.raises(SaeffectError) as caught:
        read_verdicts(_file(tmp_path, text), **options)  # type: ignore[arg-type]
    return caught.value


def test_reads_any_order_case_and_line_ends(tmp_path: Path) -> None:
    text = (
        "\ufeffRater, note,feature,arm,verdict,label\r\n"
        'ann,"two\r\nlines, one comma", 12 ,control,YES, cancer \r\n'
        "\r\n"
        "ben,,3,treatment,Unsure,\r\n"
    )
    verdicts = read_verdicts(_file(tmp_path, text))
    assert list(verdicts.columns) == ["feature", "arm", "rater", "verdict", "label", "note", "blind"]
    assert verdicts["feature"].dtype == np.int64
    assert verdicts.to_numpy().tolist() == [
        [12, "control", "ann", "yes", "cancer", "two\r\nlines, one comma", True],
        [3, "treatment", "ben", "unsure", "", "", True],
    ]


@pytest.mark.parametrize(
    "text",
    ["=1+1", "+cmd|' /C calc'!A0", "-2", "@SUM(A1)", "NA", "nan", "007", "<script>", "\u202exyz", "True"],
)
def test_labels_stay_text(tmp_path: Path, text: str) -> None:
    verdicts = read_verdicts(_file(tmp_path, HEADER + f'1,control,ann,yes,"{text}","{text}"\n'))
    assert verdicts.loc[0, "label"] == text
    assert verdicts.loc[0, "note"] == text
    assert summarise_verdicts(verdicts, "control").loc[0, "label"] == text


@pytest.mark.parametrize(
    ("text", "kind", "message", "line"),
    [
        ("", BadFile, "the file is empty", 1),
        ("\n\n", BadFile, "the file is empty", 1),
        (HEADER, BadFile, "not one verdict", 1),
        ("feature,arm,rater,verdict,label\n", BadFile, "missing: 'note'", 1),
        ("\nfeature,arm,rater,verdict,label,note,colour\n", BadFile, "unknown: 'colour'", 2),
        ("feature,arm,rater,verdict,label,note,note\n", BadFile, "twice: 'note'", 1),
        (HEADER.replace(",", ";"), BadFile, "missing: 'feature'", 1),
        (HEADER + "1,control,ann,yes,x\n", BadFile, "5 cells where the header has 6", 2),
        (HEADER + "1,control,ann,yes,x,y,z\n", BadFile, "7 cells where the header has 6", 2),
        (HEADER + '1,c,a,yes,x,"one\ntwo"\n2,c,a,yes,"x\n', BadFile, "not CSV", 4),
        (HEADER + "1.0,control,ann,yes,,\n", ConfigError, "Got '1.0' instead", 2),
        (HEADER + "-1,control,ann,yes,,\n", ConfigError, "Got '-1' instead", 2),
        (HEADER + "²,control,ann,yes,,\n", ConfigError, "Got '²' instead", 2),
        (HEADER + ",control,ann,yes,,\n", ConfigError, "Got '' instead", 2),
        (HEADER + "9999999999999999999,control,ann,yes,,\n", ConfigError, "whole number", 2),
        (HEADER + "1,,ann,yes,,\n", ConfigError, "the arm of this verdict is empty", 2),
        (HEADER + "1,control, ,yes,,\n", ConfigError, "the rater of this verdict is empty", 2),
        (HEADER + "1,control,ann,yes,,\n\n2,control,ann,yep,,\n", UnknownName, "no verdict 'yep'", 4),
        (HEADER + "1,control,ann,yes,,\n01,control,ann,no,,\n", ConfigError, "line 2 already holds", 3),
    ],
)
def test_bad_files_are_refused_with_their_line(
    tmp_path: Path, text: str, kind: type[SaeffectError], message: str, line: int
) -> None:
    error = _refusal(tmp_path, text)
    assert type(error) is kind
    assert message in error.message
    assert error.at == f"{tmp_path / 'verdicts.csv'}, line {line}"


def test_arms_can_be_checked(tmp_path: Path) -> None:
    error = _refusal(tmp_path, HEADER + "1,contrl,ann,yes,,\n", arms=["control", "treatment"])
    assert type(error) is UnknownName
    assert error.fix == "did you mean 'control'?"
    assert str(error.at).endswith("line 2")


def test_another_encoding_and_a_missing_file(tmp_path: Path) -> None:
    path = _file(tmp_path, HEADER + "1,control,ann,yes,tumör,\n", "latin-1")
    with pytest.raises(BadFile, match=r"byte 0xf6 at position 58 \(line 2\)"):
        read_verdicts(path)
    with pytest.raises(NotFound):
        read_verdicts(tmp_path / "none.csv")


def test_verdicts_of_two_arms_and_two_raters(tmp_path: Path) -> None:
    text = HEADER + "1,a,ann,yes,,\n1,b,ann,no,,\n1,a,ben,no,,\n"
    assert len(read_verdicts(_file(tmp_path, text))) == 3


def test_summary_by_hand(tmp_path: Path) -> None:
    rows = [
        "9,control,ann,yes,heart,",
        "9,control,ben,yes,Cardiac,",
        "9,control,cid,yes,cardiac,",
        "9,control,dee,no,heart,",
        "9,control,eve,no,heart,",
        "9,treatment,ann,no,,",
        "2,control,ann,yes,,",
        "2,control,ben,no,other,",
        "5,control,ann,unsure,maybe,",
        "7,control,ann,yes,second,",
        "7,control,ben,yes,first,",
        "7,control,cid,unsure,first,",
    ]
    verdicts = read_verdicts(_file(tmp_path, HEADER + "\n".join(rows)))
    summary = summarise_verdicts(verdicts, "control")
    assert list(summary.columns) == ["feature", "n_yes", "n_no", "n_unsure", "label", "majority"]
    assert summary.to_numpy().tolist() == [
        [2, 1, 1, 0, "", False],  # a tie is no majority
        [5, 0, 0, 1, "", False],  # a label counts with a yes alone
        [7, 2, 0, 1, "second", True],  # a tie of labels goes to the earliest
        [9, 3, 2, 0, "Cardiac", True],  # case aside, 2 against 1; labels given with a no do not count
    ]
    assert summary.dtypes[["feature", "n_yes", "n_no", "n_unsure"]].tolist() == [np.dtype(np.int64)] * 4
    assert summary["majority"].dtype == bool


def test_arm_without_verdicts_has_empty_summary() -> None:
    empty = pd.DataFrame(columns=["feature", "arm", "rater", "verdict", "label", "note"])
    summary = summarise_verdicts(empty, "control")
    assert len(summary) == 0
    assert summary["feature"].dtype == np.int64


def test_written_file_reads_back_and_is_safe_in_spreadsheets(tmp_path: Path) -> None:
    notes = ["=1+1", "-", "'=1", "''@x", 'it\'s, "so"', "two\nlines", "'", ""]
    rows = [(i, "control", "=ann", "yes", note, note) for i, note in enumerate(notes)]
    table = pd.DataFrame(rows, columns=["feature", "arm", "rater", "verdict", "label", "note"])
    table["blind"] = [True, False] * 4
    write_verdicts(table, tmp_path / "out.csv")
    pd.testing.assert_frame_equal(read_verdicts(tmp_path / "out.csv"), table)
    cells = (tmp_path / "out.csv").read_text().replace("\n", ",").split(",")
    assert not any(cell.lstrip('"').startswith(("=", "-", "@", "+")) for cell in cells)


def test_blind_is_yes_unless_the_file_says_no(tmp_path: Path) -> None:
    assert read_verdicts(_file(tmp_path, HEADER + "1,control,ann,yes,,\n"))["blind"].tolist() == [True]
    text = "blind," + HEADER + "NO,1,control,ann,yes,,\n,2,control,ann,yes,,\n"
    assert read_verdicts(_file(tmp_path, text))["blind"].tolist() == [False, True]
    error = _refusal(tmp_path, text.replace("NO", "half"))
    assert isinstance(error, UnknownName) and "line 2" in str(error)


def test_an_adjudication_decides_and_counts_for_nobody(tmp_path: Path) -> None:
    text = HEADER + (
        "1,control,ann,yes,tumour,\n1,control,ben,yes,,\n1,control,(adjudication) cy,no,,why\n"
        "2,control,ann,no,,\n2,control,(adjudication),no,,\n2,control,(adjudication) cy,yes,cells,\n"
    )
    table = summarise_verdicts(read_verdicts(_file(tmp_path, text)), "control").set_index("feature")
    assert table[["n_yes", "n_no", "label", "majority"]].to_numpy().tolist() == [
        [2, 0, "tumour", False],
        [0, 1, "cells", True],
    ]
