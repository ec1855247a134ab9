"""What a reader must know before believing the answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd

from saeffect.comparison.arms import ArmTables, Roles
from saeffect.comparison.evidence_words import short_name, too_many_alarms
from saeffect.comparison.findings import Findings
from saeffect.comparison.wording import joined, whole

__all__ = ["caveats"]

_FEW = 20
_COUNTED = {1: "one quantity", 2: "two quantities", 3: "three quantities"}


def caveats(
    arms: Mapping[str, ArmTables],
    roles: Roles,
    table1: pd.DataFrame,
    table2: pd.DataFrame,
    found_tables: Findings,
    tests: Sequence[str],
) -> list[str]:
    """Limits of this very comparison, the gravest first; then those of every comparison of this kind.

    Args:
        arms: The arms by name.
        roles: Who is control, treatment and placebo.
        table1: Indexed by arm.
        table2: Indexed by arm.
        found_tables: All tables.
        tests: The declared quantities.
    """
    contrasts = found_tables.contrasts
    found = [
        *_of_alarms(found_tables.calibration),
        *_of_design(roles, found_tables.design),
        *_of_seeds(arms, roles),
        *_of_tests(arms, roles, table1),
        *_of_coherence(roles, table2),
    ]
    if not any(_has_verdicts(arms[name].selection) for name in roles.ordered):
        found.append("No person has judged the features: domain features are those that the vocabulary picks.")
    n = int(((contrasts["comparison"] == "fine-tuning") & contrasts["low"].notna()).sum())
    found.append(
        f"The table holds {n} contrasts of control with treatment: of such intervals, about one in twenty "
        f"misses zero by chance. The headline looks at {_COUNTED.get(len(tests), f'{len(tests)} quantities')} "
        f"fixed in advance ({', '.join(short_name(name) for name in tests)})."
    )
    found.append(
        "Intervals are over the features of these SAEs, taken as independent of each other, unless they are said to "
        "be over SAE seeds. They do not cover other prompts, texts or vocabularies."
    )
    if not found_tables.matches.fate_counts.empty:
        found.append(
            "Features are matched on the study's text and only where they fire there. A feature that is called gone "
            "may live on in several others, which is looked for among those that fire with it."
        )
    return found


def _of_alarms(calibration: pd.DataFrame) -> list[str]:
    if calibration.empty:
        return []
    bad = too_many_alarms(calibration, list(dict.fromkeys(calibration["test"])))
    if not bad:
        return []
    return [
        f"Where there is nothing to find, these tests found something more often than they promise: "
        f"{', '.join(short_name(name) for name in bad)}. Their findings in the treatment are not to be believed."
    ]


def _of_seeds(arms: Mapping[str, ArmTables], roles: Roles) -> list[str]:
    single = [name for name in (roles.control, roles.treatment) if arms[name].seeds is None]
    if not single:
        return []
    return [
        f"There is one SAE of {joined(single)}, so intervals do not hold the noise of SAE training: another seed would "
        "have given other features."
    ]


def _of_design(roles: Roles, design: pd.DataFrame) -> list[str]:
    found = [
        f"Design flaw ({field}). {matters}"
        for field, matters in design.loc[design["status"] == "flaw", ["field", "matters"]].itertuples(index=False)
    ]
    if not roles.placebos:
        found.append(
            "There is no placebo arm (the control's model with an SAE of another seed), "
            "so SAE noise is unknown and no difference can be credited to fine-tuning."
        )
    elif len(roles.placebos) == 1:
        found.append(
            "One placebo arm is one draw of SAE noise. Where SAE seeds matter more than the intervals know, "
            "such a comparison credits fine-tuning wrongly in up to one study of five; with three placebo "
            "arms, in one of 25."
        )
    unknown = list(design.loc[design["status"] == "unknown", "field"])
    if unknown:
        found.append(f"Not recorded for every arm, so not checked: {joined(unknown)}.")
    return found


def _of_tests(arms: Mapping[str, ArmTables], roles: Roles, table1: pd.DataFrame) -> list[str]:
    found = []
    tested = {name: int(table1.loc[name, "tested"]) for name in roles.ordered}
    untested = [name for name, n in tested.items() if not n]
    if untested:
        found.append(f"No feature of {joined(untested)} was tested by steering.")
    few = [f"{whole(n)} in {name}" for name, n in tested.items() if 0 < n < _FEW]
    if few:
        found.append(f"Few features were tested ({joined(few)}), so pass rates and effects are rough.")
    partly = [
        f"{whole(n)} of {whole(int(table1.loc[name, 'domain_features']))} in {name}"
        for name, n in tested.items()
        if 0 < n < int(table1.loc[name, "domain_features"])
    ]
    if partly:
        found.append(
            f"Not every domain feature was tested ({joined(partly)}): pass rates and effects speak for the tested ones."
        )
    if any(tested.values()):
        found.append("The paper's rule passes about half of all features whose steering does nothing at all.")
        found.append(
            "A feature that passes moved the texts of these prompts more than its placebos did on average. "
            "The test counts every text as independent and does not say how often one fixed placebo "
            "would pass too; read pass rates against each other, not as a share of features that work."
        )
    doses = {name: _doses(arms[name]) for name in roles.ordered}
    if any(len(found_doses) > 1 for found_doses in doses.values()):
        found.append("Table 1 pools the trials of several doses.")
    used = {dose for found_doses in doses.values() for dose in found_doses}
    if len(used) > 1 and all(len(found_doses) <= 1 for found_doses in doses.values()):
        listed = joined([f"{dose[0]:g} in {name}" for name, dose in doses.items() if dose])
        found.append(f"The arms were steered at different doses ({listed}), so their effects are not alike.")
    return found


def _of_coherence(roles: Roles, table2: pd.DataFrame) -> list[str]:
    missing = {name: int(table2.loc[name, "n_undefined"]) for name in roles.ordered}
    if not any(missing.values()):
        return []
    listed = joined([f"{whole(n)} in {name}" for name, n in missing.items()])
    return [
        f"Coherence is undefined for some domain features ({listed}); they are left out of its mean, not counted as 0."
    ]


def _doses(arm: ArmTables) -> list[float]:
    if arm.interventions is None:
        return []
    trials = arm.interventions
    return sorted({float(dose) for dose in trials.loc[trials["condition"] == "steered", "dose"]})


def _has_verdicts(selection: pd.DataFrame) -> bool:
    columns = [column for column in ("n_yes", "n_no", "n_unsure") if column in selection.columns]
    return bool(columns) and bool(selection[columns].to_numpy().sum())
