"""Absorbed or gone: planted parents are found, chance ones are not."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

from saeffect.diffing import correspondence as module
from saeffect.diffing.coactivity import FiringLog
from saeffect.diffing.correspondence import absorption
from saeffect.diffing.pair import SaeView
from saeffect.errors import ShapeMismatch

N, D_IN, TOKENS = 80, 32, 3000


def view(acts: torch.Tensor, W_dec: torch.Tensor) -> SaeView:
    log = FiringLog(acts.shape[1])
    log.update(acts)
    return SaeView("sae", W_dec, pd.DataFrame(), log)


def world() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Activations and decoders of a control and a treatment; the treatment's know nothing of the control's."""
    generator = torch.Generator().manual_seed(0)
    acts = [(torch.rand(TOKENS, N, generator=generator) < 0.03).float() for _ in range(2)]
    decoders = [torch.randn(N, D_IN, generator=generator) for _ in range(2)]
    return acts[0], acts[1], decoders[0], decoders[1]


def check(features, control, treatment, W_control, W_treatment) -> pd.DataFrame:
    found = absorption(features, view(control, W_control), view(treatment, W_treatment))
    return found.set_index("feature", drop=False)


def test_parent_and_detail_together_absorb() -> None:
    control, treatment, W_control, W_treatment = world()
    unit = torch.nn.functional.normalize
    child = control[:, 3] > 0
    treatment[:, 10] = torch.maximum(treatment[:, 10], child.float())  # the parent fires there, and elsewhere
    half = child & (torch.arange(TOKENS) % 2 == 0)
    treatment[:, 20] = half.float()
    W_control[3] = 3 * unit(W_treatment[10], dim=0) + unit(W_treatment[20], dim=0)
    row = check([3], control, treatment, W_control, W_treatment).loc[3]
    assert row["absorbed"]
    assert row["absorbed_by"][:2] == [10, 20]
    assert row["cosine"] > 0.99
    assert row["recall"] == 1.0
    assert row["recall_each"][0] == 1.0
    assert row["recall_each"][1] == pytest.approx(half.sum().item() / child.sum().item())
    assert row["weights"][0] / row["weights"][1] == pytest.approx(3, rel=0.1)
    assert row["n_active"] == child.sum().item()
    assert row["cosine_p"] == 1 / (1 + N - 1)
    assert row["reason"] == ""


def test_parents_must_fire_and_point_alike() -> None:
    control, treatment, W_control, W_treatment = world()
    W_treatment[10] = W_control[3]  # right direction, wrong tokens
    treatment[:, 11] = control[:, 4]  # right tokens, wrong direction
    table = check([3, 4], control, treatment, W_control, W_treatment)
    assert not table["absorbed"].any()
    assert 10 not in table.loc[3, "absorbed_by"]
    assert table.loc[4, "reason"]


def test_what_fires_everywhere_is_no_parent() -> None:
    control, treatment, W_control, W_treatment = world()
    treatment[:, :] = 0
    treatment[:, 7] = 1.0
    W_treatment[7] = W_control[3]
    row = check([3], control, treatment, W_control, W_treatment).loc[3]
    assert not row["absorbed"]
    assert row["reason"] == "no feature fires with it more often than elsewhere"
    assert np.isnan(row["recall"])


def test_few_are_absorbed_by_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, lenient in (("_MIN_COSINE", 0.01), ("_MIN_RECALL", 0.01), ("_MIN_LIFT", 1.0)):
        monkeypatch.setattr(module, name, lenient)
    table = check(list(range(N)), *world())
    assert table["absorbed"].sum() <= N * 0.05 + 2 * np.sqrt(N * 0.05 * 0.95)


def test_each_condition_has_its_reason() -> None:
    control, treatment, W_control, W_treatment = world()
    treatment[:, 10] = control[:, 3] * (torch.arange(TOKENS) % 3 == 0)
    W_treatment[10] = W_control[3]
    assert "% of its tokens only" in check([3], control, treatment, W_control, W_treatment).loc[3, "reason"]
    treatment[:, 10] = control[:, 3]
    W_treatment[10] = -W_control[3]
    only = torch.zeros_like(treatment)
    only[:, 10] = treatment[:, 10]
    row = check([3], control, only, W_control, W_treatment).loc[3]
    assert row["reason"] == "those that fire with it point elsewhere"
    assert (row["cosine"], row["cosine_p"]) == (0.0, 1.0)


def test_features_that_hardly_fire_and_none_at_all() -> None:
    control, treatment, W_control, W_treatment = world()
    control[:, 5] = 0
    table = check([5], control, treatment, W_control, W_treatment)
    assert table.loc[5, "reason"] == "it fires on 0 tokens, and 10 are needed"
    assert table.loc[5, "absorbed_by"] == []
    empty = check([], control, treatment, W_control, W_treatment)
    assert len(empty) == 0
    assert list(empty.columns) == list(table.columns)


def test_bad_input() -> None:
    control, treatment, W_control, W_treatment = world()
    with pytest.raises(ShapeMismatch, match="same text"):
        check([0], control[:5], treatment, W_control, W_treatment)
    with pytest.raises(ShapeMismatch, match="wide"):
        check([0], control, treatment, W_control, W_treatment[:, :5])
