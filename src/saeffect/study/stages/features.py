"""Stages 2 and 3: the feature table (top tokens, moments, decoder norm, activity, contexts) and its coherence, for the
arms' SAEs and for their further SAEs from other seeds, which are opened and checked here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from saeffect.errors import EmptySelection, IncompatibleSae
from saeffect.features.activity import ActivityAccumulator
from saeffect.features.coherence import coherence
from saeffect.features.embeddings import load_embeddings
from saeffect.features.table import ActivationBatch, FeatureOptions, FeatureTables, extract_tables, feature_table
from saeffect.features.vocabulary import choosable_tokens, load_vocabulary, select
from saeffect.io import fingerprint, hash_file
from saeffect.lm.activations import TokenRows
from saeffect.lm.architectures import unembedding
from saeffect.lm.language_model import LanguageModel
from saeffect.lm.residuals import Residuals
from saeffect.paths import BUNDLED_FOLDER
from saeffect.progress import SILENT, Log
from saeffect.sae.base import SaeConfig, SparseAutoencoder
from saeffect.sae.formats import is_compact, load_compact, load_sae, sae_identity
from saeffect.study.run_folder import RunFolder
from saeffect.study.study import Arm, Study

__all__ = [
    "SeedSae",
    "coherence_inputs",
    "embeddings_identity",
    "extract_features",
    "features_inputs",
    "features_settings",
    "open_seed",
    "open_seeds",
    "ranked_tokens",
    "run_coherence",
    "run_features",
    "run_seeds",
    "seed_folders",
    "seed_identities",
    "seeds_inputs",
    "shared_unembedding",
]

VERSION = 4


def features_inputs(run: RunFolder, arm: str) -> dict[str, Any]:
    study = run.study
    return {
        "version": VERSION,
        "arm": study.identities[arm],
        "text": study.text_identity,
        "features": features_settings(study),
    }


def features_settings(study: Study) -> dict[str, Any]:
    """Settings of top tokens and contexts, with the word vectors where these choose tokens."""
    config = study.config.features
    chooses = config.tokens == ("embeddings",)
    return config.model_dump() | ({"embeddings": embeddings_identity(study)} if chooses else {})


def ranked_tokens(study: Study, lm: LanguageModel) -> Tensor:
    """Bool [d_vocab]: the tokens that can be top tokens in this study."""
    choice = study.config.features.tokens
    vectors = load_embeddings(study.config.coherence.embeddings) if choice == ("embeddings",) else None
    ranked: Tensor = lm.plain_tokens() & choosable_tokens(lm.token_strings(), choice, vectors)
    if not bool(ranked.any()):
        raise EmptySelection(
            f"none of the tokens of {lm.name} can be a top token.",
            at=study.at("features", "tokens"),
            fix="choose scripts that the model writes, or all.",
        )
    return ranked


def shared_unembedding(lm: LanguageModel) -> Tensor:
    """`unembedding`, centred over the tokens that all models share, so that added tokens change no other."""
    W_U = unembedding(lm)
    if lm.shared is None:
        return W_U
    return W_U - W_U[:, sorted(lm.shared)].mean(dim=1, keepdim=True)


def run_features(run: RunFolder, arm: str, log: Log) -> Iterable[Path]:
    """Write `features.parquet` and `examples.parquet`."""
    opened = run.study.open_arm(arm, log)
    rows = run.study.rows()
    config = run.study.config.features
    options = FeatureOptions(config.top_k, config.projection, rows.names, config.examples, config.window)
    ranked = ranked_tokens(run.study, opened.lm)
    residuals = run.study.residuals
    tables = extract_features(opened, rows, options, ranked=ranked, residuals=residuals, log=log)
    return [
        run.write_table(run.arm(arm, "features.parquet"), tables.features),
        run.write_table(run.arm(arm, "examples.parquet"), tables.examples),
    ]


@torch.inference_mode()
def extract_features(
    arm: Arm,
    rows: TokenRows,
    options: FeatureOptions | None = None,
    *,
    ranked: Tensor | None = None,
    residuals: Residuals | None = None,
    log: Log = SILENT,
) -> FeatureTables:
    """The feature table of an arm, measured on `rows`, and its max-activating contexts.

    `ranked` is bool [d_vocab], the tokens that can be top tokens (all plain ones if None). `residuals` keeps
    activations for arms that share a model.
    """
    return extract_tables(
        arm.added(),
        shared_unembedding(arm.lm),
        arm.lm.token_strings(),
        _batches(arm, rows, residuals or Residuals(), log),
        options=options or FeatureOptions(sources=rows.names),
        valid=arm.lm.plain_tokens() if ranked is None else ranked,
    )


def _batches(arm: Arm, rows: TokenRows, residuals: Residuals, log: Log) -> Iterator[ActivationBatch]:
    for start, ids, x, kept, sources in arm.read(rows, residuals, log, f"features {arm.name}"):
        n_bos = arm.lm.n_bos(rows.ids[start])  # BOS is no text, so it is left out of contexts too
        acts = arm.sae.on(arm.lm.device).encode(x[:, n_bos:].to(arm.lm.device))
        yield ActivationBatch(ids[:, n_bos:], acts, sources, kept[:, n_bos:])


COHERENCE_VERSION = 1


def coherence_inputs(run: RunFolder, arm: str) -> dict[str, Any]:
    return {
        "version": COHERENCE_VERSION,
        "features": run.digest(run.arm(arm, "features.parquet")),
        "embeddings": embeddings_identity(run.study),
    }


def run_coherence(run: RunFolder, arm: str, _: Log = SILENT) -> Iterable[Path]:
    """Write `coherence.parquet`."""
    features = run.read_table(run.arm(arm, "features.parquet"))
    vectors = load_embeddings(run.study.config.coherence.embeddings)
    return [run.write_table(run.arm(arm, "coherence.parquet"), coherence(features, embeddings=vectors))]


def embeddings_identity(study: Study) -> str:
    """Hash of the word vectors."""
    name = study.config.coherence.embeddings
    if Path(name).is_file():
        return hash_file(name)
    return fingerprint([hash_file(file) for file in sorted((BUNDLED_FOLDER / "embeddings").glob(f"{name}*"))])


SEEDS_VERSION = 3


@dataclass(frozen=True, eq=False)
class SeedSae:
    """A further SAE of an arm's model: whole, to be run on the study's text, or compact (decoder float32 [d_sae, d_in]
    and recorded feature statistics: feature, density, mean_activation, max_activation).
    """

    name: str
    cfg: SaeConfig
    W_dec: Tensor
    sae: SparseAutoencoder | None = None
    statistics: pd.DataFrame | None = None


def seed_folders(study: Study, arm: str) -> dict[str, Path]:
    """Folders of an arm's further SAEs by their names in the tables, which no arm and no other SAE has."""
    folders_of = {
        name: [
            study.resolve_sae(name, sae, study.at("arms", name, "more_saes", str(index)))
            for index, sae in enumerate(config.more_saes)
        ]
        for name, config in study.config.arms.items()
    }
    name_counts = Counter([*folders_of, *(folder.name for folders in folders_of.values() for folder in folders)])
    by_name: dict[str, Path] = {}
    for index, folder in enumerate(folders_of[arm]):
        name = folder.name if name_counts[folder.name] == 1 else f"{arm}/{folder.name}"
        by_name[f"{name} ({index + 1})" if name in by_name else name] = folder
    return by_name


def open_seed(name: str, folder: Path, *, at: str | None = None) -> SeedSae:
    """Load a further SAE, whole or compact."""
    if is_compact(folder):
        compact = load_compact(folder, at=at)
        return SeedSae(name, compact.cfg, compact.W_dec, statistics=compact.statistics)
    sae = load_sae(folder, at=at)
    return SeedSae(name, sae.cfg, sae.W_dec.detach(), sae)


def open_seeds(study: Study, arm: str) -> list[SeedSae]:
    """Load all further SAEs of an arm; IncompatibleSae if one differs from the arm's SAE in more than the seed."""
    arm_config = study.sae_config(arm)
    seeds = []
    for index, (name, folder) in enumerate(seed_folders(study, arm).items()):
        at = study.at("arms", arm, "more_saes", str(index))
        seed = open_seed(name, folder, at=at)
        for key in ("architecture", "d_in", "d_sae", "k", "hook_name", "prepend_bos"):
            expected, actual = (getattr(cfg, key, cfg.metadata.get(key)) for cfg in (arm_config, seed.cfg))
            unknown = actual is None if key == "hook_name" else key == "prepend_bos" and None in (expected, actual)
            if expected != actual and not unknown:
                raise IncompatibleSae(
                    f"the SAE {name} has {key}={actual}, but the arm's own has {expected}.",
                    at=at,
                    fix="further SAEs of an arm differ in their seed alone.",
                )
        seeds.append(seed)
    return seeds


def seed_identities(study: Study) -> dict[str, dict[str, str]]:
    """Hashes of the files of every arm's further SAEs, by name."""
    identities = {}
    for arm in study.config.arms:
        identities[arm] = {name: sae_identity(folder) for name, folder in seed_folders(study, arm).items()}
    return identities


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
    for _, ids, x, kept, names in arm.read(rows, study.residuals, log, f"seeds {seed.name}"):
        sources = np.repeat(names, ids.shape[1])
        acts = seed.sae.on(arm.lm.device).encode(x[kept].to(arm.lm.device))
        activity.update(acts, sources[kept.flatten().numpy()].tolist())
    return table.merge(activity.result()[["feature", "density", "mean_activation", "max_activation"]], on="feature")
