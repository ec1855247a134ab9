"""Top tokens and moments: by hand, against the full product, and where input is bad."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, tensor

from processes import Forked, script
from saeffect.errors import BadFile, ConfigError, ShapeMismatch, UnknownName
from saeffect.features.projection import PROJECTIONS, project, project_both


def _random(d_sae: int = 37, d_in: int = 16, d_vocab: int = 211, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    norms = torch.rand(d_vocab, generator=generator) * 4 + 0.5
    return torch.randn(d_sae, d_in, generator=generator), torch.randn(d_in, d_vocab, generator=generator) * norms


def _expected_top(full: np.ndarray, top_k: int) -> np.ndarray:
    """Best first, equal values by lowest id, by sorting everything."""
    ids = np.arange(full.shape[1])
    return np.stack([np.lexsort((ids, -row))[:top_k] for row in full])


def test_by_hand():
    # Feature 0 is (1, 0), so its products are the first row of W_U; feature 1 is (0, 2).
    W_dec = tensor([[1.0, 0.0], [0.0, 2.0]])
    W_U = tensor([[3.0, -1.0, 2.0, 0.0], [4.0, 0.0, 0.0, 1.0]])  # column norms 5, 1, 2, 1
    dot = project(W_dec, W_U, top_k=2, projection="dot")
    assert dot.indices.tolist() == [[0, 2], [0, 3]]
    assert dot.weights.tolist() == [[3.0, 2.0], [8.0, 2.0]]
    cosine = project(W_dec, W_U, top_k=2, projection="cosine")
    assert cosine.indices.tolist() == [[2, 0], [3, 0]]
    assert torch.equal(cosine.weights, tensor([[1.0, 0.6], [2.0, 1.6]]))  # the row norm 2 is not divided out
    # Products 3, -1, 2, 0: mean 1, deviations 2, -2, 1, -1, so squares average 2.5, fourth powers 8.5.
    for moments in (dot, cosine):
        assert moments.mean[0].item() == 1.0
        assert moments.std[0].item() == pytest.approx(2.5**0.5, rel=1e-15)
        assert moments.skewness[0].item() == 0.0
        assert moments.kurtosis[0].item() == pytest.approx(8.5 / 6.25, rel=1e-15)
    # Products 8, 0, 0, 2: deviations 5.5, -2.5, -2.5, -0.5; cubes sum to 135, squares to 43.
    assert dot.skewness[1].item() == pytest.approx((135 / 4) / (43 / 4) ** 1.5, rel=1e-14)


def test_types_and_shapes():
    result = project(*_random(), top_k=5)
    assert result.projection == "cosine"
    assert result.indices.dtype == torch.int64 and result.weights.dtype == torch.float32
    assert result.indices.shape == result.weights.shape == (37, 5)
    for moment in (result.mean, result.std, result.skewness, result.kurtosis):
        assert moment.dtype == torch.float64 and moment.shape == (37,)


@pytest.mark.parametrize("projection", PROJECTIONS)
def test_agrees_with_the_full_product(projection: str):
    W_dec, W_U = _random()
    full = W_dec.double() @ W_U.double()
    scaled = full if projection == "dot" else full / W_U.double().norm(dim=0)
    result = project(W_dec, W_U, top_k=10, projection=projection, chunk=8)
    expected = scaled.topk(10, dim=1)
    assert torch.equal(result.indices, expected.indices)
    torch.testing.assert_close(result.weights.double(), expected.values, rtol=1e-5, atol=1e-5)


def test_moments_agree_with_scipy():
    W_dec, W_U = _random(d_vocab=1009)
    result = project(W_dec, W_U, top_k=1, projection="cosine", chunk=5)
    full = (W_dec @ W_U).double().numpy()
    np.testing.assert_allclose(result.mean, full.mean(axis=1), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(result.std, full.std(axis=1, ddof=0), rtol=1e-6)
    np.testing.assert_allclose(result.skewness, scipy.stats.skew(full, axis=1), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(result.kurtosis, scipy.stats.kurtosis(full, axis=1, fisher=False), rtol=1e-5)


def test_moments_do_not_cancel_far_from_zero():
    # Products 2**20 and 2**20 + 1 by turns: float32 sums of fourth powers would lose the 1 altogether.
    W_U = torch.full((1, 1000), 2.0**20)
    W_U[0, ::2] += 1
    result = project(torch.ones(1, 1), W_U, top_k=1, projection="dot")
    assert result.mean.item() == 2**20 + 0.5
    assert result.std.item() == 0.5
    assert result.kurtosis.item() == pytest.approx(1.0, rel=1e-12)


def test_equal_products_have_no_shape():
    W_U = torch.full((1, 7), 0.1)
    result = project(tensor([[0.3], [0.0]]), W_U, top_k=3, projection="dot")
    assert result.std.tolist() == [0.0, 0.0]
    assert result.skewness.isnan().all() and result.kurtosis.isnan().all()
    assert result.indices.tolist() == [[0, 1, 2], [0, 1, 2]]


def test_both_scales_are_the_single_ones():
    W_dec, W_U = _random()
    pair = project_both(W_dec, W_U, 6, chunk=10)
    for name in PROJECTIONS:
        single = project(W_dec, W_U, 6, name, chunk=10)
        assert pair[name].projection == name
        for field in ("indices", "weights", "mean", "std", "skewness", "kurtosis"):
            assert torch.equal(getattr(pair[name], field), getattr(single, field))


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_chunks_do_not_matter(chunk: int):
    # Small integers, so that every product is exact whatever the matrix product's blocking.
    generator = torch.Generator().manual_seed(1)
    W_dec = torch.randint(-3, 4, (37, 5), generator=generator).float()
    W_U = torch.randint(-3, 4, (5, 90), generator=generator).float()
    a, b = project_both(W_dec, W_U, 4, chunk=13), project_both(W_dec, W_U, 4, chunk=chunk)
    for name in PROJECTIONS:
        assert torch.equal(a[name].indices, b[name].indices)
        assert torch.equal(a[name].weights, b[name].weights)
        torch.testing.assert_close(a[name].kurtosis, b[name].kurtosis, rtol=1e-6, atol=0, equal_nan=True)


def test_twice_the_same():
    W_dec, W_U = _random()
    a, b = project(W_dec, W_U, 10), project(W_dec, W_U, 10)
    assert torch.equal(a.indices, b.indices) and torch.equal(a.weights, b.weights)
    assert torch.equal(a.kurtosis, b.kurtosis)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_ties_go_to_the_lowest_token(data: st.DataObject):
    d_sae, d_vocab = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 30))
    seed, top_k = data.draw(st.integers(0, 10_000)), data.draw(st.integers(1, d_vocab))
    rng = np.random.default_rng(seed)
    W_dec = rng.integers(-1, 2, (d_sae, 2)).astype(np.float32)
    W_U = rng.integers(-2, 3, (2, d_vocab)).astype(np.float32)
    result = project(torch.from_numpy(W_dec), torch.from_numpy(W_U), top_k, "dot", chunk=4)
    expected = _expected_top(W_dec @ W_U, top_k)
    np.testing.assert_array_equal(result.indices, expected)
    np.testing.assert_array_equal(result.weights, np.take_along_axis(W_dec @ W_U, expected, axis=1))


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(PROJECTIONS))
def test_scaling_a_feature_scales_its_weights(seed: int, projection: str):
    W_dec, W_U = _random(d_sae=3, seed=seed)
    once, four = project(W_dec, W_U, 5, projection), project(4 * W_dec, W_U, 5, projection)
    assert torch.equal(once.indices, four.indices)
    assert torch.equal(4 * once.weights, four.weights)
    torch.testing.assert_close(once.kurtosis, four.kurtosis, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype):
    W_dec, W_U = (matrix.to(dtype) for matrix in _random())
    half, full = project(W_dec, W_U), project(W_dec.float(), W_U.float())
    assert torch.equal(half.indices, full.indices) and torch.equal(half.weights, full.weights)
    assert torch.equal(half.std, full.std)


def test_a_parameter_and_a_transposed_unembedding_are_fine():
    W_dec, W_U = _random()
    tied = W_U.T.contiguous().T
    result = project(torch.nn.Parameter(W_dec), tied)
    assert not result.weights.requires_grad
    assert torch.equal(result.indices, project(W_dec, W_U).indices)


def test_invalid_tokens_are_left_out_of_choice_and_moments():
    W_dec = tensor([[1.0]])
    W_U = tensor([[9.0, 1.0, 5.0, 3.0]])
    valid = tensor([False, True, True, True])
    pair = project_both(W_dec, W_U, 3, valid=valid)
    assert pair["dot"].indices.tolist() == [[2, 3, 1]]
    assert pair["cosine"].indices.tolist() == [[1, 2, 3]]  # all three are the same direction
    assert pair["dot"].mean.item() == 3.0
    assert pair["dot"].std.item() == pytest.approx((8 / 3) ** 0.5)


def test_a_token_without_direction_is_never_chosen_under_cosine():
    W_U = tensor([[0.0, -1.0, -2.0, 1e-12], [0.0, 0.0, 1.0, 0.0]])
    cosine = project(tensor([[1.0, 0.0]]), W_U, top_k=2, projection="cosine")
    assert cosine.indices.tolist() == [[2, 1]]
    assert project(tensor([[1.0, 0.0]]), W_U, top_k=1, projection="dot").indices.tolist() == [[3]]
    with pytest.raises(ConfigError, match="the 2 tokens that projection 'cosine'"):
        project(tensor([[1.0, 0.0]]), W_U, top_k=3, projection="cosine")


def test_all_tokens_can_be_asked_for():
    W_dec, W_U = _random(d_vocab=12)
    assert sorted(project(W_dec, W_U, top_k=12).indices[0].tolist()) == list(range(12))
    for top_k in (0, -1, 13):
        with pytest.raises(ConfigError, match="top_k must be from 1 to the 12 tokens"):
            project(W_dec, W_U, top_k=top_k)


def test_bad_names_and_shapes():
    W_dec, W_U = _random()
    with pytest.raises(UnknownName, match="did you mean 'cosine'"):
        project(W_dec, W_U, projection="cosin")
    with pytest.raises(ShapeMismatch, match=r"\[37, 15\] and \[16, 211\]"):
        project(W_dec[:, :15], W_U)
    with pytest.raises(ShapeMismatch):
        project(W_dec[0], W_U)
    with pytest.raises(ShapeMismatch, match="bool tensor of 211 entries"):
        project(W_dec, W_U, valid=torch.ones(210, dtype=torch.bool))
    with pytest.raises(ShapeMismatch, match="Got int64"):
        project(W_dec, W_U, valid=torch.ones(211, dtype=torch.int64))
    with pytest.raises(ConfigError, match="chunk"):
        project(W_dec, W_U, chunk=0)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("which", ["W_dec", "W_U"])
def test_bad_weights(which: str, bad: float):
    matrices = dict(zip(("W_dec", "W_U"), _random(), strict=True))
    matrices[which][-1, -1] = bad
    with pytest.raises(BadFile, match=f"{which} holds 1 NaN or infinite values"):
        project(**matrices, chunk=8)


def test_overflow_is_said():
    with pytest.raises(BadFile, match="overflows"):
        project(tensor([[1e30]]), tensor([[1e30, 1.0]]), top_k=1, projection="dot")
    with pytest.raises(BadFile, match="overflows"):
        project(tensor([[1.0, 0.0]]), tensor([[1e30], [1e30]]), top_k=1, projection="cosine")


_MEMORY = """
import resource, torch
from saeffect.features.projection import project_both
W_dec, W_U = torch.randn(1000, 4), torch.randn(4, 16000)
project_both(W_dec[:64], W_U, chunk=64)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
project_both(W_dec, W_U, chunk=64)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss is in kilobytes on Linux only")
def test_memory_does_not_grow_with_the_product():
    # The whole product would be 64 MB; a chunk of it is 4 MB.
    code, out, err = Forked(script, [_MEMORY], {}).end()
    assert code == 0, err
    assert int(out) < 40e6
