from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from saeffect.comparison import Gap, exceeds_noise, judge
from saeffect.comparison.judgement import noise_p, settled

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


@pytest.mark.parametrize("n_placebos", [1, 2, 3])
@pytest.mark.parametrize("seed_noise", [0.0, 1.0, 3.0, 100.0])
def test_one_sae_of_the_treatment_is_credited_wrongly_in_one_study_of_twenty_at_most(n_placebos, seed_noise):
    """However much more SAEs of one model differ than intervals over features know (in errors of one arm)."""
    rng = np.random.default_rng(0)
    n, half = 3_000, 1.96 * np.sqrt(2)

    def gap(a, b):
        return Gap("a", "b", b - a, b - a - half, b - a + half, "share")

    arms = rng.normal(scale=np.hypot(1, seed_noise), size=(n, 2 + n_placebos))
    alarms = sum(
        exceeds_noise(gap(c, t), [gap(c, p) for p in placebos], [gap(p, t) for p in placebos])
        for c, t, *placebos in arms
    )
    error = np.sqrt(0.05 * 0.95 / n)
    assert alarms / n <= 0.05 + 3 * error
    if seed_noise == 100:  # nothing but seeds: the level is used up
        assert alarms / n == pytest.approx(0.05, abs=4 * error)
    if seed_noise == 0:
        assert alarms / n < 0.02


def test_the_p_of_noise_is_students_for_one_value_more():
    noise = [Gap("c", f"p{i}", value, 0, 0, "") for i, value in enumerate((0.2, -0.1, 0.05))]
    peer = stats.ttest_ind([0.7], [0.0, 0.2, -0.1, 0.05], equal_var=True)
    assert noise_p(Gap("c", "t", 0.7, 0, 1, ""), noise) == pytest.approx(peer.pvalue)
    assert np.isnan(noise_p(Gap("c", "t", 0.7, 0, 1, ""), []))


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
    assert found.told == found.seeds


def test_declared_quantities_are_corrected_for_their_number():
    both = [
        several(0.03, 0.01),
        several(0.04, 0.01).assign(quantity=lambda t: t["quantity"].str.replace("domain", "x")),
    ]
    alone = several(0.04, 0.01, declared=False).assign(quantity=lambda t: t["quantity"].str.replace("domain", "y"))
    found = settled(pd.concat([*both, alone], ignore_index=True))
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
