"""Whole studies of nothing: an SAE of the control's model in the treatment's place, judged as `compare` judges.

Every SAE of a study is drawn alike, whatever its role, so that what is credited to fine-tuning is a false alarm. SAEs
scatter more than their features tell (`seed_noise`), as SAEs of different seeds may.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pandas as pd

from saeffect.comparison import PRIMARY, ArmFacts, ArmTables, Judgement, Resampling
from saeffect.comparison.arms import roles_of
from saeffect.comparison.contrasts import as_table, contrasts
from saeffect.comparison.judgement import add_noise_p, judge
from saeffect.comparison.seeds import seed_contrasts

__all__ = ["NULL_STUDIES", "NullStudies", "judged", "null_arms", "null_rates"]

N_FEATURES, TESTED = 300, 24


@dataclass(frozen=True)
class NullStudies:
    """One kind of study in which nothing was fine-tuned.

    Attributes:
        name: Of the design.
        control_saes: SAEs of the control arm.
        treatment_saes: Of the treatment arm.
        placebos: Placebo arms, an SAE each.
        seed_noise: How much SAEs scatter, in units of what the luck of their features alone gives.
    """

    name: str
    control_saes: int
    treatment_saes: int
    placebos: int
    seed_noise: float


NULL_STUDIES = (
    NullStudies("one placebo", 1, 1, 1, 0.0),
    NullStudies("one placebo", 1, 1, 1, 3.0),
    NullStudies("three placebos", 1, 1, 3, 3.0),
    NullStudies("three SAEs a side, one of them the placebo's", 2, 3, 1, 0.0),
    NullStudies("three SAEs a side, one of them the placebo's", 2, 3, 1, 3.0),
    NullStudies("six SAEs of the control's model, two of the treatment's", 5, 2, 1, 3.0),
)


def null_arms(design: NullStudies, rng: np.random.Generator) -> dict[str, ArmTables]:
    """The arms of one study, every SAE drawn alike."""
    roles = {"control": "control", "treatment": "treatment"}
    roles |= {f"placebo-{i}": "placebo" for i in range(design.placebos)}
    more = {"control": design.control_saes - 1, "treatment": design.treatment_saes - 1}
    return {name: _arm(name, role, more.get(name, 0), design.seed_noise, rng) for name, role in roles.items()}


def null_rates(design: NullStudies, n: int, seed: int) -> dict[str, float | int | str]:
    """How often anything declared, and each quantity, is credited to fine-tuning in `n` studies of nothing."""
    rng = np.random.default_rng(seed)
    beyond, anything = dict.fromkeys(PRIMARY, 0), 0
    for study in range(n):
        status = {name: one.status for name, one in judged(null_arms(design, rng), study).items()}
        anything += "beyond" in status.values()
        for name, one in status.items():
            beyond[name] += one == "beyond"
    rates = {name: count / n for name, count in beyond.items()}
    return {"design": design.name, "seed_noise": design.seed_noise, "n": n, "any": anything / n} | rates


def judged(arms: dict[str, ArmTables], seed: int) -> dict[str, Judgement]:
    """The judgements of which the headline is made, without the other tables of a comparison."""
    roles = roles_of({name: arm.role for name, arm in arms.items()})
    options = {"min_matches": 2, "resampling": Resampling(seed, n_boot=200, n_permutations=40)}
    rows = contrasts(arms, roles, tests=PRIMARY, **options)
    over = as_table(seed_contrasts(arms, roles, **options), PRIMARY)
    table = add_noise_p(pd.concat([rows, over], ignore_index=True))
    return {name: judge(table, name) for name in PRIMARY}


def _arm(name: str, role: str, more: int, seed_noise: float, rng: np.random.Generator) -> ArmTables:
    features, passed = _sae(seed_noise, rng)
    chosen = features.loc[features["is_domain"], "feature"].to_numpy()[:TESTED]
    effects = pd.DataFrame(
        {
            "feature": chosen,
            "n_pairs": 6,
            "effect": rng.normal(0.1, 0.1, len(chosen)),
            "p": 0.01,
            "q": 0.02,
            "passed": rng.random(len(chosen)) < passed,
            "paper_pass": rng.random(len(chosen)) < 0.5,
            "placebo": "random",
        }
    )
    arm = ArmTables(
        name=name,
        role=role,
        features=features,
        coherence=features,
        selection=features,
        interventions=None,
        direct_effects=None,
        effects=effects,
        facts=ArmFacts(role=role),
    )
    seeds = [_sae(seed_noise, rng)[0].assign(sae=f"{name}-{i}") for i in range(more)]
    return replace(arm, seeds=pd.concat(seeds, ignore_index=True)) if seeds else arm


def _sae(seed_noise: float, rng: np.random.Generator) -> tuple[pd.DataFrame, float]:
    """Tables of one SAE in one, and the share of its features that would pass."""
    share = _scattered(0.15, np.sqrt(0.15 * 0.85 / N_FEATURES), seed_noise, rng)
    is_domain = rng.random(N_FEATURES) < share
    n_domain = 0.15 * N_FEATURES
    middle = _scattered(0.5, 0.15 / np.sqrt(n_domain), seed_noise, rng)
    coherence = np.clip(rng.normal(middle, 0.15, N_FEATURES), -1, 1)
    matches = is_domain * 3
    table = pd.DataFrame(
        {
            "feature": np.arange(N_FEATURES),
            "top_tokens": [[" x", " y"]] * N_FEATURES,
            "top_weights": list(rng.gamma(4.0, size=(N_FEATURES, 2))),
            "density": rng.random(N_FEATURES),
            "decoder_norm": 1.0,
            "mean_activation": rng.random(N_FEATURES),
            "max_activation": 1.0,
            "coherence": coherence,
            "n_known": 2,
            "reason": "",
            "matches": matches,
            "matches_dot": matches,
            "matches_cosine": matches,
            "in_vocabulary": is_domain,
            "is_domain": is_domain,
        }
    )
    return table, _scattered(0.5, 0.5 / np.sqrt(TESTED), seed_noise, rng)


def _scattered(middle: float, luck: float, seed_noise: float, rng: np.random.Generator) -> float:
    """A number of one SAE: scattered by `seed_noise` times the luck of its features, and kept a share."""
    value: npt.NDArray[np.float64] = np.clip(middle + seed_noise * luck * rng.standard_normal(), 0.02, 0.98)
    return float(value)
