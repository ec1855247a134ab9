"""Which entries the encoder finds, against float64; in bfloat16 also with inputs made to break its bound."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from saeffect.sae.encoder import Encoder
from saeffect.sae.entries import DenseEntries, Entries, SparseEntries

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(scope="module", autouse=True, params=[10, 1024], ids=["tiles of 10", "one tile"])
def _tile(request: pytest.FixtureRequest) -> Iterator[None]:
    """Small problems would fit into one tile; cut them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("saeffect.sae.encoder._TILE", request.param)
        yield


_LOW, _HIGH = 1 + 2.0**-8 - 2.0**-20, 1 + 2.0**-8 + 2.0**-20  # rounded to 1 and to 1 + 2^-7 in bfloat16


def _plain(x: Tensor, W: Tensor, bias: Tensor, draw: torch.Generator) -> None:
    """Leaves all as it is."""


def _loud_token(x: Tensor, W: Tensor, bias: Tensor, draw: torch.Generator) -> None:
    x[len(x) // 2] *= 3000.0


def _loud_feature(x: Tensor, W: Tensor, bias: Tensor, draw: torch.Generator) -> None:
    W[len(W) // 2] *= 3000.0


def _zeros(x: Tensor, W: Tensor, bias: Tensor, draw: torch.Generator) -> None:
    x[0], W[0], bias[-1] = 0.0, 0.0, 0.0


def _all_zero(x: Tensor, W: Tensor, bias: Tensor, draw: torch.Generator) -> None:
    x.zero_()
    W.zero_()
    bias.zero_()


def _ties(x: Tensor, W: Tensor, bias: Tensor, draw: torch.Generator) -> None:
    x.round_()
    W.round_()
    bias.round_()
    W[len(W) // 2 :] = W[: len(W) - len(W) // 2].clone()


def _negative(x: Tensor, W: Tensor, bias: Tensor, draw: torch.Generator) -> None:
    x.abs_()
    W.abs_().neg_()
    bias.abs_().neg_()


def _large_biases(x: Tensor, W: Tensor, bias: Tensor, draw: torch.Generator) -> None:
    """Large products that large biases nearly take back, for every other feature."""
    x[:, 0] = 1.0
    W[::2, 0] = 200.0
    bias[::2] -= 200.0


def _one_way(x: Tensor, W: Tensor, bias: Tensor, draw: torch.Generator) -> None:
    """Every product is rounded by the most possible, all in one direction, and they cancel."""
    half = x.shape[1] // 2
    x[:, :half], x[:, half:] = _LOW, _HIGH
    W[:, :half], W[:, half:] = _LOW, -_HIGH
    bias.copy_(torch.linspace(-0.02, 0.02, len(W)) * x.shape[1])


def _tiny(x: Tensor, W: Tensor, bias: Tensor, draw: torch.Generator) -> None:
    x *= 1e-30
    W *= 1e-12
    bias *= 1e-40


def _huge(x: Tensor, W: Tensor, bias: Tensor, draw: torch.Generator) -> None:
    x *= 1e16
    W *= 1e12
    bias *= 1e30


HOSTILE = [
    _plain,
    _loud_token,
    _loud_feature,
    _zeros,
    _all_zero,
    _ties,
    _negative,
    _large_biases,
    _one_way,
    _tiny,
    _huge,
]


class Problem:
    """Inputs, and what float64 says about them."""

    def __init__(self, seed: int, shape: tuple[int, int, int], hostile: str) -> None:
        n, d_in, d_sae = shape
        draw = torch.Generator().manual_seed(seed)
        self.x = torch.randn(n, d_in, generator=draw)
        self.W = torch.randn(d_sae, d_in, generator=draw)
        self.bias = torch.randn(d_sae, generator=draw)
        self.weight = torch.rand(d_sae, generator=draw) + 0.1
        self.floor = 0.5 * torch.randn(d_sae, generator=draw)
        globals()[hostile](self.x, self.W, self.bias, draw)

    def exact(self, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(the value of each entry, how far float32 may be off it), float64 `[n, d_sae]`."""
        x, W, bias = self.x.double(), self.W.double(), self.bias.double()
        scale = x.norm(dim=1)[:, None] * W.norm(dim=1) + bias.abs() + self.floor.abs()
        weight = torch.ones(1, dtype=torch.float64) if weight is None else weight.double()
        off = scale * weight * ((x.shape[1] + 8) * 2.0**-23) + 2.0**-100
        return (x @ W.T + bias) * weight, off


problems = st.builds(
    Problem,
    st.integers(0, 10_000),
    st.tuples(st.integers(1, 9), st.integers(1, 40), st.integers(1, 70)),
    st.sampled_from([change.__name__ for change in HOSTILE]),
)


def _mask(entries: Entries) -> Tensor:
    """Bool `[n, d_sae]`."""
    assert isinstance(entries, SparseEntries)
    return entries.to_dense(torch.ones_like(entries.values)) > 0


def _assert_largest(found: Tensor, exact: Tensor, off: Tensor, k: int) -> None:
    """`found` holds, row by row, the k largest of `exact`, as far as float32 can tell them apart, or 0."""
    on = found > 0
    assert (on.sum(1) <= k).all()
    assert ((found - exact).abs() <= off)[on].all()
    k = min(k, exact.shape[1])
    best, got = exact.topk(k, dim=1).values.relu(), found.topk(k, dim=1).values
    assert ((best - got).abs() <= 2 * off.max(1, keepdim=True).values).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(problem=problems, chunk=st.integers(1, 8), with_floor=st.booleans(), dense=st.booleans())
@settings(max_examples=80, deadline=None, derandomize=True)
def test_above(problem: Problem, chunk: int, with_floor: bool, dense: bool, dtype: torch.dtype) -> None:
    floor = problem.floor if with_floor else None
    encoder = Encoder(dtype, chunk=chunk, dense_above=0.0 if dense else 1.0)
    entries = encoder.above(problem.x, problem.W, problem.bias, floor)
    exact, off = problem.exact()
    lowest = torch.zeros(1) if floor is None else floor
    if isinstance(entries, DenseEntries):
        found, values = entries.values > lowest, entries.values
        assert torch.equal(values[~found], lowest.expand_as(values)[~found])
    else:
        found, values = _mask(entries), entries.to_dense()
    assert not (found & (exact <= lowest - off)).any()
    assert not (~found & (exact > lowest + off)).any()
    assert ((values - exact).abs() <= off)[found].all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(problem=problems, chunk=st.integers(1, 8), share=st.floats(0, 1), weighted=st.booleans())
@settings(max_examples=80, deadline=None, derandomize=True)
def test_top(problem: Problem, chunk: int, share: float, weighted: bool, dtype: torch.dtype) -> None:
    k = max(1, round(share * len(problem.W) / 4))
    weight = problem.weight if weighted else None
    entries = Encoder(dtype, chunk=chunk).top(problem.x, problem.W, problem.bias, k, weight=weight)
    found = entries.to_dense() if weight is None else entries.to_dense() * weight
    _assert_largest(found, *problem.exact(weight), k)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(problem=problems, chunk=st.integers(1, 8), k=st.integers(1, 6), weighted=st.booleans())
@settings(max_examples=80, deadline=None, derandomize=True)
def test_batch_top(problem: Problem, chunk: int, k: int, weighted: bool, dtype: torch.dtype) -> None:
    weight = problem.weight if weighted else None
    n_kept = min(k, len(problem.W)) * len(problem.x)
    entries = Encoder(dtype, chunk=chunk).batch_top(problem.x, problem.W, problem.bias, n_kept, weight=weight)
    found = entries.to_dense() if weight is None else entries.to_dense() * weight
    exact, off = problem.exact(weight)
    _assert_largest(found.view(1, -1), exact.view(1, -1), off.view(1, -1), n_kept)


@given(problem=problems, with_floor=st.booleans())
@settings(max_examples=80, deadline=None, derandomize=True)
def test_bfloat16_product_is_a_tight_upper_bound(problem: Problem, with_floor: bool) -> None:
    floor = problem.floor if with_floor else None
    encoder = Encoder(torch.bfloat16)
    product = encoder._prepare(problem.x, problem.W, problem.bias, floor)
    hidden = torch.cat([encoder._tile(product, 0, first).hidden.clone() for first in product.tiles], dim=1)
    exact, off = problem.exact()
    exact = exact if floor is None else exact - floor.double()
    rounding = hidden.double().abs() * 2.0**-7
    assert (hidden.double() + rounding >= exact).all()
    assert (hidden.double() - rounding <= exact + encoder._gap * (1 + 2.0**-20) + off).all()
    assert ((hidden > 0) | (exact <= 0)).all()


@pytest.mark.parametrize("d_in", [768, 4096])
def test_the_bound_at_full_width(d_in: int) -> None:
    """Sums of many terms of one sign, which lose most in float32, then taken back by the bias."""
    draw = torch.Generator().manual_seed(0)
    x, W = torch.rand(16, d_in, generator=draw), torch.rand(64, d_in, generator=draw)
    exact = x.double() @ W.double().T
    for share in torch.linspace(0.97, 1.03, 7):
        bias = -exact.mean(0).float() * share
        entries = Encoder(torch.bfloat16, dense_above=1.0).above(x, W, bias)
        off = (d_in + 8) * 2.0**-23 * exact
        assert not (~_mask(entries) & (exact + bias > off)).any()
        assert not (_mask(entries) & (exact + bias < -off)).any()


def test_all_products_rounded_down_by_the_most_possible() -> None:
    """Each of 128 products is off by 2^-7 of its size: twice what one rounding is off by."""
    x, W = torch.tensor([[_LOW] * 64 + [_HIGH] * 64]), torch.tensor([[_LOW] * 64 + [-_HIGH] * 64])
    bias = torch.tensor([0.004 * 64])
    entries = Encoder(torch.bfloat16, dense_above=1.0).above(x, W, bias)
    assert entries.values.tolist() == pytest.approx([0.2558], abs=1e-3)


def test_large_bias_does_not_hide_others() -> None:
    """Rounded upwards, a bias of -99.8 adds half a unit: the first feature seems to win by far."""
    x, W, bias = torch.ones(1, 2), torch.tensor([[100.0, 0.0], [0.0, 0.3]]), torch.tensor([-99.8, 0.0])
    entries = Encoder(torch.bfloat16).top(x, W, bias, 1)
    assert entries.feature.tolist() == [1]
    assert Encoder(torch.bfloat16).batch_top(x, W, bias, 1).feature.tolist() == [1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_entries_come_by_token_then_by_feature(dtype: torch.dtype) -> None:
    problem = Problem(0, (11, 8, 37), "_plain")
    encoder = Encoder(dtype, chunk=4, dense_above=1.0)
    for entries in (
        encoder.above(problem.x, problem.W, problem.bias),
        encoder.top(problem.x, problem.W, problem.bias, 3),
        encoder.batch_top(problem.x, problem.W, problem.bias, 33),
    ):
        assert isinstance(entries, SparseEntries)
        flat = entries.token * 37 + entries.feature
        assert len(flat) >= 33
        assert (flat.diff() > 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dense_above_the_given_share(dtype: torch.dtype) -> None:
    x, W, bias = torch.ones(4, 1), torch.tensor([[1.0]] * 3 + [[-1.0]] * 7), torch.zeros(10)
    for share, kind in ((0.31, SparseEntries), (0.29, DenseEntries)):
        entries = Encoder(dtype, dense_above=share).above(x, W, bias)
        assert type(entries) is kind
        assert entries.to_dense().tolist() == [[1.0] * 3 + [0.0] * 7] * 4


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_buffers_are_reused_and_resized(dtype: torch.dtype) -> None:
    encoder = Encoder(dtype, chunk=4, dense_above=1.0)
    for seed, shape in enumerate([(9, 5, 33), (3, 5, 33), (9, 5, 33), (4, 7, 8), (1, 7, 300)]):
        problem = Problem(seed, shape, "_plain")
        found = _mask(encoder.above(problem.x, problem.W, problem.bias))
        assert torch.equal(found, problem.exact()[0] > 0)
    before = encoder._buffers["tile"].data_ptr()
    encoder.above(problem.x, problem.W, problem.bias)
    assert encoder._buffers["tile"].data_ptr() == before


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dense_above", [0.0, 1.0])
@pytest.mark.parametrize("where", ["x", "W", "bias"])
def test_nan_is_not_taken_for_off(where: str, dense_above: float, dtype: torch.dtype) -> None:
    problem = Problem(0, (6, 5, 20), "_plain")
    getattr(problem, where).view(-1)[7 if where == "bias" else 12] = torch.nan
    encoder = Encoder(dtype, chunk=4, dense_above=dense_above)
    exact = problem.exact()[0]
    for entries in (
        encoder.above(problem.x, problem.W, problem.bias),
        encoder.above(problem.x, problem.W, problem.bias, problem.floor),
        encoder.top(problem.x, problem.W, problem.bias, 2),
    ):
        assert entries.to_dense().isnan().any()
        assert not (entries.to_dense().isnan() & ~exact.isnan()).any()
