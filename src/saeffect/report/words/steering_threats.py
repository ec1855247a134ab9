"""What threatens the answer in how features were steered."""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from saeffect.comparison.arms import ArmTables, Roles
from saeffect.comparison.measures import untested_reason
from saeffect.report.words.numbers import count, joined, percent
from saeffect.report.words.threat import Threat

__all__ = ["steering_threats"]

_FEW = 20
# Shares of texts without a similarity: from the first on effects are less sure, above the second they may be wrong.
_SOME, _BROKEN = 0.05, 0.2


def steering_threats(arms: Mapping[str, ArmTables], roles: Roles, table1: pd.DataFrame) -> list[Threat]:
    """Threats of features that were not tested, or not alike.

    Args:
        arms: The arms by name.
        roles: Who is control, treatment and placebo.
        table1: `tables.table1`, indexed by arm.
    """
    found = []
    tested = {name: int(table1.loc[name, "tested"]) for name in roles.ordered}
    source = "comparison/table1.parquet: tested, domain_features"
    untested = [name for name, n in tested.items() if not n]
    if untested:
        reasons = "; ".join(dict.fromkeys(untested_reason(arms[name]) for name in untested))
        found.append(
            Threat(
                f"No feature of {joined(untested)} was tested by steering: {reasons}.",
                "moderate",
                "Steer features of every arm, or make no claim about what features cause.",
                source,
            )
        )
    few = [f"{count(n)} in {name}" for name, n in tested.items() if 0 < n < _FEW]
    if few:
        found.append(
            Threat(
                f"Few features were tested ({joined(few)}), so pass rates and effects are rough.",
                "moderate",
                "Raise steering.max_features.",
                source,
            )
        )
    partly = [
        f"{count(n)} of {count(int(table1.loc[name, 'domain_features']))} in {name}"
        for name, n in tested.items()
        if 0 < n < int(table1.loc[name, "domain_features"])
    ]
    if partly:
        found.append(
            Threat(
                f"Not every domain feature was tested ({joined(partly)}): pass rates and effects speak for the tested "
                "ones.",
                "minor",
                "Raise steering.max_features.",
                source,
            )
        )
    return found + _of_undefined(arms, roles) + _of_trials(arms, roles, any(tested.values()))


def _of_undefined(arms: Mapping[str, ArmTables], roles: Roles) -> list[Threat]:
    """Texts without a similarity: they are left out of the test, and what broke them is left out with them."""
    texts = {name: arms[name].interventions for name in roles.ordered}
    undefined = {name: some["similarity"].isna() for name, some in texts.items() if some is not None and len(some)}
    shares = {name: float(of_texts.mean()) for name, of_texts in undefined.items()}
    worst = max(shares.values(), default=0.0)
    if not worst:
        return []
    listed = joined([f"{percent(share)} of texts in {name}" for name, share in shares.items()])
    return [
        Threat(
            f"Similarity was undefined in {listed}: no word of the text, or of the feature's top tokens, has a vector. "
            "Such pairs are left out, so effects speak for the others.",
            "serious" if worst > _BROKEN else "moderate" if worst > _SOME else "minor",
            "Read the texts. Where steering breaks them, use a smaller dose; where they are of another language, use "
            "word vectors that know it, or declare another outcome.",
            "arms/*/interventions.parquet: similarity",
        )
    ]


def _of_trials(arms: Mapping[str, ArmTables], roles: Roles, tested: bool) -> list[Threat]:
    found = []
    if tested:
        found += [
            Threat(
                "The paper's rule passes about half of all features whose steering does nothing at all.",
                "minor",
                "Read our pass rate; the paper's stands beside it for comparison only.",
                "comparison/table1.parquet: paper_rate",
            ),
            Threat(
                "A feature that passes moved the texts of these prompts more than its placebos did on average. "
                "The test counts every prompt (every text, where prompts are few) as independent and does not say how "
                "often one fixed placebo would pass too; read pass rates against each other, not as a share of "
                "features that work.",
                "minor",
                "Compare pass rates between arms; steer with more prompts.",
                "arms/*/effects.parquet: n_pairs, p",
            ),
        ]
    doses = {name: _doses(arms[name]) for name in roles.ordered}
    if any(len(found_doses) > 1 for found_doses in doses.values()):
        found.append(
            Threat(
                "The paper's Table 1 pools the trials of several doses.",
                "moderate",
                "Read effects dose by dose.",
                "arms/*/interventions.parquet: dose",
            )
        )
    used = {dose for found_doses in doses.values() for dose in found_doses}
    if len(used) > 1 and all(len(found_doses) <= 1 for found_doses in doses.values()):
        listed = joined([f"{dose[0]:g} in {name}" for name, dose in doses.items() if dose])
        found.append(
            Threat(
                f"The arms were steered at different doses ({listed}), so their effects are not alike.",
                "serious",
                "Steer every arm at one dose.",
                "arms/*/interventions.parquet: dose",
            )
        )
    return found


def _doses(arm: ArmTables) -> list[float]:
    if arm.interventions is None:
        return []
    trials = arm.interventions
    return sorted({float(dose) for dose in trials.loc[trials["condition"] == "steered", "dose"]})
