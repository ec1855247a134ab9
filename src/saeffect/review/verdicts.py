"""Verdicts in a CSV file, one row per person, feature and arm: strict reading, and a summary per feature."""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from saeffect.errors import BadFile, ConfigError, unknown_name
from saeffect.io import FORMULA_STARTS, atomic_path
from saeffect.paths import decode_utf8, read_bytes

__all__ = ["ADJUDICATION", "BLIND", "COLUMNS", "VERDICTS", "read_verdicts", "summarise_verdicts", "write_verdicts"]

COLUMNS = ("feature", "arm", "rater", "verdict", "label", "note")
BLIND = "blind"
"""An optional column: yes, or no for a verdict given after seeing those of others."""
VERDICTS = ("yes", "no", "unsure")
ADJUDICATION = "(adjudication)"
"""Prefix of the rater of an adjudication (a decision where raters differ); a name may follow."""

_INT64_MAX = np.iinfo(np.int64).max
_WHOLE_NUMBER = re.compile(r"[0-9]{1,19}")


def read_verdicts(path: Path | str, *, arms: Collection[str] | None = None) -> pd.DataFrame:
    """Read verdicts from a UTF-8 CSV file; `label` and `note` stay text, even if they look like formulas.

    The first line names the columns feature, arm, rater, verdict, label and note in any order, and perhaps blind (yes,
    as without it, or no). Verdicts are yes, no or unsure, in any case; `arms` are the valid ones (None for any). One
    row per verdict, in the file's order: feature (int64), arm, rater, verdict (lower case), label, note (stripped str,
    "" if empty), blind (bool).

    Raises, with the line: NotFound: no such file. BadFile: not UTF-8, not CSV, a column missing or too many, a row of
    another length, no rows. ConfigError: a feature that is no whole number, an empty arm or rater, or a repeated
    feature, arm and rater. UnknownName: an invalid verdict, arm or blind.
    """
    text = decode_utf8(read_bytes(path, "verdicts"), at=str(path))
    seen: dict[tuple[int, str, str], int] = {}
    rows = []
    for line, cells in _records(text, str(path)):
        row = _parse_row(cells, arms, at=f"{path}, line {line}")
        key = (int(row["feature"]), str(row["arm"]), str(row["rater"]))
        if key in seen:
            raise ConfigError(
                f"line {seen[key]} already holds {key[2]!r}'s verdict on feature {key[0]} of arm {key[1]!r}.",
                at=f"{path}, line {line}",
                fix="keep one of the two rows.",
            )
        seen[key] = line
        rows.append(row)
    if not rows:
        raise BadFile("the file holds not one verdict.", at=f"{path}, line 1", fix="write one row a verdict.")
    return pd.DataFrame(rows, columns=[*COLUMNS, BLIND]).astype({"feature": np.int64})


def write_verdicts(verdicts: pd.DataFrame, path: Path | str) -> None:
    """Write verdicts (`COLUMNS`, `BLIND`) as a CSV file that `read_verdicts` reads back; BadFile as `atomic_path`."""
    texts = [column for column in COLUMNS if column != "feature"]
    safe = verdicts.assign(**{c: ["'" + t if _is_formula(t) else t for t in verdicts[c]] for c in texts})
    safe[BLIND] = safe[BLIND].map({True: "yes", False: "no"})
    with atomic_path(path) as temporary:
        safe.to_csv(temporary, columns=[*COLUMNS, BLIND], index=False, lineterminator="\n")


def _strip_cell(cell: str) -> str:
    """A cell without surrounding space and without the apostrophe that keeps spreadsheets from evaluating it."""
    cell = cell.strip()
    return cell[1:] if cell.startswith("'") and _is_formula(cell[1:]) else cell


def _is_formula(text: str) -> bool:
    return text.lstrip("'").startswith(FORMULA_STARTS)


def summarise_verdicts(verdicts: pd.DataFrame, arm: str) -> pd.DataFrame:
    """Summarise the verdicts on one arm, as read by `read_verdicts`; no verdicts give no rows.

    One row per reviewed feature, by number: feature, n_yes, n_no, n_unsure (int64); label (str), the commonest among
    yes verdicts, case aside, "" for none; majority (bool), more yes than no. Where somebody has adjudicated, the last
    such verdict alone makes majority, and its label, if any, goes first.

    Example:
        >>> rows = [(7, "control", "ann", "yes", "cancer", ""), (7, "control", "ben", "unsure", "", "half")]
        >>> verdicts = pd.DataFrame(rows, columns=list(COLUMNS))
        >>> print(summarise_verdicts(verdicts, "control").to_string(index=False))
         feature  n_yes  n_no  n_unsure  label  majority
               7      1     0         1 cancer      True
    """
    by_feature: dict[int, list[Mapping[Any, Any]]] = {}
    for row in verdicts[verdicts["arm"] == arm].to_dict("records"):
        by_feature.setdefault(row["feature"], []).append(row)
    rows = []
    for feature, given in sorted(by_feature.items()):
        decision = [row for row in given if row["rater"].startswith(ADJUDICATION)][-1:]
        answers = [row for row in given if not row["rater"].startswith(ADJUDICATION)]
        counts = Counter(row["verdict"] for row in answers)
        labels = [row["label"] for row in decision]
        labels.append(_most_common_label([row["label"] for row in answers if row["verdict"] == "yes"]))
        rows.append(
            {
                "feature": feature,
                **{f"n_{verdict}": counts[verdict] for verdict in VERDICTS},
                "label": next(filter(None, labels), ""),
                "majority": decision[0]["verdict"] == "yes" if decision else counts["yes"] > counts["no"],
            }
        )
    integers = dict.fromkeys(("feature", "n_yes", "n_no", "n_unsure"), np.int64)
    table = pd.DataFrame(rows, columns=["feature", "n_yes", "n_no", "n_unsure", "label", "majority"])
    return table.astype({**integers, "label": str, "majority": bool})


def _records(text: str, path: str) -> Iterator[tuple[int, dict[str, str]]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    header: list[str] = []
    start = 1
    try:
        for cells in reader:
            line, start = start, reader.line_num + 1
            if not any(cell.strip() for cell in cells):
                continue
            if not header:
                header = _header(cells, at=f"{path}, line {line}")
                continue
            if len(cells) != len(header):
                raise BadFile(
                    f"this row has {len(cells)} cells where the header has {len(header)}.",
                    at=f"{path}, line {line}",
                    fix="put quotation marks around a cell that holds a comma.",
                )
            yield line, dict(zip(header, map(_strip_cell, cells), strict=True))
    except csv.Error as error:
        raise BadFile(
            f"this is not CSV: {error}.", at=f"{path}, line {start}", fix="check the quotation marks."
        ) from error
    if not header:
        raise BadFile("the file is empty.", at=f"{path}, line 1", fix=f"its first line is: {','.join(COLUMNS)}.")


def _header(cells: Sequence[str], *, at: str) -> list[str]:
    names = [cell.strip().lower() for cell in cells]
    missing = [column for column in COLUMNS if column not in names]
    extra = [name for name in names if name not in (*COLUMNS, BLIND)]
    repeated = [column for column in (*COLUMNS, BLIND) if names.count(column) > 1]
    faults = [
        f"{fault}: {', '.join(repr(name) for name in columns)}"
        for fault, columns in (("missing", missing), ("unknown", extra), ("twice", repeated))
        if columns
    ]
    if faults:
        hint = " and separate them by commas" if len(names) == 1 else ""
        raise BadFile(
            f"the columns are not those of a verdict file; {'; '.join(faults)}.",
            at=at,
            fix=f"name the columns {', '.join(COLUMNS)}{hint}.",
        )
    return names


def _parse_row(cells: dict[str, str], arms: Collection[str] | None, *, at: str) -> dict[str, int | str | bool]:
    number = cells["feature"]
    if not _WHOLE_NUMBER.fullmatch(number) or int(number) > _INT64_MAX:
        raise ConfigError(f"a feature is a whole number, 0 or more. Got {number[:60]!r} instead.", at=at)
    for column in ("arm", "rater"):
        if not cells[column]:
            raise ConfigError(f"the {column} of this verdict is empty.", at=at, fix=f"fill in the {column}.")
    if arms is not None and cells["arm"] not in arms:
        raise unknown_name("arm", cells["arm"], arms, at=at)
    verdict = cells["verdict"].lower()
    if verdict not in VERDICTS:
        raise unknown_name("verdict", cells["verdict"], VERDICTS, at=at)
    blind = cells.get(BLIND, "").lower() or "yes"
    if blind not in ("yes", "no"):
        raise unknown_name(BLIND, cells[BLIND], ("yes", "no"), at=at)
    return {**cells, "feature": int(number), "verdict": verdict, BLIND: blind == "yes"}


def _most_common_label(labels: Sequence[str]) -> str:
    spellings: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for label in filter(None, labels):
        spellings.setdefault(label.casefold(), label)
        counts[label.casefold()] += 1
    # `most_common` keeps the order of first appearance among equals.
    return spellings[counts.most_common(1)[0][0]] if counts else ""
