from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from saeffect.comparison.judgement import (
    add_noise_p,
    exceeds_noise,
    headline_row,
    judge,
    judgement_table,
    judgements_of,
    noise_p,
)
from saeffect.stats.estimate import Estimate

NAN = float("nan")


def table(change, *placebos):
    """Contrasts of one quantity as (estimate, low, high): the change, then noise and beyond per placebo."""
    rows = [("fine-tuning", "c", "t", *change)]
    for number, (noise, beyond) in enumerate(placebos):
        rows += [("retraining", "c", f"p{number}", *noise), ("beyond retraining", f"p{number}", "t", *beyond)]
    frame = pd.DataFrame(rows, columns=["comparison", "a", "b", "estimate", "low", "high"])
    return frame.assign(quantity="domain_share", unit="share", reason="")


QUIET = (0.001, -0.019, 0.021)


@pytest.mark.parametrize(
    ("contrasts", "status"),
    [
        (table((0.1, 0.05, 0.15), (QUIET, (0.1, 0.05, 0.15))), "beyond"),
        (table((-0.1, -0.15, -0.05), (QUIET, (-0.1, -0.15, -0.05))), "beyond"),
        (table((0.02, -0.01, 0.05), (QUIET, (0.02, 0.01, 0.05))), "unclear"),
        (table((0.1, 0.05, 0.15)), "unseparated"),
        (table((0.1, 0.05, 0.15), ((NAN, NAN, NAN), (NAN, NAN, NAN))), "unseparated"),
        # the placebo equals the control (0 of 8 and 0 of 8, say): how much SAEs differ is not known, and not nothing
        (table((0.75, 0.3, 0.9), ((0.0, -0.3, 0.3), (0.75, 0.3, 0.9))), "unseparated"),
        (table((NAN, NAN, NAN), (QUIET, QUIET)), "undefined"),
        # the placebo went the same way, nearly as far
        (table((0.1, 0.05, 0.15), ((0.08, 0.03, 0.13), (0.02, -0.03, 0.07))), "noise"),
        # the placebo went further, the other way: noise of that size could have made the change
        (table((0.1, 0.05, 0.15), ((-0.2, -0.25, -0.15), (0.3, 0.25, 0.35))), "noise"),
        # one placebo hardly tells how much SAEs differ: 1 from the middle of 0 and 0.09 is 10.6 times their gap
        (table((1.0, 0.9, 1.1), ((0.09, -0.01, 0.19), (0.91, 0.81, 1.01))), "noise"),
        (table((1.0, 0.9, 1.1), ((0.08, -0.02, 0.18), (0.92, 0.82, 1.02))), "beyond"),
        # three placebos tell more: 0.5 is 3.6 standard deviations of 0, 0.1, -0.1, 0.15 from their mean
        (
            table(
                (0.5, 0.4, 0.6),
                ((0.1, 0, 0.2), (0.4, 0.3, 0.5)),
                ((-0.1, -0.2, 0), (0.6, 0.5, 0.7)),
                ((0.15, 0.05, 0.25), (0.35, 0.25, 0.45)),
            ),
            "beyond",
        ),
        # every placebo has to be beaten
        (
            table((0.1, 0.05, 0.15), (QUIET, (0.1, 0.05, 0.15)), ((0.09, 0.04, 0.14), (0.01, -0.04, 0.06))),
            "noise",
        ),
    ],
)
def test_status(contrasts, status):
    assert judge(contrasts, "domain_share").status == status


@pytest.mark.simulation
@pytest.mark.parametrize("n_placebos", [1, 2, 3])
@pytest.mark.parametrize("seed_noise", [0.0, 1.0, 3.0, 100.0])
def test_false_credit_of_one_treatment_sae_is_at_most_5_percent(n_placebos, seed_noise):
    """However much more SAEs of one model differ than intervals over features know (in errors of one arm)."""
    rng = np.random.default_rng(0)
    n, half = 3_000, 1.96 * np.sqrt(2)

    def difference(a, b):
        return Estimate(b - a, b - a - half, b - a + half)

    arms = rng.normal(scale=np.hypot(1, seed_noise), size=(n, 2 + n_placebos))
    alarms = 0
    for control, treatment, *placebos in arms:
        change = difference(control, treatment)
        p = noise_p(change, [difference(control, placebo) for placebo in placebos])
        alarms += exceeds_noise(change, [difference(placebo, treatment) for placebo in placebos], p)
    error = np.sqrt(0.05 * 0.95 / n)
    assert alarms / n <= 0.05 + 3 * error
    if seed_noise == 100:  # nothing but seeds: the level is used up
        assert alarms / n == pytest.approx(0.05, abs=4 * error)
    if seed_noise == 0:
        assert alarms / n < 0.02


def test_noise_p_is_students_for_one_more_value():
    noise, change = [Estimate(value, 0, 0) for value in (0.2, -0.1, 0.05)], Estimate(0.7, 0, 1)
    peer = stats.ttest_ind([0.7], [0.0, 0.2, -0.1, 0.05], equal_var=True)
    assert noise_p(change, noise) == pytest.approx(peer.pvalue)


def test_every_placebo_must_be_beaten_on_the_same_side():
    up, down, over_zero = Estimate(1, 0.5, 1.5), Estimate(-1, -1.5, -0.5), Estimate(1, -0.5, 2.5)
    assert exceeds_noise(up, [up, up], 0.01)
    assert exceeds_noise(down, [down], 0.01)
    assert exceeds_noise(up, [], 0.01)
    for change, beyond in ((up, [up, down]), (up, [over_zero]), (down, [up]), (over_zero, [over_zero])):
        assert not exceeds_noise(change, beyond, 0.01)


def several(p, low, *, pair=(0.1, 0.05, 0.15), declared=True):
    """One quantity of three SAEs a side, with p and lower end over all of them."""
    rows = table(pair, (QUIET, pair)).assign(p=0.01, declared=declared, saes_a=1, saes_b=1)
    over = {"comparison": "all seeds", "quantity": "domain_share_seeds", "estimate": 0.1, "low": low, "high": 0.2}
    more = rows.iloc[:1].assign(**over, p=p, saes_a=3, saes_b=3)
    return pd.concat([rows, more], ignore_index=True)


@pytest.mark.parametrize(
    ("contrasts", "status"),
    [
        (several(0.03, 0.01), "beyond"),
        (several(0.03, 0.01, pair=(0.1, -0.1, 0.3)), "beyond"),  # one pair of SAEs says nothing, all of them do
        (several(0.06, -0.01), "noise"),
        (several(0.06, -0.01, pair=(0.1, -0.1, 0.3)), "unclear"),
        (several(0.03, 0.01, pair=(NAN, NAN, NAN)), "beyond"),
        (several(0.5, -0.3, pair=(NAN, NAN, NAN)), "undefined"),
    ],
)
def test_several_saes_a_side_decide_alone(contrasts, status):
    found = judge(contrasts, "domain_share")
    assert found.status == status
    assert found.by_seeds
    assert found.headline == found.seeds


def test_declared_quantities_are_corrected_for_their_number():
    both = [
        several(0.03, 0.01),
        several(0.04, 0.01).assign(quantity=lambda t: t["quantity"].str.replace("domain", "x")),
    ]
    alone = several(0.04, 0.01, declared=False).assign(quantity=lambda t: t["quantity"].str.replace("domain", "y"))
    found = add_noise_p(pd.concat([*both, alone], ignore_index=True))
    tuned = found[found["comparison"] == "fine-tuning"].set_index("quantity")
    assert tuned["p_noise"].to_dict() == {"domain_share": 0.03, "x_share": 0.04, "y_share": 0.04}
    assert tuned.loc[["domain_share", "x_share"], "p_noise_holm"].tolist() == pytest.approx([0.06, 0.06])
    assert np.isnan(tuned.loc["y_share", "p_noise_holm"])
    assert found.loc[found["comparison"] != "fine-tuning", ["p_noise", "p_noise_holm"]].isna().all(axis=None)
    assert [judge(found, name).status for name in ("domain_share", "x_share", "y_share")] == [
        "noise",
        "noise",
        "beyond",
    ]


def test_the_stored_table_says_what_judge_says():
    contrasts = pd.concat(
        [
            several(0.03, 0.01),
            table((0.1, 0.05, 0.15)).assign(quantity="pass_rate", p=0.2, declared=False, saes_a=1, saes_b=1),
            table((2.0, 1.5, 3.0)).assign(quantity="pass_rate_ratio", p=0.2, declared=False, saes_a=1, saes_b=1),
        ],
        ignore_index=True,
    ).assign(label="a label", value_a=0.25, value_b=0.35)
    contrasts = add_noise_p(contrasts)
    stored = judgement_table(contrasts)
    assert stored["quantity"].tolist() == ["domain_share", "pass_rate"]  # no ratios, no rows over seeds
    assert stored["status"].tolist() == ["beyond", "unseparated"]
    assert stored["declared"].tolist() == [True, False]
    # the row that each reading speaks of: over all SAEs where these decide
    assert stored[["comparison", "saes_a", "low"]].to_numpy().tolist() == [
        ["all seeds", 3, 0.01],
        ["fine-tuning", 1, 0.05],
    ]
    assert stored["p"].iloc[0] == 0.03
    assert judgements_of(stored, contrasts)["domain_share"] == judge(contrasts, "domain_share")
    assert headline_row(contrasts, judge(contrasts, "domain_share"))["quantity"] == "domain_share_seeds"


def test_the_differences_keep_their_arms():
    found = judge(table((0.1, 0.05, 0.15), (QUIET, (0.1, 0.04, 0.16)), (QUIET, (0.2, 0.1, 0.3))), "domain_share")
    assert (found.control, found.treatment, found.unit) == ("c", "t", "share")
    assert found.retraining == {"p0": Estimate(*QUIET), "p1": Estimate(*QUIET)}
    assert found.beyond == {"p0": Estimate(0.1, 0.04, 0.16), "p1": Estimate(0.2, 0.1, 0.3)}
    assert found.headline is found.change
    assert (found.seeds, found.n_saes, found.by_seeds) == (None, (1, 1), False)


def test_one_sae_against_several_does_not_decide_by_seeds():
    contrasts = several(0.03, 0.01)
    contrasts.loc[contrasts["comparison"] == "all seeds", "saes_b"] = 1
    found = judge(contrasts, "domain_share")
    assert (found.by_seeds, found.headline) == (False, found.change)
    assert found.status == "beyond"  # by the three intervals, with p over all SAEs
    contrasts.loc[contrasts["comparison"] == "all seeds", "p"] = 0.06
    assert judge(contrasts, "domain_share").status == "noise"


def test_five_in_a_hundred_is_enough():
    up = Estimate(1, 0.5, 1.5)
    assert exceeds_noise(up, [up], 0.05)
    assert judge(several(0.05, 0.01), "domain_share").status == "beyond"


def test_stored_rows_are_whole():
    """Ratios and rows of all seeds are judged nowhere, and stop nothing that comes after them."""
    change = (0.3, 0.2, 0.4)
    parts = [
        (table((2.0, 1.5, 3.0), (QUIET, (2.0, 1.5, 3.0))).assign(quantity="pass_rate_ratio"), False, "ratio"),
        (table(change, (QUIET, change)).assign(quantity="effect_seeds"), True, "seeds"),
        (several(0.03, 0.01), True, "share"),
        (table(change, ((0.02, -0.1, 0.14), change)).assign(quantity="effect", unit="cosine"), False, "effect"),
    ]
    known = {"p": NAN, "saes_a": 1, "saes_b": 1}
    frames = [
        frame.assign(declared=declared, label=label, **{k: v for k, v in known.items() if k not in frame})
        for frame, declared, label in parts
    ]
    contrasts = add_noise_p(pd.concat(frames, ignore_index=True).assign(value_a=0.25, value_b=0.35))
    assert contrasts[["p_noise", "p_noise_holm"]].dtypes.tolist() == [np.float64, np.float64]
    spared = contrasts["quantity"].isin(["pass_rate_ratio", "effect_seeds", "domain_share_seeds"])
    assert contrasts.loc[spared, ["p_noise", "p_noise_holm"]].isna().all(axis=None)
    p = noise_p(Estimate(*change), [Estimate(0.02, -0.1, 0.14)])
    arms = ("c", "t", 0.25, 0.35)
    expected = [
        ["domain_share", "share", True, "beyond", 0.03, "all seeds", *arms, 0.1, 0.01, 0.2, "share", "", 3, 3],
        ["effect", "effect", False, "beyond", p, "fine-tuning", *arms, *change, "cosine", "", 1, 1],
    ]
    columns = ["quantity", "label", "declared", "status", "p", "comparison", "a", "b", "value_a", "value_b"]
    columns += ["estimate", "low", "high", "unit", "reason", "saes_a", "saes_b"]
    stored = judgement_table(contrasts)
    assert stored.columns.tolist() == columns
    assert stored.to_numpy().tolist() == expected
    assert judgement_table(contrasts.iloc[:0]).columns.tolist() == columns
    found = judgements_of(stored, contrasts)
    assert found == {name: judge(contrasts, name) for name in ("domain_share", "effect")}
    assert headline_row(contrasts, found["effect"])["unit"] == "cosine"


def test_further_saes_of_the_control_alone_can_separate():
    """No placebo arm, but several SAEs of the control's model against one of the treatment's."""
    contrasts = several(0.03, 0.01)
    contrasts = contrasts[contrasts["comparison"].isin(["fine-tuning", "all seeds"])].copy()
    contrasts.loc[contrasts["comparison"] == "all seeds", "saes_b"] = 1
    found = judge(contrasts, "domain_share")
    assert (found.status, found.n_saes, found.by_seeds, found.retraining) == ("beyond", (3, 1), False, {})
    contrasts.loc[contrasts["comparison"] == "all seeds", ["low", "high"]] = NAN
    unknown = judge(contrasts, "domain_share")
    assert (unknown.status, unknown.seeds) == ("unseparated", None)


def test_a_placebo_without_an_interval_separates_nothing():
    change = (0.1, 0.05, 0.15)
    for noise, beyond in (((0.001, NAN, NAN), change), (QUIET, (0.1, NAN, NAN))):
        found = judge(table(change, (QUIET, change), (noise, beyond)), "domain_share")
        assert found.status == "unseparated"


@pytest.mark.parametrize("value", [NAN, float("inf")])
def test_noise_of_undefined_differences_is_undefined(value):
    known = Estimate(0.1, -0.1, 0.3)
    assert np.isnan(noise_p(Estimate(value, NAN, NAN), [known]))
    assert np.isnan(noise_p(known, [Estimate(value, NAN, NAN), known]))
    assert np.isnan(noise_p(known, []))
