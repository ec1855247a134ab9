"""What the feature pages read from, kept on the site: the study, its tables, the index over all features, and what was
said about them: by people in the app, in place of what a run was given, and by a language model.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from saeffect.errors import BadFile, SaeffectError, first_line
from saeffect.review.queue import fingerprint_tokens
from saeffect.review.store import STORE, VerdictStore
from saeffect.review.verdicts import summarise_verdicts
from saeffect.study.label import label_file, read_labels
from saeffect.web.features.index import FeatureIndex, Verdicts
from saeffect.web.features.record import Record, feature_record
from saeffect.web.features.tables import ArmRoles, RunTables, read_index

if TYPE_CHECKING:
    from saeffect.study.study import Study
    from saeffect.web.site import Site

__all__ = ["Catalogue", "catalogue"]

_OF_ARMS = ("features", "coherence", "selection", "effects")
_OF_BOTH = ("changes", "fates_control", "fates_treatment", "absorption")
Given = Mapping[int, list[dict[str, Any]]]
"""By place in the index, the verdicts that stand: rater, role, verdict, label, note, given."""
ModelLabels = Mapping[int, Mapping[str, Any]]
"""By place in the index, the row of a language model's label, see `saeffect.study.label.label`."""
_SHOWN = ["rater", "role", "verdict", "label", "note", "given"]


@dataclass(frozen=True, eq=False)
class Catalogue:
    """A study, its tables, and the index over the features that are there now."""

    study: Study
    arms: ArmRoles
    tables: RunTables
    index: FeatureIndex
    given: Given = field(default_factory=dict)
    model_labels: ModelLabels = field(default_factory=dict)

    def record(self, arm: str, number: int) -> Record:
        """All about a feature, see `feature_record`; with what people and a language model said."""
        try:
            record = feature_record(self.index, self.tables, self.arms, self.study, arm, number)
        except SaeffectError:
            raise
        except (KeyError, TypeError, ValueError) as error:
            what = f"the tables of this feature are not as this version writes them ({first_line(error)})."
            raise BadFile(what, at=str(self.tables.folder), fix="run the study again.") from error
        record["verdicts"]["given"] = self.given.get(self.index.place(arm, number), [])
        record["model_label"] = self.model_labels.get(self.index.place(arm, number))
        return record


def catalogue(site: Site, *, blind: bool = False) -> Catalogue:
    """The catalogue of a run directory, made again when a table changes; errors as `Site.study`.

    `blind`: without what people and a language model said, so that nothing sways a rater.
    """
    study = site.study
    known = _files(site.folder, site.arms)

    def make() -> Catalogue:
        roles = {name: arm.role for name, arm in study.config.arms.items()}
        control, treatment = (study.config.arms[name].sae for name in study.pair)
        arms = ArmRoles(
            roles,
            study.control,
            study.treatment,
            one_sae=control is not None and control == treatment,
        )
        tables = RunTables(site)
        index = read_index(tables, arms)
        if not study.has_saes:
            index = replace(index, missing=dict.fromkeys(roles, "this study has no SAEs"))
        return Catalogue(study, arms, tables, index)

    found = site.cached("feature catalogue", known, make)
    if blind:
        return site.cached(
            "feature catalogue, blind", known, lambda: replace(found, index=_without_verdicts(found.index))
        )
    store = site.folder / STORE

    def judged() -> Catalogue:
        given, labels = _read_given(store, found.index), _read_model_labels(site.folder, found.index)
        index = _with_given(found.index, given).with_model_labels(labels)
        return replace(found, index=index, given=given, model_labels=labels)

    # SQLite writes beside its file first.
    said = [store, store.with_name(f"{STORE}-wal"), *(label_file(site.folder, arm) for arm in study.config.arms)]
    return site.cached("feature catalogue, judged", [*known, *said], judged)


@functools.lru_cache(maxsize=4)
def _files(folder: Path, arms: tuple[str, ...]) -> tuple[Path, ...]:
    """What the index is made from."""
    of_arms = (folder / "arms" / arm / f"{name}.parquet" for arm in arms for name in _OF_ARMS)
    return (folder / "study.yaml", *of_arms, *(folder / "comparison" / f"{name}.parquet" for name in _OF_BOTH))


def _read_given(store: Path, index: FeatureIndex) -> Given:
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


def _with_given(index: FeatureIndex, given: Given) -> FeatureIndex:
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


def _without_verdicts(index: FeatureIndex) -> FeatureIndex:
    """The index without anything that people said, in the app or before the run."""
    none = np.zeros(len(index), dtype=np.int64)
    return index.with_verdicts(Verdicts(none, none, none, [""] * len(index)))


def _read_model_labels(folder: Path, index: FeatureIndex) -> ModelLabels:
    """The labels of a language model on features of the index as they are."""
    found: dict[int, Mapping[str, Any]] = {}
    for arm in index.arms:
        for row in read_labels(folder, arm).to_dict("records"):
            with contextlib.suppress(SaeffectError):  # a feature that is gone
                place = index.place(arm, row["feature"])
                if row["seen"] == fingerprint_tokens(index.top_tokens(place)):
                    found[place] = row
    return found
