"""Stage 6, interventions: test every chosen feature at the dose of the search."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from saeffect.features.vocabulary import load_vocabulary
from saeffect.progress import SILENT, Log
from saeffect.steering import (
    MeanDifferences,
    RememberedVectors,
    SteeringPlan,
    direct_effects,
    effects,
    features_together,
    obstacles,
    outcome_effects,
    outcome_named,
    run_baselines,
    run_trials,
    score_texts,
)
from saeffect.steering.effects import Obstacles
from saeffect.study.run_folder import PartialTable, RunFolder
from saeffect.study.stages.dose_search import (
    chosen_dose,
    encoder_identity,
    matched_lists_of,
    matched_placebos,
    outcome_vectors,
    set_members,
    site_of,
    tested_features,
)
from saeffect.study.study import Arm, Study

__all__ = ["STEERING_FILES", "effect_tables", "help_steer", "run_steer", "steer_inputs"]

VERSION = 8
_TOKENS = 16_384  # of the study's text: enough for a mean difference of many hundred numbers
# Prompts hold what format and system say.
_NOT_DECLARED = {"search_prompts", "search_features", "doses", "together", "format", "system"}
STEERING_FILES = (
    *("interventions", "direct_effects", "effects", "outcome_effects"),
    *("matched_placebos", "baselines", "baseline_effects", "together", "together_effects"),
)
"""Tables of an arm; the last five only where the study asks for them."""


def steer_inputs(run: RunFolder, arm: str) -> dict[str, Any]:
    study, config = run.study, run.study.steering
    files = [run.arm(arm, name) for name in ("features.parquet", "selection.parquet", "gate.json")]
    declared = config.model_dump(mode="json", exclude=_NOT_DECLARED)
    return {
        "version": VERSION,
        "arm": study.identities[arm],
        "tables": run.digest(*files, run.path("steering", "dose.json")),
        "encoder": encoder_identity(study),
        "vocabulary": load_vocabulary(study.config.selection.vocabulary).sha256,
        "text": study.text_identity,
        "seed": study.config.seed,
        "alpha": study.config.comparison.alpha,
        "steering": declared | {"together": [list(members) for members in config.together.get(arm, ())]},
    }


def run_steer(run: RunFolder, arm: str, log: Log) -> Iterable[Path]:
    """Write the `STEERING_FILES` of an arm. Texts are kept in chunks, so an interrupted run resumes there."""
    chosen, sets = _steered(run, arm)
    if chosen.empty:
        dose, note = chosen_dose(run)
        log(f"  arm {arm} " + (f"is not steered: {note}" if dose is None else "has no domain feature to test"))
    tables: dict[str, pd.DataFrame] = {}
    saved = run.partial(f"steer {arm}", steer_inputs(run, arm))
    if len(chosen) or sets:
        test = _SteeringTest(run, run.study.open_arm(arm, log), log)
        if len(chosen):
            tables |= test.features(chosen, saved)
        if sets:
            tables |= test.together(sets)
    if "matched" in run.study.steering.placebos and tables:
        steered = sorted({*chosen["feature"].tolist(), *set_members(run, arm)})
        tables["matched_placebos"] = matched_placebos(run, arm, steered)
    return [run.write_table(run.arm(arm, f"{name}.parquet"), tables[name]) for name in STEERING_FILES if name in tables]


def help_steer(run: RunFolder, arm: str) -> None:
    """The share of the other processes: generate the texts of their features, in the order of the first process."""
    chosen, sets = _steered(run, arm)
    if len(chosen) or sets:
        test = _SteeringTest(run, run.study.open_arm(arm), SILENT)
        if len(chosen):
            test.texts(chosen, run.partial(f"steer {arm}", steer_inputs(run, arm)))
        if sets:
            test.texts(test.joined(sets))


def _steered(run: RunFolder, arm: str) -> tuple[pd.DataFrame, tuple[tuple[int, ...], ...]]:
    """The features and sets of features of an arm to steer; none without a dose."""
    config = run.study.steering
    chosen = tested_features(run, arm, config.max_features)
    return (chosen.head(0), ()) if chosen_dose(run)[0] is None else (chosen, config.together.get(arm, ()))


def effect_tables(
    study: Study,
    trials: pd.DataFrame,
    direct: pd.DataFrame | None,
    *,
    dose: float | None,
    obstacles: Obstacles | None = None,
) -> dict[str, pd.DataFrame]:
    """An arm's tables `effects`, on the deciding outcome, and `outcome_effects`, on all, from its scored texts."""
    config, placebo = study.steering, study.steering.primary_placebo
    same: dict[str, Any] = {"seed": study.config.seed, "dose": dose, "obstacles": obstacles}
    primary = outcome_named(config.outcomes[0]).under(config.operator)
    tested = effects(
        trials, direct, alpha=study.config.comparison.alpha, placebo=placebo, outcome=primary, **same
    ).assign(declared=True)
    controls = (placebo, *(name for name in config.placebos if name != placebo))
    every = outcome_effects(
        trials, direct, declared=config.outcomes, placebos=controls, operator=config.operator, **same
    )
    return {"effects": tested, "outcome_effects": every}


class _SteeringTest:
    def __init__(self, run: RunFolder, arm: Arm, log: Log) -> None:
        self._run, self._arm, self._log = run, arm, log
        self._config, self._seed = run.study.steering, run.study.config.seed
        dose, _ = chosen_dose(run)
        assert dose is not None  # else nothing is steered
        self._dose = dose
        self._plan = SteeringPlan.from_section(self._config, seed=self._seed, doses=(dose,))
        self._site = site_of(run, arm)
        self._vectors = RememberedVectors(outcome_vectors(run.study))
        self._words = load_vocabulary(run.study.config.selection.vocabulary).words

    def features(self, chosen: pd.DataFrame, saved: PartialTable) -> dict[str, pd.DataFrame]:
        """Each feature by itself, with its placebos, and for some features the baselines."""
        tables = self._tested(chosen, saved)
        sample = self._baseline_sample(chosen)
        if self._config.baselines and len(sample):
            tables["baselines"] = self._scored(self._baseline_texts(sample), chosen)
            tables["baseline_effects"] = self._baseline_effects(tables["interventions"], tables["baselines"])
        return tables

    def together(self, sets: tuple[tuple[int, ...], ...]) -> dict[str, pd.DataFrame]:
        rows = self.joined(sets)
        tables = self._tested(rows)
        joint = tables["effects"].merge(rows[["feature", "members"]], on="feature")
        return {"together": tables["interventions"], "together_effects": joint.rename(columns={"feature": "set"})}

    def joined(self, sets: tuple[tuple[int, ...], ...]) -> pd.DataFrame:
        """One row per set, in the form of a feature."""
        name = self._arm.name
        features = self._run.read_table(self._run.arm(name, "features.parquet"))
        placebos = matched_lists_of(matched_placebos(self._run, name, set_members(self._run, name)))
        return features_together(features, sets, placebos)

    def texts(self, chosen: pd.DataFrame, saved: PartialTable | None = None) -> pd.DataFrame:
        """The interventions, shared over processes: every process calls this and gets the whole table."""
        return run_trials(
            self._site,
            chosen,
            self._plan,
            vectors=self._vectors,
            done=saved.read(self._log) if saved else None,
            on_chunk=saved.add if saved else None,
            progress=partial(self._log.progress, f"steer {self._arm.name}", unit="texts"),
        )

    def _tested(self, chosen: pd.DataFrame, saved: PartialTable | None = None) -> dict[str, pd.DataFrame]:
        trials = self._scored(self.texts(chosen, saved), chosen)
        direct = direct_effects(self._site, chosen, self._plan)
        effects = effect_tables(
            self._run.study, trials, direct, dose=self._dose, obstacles=obstacles(self._site, chosen, self._plan)
        )
        return {"interventions": trials, "direct_effects": direct} | effects

    def _scored(self, texts: pd.DataFrame, chosen: pd.DataFrame) -> pd.DataFrame:
        scored = score_texts(texts, chosen, vectors=self._vectors, vocabulary=self._words, seed=self._seed)
        # The paper compares with the feature's own tokens alone.
        return scored.assign(similarity_shuffled=np.nan, shuffled_feature=-1) if self._plan.as_published else scored

    def _baseline_sample(self, tested: pd.DataFrame) -> pd.DataFrame:
        """A random sample of the tested features that depends only on the seed."""
        limit = self._config.baseline_features
        if len(tested) <= limit:
            return tested
        numbers = tested["feature"].to_numpy()
        chosen = np.random.default_rng([self._seed, 2]).choice(numbers, size=limit, replace=False)
        return tested[tested["feature"].isin(chosen)].reset_index(drop=True)

    def _baseline_texts(self, sample: pd.DataFrame) -> pd.DataFrame:
        wanted, features = self._config.baselines, sample["feature"].tolist()
        return run_baselines(
            self._site,
            sample,
            self._plan,
            vectors=self._vectors,
            mean_differences=self._mean_differences(features) if "mean_difference" in wanted else {},
            baselines=wanted,
            progress=partial(self._log.progress, f"baselines {self._arm.name}", unit="texts"),
        )

    @torch.inference_mode()
    def _mean_differences(self, features: list[int]) -> dict[int, Tensor | str]:
        """By feature: mean residual where it fires minus that of source "general" (or all text), or why undefined."""
        arm, rows = self._arm, self._run.study.rows()
        sums = MeanDifferences(features, arm.W_dec.shape[1])
        place = rows.names.index("general") if "general" in rows.names else None
        seen = 0
        for start, ids, x, mask, _ in arm.read(rows, self._run.study.residuals):
            acts = arm.sae.on(arm.lm.device).encode(x)[..., features]
            sources = torch.from_numpy(np.asarray(rows.sources[start : start + len(ids)]))
            general = torch.ones_like(sources, dtype=torch.bool) if place is None else sources == place
            sums.add(x[mask].float(), acts[mask], general[:, None].expand(ids.shape)[mask])
            seen += ids.numel()
            if seen >= _TOKENS:
                break
        return {feature: sums.vector(feature) for feature in features}

    def _baseline_effects(self, trials: pd.DataFrame, baselines: pd.DataFrame) -> pd.DataFrame:
        """Effects of steering beyond each baseline: as `outcome_effects`, without primary, as no test uses them."""
        features = baselines["feature"].unique()
        steered = trials[trials["feature"].isin(features) & trials["condition"].isin(["unsteered", "steered"])]
        both = pd.concat([steered, baselines], ignore_index=True).drop(columns="similarity_shuffled")
        why = baselines[baselines["reason"] != ""].drop_duplicates(["feature", "condition"])
        table = outcome_effects(
            both,
            declared=self._config.outcomes,
            placebos=self._config.baselines,
            seed=self._seed,
            dose=self._dose,
            operator=self._config.operator,
            obstacles={(int(row.feature), str(row.condition)): str(row.reason) for row in why.itertuples()},
        )
        return table.rename(columns={"placebo": "baseline", "placebo_mean": "baseline_mean"}).drop(columns="primary")
