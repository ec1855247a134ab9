from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from saeffect.errors import ShapeMismatch
from saeffect.stats.agreement import cohens_kappa, fleiss_kappa, krippendorff_alpha, percent_agreement

# Krippendorff (2011), section C: four observers, twelve units, missing values.
X = None
KRIPPENDORFF = np.array(
    [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, X, X, X],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, X, 3],
        [X, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, X],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, X],
    ],
    dtype=object,
).T


def labels_of(table: list[list[int]]) -> tuple[list[int], list[int]]:
    pairs = [(i, j) for i, row in enumerate(table) for j, n in enumerate(row) for _ in range(n)]
    return [i for i, _ in pairs], [j for _, j in pairs]


def test_kappa_by_hand() -> None:
    # 35 of 50 agree; by chance (25 * 30 + 25 * 20) / 2500 = 0.5: (0.7 - 0.5) / (1 - 0.5).
    kappa = cohens_kappa(*labels_of([[20, 5], [10, 15]]))
    assert kappa.value == pytest.approx(0.4)
    assert kappa.n == 50


def test_kappa_interval_nears_the_formula_of_fleiss_cohen_everitt() -> None:
    counts = np.array([[20.0, 5, 1], [10, 15, 2], [0, 3, 9]])
    n, p = counts.sum(), counts / counts.sum()
    rows, columns = p.sum(axis=1), p.sum(axis=0)
    chance = float(rows @ columns)
    value = (np.trace(p) - chance) / (1 - chance)
    diagonal = sum(p[i, i] * (1 - (rows[i] + columns[i]) * (1 - value)) ** 2 for i in range(3))
    rest = sum(p[i, j] * (columns[i] + rows[j]) ** 2 for i in range(3) for j in range(3) if i != j)
    rest *= (1 - value) ** 2
    variance = (diagonal + rest - (value - chance * (1 - value)) ** 2) / ((1 - chance) ** 2 * n)
    a, b = labels_of(counts.astype(int).tolist())
    kappa = cohens_kappa(a, b, n_boot=4000)
    assert kappa.value == pytest.approx(value)
    half = 1.959964 * math.sqrt(variance)
    assert (kappa.low, kappa.high) == pytest.approx((value - half, value + half), abs=0.03)
    assert cohens_kappa(a, b, n_boot=200) == cohens_kappa(a, b, n_boot=200)


def test_kappa_of_any_labels_in_any_order() -> None:
    a, b = ["yes", "no", "unsure", "no", "yes"], ["yes", "no", "no", "no", "unsure"]
    words = cohens_kappa(a, pd.Series(b))
    code = {"yes": 7, "no": -1, "unsure": 0}
    numbers = cohens_kappa([code[x] for x in a], np.array([code[x] for x in b]))
    assert words.value == pytest.approx(numbers.value)
    # 3 of 5 agree; by chance (2 * 1 + 2 * 3 + 1 * 1) / 25.
    assert words.value == pytest.approx((0.6 - 0.36) / (1 - 0.36))


def test_kappa_without_an_answer_says_why() -> None:
    assert cohens_kappa([], []).reason == "there are no items"
    assert cohens_kappa(["y", None], ["y", "n"]).reason == "1 of 2 items lack a label of one rater or both"
    assert math.isnan(cohens_kappa(["y", None], ["y", "n"]).value)
    assert cohens_kappa(["y", "y"], ["y", "y"]).reason.startswith("both raters gave every item the label 'y'")
    assert math.isnan(cohens_kappa(["y", "y"], ["y", "y"]).value)
    perfect = cohens_kappa(["y", "n", "n"], ["y", "n", "n"])
    assert perfect.value == 1.0 and math.isnan(perfect.low) and "agree on everything" in perfect.reason
    one_sided = cohens_kappa(["y"] * 4, ["y", "y", "n", "n"])
    assert one_sided.value == 0.0 and math.isnan(one_sided.low) and "hold a single label" in one_sided.reason


def test_kappa_refuses_raters_of_different_items() -> None:
    with pytest.raises(ShapeMismatch, match="2 and 1"):
        cohens_kappa(["y", "n"], ["y"])


def test_alpha_agrees_with_krippendorffs_example() -> None:
    alpha = krippendorff_alpha(KRIPPENDORFF)
    assert alpha.value == pytest.approx(0.743, abs=5e-4)
    assert alpha.n == 11  # the last unit has one rating only


def test_alpha_by_hand() -> None:
    # Two raters, four items, one disagreement. Coincidences: yes-yes 2, no-no 4, yes-no 1 and no-yes 1;
    # 3 yes and 5 no of 8. Observed disagreement 2/8, by chance 2 * 3 * 5 / (8 * 7):
    # 1 - (2/8) / (30/56) = 8/15.
    alpha = krippendorff_alpha([["yes", "yes"], ["no", "no"], ["yes", "no"], ["no", "no"]])
    assert alpha.value == pytest.approx(8 / 15)


def test_alpha_of_two_raters_nears_kappa_with_many_items() -> None:
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 3, size=3000)
    a, b = (np.where(rng.random(3000) < 0.8, truth, rng.integers(0, 3, size=3000)) for _ in range(2))
    alpha = krippendorff_alpha(np.column_stack([a, b]), n_boot=400)
    kappa = cohens_kappa(a.tolist(), b.tolist())
    assert alpha.value == pytest.approx(kappa.value, abs=1e-3)
    assert (alpha.low, alpha.high) == pytest.approx((kappa.low, kappa.high), abs=0.006)


def test_raters_who_guess_have_alpha_zero() -> None:
    guesses = np.random.default_rng(1).integers(0, 2, size=(400, 3))
    alpha = krippendorff_alpha(guesses)
    assert alpha.low < 0 < alpha.high
    assert abs(alpha.value) < 4 / math.sqrt(400 * 3)
    assert krippendorff_alpha([["y", "n"]] * 10).value < 0


def test_alpha_reads_tables_with_missing_values() -> None:
    as_floats = np.where(KRIPPENDORFF == X, np.nan, KRIPPENDORFF).astype(float)
    expected = krippendorff_alpha(KRIPPENDORFF)
    assert krippendorff_alpha(as_floats) == expected
    assert krippendorff_alpha(pd.DataFrame(as_floats, columns=list("abcd"))) == expected
    assert krippendorff_alpha(KRIPPENDORFF, seed=1).low != expected.low


def test_alpha_without_an_answer_says_why() -> None:
    assert krippendorff_alpha([["y", None], [None, "n"]]).reason == "no item has two ratings"
    assert krippendorff_alpha(np.empty((0, 2))).reason == "no item has two ratings"
    assert krippendorff_alpha([["y", "y"]] * 3).reason == "only one label occurs, which chance explains"
    assert math.isnan(krippendorff_alpha([["y", "y"]] * 3).value)
    perfect = krippendorff_alpha([["y", "y"], ["n", "n"]])
    assert perfect.value == 1.0 and math.isnan(perfect.low) and "agree on everything" in perfect.reason
    assert krippendorff_alpha([["y", "n"]]).reason == "one item shows no spread"
    assert "all alike" in krippendorff_alpha([["y", "n"], ["n", "y"]]).reason
    rare = krippendorff_alpha([["y", "n"]] + [["n", "n"]] * 4)
    assert "resamples hold a single label" in rare.reason and math.isfinite(rare.value)


def test_alpha_refuses_wrong_arguments() -> None:
    with pytest.raises(ShapeMismatch):
        krippendorff_alpha(["y", "n"])


# Fleiss (1971) as on Wikipedia: ten items, fourteen raters, five labels.
FLEISS = [
    [0, 0, 0, 0, 14], [0, 2, 6, 4, 2], [0, 0, 3, 5, 6], [0, 3, 9, 2, 0], [2, 2, 8, 1, 1],
    [7, 7, 0, 0, 0], [3, 2, 6, 3, 0], [2, 5, 3, 2, 2], [6, 5, 2, 1, 0], [0, 2, 2, 3, 7],
]  # fmt: skip


def test_fleiss_kappa_of_the_textbook() -> None:
    ratings = [[label for label, n in enumerate(row) for _ in range(n)] for row in FLEISS]
    kappa = fleiss_kappa(ratings)
    assert kappa.value == pytest.approx(0.210, abs=5e-4)
    assert kappa.low < kappa.value < kappa.high and kappa.n == 10
    assert percent_agreement(ratings).value == pytest.approx(0.378, abs=5e-4)


def test_fleiss_uses_fully_judged_items_only() -> None:
    ratings = [["y", "y", "y"], ["n", "y", "n"], ["n", "n", None], [None, None, None]]
    assert fleiss_kappa(ratings).n == 2
    assert percent_agreement(ratings).n == 3
    assert fleiss_kappa(ratings[2:]).reason == "no item was judged by all raters"
    assert fleiss_kappa([["y"], ["n"]]).reason == "there is one rater"
    assert fleiss_kappa([["y", "y"]] * 3).reason.startswith("all raters gave every item the label 'y'")
    assert percent_agreement([["y", None]]).reason == "no item has two ratings"
    assert percent_agreement([["y", "y"]] * 3).value == 1.0
