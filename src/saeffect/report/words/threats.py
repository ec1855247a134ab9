"""What threatens the answer, how serious each threat is, and what to do about it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import pandas as pd
from scipy.special import stdtrit

from saeffect.comparison.arms import ArmTables, Roles
from saeffect.comparison.findings import Comparison
from saeffect.comparison.judgement import ALPHA, judge
from saeffect.comparison.measures import top_token_coverage
from saeffect.report.words.evidence import too_many_alarms
from saeffect.report.words.names import short_name
from saeffect.report.words.numbers import count, fixed, joined, percent
from saeffect.report.words.steering_threats import steering_threats
from saeffect.report.words.threat import SEVERITIES, Threat

__all__ = ["threats"]

# Below these an SAE leaves so much of its model out that its features may not be the model's.
_POOR = {"explained_variance": (0.5, 0.7), "ce_loss_score": (0.8, 0.9)}
_MANY_DEAD = 0.2
# Share of top tokens that the word vectors know, below which coherence speaks for the lesser part of them.
_LITTLE_KNOWN = 0.5
# With as many SAEs in all, a change of some two standard deviations can be told from noise.
_ENOUGH_SAES = 5
_COUNTED = {1: "one quantity", 2: "two quantities", 3: "three quantities"}


def threats(
    arms: Mapping[str, ArmTables],
    roles: Roles,
    found: Comparison,
    tests: Sequence[str],
) -> list[Threat]:
    """Limits of this very comparison and then those of every comparison of its kind, the gravest first.

    Each is read off a table; none is written for a study.

    Args:
        arms: The arms by name.
        roles: Who is control, treatment and placebo.
        found: All tables.
        tests: The declared quantities.
    """
    first, second = found.table1.set_index("arm"), found.table2.set_index("arm")
    listed = [
        *_of_alarms(found.calibration),
        *_of_design(found.design),
        *_of_gate(arms, roles),
        *_of_noise(found.contrasts, tests),
        *_of_seeds(arms, roles),
        *steering_threats(arms, roles, first),
        *_of_coverage(arms, roles),
        *_of_coherence(roles, second),
        *_of_selection(arms, roles),
        *_of_scope(found, tests),
    ]
    return sorted(listed, key=lambda one: SEVERITIES.index(one.severity))


def _of_alarms(calibration: pd.DataFrame) -> list[Threat]:
    source = "comparison/calibration.parquet: verdict"
    bad = [] if calibration.empty else too_many_alarms(calibration, list(dict.fromkeys(calibration["test"])))
    if bad:
        return [
            Threat(
                "Where there is nothing to find, these tests found something more often than they promise: "
                f"{', '.join(short_name(name) for name in bad)}. "
                "Their findings in the treatment are not to be believed.",
                "serious",
                "Disregard what these tests find, or train more SAEs of the control's model until they keep their "
                "promise.",
                source,
            )
        ]
    judged = pd.DataFrame() if calibration.empty else calibration[calibration["declared"] & (calibration["tests"] > 0)]
    if judged.empty:
        return [
            Threat(
                "Nobody knows how often these tests find something where there is nothing to find: no two SAEs of the "
                "control's model could stand in for control and treatment.",
                "moderate",
                "Train two more SAEs of the control's model from other seeds, one as a placebo arm and one under "
                "more_saes.",
                source,
            )
        ]
    return []


def _of_design(design: pd.DataFrame) -> list[Threat]:
    found = [
        Threat(
            f"Design flaw ({field}). {matters}",
            "serious",
            "Make the arms equal in it and run again; until then the difference may come from it.",
            f"comparison/design.parquet: {field}",
        )
        for field, matters in design.loc[design["status"] == "flaw", ["field", "matters"]].itertuples(index=False)
    ]
    unknown = list(design.loc[design["status"] == "unknown", "field"])
    if unknown:
        found.append(
            Threat(
                f"Not recorded for every arm, so not checked: {joined(unknown)}.",
                "moderate",
                "Record it beside the SAE (training.json), or train the SAEs here.",
                "comparison/design.parquet: status",
            )
        )
    return found


def _of_gate(arms: Mapping[str, ArmTables], roles: Roles) -> list[Threat]:
    """SAEs that fit their model badly, by what was measured when the study began."""
    found = []
    words = {
        "explained_variance": "reproduces {share} of the variance of its model's activations",
        "ce_loss_score": "keeps {share} of its model's predictive power",
    }
    for field, (worst, poor) in _POOR.items():
        values = {name: getattr(arms[name].facts, field) for name in roles.ordered}
        # An undefined value is as bad as the worst: nothing says that the SAE fits.
        low = {name: float(value) for name, value in values.items() if value is not None and not float(value) >= poor}
        if low:
            parts = joined(
                [
                    f"{name}'s SAE "
                    + words[field].format(share="an undefined share" if math.isnan(share) else percent(share))
                    for name, share in low.items()
                ]
            )
            found.append(
                Threat(
                    f"{parts}: what it leaves out cannot show as a feature.",
                    "moderate" if all(share >= worst for share in low.values()) else "serious",
                    "Train the SAE longer or wider, at a hook where it fits.",
                    f"comparison/design.parquet: {field}",
                )
            )
    shares = {name: arms[name].facts.dead_share for name in roles.ordered}
    dead = {name: float(share) for name, share in shares.items() if share is not None and share > _MANY_DEAD}
    if dead:
        parts = joined([f"{percent(share)} in {name}" for name, share in dead.items()])
        found.append(
            Threat(
                f"Many features never fired on the study's text ({parts}); about these nothing can be said.",
                "moderate",
                "Give the study more text, or train the SAE with a remedy for dead features.",
                "comparison/design.parquet: dead_share",
            )
        )
    return found


def _of_noise(contrasts: pd.DataFrame, tests: Sequence[str]) -> list[Threat]:
    """Declared quantities for which few SAEs, or none, show how much SAEs of one model differ."""
    judged = [judge(contrasts, name) for name in tests if name in set(contrasts["quantity"])]
    unknown = [one for one in judged if not one.retraining and one.seeds is None]
    found = []
    if judged and len(unknown) == len(judged):
        found.append(
            Threat(
                "There is no placebo arm (the control's model with an SAE of another seed), "
                "so SAE noise is unknown and no difference can be credited to fine-tuning.",
                "serious",
                "Train an SAE of the control's model from another seed and add it as an arm with role: placebo.",
                "comparison/design.parquet: role",
            )
        )
    sizes = {one.quantity: one.n_saes for one in judged if one.seeds is not None and sum(one.n_saes) < _ENOUGH_SAES}
    for n_a, n_b in sorted(set(sizes.values())):
        names = joined([short_name(name) for name, size in sizes.items() if size == (n_a, n_b)])
        reach = float(stdtrit(n_a + n_b - 2, 1 - ALPHA / 2)) * math.sqrt(1 / n_a + 1 / n_b)
        found.append(
            Threat(
                f"Few SAEs show how much SAEs of one model differ ({_of_saes(n_a)} of the control's model, "
                f"{_of_saes(n_b)} of the treatment's): a change of the {names} is credited to fine-tuning only if it "
                f"is more than {fixed(reach, 1)} standard deviations of such SAEs. Smaller changes go unnoticed; one "
                "in twenty such studies still credits fine-tuning wrongly.",
                "moderate",
                "Train further SAEs of both models from other seeds and name them under more_saes; what needs steering "
                "(the pass rate, effects) needs placebo arms.",
                "comparison/contrasts.parquet: p_noise, saes_a, saes_b",
            )
        )
    return found


def _of_saes(n: int) -> str:
    return "one SAE" if n == 1 else f"{n} SAEs"


def _of_seeds(arms: Mapping[str, ArmTables], roles: Roles) -> list[Threat]:
    single = [name for name in (roles.control, roles.treatment) if arms[name].seeds is None]
    if not single:
        return []
    return [
        Threat(
            f"There is one SAE of {joined(single)}, so intervals do not hold the noise of SAE training: another seed "
            "would have given other features.",
            "moderate",
            "Train further SAEs from other seeds and name them under more_saes.",
            "comparison/contrasts.parquet: saes_a, saes_b",
        )
    ]


def _of_coverage(arms: Mapping[str, ArmTables], roles: Roles) -> list[Threat]:
    """Word vectors that know few of the top tokens, as those of one language do in a vocabulary of many."""
    shares = {name: top_token_coverage(arms[name]) for name in roles.ordered}
    low = {name: share for name, share in shares.items() if share < _LITTLE_KNOWN}
    if not low:
        return []
    listed = joined([f"{percent(share)} in {name}" for name, share in low.items()])
    return [
        Threat(
            f"The word vectors know few of the features' top tokens ({listed}): they and the vocabulary judge features "
            "by the lesser part of what these promote, so coherence and the number of domain features are too low.",
            "serious",
            "If the model writes many languages, rank only tokens of the vectors' script (features.tokens: latin) or "
            "those that they know (features.tokens: embeddings); otherwise give vectors and a vocabulary of the "
            "model's language.",
            "arms/*/coherence.parquet: n_known; arms/*/features.parquet: top_tokens",
        )
    ]


def _of_coherence(roles: Roles, table2: pd.DataFrame) -> list[Threat]:
    missing = {name: int(table2.loc[name, "n_undefined"]) for name in roles.ordered}
    if not any(missing.values()):
        return []
    listed = joined([f"{count(n)} in {name}" for name, n in missing.items()])
    return [
        Threat(
            f"Coherence is undefined for some domain features ({listed}); they are left out of its mean, not counted "
            "as 0.",
            "minor",
            "Use word vectors that know more of the top tokens.",
            "comparison/table2.parquet: n_undefined",
        )
    ]


def _of_selection(arms: Mapping[str, ArmTables], roles: Roles) -> list[Threat]:
    if any(_has_verdicts(arms[name].selection) for name in roles.ordered):
        return []
    return [
        Threat(
            "No person has judged the features: domain features are those that the vocabulary picks.",
            "moderate",
            "Let people judge them blindly, name their verdicts under selection.verdicts, and run the study again.",
            "arms/*/selection.parquet: n_yes, n_no",
        )
    ]


def _of_scope(found: Comparison, tests: Sequence[str]) -> list[Threat]:
    """What no comparison of this kind can escape."""
    contrasts = found.contrasts
    n = int(((contrasts["comparison"] == "fine-tuning") & contrasts["low"].notna()).sum())
    listed = [
        Threat(
            f"The table holds {n} contrasts of control with treatment: of such intervals, about one in twenty "
            f"misses zero by chance. The headline looks at {_COUNTED.get(len(tests), f'{len(tests)} quantities')} "
            f"fixed in advance ({', '.join(short_name(name) for name in tests)}) and corrects for their number.",
            "minor",
            "Take contrasts that were not declared as questions for another study.",
            "comparison/contrasts.parquet: declared",
        ),
        Threat(
            "Intervals are over the features of these SAEs, taken as independent of each other, unless they are said "
            "to be over SAE seeds. They do not cover other prompts, texts or vocabularies.",
            "minor",
            "Repeat the study with another text, other prompts and another vocabulary.",
            "comparison/contrasts.parquet: remark",
        ),
    ]
    if not found.matches.fate_counts.empty:
        listed.append(
            Threat(
                "Features are matched on the study's text and only where they fire there. A feature that is called "
                "gone may live on in several others, which is looked for among those that fire with it.",
                "minor",
                "Match on more text.",
                "comparison/fates_control.parquet: fate",
            )
        )
    if not found.matches.cross_activity.empty:
        listed.append(
            Threat(
                "That a feature of the control's SAE fires more in the fine-tuned model has no placebo here: any "
                "further training, on any text, moves the activations of many features a little.",
                "moderate",
                "Read the sizes, and domain features against all others; or fine-tune once more on general text and "
                "compare with that.",
                "comparison/cross_activity.parquet: difference, is_domain",
            )
        )
    listed += _of_power(found.power)
    return listed


def _of_power(power: pd.DataFrame) -> list[Threat]:
    """Declared tests that could hardly have found what they saw."""
    if power.empty:
        return []
    rows = power[power["detectable"].notna() & power["observed"].notna() & ~power["test"].str.contains("feature ")]
    weak = [str(row.test) for row in rows.itertuples() if abs(row.observed) < row.detectable]
    if not weak:
        return []
    sizes = [
        f"{short_name(row.test)} {_size(row.detectable, row.unit)}" for row in rows.itertuples() if row.test in weak
    ]
    return [
        Threat(
            f"Smaller differences than these would mostly have been missed: {joined(sizes)}. "
            "That such a test found nothing does not mean that there is nothing.",
            "minor",
            "More SAEs of either model, and more features tested, make smaller differences visible.",
            "comparison/power.parquet: detectable, observed",
        )
    ]


def _size(value: float, unit: str) -> str:
    return f"{fixed(100 * value, 1)} percentage points" if unit == "share" else fixed(value, 3)


def _has_verdicts(selection: pd.DataFrame) -> bool:
    columns = [column for column in ("n_yes", "n_no", "n_unsure") if column in selection.columns]
    return bool(columns) and bool(selection[columns].to_numpy().sum())
