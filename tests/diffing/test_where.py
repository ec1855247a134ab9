"""Where fine-tuning changed a model: layers, positions, words and texts, against null fine-tunes."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from saeffect.diffing.trace import EARLY, OPENINGS, Trace, Tracer
from saeffect.lm.activations import NormLimit, TokenRows
from saeffect.lm.hooks import capture
from saeffect.lm.language_model import LanguageModel
from saeffect.sae.base import SaeConfig
from saeffect.sae.standard import StandardSae

HOOK = "blocks.1.hook_resid_post"


def tuned_like(lm: LanguageModel, size: float, seed: int) -> LanguageModel:
    """The model with noise on every matrix."""
    model = copy.deepcopy(lm.model)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim == 2:
            parameter.data += size * parameter.data.std() * torch.randn(parameter.shape, generator=generator)
    return replace(lm, model=model, name=f"tuned-{seed}", identity=f"tuned-{seed}")


@pytest.fixture(scope="module")
def rows() -> TokenRows:
    ids = np.random.default_rng(0).integers(1, 320, (12, 16)).astype(np.int32)
    ids[:, 0] = 0
    return TokenRows(ids, np.zeros(12, dtype=np.int64), ("general",))


@pytest.fixture(scope="module")
def tracer(tiny_llama: LanguageModel, rows: TokenRows) -> Tracer:
    sae = StandardSae(SaeConfig("standard", 32, 24, apply_b_dec_to_input=False))
    generator = torch.Generator().manual_seed(3)
    for parameter in sae.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    sae.requires_grad_(False)
    return Tracer(tiny_llama, sae, HOOK, rows, NormLimit(1.0, 1e6))


@pytest.fixture(scope="module")
def trace(tracer: Tracer) -> Trace:
    return tracer.trace(tuned_like(tracer.base, 0.3, 1), "tuned")


def test_early_halves_and_norm_are_means_over_rows(tracer, trace):
    tuned = tuned_like(tracer.base, 0.3, 1)
    ids = torch.from_numpy(tracer.rows.ids.astype(np.int64))
    x = capture(tracer.base, HOOK, ids)
    difference = (capture(tuned, HOOK, ids) - x)[:, 1 : 1 + EARLY]
    expected = torch.stack([difference[::2].mean(dim=0), difference[1::2].mean(dim=0)])
    np.testing.assert_allclose(trace.early, expected, atol=1e-4)
    np.testing.assert_allclose(trace.numbers["norm"], x[:, 1:].norm(dim=-1).mean(), rtol=1e-5)


def test_divergence_after_an_opening(tracer, trace):
    opening = OPENINGS.index("Here is")
    ids = torch.tensor([tracer.base.encode_prompt("Here is")])
    base, tuned = (m.model(ids).logits[0, -1].log_softmax(0) for m in (tracer.base, tuned_like(tracer.base, 0.3, 1)))
    expected = torch.nn.functional.kl_div(base, tuned, log_target=True, reduction="sum")
    np.testing.assert_allclose(trace.openings[opening], expected, rtol=1e-3)
    assert trace.openings.shape == (len(OPENINGS),)


def test_a_trace_survives_its_file(trace, tmp_path):
    trace.save(tmp_path / "t.safetensors")
    again = Trace.load(tmp_path / "t.safetensors")
    np.testing.assert_allclose(again.early, trace.early, rtol=1e-3, atol=1e-3)
    np.testing.assert_array_equal(again.openings, trace.openings)
    assert again.numbers == trace.numbers
