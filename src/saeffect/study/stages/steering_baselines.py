"""The baselines of an arm: texts that steering with a feature must beat, for a few of the tested features."""

from __future__ import annotations

from functools import partial

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from saeffect.config import SteeringConfig
from saeffect.io import Log
from saeffect.lm.activations import kept_positions
from saeffect.steering import MeanDifferences, SteeringPlan, TextVectors, outcome_effects, run_baselines
from saeffect.study.run_folder import RunFolder
from saeffect.study.stages.steering_plan import site_of
from saeffect.study.study import Arm

__all__ = ["baseline_effects", "baseline_features", "baseline_texts", "mean_differences"]

_TOKENS = 16_384  # of the study's text: enough for a mean of many hundred numbers


def baseline_features(tested: pd.DataFrame, limit: int, seed: int) -> pd.DataFrame:
    """A random sample of the tested features, which depends on the seed alone."""
    if len(tested) <= limit:
        return tested
    chosen = np.random.default_rng([seed, 2]).choice(tested["feature"].to_numpy(), size=limit, replace=False)
    return tested[tested["feature"].isin(chosen)].reset_index(drop=True)


def baseline_texts(
    run: RunFolder, arm: Arm, chosen: pd.DataFrame, plan: SteeringPlan, *, vectors: TextVectors, log: Log
) -> pd.DataFrame:
    """As `run_baselines`, with vectors measured on the study's text."""
    config = run.study.config.steering
    wanted = config.baselines if config is not None else ()
    differences = mean_differences(run, arm, chosen["feature"].tolist()) if "mean_difference" in wanted else {}
    return run_baselines(
        site_of(run, arm),
        chosen,
        plan,
        vectors=vectors,
        mean_differences=differences,
        baselines=wanted,
        progress=partial(log.progress, f"baselines {arm.name}", unit="texts"),
    )


@torch.inference_mode()
def mean_differences(run: RunFolder, arm: Arm, features: list[int]) -> dict[int, Tensor | str]:
    """For each feature the mean residual where it fires minus that of general text; or why there is none.

    General text is the source called general; without one, all of the text.
    """
    rows = run.study.rows()
    limit = arm.norm_limit(rows)
    sums = MeanDifferences(features, arm.lm.d_model)
    place = rows.names.index("general") if "general" in rows.names else None
    seen = 0
    for start, ids, x in run.study.residuals.batches(arm.lm, arm.hook, rows):
        kept = kept_positions(x, limit)
        acts = arm.sae.encode(x)[..., features]
        sources = torch.from_numpy(np.asarray(rows.sources[start : start + len(ids)]))
        general = torch.ones_like(sources, dtype=torch.bool) if place is None else sources == place
        sums.add(x[kept].float(), acts[kept], general[:, None].expand(ids.shape)[kept])
        seen += ids.numel()
        if seen >= _TOKENS:
            break
    return {feature: sums.vector(feature) for feature in features}


def baseline_effects(
    trials: pd.DataFrame, baselines: pd.DataFrame, config: SteeringConfig, *, seed: int, dose: float
) -> pd.DataFrame:
    """What steering does beyond each baseline, on every outcome of a text.

    Returns:
        As `outcome_effects`, with baseline in the place of placebo and without primary: no test hangs on it.
    """
    features = baselines["feature"].unique()
    steered = trials[trials["feature"].isin(features) & trials["condition"].isin(["unsteered", "steered"])]
    both = pd.concat([steered, baselines], ignore_index=True).drop(columns="similarity_shuffled")
    why = baselines[baselines["reason"] != ""].drop_duplicates(["feature", "condition"])
    reasons = {(int(r.feature), str(r.condition)): str(r.reason) for r in why.itertuples()}
    table = outcome_effects(
        both,
        declared=config.outcomes,
        placebos=config.baselines,
        seed=seed,
        dose=dose,
        operator=config.operator,
        obstacles=reasons,
    )
    return table.rename(columns={"placebo": "baseline", "placebo_mean": "baseline_mean"}).drop(columns="primary")
