"""What differs between a control, a treatment and placebos, with intervals, and what may be credited to fine-tuning.

The tables of every arm enter (`ArmTables`), and which feature became which (`MatchTables`). A `Comparison` leaves: the
paper's tables, contrasts of every quantity, judgements, calibration, power. Its words are made in `saeffect.report`.

Everywhere `arms` are the arms by name and `roles` says which is control, treatment and placebo; `tests` are the
declared quantities, `min_matches` the top tokens in the vocabulary that make a feature count under a projection,
`alpha` the highest q of a finding about a single feature, and `resampling` holds the seed and the numbers of
resamples.
"""

from saeffect.comparison.arms import ArmFacts, ArmTables, Roles
from saeffect.comparison.compare import check_tests, compare
from saeffect.comparison.findings import Answer, CitedNumber, Comparison, MatchTables
from saeffect.comparison.judgement import PRIMARY, Judgement
from saeffect.stats.arguments import Resampling

__all__ = [
    "PRIMARY",
    "Answer",
    "ArmFacts",
    "ArmTables",
    "Comparison",
    "Judgement",
    "MatchTables",
    "Resampling",
    "Roles",
    "CitedNumber",
    "check_tests",
    "compare",
]
