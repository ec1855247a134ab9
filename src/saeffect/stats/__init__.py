"""Statistics that say how sure they are.

An estimate comes with an interval, a test with its p, and data without an answer give NaN with a reason.
Wherever two groups are compared, `a` is the reference and positive means that `b` is larger.
"""

from __future__ import annotations

from saeffect.stats.agreement import cohens_kappa, krippendorff_alpha
from saeffect.stats.bootstrap import bootstrap, bootstrap_difference, bootstrap_means, cluster_bootstrap
from saeffect.stats.clusters import independent_values
from saeffect.stats.effect_sizes import cliffs_delta, normalised_mean_difference
from saeffect.stats.estimate import Estimate, TestResult
from saeffect.stats.multiplicity import benjamini_hochberg, holm
from saeffect.stats.nested import NestedMean, nested_mean, nested_mean_difference, nested_mean_test
from saeffect.stats.permutation import permutation_test, sign_flip_many, sign_flip_test
from saeffect.stats.power import (
    Detectable,
    detectable_few_means,
    detectable_mean_difference,
    detectable_paired_mean,
    detectable_proportion_difference,
)
from saeffect.stats.proportions import fisher_exact, newcombe_difference, risk_ratio, wilson
from saeffect.stats.regression import ols_robust
from saeffect.stats.student import cautious_difference, cautious_difference_test

__all__ = [
    "Detectable",
    "Estimate",
    "NestedMean",
    "TestResult",
    "benjamini_hochberg",
    "bootstrap",
    "bootstrap_difference",
    "bootstrap_means",
    "cautious_difference",
    "cautious_difference_test",
    "cliffs_delta",
    "cluster_bootstrap",
    "cohens_kappa",
    "detectable_few_means",
    "detectable_mean_difference",
    "detectable_paired_mean",
    "detectable_proportion_difference",
    "fisher_exact",
    "holm",
    "independent_values",
    "krippendorff_alpha",
    "nested_mean",
    "nested_mean_difference",
    "nested_mean_test",
    "newcombe_difference",
    "normalised_mean_difference",
    "ols_robust",
    "permutation_test",
    "risk_ratio",
    "sign_flip_many",
    "sign_flip_test",
    "wilson",
]
