from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from saeffect.comparison import Gap, exceeds_noise, judge

NAN = float("nan")


def table(change, *placebos):
    """Contrasts of one quantity as (estimate, low, high): the change, then noise and beyond per placebo."""
    rows = [("fine-tuning", "c", "t", *change)]
    for number, (noise, beyond) in enumerate(placebos):
        rows += [("retraining", "c", f"p{number}", *noise), ("beyond retraining", f"p{number}", "t", *beyond)]
    frame = pd.DataFrame(rows, columns=["comparison", "a", "b", "estimate", "low", "high"])
    return frame.assign(quantity="domain_share", unit="share", reason="")


QUIET = (0.0, -0.02, 0.02)


@pytest.mark.parametrize(
    ("contrasts", "status"),
    [
        (table((0.1, 0.05, 0.15), (QUIET, (0.1, 0.05, 0.15))), "beyond"),
        (table((-0.1, -0.15, -0.05), (QUIET, (-0.1, -0.15, -0.05))), "beyond"),
        (table((0.02, -0.01, 0.05), (QUIET, (0.02, 0.01, 0.05))), "unclear"),
        (table((0.1, 0.05, 0.15)), "unseparated"),
        (table((0.1, 0.05, 0.15), ((NAN, NAN, NAN), (NAN, NAN, NAN))), "unseparated"),
        (table((NAN, NAN, NAN), (QUIET, QUIET)), "undefined"),
        # the placebo went the same way, nearly as far
        (table((0.1, 0.05, 0.15), ((0.08, 0.03, 0.13), (0.02, -0.03, 0.07))), "noise"),
        # the placebo went further, the other way: noise of that size could have made the change
        (table((0.1, 0.05, 0.15), ((-0.2, -0.25, -0.15), (0.3, 0.25, 0.35))), "noise"),
        # the placebo's own interval excludes zero, so the change must be three times as large
        (table((0.1, 0.05, 0.15), ((0.04, 0.01, 0.07), (0.06, 0.01, 0.11))), "noise"),
        (table((0.1, 0.05, 0.15), ((0.03, 0.01, 0.05), (0.07, 0.02, 0.12))), "beyond"),
        # every placebo has to be beaten
        (
            table((0.1, 0.05, 0.15), (QUIET, (0.1, 0.05, 0.15)), ((0.09, 0.04, 0.14), (0.01, -0.04, 0.06))),
            "noise",
        ),
    ],
)
def test_status(contrasts, status):
    assert judge(contrasts, "domain_share").status == status


@pytest.mark.parametrize(
    ("n_placebos", "seed_noise", "expected"),
    # seed_noise: spread between SAEs of one model, in standard errors of one arm
    [(1, 0.0, 0.009), (1, 3.0, 0.178), (1, 100.0, 0.184), (2, 3.0, 0.074), (3, 3.0, 0.034)],
)
def test_the_false_alarm_rates_in_the_docstring_hold(n_placebos, seed_noise, expected):
    rng = np.random.default_rng(0)
    n, half = 4_000, 1.96 * np.sqrt(2)

    def gap(a, b):
        return Gap("a", "b", b - a, b - a - half, b - a + half, "share")

    arms = rng.normal(scale=np.hypot(1, seed_noise), size=(n, 2 + n_placebos))
    alarms = sum(
        exceeds_noise(gap(c, t), [gap(c, p) for p in placebos], [gap(p, t) for p in placebos])
        for c, t, *placebos in arms
    )
    assert alarms / n == pytest.approx(expected, abs=4 * np.sqrt(expected * (1 - expected) / n))
