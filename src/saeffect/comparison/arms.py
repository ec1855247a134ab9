"""One arm: its tables, its facts, and the numbers that all comparisons read from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pandas as pd

from saeffect.errors import BadFile, ConfigError
from saeffect.stats.arguments import FloatArray, IntArray

__all__ = [
    "ArmFacts",
    "ArmTables",
    "PassCounts",
    "Roles",
    "activity_of",
    "coherence_of",
    "condition_similarities",
    "direct_effect_of",
    "effect_of",
    "match_counts_of",
    "pass_counts",
    "placebo_of",
    "roles_of",
    "scale_count",
    "steered_minus_placebo",
    "top_token_coverage",
    "untested_reason",
    "weights_of",
]

_TEXTS = ("unsteered", "steered")
_REQUIRED_COLUMNS = {
    "features": ("feature", "top_tokens", "top_weights", "density", "mean_activation", "max_activation"),
    "coherence": ("feature", "coherence", "n_known", "reason"),
    "selection": ("feature", "matches", "matches_dot", "matches_cosine", "in_vocabulary", "is_domain"),
    "interventions": ("feature", "prompt", "sample", "condition", "dose", "similarity"),
    "direct_effects": ("feature", "prompt", "condition", "delta_logprob"),
    "effects": ("feature", "n_pairs", "effect", "p", "passed", "paper_pass", "placebo"),
    "seeds": (
        *("sae", "feature", "top_tokens", "top_weights", "density", "mean_activation", "max_activation"),
        *("coherence", "n_known", "reason", "matches", "matches_dot", "matches_cosine", "in_vocabulary", "is_domain"),
    ),
}


@dataclass(frozen=True)
class ArmFacts:
    """How an arm was made, in plain strings and numbers; None where not recorded.

    Attributes:
        tokenizer: "the control's", and how the model's own differs.
        chat_template: Of the model's own tokenizer, beside the one that chats are read with; None where there are none.
        k: Features that may fire per token (TopK), or None.
        training_text_sha256: Two texts of one name may differ.
        bos: Whether texts begin with a BOS token, and how the SAE's training differed, if it did.
        explained_variance, ce_loss_score, l0, dead_share: On held-out tokens, see `saeffect.sae.metrics`.
        same_as_control: Whether the model was measured to equal the control's.
        same_sae: Whether it is read through the control's SAE.
    """

    role: str
    model: str | None = None
    tokenizer: str | None = None
    chat_template: str | None = None
    hook: str | None = None
    architecture: str | None = None
    d_sae: int | None = None
    k: int | None = None
    training_tokens: int | None = None
    training_text: str | None = None
    training_text_sha256: str | None = None
    bos: str | None = None
    seed: int | None = None
    normalisation: str | None = None
    dtype: str | None = None
    explained_variance: float | None = None
    ce_loss_score: float | None = None
    l0: float | None = None
    dead_share: float | None = None
    same_as_control: bool | None = None
    same_sae: bool = False


@dataclass(frozen=True, eq=False)
class ArmTables:
    """The tables of one arm, as the earlier stages wrote them: one row a feature, unless said otherwise.

    Attributes:
        interventions: One row per feature, prompt, sample, condition and dose; None if nothing was steered.
        direct_effects: One row per feature, prompt and condition; None if not measured.
        effects: Of the tested features; None if nothing was steered.
        coverage_unique: Share of the distinct top tokens of domain features that the word vectors have, 0 to 1; or NaN.
        unsteered: Why no feature was steered; "" where some were, or steering was not requested.
        text_shortage: How much of the requested text there is, in words; "" for all of it.
        seeds: One row per further SAE of the model (column `sae`) and feature, with the columns of features, coherence
            and selection; None without further SAEs.
    """

    name: str
    role: str
    features: pd.DataFrame
    coherence: pd.DataFrame
    selection: pd.DataFrame
    interventions: pd.DataFrame | None
    direct_effects: pd.DataFrame | None
    effects: pd.DataFrame | None
    facts: ArmFacts
    coverage_unique: float = float("nan")
    unsteered: str = ""
    text_shortage: str = ""
    seeds: pd.DataFrame | None = None

    def __post_init__(self) -> None:
        for table, required in _REQUIRED_COLUMNS.items():
            frame = getattr(self, table)
            missing = [] if frame is None else [column for column in required if column not in frame.columns]
            if missing:
                raise BadFile(
                    f"the {table} table of arm {self.name!r} has no column {', '.join(missing)}.",
                    at=f"arms/{self.name}/{table}.parquet",
                    fix="run the stage that writes this table again.",
                )

    @property
    def n_features(self) -> int:
        """Number of features of the SAE."""
        return len(self.selection)

    @property
    def domain(self) -> np.ndarray:
        """Ids of the domain features, ascending; int64."""
        chosen = self.selection["is_domain"].to_numpy(dtype=bool)
        return np.sort(self.selection["feature"].to_numpy(dtype=np.int64)[chosen])

    @property
    def saes(self) -> list[ArmTables]:
        """One arm per SAE, this arm's first; those of further seeds were not steered."""
        if self.seeds is None:
            return [self]
        first = replace(self, seeds=None)
        unsteered = replace(first, interventions=None, direct_effects=None, effects=None)
        others = [
            replace(unsteered, name=str(sae), features=rows, coherence=rows, selection=rows)
            for sae, rows in self.seeds.groupby("sae", sort=False)
        ]
        return [first, *others]

    def of_domain(self, table: pd.DataFrame) -> pd.DataFrame:
        """The rows of `table` that belong to domain features, ordered by feature."""
        rows = table[table["feature"].isin(self.domain)]
        return rows.sort_values("feature", kind="stable").reset_index(drop=True)


@dataclass(frozen=True)
class Roles:
    """Names of the arms by role, placebos in the study's order."""

    control: str
    treatment: str
    placebos: tuple[str, ...]

    @property
    def ordered(self) -> tuple[str, ...]:
        """Control, treatment, then the placebos: the row order of every table."""
        return (self.control, self.treatment, *self.placebos)


def roles_of(roles: Mapping[str, str]) -> Roles:
    """The arms by role, from the role of each arm name; `ConfigError` without exactly one control and one treatment.

    Example:
        >>> roles_of({"base": "control", "tuned": "treatment", "again": "placebo"}).placebos
        ('again',)
    """
    by_role: dict[str, list[str]] = {"control": [], "treatment": [], "placebo": []}
    for name, role in roles.items():
        if role not in by_role:
            raise ConfigError(
                f"arm {name!r} has the role {role!r}; valid: control, treatment, placebo.",
                at=f"arms.{name}.role",
            )
        by_role[role].append(name)
    for role in ("control", "treatment"):
        if len(by_role[role]) != 1:
            names = ", ".join(by_role[role]) or "none"
            raise ConfigError(
                f"a comparison needs exactly one {role} arm. Found: {names}.",
                at="arms",
                fix=f"give one arm the role {role}, and repeats of the control the role placebo.",
            )
    return Roles(by_role["control"][0], by_role["treatment"][0], tuple(by_role["placebo"]))


@dataclass(frozen=True)
class PassCounts:
    """Features tested (with a defined p) and passed; `paper_tested` of those could be judged by the paper's rule."""

    tested: int
    passed: int
    paper_tested: int
    paper_passed: int


def scale_count(arm: ArmTables, scale: Literal["dot", "cosine"], min_matches: int) -> int:
    """Features with at least `min_matches` top tokens in the vocabulary under one projection."""
    return int((arm.selection[f"matches_{scale}"] >= min_matches).sum())


def pass_counts(arm: ArmTables) -> PassCounts:
    """Tested and passing features of an arm; all 0 where nothing was steered."""
    if arm.effects is None:
        return PassCounts(0, 0, 0, 0)
    tested = arm.effects[arm.effects["p"].notna()]
    # With one text of each kind, as in the paper, no test is possible; the paper's rule still applies.
    judged = tested if len(tested) else arm.effects[arm.effects["feature"].isin(_features_with_both_texts(arm))]
    passed, by_paper = tested["passed"].eq(True), judged["paper_pass"].eq(True)
    return PassCounts(len(tested), int(passed.sum()), int(judged["paper_pass"].notna().sum()), int(by_paper.sum()))


def _features_with_both_texts(arm: ArmTables) -> list[int]:
    """Features with a similarity of a steered and of an unsteered text."""
    if arm.interventions is None:
        return []
    defined = arm.interventions[arm.interventions["similarity"].notna()]
    return sorted(set.intersection(*(set(defined.loc[defined["condition"] == c, "feature"]) for c in _TEXTS)))


def untested_reason(arm: ArmTables) -> str:
    """Why no effect of steering could be tested in an arm; "" where one was."""
    if pass_counts(arm).tested:
        return ""
    if not len(arm.domain):
        return f"{arm.name} has no domain feature"
    if arm.effects is None or arm.effects.empty:
        return arm.unsteered or f"no feature of {arm.name} was steered"
    reasons = arm.effects["reason"].replace("", pd.NA).dropna() if "reason" in arm.effects else pd.Series(dtype=str)
    n = len(arm.effects)
    sentence = f"{'the one feature' if n == 1 else f'none of the {n} features'} steered in {arm.name} has "
    sentence += "no effect that is defined" if n == 1 else "an effect that is defined"
    return sentence + (f": {reasons.mode().iloc[0]}" if len(reasons) else "")


def coherence_of(arm: ArmTables) -> FloatArray:
    """Defined coherences of the domain features, in feature order; float64 [n_defined]."""
    return _finite(arm.of_domain(arm.coherence)["coherence"])


def top_token_coverage(arm: ArmTables, *, domain_only: bool = False) -> float:
    """Share of features' top tokens that the word vectors have, repeats counted; NaN without tokens."""
    features, coherence = arm.features, arm.coherence
    if domain_only:
        features, coherence = arm.of_domain(features), arm.of_domain(coherence)
    total = int(features["top_tokens"].map(len).sum())
    return int(coherence["n_known"].sum()) / total if total else float("nan")


def weights_of(arm: ArmTables) -> pd.DataFrame:
    """Top-token weights of the domain features (the paper's "activations"); weights that are not finite are left out.

    One row a token: `feature`, `rank` (0: the token that the feature promotes most), `weight`.
    """
    rows = arm.of_domain(arm.features)
    lists = [np.asarray(list(weights), dtype=np.float64) for weights in rows["top_weights"]]
    table = pd.DataFrame(
        {
            "feature": np.repeat(rows["feature"].to_numpy(dtype=np.int64), [len(weights) for weights in lists]),
            "rank": np.concatenate([np.arange(len(weights)) for weights in lists] or [np.empty(0, dtype=np.int64)]),
            "weight": np.concatenate(lists or [np.empty(0)]),
        }
    )
    return table[np.isfinite(table["weight"])].reset_index(drop=True)


def match_counts_of(arm: ArmTables) -> IntArray:
    """Top tokens in the vocabulary, every feature of the arm: int64 [n_features]."""
    counts: IntArray = arm.selection.sort_values("feature")["matches"].to_numpy(dtype=np.int64)
    return counts


def activity_of(arm: ArmTables, column: Literal["density", "mean_activation"]) -> FloatArray:
    """Density (share of tokens) or mean activation where active, of domain features; finite values only."""
    return _finite(arm.of_domain(arm.features)[column])


def effect_of(arm: ArmTables) -> FloatArray:
    """Effect of steering beyond the placebo direction, per tested feature, in cosine similarity."""
    return np.empty(0) if arm.effects is None else _finite(arm.effects.sort_values("feature")["effect"])


def direct_effect_of(arm: ArmTables) -> FloatArray:
    """Direct effect beyond the placebo's, per tested feature, in nats (mean over prompts and doses); finite only."""
    if arm.direct_effects is None or arm.direct_effects.empty:
        return np.empty(0)
    means = arm.direct_effects.pivot_table(
        index="feature", columns="condition", values="delta_logprob", aggfunc="mean", sort=True
    )
    placebo = placebo_of(arm)
    if not {"steered", placebo} <= set(means.columns):
        return np.empty(0)
    return _finite(means["steered"] - means[placebo])


def placebo_of(arm: ArmTables) -> str:
    """The condition that steering was tested against, as the arm's effects say; "" where nothing was steered."""
    return "" if arm.effects is None or arm.effects.empty else str(arm.effects["placebo"].iloc[0])


def steered_minus_placebo(arm: ArmTables) -> pd.Series[Any]:
    """Similarity of a steered text minus that of its placebo, which shares prompt and sampling noise with it: mean over
    doses, indexed by feature, prompt and sample, where both are defined.
    """
    placebo, trials, keys = placebo_of(arm), arm.interventions, ["feature", "prompt", "sample"]
    if trials is None:
        return pd.Series(dtype=np.float64, index=pd.MultiIndex.from_arrays([[], [], []], names=keys))
    wide = trials[trials["condition"].isin(["steered", placebo])].pivot_table(
        index=keys, columns="condition", values="similarity", aggfunc="mean"
    )
    wide = wide.reindex(columns=["steered", placebo])
    return (wide["steered"] - wide[placebo]).dropna()


def condition_similarities(arm: ArmTables, condition: str) -> tuple[FloatArray, IntArray]:
    """Similarity of every trial of one condition, with the feature that each belongs to (its cluster)."""
    if arm.interventions is None:
        return np.empty(0), np.empty(0, dtype=np.int64)
    trials = arm.interventions
    rows = trials[(trials["condition"] == condition) & trials["similarity"].notna()]
    rows = rows.sort_values("feature", kind="stable")
    return rows["similarity"].to_numpy(dtype=np.float64), rows["feature"].to_numpy(dtype=np.int64)


def _finite(values: pd.Series[Any]) -> FloatArray:
    array: FloatArray = values.to_numpy(dtype=np.float64)
    return array[np.isfinite(array)]
