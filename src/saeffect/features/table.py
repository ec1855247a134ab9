"""One row a feature: its top tokens, the shape of its projection, its decoder norm and its activity.

Nothing here knows a model: the caller brings the unembedding, the token strings, and batches of activations.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from saeffect.errors import EmptySelection, ShapeMismatch
from saeffect.features.activity import ActivityAccumulator
from saeffect.features.examples import ExampleCollector
from saeffect.features.projection import project_both

__all__ = [
    "ActivationBatch",
    "FeatureOptions",
    "FeatureTables",
    "HasDecoder",
    "extract_tables",
    "feature_table",
]


class HasDecoder(Protocol):
    """Anything with a decoder; every `SparseAutoencoder` is one."""

    @property
    def W_dec(self) -> Tensor:
        """[d_sae, d_in]."""


@dataclass(frozen=True)
class FeatureOptions:
    """How the tables are made.

    Attributes:
        top_k: Top tokens a feature.
        projection: The scale of `top_tokens` and `top_weights`: "dot" or "cosine".
        sources: Names of the text sources; each gets a column `density_<source>`.
        n_examples: Max-activating contexts a feature.
        window: Tokens before the peak in a context; a third as many follow it.
    """

    top_k: int = 10
    projection: str = "cosine"
    sources: tuple[str, ...] = ("domain", "general")
    n_examples: int = 6
    window: int = 24


@dataclass(frozen=True, eq=False)
class ActivationBatch:
    """A batch of whole sequences and what the SAE makes of them.

    Attributes:
        token_ids: int [B, S].
        feature_acts: [B, S, d_sae], any float dtype.
        sources: [B], the name of each sequence's text source.
        mask: bool [B, S], True at positions that count; None for all.
    """

    token_ids: Tensor
    feature_acts: Tensor
    sources: Sequence[str]
    mask: Tensor | None = None


@dataclass(frozen=True, eq=False)
class FeatureTables:
    """What is known of an arm's features.

    Attributes:
        features: One row a feature, see `feature_table`.
        examples: One row a max-activating context, see `ExampleCollector.result`.
        n_tokens: Tokens that counted.
    """

    features: pd.DataFrame
    examples: pd.DataFrame
    n_tokens: int


def feature_table(
    sae: HasDecoder,
    W_U: Tensor,
    token_strings: Sequence[str],
    *,
    options: FeatureOptions | None = None,
    activity: pd.DataFrame | None = None,
    valid: Tensor | None = None,
    chunk: int = 512,
) -> pd.DataFrame:
    """One row a feature: what the decoder says, beside what was seen on text.

    Args:
        sae: Its `W_dec` is [d_sae, d_in].
        W_U: [d_in, d_vocab], as `saeffect.lm.unembedding` gives it.
        token_strings: [d_vocab], the text of each token, kept as it is.
        options: `top_k` and `projection` are used; the defaults if None.
        activity: `ActivityAccumulator.result()` for the same SAE; without it those columns are missing.
        valid: bool [d_vocab], False for tokens that must not be chosen, such as special and unused ones.
        chunk: Features a matrix product, see `project`.

    Returns:
        feature (int64); top_tokens (list of str), top_token_ids (list of int), top_weights (list of float),
        best first on the scale of `options.projection`; top_tokens_dot, top_tokens_cosine; projection_mean,
        _std, _skewness, _kurtosis of the dot product over the vocabulary; decoder_norm, the Euclidean norm of
        the decoder row; and the columns of `activity`.

    Raises:
        ShapeMismatch: Widths differ, `token_strings` is not one a token, or `activity` is of another SAE.
        UnknownName: `options.projection` is neither "dot" nor "cosine".
        ConfigError: `options.top_k` is more than the tokens that can be chosen.
        BadFile: A weight is NaN or infinite.
    """
    options = options or FeatureOptions()
    if W_U.ndim == 2 and len(token_strings) != W_U.shape[1]:
        raise ShapeMismatch(
            f"W_U has {W_U.shape[1]} tokens. Got {len(token_strings)} token strings instead.",
            at="token_strings",
            fix="use the tokenizer of the model that W_U comes from.",
        )
    W_dec = sae.W_dec.detach()
    pair = project_both(W_dec, W_U, options.top_k, valid=valid, chunk=chunk)
    chosen = pair[options.projection]
    table = pd.DataFrame(
        {
            "feature": np.arange(len(W_dec), dtype=np.int64),
            "top_tokens": _as_strings(chosen.indices, token_strings),
            "top_token_ids": chosen.indices.tolist(),
            "top_weights": chosen.weights.tolist(),
            "top_tokens_dot": _as_strings(pair.dot.indices, token_strings),
            "top_tokens_cosine": _as_strings(pair.cosine.indices, token_strings),
            "projection_mean": chosen.mean.numpy(),
            "projection_std": chosen.std.numpy(),
            "projection_skewness": chosen.skewness.numpy(),
            "projection_kurtosis": chosen.kurtosis.numpy(),
            "decoder_norm": torch.linalg.vector_norm(W_dec, dim=1, dtype=torch.float64).cpu().numpy(),
        }
    )
    return table if activity is None else _beside(table, activity)


def extract_tables(
    sae: HasDecoder,
    W_U: Tensor,
    token_strings: Sequence[str],
    batches: Iterable[ActivationBatch],
    *,
    options: FeatureOptions | None = None,
    valid: Tensor | None = None,
    chunk: int = 512,
) -> FeatureTables:
    """The feature table and the max-activating contexts, from one pass over the batches.

    Batches are used as they come and let go, so a generator keeps memory to one batch. How the sequences are
    cut into batches does not matter.

    Args:
        sae: Its `W_dec` is [d_sae, d_in].
        W_U: [d_in, d_vocab].
        token_strings: [d_vocab].
        batches: What the SAE makes of some text.
        options: The defaults if None.
        valid: As in `feature_table`.
        chunk: As in `feature_table`.

    Raises:
        EmptySelection: No position counts in any batch.
        ShapeMismatch: Shapes do not fit.
        UnknownName: A batch's source is not among `options.sources`, or the projection is unknown.
        ConfigError: An option is out of range.
        BadFile: A weight or an activation is NaN or infinite.
    """
    options = options or FeatureOptions()
    table = feature_table(sae, W_U, token_strings, options=options, valid=valid, chunk=chunk)
    activity = ActivityAccumulator(len(table), options.sources)
    collector = ExampleCollector(len(table), options.n_examples, options.window)
    for batch in batches:
        collector.update(batch.feature_acts, batch.token_ids, batch.mask, sources=batch.sources)
        activity.update(*_counted(batch))
    if activity.n_tokens == 0:
        raise EmptySelection(
            "no token of the text counts, so no feature has any activity.",
            at="batches",
            fix="give some text, or a mask that leaves some positions.",
        )
    seen = activity.result().drop(columns="feature")
    return FeatureTables(
        features=pd.concat([table, seen], axis=1),
        examples=collector.result(token_strings),
        n_tokens=activity.n_tokens,
    )


def _beside(table: pd.DataFrame, activity: pd.DataFrame) -> pd.DataFrame:
    """Both tables' columns, row by row."""
    if not np.array_equal(activity["feature"].to_numpy(), table["feature"].to_numpy()):
        raise ShapeMismatch(
            f"activity must list features 0 to {len(table) - 1} in order. Got {len(activity)} rows instead.",
            at="activity",
            fix="accumulate it with the same SAE.",
        )
    return pd.concat([table, activity.drop(columns="feature").reset_index(drop=True)], axis=1)


def _counted(batch: ActivationBatch) -> tuple[Tensor, list[str]]:
    """The activations [n, d_sae] and sources [n] of the positions that count."""
    acts = batch.feature_acts.flatten(0, 1)
    sources = np.repeat(np.asarray(batch.sources, dtype=object), batch.token_ids.shape[1])
    if batch.mask is None or bool(batch.mask.all()):
        return acts, sources.tolist()
    counts = batch.mask.flatten()
    return acts[counts.to(acts.device)], sources[counts.cpu().numpy()].tolist()


def _as_strings(indices: Tensor, token_strings: Sequence[str]) -> list[list[str]]:
    return [[token_strings[token] for token in row] for row in indices.tolist()]
