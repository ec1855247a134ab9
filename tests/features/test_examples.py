"""Which contexts are kept, how far they reach, and what they show."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, tensor

from saeffect.errors import BadFile
from saeffect.features.activity import ExampleCollector

LETTERS = [chr(ord("a") + i) for i in range(26)]


def _batch(n: int, length: int, d_sae: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Coarse activations, so that ties are common; tokens; and a mask with padded tails and gaps."""
    generator = torch.Generator().manual_seed(seed)
    acts = torch.randint(-6, 6, (n, length, d_sae), generator=generator).clamp(min=0).float()
    ids = torch.randint(0, 26, (n, length), generator=generator)
    return acts, ids, torch.rand(n, length, generator=generator) > 0.3


def _slow(acts: Tensor, ids: Tensor, mask: Tensor, n_examples: int, window: int) -> pd.DataFrame:
    """The same table, one feature and one sequence at a time."""
    rows = []
    for feature in range(acts.shape[2]):
        peaks = []
        for sequence in range(len(acts)):
            one = np.where(mask[sequence], acts[sequence, :, feature], 0.0)
            peaks.append((-one.max(), sequence, int(one.argmax()), one))
        best = [peak for peak in sorted(peaks, key=lambda peak: peak[:2]) if peak[0] < 0][:n_examples]
        for rank, (negative, sequence, at, one) in enumerate(best):
            last = int(np.flatnonzero(mask[sequence]).max())
            start, stop = max(0, at - window), min(last, at + window // 3) + 1
            rows.append(
                {
                    "feature": feature,
                    "rank": rank,
                    "activation": -negative,
                    "position": at - start,
                    "tokens": [LETTERS[i] for i in ids[sequence, start:stop].tolist()],
                    "activations": one[start:stop].astype(float).tolist(),
                    "source": f"s{sequence % 3}",
                }
            )
    return pd.DataFrame(rows)


def test_by_hand():
    collector = ExampleCollector(d_sae=2, n_examples=2, window=3)
    acts = torch.zeros(3, 6, 2)
    acts[0, 4, 0], acts[0, 3, 0] = 5.0, 1.0
    acts[1, 0, 0] = 7.0
    acts[2, 5, 0] = 6.0
    ids = tensor([[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11], [12, 13, 14, 15, 16, 17]])
    collector.update(acts, ids, sources=["general", "domain", "general"])
    table = collector.result(LETTERS)
    # Feature 1 never fires and has no row; sequence 0 comes third for feature 0.
    assert table["feature"].tolist() == [0, 0] and table["rank"].tolist() == [0, 1]
    assert table["activation"].tolist() == [7.0, 6.0]
    assert table["tokens"].tolist() == [
        ["g", "h"],
        ["o", "p", "q", "r"],
    ]  # 3 before, 1 after, within the text
    assert table["activations"].tolist() == [[7.0, 0.0], [0.0, 0.0, 0.0, 6.0]]
    assert table["position"].tolist() == [0, 3]
    assert table["source"].tolist() == ["domain", "general"]


def test_activations_are_of_the_same_feature():
    collector = ExampleCollector(d_sae=2, n_examples=1, window=3)
    collector.update(tensor([[[1.0, 9.0], [2.0, 8.0], [3.0, 7.0]]]), tensor([[0, 1, 2]]))
    assert collector.result(LETTERS)["activations"].tolist() == [[1.0, 2.0, 3.0], [9.0, 8.0]]


def test_one_a_sequence_and_ties_to_the_earliest():
    collector = ExampleCollector(d_sae=1, n_examples=2, window=0)
    acts = tensor([[[1.0], [4.0], [4.0]], [[4.0], [0.0], [4.0]], [[4.0], [4.0], [4.0]]])
    collector.update(acts, tensor([[0, 1, 2], [3, 4, 5], [6, 7, 8]]))
    collector.update(torch.full((1, 3, 1), 4.0), tensor([[9, 10, 11]]))
    assert collector.result(LETTERS)["tokens"].tolist() == [["b"], ["d"]]


def test_mask():
    collector = ExampleCollector(d_sae=1, n_examples=3, window=6)
    acts = tensor([[[99.0], [1.0], [98.0], [2.0], [torch.nan]], [[5.0]] * 5])
    mask = tensor([[False, True, False, True, False], [False] * 5])
    collector.update(acts, tensor([[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]), mask)
    table = collector.result(LETTERS)
    # The masked tail is not shown; other masked positions are, with activation 0. Sequence 1 is all masked.
    assert table["tokens"].tolist() == [["a", "b", "c", "d"]]
    assert table["activations"].tolist() == [[0.0, 1.0, 0.0, 2.0]]
    assert table["position"].tolist() == [3]


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 5), st.integers(0, 9), st.lists(st.integers(0, 12), max_size=4))
def test_agrees_with_the_slow_way_however_batched(seed: int, n_examples: int, window: int, cuts: list[int]):
    acts, ids, mask = _batch(12, 7, 4, seed)
    collector = ExampleCollector(4, n_examples, window)
    edges = [0, *sorted(cuts), 12]
    sources = [f"s{i % 3}" for i in range(12)]
    for start, stop in itertools.pairwise(edges):
        part = slice(start, stop)
        collector.update(acts[part], ids[part], mask[part], sources=sources[part])
    expected = _slow(acts, ids, mask, n_examples, window)
    pd.testing.assert_frame_equal(collector.result(LETTERS), expected, check_dtype=False, check_exact=True)


def test_peak_is_where_position_says():
    acts, ids, mask = _batch(40, 30, 8, seed=5)
    collector = ExampleCollector(8, 6, 24)
    collector.update(acts.bfloat16(), ids, mask)
    table = collector.result(LETTERS)
    assert len(table) == 48
    for row in table.itertuples():
        assert len(row.tokens) == len(row.activations) <= 24 + 1 + 8
        assert row.activations[row.position] == row.activation == max(row.activations)


def test_hostile_tokens_come_back_as_they_are(tmp_path):
    hostile = ["<script>alert(1)</script>", "\u202egnirts", "a\nb\r\x00", "\ufffd", "", '"; DROP TABLE', "🫀"]
    collector = ExampleCollector(1, 1, 6)
    collector.update(torch.arange(1.0, 8.0).view(1, 7, 1), torch.arange(7)[None], sources=["<b>general"])
    table = collector.result(hostile)
    assert table["tokens"][0] == hostile and table["source"][0] == "<b>general"
    table.to_parquet(tmp_path / "examples.parquet")
    assert pd.read_parquet(tmp_path / "examples.parquet")["tokens"][0].tolist() == hostile


def test_nothing_seen():
    empty = ExampleCollector(2).result(LETTERS)
    collector = ExampleCollector(2)
    collector.update(torch.zeros(1, 3, 2), torch.zeros(1, 3, dtype=torch.int64))
    collector.update(torch.zeros(0, 3, 2), torch.zeros(0, 3, dtype=torch.int64))
    for table in (empty, collector.result(LETTERS)):
        assert len(table) == 0
        assert table.columns.tolist() == [
            *("feature", "rank", "activation", "position", "tokens", "activations", "source"),
        ]
        assert table["feature"].dtype == "int64" and table["activation"].dtype == "float64"


def test_bad_input():
    collector = ExampleCollector(2)
    ids = torch.zeros(1, 3, dtype=torch.int64)
    with pytest.raises(BadFile, match="NaN"):
        collector.update(torch.full((1, 3, 2), torch.nan), ids)


def test_contexts_can_hold_another_models_activations_beside() -> None:
    acts = torch.tensor([[[0.0], [3.0], [1.0]], [[2.0], [0.0], [5.0]]])
    other = acts.flip(1) * 10
    collector = ExampleCollector(d_sae=1, n_examples=2, window=2, beside=True)
    for row in range(2):  # the second displaces the first
        collector.update(acts[row : row + 1], torch.tensor([[0, 1, 2]]), beside=other[row : row + 1])
    table = collector.result(["a", "b", "c"])
    assert table["activations"].tolist() == [[2.0, 0.0, 5.0], [0.0, 3.0]]
    assert table["activations_beside"].tolist() == [[50.0, 0.0, 20.0], [10.0, 30.0]]
