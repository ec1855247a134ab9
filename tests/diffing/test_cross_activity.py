"""One SAE on two models: by hand, against scipy, error rates, and what cannot be said."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

from saeffect.diffing.cross_activity import (
    CrossActivity,
    activity_changes,
    beside_nulls,
    change_scores,
    measure,
    most_changed,
)
from saeffect.diffing.pair import ActsOfBoth, ModelPair, SaeView
from saeffect.errors import BadFile, ShapeMismatch
from saeffect.stats.arguments import Resampling
from synthetic_matches import cross_activity

FAST = 999  # permutations


def ran(
    control: torch.Tensor, treatment: torch.Tensor, batch: int = 100, mask: torch.Tensor | None = None
) -> CrossActivity:
    cross = CrossActivity(control.shape[2])
    for start in range(0, len(control), batch):
        part = slice(start, start + batch)
        cross.update(control[part], treatment[part], None if mask is None else mask[part])
    return cross


def text(n_rows: int, n_features: int, seed: int, length: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    """Two models alike in law; tokens of a row share a level, so they are far from independent."""
    generator = torch.Generator().manual_seed(seed)
    levels = torch.randn(2, n_rows, 1, n_features, generator=generator)
    values = torch.relu(levels + 0.3 * torch.randn(2, n_rows, length, n_features, generator=generator))
    return values[0], values[1]


def test_by_hand() -> None:
    control = torch.tensor([[[1.0, 0.0], [0.0, 0.0]], [[2.0, 0.0], [3.0, 0.0]], [[9.0, 9.0], [1.0, 0.0]]])
    treatment = torch.tensor([[[2.0, 0.0], [1.0, 0.0]], [[2.0, 0.0], [4.0, 0.0]], [[9.0, 9.0], [4.0, 0.0]]])
    mask = torch.tensor([[True, True], [True, True], [False, True]])
    row = ran(control, treatment, mask=mask).result().loc[0]
    assert row["mean_control"] == pytest.approx(7 / 5)
    assert row["mean_treatment"] == pytest.approx(13 / 5)
    assert row["difference"] == pytest.approx(6 / 5)
    assert row["density_control"] == pytest.approx(4 / 5)
    assert row["density_difference"] == pytest.approx(1 / 5)
    assert row["n_rows"] == 3
    assert row["p"] == pytest.approx(2 / 8)  # differences 2, 1, 3: only all signs alike are as extreme
    # The ratio's linear error: residuals 2 - 2 * 1.2, 1 - 2 * 1.2, 3 - 1.2, over 5 tokens.
    error = np.sqrt(3 / 2 * (0.4**2 + 1.4**2 + 1.8**2)) / 5
    assert row["high"] - row["difference"] == pytest.approx(stats.t.ppf(0.975, 2) * error)
    silent = ran(control, treatment, mask=mask).result().loc[1]
    assert silent["reason"] == "it fires in neither model on this text"
    assert np.isnan(silent[["p", "q", "low", "high", "density_p"]].astype(float)).all()
    assert silent["difference"] == 0


def test_rows_of_equal_length_give_the_paired_t_interval() -> None:
    control, treatment = text(25, 4, 0)
    table = ran(control, treatment).result()
    for feature in range(4):
        pairs = (treatment[:, :, feature] - control[:, :, feature]).double().mean(dim=1).numpy()
        low, high = stats.ttest_1samp(pairs, 0).confidence_interval(0.95)
        np.testing.assert_allclose(table.loc[feature, ["low", "high"]].astype(float), [low, high], rtol=1e-4)


@pytest.mark.parametrize("batch", [1, 7])
def test_batches_do_not_matter(batch: int) -> None:
    control, treatment = text(120, 5, 1)
    whole, cut = ran(control, treatment), ran(control, treatment, batch)
    np.testing.assert_array_equal(
        whole.result(n_permutations=FAST).to_numpy(), cut.result(n_permutations=FAST).to_numpy()
    )


def test_planted_changes_are_found_and_others_are_not() -> None:
    control, treatment = text(80, 60, 2)
    treatment[:, :, :5] += 1.0
    treatment[:, :, 5:10] *= 0.2
    table = ran(control, treatment).result(n_permutations=FAST)
    assert (table["q"][:10] <= 0.05).all()
    assert (table["difference"][:5] > 0.5).all()
    assert (table["difference"][5:10] < 0).all()
    assert (table["q"][10:] <= 0.05).sum() <= 3
    assert (table["density_q"][:5] <= 0.05).all()
    assert (table["density_q"][5:10] > 0.05).all()  # as often, but weaker


def test_error_rates_with_dependent_tokens() -> None:
    covered, small_p, alarms, total = 0, 0, 0, 0
    for seed in range(60):
        table = ran(*text(20, 30, 100 + seed)).result(n_permutations=499)
        covered += int(((table["low"] <= 0) & (table["high"] >= 0)).sum())
        small_p += int((table["p"] <= 0.05).sum())
        alarms += bool((table["q"] <= 0.05).any())
        total += len(table)
    error = 3 * np.sqrt(0.05 * 0.95 / total)
    assert covered / total == pytest.approx(0.95, abs=error + 0.005)
    assert small_p / total == pytest.approx(0.05, abs=error)
    assert alarms / 60 <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / 60)


def test_what_cannot_be_said() -> None:
    nothing = CrossActivity(2).result()
    assert set(nothing["reason"]) == {"no token of the text counts"}
    assert nothing["difference"].isna().all()
    one = ran(torch.ones(1, 3, 1), 2 * torch.ones(1, 3, 1)).result()
    assert one.loc[0, "difference"] == 1
    assert one.loc[0, "reason"] == "one row of text shows no spread"
    assert np.isnan(one.loc[0, ["low", "p", "q"]].astype(float)).all()
    same = ran(torch.ones(4, 3, 1), torch.ones(4, 3, 1)).result()
    assert same.loc[0, "p"] == 1
    assert np.isnan(same.loc[0, "low"])
    assert same.loc[0, "reason"] == "every row of text differs alike, so there is no interval"
    masked = CrossActivity(1)
    masked.update(torch.ones(2, 3, 1), torch.ones(2, 3, 1), torch.zeros(2, 3, dtype=torch.bool))
    assert masked.n_rows == 0


def test_bad_input_counts_nothing() -> None:
    cross = CrossActivity(2)
    with pytest.raises(ShapeMismatch, match=r"\[B, S, 2\]"):
        cross.update(torch.ones(1, 3, 2), torch.ones(1, 4, 2))
    with pytest.raises(ShapeMismatch, match="mask"):
        cross.update(torch.ones(1, 3, 2), torch.ones(1, 3, 2), torch.ones(1, 3))
    bad = torch.ones(2, 3, 2)
    bad[1, 1, 1] = torch.nan
    with pytest.raises(BadFile):
        cross.update(torch.ones(2, 3, 2), bad)
    assert cross.n_rows == 0
    mask = torch.ones(2, 3, dtype=torch.bool)
    mask[1, 1] = False
    cross.update(torch.ones(2, 3, 2), bad, mask)  # a broken token that does not count
    assert cross.n_rows == 2


def test_method_reads_the_batches_of_a_pair() -> None:
    control, treatment = text(20, 3, 3)
    sae = SaeView("sae", torch.ones(3, 2), pd.DataFrame())
    mask = torch.ones(20, 6, dtype=torch.bool)
    pair = ModelPair(
        control=sae,
        treatment=sae,
        is_domain=np.array([True, False, False]),
        acts_of_both=lambda: iter([ActsOfBoth(control, treatment, mask)]),
        resampling=Resampling(3, 100, FAST),
    )
    expected = ran(control, treatment).result(n_permutations=FAST, seed=3).assign(is_domain=[True, False, False])
    pd.testing.assert_frame_equal(measure(pair)["cross_activity"], expected)


def test_scores_by_hand() -> None:
    scores = change_scores(cross_activity())
    assert scores[0] == pytest.approx(0.25 / np.sqrt(0.375))
    assert scores[5] == pytest.approx(-0.125 / np.sqrt(0.1875))
    assert scores[12] == pytest.approx(1 / np.sqrt(0.5))
    assert np.isnan(scores[119])


def test_most_changed_first_and_only_what_was_found() -> None:
    found = most_changed(cross_activity(), alpha=0.05)
    assert found["feature"].tolist() == [12, 0, 1, 2, 3, 4, 10, 11, 5, 6]
    assert most_changed(cross_activity(), alpha=0.05, domain_only=True)["feature"].tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert most_changed(cross_activity(), alpha=0.0001).empty
    assert most_changed(cross_activity().head(0), alpha=0.05).empty


def test_nulls_decide_too_what_fires_differently() -> None:
    cross = cross_activity()
    changes = pd.DataFrame({"feature": cross["feature"], "basis": "read", "z": 2.0, "q": 0.01, "n_nulls": 20})
    changes.loc[[0, 5], "q"] = 0.4  # as much as in nulls
    changes.loc[1, ["z", "q"]] = np.nan  # fires too rarely
    beside = beside_nulls(cross, changes)
    assert most_changed(beside, alpha=0.05)["feature"].tolist() == [12, 2, 3, 4, 10, 11, 6]
    found = activity_changes(beside, alpha=0.05)
    assert (found.more.sum(), found.less.sum(), len(found.more)) == (6, 1, 118)
    assert beside["n_nulls"].eq(20).all()


def test_too_few_nulls_decide_nothing() -> None:
    changes = pd.DataFrame({"feature": range(120), "basis": "read", "z": np.nan, "q": 0.6, "n_nulls": 1})
    pd.testing.assert_frame_equal(beside_nulls(cross_activity(), changes), cross_activity())
    pd.testing.assert_frame_equal(beside_nulls(cross_activity(), changes.drop(columns="n_nulls")), cross_activity())
