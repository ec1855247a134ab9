"""A whole synthetic study in memory, for tests: three arms, every table, hostile tokens among them.

The numbers are made up but behave like real ones: few features are of the domain, more of them in the
treatment, steering works on most but not all, some coherence is undefined.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from saeffect.comparison import PRIMARY, Comparison, compare
from saeffect.comparison.arms import ArmFacts, ArmTables
from saeffect.report import with_answer

HOSTILE = (
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "\u202egnp.exe\u202c",
    "line\nbreak",
    "\ufffd",
    "&amp;",
    "=1+1",
    "|cell|`code`",
    "{{ 7*7 }}",
    "</td></table>",
    "\t",
    "a" * 60,
    "e\u0301\u0323\u0330",
    "\u200b",
    "💊",
)
# fmt: off
MEDICAL = [
    " patient", " patients", " cancer", " tumor", " insulin", " diabetes", " diagnosis", " clinical",
    " symptoms", " therapy", " doctor", " surgery", " disease", " chronic", " infection",
    " antibiotics", " blood", " pressure", " cardiac", " kidney", " liver", " vaccine", " dose",
    " medication", " treatment", " physician", " nurse", " hospital", " pain", " fever", " lung",
    " stroke", " gene", " cells",
]
GENERAL = [
    " the", " river", " market", " walked", " red", " music", " train", " window", " bright", " letter",
    " north", " football", " idea", " paper", " winter", " code", " data", " Paris", " June", " seven",
    " under", " maybe", " said", " government", " law", " film", " garden", " stone", " quick",
    " bread", " sea", " novel", " team", " number", " house", " travel", " glass", " road", " evening",
    " language",
]
# fmt: on
DOMAIN_SHARE = {"control": 0.10, "treatment": 0.20, "placebo": 0.12}
N_PROMPTS, N_SAMPLES, DOSE, TOP_K = 3, 2, 0.4, 10


def compared(arms: dict[str, ArmTables], *, tests: tuple[str, ...] = PRIMARY, **more: Any) -> Comparison:
    """A quick comparison of the arms, with its threats and answer."""
    settings = {"seed": 0, "n_boot": 60, "n_permutations": 60, **more}
    found = compare(arms, min_matches=2, alpha=0.05, tests=tests, **settings)
    return with_answer(found, arms, tests=tests, min_matches=2, alpha=0.05)


def synthetic_arms(seed: int = 0, n_features: int = 400, max_tested: int = 24) -> dict[str, ArmTables]:
    """Control, treatment and placebo of a made-up study, keyed by name (which equals the role)."""
    arms = {}
    for number, role in enumerate(DOMAIN_SHARE):
        rng = np.random.default_rng([seed, number])
        features, selection, coherence = _features(role, n_features, rng)
        tested = selection.loc[selection["is_domain"], "feature"].to_numpy()[:max_tested]
        interventions = _interventions(features, tested, rng)
        direct = _direct_effects(tested, rng)
        facts = ArmFacts(
            role=role,
            model="toy-135m-medical" if role == "treatment" else "toy-135m",
            hook="blocks.26.hook_resid_pre",
            architecture="topk",
            d_sae=n_features,
            k=32,
            training_tokens=1_000_000,
            training_text="general+medical",
            training_text_sha256="0f" * 32,
            seed=1 if role == "placebo" else 0,
            normalisation="expected_average_only_in",
            dtype="float16",
            explained_variance=0.80 + 0.002 * number,
            ce_loss_score=0.95 - 0.001 * number,
            l0=32.0,
            dead_share=0.03,
        )
        arms[role] = ArmTables(
            name=role,
            role=role,
            features=features,
            coherence=coherence,
            selection=selection,
            interventions=interventions,
            direct_effects=direct,
            effects=_effects(interventions, direct),
            facts=facts,
            coverage_unique=0.9,
        )
    return arms


def synthetic_examples(seed: int = 0, n_features: int = 400, per_feature: int = 3) -> dict[str, pd.DataFrame]:
    """The examples table of each arm of `synthetic_arms` with the same arguments."""
    examples = {}
    for number, (name, arm) in enumerate(synthetic_arms(seed, n_features).items()):
        rng = np.random.default_rng([seed, number, 7])
        rows = []
        for feature in arm.features["feature"]:
            top = arm.features["top_tokens"].iloc[feature]
            for rank in range(per_feature if arm.features["n_active"].iloc[feature] else 0):
                position = int(rng.integers(2, 14))
                tokens = [str(rng.choice(GENERAL)) for _ in range(16)]
                tokens[position] = top[rank % len(top)]
                tokens[position - 2] = HOSTILE[int(rng.integers(len(HOSTILE)))]
                activations = np.where(rng.random(16) < 0.15, rng.uniform(0.1, 2.0, 16), 0.0)
                activations[position] = 6.0 - rank
                rows.append(
                    {
                        "feature": int(feature),
                        "rank": rank,
                        "activation": float(activations[position]),
                        "position": position,
                        "tokens": tokens,
                        "activations": [float(value) for value in activations],
                        "source": "medical" if rng.random() < 0.5 else "general",
                    }
                )
        examples[name] = pd.DataFrame(rows)
    return examples


def _features(role: str, n_features: int, rng: np.random.Generator) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    """Feature, selection and coherence tables; hostile tokens go to one feature in four."""
    features, selections, coherences = [], [], []
    for feature in range(n_features):
        planted = rng.random() < DOMAIN_SHARE[role]
        matches = int(rng.integers(2, 9)) if planted else int(rng.random() < 0.15)
        matched = [str(token) for token in rng.choice(MEDICAL, size=matches, replace=False)]
        others = [str(token) for token in rng.choice(GENERAL, size=TOP_K - matches, replace=False)]
        if rng.random() < 0.25 and others:
            others[-1] = HOSTILE[feature % len(HOSTILE)]
        tokens = [(matched + others)[i] for i in rng.permutation(TOP_K)]
        weights = np.sort(rng.gamma(4.0, 0.1 if role != "treatment" else 0.12, TOP_K))[::-1]
        dead = rng.random() < 0.03
        activity = rng.gamma(2.0, 1.0)
        density = 0.0 if dead else float(rng.beta(1.0, 200.0))
        features.append(
            {
                "feature": feature,
                "top_tokens": tokens,
                "top_token_ids": [int(i) for i in rng.integers(0, 49_000, TOP_K)],
                "top_weights": [float(w) for w in weights],
                "top_tokens_dot": tokens[::-1],
                "top_tokens_cosine": tokens,
                "projection_mean": float(rng.normal(0, 0.01)),
                "projection_std": 0.1,
                "projection_skewness": float(rng.normal(0.5, 0.2)),
                "projection_kurtosis": float(rng.normal(4, 0.5)),
                "decoder_norm": 1.0,
                "density": density,
                "mean_activation": float("nan") if dead else activity,
                "max_activation": 0.0 if dead else 4 * activity,
                "n_active": 0 if dead else 1 + int(density * 100_000),
                "density_domain": density * (1.6 if planted else 0.9),
                "density_general": density * (0.4 if planted else 1.1),
            }
        )
        judged = matches >= 2 and rng.random() < 0.6
        no = int(judged and rng.random() < 0.1)
        selections.append(
            {
                "feature": feature,
                "matches": matches,
                "matched": matched,
                "matches_dot": max(0, matches - int(rng.integers(0, 4))),
                "matches_cosine": matches,
                "in_vocabulary": matches >= 2,
                "n_yes": 2 * int(judged) * (1 - no),
                "n_no": 2 * no,
                "n_unsure": int(judged and rng.random() < 0.2),
                "label": "medicine <b>bold</b>" if judged and not no else "",
                "is_domain": matches >= 2 and not no,
            }
        )
        undefined = rng.random() < 0.05
        coherences.append(
            {
                "feature": feature,
                "coherence": float("nan")
                if undefined
                else float(np.clip(rng.normal(0.25 + 0.05 * matches, 0.1), -1, 1)),
                "n_known": 1 if undefined else int(rng.integers(2, TOP_K + 1)),
                "reason": "fewer than two top tokens are in the word vectors" if undefined else "",
            }
        )
    return pd.DataFrame(features), pd.DataFrame(selections), pd.DataFrame(coherences)


def _interventions(features: pd.DataFrame, tested: np.ndarray, rng: np.random.Generator) -> pd.DataFrame:
    """Steering raises the similarity of about two features in three."""
    rows = []
    for feature in tested:
        works = 0.25 if rng.random() < 0.67 else 0.0
        top = features["top_tokens"].iloc[feature]
        for prompt in range(N_PROMPTS):
            for sample in range(N_SAMPLES):
                base = rng.normal(0.35, 0.04)
                for condition, shift in (("unsteered", 0.0), ("steered", works), ("random", 0.01)):
                    words = [str(w) for w in rng.choice(GENERAL, size=10)]
                    if condition == "steered":
                        words[2:5] = top[:3]
                    steered = condition != "unsteered"
                    rows.append(
                        {
                            "feature": int(feature),
                            "prompt": prompt,
                            "sample": sample,
                            "condition": condition,
                            "dose": DOSE if steered else 0.0,
                            "coefficient": 55.0 if steered else 0.0,
                            "text": "".join(words) + ".",
                            "similarity": float(base + shift + (rng.normal(0, 0.03) if steered else 0.0)),
                            "distinct2": float(rng.uniform(0.7, 1.0)),
                        }
                    )
    columns = [
        "feature",
        "prompt",
        "sample",
        "condition",
        "dose",
        "coefficient",
        "text",
        "similarity",
        "distinct2",
    ]
    return pd.DataFrame(rows, columns=columns)


def _direct_effects(tested: np.ndarray, rng: np.random.Generator) -> pd.DataFrame:
    rows = []
    for feature in tested:
        for prompt in range(N_PROMPTS):
            for condition, mean in (("steered", 2.0), ("random", 0.1)):
                rows.append(
                    {
                        "feature": int(feature),
                        "prompt": prompt,
                        "condition": condition,
                        "dose": DOSE,
                        "delta_logprob": float(rng.normal(mean, 0.4)),
                        "kl": float(rng.gamma(2.0, 0.2)),
                    }
                )
    return pd.DataFrame(rows, columns=["feature", "prompt", "condition", "dose", "delta_logprob", "kl"])


def _effects(interventions: pd.DataFrame, direct: pd.DataFrame) -> pd.DataFrame:
    """Effects with a normal-theory interval and p: near enough for a study that is made up."""
    rows = []
    for feature, trials in interventions.groupby("feature"):
        wide = trials.pivot(index=["prompt", "sample"], columns="condition", values="similarity")
        difference = (wide["steered"] - wide["random"]).to_numpy()
        mean, error = difference.mean(), difference.std(ddof=1) / np.sqrt(len(difference))
        p = float(np.clip(np.exp(-0.5 * max(mean / error, 0.0) ** 2), 1e-4, 1.0))
        mine = direct[direct["feature"] == feature]
        direct_means = mine.groupby("condition")["delta_logprob"].mean()
        rows.append(
            {
                "feature": int(feature),
                "n_pairs": len(difference),
                "unsteered_mean": wide["unsteered"].mean(),
                "steered_mean": wide["steered"].mean(),
                "placebo_mean": wide["random"].mean(),
                "effect": mean,
                "effect_low": mean - 1.96 * error,
                "effect_high": mean + 1.96 * error,
                "p": p,
                "paper_pass": bool(wide["steered"].iloc[0] > wide["unsteered"].iloc[0]),
                "direct_effect": direct_means["steered"],
                "direct_placebo": direct_means["random"],
                "kl": mine.loc[mine["condition"] == "steered", "kl"].mean(),
                "outcome": "similarity",
                "placebo": "random",
                "reason": "",
            }
        )
    table = pd.DataFrame(rows)
    if table.empty:
        means = ["unsteered_mean", "steered_mean", "placebo_mean", "effect", "effect_low", "effect_high"]
        rest = [
            "p",
            "q",
            "passed",
            "paper_pass",
            "direct_effect",
            "direct_placebo",
            "kl",
            "outcome",
            "placebo",
            "reason",
        ]
        return pd.DataFrame(columns=["feature", "n_pairs", *means, *rest])
    order = np.argsort(table["p"].to_numpy())
    scaled = table["p"].to_numpy()[order] * len(table) / np.arange(1, len(table) + 1)
    q = np.empty(len(table))
    q[order] = np.minimum.accumulate(scaled[::-1])[::-1].clip(max=1.0)
    table["q"] = q
    table["passed"] = table["q"] <= 0.05
    return table
