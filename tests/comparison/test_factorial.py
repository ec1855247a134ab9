"""SAE × model, crossed: the split by hand, against a mixed model of statsmodels, and its error rates."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pandas as pd
import pytest
from scipy.stats import t

from saeffect.comparison.arms import Roles
from saeffect.comparison.factorial import (
    CROSSED,
    CROSSED_COLUMNS,
    EFFECTS,
    WHOLE_SAE,
    against_nulls,
    factorial,
    no_factorial,
    paired_change,
)
from saeffect.errors import ShapeMismatch

ROLES = Roles("base", "tuned", ())
Cells = dict[tuple[str, str], np.ndarray]


def tables(quantity: str, cells: Cells, first: dict[str, int] | None = None) -> dict[str, pd.DataFrame]:
    """The crossed tables of both arms from arrays [n_features, n_values] by (SAE, model)."""
    rows: dict[str, list[dict[str, object]]] = {"base": [], "tuned": []}
    known = CROSSED[quantity]
    for (sae, model), values in cells.items():
        for number, numbers in enumerate(np.asarray(values, dtype=float)):
            feature = WHOLE_SAE if known.kind == "whole" else (first or {}).get(sae, 0) + number
            row = {"feature": feature, "model": model, "quantity": quantity, "unit": known.unit}
            row["value"] = float(np.nanmean(numbers)) if np.isfinite(numbers).any() else math.nan
            row["values"] = numbers.tolist() if known.over else []
            rows[sae].append(row | {"reason": "" if np.isfinite(row["value"]) else "no token is known"})
    return {sae: pd.DataFrame(found, columns=list(CROSSED_COLUMNS)) for sae, found in rows.items()}


def split(quantity: str, cells: Cells, **others: object) -> pd.DataFrame:
    found = factorial(tables(quantity, cells), ROLES, groups=[CROSSED[quantity].group], **others)  # type: ignore[arg-type]
    return found[found["quantity"] == quantity].set_index("effect")


def drawn(
    rng: np.random.Generator,
    n: tuple[int, int] = (8, 8),
    prompts: int = 6,
    effect: dict[tuple[str, str], float] | None = None,
) -> Cells:
    """Features of a push of their own and a change of their own; prompts that change what the model does."""
    by_prompt, by_sae = rng.standard_normal((2, prompts)), rng.standard_normal((2, 2, prompts))
    cells = {}
    for s, sae in enumerate(("base", "tuned")):
        push, change = 5 + rng.standard_normal((n[s], 1)), 0.6 * rng.standard_normal((n[s], 1))
        for m, model in enumerate(("base", "tuned")):
            values = (
                push + m * change + 0.5 * by_prompt[m] + 0.3 * by_sae[m, s] + 0.7 * rng.standard_normal((n[s], prompts))
            )
            cells[sae, model] = values + (effect or {}).get((sae, model), 0.0)
    return cells


def test_the_split_by_hand() -> None:
    cells = {
        ("base", "base"): [[1.0, 3.0], [3.0, 5.0]],  # mean 3
        ("base", "tuned"): [[1.0, 2.0], [1.0, 4.0]],  # 2
        ("tuned", "base"): [[4.0, 6.0], [6.0, 8.0]],  # 6
        ("tuned", "tuned"): [[5.0, 5.0], [5.0, 5.0]],  # 5, of which what follows knows nothing
    }
    cells["tuned", "tuned"] = [[2.0, 5.0], [4.0, 9.0]]
    found = split("direct_effect", {k: np.array(v) for k, v in cells.items()})
    assert list(found.index) == list(EFFECTS)
    # cells 3, 2, 6, 5: model ½[(2 − 3) + (5 − 6)], dictionary ½[(6 − 3) + (5 − 2)], rest ½[(5 − 6) − (2 − 3)]
    assert found["estimate"].tolist() == [-1.0, 3.0, 0.0, 2.0]
    assert found.loc["model", ["mean_cc", "mean_ct", "mean_tc", "mean_tt"]].tolist() == [3.0, 2.0, 6.0, 5.0]
    # Changes: [[0, −1], [−2, −1]] and [[−2, −1], [−2, 1]]. Feature means −½, −1½ and −1½, −½: each SAE ¼ · ½ / 2.
    # Prompts, half of both SAEs: ½(−1 − 2), ½(−1 + 0) = −1½, −½: ½ / 2. Rests ±½ and ±½: ¼ · 4 · ¼ / 1 / 4 each.
    variance = 2 * (0.25 * 0.5 / 2) + 0.5 / 2 - 2 * (0.25 * 1.0 / 4)
    assert found.loc["model", "error"] == pytest.approx(math.sqrt(variance))
    freedom = variance**2 / (0.125**2 / 2 + 0.25**2 / 1)
    assert found.loc["model", "freedom"] == pytest.approx(max(freedom, 1.0))
    reach = t.ppf(0.975, found.loc["model", "freedom"]) * math.sqrt(variance)
    assert found.loc["model", ["low", "high"]].tolist() == pytest.approx([-1 - reach, -1 + reach])
    assert found["n_features"].tolist() == [4] * 4
    assert found["n_prompts"].tolist() == [2] * 4


def test_effects_add_up_and_one_sided_splits_differ_by_the_rest() -> None:
    found = split("direct_effect", drawn(np.random.default_rng(1), (7, 5)))
    value, cell = found["estimate"], found.iloc[0]
    assert value["model"] + value["dictionary"] == pytest.approx(value["both"])
    assert cell["mean_ct"] - cell["mean_cc"] == pytest.approx(value["model"] - value["rest"])
    assert cell["mean_tt"] - cell["mean_tc"] == pytest.approx(value["model"] + value["rest"])


@pytest.mark.parametrize("effect", ["dictionary"])
def test_agrees_with_a_mixed_model(effect: str) -> None:
    """REML of a balanced table with crossed features and prompts gives the same variance of the mean."""
    from statsmodels.regression.mixed_linear_model import MixedLM

    cells = drawn(np.random.default_rng(5), (8, 8), 6)
    rows = []
    for s, sae in enumerate(("base", "tuned")):
        before, after = cells[sae, "base"], cells[sae, "tuned"]
        values = after - before if effect == "model" else (before + after) / 2
        for (feature, prompt), value in np.ndenumerate(values):
            rows.append(
                {"y": value, "side": s - 0.5, "feature": f"{s}-{feature}", "prompt": prompt, "both": f"{s}-{prompt}"}
            )
    data = pd.DataFrame(rows).assign(one=1)
    crossed = {"feature": "0 + C(feature)", "prompt": "0 + C(prompt)", "both": "0 + C(both)"}
    fit = MixedLM.from_formula("y ~ side", groups="one", vc_formula=crossed, re_formula="0", data=data).fit()
    name = "Intercept" if effect == "model" else "side"
    mine = split("direct_effect", cells).loc[effect]
    assert mine["estimate"] == pytest.approx(float(fit.params[name]), abs=1e-6)
    assert mine["error"] == pytest.approx(float(fit.bse[name]), rel=0.01)


def test_features_are_paired_between_models_not_between_saes() -> None:
    rng = np.random.default_rng(2)
    push = 10 * rng.standard_normal((2, 12, 1))  # features differ a lot, and change alike
    cells = {
        (sae, model): push[s] - m + 0.1 * rng.standard_normal((12, 6))
        for s, sae in enumerate(("base", "tuned"))
        for m, model in enumerate(("base", "tuned"))
    }
    found = split("direct_effect", cells)
    assert found.loc["model", "high"] < -0.8
    assert found.loc["dictionary", "low"] < 0 < found.loc["dictionary", "high"]
    assert found.loc["dictionary", "error"] > 20 * found.loc["model", "error"]
    # The order of features in one SAE says nothing about the other's.
    shuffled = cells | {("tuned", m): cells["tuned", m][::-1] for m in ("base", "tuned")}
    pd.testing.assert_frame_equal(found, split("direct_effect", shuffled))


def test_whole_saes_are_paired_by_row_of_text() -> None:
    rng = np.random.default_rng(3)
    text = rng.standard_normal(40)  # hard and easy rows, the same for all
    cells = {
        (sae, model): (0.7 + 0.1 * s - 0.2 * m + 0.3 * text + 0.01 * rng.standard_normal(40))[None]
        for s, sae in enumerate(("base", "tuned"))
        for m, model in enumerate(("base", "tuned"))
    }
    found = split("explained_variance", cells)
    differences = sum(
        sign * cells[key][0]
        for key, sign in (
            (("base", "tuned"), 0.5),
            (("base", "base"), -0.5),
            (("tuned", "tuned"), 0.5),
            (("tuned", "base"), -0.5),
        )
    )
    error = differences.std(ddof=1) / math.sqrt(40)
    assert found.loc["model", "error"] == pytest.approx(error)
    assert found.loc["model", "freedom"] == pytest.approx(39)
    assert found.loc["model", "low"] == pytest.approx(differences.mean() - t.ppf(0.975, 39) * error)
    assert (found["n_features"] == 0).all()
    assert (found["n_prompts"] == 40).all()


def test_features_alone_give_welchs_interval() -> None:
    rng = np.random.default_rng(4)
    cells = {key: rng.standard_normal((n, 1)) for key, n in zip(_keys(), (9, 9, 14, 14), strict=True)}
    found = split("coherence", cells).loc["both"]
    from scipy.stats import ttest_ind

    theirs = ttest_ind(cells["tuned", "tuned"][:, 0], cells["base", "base"][:, 0], equal_var=False)
    assert found["p"] == pytest.approx(float(theirs.pvalue))
    assert [found["low"], found["high"]] == pytest.approx(list(theirs.confidence_interval()))
    assert found["n_prompts"] == 0


def test_shares_of_passing_features() -> None:
    # base's SAE: of 10 features 8 pass in the base model and 4 in the tuned one, tuned's: 5 and 5 of 6.
    cells = {
        ("base", "base"): [1] * 8 + [0] * 2,
        ("base", "tuned"): [1] * 4 + [0] * 6,
        ("tuned", "base"): [1] * 5 + [0],
        ("tuned", "tuned"): [1] * 5 + [0],
    }
    found = split("pass_rate", {key: np.array(v, dtype=float)[:, None] for key, v in cells.items()})
    assert found.loc["model", "estimate"] == pytest.approx(-0.2)
    assert found.loc["model", "low"] < -0.2 < found.loc["model", "high"]
    assert found.loc["model", "p"] == pytest.approx(2 / 2**4)  # four features changed, all one way
    assert found.loc["both", "estimate"] == pytest.approx(5 / 6 - 0.8)
    assert found["estimate"]["model"] + found["estimate"]["dictionary"] == pytest.approx(found["estimate"]["both"])
    assert found["error"].isna().all()
    same = split("pass_rate", {key: np.array([[1.0], [0.0]]) for key in _keys()})
    assert same.loc["model", ["estimate", "p"]].tolist() == [0.0, 1.0]
    assert same.loc["model", "low"] < 0 < same.loc["model", "high"]


def test_what_is_missing_is_left_out_everywhere_and_said() -> None:
    cells = drawn(np.random.default_rng(6), (6, 5), 4)
    cells["base", "tuned"][2] = math.nan  # a feature without a value in one model
    cells["tuned", "base"][:, 3] = math.nan  # a prompt without values for one SAE
    found = split("direct_effect", cells)
    assert found["n_features"].tolist() == [10] * 4
    assert found["n_prompts"].tolist() == [3] * 4
    said = "features left out, being undefined in a cell: 1; prompts left out, being undefined in a cell: 1"
    assert found.loc["model", "reason"] == f"{said}; no token is known"
    kept = {key: np.delete(v, 2, axis=0) if key[0] == "base" else v for key, v in cells.items()}
    complete = split("direct_effect", {key: v[:, :3] for key, v in kept.items()})
    pd.testing.assert_series_equal(found["estimate"], complete["estimate"])
    pd.testing.assert_series_equal(found["low"], complete["low"])


def test_nothing_to_say_is_said() -> None:
    one = split("direct_effect", {key: np.array([[1.0, 2.0]]) for key in _keys()})
    assert one[["low", "high", "p"]].isna().all(axis=None)
    assert one.loc["dictionary", "reason"] == "one feature shows no spread between features"
    same = {key: np.array([[0.3], [0.5], [0.2]]) + (key[0] == "tuned") for key in _keys()}
    unchanged = split("coherence", same)
    assert unchanged.loc["model", ["estimate", "reason"]].tolist() == [0.0, "no value differs between the models"]
    assert math.isnan(unchanged.loc["model", "p"])
    assert unchanged.loc["dictionary", "low"] > 0
    empty = factorial(
        {"base": pd.DataFrame(columns=list(CROSSED_COLUMNS))} | {"tuned": pd.DataFrame(columns=list(CROSSED_COLUMNS))},
        ROLES,
    )
    assert len(empty) == len(CROSSED) * len(EFFECTS)
    assert empty["estimate"].isna().all()
    assert (empty["reason"] != "").all()
    refused = no_factorial(["coherence"], "the models differ in width")
    assert refused["quantity"].tolist() == ["coherence"] * 4
    assert refused["reason"].unique().tolist() == ["the models differ in width"]
    with pytest.raises(ShapeMismatch, match="lacks the column"):
        factorial({"base": pd.DataFrame(), "tuned": pd.DataFrame()}, ROLES)


def test_against_nulls() -> None:
    found = against_nulls(-0.8, [-0.05, 0.05, 0.15, -0.15])
    assert found.value == pytest.approx(-0.8)
    assert found.p == pytest.approx(1 / 5)  # four nulls cannot show more
    reach = t.ppf(0.975, 3) * np.std([-0.05, 0.05, 0.15, -0.15], ddof=1) * math.sqrt(1 + 1 / 4)
    assert [found.low, found.high] == pytest.approx([-0.8 - reach, -0.8 + reach])
    # Nulls that all moved: what any training does is no finding.
    assert against_nulls(-0.8, [-0.8, -0.7, -0.9, -0.75]).p > 0.5
    assert against_nulls(1.0, [0.0]).reason == "one null shows no spread"
    assert math.isnan(against_nulls(1.0, []).p)
    rng = np.random.default_rng(0)
    p = np.array([against_nulls(x[0], x[1:]).p for x in rng.standard_normal((2000, 20))])
    assert (p <= 0.05).mean() == pytest.approx(0.05, abs=0.015)
    rows = split("direct_effect", drawn(rng), nulls={"direct_effect": [0.0, 0.1, -0.1]})
    assert rows.loc["model", "n_nulls"] == 3
    assert rows.loc["model", "null_mean"] == pytest.approx(0.0, abs=1e-9)
    assert rows.loc[["dictionary", "rest", "both"], "null_p"].isna().all()


def rates(n: int, rng: np.random.Generator, features: tuple[int, int], prompts: int) -> Iterator[tuple[str, float]]:
    """By effect, how often an interval missed the truth; the truth is an effect of model, SAE and both together."""
    truth = {("base", "tuned"): 0.4, ("tuned", "base"): -0.3, ("tuned", "tuned"): 0.5}
    wanted = {"model": 0.6, "dictionary": -0.1, "rest": 0.2, "both": 0.5}
    missed = dict.fromkeys(EFFECTS, 0)
    for _ in range(n):
        found = split("direct_effect", drawn(rng, features, prompts, truth))
        for effect, value in wanted.items():
            missed[effect] += not found.loc[effect, "low"] <= value <= found.loc[effect, "high"]
    yield from ((effect, count / n) for effect, count in missed.items())


def test_intervals_cover_quick() -> None:
    for _, rate in rates(60, np.random.default_rng(7), (8, 8), 6):
        assert rate <= 0.15


@pytest.mark.simulation
@pytest.mark.parametrize(("features", "prompts"), [((24, 24), 6), ((12, 20), 12)])
def test_intervals_cover(features: tuple[int, int], prompts: int) -> None:
    for effect, rate in rates(600, np.random.default_rng(8), features, prompts):
        assert 0.02 <= rate <= 0.08, effect


def _keys() -> list[tuple[str, str]]:
    return [("base", "base"), ("base", "tuned"), ("tuned", "base"), ("tuned", "tuned")]


def test_a_null_is_compared_where_both_models_have_a_value() -> None:
    """By hand: features 1 and 2 in both; the mean of their changes, not the change of means of other features."""
    nan = math.nan
    before = tables("coherence", {("base", "base"): np.array([[0.9], [0.2], [0.4]])})["base"]
    after = tables("coherence", {("base", "null"): np.array([[nan], [0.3], [0.4]])})["base"]
    assert paired_change(before, after, CROSSED["coherence"]) == pytest.approx(0.05)
    assert paired_change(before, before, CROSSED["coherence"]) == 0.0
    assert math.isnan(paired_change(before, after[:1], CROSSED["coherence"]))
    assert math.isnan(paired_change(before[:0], after, CROSSED["coherence"]))
    by_row = [[1.0, 2.0, 3.0], [3.0, nan, nan], [1.0, 1.0, 1.0]], [[2.0, 2.0, 5.0], [3.0, 9.0, 5.0], [1.0, 1.0, 4.0]]
    before, after = (tables("density", {("base", "x"): np.array(values)})["base"] for values in by_row)
    assert paired_change(before, after, CROSSED["density"]) == 1.0, "the feature with most NaN is left out"
    assert paired_change(after, after, CROSSED["density"]) == 0.0


def test_identical_nulls_give_a_p_of_one() -> None:
    """Where a value is undefined in the fine-tuned model, it is left out of each null's change, too."""
    rng = np.random.default_rng(0)
    base = rng.random((40, 1))
    tuned = base.copy()
    tuned[:6] = math.nan
    crossed = tables("coherence", {("base", "base"): base, ("base", "tuned"): tuned})
    crossed |= {"tuned": crossed["base"]}
    parts = [crossed["base"][crossed["base"]["model"] == model] for model in ("base", "tuned")]
    change = paired_change(*parts, CROSSED["coherence"])
    found = factorial(crossed, ROLES, groups=["coherence"], nulls={"coherence": [change] * 19})
    model = found.set_index("effect").loc["model"]
    assert model["null_mean"] == pytest.approx(0.0)
    assert model["null_p"] == 1.0
