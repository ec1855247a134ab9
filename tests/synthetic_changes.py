"""Tables of what changed against null fine-tunes, with contents known by hand."""

from __future__ import annotations

from typing import Any

import pandas as pd

from saeffect.comparison.factorial import CROSSED, EFFECTS, FACTORIAL_COLUMNS
from saeffect.diffing.naming import SEEN
from saeffect.diffing.put_back_shares import COLUMNS
from synthetic_where import where_tables

NOTHING = float("nan")


def synthetic_changes(
    *, claimed: bool = True, n_nulls: int = 20, hostile: str = "</script>"
) -> dict[str, pd.DataFrame]:
    """Two groups beyond the nulls (none if not `claimed`), one within; the domain changed by 2.5."""
    names = [["symptom", "disease", hostile], ["treatment", "dose", "pills"], ["however", "but", "yet"]]
    scores, p = ([9.0, -7.5, 3.0], [0.0004, 0.002, 0.4]) if claimed else ([4.1, -3.0, 2.0], [0.2, 0.4, 0.9])
    return {
        "change_groups": pd.DataFrame(
            {
                "group": [1, 2, 3],
                "name": [", ".join(tokens) for tokens in names],
                "tokens": names,
                "features": [[0, 1, 2], [3], [4, 5]],
                "n_features": [3, 1, 2],
                "direction": ["more" if score > 0 else "less" for score in scores],
                "score": scores,
                "p": p,
                "q": p,
                "share": [0.1, 0.05, 0.02],
                "claimed": [claimed, claimed, False],
                "reason": "",
            }
        ),
        "declared_changes": pd.DataFrame(
            {
                "name": "medical",
                "basis": ["combined", "read"],
                "n_features": 12,
                "z": [2.5 if claimed else 0.1, 1.0],
                "null_low": -0.4,
                "null_high": 0.5,
                "p": [0.0002 if claimed else 0.8, 0.1],
                "reason": "",
            }
        ),
        "evidence": pd.DataFrame(
            {
                "kind": ["group"] * 2 + ["vocabulary"] * 6,
                "name": [names[0][0]] * 2 + ["medical"] * 6,
                "group": pd.array([1, 1, *[None] * 6], dtype="Int64"),
                "basis": [
                    *("read", "written", "combined", "read", "written", "difference in control-seed2"),
                    *("difference in treatment", "all"),
                ],
                "score": 1.0,
                "p": [0.01, 0.3, *([0.0002, 0.01, 0.3, 0.02, NOTHING, 0.0004] if claimed else [0.8] * 6)],
                "agrees": [True, False, *([True, True, False, True, False, True] if claimed else [False] * 6)],
                "reason": [*[""] * 6, SEEN, ""],
            }
        ),
        "null_groups": pd.DataFrame(
            {
                "null": [f"null-{i}" for i in range(1, n_nulls + 1)],
                "highest": [4.0 + 0.05 * i for i in range(n_nulls)],
                "kl": 0.1,
            }
        ),
        "change_numbers": pd.DataFrame(
            {
                "name": ["kl", "perplexity general", "perplexity domain"],
                "base": [NOTHING, 20.0, 14.0],
                "tuned": [NOTHING, 19.8, 7.4],
                "change": [-1.0, -0.01, -0.64],
                "null_low": [-3.0, -0.05, -0.05],
                "null_high": [-2.0, 0.02, 0.02],
                "p": [0.001, 0.9, 0.0001],
                "reason": "",
            }
        ),
    }


def first_screen() -> dict[str, pd.DataFrame]:
    """All tables that the report's first screen reads."""
    return synthetic_changes() | where_tables() | {"put_back": _put_back(), "factorial": _factorial()}


def _factorial() -> pd.DataFrame:
    known, rows = CROSSED["direct_effect"], []
    for effect, value in zip(EFFECTS, (-0.8, 0.1, 0.0, -0.7), strict=False):
        row: dict[str, Any] = dict.fromkeys(FACTORIAL_COLUMNS, NOTHING)
        row |= {"quantity": "direct_effect", "label": known.label, "unit": known.unit, "effect": effect, "reason": ""}
        rows.append(row | {"estimate": value, "low": value - 0.1, "high": value + 0.1, "n_nulls": 0})
    return pd.DataFrame(rows)


def _put_back() -> pd.DataFrame:
    rows: list[dict[str, Any]] = []
    for measure in ("loss", "kl"):
        shared = {"edited": "tuned", "source": "domain", "measure": measure, "features": "changed"}
        for n, share in ((1, 0.05), (5, 0.2), (20, 0.41), (100, 0.6), (120, 0.9)):
            for kind, value in (("own", share), ("matched", 0.02), ("difference", share - 0.02)):
                ends = {"share": value, "low": value - 0.05, "high": value + 0.05, "p": NOTHING, "reason": ""}
                rows.append(
                    shared | {"n_features": n, "kind": kind, "whole": 0.2, "n_rows": 24, "n_tokens": 1512} | ends
                )
        whole = {
            "share": 1.0,
            "low": 1.0,
            "high": 1.0,
            "p": NOTHING,
            "reason": "",
            "whole": 0.2,
            "n_rows": 24,
            "n_tokens": 1512,
        }
        rows.append(shared | {"features": "whole", "n_features": None, "kind": "own"} | whole)
    return pd.DataFrame(rows, columns=list(COLUMNS)).astype({"n_features": "Int64"})
