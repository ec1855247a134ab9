"""Shared by the dose search and the test: plan, site, features, and outcome vectors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import torch

from saeffect.config import SteeringConfig
from saeffect.features.embeddings import load_embeddings
from saeffect.io import hash_folder, read_json
from saeffect.steering import Site, TextVectors, load_text_vectors, matched_features
from saeffect.study.run_folder import RunFolder
from saeffect.study.stages.coherence import embeddings_identity
from saeffect.study.study import Arm, Study

__all__ = [
    "encoder_identity",
    "matched_lists_of",
    "matched_placebos",
    "outcome_vectors",
    "search_placebos",
    "set_members",
    "site_of",
    "tested_features",
]


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
