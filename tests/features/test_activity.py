"""Counts, means and maxima by hand, and their independence of batching."""

from __future__ import annotations

import itertools
import math

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, tensor

from saeffect.errors import BadFile, UnknownName
from saeffect.features.activity import ActivityAccumulator

SOURCES = ("general", "domain")


def _acts(n: int, d_sae: int = 9, seed: int = 0) -> tuple[Tensor, list[str]]:
    """Sparse activations in 1024ths, whose float64 sums are exact in any order, and a source for each."""
    generator = torch.Generator().manual_seed(seed)
    acts = torch.randint(-4000, 4000, (n, d_sae), generator=generator).clamp(min=0) / 1024
    codes = torch.randint(0, 2, (n,), generator=generator).tolist()
    return acts, [SOURCES[code] for code in codes]


def test_by_hand():
    activity = ActivityAccumulator(3, SOURCES)
    activity.update(tensor([[1.0, 0.0, 0.0], [3.0, 0.0, 0.5]]), ["general", "domain"])
    activity.update(tensor([[0.0, 0.0, 0.0], [2.0, 0.0, 0.0]]), ["general", "general"])
    table = activity.result()
    assert activity.n_tokens == 4
    assert table.columns.tolist() == [
        *("feature", "density", "mean_activation", "max_activation", "n_active"),
        *("density_general", "density_domain"),
    ]
    assert table["feature"].tolist() == [0, 1, 2]
    assert table["density"].tolist() == [0.75, 0.0, 0.25]
    assert table["mean_activation"].tolist()[::2] == [2.0, 0.5]
    assert math.isnan(table["mean_activation"][1])
    assert table["max_activation"].tolist() == [3.0, 0.0, 0.5]
    assert table["n_active"].tolist() == [3, 0, 1]
    assert table["density_general"].tolist() == [2 / 3, 0.0, 0.0]
    assert table["density_domain"].tolist() == [1.0, 0.0, 1.0]
    assert table["n_active"].dtype == table["feature"].dtype == "int64"


def test_negative_activations_are_inactive():
    activity = ActivityAccumulator(1, ("text",))
    activity.update(tensor([[-5.0], [1.0]]), ["text", "text"])
    row = activity.result().loc[0]
    assert row["n_active"] == 1 and row["mean_activation"] == 1.0 and row["density"] == 0.5


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.lists(st.integers(0, 60), max_size=5))
def test_batches_do_not_matter(seed: int, cuts: list[int]):
    acts, sources = _acts(60, seed=seed)
    whole, parts = ActivityAccumulator(9, SOURCES), ActivityAccumulator(9, SOURCES)
    whole.update(acts, sources)
    edges = [0, *sorted(cuts), 60]
    for start, stop in itertools.pairwise(edges):
        parts.update(acts[start:stop], sources[start:stop])
    pd.testing.assert_frame_equal(whole.result(), parts.result(), check_exact=True)


def test_sums_of_any_values_do_not_depend_on_batches():
    # Twelve orders of magnitude, so that float64 sums do round; the order of addition is the same.
    acts = 10 ** (torch.rand(500, 4, generator=torch.Generator().manual_seed(3)) * 12 - 6)
    whole, parts = ActivityAccumulator(4, ("text",)), ActivityAccumulator(4, ("text",))
    whole.update(acts, ["text"] * 500)
    for row in acts:
        parts.update(row[None], ["text"])
    pd.testing.assert_frame_equal(whole.result(), parts.result(), check_exact=True)


def test_a_result_stays_as_it_was():
    activity = ActivityAccumulator(1, ("text",))
    activity.update(tensor([[1.0]]), ["text"])
    before = activity.result()
    activity.update(tensor([[5.0]]), ["text"])
    assert before.loc[0].tolist() == [0, 1.0, 1.0, 1.0, 1, 1.0]


def test_sums_are_not_float32():
    # A float32 sum stops growing at 2**24.
    activity = ActivityAccumulator(1, ("text",))
    activity.update(tensor([[2.0**24]]), ["text"])
    for _ in range(3):
        activity.update(torch.ones(1, 1), ["text"])
    assert activity.result()["mean_activation"][0] == (2**24 + 3) / 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(dtype: torch.dtype):
    activity = ActivityAccumulator(1, ("text",))
    activity.update(torch.full((100, 1), 1024.0, dtype=dtype), ["text"] * 100)  # 102,400 overflows float16
    assert activity.result()["mean_activation"][0] == 1024.0


def test_nothing_seen_is_undefined():
    table = ActivityAccumulator(2, SOURCES).result()
    assert table["n_active"].tolist() == [0, 0]
    assert table.drop(columns=["feature", "n_active"]).isna().all().all()


def test_a_source_without_tokens_is_undefined():
    activity = ActivityAccumulator(1, SOURCES)
    activity.update(torch.ones(2, 1), ["general", "general"])
    table = activity.result()
    assert table["density_general"][0] == 1.0 and math.isnan(table["density_domain"][0])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_bad_batch_is_refused_whole(bad: float):
    activity = ActivityAccumulator(2, ("text",))
    activity.update(tensor([[1.0, 2.0]]), ["text"])
    before = activity.result()
    with pytest.raises(BadFile, match="NaN or infinite"):
        activity.update(tensor([[1.0, bad]]), ["text"])
    pd.testing.assert_frame_equal(activity.result(), before, check_exact=True)


def test_an_unknown_source():
    with pytest.raises(UnknownName, match="did you mean 'general'"):
        ActivityAccumulator(2, SOURCES).update(torch.ones(1, 2), ["genral"])
