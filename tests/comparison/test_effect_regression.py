from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import statsmodels.api as sm
from scipy import stats

from saeffect.comparison.arms import roles_of
from saeffect.comparison.effect_regression import effect_regression


def arm_of(tiny_arm, name, role, rng, n=40, shift=0.0):
    ids = np.arange(n)
    density, norm, coherence = 10 ** rng.uniform(-4, -1, n), rng.uniform(0.5, 2, n), rng.uniform(0, 1, n)
    effect = 0.1 + shift + 0.3 * coherence - 0.05 * np.log10(density) + 0.2 * norm + rng.normal(0, 0.02, n)
    arm = tiny_arm(name, role)
    features = pd.concat([arm.features.iloc[[0]]] * n, ignore_index=True)
    features = features.assign(feature=ids, density=density, decoder_norm=norm)
    effects = pd.DataFrame(
        {"feature": ids, "n_pairs": 4, "effect": effect, "p": 0.5, "passed": False, "paper_pass": False}
    ).assign(placebo="matched")
    scores = pd.DataFrame({"feature": ids, "coherence": coherence, "n_known": 2, "reason": ""})
    return replace(arm, features=features, effects=effects, coherence=scores)


@pytest.fixture
def three(tiny_arm):
    rng = np.random.default_rng(0)
    return {
        "base": arm_of(tiny_arm, "base", "control", rng),
        "tuned": arm_of(tiny_arm, "tuned", "treatment", rng, shift=0.5),
        "again": arm_of(tiny_arm, "again", "placebo", rng),
    }


def fitted(arms):
    return effect_regression(arms, roles_of({name: arm.role for name, arm in arms.items()}))


def peer(arms, dummies):
    y, rows, labels = [], [], []
    for name, arm in arms.items():
        y += arm.effects["effect"].tolist()
        frame = pd.DataFrame(
            {
                "coherence": arm.coherence["coherence"],
                "log10_density": np.log10(arm.features["density"]),
                "decoder_norm": arm.features["decoder_norm"],
                **{f"arm {other}": float(name == other) for other in dummies},
            }
        )
        rows.append(frame)
        labels += [name] * len(frame)
    return sm.OLS(np.array(y), sm.add_constant(pd.concat(rows, ignore_index=True))), labels


def test_agrees_with_statsmodels_hc3(three):
    terms = fitted(three).terms.set_index("term")
    model, _ = peer(three, ("tuned", "again"))
    fit = model.fit(cov_type="HC3", use_t=True)
    names = ["intercept", "coherence", "log10_density", "decoder_norm", "arm tuned", "arm again"]
    assert list(terms.index) == names
    np.testing.assert_allclose(terms["estimate"], fit.params)
    np.testing.assert_allclose(terms["p"], fit.pvalues)
    np.testing.assert_allclose(terms[["low", "high"]], fit.conf_int())
    assert set(terms["errors"]) == {"HC3"}
    assert terms.loc["arm tuned", "estimate"] == pytest.approx(0.5, abs=0.03)
    assert "does not hold the noise of SAE training" in terms.loc["arm tuned", "reason"]
    assert (terms.loc[names[:4], "reason"] == "").all()


def test_with_many_saes_errors_are_clustered_by_sae(tiny_arm, three):
    rng = np.random.default_rng(1)
    arms = three | {f"p{i}": arm_of(tiny_arm, f"p{i}", "placebo", rng) for i in range(4)}
    terms = fitted(arms).terms.set_index("term")
    model, labels = peer(arms, ("tuned",))
    fit = model.fit()
    np.testing.assert_allclose(terms["estimate"], fit.params)
    properties = ["coherence", "log10_density", "decoder_norm"]
    # leaving out one SAE after the other, by hand
    labels, clusters = np.array(labels), sorted(set(labels))
    others = [np.linalg.lstsq(model.exog[labels != c], model.endog[labels != c])[0] for c in clusters]
    error = np.sqrt(6 / 7 * ((np.array(others) - fit.params.to_numpy()) ** 2).sum(axis=0))
    reach = stats.t.ppf(0.975, 6) * pd.Series(error, index=fit.params.index)
    np.testing.assert_allclose(terms.loc[properties, "high"] - terms.loc[properties, "estimate"], reach[properties])
    assert set(terms["errors"]) == {"clustered by SAE"}
    # one treated cluster
    assert np.isnan(terms.loc["arm tuned", "p"])
    assert "one steered SAE" in terms.loc["arm tuned", "reason"]


def test_partial_residuals_have_the_terms_slope(three):
    found = fitted(three)
    estimates = found.terms.set_index("term")["estimate"]
    for term, rows in found.partial_residuals.groupby("term"):
        assert len(rows) == 120
        assert np.polyfit(rows["x"], rows["residual"], 1)[0] == pytest.approx(estimates[term])
    assert set(found.partial_residuals["term"]) == {"coherence", "log10_density", "decoder_norm"}
    # statsmodels' component plus residual (CCPR)
    model, _ = peer(three, ("tuned", "again"))
    fit = model.fit()
    rows = found.partial_residuals[found.partial_residuals["term"] == "coherence"]
    ccpr = fit.resid + fit.params["coherence"] * fit.model.exog[:, 1]
    np.testing.assert_allclose(rows["residual"].to_numpy(), np.asarray(ccpr))


def test_constant_property_is_left_out_with_a_reason(three):
    arms = {name: replace(arm, features=arm.features.assign(decoder_norm=1.0 + 1e-7)) for name, arm in three.items()}
    terms = fitted(arms).terms.set_index("term")
    assert np.isnan(terms.loc["decoder_norm", "estimate"])
    assert "the same in every feature" in terms.loc["decoder_norm", "reason"]
    assert terms["p"].notna().sum() == 5


def test_features_without_a_property_are_counted(three):
    coherence = three["base"].coherence.copy()
    coherence.loc[:4, "coherence"] = np.nan
    terms = fitted(three | {"base": replace(three["base"], coherence=coherence)}).terms
    assert set(terms["n"]) == {115}
    assert set(terms["n_left_out"]) == {5}


def test_nothing_steered_and_one_feature(tiny_arm, three):
    bare = {name: replace(arm, effects=None) for name, arm in three.items()}
    assert set(fitted(bare).terms["reason"]) == {"nothing was steered"}
    assert fitted(bare).partial_residuals.empty
    one = {name: replace(arm, effects=arm.effects.head(1)) for name, arm in three.items()}
    terms = fitted(one).terms
    assert terms["p"].isna().all()
    assert (terms["reason"] != "").all()
    no_treatment = three | {"tuned": replace(three["tuned"], effects=None)}
    assert "no usable feature of tuned" in fitted(no_treatment).terms.set_index("term").loc["arm tuned", "reason"]
