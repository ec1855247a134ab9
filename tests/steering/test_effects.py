from __future__ import annotations

import itertools
import math

import numpy as np
import pandas as pd
import pytest
import scipy.stats

from saeffect.errors import ConfigError, EmptySelection, ShapeMismatch, UnknownName
from saeffect.stats.bootstrap import bootstrap_means
from saeffect.stats.multiplicity import benjamini_hochberg
from saeffect.steering import OUTCOMES, effects, outcome_effects
from saeffect.steering.placebos import PLACEBOS

COLUMNS = [
    "feature", "n_pairs", "n_independent", "unsteered_mean", "steered_mean", "placebo_mean",
    "effect", "effect_low", "effect_high", "bootstrap_low", "bootstrap_high", "p", "q", "passed", "paper_pass", "direct_effect", "direct_placebo", "kl",
    "reversed_share", "shuffled_effect", "shuffled_low", "shuffled_high", "shuffled_p", "outcome", "placebo", "reason",
]  # fmt: skip


def test_samples_of_a_prompt_are_averaged() -> None:
    """Eight prompts with two samples that agree: eight differences, worked out apart."""
    by_prompt = np.array([0.3, 0.1, 0.2, -0.1, 0.4, 0.25, 0.15, 0.05])
    steered = np.repeat(by_prompt, 2) + np.tile([0.01, -0.01], 8)
    row = effects(trials_of(3, [0.5] * 16, (0.5 + steered).tolist(), [0.5] * 16)).iloc[0]
    assert (row["n_pairs"], row["n_independent"]) == (16, 8)
    interval = scipy.stats.ttest_1samp(by_prompt, 0.0).confidence_interval(0.95)
    assert [row["effect"], row["effect_low"], row["effect_high"]] == pytest.approx([by_prompt.mean(), *interval])
    signs = np.array(list(itertools.product([1, -1], repeat=8)))
    assert row["p"] == pytest.approx(((signs * by_prompt).mean(1) >= by_prompt.mean() - 1e-12).mean())


def test_few_prompts_count_every_pair() -> None:
    row = effects(trials_of(3, [0.5] * 10, [0.6, 0.7] * 5, [0.5] * 10)).iloc[0]
    assert (row["n_pairs"], row["n_independent"]) == (10, 10), "five prompts"
    row = effects(trials_of(3, [0.5] * 12, [0.6, 0.7] * 6, [0.5] * 12)).iloc[0]
    assert (row["n_pairs"], row["n_independent"]) == (12, 6), "six prompts"


def trials_of(feature, unsteered, steered, random, dose=0.4, n_samples=2):
    """Rows of one feature; the lists run over prompts x samples."""
    rows = []
    for i, values in enumerate(zip(unsteered, steered, random, strict=True)):
        for condition, value in zip(("unsteered", "steered", "random"), values, strict=True):
            rows.append(
                {
                    "feature": feature,
                    "prompt": i // n_samples,
                    "sample": i % n_samples,
                    "condition": condition,
                    "dose": 0.0 if condition == "unsteered" else dose,
                    "similarity": value,
                }
            )
    return pd.DataFrame(rows)


def test_by_hand():
    trials = trials_of(3, [0.1, 0.2, 0.3, 0.2], [0.5, 0.1, 0.7, 0.5], [0.2, 0.2, 0.3, 0.1])
    direct = pd.DataFrame(
        {
            "feature": 3,
            "prompt": [0, 1, 0, 1, 0],
            "condition": ["steered", "steered", "random", "random", "steered"],
            "dose": [0.4, 0.4, 0.4, 0.4, 9.0],
            "delta_logprob": [1.0, 2.0, 0.0, 0.5, 99.0],
            "kl": [0.1, 0.3, 0.7, 0.9, 99.0],
        }
    )
    table = effects(trials, direct)
    assert table.columns.tolist() == COLUMNS
    row = table.iloc[0]
    assert row["feature"] == 3
    assert row["n_pairs"] == 4
    assert row["unsteered_mean"] == pytest.approx(0.2)
    assert row["steered_mean"] == pytest.approx(0.45)
    assert row["placebo_mean"] == pytest.approx(0.2)
    assert row["effect"] == pytest.approx(0.25)  # differences 0.3, -0.1, 0.4, 0.4
    assert row["effect_low"] <= 0.25 <= row["effect_high"]
    # Of the 16 sign patterns, none flipped and only the -0.1 flipped reach the observed sum.
    assert row["p"] == pytest.approx(2 / 16)
    assert row["q"] == pytest.approx(2 / 16)
    assert not row["passed"]
    assert row["paper_pass"]
    assert row["direct_effect"] == 1.5
    assert row["direct_placebo"] == 0.25
    assert row["kl"] == pytest.approx(0.2)
    assert row["reversed_share"] == 0.0  # prompt means 0.1 and 0.4
    assert (row["outcome"], row["placebo"]) == ("similarity", "random")
    assert math.isnan(row["shuffled_effect"])
    assert row["reason"] == ""


def test_paper_pass_looks_at_the_first_pair_only():
    trials = trials_of(0, [0.5, 0.1, 0.1, 0.1], [0.4, 0.9, 0.9, 0.9], [0.1, 0.1, 0.1, 0.1])
    assert not effects(trials)["paper_pass"][0]
    assert not effects(trials.sample(frac=1, random_state=0))["paper_pass"][0]


def test_a_planted_effect_passes_and_noise_does_not():
    rng = np.random.default_rng(0)
    frames = []
    for feature in range(20):
        noise = rng.normal(0.3, 0.1, size=(3, 16))
        noise[1] += 0.3 if feature in (4, 9) else 0.0
        frames.append(trials_of(feature, *noise))
    table = effects(pd.concat(frames)).set_index("feature")
    assert table.index[table["passed"]].tolist() == [4, 9]
    assert table.loc[4, "effect_low"] > 0.15
    assert table["q"].between(table["p"], 1).all()
    # The paper's rule is a coin: of 18 features without effect about half pass.
    assert 4 <= table.drop([4, 9])["paper_pass"].sum() <= 14


def test_false_positives_are_at_the_nominal_rate():
    rng = np.random.default_rng(1)
    frames = [trials_of(f, *rng.normal(0.3, 0.1, size=(3, 8))) for f in range(300)]
    table = effects(pd.concat(frames))
    assert abs((table["p"] <= 0.05).mean() - 0.05) < 0.038  # 3 standard errors
    assert table["passed"].mean() < 0.02


def test_undefined_pairs_are_dropped_and_reported():
    nan = math.nan
    some = trials_of(0, [0.1, nan, 0.1, 0.1], [0.5, 0.5, nan, 0.6], [0.1, 0.1, 0.1, 0.2])
    one = trials_of(1, [0.1, 0.1], [0.5, nan], [0.1, 0.1])
    none = trials_of(2, [nan, nan], [nan, nan], [nan, nan])
    silent = trials_of(5, [0.1, 0.1], [nan, nan], [0.1, 0.1])
    table = effects(pd.concat([some, one, none, silent])).set_index("feature")
    assert table["n_pairs"].tolist() == [2, 1, 0, 0]
    assert table.loc[0, "steered_mean"] == pytest.approx(0.55)
    assert table.loc[0, "p"] == pytest.approx(1 / 4)
    assert "2 of 4 pairs" in table.loc[0, "reason"]
    assert table.loc[0, "q"] == table.loc[0, "p"]  # the undefined features are no tests
    for feature, said in [(1, "fewer than two"), (2, "top tokens"), (5, "no steered text")]:
        assert math.isnan(table.loc[feature, "p"])
        assert math.isnan(table.loc[feature, "effect"])
        assert not table.loc[feature, "passed"]
        assert said in table.loc[feature, "reason"]
    assert table["direct_effect"].isna().all()


def test_no_placebo_and_no_spread():
    trials = trials_of(0, [0.1, 0.1], [0.5, 0.5], [0.2, 0.2])
    assert "no random text" in effects(trials[trials["condition"] != "random"])["reason"][0]
    level = effects(trials).iloc[0]
    assert level["effect"] == pytest.approx(0.3)
    assert math.isnan(level["effect_low"])
    assert "equal" in level["reason"]


def test_several_doses_need_a_choice():
    low = trials_of(0, [0.1, 0.1], [0.2, 0.3], [0.1, 0.1], dose=0.2)
    high = trials_of(0, [0.1, 0.1], [0.8, 0.9], [0.1, 0.1], dose=0.6)
    both = pd.concat([low, high[high["condition"] != "unsteered"]])
    with pytest.raises(ConfigError, match=r"\[0.2, 0.6\]"):
        effects(both)
    with pytest.raises(ConfigError, match="not among"):
        effects(both, dose=0.3)
    assert effects(both, dose=0.6)["steered_mean"][0] == pytest.approx(0.85)
    assert effects(both, dose=0.2)["steered_mean"][0] == pytest.approx(0.25)


def test_bad_input():
    trials = trials_of(0, [0.1, 0.1], [0.2, 0.3], [0.1, 0.1])
    with pytest.raises(ShapeMismatch, match="similarity"):
        effects(trials.drop(columns="similarity"))
    with pytest.raises(ShapeMismatch, match="twice"):
        effects(pd.concat([trials, trials]))
    with pytest.raises(ConfigError, match="alpha"):
        effects(trials, alpha=0)
    with pytest.raises(EmptySelection):
        effects(trials[:0])


def many_outcomes(n_features=3, seed=0):
    """Trials and direct effects with every outcome: two prompts x two samples, both placebos."""
    rng = np.random.default_rng(seed)
    trials, direct = [], []
    for feature in range(n_features):
        for condition, lift in (("unsteered", 0.0), ("steered", 0.3), ("random", 0.0), ("matched", 0.1)):
            for prompt in range(2):
                for sample in range(2):
                    cell = {"feature": feature, "prompt": prompt, "sample": sample, "condition": condition}
                    cell["dose"] = 0.0 if condition == "unsteered" else 0.4
                    for column in ("similarity", "similarity_shuffled", "keyword_score", "off_list", "distinct2"):
                        cell[column] = rng.normal(0.3 + lift * (column != "similarity_shuffled"), 0.05)
                    cell["perplexity"] = float(np.exp(rng.normal(1 + lift, 0.1)))
                    trials.append(cell)
                if condition != "unsteered":
                    cell = {"feature": feature, "prompt": prompt, "condition": condition, "dose": 0.4}
                    direct.append({**cell, "delta_logprob": rng.normal(lift, 0.1), "kl": rng.gamma(2.0, lift + 0.1)})
    return pd.DataFrame(trials), pd.DataFrame(direct)


def test_every_outcome_against_every_control_by_hand():
    from scipy import stats

    trials, direct = many_outcomes()
    table = outcome_effects(trials, direct, declared=("off_list", "kl"), placebos=("matched", "random"))
    assert len(table) == 3 * (2 * len(OUTCOMES) + 1)  # and similarity against another feature's tokens
    assert set(table.loc[table["placebo"] == "shuffled", "outcome"]) == {"similarity"}
    assert set(table.loc[table["declared"], "outcome"]) == {"off_list", "kl"}
    assert table.loc[table["primary"], ["outcome", "placebo"]].drop_duplicates().to_numpy().tolist() == [
        ["off_list", "matched"]
    ]
    wide = trials.set_index(["feature", "prompt", "sample", "condition"])["off_list"].unstack().loc[1]
    row = table[(table["feature"] == 1) & table["primary"]].iloc[0]
    differences = (wide["steered"] - wide["matched"]).to_numpy()
    assert row["effect"] == pytest.approx(differences.mean())
    exact = stats.permutation_test(
        (differences,), np.mean, permutation_type="samples", alternative="greater", n_resamples=np.inf
    )
    assert row["p"] == pytest.approx(exact.pvalue)
    for _, rows in table.groupby(["outcome", "placebo"]):
        np.testing.assert_allclose(rows["q"], benjamini_hochberg(rows["p"].to_numpy()))


def test_log_perplexity_and_direct_effects_by_prompt():
    trials, direct = many_outcomes()
    table = outcome_effects(trials, direct).set_index(["outcome", "placebo", "feature"])
    wide = np.log(trials.set_index(["feature", "prompt", "sample", "condition"])["perplexity"]).unstack().loc[2]
    row = table.loc["perplexity", "random", 2]
    assert row["effect"] == pytest.approx((wide["steered"] - wide["random"]).mean())
    assert row["alternative"] == "two-sided"
    means = direct[direct["feature"] == 2].groupby("condition")["delta_logprob"].mean()
    row = table.loc["direct_effect", "matched", 2]
    assert row["n_pairs"] == 2
    assert row["unsteered_mean"] == 0.0
    assert row["effect"] == pytest.approx(means["steered"] - means["matched"])


def test_other_features_tokens_as_control():
    trials, direct = many_outcomes()
    row = effects(trials, direct, placebo="matched").iloc[0]
    wide = trials[trials["feature"] == 0].pivot(
        index=["prompt", "sample"], columns="condition", values=["similarity", "similarity_shuffled"]
    )
    gains = {c: wide[c]["steered"] - wide[c]["unsteered"] for c in ("similarity", "similarity_shuffled")}
    assert row["shuffled_effect"] == pytest.approx((gains["similarity"] - gains["similarity_shuffled"]).mean())
    assert row["shuffled_low"] <= row["shuffled_effect"] <= row["shuffled_high"]
    assert 0 < row["shuffled_p"] <= 1


def test_the_share_of_prompts_where_it_reverses():
    # Prompt means of the differences: 0.3, -0.1, 0.2, 0.
    trials = trials_of(0, [0.0] * 8, [0.2, 0.4, 0.1, -0.3, 0.2, 0.2, 0.1, -0.1], [0.0] * 8)
    assert effects(trials)["reversed_share"][0] == 0.25
    falls = trials.assign(distinct2=-trials["similarity"])
    table = outcome_effects(falls, placebos=("random",)).set_index("outcome")
    assert table.loc["distinct2", "effect"] < 0
    assert table.loc["distinct2", "reversed_share"] == 0.25  # here rising is against the overall effect


def test_degenerate_outcomes_have_reasons():
    trials, direct = many_outcomes(1)
    trials["off_list"] = math.nan
    trials["distinct2"] = 0.5
    alone = outcome_effects(
        trials[trials["condition"] != "matched"].assign(similarity_shuffled=math.nan),
        direct,
        obstacles={(0, "matched"): "no feature resembles it"},
    ).set_index(["outcome", "placebo"])
    assert alone.loc[("similarity", "matched"), "reason"] == "no feature resembles it"
    assert "no off_list is defined" in alone.loc[("off_list", "random"), "reason"]
    assert "no other feature" in alone.loc[("similarity", "shuffled"), "reason"]
    ties = alone.loc[("distinct2", "random")]
    assert (ties["effect"], ties["p"]) == (0.0, 1.0)
    assert math.isnan(ties["low"])
    assert "equal" in ties["reason"]
    assert math.isnan(ties["reversed_share"])
    undefined = alone["effect"].isna()
    assert (alone.loc[undefined, "reason"] != "").all()
    one = trials[(trials["prompt"] == 0) & (trials["sample"] == 0)]
    assert outcome_effects(one, direct[:0])["effect"].isna().all()
    unsteered = trials[trials["condition"] == "unsteered"]
    why = {(0, "steered"): "feature 0 never fired"}
    nothing = effects(unsteered, direct[:0], dose=0.4, obstacles=why)
    assert nothing["reason"][0] == "feature 0 never fired"
    assert not nothing["passed"][0]


def test_bad_names():
    trials, direct = many_outcomes(1)
    with pytest.raises(UnknownName, match="valid: direct_effect, distinct2"):
        outcome_effects(trials, direct, declared=("similar",))
    with pytest.raises(UnknownName, match="off_list"):
        effects(trials, outcome="of_list")


ABLATED = OUTCOMES["similarity"].under("ablate")


def test_ablation_is_tested_below_zero() -> None:
    """Everything mirrored: what a feature adds when it is pushed it should take away when it is switched off."""
    rng = np.random.default_rng(0)
    unsteered, steered, random = (rng.normal(0.3, 0.1, 16).tolist() for _ in range(3))
    lower = [value - 0.2 for value in steered]
    added = effects(trials_of(3, *([-v for v in some] for some in (unsteered, lower, random)))).iloc[0]
    taken = effects(trials_of(3, unsteered, lower, random), outcome=ABLATED).iloc[0]
    assert taken["effect"] < 0
    assert taken["effect"] == pytest.approx(-added["effect"])
    assert (taken["p"], taken["passed"], taken["paper_pass"]) == (added["p"], True, added["paper_pass"])
    assert taken["reversed_share"] == added["reversed_share"]
    assert effects(trials_of(3, unsteered, lower, random)).iloc[0]["p"] > 0.9, "the other side"


def test_side_effects_stay_two_sided() -> None:
    trials = trials_of(3, [0.1] * 12, [0.2, 0.3] * 6, [0.1] * 12).assign(distinct2=0.5, keyword_score=0.1)
    sides = outcome_effects(trials, operator="ablate", placebos=("random",)).set_index("outcome")["alternative"]
    assert sides[["similarity", "keyword_score", "distinct2"]].tolist() == ["less", "less", "two-sided"]


def test_unchanged_texts_fail_the_papers_rule() -> None:
    same = trials_of(3, [0.1] * 12, [0.1] * 12, [0.1] * 12)
    assert not effects(same, outcome=ABLATED).iloc[0]["paper_pass"]
    assert not effects(same).iloc[0]["paper_pass"]


def test_the_bootstrap_interval_stands_beside_students() -> None:
    by_prompt = np.array([0.3, 0.1, 0.2, -0.1, 0.4, 0.25, 0.15, 0.05])
    steered = np.repeat(by_prompt, 2) + np.tile([0.01, -0.01], 8)
    row = effects(trials_of(3, [0.5] * 16, (0.5 + steered).tolist(), [0.5] * 16), seed=5).iloc[0]
    low, high = bootstrap_means(by_prompt[None], seed=5)
    assert [row["bootstrap_low"], row["bootstrap_high"]] == pytest.approx([low[0], high[0]])
    one = effects(trials_of(3, [0.5], [0.6], [0.5], n_samples=1)).iloc[0]
    assert np.isnan(one["bootstrap_low"])
    assert one["reason"] == "fewer than two pairs"


def said(error: type[Exception], *arguments, **more) -> str:
    with pytest.raises(error) as caught:
        effects(*arguments, **more)
    return str(caught.value)


def test_errors_name_place_and_remedy() -> None:
    trials = trials_of(0, [0.1, 0.1], [0.2, 0.3], [0.1, 0.1])
    both = pd.concat([trials, trials[trials["condition"] != "unsteered"].assign(dose=0.6)])
    choose = "\n  at:  dose\n  fix: give one of them."
    assert (
        said(ConfigError, both) == f"ConfigError: the trials hold the doses [0.4, 0.6], and no dose was chosen.{choose}"
    )
    assert said(ConfigError, both, dose=0.3) == (
        f"ConfigError: the trials hold the doses [0.4, 0.6], and dose 0.3 is not among them.{choose}"
    )
    assert said(EmptySelection, trials[:0]) == (
        "EmptySelection: there are no steered trials.\n  at:  trials\n  fix: run the interventions first."
    )
    assert said(ShapeMismatch, trials.drop(columns=["similarity", "dose"])) == (
        "ShapeMismatch: the trials lack the column(s) dose, similarity.\n  at:  trials"
    )
    assert said(ShapeMismatch, pd.concat([trials, trials])) == (
        "ShapeMismatch: a trial is there twice: same feature, prompt, sample, condition and dose.\n  at:  trials"
    )
    for alpha in (0, 1):
        assert said(ConfigError, trials, alpha=alpha) == (
            f"ConfigError: alpha must be between 0 and 1. Got {alpha}.\n  at:  alpha"
        )
    assert said(ShapeMismatch, trials, outcome="off_list") == (
        "ShapeMismatch: the trials lack the column(s) off_list.\n  at:  trials"
    )


def test_a_q_of_alpha_passes() -> None:
    trials = trials_of(3, [0.1, 0.2, 0.3, 0.2], [0.5, 0.1, 0.7, 0.5], [0.2, 0.2, 0.3, 0.1])
    assert effects(trials)["q"].tolist() == [2 / 16]
    assert [effects(trials, alpha=alpha)["passed"][0] for alpha in (0.124, 0.125)] == [False, True]


def test_naming_prompt_is_a_control_without_dose() -> None:
    trials = trials_of(3, [0.1, 0.2, 0.3, 0.2], [0.5, 0.1, 0.7, 0.5], [0.2, 0.2, 0.3, 0.1])
    is_placebo = trials["condition"] == "random"
    named = trials.assign(
        condition=trials["condition"].replace("random", "prompt"), dose=trials["dose"].mask(is_placebo, 0.0)
    )
    found, peer = effects(named, placebo="prompt").iloc[0], effects(trials).iloc[0]
    assert (found["effect"], found["p"], found["placebo"]) == (peer["effect"], peer["p"], "prompt")
    other = trials.assign(dose=trials["dose"].mask(is_placebo, 0.7))
    assert effects(other, dose=0.4)["reason"][0].startswith("no random text has a similarity")


def test_every_reason_in_full() -> None:
    nan = math.nan
    half = trials_of(0, [0.1, nan, 0.1, 0.1], [0.5, 0.5, nan, 0.6], [0.1, 0.1, 0.1, 0.1])
    reasons = {
        "similarity undefined in 2 of 4 pairs, which are left out": half,
        "similarity undefined in 1 of 2 pairs, which are left out; fewer than two pairs remain": half[:6],
        "fewer than two pairs": trials_of(0, [0.1], [0.5], [0.1]),
        "values: all 2 are equal, so they show no spread": trials_of(0, [0.1] * 2, [0.5] * 2, [0.2] * 2),
        "no steered text has a similarity: none was generated, or no word of it is known": trials_of(
            0, [0.1] * 2, [nan] * 2, [0.2] * 2
        ),
        "no unsteered text has a similarity: none was generated, or no word of it is known": trials_of(
            0, [nan] * 2, [0.1] * 2, [0.2] * 2
        ),
        "no similarity is defined: none of the top tokens is in the embedding, or no generated word": trials_of(
            0, [nan] * 2, [nan] * 2, [nan] * 2
        ),
    }
    for reason, trials in reasons.items():
        assert effects(trials)["reason"].tolist() == [reason]
    spread = trials_of(0, [0.1, 0.1], [0.5, 0.6], [0.1, 0.1])
    assert effects(spread, outcome="direct_effect")["reason"].tolist() == [
        "no direct effect is defined: it was not measured, or there are no top tokens"
    ]
    words = effects(spread.assign(keyword_score=nan), outcome="keyword_score")
    assert words["reason"].tolist() == [
        "no keyword_score is defined: no generated word, or no top token that is a word"
    ]
    shuffled = outcome_effects(spread.assign(similarity_shuffled=nan)).set_index("placebo").loc["shuffled"]
    assert shuffled["reason"] == "no other feature's top tokens to measure against, or none of them is known"


def test_obstacles_speak_only_where_no_pair_is_left() -> None:
    trials = trials_of(0, [0.1, 0.1], [0.5, 0.6], [0.1, 0.1])
    why = {(0, "random"): "no direction", (0, "steered"): "never fired", (1, "random"): "another's"}
    assert effects(trials, obstacles=why)["reason"].tolist() == [""]
    without = trials[trials["condition"] != "random"]
    assert effects(without, obstacles=why)["reason"].tolist() == ["never fired"]
    del why[0, "steered"]
    assert effects(without, obstacles=why)["reason"].tolist() == ["no direction"]
    assert "no random text" in effects(without, obstacles={(1, "random"): "another's"})["reason"][0]


def test_perplexity_of_nothing_is_left_out() -> None:
    trials = trials_of(0, [0.5] * 4, [0.5] * 4, [0.5] * 4).assign(perplexity=[2.0, 4.0, 2.0] * 3 + [0.0, 4.0, 2.0])
    table = outcome_effects(trials.assign(perplexity=trials["perplexity"] + np.arange(12) * (trials["perplexity"] > 0)))
    row = table[(table["outcome"] == "perplexity") & (table["placebo"] == "random")].iloc[0]
    assert (row["n_pairs"], row["reason"]) == (3, "perplexity undefined in 1 of 4 pairs, which are left out")
    differences = np.log([5 / 4, 8 / 7, 11 / 10])
    assert row["effect"] == pytest.approx(differences.mean())


def test_columns_and_labels_of_every_outcome() -> None:
    trials, direct = many_outcomes(1)
    table = outcome_effects(trials, direct)
    assert table.columns.tolist() == [
        *("feature", "outcome", "placebo", "n_pairs", "n_independent", "effect", "low", "high", "p", "q"),
        *("reversed_share", "unsteered_mean", "steered_mean", "placebo_mean", "alternative", "unit", "declared"),
        *("primary", "reason"),
    ]
    assert outcome_effects(trials.drop(columns=list(OUTCOMES)[4:], errors="ignore"), direct).columns.equals(
        table.columns
    )
    labels = table.set_index("outcome")[["unit", "alternative"]].drop_duplicates()
    for name, row in labels.iterrows():
        assert (row["unit"], row["alternative"]) == (OUTCOMES[name].unit, OUTCOMES[name].alternative)
    first = table[table["primary"]]
    assert first[["outcome", "placebo"]].to_numpy().tolist() == [["similarity", table["placebo"].iloc[0]]]
    assert table.loc[table["declared"], "outcome"].unique().tolist() == ["similarity"]
    assert set(table["placebo"]) == {*PLACEBOS, "shuffled"}
    similar = table[table["outcome"] == "similarity"].set_index("placebo").loc["random"]
    means = trials.groupby("condition")["similarity"].mean()
    assert [similar["unsteered_mean"], similar["steered_mean"], similar["placebo_mean"]] == pytest.approx(
        [means["unsteered"], means["steered"], means["random"]]
    )
    assert "direct_effect" not in set(outcome_effects(trials)["outcome"])
    assert "off_list" not in set(outcome_effects(trials.drop(columns="off_list"), direct)["outcome"])
    wide = trials.set_index(["prompt", "sample", "condition"])[["similarity", "similarity_shuffled"]].unstack()
    gains = [wide[c]["steered"] - wide[c]["unsteered"] for c in ("similarity", "similarity_shuffled")]
    other = table[table["placebo"] == "shuffled"].iloc[0]
    assert other["placebo_mean"] == pytest.approx((wide["similarity"]["unsteered"] + gains[1]).mean())
    assert other["effect"] == pytest.approx((gains[0] - gains[1]).mean())


def test_features_come_by_number_and_each_keeps_its_own() -> None:
    frames = [trials_of(f, [0.1] * 4, [0.1 + 0.1 * f + 0.01 * i for i in range(4)], [0.1] * 4) for f in (7, 2, 5)]
    short = trials_of(3, [0.1] * 2, [0.4, 0.5], [0.1] * 2)
    table = effects(pd.concat([*frames, short]))
    assert table["feature"].tolist() == [2, 3, 5, 7]
    assert table["effect"].to_numpy() == pytest.approx([0.215, 0.35, 0.515, 0.715])
    assert table["p"].to_numpy() == pytest.approx([1 / 16, 1 / 4, 1 / 16, 1 / 16])
    assert table["bootstrap_low"].between(table["effect"] - 0.03 * 4, table["effect"]).all()
