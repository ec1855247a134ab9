"""Statistics that say how sure they are.

Arrays of numbers enter. What leaves is an `Estimate` (with interval, p, or the reason why there is none), a p, or a
table of them. Wherever two groups are compared, `a` is the reference and positive means that `b` is larger.

Intervals are at 95 %. `n_boot` is the number of resamples (at least 40) and `seed` an integer or a numpy generator;
equal seeds give equal numbers. `alpha` is the error rate of a test and `power` the probability that it finds something.
A `Resampling` holds the seed and the numbers of resamples, and the `name` beside it gives a number its own random
stream. An argument of the wrong shape or kind raises a `ShapeMismatch`, `Undefined`, `UnknownName` or `ConfigError`
that names it; data without an answer give NaN, with the reason.
"""

from __future__ import annotations

from saeffect.stats.agreement import cohens_kappa, fleiss_kappa, krippendorff_alpha, percent_agreement
from saeffect.stats.arguments import Resampling
from saeffect.stats.bootstrap import bootstrap, bootstrap_difference, bootstrap_means, cluster_bootstrap
from saeffect.stats.differences import cliffs_delta, clustered_difference, count_difference
from saeffect.stats.estimate import Estimate, undefined
from saeffect.stats.multiplicity import benjamini_hochberg, holm
from saeffect.stats.nested import NestedMean, nested_mean, nested_mean_difference
from saeffect.stats.permutation import permutation_test, sign_flip_many
from saeffect.stats.power import (
    Detectable,
    detectable_few_means,
    detectable_mean_difference,
    detectable_paired_mean,
    detectable_proportion_difference,
)
from saeffect.stats.proportions import (
    bounded_mean,
    newcombe_difference,
    paired_difference,
    risk_ratio,
    sum_of_independent,
    wilson,
)
from saeffect.stats.ratios import ratio_of_means
from saeffect.stats.regression import ols_robust
from saeffect.stats.student import cautious_difference, independent_values, mean_interval
from saeffect.stats.two_way import TwoWayMean, complete_tables, two_way_mean

__all__ = [
    "Detectable",
    "Estimate",
    "NestedMean",
    "Resampling",
    "TwoWayMean",
    "benjamini_hochberg",
    "bootstrap",
    "bootstrap_difference",
    "bootstrap_means",
    "bounded_mean",
    "cautious_difference",
    "cliffs_delta",
    "cluster_bootstrap",
    "clustered_difference",
    "cohens_kappa",
    "complete_tables",
    "count_difference",
    "detectable_few_means",
    "detectable_mean_difference",
    "detectable_paired_mean",
    "detectable_proportion_difference",
    "fleiss_kappa",
    "holm",
    "independent_values",
    "krippendorff_alpha",
    "mean_interval",
    "nested_mean",
    "nested_mean_difference",
    "newcombe_difference",
    "ols_robust",
    "paired_difference",
    "percent_agreement",
    "permutation_test",
    "ratio_of_means",
    "risk_ratio",
    "sign_flip_many",
    "sum_of_independent",
    "two_way_mean",
    "undefined",
    "wilson",
]
