from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from statsmodels.regression.linear_model import OLS

from saeffect.errors import ConfigError, ShapeMismatch
from saeffect.stats.regression import ols_robust

RNG = np.random.default_rng(31)
N = 60
X = pd.DataFrame({"coherence": RNG.uniform(size=N), "treatment": RNG.integers(0, 2, size=N).astype(bool)})
CLUSTERS = np.arange(N) // 5
Y = 1 + 2 * X["coherence"].to_numpy() - X["treatment"].to_numpy() + RNG.normal(size=N) * (0.2 + X["coherence"])


def by_hand(meat: np.ndarray, degrees: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    design = np.column_stack([np.ones(N), X.to_numpy(dtype=float)])
    bread = np.linalg.inv(design.T @ design)
    estimate = bread @ design.T @ Y.to_numpy()
    error = np.sqrt(np.diag(bread @ meat @ bread))
    half = scipy.stats.t.ppf(0.975, degrees) * error
    return estimate, half, 2 * scipy.stats.t.sf(np.abs(estimate / error), degrees)


def residuals_of(design: np.ndarray) -> np.ndarray:
    residuals: np.ndarray = Y.to_numpy() - design @ np.linalg.lstsq(design, Y.to_numpy(), rcond=None)[0]
    return residuals


def test_hc3_agrees_with_its_formula() -> None:
    design = np.column_stack([np.ones(N), X.to_numpy(dtype=float)])
    leverage = np.diag(design @ np.linalg.inv(design.T @ design) @ design.T)
    scaled = residuals_of(design) / (1 - leverage)
    estimate, half, p = by_hand(design.T @ (design * scaled[:, None] ** 2), N - 3)
    table = ols_robust(Y, X)
    assert table["term"].tolist() == ["intercept", "coherence", "treatment"]
    assert table["estimate"].to_numpy() == pytest.approx(estimate)
    assert table["low"].to_numpy() == pytest.approx(estimate - half)
    assert table["high"].to_numpy() == pytest.approx(estimate + half)
    assert table["p"].to_numpy() == pytest.approx(p, rel=1e-6)
    assert (table["n"] == N).all() and (table["reason"] == "").all()


def test_cluster_errors_agree_with_leaving_out_each_cluster() -> None:
    design = np.column_stack([np.ones(N), X.to_numpy(dtype=float)])
    n_clusters = len(set(CLUSTERS))
    full = OLS(Y.to_numpy(), design).fit().params
    others = [OLS(Y.to_numpy()[CLUSTERS != c], design[CLUSTERS != c]).fit().params for c in sorted(set(CLUSTERS))]
    error = np.sqrt((n_clusters - 1) / n_clusters * ((np.array(others) - full) ** 2).sum(axis=0))
    half = scipy.stats.t.ppf(0.975, n_clusters - 1) * error
    table = ols_robust(Y, X, clusters=[f"prompt {c}" for c in CLUSTERS])
    assert table["estimate"].to_numpy() == pytest.approx(full)
    assert table["high"].to_numpy() - table["estimate"].to_numpy() == pytest.approx(half)
    assert table["p"].to_numpy() == pytest.approx(2 * scipy.stats.t.sf(np.abs(full / error), n_clusters - 1), rel=1e-6)
    # Liang & Zeger's through statsmodels: another formula for the same, smaller with few clusters
    peer = OLS(Y.to_numpy(), design).fit(cov_type="cluster", cov_kwds={"groups": np.asarray(CLUSTERS)}, use_t=True)
    assert (error / peer.bse == pytest.approx(1.0, abs=0.5)) and (error > peer.bse * 0.95).all()


@pytest.mark.simulation
def test_few_clusters_keep_the_level_of_the_test() -> None:
    rng = np.random.default_rng(8)
    n_studies, n_clusters, size = 400, 7, 12
    clusters = np.repeat(np.arange(n_clusters), size)
    false = 0
    for _ in range(n_studies):
        x = pd.DataFrame({"x": rng.normal(size=len(clusters)) + rng.normal(size=n_clusters)[clusters]})
        y = rng.normal(size=n_clusters)[clusters] + rng.normal(size=len(clusters))
        false += ols_robust(y, x, clusters)["p"][1] <= 0.05
    assert false / n_studies <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / n_studies)


def test_only_the_term_of_one_cluster_has_no_error() -> None:
    clusters = np.repeat(np.arange(5), 8)
    rng = np.random.default_rng(2)
    columns = pd.DataFrame({"x": rng.normal(size=40), "only": (clusters == 1).astype(float)})
    table = ols_robust(rng.normal(size=40), columns, clusters).set_index("term")
    assert math.isnan(table.loc["only", "p"])
    assert "one cluster alone" in table.loc["only", "reason"]
    assert table.loc[["intercept", "x"], ["low", "high", "p"]].notna().all(axis=None)


def test_a_line_by_hand() -> None:
    # Slope 11.5 / 5, through the means 1.5 and 4.25.
    table = ols_robust([1, 3, 5, 8], pd.DataFrame({"dose": [0, 1, 2, 3]}))
    assert table["estimate"].tolist() == pytest.approx([0.8, 2.3])


def test_without_columns_the_intercept_is_the_mean() -> None:
    table = ols_robust([1.0, 1.0, 1.0, 2.0], pd.DataFrame(index=range(4)))
    assert table["estimate"].tolist() == [1.25]
    # HC3 of a mean: the squared deviations over (1 - 1/4) squared, divided by n squared.
    error = math.sqrt(0.75 / 0.75**2 / 16)
    assert table["high"][0] - 1.25 == pytest.approx(scipy.stats.t.ppf(0.975, 3) * error)


def test_rows_go_by_position() -> None:
    shuffled_index = X.set_index(np.arange(N)[::-1])
    pd.testing.assert_frame_equal(ols_robust(Y, shuffled_index), ols_robust(Y, X))


def test_clustered_noise_has_nominal_error_rate() -> None:
    rng = np.random.default_rng(3)
    n_studies, n_clusters, size = 120, 30, 6
    clusters = np.repeat(np.arange(n_clusters), size)
    false_clustered = false_single = 0
    for _ in range(n_studies):
        x = pd.DataFrame({"x": rng.normal(size=n_clusters)[clusters]})
        y = rng.normal(size=n_clusters)[clusters] + 0.5 * rng.normal(size=len(clusters))
        false_clustered += ols_robust(y, x, clusters)["p"][1] <= 0.05
        false_single += ols_robust(y, x)["p"][1] <= 0.05
    assert false_clustered / n_studies == pytest.approx(0.05, abs=4 * math.sqrt(0.05 * 0.95 / n_studies))
    assert false_single / n_studies > 0.25


@pytest.mark.parametrize(
    ("y", "columns", "reason"),
    [
        ([], {"x": []}, "y: there are none"),
        ([1.0], {"x": [1.0]}, "1 rows cannot determine 2 terms"),
        ([1.0, math.nan, 2.0], {"x": [1.0, 2.0, 4.0]}, "y: 1 of 3 values are NaN"),
        ([1.0, 2.0, 2.0], {"x": [1.0, math.nan, math.nan]}, "x: 2 of 3 values are NaN"),
        (
            [1.0, 2.0, 2.0],
            {"x": [3.0, 3.0, 3.0]},
            "x: the same in every row, so its part cannot be told from the intercept's",
        ),
        (
            [1.0, 2.0, 2.0, 5.0],
            {"x": [1, 2, 3, 4], "z": [3, 5, 7, 9]},
            "the columns are linearly dependent, so their parts cannot be told apart",
        ),
    ],
)
def test_data_without_coefficients_say_why(y: list[float], columns: dict[str, list[float]], reason: str) -> None:
    table = ols_robust(y, pd.DataFrame(columns))
    assert table[["estimate", "low", "high", "p"]].isna().all(axis=None)
    assert table["reason"].tolist() == [reason] * (1 + len(columns))
    assert table["n"].tolist() == [len(y)] * (1 + len(columns))


@pytest.mark.parametrize(
    ("y", "x", "clusters", "reason"),
    [
        ([1.0, 2.0], [1.0, 2.0], None, "2 rows fit 2 terms exactly, so nothing is left to judge the error by"),
        ([1.0, 1.0, 1.0], [1.0, 2.0, 3.0], None, "the fit is exact, so nothing is left to judge the error by"),
        (
            [0.1, 0.2, 0.3, 0.4],
            [1.0, 2.0, 3.0, 4.0],
            None,
            "the fit is exact, so nothing is left to judge the error by",
        ),
        (
            [1.0, 2.0, 3.0, 5.0],
            [0.0, 0.0, 0.0, 1.0],
            None,
            "row 3 alone determines a coefficient, so its error is undefined",
        ),
        ([1.0, 2.0, 4.0, 3.0], [1.0, 2.0, 3.0, 4.0], list("aaaa"), "clusters: a single one shows no spread"),
        (
            [1.0, 2.0, 4.0, 3.0],
            [1.0, 2.0, 3.0, 4.0],
            ["a", None, "b", "b"],
            "clusters: 1 of 4 labels are missing",
        ),
    ],
)
def test_coefficients_without_errors_say_why(
    y: list[float], x: list[float], clusters: list[str] | None, reason: str
) -> None:
    table = ols_robust(y, pd.DataFrame({"x": x}), clusters)
    assert table["estimate"].notna().all()
    assert table[["low", "high", "p"]].isna().all(axis=None)
    assert table["reason"].tolist() == [reason] * 2


def test_large_offsets_and_unlike_units_are_not_dependence() -> None:
    x = RNG.normal(size=N)
    plain = ols_robust(Y, pd.DataFrame({"x": x, "z": X["coherence"]}))
    shifted = ols_robust(Y, pd.DataFrame({"x": 1e5 + x, "z": 1e-3 * X["coherence"]}))
    assert shifted["p"].to_numpy()[1:] == pytest.approx(plain["p"].to_numpy()[1:], rel=1e-4)


@pytest.mark.parametrize(
    ("error", "message", "y", "columns", "more"),
    [
        (ShapeMismatch, "y has 3 values but X has 2 rows.\n  at:  X", [1, 2, 3], {"x": [1, 2]}, {}),
        (
            ShapeMismatch,
            "y has 3 values but there are 2 cluster labels.\n  at:  clusters",
            [1, 2, 3],
            {"x": [1, 2, 4]},
            {"clusters": [1, 2]},
        ),
        (
            ConfigError,
            "column 'arm' is not numeric but object.\n  at:  X\n  fix: code it as 0 and 1.",
            [1, 2, 3],
            {"arm": pd.Series(["a", "b", "a"], dtype=object)},
            {},
        ),
        (
            ConfigError,
            "columns must have distinct names other than 'intercept', got ['intercept'].\n  at:  X",
            [1, 2, 3],
            {"intercept": [1, 1, 1]},
            {},
        ),
    ],
)
def test_wrong_arguments_are_refused(error, message, y, columns, more) -> None:
    with pytest.raises(error) as caught:
        ols_robust(y, pd.DataFrame(columns), **more)
    assert str(caught.value) == f"{error.__name__}: {message}"


def test_doubled_names_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"distinct names other than 'intercept', got \['x', 'x'\]"):
        ols_robust([1, 2, 3], pd.DataFrame([[1, 2], [3, 4], [5, 7]], columns=["x", "x"]))


def test_names_constant_columns_and_gives_nan_for_missing() -> None:
    flat = pd.DataFrame({"x": [3.0, 3.0, 3.0, 3.0], "z": [1, 2, 4, 3], "w": [True] * 4})
    assert ols_robust([1, 2, 2, 5], flat)["reason"][0].startswith("x, w: the same in every row")
    missing = pd.DataFrame({"x": pd.array([1, None, 3, 4], dtype="Int64")})
    assert ols_robust([1, 2, 2, 5], missing)["reason"].tolist() == ["x: 1 of 4 values are NaN"] * 2


def test_clusters_need_no_order() -> None:
    order = np.random.default_rng(0).permutation(N)
    plain = ols_robust(Y, X, clusters=CLUSTERS)
    mixed = ols_robust(Y.to_numpy()[order], X.iloc[order], clusters=pd.Series(CLUSTERS[order].astype(str)))
    numbers = ["estimate", "low", "high", "p"]
    np.testing.assert_allclose(mixed[numbers], plain[numbers], rtol=1e-8)
    assert (plain["reason"] == "").all() and plain["n"].tolist() == [N] * 3
    assert (plain["estimate"] - plain["low"]).to_numpy() == pytest.approx(
        (plain["high"] - plain["estimate"]).to_numpy()
    )


def test_two_clusters_are_enough_for_a_mean() -> None:
    """Leaving out one of two: deviations of half the difference, one degree of freedom."""
    table = ols_robust([1.0, 2.0, 4.0, 7.0], pd.DataFrame(index=range(4)), clusters=["a", "a", "b", "b"])
    assert table["estimate"].tolist() == [3.5]
    error = math.sqrt(0.5 * ((5.5 - 3.5) ** 2 + (1.5 - 3.5) ** 2))
    assert table["high"][0] == pytest.approx(3.5 + scipy.stats.t.ppf(0.975, 1) * error)
    assert table["p"][0] == pytest.approx(2 * scipy.stats.t.sf(3.5 / error, 1))
    assert table["reason"].tolist() == [""]


def test_a_term_of_one_cluster_says_so_in_full() -> None:
    clusters = np.repeat(np.arange(4), 3)
    columns = pd.DataFrame({"only": (clusters == 1).astype(float)})
    table = ols_robust(np.arange(12.0) ** 2, columns, clusters)
    assert table["reason"].tolist() == ["", "one cluster alone determines it, so its error is undefined"]
    assert table["estimate"].notna().all() and math.isnan(table["low"][1]) and math.isnan(table["high"][1])
