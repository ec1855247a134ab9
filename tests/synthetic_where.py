"""Tables of where a model changed, with and without nulls, small and made up."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd

NO_NULLS = "no null fine-tunes to compare with"


def with_tables(tables: dict[str, pd.DataFrame]) -> Any:
    """A comparison of which only these tables are read."""
    return SimpleNamespace(matches=SimpleNamespace(further=tables))


def push_tables(*, nulls: bool = True) -> dict[str, pd.DataFrame]:
    """The tables of the stage "push": at 0.5, the fine-tune's push brings fever up in every second text."""
    said = {"tuned": ["a fever.", "of <fever>."], "null-1": ["a sea.", "of it."], "null-2": ["a house.", "of that."]}
    rows = [("", False, 0.0, 0, np.nan, opening, text) for opening, text in (("\n", "a hat."), ("The", "of us."))]
    for name in [*said][: None if nulls else 1]:
        size = {"tuned": 0.12, "null-1": 0.02, "null-2": 0.04}[name]
        for opening, text in zip(("\n", "The"), said[name], strict=True):
            rows.append((name, name != "tuned", 0.5, 0, size, opening, text))
    columns = ["fine_tune", "is_null", "dose", "sample", "size", "opening", "text"]
    words = pd.DataFrame(
        {
            "dose": 0.5,
            "word": ["fever", "of"],
            "rate": [0.5, 0.4],
            "base_rate": [0.02, 0.3],
            "null_high": [0.04, 0.5] if nulls else np.nan,
            "change": [2.0, 0.1],
            "p": [0.001, 0.4] if nulls else np.nan,
            "p_search": [0.05, 0.8] if nulls else np.nan,
            "reason": "" if nulls else NO_NULLS,
        }
    )
    return {"difference_texts": pd.DataFrame(rows, columns=columns), "difference_words": words}


def where_tables(*, nulls: bool = True) -> dict[str, pd.DataFrame]:
    """The tables of `saeffect.diffing.where.where_changed` that pictures and lines read."""

    def null(low: float, middle: float, high: float) -> dict[str, float]:
        values = (low, middle, high) if nulls else (np.nan,) * 3
        return dict(zip(("null_low", "null_median", "null_high"), values, strict=True))

    p = 1 / 21 if nulls else np.nan
    reason = "" if nulls else NO_NULLS
    layers = pd.DataFrame({"layer": range(6), "change": np.linspace(0.02, 0.12, 6), **null(0.01, 0.02, 0.03)})
    layers = layers.assign(ratio=layers["change"] / layers["null_median"], p=p, q=p, reason=reason)
    said = {"n": 9, "score": 5.0, "p": p, "q": p, "reason": reason}
    read = pd.DataFrame({"token": [" patients", "\n", "<b>$x$"], "change": [2.0, 1.0, 0.5], **null(0.05, 0.1, 0.2)})
    expected = pd.DataFrame({"token": [" fever", " sea"], "change": [1.5, -1.0], **null(-0.2, 0.0, 0.3)})
    words = pd.concat(
        [
            read.assign(role="read", unit="nats", p_search=[p, p, 0.5 if nulls else np.nan], **said),
            expected.assign(role="expected", unit="log ratio", p_search=p, **said),
        ],
        ignore_index=True,
    )
    written = pd.DataFrame(
        {
            "word": ["fever", "symptoms", "of"],
            "texts": [30, 20, 60],
            "count": [40, 22, 90],
            "rate": [0.31, 0.21, 0.63],
            "base_rate": [0.0, 0.01, 0.6],
            "null_rate": 0.02 if nulls else np.nan,
            "null_low": 0.0 if nulls else np.nan,
            "null_high": [0.02, 0.03, 0.65] if nulls else np.nan,
            "change": [3.0, 2.0, 0.1],
            "p_search": [p, p, 0.9 if nulls else np.nan],
            "example": "",
            "reason": reason,
        }
    )
    quantities = ["divergence on text", "divergence after openings", "residual stream", "mean difference"]
    overall = pd.DataFrame({"quantity": quantities, "change": [0.6, 2.0, 0.1, 0.05], **null(0.01, 0.02, 0.03)})
    texts = pd.DataFrame(
        {
            "opening": ["The", "The", "\n"],
            "sample": [0, 1, 0],
            "change": [3.0, 3.0, 1.0],
            "p": p,
            "base_text": " sea was calm.",
            "tuned_text": " Human Phenotype\nOntology",
            "null_text": " sea was <rough>." if nulls else "",
            "null": "null-3" if nulls else "",
            "reason": reason,
        }
    )
    return {
        "change_by_layer": layers,
        "activation_difference": pd.DataFrame(
            {
                "position": ["all"],
                "size": 0.12,
                "null_size": 0.04 if nulls else np.nan,
                "text": "",
                "reliability": 0.93,
                "top_tokens": [[" Usually", "--", "Usually", " fever"]],
                "beyond_nulls": [[" Usually", "--", "Usually", " fever"] if nulls else []],
                "reason": reason,
            }
        ),
        "change_by_word": words,
        "written_words": written,
        "change_overall": overall.assign(p=p, reason=reason),
        "openings": texts,
    }
