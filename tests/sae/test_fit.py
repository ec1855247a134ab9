"""Measures of a pairing, also by position, against the plain formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from saeffect.lm.activations import first_limit, kept_positions
from saeffect.lm.hooks import capture
from saeffect.lm.language_model import LanguageModel
from saeffect.sae.base import SaeConfig
from saeffect.sae.fit import measure_fit
from saeffect.sae.metrics import explained_variance, spliced_losses
from saeffect.sae.topk import TopKSae
from saeffect.sae.training.config import SaeTrainingConfig

HOOK = "blocks.1.hook_resid_pre"


def test_fit_over_all_and_by_position(tiny_llama: LanguageModel) -> None:
    ids = np.random.default_rng(0).integers(1, 320, (11, 20)).astype(np.int32)
    sae = TopKSae(SaeConfig("topk", 32, 64, k=7))
    sae.initialise(torch.randn(50, 32), SaeTrainingConfig(d_sae=64, k=7))
    sae.eval().requires_grad_(False)
    limit = first_limit(tiny_llama, HOOK, ids)
    limit = type(limit)(limit.median_norm, 1.3 * limit.median_norm)  # some are outliers
    fit = measure_fit(tiny_llama, sae, HOOK, ids, limit)
    x = capture(tiny_llama, HOOK, torch.from_numpy(ids.astype(np.int64)))
    kept = kept_positions(x, limit)
    assert 0 < int((~kept[:, 1:]).sum()) < 100
    assert fit.explained_variance == pytest.approx(explained_variance(x[kept], sae(x[kept])))
    assert fit.sink_share == pytest.approx(float((~kept[:, 1:]).double().mean()))
    assert fit.mean_norm == pytest.approx(float(x[kept].norm(dim=1).mean()), rel=1e-5)
    assert fit.first_norm == pytest.approx(float(x[:, 0].norm(dim=1).mean()), rel=1e-5)
    assert fit.l0 == pytest.approx(float((sae.encode(x[kept]) > 0).sum(1).double().mean()))
    losses = spliced_losses(tiny_llama, sae, HOOK, ids, limit)
    assert fit.values()["ce_loss_score"] == pytest.approx(losses.ce_loss_score)
    assert losses.by_position["sae"].mean() == pytest.approx(losses.sae)
    table = fit.positions.table().set_index("first")
    assert table["last"].tolist() == [0, 1, 3, 7, 15, 19]
    assert np.isnan(table.loc[0, "explained_variance"])
    assert np.isnan(table.loc[0, "ce_increase"])
    part, on = x[:, 4:8], kept[:, 4:8]
    error = (part - sae(part)).double().square().sum(-1)[on].sum()
    scatter = (part.double() - x[kept].double().mean(0)).square().sum(-1)[on].sum()
    assert table.loc[4, "explained_variance"] == pytest.approx(float(1 - error / scatter), abs=1e-6)
    assert table.loc[4, "sink_share"] == pytest.approx(float((~on).double().mean()))
    with torch.inference_mode():
        logits = tiny_llama.model(input_ids=torch.from_numpy(ids.astype(np.int64))).logits[:, :-1]
    clean = torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), torch.from_numpy(ids[:, 1:].astype(np.int64)), reduction="none"
    )
    assert losses.by_position["clean"] == pytest.approx(clean.mean(0).numpy(), rel=1e-4)
    whole = fit.positions.table((0,))
    assert float(whole["explained_variance"].iloc[0]) == pytest.approx(fit.explained_variance)


def test_only_what_counts_is_measured(tiny_llama: LanguageModel) -> None:
    generator = np.random.default_rng(3)
    ids = generator.integers(1, 320, (11, 20)).astype(np.int32)
    counts = generator.random((11, 20)) < 0.4
    sae = TopKSae(SaeConfig("topk", 32, 64, k=7))
    sae.initialise(torch.randn(50, 32), SaeTrainingConfig(d_sae=64, k=7))
    sae.eval().requires_grad_(False)
    limit = first_limit(tiny_llama, HOOK, ids)
    limit = type(limit)(limit.median_norm, 1.3 * limit.median_norm)
    fit = measure_fit(tiny_llama, sae, HOOK, ids, limit, counts=counts)
    x = capture(tiny_llama, HOOK, torch.from_numpy(ids.astype(np.int64)))
    asked = torch.from_numpy(counts)
    kept = kept_positions(x, limit, asked)
    assert fit.tokens == int(kept.sum()) < int(asked.sum())
    assert fit.explained_variance == pytest.approx(explained_variance(x[kept], sae(x[kept])))
    assert fit.sink_share == pytest.approx(1 - float(kept[:, 1:].sum()) / float(asked[:, 1:].sum()))
    losses = spliced_losses(tiny_llama, sae, HOOK, ids, limit, counts=counts)
    assert fit.values()["ce_sae"] == pytest.approx(losses.sae)
