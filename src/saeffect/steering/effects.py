"""From trials to one line a feature: what steering did beyond placebo, and whether that could be luck."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pandas as pd

from saeffect.errors import ConfigError, ShapeMismatch
from saeffect.steering.measures import OUTCOMES, OutcomeMeasure, outcome_named
from saeffect.steering.paired import SHUFFLED, Obstacles, paired_values, summarise_pairs, tested_dose
from saeffect.steering.placebo import PLACEBOS, STEERED, UNSTEERED

__all__ = ["effects", "outcome_effects"]

_ORDER = (
    *("feature", "n_pairs", "n_independent", "unsteered_mean", "steered_mean", "placebo_mean"),
    *("effect", "effect_low", "effect_high", "bootstrap_low", "bootstrap_high"),
    *("p", "q", "passed", "paper_pass", "direct_effect", "direct_placebo", "kl", "reversed_share"),
    *("shuffled_effect", "shuffled_low", "shuffled_high", "shuffled_p", "outcome", "placebo", "reason"),
)
# What `summarise_pairs` calls them, and what they are called beside the primary effect.
_SHUFFLED = {
    "effect": "shuffled_effect",
    "effect_low": "shuffled_low",
    "effect_high": "shuffled_high",
    "p": "shuffled_p",
}
_LONG = (
    *("feature", "outcome", "placebo", "n_pairs", "n_independent", "effect", "low", "high", "p", "q", "reversed_share"),
    *("unsteered_mean", "steered_mean", "placebo_mean", "alternative", "unit", "declared", "primary", "reason"),
)


def effects(
    trials: pd.DataFrame,
    direct: pd.DataFrame | None = None,
    *,
    alpha: float = 0.05,
    seed: int = 0,
    dose: float | None = None,
    placebo: str = "random",
    outcome: str | OutcomeMeasure = "similarity",
    obstacles: Obstacles | None = None,
) -> pd.DataFrame:
    """Effect of each feature on the primary outcome.

    Pairs are prompts x samples: steered, placebo and unsteered text of a pair shared prompt and sampling
    noise. The effect is the mean of (steered - unsteered) - (placebo - unsteered). Pairs in which one of the
    three is undefined are left out and counted in `reason`. From six prompts on, samples of a prompt are averaged
    first: they resemble each other, and what is tested is whether other prompts would show the effect too.

    Args:
        trials: As `run_trials` gives.
        direct: As `direct_effects` gives; None leaves its columns NaN.
        alpha: Share of false findings among the passed features that is put up with.
        seed: For random sign patterns.
        dose: Which dose is tested; not needed when the trials hold one.
        placebo: The condition to compare with.
        outcome: A name in `OUTCOMES`, or a measure under another operator than "add": an ablation takes a concept
            away, so `outcome_named("similarity").under("ablate")` is looked for below 0.
        obstacles: Why features were not steered, see `saeffect.steering.obstacles`: their `reason`.

    Returns:
        One row a feature, by number: feature; n_pairs; n_independent (prompts, or pairs with fewer than six prompts:
        what the test and the interval count); unsteered_mean, steered_mean, placebo_mean (over the pairs); effect
        with its 95 % interval (Student's t) effect_low, effect_high; bootstrap_low, bootstrap_high (the same
        resampled, without assuming a normal distribution: expanded percentiles, 2,000 resamples); p (sign-flip test
        that the effect is above 0, for an ablation below it, two-sided for outcomes without a direction); q
        (Benjamini-Hochberg over these features); passed (q <= alpha); paper_pass (the paper's rule: the first steered
        text is more similar than the first unsteered one; after an ablation less similar); direct_effect,
        direct_placebo (nats, means over prompts); kl (nats, steered); reversed_share (share of prompts whose mean
        effect is on the other side of 0 than the test looks for; for outcomes without a direction, against the
        overall effect); shuffled_effect with shuffled_low, shuffled_high, shuffled_p (how much more steering raised
        the similarity to the feature's own top tokens than to those of another feature; NaN without the column
        similarity_shuffled, see `score_texts`); outcome; placebo; reason ("" when all is defined). Fewer than two
        pairs: NaN.

    Raises:
        ConfigError: The trials hold several doses and `dose` is not given, or not the one given; `alpha` is
            not between 0 and 1.
        EmptySelection: There are no steered trials, and no dose is given.
        ShapeMismatch: A column is missing, or a trial is there twice.
        UnknownName: No such outcome.
    """
    if not 0 < alpha < 1:
        raise ConfigError(f"alpha must be between 0 and 1. Got {alpha}.", at="alpha")
    measure = outcome_named(outcome) if isinstance(outcome, str) else outcome
    similar = OUTCOMES["similarity"].under(measure.operator)
    _check_columns(trials)
    dose = tested_dose(trials, dose)
    wide = paired_values(trials, direct, measure, dose=dose, placebo=placebo)
    table = summarise_pairs(wide, measure, seed=seed, obstacles=obstacles)
    table["passed"] = table["q"] <= alpha
    texts = paired_values(trials, direct, similar, dose=dose, placebo=SHUFFLED)
    # Prompt 0, sample 0: the paper looks at one text of each kind.
    first = texts.groupby(level="feature").nth(0).droplevel(["prompt", "sample"])
    ends = (UNSTEERED, STEERED) if similar.alternative == "less" else (STEERED, UNSTEERED)
    table["paper_pass"] = table["feature"].map(first[ends[0]] > first[ends[1]]).eq(True)
    shuffled = summarise_pairs(texts, similar, seed=seed).set_index("feature")
    beside = {new: shuffled[name] for name, new in _SHUFFLED.items()} | _direct(direct, dose, placebo)
    for name, values in beside.items():
        table[name] = math.nan if values is None else table["feature"].map(values)
    return table.assign(outcome=measure.name, placebo=placebo)[list(_ORDER)]


def outcome_effects(
    trials: pd.DataFrame,
    direct: pd.DataFrame | None = None,
    *,
    declared: Sequence[str] = ("similarity",),
    placebos: Sequence[str] = PLACEBOS,
    seed: int = 0,
    dose: float | None = None,
    operator: str = "add",
    obstacles: Obstacles | None = None,
) -> pd.DataFrame:
    """Effect of each feature on every outcome that was measured, against every control.

    Args:
        trials: As `run_trials` and `score_texts` give; outcomes without a column are not there.
        direct: As `direct_effects` gives; None leaves its outcomes out.
        declared: Outcomes that were declared before the run, the primary one first.
        placebos: Conditions to compare with, the primary one first. Where the trials have it, similarity is
            also compared with "shuffled": the same texts against another feature's top tokens.
        seed: For random sign patterns.
        dose: Which dose is tested; not needed when the trials hold one.
        operator: What was done: "add", "clamp" or "ablate".
        obstacles: As in `effects`.

    Returns:
        One row per outcome, placebo and feature: feature; outcome; placebo; n_pairs, n_independent; effect with its
        95 % interval low, high (Student's t); p, q (over the features of one outcome and placebo), reversed_share,
        unsteered_mean, steered_mean, placebo_mean as in `effects`; alternative ("greater", "less" or "two-sided");
        unit; declared (whether the outcome was declared before the run; all others are exploratory); primary
        (whether it is the one test that decides what passes); reason.

    Raises:
        UnknownName: A declared outcome does not exist.
        SaeffectError: As `effects`.
    """
    for name in declared:
        outcome_named(name)
    _check_columns(trials)
    dose = tested_dose(trials, dose)
    frames = []
    for name, measure in ((name, plain.under(operator)) for name, plain in OUTCOMES.items()):
        if direct is None if measure.table == "direct" else measure.column not in trials:
            continue
        controls = [*placebos, *([SHUFFLED] if f"{measure.column}_shuffled" in trials else [])]
        for placebo in controls:
            wide = paired_values(trials, direct, measure, dose=dose, placebo=placebo)
            table = summarise_pairs(wide, measure, seed=seed, obstacles=obstacles)
            table = table.rename(columns={"effect_low": "low", "effect_high": "high"})
            is_primary = name == next(iter(declared), None) and placebo == next(iter(placebos), None)
            frames.append(
                table.assign(
                    outcome=name,
                    placebo=placebo,
                    alternative=measure.alternative,
                    unit=measure.unit,
                    declared=name in declared,
                    primary=is_primary,
                )
            )
    if not frames:
        return pd.DataFrame(columns=list(_LONG))
    return pd.concat(frames, ignore_index=True)[list(_LONG)]


def _check_columns(trials: pd.DataFrame) -> None:
    needed = ("feature", "prompt", "sample", "condition", "dose", "similarity")
    missing = [name for name in needed if name not in trials]
    if missing:
        raise ShapeMismatch(f"the trials lack the column(s) {', '.join(missing)}.", at="trials")


def _direct(direct: pd.DataFrame | None, dose: float, placebo: str) -> dict[str, pd.Series[float] | None]:
    """Means over prompts by feature."""
    if direct is None:
        return dict.fromkeys(("direct_effect", "direct_placebo", "kl"))
    rows = direct[direct["dose"] == dose]
    means = {
        c: rows[rows["condition"] == c].groupby("feature")[["delta_logprob", "kl"]].mean() for c in (STEERED, placebo)
    }
    return {
        "direct_effect": means[STEERED]["delta_logprob"],
        "direct_placebo": means[placebo]["delta_logprob"],
        "kl": means[STEERED]["kl"],
    }
