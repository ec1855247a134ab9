"""Matching by activation: against numpy's correlation matrix, by hand, and for features that hardly fire."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from saeffect.diffing import coactivity
from saeffect.diffing.coactivity import FiringLog, match_activity
from saeffect.diffing.matching import NO_MATCH
from saeffect.errors import BadFile, ShapeMismatch


def acts(n_tokens: int, d_sae: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.relu(torch.randn(n_tokens, d_sae, generator=generator) - 1.0)


def logged(values: torch.Tensor, batch: int = 10**9) -> FiringLog:
    log = FiringLog(values.shape[1])
    for part in values.split(batch):
        log.update(part)
    return log


@pytest.mark.parametrize("cells", [10**9, 40])
def test_correlations_are_those_of_numpy(monkeypatch: pytest.MonkeyPatch, cells: int) -> None:
    monkeypatch.setattr(coactivity, "_BLOCK_CELLS", cells)
    a, b = acts(300, 9, 0), acts(300, 13, 1)
    b[:, :9] += 0.4 * a
    found = match_activity(logged(a, 70), logged(b, 90), n=4, min_active=1, min_coactive=1)
    dense = np.corrcoef(a.double().numpy().T, b.double().numpy().T)[:9, 9:]
    dense[(a.numpy() > 0).astype(int).T @ (b.numpy() > 0) < 1] = -1
    for neighbours, expected in ((found.forward, dense), (found.backward, dense.T)):
        order = np.argsort(-expected, axis=1)[:, :4]
        best = np.take_along_axis(expected, order, axis=1)
        kept = best > 0
        np.testing.assert_array_equal(neighbours.indices[kept], order[kept])
        np.testing.assert_allclose(neighbours.similarity[kept], best[kept], atol=1e-9)
        assert (neighbours.indices[~kept] == NO_MATCH).all()
    assert found.forward.match.tolist() == list(range(9))


def test_log_keeps_tokens_in_order() -> None:
    values = acts(50, 20, 4)
    np.testing.assert_array_equal(logged(values, 7).matrix().toarray(), values.numpy())
    some = np.arange(50) % 3 > 0
    np.testing.assert_array_equal(logged(values, 7).only(some).matrix().toarray(), values.numpy()[some])


def test_why_a_feature_has_no_partner() -> None:
    a = torch.zeros(40, 5)
    a[:20, 0] = torch.arange(1.0, 21)
    a[:3, 2] = 1.0
    a[:, 3] = 2.0
    a[20:, 4] = torch.arange(1.0, 21)
    b = torch.zeros(40, 1)
    b[:20, 0] = torch.arange(1.0, 21)
    found = match_activity(logged(a), logged(b), n=2, min_active=10, min_coactive=5)
    assert found.forward.reason == (
        "",
        "it never fires on this text",
        "it fires on 3 tokens, and 10 are needed",
        "it fires alike on every token",
        "no feature of the other SAE fires with it often enough",
    )
    assert np.isnan(found.forward.best).tolist() == [False, True, True, True, False]
    assert found.forward.similarity[4].tolist() == [0.0, 0.0]  # it correlates with nothing
    assert found.forward.best[0] == pytest.approx(1.0)
    assert found.backward.indices.tolist() == [[0, NO_MATCH]]


def test_few_shared_tokens_are_no_evidence() -> None:
    a, b = torch.zeros(100, 1), torch.zeros(100, 1)
    a[:12, 0], b[8:20, 0] = 1.0, 1.0
    for least, expected in ((4, 0), (5, NO_MATCH)):
        assert match_activity(logged(a), logged(b), min_coactive=least).forward.match.tolist() == [expected]


def test_bad_input() -> None:
    log = FiringLog(2)
    with pytest.raises(ShapeMismatch, match=r"\[n, 2\]"):
        log.update(torch.zeros(3, 4))
    for bad in (torch.nan, torch.inf):
        with pytest.raises(BadFile):
            log.update(torch.tensor([[0.0, bad]]))
    assert log.n_tokens == 0
    with pytest.raises(ShapeMismatch, match="same text"):
        match_activity(logged(torch.ones(3, 2)), logged(torch.ones(4, 2)))


def test_no_text_at_all() -> None:
    found = match_activity(FiringLog(2), FiringLog(3))
    assert set(found.forward.reason) == {"it never fires on this text"}
    assert len(found.backward.reason) == 3
