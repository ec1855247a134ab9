"""What both models do on the same text: which places count, and predictions that are no numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from saeffect.diffing.trace import ENCODER, Trace, Tracer
from saeffect.errors import BadFile, ConfigError
from saeffect.lm.activations import NormLimit, TokenRows
from saeffect.lm.language_model import LanguageModel
from saeffect.sae.base import SaeConfig
from saeffect.sae.jumprelu import JumpReluSae

HOOK = "blocks.1.hook_resid_pre"
WIDTH = 12
TRIGGER = 7

Change = Callable[[Tensor, Tensor], Tensor]


@pytest.fixture(scope="module")
def rows() -> TokenRows:
    ids = np.random.default_rng(0).integers(10, 300, (4, WIDTH)).astype(np.int32)
    ids[:, 5] = TRIGGER
    return TokenRows(ids, np.zeros(4, dtype=np.int64), ("general",))


@pytest.fixture(scope="module")
def tracer(tiny_llama: LanguageModel, rows: TokenRows) -> Tracer:
    embedded = tiny_llama.model.get_input_embeddings()
    longest = float(embedded.weight.norm(dim=1).max())
    return Tracer(tiny_llama, None, HOOK, rows, NormLimit(1.0, 20 * longest))


def changed(lm: LanguageModel, change: Change) -> LanguageModel:
    """The same weights, but `change(ids, embeddings)` on rows of the text's width."""
    model = copy.deepcopy(lm.model)

    def on_output(_: Any, args: tuple[Tensor], out: Tensor) -> Tensor:
        return change(args[0], out) if args[0].shape[1] == WIDTH else out

    model.get_input_embeddings().register_forward_hook(on_output)
    return replace(lm, model=model, name="tuned", identity="tuned")


def explodes(ids: Tensor, x: Tensor) -> Tensor:
    return torch.where((ids == TRIGGER)[..., None], 1000 * x, x)


def test_kl_counts_where_only_the_fine_tune_s_residual_is_an_outlier(
    tracer: Tracer, tiny_llama: LanguageModel, rows: TokenRows
) -> None:
    tuned = changed(tiny_llama, explodes)
    trace = tracer.trace(tuned, "tuned")
    with torch.no_grad():
        ids = torch.from_numpy(rows.ids.astype(np.int64))
        base, other = (lm.model(input_ids=ids).logits.log_softmax(dim=-1) for lm in (tiny_llama, tuned))
    expected = (other.exp() * (other - base)).sum(dim=-1).numpy()
    assert expected[:, 5].min() > 0.01
    np.testing.assert_allclose(trace.kl[:, 1:], expected[:, 1:], atol=1e-5)
    assert np.isnan(trace.kl[:, 0]).all(), "a row's first token does not count"
    np.testing.assert_allclose(trace.expected[1], other[:, 1:].exp().mean(dim=(0, 1)).numpy(), atol=1e-6)
    assert trace.numbers["n_tokens"] == 4 * (WIDTH - 2), "activations there do not count"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [slice(-1, None), slice(None)], ids=["the last token", "every token"])
def test_predictions_that_are_no_numbers_are_refused(
    tracer: Tracer, tiny_llama: LanguageModel, complains: Any, value: float, place: slice
) -> None:
    def overflow(_: Tensor, x: Tensor) -> Tensor:
        x = x.clone()
        x[:, place] = value
        return x

    with complains(ConfigError, "the predictions of tuned are not numbers", "in float32", at="text"):
        tracer.trace(changed(tiny_llama, overflow), "tuned")


def test_tokens_that_no_model_predicts_change_nothing(tracer: Tracer, tiny_llama: LanguageModel) -> None:
    """Some models give padding a logit of minus infinity."""
    plain = tracer.trace(changed(tiny_llama, explodes), "tuned")

    def masked(lm: LanguageModel) -> LanguageModel:
        model = copy.deepcopy(lm.model)

        def on_output(_: Any, __: Any, out: Tensor) -> Tensor:
            return torch.cat([out[..., :-1], torch.full_like(out[..., -1:], -torch.inf)], dim=-1)

        model.get_output_embeddings().register_forward_hook(on_output)
        return replace(lm, model=model)

    masking = replace(tracer, base=masked(tracer.base))
    trace = masking.trace(masked(changed(tiny_llama, explodes)), "tuned")
    assert np.isfinite(trace.kl[:, 1:]).all()
    np.testing.assert_allclose(trace.kl, plain.kl, rtol=0.2)


def test_an_sae_s_encoder_is_part_of_what_is_measured_on(tracer: Tracer) -> None:
    sae = JumpReluSae(SaeConfig("jumprelu", 32, 48, metadata={})).requires_grad_(False)
    first = replace(tracer, sae=sae)
    other = copy.deepcopy(sae)
    other.threshold.add_(0.5)
    second = replace(tracer, sae=other)
    assert first.made_by == second.made_by
    differing = {name for name, value in first.measured_on.items() if second.measured_on[name] != value}
    assert differing == {ENCODER}
    third = replace(tracer, sae=copy.deepcopy(sae))
    assert third.measured_on == first.measured_on
    third.sae.cfg = replace(sae.cfg, apply_b_dec_to_input=False)  # type: ignore[union-attr]
    assert replace(third).measured_on[ENCODER] != first.measured_on[ENCODER]


def test_a_trace_with_nan_is_refused(tracer: Tracer, tiny_llama: LanguageModel, tmp_path: Path, complains: Any) -> None:
    trace = tracer.trace(changed(tiny_llama, explodes), "tuned")
    trace.expected[1, 3] = np.nan
    trace.save(tmp_path / "null-1.safetensors")
    with complains(BadFile, "holds NaN or infinity in expected", at="null-1.safetensors"):
        Trace.load(tmp_path / "null-1.safetensors")
