"""Measure a fine-tune and judge it by a budget: models, SAE, text and nulls in; verdicts out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from saeffect.config_file import read_config_file
from saeffect.diffing.budget import Budget, GroupRule
from saeffect.diffing.guard import Group, Rows, Verdict, check_text_sources, judge
from saeffect.diffing.nulls import read_nulls
from saeffect.errors import BadFile, ConfigError, EmptySelection, placed
from saeffect.features.projection import project
from saeffect.features.vocabulary import Vocabulary, count_matches, load_vocabulary
from saeffect.lm.architectures import heads_to_residual, unembedding
from saeffect.lm.language_model import LanguageModel
from saeffect.progress import SILENT, Log
from saeffect.sae.base import SparseAutoencoder
from saeffect.stats.arguments import IntArray
from saeffect.study.diff import DiffRequest, diff_study, same_model
from saeffect.study.nulls import nulls_folder, study_tracer

__all__ = ["guard", "read_budget", "resolve_groups"]

_TOP_K = 10  # top tokens a feature


def guard(
    base: str,
    tuned: str,
    budget: Budget,
    *,
    nulls: Path | str | None = None,
    sae: str | None = None,
    text: Sequence[str] = (),
    log: Log = SILENT,
) -> list[Verdict]:
    """Judge a fine-tune of a base model by a budget; writes nothing. Arguments as in `DiffRequest`; without an SAE,
    groups are judged by the expected words alone.

    ConfigError: base and fine-tune are the same model or give the same predictions; a text of one row; a group of
    features without an SAE. EmptySelection: a group with no feature, or no word that is a token. SaeffectError: a
    model, SAE, text or null that cannot be read, or nulls measured on something else.
    """
    nulls_name = None if nulls is None else str(nulls)
    request = DiffRequest(base, tuned, sae, tuple(text), nulls=nulls_name, name="guard")
    study = diff_study(request, Path("the command"), log)
    if same_model(study):
        raise ConfigError("base and tuned are the same model.", at="TUNED", fix="give the fine-tune second.")
    tracer, folder = study_tracer(study, log), nulls_folder(study)
    rows = tracer.rows
    check_text_sources(budget, rows.names)
    null_runs = [] if folder is None else read_nulls(folder, tracer.made_by, measured=tracer.measured_on, at="--nulls")
    groups, top_tokens = resolve_groups(budget, tracer.base, tracer.sae)
    trace = tracer.beside(null_runs).trace(study.open_model(study.treatment, log), tuned)
    if not np.nanmax(np.abs(trace.kl)) > 0:
        raise ConfigError(
            "both models predict the same everywhere, so nothing was fine-tuned.",
            at="TUNED",
            fix="check that this is the trained model, and that its adapter was trained and saved.",
        )
    return judge(budget, groups, trace, null_runs, Rows(rows.sources, rows.names), top_tokens)


def read_budget(path: Path | str) -> Budget:
    """Read a budget file; errors name the file and the key."""
    values = read_config_file(path, "budget")
    if not isinstance(values, dict):
        raise BadFile("a budget file is a mapping of keys to values.", at=str(path), fix="see saeffect guard --keys.")
    return Budget.read(values, at=str(path))


def resolve_groups(
    budget: Budget, lm: LanguageModel, sae: SparseAutoencoder | None
) -> tuple[dict[str, Group], IntArray | None]:
    """The features and tokens of each group of a budget, and the top tokens of all features, int64 [d_sae, k]."""
    top_tokens = _top_tokens(lm, sae) if sae is not None and budget.groups else None
    strings, plain = lm.token_strings(), lm.plain_tokens().numpy()
    tops = None if top_tokens is None else [[strings[i] for i in row] for row in top_tokens]
    empty = np.empty(0, dtype=np.int64)
    groups = {}
    for name, rule in budget.groups.items():
        with placed(f"groups.{name}"):
            if rule.vocabulary is None:
                groups[name] = Group(_listed_features(rule, sae), empty)
                continue
            words = load_vocabulary(rule.vocabulary)
            tokens = np.array([i for i, token in enumerate(strings) if plain[i] and token in words], dtype=np.int64)
            groups[name] = Group(empty if tops is None else _matching_features(rule, words, tops), tokens)
            if not len(tokens):
                raise EmptySelection(f"no word of {words.name!r} is a token of {lm.name}.", fix="add shorter words.")
    return groups, top_tokens


def _listed_features(rule: GroupRule, sae: SparseAutoencoder | None) -> IntArray:
    if sae is None:
        raise ConfigError("features are an SAE's, and none was given.", fix="give --sae, or name a vocabulary.")
    invalid = [feature for feature in rule.features if not 0 <= feature < sae.cfg.d_sae]
    if invalid:
        raise ConfigError(f"the SAE has features 0 to {sae.cfg.d_sae - 1:,}, but {invalid[0]} is asked for.")
    return np.array(rule.features, dtype=np.int64)


def _matching_features(rule: GroupRule, words: Vocabulary, tops: Sequence[Sequence[str]]) -> IntArray:
    counts = count_matches(tops, words).counts
    features = np.flatnonzero(counts >= rule.min_matches)
    if not len(features):
        raise EmptySelection(
            f"no feature of the SAE has {rule.min_matches} of its {_TOP_K} top tokens in {words.name!r}; the most is"
            f" {counts.max()}.",
            fix="lower min_matches, add words, or list the features.",
        )
    return features


@torch.inference_mode()
def _top_tokens(lm: LanguageModel, sae: SparseAutoencoder) -> IntArray:
    rows = heads_to_residual(lm, sae.cfg.hook_name or "", sae.W_dec.detach())
    indices: IntArray = project(rows, unembedding(lm), _TOP_K, valid=lm.plain_tokens()).indices.numpy()
    return indices
