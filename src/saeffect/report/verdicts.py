"""The verdicts of a guard as JSON, JUnit XML and Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from saeffect.diffing.guard import MANY_NULLS, Verdict
from saeffect.io import atomic_path, write_json
from saeffect.lm.tokens import printable_text

__all__ = ["COLUMNS", "cells", "false_alarms", "headline", "junit", "markdown", "plain", "write_verdicts"]

COLUMNS = ("rule", "budget", "verdict", "measured", "p", "false alarms")
_MARKS = {"kept": "✅", "broken": "❌", "unjudged": "❔", "reported": "ℹ️"}


def headline(verdicts: Sequence[Verdict]) -> str:
    """One sentence: kept or broken, and by what."""
    broken = [verdict.rule for verdict in verdicts if verdict.status == "broken"]
    unjudged = [verdict.rule for verdict in verdicts if verdict.status == "unjudged"]
    n_judged = sum(verdict.status in ("kept", "broken") for verdict in verdicts)
    text = f"Broken: {', '.join(broken)}." if broken else f"Kept: {n_judged} of {n_judged} rules."
    return text + (f" Not judged: {', '.join(unjudged)}." if unjudged else "")


def cells(verdict: Verdict) -> tuple[str, ...]:
    """A verdict as the text of `COLUMNS`, with control characters escaped."""
    is_group = verdict.rule.startswith("group ")
    if not math.isfinite(verdict.value):
        measured = "-"
    else:
        measured = f"× {verdict.value:.2f} ({verdict.score:+.1f} sd of nulls)" if is_group else f"{verdict.value:.3g}"
    p = verdict.p_corrected if math.isfinite(verdict.p_corrected) else verdict.p
    return tuple(
        printable_text(text)
        for text in (
            verdict.rule,
            verdict.allowed,
            verdict.status,
            measured,
            f"{p:.2g}" if math.isfinite(p) else "-",
            false_alarms(verdict),
        )
    )


def false_alarms(verdict: Verdict) -> str:
    """The rate at which null fine-tunes break this rule: the promised bound, and that of the measured nulls."""
    if not verdict.nulls or verdict.status in ("unjudged", "reported"):
        return "-" if verdict.nulls else "unknown: no nulls"
    is_limit, n_judged = math.isnan(verdict.level), verdict.nulls_judged
    among_nulls = f"{verdict.nulls_broken} of {n_judged} {'' if n_judged == verdict.nulls else 'judged '}nulls"
    if not n_judged:
        why = "none has a value" if is_limit else f"{verdict.nulls - 1} others are too few to judge one by"
        among_nulls = f"not known among nulls: {why}"
    return among_nulls if is_limit else f"at most {verdict.level:.3g}; {among_nulls}"


def markdown(verdicts: Sequence[Verdict], title: str) -> str:
    """The verdicts as a comment on a pull request."""
    lines = [f"### {_escape(title)}", "", f"**{_escape(headline(verdicts))}**", ""]
    lines += ["| | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for verdict in verdicts:
        lines.append(f"| {_MARKS[verdict.status]} | " + " | ".join(map(_escape, cells(verdict))) + " |")
    lines += ["", *(f"- {_escape(f'{v.rule}: {v.reason}')}" for v in verdicts if v.reason), "", _p_note(verdicts)]
    return "\n".join(lines).rstrip() + "\n"


def _p_note(verdicts: Sequence[Verdict]) -> str:
    n_nulls = max((verdict.nulls for verdict in verdicts if verdict.rule.startswith("group ")), default=0)
    if not n_nulls:
        return ""
    method = (
        f"p is Student's for one more value among {n_nulls} nulls, which assumes that scores are normal over nulls"
        if n_nulls >= MANY_NULLS
        else f"p is the rank among {n_nulls} nulls, so never below 1/{n_nulls + 1}"
    )
    return f"{method}; corrected for the number of rules for groups by Holm's method."


def _escape(text: str) -> str:
    """Text with Markdown's special characters escaped."""
    text = printable_text(text)
    return "".join(f"\\{c}" if c in "\\`*_{}[]<>#|" else c for c in text)


def plain(verdicts: Sequence[Verdict], title: str) -> dict[str, Any]:
    """The content of verdicts.json; NaN becomes null."""
    rows = [asdict(verdict) | {"false_alarms": false_alarms(verdict)} for verdict in verdicts]
    return {"title": title, "headline": headline(verdicts), "verdicts": rows}


def junit(verdicts: Sequence[Verdict], title: str) -> bytes:
    """JUnit XML: a test case a rule, failed where it is broken, skipped where it was not judged or only reported."""
    counts = {status: sum(v.status == status for v in verdicts) for status in ("broken", "unjudged", "reported")}
    suite = ElementTree.Element(
        "testsuite",
        name=printable_text(title),
        tests=str(len(verdicts)),
        failures=str(counts["broken"]),
        errors="0",
        skipped=str(counts["unjudged"] + counts["reported"]),
    )
    for verdict in verdicts:
        case = ElementTree.SubElement(suite, "testcase", classname="saeffect.guard", name=printable_text(verdict.rule))
        details = "; ".join(f"{name}: {text}" for name, text in zip(COLUMNS[1:], cells(verdict)[1:], strict=True))
        if verdict.status != "kept":
            kind = "failure" if verdict.status == "broken" else "skipped"
            ElementTree.SubElement(case, kind, message=printable_text(verdict.reason or details)).text = details
        else:
            ElementTree.SubElement(case, "system-out").text = details
    return ElementTree.tostring(suite, encoding="utf-8", xml_declaration=True) + b"\n"


def write_verdicts(verdicts: Sequence[Verdict], folder: Path | str, title: str) -> tuple[Path, ...]:
    """Write verdicts.json, verdicts.xml (JUnit) and verdicts.md, each atomically; `folder` is made if missing."""
    folder = Path(folder)
    paths = tuple(folder / f"verdicts.{end}" for end in ("json", "xml", "md"))
    write_json(paths[0], plain(verdicts, title))
    for path, content in zip(paths[1:], (junit(verdicts, title), markdown(verdicts, title).encode()), strict=True):
        with atomic_path(path) as temporary:
            temporary.write_bytes(content)
    return paths
