"""Top tokens are exact, and moments within their bounds, in both dtypes of the products and under hostile weights."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from saeffect.errors import BadFile, UnknownName
from saeffect.features import top_tokens
from saeffect.features.projection import PROJECTIONS, Projection, TileMoments, project, project_both
from saeffect.features.top_tokens import Rows, UnembeddingTiles

DTYPES = ("float32", "bfloat16")
TORCH = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@pytest.fixture(autouse=True, scope="module")
def small_tiles():
    """Tiles so narrow that small vocabularies have several; and no row is evaluated whole only for being small."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(top_tokens, "_WIDTH", 96)
        yield


def hostile(seed: int, kind: str, d_sae: int = 5, d_in: int = 24, d_vocab: int = 300) -> tuple[Tensor, Tensor]:
    """Weights that are hard for a coarse product: W_dec [d_sae, d_in] and W_U [d_in, d_vocab]."""
    rng = np.random.default_rng(seed)
    W_dec, W_U = rng.normal(size=(d_sae, d_in)), rng.normal(size=(d_in, d_vocab))
    if kind == "scales":  # rows, columns and dimensions of very different size
        W_dec *= 10.0 ** rng.uniform(-9, 9, (d_sae, 1))
        W_U *= 10.0 ** rng.uniform(-4, 4, (1, d_vocab))
        W_U *= 10.0 ** rng.uniform(-3, 3, (d_in, 1))
    elif kind == "offset":  # far from centred
        W_U += 1000 * rng.normal(size=(d_in, 1))
    elif kind == "twins":  # columns that are equal, or that differ by the last bit
        W_U[:, 1::2] = W_U[:, ::2]
        W_U[:, 3::4] *= 1 + 2.0**-23
    elif kind == "between":  # halfway between two bfloat16 numbers, all to be rounded in one direction
        W_U = np.sign(W_U) * (1 + 2.0**-8 - 2.0**-20 * rng.integers(0, 3, W_U.shape))
        W_dec = np.sign(W_dec) * (1 + 2.0**-8 + 2.0**-20 * rng.integers(0, 3, W_dec.shape))
    elif kind == "narrow":  # one dimension holds nearly everything, and features look elsewhere
        W_U[0] *= 1e4
        W_dec[::2, 0] *= 1e-7
    elif kind == "empty":  # rows and columns of zeros
        W_dec[rng.random(d_sae) < 0.4] = 0
        W_U[:, rng.random(d_vocab) < 0.3] = 0
    elif kind == "tiny":
        W_dec, W_U = W_dec * 1e-21, W_U * 1e-19
    elif kind == "least":  # down to what float32 can hold at all
        W_dec *= 1e-43
    return torch.from_numpy(W_dec.astype(np.float32)), torch.from_numpy(W_U.astype(np.float32))


KINDS = ("plain", "scales", "offset", "twins", "between", "narrow", "empty", "tiny", "least")


def check_exact(found: Projection, W_dec: Tensor, W_U: Tensor, valid: Tensor | None = None) -> None:
    """Against float64: best tokens, best first; what float64 itself cannot tell apart may come in either order."""
    exact = W_dec.double() @ W_U.double()
    lengths = W_U.double().norm(dim=0)
    doubt = W_dec.double().norm(dim=1, keepdim=True) * lengths * (2.0**-52 * len(W_U))
    allowed = torch.ones(W_U.shape[1], dtype=torch.bool) if valid is None else valid.clone()
    if found.projection == "cosine":
        allowed &= lengths > torch.finfo(torch.float32).eps * lengths.max()
        exact, doubt = exact / lengths, doubt / lengths
    exact[:, ~allowed], doubt[:, ~allowed] = -torch.inf, 0
    k = found.indices.shape[1]
    weights = exact.float()
    for row in range(len(W_dec)):
        mine, shown = found.indices[row], found.weights[row]
        assert len(mine.unique()) == k and bool(allowed[mine].all())
        ulp = shown.double().abs() * 2.0**-23 + 2.0**-149
        assert bool(((shown - exact[row, mine]).abs() <= ulp + doubt[row, mine]).all())
        best = exact[row].sort(descending=True).values[:k]
        assert bool(((shown - best).abs() <= ulp + doubt[row].max()).all())
        # Where rounding in float64 plays no part the order is strict, and equal weights are in order of id.
        expected = np.lexsort((np.arange(W_U.shape[1]), -weights[row].numpy()))[: k + 1]
        gaps = exact[row, expected[:-1]] - exact[row, expected[1:]]
        clear = bool((gaps > ulp.max() * 4 + 4 * doubt[row].max()).all())
        if clear and len(expected) > k:
            assert mine.tolist() == expected[:k].tolist()


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from(DTYPES),
    top_k=st.integers(1, 12),
    chunk=st.sampled_from([2, 5, 512]),
)
def test_top_tokens_are_exact(seed: int, kind: str, dtype: str, top_k: int, chunk: int):
    W_dec, W_U = hostile(seed, kind)
    pair = project_both(W_dec, W_U, top_k, chunk=chunk, dtype=dtype)
    for name in PROJECTIONS:
        check_exact(pair[name], W_dec, W_U)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10_000), kind=st.sampled_from(KINDS), dtype=st.sampled_from(DTYPES))
def test_exact_among_valid_tokens(seed: int, kind: str, dtype: str):
    W_dec, W_U = hostile(seed, kind)
    valid = torch.from_numpy(np.random.default_rng(seed).random(W_U.shape[1]) < 0.7)
    pair = project_both(W_dec, W_U, 4, valid=valid, dtype=dtype)
    for name in PROJECTIONS:
        check_exact(pair[name], W_dec, W_U, valid)


@pytest.mark.parametrize("kind", KINDS)
def test_neither_dtype_nor_chunk_nor_block_matters(kind: str, monkeypatch: pytest.MonkeyPatch):
    W_dec, W_U = hostile(3, kind, d_sae=40)
    first = project_both(W_dec, W_U, 5, dtype="float32")
    monkeypatch.setattr("saeffect.features.projection._BLOCK", 7)
    for other in (project_both(W_dec, W_U, 5, dtype="bfloat16"), project_both(W_dec, W_U, 5, chunk=3)):
        for name in PROJECTIONS:
            assert torch.equal(first[name].indices, other[name].indices)
            assert torch.equal(first[name].weights, other[name].weights)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_evaluated_whole_are_the_same(dtype: str, monkeypatch: pytest.MonkeyPatch):
    W_dec, W_U = hostile(5, "empty", d_sae=70)
    usual = project_both(W_dec, W_U, 5, dtype=dtype)
    monkeypatch.setattr(top_tokens, "_DENSE_BLOCKS", 1)
    monkeypatch.setattr(top_tokens, "_DENSE_SHARE", -1.0)
    monkeypatch.setattr(top_tokens.TopTokens, "_pair_products", lambda self, rows, row, token: 1 / len(row[:0]))
    with pytest.raises(ZeroDivisionError):
        project_both(W_dec, W_U, 5, dtype=dtype)
    monkeypatch.undo()
    monkeypatch.setattr(top_tokens, "_DENSE_BLOCKS", 1)
    monkeypatch.setattr(top_tokens, "_DENSE_SHARE", -1.0)
    whole = project_both(W_dec, W_U, 5, dtype=dtype)
    for name in PROJECTIONS:
        assert torch.equal(usual[name].indices, whole[name].indices)
        assert torch.equal(usual[name].weights, whole[name].weights)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), kind=st.sampled_from(KINDS), dtype=st.sampled_from(DTYPES))
def test_the_bound_holds_for_every_product(seed: int, kind: str, dtype: str):
    W_dec, W_U = hostile(seed, kind)
    tiles = UnembeddingTiles(W_U, None, 8, TORCH[dtype])
    rows = Rows(W_dec, TORCH[dtype])
    computed = torch.cat([rows.unit @ tile.T for tile in tiles.tiles], dim=1).double()
    there = tiles.ids >= 0
    columns = (W_U.double() - tiles.origin[:, None])[:, tiles.ids.clamp_min(0)] * tiles.scale
    true = rows.exact / rows.length.clamp_min(1e-300)[:, None] @ columns
    error = (true - computed).abs()[:, there]
    bound = (tiles.slack(rows).double() + tiles.rounding * computed.abs())[:, there]
    assert bool((error <= bound).all())
    assert sorted(tiles.ids[there].tolist()) == list(range(W_U.shape[1]))


def test_the_bound_is_not_loose():
    # All factors are rounded by half a unit and in the sense that adds up: four fifths of the bound are used up.
    W_U = torch.full((64, 40), 1 + 2.0**-8 - 2.0**-20)
    W_U[:, ::2] *= -1  # so that the mean is zero
    rows, tiles = Rows(torch.ones(1, 64), torch.bfloat16), UnembeddingTiles(W_U, None, 4, torch.bfloat16)
    computed = torch.cat([rows.unit @ tile.T for tile in tiles.tiles], dim=1).double()
    true = W_U.double()[:, tiles.ids].sum(0) / 8 * tiles.scale
    used = (true - computed).abs() / (tiles.slack(rows) + tiles.rounding * computed.abs())
    assert 0.4 < float(used.max()) <= 1


def test_few_tokens_are_evaluated(monkeypatch: pytest.MonkeyPatch):
    # The bound is worth its name only if it leaves little to evaluate.
    generator = torch.Generator().manual_seed(0)
    W_dec, W_U = torch.randn(64, 256, generator=generator), torch.randn(256, 8192, generator=generator)
    counts = []
    usual = top_tokens.TopTokens._pair_products

    def counting(self, rows, row, token):
        counts.append(len(row))
        return usual(self, rows, row, token)

    monkeypatch.setattr(top_tokens.TopTokens, "_pair_products", counting)
    for dtype, most in (("float32", 12), ("bfloat16", 30)):
        counts.clear()
        project(W_dec, W_U, 10, "dot", dtype=dtype)
        assert 10 * 64 <= sum(counts) <= most * 64


@pytest.mark.parametrize("dtype", DTYPES)
def test_float32_ties_are_in_token_order(dtype: str):
    # Beside 2**23 float32 has no room for halves: some 75 tokens share each weight, and the lowest ids come first.
    small = torch.from_numpy(np.random.default_rng(0).permutation(300) / 75.0).float()
    W_U = torch.stack([torch.full((300,), 2.0**23), small])
    expected = np.lexsort((np.arange(300), -(W_U[0].double() + W_U[1].double()).float().numpy()))
    found = project(torch.ones(1, 2), W_U, 12, "dot", dtype=dtype)
    assert found.indices[0].tolist() == expected[:12].tolist()
    assert bool((found.weights == found.weights[0, 0]).all())


def test_equal_tokens_and_zero_rows():
    W_U = torch.ones(16, 4000)
    W_U[:, 3999] = -1
    W_dec = torch.zeros(600, 16)
    W_dec[0, 0], W_dec[1, 0] = 1, -1
    for dtype in DTYPES:
        found = project(W_dec, W_U, 3, "dot", dtype=dtype)
        assert found.indices[0].tolist() == [0, 1, 2]
        assert found.indices[1].tolist() == [3999, 0, 1]
        assert found.indices[2:].tolist() == [[0, 1, 2]] * 598
        assert bool((found.weights[2:] == 0).all())
        assert found.std[2:].tolist() == [0.0] * 598 and bool(found.kurtosis[2:].isnan().all())
        assert found.std[0].item() == pytest.approx(2 * (3999 / 4000 * 1 / 4000) ** 0.5, rel=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["plain", "scales", "offset", "between", "narrow", "tiny", "least"])
def test_mean_and_std_are_exact_in_both(kind: str, dtype: str):
    W_dec, W_U = hostile(1, kind, d_sae=30)
    found = project(W_dec, W_U, 1, "dot", dtype=dtype)
    exact = (W_dec.double() @ W_U.double()).numpy()
    size = (W_dec.double().norm(dim=1) * W_U.double().norm(dim=0).max()).numpy()
    assert bool((np.abs(found.mean.numpy() - exact.mean(axis=1)) <= 1e-12 * size).all())
    np.testing.assert_allclose(found.std, exact.std(axis=1), rtol=2e-5)


@pytest.mark.parametrize("kind", ["plain", "scales", "offset", "narrow", "tiny"])
def test_skewness_and_kurtosis_in_bfloat16(kind: str):
    W_dec, W_U = hostile(2, kind, d_sae=30, d_vocab=5000)
    found = project(W_dec, W_U, 1, "dot", dtype="bfloat16")
    exact = (W_dec.double() @ W_U.double()).numpy()
    off = 2e-2 if kind == "scales" else 2e-3  # there a few tokens decide, and no rounding averages out
    np.testing.assert_allclose(found.skewness, scipy.stats.skew(exact, axis=1), rtol=off, atol=off)
    np.testing.assert_allclose(found.kurtosis, scipy.stats.kurtosis(exact, axis=1, fisher=False), rtol=2 * off)


def test_a_row_that_bfloat16_cannot_tell_is_computed_again():
    # The feature looks across the one direction that matters, so its rounded products are rounding and nothing else.
    W_dec, W_U = hostile(4, "narrow", d_sae=30)
    exact = scipy.stats.kurtosis((W_dec.double() @ W_U.double()).numpy(), axis=1, fisher=False)
    found = project(W_dec, W_U, 1, "dot", dtype="bfloat16")
    np.testing.assert_allclose(found.kurtosis[::2], exact[::2], rtol=1e-9)


def test_moments_are_within_the_proven_bound():
    W_dec, W_U = hostile(6, "plain", d_sae=30)
    tiles = UnembeddingTiles(W_U, None, 4, torch.bfloat16)
    rows = Rows(W_dec, torch.bfloat16)
    computed = torch.cat([rows.unit @ tile.T for tile in tiles.tiles], dim=1).double()[:, tiles.ids >= 0]
    true = (rows.exact / rows.length[:, None]) @ ((W_U.double() - tiles.origin[:, None]) * tiles.scale)
    error = tiles.slack(rows)[tiles.ids >= 0] + tiles.rounding * computed.abs()
    for p in (2, 3, 4):
        roots = [values.abs().pow(p).mean(1) ** (1 / p) for values in (true, computed, error)]
        assert bool(((roots[0] - roots[1]).abs() <= roots[2]).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_products_at_the_edge_of_float32(dtype: str):
    W_U = torch.tensor([[3e38, -3e38, 1.0, 2.0], [0.0, 1e-30, 5.0, 4.0]])
    found = project(torch.tensor([[1.0, 0.0], [0.0, 1.0]]), W_U, 2, "dot", dtype=dtype)
    assert found.indices.tolist() == [[0, 3], [2, 3]]
    assert found.std[1].item() == pytest.approx(np.std([0, 1e-30, 5, 4]), rel=1e-6)
    with pytest.raises(BadFile, match="overflows"):
        project(torch.tensor([[2.0, 0.0]]), W_U, 2, "dot", dtype=dtype)


def test_bound_holds_for_lower_matmul_precision():
    W_dec, W_U = hostile(7, "plain")
    tiles, rows = UnembeddingTiles(W_U, None, 4, torch.float32), Rows(W_dec, torch.float32)
    strict = tiles.slack(rows)
    torch.set_float32_matmul_precision("medium")
    try:
        assert bool((tiles.slack(rows) > 100 * strict)[tiles.ids >= 0].all())
        check_exact(project(W_dec, W_U, 5, "dot", dtype="float32"), W_dec, W_U)
    finally:
        torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_features_and_one_token(dtype: str):
    W_dec, W_U = hostile(0, "plain")
    assert project(W_dec[:0], W_U, 3, "dot", dtype=dtype).indices.shape == (0, 3)
    one = project(W_dec, W_U[:, :1], 1, dtype=dtype)
    assert one.indices.tolist() == [[0]] * len(W_dec) and one.std.tolist() == [0.0] * len(W_dec)


def test_rows_a_product_are_cut_to_the_memory(monkeypatch: pytest.MonkeyPatch):
    W_dec, W_U = hostile(0, "plain", d_sae=40)
    usual = project(W_dec, W_U, 3)
    monkeypatch.setattr("saeffect.features.projection._PRODUCT_BYTES", 4 * W_U.shape[1] * 7)
    monkeypatch.setattr("saeffect.features.projection._FEWEST_ROWS", 1)
    seen = []
    monkeypatch.setattr(
        "saeffect.features.projection.Rows", lambda rows, dtype: seen.append(len(rows)) or Rows(rows, dtype)
    )
    cut = project(W_dec, W_U, 3)
    assert len(seen) >= 6 and sum(seen) == 40
    assert torch.equal(usual.indices, cut.indices) and torch.equal(usual.weights, cut.weights)


def test_unknown_dtype():
    with pytest.raises(UnknownName, match="bfloat16"):
        project(*hostile(0, "plain"), dtype="bfloat")


def test_sums_start_afresh():
    W_dec, W_U = hostile(0, "plain")
    tiles, rows = UnembeddingTiles(W_U, None, 4, torch.float32), Rows(W_dec, torch.float32)
    sums, results = TileMoments(tiles, len(W_dec), None), []
    for _ in range(2):
        sums.start()
        for tile in tiles.tiles:
            sums.add(rows.unit @ tile.T, torch.empty(len(W_dec), tiles.tiles.shape[1] // 4))
        results.append(sums.result(rows, torch.zeros(4, len(W_dec))))
    assert torch.equal(*results)
