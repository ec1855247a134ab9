from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from saeffect.comparison import PRIMARY, Resampling
from saeffect.comparison.arms import roles_of
from saeffect.comparison.contrasts import as_table, contrasts
from saeffect.comparison.judgement import judge
from saeffect.comparison.quantities import QUANTITIES
from saeffect.comparison.seeds import control_saes, seed_contrasts
from saeffect.errors import BadFile

SMALL = Resampling(0, 200, 200)
OVER_SEEDS = [name for name, quantity in QUANTITIES.items() if quantity.seed_values is not None]


def further(arm, *shifts):
    """Further SAEs like the arm's own, coherence moved by each shift."""
    table = arm.features.merge(arm.coherence, on="feature").merge(arm.selection, on="feature")
    tables = [
        table.assign(sae=f"{arm.name}-{i}", coherence=table["coherence"] + shift) for i, shift in enumerate(shifts)
    ]
    return replace(arm, seeds=pd.concat(tables, ignore_index=True))


def rows_of(arms):
    roles = roles_of({name: arm.role for name, arm in arms.items()})
    return as_table(seed_contrasts(arms, roles, min_matches=2, resampling=SMALL), PRIMARY), roles


@pytest.fixture
def arms(tiny_arm):
    return {
        "base": further(tiny_arm(), 0.1, 0.2),
        "tuned": further(tiny_arm("tuned", "treatment", 0.5), 0.04),
        "again": tiny_arm("again", "placebo", 0.05),
    }


def test_no_further_sae_no_row(tiny_arm):
    arms = {"base": tiny_arm(), "tuned": tiny_arm("tuned", "treatment")}
    assert rows_of(arms)[0].empty


def test_the_sae_is_the_unit(arms):
    table, _ = rows_of(arms)
    row = table[(table["quantity"] == "coherence_mean_seeds") & (table["comparison"] == "all seeds")].iloc[0]
    # mean coherence of the SAEs: base 0.3, 0.4, 0.5 and again 0.35; tuned 0.8 and 0.84
    control, treatment = [0.3, 0.4, 0.5, 0.35], [0.8, 0.84]
    assert (row["value_a"], row["value_b"]) == pytest.approx((np.mean(control), np.mean(treatment)))
    # with two against four, Student's p is the larger one and Welch's interval the narrower
    welch, peer = (stats.ttest_ind(treatment, control, equal_var=equal) for equal in (False, True))
    assert row["p"] == pytest.approx(max(peer.pvalue, welch.pvalue))
    ends = [one.confidence_interval(0.95) for one in (peer, welch)]
    assert (row["low"], row["high"]) == pytest.approx((min(e.low for e in ends), max(e.high for e in ends)))
    assert (row["saes_a"], row["saes_b"], row["remark"], row["declared"]) == (4, 2, "", True)


def test_differences_in_differences_is_treatment_minus_placebo(arms):
    table, _ = rows_of(arms)
    mean = table[table["quantity"] == "coherence_mean_seeds"].set_index("comparison")
    apart = mean.loc["fine-tuning", "estimate"] - mean.loc["retraining", "estimate"]
    assert mean.loc["beyond retraining", "estimate"] == pytest.approx(apart)
    assert "one SAE in again" in mean.loc["beyond retraining", "remark"]


def test_every_quantity_and_every_comparison(arms):
    table, _ = rows_of(arms)
    assert {f"{name}_seeds" for name in OVER_SEEDS} < set(table["quantity"])
    assert {"pass_rate_seeds", "weight_variance_seeds"} < set(table["quantity"])
    assert not table.duplicated(["quantity", "comparison", "a", "b"]).any()
    sizes = table.groupby("comparison", sort=False).size().to_dict()
    assert sizes.pop("all seeds") == 14  # every quantity that a whole SAE has
    assert sizes == dict.fromkeys(["fine-tuning", "retraining", "beyond retraining"], len(OVER_SEEDS))


def test_effects_average_prompts_within_features_within_saes(arms):
    table, _ = rows_of(arms)
    row = table[(table["quantity"] == "effect_seeds") & (table["comparison"] == "all seeds")].iloc[0]
    # feature 1: (0.1, -0.1), feature 3: (0.5, 0.3); only the arms' own SAEs were steered
    assert row["value_a"] == pytest.approx(0.2)
    assert (row["saes_a"], row["saes_b"]) == (2, 1)
    assert "one SAE in tuned" in row["remark"]


def test_effects_of_arms_that_were_not_steered_are_undefined(arms):
    nothing = {"interventions": None, "effects": None, "direct_effects": None}
    table, _ = rows_of({name: replace(arm, **nothing) for name, arm in arms.items()})
    rows = table[table["quantity"] == "effect_seeds"]
    assert len(rows) == 4
    assert rows["estimate"].isna().all()
    assert rows["reason"].str.startswith("nothing to average in ").all()


def test_alike_saes_have_no_interval_and_say_so(tiny_arm):
    arms = {"base": further(tiny_arm(), 0.0), "tuned": further(tiny_arm("tuned", "treatment"), 0.0)}
    table, _ = rows_of(arms)
    share = table[(table["quantity"] == "domain_share_seeds") & (table["comparison"] == "all seeds")].iloc[0]
    assert np.isnan(share["low"])
    assert "all alike" in share["reason"]


def test_an_sae_without_a_value_is_named(tiny_arm):
    base = further(tiny_arm(), 0.1)
    base.seeds["is_domain"] = False
    table, _ = rows_of({"base": base, "tuned": tiny_arm("tuned", "treatment")})
    row = table[(table["quantity"] == "coherence_mean_seeds") & (table["comparison"] == "fine-tuning")].iloc[0]
    assert "nothing to average in base-0" in row["remark"]


def judged(arms):
    roles = roles_of({name: arm.role for name, arm in arms.items()})
    table = contrasts(arms, roles, min_matches=2, resampling=SMALL)
    return judge(pd.concat([table, rows_of(arms)[0]], ignore_index=True), "coherence_mean")


def spread(tiny_arm, name, role, shift, *shifts):
    """An arm of many domain features, so that intervals over features are narrow."""
    arm = tiny_arm(name, role, shift)
    ids = np.arange(60)
    rng = np.random.default_rng(len(name))
    coherence = pd.DataFrame({"feature": ids, "coherence": rng.normal(shift, 0.01, 60), "n_known": 2, "reason": ""})
    selection = pd.DataFrame(
        {"feature": ids, "matches": 2, "matches_dot": 2, "matches_cosine": 2, "in_vocabulary": True, "is_domain": True}
    )
    features = pd.concat([arm.features.iloc[[1]]] * 60, ignore_index=True).assign(feature=ids)
    arm = replace(arm, coherence=coherence, selection=selection, features=features)
    return further(arm, *shifts) if shifts else arm


def test_what_seeds_scatter_over_is_not_credited(tiny_arm):
    """Narrow over features, but SAEs of the control differ among themselves by as much."""
    base = spread(tiny_arm, "base", "control", 0.0, 0.6, -0.6)
    tuned = spread(tiny_arm, "tuned", "treatment", 0.3, 0.5, -0.5)
    again = spread(tiny_arm, "again", "placebo", 0.01)
    alone = {"base": replace(base, seeds=None), "tuned": replace(tuned, seeds=None), "again": again}
    assert judged(alone).status == "beyond"
    found = judged({"base": base, "tuned": tuned, "again": again})
    assert found.status == "noise"
    assert found.seeds is not None
    assert found.seeds.sign == 0


def test_seeds_stand_in_for_a_placebo(tiny_arm):
    base = spread(tiny_arm, "base", "control", 0.0, 0.01, -0.01)
    tuned = spread(tiny_arm, "tuned", "treatment", 0.3, 0.01, -0.01)
    assert judged({"base": base, "tuned": tuned}).status == "beyond"
    # one SAE of the control is taken to scatter as the treatment's three do; with one each nothing is known
    assert judged({"base": replace(base, seeds=None), "tuned": tuned}).status == "beyond"
    alone = {"base": replace(base, seeds=None), "tuned": replace(tuned, seeds=None)}
    assert judged(alone).status == "unseparated"


def test_control_saes_are_those_of_the_controls_model(arms):
    roles = roles_of({name: arm.role for name, arm in arms.items()})
    assert [sae.name for sae in control_saes(arms, roles)] == ["base", "base-0", "base-1", "again"]
    assert control_saes(arms, roles)[1].effects is None


def test_a_table_of_seeds_without_a_column_is_refused(arms):
    with pytest.raises(BadFile, match="seeds table of arm 'base' has no column is_domain"):
        replace(arms["base"], seeds=arms["base"].seeds.drop(columns="is_domain"))


def test_share_intervals_end_at_one(tiny_arm):
    arms = {"base": tiny_arm(), "tuned": tiny_arm("tuned", "treatment"), "again": tiny_arm("again", "placebo")}
    effects = arms["tuned"].effects
    arms["tuned"] = replace(arms["tuned"], effects=effects.assign(passed=[True, True, False]))
    arms["again"] = replace(arms["again"], effects=effects.assign(passed=[False, False, False]))
    table, _ = rows_of(arms)
    row = table[table["quantity"] == "pass_rate_seeds"].iloc[0]
    assert (row["value_a"], row["value_b"], row["low"], row["high"]) == (0.25, 1.0, -1.0, 1.0)
    assert row["p"] == pytest.approx(stats.ttest_ind([1.0], [0.5, 0.0], equal_var=True).pvalue)
    assert "taken to scatter" in row["remark"]
