"""Tables of the stage `match` with known contents: few enough features to count by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd

from saeffect.comparison import MatchTables

MEASURES = ("decoder cosine", "activation correlation")
NOTHING = float("nan")
NO_PLACEBO = "there is no placebo arm, so nobody knows how well two seeds of the same model match"
# Features of the control: 0 and 1 gone, 2 moved, 3 absorbed by 5 and 6 of the treatment, 4 to 59 kept, the rest unclear.
CONTROL = {"gone": range(2), "moved": range(2, 3), "absorbed": range(3, 4), "kept": range(4, 60)}
TREATMENT = {"new": range(3), "kept": range(3, 60)}


def synthetic_matches(n: int = 120, *, called: bool = True, placebo: bool = True) -> MatchTables:
    """Matches of `n` features a side.

    Args:
        n: Features of either SAE, at least 60.
        called: Whether any single feature is called gone, moved, absorbed or new.
        placebo: Whether other seeds of the control's model were there.
    """
    control, treatment = (_fates(n, which, called and placebo, placebo) for which in (CONTROL, TREATMENT))
    return MatchTables(
        fates_control=control.assign(drop=np.where(control["p"].notna(), 0.3, NOTHING)),
        fates_treatment=treatment,
        fate_counts=_counts(n, called, placebo),
        fates_null=pd.DataFrame(
            {
                "measure": "decoder cosine",
                "side": ["control", "control"],
                "reference": "control",
                "stand_in": ["placebo", "treatment"],
                "is_null": [True, False],
                "tested": [100, 100],
                "low_p": [1, 30],
                "called": [0, 4 if called else 0],
                "drift": 0.0,
                "reason": "",
            }
        ).iloc[0 if placebo else 1 :],
        cross_activity=cross_activity(n),
        absorption=pd.DataFrame(
            {
                "feature": [3],
                "measures": ["decoder cosine"],
                "n_active": [40],
                "absorbed": [called],
                "absorbed_by": [[5, 6]],
                "recall": [0.8],
                "cosine": [0.9],
                "reason": [""],
            }
        ),
        stagewise=stagewise(n),
    )


def cross_activity(n: int = 120) -> pd.DataFrame:
    """Features 0 to 9 are of the domain: 0 to 4 fire twice as much, 5 and 6 half as much; of the others 10 and 11 fire
    more, 12 was silent before, and the last never fires."""
    before = np.full(n, 0.25)
    after = before.copy()
    after[:5], after[5:7], after[10:12] = 0.5, 0.125, 0.5
    before[12], after[12] = 0.0, 1.0
    before[n - 1] = after[n - 1] = 0.0
    changed = before != after
    q = np.where(changed, 0.001, 0.8)
    q[n - 1] = NOTHING
    return pd.DataFrame(
        {
            "feature": np.arange(n),
            "mean_control": before,
            "mean_treatment": after,
            "difference": after - before,
            "low": after - before - 0.05,
            "high": after - before + 0.05,
            "p": q,
            "q": q,
            "n_rows": 40,
            "reason": ["" if i < n - 1 else "it fires in neither model on this text" for i in range(n)],
            "is_domain": np.arange(n) < 10,
        }
    )


def stagewise(n: int = 120) -> pd.DataFrame:
    """Feature 7 turned by 60 degrees, 50 of them beyond training alone; all others as in the null."""
    turned = np.where(np.arange(n) == 7, 60.0, 10.0)
    table = pd.DataFrame(
        {
            "feature": np.arange(n),
            "decoder_rotation": turned,
            "null_rotation": 10.0,
            "excess_rotation": turned - 10.0,
            "q": np.where(turned > 10, 0.01, 1.0),
            "reason": "",
        }
    )
    return table.sort_values("decoder_rotation", ascending=False, kind="stable", ignore_index=True)


def _fates(n: int, which: dict[str, range], called: bool, placebo: bool) -> pd.DataFrame:
    frames = []
    for measure in MEASURES:
        fate = np.full(n, "unclear", dtype=object)
        for name, features in which.items():
            if called or name == "kept":
                fate[list(features)] = name
        found = np.isin(fate, ["gone", "moved", "absorbed", "new"])
        similarity = np.where(np.isin(fate, ["kept"]), 0.9, 0.1)
        p = np.where(found, 0.0001, 0.3) if placebo else np.full(n, NOTHING)
        frames.append(
            pd.DataFrame(
                {
                    "measure": measure,
                    "feature": np.arange(n),
                    "match": (np.arange(n) + 1) % n,
                    "similarity": similarity,
                    "kept_at": 0.6 if placebo else NOTHING,
                    "chance_at": 0.5 if placebo else NOTHING,
                    "p": p,
                    "q": np.where(found, 0.01, 0.9) if placebo else p,
                    "fate": fate if placebo else "",
                    "mutual": True,
                    "reason": "" if placebo else NO_PLACEBO,
                }
            )
        )
    return pd.concat(frames, ignore_index=True)


def _counts(n: int, called: bool, placebo: bool) -> pd.DataFrame:
    rows = []
    # side, fate: called; by similarity in the treatment and in a second seed; excess with its interval
    known = {
        ("control", "kept"): (56, 56, 70, -14, -20, -8),
        ("control", "moved"): (1, 4, 4, 0, -3, 3),
        ("control", "gone"): (2, 60, 46, 14, 8, 20),
        ("control", "absorbed"): (1, NOTHING, NOTHING, NOTHING, NOTHING, NOTHING),
        ("treatment", "kept"): (57, 57, 68, -11, -18, -4),
        ("treatment", "moved"): (0, 0, 0, 0, NOTHING, NOTHING),
        ("treatment", "new"): (3, 63, 52, 11, -1, 23),
    }
    for measure in MEASURES:
        for (side, fate), numbers in known.items():
            row = dict(zip(("called", "n_treatment", "n_placebo", "excess", "low", "high"), numbers, strict=True))
            if not called and fate != "kept":
                row["called"] = 0
            reason = "" if row["low"] == row["low"] else "no spread"
            if not placebo:
                row, reason = dict.fromkeys(row, NOTHING), NO_PLACEBO
            rows.append({"measure": measure, "side": side, "fate": fate, **row, "n_features": n, "reason": reason})
    return pd.DataFrame(rows)
