"""Further SAEs of an arm, from other seeds: opened, checked, their features named."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from saeffect.errors import IncompatibleSae
from saeffect.features.activity import ActivityAccumulator
from saeffect.features.coherence import coherence
from saeffect.features.embeddings import load_embeddings
from saeffect.features.table import FeatureOptions, feature_table
from saeffect.features.vocabulary import load_vocabulary, select
from saeffect.lm.activations import kept_positions
from saeffect.progress import Log
from saeffect.sae.base import SaeConfig, SparseAutoencoder
from saeffect.sae.formats import is_compact, load_compact, load_sae, sae_identity
from saeffect.study.run_folder import RunFolder
from saeffect.study.stages.features import embeddings_identity, features_settings, ranked_tokens, shared_unembedding
from saeffect.study.study import Arm, Study

__all__ = ["SeedSae", "open_seed", "open_seeds", "run_seeds", "seed_folders", "seed_identities", "seeds_inputs"]

SEEDS_VERSION = 3


@dataclass(frozen=True, eq=False)
class SeedSae:
    """A further SAE of an arm's model: whole, or compact (decoder float32 [d_sae, d_in] and recorded feature
    statistics: feature, density, mean_activation, max_activation); a whole one is run on the study's text.
    """

    name: str
    cfg: SaeConfig
    W_dec: Tensor
    sae: SparseAutoencoder | None = None
    statistics: pd.DataFrame | None = None


def seed_folders(study: Study, arm: str) -> dict[str, Path]:
    """Folders of an arm's further SAEs by their names in the tables, which differ from all arms' and other SAEs'."""
    wanted = {
        name: [
            study.resolve_sae(name, sae, study.at("arms", name, "more_saes", str(index)))
            for index, sae in enumerate(config.more_saes)
        ]
        for name, config in study.config.arms.items()
    }
    taken = Counter(folder.name for folders in wanted.values() for folder in folders) + Counter(list(wanted))
    found: dict[str, Path] = {}
    for index, folder in enumerate(wanted[arm]):
        name = folder.name if taken[folder.name] == 1 else f"{arm}/{folder.name}"
        found[f"{name} ({index + 1})" if name in found else name] = folder
    return found


def open_seed(name: str, folder: Path, *, at: str | None = None) -> SeedSae:
    """Load a further SAE, whole or compact."""
    if is_compact(folder):
        compact = load_compact(folder, at=at)
        return SeedSae(name, compact.cfg, compact.W_dec, statistics=compact.statistics)
    sae = load_sae(folder, at=at)
    return SeedSae(name, sae.cfg, sae.W_dec.detach(), sae)


def open_seeds(study: Study, arm: str) -> list[SeedSae]:
    """Load all further SAEs of an arm; IncompatibleSae if one differs from the arm's own in more than the seed."""
    own = study.sae_config(arm)
    found = []
    for index, (name, folder) in enumerate(seed_folders(study, arm).items()):
        at = study.at("arms", arm, "more_saes", str(index))
        seed = open_seed(name, folder, at=at)
        for key in ("architecture", "d_in", "d_sae", "k", "hook_name", "prepend_bos"):
            mine, theirs = (getattr(cfg, key, cfg.metadata.get(key)) for cfg in (own, seed.cfg))
            unsaid = theirs is None if key == "hook_name" else key == "prepend_bos" and None in (mine, theirs)
            if mine != theirs and not unsaid:
                raise IncompatibleSae(
                    f"the SAE {name} has {key}={theirs}, but the arm's own has {mine}.",
                    at=at,
                    fix="further SAEs of an arm differ in their seed alone.",
                )
        found.append(seed)
    return found


def seed_identities(study: Study) -> dict[str, dict[str, str]]:
    """Hashes of the files of every arm's further SAEs, by name."""
    found = {}
    for arm in study.config.arms:
        found[arm] = {name: sae_identity(folder) for name, folder in seed_folders(study, arm).items()}
    return found


def seeds_inputs(run: RunFolder, arm: str) -> dict[str, Any]:
    study = run.study
    return {
        "version": SEEDS_VERSION,
        "arm": study.identities[arm],
        "saes": seed_identities(study)[arm],
        "text": study.text_identity,
        "features": features_settings(study),
        "embeddings": embeddings_identity(study),
        "vocabulary": load_vocabulary(study.config.selection.vocabulary).sha256,
        "min_matches": study.config.selection.min_matches,
    }


def run_seeds(run: RunFolder, arm: str, log: Log) -> Iterable[Path]:
    """Write an arm's `seeds.parquet`: features, coherence and selection of its further SAEs."""
    study = run.study
    opened = study.open_arm(arm, log)
    vectors = load_embeddings(study.config.coherence.embeddings)
    vocabulary = load_vocabulary(study.config.selection.vocabulary)
    frames = []
    for seed in open_seeds(study, arm):
        features = _seed_features(study, opened, seed, log)
        chosen = select(
            features, vocabulary=vocabulary, min_matches=study.config.selection.min_matches, verdicts=None, arm=arm
        )
        table = features.merge(coherence(features, embeddings=vectors), on="feature").merge(chosen, on="feature")
        table.insert(0, "sae", pd.Series([seed.name] * len(table), dtype="str"))
        frames.append(table.drop(columns=["top_token_ids", "top_tokens_dot", "top_tokens_cosine"]))
    return [run.write_table(run.arm(arm, "seeds.parquet"), pd.concat(frames, ignore_index=True))]


@torch.inference_mode()
def _seed_features(study: Study, arm: Arm, seed: SeedSae, log: Log) -> pd.DataFrame:
    rows = study.rows()
    config = study.config.features
    table = feature_table(
        seed.W_dec,
        shared_unembedding(arm.lm),
        arm.lm.token_strings(),
        options=FeatureOptions(config.top_k, config.projection, rows.names),
        valid=ranked_tokens(study, arm.lm),
    )
    if seed.sae is None:
        recorded = seed.statistics if seed.statistics is not None else pd.DataFrame({"feature": table["feature"]})
        return table.merge(recorded, on="feature")
    activity = ActivityAccumulator(len(table), rows.names)
    limit = arm.norm_limit(rows)
    for start, ids, x in study.residuals.batches(arm.lm, arm.hook, rows):
        kept = kept_positions(x, limit, rows.counts_of(start, len(ids)))
        sources = np.repeat([rows.names[i] for i in rows.sources[start : start + len(ids)]], ids.shape[1])
        activity.update(seed.sae.encode(x[kept]), sources[kept.flatten().numpy()].tolist())
        log.progress(f"seeds {seed.name}", start + len(ids), len(rows), "rows")
    return table.merge(activity.result()[["feature", "density", "mean_activation", "max_activation"]], on="feature")
