"""Stage 5a, the dose search on prompts that the test does not use; and what the test shares with it."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from saeffect.config import SteeringConfig
from saeffect.features.embeddings import load_embeddings
from saeffect.io import hash_folder, read_json, write_json
from saeffect.progress import SILENT, Log
from saeffect.steering import (
    RESPONSE_COLUMNS,
    Site,
    SteeringPlan,
    TextVectors,
    best_dose,
    direct_effects,
    dose_response,
    load_text_vectors,
    matched_features,
    run_trials,
    score_doses,
)
from saeffect.steering.placebos import STEERED
from saeffect.study.run_folder import RunFolder
from saeffect.study.stages.features import embeddings_identity
from saeffect.study.study import Arm, Study

__all__ = [
    "chosen_dose",
    "dose_inputs",
    "dose_unit",
    "encoder_identity",
    "help_dose_search",
    "matched_lists_of",
    "matched_placebos",
    "outcome_vectors",
    "run_dose_search",
    "search_placebos",
    "set_members",
    "site_of",
    "tested_features",
]

VERSION = 6
_NOT_SEARCHED = {"prompts", "max_features", "samples", "together", "placebos", "outcomes"}
_NOT_SEARCHED |= {"baselines", "baseline_features", "format", "system"}  # prompts hold what the last two say


def chosen_dose(run: RunFolder) -> tuple[float | None, str]:
    """The dose of the search (None if there is none), and reasons to doubt it or why no feature is steered."""
    search = read_json(run.path("steering", "dose.json"))
    return None if search["dose"] is None else float(search["dose"]), str(search.get("note") or "")


def dose_inputs(run: RunFolder) -> dict[str, Any]:
    study, config = run.study, run.study.steering
    arms = study.ordered_arms()
    return {
        "version": VERSION,
        "arms": {name: study.identities[name] for name in arms},
        "tables": run.digest(*(run.arm(n, f) for n in arms for f in ("features.parquet", "selection.parquet"))),
        "gates": run.digest(*(run.arm(name, "gate.json") for name in arms)),
        "encoder": encoder_identity(study),
        "seed": study.config.seed,
        "prepend_bos": study.prepend_bos,
        **({} if study.chat is None else {"chat_template": study.chat.identity()}),
        "steering": config.model_dump(mode="json", exclude=_NOT_SEARCHED),
        "beside": [search_placebos(config), {name: set_members(run, name) for name in arms}],
    }


def run_dose_search(run: RunFolder, log: Log) -> Iterable[Path]:
    """Write `steering/dose.json`, `steering/dose_search.parquet` and `steering/dose_response.parquet`.

    One dose, from control and treatment, serves every arm: different strengths could not be compared. Without a gain
    the dose is null, a note says why, and no arm is steered.
    """
    config = run.study.steering
    table = pd.DataFrame(
        {name: pd.Series(dtype=str) for name in ("arm", "condition")} | {"dose": pd.Series(dtype=float)}
    )
    response = pd.DataFrame(columns=["arm", *RESPONSE_COLUMNS]).astype({"dose": float, "best": bool})
    best: dict[str, float | None] = {}
    if len(config.doses) > 1:
        by_arm = {name: _search_arm(run, name, log) for name in run.study.ordered_arms()}
        searched = run.study.pair
        scores = [by_arm[name][0].assign(arm=name) for name in searched if len(by_arm[name][0])]
        table = pd.concat(scores, ignore_index=True) if scores else table
        curves = [curve.assign(arm=name) for name, (_, curve) in by_arm.items() if len(curve)]
        response = pd.concat(curves, ignore_index=True)[list(response.columns)] if curves else response
        best = {name: best_dose(means) for name, (means, _) in by_arm.items()}
    chosen, note = _choose(table, config)
    if chosen is None:
        log(f"  warning: no feature is steered: {note}")
    is_chosen = (table["dose"] == chosen) & (table["condition"] == STEERED)
    note_file = run.path("steering", "dose.json")
    write_json(note_file, {"dose": chosen, "unit": dose_unit(config), "note": note, "best": best})
    return [
        run.write_table(run.path("steering", "dose_search.parquet"), table.assign(chosen=is_chosen)),
        run.write_table(run.path("steering", "dose_response.parquet"), response),
        note_file,
    ]


def help_dose_search(run: RunFolder) -> None:
    """The share of the other processes: generate the texts of their features."""
    if len(run.study.steering.doses) > 1:
        for name in run.study.ordered_arms():
            _search_arm(run, name, SILENT)


def dose_unit(config: SteeringConfig) -> str:
    """The unit of a dose, in words."""
    if config.operator == "add":
        return "mean residual norms" if config.unit == "residual_norm" else "decoder rows"
    return "maximum activations" if config.operator == "clamp" else "ablations"


def _choose(table: pd.DataFrame, config: SteeringConfig) -> tuple[float | None, str]:
    """The dose for all arms (None if there is none), and reasons to doubt the choice or for having none."""
    if len(config.doses) == 1:
        return config.doses[0], "set in the study file" if config.operator != "ablate" else "an ablation has no dose"
    chosen = best_dose(table)
    if chosen is None:
        return None, _why_no_dose(table[table["condition"] == STEERED])
    edge = chosen in (min(config.doses), max(config.doses))
    return chosen, "the best dose is at the edge of those tried" if edge else ""


def _why_no_dose(steered: pd.DataFrame) -> str:
    if steered.empty:
        return "neither control nor treatment has a domain feature to search the dose on"
    if steered["score"].isna().all():
        return "no text of the dose search has a similarity to its feature's top tokens"
    share = steered["n_undefined"].sum() / steered["n"].sum()
    gained = steered.groupby("dose")["gain"].mean().max() > 0
    why = "no dose of the search made texts more similar to the features' top tokens"
    why += " without breaking them or making others less similar" if gained else ""
    return why + (f" (similarity was undefined in {100 * share:.0f} % of them)" if share > 0 else "")


def _search_arm(run: RunFolder, arm: str, log: Log) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Scores by condition and dose, and by feature, condition and dose."""
    config = run.study.steering
    chosen = tested_features(run, arm, config.search_features, draw=1)
    if chosen.empty:
        return pd.DataFrame(), pd.DataFrame()
    site = site_of(run, run.study.open_arm(arm, log))
    # Every dose on the search prompts, one text each, beside the placebo that decides.
    plan = SteeringPlan.from_section(
        config,
        seed=run.study.config.seed,
        prompts=config.search_prompts,
        samples=1,
        placebos=search_placebos(config),
    )
    trials = run_trials(
        site,
        chosen,
        plan,
        vectors=outcome_vectors(run.study),
        progress=partial(log.progress, f"dose {arm}", unit="texts"),
    )
    scores = score_doses(trials)
    if scores["score"].isna().all():
        log(f"  dose search, arm {arm}: no text has a similarity to its feature's top tokens")
    return scores, dose_response(trials, direct_effects(site, chosen, plan))


def search_placebos(config: SteeringConfig) -> tuple[str, ...]:
    """Placebos that the search runs at every dose: the one that the test compares with, if any."""
    return (config.primary_placebo,) if config.placebos else ()


def site_of(run: RunFolder, arm: Arm) -> Site:
    """The steering site of an arm."""
    gate = read_json(run.arm(arm.name, "gate.json"))
    features = run.read_table(run.arm(arm.name, "features.parquet")).sort_values("feature")
    maxima = torch.from_numpy(features["max_activation"].to_numpy(dtype=np.float32, na_value=0.0).copy())
    return Site(
        *(arm.lm, arm.hook, arm.W_dec, float(gate["mean_norm"])),
        sae=arm.sae,
        max_acts=maxima,
        norm_limit=float(gate["norm_limit"]),
    )


def tested_features(run: RunFolder, arm: str, limit: int | None, *, draw: int = 0) -> pd.DataFrame:
    """The domain features to steer (all, or a sample that depends only on the seed) and their `matched_placebos`."""
    selection = run.read_table(run.arm(arm, "selection.parquet"))
    chosen = selection.loc[selection["is_domain"], "feature"].to_numpy(dtype=np.int64)
    if limit is not None and len(chosen) > limit:
        generator = np.random.default_rng([run.study.config.seed, draw])
        chosen = np.sort(generator.choice(chosen, size=limit, replace=False))
    features = run.read_table(run.arm(arm, "features.parquet"))
    rows = features[features["feature"].isin(chosen)].reset_index(drop=True)
    placebos = matched_lists_of(matched_placebos(run, arm, rows["feature"].tolist()))
    return rows.assign(matched=[placebos.get(f, []) for f in rows["feature"]])


def matched_placebos(run: RunFolder, arm: str, chosen: list[int]) -> pd.DataFrame:
    """Placebo features of `chosen`, as `matched_features` (feature, rank, placebo, distance), and their top tokens.

    A feature gets none if no feature outside the domain resembles it. The text of prompt p and sample s is steered
    along the placebo of rank (p + s) modulo the feature's number of placebos.
    """
    selection = run.read_table(run.arm(arm, "selection.parquet"))
    # Features in the vocabulary but rejected by people, and members of steered sets, are no clean placebos either.
    domain = selection.loc[selection["is_domain"] | selection["in_vocabulary"], "feature"].tolist()
    features = run.read_table(run.arm(arm, "features.parquet"))
    table = matched_features(features, chosen, {*domain, *chosen, *set_members(run, arm)})
    names = features.set_index("feature")["top_tokens"]
    return table.assign(placebo_top_tokens=[list(names[placebo]) for placebo in table["placebo"]])


def set_members(run: RunFolder, arm: str) -> list[int]:
    """Numbers of an arm's features that the study steers in sets."""
    return sorted({feature for members in run.study.steering.together.get(arm, ()) for feature in members})


def matched_lists_of(placebos: pd.DataFrame) -> dict[int, list[int]]:
    """Placebo features by feature, nearest first; features without any are missing."""
    return {int(feature): rows["placebo"].tolist() for feature, rows in placebos.groupby("feature")}  # type: ignore[call-overload]


def outcome_vectors(study: Study) -> TextVectors:
    """The vectors that texts are compared by."""
    steering = study.config.steering
    if steering is None or steering.outcome_encoder is None:
        return load_embeddings(study.config.coherence.embeddings)
    return load_text_vectors(steering.outcome_encoder)


def encoder_identity(study: Study) -> str:
    """Hash of the encoder's file or folder; its name if it is not local."""
    name = study.config.steering.outcome_encoder if study.config.steering else None
    if name is None:
        return embeddings_identity(study)
    return hash_folder(name) if Path(name).exists() else name
