"""What people said about features in the app, which takes the place of what a run was given; and a model's labels."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from saeffect.errors import SaeffectError
from saeffect.review.queue import fingerprint_tokens
from saeffect.review.store import VerdictStore
from saeffect.review.verdicts import summarise_verdicts
from saeffect.study.label import read_labels
from saeffect.web.features.index import FeatureIndex, Verdicts

__all__ = ["Given", "ModelLabels", "read_given", "read_model_labels", "with_given", "without_verdicts"]

Given = Mapping[int, list[dict[str, Any]]]
"""By place in the index, the verdicts that stand: rater, role, verdict, label, note, given."""
ModelLabels = Mapping[int, Mapping[str, Any]]
"""By place in the index, the row of a language model's label, see `saeffect.study.label.label`."""
_SHOWN = ["rater", "role", "verdict", "label", "note", "given"]


def read_given(store: Path, index: FeatureIndex) -> Given:
    """The verdicts of a store on features of the index whose tokens are still those that were judged."""
    if not store.is_file():
        return {}
    try:
        with VerdictStore(store) as opened:
            table = opened.current()
    except SaeffectError:  # the review says what is wrong with it
        return {}
    found: dict[int, list[dict[str, Any]]] = {}
    for row in table[table["kind"] == "feature"].to_dict("records"):
        try:
            place = index.place(str(row["arm"]), int(row["feature"]))
        except SaeffectError:  # a feature that is gone
            continue
        if row["seen"] == fingerprint_tokens(index.top_tokens(place)):
            found.setdefault(place, []).append({str(name): row[name] for name in _SHOWN})
    return found


def with_given(index: FeatureIndex, given: Given) -> FeatureIndex:
    """The index with these verdicts; an adjudication counts alone. Features without any keep the run's."""
    if not given:
        return index
    old = index.verdicts
    counts = {name: np.array(getattr(old, name)) for name in ("n_yes", "n_no", "n_unsure")}
    labels = list(old.labels)
    for place, rows in given.items():
        deciding = [row for row in rows if row["role"] == "adjudicator"][-1:] or rows
        summary = summarise_verdicts(pd.DataFrame(deciding).assign(feature=place, arm=""), "").iloc[0]
        for name, column in counts.items():
            column[place] = summary[name]
        # A name is worth showing, too, where the feature is of another domain.
        others = [row["label"] for row in deciding if row["label"]]
        labels[place] = str(summary["label"]) or next(reversed(others), labels[place])
    return index.with_verdicts(Verdicts(**counts, labels=labels))


def without_verdicts(index: FeatureIndex) -> FeatureIndex:
    """The index without anything that people said, in the app or before the run."""
    none = np.zeros(len(index), dtype=np.int64)
    return index.with_verdicts(Verdicts(none, none, none, [""] * len(index)))


def read_model_labels(folder: Path, index: FeatureIndex) -> ModelLabels:
    """The labels of a language model on features of the index as they are."""
    found: dict[int, Mapping[str, Any]] = {}
    for arm in index.arms:
        for row in read_labels(folder, arm).to_dict("records"):
            with contextlib.suppress(SaeffectError):  # a feature that is gone
                place = index.place(arm, row["feature"])
                if row["seen"] == fingerprint_tokens(index.top_tokens(place)):
                    found[place] = row
    return found
