"""The table at a glance shows the difference that decided the reading."""

from __future__ import annotations

from saeffect.comparison import compare
from saeffect.report import ReportContext
from saeffect.report.tables.paper import at_a_glance
from synthetic_seeds import synthetic_seeds
from synthetic_study import synthetic_arms

SMALL = {"min_matches": 2, "alpha": 0.05, "n_boot": 100, "n_permutations": 100, "seed": 0}


def test_where_saes_decide_the_row_is_about_them():
    comparison = compare(synthetic_seeds(synthetic_arms(seed=2)), **SMALL)
    table = at_a_glance(comparison, ReportContext())
    place = [column.label for column in table.columns].index("Fine-tuning")
    row = next(row for row in table.rows if row.key == "domain_share")
    seeds = comparison.judged["domain_share"].seeds
    assert row.sub == "over 4 and 3 SAEs"
    assert row.cells[place].text == f"+{100 * seeds.value:.1f}\N{NARROW NO-BREAK SPACE}pp"


def test_placebos_give_the_noise_without_further_saes():
    comparison = compare(synthetic_arms(seed=2), **SMALL)
    row = next(row for row in at_a_glance(comparison, ReportContext()).rows if row.key == "domain_share")
    assert row.sub.startswith("with SAE noise [")


def test_no_noise_without_a_second_sae():
    arms = {name: arm for name, arm in synthetic_arms(seed=2).items() if name != "placebo"}
    table = at_a_glance(compare(arms, **SMALL), ReportContext())
    assert {row.sub for row in table.rows} == {""}
    assert "no placebo arm" in table.note
