"""The feature table and the pass that fills it, on a model small enough to follow by hand."""

from __future__ import annotations

from collections.abc import Iterator

import pandas as pd
import pytest
import torch
from torch import Tensor, tensor

from saeffect.errors import BadFile, ConfigError, EmptySelection, ShapeMismatch, UnknownName
from saeffect.features.table import ActivationBatch, FeatureOptions, extract_tables, feature_table

TOKENS = [" heart", " the", "<script>", "\u202e"]
W_U = tensor([[3.0, -1.0, 2.0, 0.0], [4.0, 0.0, 0.0, 1.0]])  # column norms 5, 1, 2, 1
W_DEC = tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 4.0]])
TWO = FeatureOptions(top_k=2, n_examples=1, window=3)


def _batches(*, cut: int, n: int = 6, d_sae: int = 3, mask: Tensor | None = None) -> Iterator[ActivationBatch]:
    """`n` sequences of 5 tokens, `cut` at a time."""
    generator = torch.Generator().manual_seed(0)
    acts = torch.randint(-50, 50, (n, 5, d_sae), generator=generator).clamp(min=0) / 8
    ids = torch.randint(0, 4, (n, 5), generator=generator)
    sources = ["domain" if i % 2 else "general" for i in range(n)]
    for start in range(0, n, cut):
        part = slice(start, start + cut)
        yield ActivationBatch(ids[part], acts[part], sources[part], None if mask is None else mask[part])


def test_columns_and_values():
    table = feature_table(W_DEC, W_U, TOKENS, options=TWO)
    assert table.columns.tolist() == [
        *("feature", "top_tokens", "top_token_ids", "top_weights", "top_tokens_dot", "top_tokens_cosine"),
        *("projection_mean", "projection_std", "projection_skewness", "projection_kurtosis", "decoder_norm"),
    ]
    assert table["feature"].tolist() == [0, 1, 2]
    assert table["decoder_norm"].tolist() == [1.0, 2.0, 5.0]
    assert table["top_tokens_dot"][0] == [" heart", "<script>"]
    assert table["top_tokens_cosine"][0] == table["top_tokens"][0] == ["<script>", " heart"]
    assert table["top_token_ids"][0] == [2, 0]
    assert table["top_weights"][1] == [2.0, pytest.approx(1.6)]
    assert table["projection_mean"].tolist() == [1.0, 2.5, 8.0]
    assert table["projection_kurtosis"][0] == pytest.approx(8.5 / 6.25)


def test_the_dot_scale_can_lead():
    table = feature_table(W_DEC, W_U, TOKENS, options=FeatureOptions(top_k=2, projection="dot"))
    assert table["top_tokens"].tolist() == table["top_tokens_dot"].tolist()
    assert table["top_weights"][0] == [3.0, 2.0]


def test_invalid_tokens_are_not_shown():
    valid = tensor([True, True, False, True])
    table = feature_table(W_DEC, W_U, TOKENS, options=TWO, valid=valid)
    assert all("<script>" not in tokens for tokens in [*table["top_tokens"], *table["top_tokens_dot"]])


def test_extract_tables():
    tables = extract_tables(W_DEC, W_U, TOKENS, _batches(cut=2), options=TWO)
    acts = torch.cat([batch.feature_acts for batch in _batches(cut=6)]).flatten(0, 1)
    assert tables.n_tokens == 30
    features = tables.features
    assert features.columns[-6:].tolist() == [
        *("density", "mean_activation", "max_activation", "n_active", "density_domain", "density_general"),
    ]
    assert features["n_active"].tolist() == (acts > 0).sum(dim=0).tolist()
    assert features["max_activation"].tolist() == acts.amax(dim=0).tolist()
    assert features["density"].tolist() == pytest.approx(
        ((features["density_domain"] + features["density_general"]) / 2).tolist()
    )
    assert tables.examples["feature"].tolist() == [0, 1, 2]
    assert tables.examples["activation"].tolist() == features["max_activation"].tolist()


@pytest.mark.parametrize("cut", [1, 4, 6])
def test_batches_do_not_matter(cut: int):
    expected = extract_tables(W_DEC, W_U, TOKENS, _batches(cut=2), options=TWO)
    tables = extract_tables(W_DEC, W_U, TOKENS, _batches(cut=cut), options=TWO)
    pd.testing.assert_frame_equal(tables.features, expected.features, check_exact=True)
    pd.testing.assert_frame_equal(tables.examples, expected.examples, check_exact=True)


def test_masked_positions_count_nowhere():
    mask = torch.ones(6, 5, dtype=torch.bool)
    mask[:, 0] = False
    tables = extract_tables(W_DEC, W_U, TOKENS, _batches(cut=2, mask=mask), options=TWO)
    acts = torch.cat([batch.feature_acts for batch in _batches(cut=6)])[:, 1:].flatten(0, 1)
    assert tables.n_tokens == 24
    assert tables.features["n_active"].tolist() == (acts > 0).sum(dim=0).tolist()
    assert tables.examples["activation"].tolist() == acts.amax(dim=0).tolist()


def test_tables_survive_parquet(tmp_path):
    tables = extract_tables(W_DEC, W_U, TOKENS, _batches(cut=2), options=TWO)
    tables.features.to_parquet(tmp_path / "features.parquet")
    again = pd.read_parquet(tmp_path / "features.parquet")
    assert [list(tokens) for tokens in again["top_tokens"]] == tables.features["top_tokens"].tolist()
    assert again["feature"].dtype == "int64"


def test_bad_input():
    with pytest.raises(ShapeMismatch, match=r"W_U has 4 tokens\. Got 3 token strings"):
        feature_table(W_DEC, W_U, TOKENS[:3], options=TWO)
    with pytest.raises(ShapeMismatch, match="d_in"):
        feature_table(W_DEC, W_U[:1], TOKENS, options=TWO)
    with pytest.raises(ConfigError, match="top_k"):
        feature_table(W_DEC, W_U, TOKENS)
    with pytest.raises(BadFile, match="W_dec"):
        feature_table(tensor([[torch.nan, 1.0]]), W_U, TOKENS, options=TWO)


def test_bad_batches():
    with pytest.raises(EmptySelection, match="no token"):
        extract_tables(W_DEC, W_U, TOKENS, [], options=TWO)
    nothing = torch.zeros(6, 5, dtype=torch.bool)
    with pytest.raises(EmptySelection, match="no token"):
        extract_tables(W_DEC, W_U, TOKENS, _batches(cut=2, mask=nothing), options=TWO)
    with pytest.raises(UnknownName, match="source"):
        other = FeatureOptions(top_k=2, sources=("general", "code"))
        extract_tables(W_DEC, W_U, TOKENS, _batches(cut=2), options=other)
