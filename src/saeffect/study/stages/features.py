"""Stages 2 and 3: the feature table (top tokens, moments, decoder norm, activity, contexts), and its coherence."""

from __future__ import annotations

import importlib.resources
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from saeffect.errors import EmptySelection
from saeffect.features.coherence import coherence
from saeffect.features.embeddings import load_embeddings
from saeffect.features.table import ActivationBatch, FeatureOptions, FeatureTables, extract_tables
from saeffect.features.vocabulary import choosable_tokens
from saeffect.io import fingerprint, hash_file
from saeffect.lm.activations import TokenRows, kept_positions
from saeffect.lm.architectures import unembedding
from saeffect.lm.language_model import LanguageModel
from saeffect.lm.residuals import Residuals
from saeffect.progress import SILENT, Log
from saeffect.study.run_folder import RunFolder
from saeffect.study.study import Arm, Study

__all__ = [
    "coherence_inputs",
    "embeddings_identity",
    "extract_features",
    "features_inputs",
    "features_settings",
    "ranked_tokens",
    "run_coherence",
    "run_features",
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
    limit = arm.norm_limit(rows)
    for start, ids, x in residuals.batches(arm.lm, arm.hook, rows):
        sources = [rows.names[i] for i in rows.sources[start : start + len(ids)]]
        # BOS is no text, so it is left out of contexts too.
        n_bos, kept = arm.lm.n_bos(rows.ids[start]), kept_positions(x, limit, rows.counts_of(start, len(ids)))
        yield ActivationBatch(ids[:, n_bos:], arm.sae.encode(x[:, n_bos:]), sources, kept[:, n_bos:])
        log.progress(f"features {arm.name}", start + len(ids), len(rows), "rows")


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
    bundled = Path(str(importlib.resources.files("saeffect"))) / "bundled" / "embeddings"
    return fingerprint([hash_file(file) for file in sorted(bundled.glob(f"{name}*"))])
