"""One row a feature: its top tokens, the moments of its projection, its decoder norm and its activity."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from saeffect.errors import EmptySelection, ShapeMismatch
from saeffect.features.activity import ActivityAccumulator, ExampleCollector
from saeffect.features.projection import project_both

__all__ = ["ActivationBatch", "FeatureOptions", "FeatureTables", "extract_tables", "feature_table"]


@dataclass(frozen=True)
class FeatureOptions:
    """Options of the tables. Each of `sources`, the text sources, gets a column `density_<source>`; `projection`
    is the scale of `top_tokens` and `top_weights`; a max-activating context has `window` tokens before the peak and
    a third as many after.
    """

    top_k: int = 10
    projection: str = "cosine"
    sources: tuple[str, ...] = ("domain", "general")
    n_examples: int = 6
    window: int = 24


@dataclass(frozen=True, eq=False)
class ActivationBatch:
    """Whole sequences and their activations: `token_ids` int [B, S]; `feature_acts` [B, S, d_sae], any float dtype;
    `sources` [B], each sequence's text source; `mask` bool [B, S], True at positions that count, None for all.
    """

    token_ids: Tensor
    feature_acts: Tensor
    sources: Sequence[str]
    mask: Tensor | None = None


@dataclass(frozen=True, eq=False)
class FeatureTables:
    """The tables of an arm's features, and the number of tokens that counted: `features` has the columns of
    `feature_table` and `ActivityAccumulator.result`; `examples` is `ExampleCollector.result`.
    """

    features: pd.DataFrame
    examples: pd.DataFrame
    n_tokens: int


def feature_table(
    W_dec: Tensor,
    W_U: Tensor,
    token_strings: Sequence[str],
    *,
    options: FeatureOptions | None = None,
    valid: Tensor | None = None,
) -> pd.DataFrame:
    """The columns of the feature table that come from the decoder.

    Args:
        W_dec: [d_sae, d_in].
        W_U: [d_in, d_vocab], as `saeffect.lm.unembedding` gives it.
        token_strings: [d_vocab], kept unchanged; else ShapeMismatch.
        options: `top_k` and `projection` are used; the defaults if None.
        valid: bool [d_vocab], False for tokens that must not be chosen, such as special and unused ones.

    Returns:
        feature (int64); top_tokens (list of str), top_token_ids (list of int), top_weights (list of float), best first
            on the scale of `options.projection`; top_tokens_dot, top_tokens_cosine; projection_mean, _std, _skewness,
            _kurtosis of the dot product over the vocabulary; decoder_norm (Euclidean).
    """
    options = options or FeatureOptions()
    if W_U.ndim == 2 and len(token_strings) != W_U.shape[1]:
        raise ShapeMismatch(
            f"W_U has {W_U.shape[1]} tokens. Got {len(token_strings)} token strings instead.",
            at="token_strings",
            fix="use the tokenizer of the model that W_U comes from.",
        )
    W_dec = W_dec.detach()
    projections = project_both(W_dec, W_U, options.top_k, valid=valid)
    strings = {
        name: [[token_strings[token] for token in row] for row in ranking.indices.tolist()]
        for name, ranking in projections.items()
    }
    chosen = projections[options.projection]
    return pd.DataFrame(
        {
            "feature": np.arange(len(W_dec), dtype=np.int64),
            "top_tokens": strings[options.projection],
            "top_token_ids": chosen.indices.tolist(),
            "top_weights": chosen.weights.tolist(),
            "top_tokens_dot": strings["dot"],
            "top_tokens_cosine": strings["cosine"],
            "projection_mean": chosen.mean.numpy(),
            "projection_std": chosen.std.numpy(),
            "projection_skewness": chosen.skewness.numpy(),
            "projection_kurtosis": chosen.kurtosis.numpy(),
            "decoder_norm": torch.linalg.vector_norm(W_dec, dim=1, dtype=torch.float64).cpu().numpy(),
        }
    )


def extract_tables(
    W_dec: Tensor,
    W_U: Tensor,
    token_strings: Sequence[str],
    batches: Iterable[ActivationBatch],
    *,
    options: FeatureOptions | None = None,
    valid: Tensor | None = None,
) -> FeatureTables:
    """The feature table with activity, and the max-activating contexts, from one pass over the batches.

    Other arguments and errors as in `feature_table`. Memory holds one batch if `batches` is a generator; how sequences
    are batched does not matter. EmptySelection: no position counts; UnknownName: a source that is not in
    `options.sources`.
    """
    options = options or FeatureOptions()
    table = feature_table(W_dec, W_U, token_strings, options=options, valid=valid)
    activity = ActivityAccumulator(len(table), options.sources)
    collector = ExampleCollector(len(table), options.n_examples, options.window)
    for batch in batches:
        collector.update(batch.feature_acts, batch.token_ids, batch.mask, sources=batch.sources)
        acts = batch.feature_acts.flatten(0, 1)
        sources = np.repeat(np.asarray(batch.sources, dtype=object), batch.token_ids.shape[1])
        if batch.mask is not None and not bool(batch.mask.all()):
            counts = batch.mask.flatten()
            acts, sources = acts[counts.to(acts.device)], sources[counts.cpu().numpy()]
        activity.update(acts, sources.tolist())
    if activity.n_tokens == 0:
        raise EmptySelection(
            "no token of the text counts, so no feature has any activity.",
            at="batches",
            fix="give some text, or a mask that leaves some positions.",
        )
    features = pd.concat([table, activity.result().drop(columns="feature")], axis=1)
    return FeatureTables(features, collector.result(token_strings), activity.n_tokens)
