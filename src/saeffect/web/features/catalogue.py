"""What the feature pages read from, kept on the site: the study, its tables, the index over all features."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from saeffect.errors import BadFile, SaeffectError, first_line
from saeffect.review.store import STORE
from saeffect.study.label import label_file
from saeffect.web.features.index import FeatureIndex
from saeffect.web.features.judged import (
    Given,
    ModelLabels,
    read_given,
    read_model_labels,
    with_given,
    without_verdicts,
)
from saeffect.web.features.record import Record, feature_record
from saeffect.web.features.tables import ArmRoles, RunTables, read_index

if TYPE_CHECKING:
    from saeffect.study.study import Study
    from saeffect.web.site import Site

__all__ = ["Catalogue", "catalogue"]

_OF_ARMS = ("features", "coherence", "selection", "effects")
_OF_BOTH = ("changes", "fates_control", "fates_treatment", "absorption")


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
        saes = {role: study.config.arms[study.by_role(role)[0]].sae for role in ("control", "treatment")}
        arms = ArmRoles(
            roles,
            study.by_role("control")[0],
            study.by_role("treatment")[0],
            one_sae=saes["control"] is not None and saes["control"] == saes["treatment"],
        )
        tables = RunTables(site)
        index = read_index(tables, arms)
        if not study.has_saes:
            index = replace(index, missing=dict.fromkeys(roles, "this study has no SAEs"))
        return Catalogue(study, arms, tables, index)

    found = site.cached("feature catalogue", known, make)
    if blind:
        return site.cached(
            "feature catalogue, blind", known, lambda: replace(found, index=without_verdicts(found.index))
        )
    store = site.folder / STORE

    def judged() -> Catalogue:
        given, labels = read_given(store, found.index), read_model_labels(site.folder, found.index)
        index = with_given(found.index, given).with_model_labels(labels)
        return replace(found, index=index, given=given, model_labels=labels)

    # SQLite writes beside its file first.
    said = [store, store.with_name(f"{STORE}-wal"), *(label_file(site.folder, arm) for arm in study.config.arms)]
    return site.cached("feature catalogue, judged", [*known, *said], judged)


@functools.lru_cache(maxsize=4)
def _files(folder: Path, arms: tuple[str, ...]) -> tuple[Path, ...]:
    """What the index is made from."""
    of_arms = (folder / "arms" / arm / f"{name}.parquet" for arm in arms for name in _OF_ARMS)
    return (folder / "study.yaml", *of_arms, *(folder / "comparison" / f"{name}.parquet" for name in _OF_BOTH))
