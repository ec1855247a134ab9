"""The list of quantities compared between two arms; every table, figure and sentence reads it (`add_quantity`)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd

from saeffect.comparison.arms import (
    ArmTables,
    activity_of,
    coherence_of,
    direct_effect_of,
    effect_of,
    match_counts_of,
    pass_counts,
    scale_count,
    steered_minus_placebo,
    weights_of,
)
from saeffect.errors import ConfigError

__all__ = ["QUANTITIES", "Kind", "Quantity", "Wording", "add_quantity", "declarable", "sae_value", "wording"]

Kind = Literal["share", "mean", "median", "count mean", "token mean", "token variance", "mean range", "dominance"]
"""The statistic, and how two arms are compared by it.

"share": of features with a property; "mean", "median": of one number a feature; "count mean": of one small whole number
a feature; "token mean", "token variance": of several numbers a feature, resampled together; "mean range": the
difference of means over the mean of the two ranges; "dominance": Cliff's delta. The last two have no value in one arm.
"""


@dataclass(frozen=True)
class Wording:
    """How a quantity is named in sentences. `{control}` is replaced by the condition that steering is tested against.

    Attributes:
        short: Without an article, "pass rate"; `phrase` with one: "the share of tested features that pass".
        larger, smaller: A clause of the headline, for a rise and for a fall.
        first: Text before and after its value, as the first quantity of the paragraph.
        goes: Text before its first value, between the two and after the second, in a later sentence.
    """

    short: str
    phrase: str
    larger: str
    smaller: str
    first: tuple[str, str]
    goes: tuple[str, str, str]


def _wording(
    short: str,
    *,
    phrase: str = "",
    changed: tuple[str, str] | None = None,
    first: tuple[str, str] | None = None,
    goes: tuple[str, str, str] | None = None,
) -> Wording:
    larger, smaller = changed or (f"the {short} is larger", f"the {short} is smaller")
    first, goes = first or (f"The {short} is ", ""), goes or (f"The {short} goes from ", " to ", "")
    return Wording(short, phrase or f"the {short}", larger, smaller, first, goes)


@dataclass(frozen=True)
class Quantity:
    """One quantity of the comparison.

    Attributes:
        name: As in the column `quantity` of the contrasts, and in `comparison.tests` of a study.
        label: Of its rows; `{min_matches}` becomes the number.
        read: From (arm, min_matches) to the data of the statistic. "share": (how many, of how many); "token mean" and
            "token variance": values and the feature of each, both [n]; otherwise one number a feature, float64 [n].
        seed_values: One number a feature, in a Series whose index may name further levels (feature, prompt), for rows
            over SAE seeds in every comparison of arms; None for the row over all SAEs alone.
        steered: Whether it is defined only where features were steered.
        words: How it is named in sentences; None for "the <name>".
    """

    name: str
    label: str
    unit: str
    kind: Kind
    read: Callable[[ArmTables, int], Any]
    seed_values: Callable[[ArmTables], pd.Series[Any]] | None = None
    steered: bool = False
    words: Wording | None = None

    @property
    def pairwise(self) -> bool:
        """Whether it is defined for two arms together only."""
        return self.kind in ("mean range", "dominance")

    def value(self, data: Any) -> float:
        """The statistic of what `read` gave, as one number; NaN where there is nothing to count or average."""
        if self.kind == "share":
            return float(data[0] / data[1]) if data[1] else math.nan
        values = np.asarray(data[0] if self.kind.startswith("token") else data, dtype=np.float64)
        if len(values) < (2 if self.kind == "token variance" else 1):
            return math.nan
        if self.kind == "token variance":
            return float(np.var(values, ddof=1))
        return float(np.median(values) if self.kind == "median" else values.mean())

    @property
    def rows(self) -> tuple[str, ...]:
        """Names of its rows in the contrasts: its own, and its ratio or change in %."""
        suffix = {"share": "_ratio", "token mean": "_change", "token variance": "_change"}.get(self.kind)
        return (self.name, f"{self.name}{suffix}") if suffix else (self.name,)


_VOCABULARY = "Share of features with {min_matches} or more vocabulary tokens"


def _is_domain(arm: ArmTables) -> pd.Series[Any]:
    # Sorted by feature: the row order of a table must not change a resampled interval.
    return arm.selection.sort_values("feature")["is_domain"].astype(np.float64).reset_index(drop=True)


def _coherence(arm: ArmTables, _: int) -> Any:
    return coherence_of(arm)


def _weights(arm: ArmTables, _: int) -> Any:
    weights = weights_of(arm)
    return weights["weight"].to_numpy(), weights["feature"].to_numpy()


_ALL = (
    Quantity(
        "domain_share",
        "Share of features that are domain features",
        "share",
        "share",
        lambda arm, _: (len(arm.domain), arm.n_features),
        seed_values=_is_domain,
        words=_wording(
            "share of domain features",
            changed=("a larger share of them are domain features", "a smaller share of them are domain features"),
            first=("Domain features make up ", " of the SAE"),
        ),
    ),
    Quantity("share_dot", f"{_VOCABULARY}, dot product", "share", "share",
             lambda arm, least: (scale_count(arm, "dot", least), arm.n_features)),
    Quantity("share_cosine", f"{_VOCABULARY}, cosine", "share", "share",
             lambda arm, least: (scale_count(arm, "cosine", least), arm.n_features)),
    Quantity(
        "pass_rate",
        "Share of tested features that pass against placebo",
        "share",
        "share",
        lambda arm, _: (pass_counts(arm).passed, pass_counts(arm).tested),
        steered=True,
        words=_wording(
            "pass rate",
            phrase="the share of tested features that pass",
            changed=("a larger share of the tested ones pass", "a smaller share of the tested ones pass"),
            first=("Of the steered features ", " pass against {control}"),
            goes=("Steered, ", " of features pass against {control} before and ", " after"),
        ),
    ),
    Quantity("paper_pass_rate", "Share of tested features that pass by the paper's rule", "share", "share",
             lambda arm, _: (pass_counts(arm).paper_passed, pass_counts(arm).paper_tested), steered=True),
    Quantity(
        "coherence_mean",
        "Mean coherence of domain features",
        "coherence",
        "mean",
        _coherence,
        seed_values=lambda arm: pd.Series(coherence_of(arm)),
        words=_wording(
            "mean coherence",
            phrase="the mean coherence of domain features",
            changed=("the domain features are more coherent", "the domain features are less coherent"),
            first=("The mean coherence of domain features is ", ""),
            goes=("The domain features' mean coherence goes from ", " to ", ""),
        ),
    ),
    Quantity("coherence_median", "Median coherence of domain features", "coherence", "median", _coherence),
    Quantity("coherence_normalised", "Normalised mean difference of coherence (the paper's)", "mean range",
             "mean range", _coherence),
    Quantity("coherence_delta", "Cliff's delta of coherence", "from -1 to 1", "dominance", _coherence),
    Quantity("weight_mean", "Mean of the top-token weights (the paper's activations)", "weight", "token mean",
             _weights),
    Quantity("weight_variance", "Variance of the top-token weights (the paper's activations)", "weight squared",
             "token variance", _weights),
    Quantity("density", "Mean density of domain features", "share of tokens", "mean",
             lambda arm, _: activity_of(arm, "density"),
             seed_values=lambda arm: pd.Series(activity_of(arm, "density"))),
    Quantity("mean_activation", "Mean activation of domain features, where active", "activation", "mean",
             lambda arm, _: activity_of(arm, "mean_activation"),
             seed_values=lambda arm: pd.Series(activity_of(arm, "mean_activation"))),
    Quantity("matches_mean", "Mean number of top tokens in the vocabulary, all features", "tokens", "count mean",
             lambda arm, _: match_counts_of(arm),
             seed_values=lambda arm: pd.Series(match_counts_of(arm), dtype=np.float64)),
    Quantity(
        "effect",
        "Mean effect of steering beyond placebo",
        "cosine similarity",
        "mean",
        lambda arm, _: effect_of(arm),
        seed_values=lambda arm: steered_minus_placebo(arm).groupby(level=["feature", "prompt"]).mean(),
        steered=True,
        words=_wording(
            "mean effect",
            phrase="the mean effect of steering",
            first=("The mean effect of steering is ", ""),
            goes=("The mean effect of steering goes from ", " to ", ""),
        ),
    ),
    Quantity("direct_effect", "Mean direct effect beyond placebo", "nats", "mean",
             lambda arm, _: direct_effect_of(arm), steered=True),
)  # fmt: skip

QUANTITIES: dict[str, Quantity] = {quantity.name: quantity for quantity in _ALL}
"""Every quantity by name, in the order of the tables."""


def add_quantity(quantity: Quantity) -> None:
    """Add a quantity to the comparison; a study can then declare it as a test. `ConfigError` when the name is taken.

    Example:
        >>> dead = Quantity("dead_share", "Share of features that never fire", "share", "share",
        ...                 lambda arm, _: (int((arm.features["density"] == 0).sum()), arm.n_features))
        >>> add_quantity(dead)
        >>> wording("dead_share").short, QUANTITIES.pop("dead_share").rows
        ('dead share', ('dead_share', 'dead_share_ratio'))
    """
    if quantity.name in QUANTITIES:
        raise ConfigError(f"there is a quantity {quantity.name!r} already.", at="name", fix="give it another name.")
    QUANTITIES[quantity.name] = quantity


def declarable() -> tuple[str, ...]:
    """What a study can declare as a test; no ratios, which test the same as their differences."""
    rows = (row for quantity in QUANTITIES.values() for row in quantity.rows)
    return (*(row for row in rows if not row.endswith("_ratio")), "fates", "cross_activity")


def wording(name: str) -> Wording:
    """How a quantity is named in sentences; unknown quantities get words made from their name.

    Example:
        >>> wording("pass_rate").phrase, wording("weight_mean").larger
        ('the share of tested features that pass', 'the weight mean is larger')
    """
    quantity = QUANTITIES.get(name)
    return (quantity.words if quantity else None) or _wording(name.replace("_", " "))


def sae_value(name: str, arm: ArmTables, min_matches: int) -> float:
    """A quantity as one number of a whole SAE: a share, mean, median or variance over its features. NaN where there is
    nothing to count or average, for pairwise quantities, and for unknown names.
    """
    quantity = QUANTITIES.get(name)
    return math.nan if quantity is None or quantity.pairwise else quantity.value(quantity.read(arm, min_matches))
