"""Where every table and figure comes from: the file inside the run directory, and its rows and columns."""

from __future__ import annotations

__all__ = ["SOURCES", "source_of"]

SOURCES = {
    # tables
    "glance": (
        "comparison/contrasts.parquet, rows of the declared quantities: value_a, value_b, estimate, low, high; "
        "comparison/calibration.parquet: findings, tests"
    ),
    "calibration": (
        "comparison/calibration.parquet, every row: findings, tests, low, high, nominal, treatment_findings, "
        "treatment_tests, verdict"
    ),
    "by_chance": "comparison/by_chance.parquet, every row; its column source names the table behind each",
    "power": "comparison/power.parquet, every row: detectable, observed, n_a, n_b, alpha, power",
    "fates": "comparison/fate_counts.parquet, every row: n_treatment, n_placebo, excess, low, high, called",
    "notable": (
        "comparison/fates_control.parquet and fates_treatment.parquet: feature, match, similarity, drop, p, q, fate; "
        "comparison/absorption.parquet: absorbed_by; arms/*/features.parquet: top_tokens"
    ),
    "cross": (
        "comparison/cross_activity.parquet, rows with q at most alpha: mean_control, mean_treatment, difference, low, "
        "high, q, is_domain; arms/*/features.parquet: top_tokens"
    ),
    "stagewise": (
        "comparison/stagewise.parquet, the first rows: decoder_rotation, null_rotation, excess_rotation, q; "
        "arms/*/features.parquet: top_tokens"
    ),
    "regression": "comparison/regression.parquet, every row: term, estimate, low, high, p, n, errors",
    "threats": "comparison/threats.parquet, every row; its column source names the table behind each",
    "table1": "comparison/table1.parquet, one row an arm",
    "table2": "comparison/table2.parquet, one row an arm; comparison/contrasts.parquet: coherence_*",
    "contrasts": "comparison/contrasts.parquet, every row",
    "design": "comparison/design.parquet, rows whose status is not same",
    "gate": "arms/*/gate.json; arms/*/features.parquet: n_active",
    "doses": "steering/dose_search.parquet, every row",
    # figures
    "figure_1_match_counts": "comparison/match_counts.parquet: arm, matches, n",
    "figure_2a_top_token_weights": "comparison/weights.parquet: arm, weight",
    "figure_2b_mean_activation": "comparison/activity.parquet: arm, mean_activation",
    "figure_2c_density": "comparison/activity.parquet: arm, density",
    "figure_3_effects": "arms/*/effects.parquet: effect, effect_low, effect_high, passed",
    "figure_4_coherence": "arms/*/coherence.parquet: coherence; arms/*/selection.parquet: is_domain",
    "figure_5_contrasts": "comparison/contrasts.parquet: estimate, low, high",
    "figure_6_doses": "steering/dose_search.parquet: dose and the measures",
    "figure_10_calibration": "comparison/calibration.parquet: rate, low, high, nominal, treatment_findings, treatment_tests",
    "figure_11a_fates": "comparison/fate_counts.parquet, rows of the decoder cosine: n_treatment, n_placebo, called",
    "figure_11b_fates": "comparison/fate_counts.parquet, rows of the activation correlation: n_treatment, n_placebo, called",
    "figure_12_cross_activity": "comparison/cross_activity.parquet: mean_control, mean_treatment, q, is_domain",
    "figure_13_partial_residuals": "comparison/partial_residuals.parquet: term, x, residual, arm",
}  # fmt: skip
"""By name of the table (`TableView.name`) or figure (`DrawnFigure.name`)."""


def source_of(name: str) -> str:
    """What to say below a table or figure; "" where it is not known.

    Example:
        >>> source_of("figure_1_match_counts")
        'comparison/match_counts.parquet: arm, matches, n'
    """
    return SOURCES.get(name, "")
