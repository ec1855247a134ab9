"""What differs between the arms: tables, contrasts with intervals, the design check."""

from saeffect.comparison.arms import ArmFacts, ArmTables, Roles, roles_of
from saeffect.comparison.compare import check_tests, compare
from saeffect.comparison.contrasts import Contrast, contrasts
from saeffect.comparison.design import design_check
from saeffect.comparison.findings import Answer, Comparison, MatchTables, Trace
from saeffect.comparison.judgement import PRIMARY, Judgement, judge
from saeffect.comparison.tables import activity, match_counts, table1, table2, weights
from saeffect.stats.arguments import Resampling

__all__ = [
    "PRIMARY",
    "Answer",
    "ArmFacts",
    "ArmTables",
    "Comparison",
    "Contrast",
    "Judgement",
    "MatchTables",
    "Resampling",
    "Roles",
    "Trace",
    "activity",
    "check_tests",
    "compare",
    "contrasts",
    "design_check",
    "judge",
    "match_counts",
    "roles_of",
    "table1",
    "table2",
    "weights",
]
