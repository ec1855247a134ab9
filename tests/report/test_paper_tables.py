"""The table at a glance shows the difference that decided the reading."""

from __future__ import annotations

from saeffect.comparison import compare, judge
from saeffect.report.paper_tables import at_a_glance
from synthetic_seeds import synthetic_seeds
from synthetic_study import synthetic_arms

SMALL = {"min_matches": 2, "alpha": 0.05, "n_boot": 100, "n_permutations": 100, "seed": 0}


def test_where_saes_decide_their_difference_stands_beside_that_of_one_sae():
    comparison = compare(synthetic_seeds(synthetic_arms(seed=2)), **SMALL)
    table = at_a_glance(comparison)
    place = [column.label for column in table.columns].index("All SAEs")
    cell = next(row for row in table.rows if row.key == "domain_share").cells[place]
    seeds = judge(comparison.contrasts, "domain_share").seeds
    assert cell.text == f"+{100 * seeds.estimate:.1f}\N{NARROW NO-BREAK SPACE}pp"
    assert cell.sub.endswith("; 3 SAEs against 4")


def test_without_further_saes_the_placebos_say_how_much_they_scatter():
    comparison = compare(synthetic_arms(seed=2), **SMALL)
    row = next(row for row in at_a_glance(comparison).rows if row.key == "domain_share")
    assert any(cell.sub.endswith("; 1 SAE against 2") for cell in row.cells)


def test_without_any_second_sae_there_is_no_such_column():
    arms = {name: arm for name, arm in synthetic_arms(seed=2).items() if name != "placebo"}
    table = at_a_glance(compare(arms, **SMALL))
    assert "All SAEs" not in [column.label for column in table.columns]
    assert "no placebo arm" in table.note
