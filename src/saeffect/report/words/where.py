"""What changed, where, and what it writes now, in a few lines for the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from saeffect.lm.tokens import printable_token
from saeffect.report.words.numbers import amount, count, is_defined, p_value

__all__ = ["where_lines"]

_WORDS = 8
_WIDTH = 60  # characters of a text


def where_lines(tables: Mapping[str, pd.DataFrame], *, alpha: float = 0.05) -> list[str]:
    """At most 15 lines on the tables of `saeffect.diffing.where.where_changed`; see there for what they mean."""
    lines = [f"{'':28}{'changed':>10}{'nulls':>20}{'p':>9}"]
    for row in tables["change_overall"].to_dict("records"):
        unit = "" if "divergence" in row["quantity"] else "share"
        lines.append(_line(row["quantity"], row, unit))
    layers = tables["change_by_layer"]
    if len(layers) and layers["change"].notna().any():
        by = "ratio" if layers["ratio"].notna().any() else "change"
        most = layers.loc[layers[by].idxmax()].to_dict()
        lines.append(_line(f"most: layer {count(most['layer'])}", most, "share"))
    words = tables["change_by_word"]
    for role, label in (("read", "differ after"), ("expected", "expects")):
        rows = words[words["role"] == role]
        lines += _list(label, [_signed(row, role) for row in _found(rows, alpha).to_dict("records")])
    written = tables["written_words"]
    rows = _found(written[written["change"] > 0], alpha)
    lines += _list("writes", [f"{row.word} {count(row.texts)}" for row in rows.itertuples()])
    lines += _texts(tables["openings"])
    reason = next((str(reason) for reason in tables["change_overall"]["reason"] if reason), "")
    return [*lines, *([f"({reason})"] if reason else [])]


def _line(label: str, row: Mapping[Any, Any], unit: str) -> str:
    ends = [amount(float(row[name]), unit) if is_defined(row[name]) else "" for name in ("null_low", "null_high")]
    nulls = f"{ends[0]} to {ends[1]}" if all(ends) else "–"
    p = p_value(row["p"]) if is_defined(row["p"]) else "–"
    change = row["change"]
    return f"{label:28}{amount(change, unit) if is_defined(change) else '–':>10}{nulls:>20}{p:>9}"


def _found(rows: pd.DataFrame, alpha: float) -> pd.DataFrame:
    """The first rows that stand out; the first rows of all where the nulls are too few for any to do so."""
    enough = not rows["reason"].astype(bool).any()
    return (rows[rows["p_search"] <= alpha] if enough else rows).head(_WORDS)


def _signed(row: Mapping[object, object], role: str) -> str:
    token = printable_token(str(row["token"])).strip() or "␣"
    return token if role == "read" else f"{'+' if float(str(row['change'])) > 0 else '−'}{token}"


def _list(label: str, words: Sequence[str]) -> list[str]:
    return [f"{label:14}{', '.join(words) or 'no word stands out'}"]


def _texts(openings: pd.DataFrame) -> list[str]:
    if openings.empty:
        return []
    row = openings.iloc[0]
    shown = [("tuned writes", "tuned_text"), ("base writes", "base_text"), ("null writes", "null_text")]
    opening = printable_token(str(row["opening"]))
    return [
        f"{label:14}{opening}|{printable_token(str(row[column]))[:_WIDTH]}" for label, column in shown if row[column]
    ]
