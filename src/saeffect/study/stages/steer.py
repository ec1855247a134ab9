"""Stage 6, interventions: the test of every chosen feature at the dose that the search chose."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from saeffect.features.vocabulary import load_vocabulary
from saeffect.io import SILENT, Log
from saeffect.steering import (
    RememberedVectors,
    SteeringPlan,
    direct_effects,
    effects,
    features_together,
    obstacles,
    outcome_effects,
    outcome_named,
    run_trials,
    score_texts,
)
from saeffect.study.run_folder import KeptRows, RunFolder
from saeffect.study.stages.steering_baselines import baseline_effects, baseline_features, baseline_texts
from saeffect.study.stages.steering_plan import (
    chosen_dose,
    encoder_identity,
    matched_lists_of,
    matched_placebos,
    outcome_vectors,
    plan_of_test,
    set_members,
    site_of,
    tested_features,
)
from saeffect.study.study import Arm

__all__ = ["STEERING_FILES", "help_steer", "run_steer", "steer_inputs"]

# 3: matched placebos, baselines, every outcome against every control; sampling noise is drawn by counter.
# 4: samples of a prompt are averaged before anything is tested.
# 5: unsteered texts in the batch of the steered ones; what is longer than the SAE ever saw is not clamped or ablated.
# 6: ablations are tested for effects below zero.
VERSION = 6
STEERING_FILES = (
    *("interventions", "direct_effects", "effects", "outcome_effects"),
    *("matched_placebos", "baselines", "baseline_effects", "together", "together_effects"),
)
"""Tables of an arm; the last five only where the study asks for them."""


def steer_inputs(run: RunFolder, arm: str) -> dict[str, Any]:
    """What an arm's interventions depend on."""
    study, config = run.study, run.study.steering
    files = [run.arm(arm, name) for name in ("features.parquet", "selection.parquet", "gate.json")]
    declared = config.model_dump(mode="json", exclude={"search_prompts", "search_features", "doses", "together"})
    return {
        "version": VERSION,
        "arm": study.identities[arm],
        "tables": run.digest(*files, run.path("steering", "dose.json")),
        "encoder": encoder_identity(study),
        "vocabulary": load_vocabulary(study.config.selection.vocabulary).sha256,
        "text": study.text_identity,
        "seed": study.config.seed,
        "alpha": study.config.comparison.alpha,
        "steering": declared | {"together": [list(some) for some in config.together.get(arm, ())]},
    }


def run_steer(run: RunFolder, arm: str, log: Log) -> Iterable[Path]:
    """Write the `STEERING_FILES` of an arm.

    Texts are kept chunk by chunk while they are generated, so a killed run goes on where it was.
    """
    chosen, sets = _steered(run, arm)
    if chosen.empty:
        dose, note = chosen_dose(run)
        log(f"  arm {arm} " + (f"is not steered: {note}" if dose is None else "has no domain feature to test"))
    tables: dict[str, pd.DataFrame] = {}
    kept = run.kept(f"steer {arm}", steer_inputs(run, arm))
    if len(chosen) or sets:
        test = _SteeringTest(run, run.study.open_arm(arm, log), log)
        if len(chosen):
            tables |= test.features(chosen, kept)
        if sets:
            tables |= test.together(sets)
    if "matched" in run.study.steering.placebos and tables:
        steered = sorted({*chosen["feature"].tolist(), *set_members(run, arm)})
        tables["matched_placebos"] = matched_placebos(run, arm, steered)
    return [run.write_table(run.arm(arm, f"{name}.parquet"), tables[name]) for name in STEERING_FILES if name in tables]


def help_steer(run: RunFolder, arm: str) -> None:
    """What every other process does of the stage: the texts of its features, in the order of the first process."""
    chosen, sets = _steered(run, arm)
    if len(chosen) or sets:
        test = _SteeringTest(run, run.study.open_arm(arm), SILENT)
        if len(chosen):
            test.texts(chosen, run.kept(f"steer {arm}", steer_inputs(run, arm)))
        if sets:
            test.texts(test.joined(sets))


def _steered(run: RunFolder, arm: str) -> tuple[pd.DataFrame, tuple[tuple[int, ...], ...]]:
    """An arm's features and sets of features that are steered: none without a dose."""
    config = run.study.steering
    chosen = tested_features(run, arm, config.max_features)
    return (chosen.head(0), ()) if chosen_dose(run)[0] is None else (chosen, config.together.get(arm, ()))


class _SteeringTest:
    """The test of one arm, with its model in memory."""

    def __init__(self, run: RunFolder, arm: Arm, log: Log) -> None:
        config = run.study.steering
        self._run, self._arm, self._config, self._log = run, arm, config, log
        self._seed = run.study.config.seed
        dose, _ = chosen_dose(run)
        assert dose is not None  # else nothing is steered
        self._dose = dose
        self._plan: SteeringPlan = plan_of_test(config, self._seed, self._dose)
        self._site = site_of(run, arm)
        self._vectors = RememberedVectors(outcome_vectors(run.study))
        self._words = load_vocabulary(run.study.config.selection.vocabulary).words

    def features(self, chosen: pd.DataFrame, kept: KeptRows) -> dict[str, pd.DataFrame]:
        """Each feature by itself, beside its placebos, and for some the baselines."""
        tables = self._tested(chosen, kept)
        config = self._config
        some = baseline_features(chosen, config.baseline_features, self._seed)
        if config.baselines and len(some):
            texts = baseline_texts(self._run, self._arm, some, self._plan, vectors=self._vectors, log=self._log)
            scored = self._scored(texts, chosen)
            tables["baselines"] = scored
            tables["baseline_effects"] = baseline_effects(
                tables["interventions"], scored, config, seed=self._seed, dose=self._dose
            )
        return tables

    def together(self, sets: tuple[tuple[int, ...], ...]) -> dict[str, pd.DataFrame]:
        """Sets of features, each steered at once."""
        rows = self.joined(sets)
        tables = self._tested(rows)
        joint = tables["effects"].merge(rows[["feature", "members"]], on="feature")
        return {"together": tables["interventions"], "together_effects": joint.rename(columns={"feature": "set"})}

    def joined(self, sets: tuple[tuple[int, ...], ...]) -> pd.DataFrame:
        """A row a set, in the form of a feature."""
        features = self._run.read_table(self._run.arm(self._arm.name, "features.parquet"))
        placebos = matched_lists_of(matched_placebos(self._run, self._arm.name, set_members(self._run, self._arm.name)))
        return features_together(features, sets, placebos)

    def texts(self, chosen: pd.DataFrame, kept: KeptRows | None = None) -> pd.DataFrame:
        """The interventions, shared over processes: every one calls this, and every one gets the whole table."""
        log, name = self._log, self._arm.name
        return run_trials(
            self._site,
            chosen,
            self._plan,
            vectors=self._vectors,
            done=kept.read(log) if kept else None,
            on_chunk=kept.add if kept else None,
            progress=partial(log.progress, f"steer {name}", unit="texts"),
        )

    def _tested(self, chosen: pd.DataFrame, kept: KeptRows | None = None) -> dict[str, pd.DataFrame]:
        trials = self._scored(self.texts(chosen, kept), chosen)
        direct = direct_effects(self._site, chosen, self._plan)
        why = obstacles(self._site, chosen, self._plan)
        config = self._config
        same: dict[str, Any] = {"seed": self._seed, "dose": self._dose, "obstacles": why}
        placebo = config.primary_placebo
        controls = (placebo, *(p for p in config.placebos if p != placebo))
        result = effects(
            trials,
            direct,
            alpha=self._run.study.config.comparison.alpha,
            placebo=placebo,
            outcome=outcome_named(config.outcomes[0]).under(config.operator),
            **same,
        )
        every = outcome_effects(
            trials, direct, declared=config.outcomes, placebos=controls, operator=config.operator, **same
        )
        return {
            "interventions": trials,
            "direct_effects": direct,
            "effects": result.assign(declared=True),
            "outcome_effects": every,
        }

    def _scored(self, texts: pd.DataFrame, chosen: pd.DataFrame) -> pd.DataFrame:
        return score_texts(texts, chosen, vectors=self._vectors, vocabulary=self._words, seed=self._seed)
