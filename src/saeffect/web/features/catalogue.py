"""What the feature pages read from, kept on the site: the study, its tables, the index over all features."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from saeffect.web.features.index import FeatureIndex
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

    def record(self, arm: str, number: int) -> Record:
        """All about a feature, see `feature_record`."""
        return feature_record(self.index, self.tables, self.arms, self.study, arm, number)


def catalogue(site: Site) -> Catalogue:
    """The catalogue of a run directory, made again when a table changes; errors as `Site.study`."""
    study = site.study
    files = [site.folder / "arms" / arm / f"{name}.parquet" for arm in study.config.arms for name in _OF_ARMS]
    files += [site.folder / "comparison" / f"{name}.parquet" for name in _OF_BOTH]

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

    return site.cached("feature catalogue", [site.folder / "study.yaml", *files], make)
