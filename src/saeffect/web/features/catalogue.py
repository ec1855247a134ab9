"""The data behind the feature pages, cached by the site: the study, its tables, the index over all features, verdicts
given in the app (which replace those of the run), and labels by a language model.
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

_ARM_TABLES = ("features", "coherence", "selection", "effects")
_COMPARISON_TABLES = ("changes", "fates_control", "fates_treatment", "absorption")
VerdictRows = Mapping[int, list[dict[str, Any]]]
"""By position in the index, the verdicts in force: rater, role, verdict, label, note, given."""
ModelLabels = Mapping[int, Mapping[str, Any]]
"""By position in the index, the row of a language model's label, see `saeffect.study.label.label`."""
_VERDICT_COLUMNS = ["rater", "role", "verdict", "label", "note", "given"]


@dataclass(frozen=True, eq=False)
class Catalogue:
    """A study, its tables, and the index over the features that the run has so far."""

    study: Study
    arms: ArmRoles
    tables: RunTables
    index: FeatureIndex
    verdicts: VerdictRows = field(default_factory=dict)
    model_labels: ModelLabels = field(default_factory=dict)

    def record(self, arm: str, number: int) -> Record:
        """The `feature_record` of a feature, with its verdicts and model label."""
        try:
            record = feature_record(self.index, self.tables, self.arms, self.study, arm, number)
        except SaeffectError:
            raise
        except (KeyError, TypeError, ValueError) as error:
            message = f"the tables of this feature are not as this version writes them ({first_line(error)})."
            raise BadFile(message, at=str(self.tables.folder), fix="run the study again.") from error
        record["verdicts"]["given"] = self.verdicts.get(self.index.position(arm, number), [])
        record["model_label"] = self.model_labels.get(self.index.position(arm, number))
        return record


def catalogue(site: Site, *, blind: bool = False) -> Catalogue:
    """The catalogue of a run directory, rebuilt when a table changes; errors as `Site.study`.

    `blind`: without verdicts and model labels, which could bias a rater.
    """
    study = site.study
    files = _index_files(site.folder, site.arms)

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

    base = site.cached("feature catalogue", files, make)
    if blind:
        return site.cached(
            "feature catalogue, blind", files, lambda: replace(base, index=_without_verdicts(base.index))
        )
    store = site.folder / STORE

    def add_verdicts() -> Catalogue:
        verdicts, labels = _read_verdicts(store, base.index), _read_model_labels(site.folder, base.index)
        index = _with_verdicts(base.index, verdicts).with_model_labels(labels)
        return replace(base, index=index, verdicts=verdicts, model_labels=labels)

    # SQLite writes to the -wal file first.
    stores = [store, store.with_name(f"{STORE}-wal"), *(label_file(site.folder, arm) for arm in study.config.arms)]
    return site.cached("feature catalogue, judged", [*files, *stores], add_verdicts)


@functools.lru_cache(maxsize=4)
def _index_files(folder: Path, arms: tuple[str, ...]) -> tuple[Path, ...]:
    """The files behind the index."""
    of_arms = (folder / "arms" / arm / f"{name}.parquet" for arm in arms for name in _ARM_TABLES)
    of_comparison = (folder / "comparison" / f"{name}.parquet" for name in _COMPARISON_TABLES)
    return (folder / "study.yaml", *of_arms, *of_comparison)


def _read_verdicts(store: Path, index: FeatureIndex) -> VerdictRows:
    """The stored verdicts on features of the index whose tokens have not changed since."""
    if not store.is_file():
        return {}
    try:
        with VerdictStore(store) as verdict_store:
            table = verdict_store.current()
    except SaeffectError:  # the review pages report it
        return {}
    verdicts: dict[int, list[dict[str, Any]]] = {}
    for row in table[table["kind"] == "feature"].to_dict("records"):
        try:
            position = index.position(str(row["arm"]), int(row["feature"]))
        except SaeffectError:  # no longer a feature
            continue
        if row["seen"] == fingerprint_tokens(index.top_tokens(position)):
            verdicts.setdefault(position, []).append({str(name): row[name] for name in _VERDICT_COLUMNS})
    return verdicts


def _with_verdicts(index: FeatureIndex, verdicts: VerdictRows) -> FeatureIndex:
    """The index with these verdicts, of which an adjudication overrides all others; other features keep the run's."""
    if not verdicts:
        return index
    from_run = index.verdicts
    counts = {name: np.array(getattr(from_run, name)) for name in ("n_yes", "n_no", "n_unsure")}
    labels = list(from_run.labels)
    decisive = {
        position: [row for row in rows if row["role"] == "adjudicator"][-1:] or rows
        for position, rows in verdicts.items()
    }
    table = pd.DataFrame([{**row, "feature": i, "arm": ""} for i, rows in decisive.items() for row in rows])
    for summary in summarise_verdicts(table, "").to_dict("records"):
        position = summary["feature"]
        for name, column in counts.items():
            column[position] = summary[name]
        # A label is shown even if the feature is not of the domain.
        labels_of_others = [row["label"] for row in decisive[position] if row["label"]]
        labels[position] = str(summary["label"]) or next(reversed(labels_of_others), labels[position])
    return index.with_verdicts(Verdicts(**counts, labels=labels))


def _without_verdicts(index: FeatureIndex) -> FeatureIndex:
    """The index without verdicts, neither those of the app nor the run's."""
    zeros = np.zeros(len(index), dtype=np.int64)
    return index.with_verdicts(Verdicts(zeros, zeros, zeros, [""] * len(index)))


def _read_model_labels(folder: Path, index: FeatureIndex) -> ModelLabels:
    """A language model's labels of features of the index whose tokens have not changed since."""
    labels: dict[int, Mapping[str, Any]] = {}
    for arm in index.arms:
        for row in read_labels(folder, arm).to_dict("records"):
            with contextlib.suppress(SaeffectError):  # no longer a feature
                position = index.position(arm, row["feature"])
                if row["seen"] == fingerprint_tokens(index.top_tokens(position)):
                    labels[position] = row
    return labels
