"""Verdicts as JUnit XML, Markdown and JSON: the same rules, the same statuses, nothing that could be markup."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest

from saeffect.diffing.guard import Verdict
from saeffect.errors import BadFile
from saeffect.report.verdicts import cells, headline, junit, markdown, plain, write_verdicts

VERDICTS = [
    Verdict(
        "group war",
        "may neither rise nor fall",
        "broken",
        1.8,
        1.0,
        6.2,
        1e-5,
        3e-5,
        0.04,
        0.05,
        24,
        24,
        0,
        31,
        "because",
    ),
    Verdict("group <b>|x", "may rise, not fall", "kept", 0.9, 1.0, -0.4, 0.7, 1.0, 0.8, 0.05, 24, 20, 1, 7, ""),
    Verdict("group none", "may do either", "reported", 1.1, 1.0, 0.3, 0.8, rank=0.7, level=0.05, nulls=24, members=2),
    Verdict("kl general", "at most 0.2 nats", "unjudged", reason="no token of 'general' counts"),
]


def test_junit_counts_and_reads_as_xml() -> None:
    suite = ElementTree.fromstring(junit(VERDICTS, "a against b"))
    assert {k: suite.get(k) for k in ("tests", "failures", "errors", "skipped")} == {
        "tests": "4", "failures": "1", "errors": "0", "skipped": "2"
    }  # fmt: skip
    assert [case.get("name") for case in suite] == [v.rule for v in VERDICTS]
    assert [child.tag for case in suite for child in case] == ["failure", "system-out", "skipped", "skipped"]
    assert "× 1.80 (+6.2 sd of nulls)" in (suite[0][0].text or "")


def test_markdown_rows_escape_names() -> None:
    page = markdown(VERDICTS, "a against b")
    rows = [line for line in page.splitlines() if (line.startswith("| ") and "×" in line) or "nats" in line]
    assert "**Broken: group war. Not judged: kl general.**" in page
    assert len(rows) == 4 and all(line.replace("\\|", "").count("|") == 8 for line in rows)
    assert "<b>" not in page.replace("\\<b\\>", "")
    assert "at most 0.05; 0 of 24 nulls" in page and "normal over nulls" in page


def test_nulls_that_could_not_be_judged_do_not_count() -> None:
    """All four ways to show a verdict say the same."""
    limit = Verdict("kl general", "at most 0.2 nats", "kept", 0.1, 0.2, nulls=4, nulls_judged=3, nulls_broken=1)
    few = Verdict("group war", "may rise, not fall", "kept", 0.9, 1.0, -0.4, 0.7, 0.7, 0.8, 0.2, 4, members=3)
    expected = {
        VERDICTS[0]: "at most 0.05; 0 of 24 nulls",
        VERDICTS[1]: "at most 0.05; 1 of 20 judged nulls",
        VERDICTS[2]: "-",
        limit: "1 of 3 judged nulls",
        replace(limit, nulls_judged=0, nulls_broken=0): "not known among nulls: none has a value",
        few: "at most 0.2; not known among nulls: 3 others are too few to judge one by",
    }
    page, suite = markdown(list(expected), ""), ElementTree.fromstring(junit(list(expected), ""))
    for row, case, (verdict, words) in zip(plain(list(expected), "")["verdicts"], suite, expected.items(), strict=True):
        assert (cells(verdict)[-1], row["false_alarms"]) == (words, words)
        assert f"| {words} |" in page and f"false alarms: {words}" in (case[0].text or "")


def test_the_headline() -> None:
    assert headline(VERDICTS[1:3]) == "Kept: 1 of 1 rules."
    assert headline(VERDICTS[:2]) == "Broken: group war."


def test_json_has_every_field_and_null_for_nan(tmp_path: Path) -> None:
    write_verdicts(VERDICTS, tmp_path / "out", "a against b")
    found = json.loads((tmp_path / "out" / "verdicts.json").read_text(encoding="utf-8"))
    assert found["headline"] == headline(VERDICTS)
    assert [row["status"] for row in found["verdicts"]] == [v.status for v in VERDICTS]
    assert found["verdicts"][3]["value"] is None and found["verdicts"][0]["p"] == 1e-5
    assert math.isnan(plain(VERDICTS, "")["verdicts"][3]["value"])
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["verdicts.json", "verdicts.md", "verdicts.xml"]


def test_file_instead_of_a_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine", encoding="utf-8")
    with pytest.raises(BadFile):
        write_verdicts(VERDICTS, tmp_path / "out", "")
    assert (tmp_path / "out").read_text(encoding="utf-8") == "mine"


def test_control_characters_are_made_visible() -> None:
    shown = cells(Verdict("group \x1b[31mred", "x", "kept"))
    assert "\x1b" not in shown[0]
    ElementTree.fromstring(junit([Verdict("group \x1b\x00", "x", "broken")], "\x0b"))
